"""What every gateway promises, on the fake in memory and on the Stripe adapter against the sandbox, over real HTTP.

A world is a gateway with the hands of those who stand around it: the customer, time, the network, and the ledger that tells what was really taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import uuid4

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from infra.crash_points import plugged
from infra.gateways.breaker import Breaker
from infra.gateways.fake import FakeGateway, Fault
from infra.gateways.port import BadSignature, Gateway
from infra.gateways.stripe import StripeGateway
from infra.sandbox.server import running_sandbox
from infra.settings import Stripe
from schemas.errors import Rejected
from schemas.observations import (
    ActionRequired,
    Authorized,
    Captured,
    Created,
    Declined,
    NotSent,
    Observation,
    Processing,
    Refused,
    Unknown,
    Voided,
)
from schemas.state import Attempt, AttemptStatus, ChargeRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEADLINE_S = 10.0
TIMEOUT_S = 5.0

Ledger = list[tuple[str, str, int]]
"""(the gateway's object, order, captured minor units) of each charge that went through."""


class World(Protocol):
    @property
    def gateway(self) -> Gateway: ...

    async def fault(self, operation: str, fault: Fault) -> None: ...

    async def authenticate(self, gateway_id: str, *, passes: bool) -> None: ...

    async def settle(self, gateway_id: str) -> None: ...

    async def forget_keys(self) -> None: ...

    async def ledger(self) -> Ledger: ...

    async def webhook(self, gateway_id: str, event_type: str, /) -> tuple[bytes, str]: ...


class FakeWorld:
    def __init__(self) -> None:
        self.gateway = FakeGateway()

    async def fault(self, operation: str, fault: Fault) -> None:
        self.gateway.script(operation, fault)

    async def authenticate(self, gateway_id: str, *, passes: bool) -> None:
        self.gateway.authenticate(gateway_id, passes=passes)

    async def settle(self, gateway_id: str) -> None:
        self.gateway.settle(gateway_id)

    async def forget_keys(self) -> None:
        self.gateway.forget_keys()

    async def ledger(self) -> Ledger:
        return [(intent.id, intent.order_id, intent.captured_minor) for intent in self.gateway.intents.values() for _ in range(intent.charges)]

    async def webhook(self, gateway_id: str, event_type: str) -> tuple[bytes, str]:
        return self.gateway.webhook(gateway_id, event_type)


SANDBOX_FAULTS: dict[Fault, dict[str, Any]] = {
    Fault.RATE_LIMITED: {"kind": "rate_limit"},
    Fault.LOST_BEFORE: {"kind": "refuse"},
    Fault.LOST_AFTER: {"kind": "answer_lost"},
    Fault.FAILED_BEFORE: {"kind": "error_500"},
    Fault.FAILED_AFTER: {"kind": "error_500", "after_charge": True},
}


class Received:
    """The webhooks that arrived, as an endpoint of ours would get them."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._webhooks: list[tuple[bytes, str]] = []

    async def receive(self, request: web.Request) -> web.Response:
        async with self._changed:
            self._webhooks.append((await request.read(), request.headers["Stripe-Signature"]))
            self._changed.notify_all()
        return web.Response()

    async def first(self, gateway_id: str, event_type: str) -> tuple[bytes, str]:
        def found() -> list[tuple[bytes, str]]:
            return [hook for hook in self._webhooks if gateway_id.encode() in hook[0] and f'"{event_type}"'.encode() in hook[0]]

        async with asyncio.timeout(DEADLINE_S), self._changed:
            return (await self._changed.wait_for(found))[0]


class SandboxWorld:
    def __init__(self, url: str, http: aiohttp.ClientSession, gateway: StripeGateway, received: Received) -> None:
        self.gateway = gateway
        self.webhook = received.first
        self._url = url
        self._http = http

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        async with self._http.post(self._url + path, json=body) as answer:
            assert answer.ok, await answer.text()

    async def fault(self, operation: str, fault: Fault) -> None:
        # aiohttp repeats a GET once by itself when a kept-alive connection is closed under it.
        times = 2 if operation == "retrieve" else 1
        await self._post("/_sandbox/faults", {"operation": operation, "times": times, **SANDBOX_FAULTS[fault]})

    async def authenticate(self, gateway_id: str, *, passes: bool) -> None:
        await self._post(f"/_sandbox/payment_intents/{gateway_id}/authenticate", {"outcome": "success" if passes else "failure"})

    async def settle(self, gateway_id: str) -> None:
        await self._post(f"/_sandbox/payment_intents/{gateway_id}/settle", {"outcome": "success"})

    async def forget_keys(self) -> None:
        await self._post("/_sandbox/clock", {"advance_seconds": self.gateway.key_life.total_seconds() + 1})

    async def ledger(self) -> Ledger:
        async with self._http.get(f"{self._url}/ledger") as answer:
            charges = (await answer.json())["charges"]
        return [(charge["payment_intent"], charge["order_id"], charge["captured_minor"]) for charge in charges]


@asynccontextmanager
async def sandbox_world() -> AsyncIterator[SandboxWorld]:
    async with AsyncExitStack() as closing:
        url = await closing.enter_async_context(running_sandbox())
        http = await closing.enter_async_context(aiohttp.ClientSession(headers={"Authorization": "Bearer sk_test_contract"}))
        received = Received()
        application = web.Application()
        application.router.add_post("/webhooks", received.receive)
        runner = web.AppRunner(application)
        await runner.setup()
        closing.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        form = {"url": f"http://127.0.0.1:{runner.addresses[0][1]}/webhooks", "enabled_events[]": "*"}
        async with http.post(f"{url}/v1/webhook_endpoints", data=form) as answer:
            secrets = (SecretStr("whsec_of_the_last_rotation"), SecretStr((await answer.json())["secret"]))
        settings = Stripe(base_url=url, webhook_secrets=secrets)
        gateway = StripeGateway(settings, "sk_test_contract", Breaker("stripe", threshold=1000))
        closing.push_async_callback(gateway.aclose)
        yield SandboxWorld(url, http, gateway, received)


@pytest.fixture(params=[pytest.param("fake", marks=pytest.mark.unit), pytest.param("sandbox", marks=pytest.mark.integration)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "fake":
        yield FakeWorld()
    else:
        async with sandbox_world() as sandbox:
            yield sandbox


def asked(method: str | None = "pm_card_visa", **fields: Any) -> ChargeRequest:
    usual: dict[str, Any] = {"amount_minor": 1999, "currency": "EUR", "capture_method": "automatic", "payment_method": method}
    return ChargeRequest(**usual | fields)


def attempt(request: ChargeRequest) -> Attempt:
    return Attempt(number=1, status=AttemptStatus.STARTED, gateway="stripe", request=request, operation=None, started_at=NOW, updated_at=NOW)


async def created(world: World, request: ChargeRequest, key: str = "create") -> str:
    answer = await world.gateway.create(str(uuid4()), "ord_1", attempt(request), key=key, timeout=TIMEOUT_S)
    assert isinstance(answer, Created), answer
    return answer.gateway_id


async def confirmed(world: World, request: ChargeRequest) -> tuple[str, Observation]:
    gateway_id = await created(world, request)
    return gateway_id, await world.gateway.confirm(gateway_id, request, key="confirm", timeout=TIMEOUT_S)


# ── In two steps ──


async def test_creating_moves_no_money(world: World) -> None:
    answer = await world.gateway.create(str(uuid4()), "ord_1", attempt(asked()), key="k", timeout=TIMEOUT_S)
    assert isinstance(answer, Created)
    assert answer.client_secret
    assert answer.latency_ms is not None
    assert isinstance(await world.gateway.retrieve(answer.gateway_id, timeout=TIMEOUT_S), Created)
    assert await world.ledger() == []


async def test_creating_again_with_the_key_gives_the_same_object(world: World) -> None:
    payment_id = str(uuid4())
    answers = [await world.gateway.create(payment_id, "ord_1", attempt(asked()), key="k", timeout=TIMEOUT_S) for _ in range(2)]
    assert answers[0].gateway_id == answers[1].gateway_id is not None


async def test_confirming_takes_the_money_once(world: World) -> None:
    gateway_id, seen = await confirmed(world, asked())
    assert isinstance(seen, Captured)
    assert (seen.gateway_id, seen.captured_minor) == (gateway_id, 1999)
    assert seen.transaction_id
    assert seen.receipt_url
    assert seen.latency_ms is not None
    for key in ("confirm", "another"):
        again = await world.gateway.confirm(gateway_id, asked(), key=key, timeout=TIMEOUT_S)
        assert isinstance(again, Captured)
        assert again.transaction_id == seen.transaction_id
    assert await world.ledger() == [(gateway_id, "ord_1", 1999)]


@pytest.mark.parametrize(
    ("method", "code", "advice"),
    [
        ("pm_card_chargeDeclined", "generic_decline", "retry"),
        ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds", "retry"),
        ("pm_card_chargeDeclinedLostCard", "lost_card", "change_method"),
    ],
)
async def test_a_decline_says_why_and_what_to_do(world: World, method: str, code: str, advice: str) -> None:
    gateway_id, seen = await confirmed(world, asked(method))
    looked_up = await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S)
    for observation in (seen, looked_up):
        assert isinstance(observation, Declined)
        assert observation.gateway_id == gateway_id
        assert (observation.failure.code, observation.failure.advice) == (code, advice)
        assert observation.failure.message
    assert await world.ledger() == []


async def test_a_confirmation_without_a_method_is_refused(world: World) -> None:
    gateway_id, seen = await confirmed(world, asked(None))
    assert isinstance(seen, Refused)
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), Created)


async def test_a_method_that_does_not_exist_is_refused_and_can_be_changed(world: World) -> None:
    at_creation = await world.gateway.create(str(uuid4()), "ord_1", attempt(asked("pm_of_nobody")), key="k", timeout=TIMEOUT_S)
    gateway_id = await created(world, asked(None))
    at_confirmation = await world.gateway.confirm(gateway_id, asked("pm_of_nobody"), key="confirm", timeout=TIMEOUT_S)
    for seen in (at_creation, at_confirmation):
        assert isinstance(seen, Refused)
        assert (seen.failure.code, seen.failure.advice) == ("resource_missing", "change_method")
    assert isinstance(await world.gateway.confirm(gateway_id, asked(), key="confirm again", timeout=TIMEOUT_S), Captured)


async def test_what_takes_days_is_processing_until_it_is_there(world: World) -> None:
    gateway_id, seen = await confirmed(world, asked("pm_usBankAccount_processing"))
    assert isinstance(seen, Processing)
    await world.settle(gateway_id)
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), Captured)


# ── 3-D Secure ──


@pytest.mark.parametrize(("passes", "outcome"), [(True, Captured), (False, Declined)])
async def test_3d_secure_asks_the_customer(world: World, passes: bool, outcome: type[Observation]) -> None:
    gateway_id, seen = await confirmed(world, asked("pm_card_threeDSecure2Required", return_url="https://shop.example/back"))
    assert isinstance(seen, ActionRequired)
    assert seen.next_action.type == "redirect_to_url"
    assert seen.next_action.redirect_url
    assert seen.client_secret
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), ActionRequired)
    await world.authenticate(gateway_id, passes=passes)
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), outcome)
    assert await world.ledger() == ([(gateway_id, "ord_1", 1999)] if passes else [])


# ── Capture and cancel ──


@pytest.mark.parametrize(("amount", "taken"), [(None, 1999), (500, 500)])
async def test_an_authorisation_is_captured_in_full_or_in_part(world: World, amount: int | None, taken: int) -> None:
    gateway_id, held = await confirmed(world, asked(capture_method="manual"))
    assert isinstance(held, Authorized)
    assert held.amount_minor == 1999
    assert await world.ledger() == [(gateway_id, "ord_1", 0)]
    seen = await world.gateway.capture(gateway_id, amount, "EUR", key="capture", timeout=TIMEOUT_S)
    again = await world.gateway.capture(gateway_id, amount, "EUR", key="another", timeout=TIMEOUT_S)
    for observation in (seen, again):
        assert isinstance(observation, Captured)
        assert (observation.captured_minor, observation.transaction_id) == (taken, held.transaction_id)
    assert await world.ledger() == [(gateway_id, "ord_1", taken)]


async def test_no_more_than_was_authorised_can_be_captured(world: World) -> None:
    gateway_id, _ = await confirmed(world, asked(capture_method="manual"))
    seen = await world.gateway.capture(gateway_id, 2000, "EUR", key="capture", timeout=TIMEOUT_S)
    assert isinstance(seen, Refused)
    assert seen.failure.code == "amount_too_large"
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), Authorized)


async def test_an_object_that_is_cancelled_can_not_be_paid_any_more(world: World) -> None:
    gateway_id = await created(world, asked())
    for key in ("cancel", "another"):
        seen = await world.gateway.cancel(gateway_id, "abandoned", key=key, timeout=TIMEOUT_S)
        assert isinstance(seen, Voided)
        assert seen.reason == "abandoned"
    assert isinstance(await world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S), Voided)
    assert await world.ledger() == []


async def test_cancelling_gives_back_what_was_held_but_not_what_was_taken(world: World) -> None:
    held, _ = await confirmed(world, asked(capture_method="manual"))
    assert isinstance(await world.gateway.cancel(held, None, key="cancel held", timeout=TIMEOUT_S), Voided)
    assert isinstance(await world.gateway.capture(held, None, "EUR", key="capture", timeout=TIMEOUT_S), Voided)
    taken = await created(world, asked(), key="create second")
    await world.gateway.confirm(taken, asked(), key="confirm second", timeout=TIMEOUT_S)
    assert isinstance(await world.gateway.cancel(taken, None, key="cancel taken", timeout=TIMEOUT_S), Captured)
    assert {captured for _, _, captured in await world.ledger()} == {0, 1999}


# ── What may go wrong ──


@pytest.mark.parametrize(
    ("fault", "outcome", "key_burnt", "charges"),
    [
        (Fault.RATE_LIMITED, NotSent, False, 0),
        (Fault.LOST_BEFORE, Unknown, False, 0),
        (Fault.LOST_AFTER, Unknown, False, 1),
        (Fault.FAILED_BEFORE, Unknown, True, 0),
        (Fault.FAILED_AFTER, Unknown, True, 1),
    ],
)
async def test_a_confirmation_that_goes_wrong_charges_once_in_the_end(
    world: World, fault: Fault, outcome: type[Observation], key_burnt: bool, charges: int
) -> None:
    gateway_id = await created(world, asked())
    await world.fault("confirm", fault)
    seen = await world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S)
    assert isinstance(seen, Unknown | NotSent)
    assert isinstance(seen, outcome)
    assert (seen.gateway_id, seen.key_burnt) == (gateway_id, key_burnt)
    assert len(await world.ledger()) == charges
    assert isinstance(await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S), Captured if charges else Created)
    same = await world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S)
    if key_burnt:
        assert isinstance(same, Unknown)
        same = await world.gateway.confirm(gateway_id, asked(), key="confirm, another key", timeout=TIMEOUT_S)
    assert isinstance(same, Captured)
    assert await world.ledger() == [(gateway_id, "ord_1", 1999)]


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NOT_SENT])
async def test_a_creation_that_goes_wrong_is_not_sent(world: World, fault: Fault) -> None:
    await world.fault("create", fault)
    payment_id = str(uuid4())
    seen = await world.gateway.create(payment_id, "ord_1", attempt(asked()), key="create", timeout=TIMEOUT_S)
    assert isinstance(seen, NotSent)
    assert seen.key_burnt == (fault in (Fault.FAILED_BEFORE, Fault.FAILED_AFTER))
    key = "create, another key" if seen.key_burnt else "create"
    assert isinstance(await world.gateway.create(payment_id, "ord_1", attempt(asked()), key=key, timeout=TIMEOUT_S), Created)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NOT_SENT])
async def test_a_look_up_that_goes_wrong_tells_nothing(world: World, fault: Fault) -> None:
    gateway_id, _ = await confirmed(world, asked())
    await world.fault("retrieve", fault)
    seen = await world.gateway.retrieve(gateway_id, timeout=TIMEOUT_S)
    assert isinstance(seen, Unknown)
    assert not seen.key_burnt


async def test_an_object_that_the_gateway_does_not_know_is_unknown_to_a_look_up_and_refused_to_a_charge(world: World) -> None:
    assert isinstance(await world.gateway.retrieve("pi_of_another_account", timeout=TIMEOUT_S), Unknown)
    assert isinstance(await world.gateway.confirm("pi_of_another_account", asked(), key="k", timeout=TIMEOUT_S), Refused)


async def test_a_key_that_was_used_for_something_else_leaves_it_unknown(world: World) -> None:
    gateway_id, _ = await confirmed(world, asked("pm_card_chargeDeclined"))
    seen = await world.gateway.confirm(gateway_id, asked("pm_card_visa"), key="confirm", timeout=TIMEOUT_S)
    assert isinstance(seen, Unknown)
    assert seen.key_burnt
    assert await world.ledger() == []


async def test_the_same_confirmation_at_once_charges_once(world: World) -> None:
    gateway_id = await created(world, asked())
    seen = await asyncio.gather(*(world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S) for _ in range(5)))
    assert any(isinstance(observation, Captured) for observation in seen)
    assert all(isinstance(observation, Captured | Unknown) for observation in seen)
    assert await world.ledger() == [(gateway_id, "ord_1", 1999)]


async def test_a_key_is_forgotten_in_the_end(world: World) -> None:
    payment_id = str(uuid4())

    async def create() -> str | None:
        return (await world.gateway.create(payment_id, "ord_1", attempt(asked()), key="create", timeout=TIMEOUT_S)).gateway_id

    first = await create()
    await world.forget_keys()
    assert first != await create()


# ── Webhooks ──


async def test_a_webhook_tells_whose_it_is_and_what_the_object_showed(world: World) -> None:
    payment_id = str(uuid4())
    answer = await world.gateway.create(payment_id, "ord_7", attempt(asked()), key="create", timeout=TIMEOUT_S)
    gateway_id = answer.gateway_id or ""
    seen = await world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S)
    body, signature = await world.webhook(gateway_id, "payment_intent.succeeded")
    webhook = world.gateway.read_webhook(body, signature)
    assert (webhook.event_type, webhook.object_id) == ("payment_intent.succeeded", gateway_id)
    assert (webhook.order_id, webhook.payment_id, webhook.attempt) == ("ord_7", payment_id, 1)
    assert isinstance(seen, Captured)
    assert isinstance(webhook.observation, Captured)
    assert (webhook.observation.captured_minor, webhook.observation.transaction_id) == (1999, seen.transaction_id)
    assert world.gateway.read_verified_webhook(body) == webhook
    assert world.gateway.handles(webhook.event_type)


async def test_a_webhook_that_was_touched_is_turned_away(world: World) -> None:
    gateway_id, _ = await confirmed(world, asked())
    body, signature = await world.webhook(gateway_id, "payment_intent.succeeded")
    for touched, signed in [(body + b" ", signature), (body, signature[:-1] + "x"), (body, ""), (b"\xff", signature), (body, "t=ä,v1=ü")]:
        with pytest.raises(BadSignature):
            world.gateway.read_webhook(touched, signed)


async def test_what_is_no_event_is_rejected(world: World) -> None:
    for body in (b"", b"no json", b"[]", b"{}", b'{"id": "evt_x", "type": "a", "data": {"object": 7}}'):
        with pytest.raises(Rejected):
            world.gateway.read_verified_webhook(body)


async def test_events_that_tell_nothing_are_not_handled(world: World) -> None:
    assert not world.gateway.handles("customer.created")
    assert not world.gateway.handles("payment_intent.created")


# ── Crash points ──


async def test_every_call_passes_a_point_before_and_after_it(world: World) -> None:
    passed: list[str] = []

    async def note(point: str) -> None:
        passed.append(point)

    gateway = world.gateway
    with plugged(note):
        gateway_id, _ = await confirmed(world, asked(capture_method="manual"))
        await gateway.capture(gateway_id, None, "EUR", key="capture", timeout=TIMEOUT_S)
        await gateway.cancel(gateway_id, None, key="cancel", timeout=TIMEOUT_S)
        await gateway.retrieve(gateway_id, timeout=TIMEOUT_S)
    operations = ("create", "confirm", "capture", "cancel", "retrieve")
    assert passed == [f"gateway.{when}_{operation}" for operation in operations for when in ("before", "after")]


async def test_a_crash_before_the_call_charges_nothing_and_after_it_once(world: World) -> None:
    gateway_id = await created(world, asked())

    def crashing(at: str) -> Callable[[str], Awaitable[None]]:
        async def crash(point: str) -> None:
            if point == at:
                raise ConnectionAbortedError(point)

        return crash

    for at, charges in (("gateway.before_confirm", 0), ("gateway.after_confirm", 1)):
        with plugged(crashing(at)), pytest.raises(ConnectionAbortedError):
            await world.gateway.confirm(gateway_id, asked(), key="confirm", timeout=TIMEOUT_S)
        assert len(await world.ledger()) == charges
