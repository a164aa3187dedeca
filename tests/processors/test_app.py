"""How a record comes in, and how a worker comes up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.database.delivery import Received
from infra.settings import Settings
from processors import app as module
from processors.app import Incoming, Work
from schemas.errors import Unavailable

pytestmark = pytest.mark.unit


def incoming(**fields: Any) -> Incoming:
    message = {"topic": "blue-payment-commands", "partition": 2, "offset": 7, "timestamp": None, "key": None, "value": None, "headers": None}
    app: Any = SimpleNamespace(prefix="blue-")
    event: Any = SimpleNamespace(message=SimpleNamespace(**{**message, **fields}))
    return Incoming(app, event, "key")


maybe_bytes = st.none() | st.binary()


@given(
    key=maybe_bytes,
    value=maybe_bytes,
    timestamp_ms=st.none() | st.integers(0, 2**42),
    headers=st.lists(st.tuples(st.sampled_from("ab"), st.binary())),
)
def test_a_record_comes_in_byte_for_byte(key: bytes | None, value: bytes | None, timestamp_ms: int | None, headers: list[tuple[str, bytes]]) -> None:
    timestamp = None if timestamp_ms is None else timestamp_ms / 1000.0  # as Faust hands it on
    event = incoming(timestamp=timestamp, key=key, value=value, headers=headers or None)
    assert event.received() == Received(
        topic="payment-commands", partition=2, offset=7, timestamp_ms=timestamp_ms, key=key, value=value, headers=tuple(headers)
    )


def test_headers_that_postgres_could_not_keep_are_mended() -> None:
    assert incoming(headers=[("a\0b", b"\0"), ("none", None)]).received().headers == (("ab", b"\0"), ("none", b""))


async def test_a_worker_waits_for_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0)
    work, tries, closed = object(), 0, False

    @asynccontextmanager
    async def compose(_: Settings) -> AsyncIterator[Any]:
        nonlocal tries, closed
        tries += 1
        if tries < 4:
            raise Unavailable("the registry")
        yield work
        closed = True

    async with AsyncExitStack() as opened:
        composed: Work = await module._compose(Settings(), compose, opened)
        assert composed is work
        assert not closed
    assert (tries, closed) == (4, True)


async def test_whoever_fails_first_is_heard() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await module._first_of(asyncio.sleep(60), fail())
    assert await module._first_of(asyncio.sleep(0, "first"), asyncio.sleep(0.01, "second")) == "first"
