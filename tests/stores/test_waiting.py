"""Duplicates that wait are told by the server, and nobody who begins to wait is overlooked."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
import redis

from ledger_stores.base import ServerStore
from ledger_stores.postgres import PostgresStore
from ledger_stores.redis import RedisStore
from ledger_stores.testing import claim, settle
from tests.actors import eventually
from tests.stores.redis_kit import redis_url
from tests.stores.servers import fresh_namespace, postgres_url


class LongPauses(ServerStore):
    """A store that looks again only when it is told, or when somebody else waits."""

    def __init__(self, *values: Any, **settings: Any) -> None:
        super().__init__(*values, **settings)
        self.asked: list[list[str]] = []

    def changed(self, calls: Sequence[str], seconds: float) -> Any:
        self.asked.append(sorted(calls))
        return super().changed(calls, seconds + 600)


class LongPostgres(LongPauses, PostgresStore):
    pass


class LongRedis(LongPauses, RedisStore):
    pass


@pytest.fixture(params=["postgres", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[LongPauses]:
    """An empty store on each server that tells."""
    made: LongPauses
    if request.param == "postgres":
        made = LongPostgres(postgres_url(), namespace=fresh_namespace())
    else:
        made = LongRedis(redis_url(), namespace=fresh_namespace())
    yield made
    made.close()


def are_waited_for(store: LongPauses, names: Sequence[str]) -> bool:
    """Whether the server knows that somebody waits for each of these calls."""
    if isinstance(store, LongPostgres):
        with psycopg.connect(postgres_url()) as db:
            sql = f"SELECT COUNT(*) FROM {store.namespace}.waiting"
            return db.execute(sql).fetchone() == (len(names),)
    with redis.Redis.from_url(redis_url()) as plain:
        return all(plain.hexists(f"{{{store.namespace}}}:call:{name}", "waited") for name in names)


def test_a_waiter_is_told_by_the_server(store: LongPauses) -> None:
    """The end of its own call ends its wait, and those of calls that others wait for do not make it look."""
    kind = PostgresStore if isinstance(store, LongPostgres) else RedisStore
    other: ServerStore = kind(store.url, namespace=store.namespace)
    runs = {name: other.transact(claim(name)).row for name in ("mine", "others")}
    waiters = {
        name: threading.Thread(target=waiting.wait, args=(name, 600))
        for name, waiting in (("mine", store), ("others", other))
    }
    for waiter in waiters.values():
        waiter.start()
    eventually(lambda: are_waited_for(store, ["mine", "others"]))

    for name in ("others", "mine"):
        assert [["mine"]] == store.asked
        run = runs[name]
        assert run is not None
        other.transact(settle(run))
        waiters[name].join()
    other.close()


def test_whoever_begins_to_wait_is_not_overlooked(store: LongPauses) -> None:
    """A long wait for one call ends soon when somebody waits for another, and then is for both."""
    runs = [store.transact(claim(name)).row for name in ("mine", "another")]
    waiters = [threading.Thread(target=store.wait, args=(name, 600)) for name in ("mine", "another")]
    for waiter, calls in zip(waiters, (["mine"], ["another", "mine"]), strict=True):
        waiter.start()
        eventually(functools.partial(store.asked.__contains__, calls))

    for run in runs:
        assert run is not None
        store.transact(settle(run))
    for waiter in waiters:
        waiter.join()


def test_a_closed_store_is_not_opened_by_who_looked(store: LongPauses) -> None:
    """The thread that looks for waiters has ended when `close` returns, also out of a long pause."""
    store.transact(claim("mine"))
    before = set(threading.enumerate())
    store.wait("mine", 0.2)
    (looking,) = set(threading.enumerate()) - before

    store.close()

    assert not looking.is_alive()
