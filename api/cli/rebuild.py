"""`paystream rebuild`: fold the analytics views anew, from the first event on."""

from __future__ import annotations

import asyncio
import getpass
from typing import Annotated

import typer

from infra import kafka_groups
from infra.clock import SystemClock
from infra.database.analytics import AnalyticsStore
from infra.database.delivery import Group
from infra.database.pool import opened_pool
from infra.settings import Settings, load
from processors.app import group_id


def rebuild(
    actor: Annotated[str | None, typer.Option("--as", help="Who does it, for the audit log; the user of this shell if left out.")] = None,
) -> None:
    """Throw the analytics views away, so that its workers fold them again from all of payment-events. Stop the workers first, start them afterwards.

    Nobody is charged, refunded or told anything by it. Until the workers have caught up, the figures are behind.

    Example: paystream rebuild
    """
    settings = load()
    group = group_id(settings, Group.ANALYTICS)
    kafka_groups.forget(settings.kafka, group)
    asyncio.run(_empty(settings, actor or getpass.getuser()))
    kafka_groups.forget(
        settings.kafka, group
    )  # a worker that was started meanwhile has read over what is missing now: it is told, and this is repeated
    typer.echo("the analytics views are empty: start the workers (paystream worker analytics)", err=True)


async def _empty(settings: Settings, actor: str) -> None:
    async with opened_pool(settings.database, "paystream-rebuild") as pool:
        await AnalyticsStore(pool, SystemClock()).rebuild(actor)
