"""Fixtures for tests on a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.settings import Settings
from tests.integration.machinery import Machinery, quick


@pytest.fixture
def machinery(database: Settings, tmp_path: Path) -> Iterator[Machinery]:
    """Topics of their own, with short deadlines, and no worker yet."""
    machinery = Machinery(quick(database), tmp_path)
    yield machinery
    machinery.close()
