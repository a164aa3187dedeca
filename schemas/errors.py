"""The family of errors that cross a seam.

Rule: drivers' errors are translated into one of these where the driver is called, once. A declined card is an event, never an exception.
"""

from __future__ import annotations


class PaystreamError(Exception):
    """Something went wrong."""

    def __init__(self, detail: str | None = None) -> None:
        self.detail = detail or (self.__doc__ or "").strip().splitlines()[0]
        super().__init__(self.detail)


class Rejected(PaystreamError):
    """The message can't be handled, now or later: it is poison."""


class Unavailable(PaystreamError):
    """A part that is ours (Kafka, Postgres, the registry, Redis) does not answer. Try again later."""

    def __init__(self, part: str, detail: str | None = None) -> None:
        self.part = part
        super().__init__(f"{part} is unavailable" + (f": {detail}" if detail else ""))


class IllegalTransition(Exception):
    """A bug of ours: an event that the status of what it is about does not allow."""


class BadConfiguration(PaystreamError):
    """A setting, a file or an argument is wrong. The message says which one and what would be right."""
