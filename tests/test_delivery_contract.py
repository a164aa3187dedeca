"""The page of promises names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "delivery.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/[^`]+::[^`]+)`", PAGE))))
def test_each_test_that_is_named_exists(reference: str) -> None:
    path, _, name = reference.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_each_promise_is_on_the_page() -> None:
    assert re.findall(r"\| \*\*(D\d)\*\*", PAGE) == [f"D{n}" for n in range(1, 9)]
