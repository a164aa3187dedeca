"""What happens to one message of the orders group.

Rule: one transaction, under the order's lock: what a payment event means for its order is decided, written and marked as applied together. An event
that comes again has a version that was seen; the group sees a selection of a payment's events, so versions have to grow and may have gaps.
Flow: payment-events -> keyed window -> delivery -> handle -> store (order, events, outbox) -> relay -> order-events.

Money for an order that is cancelled or paid already changes nothing here: it is logged and counted. The payments group gives back what it knows to be
unwanted (a second capture, a capture of a cancelled payment).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import Counter

from infra.clock import Clock
from infra.crash_points import at
from infra.database.delivery import Received
from infra.database.orders import OrderStore
from processors.orders.machine import evolve, is_unwanted_capture, react
from schemas.errors import Rejected
from schemas.messages import Message, OrderEvent, PaymentEvent
from schemas.state import Order

log = structlog.get_logger()

TRANSITIONS_TOTAL: Final = Counter("paystream_orders_transitions_total", "Steps of orders from one status to the next", ["from", "to"])
UNWANTED_CAPTURES: Final = Counter(
    "paystream_orders_unwanted_captures_total", "Payments that completed on an order that is paid or cancelled", ["status"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    store: OrderStore
    clock: Clock


async def handle(received: Received, message: Message, deps: Deps) -> None:
    """Apply a payment event to its order, once. Raises Unavailable (nothing is lost, try again) and Rejected (it can never be handled)."""
    if not isinstance(message, PaymentEvent):
        raise Rejected(f"{message.event_type} does not belong on {received.topic}")
    received.expect_key(message.order_id)
    async with deps.store.transaction(received, message) as tx:
        if tx.settled:
            return
        before = tx.order
        events = react(before, message, deps.clock.now())
        await tx.record(_after(before, events), events)
    await at("orders.after_record")
    _tell(before, message, events)


def _after(order: Order | None, events: Sequence[OrderEvent]) -> Order | None:
    for event in events:
        order = evolve(order, event)
    return order


def _tell(before: Order | None, message: PaymentEvent, events: Sequence[OrderEvent]) -> None:
    status: str = before.status if before else ""
    for event in events:
        TRANSITIONS_TOTAL.labels(status, event.status).inc()
        status = event.status
    if is_unwanted_capture(before, message):
        UNWANTED_CAPTURES.labels(status).inc()
        log.warning("a payment completed on an order that does not want it", order_status=status)
