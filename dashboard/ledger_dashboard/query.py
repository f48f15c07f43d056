"""What a URL asks for: filters, cursors, a range of time. An empty field does not narrow."""

from __future__ import annotations

import time
from typing import cast

from starlette.requests import Request

from ledger import UsageError
from ledger_ops.values import Filter, State, parse_time

FIELDS = ("tool", "status", "wf", "caller", "since", "until", "search")
_LONGEST = 400
#: since=all
BEGINNING = 0


def text_of(request: Request, name: str) -> str | None:
    """A field of the query, None when it is empty; raises `UsageError` when it is too long."""
    value = request.query_params.get(name, "")
    if len(value) > _LONGEST:
        raise UsageError(f"{name} is longer than {_LONGEST} characters; give less of it")
    return value or None


def time_of(request: Request, name: str) -> int | None:
    """A time of the query, in UTC microseconds: ISO 8601, or a span ago such as 2h."""
    text = text_of(request, name)
    if text is None:
        return None
    try:
        return parse_time(text)
    except OverflowError:
        raise UsageError(f"{name} lies too far away; give a time within the ledger") from None


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
    if not text.isdecimal() or int(text) > most:
        raise UsageError(f"{name} is a whole number up to {most}, not {text!r}")
    return int(text)


def now() -> int:
    """UTC microseconds."""
    return time.time_ns() // 1000
