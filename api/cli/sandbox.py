"""`paystream sandbox`: the server that plays the payment gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from infra import telemetry
from infra.sandbox.behaviour import USUAL, Conditions
from infra.sandbox.server import serve
from infra.settings import load
from schemas.errors import BadConfiguration

_VARIABLE: Final = "PAYSTREAM_SANDBOX__"


def sandbox(
    host: Annotated[str, typer.Option(envvar=_VARIABLE + "HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar=_VARIABLE + "PORT", min=0, max=65535, help="0 takes a free one.")] = 12111,
    data: Annotated[Path, typer.Option(envvar=_VARIABLE + "DATA", help="The directory for its file; it survives a restart.")] = Path(
        ".paystream/sandbox"
    ),
    latency: Annotated[
        str, typer.Option(envvar=_VARIABLE + "LATENCY", help="Seconds that a call takes: 0.5, or 0.2..1.5 drawn evenly.")
    ] = USUAL.latency,
    success_rate: Annotated[
        float, typer.Option(envvar=_VARIABLE + "SUCCESS_RATE", help="The share, 0 to 1, that passes of the cards that would.")
    ] = USUAL.success_rate,
    failure_reasons: Annotated[
        str, typer.Option(envvar=_VARIABLE + "FAILURE_REASONS", help="Why the others don't, with weights.")
    ] = USUAL.failure_reasons,
    seed: Annotated[int | None, typer.Option(envvar=_VARIABLE + "SEED", help="Makes its luck repeat itself.")] = None,
    webhook: Annotated[
        str | None, typer.Option(envvar=_VARIABLE + "WEBHOOK", help="An endpoint for all events, registered at the start; needs its secret.")
    ] = None,
    webhook_secret: Annotated[
        str | None, typer.Option(envvar=_VARIABLE + "WEBHOOK_SECRET", help="What that endpoint's events are signed with.")
    ] = None,
) -> None:
    """Run the gateway sandbox until it is told to stop (SIGTERM, Ctrl-C).

    It plays Stripe: point PAYSTREAM_STRIPE__BASE_URL at it. What it really charged is at /ledger.

    Example: paystream sandbox --port 12111 --latency 0.2..1.5
    """
    telemetry.configure(load({"service": "sandbox"}))
    conditions = Conditions(latency=latency, success_rate=success_rate, failure_reasons=failure_reasons)
    if (webhook is None) != (webhook_secret is None):
        raise BadConfiguration("--webhook and --webhook-secret go together")
    endpoint = (webhook, webhook_secret) if webhook and webhook_secret else None
    serve(host=host, port=port, data=data, conditions=conditions, seed=seed, webhook=endpoint)
