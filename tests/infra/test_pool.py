"""The pool when Postgres ends its connections, as a restart does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from infra.database.pool import Pool, connection, opened_pool, transaction
from infra.settings import Settings
from schemas.errors import Unavailable

pytestmark = pytest.mark.integration


async def occupy(pool: Pool, connections: int) -> None:
    """Have so many connections in use at once, so that as many lie idle afterwards."""
    everybody_has_one = asyncio.Barrier(connections)

    async def one() -> None:
        async with connection(pool):
            await everybody_has_one.wait()

    await asyncio.gather(*(one() for _ in range(connections)))


def end_connections(settings: Settings) -> int:
    with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as conn:
        ended = conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'test'").fetchall()
    return len(ended)


@pytest.mark.parametrize("lend", [connection, transaction])
async def test_a_restart_does_not_fail_somebody_for_each_idle_connection(database: Settings, lend: Callable[[Pool], Any]) -> None:
    async with opened_pool(database.database, "test") as pool:
        await occupy(pool, 8)
        assert await asyncio.to_thread(end_connections, database) == 8
        failures = 0
        for _ in range(12):
            try:
                async with lend(pool) as conn:
                    await conn.execute("SELECT 1")
            except Unavailable:
                failures += 1
        assert 1 <= failures <= 2  # the one that finds out, and the one who came before the others were looked at
