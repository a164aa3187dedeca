"""What happens to a batch of messages of the orders group.

Rule: one transaction, under the orders' locks: what each payment event means for its order is decided, written and marked as applied together. An
event that comes again has a version that was seen; the group sees a selection of a payment's events, so versions have to grow and may have gaps.
Flow: payment-events -> window -> batch delivery -> handle_batch -> store (orders, events, outbox) -> relay -> order-events.

Money for an order that is cancelled or paid already changes nothing here: it is logged and counted. The payments group gives back what it knows to be
unwanted (a second capture, a capture of a cancelled payment).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog
from prometheus_client import Counter

from infra.clock import Clock
from infra.crash_points import at
from infra.database.delivery import Received
from infra.database.orders import OrderStore, OrderTransaction
from processors.delivery import payment_event_in
from processors.orders.machine import evolve, is_unwanted_capture, react
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


async def handle_batch(batch: Sequence[tuple[Received, Message]], deps: Deps) -> None:
    """Apply a batch, all of it or nothing. Raises Unavailable (nothing is lost, try again) and Rejected (one of them can never be handled)."""
    pairs = [(received, payment_event_in(received, message)) for received, message in batch]
    async with deps.store.transaction([event for _, event in pairs]) as tx:
        applied = [_apply(tx, received, event, deps.clock.now()) for received, event in pairs if not await tx.settled(received, event)]
    await at("orders.after_record")
    for before, event, events in applied:
        _tell(before, event, events)


def _apply(tx: OrderTransaction, received: Received, event: PaymentEvent, now: datetime) -> tuple[Order | None, PaymentEvent, Sequence[OrderEvent]]:
    before = tx.orders.get(event.order_id)
    events = react(before, event, now)
    tx.record(received, event, _after(before, events), events)
    return before, event, events


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
