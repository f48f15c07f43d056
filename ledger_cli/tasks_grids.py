"""Tasks as values of lists and of JSON: which columns the commands show, and what stands in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from ledger_cli.screen import Cell, Column, Grid
from ledger_ops.values import clock, printable
from ledger_tasks import Task, TaskState, WorkerInfo
from ledger_tasks.model import micros_of

_S = TaskState
#: sign and style of each state
LOOKS: Mapping[str, tuple[str, str]] = {
    _S.BACKLOG: ("·", "dim"),
    _S.PENDING: ("○", ""),
    "waiting": ("◔", "dim"),
    _S.ASSIGNED: ("◐", "cyan"),
    _S.ACTIVE: ("▶", "cyan"),
    _S.PAUSED: ("‖", "magenta"),
    _S.REVIEW: ("◇", "magenta"),
    _S.APPROVED: ("◆", "green"),
    _S.BLOCKED: ("■", "yellow"),
    _S.DONE: ("✓", "green"),
    _S.FAILED: ("✗", "red"),
    _S.CANCELLED: ("⊘", "dim"),
    _S.SKIPPED: ("»", "dim"),
    _S.DEAD: ("✗", "bold red"),
}


def task_dict(task: Task) -> dict[str, Any]:
    """A task as every command gives it in JSON."""
    return {**task.to_dict(), "waiting": task.waiting, "ready": task.ready}


def standing(task: Task) -> str:
    """The state as people are told it: what is PENDING and waits for others is waiting."""
    return "waiting" if task.state == _S.PENDING and task.waiting else task.state.value


def state_cell(task: Task) -> Cell:
    """The state with its sign and colour."""
    word = standing(task)
    sign, style = LOOKS.get(word, ("?", ""))
    return Cell(f"{sign} {word}{f' ({task.waiting})' if word == 'waiting' else ''}", style)


def moment(value: datetime | None) -> str:
    """A time for people; nothing for None."""
    return "" if value is None else clock(micros_of(value))


def percent(task: Task) -> str:
    """How far it is, where anybody said so."""
    return f"{task.progress:.0%}" if task.progress else ""


def tasks(found: Iterable[Task], *, full: bool, sessions: bool = False) -> Grid:
    """Tasks, a row each; `full` gives every column and whole texts, for a pipe."""
    columns = _FULL if full else [each for each in _BRIEF if sessions or each[0].title != "session"]
    return Grid([column for column, _ in columns], ([cell(task) for _, cell in columns] for task in found))


_Cells = Sequence[tuple[Column, Callable[[Task], Cell]]]
_BRIEF: _Cells = (
    (Column("session", most=20), lambda t: Cell(printable(t.session), "dim")),
    (Column("task", most=24), lambda t: Cell(printable(t.id), "bold")),
    (Column("state", most=14), state_cell),
    (Column("prio", "right", least_terminal=70), lambda t: Cell(str(t.priority))),
    (Column("done", "right", least_terminal=80), lambda t: Cell(percent(t), "cyan")),
    (Column("who", most=18, least_terminal=90), lambda t: Cell(printable(t.assignee))),
    (Column("what", most=0), lambda t: Cell(printable(t.label) if t.label != t.id else "")),
    (Column("why or where", most=0, least_terminal=110), lambda t: Cell(printable(_said(t)), "dim")),
)
_FULL: _Cells = (
    (Column("task"), lambda t: Cell(printable(t.id))),
    (Column("state"), lambda t: Cell(t.state.value)),
    (Column("waiting"), lambda t: Cell(str(t.waiting))),
    (Column("priority"), lambda t: Cell(str(t.priority))),
    (Column("type"), lambda t: Cell(printable(str(t.type)))),
    (Column("who"), lambda t: Cell(printable(t.assignee))),
    (Column("parent"), lambda t: Cell(printable(t.parent))),
    (Column("progress"), lambda t: Cell(f"{t.progress:g}")),
    (Column("stage"), lambda t: Cell(printable(t.stage))),
    (Column("retries"), lambda t: Cell(f"{t.retries}/{t.max_retries}")),
    (Column("created"), lambda t: Cell(moment(t.created_at))),
    (Column("changed"), lambda t: Cell(moment(t.changed_at or t.created_at))),
    (Column("version"), lambda t: Cell(str(t.version))),
    (Column("session"), lambda t: Cell(printable(t.session))),
    (Column("what"), lambda t: Cell(printable(t.label))),
    (Column("why"), lambda t: Cell(printable(t.reason))),
)


def _said(task: Task) -> str:
    """Where its holder is with it, else why it stands where it stands."""
    return task.stage if task.state == _S.ACTIVE and task.stage else task.reason


def waves(found: Iterable[Sequence[Task]], *, full: bool) -> Grid:
    """Tasks with the number of their wave."""
    numbered = ((number, task) for number, wave in enumerate(found, 1) for task in wave)
    columns = (Column("wave", "right"), *(column for column, _ in _WAVE))
    rows = ([Cell(str(number), "dim"), *(cell(task) for _, cell in _WAVE)] for number, task in numbered)
    return Grid(columns, rows) if not full else _numbered("wave", numbered)


_WAVE: _Cells = (_BRIEF[1], _BRIEF[2], _BRIEF[3], _BRIEF[6])


def _numbered(title: str, found: Iterable[tuple[int, Task]]) -> Grid:
    columns = [Column(title), *(column for column, _ in _FULL)]
    return Grid(columns, ([Cell(str(n)), *(cell(task) for _, cell in _FULL)] for n, task in found))


def records(found: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Grid:
    """Dictionaries as rows, these of their fields."""
    columns = [Column(name, most=0 if name in ("why", "states") else 40) for name in names]
    return Grid(columns, ([Cell(_text(one.get(name))) for name in names] for one in found))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return printable(str(value))


def workers(found: Iterable[WorkerInfo], *, full: bool) -> Grid:
    """Workers, a row each."""
    columns = [each for each in _WORKER if full or each[0].title not in ("id", "started")]
    return Grid([column for column, _ in columns], ([cell(one) for _, cell in columns] for one in found))


def vital_sign(worker: WorkerInfo) -> Cell:
    """Whether it lives."""
    if worker.alive:
        return Cell("● alive", "green")
    return Cell("○ ended", "dim") if worker.ended else Cell("✗ silent", "red")


def success(worker: WorkerInfo) -> str:
    """How many of its runs ended well; nothing before the first."""
    return "" if worker.success_rate is None else f"{worker.success_rate:.0%}"


_WORKER: Sequence[tuple[Column, Callable[[WorkerInfo], Cell]]] = (
    (Column("id"), lambda w: Cell(printable(w.id))),
    (Column("worker", most=30), lambda w: Cell(printable(w.agent), "bold")),
    (Column("state", most=9), vital_sign),
    (Column("seen", most=23, least_terminal=80), lambda w: Cell(moment(w.seen_at))),
    (Column("started"), lambda w: Cell(moment(w.started_at))),
    (Column("done", "right"), lambda w: Cell(str(w.done), "green")),
    (Column("failed", "right"), lambda w: Cell(str(w.failed), "red" if w.failed else "dim")),
    (Column("success", "right", least_terminal=90), lambda w: Cell(success(w))),
    (Column("at once", "right", least_terminal=120), lambda w: Cell(str(w.concurrency))),
    (Column("types", most=24, least_terminal=110), lambda w: Cell(printable(", ".join(w.types)))),
    (Column("where", most=24, least_terminal=130), lambda w: Cell(printable(f"{w.host}:{w.pid}"), "dim")),
    (Column("doing", most=0), lambda w: Cell(printable(", ".join(w.doing)), "cyan")),
)


def sessions(found: Iterable[tuple[str, Mapping[TaskState, int]]]) -> Grid:
    """Sessions, with how many tasks they have in which state."""
    rows = (
        {"session": name, "tasks": sum(counts.values()), "states": states_told(counts)}
        for name, counts in found
    )
    return records(rows, ("session", "tasks", "states"))


def states_told(counts: Mapping[TaskState, int]) -> str:
    """How many tasks are in each state, in a line."""
    return " · ".join(f"{count:,} {state.value}" for state, count in counts.items())
