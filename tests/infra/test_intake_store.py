"""What the intake's one statement promises: one key is one command, one order has one owner, and only so many commands wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from infra.database.intake import IntakeStore, NewCommand, OrderNotTheirs, TooManyUndecided
from infra.database.pool import Pool, connection, opened_pool
from infra.settings import Database, Settings
from schemas.errors import Unavailable
from tests.conftest import free_port

pytestmark = pytest.mark.integration
LIMIT = 3


@pytest.fixture
async def pool(database: Settings) -> AsyncIterator[Pool]:
    async with opened_pool(database.database, "test") as opened:
        yield opened


@pytest.fixture
def store(pool: Pool) -> IntakeStore:
    return IntakeStore(pool, max_undecided=LIMIT)


def command(order_id: str = "order-1", principal: str = "u1", answered: int | None = 202) -> NewCommand:
    command_id = uuid4()
    return NewCommand(
        command_id=command_id,
        principal=principal,
        route="POST /x",
        fingerprint="f",
        order_id=order_id,
        payment_id=command_id,
        command_type="InitiatePayment",
        value=b"\x00bytes",
        accepted_at=datetime(2026, 1, 1, tzinfo=UTC),
        answered_status=answered,
    )


async def decide(pool: Pool, command_id: UUID, outcome: str = "applied") -> None:
    async with connection(pool) as conn:
        await conn.execute("UPDATE commands SET decided_at = now(), outcome = %s WHERE command_id = %s", (outcome, command_id))


async def test_a_command_is_new_once_and_known_for_ever(store: IntakeStore, pool: Pool) -> None:
    first = command()
    assert (await store.accept(first)).repeat is None
    known = (await store.accept(replace(first, value=b"other bytes", fingerprint="g"))).repeat
    assert known is not None
    assert (known.value, known.fingerprint, known.decided, known.settled, known.answered_status) == (b"\x00bytes", "f", False, False, 202)
    await decide(pool, first.command_id)
    again = await store.find(first.command_id)
    assert again is not None
    assert again.decided


async def test_what_was_never_accepted_is_not_found(store: IntakeStore) -> None:
    assert await store.find(uuid4()) is None
    assert await store.target(uuid4()) is None


async def test_of_many_at_once_one_is_new(store: IntakeStore) -> None:
    one = command()
    accepted = await asyncio.gather(*(store.accept(one) for _ in range(20)))
    assert sum(each.repeat is None for each in accepted) == 1


async def test_the_first_principal_owns_an_order(store: IntakeStore, pool: Pool) -> None:
    await store.accept(command())
    with pytest.raises(OrderNotTheirs):
        await store.accept(command(principal="u2"))
    await store.accept(command(order_id="order-2", principal="u2"))
    async with connection(pool) as conn:
        owners = await (await conn.execute("SELECT order_id, user_id FROM order_owners ORDER BY order_id")).fetchall()
        assert owners == [("order-1", "u1"), ("order-2", "u2")]
        assert await (await conn.execute("SELECT count(*) FROM commands")).fetchone() == (2,)


async def test_of_two_principals_at_once_one_owns_the_order(store: IntakeStore) -> None:
    users = [f"u{number}" for number in range(10)]
    outcomes = await asyncio.gather(*(store.accept(command(principal=user)) for user in users), return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, OrderNotTheirs) for outcome in outcomes) == 9


async def test_a_known_key_claims_no_other_order(store: IntakeStore) -> None:
    first = command()
    await store.accept(first)
    assert (await store.accept(replace(first, order_id="order-2"))).repeat is not None
    await store.accept(command(order_id="order-2", principal="u2"))


async def test_only_so_many_commands_of_an_order_wait(store: IntakeStore, pool: Pool) -> None:
    waiting = [command() for _ in range(LIMIT)]
    for each in waiting:
        await store.accept(each)
    with pytest.raises(TooManyUndecided):
        await store.accept(command())
    assert (await store.accept(waiting[0])).repeat is not None, "a repeat is not one more"
    await store.accept(command(order_id="order-2"))
    await decide(pool, waiting[0].command_id, "refused")
    await store.accept(command())


async def test_a_burst_passes_the_limit_by_the_connections_at_most(store: IntakeStore, pool: Pool) -> None:
    await asyncio.gather(*(store.accept(command()) for _ in range(100)), return_exceptions=True)
    async with connection(pool) as conn:
        row = await (await conn.execute("SELECT count(*) FROM commands")).fetchone()
    assert row is not None
    assert LIMIT <= row[0] <= LIMIT + pool.max_size


async def test_the_first_answer_s_status_is_kept(store: IntakeStore) -> None:
    waits = command(answered=None)
    await store.accept(waits)
    await store.answered(waits.command_id, 200)
    await store.answered(waits.command_id, 202)
    known = await store.find(waits.command_id)
    assert known is not None
    assert known.answered_status == 200


async def test_postgres_away_is_unavailable() -> None:
    nowhere = Database(url=SecretStr(f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"))
    async with opened_pool(nowhere, "test") as pool:
        pool.timeout = 0.1
        store = IntakeStore(pool, max_undecided=LIMIT)
        with pytest.raises(Unavailable):
            await store.accept(command())
        assert not await store.answers()


async def test_postgres_there_answers(store: IntakeStore) -> None:
    assert await store.answers()
