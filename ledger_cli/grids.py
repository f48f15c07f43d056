"""Lists as values: which columns the commands show, and what stands in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ledger
from ledger import Record
from ledger_cli.screen import Cell, Column, Grid
from ledger_ops.values import Stats, Sums, clock, decode, printable, state_of

SIGNS = {"success": "✓", "failed": "✗", "in_doubt": "?", "running": "▶", "suspended": "‖"}
STYLES = {
    "success": "green",
    "failed": "red",
    "in_doubt": "yellow",
    "running": "cyan",
    "suspended": "magenta",
}
#: so many digits of a fingerprint tell calls apart for people
SHORT_CALL = 12


class Names:
    """Tools as people are shown them: by the short name, or in full where two share it."""

    def __init__(self, tools: Iterable[str]) -> None:
        self._full: dict[str, set[str]] = {}
        for tool in tools:
            self._full.setdefault(_short(tool), set()).add(tool)

    def of(self, tool: str) -> str:
        """The name to show, safe for a terminal."""
        short = _short(tool)
        self._full.setdefault(short, set()).add(tool)
        return printable(short if len(self._full[short]) == 1 else tool)


def _short(tool: str) -> str:
    return ledger._short(tool)


def short_call(record: Record) -> str:
    """The beginning of a fingerprint, safe for a terminal: that of an imported call may be anything."""
    return printable(record.call[:SHORT_CALL])


def status_cell(state: str) -> Cell:
    """A status with its sign and colour."""
    return Cell(f"{SIGNS.get(state, '·')} {state.replace('_', ' ')}", STYLES.get(state, ""))


def said(record: Record) -> str:
    """What a call was asked with, in one line: its key where that stood for the arguments."""
    parts = []
    if record.key is not None:
        parts.append(f"key={_compact(decode(record.key))}")
    args = decode(record.args_json)
    if isinstance(args, dict):
        parts += [f"{name}={_compact(value)}" for name, value in args.items()]
    elif args is not None:
        parts.append(_compact(args))
    return printable(", ".join(parts))


def ended(record: Record) -> str:
    """What came of a call, in one line."""
    if record.error is not None and state_of(record) != "success":
        return printable(record.error)
    return "" if record.result_json is None else printable(_compact(decode(record.result_json)))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- calls --


def calls(records: Iterable[Record], names: Names, *, full: bool) -> Grid:
    """Calls, a row each; `full` gives whole fingerprints and every count, for a pipe."""
    columns = _FULL if full else _BRIEF
    titles = tuple(column for column, _ in columns)
    return Grid(titles, ([cell(record, names) for _, cell in columns] for record in records))


_Cells = Sequence[tuple[Column, Callable[[Record, Names], Cell]]]
_BRIEF: _Cells = (
    (Column("call", most=SHORT_CALL), lambda r, _: Cell(short_call(r), "dim")),
    (Column("started", most=30, least_terminal=72), lambda r, _: Cell(clock(r.started))),
    (Column("status", most=12), lambda r, _: status_cell(state_of(r))),
    (Column("tool", most=28), lambda r, names: Cell(names.of(r.tool), "bold")),
    (
        Column("blocked", "right", least_terminal=100),
        lambda r, _: Cell(f"{r.blocked:,}" if r.blocked else "", "yellow"),
    ),
    (Column("workflow", most=20, least_terminal=120), lambda r, _: Cell(printable(r.wf))),
    (Column("arguments", most=0), lambda r, _: Cell(said(r))),
    (Column("outcome", most=0, least_terminal=90), lambda r, _: Cell(ended(r), "dim")),
)
_FULL: _Cells = (
    (Column("call"), lambda r, _: Cell(printable(r.call))),
    (Column("started"), lambda r, _: Cell(clock(r.started))),
    (Column("status"), lambda r, _: Cell(state_of(r))),
    (Column("tool"), lambda r, names: Cell(names.of(r.tool))),
    (Column("workflow"), lambda r, _: Cell(printable(r.wf))),
    (Column("caller"), lambda r, _: Cell(printable(r.caller))),
    (Column("run"), lambda r, _: Cell(str(r.run))),
    (Column("attempts"), lambda r, _: Cell(str(r.attempts))),
    (Column("executed"), lambda r, _: Cell(str(r.runs))),
    (Column("blocked"), lambda r, _: Cell(str(r.blocked))),
    (Column("arguments"), lambda r, _: Cell(said(r))),
    (Column("outcome"), lambda r, _: Cell(ended(r))),
)


# -- sums --

_SUMS = (
    ("calls", "actions", "bold"),
    ("attempts", "attempts", ""),
    ("executed", "executed", "green"),
    ("blocked", "blocked", "yellow"),
    ("failed", "failed", "red"),
    ("in doubt", "in_doubt", "yellow"),
    ("suspended", "suspended", "magenta"),
    ("running", "running", "cyan"),
)
_RARE = ("in_doubt", "suspended", "running")


def sums(stats: Stats, *, full: bool) -> Grid:
    """Sums, a row for each tool and one for all.

    `full`, for a pipe, gives every column in plain digits; else rare ends have a column where there are any.
    """
    names = Names(stats.tools)
    shown = [each for each in _SUMS if full or each[1] not in _RARE or getattr(stats.total, each[1])]
    columns = (Column("tool", most=0), *(Column(title, "right") for title, _, _ in shown))
    rows = [(names.of(tool), found) for tool, found in stats.tools.items()]

    def cells(name: str, found: Sums) -> list[Cell]:
        values = ((getattr(found, field), style) for _, field, style in shown)
        numbers = (Cell(str(n) if full else f"{n:,}", style if n else "dim") for n, style in values)
        return [Cell(name, "bold"), *numbers]

    return Grid(columns, [cells(name, found) for name, found in [*rows, ("total", stats.total)]])
