"""`paystream bench` as a command: a stack, its figures, and how they are shown.

Rule: figures, no verdict: the exit status tells whether they could be measured. They are written to `bench.json` in the stack's folder as well.
SIGTERM does what Ctrl-C does: the sandbox and the payments worker are put back.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from api.auth import Tokens
from api.cli.bench.figures import Report, goals, report
from api.cli.bench.outcomes import watched
from api.cli.bench.phases import Bench, Measured, Plan
from api.cli.borrowed_stack import borrowed_stack
from api.cli.stack import Folder
from infra.local.client import Bank, Caller, opened_session
from infra.local.stack import Stack

_USER = "bench"
_CONNECTIONS = 500
_DEFAULT = Plan()


def bench(
    seconds: Annotated[
        float, typer.Option("--seconds", min=4, max=3600, help="Of the sustained load; the others take a part of it.")
    ] = _DEFAULT.seconds,
    rate: Annotated[float, typer.Option("--rate", min=1, max=1000, help="Payments a second of the sustained load.")] = _DEFAULT.sustained_rate,
    latency: Annotated[float, typer.Option("--latency", min=0, max=2, help="Seconds that each call of the gateway takes.")] = _DEFAULT.latency_s,
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Measure the pipeline on the local stack: latency, payments a second, CPU and memory, beside a plain agent. It takes about three minutes.

    Example: paystream bench --seconds 20 --rate 40
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, plan = Console(stderr=True), Plan(seconds=seconds, sustained_rate=rate, latency_s=latency)
    with borrowed_stack(folder, console, keep=sys.stdout.isatty() and not as_json) as stack:
        figures = report(asyncio.run(_measured(stack, plan, console)), plan)
        stack.home.write("bench.json", json.dumps(figures, indent=2) + "\n")
        if as_json:
            print(json.dumps(figures, indent=2))
        else:
            _show(figures, stack.home.path / "bench.json", Console())


async def _measured(stack: Stack, plan: Plan, console: Console) -> Measured:
    settings = stack.settings()
    token = Tokens(settings.auth).issue(_USER, [], timedelta(hours=2))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with watched(settings) as outcomes, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")

        def tell(phase: str) -> None:
            progress.reset(task, description=phase)
            if not console.is_terminal:
                console.print(phase, style="dim", highlight=False, markup=False)

        async with opened_session(connections=_CONNECTIONS) as session:
            caller = Caller(session, stack.addresses()["api"], token)
            bank = Bank(session, stack.addresses()["sandbox"])
            return await Bench(stack, session, caller, bank, outcomes, secrets.token_hex(4), tell).measured(plan)


def _show(figures: Report, written: Path, console: Console) -> None:
    plan = figures["plan"]
    table = Table(title=f"With {plan['gateway_latency_s']:g} s of gateway latency a call", title_justify="left")
    for column in ("figure", "value", "under"):
        table.add_column(column, justify="right" if column == "value" else "left")
    rates = {"intake": plan["intake_rps"], "overhead": plan["overhead_rps"], "sustained": plan["sustained_rps"]}
    for name, unit, under in (
        ("intake_p50_ms", "ms", "intake"),
        ("intake_p99_ms", "ms", "intake"),
        ("intake_max_rps", "a second", "as many requests as it takes"),
        ("overhead_p50_ms", "ms", "overhead"),
        ("overhead_p99_ms", "ms", "overhead"),
        ("payments_per_s", "a second", "sustained"),
        ("backlog_once_filled", "payments", "sustained"),
        ("backlog_at_end", "payments", "sustained"),
        ("serial_agent_payments_per_s", "a second", "a plain agent, one message after the other"),
    ):
        table.add_row(name, f"{figures[name]:g} {unit}", f"{rates[under]:g} requests a second" if under in rates else under)
    console.print(table)
    console.print(_by_process(figures))
    reached = Table(title="Goals, on two cores", title_justify="left")
    for column in ("figure", "goal", "now", ""):
        reached.add_column(column)
    for goal in goals(figures):
        reached.add_row(goal.figure, goal.wanted, goal.is_, "[green]reached[/]" if goal.reached else "[red]missed[/]")
    console.print(reached)
    console.print(f"written to {written}", style="dim", highlight=False)


def _by_process(figures: Report) -> Table:
    table = Table(title=f"By process, at {figures['plan']['sustained_rps']:g} payments a second", title_justify="left")
    for column in ("process", "CPU, ms a payment", "memory at most, MB", "more at the end, MB"):
        table.add_column(column, justify="left" if column == "process" else "right")
    cpu, peak, growth = figures["cpu_ms_per_payment"], figures["peak_rss_mb"], figures["rss_growth_mb"]
    for name in sorted(peak, key=lambda name: -float(cpu[name])):
        table.add_row(name, f"{cpu[name]:.2f}", f"{peak[name]:.0f}", f"{growth[name]:+.1f}")
    table.add_row("all of Paystream", f"{cpu['total']:.2f}", f"{sum(peak.values()):.0f}", f"{sum(growth.values()):+.1f}", style="bold")
    for name, apart in figures["apart"].items():
        table.add_row(f"apart: {name}", f"{apart['cpu_ms_per_payment']:.2f}", f"{apart['peak_rss_mb']:.0f}", "", style="dim")
    return table
