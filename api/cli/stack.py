"""`paystream up`, `down`, `status`, `logs`: the local stack in the hands of a person, or of a script by `--json`.

Rule: words and tables about what is going on go to stderr; what was asked for goes to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from infra.local.stack import Stack, Standing

_WATCH_S: Final = 2.0
_FOLLOW_S: Final = 0.2

Folder = Annotated[
    Path | None,
    typer.Option("--dir", envvar="PAYSTREAM_LOCAL_DIR", help="The stack's folder; .paystream if left out. Another folder is another stack."),
]


def up(
    folder: Folder = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running and return.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Wipe all its data first: Kafka, Postgres, Redis and the sandbox together.")] = False,
) -> None:
    """Start the local stack and wait until all of it answers.

    Without --detach it stays, shows how the services do, and stops them at Ctrl-C.

    Example: paystream up --detach
    """
    words = _console(stderr=True)
    stack = Stack(folder)
    began = time.monotonic()
    with words.status("starting") if words.is_terminal else nullcontext():
        stack.start(fresh=fresh, leash=not detach, progress=lambda line: words.print(line, markup=False, soft_wrap=True))
    words.print(f"the stack is up after {time.monotonic() - began:.1f} s: API at {stack.addresses()['api']}/docs", soft_wrap=True)
    if not stack.on_leash:
        words.print(_table(stack.status()))
        words.print("paystream down stops it, paystream logs NAME shows a log")
        return
    try:
        _watch(stack, words)
    finally:
        words.print("stopping")
        stack.stop()


def down(folder: Folder = None) -> None:
    """Stop the local stack, and what an interrupted one left. Its data stays.

    Example: paystream down
    """
    stopped = Stack(folder).stop()
    typer.echo("stopped" if stopped else "nothing was running", err=True)


def status(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with the addresses and passwords to use.")] = False,
) -> None:
    """Show each service, asked by its own protocol, and how to reach it.

    Example: paystream status --json
    """
    stack = Stack(folder)
    standings = stack.status()
    if as_json:
        services = [
            {
                "name": standing.name,
                "pid": standing.pid,
                "url": standing.url,
                "healthy": standing.healthy,
                "log": str(standing.log),
                "restarts": standing.restarts,
            }
            for standing in standings
        ]
        print(json.dumps({"services": services, "settings": stack.addresses() if standings else {}}, indent=2))
    elif standings:
        _console().print(_table(standings))
    else:
        typer.echo(f"there is no stack in {stack.home.path} yet: paystream up", err=True)


def logs(
    name: Annotated[str, typer.Argument(help="A service's name, as `paystream status` shows it, or supervisor.")],
    folder: Folder = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on, until Ctrl-C.")] = False,
) -> None:
    """Print a service's log.

    Example: paystream logs worker-payments -f
    """
    for piece in _read(Stack(folder).log(name), follow):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _watch(stack: Stack, words: Console) -> None:
    """Until Ctrl-C, or until the stack is stopped by somebody else."""
    if not words.is_terminal:
        while stack.running:
            time.sleep(_WATCH_S)
        return
    with Live(_table(stack.status()), console=words, auto_refresh=False) as live:
        while stack.running:
            time.sleep(_WATCH_S)
            live.update(_table(stack.status()), refresh=True)


def _console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; where there is none, wide enough for an address to stay in one piece."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def _table(standings: list[Standing]) -> Table:
    table = Table("service", "", "pid", "address", "restarts", box=None, pad_edge=False)
    for standing in standings:
        answers = "[green]healthy[/]" if standing.healthy else "[red]down[/]" if standing.pid is None else "[yellow]not ready[/]"
        table.add_row(standing.name, answers, str(standing.pid or ""), standing.url, str(standing.restarts or ""))
    return table


def _read(path: Path, follow: bool) -> Iterator[str]:
    if not path.exists() and not follow:
        typer.echo(f"{path} is not there yet", err=True)
        return
    while not path.exists():
        time.sleep(_FOLLOW_S)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            if piece := file.read(64 * 1024):
                yield piece
            elif follow:
                time.sleep(_FOLLOW_S)
            else:
                return
