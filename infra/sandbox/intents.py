"""The life of a payment intent, as Stripe describes it (docs.stripe.com/payments/paymentintents/lifecycle).

Rule: everything that decides what may happen to an intent is in this file. No I/O, no clock, no chance: identifiers, the time and the bank's verdict
come from outside.
Flow: account loads the Intent -> one of these functions -> a Change -> account stores its intent and charge, and publishes its events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from infra.sandbox.cards import AUTHENTICATION_FAILED, DEBIT_RETURNED, Decline, PaymentMethod, Verdict
from infra.sandbox.errors import invalid


class Status(StrEnum):
    REQUIRES_PAYMENT_METHOD = "requires_payment_method"
    REQUIRES_CONFIRMATION = "requires_confirmation"
    REQUIRES_ACTION = "requires_action"
    PROCESSING = "processing"
    REQUIRES_CAPTURE = "requires_capture"
    SUCCEEDED = "succeeded"
    CANCELED = "canceled"


class Step(StrEnum):
    """What happens to an intent. A decline leads back to requires_payment_method: there is no failed status."""

    METHOD_GIVEN = "confirmed"
    APPROVED = "charged"
    AUTHORIZED = "authorized"
    CHALLENGED = "challenged"
    SUBMITTED = "submitted"
    DECLINED = "declined"
    AUTHENTICATED = "authenticated"
    AUTHENTICATION_FAILED = "refused by its customer"
    CLEARED = "settled"
    RETURNED = "returned"
    CAPTURED = "captured"
    CANCELED = "canceled"
    LAPSED = "lapsed"


TRANSITIONS: Final[Mapping[Status, Mapping[Step, Status]]] = {
    Status.REQUIRES_PAYMENT_METHOD: {Step.METHOD_GIVEN: Status.REQUIRES_CONFIRMATION, Step.CANCELED: Status.CANCELED},
    Status.REQUIRES_CONFIRMATION: {
        Step.METHOD_GIVEN: Status.REQUIRES_CONFIRMATION,
        Step.APPROVED: Status.SUCCEEDED,
        Step.AUTHORIZED: Status.REQUIRES_CAPTURE,
        Step.CHALLENGED: Status.REQUIRES_ACTION,
        Step.SUBMITTED: Status.PROCESSING,
        Step.DECLINED: Status.REQUIRES_PAYMENT_METHOD,
        Step.CANCELED: Status.CANCELED,
    },
    Status.REQUIRES_ACTION: {
        Step.METHOD_GIVEN: Status.REQUIRES_CONFIRMATION,
        Step.AUTHENTICATED: Status.REQUIRES_CONFIRMATION,
        Step.AUTHENTICATION_FAILED: Status.REQUIRES_PAYMENT_METHOD,
        Step.CANCELED: Status.CANCELED,
    },
    Status.PROCESSING: {Step.CLEARED: Status.SUCCEEDED, Step.RETURNED: Status.REQUIRES_PAYMENT_METHOD, Step.CANCELED: Status.CANCELED},
    Status.REQUIRES_CAPTURE: {Step.CAPTURED: Status.SUCCEEDED, Step.LAPSED: Status.CANCELED, Step.CANCELED: Status.CANCELED},
    Status.SUCCEEDED: {},
    Status.CANCELED: {},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentError:
    """Why the last try failed, with which method, and the charge that shows it (none where the customer failed 3-D Secure)."""

    decline: Decline
    method: PaymentMethod
    charge: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """`challenge` is the secret part of the address of the 3-D Secure page while one is asked for; `allow_redirects` tells whether
    methods that lead the customer away are accepted (`always` makes a return address necessary); None where the types of method are listed."""

    id: str
    created: int
    amount: int
    currency: str
    status: Status
    client_secret: str
    capture_method: str = "automatic"
    allow_redirects: str | None = "always"
    payment_method_types: tuple[str, ...] = ("card",)
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    payment_method: str | None = None
    return_url: str | None = None
    challenge: str | None = None
    latest_charge: str | None = None
    amount_capturable: int = 0
    amount_received: int = 0
    last_payment_error: PaymentError | None = None
    canceled_at: int | None = None
    cancellation_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One try to take money. `status` is pending, succeeded or failed; `released` means that an authorisation was given back uncaptured."""

    id: str
    created: int
    payment_intent: str
    amount: int
    currency: str
    payment_method: str
    status: str
    captured: bool = False
    released: bool = False
    amount_captured: int = 0
    amount_refunded: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    decline: Decline | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a step did: the intent and, where one was touched, the charge as they are now, and the types of the events that tell of it, in order."""

    intent: Intent
    charge: Charge | None = None
    events: tuple[str, ...] = ()


class UnexpectedState(Exception):
    """The intent's status does not allow this step. Nothing changed."""

    def __init__(self, intent: Intent, step: Step) -> None:
        self.intent = intent
        if step is Step.METHOD_GIVEN and intent.status is Status.SUCCEEDED:
            message = "You cannot confirm this PaymentIntent because it has already succeeded after being previously confirmed."
        else:
            allowed = ", ".join(status for status, steps in TRANSITIONS.items() if step in steps)
            message = (
                f"This PaymentIntent could not be {step} because it has a status of {intent.status}. "
                f"Only a PaymentIntent with one of the following statuses may be {step}: {allowed}."
            )
        super().__init__(message)


def require(intent: Intent, step: Step) -> Status:
    """Where this step leads. Raises UnexpectedState where the table has no such step: it is the one place that does."""
    status = TRANSITIONS[intent.status].get(step)
    if status is None:
        raise UnexpectedState(intent, step)
    return status


def _advance(intent: Intent, step: Step, **changes: Any) -> Intent:
    return replace(intent, status=require(intent, step), **changes)


def give_method(intent: Intent, method: PaymentMethod, *, return_url: str | None) -> Intent:
    """The intent with a payment method, ready to be tried."""
    return _advance(
        intent, Step.METHOD_GIVEN, payment_method=method.id, return_url=return_url or intent.return_url, challenge=None, last_payment_error=None
    )


def confirm(
    intent: Intent, method: PaymentMethod, verdict: Verdict | Decline, now: int, *, charge_id: str, challenge: str, return_url: str | None
) -> Change:
    """Try to take the money with this method."""
    return _try(give_method(intent, method, return_url=return_url), method, verdict, now, charge_id=charge_id, challenge=challenge)


def authenticate(intent: Intent, method: PaymentMethod, verdict: Verdict | Decline, now: int, *, charge_id: str) -> Change:
    """The customer passed 3-D Secure, and this is what the bank said then."""
    return _try(_advance(intent, Step.AUTHENTICATED, challenge=None), method, verdict, now, charge_id=charge_id, challenge=None)


def fail_authentication(intent: Intent, method: PaymentMethod) -> Change:
    """The customer did not pass 3-D Secure: no charge was tried."""
    error = PaymentError(decline=AUTHENTICATION_FAILED, method=method, charge=None)
    declined = _advance(intent, Step.AUTHENTICATION_FAILED, payment_method=None, challenge=None, last_payment_error=error)
    return Change(intent=declined, events=("payment_intent.payment_failed",))


def _try(intent: Intent, method: PaymentMethod, verdict: Verdict | Decline, now: int, *, charge_id: str, challenge: str | None) -> Change:
    charge = Charge(
        id=charge_id,
        created=now,
        payment_intent=intent.id,
        amount=intent.amount,
        currency=intent.currency,
        payment_method=method.id,
        status="succeeded",
        metadata=intent.metadata,
        description=intent.description,
    )
    match verdict:
        case Decline():
            return _declined(intent, Step.DECLINED, charge, verdict, method)
        case Verdict.CHALLENGED:
            return Change(intent=_advance(intent, Step.CHALLENGED, challenge=challenge), events=("payment_intent.requires_action",))
        case Verdict.SUBMITTED:
            submitted = _advance(intent, Step.SUBMITTED, latest_charge=charge.id)
            return Change(intent=submitted, charge=replace(charge, status="pending"), events=("charge.pending", "payment_intent.processing"))
        case Verdict.APPROVED if intent.capture_method == "manual":
            held = _advance(intent, Step.AUTHORIZED, latest_charge=charge.id, amount_capturable=intent.amount)
            return Change(intent=held, charge=charge, events=("charge.succeeded", "payment_intent.amount_capturable_updated"))
        case Verdict.APPROVED:
            return _paid(intent, Step.APPROVED, charge, intent.amount, "charge.succeeded")


def capture(intent: Intent, charge: Charge, amount: int | None) -> Change:
    """Take what was authorised, or a part of it; the rest is released. Raises ApiError for more than that."""
    require(intent, Step.CAPTURED)
    if amount is not None and amount > intent.amount_capturable:
        raise invalid(
            f"The amount you are requesting to capture is greater than the amount you can capture for this charge ({intent.amount_capturable}).",
            param="amount_to_capture",
            code="amount_too_large",
        )
    return _paid(intent, Step.CAPTURED, charge, intent.amount_capturable if amount is None else amount, "charge.captured")


def settle(intent: Intent, charge: Charge, method: PaymentMethod, *, cleared: bool) -> Change:
    """A bank debit that was processing comes to its end."""
    if cleared:
        return _paid(intent, Step.CLEARED, replace(charge, status="succeeded"), intent.amount, "charge.succeeded")
    return _declined(intent, Step.RETURNED, charge, DEBIT_RETURNED, method)


def cancel(intent: Intent, charge: Charge | None, reason: str | None, now: int) -> Change:
    """Give the intent up, and with it what was authorised."""
    return _given_up(intent, Step.CANCELED, charge, reason, now, events=("payment_intent.canceled",))


def lapse(intent: Intent, charge: Charge | None, now: int) -> Change:
    """An authorisation that nobody captured in time ends by itself."""
    return _given_up(intent, Step.LAPSED, charge, "automatic", now, events=("charge.expired", "payment_intent.canceled"))


def _paid(intent: Intent, step: Step, charge: Charge, amount: int, charge_event: str) -> Change:
    return Change(
        intent=_advance(intent, step, latest_charge=charge.id, amount_capturable=0, amount_received=amount),
        charge=replace(charge, captured=True, amount_captured=amount),
        events=(charge_event, "payment_intent.succeeded"),
    )


def _declined(intent: Intent, step: Step, charge: Charge, decline: Decline, method: PaymentMethod) -> Change:
    error = PaymentError(decline=decline, method=method, charge=charge.id)
    return Change(
        intent=_advance(intent, step, payment_method=None, latest_charge=charge.id, last_payment_error=error),
        charge=replace(charge, status="failed", decline=decline),
        events=("charge.failed", "payment_intent.payment_failed"),
    )


def _given_up(intent: Intent, step: Step, charge: Charge | None, reason: str | None, now: int, *, events: tuple[str, ...]) -> Change:
    canceled = _advance(intent, step, amount_capturable=0, challenge=None, canceled_at=now, cancellation_reason=reason)
    if charge is None or charge.status == "failed":
        return Change(intent=canceled, events=events)
    gone = replace(charge, status="failed") if charge.status == "pending" else replace(charge, released=True)
    return Change(intent=canceled, charge=gone, events=events)
