"""The order state machine, as far as payments move an order.

Rule: everything that decides what becomes of an order is in this file. No I/O, no clock, no randomness.
Flow: handler loads Order -> react(order, payment event, now) -> events -> store appends them; evolve gives the next Order.

An order may see several payments: one fails and another is opened, or an old one is paid after all because somebody still had its client secret. So:
the first payment that completes pays the order, whichever it is, as the payments group gives every later capture back. A payment that is opened or
tried again becomes the order's payment, and opens a cancelled order again. An end without money (failed, cancelled) moves the order only if it is the
end of the order's payment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from schemas.errors import IllegalTransition, Rejected
from schemas.messages import (
    OrderCancelled,
    OrderCreated,
    OrderEvent,
    OrderPlaced,
    OrderStatusChanged,
    PaymentCancelled,
    PaymentCompleted,
    PaymentEvent,
    PaymentFailed,
    PaymentInitiated,
    PaymentProcessing,
    derived_id,
    envelope,
)
from schemas.state import Order, OrderStatus

PAYMENT_PENDING, PAYMENT_FAILED = OrderStatus.PAYMENT_PENDING, OrderStatus.PAYMENT_FAILED
PENDING, CANCELLED = OrderStatus.PENDING, OrderStatus.CANCELLED

TRANSITIONS: Final[Mapping[OrderStatus, Mapping[type[PaymentEvent], OrderStatus]]] = {
    PAYMENT_PENDING: {
        PaymentInitiated: PAYMENT_PENDING,  # another payment takes over
        PaymentCompleted: PENDING,
        PaymentFailed: PAYMENT_FAILED,
        PaymentCancelled: CANCELLED,
    },
    PAYMENT_FAILED: {
        PaymentInitiated: PAYMENT_PENDING,
        PaymentProcessing: PAYMENT_PENDING,
        PaymentCompleted: PAYMENT_PENDING,  # and from there to PENDING: steps that were not seen are filled in
        PaymentCancelled: CANCELLED,
    },
    PENDING: {},
    CANCELLED: {
        PaymentInitiated: PAYMENT_PENDING,  # its customer pays after all, by a payment of its own
    },
}
"""What is not listed leaves the order as it is."""

WANTED: Final = frozenset(kind.event_type for moves in TRANSITIONS.values() for kind in moves)
"""The event types that can move an order: the others need not be decoded."""


def react(order: Order | None, event: PaymentEvent, now: datetime) -> tuple[OrderEvent, ...]:
    """What follows from `event` for its order. Raises Rejected if it is about an order that no payment has opened."""
    facts: list[OrderEvent] = []
    if order is None:
        if not isinstance(event, PaymentInitiated):
            raise Rejected(f"{event.event_type} is the first event of order {event.order_id}; it has to be {PaymentInitiated.event_type}")
        facts.append(OrderPlaced(**_said(0, PAYMENT_PENDING, event, now), amount_minor=event.amount_minor, currency=event.currency))
        order = evolve(None, facts[0])
    while (status := _next(order, event)) is not None:
        facts.append(_fact(order, status, event, now))
        order = evolve(order, facts[-1])
    return tuple(facts)


def is_unwanted_capture(order: Order | None, event: PaymentEvent) -> bool:
    """Whether money came for an order that is paid or cancelled already."""
    return order is not None and isinstance(event, PaymentCompleted) and PaymentCompleted not in TRANSITIONS[order.status]


def evolve(order: Order | None, event: OrderEvent) -> Order:
    """The order after `event`. Raises IllegalTransition, and only this function does."""
    if event.payment_id is None or event.version != (order.version if order else 0) + 1:
        raise IllegalTransition(f"{event.event_type} v{event.version} of payment {event.payment_id} on {_name(order)}")
    if order is None and isinstance(event, OrderPlaced):
        return Order(
            order_id=event.order_id,
            user_id=event.user_id,
            status=OrderStatus(event.status),
            payment_id=event.payment_id,
            amount_minor=event.amount_minor,
            currency=event.currency,
            version=event.version,
            updated_at=event.occurred_at,
        )
    if order is None or event.status not in TRANSITIONS[order.status].values():
        raise IllegalTransition(f"{event.event_type} to {event.status} on {_name(order)}")
    order = replace(order, status=OrderStatus(event.status), payment_id=event.payment_id, version=event.version, updated_at=event.occurred_at)
    return replace(order, amount_minor=event.amount_minor, currency=event.currency) if isinstance(event, OrderCreated) else order


def _next(order: Order, event: PaymentEvent) -> OrderStatus | None:
    """Where `event` moves the order to from here, None if it stays."""
    is_its_payment = event.payment_id == order.payment_id
    if isinstance(event, PaymentFailed | PaymentCancelled) and not is_its_payment:
        return None
    status = TRANSITIONS[order.status].get(type(event))
    return None if status is order.status and is_its_payment else status


def _fact(order: Order, status: OrderStatus, event: PaymentEvent, now: datetime) -> OrderEvent:
    said = _said(order.version, status, event, now)
    match event:
        case PaymentCompleted() if status is PENDING:
            return OrderCreated(**said, amount_minor=event.captured_minor, currency=event.currency)
        case PaymentCancelled():
            return OrderCancelled(**said, reason=event.reason)
        case _:
            return OrderStatusChanged(**said, previous_status=order.status)


def _said(version: int, status: OrderStatus, event: PaymentEvent, now: datetime) -> dict[str, Any]:
    """What all order events say. Order ids are chosen by callers and may look like payment ids: so "order" is in the event's id."""
    return envelope(event, now) | {
        "event_id": derived_id("order", event.order_id, version + 1),
        "order_id": event.order_id,
        "payment_id": event.payment_id,
        "user_id": event.user_id,
        "version": version + 1,
        "status": status.value,
    }


def _name(order: Order | None) -> str:
    return f"an order that is {order.status} v{order.version}" if order else "an order that is not there"
