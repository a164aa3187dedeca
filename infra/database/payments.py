"""Where payments are kept: what the payments group reads and writes under an order's lock.

Rule: one transaction is BEGIN, the order's lock, one SELECT that loads all a decision needs, one statement that writes all that follows, COMMIT.
The lock comes in a statement of its own, because a statement sees the data as of its start. What only commands may set (who holds the order, which
attempt is open) is guarded by unique indexes; an observation clears these columns and never sets them, so that it is never refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Protocol

import orjson

from infra.clock import Clock
from infra.database.delivery import Group, Received
from infra.database.facts import EVENTS, NOTIFY, OUTBOX, Destinations, said
from infra.database.parking import IS_PARKED, lock_orders, settled
from infra.database.pool import Connection, Pool, connection, transaction
from schemas.codec import Codec
from schemas.decisions import Decision
from schemas.messages import BY_TYPE, Message, derived_id
from schemas.observations import Created
from schemas.state import Attempt, AttemptStatus, ChargeRequest, Failure, NextAction, Operation, Payment, PaymentStatus, Step

HOLDS_NO_ORDER: Final = frozenset({PaymentStatus.FAILED, PaymentStatus.CANCELLED})
ENDED: Final = frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.DECLINED, AttemptStatus.NOT_SENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayObject:
    """Whose a gateway's object is, and how the payment stood when this was asked."""

    order_id: str
    attempt: int
    payment: Payment


def carried_out(before: Payment | None, decision: Decision) -> set[str]:
    """The commands whose operations end with this decision, whoever caused it.

    After a crash a webhook may tell the outcome before the command comes again. The command must not be decided anew then: it would be refused, or
    ask for another charge.
    """
    asked = {attempt.number: attempt.operation for attempt in before.attempts} if before else {}
    return {
        operation.command_id
        for attempt in decision.attempts
        if (operation := asked.get(attempt.number)) and (attempt.operation is None or attempt.operation.command_id != operation.command_id)
    }


class PaymentTransaction(Protocol):
    """One transaction under the order's lock. `settled`: handled before, or waiting behind its order's parked message."""

    settled: bool
    payment: Payment | None
    order_held_by: str | None
    order_paid_by: str | None

    async def begin(self, payment: Payment | None, decision: Decision, *, consumed: bool) -> None:
        """Write what a command led to; `payment` is what it is afterwards. `consumed`: nothing is left to be done for this message."""
        ...

    async def record(self, payment: Payment, decision: Decision) -> None:
        """Write what was observed; the message is consumed, and so is the command whose operation has come to its end."""
        ...

    async def pass_on(self, message: Message) -> None:
        """Send the message on through the outbox, for another key; the one at hand is consumed."""
        ...


class PaymentStore(Protocol):
    """Raises Unavailable while Postgres is away."""

    def transaction(
        self, received: Received, message_id: str, payment_id: str, *, again: bool = False
    ) -> AbstractAsyncContextManager[PaymentTransaction]:
        """Take the order's lock and load the payment; committed at the end of the block, rolled back by an exception.

        `again`: the message is being handled already, so nobody asks any more whether it is settled.
        """
        ...

    async def remember(self, payment: Payment, number: int, created: Created) -> None:
        """Keep the gateway's object of an attempt, as soon as it is known. The same again changes nothing."""
        ...

    async def find_object(self, gateway: str, object_id: str) -> GatewayObject | None: ...

    async def fire_timers(self, now: datetime, limit: int = 100) -> int:
        """Turn due timers into commands in the outbox, once each. Returns how many."""
        ...

    async def oldest_unknown(self) -> datetime | None:
        """Since when the oldest attempt is UNKNOWN."""
        ...


_LOAD: Final = f"""
    SELECT EXISTS (SELECT FROM inbox WHERE group_name = %(group)s AND message_id = %(message_id)s),
           {IS_PARKED},
           (SELECT to_jsonb(p) FROM payments p WHERE payment_id = %(payment_id)s),
           (SELECT jsonb_agg(to_jsonb(a) ORDER BY number) FROM attempts a WHERE payment_id = %(payment_id)s),
           (SELECT payment_id::text FROM payments WHERE order_id = %(order_key)s AND holds_order),
           (SELECT min(payment_id::text) FROM payments WHERE order_id = %(order_key)s AND payment_id <> %(payment_id)s
              AND captured_minor > refunded_minor + pending_refund_minor)"""

_PAYMENT_COLUMNS: Final = "status, captured_minor, refunded_minor, pending_refund_minor, disputed_minor, transaction_id, failure, version, updated_at"
_ATTEMPT_COLUMNS: Final = (
    "status, request, operation, gateway_id, client_secret, next_action, supersedes, transaction_id, captured_minor, unknown_since, updated_at"
)


def _excluded(columns: str) -> str:
    return ", ".join(f"{column} = excluded.{column}" for column in columns.split(", "))


# The parts of the statement that writes, by what there is to be written. A part costs its start-up even where it has no rows.
_PARTS: Final = {
    "said": f"{OUTBOX}, {EVENTS}",
    "payments": f"""
    into_payments AS (
        INSERT INTO payments SELECT * FROM jsonb_populate_recordset(NULL::payments, %(payments)s::jsonb)
        ON CONFLICT (payment_id) DO UPDATE SET {_excluded(_PAYMENT_COLUMNS)},
            holds_order = excluded.holds_order AND (payments.holds_order OR %(asked)s))""",
    "attempts": f"""
    into_attempts AS (
        INSERT INTO attempts SELECT * FROM jsonb_populate_recordset(NULL::attempts, %(attempts)s::jsonb)
        ON CONFLICT (payment_id, number) DO UPDATE SET {_excluded(_ATTEMPT_COLUMNS)}, open = attempts.open AND excluded.open)""",
    "charges": """
    into_transactions AS (
        INSERT INTO transactions (payment_id, order_id, kind, gateway, gateway_id, amount_minor, currency, before_minor, after_minor, at)
        SELECT * FROM jsonb_to_recordset(%(charges)s::jsonb) AS c (payment_id uuid, order_id text, kind text, gateway text, gateway_id text,
            amount_minor bigint, currency text, before_minor bigint, after_minor bigint, at timestamptz)
        ON CONFLICT DO NOTHING)""",
    "timers": """
    into_timers AS (
        INSERT INTO timers SELECT * FROM jsonb_populate_recordset(NULL::timers, %(timers)s::jsonb)
        ON CONFLICT (timer_id) DO UPDATE SET due_at = excluded.due_at, attempt = excluded.attempt, correlation_id = excluded.correlation_id)""",
    "dropped": """
    out_of_timers AS (DELETE FROM timers WHERE timer_id = ANY (%(dropped)s::uuid[]))""",
    "done": """
    into_inbox AS (
        INSERT INTO inbox SELECT 'payments', done, %(now)s FROM unnest(%(done)s::uuid[]) AS done ON CONFLICT DO NOTHING),
    into_commands AS (
        UPDATE commands SET decided_at = %(now)s, outcome = %(outcome)s, refusal = %(refusal)s::jsonb
        WHERE command_id = ANY (%(done)s::uuid[]) AND decided_at IS NULL)""",
}


@lru_cache
def _write_statement(*parts: str) -> bytes:
    return f"WITH {', '.join(_PARTS[part] for part in parts)} SELECT {NOTIFY if 'said' in parts else 'NULL'}".encode()


_FIND: Final = """
    SELECT o.order_id, o.attempt, to_jsonb(p), (SELECT jsonb_agg(to_jsonb(a) ORDER BY number) FROM attempts a WHERE a.payment_id = p.payment_id)
    FROM gateway_objects o JOIN payments p USING (payment_id) WHERE o.gateway = %(gateway)s AND o.object_id = %(object_id)s"""

_REMEMBER: Final = """
    WITH kept AS (
        UPDATE attempts SET gateway_id = %(object_id)s, client_secret = coalesce(%(client_secret)s, client_secret)
        WHERE payment_id = %(payment_id)s AND number = %(number)s AND coalesce(gateway_id, %(object_id)s) = %(object_id)s)
    INSERT INTO gateway_objects VALUES (%(gateway)s, %(object_id)s, %(payment_id)s, %(order_id)s, %(number)s) ON CONFLICT DO NOTHING"""

_SAY: Final = f"WITH {OUTBOX} SELECT {NOTIFY}"

_DUE: Final = """
    DELETE FROM timers WHERE timer_id IN (SELECT timer_id FROM timers WHERE due_at <= %(now)s ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    RETURNING timer_id::text, order_id, payment_id::text, user_id, correlation_id, command_type, attempt, due_at"""


class PostgresPaymentStore:
    """PaymentStore on Postgres."""

    def __init__(self, pool: Pool, codec: Codec, destinations: Destinations, clock: Clock) -> None:
        self._pool, self._codec, self._destinations, self._clock = pool, codec, destinations, clock

    @asynccontextmanager
    async def transaction(self, received: Received, message_id: str, payment_id: str, *, again: bool = False) -> AsyncIterator[_PostgresTransaction]:
        async with transaction(self._pool) as conn:
            order_key = received.order_key or ""
            await lock_orders(conn, Group.PAYMENTS, [order_key])
            tx = _PostgresTransaction(conn, self._codec, self._destinations, self._clock.now(), received, message_id)
            await tx.load(payment_id, order_key, again)
            yield tx

    async def remember(self, payment: Payment, number: int, created: Created) -> None:
        row = {
            "payment_id": payment.payment_id,
            "order_id": payment.order_id,
            "number": number,
            "gateway": payment.attempts[number - 1].gateway,
            "object_id": created.gateway_id,
            "client_secret": created.client_secret,
        }
        async with connection(self._pool) as conn:
            await conn.execute(_REMEMBER, row)

    async def find_object(self, gateway: str, object_id: str) -> GatewayObject | None:
        async with connection(self._pool) as conn:
            row = await (await conn.execute(_FIND, {"gateway": gateway, "object_id": object_id})).fetchone()
        return None if row is None else GatewayObject(order_id=row[0], attempt=row[1], payment=_payment(row[2], row[3]))

    async def fire_timers(self, now: datetime, limit: int = 100) -> int:
        async with transaction(self._pool) as conn:
            rows = await (await conn.execute(_DUE, {"now": now, "limit": limit})).fetchall()
            commands = [command_of(row, now) for row in rows]
            if commands:
                await conn.execute(_SAY, {"now": now, "said": said(self._codec, self._destinations, [(command, None) for command in commands])})
        return len(commands)

    async def oldest_unknown(self) -> datetime | None:
        async with connection(self._pool) as conn:
            row = await (await conn.execute("SELECT min(unknown_since) FROM attempts WHERE unknown_since IS NOT NULL")).fetchone()
        return row[0] if row else None


class _PostgresTransaction:
    def __init__(self, conn: Connection, codec: Codec, destinations: Destinations, now: datetime, received: Received, message_id: str) -> None:
        self._conn, self._codec, self._destinations, self._now = conn, codec, destinations, now
        self._received, self._message_id = received, message_id
        self.settled = False
        self.payment: Payment | None = None
        self.order_held_by: str | None = None
        self.order_paid_by: str | None = None

    async def load(self, payment_id: str, order_key: str, again: bool) -> None:
        parameters = {"group": Group.PAYMENTS, "message_id": self._message_id, "order_key": order_key, "payment_id": payment_id}
        cursor = await self._conn.execute(_LOAD, parameters)
        row = await cursor.fetchone()
        if row is None:
            raise RuntimeError("a SELECT without FROM gave no row")
        seen, parked, payment, attempts, self.order_held_by, self.order_paid_by = row
        self.payment = _payment(payment, attempts) if payment else None
        if not again:
            self.settled = await settled(self._conn, Group.PAYMENTS, self._received, self._message_id, self._now, seen=seen, parked=parked)

    async def begin(self, payment: Payment | None, decision: Decision, *, consumed: bool) -> None:
        await self._write(payment, decision, asked=True, consumed=consumed)

    async def record(self, payment: Payment, decision: Decision) -> None:
        await self._write(payment, decision, asked=False, consumed=True)

    async def pass_on(self, message: Message) -> None:
        await self._conn.execute(_SAY, {"now": self._now, "said": said(self._codec, self._destinations, [(message, self._received.traceparent)])})

    async def _write(self, payment: Payment | None, decision: Decision, *, asked: bool, consumed: bool) -> None:
        refusal = decision.refusal
        rows: dict[str, Sequence[Any]] = {
            "said": decision.events,
            "payments": [_payment_row(payment)] if payment and (decision.events or self.payment is None) else [],
            "attempts": [_attempt_row(payment, attempt, asked) for attempt in decision.attempts] if payment else [],
            "charges": self._charges(payment, decision) if payment else [],
            "timers": self._timers(payment, decision) if payment else [],
            "dropped": decision.dropped_timers,
            "done": [*carried_out(self.payment, decision) | ({self._message_id} if consumed else set())],
        }
        parts = [part for part in _PARTS if rows[part]]
        if not parts:
            return
        parameters: dict[str, Any] = {
            **{part: _json(rows[part]) for part in parts if part not in ("said", "dropped", "done")},
            "said": said(self._codec, self._destinations, [(event, self._received.traceparent) for event in decision.events]),
            "dropped": list(rows["dropped"]),
            "done": rows["done"],
            "stream": "payment",
            "now": self._now,
            "asked": asked,
            "outcome": "refused" if refusal else "applied",
            "refusal": _json(asdict(refusal)) if refusal else None,
        }
        await self._conn.execute(_write_statement(*parts), parameters)

    def _charges(self, payment: Payment, decision: Decision) -> list[dict[str, Any]]:
        """A row of the audit log for each attempt whose money has just been seen to move."""
        booked = {attempt.number: attempt.captured_minor for attempt in self.payment.attempts} if self.payment else {}
        before = self.payment.captured_minor if self.payment else 0
        return [
            {
                "payment_id": payment.payment_id,
                "order_id": payment.order_id,
                "kind": "charge",
                "gateway": attempt.gateway,
                "gateway_id": attempt.transaction_id,
                "amount_minor": attempt.captured_minor,
                "currency": payment.currency,
                "before_minor": before,
                "after_minor": payment.captured_minor,
                "at": self._now,
            }
            for attempt in decision.attempts
            if attempt.captured_minor and not booked.get(attempt.number)
        ]

    def _timers(self, payment: Payment, decision: Decision) -> list[dict[str, Any]]:
        correlation_id = decision.events[-1].correlation_id if decision.events else self._message_id
        return [
            {
                "timer_id": timer.timer_id,
                "order_id": payment.order_id,
                "payment_id": payment.payment_id,
                "user_id": payment.user_id,
                "correlation_id": correlation_id,
                "command_type": timer.command.event_type,
                "attempt": timer.attempt,
                "due_at": timer.due_at,
            }
            for timer in decision.timers
        ]


# ── Rows and values ──


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _payment_row(payment: Payment) -> dict[str, Any]:
    return {
        "payment_id": payment.payment_id,
        "order_id": payment.order_id,
        "user_id": payment.user_id,
        "status": payment.status,
        "amount_minor": payment.amount_minor,
        "currency": payment.currency,
        "gateway": payment.gateway,
        "capture_method": payment.capture_method,
        "captured_minor": payment.captured_minor,
        "refunded_minor": payment.refunded_minor,
        "pending_refund_minor": payment.pending_refund_minor,
        "disputed_minor": payment.disputed_minor,
        "transaction_id": payment.transaction_id,
        "failure": asdict(payment.failure) if payment.failure else None,
        "version": payment.version,
        "holds_order": payment.status not in HOLDS_NO_ORDER,
        "created_at": payment.created_at,
        "updated_at": payment.updated_at,
    }


def _payment(row: dict[str, Any], attempts: Sequence[dict[str, Any]] | None) -> Payment:
    return Payment(
        payment_id=row["payment_id"],
        order_id=row["order_id"],
        user_id=row["user_id"],
        status=PaymentStatus(row["status"]),
        amount_minor=row["amount_minor"],
        currency=row["currency"],
        gateway=row["gateway"],
        capture_method=row["capture_method"],
        captured_minor=row["captured_minor"],
        refunded_minor=row["refunded_minor"],
        pending_refund_minor=row["pending_refund_minor"],
        disputed_minor=row["disputed_minor"],
        transaction_id=row["transaction_id"],
        failure=Failure(**row["failure"]) if row["failure"] else None,
        version=row["version"],
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
        attempts=tuple(_attempt(attempt) for attempt in attempts or ()),
    )


def _attempt_row(payment: Payment, attempt: Attempt, asked: bool) -> dict[str, Any]:
    operation = attempt.operation
    in_doubt = operation is not None and operation.doubt is AttemptStatus.UNKNOWN
    ended = operation is None and attempt.status in ENDED
    return {
        "payment_id": payment.payment_id,
        "number": attempt.number,
        "status": attempt.status,
        "gateway": attempt.gateway,
        "request": asdict(attempt.request),
        "operation": asdict(operation) if operation else None,
        "gateway_id": attempt.gateway_id,
        "client_secret": attempt.client_secret,
        "next_action": asdict(attempt.next_action) if attempt.next_action else None,
        "supersedes": attempt.supersedes,
        "transaction_id": attempt.transaction_id,
        "captured_minor": attempt.captured_minor,
        "unknown_since": operation.doubt_since if operation and in_doubt else None,
        "open": asked and not ended,
        "started_at": attempt.started_at,
        "updated_at": attempt.updated_at,
    }


def _attempt(row: dict[str, Any]) -> Attempt:
    return Attempt(
        number=row["number"],
        status=AttemptStatus(row["status"]),
        gateway=row["gateway"],
        request=ChargeRequest(**row["request"]),
        operation=_operation(row["operation"]) if row["operation"] else None,
        gateway_id=row["gateway_id"],
        client_secret=row["client_secret"],
        next_action=NextAction(**row["next_action"]) if row["next_action"] else None,
        supersedes=row["supersedes"],
        transaction_id=row["transaction_id"],
        captured_minor=row["captured_minor"],
        started_at=datetime.fromisoformat(row["started_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
    )


def _operation(row: dict[str, Any]) -> Operation:
    doubt, since = row["doubt"], row["doubt_since"]
    return Operation(
        **row
        | {
            "step": Step(row["step"]),
            "asked_at": datetime.fromisoformat(row["asked_at"]),
            "doubt": AttemptStatus(doubt) if doubt else None,
            "doubt_since": datetime.fromisoformat(since) if since else None,
        }
    )


def command_of(row: Sequence[Any], now: datetime) -> Message:
    """The command that a due timer gives: the same row always gives the same command id."""
    timer_id, order_id, payment_id, user_id, correlation_id, command_type, attempt, due_at = row
    fields: dict[str, Any] = {"attempt": attempt} if attempt is not None else {}
    return BY_TYPE[command_type](
        event_id=derived_id(timer_id, due_at.isoformat()),
        order_id=order_id,
        payment_id=payment_id,
        user_id=user_id,
        occurred_at=now,
        correlation_id=correlation_id,
        **fields,
    )
