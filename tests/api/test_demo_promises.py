"""The demo's check: it passes on honest evidence, and fails on each thing that is planted in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from api.cli.demo.promises import COMMANDS, DEAD_LETTERS, EVENTS, Evidence, Request, Seen, unkept, verdicts
from schemas.messages import CancelPayment, Message, PaymentEvent
from tests.processors.payment_paths import COMMANDS as GIVEN
from tests.processors.payment_paths import PAYMENT_ID, initiate, step

pytestmark = pytest.mark.unit


def seen(topic: str, offset: int, message: Message | None, value: bytes = b"\x00good", key: str = "ord_1", **headers: str) -> Seen:
    return Seen(topic=topic, partition=0, offset=offset, key=key, value=value, headers=headers, message=message)


def honest() -> Evidence:
    """One payment, repeated with its key; one order that met poison, and a message that waits behind it."""
    _, decision = step(None, "initiate and confirm")
    payment, _ = step(None, "initiate and confirm")
    payment, ending = step(payment, "captured")
    assert payment is not None
    events: list[PaymentEvent] = [*decision.events, *ending.events]
    request = Request(order_id="ord_1", route="/payments/process", key="k1", payment_id=PAYMENT_ID, command_id=PAYMENT_ID)
    follower = replace(GIVEN["cancel"], order_id="ord_2")
    assert isinstance(follower, CancelPayment)
    said = {"paystream-dlq-topic": COMMANDS, "paystream-dlq-partition": "0"}
    return Evidence(
        requests=[request, request, replace(request, order_id="ord_2", key="k2", command_id=follower.event_id, route="/payments/cancel")],
        payments={PAYMENT_ID: {"status": "COMPLETED", "captured_minor": 1000, "version": 3}},
        timelines={
            PAYMENT_ID: [
                {"event_id": e.event_id, "event_type": e.event_type, "version": e.version, "topic": EVENTS, "partition": 0, "offset": n}
                for n, e in enumerate(events)
            ]
        },
        commands={PAYMENT_ID: {"status": "applied"}, follower.event_id: {"status": "accepted"}},
        ledger=[{"payment_id": PAYMENT_ID, "payment_intent": "pi_1", "captured_minor": 1000}],
        records=[
            seen(COMMANDS, 0, initiate(confirm=True)),
            seen(COMMANDS, 1, None, value=b"junk", key="ord_2"),
            seen(COMMANDS, 2, follower, key="ord_2"),
            *(seen(EVENTS, n, event) for n, event in enumerate(events)),
            *(seen(event.event_type.lower().replace("_", "-"), 0, event) for event in events),
            seen(DEAD_LETTERS, 0, None, value=b"junk", key="ord_2", **said, **{"paystream-dlq-offset": "1", "paystream-dlq-disposition": "poison"}),
            seen(DEAD_LETTERS, 1, follower, key="ord_2", **said, **{"paystream-dlq-offset": "2", "paystream-dlq-disposition": "blocked"}),
        ],
        committed={(COMMANDS, 0): 3},
        one_type_topics=frozenset({"payment-initiated", "payment-processing", "payment-completed"}),
        parked_orders=frozenset({"ord_2"}),
    )


def drop(topic: str, offset: int) -> Callable[[Evidence], None]:
    def plant(evidence: Evidence) -> None:
        evidence.records = [record for record in evidence.records if (record.topic, record.offset) != (topic, offset)]

    return plant


def second_charge(evidence: Evidence) -> None:
    evidence.ledger.append({**evidence.ledger[0], "payment_intent": "pi_2"})


def same_intent_twice(evidence: Evidence) -> None:
    evidence.ledger.append(dict(evidence.ledger[0]))


def lost_charge(evidence: Evidence) -> None:
    evidence.ledger.clear()


def unasked_charge(evidence: Evidence) -> None:
    evidence.ledger.append({"payment_id": "somebody", "payment_intent": "pi_9", "captured_minor": 5})


def version_gap(evidence: Evidence) -> None:
    drop(EVENTS, 1)(evidence)


def event_twice(evidence: Evidence) -> None:
    evidence.records.append(next(record for record in evidence.records if record.topic == EVENTS))


def second_payment_for_a_key(evidence: Evidence) -> None:
    evidence.requests[1] = replace(evidence.requests[1], payment_id="another")


def undecided(evidence: Evidence) -> None:
    evidence.commands[PAYMENT_ID]["status"] = "accepted"


def not_consumed(evidence: Evidence) -> None:
    evidence.committed.clear()


def other_bytes(evidence: Evidence) -> None:
    evidence.records = [replace(r, value=b"mended") if r.topic == DEAD_LETTERS and r.offset == 0 else r for r in evidence.records]


def overtaken(evidence: Evidence) -> None:
    drop(DEAD_LETTERS, 1)(evidence)


PLANTED = [
    ("D1", drop(COMMANDS, 0)),
    ("D2", second_payment_for_a_key),
    ("D2", second_charge),
    ("D3", second_charge),
    ("D3", same_intent_twice),
    ("D3", lost_charge),
    ("D3", unasked_charge),
    ("D5", version_gap),
    ("D5", drop(EVENTS, 2)),
    ("D5", drop("payment-completed", 0)),
    ("D5", event_twice),
    ("D6", undecided),
    ("D6", not_consumed),
    ("D6", other_bytes),
    ("D6", drop(DEAD_LETTERS, 0)),
    ("D7", overtaken),
    ("D7", drop(DEAD_LETTERS, 0)),
]


def test_honest_evidence_keeps_every_promise() -> None:
    found = verdicts(honest())
    assert [verdict.promise for verdict in found] == ["D1", "D2", "D3", "D5", "D6", "D7"]
    assert not unkept(found), [verdict.broken for verdict in unkept(found)]
    assert all(verdict.checked for verdict in found)


@pytest.mark.parametrize(("promise", "plant"), PLANTED, ids=[f"{promise}-{plant.__name__}-{n}" for n, (promise, plant) in enumerate(PLANTED)])
def test_what_is_planted_is_found(promise: str, plant: Callable[[Evidence], None]) -> None:
    evidence = copy.deepcopy(honest())
    plant(evidence)
    broken = [verdict.promise for verdict in unkept(verdicts(evidence))]
    assert promise in broken


def test_a_check_of_nothing_is_no_proof() -> None:
    nothing = Evidence(
        requests=[],
        payments={},
        timelines={},
        commands={},
        ledger=[],
        records=[],
        committed={},
        one_type_topics=frozenset(),
        parked_orders=frozenset(),
    )
    assert len(unkept(verdicts(nothing))) == 6
