"""A stack's folder: its ports, its secrets, its lock, and the words when the machine is not as it should be."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.environment import publish, settings, variables
from infra.local.home import PORTS, Home, Record, State
from infra.local.process import Identity, StackError
from infra.settings import load

pytestmark = pytest.mark.unit


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "stack")


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        yield server.getsockname()[1]


def test_ports_are_chosen_once_and_kept(home: Home) -> None:
    assert home.prepare() == []
    chosen = home.ports
    assert sorted(chosen) == sorted(PORTS)
    assert len(set(chosen.values())) == len(PORTS)
    home.prepare()
    assert home.ports == chosen


def test_a_port_can_be_set_and_is_kept_then(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        pass
    monkeypatch.setenv("PAYSTREAM_LOCAL_PORT_API", str(port))
    home.prepare()
    monkeypatch.delenv("PAYSTREAM_LOCAL_PORT_API")
    home.prepare()
    assert home.ports["api"] == port


def test_a_set_port_that_is_taken_is_named_with_its_owner(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setenv("PAYSTREAM_LOCAL_PORT_KAFKA", str(port))
        with pytest.raises(StackError, match=rf"port {port} \(PAYSTREAM_LOCAL_PORT_KAFKA\) is taken by .* \(pid {os.getpid()}\)"):
            home.prepare()


def test_a_kept_port_that_is_taken_is_replaced_and_that_is_said(home: Home) -> None:
    home.prepare()
    was = home.ports["redis"]
    with listening(was):
        notes = home.prepare()
    assert home.ports["redis"] != was
    assert re.search(rf"port {was} of redis is taken now by .*another one is used", "\n".join(notes))


@pytest.mark.parametrize("text", ["kafka", "0", "70000", "-1"])
def test_what_is_no_port_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PAYSTREAM_LOCAL_PORT_KAFKA", text)
    with pytest.raises(StackError, match=r"PAYSTREAM_LOCAL_PORT_KAFKA is '.*': a port is a number"):
        home.prepare()


def test_a_disk_that_is_nearly_full_stops_the_start(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.local.home._MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(StackError, match=r"only \d+ MiB are free .* --dir"):
        home.prepare()


def test_secrets_are_made_once_and_only_their_owner_reads_them(home: Home) -> None:
    home.prepare()
    secrets = home.secrets
    home.prepare()
    home.keep_secret("webhook_secret", "whsec_1")
    assert home.secrets == {**secrets, "webhook_secret": "whsec_1"}
    assert stat.S_IMODE((home.path / "secrets.json").stat().st_mode) == 0o600


def test_state_comes_back_as_it_was_written(home: Home) -> None:
    home.prepare()
    state = State(
        phase="running", supervisor=Identity(1, 2.5), records={"kafka": Record(condition="healthy", identity=Identity(3, 4.5), seconds=1.0)}
    )
    home.write_state(state)
    assert home.read_state() == state


def test_a_damaged_file_is_named(home: Home) -> None:
    home.prepare()
    (home.path / "state.json").write_text("{")
    with pytest.raises(StackError, match=r"state\.json can't be read"):
        home.read_state()


def test_a_hold_ends_with_its_block(home: Home) -> None:
    home.prepare()
    assert not home.is_held("worker")
    with home.holding("worker"):
        assert (home.is_held("worker"), home.is_held("relay")) == (True, False)
    assert not home.is_held("worker")


def test_there_is_one_supervisor_and_looking_does_not_keep_it_out(home: Home) -> None:
    assert not home.supervised()
    lock = home.lock()
    assert lock is not None
    assert home.supervised()
    assert home.lock() is None
    os.close(lock)
    assert not home.supervised()


def test_wiping_forgets_all_stores_together_and_keeps_the_ports(home: Home, tmp_path: Path) -> None:
    home.prepare()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (home.path / "postgres").symlink_to(elsewhere)
    for name in ("kafka", "redis", "sandbox"):
        home.data(name).mkdir()
    ports, secrets = home.ports, home.secrets
    home.wipe()
    assert not elsewhere.exists()
    assert sorted(path.name for path in home.path.iterdir()) == ["ports.json"]
    home.prepare()
    assert home.ports == ports
    assert home.secrets["postgres_password"] != secrets["postgres_password"]


def test_the_environment_gives_a_child_the_same_settings(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.prepare()
    home.keep_secret("webhook_secret", "whsec_1")
    told = settings(home)
    for name, value in variables(told).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home.path)
    child = load()
    assert child.model_dump() == told.model_dump()
    assert child.stripe.webhook_secrets[0].get_secret_value() == "whsec_1"


def test_what_is_started_by_hand_joins_the_stack_of_its_folder_and_is_told_otherwise_by_env_files_and_the_environment(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.prepare()
    home.keep_secret("webhook_secret", "whsec_1")
    publish(home)
    assert stat.S_IMODE((home.path / "environment").stat().st_mode) == 0o600
    monkeypatch.setenv("PAYSTREAM_LOCAL_DIR", str(home.path))
    monkeypatch.chdir(home.path)
    assert load().model_dump() == settings(home).model_dump()

    (home.path / ".env").write_text("PAYSTREAM_KAFKA__BOOTSTRAP_SERVERS=elsewhere:9092\nPAYSTREAM_API__PORT=1\n")
    monkeypatch.setenv("PAYSTREAM_API__PORT", "2")
    told = load()
    assert (told.kafka.bootstrap_servers, told.api.port) == ("elsewhere:9092", 2)


def test_real_test_keys_take_the_place_of_the_sandbox(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.prepare()
    monkeypatch.setenv("PAYSTREAM_STRIPE__API_KEY", "sk_test_mine")
    told = settings(home)
    assert told.stripe.base_url == "https://api.stripe.com"
    assert told.stripe.api_key is not None
    assert told.stripe.api_key.get_secret_value() == "sk_test_mine"
