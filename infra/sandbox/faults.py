"""Faults that a test orders: the n-th answer is lost, the next event comes late.

Rule: a fault is taken for one call, or one event, at a time, the oldest that fits first, until its times are used up. Which calls it fits is data:
operation, event type, metadata. Faults are orders, not data: they end with the process.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Final

from infra.sandbox.errors import invalid

OPERATIONS: Final = ("create", "confirm", "capture", "cancel", "retrieve", "list", "any")
CALL_KINDS: Final = ("answer_lost", "error_500", "rate_limit", "timeout", "refuse", "slow")
WEBHOOK_KINDS: Final = ("webhook_late", "webhook_twice", "webhook_out_of_order", "webhook_never")
_MAX_ORDERED: Final = 10_000


@dataclass(slots=True, kw_only=True)
class Fault:
    """`times` is how often it strikes, None for ever. `after_charge` (error_500, timeout): the work is done before the answer fails.

    answer_lost: the work is done, the connection closed without an answer. error_500: an error, saved under the idempotency key. rate_limit: 429.
    timeout: no answer until the client gives up. refuse: the connection closed before anything was done. slow: `delay_seconds` more.
    webhook_late: `delay_seconds` later. webhook_twice, webhook_never. webhook_out_of_order: after a later event of the same object, or
    `delay_seconds` later where none comes.
    """

    id: str
    kind: str
    operation: str = "any"
    event_type: str | None = None
    times: int | None = 1
    probability: float = 1.0
    delay_seconds: float = 0.0
    after_charge: bool = False
    match: Mapping[str, str] = field(default_factory=dict)
    struck: int = 0


class Faults:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._ordered: list[Fault] = []
        self._spent: deque[Fault] = deque(maxlen=_MAX_ORDERED)
        self._numbers = count(1)

    def order(self, wish: Mapping[str, Any]) -> Fault:
        """Raises ApiError that names the member that is wrong."""
        if len(self._ordered) >= _MAX_ORDERED:
            raise invalid(f"There are {_MAX_ORDERED} faults waiting already; DELETE /_sandbox/faults drops them.")
        fault = _read(wish, f"fault_{next(self._numbers)}")
        self._ordered.append(fault)
        return fault

    @property
    def waiting(self) -> bool:
        """Whether there is any fault left to strike."""
        return bool(self._ordered)

    def for_call(self, operation: str, metadata: Mapping[str, str], *, replayed: bool) -> Fault | None:
        """The fault that strikes this call. A replayed answer is what it was: only the way back can fail, not the work."""
        kinds = [kind for kind in CALL_KINDS if kind != "error_500"] if replayed else CALL_KINDS
        return self._take(kinds, lambda fault: fault.operation in (operation, "any"), metadata)

    def for_event(self, event_type: str, metadata: Mapping[str, str]) -> Fault | None:
        return self._take(WEBHOOK_KINDS, lambda fault: fault.event_type in (event_type, None), metadata)

    def _take(self, kinds: Collection[str], fits: Callable[[Fault], bool], metadata: Mapping[str, str]) -> Fault | None:
        for fault in self._ordered:
            if fault.kind not in kinds or not fits(fault) or any(metadata.get(name) != value for name, value in fault.match.items()):
                continue
            if self._chance.random() >= fault.probability:
                continue
            fault.struck += 1
            if fault.times is not None and fault.struck >= fault.times:
                self._ordered.remove(fault)
                self._spent.append(fault)
            return fault
        return None

    def shown(self) -> list[dict[str, Any]]:
        """All that were ordered, with how often each struck; those that are used up come first."""
        return [asdict(fault) for fault in (*self._spent, *self._ordered)]

    def clear(self) -> None:
        self._ordered.clear()
        self._spent.clear()


def _read(wish: Mapping[str, Any], identifier: str) -> Fault:
    known = {"kind", "operation", "event_type", "times", "probability", "delay_seconds", "after_charge", "match"}
    for name in wish.keys() - known:
        raise invalid(f"{name[:50]} is no member of a fault; there are: {', '.join(sorted(known))}", param=name[:50])
    kind = wish.get("kind")
    if kind not in (*CALL_KINDS, *WEBHOOK_KINDS):
        raise invalid(f"kind must be one of {', '.join((*CALL_KINDS, *WEBHOOK_KINDS))}", param="kind")
    operation = wish.get("operation", "any")
    if operation not in OPERATIONS:
        raise invalid(f"operation must be one of {', '.join(OPERATIONS)}", param="operation")
    event_type = wish.get("event_type")
    if event_type is not None and not isinstance(event_type, str):
        raise invalid("event_type must be a text like payment_intent.succeeded", param="event_type")
    # One strike, unless a probability is given: that goes on for ever.
    times = wish.get("times", None if "probability" in wish else 1)
    if times is not None and (type(times) is not int or times < 1):
        raise invalid("times must be a whole number above 0", param="times")
    after_charge = wish.get("after_charge", False)
    if not isinstance(after_charge, bool):
        raise invalid("after_charge must be true or false", param="after_charge")
    return Fault(
        id=identifier,
        kind=kind,
        operation=operation,
        event_type=event_type,
        times=times,
        probability=_number(wish, "probability", 1.0, most=1.0),
        delay_seconds=_number(wish, "delay_seconds", 5.0 if kind == "webhook_out_of_order" else 1.0, most=3 * 24 * 3600.0),
        after_charge=after_charge,
        match=_read_match(wish.get("match", {})),
    )


def _read_match(match: Any) -> dict[str, str]:
    metadata = match.get("metadata", {}) if isinstance(match, dict) and match.keys() <= {"metadata"} else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid('match must be {"metadata": {name: text, …}}', param="match")
    return metadata


def _number(wish: Mapping[str, Any], name: str, default: float, *, most: float) -> float:
    value = wish.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise invalid(f"{name} must be a number between 0 and {most:g}", param=name)
    return float(value)
