"""Tasks beside the calls in the ledger's own SQLite file, through the guard store's own connections.

A write joins the transaction in which the guard's store commits whatever waits (`SqliteStore.submit`): one file, one
fsync, one set of rules for forks, locks and files that were replaced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any, ClassVar, Final, TypeVar

import ledger
from ledger import SqliteStore, StoreError
from ledger_tasks.book import Row, TaskStore
from ledger_tasks.sql import COLUMNS, SCHEMA_VERSION, SqlBook, statements

T = TypeVar("T")


class SqliteBook(SqlBook):
    """A transaction on a connection, or (`ask`) one statement after the other where nothing is written."""

    source: ClassVar[str] = "whole_tasks"
    each: ClassVar[str] = "(SELECT value FROM json_each(:{}))"
    # on one boot the monotonic clock decides, which neither steps nor runs while the machine sleeps
    is_over: ClassVar[str] = "CASE WHEN boot = :boot AND boot <> '' THEN mono <= :mono ELSE until <= :now END"

    def __init__(
        self, session: str, clock: ledger.Clock, ask: Callable[[str, dict[str, Any]], list[Any]]
    ) -> None:
        super().__init__(session)
        self._clock, self._ask = clock, ask

    def do(self, sql: str, **values: Any) -> list[Any]:
        """All rows of a statement."""
        return self._ask(sql, values)

    @property
    def now(self) -> int:
        """This machine's time."""
        return self._clock.wall()

    # SQLite writes a row anew whatever changes in it. A task that ten thousand others must precede is
    # touched when each of them is done, and one with a large checkpoint by each heartbeat: so the
    # document has a table of its own, and what is counted and renewed stays small.

    def insert_row(self, values: dict[str, Any]) -> None:
        self.do(_INSERT, **{"num": None} | _without_doc(values))
        self.do(
            "INSERT INTO task_docs SELECT num, :doc FROM tasks WHERE session = :session AND id = :id",
            **_doc_of(values),
        )

    def update_row(self, values: dict[str, Any]) -> None:
        self.do(_UPDATE, **_without_doc(values))
        self.do(
            "UPDATE task_docs SET doc = :doc"
            " WHERE num = (SELECT num FROM tasks WHERE session = :session AND id = :id)",
            **_doc_of(values),
        )

    def leased(self, row: Row) -> Row:
        """With the lease on the clock of this boot too."""
        micros = int(row.lease * 1e6)
        return replace(row, until=self.now + micros, mono=self._clock.mono() + micros, boot=ledger._me().boot)

    def stamp(self) -> str | None:
        """The newest event: they are numbered in the order of their commits, and its hash tells files apart."""
        found = self.do("SELECT seq, hash FROM task_events ORDER BY seq DESC LIMIT 1")
        return f"{found[0][0]}:{found[0][1]}" if found else ""

    def clocks(self) -> dict[str, Any]:
        """Both clocks, and whose the second is."""
        return {"now": self.now, "mono": self._clock.mono(), "boot": ledger._me().boot}


_OWN: Final = [name for name in COLUMNS if name != "doc"]
#: without a number of its own a row gets the next one
_INSERT: Final = statements(["num", *_OWN])[0]
_UPDATE: Final = statements(_OWN)[1]


def _without_doc(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "doc"}


def _doc_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("session", "id", "doc")}


def schema() -> str:
    """The statements that make the tables."""
    return resources.files("ledger_tasks").joinpath("sqlite.sql").read_text("utf-8")


def make_tables(db: sqlite3.Connection, where: str) -> None:
    """Make the tables if they are not there, inside the open transaction; refuse newer ones."""
    found = db.execute("SELECT value FROM meta WHERE name = 'tasks'").fetchone()
    if found is None:
        for statement in ledger._statements(schema()):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('tasks', ?)", (SCHEMA_VERSION,))
    elif int(found[0]) > SCHEMA_VERSION:
        raise StoreError(
            f"{where}: its tasks were written by a newer Ledger (schema {found[0]}, this one knows {SCHEMA_VERSION}); "
            "nothing was changed. Upgrade ledger-guard here"
        )


class SqliteTaskStore(TaskStore):
    """The tasks of one SQLite file, or of one `MemoryStore`."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.address = store.address
        self._is_made = False

    def _make(self) -> None:
        if not self._is_made:
            if not self._is_there():  # who only looks at a ledger that has tasks writes nothing
                self.store.submit(lambda db: make_tables(db, self.address), durable=True)
            self._is_made = True

    def _is_there(self) -> bool:
        found = self.store.browse("SELECT value FROM meta WHERE name = 'tasks'")
        return bool(found) and int(found[0][0]) == SCHEMA_VERSION

    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """Each statement for itself: nothing stays open between two of them."""
        self._make()
        return look(SqliteBook(session, self.store.clock, self.store.browse))

    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """In one transaction, which may carry the guard's own writes too."""
        self._make()

        def perform(db: sqlite3.Connection) -> T:
            def ask(sql: str, values: dict[str, Any]) -> list[Any]:
                return db.execute(sql, values).fetchall()

            return work(SqliteBook(session, self.store.clock, ask))

        answer: T = self.store.submit(perform, durable=durable and self.store.sync != "off")
        return answer

    def is_begun(self) -> bool:
        """Whether somebody has made the tables."""
        return bool(self.store.browse("SELECT value FROM meta WHERE name = 'tasks'"))

    def calls(self) -> ledger.Store:
        """The same file."""
        return self.store

    def close(self) -> None:
        """Close the file; it opens again when it is used again."""
        self.store.close()
