"""What an order store promises, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from infra.clock import SetClock
from infra.database.delivery import Disposition, Fault, Group, Received
from infra.database.facts import headers_of
from infra.database.memory import MemoryOrderStore
from infra.database.orders import OrderStore, OrderTransaction, PostgresOrderStore
from infra.database.parking import PostgresParking
from infra.database.pool import Pool, connection, opened_pool
from infra.settings import Database, Settings
from processors.orders.machine import evolve, react
from schemas.codec import Codec
from schemas.errors import Unavailable
from schemas.messages import PaymentEvent
from schemas.state import Order, OrderStatus
from schemas.topics import destinations
from tests.processors.payment_events import NOW, ORDER_ID, PAYMENT_ID, cancelled, completed, failed, initiated, processing

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RECEIVED = Received(
    topic="payment-events",
    partition=0,
    offset=7,
    timestamp_ms=1,
    key=ORDER_ID.encode(),
    value=b"\x00",
    headers=(("ce_id", b"x"), ("traceparent", TRACE)),
)


@pytest.fixture(params=[pytest.param("memory", marks=pytest.mark.unit), pytest.param("postgres", marks=pytest.mark.integration)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def pool(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Pool | None]:
    if kind == "memory":
        yield None
        return
    settings: Settings = request.getfixturevalue("database")
    async with opened_pool(settings.database, "test") as opened:
        yield opened


@pytest.fixture
def store(pool: Pool | None) -> OrderStore:
    return MemoryOrderStore() if pool is None else PostgresOrderStore(pool, Codec.unregistered(), destinations, SetClock(NOW))


def step(tx: OrderTransaction, event: PaymentEvent) -> None:
    order = tx.orders.get(event.order_id)
    facts = react(order, event, NOW)
    for fact in facts:
        order = evolve(order, fact)
    tx.record(RECEIVED, event, order, facts)


async def apply(store: OrderStore, *events: PaymentEvent) -> Order | None:
    """Apply payment events, each in a transaction of its own. Returns the order as it stands."""
    for event in events:
        async with store.transaction([event]) as tx:
            step(tx, event)
    return await kept(store)


async def kept(store: OrderStore) -> Order | None:
    async with store.transaction([initiated()]) as tx:
        return tx.orders.get(ORDER_ID)


async def is_settled(store: OrderStore, event: PaymentEvent, received: Received = RECEIVED) -> bool:
    async with store.transaction([event]) as tx:
        return await tx.settled(received, event)


@pytest.mark.parametrize(
    "events",
    [
        (initiated(),),
        (initiated(), failed(3), processing(4, attempt=2), completed(5)),
        (initiated(), failed(3), cancelled(4)),
    ],
    ids=lambda events: " > ".join(type(event).__name__ for event in events),
)
async def test_what_was_written_is_loaded_again(store: OrderStore, events: tuple[PaymentEvent, ...]) -> None:
    expected = None
    for event in events:
        for fact in react(expected, event, NOW):
            expected = evolve(expected, fact)
    assert await apply(store, *events) == expected


async def test_a_batch_is_applied_as_its_events_one_by_one_are(store: OrderStore) -> None:
    other = initiated(order_id="ord_2", payment_id="f" * 32)
    batch = [initiated(), other, failed(3), processing(4, attempt=2), completed(5)]
    async with store.transaction(batch) as tx:
        for event in batch:
            assert not await tx.settled(RECEIVED, event)
            step(tx, event)
            assert await tx.settled(RECEIVED, event), "its second copy in the same batch is passed over"
    order = await kept(store)
    assert order is not None
    assert (order.status, order.version) == (OrderStatus.PENDING, 4)
    assert await is_settled(store, other)


async def test_nothing_is_there_at_first(store: OrderStore) -> None:
    async with store.transaction([initiated()]) as tx:
        assert (await tx.settled(RECEIVED, initiated()), tx.orders) == (False, {})


async def test_a_version_that_was_applied_is_settled_and_a_later_one_is_not(store: OrderStore) -> None:
    await apply(store, initiated(), failed(3))
    for event, settled in [
        (initiated(), True),
        (processing(2), True),
        (failed(3), True),
        (processing(4), False),
        (initiated(payment_id="f" * 32), False),
    ]:
        assert await is_settled(store, event) is settled


async def test_an_event_that_moves_nothing_is_applied_all_the_same(store: OrderStore) -> None:
    order = await apply(store, initiated())
    async with store.transaction([processing(2)]) as tx:
        tx.record(RECEIVED, processing(2), tx.orders[ORDER_ID], ())
    assert await is_settled(store, processing(2))
    assert await kept(store) == order


async def test_a_block_that_raises_leaves_nothing(store: OrderStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with store.transaction([initiated()]) as tx:
            step(tx, initiated())
            raise ZeroDivisionError
    assert await kept(store) is None
    assert not await is_settled(store, initiated())


async def test_transactions_of_one_order_wait_for_each_other(store: OrderStore) -> None:
    entered: list[str] = []

    async def enter(name: str, gate: asyncio.Event) -> None:
        async with store.transaction([initiated()]):
            entered.append(name)
            await gate.wait()

    first, second = asyncio.Event(), asyncio.Event()
    second.set()
    one = asyncio.create_task(enter("one", first))
    while not entered:
        await asyncio.sleep(0.01)
    two = asyncio.create_task(enter("two", second))
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert entered == ["one"]
    first.set()
    await asyncio.gather(one, two)
    assert entered == ["one", "two"]


@pytest.mark.integration
class TestOnPostgres:
    """What only the real one has."""

    @pytest.fixture
    def kind(self) -> str:
        return "postgres"

    async def rows(self, pool: Pool, query: str) -> list[Any]:
        async with connection(pool) as conn:
            return await (await conn.execute(query.encode())).fetchall()

    async def test_events_are_kept_and_in_the_outbox_in_order(self, store: OrderStore, pool: Pool) -> None:
        await apply(store, initiated(), failed(3), processing(4), completed(5))
        expected = [
            (1, "ORDER_PLACED", "order", ORDER_ID, "order-events"),
            (2, "ORDER_STATUS_CHANGED", "order", ORDER_ID, "order-events"),
            (3, "ORDER_STATUS_CHANGED", "order", ORDER_ID, "order-events"),
            (4, "ORDER_CREATED", "order", ORDER_ID, "order-events"),
        ]
        assert await self.rows(pool, "SELECT version, event_type, stream, entity_id, topic FROM events ORDER BY version") == expected
        outbox = await self.rows(pool, "SELECT o.topics, o.key, o.value = e.value FROM outbox o JOIN events e USING (event_id) ORDER BY o.seq")
        assert outbox == [(["order-events"], ORDER_ID.encode(), True)] * 4
        for (names,) in await self.rows(pool, "SELECT headers FROM outbox"):
            assert dict(headers_of(names))["traceparent"] == TRACE, "what follows is part of the same trace"
        assert await self.rows(pool, "SELECT group_name, entity_id, version FROM stream_positions") == [("orders", PAYMENT_ID, 5)]
        assert await self.rows(pool, "SELECT count(*) FROM inbox") == [(0,)]

    async def test_what_follows_a_parked_message_is_parked_behind_it(self, store: OrderStore, pool: Pool) -> None:
        await apply(store, initiated())
        fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="not Avro")
        await PostgresParking(pool, SetClock(NOW)).park(Group.ORDERS, RECEIVED, None, fault)
        for _ in range(2):
            assert await is_settled(store, completed(3), replace(RECEIVED, offset=8))
        assert await is_settled(store, initiated(), replace(RECEIVED, offset=1)), "what was applied before its order was parked is not parked"
        assert not await is_settled(store, initiated(order_id="ord_2", payment_id="f" * 32), replace(RECEIVED, key=b"ord_2"))
        assert await self.rows(pool, 'SELECT "offset", disposition FROM parked_messages ORDER BY id') == [(7, "poison"), (8, "blocked")]

    @pytest.mark.parametrize("key", [None, b"", b"\xff", b"ord\0"])
    async def test_a_parked_message_without_a_key_that_can_be_kept_blocks_nothing(self, store: OrderStore, pool: Pool, key: bytes | None) -> None:
        fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="not Avro")
        await PostgresParking(pool, SetClock(NOW)).park(Group.ORDERS, replace(RECEIVED, key=key), None, fault)
        assert await self.rows(pool, "SELECT key, order_key FROM parked_messages") == [(key, None)]
        assert await self.rows(pool, "SELECT count(*) FROM parked_orders") == [(0,)]

    async def test_other_groups_parked_orders_do_not_count(self, store: OrderStore, pool: Pool) -> None:
        fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="not Avro")
        await PostgresParking(pool, SetClock(NOW)).park(Group.PAYMENTS, RECEIVED, None, fault)
        assert not await is_settled(store, initiated())

    async def test_the_database_gone_is_unavailable(self) -> None:
        async with opened_pool(Database(url="postgresql://nobody@127.0.0.1:1/none"), "test") as nowhere:
            lost = PostgresOrderStore(nowhere, Codec.unregistered(), destinations, SetClock(NOW))
            with pytest.raises(Unavailable, match="Postgres"):
                async with lost.transaction([initiated()]):
                    pass
