"""A SQLite file as one side of a move.

It is closed by triggers, so that it is closed to every process that has it open, and costs nothing
where there are none. A claim is one guarded INSERT: it fires or it does not, in the transaction that
creates the trigger or after it, never beside it.
"""

from __future__ import annotations

import functools
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ledger
from ledger import Run, SqliteStore, StoreError
from ledger_stores.move import REFUSED_KINDS, SEALED, Entry, Mark, Tally, Whole, must_step, refuse_full
from ledger_stores.move_sql import UPSERT, SqlSide, storable

_UPSERT = f"INSERT INTO runs {UPSERT.format(', '.join('?' * len(Run._fields)))}"
#: table and operation, with what narrows it
_SEAL = (
    ("runs", "INSERT", ""),
    ("runs", "DELETE", ""),
    ("events", "INSERT", f" AND NEW.kind IN {REFUSED_KINDS}"),
)
_SHUT = tuple((table, op, "") for table in ("runs", "tallies") for op in ("INSERT", "UPDATE", "DELETE"))
_SHUT += (("events", "INSERT", ""),)


class SqliteSide(SqlSide):
    """One file."""

    def __init__(self, store: SqliteStore) -> None:
        self.store: SqliteStore = store

    def exists(self) -> bool:
        """Whether there is a ledger; never makes one."""
        return Path(self.store.path).exists() and bool(
            self.store.browse("SELECT 1 FROM sqlite_schema WHERE name = 'runs'")
        )

    def step(
        self, was: Mark | None, now: Mark, calls: Sequence[Whole] = (), entries: Sequence[Entry] = ()
    ) -> None:
        """Make these calls what they are there, append these events and set the mark: one transaction."""
        self._write(functools.partial(self._step, was, now, calls, entries), was, now)

    def unmark(self, was: Mark) -> None:
        """Take the mark away, and the triggers with it."""
        self._write(functools.partial(self._mark, was, None), was, None)

    def erase(self, was: Mark, now: Mark) -> None:
        """Take away all calls, tallies and events: one transaction."""
        self._write(functools.partial(self._erase, was, now), was, now)

    def _write(self, work: Any, was: Mark | None, now: Mark | None) -> None:
        # a copy that a power cut takes back takes its mark back too
        durable = was is None or now is None or was.role != now.role
        self.store.submit(work, durable=durable)

    def _step(
        self,
        was: Mark | None,
        now: Mark,
        calls: Sequence[Whole],
        entries: Sequence[Entry],
        db: sqlite3.Connection,
    ) -> None:
        if not self._mark(was, now, db):
            return
        if was is None and now.role == "receiving" and not _is_empty(db):
            raise refuse_full(self.address)
        db.execute("DELETE FROM meta WHERE name = 'closed'")  # for us, until we commit
        self.store._roll_forward(db)  # what a source has recorded of its own
        for whole in calls:
            self._replace(db, whole)
        for entry in entries:
            db.execute(ledger._INSERT_EVENT, tuple(map(storable, entry[1:])))
        count_in(db, [whole.rows for whole in calls])
        _close(db, now)

    def _replace(self, db: sqlite3.Connection, whole: Whole) -> None:
        self.store._discount(db, "call = :call", {"call": whole.call})
        kept = ", ".join(str(run.run) for run in whole.rows)
        db.execute(f"DELETE FROM runs WHERE call = ? AND run NOT IN ({kept})", (whole.call,))
        for run in whole.rows:  # upwards: the run that is open is the last one
            db.execute(_UPSERT, tuple(map(storable, run)))
        db.execute("DELETE FROM tallies WHERE call = ?", (whole.call,))
        if whole.tally is not None:
            insert_tally(db, tuple(map(storable, whole.tally)))
        for process in whole.processes:
            db.execute("INSERT OR IGNORE INTO processes VALUES (?, ?, ?, ?, ?, ?)", process)

    def _mark(self, was: Mark | None, now: Mark | None, db: sqlite3.Connection) -> bool:
        """Set the mark, and the triggers if it closes otherwise; False if that was done before."""
        if not must_step(_mark_in(db), was, now, self.address):
            return False
        if now is None:
            db.execute("DELETE FROM meta WHERE name = 'move'")
        else:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('move', ?)", (now.text,))
        if (was and was.refusal) != (now and now.refusal):
            for table, op, _ in _SHUT:  # all that _SEAL has too
                db.execute(f"DROP TRIGGER IF EXISTS closed_{table}_{op.lower()}")
            for statement in _triggers(now):
                db.execute(statement)
        _close(db, now)
        return True

    def _erase(self, was: Mark, now: Mark, db: sqlite3.Connection) -> None:
        if not self._mark(was, now, db):
            return
        db.execute("DELETE FROM meta WHERE name = 'closed'")
        # what was received is as if it had never been: its numbers may be used again
        [(trigger,)] = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'last_event_stays'").fetchall()
        db.execute("DROP TRIGGER last_event_stays")
        for table in ("runs", "tallies", "totals", "events"):
            db.execute(f"DELETE FROM {table}")
        db.execute(trigger)
        db.execute("UPDATE meta SET value = 0 WHERE name = 'rolled'")
        _close(db, now)


def _mark_in(db: sqlite3.Connection) -> Mark | None:
    row = db.execute("SELECT value FROM meta WHERE name = 'move'").fetchone()
    return Mark.read(row and row[0])


def _is_empty(db: sqlite3.Connection) -> bool:
    return not any(db.execute(f"SELECT 1 FROM {t} LIMIT 1").fetchone() for t in ("runs", "tallies", "events"))


def _triggers(now: Mark | None) -> list[str]:
    """What closes the file to all but a transaction that takes the word `closed` out of meta first."""
    if now is None or not now.refusal:
        return []
    text = now.refusal.replace("'", "''")
    return [
        f"CREATE TRIGGER closed_{table}_{op.lower()} BEFORE {op} ON {table}"
        f" WHEN EXISTS (SELECT 1 FROM meta WHERE name = 'closed'){narrower}"
        f" BEGIN SELECT RAISE(ABORT, '{text}'); END"
        for table, op, narrower in (_SEAL if now.role in SEALED else _SHUT)
    ]


def _close(db: sqlite3.Connection, now: Mark | None) -> None:
    if now is not None and now.refusal:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('closed', 1)")
    else:
        db.execute("DELETE FROM meta WHERE name = 'closed'")


# -- rows of another ledger, also for an import --


def insert_tally(db: sqlite3.Connection, tally: Tally) -> None:
    """Insert an unlimited tool's call."""
    db.execute(f"INSERT INTO tallies VALUES ({', '.join('?' * len(tally))})", tally)


def count_in(db: sqlite3.Connection, calls: Iterable[Sequence[Run]]) -> None:
    """Add the rows of these calls to the totals, and let no event of theirs count again."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for rows in calls:
        for place, run in enumerate(rows):
            won = "success" in (run.status, run.late)
            counts = (int(not place), 1, int(won), run.blocked)
            sums[run.tool] = [n + more for n, more in zip(sums[run.tool], counts, strict=True)]
    for tool, added in sums.items():
        db.execute(
            "INSERT INTO totals VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (tool) DO UPDATE SET actions = actions"
            " + ?2, claims = claims + ?3, executed = executed + ?4, blocked = blocked + ?5",
            (tool, *added),
        )
    newest = "(SELECT COALESCE(MAX(seq), 0) FROM events)"
    db.execute(f"UPDATE meta SET value = {newest} WHERE name = 'rolled'")


def forget_leaving(db: sqlite3.Connection) -> None:
    """Of a copy: it is not what was being moved when it was made."""
    mark = _mark_in(db)
    if mark is not None and mark.role == "leaving":
        db.execute("DELETE FROM meta WHERE name = 'move'")


def refuse_moving(db: sqlite3.Connection, address: str) -> None:
    """Raise while a ledger is being moved: what leaves no event would be missed. Inside a transaction."""
    mark = _mark_in(db)
    if mark is None or mark.role == "arrived":
        return
    what = "to" if mark.role in ("leaving", *SEALED) else "from"
    raise StoreError(
        f"{address} is part of a move {what} {mark.peer}; nothing was changed. Wait until `ledger move` has "
        "ended, or cancel it"
    )
