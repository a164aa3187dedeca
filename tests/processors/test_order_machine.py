"""The order machine, walked: every status × payment event, of its own payment and of another one; and any sequence of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.orders.machine import TRANSITIONS, WANTED, evolve, is_unwanted_capture, react
from schemas.errors import IllegalTransition, Rejected
from schemas.messages import OrderCreated, OrderEvent, OrderPlaced, OrderStatusChanged, PaymentEvent, leaves
from schemas.state import Order, OrderStatus
from tests.processors import payment_events as say
from tests.processors.payment_events import NOW, ORDER_ID, OTHER_ID, PAYMENT_ID

pytestmark = pytest.mark.unit

EVENTS: Final[dict[str, Callable[..., PaymentEvent]]] = {
    "initiated": say.initiated,
    "processing": say.processing,
    "action required": say.action_required,
    "authorized": say.authorized,
    "completed": say.completed,
    "failed": say.failed,
    "cancelled": say.cancelled,
    "refund initiated": say.refund_initiated,
}

PATHS: Final[dict[OrderStatus, tuple[str, ...]]] = {
    OrderStatus.PAYMENT_PENDING: ("initiated",),
    OrderStatus.PENDING: ("initiated", "completed"),
    OrderStatus.PAYMENT_FAILED: ("initiated", "failed"),
    OrderStatus.CANCELLED: ("initiated", "cancelled"),
}


def step(order: Order | None, name: str, **fields: Any) -> tuple[Order, tuple[OrderEvent, ...]]:
    """One payment event, and what must hold of any."""
    event = EVENTS[name](**fields)
    facts = react(order, event, NOW)
    start = order.version if order else 0
    assert [fact.version for fact in facts] == list(range(start + 1, start + 1 + len(facts)))
    for fact in facts:
        assert (fact.order_id, fact.payment_id, fact.causation_id, fact.occurred_at) == (ORDER_ID, event.payment_id, event.event_id, NOW)
        after = evolve(order, fact)
        assert after.status == fact.status
        if isinstance(fact, OrderStatusChanged):
            assert order is not None
            assert fact.previous_status == order.status
        order = after
    assert order is not None
    return order, facts


def walked(*names: str) -> Order:
    order = None
    for name in names:
        order, _ = step(order, name)
    assert order is not None
    return order


def types(facts: tuple[OrderEvent, ...]) -> list[tuple[str, str]]:
    return [(fact.event_type, fact.status) for fact in facts]


# status: {event: where its own payment takes it}, {event: where another payment takes it}; what is missing leaves it.
EXPECTED: Final[dict[OrderStatus, tuple[dict[str, OrderStatus], dict[str, OrderStatus]]]] = {
    OrderStatus.PAYMENT_PENDING: (
        {"completed": OrderStatus.PENDING, "failed": OrderStatus.PAYMENT_FAILED, "cancelled": OrderStatus.CANCELLED},
        {"initiated": OrderStatus.PAYMENT_PENDING, "completed": OrderStatus.PENDING},
    ),
    OrderStatus.PAYMENT_FAILED: (
        {"processing": OrderStatus.PAYMENT_PENDING, "completed": OrderStatus.PENDING, "cancelled": OrderStatus.CANCELLED},
        {"initiated": OrderStatus.PAYMENT_PENDING, "processing": OrderStatus.PAYMENT_PENDING, "completed": OrderStatus.PENDING},
    ),
    OrderStatus.PENDING: ({}, {}),
    OrderStatus.CANCELLED: ({}, {"initiated": OrderStatus.PAYMENT_PENDING}),
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("own", [True, False], ids=["its own payment", "another payment"])
@pytest.mark.parametrize("status", OrderStatus)
def test_each_event_in_each_status(status: OrderStatus, own: bool, name: str) -> None:
    if own and name == "initiated":
        return  # a payment is initiated once
    before = walked(*PATHS[status])
    payment_id = PAYMENT_ID if own else OTHER_ID
    after, facts = step(before, name, payment_id=payment_id)
    expected = EXPECTED[status][0 if own else 1].get(name)
    if expected is None:
        assert (after, facts) == (before, ())
    else:
        assert (after.status, after.payment_id) == (expected, payment_id)


def test_every_status_can_be_walked_to_and_has_a_row() -> None:
    assert set(PATHS) == set(TRANSITIONS) == set(OrderStatus)
    for status, names in PATHS.items():
        assert walked(*names).status is status


def test_the_wanted_types_are_those_that_can_move_an_order() -> None:
    types = {"PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED", "PAYMENT_FAILED", "PAYMENT_CANCELLED"}
    assert types == WANTED
    assert {kind.event_type for kind in leaves(PaymentEvent).values()} - WANTED == {
        "PAYMENT_ACTION_REQUIRED",
        "PAYMENT_AUTHORIZED",
        "PAYMENT_REFUND_INITIATED",
    }


def test_a_payment_that_is_opened_places_the_order() -> None:
    order, facts = step(None, "initiated", amount_minor=4200)
    assert types(facts) == [("ORDER_PLACED", "PAYMENT_PENDING")]
    assert (order.amount_minor, order.currency, order.user_id, order.payment_id) == (4200, "EUR", "u1", PAYMENT_ID)


@pytest.mark.parametrize("name", [name for name in EVENTS if name != "initiated"])
def test_an_order_that_no_payment_opened_is_poison(name: str) -> None:
    with pytest.raises(Rejected, match="first event of order ord_1"):
        react(None, EVENTS[name](), NOW)


def test_a_paid_order_is_ready_and_says_what_was_paid() -> None:
    order, facts = step(walked("initiated", "processing"), "completed", captured_minor=400)
    assert types(facts) == [("ORDER_CREATED", "PENDING")]
    assert order.amount_minor == 400


def test_a_cancelled_payment_cancels_the_order_and_says_why() -> None:
    _, facts = step(walked("initiated"), "cancelled", reason="expired")
    assert types(facts) == [("ORDER_CANCELLED", "CANCELLED")]
    assert getattr(facts[0], "reason", None) == "expired"


def test_a_retry_after_a_decline_waits_for_its_payment_again() -> None:
    _, facts = step(walked("initiated", "processing", "failed"), "processing", attempt=2)
    assert types(facts) == [("ORDER_STATUS_CHANGED", "PAYMENT_PENDING")]


def test_another_payment_after_a_decline_is_the_orders_payment_from_then_on() -> None:
    order, _ = step(walked("initiated", "failed"), "initiated", payment_id=OTHER_ID)
    assert step(order, "cancelled", payment_id=PAYMENT_ID)[1] == (), "the end of the old one is no end of the order"
    assert step(order, "failed", payment_id=OTHER_ID)[0].status is OrderStatus.PAYMENT_FAILED


def test_an_old_payment_that_is_paid_after_all_pays_the_order() -> None:
    order, _ = step(walked("initiated", "failed"), "initiated", payment_id=OTHER_ID)
    order, facts = step(order, "completed", payment_id=PAYMENT_ID)
    assert types(facts) == [("ORDER_CREATED", "PENDING")]
    assert order.payment_id == PAYMENT_ID
    assert step(order, "completed", payment_id=OTHER_ID) == (order, ()), "the second capture is given back by the payments group"


def test_steps_that_were_not_seen_are_filled_in() -> None:
    _, facts = step(walked("initiated", "failed"), "completed")
    assert types(facts) == [("ORDER_STATUS_CHANGED", "PAYMENT_PENDING"), ("ORDER_CREATED", "PENDING")]


@pytest.mark.parametrize(("status", "unwanted"), [(status, status in (OrderStatus.PENDING, OrderStatus.CANCELLED)) for status in OrderStatus])
def test_money_for_an_order_that_does_not_want_it_is_noticed(status: OrderStatus, unwanted: bool) -> None:
    order = walked(*PATHS[status])
    assert is_unwanted_capture(order, say.completed()) is unwanted
    assert not is_unwanted_capture(order, say.failed())


def test_evolve_takes_only_the_next_step_of_the_table() -> None:
    placed, created = react(None, say.initiated(), NOW)[0], react(walked("initiated"), say.completed(), NOW)[0]
    assert isinstance(placed, OrderPlaced)
    assert isinstance(created, OrderCreated)
    for order, event in [
        (None, created),
        (walked("initiated"), placed),
        (walked("initiated", "cancelled"), created),
        (walked("initiated", "failed"), created),
    ]:
        with pytest.raises(IllegalTransition, match=event.event_type):
            evolve(order, event)


def test_an_orders_events_never_share_an_id_with_a_payments() -> None:
    """A caller may choose a payment's id as an order id."""
    event = say.initiated(order_id=PAYMENT_ID)
    assert react(None, event, NOW)[0].event_id != event.event_id


@given(st.lists(st.tuples(st.sampled_from(list(EVENTS)), st.sampled_from([PAYMENT_ID, OTHER_ID])), max_size=20))
def test_any_sequence_pays_an_order_once_at_most(names: list[tuple[str, str]]) -> None:
    order, seen = step(None, "initiated")
    facts = list(seen)
    for name, payment_id in names:
        order, said = step(order, name, payment_id=payment_id)
        facts += said
    assert [fact.version for fact in facts] == list(range(1, order.version + 1))
    assert sum(isinstance(fact, OrderCreated) for fact in facts) == (order.status is OrderStatus.PENDING)
    assert len({fact.event_id for fact in facts}) == len(facts)
