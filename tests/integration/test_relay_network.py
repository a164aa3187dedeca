"""The relay behind a network that loses, swallows and delays: whatever it can't know about a commit, every row is on its topics once, in order."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, KafkaException
from prometheus_client import REGISTRY

from infra.settings import Kafka, Settings
from producers import outbox_transactions
from tests.integration.test_relay import CODEC, assert_exactly_once, events_of, is_true, relay_running
from tests.outbox_writer import OutboxWriter, all_published, connected
from tests.tcp_proxy import ADD_PARTITIONS_TO_TXN, END_TXN, PRODUCE, Fault, KafkaProxy, kafka_proxy

pytestmark = pytest.mark.integration


def behind(proxy: KafkaProxy, settings: Settings) -> Settings:
    return settings.model_copy(update={"kafka": Kafka(bootstrap_servers=proxy.address)})


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.SWALLOW_ANSWER])
@pytest.mark.parametrize("api_key", [END_TXN, PRODUCE, ADD_PARTITIONS_TO_TXN], ids=["commit", "produce", "add-partitions"])
async def test_a_request_or_its_answer_is_lost(installation: Settings, api_key: int, fault: Fault) -> None:
    writer = OutboxWriter(CODEC)
    async with (
        kafka_proxy(installation.kafka.bootstrap_servers) as proxy,
        await connected(installation) as conn,
        relay_running(behind(proxy, installation)),
    ):
        await writer.append(conn, "o1", 3)
        await all_published(installation)
        proxy.fault(api_key, fault)
        doubts = in_doubt()
        for order in ("o1", "o2", "o1", "o3"):
            await writer.append(conn, order, 2)
        await all_published(installation)
        assert proxy.pending(api_key) == 0
        assert api_key != END_TXN or in_doubt() > doubts, "a commit that was sent twice was not taken as plainly done"
    await assert_exactly_once(installation, writer)


def in_doubt() -> float:
    return REGISTRY.get_sample_value("paystream_relay_transactions_total", {"outcome": "in_doubt"}) or 0.0


class Interrupted:
    """A producer that, once armed, runs `meanwhile` between a batch's records and its position record, and then fails."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._producer = confluent_kafka.Producer(config)

    meanwhile: ClassVar[Callable[[], None] | None] = None

    def produce(self, topic: str, **record: Any) -> None:
        if topic.endswith("outbox-positions") and (meanwhile := type(self).meanwhile):
            type(self).meanwhile = None
            meanwhile()
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        self._producer.produce(topic, **record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


@pytest.mark.parametrize("rule_on", [True, False], ids=["", "with the rule switched off"])
async def test_a_commit_that_arrives_late_ends_no_later_transaction(installation: Settings, monkeypatch: pytest.MonkeyPatch, rule_on: bool) -> None:
    if not rule_on:
        monkeypatch.setattr(outbox_transactions, "SLOW_COMMIT_S", 3600.0)
    writer = OutboxWriter(CODEC)
    loop = asyncio.get_running_loop()
    async with (
        kafka_proxy(installation.kafka.bootstrap_servers) as proxy,
        await connected(installation) as conn,
        relay_running(behind(proxy, installation), opened=Interrupted),
    ):
        proxy.fault(END_TXN, Fault.HOLD_REQUEST)
        await writer.append(conn, "o1", 3)
        await all_published(installation)
        assert proxy.pending(END_TXN) == 0
        Interrupted.meanwhile = lambda: asyncio.run_coroutine_threadsafe(proxy.release(), loop).result(20)
        await writer.append(conn, "o2", 3)
        await all_published(installation)
        assert Interrupted.meanwhile is None
    if rule_on:
        await assert_exactly_once(installation, writer)
    else:
        assert (await asyncio.to_thread(events_of, installation))["o2"] == [1, 2, 3, 1, 2, 3]


async def test_a_topic_that_the_relay_may_not_write_is_named(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with (
        kafka_proxy(installation.kafka.bootstrap_servers) as proxy,
        await connected(installation) as conn,
        relay_running(behind(proxy, installation)) as relay,
    ):
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        proxy.rewrite(ADD_PARTITIONS_TO_TXN, with_no_right_to_write)
        proxy.rewrite(ADD_PARTITIONS_TO_TXN, with_no_right_to_write)
        await writer.append(conn, "o1", 2)
        await is_true(lambda: "payment-events, payment-processing: " in (trouble := relay.why_not_ready() or "") and "AUTHORIZATION" in trouble)
        await all_published(installation)
    await assert_exactly_once(installation, writer)


def with_no_right_to_write(answer: bytes) -> bytes:
    """AddPartitionsToTxnResponse v0: length, correlation, throttle time, [topic, [partition, error]]."""
    changed = bytearray(answer)
    at = 12
    (topics,) = struct.unpack_from(">i", changed, at)
    at += 4
    for _ in range(topics):
        at += 2 + struct.unpack_from(">h", changed, at)[0]
        (partitions,) = struct.unpack_from(">i", changed, at)
        at += 4
        for _ in range(partitions):
            struct.pack_into(">h", changed, at + 4, KafkaError.TOPIC_AUTHORIZATION_FAILED)
            at += 6
    return bytes(changed)


async def test_kafka_is_away_for_a_while(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with kafka_proxy(installation.kafka.bootstrap_servers) as proxy, await connected(installation) as conn:
        proxy.cut()
        async with relay_running(behind(proxy, installation)) as relay:
            await writer.append(conn, "o1", 2)
            await is_true(lambda: relay.why_not_ready() is not None)
            proxy.mend()
            await all_published(installation)
            assert relay.why_not_ready() is None
            proxy.cut()
            await writer.append(conn, "o1", 2)
            await is_true(lambda: relay.why_not_ready() is not None)
            proxy.mend()
            await all_published(installation)
            assert relay.why_not_ready() is None
    await assert_exactly_once(installation, writer)
