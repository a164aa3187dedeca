"""How a time is cut into buckets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from infra.database.figures import Bucket

pytestmark = pytest.mark.unit

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)


@pytest.mark.parametrize("bucket", Bucket)
@pytest.mark.parametrize("at", [MIDNIGHT, MIDNIGHT - MOMENT, datetime(1969, 12, 31, 23, 30, 59, 1, UTC), datetime(2026, 3, 1, 4, 44, 59, tzinfo=UTC)])
def test_a_bucket_begins_where_one_of_utc_does(bucket: Bucket, at: datetime) -> None:
    cut = {"microsecond": 0, "second": 0} | ({"minute": 0} if bucket != "minute" else {}) | ({"hour": 0} if bucket == "day" else {})
    for hours in (-12, 0, 5.75, 14):
        assert bucket.begin(at.astimezone(timezone(timedelta(hours=hours)))) == at.replace(**cut)


@pytest.mark.parametrize("bucket", Bucket)
def test_each_bucket_that_has_a_part_in_a_time_is_counted(bucket: Bucket) -> None:
    width = bucket.width
    assert bucket.number(MIDNIGHT, MIDNIGHT + MOMENT) == 1
    assert bucket.number(MIDNIGHT, MIDNIGHT + 3 * width) == 3
    assert bucket.number(MIDNIGHT - MOMENT, MIDNIGHT + 3 * width) == 4
    assert bucket.number(MIDNIGHT - MOMENT, MIDNIGHT + 3 * width + MOMENT) == 5
