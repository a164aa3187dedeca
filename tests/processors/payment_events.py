"""Payment events as consumers of them get them: one after the other, or whole histories."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any, Final

from infra.database.delivery import Received
from schemas.messages import (
    PaymentActionRequired,
    PaymentAuthorized,
    PaymentCancelled,
    PaymentCompleted,
    PaymentEvent,
    PaymentFailed,
    PaymentInitiated,
    PaymentProcessing,
    PaymentRefundInitiated,
    derived_id,
)
from tests.processors.payment_paths import PATHS, step

NOW: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
ORDER_ID: Final = "ord_1"
PAYMENT_ID: Final = derived_id("a payment")
OTHER_ID: Final = derived_id("another payment")


def _said(version: int, **fields: Any) -> dict[str, Any]:
    """The fields that all payment events have; an event happens a second after the one before."""
    payment_id = fields.get("payment_id", PAYMENT_ID)
    return {
        "event_id": derived_id(payment_id, version),
        "order_id": ORDER_ID,
        "payment_id": payment_id,
        "user_id": "u1",
        "version": version,
        "occurred_at": NOW + timedelta(seconds=version),
        "correlation_id": "c1",
        "gateway": "stripe",
        "currency": "EUR",
        "amount_minor": 1000,
    } | fields


def initiated(version: int = 1, **fields: Any) -> PaymentInitiated:
    return PaymentInitiated(**_said(version, **{"capture_method": "automatic"} | fields))


def processing(version: int = 2, **fields: Any) -> PaymentProcessing:
    return PaymentProcessing(**_said(version, **{"attempt": 1} | fields))


def action_required(version: int = 3, **fields: Any) -> PaymentActionRequired:
    return PaymentActionRequired(**_said(version, **{"attempt": 1, "gateway_latency_ms": 300} | fields))


def authorized(version: int = 3, **fields: Any) -> PaymentAuthorized:
    return PaymentAuthorized(**_said(version, **{"attempt": 1, "transaction_id": "ch_1", "gateway_latency_ms": 400} | fields))


def completed(version: int = 3, **fields: Any) -> PaymentCompleted:
    return PaymentCompleted(**_said(version, **{"attempt": 1, "transaction_id": "ch_1", "captured_minor": 1000, "gateway_latency_ms": 500} | fields))


def failed(version: int = 3, **fields: Any) -> PaymentFailed:
    why = {"failure_code": "card_declined", "failure_message": "The card was declined.", "advice": "change_method"}
    return PaymentFailed(**_said(version, **{"attempt": 1, "gateway_latency_ms": 200} | why | fields))


def cancelled(version: int = 4, **fields: Any) -> PaymentCancelled:
    return PaymentCancelled(**_said(version, **{"reason": "requested_by_caller"} | fields))


def refund_initiated(version: int = 4, **fields: Any) -> PaymentRefundInitiated:
    what = {"refund_id": "r1", "refund_minor": 1000, "captured_minor": 1000, "transaction_id": "ch_1", "reason": "order_already_paid"}
    return PaymentRefundInitiated(**_said(version, **what | fields))


def histories(copies: int = 1) -> list[list[PaymentEvent]]:
    """All events of a payment of an order of its own, for each path that there is, as often as told."""
    found = []
    for path, names in PATHS.items():
        payment, events = None, []
        for name in names:
            payment, decision = step(payment, name)
            events += decision.events
        for copy in range(copies if events else 0):
            payment_id, order_id = derived_id(path, copy), f"ord_{derived_id(path, copy)}"
            found.append([replace(e, event_id=derived_id(payment_id, e.version), payment_id=payment_id, order_id=order_id) for e in events])
    return found


def interleaved(streams: Iterable[Iterable[PaymentEvent]]) -> list[PaymentEvent]:
    """The first event of each, then the second of each, and so on."""
    return [event for events in zip_longest(*streams) for event in events if event is not None]


def received(events: Iterable[PaymentEvent], first_offset: int = 0) -> list[tuple[Received, PaymentEvent]]:
    """The events as they come from one partition. Their bytes are not looked at by handlers."""
    return [
        (Received(topic="payment-events", partition=0, offset=offset, timestamp_ms=None, key=event.order_id.encode(), value=b"\x00"), event)
        for offset, event in enumerate(events, start=first_offset)
    ]
