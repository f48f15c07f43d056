"""A tool whose effect is in the ledger's own database: its writes and its outcome are one transaction.

This is exactly once without a condition.  The claim is committed first, on the guard's connection.  Then
the tool writes on the user's, the settlement is written there too, and both are committed at once.  Who is
killed before that has written nothing, so whoever takes the run over may run it again; who was given up
while paused finds at the settlement that the run is no longer its own, and its writes are rolled back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Any, cast

import ledger
from ledger import Guard, MemoryStore, NotPerformed, SqliteStore, UsageError


class OtherDatabase(UsageError, NotPerformed):
    """The connection is to another database than the ledger's; nothing ran."""


class Transaction:
    """Calls tools in the user's transactions; what `guard.transaction(connection)` gives."""

    def __init__(self, guard: Guard, connection: Any) -> None:
        self._guard = guard
        self._connection = connection

    def __call__(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Like calling the guard; the tool must be a plain function and leaves the transaction alone."""
        attempt = self._guard._attempt(fn, args, kwargs)
        if attempt.tool.is_async:
            raise UsageError(f"{attempt.claim.tool} is async; a transaction is for a plain function")
        own = _own(attempt.store, self._connection)
        own.refuse_open()
        attempt.around = own.around
        return self._guard._answer(attempt).given()


class _Own:
    """The user's connection, and how a transaction on it begins and ends."""

    def __init__(self, store: ledger.Store, connection: Any) -> None:
        self.store = store
        self.connection = connection

    def refuse_open(self) -> None:
        """Refuse a connection with a transaction open: what it wrote would be committed with the tool's."""
        if self.is_open():
            raise UsageError(
                "the connection has a transaction open already, nothing ran; commit it first: the guard begins "
                "one when the claim is on disk"
            )

    def around(self, attempt: ledger._Attempt, call: Callable[[], Any]) -> Any:
        """Run the tool and settle its run in one transaction."""
        self.begin()
        try:
            self._refuse_other_database(attempt)
            value = call()
            if not self.is_open():
                raise UsageError(
                    f"{attempt.claim.tool} ended the transaction itself; leave commit and rollback to the guard"
                )
            ending = attempt._ending_of(value, None)
            verdict = self.store.perform_on(self.connection, ending)
            if verdict.kind != "settled":
                raise NotPerformed(
                    f"run {attempt.run} was given up while it ran; what it wrote was rolled back"
                )
            self.commit()
        except BaseException:
            self.roll_back()
            raise
        attempt.settled = verdict
        return value

    def _refuse_other_database(self, attempt: ledger._Attempt) -> None:
        """The claim was committed a moment ago: a connection that does not see it is to another database."""
        if not self.sees(attempt.claim.call, attempt.run, attempt.claim.token):
            raise OtherDatabase(
                "the connection is not to the database that the ledger is in, nothing ran; give one that is, "
                "or call the guard without a transaction"
            )

    def is_open(self) -> bool:
        """Whether a transaction is open."""
        raise NotImplementedError

    def sees(self, call: str, run: int, token: str) -> bool:
        """Whether that run is there."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin."""
        raise NotImplementedError

    def commit(self) -> None:
        """Commit."""
        self.connection.execute("COMMIT")

    def roll_back(self) -> None:
        """Roll back what is open, if the connection still stands."""
        raise NotImplementedError


class _OnSqlite(_Own):
    """sqlite3, in any of its transaction modes. It holds the file's write lock while the tool runs."""

    def is_open(self) -> bool:
        return bool(self.connection.in_transaction)

    def sees(self, call: str, run: int, token: str) -> bool:
        files = {row[1]: row[2] for row in self.connection.execute("PRAGMA database_list")}
        path = cast("SqliteStore", self.store).path
        if not files["main"] or not os.path.samefile(files["main"], path):  # noqa: PTH121 - two texts
            return False
        sql = "SELECT 1 FROM main.runs WHERE call = ? AND run = ? AND owner = ?"
        return self.connection.execute(sql, (call, run, token)).fetchone() is not None

    def begin(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def roll_back(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")


class _OnPostgres(_Own):
    """psycopg 3, with or without autocommit."""

    def is_open(self) -> bool:
        from psycopg.pq import TransactionStatus

        return bool(self.connection.info.transaction_status != TransactionStatus.IDLE)

    def sees(self, call: str, run: int, token: str) -> bool:
        namespace = cast("Any", self.store).namespace
        if self.connection.execute("SELECT to_regclass(%s)", (f"{namespace}.runs",)).fetchone()[0] is None:
            return False
        sql = f"SELECT 1 FROM {namespace}.runs WHERE call = %s AND run = %s AND owner = %s"
        return self.connection.execute(sql, (call, run, token)).fetchone() is not None

    def begin(self) -> None:
        if self.connection.autocommit:
            self.connection.execute("BEGIN")  # without autocommit psycopg begins by itself

    def commit(self) -> None:
        self.connection.commit()

    def roll_back(self) -> None:
        if not self.connection.closed and not self.connection.broken:
            self.connection.rollback()


def _own(store: ledger.Store, connection: Any) -> _Own:
    """How to handle that connection beside that store."""
    on_file = isinstance(store, SqliteStore) and not isinstance(store, MemoryStore)
    if isinstance(connection, sqlite3.Connection) and on_file:
        return _OnSqlite(store, connection)
    kind = f"{type(connection).__module__.partition('.')[0]}.{type(connection).__name__}"
    if type(store).__name__ == "PostgresStore" and hasattr(connection, "info"):
        return _OnPostgres(store, connection)
    raise UsageError(
        f"a {kind} shares no transaction with {type(store).__name__}; give a sqlite3 connection to the "
        "ledger's file, or a psycopg connection to its PostgreSQL database"
    )
