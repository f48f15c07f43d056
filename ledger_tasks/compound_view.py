"""How compounds stand, from the rows of the ledger alone: any process may ask, whether or not it runs one.

Times are ISO text in UTC, costs are US dollars, and results are whole.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from ledger_tasks.book import Book, Wanted
from ledger_tasks.compound_plan import COMPOUND, SUBTASK, assigned, index_in
from ledger_tasks.errors import NoSuchTask, TaskError
from ledger_tasks.model import Task, TaskEvent, plain
from ledger_tasks.states import ENDED, TaskState
from ledger_tasks.tasks import TaskLedger

_S = TaskState
_PAGE: Final = 500
#: characters of a prompt in a list, and of a result in an export
SHORT: Final = 100
PREVIEW: Final = 200
#: what a compound is called while it is none of these, the parts say
_WORDS: Final = {_S.CANCELLED: "cancelled", _S.FAILED: "failed", _S.DEAD: "failed", _S.SKIPPED: "failed"}


# -- one compound --


def progress(ledger: TaskLedger, compound: str) -> dict[str, Any]:
    """The full picture of a compound: its plan, each subtask, totals. Raises `NoSuchTask`."""
    whole = compound_of(ledger, compound)
    parts = parts_of(ledger, whole.id)
    subtasks = subtasks_of(parts)
    return {
        **heading_of(whole, parts),
        "prompt": whole.description,
        "reasoning": whole.payload["reasoning"],
        "subtasks": subtasks,
        "failed_count": sum(one["status"] == "failed" for one in subtasks),
        "total_tokens": whole.tokens + sum(part.tokens for part in parts),
    }


def compound_of(ledger: TaskLedger, compound: str) -> Task:
    """Its task. Raises `NoSuchTask`."""
    found = named(ledger, [compound])
    if not found or not is_compound(found[0]):
        raise NoSuchTask(
            f"there is no compound {compound!r} in session {ledger.session!r}; nothing was changed. "
            "`recent` lists those that there are",
            compound,
        )
    return found[0]


def is_planned(task: Task) -> bool:
    """Whether a runner planned it; a task of somebody else may be of such a type too."""
    mark = {COMPOUND: "submitted_at", SUBTASK: "tier_hint"}.get(task.type)
    return isinstance(task.payload, dict) and mark in task.payload


def is_compound(task: Task) -> bool:
    """Whether it is a compound that a runner planned."""
    return task.type == COMPOUND and is_planned(task)


def named(ledger: TaskLedger, names: Iterable[str]) -> list[Task]:
    """Those of these tasks that are there."""
    wanted = list(names)

    def look(book: Book) -> list[Task]:
        pages = (frozenset(wanted[start : start + _PAGE]) for start in range(0, len(wanted), _PAGE))
        return [row.task for some in pages for row in book.page(Wanted(ids=some), _PAGE)]

    return ledger.store.read(ledger.session, look)


def parts_of(ledger: TaskLedger, compound: str) -> list[Task]:
    """Its subtasks, by their index."""
    return [*filter(is_planned, ledger.tasks(parent=compound, type=SUBTASK))]


def heading_of(whole: Task, parts: list[Task]) -> dict[str, Any]:
    """What a list and the full picture have in common."""
    return {
        "id": whole.id,
        "prompt": whole.description[:SHORT],
        "status": status_of(whole, parts),
        "subtask_count": whole.payload["subtask_count"],
        "completed_count": sum(part.state == _S.DONE for part in parts),
        "created_at": whole.payload["submitted_at"],
        "planned_at": plain(whole.created_at),
        "completed_at": plain(whole.completed_at),
        "total_cost": _sum([whole, *parts]),
    }


def _sum(tasks: Iterable[Task]) -> float:
    return round(sum(task.cost for task in tasks), 9)


def status_of(whole: Task, parts: Iterable[Task]) -> str:
    """planned, executing, completed, partial, failed or cancelled."""
    if whole.state == _S.DONE:
        return str((whole.result or {}).get("status", "completed"))
    if whole.state in _WORDS:
        return _WORDS[whole.state]
    is_begun = any(part.assigned_at is not None or part.state in ENDED for part in parts)
    return "executing" if is_begun else "planned"


def summary_of(parts: list[Task]) -> dict[str, Any]:
    """What a compound came to, all of whose subtasks have ended."""
    done = sum(part.state == _S.DONE for part in parts)
    status = "completed" if done == len(parts) else "partial" if done else "failed"
    return {
        "status": status,
        "subtask_count": len(parts),
        "completed_count": done,
        "failed_count": len(parts) - done,
        "total_cost": _sum(parts),
        "total_tokens": sum(part.tokens for part in parts),
    }


# -- its subtasks --


def subtasks_of(parts: list[Task]) -> list[dict[str, Any]]:
    """Subtasks of one compound as the full picture has them."""
    by_id = {part.id: part for part in parts}
    causes: dict[str, str] = {}
    return [_subtask(part, by_id, causes) for part in parts]


def _subtask(part: Task, by_id: dict[str, Task], causes: dict[str, str]) -> dict[str, Any]:
    tier, model = assigned(part)
    return {
        "id": part.id,
        "index": part.payload["index"],
        "description": part.description,
        "tier_hint": part.payload["tier_hint"],
        "tier_assigned": tier,
        "model": model,
        "depends_on": [index_in(dep.id) for dep in part.depends_on],
        "status": _status_of_part(part),
        "result": part.result if part.state == _S.DONE else _why_not(part, by_id, causes),
        "cost": part.cost,
        "tokens": part.tokens,
        "started_at": plain(part.started_at),
        "completed_at": plain(part.completed_at),
    }


def _status_of_part(part: Task) -> str:
    """pending, queued, routing, executing, completed or failed."""
    if part.state == _S.DONE:
        return "completed"
    if part.state in ENDED:
        return "failed"
    if part.state == _S.ASSIGNED:
        return "routing"
    if part.state == _S.PENDING:
        return "pending" if part.waiting else "queued"
    return "pending" if part.state in (_S.BACKLOG, _S.BLOCKED) else "executing"


def _why_not(part: Task, by_id: dict[str, Task], causes: dict[str, str]) -> str | None:
    """Why a subtask failed; None if it did not."""
    if part.state not in ENDED:
        return None
    if part.state == _S.CANCELLED:
        return "cancelled"
    blocker = _blocker(part, by_id)
    if blocker is None:
        return _error(part)
    return f"blocked by failed dependency {index_in(blocker.id)}: {_cause(blocker, by_id, causes)}"


def _blocker(part: Task, by_id: dict[str, Task]) -> Task | None:
    """The dependency that kept it from being begun."""
    deps = (by_id.get(dep.id) for dep in part.depends_on)
    return next(
        (dep for dep in deps if dep is not None and dep.state in ENDED and dep.state != _S.DONE), None
    )


def _cause(part: Task, by_id: dict[str, Task], causes: dict[str, str]) -> str:
    """Why the first of a chain failed; the same words for all that it blocks."""
    way = []
    found: Task | None = part
    while found is not None and found.id not in causes:
        way.append(part := found)
        found = _blocker(part, by_id)
    why = causes[found.id] if found else "cancelled" if part.state == _S.CANCELLED else _error(part)
    causes.update({one.id: why for one in way})
    return why


def _error(part: Task) -> str:
    return str(part.errors[-1]["error"]) if part.errors else part.reason or str(part.state)


# -- lists --


def recent(ledger: TaskLedger, limit: int = 20, *, name: str | None = None) -> list[dict[str, Any]]:
    """The newest compounds (of the runners of that name), newest first, with the beginning of their prompts."""
    return [_listed(ledger, whole) for whole in _newest(ledger, limit, name)]


def _newest(ledger: TaskLedger, limit: int, name: str | None) -> list[Task]:
    found: list[Task] = []
    wanted = Wanted(types=frozenset([COMPOUND]), newest_first=True, session=ledger.session)
    while len(found) < limit:
        page = ledger.store.read(ledger.session, lambda book: book.page(wanted, limit))
        tasks = (row.task for row in page if name is None or name in row.task.capabilities)
        found += filter(is_compound, tasks)
        if len(page) < limit:
            break
        wanted.after = page[-1].num
    return found[:limit]


def _listed(ledger: TaskLedger, whole: Task) -> dict[str, Any]:
    """As it ended, or as its subtasks stand now."""
    ended = whole.result if whole.state == _S.DONE else whole.checkpoint
    if whole.state not in ENDED or not isinstance(ended, dict):
        return heading_of(whole, parts_of(ledger, whole.id))
    told = {"completed_count": ended["completed_count"], "total_cost": ended["total_cost"]}
    return heading_of(whole, []) | told


# -- for billing --


def executions(ledger: TaskLedger, *, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Every execution of a subtask that has ended, also one that its process did not survive, in the order of the plans."""
    for part in ledger.tasks(type=SUBTASK):
        is_ours = part.started_at is not None and is_planned(part)
        if is_ours and (name is None or name in part.capabilities):
            yield from (_execution(part, event) for event in ledger.events(part) if _ends_execution(event))


def _ends_execution(event: TaskEvent) -> bool:
    return event.from_state == _S.ACTIVE != event.to_state


def _execution(part: Task, event: TaskEvent) -> dict[str, Any]:
    tier, model = assigned(part)
    is_done = event.to_state == _S.DONE
    adds, told = event.data.get("add", {}), event.data.get("why", "")
    result = event.data.get("set", {}).get("result") if is_done else told
    return {
        "time": plain(event.at),
        "compound": part.parent,
        "index": part.payload["index"],
        "tier": tier,
        "model": model,
        "success": is_done,
        "tokens": adds.get("tokens", 0),
        "cost": adds.get("cost", 0.0),
        "preview": (result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))[:PREVIEW],
    }


def export(
    ledger: TaskLedger, target: str | os.PathLike[str] | TextIO | None = None, *, name: str | None = None
) -> int:
    """Write one JSON line for each execution, to a file, a stream or (None) stdout; how many there were."""
    if isinstance(target, str | os.PathLike):
        with Path(target).open("w", encoding="utf-8") as file:
            return export(ledger, file, name=name)
    stream = sys.stdout if target is None else target
    count = 0
    for count, one in enumerate(executions(ledger, name=name), 1):  # noqa: B007 - told at the end
        stream.write(json.dumps(one, ensure_ascii=False) + "\n")
    return count


# -- ending one --


def cancel(
    ledger: TaskLedger, compound: str, reason: str = "", *, actor: str | None = None
) -> dict[str, Any]:
    """Cancel what has not ended of a compound, and the compound; its full picture afterwards.

    Who executes a subtask of it learns that within a third of its lease. Raises `TaskError` if it has ended.
    """
    whole = compound_of(ledger, compound)
    if whole.state in ENDED:
        raise TaskError(
            f"compound {compound!r} has ended: {status_of(whole, [])}; nothing was changed", compound
        )
    ledger.cancel(whole.id, reason, actor=actor)
    return progress(ledger, compound)
