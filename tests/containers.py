"""The infrastructure of the tests in containers, by testcontainers: Kafka, registry, Postgres and Redis of docker-compose.yml.

NOT RUN BY US: there is no container engine where Paystream is built. So it is taken only when it is asked for, by `PAYSTREAM_TEST_CONTAINERS=1`, and
the embedded stack is what everybody has. `tests/test_compose.py` holds the compose file to the code.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from infra.settings import Auth, Database, Kafka, Redis, SchemaRegistry, Settings, Stripe

_ROOT = Path(__file__).parents[1]
_PASSWORD = "for-development-only"  # as docker-compose.yml has it
_JWT_SECRET = secrets.token_urlsafe(32)


class Containers:
    """A stack as far as tests need one: they ask for its settings."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports

    def settings(self) -> Settings:
        return Settings(
            _env_file=None,
            kafka=Kafka(bootstrap_servers=f"localhost:{self._ports['KAFKA_PORT']}"),
            schema_registry=SchemaRegistry(url=f"http://127.0.0.1:{self._ports['REGISTRY_PORT']}/apis/ccompat/v7"),
            database=Database(url=SecretStr(f"postgresql://paystream:{_PASSWORD}@127.0.0.1:{self._ports['POSTGRES_PORT']}/paystream")),
            redis=Redis(url=SecretStr(f"redis://:{_PASSWORD}@127.0.0.1:{self._ports['REDIS_PORT']}/0")),
            auth=Auth(jwt_secret=SecretStr(_JWT_SECRET)),
            stripe=Stripe(base_url="http://127.0.0.1:1", api_key=SecretStr("sk_test_of_the_tests")),
        )


@contextmanager
def containers(ports: dict[str, int]) -> Iterator[Containers]:
    """All four, healthy, within the block; `ports` are where they are published."""
    from testcontainers.compose import DockerCompose

    os.environ.update({name: str(port) for name, port in ports.items()}, COMPOSE_PROJECT_NAME=f"paystream-test-{secrets.token_hex(4)}")
    files = ["docker-compose.yml", "tests/containers.yml"]
    with DockerCompose(_ROOT, compose_file_name=files, services=["kafka", "registry", "postgres", "redis"]):
        yield Containers(ports)
