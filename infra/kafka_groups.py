"""How far consumer groups have read, as an operator may change it."""

from __future__ import annotations

from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from infra.kafka_admin import client_config
from infra.settings import Kafka
from schemas.errors import PaystreamError, Unavailable

_TIMEOUT_S: Final = 10.0


class GroupInUse(PaystreamError):
    """A consumer group has members: stop its workers first."""


def forget(kafka: Kafka, group_id: str) -> None:
    """Forget how far a group has read, so that it begins at the beginning again. Raises GroupInUse, or Unavailable when no broker answers."""
    admin = AdminClient(client_config(kafka) | {"log_level": 0})
    (deleted,) = admin.delete_consumer_groups([group_id], request_timeout=_TIMEOUT_S).values()
    try:
        deleted.result(_TIMEOUT_S * 2)
    except KafkaException as error:
        match error.args[0].code():
            case KafkaError.GROUP_ID_NOT_FOUND:
                return
            case KafkaError.NON_EMPTY_GROUP:
                raise GroupInUse(f"group {group_id} has members: stop its workers first") from error
        raise Unavailable("Kafka", error.args[0].str()) from error
