"""The HTTP intake as a program: what it is built from, and how it runs.

Rule: it starts whether or not the outside answers, and says by /readyz what is missing; only a setting that is wrong keeps it from starting.
Flow: `paystream api` -> `serve` -> `opened_deps` (pool, reads, producer, Redis, gateways, codec) -> `create_app` -> uvicorn.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from importlib import metadata
from types import FrameType
from typing import Final

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api.auth import Tokens
from api.deps import Deps
from api.edge import Edge
from api.errors import ANY_PROBLEM, install
from api.health import Doctor, Part
from api.intake import Intake
from api.routes import analytics, commands, payments, service, webhooks
from infra import redis, schema_registry, telemetry
from infra.clock import SystemClock
from infra.database.figures import Figures
from infra.database.intake import IntakeStore
from infra.database.pool import opened_pool
from infra.database.reads import Reads
from infra.gateways.table import opened_gateways
from infra.jwks import issuer_keys
from infra.settings import Settings
from producers.producer import KafkaProducer
from schemas.codec import Codec
from schemas.errors import BadConfiguration, Unavailable

log = structlog.get_logger()

_ENDS_WITHIN_S: Final = 15
"""Longer than any request takes once nobody waits for an outcome any more."""
_AGAIN_AFTER_S: Final = 1.0


def create_app(deps: Deps) -> FastAPI:
    """The app over `deps`. Raises BadConfiguration for a token secret that is none."""
    app = FastAPIOffline(  # its own copy of the documentation page: no script of somebody else where people type in their tokens
        title="Paystream",
        version=metadata.version("paystream"),
        summary="Payments through Kafka: money moves exactly once.",
        description="A 2xx to a command means that it is kept, on all in-sync replicas. Errors are problem documents (RFC 9457).",
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs/static",
        redirect_slashes=False,
        responses={"default": ANY_PROBLEM},
    )
    app.state.deps = deps
    app.state.tokens = Tokens(deps.settings.auth, deps.issuer)
    app.state.doctor = Doctor(deps.parts)
    app.state.intake = Intake(
        store=deps.store,
        reads=deps.reads,
        producer=deps.producer,
        codec=deps.codec,
        claims=deps.claims,
        outcomes=deps.outcomes,
        clock=deps.clock,
        max_waiters=deps.settings.api.max_waiters,
    )
    install(app)
    for routes in (commands, payments, webhooks, analytics, service):
        app.include_router(routes.router)
    app.add_middleware(Edge)
    return app


class _CodecWhenThere:
    """The codec, as soon as the registry has given what it needs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._codec: Codec | None = None

    def __call__(self) -> Codec:
        if self._codec is None:
            raise Unavailable("the schema registry")
        return self._codec

    @property
    def there(self) -> bool:
        return self._codec is not None

    async def load(self) -> None:
        while self._codec is None:
            try:
                self._codec = await asyncio.to_thread(schema_registry.load_codec, self._settings)
            except (Unavailable, BadConfiguration) as error:
                log.warning("no schemas yet", reason=error.detail)
                await asyncio.sleep(_AGAIN_AFTER_S)


@asynccontextmanager
async def opened_deps(settings: Settings) -> AsyncIterator[Deps]:
    """What the API works with, over the real outside; closed at the end of the block."""
    async with AsyncExitStack() as opened:
        codec = _CodecWhenThere(settings)
        loading = asyncio.create_task(codec.load(), name="load-codec")
        opened.push_async_callback(_ended, loading)
        pool = await opened.enter_async_context(opened_pool(settings.database, settings.service, by_key=True))
        store = IntakeStore(pool, max_undecided=settings.api.max_undecided_commands)
        for_reading = await opened.enter_async_context(opened_pool(settings.database, f"{settings.service}-reads"))
        producer = KafkaProducer(settings)
        await producer.start()
        opened.push_async_callback(producer.close)
        line = redis.Line(settings.redis)
        outcomes = redis.Outcomes(line, settings.prefix)
        opened.push_async_callback(outcomes.aclose)
        gateways = await opened.enter_async_context(opened_gateways(settings))
        issuer = issuer_keys(settings)
        issuer_part: tuple[Part, ...] = ()
        if issuer is not None:
            opened.push_async_callback(issuer.aclose)
            issuer_part = (Part("issuer", issuer.answers, needed=lambda: not settings.auth.jwt_secret),)

        async def registry_answers() -> bool:
            # Once its schemas are here nothing waits for it any more.
            return codec.there and await asyncio.to_thread(schema_registry.answers, settings)

        async def redis_answers() -> bool:
            return await line.ask("PING") is not None

        yield Deps(
            settings=settings,
            clock=SystemClock(),
            store=store,
            reads=Reads(for_reading, codec),
            figures=Figures(for_reading),
            producer=producer,
            codec=codec,
            claims=redis.Claims(line, settings.prefix),
            outcomes=outcomes,
            gateways=gateways,
            issuer=issuer,
            parts=(
                Part("postgres", store.answers, needed=lambda: True),
                Part("kafka", producer.healthy, needed=lambda: True),
                Part("registry", registry_answers, needed=lambda: not codec.there),
                Part("redis", redis_answers, needed=lambda: False),
                *issuer_part,
            ),
        )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class _Server(uvicorn.Server):
    """Lets go of those who wait for an outcome as soon as it is told to end."""

    def __init__(self, config: uvicorn.Config, intake: Intake) -> None:
        super().__init__(config)
        self._intake = intake

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._intake.stop_waiting()
        log.info("ending", signal=signal.Signals(sig).name)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal once more at the end, and what we have open would not be closed."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def serve(settings: Settings) -> None:
    """Run the intake until SIGTERM or SIGINT. Raises BadConfiguration before it listens."""
    telemetry.configure(settings)
    Tokens(settings.auth, issuer_keys(settings))
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with opened_deps(settings) as deps:
        app = create_app(deps)
        config = uvicorn.Config(
            app,
            host=settings.api.host,
            port=settings.api.port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_ENDS_WITHIN_S,
        )
        gc.freeze()  # what is there now stays: the collector needn't look at it again and again
        await _Server(config, app.state.intake).serve()
