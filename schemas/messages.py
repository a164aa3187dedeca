"""What travels on the topics: commands that ask, events that state facts, and the webhook envelope.

Rule: one frozen dataclass for each `.avsc`, field by field; a test holds them together. Nothing personal is in an event: ids only.
Flow: api -> InitiatePayment … on `payment-commands` -> processors/payments -> PaymentInitiated … on `payment-events`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Final

NAMESPACE: Final = uuid.UUID("6f1f0c1e-52a5-5d0e-9d5c-5b0a6f0f7c11")
"""The root of every derived id: the same question always gets the same id."""


def derived_id(*parts: object) -> str:
    """An id that is a pure function of `parts` (UUIDv5 of their strings, joined by newlines)."""
    return str(uuid.uuid5(NAMESPACE, "\n".join(str(part) for part in parts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What every record carries. `version` counts the events of one payment (or one order), gapless from 1; what is no event has 0."""

    event_id: str
    order_id: str | None
    payment_id: str | None
    user_id: str | None
    version: int = 0
    occurred_at: datetime
    correlation_id: str
    causation_id: str | None = None

    event_type: ClassVar[str]

    @property
    def key(self) -> str | None:
        """The Kafka key: the order, so that all about one order is on one partition."""
        return self.order_id


# ── Commands ask, and may be refused. Their event_id is the command id: a repeat has the same one. ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Message):
    order_id: str
    payment_id: str
    user_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiatePayment(Command):
    """Open a payment; with `confirm`, charge it too."""

    event_type: ClassVar[str] = "InitiatePayment"
    amount_minor: int
    currency: str
    gateway: str
    payment_method: str | None = None
    capture_method: str = "automatic"
    confirm: bool = False
    return_url: str | None = None
    description: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmPayment(Command):
    """Charge an open payment, or try a failed one again, perhaps with another method."""

    event_type: ClassVar[str] = "ConfirmPayment"
    payment_method: str | None = None
    return_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePayment(Command):
    """Take what was authorised, in full or (`amount_minor`) in part."""

    event_type: ClassVar[str] = "CapturePayment"
    amount_minor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelPayment(Command):
    """Void a payment that has not been captured."""

    event_type: ClassVar[str] = "CancelPayment"
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveAttempt(Command):
    """Find out how attempt number `attempt` stands, and bring it on: a timer asks it of what is UNKNOWN or NOT_SENT."""

    event_type: ClassVar[str] = "ResolveAttempt"
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpirePayment(Command):
    """End a payment that nobody confirmed in time."""

    event_type: ClassVar[str] = "ExpirePayment"


# ── Webhooks are hints: raw, verified at the edge. ──


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookReceived(Message):
    """A gateway's webhook, its body byte for byte. `order_id` is known only if the gateway's object says it."""

    event_type: ClassVar[str] = "WebhookReceived"
    gateway: str
    gateway_event_id: str
    gateway_event_type: str
    object_id: str
    body: bytes

    @property
    def key(self) -> str:
        return self.order_id or self.object_id


# ── Events are facts. ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Message):
    order_id: str
    user_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentEvent(Event):
    """A fact about a payment. Amounts are running totals, in minor units of `currency`."""

    payment_id: str
    gateway: str
    currency: str
    amount_minor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentInitiated(PaymentEvent):
    event_type: ClassVar[str] = "PAYMENT_INITIATED"
    capture_method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentProcessing(PaymentEvent):
    """An attempt is on its way to the gateway."""

    event_type: ClassVar[str] = "PAYMENT_PROCESSING"
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentActionRequired(PaymentEvent):
    """The customer must act (3-D Secure) before the gateway goes on. Where to send them is told to the owner only."""

    event_type: ClassVar[str] = "PAYMENT_ACTION_REQUIRED"
    attempt: int
    gateway_latency_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentAuthorized(PaymentEvent):
    """The money is held, not taken."""

    event_type: ClassVar[str] = "PAYMENT_AUTHORIZED"
    attempt: int
    transaction_id: str
    gateway_latency_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentCompleted(PaymentEvent):
    """Money moved: `captured_minor` in all."""

    event_type: ClassVar[str] = "PAYMENT_COMPLETED"
    attempt: int
    transaction_id: str
    captured_minor: int
    receipt_url: str | None = None
    gateway_latency_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentFailed(PaymentEvent):
    """The attempt ended without money. `advice` says what the payer may do: retry, change_method, contact_support or none."""

    event_type: ClassVar[str] = "PAYMENT_FAILED"
    attempt: int
    failure_code: str
    failure_message: str
    advice: str
    gateway_latency_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentCancelled(PaymentEvent):
    event_type: ClassVar[str] = "PAYMENT_CANCELLED"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentRefundInitiated(PaymentEvent):
    """Money is to go back: `refund_minor` of `captured_minor`."""

    event_type: ClassVar[str] = "PAYMENT_REFUND_INITIATED"
    refund_id: str
    refund_minor: int
    captured_minor: int
    transaction_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderEvent(Event):
    """A fact about an order; `version` counts per order. `payment_id` is the payment that moved it."""

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPlaced(OrderEvent):
    event_type: ClassVar[str] = "ORDER_PLACED"
    amount_minor: int
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderCreated(OrderEvent):
    """Paid, and ready for the kitchen or warehouse."""

    event_type: ClassVar[str] = "ORDER_CREATED"
    amount_minor: int
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderStatusChanged(OrderEvent):
    event_type: ClassVar[str] = "ORDER_STATUS_CHANGED"
    previous_status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderCancelled(OrderEvent):
    event_type: ClassVar[str] = "ORDER_CANCELLED"
    reason: str


# ── The relay's own record. ──


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxPosition(Message):
    """Which outbox rows one Kafka transaction published, and where: one string `outbox_id topic partition offset` for each record."""

    event_type: ClassVar[str] = "OutboxPosition"
    records: list[str]


def leaves(cls: type[Message]) -> dict[str, type[Message]]:
    """The records of a kind, by name."""
    found: dict[str, type[Message]] = {}
    for child in cls.__subclasses__():
        if "event_type" in child.__dict__:
            found[child.__name__] = child
        found |= leaves(child)
    return found


RECORDS: Final[Mapping[str, type[Message]]] = leaves(Message)
"""Every message by its record name, `PaymentCompleted`; the Avro full name is `paystream.PaymentCompleted`."""

BY_TYPE: Final[Mapping[str, type[Message]]] = {cls.event_type: cls for cls in RECORDS.values()}
"""Every message by its `event_type`, which is also the header `ce_type`."""

_ORDER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_order_id(text: str) -> bool:
    return _ORDER_ID.fullmatch(text) is not None


def envelope(cause: Message, now: datetime) -> dict[str, Any]:
    """The fields that what follows from `cause` takes over from it."""
    return {"occurred_at": now, "correlation_id": cause.correlation_id, "causation_id": cause.event_id}
