"""A token issuer inside the test: keys, tokens signed with them, and a server that publishes what a test wants published."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from infra.jwks import IssuerKeys
from infra.settings import Auth, Settings

CLAIMS: Mapping[str, Any] = {"sub": "u1", "iss": "paystream", "aud": "paystream-api", "exp": datetime(2100, 1, 1, tzinfo=UTC), "roles": ["admin"]}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(name: str = "first", bits: int = 2048) -> rsa.RSAPrivateKey:
    """Always the same for one name."""
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str = "first", curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def public_jwk(key: PrivateKey, kid: str | None, **more: Any) -> dict[str, Any]:
    """The public half, as an issuer publishes it; a member given as None is left out."""
    public = key.public_key()
    jwk: dict[str, Any] = (
        RSAAlgorithm.to_jwk(public, as_dict=True) if isinstance(public, rsa.RSAPublicKey) else ECAlgorithm.to_jwk(public, as_dict=True)
    )
    members = {name: value for name, value in jwk.items() if name != "key_ops"} | {"kid": kid, "use": "sig"} | more
    return {name: value for name, value in members.items() if value is not None}


def signed(key: PrivateKey | str, algorithm: str, kid: str | None, **claims: Any) -> str:
    """An `Authorization` header."""
    return "Bearer " + jwt.encode({**CLAIMS, **claims}, key, algorithm, headers={} if kid is None else {"kid": kid})


@dataclass
class Seconds:
    """A clock that stands until it is moved."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Published:
    """What a JWKS URL answers: `keys`, unless `answer` says something else. Requests wait for `go`."""

    url: str = ""
    keys: list[Any] = field(default_factory=list)
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    fetches: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.fetches += 1
        self.asked.set()
        await self.go.wait()
        if self.answer is not None:
            return await self.answer(request)
        return web.Response(text=json.dumps({"keys": self.keys}), content_type="application/json")

    def refuses(self) -> None:
        self.says(b"", 503)

    def says(self, body: bytes, status: int = 200, **headers: str) -> None:
        async def answer(_: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=body, headers=headers)

        self.answer = answer

    def is_back(self) -> None:
        self.answer = None


@asynccontextmanager
async def publishing(*keys: Any) -> AsyncIterator[Published]:
    published = Published(keys=list(keys))
    published.go.set()
    application = web.Application()
    application.router.add_get("/{path:.*}", published.handle)
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    published.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
    try:
        yield published
    finally:
        published.go.set()
        await runner.cleanup()


@asynccontextmanager
async def keys_of(url: str, now: Callable[[], float], **auth: Any) -> AsyncIterator[IssuerKeys]:
    issuer = IssuerKeys(Settings(_env_file=None, auth=Auth(jwks_url=url, **auth)), now=now)
    try:
        yield issuer
    finally:
        await issuer.aclose()
