"""The payments worker as a plain Faust agent: `python -m api.cli.bench.serial_worker`, for `paystream bench` to compare the keyed window with.

Rule: the same app, transport, handler, store and gateway; but `async for` handles one message after the other, and Faust acknowledges each. Nothing
is parked and nothing is tried again: what goes wrong ends the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from infra.database.delivery import Group
from infra.settings import Settings, load
from processors.app import App, Incoming, Work, serve
from processors.delivery import Handle
from processors.groups import payments


@asynccontextmanager
async def serial_payments(settings: Settings) -> AsyncIterator[Work]:
    """The work of the payments group, with another agent."""
    async with payments(settings) as work:
        yield replace(work, register=partial(_register, work=work))


def _register(app: App, work: Work) -> None:
    handle = cast(Handle, work.handler)

    @app.agent(app.topics_named(*work.topics), name="payments")  # type: ignore[untyped-decorator]  # Faust has no types
    async def one_after_the_other(stream: Any) -> None:
        async for event in stream.events():
            received = Incoming(app, event, event.key).received()
            await handle(received, work.codec.decode(received.value))


if __name__ == "__main__":
    serve(load().model_copy(update={"service": "paystream-payments"}), Group.PAYMENTS, serial_payments)
