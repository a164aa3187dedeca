"""Where orders are kept: what the orders group reads and writes under its orders' locks.

Rule: a batch of events is one transaction: BEGIN, the locks of the batch's orders, one SELECT that loads them and how far their payments' events were
applied, one statement that writes all that follows, COMMIT. The group consumes events, so it remembers the last version of each payment instead of
each message.
Flow: processors/orders -> orders, events, outbox, stream_positions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Final, Protocol

import orjson

from infra.clock import Clock
from infra.database.delivery import Group, Received
from infra.database.facts import EVENTS, NOTIFY, OUTBOX, Destinations, said
from infra.database.parking import lock_orders, settled
from infra.database.pool import Connection, Pool, transaction
from schemas.codec import Codec
from schemas.messages import OrderEvent, PaymentEvent
from schemas.state import Order, OrderStatus


class OrderTransaction(Protocol):
    """A batch. `orders` are those of its events, by id, as far as they exist; what is recorded is written at the end of the block."""

    orders: dict[str, Order]

    async def settled(self, received: Received, event: PaymentEvent) -> bool:
        """Is nothing to be done for this event? It was applied before, or its order is parked: then it is parked behind, here."""
        ...

    def record(self, received: Received, event: PaymentEvent, order: Order | None, events: Sequence[OrderEvent]) -> None:
        """What followed from the payment event, which is applied herewith; `order` is what it is afterwards."""
        ...


class OrderStore(Protocol):
    """Raises Unavailable while Postgres is away."""

    def transaction(self, events: Collection[PaymentEvent]) -> AbstractAsyncContextManager[OrderTransaction]:
        """Take the locks of the events' orders and load them; committed at the end of the block, undone by an exception."""
        ...


_LOAD: Final = """
    SELECT (SELECT jsonb_object_agg(entity_id, version) FROM stream_positions
            WHERE group_name = %(group)s AND entity_id = ANY (%(payment_ids)s::text[])),
           (SELECT array_agg(order_key) FROM parked_orders WHERE group_name = %(group)s AND order_key = ANY (%(order_ids)s::text[])),
           (SELECT jsonb_agg(to_jsonb(o)) FROM orders o WHERE order_id = ANY (%(order_ids)s::text[]))"""

_WRITE: Final = f"""
    WITH {OUTBOX}, {EVENTS},
    into_orders AS (
        INSERT INTO orders SELECT * FROM jsonb_populate_recordset(NULL::orders, %(orders)s::jsonb)
        ON CONFLICT (order_id) DO UPDATE SET status = excluded.status, payment_id = excluded.payment_id, amount_minor = excluded.amount_minor,
            currency = excluded.currency, version = excluded.version, updated_at = excluded.updated_at),
    into_positions AS (
        INSERT INTO stream_positions SELECT %(group)s, key, value::bigint FROM jsonb_each_text(%(positions)s::jsonb)
        ON CONFLICT (group_name, entity_id) DO UPDATE SET version = excluded.version)
    SELECT CASE WHEN EXISTS (SELECT FROM said) THEN {NOTIFY} END"""


class PostgresOrderStore:
    """OrderStore on Postgres."""

    def __init__(self, pool: Pool, codec: Codec, destinations: Destinations, clock: Clock) -> None:
        self._pool, self._codec, self._destinations, self._clock = pool, codec, destinations, clock

    @asynccontextmanager
    async def transaction(self, events: Collection[PaymentEvent]) -> AsyncIterator[_PostgresTransaction]:
        order_ids = {event.order_id for event in events}
        async with transaction(self._pool) as conn:
            await lock_orders(conn, Group.ORDERS, order_ids)
            tx = _PostgresTransaction(conn, self._clock.now())
            await tx.load(list({event.payment_id for event in events}), list(order_ids))
            yield tx
            await tx.write(self._codec, self._destinations)


class _PostgresTransaction:
    def __init__(self, conn: Connection, now: datetime) -> None:
        self._conn, self._now = conn, now
        self._events: list[tuple[OrderEvent, bytes | None]] = []
        self._moved: dict[str, int] = {}
        self.orders: dict[str, Order] = {}

    async def load(self, payment_ids: Sequence[str], order_ids: Sequence[str]) -> None:
        parameters = {"group": Group.ORDERS, "payment_ids": payment_ids, "order_ids": order_ids}
        row = await (await self._conn.execute(_LOAD, parameters)).fetchone()
        if row is None:
            raise RuntimeError("a SELECT without FROM gave no row")
        positions, parked, orders = row
        self._positions: dict[str, int] = positions or {}
        self._parked = frozenset(parked or ())
        self.orders = {row["order_id"]: _order(row) for row in orders or ()}

    async def settled(self, received: Received, event: PaymentEvent) -> bool:
        seen, parked = self._positions.get(event.payment_id, 0) >= event.version, event.order_id in self._parked
        return await settled(self._conn, Group.ORDERS, received, event.event_id, self._now, seen=seen, parked=parked)

    def record(self, received: Received, event: PaymentEvent, order: Order | None, events: Sequence[OrderEvent]) -> None:
        self._moved[event.payment_id] = self._positions[event.payment_id] = event.version
        self._events += [(fact, received.traceparent) for fact in events]
        if order is not None:
            self.orders[event.order_id] = order

    async def write(self, codec: Codec, destinations: Destinations) -> None:
        if not self._moved:
            return
        changed = {event.order_id for event, _ in self._events}
        parameters: dict[str, Any] = {
            "group": Group.ORDERS,
            "stream": "order",
            "now": self._now,
            "said": said(codec, destinations, self._events),
            "orders": orjson.dumps([self.orders[order_id] for order_id in changed]).decode(),
            "positions": orjson.dumps(self._moved).decode(),
        }
        await self._conn.execute(_WRITE, parameters)


def _order(row: dict[str, Any]) -> Order:
    return Order(**row | {"status": OrderStatus(row["status"]), "updated_at": datetime.fromisoformat(row["updated_at"])})
