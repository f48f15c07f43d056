"""Export and import: a ledger as lines of JSON, or as a table for a spreadsheet."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

import ledger
from ledger import Record, Run, SqliteStore, UsageError
from ledger_ops.reader import AnyStore, Reader
from ledger_ops.values import Event, Filter, Progress, add, csv_safe, iso, printable, record_dict
from ledger_stores.move_sqlite import count_in, insert_tally, refuse_moving

FORMAT = 1
_BATCH = 500
_TABLE = (
    "call", "tool", "wf", "caller", "status", "run", "attempts", "executed", "blocked", "created", "started",
    "ended", "key", "args", "result", "error",
)  # fmt: skip
_STATUSES = frozenset({"running", "success", "failed", "suspended", "doubt"})
_TALLY = ("call", "tool", "wf", "caller", "args", "ran", "raised", "error", "created", "touched")


class Imported(NamedTuple):
    """What came in."""

    calls: int
    runs: int
    events: int
    #: calls that were there already; they were not touched
    known: int


def export(
    reader: Reader,
    wanted: Filter = Filter(),  # noqa: B008 - frozen
    *,
    form: Literal["jsonl", "csv"] = "jsonl",
    progress: Progress | None = None,
) -> Iterator[str]:
    """Lines of all wanted calls, oldest first, in constant memory; `import_lines` reads the JSON ones.

    JSON has a line for each call, as every command gives it, with its rows under "rows" (unlimited
    tools: "tally"); without a filter the events follow.  CSV has a line for each call, with no cell
    that a spreadsheet takes for a formula.
    """
    steps = progress or Progress()
    steps.total = reader.count(wanted)
    if form == "csv":
        yield _csv_line(_TABLE)
    else:
        head = {"ledger": FORMAT, "id": secrets.token_hex(8), "exported": iso(reader.store.clock.wall())}
        yield json.dumps(head) + "\n"
    for record in reader.from_the_oldest(wanted):
        values = record_dict(record)
        if form == "csv":
            cells = ((json.dumps(v) if isinstance(v, dict | list) else v) for v in map(values.get, _TABLE))
            yield _csv_line([csv_safe(printable(c, lines=True) if isinstance(c, str) else c) for c in cells])
        else:
            yield json.dumps(values | _rows_of(reader.store, record)) + "\n"
        steps.step(1)
    if form == "jsonl" and not wanted.narrows:
        after = 0
        while events := reader.events(after):
            for event in events:
                yield json.dumps({"event": {name: getattr(event, name) for name in event.__slots__}}) + "\n"
            after = events[-1].seq


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _rows_of(store: AnyStore, record: Record) -> dict[str, Any]:
    if record.run:
        return {"rows": [run._asdict() for run in store.rows(record.call)]}
    raised = record.attempts - record.runs
    values = (
        record.call, record.tool, record.wf, record.caller, record.args_json, record.runs, raised,
        record.error, record.created, record.touched,
    )  # fmt: skip
    return {"tally": dict(zip(_TALLY, values, strict=True))}


# -- import --


def import_lines(path: str, lines: Iterable[str], *, progress: Progress | None = None) -> Imported:
    """Add exported calls to the ledger at that path, which is made if there is none.

    A call that the ledger knows already stays as it is. All lines are checked first: raises
    `UsageError`, which names the line, with nothing imported.
    """
    steps = progress or Progress()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as checked:
        steps.total = _check(lines, checked)
        checked.seek(0)
        store = SqliteStore(path)
        store.quiet = True
        try:
            return _import(store, checked, steps)
        finally:
            store.close()


def _check(lines: Iterable[str], checked: IO[str]) -> int:
    """Parse every line and put it aside; how many there are."""
    number = 0
    source = iter(lines)
    while True:
        number += 1
        try:
            line = next(source, None)
            if line is None:
                break
            found = json.loads(line)
            if not isinstance(found, dict):
                raise TypeError("it is no JSON object")
            if number == 1 and found.get("ledger") != FORMAT:
                raise ValueError(f'the first line must say {{"ledger": {FORMAT}}}')
            _rows_in(found)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(
                f"line {number} is not from `ledger export` ({error}); nothing was imported. "
                "Give the file as it was exported, in its JSON form"
            ) from error
        checked.write(line if line.endswith("\n") else line + "\n")
    if number == 1:
        raise UsageError("there is nothing to import: the input is empty")
    return number - 1


def _rows_in(found: dict[str, Any]) -> tuple[list[Run], tuple[Any, ...] | None, Event | None]:
    """The rows, the tally or the event that a line holds; raises ValueError, TypeError or KeyError."""
    rows = [Run(**row) for row in found.get("rows") or ()]
    for run in rows:
        _check_fields(run._asdict(), _RUN_FIELDS)
        if run.status not in _STATUSES or (run.status == "running") != (run.closed_by is None):
            raise ValueError(f"run {run.run} has the status {run.status!r}, which does not fit")
        if run.late not in (None, "success", "failed") or run.call != rows[0].call:
            raise ValueError(f"run {run.run} has a field that does not fit")
    if len({run.run for run in rows}) < len(rows) or sum(run.status == "running" for run in rows) > 1:
        raise ValueError("two of its runs cannot both be")
    tally, event = found.get("tally"), found.get("event")
    if tally is not None:
        _check_fields(tally, _TALLY_FIELDS)
    if event is not None:
        _check_fields(event, _EVENT_FIELDS)
    return (
        rows,
        None if tally is None else tuple(tally[name] for name in _TALLY),
        None if event is None else Event(**event),
    )


def _kinds(text: str) -> dict[str, str]:
    """Fields and what each holds: c a fingerprint, t text, n a number from 0 on, p one from 1 on; ? or null."""
    return dict(pair.split(":", 1) for pair in text.split())


_RUN_FIELDS = _kinds(
    "call:c run:p tool:t wf:t caller:t owner:t key:t? args:t? matched:t? started:n lease:n mono:n status:t"
    " result:t? error:t? trace:t? ended:n? closed_by:t? released:n forced:n late:t? late_at:n? blocked:n"
)
_TALLY_FIELDS = _kinds("call:c tool:t wf:t caller:t args:t? ran:n raised:n error:t? created:n touched:n")
_EVENT_FIELDS = _kinds("seq:p call:c? run:n? kind:t at:n tool:t? wf:t? caller:t? n:n detail:t?")
_FINGERPRINT = re.compile("[0-9a-f]{8,64}")
_LARGEST = 253_402_214_400_000_000  # microseconds until the year 9999


def _check_fields(values: dict[str, Any], fields: dict[str, str]) -> None:
    for name, kind in fields.items():
        value = values[name]
        if value is None and kind.endswith("?"):
            continue
        number = isinstance(value, int) and not isinstance(value, bool)
        good = {
            "c": isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None,
            "t": isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value),
            "n": number and 0 <= value <= _LARGEST,
            "p": number and 1 <= value <= _LARGEST,
        }[kind[0]]
        if not good:
            raise TypeError(f"its {name} cannot be {str(value)[:40]!r}")


def _import(store: SqliteStore, checked: Iterable[str], steps: Progress) -> Imported:
    """Batch by batch, each in a transaction that also notes how far it got, for a repeat to go on there."""
    sums = [0, 0, 0, 0]
    known: set[str] = set()
    lines = iter(checked)
    head = json.loads(next(lines))
    mark = f"imported {head.get('id') or head.get('exported')}"
    steps.step(1)
    stored = store.browse("SELECT value FROM meta WHERE name LIKE ?", (f"{mark} %",))
    known |= {call for row in stored for call in json.loads(row[0])}
    number = 0
    while batch := list(itertools.islice(lines, _BATCH)):
        work = functools.partial(_insert, store, batch, number, mark, known)
        added, met = store.submit(work, durable=False)
        known |= met
        add(sums, added)
        number += len(batch)
        steps.step(len(batch))
    store.submit(lambda db: db.execute("DELETE FROM meta WHERE name LIKE ?", (f"{mark} %",)), durable=False)
    return Imported(*sums)


def _insert(
    store: SqliteStore, lines: Sequence[str], number: int, mark: str, known: set[str], db: sqlite3.Connection
) -> tuple[tuple[int, int, int, int], set[str]]:
    """One batch: its rows, its events, and what the rows add to the totals."""
    refuse_moving(db, store.path)
    store._roll_forward(db)
    found = db.execute("SELECT value FROM meta WHERE name = ?", (mark,)).fetchone()
    done = found[0] if found else 0  # lines of this export that came in before
    calls = runs = events = 0
    theirs: set[str] = set()
    met: set[str] = set()  # calls that were there before this export came
    came: list[list[Run]] = []
    for place, line in enumerate(lines, number + 1):
        rows, tally, event = _rows_in(json.loads(line))
        if rows and _is_there(db, "runs", rows[0].call):
            theirs.add(rows[0].call)
            met |= {rows[0].call} if place > done else set()  # else it came in with this export
            continue
        for run in rows:
            ledger._insert_row(db, run)
        came.append(rows)
        calls, runs = calls + bool(rows), runs + len(rows)
        if tally and _is_there(db, "tallies", tally[0]):
            theirs.add(tally[0])
            met |= {tally[0]} if place > done else set()
        elif tally:
            insert_tally(db, tally)
            calls += 1
        if event and place > done and event.call not in known and event.call not in met:
            db.execute(ledger._INSERT_EVENT, tuple(getattr(event, name) for name in Event.__slots__[1:]))
            events += 1
    count_in(db, came)
    if events:
        # their numbers do not follow time
        db.execute("INSERT OR REPLACE INTO meta SELECT 'imported_upto', MAX(seq) FROM events")
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (mark, max(done, number + len(lines))))
    if met:  # a repeat must know them: their events are not to come a second time
        note = (f"{mark} {number}", json.dumps(sorted(met)))
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", note)
    return (calls, runs, events, len(theirs)), met


def _is_there(db: sqlite3.Connection, table: str, call: str) -> bool:
    return db.execute(f"SELECT 1 FROM {table} WHERE call = ? LIMIT 1", (call,)).fetchone() is not None
