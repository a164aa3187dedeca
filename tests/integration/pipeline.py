"""The whole product as real processes on an installation of its own, and a shop that uses it from outside.

Rule: what a test says about the product it sees over HTTP, on the topics or in the sandbox's ledger. Postgres is only asked for what nobody outside
can see (what is parked), and broken where a test wants it broken.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import aiohttp
import orjson
import psycopg
from psycopg import sql
from pydantic import SecretStr

from api.auth import Tokens
from api.cli.demo.evidence import gathered, starting_line
from api.cli.demo.promises import COMMANDS, Evidence
from api.cli.demo.traffic import Storefront, planned
from infra.local.client import Answer, Bank, Caller, opened_session
from infra.local.process import Program, paystream
from infra.local.steps import FOLLOWED_EVENTS
from infra.schema_registry import load_codec, register
from infra.settings import Settings, Stripe
from producers.producer import KafkaProducer, Record
from schemas.codec import Codec
from schemas.errors import Rejected
from schemas.messages import Message, PaymentEvent, leaves
from schemas.topics import destinations
from tests.conftest import Infrastructure, StartProgram, free_port, own_database, own_topics, programs
from tests.integration.machinery import quick
from tests.topic_reader import read_topic

T = TypeVar("T")
GROUPS = ("payments", "orders", "analytics")
ONE_TYPE = {cls.event_type: destinations(record)[1] for record, cls in leaves(PaymentEvent).items() if len(destinations(record)) > 1}
WAIT_S = 20
API_KEY = "sk_test_pipeline"


@dataclass(kw_only=True)
class Pipeline:
    """What runs. `workers` by their group: the first one of each."""

    settings: Settings
    codec: Codec
    start: StartProgram
    sandbox: Program
    api: Program
    relay: Program
    workers: dict[str, Program]

    def token(self, user: str, *roles: str) -> str:
        return Tokens(self.settings.auth).issue(user, roles, timedelta(hours=1))

    def caller(self, session: aiohttp.ClientSession, user: str, *roles: str) -> Caller:
        return Caller(session, self.api.url, self.token(user, *roles))

    def records(self, topic: str) -> list[tuple[int, int, Message]]:
        """(partition, offset, message) of all messages that are on a topic now; what is no message is left out."""
        found = []
        for record in read_topic(self.settings, topic):
            with suppress(Rejected):
                found.append((record.partition, record.offset, self.codec.decode(record.value)))
        return found

    def query(self, statement: str) -> list[Any]:
        with psycopg.connect(self.settings.database.url.get_secret_value(), autocommit=True) as connection:
            rows = connection.execute(statement.encode())
            return rows.fetchall() if rows.description else []

    def parked(self) -> list[Any]:
        """(disposition, order, error) of what is parked, in order."""
        return self.query("SELECT disposition, order_key, error_class FROM parked_messages ORDER BY id")

    @contextmanager
    def broken(self, break_it: str, mend_it: str) -> Iterator[None]:
        """Something is wrong with the database within the block."""
        self.query(break_it)
        try:
            yield
        finally:
            self.query(mend_it)

    @contextmanager
    def without_postgres(self) -> Iterator[None]:
        """Nobody has a connection to this installation's database within the block, and nobody gets one."""
        address = self.settings.database.url.get_secret_value()
        server, _, name = address.rpartition("/")
        allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        with psycopg.connect(f"{server}/postgres", autocommit=True) as administrator:
            administrator.execute(allow.format(sql.Identifier(name), sql.SQL("false")))
            administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            try:
                yield
            finally:
                administrator.execute(allow.format(sql.Identifier(name), sql.SQL("true")))


@contextmanager
def opened_pipeline(stack: Infrastructure, template: str, folder: Path, *, groups: Sequence[str] = GROUPS, latency: str = "0") -> Iterator[Pipeline]:
    """All of it, ready, while the block runs. `latency` is how many seconds a call of the gateway takes."""
    with ExitStack() as closing:
        settings = quick(closing.enter_context(own_database(stack, template)))
        closing.enter_context(own_topics(settings))
        register(settings)
        sandbox = _sandbox(folder, latency)
        closing.callback(sandbox.kill)
        sandbox.start()
        sandbox.wait_ready()
        secret = _register_webhook(sandbox.url, f"http://{settings.api.host}:{settings.api.port}/api/v1/webhooks/stripe")
        stripe = Stripe(base_url=sandbox.url, api_key=SecretStr(API_KEY), webhook_secrets=(SecretStr(secret),))
        settings = settings.model_copy(update={"stripe": stripe})
        start = closing.enter_context(programs(settings, folder))
        pipeline = Pipeline(
            settings=settings,
            codec=load_codec(settings),
            start=start,
            sandbox=sandbox,
            api=start("api", wait=False),
            relay=start("relay", wait=False),
            workers={group: start("worker", group, wait=False) for group in groups},
        )
        for program in (pipeline.api, pipeline.relay, *pipeline.workers.values()):
            program.wait_ready()
        yield pipeline


def _sandbox(folder: Path, latency: str) -> Program:
    port = free_port()
    told = {"PAYSTREAM_SANDBOX__PORT": str(port), "PAYSTREAM_SANDBOX__DATA": str(folder / "sandbox"), "PAYSTREAM_SANDBOX__LATENCY": latency}
    url = f"http://127.0.0.1:{port}"
    return paystream("sandbox", "sandbox", log=folder / "sandbox.log", url=url, environment=told, ready="/_sandbox/health")


def _register_webhook(sandbox: str, url: str) -> str:
    """The secret that the sandbox signs its webhooks with."""
    form = urlencode([("url", url), *(("enabled_events[]", event) for event in FOLLOWED_EVENTS)]).encode()
    request = urllib.request.Request(f"{sandbox}/v1/webhook_endpoints", form, {"Authorization": f"Bearer {API_KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        secret: str = orjson.loads(answer.read())["secret"]
        return secret


async def eventually(look: Callable[[], Awaitable[T | None]], within: float, what: str) -> T:
    """What `look` gives, as soon as that is something."""
    deadline = time.monotonic() + within
    while not (found := await look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        await asyncio.sleep(0.05)
    return found


class Shop:
    """A storefront that uses the pipeline as one user, and sees what comes of it."""

    def __init__(self, pipeline: Pipeline, session: aiohttp.ClientSession, user: str = "shop") -> None:
        self.pipeline, self.session = pipeline, session
        self.caller = pipeline.caller(session, user)
        self.user = user
        self.bank = Bank(session, pipeline.sandbox.url)

    # ── Asking ──

    @staticmethod
    def order(kind: str = "order") -> str:
        return f"{kind}-{secrets.token_hex(4)}"

    async def post(self, path: str, body: dict[str, Any] | None = None, *, wait_s: int | None = WAIT_S, key: str | None = None) -> Answer:
        return await self.caller.post(path, body or {}, key=key or secrets.token_hex(8), wait_s=wait_s)

    async def pay(self, order_id: str, method: str = "pm_card_visa", *, wait_s: int | None = WAIT_S, key: str | None = None, **more: Any) -> Answer:
        """`POST /payments/process`"""
        return await self.post("/payments/process", self.purchase(order_id, payment_method=method, **more), wait_s=wait_s, key=key)

    async def post_once(self, path: str, body: dict[str, Any], *, key: str) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Ask without asking again when the answer is "later": its status, body and headers."""
        headers = {"Authorization": f"Bearer {self.pipeline.token(self.user)}", "Idempotency-Key": key}
        async with self.session.post(f"{self.pipeline.api.url}/api/v1{path}", headers=headers, json=body) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    @staticmethod
    def purchase(order_id: str, **more: Any) -> dict[str, Any]:
        return {"order_id": order_id, "amount_minor": 1999, "currency": "EUR", **more}

    # ── Seeing ──

    async def payment(self, payment_id: str) -> dict[str, Any]:
        return (await self.caller.get(f"/payments/{payment_id}")).body

    async def reaches(self, payment_id: str, status: str, within: float = 30.0) -> dict[str, Any]:
        """The payment, as soon as it has that status."""

        async def look() -> dict[str, Any] | None:
            payment = await self.payment(payment_id)
            return payment if payment["status"] == status else None

        return await eventually(look, within, f"payment {payment_id} is {status}")

    async def story(self, payment_id: str) -> list[str]:
        """The types of a payment's events, once all are on Kafka; checked to be told the same wherever they are told.

        The timeline names a partition and an offset of `payment-events` for each, and that event is there; topics of one type have theirs once.
        """

        async def published() -> list[dict[str, Any]] | None:
            items: list[dict[str, Any]] = (await self.caller.get(f"/payments/{payment_id}/events")).body["items"]
            return items if items and all(item["offset"] is not None for item in items) else None

        timeline = await eventually(published, 20, f"all events of {payment_id} are published")
        types = [item["event_type"] for item in timeline]
        assert [item["version"] for item in timeline] == list(range(1, len(timeline) + 1))
        assert {item["topic"] for item in timeline} == {f"{self.pipeline.settings.prefix}payment-events"}
        told = {item["event_id"]: (item["partition"], item["offset"], item["event_type"]) for item in timeline}
        topics = ["payment-events", *sorted({ONE_TYPE[kind] for kind in types if kind in ONE_TYPE})]
        for topic, records in zip(topics, await self._read(*topics), strict=True):
            about = {event.event_id: (at, offset, event.event_type) for at, offset, event in records if event.payment_id == payment_id}
            if topic == "payment-events":
                assert about == told
            else:
                expected = {event_id for event_id, (_, _, kind) in told.items() if ONE_TYPE.get(kind) == topic}
                assert about.keys() == expected, topic
        return types

    async def order_story(self, order_id: str, *, until: str) -> list[str]:
        """What `order-events` says of an order, as `TYPE status`, once it has come to the status `until`; its versions have no gaps."""

        async def look() -> list[str] | None:
            (records,) = await self._read("order-events")
            events: Sequence[Any] = [event for _, _, event in records if event.order_id == order_id]
            assert [event.version for event in events] == list(range(1, len(events) + 1))
            return [f"{event.event_type} {event.status}" for event in events] if events and events[-1].status == until else None

        return await eventually(look, 20, f"order {order_id} is {until}")

    async def charged(self, *orders: str) -> dict[str, list[int]]:
        """What the sandbox took for each of the orders, charge by charge."""
        taken: dict[str, list[int]] = {order: [] for order in orders}
        for charge in await self.bank.ledger():
            if charge["order_id"] in taken:
                taken[charge["order_id"]].append(charge["captured_minor"])
        return taken

    async def _read(self, *topics: str) -> list[list[tuple[int, int, Message]]]:
        return await asyncio.gather(*(asyncio.to_thread(self.pipeline.records, topic) for topic in topics))


@asynccontextmanager
async def opened_shop(pipeline: Pipeline, user: str = "shop") -> AsyncIterator[Shop]:
    async with opened_session() as session:
        yield Shop(pipeline, session, user)


# ── Orders of every kind ──


async def trade(shop: Shop, payments: int) -> Callable[[], Awaitable[Evidence]]:
    """Have so many orders of every kind lived through, and one that meets poison. What is returned gathers the evidence, once all is at rest."""
    settings, codec = shop.pipeline.settings, shop.pipeline.codec
    chance = random.Random(7)
    journeys = planned(payments, 1, f"trade-{secrets.token_hex(3)}", chance)
    starts = await asyncio.to_thread(starting_line, settings)
    producer = KafkaProducer(settings)
    await producer.start()

    async def publish_raw(order_id: str, value: bytes) -> None:
        await producer.send(Record(topic=COMMANDS, key=order_id.encode(), value=value))

    try:
        for kind in ("webhook_twice", "webhook_out_of_order"):
            await shop.bank.order_fault(kind, probability=0.15)
        async for _ in Storefront(shop.caller, shop.bank, chance, publish_raw).play(journeys, at_once=20):
            pass
    finally:
        await shop.bank.drop_faults()
        await producer.close()
    return lambda: gathered(settings, codec, shop.caller, shop.bank, shop.user, journeys, starts, lambda _: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topics:
    """What another team is told: where the brokers and the registry are, and the prefix of topics. And what its readers are checked against."""

    bootstrap_servers: str
    registry: str
    prefix: str
    payments: dict[str, dict[str, Any]]
    """Each payment as the API shows it."""


async def topics_after(pipeline: Pipeline, payments: int) -> Topics:
    async with opened_shop(pipeline) as shop:
        gather = await trade(shop, payments)
        evidence = await gather()
    return Topics(
        bootstrap_servers=pipeline.settings.kafka.bootstrap_servers,
        registry=pipeline.settings.schema_registry.url,
        prefix=pipeline.settings.prefix,
        payments=evidence.payments,
    )
