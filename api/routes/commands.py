"""What moves a payment: open, confirm, capture, cancel. Each is a command, taken here and carried out behind Kafka.

Rule: a route only translates a request into `Asked` and an `Answer` into a response. The names of the routes below are part of every command's id, so
they never change.
Flow: POST -> token -> body -> Asked -> api/intake -> 202, or with `Prefer: wait=N` 200 with the payment, or 409 with the refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from api.answers import COMMAND_EXAMPLE, PAYMENT_EXAMPLE, PREFIX, TAKEN_EXAMPLE, Taken, described, document
from api.auth import Principal
from api.bodies import Body, CancelBody, CaptureBody, ConfirmBody, IntentBody, OpenBody, ProcessBody, parse, read_body, request_body
from api.deps import Caller, Deps, Given, deps_of, intake_of
from api.errors import FieldError, Problem, documented
from api.intake import Asked, derived_key, fingerprint, read_idempotency_key, read_wait
from api.routes.payments import as_id, payment_missing
from infra.database.reads import CommandView, PaymentView
from infra.gateways.amounts import InexactAmount, to_units
from schemas.messages import CancelPayment, CapturePayment, Command, ConfirmPayment, InitiatePayment

router = APIRouter(prefix=PREFIX, tags=["payments"])
B = TypeVar("B", bound=Body)

INTENT: Final = "POST /api/v1/payments/intent"
PROCESS: Final = "POST /api/v1/payments/process"
CONFIRM: Final = "POST /api/v1/payments/confirm"
CAPTURE: Final = "POST /api/v1/payments/{payment_id}/capture"
CANCEL: Final = "POST /api/v1/payments/{payment_id}/cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request that asks for something to be done, and who sent it."""

    request: Request
    caller: Principal
    deps: Deps
    key: str | None
    wait_s: int

    async def body(self, model: type[B], *, may_be_empty: bool = False) -> tuple[B, Any]:
        """The body's fields, and its JSON as it was sent."""
        limits = self.deps.settings.api
        raw = await read_body(self.request, limits.max_body_bytes)
        content_type = self.request.headers.get("content-type")
        return parse(model, raw, content_type, max_amount_minor=limits.max_amount_minor, may_be_empty=may_be_empty)

    async def take(self, route: str, command: type[Command], fields: dict[str, Any], *, key: str, mark: str, **ids: str | None) -> Response:
        """Have the command taken, and tell the answer. `mark` is the request's fingerprint."""
        state = self.request.state
        answer = await intake_of(self.request).take(
            Asked(
                principal=self.caller,
                route=route,
                key=key,
                fingerprint=mark,
                command=command,
                fields=fields,
                correlation_id=state.correlation_id,
                traceparent=state.traceparent,
                wait_s=self.wait_s,
                gone=self.request.is_disconnected,
                **ids,
            )
        )
        taken = Taken.of(answer.command, answer.payment_status)
        return document(answer.payment or taken, answer.status, {**answer.headers, "Location": taken.links["self"]})


async def _call(
    request: Request,
    caller: Caller,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="One key is one command, for ever: 1 to 255 printable ASCII characters, quoted or bare.",
            examples=['"8e03978e-40d5"'],
        ),
    ] = None,
    prefer: Annotated[
        list[str] | None,
        Header(
            alias="Prefer",
            description="`wait=N`: hold the answer until there is an outcome, N seconds (30 at most).",
            examples=[["wait=10"]],
        ),
    ] = None,
) -> Call:
    return Call(
        request=request,
        caller=caller,
        deps=deps_of(request),
        key=read_idempotency_key(idempotency_key),
        wait_s=read_wait(",".join(prefer or ())),
    )


TheCall = Annotated[Call, Depends(_call)]

_PROBLEMS: Final = (
    "malformed_json",
    "card_number",
    "idempotency_key_invalid",
    "unauthorized",
    "request_in_flight",
    "command_refused",
    "body_too_large",
    "unsupported_media_type",
    "validation_failed",
    "idempotency_key_reused",
    "too_many_undecided",
    "outcome_unknown",
    "unavailable",
)


def _documented(model: type[Body], *more: str, required: bool = True) -> dict[str, Any]:
    """What the API's documentation says about one of these routes."""
    answers: dict[int | str, dict[str, Any]] = {
        200: described(PaymentView, PAYMENT_EXAMPLE, "There was an outcome in time: the payment, declined or not (`Prefer: wait=N` only)"),
        202: described(Taken, TAKEN_EXAMPLE, "The command is taken: it is on all in-sync replicas"),
    }
    return {
        "status_code": 202,
        "response_model": None,
        "responses": answers | documented(*_PROBLEMS, *more),
        "openapi_extra": request_body(model, required=required),
    }


@router.post("/payments/process", **_documented(ProcessBody, "gateway_not_configured", "idempotency_key_required", "order_not_found"))
async def process(call: TheCall) -> Response:
    """Open a payment and charge it, in one."""
    body, sent = await call.body(ProcessBody)
    return await _open(call, PROCESS, body, sent, payment_method=body.payment_method, confirm=True)


@router.post("/payments/intent", **_documented(IntentBody, "gateway_not_configured", "idempotency_key_required", "order_not_found"))
async def intent(call: TheCall) -> Response:
    """Open a payment. Its client secret lets the customer pay it; `confirm` charges a payment method at once."""
    body, sent = await call.body(IntentBody)
    return await _open(call, INTENT, body, sent, payment_method=body.payment_method, confirm=body.confirm)


@router.post("/payments/confirm", **_documented(ConfirmBody, "payment_not_found", "payment_refused"))
async def confirm(call: TheCall) -> Response:
    """Charge an open payment, or try a failed one again, perhaps with another method."""
    body, sent = await call.body(ConfirmBody)
    fields = {"payment_method": body.payment_method, "return_url": body.return_url}
    return await _move(call, CONFIRM, ConfirmPayment, body.payment_id, fields, sent)


@router.post("/payments/{payment_id}/capture", **_documented(CaptureBody, "payment_not_found", "payment_refused", required=False))
async def capture(payment_id: str, call: TheCall) -> Response:
    """Take what was authorised, in full or in part."""
    body, sent = await call.body(CaptureBody, may_be_empty=True)
    return await _move(call, CAPTURE, CapturePayment, as_id(payment_id), {"amount_minor": body.amount_minor}, sent)


@router.post("/payments/{payment_id}/cancel", **_documented(CancelBody, "payment_not_found", "payment_refused", required=False))
async def cancel(payment_id: str, call: TheCall) -> Response:
    """Void a payment that has not been captured."""
    body, sent = await call.body(CancelBody, may_be_empty=True)
    return await _move(call, CANCEL, CancelPayment, as_id(payment_id), {"reason": body.reason}, sent)


@router.get(
    "/commands/{command_id}",
    response_model=None,
    responses={200: described(CommandView, COMMAND_EXAMPLE), **documented("unauthorized", "command_not_found", "unavailable")},
)
async def command(command_id: str, caller: Caller, given: Given) -> Response:
    """What became of a command: accepted (nothing yet), applied, or refused and why."""
    found = await given.reads.command(as_id(command_id, "command_not_found"))
    if found is None or not caller.may_read(found.user_id):
        raise Problem("command_not_found")
    return document(found)


async def _open(call: Call, route: str, body: OpenBody, sent: Any, *, payment_method: str | None, confirm: bool) -> Response:
    if body.gateway not in call.deps.gateways:
        available = " or ".join(call.deps.gateways) or "none"
        raise Problem("gateway_not_configured", f"Gateways that are configured here: {available}.")
    try:
        to_units(body.gateway, body.amount_minor, body.currency)
    except InexactAmount as error:
        raise Problem("validation_failed", errors=[FieldError("amount_minor", "can't be told to the gateway exactly", error.detail)]) from None
    mark = fingerprint(sent)
    if call.key is None and body.order_id is None:
        raise Problem("idempotency_key_required")
    fields = {
        "amount_minor": body.amount_minor,
        "currency": body.currency,
        "gateway": body.gateway,
        "payment_method": payment_method,
        "capture_method": body.capture_method,
        "confirm": confirm,
        "return_url": body.return_url,
        "description": body.description,
        "metadata": body.metadata,
    }
    key = call.key or derived_key(body.order_id, mark)
    return await call.take(route, InitiatePayment, fields, key=key, mark=mark, order_id=body.order_id)


async def _move(call: Call, route: str, command: type[Command], payment_id: UUID, fields: dict[str, Any], sent: Any) -> Response:
    """A command about a payment. Its own key holds the attempt that it would use, so that a retry after a decline is another command."""
    target = await call.deps.store.target(payment_id)
    if target is None or target.owner != call.caller.subject:
        raise await payment_missing(call.deps.reads, call.caller, payment_id)
    mark = fingerprint(str(payment_id), sent)
    key = call.key or derived_key(payment_id, target.attempt, mark)
    return await call.take(route, command, fields, key=key, mark=mark, order_id=target.order_id, payment_id=str(payment_id))
