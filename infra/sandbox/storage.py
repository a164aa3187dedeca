"""What the sandbox knows, in one SQLite file that survives a kill -9.

Rule: the file is the only state; one connection, one thread. Whatever is written while the event loop goes round once is one transaction, committed
before the loop goes round again, and nobody answers a request before `committed()` returned. So a request's rows (intent, charge, events, saved
answer) are there together or not at all, and requests that run side by side share a commit.

WAL with synchronous=NORMAL: a commit is a write that the end of the process can't take back; a power cut may take the last moments.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import orjson

from infra.sandbox.cards import Decline, PaymentMethod
from infra.sandbox.intents import Charge, Intent, PaymentError, Status
from schemas.errors import BadConfiguration

_COLLECTION: Final = """
CREATE TABLE IF NOT EXISTS {table} (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, label TEXT, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS {table}_label ON {table} (label) WHERE label IS NOT NULL;
"""
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY, event TEXT NOT NULL, endpoint TEXT NOT NULL, subject TEXT NOT NULL,
    attempts INTEGER NOT NULL, first_due REAL NOT NULL, due REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL, status INTEGER NOT NULL, body BLOB NOT NULL, saved REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_saved ON answers (saved);
CREATE TABLE IF NOT EXISTS figures (name TEXT PRIMARY KEY, value REAL NOT NULL);
"""


class Document(Protocol):
    """What a collection holds: dated and named."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> int: ...


D = TypeVar("D", bound=Document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where webhooks go. `enabled_events` holds event types, or `*` for all."""

    id: str
    created: int
    url: str
    secret: str
    enabled_events: tuple[str, ...]
    description: str | None = None
    metadata: dict[str, str]

    def wants(self, event_type: str) -> bool:
        return "*" in self.enabled_events or event_type in self.enabled_events


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event as the bytes that go out, the same at each delivery."""

    id: str
    created: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event on its way to an endpoint. `subject` is the object that it tells of; times are the real clock's."""

    id: int
    event: str
    endpoint: str
    subject: str
    attempts: int
    first_due: float
    due: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAnswer:
    """What the first request with an idempotency key was answered."""

    fingerprint: bytes
    status: int
    body: bytes
    saved: float


class Collection(Generic[D]):
    """Documents of one kind: by id, in the order in which they were made, and by a label that is not unique."""

    def __init__(
        self,
        storage: Storage,
        table: str,
        load: Callable[[bytes], D],
        *,
        dump: Callable[[D], bytes] = orjson.dumps,
        label: Callable[[D], str | None] = lambda _: None,
    ) -> None:
        self._storage = storage
        self._load = load
        self._dump = dump
        self._label = label
        storage.create(_COLLECTION.format(table=table))
        self._get = f"SELECT body FROM {table} WHERE id = ?"  # noqa: S608 - table names are ours
        self._put = (
            f"INSERT INTO {table} (id, created, label, body) VALUES (?, ?, ?, ?) "  # noqa: S608
            "ON CONFLICT (id) DO UPDATE SET label = excluded.label, body = excluded.body"
        )
        self._delete = f"DELETE FROM {table} WHERE id = ?"  # noqa: S608
        self._all = f"SELECT body FROM {table} ORDER BY seq"  # noqa: S608
        self._labelled = f"SELECT body FROM {table} WHERE label = ? ORDER BY seq"  # noqa: S608
        self._page = (
            f"SELECT body FROM {table} WHERE created >= ? AND seq < ifnull((SELECT seq FROM {table} WHERE id = ?), 9e18) "  # noqa: S608
            "ORDER BY seq DESC LIMIT ?"
        )

    def get(self, identifier: str) -> D | None:
        row = self._storage.read(self._get, identifier).fetchone()
        return None if row is None else self._load(row[0])

    def put(self, document: D) -> None:
        self._storage.write(self._put, document.id, document.created, self._label(document), self._dump(document))

    def delete(self, identifier: str) -> None:
        self._storage.write(self._delete, identifier)

    def all(self) -> Iterator[D]:
        """Oldest first."""
        return (self._load(body) for (body,) in self._storage.read(self._all))

    def labelled(self, label: str) -> list[D]:
        """Oldest first."""
        return [self._load(body) for (body,) in self._storage.read(self._labelled, label)]

    def page(self, limit: int, *, after: str | None, created_from: int) -> list[D]:
        """Newest first, behind the document `after`."""
        return [self._load(body) for (body,) in self._storage.read(self._page, created_from, after, limit)]


class Storage:
    def __init__(self, directory: Path | None) -> None:
        """Open the file in this directory; None keeps everything in memory. Raises BadConfiguration where that can't be done."""
        self._connection = _open(directory)
        self._waiting: list[asyncio.Future[None]] = []
        self._dirty = False
        self.intents = Collection(self, "intents", _load_intent)
        self.charges = Collection(self, "charges", _load_charge, label=lambda charge: charge.metadata.get("order_id"))
        self.methods = Collection(self, "methods", lambda body: PaymentMethod(**orjson.loads(body)))
        self.endpoints = Collection(self, "endpoints", _load_endpoint, label=lambda endpoint: endpoint.url)
        self.events = Collection(self, "events", _load_event, dump=lambda event: event.body)

    def create(self, tables: str) -> None:
        self._connection.executescript(tables)

    def read(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement, parameters)

    def write(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._commit)
            self._connection.execute("BEGIN")
            self._dirty = True
        elif not self._connection.in_transaction:  # a full disk rolls back by itself: what comes after must not be written without what came before
            raise sqlite3.OperationalError("an earlier write failed, and took this transaction with it")
        return self._connection.execute(statement, parameters)

    async def committed(self) -> None:
        """Wait until all that was written so far is in the file. Raises sqlite3.Error if it can't be: then none of it is."""
        if self._dirty:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append(done)
            await done

    def _commit(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        waiting, self._waiting = self._waiting, []
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            for done in waiting:
                if not done.cancelled():
                    done.set_exception(error)
            if not waiting:
                raise
        else:
            for done in waiting:
                if not done.cancelled():
                    done.set_result(None)

    def close(self) -> None:
        self._commit()
        self._connection.close()

    def answer(self, key: str) -> SavedAnswer | None:
        row = self.read("SELECT fingerprint, status, body, saved FROM answers WHERE key = ?", key).fetchone()
        return None if row is None else SavedAnswer(fingerprint=row[0], status=row[1], body=row[2], saved=row[3])

    def save_answer(self, key: str, answer: SavedAnswer) -> None:
        self.write(
            "INSERT OR REPLACE INTO answers (key, fingerprint, status, body, saved) VALUES (?, ?, ?, ?, ?)",
            key,
            answer.fingerprint,
            answer.status,
            answer.body,
            answer.saved,
        )

    def forget_answers(self, saved_before: float) -> None:
        self.write("DELETE FROM answers WHERE saved < ?", saved_before)

    def add_delivery(self, event: str, endpoint: str, subject: str, due: float) -> Delivery:
        cursor = self.write(
            "INSERT INTO deliveries (event, endpoint, subject, attempts, first_due, due) VALUES (?, ?, ?, 0, ?, ?)",
            event,
            endpoint,
            subject,
            due,
            due,
        )
        identifier = cursor.lastrowid or 0
        return Delivery(id=identifier, event=event, endpoint=endpoint, subject=subject, attempts=0, first_due=due, due=due)

    def postpone_delivery(self, delivery: Delivery) -> None:
        self.write("UPDATE deliveries SET attempts = ?, due = ? WHERE id = ?", delivery.attempts, delivery.due, delivery.id)

    def delete_delivery(self, delivery: Delivery) -> None:
        self.write("DELETE FROM deliveries WHERE id = ?", delivery.id)

    def deliveries(self) -> list[Delivery]:
        """What is still to be delivered, in the order in which it came up."""
        columns = ("id", "event", "endpoint", "subject", "attempts", "first_due", "due")
        rows = self.read(f"SELECT {', '.join(columns)} FROM deliveries ORDER BY id")  # noqa: S608
        return [Delivery(**dict(zip(columns, row, strict=True))) for row in rows]

    def undelivered(self) -> int:
        return int(self.read("SELECT count(*) FROM deliveries").fetchone()[0])

    def figure(self, name: str) -> float:
        """A number that was remembered, or 0."""
        row = self.read("SELECT value FROM figures WHERE name = ?", name).fetchone()
        return 0.0 if row is None else float(row[0])

    def remember_figure(self, name: str, value: float) -> None:
        self.write("INSERT OR REPLACE INTO figures (name, value) VALUES (?, ?)", name, value)


def _open(directory: Path | None) -> sqlite3.Connection:
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(":memory:" if directory is None else directory / "sandbox.sqlite3", timeout=0, isolation_level=None)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # a second sandbox on this directory is refused instead of sharing its money
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.executescript(_TABLES)
    except (OSError, sqlite3.Error) as error:
        taken = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
        reason = "another sandbox uses it" if taken else str(error)
        raise BadConfiguration(f"--data: {directory} can't be used: {reason}") from error
    return connection


def _load_intent(body: bytes) -> Intent:
    raw = orjson.loads(body)
    raw["status"] = Status(raw["status"])
    raw["payment_method_types"] = tuple(raw["payment_method_types"])
    if (error := raw["last_payment_error"]) is not None:
        raw["last_payment_error"] = PaymentError(decline=Decline(**error["decline"]), method=PaymentMethod(**error["method"]), charge=error["charge"])
    return Intent(**raw)


def _load_charge(body: bytes) -> Charge:
    raw = orjson.loads(body)
    if raw["decline"] is not None:
        raw["decline"] = Decline(**raw["decline"])
    return Charge(**raw)


def _load_endpoint(body: bytes) -> Endpoint:
    raw = orjson.loads(body)
    return Endpoint(**{**raw, "enabled_events": tuple(raw["enabled_events"])})


def _load_event(body: bytes) -> Event:
    raw = orjson.loads(body)
    return Event(id=raw["id"], created=raw["created"], body=body)
