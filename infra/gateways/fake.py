"""A gateway in memory, for tests of what calls a gateway: it keeps a ledger, and fails as it is told to.

Rule: it behaves as StripeGateway does (one contract suite holds for both), idempotency keys included; payment methods and their fates are those of
Stripe's test methods. Faults are scripted per operation and used up one by one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from infra.gateways.breaker import Breaker, GatewayFailed
from infra.gateways.calls import Calls, creation, looked_up
from infra.gateways.port import BadSignature, Webhook
from schemas.errors import Rejected
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
from schemas.state import Attempt, ChargeRequest, Failure, NextAction


class Fault(StrEnum):
    """What may happen to a call. "Lost" is without an answer, "failed" answered with a 5xx, which the gateway repeats for that key."""

    NOT_SENT = "no connection"
    RATE_LIMITED = "turned away before it was looked at"
    LOST_BEFORE = "lost, nothing was done"
    LOST_AFTER = "lost after it was done"
    FAILED_BEFORE = "failed, nothing was done"
    FAILED_AFTER = "failed after it was done"


_DECLINED: Final = Failure(code="generic_decline", message="Your card was declined.", advice="retry")
_METHODS: Final[Mapping[str, str | Failure]] = {
    "pm_card_visa": "approved",
    "pm_card_mastercard": "approved",
    "pm_card_threeDSecure2Required": "requires_action",
    "pm_usBankAccount_processing": "processing",
    "pm_card_chargeDeclined": _DECLINED,
    "pm_card_chargeDeclinedInsufficientFunds": Failure(code="insufficient_funds", message="Your card has insufficient funds.", advice="retry"),
    "pm_card_chargeDeclinedLostCard": Failure(code="lost_card", message="Your card was declined.", advice="change_method"),
}
_AUTHENTICATION_FAILED: Final = Failure(
    code="payment_intent_authentication_failure", message="The payment method has failed authentication.", advice="retry"
)
_NO_SUCH_METHOD: Final = Failure(code="resource_missing", message="There is no such payment method.", advice="change_method")


@dataclass(kw_only=True)
class FakeIntent:
    """The gateway's object. `captured_minor` is money that really moved; `status` is in the gateway's words."""

    id: str
    payment_id: str
    order_id: str
    attempt: int
    request: ChargeRequest
    status: str = "requires_confirmation"
    failure: Failure | None = None
    charges: int = 0
    captured_minor: int = 0
    reason: str | None = None

    @property
    def client_secret(self) -> str:
        return f"{self.id}_secret"

    @property
    def charge_id(self) -> str:
        return f"ch_{self.id}_{self.charges}"

    def shown(self) -> Observation:
        match self.status:
            case "requires_confirmation":
                return Created(gateway_id=self.id, client_secret=self.client_secret)
            case "requires_payment_method":
                return Declined(gateway_id=self.id, failure=self.failure or _DECLINED)
            case "requires_action":
                url = self.request.return_url
                action = NextAction(type="redirect_to_url", redirect_url=f"{url}?3ds") if url else NextAction(type="use_stripe_sdk")
                return ActionRequired(gateway_id=self.id, next_action=action, client_secret=self.client_secret)
            case "processing":
                return Processing(gateway_id=self.id)
            case "requires_capture":
                return Authorized(gateway_id=self.id, amount_minor=self.request.amount_minor, transaction_id=self.charge_id)
            case "succeeded":
                receipt = f"https://gateway.example/receipts/{self.charge_id}"
                return Captured(gateway_id=self.id, captured_minor=self.captured_minor, transaction_id=self.charge_id, receipt_url=receipt)
            case _:
                return Voided(gateway_id=self.id, reason=self.reason)

    def charge(self, method: str) -> None:
        """Try to take the money."""
        fate = _METHODS[method]
        if isinstance(fate, Failure):
            self.status, self.failure = "requires_payment_method", fate
        elif fate == "approved":
            self.approve()
        else:
            self.status = fate

    def approve(self) -> None:
        self.charges += 1
        if self.request.capture_method == "manual":
            self.status = "requires_capture"
        else:
            self.status, self.captured_minor = "succeeded", self.request.amount_minor


@dataclass(frozen=True, slots=True)
class _Kept:
    """What an idempotency key was used for, and what was answered."""

    asked: tuple[Any, ...]
    answer: Observation


@dataclass
class FakeGateway:
    """Implements `Gateway`. `intents` is the ledger: `charges` above 1, or money on two of an order's intents, is a double charge."""

    name: str = "stripe"
    key_life: timedelta = timedelta(hours=24)
    breaker: Breaker | None = None
    intents: dict[str, FakeIntent] = field(default_factory=dict)
    calls: list[tuple[str, str | None]] = field(default_factory=list)
    """Every call that reached the gateway: (operation, gateway_id)."""

    def __post_init__(self) -> None:
        self._calls = Calls(self.name, self.breaker or Breaker(self.name, threshold=sys.maxsize))
        self._faults: defaultdict[str, deque[Fault | None]] = defaultdict(deque)
        self._kept: dict[str, _Kept] = {}
        self._running: set[str] = set()
        self._events: dict[str, Webhook] = {}

    # ── What a test does to it ──

    def script(self, operation: str, *faults: Fault | None) -> None:
        """The next calls of `operation` meet these, in turn; None is a call that goes well."""
        self._faults[operation].extend(faults)

    def forget_keys(self) -> None:
        """As after `key_life`: a key that is used again is a new request."""
        self._kept.clear()

    def pay(self, gateway_id: str, method: str) -> None:
        """The customer pays at the gateway, with the client secret."""
        self.intents[gateway_id].charge(method)

    def authenticate(self, gateway_id: str, *, passes: bool = True) -> None:
        """The customer passes 3-D Secure, or doesn't."""
        intent = self.intents[gateway_id]
        if passes:
            intent.approve()
        else:
            intent.status, intent.failure = "requires_payment_method", _AUTHENTICATION_FAILED

    def settle(self, gateway_id: str) -> None:
        """What was processing comes in."""
        self.intents[gateway_id].approve()

    def webhook(self, gateway_id: str, event_type: str) -> tuple[bytes, str]:
        """A webhook with a snapshot of the intent as it is now: body and signature."""
        intent = self.intents[gateway_id]
        event_id = f"evt_{len(self._events) + 1}"
        self._events[event_id] = Webhook(
            event_id=event_id,
            event_type=event_type,
            object_id=intent.id,
            order_id=intent.order_id,
            payment_id=intent.payment_id,
            attempt=intent.attempt,
            observation=intent.shown(),
        )
        body = json.dumps({"id": event_id}).encode()
        return body, self._signature(body)

    # ── Gateway ──

    async def create(self, payment_id: str, order_id: str, attempt: Attempt, *, key: str, timeout: float) -> Created | NotSent | Refused:
        def act() -> Observation:
            if attempt.request.payment_method not in (None, *_METHODS):
                return Refused(failure=_NO_SUCH_METHOD)
            gateway_id = f"pi_{len(self.intents) + 1}"
            self.intents[gateway_id] = FakeIntent(
                id=gateway_id, payment_id=payment_id, order_id=order_id, attempt=attempt.number, request=attempt.request
            )
            return self.intents[gateway_id].shown()

        asked = ("create", payment_id, order_id, attempt.number, attempt.request)
        return creation(await self._ask("create", None, key, asked, act))

    async def confirm(self, gateway_id: str, request: ChargeRequest, *, key: str, timeout: float) -> Observation:
        def act(intent: FakeIntent) -> Observation:
            method = request.payment_method
            if intent.status not in ("requires_confirmation", "requires_payment_method", "requires_action"):
                return intent.shown()
            if method is None:
                return _refused(intent, "payment_intent_unexpected_state", "The intent has no payment method.")
            if method not in _METHODS:
                return Refused(gateway_id=intent.id, failure=_NO_SUCH_METHOD)
            intent.charge(method)
            return intent.shown()

        return await self._ask_about("confirm", gateway_id, key, ("confirm", gateway_id, request.payment_method, request.return_url), act)

    async def capture(self, gateway_id: str, amount_minor: int | None, currency: str, *, key: str, timeout: float) -> Observation:
        def act(intent: FakeIntent) -> Observation:
            if intent.status == "requires_confirmation":
                return _refused(intent, "payment_intent_unexpected_state", "The intent has nothing to capture.")
            if intent.status == "requires_capture":
                if amount_minor is not None and amount_minor > intent.request.amount_minor:
                    return _refused(intent, "amount_too_large", "That is more than was authorised.")
                intent.status, intent.captured_minor = "succeeded", amount_minor or intent.request.amount_minor
            return intent.shown()

        return await self._ask_about("capture", gateway_id, key, ("capture", gateway_id, amount_minor), act)

    async def cancel(self, gateway_id: str, reason: str | None, *, key: str, timeout: float) -> Observation:
        def act(intent: FakeIntent) -> Observation:
            if intent.status not in ("succeeded", "canceled", "processing"):
                intent.status, intent.reason = "canceled", reason
            return intent.shown()

        return await self._ask_about("cancel", gateway_id, key, ("cancel", gateway_id, reason), act)

    async def retrieve(self, gateway_id: str, *, timeout: float) -> Observation:
        return looked_up(await self._ask_about("retrieve", gateway_id, None, ("retrieve", gateway_id), FakeIntent.shown))

    def handles(self, event_type: str) -> bool:
        return event_type.startswith("payment_intent.") and event_type != "payment_intent.created"

    def read_webhook(self, body: bytes, signature: str) -> Webhook:
        if not hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            raise BadSignature
        return self.read_verified_webhook(body)

    def read_verified_webhook(self, body: bytes) -> Webhook:
        try:
            return self._events[json.loads(body)["id"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Rejected("the webhook is no event of this gateway") from error

    async def aclose(self) -> None:
        """It has no connections."""

    # ── How a call goes ──

    async def _ask_about(
        self, operation: str, gateway_id: str, key: str | None, asked: tuple[Any, ...], act: Callable[[FakeIntent], Observation]
    ) -> Observation:
        def act_on_it() -> Observation:
            intent = self.intents.get(gateway_id)
            return act(intent) if intent else Refused(gateway_id=gateway_id, failure=_failure("resource_missing", "There is no such intent."))

        return await self._ask(operation, gateway_id, key, asked, act_on_it)

    async def _ask(
        self, operation: str, gateway_id: str | None, key: str | None, asked: tuple[Any, ...], act: Callable[[], Observation]
    ) -> Observation:
        async def ask() -> Observation:
            fault = self._faults[operation].popleft() if self._faults[operation] else None
            if fault is Fault.NOT_SENT:
                raise GatewayFailed(NotSent(gateway_id=gateway_id, detail=fault))
            if fault is Fault.RATE_LIMITED:
                return NotSent(gateway_id=gateway_id, detail=fault)
            self.calls.append((operation, gateway_id))
            if fault is Fault.LOST_BEFORE:
                raise GatewayFailed(Unknown(gateway_id=gateway_id, detail=fault))
            if key is None:
                answer = self._do(gateway_id, act, fault)
            elif key in self._running:
                return Unknown(gateway_id=gateway_id, detail="a request with this key is running")
            else:
                self._running.add(key)
                try:
                    await asyncio.sleep(0)  # others run meanwhile, as they do while a real gateway works
                    answer = self._once(key, gateway_id, asked, act, fault)
                finally:
                    self._running.discard(key)
            if fault is Fault.LOST_AFTER:
                raise GatewayFailed(Unknown(gateway_id=gateway_id, detail=fault))
            if isinstance(answer, Unknown):
                raise GatewayFailed(answer)
            return answer

        return await self._calls(operation, gateway_id, ask)

    def _once(self, key: str, gateway_id: str | None, asked: tuple[Any, ...], act: Callable[[], Observation], fault: Fault | None) -> Observation:
        """Do it, unless this key has an answer already."""
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(asked, self._do(gateway_id, act, fault))
        elif kept.asked != asked:
            return Unknown(gateway_id=gateway_id, detail="the key was used for another request", key_burnt=True)
        return kept.answer

    def _do(self, gateway_id: str | None, act: Callable[[], Observation], fault: Fault | None) -> Observation:
        if fault is Fault.FAILED_BEFORE:
            return Unknown(gateway_id=gateway_id, detail=fault, key_burnt=True)
        answer = act()
        return Unknown(gateway_id=gateway_id, detail=fault, key_burnt=True) if fault is Fault.FAILED_AFTER else answer

    def _signature(self, body: bytes) -> str:
        return hmac.new(b"whsec_fake", body, hashlib.sha256).hexdigest()


def _failure(code: str, message: str) -> Failure:
    return Failure(code=code, message=message, advice="contact_support")


def _refused(intent: FakeIntent, code: str, message: str) -> Refused:
    return Refused(gateway_id=intent.id, failure=_failure(code, message))
