"""The other side of the sandbox: what tests order (faults, time), what the customer and the bank do, and the ledger of what was really charged.

These routes have no key: the sandbox listens on the local machine, and the money is play money.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web

from infra.sandbox import objects
from infra.sandbox.account import Account, Caller
from infra.sandbox.api import base_url, guarded
from infra.sandbox.behaviour import Behaviour, Conditions
from infra.sandbox.clock import SandboxClock
from infra.sandbox.errors import invalid
from infra.sandbox.faults import Faults
from infra.sandbox.intents import Intent
from infra.sandbox.parameters import Confirmation, is_web_address
from infra.sandbox.storage import Storage
from schemas.errors import BadConfiguration

_NEVER_AFTER = 4_102_444_800  # the year 2100: a clock beyond it is a mistake


class Control:
    def __init__(self, account: Account, storage: Storage, faults: Faults, clock: SandboxClock, behaviour: Behaviour) -> None:
        self._account = account
        self._storage = storage
        self._faults = faults
        self._clock = clock
        self._behaviour = behaviour

    def routes(self) -> list[web.RouteDef]:
        intent = "/_sandbox/payment_intents/{id}"
        return [
            web.get("/ledger", guarded(self._ledger, self._storage)),
            web.get("/_sandbox/health", guarded(self._health, self._storage)),
            web.get("/_sandbox/settings", guarded(self._read_settings, self._storage)),
            web.post("/_sandbox/settings", guarded(self._change_settings, self._storage)),
            web.get("/_sandbox/clock", guarded(self._read_clock, self._storage)),
            web.post("/_sandbox/clock", guarded(self._set_clock, self._storage)),
            web.get("/_sandbox/faults", guarded(self._read_faults, self._storage)),
            web.post("/_sandbox/faults", guarded(self._order_fault, self._storage)),
            web.delete("/_sandbox/faults", guarded(self._drop_faults, self._storage)),
            web.post(f"{intent}/pay", guarded(self._pay, self._storage)),
            web.post(f"{intent}/authenticate", guarded(self._authenticate, self._storage)),
            web.post(f"{intent}/settle", guarded(self._settle, self._storage)),
            web.post(f"{intent}/lapse", guarded(self._lapse, self._storage)),
        ]

    async def _ledger(self, request: web.Request) -> web.StreamResponse:
        order_id = request.query.get("order_id")
        charges = self._storage.charges.all() if order_id is None else self._storage.charges.labelled(order_id)
        taken = [objects.ledger_entry(charge, _moment(charge.created)) for charge in charges if charge.status == "succeeded"]
        return _json({"charges": taken})

    async def _health(self, _: web.Request) -> web.StreamResponse:
        return _json({"status": "ok", "time": _moment(self._clock.now()), "pending_webhooks": self._storage.undelivered()})

    # -- conditions, time and faults

    async def _read_settings(self, _: web.Request) -> web.StreamResponse:
        return _json(self._behaviour.conditions)

    async def _change_settings(self, request: web.Request) -> web.StreamResponse:
        """Changes those that are given, and answers with all as they were before: who posts that brings them back."""
        before = self._behaviour.conditions
        wish = await _object(request, {"latency", "success_rate", "failure_reasons"})
        rate = _number(wish.get("success_rate", before.success_rate), "success_rate")
        try:
            self._behaviour.adopt(
                Conditions(
                    latency=_text(wish, "latency") or before.latency,
                    success_rate=rate,
                    failure_reasons=_text(wish, "failure_reasons") or before.failure_reasons,
                )
            )
        except BadConfiguration as error:
            raise invalid(error.detail) from None
        return _json(before)

    async def _read_clock(self, _: web.Request) -> web.StreamResponse:
        return _json({"time": _moment(self._clock.now())})

    async def _set_clock(self, request: web.Request) -> web.StreamResponse:
        wish = await _object(request, {"advance_seconds", "set"})
        if len(wish) != 1:
            raise invalid("give either advance_seconds (a number) or set (seconds since 1970, or RFC 3339)")
        forward = self._clock.now() + _number(wish.get("advance_seconds", 0), "advance_seconds")
        moment = _read_moment(wish["set"]) if "set" in wish else forward
        if not 0 <= moment < _NEVER_AFTER:
            raise invalid("the clock can be set to a time between 1970 and 2100", param="set")
        self._clock.set(moment)
        return await self._read_clock(request)

    async def _read_faults(self, _: web.Request) -> web.StreamResponse:
        return _json({"faults": self._faults.shown()})

    async def _order_fault(self, request: web.Request) -> web.StreamResponse:
        return _json(self._faults.order(await _object(request, None)), status=201)

    async def _drop_faults(self, _: web.Request) -> web.StreamResponse:
        self._faults.clear()
        return _json({"faults": []})

    # -- the customer and the bank

    async def _pay(self, request: web.Request) -> web.StreamResponse:
        wish = await _object(request, {"payment_method", "client_secret", "return_url"})
        method, client_secret, return_url = (_text(wish, name) for name in ("payment_method", "client_secret", "return_url"))
        if return_url is not None and not is_web_address(return_url):
            raise invalid("return_url must begin with http:// or https://", param="return_url")
        confirmation = Confirmation(payment_method=method, return_url=return_url, expand=frozenset())
        return self._shown(request, self._account.pay(request.match_info["id"], client_secret or "", confirmation, _caller(request)))

    async def _authenticate(self, request: web.Request) -> web.StreamResponse:
        passed = await _outcome(request)
        return self._shown(request, self._account.authenticate(request.match_info["id"], _caller(request), passed=passed))

    async def _settle(self, request: web.Request) -> web.StreamResponse:
        cleared = await _outcome(request)
        return self._shown(request, self._account.settle(request.match_info["id"], _caller(request), cleared=cleared))

    async def _lapse(self, request: web.Request) -> web.StreamResponse:
        return self._shown(request, self._account.lapse(request.match_info["id"], _caller(request)))

    def _shown(self, request: web.Request, intent: Intent) -> web.StreamResponse:
        return _json(self._account.show(intent, _caller(request), frozenset()))


def _caller(request: web.Request) -> Caller:
    return Caller(base_url=base_url(request))


async def _object(request: web.Request, known: set[str] | None) -> dict[str, Any]:
    """The JSON object in the body. Raises ApiError, naming a member that is not among the `known`."""
    try:
        body = orjson.loads(await request.read() or b"{}")
    except orjson.JSONDecodeError:
        raise invalid("the body is no JSON") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    for name in body.keys() - (known if known is not None else body.keys()):
        raise invalid(f"{name[:50]} is not known here; there are: {', '.join(sorted(known or ()))}", param=name[:50])
    return body


async def _outcome(request: web.Request) -> bool:
    match (await _object(request, {"outcome"})).get("outcome"):
        case "success":
            return True
        case "failure":
            return False
        case _:
            raise invalid("outcome must be success or failure", param="outcome")


def _text(wish: dict[str, Any], name: str) -> str | None:
    value = wish.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{name} must be a text", param=name)
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"{name} must be a number", param=name)
    return float(value)


def _read_moment(value: Any) -> float:
    if not isinstance(value, str):
        return _number(value, "set")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise invalid("set must be seconds since 1970 or RFC 3339, like 2026-01-31T12:00:00Z", param="set") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _json(shown: Any, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(shown), content_type="application/json")
