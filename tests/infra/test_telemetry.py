"""Log lines: JSON, complete, scrubbed, from us and from libraries alike."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import orjson
import pytest
import structlog

from infra import telemetry
from infra.settings import Log, Settings

pytestmark = pytest.mark.unit


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_is_json_with_what_is_bound(out: io.StringIO) -> None:
    telemetry.configure(Settings(service="relay"), out)
    with structlog.contextvars.bound_contextvars(order_id="o1", event_id="e1"):
        structlog.get_logger().info("hello", number=1, nested={"url": "redis://:secret@host"}, raw=b"\xff", odd=object)
    (line,) = lines(out)
    assert line["timestamp"].endswith("Z")  # type: ignore[attr-defined]
    assert {"event": "hello", "level": "info", "service": "relay", "order_id": "o1", "event_id": "e1", "number": 1}.items() <= line.items()
    assert line["nested"] == {"url": "redis://:[redacted]@host"}


def test_libraries_come_out_the_same_way(out: io.StringIO) -> None:
    telemetry.configure(Settings(), out)
    logging.getLogger("somebody").warning("card %s", "4242 4242 4242 4242")
    logging.getLogger("aiokafka.consumer").info("chatter")
    (line,) = lines(out)
    assert {"event": "card [redacted]", "level": "warning", "logger": "somebody"}.items() <= line.items()


def test_a_library_says_the_same_thing_once_in_a_while(out: io.StringIO) -> None:
    telemetry.configure(Settings(), out)
    for number in range(100):
        logging.getLogger("somebody").warning("no broker, try %s", number)
    assert len(lines(out)) == 1


def test_exceptions_are_scrubbed_too(out: io.StringIO) -> None:
    telemetry.configure(Settings(), out)
    try:
        raise ValueError("whsec_abcdefgh")
    except ValueError:
        structlog.get_logger().exception("oops")
    (line,) = lines(out)
    assert "ValueError: whsec_[redacted]" in str(line["exception"])


@pytest.mark.parametrize(("level", "seen"), [("DEBUG", 2), ("INFO", 1), ("WARNING", 0)])
def test_the_level_holds_for_all(out: io.StringIO, level: str, seen: int) -> None:
    telemetry.configure(Settings(log=Log.model_validate({"level": level})), out)
    structlog.get_logger().debug("a")
    structlog.get_logger().info("b")
    assert len(lines(out)) == seen


def test_text_for_people(out: io.StringIO) -> None:
    telemetry.configure(Settings(log=Log(format="text")), out)
    structlog.get_logger().info("hello", key="sk_test_12345678")
    assert "hello" in out.getvalue()
    assert "12345678" not in out.getvalue()


def test_nobody_reads_the_log_any_more_and_nobody_who_logs_is_stopped(out: io.StringIO) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    telemetry.configure(Settings(), Gone())
    structlog.get_logger().info("hello")
    logging.getLogger("library").warning("hello")


def test_a_process_that_can_not_go_on_says_why_and_ends_with_70() -> None:
    program = "from infra import telemetry, settings; telemetry.configure(settings.Settings()); telemetry.end_process(ValueError('broken'))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == telemetry.INTERNAL_ERROR == 70
    assert "ValueError: broken" in ended.stdout
