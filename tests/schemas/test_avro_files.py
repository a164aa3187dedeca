"""Data has tests too: each `.avsc` agrees with its dataclass, has an example, and can live with what was published before."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import datetime
from types import NoneType
from typing import Any, Final

import pytest

from schemas.codec import AVRO_FOLDER, schema_of
from schemas.compatibility import PUBLISHED_FOLDER, problems, published
from schemas.messages import BY_TYPE, RECORDS, Message
from tests.schemas.examples import FOLDER, example, fields_of

pytestmark = pytest.mark.unit

ENVELOPE: Final = ["event_id", "event_type", "order_id", "payment_id", "user_id", "version", "occurred_at", "correlation_id", "causation_id"]
TYPES: Final = {
    str: "string",
    int: "long",
    bool: "boolean",
    bytes: "bytes",
    datetime: {"type": "long", "logicalType": "timestamp-micros"},
    Mapping[str, str]: {"type": "map", "values": "string"},
    list[str]: {"type": "array", "items": "string"},
}

each_record = pytest.mark.parametrize("record", RECORDS)


def test_there_is_a_file_and_an_example_for_each_record_and_for_nothing_else() -> None:
    assert {file.stem for file in AVRO_FOLDER.glob("*.avsc")} == set(RECORDS)
    assert {file.stem for file in FOLDER.glob("*.json")} == set(RECORDS)
    assert {folder.name for folder in PUBLISHED_FOLDER.iterdir()} <= set(RECORDS), "a record that was published does not go away"


def test_event_types_are_unique() -> None:
    assert len(BY_TYPE) == len(RECORDS)


@each_record
def test_the_schema_has_its_name_the_envelope_first_and_words_for_every_field(record: str) -> None:
    schema = schema_of(record)
    assert (schema["type"], schema["namespace"], schema["name"]) == ("record", "paystream", record)
    assert schema["doc"]
    assert [field["name"] for field in schema["fields"]][: len(ENVELOPE)] == ENVELOPE
    assert all(field["doc"] for field in schema["fields"])


@each_record
def test_schema_and_dataclass_agree_on_names_types_and_defaults(record: str) -> None:
    cls = RECORDS[record]
    schema = {field["name"]: (field["type"], field.get("default", MISSING)) for field in schema_of(record)["fields"]}
    assert schema.pop("event_type") == ("string", MISSING)
    assert schema == _of_dataclass(cls)


def _of_dataclass(cls: type[Message]) -> dict[str, tuple[Any, Any]]:
    """What the schema's fields must be: nullable ones default to null, whether or not the class wants them said."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields(cls):
        options = [option for option in typing.get_args(hints[field.name]) if option is not NoneType]
        if NoneType in typing.get_args(hints[field.name]):
            found[field.name] = (["null", TYPES[options[0]]], None)
        else:
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            found[field.name] = (TYPES[hints[field.name]], default)
    return found


@each_record
def test_the_example_is_a_message_of_its_type(record: str) -> None:
    message = example(record)
    assert type(message) is RECORDS[record]
    assert fields_of(record)["event_type"] == message.event_type


@each_record
def test_money_has_a_currency(record: str) -> None:
    names = {field["name"] for field in schema_of(record)["fields"]}
    told = {name for name in names if name.endswith("_minor")}
    if told and record != "CapturePayment":  # its amount is a part of the payment's, in the payment's currency
        assert "currency" in names


@each_record
def test_every_version_can_read_every_other(record: str) -> None:
    versions = published(record)
    assert list(versions) == list(range(1, len(versions) + 1))
    assert problems(schema_of(record), versions) == ()
    for number, version in versions.items():
        assert problems(version, {other: schema for other, schema in versions.items() if other != number}) == ()
