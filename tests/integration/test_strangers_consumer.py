"""A consumer that another team could have written: confluent-kafka, fastavro, the registry's HTTP API and docs/consuming.md. Nothing of ours.

Only the fixture `topics` knows Paystream: it has 60 payments of every kind lived through, and says where their events are.
"""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import fastavro
import pytest
from confluent_kafka import Consumer, KafkaError

if TYPE_CHECKING:
    from tests.integration.pipeline import Topics

pytestmark = pytest.mark.integration

ONE_TYPE = {
    "payment-initiated": "PAYMENT_INITIATED",
    "payment-processing": "PAYMENT_PROCESSING",
    "payment-completed": "PAYMENT_COMPLETED",
    "payment-failed": "PAYMENT_FAILED",
    "payment-cancelled": "PAYMENT_CANCELLED",
    "payment-refund-initiated": "PAYMENT_REFUND_INITIATED",
}
ON_PAYMENT_EVENTS_ALONE = {"PAYMENT_ACTION_REQUIRED", "PAYMENT_AUTHORIZED"}


@dataclass(frozen=True)
class Record:
    partition: int
    key: str
    value: bytes
    headers: dict[str, str]
    event: dict[str, Any]


class Stranger:
    """Reads topics from their first event to their last."""

    def __init__(self, bootstrap_servers: str, registry: str) -> None:
        self._registry = registry
        self._schemas: dict[int, Any] = {}
        self._config = {
            "bootstrap.servers": bootstrap_servers,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }

    def read(self, topic: str) -> list[Record]:
        consumer = Consumer(self._config | {"group.id": f"stranger-of-{topic}"})
        consumer.subscribe([topic])
        records: list[Record] = []
        ended: set[int] = set()
        deadline = time.monotonic() + 60
        try:
            while len(ended) < 3:
                assert time.monotonic() < deadline, f"{topic} has no end"
                message = consumer.poll(0.2)
                if message is None:
                    continue
                error = message.error()
                if error is not None:
                    assert error.code() == KafkaError._PARTITION_EOF, error
                    ended.add(message.partition())
                    continue
                headers = message.headers() or []
                assert len({name for name, _ in headers}) == len(headers), "no header twice"
                records.append(
                    Record(
                        partition=message.partition(),
                        key=message.key().decode(),
                        value=message.value(),
                        headers={name: value.decode() for name, value in headers},
                        event=self._decode(message.value()),
                    )
                )
        finally:
            consumer.close()
        return records

    def _decode(self, value: bytes) -> dict[str, Any]:
        magic, schema_id = value[0], int.from_bytes(value[1:5], "big")
        assert magic == 0
        if schema_id not in self._schemas:
            with urllib.request.urlopen(f"{self._registry}/schemas/ids/{schema_id}", timeout=10) as answer:
                self._schemas[schema_id] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
        body = io.BytesIO(value[5:])
        event: dict[str, Any] = fastavro.schemaless_reader(body, self._schemas[schema_id])
        assert body.read() == b"", "nothing follows the event"
        return event


def murmur2(data: bytes) -> int:
    """Murmur2 (32 bits) with the seed of Kafka's Java client, by the public description of the algorithm."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


@pytest.fixture(scope="module")
def stranger(topics: Topics) -> Stranger:
    return Stranger(topics.bootstrap_servers, topics.registry)


@pytest.fixture(scope="module")
def everything(stranger: Stranger, topics: Topics) -> list[Record]:
    """All of payment-events."""
    return stranger.read(f"{topics.prefix}payment-events")


def assert_no_gaps(records: list[Record], entity: str) -> dict[str, int]:
    """Versions count from 1, in the order of reading. Returns the last one of each."""
    last: dict[str, int] = defaultdict(int)
    for record in records:
        name = record.event[entity]
        assert record.event["version"] == last[name] + 1, f"{name}: {record.event['version']} after {last[name]}"
        last[name] += 1
    return dict(last)


def test_murmur2_is_that_of_kafka() -> None:
    """Values of Kafka's own test (UtilsTest.testMurmur2)."""
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536, b"abc": 479470107}
    assert {text: murmur2(text) for text in known} == {text: signed & 0xFFFFFFFF for text, signed in known.items()}


def test_every_event_of_every_payment_is_read_once_and_in_order(everything: list[Record], topics: Topics) -> None:
    last = assert_no_gaps(everything, "payment_id")
    shown = {payment_id: payment["version"] for payment_id, payment in topics.payments.items() if payment["version"]}
    assert len(shown) >= 60
    assert last == shown
    seen = {record.event["event_type"] for record in everything}
    assert seen >= {"PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED", "PAYMENT_FAILED", "PAYMENT_CANCELLED"} | ON_PAYMENT_EVENTS_ALONE


def test_the_last_event_says_what_the_payment_is(everything: list[Record], topics: Topics) -> None:
    status = {
        "PAYMENT_INITIATED": "PENDING",
        "PAYMENT_ACTION_REQUIRED": "REQUIRES_ACTION",
        **{f"PAYMENT_{name}": name for name in ("PROCESSING", "AUTHORIZED", "COMPLETED", "FAILED", "CANCELLED")},
    }
    said = {record.event["payment_id"]: (record.key, status[record.event["event_type"]]) for record in everything}
    shown = {payment_id: (payment["order_id"], payment["status"]) for payment_id, payment in topics.payments.items() if payment["version"]}
    assert said == shown
    captured = {record.event["payment_id"]: record.event["captured_minor"] for record in everything if "captured_minor" in record.event}
    assert captured == {payment_id: payment["captured_minor"] for payment_id, payment in topics.payments.items() if payment["captured_minor"]}


@pytest.mark.parametrize("topic", ONE_TYPE)
def test_a_topic_of_one_type_has_exactly_the_events_of_its_type(topic: str, stranger: Stranger, everything: list[Record], topics: Topics) -> None:
    there = stranger.read(topics.prefix + topic)
    assert Counter(record.value for record in there) == Counter(
        record.value for record in everything if record.event["event_type"] == ONE_TYPE[topic]
    )
    check_records(there, "payment_id", "/paystream/payments")


def test_headers_keys_and_partitions(everything: list[Record]) -> None:
    check_records(everything, "payment_id", "/paystream/payments")


def test_orders_are_told_the_same_way(stranger: Stranger, topics: Topics) -> None:
    records = stranger.read(f"{topics.prefix}order-events")
    last = assert_no_gaps(records, "order_id")
    assert last.keys() == {payment["order_id"] for payment in topics.payments.values() if payment["version"]}
    check_records(records, "order_id", "/paystream/orders")


def check_records(records: list[Record], entity: str, source: str) -> None:
    """Headers say what the body says, the key is the order, and the key alone says the partition."""
    for record in records:
        headers, event = dict(record.headers), record.event
        assert record.key == event["order_id"]
        assert record.partition == (murmur2(record.key.encode()) & 0x7FFFFFFF) % 3
        headers.pop("traceparent", None)
        moment = datetime.fromisoformat(headers.pop("ce_time"))
        assert moment.utcoffset() == timedelta(0)
        assert moment == event["occurred_at"]
        assert headers == {
            "ce_specversion": "1.0",
            "ce_id": event["event_id"],
            "ce_type": event["event_type"],
            "ce_source": source,
            "ce_subject": event[entity],
            "content-type": "application/avro",
        }
