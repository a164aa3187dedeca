#!/usr/bin/env python3
"""Read Paystream's events with nothing of Paystream's: confluent-kafka, fastavro and the schema registry's HTTP API.

    pip install confluent-kafka fastavro
    python consumer.py --bootstrap-servers localhost:9092 --registry http://localhost:8081 --group my-team

Each event is printed once, as a line of JSON. What makes that true:

* `isolation.level=read_committed`: what an aborted transaction wrote is never seen.
* An offset is stored only after its event was handled, so that a crash repeats events and loses none.
* The last version of each payment is kept in a database, in the same transaction as the work: a repeat has a version that is not above it.

Your own consumer does its work where `handle` prints.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import signal
import sqlite3
import struct
import sys
import urllib.request
from datetime import datetime
from typing import Any

import fastavro
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

COMPLETE_TOPICS = ("payment-events", "order-events")
"""Here versions have no gaps. A topic of one event type has only that type's versions."""


class Registry:
    """Schemas by id. They never change, so each is asked for once."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._schemas: dict[int, Any] = {}

    def schema(self, schema_id: int) -> Any:
        if schema_id not in self._schemas:
            with urllib.request.urlopen(f"{self._url}/schemas/ids/{schema_id}", timeout=10) as answer:  # noqa: S310
                self._schemas[schema_id] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
        return self._schemas[schema_id]

    def decode(self, value: bytes) -> dict[str, Any]:
        """Confluent's wire format: a zero byte, the schema's id as four bytes, the Avro body."""
        magic, schema_id = struct.unpack(">bI", value[:5])
        if magic != 0:
            raise ValueError("not in Confluent's wire format")
        event: dict[str, Any] = fastavro.schemaless_reader(io.BytesIO(value[5:]), self.schema(schema_id))
        return event


class Seen:
    """The last version of each payment (or order) that was handled, in the database that the work is done in."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path)
        self.database.execute("CREATE TABLE IF NOT EXISTS seen (entity TEXT PRIMARY KEY, version INTEGER NOT NULL)")

    def last_version(self, entity: str) -> int:
        row = self.database.execute("SELECT version FROM seen WHERE entity = ?", (entity,)).fetchone()
        return int(row[0]) if row else 0

    def remember(self, entity: str, version: int) -> None:
        self.database.execute("INSERT INTO seen VALUES (?, ?) ON CONFLICT (entity) DO UPDATE SET version = excluded.version", (entity, version))


class Program:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.registry = Registry(arguments.registry)
        self.seen = Seen(arguments.state)
        self.topic: str = arguments.topic
        self.types: set[str] = set(arguments.type)
        self.from_beginning: bool = arguments.from_beginning
        self.until_end: bool = arguments.until_end
        self.unfinished: set[int] = set()
        self.assigned = self.stopping = False
        self.handled = self.repeated = self.skipped = self.gaps = 0
        self.consumer = Consumer(
            {
                "bootstrap.servers": arguments.bootstrap_servers,
                "group.id": arguments.group,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "enable.auto.offset.store": False,  # stored by us, once an event is handled; committed every five seconds and at the end
                "enable.partition.eof": True,
                **dict(setting.split("=", 1) for setting in arguments.set),
            }
        )

    def run(self) -> None:
        self.consumer.subscribe([self.topic], on_assign=self.on_assign)
        try:
            while not self.stopping and not (self.until_end and self.assigned and not self.unfinished):
                message = self.consumer.poll(0.5)
                if message is not None:
                    self.on_message(message)
        finally:
            self.consumer.close()
            self.seen.database.close()

    def stop(self, *_: object) -> None:
        """Ctrl-C and SIGTERM: finish the event in hand, commit, leave the group."""
        self.stopping = True

    def on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.unfinished = {partition.partition for partition in partitions}
        self.assigned = True
        if self.from_beginning:
            for partition in partitions:
                partition.offset = OFFSET_BEGINNING
            consumer.assign(partitions)
            self.from_beginning = False  # a rebalance later goes on from what was committed

    def on_message(self, message: Message) -> None:
        error = message.error()
        if error is None:
            self.on_event(message)
            self.consumer.store_offsets(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            self.unfinished.discard(message.partition())
        else:
            raise KafkaException(error)

    def on_event(self, message: Message) -> None:
        kind = dict(message.headers() or []).get("ce_type", b"").decode()
        if self.types and kind not in self.types:  # told by a header: nothing was decoded
            self.skipped += 1
            return
        event = self.registry.decode(message.value())
        entity = event["order_id"] if kind.startswith("ORDER_") else event["payment_id"]
        with self.seen.database:  # one transaction: the work, and that it was done
            last = self.seen.last_version(entity)
            if event["version"] <= last:
                self.repeated += 1
                return
            if not self.types and self.topic.endswith(COMPLETE_TOPICS) and event["version"] != last + 1:
                self.gaps += 1
                print(f"gap: {entity} goes from version {last} to {event['version']}", file=sys.stderr)
            self.handle(event, message)
            self.seen.remember(entity, event["version"])
        self.handled += 1

    def handle(self, event: dict[str, Any], message: Message) -> None:
        place = {"partition": message.partition(), "offset": message.offset()}
        print(json.dumps({**event, **place}, default=as_json), flush=True)


def as_json(value: datetime | bytes) -> str:
    """What JSON has no type for: a time, and the body of a webhook."""
    return value.isoformat() if isinstance(value, datetime) else base64.b64encode(value).decode()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print Paystream's events, each one once.")
    parser.add_argument("--bootstrap-servers", default="localhost:9092")
    parser.add_argument("--registry", default="http://localhost:8081", help="base URL of the registry's Confluent API")
    parser.add_argument("--topic", default="payment-events")
    parser.add_argument("--group", required=True, help="your consumer group; it goes on where it stopped")
    parser.add_argument(
        "--type", action="append", default=[], metavar="EVENT_TYPE", help="only these, such as PAYMENT_COMPLETED; repeat it for several"
    )
    parser.add_argument("--state", default=":memory:", metavar="FILE", help="SQLite file that remembers what was handled; in memory if not given")
    parser.add_argument("--from-beginning", action="store_true", help="read everything again, whatever the group has committed")
    parser.add_argument("--until-end", action="store_true", help="stop when all there is has been read")
    parser.add_argument(
        "-X", dest="set", action="append", default=[], metavar="NAME=VALUE", help="a librdkafka setting, such as security.protocol=SASL_SSL"
    )
    return parser.parse_args()


def main() -> None:
    program = Program(arguments())
    signal.signal(signal.SIGINT, program.stop)
    signal.signal(signal.SIGTERM, program.stop)
    try:
        program.run()
    except (KafkaException, OSError) as error:  # no such topic, no permission, no registry; brokers that are away are waited for
        sys.exit(f"error: {error}")
    print(f"{program.handled} events, {program.repeated} repeats, {program.skipped} of other types, {program.gaps} gaps", file=sys.stderr)


if __name__ == "__main__":
    main()
