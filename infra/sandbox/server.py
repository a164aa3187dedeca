"""The sandbox as a program: a server that plays Stripe, so that money has a ledger outside of Paystream.

It speaks the part of Stripe's API that Paystream calls (`api`), lets tests order faults, time and what customers do (`control`), shows pages to
people (`pages`), and keeps all it knows in one file (`storage`). It shares neither code with the gateway adapters nor a database with Paystream:
where the two agree about money, they agree from the outside.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import uvloop
from aiohttp import web

from infra.sandbox.account import Account
from infra.sandbox.api import StripeApi
from infra.sandbox.behaviour import USUAL, Behaviour, Conditions, chance
from infra.sandbox.clock import SandboxClock
from infra.sandbox.control import Control
from infra.sandbox.faults import Faults
from infra.sandbox.idempotency import Keys
from infra.sandbox.pages import Pages
from infra.sandbox.parameters import Registration, is_web_address
from infra.sandbox.storage import Storage
from infra.sandbox.webhooks import Webhooks
from schemas.errors import BadConfiguration

MAX_BODY_BYTES: Final = 512 * 1024
_SHUTDOWN_S: Final = 5.0
_FORGET_EVERY_S: Final = 3600.0

_log = structlog.get_logger(__name__)


@asynccontextmanager
async def running_sandbox(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    data: Path | None = None,
    conditions: Conditions = USUAL,
    seed: int | None = None,
    webhook: tuple[str, str] | None = None,
) -> AsyncIterator[str]:
    """A sandbox in this process while the block runs; gives its URL. Port 0 takes a free one; without `data` its memory ends with it.

    `seed` makes luck repeat itself for calls that come in the same order. `webhook` is the address and the secret of an endpoint that is there from
    the start, so that whoever takes its events can know the secret beforehand.
    Raises BadConfiguration for a bad flag, a port that is taken and a directory that can't be used.
    """
    behaviour = Behaviour(conditions, seed)
    async with AsyncExitStack() as stack:
        storage = Storage(data)
        stack.callback(storage.close)
        faults = Faults(chance(seed, "faults"))
        clock = SandboxClock(storage.figure("clock_offset_s"), partial(storage.remember_figure, "clock_offset_s"))
        webhooks = Webhooks(storage, faults)
        account = Account(storage, webhooks, behaviour, clock)
        keys = Keys(storage, clock)
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.add_routes(StripeApi(account, storage, webhooks, keys, faults, behaviour).routes())
        application.add_routes(Control(account, storage, faults, clock, behaviour).routes())
        application.add_routes(Pages(account, storage).routes())
        if webhook is not None:
            _register(webhooks, *webhook, int(clock.now()))
        webhooks.start()
        stack.push_async_callback(webhooks.stop)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await _listen(runner, host, port)
        forgetting = asyncio.create_task(_forget_old_keys(keys))
        stack.callback(forgetting.cancel)
        yield f"http://{host}:{runner.addresses[0][1]}"


def serve(*, host: str, port: int, data: Path, conditions: Conditions, seed: int | None, webhook: tuple[str, str] | None) -> None:
    """Run in the foreground until SIGTERM or SIGINT. Raises as `running_sandbox` does."""
    _allow_many_connections()

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with running_sandbox(host=host, port=port, data=data, conditions=conditions, seed=seed, webhook=webhook) as url:
            _log.info("the sandbox listens", url=url, data=str(data))
            await stop.wait()
        _log.info("the sandbox has stopped")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def _register(webhooks: Webhooks, url: str, secret: str, now: int) -> None:
    if not is_web_address(url):
        raise BadConfiguration("--webhook: the address must begin with http:// or https://")
    webhooks.register(Registration(url=url, enabled_events=("*",), description="registered at the start", metadata={}), now, secret)


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise BadConfiguration(f"--port: {port} is taken on {host}; choose another one") from error
        raise BadConfiguration(f"--host, --port: {host}:{port} can't be listened on: {error}") from error


async def _forget_old_keys(keys: Keys) -> None:
    while True:
        keys.forget_old()
        await asyncio.sleep(_FORGET_EVERY_S)


def _allow_many_connections() -> None:
    """A client that waits for slow answers holds a connection each: take as many files as the system lets us."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
