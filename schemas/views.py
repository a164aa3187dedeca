"""The rows of the analytics tables: frozen values that projections fold and the store keeps.

Rule: one class for each table, field by column; a test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentRow:
    """A payment as of its event `version`. Amounts in minor units; `ended_at` is None while it may still be paid without a new attempt."""

    payment_id: str
    order_id: str
    status: str
    gateway: str
    currency: str
    amount_minor: int
    captured_minor: int = 0
    failure_code: str | None = None
    initiated_at: datetime
    ended_at: datetime | None = None
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """One try to charge a payment. `at` is when it began, so that it stays in the period it is counted in.

    `outcome` is the payment's status that the last event about this attempt led to; `gateway_latency_ms` is of the last call that said something.
    """

    payment_id: str
    attempt: int
    gateway: str
    outcome: str
    failure_code: str | None = None
    gateway_latency_ms: int | None = None
    at: datetime


@dataclass(slots=True)
class Views:
    """Rows by their keys: those of the payments that a batch is about."""

    payments: dict[str, PaymentRow] = field(default_factory=dict)
    attempts: dict[tuple[str, int], AttemptRow] = field(default_factory=dict)
