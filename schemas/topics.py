"""The topics, read from `kafka-topics.yaml`: what exists, who uses it, and which topics a record is written to.

Rule: a topic's name, its configuration and its records stand in that file and nowhere else. Names here are without the installation's prefix.
Flow: `destinations(record)` tells whoever writes an outbox row where it goes; `infra/kafka_admin.py` makes the brokers match the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import BadConfiguration
from schemas.messages import RECORDS

FILE: Final = Path(__file__).parent / "kafka-topics.yaml"
"""The same file as the one at the root of the checkout: a link there, a copy in an installed package."""
DLQ_HEADROOM_BYTES: Final = 64 * 1024
"""What the headers `paystream-dlq-*` may add to a message: the largest message of any topic must fit on the DLQ."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,199}$")]
Who = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Profile(_Block):
    """How large an installation is."""

    partitions: int = Field(ge=1)
    replication: int = Field(ge=1)
    min_insync_replicas: int = Field(ge=1)

    @model_validator(mode="after")
    def _can_be_written(self) -> Profile:
        if self.min_insync_replicas > self.replication:
            raise ValueError(f"min_insync_replicas {self.min_insync_replicas} is above replication {self.replication}: nobody could write")
        return self


class Acl(_Block):
    """Names of Kafka principals; `*` is everybody who is logged in."""

    read: Who
    write: Who


class Topic(_Block):
    """One block of the file; see the comment at its top."""

    name: Name
    about: str = Field(min_length=1)
    key: str = Field(min_length=1)
    records: tuple[str, ...] = ()
    copies: bool = False
    writers: Who
    readers: Who
    acl: Acl
    retention_days: Annotated[int, Field(ge=1)] | Literal["forever"]
    cleanup: Literal["delete", "compact"] = "delete"
    partitions: int | None = Field(None, ge=1)
    max_message_bytes: int | None = Field(None, ge=1024)
    planned: bool = False

    @model_validator(mode="after")
    def _carries_something_known(self) -> Topic:
        if self.copies == bool(self.records):
            raise ValueError(f"{self.name} has to list its records, or say `copies: true`, and not both")
        unknown = [record for record in self.records if record not in RECORDS]
        if unknown and not self.planned:
            raise ValueError(f"{self.name} lists {', '.join(unknown)}, which schemas/messages.py does not have; only a planned topic may")
        return self


class Topics(_Block):
    """The whole file."""

    profiles: Mapping[str, Profile]
    max_message_bytes: int = Field(ge=1024)
    topics: tuple[Topic, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Topics:
        twice = [name for name, times in Counter(topic.name for topic in self.topics).items() if times > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there twice")
        sources = max(self.max_message_bytes_of(topic) for topic in self.topics if not topic.copies)
        for topic in self.topics:
            if topic.copies and self.max_message_bytes_of(topic) < sources + DLQ_HEADROOM_BYTES:
                raise ValueError(f"{topic.name} has to take {sources} bytes, as its sources do, and {DLQ_HEADROOM_BYTES} for headers")
        return self

    def profile(self, name: str) -> Profile:
        """Raises BadConfiguration for a profile that the file does not have."""
        if name not in self.profiles:
            raise BadConfiguration(f"{FILE.name} has no profile {name!r}; it has {', '.join(self.profiles)}")
        return self.profiles[name]

    def max_message_bytes_of(self, topic: Topic) -> int:
        return topic.max_message_bytes or self.max_message_bytes

    def partitions_of(self, topic: Topic, profile: Profile) -> int:
        return topic.partitions or profile.partitions


@cache
def topics() -> Topics:
    """The topics of this deployment. A copy of the file is part of the package, so that it is found wherever a process runs.

    Raises BadConfiguration that lists all that is wrong.
    """
    return parse(FILE.read_text(encoding="utf-8"))


def parse(text: str) -> Topics:
    """Raises BadConfiguration that lists all that is wrong, by its place in the file."""
    try:
        return Topics.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise BadConfiguration(f"{FILE.name} is no YAML: {error}") from None
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, fault['loc'])) or FILE.name}: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()]
        raise BadConfiguration(f"{FILE.name} is wrong:\n" + "\n".join(lines)) from None


@cache
def destinations(record: str) -> tuple[str, ...]:
    """The topics that a record is written to: `PaymentCompleted` -> `("payment-events", "payment-completed")`.

    Order holds on the first one. Raises KeyError for a record that no topic lists.
    """
    found = tuple(topic.name for topic in topics().topics if record in topic.records)
    if not found:
        raise KeyError(f"no topic of {FILE.name} lists the record {record!r}")
    return found


def as_markdown(file: Topics) -> str:
    """The tables of `docs/topics.md`: every topic with its use, and where each record goes."""
    development, production = file.profile("development"), file.profile("production")
    lines = [
        "| topic | what is on it | key | partitions (development, production) | kept | written by | read by | who may read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for topic in file.topics:
        partitions = f"{file.partitions_of(topic, development)}, {file.partitions_of(topic, production)}"
        kept = "for ever" if topic.retention_days == "forever" else f"{topic.retention_days} days"
        kept += ", compacted" if topic.cleanup == "compact" else ""
        cells = [f"`{topic.name}`", topic.about + (" *Planned: nobody writes it yet.*" if topic.planned else ""), topic.key, partitions, kept]
        cells += [", ".join(topic.writers), ", ".join(topic.readers), ", ".join("everybody" if name == "*" else name for name in topic.acl.read)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Which topics a record is on",
        "",
        "Order holds within the first one, not across topics.",
        "",
        "| `event_type` (header `ce_type`) | record | topics |",
        "|---|---|---|",
    ]
    for record, cls in RECORDS.items():
        lines.append(f"| `{cls.event_type}` | `{record}` | {', '.join(f'`{name}`' for name in destinations(record))} |")
    return "\n".join(lines) + "\n"
