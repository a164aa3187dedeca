"""What lies around every call of a gateway."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from infra.gateways.breaker import Breaker, GatewayFailed
from infra.gateways.calls import Calls, creation, looked_up
from schemas.observations import Captured, Created, Declined, NotSent, Observation, Refused, Unknown
from schemas.state import Failure

pytestmark = pytest.mark.unit

FAILURE = Failure(code="code", message="message", advice="none")


def calls_so_far(outcome: str) -> float:
    labels = {"gateway": "test", "operation": "confirm", "outcome": outcome}
    return REGISTRY.get_sample_value("paystream_gateway_call_seconds_count", labels) or 0.0


async def test_an_answer_is_timed_counted_and_told_without_its_secret() -> None:
    async def ask() -> Observation:
        return Created(gateway_id="pi_1", client_secret="pi_1_secret_x")

    before = calls_so_far("created")
    with capture_logs() as logs:
        seen = await Calls("test", Breaker("test"))("confirm", "pi_1", ask)
    assert isinstance(seen, Created)
    assert seen.latency_ms is not None
    assert seen.client_secret == "pi_1_secret_x"
    assert calls_so_far("created") == before + 1
    assert [(entry["outcome"], entry["gateway_id"], entry["log_level"]) for entry in logs] == [("created", "pi_1", "debug")]
    assert "secret_x" not in repr(logs) + repr(seen)


async def test_an_open_breaker_answers_in_the_gateways_place() -> None:
    asked = 0

    async def ask() -> Observation:
        nonlocal asked
        asked += 1
        raise GatewayFailed(Unknown(gateway_id="pi_1", detail="no answer"))

    calls = Calls("test", Breaker("test", threshold=2, open_s=3600))
    before = calls_so_far("unknown")
    seen = [await calls("confirm", "pi_1", ask) for _ in range(3)]
    assert [type(observation) for observation in seen] == [Unknown, Unknown, NotSent]
    assert seen[2].gateway_id == "pi_1"
    assert asked == 2
    assert calls_so_far("unknown") == before + 2


def test_at_creation_no_money_moves_so_what_is_not_known_was_not_sent() -> None:
    assert creation(Unknown(detail="d", key_burnt=True, latency_ms=7)) == NotSent(detail="d", key_burnt=True, latency_ms=7)
    assert creation(Declined(failure=FAILURE)) == Refused(failure=FAILURE)
    for answer in (Created(gateway_id="pi_1"), NotSent(detail="d"), Refused(failure=FAILURE)):
        assert creation(answer) is answer
    with pytest.raises(TypeError):
        creation(Captured(captured_minor=1, transaction_id="ch_1"))


def test_a_failed_look_up_tells_nothing() -> None:
    for failed in (NotSent(gateway_id="pi_1", detail="d"), Unknown(gateway_id="pi_1", detail="d", key_burnt=True)):
        assert looked_up(failed) == Unknown(gateway_id="pi_1", detail="d")
    assert isinstance(looked_up(Refused(gateway_id="pi_1", failure=FAILURE)), Unknown)
    declined = Declined(gateway_id="pi_1", failure=FAILURE)
    assert looked_up(declined) is declined
