"""What happens between a record and its handler: skip, decode, handle, and what is done when that fails.

Rule: a message is applied, or it is parked with its bytes intact; nothing is skipped but what the group does not want.

| what went wrong | what happens |
|---|---|
| `Unavailable`: a part of ours is away | the gate is held, the call is repeated with backoff until it works; nothing is parked |
| `Rejected`: it can never be handled | parked as poison |
| any other exception: a bug | parked as a bug with its stack; too many of them halt the group until somebody resumes it |

Flow: keyed window -> Delivery (or BatchDelivery) -> codec -> handler | parking.
"""

from __future__ import annotations

import asyncio
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final, NoReturn, TypeVar

import structlog
from prometheus_client import Counter, Gauge, Histogram
from structlog.contextvars import bound_contextvars

from infra.database.delivery import Disposition, Fault, Group, Parking, Received
from infra.scrub import cut, scrub
from infra.telemetry import DURATION_BUCKETS
from processors.keyed_window import Gate
from schemas.codec import Codec
from schemas.errors import Rejected, Unavailable
from schemas.messages import Message, PaymentEvent

log = structlog.get_logger()

PROCESSED: Final = Histogram(
    "paystream_process_duration_seconds", "From a message's turn to its end", ["group", "event_type", "outcome"], buckets=DURATION_BUCKETS
)
SKIPPED: Final = Counter("paystream_messages_skipped_total", "Messages of a type that the group does not want", ["group"])
PARKED_TOTAL: Final = Counter("paystream_messages_parked_total", "Messages parked by this process", ["group", "disposition"])
PARKED: Final = Gauge("paystream_parked_messages", "Messages that are parked now, as Postgres knows it", ["group", "disposition"])
HALTED: Final = Gauge("paystream_group_halted", "1 while the group is halted", ["group"])

BUGS_WITHIN: Final = timedelta(minutes=5)
_HALT_POLL_S: Final = 1.0
_COUNT_EVERY: Final = 15
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_MESSAGE_BYTES, _STACK_BYTES = 1024, 4096

T = TypeVar("T")
Handle = Callable[[Received, Message], Awaitable[None]]
HandleBatch = Callable[[Sequence[tuple[Received, Message]]], Awaitable[None]]
Sleep = Callable[[float], Awaitable[None]]


class Halt:
    """Whether the group is halted: kept in Postgres, so that all workers of the group stop, and stay stopped when they restart.

    Until Postgres has been asked for the first time, the gate is held.
    """

    def __init__(self, group: Group, parking: Parking, gate: Gate, *, sleep: Sleep = asyncio.sleep) -> None:
        self._group, self._parking, self._gate, self._sleep = group, parking, gate, sleep
        self.reason: str | None = "not known yet"
        gate.hold("halted")

    def see(self, reason: str | None) -> None:
        """Halt, or go on, as Postgres has said."""
        if reason and not self.reason:
            self._gate.hold("halted")
        if self.reason and not reason:
            self._gate.release("halted")
        self.reason = reason
        HALTED.labels(self._group).set(reason is not None)

    async def watch(self) -> NoReturn:
        """Ask each second, for ever; while Postgres is away, what was last known holds."""
        turn = 0
        while True:
            try:
                self.see(await self._parking.halted(self._group))
                if turn % _COUNT_EVERY == 0:
                    await self._count()
                turn += 1
            except Unavailable:
                pass
            await self._sleep(_HALT_POLL_S)

    async def _count(self) -> None:
        counts = await self._parking.parked_counts()
        for disposition in Disposition:
            PARKED.labels(self._group, disposition).set(counts.get((self._group, disposition), 0))


class Failures:
    """What is done about each kind of failure, the same for single messages and batches."""

    def __init__(
        self,
        group: Group,
        parking: Parking,
        gate: Gate,
        halt: Halt,
        *,
        max_bugs: int,
        sleep: Sleep = asyncio.sleep,
        dice: random.Random | None = None,
    ) -> None:
        self.group, self._parking, self._gate, self._halt, self._max_bugs = group, parking, gate, halt, max_bugs
        self._sleep, self._dice = sleep, dice or random.Random()  # noqa: S311  # no secret: it spreads retries

    async def until_available(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, as soon as what it needs is there; the gate is held meanwhile.

        A loop of our own, not stamina: that one logs each of a thousand messages' retries, and has no place for the gate between two of them.
        """
        held: str | None = None
        wait = _FIRST_WAIT_S
        try:
            while True:
                try:
                    return await call()
                except Unavailable as error:
                    if held is None:
                        held = error.part
                        self._gate.hold(held)
                await self._sleep(wait * self._dice.uniform(0.5, 1.0))
                wait = min(wait * 2, _LONGEST_WAIT_S)
        finally:
            if held is not None:
                self._gate.release(held)

    async def park(self, received: Received, message: Message | None, error: BaseException) -> Disposition:
        """Park the message, and halt the group if that was one bug too many."""
        fault = fault_of(error)
        log.error("parked", disposition=fault.disposition, error=f"{fault.error_class}: {fault.message}", stack=fault.stack)
        await self.until_available(lambda: self._parking.park(self.group, received, message.event_id if message else None, fault))
        PARKED_TOTAL.labels(self.group, fault.disposition).inc()
        if fault.disposition is Disposition.BUG:
            reason = await self.until_available(lambda: self._parking.halt_after(self.group, self._max_bugs, BUGS_WITHIN))
            if reason:
                self._halt.see(reason)
        return fault.disposition


class Delivery:
    """Brings one message after the other to `handle`. `wanted` are the event types that the group handles, None if it handles all."""

    def __init__(self, failures: Failures, codec: Codec, handle: Handle, wanted: frozenset[str] | None = None) -> None:
        self._failures, self._codec, self._handle, self._wanted = failures, codec, handle, wanted

    async def __call__(self, received: Received) -> None:
        """Never raises, and returns when the message may be acknowledged."""
        try:
            message = await self.message_in(received)
        except Exception as error:
            await self.park_unread(received, error)
        else:
            if message is not None:
                await self.apply(received, message)

    async def message_in(self, received: Received) -> Message | None:
        """The message that the record holds, None if the group does not want it. Raises what makes it unreadable."""
        if not self._is_wanted(_event_type_of(received)):
            SKIPPED.labels(self._failures.group).inc()
            return None
        message = await self._failures.until_available(lambda: self._decode(received))
        return message if self._is_wanted(message.event_type) else None

    async def park_unread(self, received: Received, error: Exception) -> None:
        with bound_contextvars(**_place(received)):
            await self._failures.park(received, None, error)

    async def apply(self, received: Received, message: Message) -> None:
        """Have the message handled, or parked."""
        started, outcome = time.perf_counter(), "applied"
        with bound_contextvars(**_place(received), **_subject(message)):
            try:
                await self._failures.until_available(lambda: self._handle(received, message))
            except (Exception, asyncio.CancelledError) as error:
                unless_we_are_cancelled(error)
                outcome = await self._failures.park(received, message, error)
        self.observe(message, outcome, time.perf_counter() - started)

    def observe(self, message: Message, outcome: str, seconds: float) -> None:
        PROCESSED.labels(self._failures.group, message.event_type, outcome).observe(seconds)

    async def _decode(self, received: Received) -> Message:
        return self._codec.decode(received.value)

    def _is_wanted(self, event_type: str | None) -> bool:
        """What does not say its type is wanted until it is decoded."""
        return self._wanted is None or event_type is None or event_type in self._wanted


class BatchDelivery:
    """Brings what has come up since the last time to `handle_batch`, together. A batch that fails is repeated one by one, to find who it was."""

    def __init__(self, failures: Failures, codec: Codec, handle_batch: HandleBatch, wanted: frozenset[str] | None = None) -> None:
        self._failures, self._handle_batch = failures, handle_batch
        self._single = Delivery(failures, codec, lambda received, message: handle_batch([(received, message)]), wanted)

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Never raises, and returns when all of the messages may be acknowledged."""
        pairs: list[tuple[Received, Message]] = []
        for received in batch:
            try:
                message = await self._single.message_in(received)
            except Exception as error:
                await self._together(pairs)  # what was before it must not come to be parked behind it
                pairs = []
                await self._single.park_unread(received, error)
            else:
                if message is not None:
                    pairs.append((received, message))
        await self._together(pairs)

    async def _together(self, pairs: Sequence[tuple[Received, Message]]) -> None:
        if not pairs:
            return
        started = time.perf_counter()
        try:
            await self._failures.until_available(lambda: self._handle_batch(pairs))
        except (Exception, asyncio.CancelledError) as error:
            unless_we_are_cancelled(error)
            log.warning("a batch failed, and is repeated one by one", size=len(pairs), error=type(error).__qualname__)
            for received, message in pairs:
                await self._single.apply(received, message)
        else:
            each = (time.perf_counter() - started) / len(pairs)
            for _, message in pairs:
                self._single.observe(message, "applied", each)


def payment_event_in(received: Received, message: Message) -> PaymentEvent:
    """The message as the payment event that it has to be, with its order as key. Raises Rejected."""
    if not isinstance(message, PaymentEvent):
        raise Rejected(f"{message.event_type} does not belong on {received.topic}")
    received.expect_key(message.order_id)
    return message


def fault_of(error: BaseException) -> Fault:
    """What is kept of an exception: its class, its message (1 KB), and of a bug the end of its stack (4 KB), without secrets and card numbers."""
    poison = isinstance(error, Rejected)
    stack = None if poison else _clean("".join(traceback.format_exception(error)), _STACK_BYTES, keep_end=True)
    return Fault(
        disposition=Disposition.POISON if poison else Disposition.BUG,
        error_class=type(error).__qualname__,
        message=_clean("".join(traceback.format_exception_only(error)).strip().partition(": ")[2], _MESSAGE_BYTES),
        stack=stack,
    )


def _clean(text: str, max_bytes: int, *, keep_end: bool = False) -> str:
    """Scrubbed, cut, and without what a text column does not take."""
    storable = scrub(text).replace("\0", "\\0").encode(errors="replace").decode()
    return cut(storable, max_bytes, keep_end=keep_end)


def unless_we_are_cancelled(error: BaseException) -> None:
    """A handler that lets a CancelledError slip out has a bug; but when this very task is being cancelled, the process is ending."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error


def _event_type_of(received: Received) -> str | None:
    """The header `ce_type`, which spares decoding what is not wanted."""
    return next((value.decode(errors="replace") for name, value in received.headers if name == "ce_type" and value is not None), None)


def _place(received: Received) -> dict[str, object]:
    """What log lines say about a record. `traceparent` is passed on as it came (W3C Trace Context)."""
    place: dict[str, object] = {"topic": received.topic, "partition": received.partition, "offset": received.offset}
    for name, value in received.headers:
        if name == "traceparent" and value is not None:
            place["traceparent"] = value.decode(errors="replace")[:64]
    return place


def _subject(message: Message) -> dict[str, object]:
    return {
        "order_id": message.order_id,
        "payment_id": message.payment_id,
        "event_id": message.event_id,
        "correlation_id": message.correlation_id,
        "event_type": message.event_type,
    }
