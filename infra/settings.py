"""Every setting of every process, from flags, the environment, `.env`, the local stack of this folder and defaults, in that order.

Rule: names are `PAYSTREAM_` + path joined by `__` (`PAYSTREAM_STRIPE__API_KEY`); a `*_FILE` twin reads a secret from a file. The usual short names
(`DATABASE_URL`, `KAFKA_BOOTSTRAP_SERVERS`, `SCHEMA_REGISTRY_URL`, `REDIS_URL`, `PORT`, `LOG_LEVEL`) are understood too, and yield to the long ones.
A bad setting stops the start: all of them are listed at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import BadConfiguration

PREFIX: Final = "PAYSTREAM_"
_LOCAL_DIR: Final = PREFIX + "LOCAL_DIR"
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

    bootstrap_servers: str = Field("127.0.0.1:9092", description="some of the brokers, as host:port, separated by commas")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field("PLAINTEXT", description="how the brokers are spoken to")
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field("SCRAM-SHA-512", description="used by the SASL protocols")
    sasl_username: str | None = Field(None, description="needed by the SASL protocols")
    sasl_password: SecretStr | None = Field(None, description="needed by the SASL protocols")
    ssl_ca_location: Path | None = Field(None, description="certificates (PEM) of who may sign the brokers'; the system's if left out")
    delivery_timeout_s: float = Field(5.0, gt=0, description="how long the intake waits for a delivery report")
    session_timeout_s: float = Field(45.0, gt=0, description="how long a worker may be silent before its partitions go to others")
    rebalance_timeout_s: float = Field(60.0, gt=0, description="how long a group waits for its members when partitions move")


class SchemaRegistry(Section):
    url: str = Field("http://127.0.0.1:8081", description="base URL of its Confluent API; Apicurio's ends in `/apis/ccompat/v7`")


class Database(Section):
    url: SecretStr = Field(SecretStr("postgresql://paystream@127.0.0.1:5432/paystream"), description="PostgreSQL 18 or later")
    pool_size: int = Field(16, ge=1, le=200, description="connections of one process at most; the intake has two such pools")


class Redis(Section):
    url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="makes answers quicker; may be away")


class Api(Section):
    host: str = Field("127.0.0.1", description="the address that the intake listens on")
    port: int = Field(8000, ge=0, le=65535, description="the intake's port; 0 takes a free one")
    max_amount_minor: int = Field(100_000_000, ge=1, description="the largest amount that a payment may have, in minor units")
    max_body_bytes: int = Field(64 * 1024, ge=1024, description="the largest body that is read; a larger one is answered 413")
    max_undecided_commands: int = Field(10, ge=1, description="undecided commands of one order before the intake answers 429")
    max_waiters: int = Field(1000, ge=1, description="requests that may wait under `Prefer: wait` at once")


class Auth(Section):
    jwt_secret: SecretStr | None = Field(None, description="HS256, at least 32 bytes; the intake does not start without it or a `JWKS_URL`")
    jwks_url: str | None = Field(None, description="where the issuer's public keys are; https, except in the sandbox and on the same machine")
    jwks_algorithms: tuple[Literal["RS256", "ES256"], ...] = Field(("RS256", "ES256"), min_length=1, description="what those keys may be for")
    jwks_ttl_s: float = Field(300.0, ge=10, description="how long fetched keys are used without asking again")
    jwks_stale_s: float = Field(3600.0, ge=0, description="how much longer they are used while the URL does not answer")
    issuer: str = Field("paystream", description="what a token's `iss` has to be")
    audience: str = Field("paystream-api", description="what a token's `aud` has to be")


class Stripe(Section):
    base_url: str = Field("https://api.stripe.com", description="Stripe, or the sandbox")
    api_key: SecretStr | None = Field(None, description="a secret key; without one there is no gateway `stripe`")
    webhook_secrets: tuple[SecretStr, ...] = Field((), description="several during a rotation; none disables the route")
    timeout_s: float = Field(8.0, gt=0, le=20, description="for one call; what is not answered by then is in doubt, and looked up later")


class Worker(Section):
    window: int = Field(1000, ge=1, description="messages that run at once, one for each order")
    span: int = Field(5000, ge=1, description="messages between the oldest unfinished and the newest of a partition")
    drain_s: float = Field(40.0, gt=0, description="how long partitions that are given back may take to drain; below the rebalance timeout")
    handler_budget_s: float = Field(20.0, gt=0, description="for all gateway calls of one message")
    commit_interval_s: float = Field(1.0, gt=0, description="between two commits of offsets")
    max_bugs: int = Field(20, ge=1, description="bugs in five minutes that halt the group")
    admin_host: str = Field("127.0.0.1", description="the address that a worker or the relay has its admin port on")
    admin_port: int = Field(0, ge=0, le=65535, description="/metrics, /livez and /readyz of a worker or the relay; 0 takes a free one")


class Relay(Section):
    max_rows: int = Field(500, ge=1, le=5000, description="outbox rows in one Kafka transaction at most")
    linger_ms: int = Field(50, ge=0, description="the least time between the beginnings of two batches under load")
    transaction_timeout_ms: int = Field(10_000, ge=1000, description="after which the brokers end a transaction that was left open")


class Log(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="what is logged: this, and what is worse")
    format: Literal["auto", "json", "text"] = Field("auto", description="`auto` is text on a terminal and JSON elsewhere")


class Settings(BaseSettings):
    """All of it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    profile: Literal["sandbox", "production"] = Field("sandbox", description="`production` issues no tokens and takes the large topics")
    prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,40}$",
        description="isolates one installation from another: topics, groups, transactional ids and Redis keys begin with it",
    )
    commit: str | None = Field(None, description="what this process was built from, for /version")
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


def every_setting(section: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[tuple[str, FieldInfo]]:
    """Each setting by its environment name, in the order of this file."""
    for name, field in section.model_fields.items():
        variable = prefix + name.upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from every_setting(field.annotation, variable + "__")
        else:
            yield variable, field


def local_stack() -> Path:
    """The folder of the local stack. Once it has been up, `environment` in there says how to reach it."""
    return Path(os.environ.get(_LOCAL_DIR) or ".paystream")


def load(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of this process; `overrides` (flags) win.

    Raises BadConfiguration naming every bad setting, by its environment name, at once.
    """
    _spell_out_short_names()
    files = (local_stack() / "environment", Path(".env"))
    try:
        return Settings(_env_file=files, **(overrides or {}))
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
