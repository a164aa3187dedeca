"""How a worker is doing: its lag, whether it gets on, whether it can take work, and the metrics that say so.

Rule: a worker is stuck (`/livez`) only if there is work, nothing holds it, and yet nothing was finished and nothing was committed for a long time; a
dependency that is away makes it not ready, never stuck. Lag is measured up to the last stable offset, by a client of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infra.kafka_offsets import EndOffsets
from infra.settings import Settings
from processors.keyed_window import Gate, KeyedWindow
from schemas.errors import Unavailable

log = structlog.get_logger()

_POLL_S: Final = 3.0
_RETRY_S: Final = 1.0
_SHORTEST_STALL_S: Final = 60.0

Place = tuple[str, int]
"""A topic, by the brokers' name, and a partition."""


class Standing(Protocol):
    """How far a partition is: the offset that is read next, the committed one, and when it was committed (or the partition assigned)."""

    @property
    def position(self) -> int | None: ...
    @property
    def committed(self) -> int | None: ...
    @property
    def committed_at(self) -> float: ...


class Consumer(Protocol):
    """What is asked of the consumer."""

    @property
    def settled(self) -> bool: ...
    def standing(self) -> Mapping[Place, Standing]: ...


class Health(Collector):
    """Answers the probes, and is a Prometheus collector, so that figures are taken when somebody asks and cost nothing per message."""

    def __init__(
        self,
        settings: Settings,
        group: str,
        topics: Sequence[str],
        window: KeyedWindow[Any],
        gate: Gate,
        consumer: Callable[[], Consumer | None],
        brokers: EndOffsets,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._window, self._gate, self._monotonic = group, window, gate, monotonic
        self._consumer, self._brokers = consumer, brokers
        self._prefix = settings.prefix
        self._topics = [settings.prefix + topic for topic in topics]
        self._stall_s = max(_SHORTEST_STALL_S, 3 * settings.worker.handler_budget_s)
        self._ends: Mapping[Place, int] = {}
        self._progress: tuple[int, int] = (0, 0)
        self._progressed_at = monotonic()
        self._kafka: str | None = None
        self._waiting_for: str | None = "its topics"

    async def topics_exist(self) -> None:
        """Until all topics are there: Faust would subscribe to those that are, and never look again."""
        while True:
            try:
                missing = await self._brokers.missing(self._topics)
            except Unavailable as error:
                self._waiting_for = str(error)
            else:
                if not missing:
                    self._waiting_for = None
                    return
                self._waiting_for = f"topics that do not exist: {', '.join(missing)}"
            log.warning("waiting", waiting_for=self._waiting_for)
            await asyncio.sleep(_RETRY_S)

    async def watch(self) -> NoReturn:
        """Measure lag and progress, for ever."""
        while True:
            try:
                self.measure(await self._brokers.of(self._standing()))
                self._kafka = None
            except Unavailable as error:
                self.measure(self._ends)
                self._kafka = str(error)
            await asyncio.sleep(_POLL_S)

    def measure(self, ends: Mapping[Place, int]) -> None:
        """Take the ends of partitions, and compare with the last time."""
        self._ends = ends
        progress = (self._window.finished, sum(standing.committed or 0 for standing in self._standing().values()))
        if progress != self._progress or self._gate.held or not self._work():
            self._progress, self._progressed_at = progress, self._monotonic()

    def live(self) -> str | None:
        """What is stuck, None if nothing is."""
        still = self._monotonic() - self._progressed_at
        return f"{self._work()} to do, and nothing was finished or committed for {still:.0f} s" if still > self._stall_s else None

    def ready(self) -> dict[str, str | None]:
        """What keeps the worker from taking work."""
        consumer = self._consumer()
        joined = consumer is not None and consumer.settled
        group = None if joined else "joining, or rebalancing"
        return {"kafka": self._kafka, "topics": self._waiting_for, "group": group, "gate": self._gate.held}

    def _standing(self) -> Mapping[Place, Standing]:
        consumer = self._consumer()
        return consumer.standing() if consumer is not None else {}

    def _work(self) -> str | None:
        """Is there anything to do: unread messages, or unfinished ones? What lies behind the position (markers, aborted records) is nothing to do."""
        unread = sum(max(0, self._ends.get(place, 0) - (at.position or 0)) for place, at in self._standing().items() if at.position is not None)
        unfinished = sum(length for _, length, _ in self._window.spans())
        return f"{unread} unread and {unfinished} unfinished messages" if unread or unfinished else None

    # ── Metrics ──

    @staticmethod
    def describe() -> list[Metric]:
        """The families that `collect` fills in."""
        return [_family(name) for name in _FAMILIES]

    def collect(self) -> Iterator[Metric]:
        standing, now = self._standing(), self._monotonic()
        spans = {place: (length, age) for place, length, age in self._window.spans()}
        values: Mapping[str, Mapping[Any, float]] = {
            "paystream_window_running": {(): self._window.running},
            "paystream_window_queued": {(): self._window.queued},
            "paystream_window_held": {(): self._gate.held is not None},
            "paystream_window_span": {place: spans.get(place, (0, 0))[0] for place in standing},
            "paystream_oldest_unfinished_seconds": {place: spans.get(place, (0, 0))[1] for place in standing},
            "paystream_consumer_lag_messages": {
                place: max(0, self._ends[place] - (at.committed or 0)) for place, at in standing.items() if place in self._ends
            },
            "paystream_commit_age_seconds": {place: now - at.committed_at for place, at in standing.items()},
        }
        for name, by_place in values.items():
            family = _family(name)
            for place, value in by_place.items():
                family.add_metric([self._group, *self._labels(place)], value)
            yield family

    def _labels(self, place: Any) -> list[str]:
        return [place[0].removeprefix(self._prefix), str(place[1])] if place else []


_GROUP: Final = ("group",)
_PARTITION: Final = ("group", "topic", "partition")
_FAMILIES: Final = {
    "paystream_window_running": ("Messages that run", _GROUP),
    "paystream_window_queued": ("Messages that wait for another one of their key", _GROUP),
    "paystream_window_held": ("1 while nothing new is started", _GROUP),
    "paystream_window_span": ("Messages from the oldest unfinished to the newest", _PARTITION),
    "paystream_oldest_unfinished_seconds": ("Age of the oldest unfinished message, since it was read", _PARTITION),
    "paystream_consumer_lag_messages": ("Offsets between what is committed and the last stable one", _PARTITION),
    "paystream_commit_age_seconds": ("Since the last commit", _PARTITION),
}


def _family(name: str) -> GaugeMetricFamily:
    about, labels = _FAMILIES[name]
    return GaugeMetricFamily(name, about, labels=labels)
