"""A store of tasks as the operations see it: one transaction's view, and who opens it.

Whatever a transaction reads it may rely on until it has committed: what it then writes is written whole, or not at
all and the work is done again on what is there by then. So the operations in `operations.py` read, judge and write
as if nobody else were there, and stand there once for all stores.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import ledger
from ledger_tasks.errors import InvalidTransition
from ledger_tasks.model import Task, TaskEvent, WorkerInfo, apply, at, hash_of, micros_of, plain, to_json
from ledger_tasks.states import NEXT, TaskState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """A task as a store keeps it: with what is nobody's business but the holder's."""

    task: Task
    #: the store's own number of it, in the order in which tasks were added
    num: int = 0
    #: token of the claim that has it, or had it last
    claim: str = ""
    #: seconds of that claim's lease
    lease: float = 0.0
    #: until when, in microseconds UTC; 0: no lease runs
    until: int = 0
    #: the same on the monotonic clock of that boot, where the store is one machine's
    mono: int = 0
    boot: str = ""
    #: the last operation that moved it, and who asked for that with which claim
    op: str = ""
    #: token of the last request that recorded something without moving it
    said: str = ""
    #: hash of its latest event
    hash: str = ""


def by_urgency(row: Row) -> tuple[int, int]:
    """Sorts by priority, then age."""
    return -row.task.priority, row.num


class Edge(NamedTuple):
    """That one task waits for another."""

    task: str
    on: str
    on_failure: str


class Posting(NamedTuple):
    """A delivery as a store keeps it."""

    #: the store's own number of it; 0 before it has one
    num: int
    recipient: str
    channel: str
    key: str
    #: reserved, sending, sent, failed or suppressed
    outcome: str
    why: str
    #: fingerprint of the guarded call that sends it
    call: str
    #: when it came to this, in microseconds UTC
    at: int
    #: until when a reservation holds; above 0 as long as nothing is settled
    until: int


@dataclass(slots=True)
class Wanted:
    """Which tasks to list; what is empty does not matter."""

    states: frozenset[TaskState] = frozenset()
    types: frozenset[str] = frozenset()
    assignee: str = ""
    parent: str | None = None
    tag: str = ""
    text: str = ""
    #: after the task with this number
    after: int = 0
    newest_first: bool = False
    #: None: of all sessions
    session: str | None = ""
    ids: frozenset[str] = field(default_factory=frozenset)
    #: only those that have open dependencies
    waiting: bool = False


class Book(ABC):
    """What a transaction reads and writes. All of it is about one session, except where it says otherwise."""

    session: str
    #: whether the work is done a second time, because nobody knows whether its first commit happened
    again: bool = False

    @property
    @abstractmethod
    def now(self) -> int:
        """UTC microseconds by the clock that decides leases here."""

    # -- one task --

    @abstractmethod
    def row(self, task_id: str) -> Row | None:
        """The task, held against others until the end of the transaction."""

    @abstractmethod
    def claimed(self, token: str) -> Row | None:
        """The task that this claim has or had last."""

    @abstractmethod
    def insert(self, row: Row, event: TaskEvent) -> None:
        """A new task with its first event; its dependencies are written by `connect`."""

    @abstractmethod
    def save(self, row: Row, events: Sequence[TaskEvent] = ()) -> None:
        """The task as it is now, and what happened to it."""

    def leased(self, row: Row) -> Row:
        """The row with its lease begun anew."""
        return replace(row, until=self.now + int(row.lease * 1e6))

    @abstractmethod
    def renew(self, row: Row) -> None:
        """Keep the lease of the row, and nothing else of it."""

    # -- the graph --

    @abstractmethod
    def hold_graph(self) -> None:
        """Let nobody else add dependencies until the end of the transaction."""

    @abstractmethod
    def connect(self, edges: Iterable[Edge]) -> None:
        """New dependencies between tasks that are there, each open or not as the task it is on says."""

    @abstractmethod
    def dependencies(self, task_ids: Sequence[str]) -> Iterator[Edge]:
        """What these tasks wait or waited for."""

    @abstractmethod
    def dependents(self, task_ids: Sequence[str], *, waiting: bool = False) -> Iterator[Edge]:
        """What waits or waited for these tasks; `waiting`: only what has not ended."""

    @abstractmethod
    def release(self, task_id: str, only: str | None = None) -> list[tuple[str, TaskState]]:
        """One dependency less for each dependent (`only`: for edges with that `on_failure`); who has none now."""

    @abstractmethod
    def reopen(self, task_id: str, only: str | None = None) -> None:
        """The opposite: one dependency more."""

    # -- choosing --

    @abstractmethod
    def ready(self, agent_can: Sequence[str] | None, types: Sequence[str] | None, limit: int) -> list[Row]:
        """Tasks that can be claimed now, by priority and then age. None: whatever they need, of whatever type."""

    @abstractmethod
    def first(self, agent_can: Sequence[str] | None, types: Sequence[str] | None) -> Row | None:
        """The first of these, held; one that somebody else is claiming at this moment is passed over."""

    @abstractmethod
    def lapsed(self, silent: float | None = None, limit: int = 100) -> list[Row]:
        """Held tasks whose lease has run out, or (`silent`) whose holder has said nothing for so many seconds."""

    @abstractmethod
    def page(self, wanted: Wanted, limit: int) -> list[Row]:
        """A page of tasks, in the order in which they were added."""

    @abstractmethod
    def filed(self, task_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By what each of these tasks is found, apart from its document: state, lane, type, and so on."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """How many tasks are in each state."""

    @abstractmethod
    def events(
        self, after: int, limit: int, task_id: str | None = None, *, every: bool = False
    ) -> list[TaskEvent]:
        """A page of events by sequence, of one task or all; `every`: of all sessions."""

    @abstractmethod
    def last_seq(self) -> int:
        """The number of the newest event of all sessions, 0 if there is none."""

    def stamp(self) -> str | None:
        """A text that is the same only as long as no event was added; None: this store cannot tell that for certain."""
        return None

    @abstractmethod
    def pending(self) -> tuple[int, int, int]:
        """PENDING tasks that wait for no other: how many are due, how many are not, and when the first will be."""

    # -- deliveries --

    @abstractmethod
    def posting(self, num: int) -> Posting | None:
        """The delivery with this number."""

    @abstractmethod
    def postings(self, after: int, limit: int) -> list[Posting]:
        """A page of deliveries, in the order in which they were asked for."""

    @abstractmethod
    def postings_to(self, recipient: str, channel: str, key: str, since: int) -> list[Posting]:
        """What there may be to keep from sending: the last two with that key, what is not settled, the last one sent."""

    @abstractmethod
    def post(self, posting: Posting) -> None:
        """Keep a new delivery, or what became of one."""

    # -- workers --

    @abstractmethod
    def beat(self, worker: WorkerInfo, forget: int) -> None:
        """Keep what is known of a worker; those that were seen last before `forget` (microseconds UTC) go."""

    @abstractmethod
    def workers(self) -> list[WorkerInfo]:
        """Those of this session, newest first."""

    @abstractmethod
    def sessions(self) -> dict[str, dict[str, Any]]:
        """Every session, with what was kept about it."""


class TaskStore(ABC):
    """Where tasks are kept. `read` and `write` call a function with a `Book`, maybe more than once."""

    #: for people, without a password
    address: str

    @abstractmethod
    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """What the function makes of a view in which nothing can be changed."""

    @abstractmethod
    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """Do the work in one transaction and return after its commit; it may be done again, see `Book.again`."""

    def is_begun(self) -> bool:
        """Whether there is anything to look at; makes nothing."""
        return True

    def forget(self) -> None:  # noqa: B027 - most have no copy
        """Read anew, the next time, what is only a copy here."""

    @abstractmethod
    def calls(self) -> ledger.Store:
        """The store of the guard that goes with it."""

    @abstractmethod
    def close(self) -> None:
        """End what is open; it opens again when it is used again."""


# -- one step of one task --


def stepped(
    row: Row,
    kind: str,
    *,
    moment: int,
    actor: str,
    op: str = "",
    to: TaskState | None = None,
    why: str = "",
    source: str = "",
    stage: str = "",
    fields: dict[str, Any] | None = None,
    adds: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> tuple[Row, TaskEvent]:
    """The row after one more event, and the event. Raises `InvalidTransition`; the one place that moves a task."""
    task = row.task
    if to is not None and to not in NEXT[task.state]:
        raise InvalidTransition(task.id, task.state, to, why)
    changes = {name: plain(value) for name, value in (fields or {}).items()}
    told: dict[str, Any] = {
        "set": changes,
        "add": adds,
        "why": why,
        "op": op.partition(":")[0],
        **(data or {}),
    }
    event = _sealed(row, kind, task.state, to or task.state, moment, actor, source, stage, told)
    return replace(row, task=_kept(row.task, event), op=op or row.op, hash=event.hash), event


def born(
    task: Task, session: str, moment: int, *, who: Any, op: str, state: TaskState
) -> tuple[Row, TaskEvent]:
    """The row of a new task, and its first event."""
    given = {name: value for name, value in task.said().items() if name not in _NOT_GIVEN}
    empty = Row(replace(_NOTHING, id=task.id, session=session))
    told = {"set": given, "op": "add", "token": op.partition(":")[2]}
    event = _sealed(empty, "created", None, state, moment, who.actor, who.source, "", told)
    return Row(_kept(None, event), op=op, hash=event.hash), event


def _kept(task: Task | None, event: TaskEvent) -> Task:
    kept = apply(task, event)
    return kept if task is None else replace(kept, waiting=task.waiting, blocks=task.blocks)


def _sealed(
    row: Row, kind: str, start: TaskState | None, end: TaskState, moment: int, actor: str, source: str, stage: str,
    data: dict[str, Any],
) -> TaskEvent:  # fmt: skip
    task = row.task
    told = {name: value for name, value in data.items() if value not in (None, "", {})}
    text = to_json(told, f"what was reported of task {task.id!r}")
    kept = json.loads(text)  # what a replay reads: a tuple is a list there, and a key a string
    event = TaskEvent(
        0, task.session, task.id, task.version + 1, kind, start.value if start else "", end.value, actor, source,
        stage, kept, at(moment), text=text,
    )  # fmt: skip
    return replace(event, hash=hash_of(row.hash, columns_of(event)))


def columns_of(event: TaskEvent) -> tuple[Any, ...]:
    """An event as it is kept, in the order of `EVENT_COLUMNS`."""
    return (
        event.session, event.task, event.n, event.kind, event.from_state, event.to_state, event.actor, event.source,
        event.stage, micros_of(event.at), event.text,
    )  # fmt: skip


_NOTHING = Task(id="")
_NOT_GIVEN = frozenset({"session", "state", "version"})
