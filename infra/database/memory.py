"""PaymentStore and OrderStore in memory: for running handlers without a database, under a set clock and any order of steps.

Rule: the same contracts as `payments.py` and `orders.py`, and a suite for each that proves it on both. A block that raises leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

from infra.clock import Clock
from infra.database.delivery import Received
from infra.database.payments import ENDED, HOLDS_NO_ORDER, GatewayObject, carried_out, command_of
from schemas.decisions import Decision, Refusal, Timer
from schemas.messages import Message, OrderEvent, PaymentEvent
from schemas.observations import Created
from schemas.state import AttemptStatus, Order, Payment


@dataclass
class MemoryPaymentStore:
    """What would be tables are open to the tests that use it."""

    clock: Clock
    payments: dict[str, Payment] = field(default_factory=dict)
    events: list[PaymentEvent] = field(default_factory=list)
    outbox: list[Message] = field(default_factory=list)
    inbox: set[str] = field(default_factory=set)
    decided: dict[str, Refusal | None] = field(default_factory=dict)
    objects: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    timers: dict[str, tuple[Timer, Payment, str]] = field(default_factory=dict)
    parked_orders: set[str] = field(default_factory=set)
    parked: list[Received] = field(default_factory=list)
    holders: dict[str, str] = field(default_factory=dict)
    open_attempts: dict[str, int] = field(default_factory=dict)
    _locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    @asynccontextmanager
    async def transaction(self, received: Received, message_id: str, payment_id: str, *, again: bool = False) -> AsyncIterator[_MemoryTransaction]:
        order_id = received.order_key or ""
        async with self._locks[order_id]:
            tx = _MemoryTransaction(self, received, message_id)
            tx.settled = not again and (message_id in self.inbox or order_id in self.parked_orders)
            if tx.settled and message_id not in self.inbox:
                self.parked.append(received)
                self.inbox.add(message_id)
            tx.payment = self.payments.get(payment_id)
            tx.order_held_by = self.holders.get(order_id)
            tx.order_paid_by = next(
                (
                    p.payment_id
                    for p in self.payments.values()
                    if p.order_id == order_id and p.payment_id != payment_id and p.captured_minor > p.refunded_minor + p.pending_refund_minor
                ),
                None,
            )
            yield tx
            tx.commit()

    async def remember(self, payment: Payment, number: int, created: Created) -> None:
        kept = self.payments[payment.payment_id]
        attempt = kept.attempts[number - 1]
        if attempt.gateway_id in (None, created.gateway_id):
            known = replace(attempt, gateway_id=created.gateway_id, client_secret=created.client_secret or attempt.client_secret)
            self.payments[payment.payment_id] = replace(kept, attempts=(*kept.attempts[: number - 1], known, *kept.attempts[number:]))
        self.objects.setdefault((attempt.gateway, created.gateway_id), (payment.payment_id, number))

    async def find_object(self, gateway: str, object_id: str) -> GatewayObject | None:
        if (gateway, object_id) not in self.objects:
            return None
        payment_id, number = self.objects[gateway, object_id]
        payment = self.payments[payment_id]
        return GatewayObject(order_id=payment.order_id, attempt=number, payment=payment)

    async def fire_timers(self, now: datetime, limit: int = 100) -> int:
        due = sorted((entry for entry in self.timers.values() if entry[0].due_at <= now), key=lambda entry: entry[0].due_at)[:limit]
        for timer, payment, correlation_id in due:
            del self.timers[timer.timer_id]
            row = (timer.timer_id, payment.order_id, payment.payment_id, payment.user_id, correlation_id)
            self.outbox.append(command_of((*row, timer.command.event_type, timer.attempt, timer.due_at), now))
        return len(due)

    async def oldest_unknown(self) -> datetime | None:
        operations = (attempt.operation for payment in self.payments.values() for attempt in payment.attempts if attempt.operation)
        return min((o.doubt_since for o in operations if o.doubt is AttemptStatus.UNKNOWN and o.doubt_since), default=None)


class _MemoryTransaction:
    def __init__(self, store: MemoryPaymentStore, received: Received, message_id: str) -> None:
        self._store, self._received, self._message_id = store, received, message_id
        self._written: tuple[Payment | None, Decision, bool, bool] | None = None
        self._passed_on: list[Message] = []
        self.settled = False
        self.payment: Payment | None = None
        self.order_held_by: str | None = None
        self.order_paid_by: str | None = None

    async def begin(self, payment: Payment | None, decision: Decision, *, consumed: bool) -> None:
        self._written = (payment, decision, True, consumed)

    async def record(self, payment: Payment, decision: Decision) -> None:
        self._written = (payment, decision, False, True)

    async def pass_on(self, message: Message) -> None:
        self._passed_on.append(message)

    def commit(self) -> None:
        store = self._store
        store.outbox.extend(self._passed_on)
        if self._written is None:
            return
        payment, decision, asked, consumed = self._written
        if payment is not None:
            self._keep(payment, decision, asked)
        store.events.extend(decision.events)
        store.outbox.extend(decision.events)
        for timer_id in decision.dropped_timers:
            store.timers.pop(timer_id, None)
        for done in carried_out(self.payment, decision) | ({self._message_id} if consumed else set()):
            store.inbox.add(done)
            store.decided.setdefault(done, decision.refusal)

    def _keep(self, payment: Payment, decision: Decision, asked: bool) -> None:
        store = self._store
        store.payments[payment.payment_id] = payment
        if decision.events:
            if payment.status in HOLDS_NO_ORDER:
                if store.holders.get(payment.order_id) == payment.payment_id:
                    del store.holders[payment.order_id]
            elif asked:
                holder = store.holders.setdefault(payment.order_id, payment.payment_id)
                if holder != payment.payment_id:
                    raise RuntimeError(f"order {payment.order_id} is held by {holder}")
        for attempt in decision.attempts:
            if attempt.operation is None and attempt.status in ENDED:
                if store.open_attempts.get(payment.payment_id) == attempt.number:
                    del store.open_attempts[payment.payment_id]
            elif asked and attempt.number > len(self.payment.attempts if self.payment else ()):
                if payment.payment_id in store.open_attempts:
                    raise RuntimeError(f"payment {payment.payment_id} has an open attempt")
                store.open_attempts[payment.payment_id] = attempt.number
        correlation_id = decision.events[-1].correlation_id if decision.events else self._message_id
        store.timers |= {timer.timer_id: (timer, payment, correlation_id) for timer in decision.timers}


@dataclass
class MemoryOrderStore:
    """What would be tables are open to the tests that use it."""

    orders: dict[str, Order] = field(default_factory=dict)
    events: list[OrderEvent] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    parked_orders: set[str] = field(default_factory=set)
    parked: list[Received] = field(default_factory=list)
    _locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    @asynccontextmanager
    async def transaction(self, events: Collection[PaymentEvent]) -> AsyncIterator[_MemoryOrderTransaction]:
        async with AsyncExitStack() as held:
            for order_id in sorted({event.order_id for event in events}):
                await held.enter_async_context(self._locks[order_id])
            tx = _MemoryOrderTransaction(self, dict(self.orders), dict(self.positions))
            yield tx
            self.orders, self.positions = self.orders | tx.changed, self.positions | tx.moved
            self.events += tx.events
            self.parked += tx.parked


@dataclass
class _MemoryOrderTransaction:
    _store: MemoryOrderStore
    orders: dict[str, Order]
    _positions: dict[str, int]
    changed: dict[str, Order] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    events: list[OrderEvent] = field(default_factory=list)
    parked: list[Received] = field(default_factory=list)

    async def settled(self, received: Received, event: PaymentEvent) -> bool:
        seen = self._positions.get(event.payment_id, 0) >= event.version
        parked = event.order_id in self._store.parked_orders
        if parked and not seen and received not in self._store.parked:
            self.parked.append(received)
        return seen or parked

    def record(self, received: Received, event: PaymentEvent, order: Order | None, events: Sequence[OrderEvent]) -> None:
        self.moved[event.payment_id] = self._positions[event.payment_id] = event.version
        self.events += events
        if order is not None:
            self.orders[event.order_id] = self.changed[event.order_id] = order
