"""The store on DynamoDB: conditions instead of locks, time without a clock, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import boto3
import pytest

import ledger
from ledger import Guard, StoreError, UsageError
from ledger_stores.documents import ServerClock, boot_micros
from ledger_stores.dynamodb import DynamoStore
from ledger_stores.testing import (
    SECOND,
    FakeClock,
    claim,
    granted,
    in_parallel,
    release,
    reset,
    resolve,
    settle,
)
from tests.stores.dynamo_kit import dynamo_url, open_dynamo
from tests.stores.servers import fresh_namespace


@pytest.fixture
def store() -> Iterator[DynamoStore]:
    """An empty store in a namespace of its own."""
    made = open_dynamo(None)
    yield made
    made.close()


def table() -> Any:
    """The table behind the stores' backs."""
    options = dict(parse_qsl(urlsplit(dynamo_url()).query))
    there = {"region_name": options.get("region"), "endpoint_url": options.get("endpoint_url")}
    return boto3.session.Session().resource("dynamodb", **there).Table(urlsplit(dynamo_url()).netloc)


def items_of(store: DynamoStore, kind: str) -> list[Any]:
    """All items of a kind in the store's namespace."""
    pages = table().meta.client.get_paginator("scan").paginate(TableName=table().name)
    found = [item for page in pages for item in page["Items"]]
    return [item for item in found if item["id"].startswith(f"{store.namespace}:{kind}")]


def blocked(store: DynamoStore) -> int | None:
    """How many attempts at the call were blocked."""
    found = store.look("c")
    return found and found.blocked


def elsewhere(url: str) -> str:
    """The URL of the tests' table at another address."""
    return f"dynamodb://ledger-tests?region=eu-central-1&endpoint_url={quote(url, safe='')}"


# ── round trips ───────────────────────────────────────────────────────────────────────


def test_two_requests_run_a_call_and_one_answers_a_duplicate(
    store: DynamoStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Claim and settle; a duplicate is a read where the call is known, else the write that is refused."""
    other = DynamoStore(store.url, namespace=store.namespace)
    here, there = (
        (Guard(store=s, quiet=True)).once(replay=True)(lambda order: order) for s in (store, other)
    )
    here(order=0)
    there(order=0)
    for one in (store, other):
        one.flush()
    asked = []

    for charge in (here, here, there):
        with caplog.at_level(logging.DEBUG, "botocore.endpoint"):
            assert 1 == charge(order=1)
        # counts are written in the background, whenever it is time
        mine = [r for r in caplog.records if r.thread == threading.get_ident()]
        sent = [r.args for r in mine if "Making request" in r.msg]
        asked.append([str(values).partition("name=")[2].partition(")")[0] for values in sent])
        caplog.clear()

    assert [["PutItem", "UpdateItem"], ["GetItem"], ["PutItem"]] == asked
    other.close()


# ── time ──────────────────────────────────────────────────────────────────────────────


def test_the_clock_of_a_caller_decides_nothing() -> None:
    """A caller whose clock is a day ahead or behind gets the same leases, ages and resets."""
    for days in (-1, 1):
        right, wrong = ledger.Clock(), FakeClock()
        wrong.step_wall(right.wall() / SECOND - wrong.wall() / SECOND + days * 86_400)
        store = DynamoStore(dynamo_url(), namespace=fresh_namespace(), clock=wrong)
        run = granted(store)

        assert abs(run.started - right.wall()) < 60 * SECOND
        assert "live" == store.transact(claim()).kind
        store.transact(settle(run))
        assert "done" == store.transact(claim(ttl=60 * SECOND)).kind
        store.reset("w", wrong.wall())
        assert [] == store.rows("c")
        store.close()


@pytest.mark.parametrize("seed", range(20))
def test_the_estimate_of_the_servers_clock_is_never_ahead(seed: int) -> None:
    """It is behind by the resolution and a trip at most, however long answers take."""
    chance = random.Random(seed)
    clock = ServerClock(SECOND)
    ahead = chance.randrange(-(10**15), 10**15)  # what the server's clock says beyond ours
    ours = 10**12
    for _ in range(50):
        asked = ours
        there = chance.randrange(1, 200_000)
        ours += there + (back := chance.randrange(1, 200_000))
        clock.learn((asked + there + ahead) // SECOND * SECOND, asked, ours)

        error = ahead + ours - clock.at(ours)

        assert 0 <= error <= SECOND + back
        ours += chance.randrange(0, 5 * SECOND)


def test_a_server_whose_clock_is_set_is_followed() -> None:
    """Answers that contradict what was known replace it."""
    clock = ServerClock(1000)
    for step in (0, 3600 * SECOND, -3600 * SECOND):
        ours = boot_micros()
        clock.learn(ours + step, ours, ours)

        assert abs(clock.now() - boot_micros() - step) < SECOND


# ── what is written ───────────────────────────────────────────────────────────────────


def test_a_call_keeps_its_own_log() -> None:
    """Claims, ends, late ends, releases and answers of one call, in order, and the reset after them."""
    clock = FakeClock()
    store = open_dynamo(clock)
    first = granted(store)
    clock.advance(301)
    second = granted(store)
    store.transact(settle(first))
    store.transact(settle(second, "failed"))
    store.transact(release(second))
    third = granted(store, max=2)
    store.transact(settle(third, "doubt"))
    store.transact(resolve(third, done=True))
    store.transact(reset(clock.wall()))

    events = list(store.events_of("c"))

    kinds = "claimed doubt claimed late failed released claimed doubt resolved reset"
    assert kinds.split() == [event["kind"] for event in events]
    assert list(range(1, 11)) == [event["seq"] for event in events]
    store.close()


def test_what_is_too_long_for_an_item_lies_beside_it_and_goes_with_it(store: DynamoStore) -> None:
    """Arguments and results of a megabyte come back whole; a reset leaves nothing of them behind."""
    long = {name: random.Random(name).randbytes(500_000).hex() for name in ("args", "result")}
    run = granted(store, args=long["args"])
    store.transact(settle(run, result=long["result"]))

    [row] = store.rows("c")

    assert long == {"args": row.args, "result": row.result}
    again = store.transact(claim()).row
    assert long["result"] == (again and again.result)
    assert 6 == len(items_of(store, "text"))
    store.reset("w", store.clock.wall() + SECOND)
    assert [] == items_of(store, "text")


def test_a_call_that_failed_hundreds_of_times_still_fits(store: DynamoStore) -> None:
    """Old runs that decide nothing are given up when an item is full; a success among them is not."""
    store.transact(settle(granted(store, max=2), result="1"))
    for _ in range(60):
        run = granted(store, max=2, args="x" * 3000)
        store.transact(ledger.Settle(claim(token=run.owner), run.run, "failed", None, "e", "t" * 3000))

    rows = store.rows("c")

    assert [(1, "success", "1"), (61, "failed", None)] == [
        (r.run, r.status, r.result) for r in (rows[0], rows[-1])
    ]
    store.transact(settle(granted(store, max=2)))
    assert "done" == store.transact(claim(max=2)).kind


def test_counts_of_a_batch_that_is_written_twice_count_once(store: DynamoStore) -> None:
    """Each writer has a number of its own; what was forgotten by a reset is not counted again."""
    asked = claim()
    run = granted(store, token=asked.token)
    for _ in range(3):
        store.count("blocked", asked, 1)
    store.flush()
    other = DynamoStore(store.url, namespace=store.namespace)
    other.count("blocked", asked, 1)
    other.close()
    assert 4 == blocked(store)

    store.transact(settle(run))
    store.reset("w", store.clock.wall() + SECOND)
    granted(store)
    store.count("blocked", asked, 1)
    store.flush()

    assert 1 == blocked(store)


def test_the_counts_of_old_writers_are_added_up() -> None:
    """A call that many processes were blocked by has one number of those of long ago, and loses none."""
    clock = FakeClock()
    store = open_dynamo(clock)
    granted(store, lease=10**12)
    for number in range(60):
        if number == 30:
            clock.advance(26 * 3600)
        store.count("blocked", claim(), 1)
        store.close()  # whoever opens it again is another writer

    [found] = store.found("call", ["c"]).values()
    assert 30 == len([field for field in found if field.startswith("blocked_at")])
    assert (30, 60) == (found["blocked_over"], blocked(store))
    store.close()


def test_a_count_that_cannot_be_written_holds_up_no_other(
    store: DynamoStore, caplog: pytest.LogCaptureFixture
) -> None:
    """An unlimited tool with half a megabyte of arguments: its call is not counted, and that is said."""
    granted(store)
    store.count("ran", claim("large", args="x" * 500_000), 0)
    for _ in range(3):
        store.count("blocked", claim(), 1)
    store.flush()

    assert 3 == blocked(store)
    assert "(call large) are not counted" in caplog.text
    assert store.look("large") is None


def test_a_workflow_is_listed_by_itself_and_in_order(store: DynamoStore) -> None:
    """Calls come oldest first, whatever part of the index they are in."""
    for number in range(30):
        granted(store, call=f"c{number}", wf="odd" if number % 2 else "even")

    assert [f"c{n}" for n in range(30)] == [record.call for record, _ in store.calls()]
    assert [f"c{n}" for n in range(1, 30, 2)] == [record.call for record, _ in store.calls(wf="odd")]


def test_a_lease_is_longer_by_what_the_clock_may_be_behind(store: DynamoStore) -> None:
    """So that an owner with a short timeout is not given up while it renews."""
    run = granted(store, lease=SECOND)

    assert 2 * SECOND == run.lease - run.started
    assert "live" == store.transact(claim()).kind


class Lossy(DynamoStore):
    """The answer to a change is lost, somebody else comes, and the driver sends it once more."""

    meddle: Any = None

    def _swap(self, name: str, version: str, fields: Any) -> Any:
        found = super()._swap(name, version, fields)
        meddle, self.meddle = self.meddle, None
        if meddle is None:
            return found
        meddle()
        return super()._swap(name, version, fields)


def test_a_long_result_outlives_the_answer_that_told_of_it(store: DynamoStore) -> None:
    """It was written although that is not known, and who came next carries it along."""
    mine = Lossy(store.url, namespace=store.namespace)
    run = granted(mine, max=2)
    mine.meddle = lambda: granted(store, max=2)

    assert "settled" == mine.transact(settle(run, result="x" * 500_000)).kind
    assert [500_000, None] == [row.result and len(row.result) for row in store.rows("c")]
    mine.close()


def test_a_ledger_that_is_opened_anew_counts_anew(store: DynamoStore) -> None:
    """What was counted of one that was emptied since does not come back."""
    asked = claim()
    granted(store)
    for _ in range(3):
        store.count("blocked", asked, 1)
    store.flush()
    for item in items_of(store, ""):
        table().delete_item(Key={"id": item["id"]})
    store.close()

    granted(store)
    store.count("blocked", asked, 1)
    store.flush()

    assert 1 == blocked(store)


# ── many callers ──────────────────────────────────────────────────────────────────────


def test_forty_threads_succeed_twice_under_max_two(store: DynamoStore) -> None:
    """Who loses a condition decides anew on what stands there then."""

    def work(_: int) -> str:
        verdict = store.transact(claim(max=2))
        if verdict.kind == "granted" and verdict.row:
            store.transact(settle(verdict.row))
        return verdict.kind

    kinds = [kind for _ in range(3) for kind in in_parallel(40, work)]

    assert 2 == kinds.count("granted")
    assert ["success", "success"] == [run.status for run in store.rows("c")]


def test_tasks_that_wait_get_the_first_ones_result(store: DynamoStore) -> None:
    """One task runs the tool; the others are woken by one poller, and the loop goes on meanwhile."""
    guard = Guard(store=store, quiet=True)
    runs: list[int] = []

    @guard.once(replay=True, wait=30)
    async def charge(order: int) -> int:
        runs.append(order)
        await asyncio.sleep(0.3)
        return order

    async def main() -> tuple[list[int], int]:
        ticks = 0
        asked = asyncio.gather(*(charge(7) for _ in range(10)))
        while not asked.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return await asked, ticks

    answers, ticks = asyncio.run(main())

    assert ([7], [7] * 10) == (runs, answers)
    assert ticks > 10


def test_a_forked_child_has_connections_of_its_own(store: DynamoStore) -> None:
    """The child sees what the parent did, and the parent goes on."""
    run = granted(store)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(store.transact(claim()).kind))
    child.start()

    assert "live" == answers.get()
    child.join(60)
    assert "settled" == store.transact(settle(run)).kind


def test_twenty_processes_open_a_new_table_at_once() -> None:
    """The table is made once; all twenty then share one run."""
    url = dynamo_url().replace("ledger-tests", f"made-{fresh_namespace()}")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    gate = context.Barrier(20)

    def work() -> None:
        mine = DynamoStore(url)
        gate.wait(60)
        answers.put(mine.transact(claim()).kind)
        mine.close()

    children = [context.Process(target=work) for _ in range(20)]
    for child in children:
        child.start()
    kinds = sorted(answers.get() for _ in children)
    for child in children:
        child.join(60)

    assert ["granted", *["live"] * 19] == kinds


# ── what is refused ───────────────────────────────────────────────────────────────────


def charge() -> None:
    """A tool that must not run."""
    raise AssertionError


@pytest.mark.parametrize(
    "url",
    [
        "dynamodb://AKIA:SeCrEt@orders?region=eu-central-1",
        "dynamodb://orders?region=eu-central-1&aws_secret_access_key=SeCrEt",
        elsewhere("http://me:SeCrEt@127.0.0.1:1"),
    ],
)
def test_a_secret_in_a_url_is_not_shown(url: str) -> None:
    """Wherever it was put: keys have no place there."""
    with pytest.raises((UsageError, StoreError)) as told:
        Guard(url, quiet=True)(charge)

    assert "SeCrEt" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("dynamodb://", "names no table"),
        ("dynamodb://a?region=eu-central-1", "names no table"),
        ("dynamodb://orders?zone=1", "zone is no option"),
        (elsewhere("nonsense"), "cannot be used"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, why: str) -> None:
    """Before anything is asked for."""
    with pytest.raises(UsageError, match=why):
        Guard(url, quiet=True)(charge)


def test_a_region_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where neither the URL nor the environment names one."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="which region"):
        Guard("dynamodb://orders", quiet=True)(charge)


def test_a_server_that_does_not_answer_is_an_error() -> None:
    """It names the address, and the tool does not run."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{plug.getsockname()[1]}"
        guard = Guard(elsewhere(url), quiet=True)
        with pytest.raises(StoreError, match=rf"{url}.*see that the endpoint answers"):
            guard(charge)


def test_a_table_of_somebody_else_is_left_alone(store: DynamoStore) -> None:
    """Another key than ours: nothing is written into it."""
    store.check()
    client = table().meta.client
    name = f"other-{fresh_namespace()}"
    client.create_table(
        TableName=name,
        BillingMode="PAY_PER_REQUEST",
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
    )
    with pytest.raises(StoreError, match="has other keys"):
        Guard(dynamo_url().replace("ledger-tests", name), quiet=True)(charge)
    assert [] == client.scan(TableName=name)["Items"]


def test_a_newer_ledger_is_refused(store: DynamoStore) -> None:
    """What a later version wrote is not touched by this one."""
    store.check()
    key = {"id": f"{store.namespace}:ledger"}
    table().update_item(
        Key=key,
        UpdateExpression="SET #s = :v",
        ExpressionAttributeNames={"#s": "schema"},
        ExpressionAttributeValues={":v": 99},
    )
    mine = DynamoStore(store.url, namespace=store.namespace)
    with pytest.raises(StoreError, match=r"newer Ledger.*nothing ran"):
        mine.transact(claim())


def test_a_ledger_that_was_emptied_is_an_error(store: DynamoStore) -> None:
    """Who had it open does not begin anew in silence; the next look says so."""
    granted(store)
    table().delete_item(Key={"id": f"{store.namespace}:ledger"})
    with pytest.raises(StoreError, match="emptied, or replaced; nothing ran"):
        store.check()
    with pytest.raises(StoreError, match="emptied, or replaced; nothing ran"):
        store.transact(claim("d"))
    store.close()
    assert store.check()["ok"]


def test_a_table_that_is_gone_is_an_error(store: DynamoStore) -> None:
    """It is not made again behind the back of whoever had it open."""
    name = f"gone-{fresh_namespace()}"
    mine = DynamoStore(store.url.replace("ledger-tests", name))
    granted(mine)
    table().meta.client.delete_table(TableName=name)
    with pytest.raises(StoreError, match="was removed"):
        mine.transact(claim("d"))
    assert name not in table().meta.client.list_tables()["TableNames"]


def test_wrong_credentials_do_not_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where there are none the error says how to give them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="give credentials, as AWS_ACCESS_KEY_ID"):
        Guard(dynamo_url(), namespace=fresh_namespace(), quiet=True)(charge)
    assert os.environ.get("AWS_ACCESS_KEY_ID") is None


class Behind(DynamoStore):
    """The store on a table whose indexes have not heard of anything yet, as happens on the real one."""

    def _indexed(self, kind: str, scope: str | None, after: str) -> Iterator[tuple[str, str]]:  # noqa: ARG002 - whatever is asked for
        return iter(())


def test_an_index_that_is_behind_hides_nothing_from_who_wrote_it() -> None:
    """Lists, sums and a reset see at once what their own process did, once the index has it too."""
    mine = Behind(dynamo_url(), namespace=fresh_namespace())
    for number in range(3):
        mine.transact(settle(granted(mine, call=f"c{number}", wf=f"w{number % 2}")))
    theirs = DynamoStore(mine.url, namespace=mine.namespace)

    assert ["c0", "c1", "c2"] == [record.call for record, _ in mine.calls()]
    assert ["c0", "c2"] == [record.call for record, _ in mine.calls(wf="w0")]
    mine.reset("w0", mine.clock.wall() + SECOND)

    assert ["c1"] == [record.call for record, _ in theirs.calls()]
    mine.close()
    theirs.close()
