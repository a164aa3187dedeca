"""What callers get: JSON answers, and their shapes and examples as the API's documentation shows them.

What a payment, an event and a command look like is told by `infra/database/reads.py`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from starlette.responses import Response

from infra.database.reads import EventView, PaymentView
from schemas.messages import Command

PREFIX: Final = "/api/v1"


def document(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer. Nobody between us and the caller may keep it."""
    body = orjson.dumps(content, option=orjson.OPT_UTC_Z)
    return Response(body, status, {"Cache-Control": "private, no-cache", **(headers or {})}, "application/json")


def described(model: type[Any], example: object, description: str = "Found") -> dict[str, Any]:
    """What OpenAPI says about an answer."""
    return {"model": model, "description": description, "content": {"application/json": {"example": example}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The command is taken; what becomes of it is told under `links`."""

    payment_id: str
    order_id: str
    command_id: str
    status: str
    links: dict[str, str]

    @classmethod
    def of(cls, command: Command, payment_status: str) -> Taken:
        payment = f"{PREFIX}/payments/{command.payment_id}"
        return cls(
            payment_id=command.payment_id,
            order_id=command.order_id,
            command_id=command.event_id,
            status=payment_status,
            links={
                "self": payment,
                "events": f"{payment}/events",
                "command": f"{PREFIX}/commands/{command.event_id}",
                "order": f"{PREFIX}/payments/order/{command.order_id}",
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Newest first. `next` is the cursor of the next page, null on the last one."""

    items: Sequence[PaymentView]
    next: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Oldest first."""

    items: Sequence[EventView]


# ── Examples ──

_PAYMENT_ID: Final = "6f0e8a52-9d43-5a3e-8d56-6f2a2f5f3a77"
PAYMENT_EXAMPLE: Final = {
    "payment_id": _PAYMENT_ID,
    "order_id": "order-1001",
    "user_id": "u1",
    "status": "COMPLETED",
    "amount_minor": 1999,
    "captured_minor": 1999,
    "refunded_minor": 0,
    "currency": "EUR",
    "gateway": "stripe",
    "transaction_id": "ch_3Qx",
    "failure": None,
    "next_action": None,
    "version": 3,
    "created_at": "2026-01-31T12:00:00.120000Z",
    "updated_at": "2026-01-31T12:00:01.480000Z",
    "client_secret": None,
}
TAKEN_EXAMPLE: Final = {
    "payment_id": _PAYMENT_ID,
    "order_id": "order-1001",
    "command_id": _PAYMENT_ID,
    "status": "PENDING",
    "links": {
        "self": f"{PREFIX}/payments/{_PAYMENT_ID}",
        "events": f"{PREFIX}/payments/{_PAYMENT_ID}/events",
        "command": f"{PREFIX}/commands/{_PAYMENT_ID}",
        "order": f"{PREFIX}/payments/order/order-1001",
    },
}
PAGE_EXAMPLE: Final = {"items": [PAYMENT_EXAMPLE], "next": None}
TIMELINE_EXAMPLE: Final = {
    "items": [
        {
            "event_id": "3489ea1b-b7b1-56c5-b739-a775657965c3",
            "event_type": "PAYMENT_COMPLETED",
            "version": 3,
            "occurred_at": "2026-01-31T12:00:01.480000Z",
            "topic": "payment-events",
            "partition": 2,
            "offset": 4711,
            "published_at": "2026-01-31T12:00:01.510000Z",
            "data": {"gateway": "stripe", "currency": "EUR", "amount_minor": 1999, "attempt": 1, "transaction_id": "ch_3Qx", "captured_minor": 1999},
        }
    ]
}
COMMAND_EXAMPLE: Final = {
    "command_id": _PAYMENT_ID,
    "command_type": "InitiatePayment",
    "user_id": "u1",
    "order_id": "order-1001",
    "payment_id": _PAYMENT_ID,
    "status": "refused",
    "refusal": {"code": "order_has_payment", "message": "Another payment holds this order."},
    "accepted_at": "2026-01-31T12:00:00.100000Z",
    "decided_at": "2026-01-31T12:00:00.160000Z",
}
SUMMARY_EXAMPLE: Final = {
    "since": "2026-01-30T12:00:00Z",
    "until": "2026-01-31T12:00:00Z",
    "payments": 200,
    "payments_by_status": {"COMPLETED": 171, "AUTHORIZED": 9, "FAILED": 20},
    "volume_by_currency": [{"currency": "EUR", "payments": 200, "amount_minor": 399800, "captured_minor": 341829}],
    "success_rate": 0.9,
    "failure_reasons": [{"code": "insufficient_funds", "payments": 20}],
    "gateway_latency_ms": [{"gateway": "stripe", "calls": 220, "p50": 310.0, "p95": 790.0, "p99": 1240.0}],
}
TIMESERIES_EXAMPLE: Final = {
    "since": "2026-01-31T10:00:00Z",
    "until": "2026-01-31T12:00:00Z",
    "bucket": "hour",
    "items": [
        {
            "at": "2026-01-31T10:00:00Z",
            "payments": 12,
            "payments_by_status": {"COMPLETED": 11, "FAILED": 1},
            "volume_by_currency": [{"currency": "EUR", "payments": 12, "amount_minor": 23988, "captured_minor": 21989}],
        },
        {
            "at": "2026-01-31T11:00:00Z",
            "payments": 0,
            "payments_by_status": {"COMPLETED": 0, "FAILED": 0},
            "volume_by_currency": [{"currency": "EUR", "payments": 0, "amount_minor": 0, "captured_minor": 0}],
        },
    ],
}
