"""Our processes are killed while customers order: at each of their crash points, and at any moment. The promises hold afterwards.

A process lives as many lives as it has points. The next one begins while the orders of the one before are half done, so that a crash also comes into
the recovery from another one; orders are named by the point that ended the life in which they began.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from itertools import count

import pytest

from infra.local.stack import Stack
from tests.chaos.pipeline import PROCESSES, WITHIN_S, Customers, Pipeline, opened_pipeline, until_crashed
from tests.conftest import own_database, own_topics

pytestmark = pytest.mark.race

POINTS = {
    "payments": (
        "payments.after_begin:5",
        "gateway.after_create:5",
        "payments.after_remember:5",
        "gateway.after_confirm:5",
        "gateway.before_retrieve:3",
        "payments.before_record:5",
        "payments.after_record:5",
        "gateway.after_capture:1",
        "gateway.after_cancel:1",
        "timers.after_fire:1",
    ),
    "orders": ("orders.after_record:5",),
    "analytics": ("analytics.before_commit:2", "analytics.after_commit:2"),
    "relay": ("relay.before_begin:3", "relay.after_produce:3", "relay.before_commit:3", "relay.after_commit:3", "relay.after_mark:3"),
    "api": ("api.after_accept:5", "producer.before_send:5", "producer.after_ack:5", "api.after_produce:5"),
}
"""`name:n`: the n-th time that a life passes the point, which is when several orders are under way."""
KILLS = 3


@pytest.fixture(scope="module")
def pipeline(stack: Stack, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """One for all tests of this file: starting six processes takes longer than most of them."""
    with own_database(stack, template_database) as database, own_topics(database), opened_pipeline(database, tmp_path_factory.mktemp("chaos")) as opened:
        yield opened


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_process_that_dies_at_each_of_its_points(pipeline: Pipeline, process: str) -> None:
    async with pipeline.customers() as customers:
        await asyncio.to_thread(pipeline.lives[process].stop)
        async with asyncio.TaskGroup() as ordering:
            for point in POINTS[process]:
                doomed = await asyncio.to_thread(pipeline.start, process, point)
                ordering.create_task(customers.order(point.partition(":")[0].replace(".", "-"), payments=12))
                await until_crashed(doomed, point)
                if process == "api":  # it held the keys of requests there for half a minute
                    pipeline.wipe_redis()
            await asyncio.to_thread(pipeline.start, process)
        await customers.check()


async def test_killed_at_any_moment_under_load(pipeline: Pipeline) -> None:
    """Twenty payments a second at a gateway that takes half a second for each call."""
    async with pipeline.customers() as customers:
        was = await customers.bank.change(latency="0.5")
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as ordering:
            load = ordering.create_task(steadily(customers, enough))
            for kill in range(KILLS):
                await moved_on(pipeline, by=random.randrange(100, 200))
                for process in ("payments", "relay") if kill == 1 else ("payments",):
                    ended = pipeline.lives[process]
                    ended.kill()
                    assert ended.exit_code == -signal.SIGKILL
                    await asyncio.to_thread(pipeline.start, process)
            await moved_on(pipeline, by=100)
            enough.set()
            await load
        await customers.bank.change(**was)
        await customers.check()


async def steadily(customers: Customers, enough: asyncio.Event) -> None:
    """Twenty orders each second, whatever became of those before."""
    async with asyncio.TaskGroup() as ordering:
        for second in count():
            if enough.is_set():
                return
            ordering.create_task(customers.order(f"load-{second}", payments=20))
            await asyncio.sleep(1.0)


async def moved_on(pipeline: Pipeline, by: int) -> None:
    """Wait until so many events more are on Kafka than now."""
    published = "SELECT count(*) FROM events WHERE published_at IS NOT NULL"
    ((goal,),) = pipeline.query(published)
    async with asyncio.timeout(WITHIN_S):
        while pipeline.query(published)[0][0] < goal + by:
            await asyncio.sleep(0.05)
