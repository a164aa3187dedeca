"""`paystream schemas`: the Avro schemas in the registry, and what may become of them.

Rule: schemas are registered by a deployment, never by a message. Status 3 means that something is incompatible, or not registered yet.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Final

import typer

from infra import schema_registry
from infra.settings import load
from schemas.compatibility import freeze as freeze_record
from schemas.errors import BadConfiguration
from schemas.messages import RECORDS

NOT_READY: Final = 3

app = typer.Typer(no_args_is_help=True, help="Register the Avro schemas, or check that they are compatible.")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def register(as_json: AsJson = False) -> None:
    """Bring all schemas into the registry, and hold their subjects to FULL_TRANSITIVE. Safe to repeat."""
    ids = schema_registry.register(load())
    if as_json:
        typer.echo(json.dumps(ids, indent=2))
    else:
        for record, schema_id in ids.items():
            typer.echo(f"{schema_id:>6}  {record}")


@app.command()
def check(
    as_json: AsJson = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only against the versions published in this repository: needs no registry.")] = False,
) -> None:
    """Check that every schema reads, and is read by, all earlier versions of itself, and that the registry has it. Status 3 if not."""
    found = schema_registry.check(None if offline else load())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            typer.echo(f"{finding.record}  {finding.kind}: {finding.detail}")
        if not found:
            typer.echo(f"{len(RECORDS)} schemas, all compatible{'' if offline else ' and registered'}.", err=True)
    if found:
        raise typer.Exit(NOT_READY)


@app.command()
def freeze() -> None:
    """Publish each changed schema as its next version, in schemas/avro/published: from then on others may build upon it. In a checkout only."""
    if schema_registry.check(None):
        raise BadConfiguration("a schema is not compatible with its published versions: `paystream schemas check --offline` says why")
    written = [file for record in RECORDS if (file := freeze_record(record)) is not None]
    for file in written:
        typer.echo(f"{file.parent.name} version {file.stem}")
    if not written:
        typer.echo("Nothing changed since the last published versions.", err=True)
