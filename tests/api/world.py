"""The intake over a real Postgres and a real Redis, with Kafka, the payments worker and the gateway inside the test.

Rule: what the API produces is handled by the real payment handler: when a test says so (`work`), or by itself (`at_work = True`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from typing import Any

import httpx2
import structlog
from fastapi import FastAPI
from pydantic import SecretStr

from api.app import create_app
from api.auth import Tokens
from api.deps import Deps
from api.health import Part
from api.intake import Intake
from infra import redis, telemetry
from infra.clock import SystemClock
from infra.database.delivery import Received
from infra.database.figures import Figures
from infra.database.intake import IntakeStore
from infra.database.payments import PostgresPaymentStore
from infra.database.pool import Pool, connection, opened_pool
from infra.database.reads import Reads
from infra.gateways.fake import FakeGateway
from infra.settings import Api, Auth, Settings, Stripe
from processors.payments import handler
from producers.memory import MemoryProducer
from producers.producer import Placed, Record
from schemas.codec import Codec
from schemas.errors import Unavailable
from schemas.topics import destinations

SECRET = "a secret of the tests, 32 bytes long"
_STRIPE = Stripe(webhook_secrets=(SecretStr("whsec_fake"),))
BODY: Mapping[str, Any] = {"order_id": "order-1", "amount_minor": 1999, "currency": "EUR", "payment_method": "pm_card_visa"}


@dataclass(kw_only=True)
class World:
    """One API process and what is around it. `down`: parts of the outside that don't answer probes; "codec" takes the schemas away."""

    settings: Settings
    client: httpx2.AsyncClient
    app: FastAPI
    producer: MemoryProducer
    gateway: FakeGateway
    pool: Pool
    codec: Codec
    payments: handler.Deps
    down: set[str]
    log: StringIO
    at_work: bool = False
    _handled: set[int] = field(default_factory=set)

    @property
    def intake(self) -> Intake:
        found: Intake = self.app.state.intake
        return found

    def bearer(self, user: str = "u1", *roles: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {Tokens(self.settings.auth).issue(user, roles, timedelta(minutes=1))}"}

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        user: str = "u1",
        key: str | None = None,
        wait: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        sent = {**self.bearer(user), **(headers or {})}
        if key is not None:
            sent["Idempotency-Key"] = key
        if wait is not None:
            sent["Prefer"] = f"wait={wait}"
        return await self.client.post(f"/api/v1{path}", json=body, headers=sent)

    async def get(self, path: str, *, user: str = "u1", roles: tuple[str, ...] = (), headers: Mapping[str, str] | None = None) -> httpx2.Response:
        return await self.client.get(f"/api/v1{path}", headers={**self.bearer(user, *roles), **(headers or {})})

    def produced(self) -> list[Record]:
        return self.producer.sent("payment-commands")

    async def work(self) -> None:
        """Handle what was produced and is not handled yet, as the payments worker would."""
        for number, record in enumerate(self.produced()):
            if id(record) not in self._handled:
                self._handled.add(id(record))
                received = Received(
                    topic=record.topic, partition=0, offset=number, timestamp_ms=None, key=record.key, value=record.value, headers=record.headers
                )
                await handler.handle(received, self.codec.decode(record.value), self.payments)

    async def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        async with connection(self.pool) as conn:
            return await (await conn.execute(query, parameters)).fetchall()

    def charged(self) -> int:
        """How many charges the gateway has made."""
        return sum(intent.charges for intent in self.gateway.intents.values())


class _Kafka(MemoryProducer):
    """Sets the world to work on each record, if it wants that."""

    world: World
    _working: set[asyncio.Task[None]]

    async def send(self, record: Record) -> Placed:
        placed = await super().send(record)
        if self.world.at_work and record.topic == "payment-commands":
            task = asyncio.create_task(self.world.work())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return placed


@contextmanager
def _logging_to(stream: StringIO, settings: Settings) -> Iterator[None]:
    """What the API logs goes to `stream`, as it does in production."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    telemetry.configure(settings, stream)
    try:
        yield
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


@asynccontextmanager
async def opened_world(database: Settings, stripe: Stripe = _STRIPE, **api: Any) -> AsyncIterator[World]:
    """A world on a database; `stripe` and `api` are settings of these sections."""
    settings = database.model_copy(
        update={
            "auth": Auth(jwt_secret=SecretStr(SECRET)),
            "stripe": stripe,
            "api": Api(**api),
        }
    )
    log = StringIO()
    async with AsyncExitStack() as opened:
        opened.enter_context(_logging_to(log, settings))
        codec, gateway, producer, down, clock = Codec.unregistered(), FakeGateway(), _Kafka(), set[str](), SystemClock()
        line = redis.Line(settings.redis)
        outcomes = redis.Outcomes(line, settings.prefix)
        opened.push_async_callback(outcomes.aclose)
        pool = await opened.enter_async_context(opened_pool(settings.database, "test"))

        def codec_if_there() -> Codec:
            if "codec" in down:
                raise Unavailable("the schema registry")
            return codec

        def part(name: str, *, needed: bool) -> Part:
            async def answers() -> bool:
                return name not in down

            return Part(name, answers, needed=lambda: needed)

        deps = Deps(
            settings=settings,
            clock=clock,
            store=IntakeStore(pool, max_undecided=settings.api.max_undecided_commands),
            reads=Reads(pool, codec_if_there),
            figures=Figures(pool),
            producer=producer,
            codec=codec_if_there,
            claims=redis.Claims(line, settings.prefix),
            outcomes=outcomes,
            gateways={"stripe": gateway},
            issuer=None,
            parts=(part("postgres", needed=True), part("kafka", needed=True), part("registry", needed=True), part("redis", needed=False)),
        )
        app = create_app(deps)
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        http = await opened.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://paystream.test"))
        store = PostgresPaymentStore(pool, codec, destinations, clock)
        worker = handler.Deps(store=store, gateways={"stripe": gateway}, clock=clock, announce=outcomes.announce)
        producer._working = set()
        producer.world = World(
            settings=settings,
            client=http,
            app=app,
            producer=producer,
            gateway=gateway,
            pool=pool,
            codec=codec,
            payments=worker,
            down=down,
            log=log,
        )
        yield producer.world
