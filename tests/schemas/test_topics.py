"""The topics as data: what `kafka-topics.yaml` says, what it may say, and the page that is printed from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from schemas.errors import BadConfiguration
from schemas.messages import RECORDS, Command, Event, OrderEvent, PaymentEvent, leaves
from schemas.topics import FILE, as_markdown, destinations, parse, topics

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_every_topic_has_a_writer_a_reader_a_retention_and_who_may_use_it() -> None:
    for topic in topics().topics:
        assert topic.writers, topic.name
        assert topic.readers, topic.name
        assert topic.acl.read, topic.name
        assert topic.acl.write, topic.name
        assert topic.retention_days, topic.name


def test_only_what_nobody_writes_yet_is_planned() -> None:
    assert {topic.name for topic in topics().topics if topic.planned} == {"payment-refunded"}


def test_every_record_has_a_topic() -> None:
    for record in RECORDS:
        assert destinations(record), record


def test_payment_events_are_on_payment_events_first() -> None:
    for record in leaves(PaymentEvent):
        assert destinations(record)[0] == "payment-events"
    assert destinations("PaymentCompleted") == ("payment-events", "payment-completed")
    assert destinations("PaymentAuthorized") == ("payment-events",)


def test_other_records_are_on_one_topic() -> None:
    assert {destinations(record) for record in leaves(OrderEvent)} == {("order-events",)}
    assert {destinations(record) for record in leaves(Command)} == {("payment-commands",)}
    assert destinations("WebhookReceived") == ("payment-webhook-received",)
    assert destinations("OutboxPosition") == ("outbox-positions",)


def test_a_record_that_no_topic_lists_is_a_bug() -> None:
    with pytest.raises(KeyError, match="CartEmptied"):
        destinations("CartEmptied")


def test_partitions_replication_and_retention_are_the_designs() -> None:
    file = topics()
    development, production = file.profile("development"), file.profile("production")
    by_name = {topic.name: topic for topic in file.topics}
    single = {"payment-events-dlq", "outbox-positions"}
    for name, topic in by_name.items():
        assert (file.partitions_of(topic, development), file.partitions_of(topic, production)) == ((1, 1) if name in single else (3, 24))
    assert (production.replication, production.min_insync_replicas) == (3, 2)
    assert {name for name, topic in by_name.items() if topic.retention_days == "forever"} == {"payment-events", "outbox-positions"}
    assert {topic.retention_days for topic in file.topics} == {"forever", 14}
    assert [name for name, topic in by_name.items() if topic.cleanup == "compact"] == ["outbox-positions"]
    sources = {file.max_message_bytes_of(topic) for topic in file.topics if not topic.copies}
    assert file.max_message_bytes_of(by_name["payment-events-dlq"]) == max(sources) + 64 * 1024


def test_there_is_no_such_profile() -> None:
    with pytest.raises(BadConfiguration, match=r"no profile 'staging'; it has development, production"):
        topics().profile("staging")


BLOCK = {
    "name": "t",
    "about": "x",
    "key": "order_id",
    "records": ["PaymentFailed"],
    "writers": ["a"],
    "readers": ["b"],
    "acl": {"read": ["c"], "write": ["d"]},
    "retention_days": 1,
}


def _file(*blocks: object, **top: object) -> str:
    profile = {"partitions": 1, "replication": 1, "min_insync_replicas": 1}
    return yaml.safe_dump({"profiles": {"development": profile}, "max_message_bytes": 2048, "topics": list(blocks), **top})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("topics: [", "is no YAML"),
        ("[]", "kafka-topics.yaml: Input should be a valid dictionary"),
        (_file({**BLOCK, "name": "Payment Events"}), "topics.0.name: String should match"),
        (_file({**BLOCK, "retention_days": 0}), "topics.0.retention_days"),
        (_file({**BLOCK, "retention_days": "a while"}), "'forever'"),
        (_file({**BLOCK, "readers": []}), "topics.0.readers"),
        (_file({key: value for key, value in BLOCK.items() if key != "acl"}), "topics.0.acl: Field required"),
        (_file({**BLOCK, "retention": 3}), "topics.0.retention: Extra inputs are not permitted"),
        (_file({**BLOCK, "records": ["CartEmptied"]}), "t lists CartEmptied, which schemas/messages.py does not have"),
        (_file({**BLOCK, "records": []}), "has to list its records, or say `copies: true`"),
        (_file({**BLOCK, "copies": True}), "has to list its records, or say `copies: true`"),
        (_file(BLOCK, BLOCK), "t stands there twice"),
        (_file(BLOCK, {**BLOCK, "name": "dlq", "records": [], "copies": True}), "dlq has to take 2048 bytes, as its sources do, and 65536"),
        (_file(BLOCK, profiles={"p": {"partitions": 1, "replication": 1, "min_insync_replicas": 2}}), "nobody could write"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(BadConfiguration) as caught:
        parse(text)
    assert why in caught.value.detail


def test_a_planned_topic_may_list_records_to_come() -> None:
    (topic,) = parse(_file({**BLOCK, "records": ["CartEmptied"], "planned": True})).topics
    assert topic.planned


def test_the_packaged_file_is_the_one_at_the_root() -> None:
    assert FILE.resolve() == ROOT / "kafka-topics.yaml"


def test_the_file_is_found_from_any_folder(tmp_path: Path) -> None:
    program = "from schemas.topics import destinations; print(destinations('PaymentFailed')[0])"
    told = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert told.stdout == b"payment-events\n"


def test_the_page_is_fresh() -> None:
    page = (ROOT / "docs" / "topics.md").read_text(encoding="utf-8")
    assert as_markdown(topics()) in page, "stale: run `paystream docs`"


def test_the_guide_for_consumers_explains_every_event() -> None:
    guide = (ROOT / "docs" / "consuming.md").read_text(encoding="utf-8")
    for cls in leaves(Event).values():
        assert f"| `{cls.event_type}` |" in guide
