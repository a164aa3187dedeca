"""One idempotency key is one payment, with Redis up, down or wiped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from api.errors import Problem
from api.intake import read_idempotency_key
from infra.settings import Settings
from producers.producer import Placed, Record
from tests.api.world import BODY, World, opened_world
from tests.own_redis import OwnRedis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    server = OwnRedis(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def world_with_own_redis(database: Settings, own_redis: OwnRedis) -> AsyncIterator[World]:
    async with opened_world(database.model_copy(update={"redis": own_redis.settings})) as opened:
        yield opened


# ── The header ──


@pytest.mark.unit
@pytest.mark.parametrize(
    ("header", "key"),
    [
        (None, None),
        ("8e03978e-40d5", "8e03978e-40d5"),
        ('"8e03978e-40d5"', "8e03978e-40d5"),
        ('  "a b"  ', "a b"),
        (r'"say \"hi\" \\"', r'say "hi" \ '.strip()),
        ("x" * 255, "x" * 255),
        ('"' + "x" * 255 + '"', "x" * 255),
        ('a"b', 'a"b'),
    ],
)
def test_a_key_is_read_quoted_or_bare(header: str | None, key: str | None) -> None:
    assert read_idempotency_key(header) == key


@pytest.mark.unit
@pytest.mark.parametrize("header", ["", "  ", '""', '"open', '"a"b"', r'"\x"', "x" * 256, "schlüssel", "a\nb", "a\tb"])
def test_what_is_no_key_is_turned_away(header: str) -> None:
    with pytest.raises(Problem) as raised:
        read_idempotency_key(header)
    assert raised.value.kind == "idempotency_key_invalid"


# ── The same key ──


@pytest.mark.integration
async def test_the_same_request_gets_the_same_answer(world: World) -> None:
    first = await world.post("/payments/process", BODY, key="k1")
    second = await world.post("/payments/process", dict(reversed(BODY.items())), key='"k1"')
    assert (second.status_code, second.json()) == (first.status_code, first.json())
    assert second.headers["idempotent-replayed"] == "true"
    await world.work()
    third = await world.post("/payments/process", BODY, key="k1")
    assert third.status_code == 202
    assert third.json() == {**first.json(), "status": "COMPLETED"}
    assert world.charged() == 1


@pytest.mark.integration
async def test_another_request_with_the_same_key_is_an_error(world: World) -> None:
    await world.post("/payments/process", BODY, key="k1")
    for changed in ({**BODY, "amount_minor": 2000}, {**BODY, "order_id": "order-2"}, {**BODY, "description": "x"}):
        answer = await world.post("/payments/process", changed, key="k1")
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert len(world.produced()) == 1
    assert await world.rows("SELECT order_id FROM order_owners") == [("order-1",)]


@pytest.mark.integration
async def test_a_key_is_its_principal_s_and_its_route_s_own(world: World) -> None:
    one = await world.post("/payments/process", BODY, key="k1")
    other_user = await world.post("/payments/process", {**BODY, "order_id": "order-2"}, key="k1", user="u2")
    other_route = await world.post("/payments/intent", {**BODY, "order_id": "order-3"}, key="k1")
    assert {answer.status_code for answer in (one, other_user, other_route)} == {202}
    assert len({answer.json()["payment_id"] for answer in (one, other_user, other_route)}) == 3


@pytest.mark.integration
async def test_a_key_for_a_capture_is_for_that_payment(world: World) -> None:
    held = {**BODY, "capture_method": "manual"}
    one = (await world.post("/payments/process", held)).json()["payment_id"]
    other = (await world.post("/payments/process", {**held, "order_id": "order-2"})).json()["payment_id"]
    assert (await world.post(f"/payments/{one}/capture", {}, key="k1")).status_code == 202
    assert (await world.post(f"/payments/{other}/capture", {}, key="k1")).json()["code"] == "idempotency_key_reused"


@pytest.mark.integration
async def test_while_the_first_is_under_way_the_second_has_to_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    send, reached, go_on = world.producer.send, asyncio.Event(), asyncio.Event()

    async def slow_send(record: Record) -> Placed:
        reached.set()
        await go_on.wait()
        return await send(record)

    monkeypatch.setattr(world.producer, "send", slow_send)
    first = asyncio.create_task(world.post("/payments/process", BODY, key="k1"))
    async with asyncio.timeout(10):
        await reached.wait()
    second = await world.post("/payments/process", BODY, key="k1")
    assert (second.status_code, second.json()["code"], second.json()["retryable"]) == (409, "request_in_flight", True)
    assert int(second.headers["retry-after"]) > 0
    go_on.set()
    assert (await first).status_code == 202
    assert (await world.post("/payments/process", BODY, key="k1")).status_code == 202


# ── Without a key ──


@pytest.mark.integration
async def test_without_a_key_the_order_and_the_body_are_one(world: World) -> None:
    first = await world.post("/payments/process", BODY)
    again = await world.post("/payments/process", BODY)
    other = await world.post("/payments/process", {**BODY, "amount_minor": 2000})
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert other.json()["payment_id"] != first.json()["payment_id"]


@pytest.mark.integration
async def test_without_a_key_and_without_an_order_nothing_is_taken(world: World) -> None:
    body = {name: value for name, value in BODY.items() if name != "order_id"}
    answer = await world.post("/payments/process", body)
    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_key_required")
    assert "Idempotency-Key" in answer.json()["detail"]


@pytest.mark.integration
async def test_a_retry_after_a_decline_is_another_command(world: World) -> None:
    payment_id = (await world.post("/payments/process", {**BODY, "payment_method": "pm_card_chargeDeclined"})).json()["payment_id"]
    await world.work()
    confirm = {"payment_id": payment_id, "payment_method": "pm_card_chargeDeclined"}
    first = await world.post("/payments/confirm", confirm)
    repeat = await world.post("/payments/confirm", confirm)
    assert repeat.json()["command_id"] == first.json()["command_id"]
    await world.work()
    repeat = await world.post("/payments/confirm", confirm)
    assert "idempotent-replayed" not in repeat.headers, "the card was declined again: this is a third try"
    assert repeat.json()["command_id"] != first.json()["command_id"]
    await world.work()
    assert [intent.attempt for intent in world.gateway.intents.values()] == [1, 2, 3]


@pytest.mark.integration
async def test_a_confirmation_before_the_payment_is_opened_is_the_same_as_after(world: World) -> None:
    payment_id = (await world.post("/payments/intent", {"order_id": "order-1", "amount_minor": 5, "currency": "EUR"})).json()["payment_id"]
    confirm = {"payment_id": payment_id, "payment_method": "pm_card_visa"}
    early = await world.post("/payments/confirm", confirm)
    await world.work()
    late = await world.post("/payments/confirm", confirm)
    assert late.json()["command_id"] == early.json()["command_id"]
    assert late.headers["idempotent-replayed"] == "true"


# ── Redis does not matter ──


@pytest.mark.integration
@pytest.mark.parametrize("what", ["stop", "flush", "hang", "stop before"])
async def test_one_key_is_one_payment_whatever_becomes_of_redis(world_with_own_redis: World, own_redis: OwnRedis, what: str) -> None:
    world = world_with_own_redis
    if what == "stop before":
        own_redis.stop()
    first = await world.post("/payments/process", BODY, key="k1")
    match what:
        case "stop":
            own_redis.stop()
        case "flush":
            own_redis.flush()
        case "hang":
            own_redis.hang()
    try:
        second = await world.post("/payments/process", BODY, key="k1")
        assert (second.status_code, second.json()) == (202, first.json())
        assert second.headers["idempotent-replayed"] == "true"
        assert (await world.post("/payments/process", {**BODY, "amount_minor": 1}, key="k1")).json()["code"] == "idempotency_key_reused"
        assert len({record.value for record in world.produced()}) == 1, "the same bytes again"
        await world.work()
        third = await world.post("/payments/process", BODY, key="k1")
        assert third.json() == {**first.json(), "status": "COMPLETED"}
    finally:
        if what == "hang":
            own_redis.go_on()
    assert world.charged() == 1
    assert await world.rows("SELECT count(*) FROM payments") == [(1,)]


@pytest.mark.integration
async def test_many_at_once_without_redis_are_one_payment(world_with_own_redis: World, own_redis: OwnRedis) -> None:
    world = world_with_own_redis
    own_redis.stop()
    answers = await asyncio.gather(*(world.post("/payments/process", BODY, key="k1") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["payment_id"] for answer in answers}) == 1
    assert len({record.value for record in world.produced()}) == 1
    await world.work()
    assert world.charged() == 1


@pytest.mark.integration
async def test_redis_saves_a_repeat_the_way_to_kafka(world_with_own_redis: World, own_redis: OwnRedis) -> None:
    world = world_with_own_redis
    await world.post("/payments/process", BODY, key="k1")
    await world.post("/payments/process", BODY, key="k1")
    assert len(world.produced()) == 1, "Redis knows that it was acknowledged"
    own_redis.flush()
    await world.post("/payments/process", BODY, key="k1")
    assert len(world.produced()) == 2, "nobody knows, so it is produced again"


@pytest.mark.integration
async def test_redis_is_not_believed_when_postgres_knows_nothing(world_with_own_redis: World) -> None:
    world = world_with_own_redis
    await world.post("/payments/process", BODY, key="k1")
    await world.rows("DELETE FROM commands RETURNING 1")
    answer = await world.post("/payments/process", BODY, key="k1")
    assert answer.status_code == 202
    assert "idempotent-replayed" not in answer.headers
    assert len(world.produced()) == 2
