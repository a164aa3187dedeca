"""Cards, idempotency keys, parameters and faults: the sandbox's rules, without a socket."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any
from urllib.parse import urlencode

import pytest

from infra.sandbox.behaviour import Behaviour, Conditions, parse_failure_reasons
from infra.sandbox.cards import DECLINES, NAMED_METHODS, TEST_CARDS, Decline, Verdict, method_for_number
from infra.sandbox.clock import SandboxClock
from infra.sandbox.errors import ApiError, missing
from infra.sandbox.faults import CALL_KINDS, WEBHOOK_KINDS, Faults
from infra.sandbox.idempotency import REMEMBERED_S, Keys, fingerprint, judge
from infra.sandbox.intents import Charge
from infra.sandbox.objects import ledger_entry
from infra.sandbox.parameters import Form, pairs_of, read_card, read_confirmation, read_creation, read_page, read_registration
from infra.sandbox.storage import SavedAnswer, Storage
from infra.sandbox.webhooks import retry_after
from schemas.errors import BadConfiguration

pytestmark = pytest.mark.unit

GOOD = {"amount": "1999", "currency": "eur"}
CARD = {"type": "card", "card[number]": "4242424242424242", "card[exp_month]": "12", "card[exp_year]": "2035"}


def form(**fields: str) -> Form:
    return Form(pairs_of(urlencode(fields).encode()))


def creation(**fields: str) -> Any:
    return read_creation(form(**GOOD | fields))


# ── Cards and the bank ──


@pytest.mark.parametrize("number", TEST_CARDS)
def test_a_card_leaves_its_last_digits_and_its_behaviour_only(number: str) -> None:
    spaced = " ".join(number[i : i + 4] for i in range(0, 16, 4))
    method = method_for_number(spaced, identifier="pm_1", exp_month=1, exp_year=2030, now=0)
    assert (method.last4, method.behaviour) == (number[-4:], TEST_CARDS[number][1])
    assert number not in repr(method)


@pytest.mark.parametrize(
    ("number", "code"),
    [("4242424242424241", "incorrect_number"), ("42", "incorrect_number"), ("x" * 16, "incorrect_number"), ("4111111111111111", "card_declined")],
)
def test_a_number_that_is_no_test_card_is_turned_away_unseen(number: str, code: str) -> None:
    with pytest.raises(ApiError) as refusal:
        method_for_number(number, identifier="pm_1", exp_month=1, exp_year=2030, now=0)
    assert (refusal.value.status, refusal.value.error["code"]) == (402, code)
    assert number not in refusal.value.body().decode()


def test_the_success_rate_thins_only_what_would_pass() -> None:
    bank = Behaviour(Conditions(success_rate=0.0, failure_reasons="insufficient_funds=1"), seed=1)
    assert bank.decide(NAMED_METHODS["pm_card_visa"]) is DECLINES["insufficient_funds"]
    assert bank.decide(NAMED_METHODS["pm_card_chargeDeclined"]) is DECLINES["card_declined"]
    assert bank.decide(NAMED_METHODS["pm_card_threeDSecure2Required"]) is Verdict.CHALLENGED


def test_the_same_seed_has_the_same_luck_and_keeps_to_its_rates() -> None:
    def luck(seed: int) -> list[str]:
        bank = Behaviour(Conditions(success_rate=0.8), seed)
        answers = [bank.approve() for _ in range(2000)]
        return [answer.decline_code or "" if isinstance(answer, Decline) else str(answer) for answer in answers]

    assert luck(7) == luck(7) != luck(8)
    counted = Counter(luck(7))
    assert 1500 < counted["approved"] < 1700
    assert counted["generic_decline"] > 2 * counted["insufficient_funds"] > 0


@pytest.mark.parametrize("text", ["", "nonsense=1", "card_declined", "card_declined=0", "card_declined=-1", "card_declined=1.5", "card_declined=1,,"])
def test_failure_reasons_that_make_no_sense_are_named(text: str) -> None:
    with pytest.raises(BadConfiguration, match="--failure-reasons"):
        parse_failure_reasons(text)


def test_a_wrong_condition_changes_nothing() -> None:
    bank = Behaviour(Conditions(latency="0.5"), seed=None)
    for wrong in (Conditions(latency="2..1"), Conditions(success_rate=1.1), Conditions(failure_reasons="x=1", latency="9")):
        with pytest.raises(BadConfiguration):
            bank.adopt(wrong)
    assert (bank.latency_s(), bank.conditions) == (0.5, Conditions(latency="0.5"))


# ── Idempotency keys ──

SAVED = SavedAnswer(fingerprint=b"a", status=500, body=b"{}", saved=1000.0)


def test_a_key_is_remembered_for_a_day_with_whatever_was_answered() -> None:
    assert judge("k", b"a", None, 1000.0) is None
    assert judge("k", b"a", SAVED, 1000.0 + REMEMBERED_S - 1) is SAVED
    assert judge("k", b"a", SAVED, 1000.0 + REMEMBERED_S) is None
    assert judge("k", b"b", SAVED, 1000.0 + REMEMBERED_S) is None


def test_a_key_for_another_request_is_refused() -> None:
    with pytest.raises(ApiError) as refusal:
        judge("k", b"b", SAVED, 1001.0)
    assert (refusal.value.status, refusal.value.error["type"]) == (400, "idempotency_error")


def test_requests_are_the_same_whatever_the_order_of_their_parameters() -> None:
    one, two = [("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")]
    assert fingerprint("POST", "/x", one) == fingerprint("POST", "/x", two)
    assert len({fingerprint("POST", "/x", one), fingerprint("POST", "/y", one), fingerprint("POST", "/x", one[:1])}) == 3


async def test_a_key_belongs_to_one_request_at_a_time() -> None:
    keys = Keys(Storage(None), SandboxClock(0.0, lambda _: None))
    assert keys.claim("k", b"a") is None
    with pytest.raises(ApiError) as refusal:
        keys.claim("k", b"a")
    assert (refusal.value.status, refusal.value.error["code"]) == (409, "idempotency_key_in_use")
    keys.release("k")
    assert keys.claim("k", b"b") is None, "what was not saved leaves no trace"
    keys.save("k", b"b", 200, b"{}")
    keys.release("k")
    saved = keys.claim("k", b"b")
    assert saved is not None
    assert (saved.status, saved.body) == (200, b"{}")


async def test_a_key_may_have_255_characters() -> None:
    keys = Keys(Storage(None), SandboxClock(0.0, lambda _: None))
    assert keys.claim("k" * 255, b"a") is None
    with pytest.raises(ApiError):
        keys.claim("k" * 256, b"a")


# ── Parameters ──


def test_bracket_notation_is_read_as_stripe_means_it() -> None:
    wish = creation(**{"metadata[order_id]": "o1", "metadata[none]": "", "expand[]": "latest_charge", "payment_method_types[0]": "card"})
    assert wish.metadata == {"order_id": "o1"}
    assert wish.expand == {"latest_charge"}
    assert (wish.payment_method_types, wish.allow_redirects) == (("card",), None)


def test_redirects_are_accepted_unless_they_are_declined() -> None:
    assert creation().allow_redirects == "always"
    assert creation(**{"automatic_payment_methods[enabled]": "true"}).allow_redirects == "always"
    assert (
        creation(**{"automatic_payment_methods[enabled]": "true", "automatic_payment_methods[allow_redirects]": "never"}).allow_redirects == "never"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"amount": ""}, "amount"),
        ({"amount": "0"}, "amount"),
        ({"amount": "-5"}, "amount"),
        ({"amount": "12.5"}, "amount"),
        ({"amount": "100000000"}, "amount"),
        ({"amount": "9" * 40}, "amount"),
        ({"amount": "5124", "currency": "kwd"}, "amount"),
        ({"amount": "150", "currency": "isk"}, "amount"),
        ({"currency": ""}, "currency"),
        ({"currency": "xyz"}, "currency"),
        ({"capture_method": "later"}, "capture_method"),
        ({"confirm": "yes"}, "confirm"),
        ({"return_url": "https://shop.test"}, "return_url"),
        ({"return_url": "javascript:alert(1)", "confirm": "true"}, "return_url"),
        ({"metadata": "text"}, "metadata"),
        ({"metadata[" + "k" * 41 + "]": "v"}, "metadata[" + "k" * 40 + "]"),
        ({"metadata[k]": "v" * 501}, "metadata[k]"),
        ({"metadata[a][b]": "v"}, "metadata[a]"),
        ({"expand[]": "customer"}, "expand"),
        ({"payment_metod": "pm_card_visa"}, "payment_metod"),
        ({"automatic_payment_methods[redirects]": "never"}, "redirects"),
        ({"payment_method_types[]": "card", "automatic_payment_methods[enabled]": "true"}, "payment_method_types"),
        ({"description": "d" * 1001}, "description"),
        ({"a[": "1"}, "a["),
        ({"[a]": "1"}, "[a]"),
        ({"a[b][c][d][e]": "1"}, "a[b][c][d][e]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, str], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        creation(**fields)
    assert (refusal.value.status, refusal.value.error["param"]) == (400, param)


@pytest.mark.parametrize("text", [b"\xff", b"&".join(b"a=1" for _ in range(201))])
def test_what_is_no_form_is_refused(text: bytes) -> None:
    with pytest.raises(ApiError):
        pairs_of(text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"type": "sepa_debit"}, "type"),
        ({"card[number]": ""}, "card[number]"),
        ({"card[exp_month]": "13"}, "exp_month"),
        ({"card[exp_year]": ""}, "card[exp_year]"),
        ({"card[pin]": "1"}, "pin"),
    ],
)
def test_a_card_names_what_is_wrong_with_it(fields: dict[str, str], param: str) -> None:
    assert "4242424242424242" not in repr(read_card(form(**CARD)))
    with pytest.raises(ApiError) as refusal:
        read_card(form(**CARD | fields))
    assert refusal.value.error["param"] == param
    assert "4242424242424242" not in refusal.value.body().decode()


def test_a_page_and_a_registration_are_bounded_too() -> None:
    assert read_page(form(limit="5", starting_after="pi_1", **{"created[gte]": "17"})).created_from == 17
    for fields in ({"limit": "0"}, {"limit": "101"}, {"created[lt]": "1"}):
        with pytest.raises(ApiError):
            read_page(form(**fields))
    for fields in ({"enabled_events[]": "*"}, {"url": "ftp://x", "enabled_events[]": "*"}, {"url": "https://x.test"}):
        with pytest.raises(ApiError):
            read_registration(form(**fields))
    assert read_confirmation(form(payment_method="pm_card_visa", off_session="true")).payment_method == "pm_card_visa"


def test_a_number_given_for_an_identifier_is_not_repeated() -> None:
    assert "4242" not in str(missing("PaymentMethod", "4242 4242 4242 4242", param="payment_method"))
    assert "pi_12345678901" in str(missing("payment_intent", "pi_12345678901", param="intent"))


# ── Faults ──


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({}, "kind"),
        ({"kind": "fire"}, "kind"),
        ({"kind": "timeout", "operation": "refund"}, "operation"),
        ({"kind": "timeout", "times": 0}, "times"),
        ({"kind": "timeout", "times": True}, "times"),
        ({"kind": "timeout", "probability": 1.1}, "probability"),
        ({"kind": "slow", "delay_seconds": "3"}, "delay_seconds"),
        ({"kind": "error_500", "after_charge": "yes"}, "after_charge"),
        ({"kind": "timeout", "match": {"order_id": "o1"}}, "match"),
        ({"kind": "timeout", "match": {"metadata": {"order_id": 1}}}, "match"),
        ({"kind": "webhook_late", "event_type": 5}, "event_type"),
        ({"kind": "timeout", "time": 3}, "time"),
    ],
)
def test_a_fault_that_can_not_strike_is_refused_by_name(wish: dict[str, Any], param: str) -> None:
    faults = Faults(random.Random(1))
    with pytest.raises(ApiError) as refusal:
        faults.order(wish)
    assert refusal.value.error["param"] == param
    assert not faults.waiting


def test_faults_strike_what_they_fit_the_oldest_first_until_they_are_used_up() -> None:
    faults = Faults(random.Random(1))
    faults.order({"kind": "answer_lost", "operation": "confirm", "times": 2, "match": {"metadata": {"order_id": "o1"}}})
    faults.order({"kind": "rate_limit"})
    faults.order({"kind": "webhook_never", "event_type": "payment_intent.succeeded"})

    def struck(operation: str, order: str) -> str | None:
        fault = faults.for_call(operation, {"order_id": order}, replayed=False)
        return None if fault is None else fault.kind

    assert [struck("confirm", "o1"), struck("create", "o1"), struck("confirm", "o1"), struck("confirm", "o1")] == [
        "answer_lost",
        "rate_limit",
        "answer_lost",
        None,
    ]
    assert faults.for_event("charge.succeeded", {}) is None
    assert faults.for_event("payment_intent.succeeded", {}) is not None
    assert not faults.waiting
    assert [fault["struck"] for fault in faults.shown()] == [1, 2, 1]


def test_a_fault_with_a_probability_goes_on_and_strikes_about_that_often() -> None:
    faults = Faults(random.Random(1))
    faults.order({"kind": "timeout", "probability": 0.25})
    assert 200 < sum(faults.for_call("create", {}, replayed=False) is not None for _ in range(1000)) < 300


def test_a_replayed_answer_does_not_turn_into_an_error() -> None:
    faults = Faults(random.Random(1))
    faults.order({"kind": "error_500"})
    assert faults.for_call("confirm", {}, replayed=True) is None
    faults.order({"kind": "answer_lost"})
    assert faults.for_call("confirm", {}, replayed=True) is not None


def test_kinds_are_of_calls_or_of_events() -> None:
    assert not set(CALL_KINDS) & set(WEBHOOK_KINDS)


# ── Figures ──


def test_retries_back_off_to_an_hour() -> None:
    waits = [retry_after(attempts) for attempts in range(1, 200)]
    assert waits[:4] == [1, 2, 4, 8]
    assert waits == sorted(waits)
    assert waits[-1] == 3600


@pytest.mark.parametrize(
    ("currency", "told", "minor"), [("eur", 1999, 1999), ("isk", 50_000, 500), ("ugx", 50_000, 500), ("mga", 5, 500), ("kwd", 5120, 5120)]
)
def test_the_ledger_counts_in_minor_units(currency: str, told: int, minor: int) -> None:
    taken = Charge(
        id="ch_1",
        created=0,
        payment_intent="pi_1",
        amount=told,
        currency=currency,
        payment_method="pm_1",
        status="succeeded",
        captured=True,
        amount_captured=told,
    )
    entry = ledger_entry(taken, "2026-01-01T00:00:00Z")
    assert (entry["amount_minor"], entry["captured_minor"], entry["currency"], entry["status"]) == (minor, minor, currency.upper(), "captured")
