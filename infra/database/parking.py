"""Where messages wait that can't be handled, and where a group's halt is kept.

Rule: parking is one transaction: the message with its bytes intact, its order, its inbox mark and the copy for the dead-letter topic. A parked
message parks its order for that group; what follows is parked behind it, in order. Webhooks and messages without a key block nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final

import orjson

from infra.clock import Clock
from infra.database.delivery import Disposition, Fault, Group, Received
from infra.database.facts import NOTIFY, headers_json
from infra.database.pool import Connection, Pool, connection, transaction

DEAD_LETTERS: Final = "payment-events-dlq"
WEBHOOKS: Final = "payment-webhook-received"

_LOCK: Final = """
    SELECT pg_advisory_xact_lock(hashtext(%(group)s), h)
    FROM (SELECT DISTINCT hashtext(k) AS h FROM jsonb_array_elements_text(%(order_keys)s::jsonb) AS k ORDER BY h) AS sorted"""

IS_PARKED: Final = "EXISTS (SELECT FROM parked_orders WHERE group_name = %(group)s AND order_key = %(order_key)s)"
"""Whether the order waits behind a parked message: a column of the SELECT with which a group's transaction begins."""

_BEHIND: Final = Fault(disposition=Disposition.BLOCKED, error_class="Blocked", message="behind a parked message of its order")

_PARK: Final = f"""
    WITH parked AS (
        INSERT INTO parked_messages (group_name, order_key, topic, partition, "offset", timestamp_ms, key, value, headers, message_id, disposition,
                                     error_class, error_message, stack, first_failed_at, last_failed_at)
        VALUES (%(group)s, %(order_key)s, %(topic)s, %(partition)s, %(offset)s, %(timestamp_ms)s, %(key)s, %(value)s, %(headers)s::jsonb,
                %(message_id)s, %(disposition)s, %(error_class)s, %(error_message)s, %(stack)s, %(now)s, %(now)s)
        ON CONFLICT ON CONSTRAINT uq_parked_messages_place DO NOTHING
        RETURNING id),
    into_parked_orders AS (
        INSERT INTO parked_orders SELECT %(group)s, %(order_key)s, %(now)s FROM parked WHERE %(blocks)s ON CONFLICT DO NOTHING),
    into_inbox AS (
        INSERT INTO inbox SELECT %(group)s, %(message_id)s::uuid, %(now)s FROM parked WHERE %(message_id)s::uuid IS NOT NULL ON CONFLICT DO NOTHING),
    into_outbox AS (
        INSERT INTO outbox (topics, key, value, headers, timestamp_ms, created_at)
        SELECT ARRAY[%(dead_letters)s], %(key)s, %(value)s, %(headers)s::jsonb || %(dlq_headers)s::jsonb, %(timestamp_ms)s, %(now)s FROM parked)
    SELECT {NOTIFY} FROM parked"""

_HALT_AFTER: Final = """
    WITH bugs AS (
        SELECT count(*) AS n FROM parked_messages
        WHERE group_name = %(group)s AND disposition = 'bug' AND last_failed_at > greatest(%(since)s,
              (SELECT resumed_at FROM group_halts WHERE group_name = %(group)s)))
    INSERT INTO group_halts (group_name, halted_at, reason)
    SELECT %(group)s, %(now)s, format('%%s bugs within %%s seconds', n, %(seconds)s) FROM bugs WHERE n >= %(limit)s
    ON CONFLICT (group_name) DO UPDATE SET
        reason = CASE WHEN group_halts.halted_at IS NULL THEN excluded.reason ELSE group_halts.reason END,
        halted_at = coalesce(group_halts.halted_at, excluded.halted_at)
    RETURNING reason"""


async def lock_orders(conn: Connection, group: Group, order_keys: Iterable[str]) -> None:
    """Take the orders' locks for a group until the transaction ends. No rows, no clean-up; orders that share a hash only wait for each other.

    In a statement of its own: what is read after it is as of after it. Several are taken in one order, so that nobody waits in a circle.
    """
    await conn.execute(_LOCK, {"group": group, "order_keys": orjson.dumps(list(order_keys)).decode()})


async def settled(conn: Connection, group: Group, received: Received, message_id: str, now: datetime, *, seen: bool, parked: bool) -> bool:
    """Is nothing to be done for this message? It was handled before (`seen`), or its order is `parked`: then it is parked behind, here."""
    if parked and not seen:
        await park_in(conn, group, received, message_id, _BEHIND, now)
    return seen or parked


async def park_in(conn: Connection, group: Group, received: Received, message_id: str | None, fault: Fault, now: datetime) -> None:
    """Park a message in the transaction of `conn`, which holds the order's lock."""
    order_key = received.order_key
    row: dict[str, Any] = {
        "group": group,
        "order_key": order_key,
        "topic": received.topic,
        "partition": received.partition,
        "offset": received.offset,
        "timestamp_ms": received.timestamp_ms,
        "key": received.key,
        "value": received.value,
        "headers": headers_json(received.headers),
        "message_id": message_id,
        "disposition": fault.disposition,
        "error_class": fault.error_class,
        "error_message": fault.message,
        "stack": fault.stack,
        "now": now,
        "blocks": order_key is not None and received.topic != WEBHOOKS and fault.disposition is not Disposition.BLOCKED,
        "dead_letters": DEAD_LETTERS,
        "dlq_headers": headers_json(_dead_letter_headers(group, received, fault, now)),
    }
    await conn.execute(_PARK, row)


def _dead_letter_headers(group: Group, received: Received, fault: Fault, now: datetime) -> list[tuple[str, bytes]]:
    """What the copy says of its original, as text."""
    said = {
        "group": group,
        "topic": received.topic,
        "partition": received.partition,
        "offset": received.offset,
        "timestamp": received.timestamp_ms if received.timestamp_ms is not None else "",
        "disposition": fault.disposition,
        "error-class": fault.error_class,
        "error-message": fault.message,
        "failed-at": now.isoformat(),
        "attempts": 1,
    }
    return [(f"paystream-dlq-{name}", str(value).encode()) for name, value in said.items()]


class PostgresParking:
    """Parking on Postgres."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock

    async def park(self, group: Group, received: Received, message_id: str | None, fault: Fault) -> None:
        async with transaction(self._pool) as conn:
            await lock_orders(conn, group, [received.order_key or ""])
            await park_in(conn, group, received, message_id, fault, self._clock.now())

    async def halt_after(self, group: Group, bugs: int, within: timedelta) -> str | None:
        now = self._clock.now()
        parameters = {"group": group, "since": now - within, "now": now, "seconds": int(within.total_seconds()), "limit": bugs}
        async with connection(self._pool) as conn:
            row = await (await conn.execute(_HALT_AFTER, parameters)).fetchone()
        return row[0] if row else None

    async def halted(self, group: Group) -> str | None:
        async with connection(self._pool) as conn:
            cursor = await conn.execute("SELECT reason FROM group_halts WHERE group_name = %s AND halted_at IS NOT NULL", (group,))
            row = await cursor.fetchone()
        return row[0] if row else None

    async def resume(self, group: Group, actor: str) -> bool:
        async with transaction(self._pool) as conn:
            cursor = await conn.execute(
                "UPDATE group_halts SET halted_at = NULL, resumed_at = %(now)s "
                "WHERE group_name = %(group)s AND halted_at IS NOT NULL RETURNING reason",
                {"now": self._clock.now(), "group": group},
            )
            row = await cursor.fetchone()
            if row is None:
                return False
            await conn.execute(
                "INSERT INTO audit_log (at, actor, action, subject, detail) "
                "VALUES (%s, %s, 'resume', %s, jsonb_build_object('halted_for', %s::text))",
                (self._clock.now(), actor, group, row[0]),
            )
        return True

    async def forget(self, before: datetime) -> int:
        """Forget messages that were handled before then: no topic and no dead letter can bring them again. Returns how many."""
        async with connection(self._pool) as conn:
            return (await conn.execute("DELETE FROM inbox WHERE at < %s", (before,))).rowcount

    async def parked_counts(self) -> dict[tuple[str, str], int]:
        async with connection(self._pool) as conn:
            cursor = await conn.execute("SELECT group_name, disposition, count(*) FROM parked_messages GROUP BY 1, 2")
            return {(group, disposition): count for group, disposition, count in await cursor.fetchall()}
