"""The SQLite file guards itself: what the schema refuses, whatever a later bug does."""

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import ledger
from ledger import SqliteStore
from ledger_stores.testing import claim, settle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with one finished and one open call."""
    store = SqliteStore(tmp_path / "ledger.db")
    done = store.transact(claim("done")).row
    assert done is not None
    store.transact(settle(done))
    store.transact(claim("open"))
    store.close()
    return tmp_path / "ledger.db"


@pytest.fixture
def db(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody else's connection to it."""
    with closing(sqlite3.connect(path)) as connection:
        yield connection


def test_events_are_never_changed(db: sqlite3.Connection) -> None:
    """An UPDATE of an event is refused by the file itself."""
    before = db.execute("SELECT * FROM events").fetchall()

    with pytest.raises(sqlite3.IntegrityError, match="never changed"):
        db.execute("UPDATE events SET kind = 'other'")

    assert before == db.execute("SELECT * FROM events").fetchall()


def test_the_newest_event_is_never_deleted(db: sqlite3.Connection) -> None:
    """Old events may be pruned; the newest stays, so that no number is used again."""
    db.execute("DELETE FROM events WHERE seq < (SELECT MAX(seq) FROM events)")

    with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
        db.execute("DELETE FROM events")

    assert [(3,)] == db.execute("SELECT seq FROM events").fetchall()


@pytest.mark.parametrize("run", [1, 2])
def test_a_call_has_one_open_run(db: sqlite3.Connection, run: int) -> None:
    """Neither the same number nor the next one can be inserted beside a running row."""
    columns = [name for name in ledger.Run._fields if name != "run"]
    names = ", ".join(columns)

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        db.execute(f"INSERT INTO runs ({names}, run) SELECT {names}, ? FROM runs WHERE call = 'open'", (run,))


@pytest.mark.parametrize("change", ["status = 'success'", "closed_by = 'x'", "status = 'other'", "run = 0"])
def test_a_run_is_whole(db: sqlite3.Connection, change: str) -> None:
    """A row that is closed by nobody, open but closed, or of an unknown status cannot be written."""
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        db.execute(f"UPDATE runs SET {change} WHERE call = 'open'")


def test_each_claim_and_each_end_has_its_event(db: sqlite3.Connection) -> None:
    """Each claim and each end has its event, written in the same transaction."""
    events = db.execute("SELECT call, run, kind FROM events ORDER BY seq").fetchall()

    assert [("done", 1, "claimed"), ("done", 1, "success"), ("open", 1, "claimed")] == events


def test_the_file_says_whose_it_is(db: sqlite3.Connection) -> None:
    """application_id names Ledger and user_version the schema, and the journal is a WAL."""
    pragmas = [
        db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version", "journal_mode")
    ]

    assert [0x4C656467, 1, "wal"] == pragmas


def test_the_file_is_private(path: Path) -> None:
    """Nobody but its owner reads a ledger, its WAL or its ballast."""
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert {0o600} == set(modes.values()), modes
