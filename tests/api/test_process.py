"""The API as a process: how it starts, how it ends, and what it owes after a power cut."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial

import httpx2
import psycopg
import pytest
import redis
from pydantic import SecretStr

from api.auth import Tokens
from infra import schema_registry
from infra.local.process import Program
from infra.settings import Auth, Database, Kafka, Redis, SchemaRegistry, Settings, Stripe
from schemas.messages import InitiatePayment
from tests.api.world import BODY, SECRET
from tests.conftest import StartProgram, free_port
from tests.topic_reader import read_topic

pytestmark = pytest.mark.race


@pytest.fixture
def settings(installation: Settings) -> Settings:
    schema_registry.register(installation)
    gateway = Stripe(api_key=SecretStr("sk_test_nobody_is_called"))
    return installation.model_copy(update={"auth": Auth(jwt_secret=SecretStr(SECRET)), "stripe": gateway})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    token = Tokens(settings.auth).issue("u1", (), timedelta(minutes=5))
    url = f"http://127.0.0.1:{settings.api.port}"
    async with httpx2.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as opened:
        yield opened


def on_kafka(settings: Settings) -> list[bytes]:
    """The values on `payment-commands`."""
    return [record.value or b"" for record in read_topic(settings, "payment-commands")]


async def eventually(condition: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.05)


async def test_it_starts_with_everything_away_and_says_what_is_missing(settings: Settings, start: StartProgram, client: httpx2.AsyncClient) -> None:
    nothing = free_port()
    away = settings.model_copy(
        update={
            "kafka": Kafka(bootstrap_servers=f"127.0.0.1:{nothing}", delivery_timeout_s=0.5),
            "schema_registry": SchemaRegistry(url=f"http://127.0.0.1:{nothing}"),
            "database": Database(url=SecretStr(f"postgresql://nobody@127.0.0.1:{nothing}/nothing")),
            "redis": Redis(url=SecretStr(f"redis://127.0.0.1:{nothing}/0")),
            "auth": settings.auth.model_copy(update={"jwks_url": f"http://127.0.0.1:{nothing}/jwks.json"}),
        }
    )
    program = start("api", settings=away, wait=False)
    answer = await _first_answer(client, program, "/readyz?verbose")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "parts": dict.fromkeys(("postgres", "kafka", "registry", "redis", "issuer"), "down")}
    assert (await client.get("/livez")).status_code == 200
    refused = await client.post("/api/v1/payments/process", json=dict(BODY))
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    program.stop()
    assert program.exit_code == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("PAYSTREAM_AUTH__JWT_SECRET", ""), ("PAYSTREAM_AUTH__JWT_SECRET", "too short"), ("PAYSTREAM_AUTH__JWKS_URL", "ftp://issuer.example/jwks.json")],
)
def test_it_does_not_start_without_what_tokens_are_verified_with(settings: Settings, start: StartProgram, setting: str, value: str) -> None:
    program = start("api", settings=settings, wait=False, **{setting: value})
    deadline = time.monotonic() + 30
    while program.running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert program.exit_code == 2
    assert setting in program.log.read_text()


async def test_a_2xx_means_that_it_is_on_kafka(settings: Settings, start: StartProgram, client: httpx2.AsyncClient) -> None:
    start("api", settings=settings)
    taken = [await client.post("/api/v1/payments/process", json={**BODY, "order_id": f"order-{number}"}) for number in range(5)]
    assert {answer.status_code for answer in taken} == {202}
    codec = schema_registry.load_codec(settings)
    commands = [codec.decode(value) for value in on_kafka(settings)]
    assert all(isinstance(command, InitiatePayment) for command in commands)
    assert {command.payment_id for command in commands} == {answer.json()["payment_id"] for answer in taken}


@pytest.mark.parametrize(("point", "times"), [("api.after_accept", 1), ("producer.after_ack", 2), ("api.after_produce", 2)])
async def test_after_a_power_cut_the_same_request_is_the_same_payment(
    settings: Settings, start: StartProgram, client: httpx2.AsyncClient, point: str, times: int
) -> None:
    program = start("api", settings=settings, PAYSTREAM_CRASH_AT=point)
    with pytest.raises(httpx2.HTTPError):
        await client.post("/api/v1/payments/process", json=dict(BODY), headers={"Idempotency-Key": "k1"})
    await eventually(lambda: not program.running)
    assert program.exit_code == 137
    assert f"crash point {point} hit" in program.log.read_text()
    start("api", settings=settings)
    again = partial(client.post, "/api/v1/payments/process", json=dict(BODY), headers={"Idempotency-Key": "k1"})
    held = await again()
    assert (held.status_code, held.json()["code"]) == (409, "request_in_flight"), "for 30 seconds, nobody knows that the first one died"
    with redis.Redis.from_url(settings.redis.url.get_secret_value()) as claims:
        claims.flushdb()
    answer = await again()
    assert answer.status_code == 202
    values = on_kafka(settings)
    assert len(values) == times
    assert len(set(values)) == 1, "a repeat produces the same bytes"
    with psycopg.connect(settings.database.url.get_secret_value()) as connection:
        assert connection.execute("SELECT payment_id::text FROM commands").fetchall() == [(answer.json()["payment_id"],)]


async def test_told_to_end_it_answers_those_who_wait(settings: Settings, start: StartProgram, client: httpx2.AsyncClient) -> None:
    program = start("api", settings=settings)
    waiting = asyncio.create_task(client.post("/api/v1/payments/process", json=dict(BODY), headers={"Prefer": "wait=30"}))
    await eventually(lambda: "command accepted" in program.log.read_text())
    began = time.monotonic()
    assert program.identity is not None
    program.identity.process().send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    answer = await waiting
    assert answer.status_code == 202
    await eventually(lambda: not program.running)
    assert time.monotonic() - began < 10
    assert program.exit_code == 0


async def test_who_has_left_holds_no_key(settings: Settings, start: StartProgram, client: httpx2.AsyncClient) -> None:
    program = start("api", settings=settings)
    with pytest.raises(httpx2.ReadTimeout):
        await client.post("/api/v1/payments/process", json=dict(BODY), headers={"Prefer": "wait=30"}, timeout=2)
    assert "command accepted" in program.log.read_text()
    async with asyncio.timeout(10):
        while (answer := await client.post("/api/v1/payments/process", json=dict(BODY))).status_code == 409:
            await asyncio.sleep(0.1)
    assert answer.status_code == 202
    assert answer.headers["idempotent-replayed"] == "true"


async def _first_answer(client: httpx2.AsyncClient, program: Program, path: str) -> httpx2.Response:
    async with asyncio.timeout(30):
        while True:
            assert program.running, program.log.read_text()
            try:
                return await client.get(path)
            except httpx2.TransportError:
                await asyncio.sleep(0.05)
