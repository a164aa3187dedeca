"""Figures about payments, for administrators and analysts: what analytics has folded from the events so far, so a moment behind."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Query
from pydantic import AwareDatetime
from starlette.responses import Response

from api.answers import PREFIX, SUMMARY_EXAMPLE, described, document
from api.auth import ADMIN, ANALYST
from api.deps import Caller, Given
from api.errors import FieldError, Problem, documented
from infra.database.reads import Summary

router = APIRouter(prefix=PREFIX, tags=["analytics"])
LONGEST: Final = timedelta(days=366)
BY_DEFAULT: Final = timedelta(days=1)


@router.get(
    "/analytics/summary",
    response_model=None,
    responses={200: described(Summary, SUMMARY_EXAMPLE), **documented("unauthorized", "forbidden", "validation_failed", "unavailable")},
)
async def summary(
    caller: Caller,
    given: Given,
    since: Annotated[AwareDatetime | None, Query(alias="from", description="a time as in RFC 3339; a day before `to` if left out")] = None,
    until: Annotated[AwareDatetime | None, Query(alias="to", description="a time as in RFC 3339, not included; now if left out")] = None,
) -> Response:
    """Payments by status, volume by currency, success rate, failure reasons and gateway latencies, of payments initiated in `from` <= time < `to`."""
    caller.require(ADMIN, ANALYST)
    end = until or given.clock.now()
    begin = since or end - BY_DEFAULT
    if not timedelta(0) < end - begin <= LONGEST:
        raise Problem("validation_failed", errors=[FieldError("from", "does not fit to `to`", f"a time before `to`, by {LONGEST.days} days at most")])
    return document(await given.reads.summary(begin, end))
