"""What happens to one message of the payments group.

Rule: ① a transaction decides, ② the gateway is asked outside of any transaction, ③ a transaction records what was observed and consumes the message.
A process may end at any place in between: the message comes again, the attempt's operation says where it was, and the gateway is asked by id how the
object stands before anything is asked of it again. What a gateway can't answer is kept as doubt with a timer; the message is consumed all the same.
Flow: payment-commands, payment-webhook-received -> keyed window -> delivery -> handle -> store (events, outbox) -> relay.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import structlog
from prometheus_client import Counter

from infra.clock import Clock
from infra.crash_points import at
from infra.database.delivery import Received
from infra.database.payments import PaymentStore, PaymentTransaction
from infra.gateways.port import Gateway
from processors.payments.machine import decide, fold, observe, under_way
from schemas.decisions import Decision, Refusal
from schemas.errors import Rejected
from schemas.messages import Command, Message, ResolveAttempt, WebhookReceived, derived_id
from schemas.observations import Authorized, Captured, Created, NotSent, Observation, Refused, Unknown, Voided
from schemas.state import Attempt, AttemptStatus, Operation, Payment, Step

log = structlog.get_logger()

REFUSED: Final = Counter("paystream_commands_refused_total", "Commands that were not carried out", ["command", "code"])
WEBHOOKS: Final = Counter("paystream_webhooks_handled_total", "Webhooks by what became of them", ["gateway", "outcome"])

_MIN_CALL_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """What a handler works with. `announce` tells those who wait for this payment; it may fail silently, and never blocks."""

    store: PaymentStore
    gateways: Mapping[str, Gateway]
    clock: Clock
    announce: Callable[[str], Awaitable[None]]
    budget_s: float = 20.0
    call_timeout_s: float = 8.0


async def handle(received: Received, message: Message, deps: Deps) -> None:
    """Handle a command or a webhook, once. Raises Unavailable (nothing is lost, try again) and Rejected (it can never be handled)."""
    match message:
        case Command():
            await _command(received, message, deps)
        case WebhookReceived():
            await _hint(received, message, deps)
        case _:
            raise Rejected(f"{message.event_type} does not belong on {received.topic}")


async def _command(received: Received, command: Command, deps: Deps) -> None:
    received.expect_key(command.order_id)
    async with deps.store.transaction(received, command.event_id, command.payment_id) as tx:
        if tx.settled:
            return
        payment, number = tx.payment, under_way(tx.payment, command)
        asked_before = number is not None or isinstance(command, ResolveAttempt)
        if number is None:
            decision = _decide(tx, command, deps.clock.now())
            payment, number = fold(payment, decision) if decision.refusal is None else payment, decision.ask
            await tx.begin(payment, decision, consumed=number is None)
    await at("payments.after_begin")
    if payment is not None and number is not None:
        number, observation = await _Asking(payment, number, deps, may_have_been_asked=asked_before).outcome()
        await _record(received, command, payment, number, observation, deps)
    await deps.announce(command.payment_id)


def _decide(tx: PaymentTransaction, command: Command, now: datetime) -> Decision:
    if tx.payment is not None and tx.payment.order_id != command.order_id:
        raise Rejected(f"payment {command.payment_id} is not of order {command.order_id}")
    match decide(tx.payment, command, now, order_held_by=tx.order_held_by):
        case Refusal() as refusal:
            _note_refusal(command, refusal)
            return Decision(refusal=refusal)
        case Decision() as decision:
            return decision


def _note_refusal(cause: Message, refusal: Refusal) -> None:
    REFUSED.labels(cause.event_type, refusal.code).inc()
    log.info("command refused", command=cause.event_type, code=refusal.code)


async def _record(received: Received, cause: Message, payment: Payment, number: int, observation: Observation, deps: Deps) -> None:
    await at("payments.before_record")
    async with deps.store.transaction(received, cause.event_id, payment.payment_id, again=True) as tx:
        if tx.payment is None:
            raise Rejected(f"payment {payment.payment_id} has gone")
        decision = observe(tx.payment, number, observation, deps.clock.now(), cause=cause, order_paid_by_other=tx.order_paid_by is not None)
        await tx.record(fold(tx.payment, decision), decision)
    if decision.refusal is not None:
        _note_refusal(cause, decision.refusal)
    await at("payments.after_record")


async def _hint(received: Received, webhook: WebhookReceived, deps: Deps) -> None:
    """A webhook means "look at this object now". Its own snapshot only tells whether that is worth a call."""
    gateway = deps.gateways.get(webhook.gateway)
    if gateway is None:
        raise Rejected(f"no gateway {webhook.gateway!r} is configured")
    owner = await deps.store.find_object(webhook.gateway, webhook.object_id)
    if owner is None:
        # Not ours; or made a moment ago by an attempt that does not know it yet: then that attempt's own message is under way and will see it.
        WEBHOOKS.labels(webhook.gateway, "unknown_object").inc()
        return
    snapshot = gateway.read_verified_webhook(webhook.body).observation
    if not _is_news(owner.payment, owner.attempt, snapshot, webhook, deps.clock.now()):
        # As most are: an answer told it before. Nothing is written, as to look at it again would find the same.
        WEBHOOKS.labels(webhook.gateway, "no_news").inc()
        return
    async with deps.store.transaction(received, webhook.event_id, owner.payment.payment_id) as tx:
        if tx.settled:
            return
        if received.order_key != owner.order_id:
            WEBHOOKS.labels(webhook.gateway, "passed_on").inc()
            await tx.pass_on(replace(webhook, order_id=owner.order_id, payment_id=owner.payment.payment_id))
            return
        payment = tx.payment or owner.payment
    seen = await gateway.retrieve(webhook.object_id, timeout=deps.call_timeout_s)
    WEBHOOKS.labels(webhook.gateway, "looked_up").inc()
    await _record(received, webhook, payment, owner.attempt, seen, deps)
    await deps.announce(payment.payment_id)


def _is_news(payment: Payment, number: int, snapshot: Observation | None, webhook: WebhookReceived, now: datetime) -> bool:
    if snapshot is None:
        return False
    decision = observe(payment, number, snapshot, now, cause=webhook)
    return bool(decision.events or decision.timers or decision.attempts)


class _Asking:
    """② Asks the gateway for what an attempt's operation wants, within one budget of time for all calls.

    `may_have_been_asked`: an earlier life of this message, or of the one before it, may have got as far as the gateway.
    """

    def __init__(self, payment: Payment, number: int, deps: Deps, *, may_have_been_asked: bool) -> None:
        self._payment, self._attempt, self._deps = payment, payment.attempts[number - 1], deps
        self._may_have_been_asked = may_have_been_asked
        self._ends = time.monotonic() + deps.budget_s

    async def outcome(self) -> tuple[int, Observation]:
        """The number of the attempt that is spoken of, and what was observed of it."""
        attempt, gateway = self._attempt, self._deps.gateways.get(self._attempt.gateway)
        if gateway is None:
            return attempt.number, NotSent(detail=f"gateway {attempt.gateway} is not configured")
        if attempt.gateway_id is None:
            return await self._from_the_start(gateway, attempt)
        operation = attempt.operation
        if operation is None or self._must_look_first(attempt, operation):
            seen = await gateway.retrieve(attempt.gateway_id, timeout=self._timeout())
            if operation is None or _is_done(operation, seen):
                return attempt.number, seen
            if isinstance(seen, Unknown | NotSent):
                still_not_sent = operation.doubt is AttemptStatus.NOT_SENT
                return attempt.number, NotSent(detail=seen.detail) if still_not_sent else Unknown(detail=seen.detail)
            if self._deps.clock.now() - operation.asked_at > gateway.key_life / 2:
                return attempt.number, Unknown(detail="not done, and its key may be forgotten by now: only looked at from here on")
        return attempt.number, await self._ask(gateway, attempt.gateway_id, attempt, operation)

    async def _from_the_start(self, gateway: Gateway, attempt: Attempt) -> tuple[int, Observation]:
        if attempt.supersedes is not None:
            obstacle = await self._void_predecessor(gateway, attempt.supersedes)
            if obstacle is not None:
                return obstacle
        payment, operation = self._payment, attempt.operation
        created = await gateway.create(payment.payment_id, payment.order_id, attempt, key=self._key(Step.CREATE), timeout=self._timeout())
        if not isinstance(created, Created):
            return attempt.number, created
        await at("payments.after_create")
        await self._deps.store.remember(payment, attempt.number, created)
        await at("payments.after_remember")
        if operation is None or operation.step is Step.CREATE:
            return attempt.number, created
        return attempt.number, await self._ask(gateway, created.gateway_id, attempt, operation)

    def _must_look_first(self, attempt: Attempt, operation: Operation) -> bool:
        confirmed_before = operation.step is Step.CONFIRM and attempt.status is not AttemptStatus.STARTED
        return self._may_have_been_asked or operation.doubt is not None or confirmed_before

    async def _ask(self, gateway: Gateway, gateway_id: str, attempt: Attempt, operation: Operation) -> Observation:
        timeout = self._timeout()
        if timeout < _MIN_CALL_S:
            return NotSent(detail="no time was left to ask")
        key = self._key(operation.step)
        match operation.step:
            case Step.CREATE | Step.CONFIRM:
                answer = await gateway.confirm(gateway_id, attempt.request, key=key, timeout=timeout)
            case Step.CAPTURE:
                answer = await gateway.capture(gateway_id, operation.amount_minor, self._payment.currency, key=key, timeout=timeout)
            case Step.CANCEL:
                answer = await gateway.cancel(gateway_id, operation.reason, key=key, timeout=timeout)
        await at("payments.after_charge")
        return answer

    async def _void_predecessor(self, gateway: Gateway, gateway_id: str) -> tuple[int, Observation] | None:
        """End the object of the attempt before. None when it is void; else what stands in the way of a new one."""
        seen = await gateway.cancel(gateway_id, "superseded", key=self._key("supersede"), timeout=self._timeout())
        match seen:
            case Voided() | Refused():
                return None
            case Captured():
                return self._owner_of(gateway_id), seen
            case Unknown() | NotSent():
                detail = f"the attempt before could not be voided: {seen.detail}"
                return self._attempt.number, NotSent(detail=detail, key_burnt=seen.key_burnt)
            case _:
                return self._attempt.number, NotSent(detail="the attempt before could not be voided yet")

    def _owner_of(self, gateway_id: str) -> int:
        """The attempt that has this object."""
        return next(attempt.number for attempt in self._payment.attempts if attempt.gateway_id == gateway_id)

    def _timeout(self) -> float:
        return max(0.0, min(self._deps.call_timeout_s, self._ends - time.monotonic()))

    def _key(self, step: str) -> str:
        """The idempotency key: the same for the same request, a new one only after an answered 5xx, which the gateway would replay.

        The object is made for its attempt, whatever command comes first; captures and voids are of the command that asks for them.
        """
        attempt, operation = self._attempt, self._attempt.operation
        asked = operation.command_id if operation and step in (Step.CAPTURE, Step.CANCEL) else derived_id(attempt.request)
        return f"{self._payment.payment_id}:{attempt.number}:{step}:{asked}:{operation.keys_burnt if operation else 0}"


def _is_done(operation: Operation, seen: Observation) -> bool:
    """Whether what the look-up shows is an outcome of the operation, rather than what stood before it."""
    match operation.step, seen:
        case _, Unknown() | NotSent():
            return False
        case Step.CREATE, _:
            return True
        case Step.CONFIRM, _:
            return not isinstance(seen, Created)
        case Step.CAPTURE, _:
            return not isinstance(seen, Authorized)
        case Step.CANCEL, _:
            return isinstance(seen, Voided | Captured)
