"""Looking at a ledger: pages, filters, one call, events and sums, against a plain recount."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, MemoryStore, StoreError, UsageError
from ledger_ops.reader import NoLedger, NoSuchCall, Reader, open_store
from ledger_ops.values import STATES, Filter, parse_span, parse_time, printable, state_of
from ledger_stores.testing import claim, granted, settle
from tests.actors import Stage, stage

HELD: list[BaseException] = []


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


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a file, after a day of all sorts of calls."""
    made = Guard(tmp_path / "ledger.db", quiet=True)
    made.policy(look_up, unlimited=True)
    for number in range(12):
        with made.workflow(f"w{number % 3}"), made.as_caller(f"agent-{number % 2}"):
            made(charge, number, note="100% _odd_" if number == 4 else "")
            made(charge, number, note="100% _odd_" if number == 4 else "")
    for name in ("ann", "bob"):
        for _ in range(2):
            with pytest.raises(ConnectionError):
                made(send_email, name)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        made(charge, 77)
    made(look_up, "x")
    made(look_up, "y")
    made.flush()
    yield made
    made.close()


@pytest.fixture
def reader(guard: Guard, tmp_path: Path) -> Iterator[Reader]:
    """What looks at that file, as another process would."""
    with closing(open_store(tmp_path / "ledger.db")) as store:
        yield Reader(store)


def test_pages_hold_every_call_once_newest_first(guard: Guard, reader: Reader) -> None:
    """Whatever the size of the pages, together they are all calls, and unlimited ones come last."""
    whole = [r.call for r in reader.stream()]

    for limit in (1, 4, 100):
        paged, cursor = [], None
        while True:
            page = reader.calls(limit=limit, cursor=cursor)
            assert len(page.records) <= limit
            paged += page.records
            cursor = page.cursor
            if cursor is None:
                break
        assert whole == [r.call for r in paged]

    assert sorted(e["call"] for e in guard.history()) == sorted(whole)
    started = [r.started for r in reader.stream() if r.run]
    assert sorted(started, reverse=True) == started
    assert [0, 0] == [r.run for r in reader.stream()][-2:]


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        (Filter(tool="charge"), lambda e: e["tool"].endswith(".charge")),
        (Filter(tool="look_up"), lambda e: e["tool"].endswith(".look_up")),
        (Filter(wf="w1"), lambda e: e["wf"] == "w1"),
        (Filter(caller="agent-1"), lambda e: e["caller"] == "agent-1"),
        (Filter(status="failed"), lambda e: e["status"] == "failed"),
        (Filter(status="in_doubt"), lambda e: e["status"] == "doubt"),
        (Filter(status="running"), lambda e: e["status"] == "running"),
        (Filter(status="success", tool="charge"), lambda e: e["executed"] and "charge" in e["tool"]),
        (Filter(search="no route to bob"), lambda e: "bob" in (e["error"] or "")),
        (Filter(search="0% _o"), lambda e: "100%" in e["args"].get("note", "")),
        (Filter(search="%"), lambda e: "100%" in e["args"].get("note", "")),
        (Filter(search="nothing has this"), lambda _: False),
    ],
)
def test_a_filter_finds_what_a_recount_finds(
    guard: Guard, reader: Reader, wanted: Filter, holds: Any
) -> None:
    """Lists, counts and sums under a filter agree with the history, gone through by hand."""
    found = [e for e in guard.history() if holds(e)]

    assert sorted(e["call"] for e in found) == sorted(r.call for r in reader.stream(wanted))
    assert len(found) == reader.count(wanted)
    sums = reader.stats(wanted).total
    if wanted.status is None:
        assert len(found) == sums.actions
        assert sum(e["attempts"] for e in found) == sums.attempts
        assert sum(e["executed"] for e in found) == sums.executed
        assert sum(e["blocked"] for e in found) == sums.blocked


def test_times_bound_the_list(guard: Guard, reader: Reader) -> None:
    """The bounds name when the latest run started; the end is open."""
    runs = [r for r in reader.stream() if r.run]
    middle = runs[5].started

    later = [r.call for r in reader.calls(Filter(since=middle, tool="charge")).records]
    earlier = [r.call for r in reader.calls(Filter(until=middle, tool="charge")).records]

    assert [r.call for r in runs if r.started >= middle and r.short == "charge"] == later
    assert [r.call for r in runs if r.started < middle and r.short == "charge"] == earlier


def test_sums_without_a_filter_are_those_of_the_guard(guard: Guard, reader: Reader) -> None:
    """The reader tells what guard.stats() tells."""
    told = guard.stats()

    found = reader.stats()

    assert {n: told[n] for n in told if n != "tools"} == {
        n: v for n, v in found.total.to_dict().items() if n != "duplicate_rate"
    }
    assert sorted(told["tools"]) == list(found.tools)
    assert found.total.blocked / found.total.attempts == found.total.duplicate_rate


def test_a_short_time_gives_a_short_page_that_goes_on(reader: Reader, tmp_path: Path) -> None:
    """A search that ran out of time says how far it got; its cursors find all there is."""
    rows = reader.store.browse("SELECT * FROM runs WHERE run = 1 LIMIT 1")[0]
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as db, db:
        db.executemany(
            f"INSERT INTO runs VALUES ({', '.join('?' * len(rows))})",
            ((None, f"{n:032x}", *rows[2:]) for n in range(20_000)),
        )
    wanted = Filter(search="no route")

    page = reader.calls(wanted, seconds=0)
    found, short = list(page.records), 0
    while page.cursor is not None:
        short += not page.complete
        assert page.complete or page.reached is not None
        page = reader.calls(wanted, seconds=0, cursor=page.cursor)
        found += page.records

    assert short > 0
    assert reader.count(wanted) == len(found) == 2


def test_a_call_is_found_by_a_unique_beginning(reader: Reader) -> None:
    """A prefix is enough if it is unique; else the error says what to do."""
    calls = sorted(r.call for r in reader.stream())

    assert calls[0] == reader.find(calls[0][:12].upper())
    for bad, why in (("", "no fingerprint"), ("xyz", "no fingerprint"), ("f" * 32, "no call begins")):
        with pytest.raises(NoSuchCall, match=why):
            reader.find(bad)
    first = next(c[0] for c in calls if sum(o[0] == c[0] for o in calls) > 1)
    with pytest.raises(NoSuchCall, match="several calls begin"):
        reader.find(first)


def test_a_call_shows_runs_events_and_what_comes_next(reader: Reader) -> None:
    """Each attempt is there: runs that failed and the one that was blocked, with the verdict on the next."""
    done = reader.call(reader.calls(Filter(wf="w1", tool="charge")).records[0].call)
    failed = reader.call(reader.calls(Filter(search="bob")).records[0].call)
    doubt = reader.call(reader.calls(Filter(status="in_doubt")).records[0].call)
    free = reader.call(reader.calls(Filter(tool="look_up")).records[0].call)

    assert ["claimed", "success", "blocked"] == [e.kind for e in done.events]
    assert ["claimed", "failed"] * 2 == [e.kind for e in failed.events]
    assert [1, 2] == [run.run for run in failed.runs]
    assert done.verdict.startswith("would be blocked: run 1 succeeded at ")
    assert "would run: run 2 failed" == failed.verdict
    assert doubt.verdict.startswith("would run again, because run 1 ended without a known outcome")
    assert free.verdict.startswith("would run: its tool is unlimited")
    assert {"call", "history", "events", "verdict", "args"} <= done.to_dict().keys()


def test_who_is_killed_is_in_doubt_and_who_lives_runs(tmp_path: Path) -> None:
    """doubts() has the call of a killed process, running() that of a living one; their verdicts differ."""
    script = "def charge(n):\n    say('in')\n    hear()\nguard(charge, int(sys.argv[2]))"
    with stage(tmp_path) as crew, closing(open_after(crew, script)) as store:
        reader = Reader(store)

        [doubt], [running] = reader.doubts(), reader.running()

        assert {"n": 1} == doubt.args
        assert {"n": 2} == running.args
        assert ("in_doubt", "running") == (state_of(doubt), state_of(running))
        assert [doubt.call] == [r.call for r in reader.calls(Filter(status="in_doubt")).records]
        assert [running.call] == [r.call for r in reader.calls(Filter(status="running")).records]
        assert (1, 1) == (reader.stats().total.in_doubt, reader.stats(Filter(wf="default")).total.running)
        assert "would be blocked: run 1 is running in pid " in reader.call(running.call).verdict


def open_after(crew: Stage, script: str) -> Any:
    """The ledger of two processes in a tool, one of which was killed there."""
    killed, alive = crew.start(script, 1), crew.start(script, 2)
    assert "in" == killed.line() == alive.line()
    killed.kill()
    return open_store(crew.db)


def test_events_are_read_by_sequence(reader: Reader) -> None:
    """Events after a number come oldest first, the newest ones are the end of all."""
    every = reader.events(limit=10_000)

    assert [e.seq for e in every] == sorted(e.seq for e in every)
    assert every[-1].seq == reader.last_seq()
    assert every[5:8] == reader.events(every[4].seq, limit=3)
    assert every[-4:] == reader.last_events(4)
    wanted = Filter(wf="w2", status="success")
    assert [e for e in every if (e.wf, e.kind) == ("w2", "success")] == reader.events(wanted=wanted)


def test_reading_holds_no_transaction(guard: Guard, reader: Reader, tmp_path: Path) -> None:
    """After every kind of look the whole write-ahead log can be taken back."""
    reader.call(reader.calls().records[0].call)
    reader.stats()
    reader.stats(Filter(wf="w1"))
    reader.doubts()
    next(reader.stream())
    guard(charge, 1000)

    with closing(sqlite3.connect(tmp_path / "ledger.db")) as db:
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    assert 0 == busy


def test_looking_never_makes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without a ledger is an error that says what to do, and stays without one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEDGER_DB", raising=False)
    for name in (None, "other.db", "sqlite:///none.db", str(tmp_path)):
        with pytest.raises(NoLedger, match="name the file"):
            open_store(name)
    assert [] == list(tmp_path.iterdir())


def test_what_is_no_ledger_is_named_as_such(tmp_path: Path) -> None:
    """An empty file, a text, another program's database and other addresses are refused."""
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("hello " * 1000)
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE songs (name)")

    with pytest.raises(NoLedger, match="is empty: no guarded tool has run"):
        open_store(tmp_path / "empty.db")
    with pytest.raises(StoreError, match="no SQLite database"):
        open_store(tmp_path / "text.db")
    with pytest.raises(StoreError, match="database of another program"):
        open_store(tmp_path / "other.db")
    for url, why in (("memory://", "own process"), ("mysql://x/y", "is no file")):
        with pytest.raises(UsageError, match=why):
            open_store(url)
    assert 0 == (tmp_path / "empty.db").stat().st_size


def test_bad_filters_and_cursors_are_refused(reader: Reader) -> None:
    """A misspelt status, swapped times and a made-up cursor are errors."""
    with pytest.raises(UsageError, match="no status"):
        Filter(status="done")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="swap them"):
        Filter(since=2, until=1)
    for cursor in ("x", "r", "rx", "t'", "r" + "9" * 30):
        with pytest.raises(UsageError, match="no cursor"):
            reader.calls(cursor=cursor)


def test_spans_and_times_are_read_as_people_write_them() -> None:
    """2h is two hours ago, a date is that day here; what is neither is refused."""
    assert 90_000_000 == parse_span("1m30s")
    assert 30 * 86_400_000_000 == parse_span("30d")
    assert 10_000_000 - 2_000_000 == parse_time("2s", now=10_000_000)
    assert 1_000_000 == parse_time("1970-01-01T00:00:01+00:00")
    assert round(time.mktime((2026, 5, 1, 0, 0, 0, 0, 0, -1)) * 1e6) == parse_time("2026-05-01")
    for bad in ("", "soon", "5x", "h"):
        with pytest.raises(UsageError, match="write"):
            parse_time(bad)
    with pytest.raises(UsageError, match="no span"):
        parse_span("2h?")


def test_text_of_others_moves_no_cursor() -> None:
    """Escapes, line ends, direction marks and lone surrogates are shown, not sent."""
    assert "\\x1b[2J" == printable("\x1b[2J")
    assert "a\\nb\\tc\\r" == printable("a\nb\tc\r")
    assert "a\nb" == printable("a\nb", lines=True)
    assert "\\u202e\\udc80\\x9b" == printable("\u202e\udc80\x9b")
    assert "é 漢 🙂" == printable("é 漢 🙂")


def test_a_memory_store_can_be_looked_at_in_its_process() -> None:
    """The reader works on a store that is given to it, without a file."""
    store = MemoryStore()
    Guard(store=store, quiet=True)(look_up, "x")

    assert ["look_up"] == [r.short for r in Reader(store).calls().records]
    assert 1 == Reader(store).stats().total.executed


def test_a_ledger_that_cannot_be_written_can_be_read(guard: Guard, tmp_path: Path) -> None:
    """A read-only copy in a read-only folder is shown."""
    folder = tmp_path / "kept"
    folder.mkdir()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as db:
        db.execute("VACUUM INTO ?", (str(folder / "copy.db"),))
    (folder / "copy.db").chmod(0o400)
    folder.chmod(0o500)
    try:
        with closing(open_store(folder / "copy.db")) as store:
            assert guard.stats()["actions"] == Reader(store).stats().total.actions
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
def test_pages_of_what_rows_do_not_tell_skip_nothing(guard: Guard, reader: Reader, limit: int) -> None:
    """Live runs between doubts do not hide them, whatever the size of the pages."""
    for order in range(100, 104):
        HELD.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            guard(charge, order)
        reader.store.transact(claim(f"{order:032x}", wf="live"))
    wanted = Filter(status="in_doubt")

    found, page = [], reader.calls(wanted, limit=limit)
    while True:
        found += [r.args["order"] for r in page.records]
        if page.cursor is None:
            break
        page = reader.calls(wanted, limit=limit, cursor=page.cursor)

    assert [103, 102, 101, 100, 77] == found


def test_a_call_that_was_unlimited_once_is_found(guard: Guard, reader: Reader) -> None:
    """A call with a tally and with runs is one call."""
    guard.policy(look_up, unlimited=False)
    guard(look_up, "x")
    [call] = {r.call for r in reader.stream(Filter(search='"x"')) if r.short == "look_up"}

    assert call == reader.find(call[:10])
    assert "success" == reader.call(call).record.status


@pytest.mark.parametrize("text", ["é", "漢", 'he said "hi"', "a\\b", "tab\there"])
def test_text_is_found_as_people_write_it(guard: Guard, reader: Reader, text: str) -> None:
    """Signs that JSON writes in another way are found in arguments and results."""
    guard(charge, 500, note=f"before {text} after")

    assert [500] == [r.args["order"] for r in reader.calls(Filter(search=text)).records]
    assert 1 == reader.count(Filter(search=text)) == reader.stats(Filter(search=text)).total.actions


def test_lists_counts_and_sums_agree_on_every_status(guard: Guard, reader: Reader) -> None:
    """Also where a doubt was released, or its success came late."""
    for order in (200, 201):
        HELD.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            guard(charge, order)
    guard.retry(charge, 200)
    store = reader.store
    late = granted(store, call="a" * 32, lease=1)
    granted(store, call="a" * 32, max=2)
    store.transact(settle(late))
    latest = store.rows("a" * 32)[-1]
    store.transact(settle(latest, "doubt"))

    for status in STATES:
        wanted = Filter(status=status)
        found = list(reader.stream(wanted))
        assert {status} >= {state_of(r) for r in found}
        assert len(found) == reader.count(wanted) == reader.stats(wanted).total.actions
        assert sum(r.attempts for r in found) == reader.stats(wanted).total.attempts
    assert [77, 201] == [r.args["order"] for r in reader.doubts() if r.args]
    assert 200 in [r.args["order"] for r in reader.stream(Filter(status="failed")) if "order" in r.args]


def test_looking_back_and_on_finds_what_there_is(guard: Guard, reader: Reader) -> None:
    """With all the time there is both find the same events; with none they say how far they got."""
    for wanted in (
        Filter(),
        Filter(wf="w1"),
        Filter(tool="send_email", status="failed"),
        Filter(search="bob"),
    ):
        every = reader.events(wanted=wanted, limit=10_000)
        assert (
            every == reader.look_back(10_000, wanted).events == reader.look_on(0, wanted, limit=10_000).events
        )
        assert every[-3:] == reader.look_back(3, wanted).events
        assert every[:3] == reader.look_on(0, wanted, limit=3).events
    events = [(None, "x", 1, "blocked", 10**15 + n, "a.b", "w", "c", 1, None) for n in range(50_000)]
    reader.store.submit(  # type: ignore[union-attr]
        lambda db: db.executemany(f"INSERT INTO events VALUES ({', '.join('?' * 10)})", events), durable=False
    )

    back = reader.look_back(5, Filter(wf="w1"), seconds=0)
    on, found = 0, []
    while True:
        page = reader.look_on(on, Filter(wf="w1"), seconds=0)
        found += page.events
        on = page.upto
        if page.complete:
            break
        assert page.reached is not None

    assert ([], False, True) == (back.events, back.complete, back.reached is not None)
    assert reader.events(wanted=Filter(wf="w1")) == found


def test_doubts_come_page_by_page(guard: Guard, reader: Reader) -> None:
    """Each page goes on after the last one that is known, also where many began at the same moment."""
    for number in range(12):
        run = granted(reader.store, call=f"{number:032x}", wf="many")
        reader.store.transact(settle(run, "doubt"))
    with closing(sqlite3.connect(reader.store.address)) as db, db:
        db.execute("UPDATE runs SET started = started / 1000000 * 1000000")

    found: list[str] = []
    after = None
    while page := reader.doubts(limit=5, after=after):
        found += [r.call for r in page]
        after = (page[-1].started, page[-1].call)

    assert [r.call for r in reader.doubts()] == found
    assert 13 == len(set(found))
