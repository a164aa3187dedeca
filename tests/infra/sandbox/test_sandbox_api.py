"""The sandbox over HTTP: what Stripe's API promises, by the official SDK where that can say it, and what tests and customers do to it."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import stripe

from infra.sandbox.behaviour import Conditions
from infra.sandbox.server import MAX_BODY_BYTES, running_sandbox
from schemas.errors import BadConfiguration

from .conftest import DEADLINE_S, KEY, NO_REDIRECTS, Client, client

pytestmark = pytest.mark.integration

THREE_D_SECURE = "pm_card_threeDSecure2Required"
DAY_S = 24 * 3600


# ── The official SDK ──


async def test_the_official_sdk_creates_confirms_and_reads(sandbox: Client) -> None:
    intents = sandbox.stripe.v1.payment_intents
    created = await intents.create_async({"amount": 1999, "currency": "eur", "metadata": {"order_id": "o1", "payment_id": "p1"}, **NO_REDIRECTS})
    assert (created.status, created.metadata["order_id"], created.client_secret is not None) == ("requires_payment_method", "o1", True)
    paid = await intents.confirm_async(created.id, {"payment_method": "pm_card_visa", "expand": ["latest_charge"]})
    assert (paid.status, paid.amount_received) == ("succeeded", 1999)
    assert isinstance(paid.latest_charge, stripe.Charge)
    assert (paid.latest_charge.amount_captured, paid.latest_charge.amount_refunded, paid.latest_charge.paid) == (1999, 0, True)
    read = await intents.retrieve_async(created.id)
    assert read.latest_charge == paid.latest_charge.id
    assert (await sandbox.stripe.v1.charges.retrieve_async(paid.latest_charge.id)).receipt_url == paid.latest_charge.receipt_url


async def test_the_official_sdk_captures_cancels_and_lists(sandbox: Client) -> None:
    intents = sandbox.stripe.v1.payment_intents
    held = await intents.create_async(
        {
            "amount": 5000,
            "currency": "usd",
            "capture_method": "manual",
            "confirm": True,
            "payment_method": "pm_card_mastercard",
            "return_url": "https://shop.test/back",
        }
    )
    assert (held.status, held.amount_capturable) == ("requires_capture", 5000)
    taken = await intents.capture_async(held.id, {"amount_to_capture": 3000})
    assert (taken.status, taken.amount_received, taken.amount_capturable) == ("succeeded", 3000, 0)
    second = await intents.create_async({"amount": 100, "currency": "eur", **NO_REDIRECTS})
    gone = await intents.cancel_async(second.id, {"cancellation_reason": "abandoned"})
    assert (gone.status, gone.cancellation_reason) == ("canceled", "abandoned")
    page = await intents.list_async({"limit": 1, "created": {"gte": held.created}})
    assert ([intent.id for intent in page.data], page.has_more) == ([second.id], True)
    rest = await intents.list_async({"limit": 10, "starting_after": second.id})
    assert ([intent.id for intent in rest.data], rest.has_more) == ([held.id], False)
    with pytest.raises(stripe.InvalidRequestError):
        await intents.list_async({"starting_after": "pi_unknown"})


async def test_the_official_sdk_makes_payment_methods_endpoints_and_reads_events(sandbox: Client) -> None:
    v1 = sandbox.stripe.v1
    method = await v1.payment_methods.create_async(
        {"type": "card", "card": {"number": "4242424242424242", "exp_month": 12, "exp_year": 2035, "cvc": "123"}}
    )
    assert (method.card.brand, method.card.last4) == ("visa", "4242")
    assert (await v1.payment_methods.retrieve_async(method.id)).id == method.id
    assert (await sandbox.paid(method.id))["status"] == "succeeded"
    endpoint = await v1.webhook_endpoints.create_async({"url": "http://127.0.0.1:9/none", "enabled_events": ["charge.refunded"]})
    assert endpoint.secret.startswith("whsec_")
    again = await v1.webhook_endpoints.create_async({"url": "http://127.0.0.1:9/none", "enabled_events": ["charge.expired"]})
    assert (again.id, again.secret, again.enabled_events) == (endpoint.id, endpoint.secret, ["charge.expired"])
    assert len((await v1.webhook_endpoints.list_async()).data) == 1
    assert (await v1.webhook_endpoints.retrieve_async(endpoint.id)).enabled_events == ["charge.expired"]
    assert (await v1.webhook_endpoints.delete_async(endpoint.id)).deleted
    with pytest.raises(stripe.InvalidRequestError):
        await v1.webhook_endpoints.retrieve_async(endpoint.id)
    events = await v1.events.list_async({"limit": 2})
    assert ([event.type for event in events.data], events.has_more) == (["payment_intent.succeeded", "charge.succeeded"], True)
    assert (await v1.events.retrieve_async(events.data[0].id)).data.object["status"] == "succeeded"


@pytest.mark.parametrize(
    ("method", "code", "decline_code", "advice_code"),
    [
        ("pm_card_chargeDeclined", "card_declined", "generic_decline", "try_again_later"),
        ("pm_card_chargeDeclinedInsufficientFunds", "card_declined", "insufficient_funds", "try_again_later"),
        ("pm_card_chargeDeclinedStolenCard", "card_declined", "stolen_card", "do_not_try_again"),
        ("pm_card_chargeDeclinedExpiredCard", "expired_card", "expired_card", "do_not_try_again"),
    ],
)
async def test_a_decline_is_a_card_error_and_leaves_the_intent_open(
    sandbox: Client, method: str, code: str, decline_code: str, advice_code: str
) -> None:
    created = await sandbox.create(method)
    with pytest.raises(stripe.CardError) as refusal:
        await sandbox.stripe.v1.payment_intents.confirm_async(created.body["id"])
    error: Any = refusal.value.error
    assert (refusal.value.http_status, error.code, error.decline_code, error.advice_code) == (402, code, decline_code, advice_code)
    assert (error.payment_intent.status, error.payment_intent.payment_method) == ("requires_payment_method", None)
    assert error.payment_intent.last_payment_error.decline_code == decline_code
    assert error.payment_method.card.last4 == error.payment_intent.last_payment_error.payment_method.card.last4
    assert error.charge == error.payment_intent.latest_charge
    assert (await sandbox.stripe.v1.charges.retrieve_async(error.charge)).status == "failed"
    assert await sandbox.ledger() == []
    assert (await sandbox.confirm(created.body["id"], payment_method="pm_card_visa")).body["status"] == "succeeded"


async def test_errors_are_of_the_kind_the_sdk_knows(sandbox: Client) -> None:
    intents = sandbox.stripe.v1.payment_intents
    paid = await sandbox.paid()
    with pytest.raises(stripe.InvalidRequestError) as state:
        await intents.cancel_async(paid["id"])
    assert (state.value.code, state.value.http_status) == ("payment_intent_unexpected_state", 400)
    assert state.value.error is not None
    assert state.value.error.payment_intent is not None
    assert state.value.error.payment_intent.status == "succeeded"
    with pytest.raises(stripe.InvalidRequestError) as unknown:
        await intents.retrieve_async("pi_unknown")
    assert (unknown.value.code, unknown.value.http_status, unknown.value.param) == ("resource_missing", 404, "intent")
    with pytest.raises(stripe.InvalidRequestError) as typing_error:
        await intents.create_async({"amount": 100, "currency": "eur", "amonut": 5})  # type: ignore[typeddict-unknown-key]
    assert (typing_error.value.code, typing_error.value.param) == ("parameter_unknown", "amonut")
    with pytest.raises(stripe.InvalidRequestError) as no_method:
        await intents.create_async({"amount": 100, "currency": "eur", "confirm": True, **NO_REDIRECTS})
    assert no_method.value.param == "payment_method"
    with pytest.raises(stripe.InvalidRequestError) as no_such_method:
        await intents.create_async({"amount": 100, "currency": "eur", "payment_method": "pm_unknown"})
    assert (no_such_method.value.http_status, no_such_method.value.param) == (400, "payment_method")
    await sandbox.order_fault(kind="rate_limit")
    with pytest.raises(stripe.RateLimitError):
        await intents.retrieve_async(paid["id"])
    stranger = stripe.StripeClient("sk_live_1", base_addresses={"api": sandbox.url}, http_client=stripe.AIOHTTPClient(session=sandbox.session))
    with pytest.raises(stripe.AuthenticationError):
        await stranger.v1.payment_intents.retrieve_async(paid["id"])


# ── HTTP ──


@pytest.mark.parametrize(
    ("token", "status"),
    [
        ("", 401),
        ("Bearer ", 401),
        ("Bearer pk_test_1", 401),
        ("Bearer sk_live_1", 401),
        ("Basic !!!", 401),
        (f"Bearer {KEY}", 200),
        ("Basic " + base64.b64encode(f"{KEY}:".encode()).decode(), 200),
    ],
)
async def test_a_key_is_asked_for(sandbox: Client, token: str, status: int) -> None:
    for path in ("/v1/payment_intents", "/v1/events", "/v1/webhook_endpoints"):
        answer = await sandbox.ask("GET", path, token=token)
        assert answer.status == status
        assert status == 200 or "sk_live_1" not in str(answer.body)


async def test_the_browser_gives_its_card_with_a_publishable_key(sandbox: Client) -> None:
    card = {"type": "card", "card[number]": "4000000000000002", "card[exp_month]": "1", "card[exp_year]": "2030"}
    answer = await sandbox.ask("POST", "/v1/payment_methods", token="Bearer pk_test_1", data=card)
    assert (answer.status, answer.body["card"]["last4"]) == (200, "0002")
    assert card["card[number]"] not in str(answer.body)


async def test_bounds_and_unknown_routes_are_answered_in_words(sandbox: Client) -> None:
    large = await sandbox.ask("POST", "/v1/payment_intents", data={"description": "x" * MAX_BODY_BYTES})
    assert (large.status, large.body["error"]["type"]) == (413, "invalid_request_error")
    for method, path in (("GET", "/v1/refunds"), ("POST", "/v1/payment_intents/pi_1"), ("DELETE", "/v1/payment_intents")):
        answer = await sandbox.ask(method, path)
        assert answer.status == 404
        assert "Unrecognized request URL" in answer.body["error"]["message"]
    assert (await sandbox.ask("GET", "/v1/payment_intents?" + "&".join(f"a{n}=1" for n in range(300)))).status == 400


async def test_methods_that_redirect_need_an_address_to_return_to(sandbox: Client) -> None:
    form = {"amount": "100", "currency": "eur", "payment_method": "pm_card_visa"}
    created = await sandbox.ask("POST", "/v1/payment_intents", data=form)
    refused = await sandbox.confirm(created.body["id"])
    assert (refused.status, refused.body["error"]["param"]) == (400, "return_url")
    assert await sandbox.status(created.body["id"]) == "requires_confirmation"
    assert (await sandbox.confirm(created.body["id"], return_url="https://shop.test/back")).status == 200
    listed = await sandbox.ask("POST", "/v1/payment_intents", data=form | {"payment_method_types[]": "card", "confirm": "true"})
    assert listed.body["status"] == "succeeded"


async def test_the_ledger_tells_what_was_taken_and_for_what(sandbox: Client) -> None:
    tags = {"metadata[order_id]": "o1", "metadata[payment_id]": "p1"}
    paid = await sandbox.paid(**tags)
    held = await sandbox.paid(capture_method="manual", **{"metadata[order_id]": "o2"})
    released = await sandbox.paid(capture_method="manual", **{"metadata[order_id]": "o3"})
    await sandbox.ask("POST", f"/v1/payment_intents/{released['id']}/cancel")
    await sandbox.paid("pm_card_chargeDeclined", **{"metadata[order_id]": "o4"})
    await sandbox.paid("pm_usBankAccount_processing", **{"metadata[order_id]": "o5"})
    first, second, third = await sandbox.ledger()
    assert first.pop("created_at").endswith("Z")
    assert first == {
        "id": paid["latest_charge"],
        "payment_intent": paid["id"],
        "payment_id": "p1",
        "order_id": "o1",
        "amount_minor": 1999,
        "captured_minor": 1999,
        "refunded_minor": 0,
        "currency": "EUR",
        "status": "captured",
    }
    assert (second["payment_intent"], second["status"], second["captured_minor"]) == (held["id"], "authorized", 0)
    assert (third["status"], third["captured_minor"], third["payment_id"]) == ("released", 0, None)
    assert await sandbox.ledger(order_id="o2") == [second]
    assert await sandbox.ledger(order_id="o4") == []


# ── Idempotency keys ──


async def test_a_repeated_request_gets_the_first_answer_and_does_nothing(sandbox: Client) -> None:
    first = await sandbox.create(key="create-1")
    again = await sandbox.create(key="create-1")
    assert (again.body, again.headers["Idempotent-Replayed"]) == (first.body, "true")
    assert "Idempotent-Replayed" not in first.headers
    declined = [await sandbox.confirm(first.body["id"], key="confirm-1", payment_method="pm_card_chargeDeclined") for _ in range(2)]
    assert [answer.status for answer in declined] == [402, 402]
    assert declined[0].body == declined[1].body
    paid = [await sandbox.confirm(first.body["id"], key="confirm-2", payment_method="pm_card_visa") for _ in range(3)]
    assert {answer.body["status"] for answer in paid} == {"succeeded"}
    assert len(await sandbox.ledger()) == 1


async def test_a_key_is_for_one_request(sandbox: Client) -> None:
    created = await sandbox.create(key="k")
    for other in (await sandbox.create(key="k", amount="2000"), await sandbox.confirm(created.body["id"], key="k")):
        assert (other.status, other.body["error"]["type"]) == (400, "idempotency_error")
    with pytest.raises(stripe.IdempotencyError):
        await sandbox.stripe.v1.payment_intents.create_async({"amount": 1, "currency": "eur"}, {"idempotency_key": "k"})


async def test_what_was_turned_away_before_it_began_is_not_saved(sandbox: Client) -> None:
    assert (await sandbox.create(key="k", amount="nothing")).status == 400
    assert (await sandbox.ask("POST", "/v1/payment_intents", key="k", token="Bearer wrong")).status == 401
    await sandbox.order_fault(kind="rate_limit", operation="create")
    limited = await sandbox.create(key="k")
    assert (limited.status, limited.headers["Retry-After"]) == (429, "1")
    assert (await sandbox.create(key="k")).status == 200


async def test_after_a_day_a_key_is_a_new_charge(sandbox: Client) -> None:
    form = {"confirm": "true"}
    first = await sandbox.create(key="k", **form)
    await sandbox.ask("POST", "/_sandbox/clock", json={"advance_seconds": DAY_S - 60})
    assert (await sandbox.create(key="k", **form)).body == first.body
    await sandbox.ask("POST", "/_sandbox/clock", json={"advance_seconds": 61})
    second = await sandbox.create(key="k", **form)
    assert second.body["id"] != first.body["id"]
    assert second.body["created"] >= first.body["created"] + DAY_S
    assert len(await sandbox.ledger()) == 2


async def test_the_same_key_twice_at_once_runs_once(sandbox: Client) -> None:
    created = await sandbox.create()
    await sandbox.order_fault(kind="slow", operation="confirm", delay_seconds=1)
    answers = await asyncio.gather(*(sandbox.confirm(created.body["id"], key="k") for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 409, 409, 409, 409]
    assert {answer.body["error"]["code"] for answer in answers if answer.status == 409} == {"idempotency_key_in_use"}
    assert (await sandbox.confirm(created.body["id"], key="k")).body["status"] == "succeeded", "409 was not saved"
    assert len(await sandbox.ledger()) == 1


async def test_two_keys_at_once_charge_once(sandbox: Client) -> None:
    created = await sandbox.create()
    answers = await asyncio.gather(*(sandbox.confirm(created.body["id"], key=f"k{n}") for n in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 400, 400, 400, 400]
    assert len(await sandbox.ledger()) == 1


# ── Faults ──


async def test_a_lost_answer_was_a_charge_and_its_key_tells(sandbox: Client) -> None:
    created = await sandbox.create(**{"metadata[order_id]": "o1"})
    await sandbox.order_fault(kind="answer_lost", operation="confirm", match={"metadata": {"order_id": "o1"}})
    other = await sandbox.paid(**{"metadata[order_id]": "o2"})
    assert other["status"] == "succeeded"
    with pytest.raises(aiohttp.ClientError):
        await sandbox.confirm(created.body["id"], key="k")
    assert await sandbox.status(created.body["id"]) == "succeeded"
    assert len(await sandbox.ledger(order_id="o1")) == 1
    again = await sandbox.confirm(created.body["id"], key="k")
    assert (again.body["status"], again.headers["Idempotent-Replayed"]) == ("succeeded", "true")


@pytest.mark.parametrize(("after_charge", "status"), [(False, "requires_confirmation"), (True, "succeeded")])
async def test_a_500_says_nothing_about_the_charge_and_stays_under_its_key(sandbox: Client, after_charge: bool, status: str) -> None:
    created = await sandbox.create()
    await sandbox.order_fault(kind="error_500", operation="confirm", after_charge=after_charge)
    first, again = [await sandbox.confirm(created.body["id"], key="k") for _ in range(2)]
    assert (first.status, first.body["error"]["type"]) == (500, "api_error")
    assert (again.status, again.headers["Idempotent-Replayed"]) == (500, "true")
    assert await sandbox.status(created.body["id"]) == status


async def test_a_refused_connection_did_nothing(sandbox: Client) -> None:
    created = await sandbox.create()
    await sandbox.order_fault(kind="refuse", operation="confirm")
    with pytest.raises(aiohttp.ClientError):
        await sandbox.confirm(created.body["id"], key="k")
    assert await sandbox.status(created.body["id"]) == "requires_confirmation"
    again = await sandbox.confirm(created.body["id"], key="k")
    assert again.status == 200
    assert "Idempotent-Replayed" not in again.headers


@pytest.mark.parametrize(("after_charge", "status"), [(False, "requires_confirmation"), (True, "succeeded")])
async def test_a_timeout_lasts_until_the_client_gives_up(sandbox: Client, after_charge: bool, status: str) -> None:
    created = await sandbox.create()
    await sandbox.order_fault(kind="timeout", operation="confirm", after_charge=after_charge)
    waiting = asyncio.create_task(sandbox.confirm(created.body["id"], key="k"))
    async with asyncio.timeout(DEADLINE_S):
        while not (await sandbox.ask("GET", "/_sandbox/faults")).body["faults"][0]["struck"]:
            pass
    assert await sandbox.status(created.body["id"]) == status
    assert not waiting.done()
    waiting.cancel()
    async with asyncio.timeout(DEADLINE_S):
        while (again := await sandbox.confirm(created.body["id"], key="k")).status == 409:
            pass
    assert (again.status, again.body["status"]) == (200, "succeeded")
    assert len(await sandbox.ledger()) == 1


async def test_faults_can_be_read_and_dropped(sandbox: Client) -> None:
    await sandbox.order_fault(kind="rate_limit", operation="retrieve", times=3)
    await sandbox.ask("GET", "/v1/payment_intents/pi_1")
    (fault,) = (await sandbox.ask("GET", "/_sandbox/faults")).body["faults"]
    assert (fault["kind"], fault["operation"], fault["times"], fault["struck"]) == ("rate_limit", "retrieve", 3, 1)
    await sandbox.ask("DELETE", "/_sandbox/faults")
    assert (await sandbox.ask("GET", "/v1/payment_intents/pi_1")).status == 404
    refused = await sandbox.ask("POST", "/_sandbox/faults", json={"kind": "fire"})
    assert (refused.status, refused.body["error"]["param"]) == (400, "kind")


# ── The customer, the bank and time ──


async def test_the_browser_pays_with_the_client_secret(sandbox: Client) -> None:
    created = (await sandbox.create(None)).body
    path = f"/_sandbox/payment_intents/{created['id']}/pay"
    wrong = await sandbox.ask("POST", path, json={"payment_method": "pm_card_visa", "client_secret": "pi_guessed"})
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "client_secret")
    declined = await sandbox.ask("POST", path, json={"payment_method": "pm_card_chargeDeclined", "client_secret": created["client_secret"]})
    assert declined.status == 402
    paid = await sandbox.ask("POST", path, json={"payment_method": "pm_card_visa", "client_secret": created["client_secret"]})
    assert (paid.status, paid.body["status"]) == (200, "succeeded")


@pytest.mark.parametrize(("outcome", "status"), [("success", "succeeded"), ("failure", "requires_payment_method")])
async def test_three_d_secure_by_api(sandbox: Client, outcome: str, status: str) -> None:
    asked = await sandbox.paid(THREE_D_SECURE)
    assert (asked["status"], asked["next_action"]["type"]) == ("requires_action", "redirect_to_url")
    done = await sandbox.ask("POST", f"/_sandbox/payment_intents/{asked['id']}/authenticate", json={"outcome": outcome})
    assert (done.body["status"], done.body["next_action"]) == (status, None)
    again = await sandbox.ask("POST", f"/_sandbox/payment_intents/{asked['id']}/authenticate", json={"outcome": outcome})
    assert (again.status, again.body["error"]["code"]) == (400, "payment_intent_unexpected_state")
    assert len(await sandbox.ledger()) == (outcome == "success")


@pytest.mark.parametrize(("outcome", "redirect_status"), [("success", "succeeded"), ("failure", "failed")])
async def test_three_d_secure_by_hand(sandbox: Client, outcome: str, redirect_status: str) -> None:
    created = (await sandbox.create(THREE_D_SECURE, description="Tea <& cake>")).body
    asked = (await sandbox.confirm(created["id"], return_url="https://shop.test/back?basket=7")).body
    page_url = asked["next_action"]["redirect_to_url"]["url"]
    async with sandbox.session.get(page_url) as answer:
        page = await answer.text()
        assert (answer.status, "no-store" in answer.headers["Cache-Control"]) == (200, True)
    assert "19.99 EUR" in page
    assert "Tea &lt;&amp; cake&gt;" in page
    assert 'name="viewport"' in page
    assert re.findall(r'<button[^>]* value="(\w+)"', page) == ["success", "failure"]
    async with sandbox.session.post(page_url, data={"outcome": outcome}, allow_redirects=False) as answer:
        assert answer.status == 303
        back = urlsplit(answer.headers["Location"])
    assert (back.netloc, back.path) == ("shop.test", "/back")
    assert parse_qs(back.query) == {
        "basket": ["7"],
        "payment_intent": [created["id"]],
        "payment_intent_client_secret": [created["client_secret"]],
        "redirect_status": [redirect_status],
    }
    async with sandbox.session.get(page_url) as answer:
        assert "does not wait for you" in await answer.text()


async def test_a_page_without_its_secret_does_nothing(sandbox: Client) -> None:
    asked = await sandbox.paid(THREE_D_SECURE)
    async with sandbox.session.post(f"{sandbox.url}/3ds/{asked['id']}/guessed", data={"outcome": "success"}) as answer:
        assert "does not wait for you" in await answer.text()
    assert await sandbox.status(asked["id"]) == "requires_action"


async def test_a_charge_has_a_receipt_to_look_at(sandbox: Client) -> None:
    paid = await sandbox.paid(currency="jpy", amount="500")
    charge = await sandbox.ask("GET", f"/v1/charges/{paid['latest_charge']}")
    async with sandbox.session.get(charge.body["receipt_url"]) as answer:
        assert (answer.status, "500 JPY" in await answer.text()) == (200, True)
    assert (await sandbox.ask("GET", "/receipts/ch_unknown")).status == 404


async def test_a_debit_settles_and_an_authorisation_lapses(sandbox: Client) -> None:
    cleared, returned = [await sandbox.paid("pm_usBankAccount_processing") for _ in range(2)]
    assert cleared["status"] == "processing"
    assert await sandbox.ledger() == []
    for intent, outcome, status in ((cleared, "success", "succeeded"), (returned, "failure", "requires_payment_method")):
        settled = await sandbox.ask("POST", f"/_sandbox/payment_intents/{intent['id']}/settle", json={"outcome": outcome})
        assert settled.body["status"] == status
    held = await sandbox.paid(capture_method="manual")
    lapsed = await sandbox.ask("POST", f"/_sandbox/payment_intents/{held['id']}/lapse")
    assert (lapsed.body["status"], lapsed.body["cancellation_reason"]) == ("canceled", "automatic")
    assert [charge["status"] for charge in await sandbox.ledger()] == ["captured", "released"]


async def test_the_clock_can_be_set(sandbox: Client) -> None:
    set_to = await sandbox.ask("POST", "/_sandbox/clock", json={"set": "2030-01-31T12:00:00Z"})
    assert set_to.body["time"].startswith("2030-01-31T12:00:0")
    assert (await sandbox.create()).body["created"] // 60 == 1_896_091_200 // 60
    for wrong in ({}, {"set": "tomorrow"}, {"set": -1}, {"advance_seconds": "5"}, {"set": 1, "advance_seconds": 1}, {"forward": 5}, {"set": 9e12}):
        assert (await sandbox.ask("POST", "/_sandbox/clock", json=wrong)).status == 400, wrong
    assert (await sandbox.ask("POST", "/_sandbox/clock", data=b"no json")).status == 400
    assert (await sandbox.ask("GET", "/_sandbox/clock")).body["time"].startswith("2030-01-31T12:00:")


# ── Flags ──


async def test_latency_and_luck_are_set_by_flags() -> None:
    async def outcomes(seed: int) -> list[int]:
        async with running_sandbox(conditions=Conditions(success_rate=0.5, failure_reasons="lost_card=1"), seed=seed) as url, client(url) as sandbox:
            return [(await sandbox.confirm((await sandbox.create()).body["id"])).status for _ in range(20)]

    first = await outcomes(3)
    assert set(first) == {200, 402}
    assert await outcomes(3) == first
    async with running_sandbox(conditions=Conditions(latency="0.15..0.2")) as url, client(url) as slow:
        begun = asyncio.get_running_loop().time()
        await slow.create()
        assert asyncio.get_running_loop().time() - begun >= 0.15


async def test_conditions_change_while_it_runs_and_back(sandbox: Client) -> None:
    before = await sandbox.ask("POST", "/_sandbox/settings", json={"success_rate": 0, "failure_reasons": "lost_card=1"})
    assert (before.status, before.body) == (200, {"latency": "0", "success_rate": 1.0, "failure_reasons": "card_declined=3,insufficient_funds=1"})
    assert (await sandbox.paid())["error"]["decline_code"] == "lost_card"
    for wrong in ({"success_rate": 2}, {"success_rate": "0.5"}, {"latency": 5}, {"latency": "soon"}, {"seed": 1}):
        assert (await sandbox.ask("POST", "/_sandbox/settings", json=wrong)).status == 400, wrong
    await sandbox.ask("POST", "/_sandbox/settings", json=before.body)
    assert (await sandbox.ask("GET", "/_sandbox/settings")).body == before.body
    assert (await sandbox.paid())["status"] == "succeeded"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("latency", "fast"),
        ("latency", "2..1"),
        ("latency", "-1"),
        ("latency", "1e9"),
        ("success_rate", 1.5),
        ("failure_reasons", "bad_luck=1"),
    ],
)
async def test_a_bad_flag_is_named(flag: str, value: Any) -> None:
    with pytest.raises(BadConfiguration, match="--" + flag.replace("_", "-")):
        async with running_sandbox(conditions=Conditions(**{flag: value})):
            pass


async def test_a_taken_port_is_named(sandbox: Client) -> None:
    port = urlsplit(sandbox.url).port or 0
    with pytest.raises(BadConfiguration, match=f"--port: {port} is taken"):
        async with running_sandbox(port=port):
            pass
