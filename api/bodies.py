"""What callers may send, and what a body has to be before its fields are looked at.

Rule: nothing of a body is logged or answered, so that a card number that someone sends by mistake is nowhere. Unknown fields are errors. What would
be right for a field is its description: the same words stand in the API's documentation and in the errors.
Flow: bytes -> at most 64 KiB -> JSON -> no card number -> the model's fields -> a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from api.errors import FieldError, Problem
from infra.scrub import find_card_number
from schemas.money import CURRENCIES

MAX_METADATA: Final = 47
"""A gateway keeps 50 keys, and three are ours."""
OUR_METADATA: Final = frozenset({"payment_id", "order_id", "attempt"})

_Printable = StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$")
_OrderId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_PaymentMethod = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,255}$")]
_Amount = Annotated[int, Field(gt=0)]
_Url = Annotated[str, StringConstraints(max_length=2048)]
_Description = Annotated[str, StringConstraints(max_length=500), _Printable]
_Reason = Annotated[str, StringConstraints(min_length=1, max_length=200), _Printable]
_Metadata = dict[Annotated[str, StringConstraints(min_length=1, max_length=40), _Printable], _Description]

OrderId = Annotated[_OrderId | None, Field(description="1 to 64 of A-Z a-z 0-9 _ -; if left out, the order is named after the payment")]
PaymentMethod = Annotated[
    _PaymentMethod | None, Field(description="the id of a payment method at the gateway, such as pm_card_visa; needed to confirm")
]
ReturnUrl = Annotated[_Url | None, Field(description="where the customer comes back to: an http or https address of at most 2048 characters")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    example: ClassVar[dict[str, Any]] = {}

    @field_validator("return_url", check_fields=False)
    @classmethod
    def _leads_somewhere(cls, url: str | None) -> str | None:
        if url is not None and not _is_web_address(url):
            raise PydanticCustomError("url", "is no web address")
        return url

    @field_validator("amount_minor", check_fields=False)
    @classmethod
    def _within_limit(cls, amount: int | None, info: ValidationInfo) -> int | None:
        limit = (info.context or {}).get("max_amount_minor")
        if amount is not None and limit is not None and amount > limit:
            raise PydanticCustomError("amount", "is above the limit of {limit}", {"limit": limit})
        return amount


class OpenBody(Body):
    """What opens a payment."""

    order_id: OrderId = None
    amount_minor: Annotated[int, Field(gt=0, description="a whole number of minor units (cents), above 0 and within this installation's limit")]
    currency: Annotated[str, Field(description="an ISO 4217 code, such as EUR")]
    gateway: Annotated[Literal["stripe", "paypal"], Field(description="stripe or paypal, whichever this installation has")] = "stripe"
    capture_method: Annotated[Literal["automatic", "manual"], Field(description="automatic or manual")] = "automatic"
    return_url: ReturnUrl = None
    description: Annotated[_Description | None, Field(description="at most 500 printable characters")] = None
    metadata: Annotated[
        _Metadata,
        Field(
            max_length=MAX_METADATA,
            description=f"at most {MAX_METADATA} texts of at most 500 printable characters, under keys of at most 40 other than "
            + ", ".join(sorted(OUR_METADATA)),
        ),
    ] = {}

    @field_validator("currency")
    @classmethod
    def _is_a_currency(cls, code: str) -> str:
        if code.upper() not in CURRENCIES:
            raise PydanticCustomError("currency", "is no currency")
        return code.upper()

    @field_validator("metadata")
    @classmethod
    def _leaves_ours(cls, metadata: dict[str, str]) -> dict[str, str]:
        if not OUR_METADATA.isdisjoint(metadata):
            raise PydanticCustomError("metadata", "uses a key that is ours")
        return metadata


class IntentBody(OpenBody):
    """`POST /payments/intent`"""

    confirm: Annotated[bool, Field(description="true to charge at once, which needs a payment_method")] = False
    payment_method: Annotated[PaymentMethod, Field(validate_default=True)] = None
    example = {"order_id": "order-1001", "amount_minor": 1999, "currency": "EUR", "capture_method": "automatic"}

    @field_validator("payment_method")
    @classmethod
    def _is_there_to_confirm(cls, method: str | None, info: ValidationInfo) -> str | None:
        if method is None and info.data.get("confirm"):
            raise PydanticCustomError("missing", "is missing")
        return method


class ProcessBody(OpenBody):
    """`POST /payments/process`: intent and confirm in one."""

    payment_method: Annotated[_PaymentMethod, Field(description="the id of a payment method at the gateway, such as pm_card_visa")]
    example = {"order_id": "order-1001", "amount_minor": 1999, "currency": "EUR", "payment_method": "pm_card_visa"}


class ConfirmBody(Body):
    """`POST /payments/confirm`"""

    payment_id: Annotated[UUID, Field(strict=False, description="the payment_id that the answer to an intent gave, a UUID")]
    payment_method: PaymentMethod = None
    return_url: ReturnUrl = None
    example = {"payment_id": "6f0e8a52-9d43-5a3e-8d56-6f2a2f5f3a77", "payment_method": "pm_card_visa"}


class CaptureBody(Body):
    """`POST /payments/{payment_id}/capture`"""

    amount_minor: Annotated[_Amount | None, Field(description="a whole number of minor units above 0; all that was authorised if left out")] = None
    example = {"amount_minor": 1500}


class CancelBody(Body):
    """`POST /payments/{payment_id}/cancel`"""

    reason: Annotated[_Reason | None, Field(description="1 to 200 printable characters")] = None
    example = {"reason": "requested_by_customer"}


B = TypeVar("B", bound=Body)


async def read_body(request: Request, limit: int) -> bytes:
    """The body. Raises Problem (413) as soon as it is known to have more than `limit` bytes, declared or not."""
    too_large = Problem("body_too_large", f"At most {limit} bytes are taken.", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse(model: type[B], body: bytes, content_type: str | None, *, max_amount_minor: int, may_be_empty: bool = False) -> tuple[B, Any]:
    """The fields, and the JSON document as it was sent. Raises Problem."""
    if may_be_empty and not body:
        document: Any = {}
    else:
        media_type = (content_type or "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
            raise Problem("unsupported_media_type")
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise Problem("malformed_json") from None
        if any(find_card_number(text) for text in _texts(document)):
            raise Problem("card_number")
    if not isinstance(document, dict):
        raise Problem("malformed_json", "The body has to be one JSON object.")
    try:
        return model.model_validate(document, context={"max_amount_minor": max_amount_minor}), document
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise Problem("validation_failed", errors=[_field_error(model, fault["loc"], fault["type"], fault["msg"]) for fault in faults]) from None


def request_body(model: type[Body], *, required: bool = True) -> dict[str, Any]:
    """What OpenAPI says about a route's body."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema, "example": model.example}}}}


def _texts(document: Any) -> Iterator[str]:
    """Every text and number of a JSON document, keys included."""
    waiting = [document]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case bool() | None:
                pass
            case int() | float() as number:
                yield str(number)
            case list() as items:
                waiting += items
            case dict() as fields:
                waiting += fields
                waiting += fields.values()


# pydantic's own messages tell what a type expects, never what was sent; these would quote it, or say it less well.
_MESSAGES: Final = {
    "missing": "is missing",
    "string_pattern_mismatch": "does not have the right form",
    "uuid_parsing": "is no UUID",
    "uuid_type": "is no UUID",
}


def _field_error(model: type[Body], place: tuple[int | str, ...], kind: str, message: str) -> FieldError:
    # A key of a dict that is wrong is reported as `metadata.<key>.[key]`.
    field = ".".join(str(part) for part in place if part != "[key]")[:100]
    if kind == "extra_forbidden":
        return FieldError(field, "is not known here", "one of " + ", ".join(model.model_fields))
    known = model.model_fields.get(str(place[0])) if place else None
    expected = known.description if known else None
    message = _MESSAGES.get(kind, message)
    return FieldError(field, message, expected or "see the documentation at /docs")


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
        )
    except ValueError:
        return False
