"""Compounds as values of lists and trees: what stands in which column, what stands below what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ledger_cli.screen import Cell, Column, Grid
from ledger_cli.tasks_grids import moment
from ledger_ops.values import dollars, printable
from ledger_tasks.model import moment as time_of

#: words of compounds that nothing more happens to
ENDED = ("completed", "partial", "failed", "cancelled")
#: sign and style of each word, of compounds and of subtasks
LOOKS: Mapping[str, tuple[str, str]] = {
    "planned": ("○", ""),
    "pending": ("◔", "dim"),
    "queued": ("○", ""),
    "routing": ("◐", "cyan"),
    "executing": ("▶", "cyan"),
    "completed": ("✓", "green"),
    "partial": ("◆", "yellow"),
    "failed": ("✗", "red"),
    "cancelled": ("⊘", "dim"),
}
Found = Mapping[str, Any]


def is_over(found: Found) -> bool:
    """Whether nothing more happens to it."""
    return found["status"] in ENDED


def word(status: str) -> Cell:
    """A word with its sign and colour."""
    sign, style = LOOKS.get(status, ("·", ""))
    return Cell(f"{sign} {status}", style)


def compounds(found: Iterable[Found], *, full: bool) -> Grid:
    """Compounds, a row each; `full` gives every column, for a pipe."""
    columns = [column for column in _COLUMNS if full or column.title not in ("planned", "ended")]
    names = [column.title for column in columns]
    return Grid(columns, ([_cells(one, full=full)[name] for name in names] for one in found))


_COLUMNS = (
    Column("compound", most=24),
    Column("status", most=12),
    Column("done", "right"),
    Column("subtasks", "right", least_terminal=60),
    Column("cost", "right", least_terminal=70),
    Column("created", most=23, least_terminal=90),
    Column("planned"),
    Column("ended"),
    Column("prompt", most=0),
)


def _cells(one: Found, *, full: bool) -> dict[str, Cell]:
    times = {"created": "created_at", "planned": "planned_at", "ended": "completed_at"}
    cost = one["total_cost"]
    return {
        "compound": Cell(printable(one["id"]), "bold"),
        "status": Cell(one["status"]) if full else word(one["status"]),
        "done": Cell(f"{one['completed_count']:,}"),
        "subtasks": Cell(f"{one['subtask_count']:,}", "dim"),
        "cost": Cell(f"{cost:g}" if full else dollars(cost) if cost else ""),
        "prompt": Cell(printable(one["prompt"])),
        **{name: Cell(moment(time_of(one[key])), "dim") for name, key in times.items()},
    }


# -- subtasks as a tree --


class Branch(NamedTuple):
    """A subtask in its place: below the last one that it waits for."""

    subtask: Found
    #: lines from the ones above it
    before: str
    #: what else it waits for
    others: tuple[int, ...]


def branches(subtasks: Sequence[Found]) -> Iterator[Branch]:
    """All of them, each below the one of its dependencies that stands deepest."""
    by_index = {one["index"]: one for one in subtasks}
    depth = _depths(by_index)
    below: dict[int | None, list[int]] = {}
    for index, one in by_index.items():
        below.setdefault(_above(one, depth), []).append(index)
    todo = [(index, "", "") for index in reversed(below.get(None, []))]
    while todo:
        index, before, inside = todo.pop()
        one = by_index[index]
        above = _above(one, depth)
        yield Branch(one, before, tuple(on for on in one["depends_on"] if on != above))
        parts = below.get(index, [])
        for part in reversed(parts):
            is_last = part == parts[-1]
            own, further = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
            todo.append((part, inside + own, (inside + further)[-_WIDEST:]))


#: characters before a subtask at most; what stands deeper is not set in further
_WIDEST = 36


def _above(one: Found, depth: Mapping[int, int]) -> int | None:
    return max(one["depends_on"], key=lambda on: (depth[on], on), default=None)


def _depths(by_index: Mapping[int, Found]) -> dict[int, int]:
    """How many stand before each at most; a plan has no circle."""
    depth: dict[int, int] = {}
    todo = list(by_index)
    while todo:
        index = todo[-1]
        missing = [on for on in by_index[index]["depends_on"] if on not in depth]
        if missing and index not in depth:
            todo += missing
        else:
            deps = by_index[index]["depends_on"]
            depth.setdefault(index, 1 + max((depth[on] for on in deps), default=-1))
            todo.pop()
    return depth
