"""The sandbox's webhooks: signed, repeated until they are accepted, and late, doubled or out of order where a fault says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import stripe

from infra.sandbox.server import running_sandbox

from .conftest import DEADLINE_S, Client, Receiver, client

pytestmark = pytest.mark.integration

CREATED, CHARGED, PAID = "payment_intent.created", "charge.succeeded", "payment_intent.succeeded"


async def test_events_come_signed_with_the_object_as_it_was(sandbox: Client, receiver: Receiver) -> None:
    secret = await receiver.register(sandbox)
    intent = await sandbox.create(key="k1", **{"metadata[order_id]": "o1"})
    await sandbox.confirm(intent.body["id"], key="k2")
    await receiver.until(lambda: len(receiver.bodies) == 3)
    assert receiver.types == [CREATED, CHARGED, PAID]
    assert [event["data"]["object"]["object"] for event in receiver.events] == ["payment_intent", "charge", "payment_intent"]
    assert [receiver.events[place]["data"]["object"]["status"] for place in (0, 2)] == ["requires_confirmation", "succeeded"]
    assert {event["data"]["object"]["metadata"]["order_id"] for event in receiver.events} == {"o1"}
    assert [event["request"]["idempotency_key"] for event in receiver.events] == ["k1", "k2", "k2"]
    for body, signature in zip(receiver.bodies, receiver.signatures, strict=True):
        event = stripe.Webhook.construct_event(body, signature, secret)
        assert event.api_version == "2026-10-28.endive"
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.WebhookSignature.verify_header(body + b" ", signature, secret, 300)


@pytest.mark.parametrize(
    ("method", "fields", "then", "types"),
    [
        ("pm_card_chargeDeclined", {}, [], ["charge.failed", "payment_intent.payment_failed"]),
        ("pm_card_threeDSecure2Required", {}, [], ["payment_intent.requires_action"]),
        ("pm_usBankAccount_processing", {}, [], ["charge.pending", "payment_intent.processing"]),
        ("pm_card_visa", {"capture_method": "manual"}, [], [CHARGED, "payment_intent.amount_capturable_updated"]),
        (
            "pm_card_visa",
            {"capture_method": "manual"},
            ["/v1/payment_intents/{}/capture"],
            [CHARGED, "payment_intent.amount_capturable_updated", "charge.captured", PAID],
        ),
        (
            "pm_card_visa",
            {"capture_method": "manual"},
            ["/v1/payment_intents/{}/cancel"],
            [CHARGED, "payment_intent.amount_capturable_updated", "payment_intent.canceled"],
        ),
    ],
)
async def test_every_step_has_its_events(
    sandbox: Client, receiver: Receiver, method: str, fields: dict[str, str], then: list[str], types: list[str]
) -> None:
    await receiver.register(sandbox)
    intent = (await sandbox.create(method, **fields)).body["id"]
    await sandbox.confirm(intent)
    for path in then:
        await sandbox.ask("POST", path.format(intent))
    await receiver.until(lambda: len(receiver.bodies) == 1 + len(types))
    assert receiver.types == [CREATED, *types]


async def test_an_endpoint_gets_what_it_asked_for(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, PAID)
    await receiver.register(sandbox, PAID, "payment_intent.canceled")
    await sandbox.paid()
    canceled = await sandbox.create()
    await sandbox.ask("POST", f"/v1/payment_intents/{canceled.body['id']}/cancel")
    await receiver.until(lambda: len(receiver.bodies) == 2)
    assert sorted(receiver.types) == ["payment_intent.canceled", PAID]


async def test_an_event_that_is_turned_away_comes_again_signed_anew(sandbox: Client, receiver: Receiver) -> None:
    secret = await receiver.register(sandbox, PAID)
    receiver.refuse = 1
    await sandbox.paid()
    await receiver.until(lambda: bool(receiver.bodies))
    assert receiver.tries == 2
    stripe.WebhookSignature.verify_header(receiver.bodies[0], receiver.signatures[0], secret, 300)
    async with asyncio.timeout(DEADLINE_S):
        while (await sandbox.ask("GET", "/_sandbox/health")).body["pending_webhooks"]:
            pass


async def test_undelivered_events_survive_a_restart(receiver: Receiver, tmp_path: Path) -> None:
    async with running_sandbox(data=tmp_path) as url, client(url) as sandbox:
        receiver.refuse = 1_000_000
        secret = await receiver.register(sandbox, PAID)
        await sandbox.order_fault(kind="webhook_late", delay_seconds=0.5, match={"metadata": {"order_id": "late"}})
        await sandbox.paid(**{"metadata[order_id]": "late"})
        await sandbox.paid(**{"metadata[order_id]": "refused"})
        await receiver.until(lambda: receiver.tries >= 1)
        (event_id,) = [
            event["id"]
            for event in (await sandbox.ask("GET", "/v1/events")).body["data"]
            if event["type"] == PAID and event["data"]["object"]["metadata"]["order_id"] == "refused"
        ]
    receiver.refuse = 0
    async with running_sandbox(data=tmp_path) as url, client(url) as sandbox:
        await receiver.until(lambda: len(receiver.bodies) == 2)
        assert event_id in {event["id"] for event in receiver.events}
        for body, signature in zip(receiver.bodies, receiver.signatures, strict=True):
            stripe.WebhookSignature.verify_header(body, signature, secret, 300)
        assert await receiver.register(sandbox, PAID) == secret


async def test_twice_is_the_same_event_twice(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, PAID)
    await sandbox.order_fault(kind="webhook_twice", event_type=PAID)
    await sandbox.paid()
    await receiver.until(lambda: len(receiver.bodies) == 2)
    assert receiver.bodies[0] == receiver.bodies[1]


async def test_late_is_after_what_came_later(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, CREATED, PAID)
    await sandbox.order_fault(kind="webhook_late", event_type=CREATED, delay_seconds=1.5)
    await sandbox.paid()
    await receiver.until(lambda: len(receiver.bodies) == 2)
    assert receiver.types == [PAID, CREATED]


async def test_out_of_order_waits_for_a_later_event_of_the_same_payment(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, CREATED, PAID)
    await sandbox.order_fault(kind="webhook_out_of_order", event_type=CREATED, delay_seconds=60, match={"metadata": {"order_id": "o1"}})
    first = (await sandbox.create(**{"metadata[order_id]": "o1"})).body["id"]
    await sandbox.paid(**{"metadata[order_id]": "o2"})
    await receiver.until(lambda: receiver.types == [CREATED, PAID])
    await sandbox.confirm(first)
    await receiver.until(lambda: len(receiver.bodies) == 4)
    assert receiver.types == [CREATED, PAID, PAID, CREATED]


async def test_out_of_order_goes_out_by_itself_where_nothing_follows(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, CREATED)
    await sandbox.order_fault(kind="webhook_out_of_order", delay_seconds=0.2)
    await sandbox.create()
    await receiver.until(lambda: receiver.types == [CREATED])


async def test_never_is_never_but_the_event_can_be_read(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox, PAID)
    await sandbox.order_fault(kind="webhook_never")
    lost = await sandbox.paid()
    await sandbox.paid()
    await receiver.until(lambda: len(receiver.bodies) == 1)
    assert receiver.events[0]["data"]["object"]["id"] != lost["id"]
    assert (await sandbox.ask("GET", "/_sandbox/health")).body["pending_webhooks"] <= 1
    assert len((await sandbox.ask("GET", "/v1/events")).body["data"]) == 6


async def test_events_of_a_removed_endpoint_are_dropped(sandbox: Client, receiver: Receiver) -> None:
    await receiver.register(sandbox)
    receiver.refuse = 1_000_000
    await sandbox.create()
    await receiver.until(lambda: receiver.tries == 1)
    (endpoint,) = (await sandbox.ask("GET", "/v1/webhook_endpoints")).body["data"]
    assert "secret" not in endpoint
    await sandbox.ask("DELETE", f"/v1/webhook_endpoints/{endpoint['id']}")
    async with asyncio.timeout(DEADLINE_S):
        while (await sandbox.ask("GET", "/_sandbox/health")).body["pending_webhooks"]:
            pass
    assert receiver.tries == 1


async def test_an_endpoint_given_at_the_start_is_signed_with_the_secret_given(receiver: Receiver, tmp_path: Path) -> None:
    async with running_sandbox(data=tmp_path) as url, client(url) as sandbox:
        await receiver.register(sandbox, "charge.refunded")
    async with running_sandbox(data=tmp_path, webhook=(receiver.url, "whsec_given")) as url, client(url) as sandbox:
        await sandbox.create()
        await receiver.until(lambda: len(receiver.bodies) == 1)
        stripe.WebhookSignature.verify_header(receiver.bodies[0].decode(), receiver.signatures[0], "whsec_given", 300)
        assert len((await sandbox.ask("GET", "/v1/webhook_endpoints")).body["data"]) == 1
