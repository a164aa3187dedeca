"""Kafka as a `read_committed` reader sees it: partitions read to their end, outside of any consumer group.

Rule: the end is where the last committed record was when reading began, so that it is reached while others write. All calls block: they belong in
a thread.
Flow: topic -> `bounds` -> `seek` -> `read`, until it returns nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from infra.kafka_admin import client_config
from infra.settings import Settings
from schemas.errors import Unavailable

_TIMEOUT_S: Final = 15.0
_SLICE_S: Final = 0.25
_CHUNK: Final = 500


@contextmanager
def kafka_translated() -> Iterator[None]:
    """Within the block, librdkafka's errors are Unavailable."""
    try:
        yield
    except KafkaException as error:
        raise unavailable(error.args[0]) from error


def unavailable(error: KafkaError) -> Unavailable:
    return Unavailable("Kafka", f"{error.str()} ({error.name()})")


def committed_reader(settings: Settings, **options: Any) -> confluent_kafka.Consumer:
    """A consumer of committed records that is told what to read: it subscribes to nothing and commits nothing."""
    return confluent_kafka.Consumer(
        client_config(settings.kafka)
        | {
            "client.id": settings.service,
            "logger": logging.getLogger("librdkafka"),
            "group.id": f"{settings.prefix}paystream-{settings.service}",  # the client wants one
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            **options,
        }
    )


class CommittedLog:
    """A reader of one partition after the other. Topics are without prefix. Every method raises Unavailable while Kafka is away."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.prefix
        self._next = 0
        self._end = 0
        at_the_end = {"enable.partition.eof": True, "fetch.wait.max.ms": 20}  # there is nothing to wait for
        self._consumer = committed_reader(settings, **at_the_end)

    def partitions(self, topic: str) -> list[int]:
        name = self._prefix + topic
        with kafka_translated():
            found = self._consumer.list_topics(name, timeout=_TIMEOUT_S).topics[name]
        if found.error is not None:
            raise unavailable(found.error)
        return sorted(found.partitions)

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """The first offset that is still there, and the one after the last that is committed or aborted."""
        place = TopicPartition(self._prefix + topic, partition)
        deadline = time.monotonic() + _TIMEOUT_S
        with kafka_translated():
            while True:
                try:
                    first, end = self._consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION or time.monotonic() > deadline:
                        raise
                    self._consumer.list_topics(place.topic, timeout=_TIMEOUT_S)  # look for its leader anew
                else:
                    return first, end

    def seek(self, topic: str, partition: int, start: int, end: int) -> None:
        """Read what is from `start` to before `end` next."""
        self._next, self._end = start, end
        with kafka_translated():
            self._consumer.assign([TopicPartition(self._prefix + topic, partition, start)])

    def read(self) -> list[confluent_kafka.Message]:
        """The next records; none at the end."""
        records: list[confluent_kafka.Message] = []
        deadline = time.monotonic() + _TIMEOUT_S
        while not records and self._next < self._end:
            if time.monotonic() > deadline:
                raise Unavailable("Kafka", f"nothing to read within {_TIMEOUT_S:.0f} s")
            with kafka_translated():
                first = self._consumer.poll(_SLICE_S)
                messages = [first, *self._consumer.consume(_CHUNK, timeout=0)] if first is not None else []
            for message in messages:
                error = message.error()
                if error is None:
                    self._next = message.offset() + 1
                    if message.offset() < self._end:
                        records.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._next = self._end
                else:
                    raise unavailable(error)
        return records

    def close(self) -> None:
        self._consumer.close()
