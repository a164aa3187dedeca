"""Figures about payments, for administrators and analysts: what analytics has folded from the events so far, so a moment behind."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, Field
from starlette.responses import Response

from api.answers import PREFIX, SUMMARY_EXAMPLE, TIMESERIES_EXAMPLE, described, document
from api.auth import ADMIN, ANALYST
from api.deps import Caller, Given
from api.errors import FieldError, Problem, documented
from infra.database.figures import Bucket, Summary, Timeseries

router = APIRouter(prefix=PREFIX, tags=["analytics"])
LONGEST: Final = timedelta(days=366)
BY_DEFAULT: Final = timedelta(days=1)
MOST_BUCKETS: Final = 1500
SERIES_BY_DEFAULT: Final[Mapping[Bucket, timedelta]] = {
    Bucket.MINUTE: timedelta(hours=1),
    Bucket.HOUR: timedelta(days=1),
    Bucket.DAY: timedelta(days=30),
}

# Far from the first and the last time that there is: what is reckoned from one of these is a time too.
_Time = Annotated[AwareDatetime, Field(ge=datetime(2000, 1, 1, tzinfo=UTC), le=datetime(2200, 1, 1, tzinfo=UTC))]
_Until = Annotated[_Time | None, Query(alias="to", description="a time as in RFC 3339, not included; now if left out")]


@router.get(
    "/analytics/summary",
    response_model=None,
    responses={200: described(Summary, SUMMARY_EXAMPLE), **documented("unauthorized", "forbidden", "validation_failed", "unavailable")},
)
async def summary(
    caller: Caller,
    given: Given,
    since: Annotated[_Time | None, Query(alias="from", description="a time as in RFC 3339; a day before `to` if left out")] = None,
    until: _Until = None,
) -> Response:
    """Payments by status, volume by currency, success rate, failure reasons and gateway latencies, of payments initiated in `from` <= time < `to`."""
    caller.require(ADMIN, ANALYST)
    end = until or given.clock.now()
    begin = since or end - BY_DEFAULT
    if not timedelta(0) < end - begin <= LONGEST:
        raise Problem("validation_failed", errors=[FieldError("from", "does not fit to `to`", f"a time before `to`, by {LONGEST.days} days at most")])
    return document(await given.figures.summary(begin, end))


@router.get(
    "/analytics/timeseries",
    response_model=None,
    responses={200: described(Timeseries, TIMESERIES_EXAMPLE), **documented("unauthorized", "forbidden", "validation_failed", "unavailable")},
)
async def timeseries(
    caller: Caller,
    given: Given,
    bucket: Annotated[Bucket, Query(description="minutes, hours or days, of UTC")] = Bucket.HOUR,
    since: Annotated[
        _Time | None,
        Query(alias="from", description="a time as in RFC 3339; if left out, an hour (of minutes), a day (of hours) or 30 days before `to`"),
    ] = None,
    until: _Until = None,
) -> Response:
    """Payments by status and volume by currency along the time, of payments initiated in `from` <= time < `to`.

    One item for each bucket that has a part in this time, oldest first; empty ones too; 1500 at most.
    """
    caller.require(ADMIN, ANALYST)
    end = until or given.clock.now()
    begin = since or end - SERIES_BY_DEFAULT[bucket]
    if not begin < end:
        raise Problem("validation_failed", errors=[FieldError("from", "does not fit to `to`", "a time before `to`")])
    if (number := bucket.number(begin, end)) > MOST_BUCKETS:
        message = f"cuts this time into {number} parts; {MOST_BUCKETS} is the most"
        raise Problem("validation_failed", errors=[FieldError("bucket", message, _what_fits(bucket, begin, end))])
    return document(await given.figures.timeseries(begin, end, bucket))


def _what_fits(bucket: Bucket, begin: datetime, end: datetime) -> str:
    # One less than the most: a time that begins within a bucket has a part in one more.
    shorter = f"a `from` that is {MOST_BUCKETS - 1} {bucket}s before `to` at most"
    wider = next((other for other in Bucket if other.number(begin, end) <= MOST_BUCKETS), None)
    return shorter if wider is None else f"`{wider}`, or {shorter}"
