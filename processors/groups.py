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
from infra.database.analytics import AnalyticsStore
from infra.database.delivery import Group
from infra.database.orders import PostgresOrderStore
from infra.database.parking import PostgresParking
from infra.database.payments import PostgresPaymentStore
from infra.database.pool import opened_pool
from infra.gateways.table import opened_gateways
from infra.redis import Line, Outcomes
from infra.schema_registry import load_codec
from infra.settings import Settings
from processors.analytics import agent as analytics_agent
from processors.analytics import handler as analytics_handler
from processors.app import Batches, Compose, Work
from processors.orders import agent as orders_agent
from processors.orders import handler as orders_handler
from processors.orders.machine import WANTED
from processors.payments import agent as payments_agent
from processors.payments import handler as payments_handler
from processors.timers import forget_old_messages, run_timers, watch_doubts
from schemas.topics import destinations


@asynccontextmanager
async def payments(settings: Settings) -> AsyncIterator[Work]:
    """The payment state machine: commands and webhooks in, facts out, and its timers."""
    clock, codec = SystemClock(), load_codec(settings)
    async with opened_pool(settings.database, settings.service, by_key=True) as pool, opened_gateways(settings) as gateways:
        store = PostgresPaymentStore(pool, codec, destinations, clock)
        parking = PostgresParking(pool, clock)
        outcomes = Outcomes(Line(settings.redis), settings.prefix)
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
            parking=parking,
            handler=partial(payments_handler.handle, deps=deps),
            services=(lambda: run_timers(store, clock), lambda: watch_doubts(store, clock), lambda: forget_old_messages(parking, clock)),
        )
        await outcomes.aclose()


@asynccontextmanager
async def orders(settings: Settings) -> AsyncIterator[Work]:
    """Orders follow their payments, in batches."""
    clock, codec = SystemClock(), load_codec(settings)
    async with opened_pool(settings.database, settings.service, by_key=True) as pool:
        deps = orders_handler.Deps(store=PostgresOrderStore(pool, codec, destinations, clock), clock=clock)
        yield Work(
            register=orders_agent.register,
            topics=orders_agent.TOPICS,
            fetch_wait_ms=orders_agent.FETCH_WAIT_MS,
            codec=codec,
            parking=PostgresParking(pool, clock),
            handler=Batches(partial(orders_handler.handle_batch, deps=deps), orders_agent.BATCH),
            wanted=WANTED,
        )


@asynccontextmanager
async def analytics(settings: Settings) -> AsyncIterator[Work]:
    """Views on what happened, in batches."""
    clock, codec = SystemClock(), load_codec(settings)
    async with opened_pool(settings.database, settings.service, by_key=True) as pool:
        deps = analytics_handler.Deps(store=AnalyticsStore(pool, clock), clock=clock)
        yield Work(
            register=analytics_agent.register,
            topics=analytics_agent.TOPICS,
            fetch_wait_ms=analytics_agent.FETCH_WAIT_MS,
            codec=codec,
            parking=PostgresParking(pool, clock),
            handler=Batches(partial(analytics_handler.handle_batch, deps=deps), analytics_agent.BATCH),
        )


GROUPS: Final[Mapping[Group, Compose]] = {
    Group.PAYMENTS: payments,
    Group.ORDERS: orders,
    Group.ANALYTICS: analytics,
}
