"""What operators and probes ask this process: is it alive, can it work, what is it, and how much does it do. Open to everybody, so nothing secret."""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Final

from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from api.answers import document
from api.deps import Given, TheDoctor
from api.errors import PROBLEM_PATH, PROBLEMS, Problem
from api.health import Health
from schemas import topics

router = APIRouter(tags=["service"])
_PARTS: Final = {"postgres": "ok", "kafka": "ok", "registry": "ok", "redis": "down"}


@router.get("/livez", response_model=None, responses={200: {"description": "The process answers"}})
async def livez() -> Response:
    """Whether the process makes progress, whatever becomes of the outside."""
    return document({"status": "alive"})


@router.get(
    "/readyz",
    response_model=None,
    responses={
        200: {"description": "It can take payments", "content": {"application/json": {"example": {"status": "ready"}}}},
        503: {"description": "It can't", "content": {"application/json": {"example": {"status": "not ready"}}}},
    },
)
async def readyz(doctor: TheDoctor, verbose: Annotated[str | None, Query(description="also say which part is down")] = None) -> Response:
    """Whether payments can be taken now. Redis is not needed for that."""
    health = await doctor.look()
    return _told(health, verbose=verbose is not None)


@router.get(
    "/health",
    response_model=None,
    responses={
        200: {"description": "It can take payments", "content": {"application/json": {"example": {"status": "degraded", "parts": _PARTS}}}},
        503: {"description": "It can't", "content": {"application/json": {"example": {"status": "not ready", "parts": _PARTS}}}},
    },
)
async def health(doctor: TheDoctor) -> Response:
    """How it stands, part by part."""
    return _told(await doctor.look(), verbose=True)


def _told(health: Health, *, verbose: bool) -> Response:
    parts = {"parts": {name: "ok" if ok else "down" for name, ok in health.parts.items()}} if verbose else {}
    return document({"status": health.status, **parts}, 200 if health.ready else 503)


@router.get("/version", response_model=None, responses={200: {"description": "What this process was built from"}})
async def version(given: Given) -> Response:
    """The release, the commit where it is known, and the hash of the topics file, which every process of an installation should share."""
    return document({"version": metadata.version("paystream"), "commit": given.settings.commit or _commit(), "topics_sha256": _topics_sha256()})


@router.get("/metrics", response_model=None, responses={200: {"description": "Prometheus metrics", "content": {"text/plain": {}}}})
async def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get(PROBLEM_PATH + "{kind}", response_model=None, responses={200: {"description": "What a problem's `type` means, and what to do about it"}})
async def problem(kind: str) -> Response:
    """What a problem document's `type` leads to."""
    known = PROBLEMS.get(kind)
    if known is None:
        raise Problem("not_found")
    return document({"code": kind, **asdict(known)})


@cache
def _topics_sha256() -> str:
    return hashlib.sha256((resources.files(topics.__package__) / topics.FILE).read_bytes()).hexdigest()


@cache
def _commit() -> str | None:
    """The commit of the working copy that this process runs from, if it does."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    return None
