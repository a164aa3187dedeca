"""The sandbox's time: the real one plus an offset that can be set, so that a test can let a day pass in a moment.

Objects are dated and idempotency keys forgotten by this clock. Webhooks are signed and retried by the real one: their receiver checks the signature's
age against a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class SandboxClock:
    def __init__(self, offset_s: float, remember: Callable[[float], None]) -> None:
        """`remember` keeps the offset over a restart: time must not run backwards for objects that exist."""
        self._offset_s = offset_s
        self._remember = remember

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time() + self._offset_s

    def advance(self, seconds: float) -> None:
        self._offset_s += seconds
        self._remember(self._offset_s)

    def set(self, moment: float) -> None:
        self.advance(moment - self.now())
