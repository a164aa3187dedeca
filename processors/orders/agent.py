"""The orders agent: what happened to payments, one after the other for each order."""

from __future__ import annotations

from typing import Any, Final

from processors.app import App

TOPICS: Final = ("payment-events",)


def register(app: App) -> None:
    @app.agent(app.topics_named(*TOPICS), name="orders")  # type: ignore[untyped-decorator]  # Faust has no types
    async def orders(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.admit(event, event.key)
