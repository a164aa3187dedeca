"""The keyed window: many messages at once, one for each order, acknowledged in offset order.

Rule: messages of one key run one after the other, in the order in which they were admitted; messages of different keys run side by side, up to
`slots` of them. A message that waits for its key holds no slot. A partition acknowledges only its finished prefix, so that nothing unfinished is ever
behind a committed offset, and at most `span` of its messages are between the oldest unfinished one and the newest.
Flow: agent -> submit -> (wait for the gate, for room, for a slot) -> handle -> acknowledge the finished prefix.

`handle` must not raise: what it can't cope with ends the process, because a message that nobody finishes would silently stop its partition for good.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import structlog

from infra.telemetry import end_process

log = structlog.get_logger()


class WindowEvent(Protocol):
    """A message on its way through the window."""

    @property
    def key(self) -> Hashable | None:
        """What the message has to keep its order with. None: with nothing."""
        ...

    @property
    def partition(self) -> Hashable:
        """Where its offset counts."""
        ...

    @property
    def stale(self) -> bool:
        """Was its partition given back since it was read? It is another worker's now."""
        ...

    def ack(self) -> object:
        """It, and all before it on its partition, is finished."""
        ...


E = TypeVar("E", bound=WindowEvent)


class Gate:
    """Whether anything new may be started. It may be held for several reasons at once, and for one of them several times."""

    def __init__(self) -> None:
        self._holds: Counter[str] = Counter()
        self._open = asyncio.Event()
        self._open.set()

    def hold(self, reason: str) -> None:
        """Start nothing new until this reason is released as often as it was given. What runs goes on."""
        if not self._holds[reason]:
            log.warning("held", reason=reason)
        self._holds[reason] += 1
        self._open.clear()

    def release(self, reason: str) -> None:
        self._holds[reason] -= 1
        if self._holds[reason] <= 0:
            del self._holds[reason]
            log.warning("released", reason=reason)
        if not self._holds:
            self._open.set()

    @property
    def held(self) -> str | None:
        """Why nothing is started, None if it is open."""
        return ", ".join(sorted(self._holds)) if self._holds else None

    async def opened(self) -> None:
        """Until it is open."""
        await self._open.wait()


class _Entry(Generic[E]):
    __slots__ = ("admitted_at", "done", "event", "partition", "running")

    def __init__(self, event: E, partition: _Partition[E], admitted_at: float) -> None:
        self.event, self.partition, self.admitted_at = event, partition, admitted_at
        self.running = self.done = False

    def start(self) -> None:
        self.running = True
        self.partition.running += 1

    def finish(self) -> None:
        self.running, self.done = False, True
        self.partition.running -= 1


class _Partition(Generic[E]):
    """What was admitted from a partition and is not acknowledged yet, in offset order."""

    __slots__ = ("closed", "entries", "running")

    def __init__(self) -> None:
        self.entries: deque[_Entry[E]] = deque()
        self.running = 0
        self.closed = False

    def acknowledge(self) -> None:
        while self.entries and self.entries[0].done and not self.closed:
            self.entries.popleft().event.ack()


class KeyedWindow(Generic[E]):
    """Runs `handle` for what is submitted, within the bounds.

    `slots` is how many keys may run at once; `span` bounds what a partition may pile up, queued and finished messages included; `batch` is how many
    messages of one key are handled by one call (1: one after the other; more: for a handler that takes them together).
    """

    def __init__(
        self,
        handle: Callable[[Sequence[E]], Awaitable[object]],
        *,
        gate: Gate,
        slots: int,
        span: int,
        batch: int = 1,
        escaped: Callable[[BaseException], object] = end_process,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle, self._gate, self._slots, self._span, self._batch = handle, gate, slots, span, batch
        self._escaped, self._monotonic = escaped, monotonic
        self._lanes: dict[Hashable, deque[_Entry[E]]] = {}
        self._partitions: dict[Hashable, _Partition[E]] = {}
        self._tasks: set[asyncio.Task[None] | None] = set()
        self._changed = asyncio.Event()
        self.finished = 0
        """How many messages were handled since the start."""

    # ── Admission ──

    async def submit(self, event: E) -> None:
        """Admit a message, as soon as the gate is open and there is room; it runs later. A stale one is dropped."""
        while not event.stale:
            if self._gate.held:
                await self._gate.opened()
            elif self._has_room(event):
                self._admit(event)
                return
            else:
                await self._change()

    def _has_room(self, event: E) -> bool:
        partition = self._partitions.get(event.partition)
        if partition is not None and len(partition.entries) >= self._span:
            return False
        return len(self._tasks) < self._slots or (event.key is not None and event.key in self._lanes)

    def _admit(self, event: E) -> None:
        partition = self._partitions.get(event.partition)
        if partition is None:
            partition = self._partitions[event.partition] = _Partition()
        entry = _Entry(event, partition, self._monotonic())
        partition.entries.append(entry)
        lane = self._lanes.get(event.key) if event.key is not None else None
        if lane is not None:
            lane.append(entry)
            return
        lane = deque()
        if event.key is not None:
            self._lanes[event.key] = lane
        entry.start()
        self._tasks.add(asyncio.create_task(self._run(event.key, lane, entry)))

    async def _run(self, key: Hashable | None, lane: deque[_Entry[E]], first: _Entry[E]) -> None:
        """Handle a message, and what has queued up behind it by then: this is one slot."""
        entries = [first]
        try:
            while entries:
                await self._handle([entry.event for entry in entries])
                self._finish(entries)
                if lane and self._gate.held:
                    await self._gate.opened()
                entries = [lane.popleft() for _ in range(min(self._batch, len(lane)))]
                for entry in entries:
                    entry.start()
        except BaseException as error:
            self._escaped(error)
        finally:
            if key is not None:
                del self._lanes[key]
            self._tasks.discard(asyncio.current_task())
            self._changed.set()

    def _finish(self, entries: list[_Entry[E]]) -> None:
        self.finished += len(entries)
        for entry in entries:
            entry.finish()
        for entry in entries:
            entry.partition.acknowledge()
            if not entry.partition.entries and self._partitions.get(entry.event.partition) is entry.partition:
                del self._partitions[entry.event.partition]
        self._changed.set()

    async def _change(self) -> None:
        """Until something has finished or was given back."""
        self._changed.clear()
        await self._changed.wait()

    # ── Giving back ──

    async def drain(self, partitions: Collection[Hashable], within: float) -> list[E]:
        """Give the partitions back: drop what is queued, finish what runs (for `within` seconds), then acknowledge nothing of them any more.

        Their events have to be stale by now, so that none is admitted again. Returns what could not finish in time: it goes on running, keeps its
        key's place, and is not acknowledged.
        """
        given_back = [self._partitions.pop(partition) for partition in partitions if partition in self._partitions]
        for lane in self._lanes.values():
            kept = [entry for entry in lane if entry.partition not in given_back]
            lane.clear()
            lane.extend(kept)
        self._changed.set()
        try:
            async with asyncio.timeout(within):
                while any(partition.running for partition in given_back):
                    await self._change()
        except TimeoutError:
            pass
        for partition in given_back:
            partition.closed = True
        return [entry.event for partition in given_back for entry in partition.entries if entry.running]

    # ── What can be seen from outside ──

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return len(self._tasks)

    @property
    def queued(self) -> int:
        """How many messages wait for another one of their key."""
        return sum(len(lane) for lane in self._lanes.values())

    def spans(self) -> Iterator[tuple[Hashable, int, float]]:
        """Each partition with unfinished messages: how many it has from the oldest of them to the newest, and the oldest one's age in seconds."""
        now = self._monotonic()
        for name, partition in self._partitions.items():
            yield name, len(partition.entries), now - partition.entries[0].admitted_at
