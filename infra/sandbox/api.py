"""Stripe's API over HTTP: the routes that the official SDK calls.

Rule: a call that moves an intent goes one way, `_operate`: who asks, do the parameters fit, was this key answered before, does a fault strike, do it,
save the answer; then it is committed (`guarded`), and only then answered. So what was done is in the ledger before its answer goes out, and an answer
that is saved under a key is saved with what it tells of.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from infra.sandbox import objects, parameters
from infra.sandbox.account import Account, Caller
from infra.sandbox.behaviour import Behaviour
from infra.sandbox.errors import ApiError, invalid, missing, server_error
from infra.sandbox.faults import Fault, Faults
from infra.sandbox.idempotency import Keys, fingerprint
from infra.sandbox.parameters import Form, Pairs
from infra.sandbox.storage import Endpoint, Storage
from infra.sandbox.webhooks import Webhooks

_SECRET_KEY: Final = re.compile(r"sk_test_\w+")
_SECRET_OR_PUBLISHABLE_KEY: Final = re.compile(r"[sp]k_test_\w+")
_RETRY_AFTER_S: Final = 1
_LOOK_S: Final = 0.05

_log = structlog.get_logger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """How a call on intents is read from its parameters, and run: (account, intent's id, what was read, caller) -> the object to show."""

    read: Callable[[Form], Any]
    run: Callable[[Account, str, Any, Caller], objects.Json]


def _create(account: Account, _: str, wish: parameters.Creation, caller: Caller) -> objects.Json:
    return account.show(account.create(wish, caller), caller, wish.expand)


def _confirm(account: Account, identifier: str, wish: parameters.Confirmation, caller: Caller) -> objects.Json:
    return account.show(account.confirm(identifier, wish, caller), caller, wish.expand)


def _capture(account: Account, identifier: str, wish: parameters.Capture, caller: Caller) -> objects.Json:
    return account.show(account.capture(identifier, wish.amount, caller), caller, wish.expand)


def _cancel(account: Account, identifier: str, wish: parameters.Cancellation, caller: Caller) -> objects.Json:
    return account.show(account.cancel(identifier, wish.reason, caller), caller, wish.expand)


def _retrieve(account: Account, identifier: str, wish: parameters.Retrieval, caller: Caller) -> objects.Json:
    return account.show(account.intent(identifier), caller, wish.expand)


def _list(account: Account, _: str, page: parameters.Page, caller: Caller) -> objects.Json:
    intents, has_more = account.intents(page)
    return objects.listing("/v1/payment_intents", [account.show(intent, caller, page.expand) for intent in intents], has_more=has_more)


_OPERATIONS: Final = {
    "create": _Operation(read=parameters.read_creation, run=_create),
    "confirm": _Operation(read=parameters.read_confirmation, run=_confirm),
    "capture": _Operation(read=parameters.read_capture, run=_capture),
    "cancel": _Operation(read=parameters.read_cancellation, run=_cancel),
    "retrieve": _Operation(read=parameters.read_retrieval, run=_retrieve),
    "list": _Operation(read=parameters.read_page, run=_list),
}


class StripeApi:
    def __init__(self, account: Account, storage: Storage, webhooks: Webhooks, keys: Keys, faults: Faults, behaviour: Behaviour) -> None:
        self._account = account
        self._storage = storage
        self._webhooks = webhooks
        self._keys = keys
        self._faults = faults
        self._behaviour = behaviour

    def routes(self) -> list[web.RouteDef]:
        intents, endpoints = "/v1/payment_intents", "/v1/webhook_endpoints"
        return [
            web.post(intents, self._operation("create")),
            web.get(intents, self._operation("list")),
            web.get(f"{intents}/{{id}}", self._operation("retrieve")),
            web.post(f"{intents}/{{id}}/confirm", self._operation("confirm")),
            web.post(f"{intents}/{{id}}/capture", self._operation("capture")),
            web.post(f"{intents}/{{id}}/cancel", self._operation("cancel")),
            web.post("/v1/payment_methods", guarded(self._add_method, self._storage)),
            web.get("/v1/payment_methods/{id}", guarded(self._method, self._storage)),
            web.get("/v1/charges/{id}", guarded(self._charge, self._storage)),
            web.get("/v1/events", guarded(self._events, self._storage)),
            web.get("/v1/events/{id}", guarded(self._event, self._storage)),
            web.post(endpoints, guarded(self._register, self._storage)),
            web.get(endpoints, guarded(self._endpoints, self._storage)),
            web.get(f"{endpoints}/{{id}}", guarded(self._endpoint, self._storage)),
            web.delete(f"{endpoints}/{{id}}", guarded(self._unregister, self._storage)),
            web.route("*", "/v1/{path:.*}", guarded(_unknown, self._storage)),
        ]

    # -- payment intents

    def _operation(self, name: str) -> Handler:
        operation = _OPERATIONS[name]

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._operate(request, name, operation)

        return guarded(handle, self._storage)

    async def _operate(self, request: web.Request, name: str, operation: _Operation) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        asked = await _pairs(request)
        wish = operation.read(Form(asked))
        key = request.headers.get("Idempotency-Key") if request.method == "POST" else None
        caller = Caller(base_url=base_url(request), request_id=f"req_{secrets.token_hex(7)}", idempotency_key=key)
        mark = fingerprint(request.method, request.path, asked) if key is not None else b""
        saved = self._keys.claim(key, mark) if key is not None else None
        try:
            fault = self._fault(name, request, wish, replayed=saved is not None)
            await self._before(fault, request)
            if saved is not None:
                status, body = saved.status, saved.body
            else:
                status, body = self._run(operation, request.match_info.get("id", ""), wish, caller, fault)
                if key is not None:
                    self._keys.save(key, mark, status, body)
        finally:
            if key is not None and saved is None:
                self._keys.release(key)
        await _after(fault, request)
        return _answer(status, body, caller, replayed=saved is not None)

    def _fault(self, name: str, request: web.Request, wish: Any, *, replayed: bool) -> Fault | None:
        if not self._faults.waiting:
            return None
        if isinstance(wish, parameters.Creation):
            metadata = wish.metadata
        else:
            intent = self._storage.intents.get(request.match_info.get("id", ""))
            metadata = {} if intent is None else intent.metadata
        return self._faults.for_call(name, metadata, replayed=replayed)

    async def _before(self, fault: Fault | None, request: web.Request) -> None:
        """The way in: the latency (payment methods and endpoints have none), and the faults that keep the work from being done."""
        pause = self._behaviour.latency_s()
        if fault is not None:
            if fault.kind == "refuse":
                raise _HangUp
            if fault.kind == "rate_limit":
                raise ApiError(429, "rate_limit_error", "Too many requests hit the API too quickly.", code="rate_limit")
            if fault.kind == "timeout" and not fault.after_charge:
                await _until_client_gives_up(request)
            if fault.kind == "slow":
                pause += fault.delay_seconds
        if pause > 0:
            await asyncio.sleep(pause)

    def _run(self, operation: _Operation, identifier: str, wish: Any, caller: Caller, fault: Fault | None) -> tuple[int, bytes]:
        broken = fault if fault is not None and fault.kind == "error_500" else None
        if broken is not None and not broken.after_charge:
            return 500, server_error().body()
        try:
            status, body = 200, orjson.dumps(operation.run(self._account, identifier, wish, caller))
        except ApiError as refusal:
            status, body = refusal.status, refusal.body()
        return (status, body) if broken is None else (500, server_error().body())

    # -- the rest, which costs nothing and never fails

    async def _add_method(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_OR_PUBLISHABLE_KEY)
        method = self._account.add_method(parameters.read_card(Form(await _pairs(request))))
        return _json(objects.payment_method(method))

    async def _method(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        return _json(objects.payment_method(self._account.method(request.match_info["id"], status=404)))

    async def _charge(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        return _json(objects.charge(self._account.charge(request.match_info["id"]), base_url(request)))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        page = parameters.read_page(Form(await _pairs(request)))
        events = self._storage.events.page(page.limit + 1, after=page.after, created_from=page.created_from)
        shown = [orjson.Fragment(event.body) for event in events[: page.limit]]
        return _json(objects.listing("/v1/events", shown, has_more=len(events) > page.limit))

    async def _event(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        event = self._storage.events.get(request.match_info["id"])
        if event is None:
            raise missing("event", request.match_info["id"], param="id")
        return _json(orjson.Fragment(event.body))

    async def _register(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        endpoint = self._webhooks.register(parameters.read_registration(Form(await _pairs(request))), self._account.now())
        return _json(objects.webhook_endpoint(endpoint, with_secret=True))

    async def _endpoints(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        endpoints = [objects.webhook_endpoint(endpoint) for endpoint in self._storage.endpoints.all()]
        return _json(objects.listing("/v1/webhook_endpoints", endpoints, has_more=False))

    async def _endpoint(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        return _json(objects.webhook_endpoint(self._known_endpoint(request)))

    async def _unregister(self, request: web.Request) -> web.StreamResponse:
        _authenticate(request, _SECRET_KEY)
        endpoint = self._known_endpoint(request)
        self._webhooks.remove(endpoint)
        return _json({"id": endpoint.id, "object": "webhook_endpoint", "deleted": True})

    def _known_endpoint(self, request: web.Request) -> Endpoint:
        endpoint = self._storage.endpoints.get(request.match_info["id"])
        if endpoint is None:
            raise missing("webhook endpoint", request.match_info["id"], param="id")
        return endpoint


class _HangUp(Exception):
    """Close the connection without an answer."""


def guarded(handle: Handler, storage: Storage) -> Handler:
    """The handler, with its refusals answered in the API's words. What was done is committed before anything goes out, a hang-up included."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            response = await _response(handle, request)
            await storage.committed()
        except Exception:
            _log.exception("a request of the sandbox failed", method=request.method, path=request.path)
            return web.Response(status=500, body=server_error().body(), content_type="application/json")
        if response is None and request.transport is not None:
            request.transport.abort()
        return response or web.Response()

    return answer


async def _response(handle: Handler, request: web.Request) -> web.StreamResponse | None:
    """What the handler answers, or None where it hangs up."""
    try:
        return await handle(request)
    except ApiError as refusal:
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if refusal.status == 429 else None
        return web.Response(status=refusal.status, body=refusal.body(), content_type="application/json", headers=headers)
    except web.HTTPRequestEntityTooLarge:
        return web.Response(status=413, body=invalid("The request is too large.").body(), content_type="application/json")
    except _HangUp:
        return None


async def _unknown(request: web.Request) -> web.StreamResponse:
    _authenticate(request, _SECRET_KEY)
    raise invalid(f"Unrecognized request URL ({request.method}: {request.path[:200]}). The sandbox speaks a part of Stripe's API.", status=404)


async def _after(fault: Fault | None, request: web.Request) -> None:
    """The way back: the faults that lose an answer."""
    if fault is not None and fault.kind == "answer_lost":
        raise _HangUp
    if fault is not None and fault.kind == "timeout":
        await _until_client_gives_up(request)


async def _until_client_gives_up(request: web.Request) -> None:
    while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 - aiohttp has no event for that
        await asyncio.sleep(_LOOK_S)
    raise _HangUp


def _authenticate(request: web.Request, pattern: re.Pattern[str]) -> None:
    """Raises ApiError 401. The key comes as a bearer token, or as the name of basic authentication."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            credentials = ""
    if not credentials.strip():
        raise ApiError(401, "invalid_request_error", "You did not provide an API key. Provide it as Authorization: Bearer sk_test_…")
    if not pattern.fullmatch(credentials.strip()):
        raise ApiError(401, "invalid_request_error", "Invalid API Key provided. The sandbox takes any key that begins with sk_test_.")


async def _pairs(request: web.Request) -> Pairs:
    """The parameters: in the body of a POST, in the query of the others."""
    return parameters.pairs_of(await request.read() if request.method == "POST" else request.rel_url.raw_query_string.encode())


def base_url(request: web.Request) -> str:
    """The address under which the caller reached us: links that we hand out work for them."""
    return f"{request.scheme}://{request.headers.get('Host', 'localhost')}"


def _answer(status: int, body: bytes, caller: Caller, *, replayed: bool) -> web.Response:
    headers = {"Content-Type": "application/json", "Request-Id": caller.request_id or "", "Stripe-Version": objects.API_VERSION}
    if caller.idempotency_key is not None:
        headers["Idempotency-Key"] = caller.idempotency_key
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return web.Response(status=status, body=body, headers=headers)


def _json(shown: Any) -> web.Response:
    return web.Response(body=orjson.dumps(shown), content_type="application/json")
