"""What Kafka and the schema registry are made of: fetched once from Maven, checked against `artifacts.lock`, kept in the user's cache.

Rule: a file counts only when its SHA-256 is the one in the lock, and a folder only when all of it is there (it gets its name last), so an
interrupted download goes on where it stopped and a damaged one is fetched again.
Flow: `make setup` -> prepare.py -> here -> `paystream up` finds the folders and needs no network.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from infra.local.process import StackError

KAFKA: Final = "kafka-4.3.1"
REGISTRY: Final = "apicurio-registry-3.3.3"
_KAFKA_COORDINATES: Final = "org.apache.kafka:kafka_2.13:4.3.1+org.apache.kafka:kafka-tools:4.3.1+org.slf4j:slf4j-simple:1.7.36"
_LARGE: Final = 50_000_000  # bytes from which on a single file's progress is told
_LOCK: Final = Path(__file__).with_name("artifacts.lock")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One line of the lock: `folder group:name:version[:classifier:packaging] sha256`."""

    folder: str
    group: str
    name: str
    version: str
    classifier: str
    packaging: str
    sha256: str

    @classmethod
    def parse(cls, line: str) -> Artifact:
        folder, coordinates, sha256 = line.split()
        group, name, version, classifier, packaging = f"{coordinates}::jar".split(":")[:5] if coordinates.count(":") == 2 else coordinates.split(":")
        return cls(folder, group, name, version, classifier, packaging, sha256)


def cache() -> Path:
    """Where fetched things are kept, for all stacks of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paystream"


def fetched(folder: str) -> Path | None:
    """The complete folder, None if it has to be fetched."""
    path = cache() / folder
    return path if path.is_dir() else None


def wheel(package: str) -> Path:
    """The folder of an installed package that brings a program along. It is not imported: some do things then."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise StackError(f"the Python package {package} is not installed: `make setup`, or pip install 'paystream[local]'")
    return Path(spec.origin).parent


def fetch(say: Say) -> None:
    """Fetch what is not there yet. `say` gets a line now and then. Raises StackError if a file can't be had."""
    if fetched(KAFKA) and fetched(REGISTRY):
        return
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two stacks that start at once fetch once
        artifacts = [Artifact.parse(line) for line in _LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for folder in (KAFKA, REGISTRY):
            if fetched(folder) is None:
                _fetch_folder(folder, [artifact for artifact in artifacts if artifact.folder == folder], say)


def _fetch_folder(folder: str, artifacts: list[Artifact], say: Say) -> None:
    say(f"{folder}: fetching {len(artifacts)} file{'s' if len(artifacts) > 1 else ''}, once")
    meter = _Meter(folder, len(artifacts), say)
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda artifact: _download(artifact, meter), artifacts))
    building = cache() / f".{folder}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for path in paths:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
                archive.extractall(building)  # noqa: S202 - its SHA-256 is the one in the lock: nobody put anything in
        else:
            shutil.copyfile(path, building / path.name)
    building.rename(cache() / folder)
    for path in paths:
        if path.is_relative_to(_downloads()):
            path.unlink()
    say(f"{folder}: ready")


def _download(artifact: Artifact, meter: _Meter) -> Path:
    """A file whose SHA-256 is right. What Maven fetched for this user before is as good as our own; our own gets a second chance."""
    from jgo.maven import MavenContext, PythonResolver

    fault: object = "its SHA-256 is not the one in the lock"
    for local_repositories in ([_maven_repository()], [], []):
        context = MavenContext(PythonResolver(progress_callback=meter.bytes), _downloads(), local_repositories, timeout=30)
        wanted = context.project(artifact.group, artifact.name).at_version(artifact.version).artifact(artifact.classifier, artifact.packaging)
        try:
            path: Path = wanted.resolve()
        except Exception as error:  # jgo passes on whatever requests, urllib3 and the operating system raise
            fault = error
            wanted.cached_path.unlink(missing_ok=True)
            continue
        if _sha256(path) == artifact.sha256:
            meter.finished()
            return path
        if path == wanted.cached_path:
            path.unlink()
    raise StackError(
        f"{artifact.name} {artifact.version} can't be fetched: {fault}. Check the network or the proxy and run the same command again: "
        "it goes on where it stopped"
    )


class _Meter:
    """Counts what has arrived, and says so at each quarter."""

    def __init__(self, folder: str, files: int, say: Say) -> None:
        self._folder, self._files, self._say = folder, files, say
        self._lock = threading.Lock()
        self._done = 0

    def finished(self) -> None:
        with self._lock:
            self._done += 1
            if self._files > 1 and self._done * 4 // self._files > (self._done - 1) * 4 // self._files:
                self._say(f"{self._folder}: {self._done} of {self._files} files")

    @contextmanager
    def bytes(self, _name: str, total: int) -> Iterator[Callable[[int], None]]:
        arrived = 0

        def update(count: int) -> None:
            nonlocal arrived
            before, arrived = arrived, arrived + count
            if total > _LARGE and arrived * 10 // total > before * 10 // total:
                self._say(f"{self._folder}: {arrived // 1_000_000} of {total // 1_000_000} MB")

        yield update


def write_lock() -> None:
    """Resolve the coordinates anew and write `artifacts.lock`: for whoever changes a version."""
    import jgo
    from jgo.maven import MavenContext

    environment = jgo.build(_KAFKA_COORDINATES, update=True)
    lines = [
        f"{KAFKA} {dependency.groupId}:{dependency.artifactId}:{dependency.version} {dependency.sha256}"
        for dependency in environment.lockfile.dependencies
    ]
    registry = MavenContext().project("io.apicurio", "apicurio-registry-app").at_version(REGISTRY.rpartition("-")[2])
    archive = registry.artifact(classifier="all", packaging="tar.gz").resolve()
    lines.sort()
    lines.append(f"{REGISTRY} io.apicurio:apicurio-registry-app:{registry.version}:all:tar.gz {_sha256(archive)}")
    header = "# Made by `python -m infra.local.fetch`: what Kafka and the schema registry consist of, with the SHA-256 of each file.\n"
    _LOCK.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


def _downloads() -> Path:
    return cache() / "maven"


def _maven_repository() -> Path:
    from jgo.constants import default_maven_repo

    repository: Path = default_maven_repo()
    return repository


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    write_lock()
