"""Named points that every effect passes, so that tests can break the program exactly there.

Rule: `await at("payments.after_charge")` does nothing in production. A test plugs in what shall happen (raise, cancel, wait); a real process that was
started with `PAYSTREAM_CRASH_AT=name` or `name:n` ends itself, like a power cut, when it passes that point for the n-th time.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

Plug = Callable[[str], Awaitable[None]]

_plugs: list[Plug] = []
_passed: Final[Counter[str]] = Counter()
_crash_at, _, _nth = os.environ.get("PAYSTREAM_CRASH_AT", "").partition(":")


async def at(point: str) -> None:
    """Pass the named point."""
    if _crash_at == point:
        crash_here(point)
    for plug in _plugs:
        await plug(point)


def crash_here(point: str) -> None:
    """The same for code that runs in no event loop (the relay's Kafka thread): ends the process if this is the place and the time."""
    if _crash_at != point:
        return
    _passed[point] += 1
    if _passed[point] >= int(_nth or 1):
        print(f"crash point {point} hit", file=sys.stderr, flush=True)
        os._exit(137)


class plugged:
    """Within the block, `plug(point)` runs at each point that is passed."""

    def __init__(self, plug: Plug) -> None:
        self._plug = plug

    def __enter__(self) -> None:
        _plugs.append(self._plug)

    def __exit__(self, *_: object) -> None:
        _plugs.remove(self._plug)
