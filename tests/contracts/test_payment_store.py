"""What a payment store promises, on Postgres and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from infra.clock import SetClock
from infra.database.delivery import Disposition, Fault, Group, Received
from infra.database.facts import headers_of
from infra.database.memory import MemoryPaymentStore
from infra.database.parking import PostgresParking
from infra.database.payments import PaymentStore, PostgresPaymentStore
from infra.database.pool import Pool, connection, opened_pool
from infra.settings import Database, Settings
from processors.payments.machine import fold
from schemas.codec import Codec
from schemas.decisions import Decision, Refusal
from schemas.errors import Unavailable
from schemas.messages import derived_id
from schemas.observations import Created
from schemas.state import AttemptStatus, Payment, PaymentStatus
from schemas.topics import destinations
from tests.processors.payment_paths import COMMANDS, NOW, PAYMENT_ID, step

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RECEIVED = Received(
    topic="payment-commands", partition=0, offset=7, timestamp_ms=1, key=b"ord_1", value=b"\x00", headers=(("ce_id", b"x"), ("traceparent", TRACE))
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
def store(pool: Pool | None) -> PaymentStore:
    clock = SetClock(NOW)
    return MemoryPaymentStore(clock) if pool is None else PostgresPaymentStore(pool, Codec.unregistered(), destinations, clock)


@asynccontextmanager
async def opened(store: PaymentStore, message_id: str = PAYMENT_ID, **options: Any) -> AsyncIterator[Any]:
    async with store.transaction(RECEIVED, message_id, PAYMENT_ID, **options) as tx:
        yield tx


async def go(store: PaymentStore, *names: str) -> Payment:
    """Apply commands and observations, each in a transaction of its own."""
    for name in names:
        asked = name in COMMANDS
        async with opened(store, derived_id(name), again=True) as tx:
            payment, decision = step(tx.payment, name)
            assert payment is not None
            await (tx.begin(payment, decision, consumed=not decision.ask) if asked else tx.record(payment, decision))
    async with opened(store, again=True) as tx:
        assert tx.payment is not None
        return tx.payment


@pytest.mark.parametrize(
    "names",
    [
        ("initiate",),
        ("initiate", "created", "confirm", "action required"),
        ("initiate and confirm", "unknown", "unknown, key burnt"),
        ("initiate and confirm", "authorized", "capture a part", "captured in part"),
        ("initiate and confirm", "declined", "confirm with another card", "captured"),
        ("initiate and confirm", "action required", "confirm with another card"),
        ("initiate", "created", "cancel", "voided", "captured"),
    ],
    ids=" > ".join,
)
async def test_what_was_written_is_loaded_again(store: PaymentStore, names: tuple[str, ...]) -> None:
    expected = None
    for name in names:
        expected, _ = step(expected, name)
    assert await go(store, *names) == expected


async def test_nothing_is_there_at_first(store: PaymentStore) -> None:
    async with opened(store) as tx:
        assert (tx.settled, tx.payment, tx.order_held_by, tx.order_paid_by) == (False, None, None, None)


async def test_a_consumed_message_is_settled_and_others_are_not(store: PaymentStore) -> None:
    async with opened(store) as tx:
        await tx.begin(None, Decision(refusal=Refusal(code="x", message="y")), consumed=True)
    async with opened(store) as tx:
        assert tx.settled
    async with opened(store, derived_id("another")) as tx:
        assert not tx.settled


async def test_an_unconsumed_message_comes_again(store: PaymentStore) -> None:
    async with opened(store) as tx:
        payment, decision = step(None, "initiate and confirm")
        await tx.begin(payment, decision, consumed=False)
    async with opened(store) as tx:
        assert not tx.settled
        assert tx.payment == payment


async def test_who_tells_the_outcome_settles_the_command_that_asked(store: PaymentStore) -> None:
    """It comes again after a crash, and a webhook was quicker."""
    async with opened(store) as tx:
        payment, decision = step(None, "initiate and confirm")
        await tx.begin(payment, decision, consumed=False)
    webhook = derived_id("a webhook")
    async with opened(store, webhook) as tx:
        payment, decision = step(tx.payment, "captured")
        assert payment is not None
        await tx.record(payment, decision)
    async with opened(store) as tx:
        assert tx.settled


async def test_a_block_that_raises_leaves_nothing(store: PaymentStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with opened(store) as tx:
            payment, decision = step(None, "initiate and confirm")
            await tx.begin(payment, decision, consumed=True)
            raise ZeroDivisionError
    async with opened(store) as tx:
        assert (tx.settled, tx.payment, tx.order_held_by) == (False, None, None)


async def test_a_payment_holds_its_order_until_it_fails_or_is_cancelled(store: PaymentStore) -> None:
    other = derived_id("another payment")
    for names, holder in [(("initiate and confirm",), PAYMENT_ID), (("declined",), None), (("confirm with another card",), PAYMENT_ID)]:
        await go(store, *names)
        async with store.transaction(RECEIVED, other, other) as tx:
            assert tx.order_held_by == holder


async def test_an_observation_never_takes_the_order(store: PaymentStore) -> None:
    await go(store, "initiate and confirm", "declined", "captured")
    other = derived_id("another payment")
    async with store.transaction(RECEIVED, other, other) as tx:
        assert tx.order_held_by is None
        assert tx.order_paid_by == PAYMENT_ID


async def test_money_that_goes_back_does_not_pay_the_order(store: PaymentStore) -> None:
    await go(store, "initiate", "created", "cancel", "voided", "captured")
    other = derived_id("another payment")
    async with store.transaction(RECEIVED, other, other) as tx:
        assert tx.order_paid_by is None


async def test_a_gateways_object_is_found_once_it_is_remembered(store: PaymentStore) -> None:
    payment = await go(store, "initiate")
    assert await store.find_object("stripe", "pi_9") is None
    for _ in range(2):
        await store.remember(payment, 1, Created(gateway_id="pi_9", client_secret="pi_9_secret"))
    found = await store.find_object("stripe", "pi_9")
    assert found is not None
    assert (found.payment.payment_id, found.order_id, found.attempt) == (PAYMENT_ID, "ord_1", 1)
    assert found.payment.attempts[0].gateway_id == "pi_9"
    async with opened(store, again=True) as tx:
        assert (tx.payment.attempt.gateway_id, tx.payment.attempt.client_secret) == ("pi_9", "pi_9_secret")


async def test_the_first_object_of_an_attempt_stays(store: PaymentStore) -> None:
    payment = await go(store, "initiate")
    await store.remember(payment, 1, Created(gateway_id="pi_1"))
    await store.remember(payment, 1, Created(gateway_id="pi_2"))
    async with opened(store, again=True) as tx:
        assert tx.payment.attempt.gateway_id == "pi_1"


async def test_a_due_timer_fires_once(store: PaymentStore) -> None:
    await go(store, "initiate and confirm", "unknown")
    assert await store.fire_timers(NOW) == 0
    assert await store.fire_timers(NOW + timedelta(seconds=5)) == 1
    assert await store.fire_timers(NOW + timedelta(days=1)) == 0


async def test_a_timer_set_again_moves_and_a_dropped_one_is_gone(store: PaymentStore) -> None:
    await go(store, "initiate and confirm", "unknown", "unknown")
    assert await store.fire_timers(NOW + timedelta(seconds=29)) == 0
    await go(store, "captured")
    assert await store.fire_timers(NOW + timedelta(days=9)) == 0


async def test_the_oldest_doubt_is_known(store: PaymentStore) -> None:
    assert await store.oldest_unknown() is None
    await go(store, "initiate and confirm", "unknown")
    assert await store.oldest_unknown() == NOW
    await go(store, "captured")
    assert await store.oldest_unknown() is None


async def test_transactions_of_one_order_wait_for_each_other(store: PaymentStore) -> None:
    entered: list[str] = []

    async def enter(name: str, gate: asyncio.Event) -> None:
        async with opened(store, derived_id(name)):
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

    async def test_events_are_kept_and_in_the_outbox_in_order(self, store: PaymentStore, pool: Pool) -> None:
        await go(store, "initiate and confirm", "authorized", "capture", "captured")
        events = await self.rows(pool, "SELECT version, event_type, topic FROM events ORDER BY version")
        assert events == [
            (1, "PAYMENT_INITIATED", "payment-events"),
            (2, "PAYMENT_PROCESSING", "payment-events"),
            (3, "PAYMENT_AUTHORIZED", "payment-events"),
            (4, "PAYMENT_COMPLETED", "payment-events"),
        ]
        outbox = await self.rows(pool, "SELECT o.topics, o.key, o.value = e.value FROM outbox o JOIN events e USING (event_id) ORDER BY o.seq")
        assert [row[0] for row in outbox] == [
            ["payment-events", "payment-initiated"],
            ["payment-events", "payment-processing"],
            ["payment-events"],
            ["payment-events", "payment-completed"],
        ]
        assert all(row[1:] == (b"ord_1", True) for row in outbox)
        for (names,) in await self.rows(pool, "SELECT headers FROM outbox"):
            assert dict(headers_of(names))["traceparent"] == TRACE, "what follows is part of the same trace"

    async def test_each_charge_is_in_the_audit_log_once(self, store: PaymentStore, pool: Pool) -> None:
        await go(store, "initiate and confirm", "captured", "captured", "captured")
        charges = await self.rows(pool, "SELECT kind, gateway_id, amount_minor, before_minor, after_minor FROM transactions")
        assert charges == [("charge", "ch_1", 1000, 0, 1000)]

    async def test_what_follows_a_parked_message_is_parked_behind_it(self, store: PaymentStore, pool: Pool) -> None:
        parking = PostgresParking(pool, SetClock(NOW))
        fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="not Avro")
        for _ in range(2):
            await parking.park(Group.PAYMENTS, RECEIVED, None, fault)
        for _ in range(2):
            async with store.transaction(replace(RECEIVED, offset=8), derived_id("next"), PAYMENT_ID) as tx:
                assert tx.settled
        async with store.transaction(replace(RECEIVED, key=b"ord_2", offset=9), derived_id("else"), PAYMENT_ID) as tx:
            assert not tx.settled
        assert await self.rows(pool, 'SELECT "offset", disposition, value FROM parked_messages ORDER BY id') == [
            (7, "poison", b"\x00"),
            (8, "blocked", b"\x00"),
        ]
        copies = await self.rows(pool, "SELECT topics, key, value, headers FROM outbox ORDER BY seq")
        assert [copy[:3] for copy in copies] == [(["payment-events-dlq"], b"ord_1", b"\x00")] * 2
        assert [header[0] for header in copies[0][3]][:4] == ["ce_id", "traceparent", "paystream-dlq-group", "paystream-dlq-topic"]
        assert await parking.parked_counts() == {("payments", "poison"): 1, ("payments", "blocked"): 1}

    async def test_a_parked_webhook_blocks_nothing(self, store: PaymentStore, pool: Pool) -> None:
        fault = Fault(disposition=Disposition.BUG, error_class="KeyError", message="x", stack="…")
        webhook = replace(RECEIVED, topic="payment-webhook-received")
        await PostgresParking(pool, SetClock(NOW)).park(Group.PAYMENTS, webhook, derived_id("w"), fault)
        async with opened(store, derived_id("next")) as tx:
            assert not tx.settled
        async with opened(store, derived_id("w")) as tx:
            assert tx.settled

    async def test_what_was_handled_long_ago_is_forgotten(self, store: PaymentStore, pool: Pool) -> None:
        await go(store, "initiate")
        async with opened(store) as tx:
            await tx.begin(tx.payment, Decision(), consumed=True)
        parking = PostgresParking(pool, SetClock(NOW))
        assert await parking.forget(NOW) == 0
        assert await parking.forget(NOW + timedelta(seconds=1)) == 1
        async with opened(store) as tx:
            assert not tx.settled

    async def test_many_bugs_halt_the_group_until_it_is_resumed(self, store: PaymentStore, pool: Pool) -> None:
        clock = SetClock(NOW)
        parking = PostgresParking(pool, clock)
        fault = Fault(disposition=Disposition.BUG, error_class="KeyError", message="x")
        for n in range(3):
            assert await parking.halt_after(Group.PAYMENTS, 3, timedelta(minutes=5)) is None
            await parking.park(Group.PAYMENTS, replace(RECEIVED, key=f"ord_{n}".encode(), offset=n), derived_id(n), fault)
        assert await parking.halt_after(Group.ORDERS, 3, timedelta(minutes=5)) is None
        reason = await parking.halt_after(Group.PAYMENTS, 3, timedelta(minutes=5))
        assert reason == await parking.halted(Group.PAYMENTS) == "3 bugs within 300 seconds"
        assert await parking.resume(Group.PAYMENTS, "alice")
        assert not await parking.resume(Group.PAYMENTS, "alice")
        assert await parking.halted(Group.PAYMENTS) is None
        assert await parking.halt_after(Group.PAYMENTS, 3, timedelta(minutes=5)) is None, "bugs before the resume do not count again"
        assert await self.rows(pool, "SELECT actor, action, subject FROM audit_log") == [("alice", "resume", "payments")]

    async def test_a_second_open_attempt_or_payment_is_refused_by_the_database(self, store: PaymentStore, pool: Pool) -> None:
        await go(store, "initiate and confirm")
        payment, decision = step(None, "initiate and confirm")
        assert payment is not None
        other = replace(payment, payment_id=derived_id("another"), attempts=())
        with pytest.raises(psycopg.errors.UniqueViolation, match="holds_order"):
            async with store.transaction(RECEIVED, other.payment_id, other.payment_id) as tx:
                await tx.begin(other, Decision(), consumed=True)
        second = replace(payment.attempt, number=2, status=AttemptStatus.STARTED)
        with pytest.raises(psycopg.errors.UniqueViolation, match="attempts_open"):
            async with opened(store, derived_id("x")) as tx:
                await tx.begin(tx.payment, Decision(attempts=(second,)), consumed=True)

    async def test_the_database_gone_is_unavailable(self, database: Settings) -> None:
        async with opened_pool(Database(url="postgresql://nobody@127.0.0.1:1/none"), "test") as nowhere:
            lost = PostgresPaymentStore(nowhere, Codec.unregistered(), destinations, SetClock(NOW))
            with pytest.raises(Unavailable, match="Postgres"):
                await lost.find_object("stripe", "pi_1")


def test_the_paths_end_where_they_say() -> None:
    payment, decision = step(None, "initiate and confirm")
    assert payment is not None
    assert fold(None, decision).status is PaymentStatus.PROCESSING
