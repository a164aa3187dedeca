"""The real producer when Kafka is away, slow, or gone wrong for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from infra.settings import Kafka, Settings
from producers.producer import KafkaProducer, Record
from schemas.errors import Unavailable
from tests.tcp_proxy import INIT_PRODUCER_ID, PRODUCE, Fault, kafka_proxy
from tests.topic_reader import read_topic

pytestmark = pytest.mark.integration

NOWHERE = Settings(kafka=Kafka(bootstrap_servers="127.0.0.1:1", delivery_timeout_s=0.5))
RECORD = Record(topic="payment-commands", key=b"o1", value=b"x")
_CLUSTER_AUTHORIZATION_FAILED = 31


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[KafkaProducer]:
    producer = KafkaProducer(settings)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.close()


async def test_kafka_is_away() -> None:
    async with started(NOWHERE) as producer:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="outcome is unknown"):
            await producer.send(RECORD)
        assert time.monotonic() - began < 2
        assert not await producer.healthy()


async def test_what_kafka_does_not_take_is_not_piled_up() -> None:
    async with started(Settings(kafka=Kafka(bootstrap_servers="127.0.0.1:1", delivery_timeout_s=5))) as producer:
        waiting = [asyncio.create_task(producer.send(RECORD)) for _ in range(10_000)]
        await asyncio.sleep(0)
        assert producer.in_flight == 10_000
        with pytest.raises(Unavailable, match="10000 records wait"):
            await producer.send(RECORD)
        assert all(isinstance(outcome, Unavailable) for outcome in await asyncio.gather(*waiting, return_exceptions=True))


async def test_a_caller_that_goes_away_leaves_nothing_behind(installation: Settings) -> None:
    async with started(installation) as producer:
        sends = [asyncio.create_task(producer.send(RECORD)) for _ in range(50)]
        await asyncio.sleep(0)
        for send in sends:
            send.cancel()
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in await asyncio.gather(*sends, return_exceptions=True))
        async with asyncio.timeout(10):
            while producer.in_flight:
                await asyncio.sleep(0.01)
        assert (await producer.send(RECORD)).offset == 50  # they were on their way


async def test_an_acknowledgement_that_is_lost_doubles_nothing(installation: Settings) -> None:
    async with kafka_proxy(installation.kafka.bootstrap_servers) as proxy:
        kafka = Kafka(bootstrap_servers=proxy.address)
        async with started(installation.model_copy(update={"kafka": kafka})) as producer:
            await producer.send(RECORD)
            proxy.fault(PRODUCE, Fault.SWALLOW_ANSWER)
            assert (await producer.send(RECORD)).offset == 1
            assert (await producer.send(RECORD)).offset == 2
    assert len(await asyncio.to_thread(read_topic, installation, RECORD.topic)) == 3


async def test_it_recovers_by_itself_when_kafka_is_back(installation: Settings) -> None:
    async with kafka_proxy(installation.kafka.bootstrap_servers) as proxy:
        kafka = Kafka(bootstrap_servers=proxy.address, delivery_timeout_s=1)
        async with started(installation.model_copy(update={"kafka": kafka})) as producer:
            await producer.send(RECORD)
            proxy.cut()
            with pytest.raises(Unavailable):
                await producer.send(RECORD)
            assert not await producer.healthy()
            proxy.mend()
            await healthy(producer)
            await sends_again(producer)


async def test_after_a_fatal_error_another_client_takes_over(installation: Settings) -> None:
    """librdkafka's idempotent producer gives up for good on some answers: this one is that it may not be idempotent."""

    def refused(answer: bytes) -> bytes:
        return answer[:13] + _CLUSTER_AUTHORIZATION_FAILED.to_bytes(2, "big") + answer[15:]

    async with kafka_proxy(installation.kafka.bootstrap_servers) as proxy:
        proxy.rewrite(INIT_PRODUCER_ID, refused)
        kafka = Kafka(bootstrap_servers=proxy.address, delivery_timeout_s=2)
        async with started(installation.model_copy(update={"kafka": kafka})) as producer:
            with pytest.raises(Unavailable):
                await producer.send(RECORD)
            assert proxy.pending(INIT_PRODUCER_ID) == 0
            await sends_again(producer)
            assert await producer.healthy()


async def healthy(producer: KafkaProducer) -> None:
    async with asyncio.timeout(20):
        while not await producer.healthy():
            pass


async def sends_again(producer: KafkaProducer) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await producer.send(RECORD)
            except Unavailable:
                continue
            return
