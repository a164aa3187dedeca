"""What Paystream asks of a payment gateway, and how a gateway answers.

Rule: no call raises for what a gateway says or fails to say: the answer is an observation (`schemas/observations.py`). `NotSent` is said only of what
surely had no effect; whatever may have reached the gateway and was not answered is `Unknown`.
Flow: processors/payments/handler -> Gateway -> `Calls` (crash points, breaker, figures) -> the gateway; api/webhooks -> read_webhook.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from schemas.errors import PaystreamError
from schemas.observations import Created, NotSent, Observation, Refused
from schemas.state import Attempt, ChargeRequest


class BadSignature(PaystreamError):
    """The webhook's signature does not fit its body, or is too old: whoever sent it is not the gateway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A gateway's webhook, read. `observation` is what its snapshot of the object shows, None where that is no object of ours to follow.

    `order_id`, `payment_id` and `attempt` are what we wrote into the object when we created it; None where it is not ours.
    """

    event_id: str
    event_type: str
    object_id: str
    order_id: str | None = None
    payment_id: str | None = None
    attempt: int | None = None
    observation: Observation | None = None


class Gateway(Protocol):
    """A payment gateway. Amounts are ISO 4217 minor units; `timeout` is in seconds; `key` is the operation's idempotency key.

    Charging has two steps, so that a crash can always ask by id: `create` (no money moves), then `confirm` of that id.
    """

    @property
    def name(self) -> str:
        """As in `Payment.gateway`."""
        ...

    @property
    def key_life(self) -> timedelta:
        """How long the gateway remembers an idempotency key. Used again after that, a key is a new request."""
        ...

    async def create(self, payment_id: str, order_id: str, attempt: Attempt, *, key: str, timeout: float) -> Created | NotSent | Refused:
        """Make the attempt's object, unconfirmed. No money moves here, so whatever was not answered is NotSent."""
        ...

    async def confirm(self, gateway_id: str, request: ChargeRequest, *, key: str, timeout: float) -> Observation:
        """Charge the object `gateway_id`: Captured, Authorized, ActionRequired, Processing, Declined, Refused, Unknown or NotSent.

        An object that is past that (captured or voided meanwhile) answers with the state it is in.
        """
        ...

    async def capture(self, gateway_id: str, amount_minor: int | None, currency: str, *, key: str, timeout: float) -> Observation:
        """Take what was authorised, all of it if `amount_minor` is None; the rest is released."""
        ...

    async def cancel(self, gateway_id: str, reason: str | None, *, key: str, timeout: float) -> Observation:
        """Void the object, so that nobody can pay it any more: Voided, or Captured if the money was quicker."""
        ...

    async def retrieve(self, gateway_id: str, *, timeout: float) -> Observation:
        """How the object stands: Created (nobody has confirmed it), Declined, Voided …; Unknown when the gateway does not tell.

        Never NotSent or Refused: that a look-up failed says nothing of what was done before it.
        """
        ...

    def handles(self, event_type: str) -> bool:
        """Whether webhooks of this type tell anything that we follow; the others are answered and forgotten."""
        ...

    def read_webhook(self, body: bytes, signature: str) -> Webhook:
        """Verify and read a webhook. Raises BadSignature; Rejected if the gateway signed what is no event."""
        ...

    def read_verified_webhook(self, body: bytes) -> Webhook:
        """Read the body of a webhook that `read_webhook` let pass before it was put on Kafka. Raises Rejected if it is no event."""
        ...

    async def aclose(self) -> None:
        """Close its connections."""
        ...
