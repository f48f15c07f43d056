"""How SQLite and PostgreSQL are looked at for a move: by the SQL that they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ledger import Run
from ledger_stores.move import Entry, Mark, Side, Whole

COLUMNS = ", ".join(Run._fields)
EVENT_COLUMNS = ", ".join(Entry._fields)
_KEPT = ", ".join(f"{name} = excluded.{name}" for name in Run._fields[2:])
#: a row that is there keeps its place in lists
UPSERT = f"({COLUMNS}) VALUES ({{}}) ON CONFLICT (call, run) DO UPDATE SET {_KEPT}"


class SqlSide(Side):
    """The looking half."""

    def is_empty(self) -> bool:
        """Whether it holds neither a call, nor a tally, nor an event."""
        return not (self.names("", 1) or self.last_written())

    def mark(self) -> Mark | None:
        """How it stands in a move; None where it is in none."""
        found = self._browse("SELECT value FROM meta WHERE name = 'move'")
        return Mark.read(found[0][0]) if found else None

    def names(self, after: str, limit: int, wf: str | None = None) -> list[tuple[str, str]]:
        """(place, call) of calls after that place, by the row of their first run; then those with tallies."""
        scope, of = ((), "") if wf is None else ((wf,), " AND wf = ?")
        found: list[tuple[str, str]] = []
        if after[:1] != "t":
            # a call stands where its first run stands
            sql = (
                f"SELECT id, call FROM runs AS r WHERE id > ?{of} AND NOT EXISTS (SELECT 1 FROM runs AS e WHERE"
                " e.call = r.call AND e.run < r.run) ORDER BY id LIMIT ?"
            )
            rows = self._browse(sql, (int(after[1:] or 0), *scope, limit))
            found, after = [(f"r{place}", call) for place, call in rows], "t"
        sql = f"SELECT call FROM tallies WHERE call > ?{of} ORDER BY call LIMIT ?"
        tallies = self._browse(sql, (after[1:], *scope, limit - len(found)))
        return found + [(f"t{call}", call) for (call,) in tallies]

    def fetch(self, calls: Sequence[str]) -> list[Whole]:
        """Each of these calls as it is now, its rows in one view."""
        if not calls:
            return []
        marks = ", ".join("?" * len(calls))
        rows: dict[str, list[Run]] = {call: [] for call in calls}
        sql = f"SELECT {COLUMNS} FROM runs WHERE call IN ({marks}) ORDER BY call, run"
        for run in map(Run._make, self._browse(sql, calls)):
            rows[run.call].append(run)
        tallies = {
            row[0]: row for row in self._browse(f"SELECT * FROM tallies WHERE call IN ({marks})", calls)
        }
        owners = sorted({run.owner.partition(".")[0] for found in rows.values() for run in found})
        processes = {row[0]: tuple(row) for row in self._processes(owners)}
        return [
            Whole(
                call,
                found,
                tallies.get(call),
                [p for p in map(processes.get, {r.owner.partition(".")[0] for r in found}) if p],
            )
            for call, found in rows.items()
        ]

    def _processes(self, names: Sequence[str]) -> list[Any]:
        if not names:
            return []
        marks = ", ".join("?" * len(names))
        return self._browse(f"SELECT * FROM processes WHERE id IN ({marks})", names)

    def open_calls(self) -> list[str]:
        """The calls that have a RUNNING row, alive or not."""
        return [row[0] for row in self._browse("SELECT call FROM runs WHERE status = 'running' ORDER BY id")]

    def entries(self, after: int, limit: int) -> list[Entry]:
        """The events after that number, in their order."""
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        return [Entry(*row) for row in self._browse(sql, (after, limit))]

    def last_certain(self) -> int:
        """The number of the newest event that `entries` gives."""
        newest = self._browse("SELECT seq FROM events ORDER BY seq DESC LIMIT 1")
        return int(newest[0][0]) if newest else 0

    def _browse(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.store.browse(sql, values)


def storable(value: Any) -> Any:
    """A text that these databases can hold: what is no text in UTF-8 becomes a question mark."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()
    return value
