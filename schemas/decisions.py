"""What a machine decides: the value that passes from a machine to the store that keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from schemas.messages import ExpirePayment, PaymentEvent, ResolveAttempt
from schemas.state import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a command was not carried out. The answer to its caller; nothing changes."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """A command that shall be given at `due_at`. Setting a timer of the same id again moves it."""

    timer_id: str
    command: type[ResolveAttempt] | type[ExpirePayment]
    attempt: int | None
    due_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows: facts to append, attempts as they now stand, timers to set or drop. `ask`: the attempt about which the gateway is to be asked."""

    events: tuple[PaymentEvent, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    timers: tuple[Timer, ...] = ()
    dropped_timers: tuple[str, ...] = ()
    refusal: Refusal | None = None
    ask: int | None = None
