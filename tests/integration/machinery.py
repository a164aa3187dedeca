"""What tests of the machinery between Kafka and a handler work with: real topics, real echo workers, and what those wrote down."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import psycopg
from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from infra.database.delivery import Group
from infra.local import environment
from infra.local.process import Program, StackError, http_answers
from infra.local.services import INFRASTRUCTURE
from infra.local.stack import Stack
from infra.settings import Settings, Worker
from processors.payments.agent import TOPICS
from schemas.codec import Codec, headers
from schemas.messages import ResolveAttempt, derived_id
from tests.conftest import free_port
from tests.processors.echo_worker import CREATE

COMMANDS = TOPICS[0]
PARTITIONS = 3
CODEC = Codec.unregistered()


def quick(settings: Settings, **worker: Any) -> Settings:
    """The settings with the deadlines that tests use."""
    kafka = settings.kafka.model_copy(update={"session_timeout_s": 6.0, "rebalance_timeout_s": 10.0})
    return settings.model_copy(update={"kafka": kafka, "worker": Worker(**{"drain_s": 5.0, "commit_interval_s": 0.5, **worker})})


def command(order_id: str, number: int) -> ResolveAttempt:
    """A message that says which one of its order it is."""
    return ResolveAttempt(
        event_id=derived_id(order_id, number),
        order_id=order_id,
        payment_id=derived_id(order_id),
        user_id="u1",
        occurred_at=datetime.now(UTC),
        correlation_id="c",
        attempt=number,
    )


class Machinery:
    """Topics, workers and what they handled."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self._folder = settings, folder
        self.programs: list[Program] = []
        self.sent: list[tuple[str, int]] = []
        self._numbers: defaultdict[str, int] = defaultdict(int)
        self._config = {"bootstrap.servers": settings.kafka.bootstrap_servers, "log_level": 0}
        self.producer = Producer(self._config | {"partitioner": "murmur2_random", "linger.ms": 2})
        self.admin = AdminClient(self._config)
        self.database = psycopg.connect(settings.database.url.get_secret_value(), autocommit=True)
        self.database.execute(CREATE)
        new = [NewTopic(settings.prefix + topic, num_partitions=PARTITIONS, replication_factor=1) for topic in TOPICS]
        for created in self.admin.create_topics(new).values():
            created.result(10)

    def close(self) -> None:
        for program in self.programs:
            program.kill()
        self.database.close()
        for deleted in self.admin.delete_topics([self.settings.prefix + topic for topic in TOPICS]).values():
            deleted.result(10)

    # ── Workers ──

    def worker(self, name: str, *options: str, wait: bool = True, settings: Settings | None = None) -> Program:
        """Start an echo worker, and wait until it has joined the group."""
        url = f"http://127.0.0.1:{free_port()}"
        program = Program(
            name=name,
            command=(sys.executable, "-m", "tests.processors.echo_worker", name, *options),
            log=self._folder / f"{name}.log",
            url=url,
            ready=partial(http_answers, url + "/readyz"),
            environment={**environment.variables(settings or self.settings), "PAYSTREAM_WORKER__ADMIN_PORT": url.rpartition(":")[2]},
            grace_s=30.0,
        )
        program.start()
        self.programs.append(program)
        if wait:
            program.wait_ready()
        return program

    def answers(self, program: Program) -> bool:
        """Are its admin routes up?"""
        try:
            return bool(get(program, "/version"))
        except OSError:
            return False

    def figure(self, worker: str, name: str) -> float:
        """The sum of a metric of a worker, over its labels."""
        (program,) = (program for program in self.programs if program.name == worker)
        return figure(program, name)

    def restart_broker(self, stack: Stack) -> None:
        """Kill Kafka, and wait until the stack has brought it back."""
        (broker,) = (standing.pid for standing in stack.status() if standing.name == "kafka")
        assert broker is not None
        os.kill(broker, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(broker)] if psutil.pid_exists(broker) else [], timeout=10)

        def is_back() -> bool:
            with suppress(StackError):
                stack.start(only=INFRASTRUCTURE)
                return True
            return False

        until(is_back, 60, "the broker is back")

    # ── Messages ──

    def send(self, order_id: str, *, topic: str = COMMANDS, producer: Producer | None = None) -> None:
        """The next message of an order."""
        self._numbers[order_id] += 1
        number = self._numbers[order_id]
        message = command(order_id, number)
        (producer or self.producer).produce(
            self.settings.prefix + topic, key=order_id.encode(), value=CODEC.encode(message), headers=[*headers(message)]
        )
        if producer is None:
            self.sent.append((order_id, number))

    def send_all(self, orders: Iterable[str], **options: Any) -> None:
        for order_id in orders:
            self.send(order_id, **options)
        self.producer.flush(10)

    @contextmanager
    def steadily(self, per_second: int, orders: int) -> Iterator[None]:
        """Within the block, send that many messages a second, of so many orders in turn."""
        stop = threading.Event()

        def send() -> None:
            for number in count():
                if stop.wait(max(0.0, begin + number / per_second - time.monotonic())):
                    return
                self.send(f"order-{number % orders}")
                self.producer.poll(0)

        begin = time.monotonic()
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            stop.set()
            sender.join()
            self.producer.flush(10)

    # ── What came of it ──

    def handled(self) -> list[tuple[str, str, int]]:
        """(worker, order, number) in the order in which they were finished."""
        return self.database.execute("SELECT worker, order_id, number FROM handled ORDER BY id").fetchall()

    def handled_count(self) -> int:
        row = self.database.execute("SELECT count(*) FROM handled").fetchone()
        assert row is not None
        count: int = row[0]
        return count

    def missing(self) -> set[tuple[str, int]]:
        return set(self.sent) - {(order, number) for _, order, number in self.handled()}

    def twice(self) -> int:
        """How many messages were handled more than once."""
        return self.handled_count() - len({(order, number) for _, order, number in self.handled()})

    def out_of_order(self) -> list[str]:
        """Orders of which a message was handled for the first time after a later one."""
        highest: defaultdict[str, int] = defaultdict(int)
        wrong = []
        for _, order, number in self.handled():
            if number > highest[order] + 1:
                wrong.append(f"{order}: {number} after {highest[order]}")
            highest[order] = max(highest[order], number)
        return wrong

    def longest_pause(self) -> float:
        """The most seconds between two messages that were finished one after the other."""
        row = self.database.execute(
            "SELECT max(extract(epoch FROM gap)) FROM (SELECT finished - lag(finished) OVER (ORDER BY finished) gap FROM handled)"
        ).fetchone()
        return float(row[0]) if row else 0.0

    def parked(self) -> list[tuple[str, int]]:
        """(disposition, offset) of what is parked."""
        return self.database.execute('SELECT disposition, "offset" FROM parked_messages').fetchall()

    def committed(self, topic: str = COMMANDS) -> dict[int, int]:
        """The committed offset of each partition that has one."""
        group = f"{self.settings.prefix}paystream-{Group.PAYMENTS}"
        (answer,) = self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)]).values()
        places = answer.result(10).topic_partitions
        return {place.partition: place.offset for place in places if place.topic == self.settings.prefix + topic and place.offset >= 0}

    def ends(self, topic: str = COMMANDS) -> dict[int, int]:
        """The last stable offset of each partition."""
        wanted = {TopicPartition(self.settings.prefix + topic, partition): OffsetSpec.latest() for partition in range(PARTITIONS)}
        answers = self.admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED)
        return {place.partition: answer.result(10).offset for place, answer in answers.items()}

    def lag(self, topic: str = COMMANDS) -> int:
        committed = self.committed(topic)
        return sum(end - committed.get(partition, 0) for partition, end in self.ends(topic).items())


def until(condition: Callable[[], Any], within: float, what: str = "") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        time.sleep(0.05)


def get(program: Program, path: str) -> Any:
    """What an admin route of a worker answers, whatever its status."""
    try:
        with urllib.request.urlopen(program.url + path, timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def figure(program: Program, name: str) -> float:
    """The sum of a metric of a process, over its labels."""
    with urllib.request.urlopen(program.url + "/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))
