"""The one way to call a gateway: crash points, breaker, figures and log lie around each call here, and nowhere else.

Rule: a call passes `gateway.before_{operation}`, asks, and passes `gateway.after_{operation}`, where operation is create, confirm, capture, cancel or
retrieve. What comes back is always an observation that knows its latency.
Flow: StripeGateway.confirm -> Calls -> breaker -> the SDK -> an observation -> Calls -> the payment handler.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter
from typing import Final

import structlog
from prometheus_client import Histogram

from infra.crash_points import at
from infra.gateways.breaker import Breaker, BreakerOpen, GatewayFailed
from infra.telemetry import DURATION_BUCKETS
from schemas.observations import Created, Declined, NotSent, Observation, Refused, Unknown

_log: Final = structlog.get_logger(__name__)

CALL_SECONDS: Final = Histogram(
    "paystream_gateway_call_seconds",
    "How long calls of a gateway took, by what came of them",
    ["gateway", "operation", "outcome"],
    buckets=DURATION_BUCKETS,
)
_OUTCOMES: Final = {cls: re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower() for cls in Observation.__subclasses__()}


class Calls:
    """Calls of one gateway."""

    def __init__(self, gateway: str, breaker: Breaker) -> None:
        self._gateway = gateway
        self._breaker = breaker

    async def __call__(self, operation: str, gateway_id: str | None, ask: Callable[[], Awaitable[Observation]]) -> Observation:
        """What `ask` observed. It raises GatewayFailed with the observation if the gateway did not serve."""
        await at(f"gateway.before_{operation}")
        started = perf_counter()
        try:
            with self._breaker.passing():
                observation = await ask()
        except GatewayFailed as failure:
            observation = failure.observation
        except BreakerOpen:
            observation = NotSent(gateway_id=gateway_id, detail="the gateway failed too often and is given a rest")
        took = perf_counter() - started
        self._tell(operation, gateway_id, observation, took)
        await at(f"gateway.after_{operation}")
        return replace(observation, latency_ms=round(took * 1000))

    def _tell(self, operation: str, gateway_id: str | None, observation: Observation, took: float) -> None:
        outcome = _OUTCOMES[type(observation)]
        CALL_SECONDS.labels(self._gateway, operation, outcome).observe(took)
        why: str | None = None
        say = _log.warning
        match observation:
            case Unknown(detail=why) | NotSent(detail=why):
                pass
            case Refused(failure=failure):
                why = failure.code
            case _:
                say = _log.debug
        say(
            "gateway call",
            gateway=self._gateway,
            operation=operation,
            gateway_id=observation.gateway_id or gateway_id,
            outcome=outcome,
            why=why,
            latency_ms=round(took * 1000),
        )


def creation(observation: Observation) -> Created | NotSent | Refused:
    """What a `create` is answered with: no money moves there, so what is not known had no effect, and a card that is refused makes no object."""
    match observation:
        case Created() | NotSent() | Refused():
            return observation
        case Unknown(detail=detail, key_burnt=key_burnt, latency_ms=latency_ms):
            return NotSent(detail=detail, key_burnt=key_burnt, latency_ms=latency_ms)
        case Declined(failure=failure, latency_ms=latency_ms):
            return Refused(failure=failure, latency_ms=latency_ms)
        case _:
            raise TypeError(f"no gateway answers a create with {type(observation).__name__}")


def looked_up(observation: Observation) -> Observation:
    """What a `retrieve` is answered with: a look-up that fails tells nothing of what was done before it, not even that there is no such object.

    (A key of another account finds none of ours, whatever they took.)
    """
    match observation:
        case (
            NotSent(detail=detail, gateway_id=gateway_id, latency_ms=latency_ms)
            | Unknown(detail=detail, gateway_id=gateway_id, latency_ms=latency_ms)
        ):
            return Unknown(gateway_id=gateway_id, detail=detail, latency_ms=latency_ms)
        case Refused(failure=failure, gateway_id=gateway_id, latency_ms=latency_ms):
            return Unknown(gateway_id=gateway_id, detail=f"the look-up was refused: {failure.code}", latency_ms=latency_ms)
        case _:
            return observation
