"""Redis, which makes the intake quick and is trusted with nothing.

Rule: nothing here raises. With Redis away, a claim is granted to everybody and nobody hears an announcement: Postgres decides who is a repeat, and
who waits for an outcome looks for himself each second.
Flow: api/intake claims a command's id while it takes it · processors/payments announces a payment that has moved -> api/intake looks at it again.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha1
from typing import Any, Final

import redis.asyncio as driver
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from infra.settings import Redis as RedisSettings

CLAIM_S: Final = 30
"""How long a request may hold its key; a process that died holds it no longer than that."""
REMEMBERED_S: Final = 3600
_ANSWER_WITHIN_S: Final = 0.25
_REST_S: Final = 1.0
_AWAY: Final = (RedisError, OSError, TimeoutError)

Word = str | bytes | int


class Line:
    """One connection for a process: questions are written as they come, and answered in that order.

    redis-py's own client takes a connection out of a pool for each command, which costs three times the CPU. What is not answered in a quarter of a
    second is answered by None, and for a second nothing more is asked, so that a Redis that hangs costs one request its patience and not each.
    It connects when it is first used.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._pool = driver.ConnectionPool.from_url(
            settings.url.get_secret_value(),
            socket_connect_timeout=_ANSWER_WITHIN_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
        )
        self._connection: AbstractConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._turn = asyncio.Lock()
        self._rests_until = 0.0

    async def ask(self, *command: Word) -> Any:
        """The answer to a command, None if there is none."""
        return await self._patiently(lambda: self._answer(*command))

    async def run(self, script: str, key: str, *arguments: Word) -> Any:
        """The answer of a Lua script about one key, None if there is none."""

        async def run() -> Any:
            try:
                return await self._answer("EVALSHA", sha1(script.encode(), usedforsecurity=False).hexdigest(), 1, key, *arguments)
            except NoScriptError:
                return await self._answer("EVAL", script, 1, key, *arguments)

        return await self._patiently(run)

    def subscriber(self) -> PubSub:
        """A connection of its own that listens."""
        return driver.Redis(connection_pool=self._pool).pubsub(ignore_subscribe_messages=True)

    async def aclose(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    @property
    def rests(self) -> bool:
        """Is nothing asked just now, because Redis did not answer a moment ago?"""
        return time.monotonic() < self._rests_until

    async def _patiently(self, question: Callable[[], Awaitable[Any]]) -> Any:
        if self.rests:
            return None
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                return await question()
        except _AWAY:
            self._rests_until = time.monotonic() + _REST_S
            return None

    async def _answer(self, *command: Word) -> Any:
        async with self._turn:  # who writes first is answered first
            if self._connection is None:
                self._connection = await self._connected()
                self._reader = asyncio.create_task(self._read(self._connection), name="redis")
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._asked.append(answer)
            await self._connection.send_command(*command)
        return await answer

    async def _connected(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py has no types for these
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def _read(self, connection: AbstractConnection) -> None:
        """Hand each answer to whoever asked; when the connection breaks, that to all of them."""
        broken: Exception = ConnectionError("the line to Redis is closed")
        try:
            while True:
                try:
                    _give(self._asked, await connection.read_response(timeout=math.inf))
                except ResponseError as refusal:
                    _give(self._asked, refusal)
        except _AWAY as error:
            broken = error
        finally:
            self._connection = None
            while self._asked:
                _give(self._asked, broken)
            with suppress(*_AWAY):
                await connection.disconnect(nowait=True)


def _give(asked: deque[asyncio.Future[Any]], answer: object) -> None:
    future = asked.popleft()
    if future.done():  # nobody waits for it any more
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


# ── Claims ──

_DONE: Final = b"done"
# One key holds both: who is at it now, or that it is done.
_CLAIM: Final = """
local held = redis.call('GET', KEYS[1])
if held then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
_GIVE_BACK: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""


class ClaimState(StrEnum):
    MINE = "mine"
    """Nobody else is at it; or Redis is away, and nobody can tell."""
    BUSY = "busy"
    DONE = "done"
    """It was taken to its end before."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`known`: Redis was asked, so it may hold the key for this claim, whether it answered or not."""

    key: str
    token: str
    state: ClaimState
    known: bool


class Claims:
    """Who is at a command right now, and which ones are done: for 30 seconds the one, for an hour the other."""

    def __init__(self, line: Line, prefix: str) -> None:
        self._line = line
        self._prefix = f"{prefix}command:"
        self._late: set[asyncio.Task[None]] = set()

    async def claim(self, key: str) -> Claim:
        """Ask for `key`. A claim that is MINE is given back with `give_back`."""
        name, token, known = self._prefix + key, secrets.token_hex(8), not self._line.rests
        held = await self._line.run(_CLAIM, name, token, CLAIM_S * 1000)
        state = ClaimState.MINE if held is None else ClaimState.DONE if held == _DONE else ClaimState.BUSY
        return Claim(name, token, state, known)

    async def give_back(self, claim: Claim, *, done: bool) -> None:
        """Let others at it; `done`: they needn't do it again. Does nothing to a key that is somebody else's by now.

        A Redis that does not answer is told later: until then it turns away whoever repeats the request.
        """
        if claim.state is ClaimState.MINE and claim.known and not await self._tell(claim, done):
            telling = asyncio.create_task(self._tell_later(claim, done), name="claim")
            self._late.add(telling)
            telling.add_done_callback(self._late.discard)

    async def _tell(self, claim: Claim, done: bool) -> bool:
        return await self._line.run(_GIVE_BACK, claim.key, claim.token, _DONE if done else b"", REMEMBERED_S) is not None

    async def _tell_later(self, claim: Claim, done: bool) -> None:
        ends = time.monotonic() + CLAIM_S
        while time.monotonic() < ends:
            await asyncio.sleep(_REST_S)
            if await self._tell(claim, done):
                return


# ── Announcements ──


class Outcomes:
    """Tells those who wait for a payment that it has moved. An announcement holds nothing: who hears it looks in Postgres.

    One more connection, opened when somebody first waits, with a channel for each payment that is waited for.
    """

    def __init__(self, line: Line, prefix: str) -> None:
        self._line = line
        self._prefix = f"{prefix}outcome:"
        self._waiting: dict[bytes, set[asyncio.Event]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._subscriber: PubSub | None = None
        self._turn = asyncio.Lock()

    async def announce(self, payment_id: str) -> None:
        """Say that the payment has moved."""
        await self._line.ask("PUBLISH", self._prefix + payment_id, b"")

    @asynccontextmanager
    async def listening(self, payment_id: str) -> AsyncIterator[asyncio.Event]:
        """Within the block, the event is set by each announcement for the payment; whoever waits on it clears it."""
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen_for_ever(), name="outcomes")
        channel, heard = (self._prefix + payment_id).encode(), asyncio.Event()
        self._waiting.setdefault(channel, set()).add(heard)
        try:
            await self._subscribe_as_needed(channel)
            yield heard
        finally:
            self._waiting[channel].discard(heard)
            if not self._waiting[channel]:
                del self._waiting[channel]
                await self._subscribe_as_needed(channel)

    async def aclose(self) -> None:
        """Closes the line too."""
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
        await self._line.aclose()

    async def _subscribe_as_needed(self, channel: bytes) -> None:
        async with self._turn:
            if self._subscriber is None:
                return  # the listener subscribes to all that are waited for when it has a connection
            act = self._subscriber.subscribe if channel in self._waiting else self._subscriber.unsubscribe
            with suppress(*_AWAY):
                await act(channel)

    async def _listen_for_ever(self) -> None:
        while True:
            with suppress(*_AWAY):
                await self._listen()
            await asyncio.sleep(_REST_S)

    async def _listen(self) -> None:
        async with aclosing(self._line.subscriber()) as subscriber:
            async with self._turn:
                # The first channel is nobody's: it keeps the subscription alive while nobody waits.
                await subscriber.subscribe(self._prefix, *self._waiting)
                self._subscriber = subscriber
            try:
                for events in self._waiting.values():
                    for heard in events:
                        heard.set()  # what was said meanwhile, nobody heard
                async for message in subscriber.listen():
                    for heard in self._waiting.get(message["channel"], ()):
                        heard.set()
            finally:
                self._subscriber = None
