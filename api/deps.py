"""What routes work with, and how they come by it.

Flow: an entry point builds `Deps` -> `create_app` puts them into the app's state -> a route names `Given` or `Caller` as a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase

from api.auth import Principal, Tokens
from api.health import Doctor, Part
from api.intake import Intake
from infra.clock import Clock
from infra.database.figures import Figures
from infra.database.intake import IntakeStore
from infra.database.reads import Reads
from infra.gateways.port import Gateway
from infra.jwks import IssuerKeys
from infra.redis import Claims, Outcomes
from infra.settings import Settings
from producers.producer import Producer
from schemas.codec import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """The outside, as the API sees it. `codec` raises Unavailable until there is one; `issuer` is None where our secret is all there is."""

    settings: Settings
    clock: Clock
    store: IntakeStore
    reads: Reads
    figures: Figures
    producer: Producer
    codec: Callable[[], Codec]
    claims: Claims
    outcomes: Outcomes
    gateways: Mapping[str, Gateway]
    issuer: IssuerKeys | None
    parts: tuple[Part, ...]


class _Bearer(SecurityBase):
    """The caller of a request, and what the API's documentation says about how they show who they are."""

    model = HTTPBearerModel(bearerFormat="JWT", description="HS256, RS256 or ES256, with issuer, audience, expiry, subject and, perhaps, roles.")
    scheme_name = "bearer"

    async def __call__(self, request: Request) -> Principal:
        return await cast("Tokens", request.app.state.tokens).principal(request.headers.get("authorization"))


async def _deps(request: Request) -> Deps:
    return deps_of(request)


async def _doctor(request: Request) -> Doctor:
    return cast("Doctor", request.app.state.doctor)


def deps_of(request: Request) -> Deps:
    return cast("Deps", request.app.state.deps)


def intake_of(request: Request) -> Intake:
    return cast("Intake", request.app.state.intake)


Given = Annotated[Deps, Depends(_deps)]
TheDoctor = Annotated[Doctor, Depends(_doctor)]
Caller = Annotated[Principal, Depends(_Bearer())]
