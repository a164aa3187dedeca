"""What callers do in the demo: orders of every kind, each with what its caller saw.

Rule: nothing is checked here. A journey only does what a storefront would do, and writes down every answer it was given.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from infra.local.client import Answer, Bank, Caller

WAIT_S: Final = 15
PARKED_MESSAGES: Final = 2
"""Of a parked order: the one that nobody can read, and the cancellation behind it."""


@dataclass(kw_only=True)
class Journey:
    """One order from its caller's side. `answered`: (route, key, answer) of each request; `payment_id` as the first answer gave it."""

    order_id: str
    kind: str
    answered: list[tuple[str, str, Answer]] = field(default_factory=list)
    payment_id: str | None = None
    seconds: float | None = None
    """From the request that charges to its outcome, where the caller waited for it."""


Story = Callable[["Storefront", Journey], Awaitable[None]]


class Storefront:
    """Plays journeys against an installation."""

    def __init__(self, caller: Caller, bank: Bank, chance: random.Random, publish_raw: Callable[[str, bytes], Awaitable[None]]) -> None:
        self.caller, self.bank, self.chance, self.publish_raw = caller, bank, chance, publish_raw

    async def play(self, journeys: list[Journey], at_once: int) -> AsyncIterator[Journey]:
        """Each journey as it ends, `at_once` of them under way at a time."""
        room = asyncio.Semaphore(at_once)

        async def one(journey: Journey) -> Journey:
            async with room:
                await STORIES[journey.kind](self, journey)
            return journey

        for ended in asyncio.as_completed([asyncio.create_task(one(journey)) for journey in journeys]):
            yield await ended

    async def post(self, journey: Journey, route: str, body: dict[str, Any], *, key: str | None = None, wait: bool = True) -> Answer:
        key = key or secrets.token_hex(8)
        answer = await self.caller.post(route, body, key=key, wait_s=WAIT_S if wait else None)
        journey.answered.append((route, key, answer))
        if answer.ok and journey.payment_id is None:
            journey.payment_id = answer.body["payment_id"]
        return answer

    async def process(self, journey: Journey, method: str, **more: Any) -> Answer:
        answer = await self.post(journey, "/payments/process", self.order(journey) | {"payment_method": method, **more})
        journey.seconds = answer.seconds
        return answer

    def order(self, journey: Journey) -> dict[str, Any]:
        amount = self.chance.randrange(150, 25_000)
        return {"order_id": journey.order_id, "amount_minor": amount, "currency": self.chance.choice(("EUR", "EUR", "USD", "GBP", "JPY"))}


async def _card(shop: Storefront, journey: Journey) -> None:
    await shop.process(journey, shop.chance.choice(("pm_card_visa", "pm_card_mastercard")))


async def _decline(shop: Storefront, journey: Journey) -> None:
    await shop.process(journey, shop.chance.choice(("pm_card_chargeDeclined", "pm_card_chargeDeclinedInsufficientFunds")))


async def _other_card(shop: Storefront, journey: Journey) -> None:
    await _decline(shop, journey)
    await shop.post(journey, "/payments/confirm", {"payment_id": journey.payment_id, "payment_method": "pm_card_visa"})


async def _intent(shop: Storefront, journey: Journey) -> None:
    await shop.post(journey, "/payments/intent", shop.order(journey))
    await shop.post(journey, "/payments/confirm", {"payment_id": journey.payment_id, "payment_method": "pm_card_visa"})


async def _capture(shop: Storefront, journey: Journey) -> None:
    answer = await shop.process(journey, "pm_card_visa", capture_method="manual")
    part = {"amount_minor": max(1, answer.body.get("amount_minor", 2) // 2)} if shop.chance.random() < 0.5 else {}
    await shop.post(journey, f"/payments/{journey.payment_id}/capture", part)


async def _cancel(shop: Storefront, journey: Journey) -> None:
    if shop.chance.random() < 0.5:
        await shop.post(journey, "/payments/intent", shop.order(journey))
    else:
        await shop.process(journey, "pm_card_visa", capture_method="manual")
    await shop.post(journey, f"/payments/{journey.payment_id}/cancel", {"reason": "requested_by_customer"})


async def _secure(shop: Storefront, journey: Journey) -> None:
    answer = await shop.process(journey, "pm_card_threeDSecure2Required", return_url="https://shop.example/back")
    charges = answer.body.get("next_action") or {}
    intent = _intent_of(charges.get("redirect_url", ""))
    if intent:
        await shop.bank.authenticate(intent, passes=shop.chance.random() < 0.8)


async def _repeat(shop: Storefront, journey: Journey) -> None:
    body, key = shop.order(journey) | {"payment_method": "pm_card_visa"}, secrets.token_hex(8)
    await asyncio.gather(*(shop.post(journey, "/payments/process", body, key=key) for _ in range(3)))
    await shop.post(journey, "/payments/process", body, key=key)


async def _lost(shop: Storefront, journey: Journey) -> None:
    await shop.bank.order_fault("answer_lost", operation="confirm", times=1, match={"metadata": {"order_id": journey.order_id}})
    await shop.process(journey, "pm_card_visa")


async def _poison(shop: Storefront, journey: Journey) -> None:
    await shop.process(journey, "pm_card_visa")
    await shop.publish_raw(journey.order_id, b"\x00not a payment: " + secrets.token_bytes(12))
    # It is accepted, and waits behind the message that nobody can read.
    await shop.post(journey, f"/payments/{journey.payment_id}/cancel", {"reason": "behind a parked message"}, wait=False)


def _intent_of(url: str) -> str | None:
    """The gateway's object that a 3-D Secure page of the sandbox is about."""
    return next((part for part in url.replace("?", "/").split("/") if part.startswith("pi_")), None)


STORIES: Final[dict[str, Story]] = {
    "card": _card,
    "decline": _decline,
    "decline, other card": _other_card,
    "intent, then confirm": _intent,
    "hold, then capture": _capture,
    "cancel": _cancel,
    "3-D Secure": _secure,
    "repeated request": _repeat,
    "lost answer": _lost,
    "parked order": _poison,
}

_SHARES: Final = {
    "repeated request": 6,  # the first is always there, and this is what D2 is checked on
    "card": 44,
    "decline": 8,
    "decline, other card": 6,
    "intent, then confirm": 8,
    "hold, then capture": 10,
    "cancel": 6,
    "3-D Secure": 6,
    "lost answer": 6,
}


def planned(payments: int, parked: int, run: str, chance: random.Random) -> list[Journey]:
    """`payments` journeys of all kinds in about their shares, at least one of each where there is room, and `parked` that meet poison; shuffled."""
    kinds = list(_SHARES)[:payments]
    kinds += chance.choices(list(_SHARES), weights=list(_SHARES.values()), k=payments - len(kinds))
    kinds += ["parked order"] * parked
    chance.shuffle(kinds)
    return [Journey(order_id=f"{run}-{number:04d}", kind=kind) for number, kind in enumerate(kinds)]
