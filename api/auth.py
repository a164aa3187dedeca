"""Who is asking: bearer tokens, verified and issued.

Rule: HS256 by our secret, RS256 and ES256 by the issuer's keys, and nothing else: a key has one algorithm, whatever a token says. Issuer, audience,
expiry and subject are required. A token is never repeated in an answer or a log.
Flow: `Authorization: Bearer …` -> `Tokens.principal` -> a route, which shows a principal what is theirs. `paystream token` issues them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import jwt

from api.errors import Problem
from infra.jwks import IssuerKeys
from infra.settings import Auth
from schemas.errors import BadConfiguration

HS256: Final = "HS256"
ADMIN: Final = "admin"
ANALYST: Final = "analyst"
LONGEST_SUBJECT: Final = 128
_MIN_SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Principal:
    subject: str
    roles: frozenset[str]

    def may_read(self, owner: str) -> bool:
        """Whether what `owner` owns exists for this principal."""
        return owner == self.subject or ADMIN in self.roles

    def require(self, *roles: str) -> None:
        """Raises Problem unless the principal has one of the roles."""
        if self.roles.isdisjoint(roles):
            raise Problem("forbidden", f"This needs the role {' or '.join(roles)}.")


class Tokens:
    """Verifies tokens, and issues those that are signed with our secret. Raises BadConfiguration for a secret that is too short to be one, or without
    any key to verify with.
    """

    def __init__(self, settings: Auth, issuer: IssuerKeys | None = None) -> None:
        secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret else ""
        if len(secret.encode()) < _MIN_SECRET_BYTES and (secret or issuer is None):
            raise BadConfiguration(
                f"PAYSTREAM_AUTH__JWT_SECRET has to be a secret of at least {_MIN_SECRET_BYTES} bytes; "
                "only an intake that gets its keys from PAYSTREAM_AUTH__JWKS_URL can do without one"
            )
        self._ours = _key_of(secret) if secret else None
        self._theirs = issuer
        self._issuer, self._audience = settings.issuer, settings.audience

    async def principal(self, authorization: str | None) -> Principal:
        """The principal of an `Authorization` header. Raises Problem (401), and Unavailable while the issuer's keys can't be had."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _unauthorized("There is no bearer token.", "")
        try:
            key = await self._key_for(token.strip())
            claims = jwt.decode(
                token.strip(),
                key,
                algorithms=[key.algorithm_name],
                issuer=self._issuer,
                audience=self._audience,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise _unauthorized("The token has expired.", "invalid_token") from None
        except jwt.PyJWTError:
            raise _unauthorized("The token is not valid here.", "invalid_token") from None
        subject, roles = claims["sub"], claims.get("roles", [])
        if not subject or len(subject) > LONGEST_SUBJECT or not subject.isprintable():
            raise _unauthorized(f"The token's subject has to have 1 to {LONGEST_SUBJECT} printable characters.", "invalid_token")
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise _unauthorized("The token's roles have to be a list of texts.", "invalid_token")
        return Principal(subject, frozenset(roles))

    def issue(self, subject: str, roles: Iterable[str], ttl: timedelta) -> str:
        """A token for `subject` that is good for `ttl` from now on."""
        if self._ours is None:
            raise BadConfiguration("PAYSTREAM_AUTH__JWT_SECRET is not set, and tokens are signed with it")
        now = datetime.now(UTC)
        claims = {"sub": subject, "roles": sorted(set(roles)), "iss": self._issuer, "aud": self._audience, "iat": now, "exp": now + ttl}
        return jwt.encode(claims, self._ours, HS256)

    async def _key_for(self, token: str) -> jwt.PyJWK:
        """The key that the token has to be signed with. Raises PyJWTError if there is none."""
        if self._ours is not None and self._theirs is None:
            return self._ours
        header = jwt.get_unverified_header(token)
        algorithm, kid, key = header.get("alg"), header.get("kid"), None
        if algorithm == HS256:
            key = self._ours
        elif self._theirs is not None and isinstance(algorithm, str) and isinstance(kid, str):
            key = await self._theirs.key(algorithm, kid)
        if key is None:
            raise jwt.InvalidKeyError
        return key


def _key_of(secret: str) -> jwt.PyJWK:
    """A JWK is looked at once; a bare secret would be with each token."""
    return jwt.PyJWK({"kty": "oct", "alg": HS256, "k": base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")})


def _unauthorized(detail: str, error: str) -> Problem:
    challenge = 'Bearer realm="paystream"' + (f', error="{error}"' if error else "")
    return Problem("unauthorized", detail, headers={"WWW-Authenticate": challenge})
