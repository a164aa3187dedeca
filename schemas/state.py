"""What a payment, an attempt and an order are: frozen values that machines evolve and stores keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final


class PaymentStatus(StrEnum):
    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    REQUIRES_ACTION = "REQUIRES_ACTION"
    AUTHORIZED = "AUTHORIZED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class AttemptStatus(StrEnum):
    STARTED = "STARTED"
    NOT_SENT = "NOT_SENT"
    SUCCEEDED = "SUCCEEDED"
    DECLINED = "DECLINED"
    REQUIRES_ACTION = "REQUIRES_ACTION"
    UNKNOWN = "UNKNOWN"


class OrderStatus(StrEnum):
    PAYMENT_PENDING = "PAYMENT_PENDING"
    PENDING = "PENDING"
    PAYMENT_FAILED = "PAYMENT_FAILED"
    CANCELLED = "CANCELLED"


class Step(StrEnum):
    """What the gateway is asked to do with an attempt's object."""

    CREATE = "create"
    CONFIRM = "confirm"
    CAPTURE = "capture"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended without money. `advice`: retry, change_method, contact_support or none."""

    code: str
    message: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAction:
    type: str
    redirect_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeRequest:
    """What the gateway is told when the attempt's object is created: kept exactly, because an idempotency key allows no other body."""

    amount_minor: int
    currency: str
    capture_method: str
    payment_method: str | None = None
    return_url: str | None = None
    description: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What the gateway is being asked, from before the first POST until its answer is known.

    `keys_burnt` counts idempotency keys that an answered 5xx has spoilt (the gateway replays it); `asked_at` is when the first one was used.
    `doubt` is UNKNOWN (it may have been done), NOT_SENT (it surely was not) or None (being asked right now); `tries` counts timers since.
    """

    step: Step
    command_id: str
    asked_at: datetime
    amount_minor: int | None = None
    reason: str | None = None
    keys_burnt: int = 0
    doubt: AttemptStatus | None = None
    doubt_since: datetime | None = None
    tries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try to charge a payment, with one object at the gateway."""

    number: int
    status: AttemptStatus
    gateway: str
    request: ChargeRequest
    operation: Operation | None
    gateway_id: str | None = None
    client_secret: str | None = field(default=None, repr=False)
    next_action: NextAction | None = None
    supersedes: str | None = None
    """The gateway's object of the attempt before: voided first, so that its client secret can't be paid any more."""
    transaction_id: str | None = None
    captured_minor: int = 0
    started_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A payment. Amounts in minor units of `currency`; `version` is that of its last event."""

    payment_id: str
    order_id: str
    user_id: str
    status: PaymentStatus
    amount_minor: int
    currency: str
    gateway: str
    capture_method: str
    captured_minor: int = 0
    refunded_minor: int = 0
    pending_refund_minor: int = 0
    disputed_minor: int = 0
    transaction_id: str | None = None
    failure: Failure | None = None
    version: int
    created_at: datetime
    updated_at: datetime
    attempts: tuple[Attempt, ...] = ()
    """Oldest first; they are the store's, events don't make them."""

    @property
    def attempt(self) -> Attempt:
        return self.attempts[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    order_id: str
    user_id: str
    status: OrderStatus
    payment_id: str
    amount_minor: int
    currency: str
    version: int
    updated_at: datetime


GATEWAYS: Final = ("stripe", "paypal")
