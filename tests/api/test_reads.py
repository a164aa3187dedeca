"""What callers may read: theirs, as it stands."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from tests.api.world import BODY, World

pytestmark = pytest.mark.integration
INTENT = {"order_id": "order-1", "amount_minor": 1999, "currency": "EUR"}


async def paid(world: World, order_id: str = "order-1", user: str = "u1", **changed: Any) -> str:
    answer = await world.post("/payments/process", {**BODY, "order_id": order_id, **changed}, user=user)
    assert answer.status_code == 202
    await world.work()
    return str(answer.json()["payment_id"])


async def test_a_payment_that_is_accepted_reads_as_pending(world: World) -> None:
    payment_id = (await world.post("/payments/process", BODY)).json()["payment_id"]
    payment = (await world.get(f"/payments/{payment_id}")).json()
    assert {
        name: payment[name] for name in ("status", "amount_minor", "currency", "gateway", "order_id", "user_id", "version", "captured_minor")
    } == {
        "status": "PENDING",
        "amount_minor": 1999,
        "currency": "EUR",
        "gateway": "stripe",
        "order_id": "order-1",
        "user_id": "u1",
        "version": 0,
        "captured_minor": 0,
    }
    assert [item["payment_id"] for item in (await world.get("/payments?order_id=order-1")).json()["items"]] == [payment_id]
    assert (await world.get(f"/payments/{payment_id}/events")).json() == {"items": []}


async def test_a_payment_reads_as_it_stands(world: World) -> None:
    payment_id = await paid(world)
    payment = (await world.get(f"/payments/{payment_id}")).json()
    assert set(payment) == {
        *("payment_id", "order_id", "user_id", "status", "amount_minor", "captured_minor", "refunded_minor", "currency", "gateway"),
        *("transaction_id", "failure", "next_action", "version", "created_at", "updated_at", "client_secret"),
    }
    assert (payment["status"], payment["captured_minor"], payment["transaction_id"], payment["version"]) == ("COMPLETED", 1999, "ch_pi_1_1", 3)
    assert payment["created_at"].endswith("Z")
    assert (await world.get(f"/payments/payment/{payment_id}")).json() == payment
    assert (await world.get("/payments/transaction/ch_pi_1_1")).json() == payment
    assert (await world.get("/payments/order/order-1")).json() == {"items": [payment], "next": None}


async def test_somebody_else_s_payment_is_not_there(world: World) -> None:
    payment_id = await paid(world)
    for path in (
        *(f"/payments/{payment_id}", f"/payments/payment/{payment_id}", f"/payments/{payment_id}/events"),
        *("/payments/transaction/ch_pi_1_1", "/payments/order/order-1", f"/commands/{payment_id}"),
    ):
        theirs = await world.get(path, user="u2")
        nobodys = await world.get(path.replace(payment_id, str(uuid4())).replace("ch_pi_1_1", "ch_x").replace("order-1", "order-x"), user="u2")
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.json()["code"] == nobodys.json()["code"], "it is not told apart from what does not exist"
    assert (await world.get("/payments", user="u2")).json() == {"items": [], "next": None}
    assert (await world.get("/payments?order_id=order-1", user="u2")).json()["items"] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/payments/nonsense", "payment_not_found"),
        ("/payments/transaction/%00", "payment_not_found"),
        ("/payments/order/a%20b", "order_not_found"),
        ("/payments/nonsense/events", "payment_not_found"),
        ("/commands/nonsense", "command_not_found"),
    ],
)
async def test_what_can_t_be_an_id_is_the_id_of_nothing(world: World, path: str, code: str) -> None:
    answer = await world.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, code)


async def test_secrets_are_the_owner_s(world: World) -> None:
    payment_id = (await world.post("/payments/intent", INTENT)).json()["payment_id"]
    await world.work()
    assert (await world.get(f"/payments/{payment_id}")).json()["client_secret"] == "pi_1_secret"
    for path in (f"/payments/{payment_id}", "/payments/order/order-1", "/payments"):
        answer = await world.get(path, user="root", roles=("admin",))
        assert answer.status_code == 200
        assert "pi_1_secret" not in answer.text
    assert "pi_1_secret" not in (await world.get(f"/payments/{payment_id}/events")).text
    assert "pi_1_secret" not in world.log.getvalue()
    await world.post("/payments/confirm", {"payment_id": payment_id, "payment_method": "pm_card_visa"})
    await world.work()
    assert (await world.get(f"/payments/{payment_id}")).json()["client_secret"] is None, "it is of no use any more"


async def test_where_to_authenticate_is_told_to_the_owner_only(world: World) -> None:
    payment_id = await paid(world, payment_method="pm_card_threeDSecure2Required", return_url="https://shop.example/back")
    assert (await world.get(f"/payments/{payment_id}")).json()["next_action"]["redirect_url"] == "https://shop.example/back?3ds"
    assert (await world.get(f"/payments/{payment_id}", user="root", roles=("admin",))).json()["next_action"] is None


async def test_a_failure_is_told(world: World) -> None:
    payment_id = await paid(world, payment_method="pm_card_chargeDeclined")
    payment = (await world.get(f"/payments/{payment_id}")).json()
    assert (payment["status"], payment["failure"]) == (
        "FAILED",
        {"code": "generic_decline", "message": "Your card was declined.", "advice": "retry"},
    )


async def test_a_payment_that_was_refused_says_so(world: World) -> None:
    await world.post("/payments/process", BODY, key="k1")
    refused = (await world.post("/payments/process", BODY, key="k2")).json()["payment_id"]
    await world.work()
    answer = await world.get(f"/payments/{refused}")
    assert (answer.status_code, answer.json()["code"]) == (404, "payment_refused")
    assert answer.json()["detail"].startswith("order_has_payment: ")
    assert (await world.get(f"/payments/{refused}", user="u2")).json()["code"] == "payment_not_found"
    assert len((await world.get("/payments")).json()["items"]) == 1


# ── Lists ──


async def test_lists_go_page_by_page_newest_first(world: World) -> None:
    made = [await paid(world, f"order-{number}") for number in range(5)]
    made.append((await world.post("/payments/process", {**BODY, "order_id": "order-5"})).json()["payment_id"])
    await paid(world, "order-x", user="u2")
    seen: list[str] = []
    path = "/payments?limit=4"
    for _ in range(10):
        answer = await world.get(path)
        seen += [item["payment_id"] for item in answer.json()["items"]]
        if answer.json()["next"] is None:
            assert "link" not in answer.headers
            break
        link = answer.headers["link"]
        assert link.endswith('; rel="next"')
        path = link[1 : link.index(">")].removeprefix("/api/v1")
        assert answer.json()["next"] in path
    assert seen == made[::-1]
    everybodys = await world.get("/payments?limit=100", user="root", roles=("admin",))
    assert len(everybodys.json()["items"]) == 7


@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("cursor=zz", "cursor"), ("order_id=a%20b", "order_id")]
)
async def test_a_wrong_parameter_is_named(world: World, query: str, field: str) -> None:
    answer = await world.get(f"/payments?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    (error,) = answer.json()["errors"]
    assert error["field"] == field
    assert error["expected"]


# ── ETag ──


async def test_what_has_not_changed_is_not_sent_again(world: World) -> None:
    payment_id = (await world.post("/payments/process", BODY)).json()["payment_id"]
    path = f"/payments/{payment_id}"
    etag = (await world.get(path)).headers["etag"]
    for tag in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        unchanged = await world.get(path, headers={"If-None-Match": tag})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", etag)
    await world.work()
    changed = await world.get(path, headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


# ── Timelines and commands ──


async def test_a_timeline_is_oldest_first_and_says_where_each_event_is(world: World) -> None:
    payment_id = await paid(world)
    await world.rows('UPDATE events SET partition = 2, "offset" = 10 + version, published_at = now() WHERE version < 3 RETURNING 1')
    items = (await world.get(f"/payments/{payment_id}/events")).json()["items"]
    assert [(item["event_type"], item["version"]) for item in items] == [
        ("PAYMENT_INITIATED", 1),
        ("PAYMENT_PROCESSING", 2),
        ("PAYMENT_COMPLETED", 3),
    ]
    assert {item["topic"] for item in items} == {f"{world.settings.prefix}payment-events"}
    assert [(item["partition"], item["offset"], item["published_at"] is None) for item in items] == [
        (2, 11, False),
        (2, 12, False),
        (None, None, True),
    ]
    assert items[2]["data"]["captured_minor"] == 1999
    assert (await world.get(f"/payments/{payment_id}/events", user="root", roles=("admin",))).status_code == 200


async def test_a_command_tells_what_became_of_it(world: World) -> None:
    first = (await world.post("/payments/process", BODY, key="k1")).json()
    second = (await world.post("/payments/process", BODY, key="k2")).json()
    before = (await world.get(f"/commands/{first['command_id']}")).json()
    assert (before["status"], before["decided_at"], before["refusal"], before["command_type"]) == ("accepted", None, None, "InitiatePayment")
    await world.work()
    outcomes = [(await world.get(f"/commands/{each['command_id']}")).json() for each in (first, second)]
    assert sorted(outcome["status"] for outcome in outcomes) == ["applied", "refused"]
    (refused,) = [outcome for outcome in outcomes if outcome["status"] == "refused"]
    assert refused["refusal"]["code"] == "order_has_payment"
    assert refused["decided_at"] >= refused["accepted_at"]


async def test_reads_say_so_when_postgres_is_away(world: World) -> None:
    await world.pool.close()
    answer = await world.get(f"/payments/{uuid4()}")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
