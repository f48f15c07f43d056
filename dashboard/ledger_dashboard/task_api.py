"""The JSON API of tasks, which their pages use too, and what a person may decide about one."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ledger import Record, UsageError
from ledger_dashboard.api import SEARCH_SECONDS, body_of, changed, opened_for, steady
from ledger_dashboard.query import count_of, text_of, time_of
from ledger_dashboard.render import Json
from ledger_dashboard.source import Opened
from ledger_ops.values import Filter, record_dict
from ledger_tasks import Task, TaskLedger, TaskState
from ledger_tasks.book import Wanted
from ledger_tasks.browse import Graph, Seen, SeenWorker, TaskReader, Timeline, Told, Twig
from ledger_tasks.browse_compounds import SeenCompound, compound, compounds
from ledger_tasks.model import at
from ledger_tasks.states import ENDED, state_from

#: fields of the filter of a list
FIELDS = ("text", "session", "state", "type", "agent", "parent")
#: as a state: whatever has not ended
UNENDED = "unended"
_PAGE, _MOST_PAGE = 50, 500
_ROOTS, _MOST_IN_TREE, _MOST_PARTS = 30, 300, 50
_MOST_IN_GRAPH = 200
_MOVES, _AGENTS, _BARS = 2_000, 30, 200
_WORKERS, _SUBTASKS = 100, 200
_NEIGHBOURS, _EVENTS, _CALLS = 50, 100, 10
_MOST_NUMBER, _MOST_EVENT = 2**62, 2**31 - 1


def reader_for(opened: Opened) -> TaskReader:
    """What looks at the tasks; raises `UsageError` where a store keeps none."""
    if opened.tasks is None:
        kind = type(opened.reader.store).__name__
        raise UsageError(
            f"a {kind} keeps no tasks; look at the ledger of an SQLite file, of PostgreSQL, Redis or MongoDB"
        )
    return opened.tasks


def session_of(request: Request, reader: TaskReader) -> str:
    """The session that was asked for, else that of the newest task."""
    asked = request.query_params.get("session")
    text_of(request, "session")  # refused when it is too long
    return reader.newest_session() if asked is None else asked


def named(request: Request) -> tuple[str, str]:
    """Session and id of the task that is asked for; raises `UsageError`."""
    task_id = text_of(request, "id")
    if task_id is None:
        raise UsageError(
            "no task is named; give its id, and its session if that is not main: ?id=…&session=…"
        )
    text_of(request, "session")
    return request.query_params.get("session", "main"), task_id


def wanted_of(request: Request) -> Wanted:
    """The filter of a list; raises `UsageError`."""
    text = text_of(request, "text")
    if text is not None and len(text) > _LONGEST_TEXT:
        raise UsageError(f"text is longer than {_LONGEST_TEXT} characters; give less of it")
    kind, parent = text_of(request, "type"), text_of(request, "parent")
    return Wanted(
        states=_states_of(text_of(request, "state")), types=frozenset([kind] if kind else ()), parent=parent,
        assignee=text_of(request, "agent") or "", text=text or "", session=text_of(request, "session"),
        after=count_of(request, "cursor", 0, _MOST_NUMBER),
    )  # fmt: skip


_LONGEST_TEXT = 400


def _states_of(name: str | None) -> frozenset[TaskState]:
    if name is None:
        return frozenset()
    return frozenset(TaskState) - ENDED if name == UNENDED else frozenset([state_from(name)])


def since_of(request: Request) -> datetime | None:
    """The begin of a timeline; None: as far back as is looked."""
    micros = None if text_of(request, "since") in (None, "all") else time_of(request, "since")
    return None if micros is None else at(micros)


@steady
async def get_tasks(request: Request) -> Response:
    """A page of tasks, newest first."""
    wanted = wanted_of(request)
    limit = max(count_of(request, "limit", _PAGE, _MOST_PAGE), 1)
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        if reader.is_empty():
            return {"tasks": [], "cursor": None, "complete": True, "counts": {}}
        found = reader.page(wanted, limit, SEARCH_SECONDS)
        return {
            "tasks": [seen.to_dict() for seen in found.tasks],
            "cursor": found.cursor or None,
            "complete": found.complete,
            "counts": {s.value: n for s, n in opened.task_counts(reader, wanted.session).items()},
        }

    return Json(await run_in_threadpool(gather))


class Forest(NamedTuple):
    """Tasks with their parts."""

    session: str
    twigs: list[Twig]
    #: where the next page begins, "" if there is none
    cursor: str
    #: what the only root is a part of
    above: list[Task]


def forest_of(request: Request, reader: TaskReader) -> Forest:
    """The trees of a session, or the one below a task."""
    session, root = session_of(request, reader), text_of(request, "id")
    if root is not None:
        top = reader.seen(session, root)
        roots, cursor, above = [top], "", reader.ancestors(session, top.task)
    else:
        roots, cursor = reader.roots(session, _ROOTS, text_of(request, "cursor") or "", SEARCH_SECONDS)
        above = []
    return Forest(session, reader.tree(roots, _MOST_IN_TREE, _MOST_PARTS), cursor, above)


@steady
async def get_tree(request: Request) -> Response:
    """Tasks that have parts, with these."""
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        found = Forest("main", [], "", []) if reader.is_empty() else forest_of(request, reader)
        return {
            "session": found.session,
            "tree": [twig.to_dict() for twig in found.twigs],
            "cursor": found.cursor or None,
        }

    return Json(await run_in_threadpool(gather))


def graph_of(request: Request, reader: TaskReader) -> Graph:
    """What depends on what around a task, or in a session."""
    session, focus = session_of(request, reader), text_of(request, "id")
    if focus is None:
        return reader.graph(session, _MOST_IN_GRAPH)
    return reader.around(reader.seen(session, focus).num, _MOST_IN_GRAPH)


@steady
async def get_graph(request: Request) -> Response:
    """Tasks and their dependencies, for a picture."""
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        return (Graph([], [], {}, is_cut=False) if reader.is_empty() else graph_of(request, reader)).to_dict()

    return Json(await run_in_threadpool(gather))


def timeline_of(request: Request, reader: TaskReader) -> Timeline:
    """What agents did, in a session or in all."""
    return reader.timeline(
        text_of(request, "session"), since_of(request), moves=_MOVES, agents=_AGENTS, bars=_BARS
    )


@steady
async def get_agents(request: Request) -> Response:
    """What each agent had, and when."""
    since_of(request)
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        if reader.is_empty():
            return {"since": None, "until": None, "more": 0, "complete": True, "agents": []}
        return timeline_of(request, reader).to_dict()

    return Json(await run_in_threadpool(gather))


def workers_of(request: Request, reader: TaskReader) -> tuple[list[SeenWorker], bool]:
    """Workers of a session or of all, and whether there are more."""
    found = reader.workers(text_of(request, "session"), _WORKERS)
    return found[:_WORKERS], len(found) > _WORKERS


@steady
async def get_workers(request: Request) -> Response:
    """Who is at work, since when, and at what."""
    text_of(request, "session")
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        found, is_cut = workers_of(request, reader) if reader.is_begun() else ([], False)
        return {"workers": [one.to_dict() for one in found], "cut": is_cut}

    return Json(await run_in_threadpool(gather))


@steady
async def get_compounds(request: Request) -> Response:
    """Compounds, newest first."""
    limit = max(count_of(request, "limit", _PAGE, _PAGE), 1)
    after = count_of(request, "cursor", 0, _MOST_NUMBER)
    session = text_of(request, "session")
    opened = await opened_for(request)

    def gather() -> dict[str, Any]:
        reader = reader_for(opened)
        if reader.is_empty():
            return {"compounds": [], "cursor": None, "complete": True}
        found = compounds(reader, session, after, limit, SEARCH_SECONDS)
        return {
            "compounds": found.compounds,
            "cursor": found.page.cursor or None,
            "complete": found.page.complete,
        }

    return Json(await run_in_threadpool(gather))


def compound_of(request: Request, reader: TaskReader) -> SeenCompound:
    """The compound that is asked for. Raises `NoSuchTask`."""
    return compound(reader, *named(request), _SUBTASKS)


@steady
async def get_compound(request: Request) -> Response:
    """One compound, with its subtasks and what they wait for."""
    named(request)
    opened = await opened_for(request)
    return Json(await run_in_threadpool(lambda: compound_of(request, reader_for(opened)).to_dict()))


class Whole(NamedTuple):
    """All that is known of one task."""

    seen: Seen
    #: until when its lease runs, in microseconds; 0: none runs
    until: int
    before: list[tuple[Seen, str]]
    after: list[tuple[Seen, str]]
    events: list[Told]
    #: events that are older than these
    earlier: int
    #: of the guarded calls of its workflow, the newest
    calls: list[Record]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        task = self.seen.task
        return {
            "task": {**task.to_dict(), "waiting": task.waiting, "label": task.label},
            "depends_on": [{**seen.to_dict(), "on_failure": word} for seen, word in self.before],
            "blocks": [{**seen.to_dict(), "on_failure": word} for seen, word in self.after],
            "events": [event.to_dict() for event in self.events],
            "earlier": self.earlier,
            "calls": [record_dict(record) for record in self.calls],
        }


def whole_of(request: Request, opened: Opened, reader: TaskReader) -> Whole:
    """One task with what is around it. Raises `NoSuchTask`."""
    row = reader.row(*named(request))
    task = row.task
    before, after = reader.neighbours(row.num, _NEIGHBOURS)
    events = reader.events(task.session, task.id, _EVENTS, count_of(request, "before", 0, _MOST_EVENT))
    calls = opened.reader.calls(Filter(wf=task.workflow), limit=_CALLS, seconds=SEARCH_SECONDS).records
    earlier = events[-1].n - 1 if events else 0
    return Whole(Seen(row.num, task), row.until, before, after, events, earlier, calls)


@steady
async def get_task(request: Request) -> Response:
    """All that is known of one task, with its newest events."""
    named(request)
    opened = await opened_for(request)
    found = await run_in_threadpool(lambda: whole_of(request, opened, reader_for(opened)).to_dict())
    return Json(found)


# -- decisions --


async def retry(request: Request) -> Response:
    """Let a failed or dead task be done again."""
    asked = await body_of(request, {"session": str, "id": str, "reason": str, "fresh": bool})
    options = {"reason": asked.get("reason", "").strip(), "fresh": asked.get("fresh", False)}
    return await _decide(request, "retry", asked, **options)


async def cancel(request: Request) -> Response:
    """Cancel a task with its parts, and what depends on it if that is asked for."""
    asked = await body_of(request, {"session": str, "id": str, "reason": str, "dependents": bool})
    options = {"reason": asked.get("reason", "").strip(), "dependents": asked.get("dependents", False)}
    return await _decide(request, "cancel", asked, **options)


async def _decide(request: Request, what: str, asked: dict[str, Any], **options: Any) -> Response:
    task_id = asked.get("id")
    if not task_id:
        raise HTTPException(400, 'say which task: {"id": "…", "session": "main"}')
    opened = await opened_for(request)
    session = asked.get("session", "main")
    reader = reader_for(opened)
    await run_in_threadpool(reader.row, session, task_id)  # a ledger without it is not written to
    tasks = TaskLedger(reader.store, agent=request.app.state.desk.actor, session=session, source="dashboard")
    task: Task = await changed(opened, getattr(tasks, what), task_id, **options)
    return Json({"task": {**task.to_dict(), "waiting": task.waiting, "label": task.label}})
