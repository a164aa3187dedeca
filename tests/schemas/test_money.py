"""Minor units are ISO 4217's, and people see what they are worth."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.money import CURRENCIES, display, exponent

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("currency", "decimals"), [("EUR", 2), ("JPY", 0), ("ISK", 0), ("UGX", 0), ("KWD", 3), ("CLF", 4), ("MGA", 2), ("RSD", 2), ("ALL", 2)]
)
def test_exponents_are_those_of_iso_4217(currency: str, decimals: int) -> None:
    assert exponent(currency) == decimals


@pytest.mark.parametrize(
    ("amount_minor", "currency", "shown"),
    [(1999, "EUR", "€19.99"), (2000, "EUR", "€20.00"), (500, "JPY", "¥500"), (5124, "KWD", "KWD5.124"), (1999, "RSD", "RSD19.99")],
)
def test_amounts_as_people_see_them(amount_minor: int, currency: str, shown: str) -> None:
    assert display(amount_minor, currency).replace("\N{NO-BREAK SPACE}", "") == shown


@given(st.integers(min_value=0, max_value=10**12), st.sampled_from(sorted(CURRENCIES)))
def test_nothing_is_rounded_away(amount_minor: int, currency: str) -> None:
    shown = re.search(r"[\d,]+(\.\d+)?$", display(amount_minor, currency))
    assert shown is not None
    assert Decimal(shown[0].replace(",", "")) == Decimal(amount_minor).scaleb(-exponent(currency))


@pytest.mark.parametrize(
    ("code", "known"), [("EUR", True), ("JPY", True), ("KWD", True), ("DEM", False), ("XAU", False), ("XXX", False), ("XTS", False)]
)
def test_only_money_of_today_is_a_currency(code: str, known: bool) -> None:
    assert (code in CURRENCIES) is known
