"""Every store of tasks passes the one suite that users can put their own store through."""

from __future__ import annotations

from pathlib import Path

import pytest

from ledger import Clock, MemoryStore, SqliteStore
from ledger_stores.testing import FakeClock
from ledger_tasks.book import TaskStore
from ledger_tasks.sqlite import SqliteTaskStore
from ledger_tasks.testing import TaskConformance
from tests.stores.servers import fresh_namespace, postgres_url


class TestMemory(TaskConformance):
    """The store of tests."""

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - it needs no place
        return SqliteTaskStore(MemoryStore(clock=clock))


class TestSqlite(TaskConformance):
    """The store of every day."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> TaskStore:
        return SqliteTaskStore(SqliteStore(folder / "ledger.db", sync="off", clock=clock))

    def again(self, store: TaskStore) -> TaskStore:
        assert isinstance(store, SqliteTaskStore)
        return SqliteTaskStore(SqliteStore(store.store.path, sync="off", clock=store.store.clock))


class TestJson(TaskConformance):
    """JSON files, by this machine's own clock."""

    is_shared = True
    takes_clock = False
    lease = 2.0
    many = 20

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - the machine's own decides
        json_files = pytest.importorskip("ledger_tasks.json_files")  # the module is to come; then import it
        store: TaskStore = json_files.JsonTaskStore(folder)
        self.folder = folder
        return store

    def again(self, store: TaskStore) -> TaskStore:  # noqa: ARG002 - the folder says it all
        return self.make(self.folder, Clock())


class TestPostgres(TaskConformance):
    """A real PostgreSQL; its clock is put where the test can set it."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - it needs no place
        postgres = pytest.importorskip("ledger_tasks.postgres")  # the module is to come; then import it
        import psycopg

        from ledger_stores.postgres import PostgresStore

        self.namespace = fresh_namespace()
        calls = PostgresStore(postgres_url(), namespace=self.namespace, clock=clock)
        calls.check()
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"CREATE OR REPLACE FUNCTION {self.namespace}.now_us() RETURNS bigint LANGUAGE sql VOLATILE"
                f" AS $$ SELECT value::bigint FROM {self.namespace}.meta WHERE name = 'now' $$"
            )
            db.execute(f"INSERT INTO {self.namespace}.meta VALUES ('now', %s)", (str(clock.wall()),))
        store: TaskStore = postgres.PostgresTaskStore(calls)
        return store

    def again(self, store: TaskStore) -> TaskStore:  # noqa: ARG002 - the namespace says it all
        from ledger_stores.postgres import PostgresStore
        from ledger_tasks.stores import tasks_of

        return tasks_of(PostgresStore(postgres_url(), namespace=self.namespace))

    def advance(self, store: TaskStore, clock: FakeClock, seconds: float) -> None:  # noqa: ARG002 - by name
        import psycopg

        clock.advance(seconds)
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"UPDATE {self.namespace}.meta SET value = %s WHERE name = 'now'", (str(clock.wall()),)
            )
