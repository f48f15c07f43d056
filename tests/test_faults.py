"""A store that is missing, damaged, foreign, read-only, locked or full: nothing runs, or nothing is lost."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard, StoreError
from tests.actors import Stage, eventually


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the ledger of the test lies."""
    return tmp_path / "ledger.db"


def refused(db: Path, why: str) -> None:
    """A guard on this file refuses calls, sync and async, names the file, says why, and runs nothing."""
    guard = Guard(db, quiet=True, lock_seconds=0.2)
    refuses(guard, db, why)
    guard.close()


def refuses(guard: Guard, db: Path, why: str) -> None:
    """This guard refuses calls, sync and async, names the file, says why, and runs nothing."""
    ran: list[int] = []

    async def send(order: int) -> None:
        ran.append(order)

    async def once() -> None:
        await guard(send, 1)

    calls: list[Callable[[], object]] = [
        lambda: guard(ran.append, 1, key="refused"),
        lambda: asyncio.run(once()),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=why) as caught:
            call()
        assert os.fspath(db) in str(caught.value)
    assert [] == ran


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


# ── missing, closed to us, cut, locked ────────────────────────────────────────────────────────────


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """A ledger in a folder that does not exist is refused with the ways to name another, and not made."""
    db = tmp_path / "no such folder" / "ledger.db"

    refused(db, r"No such file or directory.*LEDGER_DB")
    assert not db.parent.exists()


def test_a_folder_in_place_of_the_file_is_refused(db: Path) -> None:
    """A path that is a folder is refused."""
    db.mkdir()

    refused(db, "cannot be opened")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A path that goes through a file is refused."""
    (tmp_path / "file").write_text("no folder")

    refused(tmp_path / "file" / "ledger.db", "Not a directory")


# A process that is not root, in a folder that everybody may enter. All that is loaded where first
# needed is loaded before, because the interpreter itself may lie where only root may look.
ORDINARY = """
import asyncio, tempfile

async def send(order):
    effect(order)

def charge(order):
    effect(order)

async def once(guarded):
    await guarded(send, 1)

with tempfile.TemporaryDirectory() as folder:
    warm = Guard(os.path.join(folder, "warm.db"), quiet=True)
    warm(len, "warm")
    asyncio.run(once(Guard(os.path.join(folder, "warm.db"), quiet=True, workflow="warm")))
    try:
        Guard(os.path.join(folder, "no folder", "warm.db"), quiet=True)(len, "warm")
    except StoreError:
        pass
    warm.close()
os.unlink(DB + ".effects")
say("warm")
hear()
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for work in (lambda: guard(charge, 1), lambda: asyncio.run(once(guard))):
    try:
        work()
        say("not refused")
    except StoreError as error:
        say(error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.mark.parametrize("case", ["new file", "read-only file", "unreadable file", "read-only folder"])
def test_what_may_not_be_written_is_refused(open_folder: Path, case: str) -> None:
    """A file or folder that this user may not write is refused with the advice to make it writable."""
    folder = open_folder / "data"
    folder.mkdir()
    (open_folder / "scripts").mkdir()
    db = folder / "ledger.db"
    if case != "new file":
        with closing(Guard(db, quiet=True)) as guard:
            guard(int, 1)
    effects = Path(f"{db}.effects")
    with Stage(open_folder) as stage:
        stage.db = db
        if case.endswith("file") and case != "new file":
            folder.chmod(0o777)
            db.chmod({"read-only file": 0o444, "unreadable file": 0o000}[case])
        actor = stage.start(ORDINARY)
        assert "warm" == actor.line()
        if case in ("new file", "read-only folder"):
            folder.chmod(0o555)
        if case == "read-only folder":
            db.chmod(0o666)
        actor.tell("go on")
        told = [actor.line() for _ in range(2)]
        actor.ends_well()

    for line in told:
        assert os.fspath(db) in line
        assert "writable" in line or "permission" in line
    assert not effects.exists()
    if case != "new file":
        db.chmod(0o600)
        assert {"success"} == {entry["status"] for entry in Guard(db, quiet=True).history()}


def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of one megabyte in that folder; skips where mounting is not allowed."""
    disk = folder / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
        mounted = subprocess.run(mount, check=False, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)  # noqa: S607


disk = pytest.fixture(lambda tmp_path: (yield from small_disk(tmp_path)))


def fill(disk: Path) -> Path:
    """Leave no room on a disk; the file that takes it."""
    filler = disk / "filler"
    for size in (65536, 4096, 512):
        with filler.open("ab", buffering=0) as file:
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass
    return filler


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_full_disk_stops_new_calls_until_there_is_room(disk: Path, used: bool) -> None:
    """On a full disk no call runs, and the error says so; with room again the next one does."""
    db = disk / "ledger.db"
    with closing(Guard(db, quiet=True)) as guard:
        if used:
            guard(int, 0)
        filler = fill(disk)
        for number in range(1000):  # what the file still had to spare
            try:
                guard(int, number + 1)
            except StoreError:
                break

        refuses(guard, db, "make room|has room|No space left")
        before = len(guard.history()) if used else 0
        filler.unlink()
        ran: list[int] = []
        guard(ran.append, 1, key="room")

        assert [1] == ran
        assert "success" == guard.history()[-1]["status"]
        assert len(guard.history()) >= before + 1


def test_a_read_only_disk_is_refused(disk: Path) -> None:
    """A ledger on a disk that became read-only is refused, in a process that used it and in a new one."""
    db = disk / "ledger.db"
    first = Guard(db, quiet=True)
    first(int, 1)
    first.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)  # noqa: S607

    refuses(first, db, "writable")
    first.close()
    refused(db, "writable")


@pytest.mark.parametrize("where", ["header", "middle", "cut"])
def test_damage_is_refused_wherever_it_is(db: Path, where: str) -> None:
    """A file that is cut short, or damaged at its start or in its tables, is refused and left as it is."""
    with closing(Guard(db, quiet=True)) as guard:
        for order in range(300):
            guard(int, order)
    size = db.stat().st_size
    with db.open("r+b") as file:
        if where == "cut":
            file.truncate(size // 2 + 100)
        else:
            file.seek(0 if where == "header" else 4096)
            file.write(b"\xff" * (100 if where == "header" else size - 4096))
    damaged = db.read_bytes()

    refused(db, "damaged|no SQLite database")
    assert damaged == db.read_bytes()


def test_a_file_that_is_emptied_while_in_use_is_refused(db: Path) -> None:
    """A ledger that somebody empties while it is in use stops calls; it is no fresh start."""
    guard = Guard(db, quiet=True)
    guard(int, 1)
    os.truncate(db, 0)

    refuses(guard, db, "damaged|no SQLite database|disk reports|replaced|deleted|emptied")


LOST = """
import asyncio

guard(int, 1)

def charge(order):
    if sys.argv[2] == "deleted":
        os.unlink(DB)
    else:
        for name in (DB, DB + "-wal"):
            with open(name, "r+b") as file:
                file.write(b"\\xff" * os.path.getsize(name))
    return "paid"

async def send(order):
    return charge(order)

async def once():
    return (await guard.call(send, 2)).value

works = {
    "guard": lambda: guard(charge, 2),
    "guard.call": lambda: guard.call(charge, 2).value,
    "async": lambda: asyncio.run(once()),
}
say(works[sys.argv[3]]())
os._exit(0)  # a normal exit would fight for the outcome for some seconds
"""


@pytest.mark.parametrize("how", ["deleted", "damaged"])
@pytest.mark.parametrize("ask", ["guard", "guard.call", "async"])
def test_a_result_outlives_the_file(tmp_path: Path, how: str, ask: str) -> None:
    """A tool during whose run the ledger is lost has run: its caller gets the result, not an error."""
    with Stage(tmp_path) as stage:
        actor = stage.start(LOST, how, ask)

        assert "paid" == actor.line()
        actor.ends_well()
        assert how == "damaged" or "could not record it" in actor.errors()  # damage may pass unseen


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_duplicate_on_a_lost_file_runs_nothing(db: Path, tmp_path: Path, how: str) -> None:
    """A call that the lost file had recorded is not run again by the process that had used it."""
    ran: list[int] = []
    guard = Guard(db, quiet=True)
    guard(ran.append, 1, key="1")
    if how == "replaced":
        with closing(Guard(tmp_path / "other.db", quiet=True)) as other:
            other.check()
        (tmp_path / "other.db").rename(db)
    elif how == "moved":
        db.rename(tmp_path / "moved.db")
    else:
        db.unlink()

    try:
        guard(ran.append, 1, key="1")
    except StoreError as error:
        assert os.fspath(db) in str(error)  # noqa: PT017  # answering "done" from what is still open is right too
    assert [1] == ran
    refuses(guard, db, "was replaced|was deleted")


@pytest.mark.parametrize("lock", ["writers", "everybody"])
def test_a_file_locked_for_long_names_itself(db: Path, lock: str) -> None:
    """A file locked against writers, or against everybody, stops calls, and works when the lock is gone."""
    with closing(Guard(db, quiet=True)) as made:
        made(int, 1)
    holder = sqlite3.connect(db, isolation_level=None)
    if lock == "everybody":
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("CREATE TABLE held (x)")

    refused(db, "lock")
    holder.execute("ROLLBACK")
    holder.close()
    with closing(Guard(db, quiet=True)) as guard:
        assert "executed" == guard.call(int, 2).kind


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda db: db.write_text("the shopping list\n" * 100), "name another path"),
        (
            lambda db: sqlite3.connect(db).execute("CREATE TABLE users (name)").connection.close(),
            "another path",
        ),
        (
            lambda db: sqlite3.connect(db).execute("PRAGMA application_id = 7").connection.close(),
            "another path",
        ),
    ],
    ids=["text", "tables", "application id"],
)
def test_what_is_not_ours_is_left_as_it_is(db: Path, make: Callable[[Path], object], why: str) -> None:
    """A foreign file is refused with the advice to name another path, and not one byte of it changes."""
    make(db)
    before = db.read_bytes()

    refused(db, f"(?i){why}")
    assert before == db.read_bytes()
