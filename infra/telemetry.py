"""Logs and the shape of metrics, the same for every process.

Rule: one line on stdout per event, JSON unless a person is looking; it carries what is bound around the work (`order_id`, `payment_id`, `event_id`,
`correlation_id`), and no card number and no secret. Libraries that log by `logging` come out the same way.
Metrics are defined in the module that uses them, named `paystream_<noun>_<unit>`, with few labels and never an id.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Final, NoReturn, TextIO, cast

import orjson
import structlog

from infra.scrub import scrub
from infra.settings import Settings

DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
"""Seconds; what OpenTelemetry advises for messaging, and one more for a handler that uses up its budget."""

INTERNAL_ERROR: Final = 70
"""The exit status of a process that met what it can't cope with (EX_SOFTWARE)."""

_SAME_AGAIN_S: Final = 10.0
_CHATTY: Final = ("processors", "faust", "mode", "aiokafka", "asyncio", "uvicorn.access", "aiohttp.access", "stripe", "httpx", "httpx2")
_log: Final = structlog.get_logger()


class _Unfailing:
    """A stream whose reader may go away: what can't be written is lost, and whoever logs goes on with the payment."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (stdout), as `settings.log` says."""
    out = cast(TextIO, _Unfailing(stream or sys.stdout))
    text = settings.log.format == "text" or (settings.log.format == "auto" and out.isatty())
    level = logging.getLevelNamesMapping()[settings.log.level]

    def add_service(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = settings.service
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _scrub_values,
    ]
    if text:
        colors = out.isatty() and "NO_COLOR" not in os.environ
        render: list[Any] = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    else:
        render = [add_service, structlog.processors.JSONRenderer(_json)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    handler.addFilter(_NoRepeats())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else logging.WARNING)


def end_process(error: BaseException) -> NoReturn:
    """End this process at once, with a last word: going on would be worse than starting anew. Nothing is cleaned up, as in a power cut."""
    try:
        _log.critical("this process can't go on", exc_info=error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(INTERNAL_ERROR)


class _NoRepeats(logging.Filter):
    """Lets a library say the same thing once in ten seconds: clients of a broker that is away say it twenty times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        what = (record.name, str(record.msg)[:200])
        if record.created - self._said.get(what, 0.0) < _SAME_AGAIN_S:
            return False
        if len(self._said) > 1000:
            self._said.clear()
        self._said[what] = record.created
        return True


def _json(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=lambda value: scrub(repr(value)), option=orjson.OPT_NON_STR_KEYS).decode()


def _scrub_values(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: _scrubbed(value) for name, value in event.items()}


def _scrubbed(value: Any) -> Any:
    match value:
        case str():
            return scrub(value)
        case bytes():
            return scrub(value.decode(errors="replace"))
        case dict():
            return {name: _scrubbed(item) for name, item in value.items()}
        case list() | tuple():
            return [_scrubbed(item) for item in value]
        case _:
            return value
