"""What every producer promises, on memory and on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from infra.crash_points import plugged
from infra.settings import Settings
from producers.memory import MemoryProducer
from producers.producer import KafkaProducer, Producer, Record
from schemas.errors import Rejected
from tests.topic_reader import read_topic

TOPIC = "payment-commands"
PARTITION_OF = {b"order-1": 1, b"order-2": 0, b"order-3": 0, b"ord_5f9c": 0, "größe".encode(): 2, b"\xff\x00": 1, b"": 0}
"""Of three partitions, as Kafka's own Java client would choose."""

Sent = Callable[[], Sequence[Record]]


@pytest.fixture(params=[pytest.param("memory", marks=pytest.mark.unit), pytest.param("kafka", marks=pytest.mark.integration)])
async def producer_and_sent(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Producer, Sent]]:
    if request.param == "memory":
        memory = MemoryProducer()
        yield memory, lambda: memory.sent(TOPIC)
        return
    settings: Settings = request.getfixturevalue("installation")

    def sent() -> list[Record]:
        found = read_topic(settings, TOPIC)
        return [Record(topic=TOPIC, key=r.key, value=r.value, headers=r.headers, timestamp_ms=r.timestamp_ms) for r in found]

    kafka = KafkaProducer(settings)
    await kafka.start()
    yield kafka, sent
    await kafka.close()


@pytest.fixture
def producer(producer_and_sent: tuple[Producer, Sent]) -> Producer:
    return producer_and_sent[0]


@pytest.fixture
def sent(producer_and_sent: tuple[Producer, Sent]) -> Sent:
    return producer_and_sent[1]


async def test_equal_keys_meet_where_java_clients_put_them(producer: Producer) -> None:
    placed = {key: (await producer.send(Record(topic=TOPIC, key=key, value=b"x"))).partition for key in PARTITION_OF}
    assert placed == PARTITION_OF


async def test_a_record_is_written_as_it_is(producer: Producer, sent: Sent) -> None:
    record = Record(
        topic=TOPIC, key=b"o1", value=b"\x00\xff", headers=(("ce_type", b"x"), ("ce_type", b"y"), ("none", None)), timestamp_ms=1_700_000_000_123
    )
    placed = await producer.send(record)
    assert (placed.topic, placed.offset) == (TOPIC, 0)
    assert await asyncio.to_thread(sent) == [record]


async def test_without_key_or_value(producer: Producer, sent: Sent) -> None:
    for value in (b"x", None):
        placed = await producer.send(Record(topic=TOPIC, key=None, value=value, timestamp_ms=1))
        assert 0 <= placed.partition < 3
    assert sorted(await asyncio.to_thread(sent), key=lambda record: record.value or b"") == [
        Record(topic=TOPIC, key=None, value=None, timestamp_ms=1),
        Record(topic=TOPIC, key=None, value=b"x", timestamp_ms=1),
    ]


async def test_order_of_one_key_is_the_order_of_sending(producer: Producer, sent: Sent) -> None:
    records = [Record(topic=TOPIC, key=b"o1", value=str(number).encode(), timestamp_ms=1) for number in range(300)]
    places = await asyncio.gather(*(producer.send(record) for record in records))
    assert [placed.offset for placed in places] == list(range(300))
    assert await asyncio.to_thread(sent) == records


async def test_what_is_too_large_is_rejected(producer: Producer) -> None:
    with pytest.raises(Rejected):
        await producer.send(Record(topic=TOPIC, key=b"o1", value=b"x" * 1_500_000))


async def test_it_is_healthy(producer: Producer) -> None:
    assert await producer.healthy()


async def test_sends_pass_their_crash_points(producer: Producer) -> None:
    passed: list[str] = []

    async def note(point: str) -> None:
        passed.append(point)

    with plugged(note):
        await producer.send(Record(topic=TOPIC, key=b"o1", value=b"x"))
    assert passed == ["producer.before_send", "producer.after_ack"]
