"""Every setting of every process, from flags, the environment, `.env` and defaults, in that order.

Rule: names are `PAYSTREAM_` + path joined by `__` (`PAYSTREAM_STRIPE__API_KEY`); a `*_FILE` twin reads a secret from a file. The usual short names
(`DATABASE_URL`, `KAFKA_BOOTSTRAP_SERVERS`, `SCHEMA_REGISTRY_URL`, `REDIS_URL`, `PORT`, `LOG_LEVEL`) are understood too, and yield to the long ones.
A bad setting stops the start: all of them are listed at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import BadConfiguration

PREFIX: Final = "PAYSTREAM_"
_SHORT_NAMES: Final = {
    "DATABASE_URL": "PAYSTREAM_DATABASE__URL",
    "KAFKA_BOOTSTRAP_SERVERS": "PAYSTREAM_KAFKA__BOOTSTRAP_SERVERS",
    "SCHEMA_REGISTRY_URL": "PAYSTREAM_SCHEMA_REGISTRY__URL",
    "REDIS_URL": "PAYSTREAM_REDIS__URL",
    "PORT": "PAYSTREAM_API__PORT",
    "LOG_LEVEL": "PAYSTREAM_LOG__LEVEL",
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kafka(Section):
    """One setting of security for both client families (librdkafka and aiokafka)."""

    bootstrap_servers: str = "127.0.0.1:9092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_ca_location: Path | None = None
    delivery_timeout_s: float = Field(5.0, gt=0, description="how long the intake waits for a delivery report")
    session_timeout_s: float = Field(45.0, gt=0)
    rebalance_timeout_s: float = Field(60.0, gt=0)


class SchemaRegistry(Section):
    url: str = "http://127.0.0.1:8081"


class Database(Section):
    url: SecretStr = SecretStr("postgresql://paystream@127.0.0.1:5432/paystream")
    pool_size: int = Field(16, ge=1, le=200)


class Redis(Section):
    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")


class Api(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_amount_minor: int = Field(100_000_000, ge=1, description="the largest amount that a payment may have, in minor units")
    max_body_bytes: int = Field(64 * 1024, ge=1024)
    max_undecided_commands: int = Field(10, ge=1, description="undecided commands of one order before the intake answers 429")
    max_waiters: int = Field(1000, ge=1, description="requests that may wait under `Prefer: wait` at once")


class Auth(Section):
    jwt_secret: SecretStr | None = Field(None, description="HS256, at least 32 bytes")
    issuer: str = "paystream"
    audience: str = "paystream-api"


class Stripe(Section):
    base_url: str = "https://api.stripe.com"
    api_key: SecretStr | None = None
    webhook_secrets: tuple[SecretStr, ...] = Field((), description="several during a rotation; none disables the route")
    timeout_s: float = Field(8.0, gt=0, le=20)


class Worker(Section):
    window: int = Field(1000, ge=1, description="messages that run at once, one for each order")
    span: int = Field(5000, ge=1, description="messages between the oldest unfinished and the newest of a partition")
    drain_s: float = Field(40.0, gt=0, description="how long partitions that are given back may take to drain; below the rebalance timeout")
    handler_budget_s: float = Field(20.0, gt=0)
    commit_interval_s: float = Field(1.0, gt=0)
    max_bugs: int = Field(20, ge=1, description="bugs in five minutes that halt the group")
    admin_host: str = "127.0.0.1"
    admin_port: int = Field(0, ge=0, le=65535, description="/metrics, /livez and /readyz of a worker or the relay; 0 takes a free one")


class Relay(Section):
    max_rows: int = Field(500, ge=1)
    linger_ms: int = Field(20, ge=0)
    transaction_timeout_ms: int = Field(10_000, ge=1000)


class Log(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "json", "text"] = "auto"


class Settings(BaseSettings):
    """All of it. `prefix` isolates one installation from another: topics, groups, transactional ids and Redis keys begin with it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    profile: Literal["sandbox", "production"] = "sandbox"
    prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,40}$")
    service: str = Field("paystream", description="the name of this process in logs, metrics and client ids")
    kafka: Kafka = Kafka()
    schema_registry: SchemaRegistry = SchemaRegistry()
    database: Database = Database()
    redis: Redis = Redis()
    api: Api = Api()
    auth: Auth = Auth()
    stripe: Stripe = Stripe()
    worker: Worker = Worker()
    relay: Relay = Relay()
    log: Log = Log()


def load(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of this process; `overrides` (flags) win.

    Raises BadConfiguration naming every bad setting, by its environment name, at once.
    """
    _spell_out_short_names()
    try:
        return Settings(**(overrides or {}))
    except ValidationError as error:
        lines = [f"  {PREFIX}{'__'.join(str(part).upper() for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise BadConfiguration("these settings are wrong:\n" + "\n".join(lines)) from None


def _spell_out_short_names() -> None:
    for short, long in _SHORT_NAMES.items():
        if short in os.environ:
            os.environ.setdefault(long, os.environ[short])
    for name in [name for name in os.environ if name.startswith(PREFIX) and name.endswith("_FILE")]:
        path = Path(os.environ[name])
        if not path.is_file():
            raise BadConfiguration(f"{name} names {path}, which is no file that can be read")
        os.environ.setdefault(name.removesuffix("_FILE"), path.read_text(encoding="utf-8").strip())
