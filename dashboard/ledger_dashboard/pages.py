"""The pages. Each gathers its values in a worker thread and hands them to its template."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import ledger
from ledger import Record
from ledger_dashboard.api import SEARCH_SECONDS, opened_for, page_of, steady
from ledger_dashboard.figures import overview, share
from ledger_dashboard.live import CallLog, Log
from ledger_dashboard.query import FIELDS, count_of, filter_of, place_after, place_of, range_of, text_of
from ledger_dashboard.render import link, render, short_names
from ledger_dashboard.security import set_cookie, visitor_of
from ledger_dashboard.source import SELDOM, Opened
from ledger_ops.values import Filter, clock

_CALLS, _MOST_CALLS, _DOUBTS, _EVENTS, _TIMELINE = 50, 150, 50, 100, 500
#: how long the events of one call are looked for when a person asks for all
_PATIENT_SECONDS = 10.0
CALLS = CallLog()
_RANGES = (("1h", "1 hour"), ("24h", "24 hours"), ("7d", "7 days"), ("30d", "30 days"), ("all", "all"))


@steady
async def get_overview(request: Request) -> Response:
    """The headline, the chart, and figures by tool and by workflow."""
    chosen = text_of(request, "since")
    since, until = range_of(request)
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        found = overview(opened, since, until)
        return {"view": found, "names": short_names([tool.tool for tool in found.tools])}

    return await answer_page(
        request, "overview", opened, gather, ranges=_RANGES, chosen=None if until else chosen, share=share
    )


@steady
async def get_calls(request: Request) -> Response:
    """Calls by filter, newest first."""
    wanted, cursor = filter_of(request), text_of(request, "cursor")
    # a page that is open asks for the rows that came since, and those that it has
    rows = max(count_of(request, "rows", _CALLS, _MOST_CALLS), 1)
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        found = page_of(opened.reader, wanted, rows, cursor)
        return {
            "found": found,
            "reached": clock(found.reached) if found.reached is not None else None,
            "next": next_query(request, found.cursor),
            "is_empty": not opened.reader.last_seq(),
            **_choices(opened, found.records),
        }

    asked = {name: request.query_params.get(name, "") for name in FIELDS}
    return await answer_page(
        request, "calls", opened, gather, asked=asked, cursor=cursor, narrows=wanted.narrows,
        csv=urlencode({name: value for name, value in asked.items() if value}),
    )  # fmt: skip


@steady
async def get_call(request: Request) -> Response:
    """One call: what was asked, what came of it, every attempt."""
    seconds = _PATIENT_SECONDS if text_of(request, "all") else SEARCH_SECONDS
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        found = opened.reader.call(request.path_params["call"], seconds=seconds)
        return {
            "is_complete": found.complete,
            "found": found,
            "record": found.record,
            "name": found.record.short,
            "timeline": found.events[-_TIMELINE:],
            "earlier": max(len(found.events) - _TIMELINE, 0),
            "holders": {run.run: opened.reader.store.holder(run) for run in found.runs},
            "offers": _offers(found.record, runs=len(found.runs)),
        }

    return await answer_page(request, "call", opened, gather)


@steady
async def get_live(request: Request) -> Response:
    """Events as they happen."""
    wanted = Filter(tool=text_of(request, "tool"), wf=text_of(request, "wf"))
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        found = opened.reader.look_back(_EVENTS, wanted, seconds=SEARCH_SECONDS)
        tools = {event.tool for event in found.events if event.tool is not None}
        return {
            "events": found.events[::-1],
            "reached": None if found.reached is None else clock(found.reached),
            **_choices(opened, []),
            "names": {tool: ledger._short(tool) for tool in tools},
        }

    return await answer_page(
        request, "live", opened, gather, asked={"tool": wanted.tool or "", "wf": wanted.wf or ""}
    )


@steady
async def get_doubts(request: Request) -> Response:
    """What waits for a person, oldest first."""
    after = place_of(request)
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        found = opened.reader.doubts(limit=_DOUBTS + 1, after=after)
        records = found[:_DOUBTS]
        more = query_with(request, cursor=place_after(records[-1])) if len(found) > _DOUBTS else None
        return {
            "records": records,
            "next": more,
            "offers": {r.call: _offers(r, runs=r.run) for r in records},
            **_choices(opened, records),
        }

    return await answer_page(request, "doubts", opened, gather, is_further=after is not None)


async def answer_page(
    request: Request, view: str, opened: Opened, gather: Any, *, log: Log = CALLS, **values: Any
) -> Response:
    """The page of a view; htmx, which patches a page that is open, gets what changes in it."""

    def make() -> Response:
        seq = log.last_seq(opened)  # before anything else is read: what comes later is told by the stream
        gathered = gather()
        doubts = opened.stats(SELDOM).total.in_doubt
        is_patch = request.headers.get("hx-request") == "true"
        visitor = visitor_of(request) or secrets.token_urlsafe(18)
        html = render(
            f"_{view}.html" if is_patch else f"{view}.html", active=view, seq=seq, doubts=doubts,
            has_log=opened.reader.has_log, stream="api_stream" if log is CALLS else "api_task_stream",
            **_frame(request, visitor), **values, **gathered,
        )  # fmt: skip
        answer = HTMLResponse(html, headers={"Vary": "HX-Request", "X-Ledger-Doubts": str(doubts)})
        if visitor != visitor_of(request):
            # following a link from another site would replace a strict one, and fail other tabs' buttons
            set_cookie(request, answer, "visitor", visitor, seconds=None, strict=False)
        return answer

    return await run_in_threadpool(make)


def _frame(request: Request, visitor: str) -> dict[str, Any]:
    """What every page has."""
    desk = request.app.state.desk
    here = datetime.now().astimezone()
    return {
        "link": partial(link, request),
        "csrf": "" if desk.read_only else desk.keys.csrf(visitor),
        "read_only": desk.read_only,
        "store_name": desk.source.name,
        # the script writes times as the pages do: in the server's zone
        "offset": int((here.utcoffset() or timedelta()).total_seconds()) // 60,
        "zone": here.tzname(),
    }


def _choices(opened: Opened, records: list[Record]) -> dict[str, Any]:
    """What the fields of a filter offer, and how tools are named here."""
    tools = {*opened.stats(SELDOM).tools, *(record.tool for record in records)}
    names = short_names(sorted(tools))
    return {
        "names": names,
        "choices": sorted((name, tool) for tool, name in names.items()),
        "callers": opened.rollup.callers(50),
        "workflows": [row.wf for row in opened.rollup.workflows(50)],
    }


def query_with(request: Request, **params: str) -> str:
    """This query with other values."""
    dropped = {"rows", *params}
    kept = {name: value for name, value in request.query_params.items() if value and name not in dropped}
    return urlencode({**kept, **params})


def next_query(request: Request, cursor: int | str | None) -> str | None:
    """This query with the next page's cursor; None where there is no further page."""
    return query_with(request, cursor=str(cursor)) if cursor else None


def _offers(record: Record, *, runs: int) -> frozenset[str]:
    """What a person may decide about a call; the ledger judges it once more when it is asked for."""
    doubtful = record.in_doubt and not record.released
    if not runs or (record.status is ledger.Status.RUNNING and not record.in_doubt):
        return frozenset()
    if doubtful:
        return frozenset({"retry", "done", "not_done"})
    if record.runs and not record.released:
        return frozenset({"retry"})
    return frozenset()
