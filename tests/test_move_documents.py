"""`ledger move` with DynamoDB and MongoDB: no log tells what changes, and no barrier holds but time."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ledger import StoreError, UsageError
from ledger_ops.move import Move
from ledger_stores.documents import DocumentStore
from ledger_stores.testing import claim, granted, settle
from tests.actors import eventually, stage
from tests.move_kit import Place, fresh_place, guard_on, move, moved, sides
from tests.test_move import HAMMER, at, places, sides_of_new, start
from tests.test_ops_servers import charge, tell_a_story

#: each store of documents is once the source and once the target
RING = [("sqlite", "dynamodb"), ("dynamodb", "mongodb"), ("mongodb", "postgres")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All who share the ledgers of a test look at the mark so often that nobody waits long."""
    monkeypatch.setattr(DocumentStore, "gate_micros", 300_000)


def held(side: Any) -> Any:
    """All that both kinds of ledger hold of their calls: no monotonic times, and no log."""
    side.store.flush()
    calls = {
        record.call: [row._replace(mono=0) for row in rows] or record._replace(holder="")
        for record, rows in side.store.calls()
    }
    return calls, side.store.totals()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_everything_goes_along(pair: tuple[str, str], tmp_path: Path) -> None:
    """Rows, tallies, counts and totals are there what they were here; a second run finds nothing new."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)

    found = moved(source, target)

    assert ("moved", 11, 0) == found
    with sides(source, target) as (here, there):
        assert held(here) == held(there)
    assert "nothing new" == moved(source, target).state


@pytest.mark.usefixtures("hasty")
def test_a_log_of_all_events_becomes_the_logs_of_calls(tmp_path: Path) -> None:
    """Each call is told of its own, once, and goes on with what happens there."""
    source, target = places(("sqlite", "dynamodb"), tmp_path)
    at(source, tell_a_story)
    moved(source, target)

    with sides(source, target) as (here, there):
        kinds = [e.kind for e in here.entries(0, 999) if e.kind not in ("blocked", "ran", "raised")]
        store: Any = there.store
        logs = {record.call: list(store.events_of(record.call)) for record, _ in store.calls()}
    assert Counter(kinds) == Counter(event["kind"] for log in logs.values() for event in log)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_one_side_at_a_time_begins_runs(pair: tuple[str, str], tmp_path: Path) -> None:
    """At each step of the move at most one of the two takes a new call, and in the end the target does."""
    source, target = places(pair, tmp_path)
    guards = [source.guard(), target.guard()]
    guards[0](charge, 0)
    seen: list[tuple[bool, bool]] = []

    def taken(side: int) -> bool:
        try:
            return guards[side].call(charge, 2 * len(seen) + side + 100).executed
        except StoreError:
            return False

    with sides(source, target) as (here, there):
        for side in (here, there):
            plain = side.step

            def step(*values: Any, plain: Any = plain) -> None:
                plain(*values)
                seen.append((taken(0), taken(1)))

            side.step = step  # type: ignore[method-assign, assignment]
        Move(here, there).run()
    for guard in guards:
        guard.close()

    assert [(True, False), (False, False), (False, True)] == list(dict.fromkeys(seen))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_live_run_is_waited_for(pair: tuple[str, str], tmp_path: Path) -> None:
    """It ends at the source, and the target has its end."""
    source, target = places(pair, tmp_path)
    told: list[str] = []
    with sides_of_new(source, target) as (here, there):
        run = granted(here.store)
        mover = threading.Thread(target=Move(here, there, tell=told.append).run)
        mover.start()
        eventually(lambda: any("that still run" in text for text in told))
        assert "settled" == here.store.transact(settle(run, result="7")).kind
        mover.join(60)

        assert ["7"] == [row.result for row in there.store.rows("c")]
        assert "done" == there.store.transact(claim()).kind


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_the_end_of_a_lapsed_run_is_carried_later(pair: tuple[str, str], tmp_path: Path) -> None:
    """It goes along in doubt; what its owner says then at the source comes with the same command."""
    source, target = places(pair, tmp_path)
    with sides_of_new(source, target) as (here, there):
        lapsed = granted(here.store, lease=0)
        Move(here, there).run()
        assert "doubt" == there.store.transact(claim(on_doubt="block")).kind
        assert "settled" == here.store.transact(settle(lapsed, result="8")).kind

        found = Move(here, there).run()

        assert ("late ends carried", 1) == (found.state, found.late_ends)
        assert "8" == there.store.rows("c")[0].result


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING[:2], ids="-".join)
def test_a_mover_that_was_paused_brings_nothing_back(pair: tuple[str, str], tmp_path: Path) -> None:
    """Given up in the middle of a step and gone on when the target is open, it changes no call there."""
    source, target = places(pair, tmp_path)
    with guard_on(source) as guard:
        for number in range(3):
            guard(charge, number)
    with sides(source, target) as (here, there), sides(source, target) as (_, late):
        stalled = Move(here, late)
        plain = late.store.write  # type: ignore[union-attr]
        resume, inside = threading.Event(), threading.Event()

        def write(*values: Any) -> Any:
            inside.set()
            resume.wait(60)
            return plain(*values)

        late.store.write = write  # type: ignore[union-attr]
        errors: list[BaseException] = []
        mover = threading.Thread(target=lambda: errors.extend(failure(stalled.run)))
        mover.start()
        assert inside.wait(60)
        Move(here, there).run()
        again = [there.store.rows(record.call)[0] for record, _ in there.store.calls()]
        for row in again:
            there.store.reset(row.wf, 2**53)
        resume.set()
        mover.join(60)

        assert ["another `ledger move` is at work"] == [
            str(e)[str(e).index("another") :][:32] for e in errors
        ]
        assert there.is_empty()


def failure(work: Any) -> list[BaseException]:
    """The error of some work."""
    try:
        work()
    except StoreError as error:
        return [error]
    return []


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_move_can_be_cancelled_until_it_opens(pair: tuple[str, str], tmp_path: Path) -> None:
    """The source begins runs again, the target holds nothing and stays closed, until a new move comes."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)
    with sides(source, target) as (here, there):
        mover = Move(here, there)
        mover._begin()
        mover._copy_all()
        mover._seal()

        assert "cancelled" == Move(here, there).cancel().state

        assert there.is_empty()
        granted(here.store, call="new")
        with pytest.raises(StoreError, match="that move was cancelled"):
            there.store.transact(claim("new"))
        here.store.transact(settle(here.store.rows("new")[-1]))
        Move(here, there).run()
        assert held(here) == held(there)
        with pytest.raises(UsageError, match="where runs begin now"):
            Move(here, there).cancel()


@pytest.mark.usefixtures("hasty")
def test_a_target_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    """It is open again after the look, and the source never left."""
    source, target = places(("sqlite", "dynamodb"), tmp_path)
    for place in (source, target):
        at(place, lambda guard: guard(charge, 1))

    with pytest.raises(UsageError, match="is not empty"):
        moved(source, target)

    for place in (source, target):
        assert at(place, lambda guard: guard.call(charge, 2).executed)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("sqlite", "mongodb"), ("dynamodb", "sqlite")], ids="-".join)
def test_callers_who_change_sides_run_each_call_once(pair: tuple[str, str], tmp_path: Path) -> None:
    """Four processes hammer 60 keys, are refused at the source and go to the target: one effect each."""
    source, target = places(pair, tmp_path)
    with stage(tmp_path) as here:
        slowly = HAMMER.replace("0.002", "0.4").replace("0.005", "0.5").replace("240", "60")
        crowd = [start(here, slowly, source, target, number) for number in range(4)]
        assert ["ready"] * 4 == [actor.line() for actor in crowd]
        for actor in crowd:
            actor.tell("go")
        eventually(lambda: len(here.effects()) > 20)

        done = move(source, target)

        assert 0 == done.code, done.err
        for actor in crowd:
            assert "moved" == actor.line()
            actor.ends_well()
        counts = Counter(here.effects())
    assert {1} == set(counts.values())
    assert {str(number) for number in range(60)} <= counts.keys()


def test_a_place_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """Neither a table nor a document: a source that is none is an error, and the target stays as it was."""
    target = fresh_place("sqlite", tmp_path)
    for kind in ("dynamodb", "mongodb"):
        done = move(Place(fresh_place(kind, tmp_path).url, "nobody_was_here"), target)
        assert (1, True) == (done.code, "there is no ledger at" in done.err)
    assert not Path(target.url).exists()
