"""Money is an integer of minor units and an ISO 4217 code. No floats, ever."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from babel.core import get_global
from babel.numbers import format_currency

CURRENCIES: Final = frozenset(
    code for territory in get_global("territory_currencies").values() for code, _, until, tender in territory if tender and until is None
)
"""What is legal tender somewhere today: no precious metals, no test codes, no money of the past."""

_EXPONENTS: Final = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
"""ISO 4217's list one, where it does not say 2. CLDR's digits would not do: they are what people print, 0 for RSD, which has hundredths."""


def exponent(currency: str) -> int:
    """How many decimals a currency's minor unit stands for: 2 for EUR, 0 for JPY, 3 for KWD."""
    return _EXPONENTS.get(currency, 2)


def display(amount_minor: int, currency: str) -> str:
    """`1999, 'EUR'` -> `€19.99`, for people; programs read the minor units."""
    amount = Decimal(amount_minor).scaleb(-exponent(currency))
    return str(format_currency(amount, currency, locale="en_US", decimal_quantization=False))
