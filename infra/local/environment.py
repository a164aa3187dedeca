"""What the processes of a stack are told: one set of settings, as values, as `Settings` and as environment variables.

Rule: it follows from the folder's ports and secrets alone, so whoever has the folder can join the stack.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from pydantic import SecretStr

from infra.local.home import Home
from infra.settings import PREFIX, Settings

SUPERUSER: Final = "paystream"
DATABASE: Final = "paystream"


def values(home: Home) -> dict[str, Any]:
    """The settings, nested as in infra/settings.py."""
    ports, secrets = home.ports, home.secrets
    return {
        "profile": "sandbox",
        # Whoever kills a worker here wants to see it come back, and not to wait for as long as a busy cluster would.
        "kafka": {"bootstrap_servers": f"127.0.0.1:{ports['kafka']}", "session_timeout_s": 10},
        "schema_registry": {"url": f"{local(home, 'registry')}/apis/ccompat/v7"},
        "database": {"url": database_url(home, DATABASE)},
        "redis": {"url": f"redis://:{secrets['redis_password']}@127.0.0.1:{ports['redis']}/0"},
        "api": {"host": "127.0.0.1", "port": ports["api"]},
        "auth": {"jwt_secret": secrets["jwt_secret"]},
        **_gateway(home),
    }


def settings(home: Home) -> Settings:
    return Settings(_env_file=None, **values(home))


def variables(settings: Settings) -> dict[str, str]:
    """The environment variables that give a child process these very settings; what is at its default is left out. Holds secrets."""
    return _flat(PREFIX, settings.model_dump(exclude_unset=True))


def publish(home: Home) -> None:
    """Tell whatever is started by hand in this folder how to reach the stack: `infra/settings.py` reads this file."""
    lines = [f"{name}='{value}'" for name, value in _flat(PREFIX, values(home)).items()]
    home.write("environment", "\n".join(["# Written by `paystream up`. Holds secrets.", *lines, ""]), mode=0o600)


def _flat(prefix: str, nested: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{prefix}{name.upper()}__", value)
        elif isinstance(value, list | tuple):
            flat[prefix + name.upper()] = json.dumps([_bare(item) for item in value])
        elif value is not None:
            flat[prefix + name.upper()] = str(_bare(value))
    return flat


def _bare(value: object) -> object:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def local(home: Home, name: str) -> str:
    """The base URL of an HTTP service of this stack."""
    return f"http://127.0.0.1:{home.ports[name]}"


def database_url(home: Home, database: str) -> str:
    return f"postgresql://{SUPERUSER}:{home.secrets['postgres_password']}@127.0.0.1:{home.ports['postgres']}/{database}"


def real_gateway() -> bool:
    """Does somebody want the gateway's own test mode instead of the sandbox? Then all of its settings are theirs."""
    return any(PREFIX + name in os.environ for name in ("STRIPE__API_KEY", "STRIPE__API_KEY_FILE"))


def _gateway(home: Home) -> dict[str, Any]:
    if real_gateway():
        return {}
    webhook_secret = home.secrets.get("webhook_secret")
    return {
        "stripe": {
            "base_url": local(home, "sandbox"),
            "api_key": home.secrets["stripe_api_key"],
            "webhook_secrets": [webhook_secret] if webhook_secret else [],
        }
    }
