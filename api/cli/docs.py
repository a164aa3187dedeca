"""`paystream docs`: writes into the pages what the code knows: diagrams of the machines; topics, settings, metrics, commands and problems.

Rule: a page marks a part with `<!-- name:begin -->` and `<!-- name:end -->`. What stands between is made from the data that the program runs on;
nothing else of the page is touched. Status 3 with `--check`: a page is stale.
Flow: README.md, docs/ -> markers -> PARTS[name]() -> the same page, refreshed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Annotated, Any, Final

import typer
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from pydantic import SecretStr, TypeAdapter
from pydantic.fields import FieldInfo

from api.cli.main import COMMANDS, EXIT_STATUSES, command_line
from api.errors import PROBLEMS, Kind
from infra.settings import every_setting
from processors.orders import machine as order_machine
from processors.payments import machine as payment_machine
from schemas.errors import BadConfiguration
from schemas.topics import as_markdown, topics

ROOT: Final = Path(__file__).parents[2]
STALE: Final = 3

_PART: Final = re.compile(r"<!-- ([a-z-]+):begin -->\n.*?<!-- \1:end -->", re.DOTALL)
_MARKER: Final = re.compile(r"<!-- [a-z-]+:(?:begin|end) -->")
_PACKAGES: Final = ("api", "producers", "processors", "infra", "schemas")
_WITHOUT_METRICS: Final = ("api.cli", "infra.local", "infra.database.migrations")


def docs(check: Annotated[bool, typer.Option("--check", help="Change nothing; status 3 if a page is stale.")] = False) -> None:
    """Refresh the generated parts of README.md and docs/. In a checkout only.

    Example: paystream docs --check
    """
    if not (ROOT / "docs").is_dir():
        raise BadConfiguration(f"{ROOT} is no checkout of Paystream: it has no docs")
    stale = False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (fresh := refreshed(text, page.name)) != text:
            stale = True
            typer.echo(page.relative_to(ROOT))
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if stale and check:
        typer.echo("stale: run `paystream docs`", err=True)
        raise typer.Exit(STALE)


def pages() -> list[Path]:
    """The pages that may hold generated parts."""
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def refreshed(text: str, page: str) -> str:
    """The page with its parts as they should be. Raises BadConfiguration for a marker without its partner, and for a part that nobody makes."""
    names = _PART.findall(text)
    if unknown := [name for name in names if name not in PARTS]:
        raise BadConfiguration(f"{page}: nothing is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if len(_MARKER.findall(text)) != 2 * len(names):
        raise BadConfiguration(f"{page}: a marker has no partner, or stands within another part")
    return _PART.sub(lambda part: f"<!-- {part[1]}:begin -->\n{PARTS[part[1]]().strip()}\n<!-- {part[1]}:end -->", text)


# ── State machines ──


def diagrams() -> str:
    """The three machines as Mermaid, from their tables."""
    payment = _steps(payment_machine.TRANSITIONS)
    order = _steps(order_machine.TRANSITIONS)
    attempt = [(status, next_, "") for status, nexts in payment_machine.ATTEMPT_TRANSITIONS.items() for next_ in sorted(nexts) if next_ is not status]
    return "\n\n".join(
        (
            "A payment, by its events:",
            _diagram(payment_machine.TRANSITIONS, payment),
            "An attempt to charge it, by what is known of it:",
            _diagram(payment_machine.ATTEMPT_TRANSITIONS, attempt),
            "An order, by the events of its payments:",
            _diagram(order_machine.TRANSITIONS, order),
        )
    )


Step = tuple[StrEnum, StrEnum, str]


def _steps(table: Mapping[Any, Mapping[type[Any], Any]]) -> list[Step]:
    """What leads from one status to another, all of it on one arrow."""
    labels: dict[tuple[StrEnum, StrEnum], list[str]] = {}
    for status, moves in table.items():
        for event, next_ in moves.items():
            labels.setdefault((status, next_), []).append(event.event_type)
    return [(status, next_, ", ".join(events)) for (status, next_), events in labels.items()]


def _diagram(statuses: Iterable[StrEnum], steps: Sequence[Step]) -> str:
    """The table's first status is where it begins; one that nothing leads away from is an end."""
    names = list(statuses)
    left = {status for status, next_, _ in steps if status is not next_}
    lines = [f"[*] --> {names[0]}"]
    lines += [f"{status} --> {next_}" + (f": {label}" if label else "") for status, next_, label in steps]
    lines += [f"{status} --> [*]" for status in names if status not in left]
    return "\n".join(("```mermaid", "stateDiagram-v2", *(f"    {line}" for line in lines), "```"))


# ── Metrics ──


def metrics() -> str:
    """Every metric that a module defines. Each process has those of the modules that it uses."""
    rows = {}
    for module in _modules():
        for source in vars(module).values():
            if not _is_source(source, module):
                continue
            for family in source.describe():
                labels = getattr(family, "_labelnames", getattr(source, "_labelnames", ()))  # the library keeps them to itself
                name = family.name + ("_total" if family.type == "counter" else "")
                rows[name] = (f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation)
    return _table(("metric", "type", "labels", "what it says"), [rows[name] for name in sorted(rows)])


def _modules() -> Iterator[ModuleType]:
    for package in _PACKAGES:
        for found in walk_packages(import_module(package).__path__, f"{package}."):
            if not found.name.startswith(_WITHOUT_METRICS):
                yield import_module(found.name)


def _is_source(value: object, module: ModuleType) -> bool:
    """A metric, or a class that makes metrics when it is asked."""
    if isinstance(value, type):
        return Collector in value.__mro__ and value.__module__ == module.__name__
    return isinstance(value, MetricWrapperBase)


# ── Settings ──


def settings() -> str:
    rows = [(f"`{variable}`", _type_of(field), _default_of(field), field.description or "") for variable, field in every_setting()]
    return _table(("variable", "type", "default", "meaning"), rows)


def _type_of(field: FieldInfo) -> str:
    typed: Any = Annotated[field.annotation, field]
    return _words(TypeAdapter(typed).json_schema())


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON schema, in words."""
    match schema:
        case {"enum": choices}:
            return ", ".join(f"`{choice}`" for choice in choices)
        case {"anyOf": [some, {"type": "null"}]}:
            return _words(some)
        case {"type": "array", "items": {"enum": _} as choices}:
            return f"JSON list of {_words(choices)}"
        case {"type": "array", "items": items}:
            return f"JSON list of {_words(items)}s"
        case {"format": "password"}:
            return "secret"
        case {"format": "path"}:
            return "file"
        case {"pattern": pattern}:
            return f"text like `{pattern}`"
        case {"type": "string"}:
            return "text"
        case {"type": kind}:
            words = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}"}
            bounds = " ".join(word.format(schema[bound]) for bound, word in words.items() if bound in schema)
            return f"{kind} {bounds}".strip()
        case _:
            raise TypeError(f"no words for {schema}")


def _default_of(field: FieldInfo) -> str:
    default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    written = json.dumps(default) if isinstance(default, tuple) else default  # as the environment takes a list
    return f"`{written}`" if default not in (None, "", ()) else ""


# ── The command line ──


def commands() -> str:
    """Each command as its own `--help` has it."""
    sections = []
    for entry in COMMANDS:
        command = typer.main.get_command(command_line(entry.name)).commands[entry.name]  # type: ignore[attr-defined]  # it is a group
        for name, one in getattr(command, "commands", {"": command}).items():
            sections.append(_command(f"paystream {entry.name} {name}".strip(), one))
    return "\n\n".join(sections)


def _command(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    options = [f"- `{name}` {about}".strip() for name, about in (parameter.get_help_record(context) for parameter in command.params)]
    return "\n\n".join(filter(None, (f"### `{path}`", command.help, "\n".join(options))))


def exit_statuses() -> str:
    return _table(("status", "meaning"), [(str(status), meaning) for status, meaning in EXIT_STATUSES.items()])


# ── Problems ──


def problems() -> str:
    """Each kind of problem under a heading that is its name, so that `type` and a link to this page end alike."""
    return "\n\n".join(f"### {name}\n\n{kind.status}{_again(kind)}. {kind.title}. {kind.advice}" for name, kind in PROBLEMS.items())


def _again(kind: Kind) -> str:
    after = f" (`Retry-After: {kind.retry_after_s}`)" if kind.retry_after_s is not None else ""
    return f", retryable{after}" if kind.retryable else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "diagrams": diagrams,
    "topics": lambda: as_markdown(topics()),
    "metrics": metrics,
    "settings": settings,
    "commands": commands,
    "exit-statuses": exit_statuses,
    "problems": problems,
}
