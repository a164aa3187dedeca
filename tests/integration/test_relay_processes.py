"""Relays as real processes: killed at each step, hung, replaced. Afterwards every row is on its topics once, in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import pytest

from infra.local.process import Program
from infra.schema_registry import load_codec, register
from infra.settings import Settings
from schemas.codec import Codec
from tests.conftest import StartProgram
from tests.integration.test_relay import assert_exactly_once, events_of, is_true
from tests.outbox_writer import Connection, OutboxWriter, all_published, connected, unpublished_count

pytestmark = pytest.mark.race


@pytest.fixture
def codec(installation: Settings) -> Codec:
    register(installation)
    return load_codec(installation)


@asynccontextmanager
async def steadily(settings: Settings, writer: OutboxWriter) -> AsyncIterator[None]:
    """Events of twenty orders, as fast as one connection writes them, for as long as the block lasts."""
    enough = asyncio.Event()

    async def write() -> None:
        async with await connected(settings) as conn:
            for number in count():
                await writer.append(conn, f"o{number % 20}", 2)
                if enough.is_set():  # not cancelled: the writer would have counted what is rolled back
                    return
                await asyncio.sleep(0.005)

    writing = asyncio.create_task(write())
    try:
        yield
    finally:
        enough.set()
        await writing


async def ended(program: Program) -> int:
    await is_true(lambda: program.exit_code is not None)
    assert program.exit_code is not None
    return program.exit_code


@pytest.mark.parametrize("point", ["before_begin", "after_produce", "before_commit", "after_commit", "after_mark"])
async def test_a_relay_that_dies_at_each_step(installation: Settings, codec: Codec, start: StartProgram, point: str) -> None:
    writer = OutboxWriter(codec)
    async with await connected(installation) as conn:
        dies = await asyncio.to_thread(start, "relay", PAYSTREAM_CRASH_AT=f"relay.{point}:2")
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        async with conn.transaction():
            await writer.append(conn, "o1", 2)
            await writer.append(conn, "o2", 2)
        assert await ended(dies) == 137
        committed = (await asyncio.to_thread(events_of, installation, codec=codec)).get("o2")
        marked = await unpublished_count(conn) == 0
        assert (committed, marked) == {"after_commit": ([1, 2], False), "after_mark": ([1, 2], True)}.get(point, (None, False))
        await writer.append(conn, "o2", 2)
        await asyncio.to_thread(start, "relay")
        await all_published(installation)
    await assert_exactly_once(installation, writer, codec)


async def test_killed_again_and_again_under_load(installation: Settings, codec: Codec, start: StartProgram) -> None:
    writer = OutboxWriter(codec)
    async with steadily(installation, writer):
        for step in ("after_produce:9", "before_commit:5", "after_commit:7"):
            dies = await asyncio.to_thread(start, "relay", wait=False, PAYSTREAM_CRASH_AT=f"relay.{step}")  # it may be there before it is ready
            assert await ended(dies) == 137
    last = await asyncio.to_thread(start, "relay")
    await all_published(installation)
    await asyncio.to_thread(last.stop)
    assert last.exit_code == 0
    await assert_exactly_once(installation, writer, codec)


async def test_a_relay_that_hangs_is_replaced_and_does_no_harm_when_it_wakes(installation: Settings, codec: Codec, start: StartProgram) -> None:
    """It hangs for longer than Postgres keeps its lock and Kafka its transaction. That it runs on makes no difference: it is fenced."""
    short = installation.model_copy(update={"relay": installation.relay.model_copy(update={"transaction_timeout_ms": 2000})})
    writer = OutboxWriter(codec)
    async with steadily(installation, writer), await connected(installation) as conn:
        first = await asyncio.to_thread(start, "relay", settings=short)
        second = await asyncio.to_thread(start, "relay", settings=short)
        assert first.identity is not None
        process = first.identity.process()
        assert process is not None
        await is_true(lambda: writer.versions.total() > 200)
        process.send_signal(signal.SIGSTOP)
        try:
            hung_at = writer.versions.total()
            await published_beyond(conn, hung_at)
        finally:
            process.send_signal(signal.SIGCONT)
        await published_beyond(conn, writer.versions.total())
        await is_true(first.is_ready)
        await is_true(second.is_ready)
        await asyncio.to_thread(second.stop)
        await published_beyond(conn, writer.versions.total())
    await all_published(installation)
    await assert_exactly_once(installation, writer, codec)


async def published_beyond(conn: Connection, rows: int) -> None:
    """Wait until more rows than that are published."""
    async with asyncio.timeout(40):
        while True:
            row = await (await conn.execute("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL")).fetchone()
            if row is not None and row[0] > rows:
                return
            await asyncio.sleep(0.05)
