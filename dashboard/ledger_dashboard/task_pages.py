"""The pages of tasks. A ledger without tasks gets one that says how to begin, wherever one looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from ledger_dashboard.api import SEARCH_SECONDS, opened_for, steady
from ledger_dashboard.live import TaskLog
from ledger_dashboard.pages import answer_page, next_query, query_with
from ledger_dashboard.query import count_of, text_of
from ledger_dashboard.render import moment, short_names
from ledger_dashboard.source import Opened
from ledger_dashboard.task_api import (
    FIELDS,
    UNENDED,
    compound_of,
    forest_of,
    graph_of,
    named,
    reader_for,
    session_of,
    since_of,
    timeline_of,
    wanted_of,
    whole_of,
    workers_of,
)
from ledger_tasks import NEXT, Task, TaskState
from ledger_tasks.book import Wanted
from ledger_tasks.browse import TaskReader
from ledger_tasks.browse_compounds import compounds
from ledger_tasks.model import micros_of

_TASKS, _MOST_TASKS, _DEAD, _COMPOUNDS = 50, 150, 50, 30
_RANGES = (("15m", "15 min"), ("1h", "1 hour"), ("24h", "24 hours"), ("all", "all"))
_LOG = TaskLog()

Gather = Callable[[Opened, TaskReader], dict[str, Any]]


@steady
async def get_tasks(request: Request) -> Response:
    """Tasks by filter, newest first."""
    wanted = wanted_of(request)
    rows = max(count_of(request, "rows", _TASKS, _MOST_TASKS), 1)
    asked = {name: request.query_params.get(name, "") for name in FIELDS}

    def gather(opened: Opened, reader: TaskReader) -> dict[str, Any]:
        found = reader.page(wanted, rows, SEARCH_SECONDS)
        types, agents = reader.choices()
        return {
            "found": found,
            "counts": opened.task_counts(reader, wanted.session),
            "next": next_query(request, found.cursor),
            "reached": None if found.complete else moment(micros_of(found.reached) or None),
            "types": types,
            "agents": agents,
        }

    return await _show(
        request, "tasks", gather, asked=asked, is_further=bool(wanted.after), is_narrow=any(asked.values()),
        by_state={state.value: query_with(request, state=state.value, cursor="") for state in TaskState},
        any_state=query_with(request, state="", cursor=""), unended=UNENDED,
        kept_filter=urlencode({name: value for name, value in asked.items() if value}),
    )  # fmt: skip


@steady
async def get_tree(request: Request) -> Response:
    """Tasks that have parts, and how far these are."""

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        found = forest_of(request, reader)
        return {"found": found, "session": found.session, "next": next_query(request, found.cursor)}

    return await _show(
        request, "task_tree", gather, root=text_of(request, "id"), is_further="cursor" in request.query_params
    )  # fmt: skip


@steady
async def get_graph(request: Request) -> Response:
    """What waits for what; the picture is drawn by the script."""

    def gather(opened: Opened, reader: TaskReader) -> dict[str, Any]:
        session = session_of(request, reader)
        found = graph_of(request, reader)
        total = sum(opened.task_counts(reader, session).values())
        return {"found": found, "session": session, "left": total - len(found.tasks)}

    return await _show(request, "task_graph", gather, focus=text_of(request, "id"))


@steady
async def get_agents(request: Request) -> Response:
    """What each agent had, and when; the picture is drawn by the script."""
    since_of(request)

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        return {"found": timeline_of(request, reader)}

    asked = request.query_params.get("session", "")
    return await _show(
        request, "task_agents", gather, ranges=_RANGES, chosen=text_of(request, "since") or "all",
        kept_session=f"&{urlencode({'session': asked})}" if asked else "",
    )  # fmt: skip


@steady
async def get_workers(request: Request) -> Response:
    """Who is at work, since when, and at what."""

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        found, is_cut = workers_of(request, reader)
        return {"found": [one for one in found if not one.worker.ended], "is_cut": is_cut,
                "ended": [one for one in found if one.worker.ended]}  # fmt: skip

    return await _show(request, "task_workers", gather)


@steady
async def get_compounds(request: Request) -> Response:
    """Compounds, newest first."""
    after = count_of(request, "cursor", 0, 2**62)

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        found = compounds(reader, text_of(request, "session"), after, _COMPOUNDS, SEARCH_SECONDS)
        page = found.page
        return {
            "found": found,
            "next": next_query(request, page.cursor),
            "reached": None if page.complete else moment(micros_of(page.reached) or None),
        }

    return await _show(request, "task_compounds", gather, is_further=bool(after))


@steady
async def get_compound(request: Request) -> Response:
    """One compound: how far it is, what it costs, its subtasks as a graph and as a list."""
    named(request)
    opened = await opened_for(request)
    reader_for(opened)

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        found = compound_of(request, reader)
        cancels = {"task_cancel"} & _offers(found.seen.task)
        return {"found": found, "told": found.told, "offers": cancels}

    return await _show(request, "task_compound", gather, always=True)


@steady
async def get_dead(request: Request) -> Response:
    """The dead-letter list: tasks whose retries are used up, and those that failed without any."""
    states = frozenset({TaskState.DEAD, TaskState.FAILED})
    after = count_of(request, "cursor", 0, 2**62)

    def gather(_: Opened, reader: TaskReader) -> dict[str, Any]:
        wanted = Wanted(states=states, session=text_of(request, "session"), after=after)
        found = reader.page(wanted, _DEAD, SEARCH_SECONDS)
        return {
            "found": found,
            "offers": {seen.num: _offers(seen.task) for seen in found.tasks},
            "next": next_query(request, found.cursor),
        }

    return await _show(request, "task_dead", gather, is_further=bool(after))


@steady
async def get_task(request: Request) -> Response:
    """One task: its events, errors, checkpoint, artifacts, result and guarded calls."""
    named(request)
    opened = await opened_for(request)
    reader_for(opened)

    def gather(opened: Opened, reader: TaskReader) -> dict[str, Any]:
        found = whole_of(request, opened, reader)
        task = found.seen.task
        older = str(found.events[-1].n) if found.events and found.earlier else None
        return {
            "found": found,
            "task": task,
            "wf": task.workflow,
            "offers": _offers(task),
            "before": [
                pair for pair in found.before if pair[0].task.parent != task.id
            ],  # parts have a place of their own
            "names": short_names([record.tool for record in found.calls]),
            "above": reader.ancestors(task.session, task),
            "parts": reader.tree([found.seen], 60, 50),
            "older": query_with(request, before=older) if older else None,
        }

    return await _show(request, "task", gather, always=True, is_back=text_of(request, "before") is not None)


async def _show(
    request: Request, view: str, gather: Gather, *, always: bool = False, **values: Any
) -> Response:
    """The page of a view; `always`: also where there is no task, so that it can be refused."""
    opened = await opened_for(request)
    session = text_of(request, "session")

    def look() -> dict[str, Any]:
        reader = opened.tasks
        found: dict[str, Any] = {"session": session, "sessions": [], "dead": 0, "kept": "nowhere"}
        if reader is None:
            return found
        found["kept"] = "none" if reader.is_empty() else "there"
        if found["kept"] == "there":
            found["sessions"] = reader.sessions()
            counts = opened.task_counts(reader, session)
            found["dead"] = counts.get(TaskState.DEAD, 0) + counts.get(TaskState.FAILED, 0)
        if found["kept"] == "there" or always:
            found |= gather(opened, reader)
        return found

    kind = type(opened.reader.store).__name__.removesuffix("Store")
    return await answer_page(request, view, opened, look, log=_LOG, store_kind=kind, **values)


def _offers(task: Task) -> frozenset[str]:
    """What a person may decide about a task; the ledger judges it once more when it is asked for."""
    offers = {"task_cancel"} if TaskState.CANCELLED in NEXT[task.state] else set()
    if task.state in (TaskState.FAILED, TaskState.DEAD):
        offers.add("task_retry")
    return frozenset(offers)
