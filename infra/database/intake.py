"""What the intake writes: who owns an order, and every command that was accepted.

Rule: a command is here before it is on Kafka, under an id made from principal, route and key. So a repeat finds it, whatever became of Redis.
Flow: api/intake -> `accept` (one statement, its own transaction) -> the bytes go to `payment-commands` -> processors/payments decides, and says so in
`commands`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg.rows import class_row, tuple_row

from infra.database.pool import Pool, connection
from schemas.errors import PaystreamError, Unavailable


class OrderNotTheirs(PaystreamError):
    """Another principal owns this order id."""


class TooManyUndecided(PaystreamError):
    """As many commands of this order as may wait are waiting already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCommand:
    """A command to accept. `value` is its encoded message; `answered_status` is set where the first answer is known beforehand."""

    command_id: UUID
    principal: str
    route: str
    fingerprint: str
    order_id: str
    payment_id: UUID
    command_type: str
    value: bytes
    accepted_at: datetime
    answered_status: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an accepted command stands, and the payment that it is about (PENDING until it is opened).

    `settled`: it is refused, or carried out and no answer of the gateway is outstanding. `refusal`: {code, message} if it was refused.
    """

    fingerprint: str
    order_id: str
    payment_id: UUID
    value: bytes
    decided: bool
    settled: bool
    refusal: dict[str, str] | None
    answered_status: int | None
    payment_status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """`repeat` is how the command stood when it was known already; None if it is new."""

    repeat: Standing | None
    payment_status: str

    @classmethod
    def before(cls, known: Standing) -> Accepted:
        return cls(repeat=known, payment_status=known.payment_status)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A payment that a command may be about. `attempt` is the number of the attempt that a command given now would use."""

    order_id: str
    owner: str
    attempt: int


# One statement, so one round trip: each further one would cost the intake as much CPU as this. Statements that meet see each other by the primary
# keys, but not by the count: a burst may pass the limit by as many commands as there are connections.
_ACCEPT: Final = """
WITH known AS (
    SELECT 1 FROM commands WHERE command_id = %(command_id)s
), owner AS (
    INSERT INTO order_owners (order_id, user_id)
    SELECT %(order_id)s, %(principal)s WHERE NOT EXISTS (SELECT FROM known)
    ON CONFLICT (order_id) DO UPDATE SET user_id = order_owners.user_id
    RETURNING user_id
), added AS (
    INSERT INTO commands (
        command_id, principal, route, fingerprint, order_id, payment_id, command_type, value, accepted_at, answered_status
    )
    SELECT
        %(command_id)s, %(principal)s, %(route)s, %(fingerprint)s, %(order_id)s, %(payment_id)s,
        %(command_type)s, %(value)s, %(accepted_at)s, %(answered_status)s
    FROM owner
    WHERE user_id = %(principal)s
      AND (SELECT count(*) FROM commands WHERE order_id = %(order_id)s AND decided_at IS NULL) < %(max_undecided)s
    ON CONFLICT (command_id) DO NOTHING
    RETURNING 1
)
SELECT
    EXISTS (SELECT FROM added),
    (SELECT user_id FROM owner),
    coalesce((SELECT status FROM payments WHERE payment_id = %(payment_id)s), 'PENDING')
"""

_FIND: Final = """
SELECT
    c.fingerprint, c.order_id, c.payment_id, c.value, c.refusal, c.answered_status,
    c.decided_at IS NOT NULL AS decided,
    coalesce(p.status, 'PENDING') AS payment_status,
    c.decided_at IS NOT NULL AND (c.outcome = 'refused' OR p.status <> 'PROCESSING' AND (
        SELECT a.operation IS NULL FROM attempts a WHERE a.payment_id = c.payment_id ORDER BY a.number DESC LIMIT 1
    )) AS settled
FROM commands c LEFT JOIN payments p ON p.payment_id = c.payment_id
WHERE c.command_id = %s
"""

# The command that opens a payment has the payment's id. After a failure the next charge is another attempt.
_TARGET: Final = """
SELECT
    c.order_id, c.principal AS owner,
    coalesce((SELECT max(number) FROM attempts WHERE payment_id = c.payment_id), 1)
        + CASE WHEN p.status = 'FAILED' THEN 1 ELSE 0 END AS attempt
FROM commands c LEFT JOIN payments p ON p.payment_id = c.payment_id
WHERE c.command_id = %s AND c.payment_id = c.command_id AND (p.payment_id IS NOT NULL OR c.outcome IS DISTINCT FROM 'refused')
"""


class IntakeStore:
    """Raises Unavailable while Postgres is away."""

    def __init__(self, pool: Pool, *, max_undecided: int) -> None:
        self._pool = pool
        self._max_undecided = max_undecided

    async def accept(self, command: NewCommand) -> Accepted:
        """Keep the command, or find it kept. The first principal that uses an order id owns it.

        Raises OrderNotTheirs and TooManyUndecided; a command that is known already is past both.
        """
        values: dict[str, Any] = {name: getattr(command, name) for name in NewCommand.__slots__}
        values["max_undecided"] = self._max_undecided
        async with connection(self._pool) as conn, conn.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute(_ACCEPT, values)
            row = await cursor.fetchone()
        if row is None:
            raise AssertionError("a SELECT without FROM gives a row")
        added, owner, payment_status = row
        if added:
            return Accepted(repeat=None, payment_status=payment_status)
        known = await self.find(command.command_id)
        if known is not None:
            return Accepted.before(known)
        if owner != command.principal:
            raise OrderNotTheirs
        raise TooManyUndecided

    async def find(self, command_id: UUID) -> Standing | None:
        """How the command stands now, None if it was never accepted."""
        async with connection(self._pool) as conn, conn.cursor(row_factory=class_row(Standing)) as cursor:
            await cursor.execute(_FIND, (command_id,))
            return await cursor.fetchone()

    async def target(self, payment_id: UUID) -> Target | None:
        """The payment that a command names, opened or about to be. None if it is neither."""
        async with connection(self._pool) as conn, conn.cursor(row_factory=class_row(Target)) as cursor:
            await cursor.execute(_TARGET, (payment_id,))
            return await cursor.fetchone()

    async def answered(self, command_id: UUID, status: int) -> None:
        """Keep the status of the first answer, which every repeat gets again."""
        async with connection(self._pool) as conn:
            await conn.execute("UPDATE commands SET answered_status = %s WHERE command_id = %s AND answered_status IS NULL", (status, command_id))

    async def answers(self) -> bool:
        """Whether Postgres is there."""
        try:
            async with connection(self._pool) as conn:
                await conn.execute("SELECT 1")
        except Unavailable:
            return False
        return True
