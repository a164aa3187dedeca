"""The intent's machine: every status × step, and that money is where the status says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from infra.sandbox import intents
from infra.sandbox.cards import DECLINES, NAMED_METHODS, Decline, Verdict
from infra.sandbox.errors import ApiError
from infra.sandbox.intents import TRANSITIONS, Change, Charge, Intent, Status, Step, UnexpectedState

pytestmark = pytest.mark.unit

VISA = NAMED_METHODS["pm_card_visa"]
DECLINE = DECLINES["insufficient_funds"]
NOW = 1_700_000_000


def intent(status: Status = Status.REQUIRES_CONFIRMATION, *, capture_method: str = "automatic") -> Intent:
    return Intent(
        id="pi_1",
        created=NOW,
        amount=1999,
        currency="eur",
        status=status,
        client_secret="pi_1_secret",
        capture_method=capture_method,
        payment_method=None if status is Status.REQUIRES_PAYMENT_METHOD else VISA.id,
        latest_charge="ch_0",
        amount_capturable=1999 if status is Status.REQUIRES_CAPTURE else 0,
        challenge="c" if status is Status.REQUIRES_ACTION else None,
    )


def charge(status: str = "succeeded") -> Charge:
    return Charge(id="ch_0", created=NOW, payment_intent="pi_1", amount=1999, currency="eur", payment_method=VISA.id, status=status)


def confirmed(start: Intent, verdict: Verdict | Decline) -> Change:
    return intents.confirm(start, VISA, verdict, NOW, charge_id="ch_1", challenge="nonce", return_url=None)


ASKED: dict[str, tuple[Step, Callable[[Intent], Change]]] = {
    "confirm": (Step.METHOD_GIVEN, lambda start: confirmed(start, Verdict.APPROVED)),
    "capture": (Step.CAPTURED, lambda start: intents.capture(start, charge(), None)),
    "cancel": (Step.CANCELED, lambda start: intents.cancel(start, None, None, NOW)),
    "lapse": (Step.LAPSED, lambda start: intents.lapse(start, charge(), NOW)),
    "authenticate": (Step.AUTHENTICATED, lambda start: intents.authenticate(start, VISA, Verdict.APPROVED, NOW, charge_id="ch_1")),
    "fail authentication": (Step.AUTHENTICATION_FAILED, lambda start: intents.fail_authentication(start, VISA)),
    "clear": (Step.CLEARED, lambda start: intents.settle(start, charge("pending"), VISA, cleared=True)),
    "return": (Step.RETURNED, lambda start: intents.settle(start, charge("pending"), VISA, cleared=False)),
}


@pytest.mark.parametrize(("status", "asked"), list(product(Status, ASKED)))
def test_only_what_the_table_has_a_step_for_is_done(status: Status, asked: str) -> None:
    step, ask = ASKED[asked]
    if step in TRANSITIONS[status]:
        assert ask(intent(status)).intent.status in Status
    else:
        with pytest.raises(UnexpectedState) as refusal:
            ask(intent(status))
        assert refusal.value.intent == intent(status)


def test_money_that_was_taken_or_given_up_stays_so() -> None:
    assert TRANSITIONS[Status.SUCCEEDED] == {}
    assert TRANSITIONS[Status.CANCELED] == {}


def test_every_status_can_be_reached() -> None:
    reached = {status for steps in TRANSITIONS.values() for status in steps.values()}
    assert reached | {Status.REQUIRES_PAYMENT_METHOD} == set(Status)


def test_an_approved_charge_takes_the_money() -> None:
    change = confirmed(intent(), Verdict.APPROVED)
    assert change.intent.status is Status.SUCCEEDED
    assert change.intent.amount_received == 1999
    assert change.charge is not None
    assert (change.charge.captured, change.charge.amount_captured) == (True, 1999)
    assert change.events == ("charge.succeeded", "payment_intent.succeeded")


def test_manual_capture_holds_the_money_first() -> None:
    held = confirmed(intent(capture_method="manual"), Verdict.APPROVED)
    assert held.intent.status is Status.REQUIRES_CAPTURE
    assert (held.intent.amount_capturable, held.intent.amount_received) == (1999, 0)
    assert held.charge is not None
    assert not held.charge.captured
    taken = intents.capture(held.intent, held.charge, 700)
    assert (taken.intent.amount_capturable, taken.intent.amount_received) == (0, 700)
    assert taken.charge is not None
    assert taken.charge.amount_captured == 700
    assert taken.events == ("charge.captured", "payment_intent.succeeded")


def test_no_more_is_captured_than_was_authorised() -> None:
    with pytest.raises(ApiError) as refusal:
        intents.capture(intent(Status.REQUIRES_CAPTURE), charge(), 2000)
    assert (refusal.value.error["code"], refusal.value.error["param"]) == ("amount_too_large", "amount_to_capture")


def test_a_decline_leads_back_to_the_start_and_another_card_may_pay() -> None:
    declined = confirmed(intent(), DECLINE)
    assert declined.intent.status is Status.REQUIRES_PAYMENT_METHOD
    assert declined.intent.payment_method is None
    assert declined.intent.last_payment_error is not None
    assert declined.intent.last_payment_error.charge == "ch_1"
    assert declined.charge is not None
    assert declined.charge.status == "failed"
    paid = confirmed(declined.intent, Verdict.APPROVED)
    assert paid.intent.status is Status.SUCCEEDED
    assert paid.intent.last_payment_error is None


def test_a_failed_authentication_tries_no_charge() -> None:
    asked = confirmed(intent(), Verdict.CHALLENGED)
    assert (asked.intent.status, asked.intent.challenge, asked.charge) == (Status.REQUIRES_ACTION, "nonce", None)
    failed = intents.fail_authentication(asked.intent, VISA)
    assert failed.charge is None
    assert failed.intent.challenge is None
    assert failed.intent.last_payment_error is not None
    assert failed.intent.last_payment_error.decline.code == "payment_intent_authentication_failure"


def test_the_bank_may_decline_after_authentication() -> None:
    asked = confirmed(intent(), Verdict.CHALLENGED).intent
    assert intents.authenticate(asked, VISA, DECLINE, NOW, charge_id="ch_2").intent.status is Status.REQUIRES_PAYMENT_METHOD


def test_a_debit_is_pending_until_it_is_settled() -> None:
    submitted = confirmed(intent(), Verdict.SUBMITTED)
    assert submitted.intent.status is Status.PROCESSING
    assert submitted.charge is not None
    assert submitted.charge.status == "pending"
    cleared = intents.settle(submitted.intent, submitted.charge, VISA, cleared=True)
    assert cleared.charge is not None
    assert (cleared.charge.status, cleared.charge.amount_captured) == ("succeeded", 1999)
    returned = intents.settle(submitted.intent, submitted.charge, VISA, cleared=False)
    assert returned.charge is not None
    assert (returned.charge.status, returned.intent.status) == ("failed", Status.REQUIRES_PAYMENT_METHOD)


@pytest.mark.parametrize(("reason", "give_up"), [("duplicate", intents.cancel), ("automatic", None)])
def test_a_given_up_authorisation_is_released(reason: str, give_up: Callable[..., Change] | None) -> None:
    held = intent(Status.REQUIRES_CAPTURE)
    gone = intents.lapse(held, charge(), NOW) if give_up is None else give_up(held, charge(), reason, NOW)
    assert (gone.intent.status, gone.intent.cancellation_reason, gone.intent.canceled_at) == (Status.CANCELED, reason, NOW)
    assert gone.intent.amount_capturable == 0
    assert gone.charge is not None
    assert gone.charge.released


def test_a_cancelled_debit_never_comes_through() -> None:
    gone = intents.cancel(intent(Status.PROCESSING), charge("pending"), None, NOW)
    assert gone.charge is not None
    assert gone.charge.status == "failed"
