"""What may be done with tasks, once for all stores: each function is given a `Book` and runs in one transaction.

Everything that changes a state ends in `_commit`, which writes the task with its events and then sees to those that
wait for it. Nothing here calls a user's code, and nothing recurses: a chain of ten thousand ends in a loop.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from typing import Any, Final, NamedTuple

from ledger_tasks.book import Book, Edge, Row, Wanted, born, stepped
from ledger_tasks.errors import (
    Conflict,
    DependencyCycle,
    DuplicateTask,
    InvalidTransition,
    NoSuchTask,
    NotHolder,
    TaskError,
)
from ledger_tasks.model import Dep, Task, TaskEvent, WorkerInfo, at, checked, micros_of
from ledger_tasks.states import ENDED, HELD, LEASED, LOST, NEXT, TaskState, path

#: why a task that has parts is BLOCKED; it goes on by itself when they are done
WAITS_FOR_PARTS: Final = "waiting for subtasks"
#: `cancel` that asked for the dependents too; to cancel the task alone is another request
CANCEL_ALL: Final = "cancel all"
_S = TaskState
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: an agent, the claim that it shows (if any), and the program that it asks through."""

    actor: str
    token: str = ""
    source: str = ""

    def asks(self, op: str) -> str:
        """The operation with who asked for it, as the row remembers it."""
        return f"{op}:{self.token}:{self.actor}"

    def repeats(self, op: str, row: Row) -> bool:
        """Whether the last move of the task was this very one, asked for by this caller: its reply was lost."""
        last, token, actor = f"{row.op}::".split(":", 2)
        # a claim is known by its token, also where another process shows it under another name
        is_same = self.token == token if self.token else self.actor == actor.removesuffix("::")
        return last == op and is_same


class Change(NamedTuple):
    """What became of a task, and which tasks can be begun because of that."""

    row: Row
    freed: list[str]


# -- finding --


def find(book: Book, task_id: str) -> Row:
    """The task; raises `NoSuchTask`."""
    row = book.row(task_id)
    if row is None:
        raise NoSuchTask(
            f"there is no task {task_id!r} in session {book.session!r}; nothing was changed. "
            "See `ledger tasks list`, or name the session that it is in",
            task_id,
        )
    return row


def _holds(row: Row, who: Who) -> bool:
    if row.task.state not in HELD:
        return False
    return row.claim == who.token if who.token else row.task.assignee == who.actor


def _refuse_stranger(row: Row, who: Who, op: str) -> None:
    task = row.task
    if _holds(row, who):
        return
    if task.state in HELD and task.assignee != who.actor:
        now = f"it is {task.state.name} and {task.assignee or 'nobody'} has it"
    elif task.state in HELD:
        now = "it was claimed anew since"
    else:
        now = f"it is {task.state.name} and nobody has it"
    raise NotHolder(
        f"{who.actor} does not hold task {task.id!r}, so it cannot {op} it: {now}; nothing was changed. "
        "Stop working on it, or claim it first",
        task.id,
        task.assignee if task.state in HELD else "",
    )


# -- committing --


def _commit(book: Book, start: TaskState, row: Row, events: Sequence[TaskEvent]) -> Change:
    """Write a task that was in the state `start`, and see to everything that waits for it."""
    row = _with_lease(book, row)
    book.save(row, events)
    return Change(row, _see_to_dependents(book, start, row.task))


def _with_lease(book: Book, row: Row) -> Row:
    """A lease runs where a silence means that the holder is gone, and nowhere else."""
    state = row.task.state
    if state in LEASED and row.lease:
        return book.leased(row)
    return replace(row, until=0, claim=row.claim if state in HELD or state in ENDED else "")


def _see_to_dependents(book: Book, start: TaskState, task: Task) -> list[str]:
    """What the new state of a task means for those that wait for it; which of them can be begun."""
    if task.state == _S.DONE:
        return _wake(book, book.release(task.id))
    if task.state in LOST and start not in LOST:
        return _lose(book, task)
    if start in LOST and task.state not in LOST:
        book.reopen(task.id, "run")
    return []


def _wake(book: Book, released: Iterable[tuple[str, TaskState]]) -> list[str]:
    """Of those that wait for nothing any more, the ones that can be begun; a task whose parts are done goes on."""
    ready = []
    for task_id, state in released:
        if state == _S.BLOCKED and not _goes_on(book, task_id):
            continue
        if state in (_S.PENDING, _S.BLOCKED):
            ready.append(task_id)
    return ready


def _goes_on(book: Book, task_id: str) -> bool:
    row = find(book, task_id)
    if row.task.state != _S.BLOCKED or row.task.reason != WAITS_FOR_PARTS:
        return False
    after, event = stepped(
        row, "moved", moment=book.now, actor="ledger", op="parts", to=_S.PENDING, why="its subtasks are done"
    )
    book.save(after, [event])
    return True


def _lose(book: Book, task: Task) -> list[str]:
    """End what cannot be done any more because this task failed, and what waits for those; who may run all the same."""
    freed: list[str] = []
    lost = deque([task])
    while lost:
        failed = lost.popleft()
        freed += _wake(book, book.release(failed.id, "run"))
        for edge in [e for e in book.dependents([failed.id], waiting=True) if e.on_failure != "run"]:
            ended = _end_with(book, find(book, edge.task), edge.on_failure, failed)
            if ended is not None:
                lost.append(ended)
    return freed


def _end_with(book: Book, row: Row, on_failure: str, failed: Task) -> Task | None:
    """SKIPPED or FAILED because a dependency failed; None if it has ended already."""
    if row.task.state in ENDED:
        return None
    end = _S.SKIPPED if on_failure == "skip" else _S.FAILED
    why = f"its dependency {failed.id} is {failed.state.name}"
    adds = {"errors": _error(book, "ledger", why)} if end == _S.FAILED else None
    after, events = _along(book, row, end, actor="ledger", op="dependency", why=why, adds=adds)
    book.save(_with_lease(book, after), events)
    return after.task


def _along(
    book: Book, row: Row, end: TaskState, *, actor: str, op: str, why: str, adds: dict[str, Any] | None = None,
    source: str = "", through: Iterable[TaskState] = (_S.PENDING,), first: dict[str, Any] | None = None,
) -> tuple[Row, list[TaskEvent]]:  # fmt: skip
    """A task on its way to a state, with the states that the table wants in between recorded as implied."""
    way = path(row.task.state, end, through=through)
    if not way:
        raise InvalidTransition(row.task.id, row.task.state, end, why)
    events: list[TaskEvent] = []
    for state in way:
        last = state == end
        row, event = stepped(
            row, "moved", moment=book.now, actor=actor, op=op, to=state, why=why, source=source,
            fields=None if events else first, adds=adds if last else None, data=None if last else {"implied": True},
        )  # fmt: skip
        events.append(event)
    return row, events


def _error(book: Book, actor: str, error: str) -> dict[str, Any]:
    return {"at": at(book.now).isoformat(), "actor": actor, "error": error}


# -- adding --


def add(book: Book, tasks: Sequence[Task], who: Who, token: str, *, backlog: bool = False) -> list[Row]:
    """New tasks, all or none, in the order given. `token` is this request's own."""
    names = [task.id for task in tasks]
    tasks = _with_parts(tasks)
    known = _rows(
        book, [*names, *(dep.id for task in tasks for dep in task.depends_on), *(t.parent for t in tasks)]
    )
    if book.again and tasks and tasks[0].id in known and _was_added_by(book, tasks[0].id, token):
        return [known[name] for name in names]
    book.hold_graph()
    _refuse_duplicates(book, names, known)
    parents = [find(book, name) for name in dict.fromkeys(task.parent for task in tasks) if name in known]
    _refuse_unknown(book, tasks, known)
    _refuse_ended(parents)
    _refuse_cycle(book, tasks, known)
    state = _S.BACKLOG if backlog else _S.PENDING
    for task in tasks:
        book.insert(*born(task, book.session, book.now, who=who, op=f"add:{token}", state=state))
    parts = [Edge(task.parent, task.id, "fail") for task in tasks if task.parent in known]
    own = [Edge(task.id, dep.id, dep.on_failure) for task in tasks for dep in task.depends_on]
    for parent in parents:
        _hand_to_parts(book, parent, [edge for edge in parts if edge.task == parent.task.id], who)
    book.connect([*own, *parts])
    if any(row.task.state in LOST for row in _rows(book, known).values()):  # by now they are held
        _end_hopeless(book, names)
    made = _rows(book, names)
    return [made[name] for name in names]


def add_parts(book: Book, parent: str, parts: Sequence[Task | str], who: Who, token: str) -> list[Row]:
    """Parts of a task; one that is given by its description is numbered after those that the parent has."""
    book.hold_graph()  # or two number theirs alike
    there = _parts(book, parent)
    mine = [row for row in there if book.again and _was_added_by(book, row.task.id, token)]
    if mine:
        return mine
    taken = {row.task.id for row in there} | {part.id for part in parts if isinstance(part, Task)}
    free = (name for number in count(len(there) + 1) if (name := f"{parent}.{number}") not in taken)
    new = [checked(Task(next(free), one, parent=parent)) if isinstance(one, str) else one for one in parts]
    return add(book, new, who, token)


def _with_parts(tasks: Sequence[Task]) -> list[Task]:
    """A new task whose parts come with it depends on them; what it says of one itself counts."""
    parts: dict[str, list[Dep]] = {}
    for task in tasks:
        parts.setdefault(task.parent, []).append(Dep(task.id, "fail"))
    return [_with_deps(task, parts[task.id]) if task.id in parts else task for task in tasks]


def _with_deps(task: Task, more: Iterable[Dep]) -> Task:
    deps = {dep.id: dep for dep in (*more, *task.depends_on)}
    return replace(task, depends_on=tuple(deps.values()))


def _rows(book: Book, names: Iterable[str]) -> dict[str, Row]:
    """Those of these tasks that are there."""
    wanted = list(dict.fromkeys(filter(None, names)))
    found: dict[str, Row] = {}
    for start in range(0, len(wanted), _PAGE):
        some = frozenset(wanted[start : start + _PAGE])
        found |= {row.task.id: row for row in book.page(Wanted(ids=some), _PAGE)}
    return found


def _was_added_by(book: Book, task_id: str, token: str) -> bool:
    """Whether an earlier try of this very request added it, and its reply was lost."""
    return any(event.data.get("token") == token for event in book.events(0, 1, task_id))


def _refuse_duplicates(book: Book, names: Sequence[str], known: Mapping[str, Row]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or name in known:
            where = "is given twice" if name in seen else f"is in session {book.session!r} already"
            raise DuplicateTask(f"task {name!r} {where}; nothing was added. Choose another id", name)
        seen.add(name)


def _refuse_ended(parents: Iterable[Row]) -> None:
    for parent in parents:
        if parent.task.state not in (_S.BACKLOG, _S.PENDING, _S.BLOCKED, _S.ASSIGNED, _S.ACTIVE):
            raise TaskError(
                f"task {parent.task.id!r} is {parent.task.state.name} and can have no more subtasks; nothing was "
                "added. Add a task of its own",
                parent.task.id,
            )


def _refuse_unknown(book: Book, tasks: Sequence[Task], known: Mapping[str, Row]) -> None:
    new = {task.id for task in tasks}
    for task in tasks:
        for what, name in [
            *(("depends on", dep.id) for dep in task.depends_on),
            ("is a part of", task.parent),
        ]:
            if name and name not in new and name not in known:
                raise NoSuchTask(
                    f"task {task.id!r} {what} {name!r}, which is not in session {book.session!r}; nothing was "
                    "added. Add that task first, or in the same add_tasks",
                    name,
                )


def _refuse_cycle(book: Book, tasks: Sequence[Task], known: Mapping[str, Row]) -> None:
    """New tasks can wait for each other only among themselves, and through a task that they are to be parts of."""
    waits: dict[str, list[str]] = {task.id: [dep.id for dep in task.depends_on] for task in tasks}
    for task in tasks:
        if task.parent in known:
            waits.setdefault(task.parent, []).append(task.id)
    if any(name in known for name in waits):
        before = [dep for on in waits.values() for dep in on if dep in known]
        for edge in _everything_before(book, before):
            waits.setdefault(edge.task, []).append(edge.on)
    refuse_cycle(waits)


def _everything_before(book: Book, start: Sequence[str]) -> list[Edge]:
    """Every dependency of these tasks, of those that they depend on, and so on."""
    seen, todo, found = set(start), list(dict.fromkeys(start)), []
    while todo:
        edges = list(book.dependencies(todo))
        found += edges
        todo = list(dict.fromkeys(edge.on for edge in edges if edge.on not in seen))
        seen.update(todo)
    return found


def refuse_cycle(waits: dict[str, list[str]]) -> None:
    """Raise `DependencyCycle` if following the names leads back to one of them."""
    done: set[str] = set()
    for start in waits:
        way: dict[str, None] = {}
        stack = [(start, iter(waits.get(start, ())))]
        way[start] = None
        while stack and start not in done:
            name, rest = stack[-1]
            following = next((one for one in rest if one not in done), None)
            if following is None:
                stack.pop()
                way.pop(name, None)
                done.add(name)
            elif following in way:
                names = list(way)
                round_ = [*names[names.index(following) :], following]
                shown = " → ".join(round_ if len(round_) < 12 else [*round_[:6], "…", *round_[-5:]])
                raise DependencyCycle(
                    f"these tasks would wait for each other for ever: {shown} (→ means waits for); nothing was "
                    "changed. Leave out one of these dependencies",
                    round_,
                )
            else:
                way[following] = None
                stack.append((following, iter(waits.get(following, ()))))


def _hand_to_parts(book: Book, parent: Row, parts: Sequence[Edge], who: Who) -> None:
    """A parent waits for its new parts; whoever had it has it no more."""
    deps = (*parent.task.depends_on, *(Dep(edge.on, "fail") for edge in parts))
    to = {_S.ACTIVE: _S.BLOCKED, _S.ASSIGNED: _S.PENDING}.get(parent.task.state)
    after, event = stepped(
        parent, "moved" if to else "depends", moment=book.now, actor=who.actor, op="subtasks", to=to,
        why=WAITS_FOR_PARTS if to else "", source=who.source, fields={"depends_on": deps},
    )  # fmt: skip
    book.save(_with_lease(book, after), [event])


def _end_hopeless(book: Book, task_ids: Sequence[str]) -> None:
    """What depends on something that has failed already ends as if that failed now."""
    for edge in list(book.dependencies(task_ids)):
        failed = find(book, edge.on).task
        if failed.state in LOST and edge.on_failure != "run":
            ended = _end_with(book, find(book, edge.task), edge.on_failure, failed)
            if ended is not None:
                _lose(book, ended)


def add_dependency(book: Book, task_id: str, dep: Dep, who: Who, expected: int | None = None) -> Row:
    """One more task to wait for, while nobody has begun."""
    book.hold_graph()
    row = find(book, task_id)
    find(book, dep.id)
    if dep in row.task.depends_on:
        return row
    _refuse_version(row, expected)
    if any(dep.id == known.id for known in row.task.depends_on):
        raise TaskError(
            f"task {task_id!r} depends on {dep.id!r} already, with another on_failure; nothing was changed",
            task_id,
        )
    if row.task.state not in (_S.BACKLOG, _S.PENDING, _S.BLOCKED):
        raise TaskError(
            f"task {task_id!r} is {row.task.state.name}, so it cannot wait for {dep.id!r} any more; nothing was "
            "changed. Release it first, or give it subtasks",
            task_id,
        )
    waits: dict[str, list[str]] = {task_id: [dep.id]}
    for edge in _everything_before(book, [dep.id]):
        waits.setdefault(edge.task, []).append(edge.on)
    refuse_cycle(waits)
    after, event = stepped(
        row, "depends", moment=book.now, actor=who.actor, source=who.source,
        fields={"depends_on": (*row.task.depends_on, dep)},
    )  # fmt: skip
    book.save(after, [event])
    book.connect([Edge(task_id, dep.id, dep.on_failure)])
    _end_hopeless(book, [task_id])
    return find(book, task_id)


# -- claiming --


def claim_next(
    book: Book, who: Who, lease: float, capabilities: Sequence[str] | None, types: Sequence[str] | None,
    *, start: bool = False,
) -> Row | None:  # fmt: skip
    """The most urgent task that this agent may do; None if there is none. `who.token` becomes the claim.

    `start`: it is begun, too.
    """
    if book.again and (mine := book.claimed(who.token)):
        return mine
    row = book.first(capabilities, types)
    return None if row is None else _claim(book, row, who, lease, start=start)


def claim_task(book: Book, task_id: str, who: Who, lease: float, *, start: bool = False) -> Row | None:
    """That task, begun if `start` says so; None if somebody else has it, or it cannot be begun now."""
    if book.again and (mine := book.claimed(who.token)):
        return mine
    row = find(book, task_id)
    if book.again and row.claim == who.token:  # the first try was just being committed
        return row
    is_free = row.task.ready and micros_of(row.task.not_before) <= book.now
    return _claim(book, row, who, lease, start=start) if is_free else None


def _claim(book: Book, row: Row, who: Who, lease: float, *, start: bool) -> Row:
    after, event = stepped(
        row, "moved", moment=book.now, actor=who.actor, op=who.asks("claim"), to=_S.ASSIGNED, source=who.source,
        fields={"assignee": who.actor}, data={"lease": lease},
    )  # fmt: skip
    after = book.leased(replace(after, claim=who.token, lease=lease))
    events = [event]
    if start:
        after, event = stepped(
            after,
            "moved",
            moment=book.now,
            actor=who.actor,
            op=who.asks("start"),
            to=_S.ACTIVE,
            source=who.source,
        )
        events.append(event)
    book.save(after, events)
    return after


def heartbeat(book: Book, task_id: str, who: Who) -> bool:
    """Let the lease begin anew; False if the claim is lost."""
    row = find(book, task_id)
    if not _holds(row, who):
        return False
    if row.task.state in LEASED and row.lease:
        book.renew(book.leased(row))
    return True


# -- moving: what the holder does --


def move(
    book: Book, task_id: str, who: Who, op: str, to: TaskState, *, held: bool, expected: int | None = None, why: str = "",
    fields: dict[str, Any] | None = None, adds: dict[str, Any] | None = None, start: Iterable[TaskState] | None = None,
) -> Change:  # fmt: skip
    """One move of one task by its holder (`held`) or by anybody; asked again by the same, it changes nothing.

    `start` are the states that it may leave by this operation, where the table would allow more.
    """
    row = find(book, task_id)
    if who.repeats(op, row):
        return Change(row, _freed_before(book, row))
    _refuse(row, who, op, to, held=held, start=start, expected=expected)
    after, event = stepped(
        row, "moved", moment=book.now, actor=who.actor, op=_asked(row, who, op), to=to, why=why, source=who.source,
        fields=fields, adds=adds,
    )  # fmt: skip
    return _commit(book, row.task.state, after, [event])


def _freed_before(book: Book, row: Row) -> list[str]:
    """What an end that is asked for again may have freed when it was asked for first."""
    return [edge.task for edge in book.dependents([row.task.id])] if row.task.state in ENDED else []


def _asked(row: Row, who: Who, op: str) -> str:
    """The operation as the row remembers it, with the claim of a holder who named the task and itself only."""
    return replace(who, token=who.token or (row.claim if row.task.state in HELD else "")).asks(op)


def _refuse(
    row: Row,
    who: Who,
    op: str,
    to: TaskState,
    *,
    held: bool,
    start: Iterable[TaskState] | None,
    expected: int | None,
) -> None:
    """Whoever shows a claim is told first whether it still has it, anybody else what the table says."""
    if who.token and row.claim != who.token:
        _refuse_stranger(row, who, op)
    if (start is not None and row.task.state not in start) or to not in NEXT[row.task.state]:
        raise InvalidTransition(row.task.id, row.task.state, to)
    if held:
        _refuse_stranger(row, who, op)
    _refuse_version(row, expected)


def _refuse_version(row: Row, expected: int | None) -> None:
    if expected is not None and row.task.version != expected:
        raise Conflict(row.task.id, expected, row.task.version)


def _begin(book: Book, task_id: str, who: Who, expected: int | None) -> bool:
    """Claim and begin a ready task that nobody has; False if it is not one."""
    row = find(book, task_id)
    if not row.task.ready or micros_of(row.task.not_before) > book.now or who.token:
        return False
    _refuse_version(row, expected)
    after, events = _along(
        book, row, _S.ACTIVE, actor=who.actor, op="route", why="", through=(_S.ASSIGNED,), source=who.source,
        first={"assignee": who.actor},
    )  # fmt: skip
    book.save(after, events)
    return True


def complete(
    book: Book,
    task_id: str,
    who: Who,
    *,
    result: Any,
    usage: dict[str, Any],
    expected: int | None = None,
    route: bool = False,
) -> Change:
    """DONE with a result; `route`: a ready task that nobody began is claimed and begun first."""
    if route and _begin(book, task_id, who, expected):
        expected = None
    fields: dict[str, Any] = {"progress": 1.0}
    if result is not None:
        fields["result"] = result
    return move(
        book, task_id, who, "complete", _S.DONE, held=True, expected=expected, fields=fields, adds=usage,
        start=(_S.ACTIVE, _S.APPROVED),
    )  # fmt: skip


def fail(
    book: Book, task_id: str, who: Who, error: str, *, usage: dict[str, Any], retry_in: float | None,
    expected: int | None = None, route: bool = False,
) -> Change:  # fmt: skip
    """FAILED, and on from there: back to PENDING while retries are left, DEAD when they are used up."""
    row = find(book, task_id)
    if who.repeats("fail", row):
        return Change(row, _freed_before(book, row))
    if route and _begin(book, task_id, who, expected):
        row, expected = find(book, task_id), None
    _refuse(row, who, "fail", _S.FAILED, held=True, start=(_S.ACTIVE,), expected=expected)
    adds = {"errors": _error(book, who.actor, error), **usage}
    after, event = stepped(
        row, "moved", moment=book.now, actor=who.actor, op=_asked(row, who, "fail"), to=_S.FAILED, why=error,
        source=who.source, adds=adds,
    )  # fmt: skip
    after, more = _after_failure(book, after, who, retry_in)
    return _commit(book, row.task.state, after, [event, *more])


def _after_failure(book: Book, row: Row, who: Who, retry_in: float | None) -> tuple[Row, list[TaskEvent]]:
    task = row.task
    if task.retries < task.max_retries:
        pause = backoff(task.retries) if retry_in is None else retry_in
        told = f"retry {task.retries + 1} of {task.max_retries}, in {pause:.1f} s"
        fields = {"retries": task.retries + 1, "not_before": at(book.now + int(pause * 1e6))}
        row, event = stepped(
            row, "moved", moment=book.now, actor=who.actor, to=_S.PENDING, why=told, fields=fields
        )
        return row, [event]
    if task.max_retries:
        told = f"its {task.max_retries} retries are used up: {task.reason}"
        row, event = stepped(row, "moved", moment=book.now, actor=who.actor, to=_S.DEAD, why=told)
        return row, [event]
    return row, []


def backoff(retries: int) -> float:
    """Seconds before the next try: 1, 2, 4 … 300, each up to a tenth more, so that not all come back at once."""
    return float(min(300.0, 2.0**retries) * (1 + random.random() / 10))  # noqa: S311 - spreads load, guards nothing


def release(
    book: Book, task_id: str, who: Who, why: str = "", expected: int | None = None, *, retry_in: float = 0.0
) -> Change:
    """Give it back, undone: PENDING, not before `retry_in` seconds, and no retry is counted."""
    later = {"not_before": at(book.now + int(retry_in * 1e6))} if retry_in else None
    return move(
        book, task_id, who, "release", _S.PENDING, held=True, expected=expected, why=why or "released",
        start=(_S.ASSIGNED, _S.ACTIVE), fields=later,
    )  # fmt: skip


def record(
    book: Book, task_id: str, who: Who, kind: str, token: str, *, stage: str = "", fields: dict[str, Any] | None = None,
    adds: dict[str, Any] | None = None, timed: str = "",
) -> Row:  # fmt: skip
    """Something that its holder says of a task without moving it; that also is a sign of life."""
    row = find(book, task_id)
    if book.again and row.said == token:
        return row
    _refuse_stranger(row, who, f"report {kind} of")
    now = book.now
    told = at(now).isoformat()
    when = {timed: told} if timed else {}
    adds = {name: {**one, "at": told} if isinstance(one, dict) else one for name, one in (adds or {}).items()}
    after, event = stepped(
        row, kind, moment=now, actor=who.actor, source=who.source, stage=stage, fields={**(fields or {}), **when},
        adds=adds,
    )  # fmt: skip
    after = _with_lease(book, replace(after, said=token))
    book.save(after, [event])
    return after


# -- moving: what anybody does --


def retry(
    book: Book, task_id: str, who: Who, reason: str, expected: int | None = None, *, fresh: bool = False
) -> Change:
    """FAILED or DEAD back to PENDING. Where no retry is left a reason is needed, and the count begins anew.

    `fresh`: in a new scope, where none of the effects of earlier runs is replayed or blocks.
    """
    row = find(book, task_id)
    if who.repeats("retry", row):
        return Change(row, [])
    task = row.task
    if task.state not in (_S.FAILED, _S.DEAD):
        raise InvalidTransition(task.id, task.state, _S.PENDING, "only FAILED and DEAD tasks are retried")
    _refuse_version(row, expected)
    _refuse_failed_dependency(book, task)
    is_left = task.state == _S.FAILED and task.retries < task.max_retries
    if not is_left and not reason:
        raise TaskError(
            f"task {task.id!r} is {task.state.name} and has no retry left; nothing was changed. Give a reason "
            "(reason=…, --reason) to let its retries begin anew",
            task.id,
        )
    events = []
    if task.state == _S.FAILED and not is_left:
        row, event = stepped(
            row,
            "moved",
            moment=book.now,
            actor=who.actor,
            to=_S.DEAD,
            why="no retry is left",
            data={"implied": True},
        )
        events.append(event)
    fields: dict[str, Any] = {
        "retries": task.retries + 1 if is_left else 0, "not_before": None, "progress": 0.0
    }  # fmt: skip
    if fresh:
        fields |= {"scope": task.scope + 1, "checkpoint": None, "checkpoint_at": None}
    after, event = stepped(
        row, "moved", moment=book.now, actor=who.actor, op=who.asks("retry"), to=_S.PENDING, why=reason or "retried",
        source=who.source, fields=fields,
    )  # fmt: skip
    return _commit(book, task.state, after, [*events, event])


def _refuse_failed_dependency(book: Book, task: Task) -> None:
    for edge in book.dependencies([task.id]):
        on = find(book, edge.on).task
        if on.state in LOST and edge.on_failure != "run":
            raise TaskError(
                f"task {task.id!r} depends on {on.id!r}, which is {on.state.name}; nothing was changed. Retry that one first",
                task.id,
            )


def cancel(
    book: Book, task_id: str, who: Who, reason: str, *, dependents: bool = False, expected: int | None = None
) -> Change:
    """CANCELLED with its subtasks, and with everything that waits for it where `dependents` says so."""
    row = find(book, task_id)
    if who.repeats(CANCEL_ALL, row) or (not dependents and who.repeats("cancel", row)):
        return Change(row, [])
    _refuse(row, who, "cancel", _S.CANCELLED, held=False, start=None, expected=expected)
    ended: list[tuple[TaskState, Row]] = []
    for name in [task_id, *_to_cancel(book, task_id, dependents=dependents)]:
        before = find(book, name)
        if _S.CANCELLED in NEXT[before.task.state]:
            why = reason if name == task_id else f"{task_id} was cancelled{reason and ': '}{reason}"
            op = CANCEL_ALL if dependents and name == task_id else "cancel"
            ended.append((before.task.state, _cancel_one(book, before, who, op, why)))
    # after all of them, so that none is SKIPPED because another was CANCELLED
    freed = [name for start, after in ended for name in _see_to_dependents(book, start, after.task)]
    return Change(ended[0][1], freed)


def _cancel_one(book: Book, row: Row, who: Who, op: str, why: str) -> Row:
    after, event = stepped(
        row,
        "moved",
        moment=book.now,
        actor=who.actor,
        op=who.asks(op),
        to=_S.CANCELLED,
        why=why,
        source=who.source,
    )
    after = _with_lease(book, after)
    book.save(after, [event])
    return after


def _to_cancel(book: Book, task_id: str, *, dependents: bool) -> list[str]:
    """The parts of a task and their parts, and (if asked) what waits for any of these.

    What has ended is left as it is, and so is what waited for that alone.
    """
    seen, todo = {task_id: None}, [task_id]
    while todo:
        found = [row.task.id for name in todo for row in _parts(book, name) if row.task.state not in ENDED]
        if dependents:
            found += [edge.task for edge in book.dependents(todo, waiting=True)]
        todo = [name for name in dict.fromkeys(found) if name not in seen]
        seen.update(dict.fromkeys(todo))
    return [name for name in seen if name != task_id]


def _parts(book: Book, task_id: str) -> list[Row]:
    found, after = [], 0
    while page := book.page(Wanted(parent=task_id, after=after), 200):
        found += page
        after = page[-1].num
    return found


# -- workers --


#: how long a worker that was seen last is remembered
_REMEMBERED: Final = 7 * 86400 * 1_000_000


#: microseconds without a word after which a worker is taken for dead
SILENCE: Final = int(3e6 * WorkerInfo.EVERY)


def beat(book: Book, worker: WorkerInfo) -> WorkerInfo:
    """A worker lives, by the store's clock; at its first word, those that were seen long ago are forgotten."""
    now = at(book.now)
    kept = replace(worker, started_at=worker.started_at or now, seen_at=now)
    book.beat(kept, book.now - _REMEMBERED if worker.started_at is None else 0)
    return kept


def workers(book: Book) -> list[WorkerInfo]:
    """Those that were seen lately, newest first, with what they are doing."""
    silent = at(book.now - SILENCE)
    return [_as_seen(book, as_alive(worker, silent)) for worker in book.workers()]


def as_alive(worker: WorkerInfo, silent: datetime) -> WorkerInfo:
    """With the word whether it is alive: not ended, and seen since then."""
    alive = not worker.ended and worker.seen_at is not None and worker.seen_at > silent
    return replace(worker, alive=alive)


def _as_seen(book: Book, worker: WorkerInfo) -> WorkerInfo:
    mine = Wanted(states=frozenset(LEASED), assignee=worker.agent)
    held = book.page(mine, 100) if worker.alive else ()
    return replace(worker, doing=tuple(row.task.id for row in held))


# -- recovery --


#: how often a begun task with `max_retries=0` goes back after its holder fell silent. Its failures are nobody's to
#: try again, but the death of a worker says nothing of the task; one that kills whoever takes it must end all the same
TAKEOVERS: Final = 3
#: how many lapsed tasks one transaction brings back
RECOVER_AT_ONCE: Final = 100


def recover(book: Book, who: Who) -> tuple[list[Row], int]:
    """Bring back what lapsed: the tasks that can be done again, and how many were looked at."""
    rows = book.lapsed(limit=RECOVER_AT_ONCE)
    back = []
    for row in rows:
        after = _bring_back(book, row, who)
        if after.task.state == _S.PENDING:
            back.append(after)
    return back, len(rows)


def _bring_back(book: Book, row: Row, who: Who) -> Row:
    task = row.task
    silent = (book.now - row.until) / 1e6 + row.lease
    why = f"{task.assignee} has been silent for {max(silent, row.lease):.0f} s, and its lease was {row.lease:g} s"
    fields: dict[str, Any] = {}
    to = _S.PENDING
    if task.state == _S.ACTIVE:  # a run was begun: it counts
        limit = task.max_retries or TAKEOVERS
        fields = {"retries": task.retries + 1}
        if task.retries >= limit:
            to, fields, why = _S.DEAD, {}, f"{why}; its {limit} retries are used up"
    after, event = stepped(
        row, "moved", moment=book.now, actor=who.actor, op="recover", to=to, why=why, source=who.source, fields=fields,
        adds={"errors": _error(book, who.actor, why)},
    )  # fmt: skip
    return _commit(book, task.state, after, [event]).row
