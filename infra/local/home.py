"""The folder of one stack: its ports, its secrets, its data, its logs, and the record of what runs.

Rule: everything that a stack remembers is in here (Postgres's data only by a link, where its user can't reach this folder), so a second folder is a
second stack. `state.json` has one writer, the supervisor, which holds `lock` as long as it lives; whoever reads it sees a whole file. Locks are the
kernel's: who holds one and ends, however that may be, holds it no more.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from infra.local.process import Identity, StackError
from infra.settings import PREFIX, local_stack

PORTS: Final = (
    "kafka",
    "kafka_controller",
    "registry",
    "postgres",
    "redis",
    "sandbox",
    "api",
    "relay",
    "worker_payments",
    "worker_orders",
    "worker_analytics",
)
_FREE_PORTS: Final = range(20_000, 32_000)  # below the range that the kernel gives to outgoing connections
_MIN_FREE_BYTES: Final = 1024**3
_DATA: Final = ("kafka", "postgres", "redis", "sandbox")

Phase = Literal["starting", "running", "stopping", "stopped", "failed"]
Condition = Literal["waiting", "starting", "healthy", "ended"]


@dataclass(kw_only=True)
class Record:
    """What the supervisor knows of one service or step."""

    condition: Condition = "waiting"
    identity: Identity | None = None
    restarts: int = 0
    seconds: float | None = None


@dataclass(kw_only=True)
class State:
    """`state.json`: what the supervisor wrote last."""

    phase: Phase = "stopped"
    failure: str | None = None
    supervisor: Identity | None = None
    records: dict[str, Record] = field(default_factory=dict)


class Home:
    """One stack's folder, made at the first use."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def default(cls) -> Home:
        return cls(local_stack())

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def data(self, name: str) -> Path:
        return self.path / name

    def prepare(self) -> list[str]:
        """Make the folder, choose ports and secrets where there are none yet. Returns what a reader should know, in words.

        Raises StackError if a port that was asked for is taken, or the disk is nearly full.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < _MIN_FREE_BYTES:
            raise StackError(
                f"only {free // (1024 * 1024)} MiB are free on the disk of {self.path}: free some space (1 GiB is needed), "
                f"or name a folder on another disk with --dir or {PREFIX}LOCAL_DIR"
            )
        self._write("secrets.json", {**_new_secrets(), **self.secrets}, mode=0o600)
        return self._choose_ports()

    @property
    def ports(self) -> dict[str, int]:
        """The port of each service; empty before the first start."""
        return self._read("ports.json")

    @property
    def secrets(self) -> dict[str, str]:
        return self._read("secrets.json")

    def keep_secret(self, name: str, value: str) -> None:
        self._write("secrets.json", {**self.secrets, name: value}, mode=0o600)

    def wipe(self) -> None:
        """Forget all stores together. Ports stay."""
        for name in _DATA:
            link = self.data(name)
            shutil.rmtree(link.resolve(), ignore_errors=True)
            if link.is_symlink():
                link.unlink()
        for name in ("secrets.json", "state.json", "environment"):
            (self.path / name).unlink(missing_ok=True)

    def lock(self) -> int | None:
        """Become the supervisor: the descriptor of the lock, or None if there is one."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        for _ in range(20):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.05)  # somebody may only be looking, see below
        os.close(descriptor)
        return None

    def supervised(self) -> bool:
        """Does a supervisor live?"""
        return _is_locked(self.path / "lock")

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Within the block the supervisor does not start this service again."""
        with self._hold(name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_held(self, name: str) -> bool:
        """Does somebody want this service not to run?"""
        return _is_locked(self._hold(name))

    def _hold(self, name: str) -> Path:
        return self.path / f"{name}.hold"

    def read_state(self) -> State:
        raw = self._read("state.json")
        if not raw:
            return State()
        return State(
            phase=raw["phase"],
            failure=raw["failure"],
            supervisor=_identity(raw["supervisor"]),
            records={name: Record(**{**record, "identity": _identity(record["identity"])}) for name, record in raw["records"].items()},
        )

    def write_state(self, state: State) -> None:
        self._write("state.json", asdict(state))

    def _choose_ports(self) -> list[str]:
        kept: dict[str, int] = self.ports
        chosen: dict[str, int] = {}
        notes: list[str] = []
        for name in PORTS:
            variable = f"{PREFIX}LOCAL_PORT_{name.upper()}"
            wanted = _number(variable, os.environ[variable]) if variable in os.environ else None
            if wanted is not None and not _is_free(wanted):
                raise StackError(f"port {wanted} ({variable}) is taken{_owner(wanted)}: stop that, or set {variable} to another one")
            port = wanted or kept.get(name)
            if port is None or port in chosen.values() or not _is_free(port):
                if port is not None:
                    notes.append(f"port {port} of {name} is taken now{_owner(port)}: another one is used")
                port = next(port for port in _shuffled() if port not in chosen.values() and port not in kept.values() and _is_free(port))
            chosen[name] = port
        self._write("ports.json", chosen)
        return notes

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise StackError(f"{self.path / name} can't be read: `paystream down`, then `paystream up --fresh`") from None
        return content

    def write(self, name: str, content: str, mode: int = 0o644) -> None:
        """Replace a file as a whole: whoever reads it sees the old one or the new one."""
        new = self.path / f".{name}.{os.getpid()}"
        with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(content)
        new.replace(self.path / name)

    def _write(self, name: str, content: dict[str, Any], mode: int = 0o644) -> None:
        self.write(name, json.dumps(content, indent=1), mode)


def _is_locked(path: Path) -> bool:
    """Does a process hold this lock?"""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _new_secrets() -> dict[str, str]:
    names = ("postgres_password", "redis_password", "jwt_secret")
    return {**{name: secrets.token_urlsafe(32) for name in names}, "stripe_api_key": "sk_test_" + secrets.token_hex(16)}


def _identity(raw: dict[str, Any] | None) -> Identity | None:
    return Identity(**raw) if raw else None


def _number(variable: str, text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65_536:
        raise StackError(f"{variable} is {text!r}: a port is a number from 1 to 65535")
    return int(text)


def _shuffled() -> list[int]:
    return random.sample(_FREE_PORTS, len(_FREE_PORTS))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free: the servers think so too
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _owner(port: int) -> str:
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
