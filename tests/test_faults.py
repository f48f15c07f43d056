"""A store that is missing, damaged, foreign, read-only, locked or full: nothing runs, or nothing is lost."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard, StoreError
from tests.actors import eventually


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the ledger of the test lies."""
    return tmp_path / "ledger.db"


def refused(db: Path, why: str) -> None:
    """A guard on this file refuses a call, says why, and runs nothing."""
    ran: list[int] = []
    guard = Guard(db, quiet=True, lock_seconds=0.2)
    with pytest.raises(StoreError, match=why):
        guard(ran.append, 1, key="1")
    assert ran == []
    guard.close()


def test_a_deleted_file_stops_everything_new(db: Path) -> None:
    """A ledger that is deleted while in use is an error for the next call, never a fresh start."""
    ran: list[int] = []
    guard = Guard(db, quiet=True)
    guard(ran.append, 1, key="1")

    db.unlink()

    with pytest.raises(StoreError, match="was deleted"):
        guard(ran.append, 2, key="2")
    assert ran == [1]
    assert not db.exists()


def test_a_replaced_file_stops_everything_new(db: Path, tmp_path: Path) -> None:
    """A ledger that is replaced by another file while in use is an error for the next call."""
    ran: list[int] = []
    guard = Guard(db, quiet=True)
    guard(ran.append, 1, key="1")
    other = Guard(tmp_path / "other.db", quiet=True)
    other(ran.append, 9, key="9")
    other.close()

    (tmp_path / "other.db").rename(db)

    with pytest.raises(StoreError, match="was replaced"):
        guard(ran.append, 2, key="2")
    assert ran == [1, 9]


def test_a_damaged_file_is_refused(db: Path) -> None:
    """A file whose pages were overwritten is refused, and left as it is."""
    guard = Guard(db, quiet=True)
    guard(int, 1)
    guard.close()
    with db.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * (db.stat().st_size - 100))

    refused(db, "damaged")


def test_a_file_that_is_no_database_is_refused(db: Path) -> None:
    """A text file is refused, and left as it is."""
    db.write_text("the shopping list\n" * 100)

    refused(db, "no SQLite database")
    assert db.read_text().startswith("the shopping list")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("CREATE TABLE users (name)", "another program"),
        ("CREATE TABLE ledger (id)", "ledger-once"),
        ("PRAGMA application_id = 7", "another program"),
    ],
)
def test_a_foreign_database_is_refused(db: Path, statement: str, why: str) -> None:
    """A database of another program, or of ledger-once, is refused in words of its own."""
    with closing(sqlite3.connect(db)) as other:
        other.execute(statement)
        other.commit()

    refused(db, why)


def test_a_newer_schema_is_refused(db: Path) -> None:
    """A file of a newer Ledger is refused with the advice to upgrade."""
    guard = Guard(db, quiet=True)
    guard(int, 1)
    guard.close()
    with closing(sqlite3.connect(db)) as other:
        other.execute("PRAGMA user_version = 99")

    refused(db, "newer Ledger")


def test_a_lock_held_for_long_is_an_error_and_then_forgotten(db: Path) -> None:
    """A file that another process keeps locked stops the call after lock_seconds, and not the one after."""
    ran: list[int] = []
    guard = Guard(db, quiet=True, lock_seconds=0.2)
    guard(ran.append, 1, key="1")
    with closing(sqlite3.connect(db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="write lock"):
            guard(ran.append, 2, key="2")

    assert ran == [1]
    guard(ran.append, 2, key="2")
    assert ran == [1, 2]
    guard.close()


def test_an_outcome_that_meets_a_lock_is_written_later(db: Path) -> None:
    """A store that cannot take the outcome does not cost the caller the result, and gets it later."""
    guard = Guard(db, quiet=True, lock_seconds=0.2)
    guard(int, 0)
    holder = sqlite3.connect(db, isolation_level=None, check_same_thread=False)

    def charge(order: int) -> str:
        holder.execute("BEGIN IMMEDIATE")
        return "paid"

    assert guard(charge, 1) == "paid"
    holder.execute("COMMIT")
    holder.close()

    eventually(lambda: all(entry["status"] == "success" for entry in guard.history()))
    assert guard.call(charge, 1).kind == "blocked"
    guard.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_inside_the_tool_still_takes_the_outcome(tmp_path: Path) -> None:
    """The outcome of a tool that ran is written on a full disk, because the ballast is given up for it."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        guard = Guard(disk / "ledger.db", quiet=True)
        guard(int, 0)
        ran: list[int] = []

        def charge(order: int) -> str:
            ran.append(order)
            with (disk / "filler").open("wb", buffering=0) as filler:
                try:
                    while filler.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            return "x" * 20_000

        assert len(guard(charge, 1)) == 20_000
        assert guard.history()[-1]["status"] == "success"
        assert not (disk / "ledger.db-ballast").exists()
        guard.close()
    finally:
        subprocess.run(["umount", disk], check=True)  # noqa: S607
