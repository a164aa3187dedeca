"""What the tests run against: one real stack for the whole session, and in it an installation for each test.

Rule: tests share processes, never state. An installation has its own topic and Redis prefix, its own migrated database and its own Redis database.
The stack is the embedded one. `PAYSTREAM_TEST_STACK=folder` takes one that is running (`paystream up` in that folder, or a test session's) and
leaves it running, which makes the edit-test loop short. `PAYSTREAM_TEST_CONTAINERS=1` takes containers.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

# Before anything of ours is imported: neither what the shell says about Paystream nor this folder's own stack may reach the tests.
_GIVEN_STACK = os.environ.get("PAYSTREAM_TEST_STACK")
_IN_CONTAINERS = os.environ.get("PAYSTREAM_TEST_CONTAINERS")
for _name in [name for name in os.environ if name.startswith("PAYSTREAM_")]:
    del os.environ[_name]
os.environ["PAYSTREAM_LOCAL_DIR"] = "/nonexistent/.paystream"

import psycopg  # noqa: E402
import pytest  # noqa: E402
import redis  # noqa: E402
from confluent_kafka.admin import AdminClient  # noqa: E402
from psycopg import sql  # noqa: E402
from pydantic import SecretStr  # noqa: E402

from infra import kafka_admin  # noqa: E402
from infra.database.migrations.run import migrate  # noqa: E402
from infra.local import environment  # noqa: E402
from infra.local.process import Program, paystream  # noqa: E402
from infra.local.services import INFRASTRUCTURE  # noqa: E402
from infra.local.stack import Stack  # noqa: E402
from infra.schema_registry import register  # noqa: E402
from infra.settings import Api, Database, Redis, Settings  # noqa: E402
from tests.containers import containers  # noqa: E402

StartProgram = Callable[..., Program]


class Infrastructure(Protocol):
    """What tests may ask of a stack, wherever it runs."""

    def settings(self) -> Settings: ...


@pytest.fixture(scope="session")
def stack() -> Iterator[Infrastructure]:
    """Kafka, the schema registry, Postgres and Redis, running. On a leash: they end with this session, however that ends."""
    if _GIVEN_STACK:
        given = Stack(Path(_GIVEN_STACK))
        if not given.running:
            pytest.exit(f"PAYSTREAM_TEST_STACK={_GIVEN_STACK} names no running stack", returncode=1)
        yield given
    elif _IN_CONTAINERS:
        with containers({name: free_port() for name in ("KAFKA_PORT", "REGISTRY_PORT", "POSTGRES_PORT", "REDIS_PORT")}) as started:
            yield started
    else:
        with tempfile.TemporaryDirectory(prefix="paystream-test-") as folder:
            Path(folder).chmod(0o755)  # as root, Postgres runs as another user, which must be able to go there
            own = Stack(Path(folder) / "stack")
            own.start(only=INFRASTRUCTURE, leash=True)
            try:
                yield own
            finally:
                own.stop()
                own.home.wipe()


@pytest.fixture(scope="session")
def template_database(stack: Infrastructure) -> Iterator[str]:
    """The name of a migrated database that each installation's is copied from, which takes 50 ms instead of a second."""
    name = f"template_{secrets.token_hex(4)}"
    address = stack.settings().database.url.get_secret_value()
    _administer(address, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    migrate(_database(address, name))
    yield name
    _administer(address, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database(stack: Infrastructure, template_database: str) -> Iterator[Settings]:
    """Settings with a prefix, a migrated database and an empty Redis database of their own. No topics: for tests without Kafka."""
    with own_database(stack, template_database) as settings:
        yield settings


@contextmanager
def own_database(stack: Infrastructure, template: str) -> Iterator[Settings]:
    """What the fixture `database` gives, for as long as the block runs."""
    settings = stack.settings()
    token = f"t{secrets.token_hex(4)}"
    address = settings.database.url.get_secret_value()
    names = sql.Identifier(token), sql.Identifier(template)
    _administer(address, sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
    own = {
        "prefix": f"{token}-",
        "database": Database(url=SecretStr(_database(address, token)), pool_size=settings.database.pool_size),
        "redis": Redis(url=SecretStr(_own_redis(settings.redis.url.get_secret_value()))),
        "api": Api(port=free_port()),
    }
    try:
        yield settings.model_copy(update=own)
    finally:
        _administer(address, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names[0]))


@pytest.fixture(scope="session")
def registered_schemas(stack: Infrastructure) -> None:
    """All installations share the registry: schemas have no prefix."""
    register(stack.settings())


@pytest.fixture
def installation(database: Settings, registered_schemas: None) -> Iterator[Settings]:
    """An installation with its topics and schemas, where every process of ours can run."""
    with own_topics(database):
        yield database


@contextmanager
def own_topics(database: Settings) -> Iterator[None]:
    """All topics of an installation, for as long as the block runs."""
    kafka_admin.apply(database, "development")
    try:
        yield
    finally:
        admin = AdminClient({"bootstrap.servers": database.kafka.bootstrap_servers, "log_level": 0})
        ours = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(database.prefix)]
        for deleted in admin.delete_topics(ours).values():
            deleted.result(10)


@pytest.fixture
def start(installation: Settings, tmp_path: Path) -> Iterator[StartProgram]:
    """`start("worker", "payments", PAYSTREAM_CRASH_AT="…")` runs that `paystream` command on the installation and waits until it is ready.

    `settings=` takes other settings than the installation's, `wait=False` returns at once. What still runs at the end is killed. The result's
    `url` is where its admin routes are, or the API.
    """
    with programs(installation, tmp_path) as start_one:
        yield start_one


@contextmanager
def programs(installation: Settings, folder: Path) -> Iterator[StartProgram]:
    """What the fixture `start` gives, for as long as the block runs; logs are in `folder`."""
    started: list[Program] = []

    def start_one(*arguments: str, settings: Settings = installation, wait: bool = True, **extra: str) -> Program:
        port = settings.api.port if arguments[0] == "api" else free_port()
        told = {**environment.variables(settings), "PAYSTREAM_WORKER__ADMIN_PORT": str(port), **extra}
        name = f"{'-'.join(arguments)}-{len(started) + 1}"
        program = paystream(name, *arguments, log=folder / f"{name}.log", url=f"http://127.0.0.1:{port}", environment=told)
        program.start()
        started.append(program)
        if wait:
            program.wait_ready()
        return program

    try:
        yield start_one
    finally:
        for program in started:
            program.kill()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _own_redis(address: str) -> str:
    """The same Redis, an empty database of it that no other session uses either: they are given out in turn."""
    with redis.Redis.from_url(address) as client:
        number = 1 + int(client.incr("paystream:test:databases")) % 255
    parts = urlsplit(address)
    own = urlunsplit(parts._replace(path=f"/{number}"))
    with redis.Redis.from_url(own) as client:
        client.flushdb()
    return own


def _database(address: str, name: str) -> str:
    return urlunsplit(urlsplit(address)._replace(path=f"/{name}"))


def _administer(address: str, statement: sql.Composed) -> None:
    with suppress(psycopg.errors.InvalidCatalogName), psycopg.connect(_database(address, "postgres"), autocommit=True) as connection:
        connection.execute(statement)
