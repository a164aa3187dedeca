"""Webhooks: verified, kept raw, acknowledged before they are answered."""

from __future__ import annotations

from dataclasses import replace

import httpx2
import pytest
from prometheus_client import REGISTRY

from infra.settings import Settings, Stripe
from schemas.messages import WebhookReceived, derived_id
from tests.api.world import BODY, World, opened_world

pytestmark = pytest.mark.integration


async def a_webhook(world: World, event_type: str = "payment_intent.succeeded") -> tuple[bytes, str]:
    await world.post("/payments/process", BODY)
    await world.work()
    return world.gateway.webhook("pi_1", event_type)


async def send(world: World, body: bytes, signature: str | None) -> httpx2.Response:
    headers = {"Stripe-Signature": signature} if signature is not None else {}
    return await world.client.post("/api/v1/webhooks/stripe", content=body, headers=headers)


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("paystream_intake_webhooks_total", {"gateway": "stripe", "outcome": outcome}) or 0


async def test_a_webhook_is_kept_byte_for_byte_where_its_order_s_messages_are(world: World) -> None:
    body, signature = await a_webhook(world)
    before = counted("kept")
    assert (await send(world, body, signature)).status_code == 204
    (record,) = world.producer.sent("payment-webhook-received")
    message = world.codec.decode(record.value)
    assert isinstance(message, WebhookReceived)
    assert message.body == body
    assert (record.key, message.order_id, message.object_id) == (b"order-1", "order-1", "pi_1")
    assert message.event_id == derived_id("stripe", message.gateway_event_id)
    assert dict(record.headers)["ce_type"] == b"WebhookReceived"
    assert counted("kept") == before + 1


async def test_a_webhook_of_no_order_of_ours_is_keyed_by_its_object(world: World) -> None:
    body, signature = await a_webhook(world)
    event_id, event = next(iter(world.gateway._events.items()))
    world.gateway._events[event_id] = replace(event, order_id=None)
    assert (await send(world, body, signature)).status_code == 204
    (record,) = world.producer.sent("payment-webhook-received")
    assert record.key == b"pi_1"


async def test_a_webhook_that_comes_twice_has_one_id(world: World) -> None:
    body, signature = await a_webhook(world)
    await send(world, body, signature)
    await send(world, body, signature)
    ids = {world.codec.decode(record.value).event_id for record in world.producer.sent("payment-webhook-received")}
    assert len(ids) == 1


@pytest.mark.parametrize("signature", [None, "", "t=1,v1=00", "x" * 5000])
async def test_a_bad_signature_is_turned_away_and_counted(world: World, signature: str | None) -> None:
    body, _ = await a_webhook(world)
    before = counted("bad_signature")
    answer = await send(world, body, signature)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_signature")
    assert counted("bad_signature") == before + 1
    assert world.producer.sent("payment-webhook-received") == []


async def test_a_body_that_was_changed_on_the_way_is_turned_away(world: World) -> None:
    body, signature = await a_webhook(world)
    assert (await send(world, body + b" ", signature)).json()["code"] == "bad_signature"


async def test_what_we_don_t_follow_is_answered_and_counted(world: World) -> None:
    body, signature = await a_webhook(world, "payment_intent.created")
    before = counted("not_followed")
    assert (await send(world, body, signature)).status_code == 204
    assert counted("not_followed") == before + 1
    assert world.producer.sent("payment-webhook-received") == []


async def test_what_is_no_event_is_turned_away(world: World) -> None:
    body = b'{"id": "evt_unknown"}'
    answer = await send(world, body, world.gateway._signature(body))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_webhook")


async def test_with_kafka_away_the_gateway_has_to_send_it_again(world: World) -> None:
    body, signature = await a_webhook(world)
    world.producer.away = True
    answer = await send(world, body, signature)
    assert (answer.status_code, answer.json()["code"]) == (503, "outcome_unknown")
    assert int(answer.headers["retry-after"]) > 0


async def test_without_schemas_the_gateway_has_to_send_it_again(world: World) -> None:
    body, signature = await a_webhook(world)
    world.down.add("codec")
    assert (await send(world, body, signature)).status_code == 503


async def test_a_webhook_may_be_larger_than_a_command_but_not_endless(world: World) -> None:
    large = b'{"id": "evt_x", "padding": "' + b"x" * 200_000 + b'"}'
    assert (await send(world, large, world.gateway._signature(large))).json()["code"] == "invalid_webhook"
    assert (await send(world, b"x" * 600_000, "")).json()["code"] == "body_too_large"


async def test_without_a_secret_there_is_no_such_route(database: Settings) -> None:
    async with opened_world(database, stripe=Stripe()) as world:
        answer = await send(world, b"{}", "")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
