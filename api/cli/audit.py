"""`paystream audit`: does Kafka hold every event that Postgres says, once and in order?

Rule: it only reads, and may run beside everything else. Status 1 means that a promise is broken.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer

from infra.database.outbox import OutboxStore
from infra.database.pool import opened_pool
from infra.schema_registry import load_codec
from infra.settings import Settings, load
from producers.audit import ABOUT, Audit
from producers.audit import audit as compare


def audit(as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """Read payment-events and order-events from their beginning, and compare them with Postgres, event by event. Status 1 if something is wrong.

    Example: paystream audit --json
    """
    result = asyncio.run(_audit(load()))
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        for finding in result.findings:
            place = "" if finding.offset is None else f" {finding.partition}/{finding.offset}"
            typer.echo(f"{finding.fault}  {finding.topic}{place}  {finding.subject}")
        for fault, count in result.faults.items():
            typer.echo(f"{count} × {fault}: {ABOUT[fault]}", err=True)
        typer.echo(f"{result.records} events of {result.entities} payments and orders, {result.unmarked} not marked yet.", err=True)
    if not result.ok:
        raise typer.Exit(1)


async def _audit(settings: Settings) -> Audit:
    async with opened_pool(settings.database, "paystream-audit") as pool:
        return await compare(settings, await asyncio.to_thread(load_codec, settings), OutboxStore(pool, settings.database))
