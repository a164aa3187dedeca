"""Workers that come and go under load, and an order that is in everybody's way: what the rest of the payments notices of it.

Every process is a real one. The load is light: one HTTP request for each payment, and one consumer that sees outcomes as another team would.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count, pairwise
from pathlib import Path
from statistics import quantiles

import pytest
from confluent_kafka import Consumer, TopicPartition

from infra.local.client import Answer
from infra.local.process import Program
from infra.settings import Settings
from schemas.messages import Event, ResolveAttempt
from tests.conftest import Infrastructure
from tests.integration.machinery import figure
from tests.integration.pipeline import Pipeline, Shop, eventually, opened_pipeline, opened_shop

pytestmark = pytest.mark.race

OUTCOMES = frozenset({b"PAYMENT_COMPLETED", b"PAYMENT_FAILED"})
PER_SECOND = 50
GATEWAY_S = 1.0


class Watch:
    """When each order had its outcome: when a consumer could read it on `payment-events`."""

    def __init__(self, settings: Settings) -> None:
        config = {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": f"{settings.prefix}watch", "fetch.wait.max.ms": 20}
        self._consumer = Consumer(config | {"isolation.level": "read_committed", "enable.auto.commit": False, "log_level": 0})
        self._consumer.assign([TopicPartition(f"{settings.prefix}payment-events", partition, 0) for partition in range(3)])
        self._stop = threading.Event()
        self.seen: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._consumer.close()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for message in self._consumer.consume(500, timeout=0.05):
                assert message.error() is None, message.error()
                if dict(message.headers())["ce_type"] in OUTCOMES:
                    self.seen[message.key().decode()] = time.monotonic()


class Load:
    """Payments at a steady rate, each of an order of its own, sent without waiting for what comes of them.

    Every tenth is a hold, and its capture is sent as soon as the hold is accepted: it can only be carried out if it is handled behind it.
    """

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.sent: dict[str, float] = {}
        self.tries = 0

    @asynccontextmanager
    async def steadily(self, per_second: int) -> AsyncIterator[None]:
        """Within the block, so many a second. At its end all of them are accepted."""
        stop = asyncio.Event()
        sending = asyncio.create_task(self._send(per_second, stop))
        try:
            yield
        finally:
            stop.set()
            await sending

    async def _send(self, per_second: int, stop: asyncio.Event) -> None:
        began = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            for number in count():
                await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
                if stop.is_set():
                    return
                requests.create_task(self._buy(self._shop.order(), hold=number % 10 == 0))

    async def _buy(self, order: str, *, hold: bool) -> None:
        self.sent[order] = time.monotonic()
        accepted = await self._shop.pay(order, wait_s=None, capture_method="manual" if hold else "automatic")
        self._note(accepted)
        if hold:
            self._note(await self._shop.post(f"/payments/{accepted.body['payment_id']}/capture", wait_s=None))

    def _note(self, answer: Answer) -> None:
        assert answer.status == 202, answer.body
        self.tries += answer.tries


@pytest.mark.timeout(300)
async def test_workers_come_and_go_and_no_payment_is_lost_or_charged_twice(stack: Infrastructure, template_database: str, tmp_path: Path) -> None:
    """1 → 2 → 3 → 2 workers at 50 payments/s; a payment is two calls of the gateway, a second each."""
    with opened_pipeline(stack, template_database, tmp_path, groups=("payments",), latency=str(GATEWAY_S)) as pipeline:
        watch = Watch(pipeline.settings)
        async with opened_shop(pipeline) as shop:
            load = Load(shop)
            with watch.watching():
                workers = [pipeline.workers["payments"]]
                async with load.steadily(PER_SECOND):
                    began = time.monotonic()
                    await outcomes(watch, 150)
                    for _ in range(2):
                        workers.append(await asyncio.to_thread(pipeline.start, "worker", "payments"))
                        await outcomes(watch, 200)
                        assert await asyncio.to_thread(all_work, workers)
                    leaving = workers.pop(1)
                    await asyncio.to_thread(leaving.stop)
                    assert leaving.exit_code == 0
                    await outcomes(watch, 500)
                    ended = time.monotonic()
                await eventually(lambda: all_have_ended(pipeline, watch, load), 120, "every accepted payment has its outcome")
            charged = await shop.charged(*load.sent)
        tell(load, watch, began, ended)
        refused = given_up(pipeline)
        assert charged == {order: [0 if order in refused else 1999] for order in load.sent}, "each was charged once"
        assert_in_order(pipeline)
        assert refused <= doubted(pipeline), "no capture was handled before its hold"
        assert pipeline.parked() == []
        assert longest_pause(watch, began, ended) < 15


async def test_a_hot_order_does_not_stop_the_others(stack: Infrastructure, template_database: str, tmp_path: Path) -> None:
    """The gateway takes six seconds for each call of one order, which is asked for again and again."""
    with opened_pipeline(stack, template_database, tmp_path, groups=("payments",), latency="0.2") as pipeline:
        watch = Watch(pipeline.settings)
        async with opened_shop(pipeline) as shop:
            with watch.watching():
                usual = await sell(shop, watch, 60)
                hot = shop.order("hot")
                await shop.bank.order_fault("slow", times=3, delay_seconds=6, match={"metadata": {"order_id": hot}})
                held = await shop.pay(hot, wait_s=None, capture_method="manual")
                path = f"/payments/{held.body['payment_id']}/capture"
                captures = await asyncio.gather(*(shop.post(path, {"amount_minor": 100 + n}, wait_s=None) for n in range(9)))
                assert {answer.status for answer in captures} == {202}
                key = secrets.token_hex(8)
                status, body, told = await shop.post_once(path, {"amount_minor": 500}, key=key)
                assert (status, body["code"]) == (429, "too_many_undecided")
                assert int(told["Retry-After"]) >= 1
                meanwhile = await sell(shop, watch, 60)
                assert hot not in watch.seen
                again = await shop.post(path, {"amount_minor": 500}, key=key, wait_s=None)
                assert (again.status, again.tries > 1) == (202, True), "taken, once there is room"
                await eventually(lambda: decided(pipeline, hot), 60, "all that was asked of the hot order is decided")
            captured = (await shop.charged(hot))[hot]
        print(
            f"outcome after (p50, most): {usual[0]:.2f} s, {usual[1]:.2f} s as usual; {meanwhile[0]:.2f} s, {meanwhile[1]:.2f} s beside a hot order"
        )
        assert len(captured) == 1
        assert captured[0] in range(100, 109), "the capture that came first was carried out, the others were refused"
        assert_in_order(pipeline)
        outcomes = pipeline.query(f"SELECT outcome, count(*) FROM commands WHERE order_id = '{hot}' GROUP BY 1 ORDER BY 1")
        assert outcomes == [("applied", 2), ("refused", 9)]


# ── How the above is done ──


async def sell(shop: Shop, watch: Watch, payments: int) -> tuple[float, float]:
    """Some payments at once. When they had their outcomes: after how many seconds half of them, and the last one."""
    began, orders = time.monotonic(), [shop.order() for _ in range(payments)]
    await asyncio.gather(*(shop.pay(order, wait_s=None) for order in orders))

    async def all_there() -> bool:
        return watch.seen.keys() >= set(orders)

    await eventually(all_there, 60, "all outcomes are there")
    took = sorted(watch.seen[order] - began for order in orders)
    return took[payments // 2], took[-1]


async def outcomes(watch: Watch, more: int) -> None:
    """Wait for so many outcomes more."""
    goal = len(watch.seen) + more

    async def reached() -> bool:
        return len(watch.seen) >= goal

    await eventually(reached, 60, f"{more} more outcomes")


def given_up(pipeline: Pipeline) -> set[str]:
    """The orders of which something was refused."""
    return {order for (order,) in pipeline.query("SELECT order_id FROM commands WHERE outcome = 'refused'")}


async def all_have_ended(pipeline: Pipeline, watch: Watch, load: Load) -> bool:
    """Are all COMPLETED, but for holds whose capture was refused?"""
    left = load.sent.keys() - watch.seen.keys()
    return len(left) < 100 and left <= await asyncio.to_thread(given_up, pipeline)


def doubted(pipeline: Pipeline) -> set[str]:
    """The orders that a timer had to look after. A capture that comes while nobody knows whether its hold was made is refused."""
    return {message.order_id or "" for _, _, message in pipeline.records("payment-commands") if isinstance(message, ResolveAttempt)}


async def decided(pipeline: Pipeline, order: str) -> bool:
    rows = await asyncio.to_thread(pipeline.query, f"SELECT count(*) FROM commands WHERE order_id = '{order}' AND decided_at IS NULL")
    return rows == [(0,)]


def all_work(workers: list[Program]) -> bool:
    return all(figure(worker, "paystream_process_duration_seconds_count") for worker in workers)


def assert_in_order(pipeline: Pipeline) -> None:
    """On its partition each payment's events have versions from 1 on, without gaps."""
    last: defaultdict[str | None, int] = defaultdict(int)
    for _, _, event in pipeline.records("payment-events"):
        assert isinstance(event, Event)
        assert event.version == last[event.payment_id] + 1
        last[event.payment_id] += 1


def longest_pause(watch: Watch, began: float, ended: float) -> float:
    """The most seconds without an outcome between two times."""
    moments = [began, *sorted(moment for moment in watch.seen.values() if began < moment < ended), ended]
    return max(later - sooner for sooner, later in pairwise(moments))


def tell(load: Load, watch: Watch, began: float, ended: float) -> None:
    took = quantiles([watch.seen[order] - sent for order, sent in load.sent.items() if order in watch.seen], n=100)
    within = sum(began < moment < ended for moment in watch.seen.values())
    print(
        f"{len(load.sent)} payments in {ended - began:.0f} s, {within / (ended - began):.1f} outcomes/s; longest pause "
        f"{longest_pause(watch, began, ended):.1f} s; outcome after {took[49]:.2f} s (p50), {took[98]:.2f} s (p99); {load.tries} requests"
    )
