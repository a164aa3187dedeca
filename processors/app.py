"""The Faust app of one consumer group, and the worker process that runs it.

Rule: one group, one app, one process. The app creates no topic, keeps no table and sends nothing: it reads, and handlers' transactions do the rest.
What can't be handled ends the process with status 70; whoever runs it starts it again, and it goes on where it committed.
Flow: settings + Work -> App (transport.py) -> agent -> Incoming -> keyed window -> delivery -> handler.
"""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

import faust
import structlog
import uvloop
from faust.types import TP, EventT, TopicT
from prometheus_client import REGISTRY

from infra import telemetry
from infra.admin import Probes, admin_server
from infra.database.delivery import Group, Parking, Received
from infra.kafka_offsets import EndOffsets
from infra.settings import Kafka, Settings, Worker
from infra.telemetry import end_process
from processors.delivery import BatchDelivery, Delivery, Failures, Halt, Handle, HandleBatch
from processors.health import Health
from processors.keyed_window import Gate, KeyedWindow
from processors.transport import SCHEME, Repairs
from schemas.codec import Codec
from schemas.errors import Unavailable

log = structlog.get_logger()

FETCH_WAIT_MS: Final = 20
_RETRY_S: Final = 1.0
_STOP_GRACE_S: Final = 10.0
"""What stopping may take on top of the drain: the commit, and leaving the group."""


class Incoming:
    """A Faust event as the window sees it."""

    __slots__ = ("_app", "_event", "key")

    def __init__(self, app: App, event: EventT[bytes], key: object) -> None:
        self._app, self._event, self.key = app, event, key

    @property
    def partition(self) -> TP:
        partition: TP = self._event.message.tp
        return partition

    @property
    def offset(self) -> int:
        offset: int = self._event.message.offset
        return offset

    @property
    def stale(self) -> bool:
        stale: bool = self._app.consumer.stale(self._event.message)
        return stale

    def ack(self) -> None:
        self._event.ack()

    def received(self) -> Received:
        """The record, byte for byte; but a header's value is never null, and its name holds no NUL, which Postgres could not keep."""
        message = self._event.message
        return Received(
            topic=message.topic.removeprefix(self._app.prefix),
            partition=message.partition,
            offset=message.offset,
            timestamp_ms=round(message.timestamp * 1000) if message.timestamp is not None else None,
            key=message.key,
            value=message.value,
            headers=tuple((name.replace("\0", ""), value or b"") for name, value in message.headers or ()),
        )


class App(faust.App):  # type: ignore[misc]  # Faust has no types
    """A Faust app, with what the transport and the agents need at hand."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        window: KeyedWindow[Incoming],
        *,
        fetch_wait_ms: int = FETCH_WAIT_MS,
        repairs: Repairs | None = None,
    ) -> None:
        self.prefix, self.drain_s, self.fetch_wait_ms = settings.prefix, settings.worker.drain_s, fetch_wait_ms
        self.window, self.repairs = window, repairs or Repairs()
        super().__init__(group_id(settings, group), **_faust_settings(settings))

    def topics_named(self, *names: str) -> TopicT[bytes]:
        """The topics of these names (without prefix), as one stream of bytes: nothing is decoded here, so nothing can fail here."""
        names = tuple(self.prefix + name for name in names)
        topic: TopicT[bytes] = self.topic(*names, key_serializer="raw", value_serializer="raw", value_type=bytes, allow_empty=True)
        return topic

    async def admit(self, event: EventT[bytes], key: object) -> None:
        """Bring an event to the window, in order with what has the same key; waits for room."""
        await self.window.submit(Incoming(self, event, key))

    def _crash(self, reason: BaseException) -> None:
        """Whatever fails in Faust ends up here."""
        end_process(reason)

    def _create_directories(self) -> None:
        """Faust would make one for its tables."""


def group_id(settings: Settings, group: Group) -> str:
    """The name of the consumer group on the brokers."""
    return f"{settings.prefix}paystream-{group}"


def _faust_settings(settings: Settings) -> dict[str, Any]:
    kafka, worker = settings.kafka, settings.worker
    return {
        "broker": [f"{SCHEME}://{server}" for server in kafka.bootstrap_servers.split(",")],
        "broker_credentials": _credentials(kafka),
        "broker_client_id": settings.service,
        "broker_commit_interval": worker.commit_interval_s,
        "broker_session_timeout": kafka.session_timeout_s,
        "broker_heartbeat_interval": min(3.0, kafka.session_timeout_s / 10),
        "broker_rebalance_timeout": kafka.rebalance_timeout_s,
        "broker_request_timeout": max(60.0, kafka.session_timeout_s),
        "broker_max_poll_interval": 24 * 3600.0,  # aiokafka leaves the group when polling stalls, and it stalls when the window is held
        "broker_max_poll_records": 100,  # so many are passed on in one go, and nothing else runs meanwhile
        "consumer_max_fetch_size": 2 * 1024 * 1024,
        "consumer_auto_offset_reset": "earliest",
        "processing_guarantee": "at_least_once",
        "agent_supervisor": "mode.CrashingSupervisor",  # the default one goes on after the message that failed
        "stream_buffer_maxsize": 256,
        "stream_wait_empty": True,
        "topic_allow_declare": False,
        "topic_disable_leader": True,
        "table_standby_replicas": 0,
        "reply_create_topic": False,
        "store": "memory://",
        "web_enabled": False,
        "worker_redirect_stdouts": False,
    }


def _credentials(kafka: Kafka) -> faust.auth.Credentials | None:
    context = ssl.create_default_context(cafile=kafka.ssl_ca_location) if kafka.security_protocol.endswith("SSL") else None
    if kafka.security_protocol.startswith("SASL"):
        password = kafka.sasl_password.get_secret_value() if kafka.sasl_password else None
        return faust.SASLCredentials(username=kafka.sasl_username, password=password, mechanism=kafka.sasl_mechanism, ssl_context=context)
    return faust.SSLCredentials(context) if context is not None else None


# ── The worker process ──


@dataclass(frozen=True, slots=True)
class Batches:
    """A handler that takes up to `most` messages at once."""

    handle: HandleBatch
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the worker of a group does.

    `register` puts its agents into the app, which read `topics`. `handler` takes one message, or a `Batches` many. `wanted` are the event types that
    it handles, None for all. `services` run beside it for as long as the process does. A fetch may wait for more for `fetch_wait_ms`: what comes
    together costs all parts less.
    """

    register: Callable[[App], None]
    topics: Sequence[str]
    codec: Codec
    parking: Parking
    handler: Handle | Batches
    wanted: frozenset[str] | None = None
    services: Sequence[Callable[[], Coroutine[Any, Any, object]]] = ()
    fetch_wait_ms: int = FETCH_WAIT_MS


Compose = Callable[[Settings], AbstractAsyncContextManager[Work]]
"""Opens what the group's handlers need (pool, gateways …), and closes it at the end of the block."""


def serve(settings: Settings, group: Group, compose: Compose, *, repairs: Repairs | None = None) -> NoReturn:
    """Be the worker of a group until SIGTERM. The process ends: with 0, or with 70 when something happened that it can't cope with.

    It ends at once, without closing the event loop: that would cancel handlers which the drain has left running, and wait for Faust's threads.
    """

    async def to_the_end() -> NoReturn:
        try:
            await _run_worker(settings, group, compose, repairs)
        except BaseException as error:
            end_process(error)
        log.info("stopped")
        os._exit(0)

    telemetry.configure(settings)
    uvloop.run(to_the_end())
    raise AssertionError("the process has ended by now")


async def _run_worker(settings: Settings, group: Group, compose: Compose, repairs: Repairs | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as opened:
        work = await _first_of(stop.wait(), _compose(settings, compose, opened))
        if not isinstance(work, Work):
            return
        gate = Gate()
        halt = Halt(group, work.parking, gate)
        failures = Failures(group, work.parking, gate, halt, max_bugs=settings.worker.max_bugs)
        window = _window(work, failures, gate, settings.worker)
        app = App(settings, group, window, fetch_wait_ms=work.fetch_wait_ms, repairs=repairs)
        work.register(app)
        health = Health(settings, group, work.topics, window, gate, lambda: app.consumer if app.started else None, EndOffsets(settings.kafka))
        REGISTRY.register(health)
        probes = Probes(live=health.live, ready=lambda: {**health.ready(), "halted": halt.reason})
        await opened.enter_async_context(admin_server(settings.worker.admin_host, settings.worker.admin_port, settings.service, probes))
        await _first_of(stop.wait(), _run(app, health), halt.watch(), health.watch(), *(service() for service in work.services))
        if not stop.is_set():
            raise RuntimeError("a part of the worker has ended by itself")
        log.info("stopping", running=window.running, queued=window.queued)
        try:
            async with asyncio.timeout(app.drain_s + _STOP_GRACE_S):
                await app.stop()
        except TimeoutError:
            log.warning("did not stop in time")
        if window.running:
            opened.pop_all()  # not closed, but ended with the process: handlers that still run would take a closed gateway for one that is silent


async def _compose(settings: Settings, compose: Compose, opened: AsyncExitStack) -> Work:
    """What the worker does, as soon as all that it needs for that is there."""
    while True:
        try:
            return await opened.enter_async_context(compose(settings))
        except Unavailable as error:
            log.warning("waiting", waiting_for=str(error))
        await asyncio.sleep(_RETRY_S)


async def _run(app: App, health: Health) -> None:
    await health.topics_exist()
    await app.start()
    await app.wait_until_stopped()


async def _first_of(*coroutines: Coroutine[Any, Any, object]) -> object:
    """Run them all until the first one ends: what it returns, or raises. The others go on: they end with the process."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    results = [task.result() for task in done]
    return results[0]


def _window(work: Work, failures: Failures, gate: Gate, worker: Worker) -> KeyedWindow[Incoming]:
    """The window that brings messages to the group's handler."""
    window = partial(KeyedWindow[Incoming], gate=gate, slots=worker.window, span=worker.span)
    if isinstance(work.handler, Batches):
        together = BatchDelivery(failures, work.codec, work.handler.handle, work.wanted)
        return window(lambda events: together([event.received() for event in events]), batch=work.handler.most)
    single = Delivery(failures, work.codec, work.handler, work.wanted)
    return window(lambda events: single(events[0].received()))
