"""The figures of the overview, as its page and the API give them."""

from __future__ import annotations

from typing import Any, NamedTuple

from ledger import UsageError
from ledger_dashboard.query import BEGINNING, now
from ledger_dashboard.render import short_names
from ledger_dashboard.source import Opened
from ledger_ops.rollup import Series, WorkflowRow
from ledger_ops.values import Gap, Sums, iso

_MINUTE, _DAY = 60_000_000, 86_400_000_000
_POINTS = 120
#: what a young ledger shows at least
_SHORTEST = 30 * _MINUTE
#: the longest range that can be asked for, so that no URL asks for millions of points
_MOST_MICROS = 36_525 * _DAY


class ToolFigures(NamedTuple):
    """One tool: what its calls add up to. Durations in microseconds, None while unknown."""

    tool: str
    name: str
    sums: Sums
    failures: int
    p50: int | None
    p95: int | None

    @property
    def failure_rate(self) -> float:
        """Failed runs as a share of those that ended."""
        return share(self.failures, self.sums.executed + self.failures)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values; durations in seconds."""
        return {
            "tool": self.tool,
            "name": self.name,
            **self.sums.to_dict(),
            "failed_runs": self.failures,
            "failure_rate": round(self.failure_rate, 4),
            "p50_seconds": None if self.p50 is None else self.p50 / 1e6,
            "p95_seconds": None if self.p95 is None else self.p95 / 1e6,
        }


class Overview(NamedTuple):
    """All that the overview shows."""

    total: Sums
    tools: list[ToolFigures]
    workflows: list[WorkflowRow]
    series: Series
    since: int
    until: int
    #: whether the figures over time are complete, and how far they got (0 to 1)
    ready: bool
    progress: float
    seq: int
    gaps: list[Gap]

    @property
    def in_range(self) -> dict[str, int]:
        """What the chart adds up to."""
        return {name: sum(getattr(self.series, name)) for name in ("executed", "blocked", "failed")}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {
            "seq": self.seq,
            "ready": self.ready,
            "progress": round(self.progress, 3),
            "total": self.total.to_dict(),
            "tools": [tool.to_dict() for tool in self.tools],
            "workflows": [{**row._asdict(), "last": iso(row.last)} for row in self.workflows],
            "range": self.in_range,
            "chart": {
                "since": iso(self.since),
                "until": iso(self.until),
                "step_seconds": self.series.step // 1_000_000,
                "at": [at // 1_000_000 for at in self.series.at],
                "executed": self.series.executed,
                "blocked": self.series.blocked,
                "failed": self.series.failed,
            },
            "gaps": [gap.to_dict() for gap in self.gaps],
        }


def share(part: int, whole: int) -> float:
    """A part of a whole, 0 of nothing."""
    return part / whole if whole else 0.0


def overview(opened: Opened, since: int | None, until: int | None) -> Overview:
    """The figures, with a chart from `since` to `until` (None: what a newcomer wants to see)."""
    ready = opened.count()
    stats = opened.stats()
    rollup = opened.rollup
    begin, end = _range(opened, since, until)
    return Overview(
        stats.total,
        _tools(opened),
        rollup.workflows(20),
        rollup.series(begin, end, _POINTS),
        begin,
        end,
        ready,
        rollup.progress,
        rollup.seq,
        opened.reader.gaps(),
    )


def _range(opened: Opened, since: int | None, until: int | None) -> tuple[int, int]:
    """The last day if anything happened then, else all there is."""
    first = opened.rollup.first or now() - _DAY
    last = opened.rollup.last or now()
    end = until if until is not None else max(now(), last) + _MINUTE
    if since == BEGINNING:
        since = first
    elif since is None:
        recent = end - _DAY
        since = first if last < recent or first > recent else recent
    begin = min(since, end - _SHORTEST) if until is None else since  # a few bars alone are no picture
    if begin >= end:
        raise UsageError("since is not before until, so nothing can lie between; swap them")
    if end - begin > _MOST_MICROS or begin < -_MOST_MICROS:
        raise UsageError("the range is longer than a century; choose a shorter one")
    return begin, end


def _tools(opened: Opened) -> list[ToolFigures]:
    sums = opened.stats().tools
    rolled = {row.tool: row for row in opened.rollup.tools()}
    names = short_names(list(sums))
    made = []
    for tool, total in sums.items():
        row = rolled.get(tool)
        failures = row.failed if row else total.failed
        p50, p95 = (row.p50, row.p95) if row else (None, None)
        made.append(ToolFigures(tool, names[tool], total, failures, p50, p95))
    return sorted(made, key=lambda figures: (-figures.sums.attempts, figures.tool))
