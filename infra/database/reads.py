"""What callers ask for: payments, their timelines and commands.

Rule: nothing is written here, and nothing decided: whoever asks is checked by the caller, by the `user_id` that each answer carries.
Flow: api/routes -> Reads -> the tables of the intake and the payments group. A payment that is accepted and not opened yet is read from its
InitiatePayment in `commands`, as PENDING.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    LargeBinary,
    Select,
    Text,
    bindparam,
    cast,
    literal,
    null,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from infra.database.pool import Pool
from infra.database.statements import fetched
from infra.database.tables import attempts, commands, events, payments
from schemas.codec import Codec
from schemas.messages import InitiatePayment, Message
from schemas.state import PaymentStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentView:
    """A payment as its owner reads it. Amounts in minor units. `client_secret` and `next_action` are for the owner only."""

    payment_id: str
    order_id: str
    user_id: str
    status: str
    amount_minor: int
    captured_minor: int
    refunded_minor: int
    currency: str
    gateway: str
    transaction_id: str | None
    failure: dict[str, str] | None
    next_action: dict[str, str | None] | None
    version: int
    created_at: datetime
    updated_at: datetime
    client_secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """One event of a payment's timeline. `partition` and `offset` are None until it is on Kafka; `data` are the fields of its type."""

    event_id: str
    event_type: str
    version: int
    occurred_at: datetime
    topic: str
    partition: int | None
    offset: int | None
    published_at: datetime | None
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandView:
    """A command and what became of it: accepted (nothing yet), applied or refused."""

    command_id: str
    command_type: str
    user_id: str
    order_id: str
    payment_id: str
    status: str
    refusal: dict[str, str] | None
    accepted_at: datetime
    decided_at: datetime | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page ended: the next one begins behind it."""

    created_at: datetime
    payment_id: UUID


_attempt = (
    select(attempts.c.client_secret, attempts.c.next_action)
    .where(attempts.c.payment_id == payments.c.payment_id)
    .order_by(attempts.c.number.desc())
    .limit(1)
    .lateral("attempt")
)
_OPENED: Final = select(
    payments.c.payment_id,
    payments.c.order_id,
    payments.c.user_id,
    payments.c.status,
    payments.c.amount_minor,
    payments.c.captured_minor,
    payments.c.refunded_minor,
    payments.c.currency,
    payments.c.gateway,
    payments.c.transaction_id,
    payments.c.failure,
    payments.c.version,
    payments.c.created_at,
    payments.c.updated_at,
    _attempt.c.client_secret,
    _attempt.c.next_action,
    cast(null(), LargeBinary).label("opening"),
).select_from(payments.outerjoin(_attempt, true()))

_NOT_OPENED_YET: Final = select(
    commands.c.payment_id,
    commands.c.order_id,
    commands.c.principal.label("user_id"),
    literal(PaymentStatus.PENDING.value).label("status"),
    cast(null(), BigInteger).label("amount_minor"),
    cast(0, BigInteger).label("captured_minor"),
    cast(0, BigInteger).label("refunded_minor"),
    cast(null(), Text).label("currency"),
    cast(null(), Text).label("gateway"),
    cast(null(), Text).label("transaction_id"),
    cast(null(), JSONB).label("failure"),
    cast(0, BigInteger).label("version"),
    commands.c.accepted_at.label("created_at"),
    commands.c.accepted_at.label("updated_at"),
    cast(null(), Text).label("client_secret"),
    cast(null(), JSONB).label("next_action"),
    commands.c.value.label("opening"),
).where(
    commands.c.command_type == InitiatePayment.event_type,
    commands.c.decided_at.is_(None),
    ~select(payments.c.payment_id).where(payments.c.payment_id == commands.c.payment_id).exists(),
)


_BY_ID: Final = select(
    union_all(
        _OPENED.where(payments.c.payment_id == bindparam("payment_id")), _NOT_OPENED_YET.where(commands.c.command_id == bindparam("payment_id"))
    ).subquery("found")
)
_BY_TRANSACTION: Final = _OPENED.where(payments.c.transaction_id == bindparam("transaction_id")).limit(1)
_TIMELINE: Final = (
    select(events).where(events.c.stream == "payment", events.c.entity_id == bindparam("payment_id")).order_by(events.c.version).limit(1000)
)
_COMMAND: Final = select(commands).where(commands.c.command_id == bindparam("command_id"))


@cache
def _page(*, by_user: bool, by_order: bool, behind: bool) -> Select[Any]:
    opened: list[ColumnElement[bool]] = []
    others: list[ColumnElement[bool]] = []
    if by_user:
        opened.append(payments.c.user_id == bindparam("user_id"))
        others.append(commands.c.principal == bindparam("user_id"))
    if by_order:
        opened.append(payments.c.order_id == bindparam("order_id"))
        others.append(commands.c.order_id == bindparam("order_id"))
    if behind:
        place = tuple_(bindparam("created_at", type_=payments.c.created_at.type), bindparam("payment_id", type_=payments.c.payment_id.type))
        opened.append(tuple_(payments.c.created_at, payments.c.payment_id) < place)
        others.append(tuple_(commands.c.accepted_at, commands.c.payment_id) < place)
    # Each of the two is cut before they are put together: a page never costs more than two pages.
    first = _OPENED.where(*opened).order_by(payments.c.created_at.desc(), payments.c.payment_id.desc()).limit(bindparam("limit"))
    second = _NOT_OPENED_YET.where(*others).order_by(commands.c.accepted_at.desc(), commands.c.payment_id.desc()).limit(bindparam("limit"))
    found = union_all(first, second).subquery("found")
    return select(found).order_by(found.c.created_at.desc(), found.c.payment_id.desc()).limit(bindparam("limit"))


# A secret is of use while the customer may still pay with it.
_PAYABLE: Final = frozenset({PaymentStatus.PENDING, PaymentStatus.REQUIRES_ACTION})
_OF_EVERY_EVENT: Final = frozenset(column.name for column in fields(Message))


def _event_view(row: Any, event: Message) -> EventView:
    return EventView(
        event_id=event.event_id,
        event_type=event.event_type,
        version=event.version,
        occurred_at=event.occurred_at,
        topic=row.topic,
        partition=row.partition,
        offset=row.offset,
        published_at=row.published_at,
        data={name: value for name, value in asdict(event).items() if name not in _OF_EVERY_EVENT},
    )


class Reads:
    """Raises Unavailable while Postgres is away, or while the codec has not been loaded and is needed.

    `pool` should be one of its own, so that a flood of questions does not keep a payment from being taken.
    """

    def __init__(self, pool: Pool, codec: Callable[[], Codec]) -> None:
        self._pool = pool
        self._codec = codec

    async def payment(self, payment_id: UUID) -> PaymentView | None:
        return await self._first_payment(_BY_ID, {"payment_id": payment_id})

    async def payment_of_transaction(self, transaction_id: str) -> PaymentView | None:
        """The payment that the gateway knows by this charge id."""
        return await self._first_payment(_BY_TRANSACTION, {"transaction_id": transaction_id})

    async def payments(self, *, user_id: str | None, order_id: str | None, after: Place | None, limit: int) -> Sequence[PaymentView]:
        """Newest first. `user_id` None: everybody's."""
        statement = _page(by_user=user_id is not None, by_order=order_id is not None, behind=after is not None)
        parameters: dict[str, Any] = {"user_id": user_id, "order_id": order_id, "limit": limit, **(asdict(after) if after else {})}
        return [self._payment_view(row) for row in await fetched(self._pool, statement, parameters)]

    async def timeline(self, payment_id: UUID) -> Sequence[EventView]:
        """The payment's events, oldest first."""
        codec = self._codec()
        rows = await fetched(self._pool, _TIMELINE, {"payment_id": str(payment_id)})
        return [_event_view(row, codec.decode(row.value)) for row in rows]

    async def command(self, command_id: UUID) -> CommandView | None:
        rows = await fetched(self._pool, _COMMAND, {"command_id": command_id})
        if not rows:
            return None
        row = rows[0]
        return CommandView(
            command_id=str(row.command_id),
            command_type=row.command_type,
            user_id=row.principal,
            order_id=row.order_id,
            payment_id=str(row.payment_id),
            status=row.outcome or "accepted",
            refusal=row.refusal,
            accepted_at=row.accepted_at,
            decided_at=row.decided_at,
        )

    async def _first_payment(self, statement: Select[Any], parameters: Mapping[str, Any]) -> PaymentView | None:
        rows = await fetched(self._pool, statement, parameters)
        return self._payment_view(rows[0]) if rows else None

    def _payment_view(self, row: Any) -> PaymentView:
        found: dict[str, Any] = row._asdict()
        opening = found.pop("opening")
        found["payment_id"] = str(found["payment_id"])
        if found["status"] not in _PAYABLE:
            found |= {"client_secret": None, "next_action": None}
        if opening is not None:
            command = self._codec().decode(opening)
            if not isinstance(command, InitiatePayment):
                raise TypeError(f"commands has a {command.event_type} where it says {InitiatePayment.event_type}")
            found |= {"amount_minor": command.amount_minor, "currency": command.currency, "gateway": command.gateway}
        return PaymentView(**found)
