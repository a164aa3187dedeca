"""Idempotency keys, as Stripe keeps them (docs.stripe.com/api/idempotent_requests).

Rule: the first answer is saved under its key once execution began, a 500 included, and given again to whoever repeats the request. A request that
was turned away before (401, 429, a parameter that does not fit, the key in use) leaves no trace. After 24 hours a key is forgotten: the same key is
then a new request, and a new charge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from infra.sandbox.clock import SandboxClock
from infra.sandbox.errors import ApiError, invalid
from infra.sandbox.storage import SavedAnswer, Storage

REMEMBERED_S: Final = 24 * 3600
_MAX_KEY: Final = 255


def fingerprint(method: str, path: str, parameters: Iterable[tuple[str, str]]) -> bytes:
    """The same for two requests if they ask for the same: order of parameters does not matter."""
    return hashlib.blake2b(repr((method, path, sorted(parameters))).encode(), digest_size=16).digest()


def judge(key: str, mark: bytes, saved: SavedAnswer | None, now: float) -> SavedAnswer | None:
    """The answer to give again; None if the request is new. Raises ApiError if the key was first used for another request."""
    if saved is None or now - saved.saved >= REMEMBERED_S:
        return None
    if saved.fingerprint != mark:
        raise ApiError(
            400,
            "idempotency_error",
            "Keys for idempotent requests can only be used with the same parameters they were first used with. "
            f"Try using a key other than '{key}' if you meant to execute a different request.",
        )
    return saved


class Keys:
    """The keys of this account: which are being worked on (while the process lives), and what was answered (for a day)."""

    def __init__(self, storage: Storage, clock: SandboxClock) -> None:
        self._storage = storage
        self._clock = clock
        self._running: set[str] = set()

    def claim(self, key: str, mark: bytes) -> SavedAnswer | None:
        """The answer to give again, or None: then the key is the caller's until `release`. Raises ApiError if another request holds it."""
        if len(key) > _MAX_KEY:
            raise invalid(f"Idempotency keys can be up to {_MAX_KEY} characters long.")
        if key in self._running:
            raise ApiError(
                409,
                "idempotency_error",
                f"There is currently another in-progress request using this Idempotent Key: {key}. Please try again later.",
                code="idempotency_key_in_use",
            )
        saved = judge(key, mark, self._storage.answer(key), self._clock.now())
        if saved is None:
            self._running.add(key)
        return saved

    def save(self, key: str, mark: bytes, status: int, body: bytes) -> None:
        self._storage.save_answer(key, SavedAnswer(fingerprint=mark, status=status, body=body, saved=self._clock.now()))

    def release(self, key: str) -> None:
        self._running.discard(key)

    def forget_old(self) -> None:
        """Make room: keys older than a day count for nothing already."""
        self._storage.forget_answers(self._clock.now() - REMEMBERED_S)
