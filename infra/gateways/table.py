"""The gateways that there are: one line for each.

Flow: an entry point opens the configured ones and hands them to the handlers (`Deps.gateways`) and to the webhook routes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from infra.gateways.port import Gateway
from infra.gateways.stripe import stripe_gateway
from infra.settings import Settings

GATEWAYS: Final[Mapping[str, Callable[[Settings], Gateway | None]]] = {
    "stripe": stripe_gateway,
}
"""By the name that a payment gives; each makes its gateway inside the running loop, or answers None where the settings have no key for it."""


@asynccontextmanager
async def opened_gateways(settings: Settings) -> AsyncIterator[Mapping[str, Gateway]]:
    """The configured gateways, closed at the end of the block."""
    opened: dict[str, Gateway] = {}
    async with AsyncExitStack() as closing:
        for name, make in GATEWAYS.items():
            gateway = make(settings)
            if gateway is not None:
                closing.push_async_callback(gateway.aclose)
                opened[name] = gateway
        yield opened
