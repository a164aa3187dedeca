"""The public keys of whoever issues tokens, from their JWKS URL (RFC 7517), and how long they are believed.

Rule: a key is for one algorithm, which its type tells and no token: RSA of 2048 bits or more for RS256, P-256 for ES256. What else is published is no
key. Whatever tokens come, the URL is asked once in ten seconds at most, by one request for all who wait; while it is away, what it said last is used.
Flow: a token's `alg` and `kid` -> `IssuerKeys.key` -> what is known, or the URL -> a key, which api/auth verifies the token with.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import jwt
import orjson
import structlog
from prometheus_client import Counter, Gauge

from infra.settings import Settings
from schemas.errors import BadConfiguration, Unavailable

_log: Final = structlog.get_logger(__name__)

ASKED_AGAIN_AFTER_S: Final = 10.0
"""However many tokens name a key that nobody knows."""
ANSWER_WITHIN_S: Final = 2.0
"""Shorter than a probe's patience, so that /readyz tells of a URL that hangs as of one that refuses."""
MAX_BYTES: Final = 64 * 1024
MAX_KEYS: Final = 64
RSA_BITS: Final = range(2048, 8192 + 1)
"""Above, each token that anybody sends would cost too much to look at."""

FETCHES: Final = Counter("paystream_issuer_fetches_total", "Times that the token issuer's keys were asked for: fetched or failed", ["outcome"])
KNOWN: Final = Gauge("paystream_issuer_keys", "Keys of the token issuer, as they were fetched last")

_PART: Final = "the token issuer"
_PUBLIC: Final = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y")}

Keys = Mapping[tuple[str, str], jwt.PyJWK]
"""By algorithm and `kid`."""


class _Unusable(Exception):
    """What the URL answered gives no keys."""


def issuer_keys(settings: Settings) -> IssuerKeys | None:
    """The issuer's keys, None where the settings have no URL for them. Raises BadConfiguration for a URL that can't be trusted."""
    return IssuerKeys(settings) if settings.auth.jwks_url else None


class IssuerKeys:
    """One issuer's keys. Nothing is fetched until somebody asks for a key, or how it stands. `now` is in seconds and never goes back."""

    def __init__(self, settings: Settings, *, now: Callable[[], float] = time.monotonic) -> None:
        auth = settings.auth
        self._url = _trusted(auth.jwks_url or "", sandbox=settings.profile == "sandbox")
        self._algorithms = frozenset(auth.jwks_algorithms)
        self._fresh_s, self._believed_s = auth.jwks_ttl_s, auth.jwks_ttl_s + auth.jwks_stale_s
        self._now = now
        self._keys: Keys = {}
        self._fetched_at = self._asked_at = -math.inf
        self._away = False
        self._fetching: asyncio.Task[None] | None = None

    async def key(self, algorithm: str, kid: str) -> jwt.PyJWK | None:
        """The issuer's key with this id, for this algorithm; None if the issuer has none. Raises Unavailable if that can't be told now."""
        if algorithm not in self._algorithms:
            return None
        await self._freshen()
        if (algorithm, kid) not in self._believed() and (fetching := self._fetch_if_due()):
            await asyncio.shield(fetching)  # it may be new
        keys = self._believed()
        if (algorithm, kid) not in keys and (self._away or not keys):
            raise Unavailable(_PART)
        return keys.get((algorithm, kid))

    async def answers(self) -> bool:
        """Whether there are keys to verify with, be they old ones."""
        await self._freshen()
        return bool(self._believed())

    async def aclose(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            with suppress(asyncio.CancelledError):
                await self._fetching

    async def _freshen(self) -> None:
        """Fetch keys that are due. Once the URL is known to be away, nobody who has old ones waits for it."""
        if self._age() < self._fresh_s:
            return
        fetching = self._fetch_if_due()
        if fetching is not None and not (self._away and self._believed()):
            await asyncio.shield(fetching)  # others wait for it too, so it outlives whoever leaves

    def _fetch_if_due(self) -> asyncio.Task[None] | None:
        """The fetch that runs, or one that is begun; None if it is too early for another."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if self._now() - self._asked_at < ASKED_AGAIN_AFTER_S:
            return None
        self._asked_at = self._now()
        self._fetching = asyncio.create_task(self._fetch(), name="issuer-keys")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            keys = _keys_in(await self._read(), self._algorithms)
        except (_Unusable, aiohttp.ClientError, OSError, TimeoutError) as error:
            self._away = True
            FETCHES.labels("failed").inc()
            why = str(error) if isinstance(error, _Unusable) else type(error).__name__  # aiohttp's words repeat the URL
            _log.warning("the token issuer's keys can't be fetched", why=why, keys_in_use=len(self._believed()))
            return
        FETCHES.labels("fetched").inc()
        KNOWN.set(len(keys))
        if keys.keys() != self._keys.keys():
            _log.info("the token issuer's keys are new", keys=len(keys))
        self._keys, self._fetched_at, self._away = keys, self._now(), False

    async def _read(self) -> bytes:
        # A connection for each: it is one in minutes. Nothing is unpacked, so that what is counted is what is kept.
        timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False) as session,
            session.get(self._url, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise _Unusable(f"it answers HTTP {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise _Unusable(f"it answers more than {MAX_BYTES} bytes")
            return bytes(body)

    def _age(self) -> float:
        return self._now() - self._fetched_at

    def _believed(self) -> Keys:
        return self._keys if self._age() < self._believed_s else {}


def _trusted(url: str, *, sandbox: bool) -> str:
    """The URL, if nobody between us and it can put in keys of their own."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in {"http", "https"} or parts.username is not None:
        raise BadConfiguration("PAYSTREAM_AUTH__JWKS_URL has to be a URL like https://issuer.example/jwks.json, without user and password")
    if parts.scheme == "http" and not sandbox and not _is_loopback(host):
        raise BadConfiguration("PAYSTREAM_AUTH__JWKS_URL has to begin with https:// in production, unless it is on this machine")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ── What a JWKS says ──


def _keys_in(body: bytes, algorithms: frozenset[str]) -> Keys:
    """The keys that tokens may be verified with. Others are passed over; an answer without any is no answer."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _Unusable("it does not answer in JSON") from None
    published = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(published, list) or len(published) > MAX_KEYS:
        raise _Unusable(f"it has to answer an object with `keys`, {MAX_KEYS} at most")
    keys: dict[tuple[str, str], jwt.PyJWK] = {}
    for kid, key in _usable(published):
        if key.algorithm_name in algorithms:
            keys.setdefault((key.algorithm_name, kid), key)
    if not keys:
        raise _Unusable(f"none of the {len(published)} keys it answers is for {' or '.join(sorted(algorithms))}, has a `kid` and is public")
    return keys


def _usable(published: list[Any]) -> Iterator[tuple[str, jwt.PyJWK]]:
    for jwk in published:
        if isinstance(jwk, dict) and (algorithm := _algorithm(jwk)) and isinstance(kid := jwk.get("kid"), str) and kid:
            try:
                key = jwt.PyJWK({name: jwk[name] for name in _PUBLIC[jwk["kty"]] if name in jwk}, algorithm)
            except jwt.PyJWTError:
                continue
            if algorithm != "RS256" or key.key.key_size in RSA_BITS:
                yield kid, key


def _algorithm(jwk: Mapping[str, Any]) -> str | None:
    """The one algorithm that a key may verify, None for a key that is not for signatures, is secret, or says that it is for another algorithm."""
    match jwk:
        case {"kty": "RSA"}:
            algorithm = "RS256"
        case {"kty": "EC", "crv": "P-256"}:
            algorithm = "ES256"
        case _:
            return None
    operations = jwk.get("key_ops", ["verify"])
    for_this = jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations and jwk.get("alg", algorithm) == algorithm
    return algorithm if for_this and "d" not in jwk else None
