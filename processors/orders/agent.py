"""The orders agent: all of payment-events in one line, so that what has come up since the last write is written together."""

from __future__ import annotations

from typing import Any, Final

from processors.app import App

TOPICS: Final = ("payment-events",)
BATCH: Final = 200
FETCH_WAIT_MS: Final = 100
_ONE_LINE: Final = "all"


def register(app: App) -> None:
    @app.agent(app.topics_named(*TOPICS), name="orders")  # type: ignore[untyped-decorator]  # Faust has no types
    async def orders(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.admit(event, _ONE_LINE)
