"""Redis before a store of tasks: it may be away, wrong or old, and nobody is told anything but the truth."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger import SqliteStore, UsageError
from ledger_tasks import CachedTaskStore, Dep, Task, TaskLedger, TaskState
from ledger_tasks.sqlite import SqliteTaskStore
from tests.stores.redis_kit import RedisServer


@pytest.fixture(name="server", scope="module")
def a_server() -> Iterator[RedisServer]:
    """A Redis of these tests alone, so that it may be looked into, stopped and paused."""
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(name="path")
def a_path(tmp_path: Path) -> Path:
    """Where the primary is."""
    return tmp_path / "ledger.db"


@pytest.fixture(name="tasks")
def some_tasks(path: Path, server: RedisServer) -> Iterator[TaskLedger]:
    """A ledger behind an empty cache."""
    with server.client() as plain:
        plain.flushall()
    ledger = opened(path, server.url)
    ledger.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),)), Task("c")])
    yield ledger
    ledger.close()


def opened(path: Path, url: str) -> TaskLedger:
    """A ledger behind the cache at that URL."""
    return TaskLedger(CachedTaskStore(SqliteTaskStore(SqliteStore(path)), url), agent="me")


def used(server: RedisServer) -> int:
    """How often something was found in the cache."""
    with server.client() as plain:
        found: int = plain.info("stats")["keyspace_hits"]
        return found


def test_it_answers_what_the_primary_would(tasks: TaskLedger, path: Path, server: RedisServer) -> None:
    """A second look comes from Redis and is the same: fields, what it waits for, numbers and all."""
    tasks.complete_task_and_route("c", {"n": [1, None, "ü"]})
    plain = TaskLedger(path)
    tasks.list_tasks()
    before = used(server)

    assert list(plain) == list(tasks)
    assert [task.waiting for task in plain] == [task.waiting for task in tasks]
    assert [task.id for task in plain.tasks(state="pending", text="b")] == [
        task.id for task in tasks.tasks(state="pending", text="b")
    ]
    assert plain.counts() == tasks.counts() == tasks.counts()
    assert used(server) > before
    plain.close()


def test_another_writer_needs_no_cache(tasks: TaskLedger, path: Path) -> None:
    """Whoever writes, and by whatever way: the next look sees it."""
    plain = TaskLedger(path, agent="other")
    for n in range(20):
        tasks.list_tasks()
        tasks.counts()
        plain.add_task(f"n{n}", dependencies=["a"])
        assert f"n{n}" in {task.id for task in tasks}
        assert {TaskState.PENDING: 4 + n} == tasks.counts()
    plain.complete_task_and_route("a")
    assert 0 == sum(task.waiting for task in tasks)
    plain.close()


def test_a_running_lease_is_never_old(tasks: TaskLedger, path: Path) -> None:
    """Heartbeats are no events, so what is held is read anew."""
    claim = tasks.claim_next("w", lease=50)
    assert claim is not None

    def until() -> int:
        rows: list[Any] = tasks.store.read("main", lambda book: book.page(_all(), 10))
        return max(int(row.until) for row in rows)

    before = until()
    plain = TaskLedger(path)
    assert plain.heartbeat(claim)
    assert until() > before
    plain.close()


def _all() -> Any:
    from ledger_tasks.book import Wanted

    return Wanted()


def test_another_file_at_the_same_place_is_another_ledger(
    tasks: TaskLedger, path: Path, server: RedisServer
) -> None:
    """What was kept of a ledger that was deleted is not told of its successor."""
    tasks.list_tasks()
    tasks.close()
    for file in path.parent.glob("ledger.db*"):
        file.unlink()
    successor = opened(path, server.url)
    successor.add_tasks([Task("x"), Task("y"), Task("z")])

    assert ["x", "y", "z"] == [task.id for task in successor]
    successor.close()


def test_sessions_are_not_mixed(tasks: TaskLedger) -> None:
    """The same question of another session, or of all, has its own answer."""
    other = tasks.in_session("other")
    other.add_task("o")
    for _ in range(2):
        assert ["a", "b", "c"] == [task.id for task in tasks]
        assert ["o"] == [task.id for task in other]
        assert ["a", "b", "c", "o"] == [task.id for task in other.tasks(all_sessions=True)]
        assert {TaskState.PENDING: 1} == other.counts()


@pytest.mark.parametrize("junk", [b"", b"{", b"null", b"[[1]]", b'[[{}, "x", {}]]', b"7", b"\xff"])
def test_junk_in_the_cache_is_passed_over(tasks: TaskLedger, server: RedisServer, junk: bytes) -> None:
    """What no cache of ours wrote is as if nothing was there."""
    tasks.list_tasks()
    tasks.counts()
    with server.client() as plain:
        keys = plain.keys("ledger-tasks:*")
        assert keys
        for key in keys:
            plain.set(key, junk)
    assert ["a", "b", "c"] == [task.id for task in tasks]
    assert {TaskState.PENDING: 3} == tasks.counts()


def test_a_redis_that_is_away_costs_nothing_but_speed(path: Path) -> None:
    """Nobody is there, or it stops meanwhile, or it does not answer: reads and writes go on."""
    server = RedisServer()
    ledger = opened(path, server.url)
    ledger.add_task("a")
    assert ["a"] == [task.id for task in ledger]
    server.pause()
    ledger.add_task("b")
    assert ["a", "b"] == [task.id for task in ledger]
    server.go_on()
    server.stop()
    fresh = opened(path, server.url)
    fresh.add_task("c")
    assert ["a", "b", "c"] == [task.id for task in fresh] == [task.id for task in ledger]
    fresh.close()
    ledger.close()
    server.close()


def test_verify_asks_the_primary(tasks: TaskLedger, path: Path) -> None:
    """A cache is no witness: a snapshot that was changed beneath it is found."""
    tasks.list_tasks()
    assert tasks.verify()
    db = sqlite3.connect(path)
    with db:
        db.execute(
            'UPDATE task_docs SET doc = replace(doc, \'"schema":1\', \'"schema":1,"priority":6\')'
            " WHERE num = (SELECT num FROM tasks WHERE id = 'a')"
        )
    db.close()
    assert not tasks.verify()


def test_a_url_that_is_none(path: Path) -> None:
    """It is refused when it is named, not when it is first asked."""
    with pytest.raises(UsageError, match="none of a Redis"):
        opened(path, "http://127.0.0.1")
