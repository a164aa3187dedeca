"""One kind of load after the other on a running stack, and what was measured under each.

Rule: a phase begins when nothing is left of the one before it: no payment without outcome, no webhook to be delivered. The sandbox takes its latency
for each call meanwhile, and answers as fast as before again at the end, whatever happens.
Flow: warm-up -> intake -> overhead -> sustained -> flat out -> serial agent -> Measured.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from api.cli.bench.load import Accepted, Load, ending_together
from api.cli.bench.outcomes import Outcomes
from api.cli.bench.processes import Processes
from infra.local.client import Bank, Caller, Session, scraped
from infra.local.process import Program, http_answers
from infra.local.stack import Stack
from schemas.errors import PaystreamError, Unavailable

_DRAINS_WITHIN_S: Final = 120.0
_LOOK_EVERY_S: Final = 0.05
_SAMPLE_EVERY_S: Final = 1.0
_SERIAL_PAYMENTS: Final = 15
_FLAT_OUT_CALLERS: Final = 32
_ON_THE_WAY: Final = ("create", "confirm")
"""The gateway's calls that a payment waits for."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for: requests a second, and seconds."""

    intake_rate: float = 50
    overhead_rate: float = 30
    sustained_rate: float = 80
    latency_s: float = 1.0
    seconds: float = 60
    """Of the sustained load. The others take a third of it."""

    @property
    def settled_s(self) -> float:
        """When the sustained load has filled the pipeline: what comes later is compared with what was then."""
        return max(self.seconds / 4, min(3 * self.latency_s, self.seconds / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sustained:
    """The sustained load: per second since it began, how many payments had been accepted and not completed, and the memory of each process in MB."""

    backlog: list[int]
    memory_mb: list[dict[str, float]]
    completed_per_s: float
    cpu_ms: dict[str, float]
    """CPU of each process for a payment, with its webhooks, until nothing was left to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Latencies in seconds, sorted."""

    intake: list[float]
    overhead: list[float]
    sustained: Sustained
    flat_out_per_s: float
    serial_per_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What the phases work with."""

    stack: Stack
    session: Session
    caller: Caller
    bank: Bank
    outcomes: Outcomes
    run: str
    tell: Tell

    async def measured(self, plan: Plan) -> Measured:
        """All phases, in their order. Raises PaystreamError when one can't be measured, with the reason."""
        async with self._latency(plan.latency_s):
            await self._phase("warming up", plan.overhead_rate, plan.seconds / 6)
            accepted = await self._phase("intake", plan.intake_rate, plan.seconds / 3)
            intake = sorted(payment.answered - payment.due for payment in accepted)
            overhead = sorted(await self._overhead(plan))
            sustained = await self._sustained(plan)
            flat_out = await self._flat_out(plan.seconds / 12)
            serial = await self._serial()
        return Measured(intake=intake, overhead=overhead, sustained=sustained, flat_out_per_s=flat_out, serial_per_s=serial)

    @asynccontextmanager
    async def _latency(self, seconds: float) -> AsyncIterator[None]:
        before = await self.bank.change(latency=str(seconds))
        try:
            yield
        finally:
            await self.bank.change(latency=before["latency"])

    async def _phase(self, name: str, rate: float, seconds: float) -> list[Accepted]:
        """Requests at a rate, until all that they began has come to its end."""
        self.tell(f"{name}: {rate:.0f} requests a second for {seconds:.0f} s")
        load = self._load(name)
        await load.at_rate(rate, seconds)
        await self._drained(load)
        return load.accepted

    async def _overhead(self, plan: Plan) -> list[float]:
        """For each payment: completion readable, minus request due, minus the latency that the sandbox added to the calls on its way.

        All have as many calls; one that had to be repeated is overhead.
        """
        calls_before = await self._calls()
        accepted = await self._phase("overhead", plan.overhead_rate, plan.seconds / 3)
        added = round((await self._calls() - calls_before) / len(accepted)) * plan.latency_s
        return [self.outcomes.readable[payment.payment_id] - payment.due - added for payment in accepted]

    async def _calls(self) -> float:
        """How many calls the payments worker has made that payments wait for."""
        url = next(standing.url for standing in self.stack.status() if standing.name == "worker-payments")
        samples = await scraped(self.session, url)
        wanted = [s for s in samples if s.name == "paystream_gateway_call_seconds_count" and s.labels["operation"] in _ON_THE_WAY]
        return sum(sample.value for sample in wanted)

    async def _sustained(self, plan: Plan) -> Sustained:
        self.tell(f"sustained: {plan.sustained_rate:.0f} requests a second for {plan.seconds:.0f} s")
        processes, load = Processes(self.stack), self._load("sustained")
        memory: list[dict[str, float]] = []
        cpu_before, begun = processes.cpu_s(), time.perf_counter()
        async with ending_together() as beside:
            sampling = beside.create_task(self._sample(processes, memory))
            await load.at_rate(plan.sustained_rate, plan.seconds)
            await self._drained(load)
            sampling.cancel()
        cpu = processes.cpu_s()
        due = [payment.due - begun for payment in load.accepted]
        done = [self.outcomes.readable[payment.payment_id] - begun for payment in load.accepted]
        completed = sum(plan.settled_s <= at <= plan.seconds for at in done)
        return Sustained(
            backlog=[sum(at <= second for at in due) - sum(at <= second for at in done) for second in range(int(plan.seconds) + 1)],
            memory_mb=memory,
            completed_per_s=completed / (plan.seconds - plan.settled_s),
            cpu_ms={name: 1000 * (cpu[name] - cpu_before[name]) / len(due) for name in cpu},
        )

    async def _sample(self, processes: Processes, memory: list[dict[str, float]]) -> None:
        while True:
            memory.append(await asyncio.to_thread(processes.memory_mb))
            await asyncio.sleep(_SAMPLE_EVERY_S)

    async def _flat_out(self, seconds: float) -> float:
        """The most that the intake accepts in a second."""
        self.tell(f"flat out: {_FLAT_OUT_CALLERS} callers for {seconds:g} s")
        load, begun = self._load("flat out"), time.perf_counter()
        await load.flat_out(_FLAT_OUT_CALLERS, seconds)
        rate = len(load.accepted) / (time.perf_counter() - begun)
        await self._drained(load)
        return rate

    async def _serial(self) -> float:
        """Payments a second with a plain agent in the worker's place."""
        self.tell(f"serial agent: {_SERIAL_PAYMENTS} payments, one after the other")
        load, home = self._load("serial"), self.stack.home
        url = f"http://127.0.0.1:{home.ports['worker_payments']}"
        serial = Program(
            name="serial-worker",
            command=(sys.executable, "-m", "api.cli.bench.serial_worker", str(os.getpid())),
            log=home.log("serial-worker"),
            ready=partial(http_answers, f"{url}/readyz"),
            url=url,
            environment=self.stack.environment() | {"PAYSTREAM_WORKER__ADMIN_PORT": str(home.ports["worker_payments"])},
        )
        with self.stack.without("worker-payments"):
            serial.start()
            try:
                await asyncio.to_thread(serial.wait_ready)
                begun = time.perf_counter()
                await load.together(_SERIAL_PAYMENTS)
                await self._drained(load)
            finally:
                await asyncio.to_thread(serial.stop)
        return _SERIAL_PAYMENTS / (max(self.outcomes.readable[payment.payment_id] for payment in load.accepted) - begun)

    def _load(self, phase: str) -> Load:
        return Load(self.caller, f"{self.run}-{phase.replace(' ', '-')}")

    async def _drained(self, load: Load) -> None:
        """Wait until all that was accepted is completed and no webhook is left. Raises PaystreamError if it is not in time, or one failed."""
        ends = time.monotonic() + _DRAINS_WITHIN_S
        waiting = {payment.payment_id for payment in load.accepted}
        while waiting := {payment_id for payment_id in waiting if payment_id not in self.outcomes.readable}:
            if self.outcomes.failure is not None:
                raise self.outcomes.failure
            if failed := waiting & self.outcomes.failed:
                raise PaystreamError(f"payment {failed.pop()} has failed: is the sandbox told to decline?")
            if time.monotonic() > ends:
                raise Unavailable("the pipeline", f"{len(waiting)} payments had no outcome after {_DRAINS_WITHIN_S:.0f} s")
            await asyncio.sleep(_LOOK_EVERY_S)
        while await self.bank.pending_webhooks():
            if time.monotonic() > ends:
                raise Unavailable("the pipeline", f"webhooks were left after {_DRAINS_WITHIN_S:.0f} s")
            await asyncio.sleep(_LOOK_EVERY_S)
