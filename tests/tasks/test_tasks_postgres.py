"""Tasks on a real PostgreSQL: many processes, races on dependencies, lost replies, the order of events."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ledger import Clock, StoreError
from ledger_stores.postgres import PostgresStore, PostgresTransaction
from ledger_tasks import Dep, DependencyCycle, Task, TaskLedger, TaskState
from ledger_tasks import operations as ops
from ledger_tasks.book import Book
from ledger_tasks.operations import Who
from tests.actors import PATIENCE, eventually, stage
from tests.stores.servers import OwnPostgres, fresh_namespace, postgres_url

S = TaskState
PREPARE = "from ledger_tasks import TaskLedger\ntasks = TaskLedger(sys.argv[2], namespace=sys.argv[3])\n"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A schema of its own, dropped in the end."""
    name = fresh_namespace()
    yield name
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture
def tasks(namespace: str) -> Iterator[TaskLedger]:
    """A ledger on it."""
    made = TaskLedger(postgres_url(), namespace=namespace, agent="ann")
    yield made
    made.close()


@pytest.fixture
def db(namespace: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of somebody who looks into the schema."""
    with psycopg.connect(postgres_url(), autocommit=True) as made:
        made.execute(f"SET search_path TO {namespace}")
        yield made


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, all begun at the same moment."""
    gate = threading.Barrier(len(works))

    def one(work: Callable[[], Any]) -> Any:
        gate.wait(PATIENCE)
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - what it raises is what is looked at
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, works))


class Stopped:
    """A transaction that stands still where it says so, in a thread."""

    def __init__(self, tasks: TaskLedger, work: Callable[[Book, Callable[[], None]], Any]) -> None:
        self.stands, self.may_go = threading.Event(), threading.Event()
        self.tries = 0
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(tasks.store.write, tasks.session, partial(self._do, work))
        assert self.stands.wait(PATIENCE)

    def _do(self, work: Callable[[Book, Callable[[], None]], Any], book: Book) -> Any:
        self.tries += 1
        return work(book, self._stand_still)

    def _stand_still(self) -> None:
        self.stands.set()
        assert self.may_go.wait(PATIENCE)

    def goes_on(self) -> Any:
        """Its answer, after its commit."""
        self.may_go.set()
        answer = self._answer.result(PATIENCE)
        self._pool.shutdown()
        return answer


def is_waited_for(db: psycopg.Connection[Any], namespace: str) -> bool:
    """Whether somebody waits for a row of that schema."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
    return db.execute(sql, (f"%{namespace}.%",)).fetchone() is not None


# -- claiming --


@pytest.mark.slow
def test_eight_processes_claim_every_task_once(tasks: TaskLedger, namespace: str, tmp_path: Path) -> None:
    """Four hundred tasks, half of which wait for another: each is claimed by one of eight, and done."""
    tasks.add_tasks([Task(f"t{n}", depends_on=(Dep(f"t{n - 1}"),) if n % 2 else ()) for n in range(400)])
    script = PREPARE + (
        "say('ready')\nhear()\n"
        "while tasks.counts().get('done', 0) < 400:\n"
        "    claim = tasks.claim_next(f'w{os.getpid()}')\n"
        "    if claim:\n"
        "        effect(claim.id)\n"
        "        tasks.start(claim)\n"
        "        tasks.complete(claim)\n"
    )
    with stage(tmp_path) as crew:
        crowd = [crew.start(script, postgres_url(), namespace) for _ in range(8)]
        for actor in crowd:
            assert "ready" == actor.line()
        crew.let_go(crowd)
        done = Counter(crew.effects())

    assert {f"t{n}": 1 for n in range(400)} == done
    assert {S.DONE: 400} == tasks.counts()
    assert 400 * 4 == sum(1 for _ in tasks.events())


def test_the_most_urgent_of_all_lanes_is_claimed(tasks: TaskLedger) -> None:
    """By priority, then age, of what an agent can do; also in a lane that was not in use a moment ago."""
    tasks.add_tasks([Task("a"), Task("b", type="tool"), Task("c", capabilities=("gpu",), priority=9)])

    assert ["a", "b"] == [claimed(tasks), claimed(tasks)]
    assert None is claimed(tasks)
    tasks.add_tasks([Task("d", type="other", priority=8), Task("e", type="tool")])
    assert "d" == claimed(tasks)
    tasks.add_tasks([Task("f", type="other"), Task("g", type="new", priority=7)])
    assert "f" == claimed(tasks, types=["other"])
    assert ["c", "g", "e"] == [claimed(tasks, capabilities=["gpu"]) for _ in range(3)]


def claimed(tasks: TaskLedger, **options: Any) -> str | None:
    """The id of the task that is claimed next."""
    claim = tasks.claim_next(**options)
    return claim.id if claim else None


def test_what_came_due_is_claimed_before_what_is_less_urgent(tasks: TaskLedger, db: Any) -> None:
    """A task that was put off is offered from its time on, by the server's clock."""
    [(now,)] = db.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchall()
    tasks.add_tasks([Task("now"), Task("later", priority=9, not_before=now + 3600)])
    tasks.add_task("past", priority=9, not_before=now - 1)

    assert ["past", "now", None] == [claimed(tasks) for _ in range(3)]


def test_a_ready_task_is_waited_for_while_somebody_adds_what_depends_on_it(
    tasks: TaskLedger, namespace: str, db: Any
) -> None:
    """No claimer goes away empty because the only task that is ready is held by one who leaves it ready."""
    tasks.add_task("a")

    def add(book: Book, stand_still: Callable[[], None]) -> None:
        ops.add(book, [Task("b", depends_on=(Dep("a"),))], Who("bob"), "token")
        assert book.row("b")  # so that all before has been sent
        stand_still()

    adding = Stopped(tasks, add)
    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(tasks.claim_next)
        eventually(partial(is_waited_for, db, namespace))
        adding.goes_on()

        assert "a" == getattr(claim.result(PATIENCE), "id", None)


# -- dependencies --


def test_of_two_that_close_a_cycle_at_once_one_is_refused(tasks: TaskLedger, namespace: str) -> None:
    """`a` waits for `b` and `b` for `a`, on two connections, thirty times."""
    other = TaskLedger(postgres_url(), namespace=namespace)
    for n in range(30):
        tasks.add_tasks([Task(f"a{n}"), Task(f"b{n}")])
        found = together(
            partial(tasks.add_dependency, f"a{n}", f"b{n}"), partial(other.add_dependency, f"b{n}", f"a{n}")
        )

        assert {Task, DependencyCycle} == set(map(type, found)), found
    other.close()


@pytest.mark.parametrize("ending", ["complete", "cancel", "add_dependency"])
def test_a_dependency_that_ends_while_it_is_added_is_not_missed(
    tasks: TaskLedger, namespace: str, ending: str
) -> None:
    """Whoever comes second sees the other: the new task can be begun or is skipped, and never waits on."""
    other = TaskLedger(postgres_url(), namespace=namespace)
    for n in range(30):
        tasks.add_tasks([Task(f"a{n}"), Task(f"c{n}")])
        claim = tasks.claim_task(f"a{n}")
        assert claim is not None
        tasks.start(claim)
        end = partial(tasks.cancel, f"a{n}") if ending == "cancel" else partial(tasks.complete, claim)
        add: Callable[[], Any] = partial(other.add_task, f"b{n}", depends_on=[f"a{n}"])
        if ending == "add_dependency":
            add = partial(other.add_dependency, f"c{n}", f"a{n}")
        found = together(end, add)

        assert [Task, Task] == list(map(type, found)), found
        waits = tasks.get(f"c{n}" if ending == "add_dependency" else f"b{n}")
        assert (S.SKIPPED if ending == "cancel" else S.PENDING) == waits.state
        assert waits.ready == (ending != "cancel")
    other.close()


def test_one_id_is_added_once(tasks: TaskLedger, namespace: str) -> None:
    """Of two that add a task of one id at once, one is told that it is there."""
    other = TaskLedger(postgres_url(), namespace=namespace)
    for n in range(20):
        found = together(partial(tasks.add_task, f"t{n}"), partial(other.add_task, f"t{n}"))

        assert ["DuplicateTask", "Task"] == sorted(type(one).__name__ for one in found), found
    other.close()


def test_what_waits_for_many_that_end_at_once_goes_on(tasks: TaskLedger) -> None:
    """Eight parts are completed at one moment; their whole can be begun, its events in their order."""
    for n in range(10):
        whole = f"whole{n}"
        tasks.add_tasks([Task(whole)])
        claim = tasks.claim_task(whole)
        assert claim is not None
        tasks.start(claim)
        parts = tasks.add_subtasks(claim, [{"id": f"{whole}.{k}"} for k in range(8)])
        assert S.BLOCKED == tasks.get(whole).state
        together(*(partial(tasks.complete_task_and_route, part) for part in parts))

        assert (S.PENDING, 0) == (tasks.get(whole).state, tasks.get(whole).waiting)
        assert tasks.get(whole) == tasks.replay(whole)


def test_a_deadlock_is_done_again(tasks: TaskLedger) -> None:
    """Two transactions hold what the other wants; one is ended and done again, and both commit."""
    tasks.add_tasks([Task("a"), Task("b")])
    gate, tries = threading.Barrier(2), Counter[str]()

    def move(first: str, second: str, book: Book) -> str:
        tries[first] += 1
        assert book.row(first)
        if tries[first] == 1:
            gate.wait(PATIENCE)
        assert book.row(second)
        return ops.find(book, second).task.id

    write = partial(tasks.store.write, "main")
    found = together(partial(write, partial(move, "a", "b")), partial(write, partial(move, "b", "a")))

    assert ["b", "a"] == found
    assert 3 <= tries.total()


@pytest.mark.slow
def test_two_thousand_dependents_end_in_one_transaction(tasks: TaskLedger) -> None:
    """A fan and a chain of a thousand each are skipped at once, and every event has its number."""
    tasks.add_tasks([Task("root"), *(Task(f"f{n}", depends_on=(Dep("root"),)) for n in range(1_000))])
    tasks.add_tasks([Task(f"c{n}", depends_on=(Dep(f"c{n - 1}" if n else "root"),)) for n in range(1_000)])
    tasks.cancel("root")

    assert {S.CANCELLED: 1, S.SKIPPED: 2_000} == tasks.counts()
    seqs = [event.seq for event in tasks.events()]
    assert 4_002 == len(set(seqs))
    assert sorted(seqs) == seqs
    ended = [seq for seq in seqs if seq >> 24 == seqs[-1] >> 24]
    assert 2_001 == len(ended)


def test_a_cascade_ends_each_as_its_own_dependency_says(tasks: TaskLedger) -> None:
    """Skip, fail and run are told apart at every level, also where one is reached on two ways."""
    tasks.add_tasks([Task("root"), Task("other"), Task("skip", depends_on=(Dep("root"),))])
    tasks.add_task(Task("fail", depends_on=(Dep("root", "fail"), Dep("skip"))))
    tasks.add_task(Task("run", depends_on=(Dep("fail", "run"), Dep("skip", "run"), Dep("other"))))
    tasks.add_task(Task("freed", depends_on=(Dep("root", "run"), Dep("fail", "run"))))
    tasks.add_task(Task("last", depends_on=(Dep("fail"), Dep("freed"))))
    claim = tasks.claim_task("root")
    assert claim is not None
    tasks.start(claim)
    tasks.fail(claim, "no")

    states = {task.id: (task.state, task.waiting) for task in tasks}
    assert (S.SKIPPED, S.FAILED, S.SKIPPED) == tuple(states[name][0] for name in ("skip", "fail", "last"))
    assert [(S.PENDING, 1), (S.PENDING, 0)] == [states["run"], states["freed"]]
    tasks.retry("root", "once more")
    assert [1, 1] == [tasks.get(name).waiting for name in ("run", "freed")]
    assert all(task == tasks.replay(task.id) for task in tasks)


# -- replies that are lost, connections that break --


@pytest.fixture(scope="module")
def server() -> Iterator[OwnPostgres]:
    """A server of our own."""
    made = OwnPostgres()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["message", "answer"])
def test_a_lost_commit_is_found_or_done_again(server: OwnPostgres, what: Any) -> None:
    """Whether a COMMIT arrived or not: one claim, one new task, one step, as if nothing had been lost."""
    with server.way() as way:
        tasks = TaskLedger(way.url, namespace=fresh_namespace(), agent="ann")
        way.lose(b'"op":"add"', what)
        tasks.add_tasks([Task("a"), Task("b"), Task("c")])
        assert way.caught.is_set()
        way.lose(b'"op":"claim"', what)
        first = tasks.claim_next()
        assert way.caught.is_set()
        way.lose(b'"op":"claim"', what)
        second = tasks.claim_task("c")
        assert way.caught.is_set()
        assert first is not None
        assert second is not None
        tasks.start(first)
        way.lose(b'"op":"complete"', what)
        tasks.complete(first, "done")
        assert way.caught.is_set()

        # the server may still hold the first task for a caller that is gone: then the next one is claimed
        assert first.id in (["a"] if what == "answer" else ["a", "b"])
        told = [(event.task, event.to_state) for event in tasks.events()]
        assert [("a", "pending"), ("b", "pending"), ("c", "pending"), (first.id, "assigned")] == told[:4]
        assert [("c", "assigned"), (first.id, "active"), (first.id, "done")] == told[4:]
        tasks.close()


@pytest.mark.slow
def test_connections_that_were_cut_are_replaced(server: OwnPostgres) -> None:
    """Everybody is cut off between two steps, and the next one works."""
    tasks = TaskLedger(server.url, namespace=fresh_namespace())
    tasks.add_task("a")
    server.kill_connections()
    claim = tasks.claim_next()
    assert claim is not None
    server.kill_connections()

    assert S.ACTIVE == tasks.start(claim).state
    tasks.close()


def test_a_transaction_that_stands_still_holds_nobody_up_for_ever(namespace: str) -> None:
    """The server ends it after `lock_seconds`, others go on, and it is done again on what is there then."""
    slow = TaskLedger(PostgresStore(postgres_url(), namespace=namespace, lock_seconds=1), agent="slow")
    quick = TaskLedger(postgres_url(), namespace=namespace, agent="quick")
    slow.add_task("a")

    def claim(book: Book, stand_still: Callable[[], None]) -> Any:
        row = ops.claim_task(book, "a", Who("slow", "token"), 60)
        assert book.row("a")
        stand_still()
        return row

    standing = Stopped(slow, claim)
    got = quick.claim_next()

    assert got is not None
    assert None is standing.goes_on()
    assert (2, "quick") == (standing.tries, quick.get("a").assignee)
    slow.close()
    quick.close()


def test_a_forked_child_has_connections_of_its_own(tasks: TaskLedger, namespace: str, tmp_path: Path) -> None:
    """Parent and child go on claiming after a fork, and none of them gets the other's answers."""
    tasks.add_tasks([Task(f"t{n}") for n in range(40)])
    script = PREPARE + (
        "effect(tasks.claim_next('parent').id)\n"
        "child = os.fork()\n"
        "while claim := tasks.claim_next('parent' if child else 'child'):\n"
        "    effect(claim.id)\n"
        "if child:\n"
        "    os.waitpid(child, 0)\n"
        "else:\n"
        "    os._exit(0)\n"
    )
    with stage(tmp_path) as crew:
        crew.start(script, postgres_url(), namespace).ends_well()

        assert sorted(f"t{n}" for n in range(40)) == sorted(crew.effects())
    assert {"child", "parent"} >= {task.assignee for task in tasks}


class Shifted(Clock):
    """The clock of a machine that is two days off."""

    def __init__(self, days: int) -> None:
        self.shift = days * 86_400_000_000

    def wall(self) -> int:
        return super().wall() + self.shift


@pytest.mark.parametrize("days", [2, -2])
def test_the_servers_clock_decides(tasks: TaskLedger, namespace: str, days: int) -> None:
    """Somebody whose clock is days off neither takes over live work nor keeps what has lapsed."""
    wrong = TaskLedger(
        PostgresStore(postgres_url(), namespace=namespace, clock=Shifted(days)), agent="far", lease=0.01
    )
    tasks.add_tasks([Task("a"), Task("b")])
    assert tasks.claim_next(lease=600)
    assert wrong.claim_next()
    eventually(lambda: [task.id for task in tasks.stale_tasks()] == ["b"])

    assert ["b"] == [task.id for task in wrong.stale_tasks()]
    assert ["b"] == [task.id for task in wrong.recover()]
    assert [(S.ASSIGNED, "ann"), (S.PENDING, "")] == [(task.state, task.assignee) for task in tasks]
    wrong.close()


def test_two_that_recover_at_once_do_it_once(tasks: TaskLedger, namespace: str) -> None:
    """Each lapsed task is brought back by one of them, with one event."""
    other = TaskLedger(postgres_url(), namespace=namespace)
    tasks.add_tasks([Task(f"t{n}") for n in range(20)])
    while tasks.claim_next(lease=0.001):
        if len(tasks.list_tasks(state="assigned")) == 20:
            break
    eventually(lambda: len(tasks.stale_tasks()) == 20)
    found = together(tasks.recover, other.recover)

    assert sorted(f"t{n}" for n in range(20)) == sorted(task.id for back in found for task in back)
    other.close()


# -- events --


@pytest.mark.parametrize(
    "statement",
    ["UPDATE task_events SET actor = 'me'", "DELETE FROM task_events WHERE n = 99", "TRUNCATE task_events"],
)
def test_the_server_refuses_to_change_events(tasks: TaskLedger, db: Any, statement: str) -> None:
    """Whoever may write the table cannot alter, delete or empty what happened."""
    tasks.add_task("a")
    with pytest.raises(psycopg.errors.RestrictViolation, match="never changed or deleted"):
        db.execute(statement)
    with pytest.raises(psycopg.errors.RestrictViolation):
        db.execute(f"SET session_replication_role = replica; {statement}")

    assert ["created"] == [event.kind for event in tasks.events()]


def test_no_event_is_skipped_that_commits_late(tasks: TaskLedger) -> None:
    """While an older transaction is open, a reader stops before it; then it sees all, in their order."""
    tasks.add_task("first")
    seen = tasks.last_seq()

    def add(book: Book, stand_still: Callable[[], None]) -> None:
        ops.add(book, [Task("late")], Who("bob"), "token")
        assert book.row("late")
        stand_still()

    adding = Stopped(tasks, add)
    other = tasks.in_session("other")
    other.add_task("quick")
    assert [] == list(tasks.events(after=seen, all_sessions=True))
    assert ["quick"] == [event.task for event in other.events("quick")]
    assert seen == tasks.last_seq()
    adding.goes_on()

    stream = tasks.subscribe(after=seen, all_sessions=True)
    assert ["late", "quick"] == [next(stream).task for _ in range(2)]


def test_events_of_a_task_are_in_their_order_whoever_began_first(tasks: TaskLedger) -> None:
    """A transaction that began earlier and comes to a task later writes the later event; replay agrees."""
    tasks.add_tasks([Task("a"), Task("b")])
    held = {name: tasks.claim_task(name) for name in ("a", "b")}
    assert held["b"] is not None
    who = Who("ann", held["b"].token)

    def work(book: Book, stand_still: Callable[[], None]) -> None:
        assert book.row("a")  # its transaction has its number now
        stand_still()
        for n in range(3):
            ops.record(book, "b", who, "progress", f"older{n}", stage=f"older{n}")

    older = Stopped(tasks, work)
    tasks.progress(held["b"], 0.1, "newer")
    older.goes_on()
    tasks.progress(held["b"], 0.2, "newest")

    wanted = ["", "", "newer", "older0", "older1", "older2", "newest"]
    assert wanted == [event.stage for event in tasks.events("b")]
    assert wanted == [event.stage for event in tasks.events() if event.task == "b"]
    assert tasks.get("b") == tasks.replay("b")


def test_a_transaction_that_comes_to_a_task_far_too_late_is_done_again(tasks: TaskLedger) -> None:
    """Where no number is left between two events, the older transaction is done anew, with a greater one."""
    tasks.add_tasks([Task("a"), Task("b")])
    held = tasks.claim_task("b")
    assert held is not None
    who = Who("ann", held.token)

    def work(book: Book, stand_still: Callable[[], None]) -> None:
        assert book.row("a")
        stand_still()
        for n in range(20):
            ops.record(book, "b", who, "progress", f"older{n}", stage=f"older{n}")

    older = Stopped(tasks, work)
    tasks.progress(held, 0.1, "newer")
    older.goes_on()

    wanted = ["", "", "newer", *(f"older{n}" for n in range(20))]
    assert (2, wanted) == (older.tries, [event.stage for event in tasks.events()][1:])


def test_a_ledger_restored_to_another_cluster_counts_on(tasks: TaskLedger, namespace: str, db: Any) -> None:
    """Where the server has counted fewer transactions, new events still come after all that there are."""
    tasks.add_task("a")
    before = tasks.last_seq()
    db.execute(
        "CREATE OR REPLACE FUNCTION task_base() RETURNS bigint LANGUAGE sql IMMUTABLE AS"
        " 'SELECT 1000000000::bigint'"
    )
    restored = TaskLedger(postgres_url(), namespace=namespace)
    restored.add_task("b")
    eventually(lambda: restored.last_seq() > before)

    assert ["a", "b"] == [event.task for event in restored.events()]
    assert ["b"] == [event.task for event in tasks.events(after=before)]
    restored.close()


# -- opening --


@pytest.mark.slow
def test_eight_processes_make_the_tables_at_once(namespace: str, tmp_path: Path) -> None:
    """Whoever comes first makes them, whole; all others use them."""
    script = PREPARE + "say('ready')\nhear()\ntasks.add_task(f't{os.getpid()}')"
    with stage(tmp_path) as crew:
        crowd = [crew.start(script, postgres_url(), namespace) for _ in range(8)]
        for actor in crowd:
            assert "ready" == actor.line()
        crew.let_go(crowd)
    tasks = TaskLedger(postgres_url(), namespace=namespace)

    assert 8 == len(tasks)
    tasks.close()


def test_tables_of_a_newer_ledger_are_refused(tasks: TaskLedger, namespace: str, db: Any) -> None:
    """Nothing is changed in them, and the message says what to do."""
    tasks.add_task("a")
    db.execute("UPDATE meta SET value = '99' WHERE name = 'tasks'")
    newer = TaskLedger(postgres_url(), namespace=namespace)
    with pytest.raises(StoreError, match=r"newer Ledger \(schema 99, .*Upgrade ledger-guard"):
        newer.add_task("b")
    newer.close()

    assert ["a"] == [task.id for task in tasks]


# -- the guard's store: a transaction of one's own --


def test_submit_commits_or_rolls_back(namespace: str, db: Any) -> None:
    """What a function tells and asks is written whole after it returns, and not at all when it raises."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    store.check()
    db.execute("CREATE TABLE notes (word text PRIMARY KEY)")

    def write(work: PostgresTransaction, *, fails: bool) -> list[Any]:
        for n in range(1200):
            work.tell("INSERT INTO :ns.notes VALUES (:word)", {"word": f"{fails} {n}\0"})
        found = work.ask("SELECT COUNT(*), 1.5::float8, true, NULL FROM :ns.notes", {})
        if fails:
            raise KeyError("no more")
        return found

    assert [(1200, 1.5, True, None)] == store.submit(partial(write, fails=False))
    with pytest.raises(KeyError, match="no more"):
        store.submit(partial(write, fails=True))
    with pytest.raises(StoreError, match="duplicate key"):
        store.submit(partial(write, fails=False))
    with pytest.raises(StoreError, match='relation "nowhere" does not exist'):
        store.ask("SELECT * FROM nowhere", {})
    assert [(1200,)] == store.ask("SELECT COUNT(*) FROM :ns.notes", {})
    store.close()
