"""Every store passes the one suite that users can put their own store through."""

from __future__ import annotations

from pathlib import Path

from ledger import Clock, MemoryStore, SqliteStore, Store
from ledger_stores.testing import FakeClock, StoreConformance
from tests.stores.kit import SixMethodStore
from tests.stores.servers import fresh_namespace, postgres_url


class TestSqlite(StoreConformance):
    """The store of every day."""

    is_shared = True

    def make(self, folder: Path, clock: Clock) -> Store:
        return SqliteStore(folder / "ledger.db", sync="off", clock=clock)

    def again(self, store: Store) -> Store:
        assert isinstance(store, SqliteStore)
        return SqliteStore(store.path, sync="off", clock=store.clock)


class TestMemory(StoreConformance):
    """The store of tests."""

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        return MemoryStore(clock=clock)


class TestSixMethods(StoreConformance):
    """What a user writes: a dict behind six methods."""

    keeps_events = False
    resets_at_once = False

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        return SixMethodStore(clock=clock)


class TestRedis(StoreConformance):
    """A real Redis; its clock is put where the test can set it."""

    is_shared = True
    has_namespaces = True

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        from tests.stores.redis_kit import open_redis

        return open_redis(clock)

    def beside(self, store: Store) -> Store:
        from tests.stores.redis_kit import open_redis

        return open_redis(store.clock)

    def again(self, store: Store) -> Store:
        from tests.stores.redis_kit import ClockedRedis

        assert isinstance(store, ClockedRedis)
        return ClockedRedis(store.url, namespace=store.namespace, clock=store.clock)


class TestPostgres(StoreConformance):
    """A real PostgreSQL; its clock is put where the test can set it."""

    is_shared = True
    has_namespaces = True

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        import psycopg

        from ledger_stores.postgres import PostgresStore

        namespace = fresh_namespace()
        store = PostgresStore(postgres_url(), namespace=namespace, clock=clock)
        store.check()
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"CREATE OR REPLACE FUNCTION {namespace}.now_us() RETURNS bigint LANGUAGE sql VOLATILE AS"
                f" $$ SELECT value::bigint FROM {namespace}.meta WHERE name = 'now' $$"
            )
            db.execute(f"INSERT INTO {namespace}.meta VALUES ('now', %s)", (str(clock.wall()),))
        return store

    def beside(self, store: Store) -> Store:
        return self.make(Path(), store.clock)

    def again(self, store: Store) -> Store:
        from ledger_stores.postgres import PostgresStore

        assert isinstance(store, PostgresStore)
        return PostgresStore(store.url, namespace=store.namespace)

    def advance(self, store: Store, clock: FakeClock, seconds: float) -> None:
        import psycopg

        from ledger_stores.postgres import PostgresStore

        assert isinstance(store, PostgresStore)
        clock.advance(seconds)
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            db.execute(
                f"UPDATE {store.namespace}.meta SET value = %s WHERE name = 'now'", (str(clock.wall()),)
            )


class TestDynamo(StoreConformance):
    """moto's server behind real boto3; its time is put where the test can set it."""

    is_shared = True
    has_namespaces = True
    keeps_events = False
    resets_at_once = False

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        from tests.stores.dynamo_kit import open_dynamo

        return open_dynamo(clock)

    def beside(self, store: Store) -> Store:
        from tests.stores.dynamo_kit import open_dynamo

        return open_dynamo(store.clock)

    def again(self, store: Store) -> Store:
        from tests.stores.dynamo_kit import ClockedDynamo

        assert isinstance(store, ClockedDynamo)
        return ClockedDynamo(store.url, namespace=store.namespace, clock=store.clock)


class TestMongo(StoreConformance):
    """Real pymongo on a stand-in for MongoDB; its time is put where the test can set it."""

    is_shared = True
    keeps_events = False
    resets_at_once = False

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        from tests.stores.mongo_kit import open_mongo, stand_in

        return open_mongo(stand_in().url, clock)

    def again(self, store: Store) -> Store:
        from tests.stores.mongo_kit import ClockedMongo

        assert isinstance(store, ClockedMongo)
        return ClockedMongo(store.url, namespace=store.namespace, clock=store.clock)


class TestLiveMongo(TestMongo):
    """The same on a real MongoDB, where the environment names one."""

    def make(self, folder: Path, clock: Clock) -> Store:  # noqa: ARG002 - it needs no place
        from tests.stores.mongo_kit import live_url, open_mongo

        return open_mongo(live_url(), clock)
