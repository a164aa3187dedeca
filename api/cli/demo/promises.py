"""The promises, checked on evidence: pure functions from what was seen to verdicts.

Rule: a verdict says on how many items it rests; one that rests on none is as bad as a broken one. Each check compares what two sides say that don't
know of each other: what callers were answered, what is on the topics, what the sandbox charged, what the API shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from schemas.messages import Message, PaymentEvent

EVENTS: Final = "payment-events"
COMMANDS: Final = "payment-commands"
WEBHOOKS: Final = "payment-webhook-received"
DEAD_LETTERS: Final = "payment-events-dlq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A record as a `read_committed` consumer got it; `message` is None where it does not decode."""

    topic: str
    partition: int
    offset: int
    key: str | None
    value: bytes
    headers: Mapping[str, str]
    message: Message | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that a caller made and that was answered with a 2xx."""

    order_id: str
    route: str
    key: str
    payment_id: str
    command_id: str


@dataclass(kw_only=True)
class Evidence:
    """All that was gathered of one run. Only orders of this run are in it."""

    requests: list[Request]
    payments: dict[str, dict[str, Any]]
    """As `GET /payments/{id}` shows them."""
    timelines: dict[str, list[dict[str, Any]]]
    """As `GET /payments/{id}/events` shows them."""
    commands: dict[str, dict[str, Any]]
    """As `GET /commands/{id}` shows them."""
    ledger: list[dict[str, Any]]
    records: list[Seen]
    """In order of offset within each partition."""
    committed: dict[tuple[str, int], int]
    """Where the payments group stands."""
    one_type_topics: frozenset[str]
    parked_orders: frozenset[str]
    """Orders that were sent a message that nobody can read."""

    def on(self, *topics: str) -> list[Seen]:
        return [record for record in self.records if record.topic in topics]


@dataclass(kw_only=True)
class Verdict:
    promise: str
    title: str
    items: str
    checked: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return self.checked > 0 and not self.broken

    def item(self, holds: bool, otherwise: str) -> None:
        self.checked += 1
        if not holds:
            self.broken.append(otherwise)


def verdicts(evidence: Evidence) -> list[Verdict]:
    """What can be said of each promise."""
    return [check(evidence) for check in CHECKS]


def _accepted_is_on_kafka(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D1", title="what was accepted is on Kafka", items="accepted requests")
    there = {record.message.event_id for record in evidence.on(COMMANDS) if record.message}
    for request in evidence.requests:
        verdict.item(
            request.command_id in there, f"{request.route} of {request.order_id} was accepted, and command {request.command_id} is not on {COMMANDS}"
        )
    return verdict


def _one_key_one_payment(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D2", title="one key is one payment", items="keys used more than once")
    charged = Counter(charge["payment_id"] for charge in evidence.ledger)
    uses: defaultdict[tuple[str, str], list[Request]] = defaultdict(list)
    for request in evidence.requests:
        uses[request.route, request.key].append(request)
    for (route, key), requests in uses.items():
        if len(requests) > 1:
            payments = {request.payment_id for request in requests}
            charges = sum(charged[payment] for payment in payments)
            verdict.item(len(payments) == 1 and charges <= 1, f"key {key} of {route}: payments {sorted(payments)}, {charges} charges")
    return verdict


def _charged_at_most_once(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D3", title="an attempt charges at most once", items="payments against the ledger")
    charges: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for charge in evidence.ledger:
        charges[charge["payment_id"]].append(charge)
    for payment_id, payment in evidence.payments.items():
        made = charges.pop(payment_id, [])
        intents = Counter(charge["payment_intent"] for charge in made)
        verdict.item(all(count == 1 for count in intents.values()), f"payment {payment_id}: an intent was charged twice: {dict(intents)}")
        taken = sum(charge["captured_minor"] for charge in made)
        told = payment["captured_minor"]
        verdict.item(taken == told, f"payment {payment_id} is {payment['status']} with {told} captured; the sandbox took {taken}")
        with_money = sum(1 for charge in made if charge["captured_minor"])
        verdict.item(with_money <= 1, f"payment {payment_id} was charged {with_money} times")
    for payment_id in charges:
        verdict.item(False, f"the sandbox charged payment {payment_id}, which nobody asked for")
    return verdict


def _one_event_per_change(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D5", title="every change is one event, once, in order", items="events")
    streams: defaultdict[str, list[int]] = defaultdict(list)
    placed: dict[str, Seen] = {}
    for record in evidence.on(EVENTS):
        if isinstance(record.message, PaymentEvent):
            streams[record.message.payment_id].append(record.message.version)
            placed[record.message.event_id] = record
    for payment_id, payment in evidence.payments.items():
        versions, last = streams.get(payment_id, []), payment["version"]
        verdict.item(versions == list(range(1, last + 1)), f"payment {payment_id} is at version {last}; on {EVENTS} are {versions}")
        for event in evidence.timelines.get(payment_id, []):
            there = placed.get(event["event_id"])
            right = there is not None and (there.partition, there.offset) == (event["partition"], event["offset"])
            verdict.item(
                right, f"{event['event_type']} v{event['version']} of {payment_id} is not at {event['topic']} {event['partition']}/{event['offset']}"
            )
    again = Counter(record.message.event_id for record in evidence.on(*evidence.one_type_topics) if record.message)
    for event_id, record in placed.items():
        own = record.message.event_type.lower().replace("_", "-") if record.message else ""
        if own in evidence.one_type_topics:
            verdict.item(again[event_id] == 1, f"event {event_id} is {again[event_id]} times on {own}")
    return verdict


def _applied_or_parked(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D6", title="applied, or parked with its bytes intact", items="messages")
    copies = {_original(copy): copy for copy in evidence.on(DEAD_LETTERS)}
    for record in evidence.on(COMMANDS, WEBHOOKS):
        place = f"{record.topic} {record.partition}/{record.offset}"
        passed = evidence.committed.get((record.topic, record.partition), 0) > record.offset
        copy = copies.get((record.topic, record.partition, record.offset))
        if copy is not None:
            verdict.item(copy.value == record.value and copy.key == record.key, f"the copy of {place} has other bytes")
        elif record.message is None:
            verdict.item(False, f"{place} can't be read and is not among the dead letters")
        elif record.topic == COMMANDS and record.message.event_id in evidence.commands:
            decided = evidence.commands[record.message.event_id]["status"] in ("applied", "refused")
            verdict.item(decided, f"{place} ({record.message.event_type}) was neither decided nor parked")
        verdict.item(passed, f"{place} was not consumed")
    return verdict


def _waits_behind_its_parked_message(evidence: Evidence) -> Verdict:
    verdict = Verdict(promise="D7", title="later messages of an order wait behind its parked one", items="parked orders and their followers")
    parked: defaultdict[str, list[Seen]] = defaultdict(list)
    for copy in evidence.on(DEAD_LETTERS):
        parked[copy.key or ""].append(copy)
    for order_id in evidence.parked_orders:
        queue = parked.get(order_id, [])
        kinds = [copy.headers.get("paystream-dlq-disposition") for copy in queue]
        verdict.item(kinds[:1] == ["poison"] and set(kinds[1:]) == {"blocked"}, f"order {order_id} has {kinds} among the dead letters")
        poison = next((copy for copy in queue if copy.headers.get("paystream-dlq-disposition") == "poison"), None)
        if poison is None:
            continue
        topic, partition, offset = _original(poison)
        for record in evidence.on(COMMANDS):
            if record.key == order_id and (record.topic, record.partition) == (topic, partition) and record.offset > offset:
                behind = any(_original(copy) == (record.topic, record.partition, record.offset) for copy in queue)
                verdict.item(behind, f"{record.topic} {record.partition}/{record.offset} of order {order_id} overtook its parked message")
    return verdict


CHECKS: Final[tuple[Callable[[Evidence], Verdict], ...]] = (
    _accepted_is_on_kafka,
    _one_key_one_payment,
    _charged_at_most_once,
    _one_event_per_change,
    _applied_or_parked,
    _waits_behind_its_parked_message,
)


def _original(copy: Seen) -> tuple[str, int, int]:
    """Where the message was read that a dead letter is the copy of."""
    said = copy.headers
    return said.get("paystream-dlq-topic", ""), int(said.get("paystream-dlq-partition", -1)), int(said.get("paystream-dlq-offset", -1))


def unkept(found: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in found if not verdict.kept]
