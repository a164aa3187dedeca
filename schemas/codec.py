"""Messages as bytes and back: Avro in Confluent's wire format, with CloudEvents headers.

Rule: what leaves is written with this deployment's schemas; what comes in is read with its writer's schema and resolved to ours. Any bytes at all
either decode to one of our messages or raise Rejected. No I/O here: whoever builds a Codec says how the schema of an unknown id is found.
Flow: message -> `encode` -> 0x00, schema id (4 bytes, big-endian), Avro body -> topic -> `decode` -> message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC
from functools import cache
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, cast

import fastavro

from schemas.errors import Rejected
from schemas.messages import RECORDS, Command, Event, Message, OrderEvent, OutboxPosition, WebhookReceived

AVRO_NAMESPACE: Final = "paystream"
AVRO_FOLDER: Final = Path(__file__).parent / "avro"
CONTENT_TYPE: Final = b"application/avro"
_MAGIC: Final = 0
_PREFIX_BYTES: Final = 5
_IDS: Final = ("event_id", "payment_id")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

Schema = Mapping[str, Any]
"""An Avro schema as the JSON object that its file holds."""


@cache
def schema_of(record: str) -> Schema:
    """The schema that this deployment writes and reads `record` with: `schemas/avro/<record>.avsc`."""
    return cast("Schema", json.loads((AVRO_FOLDER / f"{record}.avsc").read_text(encoding="utf-8")))


def full_name(record: str) -> str:
    """`PaymentCompleted` -> `paystream.PaymentCompleted`, which is also its subject in the registry (RecordNameStrategy)."""
    return f"{AVRO_NAMESPACE}.{record}"


@dataclass(frozen=True, slots=True)
class _Writing:
    """What it takes to write one class: its parsed schema, what comes before the body, and how to get all fields in one call."""

    prefix: bytes
    parsed: Any
    names: tuple[str, ...]
    values: Callable[[Message], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Reading:
    """What it takes to read bodies of one schema id. `reader` is None where writer and reader are the same: nothing to resolve."""

    cls: type[Message]
    writer: Any
    reader: Any | None


class Codec:
    """Encodes and decodes every message of `RECORDS`.

    `ids` gives the schema id of each record by its name (`PaymentCompleted`). `writers(id)` gives the schema registered under an id, or None if
    there is none; it may raise Unavailable. It is asked until it has found an id, then never again for that one.
    """

    def __init__(self, ids: Mapping[str, int], writers: Callable[[int], Schema | None]) -> None:
        self._writers = writers
        self._writing = {cls: _writing(record, cls, ids[record]) for record, cls in RECORDS.items()}
        self._reading = {ids[record]: _Reading(cls, self._writing[cls].parsed, None) for record, cls in RECORDS.items()}

    @classmethod
    def unregistered(cls) -> Codec:
        """A codec that needs no registry: ids count from 1 in the order of names. For tests, and for nothing that others read."""
        return cls({record: number for number, record in enumerate(sorted(RECORDS), start=1)}, lambda _: None)

    def encode(self, message: Message) -> bytes:
        """The message in Confluent's wire format.

        Raises ValueError for a time without a zone, TypeError or OverflowError for a field that its schema can't hold: bugs of the caller.
        """
        if message.occurred_at.tzinfo is None:
            raise ValueError("occurred_at has no time zone")
        how = self._writing[type(message)]
        body = dict(zip(how.names, how.values(message), strict=True))
        body["event_type"] = message.event_type
        out = BytesIO()
        out.write(how.prefix)
        fastavro.schemaless_writer(out, how.parsed, body)
        return out.getvalue()

    def decode(self, value: bytes | None) -> Message:
        """The message that `value` holds. Fields that its writer did not know have their defaults, fields that we do not know are dropped.

        Raises Rejected for whatever is no message of ours, and Unavailable when the id is new here and the registry does not answer.
        """
        if not value:
            raise Rejected("the value is empty")
        if value[0] != _MAGIC:
            raise Rejected(f"the value begins with byte {value[0]:#04x}: not Confluent's wire format, which begins with 0x00")
        if len(value) < _PREFIX_BYTES:
            raise Rejected(f"the value is {len(value)} bytes long: too short for a schema id")
        schema_id = int.from_bytes(value[1:_PREFIX_BYTES], "big")
        how = self._reading.get(schema_id) or self._learn(schema_id)
        record = how.cls.__name__
        body = BytesIO(value)
        body.seek(_PREFIX_BYTES)
        try:
            found = cast("dict[str, Any]", fastavro.schemaless_reader(body, how.writer, how.reader))
        except Exception as error:  # fastavro raises whatever the bytes happen to run into: EOFError, IndexError, UnicodeDecodeError, OverflowError …
            raise Rejected(f"the body is no {record} as schema {schema_id} has it: {type(error).__name__}") from error
        if left := len(value) - body.tell():
            raise Rejected(f"{left} bytes follow the {record}")
        event_type = found.pop("event_type")
        if event_type != how.cls.event_type:
            raise Rejected(f"event_type of a {record} is {how.cls.event_type}, not {str(event_type)[:64]!r}")
        for name in _IDS:
            if found[name] is not None and not _UUID.fullmatch(found[name]):
                raise Rejected(f"{name} of this {record} is no UUID: {found[name][:64]!r}")
        return how.cls(**found)

    def _learn(self, schema_id: int) -> _Reading:
        schema = self._writers(schema_id)
        if schema is None:
            raise Rejected(f"schema id {schema_id} is not in the registry")
        namespace, _, record = str(_full_name_of(schema)).rpartition(".")
        if namespace != AVRO_NAMESPACE or record not in RECORDS:
            raise Rejected(f"schema id {schema_id} is {str(_full_name_of(schema))[:100]!r}, which is no record of ours")
        try:
            writer = fastavro.parse_schema(schema)
        except Exception as error:  # a registry that lets a broken schema in is no reason to stop
            raise Rejected(f"schema id {schema_id} can't be parsed: {type(error).__name__}") from error
        cls = RECORDS[record]
        how = self._reading[schema_id] = _Reading(cls, writer, self._writing[cls].parsed)
        return how


def headers(message: Message) -> tuple[tuple[str, bytes], ...]:
    """CloudEvents 1.0 in binary mode (Kafka protocol binding), so that a consumer can skip by `ce_type` before it decodes."""
    source, subject = _source_and_subject(message)
    occurred = message.occurred_at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return (
        ("ce_specversion", b"1.0"),
        ("ce_id", message.event_id.encode()),
        ("ce_type", message.event_type.encode()),
        ("ce_source", source),
        ("ce_time", occurred.encode()),
        *((("ce_subject", subject.encode()),) if subject else ()),
        ("content-type", CONTENT_TYPE),
    )


def _source_and_subject(message: Message) -> tuple[bytes, str | None]:
    match message:
        case OrderEvent():
            return b"/paystream/orders", message.order_id
        case Event():
            return b"/paystream/payments", message.payment_id
        case Command():
            return b"/paystream/commands", message.payment_id
        case WebhookReceived():
            return b"/paystream/webhooks", message.object_id
        case OutboxPosition():
            return b"/paystream/relay", None
        case _:
            raise TypeError(f"{type(message).__name__} has no CloudEvents source")


def _writing(record: str, cls: type[Message], schema_id: int) -> _Writing:
    names = tuple(field.name for field in fields(cls))
    return _Writing(
        prefix=bytes([_MAGIC]) + schema_id.to_bytes(4, "big"),
        parsed=fastavro.parse_schema(schema_of(record)),
        names=names,
        values=cast("Callable[[Message], tuple[Any, ...]]", attrgetter(*names)),
    )


def _full_name_of(schema: object) -> object:
    """`paystream.X` of a record's schema, however it spells it; the schema itself of what has no name."""
    if not isinstance(schema, Mapping) or "name" not in schema:
        return schema
    name = str(schema["name"])
    return name if "." in name else f"{schema.get('namespace', '')}.{name}"
