"""What is done about each kind of failure, for single messages and for batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog

from infra.database.delivery import Disposition, Fault, Group, Received
from processors.delivery import BUGS_WITHIN, BatchDelivery, Delivery, Failures, Halt, fault_of
from processors.keyed_window import Gate
from schemas.codec import Codec, headers
from schemas.errors import Rejected, Unavailable
from schemas.messages import Message, ResolveAttempt, derived_id

pytestmark = pytest.mark.unit

CODEC = Codec.unregistered()
GROUP = Group.PAYMENTS


class ParkingInMemory:
    """Parks in a list; is away for as many calls as it is told to."""

    def __init__(self) -> None:
        self.parked: list[tuple[Received, str | None, Fault]] = []
        self.away = 0
        self.halt: str | None = None
        self.asked: list[tuple[int, timedelta]] = []

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise Unavailable("Postgres")

    async def park(self, group: Group, received: Received, message_id: str | None, fault: Fault) -> None:
        self._answer()
        assert group is GROUP
        self.parked.append((received, message_id, fault))

    async def halt_after(self, group: Group, bugs: int, within: timedelta) -> str | None:
        self._answer()
        self.asked.append((bugs, within))
        return self.halt

    async def halted(self, group: Group) -> str | None:
        self._answer()
        return self.halt

    async def resume(self, group: Group, actor: str) -> bool:
        raise NotImplementedError

    async def forget(self, before: datetime) -> int:
        raise NotImplementedError

    async def parked_counts(self) -> dict[tuple[str, str], int]:
        return {(GROUP, fault.disposition): 1 for _, _, fault in self.parked}


class World:
    """A delivery with all that it touches, and sleeps that take no time but are counted."""

    def __init__(self, *outcomes: BaseException | None, wanted: frozenset[str] | None = None) -> None:
        self.gate, self.parking = Gate(), ParkingInMemory()
        self.sleeps: list[float] = []
        self.held_while_asleep: list[str | None] = []
        self.halt = Halt(GROUP, self.parking, self.gate, sleep=self.sleep)
        self.halt.see(None)
        self.failures = Failures(GROUP, self.parking, self.gate, self.halt, max_bugs=20, sleep=self.sleep)
        self.outcomes = deque(outcomes)
        self.handled: list[Message] = []
        self.bound: list[dict[str, Any]] = []
        self.delivery = Delivery(self.failures, CODEC, self.handle, wanted)

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.held_while_asleep.append(self.gate.held)
        await asyncio.sleep(0)

    async def handle(self, received: Received, message: Message) -> None:
        self.bound.append(structlog.contextvars.get_contextvars())
        if self.outcomes and (outcome := self.outcomes.popleft()) is not None:
            raise outcome
        self.handled.append(message)


def message(order_id: str = "order-1", number: int = 1) -> ResolveAttempt:
    return ResolveAttempt(
        event_id=derived_id(order_id, number),
        order_id=order_id,
        payment_id=derived_id(order_id),
        user_id="u1",
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
        correlation_id="corr-1",
        attempt=number,
    )


def record(body: Message | bytes | None = None, *, offset: int = 7, extra: Sequence[tuple[str, bytes]] = ()) -> Received:
    body = message() if body is None else body
    value, own = (body, ()) if isinstance(body, bytes) else (CODEC.encode(body), headers(body))
    return Received(topic="payment-commands", partition=2, offset=offset, timestamp_ms=1, key=b"order-1", value=value, headers=(*own, *extra))


async def test_a_message_is_decoded_and_handled() -> None:
    world = World()
    await world.delivery(record())
    assert world.handled == [message()]
    assert world.parking.parked == []


async def test_log_lines_of_a_handler_say_what_it_is_about() -> None:
    world = World()
    await world.delivery(record(extra=[("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]))
    (bound,) = world.bound
    wanted = {"order_id": "order-1", "payment_id": derived_id("order-1"), "event_id": derived_id("order-1", 1), "correlation_id": "corr-1"}
    assert wanted.items() <= bound.items()
    assert bound["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c")
    assert structlog.contextvars.get_contextvars() == {}


@pytest.mark.parametrize("body", [b"rubbish", b"", message()])
async def test_what_the_group_does_not_want_is_not_even_decoded(body: Message | bytes) -> None:
    world = World(wanted=frozenset({"PAYMENT_COMPLETED"}))
    await world.delivery(replace(record(body), headers=(("ce_type", b"ResolveAttempt"),)))
    assert world.handled == []
    assert world.parking.parked == []


async def test_what_does_not_say_its_type_is_decoded_to_see_it() -> None:
    world = World(wanted=frozenset({"PAYMENT_COMPLETED"}))
    await world.delivery(replace(record(), headers=()))
    assert world.handled == []
    world = World(wanted=frozenset({"ResolveAttempt"}))
    await world.delivery(replace(record(), headers=()))
    assert world.handled == [message()]


async def test_bytes_that_do_not_decode_are_parked_as_poison() -> None:
    world = World()
    received = record(b"rubbish")
    await world.delivery(received)
    ((parked, message_id, fault),) = world.parking.parked
    assert parked is received
    assert message_id is None
    assert (fault.disposition, fault.error_class, fault.stack) == (Disposition.POISON, "Rejected", None)
    assert world.parking.asked == [], "poison does not halt the group"


async def test_what_a_handler_rejects_is_poison_too() -> None:
    world = World(Rejected("an amount below zero"))
    await world.delivery(record())
    ((_, message_id, fault),) = world.parking.parked
    assert message_id == message().event_id
    assert (fault.disposition, fault.message) == (Disposition.POISON, "an amount below zero")


async def test_while_a_part_of_ours_is_away_the_gate_is_held_and_the_message_waits() -> None:
    world = World(*[Unavailable("Postgres")] * 8)
    await world.delivery(record())
    assert world.handled == [message()]
    assert world.parking.parked == []
    assert world.held_while_asleep == ["Postgres"] * 8
    assert world.gate.held is None
    assert all(0.1 <= wait <= 5.0 for wait in world.sleeps)
    assert world.sleeps[0] <= 0.2
    assert world.sleeps[-1] >= 2.5


async def test_a_bug_is_parked_with_its_stack() -> None:
    world = World(ZeroDivisionError("division by zero"))
    await world.delivery(record())
    ((_, _, fault),) = world.parking.parked
    assert (fault.disposition, fault.error_class, fault.message) == (Disposition.BUG, "ZeroDivisionError", "division by zero")
    assert fault.stack is not None
    assert "in handle" in fault.stack
    assert world.parking.asked == [(20, BUGS_WITHIN)]
    assert world.gate.held is None


async def test_a_cancellation_that_slips_out_of_a_handler_is_a_bug() -> None:
    world = World(asyncio.CancelledError())
    await world.delivery(record())
    ((_, _, fault),) = world.parking.parked
    assert (fault.disposition, fault.error_class) == (Disposition.BUG, "CancelledError")


async def test_a_delivery_that_is_cancelled_parks_nothing() -> None:
    world = World()
    started = asyncio.Event()

    async def wait(_: Received, __: Message) -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Delivery(world.failures, CODEC, wait)(record()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.parking.parked == []


async def test_parking_waits_for_postgres_too() -> None:
    world = World(ZeroDivisionError())
    world.parking.away = 3
    await world.delivery(record())
    assert len(world.parking.parked) == 1
    assert world.held_while_asleep == ["Postgres"] * 3
    assert world.gate.held is None


async def test_one_bug_too_many_halts_the_group_at_once() -> None:
    world = World(ZeroDivisionError())
    world.parking.halt = "20 bugs"
    await world.delivery(record())
    assert world.gate.held == "halted"
    assert world.halt.reason == "20 bugs"


async def watched(world: World, until: Callable[[], bool]) -> None:
    task = asyncio.create_task(world.halt.watch())
    async with asyncio.timeout(1):
        while not until():
            await asyncio.sleep(0)
    task.cancel()


async def test_a_halt_is_seen_by_all_workers_and_ends_when_the_group_is_resumed() -> None:
    world = World()
    world.parking.halt = "20 bugs"
    await watched(world, lambda: world.gate.held == "halted")
    world.parking.away = 5
    await watched(world, lambda: world.parking.away == 0)
    assert world.gate.held == "halted", "Postgres being away changes nothing"
    world.parking.halt = None
    await watched(world, lambda: world.gate.held is None)
    assert world.halt.reason is None


async def test_nothing_is_admitted_before_postgres_was_asked() -> None:
    gate = Gate()
    Halt(GROUP, ParkingInMemory(), gate)
    assert gate.held == "halted"


# ── Batches ──


def batches(world: World, handle: Callable[[Sequence[tuple[Received, Message]]], Awaitable[None]]) -> BatchDelivery:
    return BatchDelivery(world.failures, CODEC, handle, frozenset({"ResolveAttempt"}))


async def test_a_batch_is_handled_together() -> None:
    world = World()
    seen: list[list[int]] = []

    async def handle(batch: Sequence[tuple[Received, Message]]) -> None:
        seen.append([received.offset for received, _ in batch])

    skipped = replace(record(), headers=(("ce_type", b"SomethingElse"),))
    await batches(world, handle)([record(offset=1), skipped, record(offset=2), record(b"rubbish", offset=3), record(offset=4)])
    assert seen == [[1, 2], [4]], "what is before poison is applied before it is parked"
    assert [received.offset for received, _, _ in world.parking.parked] == [3]


async def test_a_batch_waits_for_postgres_as_a_whole() -> None:
    world, tries = World(), deque([Unavailable("Postgres"), None])

    async def handle(_: Sequence[tuple[Received, Message]]) -> None:
        if (error := tries.popleft()) is not None:
            raise error

    await batches(world, handle)([record(), record()])
    assert world.held_while_asleep == ["Postgres"]
    assert world.parking.parked == []


async def test_of_a_batch_that_fails_only_who_failed_is_parked() -> None:
    world = World()
    done: list[str | None] = []

    async def handle(batch: Sequence[tuple[Received, Message]]) -> None:
        if any(message.order_id == "order-bad" for _, message in batch):
            raise ZeroDivisionError
        done.extend(message.order_id for _, message in batch)

    await batches(world, handle)([record(message(name)) for name in ("order-a", "order-bad", "order-b")])
    assert done == ["order-a", "order-b"]
    ((_, message_id, fault),) = world.parking.parked
    assert (message_id, fault.disposition) == (derived_id("order-bad", 1), Disposition.BUG)


async def test_a_batch_of_nothing_wanted_is_not_handled() -> None:
    world = World()

    async def handle(_: Sequence[tuple[Received, Message]]) -> None:
        pytest.fail("nothing to handle")

    await batches(world, handle)([replace(record(), headers=(("ce_type", b"SomethingElse"),))])


# ── What is kept of an exception ──


def test_a_fault_holds_no_secret_and_is_not_too_long() -> None:
    try:
        raise ValueError("pay with 4242 4242 4242 4242 and sk_test_abcdefgh at https://me:hunter2@host/ \0" + "x" * 5000)
    except ValueError as error:
        fault = fault_of(error)
    assert fault.stack is not None
    for text in (fault.message, fault.stack):
        assert "4242 4242" not in text
        assert "abcdefgh" not in text
        assert "hunter2" not in text
        assert "\0" not in text
    assert len(fault.message.encode()) <= 1024
    assert len(fault.stack.encode()) <= 4096


def test_an_exception_that_can_not_even_be_printed_makes_a_fault() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert fault_of(Broken()).error_class.endswith("Broken")
    assert fault_of(ValueError("\ud800")).message.encode() == b"?"
