"""What every request passes first and last: its correlation id, its log context, its figures, and an answer when there is a bug.

Rule: what is not caught anywhere else ends here, logged under the id that the caller gets; no answer and no log repeats what was sent.
Flow: uvicorn -> Edge -> FastAPI -> Edge -> uvicorn.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Final

import structlog
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import Problem, response
from infra.scrub import find_card_number

log = structlog.get_logger()

REQUESTS: Final = Counter("paystream_intake_requests_total", "Requests by route and outcome: a status or the kind of a problem", ["route", "outcome"])
SECONDS: Final = Histogram(
    "paystream_intake_request_seconds",
    "Time from a request's head to its answer",
    ["route"],
    buckets=(0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Edge:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        sent = Headers(scope=scope)
        traceparent = _TRACEPARENT.fullmatch(sent.get("traceparent", ""))
        correlation_id = _request_id(sent.get("x-request-id")) or (traceparent[1] if traceparent else secrets.token_hex(16))
        state = scope.setdefault("state", {})
        state |= {"correlation_id": correlation_id, "traceparent": traceparent[0] if traceparent else None, "outcome": None}
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(correlation_id=correlation_id)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", correlation_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            state["outcome"] = "disconnected"
        except Exception:
            log.exception("request failed", route=_route(scope))
            if status:
                raise
            await response(Problem("internal_error"), Request(scope))(scope, receive, send_marked)
        finally:
            route = _route(scope)
            REQUESTS.labels(route, state["outcome"] or str(status)).inc()
            SECONDS.labels(route).observe(time.perf_counter() - began)


def _request_id(text: str | None) -> str | None:
    return text if text and _REQUEST_ID.fullmatch(text) and not find_card_number(text) else None


def _route(scope: Scope) -> str:
    """The route's method and template, so that nothing that a caller makes up becomes a label."""
    route = scope.get("route")
    return f"{scope['method']} {route.path}" if route is not None and scope["method"] in route.methods else "none"
