"""The window's promises: order per key, acknowledgements of finished prefixes only, its bounds, its gate, giving back, and that it forgets."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.keyed_window import Gate, KeyedWindow

pytestmark = pytest.mark.unit


@dataclass(eq=False)
class Event:
    key: str | None
    offset: int
    partition: int = 0
    stale: bool = False
    acked: list[tuple[int, int]] = field(default_factory=list)

    def ack(self) -> None:
        self.acked.append((self.partition, self.offset))


class Handler:
    """Messages run until they are let go."""

    def __init__(self) -> None:
        self.gates: dict[tuple[int, int], asyncio.Event] = defaultdict(asyncio.Event)
        self.running: list[Event] = []
        self.handled: list[Event] = []
        self.most = 0

    async def __call__(self, events: Sequence[Event]) -> None:
        self.running += events
        self.most = max(self.most, len(self.running))
        for event in events:
            await self.gates[event.partition, event.offset].wait()
            self.running.remove(event)
            self.handled.append(event)

    def let_go(self, *events: Event) -> None:
        for event in events:
            self.gates[event.partition, event.offset].set()


def none_escapes(error: BaseException) -> None:
    raise AssertionError from error


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def window_of(handler: Handler, gate: Gate | None = None, slots: int = 1000, span: int = 5000) -> KeyedWindow[Event]:
    return KeyedWindow(handler, gate=gate or Gate(), slots=slots, span=span, escaped=none_escapes)


def events(*keys: str | None, partition: int = 0) -> list[Event]:
    acked: list[tuple[int, int]] = []
    return [Event(key, offset, partition, acked=acked) for offset, key in enumerate(keys)]


async def submit_all(window: KeyedWindow[Event], messages: Sequence[Event]) -> None:
    async with asyncio.timeout(1):
        for event in messages:
            await window.submit(event)
    await settle()


async def test_keys_run_side_by_side_and_each_in_order() -> None:
    handler = Handler()
    window = window_of(handler)
    a0, b1, a2 = messages = events("a", "b", "a")
    await submit_all(window, messages)
    assert handler.running == [a0, b1]
    assert (window.running, window.queued) == (2, 1)
    handler.let_go(a0)
    await settle()
    assert handler.running == [b1, a2]


async def test_only_the_finished_prefix_is_acknowledged_in_offset_order() -> None:
    handler = Handler()
    window = window_of(handler)
    a, b, c = messages = events("a", "b", "c")
    await submit_all(window, messages)
    handler.let_go(c, b)
    await settle()
    assert a.acked == []
    assert next(window.spans())[:2] == (0, 3)
    handler.let_go(a)
    await settle()
    assert a.acked == [(0, 0), (0, 1), (0, 2)]


async def test_partitions_do_not_wait_for_each_other() -> None:
    handler = Handler()
    window = window_of(handler)
    slow, other = Event("a", 0, partition=0), Event("b", 7, partition=1)
    await submit_all(window, [slow, other])
    handler.let_go(other)
    await settle()
    assert other.acked == [(1, 7)]
    assert slow.acked == []


async def test_a_queued_message_holds_no_slot() -> None:
    handler = Handler()
    window = window_of(handler, slots=2)
    messages = events("hot", "hot", "hot", "hot", "cold")
    await submit_all(window, messages)
    assert handler.running == [messages[0], messages[4]]


async def test_no_more_than_the_slots_run() -> None:
    handler = Handler()
    window = window_of(handler, slots=2)
    a, b, c = events("a", "b", "c")
    await submit_all(window, [a, b])
    waiting = asyncio.create_task(window.submit(c))
    await settle()
    assert not waiting.done()
    handler.let_go(b)
    await settle()
    assert waiting.done()
    assert handler.running == [a, c]


async def test_the_span_bounds_what_piles_up_behind_a_slow_message() -> None:
    handler = Handler()
    window = window_of(handler, span=3)
    slow, *others = events("slow", "b", "c", "d")
    await submit_all(window, [slow, *others[:2]])
    handler.let_go(*others)
    await settle()
    waiting = asyncio.create_task(window.submit(others[2]))
    await settle()
    assert not waiting.done(), "two finished messages and the slow one fill the span"
    handler.let_go(slow)
    await settle()
    assert waiting.done()
    assert len(slow.acked) == 4


async def test_messages_without_a_key_are_not_ordered() -> None:
    handler = Handler()
    window = window_of(handler)
    messages = events(None, None, None)
    await submit_all(window, messages)
    assert handler.running == messages


async def test_what_has_queued_up_is_handled_together_when_the_handler_takes_batches() -> None:
    batches: list[list[int]] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[Event]) -> None:
        batches.append([event.offset for event in batch])
        await go.wait()

    window: KeyedWindow[Event] = KeyedWindow(handle, gate=Gate(), slots=1, span=100, batch=3, escaped=none_escapes)
    messages = events(*["all"] * 8)
    await submit_all(window, messages)
    go.set()
    await settle()
    assert batches == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert [offset for _, offset in messages[0].acked] == list(range(8))


async def test_a_held_gate_starts_nothing_and_goes_on_when_the_last_hold_is_released() -> None:
    handler, gate = Handler(), Gate()
    window = window_of(handler, gate)
    a0, a1, b = events("a", "a", "b")
    await submit_all(window, [a0, a1])
    gate.hold("Postgres")
    gate.hold("Postgres")
    gate.hold("halted")
    waiting = asyncio.create_task(window.submit(b))
    handler.let_go(a0)
    await settle()
    assert handler.running == []
    assert gate.held == "Postgres, halted"
    gate.release("Postgres")
    gate.release("halted")
    await settle()
    assert handler.running == []
    assert gate.held == "Postgres"
    gate.release("Postgres")
    await settle()
    assert waiting.done()
    assert set(map(id, handler.running)) == {id(a1), id(b)}
    assert gate.held is None


async def test_draining_finishes_what_runs_and_drops_what_is_queued() -> None:
    handler = Handler()
    window = window_of(handler)
    a0, a1, b = messages = events("a", "a", "b")
    await submit_all(window, messages)
    for event in messages:
        event.stale = True
    draining = asyncio.create_task(window.drain([0], within=5))
    await settle()
    assert not draining.done()
    handler.let_go(*messages)
    assert await draining == []
    await settle()
    assert handler.handled == [a0, b]
    assert a0.acked == [(0, 0)], "the dropped message stops the prefix: the next owner gets it and all behind it"
    assert list(window.spans()) == []
    assert (window.running, window.queued) == (0, 0)
    assert a1 not in handler.handled


async def test_draining_leaves_other_partitions_alone() -> None:
    handler = Handler()
    window = window_of(handler)
    given, kept, queued = Event("a", 0, partition=0, stale=True), Event("b", 0, partition=1), Event("b", 1, partition=1)
    given.stale = False
    await submit_all(window, [given, kept, queued])
    given.stale = True
    handler.let_go(given)
    assert await window.drain([0], within=5) == []
    handler.let_go(kept, queued)
    await settle()
    assert handler.handled == [given, kept, queued]


async def test_what_outlives_the_drain_is_never_acknowledged_and_keeps_its_keys_place() -> None:
    handler = Handler()
    window = window_of(handler)
    (old,) = events("a")
    await submit_all(window, [old])
    old.stale = True
    assert await window.drain([0], within=0.01) == [old]
    again = Event("a", 0)
    await submit_all(window, [again])
    assert handler.running == [old], "the same message, read again, waits for the run that was left behind"
    handler.let_go(old)
    await settle()
    assert handler.handled == [old, again], "both have the same offset, so one permission lets both go"
    assert old.acked == []
    assert again.acked == [(0, 0)]


async def test_a_message_that_waits_for_room_is_dropped_when_its_partition_is_given_back() -> None:
    handler = Handler()
    window = window_of(handler, slots=1)
    a, b = events("a", "b")
    await submit_all(window, [a])
    waiting = asyncio.create_task(window.submit(b))
    await settle()
    a.stale = b.stale = True
    handler.let_go(a)
    await window.drain([0], within=5)
    await waiting
    await settle()
    assert handler.handled == [a]


async def test_a_held_window_can_be_drained() -> None:
    handler, gate = Handler(), Gate()
    window = window_of(handler, gate)
    a0, a1 = messages = events("a", "a")
    await submit_all(window, messages)
    gate.hold("Postgres")
    a0.stale = a1.stale = True
    assert await window.drain([0], within=0.01) == [a0]
    handler.let_go(a0, a1)
    gate.release("Postgres")
    await settle()
    assert handler.handled == [a0]


async def test_an_escaped_exception_is_reported_and_never_acknowledged() -> None:
    escaped: list[BaseException] = []

    async def broken(_: Sequence[Event]) -> None:
        raise ZeroDivisionError

    window: KeyedWindow[Event] = KeyedWindow(broken, gate=Gate(), slots=1, span=1, escaped=escaped.append)
    (event,) = events("a")
    await submit_all(window, [event])
    assert [type(error) for error in escaped] == [ZeroDivisionError]
    assert event.acked == []


async def test_the_age_of_the_oldest_unfinished_message() -> None:
    now = 10.0
    handler = Handler()
    window: KeyedWindow[Event] = KeyedWindow(handler, gate=Gate(), slots=9, span=9, monotonic=lambda: now, escaped=none_escapes)
    a, b = events("a", "b")
    await submit_all(window, [a])
    now = 14.0
    await submit_all(window, [b])
    assert list(window.spans()) == [(0, 2, 4.0)]
    handler.let_go(a, b)
    await settle()


async def test_nothing_is_kept_of_what_is_finished() -> None:
    async def handle(_: Sequence[Event]) -> None:
        await asyncio.sleep(0)

    window: KeyedWindow[Event] = KeyedWindow(handle, gate=Gate(), slots=50, span=500, escaped=none_escapes)
    for offset in range(3000):
        await window.submit(Event(f"key-{offset % 700}", offset, partition=offset % 3))
    async with asyncio.timeout(5):
        while window.running:
            await asyncio.sleep(0)
    gc.collect()
    assert window.finished == 3000
    assert not any(isinstance(thing, Event) for thing in gc.get_objects())


keys = st.sampled_from(["a", "b", "c", "d", None])


@settings(deadline=None, max_examples=150)
@given(
    messages=st.lists(st.tuples(keys, st.integers(0, 2)), max_size=40),
    slots=st.integers(1, 5),
    span=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
async def test_any_interleaving_keeps_the_promises(messages: list[tuple[str | None, int]], slots: int, span: int, seed: int) -> None:
    dice = random.Random(seed)
    running: set[Event] = set()
    handled: list[Event] = []
    acked: list[tuple[int, int]] = []

    async def handle(batch: Sequence[Event]) -> None:
        (event,) = batch
        assert event.key is None or event.key not in {other.key for other in running}
        running.add(event)
        assert len(running) <= slots
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)
        running.remove(event)
        handled.append(event)

    window: KeyedWindow[Event] = KeyedWindow(handle, gate=Gate(), slots=slots, span=span, escaped=none_escapes)
    sent: list[Event] = []
    for offset, (key, partition) in enumerate(messages):
        event = Event(key, offset, partition, acked=acked)
        async with asyncio.timeout(5):
            await window.submit(event)
        sent.append(event)
        assert all(length <= span for _, length, _ in window.spans())
        done = {(one.partition, one.offset) for one in handled}
        assert set(acked) <= done
    async with asyncio.timeout(5):
        while window.running:
            await asyncio.sleep(0)
    for key in {event.key for event in sent} - {None}:
        assert [e.offset for e in handled if e.key == key] == [e.offset for e in sent if e.key == key]
    for partition in range(3):
        assert [offset for p, offset in acked if p == partition] == [e.offset for e in sent if e.partition == partition]


@settings(deadline=None, max_examples=150)
@given(messages=st.lists(st.tuples(keys, st.integers(0, 1)), max_size=30), after=st.integers(0, 30), seed=st.integers(0, 2**32))
async def test_draining_at_any_moment_acknowledges_nothing_that_was_not_handled(
    messages: list[tuple[str | None, int]], after: int, seed: int
) -> None:
    dice = random.Random(seed)
    handled: set[tuple[int, int]] = set()
    acked: list[tuple[int, int]] = []

    async def handle(batch: Sequence[Event]) -> None:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        handled.update((event.partition, event.offset) for event in batch)

    window: KeyedWindow[Event] = KeyedWindow(handle, gate=Gate(), slots=3, span=20, escaped=none_escapes)
    sent: list[Event] = []
    for offset, (key, partition) in enumerate(messages):
        if offset == after:
            for event in sent:
                event.stale = event.stale or event.partition == 0
            assert await window.drain([0], within=5) == []
            assert all(name != 0 for name, _, _ in window.spans())
        sent.append(Event(key, offset, partition, acked=acked))
        await window.submit(sent[-1])
    async with asyncio.timeout(5):
        while window.running:
            await asyncio.sleep(0)
    assert set(acked) <= handled
    for partition in (0, 1):
        offsets = [offset for p, offset in acked if p == partition]
        assert offsets == sorted(offsets)
        fresh = [e.offset for e in sent if e.partition == partition and not e.stale]
        assert offsets[-len(fresh) :] == fresh if fresh else True
