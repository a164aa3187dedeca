"""The parts of the transport that need no broker: what may be committed, what a fetch may bring, and what Faust is told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from faust.transport.drivers import aiokafka as driver
from faust.types.auth import AuthProtocol, SASLMechanism
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from infra.database.delivery import Group
from infra.settings import Kafka, Settings, Worker
from processors.app import App
from processors.keyed_window import Gate, KeyedWindow
from processors.transport import ConsumerThread, Delivered

pytestmark = pytest.mark.unit


# ── What may be committed ──


def test_the_lowest_offset_that_is_not_acknowledged_is_committable() -> None:
    delivered = Delivered()
    acknowledged: set[int] = set()
    assert delivered.committable(acknowledged) is None
    for offset in (31, 32, 33, 40):
        assert delivered.add(offset)
    acknowledged |= {32, 33}
    assert delivered.committable(acknowledged) == 31, "31 is under way: Faust itself would commit 34 here"
    acknowledged.add(31)
    assert delivered.committable(acknowledged) == 40, "34 to 39 are transaction markers: Faust itself would stay at 34"
    acknowledged.add(40)
    assert delivered.committable(acknowledged) == 41
    assert acknowledged == set()


def test_what_was_delivered_is_remembered_when_all_of_it_is_done() -> None:
    delivered = Delivered()
    delivered.add(5)
    assert delivered.committable({5}) == 6
    assert not delivered.add(5)
    assert not delivered.add(3)
    assert delivered.committable(set()) == 6


@given(offsets=st.lists(st.integers(0, 60), unique=True, min_size=1), seed=st.integers(0, 2**32))
def test_nothing_unfinished_is_ever_behind_what_is_committable(offsets: list[int], seed: int) -> None:
    dice = random.Random(seed)
    delivered, acknowledged = Delivered(), set[int]()
    under_way: set[int] = set()
    committed = -1
    for offset in sorted(offsets):
        assert delivered.add(offset)
        under_way.add(offset)
        for done in dice.sample(sorted(under_way), dice.randrange(len(under_way) + 1)):
            under_way.remove(done)
            acknowledged.add(done)
        committable = delivered.committable(acknowledged)
        assert committable is not None
        assert committable == (min(under_way) if under_way else offset + 1)
        assert committable >= committed
        committed = committable


# ── Fetching ──


@dataclass
class Broker:
    """A consumer of aiokafka's, as far as a fetch looks at it."""

    assignment: object = field(default_factory=object)
    sought: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fetcher = SimpleNamespace(seek_to=lambda partition, offset: self.sought.append((partition, offset)))
        self._subscription = SimpleNamespace(subscription=self)


@pytest.mark.parametrize(("rebalanced", "flowing", "comes"), [(False, True, True), (True, True, False), (False, False, False)])
async def test_a_fetch_that_a_rebalance_came_across_brings_nothing_and_goes_back(
    monkeypatch: pytest.MonkeyPatch, rebalanced: bool, flowing: bool, comes: bool
) -> None:
    broker = Broker()
    records = {"payments-0": [SimpleNamespace(offset=7), SimpleNamespace(offset=8)]}

    async def fetch(*_: Any, **__: Any) -> dict[str, list[Any]]:
        if rebalanced:
            broker.assignment = object()
        return records

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_fetch_records", fetch)
    thread = ConsumerThread.__new__(ConsumerThread)
    thread.consumer = SimpleNamespace(flow_active=flowing)
    assert await thread._fetch_records(broker, None, timeout=1.0) == (records if comes else {})
    assert broker.sought == ([] if comes else [("payments-0", 7)])


# ── What Faust is told ──


async def app_of(settings: Settings) -> App:
    async def handle(_: object) -> None: ...

    return App(settings, Group.ORDERS, KeyedWindow(handle, gate=Gate(), slots=1, span=1))


async def test_settings_reach_faust() -> None:
    kafka = Kafka(bootstrap_servers="one:9092,two:9093", session_timeout_s=6, rebalance_timeout_s=10)
    settings = Settings(prefix="blue-", service="worker-orders", kafka=kafka, worker=Worker(drain_s=5, commit_interval_s=0.5))
    app = await app_of(settings)
    conf = app.conf
    assert conf.id == "blue-paystream-orders"
    assert [str(url) for url in conf.broker_consumer] == ["paystream://one:9092", "paystream://two:9093"]
    assert (conf.broker_session_timeout, conf.broker_heartbeat_interval, conf.broker_rebalance_timeout) == (6, 0.6, 10)
    assert conf.broker_commit_interval == 0.5
    assert conf.broker_credentials is None
    assert not conf.topic_allow_declare
    assert not conf.web_enabled
    assert app.topics_named("payment-events", "order-events").topics == ("blue-payment-events", "blue-order-events")


async def test_security_reaches_faust() -> None:
    kafka = Kafka(security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-256", sasl_username="me", sasl_password=SecretStr("pw"))
    credentials = (await app_of(Settings(kafka=kafka))).conf.broker_credentials
    assert (credentials.protocol, credentials.mechanism) == (AuthProtocol.SASL_SSL, SASLMechanism.SCRAM_SHA_256)
    assert (credentials.username, credentials.password) == ("me", "pw")
    credentials = (await app_of(Settings(kafka=Kafka(security_protocol="SSL")))).conf.broker_credentials
    assert credentials.protocol is AuthProtocol.SSL
