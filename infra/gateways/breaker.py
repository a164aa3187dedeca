"""A breaker for each gateway: when it fails again and again, stop asking for a while.

Rule: only a gateway that does not serve counts (no connection, no answer in time, 5xx). A decline, a refusal or a 429 is an answer.
Kept in this process's memory: it keeps this process's window from waiting on a dead gateway, each process finds that out within `threshold` calls,
and sharing it would put Redis, which may be away, in front of every charge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from prometheus_client import Gauge
from purgatory.domain.messages.events import ContextChanged
from purgatory.domain.model import CLOSED, HALF_OPENED, OPENED, Context, OpenedState

from schemas.observations import Observation

_log: Final = structlog.get_logger(__name__)

STATE: Final = Gauge("paystream_gateway_breaker_state", "0 closed, 1 half open, 2 open", ["gateway"])
_LEVELS: Final = {CLOSED: 0, HALF_OPENED: 1, OPENED: 2}


class BreakerOpen(Exception):
    """The gateway was not called."""


class GatewayFailed(Exception):
    """Raised within `Breaker.passing` by a call that the gateway did not serve; `observation` is what is known of its effect."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        super().__init__(type(observation).__name__)


class Breaker:
    """Opens after `threshold` failures in a row, for `open_s` seconds; then calls pass one at a time until one is served.

    Any operation may be that one: a look-up has no effect to regret, and a charge that fails then is UNKNOWN like any other, and is looked up.
    The states are purgatory's; its factory and message bus, which carry them between processes, are not needed in one.
    """

    def __init__(self, gateway: str, *, threshold: int = 10, open_s: float = 5.0) -> None:
        self._gateway = gateway
        self._circuit = Context(gateway, threshold, open_s)
        self._probing = False
        STATE.labels(gateway).set(_LEVELS[CLOSED])

    @property
    def state(self) -> str:
        """`closed`, `half-opened` or `opened`."""
        return str(self._circuit.state)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let one call through. Raises BreakerOpen instead if none may pass.

        The block ends: the gateway served. It raises GatewayFailed: it did not. It raises anything else (a cancelled task): nothing was learned.
        """
        try:
            self._circuit.handle_new_request()
        except OpenedState:
            raise BreakerOpen from None
        probe = self._circuit.state == HALF_OPENED
        if probe and self._probing:
            raise BreakerOpen
        self._probing = probe
        try:
            yield
        except GatewayFailed as failure:
            self._circuit.handle_exception(failure)
            raise
        else:
            self._circuit.handle_end_request()
        finally:
            if probe:
                self._probing = False
            self._tell_changes()

    def _tell_changes(self) -> None:
        """purgatory keeps its news until somebody takes them."""
        for news in self._circuit.messages:
            if isinstance(news, ContextChanged):
                STATE.labels(self._gateway).set(_LEVELS[news.state])
                _log.warning("gateway breaker changed", gateway=self._gateway, state=news.state)
        self._circuit.messages.clear()
