"""What analytics makes of payment events.

Rule: pure folds over events, in order, each event once: no I/O, no clock, nothing but the row before and the event. So a replay from the first event
gives the same rows again, and touches nobody.
Flow: handler loads the rows of a batch -> project(views, event) for each event -> the store writes what changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from schemas.errors import Rejected
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
)
from schemas.state import PaymentStatus
from schemas.views import AttemptRow, PaymentRow, Views

STATUS_AFTER: Final[Mapping[type[PaymentEvent], PaymentStatus]] = {
    PaymentInitiated: PaymentStatus.PENDING,
    PaymentProcessing: PaymentStatus.PROCESSING,
    PaymentActionRequired: PaymentStatus.REQUIRES_ACTION,
    PaymentAuthorized: PaymentStatus.AUTHORIZED,
    PaymentCompleted: PaymentStatus.COMPLETED,
    PaymentFailed: PaymentStatus.FAILED,
    PaymentCancelled: PaymentStatus.CANCELLED,
    PaymentRefundInitiated: PaymentStatus.COMPLETED,
}
_ENDS: Final = frozenset({PaymentStatus.COMPLETED, PaymentStatus.FAILED, PaymentStatus.CANCELLED})

_AboutAttempt = PaymentProcessing | PaymentActionRequired | PaymentAuthorized | PaymentCompleted | PaymentFailed


def project(views: Views, event: PaymentEvent) -> None:
    """Fold the next event of its payment into the rows. Raises Rejected if the payment is not there and this event does not open it."""
    views.payments[event.payment_id] = payment_after(views.payments.get(event.payment_id), event)
    if isinstance(event, _AboutAttempt):
        key = (event.payment_id, event.attempt)
        views.attempts[key] = attempt_after(views.attempts.get(key), event)


def payment_after(row: PaymentRow | None, event: PaymentEvent) -> PaymentRow:
    """A payment's row after `event`."""
    status = STATUS_AFTER[type(event)]
    if row is None:
        if not isinstance(event, PaymentInitiated):
            raise Rejected(f"{event.event_type} is the first event of payment {event.payment_id}; it has to be {PaymentInitiated.event_type}")
        return PaymentRow(
            payment_id=event.payment_id,
            order_id=event.order_id,
            status=status,
            gateway=event.gateway,
            currency=event.currency,
            amount_minor=event.amount_minor,
            initiated_at=event.occurred_at,
            version=event.version,
        )
    if status != row.status:
        row = replace(row, status=status, ended_at=event.occurred_at if status in _ENDS else None)
    match event:
        case PaymentFailed():
            return replace(row, version=event.version, failure_code=event.failure_code)
        case PaymentProcessing():
            return replace(row, version=event.version, failure_code=None)
        case PaymentCompleted() | PaymentRefundInitiated():
            return replace(row, version=event.version, failure_code=None, captured_minor=event.captured_minor)
        case _:
            return replace(row, version=event.version)


def attempt_after(row: AttemptRow | None, event: _AboutAttempt) -> AttemptRow:
    """An attempt's row after `event`. Most begin with PAYMENT_PROCESSING; one that is captured after all on a cancelled payment does not."""
    latency_ms = None if isinstance(event, PaymentProcessing) else event.gateway_latency_ms
    if latency_ms is None and row is not None:
        latency_ms = row.gateway_latency_ms
    return AttemptRow(
        payment_id=event.payment_id,
        attempt=event.attempt,
        gateway=event.gateway,
        outcome=STATUS_AFTER[type(event)],
        failure_code=event.failure_code if isinstance(event, PaymentFailed) else None,
        gateway_latency_ms=latency_ms,
        at=row.at if row is not None else event.occurred_at,
    )
