"""`python -m infra.local.prepare`: all that a stack needs from elsewhere, before its first start. `make setup` runs it.

Rule: what is done is not done again. Without this `paystream up` fetches what it lacks by itself, and Java starts half as fast: the classes that
Kafka and the registry load at their start are kept in a cache that the JVM makes when a training run ends (JEP 514).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from infra.local import fetch, postgres, services
from infra.local.home import Home
from infra.local.process import Program, StackError

_CACHE_S: Final = 120.0  # the JVM makes its cache after it was asked to end


def prepare(say: fetch.Say) -> None:
    """Fetch, and train what has no cache yet. Raises StackError if something can't be fetched."""
    fetch.fetch(say)
    untrained = {fetch.KAFKA: services.kafka, fetch.REGISTRY: services.registry}
    if untrained := {folder: program for folder, program in untrained.items() if not services.class_cache(folder).exists()}:
        say(f"training runs of {' and '.join(untrained)}, so that they start faster from now on (once)")
        try:
            _train(untrained)
        except StackError as error:
            say(f"goes on without: {error.detail}")


def _train(programs: Mapping[str, Callable[[Home], Program]]) -> None:
    with tempfile.TemporaryDirectory(prefix="paystream-training-") as folder:
        Path(folder).chmod(0o755)  # as root, Postgres runs as another user, which must be able to go there
        home = Home(Path(folder))
        home.prepare()
        database = postgres.program(home)
        database.start()
        try:
            database.wait_ready()
            with ThreadPoolExecutor(len(programs)) as pool:
                list(pool.map(lambda name: _train_one(name, programs[name](home)), programs))
        finally:
            database.stop()
            home.wipe()


def _train_one(name: str, program: Program) -> None:
    cache = services.class_cache(name)
    new = cache.with_name(f".{cache.name}.new")
    java, *arguments = program.command
    program.command = [java, f"-XX:AOTCacheOutput={new}", *arguments]
    program.grace_s = _CACHE_S
    program.start()
    try:
        program.wait_ready()
    finally:
        program.stop()
    if new.exists():
        new.replace(cache)


if __name__ == "__main__":
    try:
        prepare(lambda line: print(line, file=sys.stderr, flush=True))
    except StackError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
