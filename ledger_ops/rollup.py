"""Figures over time, fed from the event sequence, so that a page needs no index on the claim path.

The roll-up is kept in a private temporary database that SQLite spills to disk when it grows; it goes
with the process and is read anew by the next one (about ten seconds for a million calls).
"""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ledger import StoreError
from ledger_ops.reader import Reader, SliceRow
from ledger_ops.values import add

_MINUTE = 60_000_000
_SLICE = 20_000
#: durations are counted in buckets that are a twelfth wider from one to the next, so a percentile is right to 4 %
_GROWTH = math.log(1.083)

_SCHEMA = """
CREATE TABLE minutes (minute INTEGER, tool TEXT, executed INTEGER, blocked INTEGER, failed INTEGER,
  PRIMARY KEY (minute, tool)) WITHOUT ROWID;
CREATE TABLE hours (minute INTEGER, tool TEXT, executed INTEGER, blocked INTEGER, failed INTEGER,
  PRIMARY KEY (minute, tool)) WITHOUT ROWID;
CREATE TABLE tools (tool TEXT PRIMARY KEY, executed INTEGER, blocked INTEGER, failed INTEGER) WITHOUT ROWID;
CREATE TABLE durations (tool TEXT, bucket INTEGER, n INTEGER, PRIMARY KEY (tool, bucket)) WITHOUT ROWID;
CREATE TABLE workflows (wf TEXT PRIMARY KEY, actions INTEGER, executed INTEGER, blocked INTEGER,
  failed INTEGER, last INTEGER) WITHOUT ROWID;
CREATE INDEX newest_workflow ON workflows (last);
CREATE TABLE callers (caller TEXT PRIMARY KEY, last INTEGER) WITHOUT ROWID;
"""
#: which kinds of events count as what; the rest does not show in figures over time
_COUNTED = {"success": 0, "late": 0, "resolved": 0, "ran": 0, "blocked": 1, "failed": 2, "raised": 2}


class Series(NamedTuple):
    """Figures at regular times: what began at `at[i]` and lasted `step`. UTC microseconds."""

    step: int
    at: list[int]
    executed: list[int]
    blocked: list[int]
    failed: list[int]


class ToolRow(NamedTuple):
    """One tool; durations in microseconds, None while no run of it has ended."""

    tool: str
    executed: int
    blocked: int
    failed: int
    p50: int | None
    p95: int | None


class WorkflowRow(NamedTuple):
    """One workflow; `last` is the time of its newest event in UTC microseconds."""

    wf: str
    actions: int
    executed: int
    blocked: int
    failed: int
    last: int


class Rollup:
    """Counts per minute and tool, durations, workflows and callers of one ledger. Safe under threads."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.seq = 0
        self.progress = 0.0
        self.first: int | None = None
        self.last: int | None = None
        self._restored = 0
        self._closed = False
        self._lock = threading.Lock()
        self._advancing = threading.Lock()
        # "" is a database on disk without a name; memory would hold what a million workflows need
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Give the temporary database back."""
        with self._advancing, self._lock:
            self._closed = True
            self._db.close()

    @contextmanager
    def _figures(self) -> Iterator[sqlite3.Connection]:
        """The database, for one thread at a time; raises `StoreError` when it was given back."""
        with self._lock:
            if self._closed:
                raise StoreError("these figures were given back meanwhile; ask again")
            yield self._db

    def advance(self, seconds: float) -> bool:
        """Read more of the event sequence, for at most so long; True when all of it is counted."""
        deadline = time.monotonic() + seconds
        with self._advancing:
            while True:
                target = self.reader.last_seq()
                if self.seq >= target:
                    self.progress = 1.0
                    return True
                rows = self.reader.slice_of_events(self.seq, _SLICE)
                newest = rows[-1][0] if rows else 0  # it may have come after the look at the last number
                upto = newest if len(rows) == _SLICE else max(newest, target)
                restored = max((row[0] for row in rows if row[1] == "restored"), default=0)
                if restored > self._restored:  # another history stands there now: count it from its start
                    self._restored = restored
                    self._begin_anew()
                    continue
                added = _added(row for row in rows if row[1] != "restored")
                with self._figures():
                    self._apply(added)
                    self.seq = upto
                    self.progress = min(upto / target, 1.0)
                if time.monotonic() > deadline and self.seq < target:
                    return False

    def _begin_anew(self) -> None:
        with self._figures():
            for table in ("minutes", "hours", "tools", "durations", "workflows", "callers"):
                self._db.execute(f"DELETE FROM {table}")
            self.seq, self.progress, self.first, self.last = 0, 0.0, None, None

    def _apply(self, added: _Added) -> None:
        db = self._db
        db.execute("BEGIN")
        for table, size in (("minutes", _MINUTE), ("hours", 60 * _MINUTE)):
            sums: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
            for (minute, tool), counts in added.minutes.items():
                add(sums[minute * _MINUTE // size, tool], counts)
            db.executemany(
                f"INSERT INTO {table} VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET"
                " executed = executed + ?3, blocked = blocked + ?4, failed = failed + ?5",
                ((*key, *counts) for key, counts in sums.items()),
            )
        tools: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for (_, tool), counts in added.minutes.items():
            add(tools[tool], counts)
        db.executemany(
            "INSERT INTO tools VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET executed = executed + ?2,"
            " blocked = blocked + ?3, failed = failed + ?4",
            ((tool, *counts) for tool, counts in tools.items()),
        )
        db.executemany(
            "INSERT INTO durations VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET n = n + ?3",
            ((*key, n) for key, n in added.durations.items()),
        )
        db.executemany(
            "INSERT INTO workflows VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE SET"
            " actions = actions + ?2, executed = executed + ?3, blocked = blocked + ?4, failed = failed + ?5,"
            " last = MAX(last, ?6)",
            ((wf, *counts) for wf, counts in added.workflows.items()),
        )
        db.executemany(
            "INSERT INTO callers VALUES (?1, ?2) ON CONFLICT DO UPDATE SET last = MAX(last, ?2)",
            added.callers.items(),
        )
        db.execute("COMMIT")
        times = [t for t in (self.first, self.last, *added.span) if t is not None]
        if times:
            self.first, self.last = min(times), max(times)

    # -- the figures --

    def series(self, since: int, until: int, points: int = 120, *, tool: str | None = None) -> Series:
        """Executed, blocked and failed from `since` to `until`, in at most `points` steps of whole minutes."""
        minutes = max(1, -(-(until - since) // (_MINUTE * max(points, 1))))
        minutes = next((nice for nice in _NICE_MINUTES if nice >= minutes), -(-minutes // 1440) * 1440)
        table, unit = ("hours", 60) if minutes % 60 == 0 else ("minutes", 1)
        step = minutes * _MINUTE
        begin = since // step
        size = max(-(-until // step) - begin, 1)
        figures = [[0] * size for _ in range(3)]
        sql = (
            f"SELECT minute * {unit} / {minutes}, SUM(executed), SUM(blocked), SUM(failed) FROM {table}"
            " WHERE minute >= ? AND minute < ? AND (?3 IS NULL OR tool = ?3) GROUP BY 1"
        )
        bounds = (begin * minutes // unit, (begin + size) * minutes // unit, tool)
        with self._figures() as db:
            rows = db.execute(sql, bounds).fetchall()
        for place, *counts in rows:
            for figure, count in zip(figures, counts, strict=True):
                figure[place - begin] = count
        return Series(step, [(begin + i) * step for i in range(size)], *figures)

    def tools(self) -> list[ToolRow]:
        """All tools, the busiest first."""
        with self._figures() as db:
            rows: list[Any] = db.execute(
                "SELECT * FROM tools ORDER BY executed + blocked + failed DESC, tool"
            ).fetchall()
            buckets = db.execute("SELECT * FROM durations ORDER BY tool, bucket").fetchall()
        durations: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for tool, bucket, n in buckets:
            durations[tool].append((bucket, n))
        return [
            ToolRow(tool, done, blocked, failed, *(_percentile(durations[tool], p) for p in (0.5, 0.95)))
            for tool, done, blocked, failed in rows
        ]

    def workflows(self, limit: int = 20) -> list[WorkflowRow]:
        """The workflows with the newest events."""
        return [
            WorkflowRow(*row)
            for row in self._select("SELECT * FROM workflows ORDER BY last DESC LIMIT ?", limit)
        ]

    def callers(self, limit: int = 50) -> list[str]:
        """Who asked last."""
        return [
            row[0] for row in self._select("SELECT caller FROM callers ORDER BY last DESC LIMIT ?", limit)
        ]

    def _select(self, sql: str, limit: int) -> list[Any]:
        with self._figures() as db:
            return db.execute(sql, (limit,)).fetchall()


_NICE_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440)


class _Added:
    """What a slice of events adds to the figures."""

    def __init__(self) -> None:
        self.minutes: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        self.durations: dict[tuple[str, int], int] = defaultdict(int)
        #: actions, executed, blocked, failed, last
        self.workflows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
        self.callers: dict[str, int] = {}
        self.span: tuple[int | None, int | None] = (None, None)


def _added(rows: Iterable[SliceRow]) -> _Added:
    added = _Added()
    oldest = newest = None
    for _, kind, at, tool, wf, caller, n, run, started in rows:
        workflow = added.workflows[wf]
        workflow[4] = max(workflow[4], at)
        added.callers[caller] = at
        place = _COUNTED.get(kind)
        if place is not None:
            added.minutes[at // _MINUTE, tool][place] += n
            workflow[place + 1] += n
        elif kind == "claimed" and run == 1:
            workflow[0] += 1
        if started is not None and at > started:
            added.durations[tool, round(math.log(at - started) / _GROWTH)] += 1
        oldest = at if oldest is None else min(oldest, at)
        newest = at if newest is None else max(newest, at)
    added.span = (oldest, newest)
    return added


def _percentile(buckets: list[tuple[int, int]], share: float) -> int | None:
    wanted = share * sum(n for _, n in buckets)
    seen = 0
    for bucket, n in buckets:
        seen += n
        if seen >= wanted:
            return round(math.exp(bucket * _GROWTH))
    return None
