"""The parent of all processes of a stack: starts them, starts our own again when they end, stops them all.

Rule: one supervisor per folder (it holds the folder's lock), and it alone writes `state.json`. SIGTERM stops the stack; SIGUSR1 brings back what has
ended; on a leash (standard input is a pipe) the stack ends with whoever holds the other end, even if that one was killed. A service that somebody
holds (`Home.holding`) is not started again until they let go.
Flow: Stack.start() spawns `python -m infra.local.supervisor FOLDER` -> state.json says how far it is -> Stack reads it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

import psutil

from infra.local.environment import publish
from infra.local.home import Condition, Home, Phase, Record, State
from infra.local.process import Identity, Program
from infra.local.services import Service, Step, selected
from schemas.errors import PaystreamError

_BACKOFF_S: Final = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S: Final = 60.0  # whoever has run this long starts at the shortest pause again
_POLL_S: Final = 0.1


class Supervisor:
    """`parts` are what this stack consists of, in any order."""

    def __init__(self, home: Home, parts: Sequence[Service | Step]) -> None:
        self._home = home
        self._parts = {part.name: part for part in parts}
        self._programs: dict[str, Program] = {}
        self._started: dict[str, float] = {}
        self._quick_ends: dict[str, int] = {}
        self._writing = threading.Lock()
        me = Identity(os.getpid(), psutil.Process().create_time())
        self._state = State(supervisor=me, records={name: Record() for name in self._parts})
        # Plain flags: signal handlers set them, and an Event's lock might be held by the very code that they interrupt.
        self.stopping = False
        self.reviving = False

    def stop(self) -> None:
        self.stopping = True

    def revive(self) -> None:
        self.reviving = True

    def run(self) -> int:
        """Until it is told to stop, or a part does not come up. Returns the exit status."""
        self._write("starting")
        self._bring_up(self._parts)
        if not self.stopping:
            publish(self._home)
            self._write("running")
        while not self.stopping:
            time.sleep(_POLL_S)
            if self.reviving:
                self.reviving = False
                self._bring_up([name for name, program in self._programs.items() if not program.running and not self._home.is_held(name)])
            self._watch()
        self._write("stopping")
        self._take_down()
        self._write("failed" if self._state.failure else "stopped")
        return 1 if self._state.failure else 0

    def _bring_up(self, names: Collection[str]) -> None:
        """Start each part as soon as those before it are ready; the first failure stops the stack."""
        waiting = [self._parts[name] for name in names]
        unready = set(names)
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor(len(self._parts)) as pool:
            while unready and not self.stopping:
                for part in [part for part in waiting if not part.after & unready]:
                    waiting.remove(part)
                    running[pool.submit(self._begin, part)] = part.name
                done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    if (error := future.exception()) is not None and not self.stopping:
                        self._state.failure = error.detail if isinstance(error, PaystreamError) else f"{running[future]}: {error!r}"
                        self.stopping = True
                    unready.discard(running.pop(future))

    def _begin(self, part: Service | Step) -> None:
        began = time.monotonic()
        self._note(part.name, "starting")
        if isinstance(part, Step):
            part.run(self._home)
        else:
            self._start(part).wait_ready(until=lambda: self.stopping)
        self._state.records[part.name].seconds = round(time.monotonic() - began, 2)
        self._note(part.name, "healthy")

    def _start(self, service: Service) -> Program:
        program = self._programs[service.name] = service.program(self._home)
        self._state.records[service.name].identity = program.start()
        self._started[service.name] = time.monotonic()
        self._note(service.name, "starting")
        return program

    def _watch(self) -> None:
        """Note what has ended, start our own again after a pause, note what is ready."""
        for name, program in self._programs.items():
            part, record = self._parts[name], self._state.records[name]
            age = time.monotonic() - self._started[name]
            if program.running:
                if record.condition != "healthy" and program.is_ready():
                    self._note(name, "healthy")
                continue
            if record.condition != "ended":
                self._quick_ends[name] = 0 if age > _STEADY_S else self._quick_ends.get(name, -1) + 1
                self._note(name, "ended")
                self._started[name] = time.monotonic()
            elif isinstance(part, Service) and part.ours and age > self._rest_s(name) and not self._home.is_held(name):
                record.restarts += 1
                self._start(part)

    def _rest_s(self, name: str) -> float:
        """How long a service that ended stays down: the longer, the quicker it ended the last times."""
        return _BACKOFF_S[min(self._quick_ends[name], len(_BACKOFF_S) - 1)]

    def _take_down(self) -> None:
        """Stop what nothing needs any more, then what only that needed, and so on."""
        left = {name: self._parts[name] for name in self._programs}
        with ThreadPoolExecutor(max(1, len(left))) as pool:
            while left:
                needed = frozenset[str]().union(*(part.after for part in left.values()))
                wave = [name for name in left if name not in needed]
                for name, _ in zip(wave, pool.map(lambda name: self._programs[name].stop(), wave), strict=True):
                    del left[name]
                    self._state.records[name].identity = None
                    self._note(name, "ended")

    def _note(self, name: str, condition: Condition) -> None:
        self._state.records[name].condition = condition
        self._write()

    def _write(self, phase: Phase | None = None) -> None:
        with self._writing:
            if phase:
                self._state.phase = phase
            self._home.write_state(self._state)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.local.supervisor")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--leash", action="store_true", help="stop when standard input ends")
    arguments = parser.parse_args()
    home = Home(arguments.folder)
    lock = home.lock()
    if lock is None:
        return 1  # somebody was quicker: whoever started us reads their state
    supervisor = Supervisor(home, selected(frozenset(arguments.only.split(",")) if arguments.only else None))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.stop())
    signal.signal(signal.SIGUSR1, lambda *_: supervisor.revive())
    if arguments.leash:
        threading.Thread(target=_stop_at_end_of_input, args=(supervisor,), daemon=True).start()
    return supervisor.run()


def _stop_at_end_of_input(supervisor: Supervisor) -> None:
    sys.stdin.buffer.read()
    supervisor.stop()


if __name__ == "__main__":
    sys.exit(main())
