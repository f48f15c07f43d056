"""Looking at compounds however many subtasks they have: lists, and one of them as a graph. Nothing here writes.

Counts are exact. Costs of a compound that goes on are those of its first subtasks, as many as are read at once;
one that has ended says itself what it cost. Results are shortened: the task of a subtask has all of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final

from ledger_tasks import compound_view as view
from ledger_tasks.book import Wanted
from ledger_tasks.browse import Link, Seen, TaskPage, TaskReader, columns_of
from ledger_tasks.compound_plan import COMPOUND, SUBTASK, index_in
from ledger_tasks.errors import NoSuchTask
from ledger_tasks.model import Task
from ledger_tasks.states import ENDED, TaskState

#: subtasks that are read of one compound for its page, and for a line of a list
_MOST_READ, _MOST_OF_ONE = 1_000, 200
#: subtasks whose long records are read all the same
_MOST_LONG: Final = 20
_SHORT: Final = 400
#: what a person looks for first, where not all are shown
_FIRST: Final = ("executing", "routing", "failed", "queued", "pending", "completed")
Told = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CompoundPage:
    """A page of compounds, newest first; `page` says how it goes on."""

    compounds: list[Told]
    page: TaskPage


@dataclass(frozen=True, slots=True)
class SeenCompound:
    """One compound as its page has it."""

    seen: Seen
    told: Told
    #: with their place in the graph
    subtasks: list[Told]
    links: list[Link]

    def to_dict(self) -> Told:
        """JSON values only."""
        return {**self.told, "subtasks": self.subtasks, "links": [link._asdict() for link in self.links]}


def compounds(
    reader: TaskReader, session: str | None, after: int, limit: int, seconds: float
) -> CompoundPage:
    """A page of compounds, below the number `after`."""
    wanted = Wanted(types=frozenset([COMPOUND]), session=session, after=after)
    found = reader.page(wanted, limit, seconds)
    whole = [_whole(reader, seen) for seen in found.tasks]
    shown = [_heading(reader, seen, _MOST_OF_ONE)[0] for seen in whole if _is_compound(seen.task)]
    return CompoundPage(shown, found)


def compound(reader: TaskReader, session: str, compound_id: str, most: int) -> SeenCompound:
    """One compound with up to `most` subtasks: what is executed or failed first. Raises `NoSuchTask`."""
    row = reader.row(session, compound_id)
    if not _is_compound(row.task):
        raise NoSuchTask(
            f"task {compound_id!r} is no compound; look at it as a task, or choose one from the list",
            compound_id,
        )
    seen = Seen(row.num, row.task)
    heading, parts = _heading(reader, seen, _MOST_READ)
    told = view.subtasks_of([part.task for part in parts])
    order = sorted(range(len(parts)), key=lambda place: _FIRST.index(told[place]["status"]))
    chosen = sorted(order[:most])
    nums = {parts[place].task.id: parts[place].num for place in chosen}
    links = [
        Link(parts[place].num, nums[dep.id], dep.on_failure)
        for place in chosen
        for dep in parts[place].task.depends_on
        if dep.id in nums
    ]
    column = columns_of(nums.values(), links)
    subtasks = [_placed(parts[place], told[place], column) for place in chosen]
    about = {
        "prompt": row.task.description,
        "reasoning": row.task.payload["reasoning"],
        "more": heading["subtask_count"] - len(subtasks),
    }
    return SeenCompound(seen, heading | about, subtasks, links)


def _placed(part: Seen, told: Told, column: dict[int, int]) -> Told:
    task = part.task
    return {
        **told,
        "result": shortened(told["result"]),
        "num": part.num,
        "column": column[part.num],
        "session": task.session,
        "label": task.label,
        "state": task.state.value,
        "waiting": task.waiting,
        "assignee": task.assignee,
    }


def shortened(value: Any) -> str | None:
    """The beginning of a result, as text."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


# -- what it came to --


def _heading(reader: TaskReader, seen: Seen, most: int) -> tuple[Told, list[Seen]]:
    """A compound as a list has it, and its first subtasks; `whole_cost` is false where not all costs are in its sum."""
    whole = seen.task
    counts = _counts(reader, whole)
    parts = _parts(reader, whole, most)
    told = view.heading_of(whole, [part.task for part in parts])
    ended = whole.result if whole.state == TaskState.DONE else whole.checkpoint
    summary = ended if isinstance(ended, dict) else {}
    failed = sum(count for state, count in counts.items() if state in ENDED and state != TaskState.DONE)
    exact = {
        "session": whole.session,
        "status": _status(told["status"], counts),
        "completed_count": counts.get(TaskState.DONE, 0),
        "failed_count": failed,
        "total_cost": summary.get("total_cost", told["total_cost"]),
        "total_tokens": summary.get("total_tokens", sum(part.task.tokens for part in parts)),
        "whole_cost": bool(summary) or sum(counts.values()) <= len(parts),
    }
    return told | exact, parts


def _status(word: str, counts: dict[TaskState, int]) -> str:
    """Begun is also what is begun among the subtasks that were not read."""
    return "executing" if word == "planned" and counts.keys() - {TaskState.PENDING} else word


def _counts(reader: TaskReader, whole: Task) -> dict[TaskState, int]:
    sql = (
        "SELECT state, COUNT(*) FROM tasks WHERE session = :session AND parent = :parent AND parent <> ''"
        " AND type = :kind GROUP BY state"
    )
    found = reader.ask(sql, session=whole.session, parent=whole.id, kind=SUBTASK)
    return {TaskState(state): count for state, count in found}


def _parts(reader: TaskReader, whole: Task, most: int) -> list[Seen]:
    """Its first subtasks, by their index."""
    found = reader.parts(whole.session, whole.id, SUBTASK, most)
    long = [seen for seen in found if not seen.is_whole][:_MOST_LONG]
    read = {seen.num: _whole(reader, seen) for seen in long}
    known = [read.get(seen.num, seen) for seen in found]
    return [seen if seen.is_whole else _unread(seen) for seen in known if _is_subtask(seen)]


def _whole(reader: TaskReader, seen: Seen) -> Seen:
    """With its record, however long that is."""
    return seen if seen.is_whole else Seen(seen.num, reader.row(seen.task.session, seen.task.id).task)


def _is_compound(task: Task) -> bool:
    """Whether a runner planned it: tasks of that type may be anybody's."""
    told = task.payload
    if not view.is_compound(task) or not {"reasoning", "submitted_at"} <= told.keys():
        return False
    count = told.get("subtask_count")
    return isinstance(count, int) and count > 0


def _is_subtask(seen: Seen) -> bool:
    if not seen.is_whole:
        return seen.task.id.rpartition(".")[2].isdecimal()
    return view.is_planned(seen.task) and {"index", "model"} <= seen.task.payload.keys()


def _unread(seen: Seen) -> Seen:
    """A subtask whose record is too long to be read with all the others."""
    told = {"index": index_in(seen.task.id), "tier_hint": 0, "model": ""}
    words = "its record is too long for a list"
    task = replace(seen.task, description=words, payload=told, result=words)
    return Seen(seen.num, task, is_whole=False)
