"""The registry: registering is idempotent, a stock client finds what is registered, and a process can tell a wrong URL from one that is away."""

from __future__ import annotations

import copy
import io
import json
import struct
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fastavro
import pytest
from confluent_kafka.schema_registry import Schema as RegistrySchema
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer

from infra import schema_registry
from infra.schema_registry import Finding, Writers, answers, check, load_codec, register
from infra.settings import SchemaRegistry, Settings
from schemas.codec import full_name, schema_of
from schemas.errors import BadConfiguration, Rejected, Unavailable
from schemas.messages import RECORDS
from tests.schemas.examples import example, fields_of


def at(url: str) -> Settings:
    return Settings(schema_registry=SchemaRegistry(url=url))


class Answers(BaseHTTPRequestHandler):
    """A server that answers `reply` to everything, and counts."""

    reply: tuple[int, str] = (200, "{}")
    asked: int = 0

    def _answer(self) -> None:
        type(self).asked += 1
        status, body = self.reply
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answers]]]:
    handler = type("Handler", (Answers,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", handler
        listening.shutdown()


@pytest.mark.unit
class TestWithoutOne:
    def test_the_files_alone_are_checked_against_what_was_published(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert check(None) == ()
        other = copy.deepcopy(dict(schema_of("ExpirePayment")))
        other["fields"] = [field for field in other["fields"] if field["name"] != "event_id"]
        monkeypatch.setattr(schema_registry, "published", lambda record: {1: other} if record == "ExpirePayment" else {})
        (finding,) = check(None)
        assert (finding.record, finding.kind) == ("ExpirePayment", "incompatible")
        assert "event_id" in finding.detail
        with pytest.raises(BadConfiguration, match="may not change like this:\n  ExpirePayment"):
            register(at("http://127.0.0.1:1"))

    @pytest.mark.parametrize("ask", [register, load_codec, check])
    def test_one_that_is_away(self, ask: Any) -> None:
        with pytest.raises(Unavailable, match="the schema registry is unavailable: ConnectError"):
            ask(at("http://127.0.0.1:1"))

    def test_whether_one_answers(self, server: tuple[str, type[Answers]]) -> None:
        url, handler = server
        handler.reply = (200, '{"compatibilityLevel": "BACKWARD"}')
        assert answers(at(url))
        handler.reply = (500, "out of order")
        assert not answers(at(url))
        assert not answers(at("http://127.0.0.1:1"))

    def test_what_is_no_url_is_not_repeated(self) -> None:
        with pytest.raises(BadConfiguration) as caught:
            load_codec(at("htp://user:s3cret@registry"))
        assert "s3cret" not in caught.value.detail

    @pytest.mark.parametrize(
        ("reply", "error", "why"),
        [
            ((404, "<html>nothing here</html>"), BadConfiguration, "not as Confluent's API does"),
            ((404, '{"title": "Not Found"}'), BadConfiguration, "not as Confluent's API does"),
            ((200, "hello"), BadConfiguration, "not in JSON"),
            ((401, '{"error_code": 40101, "message": "Unauthorized"}'), BadConfiguration, r"refuses: Unauthorized \(HTTP 401\)"),
            ((503, "busy"), Unavailable, "HTTP 503"),
            (
                (404, '{"error_code": 40401, "message": "no subject"}'),
                BadConfiguration,
                "does not have .*PaymentCompleted.*paystream schemas register",
            ),
        ],
    )
    def test_answers_that_are_none(self, server: tuple[str, type[Answers]], reply: tuple[int, str], error: type[Exception], why: str) -> None:
        url, handler = server
        handler.reply = reply
        with pytest.raises(error, match=why):
            load_codec(at(url))


@pytest.mark.unit
class TestWriters:
    def test_an_absent_id_is_asked_for_once(self, server: tuple[str, type[Answers]]) -> None:
        url, handler = server
        handler.reply = (404, '{"error_code": 40403, "message": "Schema 5 not found."}')
        writers = Writers(at(url), {1: schema_of("PaymentFailed")})
        assert [writers(1), writers(5), writers(5)] == [schema_of("PaymentFailed"), None, None]
        assert handler.asked == 1

    def test_what_is_remembered_as_absent_is_bounded(self, server: tuple[str, type[Answers]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(schema_registry, "MAX_ABSENT", 3)
        url, handler = server
        handler.reply = (404, '{"error_code": 40403, "message": "not found"}')
        writers = Writers(at(url), {})
        for schema_id in range(10):
            assert writers(schema_id) is None
            assert len(writers._absent) <= 3

    def test_one_that_did_not_answer_is_left_alone_for_a_while(self, server: tuple[str, type[Answers]]) -> None:
        url, handler = server
        handler.reply = (500, "out of order")
        writers = Writers(at(url), {})
        for _ in range(3):
            with pytest.raises(Unavailable):
                writers(5)
        assert handler.asked == 1

    def test_a_schema_that_is_not_avro_is_none(self, server: tuple[str, type[Answers]]) -> None:
        url, handler = server
        handler.reply = (200, '{"schema": "{}", "schemaType": "JSON"}')
        assert Writers(at(url), {})(5) is None


@pytest.mark.integration
class TestOnARegistry:
    @pytest.fixture
    def settings(self, database: Settings) -> Settings:
        register(database)
        return database

    @pytest.fixture
    def client(self, settings: Settings) -> Iterator[SchemaRegistryClient]:
        with SchemaRegistryClient({"url": settings.schema_registry.url}) as client:
            yield client

    def test_registering_twice_gives_the_same_ids(self, settings: Settings) -> None:
        first = register(settings)
        assert register(settings) == first
        assert set(first) == set(RECORDS)
        assert check(settings) == ()

    def test_a_stock_client_finds_every_schema_by_its_id(self, settings: Settings) -> None:
        for record, schema_id in register(settings).items():
            with urllib.request.urlopen(f"{settings.schema_registry.url}/schemas/ids/{schema_id}", timeout=10) as answer:
                assert json.loads(json.load(answer)["schema"]) == schema_of(record)

    def test_a_stock_deserializer_reads_our_bytes(self, settings: Settings, client: SchemaRegistryClient) -> None:
        deserialize = AvroDeserializer(client)
        codec = load_codec(settings)
        for record in RECORDS:
            assert deserialize(codec.encode(example(record)), None) == fields_of(record)

    def test_subjects_are_held_to_full_transitive(self, settings: Settings, client: SchemaRegistryClient) -> None:
        subject = full_name("OrderPlaced")
        assert client.get_compatibility(subject) == "FULL_TRANSITIVE"
        client.set_compatibility(subject_name=subject, level="NONE")
        assert check(settings) == (
            Finding("OrderPlaced", "level", "the registry holds its versions to NONE, not FULL_TRANSITIVE: `paystream schemas register`"),
        )
        register(settings)
        assert check(settings) == ()

    def test_the_registry_itself_refuses_what_breaks_readers(self, client: SchemaRegistryClient) -> None:
        broken = copy.deepcopy(dict(schema_of("PaymentCompleted")))
        broken["fields"].append({"name": "channel", "type": "string"})
        assert not client.test_compatibility(full_name("PaymentCompleted"), RegistrySchema(json.dumps(broken), "AVRO"))

    def test_the_loaded_codec_writes_what_is_registered_and_reads_it(self, settings: Settings) -> None:
        codec = load_codec(settings)
        for record, schema_id in register(settings).items():
            value = codec.encode(example(record))
            assert struct.unpack(">bI", value[:5]) == (0, schema_id)
            assert codec.decode(value) == example(record)

    def test_a_newer_writer_is_found_by_its_id(self, settings: Settings, client: SchemaRegistryClient) -> None:
        newer = copy.deepcopy(dict(schema_of("PaymentFailed")))
        newer["fields"].append({"name": "channel", "type": ["null", "string"], "default": None})
        elsewhere = f"{settings.prefix}PaymentFailed"  # a subject of this test's own: ours must not gain versions
        schema_id = client.register_schema(elsewhere, RegistrySchema(json.dumps(newer), "AVRO"))
        body = io.BytesIO()
        fastavro.schemaless_writer(body, fastavro.parse_schema(newer), {**fields_of("PaymentFailed"), "channel": "web"})
        assert load_codec(settings).decode(struct.pack(">bI", 0, schema_id) + body.getvalue()) == example("PaymentFailed")

    def test_an_id_that_nobody_registered_is_rejected(self, settings: Settings) -> None:
        with pytest.raises(Rejected, match="schema id 2000000000 is not in the registry"):
            load_codec(settings).decode(struct.pack(">bI", 0, 2_000_000_000) + b"body")
