"""The issuer's keys: which are taken, how long they are believed, and how often the URL is asked."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import RSAAlgorithm
from prometheus_client import REGISTRY
from pydantic import ValidationError
from structlog.testing import capture_logs

from infra import jwks
from infra.jwks import IssuerKeys, issuer_keys
from infra.settings import Auth, Settings
from schemas.errors import BadConfiguration, Unavailable
from tests.token_issuer import Published, Seconds, ec_key, keys_of, public_jwk, publishing, rsa_key

pytestmark = pytest.mark.unit

TTL_S, STALE_S = 300.0, 3600.0


@pytest.fixture
async def published() -> AsyncIterator[Published]:
    async with publishing(public_jwk(rsa_key(), "old")) as at:
        yield at


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def issuer(published: Published, clock: Seconds) -> AsyncIterator[IssuerKeys]:
    async with keys_of(published.url, clock) as keys:
        yield keys


async def has(issuer: IssuerKeys, kid: str, algorithm: str = "RS256") -> bool:
    return await issuer.key(algorithm, kid) is not None


async def eventually_fetched(published: Published, times: int) -> None:
    """A fetch that nobody waits for, to its end."""
    async with asyncio.timeout(10):
        while published.fetches < times:
            published.asked.clear()
            await published.asked.wait()


# ── Cached and rotated ──


async def test_keys_are_fetched_once_while_they_are_fresh(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert published.fetches == 0
    assert await has(issuer, "old")
    clock.now += TTL_S - 1
    assert await has(issuer, "old")
    assert published.fetches == 1


async def test_a_key_that_was_taken_away_is_believed_until_the_keys_are_due(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert await has(issuer, "old")
    published.keys = [public_jwk(rsa_key("second"), "new")]
    clock.now += TTL_S - 1
    assert await has(issuer, "old")
    clock.now += 1
    assert not await has(issuer, "old")
    assert await has(issuer, "new")
    assert published.fetches == 2


async def test_a_new_key_is_fetched_when_a_token_names_it(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert await has(issuer, "old")
    published.keys.append(public_jwk(rsa_key("second"), "new"))
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    assert await has(issuer, "new")
    assert await has(issuer, "old")
    assert published.fetches == 2


async def test_made_up_names_have_the_url_asked_once_in_ten_seconds(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    for number in range(100):
        assert not await has(issuer, f"made-up-{number}")
    assert published.fetches == 1
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    for number in range(100):
        assert not await has(issuer, f"made-up-{number}")
    assert published.fetches == 2


async def test_those_who_wait_share_one_fetch(issuer: IssuerKeys, published: Published) -> None:
    published.go.clear()
    asking = [asyncio.create_task(has(issuer, "old")) for _ in range(20)]
    await published.asked.wait()
    asking[0].cancel()  # whoever began it may leave
    published.go.set()
    answered = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(answered[0], asyncio.CancelledError)
    assert answered[1:] == [True] * 19
    assert published.fetches == 1


async def test_who_has_a_key_does_not_wait_for_one_that_is_not_known(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert await has(issuer, "old")
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    published.go.clear()
    published.asked.clear()
    stranger = asyncio.create_task(has(issuer, "made-up"))
    await published.asked.wait()
    assert await has(issuer, "old")
    published.go.set()
    assert not await stranger


# ── Away ──


async def test_without_any_key_it_is_unavailable_and_says_so(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    published.refuses()
    for _ in range(10):
        with pytest.raises(Unavailable, match="token issuer"):
            await issuer.key("RS256", "old")
    assert not await issuer.answers()
    assert published.fetches == 1
    published.is_back()
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    assert await issuer.answers()
    assert await has(issuer, "old")
    assert published.fetches == 2


async def test_old_keys_serve_while_the_url_is_away_and_not_for_ever(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert await has(issuer, "old")
    published.refuses()
    clock.now += TTL_S
    assert await has(issuer, "old")
    with pytest.raises(Unavailable):  # it may well be the issuer's newest
        await issuer.key("RS256", "new")
    clock.now += STALE_S - 1
    assert await issuer.answers()
    assert await has(issuer, "old")
    clock.now += 1
    with pytest.raises(Unavailable):
        await issuer.key("RS256", "old")
    assert not await issuer.answers()


async def test_nobody_who_has_an_old_key_waits_for_a_url_that_is_known_to_be_away(issuer: IssuerKeys, published: Published, clock: Seconds) -> None:
    assert await has(issuer, "old")
    published.refuses()
    clock.now += TTL_S
    assert await has(issuer, "old")
    published.is_back()
    published.keys = [public_jwk(rsa_key("second"), "new")]
    published.go.clear()
    clock.now += jwks.ASKED_AGAIN_AFTER_S
    assert await has(issuer, "old")
    await eventually_fetched(published, 3)
    assert await has(issuer, "old")  # and the fetch that runs is not waited for either
    published.go.set()
    assert await has(issuer, "new")  # but for a key that is not known, it is
    assert not await has(issuer, "old")
    assert published.fetches == 3


async def test_a_url_that_hangs_is_away(issuer: IssuerKeys, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "ANSWER_WITHIN_S", 0.05)
    published.go.clear()
    with pytest.raises(Unavailable):
        await issuer.key("RS256", "old")


async def test_a_url_where_nothing_listens_is_away(clock: Seconds) -> None:
    async with publishing() as gone:
        url = gone.url
    async with keys_of(url, clock) as issuer:
        with pytest.raises(Unavailable):
            await issuer.key("RS256", "old")


async def test_fetches_are_counted_and_failures_logged_without_the_url(published: Published, clock: Seconds) -> None:
    def counted(outcome: str) -> float:
        return REGISTRY.get_sample_value("paystream_issuer_fetches_total", {"outcome": outcome}) or 0

    before = counted("fetched"), counted("failed")
    async with keys_of(published.url + "?key=a-secret", clock) as issuer:
        assert await has(issuer, "old")
        assert REGISTRY.get_sample_value("paystream_issuer_keys") == 1
        published.refuses()
        clock.now += TTL_S
        with capture_logs() as logged:
            assert await has(issuer, "old")
    assert (counted("fetched"), counted("failed")) == (before[0] + 1, before[1] + 1)
    assert [(line["log_level"], line["why"], line["keys_in_use"]) for line in logged] == [("warning", "it answers HTTP 503", 1)]
    assert "a-secret" not in str(logged)


# ── Answers that are none ──

KEYS = json.dumps({"keys": [public_jwk(rsa_key(), "old")]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "headers", "why"),
    [
        (500, KEYS, {}, "HTTP 500"),
        (204, b"", {}, "HTTP 204"),
        (302, KEYS, {"Location": "/elsewhere"}, "HTTP 302"),
        (200, b"<html>", {}, "JSON"),
        (200, b"[" * 50_000, {}, "JSON"),
        (200, KEYS + b" " * jwks.MAX_BYTES, {}, "65536 bytes"),
        (200, gzip.compress(KEYS), {"Content-Encoding": "gzip"}, "JSON"),
        (200, b"[]", {}, "`keys`"),
        (200, b'{"keys": {}}', {}, "`keys`"),
        (200, json.dumps({"keys": [public_jwk(rsa_key(), "old")] + [{}] * jwks.MAX_KEYS}).encode(), {}, "64 at most"),
        (200, b'{"keys": []}', {}, "none of the 0 keys"),
    ],
)
async def test_an_answer_that_is_none_leaves_the_old_keys(
    issuer: IssuerKeys, published: Published, clock: Seconds, status: int, body: bytes, headers: dict[str, str], why: str
) -> None:
    assert await has(issuer, "old")
    published.says(body, status, **headers)
    clock.now += TTL_S
    with capture_logs() as logged:
        assert await has(issuer, "old")
    assert published.fetches == 2  # a redirect is not followed
    assert why in logged[0]["why"]


def _private(kid: str) -> dict[str, Any]:
    return {**RSAAlgorithm.to_jwk(rsa_key("published by mistake"), as_dict=True), "kid": kid, "key_ops": None, "use": "sig"}


@pytest.mark.parametrize(
    "jwk",
    [
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA", "kid": "k", "alg": "HS256"},
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA", "kid": "k", "alg": "RS256"},
        public_jwk(rsa_key(), "k", use="enc"),
        public_jwk(rsa_key(), "k", use=None, key_ops=["encrypt"]),
        public_jwk(rsa_key(), "k", key_ops="verify"),
        public_jwk(rsa_key(), "k", alg="RS512"),
        public_jwk(rsa_key(), "k", alg="HS256"),
        public_jwk(rsa_key(), "k", alg="ES256"),
        public_jwk(rsa_key(), "k", alg=["RS256"]),
        public_jwk(rsa_key("short", 1024), "k"),
        {**public_jwk(rsa_key(), "k"), "n": "AQAB" * 500},
        {**public_jwk(rsa_key(), "k"), "e": "AQ"},
        {**public_jwk(rsa_key(), "k"), "n": 17},
        {**public_jwk(rsa_key(), "k"), "n": "ü"},
        public_jwk(rsa_key(), "k", n=None),
        {name: value for name, value in _private("k").items() if value is not None},
        public_jwk(rsa_key(), None),
        public_jwk(rsa_key(), ""),
        {**public_jwk(rsa_key(), "k"), "kid": 7},
        public_jwk(ec_key("large", ec.SECP384R1), "k"),
        public_jwk(ec_key(), "k", crv=None),
        {**public_jwk(ec_key(), "k"), "y": public_jwk(ec_key("second"), "k")["y"]},
        public_jwk(ec_key(), "k", y=None),
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "k"},
        {"kty": ["RSA"], "kid": "k"},
        {"kid": "k"},
        "RSA",
        None,
    ],
)
async def test_what_is_no_key_for_tokens_is_passed_over(issuer: IssuerKeys, published: Published, jwk: Any) -> None:
    published.keys = [jwk, public_jwk(rsa_key(), "good")]
    assert not await has(issuer, "k", "RS256")
    assert not await has(issuer, "k", "ES256")
    assert await has(issuer, "good")


async def test_a_key_is_for_the_algorithm_of_its_type(issuer: IssuerKeys, published: Published) -> None:
    published.keys = [public_jwk(rsa_key(), "r", use=None), public_jwk(ec_key(), "e", key_ops=["verify"], alg="ES256")]
    assert await has(issuer, "r", "RS256")
    assert await has(issuer, "e", "ES256")
    for kid, algorithm in (("r", "ES256"), ("e", "RS256"), ("r", "RS512"), ("r", "HS256"), ("r", "none")):
        assert not await has(issuer, kid, algorithm)


async def test_only_the_algorithms_that_were_set_are_taken(published: Published, clock: Seconds) -> None:
    published.keys = [public_jwk(rsa_key(), "k"), public_jwk(ec_key(), "k")]
    async with keys_of(published.url, clock, jwks_algorithms=("ES256",)) as issuer:
        assert not await has(issuer, "k", "RS256")
        assert published.fetches == 0
        assert await has(issuer, "k", "ES256")
    for wrong in ((), ("HS256",), ("none",)):
        with pytest.raises(ValidationError):
            Auth(jwks_algorithms=wrong)


# ── The URL ──


def settings(url: str | None, profile: str = "production") -> Settings:
    return Settings.model_validate({"profile": profile, "auth": {"jwks_url": url}})


@pytest.mark.parametrize(
    "url",
    [
        "issuer.example",
        "//issuer.example/jwks",
        "ftp://issuer.example/jwks",
        "file:///etc/passwd",
        "https://",
        "https://user:password@issuer.example/jwks",
        "https://[issuer/jwks",
        "https://issuer.example:port/jwks",
    ],
)
@pytest.mark.parametrize("profile", ["sandbox", "production"])
def test_a_url_has_to_be_one(url: str, profile: str) -> None:
    with pytest.raises(BadConfiguration, match="PAYSTREAM_AUTH__JWKS_URL") as raised:
        issuer_keys(settings(url, profile))
    assert "password@" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://issuer.example/jwks", "http://10.0.0.7/jwks", "http://localhost.issuer.example/jwks"])
def test_in_production_nobody_can_put_in_keys_on_the_way(url: str) -> None:
    with pytest.raises(BadConfiguration, match="https"):
        issuer_keys(settings(url))
    assert issuer_keys(settings(url, "sandbox")) is not None


@pytest.mark.parametrize(
    "url",
    ["https://issuer.example/jwks", "http://127.0.0.1:9000/jwks", "http://[::1]:9000/jwks", "http://localhost/jwks", "HTTPS://issuer.example/jwks"],
)
def test_https_and_this_machine_are_trusted(url: str) -> None:
    assert issuer_keys(settings(url)) is not None


@pytest.mark.parametrize("url", [None, ""])
def test_without_a_url_there_are_none(url: str | None) -> None:
    assert issuer_keys(settings(url)) is None
