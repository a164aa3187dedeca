"""What a gateway said, or failed to say: the outcomes of one call, a look-up or a webhook, as data.

Rule: adapters in `infra/gateways` produce these and nothing else; the payment machine's `observe` takes them and never refuses one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from schemas.state import Failure, NextAction


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """`gateway_id` is the gateway's object, None if there is none yet. `latency_ms` is how long the telling call took."""

    gateway_id: str | None = None
    latency_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Created(Observation):
    """The object exists and no money was asked for yet (or the method was declined and another may be given)."""

    gateway_id: str
    client_secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processing(Observation):
    """The gateway works on it, perhaps for days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRequired(Observation):
    next_action: NextAction
    client_secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorized(Observation):
    amount_minor: int
    transaction_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured(Observation):
    captured_minor: int
    transaction_id: str
    receipt_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined(Observation):
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Voided(Observation):
    """The object is cancelled at the gateway: it can't be paid any more. `reason` in the gateway's words."""

    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Observation):
    """The gateway will not do what was asked, now or later (a request that it finds invalid), and nothing moved."""

    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(Observation):
    """It was sent and no answer tells what became of it. `key_burnt`: the gateway answered 5xx and would replay that for this key."""

    detail: str
    key_burnt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NotSent(Observation):
    """It surely had no effect: connection refused, 429, breaker open, or the look-up shows so."""

    detail: str
    key_burnt: bool = False
