"""The workers of orders and analytics as real processes on real topics: killed at their crash points, and analytics rebuilt by a replay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from infra.local import environment
from infra.schema_registry import load_codec, register
from infra.settings import Settings
from processors.analytics.projections import project
from processors.orders.machine import evolve
from schemas.codec import Codec, headers
from schemas.messages import OrderEvent, PaymentEvent
from schemas.state import Order
from schemas.views import Views
from tests.conftest import StartProgram
from tests.integration.machinery import quick, until
from tests.processors.payment_events import histories, interleaved
from tests.topic_reader import read_topic

pytestmark = pytest.mark.race

Query = Callable[[str], list[Any]]


@pytest.fixture
def settings(installation: Settings) -> Settings:
    register(installation)
    return quick(installation)


@pytest.fixture
def codec(settings: Settings) -> Codec:
    return load_codec(settings)


@pytest.fixture
def query(settings: Settings) -> Query:
    def ask(statement: str) -> list[Any]:
        with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()

    return ask


def publish(settings: Settings, codec: Codec, events: Sequence[PaymentEvent]) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, "partitioner": "murmur2_random", "linger.ms": 5, "log_level": 0})
    for event in events:
        producer.produce(f"{settings.prefix}payment-events", key=event.order_id.encode(), value=codec.encode(event), headers=[*headers(event)])
    assert producer.flush(20) == 0


def crash(start: StartProgram, settings: Settings, group: str, point: str) -> None:
    """Run the worker until it ends itself at the point."""
    program = start("worker", group, settings=settings, wait=False, PAYSTREAM_CRASH_AT=point)  # it may be there before it is ready
    until(lambda: program.exit_code is not None, 40, f"{group} reaches {point}")
    assert program.exit_code == 137


def test_orders_survive_a_kill_and_their_events_are_on_kafka_once(settings: Settings, codec: Codec, start: StartProgram, query: Query) -> None:
    streams = histories(4)
    publish(settings, codec, interleaved(streams))
    crash(start, settings, "orders", "orders.after_record:2")
    start("relay", settings=settings)
    start("worker", "orders", settings=settings)
    until(lambda: query("SELECT count(*) FROM orders") == [(len(streams),)], 40, "every order is there")
    wanted = {events[-1].payment_id: events[-1].version for events in streams if events[-1].event_type == "PAYMENT_COMPLETED"}
    positions = "SELECT entity_id, version FROM stream_positions WHERE group_name = 'orders'"
    until(lambda: wanted.items() <= dict(query(positions)).items(), 40, "every payment is followed to its end")
    until(lambda: query("SELECT count(*) FROM outbox WHERE published_at IS NULL") == [(0,)], 20, "all is published")
    folded: dict[str, Order] = {}
    for record in read_topic(settings, "order-events"):
        event = codec.decode(record.value)
        assert isinstance(event, OrderEvent)
        folded[event.order_id] = evolve(folded.get(event.order_id), event)  # raises at a version that is missing, or there twice
    kept = dict(query("SELECT order_id, (status, version)::text FROM orders"))
    assert {order_id: f"({order.status},{order.version})" for order_id, order in folded.items()} == kept
    assert query("SELECT count(*) FROM parked_messages") == [(0,)]


def test_analytics_survives_kills_and_a_rebuild_gives_the_same_rows(settings: Settings, codec: Codec, start: StartProgram, query: Query) -> None:
    events = interleaved(histories(20))
    expected = Views()
    for event in events:
        project(expected, event)
    publish(settings, codec, events)
    crash(start, settings, "analytics", "analytics.before_commit:2")
    crash(start, settings, "analytics", "analytics.after_commit:1")
    worker = start("worker", "analytics", settings=settings)

    def rows() -> list[list[Any]]:
        return [query("SELECT * FROM analytics.payments ORDER BY payment_id"), query("SELECT * FROM analytics.attempts ORDER BY payment_id, attempt")]

    def caught_up() -> bool:
        return dict(query("SELECT payment_id::text, version FROM analytics.payments")) == {key: row.version for key, row in expected.payments.items()}

    until(caught_up, 40, "all is folded")
    first = rows()
    assert {(str(row[0]), row[1]): row[3] for row in first[1]} == {key: row.outcome for key, row in expected.attempts.items()}

    refused = _rebuild(settings)
    assert (refused.returncode, "stop its workers first" in refused.stderr) == (1, True)
    assert rows() == first, "what is refused changes nothing"
    worker.stop()
    assert _rebuild(settings).returncode == 0
    assert rows() == [[], []]
    start("worker", "analytics", settings=settings)
    until(caught_up, 40, "all is folded again")
    assert rows() == first
    assert query("SELECT count(*) FROM parked_messages") == [(0,)]


def _rebuild(settings: Settings) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "api.cli.main", "rebuild", "--as", "alice")
    return subprocess.run(command, env=environment.variables(settings), capture_output=True, text=True, timeout=60, check=False)
