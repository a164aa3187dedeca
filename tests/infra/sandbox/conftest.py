"""A sandbox in this process, what calls it, and an endpoint that takes its webhooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest
import stripe
from aiohttp import web

from infra.sandbox.server import running_sandbox

DEADLINE_S = 10.0
KEY = "sk_test_sandbox"
NO_REDIRECTS: Any = {"automatic_payment_methods": {"enabled": True, "allow_redirects": "never"}}

Json = dict[str, Any]


@dataclass
class Answer:
    status: int
    body: Json
    headers: Any


class Client:
    """Plain HTTP to one sandbox, and the official SDK (`stripe`) for the same one."""

    def __init__(self, url: str, session: aiohttp.ClientSession, sdk: stripe.StripeClient) -> None:
        self.url = url
        self.session = session
        self.stripe = sdk

    async def ask(self, method: str, path: str, *, key: str | None = None, token: str = f"Bearer {KEY}", **sent: Any) -> Answer:
        headers = {"Authorization": token} | ({"Idempotency-Key": key} if key else {})
        async with self.session.request(method, self.url + path, headers=headers, **sent) as answer:
            text = await answer.read()
            return Answer(answer.status, orjson.loads(text) if "json" in answer.content_type else {"text": text.decode()}, answer.headers)

    async def create(self, method: str | None = "pm_card_visa", *, key: str | None = None, **fields: str) -> Answer:
        form = {"amount": "1999", "currency": "eur", "automatic_payment_methods[enabled]": "true"} | fields
        form |= {"automatic_payment_methods[allow_redirects]": "never"} | ({"payment_method": method} if method else {})
        return await self.ask("POST", "/v1/payment_intents", key=key, data=form)

    async def confirm(self, intent: str, *, key: str | None = None, **fields: str) -> Answer:
        return await self.ask("POST", f"/v1/payment_intents/{intent}/confirm", key=key, data=fields)

    async def paid(self, method: str = "pm_card_visa", **fields: str) -> Json:
        """An intent that was confirmed, as it is then."""
        return (await self.confirm((await self.create(method, **fields)).body["id"])).body

    async def status(self, intent: str) -> str:
        return str((await self.ask("GET", f"/v1/payment_intents/{intent}")).body["status"])

    async def order_fault(self, **fault: Any) -> None:
        answer = await self.ask("POST", "/_sandbox/faults", json=fault)
        assert answer.status == 201, answer.body

    async def ledger(self, **query: str) -> list[Json]:
        charges: list[Json] = (await self.ask("GET", "/ledger", params=query)).body["charges"]
        return charges


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        http = stripe.AIOHTTPClient(session=session)
        yield Client(url, session, stripe.StripeClient(KEY, base_addresses={"api": url}, http_client=http, max_network_retries=0))


@pytest.fixture
async def sandbox() -> AsyncIterator[Client]:
    async with running_sandbox() as url, client(url) as connected:
        yield connected


@dataclass
class Receiver:
    """An endpoint. `refuse` is how many deliveries it turns away first."""

    url: str = ""
    refuse: int = 0
    bodies: list[bytes] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)
    tries: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        async with self.changed:
            self.tries += 1
            if self.tries > self.refuse:
                self.bodies.append(body)
                self.signatures.append(request.headers["Stripe-Signature"])
            self.changed.notify_all()
        return web.Response(status=200 if self.tries > self.refuse else 503)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(holds)

    @property
    def events(self) -> list[Json]:
        return [orjson.loads(body) for body in self.bodies]

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]

    async def register(self, sandbox: Client, *events: str) -> str:
        """Its secret."""
        wanted = {f"enabled_events[{place}]": event for place, event in enumerate(events or ("*",))}
        answer = await sandbox.ask("POST", "/v1/webhook_endpoints", data={"url": self.url} | wanted)
        assert answer.status == 200, answer.body
        return str(answer.body["secret"])


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    taker = Receiver()
    application = web.Application()
    application.router.add_post("/webhooks", taker.receive)
    async with AsyncExitStack() as closing:
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        closing.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        taker.url = f"http://127.0.0.1:{runner.addresses[0][1]}/webhooks"
        yield taker
