"""What must not be written down: card numbers and secrets, taken out of any text that leaves a process (logs, faults, answers).

Rule: the text is searched before it is cut, so that no half of a secret is left. Used by logs, by parked messages and, as a check, by the intake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

REDACTED: Final = "[redacted]"

_OURS: Final = re.compile(r"(?i)(?<![0-9a-z])(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?:ord_)?[0-9a-f]{32,})(?![0-9a-z])")
"""UUIDs, hashes and order ids made from them: one in some thousands has sixteen digits in a row that pass for a card's."""

_RUN: Final = re.compile(r"[0-9](?:[ -]?[0-9]){12,}")
_ISSUERS: Final = re.compile(
    r"4"  # Visa
    r"|5[0-8]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|6[379]"  # Mastercard, Maestro
    r"|3[47]"  # American Express
    r"|30[0-5]|3[689]"  # Diners Club
    r"|35(?:2[89]|[3-8])"  # JCB
    r"|6011|64[4-9]|65|62"  # Discover, UnionPay
)
_SECRETS: Final = (
    (re.compile(r"\b([sr]k_(?:live_|test_)?)\w{4,}"), r"\1" + REDACTED),
    (re.compile(r"\b(whsec_)[\w+/=-]+"), r"\1" + REDACTED),
    (re.compile(r"(_secret_)\w+"), r"\1" + REDACTED),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+"), r"\1" + REDACTED),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), REDACTED),
    (re.compile(r"(\w://[^\s:/@]*:)[^\s/@]+@"), r"\1" + REDACTED + "@"),
)
_SUSPICIOUS: Final = re.compile(r"(?i)[0-9](?:[ -]?[0-9]){12}|k_|whsec_|_secret_|bearer|eyJ|://")
"""What none of the patterns can do without: nearly every text is done with here."""

_DOUBLED: Final = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
"""Twice a digit, its own digits added (Luhn's rule: ISO/IEC 7812-1, annex B)."""

_LONGEST: Final = 256 * 1024
"""Characters that are looked at; nothing of a longer text is kept, so that nobody can keep us busy with one."""


def find_card_number(text: str) -> bool:
    """Is there a card number in the text: 13 to 19 digits, perhaps grouped by spaces or dashes, of a known issuer, with a right check digit?"""
    return next(_card_numbers(text), None) is not None


def scrub(text: str) -> str:
    """The text without card numbers and secrets: API keys, webhook and client secrets, bearer tokens, passwords in URLs."""
    text = text[:_LONGEST]
    if not _SUSPICIOUS.search(text):
        return text
    for start, end in reversed(list(_card_numbers(text))):
        text = text[:start] + REDACTED + text[end:]
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def cut(text: str, max_bytes: int, *, keep_end: bool = False) -> str:
    """At most `max_bytes` of UTF-8, of the beginning or, with `keep_end`, of the end; a cut is marked by `…`."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return text
    room = max_bytes - len("…".encode())
    return "…" + encoded[len(encoded) - room :].decode(errors="ignore") if keep_end else encoded[:room].decode(errors="ignore") + "…"


def _card_numbers(text: str) -> Iterator[tuple[int, int]]:
    """Where card numbers are. A number may stand among other groups of digits: `4242 4242 4242 4242 12 29`."""
    text = _OURS.sub(lambda found: "x" * len(found[0]), text)
    for run in _RUN.finditer(text):
        places = [place for place in range(run.start(), run.end()) if text[place] not in " -"]
        digits = "".join(text[place] for place in places)
        begins = [at for at, place in enumerate(places) if at == 0 or places[at - 1] != place - 1]
        ends = {*begins[1:], len(digits)}
        sums = _luhn_sums(digits)
        free_from = 0
        for begin in begins:
            if begin < free_from or not _ISSUERS.match(digits, begin):
                continue
            for end in range(begin + 13, begin + 20):
                if end in ends and (sums[end % 2][end] - sums[end % 2][begin]) % 10 == 0:
                    yield places[begin], places[end - 1] + 1
                    free_from = end
                    break


def _luhn_sums(digits: str) -> tuple[list[int], list[int]]:
    """Running sums with every other digit doubled, so that any part can be checked at once: the first list is for parts that end at an even place."""
    sums: tuple[list[int], list[int]] = ([0], [0])
    for at, digit in enumerate(map(int, digits)):
        sums[at % 2].append(sums[at % 2][-1] + _DOUBLED[digit])
        sums[1 - at % 2].append(sums[1 - at % 2][-1] + digit)
    return sums
