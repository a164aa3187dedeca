"""Bring a database to the newest revision, and say where it stands.

Rule: migrations only go forward, one at a time (an advisory lock lets a second runner wait), and a program that starts never migrates by itself:
`paystream migrate` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from infra.database.tables import metadata
from schemas.errors import Unavailable

_LOCK: Final = 7_270_001


def migrate(url: str) -> str:
    """Apply what is missing to the database at `url` (libpq form). Returns the revision reached; raises Unavailable if Postgres does not answer."""
    try:
        with _engine(url).connect() as connection:
            connection.execute(sa.text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.commit()
            try:
                command.upgrade(_config(connection), "head")
                connection.commit()
                return MigrationContext.configure(connection).get_current_revision() or ""
            finally:
                connection.execute(sa.text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})
                connection.commit()
    except sa.exc.OperationalError as error:
        raise Unavailable("Postgres", str(error.orig).strip().splitlines()[0]) from error


def head() -> str:
    """The newest revision that this program knows."""
    return ScriptDirectory.from_config(_config(None)).get_current_head() or ""


def drift(url: str) -> list[str]:
    """How the database at `url` differs from the tables in `tables.py`; empty when it is as they say."""
    with _engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_schemas": True, "include_name": _is_ours})
        return [str(difference) for difference in compare_metadata(context, metadata)]


def _is_ours(name: str | None, kind: str, _: object) -> bool:
    return name in (None, "analytics", "public") if kind == "schema" else name != "alembic_version"


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1), poolclass=sa.pool.NullPool)


def _config(connection: sa.Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
