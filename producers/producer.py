"""One record onto Kafka, acknowledged by all in-sync replicas.

Rule: `send` returns when the brokers have said where the record is, or raises Unavailable: then it may or may not be there, and the caller sends it
again. Every producer puts a key on the partition where Java and aiokafka clients would put it.
Flow: api -> `send` -> librdkafka's queue -> broker -> delivery report -> (poll thread) -> the awaiting caller.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException
from prometheus_client import Gauge

from infra.crash_points import at
from infra.kafka_admin import producer_config
from infra.settings import Settings
from producers.committed_log import unavailable
from schemas.errors import Rejected, Unavailable

_LINGER_MS: Final = 0
"""Alone, a send takes 0.3 ms instead of 1.6; under load records travel together anyway, while the one before is under way."""
_QUEUED_RECORDS: Final = 10_000
_QUEUED_KIB: Final = 64 * 1024
_POLL_S: Final = 0.2
_HEALTH_S: Final = 2.0
_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE})

_IN_FLIGHT = Gauge("paystream_producer_in_flight_records", "Records that no acknowledgement has come for yet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is to be written. `topic` is without the installation's prefix; without a key any partition may take it; no timestamp means now."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a record is; `topic` is without prefix."""

    topic: str
    partition: int
    offset: int


class Producer(Protocol):
    async def send(self, record: Record) -> Placed:
        """Write a record and wait until it is acknowledged.

        Raises Unavailable when that is not known in time: the outcome is unknown, and sending the same record again is right. Raises Rejected for a
        record that is too large for its topic. A caller that is cancelled leaves the outcome unknown too.
        """
        ...

    async def healthy(self) -> bool:
        """Whether a broker answers now."""
        ...


class KafkaProducer:
    """The real one. Between `start` and `close` it belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.prefix
        self._timeout_s = settings.kafka.delivery_timeout_s
        self._config = producer_config(settings.kafka) | {
            "client.id": settings.service,
            "logger": logging.getLogger("librdkafka"),
            "linger.ms": _LINGER_MS,
            "message.timeout.ms": int(self._timeout_s * 1000),
            "queue.buffering.max.messages": _QUEUED_RECORDS,
            "queue.buffering.max.kbytes": _QUEUED_KIB,
        }
        self._client: _Client | None = None

    async def start(self) -> None:
        """Connects in the background: a process starts, and is not ready, while Kafka is away."""
        self._client = _Client(self._config, asyncio.get_running_loop())
        _IN_FLIGHT.set_function(lambda: self.in_flight)

    async def close(self) -> None:
        """Wait for what is under way, no longer than a send would."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close, self._timeout_s)
            self._client = None

    async def send(self, record: Record) -> Placed:
        await at("producer.before_send")
        try:
            async with asyncio.timeout(self._timeout_s):
                placed = await self._usable().produce(self._prefix, record)
        except TimeoutError:
            raise Unavailable("Kafka", f"no acknowledgement within {self._timeout_s:g} s, the outcome is unknown") from None
        await at("producer.after_ack")
        return placed

    async def healthy(self) -> bool:
        return await asyncio.to_thread(self._usable().answers)

    @property
    def in_flight(self) -> int:
        """Records that no delivery report has come for yet."""
        return len(self._client) if self._client else 0

    def _usable(self) -> _Client:
        """librdkafka calls some errors fatal: that instance never sends again, so another takes its place."""
        if self._client is None:
            raise RuntimeError("the producer is not started")
        if self._client.fatal:
            threading.Thread(target=self._client.close, args=(0.0,), daemon=True).start()
            self._client = _Client(self._config, asyncio.get_running_loop())
        return self._client


class _Client:
    """One librdkafka instance and the thread that takes its delivery reports over to the event loop, all that are there in one go."""

    def __init__(self, config: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self.fatal = False
        self._loop = loop
        self._reports: list[tuple[asyncio.Future[Placed], Placed | Exception]] = []
        self._kafka = confluent_kafka.Producer(config)
        self._closing = threading.Event()
        self._last_wait_s = 0.0
        self._poller = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._poller.start()

    def __len__(self) -> int:
        return len(self._kafka)

    def produce(self, prefix: str, record: Record) -> asyncio.Future[Placed]:
        """The future of a record's place. Raises Unavailable at once when the queue is full: what Kafka does not take is not piled up here."""
        placed: asyncio.Future[Placed] = self._loop.create_future()

        def reported(error: KafkaError | None, message: confluent_kafka.Message) -> None:
            where = Placed(record.topic, message.partition(), message.offset())
            self._reports.append((placed, where if error is None else _translated(error)))

        when = {} if record.timestamp_ms is None else {"timestamp": record.timestamp_ms}
        try:
            self._kafka.produce(prefix + record.topic, key=record.key, value=record.value, headers=list(record.headers), on_delivery=reported, **when)
        except BufferError:
            raise Unavailable("Kafka", f"{len(self)} records wait for it already") from None
        except KafkaException as error:
            raise _translated(error.args[0]) from None
        return placed

    def answers(self) -> bool:
        try:
            self._kafka.list_topics(timeout=_HEALTH_S)
        except KafkaException:
            return False
        return not self.fatal

    def close(self, within_s: float) -> None:
        """Blocks until what is under way is reported, or the time is over."""
        self._last_wait_s = within_s
        self._closing.set()
        self._poller.join(within_s + 2 * _POLL_S)

    def _poll(self) -> None:
        try:
            while not self._closing.is_set():
                self._kafka.poll(_POLL_S)
                self._hand_over()
            self._kafka.flush(self._last_wait_s)
        except KafkaException:  # raised for fatal errors only
            self.fatal = True
        self._hand_over()

    def _hand_over(self) -> None:
        """Reports are taken and handed over by the poll thread only."""
        if self._reports:
            reports, self._reports = self._reports, []
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_deliver, reports)


def _deliver(reports: list[tuple[asyncio.Future[Placed], Placed | Exception]]) -> None:
    for future, outcome in reports:
        if future.done():  # its caller was cancelled or has given up
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _translated(error: KafkaError) -> Exception:
    if error.code() in _TOO_LARGE:
        return Rejected(f"Kafka does not take it: {error.str()}")
    return unavailable(error)
