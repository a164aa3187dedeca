"""`paystream bench`: what the pipeline does on this machine, and what a payment costs.

Rule: figures, no verdict. Rounds alternate nothing and share one stack; medians are told, with the spread, because machines are noisy. CPU is the
processes' own, read before and after a round; the sandbox and the load generator are told apart from what users run.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Annotated, Any, Final

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from api.auth import Tokens
from api.cli.borrowed_stack import borrowed_stack
from api.cli.stack import Folder
from infra.local.client import Bank, Caller, opened_session
from infra.local.stack import Stack
from infra.settings import Settings
from schemas.errors import Unavailable

_USER: Final = "bench"
_WAIT_S: Final = 30
_DRAINS_WITHIN_S: Final = 60.0
_NOT_OURS: Final = frozenset({"sandbox", "load"})
_AT_REST: Final = frozenset({"COMPLETED", "FAILED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round. Latencies in seconds, from the request to its outcome; `cpu` in seconds and `memory` in bytes by process."""

    seconds: float
    latencies: list[float]
    cpu: dict[str, float]
    memory: dict[str, int]

    def quantile(self, share: float) -> float:
        return self.latencies[int(share * (len(self.latencies) - 1))]


def bench(
    payments: Annotated[int, typer.Option("--payments", "-n", min=10, max=100_000, help="Payments in a round.")] = 1000,
    at_once: Annotated[int, typer.Option("--at-once", "-c", min=1, max=1000, help="Callers that wait for an outcome at the same time.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=20, help="Rounds after the one that warms up.")] = 3,
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Measure the pipeline on the local stack: latency, payments a second, CPU and memory.

    Example: paystream bench -n 500 -c 32 --json
    """
    console = Console(stderr=True)
    with borrowed_stack(folder, console, keep=sys.stdout.isatty() and not as_json) as stack:
        settings, sandbox_url = stack.settings(), stack.addresses()["sandbox"]
        with Progress(console=console, transient=not console.is_terminal) as progress:
            task = progress.add_task("warming up", total=rounds + 1)
            measured = []
            for number in range(rounds + 1):
                result = asyncio.run(_round(settings, sandbox_url, _pids(stack), payments if number else min(payments, 200), at_once))
                if number:
                    measured.append(result)
                progress.update(task, advance=1, description=f"round {number + 1} of {rounds}" if number < rounds else "done")
        report = _report(measured, payments, at_once)
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            _show(report, Console())


def _pids(stack: Stack) -> dict[str, int]:
    return {standing.name: standing.pid for standing in stack.status() if standing.pid is not None}


async def _round(settings: Settings, sandbox_url: str, pids: dict[str, int], count: int, at_once: int) -> Round:
    token = Tokens(settings.auth).issue(_USER, [], timedelta(hours=1))
    run, numbers, latencies = secrets.token_hex(4), iter(range(count)), []
    processes = {name: psutil.Process(pid) for name, pid in (pids | {"load": os.getpid()}).items()}
    async with opened_session(connections=at_once + 4) as session:
        caller, bank = Caller(session, f"http://{settings.api.host}:{settings.api.port}", token), Bank(session, sandbox_url)

        async def one_after_another() -> None:
            for number in numbers:
                body = {"order_id": f"bench-{run}-{number}", "amount_minor": 1999, "currency": "EUR", "payment_method": "pm_card_visa"}
                started = time.perf_counter()
                answer = await caller.post("/payments/process", body, key=f"{run}-{number}", wait_s=_WAIT_S)
                if answer.body.get("status") not in _AT_REST:
                    raise Unavailable("the pipeline", f"a payment had no outcome after {_WAIT_S} s: HTTP {answer.status}")
                latencies.append(time.perf_counter() - started)

        before, started = _cpu(processes), time.perf_counter()
        await asyncio.gather(*(one_after_another() for _ in range(at_once)))
        seconds = time.perf_counter() - started
        # What a payment costs includes its webhook and the last of its events.
        async with asyncio.timeout(_DRAINS_WITHIN_S):
            while await bank.pending_webhooks():  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)
    after = _cpu(processes)
    return Round(
        seconds=seconds,
        latencies=sorted(latencies),
        cpu={name: after[name] - before[name] for name in processes},
        memory={name: _with_children(process, lambda p: p.memory_info().rss) for name, process in processes.items()},
    )


def _cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: _with_children(process, lambda p: p.cpu_times().user + p.cpu_times().system) for name, process in processes.items()}


def _with_children(process: psutil.Process, read: Any) -> Any:
    """A figure of a process and its children (Postgres has one for each connection)."""
    total = 0
    for one in [process] if process.pid == os.getpid() else [process, *process.children(recursive=True)]:
        try:
            total += read(one)
        except psutil.NoSuchProcess:
            continue
    return total


def _report(measured: list[Round], payments: int, at_once: int) -> dict[str, Any]:
    def of(figures: list[float]) -> dict[str, float]:
        return {"median": round(median(figures), 2), "lowest": round(min(figures), 2), "highest": round(max(figures), 2)}

    services = {
        name: {
            "cpu_ms_per_payment": round(1000 * median(result.cpu[name] for result in measured) / payments, 2),
            "memory_mib": round(median(result.memory[name] for result in measured) / 2**20),
        }
        for name in measured[0].cpu
    }
    return {
        "payments": payments,
        "at_once": at_once,
        "rounds": len(measured),
        "payments_per_second": of([payments / result.seconds for result in measured]),
        "outcome_ms": {f"p{share}": of([1000 * result.quantile(share / 100) for result in measured]) for share in (50, 95, 99)},
        "cpu_ms_per_payment": of([1000 * sum(cpu for name, cpu in result.cpu.items() if name not in _NOT_OURS) / payments for result in measured]),
        "services": services,
    }


def _show(report: dict[str, Any], console: Console) -> None:
    figures = Table(title=f"{report['payments']} payments, {report['at_once']} at once, {report['rounds']} rounds", title_justify="left")
    figures.add_column("figure")
    for column in ("median", "lowest", "highest"):
        figures.add_column(column, justify="right")
    rows = [("payments a second", report["payments_per_second"]), ("CPU of a payment, ms", report["cpu_ms_per_payment"])]
    rows += [(f"outcome after, ms ({name})", values) for name, values in report["outcome_ms"].items()]
    for title, values in rows:
        figures.add_row(title, *(f"{values[column]:.1f}" for column in ("median", "lowest", "highest")))
    console.print(figures)
    services = Table(title="By process (CPU of the sandbox and of the load are not in the figure above)", title_justify="left")
    for column in ("process", "CPU, ms a payment", "memory, MiB"):
        services.add_column(column, justify="left" if column == "process" else "right")
    for name, values in sorted(report["services"].items(), key=lambda entry: -entry[1]["cpu_ms_per_payment"]):
        services.add_row(name, f"{values['cpu_ms_per_payment']:.2f}", str(values["memory_mib"]))
    console.print(services)
