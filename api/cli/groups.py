"""`paystream resume`: let a consumer group run again that halted after too many bugs."""

from __future__ import annotations

import asyncio
import getpass
from typing import Annotated

import typer

from infra.clock import SystemClock
from infra.database.delivery import Group
from infra.database.parking import PostgresParking
from infra.database.pool import opened_pool
from infra.settings import Settings, load


def resume(
    group: Annotated[Group, typer.Argument(help="The consumer group.")],
    actor: Annotated[str | None, typer.Option("--as", help="Who resumes it, for the audit log; the user of this shell if left out.")] = None,
) -> None:
    """Let GROUP go on. What was parked stays parked.

    Example: paystream resume payments
    """
    if asyncio.run(_resume(load(), group, actor or getpass.getuser())):
        typer.echo(f"{group} goes on", err=True)
    else:
        typer.echo(f"{group} is not halted: nothing to do", err=True)


async def _resume(settings: Settings, group: Group, actor: str) -> bool:
    async with opened_pool(settings.database, "paystream-resume") as pool:
        return await PostgresParking(pool, SystemClock()).resume(group, actor)
