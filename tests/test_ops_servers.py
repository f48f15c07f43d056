"""What people see is the same on every store: a file, PostgreSQL, and Redis, which is read without SQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard
from ledger_ops import acts
from ledger_ops.brief import brief
from ledger_ops.reader import NoSuchCall, Reader, open_ledger, reader_of
from ledger_ops.rollup import Rollup
from ledger_ops.transfer import export
from ledger_ops.values import STATES, Event, Filter, state_of
from tests.stores.dynamo_kit import dynamo_url
from tests.stores.mongo_kit import stand_in
from tests.stores.redis_kit import redis_url
from tests.stores.servers import fresh_namespace, postgres_url

KINDS = ("postgres", "redis", "dynamodb", "mongodb")
HELD: list[BaseException] = []
WANTED = [
    Filter(), Filter(tool="charge"), Filter(tool="look_up"), Filter(wf="w1"), Filter(caller="agent-1"),
    Filter(search="bob"), Filter(search="é"), Filter(wf="nobody"), *(Filter(status=s) for s in STATES),
]  # fmt: skip


def charge(order: int, note: str = "") -> dict[str, int]:
    """A tool that works, unless the test says otherwise."""
    if HELD:
        raise HELD.pop()
    return {"order": order}


def send_email(to: str) -> None:
    """A tool that fails."""
    raise ConnectionError(f"no route to {to}")


def look_up(word: str) -> str:
    """A tool without limits."""
    return word


def tell_a_story(guard: Guard) -> None:
    """Calls of every end."""
    guard.policy(look_up, unlimited=True)
    for number in range(6):
        with guard.workflow(f"w{number % 3}"), guard.as_caller(f"agent-{number % 2}"):
            guard(charge, number, note="café" if number == 4 else "")
            guard(charge, number, note="café" if number == 4 else "")
    with guard.as_caller("me"):
        for name in ("ann", "bob", "bob"):
            with pytest.raises(ConnectionError):
                guard(send_email, name)
        for order in (77, 78):
            HELD.append(KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                guard(charge, order)
        guard.retry(charge, 78)
        guard.retry(charge, 5)
        guard(look_up, "x")
        guard(look_up, "x")
    guard.flush()


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    """The same story on each store, and what looks at it."""
    urls = {
        "sqlite": str(tmp_path_factory.mktemp("ops") / "ledger.db"),
        "postgres": postgres_url(),
        "redis": redis_url(),
        "dynamodb": dynamo_url(),
        "mongodb": stand_in().url,
    }
    found: dict[str, Reader] = {}
    guards = []
    for kind, url in urls.items():
        namespace = None if kind == "sqlite" else fresh_namespace()
        guard = Guard(url, namespace=namespace, quiet=True)
        tell_a_story(guard)
        guards.append(guard)
        store: Any = guard._ready()
        found[kind] = reader_of(store)
    yield found
    for guard in guards:
        guard.close()


def told(reader: Reader, wanted: Filter, limit: int) -> list[Any]:
    """What a list shows, page by page, but for times and names of processes."""
    found, page = [], reader.calls(wanted, limit=limit)
    while True:
        assert len(page.records) <= limit
        found += page.records
        if page.cursor is None:
            break
        page = reader.calls(wanted, limit=limit, cursor=page.cursor)
    return [
        (r.call, r.short, r.wf, state_of(r), r.args, r.result, r.error, r.attempts, r.blocked, r.released)
        for r in found
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_every_list_and_sum_is_that_of_a_file(readers: dict[str, Reader], kind: str, wanted: Filter) -> None:
    """Pages of any size, counts, sums and events under a filter are what SQLite shows of the same story."""
    file, server = readers["sqlite"], readers[kind]

    for limit in (2, 100):
        assert told(file, wanted, limit) == told(server, wanted, limit)
    assert file.count(wanted) == server.count(wanted) == len(told(server, wanted, 100))
    assert file.stats(wanted) == server.stats(wanted)
    assert [r.call for r in file.stream(wanted)] == [r.call for r in server.stream(wanted)]
    assert {r.call for r in file.from_the_oldest(wanted)} == {r.call for r in server.from_the_oldest(wanted)}
    assert (shape(file.events(wanted=wanted)) if server.has_log else []) == shape(
        server.events(wanted=wanted)
    )
    for limit in (3, 1000):
        assert server.last_events(limit, wanted) == server.look_back(limit, wanted).events
        assert server.events(wanted=wanted)[-limit:] == server.last_events(limit, wanted)
        assert server.events(0, wanted, limit=limit) == server.look_on(0, wanted, limit=limit).events


def shape(events: list[Event]) -> list[Any]:
    """What events say, but for numbers, times and processes; blocked ones are written in no order."""
    plain = [(e.call, e.run, e.kind, e.tool, e.wf, e.n) for e in events]
    return [p for p in plain if p[2] != "blocked"] + sorted(p for p in plain if p[2] == "blocked")


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_doubts_and_texts_are_those_of_a_file(readers: dict[str, Reader], kind: str) -> None:
    """A call by its beginning with its verdict, doubts by pages, the brief, an export and a roll-up."""
    file, server = readers["sqlite"], readers[kind]
    for record in file.stream():
        ours, theirs = file.call(record.call[:16]), server.call(record.call[:16])
        counted = [] if server.has_log else ["blocked", "ran"]  # else they are numbers, and no events
        assert [e for e in shape(ours.events) if e[2] not in counted] == shape(theirs.events)
        assert ours.verdict.partition(" at ")[0] == theirs.verdict.partition(" at ")[0]
        assert [(r.run, r.status, r.error) for r in ours.runs] == [
            (r.run, r.status, r.error) for r in theirs.runs
        ]
    with pytest.raises(NoSuchCall):
        server.call("f" * 30)

    first = server.doubts(limit=1)
    assert [r.call for r in file.doubts()] == [r.call for r in server.doubts()]
    assert [] == server.doubts(after=(first[-1].started, first[-1].call))
    assert [] == server.running()
    assert [] == server.gaps()
    assert len(brief(file)) == len(brief(server))
    lines = [json.loads(line) for line in export(server)]
    assert {r.call for r in server.stream()} == {line["call"] for line in lines if "call" in line}
    if not server.has_log:
        return  # nothing to roll up
    with closing(Rollup(server)) as rollup, closing(Rollup(file)) as ours_over_time:
        assert rollup.advance(10)
        assert ours_over_time.advance(10)
        assert [row[:4] for row in ours_over_time.tools()] == [row[:4] for row in rollup.tools()]
        assert {row[:5] for row in ours_over_time.workflows()} == {row[:5] for row in rollup.workflows()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_opened_by_its_url_and_acted_on(kind: str, tmp_path: Path) -> None:
    """Clear, retry and resolve do on a server what they do on a file."""
    urls = {"postgres": postgres_url, "redis": redis_url, "dynamodb": dynamo_url}
    url = stand_in().url if kind == "mongodb" else urls[kind]()
    guard = Guard(url, namespace=fresh_namespace(), quiet=True)
    guard(charge, 1)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(charge, 2)
    store: Any = guard._ready()
    done, doubt = (next(e["call"] for e in guard.history() if e["args"]["order"] == n) for n in (1, 2))

    assert acts.retry(store, done, actor="ann").released
    assert "success" == acts.resolve(store, doubt, done=True, actor="ann", result_json='"told"').status
    assert "executed" == guard.call(charge, 1).kind
    assert 2 == acts.clear(store, actor="ann")
    events = list(store.events() if reader_of(store).has_log else store.events_of(done))
    assert "clear by ann" == events[-1]["detail"]
    assert 0 == guard.stats()["actions"]
    guard.close()
    with closing(open_ledger(url)) as opened:
        assert opened.check()["ok"]
