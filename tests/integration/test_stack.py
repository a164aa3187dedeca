"""The embedded infrastructure, for real: that tests get what they need from it, and what happens when it is broken, cut off or started twice."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from confluent_kafka.admin import AdminClient

from infra.local.environment import database_url
from infra.local.home import Home
from infra.local.process import Identity, StackError
from infra.local.services import INFRASTRUCTURE
from infra.local.stack import Stack
from infra.settings import Settings
from tests.conftest import Infrastructure

pytestmark = pytest.mark.integration

STORES = frozenset({"postgres", "redis"})
"""The part of a stack that is up in two seconds."""
START = "import sys; from pathlib import Path; from infra.local.stack import Stack; "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for parent in (tmp_path, *tmp_path.parents[:2]):  # as root, Postgres runs as another user, which must be able to go there
        parent.chmod(0o755)
    return tmp_path / "stack"


@pytest.fixture
def fresh_stack(folder: Path) -> Iterator[Stack]:
    """A second stack beside the session's, not started yet."""
    stack = Stack(folder)
    yield stack
    stack.stop()
    stack.home.wipe()


def processes(stack: Stack) -> list[Identity]:
    """All that belong to it, the supervisor last."""
    state = stack.home.read_state()
    return [identity for identity in [*(record.identity for record in state.records.values()), state.supervisor] if identity is not None]


def alive(identities: list[Identity]) -> list[Identity]:
    return [identity for identity in identities if identity.process() is not None]


def until_gone(identities: list[Identity]) -> None:
    psutil.wait_procs([process for identity in identities if (process := identity.process()) is not None], timeout=30)
    assert not alive(identities)


def remember(stack: Stack) -> None:
    with psycopg.connect(database_url(stack.home, "postgres"), autocommit=True) as connection:
        connection.execute("CREATE TABLE remembered (it text)")


def remembers(stack: Stack) -> bool:
    with psycopg.connect(database_url(stack.home, "postgres")) as connection:
        return connection.execute("SELECT to_regclass('remembered') IS NOT NULL").fetchone() == (True,)


@contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


# -- what tests get


def test_an_installation_has_topics_a_migrated_database_and_an_empty_redis(installation: Settings) -> None:
    topics = AdminClient({"bootstrap.servers": installation.kafka.bootstrap_servers}).list_topics(timeout=10).topics
    assert f"{installation.prefix}payment-events" in topics
    with psycopg.connect(installation.database.url.get_secret_value()) as connection:
        assert connection.execute("SELECT count(*) FROM payments").fetchone() == (0,)
    with redis.Redis.from_url(installation.redis.url.get_secret_value()) as client:
        assert client.dbsize() == 0


def test_brokers_create_no_topic_by_themselves(installation: Settings) -> None:
    client = AdminClient({"bootstrap.servers": installation.kafka.bootstrap_servers, "allow.auto.create.topics": True})
    missing = f"{installation.prefix}nobody-made-this"
    assert client.list_topics(missing, timeout=10).topics[missing].error is not None
    assert missing not in client.list_topics(timeout=10).topics


def test_stores_want_their_password(stack: Infrastructure) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(stack.settings().database.url.get_secret_value().replace("paystream:", "paystream:not", 1))
    wrong = re.sub(r":[^:@]+@", ":wrong@", stack.settings().redis.url.get_secret_value())
    with redis.Redis.from_url(wrong) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


# -- starting and stopping


def test_what_was_stored_is_there_after_a_stop_and_gone_after_fresh(fresh_stack: Stack) -> None:
    fresh_stack.start(only=STORES)
    assert {standing.name for standing in fresh_stack.status() if standing.healthy} == STORES
    ports = fresh_stack.home.ports
    remember(fresh_stack)
    running = processes(fresh_stack)
    assert fresh_stack.stop()
    assert not alive(running)
    assert not fresh_stack.stop()

    fresh_stack.start(only=STORES)
    assert fresh_stack.home.ports == ports
    assert remembers(fresh_stack)

    fresh_stack.start(only=STORES, fresh=True)
    assert not remembers(fresh_stack)


def test_a_second_start_says_so_and_brings_back_what_has_ended(fresh_stack: Stack) -> None:
    said: list[str] = []
    fresh_stack.start(only=STORES)
    Stack(fresh_stack.home.path).start(progress=said.append)
    assert said[-1].endswith("is running already")
    [killed] = [standing for standing in fresh_stack.status() if standing.name == "redis"]
    assert killed.pid is not None
    process = psutil.Process(killed.pid)
    process.kill()
    process.wait(10)
    Stack(fresh_stack.home.path).start(progress=said.append)
    assert "but for redis: bringing that back" in said[-1]
    assert all(standing.healthy for standing in fresh_stack.status())


def test_who_started_a_stack_does_not_stop_the_one_that_somebody_else_has_started_since(fresh_stack: Stack) -> None:
    first = Stack(fresh_stack.home.path)
    first.start(only=STORES)
    fresh_stack.start(only=STORES, fresh=True)
    assert not first.stop()
    assert all(standing.healthy for standing in fresh_stack.status())


def test_on_a_leash_all_of_it_ends_with_whoever_started_it(fresh_stack: Stack) -> None:
    code = START + "Stack(Path(sys.argv[1])).start(only={'postgres', 'redis'}, leash=True); print('up', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, fresh_stack.home.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        running = processes(fresh_stack)
        assert len(alive(running)) == 3
        holder.kill()
    until_gone(running)


def test_what_a_killed_supervisor_left_is_ended_before_a_new_start(fresh_stack: Stack) -> None:
    said: list[str] = []
    fresh_stack.start(only=STORES)
    remember(fresh_stack)
    running = processes(fresh_stack)
    os.kill(running[-1].pid, signal.SIGKILL)
    until_gone(running[-1:])
    assert len(alive(running)) == 2
    assert not fresh_stack.running

    fresh_stack = Stack(fresh_stack.home.path)
    fresh_stack.start(only=STORES, progress=said.append)
    assert "ending what an interrupted stack left: postgres, redis" in said
    assert not alive(running)
    assert remembers(fresh_stack)
    assert fresh_stack.stop()


def test_after_a_power_cut_it_starts_although_old_files_name_pids_that_are_others_now(fresh_stack: Stack) -> None:
    fresh_stack.start(only=STORES)
    remember(fresh_stack)
    running = processes(fresh_stack)
    for identity in reversed(running):
        os.kill(identity.pid, signal.SIGKILL)
    until_gone(running)
    fresh_stack.stop()
    lock = fresh_stack.home.data("postgres") / "postmaster.pid"
    lines = lock.read_text().splitlines(keepends=True)
    lock.write_text("".join([f"{os.getpid()}\n", *lines[1:]]))
    state = fresh_stack.home.path / "state.json"
    state.write_text(state.read_text().replace(f'"pid": {running[0].pid},', f'"pid": {os.getpid()},'))

    fresh_stack.start(only=STORES)
    assert remembers(fresh_stack)


def test_a_broker_that_does_not_come_up_is_one_message_and_nothing_runs_on(fresh_stack: Stack) -> None:
    fresh_stack.home.prepare()
    logs = fresh_stack.home.data("kafka") / "logs"
    logs.mkdir(parents=True)
    (logs / "meta.properties").write_text("version=1\ncluster.id=another\nnode.id=7\ndirectory.id=JvqPnt3uSjqBWJnbC8MNHw\n")
    with pytest.raises(StackError, match=r"(?s)kafka ended with status 1 while it started\.\nThe end of .*kafka\.log:.*node"):
        fresh_stack.start(only=STORES | {"kafka"})
    assert not fresh_stack.home.supervised()
    assert processes(fresh_stack)[:-1] == []


def test_a_folder_that_belongs_to_another_user_is_named(fresh_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Home) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/.paystream")

    monkeypatch.setattr(Home, "prepare", refused)
    with pytest.raises(StackError, match=r"Permission denied: /somewhere/\.paystream\. Does the folder belong to another user\?"):
        fresh_stack.start(only=STORES)


@pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL changes its user only for root")
def test_root_can_have_its_stack_where_only_root_can_go(fresh_stack: Stack) -> None:
    fresh_stack.home.path.mkdir()
    fresh_stack.home.path.chmod(0o700)
    fresh_stack.start(only={"postgres"})
    place = fresh_stack.home.data("postgres")
    outside = place.resolve()
    assert place.is_symlink()
    assert psutil.Process(processes(fresh_stack)[0].pid).username() == "nobody"
    remember(fresh_stack)
    fresh_stack.stop()
    fresh_stack.start(only={"postgres"})
    assert remembers(fresh_stack)
    fresh_stack.stop()
    fresh_stack.home.wipe()
    assert not outside.exists()


# -- the command line


Paystream = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def paystream(folder: Path) -> Iterator[Paystream]:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "api.cli.main", *arguments]
        variables = {**os.environ, "PAYSTREAM_LOCAL_DIR": str(folder), **environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=150)

    yield run
    run("down")
    Stack(folder).home.wipe()


def test_a_port_that_is_taken_is_one_line_and_status_1(paystream: Paystream, stack: Infrastructure, folder: Path) -> None:
    port = stack.settings().kafka.bootstrap_servers.rpartition(":")[2]
    failed = paystream("up", "--detach", PAYSTREAM_LOCAL_PORT_KAFKA=port)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: port {port} (PAYSTREAM_LOCAL_PORT_KAFKA) is taken")
    assert len(failed.stderr.splitlines()) == 1
    assert not Stack(folder).home.supervised()


def test_a_whole_stack_comes_up_restarts_a_worker_and_ends_with_ctrl_c(paystream: Paystream, folder: Path) -> None:
    variables = {**os.environ, "PAYSTREAM_LOCAL_DIR": str(folder)}
    foreground = subprocess.Popen(
        [sys.executable, "-m", "api.cli.main", "up"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )
    with foreground:
        assert foreground.stderr is not None
        assert any(line.startswith("the stack is up after") for line in foreground.stderr)

        told = json.loads(paystream("status", "--json").stdout)
        services = {service["name"]: service for service in told["services"]}
        assert services.keys() == INFRASTRUCTURE | {"sandbox", "api", "relay", "worker-payments", "worker-orders", "worker-analytics"}
        assert all(service["healthy"] for service in services.values())
        assert {"name", "pid", "url", "healthy", "log"} <= services["kafka"].keys()
        assert told["settings"].keys() == {"kafka", "schema_registry", "database", "redis", "api", "sandbox"}
        assert told["settings"]["schema_registry"].endswith("/apis/ccompat/v7")

        os.kill(services["worker-orders"]["pid"], signal.SIGKILL)
        again = paystream("up", "--detach")
        assert again.returncode == 0, again.stderr
        assert "is running already" in again.stderr
        [worker] = [service for service in json.loads(paystream("status", "--json").stdout)["services"] if service["name"] == "worker-orders"]
        assert worker["healthy"]
        assert worker["restarts"] == 1
        assert worker["pid"] != services["worker-orders"]["pid"]

        assert paystream("logs", "api").stdout != ""
        assert paystream("token", "--user", "u1").stdout.count(".") == 2  # signed with the stack's secret
        assert paystream("logs", "nobody").stderr.startswith("error: no service is called nobody: there are ")

        running = processes(Stack(folder))
        assert len(alive(running)) == len(services) + 1
        foreground.send_signal(signal.SIGINT)
        assert foreground.stderr.read() == "stopping\n"
        assert foreground.wait() == 130
    assert not alive(running)
    assert paystream("down").stderr == "nothing was running\n"
