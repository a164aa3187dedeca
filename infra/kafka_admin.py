"""Kafka as an operator sees it: topics that match `kafka-topics.yaml`, and how every client of ours connects.

Rule: `apply` creates and configures, as often as it is called and by as many as call it. It deletes nothing and changes no partition count, because
keys would move to other partitions, and order with them. What it can't mend it reports as drift.
Flow: `kafka-topics.yaml` -> `schemas/topics.py` -> wanted -> compared with what the brokers have -> drift -> `apply` mends it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from infra.settings import Kafka, Settings
from schemas.errors import BadConfiguration, Unavailable
from schemas.topics import Topic, Topics, topics

ANSWER_WITHIN_S: Final = 5.0
TIMEOUT_S: Final = 15.0
VISIBLE_WITHIN_S: Final = 30.0
_DAY_MS: Final = 24 * 60 * 60 * 1000
_FOR_EVER: Final = "-1"
_NOT_THERE: Final = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_CONTROLLER,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
    }
)


# ── How clients connect ──


def client_config(kafka: Kafka) -> dict[str, Any]:
    """What every librdkafka client needs to reach the brokers; the caller adds what it is for.

    Raises BadConfiguration when SASL is asked for and no user is given.
    """
    config: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap_servers, "security.protocol": kafka.security_protocol}
    if kafka.security_protocol.startswith("SASL"):
        if kafka.sasl_username is None or kafka.sasl_password is None:
            raise BadConfiguration(f"{kafka.security_protocol} needs PAYSTREAM_KAFKA__SASL_USERNAME and PAYSTREAM_KAFKA__SASL_PASSWORD")
        config["sasl.mechanism"] = kafka.sasl_mechanism
        config["sasl.username"] = kafka.sasl_username
        config["sasl.password"] = kafka.sasl_password.get_secret_value()
    if kafka.security_protocol.endswith("SSL") and kafka.ssl_ca_location is not None:
        config["ssl.ca.location"] = str(kafka.ssl_ca_location)
    return config


def producer_config(kafka: Kafka) -> dict[str, Any]:
    """What every producer of ours has on top: no message is lost or doubled between here and the brokers, and equal keys meet on one partition."""
    return client_config(kafka) | {
        "acks": "all",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # as Java and aiokafka clients have it: librdkafka's default puts the same key on another partition
        "message.max.bytes": max(topics().max_message_bytes_of(topic) for topic in topics().topics),
    }


# ── What should be, what is, and the difference ──


@dataclass(frozen=True, slots=True)
class Grant:
    """A principal may READ or WRITE a topic."""

    topic: str
    principal: str
    operation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicState:
    """A topic as the brokers have it, or should; `config` in Kafka's names and values."""

    partitions: int
    replication: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Topics by their name on the brokers, prefix included. `grants` is None where the brokers have no authorizer."""

    topics: Mapping[str, TopicState]
    grants: frozenset[Grant] | None


class Kind(StrEnum):
    MISSING = "missing"
    CONFIG = "config"
    ACL = "acl"
    PARTITIONS = "partitions"
    REPLICATION = "replication"
    FOREIGN_ACL = "foreign-acl"


MENDABLE: Final = frozenset({Kind.MISSING, Kind.CONFIG, Kind.ACL})
"""What `apply` mends. The rest needs a person."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference between the file and the brokers."""

    topic: str
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`mended` was drift and is none any more; `drift` is what is left. `authorizer` is False where ACLs can't be applied."""

    mended: tuple[Drift, ...]
    drift: tuple[Drift, ...]
    authorizer: bool


def wanted(file: Topics, profile_name: str, prefix: str) -> State:
    """The state that the file asks for under a profile. Planned topics are part of it: a consumer may subscribe before the first message.

    Raises BadConfiguration for a profile that the file does not have.
    """
    profile = file.profile(profile_name)
    states = {
        prefix + topic.name: TopicState(
            partitions=file.partitions_of(topic, profile),
            replication=profile.replication,
            config={
                "cleanup.policy": topic.cleanup,
                "retention.ms": _FOR_EVER if topic.retention_days == "forever" else str(topic.retention_days * _DAY_MS),
                "max.message.bytes": str(file.max_message_bytes_of(topic)),
                "min.insync.replicas": str(profile.min_insync_replicas),
            },
        )
        for topic in file.topics
    }
    return State(topics=states, grants=frozenset(grant for topic in file.topics for grant in _grants(topic, prefix)))


def _grants(topic: Topic, prefix: str) -> Iterable[Grant]:
    for operation, names in (("READ", topic.acl.read), ("WRITE", topic.acl.write)):
        yield from (Grant(prefix + topic.name, f"User:{name}", operation) for name in names)


def compare(want: State, have: State) -> tuple[Drift, ...]:
    """Every difference, topic by topic. What the brokers have beyond the file's topics is not looked at."""
    found: list[Drift] = []
    for name, topic in want.topics.items():
        there = have.topics.get(name)
        if there is None:
            found.append(Drift(name, Kind.MISSING, f"{topic.partitions} partitions, replication {topic.replication}"))
        else:
            found += _compare_topic(name, topic, there)
        if have.grants is not None and want.grants is not None:
            found += _compare_grants(name, want.grants, have.grants)
    return tuple(found)


def _compare_topic(name: str, want: TopicState, have: TopicState) -> Iterable[Drift]:
    for setting, value in want.config.items():
        if have.config.get(setting) != value:
            yield Drift(name, Kind.CONFIG, f"{setting} is {have.config.get(setting)}, should be {value}")
    if have.partitions != want.partitions:
        yield Drift(name, Kind.PARTITIONS, f"has {have.partitions}, should have {want.partitions}")
    if have.replication != want.replication:
        yield Drift(name, Kind.REPLICATION, f"is {have.replication}, should be {want.replication}")


def _compare_grants(name: str, want: frozenset[Grant], have: frozenset[Grant]) -> Iterable[Drift]:
    for grant in sorted((grant for grant in want ^ have if grant.topic == name), key=lambda grant: (grant.principal, grant.operation)):
        if grant in want:
            yield Drift(name, Kind.ACL, f"{grant.principal} may not {grant.operation}, and should")
        else:
            yield Drift(name, Kind.FOREIGN_ACL, f"{grant.principal} may {grant.operation}, which the file does not say")


# ── On the brokers ──


def diff(settings: Settings, profile: str) -> Report:
    """Where the brokers differ from the file.

    Raises Unavailable when no broker answers, BadConfiguration when they refuse to tell or the profile does not exist.
    """
    want = wanted(topics(), profile, settings.prefix)
    have = _read(_admin(settings.kafka), want)
    return Report(mended=(), drift=compare(want, have), authorizer=have.grants is not None)


def apply(settings: Settings, profile: str) -> Report:
    """Make the brokers match the file, as far as that is safe, and wait until they all show it.

    Raises Unavailable when no broker answers (what was done by then stays, and a repeat goes on from there), BadConfiguration when they refuse.
    """
    want = wanted(topics(), profile, settings.prefix)
    admin = _admin(settings.kafka)
    have = _read(admin, want)
    before = compare(want, have)
    _mend(admin, want, have)
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    left = compare(want, _read(admin, want))
    while pending := [drift for drift in left if drift.kind in MENDABLE]:
        if time.monotonic() > deadline:
            missing = f"{pending[0].topic}: {pending[0].detail}"
            raise Unavailable("Kafka", f"{VISIBLE_WITHIN_S:.0f} s after it was applied the brokers still do not show {missing}")
        time.sleep(0.1)
        left = compare(want, _read(admin, want))
    return Report(mended=tuple(drift for drift in before if drift not in left), drift=left, authorizer=have.grants is not None)


def _admin(kafka: Kafka) -> AdminClient:
    # Errors reach us as exceptions: librdkafka's own lines about them on stderr would only say everything twice.
    return AdminClient(client_config(kafka) | {"log_level": 0, "socket.connection.setup.timeout.ms": 5000})


def _read(admin: AdminClient, want: State) -> State:
    try:
        cluster = admin.list_topics(timeout=ANSWER_WITHIN_S)
    except KafkaException as error:
        raise _translated(error) from error
    known = {name: found for name, found in cluster.topics.items() if name in want.topics and found.error is None}
    states = {
        name: TopicState(
            partitions=len(known[name].partitions),
            replication=min((len(partition.replicas) for partition in known[name].partitions.values()), default=0),
            config=config,
        )
        for name, config in _configs(admin, ConfigResource.Type.TOPIC, known).items()
    }
    return State(topics=states, grants=_read_grants(admin, want) if _has_authorizer(admin, min(cluster.brokers)) else None)


def _configs(admin: AdminClient, kind: ConfigResource.Type, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The configuration of each; a topic that the broker asked does not know (yet, or any more) is left out."""
    resources = {ConfigResource(kind, name): name for name in names}
    answers = admin.describe_configs(list(resources), request_timeout=TIMEOUT_S) if resources else {}
    found = {resources[resource]: _result(answer, but=KafkaError.UNKNOWN_TOPIC_OR_PART) for resource, answer in answers.items()}
    return {name: {entry.name: entry.value or "" for entry in entries.values()} for name, entries in found.items() if entries is not None}


def _has_authorizer(admin: AdminClient, broker_id: int) -> bool:
    # Asked of the broker's configuration, because librdkafka gives an empty list, and no error, when ACLs are described and nobody keeps any.
    broker = str(broker_id)
    return bool(_configs(admin, ConfigResource.Type.BROKER, [broker])[broker].get("authorizer.class.name"))


def _read_grants(admin: AdminClient, want: State) -> frozenset[Grant]:
    every = AclBindingFilter(ResourceType.TOPIC, None, ResourcePatternType.LITERAL, None, None, AclOperation.ANY, AclPermissionType.ALLOW)
    bindings = _result(admin.describe_acls(every, request_timeout=TIMEOUT_S))
    return frozenset(Grant(found.name, found.principal, found.operation.name) for found in bindings if found.name in want.topics)


def _mend(admin: AdminClient, want: State, have: State) -> None:
    """Somebody else may be doing the same at the same time: that a topic is there already is what was wanted."""
    new = [
        NewTopic(name, num_partitions=topic.partitions, replication_factor=topic.replication, config=dict(topic.config))
        for name, topic in want.topics.items()
        if name not in have.topics
    ]
    if new:
        for created in admin.create_topics(new, request_timeout=TIMEOUT_S, operation_timeout=TIMEOUT_S).values():
            _result(created, but=KafkaError.TOPIC_ALREADY_EXISTS)
    changes = [
        ConfigResource(
            ConfigResource.Type.TOPIC,
            name,
            incremental_configs=[ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET) for setting, value in settings.items()],
        )
        for name, topic in want.topics.items()
        if name in have.topics and (settings := dict(topic.config.items() - have.topics[name].config.items()))
    ]
    if changes:
        for altered in admin.incremental_alter_configs(changes, request_timeout=TIMEOUT_S).values():
            _result(altered)
    if have.grants is not None and want.grants is not None and (grants := want.grants - have.grants):
        for granted in admin.create_acls([_binding(grant) for grant in grants], request_timeout=TIMEOUT_S).values():
            _result(granted)


def _binding(grant: Grant) -> AclBinding:
    pattern, operation = ResourcePatternType.LITERAL, AclOperation[grant.operation]
    return AclBinding(ResourceType.TOPIC, grant.topic, pattern, grant.principal, "*", operation, AclPermissionType.ALLOW)


def _result(future: Future[Any], but: int | None = None) -> Any:
    try:
        return future.result(TIMEOUT_S * 2)
    except KafkaException as error:
        if error.args[0].code() == but:
            return None
        raise _translated(error) from error


def _translated(error: KafkaException) -> Exception:
    why: KafkaError = error.args[0]
    if why.code() in _NOT_THERE or why.retriable():
        return Unavailable("Kafka", f"no broker answers ({why.str()}); is PAYSTREAM_KAFKA__BOOTSTRAP_SERVERS right?")
    return BadConfiguration(f"Kafka refuses: {why.str()} ({why.name()})")
