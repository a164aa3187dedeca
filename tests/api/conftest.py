from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from infra.settings import Settings
from tests.api.world import World, opened_world


@pytest.fixture
async def world(database: Settings) -> AsyncIterator[World]:
    async with opened_world(database) as opened:
        yield opened
