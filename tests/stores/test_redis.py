"""The store on Redis: its script does what the protocol says, and what may fail fails closed."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

import ledger
from ledger import Claim, Guard, InProgress, Now, Op, Run, StoreError, UsageError
from ledger_stores.redis import RedisStore
from ledger_stores.testing import (
    SECOND,
    FakeClock,
    claim,
    claim_of,
    in_parallel,
    release,
    renew,
    reset,
    resolve,
    settle,
)
from tests.actors import eventually
from tests.stores.redis_kit import RedisServer, open_redis, redis_url, way_to
from tests.stores.servers import fresh_namespace
from tests.stores.way import PATIENCE


@pytest.fixture
def store() -> Iterator[RedisStore]:
    """An empty store in a namespace of its own."""
    made = open_redis(None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server without AOF whose settings a test may change, if it puts them back."""
    made = RedisServer()
    yield made
    made.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RedisServer]]:
    """How to start a server of one's own; all that were started are ended."""
    started: list[RedisServer] = []

    def start_one(*settings: str) -> RedisServer:
        started.append(RedisServer(*settings))
        return started[-1]

    yield start_one
    for made in started:
        made.close()


@contextmanager
def configured(server: RedisServer, **settings: str) -> Iterator[None]:
    """Settings of the server for the length of a block."""
    with server.client() as plain:
        before = {name: plain.config_get(name)[name] for name in (n.replace("_", "-") for n in settings)}
        for name, value in settings.items():
            plain.config_set(name.replace("_", "-"), value)
        try:
            yield
        finally:
            for name, value in before.items():
                plain.config_set(name, value)


def run_of(store: RedisStore, asked: Claim) -> Run:
    """The row of a claim that must be granted."""
    verdict = store.transact(asked)
    assert verdict.kind == "granted"
    assert verdict.row is not None
    return verdict.row


# ── the script against the pure operations ────────────────────────────────────────────

HISTORIES = int(os.environ.get("LEDGER_TEST_HISTORIES", "350"))
_TEXTS = (None, "", "x", '{"a": [], "n": 12345678901234567890}', "\0\n 🙂 é\u0301 \ud800")
_MATCHED = (None, None, '{"to":"1"}', '{"to":"2"}')


class Model:
    """What the pure operations of `ledger` make of the calls of one namespace."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.rows: dict[str, list[Run]] = {}
        self.events: list[tuple[Any, ...]] = []

    def apply(self, op: Op) -> ledger.Verdict:
        """Do it; what its caller is told."""
        wall = self.clock.wall()
        change = op.apply(self.rows.get(op.call, []), Now(wall, -(10**18), lambda run: run.lease <= wall))
        self.rows[op.call] = ledger._applied(self.rows.get(op.call, []), change)
        self.events += [(kind, row.run, row.tool, n, detail) for kind, row, n, detail in change.notes]
        return change.verdict


class Chance:
    """Callers that do anything in any order, wise or not."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.claims: dict[str, Claim] = {}

    def op(self, call: str, rows: list[Run], wall: int) -> Op:
        """The next thing that somebody does to that call."""
        pick = self.pick
        seen = pick.choice([*rows, rows[-1]]) if rows else claim(call).first_row(0, 0)
        made: list[Callable[[], Op]] = [
            *[lambda: self._claim(call, rows)] * 10,
            *[lambda: self._settle(seen)] * 8,
            *[lambda: renew(seen)] * 2,
            *[lambda: release(seen, limit=pick.choice((1, 2)), ttl=pick.choice((None, 200 * SECOND)))] * 2,
            *[lambda: self._resolve(seen)] * 2,
            lambda: reset(wall - pick.choice((0, 1000 * SECOND)), call),
        ]
        return pick.choice(made)()

    def _claim(self, call: str, rows: list[Run]) -> Op:
        pick = self.pick
        if rows and pick.random() < 0.1:  # a claim comes again long after its reply was lost
            return self.claims[pick.choice(rows).owner]
        seen = pick.choice([rows[-1], *rows]) if rows and pick.random() < 0.3 else None
        asked = claim(
            call,
            tool=f"tests.{call[-1]}",
            key=pick.choice(_TEXTS),
            args=pick.choice(_TEXTS),
            matched=pick.choice(_MATCHED),
            max=pick.choice((1, 1, 2, 3)),
            ttl=pick.choice((None, None, 200 * SECOND)),
            on_doubt=pick.choice(("rerun", "block", "reconcile")),
            forced=pick.random() < 0.15,
            not_done=(seen.run, seen.owner) if seen else None,
        )
        self.claims[asked.token] = asked
        return asked

    def _settle(self, seen: Run) -> Op:
        status = self.pick.choice(("success", "failed", "suspended", "doubt"))
        texts = [self.pick.choice(_TEXTS) for _ in range(3)]
        return ledger.Settle(claim_of(seen), seen.run, status, *texts)

    def _resolve(self, seen: Run) -> Op:
        done, reconciled = (self.pick.random() < 0.5 for _ in range(2))
        return resolve(seen, done=done, reconciled=reconciled, result=self.pick.choice(_TEXTS))


def told(verdict: ledger.Verdict) -> tuple[Any, ...]:
    """What a caller needs of a verdict."""
    row, closed = verdict.row, verdict.closed
    if verdict.kind not in ("granted", "live", "done", "doubt", "reconcile", "conflict"):
        return (verdict.kind,)
    same = row and (row.run, row.owner, row.result, row.args, row.key, row.matched)
    anchor = verdict.anchor if verdict.kind == "granted" else None
    return (verdict.kind, same, closed and (closed.run, closed.owner, closed.status), anchor)


def written(rows: list[Run]) -> list[Run]:
    """Rows without the owner's monotonic lease, which means nothing on a server."""
    return [row._replace(mono=0) for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_are_those_of_the_pure_operations(seed: int) -> None:
    """Verdicts and all rows after each step, then events, sums and lists, are what `apply` says."""
    clock = FakeClock()
    store = open_redis(clock)
    model, chance = Model(clock), Chance(seed)
    for history in range(HISTORIES):
        for step in range(chance.pick.randrange(4, 22)):
            call = f"h{history}-{chance.pick.randrange(2)}"
            op = chance.op(call, model.rows.get(call, []), clock.wall())
            for _ in range(chance.pick.choice((1, 1, 1, 2))):  # 2: the reply was lost, so it is sent again
                expected = model.apply(op)
                assert told(expected) == told(store.transact(op)), (seed, history, step, op)
                assert written(model.rows[call]) == store.rows(call), (seed, history, step, op)
            if chance.pick.random() < 0.3:
                clock.advance(chance.pick.choice((1, 150, 301, 1000)))
    assert model.events == [
        (e["kind"], e["run"], e["tool"], e["n"], e["detail"]) for e in store.events()
    ]  # fmt: skip
    left = {call: written(rows) for call, rows in model.rows.items() if rows}
    assert left == {rows[0].call: rows for _, rows in store.calls()}
    assert recounted(left, clock.wall()) == store.totals()
    store.close()


def recounted(calls: dict[str, list[Run]], wall: int) -> ledger.Totals:
    """The sums per tool, counted from all rows."""
    sums: ledger.Totals = {}
    for rows in calls.values():
        last = rows[-1]
        mine = sums.setdefault(last.tool, dict.fromkeys(ledger._TOTALS, 0))
        mine["actions"] += 1
        mine["attempts"] += len(rows)
        mine["executed"] += sum("success" in (r.status, r.late) for r in rows)
        if last.status == "running":
            mine["running" if last.lease > wall else "in_doubt"] += 1
        elif last.status == "doubt":
            mine["in_doubt"] += not last.released and last.late != "success"
        elif last.status in mine:
            mine[last.status] += 1
    return sums


# ── what goes with a call ─────────────────────────────────────────────────────────────


def test_a_reset_of_everything_leaves_no_key_behind(store: RedisStore) -> None:
    """Calls, tallies, lists and ends are gone; the log goes on, and the sums are zero."""
    for number, end in enumerate(("success", "failed", "suspended", "doubt")):
        asked = claim(f"c{number}", args="{}")
        store.transact(settle(run_of(store, asked), end))
        store.count("blocked", asked, 1)
        store.count("raised", claim(f"t{number}"), 0, "Boom")

    store.reset(None, store.clock.wall())

    with redis.Redis.from_url(redis_url(), decode_responses=True) as plain:
        keys = {key.split(":")[1] for key in plain.scan_iter(f"{{{store.namespace}}}:*")}
    assert {"meta", "events", "processes", "totals", "batch"} == keys
    assert ({}, "everything") == (store.totals(), list(store.events())[-1]["detail"])


def test_a_reset_in_steps_spares_what_was_made_since(store: RedisStore) -> None:
    """More calls than one step forgets are all forgotten; those that are younger than the question stay."""
    for number in range(1100):
        store.transact(settle(run_of(store, claim(f"c{number}"))))
    asked = store.clock.wall()
    time.sleep(0.01)
    store.transact(settle(run_of(store, claim("young"))))

    store.reset("w", asked)

    assert ["young"] == [record.call for record, _ in store.calls()]


def test_the_clock_of_a_caller_decides_nothing() -> None:
    """A caller whose clock is a day ahead or behind gets the same leases, ages and resets."""
    for days in (-1, 1):
        clock = ledger.Clock()
        wrong = FakeClock()
        wrong.step_wall(clock.wall() / SECOND - wrong.wall() / SECOND + days * 86_400)
        store = RedisStore(redis_url(), namespace=fresh_namespace(), clock=wrong)
        run = run_of(store, claim())

        assert abs(run.started - clock.wall()) < 60 * SECOND
        assert "live" == store.transact(claim()).kind
        store.transact(settle(run))
        assert "done" == store.transact(claim(ttl=60 * SECOND)).kind
        assert "done" == claim(ttl=60 * SECOND).judge(store.rows("c"), store.now_for(store.rows("c"))).kind
        store.reset("w", wrong.wall())
        assert [] == store.rows("c")
        store.close()


def test_other_arguments_under_one_key_are_a_conflict(store: RedisStore) -> None:
    """What match= names must agree with a run in doubt, also before it is run again."""
    run = run_of(store, claim(matched='{"to":"1"}'))
    store.transact(settle(run, "doubt"))

    assert "conflict" == store.transact(claim(matched='{"to":"2"}')).kind
    assert "granted" == store.transact(claim(matched='{"to":"1"}')).kind


def test_the_last_error_is_that_of_the_newest_failed_call(store: RedisStore) -> None:
    """Per tool, of calls and of unlimited ones; a call that succeeded since has none."""
    for number, end in enumerate(("failed", "failed", "success")):
        run = run_of(store, claim(f"c{number}"))
        store.transact(ledger.Settle(claim_of(run), run.run, end, None, f"Error {number}"))
    store.count("raised", claim("t", tool="tests.other"), 0, "Boom")
    store.flush()

    assert {"tests.charge": "Error 1", "tests.other": "Boom"} == store.last_errors()


def test_namespaces_do_not_meet(store: RedisStore) -> None:
    """The same call in another namespace is another call; a name that is none is refused."""
    other = RedisStore(redis_url(), namespace=fresh_namespace())
    store.transact(settle(run_of(store, claim())))

    assert 1 == run_of(other, claim()).run
    with pytest.raises(UsageError, match="use small letters"):
        RedisStore(redis_url(), namespace="a{b}")
    other.close()


def test_a_batch_of_counts_whose_reply_was_lost_counts_once(store: RedisStore) -> None:
    """The same numbered batch again changes nothing, so counts are exact."""
    asked = claim()
    run_of(store, asked)
    with way_to(redis_url()) as way:
        mine = RedisStore(way.url, namespace=store.namespace)
        mine.check()
        for _ in range(7):
            mine.count("blocked", asked, 1)
        way.lose(b"\r\ncount\r\n")
        mine.flush()
        mine.close()

    found = store.look("c")
    assert way.caught.is_set()
    assert (7, 7) == (found and found.blocked, store.totals()["tests.charge"]["blocked"])


def test_two_stores_of_one_process_count_apart(store: RedisStore) -> None:
    """Each numbers its own batches, so that none is taken for a repetition of the other's."""
    asked = claim()
    run_of(store, asked)
    other = RedisStore(redis_url(), namespace=store.namespace)
    for mine in (store, other):
        mine.count("blocked", asked, 1)
        mine.flush()

    found = store.look("c")
    assert 2 == (found and found.blocked)
    other.close()


# ── round trips ───────────────────────────────────────────────────────────────────────


def test_two_round_trips_run_a_call_and_one_answers_a_duplicate(server: RedisServer) -> None:
    """Claim and settle; a duplicate learns from its claim alone, of a known call from a plain read."""
    namespace = fresh_namespace()
    guards = [Guard(store=RedisStore(server.url, namespace=namespace), quiet=True) for _ in range(2)]
    first, second = [guard.once(replay=True, name="charge")(lambda order: order) for guard in guards]
    for charge in (first, first, second):
        charge(order=0)
    for guard in guards:
        guard.flush()
    with server.client() as plain, plain.monitor() as seen:
        for charge in (first, first, second, second):
            charge(order=1)
        plain.echo("replayed")

        sent = [words.split() for words in words_until(seen, "replayed")]

    for guard in guards:
        guard.close()
    asked = [words[4] if words[0] == "EVALSHA" else words[0] for words in sent]
    assert ["claim", "settle", "HMGET", "claim", "HMGET", "ECHO"] == asked


def words_until(seen: Any, last: str) -> Iterator[str]:
    """What clients sent, without what scripts did and what counts or says who a client is."""
    while True:
        entry = seen.next_command()
        words = str(entry["command"])
        if (
            entry["client_type"] != "lua"
            and not words.startswith(("CLIENT", "HELLO"))
            and " count " not in words
        ):
            yield words
        if words == f"ECHO {last}":
            return


# ── duplicates that wait ──────────────────────────────────────────────────────────────


def test_an_end_that_nobody_waits_for_is_not_published(server: RedisServer) -> None:
    """Of two ends the one that was waited for is told of, once."""
    store = RedisStore(server.url, namespace=fresh_namespace())
    runs = [run_of(store, claim(name)) for name in ("waited", "other")]
    store.changed(["waited"], 0.0)
    with server.client() as plain, plain.monitor() as seen:
        for run in (*runs, *runs):
            store.transact(settle(run))
        plain.echo("all")
        said = iter(lambda: str(seen.next_command()["command"]), "ECHO all")
        told = [words for words in said if words.startswith("PUBLISH")]

    assert [f"PUBLISH {{{store.namespace}}}:ended waited"] == told
    store.close()


def test_an_account_that_may_not_publish_or_listen_looks(server: RedisServer) -> None:
    """Ends are written all the same, and whoever waits finds them."""
    with server.client() as plain:
        plain.execute_command("ACL", "SETUSER", "deaf", "on", ">x", "~*", "+@all", "-@pubsub")
    guard = Guard(f"redis://deaf:x@127.0.0.1:{server.port}", namespace=fresh_namespace(), quiet=True)
    runs: list[int] = []

    def slow(order: int) -> int:
        runs.append(order)
        time.sleep(0.2)
        return order

    guard.policy(slow, replay=True)
    assert [1] * 8 == in_parallel(8, lambda _: guard(slow, 1))
    assert [1] == runs
    guard.close()


def test_one_connection_listens_for_all_and_only_while_somebody_waits(server: RedisServer) -> None:
    """Twenty wait for ten calls with one listener, which is gone when they are."""
    store = RedisStore(server.url, namespace=fresh_namespace())
    guard, inside = Guard(store=store, quiet=True), threading.Semaphore(0)
    go_on = threading.Event()

    def slow(order: int) -> int:
        inside.release()
        go_on.wait(PATIENCE)
        return order

    def listeners() -> int:
        with server.client() as plain:
            return len(plain.client_list("pubsub"))

    guard.policy(slow, replay=True)
    heard: list[Any] = []
    crowd = threading.Thread(target=lambda: heard.append(in_parallel(20, lambda n: guard(slow, n % 10))))
    crowd.start()
    for _ in range(10):
        assert inside.acquire(timeout=PATIENCE)
    eventually(lambda: listeners() == 1)
    go_on.set()
    crowd.join()

    assert [[n % 10 for n in range(20)]] == heard
    eventually(lambda: listeners() == 0)
    guard.close()


def test_a_store_that_is_closed_in_the_midst_of_calls_breaks_none(store: RedisStore) -> None:
    """What another thread asks at that moment is answered, and what is asked later opens it again."""
    over = threading.Event()

    def close() -> None:
        while not over.wait(0.001):
            store.close()

    closer = threading.Thread(target=close)
    closer.start()
    runs = in_parallel(4, lambda n: [run_of(store, claim(f"c{n}-{i}")).run for i in range(50)])
    over.set()
    closer.join()

    assert [[1] * 50] * 4 == runs


# ── races ─────────────────────────────────────────────────────────────────────────────


def test_sixteen_threads_make_one_run(store: RedisStore) -> None:
    """Of many that claim one call at once, one is granted, and all others learn whose run it is."""
    verdicts = in_parallel(16, lambda _: store.transact(claim()))

    assert ["granted", *["live"] * 15] == sorted(v.kind for v in verdicts)
    assert 1 == len({v.row.owner for v in verdicts})


def test_a_lapsed_run_is_taken_over_once() -> None:
    """Of many that see it lapsed, one closes it and runs."""
    clock = FakeClock()
    store = open_redis(clock)
    first = run_of(store, claim())
    clock.advance(301)

    verdicts = in_parallel(16, lambda _: store.transact(claim()))

    assert ["granted", *["live"] * 15] == sorted(v.kind for v in verdicts)
    assert [first.run] == [v.closed.run for v in verdicts if v.closed]
    assert ["doubt", "running"] == [r.status for r in store.rows("c")]
    store.close()


def claim_all(url: str, namespace: str, gate: Any, answers: Any) -> None:
    """A process that runs each of fifty calls, if it may."""
    store = RedisStore(url, namespace=namespace)
    gate.wait(PATIENCE)
    won = 0
    for number in range(50):
        verdict = store.transact(claim(f"c{number}"))
        if verdict.kind == "granted" and verdict.row:
            store.transact(settle(verdict.row))
            won += 1
    answers.put(won)
    store.close()


def test_processes_share_fifty_runs(store: RedisStore) -> None:
    """Four processes that begin at once, and make the ledger at once, run each call once in all."""
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(4), context.Queue()
    arguments = (redis_url(), store.namespace, gate, answers)
    children = [context.Process(target=claim_all, args=arguments) for _ in range(4)]
    for child in children:
        child.start()

    assert 50 == sum(answers.get(timeout=PATIENCE) for _ in children)
    for child in children:
        child.join(PATIENCE)
    assert ["success"] * 50 == [record.status for record, _ in store.calls()]


def test_a_forked_child_has_connections_of_its_own(store: RedisStore) -> None:
    """Parent and child go on side by side with the store that both had, and no answer is mixed up."""
    run_of(store, claim("before"))
    pid = os.fork()
    mine = "child" if pid == 0 else "parent"
    kinds = []
    for number in range(50):
        run = run_of(store, claim(f"{mine}{number}"))
        kinds.append(store.transact(settle(run)).kind)
    if pid == 0:
        os._exit(0 if kinds == ["settled"] * 50 else 1)

    assert (["settled"] * 50, 0) == (kinds, os.waitpid(pid, 0)[1])
    assert 101 == sum(1 for _ in store.calls())


# ── faults ────────────────────────────────────────────────────────────────────────────


def test_a_cluster_keeps_a_namespace_on_one_node(start: Callable[..., RedisServer]) -> None:
    """All keys share a hash tag, so a node in cluster mode takes every operation."""
    server = start("--cluster-enabled", "yes")
    with server.client() as plain:
        plain.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        limit = time.monotonic() + PATIENCE
        while "cluster_state:ok" not in str(plain.execute_command("CLUSTER", "INFO")):
            assert time.monotonic() < limit
            time.sleep(0.01)
    store = RedisStore(server.url)

    store.transact(settle(run_of(store, claim(wf="a:{b}")), result="1"))
    store.count("blocked", claim(), 1)

    assert [1] == [record.blocked for record, _ in store.calls(wf="a:{b}")]
    assert 1 == store.totals()["tests.charge"]["executed"]
    store.reset(None, store.clock.wall())
    assert ["claimed", "success", "blocked", "reset"] == [e["kind"] for e in store.events()]
    store.close()


def test_a_server_that_came_back_empty_is_an_error(store: RedisStore) -> None:
    """What was done is unknown, so nothing runs; opened anew, the store begins anew."""
    store.transact(settle(run_of(store, claim())))
    with redis.Redis.from_url(redis_url()) as plain:
        plain.delete(*plain.scan_iter(f"{{{store.namespace}}}:*"))

    with pytest.raises(StoreError, match=r"not the one that was opened.*nothing ran"):
        store.transact(claim())
    store.close()
    assert 1 == run_of(store, claim()).run


def test_a_newer_ledger_is_refused(store: RedisStore) -> None:
    """A schema that this version does not know is not touched."""
    store.check()
    with redis.Redis.from_url(redis_url()) as plain:
        plain.hset(f"{{{store.namespace}}}:meta", "schema", 2)
    newer = RedisStore(redis_url(), namespace=store.namespace)

    with pytest.raises(StoreError, match=r"written by a newer Ledger.*nothing ran"):
        newer.transact(claim())


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused(server: RedisServer, policy: str) -> None:
    """A tool does not run on a server that may forget it, unless the URL accepts that."""
    with configured(server, maxmemory="1gb", maxmemory_policy=policy):
        guard = Guard(store=RedisStore(server.url, namespace=fresh_namespace()), quiet=True)
        with pytest.raises(StoreError, match=f"maxmemory-policy is {policy}.*allow_eviction=1"):
            guard(pytest.fail, "ran")
        guard.close()
        accepted = RedisStore(server.url + "?allow_eviction=1", namespace=fresh_namespace())
        assert 1 == run_of(accepted, claim()).run
        accepted.close()


def test_a_server_without_a_log_is_warned_about_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No AOF, or a policy that would evict if there were a limit: said when the store is opened, once."""
    with configured(server, maxmemory_policy="allkeys-lru"):
        store = RedisStore(server.url, namespace=fresh_namespace())
        for _ in range(2):
            store.check()
            store.close()

    assert 2 == len(caplog.messages)
    assert "calls would be lost once there is a maxmemory" in caplog.messages[0]
    assert "no append-only file" in caplog.messages[1]
    assert "everysec can lose a second" in caplog.messages[1]


def test_full_memory_refuses_claims_and_takes_ends(server: RedisServer) -> None:
    """Nothing starts that could not be recorded; what had started is settled, renewed and reset."""
    store = RedisStore(server.url, namespace=fresh_namespace())
    asked, lasting = claim(), claim("lasting")
    run, other = run_of(store, asked), run_of(store, lasting)
    with configured(server, maxmemory="1kb"):  # less than an empty server has
        with pytest.raises(StoreError, match="memory is full") as refused:
            store.transact(claim("another"))
        kinds = [store.transact(op).kind for op in (settle(run, result='"x"'), renew(other), reset(2**60))]

    assert (True, ["settled", "renewed", "reset"]) == (refused.value.full, kinds)
    assert ([], [], 1) == (store.rows("another"), store.rows("c"), len(store.rows("lasting")))
    store.close()


def test_a_wrong_password_is_not_shown(start: Callable[..., RedisServer]) -> None:
    """The error names host and port, not what was tried."""
    server = start("--requirepass", "right-one")
    address = f"127.0.0.1:{server.port}"
    store = RedisStore(f"redis://:wrong-one@{address}/0?password=wrong-one", namespace=fresh_namespace())

    with pytest.raises(StoreError, match=f"{address}.*see that user and password are right") as refused:
        store.transact(claim())

    assert "wrong-one" not in str(refused.value)
    right = RedisStore(f"redis://:right-one@{address}", namespace=fresh_namespace())
    assert 1 == run_of(right, claim()).run
    right.close()


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_does_not_answer_is_an_error_soon(listens: bool) -> None:
    """A closed port at once, a silent server after the time that it was given; the tool does not run."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not listens:
            silent.close()
        guard = Guard(store=RedisStore(f"redis://127.0.0.1:{port}", lock_seconds=1), quiet=True)
        before = time.monotonic()

        with pytest.raises(StoreError, match=f"127.0.0.1:{port}.*see that the server"):
            guard(pytest.fail, "ran")

        assert time.monotonic() - before < 10


def test_a_replica_has_what_was_answered(server: RedisServer, start: Callable[..., RedisServer]) -> None:
    """With replicas=1 a granted claim is with the replica; without one it is an error, and may stand."""
    url = f"{server.url}?replicas=1"
    alone = RedisStore(url, namespace=fresh_namespace(), lock_seconds=1)
    asked = claim()
    with pytest.raises(StoreError, match=r"0 of 1 replicas have what was written.*may be lost with it"):
        alone.transact(asked)
    replica = start("--replicaof", "127.0.0.1", str(server.port))

    run = when_it_can(lambda: run_of(alone, asked))

    with replica.client() as plain:
        assert asked.token in plain.hget(f"{{{alone.namespace}}}:call:c", "1:row")
        alone.transact(settle(run, result='"kept"'))
        assert '"kept"' == plain.hget(f"{{{alone.namespace}}}:call:c", "1:result")
    with pytest.raises(StoreError, match="it is a replica; name the primary"):
        RedisStore(replica.url, namespace=alone.namespace).transact(claim("other"))
    alone.close()


def when_it_can(act: Callable[[], Run]) -> Run:
    """Its answer, once there is no `StoreError` any more."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except StoreError:
            assert time.monotonic() < limit
            time.sleep(0.05)


def test_a_live_run_is_named_when_a_reset_is_refused(store: RedisStore) -> None:
    """One live run among many calls keeps them all, and the error says where it is."""
    for number in range(3):
        store.transact(settle(run_of(store, claim(f"c{number}"))))
    run_of(store, claim("live"))

    with pytest.raises(InProgress, match=rf"nothing was reset.*call live.*pid {os.getpid()} on"):
        store.reset(None, store.clock.wall())

    assert 4 == sum(1 for _ in store.calls())
    store.reset(None, store.clock.wall(), force=True, why="a new day")
    assert [] == list(store.calls())
    assert (None, "a new day") == ((last := list(store.events())[-1])["wf"], last["detail"])
