"""Where analytics keeps its views, and how far it has folded: a batch of events is one transaction.

Rule: a transaction is BEGIN, the locks of the batch's orders, one SELECT that loads all rows the batch is about, one statement that writes all that
changed, COMMIT. Nothing else writes these tables, and all of them can be thrown away: `payment-events` is kept for ever.
Flow: processors/analytics -> analytics.*, stream_positions -> reads.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

import orjson

from infra.clock import Clock
from infra.database.delivery import Group, Received
from infra.database.parking import lock_orders, settled
from infra.database.pool import Connection, Pool, transaction
from infra.database.tables import analytics_attempts, analytics_payments, metadata
from schemas.messages import PaymentEvent
from schemas.views import AttemptRow, PaymentRow, Views

_LOAD: Final = """
    SELECT (SELECT jsonb_object_agg(entity_id, version) FROM stream_positions
            WHERE group_name = %(group)s AND entity_id = ANY (%(payment_ids)s::text[])),
           (SELECT array_agg(order_key) FROM parked_orders WHERE group_name = %(group)s AND order_key = ANY (%(order_ids)s::text[])),
           (SELECT jsonb_agg(to_jsonb(p)) FROM analytics.payments p WHERE payment_id = ANY (%(payment_ids)s::uuid[])),
           (SELECT jsonb_agg(to_jsonb(a)) FROM analytics.attempts a WHERE payment_id = ANY (%(payment_ids)s::uuid[]))"""


def _upsert(table: Any, parameter: str) -> str:
    """INSERT … ON CONFLICT for rows that come as one JSON array of objects."""
    key = [column.name for column in table.primary_key]
    others = [column.name for column in table.columns if column.name not in key]
    return f"""
        INSERT INTO {table.fullname} SELECT * FROM jsonb_populate_recordset(NULL::{table.fullname}, %({parameter})s::jsonb)
        ON CONFLICT ({", ".join(key)}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in others)}"""


_WRITE: Final = f"""
    WITH into_payments AS ({_upsert(analytics_payments, "payments")}),
    into_attempts AS ({_upsert(analytics_attempts, "attempts")})
    INSERT INTO stream_positions SELECT %(group)s, u.* FROM unnest(%(entity_ids)s::text[], %(versions)s::bigint[]) AS u
    ON CONFLICT (group_name, entity_id) DO UPDATE SET version = excluded.version"""

_VIEWS: Final = ", ".join(table.fullname for table in metadata.sorted_tables if table.schema == "analytics")

# What the group parked is met on `payment-events` again. If its orders stayed parked, their first events would queue up behind it.
_FORGET: Final = """
    WITH positions AS (DELETE FROM stream_positions WHERE group_name = %(group)s),
    messages AS (DELETE FROM parked_messages WHERE group_name = %(group)s),
    orders AS (DELETE FROM parked_orders WHERE group_name = %(group)s),
    marks AS (DELETE FROM inbox WHERE group_name = %(group)s)
    INSERT INTO audit_log (at, actor, action, subject) VALUES (%(now)s, %(actor)s, 'rebuild', %(group)s)"""


class AnalyticsStore:
    """Raises Unavailable while Postgres is away."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock

    @asynccontextmanager
    async def transaction(self, events: Collection[PaymentEvent]) -> AsyncIterator[AnalyticsTransaction]:
        """Take the locks of the events' orders and load the rows of their payments; committed at the end of the block, undone by an exception."""
        order_ids = {event.order_id for event in events}
        async with transaction(self._pool) as conn:
            await lock_orders(conn, Group.ANALYTICS, order_ids)
            tx = AnalyticsTransaction(conn, self._clock.now())
            await tx.load(list({event.payment_id for event in events}), list(order_ids))
            yield tx

    async def rebuild(self, actor: str) -> None:
        """Throw the views away, and what was parked on the way to them: reading `payment-events` from its beginning makes the same ones again.

        No analytics worker may run, and the group's offsets have to be set to the beginning first: whoever goes on in the middle meets a gap.
        """
        async with transaction(self._pool) as conn:
            await conn.execute(f"TRUNCATE {_VIEWS}")
            await conn.execute(_FORGET, {"group": Group.ANALYTICS, "now": self._clock.now(), "actor": actor})


class AnalyticsTransaction:
    """One batch. The caller folds into `views`, moves `positions` (the version last applied, by payment) along, and writes once."""

    def __init__(self, conn: Connection, now: datetime) -> None:
        self._conn, self._now = conn, now
        self.views = Views()
        self.positions: dict[str, int] = {}

    async def load(self, payment_ids: Sequence[str], order_ids: Sequence[str]) -> None:
        parameters = {"group": Group.ANALYTICS, "payment_ids": payment_ids, "order_ids": order_ids}
        row = await (await self._conn.execute(_LOAD, parameters)).fetchone()
        if row is None:
            raise RuntimeError("a SELECT without FROM gave no row")
        positions, parked, payments, attempts = row
        self._parked = frozenset(parked or ())
        self._positions_before: dict[str, int] = positions or {}
        self._payments_before = {row["payment_id"]: _payment(row) for row in payments or ()}
        self._attempts_before = {(row["payment_id"], row["attempt"]): _attempt(row) for row in attempts or ()}
        self.positions = dict(self._positions_before)
        self.views = Views(payments=dict(self._payments_before), attempts=dict(self._attempts_before))

    async def settled(self, received: Received, event: PaymentEvent) -> bool:
        """Is nothing to be done for this event? It was applied before, or its order is parked: then it is parked behind, here."""
        seen, parked = self.positions.get(event.payment_id, 0) >= event.version, event.order_id in self._parked
        return await settled(self._conn, Group.ANALYTICS, received, event.event_id, self._now, seen=seen, parked=parked)

    async def write(self) -> None:
        """Write the rows and positions that are not as they were loaded."""
        moved = {payment_id: version for payment_id, version in self.positions.items() if self._positions_before.get(payment_id) != version}
        if not moved:
            return
        payments = [row for key, row in self.views.payments.items() if self._payments_before.get(key) is not row]
        attempts = [row for key, row in self.views.attempts.items() if self._attempts_before.get(key) is not row]
        parameters = {
            "payments": orjson.dumps(payments).decode(),
            "attempts": orjson.dumps(attempts).decode(),
            "group": Group.ANALYTICS,
            "entity_ids": list(moved),
            "versions": list(moved.values()),
        }
        await self._conn.execute(_WRITE, parameters)


def _payment(row: dict[str, Any]) -> PaymentRow:
    ended_at = row["ended_at"]
    times = {"initiated_at": datetime.fromisoformat(row["initiated_at"]), "ended_at": datetime.fromisoformat(ended_at) if ended_at else None}
    return PaymentRow(**row | times)


def _attempt(row: dict[str, Any]) -> AttemptRow:
    return AttemptRow(**row | {"at": datetime.fromisoformat(row["at"])})
