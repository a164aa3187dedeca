"""The auditor: does Kafka hold what Postgres says, once and in order (D5)?

Rule: it reads as a consumer does (`read_committed`, from the first offset) and decides nothing by what the relay remembers. It may run beside a busy
relay: what is committed and not marked yet, or not published yet, is no fault.
Flow: payment-events, order-events -> every version after the one before -> compared with `events`, offset by offset -> what differs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import confluent_kafka

from infra.database.outbox import OutboxStore, StoredEvent
from infra.kafka_offsets import EndOffsets
from infra.settings import Settings
from producers.committed_log import CommittedLog
from schemas.codec import Codec
from schemas.errors import Rejected
from schemas.messages import Event, OrderEvent

TOPICS: Final = ("payment-events", "order-events")
_KEPT: Final = 100
_CHUNK: Final = 500


class Fault(StrEnum):
    GAP = "gap"
    REPEATED = "repeated"
    MISSING = "missing"
    DIFFERENT = "different"
    UNKNOWN = "unknown"
    UNREADABLE = "unreadable"
    STRANDED = "stranded"


ABOUT: Final = {
    Fault.GAP: "a version is not on the topic before its next one",
    Fault.REPEATED: "a version is on the topic again, or after a later one",
    Fault.MISSING: "Postgres says that an event is there, and it is not",
    Fault.DIFFERENT: "what is there is not what Postgres says is there",
    Fault.UNKNOWN: "Postgres does not have this event: it was restored from a backup, or somebody else writes here",
    Fault.UNREADABLE: "no event of ours",
    Fault.STRANDED: "an event that is not published and that the outbox will not publish",
}


@dataclass(frozen=True, slots=True)
class Finding:
    fault: Fault
    topic: str
    partition: int | None
    offset: int | None
    subject: str


@dataclass
class Audit:
    """The result. `unmarked` events are on Kafka and not yet noted in Postgres: at most one batch of the relay."""

    records: int = 0
    entities: int = 0
    unmarked: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def add(self, fault: Fault, topic: str, partition: int | None, offset: int | None, subject: str) -> None:
        """All are counted, the first hundred are kept."""
        self.faults[fault] += 1
        if len(self.findings) < _KEPT:
            self.findings.append(Finding(fault, topic, partition, offset, subject))

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "records": self.records,
            "entities": self.entities,
            "unmarked": self.unmarked,
            "faults": {str(fault): count for fault, count in self.faults.items()},
            "findings": [
                {
                    "fault": str(finding.fault),
                    "topic": finding.topic,
                    "partition": finding.partition,
                    "offset": finding.offset,
                    "subject": finding.subject,
                }
                for finding in self.findings
            ],
        }


async def audit(settings: Settings, codec: Codec, store: OutboxStore) -> Audit:
    """Read both topics from their beginning and compare. Raises Unavailable while Kafka or Postgres is away."""
    result = Audit()
    log, brokers = CommittedLog(settings), EndOffsets(settings.kafka)
    patience_s = settings.relay.transaction_timeout_ms / 1000 + 5
    try:
        for topic in TOPICS:
            versions: dict[str, int] = {}
            for partition in await asyncio.to_thread(log.partitions, topic):
                async with aclosing(store.published_events(topic, partition)) as said:
                    expected = await anext(said, None)  # Postgres is asked before Kafka is: what it knows by now is there by now
                    await brokers.settled(settings.prefix + topic, patience_s)
                    pairs = _paired(expected, said, log, versions, topic, partition)
                    await _compare(result, codec, store, versions, pairs, topic, partition)
            for event in await store.stranded_events(topic, _KEPT):
                result.add(Fault.STRANDED, topic, None, None, _name(event))
            result.entities += len(versions)
    finally:
        await asyncio.to_thread(log.close)
    return result


Pair = tuple[StoredEvent | None, confluent_kafka.Message | None]


async def _paired(
    expected: StoredEvent | None, said: AsyncIterator[StoredEvent], log: CommittedLog, versions: dict[str, int], topic: str, partition: int
) -> AsyncIterator[Pair]:
    """What Postgres says is on a partition (`expected` first), and what is, by offset; None where one of them has nothing."""
    first, end = await asyncio.to_thread(log.bounds, topic, partition)
    while expected is not None and _offset(expected) < first:  # gone by retention: taken as read
        versions[expected.entity_id] = expected.version
        expected = await anext(said, None)
    await asyncio.to_thread(log.seek, topic, partition, first, end)
    while records := await asyncio.to_thread(log.read):
        for record in records:
            while expected is not None and _offset(expected) < record.offset():
                yield expected, None
                expected = await anext(said, None)
            if expected is not None and expected.offset == record.offset():
                yield expected, record
                expected = await anext(said, None)
            else:
                yield None, record
    while expected is not None:
        yield expected, None
        expected = await anext(said, None)


async def _compare(
    result: Audit, codec: Codec, store: OutboxStore, versions: dict[str, int], pairs: AsyncIterator[Pair], topic: str, partition: int
) -> None:
    unsaid: list[tuple[int, Event]] = []
    async for said, record in pairs:
        if record is None:
            if said is not None:
                result.add(Fault.MISSING, topic, partition, said.offset, _name(said))
            continue
        result.records += 1
        offset = record.offset()
        event = _decoded(codec, record.value())
        if event is None:
            result.add(Fault.UNREADABLE, topic, partition, offset, "")
            continue
        entity = _entity(event)
        last = versions.get(entity, 0)
        if event.version <= last:
            result.add(Fault.REPEATED, topic, partition, offset, f"{entity} version {event.version} after {last}")
        elif event.version > last + 1:
            result.add(Fault.GAP, topic, partition, offset, f"{entity} version {event.version} after {last}")
        versions[entity] = max(last, event.version)
        if said is None:
            unsaid.append((offset, event))
        elif said.value != record.value() or said.event_id != event.event_id or said.version != event.version:
            result.add(Fault.DIFFERENT, topic, partition, offset, f"{_name(said)} is {entity} version {event.version}")
        if len(unsaid) == _CHUNK:
            await _look_up(result, store, unsaid, topic, partition)
            unsaid = []
    await _look_up(result, store, unsaid, topic, partition)


async def _look_up(result: Audit, store: OutboxStore, unsaid: list[tuple[int, Event]], topic: str, partition: int) -> None:
    """Records that Postgres did not name when it was asked: the relay may have marked them since, or be about to."""
    known = await store.events_by_id([event.event_id for _, event in unsaid]) if unsaid else {}
    for offset, event in unsaid:
        stored = known.get(event.event_id)
        if stored is None:
            result.add(Fault.UNKNOWN, topic, partition, offset, f"{_entity(event)} version {event.version}")
        elif stored.offset is None:
            result.unmarked += 1
        elif (stored.partition, stored.offset) != (partition, offset):
            result.add(Fault.DIFFERENT, topic, partition, offset, f"{_name(stored)} should be at {stored.partition}/{stored.offset}")


def _decoded(codec: Codec, value: bytes | None) -> Event | None:
    try:
        message = codec.decode(value)
    except Rejected:
        return None
    return message if isinstance(message, Event) else None


def _entity(event: Event) -> str:
    """Whose versions an event counts: the order's, or the payment's."""
    return event.order_id if isinstance(event, OrderEvent) or event.payment_id is None else event.payment_id


def _name(event: StoredEvent) -> str:
    return f"{event.entity_id} version {event.version}"


def _offset(event: StoredEvent) -> int:
    return -1 if event.offset is None else event.offset
