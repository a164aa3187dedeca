"""Programs of the local stack: how they start, what is said when they don't, and that nobody else's process is ever touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.local.process import Identity, Program, StackError, last_lines

pytestmark = pytest.mark.unit

MakeProgram = Callable[..., Program]
SLEEPS = "import time; print('here', flush=True); time.sleep(60)"
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


@pytest.fixture
def program(tmp_path: Path) -> Iterator[MakeProgram]:
    made: list[Program] = []

    def make(code: str, **settings: object) -> Program:
        log = tmp_path / "program.log"
        defaults = {"name": "it", "command": [sys.executable, "-c", code], "log": log, "ready": lambda: "here" in "".join(last_lines(log, 5))}
        made.append(Program(**{**defaults, **settings}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.kill()


def test_a_program_is_started_awaited_and_stopped(program: MakeProgram) -> None:
    one = program(SLEEPS)
    identity = one.start()
    one.wait_ready()
    assert one.running
    assert identity.process() is not None
    one.stop()
    assert one.exit_code == -signal.SIGTERM
    assert identity.process() is None


def test_who_ignores_the_request_to_end_is_killed_after_the_grace(program: MakeProgram) -> None:
    one = program(IGNORES_SIGTERM, grace_s=0.2)
    one.start()
    one.wait_ready()
    one.stop()
    assert one.exit_code == -signal.SIGKILL


def test_who_ends_while_starting_is_reported_with_the_end_of_its_log(program: MakeProgram) -> None:
    one = program("print('the reason', flush=True); raise SystemExit(3)")
    one.start()
    with pytest.raises(StackError, match=r"(?s)it ended with status 3 while it started.*program\.log.*the reason"):
        one.wait_ready()


def test_who_does_not_answer_in_time_is_reported(program: MakeProgram) -> None:
    one = program(SLEEPS, ready=lambda: False, start_s=0.2)
    one.start()
    with pytest.raises(StackError, match="does not answer after 0 s"):
        one.wait_ready()


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("java.io.IOException: No space left on device", "The disk is full"),
        ("java.net.BindException: Address already in use", "Its port is taken"),
        ("FATAL: could not open file: Permission denied", "can't be used by this user"),
    ],
)
def test_what_a_log_says_becomes_advice(program: MakeProgram, line: str, advice: str) -> None:
    one = program(f"print({line!r}, flush=True); raise SystemExit(1)")
    one.start()
    with pytest.raises(StackError, match=advice):
        one.wait_ready()


def test_of_a_java_stack_trace_the_messages_are_shown(program: MakeProgram) -> None:
    frames = "".join(f"\\n\\tat io.netty.Frame{number}" for number in range(40))
    one = program(f"print('Unable to start HTTP server{frames}', flush=True); raise SystemExit(1)")
    one.start()
    with pytest.raises(StackError, match="Unable to start HTTP server") as raised:
        one.wait_ready()
    assert "netty" not in str(raised.value)


def test_a_log_that_is_too_long_makes_room(program: MakeProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.process._LOG_LIMIT", 10)
    one = program(SLEEPS)
    one.log.write_text("of the last start")
    one.start()
    one.wait_ready()
    assert one.log.with_name("program.log.1").read_text() == "of the last start"
    assert last_lines(one.log, 5) == ["here"]


def test_a_pid_that_was_given_to_somebody_else_is_left_alone() -> None:
    mine = psutil.Process()
    assert Identity(mine.pid, mine.create_time()).process() is not None
    reused = Identity(mine.pid, mine.create_time() - 3600)
    assert reused.process() is None
    reused.end(signal.SIGKILL, 1)  # would end the tests


def test_a_process_that_has_ended_and_is_not_yet_collected_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.DEVNULL)
    identity = Identity(child.pid, psutil.Process(child.pid).create_time())
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity.process() is None
    child.wait()
