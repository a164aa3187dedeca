"""The payment state machine.

Rule: everything that decides what may happen to a payment is in this file. No I/O, no clock, no randomness.
Flow: handler loads Payment -> decide(payment, command, now) -> Decision -> the gateway is asked -> observe(payment, what it said, now) -> Decision.
The store appends a decision's events and keeps its attempts and timers; evolve gives the next Payment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, assert_never

from schemas.decisions import Decision, Refusal, Timer
from schemas.errors import IllegalTransition
from schemas.messages import (
    CancelPayment,
    CapturePayment,
    Command,
    ConfirmPayment,
    ExpirePayment,
    InitiatePayment,
    Message,
    PaymentActionRequired,
    PaymentAuthorized,
    PaymentCancelled,
    PaymentCompleted,
    PaymentEvent,
    PaymentFailed,
    PaymentInitiated,
    PaymentProcessing,
    PaymentRefundInitiated,
    ResolveAttempt,
    derived_id,
    envelope,
)
from schemas.observations import (
    ActionRequired,
    Authorized,
    Captured,
    Created,
    Declined,
    NotSent,
    Observation,
    Processing,
    Refused,
    Unknown,
    Voided,
)
from schemas.state import Attempt, AttemptStatus, ChargeRequest, Failure, Operation, Payment, PaymentStatus, Step

PENDING, PROCESSING, REQUIRES_ACTION = PaymentStatus.PENDING, PaymentStatus.PROCESSING, PaymentStatus.REQUIRES_ACTION
AUTHORIZED, COMPLETED = PaymentStatus.AUTHORIZED, PaymentStatus.COMPLETED
FAILED, CANCELLED = PaymentStatus.FAILED, PaymentStatus.CANCELLED

TRANSITIONS: Final[Mapping[PaymentStatus, Mapping[type[PaymentEvent], PaymentStatus]]] = {
    PENDING: {PaymentProcessing: PROCESSING, PaymentFailed: FAILED, PaymentCancelled: CANCELLED},
    PROCESSING: {
        PaymentCompleted: COMPLETED,
        PaymentAuthorized: AUTHORIZED,
        PaymentActionRequired: REQUIRES_ACTION,
        PaymentFailed: FAILED,
        PaymentCancelled: CANCELLED,
    },
    REQUIRES_ACTION: {
        PaymentProcessing: PROCESSING,
        PaymentCompleted: COMPLETED,
        PaymentAuthorized: AUTHORIZED,
        PaymentFailed: FAILED,
        PaymentCancelled: CANCELLED,
    },
    AUTHORIZED: {PaymentCompleted: COMPLETED, PaymentCancelled: CANCELLED, PaymentFailed: FAILED},
    COMPLETED: {PaymentRefundInitiated: COMPLETED},
    FAILED: {PaymentProcessing: PROCESSING, PaymentCancelled: CANCELLED},
    CANCELLED: {PaymentCompleted: COMPLETED},
}

ATTEMPT_TRANSITIONS: Final[Mapping[AttemptStatus, frozenset[AttemptStatus]]] = {
    AttemptStatus.STARTED: frozenset(AttemptStatus) - {AttemptStatus.STARTED},
    AttemptStatus.NOT_SENT: frozenset(AttemptStatus) - {AttemptStatus.STARTED},
    AttemptStatus.UNKNOWN: frozenset(AttemptStatus) - {AttemptStatus.STARTED},
    AttemptStatus.REQUIRES_ACTION: frozenset(AttemptStatus) - {AttemptStatus.STARTED},
    # Whoever holds the client secret may pay the same object after a decline: observed, never asked for by us.
    AttemptStatus.DECLINED: frozenset({AttemptStatus.SUCCEEDED, AttemptStatus.REQUIRES_ACTION, AttemptStatus.UNKNOWN}),
    AttemptStatus.SUCCEEDED: frozenset(),
}

OPEN: Final = frozenset({PENDING, REQUIRES_ACTION})
"""The customer may still pay, or not: these expire."""

EXPIRES_AFTER: Final = timedelta(hours=24)
RETRY_NOT_SENT: Final = tuple(timedelta(seconds=s) for s in (1, 2, 4, 8, 16))
RESOLVE_UNKNOWN: Final = (timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=5), timedelta(hours=1), timedelta(days=1))
"""The last one repeats."""


def evolve(payment: Payment | None, event: PaymentEvent) -> Payment:
    """The payment after `event`. Raises IllegalTransition, and only this function does."""
    if payment is None:
        if not isinstance(event, PaymentInitiated):
            raise IllegalTransition(f"{event.event_type} on a payment that is not there")
        return Payment(
            payment_id=event.payment_id,
            order_id=event.order_id,
            user_id=event.user_id,
            status=PENDING,
            amount_minor=event.amount_minor,
            currency=event.currency,
            gateway=event.gateway,
            capture_method=event.capture_method,
            version=event.version,
            created_at=event.occurred_at,
            updated_at=event.occurred_at,
        )
    status = TRANSITIONS[payment.status].get(type(event))
    if status is None or event.version != payment.version + 1:
        raise IllegalTransition(f"{event.event_type} v{event.version} on a payment that is {payment.status} v{payment.version}")
    payment = replace(payment, status=status, version=event.version, updated_at=event.occurred_at)
    match event:
        case PaymentProcessing():
            return replace(payment, failure=None)
        case PaymentAuthorized():
            return replace(payment, transaction_id=event.transaction_id)
        case PaymentCompleted():
            return replace(payment, transaction_id=event.transaction_id, captured_minor=event.captured_minor, failure=None)
        case PaymentFailed():
            return replace(payment, failure=Failure(code=event.failure_code, message=event.failure_message, advice=event.advice))
        case PaymentRefundInitiated():
            return replace(payment, captured_minor=event.captured_minor, pending_refund_minor=payment.pending_refund_minor + event.refund_minor)
        case _:
            return payment


def fold(payment: Payment | None, decision: Decision) -> Payment:
    """The payment after all of a decision: its events, then its attempts."""
    for event in decision.events:
        payment = evolve(payment, event)
    if payment is None:
        raise IllegalTransition("a decision about nothing")
    attempts = {attempt.number: attempt for attempt in (*payment.attempts, *decision.attempts)}
    return replace(payment, attempts=tuple(attempts[number] for number in sorted(attempts)))


# ── Asked ──


def decide(payment: Payment | None, command: Command, now: datetime, *, order_held_by: str | None = None) -> Decision | Refusal:
    """What `command` leads to. `order_held_by` is the payment that holds the order now (not FAILED, not CANCELLED), if any."""
    if isinstance(command, InitiatePayment):
        return _initiate(payment, command, now, order_held_by)
    if payment is None:
        return Refusal(code="payment_not_found", message=f"there is no payment {command.payment_id}")
    match command:
        case ConfirmPayment():
            return _confirm(payment, command, now, order_held_by)
        case CapturePayment():
            return _capture(payment, command, now)
        case CancelPayment():
            return _cancel(payment, command, now, command.reason or "requested_by_caller")
        case ExpirePayment():
            if payment.status not in OPEN:
                return Refusal(code="not_open", message=f"a payment that is {payment.status} does not expire")
            return _cancel(payment, command, now, "expired")
        case ResolveAttempt():
            return _resolve(payment, command)
        case _:
            raise IllegalTransition(f"{command.event_type} is no command of a payment")


def under_way(payment: Payment | None, command: Command) -> int | None:
    """The attempt that this very command has begun and not finished: the process ended in between, and the message came again."""
    operations = {attempt.number: attempt.operation for attempt in payment.attempts} if payment else {}
    return next((number for number, operation in operations.items() if operation and operation.command_id == command.event_id), None)


def _initiate(payment: Payment | None, command: InitiatePayment, now: datetime, order_held_by: str | None) -> Decision | Refusal:
    if payment is not None:
        return Refusal(code="payment_exists", message=f"payment {payment.payment_id} is already there")
    if order_held_by is not None:
        return _order_is_held(order_held_by)
    if command.confirm and command.payment_method is None:
        return _no_method()
    draft = _Draft(None, command, now)
    draft.say(
        PaymentInitiated,
        gateway=command.gateway,
        currency=command.currency,
        amount_minor=command.amount_minor,
        capture_method=command.capture_method,
    )
    if command.confirm:
        draft.say(PaymentProcessing, attempt=1)
    request = ChargeRequest(
        amount_minor=command.amount_minor,
        currency=command.currency,
        capture_method=command.capture_method,
        payment_method=command.payment_method,
        return_url=command.return_url,
        description=command.description,
        metadata=command.metadata,
    )
    step = Step.CONFIRM if command.confirm else Step.CREATE
    return Decision(events=draft.facts, attempts=(_open(1, command.gateway, request, step, command, now),), ask=1)


def _confirm(payment: Payment, command: ConfirmPayment, now: datetime, order_held_by: str | None) -> Decision | Refusal:
    attempt = payment.attempt
    request = replace(
        attempt.request,
        payment_method=command.payment_method or attempt.request.payment_method,
        return_url=command.return_url or attempt.request.return_url,
    )
    if request.payment_method is None:
        return _no_method()
    draft = _Draft(payment, command, now)
    match payment.status:
        case PaymentStatus.PENDING:
            if attempt.operation is not None and attempt.operation.step is not Step.CREATE:
                return _busy(attempt.operation)
            draft.say(PaymentProcessing, attempt=attempt.number)
            operation = Operation(step=Step.CONFIRM, command_id=command.event_id, asked_at=now)
            return Decision(
                events=draft.facts,
                attempts=(replace(attempt, request=request, operation=operation, updated_at=now),),
                dropped_timers=(_expiry_id(payment),),
                ask=attempt.number,
            )
        case PaymentStatus.REQUIRES_ACTION if command.payment_method is None:
            if attempt.operation is not None:
                return _busy(attempt.operation)
            # The customer is said to be back: what the gateway knows by now is looked up, nothing is asked for again.
            operation = Operation(step=Step.CONFIRM, command_id=command.event_id, asked_at=now)
            return Decision(attempts=(replace(attempt, operation=operation, updated_at=now),), ask=attempt.number)
        case PaymentStatus.FAILED | PaymentStatus.REQUIRES_ACTION:
            if attempt.operation is not None:
                return _busy(attempt.operation)
            if order_held_by not in (None, payment.payment_id):
                return _order_is_held(order_held_by)
            abandoned = AttemptStatus.DECLINED if attempt.status is AttemptStatus.REQUIRES_ACTION else attempt.status
            draft.say(PaymentProcessing, attempt=attempt.number + 1)
            following = _open(
                attempt.number + 1, payment.gateway, request, Step.CONFIRM, command, now, supersedes=attempt.gateway_id or attempt.supersedes
            )
            return Decision(
                events=draft.facts,
                attempts=(_close(attempt, abandoned, now), following),
                dropped_timers=(_expiry_id(payment),),
                ask=following.number,
            )
        case PaymentStatus.PROCESSING:
            return Refusal(code="payment_in_progress", message="the payment is being charged already")
        case PaymentStatus.AUTHORIZED | PaymentStatus.COMPLETED:
            return Refusal(code="payment_already_paid", message=f"the payment is {payment.status}")
        case PaymentStatus.CANCELLED:
            return Refusal(code="payment_cancelled", message="the payment is CANCELLED; open a new one")
        case _ as never:
            assert_never(never)


def _capture(payment: Payment, command: CapturePayment, now: datetime) -> Decision | Refusal:
    if payment.status is PROCESSING and payment.capture_method == "manual" and payment.attempt.operation is not None:
        return _busy(payment.attempt.operation)  # it may be AUTHORIZED in a moment
    if payment.status is not AUTHORIZED:
        return Refusal(code="not_authorized", message=f"only an AUTHORIZED payment can be captured; this one is {payment.status}")
    if payment.attempt.operation is not None:
        return _busy(payment.attempt.operation)
    amount = payment.amount_minor if command.amount_minor is None else command.amount_minor
    if not 1 <= amount <= payment.amount_minor:
        return Refusal(code="capture_amount", message=f"from 1 to {payment.amount_minor} minor units can be captured; {amount} were asked for")
    operation = Operation(step=Step.CAPTURE, command_id=command.event_id, asked_at=now, amount_minor=amount)
    return Decision(attempts=(replace(payment.attempt, operation=operation, updated_at=now),), ask=payment.attempt.number)


def _cancel(payment: Payment, command: Command, now: datetime, reason: str) -> Decision | Refusal:
    attempt, operation = payment.attempt, payment.attempt.operation
    if payment.status not in (PENDING, REQUIRES_ACTION, AUTHORIZED, FAILED):
        return Refusal(code="not_cancellable", message=f"a payment that is {payment.status} can't be cancelled")
    if operation is not None and operation.step is not Step.CREATE:
        return _busy(operation)
    if attempt.gateway_id is not None:
        # Voided at the gateway first, so that a client secret can't be paid later. CANCELLED only when that is known.
        ask = Operation(step=Step.CANCEL, command_id=command.event_id, asked_at=now, reason=reason)
        return Decision(attempts=(replace(attempt, operation=ask, updated_at=now),), ask=attempt.number)
    draft = _Draft(payment, command, now)
    draft.say(PaymentCancelled, reason=reason)
    return Decision(
        events=draft.facts,
        attempts=(_close(attempt, AttemptStatus.NOT_SENT, now),),
        dropped_timers=(_expiry_id(payment), _resolve_id(payment, attempt)),
    )


def _resolve(payment: Payment, command: ResolveAttempt) -> Decision | Refusal:
    attempt = next((attempt for attempt in payment.attempts if attempt.number == command.attempt), None)
    if attempt is None or (attempt.operation is None and attempt.gateway_id is None):
        return Refusal(code="nothing_to_resolve", message=f"attempt {command.attempt} is in no doubt")
    return Decision(ask=attempt.number)


# ── Seen ──


def observe(payment: Payment, number: int, observation: Observation, now: datetime, *, cause: Message, order_paid_by_other: bool = False) -> Decision:
    """What the books make of `observation` about attempt `number`. Never refused: steps that were not seen are filled in, old news change nothing.

    `cause` is the message that made us ask. `order_paid_by_other`: another payment of this order holds its money already.
    """
    attempt = payment.attempts[number - 1]
    if observation.gateway_id is not None and attempt.gateway_id is None:
        attempt = replace(attempt, gateway_id=observation.gateway_id)
    latest = number == payment.attempt.number
    draft = _Draft(payment, cause, now)
    match observation:
        case Captured():
            return _captured(draft, attempt, observation, order_paid_by_other)
        case Authorized():
            return _authorized(draft, attempt, observation)
        case Unknown() | Processing():
            return _in_doubt(draft, attempt, observation, latest)
        case NotSent():
            return _not_sent(draft, attempt, observation, latest)
        case _ if not latest:
            return _answered(payment, attempt, now)
        case Voided():
            return _voided(draft, attempt, observation)
        case Refused():
            return _refused(draft, attempt, observation.failure, observation.latency_ms)
        case Declined():
            return _declined(draft, attempt, observation)
        case ActionRequired():
            return _action_required(draft, attempt, observation)
        case Created():
            return _created(payment, attempt, observation, now)
        case _:
            raise IllegalTransition(f"{type(observation).__name__} is no observation of a payment")


def _created(payment: Payment, attempt: Attempt, seen: Created, now: datetime) -> Decision:
    if attempt.operation is None or attempt.operation.step is not Step.CREATE:
        return Decision()
    known = replace(attempt, operation=None, client_secret=seen.client_secret or attempt.client_secret, updated_at=now)
    return Decision(attempts=(known,), timers=_expiry(payment, now))


def _action_required(draft: _Draft, attempt: Attempt, seen: ActionRequired) -> Decision:
    payment = draft.before
    if payment.status not in (PENDING, PROCESSING, FAILED):
        return _answered(payment, attempt, draft.now)
    draft.reach(PROCESSING, attempt)
    draft.say(PaymentActionRequired, attempt=attempt.number, gateway_latency_ms=seen.latency_ms)
    waiting = replace(
        attempt,
        status=_step(attempt, AttemptStatus.REQUIRES_ACTION),
        operation=None,
        next_action=seen.next_action,
        client_secret=seen.client_secret or attempt.client_secret,
        updated_at=draft.now,
    )
    return Decision(events=draft.facts, attempts=(waiting,), timers=_expiry(payment, draft.now))


def _authorized(draft: _Draft, attempt: Attempt, seen: Authorized) -> Decision:
    payment = draft.before
    held = replace(
        attempt,
        status=_step(attempt, AttemptStatus.SUCCEEDED),
        operation=None,
        next_action=None,
        transaction_id=seen.transaction_id,
        updated_at=draft.now,
    )
    if payment.status in (CANCELLED, COMPLETED) or attempt.number != payment.attempt.number:
        if payment.transaction_id == seen.transaction_id and payment.status is not CANCELLED:
            return Decision()
        # Nobody wants this hold any more: it is given back, however long that takes.
        void = Operation(
            step=Step.CANCEL,
            command_id=derived_id(payment.payment_id, attempt.number, "abandon"),
            asked_at=draft.now,
            reason="abandoned",
            doubt=AttemptStatus.NOT_SENT,
            doubt_since=draft.now,
        )
        return Decision(attempts=(replace(held, operation=void),), timers=(_resolve_at(payment, attempt, draft.now),))
    if payment.status is AUTHORIZED:
        return _answered(payment, attempt, draft.now)
    draft.reach(PROCESSING, attempt)
    draft.say(PaymentAuthorized, attempt=attempt.number, transaction_id=seen.transaction_id, gateway_latency_ms=seen.latency_ms)
    return Decision(events=draft.facts, attempts=(held,), dropped_timers=_no_longer_open(payment))


def _captured(draft: _Draft, attempt: Attempt, seen: Captured, order_paid_by_other: bool) -> Decision:
    payment = draft.before
    if attempt.captured_minor:
        return _answered(payment, attempt, draft.now)
    paid = replace(
        attempt,
        status=_step(attempt, AttemptStatus.SUCCEEDED),
        operation=None,
        next_action=None,
        transaction_id=seen.transaction_id,
        captured_minor=seen.captured_minor,
        updated_at=draft.now,
    )
    unwanted = "captured_after_cancel" if payment.status is CANCELLED else "order_already_paid" if order_paid_by_other else None
    if payment.status is COMPLETED:
        unwanted = "captured_twice"
    else:
        draft.reach(PROCESSING, attempt)
        draft.say(
            PaymentCompleted,
            attempt=attempt.number,
            transaction_id=seen.transaction_id,
            captured_minor=payment.captured_minor + seen.captured_minor,
            receipt_url=seen.receipt_url,
            gateway_latency_ms=seen.latency_ms,
        )
    if unwanted is not None:
        draft.say(
            PaymentRefundInitiated,
            refund_id=derived_id(payment.payment_id, seen.transaction_id, "refund"),
            refund_minor=seen.captured_minor,
            captured_minor=payment.captured_minor + seen.captured_minor,
            transaction_id=seen.transaction_id,
            reason=unwanted,
        )
    # An attempt that was waiting for this one to be voided has sent nothing, and need not any more.
    superseded = tuple(
        _close(other, AttemptStatus.NOT_SENT, draft.now)
        for other in payment.attempts
        if other.number > attempt.number and other.operation is not None
    )
    return Decision(events=draft.facts, attempts=(paid, *superseded), dropped_timers=(_resolve_id(payment, attempt), *_no_longer_open(payment)))


def _declined(draft: _Draft, attempt: Attempt, seen: Declined) -> Decision:
    if draft.before.status in (COMPLETED, CANCELLED, FAILED):
        return _answered(draft.before, attempt, draft.now)
    return _failed(draft, attempt, seen.failure, AttemptStatus.DECLINED, seen.latency_ms)


def _refused(draft: _Draft, attempt: Attempt, failure: Failure, latency_ms: int | None) -> Decision:
    """The gateway won't: a charge has failed; a capture or a void leaves the payment as it was, and its caller is told."""
    if attempt.operation is not None and attempt.operation.step in (Step.CREATE, Step.CONFIRM) and draft.before.status in (PENDING, PROCESSING):
        return _failed(draft, attempt, failure, AttemptStatus.DECLINED, latency_ms)
    return replace(_answered(draft.before, attempt, draft.now), refusal=Refusal(code=failure.code, message=failure.message))


def _voided(draft: _Draft, attempt: Attempt, seen: Voided) -> Decision:
    payment, now = draft.before, draft.now
    if payment.status in (COMPLETED, CANCELLED):
        return _answered(payment, attempt, now)
    reason = (attempt.operation.reason if attempt.operation else None) or seen.reason or "voided_at_gateway"
    draft.say(PaymentCancelled, reason=reason)
    status = AttemptStatus.DECLINED if attempt.status is AttemptStatus.REQUIRES_ACTION else AttemptStatus.NOT_SENT
    return Decision(
        events=draft.facts, attempts=(_close(attempt, status, now),), dropped_timers=(_resolve_id(payment, attempt), *_no_longer_open(payment))
    )


def _in_doubt(draft: _Draft, attempt: Attempt, seen: Unknown | Processing, latest: bool) -> Decision:
    payment, now = draft.before, draft.now
    if latest and isinstance(seen, Processing) and payment.status in (PENDING, REQUIRES_ACTION, FAILED):
        draft.reach(PROCESSING, attempt)
    operation = attempt.operation
    if operation is None:
        if not latest or isinstance(seen, Unknown) or payment.status in (AUTHORIZED, COMPLETED, CANCELLED):
            return _look_again(payment, attempt, now)
        operation = Operation(step=Step.CONFIRM, command_id=draft.cause.event_id, asked_at=now)
    operation = _doubted(operation, AttemptStatus.UNKNOWN, seen, now)
    status = _step(attempt, AttemptStatus.UNKNOWN) if operation.step is Step.CONFIRM else attempt.status
    delay = RESOLVE_UNKNOWN[min(operation.tries, len(RESOLVE_UNKNOWN)) - 1]
    doubted = replace(attempt, status=status, operation=operation, updated_at=now)
    return Decision(events=draft.facts, attempts=(doubted,), timers=(_resolve_at(payment, attempt, now + delay),))


def _not_sent(draft: _Draft, attempt: Attempt, seen: NotSent, latest: bool) -> Decision:
    payment, now, operation = draft.before, draft.now, attempt.operation
    if operation is None:
        return _look_again(payment, attempt, now)
    operation = _doubted(operation, AttemptStatus.NOT_SENT, seen, now)
    for_ever = not latest or payment.status in (CANCELLED, COMPLETED)  # nobody waits for it, and a hold that nobody wants has to go
    if operation.tries > len(RETRY_NOT_SENT) and not for_ever:
        failure = Failure(code="gateway_unavailable", message="The payment provider could not be reached. Nothing was charged.", advice="retry")
        return _refused(draft, attempt, failure, None)
    schedule = RESOLVE_UNKNOWN if for_ever else RETRY_NOT_SENT
    delay = schedule[min(operation.tries, len(schedule)) - 1]
    charging = operation.step in (Step.CREATE, Step.CONFIRM)
    waiting = replace(attempt, status=_step(attempt, AttemptStatus.NOT_SENT) if charging else attempt.status, operation=operation, updated_at=now)
    return Decision(attempts=(waiting,), timers=(_resolve_at(payment, attempt, now + delay),))


# ── Small parts of the above ──


@dataclass
class _Draft:
    """Facts in the making: each one is numbered, timed and tried on the payment as it is said."""

    payment: Payment | None
    cause: Message
    now: datetime
    _facts: list[PaymentEvent] = field(default_factory=list)

    @property
    def before(self) -> Payment:
        if self.payment is None:
            raise IllegalTransition("nothing was seen of a payment that is not there")
        return self.payment

    @property
    def facts(self) -> tuple[PaymentEvent, ...]:
        return tuple(self._facts)

    def say(self, kind: type[PaymentEvent], **fields: Any) -> None:
        source = self.payment or self.cause
        payment_id, version = source.payment_id or "", (self.payment.version if self.payment else 0) + 1
        if self.payment is not None:
            fields |= {"gateway": self.payment.gateway, "currency": self.payment.currency, "amount_minor": self.payment.amount_minor}
        event = kind(
            event_id=derived_id(payment_id, version),
            order_id=source.order_id,  # type: ignore[arg-type]  # a command's or a payment's: never None
            payment_id=payment_id,
            user_id=source.user_id,  # type: ignore[arg-type]
            version=version,
            **envelope(self.cause, self.now),
            **fields,
        )
        self.payment = evolve(self.payment, event)
        self._facts.append(event)

    def reach(self, status: PaymentStatus, attempt: Attempt) -> None:
        """Fill in PAYMENT_PROCESSING where it was not seen."""
        if status is PROCESSING and self.before.status in (PENDING, FAILED):
            self.say(PaymentProcessing, attempt=attempt.number)


def _open(number: int, gateway: str, request: ChargeRequest, step: Step, command: Command, now: datetime, supersedes: str | None = None) -> Attempt:
    return Attempt(
        number=number,
        status=AttemptStatus.STARTED,
        gateway=gateway,
        request=request,
        operation=Operation(step=step, command_id=command.event_id, asked_at=now),
        supersedes=supersedes,
        started_at=now,
        updated_at=now,
    )


def _close(attempt: Attempt, status: AttemptStatus, now: datetime) -> Attempt:
    return replace(attempt, status=_step(attempt, status), operation=None, next_action=None, updated_at=now)


def _step(attempt: Attempt, status: AttemptStatus) -> AttemptStatus:
    """`status` where the attempt may become it, else the one that it has: what was seen is never refused."""
    return status if status in ATTEMPT_TRANSITIONS[attempt.status] else attempt.status


def _failed(draft: _Draft, attempt: Attempt, failure: Failure, status: AttemptStatus, latency_ms: int | None) -> Decision:
    payment = draft.before
    draft.reach(PROCESSING, attempt)
    draft.say(
        PaymentFailed,
        attempt=attempt.number,
        failure_code=failure.code,
        failure_message=failure.message,
        advice=failure.advice,
        gateway_latency_ms=latency_ms,
    )
    return Decision(
        events=draft.facts, attempts=(_close(attempt, status, draft.now),), dropped_timers=(_resolve_id(payment, attempt), *_no_longer_open(payment))
    )


def _answered(payment: Payment, attempt: Attempt, now: datetime) -> Decision:
    """The gateway has answered, and it is no news."""
    if attempt.operation is None:
        return Decision()
    status = AttemptStatus.SUCCEEDED if payment.status is AUTHORIZED else attempt.status
    return Decision(attempts=(_close(attempt, status, now),), dropped_timers=(_resolve_id(payment, attempt),))


def _doubted(operation: Operation, doubt: AttemptStatus, seen: Observation, now: datetime) -> Operation:
    again = operation.doubt is doubt
    return replace(
        operation,
        doubt=doubt,
        doubt_since=operation.doubt_since if again else now,
        tries=operation.tries + 1 if again else 1,
        keys_burnt=operation.keys_burnt + (isinstance(seen, Unknown | NotSent) and seen.key_burnt),
    )


def _look_again(payment: Payment, attempt: Attempt, now: datetime) -> Decision:
    """A look-up failed, or an old attempt is in doubt: ask again in a while. Nothing was asked for, so nothing else is open."""
    return Decision(timers=(_resolve_at(payment, attempt, now + RESOLVE_UNKNOWN[1]),))


def _expiry_id(payment: Payment) -> str:
    return derived_id(payment.payment_id, "expire")


def _expiry(payment: Payment, now: datetime) -> tuple[Timer, ...]:
    return (Timer(timer_id=_expiry_id(payment), command=ExpirePayment, attempt=None, due_at=now + EXPIRES_AFTER),)


def _no_longer_open(payment: Payment) -> tuple[str, ...]:
    return (_expiry_id(payment),) if payment.status in OPEN else ()


def _resolve_id(payment: Payment, attempt: Attempt) -> str:
    return derived_id(payment.payment_id, attempt.number, "resolve")


def _resolve_at(payment: Payment, attempt: Attempt, due_at: datetime) -> Timer:
    return Timer(timer_id=_resolve_id(payment, attempt), command=ResolveAttempt, attempt=attempt.number, due_at=due_at)


def _busy(operation: Operation) -> Refusal:
    doubt = "its outcome is not known yet" if operation.doubt else "it is under way"
    return Refusal(code="operation_pending", message=f"a {operation.step} was asked of the gateway and {doubt}; try again later")


def _no_method() -> Refusal:
    return Refusal(code="payment_method_missing", message="no payment_method was given, neither now nor with the intent")


def _order_is_held(payment_id: str | None) -> Refusal:
    return Refusal(code="order_has_payment", message=f"payment {payment_id} of this order is open or paid; cancel it first")
