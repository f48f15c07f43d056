"""What a URL asks for: filters, cursors, a range of time. An empty field does not narrow."""

from __future__ import annotations

import time
from typing import cast

from starlette.requests import Request

from ledger import Record, UsageError
from ledger_ops.values import Filter, State, parse_time

FIELDS = ("tool", "status", "wf", "caller", "since", "until", "search")
#: a name may be as long as a request line allows; a text that is searched for costs time
_LONGEST, _LONGEST_SEARCH = 16_000, 400
#: times that people and SQLite can handle: the years 2 to 9998
_EARLIEST, _LATEST = -62_104_060_800_000_000, 253_370_764_800_000_000
_MOST_DIGITS = 19
#: since=all
BEGINNING = 0


def text_of(request: Request, name: str) -> str | None:
    """A field of the query, None when it is empty; raises `UsageError` when it is too long."""
    value = request.query_params.get(name, "")
    longest = _LONGEST_SEARCH if name == "search" else _LONGEST
    if len(value) > longest:
        raise UsageError(f"{name} is longer than {longest} characters; give less of it")
    return value or None


def time_of(request: Request, name: str) -> int | None:
    """A time of the query, in UTC microseconds: ISO 8601, or a span ago such as 2h."""
    text = text_of(request, name)
    if text is None:
        return None
    try:
        moment = parse_time(text)
    except (OverflowError, ValueError, OSError):  # outside of what the calendar or the system knows
        moment = None
    if moment is None or not _EARLIEST <= moment <= _LATEST:
        raise UsageError(f"{name} lies too far away; give a time within the ledger")
    return moment


def range_of(request: Request) -> tuple[int | None, int | None]:
    """`since` (which may be "all") and `until` of a chart."""
    everything = text_of(request, "since") == "all"
    return BEGINNING if everything else time_of(request, "since"), time_of(request, "until")


def filter_of(request: Request) -> Filter:
    """The filter that a URL asks for; raises `UsageError`."""
    return Filter(
        tool=text_of(request, "tool"),
        status=cast("State | None", text_of(request, "status")),
        wf=text_of(request, "wf"),
        caller=text_of(request, "caller"),
        since=time_of(request, "since"),
        until=time_of(request, "until"),
        search=text_of(request, "search"),
    )


def count_of(request: Request, name: str, usual: int, most: int) -> int:
    """A whole number of the query, from 0 to `most`."""
    text = text_of(request, name)
    if text is None:
        return usual
    number = whole(text)
    if number is None or number > most:
        raise UsageError(f"{name} is a whole number up to {most}, not {text[:40]!r}")
    return number


def whole(text: str) -> int | None:
    """A whole number as SQLite can hold it, None if the text is none."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def place_of(request: Request) -> tuple[int, str] | None:
    """The cursor of a list of doubts: start and call of the last one of the page before."""
    text = text_of(request, "cursor")
    if text is None:
        return None
    begins, _, call = text.partition(".")
    started = whole(begins)
    if started is None or not call.isalnum() or started > _LATEST:
        raise UsageError(f"{text[:40]!r} is no cursor; take the one that the page before gave")
    return started, call


def place_after(record: Record) -> str:
    """The cursor of what comes after a doubt."""
    return f"{record.started}.{record.call}"


def now() -> int:
    """UTC microseconds."""
    return time.time_ns() // 1000
