"""The account at the gateway: payment methods, intents and charges, and what a request changes about them.

Rule: each public function is one step, made without waiting: it loads, asks the machine, stores what came out and publishes the events. Its rows are
one transaction (storage), so a charge, its events and the answer saved for its key are there together or not at all.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hmac import compare_digest
from typing import Final

from infra.sandbox import intents as machine
from infra.sandbox import objects
from infra.sandbox.behaviour import Behaviour
from infra.sandbox.cards import NAMED_METHODS, PaymentMethod, method_for_number
from infra.sandbox.clock import SandboxClock
from infra.sandbox.errors import ApiError, invalid, missing
from infra.sandbox.intents import Change, Charge, Intent, Status, Step, UnexpectedState
from infra.sandbox.parameters import Card, Confirmation, Creation, Page
from infra.sandbox.storage import Storage
from infra.sandbox.webhooks import Webhooks

_NEEDS_RETURN_URL: Final = (
    "This PaymentIntent is configured to accept payment methods enabled in your Dashboard. Because some of these payment methods might redirect your "
    "customer off of your page, you must provide a `return_url`. If you don't want to accept redirect-based payment methods, set "
    "`automatic_payment_methods[enabled]` to `true` and `automatic_payment_methods[allow_redirects]` to `never` when creating Setup Intents and "
    "Payment Intents."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: the address under which they reach the sandbox (for links), and what events tell of their request."""

    base_url: str
    request_id: str | None = None
    idempotency_key: str | None = None


class Account:
    def __init__(self, storage: Storage, webhooks: Webhooks, behaviour: Behaviour, clock: SandboxClock) -> None:
        self._storage = storage
        self._webhooks = webhooks
        self._behaviour = behaviour
        self._clock = clock

    def now(self) -> int:
        return int(self._clock.now())

    # -- reading

    def intent(self, identifier: str) -> Intent:
        """Raises ApiError 404."""
        intent = self._storage.intents.get(identifier)
        if intent is None:
            raise missing("payment_intent", identifier, param="intent")
        return intent

    def intents(self, page: Page) -> tuple[list[Intent], bool]:
        """Newest first, and whether there are more. Raises ApiError 400 for an unknown place to start after."""
        if page.after is not None and self._storage.intents.get(page.after) is None:
            raise missing("payment_intent", page.after, param="starting_after", status=400)
        found = self._storage.intents.page(page.limit + 1, after=page.after, created_from=page.created_from)
        return found[: page.limit], len(found) > page.limit

    def charge(self, identifier: str) -> Charge:
        """Raises ApiError 404."""
        charge = self._storage.charges.get(identifier)
        if charge is None:
            raise missing("charge", identifier, param="id")
        return charge

    def method(self, identifier: str, *, status: int = 400) -> PaymentMethod:
        """One that was made here, or one of Stripe's test methods by its name. Raises ApiError."""
        method = NAMED_METHODS.get(identifier) or self._storage.methods.get(identifier)
        if method is None:
            raise missing("PaymentMethod", identifier, param="payment_method", status=status)
        return method

    def show(self, intent: Intent, caller: Caller, expand: frozenset[str]) -> objects.Json:
        shown = objects.payment_intent(intent, caller.base_url)
        if "latest_charge" in expand and intent.latest_charge is not None:
            shown["latest_charge"] = objects.charge(self.charge(intent.latest_charge), caller.base_url)
        if "payment_method" in expand and intent.payment_method is not None:
            shown["payment_method"] = objects.payment_method(self.method(intent.payment_method))
        return shown

    # -- what the merchant asks

    def add_method(self, card: Card) -> PaymentMethod:
        method = method_for_number(card.number, identifier=_identifier("pm"), exp_month=card.exp_month, exp_year=card.exp_year, now=self.now())
        self._storage.methods.put(method)
        return method

    def create(self, wish: Creation, caller: Caller) -> Intent:
        """Raises ApiError 402 where it was to be confirmed at once, and is declined: the intent exists then."""
        identifier = _identifier("pi")
        intent = Intent(
            id=identifier,
            created=self.now(),
            amount=wish.amount,
            currency=wish.currency,
            status=Status.REQUIRES_PAYMENT_METHOD,
            client_secret=f"{identifier}_secret_{secrets.token_hex(12)}",
            capture_method=wish.capture_method,
            allow_redirects=wish.allow_redirects,
            payment_method_types=wish.payment_method_types,
            metadata=wish.metadata,
            description=wish.description,
        )
        if wish.payment_method is not None:
            intent = machine.give_method(intent, self.method(wish.payment_method), return_url=None)
        created = Change(intent=intent, events=("payment_intent.created",))
        if wish.confirmation is None:
            return self._record(created, caller)
        method = self._method_to_charge(intent, wish.confirmation, caller)
        self._record(created, caller)
        return self._confirm(intent, method, wish.confirmation.return_url, caller)

    def confirm(self, identifier: str, wish: Confirmation, caller: Caller) -> Intent:
        """Raises ApiError: 400 where its status does not allow that, 402 where the bank declines."""
        intent = self.intent(identifier)
        return self._confirm(intent, self._method_to_charge(intent, wish, caller), wish.return_url, caller)

    def capture(self, identifier: str, amount: int | None, caller: Caller) -> Intent:
        """Raises ApiError 400 where there is nothing to capture, or less than that."""
        intent = self.intent(identifier)
        with _refusals(caller):
            machine.require(intent, Step.CAPTURED)
            return self._record(machine.capture(intent, self._latest_charge(intent), amount), caller)

    def cancel(self, identifier: str, reason: str | None, caller: Caller) -> Intent:
        """Raises ApiError 400 where the money was taken, or the intent canceled, before."""
        intent = self.intent(identifier)
        charge = self._storage.charges.get(intent.latest_charge) if intent.latest_charge else None
        with _refusals(caller):
            return self._record(machine.cancel(intent, charge, reason, self.now()), caller)

    # -- what the customer does, and time

    def pay(self, identifier: str, client_secret: str, wish: Confirmation, caller: Caller) -> Intent:
        """The browser confirms with the client secret, as Stripe.js does; it knows where to return to by itself. Raises ApiError."""
        intent = self.intent(identifier)
        if not compare_digest(intent.client_secret.encode(), client_secret.encode()):
            raise invalid("The client_secret provided does not match the client_secret associated with this PaymentIntent.", param="client_secret")
        method = self._method_to_charge(intent, replace(wish, return_url=wish.return_url or caller.base_url), caller)
        return self._confirm(intent, method, wish.return_url, caller)

    def authenticate(self, identifier: str, caller: Caller, *, passed: bool) -> Intent:
        """3-D Secure comes to its end. A decline is no error here: nobody waits for an answer but the customer."""
        intent = self.intent(identifier)
        with _refusals(caller):
            machine.require(intent, Step.AUTHENTICATED)
            method = self.method(intent.payment_method or "")
            if not passed:
                return self._record(machine.fail_authentication(intent, method), caller)
            return self._record(machine.authenticate(intent, method, self._behaviour.approve(), self.now(), charge_id=_identifier("ch")), caller)

    def settle(self, identifier: str, caller: Caller, *, cleared: bool) -> Intent:
        """A bank debit that was processing comes to its end."""
        intent = self.intent(identifier)
        with _refusals(caller):
            machine.require(intent, Step.CLEARED)
            method = self.method(intent.payment_method or "")
            return self._record(machine.settle(intent, self._latest_charge(intent), method, cleared=cleared), caller)

    def lapse(self, identifier: str, caller: Caller) -> Intent:
        """An authorisation was not captured in time."""
        intent = self.intent(identifier)
        with _refusals(caller):
            machine.require(intent, Step.LAPSED)
            return self._record(machine.lapse(intent, self._latest_charge(intent), self.now()), caller)

    # -- how

    def _method_to_charge(self, intent: Intent, wish: Confirmation, caller: Caller) -> PaymentMethod:
        """Everything that can be wrong with a confirmation before the bank is asked."""
        with _refusals(caller):
            machine.require(intent, Step.METHOD_GIVEN)
        named = wish.payment_method or intent.payment_method
        if named is None:
            raise invalid(
                "You cannot confirm this PaymentIntent because it's missing a payment method. "
                "Update the PaymentIntent with a payment method and then confirm it again.",
                param="payment_method",
                code="payment_intent_unexpected_state",
                payment_intent=objects.payment_intent(intent, caller.base_url),
            )
        if intent.allow_redirects == "always" and not (wish.return_url or intent.return_url):
            raise invalid(_NEEDS_RETURN_URL, param="return_url")
        return self.method(named)

    def _confirm(self, intent: Intent, method: PaymentMethod, return_url: str | None, caller: Caller) -> Intent:
        verdict = self._behaviour.decide(method)
        ids = {"charge_id": _identifier("ch" if method.type == "card" else "py"), "challenge": secrets.token_hex(12)}
        confirmed = self._record(machine.confirm(intent, method, verdict, self.now(), return_url=return_url, **ids), caller)
        if confirmed.last_payment_error is not None:
            raise ApiError(402, **objects.payment_error(confirmed.last_payment_error), payment_intent=self.show(confirmed, caller, frozenset()))
        return confirmed

    def _latest_charge(self, intent: Intent) -> Charge:
        return self.charge(intent.latest_charge or "")

    def _record(self, change: Change, caller: Caller) -> Intent:
        intent, charge = change.intent, change.charge
        self._storage.intents.put(intent)
        if charge is not None:
            self._storage.charges.put(charge)
        for event_type in change.events:
            of_charge = event_type.startswith("charge.")
            self._webhooks.publish(
                event_type,
                objects.charge(charge, caller.base_url) if of_charge and charge else objects.payment_intent(intent, caller.base_url),
                about=intent.id,
                metadata=intent.metadata,
                now=self.now(),
                request_id=caller.request_id,
                idempotency_key=caller.idempotency_key,
            )
        return intent


@contextmanager
def _refusals(caller: Caller) -> Iterator[None]:
    """The machine's refusal, in the API's words: with the intent as it is."""
    try:
        yield
    except UnexpectedState as refusal:
        shown = objects.payment_intent(refusal.intent, caller.base_url)
        raise invalid(str(refusal), code="payment_intent_unexpected_state", payment_intent=shown) from None


def _identifier(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
