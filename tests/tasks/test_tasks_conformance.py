"""Every store of tasks passes the one suite that users can put their own store through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from ledger import Clock, MemoryStore, SqliteStore
from ledger_stores.mongodb import MongoStore
from ledger_stores.postgres import PostgresStore
from ledger_stores.testing import FakeClock
from ledger_tasks.book import TaskStore
from ledger_tasks.json_files import JsonTaskStore
from ledger_tasks.mongodb import MongoTaskStore
from ledger_tasks.postgres import PostgresTaskStore
from ledger_tasks.sqlite import SqliteTaskStore
from ledger_tasks.testing import TaskConformance
from tests.stores.mongo_kit import StandIn
from tests.stores.redis_kit import redis_url
from tests.stores.servers import fresh_namespace, postgres_url
from tests.tasks.replica_kit import clocked_tasks


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
    """JSON files."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> TaskStore:
        return JsonTaskStore(folder, clock=clock)

    def again(self, store: TaskStore) -> TaskStore:
        assert isinstance(store, JsonTaskStore)
        return JsonTaskStore(store.folder, clock=store.clock)


class TestPostgres(TaskConformance):
    """A real PostgreSQL; its clock is put where the test can set it."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - it needs no place
        self.namespace = fresh_namespace()
        calls = PostgresStore(postgres_url(), namespace=self.namespace, clock=clock)
        calls.check()
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"CREATE OR REPLACE FUNCTION {self.namespace}.now_us() RETURNS bigint LANGUAGE sql VOLATILE"
                f" AS $$ SELECT value::bigint FROM {self.namespace}.meta WHERE name = 'now' $$"
            )
            db.execute(f"INSERT INTO {self.namespace}.meta VALUES ('now', %s)", (str(clock.wall()),))
        return PostgresTaskStore(calls)

    def again(self, store: TaskStore) -> TaskStore:  # noqa: ARG002 - the namespace says it all
        return PostgresTaskStore(PostgresStore(postgres_url(), namespace=self.namespace))

    def advance(self, store: TaskStore, clock: FakeClock, seconds: float) -> None:  # noqa: ARG002 - by name
        clock.advance(seconds)
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"UPDATE {self.namespace}.meta SET value = %s WHERE name = 'now'", (str(clock.wall()),)
            )


class TestRedis(TaskConformance):
    """A real Redis; its clock is put where the test can set it."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - it needs no place
        self.namespace = fresh_namespace()
        self.set_time(clock)
        return self.again()

    def again(self, store: TaskStore | None = None) -> TaskStore:  # noqa: ARG002 - the namespace says it all
        return clocked_tasks(self.namespace)

    def advance(self, store: TaskStore, clock: FakeClock, seconds: float) -> None:  # noqa: ARG002 - by name
        clock.advance(seconds)
        self.set_time(clock)

    def set_time(self, clock: Clock) -> None:
        """What the server's clock says from now on."""
        with redis.Redis.from_url(redis_url()) as plain:
            plain.set(f"{{{self.namespace}}}:time", clock.wall())


class TestMongo(TaskConformance):
    """The stand-in for MongoDB; its clock is the test's."""

    is_shared = True
    many = 20  # the stand-in is slow, and every other store has sixty

    def make(self, folder: Path, clock: Clock) -> TaskStore:  # noqa: ARG002 - it needs no place
        self.server = StandIn(clock.wall)
        self.namespace = fresh_namespace()
        return self.again()

    def again(self, store: TaskStore | None = None) -> TaskStore:  # noqa: ARG002 - the namespace says it all
        return MongoTaskStore(MongoStore(self.server.url, namespace=self.namespace))

    @pytest.fixture(autouse=True)
    def _end(self) -> Iterator[None]:
        yield
        self.server.close()
