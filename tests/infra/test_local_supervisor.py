"""The supervisor, on programs that are quick to start: the order, what a failure does, who is started again, how all of it ends."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from infra.local.home import Home
from infra.local.process import Program, StackError, last_lines
from infra.local.services import Service, Step
from infra.local.supervisor import Supervisor

pytestmark = pytest.mark.unit

WORKS = "import time; print('here', flush=True); time.sleep(60)"
FAILS = "print('No space left on device', flush=True); raise SystemExit(1)"
NEVER_READY = "import time; time.sleep(60)"
ENDS_SOON = "import time; print('here', flush=True); time.sleep(0.3); raise SystemExit(70)"


class Diary:
    """Who was started, made ready and ended, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def service(self, name: str, code: str = WORKS, *, after: tuple[str, ...] = (), ours: bool = False) -> Service:
        def program(home: Home) -> Program:
            self.lines.append(f"+{name}")
            return _Told(
                name=name,
                command=[sys.executable, "-c", code],
                log=home.log(name),
                ready=partial(_said_here, home.log(name)),
                on_stop=lambda: self.lines.append(f"-{name}"),
            )

        return Service(name=name, after=frozenset(after), program=program, answers=lambda _: True, url=lambda _: "", ours=ours)

    def step(self, name: str, run: Callable[[], object] = lambda: None, *, after: tuple[str, ...] = ()) -> Step:
        def noted(_: Home) -> None:
            self.lines.append(f"+{name}")
            run()

        return Step(name=name, after=frozenset(after), run=noted)


class _Told(Program):
    def __init__(self, *, on_stop: Callable[[], None], **fields: object) -> None:
        super().__init__(**fields)  # type: ignore[arg-type]
        self._on_stop = on_stop

    def stop(self) -> None:
        super().stop()
        self._on_stop()


def _said_here(log: Path) -> bool:
    return "here" in last_lines(log, 5)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "stack")
    home.prepare()
    return home


@pytest.fixture
def diary() -> Diary:
    return Diary()


@contextmanager
def supervising(supervisor: Supervisor) -> Iterator[None]:
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield
    finally:
        supervisor.stop()
        thread.join(30)
    assert not thread.is_alive()


def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_each_part_starts_when_those_before_it_are_ready_and_stops_before_them(home: Home, diary: Diary) -> None:
    parts: list[Service | Step] = [
        diary.service("worker", after=("database", "migrate"), ours=True),
        diary.step("migrate", after=("database",)),
        diary.service("database"),
    ]
    with supervising(Supervisor(home, parts)):
        until(lambda: home.read_state().phase == "running")
        assert {record.condition for record in home.read_state().records.values()} == {"healthy"}
    assert diary.lines == ["+database", "+migrate", "+worker", "-worker", "-database"]
    assert home.read_state().phase == "stopped"


def test_parts_that_do_not_need_each_other_start_together(home: Home, diary: Diary) -> None:
    meeting = threading.Barrier(2, timeout=10)
    with supervising(Supervisor(home, [diary.step("one", meeting.wait), diary.step("other", meeting.wait)])):
        until(lambda: home.read_state().phase == "running")


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (partial(Diary.service, name="broker", code=FAILS), "The disk is full"),
        (partial(Diary.step, name="broker", run=lambda: _raise(StackError("the port is taken"))), "the port is taken"),
        (partial(Diary.step, name="broker", run=lambda: _raise(ZeroDivisionError("oh"))), "broker: ZeroDivisionError"),
    ],
)
def test_one_part_that_fails_stops_all_and_says_why(home: Home, diary: Diary, broken: Callable[[Diary], Service | Step], complaint: str) -> None:
    before = psutil.Process().children()
    supervisor = Supervisor(home, [diary.service("database"), diary.service("slow", NEVER_READY), broken(diary)])
    assert supervisor.run() == 1
    state = home.read_state()
    assert state.phase == "failed"
    assert complaint in (state.failure or "")
    assert all(record.identity is None for record in state.records.values())
    assert psutil.Process().children() == before


def test_ours_is_started_again_and_counted_and_the_rest_waits_to_be_revived(home: Home, diary: Diary) -> None:
    supervisor = Supervisor(home, [diary.service("database"), diary.service("worker", ours=True)])
    with supervising(supervisor):
        until(lambda: home.read_state().phase == "running")
        before = home.read_state().records
        for record in before.values():
            assert record.identity is not None
            psutil.Process(record.identity.pid).kill()
        until(lambda: home.read_state().records["worker"].restarts == 1)
        until(lambda: home.read_state().records["worker"].condition == "healthy")
        assert home.read_state().records["database"].condition == "ended"
        assert diary.lines.count("+database") == 1
        supervisor.revive()
        until(lambda: home.read_state().records["database"].condition == "healthy")
        assert home.read_state().records["database"].identity != before["database"].identity


def test_what_somebody_holds_stays_down_until_they_let_go(home: Home, diary: Diary) -> None:
    supervisor = Supervisor(home, [diary.service("worker", ours=True)])
    with supervising(supervisor):
        until(lambda: home.read_state().phase == "running")
        identity = home.read_state().records["worker"].identity
        assert identity is not None
        with home.holding("worker"):
            psutil.Process(identity.pid).kill()
            until(lambda: home.read_state().records["worker"].condition == "ended")
            supervisor.revive()
            until(lambda: not supervisor.reviving)
            assert home.read_state().records["worker"].restarts == 0
        until(lambda: home.read_state().records["worker"].condition == "healthy")
    assert diary.lines.count("+worker") == 2


def test_who_ends_again_and_again_is_started_after_longer_and_longer_pauses(home: Home, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.supervisor._BACKOFF_S", (0.0, 0.0, 3600.0))
    with supervising(Supervisor(home, [diary.service("worker", ENDS_SOON, ours=True)])):
        until(lambda: home.read_state().phase == "running")
        until(lambda: home.read_state().records["worker"].restarts == 2)
        until(lambda: home.read_state().records["worker"].condition == "ended")
    assert diary.lines.count("+worker") == 3


def _raise(error: Exception) -> None:
    raise error
