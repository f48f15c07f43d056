"""Tasks beside the calls in the guard's PostgreSQL schema, through the guard store's own connections.

A write is one transaction (READ COMMITTED) in few round trips: what need not be answered goes along with the next
question, or with the COMMIT. Rows that are read to be changed are held until its end, so that what it judges is what
it changes; two that hold rows in opposite orders are a deadlock, and the one that the server ends is done again.
Nothing is kept in a session, so a transaction pooler may stand between. Leases go by the server's clock.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from typing import Any, ClassVar, Final, TypeVar

import ledger
from ledger import StoreError, UsageError
from ledger_stores.postgres import PostgresStore, PostgresTransaction
from ledger_tasks.book import Edge, Row, TaskStore, columns_of
from ledger_tasks.model import EVENT_COLUMNS, TaskEvent
from ledger_tasks.sql import _READY, _ROW, SCHEMA_VERSION, SqlBook, event_statement, lane_fits, row_from
from ledger_tasks.states import ENDED, TaskState

T = TypeVar("T")
_CLOCK: Final = "SELECT :ns.now_us()"
#: as many events have numbers in one transaction
_MOST_EVENTS: Final = (1 << 20) - 1
_NUMBERED_EVENT: Final = event_statement(":ns.next_task_event(:session, :task, :n, :k)")
#: what was not to be done before now; in order, and waiting for whoever does the same, who may leave some
_OFFER_DUE: Final = (
    "UPDATE tasks SET due = 0 WHERE num IN (SELECT num FROM tasks WHERE session = :session AND state = 'pending'"
    " AND due > 0 AND due <= :now ORDER BY num FOR NO KEY UPDATE)"
)
#: one step in the index for each lane; MIN would read all of it when the planner errs
_NEXT_LANE: Final = (
    f"(SELECT lane FROM tasks WHERE session = :session AND {_READY}{{more}} ORDER BY lane LIMIT 1)"
)
_LANES: Final = (
    f"WITH RECURSIVE lanes (lane) AS ({_NEXT_LANE.format(more='')} UNION ALL"
    f" SELECT {_NEXT_LANE.format(more=' AND tasks.lane > lanes.lane')} FROM lanes WHERE lanes.lane IS NOT NULL)"
    " SELECT {what} FROM lanes WHERE lane IS NOT NULL"
)
#: beside a task: the time, the lanes in which anything is ready, and whether something has come due
_ABOUT: Final = (
    f":ns.now_us(), ({_LANES.format(what='json_agg(lane)::text')}),"
    " EXISTS (SELECT FROM tasks WHERE session = :session AND state = 'pending' AND due > 0 AND due <= :now)"
)
_FIRST_OF_ONE: Final = (
    f"SELECT {_ROW}, {_ABOUT} FROM tasks WHERE session = :session AND lane = :lanes AND {_READY}"
    " ORDER BY priority DESC, num LIMIT 1 FOR NO KEY UPDATE OF tasks"
)
#: the first of each lane and some behind it, in case that others hold those; one of all these is held
_FIRST_OF_SOME: Final = (
    f"SELECT {', '.join(f't.{name}' for name in _ROW.split(', '))}, {_ABOUT}"
    " FROM json_array_elements_text(:lanes::json) AS l CROSS JOIN LATERAL ("
    f"SELECT num AS nth FROM tasks WHERE session = :session AND lane = l.value AND {_READY}"
    " ORDER BY priority DESC, num LIMIT 32) AS heads JOIN tasks t ON t.num = nth"
    " WHERE t.state = 'pending' AND t.open = 0 AND t.due = 0 ORDER BY t.priority DESC, t.num LIMIT 1"
    " FOR NO KEY UPDATE OF t"
)
_IS_RESTORED: Final = (
    "SELECT COALESCE(MAX(seq), 0) >> 24 >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint - :ns.task_base()"
    " FROM :ns.task_events"
)
_BASE: Final = (
    "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1 - (COALESCE(MAX(seq), 0) >> 24)"
    " FROM :ns.task_events"
)
#: what depends on a task, and what depends on that
_EDGES_AROUND: Final = (
    "SELECT t.id, d.id, e.on_failure FROM task_deps e JOIN tasks t ON t.num = e.task JOIN tasks d ON d.num = e.dep"
    " WHERE e.dep IN (SELECT num FROM tasks WHERE session = :session AND id = :id UNION ALL"
    " SELECT f.task FROM task_deps f JOIN tasks o ON o.num = f.dep WHERE o.session = :session AND o.id = :id)"
    " ORDER BY t.num, d.num"
)
#: so many lanes of a session are asked for before it is known which are in use
_GUESSED_LANES: Final = 16


class PostgresBook(SqlBook):
    """Looks at what is committed, one statement after the other."""

    each: ClassVar[str] = "(SELECT json_array_elements_text(:{}::json))"
    log: ClassVar[str] = "certain_task_events"

    def __init__(self, session: str, store: PostgresStore) -> None:
        super().__init__(session)
        self._store = store

    def do(self, sql: str, **values: Any) -> list[Any]:
        """All rows of a statement."""
        return self._store.ask(_in_our_words(sql), values)

    @property
    def now(self) -> int:
        """The server's time."""
        return int(self.do(_CLOCK)[0][0])

    def clocks(self) -> dict[str, Any]:
        """None: the statement asks for the server's."""
        return {}

    def stamp(self) -> str | None:
        # any transaction of the cluster changes the first; a restart may let numbers come again
        return ":".join(self.do("SELECT pg_current_snapshot()::text, pg_postmaster_start_time()::text")[0])

    def _lanes(self) -> list[str]:
        return [lane for (lane,) in self.do(_LANES.format(what="lane"), session=self.session)]


class PostgresWork(PostgresBook):
    """Changes what it reads, in one transaction."""

    # not FOR UPDATE: new dependencies, which the foreign keys look after, do not get in the way
    hold: ClassVar[str] = " FOR NO KEY UPDATE"
    # within the transaction its own are certain
    log: ClassVar[str] = "task_events"

    def __init__(self, session: str, work: PostgresTransaction, guesses: dict[str, list[str]]) -> None:
        self.session = session
        self.again = work.again
        self._work, self._guesses = work, guesses
        self._now = self._events = 0
        #: tasks that are held here, so that nobody can add what depends on them
        self._held: set[str] = set()
        #: of some of these, what depends on them; and rows that were held ahead of being asked for
        self._after: dict[str, list[Edge]] = {}
        self._ahead: dict[str, Row] = {}
        #: those of them that have ended
        self._ended: set[str] = set()

    def do(self, sql: str, **values: Any) -> list[Any]:
        """All rows of a query; whatever changes something is told, and answers nothing."""
        if sql.startswith(("INSERT", "UPDATE")) and "RETURNING" not in sql:
            self._tell(sql, values)
            return []
        return self._ask((sql, values))[0]

    def _tell(self, sql: str, values: dict[str, Any]) -> None:
        self._work.tell(_in_our_words(sql), values)

    def _ask(self, *questions: tuple[str, dict[str, Any]]) -> list[list[Any]]:
        """What several questions give; the time after it, because any may have waited."""
        *found, [(self._now,)] = self._work.ask_all(
            [*((_in_our_words(sql), values) for sql, values in questions), (_in_our_words(_CLOCK), {})]
        )
        return found

    @property
    def now(self) -> int:
        """The server's time when it answered last."""
        if not self._now:
            self._ask()
        return self._now

    def row(self, task_id: str) -> Row | None:
        row = self._ahead.pop(task_id, None) or super().row(task_id)
        if row is not None:
            self._held.add(task_id)
        return row

    def claimed(self, token: str) -> Row | None:
        sql = f"SELECT {_ROW} FROM tasks WHERE claim = :claim AND until > 0 AND claim <> ''{self.hold}"
        found = self.do(sql, claim=token)
        return row_from(found[0]) if found else None

    def _append(self, event: TaskEvent) -> None:
        self._events += 1
        if self._events > _MOST_EVENTS:
            raise UsageError(
                f"more than {_MOST_EVENTS} events in one transaction; nothing was changed. Do it in parts"
            )
        columns = dict(zip(EVENT_COLUMNS, columns_of(event), strict=True))
        self._tell(_NUMBERED_EVENT, {**columns, "hash": event.hash, "k": self._events})

    # -- the graph --

    def hold_graph(self) -> None:
        super().hold_graph()
        self._tell(
            "SELECT 1 FROM task_sessions WHERE session = :session FOR UPDATE", {"session": self.session}
        )

    def connect(self, edges: Iterable[Edge]) -> None:
        edges = list(edges)
        self._after.clear()
        self._ahead.clear()
        # whoever is just ending one of these commits first, or finds the new dependency
        held = json.dumps(sorted({edge.on for edge in edges}))
        self._tell(
            f"SELECT 1 FROM tasks WHERE session = :session AND id IN {self.each.format('ids')} ORDER BY num FOR SHARE",
            {"session": self.session, "ids": held},
        )
        super().connect(edges)

    def save(self, row: Row, events: Sequence[TaskEvent] = ()) -> None:
        super().save(row, events)
        if row.task.state in ENDED:
            self._ended.add(row.task.id)

    def dependents(self, task_ids: Sequence[str], *, waiting: bool = False) -> Iterator[Edge]:
        """Of one that is held: with all that ends if these end, in few round trips for the whole of a cascade."""
        if len(task_ids) != 1 or task_ids[0] not in self._held:
            yield from super().dependents(task_ids, waiting=waiting)
            return
        [task_id] = task_ids
        if task_id not in self._after:
            self._hold_dependents(task_id)
        yield from (edge for edge in self._after[task_id] if not (waiting and edge.task in self._ended))

    def _hold_dependents(self, task_id: str) -> None:
        """Hold them in order, then see what depends on them: from there on nobody can add to that."""
        whose = {"session": self.session, "id": task_id, "only": ""}
        rows, edges = self._ask(
            (f"SELECT {_ROW} FROM tasks WHERE {self._dependents_of(None)} ORDER BY num{self.hold}", whose),
            (_EDGES_AROUND, whose),
        )
        held = [row_from(found) for found in rows]
        self._ahead |= {row.task.id: row for row in held}
        self._ended |= {row.task.id for row in held if row.task.state in ENDED}
        self._held.update(self._ahead)
        self._after |= {name: [] for name in (task_id, *(row.task.id for row in held))}
        for found in edges:
            edge = Edge(*found)
            self._after[edge.on].append(edge)

    def release(self, task_id: str, only: str | None = None) -> list[tuple[str, TaskState]]:
        if self._has_none(task_id, only):
            return []
        return super().release(task_id, only)

    def reopen(self, task_id: str, only: str | None = None) -> None:
        if not self._has_none(task_id, only):
            super().reopen(task_id, only)

    def _has_none(self, task_id: str, only: str | None) -> bool:
        """Whether it is known that no such edge leads to it."""
        known = self._after.get(task_id)
        return known is not None and not any(only in (None, edge.on_failure) for edge in known)

    def _change_open(self, task_id: str, by: int, only: str | None) -> None:
        self._ahead.clear()  # read again: they count less or more now
        # in order, so that two with the same dependents wait for each other and are no deadlock
        values = {"session": self.session, "id": task_id, "only": only or ""}
        self._tell(
            f"SELECT 1 FROM tasks WHERE {self._dependents_of(only)} ORDER BY num FOR NO KEY UPDATE", values
        )
        super()._change_open(task_id, by, only)

    # -- choosing --

    def first(self, agent_can: Sequence[str] | None, types: Sequence[str] | None) -> Row | None:
        """In one round trip, unless something came due or stands in a lane that was not in use lately."""

        def fits(lane: str) -> bool:
            return lane_fits(lane, agent_can, types)

        known = self._guesses.get(self.session, [])
        guess = list(filter(fits, known))
        row, lanes, is_due = self._first_in(guess)
        if is_due:
            self._tell(_OFFER_DUE, {"session": self.session})
            row, lanes, _ = self._first_in(guess)
        if not set(lanes) <= set(known):
            self._guesses[self.session] = [*dict.fromkeys([*lanes, *known])][:_GUESSED_LANES]
        fitting = list(filter(fits, lanes))
        if not set(fitting) <= set(guess):
            row, _, _ = self._first_in(fitting)
        # all that fit are held: by claims, or by something that leaves them ready, which only waiting tells
        return row if row or not fitting else self._first_in(fitting, passes="")[0]

    def _first_in(
        self, lanes: Sequence[str], passes: str = " SKIP LOCKED"
    ) -> tuple[Row | None, list[str], bool]:
        """The first in these lanes, held; the lanes in use, and whether anything has come due."""
        values: dict[str, Any] = {"session": self.session}
        found: list[Any] = []
        if lanes:
            sql, values["lanes"] = _FIRST_OF_SOME, json.dumps(lanes)
            if len(lanes) == 1:
                sql, values["lanes"] = _FIRST_OF_ONE, lanes[0]
            found = self._work.ask(_in_our_words(sql + passes), values)
        about = found[0][-3:] if found else self._work.ask(_in_our_words(f"SELECT {_ABOUT}"), values)[0]
        self._now, in_use, is_due = about
        return row_from(found[0][:-3]) if found else None, json.loads(in_use or "[]"), is_due


@functools.lru_cache(1000)
def _in_our_words(sql: str) -> str:
    """A statement of the common SQL as our schema has it, where the server's clock is `now`."""
    sql = re.sub(r":now\b", "(SELECT :ns.now_us())", sql)
    names = "tasks|whole_tasks|task_deps|task_events|certain_task_events|task_sessions|task_workers|task_deliveries|meta"
    return re.sub(rf"\b(FROM|JOIN|INTO|UPDATE) ({names})\b", r"\1 :ns.\2", sql)


def _is_restored(work: PostgresTransaction) -> bool:
    """Whether there are events with numbers that this cluster has not come to."""
    return bool(work.ask(_IS_RESTORED, {})[0][0])


def _count_on(work: PostgresTransaction) -> None:
    """Let the next event have a greater number than all that there are."""
    [(base,)] = work.ask(_BASE, {})
    work.script(
        "CREATE OR REPLACE FUNCTION :ns.task_base() RETURNS bigint LANGUAGE sql IMMUTABLE AS"
        f" 'SELECT {int(base)}::bigint'"
    )


class PostgresTaskStore(TaskStore):
    """The tasks of one schema of a PostgreSQL database."""

    def __init__(self, store: PostgresStore) -> None:
        self.store = store
        self.address = store.address
        self._is_made = False
        #: by session, lanes that were in use lately; what is remembered chooses the question, never the answer
        self._lanes: dict[str, list[str]] = {}

    def _make(self) -> None:
        if not self._is_made:
            self.store.submit(self._make_tables)
            self._is_made = True

    def _make_tables(self, work: PostgresTransaction) -> None:
        """Make the tables if they are not there, under the lock of all who make something; refuse newer ones."""
        if self._version(work) and not _is_restored(work):
            return
        lock = "SELECT pg_advisory_xact_lock(hashtextextended(:what, 1))"
        work.tell(lock, {"what": f"ledger schema {self.store.namespace}"})
        if not self._version(work):
            source = resources.files("ledger_tasks").joinpath("postgres.sql").read_text("utf-8")
            work.script(source + f"INSERT INTO :ns.meta VALUES ('tasks', '{SCHEMA_VERSION}');")
            _count_on(work)
        elif _is_restored(work):
            _count_on(work)

    def _version(self, work: PostgresTransaction) -> int:
        found = work.ask("SELECT value FROM :ns.meta WHERE name = 'tasks'", {})
        version = int(found[0][0]) if found else 0
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.address}: the tasks of schema {self.store.namespace} were written by a newer Ledger (schema {version}, "
                f"this one knows {SCHEMA_VERSION}); nothing was changed. Upgrade ledger-guard here"
            )
        return version

    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """Each statement for itself: nothing stays open between two of them."""
        self._make()
        return look(PostgresBook(session, self.store))

    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """In one transaction, done again when others were in its way."""
        self._make()
        if len(self._lanes) > 1000:
            self._lanes.clear()

        def perform(transaction: PostgresTransaction) -> T:
            return work(PostgresWork(session, transaction, self._lanes))

        return self.store.submit(perform, durable=durable and self.store.sync != "off")

    def is_begun(self) -> bool:
        """Whether somebody has made the tables."""
        return bool(self.store.browse("SELECT value FROM meta WHERE name = 'tasks'"))

    def calls(self) -> ledger.Store:
        """The same schema."""
        return self.store

    def close(self) -> None:
        """Close the connections; they open again when it is used again."""
        self.store.close()
