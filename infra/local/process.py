"""A program that runs beside us: started with a log file of its own, watched until it answers, ended without leaving anything behind.

Rule: a process is known by its pid and its start time together, so that a pid that was given to somebody else is never signalled.
Flow: services.py says which programs there are -> supervisor.py starts and watches them; tests start extra ones against a running stack.
"""

from __future__ import annotations

import http.client
import os
import pwd
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil

from schemas.errors import PaystreamError

_LOG_LIMIT: Final = 32 * 1024 * 1024
_POLL_S: Final = 0.05
_HINTS: Final = {
    "No space left on device": "The disk is full: free some space and start again.",
    "Address already in use": "Its port is taken: `paystream down`, or set another one (PAYSTREAM_LOCAL_PORT_<NAME>).",
    "Permission denied": "A file can't be used by this user: has another user started this stack before? Name another folder with --dir.",
    "Cannot allocate memory": "There is not enough memory: about 2 GB are needed.",
}


class StackError(PaystreamError):
    """The local stack can't do that."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One process of this machine, for ever: `created` is its start in seconds since the epoch."""

    pid: int
    created: float

    def process(self) -> psutil.Process | None:
        """The process, None once it has ended."""
        try:
            process = psutil.Process(self.pid)
            # The kernel counts from boot, and the time of boot is corrected now and then: two starts within two seconds can't share a pid.
            if abs(process.create_time() - self.created) > 2 or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    def end(self, signal_number: int, grace_s: float) -> None:
        """Signal it, wait `grace_s` seconds, kill what is left. Silent if it is gone already."""
        if (process := self.process()) is None:
            return
        try:
            process.send_signal(signal_number)
            process.wait(grace_s)
        except psutil.TimeoutExpired:
            if (process := self.process()) is not None:
                process.kill()
                process.wait(10)
        except psutil.NoSuchProcess:
            pass


@dataclass(kw_only=True)
class Program:
    """A command line, where its output goes, where it listens, and how to see that it is ready. `ready` answers False or raises while it is not."""

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    start_s: float = 90.0
    grace_s: float = 15.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    identity: Identity | None = field(default=None, init=False)

    def start(self) -> Identity:
        """Start it. Its output is appended to `log`; what is larger than 32 MiB moves to `<log>.1`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT:
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.folder,
                start_new_session=True,
                user=self.user,
                group=pwd.getpwnam(self.user).pw_gid if self.user else None,
                extra_groups=() if self.user else None,
            )
        self.identity = Identity(self._process.pid, psutil.Process(self._process.pid).create_time())
        return self.identity

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before its start; minus the signal's number if a signal ended it."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        """Ask once."""
        try:
            return self.ready()
        except Exception:
            return False

    def wait_ready(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """Wait until it answers.

        Raises StackError with the end of its log if it ends before that, or if `start_s` seconds go by; or if `until` becomes true meanwhile.
        """
        deadline = time.monotonic() + self.start_s
        while not self.is_ready():
            if until():
                raise StackError(f"{self.name} was stopped while it started")
            if (code := self.exit_code) is not None:
                raise StackError(self._complaint(f"ended with status {code} while it started"))
            if time.monotonic() > deadline:
                raise StackError(self._complaint(f"does not answer after {self.start_s:.0f} s"))
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ask it to end; kill it after `grace_s` seconds."""
        self._end(self.stop_signal, self.grace_s)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL, 10)

    def _end(self, signal_number: signal.Signals, grace_s: float) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal_number)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _complaint(self, what: str) -> str:
        # Of a Java stack trace only the messages tell anything.
        tail = [line for line in last_lines(self.log, 200) if line and not line.startswith("\tat ")][-15:]
        hints = [hint for sign, hint in _HINTS.items() if any(sign in line for line in tail)]
        return "\n".join([f"{self.name} {what}.", *hints, f"The end of {self.log}:", *(f"  {line}" for line in tail)])


def paystream(name: str, *arguments: str, log: Path, url: str, environment: Mapping[str, str], ready: str = "/readyz") -> Program:
    """One of our own processes, `paystream <arguments>`, run by the Python that runs us. It is ready when GET `url` + `ready` answers 200.

    A worker may take 40 s to drain, so it gets 45 s to end.
    """
    return Program(
        name=name,
        command=(sys.executable, "-m", "api.cli.main", *arguments),
        log=log,
        url=url,
        ready=partial(http_answers, url + ready),
        environment={"PYTHONUNBUFFERED": "1", "PAYSTREAM_TRACEBACK": "1", **environment},
        grace_s=45.0,
    )


def http_answers(url: str) -> bool:
    """Does GET answer 200?"""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=2)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == 200
    finally:
        connection.close()


def run_as(user: str | None, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end, as that user if one is named, where every user may be."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        user=user,
        group=pwd.getpwnam(user).pw_gid if user else None,
        extra_groups=() if user else None,
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a text file, without reading all of it; nothing if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            return [line.decode(errors="replace").rstrip()[:400] for line in deque(file, count)]
    except FileNotFoundError:
        return []
