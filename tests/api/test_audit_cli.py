"""`paystream audit`: status 0 and figures in peace, status 1 and what is wrong otherwise."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

from infra.local import environment
from infra.schema_registry import load_codec, register
from infra.settings import Settings
from tests.outbox_writer import OutboxWriter, connected

pytestmark = pytest.mark.integration


async def test_the_audit_command(installation: Settings) -> None:
    register(installation)
    writer = OutboxWriter(load_codec(installation))
    async with await connected(installation) as conn:
        (event,) = await writer.append(conn, "o1")
        status, told, _ = await asyncio.to_thread(audit, installation, "--json")
        assert (status, json.loads(told)) == (
            0,
            {"ok": True, "records": 0, "entities": 0, "unmarked": 0, "faults": {}, "findings": []},
        )
        await conn.execute("DELETE FROM outbox")
        status, told, words = await asyncio.to_thread(audit, installation)
        assert (status, told) == (1, f"stranded  payment-events  {event.payment_id} version 1\n")
        assert "1 × stranded: an event that is not published and that the outbox will not publish\n" in words


def audit(settings: Settings, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "api.cli.main", "audit", *options]
    ended = subprocess.run(command, env={**os.environ, **environment.variables(settings)}, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout, ended.stderr
