"""The admin routes of a worker."""

from __future__ import annotations

import pytest
from aiohttp import ClientSession

from infra.admin import Probes, admin_server

pytestmark = pytest.mark.unit


async def test_what_the_routes_answer() -> None:
    stuck: str | None = None
    checks: dict[str, str | None] = {"kafka": None, "gate": None}
    probes = Probes(live=lambda: stuck, ready=lambda: checks)
    async with admin_server("127.0.0.1", 0, "worker", probes) as port, ClientSession(f"http://127.0.0.1:{port}") as client:

        async def get(path: str) -> tuple[int, dict[str, object]]:
            async with client.get(path) as answer:
                return answer.status, await answer.json()

        assert await get("/livez") == (200, {"status": "live", "detail": None})
        assert await get("/readyz") == (200, {"status": "ready"})
        assert (await get("/version"))[1]["service"] == "worker"
        stuck, checks["gate"] = "5 messages to do", "Postgres"
        assert await get("/livez") == (503, {"status": "stuck", "detail": "5 messages to do"})
        assert await get("/readyz?verbose") == (503, {"status": "not ready", "checks": {"kafka": "ok", "gate": "Postgres"}})
        async with client.get("/metrics") as answer:
            assert "# TYPE" in await answer.text()
        async with client.get("/metrics", headers={"Accept": "application/openmetrics-text"}) as answer:
            assert (await answer.text()).endswith("# EOF\n")


async def test_a_taken_port_is_an_error() -> None:
    probes = Probes(live=lambda: None, ready=dict)
    async with admin_server("127.0.0.1", 0, "one", probes) as port:
        with pytest.raises(OSError, match="address"):
            async with admin_server("127.0.0.1", port, "two", probes):
                pass
