"""Each repair of the transport on a real broker, and what happens without it."""

from __future__ import annotations

from itertools import count

import pytest
from confluent_kafka import Producer

from processors.payments.agent import TOPICS
from tests.integration.machinery import PARTITIONS, Machinery, until

pytestmark = pytest.mark.integration


class Transactions:
    """Sends messages in Kafka transactions, as the relay does."""

    def __init__(self, machinery: Machinery) -> None:
        self._machinery = machinery
        config = {"bootstrap.servers": machinery.settings.kafka.bootstrap_servers, "partitioner": "murmur2_random", "log_level": 0}
        self._producer = Producer({**config, "transactional.id": f"{machinery.settings.prefix}test"})
        self._producer.init_transactions(20)

    def commit(self, *orders: str) -> None:
        self._producer.begin_transaction()
        for order in orders:
            self._machinery.send(order, producer=self._producer)
        self._producer.commit_transaction(20)

    def abort(self, *orders: str) -> None:
        self._producer.begin_transaction()
        for order in orders:
            self._machinery.send(order, producer=self._producer)
        self._producer.flush(10)
        self._producer.abort_transaction(20)


def all_handled(machinery: Machinery, how_many: int) -> None:
    until(lambda: machinery.handled_count() >= how_many, 20, f"{how_many} messages handled")


@pytest.mark.parametrize("repaired", [True, False])
def test_offsets_follow_to_the_end_behind_transaction_markers(machinery: Machinery, repaired: bool) -> None:
    machinery.worker("w1", "--latency", "0", *([] if repaired else ["--off", "lowest_unacknowledged"]))
    transactions = Transactions(machinery)
    orders = (f"order-{number % 40}" for number in count())
    for size in [1, 2, 3] * 20:
        transactions.commit(*(next(orders) for _ in range(size)))
    all_handled(machinery, 120)

    def at_the_end() -> bool:
        return machinery.lag() <= PARTITIONS  # the marker after the last message of each partition

    if repaired:
        until(at_the_end, 5, "offsets at the end")
    else:
        with pytest.raises(AssertionError, match="never comes"):
            until(at_the_end, 4, "never comes")


@pytest.mark.parametrize("repaired", [True, False])
def test_records_of_aborted_transactions_are_never_seen(machinery: Machinery, repaired: bool) -> None:
    machinery.worker("w1", "--latency", "0", *([] if repaired else ["--off", "read_committed"]))
    transactions = Transactions(machinery)
    for number in range(20):
        transactions.commit(f"kept-{number}")
        transactions.abort(f"aborted-{number}")
    transactions.commit(*(f"last-{number}" for number in range(20)))
    if repaired:
        all_handled(machinery, 40)
        until(lambda: machinery.lag() <= 2 * PARTITIONS, 5, "offsets at the end")
        assert not [order for _, order, _ in machinery.handled() if order.startswith("aborted")]
    else:
        all_handled(machinery, 60)
        assert len([order for _, order, _ in machinery.handled() if order.startswith("aborted")]) == 20


@pytest.mark.parametrize("repaired", [True, False])
def test_both_topics_of_an_order_are_on_one_worker(machinery: Machinery, repaired: bool) -> None:
    off = [] if repaired else ["--off", "range_assignor"]
    first = machinery.worker("w1", "--latency", "0", *off)
    second = machinery.worker("w2", "--latency", "0", *off)
    for program in (first, second):
        until(program.is_ready, 15, "the rebalance is over")
    for topic in TOPICS:
        machinery.send_all((f"order-{number}" for number in range(30)), topic=topic)
    all_handled(machinery, 60)
    rows = machinery.database.execute("SELECT DISTINCT partition, topic, worker FROM handled").fetchall()
    workers = {place: {worker for partition, _, worker in rows if partition == place} for place in range(PARTITIONS)}
    assert {topic for _, topic, _ in rows} == set(TOPICS)
    assert {worker for _, _, worker in rows} == {"w1", "w2"}
    together = all(len(names) == 1 for names in workers.values())
    assert together == repaired


@pytest.mark.parametrize("repaired", [True, False])
def test_what_is_finished_is_committed_before_partitions_are_given_back(machinery: Machinery, repaired: bool) -> None:
    off = [] if repaired else ["--off", "drain"]
    rarely = machinery.settings.model_copy(update={"worker": machinery.settings.worker.model_copy(update={"commit_interval_s": 300.0})})
    machinery.worker("w1", "--latency", "0", "--slow", "1", *off, settings=rarely)
    machinery.send_all(f"order-{number}" for number in range(60))
    all_handled(machinery, 60)
    machinery.send_all(f"slow-{number}" for number in range(20))
    until(lambda: machinery.figure("w1", "paystream_window_running") == 20, 5, "the slow ones run")
    assert machinery.committed() == {}
    machinery.worker("w2", "--latency", "0", "--slow", "0", *off, settings=rarely)
    machinery.send_all(f"later-{number}" for number in range(30))
    until(lambda: not machinery.missing(), 20, "all are handled")
    assert (machinery.twice() == 0) == repaired
