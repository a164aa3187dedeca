"""Reads topics as a stranger would: a plain consumer, `read_committed`, from the first offset to the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition

from infra.settings import Settings


@dataclass(frozen=True, slots=True)
class OnTopic:
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp_ms: int


def read_topic(settings: Settings, topic: str, isolation: str = "read_committed") -> list[OnTopic]:
    """Every record of a topic (named without prefix), partition after partition, in order."""
    name = settings.prefix + topic
    config: dict[str, Any] = {
        "bootstrap.servers": settings.kafka.bootstrap_servers,
        "group.id": f"{settings.prefix}reader",
        "fetch.wait.max.ms": 20,
    }
    consumer = Consumer(
        config | {"isolation.level": isolation, "enable.partition.eof": True, "auto.offset.reset": "earliest", "enable.auto.commit": False}
    )
    try:
        partitions = sorted(consumer.list_topics(name, timeout=10).topics[name].partitions)
        consumer.assign([TopicPartition(name, partition, 0) for partition in partitions])
        found: list[OnTopic] = []
        ended: set[int] = set()
        deadline = time.monotonic() + 30
        while len(ended) < len(partitions):
            assert time.monotonic() < deadline, f"{name} can't be read to its end"
            message = consumer.poll(0.2)
            if message is None:
                continue
            error = message.error()
            if error is None:
                assert message.partition() not in ended or isolation != "read_committed", "a record after the end: something still writes"
                found.append(
                    OnTopic(
                        message.partition(),
                        message.offset(),
                        message.key(),
                        message.value(),
                        tuple(message.headers() or ()),
                        message.timestamp()[1],
                    )
                )
            elif error.code() == KafkaError._PARTITION_EOF:
                ended.add(message.partition())
            else:
                raise AssertionError(error.str())
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        consumer.close()
