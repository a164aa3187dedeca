"""Kafka's side of the relay: outbox rows onto their topics, in transactions that say by themselves which rows they published.

Rule: it never guesses. A transaction holds the records of its rows and, last, one position record that names where each of them is. Whatever does
not end plainly well (a delivery report missing, a commit that raised or was slow) is neither failure nor success: the producer is thrown away, and
`recover` asks. All calls block: they belong in a thread of their own.
Flow: rows -> begin -> produce -> every delivery report -> position record -> commit -> placements.

librdkafka sends a commit (EndTxn) again when its connection breaks, and the first one may still be on its way: it would end a *later* transaction
of the same producer epoch, half written. A repeat never comes before `retry.backoff.ms` less its jitter of 20 %, so a commit that took less was sent
once. After one that took longer, `recover` has the epoch raised, and the brokers refuse the straggler.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException
from prometheus_client import Counter, Histogram

from infra.clock import Clock
from infra.crash_points import crash_here
from infra.database.outbox import OutboxRow, Placement
from infra.kafka_admin import producer_config
from infra.settings import Settings
from infra.telemetry import DURATION_BUCKETS
from producers.committed_log import CommittedLog, kafka_translated, unavailable
from schemas.codec import Codec, headers
from schemas.errors import PaystreamError, Rejected, Unavailable
from schemas.messages import OutboxPosition

POSITIONS: Final = "outbox-positions"
_POSITION_KEY: Final = b"relay"
_RETRY_BACKOFF_MS: Final = 1000
SLOW_COMMIT_S: Final = 0.7 * _RETRY_BACKOFF_MS / 1000
_INIT_S: Final = 15.0
_SLICE_S: Final = 0.25
_BATCH_BYTES: Final = 64 * 1024
_LOOK_BACK: Final = 32
_REFUSALS: Final = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._INVALID_ARG,
    }
)

_COMMIT_SECONDS = Histogram("paystream_relay_commit_seconds", "How long Kafka took to commit a transaction of the relay", buckets=DURATION_BUCKETS)
_OPENED = Counter("paystream_relay_producers_opened_total", "Transactional producers that the relay opened: one at its start, one after each doubt")


class RowRefused(PaystreamError):
    """Kafka refuses a record, and will again until somebody changes something. `index` is its row's place among those that were to be published."""

    def __init__(self, index: int, row: OutboxRow, topic: str, why: str) -> None:
        self.index = index
        self.row = row
        self.topic = topic
        self.why = why
        super().__init__(f"Kafka refuses outbox row {row.id} on {topic}: {why}")


class OutboxTransactions:
    """One transactional producer after the other, under one transactional id: the newest fences all before it."""

    def __init__(
        self,
        settings: Settings,
        codec: Callable[[], Codec],
        clock: Clock,
        opened: Callable[[dict[str, Any]], Any] = confluent_kafka.Producer,
    ) -> None:
        self._settings = settings
        self._codec = codec
        self._clock = clock
        self._opened = opened
        self._timeout_s = settings.relay.transaction_timeout_ms / 1000
        self._producer: Any = None
        self._producer_config = producer_config(settings.kafka) | {
            "client.id": settings.service,
            "logger": logging.getLogger("librdkafka"),
            "transactional.id": f"{settings.prefix}paystream-outbox-relay",
            "transaction.timeout.ms": settings.relay.transaction_timeout_ms,
            "retry.backoff.ms": _RETRY_BACKOFF_MS,
            "retry.backoff.max.ms": _RETRY_BACKOFF_MS,
            "linger.ms": 5,
            "batch.size": _BATCH_BYTES,  # a batch above a topic's max.message.bytes would be refused as a whole
            "topic.metadata.propagation.max.ms": 2000,
        }

    def recover(self) -> list[Placement]:
        """Open a new producer, which ends whatever transaction was left open, and tell which rows the last committed one published.

        Raises Unavailable while Kafka or the registry is away.
        """
        self.discard()
        codec = self._codec()
        _OPENED.inc()
        self._producer = self._opened(self._producer_config)
        with kafka_translated():
            self._producer.init_transactions(_INIT_S)
            return self._last_position(codec)

    def publish(self, rows: Sequence[OutboxRow]) -> list[Placement]:
        """Publish the rows, all or none, and tell where each record is. After any exception only `recover` may follow.

        Raises RowRefused, or Unavailable when the outcome is not plain.
        """
        for index, row in enumerate(rows):
            if not row.topics:
                raise RowRefused(index, row, "no topic", "it names no topic to go to")
        with kafka_translated():
            self._producer.begin_transaction()
            placements = self._produce(rows)
            crash_here("relay.after_produce")
            self._produce([self._position(placements)])
            crash_here("relay.before_commit")
            self._commit()
        return placements

    def discard(self) -> None:
        """Let the producer go with whatever it has under way. A transaction that it leaves open is ended by the next `recover`, or times out."""
        if self._producer is not None:
            self._producer.purge(blocking=False)
            self._producer = None

    def _produce(self, rows: Sequence[OutboxRow]) -> list[Placement]:
        """Put each row on each of its topics, and wait for every delivery report."""
        records = [(index, topic) for index, row in enumerate(rows) for topic in row.topics]
        placements: dict[int, Placement] = {}
        failures: list[tuple[int, str, KafkaError]] = []

        def report_to(number: int) -> Callable[[KafkaError | None, confluent_kafka.Message], None]:
            index, topic = records[number]

            def reported(error: KafkaError | None, message: confluent_kafka.Message) -> None:
                if error is not None:
                    failures.append((index, topic, error))
                elif message.offset() >= 0:  # else a repeat that the broker had already, but no longer knows where
                    placements[number] = Placement(rows[index].id, topic, message.partition(), message.offset())

            return reported

        for number, (index, topic) in enumerate(records):
            row = rows[index]
            when = {} if row.timestamp_ms is None else {"timestamp": row.timestamp_ms}
            try:
                self._producer.produce(
                    self._settings.prefix + topic, key=row.key, value=row.value, headers=list(row.headers), on_delivery=report_to(number), **when
                )
            except KafkaException as error:
                failures.append((index, topic, error.args[0]))
                break
            except BufferError as error:
                raise RowRefused(index, row, topic, "librdkafka's queue is full, of what stands before it in the batch") from error
        deadline = time.monotonic() + self._timeout_s
        while self._producer.flush(_SLICE_S) and not failures and time.monotonic() < deadline:
            pass
        if failures:
            raise self._failure(rows, failures)
        if missing := len(records) - len(placements):
            raise Unavailable("Kafka", f"{missing} of {len(records)} delivery reports did not come")
        return [placements[number] for number in range(len(records))]

    def _failure(self, rows: Sequence[OutboxRow], failures: Sequence[tuple[int, str, KafkaError]]) -> Exception:
        """The refusal of the first row that was refused; else nobody's fault. A refusal fails what follows it on its partition, in other ways."""
        refused = [failure for failure in failures if failure[2].code() in _REFUSALS]
        if refused:
            index, topic, error = min(refused, key=lambda failure: failure[0])
            return RowRefused(index, rows[index], topic, f"{error.str()} ({error.name()})")
        try:
            self._producer.begin_transaction()  # a transaction that has failed as a whole (no right to write) tells why
        except KafkaException as raised:
            why: KafkaError = raised.args[0]
            if why.code() in _REFUSALS:
                return RowRefused(0, rows[0], ", ".join(rows[0].topics), f"{why.str()} ({why.name()})")
        return unavailable(failures[0][2])

    def _position(self, placements: Sequence[Placement]) -> OutboxRow:
        """The record that says what this transaction publishes, as one more row."""
        name = str(uuid.uuid4())
        position = OutboxPosition(
            event_id=name,
            order_id=None,
            payment_id=None,
            user_id=None,
            occurred_at=self._clock.now(),
            correlation_id=name,
            records=[f"{placed.outbox_id} {placed.topic} {placed.partition} {placed.offset}" for placed in placements],
        )
        return OutboxRow(name, (POSITIONS,), _POSITION_KEY, self._codec().encode(position), headers(position), None)

    def _commit(self) -> None:
        began = time.monotonic()
        self._producer.commit_transaction()
        took = time.monotonic() - began
        _COMMIT_SECONDS.observe(took)
        if took > SLOW_COMMIT_S:
            raise Unavailable("Kafka", f"a commit took {took:.1f} s, in which it may have been sent twice")

    def _last_position(self, codec: Codec) -> list[Placement]:
        """What the last committed position record names. Called after `init_transactions`: nothing older can be committed any more."""
        value = self._last_value()
        if value is None:
            return []
        position = codec.decode(value)
        if not isinstance(position, OutboxPosition):
            raise Rejected(f"{POSITIONS} holds a {type(position).__name__}")
        return [_placement(record) for record in position.records]

    def _last_value(self) -> bytes | None:
        log = CommittedLog(self._settings)
        try:
            first, end = log.bounds(POSITIONS, 0)
            back = _LOOK_BACK
            while True:
                start = max(first, end - back)
                log.seek(POSITIONS, 0, start, end)
                value: bytes | None = None
                while records := log.read():
                    value = records[-1].value()
                if value is not None or start == first:
                    return value
                back *= 8  # nothing there but markers and what was aborted
        finally:
            log.close()


def _placement(record: str) -> Placement:
    outbox_id, topic, partition, offset = record.split(" ")
    return Placement(outbox_id, topic, int(partition), int(offset))
