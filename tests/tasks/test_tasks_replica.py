"""Tasks in a shared log, on Redis and MongoDB: one order of commits, whatever happens to who writes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from ledger import Clock, StoreError, UsageError
from ledger_stores.dynamodb import DynamoStore
from ledger_tasks import AsyncTaskLedger, Claim, Task, TaskLedger, TaskState
from ledger_tasks.book import Book
from ledger_tasks.replica import Change, Entry, Place, Replica
from ledger_tasks.stores import tasks_of
from ledger_tasks.testing import after
from tests.stores.redis_kit import RedisServer, redis_url
from tests.stores.way import PATIENCE
from tests.tasks.replica_kit import OnMongo, OnRedis
from tests.tasks.replica_kit import Place as Somewhere

_FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=[OnRedis, OnMongo], ids=["redis", "mongodb"])
def place(request: pytest.FixtureRequest) -> Iterator[Somewhere]:
    """An empty namespace on each of the servers."""
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of one's own, which may be ended."""
    made = RedisServer()
    yield made
    made.close()


@pytest.fixture
def one(place: Somewhere) -> Iterator[TaskLedger]:
    """A process's ledger."""
    made = place.tasks("one")
    yield made
    assert () == made.verify().faults
    made.close()


@pytest.fixture
def two(place: Somewhere) -> Iterator[TaskLedger]:
    """Another's."""
    made = place.tasks("two")
    yield made
    made.close()


def ids(tasks: TaskLedger) -> list[str]:
    """What it sees."""
    return [task.id for task in tasks.tasks()]


def killed_at_commit(place: Somewhere, what: Any, work: Callable[[TaskLedger], Any]) -> None:
    """A process does that and is killed while its commit, or the answer to it, is under way."""
    with place.way() as way:
        gate = _FORK.Barrier(2)

        def act() -> None:
            mine = place.tasks("killed", way.url)
            mine.counts()
            gate.wait(PATIENCE)
            gate.wait(PATIENCE)
            work(mine)

        child = _FORK.Process(target=act)
        child.start()
        gate.wait(PATIENCE)
        way.hold(place.mark, what)
        gate.wait(PATIENCE)
        assert way.caught.wait(PATIENCE)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(PATIENCE)
        way.give_up()


# -- one order --


def test_what_one_writes_the_other_sees(one: TaskLedger, two: TaskLedger) -> None:
    """Each look is at the state after all that was answered before it, of every process."""
    one.add_task("a")
    two.add_task("b", dependencies=["a"])
    claim = one.claim_next()
    assert claim is not None
    one.start(claim)

    assert TaskState.ACTIVE == two.get("a").state
    assert ["b"] == [task.id for task in one.complete_task_and_route(claim)]
    assert one.list_tasks() == two.list_tasks()
    assert list(one.events()) == list(two.events())


def test_of_two_at_the_same_place_the_second_does_its_work_again(one: TaskLedger, two: TaskLedger) -> None:
    """It works on what the first one left, and nothing of its first try is there."""
    one.add_task("a")
    seen = []

    def work(book: Book) -> str:
        row = book.row("a")
        assert row is not None
        seen.append(row.task.assignee)
        if len(seen) == 1:
            two.claim_task("a")
        book.save(row)
        return row.task.assignee

    assert "two" == one.store.write("main", work)
    assert ["", "two"] == seen
    assert one.list_tasks() == two.list_tasks()


def test_a_long_work_comes_to_its_end_among_many_short_ones(place: Somewhere) -> None:
    """Whoever always came too late is let alone for once."""
    is_over = threading.Event()
    done: list[int] = []

    def busy(number: int) -> None:
        with closing(place.tasks(f"busy {number}")) as mine:
            while not is_over.is_set():
                mine.add_task(f"{number}-{len(done)}")
                done.append(number)

    threads = [threading.Thread(target=busy, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    tries = 0

    def work(book: Book) -> None:
        nonlocal tries
        tries += 1
        begun = len(done)
        limit = time.monotonic() + 0.3
        while len(done) < begun + 2 and time.monotonic() < limit:
            time.sleep(0.005)  # the work itself: as long as two of the others, if they do not wait
        book.hold_graph()

    with closing(place.store()) as store:
        store.write("long", work)
        is_over.set()
        for thread in threads:
            thread.join()

        assert "long" in store.read("long", lambda book: book.sessions())
        assert 1 < tries


def test_threads_of_one_process_share_what_it_has_in_memory(one: TaskLedger) -> None:
    """What each of them adds is there once, in one order."""
    threads = [threading.Thread(target=one.add_task, args=(f"t{n}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(f"t{n}" for n in range(12)) == sorted(ids(one))
    assert list(range(1, 13)) == [event.seq for event in one.events()]


def test_a_transaction_within_a_transaction_is_refused(one: TaskLedger) -> None:
    """As a signal handler would begin it; the outer one goes on."""
    one.add_task("a")

    def work(book: Book) -> int:
        with pytest.raises(StoreError, match="signal handler"):
            one.counts()
        return book.counts()["pending"]

    assert 1 == one.store.write("main", work)


def test_an_event_loop_is_not_blocked(place: Somewhere) -> None:
    """The same operations for asyncio."""

    async def work() -> list[str]:
        tasks = AsyncTaskLedger(place.store(), agent="loop")
        await asyncio.gather(*(tasks.add_task(f"t{n}") for n in range(5)))
        claims = await asyncio.gather(*(tasks.claim_next() for _ in range(6)))
        await tasks.close()
        return sorted(claim.id for claim in claims if claim)

    assert [f"t{n}" for n in range(5)] == asyncio.run(work())


# -- processes --


def test_twenty_processes_begin_a_ledger_at_once(place: Somewhere) -> None:
    """Each adds a task and claims one: twenty tasks, each claimed once."""
    answers, gate = _FORK.SimpleQueue(), _FORK.Barrier(20)

    def work(number: int) -> None:
        with closing(place.tasks(f"p{number}")) as mine:
            gate.wait(PATIENCE)
            mine.add_task(f"t{number}")
            claim = mine.claim_next()
            answers.put(claim.id if claim else "")

    children = [_FORK.Process(target=work, args=(n,)) for n in range(20)]
    for child in children:
        child.start()
    told = [answers.get() for _ in children]
    for child in children:
        child.join(PATIENCE)

    assert sorted(f"t{n}" for n in range(20)) == sorted(told)
    with closing(place.tasks()) as mine:
        assert {TaskState.ASSIGNED: 20} == mine.counts()
        assert mine.verify()


def test_a_forked_child_goes_on_with_a_copy(one: TaskLedger) -> None:
    """What it does is seen by its parent, and nothing that its parent has is disturbed."""
    one.add_task("a")

    def work() -> None:
        one.add_task("b")
        one.close()

    child = _FORK.Process(target=work)
    child.start()
    child.join(PATIENCE)

    assert 0 == child.exitcode
    assert ["a", "b"] == ids(one)


def test_who_is_killed_before_its_commit_arrived_has_done_nothing(place: Somewhere, one: TaskLedger) -> None:
    """Its work in memory is gone with it, and the next one goes on at the same place."""
    one.add_task("a")

    killed_at_commit(place, "message", lambda mine: mine.claim_next())

    assert ("", 1) == (one.get("a").assignee, one.last_seq())
    assert one.claim_next()


def test_who_is_killed_after_its_commit_arrived_has_done_all_of_it(place: Somewhere, one: TaskLedger) -> None:
    """Also where rows and log are written after it: whoever comes next does that."""
    one.add_tasks([Task("a"), Task("b", depends_on=after("a"))])

    killed_at_commit(place, "answer", lambda mine: mine.cancel("a", "because", dependents=True))
    with closing(place.tasks("new")) as new:
        assert {TaskState.CANCELLED: 2} == one.counts() == new.counts()
        new.add_task("c")
    assert ["a", "b", "c"] == ids(one)


def test_who_dies_while_bringing_the_rows_forward_loses_nothing() -> None:
    """The commit stands, no row is older than the commit that it says, and the next one finishes it."""
    place = OnMongo()
    with closing(place), closing(place.tasks("one")) as one:
        one.add_task("a")
        with place.way() as way, closing(place.tasks("killed", way.url, short=True)) as mine:
            mine.counts()
            child = _FORK.Process(target=lambda: [mine.add_task(f"b{n}") for n in range(9)])
            way.hold(b"tasks.rows\0", "answer")
            child.start()
            assert way.caught.wait(PATIENCE)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join(PATIENCE)
            way.give_up()

        before = ids(one)
        assert {"a", "b0"} <= set(before)
        with closing(place.tasks("next", short=True)) as following:
            following.add_tasks([Task("c"), Task("d")])
            following.add_task("e")
        with closing(place.tasks("new")) as new:
            assert [*before, "c", "d", "e"] == ids(new) == ids(one)
            assert new.verify()


# -- answers that are lost --


def test_a_commit_whose_answer_is_lost_is_done_once(place: Somewhere) -> None:
    """It is asked again and finds itself in the log."""
    with place.way() as way, closing(place.tasks("one", way.url)) as mine:
        mine.add_task("a")
        way.lose(place.mark)
        task = mine.add_task("b")

        assert way.caught.is_set()
        assert ["a", "b"] == ids(mine)
        assert [task] == [found for found in mine.tasks() if found.id == "b"]
        assert 2 == mine.last_seq()


def test_a_claim_whose_answer_is_lost_for_long_is_not_made_twice(place: Somewhere, two: TaskLedger) -> None:
    """Even where the log knows of it no more: asked again, it finds the task that it had claimed."""
    two.add_tasks([Task(f"t{n}") for n in range(3)])
    with place.way() as way, closing(place.tasks("one", way.url, short=True)) as mine:
        mine.counts()
        way.hold(place.mark, "answer")
        claims: list[Claim | None] = []
        thread = threading.Thread(target=lambda: claims.append(mine.claim_next()))
        thread.start()
        assert way.caught.wait(PATIENCE)
        with closing(place.tasks("other", short=True)) as other:
            for number in range(8):
                other.add_task(f"later {number}")
        way.give_up()
        thread.join(PATIENCE)

        assert ["t0"] == [claim.id for claim in claims if claim]
        assert ["t0"] == [task.id for task in mine.tasks(assignee="one")]
        assert ids(two) == ids(mine)


# -- the log and the documents --


def test_who_is_too_far_behind_for_the_log_reads_the_documents(place: Somewhere) -> None:
    """It then sees what whoever followed the log sees, and goes on."""
    with closing(place.tasks("slow", short=True)) as slow, closing(place.tasks("fast", short=True)) as fast:
        slow.add_task("a")
        for number in range(10):
            fast.add_task(f"t{number}", dependencies=["a"] if number % 2 else [])
        fast.cancel("a")

        assert fast.list_tasks() == slow.list_tasks()
        slow.add_task("z")
        assert fast.list_tasks() == slow.list_tasks()
        assert slow.verify()


def test_a_commit_in_the_place_of_one_that_the_log_has_forgotten_is_refused(place: Somewhere) -> None:
    """A writer that slept for long is told that it is too far behind, and nothing is written over."""
    with closing(place.tasks("slow", short=True)) as slow, closing(place.tasks("fast", short=True)) as fast:
        slow.add_task("a")
        tries = []

        def work(book: Book) -> None:
            tries.append(book.again)
            if len(tries) == 1:
                for number in range(10):
                    fast.add_task(f"t{number}")
            row = book.row("a")
            assert row is not None
            book.save(row)

        slow.store.write("main", work)

        assert [False, True] == tries
        assert ["a", *(f"t{number}" for number in range(10))] == ids(fast) == ids(slow)


def test_a_place_of_another_history_is_none(place: Somewhere, one: TaskLedger) -> None:
    """Who remembers a commit that the server does not know can neither go on from it nor commit after it."""
    for name in ("a", "b", "c"):
        one.add_task(name)
    with closing(place.store()) as store:
        change = Change("task_sessions", ["x"], {"session": "x", "about": "{}"})
        for number in (1, 2, 3, 4):
            elsewhere = Place(number, "elsewhere")
            assert store.log.news(elsewhere).entries is None
            found = store.log.commit(elsewhere, Entry("mine", [change]), durable=True)
            assert found is not None
            assert found.entries is None

    assert ["main"] == one.sessions()


def test_a_new_process_reads_documents_and_what_came_since(place: Somewhere) -> None:
    """However far the documents are behind."""
    with closing(place.tasks("old", short=True)) as old:
        for number in range(7):
            old.add_task(f"t{number}")
            with closing(place.tasks("new", short=True)) as new:
                assert old.list_tasks() == new.list_tasks()
                assert list(old.events()) == list(new.events())


def test_entries_that_are_taken_in_twice_change_nothing(one: TaskLedger, place: Somewhere) -> None:
    """As it is when documents were read that are newer than the place that is gone on from."""
    one.add_task("a")
    one.claim_next()
    with closing(place.store()) as store:
        news = store.log.news(Place())
    assert news.entries is not None
    replica = Replica(Place())
    for _ in range(2):
        replica.place = Place()
        replica.follow(news.entries)

    assert [(1, "assigned")] == replica.ask("SELECT num, state FROM tasks", {})
    assert [(1,), (2,)] == replica.ask("SELECT seq FROM task_events ORDER BY seq", {})
    assert [] == replica.changes()


def test_a_row_that_is_gone_is_gone_everywhere() -> None:
    """Nothing of the tasks is ever deleted; what a later version deletes, this one follows."""
    writer, reader = Replica(Place()), Replica(Place())
    for sql in ("INSERT INTO task_sessions (session) VALUES ('x'), ('y')", "DELETE FROM task_sessions"):
        writer.db.execute("PRAGMA query_only = 0")
        writer.db.execute(sql if sql.startswith("INSERT") else f"{sql} WHERE session = 'x'")
        reader.follow([Entry("token", writer.changes())])

    assert [("y",)] == reader.ask("SELECT session FROM task_sessions", {})


def test_namespaces_do_not_meet(place: Somewhere, one: TaskLedger) -> None:
    """Two applications on one server share no task, whatever they are called."""
    one.add_task("a")
    place.namespace += "_other"
    with closing(place.tasks()) as other:
        other.add_task("b")
        assert ["b"] == ids(other)
        assert [1] == [event.seq for event in other.events()]

    assert ["a"] == ids(one)


def test_a_hand_on_the_server_is_found_by_verify(place: Somewhere) -> None:
    """Memory has it as it was; the proof reads the documents."""
    with closing(place.tasks("one", short=True)) as one:
        one.add_tasks([Task("a"), Task("b")])
        one.cancel("a")
        one.cancel("b")
        one.add_task("c")
        before = one.list_tasks()
        place.deface("task_events", "[1]", "actor", "mallory")

        assert before == one.list_tasks()
        report = one.verify()
        assert not report
        assert ["event 1 of task 'a' was altered"] == [fault.partition(":")[0] for fault in report.faults][:1]


# -- what goes with it --


def test_a_url_says_where_tasks_are_kept(place: Somewhere) -> None:
    """Tasks are beside the calls of that URL and namespace; a store that keeps none says which ones do."""
    with closing(place.store()) as known:
        url, kind = known.store.url, type(known)
    with closing(TaskLedger(url, namespace=place.namespace, quiet=True)) as tasks:
        tasks.add_task("a")
        assert kind is type(tasks.store)
        assert url == tasks.store.calls().url  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"a DynamoStore keeps no tasks; .* redis://, mongodb://"):
        tasks_of(DynamoStore("dynamodb://table?region=eu-central-1"))


def test_a_delivery_is_made_once(place: Somewhere, one: TaskLedger, two: TaskLedger) -> None:
    """The reservation is in the log, the call in the guard's records of the same namespace."""
    sent = []
    first = one.deliver(lambda: sent.append("one"), recipient="ann", key="k")
    second = two.deliver(lambda: sent.append("two"), recipient="ann", key="k")

    assert ("sent", "suppressed") == (first.outcome, second.outcome)
    assert ["one"] == sent


# -- the server --


class DayOff(Clock):
    """A machine whose clock is a day ahead."""

    def wall(self) -> int:
        return super().wall() + 86_400_000_000


def test_a_clock_that_is_wrong_changes_nothing(place: Somewhere, two: TaskLedger) -> None:
    """Times and leases go by the server's: nobody's claim lapses, and nothing is dated tomorrow."""
    two.add_task("a")
    assert two.claim_next(lease=600)
    with closing(place.tasks("off", clock=DayOff())) as off:
        task = off.add_task("b")
        assert [] == off.recover()
        assert off.claim_next(lease=600)
        assert abs(datetime.now(UTC) - task.created_at).total_seconds() < 600 if task.created_at else False
    assert [] == two.recover()


def test_a_server_that_evicts_is_refused() -> None:
    """Before anything is written there."""
    server = RedisServer("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    try:
        tasks = TaskLedger(server.url, quiet=True)
        with pytest.raises(StoreError, match="maxmemory-policy is allkeys-lru"):
            tasks.add_task("a")
        with server.client() as plain:
            assert [] == plain.keys()
    finally:
        server.close()


def test_a_full_server_refuses_and_changes_nothing(server: RedisServer) -> None:
    """What is there can be looked at, and once there is room work goes on."""
    tasks = TaskLedger(server.url, agent="me", quiet=True)
    tasks.add_task("a")
    with server.client() as plain:
        plain.config_set("maxmemory", "1")
        with pytest.raises(StoreError, match="memory is full"):
            tasks.claim_next()
        assert "" == tasks.get("a").assignee
        plain.config_set("maxmemory", "0")

    assert tasks.claim_next()
    assert tasks.verify()
    tasks.close()


def test_a_server_that_came_back_with_less_is_what_counts(server: RedisServer) -> None:
    """Whoever remembers more forgets it, also where others have written in its place since."""
    old = TaskLedger(server.url, agent="old", quiet=True)
    old.add_task("a")
    with server.client() as plain:
        plain.save()
    old.add_task("lost")
    server.crash()
    server.start()
    new = TaskLedger(server.url, agent="new", quiet=True)
    new.add_task("b")

    assert ["a", "b"] == ids(old) == ids(new)
    old.add_task("c")
    assert ["a", "b", "c"] == ids(new)
    assert new.verify()
    for tasks in (old, new):
        tasks.close()


def test_an_emptied_server_is_an_error(server: RedisServer) -> None:
    """Until the ledger is closed and begun anew."""
    tasks = TaskLedger(server.url, agent="me", quiet=True)
    tasks.add_task("a")
    with server.client() as plain:
        plain.flushall()
    for act in (tasks.counts, lambda: tasks.add_task("b")):
        with pytest.raises(StoreError, match="is not the one that was opened"):
            act()
    tasks.close()

    assert {} == tasks.counts()
    tasks.close()


def test_a_newer_ledger_is_refused(place: Somewhere, one: TaskLedger) -> None:
    """What a later version wrote is not touched by this one."""
    one.add_task("a")
    raise_schema(place)

    with closing(place.tasks()) as new:
        for act in (one.counts, lambda: one.add_task("b"), new.counts):
            with pytest.raises(StoreError, match="newer Ledger"):
                act()
    raise_schema(place, to=1)


def raise_schema(place: Somewhere, to: int = 99) -> None:
    """As if another version had written there."""
    if isinstance(place, OnMongo):
        place.server.documents(f"{place.namespace}.tasks").update_one({}, {"$set": {"schema": to}})
    else:
        with redis.Redis.from_url(redis_url()) as plain:
            plain.hset(f"{{{place.namespace}}}:tasks", "schema", to)


def test_more_than_a_document_holds_is_refused_before_anything() -> None:
    """MongoDB has 16 MB for one; nothing of it is there, and in parts it is taken."""
    place = OnMongo()
    with closing(place), closing(place.tasks()) as tasks:
        large = [Task(f"t{n}", description="x" * 6_000_000) for n in range(2)]
        with pytest.raises(UsageError, match="Do it in parts"):
            tasks.add_tasks(large)
        assert {} == tasks.counts()
        tasks.add_task(large[0])
        assert ["t0"] == ids(tasks)


def test_a_mongo_log_that_is_read_from_its_beginning_is_whole() -> None:
    """Each commit is in the log before the next one is the head, and the log is cut below the rows alone."""
    place = OnMongo()
    with closing(place), closing(place.tasks(short=True)) as tasks:
        for number in range(9):
            tasks.add_task(f"t{number}")
        head = place.server.documents(f"{place.namespace}.tasks").find_one({})
        logged = [doc["_id"] for doc in place.server.documents(f"{place.namespace}.tasks.log").find()]
        rows = [doc["n"] for doc in place.server.documents(f"{place.namespace}.tasks.rows").find()]

        assert (9, True) == (head["n"], head["rows"] >= 8)
        assert list(range(min(logged), 9)) == sorted(logged)
        assert max(rows) <= head["rows"]
        assert min(logged) <= head["rows"] + 1
