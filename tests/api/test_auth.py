"""Tokens: who is believed, and who is not."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from api.auth import Principal, Tokens
from api.errors import Problem
from infra.settings import Auth
from schemas.errors import BadConfiguration

pytestmark = pytest.mark.unit
SECRET = "a secret of the tests, long enough for any of the algorithms that anyone may try"
TOKENS = Tokens(Auth(jwt_secret=SecretStr(SECRET)))
CLAIMS: Mapping[str, Any] = {"sub": "u1", "iss": "paystream", "aud": "paystream-api", "exp": datetime(2100, 1, 1, tzinfo=UTC), "roles": ["admin"]}


def signed(claims: Mapping[str, Any], secret: str = SECRET, algorithm: str = "HS256") -> str:
    return "Bearer " + jwt.encode(dict(claims), secret, algorithm)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLAIMS.items() if key != name}


async def test_a_token_of_ours_is_believed() -> None:
    issued = TOKENS.issue("u1", ["admin", "analyst"], timedelta(minutes=1))
    assert await TOKENS.principal(f"Bearer {issued}") == Principal("u1", frozenset({"admin", "analyst"}))
    assert await TOKENS.principal(signed(CLAIMS)) == Principal("u1", frozenset({"admin"}))
    assert await TOKENS.principal(signed(without("roles")).replace("Bearer", "bearer")) == Principal("u1", frozenset())


def _part(document: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic dTE6cA==",
        "Bearer nonsense",
        "Bearer a.b.c",
        signed(CLAIMS).removeprefix("Bearer "),
        signed(CLAIMS, secret=SECRET[::-1]),
        signed(CLAIMS, algorithm="HS512"),
        f"Bearer {_part({'alg': 'none', 'typ': 'JWT'})}.{_part({**CLAIMS, 'exp': 4102444800})}.",
        signed({**CLAIMS, "exp": datetime(2020, 1, 1, tzinfo=UTC)}),
        signed({**CLAIMS, "nbf": datetime(2099, 1, 1, tzinfo=UTC)}),
        signed({**CLAIMS, "iss": "somebody"}),
        signed({**CLAIMS, "aud": "something"}),
        *(signed(without(name)) for name in ("sub", "iss", "aud", "exp")),
        signed({**CLAIMS, "sub": ""}),
        signed({**CLAIMS, "sub": "x" * 129}),
        signed({**CLAIMS, "sub": "a\x00b"}),
        signed({**CLAIMS, "roles": "admin"}),
        signed({**CLAIMS, "roles": [1]}),
    ],
)
async def test_others_are_not_believed(header: str | None) -> None:
    with pytest.raises(Problem) as raised:
        await TOKENS.principal(header)
    assert raised.value.kind == "unauthorized"
    assert raised.value.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("secret", [None, "", "x" * 31])
def test_a_secret_has_to_be_one(secret: str | None) -> None:
    with pytest.raises(BadConfiguration, match="at least 32 bytes"):
        Tokens(Auth(jwt_secret=SecretStr(secret) if secret is not None else None))


def test_an_administrator_may_read_what_others_own() -> None:
    assert Principal("u1", frozenset()).may_read("u1")
    assert not Principal("u1", frozenset({"analyst"})).may_read("u2")
    assert Principal("u1", frozenset({"admin"})).may_read("u2")


def test_a_role_that_is_needed_is_named() -> None:
    Principal("u1", frozenset({"analyst"})).require("admin", "analyst")
    with pytest.raises(Problem, match="forbidden") as raised:
        Principal("u1", frozenset({"cashier"})).require("admin", "analyst")
    assert "admin or analyst" in str(raised.value.detail)
