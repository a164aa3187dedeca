"""`paystream docs`, and that the pages are as it would write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from api.cli import docs
from api.cli.main import COMMANDS, main
from api.errors import PROBLEMS
from infra.settings import Settings, every_setting
from processors.orders import machine as order_machine
from processors.payments import machine as payment_machine
from schemas.errors import BadConfiguration

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_REFUSAL = re.compile(r'Refusal\(code="(\w+)"')


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["docs", *arguments])
    return int(end.value.code or 0)


def text_of(page: str) -> str:
    return (docs.ROOT / page).read_text(encoding="utf-8")


@pytest.mark.unit
def test_the_pages_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check") == 0, capsys.readouterr()


@pytest.mark.unit
def test_a_stale_page_is_told_of_and_then_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    stale = "# By hand\n\n<!-- exit-statuses:begin -->\nold\n<!-- exit-statuses:end -->\nby hand too\n"
    page.write_text(stale)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert (run("--check"), page.read_text()) == (3, stale)
    assert capsys.readouterr().out == "docs/page.md\n"
    assert run() == 0
    assert page.read_text() == stale.replace("old", docs.exit_statuses())
    assert run("--check") == 0


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!-- weather:begin -->\n<!-- weather:end -->", "nothing is called weather"),
        ("<!-- metrics:begin -->\n", "has no partner"),
        ("<!-- topics:begin -->\n<!-- metrics:begin -->\n<!-- topics:end -->", "has no partner"),
    ],
)
def test_a_wrong_marker_is_said(text: str, why: str) -> None:
    with pytest.raises(BadConfiguration, match=why):
        docs.refreshed(text, "page.md")


@pytest.mark.unit
def test_without_a_checkout_there_is_nothing_to_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert run() == 2
    assert "is no checkout" in capsys.readouterr().err


@pytest.mark.unit
def test_every_part_is_on_a_page() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in docs.pages())
    assert [name for name in docs.PARTS if f"<!-- {name}:begin -->" not in everything] == []


@pytest.mark.unit
def test_diagrams_have_every_status_and_every_step() -> None:
    payment, attempt, order = docs.diagrams().split("```mermaid\n")[1:]
    for drawn, table in ((payment, payment_machine.TRANSITIONS), (order, order_machine.TRANSITIONS)):
        for status, moves in table.items():
            for event, following in moves.items():
                assert re.search(rf"^ +{status} --> {following}: .*{event.event_type}", drawn, re.MULTILINE)
    for before, after in payment_machine.ATTEMPT_TRANSITIONS.items():
        for following in after - {before}:
            assert f" {before} --> {following}\n" in attempt
    assert "[*] --> PENDING\n" in payment
    assert "[*] --> STARTED\n" in attempt
    assert "SUCCEEDED --> [*]\n" in attempt


@pytest.mark.unit
def test_every_setting_says_what_it_means() -> None:
    assert [variable for variable, field in every_setting() if not field.description] == []
    assert "PAYSTREAM_STRIPE__API_KEY" in dict(every_setting())
    assert "PAYSTREAM_KAFKA" not in dict(every_setting())


@pytest.mark.unit
def test_metrics_of_each_kind_are_found() -> None:
    """Module by module, and those that a worker makes when it is asked."""
    rows = docs.metrics().splitlines()
    assert any(row.startswith("| `paystream_commands_refused_total` | counter | `command`, `code` |") for row in rows)
    assert any(row.startswith("| `paystream_consumer_lag_messages` | gauge | `group`, `topic`, `partition` |") for row in rows)
    assert any(row.startswith("| `paystream_gateway_call_seconds` | histogram | `gateway`, `operation`, `outcome` |") for row in rows)


@pytest.mark.unit
def test_every_command_is_on_the_page() -> None:
    page = text_of("docs/cli.md")
    assert [command.name for command in COMMANDS if f"### `paystream {command.name}" not in page] == []


@pytest.mark.unit
def test_a_problems_type_leads_to_its_heading_and_every_refusal_is_explained() -> None:
    page = text_of("docs/problems.md")
    anchors = set(_anchors(page))
    assert [kind for kind in PROBLEMS if kind not in anchors] == []
    codes = set(_REFUSAL.findall(text_of("processors/payments/machine.py")))
    assert codes
    assert [code for code in codes if f"| `{code}` |" not in page] == []


@pytest.mark.unit
def test_links_between_the_pages_lead_somewhere() -> None:
    broken = [f"{page.name}: {target}" for page in docs.pages() for target in _broken_links(page)]
    assert broken == []


@pytest.mark.integration
def test_the_operators_queries_run(database: Settings) -> None:
    queries = re.findall(r"```sql\n(.*?)```", text_of("docs/operations.md"), re.DOTALL)
    assert queries
    with psycopg.connect(database.database.url.get_secret_value()) as connection:
        for query in queries:
            assert connection.execute(query).fetchall() == []


def _broken_links(page: Path) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text(encoding="utf-8"))):
            yield target


def _anchors(page: str) -> list[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
