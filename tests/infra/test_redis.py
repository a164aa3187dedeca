"""Redis is quick when it is there, and nobody notices when it is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from infra.redis import CLAIM_S, Claims, ClaimState, Line, Outcomes
from tests.own_redis import OwnRedis

pytestmark = pytest.mark.integration
KEY = "9544dbc1-8350-563b-8632-6d9d625efd31"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    own = OwnRedis(tmp_path)
    own.start()
    yield own
    own.stop()


@pytest.fixture
async def line(server: OwnRedis) -> AsyncIterator[Line]:
    opened = Line(server.settings)
    yield opened
    await opened.aclose()


@pytest.fixture
async def other_line(server: OwnRedis) -> AsyncIterator[Line]:
    """Another process's."""
    opened = Line(server.settings)
    yield opened
    await opened.aclose()


async def test_a_claim_is_one_s_own_until_it_is_given_back(line: Line, other_line: Line) -> None:
    mine, theirs = Claims(line, "p-"), Claims(other_line, "p-")
    claim = await mine.claim(KEY)
    assert claim.state is ClaimState.MINE
    assert (await theirs.claim(KEY)).state is ClaimState.BUSY
    await mine.give_back(claim, done=False)
    assert (await theirs.claim(KEY)).state is ClaimState.MINE


async def test_what_is_done_stays_done_for_a_while(line: Line, other_line: Line, server: OwnRedis) -> None:
    mine, theirs = Claims(line, "p-"), Claims(other_line, "p-")
    await mine.give_back(await mine.claim(KEY), done=True)
    done = await theirs.claim(KEY)
    assert done.state is ClaimState.DONE
    await theirs.give_back(done, done=False)
    assert (await mine.claim(KEY)).state is ClaimState.DONE, "only whoever holds a claim can give it back"
    assert all(3000 < seconds <= 3600 for seconds in server.keys().values())


async def test_a_claim_ends_by_itself(line: Line, server: OwnRedis) -> None:
    await Claims(line, "p-").claim(KEY)
    assert server.keys() == {f"p-command:{KEY}": pytest.approx(CLAIM_S, abs=1)}


async def test_a_claim_that_ran_out_does_not_end_the_next_one(line: Line, other_line: Line, server: OwnRedis) -> None:
    mine, theirs = Claims(line, "p-"), Claims(other_line, "p-")
    slow = await mine.claim(KEY)
    server.flush()
    assert (await theirs.claim(KEY)).state is ClaimState.MINE
    await mine.give_back(slow, done=True)
    assert (await mine.claim(KEY)).state is ClaimState.BUSY


async def test_prefixes_keep_installations_apart(line: Line) -> None:
    assert (await Claims(line, "one-").claim(KEY)).state is ClaimState.MINE
    assert (await Claims(line, "two-").claim(KEY)).state is ClaimState.MINE


async def test_answers_go_to_whoever_asked(line: Line) -> None:
    asked = [line.ask("ECHO", str(number)) for number in range(200)]
    assert await asyncio.gather(*asked) == [str(number).encode() for number in range(200)]


async def test_one_who_gives_up_takes_nobody_s_answer(line: Line) -> None:
    await line.ask("PING")
    gone = asyncio.create_task(line.ask("ECHO", "gone"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await line.ask("ECHO", "still here") == b"still here"


async def test_scripts_are_loaded_again_when_redis_has_forgotten_them(line: Line, server: OwnRedis) -> None:
    claims = Claims(line, "p-")
    await claims.give_back(await claims.claim(KEY), done=False)
    server.forget_scripts()
    assert (await claims.claim(KEY)).state is ClaimState.MINE
    assert (await claims.claim(KEY)).state is ClaimState.BUSY


async def test_a_claim_is_given_back_as_soon_as_redis_answers_again(line: Line, other_line: Line, server: OwnRedis) -> None:
    mine, theirs = Claims(line, "p-"), Claims(other_line, "p-")
    claim = await mine.claim(KEY)
    server.hang()
    await mine.give_back(claim, done=True)
    server.go_on()
    async with asyncio.timeout(CLAIM_S / 2):
        while (await theirs.claim(KEY)).state is not ClaimState.DONE:
            await asyncio.sleep(0.05)


async def test_with_redis_away_everybody_gets_what_they_claim(line: Line, server: OwnRedis) -> None:
    claims = Claims(line, "p-")
    assert (await claims.claim(KEY)).state is ClaimState.MINE
    server.stop()
    claim = await claims.claim(KEY)
    assert claim.state is ClaimState.MINE
    await claims.give_back(claim, done=True)
    await Outcomes(line, "p-").announce(KEY)


async def test_it_is_used_again_when_it_is_back(line: Line, server: OwnRedis) -> None:
    claims = Claims(line, "p-")
    await claims.claim(KEY)
    server.stop()
    await claims.claim("meanwhile")
    server.start()
    async with asyncio.timeout(5):
        while await line.ask("PING") is None:
            await asyncio.sleep(0.05)
    assert (await claims.claim(KEY)).state is ClaimState.MINE
    assert (await claims.claim(KEY)).state is ClaimState.BUSY


async def test_a_redis_that_hangs_costs_its_patience_once(line: Line, server: OwnRedis) -> None:
    claims = Claims(line, "p-")
    await claims.claim("before")
    server.hang()
    try:
        began = time.monotonic()
        for number in range(50):
            assert (await claims.claim(f"key-{number}")).state is ClaimState.MINE
        assert time.monotonic() - began < 0.9
    finally:
        server.go_on()


async def test_an_announcement_is_heard_by_who_waits_for_that_payment(line: Line, other_line: Line) -> None:
    api, worker = Outcomes(line, "p-"), Outcomes(other_line, "p-")
    async with api.listening("one") as first, api.listening("one") as second, api.listening("two") as other:
        await _heard(first, worker, "one")
        async with asyncio.timeout(1):
            await second.wait()
        other.clear()
        await worker.announce("one")
        first.clear()
        await _heard(first, worker, "one")
        assert not other.is_set()
    await api.aclose()


async def test_nobody_is_subscribed_for_longer_than_they_wait(line: Line, other_line: Line) -> None:
    api, worker = Outcomes(line, "p-"), Outcomes(other_line, "p-")
    async with api.listening("one") as heard:
        await _heard(heard, worker, "one")
    async with asyncio.timeout(5):
        while await other_line.ask("PUBLISH", "p-outcome:one", b""):
            await asyncio.sleep(0.02)
    await api.aclose()


async def test_a_listener_comes_back_with_redis(line: Line, other_line: Line, server: OwnRedis) -> None:
    api, worker = Outcomes(line, "p-"), Outcomes(other_line, "p-")
    async with api.listening("one") as heard:
        await _heard(heard, worker, "one")
        server.stop()
        server.start()
        heard.clear()
        async with asyncio.timeout(10):
            await heard.wait()  # told to look for what was said meanwhile
        heard.clear()
        await _heard(heard, worker, "one")
    await api.aclose()


async def test_one_may_listen_while_redis_is_away(line: Line, server: OwnRedis) -> None:
    server.stop()
    outcomes = Outcomes(line, "p-")
    async with outcomes.listening("one") as heard:
        assert not heard.is_set()
    await outcomes.aclose()


async def _heard(heard: asyncio.Event, worker: Outcomes, payment_id: str) -> None:
    """Announce until it is heard: the subscription may still be under way."""
    async with asyncio.timeout(10):
        while not heard.is_set():
            await worker.announce(payment_id)
            await asyncio.sleep(0.02)
