"""The frame of the `paystream` command: what a user sees when it goes well, and what when it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from api.cli import main as frame
from api.cli.main import COMMANDS, EXIT_STATUSES, main
from schemas.errors import BadConfiguration, PaystreamError, Unavailable

pytestmark = pytest.mark.unit

Ran = tuple[int, str, str]
Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_one(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run_one


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """`paystream migrate` raises that."""

    def plug(error: BaseException) -> None:
        def migrate() -> None:
            raise error

        monkeypatch.setattr(frame, "import_module", lambda _: SimpleNamespace(migrate=migrate))

    return plug


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_of_the_table_exists_and_explains_itself_with_an_example(run: Run, command: frame.Command) -> None:
    module, _, name = command.target.partition(":")
    assert hasattr(import_module(module), name)
    status, out, _ = run(command.name, "--help")
    assert status == 0
    if name != "app":  # else its sub-commands have theirs
        assert "Example" in out


def test_help_names_all_commands_and_imports_none() -> None:
    code = (
        "import sys; from api.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print([m for m in sys.modules if m.startswith('api.')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "['api.cli', 'api.cli.main']"
    assert all(f" {command.name} " in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (BadConfiguration("PAYSTREAM_API__PORT: no number"), 2, "error: PAYSTREAM_API__PORT: no number\n"),
        (Unavailable("Postgres", "refused"), 69, "error: Postgres is unavailable: refused\n"),
        (PaystreamError("it broke"), 1, "error: it broke\n"),
        (ZeroDivisionError("oh"), 70, "error: a bug of ours: ZeroDivisionError: oh (with PAYSTREAM_TRACEBACK=1 it shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_whatever_goes_wrong_is_a_line_and_a_status_and_never_a_traceback(
    run: Run, raising: Callable[[BaseException], None], error: BaseException, status: int, words: str
) -> None:
    raising(error)
    assert run("migrate") == (status, "", words)
    assert status in EXIT_STATUSES


def test_a_bug_shows_where_it_is_to_whoever_asks(run: Run, raising: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("oh"))
    monkeypatch.setenv(frame.TRACEBACK, "1")
    _, _, err = run("migrate")
    assert err.startswith("Traceback (most recent call last):")


@pytest.mark.parametrize("arguments", [("nonsense",), ("worker", "nobody"), ("up", "--nonsense"), ("logs",)])
def test_wrong_usage_is_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: paystream" in err


def test_a_stack_that_was_never_up_is_said_so_in_words_and_in_json(run: Run, tmp_path: Path) -> None:
    folder = str(tmp_path / "none")
    assert run("status", "--dir", folder) == (0, "", f"there is no stack in {folder} yet: paystream up\n")
    assert run("status", "--dir", folder, "--json") == (0, '{\n  "services": [],\n  "settings": {}\n}\n', "")
    assert run("down", "--dir", folder) == (0, "", "nothing was running\n")
    assert not Path(folder).exists()
