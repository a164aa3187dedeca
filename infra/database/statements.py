"""Statements of SQLAlchemy Core, executed by psycopg itself: quicker by far, and without a second driver layer.

Flow: reads.py, figures.py -> fetched -> the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from psycopg.rows import namedtuple_row
from sqlalchemy import Select
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.sql.compiler import Compiled

from infra.database.pool import Pool, connection

_DIALECT: Final = psycopg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy has no types for it


@cache
def _compiled(statement: Select[Any]) -> Compiled:
    """Kept for ever: for statements that are constants of a module, or of which there are few."""
    return statement.compile(dialect=_DIALECT)


async def fetched(pool: Pool, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Any]:
    """The rows, their columns as attributes. Raises Unavailable while Postgres is away."""
    compiled = _compiled(statement)
    async with connection(pool) as conn, conn.cursor(row_factory=namedtuple_row) as cursor:
        await cursor.execute(compiled.string, compiled.construct_params(dict(parameters)))
        return await cursor.fetchall()
