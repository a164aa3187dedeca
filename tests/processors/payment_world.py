"""A whole payments group in memory: commands, webhooks, timers and crashes in any order, with a gateway that keeps a ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from infra.clock import SetClock
from infra.crash_points import plugged
from infra.database.delivery import Received
from infra.database.memory import MemoryPaymentStore
from infra.gateways.fake import FakeGateway
from processors.payments.handler import Deps, handle
from schemas.messages import Command, Message, PaymentEvent, WebhookReceived, derived_id
from schemas.state import Payment, PaymentStatus


class Crash(BaseException):
    """The process ends here."""


@dataclass
class World:
    clock: SetClock = field(default_factory=SetClock)
    gateway: FakeGateway = field(default_factory=FakeGateway)
    crash_at: Callable[[str, int], bool] = lambda point, n: False
    announced: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    crashes: int = 0

    def __post_init__(self) -> None:
        self.store = MemoryPaymentStore(self.clock)
        self.deps = Deps(store=self.store, gateways={"stripe": self.gateway}, clock=self.clock, announce=self._announce)
        self._sent = 0

    async def _announce(self, payment_id: str) -> None:
        self.announced.append(payment_id)

    async def deliver(self, message: Message, lives: int = 20) -> None:
        """Handle a message; a crash in the middle brings it again, as Kafka does, until it is consumed. Raises Crash when all `lives` are over."""
        topic = "payment-webhook-received" if isinstance(message, WebhookReceived) else "payment-commands"
        received = Received(topic=topic, partition=0, offset=0, timestamp_ms=None, key=(message.key or "").encode(), value=b"")

        async def maybe(point: str) -> None:
            self.passed.append(point)
            if self.crash_at(point, len(self.passed)):
                self.crashes += 1
                raise Crash(point)

        for life in range(1, lives + 1):
            try:
                with plugged(maybe):
                    return await handle(received, message, self.deps)
            except Crash:
                if life == lives:
                    raise
        return None

    async def webhook(self, event_type: str = "payment_intent.succeeded", gateway_id: str = "pi_1", order_id: str | None = "ord_1") -> None:
        body, _ = self.gateway.webhook(gateway_id, event_type)
        event = json.loads(body)["id"]
        await self.deliver(
            WebhookReceived(
                event_id=derived_id("stripe", event),
                order_id=order_id,
                payment_id=None,
                user_id=None,
                occurred_at=self.clock.now(),
                correlation_id=event,
                gateway="stripe",
                gateway_event_id=event,
                gateway_event_type=event_type,
                object_id=gateway_id,
                body=body,
            )
        )

    async def settle(self, days: float = 4) -> None:
        """Let time pass, timers fire and what they send be handled, until nothing is left to do."""
        ends = self.clock.now() + timedelta(days=days)
        while self.store.timers and min(entry[0].due_at for entry in self.store.timers.values()) <= ends:
            self.clock.time = max(self.clock.now(), min(entry[0].due_at for entry in self.store.timers.values()))
            await self.store.fire_timers(self.clock.now())
            await self.drain()
        self.clock.time = ends

    async def drain(self) -> None:
        while self._sent < len(self.store.outbox):
            message = self.store.outbox[self._sent]
            self._sent += 1
            if not isinstance(message, PaymentEvent):
                await self.deliver(message)

    def payment(self, payment_id: str) -> Payment:
        return self.store.payments[payment_id]

    def told(self, payment_id: str) -> list[str]:
        return [event.event_type for event in self.store.events if event.payment_id == payment_id]

    def check(self) -> None:
        """What must hold at any time when nothing is under way: the promises, against the gateway's ledger."""
        for payment in self.store.payments.values():
            versions = [event.version for event in self.store.events if event.payment_id == payment.payment_id]
            assert versions == list(range(1, payment.version + 1))
            mine = [intent for intent in self.gateway.intents.values() if intent.payment_id == payment.payment_id]
            for attempt in payment.attempts:
                charged = [intent for intent in mine if intent.attempt == attempt.number and intent.charges]
                assert len(charged) <= 1, "an attempt charged two objects"
                assert all(intent.charges == 1 for intent in charged), "an object was charged twice"

    def check_books(self) -> None:
        """And when every doubt is gone too: what the books say is what the gateway has."""
        self.check()
        for payment in self.store.payments.values():
            captured = sum(i.captured_minor for i in self.gateway.intents.values() if i.payment_id == payment.payment_id)
            assert payment.captured_minor == captured, f"{payment.status}: booked {payment.captured_minor}, the gateway took {captured}"
            held = [i for i in self.gateway.intents.values() if i.payment_id == payment.payment_id and i.status == "requires_capture"]
            assert bool(held) == (payment.status is PaymentStatus.AUTHORIZED)


def again(command: Command, name: str, **fields: Any) -> Command:
    """The same kind of command, as a caller's new request."""
    return replace(command, event_id=derived_id(command.event_id, name), **fields)
