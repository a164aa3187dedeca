"""The relay on real Kafka and Postgres: every row once, in order, whatever order transactions commit in, and whatever goes wrong around it."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client import REGISTRY

from infra.clock import SystemClock
from infra.crash_points import plugged
from infra.database.outbox import LEADER_LOCK, OutboxStore
from infra.database.pool import opened_pool
from infra.kafka_offsets import EndOffsets
from infra.settings import Relay, Settings
from producers import outbox_transactions
from producers.audit import audit
from producers.outbox_relay import OutboxRelay
from producers.outbox_transactions import OutboxTransactions
from schemas.codec import Codec
from schemas.errors import Unavailable
from schemas.messages import Event, OutboxPosition
from tests.outbox_writer import Connection, OutboxWriter, all_published, connected, insert_row, unpublished_count
from tests.topic_reader import read_topic

pytestmark = pytest.mark.integration

CODEC = Codec.unregistered()


@asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[OutboxStore]:
    async with opened_pool(settings.database, "test-relay") as pool:
        yield OutboxStore(pool, settings.database)


@asynccontextmanager
async def relay_running(settings: Settings, **options: Any) -> AsyncIterator[OutboxRelay]:
    """A relay in this process, cancelled at the end."""
    async with opened_store(settings) as store:
        transactions = OutboxTransactions(settings, options.pop("codec", lambda: CODEC), SystemClock(), **options)
        relay = OutboxRelay(store, transactions, settings.relay)
        running = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def is_true(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def events_of(settings: Settings, topic: str = "payment-events", codec: Codec = CODEC) -> dict[str, list[int]]:
    """The versions of each order, in the order in which a reader meets them."""
    versions: dict[str, list[int]] = defaultdict(list)
    for record in read_topic(settings, topic):
        event = codec.decode(record.value)
        assert isinstance(event, Event)
        versions[event.order_id].append(event.version)
    return dict(versions)


async def assert_exactly_once(settings: Settings, writer: OutboxWriter, codec: Codec = CODEC) -> None:
    """What was written is on both topics once and in order, and Postgres knows where."""
    expected = {order: list(range(1, last + 1)) for order, last in writer.versions.items()}
    brokers = EndOffsets(settings.kafka)
    for topic in ("payment-events", "payment-processing"):
        await brokers.settled(settings.prefix + topic, within_s=30)
        assert await asyncio.to_thread(events_of, settings, topic, codec) == expected
    async with opened_store(settings) as store:
        result = await audit(settings, codec, store)
    assert result.ok, result.findings
    assert (result.records, result.unmarked) == (writer.versions.total(), 0)


# ── In peace ──


async def test_every_row_once_and_in_order_under_load(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    orders = [f"order-{number}" for number in range(40)]

    async def write(first: int) -> None:
        async with await connected(installation) as conn:
            for round_ in range(12):
                for order in orders[first::4]:
                    await writer.append(conn, order, events=1 + round_ % 3)

    async with relay_running(installation):
        await asyncio.gather(*(write(first) for first in range(4)))
        await all_published(installation)
    assert writer.versions.total() == 40 * 12 * 2
    await assert_exactly_once(installation, writer)


async def test_a_row_that_is_committed_late_is_not_passed_over(installation: Settings) -> None:
    """Its number is lower than that of a row which has been published already."""
    writer = OutboxWriter(CODEC)
    async with relay_running(installation), await connected(installation) as slow, await connected(installation) as quick:
        async with slow.transaction():
            await writer.append(slow, "slow")
            await writer.append(quick, "quick")
            await all_published(installation)
        await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_a_record_arrives_as_it_was_written(installation: Settings) -> None:
    topics = ["payment-events-dlq", "payment-webhook-received"]
    headers = (("ce_type", b"x"), ("paystream-dlq-error", "für".encode()), ("ce_type", b""), ("nothing", None))
    async with relay_running(installation), await connected(installation) as conn:
        await insert_row(conn, topics, b"\xff\x00key", b"\x00value", headers, timestamp_ms=1_700_000_000_123)
        await insert_row(conn, topics[:1], None, None)
        await all_published(installation)
    first, second = await asyncio.to_thread(read_topic, installation, topics[0])
    assert (first.key, first.value, first.headers, first.timestamp_ms) == (b"\xff\x00key", b"\x00value", headers, 1_700_000_000_123)
    assert (second.key, second.value, second.headers) == (None, None, ())
    (copy,) = await asyncio.to_thread(read_topic, installation, topics[1])
    assert (copy.key, copy.value, copy.headers, copy.timestamp_ms) == (first.key, first.value, first.headers, first.timestamp_ms)


async def test_a_transaction_names_what_it_published(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with await connected(installation) as conn:
        await writer.append(conn, "o1", 3)
        await writer.append(conn, "o2", 2)
        async with relay_running(installation):
            await all_published(installation)
        (record,) = await asyncio.to_thread(read_topic, installation, "outbox-positions")
        position = CODEC.decode(record.value)
        assert isinstance(position, OutboxPosition)
        ids = [str(row[0]) for row in await (await conn.execute("SELECT id FROM outbox ORDER BY seq")).fetchall()]
    assert [named.split(" ")[0] for named in position.records] == [id_ for id_ in ids for _ in range(2)]
    on_topic = {(r.partition, r.offset) for r in await asyncio.to_thread(read_topic, installation, "payment-events")}
    named_places = {(int(p), int(o)) for _, topic, p, o in (named.split(" ") for named in position.records) if topic == "payment-events"}
    assert named_places == on_topic


async def test_one_relay_works_and_another_takes_over(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with await connected(installation) as conn:
        async with relay_running(installation) as first:
            await writer.append(conn, "o1")
            await all_published(installation)
            async with relay_running(installation) as second:
                await is_true(lambda: second.why_not_ready() is None)  # it stands by, which is all that is wanted of it
                await writer.append(conn, "o1")
                await all_published(installation)
                assert first.why_not_ready() is None
        async with relay_running(installation):
            await writer.append(conn, "o1")
            await all_published(installation)
    await assert_exactly_once(installation, writer)


# ── A row that Kafka refuses ──


async def test_what_is_refused_stops_the_relay_and_is_not_skipped(installation: Settings) -> None:
    """What stands before it is published, nothing behind it is, and when it is mended all goes on in order."""
    writer = OutboxWriter(CODEC)
    async with relay_running(installation) as relay, await connected(installation) as conn:
        async with conn.transaction():
            await writer.append(conn, "o1", 2)
            await insert_row(conn, ["not-there-yet"], b"o1", b"x")
            await writer.append(conn, "o1", 2)
        await is_true(lambda: "not-there-yet" in (relay.why_not_ready() or ""))
        assert await asyncio.to_thread(events_of, installation) == {"o1": [1, 2]}
        admin = AdminClient({"bootstrap.servers": installation.kafka.bootstrap_servers})
        for created in admin.create_topics([NewTopic(f"{installation.prefix}not-there-yet", 1, 1)]).values():
            created.result(10)
        await all_published(installation)
        assert relay.why_not_ready() is None
    await assert_exactly_once(installation, writer)


async def test_a_row_that_is_too_large_is_named(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with relay_running(installation) as relay, await connected(installation) as conn:
        async with conn.transaction():
            await writer.append(conn, "o1", 2)
            await insert_row(conn, ["payment-events-dlq"], b"o1", b"x" * 2_000_000)
            await writer.append(conn, "o1", 2)
        await is_true(lambda: "MSG_SIZE_TOO_LARGE" in (relay.why_not_ready() or ""))
        assert await asyncio.to_thread(events_of, installation) == {"o1": [1, 2]}
        await conn.execute("DELETE FROM outbox WHERE octet_length(value) > 1000000")
        await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_a_row_without_a_topic_is_named(installation: Settings) -> None:
    async with relay_running(installation) as relay, await connected(installation) as conn:
        await insert_row(conn, [], b"o1", b"x")
        await is_true(lambda: "names no topic" in (relay.why_not_ready() or ""))


# ── When it ends, when it begins ──


async def test_a_batch_is_finished_before_it_ends(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    async with await connected(installation) as conn, opened_store(installation) as store:
        await writer.append(conn, "o1", 2)
        transactions = OutboxTransactions(installation, lambda: CODEC, SystemClock(), opened=HeldProducer)
        async with next_commit_held() as held:
            running = asyncio.create_task(OutboxRelay(store, transactions, installation.relay).run())
            await is_true(held.is_set)
            running.cancel()
            assert not (await asyncio.wait([running], timeout=0.1))[0]
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await unpublished_count(conn) == 0
    await assert_exactly_once(installation, writer)


async def test_it_waits_for_the_registry(installation: Settings) -> None:
    writer = OutboxWriter(CODEC)
    asked = 0

    def codec_at_the_third_time() -> Codec:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise Unavailable("the schema registry")
        return CODEC

    async with relay_running(installation, codec=codec_at_the_third_time) as relay, await connected(installation) as conn:
        await is_true(lambda: "schema registry" in (relay.why_not_ready() or ""))
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        assert relay.why_not_ready() is None
    await assert_exactly_once(installation, writer)


# ── When it breaks ──


@pytest.mark.parametrize("point", ["relay.before_begin", "relay.after_commit", "relay.after_mark"])
async def test_a_failure_at_each_step(installation: Settings, point: str) -> None:
    writer = OutboxWriter(CODEC)
    met = 0

    async def fail_each_second_time(name: str) -> None:
        nonlocal met
        if name == point:
            met += 1
            if met % 2 == 0:
                raise Unavailable("Postgres", "planted")

    async with relay_running(installation), await connected(installation) as conn:
        with plugged(fail_each_second_time):
            for number in range(6):
                await writer.append(conn, f"o{number % 2}", 2)
                await all_published(installation)
    assert met >= 4
    await assert_exactly_once(installation, writer)


class DoubtfulProducer:
    """Its next commit raises, before or after it has really happened."""

    doubt: ClassVar[tuple[bool, KafkaError] | None] = None

    def __init__(self, config: dict[str, Any]) -> None:
        self._producer = confluent_kafka.Producer(config)

    def commit_transaction(self) -> None:
        doubt, DoubtfulProducer.doubt = DoubtfulProducer.doubt, None
        if doubt is None or doubt[0]:
            self._producer.commit_transaction()
        if doubt is not None:
            raise KafkaException(doubt[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


@pytest.mark.parametrize("committed", [True, False], ids=["it was committed", "it was not"])
@pytest.mark.parametrize(
    "error",
    [
        KafkaError(KafkaError._TIMED_OUT, "retriable", retriable=True),
        KafkaError(KafkaError._STATE, "abort", txn_requires_abort=True),
        KafkaError(KafkaError._FATAL, "fatal", fatal=True),
    ],
    ids=lambda error: error.str(),
)
async def test_a_commit_of_unknown_outcome(installation: Settings, error: KafkaError, committed: bool) -> None:
    writer = OutboxWriter(CODEC)
    async with relay_running(installation, opened=DoubtfulProducer), await connected(installation) as conn:
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        DoubtfulProducer.doubt = (committed, error)
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        assert DoubtfulProducer.doubt is None
    await assert_exactly_once(installation, writer)


class NarrowProducer:
    """Its transactions run out of time with more than twelve records."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._producer = confluent_kafka.Producer(config)
        self._records = 0

    def begin_transaction(self) -> None:
        self._records = 0
        self._producer.begin_transaction()

    def produce(self, *place: Any, **record: Any) -> None:
        self._records += 1
        self._producer.produce(*place, **record)

    def commit_transaction(self) -> None:
        if self._records > 12:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        self._producer.commit_transaction()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def with_a_short_queue(config: dict[str, Any]) -> Any:
    return confluent_kafka.Producer(config | {"queue.buffering.max.messages": 7})


@pytest.mark.parametrize("opened", [NarrowProducer, with_a_short_queue])
async def test_what_is_too_much_for_one_transaction_goes_in_several(installation: Settings, opened: Callable[[dict[str, Any]], Any]) -> None:
    writer = OutboxWriter(CODEC)
    async with await connected(installation) as conn:
        await writer.append(conn, "o1", 20)
        await writer.append(conn, "o2", 5)
        async with relay_running(installation, opened=opened):
            await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_after_a_slow_commit_another_producer_goes_on(installation: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = OutboxWriter(CODEC)
    opened = 0

    def counted(config: dict[str, Any]) -> Any:
        nonlocal opened
        opened += 1
        return confluent_kafka.Producer(config)

    async with relay_running(installation, opened=counted), await connected(installation) as conn:
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        monkeypatch.setattr(outbox_transactions, "SLOW_COMMIT_S", 0.0)
        before = opened
        await writer.append(conn, "o1", 2)
        await is_true(lambda: opened > before)
        monkeypatch.undo()
        await writer.append(conn, "o1", 2)
        await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_the_position_is_found_behind_many_transactions_that_were_aborted(installation: Settings) -> None:
    """Nothing is marked by a relay that is gone after its commit; then hundreds of aborted records and markers come between."""
    writer = OutboxWriter(CODEC)
    async with await connected(installation) as conn:
        await writer.append(conn, "o1", 2)
        transactions = OutboxTransactions(installation, lambda: CODEC, SystemClock())
        async with opened_store(installation) as store:
            await asyncio.to_thread(transactions.recover)
            await asyncio.to_thread(transactions.publish, await store.unpublished(10))
        await asyncio.to_thread(abort_transactions, installation, 200)
        async with relay_running(installation):
            await all_published(installation)
            await writer.append(conn, "o1", 2)
            await all_published(installation)
    await assert_exactly_once(installation, writer)


def abort_transactions(settings: Settings, times: int) -> None:
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "transactional.id": f"{settings.prefix}paystream-outbox-relay"}
    )
    producer.init_transactions(15)
    for _ in range(times):
        producer.begin_transaction()
        producer.produce(f"{settings.prefix}outbox-positions", key=b"relay", value=b"never committed")
        producer.flush(10)
        producer.abort_transaction(10)


class HeldProducer:
    """Its next commit waits until it is let go."""

    held: ClassVar[threading.Event | None] = None
    go_on: ClassVar[threading.Event] = threading.Event()

    def __init__(self, config: dict[str, Any]) -> None:
        self._producer = confluent_kafka.Producer(config)

    def commit_transaction(self) -> None:
        held, HeldProducer.held = HeldProducer.held, None
        if held is not None:
            held.set()
            assert HeldProducer.go_on.wait(60)
        self._producer.commit_transaction()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


@asynccontextmanager
async def next_commit_held() -> AsyncIterator[threading.Event]:
    """The event is set when a commit is held; it goes on at the end of the block."""
    HeldProducer.go_on.clear()
    held = HeldProducer.held = threading.Event()
    try:
        yield held
    finally:
        HeldProducer.go_on.set()


async def test_the_lock_is_lost_in_the_middle_of_a_transaction(installation: Settings) -> None:
    """Another relay takes over and publishes the same rows, while the first one is about to commit them."""
    writer = OutboxWriter(CODEC)
    async with relay_running(installation, opened=HeldProducer) as first, await connected(installation) as conn:
        await writer.append(conn, "o1", 2)
        await all_published(installation)
        async with next_commit_held() as held:
            await writer.append(conn, "o1", 2)
            await is_true(held.is_set)
            async with relay_running(installation) as second:
                await is_true(lambda: second.why_not_ready() is None)
                await end_connections(conn, LOCK_HOLDERS)
                await all_published(installation)
                HeldProducer.go_on.set()
                await writer.append(conn, "o1", 2)
                await all_published(installation)
                await is_true(lambda: first.why_not_ready() is None)
    await assert_exactly_once(installation, writer)


async def test_a_transaction_that_takes_longer_than_it_may(installation: Settings) -> None:
    """Kafka has aborted it by the time that it is to be committed."""
    writer = OutboxWriter(CODEC)
    short = installation.model_copy(update={"relay": Relay(transaction_timeout_ms=1000)})
    brokers = EndOffsets(installation.kafka)
    async with relay_running(short, opened=HeldProducer), await connected(installation) as conn:
        async with next_commit_held() as held:
            await writer.append(conn, "o1", 2)
            await is_true(held.is_set)
            await brokers.settled(f"{installation.prefix}payment-events", within_s=30)  # aborted, as nobody has committed it
        await all_published(installation)
    await assert_exactly_once(installation, writer)


LOCK_HOLDERS = "application_name = 'paystream-outbox-leader' AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)"


async def end_connections(conn: Connection, which: str) -> None:
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND " + which
    await conn.execute(query.encode())


@pytest.mark.parametrize("which", [LOCK_HOLDERS, "true"], ids=["of the lock", "all of them"])
async def test_postgres_ends_connections(installation: Settings, which: str) -> None:
    writer = OutboxWriter(CODEC)
    async with relay_running(installation), await connected(installation) as conn:
        for number in range(12):
            await writer.append(conn, f"o{number % 3}", 2)
            if number % 4 == 1:
                await end_connections(conn, which)
        await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_without_the_lock_nothing_is_published(installation: Settings) -> None:
    """Somebody else has taken the lock meanwhile; all other connections of the relay live."""
    writer = OutboxWriter(CODEC)
    async with relay_running(installation) as relay, await connected(installation) as conn, await connected(installation) as other:
        await writer.append(conn, "o1")
        await all_published(installation)
        taking = asyncio.create_task(other.execute("SELECT pg_advisory_lock(%s)", [LEADER_LOCK]))
        while not (await (await conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")).fetchone() or (0,))[0]:
            await asyncio.sleep(0.01)
        await end_connections(conn, LOCK_HOLDERS)
        await taking
        await is_true(lambda: REGISTRY.get_sample_value("paystream_relay_leading") == 0)
        await writer.append(conn, "o1")
        await is_true(lambda: relay.why_not_ready() is None)
        assert await unpublished_count(conn) == 1
        await other.close()
        await all_published(installation)
    await assert_exactly_once(installation, writer)


async def test_an_idle_relay_keeps_the_lock(installation: Settings) -> None:
    """It shows that it lives more often than the lease asks for."""
    async with relay_running(installation) as relay, await connected(installation) as conn:
        await is_true(lambda: relay.why_not_ready() is None)
        query = "SELECT pid, extract(epoch FROM now() - state_change) FROM pg_stat_activity WHERE datname = current_database() AND " + LOCK_HOLDERS
        holders: set[int] = set()
        silent: list[float] = []
        async with asyncio.timeout(20):
            while len(silent) < 2 or silent[-1] >= silent[-2]:  # until it has spoken again
                for pid, since in await (await conn.execute(query.encode())).fetchall():
                    holders.add(pid)
                    silent.append(float(since))
                await asyncio.sleep(0.2)
    assert len(holders) == 1
    assert max(silent) < 5
