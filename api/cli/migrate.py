"""`paystream migrate`: bring the database to the newest revision."""

from __future__ import annotations

import typer

from infra.database.migrations.run import drift, head
from infra.database.migrations.run import migrate as bring_up_to_date
from infra.settings import load


def migrate() -> None:
    """Apply the migrations that are missing. It can be run again, and by several at once.

    Example: PAYSTREAM_DATABASE__URL=postgresql://… paystream migrate
    """
    url = load().database.url.get_secret_value()
    reached = bring_up_to_date(url)
    typer.echo(reached)
    typer.echo(f"the database is at revision {reached}, the newest is {head()}", err=True)
    if differences := drift(url):
        typer.echo("it differs from what this program expects:\n" + "\n".join(differences), err=True)
        raise typer.Exit(3)
