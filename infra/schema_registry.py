"""The schema registry: our schemas under their full names (RecordNameStrategy), FULL_TRANSITIVE, registered by a deployment and never by a message.

Rule: any registry that speaks Confluent's API will do (Apicurio: the URL ends in `/apis/ccompat/v7`). Its ids are in every message on the topics, so
its memory has to last as long as they do.
Flow: `paystream schemas register` -> registry -> `load_codec` at a process's start -> `schemas/codec.py`, which asks again only for an id new to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar, cast

import httpx2
from confluent_kafka.schema_registry import Schema as RegistrySchema
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from infra.settings import Settings
from schemas.codec import Codec, Schema, full_name, schema_of
from schemas.compatibility import problems, published
from schemas.errors import BadConfiguration, Unavailable
from schemas.messages import RECORDS

LEVEL: Final = "FULL_TRANSITIVE"
START_TIMEOUT_S: Final = 10.0
LOOK_UP_TIMEOUT_S: Final = 2.0
"""The codec asks in the middle of an event loop's work: no longer than this."""
BACK_OFF_S: Final = 10.0
"""After an answer that did not come, how long the codec does not ask again."""
FORGET_ABSENT_S: Final = 60.0
MAX_ABSENT: Final = 1000

T = TypeVar("T")

_PART: Final = "the schema registry"
_MISSING: Final = frozenset({40401, 40402, 40403, 40408})
"""Confluent's codes for: no such subject, version, schema, level of its own."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a record's schema is not ready: `kind` is incompatible, unregistered or level."""

    record: str
    kind: str
    detail: str


def register(settings: Settings) -> dict[str, int]:
    """Bring every record's published and present schemas into the registry, and hold its subject to FULL_TRANSITIVE. Gives the present ones' ids.

    Repeating it changes nothing. The registry's global level is not touched: other teams' subjects are theirs.
    Raises BadConfiguration when a schema may not change like this, Unavailable when the registry does not answer.
    """
    if found := check(None):
        raise BadConfiguration("these schemas may not change like this:\n" + "\n".join(f"  {one.record}: {one.detail}" for one in found))
    with _client(settings, START_TIMEOUT_S) as client, _translated():
        return {record: _register(client, record) for record in RECORDS}


def _register(client: SchemaRegistryClient, record: str) -> int:
    subject = full_name(record)
    for schema in published(record).values():
        client.register_schema(subject, _sent(schema))
    schema_id = int(client.register_schema(subject, _sent(schema_of(record))))
    if _level(client, subject) != LEVEL:
        client.set_compatibility(subject_name=subject, level=LEVEL)
    return schema_id


def check(settings: Settings | None) -> tuple[Finding, ...]:
    """What keeps this deployment's schemas from being used; nothing if all is well.

    Without settings: against the versions published in this repository. With settings: against what the registry has, too.
    Raises Unavailable when the registry does not answer.
    """
    found = [Finding(record, "incompatible", why) for record in RECORDS for why in problems(schema_of(record), published(record))]
    if settings is not None:
        with _client(settings, START_TIMEOUT_S) as client, _translated():
            for record in RECORDS:
                found += _check_registered(client, record)
    return tuple(found)


def _check_registered(client: SchemaRegistryClient, record: str) -> Iterator[Finding]:
    subject = full_name(record)
    if _id_of(client, record, schema_of(record)) is None:
        yield Finding(record, "unregistered", "the registry does not have it: `paystream schemas register`")
    there = _versions(client, subject)
    for why in problems(schema_of(record), there):
        yield Finding(record, "incompatible", f"in the registry, {why}")
    if there and (level := _level(client, subject)) != LEVEL:
        yield Finding(record, "level", f"the registry holds its versions to {level or 'its global level'}, not {LEVEL}: `paystream schemas register`")


def load_codec(settings: Settings) -> Codec:
    """The codec of this deployment, with every id that its own schema files have in the registry known from the start.

    Raises Unavailable when the registry does not answer, BadConfiguration when it lacks a schema.
    """
    ids: dict[str, int] = {}
    known: dict[int, Schema] = {}
    with _client(settings, START_TIMEOUT_S) as client, _translated():
        for record in RECORDS:
            for schema in (*published(record).values(), schema_of(record)):
                if (schema_id := _id_of(client, record, schema)) is not None:
                    known[schema_id] = schema
                    if schema == schema_of(record):
                        ids[record] = schema_id
    if missing := [record for record in RECORDS if record not in ids]:
        raise BadConfiguration(f"the schema registry does not have {', '.join(missing)}: run `paystream schemas register`")
    return Codec(ids, Writers(settings, known))


def answers(settings: Settings) -> bool:
    """Whether a registry is there now."""
    try:
        with _client(settings, LOOK_UP_TIMEOUT_S) as client, _translated():
            client.get_compatibility()
    except (Unavailable, BadConfiguration):
        return False
    return True


class Writers:
    """Schemas by id, asked of the registry once: what a codec meets and its own files do not have.

    What is not there is remembered for a minute, and a registry that did not answer is left alone for ten seconds, so that bad messages can't keep an
    event loop busy with waiting.
    """

    def __init__(self, settings: Settings, known: Mapping[int, Schema]) -> None:
        self._settings = settings
        self._known = dict(known)
        self._absent: dict[int, float] = {}
        self._away_until = 0.0

    def __call__(self, schema_id: int) -> Schema | None:
        """The schema, or None if the registry has no Avro schema under this id. Raises Unavailable."""
        now = time.monotonic()
        if schema_id in self._known:
            return self._known[schema_id]
        if self._absent.get(schema_id, 0.0) > now:
            return None
        if self._away_until > now:
            raise Unavailable(_PART, "it did not answer a moment ago")
        try:
            schema = self._ask(schema_id)
        except Unavailable:
            self._away_until = time.monotonic() + BACK_OFF_S
            raise
        if schema is not None:
            self._known[schema_id] = schema
        else:
            if len(self._absent) >= MAX_ABSENT:
                self._absent.clear()
            self._absent[schema_id] = now + FORGET_ABSENT_S
        return schema

    def _ask(self, schema_id: int) -> Schema | None:
        with _client(self._settings, LOOK_UP_TIMEOUT_S) as client, _translated():
            found = _unless_missing(lambda: client.get_schema(schema_id))
            return json.loads(found.schema_str) if found is not None and found.schema_type == "AVRO" else None


# ── The client, and what its errors mean ──


def _client(settings: Settings, timeout_s: float) -> SchemaRegistryClient:
    config = {"url": settings.schema_registry.url, "timeout": timeout_s, "max.retries": 0}
    if "https:" not in settings.schema_registry.url:
        config["ssl.ca.location"] = False  # without TLS nothing is verified, and reading all certificates of the world would take 30 ms each time
    try:
        return SchemaRegistryClient(config)
    except ValueError:  # its words repeat the URL, and there may be a password in it
        raise BadConfiguration("PAYSTREAM_SCHEMA_REGISTRY__URL is no URL: it has to begin with http:// or https://") from None


def _sent(schema: Schema) -> RegistrySchema:
    return RegistrySchema(json.dumps(schema), "AVRO")


def _id_of(client: SchemaRegistryClient, record: str, schema: Schema) -> int | None:
    found = _unless_missing(lambda: client.lookup_schema(full_name(record), _sent(schema)))
    return None if found is None else int(found.schema_id)


def _versions(client: SchemaRegistryClient, subject: str) -> dict[int, Schema]:
    numbers: list[int] = _unless_missing(lambda: client.get_versions(subject)) or []
    return {number: cast("Schema", json.loads(client.get_version(subject, number).schema.schema_str)) for number in numbers}


def _level(client: SchemaRegistryClient, subject: str) -> str | None:
    return _unless_missing(lambda: str(client.get_compatibility(subject)))


def _unless_missing(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except SchemaRegistryError as error:
        if error.error_code in _MISSING:
            return None
        raise


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SchemaRegistryError as error:
        if error.http_status_code >= 500 or error.http_status_code == 429:
            raise Unavailable(_PART, f"it answers HTTP {error.http_status_code}") from error
        if error.error_code in (None, SchemaRegistryError.UNKNOWN):
            what = f"answers HTTP {error.http_status_code}, but not as Confluent's API does (Apicurio has that at /apis/ccompat/v7)"
            raise BadConfiguration(f"PAYSTREAM_SCHEMA_REGISTRY__URL {what}") from error
        raise BadConfiguration(f"the schema registry refuses: {str(error.error_message)[:500]} (HTTP {error.http_status_code})") from error
    except httpx2.HTTPError as error:
        raise Unavailable(_PART, f"{type(error).__name__}; is PAYSTREAM_SCHEMA_REGISTRY__URL right?") from error
    except json.JSONDecodeError as error:
        raise BadConfiguration("PAYSTREAM_SCHEMA_REGISTRY__URL answers, but not in JSON: that is no schema registry") from error
