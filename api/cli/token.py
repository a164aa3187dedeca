"""`paystream token`: a bearer token, for trying the API out.

Rule: in the sandbox only. In production, tokens come from whoever knows who the users are.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Final

import typer

from api.auth import LONGEST_SUBJECT, Tokens
from infra import settings as configuration

_REFUSED: Final = 5
_TTL: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LONGEST: Final = timedelta(days=30)


def _ttl(text: str) -> timedelta:
    found = _TTL.fullmatch(text)
    ttl = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else timedelta(0)
    if not timedelta(0) < ttl <= _LONGEST:
        raise typer.BadParameter("--ttl takes a number and a unit, such as 30m, 12h or 7d; 30 days at most")
    return ttl


def _user(text: str) -> str:
    if not 1 <= len(text) <= LONGEST_SUBJECT or not text.isprintable():
        raise typer.BadParameter(f"1 to {LONGEST_SUBJECT} printable characters")
    return text


def token(
    user: Annotated[str, typer.Option(help="Who the token is for: the owner of the payments made with it.", callback=_user)],
    role: Annotated[list[str] | None, typer.Option(help="A role: admin reads all payments, analyst the figures. May be repeated.")] = None,
    ttl: Annotated[str, typer.Option(metavar="30m|12h|7d", help="How long it is good for.")] = "12h",
) -> None:
    """Print a bearer token for trying the API out. Sandbox profile only.

    Example: curl -H "Authorization: Bearer $(paystream token --user u1)" localhost:8000/api/v1/payments
    """
    lifetime = _ttl(ttl)
    settings = configuration.load()
    if settings.profile != "sandbox":
        typer.echo("error: tokens are issued here in the sandbox profile only; this installation's profile is production", err=True)
        raise typer.Exit(_REFUSED)
    typer.echo(Tokens(settings.auth).issue(user, role or (), lifetime))
