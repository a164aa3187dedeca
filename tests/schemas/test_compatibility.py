"""FULL_TRANSITIVE: which changes of a schema may be made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas import compatibility
from schemas.codec import schema_of
from schemas.compatibility import freeze, problems, published

pytestmark = pytest.mark.unit

Fields = list[dict[str, Any]]


def _changed(change: Callable[[Fields], object]) -> dict[str, Any]:
    schema = copy.deepcopy(dict(schema_of("PaymentCompleted")))
    change(schema["fields"])
    return schema


def _field(fields: Fields, name: str) -> dict[str, Any]:
    return next(field for field in fields if field["name"] == name)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda fields: fields.append({"name": "channel", "type": ["null", "string"], "default": None}), id="a nullable field comes"),
        pytest.param(lambda fields: fields.append({"name": "channel", "type": "string", "default": "web"}), id="a field with a default comes"),
        pytest.param(lambda fields: fields.remove(_field(fields, "receipt_url")), id="a nullable field goes"),
        pytest.param(lambda fields: _field(fields, "gateway").update(doc="Who moved the money."), id="other words"),
        pytest.param(lambda fields: fields.reverse(), id="another order of fields"),
    ],
)
def test_this_may_change(change: Callable[[Fields], object]) -> None:
    assert problems(_changed(change), {1: schema_of("PaymentCompleted")}) == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(lambda fields: fields.append({"name": "channel", "type": "string"}), "can't read version 1", id="a field without default comes"),
        pytest.param(lambda fields: fields.remove(_field(fields, "gateway")), "version 1 can't read it", id="a field without default goes"),
        pytest.param(lambda fields: _field(fields, "gateway").update(name="provider"), "can't read", id="a field is renamed"),
        pytest.param(
            lambda fields: _field(fields, "gateway").update(type=["null", "string"], default=None), "version 1 can't read it", id="nullable"
        ),
        pytest.param(lambda fields: _field(fields, "amount_minor").update(type="double"), "version 1 can't read it", id="promoted"),
        pytest.param(lambda fields: _field(fields, "gateway").update(type="bytes"), "another type for gateway", id="string to bytes"),
        pytest.param(
            lambda fields: _field(fields, "occurred_at").update(type={"type": "long", "logicalType": "timestamp-millis"}),
            "another type for occurred_at",
            id="another unit of time",
        ),
    ],
)
def test_this_may_not_change(change: Callable[[Fields], object], why: str) -> None:
    found = problems(_changed(change), {1: schema_of("PaymentCompleted")})
    assert any(why in one for one in found), found


def test_every_version_counts_not_only_the_last() -> None:
    first = _changed(lambda fields: fields.append({"name": "channel", "type": "string", "default": "web"}))
    third = _changed(lambda fields: fields.append({"name": "channel", "type": "long", "default": 0}))
    assert problems(third, {2: schema_of("PaymentCompleted")}) == ()
    assert any("version 1" in one for one in problems(third, {1: first, 2: schema_of("PaymentCompleted")}))


def test_freezing_publishes_a_changed_schema_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "PUBLISHED_FOLDER", tmp_path)
    assert published("PaymentFailed") == {}
    assert freeze("PaymentFailed") == tmp_path / "PaymentFailed" / "1.avsc"
    assert freeze("PaymentFailed") is None
    (tmp_path / "PaymentFailed" / "1.avsc").write_text('{"type": "record", "name": "PaymentFailed", "fields": []}')
    assert freeze("PaymentFailed") == tmp_path / "PaymentFailed" / "2.avsc"
    assert published("PaymentFailed")[2] == schema_of("PaymentFailed")
