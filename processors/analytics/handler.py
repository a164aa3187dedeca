"""What happens to a batch of messages of the analytics group.

Rule: one transaction folds a batch of payment events into the views and notes how far each payment has got; nothing else happens, so reading
everything again from the first event is harmless, and gives the same rows. An event that was applied is passed over. One that is not the next of its
payment is rejected: the topic is gapless, so something is broken, and a view that goes on would be wrong without anybody knowing.
Flow: payment-events -> window -> batch delivery -> handle_batch -> store (analytics.*, stream_positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge

from infra.clock import Clock
from infra.crash_points import at
from infra.database.analytics import AnalyticsStore, AnalyticsTransaction
from infra.database.delivery import Received
from processors.analytics.projections import project
from processors.delivery import payment_event_in
from schemas.errors import Rejected
from schemas.messages import Message, PaymentEvent

EVENTS: Final = Counter("paystream_projection_events_total", "Events that were folded into the views")
LAG: Final = Gauge("paystream_projection_lag_seconds", "How old the newest event of a batch was when it was folded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    store: AnalyticsStore
    clock: Clock


async def handle_batch(batch: Sequence[tuple[Received, Message]], deps: Deps) -> None:
    """Apply a batch, all of it or nothing. Raises Unavailable (nothing is lost, try again) and Rejected (one of them can never be handled)."""
    pairs = [(received, payment_event_in(received, message)) for received, message in batch]
    async with deps.store.transaction([event for _, event in pairs]) as tx:
        applied = [event for received, event in pairs if await _apply(tx, received, event)]
        await tx.write()
        await at("analytics.before_commit")
    await at("analytics.after_commit")
    if applied:
        EVENTS.inc(len(applied))
        LAG.set((deps.clock.now() - applied[-1].occurred_at).total_seconds())


async def _apply(tx: AnalyticsTransaction, received: Received, event: PaymentEvent) -> bool:
    """Whether the event was news."""
    if await tx.settled(received, event):
        return False
    seen = tx.positions.get(event.payment_id, 0)
    if event.version != seen + 1:
        raise Rejected(f"version {event.version} of payment {event.payment_id} comes after version {seen}: what is between is missing")
    project(tx.views, event)
    tx.positions[event.payment_id] = event.version
    return True
