"""The example of each record, as a message."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import fastavro

from schemas.codec import schema_of
from schemas.messages import RECORDS, Message

FOLDER: Final = Path(__file__).parents[2] / "schemas" / "examples"


def fields_of(record: str) -> dict[str, Any]:
    """What `schemas/examples/<record>.json` holds, in Python's types. The file is in Avro's JSON encoding, and must fit the schema."""
    one_line = " ".join((FOLDER / f"{record}.json").read_text(encoding="utf-8").splitlines())  # fastavro takes each line for a record
    (found,) = fastavro.json_reader(io.StringIO(one_line), schema_of(record))
    assert isinstance(found, dict)
    return found


def example(record: str) -> Message:
    return RECORDS[record](**{name: value for name, value in fields_of(record).items() if name != "event_type"})
