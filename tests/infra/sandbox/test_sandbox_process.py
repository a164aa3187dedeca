"""The sandbox as a process: nothing that was answered is lost, whatever ends it."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from infra.sandbox.server import running_sandbox
from infra.sandbox.storage import SavedAnswer, Storage
from schemas.errors import BadConfiguration
from tests.conftest import free_port

from .conftest import DEADLINE_S, Client, client

pytestmark = pytest.mark.integration

NUMBER = "4000002760003184"


@asynccontextmanager
async def process(data: Path, *flags: str) -> AsyncIterator[tuple[Client, asyncio.subprocess.Process]]:
    """`paystream sandbox` on a free port, once it answers. It is gone when the block ends."""
    port = free_port()
    command = (sys.executable, "-m", "api.cli.main", "sandbox", "--port", str(port), "--data", str(data), *flags)
    with (data.parent / "sandbox.log").open("ab") as log:
        running = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with client(f"http://127.0.0.1:{port}") as sandbox:
            async with asyncio.timeout(3 * DEADLINE_S):
                while not await answers(sandbox):
                    assert running.returncode is None, (data.parent / "sandbox.log").read_text()
                    await asyncio.sleep(0.05)
            yield sandbox, running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def answers(sandbox: Client) -> bool:
    try:
        return (await sandbox.ask("GET", "/_sandbox/health")).status == 200
    except aiohttp.ClientError:
        return False


async def failed(*arguments: str) -> tuple[int, str]:
    """The exit status of a command that does not get far, and its words."""
    running = await asyncio.create_subprocess_exec(sys.executable, "-m", "api.cli.main", *arguments, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(3 * DEADLINE_S):
        _, words = await running.communicate()
    assert running.returncode is not None
    return running.returncode, words.decode()


async def test_every_charge_that_was_answered_survives_kill_9_and_its_key_too(tmp_path: Path) -> None:
    answered: dict[str, str] = {}
    async with process(tmp_path / "data") as (sandbox, running):

        async def shop(number: int) -> None:
            for turn in range(1_000_000):
                order = f"o{number}-{turn}"
                intent = await sandbox.create(key=f"create-{order}", **{"metadata[order_id]": order})
                paid = await sandbox.confirm(intent.body["id"], key=f"confirm-{order}")
                answered[order] = paid.body["latest_charge"]
                if len(answered) >= 200 + random.randrange(20) and running.returncode is None:
                    running.kill()

        shops = [asyncio.create_task(shop(number)) for number in range(16)]
        outcomes = await asyncio.gather(*shops, return_exceptions=True)
        assert all(isinstance(outcome, aiohttp.ClientError) for outcome in outcomes), outcomes
        await running.wait()
    async with process(tmp_path / "data") as (sandbox, _):
        ledger = {charge["order_id"]: charge["id"] for charge in await sandbox.ledger()}
        assert answered.items() <= ledger.items()
        assert len(await sandbox.ledger()) == len(ledger), "no order was charged twice"
        for order, charge in list(answered.items())[-20:]:
            created = await sandbox.create(key=f"create-{order}", **{"metadata[order_id]": order})
            again = await sandbox.confirm(created.body["id"], key=f"confirm-{order}")
            assert (again.body["latest_charge"], again.headers["Idempotent-Replayed"]) == (charge, "true")
        assert len(await sandbox.ledger()) == len(ledger)


async def test_a_stop_is_clean_and_keeps_the_clock_and_the_endpoints(tmp_path: Path) -> None:
    async with process(tmp_path / "data") as (sandbox, running):
        await sandbox.ask("POST", "/_sandbox/clock", json={"set": "2030-01-31T12:00:00Z"})
        endpoint = {"url": "http://127.0.0.1:9/none", "enabled_events[]": "charge.refunded"}
        secret = (await sandbox.ask("POST", "/v1/webhook_endpoints", data=endpoint)).body["secret"]
        running.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await running.wait() == 0
    async with process(tmp_path / "data") as (sandbox, _):
        assert (await sandbox.ask("GET", "/_sandbox/clock")).body["time"].startswith("2030-01-31T12:")
        assert (await sandbox.ask("POST", "/v1/webhook_endpoints", data=endpoint)).body["secret"] == secret


async def test_no_card_number_is_kept_or_logged(tmp_path: Path) -> None:
    card = {"type": "card", "card[number]": NUMBER, "card[exp_month]": "1", "card[exp_year]": "2030"}
    async with process(tmp_path / "data") as (sandbox, running):
        method = (await sandbox.ask("POST", "/v1/payment_methods", data=card)).body["id"]
        assert (await sandbox.paid(method))["status"] == "requires_action"
        await sandbox.ask("POST", "/v1/payment_methods", data=card | {"type": "none"})
        await sandbox.create(NUMBER, key="k")
        running.kill()
        await running.wait()
    kept = {path.name: path.read_bytes() for path in [*(tmp_path / "data").iterdir(), tmp_path / "sandbox.log"]}
    assert kept.keys() >= {"sandbox.sqlite3", "sandbox.sqlite3-wal", "sandbox.log"}
    assert method.encode() in kept["sandbox.sqlite3-wal"]
    assert not [name for name, content in kept.items() if NUMBER.encode() in content]


async def test_a_full_disk_takes_no_money_and_is_survived(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with process(data) as (sandbox, running):
        before = await sandbox.paid()
        full = (data / "sandbox.sqlite3-wal").stat().st_size
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
        refused = await asyncio.gather(*(sandbox.create(key=f"k{number}", confirm="true") for number in range(8)))
        assert {answer.status for answer in refused} == {500}
        assert [charge["payment_intent"] for charge in await sandbox.ledger()] == [before["id"]]
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        paid = await asyncio.gather(*(sandbox.create(key=f"k{number}", confirm="true") for number in range(8)))
        assert {answer.body["status"] for answer in paid} == {"succeeded"}
        assert len(await sandbox.ledger()) == 9


async def test_bad_flags_end_with_a_message_and_status_2(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    for flags, word in (
        (("--latency", "soon"), "--latency"),
        (("--data", "/dev/null/x"), "--data"),
        (("--webhook", "http://127.0.0.1:9/none"), "--webhook-secret"),
        (("--webhook", "nowhere", "--webhook-secret", "whsec_x"), "http://"),
    ):
        status, words = await failed("sandbox", "--data", data, *flags)
        assert (status, word in words, "Traceback" in words) == (2, True, False), words


async def test_two_sandboxes_do_not_share_their_money(tmp_path: Path) -> None:
    async with running_sandbox(data=tmp_path):
        with pytest.raises(BadConfiguration, match="another sandbox uses it"):
            async with running_sandbox(data=tmp_path):
                pass


async def test_what_a_full_disk_rolls_back_was_not_answered_and_the_next_is(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.remember_figure("kept", 1.0)
    await storage.committed()
    (pages,) = storage.read("PRAGMA page_count").fetchone()
    storage.read(f"PRAGMA max_page_count = {pages + 2}")
    storage.remember_figure("lost", 1.0)
    with pytest.raises(sqlite3.Error, match="full"):
        storage.save_answer("k", SavedAnswer(fingerprint=b"", status=200, body=bytes(1_000_000), saved=0.0))
    with pytest.raises(sqlite3.Error, match="earlier write failed"):
        storage.remember_figure("lost too", 1.0)
    with pytest.raises(sqlite3.Error):
        await storage.committed()
    storage.remember_figure("next", 1.0)
    await storage.committed()
    assert [storage.figure(name) for name in ("kept", "lost", "lost too", "next")] == [1.0, 0.0, 0.0, 1.0]
    storage.close()
