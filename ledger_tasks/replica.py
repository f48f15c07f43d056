"""Tasks on a server that knows no SQL: a log that all share, and the tables in the memory of each process.

    server    log:  … 41 42 43 44 (head)        documents: one for each row, as of some place in the log
    process   a SQLite database in memory, as of 42: reads 43 and 44, works, and asks to be 45

A read asks the server what came after its own place, takes that in and looks. A write does the same, works in a
transaction in memory, and asks the server to append what it changed *if the log still ends where it stood*: that is the
commit, and all that anybody has to agree on. If others came first it is rolled back, takes in what they did and does its
work again on that. So operations, pages and proofs are the very ones that SQLite has, on the state of one moment.

Whoever is too far behind for the log reads the documents and goes on from there. What a process has in memory is never
the truth, and is let go of when anything about it is odd. It takes as much memory as the ledger is large, in each process.
"""

from __future__ import annotations

import functools
import json
import random
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import ledger
from ledger import StoreError
from ledger_stores.base import ServerStore
from ledger_tasks.book import Book, Row, TaskStore
from ledger_tasks.memory import STORES, empty_tables, translated, writing
from ledger_tasks.sqlite import SqliteBook

T = TypeVar("T")
#: how often all documents are read until the log has what came meanwhile
_READINGS: Final = 20
#: seconds after which it is looked again whether another's turn is over
_LONGEST_PAUSE: Final = 0.01
#: milliseconds of a turn, after which its holder is taken to be gone
_FIRST_TURN, _LONGEST_TURN = 20, 10_000
#: how long a fork waits for whoever is inside
_FORK_SECONDS: Final = 5.0


class Place(NamedTuple):
    """Where a log ends, or did: number and token of a commit.

    The token tells two logs apart that were one until a server came back with less than it had.
    """

    number: int = 0
    token: str = ""


class Change(NamedTuple):
    """What became of one row: its table, its primary key, and its columns; None: it is gone."""

    table: str
    key: Sequence[Any]
    row: dict[str, Any] | None

    @classmethod
    def read(cls, table: str, rows: bytes) -> list[Change]:
        """What stands in documents, a JSON list of rows, which have their own keys; raises `StoreError`."""
        try:
            return [cls(table, (), dict(row)) for row in json.loads(rows)]
        except (ValueError, TypeError) as error:
            raise _unreadable(table, error) from error

    def texts(self) -> tuple[str, str, str]:
        """As it is written: table, key and row, which is null where it is gone."""
        return self.table, _json(self.key), _json(self.row)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unreadable(table: str, error: Exception) -> StoreError:
    return StoreError(
        f"a document of {table} is not as this Ledger writes it ({error}); nothing was changed. Was it written by hand, "
        "or by a newer Ledger? Then upgrade ledger-guard here"
    )


class Entry(NamedTuple):
    """A commit: the token of who asked for it, and what it changed."""

    token: str
    changes: Sequence[Change]


class News(NamedTuple):
    """What a server answers to whoever says where it stands."""

    #: UTC microseconds by the clock that decides leases
    now: int
    #: what was committed after that place; None: some of it is in the log no more, or that place never was
    entries: Sequence[Entry] | None
    #: milliseconds for which it is another's turn to write, at most
    wait: int = 0


class Turn(NamedTuple):
    """A wish to be let alone: for whose commit, and for how many milliseconds at most."""

    token: str
    millis: int


class SharedLog(ABC):
    """The server's side: a log that only grows at its end, and documents that follow it."""

    @abstractmethod
    def news(self, place: Place, turn: Turn | None = None) -> News:
        """What came after that place, and the time. `turn` is taken if it is nobody else's, until its commit.

        A turn binds nobody: it keeps others from working in vain, and lets a long work come to its end.
        """

    @abstractmethod
    def commit(self, place: Place, entry: Entry, *, durable: bool) -> News | None:
        """Append the entry if the log ends at that place: None. Else what came after it, with it or without.

        An entry whose answer was lost is among the news when it is asked for again, which the driver may do too.
        """

    @abstractmethod
    def leave(self, token: str) -> None:
        """Give back a turn that is not used."""

    @abstractmethod
    def begin(self) -> Place:
        """A place that all documents have reached: whoever reads them now goes on from there."""

    @abstractmethod
    def documents(self) -> Iterator[list[Change]]:
        """All documents, some at a time; those that change meanwhile as they were or are."""


# -- one table in memory --

#: columns of `touched`, which notes what a transaction does, for the primary key of any table
_NOTED: Final = ("one", "two", "three")


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of the schema."""

    name: str
    key: tuple[str, ...]
    #: what it refuses to change is inserted once, and is never touched again
    only_grows: bool

    def watch(self, db: sqlite3.Connection) -> None:
        """Note from now on which of its rows are touched, whoever does it by whatever statement."""
        for event, which in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
            values = ", ".join(f"{which}.{name}" for name in self.key)
            db.execute(
                f"CREATE TEMP TRIGGER {event}_{self.name} AFTER {event} ON {self.name} BEGIN"
                f" INSERT INTO touched (name, {self._noted}) VALUES ('{self.name}', {values}); END"
            )

    @property
    def _noted(self) -> str:
        return ", ".join(_NOTED[: len(self.key)])

    def touched(self, db: sqlite3.Connection) -> Iterator[Change]:
        """What became of the rows that were touched."""
        size = len(self.key)
        same = " AND ".join(f"t.{name} = n.{noted}" for name, noted in zip(self.key, _NOTED, strict=False))
        found = db.execute(
            f"SELECT n.*, t.* FROM (SELECT DISTINCT {self._noted} FROM touched WHERE name = '{self.name}') n"
            f" LEFT JOIN {self.name} t ON {same}"
        )
        columns = [about[0] for about in found.description][size:]
        for values in found:
            row = dict(zip(columns, values[size:], strict=True))
            yield Change(self.name, values[:size], None if row[self.key[0]] is None else row)

    def put(self, db: sqlite3.Connection, changes: Iterable[Change]) -> None:
        """Take in rows as another process left them; to do it twice is to do it once."""
        for columns, some in groupby(changes, key=lambda change: change.row and tuple(change.row)):
            if columns is None:
                db.executemany(self._delete, [change.key for change in some])
            else:
                db.executemany(_upsert(self, columns), [change.row or {} for change in some])

    @property
    def _delete(self) -> str:
        return f"DELETE FROM {self.name} WHERE {' AND '.join(f'{name} = ?' for name in self.key)}"


@functools.lru_cache(100)
def _upsert(table: _Table, columns: tuple[str, ...]) -> str:
    """What puts a row into a table; columns that it does not name have their defaults."""
    if bad := [name for name in columns if not name.isidentifier()]:
        raise ValueError(f"{bad[0]!r} is no column")
    names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
    into = f"INSERT INTO {table.name} ({names}) SELECT {marks} WHERE "
    if table.only_grows:
        same = " AND ".join(f"{name} = :{name}" for name in table.key)
        return f"{into}NOT EXISTS (SELECT 1 FROM {table.name} WHERE {same})"
    sets = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return f"{into}TRUE ON CONFLICT ({', '.join(table.key)}) DO UPDATE SET {sets}"


def _tables_in(db: sqlite3.Connection) -> dict[str, _Table]:
    """Every table of the schema, whatever that has."""
    refuses = "type = 'trigger' AND sql LIKE '%BEFORE UPDATE%RAISE(ABORT%'"
    grow = {name for (name,) in db.execute(f"SELECT tbl_name FROM sqlite_master WHERE {refuses}")}
    found = {}
    for (name,) in db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    ):
        columns = db.execute(f"SELECT name FROM pragma_table_info('{name}') WHERE pk > 0 ORDER BY pk")
        found[name] = _Table(name, tuple(column for (column,) in columns), name in grow)
    return found


#: tables of the schema; of these, those whose rows are never changed
TABLES: Final = _tables_in(empty_tables())
GROWING: Final = tuple(table.name for table in TABLES.values() if table.only_grows)


class Replica:
    """The tables in memory, as they were at a place in the log."""

    def __init__(self, place: Place, documents: Iterable[Sequence[Change]] = ()) -> None:
        self.place = place
        self.db = empty_tables()
        self.db.execute(f"CREATE TEMP TABLE touched (name, {', '.join(_NOTED)})")
        for changes in documents:
            self._take(changes)
        with writing(self.db):
            # after that: to note each document would take longer than to read it
            for table in TABLES.values():
                table.watch(self.db)

    def __del__(self) -> None:
        self.db.close()

    def _take(self, changes: Sequence[Change]) -> None:
        with writing(self.db):
            self._put(changes)

    def follow(self, entries: Sequence[Entry]) -> None:
        """What was committed after its place."""
        if entries:
            self._take([change for entry in entries for change in entry.changes])
            self.place = Place(self.place.number + len(entries), entries[-1].token)

    def _put(self, changes: Sequence[Change]) -> None:
        for name, some in groupby(changes, key=lambda change: change.table):
            table, rows = TABLES.get(name), list(some)
            try:
                if table is None:
                    raise ValueError("there is no such table")
                table.put(self.db, rows)
            except (ValueError, TypeError, sqlite3.Error) as error:
                raise _unreadable(name, error) from error
        self.db.execute("DELETE FROM touched")

    def changes(self) -> list[Change]:
        """What the transaction that is open has changed."""
        names = [name for (name,) in self.db.execute("SELECT DISTINCT name FROM touched")]
        found = [change for name in names for change in TABLES[name].touched(self.db)]
        if found:
            self.db.execute("DELETE FROM touched")
        return found

    def ask(self, sql: str, values: dict[str, Any]) -> list[Any]:
        """All rows of a statement."""
        return self.db.execute(sql, values).fetchall()


class ReplicaBook(SqliteBook):
    """A replica, at a time of the server's."""

    # the monotonic clocks of machines have nothing to do with each other
    is_over: ClassVar[str] = "until <= :now"

    def __init__(self, session: str, replica: Replica, now: int, *, again: bool = False) -> None:
        super().__init__(session, ledger.Clock(), replica.ask)
        self._now, self.again = now, again

    @property
    def now(self) -> int:
        """The server's time when it said what is new."""
        return self._now

    def leased(self, row: Row) -> Row:
        """By the server's clock alone."""
        return replace(Book.leased(self, row), mono=0, boot="")

    def clocks(self) -> dict[str, Any]:
        """The server's."""
        return {"now": self._now}

    def stamp(self) -> str | None:
        return None  # it is in memory already


# -- the store --


class _Overtaken(Exception):
    """Others came first; the work is undone and may be done again on what they left."""

    def __init__(self, news: News) -> None:
        super().__init__()
        self.news = news


class _NotOurTurn(Exception):
    """Another is writing, and lost to others before."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass(slots=True)
class _Asked:
    """A write that is tried until it comes first."""

    session: str
    token: str
    durable: bool
    losses: int = 0
    is_contended: bool = False
    is_done: bool = False
    again: bool = False

    @property
    def turn(self) -> Turn | None:
        """Nothing where nobody else writes; longer each time that it was not long enough."""
        millis = min(_FIRST_TURN << min(self.losses, 20), _LONGEST_TURN)
        return Turn(self.token, millis) if self.is_contended else None

    def lost(self, news: News) -> None:
        """Others came first."""
        self.losses += 1
        self.is_contended = True
        # too far behind to see whether a commit whose answer was lost went in
        self.again = self.again or news.entries is None


class ReplicaStore(TaskStore):
    """Tasks that are kept in a shared log beside the calls of a guard's store."""

    def __init__(self, store: ServerStore, log: SharedLog) -> None:
        self.store, self.log = store, log
        self.address = store.address
        #: of a parent that was just inside: closing it is not the child's to do
        self._inherited: list[Replica] = []
        self._replica: Replica | None = None
        self._is_held = False
        self._begin()
        STORES.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        #: the thread that is inside
        self._holder = 0

    # -- the contract --

    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """On the state of one moment after it was asked for."""
        with self._inside():
            replica, now = self._current()
            return look(ReplicaBook(session, replica, now))

    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """In one transaction, done again on what others did if they came first."""
        asked = _Asked(session, ledger.new_token(), durable=durable)
        limit = time.monotonic() + max(1.0, self.store.lock_seconds)
        try:
            while time.monotonic() < limit:
                try:
                    with self._inside():
                        return self._attempt(asked, work)
                except _Overtaken as overtaken:
                    asked.lost(overtaken.news)
                except _NotOurTurn as other:
                    asked.is_contended = True
                    time.sleep(random.uniform(0.1, 1) * min(_LONGEST_PAUSE, other.seconds))  # noqa: S311
        finally:
            if asked.turn and not asked.is_done:
                with suppress(StoreError):
                    self.log.leave(asked.token)
        raise StoreError(
            f"{self.address}: others came first for {self.store.lock_seconds:g} s ({asked.losses} times); nothing was "
            "changed. Let fewer write at once, change fewer tasks in one go, or keep so busy a ledger in PostgreSQL"
        )

    def _attempt(self, asked: _Asked, work: Callable[[Any], T]) -> T:
        replica, now = self._current(asked)
        with writing(replica.db):
            answer = work(ReplicaBook(asked.session, replica, now, again=asked.again))
            changes = replica.changes()
            if not changes:
                return answer
            found = self.log.commit(replica.place, Entry(asked.token, changes), durable=asked.durable)
            if found is not None and not _is_among(asked.token, found):
                raise _Overtaken(found)
        asked.is_done = True
        replica.place = Place(replica.place.number + 1, asked.token)
        return answer

    def forget(self) -> None:
        """Look at the server's own documents next time."""
        with self._inside():
            self._drop()

    def calls(self) -> ledger.Store:
        """The same namespace."""
        return self.store

    def close(self) -> None:
        """Let go of the memory and of the connections; they come back when it is used again."""
        self.forget()
        self.store.close()

    # -- the replica --

    @contextmanager
    def _inside(self) -> Iterator[None]:
        if self._holder == threading.get_ident():
            raise StoreError(
                f"{self.address}: a signal handler used the tasks in the midst of a transaction of its own thread; "
                "nothing was changed. Let the handler set a flag, and use the ledger outside it"
            )
        with self._mutex, translated(self.address):
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    def _current(self, asked: _Asked | None = None) -> tuple[Replica, int]:
        """The replica as the log is, and the time."""
        for _ in range(_READINGS):
            replica = self._replica or self._read_all()
            news = self.log.news(replica.place, asked.turn if asked else None)
            self._replica = None  # until it is whole again
            if news.entries is not None and not replica.db.in_transaction:
                replica.follow(news.entries)
                self._replica = replica
                if asked and news.wait:
                    raise _NotOurTurn(news.wait / 1000)
                return replica, news.now
            replica.db.close()
        raise StoreError(
            f"{self.address}: its tasks change faster than they can be read; nothing was changed. Let fewer write at "
            "once, or keep so busy a ledger in PostgreSQL"
        )

    def _read_all(self) -> Replica:
        return Replica(self.log.begin(), self.log.documents())

    def _drop(self) -> None:
        replica, self._replica = self._replica, None
        if replica is not None:
            replica.db.close()

    # -- forks --

    def before_fork(self) -> None:
        """Let nobody in, unless somebody waits for a server that says nothing."""
        self._is_held = self._mutex.acquire(timeout=_FORK_SECONDS)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._is_held:
            self._mutex.release()

    def after_fork_in_child(self) -> None:
        """Go on with a copy, if nobody was inside."""
        replica = self._replica
        if replica is not None and (not self._is_held or replica.db.in_transaction):
            self._inherited.append(replica)
            self._replica = None
        self._begin()


def _is_among(token: str, news: News) -> bool:
    """Whether the first of these is the commit whose answer was lost."""
    return news.entries is not None and [token] == [entry.token for entry in news.entries[:1]]
