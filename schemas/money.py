"""Money is an integer of minor units and an ISO 4217 code. No floats, ever."""

from __future__ import annotations

from typing import Final

from babel.core import get_global
from babel.numbers import format_currency, get_currency_precision

CURRENCIES: Final = frozenset(code for code in get_global("all_currencies") if len(code) == 3)


def exponent(currency: str) -> int:
    """How many decimals a currency's minor unit stands for: 2 for EUR, 0 for JPY, 3 for KWD."""
    return int(get_currency_precision(currency))


def display(amount_minor: int, currency: str) -> str:
    """`1999, 'EUR'` -> `€19.99`, for people; programs read the minor units."""
    from decimal import Decimal

    places = exponent(currency)
    return str(format_currency(Decimal(amount_minor).scaleb(-places), currency, locale="en_US"))
