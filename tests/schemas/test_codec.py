"""Messages as bytes and back. Whatever bytes come in, either a message comes out or Rejected is raised."""

from __future__ import annotations

import copy
import io
import struct
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import Codec, Schema, headers, schema_of
from schemas.errors import Rejected, Unavailable
from schemas.messages import RECORDS, Message, OrderEvent, OutboxPosition, PaymentCompleted, PaymentEvent, WebhookReceived
from tests.schemas.examples import example, fields_of

pytestmark = pytest.mark.unit

NEW = 900
CODEC = Codec.unregistered()
each_record = pytest.mark.parametrize("record", RECORDS)


def knowing(schema: Schema | None) -> Codec:
    """A codec whose registry has `schema` under id NEW."""
    return Codec({record: number for number, record in enumerate(RECORDS, start=1)}, {NEW: schema}.get)


def written(schema: Mapping[str, Any], fields: Mapping[str, Any], schema_id: int = NEW) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(dict(schema)), fields)
    return struct.pack(">bI", 0, schema_id) + out.getvalue()


@each_record
def test_a_message_survives_the_way_there_and_back(record: str) -> None:
    message = example(record)
    assert CODEC.decode(CODEC.encode(message)) == message


@each_record
def test_the_bytes_are_confluents_wire_format(record: str) -> None:
    ids = {name: number for number, name in enumerate(RECORDS, start=7)}
    value = Codec(ids, lambda _: None).encode(example(record))
    assert struct.unpack(">bI", value[:5]) == (0, ids[record])
    assert fastavro.schemaless_reader(io.BytesIO(value[5:]), schema_of(record)) == fields_of(record)


def test_another_time_zone_is_the_same_moment() -> None:
    message = example("PaymentCompleted")
    there = replace(message, occurred_at=message.occurred_at.astimezone(timezone(timedelta(hours=9))))
    assert CODEC.decode(CODEC.encode(there)) == message


def test_a_time_without_a_zone_is_not_written() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        CODEC.encode(replace(example("PaymentCompleted"), occurred_at=datetime(2026, 1, 1)))  # noqa: DTZ001


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "the value is empty"),
        (b"", "the value is empty"),
        (b'{"event_type": "PAYMENT_COMPLETED"}', "begins with byte 0x7b"),
        (b"\x00\x00\x00", "too short for a schema id"),
        (b"\x00\x00\x01\x86\x9fwhatever", "schema id 99999 is not in the registry"),
        (b"\x00\x00\x00\x00\x01", "the body is no CancelPayment as schema 1 has it"),
        (b"\x00\x00\x00\x00\x01\xff\xff\xff", "the body is no CancelPayment as schema 1 has it"),
        (b"\x00\x00\x00\x00\x01\x05", "the body is no CancelPayment as schema 1 has it"),
    ],
)
def test_what_is_no_message_is_rejected_with_the_reason(value: bytes | None, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        CODEC.decode(value)
    assert why in caught.value.detail


@each_record
def test_trailing_and_missing_bytes_are_rejected(record: str) -> None:
    value = CODEC.encode(example(record))
    with pytest.raises(Rejected, match=f"1 bytes follow the {record}"):
        CODEC.decode(value + b"\x00")
    for length in range(5, len(value)):
        with pytest.raises(Rejected):
            CODEC.decode(value[:length])


@given(record=st.sampled_from(sorted(RECORDS)), body=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_rejected(record: str, body: bytes) -> None:
    try:
        message = CODEC.decode(CODEC.encode(example(record))[:5] + body)
    except Rejected:
        return
    assert type(message) is RECORDS[record]


@given(record=st.sampled_from(sorted(RECORDS)), place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_a_message_or_rejected(record: str, place: int, bit: int) -> None:
    value = bytearray(CODEC.encode(example(record)))
    value[place % len(value)] ^= 1 << bit
    try:
        message = CODEC.decode(bytes(value))
    except Rejected:
        return
    assert isinstance(message, Message)


def test_an_older_or_newer_writer_is_understood() -> None:
    schema = copy.deepcopy(dict(schema_of("PaymentCompleted")))
    fields = fields_of("PaymentCompleted")
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "receipt_url"]
    schema["fields"].append({"name": "channel", "type": "string"})
    value = written(schema, {**fields, "channel": "web"})
    ours = example("PaymentCompleted")
    assert isinstance(ours, PaymentCompleted)
    assert knowing(schema).decode(value) == replace(ours, receipt_url=None)


def test_an_id_is_asked_for_once() -> None:
    asked: list[int] = []

    def registry(schema_id: int) -> Schema:
        asked.append(schema_id)
        return schema_of("PaymentFailed")

    codec = Codec({record: number for number, record in enumerate(RECORDS, start=1)}, registry)
    value = written(schema_of("PaymentFailed"), fields_of("PaymentFailed"))
    assert codec.decode(value) == codec.decode(value) == example("PaymentFailed")
    assert asked == [NEW]


def test_a_registry_that_is_away_is_no_reason_to_reject() -> None:
    def away(schema_id: int) -> Schema:
        raise Unavailable("the schema registry")

    codec = Codec({record: number for number, record in enumerate(RECORDS, start=1)}, away)
    with pytest.raises(Unavailable, match="the schema registry is unavailable"):
        codec.decode(written(schema_of("PaymentFailed"), fields_of("PaymentFailed")))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "record", "name": "shop.CartEmptied", "fields": []}, "'shop.CartEmptied', which is no record of ours"),
        ({"type": "record", "name": "CartEmptied", "namespace": "paystream", "fields": []}, "'paystream.CartEmptied', which is no record of ours"),
        ({"type": "record", "name": "PaymentFailed", "fields": []}, "'.PaymentFailed', which is no record of ours"),
        ("string", "'string', which is no record of ours"),
        (["null", "string"], "which is no record of ours"),
        ({"type": "record", "name": "paystream.PaymentFailed", "fields": [{"name": "event_id", "type": "nonsense"}]}, "can't be parsed"),
        ({"type": "record", "name": "paystream.PaymentFailed", "fields": []}, "the body is no PaymentFailed"),
    ],
)
def test_a_schema_that_is_not_ours_is_rejected(schema: Any, why: str) -> None:
    with pytest.raises(Rejected) as caught:
        knowing(schema).decode(struct.pack(">bI", 0, NEW))
    assert why in caught.value.detail


def test_a_body_that_calls_itself_something_else_is_rejected() -> None:
    value = written(schema_of("PaymentFailed"), {**fields_of("PaymentFailed"), "event_type": "PAYMENT_COMPLETED"})
    with pytest.raises(Rejected, match="event_type of a PaymentFailed is PAYMENT_FAILED"):
        knowing(schema_of("PaymentFailed")).decode(value)


@each_record
def test_headers_are_cloudevents_and_agree_with_the_body(record: str) -> None:
    message = example(record)
    told = dict(headers(message))
    subject, source = _subject_and_source(message)
    assert told.pop("ce_subject", b"").decode() == subject
    assert told == {
        "ce_specversion": b"1.0",
        "ce_id": message.event_id.encode(),
        "ce_type": message.event_type.encode(),
        "ce_source": source,
        "ce_time": message.occurred_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode(),
        "content-type": b"application/avro",
    }


def _subject_and_source(message: Message) -> tuple[str, bytes]:
    if isinstance(message, PaymentEvent):
        return message.payment_id, b"/paystream/payments"
    if isinstance(message, OrderEvent):
        return message.order_id, b"/paystream/orders"
    if isinstance(message, WebhookReceived):
        return message.object_id, b"/paystream/webhooks"
    if isinstance(message, OutboxPosition):
        return "", b"/paystream/relay"
    assert message.payment_id is not None
    return message.payment_id, b"/paystream/commands"
