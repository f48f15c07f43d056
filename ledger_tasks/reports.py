"""What other programs report under their own names, taken over as moves of a task.

A program that only reports states has no claim, sends no heartbeat and skips what it does not know of. So a report
walks the table's shortest way to the state that it names, with the states in between recorded as implied; nobody's
lease runs; and a report that comes twice changes nothing. Whatever the table or another holder forbids stays
forbidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import ledger
from ledger import UsageError
from ledger_tasks import operations as ops
from ledger_tasks.book import Book, Row, stepped
from ledger_tasks.errors import InvalidTransition
from ledger_tasks.model import StatusEvent, Task, TaskEvent, checked, refuse_odd, to_json
from ledger_tasks.operations import Who
from ledger_tasks.states import ENDED, HELD, TaskState, path

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

_S = TaskState
#: what may be implied: a task that is reported DONE was begun, one that is APPROVED was in REVIEW
_IMPLIED: Final = frozenset({_S.PENDING, _S.ASSIGNED, _S.ACTIVE, _S.REVIEW, _S.APPROVED})
#: what anybody may say of a task that somebody else has, as by the operations of these names
_ANYBODYS: Final = frozenset({_S.APPROVED, _S.BLOCKED, _S.CANCELLED})


def report(tasks: TaskLedger, event: StatusEvent) -> Task:
    """Take over one report; the task as it is then.

    Raises `InvalidTransition`, `NotHolder` and `UsageError`, and changes nothing then.
    """
    told = _told(tasks, event)
    token = ledger.new_token()
    return tasks.store.write(tasks.session, lambda book: take_over(book, told, token)).task


@dataclass(frozen=True, slots=True)
class Told:
    """A report in the ledger's own words."""

    task: str
    state: TaskState
    who: Who
    #: the state as the program called it
    name: str
    stage: str
    data: Mapping[str, Any]

    @property
    def op(self) -> str:
        """What the row remembers of it."""
        return f"report {self.state.value}"

    @property
    def why(self) -> str:
        """The reason, in whichever of the usual places it was given."""
        given = (self.data.get(name) for name in ("reason", "error", "message"))
        needed = f"reported as {self.name}" if self.state in (_S.BLOCKED, _S.FAILED) else ""
        return next((str(one) for one in given if one), self.stage or needed)

    @property
    def digest(self) -> str:
        """The same for the same report."""
        parts = [self.state.value, self.who.actor, self.stage, json.dumps(self.data, sort_keys=True)]
        return "report:" + hashlib.sha256("\x1f".join(parts).encode(errors="replace")).hexdigest()[:32]

    def fields(self) -> dict[str, Any]:
        """What it says about the task itself."""
        found: dict[str, Any] = {"stage": self.stage} if self.stage else {}
        if self.state == _S.DONE:
            found["progress"] = 1.0
        if self.state in (_S.DONE, _S.REVIEW) and self.data.get("result") is not None:
            found["result"] = self.data["result"]
        return found

    def kept(self) -> dict[str, Any]:
        """What the event keeps of it besides."""
        return {"reported": self.name, "data": dict(self.data)}  # what is empty is not written


def _told(tasks: TaskLedger, event: StatusEvent) -> Told:
    """The report, checked before anything is opened."""
    if not event.req:
        raise UsageError("a report names its request (req=…), the id of the task; nothing was changed")
    data: Any = {} if event.data is None else event.data
    if not isinstance(data, Mapping):
        raise UsageError(f"the data of a report are {data!r}; give a dictionary; nothing was changed")
    kept = json.loads(to_json(dict(data), f"what was reported of task {event.req!r}"))
    for name in ("req", "actor", "source", "stage"):
        refuse_odd(getattr(event, name), f"the {name} of a report")
    who = Who(event.actor or tasks.agent, source=event.source or tasks.source)
    return Told(event.req, tasks.state_named(event.state), who, str(event.state), event.stage, kept)


def take_over(book: Book, told: Told, token: str) -> Row:
    """Find or make the task, and bring it where the report says that it is. `token` is this request's own."""
    row = book.row(told.task)
    if row is None:
        new = checked(Task(told.task))
        (row,) = ops.add(book, [new], told.who, token, backlog=told.state == _S.BACKLOG)
    if told.who.repeats(told.op, row) or row.task.state == told.state:
        return _note(book, row, told)
    _refuse_stranger(row, told)
    if told.state == _S.CANCELLED:
        ops.cancel(book, told.task, told.who, told.why)
        return _note(book, ops.find(book, told.task), told)
    return _walk(book, row, told)


def _refuse_stranger(row: Row, told: Told) -> None:
    """What somebody has is its own to report on."""
    is_one_step = told.state in path(row.task.state, told.state)[:1]
    if row.task.state in HELD and not (told.state in _ANYBODYS and is_one_step):
        ops._refuse_stranger(row, told.who, "report on")


def _note(book: Book, row: Row, told: Told) -> Row:
    """The state is known: what else is new in the report is written down, and nothing when that is nothing."""
    if row.task.state in HELD:
        ops._refuse_stranger(row, told.who, "report on")
    if row.task.state in ENDED and row.task.changed_by != told.who.actor:
        raise InvalidTransition(row.task.id, row.task.state, told.state, f"{row.task.changed_by} ended it")
    if row.said == told.digest or not (told.data or (told.stage and told.stage != row.task.stage)):
        return row
    fields = {name: value for name, value in told.fields().items() if name == "stage"}
    after, event = stepped(
        row, "note", moment=book.now, actor=told.who.actor, source=told.who.source, stage=told.stage, fields=fields,
        data=told.kept(),
    )  # fmt: skip
    after = ops._with_lease(book, replace(after, said=told.digest))
    book.save(after, [event])
    return after


def _walk(book: Book, row: Row, told: Told) -> Row:
    """Each state of the way with an event of its own; the last one carries the report."""
    start, task = row.task.state, row.task
    way = _way(row, told)
    _refuse_waiting(task, way, told)
    events: list[TaskEvent] = []
    for state in way[:-1]:
        row = _step(book, row, state, told, events, data={"implied": True})
    adds = {"errors": ops._error(book, told.who.actor, told.why)} if told.state == _S.FAILED else None
    row = _step(
        book, row, told.state, told, events, op=told.who.asks(told.op), stage=told.stage, fields=told.fields(), adds=adds,
        data=told.kept(),
    )  # fmt: skip
    if told.state == _S.FAILED:
        row, more = ops._after_failure(book, row, told.who, None)
        events += more
    return ops._commit(book, start, replace(row, said=told.digest), events).row


def _way(row: Row, told: Told) -> list[TaskState]:
    """The table's shortest way. A task at rest in FAILED has no retry left: a report does not begin it anew."""
    task = row.task
    through = _IMPLIED if task.state not in (_S.FAILED, _S.DEAD) else frozenset[TaskState]()
    way = path(task.state, told.state, through=through)
    if not way:
        raise InvalidTransition(task.id, task.state, told.state, f"{told.who.actor} reported {told.name}")
    if task.state in (_S.FAILED, _S.DEAD) and told.state == _S.PENDING:
        raise InvalidTransition(task.id, task.state, told.state, "no retry is left; `retry` it with a reason")
    own = task.changed_by == told.who.actor and not row.claim
    if task.state in (_S.REVIEW, _S.BLOCKED) and len(way) > 1 and not own:
        word = "approve" if task.state == _S.REVIEW else "unblock"
        raise InvalidTransition(task.id, task.state, told.state, f"somebody must {word} it first")
    return way


def _refuse_waiting(task: Task, way: list[TaskState], told: Told) -> None:
    if _S.ASSIGNED in way and task.waiting:
        count = "a dependency" if task.waiting == 1 else f"{task.waiting} dependencies"
        raise InvalidTransition(task.id, task.state, told.state, f"it waits for {count}")


def _step(
    book: Book, row: Row, state: TaskState, told: Told, events: list[TaskEvent], *, fields: dict[str, Any] | None = None,
    **more: Any,
) -> Row:  # fmt: skip
    """One state further. Whoever begins by a report has no claim, and no lease that could lapse."""
    changes = dict(fields or {})
    if state == _S.ASSIGNED:
        changes["assignee"] = told.who.actor
        row = replace(row, claim="", lease=0.0)
    row, event = stepped(
        row, "moved", moment=book.now, actor=told.who.actor, to=state, why=told.why, source=told.who.source,
        fields=changes, **more,
    )  # fmt: skip
    events.append(event)
    return row
