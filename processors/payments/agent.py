"""The payments agent: commands and webhooks into one window, so that all about an order is in one line.

Rule: no decision here. Both topics have the same partitions, and this worker has the same ones of both.
"""

from __future__ import annotations

from typing import Any, Final

from processors.app import App

TOPICS: Final = ("payment-commands", "payment-webhook-received")


def register(app: App) -> None:
    @app.agent(app.topics_named(*TOPICS), name="payments")  # type: ignore[untyped-decorator]  # Faust has no types
    async def payments(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.admit(event, event.key)
