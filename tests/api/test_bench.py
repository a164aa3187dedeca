"""`paystream bench`: what its load is, what its figures say, and a short run of all of it on a stack of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.cli.bench.figures import goals, report
from api.cli.bench.load import Load
from api.cli.bench.phases import Measured, Plan, Sustained
from infra.local.client import Answer
from infra.local.home import Home
from infra.local.stack import Stack
from schemas.errors import PaystreamError

PLAN = Plan(seconds=20)
OURS = ("api", "worker-payments", "kafka")


class Intake:
    """Answers after a while, and notes when each request began and with what key."""

    def __init__(self, answers_after_s: float = 0.0, status: int = 202) -> None:
        self.begun: list[float] = []
        self.keys: list[str | None] = []
        self._after, self._status = answers_after_s, status

    async def post(self, path: str, body: dict[str, Any], *, key: str | None = None, wait_s: int | None = None) -> Answer:
        assert (path, wait_s, body["order_id"]) == ("/payments/process", None, key)
        self.begun.append(time.perf_counter())
        self.keys.append(key)
        await asyncio.sleep(self._after)
        body = {"payment_id": key, "detail": "no"}
        return Answer(status=self._status, body=body, headers={}, seconds=self._after, tries=1)


def load_on(intake: Intake) -> Load:
    return Load(intake, "run")  # type: ignore[arg-type]


@pytest.mark.unit
async def test_a_slow_answer_holds_no_request_back_and_shows_in_its_own_time() -> None:
    intake = Intake(answers_after_s=0.3)
    load = load_on(intake)
    await load.at_rate(50, 0.2)
    assert len(load.accepted) == len(set(intake.keys)) == 10
    assert intake.begun[-1] - intake.begun[0] < 0.3, "none waited for an answer"
    due = sorted(payment.due for payment in load.accepted)
    assert [round(later - due[0], 3) for later in due] == [round(n / 50, 3) for n in range(10)]
    assert all(payment.answered - payment.due >= 0.29 for payment in load.accepted)


@pytest.mark.unit
async def test_flat_out_each_caller_waits_for_its_own_answer_only() -> None:
    intake = Intake(answers_after_s=0.02)
    load = load_on(intake)
    await load.flat_out(callers=5, seconds=0.2)
    assert 5 * 3 <= len(load.accepted) <= 5 * 11


@pytest.mark.unit
async def test_an_intake_that_refuses_ends_the_run_with_its_reason() -> None:
    with pytest.raises(PaystreamError, match="403 where 202 was expected: no"):
        await load_on(Intake(status=403)).together(3)


def measured(*, backlog_at_end: int = 166, growth: float = 1.0, intake_s: float = 0.005, overhead_s: float = 0.1) -> Measured:
    memory = [{"api": 100.0 + growth * n / 20, "worker-payments": 150.0, "kafka": 500.0, "sandbox": 70.0, "load": 90.0} for n in range(21)]
    return Measured(
        intake=[intake_s] * 100,
        overhead=[overhead_s] * 100,
        sustained=Sustained(
            backlog=[*range(0, 165, 33), *[165] * 13, *[backlog_at_end] * 3],
            memory_mb=memory,
            completed_per_s=79.96,
            cpu_ms={"api": 3.0, "worker-payments": 5.5, "kafka": 2.25, "sandbox": 1.75, "load": 1.0},
        ),
        flat_out_per_s=310.04,
        serial_per_s=0.493,
    )


@pytest.mark.unit
def test_the_figures_have_their_names_and_keep_the_sandbox_and_the_load_apart() -> None:
    figures = report(measured(), PLAN)
    assert figures["cpu_ms_per_payment"] == {"total": 10.75, "api": 3.0, "worker-payments": 5.5, "kafka": 2.25}
    assert figures["peak_rss_mb"] == {"api": 101.0, "worker-payments": 150.0, "kafka": 500.0}
    assert figures["apart"] == {
        "sandbox": {"cpu_ms_per_payment": 1.75, "peak_rss_mb": 70.0},
        "load": {"cpu_ms_per_payment": 1.0, "peak_rss_mb": 90.0},
    }
    assert (figures["intake_p50_ms"], figures["overhead_p99_ms"]) == (5.0, 100.0)
    assert (figures["payments_per_s"], figures["intake_max_rps"], figures["serial_agent_payments_per_s"]) == (80.0, 310.0, 0.49)
    assert (figures["backlog_once_filled"], figures["backlog_at_end"]) == (165, 166)
    assert all(goal.reached for goal in goals(figures))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("missed", "how"),
    [
        ("intake_p50_ms", {"intake_s": 0.0131}),
        ("overhead_p99_ms", {"overhead_s": 0.501}),
        ("backlog_at_end", {"backlog_at_end": 180}),
        ("rss_growth_mb", {"growth": 40.0}),
    ],
)
def test_a_goal_that_is_missed_is_called_so(missed: str, how: dict[str, Any]) -> None:
    assert [goal.figure for goal in goals(report(measured(**how), PLAN)) if not goal.reached] == [missed]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "stack"
    Home(tmp_path / "stack").wipe()


@pytest.mark.unit
@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_real_gateway_is_not_paid_hundreds_of_times(folder: Path, command: str) -> None:
    environment = {**os.environ, "PAYSTREAM_STRIPE__API_KEY": "sk_test_1"}
    arguments = (sys.executable, "-m", "api.cli.main", command, "--dir", str(folder))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "unset PAYSTREAM_STRIPE__API_KEY" in done.stderr
    assert not folder.exists()


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_short_run_measures_everything_and_leaves_nothing_running(folder: Path) -> None:
    command = (sys.executable, "-m", "api.cli.main", "bench", "--seconds", "8", "--rate", "10", "--latency", "0.1", "--json", "--dir", str(folder))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert json.loads((folder / "bench.json").read_text()) == figures
    assert figures["cpu_ms_per_payment"].keys() >= {
        "total",
        "api",
        "relay",
        "kafka",
        "postgres",
        "worker-payments",
        "worker-orders",
        "worker-analytics",
    }
    assert all(figure > 0 for figure in (*figures["peak_rss_mb"].values(), figures["cpu_ms_per_payment"]["total"]))
    assert 0 < figures["intake_p50_ms"] <= figures["intake_p99_ms"]
    assert 0 < figures["overhead_p50_ms"] <= figures["overhead_p99_ms"]
    assert 0 < figures["serial_agent_payments_per_s"] < 10 < figures["intake_max_rps"], "two calls of 0.1 s each, one payment after the other"
    assert 8 < figures["payments_per_s"] < 12
    assert [name for name, record in Home(folder).read_state().records.items() if record.identity and record.identity.process()] == []


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_whoever_ends_it_before_its_end_gets_the_payments_worker_back(folder: Path) -> None:
    stack = Stack(folder)
    stack.start(leash=True)
    try:
        before = gateway_settings(stack)
        assert end_with_the_serial_agent_at_work(stack, signal.SIGTERM) == 130
        assert gateway_settings(stack) == before
        assert worker_is_back(stack)
        assert end_with_the_serial_agent_at_work(stack, signal.SIGKILL) == -signal.SIGKILL
        until(lambda: worker_is_back(stack), "the supervisor has started the worker again")
    finally:
        stack.stop()


def end_with_the_serial_agent_at_work(stack: Stack, how: signal.Signals) -> int:
    """The exit status of a benchmark that got the signal while a plain agent was in the worker's place, once that agent has ended too."""
    command = (sys.executable, "-m", "api.cli.main", "bench", "--seconds", "4", "--rate", "10", "--latency", "0.2", "--dir", str(stack.home.path))
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    agents: list[psutil.Process] = []

    def agent_is_there() -> bool:
        agents.extend(child for child in psutil.Process(bench.pid).children() if "api.cli.bench.serial_worker" in child.cmdline())
        return bool(agents)

    try:
        until(agent_is_there, "the serial agent is started")
        bench.send_signal(how)
        status: int = bench.wait(60)
    finally:
        bench.kill()
    _, alive = psutil.wait_procs(agents, timeout=20)
    assert not alive
    return status


def worker_is_back(stack: Stack) -> bool:
    return next(standing.healthy for standing in stack.status() if standing.name == "worker-payments")


def gateway_settings(stack: Stack) -> Any:
    with urllib.request.urlopen(f"{stack.addresses()['sandbox']}/_sandbox/settings", timeout=5) as answer:
        return json.load(answer)


def until(condition: Callable[[], bool], what: str, within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
