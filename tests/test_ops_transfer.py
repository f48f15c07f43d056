"""Export and import: nothing is lost on the way, nothing known is touched, bad input imports nothing."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, SqliteStore, UsageError
from ledger_ops.reader import Reader, open_store
from ledger_ops.transfer import export, import_lines
from ledger_ops.values import Filter, Progress

HELD: list[BaseException] = []
NASTY = "=1+1\x1b[2J\u202e'\"\n"


def charge(order: Any) -> Any:
    """A tool that gives back what it got, unless the test says otherwise."""
    if HELD:
        raise HELD.pop()
    return order


def look_up(word: str) -> str:
    """A tool without limits."""
    return word


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard with calls of all ends and with text that breaks careless programs."""
    HELD.clear()
    made = Guard(tmp_path / "ledger.db", quiet=True)
    made.defaults(replay=True)
    made.policy(look_up, unlimited=True, replay=False)
    for order in (1, 1, Decimal("2.50"), NASTY, "a" * 100_000, "é"):
        made(charge, order)
    HELD.append(ValueError(NASTY))
    with pytest.raises(ValueError, match="=1"):
        made(charge, 4)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        made(charge, 5)
    with made.workflow("=w"):
        made(charge, "keyed", key={"id": 7})
    made(look_up, "x")
    made.flush()
    yield made
    made.close()


@pytest.fixture
def store(guard: Guard, tmp_path: Path) -> Iterator[SqliteStore]:
    """The same file, opened to look at."""
    with closing(open_store(tmp_path / "ledger.db")) as opened:
        yield opened


def test_import_brings_back_what_was_exported(store: SqliteStore, tmp_path: Path) -> None:
    """Every row, tally, event and sum is there again, and the guard answers as before."""
    counted = Progress()

    came = import_lines(str(tmp_path / "new.db"), export(Reader(store), progress=counted))

    with closing(open_store(tmp_path / "new.db")) as new:
        before, after = ([r._replace(holder="") for r in Reader(s).stream()] for s in (store, new))
        assert before == after
        assert Reader(store).stats() == Reader(new).stats()
        assert Reader(store).events() == Reader(new).events()
    assert (9, 8, 0) == (came.calls, came.runs, came.known)
    assert counted.total == counted.done == 9
    again = Guard(tmp_path / "new.db", quiet=True)
    again.defaults(replay=True)
    assert ["replayed", Decimal("2.50")] == list(again.call(charge, Decimal("2.50"))[:2])
    with again.workflow("=w"):
        assert "replayed" == again.call(charge, "worded anew", key={"id": 7}).kind


def test_import_touches_no_known_call(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """What is there stays as it is; a second import adds nothing; both are counted."""
    lines = list(export(Reader(store)))
    guard.retry(charge, 1)
    guard(charge, 1)
    before = (list(Reader(store).stream()), Reader(store).stats(), Reader(store).events())

    came = import_lines(store.path, lines)

    assert (0, 0, 0, 9) == came
    assert before == (list(Reader(store).stream()), Reader(store).stats(), Reader(store).events())


def test_two_ledgers_become_one(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """Calls of another file come in beside those that are there, with their sums."""
    other = Guard(tmp_path / "other.db", quiet=True)
    for order in (1, 100, 101, 101):
        other(charge, order)
    other.close()
    before = Reader(store).stats().total

    with closing(open_store(tmp_path / "other.db")) as theirs:
        came = import_lines(store.path, export(Reader(theirs)))

    after = Reader(store).stats().total
    assert (2, 1) == (came.calls, came.known)
    assert (2, 3, 2, 1) == (
        after.actions - before.actions,
        after.attempts - before.attempts,
        after.executed - before.executed,
        after.blocked - before.blocked,
    )
    assert "blocked" == Guard(store.path, quiet=True).call(charge, 100).kind


def test_a_filter_exports_a_part(store: SqliteStore) -> None:
    """Only wanted calls are in the lines; events of all others would tell too much and stay out."""
    lines = [json.loads(line) for line in export(Reader(store), Filter(wf="=w"))]

    assert [1] == [line["ledger"] for line in lines[:1]]
    assert ["=w"] == [line["wf"] for line in lines[1:]]


def test_the_table_is_safe_in_a_spreadsheet(store: SqliteStore) -> None:
    """A row for each call; no cell begins a formula, none holds an escape sequence."""
    text = "".join(export(Reader(store), form="csv"))

    head, *rows = csv.reader(io.StringIO(text))

    assert 9 == len(rows)
    assert ["call", "tool", "wf"] == head[:3]
    assert {"'=w", "default"} == {row[2] for row in rows}
    assert not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@")]
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda _: [], "nothing to import"),
        (lambda lines: lines[1:], "first line must say"),
        (lambda lines: [*lines[:3], "{", *lines[3:]], "line 4 is not"),
        (lambda lines: [*lines, "[]"], "no JSON object"),
        (lambda lines: [lines[0], lines[1].replace('"rows": [{', '"rows": [{"more": 1, ')], "line 2 is not"),
        (lambda lines: [lines[0], lines[2].replace('"run": 1, "to', '"run": "1", "to')], "its run cannot"),
        (lambda lines: [lines[0], *(n.replace('"success"', '"done"') for n in lines[1:])], "does not fit"),
    ],
)  # fmt: skip
def test_bad_input_imports_nothing(store: SqliteStore, tmp_path: Path, spoil: Any, why: str) -> None:
    """The line that is wrong is named, and the ledger is as it was: here, not even made."""
    lines = spoil(list(export(Reader(store))))

    with pytest.raises(UsageError, match=why):
        import_lines(str(tmp_path / "new.db"), lines)

    assert not (tmp_path / "new.db").exists()


def test_an_export_beside_a_writer_holds_every_call(guard: Guard, store: SqliteStore) -> None:
    """A call that runs again while it is exported is neither left out nor told twice."""
    for number in range(1200):
        guard(charge, number + 1000)
    lines = export(Reader(store))
    told = [next(lines) for _ in range(3)]
    for number in range(0, 1200, 7):
        guard.force(charge, number + 1000)
    told += list(lines)

    calls = [call["call"] for call in map(json.loads, told[1:]) if "call" in call]
    assert 9 + 1200 == len(calls) == len(set(calls))


def test_a_killed_import_goes_on_where_it_was(store: SqliteStore, tmp_path: Path) -> None:
    """Half of an import and then the whole: rows, events and sums are there once."""
    lines = list(export(Reader(store)))
    half = lines[: len(lines) // 2 + 4]

    import_lines(str(tmp_path / "new.db"), half)
    import_lines(str(tmp_path / "new.db"), lines)
    import_lines(str(tmp_path / "new.db"), lines)

    with closing(open_store(tmp_path / "new.db")) as new:
        assert Reader(store).stats() == Reader(new).stats()
        told = [(e.call, e.kind, e.at) for e in Reader(new).events()]
        assert [(e.call, e.kind, e.at) for e in Reader(store).events()] == told


def test_an_imported_call_keeps_its_timeline(guard: Guard, store: SqliteStore, tmp_path: Path) -> None:
    """Older events that came in behind newer ones are still found."""
    other = Guard(tmp_path / "other.db", quiet=True)
    other(charge, "young")
    call = other.history()[0]["call"]
    other.close()

    import_lines(str(tmp_path / "other.db"), export(Reader(store)))

    with closing(open_store(tmp_path / "other.db")) as merged:
        assert ["claimed", "success"] == [e.kind for e in Reader(merged).call(call).events]
        for record in Reader(store).stream():
            there = Reader(merged).call(record.call)
            assert [e.kind for e in Reader(store).call(record.call).events] == [e.kind for e in there.events]
