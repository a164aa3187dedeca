"""A worker like the payments one, with a handler that waits and writes down what it handled: what tests of the machinery run, as a real process.

`python -m tests.processors.echo_worker NAME [--latency 1.0] [--slow 10] [--off REPAIR] [--batch N] [--quiet]`; the rest is in the settings.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from infra import settings as all_settings
from infra.clock import SystemClock
from infra.database.delivery import Group, Received
from infra.database.parking import PostgresParking
from infra.database.pool import connection, opened_pool
from infra.settings import Settings
from processors.app import App, Batches, Work, serve
from processors.payments import agent
from processors.transport import Repairs
from schemas.codec import Codec
from schemas.messages import Message, ResolveAttempt

CREATE = """
    CREATE TABLE IF NOT EXISTS handled (
        id bigint GENERATED ALWAYS AS IDENTITY, worker text, order_id text, number int, topic text, partition int, "offset" bigint,
        started timestamptz, finished timestamptz DEFAULT clock_timestamp())"""
INSERT = """
    INSERT INTO handled (worker, order_id, number, topic, partition, "offset", started)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::int[], %s::text[], %s::int[], %s::bigint[], %s::timestamptz[])"""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name")
    arguments.add_argument("--latency", type=float, default=1.0, help="seconds that a message takes")
    arguments.add_argument("--slow", type=float, default=10.0, help="the same for orders that are called slow…; those that begin with bug raise")
    arguments.add_argument("--off", action="append", default=[])
    arguments.add_argument("--batch", type=int, default=0)
    arguments.add_argument("--ends", type=float, help="seconds after which a service that should run for ever ends")
    arguments.add_argument("--quiet", action="store_true", help="write nothing down")
    return arguments


class Echo:
    """Collects what was handled, and writes it in batches, so that the database is no part of what is measured."""

    def __init__(self, pool: Any, options: argparse.Namespace) -> None:
        self._pool, self._options = pool, options
        self._rows: list[tuple[Any, ...]] = []
        self._written: asyncio.Future[None] | None = None

    async def handle(self, received: Received, message: Message) -> None:
        assert isinstance(message, ResolveAttempt)
        started = SystemClock().now()
        if message.order_id.startswith("bug"):
            raise ZeroDivisionError("as asked")
        if message.order_id.startswith("fatal"):
            raise SystemExit("as asked")
        await asyncio.sleep(self._options.slow if message.order_id.startswith("slow") else self._options.latency)
        if not self._options.quiet:
            await self._write(received, message, started)

    async def handle_batch(self, batch: Sequence[tuple[Received, Message]]) -> None:
        started = SystemClock().now()
        await asyncio.sleep(self._options.latency)
        await asyncio.gather(*(self._write(received, message, started) for received, message in batch))

    async def _write(self, received: Received, message: Message, started: Any) -> None:
        assert isinstance(message, ResolveAttempt)
        self._rows.append((self._options.name, message.order_id, message.attempt, received.topic, received.partition, received.offset, started))
        if self._written is None or self._written.done():
            self._written = asyncio.ensure_future(self._flush())
        await asyncio.shield(self._written)

    async def _flush(self) -> None:
        await asyncio.sleep(0.005)
        rows, self._rows, self._written = self._rows, [], None
        async with connection(self._pool) as conn:
            await conn.execute(INSERT, [list(column) for column in zip(*rows, strict=True)])


def compose(options: argparse.Namespace) -> Any:
    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[Work]:
        async with opened_pool(settings.database, options.name) as pool:
            echo = Echo(pool, options)
            yield Work(
                register=agent.register if not options.batch else _in_one_line,
                topics=agent.TOPICS,
                codec=Codec.unregistered(),
                parking=PostgresParking(pool, SystemClock()),
                services=[partial(asyncio.sleep, options.ends)] if options.ends else [],
                handler=Batches(echo.handle_batch, options.batch) if options.batch else echo.handle,
            )

    return opened


def _in_one_line(app: App) -> None:
    @app.agent(app.topics_named(*agent.TOPICS), name="echo")  # type: ignore[untyped-decorator]  # Faust has no types
    async def echo(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.admit(event, "all")


def main() -> None:
    options = parser().parse_args()
    serve(all_settings.load(), Group.PAYMENTS, compose(options), repairs=Repairs(**dict.fromkeys(options.off, False)))


if __name__ == "__main__":
    main()
