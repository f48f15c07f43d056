"""What a task is, what happened to it, and how the second gives the first.

A task is what its events add up to: `apply` is the one function that makes the next task from an event, whether the
event is being written or read back years later. So a snapshot and a replay cannot disagree unless somebody changed
one of them, which `verify` finds by the hash that each event carries of the one before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, Final, Literal
from urllib.parse import unquote

from ledger import UsageError
from ledger_tasks.states import ENDED, TaskState

SCHEMA_VERSION: Final = 1
#: seconds that a lease or a pause may last at most, some thirty years: a time that is still a time
LONGEST: Final = 1e9
OnFailure = Literal["skip", "fail", "run"]
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class TaskType(StrEnum):
    """Usual kinds of a task; any other string is one too. Order comes from dependencies, never from the type."""

    TASK = "task"
    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    REVIEW = "review"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Dep:
    """Another task that must have ended first, and what happens here if it fails.

    `skip`: this task becomes SKIPPED. `fail`: it becomes FAILED. `run`: it runs all the same.
    """

    id: str
    on_failure: OnFailure = "skip"


def moment(value: datetime | float | str | None) -> datetime | None:
    """A time in UTC: of a datetime with its zone, of seconds since 1970, or of ISO text."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"{value!r} is no time ({error}); nothing was changed") from None
    if value.tzinfo is None:
        raise UsageError(
            f"the time {value.isoformat()} names no zone, so nobody knows when that is; give it one, for "
            "instance value.astimezone()"
        )
    return value.astimezone(UTC)


def micros_of(value: datetime | None) -> int:
    """Microseconds since 1970, exactly; 0 for None."""
    return 0 if value is None else (value - _EPOCH) // timedelta(microseconds=1)


def at(micros: int) -> datetime:
    """The time of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=micros)


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do, as its events left it. `Task(id=…, description=…)` alone is valid.

    Times are in UTC. What the ledger itself keeps (state, times, holder, version and the like) is ignored in a task
    that is added.
    """

    #: unique in its session
    id: str
    description: str = ""
    title: str = ""
    #: a `TaskType` or any other word; chooses a worker's handler
    type: str = TaskType.TASK
    #: 1 to 10, higher first
    priority: int = 5
    tags: tuple[str, ...] = ()
    state: TaskState = TaskState.PENDING
    #: why it is in this state, where somebody said so
    reason: str = ""
    #: who has it, or had it last when it ended
    assignee: str = ""
    #: the task that this one is a part of
    parent: str = ""
    depends_on: tuple[Dep, ...] = ()
    #: what an agent must be able to do
    capabilities: tuple[str, ...] = ()
    created_at: datetime | None = None
    assigned_at: datetime | None = None
    #: when it first became ACTIVE
    started_at: datetime | None = None
    completed_at: datetime | None = None
    #: not offered before
    not_before: datetime | None = None
    #: when it ought to be done; shown, and nothing happens by itself
    deadline: datetime | None = None
    #: what its handler needs to know: JSON
    payload: Any = None
    #: how often `retry(fresh=True)` let its effects begin anew
    scope: int = 0
    #: how often it was begun again
    retries: int = 0
    #: so many retries, one run more
    max_retries: int = 0
    #: one entry for each failure: at, actor, error
    errors: tuple[dict[str, Any], ...] = ()
    #: what the next holder needs to go on
    checkpoint: Any = None
    checkpoint_at: datetime | None = None
    #: 0 to 1
    progress: float = 0.0
    stage: str = ""
    result: Any = None
    #: one entry for each: name, value, at
    artifacts: tuple[dict[str, Any], ...] = ()
    #: what it cost so far, in whatever currency the program counts in
    cost: float = 0.0
    tokens: int = 0
    api_calls: int = 0
    #: number of its latest event; what `expected_version=` is compared with
    version: int = 0
    changed_at: datetime | None = None
    #: who brought it into this state
    changed_by: str = ""
    active_since: datetime | None = None
    #: seconds in ACTIVE that have ended
    worked: float = 0.0
    session: str = ""
    schema: int = SCHEMA_VERSION
    #: how many dependencies are open: more than 0, and a PENDING task waits for them
    waiting: int = field(default=0, compare=False)
    #: tasks that depend on this one
    blocks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def label(self) -> str:
        """What to call it in a list: its title, else the first line of its description, else its id."""
        return self.title or self.description.strip().partition("\n")[0] or self.id

    @property
    def workflow(self) -> str:
        """The guard's workflow of its tool calls, whoever runs it: `task:ID`, with what tells apart where that is not enough.

        Followed by `@SESSION` outside of the session `main`, and by `#N` after the N-th `retry(fresh=True)`.
        """
        where = "" if self.session == "main" else f"@{_escaped(self.session)}"
        return f"task:{_escaped(self.id)}{where}{f'#{self.scope}' if self.scope else ''}"

    @property
    def ready(self) -> bool:
        """Whether nothing but its `not_before` can keep it from being claimed."""
        return self.state == TaskState.PENDING and not self.waiting

    @property
    def cycle_time(self) -> float | None:
        """Seconds from its creation to its end; None while it has none."""
        return _seconds(self.created_at, self.completed_at)

    @property
    def wait_time(self) -> float | None:
        """Seconds from its creation until it was first begun; None before that."""
        return _seconds(self.created_at, self.started_at)

    @property
    def work_time(self) -> float:
        """Seconds in ACTIVE that have ended, pauses and reviews left out."""
        return self.worked

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; `from_dict` reads it back."""
        return {name: plain(getattr(self, name)) for name in _NAMES}

    def said(self) -> dict[str, Any]:
        """The same without what is as it is in every new task; `from_dict` reads it back."""
        return {
            name: plain(value)
            for name, usual in _USUAL
            if (value := getattr(self, name)) is not usual and value != usual
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Task:
        """The task of such a dictionary; names that this version does not know are left out."""
        return cls(**dict(_read_fields(upcast(found))))


def _escaped(name: str) -> str:
    """A name in which no separator of a workflow stands for itself, so that two tasks never share one."""
    return name.replace("%", "%25").replace("@", "%40").replace("#", "%23")


def task_in(workflow: str) -> tuple[str, str]:
    """The id and the session of the task whose tool calls are in that workflow; empty where they are no task's."""
    if not workflow.startswith("task:"):
        return "", ""
    name, _, where = workflow.removeprefix("task:").partition("#")[0].partition("@")
    return unquote(name), unquote(where) or "main"


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else (end - start).total_seconds()


#: what a user may give for a new task; the rest is what happened to it
GIVEN: Final = (
    "id", "description", "title", "type", "priority", "tags", "parent", "depends_on", "capabilities", "not_before",
    "deadline", "max_retries", "payload",
)  # fmt: skip
_TIMES: Final = frozenset(f.name for f in fields(Task) if str(f.type) == "datetime | None")
_NAMES: Final = tuple(f.name for f in fields(Task) if f.compare)
_KNOWN: Final = frozenset(_NAMES)
_USUAL: Final = tuple(
    (f.name, None if f.name in ("id", "schema") else f.default) for f in fields(Task) if f.compare
)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """A field of a task as JSON takes it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Dep):
        return [value.id, value.on_failure]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _read_fields(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if name in _KNOWN:
            yield name, _read_field(name, value)


def _read_field(name: str, value: Any) -> Any:
    if name in _TIMES:
        return moment(value)
    if name == "depends_on":
        return tuple(Dep(*dep) for dep in value)
    if name == "state":
        return TaskState(value)
    return tuple(value) if name in ("tags", "capabilities", "errors", "artifacts") else value


def upcast(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an older version wrote, in the words of this one."""
    return found


def compact(value: Any) -> str:
    """JSON in as few characters as it takes; half a surrogate, as in the name of an odd file, is written as an escape."""
    text = _ENCODER.encode(value)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def to_json(value: Any, what: str) -> str:
    """JSON of a user's value; raises `UsageError` that says which value cannot be kept."""
    try:
        return compact(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{what} cannot be kept as JSON ({error}); nothing was changed. Give plain values: dict, list, str, int, "
            "float, bool, None"
        ) from None


def checked(task: Task) -> Task:
    """A task as it is added: what the ledger keeps itself is reset, the rest is put into one form and checked."""
    given = {name: getattr(task, name) for name in GIVEN}
    given["type"] = plain(given["type"])
    for name in ("id", "type", "parent"):
        refuse_odd(given[name], f"the {name} of task {task.id!r}")
    for name in ("title", "description"):
        if not isinstance(given[name], str):
            raise UsageError(
                f"the {name} of task {task.id!r} is {given[name]!r}; it must be text; nothing was added"
            )
    if not task.id:
        raise UsageError("a task needs an id that is not empty; nothing was added")
    if isinstance(task.priority, bool) or not isinstance(task.priority, int) or not 1 <= task.priority <= 10:
        raise UsageError(
            f"the priority of task {task.id!r} is {task.priority!r}; it must be a whole number from 1 to 10"
        )
    if isinstance(task.max_retries, bool) or not isinstance(task.max_retries, int) or task.max_retries < 0:
        raise UsageError(f"max_retries of task {task.id!r} is {task.max_retries!r}; it must be 0 or more")
    given["depends_on"] = dependencies_from(task.depends_on)
    given["tags"] = _words(task.tags, f"tags of task {task.id!r}")
    given["capabilities"] = tuple(sorted(set(_words(task.capabilities, f"capabilities of task {task.id!r}"))))
    given |= {name: moment(given[name]) for name in ("not_before", "deadline")}
    if task.payload is not None:
        to_json(task.payload, f"the payload of task {task.id!r}")
    return Task(**given)


def _words(found: Iterable[str], what: str) -> tuple[str, ...]:
    if not isinstance(found, Iterable):
        raise UsageError(f"the {what} are {found!r}; give a list of strings; nothing was added")
    if isinstance(found, str):
        raise UsageError(f"the {what} are one string, {found!r}; give a list of strings; nothing was added")
    words = tuple(found)
    for word in words:
        refuse_odd(word, f"one of the {what}")
    return words


def dependencies_from(found: Iterable[str | Dep | Task]) -> tuple[Dep, ...]:
    """Dependencies as a task keeps them: one for each task, the last word on it counts."""
    if isinstance(found, str | Dep | Task):
        found = [found]
    if not isinstance(found, Iterable):
        raise UsageError(f"the dependencies are {found!r}; give a list of ids or Dep; nothing was changed")
    deps: dict[str, Dep] = {}
    for one in found:
        dep = one if isinstance(one, Dep) else Dep(one.id if isinstance(one, Task) else one)
        if dep.on_failure not in ("skip", "fail", "run"):
            raise UsageError(
                f"on_failure of the dependency on {dep.id!r} is {dep.on_failure!r}: skip, fail or run"
            )
        refuse_odd(dep.id, "the id of a dependency")
        deps[dep.id] = dep
    return tuple(deps.values())


def refuse_odd(text: object, what: str) -> str:
    """Refuse what is no string or holds control characters: they part the fields of an event where it is hashed."""
    if not isinstance(text, str):
        raise UsageError(f"{what} is {text!r}; it must be a string; nothing was changed")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in text):
        raise UsageError(f"{what}, {text!r}, has control characters in it; nothing was changed")
    return text


# -- events --


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One thing that happened to a task; never changed."""

    #: grows with every event of the ledger
    seq: int
    session: str
    task: str
    #: number among the events of its task, from 1
    n: int
    #: created, moved, progress, checkpoint, artifact, depends, usage, note; others may come
    kind: str
    #: states before and after; equal when the state did not change, the first empty for `created`
    from_state: str
    to_state: str
    actor: str
    #: the program that reported it
    source: str
    stage: str
    #: `set` and `add`: fields of the task; `why`; `op`: the operation
    data: dict[str, Any]
    at: datetime
    #: sha256 of the hash of the event before and of everything above but `seq`
    hash: str = ""
    #: `data` as it was written, which is what was hashed
    text: str = field(default="", compare=False, repr=False)

    @property
    def why(self) -> str:
        """The reason that was given, or that the ledger had."""
        return str(self.data.get("why", ""))

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "text"}


#: in the order in which they are kept and hashed
EVENT_COLUMNS: Final = (
    "session", "task", "n", "kind", "from_state", "to_state", "actor", "source", "stage", "at", "data",
)  # fmt: skip


def hash_of(before: str, values: Sequence[Any]) -> str:
    """What an event is sealed with: `values` are its columns, `before` the hash of the event before it."""
    return hashlib.sha256("\x1f".join([before, *map(str, values)]).encode()).hexdigest()


def apply(task: Task | None, event: TaskEvent) -> Task:
    """The task after the event; None before the first."""
    data = upcast(event.data)
    changes: dict[str, Any] = dict(_read_fields(data.get("set", {})))
    if task is None:
        task = Task(session=event.session, created_at=event.at, **changes)
    for name, item in data.get("add", {}).items():
        if name in _KNOWN:
            changes[name] = _added(getattr(task, name), item)
    changes.update(version=event.n)
    if event.from_state != event.to_state:
        changes.update(_moved(task, TaskState(event.to_state), event))
    return replace(task, **changes)


def _added(before: Any, item: Any) -> Any:
    """An entry to a list, or an amount to a sum."""
    return (*before, item) if isinstance(before, tuple) else before + item


def _moved(task: Task, to: TaskState, event: TaskEvent) -> dict[str, Any]:
    """What a change of state says about times."""
    changes: dict[str, Any] = {
        "state": to, "changed_at": event.at, "changed_by": event.actor, "reason": str(event.data.get("why", ""))
    }  # fmt: skip
    if task.active_since is not None:
        changes["worked"] = task.worked + max(0.0, (event.at - task.active_since).total_seconds())
        changes["active_since"] = None
    if to == TaskState.ASSIGNED:
        changes["assigned_at"] = event.at
    if to == TaskState.ACTIVE:
        changes["active_since"] = event.at
        changes["started_at"] = task.started_at or event.at
    changes["completed_at"] = event.at if to in ENDED else None
    if to in (TaskState.PENDING, TaskState.BLOCKED, TaskState.BACKLOG):
        changes["assignee"] = ""
    return changes


# -- what callers hand in and get --


@dataclass(frozen=True, slots=True)
class Claim:
    """That an agent has a task until its lease lapses; whoever has it may do with the task what a holder may.

    `token` is new for each claim: one that was given up can never be taken for its successor.
    """

    task: Task
    agent: str
    token: str
    #: seconds that a silence may last; renewed by `heartbeat`
    lease: float

    @property
    def id(self) -> str:
        """The task's."""
        return self.task.id

    @classmethod
    def of(cls, task_id: str, agent: str, token: str, lease: float = 300.0) -> Claim:
        """A claim that an earlier process was given, by what that process kept of it.

        Its task has an id and nothing else; whether the claim is still good the ledger says when it is used.
        """
        return cls(Task(task_id), agent, token, lease)


@dataclass(frozen=True, slots=True)
class StatusEvent:
    """What a program reports about a request under its own names, for `TaskLedger.write_event`."""

    #: a state under the program's own name (RECEIVED, RUNNING, …) or ours
    state: str
    #: who reports it
    actor: str
    #: the program that it comes from
    source: str = ""
    #: the request: the id of its task, which is made when it is first heard of
    req: str = ""
    stage: str = ""
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as those see it that look: who and where it is, and what came of its tasks."""

    #: new for each start of a worker
    id: str
    agent: str
    host: str
    pid: int
    #: of the tasks that it takes; `*`: all
    types: tuple[str, ...]
    concurrency: int
    #: tasks that ended well, and runs that failed
    done: int = 0
    failed: int = 0
    #: it said that it ends
    ended: bool = False
    started_at: datetime | None = None
    seen_at: datetime | None = None
    #: seen lately, and not ended
    alive: bool = True
    #: ids of the tasks that its agent has
    doing: tuple[str, ...] = ()

    #: seconds between two of its signs of life; after three without one it is taken for dead
    EVERY: ClassVar[float] = 5.0

    @property
    def success_rate(self) -> float | None:
        """Of the runs that ended, 0 to 1; None before the first."""
        runs = self.done + self.failed
        return self.done / runs if runs else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        kept = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return {**kept, "success_rate": self.success_rate}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> WorkerInfo:
        """What `to_dict` gave."""
        known = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        times = {name: moment(known.get(name)) for name in ("started_at", "seen_at")}
        return cls(**{**known, **times, "types": tuple(known["types"]), "doing": ()})


def fraction(value: float) -> float:
    """A progress from 0 to 1; raises `UsageError`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= 1
        or math.isnan(value)
    ):
        raise UsageError(f"progress is {value!r}; it must be a number from 0 to 1; nothing was changed")
    return float(value)
