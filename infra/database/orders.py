"""Where orders are kept: what the orders group reads and writes under an order's lock.

Rule: one transaction is BEGIN, the order's lock, one SELECT that loads the order and how far its payment's events were applied, one statement that
writes all that follows, COMMIT. The group consumes events, so it remembers the last version of each payment instead of each message.
Flow: processors/orders -> orders, events, outbox, stream_positions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Final, Protocol

import orjson

from infra.clock import Clock
from infra.database.delivery import Group, Received
from infra.database.facts import EVENTS, NOTIFY, OUTBOX, Destinations, event_rows
from infra.database.parking import IS_PARKED, lock_orders, settled
from infra.database.pool import Connection, Pool, transaction
from schemas.codec import Codec
from schemas.messages import OrderEvent, PaymentEvent
from schemas.state import Order, OrderStatus


class OrderTransaction(Protocol):
    """One transaction under the order's lock. `settled`: the event was applied before, or waits behind its order's parked message."""

    settled: bool
    order: Order | None

    async def record(self, order: Order | None, events: Sequence[OrderEvent]) -> None:
        """Write what followed from the payment event, which is applied herewith; `order` is what it is afterwards."""
        ...


class OrderStore(Protocol):
    """Raises Unavailable while Postgres is away."""

    def transaction(self, received: Received, event: PaymentEvent) -> AbstractAsyncContextManager[OrderTransaction]:
        """Take the order's lock and load the order; committed at the end of the block, rolled back by an exception."""
        ...


_LOAD: Final = f"""
    SELECT coalesce((SELECT version FROM stream_positions WHERE group_name = %(group)s AND entity_id = %(payment_id)s), 0) >= %(version)s,
           {IS_PARKED},
           (SELECT to_jsonb(o) FROM orders o WHERE order_id = %(order_key)s)"""

_APPLIED: Final = """
    INSERT INTO stream_positions VALUES (%(group)s, %(payment_id)s, %(version)s)
    ON CONFLICT (group_name, entity_id) DO UPDATE SET version = excluded.version"""

_WRITE: Final = f"""
    WITH {OUTBOX}, {EVENTS},
    into_orders AS (
        INSERT INTO orders SELECT * FROM jsonb_populate_recordset(NULL::orders, %(orders)s::jsonb)
        ON CONFLICT (order_id) DO UPDATE SET status = excluded.status, payment_id = excluded.payment_id, amount_minor = excluded.amount_minor,
            currency = excluded.currency, version = excluded.version, updated_at = excluded.updated_at),
    into_positions AS ({_APPLIED})
    SELECT {NOTIFY}"""


class PostgresOrderStore:
    """OrderStore on Postgres."""

    def __init__(self, pool: Pool, codec: Codec, destinations: Destinations, clock: Clock) -> None:
        self._pool, self._codec, self._destinations, self._clock = pool, codec, destinations, clock

    @asynccontextmanager
    async def transaction(self, received: Received, event: PaymentEvent) -> AsyncIterator[_PostgresTransaction]:
        async with transaction(self._pool) as conn:
            await lock_orders(conn, Group.ORDERS, [event.order_id])
            tx = _PostgresTransaction(conn, self._codec, self._destinations, self._clock.now(), event)
            await tx.load(received)
            yield tx


class _PostgresTransaction:
    def __init__(self, conn: Connection, codec: Codec, destinations: Destinations, now: datetime, event: PaymentEvent) -> None:
        self._conn, self._codec, self._destinations, self._now, self._event = conn, codec, destinations, now, event
        self.settled = False
        self.order: Order | None = None

    async def load(self, received: Received) -> None:
        event = self._event
        parameters = {"group": Group.ORDERS, "order_key": event.order_id, "payment_id": event.payment_id, "version": event.version}
        row = await (await self._conn.execute(_LOAD, parameters)).fetchone()
        if row is None:
            raise RuntimeError("a SELECT without FROM gave no row")
        seen, parked, order = row
        self.order = _order(order) if order else None
        self.settled = await settled(self._conn, Group.ORDERS, received, event.event_id, self._now, seen=seen, parked=parked)

    async def record(self, order: Order | None, events: Sequence[OrderEvent]) -> None:
        applied: dict[str, Any] = {"group": Group.ORDERS, "payment_id": self._event.payment_id, "version": self._event.version}
        if not events:
            await self._conn.execute(_APPLIED, applied)
            return
        written = {"stream": "order", "order_id": self._event.order_id, "now": self._now, "orders": orjson.dumps([order]).decode()}
        await self._conn.execute(_WRITE, applied | written | event_rows(self._codec, self._destinations, events))


def _order(row: dict[str, Any]) -> Order:
    return Order(**row | {"status": OrderStatus(row["status"]), "updated_at": datetime.fromisoformat(row["updated_at"])})
