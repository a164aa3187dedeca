"""Stripe's answers, read: a payment intent as it stands, an error, a failure to answer -> what was observed.

Rule: pure. Written after docs.stripe.com/payments/paymentintents/lifecycle, /error-low-level and /declines/codes, and what the SDK raises. What is
not understood is Unknown, never a failure: then Stripe is asked again, and nobody is charged twice or told "failed" for money that moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import aiohttp
import stripe

from infra.gateways.amounts import InexactAmount, from_units
from infra.scrub import cut, scrub
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


class Blame(StrEnum):
    """Whose fault it is that a call was not answered as it should be."""

    GATEWAY = "gateway"
    AUTHENTICATION = "authentication"
    IDEMPOTENCY = "idempotency"


@dataclass(frozen=True, slots=True)
class Explained:
    """What a failed call tells. `blame` is None where Stripe simply said no."""

    observation: Observation
    blame: Blame | None = None


# ── Payment intents ──


def shown_by(intent: Any, gateway_id: str | None) -> Observation:
    """How a payment intent stands, whether it came as an answer, within an error or in a webhook. `gateway_id` is what we asked about."""
    try:
        return _shown_by(intent)
    except (KeyError, TypeError, AttributeError, InexactAmount) as error:
        return Unknown(gateway_id=gateway_id, detail=f"Stripe shows a payment intent that can't be read ({type(error).__name__})")


def _shown_by(intent: Mapping[str, Any]) -> Observation:
    gateway_id: str = intent["id"]
    match intent["status"]:
        case "requires_payment_method" if intent.get("last_payment_error"):
            return Declined(gateway_id=gateway_id, failure=failure_told(intent["last_payment_error"]))
        case "requires_payment_method" | "requires_confirmation":
            return Created(gateway_id=gateway_id, client_secret=intent.get("client_secret"))
        case "requires_action":
            action = intent["next_action"]
            redirect = action.get("redirect_to_url") or {}
            next_action = NextAction(type=action["type"], redirect_url=redirect.get("url"))
            return ActionRequired(gateway_id=gateway_id, next_action=next_action, client_secret=intent.get("client_secret"))
        case "processing":
            return Processing(gateway_id=gateway_id)
        case "requires_capture":
            transaction_id, _ = _charge(intent)
            return Authorized(gateway_id=gateway_id, amount_minor=_minor(intent, "amount_capturable"), transaction_id=transaction_id)
        case "succeeded":
            transaction_id, receipt_url = _charge(intent)
            captured = _minor(intent, "amount_received")
            return Captured(gateway_id=gateway_id, captured_minor=captured, transaction_id=transaction_id, receipt_url=receipt_url)
        case "canceled":
            return Voided(gateway_id=gateway_id, reason=intent.get("cancellation_reason"))
        case status:
            return Unknown(gateway_id=gateway_id, detail=f"Stripe shows the status {str(status)[:40]!r}, which is not known here")


def _minor(intent: Mapping[str, Any], field: str) -> int:
    return from_units("stripe", intent[field], intent["currency"].upper())


def _charge(intent: Mapping[str, Any]) -> tuple[str, str | None]:
    """The charge's id and receipt. Answers have it expanded, webhooks and errors tell its id only."""
    charge = intent["latest_charge"]
    return (charge, None) if isinstance(charge, str) else (charge["id"], charge.get("receipt_url"))


# ── Errors ──


def explained(error: Exception, gateway_id: str | None) -> Explained:
    """What is known of a call's effect after `error`: the SDK's for an answer that is a refusal, aiohttp's or a timeout where there was none.

    By status, since what stands between us and Stripe (a proxy, a firewall) answers without Stripe's error body.
    """
    if not isinstance(error, stripe.StripeError):
        return Explained(_no_answer(error, gateway_id), Blame.GATEWAY)
    told = _error_body(error)
    status = error.http_status or 0
    code = told.get("code") or told.get("type")
    detail = f"Stripe answered {status} {code or ''}".rstrip() + (f" ({error.request_id})" if error.request_id else "")
    if status >= 500:
        return Explained(Unknown(gateway_id=gateway_id, detail=detail, key_burnt=True), Blame.GATEWAY)
    if status in (401, 403):
        return Explained(NotSent(gateway_id=gateway_id, detail=detail), Blame.AUTHENTICATION)
    if told.get("type") == "idempotency_error" and status != 409:
        # The key was used for another body: whatever that was may have been done, and this key will never tell.
        return Explained(Unknown(gateway_id=gateway_id, detail=detail, key_burnt=True), Blame.IDEMPOTENCY)
    if status == 409 or code == "lock_timeout":
        # Somebody else, perhaps we before a crash, is at it right now with this key or this object: it may yet be done.
        return Explained(Unknown(gateway_id=gateway_id, detail=detail))
    if isinstance(error, stripe.RateLimitError) or status == 429:
        return Explained(NotSent(gateway_id=gateway_id, detail=detail))
    if status == 402 and told:
        intent = told.get("payment_intent") or {}
        return Explained(Declined(gateway_id=intent.get("id") or gateway_id, failure=failure_told(told)))
    if status in (413, 414, 431):
        return Explained(Refused(gateway_id=gateway_id, failure=_refusal(told)))  # too large to be read, so it was not
    if status in (400, 404) and told:
        return Explained(_state_in_the_way(told, gateway_id) or Refused(gateway_id=gateway_id, failure=_refusal(told)))
    return Explained(Unknown(gateway_id=gateway_id, detail=detail))


def _no_answer(cause: Exception, gateway_id: str | None) -> Unknown | NotSent:
    """Without a connection nothing was sent. After that, anything may have arrived: even a kept-alive connection that "was closed" took the bytes."""
    name = type(cause).__name__
    if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
        return NotSent(gateway_id=gateway_id, detail=f"no connection to Stripe ({name})")
    return Unknown(gateway_id=gateway_id, detail=f"no answer from Stripe ({name})")


def _error_body(error: stripe.StripeError) -> Mapping[str, Any]:
    body = error.json_body
    told = body.get("error") if isinstance(body, dict) else None
    return told if isinstance(told, dict) else {}


def _state_in_the_way(told: Mapping[str, Any], gateway_id: str | None) -> Observation | None:
    """The state that forbids what was asked, if it tells more than that nothing has happened yet."""
    if told.get("code") != "payment_intent_unexpected_state" or not told.get("payment_intent"):
        return None
    shown = shown_by(told["payment_intent"], gateway_id)
    return None if isinstance(shown, Created) else shown


# ── Failures, in words for the payer ──

_ADVICE_BY_CODE: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            "approve_with_id",
            "authentication_required",
            "issuer_not_available",
            "payment_intent_authentication_failure",
            "processing_error",
            "reenter_transaction",
            "try_again_later",
        ),
        "retry",
    ),
    **dict.fromkeys(
        ("expired_card", "fraudulent", "lost_card", "pickup_card", "restricted_card", "stolen_card", "card_not_supported", "currency_not_supported"),
        "change_method",
    ),
    **dict.fromkeys(
        ("duplicate_transaction", "merchant_blacklist", "test_mode_live_card", "testmode_decline", "live_mode_test_card"), "contact_support"
    ),
}
_ADVICE_BY_ADVICE_CODE: Final[Mapping[str, str]] = {
    "try_again_later": "retry",
    "confirm_card_data": "change_method",
    "do_not_try_again": "change_method",
}


def failure_told(error: Mapping[str, Any]) -> Failure:
    """A decline: Stripe writes its message for the card's holder. Cards that are no good are so whatever the network advises; else it knows best."""
    code = _text(error.get("decline_code")) or _text(error.get("code")) or "card_error"
    advice = _ADVICE_BY_CODE.get(code) or _ADVICE_BY_ADVICE_CODE.get(error.get("advice_code") or "", "change_method")
    return Failure(code=code, message=_message(error, "The payment was declined."), advice=advice)


def _refusal(error: Mapping[str, Any]) -> Failure:
    """A request that Stripe finds invalid. Only a payment method that does not exist is the payer's to change."""
    code = _text(error.get("code")) or _text(error.get("type")) or "invalid_request"
    advice = "change_method" if error.get("param") == "payment_method" else "contact_support"
    return Failure(code=code, message=_message(error, "Stripe refused the request."), advice=advice)


def _message(error: Mapping[str, Any], otherwise: str) -> str:
    """Scrubbed and cut: it goes into events, and Stripe repeats what it was told."""
    return cut(scrub(_text(error.get("message")) or otherwise), 300)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
