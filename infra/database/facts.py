"""Facts and messages on their way to Kafka, written in the transaction of what they tell about.

Rule: the outbox holds encoded bytes, so a message that can't be encoded fails its own writer and nobody else. A store puts `OUTBOX` (and, for
events, `EVENTS`) into the WITH of its own statement and adds the rows to its parameters: one round trip, one transaction.
Flow: payments.py, orders.py, parking.py -> outbox (and events) -> producers/outbox_relay -> Kafka.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import orjson

from schemas.codec import Codec, headers
from schemas.messages import Event, Message, OrderEvent

Destinations = Callable[[str], Sequence[str]]
"""The topics of a record by its name, the one where order holds first."""

OUTBOX: Final = """
    into_outbox AS (
        INSERT INTO outbox (topics, key, value, headers, event_id, created_at)
        SELECT string_to_array(u.topics, ','), u.key, u.value, u.headers::jsonb, u.event_id, %(now)s
        FROM unnest(%(out_topics)s::text[], %(out_key)s::bytea[], %(out_value)s::bytea[], %(out_headers)s::text[], %(out_event_id)s::uuid[])
             WITH ORDINALITY AS u (topics, key, value, headers, event_id, n)
        ORDER BY u.n)"""

EVENTS: Final = """
    into_events AS (
        INSERT INTO events (event_id, stream, entity_id, version, event_type, order_id, value, occurred_at, topic)
        SELECT u.event_id, %(stream)s, u.entity_id, u.version, u.event_type, %(order_id)s, u.value, %(now)s, u.topic
        FROM unnest(%(out_event_id)s::uuid[], %(ev_entity_id)s::text[], %(ev_version)s::bigint[], %(ev_type)s::text[], %(out_value)s::bytea[],
                    %(ev_topic)s::text[])
             AS u (event_id, entity_id, version, event_type, value, topic))"""

NOTIFY: Final = "pg_notify('outbox', '')"


def outbox_rows(codec: Codec, destinations: Destinations, messages: Iterable[Message]) -> dict[str, list[Any]]:
    """The parameters of `OUTBOX` for `messages`, in order. Raises Rejected for one that does not fit its schema."""
    rows: dict[str, list[Any]] = {"out_topics": [], "out_key": [], "out_value": [], "out_headers": [], "out_event_id": []}
    for message in messages:
        rows["out_topics"].append(",".join(destinations(type(message).__name__)))
        rows["out_key"].append((message.key or "").encode() or None)
        rows["out_value"].append(codec.encode(message))
        rows["out_headers"].append(headers_json(headers(message)))
        rows["out_event_id"].append(message.event_id)
    return rows


def event_rows(codec: Codec, destinations: Destinations, events: Sequence[Event]) -> dict[str, list[Any]]:
    """The parameters of `OUTBOX` and `EVENTS` for the events of one transaction."""
    rows = outbox_rows(codec, destinations, events)
    return rows | {
        "ev_entity_id": [event.order_id if isinstance(event, OrderEvent) else event.payment_id for event in events],
        "ev_version": [event.version for event in events],
        "ev_type": [event.event_type for event in events],
        "ev_topic": [topics.split(",", 1)[0] for topics in rows["out_topics"]],
    }


def headers_json(headers: Iterable[tuple[str, bytes | None]]) -> str:
    """Record headers as a column has them: pairs of name and base64, or null. A NUL in a name, which Postgres can't keep, shows as `\\0`."""
    return orjson.dumps(
        [(name.replace("\0", "\\0"), None if value is None else base64.b64encode(value).decode()) for name, value in headers]
    ).decode()


def headers_of(column: Iterable[tuple[str, str | None]]) -> tuple[tuple[str, bytes | None], ...]:
    """Record headers from a `headers` column."""
    return tuple((name, None if value is None else base64.b64decode(value)) for name, value in column)
