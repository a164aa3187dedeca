"""What callers read: payments and their timelines.

Rule: what is not theirs does not exist for them; administrators read all, but for what lets the customer pay.
Flow: GET -> token -> Reads -> JSON. A payment that is accepted and not opened yet reads as PENDING.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Final
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from api.answers import PAGE_EXAMPLE, PAYMENT_EXAMPLE, PREFIX, TIMELINE_EXAMPLE, Page, Timeline, described, document
from api.auth import ADMIN, Principal
from api.deps import Caller, Given
from api.errors import FieldError, Problem, documented
from infra.database.reads import PaymentView, Place, Reads
from schemas.messages import is_order_id

router = APIRouter(prefix=PREFIX, tags=["payments"])

Limit = Annotated[int, Query(ge=1, le=100, description="payments on a page")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before")]
OrderFilter = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="payments of this order only")]


def as_id(text: str, missing: str = "payment_not_found") -> UUID:
    """What can't be an id is the id of nothing."""
    try:
        return UUID(text)
    except ValueError:
        raise Problem(missing) from None


_TRANSACTION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,255}")


async def payment_missing(reads: Reads, caller: Principal, payment_id: UUID) -> Problem:
    """Why there is no such payment for the caller: for one whose opening was refused, the refusal."""
    opening = await reads.command(payment_id)
    if opening is not None and opening.refusal is not None and caller.may_read(opening.user_id) and opening.payment_id == opening.command_id:
        return Problem("payment_refused", f"{opening.refusal['code']}: {opening.refusal['message']}")
    return Problem("payment_not_found")


@router.get(
    "/payments",
    response_model=None,
    responses={200: described(Page, PAGE_EXAMPLE), **documented("unauthorized", "validation_failed", "unavailable")},
)
async def payments(
    request: Request, caller: Caller, given: Given, order_id: OrderFilter = None, limit: Limit = 20, cursor: Cursor = None
) -> Response:
    """The caller's payments, newest first; an administrator gets everybody's."""
    return _page(await _found(given.reads, caller, order_id, limit, cursor), limit, caller, request)


@router.get(
    "/payments/order/{order_id}",
    response_model=None,
    responses={
        200: described(Page, PAGE_EXAMPLE),
        **documented("unauthorized", "order_not_found", "validation_failed", "unavailable"),
    },
)
async def payments_of_order(order_id: str, request: Request, caller: Caller, given: Given, limit: Limit = 20, cursor: Cursor = None) -> Response:
    """The payments of one order, newest first."""
    found = await _found(given.reads, caller, order_id, limit, cursor) if is_order_id(order_id) else ()
    if not found and cursor is None:
        raise Problem("order_not_found")
    return _page(found, limit, caller, request)


@router.get(
    "/payments/transaction/{transaction_id}",
    response_model=None,
    responses={200: described(PaymentView, PAYMENT_EXAMPLE), **documented("unauthorized", "payment_not_found", "unavailable")},
)
async def payment_of_transaction(transaction_id: str, caller: Caller, given: Given) -> Response:
    """The payment that the gateway knows by this charge or capture id."""
    found = await given.reads.payment_of_transaction(transaction_id) if _TRANSACTION_ID.fullmatch(transaction_id) else None
    if found is None or not caller.may_read(found.user_id):
        raise Problem("payment_not_found")
    return document(_shown(found, caller))


@router.get(
    "/payments/{payment_id}/events",
    response_model=None,
    responses={
        200: described(Timeline, TIMELINE_EXAMPLE),
        **documented("unauthorized", "payment_not_found", "payment_refused", "unavailable"),
    },
)
async def timeline(payment_id: str, caller: Caller, given: Given) -> Response:
    """What happened to the payment, oldest first, and where each event is on Kafka once it is there."""
    payment = await _payment(given.reads, caller, as_id(payment_id))
    prefix = given.settings.prefix
    events = await given.reads.timeline(UUID(payment.payment_id))
    return document(Timeline(items=[replace(event, topic=prefix + event.topic) for event in events]))


@router.get(
    "/payments/{payment_id}",
    response_model=None,
    responses={
        200: described(PaymentView, PAYMENT_EXAMPLE),
        304: {"description": "It is as `If-None-Match` has it"},
        **documented("unauthorized", "payment_not_found", "payment_refused", "unavailable"),
    },
)
@router.get("/payments/payment/{payment_id}", response_model=None, include_in_schema=False)
async def payment(
    payment_id: str,
    request: Request,
    caller: Caller,
    given: Given,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match", description="the `ETag` of an earlier answer")] = None,
) -> Response:
    """The payment as it stands. `client_secret` and `next_action` are told to its owner only, while they can be used."""
    found = await _payment(given.reads, caller, as_id(payment_id))
    return _with_etag(_shown(found, caller), if_none_match)


async def _payment(reads: Reads, caller: Principal, payment_id: UUID) -> PaymentView:
    found = await reads.payment(payment_id)
    if found is None or not caller.may_read(found.user_id):
        raise await payment_missing(reads, caller, payment_id)
    return found


async def _found(reads: Reads, caller: Principal, order_id: str | None, limit: int, cursor: str | None) -> Sequence[PaymentView]:
    """A page and one more, which tells whether there is another page."""
    everybody = ADMIN in caller.roles
    after = _place(cursor) if cursor else None
    return await reads.payments(user_id=None if everybody else caller.subject, order_id=order_id, after=after, limit=limit + 1)


def _page(found: Sequence[PaymentView], limit: int, caller: Principal, request: Request) -> Response:
    items = found[:limit]
    following = _cursor(items[-1]) if len(found) > limit else None
    link = {"Link": f'<{request.url.path}?{_query(request, following)}>; rel="next"'} if following else {}
    return document(Page(items=[_shown(item, caller) for item in items], next=following), 200, link)


def _shown(payment: PaymentView, caller: Principal) -> PaymentView:
    return payment if payment.user_id == caller.subject else replace(payment, client_secret=None, next_action=None)


def _with_etag(payment: PaymentView, if_none_match: str | None) -> Response:
    """The payment; or 304 if the caller has it like this already (RFC 9110, 13.1.2)."""
    answer = document(payment)
    answer.headers["ETag"] = etag = f'"{hashlib.sha256(answer.body).hexdigest()[:32]}"'
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    return Response(None, 304, {"ETag": etag, "Cache-Control": answer.headers["Cache-Control"]}) if known & {etag, "*"} else answer


def _cursor(last: PaymentView) -> str:
    return base64.urlsafe_b64encode(f"{last.created_at.isoformat()} {last.payment_id}".encode()).decode().rstrip("=")


def _place(cursor: str) -> Place:
    try:
        created_at, payment_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().split(" ")
        place = Place(datetime.fromisoformat(created_at), UUID(payment_id))
        if place.created_at.tzinfo is None:
            raise ValueError
    except ValueError:
        raise Problem("validation_failed", errors=[FieldError("cursor", "can't be read", "`next` of the page before")]) from None
    return place


def _query(request: Request, cursor: str) -> str:
    return urlencode({**request.query_params, "cursor": cursor})
