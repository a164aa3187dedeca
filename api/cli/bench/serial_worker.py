"""The payments worker as a plain Faust agent, for `paystream bench` to compare the keyed window with: `python -m api.cli.bench.serial_worker PID`.

Rule: the same app, transport, handler, store and gateway; but `async for` handles one message after the other, and Faust acknowledges each. Nothing
is parked and nothing is tried again: what goes wrong ends the process. So does the end of the benchmark (the process PID), even if that was killed:
the worker whose place this takes could not come back otherwise.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, cast

from infra.database.delivery import Group
from infra.settings import Settings, load
from processors.app import App, Incoming, Work, serve
from processors.delivery import Handle
from processors.groups import payments

_LOOK_EVERY_S: Final = 0.2


@asynccontextmanager
async def serial_payments(settings: Settings, parent: int) -> AsyncIterator[Work]:
    """The work of the payments group, with another agent, for as long as the process `parent` lives that started this one."""
    async with payments(settings) as work:
        yield replace(work, register=partial(_register, work=work), services=(*work.services, lambda: _until_left_by(parent)))


async def _until_left_by(parent: int) -> None:
    """Until the parent has ended; a worker ends when one of its services does."""
    while os.getppid() == parent:  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(_LOOK_EVERY_S)


def _register(app: App, work: Work) -> None:
    handle = cast(Handle, work.handler)

    @app.agent(app.topics_named(*work.topics), name="payments")  # type: ignore[untyped-decorator]  # Faust has no types
    async def one_after_the_other(stream: Any) -> None:
        async for event in stream.events():
            received = Incoming(app, event, event.key).received()
            await handle(received, work.codec.decode(received.value))


if __name__ == "__main__":
    serve(load().model_copy(update={"service": "paystream-payments"}), Group.PAYMENTS, partial(serial_payments, parent=int(sys.argv[1])))
