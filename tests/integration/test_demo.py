"""`paystream demo` as a newcomer runs it, in a folder of its own; and its check, when somebody is really charged twice."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from api.cli.demo.promises import unkept, verdicts
from infra.local.home import Home
from tests.integration.pipeline import API_KEY, Shop, trade

pytestmark = pytest.mark.integration

PROMISES = ["D1", "D2", "D3", "D5", "D6", "D7"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "stack"
    Home(tmp_path / "stack").wipe()


@pytest.mark.timeout(300)
def test_the_demo_proves_every_promise_and_leaves_nothing_running(folder: Path) -> None:
    command = (sys.executable, "-m", "api.cli.main", "demo", "-n", "20", "--json", "--dir", str(folder))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= {"ok", "orders", "seconds", "orders_per_second", "outcome_ms", "events", "charges", "kinds", "promises"}
    assert (report["ok"], report["orders"]) == (True, 25)
    assert sum(kind["orders"] for kind in report["kinds"]) == 25
    assert {kind["kind"] for kind in report["kinds"]} >= {"card", "decline", "3-D Secure", "lost answer", "repeated request", "parked order"}
    assert report["events"] >= 3 * 20
    assert report["charges"] > 0
    assert [promise["promise"] for promise in report["promises"]] == PROMISES
    for promise in report["promises"]:
        assert (promise["kept"], promise["broken"]) == (True, []), promise
        assert promise["checked"] > 0, promise
    assert running(folder) == []
    assert [name for name, port in Home(folder).ports.items() if answers(port)] == []


async def test_a_real_second_charge_breaks_a_promise(shop: Shop) -> None:
    gather = await trade(shop, payments=12)
    evidence = await gather()
    assert unkept(verdicts(evidence)) == []
    twice = next(payment for payment in evidence.payments.values() if payment["status"] == "COMPLETED")
    await charge_again(shop, twice["payment_id"], twice["order_id"])
    broken = {verdict.promise: verdict.broken for verdict in unkept(verdicts(await gather()))}
    assert "D3" in broken
    assert any(twice["payment_id"] in found for found in broken["D3"])


def running(folder: Path) -> list[str]:
    """The processes that have to do with the folder: by what they were called with, or where they are; and those that the stack has written down."""
    found = [name for name, record in Home(folder).read_state().records.items() if record.identity and record.identity.process()]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join([*process.cmdline(), process.cwd(), *process.environ().values()]) and process.pid != psutil.Process().pid:
                found.append(f"{process.pid}: {process.cmdline()}")
    return found


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def charge_again(shop: Shop, payment_id: str, order_id: str) -> None:
    """Charge the payment's card once more, straight at the gateway: what must never happen, has happened."""
    form = {
        "amount": "100",
        "currency": "eur",
        "confirm": "true",
        "payment_method": "pm_card_visa",
        "automatic_payment_methods[enabled]": "true",
        "automatic_payment_methods[allow_redirects]": "never",
        "metadata[payment_id]": payment_id,
        "metadata[order_id]": order_id,
    }
    url = f"{shop.pipeline.sandbox.url}/v1/payment_intents"
    async with shop.session.post(url, data=form, headers={"Authorization": f"Bearer {API_KEY}"}) as answer:
        assert (answer.status, (await answer.json())["status"]) == (200, "succeeded")
