"""A producer that keeps records in memory, for tests that need no broker.

Rule: it promises what `KafkaProducer` promises, and tests/contracts/test_producer.py runs on both: equal keys meet on the same partition as on Kafka.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from infra.crash_points import at
from producers.producer import Placed, Record
from schemas.errors import Rejected, Unavailable

_PARTITIONS: Final = 3
_MAX_BYTES: Final = 1024 * 1024
_MULTIPLIER: Final = 0x5BD1E995
_SEED: Final = 0x9747B28C
_32_BITS: Final = 0xFFFFFFFF


class MemoryProducer:
    """`away = True` is Kafka away: nothing is written. `silent = True` is an acknowledgement that gets lost: the record is written."""

    def __init__(self) -> None:
        self.away = False
        self.silent = False
        self._logs: defaultdict[tuple[str, int], list[Record]] = defaultdict(list)
        self._without_key = 0

    async def send(self, record: Record) -> Placed:
        await at("producer.before_send")
        if self.away:
            raise Unavailable("Kafka", "away")
        if len(record.value or b"") > _MAX_BYTES:
            raise Rejected("Kafka does not take it: too large")
        log = self._logs[record.topic, partition := self._partition_of(record.key)]
        log.append(record)
        if self.silent:
            raise Unavailable("Kafka", "no acknowledgement, the outcome is unknown")
        await at("producer.after_ack")
        return Placed(record.topic, partition, len(log) - 1)

    async def healthy(self) -> bool:
        return not self.away

    def sent(self, topic: str) -> list[Record]:
        """What is on a topic: partition after partition, each in order."""
        return [record for partition in range(_PARTITIONS) for record in self._logs[topic, partition]]

    def _partition_of(self, key: bytes | None) -> int:
        if key is None:
            self._without_key += 1
            return self._without_key % _PARTITIONS
        return (murmur2(key) & 0x7FFFFFFF) % _PARTITIONS


def murmur2(data: bytes) -> int:
    """The 32-bit hash that Kafka's Java client takes of a key (`org.apache.kafka.common.utils.Utils.murmur2`)."""
    hashed = _SEED ^ len(data)
    whole = len(data) - len(data) % 4
    for start in range(0, whole, 4):
        block = int.from_bytes(data[start : start + 4], "little") * _MULTIPLIER & _32_BITS
        block = (block ^ block >> 24) * _MULTIPLIER & _32_BITS
        hashed = hashed * _MULTIPLIER & _32_BITS ^ block
    if rest := data[whole:]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * _MULTIPLIER & _32_BITS
    hashed = (hashed ^ hashed >> 13) * _MULTIPLIER & _32_BITS
    return hashed ^ hashed >> 15
