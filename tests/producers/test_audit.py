"""The auditor finds what is planted, and nothing in peace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from infra.clock import SystemClock
from infra.database.outbox import OutboxStore
from infra.database.pool import opened_pool
from infra.settings import Settings
from producers.audit import Audit, Fault, audit
from producers.outbox_transactions import OutboxTransactions
from producers.producer import KafkaProducer, Record
from schemas.codec import Codec
from tests.integration.test_relay import relay_running
from tests.outbox_writer import Connection, OutboxWriter, all_published, connected

pytestmark = pytest.mark.integration

CODEC = Codec.unregistered()
TOPIC = "payment-events"


class World:
    """Three events of an order, published and marked."""

    def __init__(self, settings: Settings, conn: Connection, store: OutboxStore, producer: KafkaProducer) -> None:
        self.settings, self.conn, self.store, self._producer = settings, conn, store, producer
        self.writer = OutboxWriter(CODEC)

    async def audit(self) -> Audit:
        return await audit(self.settings, CODEC, self.store)

    async def faults(self) -> dict[Fault, int]:
        return dict((await self.audit()).faults)

    async def publish(self, *, mark: bool = True) -> None:
        """What a relay does, once."""
        transactions = OutboxTransactions(self.settings, lambda: CODEC, SystemClock())
        await asyncio.to_thread(transactions.recover)
        placements = await asyncio.to_thread(transactions.publish, await self.store.unpublished(100))
        if mark:
            await self.store.mark_published(placements)

    async def put(self, value: bytes) -> None:
        """A record on the topic by somebody else's hand."""
        await self._producer.send(Record(topic=TOPIC, key=b"o1", value=value))

    async def row(self, query: str) -> tuple[Any, ...]:
        row = await (await self.conn.execute(query.encode())).fetchone()
        assert row is not None
        return row

    async def say(self, statement: str, *parameters: object) -> None:
        cursor = await self.conn.execute(statement.encode(), parameters)
        assert cursor.rowcount == 1


@pytest.fixture
async def world(installation: Settings) -> AsyncIterator[World]:
    producer = KafkaProducer(installation)
    await producer.start()
    async with await connected(installation) as conn, opened_pool(installation.database, "test-audit") as pool:
        world = World(installation, conn, OutboxStore(pool, installation.database), producer)
        await world.writer.append(conn, "o1", 3)
        await world.publish()
        yield world
    await producer.close()


async def test_in_peace(world: World) -> None:
    result = await world.audit()
    assert (result.ok, result.records, result.entities, result.unmarked, result.findings) == (True, 3, 1, 0, [])


async def test_what_is_not_published_or_not_marked_yet_is_no_fault(world: World) -> None:
    await world.writer.append(world.conn, "o1", 2)
    await world.publish(mark=False)
    await world.writer.append(world.conn, "o1", 2)
    result = await world.audit()
    assert (result.ok, result.records, result.unmarked) == (True, 5, 2)


async def test_a_version_that_is_not_there(world: World) -> None:
    await world.conn.execute("DELETE FROM events WHERE version = 2")
    await world.writer.append(world.conn, "o1", 2)
    await world.say("DELETE FROM outbox WHERE published_at IS NULL AND seq = (SELECT max(seq) - 1 FROM outbox)")
    await world.say("DELETE FROM events WHERE version = 4")
    await world.publish()
    result = await world.audit()
    assert dict(result.faults) == {Fault.GAP: 1, Fault.UNKNOWN: 1}
    assert {(finding.fault, finding.subject.split(" ", 1)[1]) for finding in result.findings} == {
        (Fault.GAP, "version 5 after 3"),
        (Fault.UNKNOWN, "version 2"),
    }


async def test_an_event_that_is_there_twice(world: World) -> None:
    (value,) = await world.row("SELECT value FROM events WHERE version = 2")
    await world.put(value)
    assert await world.faults() == {Fault.REPEATED: 1, Fault.DIFFERENT: 1}


async def test_an_event_that_is_not_where_postgres_says(world: World) -> None:
    await world.say('UPDATE events SET "offset" = 1000 WHERE version = 2')
    assert await world.faults() == {Fault.MISSING: 1, Fault.DIFFERENT: 1}


async def test_another_event_than_postgres_says(world: World) -> None:
    await world.say("UPDATE events SET value = value || 'x' WHERE version = 2")
    assert await world.faults() == {Fault.DIFFERENT: 1}


async def test_an_event_of_nobody(world: World) -> None:
    await world.conn.execute("DELETE FROM events WHERE version = 3")
    assert await world.faults() == {Fault.UNKNOWN: 1}


async def test_bytes_that_are_no_event(world: World) -> None:
    await world.put(b"nonsense")
    assert await world.faults() == {Fault.UNREADABLE: 1}


async def test_an_event_that_nobody_will_publish(world: World) -> None:
    await world.writer.append(world.conn, "o1")
    await world.say("DELETE FROM outbox WHERE published_at IS NULL")
    assert await world.faults() == {Fault.STRANDED: 1}


async def test_what_is_gone_by_retention_is_taken_as_read(world: World) -> None:
    partition, offset = await world.row('SELECT partition, "offset" FROM events WHERE version = 2')
    admin = AdminClient({"bootstrap.servers": world.settings.kafka.bootstrap_servers})
    for deleted in admin.delete_records([TopicPartition(world.settings.prefix + TOPIC, partition, offset + 1)]).values():
        deleted.result(10)
    result = await world.audit()
    assert (result.ok, result.records) == (True, 1)


async def test_beside_a_busy_relay(world: World) -> None:
    async with relay_running(world.settings):
        for number in range(60):
            await world.writer.append(world.conn, f"o{number % 7}", 2)
            if number % 10 == 0:
                result = await world.audit()
                assert result.ok, result.findings
        await all_published(world.settings)
    result = await world.audit()
    assert (result.ok, result.records, result.entities) == (True, 123, 7)
