"""What is told of a run: the figures by their names, and which of them have a goal.

Rule: a figure is a number, or numbers by process; its unit is the end of its name. Whether a goal is reached is told, and decides nothing.
Flow: Measured -> report -> bench.json; goals -> the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from api.cli.bench.phases import Measured, Plan, Sustained
from api.cli.bench.processes import APART

Report = dict[str, Any]

_SECONDS: Final = 3
"""A backlog is the median of so many seconds: from one to the next it moves by a few payments."""
_SAME: Final = 1.05
_FLAT_MB: Final = 20.0
"""What a process may have more at the end of the sustained load than once it had filled the pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure, as it should be and as it is."""

    figure: str
    wanted: str
    is_: str
    reached: bool


def report(measured: Measured, plan: Plan) -> Report:
    """The figures of one run. Processes that nobody runs who uses Paystream are `apart`."""
    sustained = measured.sustained
    cpu = {name: round(ms, 2) for name, ms in sustained.cpu_ms.items()}
    peak = {name: round(max(sample[name] for sample in sustained.memory_mb), 1) for name in cpu}
    ours = [name for name in cpu if name not in APART]
    return {
        "plan": {
            "intake_rps": plan.intake_rate,
            "overhead_rps": plan.overhead_rate,
            "sustained_rps": plan.sustained_rate,
            "gateway_latency_s": plan.latency_s,
            "sustained_s": plan.seconds,
        },
        "intake_p50_ms": _ms(measured.intake, 0.5),
        "intake_p99_ms": _ms(measured.intake, 0.99),
        "intake_max_rps": round(measured.flat_out_per_s, 1),
        "payments_per_s": round(sustained.completed_per_s, 1),
        "backlog_once_filled": round(median(sustained.backlog[int(plan.settled_s) :][:_SECONDS])),
        "backlog_at_end": round(median(sustained.backlog[-_SECONDS:])),
        "overhead_p50_ms": _ms(measured.overhead, 0.5),
        "overhead_p99_ms": _ms(measured.overhead, 0.99),
        "cpu_ms_per_payment": {"total": round(sum(cpu[name] for name in ours), 2), **{name: cpu[name] for name in ours}},
        "peak_rss_mb": {name: peak[name] for name in ours},
        "rss_growth_mb": {name: mb for name, mb in _growth_mb(sustained, plan).items() if name in ours},
        "apart": {name: {"cpu_ms_per_payment": cpu[name], "peak_rss_mb": peak[name]} for name in APART},
        "serial_agent_payments_per_s": round(measured.serial_per_s, 2),
    }


def goals(figures: Report) -> list[Goal]:
    """What is to be reached on two cores, with three partitions and one worker for each group."""
    grown = max(figures["rss_growth_mb"], key=figures["rss_growth_mb"].get)
    growth = figures["rss_growth_mb"][grown]
    once, end = figures["backlog_once_filled"], figures["backlog_at_end"]
    rate = figures["plan"]["sustained_rps"]
    return [
        _at_most(figures, "intake_p50_ms", 13, "ms"),
        _at_most(figures, "overhead_p99_ms", 500, "ms"),
        Goal(
            figure="backlog_at_end",
            wanted=f"at {rate:.0f} payments a second no larger than once filled: {once}, and 5 % of it for noise",
            is_=f"{end}",
            reached=end <= once * _SAME,
        ),
        Goal(
            figure="rss_growth_mb",
            wanted=f"flat: each process within {_FLAT_MB:.0f} MB",
            is_=f"{growth:+.1f} MB ({grown})",
            reached=growth <= _FLAT_MB,
        ),
    ]


def _growth_mb(sustained: Sustained, plan: Plan) -> dict[str, float]:
    samples = sustained.memory_mb
    filled = samples[min(int(plan.settled_s), len(samples) - 1)]
    return {name: round(samples[-1][name] - filled[name], 1) for name in filled}


def _at_most(figures: Report, name: str, limit: float, unit: str) -> Goal:
    return Goal(figure=name, wanted=f"at most {limit:.0f} {unit}", is_=f"{figures[name]:.1f} {unit}", reached=figures[name] <= limit)


def _ms(latencies: list[float], share: float) -> float:
    return round(1000 * latencies[int(share * (len(latencies) - 1))], 1)
