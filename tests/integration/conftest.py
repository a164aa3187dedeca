"""Fixtures for tests on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from infra.settings import Settings
from tests.conftest import Infrastructure
from tests.integration.machinery import Machinery, quick
from tests.integration.pipeline import Pipeline, Shop, Topics, opened_pipeline, opened_shop, topics_after


@pytest.fixture
def machinery(database: Settings, tmp_path: Path) -> Iterator[Machinery]:
    """Topics of their own, with short deadlines, and no worker yet."""
    machinery = Machinery(quick(database), tmp_path)
    yield machinery
    machinery.close()


@pytest.fixture(scope="module")
def pipeline(stack: Infrastructure, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """All parts of the product, running; the tests of one module share them."""
    with opened_pipeline(stack, template_database, tmp_path_factory.mktemp("pipeline")) as pipeline:
        yield pipeline


@pytest.fixture
async def shop(pipeline: Pipeline) -> AsyncIterator[Shop]:
    async with opened_shop(pipeline) as shop:
        yield shop


@pytest.fixture(scope="module")
def topics(pipeline: Pipeline) -> Topics:
    """Where the events of 60 payments of every kind can be read, in values that need no code of ours."""
    return asyncio.run(topics_after(pipeline, payments=60))
