"""The database that the migrations make: as the tables in the code say, and with an audit log that takes new rows only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from infra.database.migrations.run import drift, head, migrate
from infra.settings import Settings

pytestmark = pytest.mark.integration

ROW = (
    "INSERT INTO transactions (payment_id, order_id, kind, gateway, gateway_id, amount_minor, currency, before_minor, after_minor, at)"
    " VALUES (gen_random_uuid(), 'order-1', 'charge', 'stripe', 'ch_1', 1000, 'EUR', 0, 1000, now())"
)
CHANGES = {
    "UPDATE transactions SET amount_minor = 1": "UPDATE",
    "UPDATE transactions SET amount_minor = 1 WHERE false": "UPDATE",
    "DELETE FROM transactions": "DELETE",
    "TRUNCATE transactions": "TRUNCATE",
    "TRUNCATE payments, transactions CASCADE": "TRUNCATE",
    f"{ROW} ON CONFLICT (gateway, gateway_id, kind) DO UPDATE SET amount_minor = 1": "UPDATE",
    "WITH gone AS (DELETE FROM transactions RETURNING 1) SELECT count(*) FROM gone": "DELETE",
    "MERGE INTO transactions USING (SELECT 'ch_1' AS id) AS seen ON gateway_id = seen.id WHEN MATCHED THEN DELETE": "DELETE",
}


@pytest.fixture
def connection(database: Settings) -> Iterator[psycopg.Connection[Any]]:
    """As the owner of all tables, who is a superuser too; nothing is committed."""
    with psycopg.connect(database.database.url.get_secret_value()) as opened:
        assert opened.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (True,)
        yield opened


def test_the_tables_are_as_the_code_says(database: Settings) -> None:
    url = database.database.url.get_secret_value()
    assert drift(url) == []
    assert migrate(url) == head(), "again, with nothing to do"


def test_the_audit_log_takes_each_row_once(connection: psycopg.Connection[Any]) -> None:
    for _ in range(2):
        connection.execute(f"{ROW} ON CONFLICT DO NOTHING")
    connection.commit()
    assert connection.execute("SELECT gateway_id, amount_minor FROM transactions").fetchall() == [("ch_1", 1000)]


@pytest.mark.parametrize(("change", "operation"), CHANGES.items())
def test_the_audit_log_refuses_every_change(connection: psycopg.Connection[Any], change: str, operation: str) -> None:
    connection.execute(ROW)
    connection.commit()
    connection.execute("INSERT INTO order_owners VALUES ('order-1', 'u1')")
    with pytest.raises(psycopg.errors.RestrictViolation, match=f"transactions is append-only: {operation} is refused"):
        connection.execute(change)
    connection.rollback()
    assert connection.execute("SELECT gateway_id, amount_minor FROM transactions").fetchall() == [("ch_1", 1000)]
    assert connection.execute("SELECT FROM order_owners").fetchall() == [], "what else the transaction did is undone with it"


def test_a_replicas_session_is_refused_too(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SET session_replication_role = replica")
    with pytest.raises(psycopg.errors.RestrictViolation):
        connection.execute("DELETE FROM transactions")


def test_a_transaction_that_was_refused_can_do_nothing_more(connection: psycopg.Connection[Any]) -> None:
    connection.execute(ROW)
    with pytest.raises(psycopg.errors.RestrictViolation):
        connection.execute("DELETE FROM transactions")
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        connection.execute("SELECT 1")
    connection.commit()
    assert connection.execute("SELECT FROM transactions").fetchall() == [], "its COMMIT is a rollback"
