"""Whether a ledger of tasks still is what its operations wrote.

Every task is replayed from its events and compared with its snapshot, every event is checked against the table of
transitions and against the hash of the one before it, and the number of open dependencies against the states of those.
Memory stays the same at any size. Work may go on meanwhile: what looks wrong is looked at again until two looks agree.

The hashes are not keyed. Whoever may write to the store and recomputes all that follows, or removes a task without a
trace, is not found; for that, keep an export elsewhere and compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ledger import StoreError
from ledger_tasks.book import Book, Row, TaskStore, Wanted, columns_of
from ledger_tasks.model import Task, TaskEvent, apply, hash_of, plain
from ledger_tasks.sql import filed_as
from ledger_tasks.states import ENDED, HELD, LEASED, LOST, NEXT, TaskState

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

T = TypeVar("T")
_PAGE: Final = 200
#: ids of tasks that were found to be there; forgotten when there are more
_REMEMBERED: Final = 50_000
_MOST_FAULTS: Final = 1_000
#: seconds before each look at what seemed wrong
_PAUSES: Final = (0.0, 0.001, 0.01, 0.1, 0.5)
_STATES: Final = frozenset(state.value for state in TaskState)
#: what a tampered event or snapshot may raise when it is read
UNREADABLE: Final = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found; true if nothing is wrong."""

    #: how many were looked at
    tasks: int
    events: int
    #: what is wrong, in sentences; at most a thousand, and then how many more
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"ok": self.ok, "tasks": self.tasks, "events": self.events, "faults": list(self.faults)}


def verify(ledger: TaskLedger, all_sessions: bool = False) -> Report:  # noqa: FBT001, FBT002 - as its method has it
    """Prove that every snapshot is what its events add up to, and that no event was altered."""
    store = getattr(ledger.store, "primary", ledger.store)  # a cache is no witness
    store.forget()  # nor is a copy in memory
    sessions = [ledger.session]
    if all_sessions:
        sessions = sorted(store.read(ledger.session, lambda book: book.sessions()))
    found = [_Inspection(store, session).report() for session in sessions]
    faults = [fault for report in found for fault in report.faults]
    return Report(sum(r.tasks for r in found), sum(r.events for r in found), _shortened(faults))


def _shortened(faults: Sequence[str]) -> tuple[str, ...]:
    more = len(faults) - _MOST_FAULTS
    return tuple(faults) if more <= 0 else (*faults[:_MOST_FAULTS], f"… and {more} more")


# -- one event, one snapshot --


def event_faults(task: Task | None, before: str, event: TaskEvent) -> Iterator[str]:
    """What is wrong with an event that follows on a task as it was; `before` is the hash of the event before."""
    where = f"event {event.n} of task {event.task!r}"
    expected = (task.version if task else 0) + 1
    if event.n != expected:
        yield f"{where} comes where event {expected} should be"
    start = task.state.value if task else ""
    if event.from_state != start:
        yield f"{where} leads from {event.from_state or 'nothing'}, but the task was {start or 'not there'}"
    if not _is_legal(event):
        yield f"{where} leads from {event.from_state or 'nothing'} to {event.to_state}, which is no legal move"
    if event.hash != hash_of(before, columns_of(event)):
        yield f"{where} was altered: its hash does not follow from it and the event before"


def _is_legal(event: TaskEvent) -> bool:
    if event.to_state not in _STATES or event.from_state not in _STATES:
        return not event.from_state and event.to_state in (TaskState.PENDING, TaskState.BACKLOG)
    return (
        event.from_state == event.to_state or TaskState(event.to_state) in NEXT[TaskState(event.from_state)]
    )


def snapshot_faults(row: Row, replayed: Task, last: str) -> Iterator[str]:
    """How a snapshot differs from what its events add up to; `last` is the hash of the last one."""
    task = row.task
    if task != replayed:
        odd = [name for name, value in task.to_dict().items() if value != plain(getattr(replayed, name))]
        told = f"version {task.version}, events up to {replayed.version}; differing: {', '.join(odd)}"
        yield f"the snapshot of task {task.id!r} is not what its events add up to ({told})"
    if row.hash != last:
        yield f"the snapshot of task {task.id!r} has another hash than its last event"


def held_faults(row: Row) -> Iterator[str]:
    """What cannot be true of who holds a task, and of its lease."""
    task = row.task
    if row.until and (task.state not in LEASED or not row.lease > 0):
        yield f"a lease runs on task {task.id!r}, which is {task.state.name}"
    if row.claim and task.state not in HELD | ENDED:
        yield f"task {task.id!r} is {task.state.name} and has a claim"


def is_open(on_failure: str, state: TaskState) -> bool:
    """Whether a dependency that is in this state is still waited for."""
    return state != TaskState.DONE and not (on_failure == "run" and state in LOST)


# -- one session --


class _Inspection:
    """The tasks of one session, a page at a time."""

    def __init__(self, store: TaskStore, session: str) -> None:
        self._store, self._session = store, session
        self._way: Callable[..., Any] = store.read
        self._tasks = self._events = 0
        self._faults: list[str] = []
        self._there: set[str] = set()

    def report(self) -> Report:
        for rows in self._pages():
            self._tasks += len(rows)
            for row in rows:
                self._blame(self._believed(partial(self._story, row.task.id, [row])))
                self._events += row.task.version
            names = [row.task.id for row in rows]
            if len(self._there) < _REMEMBERED:
                self._there.update(names)
            self._blame(self._believed(partial(self._read, partial(_graph, names=names, known=[rows]))))
        self._find_orphans()
        return Report(self._tasks, self._events, tuple(self._faults))

    def _blame(self, faults: Iterable[str]) -> None:
        self._faults += faults

    def _read(self, look: Callable[[Any], T]) -> T:
        found: T = self._way(self._session, look)
        return found

    def _pages(self) -> Iterator[list[Row]]:
        wanted = Wanted()
        while rows := self._read(lambda book: book.page(wanted, _PAGE)):
            yield rows
            wanted.after = rows[-1].num

    def _believed(self, look: Callable[[], tuple[object, list[str]]]) -> list[str]:
        """What is wrong by two looks that saw the same, and by one while nobody writes: moving on is no fault."""
        before: tuple[object, list[str]] = None, []
        for pause in _PAUSES:
            found = look()
            if not found[1] or found == before:
                break
            before = found
            time.sleep(pause)
        return self._confirmed(look, found[1]) if found[1] else []

    def _confirmed(self, look: Callable[[], tuple[object, list[str]]], faults: list[str]) -> list[str]:
        """The faults, if a transaction sees them too: a server may show events to readers later than snapshots."""
        self._way = self._store.write
        try:
            return look()[1]
        except StoreError:  # it can be read only: what was seen twice stands
            return faults
        finally:
            self._way = self._store.read

    def _story(self, name: str, known: list[Row]) -> tuple[object, list[str]]:
        """What the events of a task make of it, against its snapshot, which the first look knows."""
        row = known.pop() if known else self._row(name)
        if row is None:
            return name, [f"the snapshot of task {name!r} was removed"]
        task: Task | None = None
        seal = ""
        faults: list[str] = []
        for event in self._events_of(name):
            faults += event_faults(task, seal, event)
            try:
                task, seal = apply(task, event), event.hash
            except UNREADABLE as error:
                return seal, [*faults, f"event {event.n} of task {name!r} cannot be read: {error!r}"]
            if task.version == row.task.version:
                faults += [*snapshot_faults(row, task, seal), *held_faults(row)]
        version = task.version if task else 0
        if version != row.task.version and not self._moved_on(name, row.task.version, version):
            faults.append(f"task {name!r} has version {row.task.version}, and events up to {version}")
        return (seal, row.hash), faults

    def _moved_on(self, name: str, before: int, version: int) -> bool:
        """Whether the task has had those events by now that its snapshot did not know."""
        row = self._row(name)
        return row is not None and row.task.version >= version > before

    def _row(self, name: str) -> Row | None:
        rows = self._read(lambda book: book.page(Wanted(ids=frozenset([name])), 1))
        return rows[0] if rows else None

    def _events_of(self, name: str | None) -> Iterator[TaskEvent]:
        seq = 0
        while page := self._read(partial(_events, after=seq, name=name)):
            yield from page
            seq = page[-1].seq

    def _find_orphans(self) -> None:
        """Events whose task has no snapshot."""
        there = self._there
        gone: dict[str, None] = {}
        for event in self._events_of(None):
            name = event.task
            if name in there or name in gone:
                continue
            if len(there) > _REMEMBERED:
                there.clear()
            if self._row(name) is None and len(gone) < _MOST_FAULTS:
                gone[name] = None
            else:
                there.add(name)
        self._blame(f"task {name!r} has events and no snapshot: it was removed" for name in gone)


def _events(book: Book, after: int, name: str | None) -> list[TaskEvent]:
    return book.events(after, _PAGE, name)


def _graph(book: Book, names: Sequence[str], known: list[list[Row]]) -> tuple[object, list[str]]:
    """What is wrong with the dependencies of these tasks, and with the states by which they are found."""
    rows = {row.task.id: row for row in known.pop()} if known else _rows(book, names)
    edges: dict[str, dict[str, str]] = {name: {} for name in rows}
    for edge in book.dependencies(names):
        edges.setdefault(edge.task, {})[edge.on] = edge.on_failure
    on = rows | _rows(book, [name for those in edges.values() for name in those if name not in rows])
    faults = [fault for row in rows.values() for fault in _open_faults(row, edges[row.task.id], on)]
    seen = {name: row.task.version for name, row in on.items()}
    return seen, [*faults, *_filing_faults(book, rows)]


def _open_faults(row: Row, edges: dict[str, str], on: dict[str, Row]) -> Iterator[str]:
    task = row.task
    for dep in task.depends_on:
        if edges.get(dep.id) != dep.on_failure:
            yield f"task {task.id!r} depends on {dep.id!r} (on_failure={dep.on_failure}), and its edge is not so"
    own = {dep.id for dep in task.depends_on}
    for name in edges:
        if name not in own and (name not in on or on[name].task.parent != task.id):
            yield f"task {task.id!r} waits for {name!r}, which it does not depend on"
    count = sum(is_open(how, on[name].task.state) for name, how in edges.items() if name in on)
    if count != task.waiting:
        yield f"task {task.id!r} is said to wait for {task.waiting} tasks, and {count} of those are open"


def _filing_faults(book: Book, rows: dict[str, Row]) -> Iterator[str]:
    filed = book.filed([*rows])
    for name, row in rows.items():
        said, found = filed_as(row.task), filed.get(name, {})
        if 0 < said["due"] <= book.now and not found.get("due"):
            said["due"] = 0
        odd = [column for column, value in found.items() if value != said[column]]
        if odd and found["version"] == row.task.version:
            yield f"task {name!r} is filed under another {', '.join(odd)} than its snapshot says"


def _rows(book: Book, names: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    wanted = list(dict.fromkeys(names))
    for start in range(0, len(wanted), _PAGE):
        some = frozenset(wanted[start : start + _PAGE])
        found |= {row.task.id: row for row in book.page(Wanted(ids=some), _PAGE)}
    return found
