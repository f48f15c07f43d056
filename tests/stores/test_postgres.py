"""PostgreSQL for real: opening, refusals, races of many processes, and a server that goes away."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import psycopg
import pytest

from ledger import Claim, Clock, Guard, InProgress, Op, StoreError, UsageError, Verdict
from ledger_stores.postgres import PostgresStore
from ledger_stores.testing import SECOND, claim, in_parallel, reset, settle
from tests.actors import eventually, stage
from tests.stores.servers import fresh_namespace, postgres_url

PREPARE = "guard = Guard(sys.argv[2], namespace=sys.argv[3], quiet=True)\n"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A schema of its own, dropped in the end with whoever is still connected to it gone."""
    name = fresh_namespace()
    yield name
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture
def guard(namespace: str) -> Iterator[Guard]:
    """A guard on it."""
    made = Guard(postgres_url(), namespace=namespace, quiet=True)
    made.defaults(replay=True)
    yield made
    made.close()


def charge(order: int) -> dict[str, int]:
    """A tool that works."""
    return {"order": order}


async def charge_async(order: int) -> dict[str, int]:
    """The same in an event loop."""
    return {"order": order}


def test_one_url_is_all_that_changes(guard: Guard, namespace: str) -> None:
    """The same calls, answers, sums, history and events as on SQLite."""
    kinds = [guard.call(charge, order).kind for order in (1, 1, 2)]
    other = Guard(postgres_url(), namespace=namespace, quiet=True)

    assert ["executed", "replayed", "executed"] == kinds
    assert other.call(charge, 1).blocked
    other.close()
    assert (2, 4, 2, 2) == tuple(guard.stats()[n] for n in ("actions", "attempts", "executed", "blocked"))
    assert [{"order": 1}, {"order": 2}] == [e["result"] for e in guard.history(tool="charge")]
    assert ["claimed", "success"] == [e["kind"] for e in guard.events()][:2]
    assert guard.check()["ok"]
    guard.reset()
    assert "executed" == guard.call(charge, 1).kind


def test_namespaces_are_worlds_apart(guard: Guard) -> None:
    """Two applications in one database share nothing."""
    guard(charge, 1)
    name = fresh_namespace()
    other = Guard(postgres_url(), namespace=name, quiet=True)

    assert "executed" == other.call(charge, 1).kind
    assert 1 == guard.stats()["actions"] == other.stats()["actions"]
    other.close()
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.mark.slow
def test_twenty_processes_open_a_new_database_at_once(tmp_path: Path, namespace: str) -> None:
    """Whoever comes first makes the schema, whole; all others use it, and one of them charges."""
    script = PREPARE + "def pay(n): effect(n)\nsay('ready')\nhear()\nguard(pay, 7)"
    with stage(tmp_path) as crew:
        crowd = [crew.start(script, postgres_url(), namespace) for _ in range(20)]
        for actor in crowd:
            assert actor.line() == "ready"
        crew.let_go(crowd)

        assert ["7"] == crew.effects()


def test_what_cannot_be_used_is_refused_before_anything_runs(namespace: str) -> None:
    """No server, a wrong scheme, a bad namespace, a newer schema: each says what to do."""
    runs: list[int] = []
    nowhere = Guard("postgresql://ann:hunter2@127.0.0.1:1/shop?connect_timeout=2", quiet=True)
    with pytest.raises(StoreError, match=r"ann@127\.0\.0\.1:1/shop.*see that the server runs") as told:
        nowhere(runs.append, 1)
    assert "hunter2" not in str(told.value)
    with pytest.raises(UsageError, match="there is no store for mysql://"):
        Guard("mysql://localhost/x", quiet=True)(runs.append, 1)
    with pytest.raises(UsageError, match="cannot name a PostgreSQL schema"):
        Guard(postgres_url(), namespace="a;drop", quiet=True)(runs.append, 1)
    with pytest.raises(UsageError, match="give each its own file"):
        Guard("x.db", namespace="a", quiet=True)(runs.append, 1)
    PostgresStore(postgres_url(), namespace=namespace).check()
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"UPDATE {namespace}.meta SET value = '99' WHERE name = 'schema'")
    with pytest.raises(StoreError, match=r"newer Ledger \(version 99"):
        Guard(postgres_url(), namespace=namespace, quiet=True)(runs.append, 1)
    assert [] == runs


def test_a_driver_that_is_missing_is_named(tmp_path: Path) -> None:
    """Without psycopg the error says which extra to install, and nothing runs."""
    (tmp_path / "psycopg.py").write_text("raise ModuleNotFoundError('no', name='psycopg')")
    code = "from ledger import Guard\nGuard('postgresql://x/y', quiet=True)(print, 'ran')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)
    assert 'pip install "ledger-guard[postgres]"' in done.stderr


class Shifted(Clock):
    """The clock of a machine that is a day ahead, or behind."""

    def __init__(self, days: float) -> None:
        self.shift = int(days * 86_400_000_000)

    def wall(self) -> int:
        return super().wall() + self.shift


@pytest.mark.parametrize("days", [1, -1])
def test_a_callers_clock_changes_nothing(namespace: str, days: int) -> None:
    """A day off, a caller neither takes a live run over nor keeps a dead one; times are the server's."""
    right = PostgresStore(postgres_url(), namespace=namespace)
    wrong = PostgresStore(postgres_url(), namespace=namespace, clock=Shifted(days))
    run = right.transact(claim(lease=60_000_000)).row
    assert run is not None

    assert "live" == wrong.transact(claim()).kind
    assert not wrong.is_over(run)
    short = wrong.transact(claim("d", lease=100_000)).row
    assert short is not None
    assert abs(short.started - run.started) < 60_000_000
    right.transact(settle(run))
    assert "done" == wrong.transact(claim(ttl=3_600_000_000)).kind
    assert "reset" == wrong.transact(reset(wrong.clock.wall())).kind
    eventually(lambda: right.transact(claim("d")).kind == "granted")
    right.close()
    wrong.close()


@pytest.mark.parametrize("how", ["settles", "renews"])
def test_a_takeover_waits_for_an_owner_that_comes_back_at_that_moment(namespace: str, how: str) -> None:
    """The lease has lapsed, and its owner's word is on its way to the disk: the claim judges what it says."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    run = store.transact(claim(lease=1000)).row
    assert run is not None
    eventually(functools.partial(store.is_over, run))
    found: list[str] = []
    with psycopg.connect(postgres_url()) as owner:
        if how == "settles":
            store.perform_on(owner, settle(run))
        else:
            owner.execute(f"SELECT {namespace}.renew('c', 1, %s, 60000000)", (run.owner,))
        rival = threading.Thread(target=lambda: found.append(store.transact(claim()).kind))
        rival.start()
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            eventually(lambda: db.execute(_WAITS, (f"%{namespace}.claim%",)).fetchone() is not None)
        owner.commit()
    rival.join()

    assert ["done" if how == "settles" else "live"] == found
    assert [1] == [row.run for row in store.rows("c")]
    store.close()


_WAITS = "SELECT 1 FROM pg_stat_activity WHERE query LIKE %s AND wait_event_type = 'Lock'"


def test_waiting_duplicates_are_woken(guard: Guard) -> None:
    """Many that wait for one slow run get its result soon after it ends, with one looker for all of them."""
    ended: list[float] = []

    def slow(order: int) -> float:
        time.sleep(0.5)
        ended.append(time.monotonic())
        return ended[0]

    late = in_parallel(20, lambda _: (guard(slow, 1), time.monotonic())[1])

    assert 1 == len(ended)
    assert max(late) - ended[0] < 5
    watchers = [t for t in threading.enumerate() if t.name == "ledger-watcher"]
    assert len(watchers) <= 1


def test_nobody_listens_when_nobody_waits(guard: Guard, namespace: str) -> None:
    """A session that listens and reads nothing would fill the server's queue, and then ends fail."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(order: int) -> int:
        inside.set()
        go_on.wait(30)
        return order

    def listeners() -> int:
        sql = "SELECT COUNT(*) FROM pg_stat_activity WHERE query = %s"
        with psycopg.connect(postgres_url(), autocommit=True) as db:
            return int(db.execute(sql, (f"LISTEN {namespace}",)).fetchall()[0][0])

    crowd = threading.Thread(target=lambda: in_parallel(8, lambda _: guard(slow, 1)))
    crowd.start()
    inside.wait(30)
    eventually(lambda: listeners() == 1)
    go_on.set()
    crowd.join()

    eventually(lambda: listeners() == 0)


def test_a_waiter_is_woken_without_a_notification(guard: Guard, namespace: str) -> None:
    """Behind a transaction pooler LISTEN hears nothing; looking finds the end all the same."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    run = store.transact(claim()).row
    assert run is not None
    threading.Timer(0.3, lambda: quiet_settle(namespace)).start()

    begun = time.monotonic()
    store.wait("c", 30)

    assert time.monotonic() - begun < 15
    assert "success" == store.rows("c")[0].status
    store.close()


def test_a_renewal_and_a_takeover_do_not_both_succeed(namespace: str) -> None:
    """An owner that is told to go on is not taken over by somebody who had read its lapsed lease."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    run = store.transact(claim(lease=1)).row
    assert run is not None
    eventually(lambda: store.is_over(run))
    kinds: list[str] = []
    rival = threading.Thread(target=lambda: kinds.append(store.transact(claim()).kind))
    with psycopg.connect(postgres_url()) as slow:
        told = slow.execute(
            f"SELECT {namespace}.renew('c', 1, %s, 60000000) ->> 'kind'", (run.owner,)
        ).fetchone()
        rival.start()
        eventually(lambda: is_blocked(namespace))
    rival.join()

    assert (("renewed",), ["live"]) == (told, kinds)
    store.close()


def is_blocked(namespace: str) -> bool:
    """Whether somebody waits for a lock in that schema."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        return db.execute(sql, (f"%{namespace}.%",)).fetchone() is not None


def test_a_deadlock_that_the_server_breaks_up_is_no_error(namespace: str) -> None:
    """Counts that met another writer's locks crosswise are written when it has passed, once."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    for end in ("failed", "success"):
        run = store.transact(claim()).row
        assert run is not None
        store.transact(settle(run, end))
    flusher = threading.Thread(target=store.flush)
    with psycopg.connect(postgres_url()) as other:
        touch = f"UPDATE {namespace}.runs SET blocked = blocked WHERE run = %s"
        other.execute("SET LOCAL deadlock_timeout = '1min'")  # so that it is not the victim
        other.execute(touch, (2,))
        for number in (1, 2):
            store.count("blocked", claim(), number)
        flusher.start()
        eventually(lambda: is_blocked(namespace))
        other.execute(touch, (1,))
    flusher.join()

    assert [1, 1] == [run.blocked for run in store.rows("c")]
    store.close()


def quiet_settle(namespace: str) -> None:
    """The end of the run, written without a word to those who listen."""
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"UPDATE {namespace}.runs SET status = 'success', closed_by = owner, ended = 1")


def test_prepared_statements_that_are_gone_are_no_error(guard: Guard, namespace: str) -> None:
    """Behind a transaction pooler another session answers, which has not prepared what ours has."""
    for order in range(10):
        guard(charge, order)
    forget_prepared(guard, namespace)

    assert ["replayed", "executed"] == [guard.call(charge, order).kind for order in (3, 10)]


def forget_prepared(guard: Guard, namespace: str) -> None:
    """On the connection that is idle, hidden in a function, so that psycopg does not take note."""
    store = guard._ready()
    assert isinstance(store, PostgresStore)
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(
            f"CREATE FUNCTION {namespace}.forget() RETURNS int LANGUAGE plpgsql AS"
            " $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN 1; END $$"
        )
    store.browse(f"SELECT {namespace}.forget()")


def test_a_forked_child_has_its_own_connections(guard: Guard) -> None:
    """After a fork both sides go on, and the child leaves the parent's connections alone."""
    guard(charge, 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if guard.call(charge, 1).replayed and guard.call(charge, 2).executed else 2
            guard.close()
        finally:
            os._exit(code)

    assert (pid, 0) == os.waitpid(pid, 0)
    assert guard.call(charge, 2).replayed
    assert guard.call(charge, 3).executed


def test_a_pickled_guard_finds_the_server(guard: Guard, namespace: str) -> None:
    """It carries its URL and namespace."""
    import pickle

    guard(charge, 1)
    other: Guard = pickle.loads(pickle.dumps(guard))

    assert other.call(charge, 1).replayed
    other.close()


def test_events_are_never_skipped(guard: Guard, namespace: str) -> None:
    """An event whose transaction commits late is told after those that were certain before it, not lost."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    guard(charge, 1)
    with psycopg.connect(postgres_url()) as slow:
        slow.execute(
            f"SELECT {namespace}.claim('s', 't.1', 'a.b', 'w', '', NULL, NULL, NULL, 1, NULL, 1000, 'rerun',"
            " 0, NULL, NULL)"
        )
        guard(charge, 2)
        before = [e["seq"] for e in store.events()]
        slow.commit()

    def all_there() -> bool:
        return len(list(store.events())) == 5

    eventually(all_there)
    after = [e["seq"] for e in store.events()]
    assert before == after[: len(before)]
    assert [*after[len(before) :]] == [e["seq"] for e in store.events(after=before[-1])]
    store.close()


def test_a_reset_waits_for_nobody_and_forgets_no_live_run(guard: Guard) -> None:
    """While a call runs nothing is reset; afterwards everything is."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(order: int) -> None:
        inside.set()
        go_on.wait(30)

    runner = threading.Thread(target=lambda: guard(slow, 1))
    runner.start()
    inside.wait(30)
    try:
        with pytest.raises(InProgress, match="nothing was reset"):
            guard.reset()
    finally:
        go_on.set()
        runner.join()
    guard.reset()

    assert 0 == guard.stats()["actions"]


def test_settling_in_a_full_pool_waits_its_turn(namespace: str) -> None:
    """More threads than connections: all calls are made, none fails."""
    store = PostgresStore(postgres_url(), namespace=namespace, connections=2)

    def work(number: int) -> str:
        run = store.transact(claim(f"f{number}")).row
        assert run is not None
        return store.transact(settle(run)).kind

    assert ["settled"] * 32 == in_parallel(32, work)
    store.close()


def test_a_server_that_takes_no_more_connections_is_shared(namespace: str) -> None:
    """A role that may connect twice serves more threads than that: all calls are made, none fails."""
    PostgresStore(postgres_url(), namespace=namespace).check()
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"CREATE ROLE {namespace} LOGIN CONNECTION LIMIT 2")
        db.execute(f"GRANT USAGE ON SCHEMA {namespace} TO {namespace}")
        db.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {namespace} TO {namespace}")
        store = PostgresStore(
            postgres_url().replace("postgres:@", f"{namespace}:@"), namespace=namespace, connections=8
        )

        kinds = in_parallel(8, lambda n: [store.transact(claim(f"c{n}-{i}")).kind for i in range(20)])

        store.close()
        eventually(functools.partial(is_dropped, db, namespace))
    assert [["granted"] * 20] * 8 == kinds


def is_dropped(db: psycopg.Connection, role: str) -> bool:
    """Drop a role with what it may do, once nobody is connected as it."""
    if db.execute("SELECT 1 FROM pg_stat_activity WHERE usename = %s", (role,)).fetchone():
        return False
    db.execute(f"DROP OWNED BY {role}")
    db.execute(f"DROP ROLE {role}")
    return True


def test_whoever_waits_too_long_for_a_connection_is_told(namespace: str) -> None:
    """With all connections busy for `lock_seconds` the call is refused; it is made once one is free."""
    store = PostgresStore(postgres_url(), namespace=namespace, connections=1, lock_seconds=0.1)
    store.check()
    told = ""
    for number in range(20):  # on a slow machine the statement may be over before anybody waits
        busy = threading.Thread(target=lambda: store.browse("SELECT pg_sleep(0.8)"))
        busy.start()
        eventually(lambda: is_asleep() or not busy.is_alive())  # noqa: B023 - asked here and now
        try:
            store.transact(claim(f"c{number}"))
        except StoreError as error:
            told = str(error)
        busy.join()
        if told:
            break

    assert "all 1 connections were busy for 0.1 s; nothing was asked" in told
    assert "granted" == store.transact(claim()).kind
    store.close()


def is_asleep() -> bool:
    """Whether the server is at work on that statement."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(0.8)' AND state = 'active'"
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        return db.execute(sql).fetchone() is not None


def test_a_statement_that_is_interrupted_harms_no_later_one(namespace: str) -> None:
    """Ctrl-C while a claim waits for the server: the next question gets its own answer."""
    store = PostgresStore(postgres_url(), namespace=namespace, connections=1)
    store.check()
    with psycopg.connect(postgres_url()) as other:
        other.execute(f"LOCK TABLE {namespace}.runs")
        threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            store.transact(claim())

    assert "granted" == store.transact(claim("d")).kind
    assert "settled" == store.transact(settle(store.rows("d")[0])).kind
    store.close()


# ── how the server is set up ──────────────────────────────────────────────────────────


def with_setting(setting: str) -> str:
    """The URL of the tests' server for an account with that setting."""
    url = postgres_url()
    return f"{url}{'&' if '?' in url else '?'}options={quote('-c ' + setting, safe='')}"


def test_transactions_that_see_the_past_are_refused(namespace: str) -> None:
    """Under REPEATABLE READ a claim that waited would decide on what was there before."""
    store = PostgresStore(
        with_setting(r"default_transaction_isolation=repeatable\ read"), namespace=namespace
    )
    with pytest.raises(StoreError, match=r"are repeatable read, .*nothing ran\. ALTER ROLE"):
        store.transact(claim())
    store.close()


def watch_commits(db: psycopg.Connection[Any], namespace: str) -> None:
    """From now on the table `seen` says how each row that is written was committed."""
    db.execute(f"CREATE TABLE {namespace}.seen (setting text)")
    db.execute(
        f"CREATE FUNCTION {namespace}.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO"
        f" {namespace}.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
    )
    db.execute(
        f"CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE ON {namespace}.runs DEFERRABLE"
        f" INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {namespace}.see()"
    )


def test_a_claim_waits_for_the_disk_whatever_the_account_says(namespace: str) -> None:
    """`sync="full"` asks for it where the setting is off."""
    store = PostgresStore(with_setting("synchronous_commit=off"), namespace=namespace)
    store.check()
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        watch_commits(db, namespace)
        run = store.transact(claim()).row
        assert run is not None
        store.transact(settle(run))

        assert [("on",), ("on",)] == db.execute(f"SELECT setting FROM {namespace}.seen").fetchall()
    store.close()


def test_a_ledger_that_was_restored_into_a_younger_cluster_works(namespace: str) -> None:
    """Its events get numbers that this cluster's transactions do not reach again, in their order."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    for number in range(3):
        run = store.transact(claim(f"c{number}")).row
        assert run is not None
        store.transact(settle(run))
    before = [(e["call"], e["kind"]) for e in store.events()]
    store.close()
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        db.execute(f"UPDATE {namespace}.events SET seq = seq + 1000000000000")

    run = store.transact(claim("new")).row

    assert run is not None
    assert "settled" == store.transact(settle(run)).kind
    assert [*before, ("new", "claimed"), ("new", "success")] == [
        (e["call"], e["kind"]) for e in store.events()
    ]
    store.close()


def test_writers_of_long_ago_are_forgotten(namespace: str) -> None:
    """A new writer of counts removes the numbers of those that were silent for a week, and of no others."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    store.transact(claim())
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        for writer, days in (("old", 8), ("young", 6)):
            made = f"INSERT INTO {namespace}.batches VALUES (%s, 1, {namespace}.now_us() - %s)"
            db.execute(made, (writer, days * 86_400 * SECOND))
        store.count("blocked", claim(), 1)
        store.flush()
        left = {row[0] for row in db.execute(f"SELECT writer FROM {namespace}.batches")}

    assert {"young", store._writer} == left
    store.close()


def test_a_count_that_cannot_be_written_holds_up_no_other(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A workflow that is no text: its unlimited call is not counted, which is said; each other is, once."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    store.transact(claim())
    for asked in (claim(), claim("bad", wf="\ud800"), claim()):
        store.count("ran" if asked.call == "bad" else "blocked", asked, 1)
    store.flush()
    store.count("blocked", claim(), 1)
    store.flush()

    assert [3] == [record.blocked for record, _ in store.calls()]
    assert "1 attempt(s) at charge (call bad) are not counted" in caplog.text
    store.close()


def test_text_that_is_none_is_an_error_of_the_ledger(namespace: str) -> None:
    """Half a surrogate cannot be stored, and nothing is."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    with pytest.raises(StoreError, match="nothing was written"):
        store.transact(claim(wf="\ud800"))
    assert [] == store.rows("c")
    store.close()


# ── event loops: what tasks ask at one moment is one transaction ──────────────────────


async def together(store: PostgresStore, *ops: Op) -> list[Verdict | BaseException]:
    """What each is answered, all asked at the same moment on a connection that is open."""
    store.check()
    return await asyncio.gather(*(store.transact_async(op) for op in ops), return_exceptions=True)


@pytest.mark.parametrize(
    "bad", [claim("b", key="\ud800"), claim("b" + os.urandom(9000).hex())], ids=["no text", "too long"]
)
def test_a_claim_that_fails_takes_no_other_along(namespace: str, bad: Claim) -> None:
    """Of three tasks that ask together one asks what cannot be written: it alone is told."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    found = asyncio.run(together(store, claim("a"), bad, claim("c")))

    assert ["granted", StoreError, "granted"] == [getattr(one, "kind", type(one)) for one in found]
    assert [1, 0, 1] == [len(store.rows(call)) for call in ("a", bad.call, "c")]
    store.close()


def test_a_claim_that_waits_for_a_lock_holds_up_no_other(namespace: str) -> None:
    """Its rival's transaction is open: those that asked with it are answered, it when that has ended."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    run = store.transact(claim("b", lease=1000)).row
    assert run is not None
    eventually(functools.partial(store.is_over, run))

    async def ask(owner: psycopg.Connection[Any]) -> list[str]:
        tasks = [asyncio.ensure_future(store.transact_async(claim(call))) for call in "abc"]
        first = [(await tasks[n]).kind for n in (0, 2)]
        assert not tasks[1].done()
        owner.commit()
        return [*first, (await tasks[1]).kind]

    with psycopg.connect(postgres_url()) as owner:
        store.perform_on(owner, settle(run))
        found = asyncio.run(asyncio.wait_for(ask(owner), 30))

    assert ["granted", "granted", "done"] == found
    store.close()


def test_events_of_one_transaction_have_numbers_of_their_own(namespace: str) -> None:
    """A hundred claims that are asked together are a hundred events, and a reader meets each once."""
    store = PostgresStore(postgres_url(), namespace=namespace)
    asyncio.run(together(store, *(claim(f"call {n}") for n in range(100))))

    eventually(lambda: len(list(store.events())) == 100)
    assert {f"call {n}" for n in range(100)} == {event["call"] for event in store.events()}
    store.close()


def test_tasks_that_claim_the_same_calls_crosswise_are_all_answered(namespace: str) -> None:
    """Two stores whose transactions hold many calls at once, asked for in opposite order: one grants each."""
    stores = [PostgresStore(postgres_url(), namespace=namespace) for _ in range(2)]
    calls = [f"call {n}" for n in range(60)]
    for store in stores:
        store.check()

    def ask(n: int) -> list[Verdict | BaseException]:
        return asyncio.run(together(stores[n], *(claim(call) for call in (calls, calls[::-1])[n])))

    found = in_parallel(2, ask)

    kinds = zip(found[0], reversed(found[1]), strict=True)
    assert {("granted", "live"), ("live", "granted")} >= {
        tuple(getattr(one, "kind", repr(one)) for one in pair) for pair in kinds
    }
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("sync", "settings"), [("full", ["on", "on"]), ("claim", ["on", "on"]), ("off", ["off", "off"])]
)
def test_what_is_asked_together_lasts_as_the_most_careful_of_it(
    namespace: str, sync: Literal["full", "claim", "off"], settings: list[str]
) -> None:
    """A claim and an end in one transaction: it waits for the disk if one of the two does."""
    store = PostgresStore(postgres_url(), namespace=namespace, sync=sync)
    run = store.transact(claim("a")).row
    assert run is not None
    with psycopg.connect(postgres_url(), autocommit=True) as db:
        watch_commits(db, namespace)
        asyncio.run(together(store, claim("b"), settle(run)))

        assert settings == [row[0] for row in db.execute(f"SELECT setting FROM {namespace}.seen")]
    store.close()


def test_prepared_statements_that_are_gone_are_no_error_for_tasks(guard: Guard, namespace: str) -> None:
    """The same behind a transaction pooler, of calls that are asked together."""

    async def work(*orders: int) -> list[dict[str, int]]:
        return await asyncio.gather(*(guard(charge_async, order) for order in orders))

    asyncio.run(work(*range(10)))
    forget_prepared(guard, namespace)

    assert [{"order": n} for n in (3, 10, 11)] == asyncio.run(work(3, 10, 11))
