"""What came of a run, gathered from where others would look: the API, the topics, the sandbox's ledger.

Rule: a run's evidence is complete when nothing is under way any more; until then `gathered` waits, with a deadline. Only this run's orders count, so
that a stack can be used again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, Final

import confluent_kafka
from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

from api.cli.demo.promises import COMMANDS, DEAD_LETTERS, EVENTS, WEBHOOKS, Evidence, Request, Seen
from api.cli.demo.traffic import PARKED_MESSAGES, Journey
from api.intake import command_id_of
from infra.kafka_admin import client_config
from infra.kafka_offsets import EndOffsets
from infra.local.client import Bank, Caller
from infra.settings import Settings
from producers.committed_log import CommittedLog, kafka_translated
from schemas.codec import Codec
from schemas.errors import Rejected, Unavailable
from schemas.messages import PaymentEvent, leaves
from schemas.topics import destinations

ONE_TYPE_TOPICS: Final = frozenset(topic for record in leaves(PaymentEvent) for topic in destinations(record)[1:])
TOPICS: Final = (COMMANDS, WEBHOOKS, EVENTS, DEAD_LETTERS, *sorted(ONE_TYPE_TOPICS))
_SETTLES_WITHIN_S: Final = 90.0
_KAFKA_ANSWERS_WITHIN_S: Final = 15.0
_AT_ONCE: Final = 16


Place = tuple[str, int]
"""A topic, without the installation's prefix, and a partition."""


def starting_line(settings: Settings) -> dict[Place, int]:
    """Where each topic ends before the run. Raises Unavailable."""
    with closing(CommittedLog(settings)) as log:
        return {(topic, partition): log.bounds(topic, partition)[1] for topic in TOPICS for partition in log.partitions(topic)}


def requests_of(journeys: Iterable[Journey], user: str) -> list[Request]:
    """What `user` was promised: each request that was answered with a 2xx."""
    return [
        Request(
            order_id=journey.order_id,
            route=path,
            key=key,
            payment_id=answer.body["payment_id"],
            command_id=command_id_of(user, _route(path, answer.body["payment_id"]), key),
        )
        for journey in journeys
        for path, key, answer in journey.answered
        if answer.ok
    ]


def _route(path: str, payment_id: str) -> str:
    """The route that a path belongs to, as the intake names it."""
    return f"POST /api/v1{path.replace(payment_id, '{payment_id}')}"


async def gathered(
    settings: Settings,
    codec: Codec,
    caller: Caller,
    bank: Bank,
    user: str,
    journeys: list[Journey],
    starts: dict[Place, int],
    tell: Callable[[str], None],
) -> Evidence:
    """The evidence of a run, once it is complete. Raises Unavailable if it is not complete in time, saying how much is left."""
    requests = requests_of(journeys, user)
    orders = frozenset(journey.order_id for journey in journeys)
    parked = frozenset(journey.order_id for journey in journeys if journey.kind == "parked order")
    brokers, ends = EndOffsets(settings.kafka), time.monotonic() + _SETTLES_WITHIN_S
    while True:
        # In this order: who is asked later sees what those before had under way. The books and the topics are read at the end, when nothing moves.
        left = await bank.pending_webhooks() + await asyncio.to_thread(_unconsumed, settings, starts, parked)
        if not left:
            payments, timelines, commands = await _shown(caller, requests)
            left = _under_way(payments, timelines, commands, requests, parked)
        if not left:  # a commit is answered before all can see what it committed
            left = sum([await brokers.unsettled(settings.prefix + topic) for topic in TOPICS])
        if not left:
            break
        if time.monotonic() > ends:
            raise Unavailable("the pipeline", f"{left} payments, commands or messages were still under way after {_SETTLES_WITHIN_S:.0f} s")
        tell(f"{left} still under way")
        await asyncio.sleep(0.5)
    ledger = [charge for charge in await bank.ledger() if charge["order_id"] in orders]
    records = await asyncio.to_thread(_records, settings, codec, starts, orders)
    return Evidence(
        requests=requests,
        payments=payments,
        timelines=timelines,
        commands=commands,
        ledger=ledger,
        records=records,
        committed=await asyncio.to_thread(_committed, settings),
        one_type_topics=ONE_TYPE_TOPICS,
        parked_orders=parked,
    )


Documents = dict[str, dict[str, Any]]


async def _shown(caller: Caller, requests: list[Request]) -> tuple[Documents, dict[str, list[dict[str, Any]]], Documents]:
    """How the API shows each payment, its timeline and each command."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def get(path: str) -> dict[str, Any]:
        async with room:
            return (await caller.get(path)).body

    payments = sorted({request.payment_id for request in requests})
    commands = sorted({request.command_id for request in requests})
    shown = await asyncio.gather(*(get(f"/payments/{payment}") for payment in payments))
    timelines = await asyncio.gather(*(get(f"/payments/{payment}/events") for payment in payments))
    decided = await asyncio.gather(*(get(f"/commands/{command}") for command in commands))
    by_payment = dict(zip(payments, shown, strict=True))
    return by_payment, {p: t["items"] for p, t in zip(payments, timelines, strict=True)}, dict(zip(commands, decided, strict=True))


def _under_way(
    payments: Documents, timelines: dict[str, list[dict[str, Any]]], commands: Documents, requests: list[Request], parked: frozenset[str]
) -> int:
    """How many commands are not decided, payments not at rest and events not on Kafka. What is parked stays where it is."""
    waiting = {request.command_id for request in requests if request.order_id not in parked}
    undecided = sum(1 for command in waiting if commands[command]["status"] == "accepted")
    moving = sum(1 for payment in payments.values() if payment["status"] == "PROCESSING")
    unpublished = sum(1 for timeline in timelines.values() for event in timeline if event["offset"] is None)
    return undecided + moving + unpublished


def _unconsumed(settings: Settings, starts: dict[Place, int], parked: frozenset[str]) -> int:
    """How many records the payments group has not finished, and how many parked orders don't have their messages among the dead letters yet."""
    committed = _committed(settings)
    last: dict[Place, int] = {}
    copies: Counter[str] = Counter()
    for record in _read(settings, {place: start for place, start in starts.items() if place[0] in (COMMANDS, WEBHOOKS, DEAD_LETTERS)}):
        topic = record.topic().removeprefix(settings.prefix)
        if topic == DEAD_LETTERS:
            copies[(record.key() or b"").decode(errors="replace")] += 1
        else:
            last[topic, record.partition()] = record.offset()
    unfinished = sum(max(0, offset + 1 - committed.get(place, 0)) for place, offset in last.items())
    return unfinished + sum(1 for order in parked if copies[order] < PARKED_MESSAGES)


def _committed(settings: Settings) -> dict[Place, int]:
    """Where the payments group stands."""
    group = f"{settings.prefix}paystream-payments"
    admin = AdminClient(client_config(settings.kafka) | {"log_level": 0})  # held until it has answered
    with kafka_translated():
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])
        places = asked[group].result(_KAFKA_ANSWERS_WITHIN_S).topic_partitions
    return {(place.topic.removeprefix(settings.prefix), place.partition): place.offset for place in places}


def _read(settings: Settings, starts: dict[Place, int]) -> Iterator[confluent_kafka.Message]:
    """Every committed record from `starts` to the present ends, in order within each partition."""
    with closing(CommittedLog(settings)) as log:
        for (topic, partition), start in starts.items():
            log.seek(topic, partition, start, log.bounds(topic, partition)[1])
            while records := log.read():
                yield from records


def _records(settings: Settings, codec: Codec, starts: dict[Place, int], orders: frozenset[str]) -> list[Seen]:
    seen = (_seen(settings, codec, record) for record in _read(settings, starts))
    return [record for record in seen if record.key in orders or (record.message is not None and record.message.order_id in orders)]


def _seen(settings: Settings, codec: Codec, record: confluent_kafka.Message) -> Seen:
    value = record.value() or b""
    try:
        message = codec.decode(value)
    except Rejected:
        message = None
    return Seen(
        topic=record.topic().removeprefix(settings.prefix),
        partition=record.partition(),
        offset=record.offset(),
        key=record.key().decode(errors="replace") if record.key() else None,
        value=value,
        headers={name: value.decode(errors="replace") for name, value in record.headers() or () if isinstance(value, bytes)},
        message=message,
    )
