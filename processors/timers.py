"""What is to happen later: due timers become commands, and doubts are watched.

Rule: a timer is a row; claiming it deletes the row and writes its command to the outbox in one transaction, with an id that follows from the row: it
is given once, however many workers look. Each payments worker runs this beside its agent.
Flow: machine -> timers (table) -> run_timers -> outbox -> relay -> payment-commands -> handler.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from infra.clock import Clock
from infra.crash_points import at
from infra.database.delivery import Parking
from infra.database.payments import PaymentStore
from schemas.errors import Unavailable

log = structlog.get_logger()

FIRED: Final = Counter("paystream_timers_fired_total", "Timers that came due and were turned into commands")
UNKNOWN_AGE: Final = Gauge("paystream_unknown_attempt_age_seconds", "Age of the oldest attempt whose outcome is UNKNOWN; 0 if there is none")

ALERT_AFTER: Final = timedelta(days=3)
INBOX_KEPT: Final = timedelta(days=90)
"""Longer than any topic keeps a message, and longer than a dead letter may lie."""
_LOOK_EVERY_S: Final = 0.25
_FORGET_EVERY_S: Final = 3600.0
_WATCH_EVERY_S: Final = 5.0


async def run_timers(store: PaymentStore, clock: Clock) -> None:
    """Fire timers as they come due, for ever. While Postgres is away, none fires and none is lost."""
    while True:
        try:
            fired = await store.fire_timers(clock.now())
        except Unavailable as error:
            log.warning("timers wait", reason=error.detail)
            fired = 0
            await asyncio.sleep(_WATCH_EVERY_S)
        if fired:
            FIRED.inc(fired)
            await at("timers.after_fire")
        else:
            await asyncio.sleep(_LOOK_EVERY_S)


async def watch_doubts(store: PaymentStore, clock: Clock) -> None:
    """Keep the figure on what is UNKNOWN, for ever; say so loudly once a person has to look."""
    while True:
        try:
            since = await store.oldest_unknown()
        except Unavailable:
            await asyncio.sleep(_WATCH_EVERY_S)
            continue
        age = clock.now() - since if since else timedelta()
        UNKNOWN_AGE.set(age.total_seconds())
        if age > ALERT_AFTER:
            log.error("an attempt has been UNKNOWN for too long: ask the gateway's support", since=str(since), alert="unknown_attempt")
        await asyncio.sleep(_WATCH_EVERY_S)


async def forget_old_messages(parking: Parking, clock: Clock) -> None:
    """Keep the inbox from growing, for ever."""
    while True:
        try:
            await parking.forget(clock.now() - INBOX_KEPT)
        except Unavailable as error:
            log.warning("the inbox is not cleared", reason=error.detail)
        await asyncio.sleep(_FORGET_EVERY_S)
