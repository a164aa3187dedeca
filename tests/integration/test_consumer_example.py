"""`examples/consumer.py`, run as another team would: on a real broker and registry, with events that a Kafka transaction wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from infra.kafka_admin import producer_config
from infra.schema_registry import load_codec, register
from infra.settings import Settings
from schemas.codec import headers
from schemas.messages import Message, PaymentEvent
from schemas.topics import destinations
from tests.schemas.examples import example

pytestmark = pytest.mark.integration

CONSUMER = Path(__file__).parents[2] / "examples" / "consumer.py"
STORY = ("PaymentInitiated", "PaymentProcessing", "PaymentCompleted")


def story(payment: int) -> list[Message]:
    """A payment's events, versions 1 to 3, on an order of its own."""
    found: list[Message] = []
    for record in STORY:
        event = example(record)
        assert isinstance(event, PaymentEvent)
        found.append(replace(event, order_id=f"ord_{payment}", payment_id=f"00000000-0000-4000-8000-{payment:012}", event_id=f"{payment}-{record}"))
    return found


@dataclass
class Events:
    """Writes as the relay does: whole transactions, each event on all its topics."""

    settings: Settings

    def __post_init__(self) -> None:
        register(self.settings)
        self._codec = load_codec(self.settings)
        self._producer = Producer(producer_config(self.settings.kafka) | {"transactional.id": f"{self.settings.prefix}test"})
        self._producer.init_transactions(30)

    def write(self, events: Iterable[Message], *, commit: bool = True) -> None:
        self._producer.begin_transaction()
        for event in events:
            for topic in destinations(type(event).__name__):
                self._producer.produce(
                    self.settings.prefix + topic, self._codec.encode(event), key=event.key, headers=[(name, value) for name, value in headers(event)]
                )
        self._producer.flush(30)
        if commit:
            self._producer.commit_transaction(30)
        else:
            self._producer.abort_transaction(30)


@dataclass
class ConsumerProgram:
    settings: Settings
    state: Path

    def command(self, *more: str, topic: str = "payment-events", group: str = "team") -> list[str]:
        where = ["--bootstrap-servers", self.settings.kafka.bootstrap_servers, "--registry", self.settings.schema_registry.url]
        what = ["--topic", self.settings.prefix + topic, "--group", self.settings.prefix + group, "--state", str(self.state)]
        return [sys.executable, "-I", str(CONSUMER), *where, *what, *more]

    def run(self, *more: str, topic: str = "payment-events", group: str = "team") -> tuple[list[dict[str, Any]], str]:
        """The events that it printed, and what it said at the end."""
        command = self.command("--until-end", *more, topic=topic, group=group)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, cwd=self.state.parent, env={"PATH": os.environ["PATH"]}
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def events(installation: Settings) -> Events:
    return Events(installation)


@pytest.fixture
def consumer(installation: Settings, tmp_path: Path) -> ConsumerProgram:
    return ConsumerProgram(installation, tmp_path / "seen.db")


def test_every_event_is_read_once_and_in_order(events: Events, consumer: ConsumerProgram) -> None:
    events.write([event for payment in range(5) for event in story(payment)])
    events.write(story(99), commit=False)
    events.write(story(0))  # the same again, as after a database that was restored from a backup
    read, said = consumer.run()
    for payment in range(5):
        versions = [event["version"] for event in read if event["order_id"] == f"ord_{payment}"]
        assert versions == [1, 2, 3]
    assert len(read) == 15
    assert said == "15 events, 3 repeats, 0 of other types, 0 gaps\n"
    completed = next(event for event in read if event["event_type"] == "PAYMENT_COMPLETED")
    assert (completed["captured_minor"], completed["currency"]) == (1999, "EUR")
    assert completed["occurred_at"] == "2026-11-20T18:04:06.190000+00:00"


def test_a_group_goes_on_where_it_stopped_and_can_start_again(events: Events, consumer: ConsumerProgram) -> None:
    events.write(story(1))
    assert len(consumer.run()[0]) == 3
    events.write(story(2))
    assert [event["order_id"] for event in consumer.run()[0]] == ["ord_2"] * 3
    assert consumer.run("--from-beginning")[1] == "0 events, 6 repeats, 0 of other types, 0 gaps\n"
    consumer.state.unlink()
    assert len(consumer.run("--from-beginning")[0]) == 6


def test_types_are_chosen_by_header_and_topics_of_one_type_have_theirs(events: Events, consumer: ConsumerProgram) -> None:
    events.write([event for payment in range(2) for event in story(payment)])
    read, said = consumer.run("--type", "PAYMENT_COMPLETED", group="chooser")
    assert {event["event_type"] for event in read} == {"PAYMENT_COMPLETED"}
    assert said == "2 events, 0 repeats, 4 of other types, 0 gaps\n"
    consumer.state.unlink()
    read, said = consumer.run(topic="payment-completed", group="one-type")
    assert [event["version"] for event in read] == [3, 3]
    assert said == "2 events, 0 repeats, 0 of other types, 0 gaps\n"


def test_a_missing_event_is_noticed(events: Events, consumer: ConsumerProgram) -> None:
    first, _, third = story(1)
    events.write([first, third])
    assert consumer.run()[1].splitlines() == [
        "gap: 00000000-0000-4000-8000-000000000001 goes from version 1 to 3",
        "2 events, 0 repeats, 0 of other types, 1 gaps",
    ]


def test_ctrl_c_commits_what_was_handled_and_leaves(events: Events, consumer: ConsumerProgram) -> None:
    events.write(story(1))
    with subprocess.Popen(consumer.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for _ in STORY:
            assert running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0
        assert running.stderr.read() == "3 events, 0 repeats, 0 of other types, 0 gaps\n"
    assert consumer.run()[1] == "0 events, 0 repeats, 0 of other types, 0 gaps\n"


def test_a_topic_that_does_not_exist_is_one_line(consumer: ConsumerProgram) -> None:
    done = subprocess.run(consumer.command(topic="payment-evnets"), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
