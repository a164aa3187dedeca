"""Where topics end: what lag is measured against, asked by a client that has nothing to do with the consumer it is about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from infra.kafka_admin import client_config
from infra.settings import Kafka
from schemas.errors import Unavailable

_TIMEOUT_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.02


class EndOffsets:
    """Asks the brokers. Topic names are the brokers', prefix included."""

    def __init__(self, kafka: Kafka) -> None:
        self._admin = AdminClient(client_config(kafka) | {"log_level": 0})

    async def missing(self, topics: Iterable[str]) -> list[str]:
        """Those of the topics that do not exist. Raises Unavailable when no broker answers."""
        try:
            there = (await asyncio.to_thread(self._admin.list_topics, timeout=_TIMEOUT_S)).topics
        except KafkaException as error:
            raise Unavailable("Kafka", error.args[0].str()) from error
        return [topic for topic in topics if topic not in there]

    async def of(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """The last stable offset of each partition, where a reader of committed records ends. Raises Unavailable when no broker answers."""
        return await self._ends(partitions, IsolationLevel.READ_COMMITTED)

    async def unsettled(self, topic: str) -> int:
        """How many offsets of a topic an open transaction hides from readers of committed records. Raises Unavailable when no broker answers."""
        places = await self._places(topic)
        stable, written = await self.of(places), await self._written(places)
        return sum(written[place] - stable[place] for place in places)

    async def settled(self, topic: str, within_s: float) -> None:
        """Wait until readers of committed records see all that was written by now: a commit is answered before its markers are on the partitions.

        Raises Unavailable when no broker answers, or a transaction stays open for longer.
        """
        places = await self._places(topic)
        written = await self._written(places)
        deadline = time.monotonic() + within_s
        while any(end < written[place] for place, end in (await self.of(places)).items()):
            if time.monotonic() > deadline:
                raise Unavailable("Kafka", f"a transaction on {topic} stays open for more than {within_s:.0f} s: look at the relay")
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _places(self, topic: str) -> list[tuple[str, int]]:
        try:
            there = (await asyncio.to_thread(self._admin.list_topics, topic, timeout=_TIMEOUT_S)).topics[topic]
        except KafkaException as error:
            raise Unavailable("Kafka", error.args[0].str()) from error
        return [(topic, number) for number in there.partitions]

    async def _written(self, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
        return await self._ends(places, IsolationLevel.READ_UNCOMMITTED)

    async def _ends(self, partitions: Iterable[tuple[str, int]], isolation: IsolationLevel) -> dict[tuple[str, int], int]:
        wanted = {TopicPartition(topic, partition): OffsetSpec.latest() for topic, partition in partitions}
        if not wanted:
            return {}
        try:
            return await self._ask(wanted, isolation)
        except KafkaException:
            await self.missing(())  # librdkafka would ask by its old knowledge of leaders for minutes: this makes it look anew
        try:
            return await self._ask(wanted, isolation)
        except KafkaException as error:
            raise Unavailable("Kafka", error.args[0].str()) from error

    async def _ask(self, wanted: dict[TopicPartition, OffsetSpec], isolation: IsolationLevel) -> dict[tuple[str, int], int]:
        answers = self._admin.list_offsets(wanted, isolation_level=isolation, request_timeout=_TIMEOUT_S)
        return {(place.topic, place.partition): (await asyncio.wrap_future(answer)).offset for place, answer in answers.items()}
