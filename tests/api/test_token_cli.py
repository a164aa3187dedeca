"""`paystream token`"""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from api.auth import Principal, Tokens
from api.cli.main import main
from infra.settings import Auth

pytestmark = pytest.mark.unit
SECRET = "a secret of the tests, 32 bytes long"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYSTREAM_AUTH__JWT_SECRET", SECRET)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["token", *arguments])
    return int(ended.value.code or 0)


async def test_it_prints_a_token_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--user", "u1", "--role", "admin", "--role", "analyst", "--ttl", "30m") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert await Tokens(Auth(jwt_secret=SecretStr(SECRET))).principal(f"Bearer {line}") == Principal("u1", frozenset({"admin", "analyst"}))


def test_in_production_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PAYSTREAM_PROFILE", "production")
    assert run("--user", "u1") == 5
    told = capsys.readouterr()
    assert told.out == ""
    assert "sandbox" in told.err


@pytest.mark.parametrize("arguments", [(), ("--user", ""), ("--user", "x" * 129), ("--user", "u1", "--ttl", "12"), ("--user", "u1", "--ttl", "31d")])
def test_wrong_usage_says_so(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().out == ""


def test_without_a_secret_it_says_which_setting_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PAYSTREAM_AUTH__JWT_SECRET")
    assert run("--user", "u1") == 2
    assert "PAYSTREAM_AUTH__JWT_SECRET" in capsys.readouterr().err
