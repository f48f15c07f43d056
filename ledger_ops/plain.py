"""Looking at a ledger whose store has no SQL, such as Redis: by its own list of calls and its log of events.

Each look walks the whole list, in constant memory but for the page that is asked for; that is right for
thousands of calls and slow for millions.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from ledger import Record, Run, UsageError
from ledger_ops.reader import Reader, SliceRow, stats_from
from ledger_ops.values import Event, Filter, Found, Gap, Page, Stats, Sums, state_of
from ledger_stores.base import ServerStore


class PlainReader(Reader):
    """What there is to see through `Store.calls`, `Store.events` and `Store.totals` alone."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self._plain: ServerStore = store

    @property
    def has_log(self) -> bool:
        """Whether there is a log of all events."""
        return not self._plain.logs_by_call

    # -- calls --

    def calls(
        self,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 100,
        cursor: str | None = None,
        seconds: float | None = None,  # noqa: ARG002 - a walk has no place to go on from
    ) -> Page:
        """A page of calls, the newest run first, after them the calls of unlimited tools."""
        below = _place_of(cursor)
        fitting = (r for r, _ in self._walk(wanted) if below is None or _place(r) < below)
        page = heapq.nlargest(limit + 1, fitting, key=_place)
        more = len(page) > limit
        last = page[limit - 1] if more else None
        return Page(page[:limit], f"p{last.started}-{int(last.run > 0)}-{last.call}" if last else None)

    def from_the_oldest(self, wanted: Filter = Filter()) -> Iterator[Record]:  # noqa: B008 - frozen
        """Every wanted call in the order in which they were first made."""
        return (record for record, _ in self._walk(wanted))

    def stream(self, wanted: Filter = Filter()) -> Iterator[Record]:  # noqa: B008 - frozen
        """Every wanted call, newest first; the list of their records is held in memory."""
        return iter(sorted((r for r, _ in self._walk(wanted)), key=_place, reverse=True))

    def count(self, wanted: Filter = Filter()) -> int:  # noqa: B008 - frozen
        """How many calls are wanted."""
        return sum(1 for _ in self._walk(wanted))

    def find(self, prefix: str) -> str:
        """The one fingerprint that begins so; raises `NoSuchCall`."""
        text = self._checked(prefix)
        if self._plain.look(text) is not None:
            return text
        return self._only(text, sorted({r.call for r, _ in self._walk(Filter()) if r.call.startswith(text)}))

    def doubts(
        self,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int | None = None,
        after: tuple[int, str] | None = None,
    ) -> list[Record]:
        """Calls that wait for a person, oldest first."""
        waiting = (r for r, _ in self._walk(wanted) if state_of(r) == "in_doubt")
        found = sorted(waiting, key=lambda r: (r.started, r.call))
        return [r for r in found if after is None or (r.started, r.call) > after][:limit]

    def running(self) -> list[Record]:
        """Calls whose latest run is alive, oldest first."""
        found = (r for r, _ in self._walk(Filter()) if state_of(r) == "running")
        return sorted(found, key=lambda r: r.started)

    def _walk(self, wanted: Filter) -> Iterator[tuple[Record, list[Run]]]:
        for record, rows in self._plain.calls(tool=None, wf=wanted.wf):
            if _fits(record, wanted):
                yield record, rows

    # -- events --

    def events(
        self,
        after: int = 0,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 500,
    ) -> list[Event]:
        """What happened after that sequence number, oldest first."""
        found: list[Event] = []
        for event in self._events(after):
            if _event_fits(event, wanted):
                found.append(event)
                if len(found) == limit:
                    break
        return found

    def last_events(
        self,
        limit: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
    ) -> list[Event]:
        """The newest events, oldest first."""
        return self.look_back(limit, wanted).events

    def look_back(
        self,
        limit: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        seconds: float | None = None,
    ) -> Found:
        """The newest events, oldest first: in steps back that double, as far as the time allows."""
        deadline = None if seconds is None else time.monotonic() + seconds
        last, span = self.last_seq(), 4 * limit
        while True:
            after = max(last - span, 0)
            found = [e for e in self._events(after) if _event_fits(e, wanted)][-limit:]
            if len(found) == limit or after == 0:
                return Found(found, after)
            if deadline is not None and time.monotonic() > deadline:
                oldest = next(self._events(after), None)
                return Found(found, after, complete=False, reached=oldest.at if oldest else None)
            span *= 4

    def look_on(
        self,
        after: int,
        wanted: Filter = Filter(),  # noqa: B008 - frozen
        *,
        limit: int = 500,
        seconds: float | None = None,
    ) -> Found:
        """What happened after that number, oldest first, as far on as the time allows."""
        deadline = None if seconds is None else time.monotonic() + seconds
        found: list[Event] = []
        for number, event in enumerate(self._events(after), 1):
            after = event.seq
            if _event_fits(event, wanted):
                found.append(event)
            if len(found) == limit:
                break
            if deadline is not None and not number % 500 and time.monotonic() > deadline:
                return Found(found, after, complete=False, reached=event.at)
        return Found(found, after)

    def last_seq(self) -> int:
        """The number of the newest event, 0 if there is none."""
        return int(self.store.last_seq())  # type: ignore[union-attr]

    def slice_of_events(self, after: int, count: int) -> list[SliceRow]:
        """So many events, with the start of each run that ended."""
        found: list[SliceRow] = []
        for e in self._events(after):
            if e.tool is None and e.kind != "restored":
                continue
            started = self._start_of(e) if e.kind in ("success", "failed") else None
            found.append((e.seq, e.kind, e.at, e.tool, e.wf, e.caller, e.n, e.run, started))
            if len(found) == count:
                break
        return found

    def _start_of(self, event: Event) -> int | None:
        rows = self._plain.rows(event.call) if event.call else []
        return next((run.started for run in rows if run.run == event.run), None)

    def _events(self, after: int) -> Iterator[Event]:
        return map(_event_from, self._plain.events(after))

    def _events_of(
        self, record: Record, runs: Sequence[Run], seconds: float | None
    ) -> tuple[list[Event], bool]:
        if not self.has_log:
            return [_event_from(values) for values in self._plain.events_of(record.call)], True
        deadline = None if seconds is None else time.monotonic() + seconds
        found: list[Event] = []
        for number, event in enumerate(self._events(0), 1):
            if event.call == record.call:
                found.append(event)
            if deadline is not None and not number % 500 and time.monotonic() > deadline:
                return found, self._are_all(found, record, runs)
        return found, True

    # -- sums --

    def stats(self, wanted: Filter = Filter()) -> Stats:  # noqa: B008 - frozen
        """Sums of all calls, or of those that are wanted, and by tool."""
        if not wanted.narrows:
            return stats_from({tool: Sums(**sums) for tool, sums in self.store.totals().items()})
        tools: dict[str, Sums] = {}
        for record, rows in self._walk(wanted):
            sums = Sums(1, record.attempts, record.runs, record.blocked)
            name = "in_doubt" if state_of(record) == "in_doubt" else record.status.value
            if rows and name in ("in_doubt", "failed", "suspended", "running"):
                setattr(sums, name, 1)
            tools.setdefault(record.tool, Sums()).add(sums)
        return stats_from(tools)

    def released(self, wf: str | None = None) -> int:
        """How many calls of a workflow (None: of all) were released and have not run since."""
        return sum(record.released for record, _ in self._walk(Filter(wf=wf)))

    def gaps(self) -> list[Gap]:
        """None: such a store is restored by its own tools."""
        return []


def _place(record: Record) -> tuple[bool, int, str]:
    """Where a call stands in the list: unlimited ones last."""
    return (record.run > 0, record.started, record.call)


def _place_of(cursor: str | None) -> tuple[bool, int, str] | None:
    if cursor is None:
        return None
    started, _, rest = cursor.removeprefix("p").partition("-")
    limited, _, call = rest.partition("-")
    if not (cursor.startswith("p") and started.isdecimal() and limited in ("0", "1") and call.isalnum()):
        raise UsageError(f"{cursor!r} is no cursor; take the one that the page before gave")
    return (limited == "1", int(started), call)


def _fits(record: Record, wanted: Filter) -> bool:
    texts = (record.tool, record.args_json, record.key, record.result_json, record.error)
    return (
        _is_tool(record.tool, wanted.tool)
        and wanted.wf in (None, record.wf)
        and wanted.caller in (None, record.caller)
        and (wanted.since is None or record.started >= wanted.since)
        and (wanted.until is None or record.started < wanted.until)
        and (wanted.status is None or state_of(record) == wanted.status)
        and _has(wanted.search, *texts)
    )


def _event_from(values: dict[str, Any]) -> Event:
    return Event(**{**values, "at": _micros(values["at"])})


def _event_fits(event: Event, wanted: Filter) -> bool:
    kind = {"in_doubt": "doubt", "running": "claimed"}.get(wanted.status or "", wanted.status)
    return (
        _is_tool(event.tool, wanted.tool)
        and wanted.wf in (None, event.wf)
        and wanted.caller in (None, event.caller)
        and (wanted.since is None or event.at >= wanted.since)
        and (wanted.until is None or event.at < wanted.until)
        and kind in (None, event.kind)
        and _has(wanted.search, event.tool, event.detail)
    )


def _is_tool(name: str | None, wanted: str | None) -> bool:
    if wanted is None or name == wanted:
        return True
    return name is not None and name.partition("#")[0].endswith(f".{wanted}")


def _has(search: str | None, *texts: str | None) -> bool:
    if not search:
        return True
    ways = {search.lower(), json.dumps(search)[1:-1].lower()}
    return any(way in text.lower() for text in texts if text for way in ways)


def _micros(text: str | None) -> int:
    if text is None:
        return 0
    moment = datetime.fromisoformat(text)
    return round(moment.timestamp() * 1e6)
