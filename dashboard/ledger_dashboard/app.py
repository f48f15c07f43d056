"""The application: one factory, its state on the app, all routes in one list at the end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ledger import InProgress, LedgerError, StoreError
from ledger_dashboard import api, live, metrics, pages, task_api, task_pages
from ledger_dashboard.render import refusal
from ledger_dashboard.security import (
    ENTRANCE,
    LOOPBACK,
    SAFE_METHODS,
    Keys,
    Shield,
    add_headers,
    checked_token,
    enter,
)
from ledger_dashboard.source import Source
from ledger_ops.acts import who
from ledger_ops.reader import NoLedger, NoSuchCall
from ledger_tasks.errors import NoSuchTask, TaskError


class Desk:
    """What one app keeps: its ledger, its keys, the reader of events, who acts."""

    def __init__(self, url: str | None, keys: Keys, *, read_only: bool) -> None:
        self.source = Source(url)
        self.keys = keys
        self.poller = live.Poller(self.source, live.CallLog())
        self.task_poller = live.Poller(self.source, live.TaskLog())
        self.counts = metrics.Counts()
        self.read_only = read_only
        self.actor = f"{who()} (dashboard)"


class Assets(StaticFiles):
    """Static files, looked at again each time: an upgrade must not meet an old script."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """A file, or that it has not changed."""
        answer = super().file_response(full_path, stat_result, scope, status_code)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def create_app(
    store_url: str | os.PathLike[str] | None,
    *,
    read_only: bool = False,
    token: str | None = None,
    allowed_hosts: Iterable[str] = LOOPBACK,
) -> Starlette:
    """An ASGI application that shows the ledger at a path or URL; it can be mounted inside another.

    It answers to `allowed_hosts` (with the port that was bound; a name of its own for a proxy's) and, if
    there is a `token`, to those who know it. The ledger is opened when the first request comes.
    """
    keys = Keys(None if token is None else checked_token(token))
    desk = Desk(None if store_url is None else os.fspath(store_url), keys, read_only=read_only)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:  # noqa: ARG001 - Starlette's signature
        yield
        desk.source.close()

    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Shield, keys=keys, hosts=tuple(allowed_hosts), read_only=read_only)],
        exception_handlers={LedgerError: _ledger_error, HTTPException: _http_error, Exception: _unexpected},
        lifespan=lifespan,
    )
    app.state.desk = desk
    return app


# -- errors: what happened, and what to do next --


async def _ledger_error(request: Request, error: Exception) -> Response:
    what, _, advice = str(error).partition("; ")
    if isinstance(error, NoSuchCall):
        return refusal(request, 404, what, "Look for it in the list of calls.")
    if isinstance(error, TaskError):
        status = 404 if isinstance(error, NoSuchTask) else 409
        return refusal(request, status, what, _sentence(advice or "look at the task as it stands now"))
    if isinstance(error, NoLedger):
        return refusal(request, 503, "the ledger is gone", f"{_sentence(what)}. {_PUT_BACK} {_AGAIN}")
    if isinstance(error, StoreError):
        source: Source = request.app.state.desk.source
        await run_in_threadpool(source.doubt, error)
        return refusal(request, 503, "the ledger cannot be read", f"{_sentence(str(error))}. {_AGAIN}")
    if isinstance(error, InProgress):
        return refusal(request, 409, what, _sentence(advice or "wait for the run to end"))
    if request.method not in SAFE_METHODS:  # what the ledger advises are words of the command line
        return refusal(request, 409, what, "Reload the page and look at the call as it stands now.")
    return refusal(request, 400, what, _sentence(advice or "change what was asked for"))


_PUT_BACK = (
    "Put the file back, mount its disk, or restore a backup with `ledger restore`. "
    "Tools that were using it refuse to run meanwhile."
)
_AGAIN = "This page looks again by itself."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):  # it is registered for nothing else
        raise error
    what = {404: "there is no such page", 405: "this address does not take that method"}.get(
        error.status_code, error.detail
    )
    advice = {404: "Go to the overview.", 405: "See /api/openapi.json.", 503: "Try again."}.get(
        error.status_code, "Change what was sent."
    )
    answer = refusal(request, error.status_code, what, advice)
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _unexpected(request: Request, error: Exception) -> Response:  # noqa: ARG001 - the server logs it
    answer = refusal(
        request, 500, "something went wrong in the dashboard",
        "Its log says what. The ledger itself and the guarded tools are not touched by this.",
    )  # fmt: skip
    add_headers(answer.headers)  # it is made outside of the shield
    return answer


_get = ["GET"]
_post = ["POST"]

#: the routes that change state; a read-only app refuses them
CHANGING = (
    "/api/calls/{call}/retry", "/api/calls/{call}/resolve", "/api/tasks/task/retry", "/api/tasks/task/cancel",
)  # fmt: skip

ROUTES: list[BaseRoute] = [
    Route("/", pages.get_overview, methods=_get, name="overview"),
    Route("/calls", pages.get_calls, methods=_get, name="calls"),
    Route("/calls/{call}", pages.get_call, methods=_get, name="call"),
    Route("/tasks", task_pages.get_tasks, methods=_get, name="tasks"),
    Route("/tasks/tree", task_pages.get_tree, methods=_get, name="task_tree"),
    Route("/tasks/graph", task_pages.get_graph, methods=_get, name="task_graph"),
    Route("/tasks/agents", task_pages.get_agents, methods=_get, name="task_agents"),
    Route("/tasks/workers", task_pages.get_workers, methods=_get, name="task_workers"),
    Route("/tasks/compounds", task_pages.get_compounds, methods=_get, name="task_compounds"),
    Route("/tasks/compound", task_pages.get_compound, methods=_get, name="task_compound"),
    Route("/tasks/dead", task_pages.get_dead, methods=_get, name="task_dead"),
    Route("/tasks/task", task_pages.get_task, methods=_get, name="task"),
    Route("/live", pages.get_live, methods=_get, name="live"),
    Route("/doubts", pages.get_doubts, methods=_get, name="doubts"),
    Route(ENTRANCE, enter, methods=_post, name="enter"),
    Route("/health", metrics.get_health, methods=_get, name="health"),
    Route("/metrics", metrics.get_metrics, methods=_get, name="metrics"),
    Route("/api/openapi.json", api.get_openapi, methods=_get, name="api_openapi"),
    Route("/api/overview", api.get_overview, methods=_get, name="api_overview"),
    Route("/api/calls", api.get_calls, methods=_get, name="api_calls"),
    Route("/api/calls.csv", api.get_csv, methods=_get, name="api_csv"),
    Route("/api/calls/{call}", api.get_call, methods=_get, name="api_call"),
    Route("/api/events", api.get_events, methods=_get, name="api_events"),
    Route("/api/doubts", api.get_doubts, methods=_get, name="api_doubts"),
    Route("/api/stream", live.stream, methods=_get, name="api_stream"),
    Route("/api/tasks", task_api.get_tasks, methods=_get, name="api_tasks"),
    Route("/api/tasks/tree", task_api.get_tree, methods=_get, name="api_task_tree"),
    Route("/api/tasks/graph", task_api.get_graph, methods=_get, name="api_task_graph"),
    Route("/api/tasks/agents", task_api.get_agents, methods=_get, name="api_task_agents"),
    Route("/api/tasks/workers", task_api.get_workers, methods=_get, name="api_task_workers"),
    Route("/api/tasks/compounds", task_api.get_compounds, methods=_get, name="api_task_compounds"),
    Route("/api/tasks/compound", task_api.get_compound, methods=_get, name="api_task_compound"),
    Route("/api/tasks/task", task_api.get_task, methods=_get, name="api_task"),
    Route("/api/tasks/stream", live.stream_tasks, methods=_get, name="api_task_stream"),
    Route(CHANGING[0], api.retry, methods=_post, name="api_retry"),
    Route(CHANGING[1], api.resolve, methods=_post, name="api_resolve"),
    Route(CHANGING[2], task_api.retry, methods=_post, name="api_task_retry"),
    Route(CHANGING[3], task_api.cancel, methods=_post, name="api_task_cancel"),
    Mount("/static", Assets(directory=Path(__file__).with_name("static")), name="static"),
]
