"""What is wanted of the brokers, how it is compared with what they have, and how clients connect; then the same on a real broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions
from pydantic import SecretStr

from infra.kafka_admin import Drift, Grant, Kind, State, apply, client_config, compare, diff, producer_config, wanted
from infra.settings import Kafka, Settings
from schemas.errors import BadConfiguration, Unavailable
from schemas.topics import topics

WANT = wanted(topics(), "development", "shop-")
EVENTS = "shop-payment-events"
NOWHERE = Settings(kafka=Kafka(bootstrap_servers="127.0.0.1:1"))


@pytest.mark.unit
class TestWanted:
    def test_the_file_in_kafkas_words(self) -> None:
        topic = wanted(topics(), "production", "")
        assert topic.topics["payment-events"].partitions == 24
        assert topic.topics["payment-events"].replication == 3
        assert topic.topics["payment-events"].config == {
            "cleanup.policy": "delete",
            "retention.ms": "-1",
            "max.message.bytes": "1048576",
            "min.insync.replicas": "2",
        }
        assert topic.topics["payment-failed"].config["retention.ms"] == str(14 * 24 * 60 * 60 * 1000)
        assert topic.topics["outbox-positions"].config["cleanup.policy"] == "compact"

    def test_names_have_the_installations_prefix(self) -> None:
        assert all(name.startswith("shop-") for name in WANT.topics)
        assert WANT.grants is not None
        assert Grant(EVENTS, "User:*", "READ") in WANT.grants
        assert Grant(EVENTS, "User:relay", "WRITE") in WANT.grants

    def test_no_such_profile(self) -> None:
        with pytest.raises(BadConfiguration, match="no profile 'staging'"):
            wanted(topics(), "staging", "")


@pytest.mark.unit
class TestCompare:
    def test_what_matches_is_no_drift(self) -> None:
        assert compare(WANT, WANT) == ()

    def test_other_topics_and_grants_are_nobodys_business(self) -> None:
        have = State(topics={**WANT.topics, "other": WANT.topics[EVENTS]}, grants=(WANT.grants or frozenset()) | {Grant("other", "User:eve", "READ")})
        assert compare(WANT, have) == ()

    def test_a_missing_topic(self) -> None:
        have = replace(WANT, topics={name: topic for name, topic in WANT.topics.items() if name != EVENTS})
        assert compare(WANT, have) == (Drift(EVENTS, Kind.MISSING, "3 partitions, replication 1"),)

    def test_another_configuration(self) -> None:
        topic = replace(WANT.topics[EVENTS], config={**WANT.topics[EVENTS].config, "retention.ms": "1000"})
        drift = compare(WANT, replace(WANT, topics={**WANT.topics, EVENTS: topic}))
        assert drift == (Drift(EVENTS, Kind.CONFIG, "retention.ms is 1000, should be -1"),)

    def test_another_number_of_partitions_and_replicas(self) -> None:
        topic = replace(WANT.topics[EVENTS], partitions=6, replication=2)
        drift = compare(WANT, replace(WANT, topics={**WANT.topics, EVENTS: topic}))
        assert drift == (Drift(EVENTS, Kind.PARTITIONS, "has 6, should have 3"), Drift(EVENTS, Kind.REPLICATION, "is 2, should be 1"))

    def test_grants_that_lack_and_grants_too_many(self) -> None:
        assert WANT.grants is not None
        have = replace(WANT, grants=(WANT.grants - {Grant(EVENTS, "User:relay", "WRITE")}) | {Grant(EVENTS, "User:eve", "WRITE")})
        assert {(drift.kind, drift.detail) for drift in compare(WANT, have)} == {
            (Kind.ACL, "User:relay may not WRITE, and should"),
            (Kind.FOREIGN_ACL, "User:eve may WRITE, which the file does not say"),
        }

    def test_without_an_authorizer_grants_are_not_looked_at(self) -> None:
        assert compare(WANT, replace(WANT, grants=None)) == ()


@pytest.mark.unit
class TestClientConfig:
    def test_plaintext(self) -> None:
        assert client_config(Kafka(bootstrap_servers="a:1,b:2")) == {"bootstrap.servers": "a:1,b:2", "security.protocol": "PLAINTEXT"}

    def test_sasl_over_tls(self) -> None:
        kafka = Kafka(security_protocol="SASL_SSL", sasl_username="relay", sasl_password=SecretStr("s3cret"), ssl_ca_location=Path("/ca.pem"))
        config = client_config(kafka)
        assert config["sasl.mechanism"] == "SCRAM-SHA-512"
        assert (config["sasl.username"], config["sasl.password"]) == ("relay", "s3cret")
        assert config["ssl.ca.location"] == "/ca.pem"

    def test_sasl_without_a_user(self) -> None:
        with pytest.raises(BadConfiguration, match="PAYSTREAM_KAFKA__SASL_USERNAME"):
            client_config(Kafka(security_protocol="SASL_PLAINTEXT"))

    def test_producers_share_the_partitioner_and_can_send_what_topics_take(self) -> None:
        config = producer_config(Kafka())
        assert config["partitioner"] == "murmur2_random"
        assert config["acks"] == "all"
        assert config["enable.idempotence"] is True
        assert config["message.max.bytes"] == 1_048_576 + 65_536
        assert "partitioner" not in client_config(Kafka())


@pytest.mark.integration
class TestOnABroker:
    @pytest.fixture
    def empty(self, database: Settings) -> Iterator[Settings]:
        """An installation without topics."""
        yield database
        admin = _admin(database)
        if ours := [name for name in admin.list_topics(timeout=10).topics if name.startswith(database.prefix)]:
            for deleted in admin.delete_topics(ours).values():
                deleted.result(10)

    def test_apply_creates_and_repeating_it_changes_nothing(self, empty: Settings) -> None:
        assert {drift.kind for drift in diff(empty, "development").drift} == {Kind.MISSING}
        report = apply(empty, "development")
        assert len(report.mended) == len(topics().topics)
        assert (report.drift, report.authorizer) == ((), False)
        assert diff(empty, "development").drift == ()
        assert apply(empty, "development").mended == ()

    def test_several_may_apply_at_once(self, empty: Settings) -> None:
        with ThreadPoolExecutor(3) as pool:
            reports = list(pool.map(lambda _: apply(empty, "development"), range(3)))
        assert [report.drift for report in reports] == [(), (), ()]

    def test_configuration_is_mended_and_partitions_are_not(self, installation: Settings) -> None:
        name = f"{installation.prefix}payment-failed"
        admin = _admin(installation)
        change = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=[change])
        for done in [*admin.incremental_alter_configs([resource]).values(), *admin.create_partitions([NewPartitions(name, 5)]).values()]:
            done.result(10)
        _until_partitions(admin, name, 5)
        report = apply(installation, "development")
        assert [(drift.topic, drift.kind) for drift in report.mended] == [(name, Kind.CONFIG)]
        assert report.drift == (Drift(name, Kind.PARTITIONS, "has 5, should have 3"),)
        assert diff(installation, "development").drift == report.drift

    def test_more_replicas_than_brokers_are_refused_in_words(self, empty: Settings) -> None:
        with pytest.raises(BadConfiguration, match=r"Kafka refuses: .*replication factor"):
            apply(empty, "production")


@pytest.mark.integration
def test_brokers_that_do_not_answer_are_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"no broker answers .* is PAYSTREAM_KAFKA__BOOTSTRAP_SERVERS right"):
        diff(NOWHERE, "development")


def _admin(settings: Settings) -> AdminClient:
    return AdminClient(client_config(settings.kafka) | {"log_level": 0})


def _until_partitions(admin: AdminClient, name: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(admin.list_topics(name, timeout=10).topics[name].partitions) != count:
        assert time.monotonic() < deadline, f"{name} never had {count} partitions"
