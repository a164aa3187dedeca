"""The tables, as SQLAlchemy metadata: what migrations are written against and what reads and reports are built from.

Rule: each consumer group writes its own tables only. What hot transactions do to them is in `payments.py`, `orders.py`, `intake.py`, `outbox.py` and
`parking.py`, in SQL; times are `timestamptz`, money is `bigint` minor units, statuses are text with a CHECK.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _minor(name: str) -> Column[object]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


# ── The intake ──

order_owners = Table(
    "order_owners",
    metadata,
    Column("order_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    comment="The first principal that uses an order id owns it",
)

commands = Table(
    "commands",
    metadata,
    Column("command_id", Uuid, primary_key=True),
    Column("principal", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("fingerprint", Text, nullable=False, comment="SHA-256 of the canonical body: the same key with another one is an error"),
    Column("order_id", Text, nullable=False),
    Column("payment_id", Uuid, nullable=False),
    Column("command_type", Text, nullable=False),
    Column("value", LargeBinary, nullable=False, comment="the encoded command, produced again as it is while undecided"),
    _time("accepted_at"),
    _time("decided_at", nullable=True),
    Column("outcome", Text, comment="applied or refused"),
    Column("refusal", JSONB, comment="{code, message} of a refused command"),
    Column("answered_status", Integer, comment="the HTTP status of the first answer, repeated by a replay"),
    CheckConstraint("outcome IN ('applied', 'refused')", name="outcome"),
    Index("ix_commands_undecided", "order_id", postgresql_where=text("decided_at IS NULL")),
)

# ── Payments ──

payments = Table(
    "payments",
    metadata,
    Column("payment_id", Uuid, primary_key=True),
    Column("order_id", Text, nullable=False, index=True),
    Column("user_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("capture_method", Text, nullable=False),
    _minor("captured_minor"),
    _minor("refunded_minor"),
    _minor("pending_refund_minor"),
    _minor("disputed_minor"),
    Column("transaction_id", Text, comment="the gateway's charge id"),
    Column("failure", JSONB),
    Column("version", BigInteger, nullable=False),
    Column("holds_order", Boolean, nullable=False, comment="set by commands only: one payment holds an order until it is FAILED or CANCELLED"),
    _time("created_at"),
    _time("updated_at"),
    CheckConstraint("amount_minor > 0", name="amount"),
    CheckConstraint("captured_minor >= 0 AND refunded_minor >= 0 AND pending_refund_minor >= 0 AND disputed_minor >= 0", name="amounts_not_negative"),
    CheckConstraint("pending_refund_minor = 0 OR refunded_minor + pending_refund_minor <= captured_minor", name="reserved_within_captured"),
    Index("uq_payments_holds_order", "order_id", unique=True, postgresql_where=text("holds_order")),
    Index("ix_payments_user", "user_id", "created_at"),
    Index("ix_payments_created", "created_at", "payment_id"),
    Index("ix_payments_transaction", "transaction_id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("payment_id", Uuid, ForeignKey("payments.payment_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("request", JSONB, nullable=False, comment="what the gateway was told, exactly"),
    Column("operation", JSONB, comment="what the gateway is being asked; NULL once its answer is known"),
    Column("gateway_id", Text),
    Column("client_secret", Text, comment="for the owner's eyes; on no topic and in no log"),
    Column("next_action", JSONB),
    Column("supersedes", Text),
    Column("transaction_id", Text),
    _minor("captured_minor"),
    _time("unknown_since", nullable=True),
    Column("open", Boolean, nullable=False, comment="set by commands only: one open attempt for each payment"),
    _time("started_at"),
    _time("updated_at"),
    PrimaryKeyConstraint("payment_id", "number"),
    Index("uq_attempts_open", "payment_id", unique=True, postgresql_where=text("open")),
    Index("ix_attempts_unknown", "unknown_since", postgresql_where=text("unknown_since IS NOT NULL")),
)

gateway_objects = Table(
    "gateway_objects",
    metadata,
    Column("gateway", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("payment_id", Uuid, nullable=False),
    Column("order_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    PrimaryKeyConstraint("gateway", "object_id"),
)

transactions = Table(
    "transactions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("payment_id", Uuid, nullable=False, index=True),
    Column("order_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("gateway_id", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("before_minor", BigInteger, nullable=False),
    Column("after_minor", BigInteger, nullable=False),
    _time("at"),
    CheckConstraint("kind IN ('charge', 'refund', 'chargeback', 'fee')", name="kind"),
    UniqueConstraint("gateway", "gateway_id", "kind", name="uq_transactions_gateway"),
    comment="Money that moved, append-only",  # by a trigger, which refuses everything but INSERT
)

timers = Table(
    "timers",
    metadata,
    Column("timer_id", Uuid, primary_key=True),
    Column("order_id", Text, nullable=False),
    Column("payment_id", Uuid, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("correlation_id", Text, nullable=False),
    Column("command_type", Text, nullable=False),
    Column("attempt", Integer),
    _time("due_at"),
    Index("ix_timers_due", "due_at"),
)

# ── Facts, and their way to Kafka ──

events = Table(
    "events",
    metadata,
    Column("event_id", Uuid, primary_key=True),
    Column("stream", Text, nullable=False, comment="payment or order"),
    Column("entity_id", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("order_id", Text, nullable=False, index=True),
    Column("value", LargeBinary, nullable=False),
    _time("occurred_at"),
    Column("topic", Text, nullable=False),
    Column("partition", Integer),
    Column("offset", BigInteger),
    _time("published_at", nullable=True),
    UniqueConstraint("stream", "entity_id", "version", name="uq_events_version"),
    comment="Every fact, for ever; where it is on Kafka once published",
)

outbox = Table(
    "outbox",
    metadata,
    Column("seq", BigInteger, Identity(always=True), primary_key=True, comment="order of insertion, so order within an order"),
    Column("id", Uuid, nullable=False, unique=True, server_default=text("uuidv7()"), comment="never met again after a restore"),
    Column("topics", ARRAY(Text), nullable=False, comment="without prefix; the first is where order holds"),
    Column("key", LargeBinary),
    Column("value", LargeBinary),
    Column("headers", JSONB, nullable=False, comment='[["name", "base64"], …]'),
    Column("timestamp_ms", BigInteger),
    Column("event_id", Uuid),
    _time("created_at"),
    _time("published_at", nullable=True),
    Index("ix_outbox_unpublished", "seq", postgresql_where=text("published_at IS NULL")),
)

# ── Delivery: what was handled, what is parked, what is halted ──

inbox = Table(
    "inbox",
    metadata,
    Column("group_name", Text, nullable=False),
    Column("message_id", Uuid, nullable=False),
    _time("at"),
    PrimaryKeyConstraint("group_name", "message_id"),
)

stream_positions = Table(
    "stream_positions",
    metadata,
    Column("group_name", Text, nullable=False),
    Column("entity_id", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    PrimaryKeyConstraint("group_name", "entity_id"),
    comment="The last version of each payment or order that a consumer of events has applied",
)

parked_messages = Table(
    "parked_messages",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("group_name", Text, nullable=False),
    Column("order_key", Text, comment="NULL: the message had no key and blocks nothing"),
    Column("topic", Text, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("timestamp_ms", BigInteger),
    Column("key", LargeBinary),
    Column("value", LargeBinary),
    Column("headers", JSONB, nullable=False),
    Column("message_id", Uuid),
    Column("disposition", Text, nullable=False),
    Column("error_class", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("stack", Text),
    Column("attempts", Integer, nullable=False, server_default=text("1")),
    _time("first_failed_at"),
    _time("last_failed_at"),
    CheckConstraint("disposition IN ('poison', 'bug', 'blocked')", name="disposition"),
    UniqueConstraint("group_name", "topic", "partition", "offset", name="uq_parked_messages_place"),
    Index("ix_parked_messages_order", "group_name", "order_key", "id"),
)

parked_orders = Table(
    "parked_orders",
    metadata,
    Column("group_name", Text, nullable=False),
    Column("order_key", Text, nullable=False),
    _time("since"),
    PrimaryKeyConstraint("group_name", "order_key"),
)

group_halts = Table(
    "group_halts",
    metadata,
    Column("group_name", Text, primary_key=True),
    _time("halted_at", nullable=True),
    Column("reason", Text, nullable=False),
    _time("resumed_at", nullable=True),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _time("at"),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'")),
)

# ── Orders ──

orders = Table(
    "orders",
    metadata,
    Column("order_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("payment_id", Uuid, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    _time("updated_at"),
)

# ── Analytics: views that a replay rebuilds, in a schema of their own ──

analytics_payments = Table(
    "payments",
    metadata,
    Column("payment_id", Uuid, primary_key=True),
    Column("order_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    _minor("captured_minor"),
    Column("failure_code", Text),
    _time("initiated_at"),
    _time("ended_at", nullable=True),
    Column("version", BigInteger, nullable=False),
    Index("ix_analytics_payments_initiated", "initiated_at"),
    schema="analytics",
)

analytics_attempts = Table(
    "attempts",
    metadata,
    Column("payment_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("failure_code", Text),
    Column("gateway_latency_ms", Integer),
    _time("at"),
    PrimaryKeyConstraint("payment_id", "attempt"),
    Index("ix_analytics_attempts_at", "at"),
    schema="analytics",
)
