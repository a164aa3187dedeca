"""How a message is handled once: what a consumer group's transaction knows about it, and where it is parked when it can't be handled.

Rule: seen (inbox or version), parked and consumed are all decided under the order's lock, in the transaction that applies the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from schemas.errors import Rejected


class Group(StrEnum):
    """A consumer group: one Faust app, one kind of process, its own tables."""

    PAYMENTS = "payments"
    ORDERS = "orders"
    ANALYTICS = "analytics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A record as it was read from Kafka, byte for byte. `topic` is without the installation's prefix."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @property
    def order_key(self) -> str | None:
        """The key as text that Postgres takes: the order that this message waits behind when it is parked. None blocks nothing."""
        try:
            return self.key.decode() if self.key and b"\0" not in self.key else None
        except UnicodeDecodeError:
            return None

    @property
    def traceparent(self) -> bytes | None:
        """The trace that the message is part of (W3C Trace Context), for what is said because of it."""
        return next((value for name, value in self.headers if name == "traceparent"), None)

    def expect_key(self, order_id: str) -> None:
        """Raises Rejected unless the message's key is its order: the order's lock would not be its lock, and order would not hold."""
        if self.order_key != order_id:
            raise Rejected(f"the key is {self.order_key!r} and the order {order_id!r}: order would not hold")


class Disposition(StrEnum):
    POISON = "poison"
    BUG = "bug"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a message is parked: scrubbed of secrets and cut before it gets here."""

    disposition: Disposition
    error_class: str
    message: str
    stack: str | None = None


class Parking(Protocol):
    """Where messages that can't be handled wait, and where a group's halt is kept. Raises Unavailable while Postgres is away."""

    async def park(self, group: Group, received: Received, message_id: str | None, fault: Fault) -> None:
        """Take the message out of the way, bytes intact, in one transaction under the order's lock.

        Its order is parked too (unless it has no key, or is a webhook), its inbox mark is set, the copy for `payment-events-dlq` is in the outbox.
        Parking the same place (topic, partition, offset) again changes nothing.
        """
        ...

    async def halt_after(self, group: Group, bugs: int, within: timedelta) -> str | None:
        """Halt the group if so many bugs were parked `within` (counted from its last resume on). The reason if it is halted now, else None."""
        ...

    async def halted(self, group: Group) -> str | None:
        """Why the group is halted, None if it runs."""
        ...

    async def resume(self, group: Group, actor: str) -> bool:
        """Let the group run again, noted in `audit_log`. False if it was not halted."""
        ...

    async def forget(self, before: datetime) -> int:
        """Forget messages that were handled before then: no topic and no dead letter can bring them again. Returns how many."""
        ...

    async def parked_counts(self) -> dict[tuple[str, str], int]:
        """How many messages are parked, by (group, disposition): for the metric."""
        ...
