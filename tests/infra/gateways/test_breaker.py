"""The breaker: what opens it, what closes it, and who may try in between."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from prometheus_client import REGISTRY

from infra.gateways.breaker import Breaker, BreakerOpen, GatewayFailed
from schemas.observations import Unknown

pytestmark = pytest.mark.unit

FOR_LONG = 3600.0
AT_ONCE = 0.0


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        with suppress(GatewayFailed), breaker.passing():
            raise GatewayFailed(Unknown(detail="test"))


def serve(breaker: Breaker) -> None:
    with breaker.passing():
        pass


def shown_state() -> float | None:
    return REGISTRY.get_sample_value("paystream_gateway_breaker_state", {"gateway": "test"})


def test_failures_in_a_row_open_it_and_then_nothing_is_called() -> None:
    breaker = Breaker("test", threshold=3, open_s=FOR_LONG)
    fail(breaker, 2)
    assert (breaker.state, shown_state()) == ("closed", 0)
    fail(breaker)
    assert (breaker.state, shown_state()) == ("opened", 2)
    with pytest.raises(BreakerOpen), breaker.passing():
        pytest.fail("the gateway was called")


def test_a_call_that_is_served_begins_the_count_anew() -> None:
    breaker = Breaker("test", threshold=3, open_s=FOR_LONG)
    fail(breaker, 2)
    serve(breaker)
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_what_is_no_failure_of_the_gateway_does_not_count() -> None:
    breaker = Breaker("test", threshold=1, open_s=FOR_LONG)
    for error in (ValueError, asyncio.CancelledError):
        with suppress(error), breaker.passing():
            raise error
    assert breaker.state == "closed"


def test_after_its_rest_one_call_at_a_time_tries() -> None:
    breaker = Breaker("test", threshold=1, open_s=AT_ONCE)
    fail(breaker)
    with breaker.passing():
        assert breaker.state == "half-opened"
        with pytest.raises(BreakerOpen), breaker.passing():
            pytest.fail("a second call was let through")
    assert (breaker.state, shown_state()) == ("closed", 0)


def test_a_try_that_fails_opens_it_again() -> None:
    breaker = Breaker("test", threshold=5, open_s=AT_ONCE)
    fail(breaker, 5)
    fail(breaker)
    assert (breaker.state, shown_state()) == ("opened", 2)


def test_a_try_that_is_cancelled_teaches_nothing_and_makes_room_for_the_next() -> None:
    breaker = Breaker("test", threshold=1, open_s=AT_ONCE)
    fail(breaker)
    with suppress(asyncio.CancelledError), breaker.passing():
        raise asyncio.CancelledError
    assert (breaker.state, shown_state()) == ("half-opened", 1)
    serve(breaker)
    assert breaker.state == "closed"
