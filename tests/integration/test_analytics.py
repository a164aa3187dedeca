"""Analytics on Postgres: batches, repeats, gaps, parked orders, crashes, the rebuild, and the figures that are read from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from infra.clock import SetClock
from infra.crash_points import plugged
from infra.database.analytics import AnalyticsStore
from infra.database.delivery import Disposition, Fault, Group
from infra.database.figures import Bucket, FailureReason, Figures, Volume
from infra.database.parking import PostgresParking
from infra.database.pool import Pool, connection, opened_pool
from infra.settings import Database, Settings
from processors.analytics.handler import Deps, handle_batch
from processors.analytics.projections import project
from processors.delivery import BatchDelivery, Failures, Halt
from processors.keyed_window import Gate
from schemas.codec import Codec, headers
from schemas.errors import Rejected, Unavailable
from schemas.messages import PaymentEvent
from schemas.views import Views
from tests.processors import payment_events as say
from tests.processors.payment_events import NOW, ORDER_ID, OTHER_ID, PAYMENT_ID, histories, interleaved, received
from tests.processors.payment_paths import initiate

pytestmark = pytest.mark.integration

CODEC = Codec.unregistered()


@pytest.fixture
async def pool(database: Settings) -> AsyncIterator[Pool]:
    async with opened_pool(database.database, "test") as opened:
        yield opened


@pytest.fixture
def deps(pool: Pool) -> Deps:
    clock = SetClock(NOW)
    return Deps(store=AnalyticsStore(pool, clock), clock=clock)


async def rows(pool: Pool, query: str) -> list[Any]:
    async with connection(pool) as conn:
        return await (await conn.execute(query.encode())).fetchall()


async def tables(pool: Pool) -> list[list[Any]]:
    """Everything that analytics has made."""
    return [
        await rows(pool, "SELECT * FROM analytics.payments ORDER BY payment_id"),
        await rows(pool, "SELECT * FROM analytics.attempts ORDER BY payment_id, attempt"),
        await rows(pool, "SELECT entity_id, version FROM stream_positions WHERE group_name = 'analytics' ORDER BY 1"),
    ]


async def fold(deps: Deps, events: Sequence[PaymentEvent], size: int) -> None:
    pairs = received(events)
    for start in range(0, len(pairs), size):
        await handle_batch(pairs[start : start + size], deps)


async def test_batches_make_the_rows_that_the_projections_say(deps: Deps, pool: Pool) -> None:
    events = interleaved(histories(3))
    await fold(deps, events, 7)
    expected = Views()
    for event in events:
        project(expected, event)
    async with deps.store.transaction(events) as tx:
        assert tx.views == expected
        assert tx.positions == {payment_id: row.version for payment_id, row in expected.payments.items()}


async def test_the_size_of_batches_makes_no_difference_and_neither_do_repeats(deps: Deps, pool: Pool) -> None:
    events = interleaved(histories())
    await fold(deps, events, 1)
    once = await tables(pool)
    await fold(deps, events, 5)
    assert await tables(pool) == once
    await deps.store.rebuild("alice")
    await fold(deps, [event for event in events for _ in range(2)], len(events) * 2)
    assert await tables(pool) == once


async def test_a_rebuild_is_the_same_as_the_first_run(deps: Deps, pool: Pool) -> None:
    events = interleaved(histories(2))
    await fold(deps, events, 11)
    first = await tables(pool)
    await deps.store.rebuild("alice")
    assert await tables(pool) == [[], [], []]
    await fold(deps, events, 50)
    assert await tables(pool) == first
    assert await rows(pool, "SELECT actor, action, subject FROM audit_log") == [("alice", "rebuild", "analytics")]


async def test_a_rebuild_touches_no_other_group(deps: Deps, pool: Pool) -> None:
    fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="x")
    parking = PostgresParking(pool, SetClock(NOW))
    (first, _), (second, _) = received([say.initiated(), say.initiated()])
    await parking.park(Group.ANALYTICS, first, PAYMENT_ID, fault)
    await parking.park(Group.ORDERS, second, PAYMENT_ID, fault)
    async with connection(pool) as conn:
        await conn.execute("INSERT INTO stream_positions VALUES ('orders', 'x', 1), ('analytics', 'x', 1)")
    await deps.store.rebuild("alice")
    for table in ("stream_positions", "parked_messages", "parked_orders", "inbox"):
        assert await rows(pool, f"SELECT group_name FROM {table}") == [("orders",)]


async def test_a_gap_is_rejected_and_nothing_of_the_batch_is_kept(deps: Deps, pool: Pool) -> None:
    batch = received([say.initiated(payment_id=OTHER_ID), say.initiated(), say.completed(3)])
    with pytest.raises(Rejected, match=f"version 3 of payment {PAYMENT_ID} comes after version 1"):
        await handle_batch(batch, deps)
    assert await tables(pool) == [[], [], []]


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        ((received([say.initiated()])[0][0], initiate()), "InitiatePayment does not belong on payment-events"),
        ((replace(received([say.initiated()])[0][0], key=None), say.initiated()), "the key is None"),
        ((received([say.completed(1)])[0]), "it has to be PAYMENT_INITIATED"),
    ],
)
async def test_what_breaks_an_invariant_is_rejected(deps: Deps, pair: Any, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        await handle_batch([pair], deps)


async def test_a_crash_before_the_commit_leaves_nothing_and_one_after_it_all(deps: Deps, pool: Pool) -> None:
    class Crash(BaseException):
        pass

    events = interleaved(histories())
    for point, kept in [("analytics.before_commit", False), ("analytics.after_commit", True)]:

        async def crash(passed: str, point: str = point) -> None:
            if passed == point:
                raise Crash

        with plugged(crash), pytest.raises(Crash):
            await handle_batch(received(events), deps)
        assert any(await tables(pool)) is kept
    once = await tables(pool)
    await fold(deps, events, 3)
    assert await tables(pool) == once


async def test_two_workers_with_the_same_orders_in_any_order_wait_for_each_other(deps: Deps, pool: Pool) -> None:
    """As after a rebalance, when the one before has not finished."""
    import asyncio

    streams = histories(2)
    backwards = [list(events) for events in reversed(streams)]
    await asyncio.gather(fold(deps, interleaved(streams), 40), fold(deps, interleaved(backwards), 40))
    twice = await tables(pool)
    await deps.store.rebuild("alice")
    await fold(deps, interleaved(streams), 40)
    assert await tables(pool) == twice


async def test_poison_parks_its_order_alone_and_the_batch_goes_on(deps: Deps, pool: Pool) -> None:
    """A version is missing in the middle of one order: it waits from there on, all others are folded."""
    gate = Gate()
    parking = PostgresParking(pool, SetClock(NOW))
    failures = Failures(Group.ANALYTICS, parking, gate, Halt(Group.ANALYTICS, parking, gate), max_bugs=20)

    async def handle(batch: Any) -> None:
        await handle_batch(batch, deps)

    deliver = BatchDelivery(failures, CODEC, handle)
    other = next(events for events in histories() if len(events) == 3)
    broken = [say.initiated(), say.failed(3), say.processing(4, attempt=2), say.completed(5, attempt=2)]
    batch = [replace(record, value=CODEC.encode(event), headers=headers(event)) for record, event in received(interleaved([broken[:2], other]))]
    later = [replace(record, value=CODEC.encode(event), headers=headers(event)) for record, event in received(broken[2:], first_offset=len(batch))]
    for _ in range(2):
        await deliver(batch)
        await deliver(later)
    parked = await rows(pool, "SELECT disposition, order_key, error_message FROM parked_messages ORDER BY id")
    missing = f"version 3 of payment {PAYMENT_ID} comes after version 1: what is between is missing"
    behind = "behind a parked message of its order"
    assert parked == [("poison", ORDER_ID, missing), ("blocked", ORDER_ID, behind), ("blocked", ORDER_ID, behind)]
    positions = {other[0].payment_id: 3, PAYMENT_ID: 1}
    assert dict(await rows(pool, "SELECT entity_id, version FROM stream_positions")) == positions


async def test_what_was_folded_before_its_order_was_parked_is_not_parked(deps: Deps, pool: Pool) -> None:
    pairs = received([say.initiated(), say.processing(), say.completed()])
    await handle_batch(pairs[:2], deps)
    fault = Fault(disposition=Disposition.POISON, error_class="Rejected", message="x")
    await PostgresParking(pool, SetClock(NOW)).park(Group.ANALYTICS, replace(pairs[0][0], offset=9), None, fault)
    await handle_batch(pairs, deps)
    assert await rows(pool, 'SELECT "offset", disposition FROM parked_messages ORDER BY id') == [(9, "poison"), (2, "blocked")]


async def test_figures_read_what_was_folded(deps: Deps, pool: Pool) -> None:
    def paid(payment_id: str, **fields: Any) -> list[PaymentEvent]:
        last = say.completed(payment_id=payment_id, **fields)
        money = {"currency": last.currency, "amount_minor": last.amount_minor}
        return [say.initiated(payment_id=payment_id, **money), say.processing(payment_id=payment_id, **money), last]

    ids = [f"00000000-0000-0000-0000-{n:012d}" for n in range(6)]
    await fold(
        deps,
        interleaved(
            [
                paid(ids[0], gateway_latency_ms=100),
                paid(ids[1], gateway_latency_ms=300, captured_minor=400),
                paid(ids[2], gateway_latency_ms=None, currency="JPY", amount_minor=50, captured_minor=50),
                [say.initiated(payment_id=ids[3]), say.processing(payment_id=ids[3]), say.failed(payment_id=ids[3])],
                [say.initiated(payment_id=ids[4]), say.cancelled(2, payment_id=ids[4])],
                [say.initiated(payment_id=ids[5], occurred_at=NOW + timedelta(days=1))],
            ]
        ),
        4,
    )
    summary = await Figures(pool).summary(NOW, NOW + timedelta(hours=1))
    assert summary.payments_by_status == {"COMPLETED": 3, "FAILED": 1, "CANCELLED": 1}
    assert summary.volume_by_currency == [
        Volume(currency="EUR", payments=4, amount_minor=4000, captured_minor=1400),
        Volume(currency="JPY", payments=1, amount_minor=50, captured_minor=50),
    ]
    assert summary.success_rate == 0.75
    assert summary.failure_reasons == [FailureReason(code="card_declined", payments=1)]
    (latency,) = summary.gateway_latency_ms
    assert (latency.gateway, latency.calls, latency.p50) == ("stripe", 3, 200.0)
    series = await Figures(pool).timeseries(NOW, NOW + timedelta(days=2), Bucket.DAY)
    assert [item.payments_by_status for item in series.items if item.payments] == [
        {"COMPLETED": 3, "FAILED": 1, "CANCELLED": 1, "PENDING": 0},
        {"COMPLETED": 0, "FAILED": 0, "CANCELLED": 0, "PENDING": 1},
    ]


async def test_the_database_gone_is_unavailable() -> None:
    async with opened_pool(Database(url="postgresql://nobody@127.0.0.1:1/none"), "test") as nowhere:
        clock = SetClock(NOW)
        with pytest.raises(Unavailable, match="Postgres"):
            await handle_batch(received([say.initiated()]), Deps(store=AnalyticsStore(nowhere, clock), clock=clock))
