"""The processes of a pipeline that are made to die, the customers who order meanwhile, and the check of what came of it.

Rule: nobody but the test starts a process again, so one that ends without being told to is found. What is checked are the promises that the demo
checks too (D1-D3, D5-D7), and that all who keep something about a payment agree: the payments group, Kafka, orders, analytics.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis

from api.cli.demo.evidence import gathered, starting_line
from api.cli.demo.promises import COMMANDS, Evidence, unkept, verdicts
from api.cli.demo.traffic import Journey, Storefront, planned
from infra.database.outbox import OutboxStore
from infra.database.pool import opened_pool
from infra.local.client import opened_session
from infra.local.process import Program, last_lines
from producers.audit import audit
from producers.producer import KafkaProducer, Record
from tests.integration.pipeline import GROUPS, Pipeline, Shop, eventually

CRASHED = 137
WITHIN_S = 60.0

_ORDERS_THAT_DIFFER = """
    SELECT order_id, p.payment_id::text, p.status, o.status FROM payments p LEFT JOIN orders o USING (order_id, payment_id)
    WHERE o.status IS DISTINCT FROM CASE p.status
        WHEN 'COMPLETED' THEN 'PENDING' WHEN 'FAILED' THEN 'PAYMENT_FAILED' WHEN 'CANCELLED' THEN 'CANCELLED' ELSE 'PAYMENT_PENDING' END"""
_VIEWS_THAT_DIFFER = """
    SELECT payment_id::text, p.status, p.version, p.captured_minor, a.status, a.version, a.captured_minor
    FROM payments p FULL JOIN analytics.payments a USING (payment_id)
    WHERE (p.order_id, p.status, p.version, p.amount_minor, p.captured_minor, p.currency, p.gateway)
        IS DISTINCT FROM (a.order_id, a.status, a.version, a.amount_minor, a.captured_minor, a.currency, a.gateway)"""


class Lives:
    """The processes of a pipeline by name, each in the life that it lives now. Every life has a log of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.now: dict[str, Program] = {**pipeline.workers, "relay": pipeline.relay, "api": pipeline.api}
        self._doomed: set[str] = set()

    def begin(self, name: str, crash_at: str = "") -> Program:
        """Start a process. Without `crash_at` wait until it is ready; with it, a point as `name:n`, it may be gone before that."""
        self._doomed = self._doomed - {name} | ({name} if crash_at else set())
        arguments = ("worker", name) if name in GROUPS else (name,)
        self.now[name] = self.pipeline.start(*arguments, wait=not crash_at, PAYSTREAM_CRASH_AT=crash_at)
        return self.now[name]

    def mend(self) -> None:
        """Start again whatever has ended or is doomed: the test before this one has failed."""
        for name, program in self.now.items():
            if name in self._doomed or not program.running:
                program.kill()
                self.begin(name)

    def wipe_redis(self) -> None:
        with redis.Redis.from_url(self.pipeline.settings.redis.url.get_secret_value()) as client:
            client.flushdb()


class Customers:
    """Those who order in one test, and what became of their orders."""

    def __init__(self, lives: Lives, shop: Shop, producer: KafkaProducer, starts: dict[tuple[str, int], int]) -> None:
        self._lives, self._shop, self._producer, self._starts = lives, shop, producer, starts
        self.bank = shop.bank
        self._chance = random.Random(4)
        self._front = Storefront(shop.caller, shop.bank, self._chance, self._publish_raw)
        self._journeys: list[Journey] = []

    async def order(self, run: str, payments: int) -> None:
        """Live through so many orders of all kinds at once, and one that is parked. One is turned away by the gateway at first: work for a timer."""
        journeys = planned(payments, 1, run, self._chance)
        self._journeys += journeys
        unlucky = next(journey.order_id for journey in journeys if journey.kind == "card")
        await self.bank.order_fault("rate_limit", operation="create", match={"metadata": {"order_id": unlucky}})
        async for _ in self._front.play(journeys, at_once=len(journeys)):
            pass

    async def _publish_raw(self, order_id: str, value: bytes) -> None:
        await self._producer.send(Record(topic=COMMANDS, key=order_id.encode(), value=value))

    async def check(self) -> None:
        """Wait until all is at rest. Then every promise is kept, and all agree."""
        pipeline, shop = self._lives.pipeline, self._shop
        settings, codec = pipeline.settings, pipeline.codec
        evidence = await gathered(settings, codec, shop.caller, shop.bank, shop.user, self._journeys, self._starts, lambda _: None)
        _assert_kept(evidence)
        await self._agree("orders", _ORDERS_THAT_DIFFER)
        await self._agree("analytics", _VIEWS_THAT_DIFFER)
        async with opened_pool(settings.database, "auditor") as pool:
            audited = await audit(settings, codec, OutboxStore(pool, settings.database))
        assert audited.ok, audited.findings
        orders = {journey.order_id for journey in self._journeys}
        parked = {(group, order) for group, order in pipeline.query("SELECT group_name, order_key FROM parked_messages") if order in orders}
        assert parked == {("payments", order) for order in evidence.parked_orders}
        assert {name: program.exit_code for name, program in self._lives.now.items()} == dict.fromkeys(self._lives.now), "nobody else has ended"

    async def _agree(self, whom: str, differing: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while rows := self._lives.pipeline.query(differing):
            assert time.monotonic() < deadline, f"{whom} and payments differ: {rows[:20]}"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def customers_of(lives: Lives) -> AsyncIterator[Customers]:
    """Customers of a pipeline all of which runs."""
    await asyncio.to_thread(lives.mend)
    settings = lives.pipeline.settings
    starts = await asyncio.to_thread(starting_line, settings)
    producer = KafkaProducer(settings)
    await producer.start()
    try:
        async with opened_session(connections=1000) as session:
            yield Customers(lives, Shop(lives.pipeline, session, "customer"), producer, starts)
    finally:
        await producer.close()


def _assert_kept(evidence: Evidence) -> None:
    """Each promise rests on something, and is kept. Payments are told with their orders, whose names say what happened while they were under way."""
    broken = [f"{verdict.promise}: {what}" for verdict in unkept(verdicts(evidence)) for what in verdict.broken or ["nothing to check"]]
    orders = {request.payment_id: request.order_id for request in evidence.requests}
    assert not broken, "\n".join([*broken, *(f"{payment}: {order}" for payment, order in orders.items() if any(payment in what for what in broken))])


async def until_crashed(program: Program, point: str) -> None:
    """Wait until the process has ended itself at the point, `name:n`."""

    async def ended() -> bool:
        return not program.running

    await eventually(ended, WITHIN_S, f"{program.name} comes to {point}")
    assert program.exit_code == CRASHED
    assert f"crash point {point.partition(':')[0]} hit" in last_lines(program.log, 5)
