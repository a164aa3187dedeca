"""Events and how they reach whoever registered for them (docs.stripe.com/webhooks).

Rule: an event is written in the transaction of the change that it tells of, with a row for each delivery; nothing is sent before that is committed,
and a row goes only when the endpoint answered 2xx, or after three days. So events survive the process, and may come twice.
Flow: account publishes -> delivery rows -> a lane for each endpoint and object, in order -> signed POST -> row deleted, or postponed.

Stripe promises no order. The sandbox keeps the first tries for one object in order, so that "out of order" happens where a fault orders it, and tests
can tell the difference.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import sqlite3
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import aiohttp
import orjson
import structlog

from infra.sandbox import objects
from infra.sandbox.faults import Faults
from infra.sandbox.parameters import Registration
from infra.sandbox.storage import Delivery, Endpoint, Event, Storage

_RETRY_FIRST_S: Final = 1.0
_RETRY_MOST_S: Final = 3600.0
_GIVE_UP_S: Final = 3 * 24 * 3600.0
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_AT_ONCE: Final = 64

_log = structlog.get_logger(__name__)
_Lane = tuple[str, str]


def signature(secret: str, body: bytes, timestamp: int) -> str:
    """The `Stripe-Signature` header: HMAC-SHA256 over `{t}.{body}`."""
    digest = hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


def retry_after(attempts: int) -> float:
    """Seconds until the next try, after so many that failed: 1, 2, 4 … up to an hour."""
    return min(_RETRY_FIRST_S * 2.0 ** min(attempts - 1, 20), _RETRY_MOST_S)


class Webhooks:
    """Publishes, delivers, and knows the endpoints. `start` before use, `stop` at the end: what is undelivered then goes out after the next start."""

    def __init__(self, storage: Storage, faults: Faults) -> None:
        self._storage = storage
        self._faults = faults
        self._endpoints = {endpoint.id: endpoint for endpoint in storage.endpoints.all()}
        self._lanes: dict[_Lane, deque[Delivery]] = {}
        self._held: defaultdict[_Lane, list[tuple[asyncio.TimerHandle, Delivery]]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None
        self._failing: set[str] = set()

    def start(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60), timeout=_TIMEOUT)
        for delivery in self._storage.deliveries():
            self._plan(delivery)

    async def stop(self) -> None:
        session, self._session = self._session, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if session is not None:
            await session.close()

    # -- endpoints

    def register(self, wish: Registration, now: int, secret: str | None = None) -> Endpoint:
        """The endpoint for this address; one that exists gets the new settings and keeps its secret, unless another `secret` is given."""
        known = self._storage.endpoints.labelled(wish.url)
        if known:
            endpoint = replace(
                known[0],
                secret=secret or known[0].secret,
                enabled_events=wish.enabled_events,
                description=wish.description,
                metadata=wish.metadata,
            )
        else:
            endpoint = Endpoint(
                id=f"we_{secrets.token_hex(12)}",
                created=now,
                url=wish.url,
                secret=secret or f"whsec_{secrets.token_hex(16)}",
                enabled_events=wish.enabled_events,
                description=wish.description,
                metadata=wish.metadata,
            )
        self._storage.endpoints.put(endpoint)
        self._endpoints[endpoint.id] = endpoint
        return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        self._storage.endpoints.delete(endpoint.id)
        self._endpoints.pop(endpoint.id, None)

    # -- publishing

    def publish(
        self,
        event_type: str,
        subject: objects.Json,
        *,
        about: str,
        metadata: Mapping[str, str],
        now: int,
        request_id: str | None,
        idempotency_key: str | None,
    ) -> None:
        """Write the event, and plan its deliveries. `subject` is the object as it is now; events `about` one intent go out in order."""
        wanted = [endpoint for endpoint in self._endpoints.values() if endpoint.wants(event_type)]
        identifier = f"evt_{secrets.token_hex(12)}"
        body = orjson.dumps(
            objects.event(identifier, now, event_type, subject, pending_webhooks=len(wanted), request_id=request_id, idempotency_key=idempotency_key)
        )
        self._storage.events.put(Event(id=identifier, created=now, body=body))
        for endpoint in wanted:
            self._send(identifier, endpoint.id, about, event_type, metadata)

    def _send(self, event: str, endpoint: str, about: str, event_type: str, metadata: Mapping[str, str]) -> None:
        now = time.time()
        fault = self._faults.for_event(event_type, metadata)
        kind, delay_s = (fault.kind, fault.delay_seconds) if fault else (None, 0.0)
        match kind:
            case "webhook_never":
                pass
            case "webhook_late":
                self._plan(self._storage.add_delivery(event, endpoint, about, now + delay_s))
            case "webhook_out_of_order":
                # Held until a later event of the same object was delivered; where none comes in time, it goes out by itself.
                delivery = self._storage.add_delivery(event, endpoint, about, now + delay_s)
                self._held[(endpoint, about)].append((self._plan(delivery), delivery))
            case _:
                for _ in range(2 if kind == "webhook_twice" else 1):
                    self._enter(self._storage.add_delivery(event, endpoint, about, now))

    # -- delivering

    def _plan(self, delivery: Delivery) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, delivery.due - time.time()), self._enter, delivery)

    def _enter(self, delivery: Delivery) -> None:
        if self._session is None:
            return
        name = (delivery.endpoint, delivery.subject)
        lane = self._lanes.get(name)
        if lane is not None:
            lane.append(delivery)
            return
        self._lanes[name] = deque([delivery])
        task = asyncio.get_running_loop().create_task(self._drain(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, name: _Lane) -> None:
        lane = self._lanes[name]
        try:
            while lane:
                await self._storage.committed()
                async with self._slots:
                    await self._try(lane.popleft())
        except sqlite3.Error:
            _log.exception("deliveries can't be kept track of; what was written goes out after a restart")
        finally:
            del self._lanes[name]

    async def _try(self, delivery: Delivery) -> None:
        endpoint = self._endpoints.get(delivery.endpoint)
        event = self._storage.events.get(delivery.event)
        if endpoint is None or event is None:
            self._storage.delete_delivery(delivery)
            return
        problem = await self._post(endpoint, event.body)
        if problem is None:
            self._storage.delete_delivery(delivery)
            self._failing.discard(endpoint.id)
            self._let_go(delivery)
            return
        if endpoint.id not in self._failing:
            self._failing.add(endpoint.id)
            _log.warning("webhook endpoint does not accept events; they are kept and tried again", url=endpoint.url, problem=problem)
        attempts = delivery.attempts + 1
        due = time.time() + retry_after(attempts)
        if due - delivery.first_due > _GIVE_UP_S:
            self._storage.delete_delivery(delivery)
            return
        postponed = replace(delivery, attempts=attempts, due=due)
        self._storage.postpone_delivery(postponed)
        self._plan(postponed)

    async def _post(self, endpoint: Endpoint, body: bytes) -> str | None:
        """None if it was accepted, else what went wrong."""
        if self._session is None:
            return "the sandbox is stopping"
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature(endpoint.secret, body, int(time.time())),
            "User-Agent": "Paystream-Sandbox/1.0",
        }
        try:
            async with self._session.post(endpoint.url, data=body, headers=headers, allow_redirects=False) as answer:
                return None if 200 <= answer.status < 300 else f"status {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__

    def _let_go(self, delivered: Delivery) -> None:
        for timer, delivery in self._held.pop((delivered.endpoint, delivered.subject), []):
            timer.cancel()
            if delivery.id != delivered.id:
                self._enter(delivery)
