"""`Prefer: wait=N`: the answer is held until there is an outcome, or N seconds are over."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from api.intake import read_wait
from infra.gateways.fake import Fault
from infra.settings import Settings
from tests.api.world import BODY, World, opened_world
from tests.own_redis import OwnRedis


@pytest.mark.unit
@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("wait=10", 10),
        ("respond-async, wait=10", 10),
        ('WAIT="7"; foo=bar', 7),
        ("wait = 5", 5),
        ("wait=31", 30),
        ("wait=99999999999", 30),
        ("wait=0", 0),
        ("wait", 0),
        ("wait=", 0),
        ("wait=-1", 0),
        ("wait=1.5", 0),
        ("wait=²", 0),
        ("wait=x, wait=3", 3),
        ("handling=lenient", 0),
    ],
)
def test_a_preference_is_read_or_there_is_none(header: str | None, seconds: int) -> None:
    assert read_wait(header) == seconds


@pytest.mark.integration
async def test_a_payment_is_answered_when_it_is_made(world: World) -> None:
    world.at_work = True
    answer = await world.post("/payments/process", BODY, wait=20)
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=20"
    payment = answer.json()
    assert (payment["status"], payment["captured_minor"], payment["client_secret"]) == ("COMPLETED", 1999, None)
    assert answer.headers["location"] == f"/api/v1/payments/{payment['payment_id']}"


@pytest.mark.integration
async def test_a_decline_is_an_outcome(world: World) -> None:
    world.at_work = True
    answer = await world.post("/payments/process", {**BODY, "payment_method": "pm_card_chargeDeclinedInsufficientFunds"}, wait=20)
    assert answer.status_code == 200
    assert answer.json()["status"] == "FAILED"
    assert answer.json()["failure"] == {"code": "insufficient_funds", "message": "Your card has insufficient funds.", "advice": "retry"}


@pytest.mark.integration
async def test_a_client_secret_is_an_outcome(world: World) -> None:
    world.at_work = True
    answer = await world.post("/payments/intent", {"order_id": "order-1", "amount_minor": 5, "currency": "EUR"}, wait=20)
    assert (answer.status_code, answer.json()["status"], answer.json()["client_secret"]) == (200, "PENDING", "pi_1_secret")


@pytest.mark.integration
async def test_a_redirect_is_an_outcome(world: World) -> None:
    world.at_work = True
    body = {**BODY, "payment_method": "pm_card_threeDSecure2Required", "return_url": "https://shop.example/back"}
    answer = await world.post("/payments/process", body, wait=20)
    assert (answer.status_code, answer.json()["status"]) == (200, "REQUIRES_ACTION")
    assert answer.json()["next_action"] == {"type": "redirect_to_url", "redirect_url": "https://shop.example/back?3ds"}


@pytest.mark.integration
async def test_a_refusal_in_time_is_told(world: World) -> None:
    world.at_work = True
    await world.post("/payments/process", BODY, key="k1", wait=20)
    refused = await world.post("/payments/process", BODY, key="k2", wait=20)
    problem = refused.json()
    assert (refused.status_code, problem["code"], problem["type"]) == (409, "order_has_payment", "/problems/command_refused")
    assert problem["detail"]
    again = await world.post("/payments/process", BODY, key="k2")
    assert (again.status_code, again.json()["code"]) == (409, "order_has_payment")
    assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.integration
async def test_a_capture_is_answered_when_the_money_is_taken(world: World) -> None:
    world.at_work = True
    payment_id = (await world.post("/payments/process", {**BODY, "capture_method": "manual"}, wait=20)).json()["payment_id"]
    answer = await world.post(f"/payments/{payment_id}/capture", {"amount_minor": 1000}, wait=20)
    assert (answer.status_code, answer.json()["status"], answer.json()["captured_minor"]) == (200, "COMPLETED", 1000)


@pytest.mark.integration
async def test_without_an_outcome_in_time_the_command_is_taken(world: World) -> None:
    began = time.monotonic()
    answer = await world.post("/payments/process", BODY, key="k1", wait=1)
    assert time.monotonic() - began >= 1
    assert (answer.status_code, answer.json()["status"]) == (202, "PENDING")
    assert answer.headers["preference-applied"] == "wait=1"
    await world.work()
    again = await world.post("/payments/process", BODY, key="k1", wait=20)
    assert (again.status_code, again.json()["status"]) == (202, "COMPLETED"), "the first answer's status, today's state"


@pytest.mark.integration
async def test_an_unknown_outcome_is_none(world: World) -> None:
    world.at_work = True
    world.gateway.script("confirm", Fault.LOST_AFTER)
    answer = await world.post("/payments/process", BODY, wait=1)
    assert (answer.status_code, answer.json()["status"]) == (202, "PROCESSING")


@pytest.mark.integration
async def test_a_repeat_gets_the_first_answer_s_status_and_today_s_state(world: World) -> None:
    world.at_work = True
    first = await world.post("/payments/process", {**BODY, "capture_method": "manual"}, key="k1", wait=20)
    assert (first.status_code, first.json()["status"]) == (200, "AUTHORIZED")
    await world.post(f"/payments/{first.json()['payment_id']}/capture", {}, wait=20)
    again = await world.post("/payments/process", {**BODY, "capture_method": "manual"}, key="k1")
    assert (again.status_code, again.json()["status"]) == (200, "COMPLETED")
    assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.integration
async def test_a_repeat_of_a_request_that_was_never_answered_waits_like_the_first(world: World) -> None:
    world.producer.silent = True
    assert (await world.post("/payments/process", BODY, key="k1", wait=20)).status_code == 503
    world.producer.silent = False
    world.at_work = True
    answer = await world.post("/payments/process", BODY, key="k1", wait=20)
    assert (answer.status_code, answer.json()["status"]) == (200, "COMPLETED")
    assert world.charged() == 1


@pytest.mark.integration
async def test_while_one_waits_a_repeat_is_told_so(world: World) -> None:
    first = asyncio.create_task(world.post("/payments/process", BODY, key="k1", wait=20))
    async with asyncio.timeout(10):
        while not world.produced():
            await asyncio.sleep(0.01)
    assert (await world.post("/payments/process", BODY, key="k1")).json()["code"] == "request_in_flight"
    await world.work()
    assert (await first).status_code == 200


@pytest.mark.integration
async def test_an_announcement_ends_the_wait_at_once(world: World) -> None:
    waiting = asyncio.create_task(world.post("/payments/process", BODY, key="k1", wait=20))
    async with asyncio.timeout(10):
        while not world.produced():
            await asyncio.sleep(0.01)
    await world.work()
    answered = time.monotonic()
    assert (await waiting).status_code == 200
    assert time.monotonic() - answered < 0.9, "sooner than the next look"


@pytest.mark.integration
async def test_without_redis_looking_is_enough(database: Settings, tmp_path: Path) -> None:
    nowhere = OwnRedis(tmp_path).settings
    async with opened_world(database.model_copy(update={"redis": nowhere})) as world:
        world.at_work = True
        answer = await world.post("/payments/process", BODY, wait=20)
        assert (answer.status_code, answer.json()["status"]) == (200, "COMPLETED")


@pytest.mark.integration
async def test_only_so_many_may_wait(database: Settings) -> None:
    async with opened_world(database, max_waiters=1) as world:
        waiting = asyncio.create_task(world.post("/payments/process", BODY, wait=20))
        async with asyncio.timeout(10):
            while not world.produced():
                await asyncio.sleep(0.01)
        answer = await world.post("/payments/process", {**BODY, "order_id": "order-2"}, wait=20)
        assert answer.status_code == 202
        assert "preference-applied" not in answer.headers
        await world.work()
        assert (await waiting).status_code == 200
        world.at_work = True
        assert (await world.post("/payments/process", {**BODY, "order_id": "order-3"}, wait=20)).status_code == 200


@pytest.mark.integration
async def test_a_process_that_ends_lets_go_of_who_waits(world: World) -> None:
    waiting = asyncio.create_task(world.post("/payments/process", BODY, wait=30))
    async with asyncio.timeout(10):
        while not world.produced():
            await asyncio.sleep(0.01)
    world.intake.stop_waiting()
    async with asyncio.timeout(5):
        answer = await waiting
    assert answer.status_code == 202
    assert (await world.post("/payments/process", {**BODY, "order_id": "order-2"}, wait=30)).status_code == 202
