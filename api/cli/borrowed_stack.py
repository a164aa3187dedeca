"""A stack for a command that needs one for a while: the demo and the benchmark.

Rule: a stack that runs already is used and left as it is. One that is started here is stopped at the end, unless somebody sits at a terminal and will
want to look around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from infra.local.environment import real_gateway
from infra.local.process import StackError
from infra.local.stack import Stack
from infra.settings import PREFIX


@contextmanager
def borrowed_stack(folder: Path | None, console: Console, *, keep: bool) -> Iterator[Stack]:
    """The stack of `folder`, running, within the block. `keep`: leave it running afterwards, and say how it is stopped."""
    if real_gateway():
        raise StackError(f"this pays hundreds of times, at the sandbox only: unset {PREFIX}STRIPE__API_KEY and {PREFIX}STRIPE__API_KEY_FILE")
    stack = Stack(folder)
    if stack.running:
        stack.start(progress=_told(console))
        yield stack
        return
    try:
        stack.start(leash=not keep, progress=_told(console))
        yield stack
    except BaseException:
        if not keep:
            stack.stop()
        raise
    if keep:
        api = stack.addresses()["api"]
        console.print(f"The stack is still running, its API at {api}/docs. [bold]make down[/] stops it, [bold]paystream status[/] shows it.")
    else:
        console.print("stopping the stack that was started for this")
        stack.stop()


def _told(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, style="dim", highlight=False, markup=False)
