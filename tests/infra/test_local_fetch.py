"""What is fetched: only files whose SHA-256 is in the lock count, and a break or a damaged file is made good by the next attempt."""

from __future__ import annotations

import gc
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.local import fetch
from infra.local.process import StackError

pytestmark = [
    pytest.mark.unit,
    # jgo leaves the connection of a download that failed to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

JAR = b"a jar"
JAR_PATH = "org/example/broker/1.0/broker-1.0.jar"
ARCHIVE_PATH = "org/example/registry/2.0/registry-2.0-all.tar.gz"


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("quarkus-run.jar")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"run"))
    return buffer.getvalue()


class Repository:
    """A Maven repository. `files` is what it has, `asked` which of them were asked for."""

    def __init__(self) -> None:
        self.files = {JAR_PATH: JAR, ARCHIVE_PATH: archive()}
        self.asked: list[str] = []


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repository]:
    """The lock names two files of this repository, and the user's cache is empty."""
    served = Repository()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            if not path.endswith(".sha1"):
                served.asked.append(path)
            body = served.files.get(path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    lock = tmp_path / "artifacts.lock"
    lock.write_text(
        f"# comment\n{fetch.KAFKA} org.example:broker:1.0 {hashlib.sha256(JAR).hexdigest()}\n"
        f"{fetch.REGISTRY} org.example:registry:2.0:all:tar.gz {hashlib.sha256(served.files[ARCHIVE_PATH]).hexdigest()}\n"
    )
    monkeypatch.setattr(fetch, "_LOCK", lock)
    monkeypatch.setattr("jgo.maven._core.DEFAULT_REMOTE_REPOS", {"test": f"http://127.0.0.1:{server.server_port}"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "m2"))
    yield served
    server.shutdown()
    server.server_close()
    gc.collect()  # now, and not in the middle of another test


def test_everything_is_fetched_once_and_unpacked(repository: Repository) -> None:
    said: list[str] = []
    fetch.fetch(said.append)
    fetch.fetch(said.append)
    assert (fetch.cache() / fetch.KAFKA / "broker-1.0.jar").read_bytes() == JAR
    assert (fetch.cache() / fetch.REGISTRY / "quarkus-run.jar").read_bytes() == b"run"
    assert sorted(repository.asked) == sorted([JAR_PATH, ARCHIVE_PATH])
    assert said[0] == f"{fetch.KAFKA}: fetching 1 file, once"
    assert not list((fetch.cache() / "maven").rglob("*.jar"))


def test_what_maven_fetched_before_is_taken_from_there(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "m2" / JAR_PATH).parent.mkdir(parents=True)
    (tmp_path / "m2" / JAR_PATH).write_bytes(JAR)
    fetch.fetch(lambda _: None)
    assert repository.asked == [ARCHIVE_PATH]


@pytest.mark.parametrize("place", ["m2", "cache/paystream/maven"])
def test_a_file_that_is_cut_short_is_fetched_again(repository: Repository, tmp_path: Path, place: str) -> None:
    (tmp_path / place / JAR_PATH).parent.mkdir(parents=True)
    (tmp_path / place / JAR_PATH).write_bytes(JAR[:2])
    fetch.fetch(lambda _: None)
    assert (fetch.cache() / fetch.KAFKA / "broker-1.0.jar").read_bytes() == JAR


def test_a_break_in_the_middle_loses_only_what_was_not_there(repository: Repository) -> None:
    whole = repository.files.pop(ARCHIVE_PATH)
    with pytest.raises(StackError, match=r"registry 2\.0 can't be fetched.*goes on where it stopped"):
        fetch.fetch(lambda _: None)
    assert fetch.fetched(fetch.REGISTRY) is None
    repository.files[ARCHIVE_PATH] = whole
    repository.asked.clear()
    fetch.fetch(lambda _: None)
    assert repository.asked == [ARCHIVE_PATH]


def test_a_file_that_is_not_the_one_in_the_lock_is_never_used(repository: Repository) -> None:
    repository.files[JAR_PATH] = b"something else"
    with pytest.raises(StackError, match=r"broker 1\.0 can't be fetched: its SHA-256 is not the one in the lock"):
        fetch.fetch(lambda _: None)
    assert fetch.fetched(fetch.KAFKA) is None


def test_a_wheel_that_is_not_installed_is_named() -> None:
    with pytest.raises(StackError, match=r"the Python package no_such_package is not installed: `make setup`"):
        fetch.wheel("no_such_package")
