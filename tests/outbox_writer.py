"""Writes events and outbox rows as the stores do: in one transaction, under the order's lock, with a NOTIFY."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import psycopg
from psycopg.rows import TupleRow

from infra.settings import Settings
from schemas.codec import Codec, headers
from schemas.messages import Event, PaymentProcessing, derived_id
from schemas.topics import destinations

Connection = psycopg.AsyncConnection[TupleRow]

_OUTBOX = "INSERT INTO outbox (topics, key, value, headers, timestamp_ms, event_id, created_at) VALUES (%s, %s, %s, %s, %s, %s, now())"
_EVENTS = """
    INSERT INTO events (event_id, stream, entity_id, version, event_type, order_id, value, occurred_at, topic)
    VALUES (%s, 'payment', %s, %s, %s, %s, %s, %s, %s)"""


async def connected(settings: Settings) -> Connection:
    return await psycopg.AsyncConnection.connect(settings.database.url.get_secret_value(), autocommit=True)


class OutboxWriter:
    """Each order has one payment; its events count from 1."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.versions: Counter[str] = Counter()

    async def append(self, conn: Connection, order: str, events: int = 1) -> list[Event]:
        """The next events of an order, in one transaction."""
        async with conn.transaction():
            await conn.execute("SELECT pg_advisory_xact_lock(1, hashtext(%s))", [order])
            written = [self._next(order) for _ in range(events)]
            await self.insert(conn, written)
        return written

    async def insert(self, conn: Connection, events: Sequence[Event]) -> None:
        for event in events:
            name = type(event).__name__
            topics = destinations(name)
            value = self._codec.encode(event)
            key = event.order_id.encode()
            place = [event.event_id, event.payment_id, event.version, event.event_type, event.order_id, value, event.occurred_at, topics[0]]
            await conn.execute(_EVENTS, place)
            await conn.execute(_OUTBOX, [list(topics), key, value, as_json(headers(event)), None, event.event_id])
        await conn.execute("SELECT pg_notify('outbox', '')")

    def _next(self, order: str) -> Event:
        self.versions[order] += 1
        version = self.versions[order]
        event_id = derived_id("event", order, version)
        return PaymentProcessing(
            event_id=event_id,
            order_id=order,
            payment_id=payment_of(order),
            user_id="u1",
            version=version,
            occurred_at=datetime.now(UTC),
            correlation_id=event_id,
            gateway="stripe",
            currency="EUR",
            amount_minor=100 + version,
            attempt=1,
        )


def payment_of(order: str) -> str:
    return derived_id("payment", order)


async def insert_row(
    conn: Connection,
    topics: Sequence[str],
    key: bytes | None,
    value: bytes | None,
    row_headers: Iterable[tuple[str, bytes | None]] = (),
    timestamp_ms: int | None = None,
) -> None:
    """One row that is no event."""
    async with conn.transaction():
        await conn.execute(_OUTBOX, [list(topics), key, value, as_json(row_headers), timestamp_ms, uuid.uuid4()])
        await conn.execute("SELECT pg_notify('outbox', '')")


def as_json(pairs: Iterable[tuple[str, bytes | None]]) -> str:
    return json.dumps([(name, None if value is None else base64.b64encode(value).decode()) for name, value in pairs])


async def all_published(settings: Settings, within_s: float = 30.0) -> None:
    """Wait until no row is left unpublished."""
    async with await connected(settings) as conn, asyncio.timeout(within_s):
        while await unpublished_count(conn):
            await asyncio.sleep(0.02)


async def unpublished_count(conn: Connection) -> int:
    (count,) = await (await conn.execute("SELECT count(*) FROM outbox WHERE published_at IS NULL")).fetchone() or (0,)
    return int(count)
