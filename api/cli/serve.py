"""The processes that a deployment runs: `paystream api`, `paystream relay`, `paystream worker GROUP`.

Rule: a process serves in the foreground until SIGTERM, logs to stdout, and is told everything by its settings.
"""

from __future__ import annotations

from typing import Annotated

import typer

from infra.database.delivery import Group
from infra.settings import Settings, load


def api() -> None:
    """Run the HTTP intake.

    Example: PAYSTREAM_API__PORT=8000 paystream api
    """
    from api.app import serve

    serve(_named("paystream-api"))


def relay() -> None:
    """Run the outbox relay. One works at a time, a second one waits.

    Example: paystream relay
    """
    from producers.outbox_relay import serve

    serve(_named("paystream-relay"))


def worker(group: Annotated[Group, typer.Argument(help="The consumer group.")]) -> None:
    """Run a worker of GROUP. Several share its partitions.

    Example: paystream worker payments
    """
    from processors.app import serve
    from processors.groups import GROUPS

    serve(_named(f"paystream-{group}"), group, GROUPS[group])


def _named(service: str) -> Settings:
    """The settings, with the name of this process unless one was set."""
    settings = load()
    return settings if "service" in settings.model_fields_set else settings.model_copy(update={"service": service})
