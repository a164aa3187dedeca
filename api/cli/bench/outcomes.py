"""When each payment's completion could be read: a consumer of payment-events as another team would write it, that looks at the clock.

Rule: what counts is when a reader of committed records has the record in hand. It runs in a thread of its own, so that the load does not delay it.
Flow: payment-events -> the headers `ce_type` and `ce_subject` -> `readable`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import confluent_kafka
from confluent_kafka import TopicPartition

from infra.settings import Settings
from producers.committed_log import committed_reader, kafka_translated, unavailable
from schemas.errors import Unavailable
from schemas.messages import PaymentCompleted, PaymentFailed

_TOPIC: Final = "payment-events"
_TIMEOUT_S: Final = 15.0
_SLICE_S: Final = 0.2
_COMPLETED: Final = PaymentCompleted.event_type.encode()
_FAILED: Final = PaymentFailed.event_type.encode()


class Outcomes:
    """What came of payments since `watched` began. `readable`: payment -> when its completion was read (`time.perf_counter`); `failed`: payments."""

    def __init__(self) -> None:
        self.readable: dict[str, float] = {}
        self.failed: set[str] = set()
        self.failure: Unavailable | None = None
        """Why nothing is read any more."""

    def follow(self, consumer: confluent_kafka.Consumer, stop: threading.Event) -> None:
        """Read until it is stopped, or Kafka says no."""
        while not stop.is_set():
            record = consumer.poll(_SLICE_S)
            if record is None:
                continue
            now = time.perf_counter()
            if (error := record.error()) is not None:
                self.failure = unavailable(error)
                return
            headers = dict(record.headers() or ())
            payment_id = headers["ce_subject"].decode()
            if headers["ce_type"] == _COMPLETED:
                self.readable[payment_id] = now
            elif headers["ce_type"] == _FAILED:
                self.failed.add(payment_id)


@contextmanager
def watched(settings: Settings) -> Iterator[Outcomes]:
    """The outcomes from now on, for as long as the block runs. Raises Unavailable if Kafka does not answer."""
    consumer = committed_reader(settings)
    outcomes, stop = Outcomes(), threading.Event()
    thread = threading.Thread(target=outcomes.follow, args=(consumer, stop), daemon=True)
    try:
        with kafka_translated():
            topic = settings.prefix + _TOPIC
            places = [TopicPartition(topic, number) for number in consumer.list_topics(topic, timeout=_TIMEOUT_S).topics[topic].partitions]
            for place in places:
                place.offset = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S)[1]
            consumer.assign(places)
        thread.start()
        yield outcomes
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        consumer.close()
