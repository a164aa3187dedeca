"""Start, stop and ask a local stack: real Kafka, registry, Postgres and Redis, and our own processes, without Docker and without root.

Rule: this only reads what the supervisor writes, and signals it. Nothing is left running when `start` fails.
Flow: `paystream up`, the demo and the tests -> Stack -> supervisor.py -> services.py and steps.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.local import environment, fetch, services
from infra.local.home import Home, State
from infra.local.process import StackError, last_lines
from infra.settings import Settings

_START_S: Final = 180.0
_STOP_S: Final = 150.0
_LEFTOVER_S: Final = 20.0
_SERVICE_STOP_S: Final = 45.0
_POLL_S: Final = 0.05

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one service does right now. `healthy` means that it answers its own protocol."""

    name: str
    pid: int | None
    url: str
    healthy: bool
    log: Path
    restarts: int


class Stack:
    """The stack of one folder, `.paystream` of the current one if nothing is said."""

    def __init__(self, folder: Path | None = None) -> None:
        self.home = Home(folder) if folder else Home.default()
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self, *, only: Collection[str] | None = None, fresh: bool = False, leash: bool = False, progress: Progress = lambda _: None) -> None:
        """Start what is not running, and wait until all of it answers.

        `only` names services and steps; `fresh` wipes all stores first; on a `leash` the stack ends with this process, however that ends.
        `progress` gets a line for each step. Raises StackError, with nothing left running, if a part does not come up.
        """
        try:
            if self.home.supervised():
                if not fresh:
                    self._revive(progress)
                    return
                progress("stopping the stack that is running")
                self.stop()
            self._end_leftovers(progress)
            if fresh:
                self.home.wipe()
            fetch.fetch(progress)
            for note in self.home.prepare():
                progress(note)
            try:
                self._spawn(only, leash)
                self._wait_running(progress)
            except BaseException:
                self.stop()
                raise
        except PermissionError as error:
            raise StackError(f"{error.strerror}: {error.filename or self.home.path}. Does the folder belong to another user?") from error

    def stop(self) -> bool:
        """Stop all of it, gracefully at first. Data stays. False if nothing was running, or if somebody else has started it anew since this did."""
        was_running = self.home.supervised()
        supervisor = self.home.read_state().supervisor
        mine, self._supervisor = self._supervisor, None
        if mine is not None:
            if mine.stdin is not None:
                mine.stdin.close()
            mine.terminate()  # it may not have got as far as to say who it is
            with suppress(subprocess.TimeoutExpired):
                mine.wait(_STOP_S)
            mine.kill()  # if it hangs: what it leaves is ended below
            mine.wait()
            if supervisor is not None and supervisor.pid != mine.pid and was_running:
                return False
        elif was_running and supervisor is not None:
            supervisor.end(signal.SIGTERM, _STOP_S)
        return self._end_leftovers(lambda _: None) or was_running

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Within the block one of our own processes is stopped, so that something else can take its place; at the end it runs again, and answers.

        It comes back even if this process is killed meanwhile: the supervisor sees to that. Raises StackError if it does not come back.
        """
        try:
            with self.home.holding(name):
                if (identity := self.home.read_state().records[name].identity) is not None:
                    identity.end(signal.SIGTERM, _SERVICE_STOP_S)
                yield
        finally:
            self._revive(lambda _: None)

    @property
    def running(self) -> bool:
        """Has it come up, and is it supervised? Single services may still be down: see `status`."""
        return self.home.supervised() and self.home.read_state().phase == "running"

    @property
    def on_leash(self) -> bool:
        """Does the stack end with this process?"""
        return self._supervisor is not None and self._supervisor.stdin is not None

    def status(self) -> list[Standing]:
        """Ask each service that belongs to this stack by its own protocol, all at once. Empty before the first start."""
        records = self.home.read_state().records
        known = [part for part in services.PARTS if isinstance(part, services.Service) and part.name in records]
        if not known:
            return []

        def ask(service: services.Service) -> Standing:
            record = records[service.name]
            process = record.identity.process() if record.identity else None
            return Standing(
                name=service.name,
                pid=process.pid if process else None,
                url=service.url(self.home),
                healthy=process is not None and service.healthy(self.home),
                log=self.home.log(service.name),
                restarts=record.restarts,
            )

        with ThreadPoolExecutor(len(known)) as pool:
            return list(pool.map(ask, known))

    def settings(self) -> Settings:
        """The settings with which to use this stack."""
        return environment.settings(self.home)

    def environment(self) -> dict[str, str]:
        """The same as environment variables for child processes, secrets included."""
        return environment.variables(self.settings())

    def addresses(self) -> dict[str, str]:
        """Where the stack can be reached from outside."""
        values = environment.values(self.home)
        return {
            "kafka": values["kafka"]["bootstrap_servers"],
            "schema_registry": values["schema_registry"]["url"],
            "database": values["database"]["url"],
            "redis": values["redis"]["url"],
            "api": environment.local(self.home, "api"),
            "sandbox": environment.local(self.home, "sandbox"),
        }

    def log(self, name: str) -> Path:
        """The log of a service, or of the `supervisor`. Raises StackError naming those that exist."""
        names = ["supervisor", *(part.name for part in services.PARTS if isinstance(part, services.Service))]
        if name not in names:
            raise StackError(f"no service is called {name}: there are {', '.join(names)}")
        return self.home.log(name)

    def _spawn(self, only: Collection[str] | None, leash: bool) -> None:
        services.selected(frozenset(only) if only is not None else None)
        command = [sys.executable, "-m", "infra.local.supervisor", str(self.home.path)]
        if only is not None:
            command += ["--only", ",".join(sorted(only))]
        if leash:
            command.append("--leash")
        log = self.home.log("supervisor")
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            stdin = subprocess.PIPE if leash else subprocess.DEVNULL
            self._supervisor = subprocess.Popen(command, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def _wait_running(self, progress: Progress) -> None:
        """Follow the supervisor until all is up. Raises StackError with what it says if it gives up."""
        deadline = time.monotonic() + _START_S
        told: dict[str, str] = {}
        while True:
            ended = self._supervisor is not None and self._supervisor.poll() is not None
            state = self.home.read_state()
            if state.supervisor is not None and (self._supervisor is None or state.supervisor.pid == self._supervisor.pid):
                _tell(state, told, progress)
                if state.phase == "running":
                    return
                if state.phase in {"failed", "stopped"}:
                    raise StackError(state.failure or "the stack was stopped while it started")
            if ended and self.home.supervised():
                self._supervisor = None  # another `up` was quicker: follow its supervisor
            elif ended:
                raise StackError("\n".join(["the supervisor ended at once:", *last_lines(self.home.log("supervisor"), 15)]))
            if time.monotonic() > deadline:
                raise StackError(f"the stack is not up after {_START_S:.0f} s: see the logs in {self.home.log('supervisor').parent}")
            time.sleep(_POLL_S)

    def _revive(self, progress: Progress) -> None:
        """There is a supervisor already: see that all of the stack runs."""
        if not self.running:
            self._wait_running(progress)
        if not (down := [standing.name for standing in self.status() if not standing.healthy]):
            progress(f"the stack in {self.home.path} is running already")
            return
        progress(f"the stack in {self.home.path} is running already, but for {', '.join(down)}: bringing that back")
        supervisor = self.home.read_state().supervisor
        if supervisor is not None and (process := supervisor.process()) is not None:
            process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _START_S
        while not all(standing.healthy for standing in self.status()):
            state = self.home.read_state()
            if state.failure is not None:
                raise StackError(state.failure)
            if time.monotonic() > deadline:
                down = [standing.name for standing in self.status() if not standing.healthy]
                raise StackError(f"{', '.join(down)} can't be brought back: see `paystream logs {down[0] if down else 'supervisor'}`")
            time.sleep(_POLL_S * 4)

    def _end_leftovers(self, progress: Progress) -> bool:
        """End what a supervisor left that was itself killed. False if there is nothing."""
        if self.home.supervised():
            return False
        records = self.home.read_state().records
        left = {name: record.identity for name, record in records.items() if record.identity and record.identity.process()}
        if not left:
            return False
        progress(f"ending what an interrupted stack left: {', '.join(left)}")
        with ThreadPoolExecutor(len(left)) as pool:
            list(pool.map(lambda identity: identity.end(signal.SIGTERM, _LEFTOVER_S), left.values()))
        return True


def _tell(state: State, told: dict[str, str], progress: Progress) -> None:
    for name, record in state.records.items():
        if record.condition == "healthy" and told.get(name) != "healthy":
            progress(f"{name} is ready after {record.seconds:.1f} s" if record.seconds is not None else f"{name} is ready")
        told[name] = record.condition
