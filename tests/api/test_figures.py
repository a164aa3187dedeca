"""Figures about payments: over a time, and along it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from api.answers import TIMESERIES_EXAMPLE
from infra.database.figures import Bucket
from tests.api.world import World

pytestmark = pytest.mark.integration

ADD_PAYMENT = (
    "INSERT INTO analytics.payments"
    " (payment_id, order_id, status, gateway, currency, amount_minor, captured_minor, failure_code, initiated_at, version)"
    " VALUES (%s, 'o', %s, 'stripe', %s, %s, %s, %s, %s, 1) RETURNING 1"
)
ADD_ATTEMPT = (
    "INSERT INTO analytics.attempts (payment_id, attempt, gateway, outcome, gateway_latency_ms, at) VALUES (%s, 1, 'stripe', 'x', %s, %s) RETURNING 1"
)


async def test_figures_are_of_the_time_that_is_asked_for(world: World) -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for status, currency, captured, failure, at in (
        ("COMPLETED", "EUR", 1000, None, noon),
        ("COMPLETED", "JPY", 500, None, noon + timedelta(hours=1)),
        ("AUTHORIZED", "EUR", 0, None, noon),
        ("FAILED", "EUR", 0, "insufficient_funds", noon),
        ("PROCESSING", "EUR", 0, None, noon),
        ("COMPLETED", "EUR", 7, None, noon + timedelta(days=1)),
        ("COMPLETED", "EUR", 7, None, noon - timedelta(seconds=1)),
    ):
        await world.rows(ADD_PAYMENT, uuid4(), status, currency, 1000, captured, failure, at)
    for latency in (*range(1, 101), None):
        await world.rows(ADD_ATTEMPT, uuid4(), latency, noon)
    answer = await world.get("/analytics/summary?from=2026-03-01T12:00:00Z&to=2026-03-02T13:00:00%2B01:00", user="a", roles=("analyst",))
    assert answer.status_code == 200
    assert answer.json() == {
        "since": "2026-03-01T12:00:00Z",
        "until": "2026-03-02T13:00:00+01:00",
        "payments": 5,
        "payments_by_status": {"AUTHORIZED": 1, "COMPLETED": 2, "FAILED": 1, "PROCESSING": 1},
        "volume_by_currency": [
            {"currency": "EUR", "payments": 4, "amount_minor": 4000, "captured_minor": 1000},
            {"currency": "JPY", "payments": 1, "amount_minor": 1000, "captured_minor": 500},
        ],
        "success_rate": 0.75,
        "failure_reasons": [{"code": "insufficient_funds", "payments": 1}],
        "gateway_latency_ms": [{"gateway": "stripe", "calls": 100, "p50": 50.5, "p95": 95.05, "p99": 99.01}],
    }


async def test_without_payments_there_is_no_rate(world: World) -> None:
    answer = await world.get("/analytics/summary", user="root", roles=("admin",))
    assert (answer.status_code, answer.json()["payments"], answer.json()["success_rate"]) == (200, 0, None)


@pytest.mark.parametrize("path", ["summary", "timeseries"])
async def test_figures_are_for_some_roles_only(world: World, path: str) -> None:
    answer = await world.get(f"/analytics/{path}", roles=("cashier",))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "admin or analyst" in answer.json()["detail"]


@pytest.mark.parametrize(
    "query", ["from=yesterday", "from=2026-03-01T12:00:00", "from=2026-03-02T00:00:00Z&to=2026-03-01T00:00:00Z", "from=2020-01-01T00:00:00Z"]
)
async def test_a_wrong_time_is_named(world: World, query: str) -> None:
    answer = await world.get(f"/analytics/summary?{query}", roles=("admin",))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "from")


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00%2B14:00", "1999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00"])
@pytest.mark.parametrize("path", ["summary", "timeseries"])
async def test_a_time_at_the_end_of_the_calendar_is_refused(world: World, path: str, time: str) -> None:
    answer = await world.get(f"/analytics/{path}?to={time}", roles=("admin",))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "to")
    assert answer.json()["errors"][0]["expected"] in {"at least 2000-01-01T00:00:00Z", "at most 2200-01-01T00:00:00Z"}


# ── Along the time ──


async def add(world: World, at: datetime, status: str = "COMPLETED", currency: str = "EUR", captured: int = 1000) -> None:
    await world.rows(ADD_PAYMENT, uuid4(), status, currency, 1000, captured, None, at)


async def series(world: World, query: str, roles: tuple[str, ...] = ("analyst",)) -> dict[str, Any]:
    answer = await world.get(f"/analytics/timeseries?{query}", user="a", roles=roles)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def volume(currency: str, payments: int, captured: int) -> dict[str, Any]:
    return {"currency": currency, "payments": payments, "amount_minor": payments * 1000, "captured_minor": captured}


async def test_a_series_has_every_bucket_and_in_each_every_status_and_currency(world: World) -> None:
    ten = datetime(2026, 3, 1, 10, tzinfo=UTC)
    await add(world, ten)
    await add(world, ten + timedelta(minutes=59, seconds=59, microseconds=999_999))
    await add(world, ten, "FAILED", "JPY", 0)
    await add(world, ten + timedelta(hours=2), "COMPLETED", "JPY", 700)
    await add(world, ten - timedelta(microseconds=1), "CANCELLED", "USD")
    await add(world, ten + timedelta(hours=3), "CANCELLED", "USD")
    assert await series(world, "bucket=hour&from=2026-03-01T10:00:00Z&to=2026-03-01T13:00:00Z") == {
        "since": "2026-03-01T10:00:00Z",
        "until": "2026-03-01T13:00:00Z",
        "bucket": "hour",
        "items": [
            {
                "at": "2026-03-01T10:00:00Z",
                "payments": 3,
                "payments_by_status": {"COMPLETED": 2, "FAILED": 1},
                "volume_by_currency": [volume("EUR", 2, 2000), volume("JPY", 1, 0)],
            },
            {
                "at": "2026-03-01T11:00:00Z",
                "payments": 0,
                "payments_by_status": {"COMPLETED": 0, "FAILED": 0},
                "volume_by_currency": [volume("EUR", 0, 0), volume("JPY", 0, 0)],
            },
            {
                "at": "2026-03-01T12:00:00Z",
                "payments": 1,
                "payments_by_status": {"COMPLETED": 1, "FAILED": 0},
                "volume_by_currency": [volume("EUR", 0, 0), volume("JPY", 1, 700)],
            },
        ],
    }


async def test_a_series_and_the_summary_agree(world: World) -> None:
    begin = datetime(2026, 3, 1, tzinfo=UTC)
    for number in range(40):
        await add(world, begin + timedelta(minutes=37 * number), ("COMPLETED", "FAILED", "PENDING")[number % 3], ("EUR", "JPY")[number % 2], number)
    span = "from=2026-03-01T00:30:00Z&to=2026-03-01T17:11:00Z"
    summary = (await world.get(f"/analytics/summary?{span}", roles=("admin",))).json()
    for bucket in ("minute", "hour", "day"):
        items = (await series(world, f"bucket={bucket}&{span}"))["items"]
        assert sum(item["payments"] for item in items) == summary["payments"] > 20
        for status, payments in summary["payments_by_status"].items():
            assert sum(item["payments_by_status"][status] for item in items) == payments
        for total in summary["volume_by_currency"]:
            parts = [part for item in items for part in item["volume_by_currency"] if part["currency"] == total["currency"]]
            assert {name: sum(part[name] for part in parts) for name in ("payments", "amount_minor", "captured_minor")} == {
                name: total[name] for name in ("payments", "amount_minor", "captured_minor")
            }


async def test_a_time_that_begins_or_ends_within_a_bucket_counts_what_is_in_it(world: World) -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for minute in (29, 30, 59, 60, 90, 91):
        await add(world, noon + timedelta(minutes=minute))
    items = (await series(world, "bucket=hour&from=2026-03-01T12:30:00Z&to=2026-03-01T13:31:00Z"))["items"]
    assert [(item["at"], item["payments"]) for item in items] == [("2026-03-01T12:00:00Z", 2), ("2026-03-01T13:00:00Z", 2)]


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("2026-03-28T23:00:00Z", "2026-03-30T22:00:00Z"),
        ("2026-03-29T00:00:00%2B01:00", "2026-03-31T00:00:00%2B02:00"),
        ("2026-03-29T04:45:00%2B05:45", "2026-03-30T08:00:00-14:00"),
    ],
)
async def test_days_are_those_of_utc_in_whatever_zone_one_asks(world: World, begin: str, end: str) -> None:
    for hour in (22, 23, 24, 47, 48, 69, 70):
        await add(world, datetime(2026, 3, 28, tzinfo=UTC) + timedelta(hours=hour))
    items = (await series(world, f"bucket=day&from={begin}&to={end}"))["items"]
    assert [(item["at"], item["payments"]) for item in items] == [
        ("2026-03-28T00:00:00Z", 1),
        ("2026-03-29T00:00:00Z", 2),
        ("2026-03-30T00:00:00Z", 2),
    ]


@pytest.mark.parametrize(("query", "bucket", "hours"), [("bucket=minute", "minute", 1), ("", "hour", 24), ("bucket=day", "day", 720)])
async def test_without_a_time_it_is_the_last_one(world: World, query: str, bucket: str, hours: int) -> None:
    told = await series(world, query, ("admin",))
    since, until = datetime.fromisoformat(told["since"]), datetime.fromisoformat(told["until"])
    assert (told["bucket"], until - since) == (bucket, timedelta(hours=hours))
    assert datetime.fromisoformat(told["items"][0]["at"]) <= since
    assert datetime.fromisoformat(told["items"][-1]["at"]) < until
    assert {(item["payments"], *item["payments_by_status"], *item["volume_by_currency"]) for item in told["items"]} == {(0,)}
    assert len(told["items"]) == Bucket(bucket).number(since, until) >= 24


@pytest.mark.parametrize(
    ("query", "field", "expected"),
    [
        ("bucket=week", "bucket", "one of 'minute', 'hour' or 'day'"),
        ("bucket=", "bucket", "one of 'minute', 'hour' or 'day'"),
        ("from=yesterday", "from", "a time as in RFC 3339, 2026-01-31T12:00:00Z"),
        ("to=2026-03-01T12:00:00", "to", "a time as in RFC 3339, 2026-01-31T12:00:00Z"),
        ("from=2026-03-01T00:00:00Z&to=2026-03-01T00:00:00Z", "from", "a time before `to`"),
        ("from=2026-03-01T00:00:00Z&to=2026-03-01T00:30:00%2B01:00", "from", "a time before `to`"),
        (
            "bucket=minute&from=2026-03-01T00:00:00Z&to=2026-03-02T01:00:01Z",
            "bucket",
            "`hour`, or a `from` that is 1499 minutes before `to` at most",
        ),
        ("bucket=minute&from=2022-03-01T00:00:00Z&to=2026-03-01T00:00:00Z", "bucket", "`day`, or a `from` that is 1499 minutes before `to` at most"),
        ("from=2000-01-01T00:00:00Z&to=2200-01-01T00:00:00Z", "bucket", "a `from` that is 1499 hours before `to` at most"),
    ],
)
async def test_what_makes_no_series_is_named_and_what_would_fit(world: World, query: str, field: str, expected: str) -> None:
    answer = await world.get(f"/analytics/timeseries?{query}", roles=("admin",))
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    (error,) = answer.json()["errors"]
    assert (error["field"], error["expected"]) == (field, expected)


async def test_as_many_buckets_as_are_allowed_are_given(world: World) -> None:
    assert len((await series(world, "bucket=minute&from=2026-03-01T00:00:00Z&to=2026-03-02T01:00:00Z"))["items"]) == 1500
    assert len((await series(world, "bucket=minute&from=2026-03-01T00:00:30Z&to=2026-03-02T00:59:30Z"))["items"]) == 1500, "as advised"


async def test_a_series_is_documented(world: World) -> None:
    told = (await world.client.get("/openapi.json")).json()["paths"]["/api/v1/analytics/timeseries"]["get"]
    assert told["responses"]["200"]["content"]["application/json"]["example"] == TIMESERIES_EXAMPLE
    assert {parameter["name"]: parameter["required"] for parameter in told["parameters"]} == {"bucket": False, "from": False, "to": False}
    assert "application/problem+json" in told["responses"]["422"]["content"]


async def test_figures_say_so_when_postgres_is_away(world: World) -> None:
    await world.pool.close()
    answer = await world.get("/analytics/timeseries", roles=("admin",))
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
