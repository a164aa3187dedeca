"""Every error is a problem document, from one table."""

from __future__ import annotations

import pytest

from api.errors import PROBLEMS, documented
from tests.api.world import BODY, World


@pytest.mark.unit
def test_every_kind_says_what_to_do() -> None:
    for name, kind in PROBLEMS.items():
        assert name.replace("_", "").isalpha()
        assert 400 <= kind.status < 600
        assert kind.title[0].isupper()
        assert kind.advice.endswith(".")
        assert kind.retryable or kind.retry_after_s is None


@pytest.mark.unit
def test_kinds_of_one_status_are_documented_together() -> None:
    described = documented("payment_not_found", "payment_refused", "unauthorized")
    assert set(described) == {401, 404}
    assert set(described[404]["content"]["application/problem+json"]["examples"]) == {"payment_not_found", "payment_refused"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/api/v1/payments/", 404, "not_found"),
        ("DELETE", "/api/v1/payments/process", 405, "method_not_allowed"),
        ("PUT", "/readyz", 405, "method_not_allowed"),
        ("GET", "/api/v1/payments", 401, "unauthorized"),
        ("GET", "/problems/none", 404, "not_found"),
    ],
)
async def test_the_framework_s_own_errors_are_problem_documents_too(world: World, method: str, path: str, status: int, code: str) -> None:
    answer = await world.client.request(method, path)
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["instance"] == path
    assert problem["trace_id"] == answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.integration
async def test_a_problem_s_type_leads_to_what_it_means(world: World) -> None:
    problem = (await world.post("/payments/process", {**BODY, "gateway": "paypal"})).json()
    meaning = (await world.client.get(problem["type"])).json()
    assert (meaning["code"], meaning["status"], meaning["title"]) == (problem["code"], problem["status"], problem["title"])
    assert meaning["advice"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"X-Request-Id": "order-7/try:1"}, "order-7/try:1"),
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "0af7651916cd43dd8448eb211c80319c"),
        ({"X-Request-Id": "mine", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "mine"),
        ({"X-Request-Id": "4242424242424242"}, None),
        ({"X-Request-Id": "x" * 65}, None),
        ({"X-Request-Id": "a b"}, None),
        ({"traceparent": "00-00000000000000000000000000000000-b7ad6b7169203331-01"}, None),
    ],
)
async def test_a_correlation_id_is_the_caller_s_or_ours(world: World, sent: dict[str, str], told: str | None) -> None:
    answer = await world.client.get("/livez", headers=sent)
    if told is None:
        assert len(answer.headers["x-request-id"]) == 32
        assert answer.headers["x-request-id"] not in sent.values()
    else:
        assert answer.headers["x-request-id"] == told


@pytest.mark.integration
async def test_a_bug_is_logged_and_nothing_of_it_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret detail, card 4242424242424242")

    monkeypatch.setattr(world.app.state.deps.reads, "command", broken, raising=False)
    answer = await world.get("/commands/9544dbc1-8350-563b-8632-6d9d625efd31")
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (500, "internal_error", True)
    assert "secret detail" not in answer.text
    log = world.log.getvalue()
    assert "ZeroDivisionError" in log
    assert answer.json()["trace_id"] in log
    assert "4242" not in log
