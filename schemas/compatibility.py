"""May a schema change like this? FULL_TRANSITIVE: each version of a record can read what every other version wrote, older and newer.

Rule: `schemas/avro/<Record>.avsc` is what this deployment writes; `schemas/avro/published/<Record>/<n>.avsc` are the versions that others build upon,
and never change. A record's file may differ from them only so that all stay readable: fields that have a default come and go, nothing else.
Flow: edit the .avsc -> `paystream schemas check` -> deploy (`paystream schemas register`) -> `paystream schemas freeze`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityResult, SchemaCompatibilityType
from avro.schema import parse

from schemas.codec import AVRO_FOLDER, Schema, schema_of

PUBLISHED_FOLDER: Final = AVRO_FOLDER / "published"


def published(record: str) -> dict[int, Schema]:
    """The published versions of a record by their numbers, oldest first; none for one that is new."""
    files = sorted((int(file.stem), file) for file in (PUBLISHED_FOLDER / record).glob("*.avsc"))
    return {number: json.loads(file.read_text(encoding="utf-8")) for number, file in files}


def problems(schema: Schema, others: Mapping[int, Schema]) -> tuple[str, ...]:
    """Why `schema` may not join `others`, versions by their numbers, under FULL_TRANSITIVE; nothing if it may."""
    found: list[str] = []
    for number, other in others.items():
        found += [f"can't read version {number}: {why}" for why in _differences(reader=schema, writer=other)]
        found += [f"version {number} can't read it: {why}" for why in _differences(reader=other, writer=schema)]
        found += [f"version {number} has another type for {name}" for name in _retyped(schema, other)]
    return tuple(found)


def freeze(record: str) -> Path | None:
    """Publish the record's present schema as its next version, in the checkout. None if it is the newest one already.

    The caller has checked that it has no `problems`.
    """
    versions = published(record)
    newest = max(versions, default=0)
    if versions.get(newest) == schema_of(record):
        return None
    file = PUBLISHED_FOLDER / record / f"{newest + 1}.avsc"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((AVRO_FOLDER / f"{record}.avsc").read_bytes())
    return file


def _differences(*, reader: Schema, writer: Schema) -> list[str]:
    checker = ReaderWriterCompatibilityChecker()
    result = cast("SchemaCompatibilityResult", checker.get_compatibility(parse(json.dumps(reader)), parse(json.dumps(writer))))
    if result.compatibility is SchemaCompatibilityType.compatible:
        return []
    kinds = ", ".join(sorted({kind.name.replace("_", " ") for kind in result.incompatibilities}))
    return [f"{kinds} ({'; '.join(sorted(result.messages))})"]


def _retyped(one: Schema, other: Schema) -> list[str]:
    # Avro would let string become bytes, and knows nothing of logical types: a time in microseconds would be read as one in milliseconds.
    types = {field["name"]: field["type"] for field in other["fields"]}
    return [field["name"] for field in one["fields"] if field["name"] in types and types[field["name"]] != field["type"]]
