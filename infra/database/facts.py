"""Facts and messages on their way to Kafka, written in the transaction of what they tell about.

Rule: the outbox holds encoded bytes, so a message that can't be encoded fails its own writer and nobody else. A store puts `OUTBOX` (and, for
events, `EVENTS`) into the WITH of its own statement and `said` to its parameters: one round trip, one transaction.
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
    said AS MATERIALIZED (
        SELECT * FROM ROWS FROM (jsonb_to_recordset(%(said)s::jsonb) AS (
            topics text, key text, value text, headers jsonb, event_id uuid, entity_id text, version bigint, event_type text, order_id text))
            WITH ORDINALITY AS m (topics, key, value, headers, event_id, entity_id, version, event_type, order_id, n)),
    into_outbox AS (
        INSERT INTO outbox (topics, key, value, headers, event_id, created_at)
        SELECT string_to_array(topics, ','), convert_to(key, 'UTF8'), decode(value, 'base64'), headers,
               event_id, %(now)s
        FROM said ORDER BY n)"""

EVENTS: Final = """
    into_events AS (
        INSERT INTO events (event_id, stream, entity_id, version, event_type, order_id, value, occurred_at, topic)
        SELECT event_id, %(stream)s, entity_id, version, event_type, order_id, decode(value, 'base64'), %(now)s, split_part(topics, ',', 1)
        FROM said)"""

NOTIFY: Final = "pg_notify('outbox', '')"


def said(codec: Codec, destinations: Destinations, messages: Iterable[tuple[Message, bytes | None]]) -> str:
    """The parameter `said` of `OUTBOX` and `EVENTS`: messages and the `traceparent` of what caused each, in order, as JSON.

    Raises Rejected for one that does not fit its schema. It is one parameter because each array among the parameters would cost the driver more than
    all else of a statement.
    """
    return orjson.dumps([_row(codec, destinations, message, traceparent) for message, traceparent in messages]).decode()


def _row(codec: Codec, destinations: Destinations, message: Message, traceparent: bytes | None) -> dict[str, Any]:
    trace = (("traceparent", traceparent),) if traceparent else ()
    row: dict[str, Any] = {
        "topics": ",".join(destinations(type(message).__name__)),
        "key": message.key or None,
        "value": base64.b64encode(codec.encode(message)).decode(),
        "headers": _pairs((*headers(message), *trace)),
    }
    if isinstance(message, Event):
        entity_id = message.order_id if isinstance(message, OrderEvent) else message.payment_id
        about = {"event_id": message.event_id, "event_type": message.event_type, "order_id": message.order_id}
        row |= about | {"entity_id": entity_id, "version": message.version}
    return row


def headers_json(headers: Iterable[tuple[str, bytes | None]]) -> str:
    """Record headers as a column has them."""
    return orjson.dumps(_pairs(headers)).decode()


def _pairs(headers: Iterable[tuple[str, bytes | None]]) -> list[tuple[str, str | None]]:
    """Pairs of name and base64, or null. A NUL in a name, which Postgres can't keep, shows as `\\0`."""
    return [(name.replace("\0", "\\0"), None if value is None else base64.b64encode(value).decode()) for name, value in headers]


def headers_of(column: Iterable[tuple[str, str | None]]) -> tuple[tuple[str, bytes | None], ...]:
    """Record headers from a `headers` column."""
    return tuple((name, None if value is None else base64.b64decode(value)) for name, value in column)
