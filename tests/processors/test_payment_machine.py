"""The payment machine, walked: every status × event, × command, × observation; and any sequence of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.payments.machine import (
    ATTEMPT_TRANSITIONS,
    EXPIRES_AFTER,
    RESOLVE_UNKNOWN,
    RETRY_NOT_SENT,
    TRANSITIONS,
    decide,
    evolve,
    fold,
    observe,
)
from schemas.decisions import Decision, Refusal
from schemas.errors import IllegalTransition
from schemas.messages import ExpirePayment, PaymentEvent, PaymentRefundInitiated, ResolveAttempt, leaves
from schemas.state import AttemptStatus, Payment, PaymentStatus, Step
from tests.processors.payment_paths import COMMANDS, NOW, OBSERVATIONS, PATHS, PAYMENT_ID, initiate, step, walked

pytestmark = pytest.mark.unit

EVENTS = list(leaves(PaymentEvent).values())
BY_STATUS = {payment.status: payment for payment in (walked(path) for path in PATHS) if payment}


def event(kind: type[PaymentEvent], payment: Payment | None, version: int) -> PaymentEvent:
    samples = {"int": 1, "str": "x", "str | None": None, "int | None": None, "datetime": NOW}
    values = {f.name: samples[str(f.type)] for f in fields(kind)} | {"version": version, "payment_id": PAYMENT_ID}
    return kind(**values)


def test_every_status_can_be_walked_to() -> None:
    assert set(BY_STATUS) == set(PaymentStatus) == set(TRANSITIONS)
    assert set(ATTEMPT_TRANSITIONS) == set(AttemptStatus)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("status", PaymentStatus)
def test_evolve_follows_the_table_and_nothing_else(status: PaymentStatus, kind: type[PaymentEvent]) -> None:
    payment = BY_STATUS[status]
    following = TRANSITIONS[status].get(kind)
    if following is None:
        with pytest.raises(IllegalTransition, match=f"{kind.event_type}.*{status}"):
            evolve(payment, event(kind, payment, payment.version + 1))
        return
    assert evolve(payment, event(kind, payment, payment.version + 1)).status is following
    with pytest.raises(IllegalTransition):
        evolve(payment, event(kind, payment, payment.version + 2))


def check(before: Payment | None, name: str) -> Payment | None:
    """One step, and what must hold of any step."""
    after, decision = step(before, name)
    if decision.refusal is not None and name in COMMANDS:
        assert after == before, "a refused command changes nothing"
        assert decision.refusal.code
        assert decision.refusal.message
        return after
    versions = [e.version for e in decision.events]
    start = before.version if before else 0
    assert versions == list(range(start + 1, start + 1 + len(versions)))
    assert len({e.event_id for e in decision.events}) == len(versions)
    if after is None:
        return None
    assert [attempt.number for attempt in after.attempts] == list(range(1, len(after.attempts) + 1))
    for attempt in before.attempts if before else ():
        now = after.attempts[attempt.number - 1]
        assert now.status is attempt.status or now.status in ATTEMPT_TRANSITIONS[attempt.status]
        assert now.captured_minor >= attempt.captured_minor, "money that moved stays booked"
    assert after.captured_minor == sum(attempt.captured_minor for attempt in after.attempts)
    assert after.pending_refund_minor <= after.captured_minor
    if after.status is PaymentStatus.COMPLETED:
        assert after.captured_minor > 0
    doubts = [attempt for attempt in after.attempts if attempt.operation and attempt.operation.doubt]
    if name in OBSERVATIONS and doubts and decision.attempts:
        assert decision.timers, "a doubt has a timer"
    return after


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("path", PATHS)
def test_each_command_in_each_state(path: str, name: str) -> None:
    check(walked(path), name)


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "nothing"])
def test_each_observation_in_each_state(path: str, name: str) -> None:
    before = walked(path)
    after = check(before, name)
    assert check(after, name) is not None, "the same news again is taken too"
    if name == "captured" and before is not None and after is not None:
        assert after.captured_minor > 0, "money that moved is booked, whatever the state"


@pytest.mark.parametrize("path", [path for path in PATHS if path != "nothing"])
@pytest.mark.parametrize("name", [n for n in OBSERVATIONS if n not in ("unknown", "unknown, key burnt", "not sent", "processing")])
def test_old_news_make_no_event(path: str, name: str) -> None:
    once, _ = step(walked(path), name)
    _, again = step(once, name)
    assert not again.events


@given(st.lists(st.sampled_from([*COMMANDS, *OBSERVATIONS]), max_size=25), st.booleans())
def test_any_sequence_leaves_the_books_right(names: list[str], confirm: bool) -> None:
    payment = check(None, "initiate and confirm" if confirm else "initiate")
    for name in names:
        payment = check(payment, name)


def test_an_observation_of_an_older_attempt_is_booked_too() -> None:
    second = walked("failed, second attempt")
    after, decision = step(second, "captured", number=1)
    assert after is not None
    assert after.status is PaymentStatus.COMPLETED
    assert after.attempts[1].operation is None, "the second attempt is not sent any more"
    assert [e.event_type for e in decision.events] == ["PAYMENT_COMPLETED"]


def test_a_capture_on_a_cancelled_payment_is_booked_and_given_back() -> None:
    after, decision = step(walked("cancelled"), "captured")
    assert after is not None
    assert [e.event_type for e in decision.events] == ["PAYMENT_COMPLETED", "PAYMENT_REFUND_INITIATED"]
    refund = decision.events[-1]
    assert isinstance(refund, PaymentRefundInitiated)
    assert (refund.refund_minor, refund.reason) == (1000, "captured_after_cancel")
    assert after.pending_refund_minor == 1000


def test_a_hold_on_a_cancelled_payment_is_voided_by_a_timer() -> None:
    after, decision = step(walked("cancelled"), "authorized")
    assert after is not None
    assert not decision.events
    assert after.attempt.operation is not None
    assert after.attempt.operation.step is Step.CANCEL
    assert [timer.command for timer in decision.timers] == [ResolveAttempt]


def test_what_was_not_sent_is_retried_five_times_and_then_fails() -> None:
    payment, delays = walked("processing"), []
    while True:
        payment, decision = step(payment, "not sent")
        if not decision.timers:
            break
        delays.append(decision.timers[0].due_at - NOW)
    assert tuple(delays) == RETRY_NOT_SENT
    assert payment is not None
    assert payment.status is PaymentStatus.FAILED
    assert payment.failure is not None
    assert (payment.failure.code, payment.failure.advice) == ("gateway_unavailable", "retry")


def test_what_is_unknown_is_asked_for_ever_and_never_failed() -> None:
    payment, delays = walked("processing"), []
    for _ in range(8):
        payment, decision = step(payment, "unknown")
        delays.append(decision.timers[0].due_at - NOW)
    assert tuple(delays) == (*RESOLVE_UNKNOWN, *RESOLVE_UNKNOWN[-1:] * 3)
    assert payment is not None
    assert (payment.status, payment.attempt.status) == (PaymentStatus.PROCESSING, AttemptStatus.UNKNOWN)


def test_an_answered_5xx_burns_its_key_and_no_answer_keeps_it() -> None:
    burnt, _ = step(walked("processing"), "unknown, key burnt")
    kept, _ = step(walked("processing"), "unknown")
    assert burnt is not None and burnt.attempt.operation is not None and burnt.attempt.operation.keys_burnt == 1  # noqa: PT018
    assert kept is not None and kept.attempt.operation is not None and kept.attempt.operation.keys_burnt == 0  # noqa: PT018


def test_an_open_payment_expires_unless_it_is_confirmed() -> None:
    _, created = step(walked("pending, being created"), "created")
    assert [(t.command, t.due_at) for t in created.timers] == [(ExpirePayment, NOW + EXPIRES_AFTER)]
    _, confirmed = step(walked("pending"), "confirm")
    assert confirmed.dropped_timers == (created.timers[0].timer_id,)


def test_a_retry_after_a_decline_has_an_object_of_its_own_and_ends_the_first() -> None:
    second = walked("failed, second attempt")
    assert second is not None
    assert second.attempt.number == 2
    assert second.attempt.gateway_id is None
    assert second.attempt.supersedes == "pi_1"
    assert second.attempt.request.payment_method == "pm_card_mastercard"


def test_a_second_payment_of_an_order_is_refused_while_the_first_holds_it() -> None:
    refusal = decide(None, COMMANDS["initiate"], NOW, order_held_by="another")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "order_has_payment"


def test_the_second_capture_of_an_order_is_refunded() -> None:
    failed = walked("failed")
    assert failed is not None
    decision = observe(failed, 1, OBSERVATIONS["captured"], NOW, cause=COMMANDS["resolve"], order_paid_by_other=True)
    assert [e.event_type for e in decision.events] == ["PAYMENT_PROCESSING", "PAYMENT_COMPLETED", "PAYMENT_REFUND_INITIATED"]


def test_secrets_do_not_show_when_an_attempt_is_printed() -> None:
    pending = walked("pending")
    assert "secret_x" not in repr(pending)


@pytest.mark.parametrize(
    ("capture_method", "path", "code"),
    [
        ("manual", ("initiate", "created"), "not_authorized"),
        ("manual", ("unknown",), "operation_pending"),
        ("manual", ("unknown", "authorized", "capture"), "operation_pending"),
        ("automatic", ("unknown",), "not_authorized"),
    ],
)
def test_a_capture_behind_a_hold_whose_outcome_is_unknown_may_be_tried_again(capture_method: str, path: tuple[str, ...], code: str) -> None:
    opened = decide(None, initiate(confirm=path[0] != "initiate", capture_method=capture_method), NOW)
    assert isinstance(opened, Decision)
    payment: Payment | None = fold(None, opened)
    for name in path:
        if name != "initiate":
            payment, _ = step(payment, name)
    _, decision = step(payment, "capture a part")
    assert decision.refusal is not None
    assert decision.refusal.code == code
