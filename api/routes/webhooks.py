"""Where gateways tell us that something has changed.

Rule: verified at the edge, kept raw, acknowledged by Kafka before the gateway gets its 2xx: a webhook that was answered is never sent again. What it
says is looked up later, by its object's id; here it is only put where its order's messages are.
Flow: gateway -> POST -> signature -> `payment-webhook-received` (key: the order, else the gateway's object) -> processors/payments.
"""

from __future__ import annotations

from typing import Final

import structlog
from fastapi import APIRouter, Request
from prometheus_client import Counter
from starlette.responses import Response

from api.answers import PREFIX
from api.bodies import read_body
from api.deps import Deps, Given
from api.errors import Problem, documented
from infra.gateways.port import BadSignature, Gateway, Webhook
from producers.producer import Record
from schemas.codec import headers
from schemas.errors import Rejected, Unavailable
from schemas.messages import WebhookReceived, derived_id

log = structlog.get_logger()

TOPIC: Final = "payment-webhook-received"
MAX_BYTES: Final = 512 * 1024
"""An event holds a whole object of the gateway; Kafka takes 1 MiB."""

RECEIVED: Final = Counter("paystream_intake_webhooks_total", "Webhooks by what became of them at the edge", ["gateway", "outcome"])

router = APIRouter(prefix=PREFIX, tags=["webhooks"])
STRIPE: Final = "stripe"


@router.post(
    "/webhooks/stripe",
    status_code=204,
    response_model=None,
    responses={
        204: {"description": "It is kept; or it is of a type that we don't follow"},
        **documented("bad_signature", "invalid_webhook", "not_found", "body_too_large", "outcome_unknown", "unavailable"),
    },
    openapi_extra={
        "parameters": [{"name": "Stripe-Signature", "in": "header", "required": True, "schema": {"type": "string"}}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object", "description": "Stripe's event, as it is"}}}},
    },
)
async def stripe(request: Request, given: Given) -> Response:
    """Stripe's webhooks. Without a signing secret there is no such route."""
    gateway = given.gateways.get(STRIPE)
    if gateway is None or not given.settings.stripe.webhook_secrets:
        raise Problem("not_found")
    body = await read_body(request, MAX_BYTES)
    webhook = _read(gateway, body, request.headers.get("stripe-signature", ""))
    if not gateway.handles(webhook.event_type):
        RECEIVED.labels(gateway.name, "not_followed").inc()
    else:
        await _keep(given, gateway.name, webhook, body, request.state.correlation_id)
        RECEIVED.labels(gateway.name, "kept").inc()
    return Response(status_code=204)


def _read(gateway: Gateway, body: bytes, signature: str) -> Webhook:
    try:
        return gateway.read_webhook(body, signature)
    except BadSignature as error:
        RECEIVED.labels(gateway.name, "bad_signature").inc()
        log.warning("webhook with a bad signature", gateway=gateway.name)
        raise Problem("bad_signature") from error
    except Rejected as error:
        RECEIVED.labels(gateway.name, "invalid").inc()
        raise Problem("invalid_webhook") from error


async def _keep(given: Deps, gateway: str, webhook: Webhook, body: bytes, correlation_id: str) -> None:
    message = WebhookReceived(
        event_id=derived_id(gateway, webhook.event_id),
        order_id=webhook.order_id,
        payment_id=webhook.payment_id,
        user_id=None,
        occurred_at=given.clock.now(),
        correlation_id=correlation_id,
        gateway=gateway,
        gateway_event_id=webhook.event_id,
        gateway_event_type=webhook.event_type,
        object_id=webhook.object_id,
        body=body,
    )
    structlog.contextvars.bind_contextvars(order_id=message.order_id, payment_id=message.payment_id, event_id=message.event_id)
    value = given.codec().encode(message)
    try:
        await given.producer.send(Record(topic=TOPIC, key=message.key.encode(), value=value, headers=headers(message)))
    except Unavailable as error:
        RECEIVED.labels(gateway, "not_kept").inc()
        raise Problem("outcome_unknown", f"{error.part} has not acknowledged it.") from error
