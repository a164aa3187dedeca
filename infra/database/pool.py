"""Connections to Postgres, and the one place where the driver's errors become ours.

Rule: what a retry can cure (no connection, a restart, a deadlock) is Unavailable; everything else is a bug and stays what it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import psycopg
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from infra.settings import Database
from schemas.errors import Unavailable

Connection = psycopg.AsyncConnection[TupleRow]

_CONNECT: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "tcp_user_timeout": 20_000,  # a server that has vanished answers nothing: without this, its connections would wait for a quarter of an hour
    "options": "-c statement_timeout=15000 -c lock_timeout=10000 -c timezone=UTC",
}

# For connections whose statements all look rows up by key: planned once, by index. Left to itself, the planner plans the long ones anew each time,
# which costs as much as running them; or it keeps a plan that it made while the tables were small, and reads them whole when they have grown.
_BY_KEY: Final = " -c plan_cache_mode=force_generic_plan -c enable_seqscan=off"


class Pool(AsyncConnectionPool[Connection]):
    """When one connection turns out to be broken, so may all idle ones be: they are looked at then, or each would fail somebody after a restart."""

    _looking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[Connection]:
        async with super().connection(timeout) as conn:
            try:
                yield conn
            finally:
                if conn.broken and (self._looking is None or self._looking.done()):
                    self._looking = asyncio.create_task(self.check())


@asynccontextmanager
async def opened_pool(settings: Database, name: str, *, by_key: bool = False) -> AsyncIterator[Pool]:
    """A pool of autocommit connections, opened without waiting for the server: a process starts, and is not ready, while Postgres is away.

    `by_key`: its statements look rows up by key, all of them.
    """
    pool = Pool(
        settings.url.get_secret_value(),
        min_size=1,
        max_size=settings.pool_size,
        timeout=5,
        reconnect_timeout=2,  # then by whoever asks next: the pool alone would look ever less often, for up to five minutes
        open=False,
        name=name,
        kwargs={**_CONNECT, "options": _CONNECT["options"] + (_BY_KEY if by_key else ""), "autocommit": True, "application_name": name},
    )
    await pool.open(wait=False)
    try:
        yield pool
    finally:
        await pool.close(timeout=2)


@asynccontextmanager
async def dedicated_connection(settings: Database, name: str) -> AsyncIterator[Connection]:
    """A connection outside of the pool, for what lasts as long as its session: a lock, LISTEN. A peer that falls silent is given up after 5 s."""
    with translated():
        conn = await psycopg.AsyncConnection.connect(
            settings.url.get_secret_value(), **_CONNECT | {"tcp_user_timeout": 5000}, autocommit=True, application_name=name
        )
        async with conn:
            yield conn


@contextmanager
def translated() -> Iterator[None]:
    """Within the block, psycopg's passing troubles are Unavailable."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, PoolClosed) as error:
        raise Unavailable("Postgres", type(error).__name__) from error


@asynccontextmanager
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    """A connection for one statement after another, each its own transaction."""
    with translated():
        async with pool.connection() as conn:
            yield conn


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A connection in one transaction: committed at the end of the block, rolled back by an exception."""
    with translated():
        async with pool.connection() as conn, conn.transaction():
            yield conn
