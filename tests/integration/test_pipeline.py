"""The pipeline from end to end, every part a real process: what a shop asks over HTTP, and what comes of it at the gateway, on topics, in figures.

The order of the tests matters in one way only: those at the end break something, and mend it again.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
import redis.asyncio
from confluent_kafka import Producer

from infra.local import environment
from schemas.codec import headers
from schemas.errors import Unavailable
from schemas.messages import Message
from tests.integration.machinery import get
from tests.integration.pipeline import API_KEY, Pipeline, Shop, eventually, opened_shop
from tests.processors.payment_paths import initiate

pytestmark = pytest.mark.integration

OPENED, TRIED, PAID = "PAYMENT_INITIATED", "PAYMENT_PROCESSING", "PAYMENT_COMPLETED"
PLACED, CREATED = "ORDER_PLACED PAYMENT_PENDING", "ORDER_CREATED PENDING"


# ── What a shop does ──


async def test_a_card_payment_is_accepted_carried_out_and_told_everywhere(shop: Shop) -> None:
    order = shop.order()
    accepted = await shop.pay(order, wait_s=None)
    assert accepted.status == 202
    assert accepted.body["status"] == "PENDING"
    payment_id, links = accepted.body["payment_id"], accepted.body["links"]
    assert accepted.headers["Location"] == links["self"] == f"/api/v1/payments/{payment_id}"
    payment = await shop.reaches(payment_id, "COMPLETED")
    assert (payment["amount_minor"], payment["captured_minor"], payment["order_id"]) == (1999, 1999, order)
    for path in (f"/payments/payment/{payment_id}", f"/payments/transaction/{payment['transaction_id']}"):
        assert (await shop.caller.get(path)).body == payment
    assert (await shop.caller.get(links["order"].removeprefix("/api/v1"))).body["items"] == [payment]
    assert (await shop.caller.get("/payments", order_id=order)).body["items"] == [payment]
    assert (await shop.caller.get(links["command"].removeprefix("/api/v1"))).body["status"] == "applied"
    assert await shop.story(payment_id) == [OPENED, TRIED, PAID]
    assert await shop.order_story(order, until="PENDING") == [PLACED, CREATED]
    assert await shop.charged(order) == {order: [1999]}
    async with opened_shop(shop.pipeline, "another") as another:
        assert (await another.caller.get(f"/payments/{payment_id}")).status == 404


async def test_who_waits_gets_the_outcome_and_a_repeat_gets_it_again(shop: Shop) -> None:
    order, key = shop.order(), secrets.token_hex(8)
    first = await shop.pay(order, key=key)
    assert (first.status, first.body["status"], first.headers["Preference-Applied"]) == (200, "COMPLETED", "wait=20")
    again = await shop.pay(order, key=key)
    assert (again.status, again.body, again.replayed) == (200, first.body, True)
    other = await shop.pay(order, key=key, amount_minor=2000)
    assert (other.status, other.body["code"]) == (422, "idempotency_key_reused")
    assert await shop.charged(order) == {order: [1999]}


async def test_a_decline_and_then_another_card(shop: Shop) -> None:
    order = shop.order()
    declined = await shop.pay(order, "pm_card_chargeDeclined")
    assert (declined.status, declined.body["status"]) == (200, "FAILED")
    assert declined.body["failure"]["code"] == "generic_decline"
    payment_id = declined.body["payment_id"]
    assert await shop.order_story(order, until="PAYMENT_FAILED") == [PLACED, "ORDER_STATUS_CHANGED PAYMENT_FAILED"]
    paid = await shop.post("/payments/confirm", {"payment_id": payment_id, "payment_method": "pm_card_visa"})
    assert (paid.status, paid.body["status"], paid.body["failure"]) == (200, "COMPLETED", None)
    assert await shop.story(payment_id) == [OPENED, TRIED, "PAYMENT_FAILED", TRIED, PAID]
    assert (await shop.order_story(order, until="PENDING"))[2:] == ["ORDER_STATUS_CHANGED PAYMENT_PENDING", CREATED]
    assert await shop.charged(order) == {order: [1999]}


async def test_a_part_of_what_is_held_is_captured(shop: Shop) -> None:
    order = shop.order()
    held = await shop.pay(order, capture_method="manual")
    assert (held.status, held.body["status"], held.body["captured_minor"]) == (200, "AUTHORIZED", 0)
    payment_id = held.body["payment_id"]
    too_much = await shop.post(f"/payments/{payment_id}/capture", {"amount_minor": 2000})
    assert (too_much.status, too_much.body["code"]) == (409, "capture_amount")
    captured = await shop.post(f"/payments/{payment_id}/capture", {"amount_minor": 500})
    assert (captured.status, captured.body["status"], captured.body["captured_minor"]) == (200, "COMPLETED", 500)
    assert await shop.story(payment_id) == [OPENED, TRIED, "PAYMENT_AUTHORIZED", PAID]
    assert await shop.order_story(order, until="PENDING") == [PLACED, CREATED]
    assert await shop.charged(order) == {order: [500]}


async def test_an_order_whose_payment_was_cancelled_is_paid_by_another(shop: Shop) -> None:
    order = shop.order()
    held = await shop.pay(order, capture_method="manual")
    refused = await shop.pay(order)
    assert (refused.status, refused.body["code"]) == (409, "order_has_payment")
    cancelled = await shop.post(f"/payments/{held.body['payment_id']}/cancel")
    assert (cancelled.status, cancelled.body["status"]) == (200, "CANCELLED")
    paid = await shop.pay(order, key="again")
    assert (paid.status, paid.body["status"]) == (200, "COMPLETED")
    told = [PLACED, "ORDER_CANCELLED CANCELLED", "ORDER_STATUS_CHANGED PAYMENT_PENDING", CREATED]
    assert await shop.order_story(order, until="PENDING") == told
    assert await shop.charged(order) == {order: [0, 1999]}, "the hold took nothing"


@pytest.mark.parametrize("held", [True, False], ids=["a hold", "an intent"])
async def test_what_is_cancelled_is_void_at_the_gateway(shop: Shop, held: bool) -> None:
    order = shop.order()
    opened = await (shop.pay(order, capture_method="manual") if held else shop.post("/payments/intent", shop.purchase(order)))
    assert (opened.status, opened.body["status"]) == (200, "AUTHORIZED" if held else "PENDING")
    payment_id, secret = opened.body["payment_id"], opened.body["client_secret"]
    cancelled = await shop.post(f"/payments/{payment_id}/cancel", {"reason": "changed_my_mind"})
    assert (cancelled.status, cancelled.body["status"]) == (200, "CANCELLED")
    assert await shop.story(payment_id) == [OPENED, *([TRIED, "PAYMENT_AUTHORIZED"] if held else []), "PAYMENT_CANCELLED"]
    assert await shop.order_story(order, until="CANCELLED") == [PLACED, "ORDER_CANCELLED CANCELLED"]
    refused = await shop.post(f"/payments/{payment_id}/capture", wait_s=None)
    command = refused.body["links"]["command"].removeprefix("/api/v1")

    async def decided() -> dict[str, Any] | None:
        seen = (await shop.caller.get(command)).body
        return seen if seen["status"] != "accepted" else None

    assert refused.status == 202
    assert (await eventually(decided, 20, "the command is decided"))["refusal"]["code"] == "not_authorized"
    assert sum((await shop.charged(order))[order]) == 0
    if secret:
        with pytest.raises(Unavailable, match="payment_intent_unexpected_state"):
            await shop.bank.pay(secret, "pm_card_visa")


@pytest.mark.parametrize("passes", [True, False])
async def test_the_customer_is_asked_by_the_bank(shop: Shop, passes: bool) -> None:
    order = shop.order()
    asked = await shop.pay(order, "pm_card_threeDSecure2Required", return_url="https://shop.example/back")
    assert (asked.status, asked.body["status"]) == (200, "REQUIRES_ACTION")
    assert asked.body["next_action"]["redirect_url"].startswith(shop.pipeline.sandbox.url)
    payment_id = asked.body["payment_id"]
    await shop.bank.authenticate(asked.body["client_secret"].partition("_secret_")[0], passes=passes)
    ended = await shop.reaches(payment_id, "COMPLETED" if passes else "FAILED")
    assert (ended["client_secret"], ended["next_action"]) == (None, None)
    assert await shop.story(payment_id) == [OPENED, TRIED, "PAYMENT_ACTION_REQUIRED", PAID if passes else "PAYMENT_FAILED"]
    await shop.order_story(order, until="PENDING" if passes else "PAYMENT_FAILED")
    assert sum((await shop.charged(order))[order]) == (1999 if passes else 0)


async def test_only_a_webhook_tells_that_the_browser_has_paid(shop: Shop) -> None:
    order = shop.order()
    opened = await shop.post("/payments/intent", shop.purchase(order))
    for kind in ("webhook_twice", "webhook_out_of_order"):
        await shop.bank.order_fault(kind, times=1, match={"metadata": {"order_id": order}})
    await shop.bank.pay(opened.body["client_secret"], "pm_card_visa")
    payment_id = opened.body["payment_id"]
    assert (await shop.reaches(payment_id, "COMPLETED"))["captured_minor"] == 1999
    assert await shop.story(payment_id) == [OPENED, TRIED, PAID]
    assert await shop.order_story(order, until="PENDING") == [PLACED, CREATED]
    assert await shop.charged(order) == {order: [1999]}
    await shop.bank.drop_faults()


async def test_an_unknown_outcome_is_found_out_by_its_timer(shop: Shop) -> None:
    order = shop.order()
    about = {"metadata": {"order_id": order}}
    await shop.bank.order_fault("answer_lost", operation="confirm", times=1, match=about)
    await shop.bank.order_fault("webhook_never", times=50, match=about)
    lost = await shop.pay(order, wait_s=1)
    assert (lost.status, lost.body["status"]) == (202, "PROCESSING")
    assert await shop.charged(order) == {order: [1999]}, "the money has moved, and nobody has been told"
    payment_id = lost.body["payment_id"]
    await shop.reaches(payment_id, "COMPLETED")
    assert await shop.story(payment_id) == [OPENED, TRIED, PAID]
    timeline = (await shop.caller.get(f"/payments/{payment_id}/events")).body["items"]
    _, tried, paid = (datetime.fromisoformat(event["occurred_at"]) for event in timeline)
    assert (paid - tried).total_seconds() >= 5
    assert [message.event_type for message in await about_order(shop, "payment-commands", order)] == ["InitiatePayment", "ResolveAttempt"]
    assert await about_order(shop, "payment-webhook-received", order) == []
    assert await shop.charged(order) == {order: [1999]}
    await shop.bank.drop_faults()


async def test_figures_agree_with_the_payments(shop: Shop) -> None:
    paid = [shop.pay(shop.order(), currency="JPY"), shop.pay(shop.order(), capture_method="manual")]
    await asyncio.gather(*paid, shop.pay(shop.order(), "pm_card_chargeDeclinedInsufficientFunds"))
    everybody = shop.pipeline.caller(shop.session, "boss", "admin")
    payments = [payment for payment in await all_payments(everybody) if payment["version"]]
    analyst = shop.pipeline.caller(shop.session, "ann", "analyst")
    statuses = Counter(payment["status"] for payment in payments)

    async def caught_up() -> dict[str, Any] | None:
        figures = (await analyst.get("/analytics/summary")).body
        return figures if figures["payments_by_status"] == statuses else None

    figures = await eventually(caught_up, 20, "analytics has folded all")
    assert figures["payments"] == len(payments)
    assert {each["currency"]: (each["payments"], each["captured_minor"]) for each in figures["volume_by_currency"]} == {
        currency: (len(of_it), sum(payment["captured_minor"] for payment in of_it))
        for currency in ("EUR", "JPY")
        if (of_it := [payment for payment in payments if payment["currency"] == currency])
    }
    succeeded = statuses["COMPLETED"] + statuses["AUTHORIZED"]
    assert figures["success_rate"] == pytest.approx(succeeded / (succeeded + statuses["FAILED"]))
    reasons = Counter(payment["failure"]["code"] for payment in payments if payment["status"] == "FAILED")
    assert {each["code"]: each["payments"] for each in figures["failure_reasons"]} == reasons
    (latency,) = figures["gateway_latency_ms"]
    assert latency["gateway"] == "stripe"
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] < 8000
    assert (await shop.caller.get("/analytics/summary")).status == 403


# ── What goes wrong ──


async def test_redis_may_forget_everything_at_any_time(shop: Shop) -> None:
    orders = [shop.order() for _ in range(40)]

    async def buy(order: str) -> None:
        key = secrets.token_hex(8)
        answers = await asyncio.gather(*(shop.pay(order, key=key) for _ in range(3)))
        answers.append(await shop.pay(order, key=key))
        assert {(answer.status, answer.body["status"]) for answer in answers} == {(200, "COMPLETED")}
        assert len({answer.body["payment_id"] for answer in answers}) == 1
        assert sum(answer.replayed for answer in answers) >= 3

    async with redis.asyncio.Redis.from_url(shop.pipeline.settings.redis.url.get_secret_value()) as store:
        buying = asyncio.gather(*(buy(order) for order in orders))
        flushed = 0
        while not buying.done():
            await store.flushdb()
            flushed += 1
            await asyncio.sleep(0.02)
        await buying
    assert flushed > 10
    assert await shop.charged(*orders) == {order: [1999] for order in orders}


async def test_a_gateway_that_is_away_is_asked_again_when_it_is_back(shop: Shop) -> None:
    orders = [shop.order() for _ in range(3)]
    await asyncio.to_thread(shop.pipeline.sandbox.stop)
    accepted = await asyncio.gather(*(shop.pay(order, wait_s=None) for order in orders))
    assert {answer.status for answer in accepted} == {202}

    async def not_sent() -> bool:
        rows = await asyncio.to_thread(shop.pipeline.query, "SELECT count(*) FROM attempts WHERE status = 'NOT_SENT' AND operation IS NOT NULL")
        return rows == [(3,)]

    await eventually(not_sent, 20, "it is known that nothing was sent")
    assert {(await shop.payment(answer.body["payment_id"]))["status"] for answer in accepted} == {"PROCESSING"}
    shop.pipeline.sandbox.start()
    await asyncio.to_thread(shop.pipeline.sandbox.wait_ready)
    for answer in accepted:
        await shop.reaches(answer.body["payment_id"], "COMPLETED", within=60)
        assert await shop.story(answer.body["payment_id"]) == [OPENED, TRIED, PAID]
    assert await shop.charged(*orders) == {order: [1999] for order in orders}


async def test_a_call_that_a_stopping_worker_leaves_behind_is_no_doubt(shop: Shop) -> None:
    """The next worker looks at once what has become of it, as after a crash; no timer is needed, and what comes behind it finds it done."""
    pipeline, order = shop.pipeline, shop.order()
    await asyncio.to_thread(pipeline.workers["payments"].stop)
    hasty = pipeline.settings.model_copy(update={"worker": pipeline.settings.worker.model_copy(update={"drain_s": 1.0})})
    worker = await asyncio.to_thread(lambda: pipeline.start("worker", "payments", settings=hasty))
    await shop.bank.order_fault("slow", operation="confirm", delay_seconds=7, match={"metadata": {"order_id": order}})
    held = await shop.pay(order, wait_s=None, capture_method="manual")
    payment_id = held.body["payment_id"]
    await eventually(lambda: created_at_the_gateway(shop, [order]), 30, "its object is there, and is being confirmed")
    captured = await shop.post(f"/payments/{payment_id}/capture", wait_s=None)
    await asyncio.to_thread(worker.stop)
    assert worker.exit_code == 0
    assert '"outcome":"unknown"' not in worker.log.read_text(), "it has not hung up and called that an answer"
    assert (await shop.payment(payment_id))["status"] == "PROCESSING"

    async def is_held() -> bool:
        return await shop.charged(order) == {order: [0]}

    await eventually(is_held, 20, "the gateway has done what it was asked for")
    pipeline.workers["payments"].start()
    await asyncio.to_thread(pipeline.workers["payments"].wait_ready)
    await shop.reaches(payment_id, "COMPLETED")
    assert (await shop.caller.get(captured.body["links"]["command"].removeprefix("/api/v1"))).body["status"] == "applied"
    assert [message.event_type for message in await about_order(shop, "payment-commands", order)] == ["InitiatePayment", "CapturePayment"]
    assert await shop.charged(order) == {order: [1999]}


async def test_postgres_may_go_away_and_come_back(shop: Shop) -> None:
    pipeline = shop.pipeline
    parked, orders = pipeline.parked(), [shop.order() for _ in range(20)]
    was = await shop.bank.change(latency="1")
    accepted = await asyncio.gather(*(shop.pay(order, wait_s=None) for order in orders))
    await eventually(lambda: created_at_the_gateway(shop, orders), 30, "the gateway is being asked")
    late, key = shop.order(), secrets.token_hex(8)
    with pipeline.without_postgres():
        for _ in range(2):  # the second one waits for a connection as long as it may
            status, body, told = await shop.post_once("/payments/process", shop.purchase(late, payment_method="pm_card_visa"), key=key)
            assert (status, body["code"], body["retryable"]) == (503, "unavailable", True)
            assert int(told["Retry-After"]) >= 1
        for worker in pipeline.workers.values():
            assert await asyncio.to_thread(get, worker, "/livez") == {"status": "live", "detail": None}
        await eventually(lambda: holds(pipeline, "payments"), 30, "the payments worker holds")
        assert not await asyncio.to_thread(pipeline.api.is_ready)
    taken = await shop.pay(late, key=key)
    assert (taken.status, taken.body["status"]) == (200, "COMPLETED")
    for answer_before in accepted:
        await shop.reaches(answer_before.body["payment_id"], "COMPLETED", within=60)
    for program in (pipeline.api, pipeline.relay, *pipeline.workers.values()):
        await asyncio.to_thread(program.wait_ready)
    await shop.bank.change(**was)
    assert await shop.story(accepted[0].body["payment_id"]) == [OPENED, TRIED, PAID]
    assert await shop.charged(*orders, late) == {order: [1999] for order in (*orders, late)}
    assert pipeline.parked() == parked
    assert all(program.running for program in (pipeline.api, pipeline.relay, *pipeline.workers.values())), "nobody had to be started again"


@pytest.mark.parametrize("wrong", ["payment_id", "event_id"])
async def test_a_command_with_an_id_that_is_none_is_poison(shop: Shop, wrong: str) -> None:
    order, healthy = shop.order("poison"), shop.order()
    known = shop.pipeline.parked()
    await publish(shop, replace(initiate(order_id=order), **{wrong: "no-uuid"}))
    assert (await shop.pay(healthy)).body["status"] == "COMPLETED"

    async def parked() -> list[Any]:
        return shop.pipeline.parked()[len(known) :]

    assert await eventually(parked, 20, "it is parked") == [("poison", order, "Rejected")]
    assert shop.pipeline.workers["payments"].running


async def test_twenty_bugs_halt_the_group_until_somebody_resumes_it(shop: Shop) -> None:
    """A table that takes no row, as after half a migration: no message is to blame, and each would fail."""
    pipeline = shop.pipeline
    worker = pipeline.workers["payments"]
    known, failing, waiting = pipeline.parked(), [shop.order("bug") for _ in range(20)], [shop.order() for _ in range(5)]
    with pipeline.broken("ALTER TABLE attempts ADD CONSTRAINT none CHECK (number < 0) NOT VALID", "ALTER TABLE attempts DROP CONSTRAINT none"):
        failed = await asyncio.gather(*(shop.pay(order, wait_s=None) for order in failing))

        async def halted() -> bool:
            return "20 bugs" in (await asyncio.to_thread(get, worker, "/readyz?verbose"))["checks"]["halted"]

        await eventually(halted, 30, "the group is halted")
        accepted = await asyncio.gather(*(shop.pay(order, wait_s=None) for order in waiting))
        assert {answer.status for answer in accepted} == {202}, "requests are taken all the while"
        assert (await asyncio.to_thread(get, worker, "/livez"))["status"] == "live"
    assert (await asyncio.to_thread(get, worker, "/readyz?verbose"))["status"] == "not ready", "mending alone does not let it go on"
    parked = pipeline.parked()[len(known) :]
    assert sorted(parked) == sorted(("bug", order, "CheckViolation") for order in failing)
    resumed = await asyncio.to_thread(paystream, pipeline, "resume", "payments", "--as", "alice")
    assert (resumed.returncode, resumed.stderr) == (0, "payments goes on\n")
    for answer in accepted:
        await shop.reaches(answer.body["payment_id"], "COMPLETED")
    assert await shop.charged(*failing) == {order: [] for order in failing}, "what is parked stays parked"
    for answer in failed:
        assert (await shop.payment(answer.body["payment_id"]))["status"] == "PENDING"
    assert pipeline.query("SELECT actor, action, subject FROM audit_log") == [("alice", "resume", "payments")]
    again = await asyncio.to_thread(paystream, pipeline, "resume", "payments")
    assert (again.returncode, again.stderr) == (0, "payments is not halted: nothing to do\n")


# ── How the above is done ──


async def about_order(shop: Shop, topic: str, order: str) -> list[Message]:
    records = await asyncio.to_thread(shop.pipeline.records, topic)
    return [message for _, _, message in records if message.order_id == order]


async def all_payments(caller: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = (await caller.get("/payments", limit="100", **after)).body
        found += page["items"]
        if page["next"] is None:
            return found
        after = {"cursor": page["next"]}


async def created_at_the_gateway(shop: Shop, orders: list[str]) -> bool:
    """Has the gateway made an object for some of the orders?"""
    url = f"{shop.pipeline.sandbox.url}/v1/payment_intents?limit=100"
    async with shop.session.get(url, headers={"Authorization": f"Bearer {API_KEY}"}) as answer:
        return any(intent["metadata"].get("order_id") in orders for intent in (await answer.json())["data"])


async def holds(pipeline: Pipeline, group: str) -> bool:
    return "Postgres" in (await asyncio.to_thread(get, pipeline.workers[group], "/readyz?verbose"))["checks"]["gate"]


async def publish(shop: Shop, message: Message) -> None:
    """Put a command on Kafka past the intake, as a program with a bug would."""
    settings = shop.pipeline.settings
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, "partitioner": "murmur2_random", "log_level": 0})
    producer.produce(f"{settings.prefix}payment-commands", key=message.key, value=shop.pipeline.codec.encode(message), headers=[*headers(message)])
    assert await asyncio.to_thread(producer.flush, 20) == 0


def paystream(pipeline: Pipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "api.cli.main", *arguments)
    return subprocess.run(command, env=environment.variables(pipeline.settings), capture_output=True, text=True, timeout=60, check=False)
