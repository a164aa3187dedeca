"""Cards that can be tried, and what the bank behind each of them does.

Rule: a card number is looked at once, in `method_for_number`, and dropped. What is kept is the brand, the last four digits and how the bank behaves.
Numbers and names are Stripe's own (docs.stripe.com/testing), so that what works here works with real test keys.
Flow: payment method -> `Behaviour.decide` -> a verdict -> the intent's machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from infra.sandbox.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline:
    """Why a bank says no. `advice_code` tells what may help: try_again_later, confirm_card_data or do_not_try_again."""

    code: str
    message: str
    decline_code: str | None = None
    advice_code: str | None = None


DECLINES: Final[Mapping[str, Decline]] = {
    "card_declined": Decline(code="card_declined", decline_code="generic_decline", advice_code="try_again_later", message="Your card was declined."),
    "insufficient_funds": Decline(
        code="card_declined", decline_code="insufficient_funds", advice_code="try_again_later", message="Your card has insufficient funds."
    ),
    "lost_card": Decline(code="card_declined", decline_code="lost_card", advice_code="do_not_try_again", message="Your card was declined."),
    "stolen_card": Decline(code="card_declined", decline_code="stolen_card", advice_code="do_not_try_again", message="Your card was declined."),
    "expired_card": Decline(code="expired_card", decline_code="expired_card", advice_code="do_not_try_again", message="Your card has expired."),
    "incorrect_cvc": Decline(
        code="incorrect_cvc", decline_code="incorrect_cvc", advice_code="confirm_card_data", message="Your card's security code is incorrect."
    ),
    "processing_error": Decline(
        code="processing_error",
        decline_code="processing_error",
        advice_code="try_again_later",
        message="An error occurred while processing your card. Try again in a little bit.",
    ),
}
AUTHENTICATION_FAILED: Final = Decline(
    code="payment_intent_authentication_failure",
    message="The provided PaymentMethod has failed authentication. You can provide payment_method_data or a new PaymentMethod to attempt to "
    "fulfill this PaymentIntent again.",
)
DEBIT_RETURNED: Final = Decline(code="payment_method_provider_decline", message="The customer's bank returned the debit.")

APPROVES: Final = "approves"
AUTHENTICATES: Final = "authenticates"
PROCESSES: Final = "processes"


class Verdict(StrEnum):
    APPROVED = "approved"
    CHALLENGED = "challenged"
    SUBMITTED = "submitted"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentMethod:
    """`behaviour` is what the bank will do: one of the three above, or a key of `DECLINES`."""

    id: str
    created: int
    type: str
    brand: str | None
    last4: str
    exp_month: int | None
    exp_year: int | None
    behaviour: str


TEST_CARDS: Final[Mapping[str, tuple[str, str]]] = {
    "4242424242424242": ("visa", APPROVES),
    "5555555555554444": ("mastercard", APPROVES),
    "4000000000000002": ("visa", "card_declined"),
    "4000000000009995": ("visa", "insufficient_funds"),
    "4000000000009987": ("visa", "lost_card"),
    "4000000000009979": ("visa", "stolen_card"),
    "4000000000000069": ("visa", "expired_card"),
    "4000000000000127": ("visa", "incorrect_cvc"),
    "4000000000000119": ("visa", "processing_error"),
    "4000002760003184": ("visa", AUTHENTICATES),
}


def _named(name: str, number: str) -> PaymentMethod:
    brand, behaviour = TEST_CARDS[number]
    return PaymentMethod(id=name, created=0, type="card", brand=brand, last4=number[-4:], exp_month=12, exp_year=2035, behaviour=behaviour)


NAMED_METHODS: Final[Mapping[str, PaymentMethod]] = {
    method.id: method
    for method in (
        _named("pm_card_visa", "4242424242424242"),
        _named("pm_card_mastercard", "5555555555554444"),
        _named("pm_card_chargeDeclined", "4000000000000002"),
        _named("pm_card_chargeDeclinedInsufficientFunds", "4000000000009995"),
        _named("pm_card_chargeDeclinedLostCard", "4000000000009987"),
        _named("pm_card_chargeDeclinedStolenCard", "4000000000009979"),
        _named("pm_card_chargeDeclinedExpiredCard", "4000000000000069"),
        _named("pm_card_chargeDeclinedIncorrectCvc", "4000000000000127"),
        _named("pm_card_chargeDeclinedProcessingError", "4000000000000119"),
        _named("pm_card_threeDSecure2Required", "4000002760003184"),
        PaymentMethod(
            id="pm_usBankAccount_processing",
            created=0,
            type="us_bank_account",
            brand=None,
            last4="0009",
            exp_month=None,
            exp_year=None,
            behaviour=PROCESSES,
        ),
    )
}


def method_for_number(number: str, *, identifier: str, exp_month: int, exp_year: int, now: int) -> PaymentMethod:
    """The payment method that a card number stands for. Raises ApiError where the number is no card's, or not one of the test cards."""
    digits = number.replace(" ", "").replace("-", "")
    if not (digits.isascii() and digits.isdigit() and 12 <= len(digits) <= 19 and _luhn(digits)):
        raise ApiError(402, "card_error", "Your card number is incorrect.", code="incorrect_number", param="number")
    if digits not in TEST_CARDS:
        raise ApiError(
            402,
            "card_error",
            "Your card was declined. Your request was in test mode, but used a non test card. For a list of valid test cards, visit: "
            "https://stripe.com/docs/testing.",
            code="card_declined",
            decline_code="test_mode_live_card",
        )
    brand, behaviour = TEST_CARDS[digits]
    return PaymentMethod(
        id=identifier,
        created=now,
        type="card",
        brand=brand,
        last4=digits[-4:],
        exp_month=exp_month,
        exp_year=exp_year,
        behaviour=behaviour,
    )


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0
