"""The JSON API, which the pages use too. Its contract is openapi.json, beside this file."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from ledger import Record, StoreError, UsageError
from ledger_dashboard.figures import overview
from ledger_dashboard.live import event_dict
from ledger_dashboard.query import count_of, filter_of, place_after, place_of, range_of, text_of
from ledger_dashboard.render import Json
from ledger_dashboard.source import Opened
from ledger_ops import acts
from ledger_ops.reader import Reader
from ledger_ops.transfer import export
from ledger_ops.values import Filter, Page, iso, record_dict

#: a search goes back for so long, then says how far it got
SEARCH_SECONDS = 0.06
_PAGE, _MOST_PAGE = 50, 500
#: how many calls are read at a time, and after how many bytes a page ends
_FEW, _MOST_PAGE_BYTES = 10, 8_000_000
_EVENTS, _MOST_EVENTS = 200, 1_000
_MOST_BODY_BYTES, _BODY_SECONDS = 262_144, 10
_LINES_PER_CHUNK = 200
_LONGEST_NOTE = 2_000


async def opened_for(request: Request) -> Opened:
    """The ledger, opened in a worker thread when this is the first to ask."""
    opened: Opened = await run_in_threadpool(request.app.state.desk.source.opened)
    return opened


Changed = TypeVar("Changed")
Route = Callable[[Request], Awaitable[Response]]


def steady(route: Route) -> Route:
    """Let a route answer once more when the ledger was closed or replaced while it was read."""

    @functools.wraps(route)
    async def answer(request: Request) -> Response:
        opened = await opened_for(request)
        try:
            return await route(request)
        except StoreError:
            if await opened_for(request) is opened:
                raise
            return await route(request)

    return answer


def page_of(reader: Reader, wanted: Filter, limit: int, cursor: str | None) -> Page:
    """A page of calls, shorter where they are big: it is read a few at a time, up to some megabytes."""
    deadline = time.monotonic() + SEARCH_SECONDS
    records: list[Record] = []
    size = 0
    while True:
        few = min(limit - len(records), _FEW)
        found = reader.calls(wanted, limit=few, cursor=cursor, seconds=max(deadline - time.monotonic(), 0))
        records += found.records
        size += sum(len(text or "") for r in found.records for text in (r.args_json, r.result_json, r.error))
        cursor = found.cursor
        if cursor is None or not found.complete or len(records) >= limit or size > _MOST_PAGE_BYTES:
            return replace(found, records=records)


@steady
async def get_overview(request: Request) -> Response:
    """Sums, figures by tool and workflow, and the chart of a range."""
    since, until = range_of(request)
    opened = await opened_for(request)
    found = await run_in_threadpool(overview, opened, since, until)
    return Json(found.to_dict())


@steady
async def get_calls(request: Request) -> Response:
    """A page of calls, newest first."""
    wanted, cursor = filter_of(request), text_of(request, "cursor")
    limit = max(count_of(request, "limit", _PAGE, _MOST_PAGE), 1)
    reader = (await opened_for(request)).reader
    found = await run_in_threadpool(page_of, reader, wanted, limit, cursor)
    return Json(
        {
            "calls": [record_dict(record) for record in found.records],
            "cursor": found.cursor,
            "complete": found.complete,
            "reached": iso(found.reached),
        }
    )


@steady
async def get_csv(request: Request) -> Response:
    """All calls of a filter as a table for a spreadsheet, with no cell that it takes for a formula."""
    wanted = filter_of(request)
    reader = (await opened_for(request)).reader
    chunks = _chunks(export(reader, wanted, form="csv"))
    headers = {"Content-Disposition": 'attachment; filename="calls.csv"'}
    return StreamingResponse(
        iterate_in_threadpool(chunks), media_type="text/csv; charset=utf-8", headers=headers
    )


def _chunks(lines: Iterator[str]) -> Iterator[bytes]:
    """Many lines at a time: each chunk is a visit to a worker thread."""
    while chunk := "".join(itertools.islice(lines, _LINES_PER_CHUNK)):
        yield chunk.encode(errors="replace")


@steady
async def get_call(request: Request) -> Response:
    """All that is known of one call."""
    reader = (await opened_for(request)).reader
    found = await run_in_threadpool(reader.call, request.path_params["call"], seconds=SEARCH_SECONDS)
    return Json({**found.to_dict(), "complete": found.complete})


@steady
async def get_events(request: Request) -> Response:
    """Events after a number, oldest first; without one the newest."""
    wanted = filter_of(request)
    limit = max(count_of(request, "limit", _EVENTS, _MOST_EVENTS), 1)
    reader = (await opened_for(request)).reader
    last = await run_in_threadpool(reader.last_seq)
    if text_of(request, "after") is None:
        found = await run_in_threadpool(reader.look_back, limit, wanted, seconds=SEARCH_SECONDS)
    else:
        after = count_of(request, "after", 0, 2**63 - 1)
        found = await run_in_threadpool(reader.look_on, after, wanted, limit=limit, seconds=SEARCH_SECONDS)
    return Json(
        {
            "events": [event_dict(event) for event in found.events],
            "upto": found.upto,
            "complete": found.complete,
            "reached": iso(found.reached),
            "last": last,
        }
    )


@steady
async def get_doubts(request: Request) -> Response:
    """What waits for a person, oldest first."""
    wanted, after = filter_of(request), place_of(request)
    limit = max(count_of(request, "limit", 100, _MOST_PAGE), 1)
    reader = (await opened_for(request)).reader
    found = await run_in_threadpool(reader.doubts, wanted, limit=limit + 1, after=after)
    shown = found[:limit]
    cursor = place_after(shown[-1]) if len(found) > limit else None
    return Json({"doubts": [record_dict(record) for record in shown], "cursor": cursor})


async def get_openapi(request: Request) -> Response:  # noqa: ARG001 - a route
    """The description of this API."""
    return FileResponse(Path(__file__).with_name("openapi.json"), media_type="application/json")


async def retry(request: Request) -> Response:
    """Release a call: the next identical one runs."""
    asked = await body_of(request, {"note": str})
    return await _act(request, acts.retry, note=asked.get("note", ""))


async def resolve(request: Request) -> Response:
    """Settle a call in doubt: its effect happened, or it did not."""
    asked = await body_of(request, {"done": bool, "note": str, "result": str})
    if "done" not in asked:
        raise HTTPException(400, 'say whether it was done: {"done": true} or {"done": false}')
    result = asked.get("result", "").strip() or None
    if result is not None and not asked["done"]:
        raise HTTPException(400, "what was not done has no result; send none")
    if result is not None:
        try:
            json.loads(result)
        except (ValueError, RecursionError) as error:
            raise HTTPException(
                400, f"the result is not JSON ({error}); text needs quotes around it"
            ) from None
    return await _act(
        request, acts.resolve, done=asked["done"], note=asked.get("note", ""), result_json=result
    )


async def _act(request: Request, act: Any, **options: Any) -> Response:
    opened = await opened_for(request)
    call = await run_in_threadpool(opened.reader.find, request.path_params["call"])
    actor = request.app.state.desk.actor
    record = await changed(opened, act, opened.reader.store, call, actor=actor, **options)
    runs = await run_in_threadpool(opened.reader.store.rows, call)
    verdict = opened.reader.verdict(record, runs)
    return Json({"call": record_dict(record), "verdict": verdict})


async def changed(opened: Opened, act: Callable[..., Changed], *args: Any, **options: Any) -> Changed:
    """Do what a person decided, in a worker thread."""
    try:
        found = await run_in_threadpool(act, *args, **options)
    except StoreError as error:
        if error.__cause__ is not None or not opened.is_current():
            raise
        # the file is there and sound: somebody else held it for all the time that was allowed
        raise HTTPException(503, "nothing was changed: another process is writing") from None
    await run_in_threadpool(opened.changed)
    return found


async def body_of(request: Request, fields: dict[str, type]) -> dict[str, Any]:
    """The JSON object of a request: small, in time, and with nothing in it that is not known."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send JSON, with Content-Type: application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > _MOST_BODY_BYTES:
                    raise HTTPException(413, f"the body is larger than {_MOST_BODY_BYTES} bytes; send less")
    except TimeoutError:
        raise HTTPException(408, "the body did not come in time; send it again") from None
    try:
        asked = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON; send an object") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the body is no JSON object; send one")
    for name, value in asked.items():
        if name not in fields or not isinstance(value, fields[name]):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise HTTPException(400, f"{name!r} is unknown or of the wrong type; the body may have {known}")
    for name in ("note", "reason"):
        if len(asked.get(name, "")) > _LONGEST_NOTE:
            raise UsageError(f"the {name} is longer than {_LONGEST_NOTE} characters; give less of it")
    return asked
