"""The Stripe adapter: payment intents through the official SDK, and its webhooks.

Rule: one HTTP request for each call, never a retry and never a redirect: idempotency keys and timers are ours.
Flow: the payment handler -> StripeGateway -> Calls -> SDK -> stripe_answers -> an observation.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import aiohttp
import orjson
import stripe
import structlog
from prometheus_client import Counter

from infra.gateways.amounts import InexactAmount, to_units
from infra.gateways.breaker import Breaker, GatewayFailed
from infra.gateways.calls import Calls, creation, looked_up
from infra.gateways.port import BadSignature, Webhook
from infra.gateways.stripe_answers import Blame, explained, shown_by
from infra.settings import Settings
from infra.settings import Stripe as StripeSettings
from schemas.errors import Rejected
from schemas.messages import is_order_id
from schemas.observations import Created, NotSent, Observation, Refused
from schemas.state import Attempt, ChargeRequest, Failure

if TYPE_CHECKING:
    from stripe.params import PaymentIntentCancelParams, PaymentIntentCaptureParams, PaymentIntentConfirmParams, PaymentIntentCreateParams

_log: Final = structlog.get_logger(__name__)

API_VERSION: Final = "2026-10-28.endive"
"""The SDK's own, named so that the webhook endpoint can be given the same: snapshots in webhooks follow the endpoint's version, not ours."""
CONNECT_TIMEOUT_S: Final = 3.0
SIGNATURE_TOLERANCE_S: Final = 300
HANDLED_EVENTS: Final = frozenset(
    f"payment_intent.{what}" for what in ("amount_capturable_updated", "canceled", "payment_failed", "processing", "requires_action", "succeeded")
)
_CANCEL_REASONS: Final = frozenset({"abandoned", "duplicate", "fraudulent", "requested_by_customer"})
_EXPAND: Final = ["latest_charge"]

MISUSE: Final = Counter(
    "paystream_gateway_misuse_total", "Calls that a gateway turned away through a fault of ours: alert on any", ["gateway", "reason"]
)


class _Http(stripe.HTTPClient):
    """The SDK's requests, on an aiohttp session without a limit to its pool: the window of payments in flight is the limit.

    The SDK's own `AIOHTTPClient` would follow a redirect, sending a charge twice, and leaves the connection of an answer that breaks off to the
    garbage collector. Errors are aiohttp's: `stripe_answers` tells by them whether anything was sent.
    """

    name = "aiohttp"

    def __init__(self) -> None:
        super().__init__()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context(cafile=stripe.ca_bundle_path)),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def request_async(self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None) -> tuple[bytes, int, Mapping[str, str]]:
        async with self._session.request(method, url, headers=headers, data=post_data, allow_redirects=False) as answer:
            return await answer.read(), answer.status, answer.headers

    async def close_async(self) -> None:
        await self._session.close()


class StripeGateway:
    """Implements `Gateway`. Make it inside a running event loop."""

    name: Final = "stripe"
    key_life: Final = timedelta(hours=24)

    def __init__(self, settings: StripeSettings, api_key: str, breaker: Breaker) -> None:
        # The SDK would log answers, client secrets in them, at DEBUG, and would write an id of this machine into the home directory.
        logging.getLogger("stripe").setLevel(logging.WARNING)
        stripe.enable_telemetry = False
        self._http = _Http()
        self._client = stripe.StripeClient(
            api_key,
            base_addresses={"api": settings.base_url.rstrip("/")},
            stripe_version=API_VERSION,
            max_network_retries=0,
            http_client=self._http,
        )
        self._secrets = tuple(secret.get_secret_value() for secret in settings.webhook_secrets)
        self._longest_s = settings.timeout_s
        self._calls = Calls(self.name, breaker)

    async def create(self, payment_id: str, order_id: str, attempt: Attempt, *, key: str, timeout: float) -> Created | NotSent | Refused:
        request = attempt.request
        try:
            amount = to_units(self.name, request.amount_minor, request.currency)
        except InexactAmount as error:
            return _inexact(error, None)
        params: PaymentIntentCreateParams = {
            "amount": amount,
            "currency": request.currency.lower(),
            "capture_method": "manual" if request.capture_method == "manual" else "automatic",
            "metadata": {**request.metadata, "payment_id": payment_id, "order_id": order_id, "attempt": str(attempt.number)},
            # Methods that lead the customer to another site need an address to come back to.
            "automatic_payment_methods": {"enabled": True, "allow_redirects": "always" if request.return_url else "never"},
        }
        if request.payment_method:
            params["payment_method"] = request.payment_method
        if request.description:
            params["description"] = request.description
        return creation(await self._ask("create", None, timeout, params, key))

    async def confirm(self, gateway_id: str, request: ChargeRequest, *, key: str, timeout: float) -> Observation:
        params: PaymentIntentConfirmParams = {"expand": _EXPAND}
        if request.payment_method:
            params["payment_method"] = request.payment_method
        if request.return_url:
            params["return_url"] = request.return_url
        return await self._ask("confirm", gateway_id, timeout, params, key)

    async def capture(self, gateway_id: str, amount_minor: int | None, currency: str, *, key: str, timeout: float) -> Observation:
        params: PaymentIntentCaptureParams = {"expand": _EXPAND}
        if amount_minor is not None:
            try:
                params["amount_to_capture"] = to_units(self.name, amount_minor, currency)
            except InexactAmount as error:
                return _inexact(error, gateway_id)
        return await self._ask("capture", gateway_id, timeout, params, key)

    async def cancel(self, gateway_id: str, reason: str | None, *, key: str, timeout: float) -> Observation:
        params: PaymentIntentCancelParams = {"expand": _EXPAND}
        if reason in _CANCEL_REASONS:
            params["cancellation_reason"] = reason
        return await self._ask("cancel", gateway_id, timeout, params, key)

    async def retrieve(self, gateway_id: str, *, timeout: float) -> Observation:
        return looked_up(await self._ask("retrieve", gateway_id, timeout, {"expand": _EXPAND}))

    async def _ask(self, operation: str, gateway_id: str | None, timeout: float, params: Mapping[str, Any], key: str | None = None) -> Observation:
        """Send one request, and read what comes of it.

        By the SDK's raw request: `v1.payment_intents` would turn each answer into a tree of objects, which costs more than all the rest of a call.
        """
        if timeout <= 0:
            return NotSent(gateway_id=gateway_id, detail="no time was left to ask")
        path = "/v1/payment_intents"
        if gateway_id is not None:
            path += f"/{quote(gateway_id, safe='')}" + ("" if operation == "retrieve" else f"/{operation}")
        method = "get" if operation == "retrieve" else "post"

        async def ask() -> Observation:
            try:
                async with asyncio.timeout(min(timeout, self._longest_s)):
                    answer = await self._client.raw_request_async(method, path, idempotency_key=key, **params)
            except (stripe.StripeError, aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
                told = explained(error, gateway_id)
                if told.blame is Blame.GATEWAY:
                    raise GatewayFailed(told.observation) from error
                if told.blame is not None:
                    MISUSE.labels(self.name, told.blame).inc()
                    _log.error("stripe turned a call away through a fault of ours", operation=operation, gateway_id=gateway_id, reason=told.blame)
                return told.observation
            return shown_by(answer.data, gateway_id)

        return await self._calls(operation, gateway_id, ask)

    def handles(self, event_type: str) -> bool:
        return event_type in HANDLED_EVENTS

    def read_webhook(self, body: bytes, signature: str) -> Webhook:
        if not any(_signed(body, signature, secret) for secret in self._secrets):
            raise BadSignature
        return self.read_verified_webhook(body)

    def read_verified_webhook(self, body: bytes) -> Webhook:
        try:
            event = orjson.loads(body)
            told = event["data"]["object"]
            event_id, event_type, object_id = str(event["id"]), str(event["type"]), str(told["id"])
            is_intent = told.get("object") == "payment_intent"
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise Rejected(f"the webhook is no Stripe event ({type(error).__name__})") from error
        observation = shown_by(told, object_id) if is_intent else None
        return Webhook(event_id=event_id, event_type=event_type, object_id=object_id, observation=observation, **_ours(told.get("metadata")))

    async def aclose(self) -> None:
        await self._http.close_async()


def stripe_gateway(settings: Settings) -> StripeGateway | None:
    """The gateway as it is configured; None where no API key is set."""
    if settings.stripe.api_key is None:
        return None
    return StripeGateway(settings.stripe, settings.stripe.api_key.get_secret_value(), Breaker(StripeGateway.name))


def _inexact(error: InexactAmount, gateway_id: str | None) -> Refused:
    return Refused(gateway_id=gateway_id, failure=Failure(code="amount_not_exact", message=error.detail, advice="none"))


def _signed(body: bytes, signature: str, secret: str) -> bool:
    """Whether `secret` made one of the header's signatures, at most five minutes ago. What is neither UTF-8 nor ASCII was not made by Stripe."""
    try:
        return bool(stripe.WebhookSignature.verify_header(body, signature, secret, SIGNATURE_TOLERANCE_S))
    except (stripe.SignatureVerificationError, UnicodeDecodeError, TypeError):
        return False


def _ours(metadata: object) -> dict[str, Any]:
    """What `create` wrote into the object. Metadata can be edited by hand at Stripe: what does not look like ours is not."""
    if not isinstance(metadata, Mapping):
        return {}
    order_id, payment_id, attempt = (str(metadata.get(name, "")) for name in ("order_id", "payment_id", "attempt"))
    try:
        uuid.UUID(payment_id)
    except ValueError:
        return {}
    if not (is_order_id(order_id) and attempt.isascii() and attempt.isdecimal()):
        return {}
    return {"order_id": order_id, "payment_id": payment_id, "attempt": int(attempt)}
