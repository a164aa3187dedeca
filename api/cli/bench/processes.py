"""CPU and memory of a stack's processes, as the kernel counts them.

Rule: a service is its process and that one's children (Postgres has one for each connection), and those that have ended. Memory that several of them
share counts once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import psutil

from infra.local.process import StackError
from infra.local.stack import Stack

LOAD: Final = "load"
"""This process: the requests, and the reader of their outcomes."""
APART: Final = ("sandbox", LOAD)
"""What nobody runs who uses Paystream."""


class Processes:
    """The processes of a stack as they are now, and the load. Raises StackError if one is down."""

    def __init__(self, stack: Stack) -> None:
        standings = stack.status()
        if down := [standing.name for standing in standings if standing.pid is None]:
            raise StackError(f"{', '.join(down)} is down: paystream up brings it back")
        self._processes = {standing.name: psutil.Process(standing.pid) for standing in standings} | {LOAD: psutil.Process()}

    def cpu_s(self) -> dict[str, float]:
        """The CPU seconds that each has used since its start. Raises StackError if one has ended."""
        return {name: sum(self._of_each(name, _cpu_s)) for name in self._processes}

    def memory_mb(self) -> dict[str, float]:
        """The memory that each has in RAM now, in MB of a million bytes. Raises StackError if one has ended."""
        taken = {}
        for name in self._processes:
            infos = self._of_each(name, psutil.Process.memory_info)
            taken[name] = (sum(info.rss - info.shared for info in infos) + max(info.shared for info in infos)) / 1e6
        return taken

    def _of_each(self, name: str, read: Callable[[psutil.Process], Any]) -> list[Any]:
        """A figure of a service's process and of each of its children."""
        parent, figures = self._processes[name], []
        try:
            figures.append(read(parent))
            children = parent.children(recursive=True) if parent.pid != os.getpid() else []
        except psutil.NoSuchProcess as error:
            raise StackError(f"{name} has ended while it was measured: its log says why") from error
        for child in children:
            try:
                figures.append(read(child))
            except psutil.NoSuchProcess:
                continue
        return figures


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)
