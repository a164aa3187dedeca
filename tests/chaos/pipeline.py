"""A whole installation as real processes that are made to die, the callers who use it meanwhile, and the check of what came of it.

Rule: nobody but the test starts a process again, so one that ends without being told to is found. What is checked is what the demo promises (D1-D3 and
D5-D7), and that whoever keeps something about a payment keeps the same: the payments group, Kafka, orders, analytics.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import redis
from pydantic import SecretStr

from api.auth import Tokens
from api.cli.demo.evidence import gathered, starting_line
from api.cli.demo.promises import COMMANDS, Evidence, unkept, verdicts
from api.cli.demo.traffic import Journey, Storefront, planned
from infra.database.outbox import OutboxStore
from infra.database.pool import opened_pool
from infra.local.client import Bank, Caller, opened_session
from infra.local.process import Program, last_lines, paystream
from infra.schema_registry import load_codec, register
from infra.settings import Settings, Stripe
from producers.audit import audit
from producers.producer import KafkaProducer, Record
from tests.conftest import StartProgram, free_port, programs
from tests.integration.machinery import quick

PROCESSES = {
    "payments": ("worker", "payments"),
    "orders": ("worker", "orders"),
    "analytics": ("worker", "analytics"),
    "relay": ("relay",),
    "api": ("api",),
}
CRASHED = 137
USER = "customer"
STRIPE_KEY = "sk_test_chaos"
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


class Pipeline:
    """The processes of one installation, by name. Each start is a life of its own, with a log of its own."""

    def __init__(self, settings: Settings, sandbox: Program, start: StartProgram) -> None:
        self.settings, self.sandbox, self._start = settings, sandbox, start
        self.lives: dict[str, Program] = {}
        self.poisoned: set[str] = set()
        """The orders that met a message which nobody can read."""
        self._doomed: set[str] = set()

    def start(self, name: str, crash_at: str = "", *, wait: bool = True) -> Program:
        """Give a process its next life; `crash_at` is the point, as `name:n`, at which it ends. One that is doomed may be gone before it is ready."""
        self._doomed = self._doomed - {name} | ({name} if crash_at else set())
        self.lives[name] = self._start(*PROCESSES[name], wait=wait and not crash_at, PAYSTREAM_CRASH_AT=crash_at)
        return self.lives[name]

    def start_missing(self) -> None:
        """Start whatever does not run, and again what is doomed: a test before this one has failed, or there was none."""
        for name in self._doomed:
            self.lives[name].kill()
        missing = [self.start(name, wait=False) for name in PROCESSES if name not in self.lives or not self.lives[name].running]
        for program in missing:
            program.wait_ready()

    def wipe_redis(self) -> None:
        with redis.Redis.from_url(self.settings.redis.url.get_secret_value()) as client:
            client.flushdb()

    def query(self, statement: str, *parameters: object) -> list[Any]:
        with psycopg.connect(self.settings.database.url.get_secret_value(), autocommit=True) as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    @asynccontextmanager
    async def customers(self) -> AsyncIterator[Customers]:
        """Customers of this installation while all of it runs."""
        await asyncio.to_thread(self.start_missing)
        starts = await asyncio.to_thread(starting_line, self.settings)
        token = Tokens(self.settings.auth).issue(USER, [], timedelta(hours=1))
        producer = KafkaProducer(self.settings)
        await producer.start()
        try:
            async with opened_session(connections=1000) as session:
                caller = Caller(session, f"http://{self.settings.api.host}:{self.settings.api.port}", token)
                yield Customers(self, caller, Bank(session, self.sandbox.url), producer, starts)
        finally:
            await producer.close()


class Customers:
    """Those who order in one test, and what they have ordered."""

    def __init__(self, pipeline: Pipeline, caller: Caller, bank: Bank, producer: KafkaProducer, starts: dict[tuple[str, int], int]) -> None:
        self._pipeline, self._caller, self.bank, self._producer, self._starts = pipeline, caller, bank, producer, starts
        self._chance = random.Random(4)
        self._shop = Storefront(caller, bank, self._chance, self._publish_raw)
        self._journeys: list[Journey] = []

    async def order(self, run: str, payments: int) -> None:
        """Live through so many orders of all kinds at once, and one that is parked. The gateway turns one of them away at first: work for a timer."""
        journeys = planned(payments, 1, run, self._chance)
        self._journeys += journeys
        unlucky = next(journey.order_id for journey in journeys if journey.kind == "card")
        await self.bank.order_fault("rate_limit", operation="create", match={"metadata": {"order_id": unlucky}})
        async for _ in self._shop.play(journeys, at_once=len(journeys)):
            pass

    async def _publish_raw(self, order_id: str, value: bytes) -> None:
        await self._producer.send(Record(topic=COMMANDS, key=order_id.encode(), value=value))

    async def check(self) -> None:
        """Wait until all is at rest. Then every promise is kept, and all agree."""
        settings = self._pipeline.settings
        codec = await asyncio.to_thread(load_codec, settings)
        evidence = await gathered(settings, codec, self._caller, self.bank, USER, self._journeys, self._starts, lambda _: None)
        _assert_kept(evidence)
        await self._agree("orders", _ORDERS_THAT_DIFFER)
        await self._agree("analytics", _VIEWS_THAT_DIFFER)
        async with opened_pool(settings.database, "auditor") as pool:
            audited = await audit(settings, codec, OutboxStore(pool, settings.database))
        assert audited.ok, audited.findings
        self._pipeline.poisoned |= evidence.parked_orders
        parked = set(self._pipeline.query("SELECT group_name, order_key FROM parked_messages"))
        assert parked == {("payments", order) for order in self._pipeline.poisoned}
        assert {name: program.exit_code for name, program in self._pipeline.lives.items()} == dict.fromkeys(PROCESSES), "each lives its last life"

    async def _agree(self, whom: str, differing: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while rows := self._pipeline.query(differing):
            assert time.monotonic() < deadline, f"{whom} and payments differ: {rows}"
            await asyncio.sleep(0.1)


def _assert_kept(evidence: Evidence) -> None:
    """Each promise rests on something, and is kept. Orders are named by what was done to the pipeline while they were under way."""
    broken = [f"{verdict.promise}: {what}" for verdict in unkept(verdicts(evidence)) for what in verdict.broken or ["nothing to check"]]
    orders = {request.payment_id: request.order_id for request in evidence.requests}
    assert not broken, "\n".join([*broken, *(f"{payment}: {order}" for payment, order in orders.items() if any(payment in what for what in broken))])


async def until_crashed(program: Program, point: str) -> None:
    """Wait until the process has ended itself at the point, `name:n`."""
    deadline = time.monotonic() + WITHIN_S
    while program.running:
        assert time.monotonic() < deadline, f"{program.name} did not come to {point}"
        await asyncio.sleep(0.05)
    assert program.exit_code == CRASHED
    assert f"crash point {point.partition(':')[0]} hit" in last_lines(program.log, 5)


@contextmanager
def opened_pipeline(installation: Settings, folder: Path) -> Iterator[Pipeline]:
    """The processes of an installation, for as long as the block runs: the sandbox, and ours as soon as there are customers."""
    register(installation)
    port = free_port()
    options = ("--port", str(port), "--data", str(folder / "sandbox"), "--latency", "0.02..0.2")
    sandbox = paystream("sandbox", "sandbox", *options, log=folder / "sandbox.log", url=f"http://127.0.0.1:{port}", environment={}, ready="/_sandbox/health")
    sandbox.start()
    try:
        sandbox.wait_ready()
        secret = _register_webhooks(sandbox.url, f"http://{installation.api.host}:{installation.api.port}/api/v1/webhooks/stripe")
        stripe = Stripe(base_url=sandbox.url, api_key=SecretStr(STRIPE_KEY), webhook_secrets=(SecretStr(secret),))
        settings = quick(installation).model_copy(update={"stripe": stripe})
        with programs(settings, folder) as start:
            yield Pipeline(settings, sandbox, start)
    finally:
        sandbox.kill()


def _register_webhooks(sandbox: str, url: str) -> str:
    """The secret that they are signed with."""
    form = urlencode({"url": url, "enabled_events[]": "*"}).encode()
    request = urllib.request.Request(f"{sandbox}/v1/webhook_endpoints", form, {"Authorization": f"Bearer {STRIPE_KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["secret"])
