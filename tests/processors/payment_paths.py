"""Payments in every status, each brought there the way a real one gets there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from processors.payments.machine import decide, fold, observe
from schemas.decisions import Decision
from schemas.messages import (
    CancelPayment,
    CapturePayment,
    Command,
    ConfirmPayment,
    ExpirePayment,
    InitiatePayment,
    ResolveAttempt,
    derived_id,
)
from schemas.observations import (
    ActionRequired,
    Authorized,
    Captured,
    Created,
    Declined,
    NotSent,
    Observation,
    Processing,
    Refused,
    Unknown,
    Voided,
)
from schemas.state import Failure, NextAction, Payment

NOW: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
PAYMENT_ID: Final = derived_id("a payment")
DECLINE: Final = Failure(code="insufficient_funds", message="The card has insufficient funds.", advice="change_method")

_SAID: Final = {"order_id": "ord_1", "payment_id": PAYMENT_ID, "user_id": "u1", "occurred_at": NOW, "correlation_id": "c1"}


def initiate(**fields: Any) -> InitiatePayment:
    defaults = {"amount_minor": 1000, "currency": "EUR", "gateway": "stripe", "payment_method": "pm_card_visa"}
    return InitiatePayment(event_id=PAYMENT_ID, **{**_SAID, **defaults, **fields})


COMMANDS: Final[dict[str, Command]] = {
    "initiate": initiate(),
    "initiate and confirm": initiate(confirm=True),
    "confirm": ConfirmPayment(event_id=derived_id("confirm"), **_SAID),
    "confirm with another card": ConfirmPayment(event_id=derived_id("confirm 2"), payment_method="pm_card_mastercard", **_SAID),
    "capture": CapturePayment(event_id=derived_id("capture"), **_SAID),
    "capture a part": CapturePayment(event_id=derived_id("capture 400"), amount_minor=400, **_SAID),
    "capture too much": CapturePayment(event_id=derived_id("capture 1001"), amount_minor=1001, **_SAID),
    "cancel": CancelPayment(event_id=derived_id("cancel"), **_SAID),
    "expire": ExpirePayment(event_id=derived_id("expire"), **_SAID),
    "resolve": ResolveAttempt(event_id=derived_id("resolve"), attempt=1, **_SAID),
}

OBSERVATIONS: Final[dict[str, Observation]] = {
    "created": Created(gateway_id="pi_1", client_secret="pi_1_secret_x"),
    "processing": Processing(gateway_id="pi_1"),
    "action required": ActionRequired(gateway_id="pi_1", next_action=NextAction(type="redirect", redirect_url="https://bank.example/3ds")),
    "authorized": Authorized(gateway_id="pi_1", amount_minor=1000, transaction_id="ch_1"),
    "captured": Captured(gateway_id="pi_1", captured_minor=1000, transaction_id="ch_1"),
    "captured in part": Captured(gateway_id="pi_1", captured_minor=400, transaction_id="ch_1"),
    "declined": Declined(gateway_id="pi_1", failure=DECLINE),
    "voided": Voided(gateway_id="pi_1", reason="automatic"),
    "refused": Refused(gateway_id="pi_1", failure=Failure(code="amount_too_small", message="Too small.", advice="none")),
    "unknown": Unknown(detail="no answer"),
    "unknown, key burnt": Unknown(detail="500", key_burnt=True),
    "not sent": NotSent(detail="connection refused"),
}

PATHS: Final[dict[str, tuple[str, ...]]] = {
    "nothing": (),
    "pending, being created": ("initiate",),
    "pending": ("initiate", "created"),
    "pending, not created": ("initiate", "not sent"),
    "processing": ("initiate and confirm",),
    "processing, unknown": ("initiate and confirm", "unknown"),
    "processing, not sent": ("initiate and confirm", "not sent"),
    "processing at the gateway": ("initiate and confirm", "processing"),
    "requires action": ("initiate and confirm", "action required"),
    "requires action, being looked at": ("initiate and confirm", "action required", "confirm"),
    "requires action, being cancelled": ("initiate and confirm", "action required", "cancel"),
    "authorized": ("initiate and confirm", "authorized"),
    "authorized, being captured": ("initiate and confirm", "authorized", "capture"),
    "authorized, capture unknown": ("initiate and confirm", "authorized", "capture", "unknown"),
    "authorized, void not sent": ("initiate and confirm", "authorized", "cancel", "not sent"),
    "completed": ("initiate and confirm", "captured"),
    "completed in part": ("initiate and confirm", "authorized", "capture a part", "captured in part"),
    "failed": ("initiate and confirm", "declined"),
    "failed, second attempt": ("initiate and confirm", "declined", "confirm with another card"),
    "cancelled": ("initiate", "created", "cancel", "voided"),
    "cancelled, never created": ("initiate", "not sent", "cancel"),
    "cancelled, then authorized": ("initiate", "created", "cancel", "voided", "authorized"),
    "cancelled, then captured": ("initiate", "created", "cancel", "voided", "captured"),
}


def step(payment: Payment | None, name: str, number: int | None = None) -> tuple[Payment | None, Decision]:
    """One command or observation applied; the payment stays as it is where a command is refused."""
    if name in COMMANDS:
        decided = decide(payment, COMMANDS[name], NOW)
        decision = decided if isinstance(decided, Decision) else Decision(refusal=decided)
    else:
        assert payment is not None
        decision = observe(payment, number or payment.attempt.number, OBSERVATIONS[name], NOW, cause=COMMANDS["resolve"])
    if payment is None and not decision.events:
        return None, decision
    return fold(payment, decision), decision


def walked(path: str) -> Payment | None:
    payment = None
    for name in PATHS[path]:
        payment, _ = step(payment, name)
    return payment
