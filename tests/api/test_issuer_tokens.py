"""Tokens of an issuer with keys of its own: which are believed beside ours, which tricks fail, and what a caller is told while the issuer is away."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from pydantic import SecretStr

from api.auth import Principal, Tokens
from api.deps import Caller
from api.edge import Edge
from api.errors import Problem, install
from api.health import Doctor, Part
from infra import jwks
from infra.jwks import IssuerKeys
from infra.settings import Auth
from schemas.errors import BadConfiguration
from tests.token_issuer import CLAIMS, Published, Seconds, ec_key, keys_of, public_jwk, publishing, rsa_key, signed

pytestmark = pytest.mark.unit

SECRET = "a secret of the tests, long enough for any of the algorithms that anyone may try"
BELIEVED = Principal("u1", frozenset({"admin"}))


@pytest.fixture
async def published() -> AsyncIterator[Published]:
    async with publishing(public_jwk(rsa_key(), "rsa"), public_jwk(ec_key(), "ec")) as at:
        yield at


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def issuer(published: Published, clock: Seconds) -> AsyncIterator[IssuerKeys]:
    async with keys_of(published.url, clock) as keys:
        yield keys


@pytest.fixture
def both(issuer: IssuerKeys) -> Tokens:
    return Tokens(Auth(jwt_secret=SecretStr(SECRET)), issuer)


@pytest.fixture
def theirs(issuer: IssuerKeys) -> Tokens:
    """Without a secret of ours."""
    return Tokens(Auth(), issuer)


def by_hand(header: Mapping[str, Any], secret: bytes | None, claims: Mapping[str, Any] = CLAIMS) -> str:
    """A token that no library would make: HS256 with any bytes as its key, or without a signature."""
    parts = [_base64(json.dumps(part, default=lambda time: int(time.timestamp())).encode()) for part in (dict(header), dict(claims))]
    signing = ".".join(parts)
    signature = b"" if secret is None else hmac.digest(secret, signing.encode(), hashlib.sha256)
    return f"Bearer {signing}.{_base64(signature)}"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


async def refused(tokens: Tokens, header: str) -> None:
    with pytest.raises(Problem) as raised:
        await tokens.principal(header)
    assert raised.value.kind == "unauthorized"
    assert raised.value.headers["WWW-Authenticate"].startswith("Bearer")


# ── Who is believed ──


async def test_tokens_of_the_issuer_are_believed_beside_ours(both: Tokens) -> None:
    assert await both.principal(signed(rsa_key(), "RS256", "rsa")) == BELIEVED
    assert await both.principal(signed(ec_key(), "ES256", "ec")) == BELIEVED
    assert await both.principal(signed(SECRET, "HS256", None)) == BELIEVED
    assert await both.principal(f"Bearer {both.issue('u1', ['admin'], timedelta(minutes=1))}") == BELIEVED


async def test_our_own_tokens_need_no_issuer(both: Tokens, published: Published) -> None:
    published.refuses()
    for kid in (None, "rsa", "made-up"):
        assert await both.principal(signed(SECRET, "HS256", kid)) == BELIEVED
    assert published.fetches == 0


async def test_without_a_secret_of_ours_only_the_issuer_is_believed(theirs: Tokens) -> None:
    assert await theirs.principal(signed(rsa_key(), "RS256", "rsa")) == BELIEVED
    await refused(theirs, signed(SECRET, "HS256", None))
    await refused(theirs, by_hand({"alg": "HS256", "typ": "JWT"}, b""))
    with pytest.raises(BadConfiguration, match="JWT_SECRET"):
        theirs.issue("u1", [], timedelta(minutes=1))


async def test_without_an_issuer_only_our_secret_is_believed() -> None:
    ours = Tokens(Auth(jwt_secret=SecretStr(SECRET)))
    await refused(ours, signed(rsa_key(), "RS256", "rsa"))
    await refused(ours, signed(ec_key(), "ES256", "ec"))


@pytest.mark.parametrize("secret", ["short", "x" * 31])
async def test_a_secret_that_is_none_is_refused_beside_an_issuer_too(issuer: IssuerKeys, secret: str) -> None:
    with pytest.raises(BadConfiguration, match="at least 32 bytes"):
        Tokens(Auth(jwt_secret=SecretStr(secret)), issuer)
    await refused(Tokens(Auth(jwt_secret=SecretStr("")), issuer), by_hand({"alg": "HS256"}, b""))


def test_one_of_the_two_has_to_be_set() -> None:
    with pytest.raises(BadConfiguration, match=r"PAYSTREAM_AUTH__JWT_SECRET .* PAYSTREAM_AUTH__JWKS_URL"):
        Tokens(Auth())


# ── Who is not ──


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(rsa_key(), "RS256", "rsa"), (ec_key(), "ES256", "ec")])
@pytest.mark.parametrize(
    "claims",
    [
        {"exp": datetime(2020, 1, 1, tzinfo=UTC)},
        {"nbf": datetime(2099, 1, 1, tzinfo=UTC)},
        {"iss": "somebody"},
        {"aud": "something"},
        {"sub": ""},
        {"roles": "admin"},
    ],
)
async def test_a_good_signature_is_not_enough(both: Tokens, key: Any, algorithm: str, kid: str, claims: dict[str, Any]) -> None:
    await refused(both, signed(key, algorithm, kid, **claims))


@pytest.mark.parametrize("missing", ["exp", "iss", "aud", "sub"])
async def test_what_is_required_of_ours_is_required_of_theirs(both: Tokens, missing: str) -> None:
    claims = {name: value for name, value in CLAIMS.items() if name != missing}
    await refused(both, "Bearer " + jwt.encode(claims, rsa_key(), "RS256", headers={"kid": "rsa"}))


@pytest.mark.parametrize(
    "header",
    [
        signed(rsa_key("somebody else"), "RS256", "rsa"),
        signed(ec_key("somebody else"), "ES256", "ec"),
        signed(rsa_key(), "RS256", "made-up"),
        signed(rsa_key(), "RS256", None),
        signed(rsa_key(), "RS256", "ec"),
        signed(ec_key(), "ES256", "rsa"),
        signed(rsa_key(), "RS512", "rsa"),
        signed(rsa_key(), "PS256", "rsa"),
        signed(ec_key("large", ec.SECP384R1), "ES384", "ec"),
        signed(SECRET, "HS512", "rsa"),
        signed(rsa_key(), "RS256", "rsa")[:-4],
        "Bearer a.b.c",
    ],
)
async def test_a_token_that_another_key_signed_is_not_believed(both: Tokens, header: str) -> None:
    await refused(both, header)


@pytest.mark.parametrize("kid", ["rsa", "ec"])
async def test_what_everybody_can_read_is_no_secret(both: Tokens, theirs: Tokens, kid: str) -> None:
    """An HS256 token, signed with the public key in each of the forms that libraries have taken for a secret."""
    public = rsa_key().public_key() if kid == "rsa" else ec_key().public_key()
    jwk = public_jwk(rsa_key() if kid == "rsa" else ec_key(), kid)
    forms = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).strip(),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk).encode(),
        str(jwk.get("n") or jwk["x"]).encode(),
        b"",
    ]
    for form in forms:
        for algorithm in ("HS256", "RS256", "ES256"):
            for tokens in (both, theirs):
                await refused(tokens, by_hand({"alg": algorithm, "typ": "JWT", "kid": kid}, form))


@pytest.mark.parametrize("algorithm", ["none", "None", "", "rs256", None, ["RS256"], {"RS256": 1}, 256])
async def test_an_algorithm_that_is_none_is_not_believed(both: Tokens, algorithm: Any) -> None:
    for secret in (None, SECRET.encode()):
        await refused(both, by_hand({"alg": algorithm, "typ": "JWT", "kid": "rsa"}, secret))


@pytest.mark.parametrize("kid", [7, ["rsa"], {"rsa": 1}, True])
async def test_a_key_is_named_by_a_text(both: Tokens, kid: Any) -> None:
    await refused(both, by_hand({"alg": "RS256", "typ": "JWT", "kid": kid}, None))


async def test_a_key_that_comes_with_the_token_is_not_used(both: Tokens, published: Published) -> None:
    mine = rsa_key("somebody else")
    for trick in ({"jwk": public_jwk(mine, "rsa")}, {"jku": published.url}, {"x5u": published.url}):
        for kid in ("rsa", "mine"):
            await refused(both, "Bearer " + jwt.encode(dict(CLAIMS), mine, "RS256", headers={"kid": kid, **trick}))
    assert published.fetches == 1


async def test_a_secret_that_the_url_publishes_is_not_used(both: Tokens, published: Published) -> None:
    published.keys.append({"kty": "oct", "k": _base64(b"published, and long enough to be a secret"), "kid": "oct", "alg": "HS256"})
    await refused(both, by_hand({"alg": "HS256", "kid": "oct"}, b"published, and long enough to be a secret"))


# ── Rotation, and an issuer that is away ──


async def test_a_rotation_is_followed(both: Tokens, published: Published, clock: Seconds) -> None:
    old, new = signed(rsa_key(), "RS256", "rsa"), signed(rsa_key("second"), "RS256", "rsa-2")
    assert await both.principal(old) == BELIEVED
    await refused(both, new)
    published.keys = [public_jwk(rsa_key(), "rsa"), public_jwk(rsa_key("second"), "rsa-2")]
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    assert await both.principal(new) == BELIEVED
    assert await both.principal(old) == BELIEVED
    published.keys = [public_jwk(rsa_key("second"), "rsa-2")]
    clock.now += Auth().jwks_ttl_s
    assert await both.principal(new) == BELIEVED
    await refused(both, old)


@asynccontextmanager
async def api_with(tokens: Tokens) -> AsyncIterator[httpx2.AsyncClient]:
    """An API with one route, which says who asks."""
    app = FastAPI()
    app.state.tokens = tokens
    install(app)
    app.add_middleware(Edge)

    @app.get("/me")
    async def me(caller: Caller) -> str:
        return caller.subject

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://paystream.test") as client:
        yield client


async def test_a_caller_is_told_to_come_again_while_the_issuer_is_away(theirs: Tokens, published: Published, clock: Seconds) -> None:
    headers = {"Authorization": signed(rsa_key(), "RS256", "rsa")}
    published.refuses()
    async with api_with(theirs) as client:
        away = await client.get("/me", headers=headers)
        assert (away.status_code, away.headers["content-type"], away.headers["retry-after"]) == (503, "application/problem+json", "2")
        assert (away.json()["code"], away.json()["retryable"]) == ("unavailable", True)
        assert "www-authenticate" not in away.headers
        published.is_back()
        clock.now += jwks.ASKED_AGAIN_AFTER_S
        assert (await client.get("/me", headers=headers)).json() == "u1"
        assert (await client.get("/me", headers={"Authorization": signed(rsa_key("x"), "RS256", "rsa")})).status_code == 401


async def test_it_is_ready_as_soon_as_it_has_a_key(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    """Before any token comes, too: who is not ready is sent none."""
    part = Part("issuer", issuer.answers, needed=lambda: True)
    published.refuses()
    health = await Doctor([part]).look()
    assert (health.ready, health.parts) == (False, {"issuer": False})
    published.is_back()
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    health = await Doctor([part]).look()
    assert (health.ready, health.parts) == (True, {"issuer": True})
