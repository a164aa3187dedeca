"""The payments handler on fakes: each way of a payment, each fault of the gateway, and a crash at each point of each way."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.database.delivery import Received
from infra.gateways.fake import Fault
from processors.payments.handler import handle
from schemas.errors import Rejected
from schemas.messages import Command, PaymentInitiated, derived_id
from schemas.state import AttemptStatus, PaymentStatus
from tests.processors.payment_paths import COMMANDS, NOW, PAYMENT_ID, initiate
from tests.processors.payment_world import Crash, World, again

pytestmark = pytest.mark.unit

CHARGE = initiate(confirm=True)
CAPTURE, CANCEL, CONFIRM = COMMANDS["capture"], COMMANDS["cancel"], COMMANDS["confirm"]
OTHER_CARD = COMMANDS["confirm with another card"]


@pytest.fixture
def world() -> World:
    return World()


def status(world: World) -> PaymentStatus:
    return world.payment(PAYMENT_ID).status


async def test_a_charge_is_two_calls_and_three_events(world: World) -> None:
    await world.deliver(CHARGE)
    assert [operation for operation, _ in world.gateway.calls] == ["create", "confirm"]
    assert world.told(PAYMENT_ID) == ["PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED"]
    assert world.announced == [PAYMENT_ID]
    world.check_books()


async def test_an_intent_is_made_at_the_gateway_at_once_and_confirmed_later(world: World) -> None:
    await world.deliver(initiate())
    assert world.payment(PAYMENT_ID).attempt.client_secret == "pi_1_secret"
    assert status(world) is PaymentStatus.PENDING
    await world.deliver(CONFIRM)
    assert [operation for operation, _ in world.gateway.calls] == ["create", "confirm"]
    assert status(world) is PaymentStatus.COMPLETED
    world.check_books()


async def test_a_command_that_comes_again_changes_nothing(world: World) -> None:
    for _ in range(3):
        await world.deliver(CHARGE)
    assert len(world.gateway.calls) == 2
    world.check_books()


async def test_a_decline_is_an_event_and_another_card_is_another_attempt(world: World) -> None:
    await world.deliver(initiate(confirm=True, payment_method="pm_card_chargeDeclined"))
    assert status(world) is PaymentStatus.FAILED
    await world.deliver(OTHER_CARD)
    assert [operation for operation, _ in world.gateway.calls] == ["create", "confirm", "cancel", "create", "confirm"]
    assert world.gateway.intents["pi_1"].status == "canceled", "its client secret can't be paid any more"
    assert status(world) is PaymentStatus.COMPLETED
    world.check_books()


async def test_the_first_attempts_object_is_paid_before_it_could_be_voided(world: World) -> None:
    await world.deliver(initiate(confirm=True, payment_method="pm_card_chargeDeclined"))
    world.gateway.pay("pi_1", "pm_card_visa")
    await world.deliver(OTHER_CARD)
    assert [operation for operation, _ in world.gateway.calls] == ["create", "confirm", "cancel"]
    assert world.payment(PAYMENT_ID).captured_minor == 1000
    world.check_books()


async def test_manual_capture_in_part(world: World) -> None:
    await world.deliver(initiate(confirm=True, capture_method="manual"))
    assert status(world) is PaymentStatus.AUTHORIZED
    await world.deliver(COMMANDS["capture a part"])
    payment = world.payment(PAYMENT_ID)
    assert (payment.status, payment.captured_minor) == (PaymentStatus.COMPLETED, 400)
    world.check_books()


@pytest.mark.parametrize("method", ["automatic", "manual"])
async def test_3d_secure_then_the_customer_is_back(world: World, method: str) -> None:
    await world.deliver(initiate(confirm=True, capture_method=method, payment_method="pm_card_threeDSecure2Required"))
    assert status(world) is PaymentStatus.REQUIRES_ACTION
    world.gateway.authenticate("pi_1")
    await world.webhook()
    assert status(world) is (PaymentStatus.COMPLETED if method == "automatic" else PaymentStatus.AUTHORIZED)
    world.check_books()


async def test_3d_secure_and_confirm_looks_instead_of_charging_again(world: World) -> None:
    await world.deliver(initiate(confirm=True, payment_method="pm_card_threeDSecure2Required"))
    await world.deliver(CONFIRM)
    assert status(world) is PaymentStatus.REQUIRES_ACTION
    world.gateway.authenticate("pi_1", passes=False)
    await world.deliver(again(CONFIRM, "2"))
    assert status(world) is PaymentStatus.FAILED
    assert [operation for operation, _ in world.gateway.calls] == ["create", "confirm", "retrieve", "retrieve"]


async def test_cancel_voids_at_the_gateway_first(world: World) -> None:
    await world.deliver(initiate())
    world.gateway.script("cancel", Fault.NOT_SENT)
    await world.deliver(CANCEL)
    assert status(world) is PaymentStatus.PENDING, "not CANCELLED before the gateway says so"
    await world.settle(days=0.1)
    assert status(world) is PaymentStatus.CANCELLED
    assert world.gateway.intents["pi_1"].status == "canceled"
    world.check_books()


async def test_cancel_meets_a_payment_that_was_quicker(world: World) -> None:
    await world.deliver(initiate())
    world.gateway.pay("pi_1", "pm_card_visa")
    await world.deliver(CANCEL)
    assert status(world) is PaymentStatus.COMPLETED
    assert world.told(PAYMENT_ID) == ["PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED"]
    world.check_books()


async def test_an_open_payment_expires_after_a_day(world: World) -> None:
    await world.deliver(initiate())
    await world.settle(days=0.9)
    assert status(world) is PaymentStatus.PENDING
    await world.settle(days=0.2)
    assert status(world) is PaymentStatus.CANCELLED
    assert world.gateway.intents["pi_1"].status == "canceled"


async def test_a_browser_confirmation_nobody_told_us_of_is_found_by_its_webhook(world: World) -> None:
    await world.deliver(initiate())
    world.gateway.pay("pi_1", "pm_card_visa")
    for _ in range(2):
        await world.webhook(order_id=None)
        await world.drain()
    assert world.told(PAYMENT_ID) == ["PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED"]
    world.check_books()


async def test_a_webhook_that_tells_nothing_new_costs_no_call(world: World) -> None:
    await world.deliver(CHARGE)
    calls = len(world.gateway.calls)
    await world.webhook()
    assert len(world.gateway.calls) == calls
    assert len(world.store.events) == 3


async def test_a_webhook_about_something_else_is_forgotten(world: World) -> None:
    await world.deliver(CHARGE)
    world.store.objects.clear()
    await world.webhook()
    assert len(world.store.events) == 3


async def test_a_look_up_for_a_webhook_that_fails_is_made_again(world: World) -> None:
    await world.deliver(initiate())
    world.gateway.pay("pi_1", "pm_card_visa")
    world.gateway.script("retrieve", Fault.NOT_SENT, Fault.LOST_BEFORE)
    await world.webhook()
    assert status(world) is PaymentStatus.PENDING
    await world.settle(days=0.1)
    assert status(world) is PaymentStatus.COMPLETED
    world.check_books()


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("operation", ["create", "confirm"])
async def test_a_charge_survives_each_fault(world: World, operation: str, fault: Fault) -> None:
    world.gateway.script(operation, fault)
    await world.deliver(CHARGE)
    world.check()
    await world.settle()
    assert status(world) is PaymentStatus.COMPLETED
    assert world.told(PAYMENT_ID) == ["PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED"]
    world.check_books()


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize(("operation", "command"), [("capture", CAPTURE), ("cancel", CANCEL)], ids=["capture", "cancel"])
async def test_a_capture_and_a_void_survive_each_fault(world: World, operation: str, command: Any, fault: Fault) -> None:
    await world.deliver(initiate(confirm=True, capture_method="manual"))
    world.gateway.script(operation, fault)
    await world.deliver(command)
    await world.settle()
    assert status(world) is (PaymentStatus.COMPLETED if operation == "capture" else PaymentStatus.CANCELLED)
    world.check_books()


async def test_a_gateway_that_is_away_for_good_fails_the_payment(world: World) -> None:
    world.gateway.script("create", *[Fault.NOT_SENT] * 20)
    await world.deliver(CHARGE)
    await world.settle()
    payment = world.payment(PAYMENT_ID)
    assert payment.status is PaymentStatus.FAILED
    assert payment.failure is not None
    assert payment.failure.code == "gateway_unavailable"
    assert not world.gateway.intents


async def test_an_unknown_outcome_is_never_failed(world: World) -> None:
    world.gateway.script("confirm", Fault.LOST_AFTER)
    world.gateway.script("retrieve", *[Fault.LOST_BEFORE] * 6)
    await world.deliver(CHARGE)
    payment = world.payment(PAYMENT_ID)
    assert (payment.status, payment.attempt.status) == (PaymentStatus.PROCESSING, AttemptStatus.UNKNOWN)
    await world.settle(days=1)
    assert status(world) is PaymentStatus.PROCESSING
    await world.settle(days=5)
    assert status(world) is PaymentStatus.COMPLETED
    world.check_books()


async def test_past_half_of_a_keys_life_nothing_is_posted_again(world: World) -> None:
    world.gateway.script("confirm", Fault.LOST_BEFORE)
    world.gateway.script("retrieve", *[Fault.LOST_BEFORE] * 4)
    await world.deliver(CHARGE)
    world.clock.advance(timedelta(hours=13))
    world.gateway.forget_keys()
    await world.settle()
    assert [operation for operation, _ in world.gateway.calls].count("confirm") == 1
    assert status(world) is PaymentStatus.PROCESSING


async def test_a_slow_gateway_uses_up_one_budget_for_all_calls(world: World) -> None:
    world.deps = replace(world.deps, budget_s=0.0)
    await world.deliver(CHARGE)
    assert [operation for operation, _ in world.gateway.calls] == ["create"]
    assert world.payment(PAYMENT_ID).attempt.status is AttemptStatus.NOT_SENT


async def test_a_second_payment_of_the_order_is_refused(world: World) -> None:
    await world.deliver(CHARGE)
    second = again(CHARGE, "second", payment_id=derived_id("second"))
    await world.deliver(second)
    refusal = world.store.decided[second.event_id]
    assert refusal is not None
    assert refusal.code == "order_has_payment"
    assert len(world.gateway.intents) == 1


@pytest.mark.parametrize(
    "message",
    [
        PaymentInitiated(
            event_id="e", order_id="ord_1", payment_id="p", user_id="u", occurred_at=NOW, correlation_id="c", gateway="stripe", currency="EUR",
            amount_minor=1, capture_method="automatic",
        ),
    ],
)  # fmt: skip
async def test_what_does_not_belong_here_is_poison(world: World, message: Any) -> None:
    with pytest.raises(Rejected, match="does not belong"):
        await world.deliver(message)


async def test_a_command_under_another_orders_key_is_poison(world: World) -> None:
    received = Received(topic="payment-commands", partition=0, offset=0, timestamp_ms=None, key=b"ord_2", value=b"")
    with pytest.raises(Rejected, match="order would not hold"):
        await handle(received, CHARGE, world.deps)


JOURNEYS: dict[str, list[Any]] = {
    "charge": [CHARGE],
    "intent, confirm": [initiate(), CONFIRM],
    "decline, another card": [initiate(confirm=True, payment_method="pm_card_chargeDeclined"), OTHER_CARD],
    "manual, capture": [initiate(confirm=True, capture_method="manual"), CAPTURE],
    "manual, cancel": [initiate(confirm=True, capture_method="manual"), CANCEL],
    "intent, cancel": [initiate(), CANCEL],
}


async def run(journey: list[Any], world: World) -> World:
    for command in journey:
        await world.deliver(command)
    await world.settle()
    return world


DECLINED_CARD = {"payment_method": "pm_card_chargeDeclined"}
QUICKER_WEBHOOKS: dict[str, tuple[list[Command], Command]] = {
    "a charge": ([], CHARGE),
    "a hold": ([], initiate(confirm=True, capture_method="manual")),
    "a decline": ([], initiate(confirm=True, **DECLINED_CARD)),
    "a declined other card": ([initiate(confirm=True, **DECLINED_CARD)], replace(OTHER_CARD, **DECLINED_CARD)),
    "a capture": ([initiate(confirm=True, capture_method="manual")], CAPTURE),
    "a cancel": ([initiate(confirm=True, capture_method="manual")], CANCEL),
}


@pytest.mark.parametrize("name", QUICKER_WEBHOOKS)
async def test_a_webhook_that_is_quicker_than_the_command_coming_again(world: World, name: str) -> None:
    """The process ends when the gateway has done it; the webhook is handled first. The command was carried out: neither refused, nor done again."""
    before, command = QUICKER_WEBHOOKS[name]
    for earlier in before:
        await world.deliver(earlier)
    world.crash_at = lambda point, _: point == "payments.after_charge"
    with pytest.raises(Crash):
        await world.deliver(command, lives=1)
    world.crash_at = lambda *_: False
    await world.webhook(gateway_id=f"pi_{len(world.gateway.intents)}")
    calls, told = len(world.gateway.calls), world.told(PAYMENT_ID)
    assert world.store.decided[command.event_id] is None
    await world.deliver(command)
    assert world.store.decided[command.event_id] is None
    assert (len(world.gateway.calls), world.told(PAYMENT_ID)) == (calls, told)
    world.check_books()


@pytest.mark.parametrize("name", JOURNEYS)
async def test_a_crash_at_any_point_changes_nothing_but_time(name: str) -> None:
    calm = await run(JOURNEYS[name], World())
    points = len(calm.passed)
    assert points >= 5
    for place in range(1, points + 1):
        struck = await run(JOURNEYS[name], World(crash_at=lambda _, n, place=place: n == place))
        assert struck.crashes == 1
        assert struck.told(PAYMENT_ID) == calm.told(PAYMENT_ID)
        assert struck.payment(PAYMENT_ID).status is calm.payment(PAYMENT_ID).status
        struck.check_books()


ACTIONS = st.sampled_from(
    [
        "charge",
        "intent",
        "confirm",
        "other card",
        "capture",
        "capture part",
        "cancel",
        "expire",
        "webhook",
        "stray webhook",
        "browser",
        "3ds",
        "wait",
        "days",
    ]
)
FAULTS = st.lists(st.tuples(st.sampled_from(["create", "confirm", "capture", "cancel", "retrieve"]), st.sampled_from([None, *Fault])), max_size=8)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=st.lists(ACTIONS, min_size=1, max_size=12),
    faults=FAULTS,
    crashes=st.sets(st.integers(min_value=1, max_value=60), max_size=4),
    card=st.sampled_from(["pm_card_visa", "pm_card_chargeDeclined", "pm_card_threeDSecure2Required"]),
    manual=st.booleans(),
)
async def test_the_books_equal_the_ledger_after_anything(
    actions: list[str], faults: list[tuple[str, Fault | None]], crashes: set[int], card: str, manual: bool
) -> None:
    world = World(crash_at=lambda _, n: n in crashes)
    for operation, fault in faults:
        world.gateway.script(operation, fault)
    fields: dict[str, Any] = {"payment_method": card, "capture_method": "manual" if manual else "automatic"}
    for n, action in enumerate(actions):
        await act(world, action, n, fields)
        world.check()
    await world.settle(days=0.3)
    world.gateway._faults.clear()
    for gateway_id in list(world.gateway.intents):
        await world.webhook(gateway_id=gateway_id)
    await world.settle(days=10)
    world.check_books()


async def act(world: World, action: str, n: int, fields: dict[str, Any]) -> None:
    intents = list(world.gateway.intents)
    payment = world.store.payments.get(PAYMENT_ID)
    known = payment.attempt.gateway_id if payment else None  # nobody has the client secret of an object whose id we never learnt
    match action:
        case "charge" | "intent":
            await world.deliver(initiate(confirm=action == "charge", **fields))
        case "confirm":
            await world.deliver(again(CONFIRM, str(n)))
        case "other card":
            await world.deliver(again(OTHER_CARD, str(n)))
        case "capture" | "capture part":
            await world.deliver(again(COMMANDS["capture" if action == "capture" else "capture a part"], str(n)))
        case "cancel" | "expire":
            await world.deliver(again(COMMANDS[action], str(n)))
        case "webhook" | "stray webhook" if intents:
            await world.webhook(gateway_id=intents[n % len(intents)], order_id="ord_1" if action == "webhook" else None)
            await world.drain()
        case "browser" if known and world.gateway.intents[known].status in ("requires_confirmation", "requires_payment_method"):
            world.gateway.pay(known, "pm_card_visa")
        case "3ds" if known and world.gateway.intents[known].status == "requires_action":
            world.gateway.authenticate(known, passes=n % 3 != 0)
        case "wait":
            await world.settle(days=0.0005)
        case "days":
            await world.settle(days=0.5)
