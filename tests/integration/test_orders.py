"""The orders group on Postgres, from a record's bytes to the events in the outbox: histories, repeats, poison, crashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from infra.clock import SetClock
from infra.crash_points import plugged
from infra.database.delivery import Group, Received
from infra.database.facts import headers_of
from infra.database.orders import PostgresOrderStore
from infra.database.parking import PostgresParking
from infra.database.pool import Pool, connection, opened_pool
from infra.settings import Settings
from processors.delivery import BatchDelivery, Failures, Halt
from processors.keyed_window import Gate
from processors.orders.handler import Deps, handle_batch
from processors.orders.machine import WANTED, evolve
from schemas.codec import Codec, headers
from schemas.messages import Event, OrderEvent, PaymentCompleted
from schemas.topics import destinations
from tests.processors import payment_events as say
from tests.processors.payment_events import NOW, ORDER_ID, histories, interleaved, received

pytestmark = pytest.mark.integration

CODEC = Codec.unregistered()

Deliver = Callable[..., Awaitable[None]]


@pytest.fixture
async def pool(database: Settings) -> AsyncIterator[Pool]:
    async with opened_pool(database.database, "test") as opened:
        yield opened


@pytest.fixture
def deliver(pool: Pool) -> Deliver:
    clock, gate, parking = SetClock(NOW), Gate(), PostgresParking(pool, SetClock(NOW))
    deps = Deps(store=PostgresOrderStore(pool, CODEC, destinations, clock), clock=clock)
    failures = Failures(Group.ORDERS, parking, gate, Halt(Group.ORDERS, parking, gate), max_bugs=20)
    together = BatchDelivery(failures, CODEC, lambda batch: handle_batch(batch, deps), WANTED)
    return lambda *records: together(records)


def records(events: Iterable[Event], first_offset: int = 0) -> list[Received]:
    return [replace(record, value=CODEC.encode(event), headers=headers(event)) for record, event in received(events, first_offset)]  # type: ignore[arg-type]


async def rows(pool: Pool, query: str) -> list[Any]:
    async with connection(pool) as conn:
        return await (await conn.execute(query.encode())).fetchall()


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_each_order_is_what_its_events_say_and_is_paid_if_its_payment_is(deliver: Deliver, pool: Pool, size: int) -> None:
    streams = histories()
    everything = records(interleaved(streams))
    for first in range(0, len(everything), size):
        await deliver(*everything[first : first + size])
    kept = {order: (status, version) for order, status, version in await rows(pool, "SELECT order_id, status, version FROM orders")}
    folded: dict[str, Any] = {}
    for value, names in await rows(pool, "SELECT value, headers FROM outbox ORDER BY seq"):
        event = CODEC.decode(value)
        assert isinstance(event, OrderEvent)
        assert dict(headers_of(names))["ce_type"].decode() == event.event_type
        folded[event.order_id] = evolve(folded.get(event.order_id), event)
    assert {order_id: (order.status, order.version) for order_id, order in folded.items()} == kept
    for events in streams:
        paid, cancelled_first = isinstance(events[-1], PaymentCompleted), any(event.event_type == "PAYMENT_CANCELLED" for event in events)
        assert (kept[events[0].order_id][0] == "PENDING") is (paid and not cancelled_first)
    assert await rows(pool, "SELECT count(*) FROM parked_messages") == [(0,)]


async def test_a_replay_changes_nothing_and_says_nothing(deliver: Deliver, pool: Pool) -> None:
    everything = "SELECT (SELECT array_agg(o ORDER BY order_id) FROM orders o)::text, (SELECT count(*) FROM outbox), (SELECT count(*) FROM events)"
    batch = records(interleaved(histories()))
    for record in batch:
        await deliver(record)
    once = await rows(pool, everything)
    for record in batch:
        await deliver(record)
    assert await rows(pool, everything) == once


async def test_the_same_record_twice_at_once_is_applied_once(deliver: Deliver, pool: Pool) -> None:
    """As when the worker before has not finished what the new one reads again."""
    for record in records([say.initiated(), say.processing(), say.completed()]):
        await asyncio.gather(*(deliver(record) for _ in range(5)))
    assert await rows(pool, "SELECT event_type FROM events ORDER BY version") == [("ORDER_PLACED",), ("ORDER_CREATED",)]


async def test_a_crash_after_the_commit_is_made_good_by_the_same_record_again(deliver: Deliver, pool: Pool) -> None:
    class Crash(BaseException):
        pass

    async def crash(point: str) -> None:
        raise Crash(point)

    for record in records([say.initiated(), say.failed(3), say.processing(4, attempt=2), say.completed(5, attempt=2)]):
        with plugged(crash), pytest.raises(Crash, match=r"orders\.after_record"):
            await deliver(record)
        await deliver(record)
    assert await rows(pool, "SELECT version, event_type FROM events ORDER BY version") == [
        (1, "ORDER_PLACED"),
        (2, "ORDER_STATUS_CHANGED"),
        (3, "ORDER_STATUS_CHANGED"),
        (4, "ORDER_CREATED"),
    ]


async def test_poison_parks_its_order_and_no_other(deliver: Deliver, pool: Pool) -> None:
    broken, whole = records([say.initiated(), say.completed()]), records(histories()[0], first_offset=10)
    broken[0] = replace(broken[0], value=b"\x00\x00\x00\x00\x01 not Avro")
    for _ in range(2):
        for record in (*broken, *whole):
            await deliver(record)
    assert await rows(pool, "SELECT order_key, disposition FROM parked_messages ORDER BY id") == [(ORDER_ID, "poison"), (ORDER_ID, "blocked")]
    assert await rows(pool, "SELECT order_id FROM orders") == [(whole[0].order_key,)]


async def test_what_comes_before_poison_in_a_batch_is_applied_and_what_comes_after_waits(deliver: Deliver, pool: Pool) -> None:
    first, poison, last = records([say.initiated(), say.failed(3), say.processing(4, attempt=2)])
    await deliver(first, replace(poison, value=b"\x00\x00\x00\x00\x01 not Avro"), last)
    assert await rows(pool, 'SELECT "offset", disposition FROM parked_messages ORDER BY id') == [(1, "poison"), (2, "blocked")]
    assert await rows(pool, "SELECT status FROM orders") == [("PAYMENT_PENDING",)]


async def test_types_that_move_no_order_are_not_even_looked_at(deliver: Deliver, pool: Pool) -> None:
    (record,) = records([say.authorized(1)])
    await deliver(replace(record, value=b"not looked at"))
    assert await rows(pool, "SELECT (SELECT count(*) FROM parked_messages), (SELECT count(*) FROM stream_positions)") == [(0, 0)]
