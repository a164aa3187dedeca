"""What a body may hold, field by field, and that no body at all makes us stumble."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.bodies import B, Body, CancelBody, CaptureBody, ConfirmBody, IntentBody, ProcessBody, parse, request_body
from api.errors import Problem
from infra.scrub import find_card_number

pytestmark = pytest.mark.unit
LIMIT = 100_000_000
MODELS = (IntentBody, ProcessBody, ConfirmBody, CaptureBody, CancelBody)


def read(model: type[B], document: Any, content_type: str = "application/json") -> B:
    return parse(model, json.dumps(document).encode(), content_type, max_amount_minor=LIMIT)[0]


def problem_of(model: type[Body], document: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        read(model, document)
    return raised.value


@pytest.mark.parametrize("model", MODELS)
def test_the_example_is_right(model: type[Body]) -> None:
    read(model, model.example)


@pytest.mark.parametrize("model", MODELS)
def test_every_field_says_what_would_be_right(model: type[Body]) -> None:
    assert all(field.description for field in model.model_fields.values())
    (content,) = request_body(model)["requestBody"]["content"].values()
    assert content["schema"]["additionalProperties"] is False
    assert "$ref" not in str(content["schema"])


GOOD: tuple[Mapping[str, Any], ...] = (
    {"order_id": "A-z_0"},
    {"order_id": None},
    {"amount_minor": 1},
    {"amount_minor": LIMIT},
    {"currency": "jpy"},
    {"gateway": "paypal"},
    {"capture_method": "manual"},
    {"confirm": True, "payment_method": "pm_1"},
    {"return_url": "http://localhost:3000/back?x=1#y"},
    {"description": "Ein Abendessen für zwei, 12 €"},
    {"description": "x" * 500},
    {"metadata": {f"key{number}": "x" * 500 for number in range(47)}},
    {"metadata": {"k" * 40: ""}},
)
BAD: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"order_id": ""}, "order_id"),
    ({"order_id": "a/b"}, "order_id"),
    ({"order_id": "a\n"}, "order_id"),
    ({"order_id": 5}, "order_id"),
    ({"amount_minor": 0}, "amount_minor"),
    ({"amount_minor": LIMIT + 1}, "amount_minor"),
    ({"amount_minor": 10**30}, "amount_minor"),
    ({"amount_minor": 19.99}, "amount_minor"),
    ({"amount_minor": 19.0}, "amount_minor"),
    ({"amount_minor": True}, "amount_minor"),
    ({"amount_minor": None}, "amount_minor"),
    ({"currency": "EURO"}, "currency"),
    ({"currency": "€"}, "currency"),
    ({"currency": ""}, "currency"),
    ({"gateway": "bank"}, "gateway"),
    ({"gateway": None}, "gateway"),
    ({"capture_method": "later"}, "capture_method"),
    ({"confirm": "yes"}, "confirm"),
    ({"confirm": True}, "payment_method"),
    ({"payment_method": "pm 1"}, "payment_method"),
    ({"payment_method": "x" * 256}, "payment_method"),
    *(
        ({"return_url": url}, "return_url")
        for url in (
            "ftp://x.example",
            "javascript:alert(1)",
            "https://",
            "/back",
            "https://a b.example",
            "http://[",
            "https://x:0/",
            "http://x\n",
            "x" * 3000,
        )
    ),
    ({"description": "x" * 501}, "description"),
    ({"description": "a\x00b"}, "description"),
    ({"description": "a\nb"}, "description"),
    ({"metadata": {f"key{number}": "" for number in range(48)}}, "metadata"),
    ({"metadata": {"k" * 41: ""}}, "metadata." + "k" * 41),
    ({"metadata": {"": "x"}}, "metadata."),
    ({"metadata": {"k": "x" * 501}}, "metadata.k"),
    ({"metadata": {"k": 5}}, "metadata.k"),
    ({"metadata": {"k": "\x1b[31m"}}, "metadata.k"),
    ({"metadata": {"payment_id": "x"}}, "metadata"),
    ({"metadata": []}, "metadata"),
    ({"card": {}}, "card"),
)


@pytest.mark.parametrize("changed", GOOD)
def test_what_is_right_is_taken(changed: Mapping[str, Any]) -> None:
    read(IntentBody, {**IntentBody.example, **changed})


@pytest.mark.parametrize(("changed", "field"), BAD)
def test_what_is_wrong_is_named(changed: Mapping[str, Any], field: str) -> None:
    problem = problem_of(IntentBody, {**IntentBody.example, **changed})
    assert problem.kind == "validation_failed"
    assert [error.field for error in problem.errors] == [field]
    assert all(error.message and error.expected for error in problem.errors)


def test_all_that_is_wrong_is_named_at_once() -> None:
    problem = problem_of(IntentBody, {"amount_minor": 0, "surprise": 1})
    assert sorted(error.field for error in problem.errors) == ["amount_minor", "currency", "surprise"]


def test_what_was_sent_is_not_repeated() -> None:
    problem = problem_of(ConfirmBody, {"payment_id": "tell nobody", "payment_method": "tell nobody", "return_url": "tell nobody"})
    assert len(problem.errors) == 3
    assert "tell nobody" not in str(problem.errors)


def test_a_currency_is_upper_case_from_here_on() -> None:
    assert read(IntentBody, {**IntentBody.example, "currency": "eur"}).currency == "EUR"


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"])
def test_json_has_several_names(content_type: str) -> None:
    read(IntentBody, IntentBody.example, content_type)


# ── Card numbers ──


@pytest.mark.parametrize(
    "document",
    [
        {"description": "4242424242424242"},
        {"description": "4242 4242-4242 4242!"},
        {"metadata": {"a": {"deep": ["", {"b": "5555555555554444"}]}}},
        {"4000 0000 0000 0002": 1},
        {"amount_minor": 378282246310005},
        {"amount_minor": 4242424242424242.0},
    ],
)
def test_a_card_number_is_found_wherever_it_is(document: Any) -> None:
    assert problem_of(IntentBody, document).kind == "card_number"


def test_a_card_number_behind_escapes_is_found() -> None:
    with pytest.raises(Problem, match="card_number"):
        parse(IntentBody, rb'{"description": "4242\u0034242 42424242"}', "application/json", max_amount_minor=LIMIT)


def test_what_only_looks_like_one_is_taken() -> None:
    read(IntentBody, {**IntentBody.example, "order_id": "ord_" + "4242424242424242" * 2, "description": "4242424242424241, 1234567890123"})


# ── Anything at all ──

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=20,
)
FIELDS = st.sampled_from(sorted({name for model in MODELS for name in model.model_fields}))


def problem_with(model: type[Body], body: bytes) -> Problem | None:
    try:
        parse(model, body, "application/json", max_amount_minor=LIMIT)
    except Problem as problem:
        return problem
    return None


@given(model=st.sampled_from(MODELS), document=st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=8))
def test_an_odd_body_is_taken_or_told_what_is_wrong(model: type[Body], document: Any) -> None:
    problem = problem_with(model, json.dumps(document).encode())
    if problem is not None and problem.kind != "card_number":
        assert problem.kind == "validation_failed"
        assert problem.errors
        assert not any(find_card_number(error.field) for error in problem.errors)


@given(model=st.sampled_from(MODELS), body=st.binary(max_size=200))
def test_odd_bytes_are_no_reason_to_stumble(model: type[Body], body: bytes) -> None:
    problem = problem_with(model, body)
    assert problem is None or problem.kind in ("malformed_json", "validation_failed", "card_number")
