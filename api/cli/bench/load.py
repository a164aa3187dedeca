"""Callers of the intake, in two kinds: on a schedule, and as fast as it answers.

Rule: on a schedule a request begins when it is due, whether or not those before it are answered, and its time counts from when it was due. So a
pause of the intake shows in the latency of all that fell into it, as their callers would feel it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from infra.local.client import Caller
from schemas.errors import PaystreamError

_BODY: Final = {"amount_minor": 1999, "currency": "EUR", "payment_method": "pm_card_visa"}


@dataclass(frozen=True, slots=True)
class Accepted:
    """A payment that the intake has answered with 202. Times are `time.perf_counter`'s."""

    payment_id: str
    due: float
    answered: float


class Load:
    """The requests of one run: each a payment of its own order, with a card that is charged. `accepted` grows while they are answered."""

    def __init__(self, caller: Caller, run: str) -> None:
        self._caller, self._run, self._number = caller, run, 0
        self.accepted: list[Accepted] = []

    async def at_rate(self, rate: float, seconds: float) -> None:
        """`rate` requests a second, evenly; returns when all are answered."""
        begun = time.perf_counter()
        async with ending_together() as requests:
            for number in range(max(1, round(rate * seconds))):
                due = begun + number / rate
                await asyncio.sleep(due - time.perf_counter())
                requests.create_task(self._pay(due))

    async def together(self, count: int) -> None:
        """So many at once."""
        now = time.perf_counter()
        async with ending_together() as requests:
            for _ in range(count):
                requests.create_task(self._pay(now))

    async def flat_out(self, callers: int, seconds: float) -> None:
        """So many callers, each with its next request as soon as the one before is answered."""
        ends = time.perf_counter() + seconds

        async def one_after_another() -> None:
            while (now := time.perf_counter()) < ends:
                await self._pay(now)

        async with ending_together() as requests:
            for _ in range(callers):
                requests.create_task(one_after_another())

    async def _pay(self, due: float) -> None:
        self._number += 1
        name = f"bench-{self._run}-{self._number}"
        answer = await self._caller.post("/payments/process", {"order_id": name, **_BODY}, key=name)
        if answer.status != 202:
            raise PaystreamError(f"the intake answered {answer.status} where 202 was expected: {answer.body.get('detail', answer.body)}")
        self.accepted.append(Accepted(answer.body["payment_id"], due, time.perf_counter()))


@asynccontextmanager
async def ending_together() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that end together: the first that fails ends the others, and is what is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
