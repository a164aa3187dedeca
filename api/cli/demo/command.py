"""`paystream demo`: run it, watch it, and see what was proved.

Rule: it leaves a stack that was running as it was. It stops what it started itself, unless somebody sits at a terminal and will want to look around.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
import time
from collections import Counter, defaultdict
from datetime import timedelta
from statistics import median
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from api.auth import Tokens
from api.cli.borrowed_stack import borrowed_stack
from api.cli.demo.evidence import gathered, starting_line
from api.cli.demo.promises import COMMANDS, Evidence, Verdict, unkept, verdicts
from api.cli.demo.traffic import Journey, Storefront, planned
from api.cli.stack import Folder
from infra.local.client import Bank, Caller, opened_session
from infra.schema_registry import load_codec
from infra.settings import Settings
from producers.producer import KafkaProducer, Record

PARKED_ORDERS: Final = 5
_USER: Final = "demo"
_SUCCESS_RATE: Final = 0.95
_AT_ONCE: Final = 40

Report = dict[str, Any]


def demo(
    payments: Annotated[int, typer.Option("--payments", "-n", min=1, max=20_000, help="How many payments to send.")] = 200,
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed sends the same mix.")] = None,
) -> None:
    """Send payments of every kind through the whole pipeline, and check its promises on what came out.

    Example: paystream demo --payments 50 --json
    """
    console = Console(stderr=True)
    with borrowed_stack(folder, console, keep=sys.stdout.isatty() and not as_json) as stack:
        report, found = asyncio.run(_run(stack.settings(), stack.addresses()["sandbox"], payments, seed, console))
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            _show(report, found, Console())
    if unkept(found):
        raise typer.Exit(1)


async def _run(settings: Settings, sandbox_url: str, count: int, seed: int | None, console: Console) -> tuple[Report, list[Verdict]]:
    codec = load_codec(settings)
    token = Tokens(settings.auth).issue(_USER, [], timedelta(hours=1))
    chance = random.Random(secrets.randbits(64) if seed is None else seed)  # noqa: S311 - it mixes traffic, it guards nothing
    journeys = planned(count, PARKED_ORDERS, f"demo-{secrets.token_hex(3)}", chance)
    starts = await asyncio.to_thread(starting_line, settings)
    producer = KafkaProducer(settings)
    await producer.start()
    async with opened_session() as session:
        bank = Bank(session, sandbox_url)
        caller = Caller(session, f"http://{settings.api.host}:{settings.api.port}", token)

        async def publish_raw(order_id: str, value: bytes) -> None:
            await producer.send(Record(topic=COMMANDS, key=order_id.encode(), value=value, headers=()))

        was = await bank.change(success_rate=_SUCCESS_RATE)
        try:
            await bank.order_fault("webhook_twice", probability=0.15)
            await bank.order_fault("webhook_out_of_order", probability=0.15)
            started = time.perf_counter()
            ended = await _watch(Storefront(caller, bank, chance, publish_raw), journeys, console)
            took = time.perf_counter() - started
            with console.status("waiting until all is at rest") as status:
                evidence = await gathered(settings, codec, caller, bank, _USER, ended, starts, lambda left: status.update(f"waiting: {left}"))
        finally:
            await bank.drop_faults()
            await bank.change(**was)
            await producer.close()
    found = verdicts(evidence)
    return _report(ended, evidence, found, took), found


async def _watch(shop: Storefront, journeys: list[Journey], console: Console) -> list[Journey]:
    """Play all journeys, and show how far they are."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    ended = []
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task("orders", total=len(journeys))
        async for journey in shop.play(journeys, _AT_ONCE):
            ended.append(journey)
            progress.update(task, advance=1, description=f"orders (last: {journey.kind})")
    return ended


def _report(journeys: list[Journey], evidence: Evidence, found: list[Verdict], took: float) -> Report:
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    for journey in journeys:
        payment = evidence.payments.get(journey.payment_id or "")
        outcomes[journey.kind][payment["status"] if payment else "not accepted"] += 1
        if journey.seconds is not None:
            waits[journey.kind].append(journey.seconds)
    every_wait = sorted(seconds for kind in waits.values() for seconds in kind)
    return {
        "ok": not unkept(found),
        "orders": len(journeys),
        "seconds": round(took, 2),
        "orders_per_second": round(len(journeys) / took, 1),
        "outcome_ms": {
            "p50": round(1000 * median(every_wait)) if every_wait else None,
            "p99": round(1000 * every_wait[int(0.99 * (len(every_wait) - 1))]) if every_wait else None,
        },
        "events": sum(payment["version"] for payment in evidence.payments.values() if payment),
        "charges": len(evidence.ledger),
        "kinds": [
            {
                "kind": kind,
                "orders": sum(statuses.values()),
                "statuses": dict(statuses.most_common()),
                "outcome_ms_p50": round(1000 * median(waits[kind])) if waits[kind] else None,
            }
            for kind, statuses in sorted(outcomes.items())
        ],
        "promises": [
            {
                "promise": verdict.promise,
                "title": verdict.title,
                "checked": verdict.checked,
                "items": verdict.items,
                "kept": verdict.kept,
                "broken": verdict.broken[:20],
            }
            for verdict in found
        ],
    }


_COLOURS: Final = {"COMPLETED": "green", "AUTHORIZED": "green", "FAILED": "red", "CANCELLED": "yellow"}


def _show(report: Report, found: list[Verdict], console: Console) -> None:
    outcomes = Table(title="What became of the orders", title_justify="left")
    for column, justify in (("kind of order", "left"), ("orders", "right"), ("payments that are", "left"), ("outcome after, p50", "right")):
        outcomes.add_column(column, justify=justify)  # type: ignore[arg-type]  # rich names its choices by a Literal
    for row in report["kinds"]:
        said = ", ".join(f"[{_COLOURS.get(status, 'cyan')}]{status}[/] {count}" for status, count in row["statuses"].items())
        waited = f"{row['outcome_ms_p50']} ms" if row["outcome_ms_p50"] is not None else ""
        outcomes.add_row(row["kind"], str(row["orders"]), said, waited)
    console.print(outcomes)
    times = report["outcome_ms"]
    console.print(
        f"{report['orders']} orders in {report['seconds']} s ({report['orders_per_second']} a second); outcome after "
        f"{times['p50']} ms (p50), {times['p99']} ms (p99); {report['events']} events, {report['charges']} charges at the gateway\n"
    )
    promises = Table(title="What was promised, and what was found", title_justify="left")
    for column, justify in (("promise", "left"), ("", "left"), ("checked on", "right"), ("", "left"), ("found", "left")):
        promises.add_column(column, justify=justify)  # type: ignore[arg-type]
    for verdict in found:
        kept = "[green]kept[/]" if verdict.kept else f"[red]{len(verdict.broken)} broken[/]" if verdict.broken else "[red]nothing to check[/]"
        promises.add_row(verdict.promise, verdict.title, str(verdict.checked), verdict.items, kept)
    console.print(promises)
    for verdict in unkept(found):
        for broken in verdict.broken[:20]:
            console.print(f"[red]{verdict.promise}[/] {broken}")
