"""Our processes are killed while customers order: at each of their crash points, and at any moment. The promises hold afterwards.

A process lives as many lives as it has points. The next one begins while the orders of the one before are half done, so that a crash also comes into
the recovery from another one. Orders are named by the point that ended the life in which they began.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from itertools import count

import pytest

from tests.chaos.lives import WITHIN_S, Customers, Lives, customers_of, until_crashed
from tests.conftest import Infrastructure
from tests.integration.pipeline import Pipeline, eventually, opened_pipeline

pytestmark = [pytest.mark.race, pytest.mark.timeout(300)]

POINTS = {
    "payments": (
        "payments.after_begin:5",
        "gateway.after_create:5",
        "payments.after_remember:5",
        "gateway.after_confirm:5",
        "gateway.before_retrieve:2",
        "payments.before_record:5",
        "payments.after_record:5",
        "gateway.after_capture:1",
        "gateway.after_cancel:1",
        "timers.after_fire:1",
    ),
    "orders": ("orders.after_record:1",),
    "analytics": ("analytics.before_commit:2", "analytics.after_commit:1"),
    "relay": ("relay.before_begin:3", "relay.after_produce:3", "relay.before_commit:3", "relay.after_commit:3", "relay.after_mark:3"),
    "api": ("api.after_accept:5", "producer.before_send:5", "producer.after_ack:5", "api.after_produce:5"),
}
"""`name:n`: the n-th time that a life passes the point, which is when several orders are under way."""
KILLS = 3


@pytest.fixture(scope="module")
def lives(stack: Infrastructure, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """One pipeline for all tests of this file: starting six processes takes longer than most of them."""
    with opened_pipeline(stack, template_database, tmp_path_factory.mktemp("chaos"), latency="0.02..0.2") as pipeline:
        yield Lives(pipeline)


@pytest.mark.parametrize("process", POINTS)
async def test_a_process_that_dies_at_each_of_its_points(lives: Lives, process: str) -> None:
    async with customers_of(lives) as customers:
        await asyncio.to_thread(lives.now[process].stop)
        async with asyncio.TaskGroup() as ordering:
            for point in POINTS[process]:
                doomed = await asyncio.to_thread(lives.begin, process, point)
                ordering.create_task(customers.order(point.partition(":")[0].replace(".", "-"), payments=12))
                await until_crashed(doomed, point)
                if process == "api":  # else Redis holds the keys of the requests that died with it for half a minute
                    lives.wipe_redis()
            await asyncio.to_thread(lives.begin, process)
        await customers.check()


async def test_killed_at_any_moment_under_load(lives: Lives) -> None:
    """Twenty payments a second at a gateway that takes half a second for each call: the payments worker is killed three times, the relay once."""
    async with customers_of(lives) as customers:
        usual = await customers.bank.change(latency="0.5")
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as ordering:
            ordering.create_task(steadily(customers, enough))
            for kill in range(KILLS):
                await more_is_told(lives.pipeline, events=random.randrange(100, 200))
                for process in ("payments", "relay") if kill == 1 else ("payments",):
                    lives.now[process].kill()
                    assert lives.now[process].exit_code == -signal.SIGKILL
                    await asyncio.to_thread(lives.begin, process)
            await more_is_told(lives.pipeline, events=100)
            enough.set()
        await customers.bank.change(**usual)
        await customers.check()


async def steadily(customers: Customers, enough: asyncio.Event) -> None:
    """Twenty orders each second, whatever becomes of those before."""
    async with asyncio.TaskGroup() as ordering:
        for second in count():
            if enough.is_set():
                return
            ordering.create_task(customers.order(f"load-{second}", payments=20))
            await asyncio.sleep(1.0)


async def more_is_told(pipeline: Pipeline, events: int) -> None:
    """Wait until so many events more are on Kafka than now."""

    def told() -> int:
        ((number,),) = pipeline.query("SELECT count(*) FROM events WHERE published_at IS NOT NULL")
        return int(number)

    goal = told() + events

    async def reached() -> bool:
        return told() >= goal

    await eventually(reached, WITHIN_S, f"{events} events more")
