"""What probes, operators and newcomers ask a process."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import TypeAdapter

from api.answers import (
    COMMAND_EXAMPLE,
    PAGE_EXAMPLE,
    SUMMARY_EXAMPLE,
    TAKEN_EXAMPLE,
    TIMELINE_EXAMPLE,
    TIMESERIES_EXAMPLE,
    Page,
    Taken,
    Timeline,
)
from infra.database.figures import Summary, Timeseries
from infra.database.reads import CommandView
from tests.api.world import BODY, World

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("part", ["postgres", "kafka", "registry"])
async def test_it_is_not_ready_without_what_it_needs(world: World, part: str) -> None:
    world.down.add(part)
    answer = await world.client.get("/readyz?verbose")
    assert answer.status_code == 503
    parts = dict.fromkeys(("postgres", "kafka", "registry", "redis"), "ok") | {part: "down"}
    assert answer.json() == {"status": "not ready", "parts": parts}
    assert (await world.client.get("/livez")).status_code == 200


async def test_without_redis_it_is_degraded_and_ready(world: World) -> None:
    world.down.add("redis")
    assert (await world.client.get("/readyz")).json() == {"status": "degraded"}
    health = await world.client.get("/health")
    assert (health.status_code, health.json()["parts"]["redis"]) == (200, "down")


async def test_it_is_ready(world: World) -> None:
    answer = await world.client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


async def test_the_outside_is_asked_once_a_second_at_most(world: World) -> None:
    assert (await world.client.get("/readyz")).status_code == 200
    world.down.add("kafka")
    assert (await world.client.get("/readyz")).status_code == 200


async def test_it_says_what_it_is(world: World) -> None:
    version = (await world.client.get("/version")).json()
    file = Path(__file__).parents[2] / "kafka-topics.yaml"
    assert version["version"]
    assert version["topics_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(version) == {"version", "commit", "topics_sha256"}


async def test_requests_are_counted_by_route_and_outcome(world: World) -> None:
    def counted(route: str, outcome: str) -> float:
        return REGISTRY.get_sample_value("paystream_intake_requests_total", {"route": route, "outcome": outcome}) or 0

    process, one = "POST /api/v1/payments/process", "GET /api/v1/payments/{payment_id}"
    before = counted(process, "202"), counted(process, "validation_failed"), counted(one, "payment_not_found"), counted("none", "not_found")
    await world.post("/payments/process", BODY)
    await world.post("/payments/process", {})
    await world.get("/payments/9544dbc1-8350-563b-8632-6d9d625efd31")
    await world.client.get("/made-up-by-somebody")
    await world.client.request("MADEUP", "/api/v1/payments/process", headers=world.bearer())
    after = counted(process, "202"), counted(process, "validation_failed"), counted(one, "payment_not_found"), counted("none", "not_found")
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1, 1]
    metrics = (await world.client.get("/metrics")).text
    assert "paystream_intake_request_seconds_bucket" in metrics
    assert "paystream_intake_waiters 0.0" in metrics
    assert "MADEUP" not in metrics


async def test_a_replay_is_counted(world: World) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("paystream_intake_replays_total", {"route": "POST /api/v1/payments/process"}) or 0

    before = counted()
    for _ in range(3):
        await world.post("/payments/process", BODY)
    assert counted() == before + 2


async def test_a_command_is_logged_with_its_ids(world: World) -> None:
    answer = await world.post("/payments/process", BODY)
    (line,) = [line for line in world.log.getvalue().splitlines() if "command accepted" in line]
    for told in ("order-1", answer.json()["payment_id"], answer.headers["x-request-id"]):
        assert told in line
    assert "pm_card_visa" not in line


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Taken, TAKEN_EXAMPLE),
        (Page, PAGE_EXAMPLE),
        (Timeline, TIMELINE_EXAMPLE),
        (CommandView, COMMAND_EXAMPLE),
        (Summary, SUMMARY_EXAMPLE),
        (Timeseries, TIMESERIES_EXAMPLE),
    ],
)
def test_an_example_has_the_shape_that_it_is_an_example_of(model: type[Any], example: Any) -> None:
    shape = TypeAdapter(model)
    assert shape.dump_python(shape.validate_python(example), mode="json") == example


async def test_the_documentation_tells_all(world: World) -> None:
    api = (await world.client.get("/openapi.json")).json()
    page = await world.client.get("/docs")
    assert page.status_code == 200
    shown = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(shown) >= 2
    for part in shown:
        assert (await world.client.get(part)).status_code == 200, "served here: no script of somebody else where people type in their tokens"
    process = api["paths"]["/api/v1/payments/process"]["post"]
    body = process["requestBody"]["content"]["application/json"]
    assert body["example"]["amount_minor"] == 1999
    assert set(body["schema"]["required"]) == {"amount_minor", "currency", "payment_method"}
    assert {"200", "202", "400", "401", "404", "409", "413", "415", "422", "429", "503"} <= set(process["responses"])
    assert {parameter["name"] for parameter in process["parameters"]} == {"Idempotency-Key", "Prefer"}
    open_to_all = {"/livez", "/readyz", "/health", "/version", "/metrics", "/problems/{kind}", "/api/v1/webhooks/stripe"}
    for path, methods in api["paths"].items():
        for operation in methods.values():
            assert bool(operation.get("security")) == (path not in open_to_all), path
            assert operation.get("description") or operation.get("summary")
            for status, told in operation["responses"].items():
                if status.isdigit() and int(status) >= 400 and path.startswith("/api"):
                    assert set(told["content"]) == {"application/problem+json"}, (path, status)
