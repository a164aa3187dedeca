"""What stands outside of Paystream: a caller of the intake, and the customer and the bank at the sandbox.

Rule: a caller does what the API's documentation tells callers to do: an answer that was lost, or one that says "try again", is asked for again with
the same key. Used by the demo, the benchmark and the tests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from schemas.errors import Unavailable

Session = aiohttp.ClientSession
_TRY_AGAIN: Final = frozenset({429, 502, 503, 504})
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of the API; `headers` in any case. `seconds` is how long the request took that brought it, after `tries`."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str]
    seconds: float
    tries: int

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def replayed(self) -> bool:
        return self.headers.get("Idempotent-Replayed") == "true"


class Caller:
    """Calls the intake as one user. Raises Unavailable when nothing answers for a minute."""

    def __init__(self, session: Session, base_url: str, token: str) -> None:
        self._session, self._base = session, base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}

    async def post(self, path: str, body: dict[str, Any], *, key: str | None = None, wait_s: int | None = None) -> Answer:
        headers = {**({"Idempotency-Key": key} if key else {}), **({"Prefer": f"wait={wait_s}"} if wait_s else {})}
        return await self._ask("POST", path, json=body, headers=headers)

    async def get(self, path: str, **query: str) -> Answer:
        return await self._ask("GET", path, params=query)

    async def _ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> Answer:
        ends, tries, reason = time.monotonic() + _PATIENCE_S, 0, ""
        while time.monotonic() < ends:
            tries += 1
            started = time.perf_counter()
            pause = min(0.1 * 2**tries, 2.0)
            try:
                async with self._session.request(
                    method, f"{self._base}/api/v1{path}", headers={**self._headers, **(headers or {})}, **options
                ) as answer:
                    body = await answer.json(content_type=None)
                    in_flight = answer.status == 409 and "Retry-After" in answer.headers
                    if answer.status not in _TRY_AGAIN and not in_flight:
                        seconds = time.perf_counter() - started
                        return Answer(status=answer.status, body=body, headers=answer.headers, seconds=seconds, tries=tries)
                    reason, pause = f"HTTP {answer.status}", min(float(answer.headers.get("Retry-After", pause)), 2.0)
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = type(error).__name__
            await asyncio.sleep(pause)
        raise Unavailable("the API", f"{reason} for {_PATIENCE_S:.0f} s")


class Bank:
    """The sandbox's other side: the customer, faults to order, and the ledger."""

    def __init__(self, session: Session, base_url: str) -> None:
        self._session, self._base = session, base_url.rstrip("/")

    async def ledger(self) -> list[dict[str, Any]]:
        """What was really charged."""
        charges: list[dict[str, Any]] = (await self._ask("GET", "/ledger"))["charges"]
        return charges

    async def order_fault(self, kind: str, **details: Any) -> None:
        await self._ask("POST", "/_sandbox/faults", json={"kind": kind, **details})

    async def drop_faults(self) -> None:
        await self._ask("DELETE", "/_sandbox/faults")

    async def pay(self, client_secret: str, payment_method: str) -> None:
        """The customer's browser pays with the client secret, past the shop."""
        body = {"client_secret": client_secret, "payment_method": payment_method}
        await self._ask("POST", f"/_sandbox/payment_intents/{client_secret.partition('_secret_')[0]}/pay", json=body)

    async def authenticate(self, intent_id: str, *, passes: bool = True) -> None:
        """The customer answers the bank's 3-D Secure question."""
        await self._ask("POST", f"/_sandbox/payment_intents/{intent_id}/authenticate", json={"outcome": "success" if passes else "failure"})

    async def pending_webhooks(self) -> int:
        return int((await self._ask("GET", "/_sandbox/health"))["pending_webhooks"])

    async def change(self, **settings: Any) -> dict[str, Any]:
        """Set how the gateway behaves: `latency` of a call, `success_rate`. Returns the settings as they were."""
        return await self._ask("POST", "/_sandbox/settings", json=settings)

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._base + path, **options) as answer:
                body: dict[str, Any] = await answer.json(content_type=None) or {}
                if answer.status >= 400:
                    raise Unavailable("the sandbox", f"{method} {path}: HTTP {answer.status} {body}")
                return body
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable("the sandbox", type(error).__name__) from error


async def scraped(session: Session, base_url: str) -> list[Sample]:
    """The metrics of a process of ours, as Prometheus would see them now. Raises Unavailable."""
    try:
        async with session.get(f"{base_url}/metrics", raise_for_status=True) as answer:
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"the process at {base_url}", type(error).__name__) from error
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


@asynccontextmanager
async def opened_session(connections: int = 100) -> AsyncIterator[Session]:
    """An HTTP session for a Caller and a Bank."""
    connector = aiohttp.TCPConnector(limit=connections)
    async with Session(connector=connector, timeout=aiohttp.ClientTimeout(total=45)) as session:
        yield session
