"""`paystream topics`: Kafka's topics as `kafka-topics.yaml` wants them.

Rule: one line, or one element of a JSON list, for each difference; why something was left alone is said once, on stderr. Status 3: drift is left.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Final

import typer

from infra import kafka_admin
from infra.kafka_admin import Drift, Kind, Report
from infra.settings import Settings, load

DRIFT: Final = 3
_LEFT_ALONE: Final = {
    Kind.PARTITIONS: "Partition counts never change in place: keys would move to other partitions, and order with them. Start an installation with "
    "another PAYSTREAM_PREFIX and move to it, or write the count that is there into kafka-topics.yaml.",
    Kind.REPLICATION: "Replicas are moved by the cluster's operator: kafka-reassign-partitions.sh.",
    Kind.FOREIGN_ACL: "Nobody's access is taken away here: write it into kafka-topics.yaml, or revoke it with kafka-acls.sh.",
}

app = typer.Typer(no_args_is_help=True, help="Make Kafka's topics match kafka-topics.yaml, or show where they differ.")
Profile = Annotated[
    str | None, typer.Option(help="A profile of kafka-topics.yaml. By default `production` in the production profile, else `development`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def apply(profile: Profile = None, as_json: AsJson = False) -> None:
    """Create what is missing and set configurations. Partition counts are never changed, nothing is deleted.

    Safe to repeat, and to run twice at the same time. Status 3 if drift is left that a person has to mend.
    """
    settings = load()
    _tell(kafka_admin.apply(settings, profile or _profile_of(settings)), as_json)


@app.command()
def diff(profile: Profile = None, as_json: AsJson = False) -> None:
    """Show where the brokers differ from the file. Status 3 if they do."""
    settings = load()
    _tell(kafka_admin.diff(settings, profile or _profile_of(settings)), as_json)


def _profile_of(settings: Settings) -> str:
    return "production" if settings.profile == "production" else "development"


def _tell(report: Report, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        for drift in report.mended:
            typer.echo(f"applied  {_line(drift)}")
        for drift in report.drift:
            typer.echo(f"drift    {_line(drift)}")
        for kind in dict.fromkeys(drift.kind for drift in report.drift if drift.kind in _LEFT_ALONE):
            typer.echo(_LEFT_ALONE[kind], err=True)
        if not report.authorizer:
            typer.echo("ACLs were not looked at: the brokers have no authorizer.", err=True)
        if not report.drift:
            typer.echo("The brokers match kafka-topics.yaml.", err=True)
    if report.drift:
        raise typer.Exit(DRIFT)


def _line(drift: Drift) -> str:
    return f"{drift.topic}  {drift.kind}: {drift.detail}"
