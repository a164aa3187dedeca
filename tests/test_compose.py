"""docker-compose.yml and the Dockerfile, held to the code as far as that goes without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from api.auth import Tokens
from api.cli.main import COMMANDS, command_line
from infra.database.delivery import Group
from infra.local.services import BROKER, PARTS
from infra.settings import PREFIX, every_setting, load

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text(encoding="utf-8")
OURS = "paystream:"
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

COMPOSE: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(r"\2", TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_it_has_the_parts_of_the_local_stack() -> None:
    """But for the step that registers the webhook endpoint: there the sandbox does that."""
    assert set(SERVICES) == {part.name for part in PARTS} - {"webhook"}


def test_each_waits_for_what_it_waits_for_in_the_local_stack() -> None:
    for part in PARTS:
        if part.name != "webhook":
            wanted = part.after - {"webhook"} | ({"sandbox"} if "webhook" in part.after else set())
            assert set(SERVICES[part.name].get("depends_on", {})) == wanted, part.name


def test_what_is_waited_for_is_healthy_or_done() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            step = SERVICES[other].get("restart") == "no"
            assert how == {"condition": "service_completed_successfully" if step else "service_healthy"}, (name, other)
            assert step or "test" in SERVICES[other]["healthcheck"], other


def test_all_but_steps_are_started_again_and_have_a_health_check() -> None:
    for name, service in SERVICES.items():
        if service["restart"] != "no":
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name


def test_the_broker_is_configured_as_the_local_one() -> None:
    told = SERVICES["kafka"]["environment"]
    for name, value in BROKER.items():
        assert str(told["KAFKA_" + name.upper().replace(".", "_")]) == str(value), name
    assert BROKER["auto.create.topics.enable"] == "false"


def test_every_variable_of_ours_is_a_setting() -> None:
    command: Any = typer.main.get_command(command_line("sandbox"))
    known = {name for name, _ in every_setting()} | {option.envvar for option in command.commands["sandbox"].params}
    for name, service in SERVICES.items():
        unknown = {variable for variable in service.get("environment", {}) if variable.startswith(PREFIX)} - known
        assert not unknown, name


def test_the_settings_are_good_and_the_sandbox_signs_with_the_secret_that_the_api_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where no .env is
    for variable, value in SERVICES["api"]["environment"].items():
        monkeypatch.setenv(variable, str(value))
    settings = load()
    Tokens(settings.auth)
    assert [secret.get_secret_value() for secret in settings.stripe.webhook_secrets] == [
        SERVICES["sandbox"]["environment"]["PAYSTREAM_SANDBOX__WEBHOOK_SECRET"]
    ]


def test_every_command_exists() -> None:
    for name, service in SERVICES.items():
        if not service["image"].startswith(OURS):
            continue
        command, *rest = service["command"]
        assert command in {entry.name for entry in COMMANDS}, name
        target: Any = typer.main.get_command(command_line(command))
        below = getattr(target.commands[command], "commands", None)
        allowed: set[str] = set(below) if below else set(Group) if command == "worker" else set()
        assert set(rest) <= allowed, name


def test_images_are_pinned_and_ports_are_unique_and_local() -> None:
    for name, service in SERVICES.items():
        _, _, tag = service["image"].partition(":")
        assert tag, name
        assert tag != "latest", name
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports), ports
    assert max(Counter(port.split(":")[1] for port in ports).values()) == 1


def test_a_variable_has_one_default_and_secrets_say_that_they_are_for_development() -> None:
    defaults = defaultdict(set)
    for variable, default in _VARIABLE.findall(TEXT):
        defaults[variable].add(default)
    assert {variable for variable, values in defaults.items() if len(values) > 1} == set()
    for variable in ("JWT_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "STRIPE_API_KEY", "STRIPE_WEBHOOK_SECRET"):
        (default,) = defaults[variable]
        assert "development" in default, variable


def test_volumes_and_configs_that_are_used_are_there() -> None:
    volumes = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert volumes == set(COMPOSE["volumes"])
    configs = {config["source"] for service in SERVICES.values() for config in service.get("configs", ())}
    assert configs == set(COMPOSE["configs"])


def test_the_image_does_not_run_as_root_and_is_built_from_the_lock() -> None:
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(stages) == 2
    assert all(":" in image and not image.endswith(":latest") for image in stages)
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)", final, re.MULTILINE) == ["10001"]
    assert "--require-hashes" in DOCKERFILE
    for source in re.findall(r"^COPY ([\w.-]+) \./$", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).is_file(), source


def test_what_the_build_needs_is_not_ignored() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    packages = {"api", "infra", "processors", "producers", "schemas"}
    assert let_in == packages | {"kafka-topics.yaml", "pyproject.toml", "README.md", "requirements.lock"}


def test_docker_compose_reads_it() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("there is no `docker compose` here")
    read = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
