"""Tasks in SQL: the statements that SQLite and PostgreSQL have in common, in the words of `Book`.

Every statement finds its rows by an index, at any size: what is ready stands in an index of its own, ordered by
priority and age within a lane (a type and what it needs of an agent), because readiness is kept as a number of open
dependencies and not looked for.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

from ledger_tasks.book import Book, Edge, Posting, Row, Wanted, by_urgency, columns_of
from ledger_tasks.model import EVENT_COLUMNS, Task, TaskEvent, WorkerInfo, at, compact, micros_of
from ledger_tasks.states import ENDED, LOST, TaskState

SCHEMA_VERSION: Final = 1
#: names of columns of `tasks` beside its number
COLUMNS: Final = (
    "session", "id", "state", "lane", "type", "priority", "assignee", "parent", "due", "claim", "lease", "until",
    "mono", "boot", "op", "said", "version", "hash", "doc",
)  # fmt: skip
#: what a row is read from
_ROW: Final = "num, doc, open, claim, lease, until, mono, boot, op, said, hash"
_ENDED: Final = ", ".join(f"'{state.value}'" for state in sorted(ENDED))
_LOST: Final = ", ".join(f"'{state.value}'" for state in sorted(LOST))
_READY: Final = "state = 'pending' AND open = 0 AND due = 0"
_DUE: Final = "state = 'pending' AND due > 0 AND due <= :now"
#: whoever only reports its states has no lease; its last word says how long it has been silent
_REPORTED_LONG_AGO: Final = (
    "state IN ('assigned', 'active') AND until = 0 AND (SELECT e.at FROM task_events e"
    " WHERE e.session = t.session AND e.task = t.id ORDER BY e.n DESC LIMIT 1) + :silent <= :now"
)
_EVENT: Final = ", ".join(("seq", *EVENT_COLUMNS, "hash"))


def statements(columns: Sequence[str]) -> tuple[str, str]:
    """What inserts a row of `tasks`, and what updates one."""
    marks = ", ".join(f":{name}" for name in columns)
    sets = ", ".join(f"{name} = :{name}" for name in columns[2:])
    return (
        f"INSERT INTO tasks ({', '.join(columns)}) VALUES ({marks})",
        f"UPDATE tasks SET {sets} WHERE session = :session AND id = :id",
    )


_INSERT, _UPDATE = statements(COLUMNS)


def event_statement(number: str = "") -> str:
    """What inserts an event; `number` is what gives its `seq` where the database does not."""
    names = [*EVENT_COLUMNS, "hash"]
    marks = [f":{name}" for name in names]
    if number:
        names, marks = ["seq", *names], [number, *marks]
    return f"INSERT INTO task_events ({', '.join(names)}) VALUES ({', '.join(marks)})"


_INSERT_EVENT: Final = event_statement()
_POSTING: Final = ", ".join(Posting._fields)
_POSTED: Final = f"SELECT {_POSTING} FROM task_deliveries WHERE session = :session"
_PAGE: Final = 500
#: columns that say of a task what its document says too
_FILED: Final = ("state", "lane", "type", "priority", "assignee", "parent", "due", "version")


def lane_of(task: Task) -> str:
    """What decides who may claim a task: its type and what it needs."""
    return json.dumps([str(task.type), list(task.capabilities)], ensure_ascii=False, separators=(",", ":"))


def filed_as(task: Task) -> dict[str, Any]:
    """What the columns by which a task is found have to say of it; `due` is 0 instead once that has come."""
    return {
        "state": task.state.value, "lane": lane_of(task), "type": str(task.type), "priority": task.priority,
        "assignee": task.assignee, "parent": task.parent, "due": max(0, micros_of(task.not_before)),
        "version": task.version,
    }  # fmt: skip


def lane_fits(lane: str, agent_can: Sequence[str] | None, types: Sequence[str] | None) -> bool:
    """Whether such an agent may claim what stands in that lane."""
    kind, needs = json.loads(lane)
    return (types is None or kind in types) and (agent_can is None or set(needs) <= set(agent_can))


class SqlBook(Book):
    """A transaction in SQL. A server's own book says how a statement is done, and how rows are held."""

    #: where whole rows are read
    source: ClassVar[str] = "tasks"
    #: a list of strings, given as a JSON text, as a subselect
    each: ClassVar[str]
    #: what holds a row that is read, until the end of the transaction; one that another claims is passed over
    hold: ClassVar[str] = ""
    hold_first: ClassVar[str] = ""
    #: events of all tasks that no other with a smaller number can follow; those of one task are in order anyway
    log: ClassVar[str] = "task_events"
    #: whether a lease has run out
    is_over: ClassVar[str] = "until <= :now"

    def __init__(self, session: str) -> None:
        self.session = session

    @abstractmethod
    def do(self, sql: str, **values: Any) -> list[Any]:
        """All rows of a statement; `:name` marks a value."""

    # -- one task --

    def row(self, task_id: str) -> Row | None:
        sql = f"SELECT {_ROW} FROM {self.source} WHERE session = :session AND id = :id{self.hold}"
        found = self.do(sql, session=self.session, id=task_id)
        return row_from(found[0]) if found else None

    def claimed(self, token: str) -> Row | None:
        found = self.do(
            f"SELECT {_ROW} FROM {self.source} WHERE claim = :claim AND until > 0{self.hold}", claim=token
        )
        return row_from(found[0]) if found else None

    def insert(self, row: Row, event: TaskEvent) -> None:
        self.insert_row(self._values(row))
        self._append(event)

    def save(self, row: Row, events: Sequence[TaskEvent] = ()) -> None:
        self.update_row(self._values(row))
        for event in events:
            self._append(event)

    def insert_row(self, values: dict[str, Any]) -> None:
        """A new row, with `doc`."""
        self.do(_INSERT, **values)

    def update_row(self, values: dict[str, Any]) -> None:
        """The row of that session and id as it is now."""
        self.do(_UPDATE, **values)

    def _values(self, row: Row) -> dict[str, Any]:
        task = row.task
        return {
            "session": self.session, "id": task.id, **filed_as(task), "claim": row.claim, "lease": row.lease,
            "until": row.until, "mono": row.mono, "boot": row.boot, "op": row.op, "said": row.said, "hash": row.hash,
            "doc": compact(task.said()),
        }  # fmt: skip

    def _append(self, event: TaskEvent) -> None:
        self.do(_INSERT_EVENT, **dict(zip(EVENT_COLUMNS, columns_of(event), strict=True)), hash=event.hash)

    def renew(self, row: Row) -> None:
        sql = "UPDATE tasks SET until = :until, mono = :mono, boot = :boot WHERE session = :session AND id = :id"
        values = {"until": row.until, "mono": row.mono, "boot": row.boot}
        self.do(sql, session=self.session, id=row.task.id, **values)

    # -- the graph --

    def hold_graph(self) -> None:
        self.do(
            "INSERT INTO task_sessions (session) VALUES (:session) ON CONFLICT DO NOTHING",
            session=self.session,
        )

    def connect(self, edges: Iterable[Edge]) -> None:
        edges = list(edges)
        for task, on, on_failure in edges:
            sql = (
                "INSERT INTO task_deps (task, dep, on_failure) SELECT t.num, d.num, :on_failure FROM tasks t CROSS JOIN tasks d"
                " WHERE t.session = :session AND t.id = :task AND d.session = :session AND d.id = :on"
            )
            self.do(sql, session=self.session, task=task, on=on, on_failure=on_failure)
        for start in range(0, len(edges), _PAGE):
            self._count_open([edge.task for edge in edges[start : start + _PAGE]])

    def _count_open(self, task_ids: Sequence[str]) -> None:
        sql = (
            "UPDATE tasks SET open = (SELECT COUNT(*) FROM task_deps e JOIN tasks d ON d.num = e.dep"
            f" WHERE e.task = tasks.num AND d.state <> 'done' AND NOT (e.on_failure = 'run' AND d.state IN ({_LOST})))"
            f" WHERE session = :session AND id IN {self.each.format('ids')}"
        )
        self.do(sql, session=self.session, ids=json.dumps(list(set(task_ids))))

    def dependencies(self, task_ids: Sequence[str]) -> Iterator[Edge]:
        return self._edges("t", task_ids)

    def dependents(self, task_ids: Sequence[str], *, waiting: bool = False) -> Iterator[Edge]:
        return self._edges("d", task_ids, f" AND t.state NOT IN ({_ENDED})" if waiting else "")

    def _edges(self, side: str, task_ids: Sequence[str], test: str = "") -> Iterator[Edge]:
        sql = (
            "SELECT t.id, d.id, e.on_failure FROM task_deps e JOIN tasks t ON t.num = e.task JOIN tasks d ON d.num = e.dep"
            f" WHERE {side}.session = :session AND {side}.id IN {self.each.format('ids')}{test} ORDER BY t.num, d.num"
        )
        for start in range(0, len(task_ids), _PAGE):
            for found in self.do(sql, session=self.session, ids=json.dumps(task_ids[start : start + _PAGE])):
                yield Edge(*found)

    def release(self, task_id: str, only: str | None = None) -> list[tuple[str, TaskState]]:
        self._change_open(task_id, -1, only)
        sql = f"SELECT id, state FROM tasks WHERE {self._dependents_of(only)} AND open = 0 ORDER BY priority DESC, num"
        found = self.do(sql, session=self.session, id=task_id, only=only or "")
        return [(name, TaskState(state)) for name, state in found]

    def reopen(self, task_id: str, only: str | None = None) -> None:
        self._change_open(task_id, 1, only)

    def _change_open(self, task_id: str, by: int, only: str | None) -> None:
        sql = f"UPDATE tasks SET open = open + :by WHERE {self._dependents_of(only)}"
        self.do(sql, session=self.session, id=task_id, by=by, only=only or "")

    def _dependents_of(self, only: str | None) -> str:
        return (
            "num IN (SELECT e.task FROM task_deps e JOIN tasks d ON d.num = e.dep WHERE d.session = :session AND d.id = :id"
            f"{' AND e.on_failure = :only' if only else ''})"
        )

    # -- choosing --

    def ready(self, agent_can: Sequence[str] | None, types: Sequence[str] | None, limit: int) -> list[Row]:
        page = f"SELECT {_ROW} FROM {self.source} WHERE session = :session AND"
        order = "ORDER BY priority DESC, num LIMIT :limit"
        lanes = [lane for lane in self._lanes() if lane_fits(lane, agent_can, types)]
        values = {"session": self.session, "limit": limit}
        found = [
            one
            for lane in lanes
            for one in self.do(f"{page} lane = :lane AND {_READY} {order}", lane=lane, **values)
        ]
        rows = [row_from(one) for one in found]
        cut = (
            "LIMIT :limit" if agent_can is None and types is None else ""
        )  # what does not fit is left out below
        due = f"{page} {_DUE} AND open = 0 ORDER BY priority DESC, num {cut}"
        for one in self.do(due, now=self.now, **values):
            row = row_from(one)
            if lane_fits(lane_of(row.task), agent_can, types):
                rows.append(row)
        return sorted(rows, key=by_urgency)[:limit]

    def first(self, agent_can: Sequence[str] | None, types: Sequence[str] | None) -> Row | None:
        self._offer_due()
        lanes = [lane for lane in self._lanes() if lane_fits(lane, agent_can, types)]
        return self._first_of(lanes)

    def _offer_due(self) -> None:
        """Let what was not to be done before now stand among the ready ones."""
        values = {"session": self.session, "now": self.now}
        if self.do(f"SELECT 1 FROM tasks WHERE session = :session AND {_DUE} LIMIT 1", **values):
            self.do(f"UPDATE tasks SET due = 0 WHERE session = :session AND {_DUE}", **values)

    def _lanes(self) -> list[str]:
        """The lanes in which anything is ready, each found by one step in the index."""
        least = f"SELECT MIN(lane) FROM tasks WHERE session = :session AND {_READY}"
        sql = (
            f"WITH RECURSIVE lanes (lane) AS (SELECT ({least}) UNION ALL"
            f" SELECT ({least} AND tasks.lane > lanes.lane) FROM lanes WHERE lanes.lane IS NOT NULL)"
            " SELECT lane FROM lanes WHERE lane IS NOT NULL"
        )
        return [lane for (lane,) in self.do(sql, session=self.session)]

    def _first_of(self, lanes: Sequence[str]) -> Row | None:
        """The best of several lanes, held; one that somebody else holds is passed over."""
        sql = (
            f"SELECT {_ROW} FROM {self.source} WHERE session = :session AND lane = :lane AND {_READY}"
            " ORDER BY priority DESC, num LIMIT 1"
        )
        best: list[Row] = []
        for lane in lanes:
            found = self.do(sql + self.hold_first, session=self.session, lane=lane)
            best += map(row_from, found)
        return min(best, key=by_urgency, default=None)

    def lapsed(self, silent: float | None = None, limit: int = 100) -> list[Row]:
        leased = "until > 0 AND"
        values = {"session": self.session, "limit": limit, **self.clocks()}
        if silent is None:
            return self._held_and(f"{leased} {self.is_over}", values)
        values["silent"] = int(silent * 1e6)
        quiet = self._held_and(f"{leased} until - lease * 1000000 + :silent <= :now", values)
        return sorted([*quiet, *self._held_and(_REPORTED_LONG_AGO, values)], key=lambda row: row.num)[:limit]

    def _held_and(self, test: str, values: dict[str, Any]) -> list[Row]:
        sql = f"SELECT {_ROW} FROM {self.source} AS t WHERE session = :session AND {test} ORDER BY num LIMIT :limit"
        return [row_from(one) for one in self.do(sql + self.hold, **values)]

    def clocks(self) -> dict[str, Any]:
        """What `is_over` compares with."""
        return {"now": self.now}

    def page(self, wanted: Wanted, limit: int) -> list[Row]:
        if len(wanted.states) > 1:
            # an index has the tasks of one state in order; those of several would be sorted for each page
            found = [row for state in wanted.states for row in self.page(_of_one(wanted, state), limit)]
            return sorted(found, key=lambda row: row.num, reverse=wanted.newest_first)[:limit]
        # the sign keeps a planner from walking all tasks for a few names
        num = "+num" if wanted.ids else "num"
        tests = [f"{num} < :after" if wanted.newest_first and wanted.after else f"{num} > :after"]
        values: dict[str, Any] = {
            "after": wanted.after,
            "limit": limit,
            "session": wanted.session or self.session,
        }
        if wanted.session is not None:
            tests.append("session = :session")
        for state in wanted.states:
            tests.append("state = :state")
            values["state"] = state.value
        if wanted.parent:
            tests.append("parent <> ''")  # what its index is about
        if wanted.waiting:
            tests.append("open > 0")
        for name, those in (("type", wanted.types), ("id", wanted.ids)):
            if those:
                tests.append(f"{name} IN {self.each.format(name)}")
                values[name] = json.dumps(sorted(those))
        for name, one in (("assignee", wanted.assignee or None), ("parent", wanted.parent)):
            if one is not None:
                tests.append(f"{name} = :{name}")
                values[name] = one
        if wanted.tag:  # whatever holds it anywhere: `TaskLedger.tasks` looks at the tags themselves
            tests.append("doc LIKE :tag ESCAPE '\\'")
            values["tag"] = f"%{escaped(as_in_doc(wanted.tag))}%"
        if wanted.text:  # as it is written too: a database may know no capitals but those of English
            tests.append("(LOWER(doc) LIKE :lower ESCAPE '\\' OR doc LIKE :text ESCAPE '\\')")
            values["text"] = f"%{escaped(as_in_doc(wanted.text)[1:-1])}%"
            values["lower"] = values["text"].lower()
        order = "DESC" if wanted.newest_first else "ASC"
        sql = f"SELECT {_ROW} FROM {self.source} WHERE {' AND '.join(tests)} ORDER BY {num} {order} LIMIT :limit"
        return [row_from(found) for found in self.do(sql, **values)]

    def filed(self, task_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(task_ids), _PAGE):
            some = json.dumps(task_ids[start : start + _PAGE])
            sql = (
                f"SELECT id, {', '.join(_FILED)} FROM tasks"
                f" WHERE session = :session AND id IN {self.each.format('some')}"
            )
            rows = self.do(sql, session=self.session, some=some)
            found |= {name: dict(zip(_FILED, values, strict=True)) for name, *values in rows}
        return found

    def counts(self) -> dict[str, int]:
        sql = "SELECT state, COUNT(*) FROM tasks WHERE session = :session GROUP BY state"
        return dict(self.do(sql, session=self.session))

    def events(
        self, after: int, limit: int, task_id: str | None = None, *, every: bool = False
    ) -> list[TaskEvent]:
        test = "" if every else " AND session = :session"
        test += "" if task_id is None else " AND task = :task"
        log = self.log if task_id is None else "task_events"
        sql = f"SELECT {_EVENT} FROM {log} WHERE seq > :after{test} ORDER BY seq LIMIT :limit"
        found = self.do(sql, after=after, session=self.session, task=task_id or "", limit=limit)
        return [event_from(one) for one in found]

    def last_seq(self) -> int:
        return int(self.do(f"SELECT COALESCE(MAX(seq), 0) FROM {self.log}")[0][0])

    def pending(self) -> tuple[int, int, int]:
        of = "FROM tasks WHERE session = :session AND"
        # every lane is more than '': that lets the index of what is ready be counted, and no task be read
        ready = self.do(f"SELECT COUNT(*) {of} lane > '' AND {_READY}", session=self.session)[0][0]
        due = self.do(f"SELECT COUNT(*) {of} {_DUE} AND open = 0", session=self.session, now=self.now)[0][0]
        sql = f"SELECT COUNT(*), COALESCE(MIN(due), 0) {of} state = 'pending' AND due > 0 AND due > :now AND open = 0"
        later, first = self.do(sql, session=self.session, now=self.now)[0]
        return ready + due, later, first

    # -- deliveries --

    def posting(self, num: int) -> Posting | None:
        found = self.do(f"{_POSTED} AND num = :num", session=self.session, num=num)
        return Posting(*found[0]) if found else None

    def postings(self, after: int, limit: int) -> list[Posting]:
        sql = f"{_POSTED} AND num > :after ORDER BY num LIMIT :limit"
        return [Posting(*one) for one in self.do(sql, session=self.session, after=after, limit=limit)]

    def postings_to(self, recipient: str, channel: str, key: str, since: int) -> list[Posting]:
        to = f"{_POSTED} AND recipient = :recipient AND channel = :channel"
        values = {"session": self.session, "recipient": recipient, "channel": channel}
        found = self.do(f"{to} AND key = :key ORDER BY num DESC LIMIT 2", key=key, **values)
        found += self.do(f"{to} AND until > 0", **values)
        found += self.do(
            f"{to} AND at > :since AND outcome = 'sent' ORDER BY at DESC LIMIT 1", since=since, **values
        )
        return sorted({Posting(*one) for one in found})

    def post(self, posting: Posting) -> None:
        values = posting._asdict()
        num = values.pop("num")
        if num:
            changes = ", ".join(f"{name} = :{name}" for name in values)
            sql = f"UPDATE task_deliveries SET {changes} WHERE session = :session AND num = :num"
            self.do(sql, session=self.session, num=num, **values)
            return
        names = ["session", *values]
        marks = ", ".join(f":{name}" for name in names)
        sql = f"INSERT INTO task_deliveries ({', '.join(names)}) VALUES ({marks})"
        self.do(sql, session=self.session, **values)

    # -- workers --

    def beat(self, worker: WorkerInfo, forget: int) -> None:
        if forget:
            sql = "DELETE FROM task_workers WHERE session = :session AND seen < :forget"
            self.do(sql, session=self.session, forget=forget)
        sql = (
            "INSERT INTO task_workers (id, session, started, seen, about) VALUES (:id, :session, :started, :seen, :about)"
            " ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, about = excluded.about"
        )
        times = {"started": micros_of(worker.started_at), "seen": micros_of(worker.seen_at)}
        self.do(sql, id=worker.id, session=self.session, about=compact(worker.to_dict()), **times)

    def workers(self) -> list[WorkerInfo]:
        sql = "SELECT about FROM task_workers WHERE session = :session ORDER BY started DESC, id LIMIT :limit"
        found = self.do(sql, session=self.session, limit=_PAGE)
        return [WorkerInfo.from_dict(json.loads(about)) for (about,) in found]

    def sessions(self) -> dict[str, dict[str, Any]]:
        return {
            name: json.loads(about)
            for name, about in self.do("SELECT session, about FROM task_sessions ORDER BY 1")
        }


def as_in_doc(text: str) -> str:
    """A string as it stands in a task's document."""
    return json.dumps(text, ensure_ascii=False)


def _of_one(wanted: Wanted, state: TaskState) -> Wanted:
    return replace(wanted, states=frozenset({state}))


def escaped(text: str) -> str:
    """A text as LIKE takes it literally, with a backslash as the escape."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def row_from(found: Sequence[Any]) -> Row:
    """A row as `_ROW` names its columns."""
    num, doc, waiting, claim, lease, until, mono, boot, op, said, seal = found
    fields = json.loads(doc)
    task = Task.from_dict(fields)
    if waiting:
        object.__setattr__(task, "waiting", waiting)  # just made, and nobody else's yet
    return Row(task, num, claim, lease, until, mono, boot, op, said, seal)


def event_from(found: Sequence[Any]) -> TaskEvent:
    """An event as `_EVENT` names its columns."""
    seq, session, task, n, kind, start, end, actor, source, stage, when, data, seal = found
    return TaskEvent(
        seq, session, task, n, kind, start, end, actor, source, stage, json.loads(data), at(when), seal, data
    )
