"""What the reading side speaks in: a filter, a page, an event, a finding; times and safe text for people."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from ledger import Record, Run, UsageError

State = Literal["running", "success", "failed", "suspended", "in_doubt"]
STATES: tuple[State, ...] = ("running", "success", "failed", "suspended", "in_doubt")

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which calls or events are wanted; what is None does not narrow. Times are UTC microseconds."""

    #: full name, or the short one that people are shown
    tool: str | None = None
    status: State | None = None
    wf: str | None = None
    caller: str | None = None
    #: started (of an event: happened) at or after this
    since: int | None = None
    #: … and before this
    until: int | None = None
    #: text in arguments, key, result, error or the tool's name
    search: str | None = None

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in STATES:
            raise UsageError(f"{self.status!r} is no status; it is one of {', '.join(STATES)}")
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise UsageError("since is not before until, so nothing can lie between; swap them")
        for text in (self.tool, self.wf, self.caller, self.search):
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise UsageError(
                    f"{text!r} is no text in UTF-8, so nothing has it; write it in that encoding"
                )

    @property
    def narrows(self) -> bool:
        """Whether anything is asked for at all."""
        return self != Filter()


@dataclass(frozen=True, slots=True)
class Page:
    """Some calls, newest first."""

    records: list[Record]
    #: where the next page begins; None after the last call
    cursor: str | None
    #: False if the time that was allowed ended before the page was full
    complete: bool = True
    #: how far back the search got: the start of the oldest run that was looked at
    reached: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `n` times where blocked attempts are told together."""

    seq: int
    call: str | None
    run: int | None
    kind: str
    at: int
    tool: str | None
    wf: str | None
    caller: str | None
    n: int
    detail: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values, the time as ISO 8601."""
        return {name: getattr(self, name) for name in self.__slots__} | {"at": iso(self.at)}


@dataclass(frozen=True, slots=True)
class Found:
    """Some events, oldest first."""

    events: list[Event]
    #: the number up to which (looking back: from which) was looked
    upto: int
    #: False if the time that was allowed ended before enough was found
    complete: bool = True
    #: the time up to which was looked then
    reached: int | None = None


@dataclass(frozen=True, slots=True)
class Detail:
    """All that is known of one call."""

    record: Record
    #: oldest first
    runs: list[Run]
    #: oldest first
    events: list[Event]
    #: what the next identical call would get
    verdict: str
    #: False if the time that was allowed ended before all events were seen
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        runs = [run_dict(run) for run in self.runs]
        events = [event.to_dict() for event in self.events]
        return {**record_dict(self.record), "history": runs, "events": events, "verdict": self.verdict}


@dataclass(slots=True)
class Sums:
    """What a set of calls adds up to."""

    actions: int = 0
    attempts: int = 0
    executed: int = 0
    blocked: int = 0
    failed: int = 0
    in_doubt: int = 0
    suspended: int = 0
    running: int = 0

    def add(self, other: Sums) -> None:
        """Add the sums of another set."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def duplicate_rate(self) -> float:
        """Blocked attempts as a share of all attempts, 0 to 1."""
        return self.blocked / self.attempts if self.attempts else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        rate = round(self.duplicate_rate, 4)
        return {name: getattr(self, name) for name in self.__slots__} | {"duplicate_rate": rate}


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over all calls that were wanted, and by tool (full name)."""

    total: Sums
    tools: dict[str, Sums]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {**self.total.to_dict(), "tools": {tool: sums.to_dict() for tool, sums in self.tools.items()}}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `doctor` looked at."""

    name: str
    ok: bool
    #: what was found
    what: str
    #: what to do about it; empty where all is well
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Gap:
    """A time whose calls are unknown: the ledger was restored from a backup. UTC microseconds."""

    since: int
    until: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {"since": iso(self.since), "until": iso(self.until)}


@dataclass(slots=True)
class Progress:
    """How far a long piece of work has got; `tell` is called after each step."""

    total: int = 0
    done: int = 0
    tell: Any = field(default=None, repr=False)

    def step(self, count: int) -> None:
        """Count what was done."""
        self.done += count
        if self.tell is not None:
            self.tell(self)


# -- JSON --


def iso(micros: int | None) -> str | None:
    """A recorded time as ISO 8601 text in UTC, with microseconds."""
    return None if micros is None else _moment(micros).isoformat(timespec="microseconds")


def record_dict(record: Record) -> dict[str, Any]:
    """A call as every command and page gives it; times are ISO 8601, secrets stay masked."""
    return {
        "call": record.call,
        "tool": record.tool,
        "name": record.short,
        "wf": record.wf,
        "caller": record.caller,
        "status": state_of(record),
        "run": record.run,
        "key": decode(record.key),
        "args": decode(record.args_json),
        "result": decode(record.result_json),
        "error": record.error,
        "attempts": record.attempts,
        "executed": record.runs,
        "blocked": record.blocked,
        "created": iso(record.created),
        "started": iso(record.started),
        "ended": iso(record.ended),
        "touched": iso(record.touched),
        "lease": iso(record.lease),
        "released": record.released,
        "late": record.late,
        "holder": record.holder,
    }


def run_dict(run: Run) -> dict[str, Any]:
    """One run of a call."""
    return {
        "run": run.run,
        "status": run.status,
        "caller": run.caller,
        "owner": run.owner,
        "started": iso(run.started),
        "ended": iso(run.ended),
        "seconds": None if run.ended is None else round((run.ended - run.started) / 1e6, 6),
        "args": decode(run.args),
        "result": decode(run.result),
        "error": run.error,
        "trace": run.trace,
        "released": bool(run.released),
        "forced": bool(run.forced),
        "late": run.late,
        "late_at": iso(run.late_at),
        "blocked": run.blocked,
    }


def decode(text: str | None) -> Any:
    """What a JSON column holds; the text itself where it is no JSON (somebody else wrote it)."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def state_of(record: Record) -> str:
    """The status by its name in filters and lists.

    A run whose owner is over is in doubt. A doubt that was released counts as failed, because it runs
    again; one whose success came late as success, because it does not.
    """
    if record.status.value != "doubt":
        return "in_doubt" if record.in_doubt and not record.released else record.status.value
    if record.late == "success":
        return "success"
    return "failed" if record.released else "in_doubt"


def add(sums: list[int], counts: Sequence[int]) -> None:
    """Add to each of several sums."""
    for i, count in enumerate(counts):
        sums[i] += count


# -- times --


def parse_span(text: str) -> int:
    """Microseconds of "90s", "2h", "30d" or "1h30m"; raises `UsageError`."""
    parts = _SPAN.findall(text)
    if not parts or _SPAN.sub("", text).strip():
        raise UsageError(f"{text!r} is no span of time; write it like 90s, 15m, 2h, 30d or 1h30m")
    return round(sum(float(number) * _UNITS[unit] for number, unit in parts) * 1e6)


def parse_time(text: str, now: int | None = None) -> int:
    """UTC microseconds of an ISO 8601 time (without a zone: local time), or of a span ago ("2h")."""
    if _SPAN.match(text.strip()):
        return (time.time_ns() // 1000 if now is None else now) - parse_span(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"{text!r} is no time; write 2h (two hours ago), 2026-05-01 or 2026-05-01T14:30"
        ) from None
    return round(moment.timestamp() * 1e6)


def _moment(micros: int) -> datetime:
    """A time; what lies outside of the calendar is shown as its end."""
    bounded = min(max(micros, -62_135_510_400_000_000), 253_402_214_400_000_000)
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=bounded)


def clock(micros: int) -> str:
    """A time for people: local, to the second, with its zone."""
    return f"{_moment(micros).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def span(micros: float) -> str:
    """A duration for people: "340 ms", "2.4 s", "3 min", "5 h", "12 d"."""
    seconds = micros / 1e6
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else f"{micros:.0f} µs"
    for limit, unit, size in ((60, "s", 1), (3600, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def dollars(cost: float) -> str:
    """An amount in US dollars for people: cents, and what is less than one dollar in full."""
    return f"${cost:,.2f}" if cost >= 1 or not cost else f"${cost:.4f}".rstrip("0").ljust(5, "0")


# -- text that others wrote --

_ESCAPED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\x1b"}


def printable(text: str, *, lines: bool = False) -> str:
    """Text that cannot move a terminal's cursor, change its colours or turn the reading direction.

    Control, format and surrogate characters are shown escaped; `lines=True` keeps line ends.
    """
    if text.isprintable():
        return text
    return "".join(_shown(c, lines) for c in text)


def _shown(char: str, lines: bool) -> str:  # noqa: FBT001 - internal
    if char.isprintable() or (lines and char == "\n"):
        return char
    if unicodedata.category(char) == "Zs":
        return " "
    code = ord(char)
    short = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return _ESCAPED.get(char, short)


def csv_safe(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP: CSV injection)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r") and value:
        return "'" + value
    return value
