"""The analytics agent: all of payment-events in one line, so that what has come up since the last write is written together.

Faust's own batches (`noack_take`) would wait for their time to be up when there is little to do, and keep messages over a rebalance that are another
worker's by then.
"""

from __future__ import annotations

from typing import Any, Final

from processors.app import App

TOPICS: Final = ("payment-events",)
BATCH: Final = 500
FETCH_WAIT_MS: Final = 250
_ONE_LINE: Final = "all"


def register(app: App) -> None:
    @app.agent(app.topics_named(*TOPICS), name="analytics")  # type: ignore[untyped-decorator]  # Faust has no types
    async def analytics(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.admit(event, _ONE_LINE)
