"""How the sandbox plays: how long it takes, how often a good card passes, and why it does not.

Rule: chance is in this file (and in faults that have a probability), from one seed, a stream of its own for each purpose: the same calls in the same
order have the same luck. Flags set the conditions, `/_sandbox/settings` changes them while it runs.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final

from infra.sandbox.cards import APPROVES, AUTHENTICATES, DECLINES, PROCESSES, Decline, PaymentMethod, Verdict
from schemas.errors import BadConfiguration

_SECONDS: Final = re.compile(r"(\d+(?:\.\d+)?)(?:\.\.(\d+(?:\.\d+)?))?")
_LONGEST_S: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """As a person gives them.

    `latency` is the seconds that a call on an intent takes: `0.5`, or `0.2..1.5` drawn evenly. `success_rate`, from 0 to 1, thins the cards that
    would pass and nothing else; the others fail for `failure_reasons`, names of `cards.DECLINES` with weights.
    """

    latency: str = "0"
    success_rate: float = 1.0
    failure_reasons: str = "card_declined=3,insufficient_funds=1"


USUAL: Final = Conditions()


class Behaviour:
    def __init__(self, conditions: Conditions, seed: int | None) -> None:
        """Raises BadConfiguration as `adopt` does."""
        self._bank = chance(seed, "bank")
        self._network = chance(seed, "network")
        self.adopt(conditions)

    def adopt(self, conditions: Conditions) -> None:
        """Play like this from now on. Raises BadConfiguration that names what is wrong; then nothing changes."""
        latency, reasons = _parse_latency(conditions.latency), parse_failure_reasons(conditions.failure_reasons)
        if not 0 <= conditions.success_rate <= 1:
            raise BadConfiguration(f"--success-rate: {conditions.success_rate} is not between 0 and 1")
        self.conditions = conditions
        self._latency = latency
        self._reasons = [DECLINES[name] for name in reasons]
        self._weights = list(reasons.values())

    def latency_s(self) -> float:
        """How long the next call takes."""
        least, most = self._latency
        return least if least == most else self._network.uniform(least, most)

    def decide(self, method: PaymentMethod) -> Verdict | Decline:
        """What the bank says to a charge with this method."""
        if method.behaviour == APPROVES:
            return self.approve()
        if method.behaviour == AUTHENTICATES:
            return Verdict.CHALLENGED
        if method.behaviour == PROCESSES:
            return Verdict.SUBMITTED
        return DECLINES[method.behaviour]

    def approve(self) -> Verdict | Decline:
        """What comes of a charge that would pass: a yes, as often as the success rate says."""
        if self._bank.random() < self.conditions.success_rate:
            return Verdict.APPROVED
        return self._bank.choices(self._reasons, self._weights)[0]


def chance(seed: int | None, purpose: str) -> random.Random:
    """A stream of luck for one purpose, so that one use does not shift another's."""
    return random.Random(None if seed is None else f"{seed}/{purpose}")  # noqa: S311 - luck, not a secret


def _parse_latency(text: str) -> tuple[float, float]:
    match = _SECONDS.fullmatch(text.strip())
    least = float(match[1]) if match else -1.0
    most = float(match[2]) if match and match[2] else least
    if not 0 <= least <= most <= _LONGEST_S:
        raise BadConfiguration(f"--latency: {text!r} is no number of seconds (0.5) and no range (0.2..1.5) up to {_LONGEST_S}")
    return least, most


def parse_failure_reasons(text: str) -> dict[str, int]:
    """`card_declined=3,insufficient_funds=1` -> weights. Raises BadConfiguration that names the part that is wrong."""
    weights: dict[str, int] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in DECLINES:
            raise BadConfiguration(f"--failure-reasons: {name!r} is no reason; there are: {', '.join(DECLINES)}")
        if not re.fullmatch(r"[1-9]\d{0,5}", weight):
            raise BadConfiguration(f"--failure-reasons: the weight of {name} must be a whole number from 1, as in {name}=3")
        weights[name] = int(weight)
    return weights
