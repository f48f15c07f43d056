"""Texts about a ledger: the brief for a model, and the doctor's findings with what to do about each."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard
from ledger_ops import upkeep
from ledger_ops.brief import brief
from ledger_ops.doctor import doctor
from ledger_ops.reader import Reader, open_store
from tests.actors import stage

HELD: list[BaseException] = []


def charge(order: int) -> str:
    """A tool that works, unless the test says otherwise."""
    if HELD:
        raise HELD.pop()
    return f"receipt {order}"


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a file."""
    HELD.clear()
    made = Guard(tmp_path / "ledger.db", quiet=True)
    yield made
    made.close()


def read(path: Path, *, wf: str | None = None, max_chars: int = 2000) -> str:
    """The brief of a file."""
    with closing(open_store(path)) as store:
        return brief(Reader(store), wf=wf, max_chars=max_chars)


def test_a_brief_tells_first_what_must_not_be_repeated(tmp_path: Path) -> None:
    """In doubt and running come before what was done, each with its arguments."""
    script = (
        "def charge(n):\n    say('in')\n    hear()\n"
        "def mail(n): pass\nguard(mail, 3)\nguard(charge, int(sys.argv[2]))"
    )
    with stage(tmp_path) as crew:
        killed, alive = crew.start(script, 1), crew.start(script, 2)
        assert "in" == killed.line() == alive.line()
        killed.kill()

        lines = read(crew.db).splitlines()

    assert "Ledger of all workflows." == lines[0]
    assert lines[1].startswith("IN DOUBT (nobody knows whether it happened; do not repeat it")
    assert lines[2].startswith("- charge(n=1) [")
    assert lines[3].startswith("RUNNING NOW (do not repeat it, wait)")
    assert lines[4].startswith("- charge(n=2) [")
    assert "DONE (do not repeat it): 1" == lines[5]
    assert lines[6].startswith("- mail(n=3) [")


def test_a_brief_keeps_to_its_length_and_counts_the_rest(guard: Guard, tmp_path: Path) -> None:
    """Whatever the bound, the text is within it; what does not fit is counted."""
    for number in range(30):
        guard(charge, number)
    HELD.append(ValueError("no\nfunds"))
    with pytest.raises(ValueError, match="no"):
        guard(charge, 99)

    for bound in (50, 100, 300, 1000, 10_000):
        assert len(read(tmp_path / "ledger.db", max_chars=bound)) <= bound
    text = read(tmp_path / "ledger.db", max_chars=500)
    shown = text.count("- charge(")
    assert f"… {30 - shown} more" in text
    whole = read(tmp_path / "ledger.db", max_chars=10_000)
    assert 31 == whole.count("- charge(")
    assert "ValueError: no\\nfunds" in whole


def test_a_brief_of_one_workflow(guard: Guard, tmp_path: Path) -> None:
    """Only its calls are told; nothing called is told too."""
    guard.workflow("a")(charge, 1)
    guard.workflow("b")(charge, 2)

    assert "order=1" in read(tmp_path / "ledger.db", wf="a")
    assert "order=2" not in read(tmp_path / "ledger.db", wf="a")
    assert "Ledger of workflow c. Nothing was called yet." == read(tmp_path / "ledger.db", wf="c")


def test_a_healthy_ledger_has_no_finding_to_act_on(guard: Guard, tmp_path: Path) -> None:
    """All that is looked at is told, and nothing of it is wrong."""
    guard(charge, 1)

    found = doctor(str(tmp_path / "ledger.db"))

    names = [
        "open", "schema", "integrity", "totals", "log", "disk", "file system", "permissions", "durability",
        "clock", "doubts",
    ]  # fmt: skip
    assert names == [f.name for f in found]
    assert [] == [f for f in found if not f.ok or f.advice]


def findings(path: Path) -> dict[str, str]:
    """What is wrong, with the advice."""
    found = [f for f in doctor(str(path)) if not f.ok]
    assert all(f.what and f.advice for f in found)
    return {f.name: f"{f.what} → {f.advice}" for f in found}


def test_the_doctor_names_what_is_wrong(guard: Guard, tmp_path: Path) -> None:
    """Loose permissions, an event from the future, a doubt and a long log are found, each with what to do."""
    path = tmp_path / "ledger.db"
    guard(charge, 1)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(charge, 2)
    path.chmod(0o644)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO events (kind, at, n) VALUES ('reset', ?, 0)", ((time.time_ns() + 10**13) // 1000,)
        )

    found = findings(path)

    assert ["permissions", "clock", "doubts"] == list(found)
    assert f"chmod 600 {path}" in found["permissions"]
    assert "h ahead of this clock" in found["clock"]
    assert "ledger resolve CALL" in found["doubts"]


def test_the_doctor_sees_a_reader_that_lets_the_log_grow(guard: Guard, tmp_path: Path) -> None:
    """While somebody holds a transaction the log only grows; past 64 MB that is a finding."""
    path = tmp_path / "ledger.db"
    guard(charge, 1)
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as reader,
        closing(sqlite3.connect(path)) as writer,
    ):
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM runs").fetchall()
        for number in range(70):
            with writer:
                writer.execute("INSERT INTO meta VALUES (?, ?)", (f"x{number}", os.urandom(1_000_000)))

        assert "lsof" in findings(path)["log"]


def test_the_doctor_finds_damage(guard: Guard, tmp_path: Path) -> None:
    """A torn index, a file of zeros and no file at all are told, never raised."""
    path = tmp_path / "ledger.db"
    for number in range(200):
        guard(charge, number)
    guard.close()
    with closing(sqlite3.connect(path)) as db:
        page = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'open_ends'").fetchone()[0]
        runs = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'one_live'").fetchone()[0]
    whole = path.read_bytes()
    torn = bytearray(whole)
    torn[(page - 1) * 4096 : page * 4096] = whole[(runs - 1) * 4096 : runs * 4096]
    torn[(page - 1) * 4096 + 3 : (page - 1) * 4096 + 5] = b"\xff\xff"
    path.write_bytes(torn)

    assert {"integrity"} <= set(findings(path)) or {"read"} <= set(findings(path))
    path.write_bytes(b"\0" * 8192)
    assert ["open"] == list(findings(path))
    path.unlink()
    assert "there is no ledger at" in findings(path)["open"]


def test_the_doctor_tells_of_a_gap(guard: Guard, tmp_path: Path) -> None:
    """After a restore the time that nobody remembers is told by doctor and brief."""
    path = tmp_path / "ledger.db"
    guard(charge, 1)
    with closing(open_store(path)) as store:
        upkeep.backup(store, str(tmp_path / "copy.db"))
    upkeep.restore(str(tmp_path / "copy.db"), str(path), actor="ann")

    assert "unknown (restored from a backup)" in findings(path)["gap"]
    assert "are unknown: the ledger was restored from a backup" in read(path)
