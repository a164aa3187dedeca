"""The embedded infrastructure: what the other integration tests stand on."""

from __future__ import annotations

import psycopg
import pytest
import redis
from confluent_kafka.admin import AdminClient

from infra.settings import Settings

pytestmark = pytest.mark.integration


def test_an_installation_has_topics_a_migrated_database_and_an_empty_redis(installation: Settings) -> None:
    topics = AdminClient({"bootstrap.servers": installation.kafka.bootstrap_servers}).list_topics(timeout=10).topics
    assert f"{installation.prefix}payment-events" in topics
    with psycopg.connect(installation.database.url.get_secret_value()) as connection:
        assert connection.execute("SELECT count(*) FROM payments").fetchone() == (0,)
    with redis.Redis.from_url(installation.redis.url.get_secret_value()) as client:
        assert client.dbsize() == 0


def test_two_installations_share_nothing(installation: Settings, database: Settings) -> None:
    assert installation.prefix == database.prefix  # one test, one installation: `database` is the part of it without topics
