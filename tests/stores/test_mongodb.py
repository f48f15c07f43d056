"""The store on MongoDB: the commands that it sends, as a written protocol, and what becomes of faults.

The protocol and the faults run against a stand-in (`mongo_kit.StandIn`): they say what is asked, not what
MongoDB does with it.  What takes the store of `anywhere`, and the suite of `test_conformance.py`, runs on a
live one too, where LEDGER_TEST_MONGODB names one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

import ledger
from ledger import Guard, KeyConflict, Run, StoreError, UsageError
from ledger_stores.mongodb import MongoStore
from ledger_stores.testing import (
    SECOND,
    FakeClock,
    claim,
    granted,
    in_parallel,
    release,
    renew,
    resolve,
    settle,
)
from tests.actors import eventually
from tests.stores.mongo_kit import Doc, StandIn, live_url, open_mongo
from tests.stores.servers import fresh_namespace

MAJORITY = {"w": "majority", "j": True, "wtimeout": 30_000}
ONE = {"w": 1}


@pytest.fixture
def server() -> Iterator[StandIn]:
    """A stand-in that a test may treat as it likes."""
    made = StandIn()
    yield made
    made.close()


@pytest.fixture
def store(server: StandIn) -> Iterator[MongoStore]:
    """An empty store on it, in the namespace `shop`."""
    made = MongoStore(server.url, namespace="shop")
    yield made
    server.loses, server.refuses, server.adds = {}, {}, {}
    made.close()


@pytest.fixture(params=["stand-in", "live"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a stand-in, and of a real MongoDB."""
    if request.param == "live":
        return live_url()
    standing: StandIn = request.getfixturevalue("server")
    return standing.url


@pytest.fixture
def anywhere(url: str) -> Iterator[MongoStore]:
    """An empty store on either."""
    made = open_mongo(url)
    yield made
    made.close()


def said(heard: list[Doc]) -> list[Doc]:
    """Commands as they are compared: of a session and its numbers it only matters that there are any."""
    told = []
    for command in heard:
        assert "shop" == command["$db"]
        assert bytes(command["lsid"]["id"])
        kept = {name: value for name, value in command.items() if name not in ("$db", "lsid")}
        told.append(kept | ({"txnNumber": True} if "txnNumber" in kept else {}))
    return told


def insert(name: str, fields: Doc, *, concern: Doc = MAJORITY) -> Doc:
    """The command that puts a document where none is and answers what stands there."""
    return {
        "findAndModify": "shop", "query": {"_id": name}, "update": {"$setOnInsert": fields},
        "upsert": True, "new": True, "writeConcern": concern, "txnNumber": True,
    }  # fmt: skip


def swap(name: str, version: str, fields: Doc, *, concern: Doc = MAJORITY) -> Doc:
    """The command that changes a document if it has that version, and answers the small fields of it."""
    return {
        "findAndModify": "shop", "query": {"_id": name, "v": version}, "update": {"$set": fields},
        "fields": {"rows": 0, "log": 0}, "upsert": False, "new": True, "writeConcern": concern,
        "txnNumber": True,
    }  # fmt: skip


def put(name: str, fields: Doc) -> Doc:
    """The command that sets fields of a document that is there."""
    asked = {"q": {"_id": name}, "u": {"$set": fields}, "upsert": False, "multi": False}
    return {
        "update": "shop", "updates": [asked], "ordered": True, "writeConcern": MAJORITY, "txnNumber": True,
    }  # fmt: skip


def count(name: str, fields: Doc) -> Doc:
    """The command that counts in a document that is there, and answers the small fields of it."""
    return {**swap(name, "", fields), "query": {"_id": name}}


def find(condition: Doc, **more: Any) -> Doc:
    """The command that reads what a majority has."""
    return {"find": "shop", "filter": condition, "readConcern": {"level": "majority"}, **more}


def call_of(status: str) -> Doc:
    """The fields of a call, whatever they say."""
    return {"v": ANY, "rows": ANY, "log": ANY, "first": ANY, "forgotten": 0, "status": status}


def version_of(command: Doc) -> str:
    """The version that a command writes."""
    update = command["update"]
    return str((update.get("$set") or update["$setOnInsert"])["v"])


def runs_in(command: Doc) -> list[Doc]:
    """The runs that a command replaces those of a call with."""
    rows = json.loads(command["update"]["$set"]["rows"])
    return [dict(zip(ledger.Run._fields[1:], row, strict=True)) for row in rows]


# ── the written protocol ──────────────────────────────────────────────────────────────

LOOK: Doc = {
    "aggregate": "shop",
    "pipeline": [
        {"$match": {"_id": "ledger"}},
        {"$project": {"schema": 1, "ledger": 1, "v": 1, "move": 1, "closed": 1, "now": "$$NOW"}},
    ],
    "cursor": {},
    "readConcern": {"level": "majority"},
}
INDEXES: Doc = {
    "createIndexes": "shop",
    "indexes": [
        {"name": "list_1_first_1", "key": {"list": 1, "first": 1}},
        {"name": "list_1_scope_1_first_1", "key": {"list": 1, "scope": 1, "first": 1}},
    ],
    "writeConcern": MAJORITY,
}
IN_LIST = {"list": "call", "scope": ANY}


def test_opening_makes_what_is_not_there_and_only_looks_where_it_is(server: StandIn) -> None:
    """Indexes, then the ledger's own document, by whoever finds none; then the process, once."""
    process = insert(f"process:{ledger._me().id}", {"host": ANY, "pid": os.getpid()})
    checked = put(f"process:{ledger._me().id}", {"checked": ANY})
    first, second = (MongoStore(server.url, namespace="shop") for _ in range(2))

    with server.recording() as making:
        first.check()
    with server.recording() as opening:
        second.check()
    with server.recording() as looking:
        second.check()

    own = insert("ledger", {"schema": 1, "ledger": ANY, "v": ANY})
    assert [LOOK, INDEXES, own, LOOK, process, checked] == said(making)
    # check looks once more, because it asks for a look that is later than its own beginning
    assert [LOOK, process, checked] == said(opening)
    assert [LOOK, checked] == said(looking)
    for store in (first, second):
        store.close()


def test_a_claim_and_a_settle_are_one_command_each(server: StandIn, store: MongoStore) -> None:
    """Insert if absent, then replace what this process knows is there; a duplicate is the same insert."""
    store.check()
    with server.recording() as heard:
        run = granted(store)
        store.transact(renew(run))
        store.transact(settle(run, result='"r"'))
        store.transact(claim())

    claimed, renewed, settled, _ = heard
    assert [
        insert("call:c", call_of("running") | IN_LIST),
        swap("call:c", version_of(claimed), call_of("running")),
        swap("call:c", version_of(renewed), call_of("success")),
        insert("call:c", call_of("running") | IN_LIST),
    ] == said(heard)
    assert [("success", '"r"')] == [(run["status"], run["result"]) for run in runs_in(settled)]
    assert 4 == len({version_of(command) for command in heard})


def test_a_takeover_is_decided_on_what_the_insert_found(server: StandIn) -> None:
    """The refused insert has told what stands there; replacing it is the second and last command."""
    clock = FakeClock()
    store = open_mongo(server.url, clock)
    store.namespace = "shop"
    granted(store)
    clock.advance(301)
    with server.recording() as heard:
        granted(store)

    assert ["doubt", "running"] == [run["status"] for run in runs_in(heard[1])]
    before = server.heard[-3]
    assert [
        insert("call:c", call_of("running") | IN_LIST),
        swap("call:c", version_of(before), call_of("running")),
    ] == said(heard)
    store.close()


def test_who_was_overtaken_reads_and_decides_again(server: StandIn, store: MongoStore) -> None:
    """A version that is gone costs one reading, by the name and nothing else."""
    run = granted(store)
    other = MongoStore(server.url, namespace="shop")
    other.transact(renew(run))
    with server.recording() as heard:
        kind = store.transact(settle(run)).kind

    assert "settled" == kind
    theirs = server.documents("shop").find_one({"_id": "call:c"})
    assert theirs["v"] == version_of(heard[2])
    assert [
        swap("call:c", ANY, call_of("success")),
        find({"_id": {"$in": ["call:c"]}}),
        swap("call:c", ANY, call_of("success")),
    ] == said(heard)
    other.close()


def test_release_and_resolve_read_and_replace(server: StandIn, store: MongoStore) -> None:
    """What people do is a reading and a write on the condition that nothing changed."""
    run = granted(store)
    store.transact(settle(run, "doubt"))
    with server.recording() as heard:
        store.transact(resolve(run, done=True))
        store.transact(release(run))

    looked = find({"_id": {"$in": ["call:c"]}})
    changed = swap("call:c", ANY, call_of("success"))
    assert [looked, changed, looked, changed] == said(heard)


def test_counts_are_written_as_numbers_of_their_writer(server: StandIn, store: MongoStore) -> None:
    """Blocked attempts are a field of the call; a tool without limit has a document, made at its first."""
    asked = claim()
    granted(store, token=asked.token)
    with server.recording() as heard:
        for _ in range(3):
            store.count("blocked", asked, 1)
        store.flush()
        for _ in range(2):
            store.count("ran", claim("t"), 0)
            store.flush()

    writer = f"at{store._named_at}-{store._writer.replace('.', '-')}"
    sums = {"error": "null", "touched": ANY}
    made = {"about": ANY, "created": ANY, "first": ANY, "list": "tally", "scope": ANY}
    assert [
        count("call:c", {f"blocked_{writer}": 3}),
        count("tally:t", {f"ran_{writer}": 1, **sums}),
        insert("tally:t", {**made, f"ran_{writer}": 1, **sums}),
        count("tally:t", {f"ran_{writer}": 1, **sums}),
        count("tally:t", {f"ran_{writer}": 2, **sums}),
    ] == said(heard)


def test_the_counts_of_old_writers_are_added_up(server: StandIn, store: MongoStore) -> None:
    """A call that many processes were blocked by has one number of those of long ago, and loses none."""
    clock = FakeClock()
    server.clock = clock.wall
    run = granted(store, lease=10**12)
    for number in range(60):
        if number == 30:
            clock.advance(26 * 3600)
        store.count("blocked", claim(), 1)
        store.count("ran", claim("t"), 0)
        store.close()  # whoever opens it again is another writer

    for name, kind in (("call:c", "blocked"), ("tally:t", "ran")):
        found = server.documents("shop").find_one({"_id": name})
        writers = [field for field in found if field.startswith(f"{kind}_at")]
        assert (30, 30) == (len(writers), found[f"{kind}_over"])
    assert [60] == [run.blocked for run in store.rows("c")]
    assert [60] == [record.attempts for record in store.all() if record.call == "t"]
    store.transact(settle(run))
    store.reset(None, store.clock.wall() + SECOND)
    granted(store)
    assert [0] == [run.blocked for run in store.rows("c")]


def test_lists_go_by_an_index_a_page_at_a_time(server: StandIn, store: MongoStore) -> None:
    """Names in the order of `first`, each page a question of its own that no cursor outlives."""
    for number in range(101):
        granted(store, call=f"{number:03}", wf="odd" if number % 2 else "even")
    with server.recording() as heard:
        names = [record.call for record, _ in store.calls()]
    page = {"projection": {"first": 1}, "sort": {"first": 1}, "limit": 100}

    assert [f"{n:03}" for n in range(101)] == names
    hundredth = server.documents("shop").find_one({"_id": "call:099"})["first"]
    expected = [
        find({"list": "call", "first": {"$gt": ""}}, **page),
        find({"_id": {"$in": [f"call:{n:03}" for n in range(100)]}}),
        find({"_id": {"$in": [f"process:{ledger._me().id}"]}}),  # whose the runs are
        find({"list": "call", "first": {"$gt": hundredth}}, **page),
        find({"_id": {"$in": ["call:100"]}}),
        find({"list": "tally", "first": {"$gt": ""}}, **page),
    ]
    assert expected == said(heard)
    with server.recording() as heard:
        assert [f"{n:03}" for n in range(1, 101, 2)] == [record.call for record in store.all("odd")]
    scope = said(heard)[0]["filter"]["scope"]
    assert find({"list": "call", "scope": scope, "first": {"$gt": ""}}, **page) == said(heard)[0]
    assert scope == server.documents("shop").find_one({"_id": "call:001"})["scope"]


def test_a_text_that_is_too_long_is_kept_before_the_document_that_names_it(
    server: StandIn, store: MongoStore
) -> None:
    """In parts of 8 MB in a collection that no namespace can be; a reset removes them, the first one last."""
    long = json.dumps(random.Random(1).randbytes(9_000_000).hex())
    run = granted(store)
    with server.recording() as keeping:
        store.transact(settle(run, result=long))
    with server.recording() as reading:
        assert long == store.rows("c")[0].result
    with server.recording() as forgetting:
        store.reset("w", store.clock.wall() + SECOND)

    name = server.documents("shop.texts").name and keeping[0]["documents"][0]["_id"].partition(":")[0]
    parts = [f"{name}:{n}" for n in range(3)]
    kept = {"insert": "shop.texts", "ordered": True, "writeConcern": MAJORITY, "txnNumber": True}
    assert [
        *({**kept, "documents": [{"_id": part, "parts": 3, "data": ANY}]} for part in parts),
        swap("call:c", ANY, call_of("success")),
    ] == said(keeping)
    assert len(json.dumps(said(keeping)[-1]["update"]["$set"])) < 5000
    one = {"limit": 1, "singleBatch": True, "readConcern": {"level": "majority"}}
    reads = [{"find": "shop.texts", "filter": {"_id": part}, **one} for part in parts]
    assert [find({"_id": {"$in": ["call:c"]}}), *reads] == said(reading)
    drops = [
        {
            "delete": "shop.texts", "deletes": [{"q": {"_id": part}, "limit": 1}], "ordered": True,
            "writeConcern": MAJORITY, "txnNumber": True,
        }
        for part in reversed(parts)
    ]  # fmt: skip
    assert drops == [command for command in said(forgetting) if "delete" in command]
    assert 0 == server.documents("shop.texts").count_documents({})


@pytest.mark.parametrize(
    ("sync", "claimed", "settled", "level"),
    [("full", MAJORITY, MAJORITY, "majority"), ("claim", MAJORITY, ONE, "local"), ("off", ONE, ONE, "local")],
)
def test_sync_says_what_waits_for_the_majority(
    server: StandIn, sync: Any, claimed: Doc, settled: Doc, level: str
) -> None:
    """All writes, what begins a run or goes on with it, or none; options of the URL weaken nothing."""
    url = f"{server.url}?w=1&journal=false&readConcernLevel=local&readPreference=secondaryPreferred"
    store = MongoStore(url, namespace="shop", sync=sync)
    with server.recording() as heard:
        run = granted(store)
        store.transact(renew(run))
        store.transact(settle(run))
        store.rows("c")

    writes = [command["writeConcern"] for command in heard if "findAndModify" in command]
    assert [claimed] * 4 + [settled] == writes
    assert {level} == {command["readConcern"]["level"] for command in heard if "readConcern" in command}
    assert not [command for command in heard if "$readPreference" in command]
    store.close()


# ── round trips ───────────────────────────────────────────────────────────────────────


def test_two_round_trips_run_a_call_and_one_answers_a_duplicate(server: StandIn, store: MongoStore) -> None:
    """Claim and settle; a duplicate is a read where the call is known, else it learns all from the insert."""
    other = MongoStore(store.url, namespace=store.namespace)
    here, there = (
        Guard(store=one, quiet=True).once(replay=True)(lambda order: order) for one in (store, other)
    )
    here(order=0)
    there(order=0)
    heard = []

    for charge in (here, here, there):
        with server.recording() as said_then:
            assert 1 == charge(order=1)
        heard.append(names_in(said_then))

    assert [["findAndModify"] * 2, ["find"], ["findAndModify"]] == heard
    other.close()


def names_in(heard: list[Doc]) -> list[str]:
    """The commands of callers: counts are written in the background, whenever it is time."""
    return [next(iter(command)) for command in heard if not is_count(command)]


def is_count(command: Doc) -> bool:
    """Whether it changes nothing but what was counted."""
    return any(field.startswith("blocked_at") for field in command.get("update", {}).get("$set", ()))


def test_many_that_wait_are_found_by_one_poller(server: StandIn, store: MongoStore) -> None:
    """One thread asks for all of them in one command, and they get the first one's result."""
    guard = Guard(store=store, quiet=True)
    runs: list[int] = []

    @guard.once(replay=True, wait=30)
    async def charge(order: int) -> int:
        runs.append(order)
        await asyncio.sleep(0.5)
        return order

    async def main() -> tuple[list[int], int]:
        ticks = 0
        asked = asyncio.gather(*(charge(n % 3) for n in range(30)))
        while not asked.done():
            await asyncio.sleep(0.005)
            ticks += 1
            assert 1 >= sum(thread.name == "ledger-watcher" for thread in threading.enumerate())
        return await asked, ticks

    with server.recording() as heard:
        answers, ticks = asyncio.run(main())

    assert ([n % 3 for n in range(30)], [0, 1, 2]) == (answers, sorted(runs))
    assert ticks > 10
    assert 3 in {len(command["filter"]["_id"]["$in"]) for command in heard if "find" in command}


STREAM: Doc = {
    "aggregate": "shop",
    "pipeline": [
        {"$changeStream": {}},
        {
            "$match": {
                "documentKey._id": {"$in": ["call:c", "call:d"]},
                "updateDescription.updatedFields.status": {"$exists": True},
            }
        },
        {"$project": {"_id": 1}},
    ],
    "cursor": {},
    "readConcern": {"level": "majority"},
}
BOTH = find({"_id": {"$in": ["call:c", "call:d"]}})


def test_a_long_pause_ends_when_a_run_ends(server: StandIn, store: MongoStore) -> None:
    """A change stream is opened, then all are looked at, then it is waited for: nothing is missed or left."""
    others = MongoStore(server.url, namespace="shop")
    runs = [granted(others, call=call) for call in ("c", "d")]
    store.check()

    def end_one() -> None:
        eventually(lambda: "getMore" in server.heard[-1])
        others.transact(renew(runs[0]))  # wakes nobody
        others.transact(settle(runs[1]))

    threading.Thread(target=end_one).start()
    with server.recording() as heard:
        found = list(store.changed(["c", "d"], 1000))  # longer than this test may take

    mine = [command for command in heard if "findAndModify" not in command]
    waited = {"getMore": ANY, "collection": "shop", "maxTimeMS": 1_000_000}
    closed = {"killCursors": "shop", "cursors": [ANY]}
    assert ["d"] == found
    assert [STREAM, BOTH, waited, closed, BOTH] == said(mine)
    others.close()


def test_who_waits_long_is_told_of_an_end(anywhere: MongoStore) -> None:
    """Whether by a stream or by looking again."""
    other = MongoStore(anywhere.url, namespace=anywhere.namespace)
    run = granted(other)
    threading.Timer(0.3, lambda: other.transact(settle(run))).start()

    def is_told() -> bool:
        return ["c"] == list(anywhere.changed(["c"], 1.0))

    eventually(is_told)
    other.close()


def test_an_end_before_the_stream_is_seen_by_looking(server: StandIn, store: MongoStore) -> None:
    """Whoever is over already is told at once."""
    store.transact(settle(granted(store)))

    assert ["c"] == list(store.changed(["c"], 1000))


def test_where_there_are_no_streams_looking_goes_on(server: StandIn, store: MongoStore) -> None:
    """One refusal, and for a minute nothing is asked but what stands there."""
    granted(store)
    refusal = {"ok": 0, "code": 40573, "codeName": "Location40573", "errmsg": "only on replica sets"}
    server.refuses["aggregate"] = [refusal]
    with server.recording() as heard:
        assert [] == [call for _ in range(2) for call in store.changed(["c"], 0.3)]

    assert ["aggregate", "find", "find", "find", "find"] == names_in(heard)


# ── faults ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("lost", ["claim", "settle"])
def test_an_answer_that_is_lost_costs_nothing(
    server: StandIn, store: MongoStore, lost: str, times: int
) -> None:
    """The driver asks once more; who gets an error even so repeats the operation and finds what it wrote."""
    asked = claim()
    store.check()

    def do(op: ledger.Op, *, is_lost: bool) -> ledger.Verdict:
        if is_lost:
            server.loses["findAndModify"] = times
        if is_lost and times > 1:
            with pytest.raises(StoreError, match=r"the connection was lost.*may safely be asked again"):
                store.transact(op)
        return store.transact(op)

    run = do(asked, is_lost=lost == "claim").row
    assert run is not None
    kind = do(settle(run), is_lost=lost == "settle").kind

    assert "settled" == kind
    assert [(1, "success", asked.token)] == [(r.run, r.status, r.owner) for r in store.rows("c")]


@pytest.mark.parametrize("op", ["claim", "settle"])
def test_without_a_majority_nobody_is_told_that_it_is_done(
    server: StandIn, store: MongoStore, op: str
) -> None:
    """It is an error that is safe to repeat, and the repeat finds what was written after all."""
    no_majority = {"writeConcernError": {"code": 64, "errmsg": "late", "errInfo": {"wtimeout": True}}}
    asked = claim()
    store.check()
    run = granted(store, token=asked.token) if op == "settle" else None
    word: ledger.Op = settle(run) if run else asked
    server.adds["findAndModify"] = no_majority
    with pytest.raises(StoreError, match=r"no majority confirmed it \(WTimeoutError 64.*may safely be asked"):
        store.transact(word)
    server.adds.clear()

    assert ("settled" if run else "granted") == store.transact(word).kind
    assert [("success" if run else "running", asked.token)] == [(r.status, r.owner) for r in store.rows("c")]


def test_connections_that_break_cost_no_call_and_repeat_none(server: StandIn, store: MongoStore) -> None:
    """They are cut at any moment: each of 4 × 25 calls has one effect and one end."""
    guard, effects, over = Guard(store=store, quiet=True), list[int](), threading.Event()
    store.check()

    @guard.once(replay=True)
    def charge(order: int) -> int:
        effects.append(order)
        return order

    def insist(order: int) -> int:
        while True:
            try:
                return charge(order)
            except StoreError:
                pass

    def cut() -> None:
        seen = 0
        while not over.wait(0.001):
            if len(server.heard) > seen + 50:
                seen = len(server.heard)
                server.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    answers = in_parallel(4, lambda n: [insist(100 * n + i) for i in range(25)])
    over.set()
    cutter.join()
    guard.flush()

    asked = sorted(100 * n + i for n in range(4) for i in range(25))
    assert asked == sorted(order for part in answers for order in part) == sorted(effects)
    assert (100, {"success"}) == (guard.stats()["executed"], {record.status.value for record in store.all()})


def test_of_two_inserts_at_once_the_one_that_is_refused_is_asked_again(
    server: StandIn, store: MongoStore
) -> None:
    """MongoDB may refuse one of two upserts; it is not told to the caller unless it goes on for ever."""
    twin = {"ok": 0, "code": 11000, "codeName": "DuplicateKey", "errmsg": "E11000", "keyValue": {"_id": "x"}}
    store.check()
    server.refuses["findAndModify"] = [twin] * 3
    granted(store)
    server.refuses["findAndModify"] = [twin] * 100

    with pytest.raises(StoreError, match="no other index of the collection is unique"):
        store.transact(claim("d"))
    server.refuses.clear()
    assert 1 == sum(1 for _ in store.calls())


# ── time ──────────────────────────────────────────────────────────────────────────────


def test_counts_that_nobody_confirmed_before_a_close_are_counted_once(
    server: StandIn, store: MongoStore
) -> None:
    """They were written, the answers were lost, and they are repeated after the store was opened again."""
    granted(store)
    server.loses = {"findAndModify": 100}
    store.count("blocked", claim(), 1)
    with pytest.raises(StoreError):
        store.flush()
    store.close()
    server.loses = {}
    store.flush()

    assert [1] == [run.blocked for run in store.rows("c")]


def settling(store: MongoStore, run: Run) -> tuple[threading.Thread, list[object]]:
    """A thread that settles a run, and what came of it."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(store.transact(settle(run)).kind)
        except StoreError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def test_a_close_waits_for_what_is_under_way(server: StandIn, store: MongoStore) -> None:
    """A settlement of several commands, one sent twice, ends on the client that is closed after it."""
    run = granted(store)
    other = MongoStore(server.url, namespace="shop")
    other.transact(renew(run))  # so that the first write of the settlement finds another version
    other.close()
    server.loses = {"findAndModify": 1}
    server.answers.clear()
    with server.recording() as heard:
        begun = len(server.heard)
        settler, found = settling(store, run)
        eventually(lambda: len(server.heard) > begun)
        closer = threading.Thread(target=store.close)
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()
        server.answers.set()
        settler.join()
        closer.join()

    assert ["settled"] == found
    names = [next(iter(command)) for command in heard]
    assert ["findAndModify", "findAndModify", "find"] == names[:3]
    assert [len(names) - 1] == [place for place, name in enumerate(names) if name == "endSessions"]


def test_a_close_waits_no_longer_than_an_answer_may_take(server: StandIn) -> None:
    """A server that says nothing does not hold it up for ever; the settlement fails, and is told so."""
    store = MongoStore(server.url, namespace="shop", lock_seconds=1.0)
    run = granted(store)
    server.answers.clear()
    begun = len(server.heard)
    settler, found = settling(store, run)
    eventually(lambda: len(server.heard) > begun)
    store.close()
    settler.join()

    [error] = found
    assert isinstance(error, StoreError)


def test_leases_go_by_the_servers_clock(server: StandIn) -> None:
    """The server's time passes and a run lapses; the caller's, years off and standing, changes nothing."""
    clock = FakeClock()
    server.clock = FakeClock().wall
    store = MongoStore(server.url, namespace="shop", clock=clock)
    run = granted(store)
    clock.advance(10 * 365 * 86_400)
    store.check()
    assert ("live", False) == (store.transact(claim()).kind, store.is_over(run))
    assert abs(run.started - server.clock()) < 60 * SECOND

    passed = FakeClock()
    passed.advance(301)
    server.clock = passed.wall
    store.check()

    assert store.is_over(run)
    assert 2 == granted(store).run
    store.close()


def test_a_lease_lapses_without_anybody_asking_for_the_time(anywhere: MongoStore) -> None:
    """Between two looks at the server's clock it goes on by itself."""
    run = granted(anywhere, lease=200_000)
    assert "live" == anywhere.transact(claim(lease=200_000)).kind
    eventually(lambda: anywhere.is_over(run))

    granted(anywhere)
    assert ["doubt", "running"] == [row.status for row in anywhere.rows("c")]


# ── many callers ──────────────────────────────────────────────────────────────────────


def test_a_forked_child_has_connections_of_its_own(anywhere: MongoStore) -> None:
    """Both sides go on, and what the child does not close stays the parent's."""
    store = anywhere
    run = granted(store)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work() -> None:
        kinds = [store.transact(claim(call)).kind for call in ("c", "d")]
        store.close()
        answers.put(kinds)

    child = context.Process(target=work)
    child.start()

    assert ["live", "granted"] == answers.get()
    child.join(60)
    assert (0, "settled") == (child.exitcode, store.transact(settle(run)).kind)
    assert "live" == store.transact(claim("d")).kind


def test_a_forked_child_leaves_its_parents_connections_alone(server: StandIn) -> None:
    """Each side ends a session of its own, and nothing complains of a client that nobody closed."""
    code = (
        "import os, sys\n"
        "from ledger_stores.mongodb import MongoStore\n"
        "from ledger_stores.testing import claim, granted\n"
        "store = MongoStore(sys.argv[1])\n"
        "granted(store)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    store.transact(claim())\n"
        "    store.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "store.close()\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, server.url]
    with server.recording() as heard:
        done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)
    assert 2 == sum("endSessions" in command for command in heard)


def test_twenty_processes_open_a_new_ledger_at_once(url: str) -> None:
    """One ledger is made; all twenty then share one run."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    gate = context.Barrier(20)
    namespace = fresh_namespace()

    def work() -> None:
        mine = MongoStore(url, namespace=namespace)
        gate.wait(60)
        answers.put((mine.transact(claim()).kind, mine._ledger_id))
        mine.close()

    children = [context.Process(target=work) for _ in range(20)]
    for child in children:
        child.start()
    told = [answers.get() for _ in children]
    for child in children:
        child.join(60)

    assert ["granted", *["live"] * 19] == sorted(kind for kind, _ in told)
    assert 1 == len({name for _, name in told})


def test_namespaces_do_not_meet(anywhere: MongoStore) -> None:
    """Two applications in one database share neither calls nor sums, nor a reset."""
    store, other = anywhere, MongoStore(anywhere.url, namespace=f"{anywhere.namespace}_texts")
    store.transact(settle(granted(store)))

    assert "granted" == other.transact(claim()).kind
    assert [1, 1] == [sum(1 for _ in mine.calls()) for mine in (store, other)]
    store.reset(None, store.clock.wall() + SECOND)
    assert [0, 1] == [sum(1 for _ in mine.calls()) for mine in (store, other)]
    other.close()


def test_the_database_is_that_of_the_url(server: StandIn) -> None:
    """Without a path it is `ledger`."""
    bare = MongoStore(server.url.removesuffix("/shop"))
    bare.check()

    assert "ledger" == server.heard[-1]["$db"]
    assert f"mongodb://{server.address}/ledger" == bare.check()["store"]
    bare.close()


# ── what is stored ────────────────────────────────────────────────────────────────────


def test_another_value_under_one_key_is_a_conflict(anywhere: MongoStore) -> None:
    """`match=` names the parameter that must agree; without it the key decides alone."""
    guard = Guard(store=anywhere, quiet=True)

    @guard.once(key=["order"], match=["amount"], replay=True)
    def charge(order: int, amount: int, note: str = "") -> int:
        return amount

    charge(1, 99)
    assert 99 == charge(1, 99, note="again")
    with pytest.raises(KeyConflict, match="amount"):
        charge(1, 100)


def test_calls_too_large_for_one_answer_are_listed_all_the_same(anywhere: MongoStore) -> None:
    """Documents of 18 MB in all come in more than one answer."""
    results = [json.dumps(chr(97 + n) * 900_000) for n in range(20)]
    for number, result in enumerate(results):
        anywhere.transact(settle(granted(anywhere, call=f"c{number}"), result=result))

    assert results == [rows[0].result for _, rows in anywhere.calls()]


def test_a_reset_forgets_what_was_counted(anywhere: MongoStore) -> None:
    """Runs of an unlimited tool count from nothing again, also by callers that had counted before it."""
    store, other = anywhere, MongoStore(anywhere.url, namespace=anywhere.namespace)
    for mine in (store, other, store):
        mine.count("ran", claim(), 0)
        mine.flush()
    store.reset(None, store.clock.wall())
    assert ([], None) == (list(store.calls()), store.look("c"))

    for mine in (store, other):
        mine.count("raised", claim(), 0, "Boom")
        mine.flush()

    [record] = other.all()
    assert (2, 0, "Boom") == (record.attempts, record.runs, record.error)
    other.close()


# ── what is refused ───────────────────────────────────────────────────────────────────


def charge() -> None:
    """A tool that must not run."""
    raise AssertionError


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_does_not_answer_is_an_error(server: StandIn, listens: bool) -> None:
    """It names host and port and no password, and the tool does not run."""
    server.answers.clear()
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        address = server.address if listens else f"127.0.0.1:{plug.getsockname()[1]}"
        guard = Guard(f"mongodb://ann:hunter2@{address}/shop?authSource=admin", quiet=True, lock_seconds=1)
        with pytest.raises(StoreError, match=rf"ann@{address}/shop: no primary answers within 1 s") as told:
            guard(charge)
    assert "hunter2" not in str(told.value)
    server.answers.set()
    guard.close()


@pytest.mark.slow
def test_a_server_that_stops_answering_is_an_error(server: StandIn) -> None:
    """A command without an answer ends, and its operation may be repeated."""
    store = MongoStore(server.url, namespace="shop", lock_seconds=1)
    asked = claim()
    store.check()
    server.answers.clear()
    with pytest.raises(StoreError, match="see that the servers run and can be reached from here"):
        store.transact(asked)
    server.answers.set()

    assert "granted" == store.transact(asked).kind
    assert 1 == len(store.rows("c"))
    store.close()


def test_a_wrong_password_is_not_shown(server: StandIn) -> None:
    """The account is named, the password is not, and what the server said stays in the cause."""
    server.refuses["saslStart"] = [
        {"ok": 0, "code": 18, "codeName": "AuthenticationFailed", "errmsg": "hunter2 is wrong"}
    ] * 9
    guard = Guard(f"mongodb://ann:hunter2@{server.address}/shop", quiet=True, lock_seconds=1)
    with pytest.raises(
        StoreError, match=r"ann@.*18 AuthenticationFailed\); see that user and password"
    ) as told:
        guard(charge)
    assert "hunter2" not in str(told.value)
    guard.close()


@pytest.mark.parametrize(
    ("code", "name", "advice", "full"),
    [
        (13, "Unauthorized", "let this account read and write", False),
        (14031, "OutOfDiskSpace", "make room", True),
        (2, "BadValue", "see the cause", False),
    ],
)
def test_what_the_server_refuses_is_told_by_its_code(
    server: StandIn, store: MongoStore, code: int, name: str, advice: str, full: bool
) -> None:
    """With what to do; the server's own words may quote arguments and are left to the cause."""
    store.check()
    server.refuses["findAndModify"] = [{"ok": 0, "code": code, "codeName": name, "errmsg": "card no. 4242"}]
    with pytest.raises(StoreError, match=rf"refused \(OperationFailure {code} {name}\); {advice}") as told:
        store.transact(claim())
    assert (full, False) == (told.value.full, "card no." in str(told.value))


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://",
        "mongodb://ann:hunter/2@host/shop",
        "mongodb://ann:hunter?2@host/shop",
        "mongodb://ann:hunter@2@host/shop",
        "mongodb://ann:4242?1@host/shop",
        "mongodb://ann:4242/1@host/shop",
        "mongodb://ann:hunter2",
        "mongodb://ann:hunter2@host:99999/shop",
        "mongodb://host/a b",
    ],
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """Before anything is asked for, and nothing of a password that breaks it is shown."""
    with pytest.raises(UsageError) as told:
        Guard(url, quiet=True)(charge)
    assert not [word for word in ("hunter", "4242") if word in str(told.value)]


def test_a_namespace_that_is_none_is_refused() -> None:
    """It becomes the name of a collection."""
    with pytest.raises(UsageError, match="cannot name a collection"):
        Guard("mongodb://host", namespace="a.texts", quiet=True)(charge)


def test_a_driver_that_is_missing_is_named(tmp_path: Path) -> None:
    """Without pymongo the error says which extra to install, and nothing runs."""
    (tmp_path / "pymongo.py").write_text("raise ModuleNotFoundError('no', name='pymongo')")
    code = "from ledger import Guard\nGuard('mongodb+srv://x/y', quiet=True)(print, 'ran')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)
    assert 'pip install "ledger-guard[mongodb]"' in done.stderr


def test_a_newer_ledger_is_refused(server: StandIn, store: MongoStore) -> None:
    """What a later version wrote is not touched by this one."""
    store.check()
    server.documents("shop").update_one({"_id": "ledger"}, {"$set": {"schema": 99}})
    mine = MongoStore(server.url, namespace="shop")
    with pytest.raises(StoreError, match=r"newer Ledger \(version 99.*nothing ran"):
        mine.transact(claim())
    mine.close()


def test_a_ledger_that_was_emptied_is_an_error(server: StandIn, store: MongoStore) -> None:
    """Who had it open does not begin anew in silence; the next look says so."""
    granted(store)
    server.documents("shop").drop()
    for _ in range(2):
        with pytest.raises(StoreError, match="emptied, or replaced; nothing ran"):
            store.check()
    store.close()

    assert store.check()["ok"]
