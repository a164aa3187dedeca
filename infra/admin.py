"""The admin port of processes that serve nothing else: workers and the relay.

`GET /metrics` for Prometheus, `/livez` (restart me if I am not), `/readyz` (`?verbose` says which part is not), `/version`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

import structlog
from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """`live` says what is stuck, None if nothing is. `ready` says of each part what is wrong with it, None if it is ready."""

    live: Callable[[], str | None]
    ready: Callable[[], Mapping[str, str | None]]


@asynccontextmanager
async def admin_server(host: str, port: int, service: str, probes: Probes) -> AsyncIterator[int]:
    """Serve the admin routes within the block. Yields the port, which is a free one if `port` is 0. Raises OSError if the port is taken."""

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(REGISTRY), headers={"Content-Type": content_type})

    async def livez(_: web.Request) -> web.Response:
        stuck = probes.live()
        return web.json_response({"status": "stuck" if stuck else "live", "detail": stuck}, status=503 if stuck else 200)

    async def readyz(request: web.Request) -> web.Response:
        checks = probes.ready()
        ready = not any(checks.values())
        body: dict[str, object] = {"status": "ready" if ready else "not ready"}
        if "verbose" in request.query:
            body["checks"] = {name: problem or "ok" for name, problem in checks.items()}
        return web.json_response(body, status=200 if ready else 503)

    async def about(_: web.Request) -> web.Response:
        return web.json_response({"service": service, "version": version("paystream")})

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz), web.get("/version", about)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound: int = runner.addresses[0][1]
        log.info("admin routes are up", url=f"http://{host}:{bound}")
        yield bound
    finally:
        await runner.cleanup()
