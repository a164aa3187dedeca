"""Workers as real processes: scaled, killed, stopped, held and halted, under load, with nothing lost and no order broken."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psycopg
import pytest
from psycopg import sql

from infra.clock import SystemClock
from infra.database.delivery import Group
from infra.database.parking import PostgresParking
from infra.database.pool import opened_pool
from infra.local.stack import Stack
from tests.integration.machinery import COMMANDS, Machinery, get, until

pytestmark = pytest.mark.race


def test_workers_come_and_go_under_load(machinery: Machinery) -> None:
    """1 → 2 → 3 → 2 workers at 50 messages/s with a second of waiting each."""
    machinery.worker("w1")
    with machinery.steadily(50, orders=100):
        until(lambda: machinery.handled_count() > 100, 15, "the first one works")
        second = machinery.worker("w2")
        machinery.worker("w3")
        until(lambda: {worker for worker, _, _ in machinery.handled()[-60:]} == {"w1", "w2", "w3"}, 20, "three of them work")
        second.stop()
        assert second.exit_code == 0
        so_far = machinery.handled_count()
        until(lambda: machinery.handled_count() > so_far + 150, 20, "the other two go on")
    until(lambda: not machinery.missing(), 20, "nothing is lost")
    assert machinery.out_of_order() == []
    assert machinery.longest_pause() < 15
    assert machinery.twice() == 0, "each was finished and committed before its partition was given back"


def test_a_killed_worker_loses_nothing(machinery: Machinery) -> None:
    machinery.worker("w1", "--latency", "0.5")
    first = machinery.worker("w2", "--latency", "0.5")
    with machinery.steadily(50, orders=50):
        until(lambda: {worker for worker, _, _ in machinery.handled()[-60:]} == {"w1", "w2"}, 20, "both work")
        first.kill()
        killed_at = machinery.handled_count()
        until(lambda: machinery.handled_count() > killed_at + 400, 25, "the other one has taken over")
    until(lambda: not machinery.missing(), 20, "nothing is lost")
    assert machinery.out_of_order() == []
    assert machinery.longest_pause() < 15


def test_a_worker_that_was_frozen_finds_out_that_it_lost_its_partitions(machinery: Machinery) -> None:
    frozen = machinery.worker("w1", "--latency", "0.3")
    machinery.worker("w2", "--latency", "0.3")
    assert frozen.identity is not None
    with machinery.steadily(50, orders=50):
        until(lambda: {worker for worker, _, _ in machinery.handled()[-60:]} == {"w1", "w2"}, 20, "both work")
        os.kill(frozen.identity.pid, signal.SIGSTOP)
        so_far = machinery.handled_count()
        until(lambda: machinery.handled_count() > so_far + 400, 25, "the other one has taken over")
        os.kill(frozen.identity.pid, signal.SIGCONT)
        until(lambda: {worker for worker, _, _ in machinery.handled()[-60:]} == {"w1", "w2"}, 20, "both work again")
    until(lambda: not machinery.missing(), 20, "nothing is lost")
    assert machinery.out_of_order() == []
    assert frozen.running
    until(lambda: machinery.lag() == 0, 10, "committed")


def test_workers_that_come_and_go_quickly_under_load(machinery: Machinery) -> None:
    """Partitions are given back and got again before anything of them was read, or committed."""
    machinery.worker("w0", "--latency", "0.2")
    with machinery.steadily(50, orders=50):
        for number in range(1, 5):
            passing = machinery.worker(f"w{number}", "--latency", "0.2")
            machinery.worker(f"x{number}", "--latency", "0.2", wait=False)
            (passing.kill if number % 2 else passing.stop)()
            machinery.programs[-1].stop()
    until(lambda: not machinery.missing(), 30, "nothing is lost")
    assert machinery.out_of_order() == []
    until(lambda: machinery.lag() == 0, 10, "committed")


def test_a_broker_that_restarts_costs_nothing_but_time(machinery: Machinery, stack: Stack) -> None:
    workers = [machinery.worker("w1", "--latency", "0.2"), machinery.worker("w2", "--latency", "0.2")]
    with machinery.steadily(50, orders=50):
        until(lambda: machinery.handled_count() > 150, 20, "they work")
        machinery.restart_broker(stack)
        so_far = machinery.handled_count()
        until(lambda: machinery.handled_count() > so_far + 100, 30, "they go on")
    until(lambda: not machinery.missing(), 30, "nothing is lost")
    assert machinery.out_of_order() == []
    assert all(worker.running for worker in workers)
    until(lambda: all(worker.is_ready() for worker in workers), 15, "ready again")


def test_a_hot_order_does_not_stop_the_others(machinery: Machinery) -> None:
    machinery.worker("w1", "--latency", "0.05", "--slow", "0.5")
    machinery.send_all(["slow-hot"] * 20 + [f"order-{number}" for number in range(600)])
    until(lambda: machinery.handled_count() >= 600, 8, "the others are done")
    assert sum(order == "slow-hot" for _, order, _ in machinery.handled()) < 20
    until(lambda: not machinery.missing(), 15, "the hot one is done too")
    assert machinery.out_of_order() == []


def test_a_stopped_worker_finishes_what_runs_and_leaves_what_is_queued(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "1")
    machinery.send_all([f"order-{number}" for number in range(30)] * 4)
    until(lambda: machinery.figure("w1", "paystream_window_running") == 30, 10, "30 run, 90 are queued")
    begun = time.monotonic()
    worker.stop()
    assert worker.exit_code == 0
    assert time.monotonic() - begun < 5
    assert machinery.handled_count() in {30, 60}
    machinery.worker("w2", "--latency", "0")
    until(lambda: not machinery.missing(), 10, "the next one has the rest")
    assert machinery.out_of_order() == []
    assert machinery.twice() == 0


def test_a_worker_stops_in_time_though_a_handler_does_not(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "0", "--slow", "60")
    machinery.send_all(["slow-1", "order-1", "order-2"])
    until(lambda: machinery.handled_count() == 2, 10, "the others are done")
    begun = time.monotonic()
    worker.stop()
    assert worker.exit_code == 0
    assert machinery.settings.worker.drain_s <= time.monotonic() - begun < machinery.settings.worker.drain_s + 10
    machinery.worker("w2", "--latency", "0", "--slow", "0")
    until(lambda: not machinery.missing(), 10, "the next one has it")


def test_a_handler_that_outlives_the_drain_keeps_nobody_waiting(machinery: Machinery) -> None:
    machinery.worker("w1", "--latency", "0", "--slow", "12")
    machinery.send_all([f"slow-{number}" for number in range(6)] + [f"order-{number}" for number in range(30)])
    until(lambda: machinery.handled_count() == 30, 10, "the others are done")
    begun = time.monotonic()
    machinery.worker("w2", "--latency", "0", "--slow", "0")
    assert time.monotonic() - begun < 11
    machinery.send_all(f"order-{number}" for number in range(30))
    until(lambda: not machinery.missing(), 25, "all are handled, the slow ones by either")
    assert machinery.out_of_order() == []


def test_messages_wait_while_postgres_is_away(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "0")
    name = machinery.settings.database.url.get_secret_value().rpartition("/")[2]
    address = machinery.settings.database.url.get_secret_value().removesuffix(name) + "postgres"
    with psycopg.connect(address, autocommit=True) as administrator:
        administrator.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
        administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND application_name = 'w1'", (name,))
        machinery.send_all(f"order-{number}" for number in range(50))
        until(lambda: "Postgres" in get(worker, "/readyz?verbose")["checks"]["gate"], 15, "held")
        assert get(worker, "/livez")["status"] == "live"
        administrator.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(name)))
    until(lambda: not machinery.missing(), 25, "all are handled")
    until(worker.is_ready, 10, "released")
    assert machinery.parked() == []


async def test_too_many_bugs_halt_the_group_until_it_is_resumed(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "0")
    machinery.send_all(f"bug-{number}" for number in range(20))
    until(lambda: get(worker, "/readyz?verbose")["checks"]["halted"] != "ok", 15, "halted")
    machinery.send_all(f"order-{number}" for number in range(20))
    again = machinery.worker("w2", "--latency", "0", wait=False)
    until(lambda: machinery.answers(again) and "bugs" in get(again, "/readyz?verbose")["checks"]["halted"], 20, "who comes later is halted too")
    assert get(worker, "/livez")["status"] == "live"
    assert machinery.handled_count() == 0
    async with opened_pool(machinery.settings.database, "test") as pool:
        assert await PostgresParking(pool, SystemClock()).resume(Group.PAYMENTS, "somebody")
    await asyncio.to_thread(until, lambda: machinery.handled_count() == 20, 15, "all of it goes on")
    assert {disposition for disposition, _ in machinery.parked()} == {"bug"}
    assert len(machinery.parked()) == 20


def test_whatever_is_no_message_is_parked_and_stops_nobody(machinery: Machinery) -> None:
    machinery.worker("w1", "--latency", "0")
    rubbish: list[tuple[bytes | None, bytes | None]] = [
        (b"order-1", b"rubbish"),
        (None, None),
        (b"\0\xff", b"\0\0\0\0\1"),
        (b"a\0b", b""),
        (b"", b"x" * 1000),
    ]
    for key, value in rubbish:
        machinery.producer.produce(
            machinery.settings.prefix + COMMANDS, key=key, value=value, headers=[("ce_type", b"\xff\0"), ("empty", None), ("a", b"\xff\0")]
        )
    machinery.send_all(f"order-{number}" for number in range(20))
    until(lambda: machinery.handled_count() == 20, 15, "the others are done")
    until(lambda: len(machinery.parked()) == len(rubbish), 10, "all rubbish is parked")
    until(lambda: machinery.lag() == 0, 5, "committed")


def test_a_worker_that_meets_what_it_can_not_cope_with_ends_with_70(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "0")
    machinery.send_all(["order-1", "fatal-1"])
    until(lambda: not worker.running, 10, "ended")
    assert worker.exit_code == 70
    assert machinery.parked() == []
    assert sum(machinery.committed().values()) <= 1, "the message was not acknowledged"


def test_a_worker_does_not_go_on_without_one_of_its_services(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--ends", "0.1", wait=False)
    until(lambda: worker.exit_code == 70, 20, "ended")


def test_lag_is_measured_and_a_worker_waits_for_kafka_topics(machinery: Machinery) -> None:
    worker = machinery.worker(
        "w1", "--latency", "0", "--slow", "3", settings=machinery.settings.model_copy(update={"prefix": "nowhere-"}), wait=False
    )
    until(lambda: machinery.answers(worker) and "do not exist" in get(worker, "/readyz?verbose")["checks"]["topics"], 20, "waits")
    worker.stop()
    assert worker.exit_code == 0
    machinery.worker("w2", "--latency", "0", "--slow", "8")
    machinery.send_all(f"slow-{number}" for number in range(12))
    until(lambda: machinery.figure("w2", "paystream_consumer_lag_messages") == 12, 8, "all behind the slow ones is lag")
    until(lambda: machinery.figure("w2", "paystream_consumer_lag_messages") == 0, 20, "no lag is left")


def test_batches_are_committed_when_all_of_them_are_done(machinery: Machinery) -> None:
    worker = machinery.worker("w1", "--latency", "0.1", "--batch", "100")
    machinery.send_all(f"order-{number % 50}" for number in range(1000))
    until(lambda: machinery.handled_count() > 200, 10, "it works")
    worker.kill()
    machinery.worker("w2", "--latency", "0", "--batch", "100")
    until(lambda: not machinery.missing(), 20, "nothing is lost")
    assert machinery.out_of_order() == []
    until(lambda: machinery.lag() == 0, 5, "committed")
