"""The outbox as its reader sees it, on real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic import SecretStr

from infra.database.outbox import OutboxStore, Placement
from infra.database.pool import opened_pool
from infra.settings import Database, Settings
from schemas.codec import Codec
from schemas.errors import Unavailable
from tests.outbox_writer import Connection, OutboxWriter, connected, insert_row, payment_of, unpublished_count

pytestmark = pytest.mark.integration


@pytest.fixture
async def store(database: Settings) -> AsyncIterator[OutboxStore]:
    async with opened_pool(database.database, "test-outbox") as pool:
        yield OutboxStore(pool, database.database)


@pytest.fixture
async def conn(database: Settings) -> AsyncIterator[Connection]:
    async with await connected(database) as conn:
        yield conn


@pytest.fixture
def writer() -> OutboxWriter:
    return OutboxWriter(Codec.unregistered())


def placed(outbox_id: str, partition: int, offset: int) -> list[Placement]:
    return [
        Placement(outbox_id, "payment-events", partition, offset),
        Placement(outbox_id, "payment-processing", partition, offset + 1000),
    ]


async def test_rows_come_in_order_of_insertion(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    first, second = await writer.append(conn, "o1", 2)
    await insert_row(conn, ["payment-events-dlq"], None, None, [("a", b"\x00"), ("a", None)], timestamp_ms=7)
    rows = await store.unpublished(10)
    assert [row.topics for row in rows] == [["payment-events", "payment-processing"]] * 2 + [["payment-events-dlq"]]
    assert [dict(row.headers)["ce_id"] for row in rows[:2]] == [first.event_id.encode(), second.event_id.encode()]
    assert (rows[0].key, rows[0].timestamp_ms) == (b"o1", None)
    assert (rows[2].key, rows[2].value, rows[2].headers, rows[2].timestamp_ms) == (None, None, (("a", b"\x00"), ("a", None)), 7)
    assert await store.unpublished(2) == rows[:2]


async def test_marking_tells_where_an_event_is_on_its_first_topic(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    events = await writer.append(conn, "o1", 3)
    rows = await store.unpublished(10)
    assert await store.mark_published([*placed(rows[0].id, 2, 5), *placed(rows[1].id, 2, 6)]) == 2
    assert [row.id for row in await store.unpublished(10)] == [rows[2].id]
    stored = await store.events_by_id([event.event_id for event in events])
    assert [(stored[event.event_id].partition, stored[event.event_id].offset) for event in events] == [(2, 5), (2, 6), (None, None)]
    found = [(event.entity_id, event.version) async for event in store.published_events("payment-events", 2)]
    assert found == [(payment_of("o1"), 1), (payment_of("o1"), 2)]


async def test_marking_again_changes_nothing(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    (event,) = await writer.append(conn, "o1")
    (row,) = await store.unpublished(10)
    assert await store.mark_published(placed(row.id, 0, 1)) == 1
    assert await store.mark_published(placed(row.id, 0, 99)) == 0
    assert await store.mark_published([]) == 0
    assert (await store.events_by_id([event.event_id]))[event.event_id].offset == 1


async def test_the_backlog(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    backlog = await store.backlog()
    assert (backlog.rows, backlog.oldest_s) == (0, 0.0)
    await writer.append(conn, "o1", 2)
    await conn.execute("UPDATE outbox SET created_at = now() - interval '90 s' WHERE seq = (SELECT min(seq) FROM outbox)")
    backlog = await store.backlog()
    assert backlog.rows == 2
    assert 90 <= backlog.oldest_s < 100


async def test_purging_takes_only_what_was_published_long_ago(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    await writer.append(conn, "o1", 3)
    await conn.execute("UPDATE outbox SET created_at = now() - interval '30 days'")
    rows = await store.unpublished(10)
    await store.mark_published([*placed(rows[0].id, 0, 0), *placed(rows[1].id, 0, 1)])
    await conn.execute("UPDATE outbox SET published_at = now() - interval '8 days' WHERE id = %s", [rows[0].id])
    assert await store.purge(timedelta(days=7)) == 1
    assert await store.purge(timedelta(days=7)) == 0
    assert await unpublished_count(conn) == 1
    assert len([event async for event in store.published_events("payment-events", 0)]) == 2


async def test_an_event_is_stranded_when_no_row_will_publish_it(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    await writer.append(conn, "o1", 2)
    assert await store.stranded_events("payment-events", 10) == []
    await conn.execute("DELETE FROM outbox WHERE seq = (SELECT min(seq) FROM outbox)")
    assert [event.version for event in await store.stranded_events("payment-events", 10)] == [1]
    assert await store.stranded_events("order-events", 10) == []


async def test_one_leads_and_the_next_one_waits(store: OutboxStore) -> None:
    waiting, leads = asyncio.Event(), asyncio.Event()

    async def second() -> None:
        async with store.lead(while_waiting=waiting.set):
            leads.set()

    async with store.lead(while_waiting=pytest.fail) as leadership:
        task = asyncio.create_task(second())
        await waiting.wait()
        leadership.ensure()
        assert not leads.is_set()
    await task
    assert leads.is_set()


async def test_the_leader_is_woken_by_new_rows(store: OutboxStore, conn: Connection, writer: OutboxWriter) -> None:
    async with store.lead(while_waiting=pytest.fail) as leadership, asyncio.timeout(20):
        await leadership.rows_inserted(within_s=0.0)
        async with asyncio.TaskGroup() as group:
            woken = group.create_task(leadership.rows_inserted(within_s=3600))
            while not woken.done():
                await writer.append(conn, "o1")
                await asyncio.sleep(0.01)


async def test_the_right_ends_with_the_connection(store: OutboxStore, conn: Connection) -> None:
    async with store.lead(while_waiting=pytest.fail) as leadership, asyncio.timeout(20):
        waiting = asyncio.create_task(leadership.rows_inserted(within_s=3600))
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'paystream-outbox-leader' AND datname = current_database()"
        )
        with pytest.raises(Unavailable, match="lock"):
            await waiting
        with pytest.raises(Unavailable, match="lock"):
            leadership.ensure()


async def test_postgres_is_away() -> None:
    nowhere = Database(url=SecretStr("postgresql://nobody@127.0.0.1:1/nothing"))
    async with opened_pool(nowhere, "test-nowhere") as pool:
        store = OutboxStore(pool, nowhere)
        with pytest.raises(Unavailable, match="Postgres"):
            async with store.lead(while_waiting=pytest.fail):
                pytest.fail("nobody leads")
        with pytest.raises(Unavailable, match="Postgres"):
            await store.unpublished(1)
