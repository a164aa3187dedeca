"""Faust's Kafka consumer with the repairs that this product can't do without. Importing this module makes `paystream://host:port` a broker URL.

Rule: an offset is committed only when every message below it is finished; and a worker gives partitions back only after it has committed what it
finished of them. Each repair can be switched off (`Repairs`): a test on a real broker shows what goes wrong then.
Flow: aiokafka (a thread of its own) -> Consumer -> Faust's stream -> agent -> keyed window -> acknowledged here -> committed by Faust's timer.

1. *Commit the lowest offset that is not acknowledged.* Faust commits the first run of consecutive offsets: it stalls behind the first transaction
   marker, and commits over a gap where nothing was committed before.
2. *Drain before giving back.* Faust forgets what was acknowledged before it commits it, and then waits without a limit for messages that nobody
   finishes.
3. *Read committed.* Faust has no setting for it.
4. *Range assignor.* Partition i of every topic goes to one worker, so that one window sees all of an order.

Beside them, and always on: a fetch does not reach across a rebalance (`_fetch_records`), what dies in aiokafka ends the process instead of going on
without it (`on_start`), and messages are passed on at less cost (`_drain_messages`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiokafka
import structlog
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from infra.telemetry import end_process

log = structlog.get_logger()

SCHEME: Final = "paystream"
_WORTH_A_FETCH: Final = 64 * 1024
"""So many bytes are passed on at once; with fewer, the broker waits for more for as long as the group allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """Which repairs are on. Only tests switch one off, to see it missed."""

    lowest_unacknowledged: bool = True
    drain: bool = True
    read_committed: bool = True
    range_assignor: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a partition is: the offset that is read next, the committed one, and when it was committed (or the partition assigned)."""

    position: int | None
    committed: int | None
    committed_at: float


class Delivered:
    """The offsets of one partition that were delivered since it was assigned and are not acknowledged, and how far it may be committed."""

    def __init__(self) -> None:
        self._open: deque[int] = deque()
        self._highest: int | None = None

    def add(self, offset: int) -> bool:
        """Note a delivery. False if it was delivered before: it is on its way, or done."""
        if self._highest is not None and offset <= self._highest:
            return False
        self._highest = offset
        self._open.append(offset)
        return True

    def committable(self, acknowledged: set[int]) -> int | None:
        """The lowest offset that is not acknowledged, the next one to come if all are; None before the first. What it passes leaves the set.

        Offsets that never come (transaction markers, aborted or compacted records) don't count.
        """
        while self._open and self._open[0] in acknowledged:
            acknowledged.remove(self._open.popleft())
        if self._open:
            return self._open[0]
        return None if self._highest is None else self._highest + 1


class ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]  # Faust has no types
    """The thread that aiokafka runs in."""

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        repairs: Repairs = self.app.repairs
        if repairs.read_committed:
            consumer._isolation_level = "read_committed"
        if repairs.range_assignor:
            consumer._partition_assignment_strategy = [RangePartitionAssignor]
        consumer._fetch_min_bytes = _WORTH_A_FETCH
        consumer._fetch_max_wait_ms = self.app.fetch_wait_ms
        return consumer

    async def on_start(self) -> None:
        """Start the client, and let nothing of it die unseen.

        aiokafka keeps its errors for callers of its own `getmany`, which Faust does not use, and waits until they are fetched: a worker would go on
        reading what is not its own any more, and never answer a rebalance.
        """
        await super().on_start()
        coordinator, fetcher = self._consumer._coordinator, self._consumer._fetcher
        coordinator._push_error_to_user = end_process
        for task in (coordinator._coordination_task, fetcher._fetch_task):
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            end_process(error)

    async def crash(self, reason: BaseException) -> None:
        """A commit was refused, or the thread itself failed."""
        end_process(reason)

    async def _fetch_records(self, consumer: aiokafka.AIOKafkaConsumer, *args: Any, **kwargs: Any) -> Mapping[Any, list[Any]]:
        """Fetch, but across no rebalance: records of the new assignment must not come before its flow is resumed.

        Faust would throw them away and seek to the committed offset, which does nothing where none is committed yet. They would be lost.
        """
        before = _assignment(consumer)
        records: Mapping[Any, list[Any]] = await super()._fetch_records(consumer, *args, **kwargs)
        if records and (not self.consumer.flow_active or _assignment(consumer) is not before):
            for partition, batch in records.items():
                consumer._fetcher.seek_to(partition, batch[0].offset)
            return {}
        return records

    def positions(self) -> dict[TP, int]:
        """The offset that is read next, of each partition where it is known."""
        assignment = _assignment(self._consumer) if self._consumer is not None else None
        if assignment is None:
            return {}
        states = {partition: assignment.state_value(partition) for partition in assignment.tps}
        return {ensure_TP(partition): state.position for partition, state in states.items() if state.has_valid_position}


def _assignment(consumer: aiokafka.AIOKafkaConsumer) -> Any:
    subscription = consumer._subscription.subscription
    return subscription.assignment if subscription is not None else None


class Consumer(driver.Consumer):  # type: ignore[misc]  # Faust has no types
    """Faust's consumer, in the worker's event loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._delivered: dict[TP, Delivered] = {}
        self._generations: dict[TP, int] = {}
        self.settled = False
        """Is this worker in the group, and no rebalance under way? It may have no partition."""
        self.committed_at: dict[TP, float] = {}
        """When a partition was assigned, or a commit of it last succeeded (`time.monotonic`)."""
        super().__init__(*args, **kwargs)
        self._repairs: Repairs = self.app.repairs

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def stale(self, message: ConsumerMessage) -> bool:
        """Is the message's partition being given back, or was it since it was read?"""
        return self._repairs.drain and (not self.settled or self._was_given_back(message))

    def _was_given_back(self, message: ConsumerMessage) -> bool:
        generation: int = message.generation_id
        return self._generations.get(message.tp) != generation

    # ── Reading ──

    async def _drain_messages(self, fetcher: Any) -> None:
        """Faust's reading loop, without the tree of gaps that only its own `_new_offset` clears, and at half the CPU.

        Faust makes four tasks for each message, to be able to drop the one at hand when a rebalance begins. Here that one waits until the flow is
        resumed; it is stale by then.
        """
        if not self._repairs.lowest_unacknowledged:
            await super()._drain_messages(fetcher)
            return
        try:
            while not (self.should_stop or fetcher.should_stop):
                async for tp, message in self.getmany(timeout=1.0):
                    await self.callback(message)
                    self._read_offset[tp] = message.offset
        except (*self.consumer_stopped_errors, asyncio.CancelledError):
            if not self.app.should_stop:
                raise

    def on_buffer_full(self, tp: TP) -> None:
        """Nothing: the loop waits for room in the stream's queue. Faust would not read this partition, and look again after up to a second."""

    # ── 1: what may be committed ──

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        async for tp, message in super().getmany(timeout):
            if self._delivered[ensure_TP(tp)].add(message.offset) or not self._repairs.lowest_unacknowledged:
                yield tp, message

    def ack(self, message: ConsumerMessage) -> bool:
        """Acknowledge, unless the partition was given back: whoever has it now decides what is committed."""
        if self._repairs.drain and self._was_given_back(message):
            return False
        acknowledged: bool = super().ack(message)
        return acknowledged

    def _new_offset(self, tp: TP) -> int | None:
        if not self._repairs.lowest_unacknowledged:
            offset: int | None = super()._new_offset(tp)
            return offset
        self._acked[tp].clear()  # Faust's own list of what `_acked_index` holds too
        delivered = self._delivered.get(tp)
        return delivered.committable(self._acked_index[tp]) if delivered is not None else None

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        committed: bool = await super()._commit(offsets)
        if committed:
            self.committed_at.update(dict.fromkeys(offsets, time.monotonic()))
        return committed

    # ── 2: giving partitions back ──

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """A rebalance begins: all partitions are given back (aiokafka's protocol is the eager one)."""
        await self._give_back()
        await super().on_partitions_revoked(revoked)
        self._generations.clear()
        self._delivered.clear()
        self.committed_at.clear()

    async def wait_empty(self) -> None:
        """Faust calls this when it stops, and after a revocation, when nothing is left to do."""
        await self._give_back()
        if not self._repairs.drain:
            await super().wait_empty()

    async def _give_back(self) -> None:
        """Stop reading, finish what runs, commit; all within the deadline, because the group waits for us, and thinks us dead after its own."""
        was_settled, self.settled = self.settled, False
        if not was_settled or not self._repairs.drain:
            return
        self.stop_flow()
        self.app.flow_control.suspend()
        started = time.monotonic()
        left = await self.app.window.drain(self._delivered, self.app.drain_s)
        if left:
            log.warning("partitions given back with messages still running", messages=[f"{event.partition} {event.offset}" for event in left])
        try:
            async with asyncio.timeout(max(1.0, self.app.drain_s - (time.monotonic() - started))):
                await self._commit_finished()
        except TimeoutError:
            log.warning("partitions given back before the commit was confirmed: the next owner will get finished messages again")
        self._unacked_messages.clear()

    async def _commit_finished(self) -> None:
        """Commit once more after a commit that may be under way: that one began before the last messages were finished."""
        while self._commit_fut is not None:
            await self.maybe_wait_for_commit_to_finish()
        await self.commit()

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._delivered = {tp: Delivered() for tp in assigned}
        self._generations = dict.fromkeys(assigned, generation_id)
        self.committed_at = dict.fromkeys(assigned, time.monotonic())
        self.settled = True
        await super().on_partitions_assigned(assigned, generation_id)

    def resume_flow(self) -> None:
        """Read on; but not between giving back and getting anew, where the recovery of the rebalance before may still ask for it."""
        if self.settled or not self._repairs.drain:
            super().resume_flow()

    # ── What can be seen from outside ──

    def standing(self) -> dict[TP, Standing]:
        """How far each assigned partition is."""
        positions = self._thread.positions()
        return {
            tp: Standing(position=positions.get(tp), committed=self._committed_offset[tp], committed_at=self.committed_at[tp])
            for tp in self.committed_at
        }


class Transport(driver.Transport):  # type: ignore[misc]  # Faust has no types
    """What Faust finds under `paystream://`."""

    Consumer = Consumer


TRANSPORTS.aliases[SCHEME] = f"{__name__}:Transport"
