"""Card numbers and secrets are found wherever they stand, and nothing else is."""

from __future__ import annotations

import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.scrub import REDACTED, cut, find_card_number, scrub

pytestmark = pytest.mark.unit

CARDS = [
    "4242424242424242",
    "4222222222222",
    "5555555555554444",
    "2223003122003222",
    "378282246310005",
    "30569309025904",
    "38520000023237",
    "3566002020360505",
    "6011111111111117",
    "6200000000000005",
    "4000002760003184",
]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("written", ["{}", "card {}!", '{{"number":"{}"}}', "n={};", "x{}y", "_{}_", "{} 12/29 123", "12 {}", "99999-{}-1"])
def test_a_card_number_is_found_wherever_it_stands(card: str, written: str) -> None:
    assert find_card_number(written.format(card))
    grouped = " ".join(card[at : at + 4] for at in range(0, len(card), 4))
    for form in (card, grouped, grouped.replace(" ", "-")):
        assert find_card_number(written.format(form))
        assert form not in scrub(written.format(form))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4242424242424241",
        "1234567890123456",
        "424242424242",
        "42424242424242424242424242",
        "2026-11-21T01:29:43.123456Z",
        "order-1795227323.9",
        "7992739871300000",
        "4242.4242.4242.4242",
        "0000000000000000",
        "f4242424242424242f4242424242424242",
    ],
)
def test_what_is_no_card_number_stays(text: str) -> None:
    assert not find_card_number(text)
    assert scrub(text) == text


def test_ids_of_ours_are_never_taken_for_card_numbers() -> None:
    dice = random.Random(1)
    for _ in range(20_000):
        number = uuid.UUID(int=dice.getrandbits(128))
        assert not find_card_number(f"payment {number} of ord_{number.hex}")


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("key sk_live_51Habc", f"key sk_live_{REDACTED}"),
        ("rk_test_abcd1234 used", f"rk_test_{REDACTED} used"),
        ("signed with whsec_AbC+/=", f"signed with whsec_{REDACTED}"),
        ("pi_3Nabc_secret_xyz789", f"pi_3Nabc_secret_{REDACTED}"),
        ("Authorization: Bearer abc.DEF-_~+/==", f"Authorization: Bearer {REDACTED}"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1MSJ9.c2ln", f"token {REDACTED}"),
        ("postgresql://me:p%40ss@host/db", f"postgresql://me:{REDACTED}@host/db"),
        ("redis://:secret@127.0.0.1:6379/0", f"redis://:{REDACTED}@127.0.0.1:6379/0"),
        ("http://127.0.0.1:8080/path", "http://127.0.0.1:8080/path"),
        ("task_1 and risk_high", "task_1 and risk_high"),
    ],
)
def test_secrets_are_taken_out(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@given(st.text())
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@given(st.text(), st.integers(3, 50), st.booleans())
def test_a_text_is_cut_to_bytes_and_stays_text(text: str, max_bytes: int, keep_end: bool) -> None:
    short = cut(text, max_bytes, keep_end=keep_end)
    assert len(short.encode(errors="replace")) <= max_bytes
    assert short == text or "…" in short


def test_a_long_text_is_searched_in_reasonable_time() -> None:
    assert len(scrub("4 " * 2_000_000)) < 300_000
