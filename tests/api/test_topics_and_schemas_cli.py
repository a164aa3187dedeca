"""`paystream topics` and `paystream schemas`: what goes to stdout, what to stderr, and the exit statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from api.cli.main import main
from infra import kafka_admin
from infra.local import environment
from infra.settings import Settings
from schemas.messages import RECORDS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run("topics", "diff", settings=…)` gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)  # where no .env is

    def run(*arguments: str, settings: Settings | None = None) -> tuple[int, str, str]:
        for name, value in (environment.variables(settings) if settings else {}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(arguments)
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return run


@pytest.mark.unit
def test_schemas_can_be_checked_without_a_registry(run: Run) -> None:
    assert run("schemas", "check", "--offline") == (0, "", f"{len(RECORDS)} schemas, all compatible.\n")
    assert run("schemas", "check", "--offline", "--json")[:2] == (0, "[]\n")


@pytest.mark.unit
def test_services_that_are_away_are_one_line_and_status_69(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_admin, "ANSWER_WITHIN_S", 0.5)
    monkeypatch.setenv("PAYSTREAM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("PAYSTREAM_SCHEMA_REGISTRY__URL", "http://127.0.0.1:1")
    for arguments in (("topics", "diff"), ("topics", "apply"), ("schemas", "check"), ("schemas", "register")):
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (69, "", 1), arguments
        assert "unavailable" in err


@pytest.mark.unit
def test_a_profile_that_does_not_exist_is_wrong_usage(run: Run) -> None:
    status, out, err = run("topics", "diff", "--profile", "staging")
    assert (status, out) == (2, "")
    assert "no profile 'staging'" in err


@pytest.mark.integration
def test_drift_is_status_3_until_it_is_applied(run: Run, installation: Settings) -> None:
    status, out, err = run("topics", "diff", settings=installation)
    assert (status, out) == (0, "")
    assert "The brokers match kafka-topics.yaml." in err
    assert "no authorizer" in err
    status, out, err = run("topics", "diff", "--profile", "production", settings=installation)
    assert status == 3
    assert f"drift    {installation.prefix}payment-events  partitions: has 3, should have 24\n" in out
    assert err.count("Partition counts never change in place") == 1
    status, out, _ = run("topics", "diff", "--profile", "production", "--json", settings=installation)
    assert status == 3
    assert {drift["kind"] for drift in json.loads(out)["drift"]} == {"config", "partitions", "replication"}


@pytest.mark.integration
def test_schemas_are_registered_and_then_all_is_well(run: Run, database: Settings) -> None:
    status, out, _ = run("schemas", "register", "--json", settings=database)
    assert status == 0
    assert set(json.loads(out)) == set(RECORDS)
    assert run("schemas", "check", settings=database) == (0, "", f"{len(RECORDS)} schemas, all compatible and registered.\n")
