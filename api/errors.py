"""Every way in which the API says no: one table, and RFC 9457 problem documents made from it.

Rule: an error's status stands here and nowhere else, and what a caller sent is never in an answer. `type` is a path of this API that explains it.
Flow: a route, a body, a token or a store raises -> `install` has told FastAPI to come here -> application/problem+json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from infra.database.intake import OrderNotTheirs, TooManyUndecided
from schemas.errors import Unavailable

PROBLEM_JSON: Final = "application/problem+json"
PROBLEM_PATH: Final = "/problems/"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem. `retryable`: the same request, with the same key, may succeed later, and can do no harm."""

    status: int
    title: str
    advice: str
    retryable: bool = False
    retry_after_s: int | None = None


PROBLEMS: Final[Mapping[str, Kind]] = {
    "malformed_json": Kind(400, "The body is no JSON", "Send one JSON object, encoded as UTF-8."),
    "card_number": Kind(
        400,
        "The body holds a card number",
        "Card numbers never pass through here. Give it to the payment provider, and send the id (`pm_…`) that you get for it.",
    ),
    "gateway_not_configured": Kind(
        400, "That gateway is not available", "Leave `gateway` out, or name one that this installation is configured for."
    ),
    "idempotency_key_required": Kind(
        400, "An Idempotency-Key is needed", "Send an `Idempotency-Key`, or an `order_id` from which one can be derived."
    ),
    "idempotency_key_invalid": Kind(
        400, "The Idempotency-Key can't be read", "Send 1 to 255 printable ASCII characters, in double quotes or without."
    ),
    "bad_signature": Kind(
        400, "The webhook's signature does not fit", "Sign the raw body with the secret of this endpoint; see the provider's documentation."
    ),
    "invalid_webhook": Kind(400, "The webhook is no event", "Send the provider's event as it is."),
    "unauthorized": Kind(
        401, "A valid token is needed", "Send `Authorization: Bearer <token>` with a token of the right issuer and audience that has not expired."
    ),
    "forbidden": Kind(403, "Your role does not allow this", "Ask for a token with one of the roles that the detail names."),
    "not_found": Kind(404, "There is nothing here", "See /docs for the paths that there are."),
    "payment_not_found": Kind(
        404, "There is no such payment", "Check the id. A payment of somebody else is not told apart from one that does not exist."
    ),
    "payment_refused": Kind(404, "The payment was never opened", "Its command was refused: the detail says why. Open another payment."),
    "order_not_found": Kind(404, "There is no such order", "Check the id. An order of somebody else is not told apart from one that does not exist."),
    "command_not_found": Kind(
        404, "There is no such command", "Check the id. A command of somebody else is not told apart from one that does not exist."
    ),
    "method_not_allowed": Kind(405, "The path does not take this method", "See the `Allow` header."),
    "request_in_flight": Kind(
        409,
        "The first request with this key is not answered yet",
        "Wait as `Retry-After` says and send the same request again. If the process that took the first one has died, this lasts for 30 s.",
        True,
        1,
    ),
    "command_refused": Kind(409, "The command was refused", "The code and the detail say why. Nothing has changed."),
    "body_too_large": Kind(413, "The body is too large", "Send less: the detail says how much is taken."),
    "unsupported_media_type": Kind(415, "The body is of another type", "Send `Content-Type: application/json`."),
    "validation_failed": Kind(422, "Some fields are wrong", "`errors` names each field, what is wrong with it and what would be right."),
    "idempotency_key_reused": Kind(
        422, "The key was used for another request", "A key stands for one request for ever. Send the same body as the first time, or take a new key."
    ),
    "too_many_undecided": Kind(
        429, "Too many commands of this order are waiting", "Wait until those before are decided, then send it again.", True, 1
    ),
    "internal_error": Kind(
        500, "Something went wrong here", "It is logged under the `trace_id`. Sending it again, with the same key, does no harm.", True
    ),
    "outcome_unknown": Kind(
        503, "Whether the request was taken is not known", "Send the same request again with the same key: it is never carried out twice.", True, 2
    ),
    "unavailable": Kind(503, "A part of the system is away", "Send the same request again, with the same key.", True, 2),
}

_HTTP: Final = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with a field, and what would be right. `field` is a path like `metadata.plan`."""

    field: str
    message: str
    expected: str


class Problem(Exception):
    """A refusal of the kind `kind`. `code` replaces the kind's own name where the reason has one of its own."""

    def __init__(
        self,
        kind: str,
        detail: str | None = None,
        *,
        code: str | None = None,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.detail, self.code = kind, detail, code or kind
        self.errors, self.headers = errors, headers or {}
        super().__init__(kind)


def response(problem: Problem, request: Request) -> Response:
    """The problem as an answer to `request`."""
    kind = PROBLEMS[problem.kind]
    request.state.outcome = problem.kind
    document: dict[str, Any] = {
        "type": PROBLEM_PATH + problem.kind,
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail or kind.advice,
        "code": problem.code,
        "instance": request.url.path,
        "trace_id": request.state.correlation_id,
        "retryable": kind.retryable,
    }
    if problem.errors:
        document["errors"] = [asdict(error) for error in problem.errors]
    headers = {} if kind.retry_after_s is None else {"Retry-After": str(kind.retry_after_s)}
    return Response(orjson.dumps(document), kind.status, headers | dict(problem.headers), PROBLEM_JSON)


def documented(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says about these problems of a route, by status, each with an example."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for name in kinds:
        kind = PROBLEMS[name]
        entry = by_status.setdefault(kind.status, {"description": "", "content": {PROBLEM_JSON: {"schema": _SCHEMA, "examples": {}}}})
        entry["description"] = " · ".join(part for part in (entry["description"], f"`{name}`: {kind.title}") if part)
        entry["content"][PROBLEM_JSON]["examples"][name] = {
            "value": {
                "type": PROBLEM_PATH + name,
                "title": kind.title,
                "status": kind.status,
                "detail": kind.advice,
                "code": name,
                "instance": "/api/v1/payments/process",
                "trace_id": "0af7651916cd43dd8448eb211c80319c",
                "retryable": kind.retryable,
            }
        }
    return by_status


def install(app: FastAPI) -> None:
    """Have every error of `app`, FastAPI's own included, answered as a problem document."""

    async def on_problem(request: Request, error: Exception) -> Response:
        return response(_as_problem(error), request)

    for kind in (Problem, Unavailable, OrderNotTheirs, TooManyUndecided, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_problem)


def _as_problem(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case OrderNotTheirs():
            return Problem("order_not_found")
        case TooManyUndecided():
            return Problem("too_many_undecided", error.detail)
        case Unavailable():
            return Problem("unavailable", f"{error.part} does not answer.")
        case RequestValidationError():
            return Problem("validation_failed", errors=[_parameter_error(fault) for fault in error.errors()])
        case HTTPException():
            return Problem(_HTTP.get(error.status_code, "not_found"), headers=error.headers)
        case _:
            raise TypeError(f"{type(error).__name__} is none of the errors that come here")


_EXPECTED: Final[Mapping[str, str]] = {
    "missing": "a value",
    "int_parsing": "a whole number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "enum": "one of {expected}",
    "string_pattern_mismatch": "a text like {pattern}",
    "string_too_long": "at most {max_length} characters",
}


def _parameter_error(fault: Mapping[str, Any]) -> FieldError:
    """A parameter of the path or the query that is wrong. pydantic's messages may quote what was sent, so they are not used."""
    expected = _EXPECTED.get(fault["type"], "a time as in RFC 3339, 2026-01-31T12:00:00Z")
    return FieldError(str(fault["loc"][-1]), "is missing" if fault["type"] == "missing" else "can't be read", expected.format(**fault.get("ctx", {})))


_SCHEMA: Final = {
    "type": "object",
    "description": "RFC 9457 problem document",
    "required": ["type", "title", "status", "detail", "code", "instance", "trace_id", "retryable"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "a path of this API that explains the problem"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "stable, for programs"},
        "instance": {"type": "string"},
        "trace_id": {"type": "string", "description": "the correlation id, as in `X-Request-Id`"},
        "retryable": {"type": "boolean", "description": "the same request, with the same key, may succeed later"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message", "expected"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}, "expected": {"type": "string"}},
            },
        },
    },
}

ANY_PROBLEM: Final = {"description": "A problem document", "content": {PROBLEM_JSON: {"schema": _SCHEMA}}}
