"""What the API shows: Stripe's JSON objects, made from what is stored.

Rule: this file only renders. Fields have Stripe's names and shapes (docs.stripe.com/api); those that this subset has no use for are null, because
clients of the official SDK read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from infra.sandbox.cards import PaymentMethod
from infra.sandbox.errors import doc_url
from infra.sandbox.intents import Charge, Intent, PaymentError, Status
from infra.sandbox.storage import Endpoint

API_VERSION: Final = "2026-10-28.endive"
Json = dict[str, Any]

_NO_BILLING: Final[Json] = {"address": None, "email": None, "name": None, "phone": None, "tax_id": None}


def payment_intent(intent: Intent, base_url: str) -> Json:
    return {
        "id": intent.id,
        "object": "payment_intent",
        "amount": intent.amount,
        "amount_capturable": intent.amount_capturable,
        "amount_received": intent.amount_received,
        "automatic_payment_methods": _automatic(intent),
        "canceled_at": intent.canceled_at,
        "cancellation_reason": intent.cancellation_reason,
        "capture_method": intent.capture_method,
        "client_secret": intent.client_secret,
        "confirmation_method": "automatic",
        "created": intent.created,
        "currency": intent.currency,
        "customer": None,
        "description": intent.description,
        "last_payment_error": None if intent.last_payment_error is None else payment_error(intent.last_payment_error),
        "latest_charge": intent.latest_charge,
        "livemode": False,
        "metadata": intent.metadata,
        "next_action": _next_action(intent, base_url),
        "payment_method": intent.payment_method,
        "payment_method_types": intent.payment_method_types,
        "processing": None,
        "receipt_email": None,
        "setup_future_usage": None,
        "shipping": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": intent.status,
    }


def _automatic(intent: Intent) -> Json | None:
    return None if intent.allow_redirects is None else {"enabled": True, "allow_redirects": intent.allow_redirects}


def _next_action(intent: Intent, base_url: str) -> Json | None:
    """Stripe shows `redirect_to_url` where there is an address to return to and leaves the rest to Stripe.js; the sandbox has a page for both."""
    if intent.status is not Status.REQUIRES_ACTION:
        return None
    page = f"{base_url}/3ds/{intent.id}/{intent.challenge}"
    return {"type": "redirect_to_url", "redirect_to_url": {"url": page, "return_url": intent.return_url}}


def payment_error(error: PaymentError) -> Json:
    """The error of a failed try: what `last_payment_error` holds, and the body of a 402."""
    shown: Json = {
        "type": "invalid_request_error" if error.charge is None else "card_error",
        "code": error.decline.code,
        "doc_url": doc_url(error.decline.code),
        "message": error.decline.message,
        "payment_method": payment_method(error.method),
    }
    if error.charge is not None:
        shown["charge"] = error.charge
    if error.decline.decline_code is not None:
        shown["decline_code"] = error.decline.decline_code
    if error.decline.advice_code is not None:
        shown["advice_code"] = error.decline.advice_code
    return shown


def charge(paid: Charge, base_url: str) -> Json:
    return {
        "id": paid.id,
        "object": "charge",
        "amount": paid.amount,
        "amount_captured": paid.amount_captured,
        "amount_refunded": paid.amount_refunded,
        "balance_transaction": None,
        "billing_details": _NO_BILLING,
        "captured": paid.captured,
        "created": paid.created,
        "currency": paid.currency,
        "customer": None,
        "description": paid.description,
        "disputed": False,
        "failure_code": None if paid.decline is None else paid.decline.code,
        "failure_message": None if paid.decline is None else paid.decline.message,
        "livemode": False,
        "metadata": paid.metadata,
        "outcome": _outcome(paid),
        "paid": paid.status == "succeeded",
        "payment_intent": paid.payment_intent,
        "payment_method": paid.payment_method,
        "receipt_url": f"{base_url}/receipts/{paid.id}" if paid.status == "succeeded" else None,
        "refunded": False,
        "status": paid.status,
    }


def _outcome(paid: Charge) -> Json | None:
    if paid.status == "pending":
        return None
    return {
        "advice_code": None if paid.decline is None else paid.decline.advice_code,
        "network_status": "approved_by_network" if paid.decline is None else "declined_by_network",
        "reason": None if paid.decline is None else paid.decline.decline_code,
        "risk_level": "normal",
        "seller_message": "Payment complete." if paid.decline is None else paid.decline.message,
        "type": "authorized" if paid.decline is None else "issuer_declined",
    }


def payment_method(method: PaymentMethod) -> Json:
    shown: Json = {
        "id": method.id,
        "object": "payment_method",
        "billing_details": _NO_BILLING,
        "created": method.created,
        "customer": None,
        "livemode": False,
        "metadata": {},
        "type": method.type,
    }
    if method.type == "card":
        shown["card"] = {
            "brand": method.brand,
            "country": "US",
            "exp_month": method.exp_month,
            "exp_year": method.exp_year,
            "funding": "credit",
            "last4": method.last4,
        }
    else:
        shown["us_bank_account"] = {"account_type": "checking", "bank_name": "SANDBOX BANK", "last4": method.last4}
    return shown


def webhook_endpoint(endpoint: Endpoint, *, with_secret: bool = False) -> Json:
    """Its secret is shown to whoever registers it, and to nobody later."""
    shown: Json = {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "api_version": API_VERSION,
        "application": None,
        "created": endpoint.created,
        "description": endpoint.description,
        "enabled_events": endpoint.enabled_events,
        "livemode": False,
        "metadata": endpoint.metadata,
        "status": "enabled",
        "url": endpoint.url,
    }
    if with_secret:
        shown["secret"] = endpoint.secret
    return shown


def event(
    identifier: str, created: int, event_type: str, subject: Json, *, pending_webhooks: int, request_id: str | None, idempotency_key: str | None
) -> Json:
    return {
        "id": identifier,
        "object": "event",
        "api_version": API_VERSION,
        "created": created,
        "data": {"object": subject},
        "livemode": False,
        "pending_webhooks": pending_webhooks,
        "request": {"id": request_id, "idempotency_key": idempotency_key},
        "type": event_type,
    }


def listing(url: str, items: Sequence[Any], *, has_more: bool) -> Json:
    return {"object": "list", "url": url, "has_more": has_more, "data": items}


# Where Stripe's unit of an amount is not ISO 4217's minor unit: what to multiply with, and divide by, to get there (docs.stripe.com/currencies).
_ISO_MINOR: Final = {"isk": (1, 100), "ugx": (1, 100), "mga": (100, 1)}


def ledger_entry(taken: Charge, created_at: str) -> Json:
    """A charge as the ledger shows it, in ISO 4217 minor units: `authorized` holds money, `captured` took it, `released` gave it back untaken."""
    factor, divisor = _ISO_MINOR.get(taken.currency, (1, 1))
    return {
        "id": taken.id,
        "payment_intent": taken.payment_intent,
        "payment_id": taken.metadata.get("payment_id"),
        "order_id": taken.metadata.get("order_id"),
        "amount_minor": taken.amount * factor // divisor,
        "captured_minor": taken.amount_captured * factor // divisor,
        "refunded_minor": taken.amount_refunded * factor // divisor,
        "currency": taken.currency.upper(),
        "status": "captured" if taken.captured else "released" if taken.released else "authorized",
        "created_at": created_at,
    }
