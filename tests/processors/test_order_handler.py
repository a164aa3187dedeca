"""The orders handler on the store in memory: repeats, crashes, what does not belong."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from infra.clock import SetClock
from infra.crash_points import plugged
from infra.database.delivery import Received
from infra.database.memory import MemoryOrderStore
from processors.orders.handler import Deps, handle_batch
from schemas.errors import Rejected
from schemas.messages import Message
from schemas.state import OrderStatus
from tests.processors.payment_events import NOW, ORDER_ID, OTHER_ID, cancelled, completed, failed, initiated, processing
from tests.processors.payment_paths import initiate

pytestmark = pytest.mark.unit


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store() -> MemoryOrderStore:
    return MemoryOrderStore()


async def deliver(store: MemoryOrderStore, *messages: Message, key: bytes | None = ORDER_ID.encode()) -> None:
    for message in messages:
        received = Received(topic="payment-events", partition=0, offset=0, timestamp_ms=None, key=key, value=b"")
        await handle_batch([(received, message)], Deps(store=store, clock=SetClock(NOW)))


def told(store: MemoryOrderStore) -> list[str]:
    return [event.event_type for event in store.events]


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_payment_that_works_makes_an_order_ready(store: MemoryOrderStore) -> None:
    before = count("paystream_orders_transitions_total", **{"from": "PAYMENT_PENDING", "to": "PENDING"})
    await deliver(store, initiated(), processing(), completed())
    assert told(store) == ["ORDER_PLACED", "ORDER_CREATED"]
    assert store.orders[ORDER_ID].status is OrderStatus.PENDING
    assert count("paystream_orders_transitions_total", **{"from": "PAYMENT_PENDING", "to": "PENDING"}) == before + 1


async def test_an_event_that_comes_again_changes_nothing(store: MemoryOrderStore) -> None:
    events = (initiated(), failed(3), processing(4, attempt=2), completed(5))
    await deliver(store, *events)
    order, facts = store.orders[ORDER_ID], list(store.events)
    await deliver(store, *events, *events)
    assert (store.orders[ORDER_ID], store.events) == (order, facts)


async def test_versions_may_have_gaps_where_the_group_skips_types(store: MemoryOrderStore) -> None:
    await deliver(store, initiated(1), completed(7))
    assert store.orders[ORDER_ID].status is OrderStatus.PENDING


async def test_a_crash_after_each_commit_changes_nothing(store: MemoryOrderStore) -> None:
    async def crash(point: str) -> None:
        raise Crash(point)

    for event in (initiated(), processing(), failed(), processing(4, attempt=2), completed(5)):
        with plugged(crash), pytest.raises(Crash, match=r"orders\.after_record"):
            await deliver(store, event)
        await deliver(store, event)
    assert told(store) == ["ORDER_PLACED", "ORDER_STATUS_CHANGED", "ORDER_STATUS_CHANGED", "ORDER_CREATED"]


async def test_a_cancelled_order_is_opened_again_by_another_payment(store: MemoryOrderStore) -> None:
    await deliver(store, initiated(), cancelled(2), initiated(payment_id=OTHER_ID))
    assert store.orders[ORDER_ID].status is OrderStatus.PAYMENT_PENDING
    await deliver(store, completed(3, payment_id=OTHER_ID))
    assert (store.orders[ORDER_ID].status, store.orders[ORDER_ID].payment_id) == (OrderStatus.PENDING, OTHER_ID)
    assert told(store) == ["ORDER_PLACED", "ORDER_CANCELLED", "ORDER_STATUS_CHANGED", "ORDER_CREATED"]


async def test_money_for_a_cancelled_order_changes_nothing_and_is_noticed(store: MemoryOrderStore) -> None:
    """As when the browser still had the cancelled payment's client secret: the payments group gives it back."""
    before = count("paystream_orders_unwanted_captures_total", status="CANCELLED")
    await deliver(store, initiated(), cancelled(2))
    with capture_logs() as lines:
        await deliver(store, completed(3))
    assert store.orders[ORDER_ID].status is OrderStatus.CANCELLED
    assert told(store) == ["ORDER_PLACED", "ORDER_CANCELLED"]
    assert [(line["log_level"], line["order_status"]) for line in lines] == [("warning", "CANCELLED")]
    assert count("paystream_orders_unwanted_captures_total", status="CANCELLED") == before + 1


async def test_what_is_behind_a_parked_message_waits(store: MemoryOrderStore) -> None:
    await deliver(store, initiated())
    store.parked_orders.add(ORDER_ID)
    await deliver(store, initiated(), completed())
    assert len(store.parked) == 1
    assert told(store) == ["ORDER_PLACED"]


@pytest.mark.parametrize(
    ("message", "key", "why"),
    [
        (initiate(), b"ord_1", "InitiatePayment does not belong on payment-events"),
        (initiated(), b"ord_2", "the key is 'ord_2' and the order 'ord_1'"),
        (initiated(), None, "the key is None"),
        (completed(), b"ord_1", "first event of order ord_1"),
    ],
)
async def test_what_breaks_an_invariant_is_rejected(store: MemoryOrderStore, message: Message, key: Any, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        await deliver(store, message, key=key)
    assert not store.events
