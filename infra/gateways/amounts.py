"""Amounts in each gateway's own units, which are not always ISO 4217's.

Rule: an amount is told exactly or not at all; nothing is rounded. One row in `UNITS` for each gateway that takes integers.
Flow: ChargeRequest.amount_minor -> to_units -> the gateway -> from_units -> Captured.captured_minor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from schemas.errors import PaystreamError
from schemas.money import display, exponent


class InexactAmount(PaystreamError):
    """The amount can't be told exactly in the other side's units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Where a gateway departs from ISO 4217: `exponents` of its own, and `steps`, which amounts in its units must be a multiple of."""

    exponents: Mapping[str, int]
    steps: Mapping[str, int]

    def factor(self, currency: str) -> tuple[int, int]:
        """`(multiplier, divisor)` from ISO's minor units to the gateway's; one of the two is 1."""
        shift = self.exponents.get(currency, exponent(currency)) - exponent(currency)
        return 10 ** max(shift, 0), 10 ** max(-shift, 0)


UNITS: Final[Mapping[str, Units]] = {
    # docs.stripe.com/currencies: MGA is on its zero-decimal list, which otherwise agrees with ISO. ISK and UGX ("special cases") are sent as if they
    # still had two decimals, always 00; three-decimal currencies must end in 0. HUF and TWD differ for payouts only.
    "stripe": Units(
        exponents={"MGA": 0, "ISK": 2, "UGX": 2},
        steps=dict.fromkeys(("BHD", "JOD", "KWD", "OMR", "TND"), 10),
    ),
}


def to_units(gateway: str, amount_minor: int, currency: str) -> int:
    """What to tell the gateway for `amount_minor`. Raises InexactAmount with a message for whoever sent the amount."""
    units = UNITS[gateway]
    multiplier, divisor = units.factor(currency)
    amount, rest = divmod(amount_minor * multiplier, divisor)
    step = units.steps.get(currency, 1)
    if rest or amount % step:
        told = display(amount_minor, currency)
        raise InexactAmount(f"{gateway} can't be told {told} exactly: amount_minor in {currency} must be a multiple of {divisor * step}")
    return amount


def from_units(gateway: str, amount: int, currency: str) -> int:
    """The ISO 4217 minor units of what the gateway told. Raises InexactAmount."""
    multiplier, divisor = UNITS[gateway].factor(currency)
    amount_minor, rest = divmod(amount * divisor, multiplier)
    if rest:
        raise InexactAmount(f"{gateway} tells {amount} {currency}, which is no whole number of minor units")
    return amount_minor
