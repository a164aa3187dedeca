"""The way of a command into Kafka: what it becomes, who may send it, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import pytest

from infra.crash_points import plugged
from infra.settings import Settings
from schemas.messages import CancelPayment, CapturePayment, ConfirmPayment, InitiatePayment
from tests.api.world import BODY, World, opened_world

pytestmark = pytest.mark.integration


async def test_a_command_is_taken(world: World) -> None:
    answer = await world.post("/payments/process", BODY, key="k1")
    assert answer.status_code == 202
    taken = answer.json()
    payment_id = taken["payment_id"]
    assert taken == {
        "payment_id": payment_id,
        "order_id": "order-1",
        "command_id": payment_id,
        "status": "PENDING",
        "links": {
            "self": f"/api/v1/payments/{payment_id}",
            "events": f"/api/v1/payments/{payment_id}/events",
            "command": f"/api/v1/commands/{payment_id}",
            "order": "/api/v1/payments/order/order-1",
        },
    }
    assert answer.headers["location"] == f"/api/v1/payments/{payment_id}"
    assert "idempotent-replayed" not in answer.headers


async def test_what_was_asked_is_what_is_on_kafka(world: World) -> None:
    body = {
        **BODY,
        "currency": "eur",
        "capture_method": "manual",
        "return_url": "https://shop.example/back",
        "description": "Dinner for two",
        "metadata": {"table": "7"},
    }
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await world.post("/payments/process", body, key="k1", headers={"traceparent": traceparent})
    (record,) = world.produced()
    message = world.codec.decode(record.value)
    assert isinstance(message, InitiatePayment)
    assert (message.event_id, message.payment_id) == (answer.json()["payment_id"],) * 2
    assert (message.order_id, message.user_id, message.amount_minor, message.currency) == ("order-1", "u1", 1999, "EUR")
    assert (message.gateway, message.payment_method, message.capture_method, message.confirm) == ("stripe", "pm_card_visa", "manual", True)
    assert (message.return_url, message.description, message.metadata) == ("https://shop.example/back", "Dinner for two", {"table": "7"})
    assert message.correlation_id == "0af7651916cd43dd8448eb211c80319c" == answer.headers["x-request-id"]
    headers = dict(record.headers)
    assert record.key == b"order-1"
    assert headers["ce_type"] == b"InitiatePayment"
    assert headers["ce_id"].decode() == message.event_id
    assert headers["traceparent"].decode() == traceparent


async def test_an_order_without_a_name_is_named_after_its_payment(world: World) -> None:
    body = {name: value for name, value in BODY.items() if name != "order_id"}
    taken = (await world.post("/payments/process", body, key="k1")).json()
    assert taken["order_id"] == f"ord_{UUID(taken['payment_id']).hex}"


async def test_an_intent_is_confirmed_later(world: World) -> None:
    intent = {"order_id": "order-1", "amount_minor": 1999, "currency": "EUR"}
    payment_id = (await world.post("/payments/intent", intent)).json()["payment_id"]
    await world.work()
    answer = await world.post("/payments/confirm", {"payment_id": payment_id, "payment_method": "pm_card_visa"})
    assert answer.status_code == 202
    assert answer.json()["order_id"] == "order-1"
    confirm = world.codec.decode(world.produced()[-1].value)
    assert isinstance(confirm, ConfirmPayment)
    assert (confirm.payment_id, confirm.order_id, confirm.payment_method) == (payment_id, "order-1", "pm_card_visa")
    assert confirm.event_id != payment_id
    await world.work()
    assert (await world.get(f"/payments/{payment_id}")).json()["status"] == "COMPLETED"


async def test_a_hold_is_captured_in_part_and_another_one_cancelled(world: World) -> None:
    held = {**BODY, "capture_method": "manual"}
    first = (await world.post("/payments/process", held)).json()["payment_id"]
    second = (await world.post("/payments/process", {**held, "order_id": "order-2"})).json()["payment_id"]
    await world.work()
    assert (await world.post(f"/payments/{first}/capture", {"amount_minor": 1500})).status_code == 202
    assert (await world.post(f"/payments/{second}/cancel", {"reason": "out of stock"})).status_code == 202
    capture, cancel = (world.codec.decode(record.value) for record in world.produced() if b"Initiate" not in dict(record.headers)["ce_type"])
    if isinstance(capture, CancelPayment):
        capture, cancel = cancel, capture
    assert isinstance(capture, CapturePayment)
    assert isinstance(cancel, CancelPayment)
    assert capture.amount_minor == 1500
    assert cancel.reason == "out of stock"
    await world.work()
    assert (await world.get(f"/payments/{first}")).json()["captured_minor"] == 1500
    assert (await world.get(f"/payments/{second}")).json()["status"] == "CANCELLED"


async def test_capture_and_cancel_need_no_body(world: World) -> None:
    payment_id = (await world.post("/payments/process", {**BODY, "capture_method": "manual"})).json()["payment_id"]
    await world.work()
    assert (await world.client.post(f"/api/v1/payments/{payment_id}/capture", headers=world.bearer())).status_code == 202
    await world.work()
    assert (await world.get(f"/payments/{payment_id}")).json()["captured_minor"] == 1999


# ── Whose it is ──


@pytest.mark.parametrize("path", ["/payments/confirm", "/payments/{}/capture", "/payments/{}/cancel"])
async def test_what_is_somebody_else_s_does_not_exist(world: World, path: str) -> None:
    payment_id = (await world.post("/payments/process", BODY)).json()["payment_id"]
    for user, asked_for in (("u2", payment_id), ("u1", str(uuid4()))):
        body = {"payment_id": asked_for} if path.endswith("confirm") else {}
        answer = await world.post(path.format(asked_for), body, user=user)
        assert (answer.status_code, answer.json()["code"]) == (404, "payment_not_found")
    assert len(world.produced()) == 1


async def test_an_order_is_its_first_principal_s(world: World) -> None:
    await world.post("/payments/process", BODY)
    answer = await world.post("/payments/process", BODY, user="u2")
    assert (answer.status_code, answer.json()["code"]) == (404, "order_not_found")
    assert len(world.produced()) == 1


async def test_an_administrator_moves_nobody_s_money(world: World) -> None:
    payment_id = (await world.post("/payments/process", BODY)).json()["payment_id"]
    answer = await world.client.post(f"/api/v1/payments/{payment_id}/cancel", headers=world.bearer("root", "admin"))
    assert answer.status_code == 404


async def test_a_payment_that_was_never_opened_takes_no_commands(world: World) -> None:
    await world.post("/payments/process", BODY, key="k1")
    refused = (await world.post("/payments/process", BODY, key="k2")).json()["payment_id"]
    await world.work()
    answer = await world.post("/payments/confirm", {"payment_id": refused})
    assert (answer.status_code, answer.json()["code"]) == (404, "payment_refused")


# ── What is not taken ──


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"amount_minor": 0}, "amount_minor"),
        ({"amount_minor": -5}, "amount_minor"),
        ({"amount_minor": 100_000_001}, "amount_minor"),
        ({"amount_minor": "1999"}, "amount_minor"),
        ({"currency": "EUX"}, "currency"),
        ({"order_id": "order 1"}, "order_id"),
        ({"order_id": "x" * 65}, "order_id"),
        ({"payment_method": None}, "payment_method"),
        ({"surprise": 1}, "surprise"),
        ({"currency": "KWD", "amount_minor": 1001}, "amount_minor"),
    ],
)
async def test_a_wrong_field_is_named_with_what_would_be_right(world: World, changed: Mapping[str, Any], field: str) -> None:
    answer = await world.post("/payments/process", {**BODY, **changed})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "validation_failed")
    assert answer.headers["content-type"] == "application/problem+json"
    (error,) = problem["errors"]
    assert error["field"] == field
    assert error["message"]
    assert error["expected"]
    assert await world.rows("SELECT 1 FROM commands") == []


async def test_a_gateway_that_is_not_configured_is_named(world: World) -> None:
    answer = await world.post("/payments/process", {**BODY, "gateway": "paypal"})
    assert (answer.status_code, answer.json()["code"]) == (400, "gateway_not_configured")
    assert "stripe" in answer.json()["detail"]


async def test_a_card_number_is_turned_away_and_is_nowhere(world: World) -> None:
    for body in (
        {**BODY, "description": "my card is 4242-4242 4242 4242, thank you"},
        {**BODY, "metadata": {"5555555555554444": "x"}},
        {**BODY, "payment_method": "4000000000000002"},
        {**BODY, "amount_minor": 4242424242424242},
        {**BODY, "4242424242424242": None},
    ):
        answer = await world.post("/payments/process", body)
        assert (answer.status_code, answer.json()["code"]) == (400, "card_number")
        assert "4242" not in answer.text
        assert "5555" not in answer.text
    assert "4242" not in world.log.getvalue()
    assert world.produced() == []


async def test_a_body_may_have_so_many_bytes_declared_or_not(world: World) -> None:
    url, headers = "/api/v1/payments/process", {**world.bearer(), "Content-Type": "application/json"}

    async def endless() -> Any:
        while True:
            yield b" " * 4096

    declared = await world.client.post(url, content=b" " * (64 * 1024 + 1), headers=headers)
    assert (declared.status_code, declared.json()["code"]) == (413, "body_too_large")
    chunked = await world.client.post(url, content=endless(), headers=headers)
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff", b"[]", b'"x"', b"1", b"null", b'{"amount_minor": NaN}', b"[" * 5000, b'{"order_id": "\\ud800"}']
)
async def test_what_is_no_json_object_is_malformed(world: World, body: bytes) -> None:
    answer = await world.client.post("/api/v1/payments/process", content=body, headers={**world.bearer(), "Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_json")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_body_of_another_type_is_not_read(world: World, content_type: str | None) -> None:
    headers = world.bearer() | ({"Content-Type": content_type} if content_type else {})
    answer = await world.client.post("/api/v1/payments/process", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


async def test_without_a_token_nothing_is_read(world: World) -> None:
    answer = await world.client.post("/api/v1/payments/process", content=b"not even JSON")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_an_order_with_too_many_commands_has_to_wait(database: Settings) -> None:
    async with opened_world(database, max_undecided_commands=2) as world:
        for key in ("k1", "k2"):
            assert (await world.post("/payments/process", BODY, key=key)).status_code == 202
        answer = await world.post("/payments/process", BODY, key="k3")
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (429, "too_many_undecided", True)
        assert int(answer.headers["retry-after"]) > 0
        assert (await world.post("/payments/process", BODY, key="k2")).status_code == 202
        await world.work()
        assert (await world.post("/payments/process", BODY, key="k3")).status_code == 202


# ── When a part of us is away ──


async def test_with_kafka_away_nothing_is_promised(world: World) -> None:
    world.producer.away = True
    answer = await world.post("/payments/process", BODY, key="k1")
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "outcome_unknown", True)
    assert int(answer.headers["retry-after"]) > 0
    world.producer.away = False
    answer = await world.post("/payments/process", BODY, key="k1")
    assert answer.status_code == 202
    await world.work()
    assert world.charged() == 1


async def test_an_acknowledgement_that_got_lost_charges_nobody_twice(world: World) -> None:
    world.producer.silent = True
    assert (await world.post("/payments/process", BODY, key="k1")).status_code == 503
    await world.work()
    world.producer.silent = False
    answer = await world.post("/payments/process", BODY, key="k1")
    assert (answer.status_code, answer.json()["status"]) == (202, "COMPLETED")
    await world.work()
    assert world.charged() == 1
    assert len(world.produced()) == 1, "what is decided is not produced again"


async def test_with_postgres_away_nothing_is_taken(world: World) -> None:
    await world.pool.close()
    answer = await world.post("/payments/process", BODY, key="k1")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "Postgres" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) > 0
    assert world.produced() == []


async def test_without_schemas_nothing_is_taken(world: World) -> None:
    world.down.add("codec")
    answer = await world.post("/payments/process", BODY, key="k1")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert await world.rows("SELECT 1 FROM commands") == []


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("point", ["api.after_accept", "producer.before_send", "producer.after_ack", "api.after_produce"])
async def test_a_request_that_broke_off_anywhere_is_sent_again_and_charged_once(world: World, point: str) -> None:
    async def cut(passed: str) -> None:
        if passed == point:
            raise PowerCut

    with plugged(cut):
        answer = await world.post("/payments/process", BODY, key="k1")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "PowerCut" not in answer.text
    assert answer.json()["trace_id"] in next(line for line in world.log.getvalue().splitlines() if "PowerCut" in line)
    answer = await world.post("/payments/process", BODY, key="k1")
    assert answer.status_code == 202
    await asyncio.gather(world.work(), world.work())
    assert world.charged() == 1
    assert (await world.get(f"/payments/{answer.json()['payment_id']}")).json()["status"] == "COMPLETED"
