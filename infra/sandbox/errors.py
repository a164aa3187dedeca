"""What the sandbox answers when it refuses a request: the error body of Stripe's API, and the status that goes with it.

Rule: whoever refuses raises an `ApiError`; one place (`api.guarded`) answers with it. The family is Stripe's (docs.stripe.com/api/errors): an
`invalid_request_error` is the caller's mistake, a `card_error` is a decline, an `idempotency_error` is a key used wrongly, an `api_error` is ours.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

_MANY_DIGITS: Final = re.compile(r"\d(?:[ -]?\d){11,}")


class ApiError(Exception):
    """A refused request. `details` are further members of the error body (`decline_code`, `payment_intent`, …)."""

    def __init__(self, status: int, type: str, message: str, *, code: str | None = None, param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error: dict[str, Any] = {"type": type, "message": message, **details}
        if code is not None:
            self.error |= {"code": code, "doc_url": doc_url(code)}
        if param is not None:
            self.error["param"] = param

    def body(self) -> bytes:
        return orjson.dumps({"error": self.error})


def doc_url(code: str) -> str:
    return f"https://stripe.com/docs/error-codes/{code.replace('_', '-')}"


def invalid(message: str, *, param: str | None = None, code: str | None = None, status: int = 400, **details: Any) -> ApiError:
    """The caller's mistake; `param` names the parameter that is wrong."""
    return ApiError(status, "invalid_request_error", message, code=code, param=param, **details)


def missing(kind: str, identifier: str, *, param: str, status: int = 404) -> ApiError:
    """There is no such object. Stripe answers 404 where the path names it and 400 where a parameter does.

    Who gives a card number for an identifier does not find it again in an answer that is kept.
    """
    shown = _MANY_DIGITS.sub("…", identifier[:100])
    return invalid(f"No such {kind}: '{shown}'", param=param, code="resource_missing", status=status)


def server_error() -> ApiError:
    return ApiError(500, "api_error", "An unknown error occurred. The outcome of this request is not known: look the object up.")
