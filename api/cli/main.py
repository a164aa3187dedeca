"""The `paystream` command: one table of sub-commands, and what a user sees when something goes wrong.

Rule: data goes to stdout, words to stderr; nobody sees a traceback. Only the module of the command that was asked for is imported, so that
`paystream --help` answers at once and a worker does not load the API.
It ends with one of EXIT_STATUSES.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Annotated, Any, Final

import typer

from schemas.errors import BadConfiguration, PaystreamError, Unavailable

EXIT_STATUSES: Final = {
    0: "done",
    1: "it failed",
    2: "wrong usage, or a wrong setting",
    3: "drift or work is left: the output says what",
    5: "refused: this installation does not do that",
    69: "a service is away",
    70: "a bug of ours, or a worker that could not go on: start it again",
    130: "interrupted",
}
_STATUS: Final = ((BadConfiguration, 2), (Unavailable, 69), (PaystreamError, 1))
_BUG: Final = 70
TRACEBACK: Final = "PAYSTREAM_TRACEBACK"


@dataclass(frozen=True, slots=True)
class Command:
    """`target` is `module:name` of a function with typer's annotations, or of a Typer that holds sub-commands."""

    name: str
    target: str
    summary: str


COMMANDS: Final[tuple[Command, ...]] = (
    Command("demo", "api.cli.demo.command:demo", "Send payments through the whole pipeline and check its promises."),
    Command("up", "api.cli.stack:up", "Start the local stack: Kafka, registry, Postgres, Redis, sandbox and our own processes."),
    Command("down", "api.cli.stack:down", "Stop the local stack. Its data stays."),
    Command("status", "api.cli.stack:status", "Show the local stack's services and how to reach them."),
    Command("logs", "api.cli.stack:logs", "Print the log of one service of the local stack."),
    Command("token", "api.cli.token:token", "Print a bearer token for trying the API out."),
    Command("bench", "api.cli.bench.command:bench", "Measure the pipeline: latency, payments per second, CPU and memory."),
    Command("migrate", "api.cli.migrate:migrate", "Bring the database to the newest revision."),
    Command("topics", "api.cli.topics:app", "Make Kafka's topics match kafka-topics.yaml, or show where they differ."),
    Command("schemas", "api.cli.schemas:app", "Register the Avro schemas, or check that they are compatible."),
    Command("docs", "api.cli.docs:docs", "Refresh the generated parts of the documentation."),
    Command("resume", "api.cli.groups:resume", "Let a consumer group run again that halted."),
    Command("audit", "api.cli.audit:audit", "Check that Kafka holds every event that Postgres says, once and in order."),
    Command("rebuild", "api.cli.rebuild:rebuild", "Fold the analytics views anew, from the first event on."),
    Command("api", "api.cli.serve:api", "Run the HTTP intake."),
    Command("relay", "api.cli.serve:relay", "Run the outbox relay."),
    Command("worker", "api.cli.serve:worker", "Run the worker of one consumer group."),
    Command("sandbox", "api.cli.sandbox:sandbox", "Run the gateway sandbox."),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process with one of EXIT_STATUSES."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command_line(asked_for=next((argument for argument in given if not argument.startswith("-")), None))(given, prog_name="paystream")
    except PaystreamError as error:
        _fail(error.detail, next(status for kind, status in _STATUS if isinstance(error, kind)))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if TRACEBACK in os.environ:
            traceback.print_exc()
        _fail(f"a bug of ours: {type(error).__name__}: {error} (with {TRACEBACK}=1 it shows where)", _BUG)


def command_line(asked_for: str | None) -> typer.Typer:
    """The commands, of which only `asked_for` is imported."""
    app = typer.Typer(
        name="paystream",
        help="Payments through Kafka: money moves exactly once.",
        epilog="Start with: paystream demo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_global_options)
    for command in COMMANDS:
        target = _load(command) if command.name == asked_for else _not_loaded
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=command.name, short_help=command.summary)
        else:
            app.command(command.name, short_help=command.summary)(target)
    return app


def _load(command: Command) -> Any:
    module, _, name = command.target.partition(":")
    return getattr(import_module(module), name)


def _not_loaded() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paystream {metadata.version('paystream')}")
        raise typer.Exit


def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """What comes before a command."""


def _fail(message: str, status: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
