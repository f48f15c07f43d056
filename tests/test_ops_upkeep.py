"""Keeping the file: prune, backup, restore; what must survive does, beside running guards."""

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, InDoubt, SqliteStore, StoreError, UsageError
from ledger_ops import upkeep
from ledger_ops.doctor import doctor
from ledger_ops.reader import NoLedger, Reader, open_store
from ledger_ops.values import Progress
from tests.actors import eventually, stage

HELD: list[BaseException] = []
DAY = 86_400_000_000
WRITER = """
def work(n):
    effect(n)
    return n
n = 0
say("ready")
while not os.path.exists(DB + ".stop"):
    n += 1
    guard(work, n)
say(n)
"""


def charge(order: int) -> dict[str, int]:
    """A tool that works, unless the test says otherwise."""
    if HELD:
        raise HELD.pop()
    return {"order": order}


def look_up(word: str) -> str:
    """A tool without limits."""
    return word


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard with calls of every end: done, failed, failed then done, in doubt, released, counted."""
    HELD.clear()
    made = Guard(tmp_path / "ledger.db", quiet=True)
    made.policy(look_up, unlimited=True)
    made.policy(charge, on_doubt="block")
    for order in (1, 1, 2, 3):
        made(charge, order)
    for order, error in ((4, ValueError("no")), (5, ValueError("no")), (6, KeyboardInterrupt())):
        HELD.append(error)
        with pytest.raises(type(error)):
            made(charge, order)
    made(charge, 5)
    made.retry(charge, 3)
    made(look_up, "x")
    made.flush()
    yield made
    made.close()


@pytest.fixture
def store(guard: Guard, tmp_path: Path) -> Iterator[SqliteStore]:
    """The same file, opened for housekeeping."""
    with closing(open_store(tmp_path / "ledger.db")) as opened:
        yield opened


def later(days: float = 1) -> int:
    """A time after all that the tests did."""
    return time.time_ns() // 1000 + int(days * DAY)


def kinds(guard: Guard) -> dict[int, str]:
    """What each call gets when it is asked for again."""
    found: dict[int, str] = {}
    for order in range(1, 7):
        try:
            found[order] = guard.call(charge, order).kind
        except InDoubt:
            found[order] = "in doubt"
    return found


def totals(store: SqliteStore) -> dict[str, Any]:
    """The sums by tool."""
    return {tool.rpartition(".")[2]: s.to_dict() for tool, s in Reader(store).stats().tools.items()}


def test_prune_changes_no_answer(guard: Guard, store: SqliteStore) -> None:
    """What was done stays done, what waits for a person waits: only words, events and failures go."""
    pruned = upkeep.prune(store, before=later())

    assert (6, 2, 0) == (*pruned[:2], pruned.forgotten)
    rows = [(r.args_json, r.result_json) for r in Reader(store).stream() if r.status == "success"]
    assert [(None, None)] * 4 == rows
    [doubt] = Reader(store).doubts()
    assert {"order": 6} == doubt.args
    assert {"claimed", "doubt"} == {e.kind for e in Reader(store).call(doubt.call).events}
    expected = {1: "blocked", 2: "blocked", 3: "executed", 4: "executed", 5: "blocked", 6: "in doubt"}
    assert expected == kinds(guard)


def test_prune_spares_what_is_young(guard: Guard, store: SqliteStore) -> None:
    """A call that anything happened to since that time keeps every word."""
    before = list(Reader(store).stream())

    assert (0, 0, 0, 0, 0) == upkeep.prune(store, before=later(-1), forget=True)

    assert before == list(Reader(store).stream())


def test_a_dry_run_tells_what_would_go(guard: Guard, store: SqliteStore) -> None:
    """The figures of a dry run are those of the real one, and it changes nothing."""
    for forget in (False, True):
        before = (list(Reader(store).stream()), totals(store), Reader(store).last_seq())

        told = upkeep.prune(store, before=later(), forget=forget, dry_run=True)

        assert before == (list(Reader(store).stream()), totals(store), Reader(store).last_seq())
        assert told[:4] == upkeep.prune(store, before=later(), forget=forget)[:4]


def test_prune_and_forget_lets_old_calls_run(guard: Guard, store: SqliteStore) -> None:
    """With forget, calls that had succeeded run again, as many as were told; a doubt stays."""
    pruned = upkeep.prune(store, before=later(), forget=True)

    assert 3 == pruned.forgotten  # 1, 2 and 5; 3 was released already
    assert ["executed"] * 5 + ["in doubt"] == list(kinds(guard).values())


def test_the_totals_stay_true_after_a_prune(guard: Guard, store: SqliteStore) -> None:
    """What stats tells is what a recount of the rows tells, and a later call counts on."""
    upkeep.prune(store, before=later())

    assert {"charge"} == set(totals(store))
    sums = totals(store)["charge"]
    rows = store.browse("SELECT COUNT(DISTINCT call), COUNT(*) + SUM(blocked), SUM(blocked) FROM runs")[0]
    assert rows == (sums["actions"], sums["attempts"], sums["blocked"])
    assert [True] * len(doctor(store.path)) == [f.ok or f.name == "doubts" for f in doctor(store.path)]
    guard(charge, 100)
    assert sums["actions"] + 1 == totals(store)["charge"]["actions"]


def test_event_numbers_go_on_after_a_prune(guard: Guard, store: SqliteStore) -> None:
    """The newest event stays, so that no number is used again; progress reaches its end."""
    last = Reader(store).last_seq()
    told: list[tuple[int, int]] = []

    upkeep.prune(
        store, before=later(), forget=True, progress=Progress(tell=lambda p: told.append((p.done, p.total)))
    )
    guard(charge, 100)

    assert last < min(e.seq for e in Reader(store).events(last))
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.slow
def test_prune_and_backup_beside_writers(tmp_path: Path) -> None:
    """While two processes make calls, a backup is whole and a prune loses nothing: every call ran once."""
    with stage(tmp_path) as crew:
        crowd = crew.crowd(2, WRITER.replace("guard(work, n)", "guard.workflow(sys.argv[2])(work, n)"))
        eventually(lambda: len(crew.effects()) > 50)
        with closing(open_store(crew.db)) as store:
            upkeep.backup(store, str(tmp_path / "copy.db"))
            upkeep.prune(store, before=later(-1 / 86_400))
            pruned = upkeep.prune(store, before=later(0))
            (tmp_path / "ledger.db.stop").touch()
            made = [int(actor.line()) for actor in crowd]
            for actor in crowd:
                actor.ends_well()

            assert sum(made) == len(crew.effects()) == Reader(store).stats().total.actions
            assert pruned.calls > 0
            assert [True] * 11 == [f.ok for f in doctor(str(crew.db))]
    copied = upkeep.examine(str(tmp_path / "copy.db"))
    assert 50 <= copied.calls <= sum(made)


def test_a_backup_is_whole_private_and_never_overwrites(
    guard: Guard, store: SqliteStore, tmp_path: Path
) -> None:
    """It holds every call, for its owner's eyes only; a file that exists stays as it is."""
    target = tmp_path / "copy.db"

    size = upkeep.backup(store, str(target))

    assert size == target.stat().st_size
    assert 0o600 == stat.S_IMODE(target.stat().st_mode)
    with closing(open_store(target)) as copied:
        assert list(Reader(store).stream()) == list(Reader(copied).stream())
        assert Reader(store).events() == Reader(copied).events()
    with pytest.raises(UsageError, match="exists already"):
        upkeep.backup(store, str(target))
    with pytest.raises(StoreError, match="could not be written"):
        upkeep.backup(store, str(tmp_path / "nowhere" / "copy.db"))
    assert [] == [p.name for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_restore_brings_back_and_tells_the_gap(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """A guard that is in use sees the backup's calls; those made since are unknown, which is noted."""
    upkeep.backup(store, str(tmp_path / "copy.db"))
    at_backup = list(Reader(store).stream())
    guard(charge, 50)
    last = Reader(store).last_seq()

    restored = upkeep.restore(str(tmp_path / "copy.db"), store.path, actor="ann")

    assert at_backup == list(Reader(store).stream())
    assert len(at_backup) == restored.calls
    assert [restored.gap] == Reader(store).gaps()
    [event] = Reader(store).events(last)
    assert ("restored", True) == (
        event.kind,
        str(event.detail).startswith("restored by ann from a backup of "),
    )
    assert "executed" == guard.call(charge, 50).kind  # unknown to the backup, so it runs: that is the gap
    assert "blocked" == guard.call(charge, 1).kind
    assert ["gap"] == [f.name for f in doctor(store.path) if not f.ok and f.name != "doubts"]
    with closing(open_store(restored.kept)) as former:
        assert {"order": 50} in [r.args for r in Reader(former).stream()]


def test_restore_to_a_new_place(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """Where there is no ledger, the backup becomes one, with its gap."""
    upkeep.backup(store, str(tmp_path / "copy.db"))

    restored = upkeep.restore(str(tmp_path / "copy.db"), str(tmp_path / "new.db"), actor="ann")

    assert restored.kept is None
    with closing(open_store(tmp_path / "new.db")) as new:
        assert list(Reader(store).stream()) == list(Reader(new).stream())
        assert [restored.gap] == Reader(new).gaps()
    assert "blocked" == Guard(tmp_path / "new.db", quiet=True).call(charge, 1).kind


def test_gaps_add_up(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """A second restore keeps the note of the first."""
    for number in range(2):
        copy = str(tmp_path / f"copy{number}.db")
        upkeep.backup(store, copy)
        upkeep.restore(copy, store.path, actor="ann")
        time.sleep(1.1)  # the former ledger is kept under a name with the second in it

    assert 2 == len(Reader(store).gaps())


def test_a_damaged_ledger_is_set_aside_by_a_restore(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """What cannot be read any more is kept under another name, with its log."""
    upkeep.backup(store, str(tmp_path / "copy.db"))
    store.close()
    guard.close()
    (tmp_path / "ledger.db").write_bytes(b"\0" * 4096 + os.urandom(4096))

    restored = upkeep.restore(str(tmp_path / "copy.db"), str(tmp_path / "ledger.db"), actor="ann")

    assert str(restored.kept).startswith(str(tmp_path / "ledger.db.damaged-"))
    assert 8192 == Path(str(restored.kept)).stat().st_size
    assert "blocked" == Guard(tmp_path / "ledger.db", quiet=True).call(charge, 1).kind


def test_a_bad_backup_changes_nothing(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """A damaged backup, a missing one, the ledger itself and another program's file as target are refused."""
    copy, target = tmp_path / "copy.db", Path(store.path)
    upkeep.backup(store, str(copy))
    before = list(Reader(store).stream())
    whole = copy.read_bytes()
    copy.write_bytes(whole[:8192] + os.urandom(len(whole) - 8192))
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE songs (name)")
    songs = other.read_bytes()

    with pytest.raises(StoreError, match="damaged"):
        upkeep.restore(str(copy), str(target), actor="ann")
    with pytest.raises(NoLedger, match="there is no ledger at"):
        upkeep.restore(str(tmp_path / "none.db"), str(target), actor="ann")
    with pytest.raises(UsageError, match="the backup itself"):
        upkeep.restore(str(target), str(target), actor="ann")
    copy.write_bytes(whole)
    with pytest.raises(StoreError, match="another program"):
        upkeep.restore(str(copy), str(other), actor="ann")

    assert before == list(Reader(store).stream())
    assert songs == other.read_bytes()


def test_no_call_falls_between_the_kept_copy_and_the_restore(
    guard: Guard, store: SqliteStore, tmp_path: Path
) -> None:
    """A call that succeeds while restore waits for the file is in the kept copy, and lies in the gap."""
    upkeep.backup(store, str(tmp_path / "copy.db"))
    holder = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    found: list[upkeep.Restored] = []
    restorer = threading.Thread(
        target=lambda: found.append(upkeep.restore(str(tmp_path / "copy.db"), store.path, actor="ann"))
    )
    restorer.start()
    time.sleep(0.3)  # it waits for the lock now, or will
    holder.execute("INSERT INTO meta VALUES ('late', 1)")
    holder.execute("COMMIT")
    late = time.time_ns() // 1000
    restorer.join(60)
    holder.close()

    [restored] = found
    assert restored.gap.until >= late
    with closing(sqlite3.connect(str(restored.kept))) as kept:
        assert [(1,)] == kept.execute("SELECT value FROM meta WHERE name = 'late'").fetchall()


@pytest.mark.parametrize("rest", [b"", None])
def test_an_old_log_does_not_spoil_a_restore(
    guard: Guard, store: SqliteStore, tmp_path: Path, rest: bytes | None
) -> None:
    """Where the ledger was deleted, or emptied, and its log stayed, the backup comes back whole."""
    upkeep.backup(store, str(tmp_path / "copy.db"))
    log = (tmp_path / "ledger.db-wal").read_bytes()
    store.close()
    guard.close()
    (tmp_path / "ledger.db").unlink()
    (tmp_path / "ledger.db-wal").write_bytes(log)
    if rest is not None:
        (tmp_path / "ledger.db").write_bytes(rest)

    upkeep.restore(str(tmp_path / "copy.db"), str(tmp_path / "ledger.db"), actor="ann")

    assert "blocked" == Guard(tmp_path / "ledger.db", quiet=True).call(charge, 1).kind
    assert 1 == len([f for f in doctor(str(tmp_path / "ledger.db")) if f.name == "gap"])


def test_a_gap_can_be_accepted(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """Once a person has looked into it, doctor tells of it no more; who did is in an event."""
    upkeep.backup(store, str(tmp_path / "copy.db"))
    upkeep.restore(str(tmp_path / "copy.db"), store.path, actor="ann")

    assert 1 == upkeep.accept_gaps(store, actor="bob")

    assert [] == Reader(store).gaps()
    assert ("gaps accepted", "bob") == (
        Reader(store).last_events(1)[0].kind,
        Reader(store).last_events(1)[0].caller,
    )
    assert 0 == upkeep.accept_gaps(store, actor="bob")
