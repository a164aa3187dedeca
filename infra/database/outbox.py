"""The outbox as its one reader sees it: what is to be published, what has been, and who may publish.

Rule: rows are taken because they are unpublished, never because their number is above the last one: sequence order is not commit order.
Where rows went is noted in one statement, and noting it again changes nothing.
Flow: payments.py, orders.py, parking.py -> outbox -> producers/outbox_relay -> Kafka -> `mark_published` -> outbox and events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Final

import psycopg
from psycopg.rows import class_row

from infra.database.facts import headers_of
from infra.database.pool import Connection, Pool, connection, dedicated_connection, transaction, translated
from infra.settings import Database
from schemas.errors import Unavailable

LEADER_LOCK: Final = 7_270_002
_HEARTBEAT_S: Final = 2.0
_REST_S: Final = 0.01
"""Between two wakings: hundreds of notifications a second are not taken one by one."""
_LEASE_MS: Final = 10_000
_PURGE_ROWS: Final = 5_000
_AUDIT_ROWS: Final = 2_000


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A record to be published to each of `topics` (without prefix)."""

    id: str
    topics: Sequence[str]
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp_ms: int | None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one row's record is on one of its topics."""

    outbox_id: str
    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Backlog:
    rows: int
    oldest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """A fact as Postgres has it; partition and offset are None until the relay has marked it published."""

    event_id: str
    entity_id: str
    version: int
    value: bytes
    topic: str
    partition: int | None
    offset: int | None


class Leadership:
    """The right to publish, as long as the session that holds the lock lives."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._woken = asyncio.Event()
        self._watch = asyncio.create_task(self._listen())
        self._watch.add_done_callback(lambda _: self._woken.set())

    def ensure(self) -> None:
        """Raises Unavailable if the right is lost."""
        if self._watch.done():
            raise Unavailable("Postgres", "the session that held the outbox's lock is gone")

    async def rows_inserted(self, within_s: float) -> None:
        """Return when rows were inserted since the last return, and after `within_s` at the latest. Raises Unavailable if the right is lost."""
        try:
            async with asyncio.timeout(within_s):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()
        self.ensure()

    async def end(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)

    async def _listen(self) -> None:
        """Wake the reader, and show the server that we live: it ends a session (and with it the lock) that is silent for the lease."""
        with translated():
            await self._conn.execute("LISTEN outbox")
            beat = monotonic() + _HEARTBEAT_S
            while True:
                async for _ in self._conn.notifies(timeout=max(0.0, beat - monotonic()), stop_after=1):
                    self._woken.set()
                    await asyncio.sleep(_REST_S)
                if monotonic() >= beat:
                    await self._conn.execute("SELECT 1")
                    beat = monotonic() + _HEARTBEAT_S


class OutboxStore:
    """Every method raises Unavailable while Postgres is away."""

    def __init__(self, pool: Pool, settings: Database) -> None:
        self._pool = pool
        self._settings = settings

    @asynccontextmanager
    async def lead(self, while_waiting: Callable[[], None]) -> AsyncIterator[Leadership]:
        """Wait until nobody else publishes, then be the one who does. `while_waiting` is called if somebody else does now.

        The right ends with the block, with its connection, and when this process hangs for longer than the lease.
        """
        async with dedicated_connection(self._settings, "paystream-outbox-leader") as conn:
            await conn.execute(f"SET idle_session_timeout = {_LEASE_MS}".encode())
            await _lock(conn, while_waiting)
            leadership = Leadership(conn)
            try:
                yield leadership
            finally:
                await leadership.end()

    async def unpublished(self, limit: int) -> list[OutboxRow]:
        """The oldest rows that are not known to be published, in the order of their insertion."""
        async with connection(self._pool) as conn:
            cursor = await conn.execute(
                "SELECT id::text, topics, key, value, headers, timestamp_ms FROM outbox WHERE published_at IS NULL ORDER BY seq LIMIT %s",
                [limit],
            )
            return [
                OutboxRow(id_, topics, key, value, headers_of(headers), timestamp_ms)
                async for id_, topics, key, value, headers, timestamp_ms in cursor
            ]

    async def mark_published(self, placements: Sequence[Placement]) -> int:
        """Note where rows went, and for events where readers find them (on their first topic). Returns how many rows had not been marked yet."""
        if not placements:
            return 0
        async with connection(self._pool) as conn:
            cursor = await conn.execute(
                """
                WITH placed AS (
                    SELECT * FROM unnest(%s::uuid[], %s::text[], %s::int[], %s::bigint[]) AS p (id, topic, partition, "offset")
                ), marked AS (
                    UPDATE outbox SET published_at = now() WHERE id = ANY (%s::uuid[]) AND published_at IS NULL RETURNING id, event_id
                ), noted AS (
                    UPDATE events SET partition = placed.partition, "offset" = placed."offset", published_at = now()
                    FROM marked JOIN placed USING (id)
                    WHERE events.event_id = marked.event_id AND events.topic = placed.topic AND events.published_at IS NULL
                )
                SELECT count(*) FROM marked
                """,
                [
                    [placement.outbox_id for placement in placements],
                    [placement.topic for placement in placements],
                    [placement.partition for placement in placements],
                    [placement.offset for placement in placements],
                    list({placement.outbox_id for placement in placements}),
                ],
            )
            (marked,) = await cursor.fetchone() or (0,)
            return int(marked)

    async def backlog(self) -> Backlog:
        """How many rows wait, and for how many seconds the oldest has."""
        async with connection(self._pool) as conn:
            cursor = await conn.execute(
                "SELECT count(*), coalesce(extract(epoch FROM now() - min(created_at)), 0)::float8 FROM outbox WHERE published_at IS NULL"
            )
            rows, oldest_s = await cursor.fetchone() or (0, 0.0)
            return Backlog(rows, max(0.0, oldest_s))

    async def purge(self, older_than: timedelta) -> int:
        """Delete rows that were published longer ago than that. Returns how many; the facts themselves stay in `events`."""
        deleted = 0
        while True:
            async with connection(self._pool) as conn:
                cursor = await conn.execute(
                    "DELETE FROM outbox WHERE seq IN (SELECT seq FROM outbox WHERE published_at < now() - %s ORDER BY seq LIMIT %s)",
                    [older_than, _PURGE_ROWS],
                )
            deleted += cursor.rowcount
            if cursor.rowcount < _PURGE_ROWS:
                return deleted

    async def published_events(self, topic: str, partition: int) -> AsyncGenerator[StoredEvent]:
        """What Postgres says is on a partition, by offset. Read in one snapshot, a few rows at a time."""
        query = _EVENTS + b' WHERE topic = %s AND partition = %s ORDER BY "offset"'
        async with transaction(self._pool) as conn, conn.cursor(name="published_events", row_factory=class_row(StoredEvent)) as cursor:
            cursor.itersize = _AUDIT_ROWS
            await cursor.execute(query, [topic, partition])
            async for event in cursor:
                yield event

    async def events_by_id(self, event_ids: Sequence[str]) -> dict[str, StoredEvent]:
        async with connection(self._pool) as conn, conn.cursor(row_factory=class_row(StoredEvent)) as cursor:
            await cursor.execute(_EVENTS + b" WHERE event_id = ANY (%s::uuid[])", [list(event_ids)])
            return {event.event_id: event async for event in cursor}

    async def stranded_events(self, topic: str, limit: int) -> list[StoredEvent]:
        """Events that are not published and that no outbox row will publish: there must be none."""
        query = _EVENTS + (
            b" WHERE topic = %s AND published_at IS NULL"
            b" AND NOT EXISTS (SELECT FROM outbox WHERE outbox.event_id = events.event_id AND outbox.published_at IS NULL) LIMIT %s"
        )
        async with connection(self._pool) as conn, conn.cursor(row_factory=class_row(StoredEvent)) as cursor:
            await cursor.execute(query, [topic, limit])
            return await cursor.fetchall()


_EVENTS: Final = b'SELECT event_id::text, entity_id, version, value, topic, partition, "offset" FROM events'


async def _lock(conn: Connection, while_waiting: Callable[[], None]) -> None:
    """Wait for the lock, however long it takes: each time that the connection's lock_timeout is over, the server has shown that it lives."""
    row = await (await conn.execute("SELECT pg_try_advisory_lock(%s)", [LEADER_LOCK])).fetchone()
    if row == (True,):
        return
    while_waiting()
    while True:
        try:
            await conn.execute("SELECT pg_advisory_lock(%s)", [LEADER_LOCK])
        except psycopg.errors.LockNotAvailable:
            continue
        return
