"""The set-up: what a newcomer's machine may be like, and that what it is told is true."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infra.settings import PREFIX, every_setting

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env={**clean, **environment})


def python_of_version(folder: Path, version: str) -> Path:
    """Something that behaves as that Python would when it is asked for its version."""
    fake = folder / f"python{version}"
    major, minor = version.split(".")
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}); exec(sys.argv[1])" "$2"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return fake


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_another_python_is_one_line_that_says_what_to_install(tmp_path: Path, version: str) -> None:
    failed = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python_of_version(tmp_path, version)}")
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    assert re.search(r"Paystream needs Python 3\.11 or 3\.12 .* Install one \(", failed.stderr)
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_these_pythons_are_taken_and_the_first_usable_one_of_several(tmp_path: Path, version: str) -> None:
    usable = python_of_version(tmp_path, version)
    planned = make("--dry-run", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON=no-such-python {python_of_version(tmp_path, '3.13')} {usable}")
    assert planned.returncode == 0
    assert f'"{usable}" -m venv {tmp_path / "venv"}' in planned.stdout


def test_help_shows_what_there_is() -> None:
    shown = make("help").stdout
    assert re.findall(r"^  make (\w+) ", shown, re.MULTILINE) == ["help", "demo", "test", "up", "down", "check", "bench", "setup"]


def test_ci_runs_what_anybody_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_the_lock_pins_all_that_is_asked_for_with_hashes_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    asked += [requirement for extra in project["project"]["optional-dependencies"].values() for requirement in extra]
    pinned = set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
    assert {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in asked} <= pinned
    assert len(re.findall(r"^[\w.-]+==.*\\\n    --hash=sha256:", lock, re.MULTILINE)) == len(pinned)
    assert "://" not in lock


def test_the_example_of_an_env_file_names_settings_that_exist() -> None:
    lines = re.findall(rf"^# ({PREFIX}\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    assert {name.removesuffix("_FILE") for name in lines} <= {name for name, _ in every_setting()}
