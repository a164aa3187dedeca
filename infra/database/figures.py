"""Figures about payments, over a time and along it, as analytics has folded them so far: a moment behind.

Rule: nothing is written here. A payment belongs to the time when it was initiated, whatever became of it later.
Flow: api/routes/analytics.py -> Figures -> analytics.payments, analytics.attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Text, and_, bindparam, func, select, tuple_

from infra.database.pool import Pool
from infra.database.statements import fetched
from infra.database.tables import analytics_attempts, analytics_payments
from schemas.state import PaymentStatus

_SOME_MIDNIGHT: Final = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    currency: str
    payments: int
    amount_minor: int
    captured_minor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReason:
    code: str
    payments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long a gateway took to answer, in milliseconds; None where it was not asked."""

    gateway: str
    calls: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Payments that were initiated in `since` <= time < `until`, as analytics has folded them so far.

    `success_rate`: COMPLETED and AUTHORIZED among those that ended in one of them or in FAILED; None where none did.
    """

    since: datetime
    until: datetime
    payments: int
    payments_by_status: dict[str, int]
    volume_by_currency: list[Volume]
    success_rate: float | None
    failure_reasons: list[FailureReason]
    gateway_latency_ms: list[Latency]


class Bucket(StrEnum):
    """What a time series counts by: minutes, hours and days of UTC, so that all of a kind are equally long."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"

    @property
    def width(self) -> timedelta:
        return timedelta(**{f"{self.value}s": 1})

    def begin(self, at: datetime) -> datetime:
        """When the bucket began that `at` is in."""
        at = at.astimezone(UTC)
        return at - (at - _SOME_MIDNIGHT) % self.width

    def number(self, since: datetime, until: datetime) -> int:
        """How many buckets have a part in `since` <= time < `until`."""
        return -((self.begin(since) - until) // self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFigures:
    """Payments that were initiated from `at` on, before the next bucket; of the first and the last bucket, only those in the time asked for."""

    at: datetime
    payments: int
    payments_by_status: dict[str, int]
    volume_by_currency: list[Volume]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeseries:
    """Payments that were initiated in `since` <= time < `until`, by bucket, oldest first.

    No bucket is left out, and each has a figure, be it 0, for every status and currency that one of them has: a line through them has no holes.
    """

    since: datetime
    until: datetime
    bucket: Bucket
    items: list[BucketFigures]


_paid, _tried = analytics_payments.c, analytics_attempts.c
_COUNT: Final = func.count().label("number")
_IN_TIME: Final = and_(_paid.initiated_at >= bindparam("since"), _paid.initiated_at < bindparam("until"))
_STATUSES: Final = select(_paid.status, _COUNT).where(_IN_TIME).group_by(_paid.status).order_by(_paid.status)
_VOLUMES: Final = (
    select(_paid.currency, _COUNT, func.sum(_paid.amount_minor).label("amount_minor"), func.sum(_paid.captured_minor).label("captured_minor"))
    .where(_IN_TIME)
    .group_by(_paid.currency)
    .order_by(_paid.currency)
)
_REASONS: Final = (
    select(_paid.failure_code, _COUNT)
    .where(_IN_TIME, _paid.status == PaymentStatus.FAILED.value, _paid.failure_code.is_not(None))
    .group_by(_paid.failure_code)
    .order_by(_COUNT.desc(), _paid.failure_code)
    .limit(50)
)
_LATENCIES: Final = (
    select(
        _tried.gateway,
        _COUNT,
        *(func.percentile_cont(share / 100).within_group(_tried.gateway_latency_ms).label(f"p{share}") for share in (50, 95, 99)),
    )
    .where(_tried.at >= bindparam("since"), _tried.at < bindparam("until"), _tried.gateway_latency_ms.is_not(None))
    .group_by(_tried.gateway)
    .order_by(_tried.gateway)
)
_placed = (
    select(
        func.date_trunc(bindparam("bucket", type_=Text), _paid.initiated_at, "UTC").label("at"),
        _paid.status,
        _paid.currency,
        _paid.amount_minor,
        _paid.captured_minor,
    )
    .where(_IN_TIME)
    .subquery("placed")
)
# Two kinds of rows from one look at the payments: by status, without a currency; and by currency, without a status.
_SERIES: Final = select(
    _placed.c.at,
    _placed.c.status,
    _placed.c.currency,
    _COUNT,
    func.sum(_placed.c.amount_minor).label("amount_minor"),
    func.sum(_placed.c.captured_minor).label("captured_minor"),
).group_by(func.grouping_sets(tuple_(_placed.c.at, _placed.c.status), tuple_(_placed.c.at, _placed.c.currency)))

_SUCCEEDED: Final = (PaymentStatus.COMPLETED, PaymentStatus.AUTHORIZED)


class Figures:
    """Raises Unavailable while Postgres is away. `pool` should not be the one that payments are taken with."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def summary(self, since: datetime, until: datetime) -> Summary:
        within = {"since": since, "until": until}
        statuses, volumes, reasons, latencies = [await fetched(self._pool, part, within) for part in (_STATUSES, _VOLUMES, _REASONS, _LATENCIES)]
        by_status: dict[str, int] = {row.status: row.number for row in statuses}
        succeeded = sum(by_status.get(status, 0) for status in _SUCCEEDED)
        ended = succeeded + by_status.get(PaymentStatus.FAILED, 0)
        return Summary(
            since=since,
            until=until,
            payments=sum(by_status.values()),
            payments_by_status=by_status,
            volume_by_currency=[_volume(row) for row in volumes],
            success_rate=succeeded / ended if ended else None,
            failure_reasons=[FailureReason(code=row.failure_code, payments=row.number) for row in reasons],
            gateway_latency_ms=[Latency(gateway=row.gateway, calls=row.number, p50=row.p50, p95=row.p95, p99=row.p99) for row in latencies],
        )

    async def timeseries(self, since: datetime, until: datetime, bucket: Bucket) -> Timeseries:
        """The caller sees to it that there are not too many buckets."""
        rows = await fetched(self._pool, _SERIES, {"since": since, "until": until, "bucket": bucket.value})
        first = bucket.begin(since)
        begins = [first + number * bucket.width for number in range(bucket.number(since, until))]
        return Timeseries(since=since, until=until, bucket=bucket, items=_in_buckets(rows, begins))


def _volume(row: Any) -> Volume:
    return Volume(currency=row.currency, payments=row.number, amount_minor=int(row.amount_minor), captured_minor=int(row.captured_minor))


def _in_buckets(rows: Sequence[Any], begins: Iterable[datetime]) -> list[BucketFigures]:
    numbers: dict[tuple[datetime, str], int] = {(row.at, row.status): row.number for row in rows if row.status is not None}
    volumes = {(row.at, row.currency): _volume(row) for row in rows if row.currency is not None}
    statuses = sorted({status for _, status in numbers})
    nothing = [Volume(currency=currency, payments=0, amount_minor=0, captured_minor=0) for currency in sorted({currency for _, currency in volumes})]
    items = []
    for at in begins:
        by_status = {status: numbers.get((at, status), 0) for status in statuses}
        by_currency = [volumes.get((at, none.currency), none) for none in nothing]
        items.append(BucketFigures(at=at, payments=sum(by_status.values()), payments_by_status=by_status, volume_by_currency=by_currency))
    return items
