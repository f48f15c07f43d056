"""Export and import: a ledger as lines of JSON, or as a table for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

import ledger
from ledger import Run, SqliteStore, UsageError
from ledger_ops.reader import AnyStore, Reader
from ledger_ops.values import Event, Filter, Progress, add, csv_safe, iso, printable, record_dict

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
        yield json.dumps({"ledger": FORMAT, "exported": iso(reader.store.clock.wall())}) + "\n"
    for record in reader.from_the_oldest(wanted):
        values = record_dict(record)
        if form == "csv":
            cells = ((json.dumps(v) if isinstance(v, dict | list) else v) for v in map(values.get, _TABLE))
            yield _csv_line([csv_safe(printable(c, lines=True) if isinstance(c, str) else c) for c in cells])
        else:
            yield json.dumps(values | _rows_of(reader.store, record.call)) + "\n"
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


def _rows_of(store: AnyStore, call: str) -> dict[str, Any]:
    if rows := store.rows(call):
        return {"rows": [run._asdict() for run in rows]}
    found = store.browse("SELECT * FROM tallies WHERE call = ?", (call,))
    return {"tally": dict(zip(_TALLY, found[0], strict=True))} if found else {}


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
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"line {number} is not from `ledger export` ({error}); nothing was imported. "
                "Give the file as it was exported, in its JSON form"
            ) from error
        checked.write(line if line.endswith("\n") else line + "\n")
    if number == 1:
        raise UsageError("there is nothing to import: the input is empty")
    return number - 1


def _rows_in(found: dict[str, Any]) -> tuple[list[Run], tuple[Any, ...] | None, Event | None]:
    """The rows, the tally or the event that a line holds."""
    rows = [Run(**row) for row in found.get("rows", ())]
    for run in rows:
        texts = (run.call, run.tool, run.wf, run.caller, run.owner)
        numbers = (run.run, run.started, run.lease, run.mono, run.released, run.forced, run.blocked)
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int) for n in numbers):
            raise TypeError("a run has a field of the wrong type")
        if run.status not in _STATUSES or (run.status == "running") != (run.closed_by is None):
            raise ValueError(f"run {run.run} has the status {run.status!r}, which does not fit")
    tally = found.get("tally")
    event = found.get("event")
    return (
        rows,
        tuple(tally[name] for name in _TALLY) if tally is not None else None,
        Event(**event) if event is not None else None,
    )


def _import(store: SqliteStore, checked: Iterable[str], steps: Progress) -> Imported:
    sums = [0, 0, 0, 0]
    known: set[str] = set()
    batch: list[str] = []

    def write() -> None:
        lines = batch.copy()
        batch.clear()
        added, new_known = store.submit(lambda db: _insert(store, db, lines, known), durable=False)
        known.update(new_known)
        add(sums, (*added, len(new_known)))
        steps.step(len(lines))

    for line in checked:
        batch.append(line)
        if len(batch) == _BATCH:
            write()
    write()
    return Imported(*sums)


def _insert(
    store: SqliteStore, db: sqlite3.Connection, lines: Sequence[str], known: set[str]
) -> tuple[tuple[int, int, int], set[str]]:
    """One batch: its rows, its events, and what both add to the totals."""
    store._roll_forward(db)
    calls = runs = events = 0
    met: set[str] = set()
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for line in lines:
        rows, tally, event = _rows_in(json.loads(line))
        call = rows[0].call if rows else tally[0] if tally else None
        if call is not None:
            sql = "SELECT 1 FROM runs WHERE call = ?1 UNION ALL SELECT 1 FROM tallies WHERE call = ?1 LIMIT 1"
            if db.execute(sql, (call,)).fetchone():
                met.add(call)
                continue
            calls += 1
        for run in rows:
            ledger._insert_row(db, run)
            won = "success" in (run.status, run.late)
            add(sums[run.tool], (int(run is rows[0]), 1, int(won), run.blocked))
            runs += 1
        if tally:
            db.execute(f"INSERT INTO tallies VALUES ({', '.join('?' * len(tally))})", tally)
        if event and event.call not in known and event.call not in met:
            values = tuple(getattr(event, name) for name in Event.__slots__[1:])
            db.execute(ledger._INSERT_EVENT, values)
            events += 1
    for tool, added in sums.items():
        db.execute(
            "INSERT INTO totals VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (tool) DO UPDATE SET actions = actions"
            " + ?2, claims = claims + ?3, executed = executed + ?4, blocked = blocked + ?5",
            (tool, *added),
        )
    # the rows were counted here, so their events must not count again
    db.execute("UPDATE meta SET value = (SELECT COALESCE(MAX(seq), 0) FROM events) WHERE name = 'rolled'")
    return (calls, runs, events), met
