"""The projections: what each event makes of the rows, and that the rows agree with the payment machine on any path."""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.database.tables import analytics_attempts, analytics_payments
from processors.analytics.projections import STATUS_AFTER, project
from schemas.errors import Rejected
from schemas.messages import PaymentEvent, leaves
from schemas.views import AttemptRow, PaymentRow, Views
from tests.processors import payment_events as say
from tests.processors.payment_events import NOW, ORDER_ID, PAYMENT_ID
from tests.processors.payment_paths import COMMANDS, OBSERVATIONS, PATHS, step

pytestmark = pytest.mark.unit


def folded(*events: PaymentEvent) -> Views:
    views = Views()
    for event in events:
        project(views, event)
    return views


def payment(*events: PaymentEvent) -> PaymentRow:
    return folded(*events).payments[PAYMENT_ID]


def attempts(*events: PaymentEvent) -> list[tuple[int, str, str | None, int | None]]:
    return [(row.attempt, row.outcome, row.failure_code, row.gateway_latency_ms) for row in folded(*events).attempts.values()]


def test_every_event_of_a_payment_has_a_status() -> None:
    assert set(STATUS_AFTER) == set(leaves(PaymentEvent).values())


@pytest.mark.parametrize(("row", "table"), [(PaymentRow, analytics_payments), (AttemptRow, analytics_attempts)])
def test_rows_are_as_their_tables(row: type, table: object) -> None:
    columns = {column.name: column.nullable for column in table.columns}  # type: ignore[attr-defined]
    assert {field.name: "None" in str(field.type) for field in fields(row)} == columns


def test_an_opened_payment_is_pending() -> None:
    assert payment(say.initiated()) == PaymentRow(
        payment_id=PAYMENT_ID,
        order_id=ORDER_ID,
        status="PENDING",
        gateway="stripe",
        currency="EUR",
        amount_minor=1000,
        initiated_at=NOW + timedelta(seconds=1),
        version=1,
    )
    assert attempts(say.initiated()) == []


def test_a_capture_ends_it() -> None:
    events = say.initiated(), say.processing(), say.completed(captured_minor=400)
    row = payment(*events)
    assert (row.status, row.captured_minor, row.ended_at, row.version) == ("COMPLETED", 400, NOW + timedelta(seconds=3), 3)
    assert attempts(*events) == [(1, "COMPLETED", None, 500)]


def test_a_decline_has_its_reason_until_it_is_tried_again() -> None:
    declined = say.initiated(), say.processing(), say.failed()
    assert (payment(*declined).status, payment(*declined).failure_code) == ("FAILED", "card_declined")
    retried = *declined, say.processing(4, attempt=2)
    assert (payment(*retried).status, payment(*retried).failure_code, payment(*retried).ended_at) == ("PROCESSING", None, None)
    assert attempts(*retried) == [(1, "FAILED", "card_declined", 200), (2, "PROCESSING", None, None)]
    paid = *retried, say.completed(5, attempt=2)
    assert attempts(*paid) == [(1, "FAILED", "card_declined", 200), (2, "COMPLETED", None, 500)]


def test_a_hold_that_is_voided_has_no_more_money_than_before() -> None:
    events = say.initiated(), say.processing(), say.authorized(), say.cancelled()
    row = payment(*events)
    assert (row.status, row.captured_minor, row.ended_at) == ("CANCELLED", 0, NOW + timedelta(seconds=4))
    assert attempts(*events) == [(1, "AUTHORIZED", None, 400)], "the gateway did authorise it"


def test_an_attempt_keeps_the_time_it_began_and_its_last_known_latency() -> None:
    views = folded(say.initiated(), say.processing(), say.action_required(), say.completed(4, gateway_latency_ms=None))
    row = views.attempts[PAYMENT_ID, 1]
    assert (row.at, row.outcome, row.gateway_latency_ms) == (NOW + timedelta(seconds=2), "COMPLETED", 300)


def test_a_capture_on_a_cancelled_payment_is_in_the_figures_too() -> None:
    events = say.initiated(), say.cancelled(2), say.completed(3), say.refund_initiated(4)
    assert (payment(*events).status, payment(*events).captured_minor, payment(*events).version) == ("COMPLETED", 1000, 4)
    assert payment(*events).ended_at == NOW + timedelta(seconds=3)
    assert attempts(*events) == [(1, "COMPLETED", None, 500)]


@pytest.mark.parametrize("event", [say.processing(), say.completed(), say.cancelled(), say.refund_initiated()], ids=lambda e: e.event_type)
def test_a_payment_begins_by_being_opened(event: PaymentEvent) -> None:
    with pytest.raises(Rejected, match="PAYMENT_INITIATED"):
        folded(event)


@given(st.sampled_from(list(PATHS)), st.lists(st.sampled_from([*COMMANDS, *OBSERVATIONS]), max_size=12))
def test_the_rows_agree_with_the_machine_on_any_path(path: str, names: list[str]) -> None:
    state, views = None, Views()
    for name in ("initiate", *PATHS[path][1:], *names) if PATHS[path][:1] == ("initiate",) else ("initiate and confirm", *PATHS[path][1:], *names):
        state, decision = step(state, name)
        for event in decision.events:
            project(views, event)
    assert state is not None
    row = views.payments[PAYMENT_ID]
    assert (row.status, row.captured_minor, row.version) == (state.status, state.captured_minor, state.version)
    assert row.failure_code == (state.failure.code if state.failure else None)
    assert (row.ended_at is None) == (row.status in ("PENDING", "PROCESSING", "REQUIRES_ACTION", "AUTHORIZED"))
    assert {key[1] for key in views.attempts} <= {attempt.number for attempt in state.attempts}
