"""Whether this process can do its work, and which part of the outside keeps it from that.

Rule: asking costs the outside one question a second at most, however often we are asked, because these routes are open to everybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

_GOOD_FOR_S: Final = 1.0
_PATIENCE_S: Final = 2.5


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the outside. `answers` may raise; without one that is `needed`, nothing can be taken."""

    name: str
    answers: Callable[[], Awaitable[bool]]
    needed: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Health:
    """`down` are the names of the parts that don't answer."""

    ready: bool
    parts: dict[str, bool]

    @property
    def status(self) -> str:
        if not self.ready:
            return "not ready"
        return "ready" if all(self.parts.values()) else "degraded"


class Doctor:
    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._seen: Health | None = None
        self._seen_at = 0.0
        self._turn = asyncio.Lock()

    async def look(self) -> Health:
        """How it stands, as of a second ago at most."""
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen_at > _GOOD_FOR_S:
                answered = await asyncio.gather(*(_answers(part) for part in self._parts))
                ready = all(ok or not part.needed() for part, ok in zip(self._parts, answered, strict=True))
                self._seen = Health(ready, {part.name: ok for part, ok in zip(self._parts, answered, strict=True)})
                self._seen_at = time.monotonic()
            return self._seen


async def _answers(part: Part) -> bool:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await part.answers()
    except Exception:  # whatever it says, it is not an answer
        return False
