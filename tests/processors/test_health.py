"""Stuck is only who has work, is not held, and gets nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.settings import Settings
from processors.health import Health, Place
from processors.keyed_window import Gate, KeyedWindow
from processors.transport import Standing
from schemas.errors import Unavailable

pytestmark = pytest.mark.unit

PLACE: Place = ("blue-payment-commands", 0)


@dataclass
class Consumer:
    settled: bool = True
    at: dict[Place, Standing] = field(default_factory=dict)

    def standing(self) -> Mapping[Place, Standing]:
        return self.at

    def be(self, position: int | None, committed: int | None) -> None:
        self.at[PLACE] = Standing(position=position, committed=committed, committed_at=0.0)


class Brokers:
    """Brokers that are away at first."""

    def __init__(self) -> None:
        self.away, self.topics = True, set[str]()

    async def missing(self, topics: Sequence[str]) -> list[str]:
        if self.away:
            raise Unavailable("Kafka")
        return [topic for topic in topics if topic not in self.topics]

    async def of(self, places: Iterable[Place]) -> dict[Place, int]:
        if self.away:
            raise Unavailable("Kafka")
        return dict.fromkeys(places, 12)


@dataclass(eq=False)
class Event:
    key: str
    partition: Place = PLACE
    stale: bool = False

    def ack(self) -> None: ...


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.gate, self.consumer = Gate(), Consumer()
        self.go = asyncio.Event()
        self.window: KeyedWindow[Event] = KeyedWindow(self._handle, gate=self.gate, slots=9, span=9, monotonic=lambda: self.now)
        self.brokers = Brokers()
        self.health = Health(
            Settings(prefix="blue-"),
            "payments",
            ["payment-commands"],
            self.window,
            self.gate,
            lambda: self.consumer,
            self.brokers,  # type: ignore[arg-type]
            monotonic=lambda: self.now,
        )

    async def _handle(self, _: Sequence[Event]) -> None:
        await self.go.wait()

    def later(self, seconds: float, end: int) -> str | None:
        self.now += seconds
        self.health.measure({PLACE: end})
        return self.health.live()


async def test_who_has_nothing_to_do_is_live() -> None:
    world = World()
    world.consumer.be(position=10, committed=8)
    assert world.later(0, end=10) is None
    assert world.later(1000, end=10) is None, "two transaction markers behind the last message are nothing to do"


async def test_who_reads_nothing_though_there_is_something_is_stuck_after_a_while() -> None:
    world = World()
    world.consumer.be(position=10, committed=10)
    assert world.later(0, end=15) is None
    assert world.later(50, end=15) is None
    stuck = world.later(30, end=15)
    assert stuck is not None
    assert "5 unread" in stuck
    world.consumer.be(position=15, committed=12)
    assert world.later(0, end=15) is None, "something was committed"


async def test_who_finishes_nothing_is_stuck_but_not_while_it_is_held() -> None:
    world = World()
    world.consumer.be(position=10, committed=9)
    await world.window.submit(Event("a"))
    world.health.measure({PLACE: 10})
    assert world.later(70, end=10) is not None
    world.gate.hold("Postgres")
    assert world.later(1, end=10) is None
    assert world.later(1000, end=10) is None
    world.gate.release("Postgres")
    assert world.later(50, end=10) is None
    world.go.set()
    await asyncio.sleep(0.01)
    assert world.later(70, end=10) is None


async def test_readiness_names_what_is_missing() -> None:
    world = World()
    world.consumer.settled = False
    world.gate.hold("halted")
    ready = world.health.ready()
    assert ready["group"] == "joining, or rebalancing"
    assert ready["gate"] == "halted"
    assert ready["topics"] is not None


async def test_a_worker_waits_for_its_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("processors.health._RETRY_S", 0)
    world = World()
    waiting = asyncio.create_task(world.health.topics_exist())
    await asyncio.sleep(0.01)
    assert world.health.ready()["topics"] == "Kafka is unavailable"
    world.brokers.away = False
    await asyncio.sleep(0.01)
    assert world.health.ready()["topics"] == "topics that do not exist: blue-payment-commands"
    world.brokers.topics.add("blue-payment-commands")
    await asyncio.wait_for(waiting, 1)
    assert world.health.ready()["topics"] is None


async def test_kafka_being_away_makes_a_worker_not_ready_and_never_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("processors.health._POLL_S", 0)
    world = World()
    world.consumer.be(position=12, committed=12)
    watching = asyncio.create_task(world.health.watch())
    await asyncio.sleep(0.01)
    assert world.health.ready()["kafka"] == "Kafka is unavailable"
    world.now += 1000
    await asyncio.sleep(0.01)
    assert world.health.live() is None
    world.brokers.away = False
    await asyncio.sleep(0.01)
    assert world.health.ready()["kafka"] is None
    watching.cancel()


async def test_the_figures() -> None:
    world = World()
    world.consumer.be(position=10, committed=8)
    await world.window.submit(Event("a"))
    await world.window.submit(Event("a"))
    world.now += 3
    world.health.measure({PLACE: 12})
    figures: dict[str, Any] = {sample.name: (sample.labels, sample.value) for metric in world.health.collect() for sample in metric.samples}
    where = {"group": "payments", "topic": "payment-commands", "partition": "0"}
    assert figures["paystream_window_running"] == ({"group": "payments"}, 1)
    assert figures["paystream_window_queued"] == ({"group": "payments"}, 1)
    assert figures["paystream_window_held"] == ({"group": "payments"}, 0)
    assert figures["paystream_window_span"] == (where, 2)
    assert figures["paystream_oldest_unfinished_seconds"] == (where, 3)
    assert figures["paystream_consumer_lag_messages"] == (where, 4)
    assert figures["paystream_commit_age_seconds"] == (where, 1003)
    world.go.set()
    await asyncio.sleep(0.01)
