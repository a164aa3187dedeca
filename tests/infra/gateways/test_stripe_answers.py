"""Stripe's answers, read. Intents and errors are written as Stripe's documents show them."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
import pytest
import stripe
from aiohttp.client_reqrep import ConnectionKey

from infra.gateways.stripe_answers import Blame, explained, failure_told, shown_by
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
from schemas.state import Failure, NextAction

pytestmark = pytest.mark.unit

DECLINE = {"type": "card_error", "code": "card_declined", "decline_code": "insufficient_funds", "message": "Your card has insufficient funds."}
DECLINED = Failure(code="insufficient_funds", message="Your card has insufficient funds.", advice="change_method")


def intent(status: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "pi_1",
        "object": "payment_intent",
        "status": status,
        "amount": 1999,
        "amount_capturable": 0,
        "amount_received": 0,
        "cancellation_reason": None,
        "client_secret": "pi_1_secret_x",
        "currency": "eur",
        "last_payment_error": None,
        "latest_charge": None,
        "next_action": None,
    } | fields


TO_URL = {"type": "redirect_to_url", "redirect_to_url": {"url": "https://hooks.stripe.com/3ds", "return_url": "https://shop.example"}}

SHOWN = [
    (intent("requires_confirmation"), Created(gateway_id="pi_1", client_secret="pi_1_secret_x")),
    (intent("requires_payment_method"), Created(gateway_id="pi_1", client_secret="pi_1_secret_x")),
    (intent("requires_payment_method", last_payment_error=DECLINE), Declined(gateway_id="pi_1", failure=DECLINED)),
    (
        intent("requires_action", next_action=TO_URL),
        ActionRequired(
            gateway_id="pi_1",
            next_action=NextAction(type="redirect_to_url", redirect_url="https://hooks.stripe.com/3ds"),
            client_secret="pi_1_secret_x",
        ),
    ),
    (
        intent("requires_action", next_action={"type": "use_stripe_sdk", "use_stripe_sdk": {}}),
        ActionRequired(gateway_id="pi_1", next_action=NextAction(type="use_stripe_sdk"), client_secret="pi_1_secret_x"),
    ),
    (intent("processing"), Processing(gateway_id="pi_1")),
    (
        intent("requires_capture", amount_capturable=1999, latest_charge={"id": "ch_1"}),
        Authorized(gateway_id="pi_1", amount_minor=1999, transaction_id="ch_1"),
    ),
    (
        intent("succeeded", amount_received=1500, latest_charge={"id": "ch_1", "receipt_url": "https://pay.stripe.com/r"}),
        Captured(gateway_id="pi_1", captured_minor=1500, transaction_id="ch_1", receipt_url="https://pay.stripe.com/r"),
    ),
    (
        intent("succeeded", amount_received=500, currency="isk", latest_charge="ch_1"),
        Captured(gateway_id="pi_1", captured_minor=5, transaction_id="ch_1"),
    ),
    (intent("canceled", cancellation_reason="abandoned"), Voided(gateway_id="pi_1", reason="abandoned")),
]


@pytest.mark.parametrize(("told", "observation"), SHOWN)
def test_an_intent_shows(told: dict[str, Any], observation: Observation) -> None:
    assert shown_by(told, None) == observation


@pytest.mark.parametrize(
    "told",
    [
        intent("a_status_of_tomorrow"),
        intent("succeeded", amount_received=1999, latest_charge=None),
        intent("succeeded", amount_received=550, currency="isk", latest_charge="ch_1"),
        intent("requires_action"),
        {"object": "payment_intent"},
        ["no", "object"],
        None,
    ],
)
def test_an_intent_that_can_not_be_read_is_unknown_not_failed(told: Any) -> None:
    seen = shown_by(told, "pi_1")
    assert isinstance(seen, Unknown)
    assert seen.gateway_id == "pi_1"


# ── No answer ──

KEY = ConnectionKey(
    host="api.stripe.com", port=443, is_ssl=True, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None, server_hostname=None
)


@pytest.mark.parametrize(
    ("cause", "outcome"),
    [
        (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(111, "refused")), NotSent),
        (aiohttp.ClientConnectorDNSError(KEY, socket.gaierror(-2, "unknown")), NotSent),
        (aiohttp.ClientConnectorCertificateError(KEY, Exception("expired")), NotSent),
        (aiohttp.ConnectionTimeoutError("connecting"), NotSent),
        (aiohttp.ServerDisconnectedError(), Unknown),
        (aiohttp.ClientOSError(104, "reset"), Unknown),
        (aiohttp.SocketTimeoutError("reading"), Unknown),
        (aiohttp.ClientPayloadError("cut off"), Unknown),
        (TimeoutError(), Unknown),
    ],
)
def test_only_what_never_had_a_connection_was_surely_not_sent(cause: Exception, outcome: type[Observation]) -> None:
    told = explained(cause, "pi_1")
    assert isinstance(told.observation, outcome)
    assert told.observation.gateway_id == "pi_1"
    assert told.blame is Blame.GATEWAY


# ── Advice ──


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        ({"code": "card_declined", "decline_code": "generic_decline", "advice_code": "try_again_later"}, "generic_decline", "retry"),
        ({"code": "card_declined", "decline_code": "generic_decline", "advice_code": "do_not_try_again"}, "generic_decline", "change_method"),
        ({"code": "card_declined", "decline_code": "generic_decline"}, "generic_decline", "change_method"),
        ({"code": "card_declined", "decline_code": "stolen_card", "advice_code": "try_again_later"}, "stolen_card", "change_method"),
        ({"code": "incorrect_cvc", "advice_code": "confirm_card_data"}, "incorrect_cvc", "change_method"),
        ({"code": "processing_error", "decline_code": "processing_error"}, "processing_error", "retry"),
        ({"code": "authentication_required", "decline_code": "authentication_required"}, "authentication_required", "retry"),
        ({"code": "payment_intent_authentication_failure"}, "payment_intent_authentication_failure", "retry"),
        ({"code": "card_declined", "decline_code": "test_mode_live_card"}, "test_mode_live_card", "contact_support"),
        ({"code": "card_declined", "decline_code": "a_code_of_tomorrow", "advice_code": "advice_of_tomorrow"}, "a_code_of_tomorrow", "change_method"),
        ({}, "card_error", "change_method"),
    ],
)
def test_a_decline_comes_with_advice(error: dict[str, Any], code: str, advice: str) -> None:
    failure = failure_told(error)
    assert (failure.code, failure.advice) == (code, advice)
    assert failure.message


def test_a_message_carries_no_card_number_and_no_secret_and_has_an_end() -> None:
    failure = failure_told({"code": "card_declined", "message": "No such card: 4242 4242 4242 4242, pi_1_secret_abcdef. " + "x" * 1000})
    assert "4242" not in failure.message
    assert "abcdef" not in failure.message
    assert len(failure.message) <= 300


def test_a_state_in_the_way_is_told_unless_it_says_that_nothing_happened() -> None:
    def refused(shown: dict[str, Any]) -> Observation:
        body = {"error": {"type": "invalid_request_error", "code": "payment_intent_unexpected_state", "message": "m", "payment_intent": shown}}
        error = stripe.InvalidRequestError("m", None, "payment_intent_unexpected_state", "", 400, body)  # type: ignore[no-untyped-call]
        return explained(error, "pi_1").observation

    assert isinstance(refused(intent("succeeded", amount_received=1999, latest_charge="ch_1")), Captured)
    assert isinstance(refused(intent("canceled")), Voided)
    assert isinstance(refused(intent("requires_payment_method")), Refused)


@pytest.mark.parametrize("status", [413, 414, 431])
@pytest.mark.parametrize("body", [None, {"error": {"type": "invalid_request_error", "message": "Request too large."}}], ids=["a proxy", "Stripe"])
def test_what_is_too_large_to_be_read_is_refused_and_not_tried_again(status: int, body: dict[str, Any] | None) -> None:
    told = explained(stripe.APIError("too large", None, status, body), "pi_1")  # type: ignore[no-untyped-call]
    assert isinstance(told.observation, Refused)
    assert told.observation.gateway_id == "pi_1"
    assert told.observation.failure.advice == "contact_support"
    assert told.blame is None
