"""The Stripe adapter on the wire: what it sends, and what it makes of servers that answer strangely or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import stripe
from aiohttp import web
from prometheus_client import REGISTRY
from pydantic import SecretStr
from structlog.testing import capture_logs

from infra.gateways.breaker import Breaker
from infra.gateways.port import BadSignature
from infra.gateways.stripe import API_VERSION, StripeGateway
from infra.gateways.table import opened_gateways
from infra.settings import Settings, Stripe
from schemas.errors import Rejected
from schemas.observations import Captured, Created, Declined, NotSent, Observation, Refused, Unknown
from schemas.state import Attempt, AttemptStatus, ChargeRequest

pytestmark = pytest.mark.integration

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PAYMENT_ID = "0c6b1b52-5a42-4c6a-8f3f-1a2b3c4d5e6f"
REQUEST = ChargeRequest(amount_minor=1999, currency="EUR", capture_method="automatic", payment_method="pm_card_visa")
CREATED = {"id": "pi_1", "object": "payment_intent", "status": "requires_confirmation", "client_secret": "pi_1_secret_x", "currency": "eur"}
SUCCEEDED = CREATED | {"status": "succeeded", "amount_received": 1999, "latest_charge": {"id": "ch_1", "receipt_url": "https://pay.stripe.com/r"}}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Server:
    """Answers every request as `answer` says, and remembers what it was sent."""

    answer: Answer
    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, list[str]]]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        form = parse_qs((await request.read()).decode() or request.query_string)
        self.requests.append((f"{request.method} {request.path}", dict(request.headers), form))
        return await self.answer(request)


def answering(status: int, body: Any, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(status=status, body=content, content_type="application/json", headers=headers)

    return answer


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=512).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def gateway_at(url: str, **settings: Any) -> AsyncIterator[StripeGateway]:
    gateway = StripeGateway(Stripe(base_url=url, **settings), "sk_test_wire", Breaker("stripe", threshold=1000))
    try:
        yield gateway
    finally:
        await gateway.aclose()


@asynccontextmanager
async def gateway_that_gets(answer: Answer, **settings: Any) -> AsyncIterator[StripeGateway]:
    async with serving(answer) as server, gateway_at(server.url, **settings) as gateway:
        yield gateway


def attempt(request: ChargeRequest = REQUEST) -> Attempt:
    return Attempt(number=2, status=AttemptStatus.STARTED, gateway="stripe", request=request, operation=None, started_at=NOW, updated_at=NOW)


async def confirm(gateway: StripeGateway, timeout: float = 5.0) -> Observation:
    return await gateway.confirm("pi_1", REQUEST, key="key", timeout=timeout)


# ── What is sent ──


async def test_a_creation_carries_its_key_and_whose_it_is() -> None:
    request = ChargeRequest(
        amount_minor=1999,
        currency="EUR",
        capture_method="manual",
        payment_method="pm_card_visa",
        return_url="https://shop.example/back",
        description="Two pizzas",
        metadata={"table": "7", "order_id": "not mine to say"},
    )
    async with serving(answering(200, CREATED)) as server, gateway_at(server.url) as gateway:
        seen = await gateway.create(PAYMENT_ID, "ord_1", attempt(request), key="the key", timeout=5)
    assert isinstance(seen, Created)
    ((line, headers, form),) = server.requests
    assert line == "POST /v1/payment_intents"
    assert headers["Idempotency-Key"] == "the key"
    assert headers["Stripe-Version"] == API_VERSION
    assert headers["Authorization"] == "Bearer sk_test_wire"
    assert "X-Stripe-Client-Telemetry" not in headers
    assert form == {
        "amount": ["1999"],
        "currency": ["eur"],
        "capture_method": ["manual"],
        "payment_method": ["pm_card_visa"],
        "description": ["Two pizzas"],
        "automatic_payment_methods[enabled]": ["true"],
        "automatic_payment_methods[allow_redirects]": ["always"],
        "metadata[table]": ["7"],
        "metadata[order_id]": ["ord_1"],
        "metadata[payment_id]": [PAYMENT_ID],
        "metadata[attempt]": ["2"],
    }


def test_the_version_of_the_api_is_the_sdks_and_the_one_that_the_docs_tell_to_pin() -> None:
    assert stripe.api_version == API_VERSION
    assert f"api_version={API_VERSION}" in (Path(__file__).parents[3] / "docs" / "stripe-test-keys.md").read_text()


async def test_the_other_calls_carry_what_they_are_about() -> None:
    async with serving(answering(200, SUCCEEDED)) as server, gateway_at(server.url + "/") as gateway:
        await confirm(gateway)
        await gateway.capture("pi_1", 5, "ISK", key="key", timeout=5)
        await gateway.cancel("pi_1", "abandoned", key="key", timeout=5)
        await gateway.cancel("pi_1", "superseded", key="key", timeout=5)
        await gateway.retrieve("pi_1/../x", timeout=5)
    expand = {"expand[0]": ["latest_charge"]}
    assert [(line, form) for line, _, form in server.requests] == [
        ("POST /v1/payment_intents/pi_1/confirm", {"payment_method": ["pm_card_visa"]} | expand),
        ("POST /v1/payment_intents/pi_1/capture", {"amount_to_capture": ["500"]} | expand),
        ("POST /v1/payment_intents/pi_1/cancel", {"cancellation_reason": ["abandoned"]} | expand),
        ("POST /v1/payment_intents/pi_1/cancel", expand),
        ("GET /v1/payment_intents/pi_1/../x", expand),
    ]


async def test_an_amount_that_can_not_be_told_exactly_is_refused_and_not_sent() -> None:
    odd = ChargeRequest(amount_minor=5124, currency="KWD", capture_method="automatic")
    async with serving(answering(200, CREATED)) as server, gateway_at(server.url) as gateway:
        seen = await gateway.create(PAYMENT_ID, "ord_1", attempt(odd), key="key", timeout=5)
        captured = await gateway.capture("pi_1", 5124, "KWD", key="key", timeout=5)
    for refusal in (seen, captured):
        assert isinstance(refusal, Refused)
        assert refusal.failure.code == "amount_not_exact"
        assert "multiple of 10" in refusal.failure.message
    assert server.requests == []


async def test_nothing_is_sent_when_no_time_is_left() -> None:
    async with serving(answering(200, SUCCEEDED)) as server, gateway_at(server.url) as gateway:
        assert isinstance(await confirm(gateway, timeout=0), NotSent)
        assert isinstance(await gateway.retrieve("pi_1", timeout=0), Unknown)
    assert server.requests == []


async def test_as_many_calls_as_there_are_payments_run_at_once() -> None:
    at_once = 150  # the SDK's own pool would let 100 through and keep the rest waiting
    inside, all_inside = 0, asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal inside
        inside += 1
        if inside == at_once:
            all_inside.set()
        await all_inside.wait()
        return web.Response(body=json.dumps(SUCCEEDED).encode(), content_type="application/json")

    async with gateway_that_gets(answer) as gateway:
        seen = await asyncio.gather(*(confirm(gateway) for _ in range(at_once)))
    assert all(isinstance(observation, Captured) for observation in seen)


# ── Answers that are none ──


def error(kind: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"type": kind, "message": "m"} | fields}


@pytest.mark.parametrize(
    ("status", "body", "outcome", "key_burnt"),
    [
        (500, error("api_error"), Unknown, True),
        (502, b"<html>Bad gateway</html>", Unknown, True),
        (429, error("invalid_request_error", code="rate_limit"), NotSent, False),
        (400, error("invalid_request_error", code="rate_limit"), NotSent, False),
        (429, b"slow down", NotSent, False),
        (429, error("invalid_request_error", code="lock_timeout"), Unknown, False),
        (409, error("idempotency_error", code="idempotency_key_in_use"), Unknown, False),
        (400, error("idempotency_error"), Unknown, True),
        (401, error("invalid_request_error"), NotSent, False),
        (403, b"<html>Forbidden by the firewall</html>", NotSent, False),
        (402, error("card_error", code="card_declined"), Declined, False),
        (402, b"pay first", Unknown, False),
        (400, error("invalid_request_error", code="parameter_missing"), Refused, False),
        (404, error("invalid_request_error", code="resource_missing"), Refused, False),
        (404, b"<html>no such page</html>", Unknown, False),
        (200, b"", Unknown, False),
        (200, b"[]", Unknown, False),
        (200, b'{"object": "balance"}', Unknown, False),
        (204, b"", Unknown, False),
    ],
)
async def test_what_is_known_after_an_answer(status: int, body: Any, outcome: type[Observation], key_burnt: bool) -> None:
    async with gateway_that_gets(answering(status, body)) as gateway:
        seen = await confirm(gateway)
    assert type(seen) is outcome
    assert seen.gateway_id == "pi_1"
    assert getattr(seen, "key_burnt", False) == key_burnt


async def test_a_redirect_is_not_followed() -> None:
    async with serving(answering(307, b"", Location="/elsewhere")) as server, gateway_at(server.url) as gateway:
        assert isinstance(await confirm(gateway), Unknown)
    assert len(server.requests) == 1


async def test_a_method_that_does_not_exist_is_the_payers_to_change() -> None:
    body = error("invalid_request_error", code="resource_missing", param="payment_method")
    async with gateway_that_gets(answering(400, body)) as gateway:
        seen = await confirm(gateway)
    assert isinstance(seen, Refused)
    assert (seen.failure.code, seen.failure.advice) == ("resource_missing", "change_method")


async def test_a_card_that_is_refused_at_creation_makes_no_object() -> None:
    async with gateway_that_gets(answering(402, error("card_error", code="card_declined"))) as gateway:
        assert isinstance(await gateway.create(PAYMENT_ID, "ord_1", attempt(), key="key", timeout=5), Refused)


# ── No answer ──


async def test_a_port_where_nobody_listens_was_never_told_anything() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with gateway_at(f"http://127.0.0.1:{taken.getsockname()[1]}") as gateway:
            assert isinstance(await confirm(gateway), NotSent)
            assert isinstance(await gateway.create(PAYMENT_ID, "ord_1", attempt(), key="key", timeout=5), NotSent)
            assert isinstance(await gateway.retrieve("pi_1", timeout=5), Unknown)


@pytest.mark.parametrize("begun", [False, True])
async def test_an_answer_that_does_not_come_in_time_is_unknown(begun: bool) -> None:
    given_up = asyncio.Event()

    async def too_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        if begun:
            await response.prepare(request)
            await response.write(b'{"id": "pi_1"')
        await given_up.wait()
        return response

    async with gateway_that_gets(too_late, timeout_s=0.2) as gateway:
        started = time.monotonic()
        seen = await confirm(gateway, timeout=60)  # no call lasts longer than the settings allow
        given_up.set()
    assert isinstance(seen, Unknown)
    assert not seen.key_burnt
    assert "TimeoutError" in seen.detail
    assert time.monotonic() - started < 5


async def test_a_connection_that_breaks_is_unknown() -> None:
    async def cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def cut_in_the_middle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "10000"})
        await response.prepare(request)
        await response.write(b'{"id": "pi_1", "status": "succ')
        assert request.transport is not None
        request.transport.close()
        return response

    for answer in (cut, cut_in_the_middle):
        async with gateway_that_gets(answer) as gateway:
            seen = await confirm(gateway)
        assert isinstance(seen, Unknown)
        assert not seen.key_burnt


async def test_a_kept_alive_connection_that_was_closed_is_unknown_and_nothing_is_sent_twice() -> None:
    async def once(request: web.Request) -> web.Response:
        if len(server.requests) > 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=json.dumps(SUCCEEDED).encode(), content_type="application/json")

    async with serving(once) as server, gateway_at(server.url) as gateway:
        assert isinstance(await confirm(gateway), Captured)
        assert isinstance(await confirm(gateway), Unknown)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (500, error("api_error"), "opened"),
        (401, error("invalid_request_error"), "closed"),
        (402, error("card_error"), "closed"),
        (429, error("invalid_request_error"), "closed"),
        (404, error("invalid_request_error"), "closed"),
    ],
)
async def test_only_failures_of_the_gateway_open_the_breaker(status: int, body: Any, state: str) -> None:
    async with serving(answering(status, body)) as server:
        breaker = Breaker("stripe", threshold=2, open_s=3600)
        gateway = StripeGateway(Stripe(base_url=server.url), "sk_test_wire", breaker)
        for _ in range(3):
            await confirm(gateway)
        await gateway.aclose()
    assert breaker.state == state
    assert len(server.requests) == (2 if state == "opened" else 3)


# ── What is told to people ──


@pytest.mark.parametrize(
    ("status", "body", "reason"), [(401, error("invalid_request_error"), "authentication"), (400, error("idempotency_error"), "idempotency")]
)
async def test_a_fault_of_ours_is_counted_and_logged_as_an_error(status: int, body: Any, reason: str) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("paystream_gateway_misuse_total", {"gateway": "stripe", "reason": reason}) or 0.0

    before = count()
    async with gateway_that_gets(answering(status, body)) as gateway:
        with capture_logs() as logs:
            await confirm(gateway)
    assert count() == before + 1
    assert [entry["reason"] for entry in logs if entry["log_level"] == "error"] == [reason]


async def test_no_secret_is_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level("DEBUG")
    async with gateway_that_gets(answering(200, CREATED, **{"Request-Id": "req_1"})) as gateway:
        with capture_logs() as logs:
            seen = await gateway.create(PAYMENT_ID, "ord_1", attempt(), key="key", timeout=5)
    async with gateway_that_gets(answering(402, error("card_error", payment_intent=CREATED))) as gateway:
        with capture_logs() as more_logs:
            declined = await confirm(gateway)
    written = repr(logs) + repr(more_logs) + caplog.text + "".join(capfd.readouterr()) + repr(seen) + repr(declined)
    assert "pi_1" in written
    assert "secret_x" not in written
    assert "sk_test" not in written


# ── Webhooks ──

SECRETS = ("whsec_new", "whsec_old")
EVENT = {
    "id": "evt_1",
    "object": "event",
    "type": "payment_intent.succeeded",
    "data": {
        "object": SUCCEEDED | {"latest_charge": "ch_1", "metadata": {"order_id": "ord_1", "payment_id": PAYMENT_ID, "attempt": "2"}},
    },
}


@pytest.fixture
async def reader() -> AsyncIterator[StripeGateway]:
    async with gateway_at("http://127.0.0.1:9", webhook_secrets=tuple(SecretStr(secret) for secret in SECRETS)) as gateway:
        yield gateway


def signed(body: bytes, secret: str, age_s: int = 0) -> str:
    return str(stripe.WebhookSignature.generate_signature_header(body.decode(), secret, int(time.time()) - age_s))


def body_of(**changes: Any) -> bytes:
    return json.dumps(EVENT | changes).encode()


@pytest.mark.parametrize("secret", SECRETS)
async def test_a_webhook_signed_by_either_secret_of_a_rotation_is_read(reader: StripeGateway, secret: str) -> None:
    webhook = reader.read_webhook(body_of(), signed(body_of(), secret))
    assert (webhook.event_id, webhook.object_id, webhook.order_id, webhook.payment_id, webhook.attempt) == (
        "evt_1",
        "pi_1",
        "ord_1",
        PAYMENT_ID,
        2,
    )
    assert webhook.observation == Captured(gateway_id="pi_1", captured_minor=1999, transaction_id="ch_1")


@pytest.mark.parametrize(
    "sign",
    [
        lambda body: signed(body, "whsec_of_somebody_else"),
        lambda body: signed(body, SECRETS[0], age_s=301),
        lambda body: signed(body + b" ", SECRETS[0]),
        lambda body: signed(body, SECRETS[0]).replace("v1=", "v0="),
        lambda body: signed(body, SECRETS[0]) + "ü",
        lambda body: f"t={'9' * 5000},v1=x",
        lambda body: "t=now,v1=x",
        lambda body: "t=1",
        lambda body: "",
    ],
)
async def test_a_signature_that_does_not_fit_is_turned_away(reader: StripeGateway, sign: Callable[[bytes], str]) -> None:
    with pytest.raises(BadSignature):
        reader.read_webhook(body_of(), sign(body_of()))


async def test_one_fitting_signature_among_several_is_enough(reader: StripeGateway) -> None:
    timestamp, good = signed(body_of(), SECRETS[1]).split(",")
    assert reader.read_webhook(body_of(), f"{timestamp},v1=00,{good}").event_id == "evt_1"


async def test_without_a_secret_every_webhook_is_turned_away() -> None:
    async with gateway_at("http://127.0.0.1:9") as gateway:
        with pytest.raises(BadSignature):
            gateway.read_webhook(body_of(), signed(body_of(), ""))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        None,
        {"order_id": "no order id!", "payment_id": PAYMENT_ID, "attempt": "1"},
        {"order_id": "ord_1", "payment_id": "not a uuid", "attempt": "1"},
        {"order_id": "ord_1", "payment_id": PAYMENT_ID, "attempt": "²"},
        {"order_id": "ord_1", "payment_id": PAYMENT_ID},
    ],
)
async def test_metadata_that_is_not_ours_names_no_order(reader: StripeGateway, metadata: Any) -> None:
    webhook = reader.read_verified_webhook(body_of(data={"object": SUCCEEDED | {"metadata": metadata}}))
    assert (webhook.object_id, webhook.order_id, webhook.payment_id, webhook.attempt) == ("pi_1", None, None, None)


async def test_objects_that_are_no_payment_intents_show_nothing(reader: StripeGateway) -> None:
    webhook = reader.read_verified_webhook(body_of(type="charge.updated", data={"object": {"id": "ch_1", "object": "charge"}}))
    assert (webhook.object_id, webhook.observation) == ("ch_1", None)
    assert not reader.handles(webhook.event_type)


async def test_a_signed_body_that_is_no_event_is_rejected(reader: StripeGateway) -> None:
    body = b'{"object": "v2.core.event", "id": "evt_1"}'
    with pytest.raises(Rejected):
        reader.read_webhook(body, signed(body, SECRETS[0]))


# ── The table ──


async def test_only_what_is_configured_is_opened() -> None:
    async with opened_gateways(Settings()) as gateways:
        assert gateways == {}
    async with opened_gateways(Settings(stripe=Stripe(api_key=SecretStr("sk_test_x")))) as gateways:
        assert {name: gateway.name for name, gateway in gateways.items()} == {"stripe": "stripe"}
