"""The consumer groups that there are: what the worker of each opens and does.

Rule: everything a handler works with is made here and handed to it; nothing is a global. A group is one function and one line in the table.
Flow: `paystream worker GROUP` -> GROUPS[group] -> Work -> processors/app.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from infra.clock import SystemClock
from infra.database.delivery import Group
from infra.database.parking import PostgresParking
from infra.database.payments import PostgresPaymentStore
from infra.database.pool import opened_pool
from infra.gateways.table import opened_gateways
from infra.redis import Outcomes, connect
from infra.schema_registry import load_codec
from infra.settings import Settings
from processors.app import Compose, Work
from processors.payments import agent as payments_agent
from processors.payments import handler as payments_handler
from processors.timers import run_timers, watch_doubts
from schemas.topics import destinations


@asynccontextmanager
async def payments(settings: Settings) -> AsyncIterator[Work]:
    """The payment state machine: commands and webhooks in, facts out, and its timers."""
    clock, codec = SystemClock(), load_codec(settings)
    async with opened_pool(settings.database, settings.service) as pool, opened_gateways(settings) as gateways:
        store = PostgresPaymentStore(pool, codec, destinations, clock)
        outcomes = Outcomes(connect(settings.redis), settings.prefix)
        deps = payments_handler.Deps(
            store=store,
            gateways=gateways,
            clock=clock,
            announce=outcomes.announce,
            budget_s=settings.worker.handler_budget_s,
            call_timeout_s=settings.stripe.timeout_s,
        )
        yield Work(
            register=payments_agent.register,
            topics=payments_agent.TOPICS,
            codec=codec,
            parking=PostgresParking(pool, clock),
            handle=partial(payments_handler.handle, deps=deps),
            services=(lambda: run_timers(store, clock), lambda: watch_doubts(store, clock)),
        )
        await outcomes.aclose()


GROUPS: Final[Mapping[Group, Compose]] = {
    Group.PAYMENTS: payments,
}
