"""The relay: takes outbox rows to Kafka, each of them once, in order.

Rule: one relay publishes (the outbox's lock), and at most one batch is published but not yet marked. Whatever goes wrong ends in the same place: take
the lock again, `recover`, mark what Kafka says was published, go on. Nothing is guessed, and no row is skipped.
Flow: NOTIFY (or a poll each second) -> unpublished rows -> one Kafka transaction -> mark them published -> next batch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import random
import signal
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from itertools import count
from time import monotonic
from typing import Any, Final, TypeVar

import structlog
import uvloop
from prometheus_client import Counter, Gauge

from infra import telemetry
from infra.admin import Probes, admin_server
from infra.clock import SystemClock
from infra.crash_points import at
from infra.database.outbox import Leadership, OutboxRow, OutboxStore
from infra.database.pool import opened_pool
from infra.kafka_offsets import EndOffsets
from infra.schema_registry import load_codec
from infra.settings import Relay, Settings
from producers.outbox_transactions import OutboxTransactions, RowRefused
from schemas.errors import PaystreamError, Unavailable

T = TypeVar("T")

_IDLE_POLL_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.2
_LAST_RETRY_S: Final = 5.0
_HANGS_AFTER_S: Final = 5.0
_STUCK_AFTER_S: Final = 300.0
_FINISH_S: Final = 8.0
_DISCARD_S: Final = 2.0
_MEASURE_S: Final = 5.0
_MEASUREMENTS_BETWEEN_PURGES: Final = 720
_KEPT: Final = timedelta(days=7)

_PUBLISHED = Counter("paystream_relay_published_total", "Outbox rows published and marked")
_TRANSACTIONS = Counter("paystream_relay_transactions_total", "Kafka transactions of the relay: committed, refused or in doubt", ["outcome"])
_RECOVERED = Counter("paystream_relay_recovered_total", "Rows that Kafka had committed and Postgres had not marked, found by a recovery")
_LEADING = Gauge("paystream_relay_leading", "1 in the relay that publishes, 0 in one that waits")
_REFUSED = Gauge("paystream_relay_row_refused", "1 while Kafka refuses the oldest row for good: nothing is published until somebody mends that")
_OLDEST = Gauge("paystream_outbox_oldest_age_seconds", "Age of the oldest row that is not published")
_UNPUBLISHED = Gauge("paystream_outbox_unpublished_rows", "Rows that are not published")
_UNSETTLED = Gauge(
    "paystream_relay_unsettled_offsets", "Offsets of payment-events behind the last stable one: what an open transaction hides from readers"
)

_log: Final = structlog.get_logger()


class OutboxRelay:
    """`run` until it is cancelled; the batch in hand is finished then."""

    def __init__(self, store: OutboxStore, transactions: OutboxTransactions, settings: Relay) -> None:
        self._store = store
        self._transactions = transactions
        self._settings = settings
        self._kafka = _KafkaThread()
        self._limit = settings.max_rows
        self._failures = 0
        self._trouble: str | None = "it has not begun"
        self._asked_kafka_at: float | None = None

    async def run(self) -> None:
        try:
            while True:
                try:
                    async with self._store.lead(while_waiting=self._stand_by) as leadership:
                        _LEADING.set(1)
                        await self._publish(leadership)
                except PaystreamError as error:
                    self._report(error)
                finally:
                    _LEADING.set(0)
                longest = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(self._failures - 1, 10))
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311
        finally:
            await self._kafka.end(self._transactions.discard)

    def why_not_ready(self) -> str | None:
        """What keeps the relay from publishing; None when nothing does, and when another one publishes and this one stands by."""
        if self._asked_kafka_at is not None and (waited := monotonic() - self._asked_kafka_at) > _HANGS_AFTER_S:
            return f"Kafka has not answered for {waited:.0f} s"
        return self._trouble

    def stuck(self) -> str | None:
        """What has hung for longer than librdkafka waits for anything; None if nothing has."""
        waited = 0.0 if self._asked_kafka_at is None else monotonic() - self._asked_kafka_at
        return f"a call of Kafka's client has not returned for {waited:.0f} s" if waited > _STUCK_AFTER_S else None

    async def _publish(self, leadership: Leadership) -> None:
        """Batch after batch, until something goes wrong."""
        await _to_its_end(self._recover())
        while True:
            leadership.ensure()
            began = monotonic()
            limit = self._limit
            rows = await self._store.unpublished(limit)
            try:
                if rows:
                    await _to_its_end(self._publish_batch(rows))
            except RowRefused as refused:
                if len(rows) == 1:
                    raise
                # What stands before the row goes first. Then it is tried alone, because Kafka refuses a row's neighbours with it.
                self._limit = max(1, refused.index)
                await _to_its_end(self._recover())
                continue
            except Unavailable:
                self._limit = max(1, len(rows) // 2)  # if it was too much for the time that a transaction has, less will do
                raise
            self._failures = 0
            _REFUSED.set(0)
            if len(rows) == limit:
                self._limit = min(2 * limit, self._settings.max_rows)
                continue
            if rows:  # one alone went at once; under load, batches begin no closer than this, so that they grow
                await asyncio.sleep(self._settings.linger_ms / 1000 - (monotonic() - began))
            await leadership.rows_inserted(within_s=_IDLE_POLL_S)

    async def _recover(self) -> None:
        marked = await self._store.mark_published(await self._in_kafka(self._transactions.recover))
        if marked:
            _RECOVERED.inc(marked)
            _PUBLISHED.inc(marked)
            _log.warning("rows that Kafka had committed are marked now", rows=marked)
        self._trouble = None

    async def _publish_batch(self, rows: list[OutboxRow]) -> None:
        await at("relay.before_begin")
        try:
            placements = await self._in_kafka(partial(self._transactions.publish, rows))
        except PaystreamError as error:
            _TRANSACTIONS.labels("refused" if isinstance(error, RowRefused) else "in_doubt").inc()
            raise
        _TRANSACTIONS.labels("committed").inc()
        await at("relay.after_commit")
        _PUBLISHED.inc(await self._store.mark_published(placements))
        await at("relay.after_mark")

    async def _in_kafka(self, call: Callable[[], T]) -> T:
        self._asked_kafka_at = monotonic()
        try:
            return await self._kafka.call(call)
        finally:
            self._asked_kafka_at = None

    def _stand_by(self) -> None:
        self._trouble = None
        _REFUSED.set(0)
        _log.info("another relay publishes; this one stands by")

    def _report(self, error: PaystreamError) -> None:
        self._failures += 1
        self._trouble = str(error)
        if isinstance(error, RowRefused):
            _REFUSED.set(1)
            _log.error(
                "Kafka refuses an outbox row: nothing is published until that is mended, see docs/operations.md",
                outbox_id=error.row.id,
                topic=error.topic,
                bytes=len(error.row.value or b""),
                why=error.why,
            )
        else:
            _log.warning("the relay can't publish and will try again", why=str(error), failures=self._failures)


class _KafkaThread:
    """Calls that block, one after the other, in one thread. It is a daemon: a call that never returns can't keep the process from leaving."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="relay-kafka", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, function))
        return await asyncio.wrap_future(future)

    async def end(self, last: Callable[[], None]) -> None:
        """Call `last` when the others are done, unless one of them hangs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                await self.call(last)
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, function = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`. A cancellation lets it finish first, in limited time."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_FINISH_S)
        raise


# ── The process ──


def serve(settings: Settings) -> None:
    """Be the relay until SIGTERM or SIGINT, which let it finish its batch."""
    telemetry.configure(settings)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with opened_pool(settings.database, settings.service, by_key=True) as pool:
        store = OutboxStore(pool, settings.database)
        codec = cache(partial(load_codec, settings))
        relay = OutboxRelay(store, OutboxTransactions(settings, codec, SystemClock()), settings.relay)
        probes = Probes(live=relay.stuck, ready=lambda: {"relay": relay.why_not_ready()})
        async with admin_server(settings.worker.admin_host, settings.worker.admin_port, settings.service, probes):
            running = asyncio.create_task(relay.run())
            measuring = asyncio.create_task(_measure(store, EndOffsets(settings.kafka), settings.prefix))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, running.cancel)
            try:
                ended, _ = await asyncio.wait([running, measuring], return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    if not task.cancelled():
                        task.result()
                _log.info("stopped")
            except Exception as error:
                telemetry.end_process(error)
            finally:
                measuring.cancel()


async def _measure(store: OutboxStore, brokers: EndOffsets, prefix: str) -> None:
    """Keep the gauges of what waits, and delete rows that were published long ago."""
    for number in count():
        with suppress(Unavailable):
            backlog = await store.backlog()
            _OLDEST.set(backlog.oldest_s)
            _UNPUBLISHED.set(backlog.rows)
            if number % _MEASUREMENTS_BETWEEN_PURGES == 0:
                await store.purge(_KEPT)
        with suppress(Unavailable):
            _UNSETTLED.set(await brokers.unsettled(f"{prefix}payment-events"))
        await asyncio.sleep(_MEASURE_S)
