"""Looking at tasks where there may be a hundred thousand: pages newest first, trees, graphs, what agents did.

Every look is short and bounded: it reads so many rows, or for so long, and says what it left out. It is SQL that SQLite
and PostgreSQL have in common; nothing here writes, or makes a table. A task whose record is longer than a list can show
comes without its texts: `TaskReader.row` has all of it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar

import ledger
from ledger import UsageError
from ledger_tasks import operations as ops
from ledger_tasks.book import Row, TaskStore, Wanted
from ledger_tasks.errors import NoSuchTask
from ledger_tasks.model import Task, WorkerInfo, at, plain
from ledger_tasks.sql import SqlBook, as_in_doc, escaped
from ledger_tasks.states import HELD, LEASED, LOST, TaskState
from ledger_tasks.stores import tasks_of

T = TypeVar("T")
_S = TaskState
#: a longer record is not read for a list
_LONGEST_DOC: Final = 50_000
_SEEN: Final = (
    "num, session, id, state, type, priority, assignee, parent, open,"
    f" CASE WHEN LENGTH(doc) <= {_LONGEST_DOC} THEN doc ELSE '' END"
)
_FIRST_WINDOW, _LAST_WINDOW = 2_000, 8_000
_MOST_SESSIONS, _CHOICES_OF = 200, 2_000
#: how many parts that are not shown are counted for one tree
_MOST_COUNTED: Final = 20_000
_MOST_PARENTS: Final = 300
#: how many tasks that somebody has are looked through for what workers are doing
_MOST_DOING: Final = 1_000
#: a number above that of any event of a task
_LAST: Final = 2**31 - 1
#: how many events are looked through for one move
_EVENTS_PER_MOVE: Final = 10


class Seen(NamedTuple):
    """A task in a list."""

    num: int
    task: Task
    #: False: its record is too long for a list, and the task has only what stands in columns
    is_whole: bool = True

    def to_dict(self) -> dict[str, Any]:
        """What a list shows of it, as JSON."""
        task = self.task
        told = {name: plain(getattr(task, name)) for name in _LISTED}
        return {"label": task.label, **told, "error": last_error(task), "whole": self.is_whole}


_LISTED: Final = (
    "session", "id", "type", "priority", "tags", "state", "reason", "waiting", "assignee", "parent", "progress",
    "stage", "retries", "max_retries", "not_before", "deadline", "created_at", "started_at", "completed_at",
    "changed_at", "changed_by", "version",
)  # fmt: skip


def last_error(task: Task) -> str:
    """What its newest failure said, "" if there is none."""
    return str(task.errors[-1].get("error", "")) if task.errors else ""


@dataclass(frozen=True, slots=True)
class TaskPage:
    """A page of tasks, newest first."""

    tasks: list[Seen]
    #: the page after it begins below the task with this number; 0: there is none
    cursor: int
    #: False: the time was over before the page was full
    complete: bool = True
    #: when the task was added up to which was looked
    reached: datetime | None = None


class Happened(NamedTuple):
    """An event in brief: its data may be long."""

    seq: int
    session: str
    task: str
    kind: str
    from_state: str
    to_state: str
    actor: str
    stage: str
    at: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {name: plain(value) for name, value in self._asdict().items()}


_HAPPENED: Final = ", ".join(Happened._fields)


class Told(NamedTuple):
    """An event of one task; `data` is None where it is too long to show."""

    seq: int
    n: int
    kind: str
    from_state: str
    to_state: str
    actor: str
    source: str
    stage: str
    at: datetime
    data: dict[str, Any] | None

    @property
    def why(self) -> str:
        """The reason that was given, or that the ledger had."""
        return str((self.data or {}).get("why", ""))

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {name: plain(value) for name, value in self._asdict().items()}


class Twig(NamedTuple):
    """A task in a tree."""

    seen: Seen
    #: how deep it stands below the root
    level: int
    #: 0 to 1: of a task with parts what they have done, on the average
    progress: float
    #: how many parts it has, and how many of these are done; where there are very many, of the first ones
    parts: int
    done: int
    #: parts that are not shown
    hidden: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        told = self._asdict()
        return {"task": told.pop("seen").to_dict(), **told}


class Link(NamedTuple):
    """In a graph, that one task waits for another."""

    task: int
    on: int
    on_failure: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Tasks and their dependencies: `column` says in which column each stands, after all that it depends on."""

    tasks: list[Seen]
    links: list[Link]
    column: dict[int, int]
    #: whether there are neighbours that were left out
    is_cut: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "tasks": [
                {"num": seen.num, "column": self.column[seen.num], **seen.to_dict()} for seen in self.tasks
            ],
            "links": [link._asdict() for link in self.links],
            "cut": self.is_cut,
        }


class Bar(NamedTuple):
    """That an agent had a task in a state, from then until then."""

    session: str
    id: str
    state: str
    begin: datetime
    #: None: it still does
    end: datetime | None
    #: the state after it, "" while there is none
    then: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {name: plain(value) for name, value in self._asdict().items()}


@dataclass(frozen=True, slots=True)
class Lane:
    """What one agent did, oldest first."""

    agent: str
    bars: list[Bar]
    done: int
    failed: int
    #: tasks that it has now
    held: int

    def busy(self, now: datetime) -> float:
        """Seconds for which it worked on tasks, each counted for itself."""
        return sum(
            ((bar.end or now) - bar.begin).total_seconds() for bar in self.bars if bar.state == _S.ACTIVE
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """What agents did between two times, who was last at work first."""

    since: datetime
    until: datetime
    lanes: list[Lane]
    #: agents that are left out
    more: int
    #: False: the newest moves that were looked at begin later than was asked for
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "since": plain(self.since), "until": plain(self.until), "more": self.more, "complete": self.complete,
            "agents": [
                {
                    "agent": lane.agent, "done": lane.done, "failed": lane.failed, "held": lane.held,
                    "busy_seconds": round(lane.busy(self.until), 3), "bars": [bar.to_dict() for bar in lane.bars],
                }
                for lane in self.lanes
            ],
        }  # fmt: skip


class SeenWorker(NamedTuple):
    """A worker, and what it is doing."""

    session: str
    worker: WorkerInfo
    doing: list[Seen]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        doing = [seen.to_dict() for seen in self.doing]
        return {"session": self.session, **self.worker.to_dict(), "doing": doing}


def reader_of(store: ledger.Store) -> TaskReader | None:
    """What looks at the tasks beside the calls of a store; None if it is of a kind that keeps none."""
    try:
        return TaskReader(tasks_of(store))
    except UsageError:
        return None


class TaskReader:
    """What there is to see in the tasks of one store, of one session or (None) of all."""

    def __init__(self, store: TaskStore) -> None:
        self.store = store
        self._is_begun = False

    def is_begun(self) -> bool:
        """Whether there are tables of tasks: looking makes none."""
        if not self._is_begun:
            self._is_begun = self.store.is_begun()
        return self._is_begun

    def is_empty(self) -> bool:
        """Whether there is no task at all."""
        return not self.is_begun() or not self.ask("SELECT num FROM tasks LIMIT 1")

    def _look(self, look: Callable[[SqlBook], T], session: str | None = None) -> T:
        if not self.is_begun():
            raise NoSuchTask(
                f"there is no task in {self.store.address} yet; add one with TaskLedger.add_task"
            )
        return self.store.read(session or "", look)

    def ask(self, sql: str, **values: Any) -> list[Any]:
        """The rows of a statement."""
        return self._look(lambda book: book.do(sql, **values))

    # -- sums and choices --

    def sessions(self) -> list[str]:
        """The names of the first two hundred sessions."""
        sql = "SELECT session FROM task_sessions ORDER BY session LIMIT :limit"
        return [name for (name,) in self.ask(sql, limit=_MOST_SESSIONS)]

    def newest_session(self) -> str:
        """The session of the newest task."""
        found = self.ask("SELECT session FROM tasks ORDER BY num DESC LIMIT 1")
        return str(found[0][0]) if found else "main"

    def counts(self, session: str | None = None) -> dict[TaskState, int]:
        """How many tasks are in each state."""
        test = "" if session is None else " WHERE session = :session"
        found = dict(self.ask(f"SELECT state, COUNT(*) FROM tasks{test} GROUP BY state", session=session))
        return {state: found[state.value] for state in TaskState if state.value in found}

    def choices(self) -> tuple[list[str], list[str]]:
        """Types and agents of the newest tasks, for the fields of a filter."""
        rows = self.ask("SELECT type, assignee FROM tasks ORDER BY num DESC LIMIT :limit", limit=_CHOICES_OF)
        return sorted({kind for kind, _ in rows}), sorted({agent for _, agent in rows if agent})

    # -- pages --

    def page(self, wanted: Wanted, limit: int, seconds: float) -> TaskPage:
        """A page of tasks, newest first, below the number `wanted.after`; after so many seconds it is short."""
        before = wanted.after or self._newest() + 1
        is_narrow = wanted.types or wanted.assignee or wanted.text or wanted.tag or wanted.parent is not None
        sessions = (
            [wanted.session] if wanted.session is not None else self.sessions() if wanted.states else []
        )
        if not is_narrow and 0 < len(sessions) < _MOST_SESSIONS:
            found = [self._by_state(replace(wanted, session=name), before, limit + 1) for name in sessions]
            return self._page_of(sorted(itertools.chain(*found), reverse=True)[: limit + 1], limit)
        return self._search(wanted, before, limit, time.monotonic() + seconds)

    def _newest(self) -> int:
        return int(self.ask("SELECT COALESCE(MAX(num), 0) FROM tasks")[0][0])

    def _page_of(self, nums: Sequence[int], limit: int) -> TaskPage:
        tasks = self._named(nums[:limit])
        return TaskPage(tasks, tasks[-1].num if len(nums) > limit and tasks else 0)

    def _by_state(self, wanted: Wanted, before: int, limit: int) -> list[int]:
        """The newest of each state, which the index has in order, then the newest of all these."""
        sql = (
            "SELECT num FROM tasks WHERE session = :session AND state = :state AND num < :before"
            " ORDER BY num DESC LIMIT :limit"
        )
        values = {"session": wanted.session, "before": before, "limit": limit}
        states = wanted.states or TaskState

        def look(book: SqlBook) -> list[int]:
            return [num for state in states for (num,) in book.do(sql, state=state.value, **values)]

        return sorted(self._look(look), reverse=True)[:limit]

    def _named(self, nums: Iterable[int]) -> list[Seen]:
        """The tasks of these numbers, newest first."""
        inside = ", ".join(str(int(num)) for num in nums)
        if not inside:
            return []
        rows = self.ask(f"SELECT {_SEEN} FROM whole_tasks WHERE num IN ({inside}) ORDER BY num DESC")
        return [_seen(row) for row in rows]

    def _search(self, wanted: Wanted, before: int, limit: int, deadline: float) -> TaskPage:
        """Go back from the newest in growing windows, until the page is full or the time is over."""
        where, values = _conditions(wanted)
        sql = f"SELECT {_SEEN} FROM whole_tasks WHERE num >= :floor AND num < :before{where} ORDER BY num DESC LIMIT :limit"
        found: list[Seen] = []
        window = _FIRST_WINDOW
        while before > 1:
            floor, room = max(before - window, 1), limit + 1 - len(found)
            rows = [_seen(row) for row in self.ask(sql, floor=floor, before=before, limit=room, **values)]
            found += [seen for seen in rows if mentions(seen, wanted.text) and _has_tag(seen, wanted.tag)]
            # a window that was cut by its limit goes on below its last row
            before = rows[-1].num if len(rows) == room else floor
            if len(found) > limit:
                return TaskPage(found[:limit], found[limit - 1].num)
            if before > 1 and time.monotonic() > deadline:
                return TaskPage(found, before, complete=False, reached=self._added_at(before))
            window = min(2 * window, _LAST_WINDOW)
        return TaskPage(found, 0)

    def _added_at(self, before: int) -> datetime | None:
        rows = self.ask(f"SELECT {_SEEN} FROM whole_tasks WHERE num >= :num ORDER BY num LIMIT 1", num=before)
        return _seen(rows[0]).task.created_at if rows else None

    # -- one task --

    def row(self, session: str, task_id: str) -> Row:
        """All of a task. Raises `NoSuchTask`."""
        return self._look(lambda book: ops.find(book, task_id), session)

    def seen(self, session: str, task_id: str) -> Seen:
        """A task as a list has it. Raises `NoSuchTask`."""
        return self._seen_of(session, [task_id]).get(task_id) or _as_seen(self.row(session, task_id))

    def _seen_of(self, session: str, task_ids: Iterable[str]) -> dict[str, Seen]:
        sql = f"SELECT {_SEEN} FROM whole_tasks WHERE session = :session AND id = :id"

        def look(book: SqlBook) -> dict[str, Seen]:
            rows = [row for name in task_ids for row in book.do(sql, session=session, id=name)]
            return {seen.task.id: seen for seen in map(_seen, rows)}

        return self._look(look)

    def neighbours(self, num: int, limit: int) -> tuple[list[tuple[Seen, str]], list[tuple[Seen, str]]]:
        """What a task depends on and what depends on it, each with its on_failure; one more than `limit` at most."""
        links = self._look(lambda book: _links(book, [num], limit + 1))
        seen = {one.num: one for one in self._named({n for link in links for n in link[:2]})}
        before = [(seen[link.on], link.on_failure) for link in links if link.task == num]
        after = [(seen[link.task], link.on_failure) for link in links if link.on == num]
        return before, after

    def parts(self, session: str, parent: str, kind: str, limit: int) -> list[Seen]:
        """The first parts of a task that are of that type, in the order in which they were added."""
        sql = (
            f"SELECT {_SEEN} FROM whole_tasks WHERE session = :session AND parent = :parent AND parent <> ''"
            " AND type = :kind ORDER BY num LIMIT :limit"
        )
        rows = self.ask(sql, session=session, parent=parent, kind=kind, limit=limit)
        return [_seen(row) for row in rows]

    def ancestors(self, session: str, task: Task, limit: int = 20) -> list[Task]:
        """What it is a part of, the outermost first."""
        found: list[Task] = []
        parent = task.parent
        while parent and len(found) < limit:
            above = self.seen(session, parent).task
            found.append(above)
            parent = above.parent
        return found[::-1]

    # -- what happened --

    def last_seq(self) -> int:
        """The number of the newest event of all sessions, 0 if there is none."""
        return self._look(lambda book: book.last_seq()) if self.is_begun() else 0

    def news(self, after: int, limit: int) -> list[Happened]:
        """What happened after that number, oldest first."""
        sql = f"SELECT {_HAPPENED} FROM task_events WHERE seq > :after ORDER BY seq LIMIT :limit"
        return [_happened(row) for row in self.ask(sql, after=after, limit=limit)]

    def events(self, session: str, task_id: str, limit: int, before: int = 0) -> list[Told]:
        """The newest events of a task, below its event number `before`; newest first."""
        sql = (
            "SELECT seq, n, kind, from_state, to_state, actor, source, stage, at,"
            f" CASE WHEN LENGTH(data) <= {_LONGEST_DOC} THEN data ELSE '' END FROM task_events"
            " WHERE session = :session AND task = :task AND n < :before ORDER BY n DESC LIMIT :limit"
        )
        values = {"session": session, "task": task_id, "before": before or _LAST, "limit": limit}
        return [
            Told._make((*row[:8], at(row[8]), json.loads(row[9]) if row[9] else None))
            for row in self.ask(sql, **values)
        ]

    # -- trees --

    def roots(self, session: str, limit: int, after: str, seconds: float) -> tuple[list[Seen], str]:
        """Tasks that have parts and are no part themselves, by id; where the next page begins, "" if nowhere."""
        deadline = time.monotonic() + seconds
        roots: list[Seen] = []
        while names := self._parents(session, after):
            found = self._seen_of(session, names)
            roots += [found[name] for name in names if name in found and not found[name].task.parent]
            after = names[-1] if len(names) == _MOST_PARENTS else ""
            if len(roots) > limit:
                return roots[:limit], roots[limit - 1].task.id
            if not after or time.monotonic() > deadline:
                return roots, after
        return roots, ""

    def _parents(self, session: str, after: str) -> list[str]:
        """The next ids of tasks that have parts, each found by one step in the index."""
        least = "SELECT MIN(parent) FROM tasks WHERE session = :session AND parent <> ''"
        sql = (
            f"WITH RECURSIVE parents (id) AS (SELECT ({least} AND parent > :after) UNION ALL"
            f" SELECT ({least} AND tasks.parent > parents.id) FROM parents WHERE parents.id IS NOT NULL)"
            " SELECT id FROM parents WHERE id IS NOT NULL LIMIT :limit"
        )
        return [name for (name,) in self.ask(sql, session=session, after=after, limit=_MOST_PARENTS)]

    def tree(self, roots: Sequence[Seen], most: int, wide: int) -> list[Twig]:
        """Tasks with their parts and the parts of these, in the order of reading.

        Up to `most` tasks, and `wide` parts of each; what is not shown is counted.
        """
        return self._look(lambda book: _tree(book, roots, most, wide))

    # -- graphs --

    def around(self, num: int, most: int) -> Graph:
        """A task with what it depends on and what depends on it, near ones first."""
        return self._graph([num], most, keep={num})

    def graph(self, session: str, most: int) -> Graph:
        """Tasks that have dependencies: those that somebody has or that went wrong, what is next, then the newest."""
        return self._graph(self._seeds(session, most), most)

    def _seeds(self, session: str, most: int) -> list[int]:
        first = [frozenset(states) for states in (HELD, {_S.BLOCKED}, LOST - {_S.SKIPPED, _S.CANCELLED})]
        nums = [
            num
            for states in first
            for num in self._by_state(Wanted(states=states, session=session), 2**62, most // 4)
        ]
        ready = self._look(lambda book: book.ready(None, None, most // 4), session)
        newest = self._by_state(Wanted(session=session), 2**62, most)
        return list(dict.fromkeys([*nums, *(row.num for row in ready), *newest]))

    def _graph(self, seeds: Sequence[int], most: int, keep: Iterable[int] = ()) -> Graph:
        nums, links, is_cut = self._look(lambda book: _spread(book, seeds, most, keep))
        return Graph(self._named(nums), links, columns_of(nums, links), is_cut)

    # -- agents --

    def timeline(
        self, session: str | None, since: datetime | None, *, moves: int, agents: int, bars: int
    ) -> Timeline:
        """What agents did, as the newest `moves` of tasks tell it; up to `agents` of them with `bars` each."""
        now = at(time.time_ns() // 1000)
        happened, reached = self._moves(session, moves)
        begin = since or (happened[0].at if happened else now)
        complete = reached is None or (since is not None and reached <= since)
        if reached is not None and not complete:
            begin = reached
        held = [seen for seen in self._held(session, moves) if seen.task.assignee]
        lanes = _lanes([one for one in happened if one.at >= begin], held, begin, bars)
        return Timeline(begin, max(now, begin), lanes[:agents], max(len(lanes) - agents, 0), complete)

    def workers(self, session: str | None, limit: int) -> list[SeenWorker]:
        """The workers that were seen last: those that are alive first, then the newest; one more than `limit` at most."""
        test = "" if session is None else " WHERE session = :session"
        sql = f"SELECT session, about FROM task_workers{test} ORDER BY seen DESC, id LIMIT :limit"
        rows = self.ask(sql, session=session, limit=limit + 1)
        silent = at(self._look(lambda book: book.now) - ops.SILENCE)
        doing: dict[tuple[str, str], list[Seen]] = {}
        for seen in self._held(session, _MOST_DOING) if rows else ():
            if seen.task.state in LEASED:
                doing.setdefault((seen.task.session, seen.task.assignee), []).append(seen)
        found = [_as_worker(name, json.loads(about), silent, doing) for name, about in rows]
        # those that live stand still in a list, whoever of them spoke last
        return sorted(
            found, key=lambda one: (not one.worker.alive, one.worker.id if one.worker.alive else "")
        )

    def _moves(self, session: str | None, limit: int) -> tuple[list[Happened], datetime | None]:
        """The newest moves, oldest first, and the time before which nothing was looked at (None: it was all)."""
        further = "SELECT seq, at FROM task_events ORDER BY seq DESC LIMIT 1 OFFSET :window"
        beyond = self.ask(further, window=_EVENTS_PER_MOVE * limit)
        test = "" if session is None else " AND session = :session"
        sql = f"SELECT {_HAPPENED} FROM task_events WHERE seq > :floor AND kind = 'moved'{test} ORDER BY seq DESC LIMIT :limit"
        rows = self.ask(sql, floor=beyond[0][0] if beyond else 0, limit=limit, session=session)
        happened = [_happened(row) for row in reversed(rows)]
        if len(happened) == limit:
            return happened, happened[0].at
        return happened, at(beyond[0][1]) if beyond else None

    def _held(self, session: str | None, limit: int) -> list[Seen]:
        if session is not None:
            return self._named(self._by_state(Wanted(states=HELD, session=session), 2**62, limit))
        names = self.sessions()
        nums = [
            num
            for name in names
            for num in self._by_state(Wanted(states=HELD, session=name), 2**62, limit // len(names) + 1)
        ]
        return self._named(nums)


# -- rows --


def _as_worker(
    session: str, about: dict[str, Any], silent: datetime, doing: dict[tuple[str, str], list[Seen]]
) -> SeenWorker:
    worker = ops.as_alive(WorkerInfo.from_dict(about), silent)
    mine = doing.get((session, worker.agent), []) if worker.alive else []
    return SeenWorker(session, replace(worker, doing=tuple(seen.task.id for seen in mine)), mine)


def _seen(row: Sequence[Any]) -> Seen:
    num, session, name, state, kind, priority, assignee, parent, waiting, doc = row
    if doc:
        task = Task.from_dict(json.loads(doc))
    else:
        task = Task(
            name, type=kind, priority=priority, state=TaskState(state), assignee=assignee, parent=parent,
            session=session,
        )  # fmt: skip
    return Seen(num, replace(task, waiting=waiting) if waiting else task, bool(doc))


def _as_seen(row: Row) -> Seen:
    return Seen(row.num, row.task)


def _happened(row: Sequence[Any]) -> Happened:
    return Happened._make((*row[:-1], at(row[-1])))


def _conditions(wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """What a task must be, as SQL that goes on after a condition."""
    tests: list[str] = []
    values: dict[str, Any] = {}
    if wanted.states:
        names = ", ".join(f"'{state.value}'" for state in sorted(wanted.states))
        tests.append(f"state IN ({names})")
    kind = next(iter(wanted.types), None)
    for name, one in (
        ("session", wanted.session),
        ("type", kind),
        ("assignee", wanted.assignee or None),
        ("parent", wanted.parent),
    ):
        if one is not None:
            tests.append(f"{name} = :{name}")
            values[name] = one
    if wanted.parent:
        tests.append("parent <> ''")  # what the index of parts says of itself
    for name, word in (("tag", wanted.tag and as_in_doc(wanted.tag)), ("text", as_in_doc(wanted.text)[1:-1])):
        if word:
            tests.append(f"LOWER(doc) LIKE :{name} ESCAPE '\\'")
            values[name] = f"%{escaped(word.lower())}%"
    return "".join(f" AND {test}" for test in tests), values


def mentions(seen: Seen, text: str) -> bool:
    """Whether one of its texts holds that one: the names of fields, which SQL finds too, are no text of it."""
    if not text or not seen.is_whole:
        return True
    task = seen.task
    word = text.lower()
    told = (task.errors, task.result, task.checkpoint, task.artifacts)
    texts = (task.id, task.title, task.description, str(task.type), task.assignee, task.reason, task.stage)
    return any(word in one.lower() for one in (*texts, *task.tags)) or any(
        word in json.dumps(one, ensure_ascii=False).lower() for one in told if one
    )


def _has_tag(seen: Seen, tag: str) -> bool:
    return not tag or not seen.is_whole or tag in seen.task.tags


# -- trees --


def _tree(book: SqlBook, roots: Sequence[Seen], most: int, wide: int) -> list[Twig]:
    """Level by level, so that a deep branch does not keep the others from being shown."""
    parts: dict[int, list[Seen]] = {}
    order = list(roots[:most])
    hidden: dict[int, int] = {}
    counted: dict[int, tuple[int, int]] = {}
    left = _MOST_COUNTED
    for seen in order:  # it grows meanwhile
        room = min(wide, most - len(order))
        found = _parts(book, seen.task, room + 1)
        parts[seen.num] = found[:room]
        order += found[:room]
        if len(found) > room:
            counted[seen.num] = _count_parts(book, seen.task, max(left, room + 1))
            hidden[seen.num] = counted[seen.num][0] - room
            left -= counted[seen.num][0]
    sums = _sum_up(order, parts, counted)
    return _in_reading_order(roots[:most], parts, sums, hidden)


def _parts(book: SqlBook, task: Task, limit: int) -> list[Seen]:
    sql = (
        f"SELECT {_SEEN} FROM whole_tasks WHERE session = :session AND parent = :parent AND parent <> ''"
        " ORDER BY num LIMIT :limit"
    )
    return [_seen(row) for row in book.do(sql, session=task.session, parent=task.id, limit=limit)]


def _count_parts(book: SqlBook, task: Task, limit: int) -> tuple[int, int]:
    """How many parts a task has and how many of them are done, among the first ones."""
    sql = (
        "SELECT state, COUNT(*) FROM (SELECT state FROM tasks WHERE session = :session AND parent = :parent"
        " AND parent <> '' LIMIT :limit) AS counted GROUP BY state"
    )
    found = dict(book.do(sql, session=task.session, parent=task.id, limit=limit))
    return sum(found.values()), found.get(_S.DONE.value, 0)


def _sum_up(
    order: Sequence[Seen], parts: dict[int, list[Seen]], counted: dict[int, tuple[int, int]]
) -> dict[int, tuple[float, int, int]]:
    """For each task its progress, and how many parts it has and are done: from the leaves up."""
    sums: dict[int, tuple[float, int, int]] = {}
    for seen in reversed(order):
        own = parts.get(seen.num, [])
        total, done = counted.get(seen.num, (len(own), sum(part.task.state == _S.DONE for part in own)))
        if seen.task.state == _S.DONE:
            share = 1.0
        elif seen.num in counted:
            share = done / total
        else:
            share = sum(sums[part.num][0] for part in own) / total if own else seen.task.progress
        sums[seen.num] = (share, total, done)
    return sums


def _in_reading_order(
    roots: Sequence[Seen],
    parts: dict[int, list[Seen]],
    sums: dict[int, tuple[float, int, int]],
    hidden: dict[int, int],
) -> list[Twig]:
    twigs: list[Twig] = []
    todo = [(seen, 0) for seen in reversed(roots)]
    while todo:
        seen, level = todo.pop()
        twigs.append(Twig(seen, level, *sums[seen.num], hidden.get(seen.num, 0)))
        todo += [(part, level + 1) for part in reversed(parts.get(seen.num, []))]
    return twigs


# -- graphs --

#: how many neighbours of one task are looked at on either side
_MOST_LINKS: Final = 60


def _links(book: SqlBook, nums: Iterable[int], limit: int) -> list[Link]:
    """The dependencies of these tasks and on them, up to so many of each on either side."""
    sql = "SELECT task, dep, on_failure FROM task_deps WHERE {} = :num ORDER BY task, dep LIMIT :limit"
    return [
        Link(*row)
        for num in nums
        for side in ("task", "dep")
        for row in book.do(sql.format(side), num=num, limit=limit)
    ]


def _spread(
    book: SqlBook, seeds: Sequence[int], most: int, keep: Iterable[int]
) -> tuple[list[int], list[Link], bool]:
    """From each seed to its neighbours and theirs, until there are enough; who has no neighbour is left out."""
    nums: dict[int, None] = dict.fromkeys(keep)
    links: dict[tuple[int, int], Link] = {}
    is_cut = False
    asked: set[int] = set()
    todo = deque(seeds)
    while todo:
        num = todo.popleft()
        if num in asked:
            continue
        if len(nums) >= most and num not in nums:
            is_cut = True
            continue
        asked.add(num)
        found = _links(book, [num], _MOST_LINKS)
        if found:
            nums[num] = None
        is_cut |= len(found) >= _MOST_LINKS
        for link in found:
            links[link[:2]] = link
            near = link.on if link.task == num else link.task
            if near not in nums and len(nums) < most:
                nums[near] = None
                todo.append(near)
    drawn = [link for pair, link in links.items() if pair[0] in nums and pair[1] in nums]
    return list(nums), drawn, is_cut or len(drawn) < len(links)


def columns_of(nums: Iterable[int], links: Iterable[Link]) -> dict[int, int]:
    """For each task the column after the last one of what it depends on."""
    waits: dict[int, int] = dict.fromkeys(nums, 0)
    after: dict[int, list[int]] = {num: [] for num in waits}
    for link in links:
        waits[link.task] += 1
        after[link.on].append(link.task)
    column = dict.fromkeys(waits, 0)
    todo = deque(num for num, count in waits.items() if not count)
    while todo:
        num = todo.popleft()
        for following in after[num]:
            column[following] = max(column[following], column[num] + 1)
            waits[following] -= 1
            if not waits[following]:
                todo.append(following)
    return column


# -- agents --


def _lanes(happened: Sequence[Happened], held: Sequence[Seen], begin: datetime, bars: int) -> list[Lane]:
    """Moves of tasks as what their agents did: who claimed a task has it until it leaves the states of having."""
    found: dict[str, list[Bar]] = {}
    open_: dict[tuple[str, str], tuple[str, str, datetime]] = {}
    for one in happened:
        which = (one.session, one.task)
        had = open_.pop(which, None) or _had_before(one, begin)
        if had is not None and had[1] == one.from_state:
            found.setdefault(had[0], []).append(Bar(*which, had[1], had[2], one.at, one.to_state))
        if one.to_state in HELD:
            open_[which] = (had[0] if had else one.actor, one.to_state, one.at)
    for seen in held:
        task = seen.task
        start = max(task.changed_at or begin, begin)
        found.setdefault(task.assignee, []).append(Bar(task.session, task.id, task.state, start, None, ""))
    lanes = [_lane(agent, done, bars) for agent, done in found.items()]
    return sorted(lanes, key=_last_at_work, reverse=True)


def _had_before(move: Happened, begin: datetime) -> tuple[str, str, datetime] | None:
    """Who had a task whose claim lies further back; only the holder makes these moves."""
    is_holders = move.from_state in _WORKED and move.to_state in (*_WORKED, _S.REVIEW, _S.DONE, _S.FAILED)
    return (move.actor, move.from_state, begin) if is_holders else None


_WORKED: Final = (_S.ASSIGNED, _S.ACTIVE, _S.PAUSED)


def _lane(agent: str, bars: list[Bar], limit: int) -> Lane:
    bars = sorted(bars, key=lambda bar: bar.begin)
    return Lane(
        agent,
        bars[-limit:],
        done=sum(bar.then == _S.DONE for bar in bars),
        failed=sum(bar.then in (_S.FAILED, _S.DEAD) for bar in bars),
        held=sum(bar.end is None for bar in bars),
    )


def _last_at_work(lane: Lane) -> tuple[bool, datetime]:
    return lane.held > 0, max(bar.end or bar.begin for bar in lane.bars)
