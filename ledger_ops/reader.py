"""Looking at a ledger: pages of calls, one call, events, sums. Nothing here writes or creates a file."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ledger
import ledger_stores as stores
from ledger import Record, Run, SqliteStore, Status, StoreError, UsageError
from ledger_ops.values import (
    Detail,
    Event,
    Filter,
    Found,
    Gap,
    Page,
    State,
    Stats,
    Sums,
    clock,
    decode,
    state_of,
)
from ledger_stores.base import ServerStore, without_password

#: what can be looked at by the SQL that SQLite and PostgreSQL have in common; marks are `?` or `:name`
AnyStore = SqliteStore | ServerStore

_COLUMNS = ", ".join(f"r.{name}" for name in Run._fields)
_EVENT_COLUMNS = "seq, call, run, kind, at, tool, wf, caller, n, detail"
#: a call stands where its latest run stands
_LATEST = "NOT EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND l.run > r.run)"
_FIRST = "(r.run = 1 OR NOT EXISTS (SELECT 1 FROM runs AS f WHERE f.call = r.call AND f.run < r.run))"
_FIRST_WINDOW, _SEARCH_WINDOW, _LAST_WINDOW = 5_000, 20_000, 80_000
#: how far the clocks of two writers may differ before a timeline misses an event
_CLOCK_SLACK = 3_600_000_000


class NoLedger(StoreError):
    """There is no ledger at that path."""


class NoSuchCall(UsageError):
    """No call has that fingerprint, or several begin with it."""


def url_of(url: str | os.PathLike[str] | None = None) -> str:
    """What a guard takes: the path of a file, or a server's URL (None: LEDGER_DB, else ./ledger.db)."""
    text = _text_of(url)
    is_server = "://" in text and text.partition("://")[0] not in ("sqlite", "memory")
    return text if is_server else str(path_of(text))


def open_ledger(url: str | os.PathLike[str] | None = None) -> AnyStore:
    """The ledger of a path or any URL (None: LEDGER_DB, else ./ledger.db), which must exist.

    Raises as `open_store` does.
    """
    text = url_of(url)
    if "://" not in text:
        return open_store(text)
    store = stores.open_store(text)
    assert isinstance(store, ServerStore)  # noqa: S101 - all that have a URL are
    store.check()
    return store


def reader_of(store: AnyStore) -> Reader:
    """What looks at that store: by SQL where it has any, else by walking its calls."""
    if isinstance(store, SqliteStore) or store.speaks_sql:
        return Reader(store)
    from ledger_ops.plain import PlainReader

    return PlainReader(store)


def open_store(url: str | os.PathLike[str] | None = None) -> SqliteStore:
    """The file of a path or URL (None: LEDGER_DB, else ./ledger.db), which must exist.

    Raises `NoLedger`, and `StoreError` or `UsageError` for what cannot be read as a ledger.
    """
    path = path_of(url)
    refuse_missing(path)
    store = SqliteStore(path)
    store.quiet = True
    store.browse("SELECT 1 FROM runs LIMIT 1")
    if not store.browse("PRAGMA application_id"):
        raise NoLedger(f"{path} is empty: no guarded tool has run with it yet; run one, or name another file")
    return store


def path_of(url: str | os.PathLike[str] | None = None) -> Path:
    """The file of a path or URL (None: LEDGER_DB, else ./ledger.db), whether it is there or not.

    Raises `UsageError` for a URL that names no file.
    """
    text = _text_of(url)
    scheme, found, rest = text.partition("://")
    if found and scheme != "sqlite":
        why = "it lives in its own process" if scheme == "memory" else "it is no file"
        raise UsageError(
            f"{without_password(text)} cannot be used here: {why}; name a path or sqlite:///path"
        )
    return Path(rest.removeprefix("/") if found else text).absolute()


def _text_of(url: str | os.PathLike[str] | None) -> str:
    return os.fspath(url) if url is not None else os.environ.get("LEDGER_DB") or "ledger.db"


def refuse_missing(path: Path) -> None:
    """Raise `NoLedger` unless there is a file: looking never makes one."""
    if path.is_dir():
        raise NoLedger(f"{path} is a folder, not a ledger; name the file in it, such as {path}/ledger.db")
    if not path.exists():
        raise NoLedger(
            f"there is no ledger at {path}; name the file (or set LEDGER_DB), or run a guarded tool first"
        )


#: seq, kind, at, tool, wf, caller, n, run and, of a run that ended, when it began
SliceRow = tuple[int, str, int, Any, Any, Any, int, Any, Any]
# the start of a run is in its row, found by (call, run); for a blocked attempt it says nothing
_SLICE_OF_EVENTS = """
SELECT e.seq, e.kind, e.at, e.tool, e.wf, e.caller, e.n, e.run,
       CASE WHEN e.kind = 'success' OR e.kind = 'failed' THEN
         (SELECT r.started FROM runs AS r WHERE r.call = e.call AND r.run = e.run) END
  FROM events AS e
 WHERE e.seq > ? AND (e.tool IS NOT NULL OR e.kind = 'restored')
 ORDER BY e.seq
 LIMIT ?
"""


class Reader:
    """What there is to see in one ledger. Reads are short: none holds a transaction open between them."""

    def __init__(self, store: AnyStore) -> None:
        self.store = store

    @property
    def has_log(self) -> bool:
        """Whether there is a log of all events."""
        return True

    # -- calls --

    def calls(
        self,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 100,
        cursor: str | None = None,
        seconds: float | None = None,
    ) -> Page:
        """A page of calls, the newest run first, after them the calls of unlimited tools.

        `cursor` is that of the page before. `seconds` bounds the time: the page may then be
        short, `complete` False, and its cursor goes on where the search got to.
        Raises `UsageError` for a cursor that is none.
        """
        kind, place = _cursor(cursor)
        if kind == "t":
            return self._tally_page([], wanted, limit, place, complete=True)
        deadline = None if seconds is None else time.monotonic() + seconds
        before = int(place) if place else self._newest_id() + 1
        records: list[Record] = []
        window, reached = _FIRST_WINDOW, None
        while before > 1:
            floor, room = max(before - window, 1), limit - len(records)
            rows = self._window(wanted, floor, before, room)
            for _, run in rows:
                record = self._describe(run)
                if wanted.status is None or state_of(record) == wanted.status:
                    records.append(record)
                reached = run.started
            # a window that was cut by its limit goes on below its last row
            before = rows[-1][0] if len(rows) == room else floor
            if len(records) >= limit:
                return Page(records, f"r{before}", reached=reached)
            if before > 1 and deadline is not None and time.monotonic() > deadline:
                return Page(records, f"r{before}", complete=False, reached=self._started_at(before))
            window = min(window * 2, _LAST_WINDOW if deadline is None else _SEARCH_WINDOW)
        return self._tally_page(records, wanted, limit - len(records), "", complete=True)

    def from_the_oldest(self, wanted: Filter = Filter()) -> Iterator[Record]:  # noqa: B008 - frozen
        """Every wanted call in the order in which they were first made, in constant memory.

        A first run stays where it is, so a call that runs again meanwhile is neither missed nor told twice.
        """
        where, values = _conditions(wanted)
        first = "NOT EXISTS (SELECT 1 FROM runs AS e WHERE e.call = f.call AND e.run < f.run)"
        sql = (
            f"SELECT f.id, {_COLUMNS} FROM runs AS f JOIN runs AS r ON r.call = f.call WHERE f.id > :after AND"
            f" f.id <= :upto AND (f.run = 1 OR {first}) AND {_LATEST}{where} ORDER BY f.id"
        )
        after, newest = 0, self._newest_id()
        while after < newest:
            upto = min(after + _FIRST_WINDOW, newest)
            for row in self.store.browse(sql, {**values, "after": after, "upto": upto}):
                record = self._describe(Run._make(row[1:]))
                if wanted.status is None or state_of(record) == wanted.status:
                    yield record
            after = upto
        cursor: str | None = "t0"
        while cursor is not None:
            page = self.calls(wanted, limit=500, cursor=cursor)
            yield from page.records
            cursor = page.cursor

    def stream(self, wanted: Filter = Filter()) -> Iterator[Record]:  # noqa: B008 - frozen
        """Every wanted call, newest first, in constant memory."""
        page = self.calls(wanted, limit=500)
        yield from page.records
        while page.cursor is not None:
            page = self.calls(wanted, limit=500, cursor=page.cursor)
            yield from page.records

    def count(self, wanted: Filter = Filter()) -> int:  # noqa: B008 - frozen
        """How many calls are wanted."""
        if not wanted.narrows:
            return self.stats().total.actions
        if wanted.status in ("running", "in_doubt"):
            return sum(1 for _ in self.stream(wanted))
        where, values = _conditions(wanted)
        # all runs of a call share its tool and workflow, so its first one stands for it at less cost
        same = wanted == Filter(tool=wanted.tool, wf=wanted.wf)
        one = _FIRST if same else _LATEST
        found = self.store.browse(f"SELECT COUNT(*) FROM runs AS r WHERE {one}{where}", values)[0][0]
        tally_where, tally_values = _tally_conditions(wanted)
        return int(found) + int(
            self.store.browse(f"SELECT COUNT(*) FROM tallies WHERE {tally_where}", tally_values)[0][0]
        )

    def find(self, prefix: str) -> str:
        """The one fingerprint that begins so; raises `NoSuchCall`."""
        text = self._checked(prefix)
        bounds = (text, text + "g")
        found: set[str] = set()  # a tool that was unlimited once has calls in both
        for table in ("runs", "tallies"):
            sql = f"SELECT DISTINCT call FROM {table} WHERE call >= ? AND call < ? LIMIT 5"
            found |= {row[0] for row in self.store.browse(sql, bounds)}
        return self._only(text, sorted(found))

    def _checked(self, prefix: str) -> str:
        text = prefix.strip().lower()
        if not text or any(c not in "0123456789abcdef" for c in text):
            raise NoSuchCall(
                f"{prefix!r} is no fingerprint: it has digits and a to f; `ledger show` lists them"
            )
        return text

    def _only(self, text: str, found: Sequence[str]) -> str:
        if not found:
            raise NoSuchCall(f"no call begins with {text}; `ledger show` lists them")
        if len(found) > 1:
            shown = ", ".join(call[: len(text) + 6] for call in found[:4])
            raise NoSuchCall(f"several calls begin with {text}: {shown} …; give more of it")
        return found[0]

    def call(self, prefix: str, *, seconds: float | None = None) -> Detail:
        """All that is known of one call, by its fingerprint or a unique beginning; raises `NoSuchCall`."""
        call = self.find(prefix)
        record = self.store.look(call)
        if record is None:  # reset a moment ago
            raise NoSuchCall(f"no call begins with {prefix}; `ledger show` lists them")
        runs = self.store.rows(call)
        events, complete = self._events_of(record, runs, seconds)
        return Detail(record, runs, events, self.verdict(record, runs), complete)

    def verdict(self, record: Record, runs: Sequence[Run]) -> str:
        """What the next identical call would get, as far as the ledger tells: policies live in the program."""
        if not runs:
            return "would run: its tool is unlimited, its calls are counted and never blocked"
        latest = runs[-1]
        if record.status is Status.RUNNING and not record.in_doubt:
            return (
                f"would be blocked: run {latest.run} is running in {record.holder} since {clock(latest.started)} "
                "(with replay=True it waits)"
            )
        counted = [run for run in runs if run.succeeded_since(-1)]
        if counted:
            won = counted[-1]
            ended = won.ended if won.status == "success" else won.late_at
            return (
                f"would be blocked: run {won.run} succeeded at {clock(ended or won.started)} "
                "(unless its policy has a larger max=, or a ttl= that is over)"
            )
        if record.released:
            return f"would run: run {latest.run} was released"
        if state_of(record) == "in_doubt":
            return (
                f"would run again, because run {latest.run} ended without a known outcome; with "
                'irreversible=True or on_doubt="block" it raises InDoubt until somebody resolves it'
            )
        ended_as = {"failed": "failed", "suspended": "suspended itself"}.get(latest.status, latest.status)
        return f"would run: run {latest.run} {ended_as}"

    def doubts(
        self,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int | None = None,
        after: tuple[int, str] | None = None,
    ) -> list[Record]:
        """Calls that wait for a person, oldest first: in doubt and not released, or their owner is over.

        `after` is the start and the call of the last one that is known.
        """
        where, values = _conditions(wanted)
        doubtful = (
            f"SELECT {_COLUMNS} FROM runs AS r INDEXED BY open_ends WHERE r.status <> 'running' AND"
            f" r.status <> 'success' AND r.status = 'doubt' AND r.released = 0 AND {_LATEST}{where}"
        )
        running = f"SELECT {_COLUMNS} FROM runs AS r WHERE r.status = 'running'{where}"
        rows = self.store.browse(doubtful, values) + self.store.browse(running, values)
        runs = sorted(map(Run._make, rows), key=lambda run: (run.started, run.call))
        records = (self._describe(r) for r in runs if after is None or (r.started, r.call) > after)
        waiting = (record for record in records if record.in_doubt and state_of(record) == "in_doubt")
        return list(itertools.islice(waiting, limit))

    def running(self) -> list[Record]:
        """Calls whose latest run is alive, oldest first."""
        sql = f"SELECT {_COLUMNS} FROM runs AS r WHERE r.status = 'running' ORDER BY r.started"
        records = map(self._describe, map(Run._make, self.store.browse(sql)))
        return [record for record in records if not record.in_doubt]

    # -- events --

    def events(
        self,
        after: int = 0,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 500,
    ) -> list[Event]:
        """What happened after that sequence number, oldest first; read by sequence, never the whole table."""
        where, values = _event_conditions(wanted)
        sql = f"SELECT {_EVENT_COLUMNS} FROM events WHERE seq > :after{where} ORDER BY seq LIMIT :limit"
        rows = self.store.browse(sql, {**values, "after": after, "limit": limit})
        return [Event(*row) for row in rows]

    def last_events(
        self,
        limit: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
    ) -> list[Event]:
        """The newest events, oldest first."""
        where, values = _event_conditions(wanted)
        sql = f"SELECT {_EVENT_COLUMNS} FROM events WHERE 1 = 1{where} ORDER BY seq DESC LIMIT :limit"
        return [Event(*row) for row in reversed(self.store.browse(sql, {**values, "limit": limit}))]

    def look_back(
        self,
        limit: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        seconds: float | None = None,
    ) -> Found:
        """The newest events, oldest first, as far back as the time allows."""
        deadline = None if seconds is None else time.monotonic() + seconds
        where, values = _event_conditions(wanted)
        before, found, reached = self.last_seq() + 1, list[Event](), None
        while before > 0 and len(found) < limit:
            first = self._seq_before(before, _SEARCH_WINDOW)
            sql = (
                f"SELECT {_EVENT_COLUMNS} FROM events WHERE seq < :before AND seq >= :first{where}"
                " ORDER BY seq DESC LIMIT :limit"
            )
            scope = {"before": before, "first": first, "limit": limit - len(found)}
            found += [Event(*row) for row in self.store.browse(sql, {**values, **scope})]
            before = first
            if before > 0 and deadline is not None and time.monotonic() > deadline and len(found) < limit:
                reached = self._time_of(before)
                return Found(found[::-1], before, complete=False, reached=reached)
        return Found(found[::-1], before)

    def look_on(
        self,
        after: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 500,
        seconds: float | None = None,
    ) -> Found:
        """What happened after that number, oldest first, as far on as the time allows; `upto` goes on."""
        deadline = None if seconds is None else time.monotonic() + seconds
        where, values = _event_conditions(wanted)
        last, found = self.last_seq(), list[Event]()
        while after < last:
            upto = self._seq_after(after, _SEARCH_WINDOW) or last
            sql = (
                f"SELECT {_EVENT_COLUMNS} FROM events WHERE seq > :after AND seq <= :upto{where}"
                " ORDER BY seq LIMIT :limit"
            )
            scope = {"after": after, "upto": upto, "limit": limit - len(found)}
            found += [Event(*row) for row in self.store.browse(sql, {**values, **scope})]
            if len(found) >= limit:
                return Found(found, found[-1].seq)
            after = upto
            if after < last and deadline is not None and time.monotonic() > deadline:
                return Found(found, after, complete=False, reached=self._time_of(after))
        return Found(found, max(after, last))

    def _seq_before(self, before: int, count: int) -> int:
        """The number of the event that came so many events earlier, 0 before the first."""
        sql = "SELECT seq FROM events WHERE seq < ? ORDER BY seq DESC LIMIT 1 OFFSET ?"
        rows = self.store.browse(sql, (before, count - 1))
        return int(rows[0][0]) if rows else 0

    def _time_of(self, seq: int) -> int | None:
        rows = self.store.browse("SELECT at FROM events WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,))
        return rows[0][0] if rows else None

    def last_seq(self) -> int:
        """The number of the newest event, 0 if there is none."""
        return int(self.store.browse("SELECT COALESCE(MAX(seq), 0) FROM events")[0][0])

    def _events_of(
        self, record: Record, runs: Sequence[Run], seconds: float | None
    ) -> tuple[list[Event], bool]:
        """The events of one call, and whether that is all of them.

        There is no index for them: their time says where to look, and the rows say when all are found.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        imported = int(self._meta("imported_upto") or 0)  # up to there, numbers do not follow time
        after, last = 0 if imported else self._begin(record, 1), self.last_seq()
        found: list[Event] = []
        while after < last:
            upto = self._seq_after(after, _SEARCH_WINDOW) or last
            sql = f"SELECT {_EVENT_COLUMNS} FROM events WHERE seq > ? AND seq <= ? AND call = ? ORDER BY seq"
            found += [Event(*row) for row in self.store.browse(sql, (after, upto, record.call))]
            after = upto
            if imported and after >= imported:
                after, imported = max(after, self._begin(record, imported + 1)), 0
            if self._are_all(found, record, runs):
                break
            if after < last and deadline is not None and time.monotonic() > deadline:
                return found, False
        return found, True

    def _are_all(self, events: Sequence[Event], record: Record, runs: Sequence[Run]) -> bool:
        """Whether every run and every blocked attempt has its event; what was released or late may have more."""
        told = {(event.run, event.kind) for event in events}
        blocked = sum(event.n for event in events if event.kind == "blocked")
        return blocked == record.blocked and all(
            (run.run, "claimed") in told
            and (run.run, run.status) in told
            and not run.released
            and run.late is None
            for run in runs
        )

    def slice_of_events(self, after: int, count: int) -> list[SliceRow]:
        """So many events for a roll-up, with the start of each run that ended."""
        return self.store.browse(_SLICE_OF_EVENTS, (after, count))

    def _begin(self, record: Record, low: int) -> int:
        return self._seq_at(record.created - _CLOCK_SLACK, low) - 1

    def _meta(self, name: str) -> Any:
        rows = self.store.browse("SELECT value FROM meta WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def _seq_after(self, after: int, count: int) -> int | None:
        """The number of the event that comes so many events later; on a server numbers have wide gaps."""
        sql = "SELECT seq FROM events WHERE seq > ? ORDER BY seq LIMIT 1 OFFSET ?"
        rows = self.store.browse(sql, (after, count - 1))
        return int(rows[0][0]) if rows else None

    def _seq_at(self, moment: int, low: int) -> int:
        """About the first event at or after that time, by bisection: numbers follow time but for clock steps."""
        high = self.last_seq()
        while low < high:
            middle = (low + high) // 2
            row = self.store.browse(
                "SELECT seq, at FROM events WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,)
            )
            if row and row[0][1] < moment:
                low = row[0][0] + 1
            else:
                high = middle
        return int(low)

    # -- sums --

    def stats(self, wanted: Filter = Filter()) -> Stats:  # noqa: B008 - frozen
        """Sums of all calls, or of the runs that are wanted (by when they started), and by tool.

        With a status: of all runs of the calls that stand so.
        """
        if not wanted.narrows:
            return stats_from({tool: Sums(**sums) for tool, sums in self.store.totals().items()})
        if wanted.status in ("running", "in_doubt"):
            return self._stats_of_few(wanted)
        where, values = _conditions(replace(wanted, status=None))
        if wanted.status is not None:
            latest = "NOT EXISTS (SELECT 1 FROM runs AS m WHERE m.call = l.call AND m.run > l.run)"
            stands = _stands(wanted.status, "l.")
            where += f" AND EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND {stands} AND {latest})"
        tools: dict[str, Sums] = {}
        sql = (
            f"SELECT r.tool, COUNT(*) FILTER (WHERE {_FIRST}), COUNT(*),"
            " COUNT(*) FILTER (WHERE r.status = 'success' OR r.late = 'success'), SUM(r.blocked)"
            f" FROM runs AS r WHERE 1 = 1{where} GROUP BY r.tool"
        )
        for tool, actions, claims, executed, blocked in self.store.browse(sql, values):
            tools[tool] = Sums(actions, claims + blocked, executed, blocked)
        self._add_ends(tools, where, values)
        tally_where, tally_values = _tally_conditions(wanted)
        sql = (
            "SELECT tool, COUNT(*), SUM(ran + raised), SUM(ran) FROM tallies"
            f" WHERE {tally_where} GROUP BY tool"
        )
        for tool, actions, attempts, executed in self.store.browse(sql, tally_values):
            tools.setdefault(tool, Sums()).add(Sums(actions, attempts, executed))
        return stats_from(tools)

    def _stats_of_few(self, wanted: Filter) -> Stats:
        """Sums of calls that run or are in doubt, which rows alone do not tell apart."""
        tools: dict[str, Sums] = {}
        for record in self.stream(wanted):
            sums = Sums(1, record.attempts, record.runs, record.blocked)
            setattr(sums, str(wanted.status), 1)
            tools.setdefault(record.tool, Sums()).add(sums)
        return stats_from(tools)

    def _add_ends(self, tools: dict[str, Sums], where: str, values: dict[str, Any]) -> None:
        """What needs a look at the latest run: few rows, found by their own index."""
        sql = (
            "SELECT r.tool, r.status, COUNT(*) FROM runs AS r INDEXED BY open_ends WHERE r.status <> 'running'"
            " AND r.status <> 'success' AND (r.status <> 'doubt' OR r.released = 0 AND COALESCE(r.late, '') <> 'success')"
            f" AND {_LATEST}{where} GROUP BY r.tool, r.status"
        )
        for tool, status, n in self.store.browse(sql, values):
            name = "in_doubt" if status == "doubt" else status
            tools.setdefault(tool, Sums()).add(Sums(**{name: n}))
        running = f"SELECT {_COLUMNS} FROM runs AS r WHERE r.status = 'running'{where}"
        for run in map(Run._make, self.store.browse(running, values)):
            name = "in_doubt" if self.store.is_over(run) else "running"
            tools.setdefault(run.tool, Sums()).add(Sums(**{name: 1}))

    def tools(self) -> list[str]:
        """Full names of all tools that were called."""
        return sorted(self.store.totals())

    def released(self, wf: str | None = None) -> int:
        """How many calls of a workflow (None: of all) were released and have not run since."""
        where, values = _conditions(Filter(wf=wf))
        sql = f"SELECT COUNT(*) FROM runs AS r WHERE r.released = 1 AND {_LATEST}{where}"
        return int(self.store.browse(sql, values)[0][0])

    def gaps(self) -> list[Gap]:
        """Spans of time whose calls are unknown here, because the ledger was restored from a backup."""
        return [Gap(*pair) for pair in decode(self._meta("gaps")) or ()]

    # -- parts --

    def _newest_id(self) -> int:
        return int(self.store.browse("SELECT COALESCE(MAX(id), 0) FROM runs")[0][0])

    def _window(self, wanted: Filter, floor: int, before: int, limit: int) -> list[tuple[int, Run]]:
        where, values = _conditions(wanted)
        sql = (
            f"SELECT r.id, {_COLUMNS} FROM runs AS r WHERE r.id >= :floor AND r.id < :before"
            f"{where} AND {_LATEST} ORDER BY r.id DESC LIMIT :limit"
        )
        rows = self.store.browse(sql, {**values, "floor": floor, "before": before, "limit": limit})
        return [(row[0], Run._make(row[1:])) for row in rows]

    def _started_at(self, before: int) -> int | None:
        rows = self.store.browse("SELECT started FROM runs WHERE id >= ? ORDER BY id LIMIT 1", (before,))
        return rows[0][0] if rows else None

    def _describe(self, run: Run) -> Record:
        return self.store.describe([run] if run.run == 1 else self.store.rows(run.call) or [run])

    def _tally_page(
        self, records: list[Record], wanted: Filter, limit: int, after: str, *, complete: bool
    ) -> Page:
        where, values = _tally_conditions(wanted)
        sql = f"SELECT * FROM tallies WHERE {where} AND call > :after ORDER BY call LIMIT :limit"
        rows = self.store.browse(sql, {**values, "after": after, "limit": limit})
        found = [ledger._record_of_tally(row) for row in rows]
        cursor = f"t{found[-1].call}" if found and len(found) == limit else None
        return Page(records + found, cursor, complete)


def _cursor(cursor: str | None) -> tuple[str, str]:
    if cursor is None:
        return "r", ""
    kind, place = cursor[:1], cursor[1:]
    if (kind == "r" and place.isdecimal() and len(place) < 19) or (kind == "t" and place.isalnum()):
        return kind, place
    raise UsageError(f"{cursor!r} is no cursor; take the one that the page before gave")


def stats_from(tools: dict[str, Sums]) -> Stats:
    """The sums of each tool, and of all."""
    total = Sums()
    for sums in tools.values():
        total.add(sums)
    return Stats(total, dict(sorted(tools.items())))


# -- the conditions of a filter: SQL that narrows, and its values --


def _conditions(wanted: Filter) -> tuple[str, dict[str, Any]]:
    parts, values = _common(wanted, "r.")
    if wanted.since is not None:
        parts.append("r.started >= :since")
    if wanted.until is not None:
        parts.append("r.started < :until")
    if wanted.status is not None:
        parts.append(_stands(wanted.status, "r."))
    if wanted.search:
        parts.append(
            _contains(wanted.search, *(f"r.{name}" for name in ("tool", "args", "key", "result", "error")))
        )
    return "".join(f" AND {part}" for part in parts), values


def _stands(status: State, r: str) -> str:
    """That the latest run of a call makes it stand so; whose owner is over only the store can tell."""
    late = f"{r}late = 'success'"
    return {
        "running": f"{r}status = 'running'",
        "success": f"({r}status = 'success' OR {r}status = 'doubt' AND {late})",
        "failed": f"({r}status = 'failed' OR {r}status = 'doubt' AND {r}released = 1 AND COALESCE({r}late, '') <> 'success')",
        "suspended": f"{r}status = 'suspended'",
        "in_doubt": f"({r}status = 'running' OR {r}status = 'doubt' AND {r}released = 0 AND COALESCE({r}late, '') <> 'success')",
    }[status]


def _contains(text: str, *columns: str) -> str:
    """That a column has the text, as it is or as JSON writes it."""
    ways = (":search",) if json.dumps(text)[1:-1] == text else (":search", ":search_json")
    marks = (f"{name} LIKE {way} ESCAPE '\\'" for name in columns for way in ways)
    return f"({' OR '.join(marks)})"


def _event_conditions(wanted: Filter) -> tuple[str, dict[str, Any]]:
    parts, values = _common(wanted, "")
    if wanted.since is not None:
        parts.append("at >= :since")
    if wanted.until is not None:
        parts.append("at < :until")
    if wanted.status is not None:
        values["status"] = {"in_doubt": "doubt", "running": "claimed"}.get(wanted.status, wanted.status)
        parts.append("kind = :status")
    if wanted.search:
        parts.append(_contains(wanted.search, "tool", "detail"))
    return "".join(f" AND {part}" for part in parts), values


def _tally_conditions(wanted: Filter) -> tuple[str, dict[str, Any]]:
    parts, values = _common(wanted, "")
    if wanted.since is not None:
        parts.append("touched >= :since")
    if wanted.until is not None:
        parts.append("created < :until")
    if wanted.status is not None:
        parts.append({"success": "error IS NULL", "failed": "error IS NOT NULL"}.get(wanted.status, "1 = 0"))
    if wanted.search:
        parts.append(_contains(wanted.search, "tool", "args", "error"))
    return " AND ".join(parts) or "1 = 1", values


def _common(wanted: Filter, r: str) -> tuple[list[str], dict[str, Any]]:
    parts: list[str] = []
    values: dict[str, Any] = {}
    for name in ("wf", "caller"):
        if getattr(wanted, name) is not None:
            parts.append(f"{r}{name} = :{name}")
            values[name] = getattr(wanted, name)
    if wanted.tool is not None:  # the full name, or what follows its last dot
        parts.append(
            f"({r}tool = :tool OR substr({r}tool, length({r}tool) - length(:dotted) + 1) = :dotted OR"
            f" replace({r}tool, :dotted || '#', '') <> {r}tool)"
        )
        values |= {"tool": wanted.tool, "dotted": f".{wanted.tool}"}
    for name in ("since", "until"):
        if getattr(wanted, name) is not None:
            values[name] = getattr(wanted, name)
    if wanted.search:
        written = json.dumps(wanted.search)[1:-1]
        for name, text in (("search", wanted.search), ("search_json", written)):
            escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            values[name] = f"%{escaped}%"
    return parts, values
