"""Amounts in the gateway's units: exact both ways, or refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.gateways.amounts import UNITS, InexactAmount, from_units, to_units
from schemas.money import CURRENCIES, exponent

pytestmark = pytest.mark.unit

amounts = st.integers(min_value=0, max_value=10**14)
currencies = st.sampled_from(sorted(CURRENCIES))
gateways = st.sampled_from(sorted(UNITS))


def worth(units: int, decimals: int) -> Fraction:
    return Fraction(units, 10**decimals)


@given(gateways, amounts, currencies)
def test_what_is_told_is_worth_the_same_and_comes_back_as_it_was(gateway: str, amount_minor: int, currency: str) -> None:
    try:
        units = to_units(gateway, amount_minor, currency)
    except InexactAmount:
        return
    assert worth(units, UNITS[gateway].exponents.get(currency, exponent(currency))) == worth(amount_minor, exponent(currency))
    assert from_units(gateway, units, currency) == amount_minor


@given(gateways, amounts, currencies)
def test_what_the_gateway_tells_is_worth_the_same(gateway: str, units: int, currency: str) -> None:
    try:
        amount_minor = from_units(gateway, units, currency)
    except InexactAmount:
        return
    assert worth(units, UNITS[gateway].exponents.get(currency, exponent(currency))) == worth(amount_minor, exponent(currency))


@given(gateways, amounts, currencies)
def test_whole_units_of_a_currency_can_always_be_told(gateway: str, whole: int, currency: str) -> None:
    amount_minor = whole * 10 ** exponent(currency)
    assert from_units(gateway, to_units(gateway, amount_minor, currency), currency) == amount_minor


@pytest.mark.parametrize(
    ("currency", "amount_minor", "units"),
    [
        ("EUR", 1999, 1999),
        ("JPY", 500, 500),
        ("ISK", 5, 500),
        ("UGX", 5, 500),
        ("MGA", 500, 5),
        ("KWD", 5120, 5120),
        ("HUF", 1045, 1045),
        ("TWD", 80045, 80045),
        ("RSD", 1999, 1999),
    ],
)
def test_stripes_units(currency: str, amount_minor: int, units: int) -> None:
    assert to_units("stripe", amount_minor, currency) == units
    assert from_units("stripe", units, currency) == amount_minor


@pytest.mark.parametrize(("currency", "amount_minor", "multiple"), [("KWD", 5124, 10), ("TND", 1, 10), ("MGA", 550, 100)])
def test_what_can_not_be_told_exactly_is_refused_with_what_would_be_right(currency: str, amount_minor: int, multiple: int) -> None:
    with pytest.raises(InexactAmount, match=f"amount_minor in {currency} must be a multiple of {multiple}$"):
        to_units("stripe", amount_minor, currency)
    assert to_units("stripe", multiple, currency)


def test_a_fraction_of_a_minor_unit_is_not_rounded_away() -> None:
    with pytest.raises(InexactAmount):
        from_units("stripe", 550, "ISK")
