"""How a command is taken, once, and answered.

Rule: one idempotency key is one command. Its id is made from principal, route and key, and Postgres has it before Kafka does; a repeat finds it,
and produces the same bytes again if nothing is decided yet. Redis tells sooner that a key is busy or done, and is believed in nothing else. A 2xx
means that all in-sync replicas have the command.
Flow: api/routes/commands -> `take` -> Redis (claim) -> Postgres (accept) -> Kafka (acknowledged) -> [announcement -> Postgres] -> Answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid5

import orjson
import structlog
from prometheus_client import Counter, Gauge

from api.auth import Principal
from api.errors import Problem
from infra.clock import Clock
from infra.crash_points import at
from infra.database.intake import Accepted, IntakeStore, NewCommand, Standing
from infra.database.reads import PaymentView, Reads
from infra.redis import Claims, ClaimState, Outcomes
from producers.producer import Producer, Record
from schemas.codec import Codec, headers
from schemas.errors import Unavailable
from schemas.messages import NAMESPACE, Command, Message

log = structlog.get_logger()

TOPIC: Final = "payment-commands"
LONGEST_WAIT_S: Final = 30
_LOOK_EVERY_S: Final = 1.0
SETTLED, TAKEN, REFUSED = 200, 202, 409

REPLAYS: Final = Counter("paystream_intake_replays_total", "Requests whose key was known already", ["route"])
WAITERS: Final = Gauge("paystream_intake_waiters", "Requests that wait for an outcome under Prefer: wait")


# ── What the headers say ──

_QUOTED: Final = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_ESCAPED: Final = re.compile(r"\\(.)")
_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")


def read_idempotency_key(header: str | None) -> str | None:
    """The key of an `Idempotency-Key` header: a Structured Field string (RFC 9651), or the bare text. Raises Problem."""
    if header is None:
        return None
    text = header.strip()
    if text.startswith('"'):
        quoted = _QUOTED.fullmatch(text)
        text = _ESCAPED.sub(r"\1", quoted[1]) if quoted else ""
    if not _KEY.fullmatch(text):
        raise Problem("idempotency_key_invalid")
    return text


def read_wait(header: str | None) -> int:
    """How many seconds the caller prefers to wait (RFC 7240, `Prefer: wait=10`), 30 at most. What can't be read is no preference."""
    for preference in (header or "").split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        seconds = value.strip().strip('"')
        if name.strip().lower() == "wait" and seconds.isascii() and seconds.isdigit():
            return min(int(seconds[:4]), LONGEST_WAIT_S)
    return 0


def fingerprint(*parts: object) -> str:
    """The SHA-256 of a request, whatever the order and the spacing of its JSON."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def derived_key(*parts: object) -> str:
    """The key of a request that came without one. No key that a caller sends begins like this."""
    return "\n" + "\n".join(map(str, parts))


def command_id_of(subject: str, route: str, key: str) -> str:
    """The id of the command that one request stands for. An opening command's is its payment's too."""
    return str(uuid5(uuid5(NAMESPACE, subject), f"{route}\n{key}"))


# ── Taking a command ──


async def _stays() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A command as it was asked for. Without `payment_id` it opens a payment; without `order_id` the order is named after that payment.

    `wait_s`: how long the caller would wait for the outcome; `gone` tells whether they have left.
    """

    principal: Principal
    route: str
    key: str
    fingerprint: str
    command: type[Command]
    fields: Mapping[str, Any]
    order_id: str | None = None
    payment_id: str | None = None
    correlation_id: str
    traceparent: str | None = None
    wait_s: int = 0
    gone: Callable[[], Awaitable[bool]] = _stays


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """200 with the payment: there is an outcome. 202 without it: the command is taken. `headers` tell of a repeat and of a preference kept."""

    status: int
    command: Command
    payment_status: str
    payment: PaymentView | None
    headers: dict[str, str]


class Intake:
    """Takes commands. `codec` raises Unavailable until there is one."""

    def __init__(
        self,
        *,
        store: IntakeStore,
        reads: Reads,
        producer: Producer,
        codec: Callable[[], Codec],
        claims: Claims,
        outcomes: Outcomes,
        clock: Clock,
        max_waiters: int,
    ) -> None:
        self._store, self._reads, self._producer, self._codec = store, reads, producer, codec
        self._claims, self._outcomes, self._clock = claims, outcomes, clock
        self._max_waiters = max_waiters
        self._waiters = 0
        self._closing = False

    def stop_waiting(self) -> None:
        """Answer those who wait with what is known, within a second, and let nobody wait any more: the process is about to end."""
        self._closing = True

    async def take(self, asked: Asked) -> Answer:
        """Take a command, or find it taken.

        Raises Problem (a key that is busy or was used for something else, a refusal, an unknown outcome), OrderNotTheirs, TooManyUndecided, and
        Unavailable when nothing can be taken. Sending the same request again with the same key is always right.
        """
        deadline = time.monotonic() + asked.wait_s
        command = self._command(asked)
        structlog.contextvars.bind_contextvars(order_id=command.order_id, payment_id=command.payment_id)
        value = self._codec().encode(command)
        claim = await self._claims.claim(command.event_id)
        if claim.state is ClaimState.BUSY:
            raise Problem("request_in_flight")
        acknowledged = False
        try:
            async with self._listening(asked, command.payment_id) as heard:
                known = await self._store.find(UUID(command.event_id)) if claim.state is ClaimState.DONE else None
                acknowledged = known is not None
                accepted = Accepted.before(known) if known else await self._accept(asked, command, value, waits=heard is not None)
                if accepted.repeat and accepted.repeat.fingerprint != asked.fingerprint:
                    raise Problem("idempotency_key_reused")
                await at("api.after_accept")
                if not acknowledged:
                    await self._produce(command, value, accepted.repeat, asked.traceparent)
                    acknowledged = True
                await at("api.after_produce")
                return await self._answer(asked, command, accepted, heard, deadline)
        finally:
            await self._claims.give_back(claim, done=acknowledged)

    def _command(self, asked: Asked) -> Command:
        """The message. Its id is a pure function of who asked, by which route, under which key."""
        command_id = command_id_of(asked.principal.subject, asked.route, asked.key)
        payment_id = asked.payment_id or command_id
        return asked.command(
            event_id=command_id,
            order_id=asked.order_id or f"ord_{UUID(payment_id).hex}",
            payment_id=payment_id,
            user_id=asked.principal.subject,
            occurred_at=self._clock.now(),
            correlation_id=asked.correlation_id,
            **asked.fields,
        )

    @asynccontextmanager
    async def _listening(self, asked: Asked, payment_id: str) -> AsyncIterator[asyncio.Event | None]:
        """An event that is set when the payment may have moved, from before the command is produced. None for those who don't wait, or can't."""
        if not asked.wait_s or self._closing or self._waiters >= self._max_waiters:
            yield None
            return
        self._waiters += 1
        WAITERS.inc()
        try:
            async with self._outcomes.listening(payment_id) as heard:
                yield heard
        finally:
            self._waiters -= 1
            WAITERS.dec()

    async def _accept(self, asked: Asked, command: Command, value: bytes, *, waits: bool) -> Accepted:
        accepted = await self._store.accept(
            NewCommand(
                command_id=UUID(command.event_id),
                principal=asked.principal.subject,
                route=asked.route,
                fingerprint=asked.fingerprint,
                order_id=command.order_id,
                payment_id=UUID(command.payment_id),
                command_type=command.event_type,
                value=value,
                accepted_at=command.occurred_at,
                answered_status=None if waits else TAKEN,
            )
        )
        if accepted.repeat is None:
            log.info("command accepted", command=command.event_type, command_id=command.event_id)
        return accepted

    async def _produce(self, command: Command, value: bytes, known: Standing | None, traceparent: str | None) -> None:
        """Put the command on Kafka and wait until all in-sync replicas have it: of a repeat the bytes of the first time, unless it is decided."""
        message: Message = command
        if known is not None:
            if known.decided:
                return
            value, message = known.value, self._codec().decode(known.value)
        trace = (("traceparent", traceparent.encode()),) if traceparent else ()
        try:
            await self._producer.send(Record(topic=TOPIC, key=command.order_id.encode(), value=value, headers=headers(message) + trace))
        except Unavailable as error:
            raise Problem("outcome_unknown", f"{error.part} has not acknowledged it.") from error

    async def _answer(self, asked: Asked, command: Command, accepted: Accepted, heard: asyncio.Event | None, deadline: float) -> Answer:
        """The answer. The first one's status is kept: a repeat gets the same again, with the state of its own time."""
        known = accepted.repeat
        told = {"Idempotent-Replayed": "true"} if known else {}
        if known:
            REPLAYS.labels(asked.route).inc()
        if known and known.answered_status is not None:
            return await self._told(known.answered_status, command, known, known.payment_status, told)
        standing = await self._outcome(asked, UUID(command.event_id), heard, deadline) if heard else None
        status = TAKEN if standing is None or not standing.settled else REFUSED if standing.refusal else SETTLED
        if heard:
            told["Preference-Applied"] = f"wait={asked.wait_s}"
        if (known or heard) and not await asked.gone():
            await self._store.answered(UUID(command.event_id), status)
        return await self._told(status, command, standing, standing.payment_status if standing else accepted.payment_status, told)

    async def _told(self, status: int, command: Command, standing: Standing | None, payment_status: str, told: dict[str, str]) -> Answer:
        if status == REFUSED and standing and standing.refusal:
            raise Problem("command_refused", standing.refusal["message"], code=standing.refusal["code"], headers=told)
        payment = await self._reads.payment(UUID(command.payment_id)) if status == SETTLED else None
        return Answer(status=status, command=command, payment_status=payment_status, payment=payment, headers=told)

    async def _outcome(self, asked: Asked, command_id: UUID, heard: asyncio.Event, deadline: float) -> Standing | None:
        """How the command stands once it is settled, or when the time is over. Looks when something is heard, and each second all the same."""
        standing: Standing | None = None
        while True:
            heard.clear()
            with suppress(Unavailable):
                standing = await self._store.find(command_id)
            left = deadline - time.monotonic()
            if (standing and standing.settled) or left <= 0 or self._closing or await asked.gone():
                return standing
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _LOOK_EVERY_S)):
                    await heard.wait()
