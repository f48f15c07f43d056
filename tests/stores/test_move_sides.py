"""Every store that a ledger can be moved from or to keeps what the move is built on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

import ledger
from ledger import SqliteStore, StoreError, UsageError
from ledger_stores.base import ServerStore
from ledger_stores.documents import DocumentStore
from ledger_stores.dynamodb import DynamoStore
from ledger_stores.mongodb import MongoStore
from ledger_stores.move import Mark, Side, Whole, side_of
from ledger_stores.move_documents import DocumentSide
from ledger_stores.postgres import PostgresStore
from ledger_stores.redis import RedisStore
from ledger_stores.testing import claim, granted, in_parallel, release, renew, reset, resolve, settle
from tests.actors import eventually
from tests.move_kit import KINDS, url_of
from tests.stores.servers import fresh_namespace, postgres_url

LEAVING = Mark("leaving", "1", "there")
SEALED = replace(LEAVING, role="sealed")
RECEIVING = Mark("receiving", "1", "here", "m1")
#: a lease that has lapsed at once
LAPSED = {"lease": 0}


class HastyDynamo(DynamoStore):
    """All processes look at the mark so often that a test need not wait long."""

    gate_micros = 700_000


class HastyMongo(MongoStore):
    """Likewise."""

    gate_micros = 700_000


def made(kind: str, folder: Path) -> SqliteStore | ServerStore:
    """A new store of that kind."""
    if kind == "sqlite":
        store = SqliteStore(folder / f"{fresh_namespace()}.db", sync="off")
        store.quiet = True
        return store
    kinds: dict[str, type[ServerStore]] = {
        "postgres": PostgresStore, "redis": RedisStore, "dynamodb": HastyDynamo, "mongodb": HastyMongo
    }  # fmt: skip
    return kinds[kind](url_of(kind), namespace=fresh_namespace())


@pytest.fixture(params=KINDS)
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    """An empty store of each kind, as a side."""
    found = side_of(made(request.param, tmp_path))
    yield found
    found.store.close()


@pytest.fixture
def other(side: Side, tmp_path: Path) -> Iterator[Side]:
    """Another store, where rows can come from."""
    kinds = {SqliteStore: "sqlite", PostgresStore: "postgres", RedisStore: "redis"}
    kind = kinds.get(type(side.store), "sqlite")  # of documents there is no log that events could come from
    found = side_of(made(kind, tmp_path))
    yield found
    found.store.close()


def seal(side: Side) -> None:
    """As a move does it."""
    side.step(None, LEAVING)
    side.step(LEAVING, SEALED)


def refused(side: Side, work: Any, what: str) -> None:
    """It must be refused with those words, and change no row."""
    before = side.fetch(["c", "d", "e", "f"])
    with pytest.raises(StoreError, match=what):
        work()
    assert before == side.fetch(["c", "d", "e", "f"])


def test_a_ledger_that_leaves_works_on(side: Side) -> None:
    """The first mark of a source refuses nothing."""
    side.step(None, LEAVING)

    side.store.transact(settle(granted(side.store)))

    assert LEAVING == side.mark()


def test_a_sealed_ledger_begins_no_run_and_decides_nothing(side: Side) -> None:
    """First claims, next runs, takeovers, forced runs, releases, resolutions and resets are refused."""
    store = side.store
    run = granted(store)
    store.transact(settle(run, "failed"))
    lapsed = granted(store, call="d", **LAPSED)
    doubt = granted(store, call="e")
    store.transact(settle(doubt, "doubt"))
    seal(side)

    for op in (
        claim("new"), claim("c"), claim("d"), claim("d", forced=True), claim("e"), release(run),
        release(lapsed), resolve(doubt, done=True), resolve(lapsed, done=False), reset(2**53),
    ):  # fmt: skip
        refused(side, lambda op=op: store.transact(op), "this ledger was moved to there; nothing ran. Point")
    refused(side, lambda: store.reset("w", 2**53), "this ledger was moved to there")
    refused(side, lambda: store.reset(None, 2**53, force=True), "this ledger was moved to there")
    assert [] == store.rows("new")


def test_a_sealed_ledger_lets_runs_end(side: Side) -> None:
    """Owners renew, repeat a claim, settle and come late; duplicates are answered and counted."""
    store = side.store
    first = claim("c")
    run = store.transact(first).row
    assert run is not None
    given_up = granted(store, call="d", **LAPSED)
    store.transact(settle(granted(store, call="d")))
    lapsed = granted(store, call="e", **LAPSED)
    seal(side)

    assert "renewed" == store.transact(renew(run)).kind
    assert "granted" == store.transact(first).kind
    assert "live" == store.transact(claim("c")).kind
    assert "settled" == store.transact(settle(run, result="1")).kind
    assert "late" == store.transact(settle(given_up)).kind
    assert "settled" == store.transact(settle(lapsed)).kind
    assert "done" == store.transact(claim("c")).kind
    store.count("blocked", claim("c"), 1)
    store.flush()
    assert 1 == store.rows("c")[0].blocked


def test_without_its_mark_a_ledger_begins_runs_again(side: Side) -> None:
    """What a seal closed is open when the mark is taken away."""
    seal(side)
    side.unmark(SEALED)

    assert 1 == granted(side.store).run
    assert None is side.mark()


def test_a_receiving_ledger_refuses_every_run(side: Side, other: Side) -> None:
    """Until it is opened no run begins, ends or is decided about there, and nothing is counted."""
    run = granted(other.store, **LAPSED)
    side.step(None, RECEIVING)
    side.step(RECEIVING, RECEIVING, other.fetch(["c"]))

    for op in (claim("new"), release(run), reset(2**53), settle(run), claim("c"), claim("c", forced=True)):
        refused(side, lambda op=op: side.store.transact(op), "is receiving the calls of here and is not")
    assert [run._replace(mono=0)] == [row._replace(mono=0) for row in side.store.rows("c")]
    assert [] == side.store.rows("new")
    side.store.count("blocked", claim("c"), 1)
    with pytest.raises(StoreError, match="is receiving"):
        side.store.flush()
    side.step(RECEIVING, replace(RECEIVING, role="arrived"))
    side.store.flush()
    assert 1 == side.store.rows("c")[0].blocked
    assert "settled" == side.store.transact(settle(run)).kind


def test_only_an_empty_ledger_receives(side: Side) -> None:
    """A ledger that holds something stays as it is, and open."""
    granted(side.store)

    with pytest.raises(UsageError, match="is not empty, nothing was written"):
        side.step(None, RECEIVING)

    assert None is side.mark()
    granted(side.store, call="d")


def test_what_is_received_replaces_what_was(side: Side, other: Side) -> None:
    """Rows that are gone go, others change, a call keeps its place, and the totals are those of the rows."""
    store = other.store
    for call in ("c", "d"):
        store.transact(settle(granted(store, call=call), "failed"))
        store.transact(settle(granted(store, call=call), "success", result="é\0\n"))
    store.count("ran", claim("e", tool="free"), 0)
    store.flush()
    side.step(None, RECEIVING)
    side.step(RECEIVING, RECEIVING, other.fetch(["c", "d", "e"]))
    assert other.store.totals() == side.store.totals()

    store.transact(reset(2**53))
    granted(store)
    store.transact(release(store.rows("d")[-1]))
    store.transact(settle(granted(store, call="d"), "doubt"))
    store.count("raised", claim("e", tool="free"), 0, "no")
    store.flush()
    for _ in range(2):
        side.step(RECEIVING, RECEIVING, other.fetch(["c", "d", "e", "nobody"]))

    assert shapes(other.fetch(["c", "d", "e"])) == shapes(side.fetch(["c", "d", "e"]))
    assert other.store.totals() == side.store.totals()
    assert ["c", "d", "e"] == [call for _, call in side.names("", 9) if call != "nobody"]
    assert side.open_calls() == other.open_calls() == ["c"]
    side.step(RECEIVING, RECEIVING, [Whole(call, (), None) for call in ("c", "d", "e")])
    assert side.is_empty()
    assert {} == side.store.totals()


def shapes(wholes: list[Whole]) -> list[Any]:
    """All of these calls but monotonic times and what documents do not keep of processes."""
    return [
        ([run._replace(mono=0) for run in w.rows], w.tally, sorted(told[:3] for told in w.processes))
        for w in wholes
    ]


def test_a_second_mover_takes_over(side: Side, other: Side) -> None:
    """Whoever comes later writes its name, and who was there before can write nothing any more."""
    granted(other.store)
    side.step(None, RECEIVING)
    mine = replace(RECEIVING, mover="m2")
    side.step(RECEIVING, mine)

    with pytest.raises(StoreError, match="another `ledger move` is at work"):
        side.step(RECEIVING, replace(RECEIVING, place="9"), other.fetch(["c"]))

    assert (mine, True) == (side.mark(), side.is_empty())


def test_a_step_that_is_repeated_appends_no_event_twice(side: Side, other: Side) -> None:
    """Its reply may have been lost: the mark tells that it was made."""
    store = other.store
    store.transact(settle(granted(store)))
    side.step(None, RECEIVING)
    entries = other.entries(0, 9)
    after = replace(RECEIVING, events=entries[-1].seq)

    side.step(RECEIVING, RECEIVING, other.fetch(["c"]))
    for _ in range(2):
        side.step(RECEIVING, after, (), entries)

    assert [(e.kind, e.run, e.detail) for e in entries] == told(side)


def told(side: Side, call: str = "c") -> list[Any]:
    """The events of a call, by the log of all or by its own."""
    if side.has_log:
        return [(e.kind, e.run, e.detail) for e in side.entries(0, 99) if e.call == call]
    store: Any = side.store
    return [(e["kind"], e["run"], e["detail"]) for e in store.events_of(call)]


def test_an_opened_ledger_lists_new_calls_last(side: Side, other: Side) -> None:
    """Calls that come after a move stand after those that came by it, and events go on."""
    calls = [f"c{n}" for n in range(5)]
    for call in calls:
        granted(other.store, call=call)
    side.step(None, RECEIVING)
    side.step(RECEIVING, replace(RECEIVING, role="arrived"), other.fetch(calls), other.entries(0, 2))

    granted(side.store, call="new")

    assert [*calls, "new"] == [call for _, call in side.names("", 99)]
    assert [("claimed", 1, None)] == told(side, "new")
    assert not side.has_log or ["new"] == [e.call for e in side.entries(side.entries(0, 2)[-1].seq, 9)]


def test_what_was_received_can_be_taken_away(side: Side, other: Side) -> None:
    """Erased, it holds nothing, stays closed, and may receive anew."""
    for number in range(3):
        granted(other.store, call=f"c{number}")
    side.step(None, RECEIVING)
    side.step(RECEIVING, RECEIVING, other.fetch([f"c{n}" for n in range(3)]), other.entries(0, 9))
    cancelled = replace(RECEIVING, role="cancelled")

    side.erase(RECEIVING, cancelled)

    assert side.is_empty()
    assert {} == side.store.totals()
    with pytest.raises(StoreError, match="that move was cancelled; nothing ran"):
        side.store.transact(claim("new"))
    side.step(cancelled, RECEIVING, other.fetch(["c1"]))
    side.step(RECEIVING, replace(RECEIVING, role="arrived"))
    assert 1 == granted(side.store, call="new").run


def test_a_place_goes_on_through_all_calls(side: Side) -> None:
    """Page by page every call is named once, those with a tally last, and of one workflow only its own."""
    for number in range(7):
        granted(side.store, call=f"c{number}", wf=f"w{number % 2}")
    for number in range(3):
        side.store.count("ran", claim(f"f{number}", tool="free", wf="w1"), 0)
    side.store.flush()

    def walked(limit: int, wf: str | None = None) -> list[str]:
        place, found = "", list[str]()
        while page := side.names(place, limit, wf):
            place = page[-1][0]
            found += [call for _, call in page]
        return found

    for limit in (1, 2, 100):
        assert [*(f"c{n}" for n in range(7)), "f0", "f1", "f2"] == walked(limit)
        assert ["c1", "c3", "c5", "f0", "f1", "f2"] == walked(limit, "w1")


@pytest.mark.parametrize("kind", KINDS)
def test_looking_whether_there_is_a_ledger_makes_none(kind: str, tmp_path: Path) -> None:
    """Neither a file, nor a schema, nor a key."""
    store = made(kind, tmp_path)
    side = side_of(store)

    assert not side.exists()
    assert not side.exists()
    granted(store)
    assert side.exists()
    store.close()


def test_the_seal_is_a_barrier(side: Side) -> None:
    """Whatever claims are under way: when the seal stands, the list of calls is final.

    In a store of documents one may stand there that was given back: its caller was refused, and no tool ran.
    """
    side.step(None, LEAVING)
    stop = threading.Event()
    granted(side.store, call="first")

    def work(number: int) -> int:
        if number == 0:
            eventually(lambda: len(side.names("", 1000)) > 20)
            side.step(LEAVING, SEALED)
            known = len(side.names("", 100_000))
            stop.wait(0.3)
            return known
        done = 0
        with suppress(StoreError):
            while True:
                granted(side.store, call=f"c{number}-{done}")
                done += 1
        return done

    known, *done = in_parallel(5, work)

    assert known == len(side.names("", 100_000))
    eventually(lambda: sum(done) + 1 == len(side.open_calls()))
    assert known == sum(done) + 1 or not side.has_log


def test_postgres_seals_behind_what_is_under_way() -> None:
    """It waits for a claim that is not committed yet; one that comes to its event behind it is undone."""
    store = PostgresStore(postgres_url(), namespace=fresh_namespace())
    side = side_of(store)
    side.step(None, LEAVING)
    op: Any = ledger.Claim("c", "o.1", "t", "w", "", None, None, 1, None, 10**9, "rerun", forced=False)
    rest = "'t', 'w', '', NULL, NULL, NULL, 1, NULL, 1000000000, 'rerun', 0, NULL, NULL"
    sql = f"SELECT {store.namespace}.claim(%s, %s, {rest})"
    with psycopg.connect(postgres_url()) as early, psycopg.connect(postgres_url()) as late:
        early.execute(sql, ("c", "o.1"))
        late.execute("SELECT 1")  # its transaction is older than the seal
        sealing = threading.Thread(target=side.step, args=(LEAVING, SEALED))
        sealing.start()
        sealing.join(0.3)
        assert sealing.is_alive()
        early.commit()
        sealing.join(30)
        with pytest.raises(psycopg.Error, match="this ledger was moved to there"):
            late.execute(sql, ("d", "o.2"))

    assert ["c"] == side.open_calls()
    assert "granted" == store.transact(op).kind
    store.close()


def test_redis_takes_a_call_with_holes(tmp_path: Path) -> None:
    """A pruned file has runs 2 and 4 of a call; they arrive under their numbers, and the next is run 5."""
    side, target = side_of(made("sqlite", tmp_path)), side_of(made("redis", tmp_path))
    store: Any = side.store
    for end in ("failed", "success", "failed", "success"):
        store.transact(settle(granted(store, max=3), end))
    store.submit(lambda db: db.execute("DELETE FROM runs WHERE run IN (1, 3)"), durable=False)
    target.step(None, RECEIVING)
    for _ in range(2):
        target.step(RECEIVING, RECEIVING, side.fetch(["c"]))
    target.step(RECEIVING, replace(RECEIVING, role="arrived"))

    assert [2, 4] == [row.run for row in target.store.rows("c")]
    assert (1, 2) == tuple(target.store.totals()["tests.charge"][n] for n in ("actions", "executed"))
    assert 5 == granted(target.store, max=3).run
    target.store.reset(None, 2**53, force=True)
    assert {} == target.store.totals()
    for one in (side, target):
        one.store.close()


def test_a_task_is_told_that_a_ledger_was_moved(side: Side) -> None:
    """Also one that was cancelled does not keep others from their answers."""
    store = side.store
    store.transact(settle(granted(store)))
    seal(side)

    async def ask() -> str:
        with pytest.raises(StoreError, match="this ledger was moved to there"):
            await store.transact_async(claim("new"))
        gone = asyncio.ensure_future(store.transact_async(claim("new")))
        await asyncio.sleep(0)
        gone.cancel()
        with suppress(asyncio.CancelledError, StoreError):
            await gone
        return (await store.transact_async(claim())).kind

    assert "done" == asyncio.run(ask())


class Behind(HastyDynamo):
    """The store on a table whose indexes have not heard of anything yet."""

    def _indexed(self, kind: str, scope: str | None, after: str) -> Iterator[tuple[str, str]]:  # noqa: ARG002 - whatever is asked for
        return iter(())


def test_a_dynamo_side_trusts_no_index(tmp_path: Path) -> None:
    """A call that the lists lack is open, and the ledger is not empty."""
    store = made("dynamodb", tmp_path)
    assert isinstance(store, DynamoStore)
    granted(store)
    behind = side_of(Behind(store.url, namespace=store.namespace))

    assert (["c"], False) == (behind.open_calls(), behind.is_empty())
    for one in (store, behind.store):
        one.close()


@pytest.mark.parametrize("kind", ["dynamodb", "mongodb"])
def test_a_seal_that_was_cut_off_is_waited_for_by_the_next(kind: str, tmp_path: Path) -> None:
    """Whoever looked before the seal may begin runs for a while: no mover goes on before that is over."""
    store = made(kind, tmp_path)
    assert isinstance(store, DocumentStore)
    late = type(store)(store.url, namespace=store.namespace)
    side = DocumentSide(store)
    side.step(None, LEAVING)
    late.check()
    side._set_mark(LEAVING, SEALED)  # and then it was killed

    side_of(store).step(SEALED, SEALED)

    with pytest.raises(StoreError, match="this ledger was moved to there"):
        late.transact(claim())
    for one in (store, late):
        one.close()


def test_a_call_of_more_processes_than_one_request_names_is_fetched(tmp_path: Path) -> None:
    """As from a timer that starts a program each time."""
    store = made("dynamodb", tmp_path)
    for number in range(101):
        store.transact(settle(granted(store, token=f"p{number}.1"), "failed"))

    [whole] = side_of(store).fetch(["c"])

    assert 101 == len(whole.rows)
    store.close()
