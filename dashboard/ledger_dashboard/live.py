"""Events as they happen: one task reads them for all open pages, while there are any."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ledger import LedgerError
from ledger_dashboard.query import count_of, filter_of, text_of, whole
from ledger_dashboard.render import short_names
from ledger_dashboard.source import Opened, Source
from ledger_ops.values import Event, Filter
from ledger_tasks.browse import Happened

POLL_SECONDS = 0.5
#: events of one message, and messages that wait for a slow page
_BATCH, _WAITING = 500, 64
_RETRY_MILLISECONDS = 2_000
_PING_SECONDS, _GRACE_SECONDS = 15, 1.0
#: how long is looked for what a page missed
_LOOK_SECONDS = 0.06
_END = "end"

#: (kind of message, events, number of the newest event)
Message = tuple[str, list[Any], int]


class Log(ABC):
    """A log that pages follow: its events have a number, `seq`, that grows."""

    @abstractmethod
    def last_seq(self, opened: Opened) -> int:
        """The number of the newest event."""

    @abstractmethod
    def after(self, opened: Opened, seq: int) -> list[Any]:
        """The events after that number, oldest first; up to `_BATCH` of them."""

    @abstractmethod
    def missed(self, opened: Opened, request: Request, after: int, upto: int) -> list[Any] | None:
        """What a page missed while it loaded or was away; None if that is too much to tell."""

    @abstractmethod
    def judge(self, request: Request) -> Callable[[Any], bool]:
        """Whether a page wants an event."""

    @abstractmethod
    def told(self, event: Any) -> dict[str, Any]:
        """The event as the API gives it."""


class CallLog(Log):
    """What happened to calls."""

    def last_seq(self, opened: Opened) -> int:
        """The number of the newest event."""
        return opened.reader.last_seq()

    def after(self, opened: Opened, seq: int) -> list[Event]:
        """The events after that number."""
        return opened.reader.events(seq, limit=_BATCH)

    def missed(self, opened: Opened, request: Request, after: int, upto: int) -> list[Event] | None:
        """As far as they are found in a moment."""
        found = opened.reader.look_on(after, filter_of(request), limit=_BATCH + 1, seconds=_LOOK_SECONDS)
        if len(found.events) > _BATCH or found.upto < upto:
            return None
        return [event for event in found.events if event.seq <= upto]

    def judge(self, request: Request) -> Callable[[Any], bool]:
        """By tool, workflow and caller."""
        return _judge(filter_of(request))

    def told(self, event: Any) -> dict[str, Any]:
        """With the short name of the tool."""
        return event_dict(event)


class TaskLog(Log):
    """What happened to tasks."""

    def last_seq(self, opened: Opened) -> int:
        """The number of the newest event; 0 where there are no tasks."""
        return opened.tasks.last_seq() if opened.tasks is not None else 0

    def after(self, opened: Opened, seq: int) -> list[Happened]:
        """The events after that number."""
        return opened.tasks.news(seq, _BATCH) if opened.tasks is not None else []

    def missed(self, opened: Opened, request: Request, after: int, upto: int) -> list[Happened] | None:
        """If one look finds them all."""
        found, wants = self.after(opened, after), self.judge(request)
        return None if len(found) == _BATCH else [one for one in found if one.seq <= upto and wants(one)]

    def judge(self, request: Request) -> Callable[[Any], bool]:
        """By session."""
        session = text_of(request, "session")
        return lambda event: session in (None, event.session)

    def told(self, event: Any) -> dict[str, Any]:
        """In brief."""
        found: dict[str, Any] = event.to_dict()
        return found


class Listener:
    """One open page: what waits to be sent to it. A page that is too slow is told that it missed some."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[Message] = asyncio.Queue(_WAITING)

    def tell(self, message: Message) -> None:
        """Hand over a message, without waiting."""
        if self.waiting.full():
            while not self.waiting.empty():
                self.waiting.get_nowait()
            message = message if message[0] == _END else ("missed", [], message[2])
        self.waiting.put_nowait(message)


class Poller:
    """Reads new events for every listener at once, by their number; asleep while nobody listens."""

    def __init__(self, source: Source, log: Log) -> None:
        self._source = source
        self.log = log
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._opened: Opened | None = None
        self._seq = 0

    @contextmanager
    def listen(self, seq: int) -> Iterator[tuple[Listener, int]]:
        """A listener to what comes after the event with that number, as far as the poller has not read on."""
        listener = Listener()
        if self._task is None or self._task.done():
            self._seq, self._opened = seq, None
            self._task = asyncio.create_task(self._poll(), name="ledger-poller")
        self._listeners.add(listener)
        try:
            yield listener, self._seq
        finally:
            self._listeners.discard(listener)
            if not self._listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _poll(self) -> None:
        here = True
        while True:
            try:
                opened, events = await run_in_threadpool(self._read)
            except LedgerError as error:
                await run_in_threadpool(self._source.doubt, error)
                if here:
                    self._tell(("gone", [], 0))
                here, self._opened = False, None
            else:
                changed = opened is not self._opened
                if changed and (self._opened is not None or not here):  # another file: numbers begin anew
                    self._seq = await run_in_threadpool(self.log.last_seq, opened)
                    self._tell(("back", [], self._seq))
                    events = []
                here, self._opened = True, opened
                if events:
                    self._seq = events[-1].seq
                    self._tell(("events", events, self._seq))
                if len(events) == _BATCH:
                    continue  # more of them wait already
            await asyncio.sleep(POLL_SECONDS)

    def _read(self) -> tuple[Opened, list[Any]]:
        opened = self._source.opened()
        if opened is not self._opened and self._opened is not None:
            return opened, []
        return opened, self.log.after(opened, self._seq) if self.log.last_seq(opened) > self._seq else []

    def _tell(self, message: Message) -> None:
        for listener in self._listeners:
            listener.tell(message)


async def stream(request: Request) -> Response:
    """Server-sent events of calls: what happened after `after` (or Last-Event-ID), then all as it happens."""
    return await _stream(request, request.app.state.desk.poller)


async def stream_tasks(request: Request) -> Response:
    """The same of tasks."""
    return await _stream(request, request.app.state.desk.task_poller)


async def _stream(request: Request, poller: Poller) -> Response:
    source: Source = request.app.state.desk.source
    fits = poller.log.judge(request)
    opened = await run_in_threadpool(source.opened)
    newest = await run_in_threadpool(poller.log.last_seq, opened)
    after = count_of(request, "after", newest, 2**63 - 1)
    last_id = request.headers.get("last-event-id", "")
    if (known := whole(last_id)) is not None:  # the browser connects again by itself
        after = known
    leaving = anyio.Event()
    messages = _messages(request, poller, fits, min(after, newest), newest, leaving)
    return EventSourceResponse(
        messages, ping=_PING_SECONDS, sep="\n", shutdown_event=leaving, shutdown_grace_period=_GRACE_SECONDS
    )


async def _messages(
    request: Request,
    poller: Poller,
    fits: Callable[[Any], bool],
    after: int,
    newest: int,
    leaving: anyio.Event,
) -> AsyncIterator[ServerSentEvent]:
    log = poller.log
    with poller.listen(newest) as (listener, begins):
        farewell = asyncio.create_task(_end(listener, leaving))
        try:
            yield ServerSentEvent(event="hello", data=str(begins), retry=_RETRY_MILLISECONDS)
            if after < begins:
                opened = await run_in_threadpool(request.app.state.desk.source.opened)
                missed = await run_in_threadpool(log.missed, opened, request, after, begins)
                yield _message("events" if missed is not None else "missed", log, missed or [], begins)
            while (message := await listener.waiting.get())[0] != _END:
                kind, events, seq = message
                if kind == "back":  # another file, whose numbers begin anew
                    after = 0
                # a page that loaded just now may know more than the poller has read
                fitting = [event for event in events if event.seq > after and fits(event)]
                if fitting or kind != "events":
                    yield _message(kind, log, fitting, seq)
        finally:
            farewell.cancel()


async def _end(listener: Listener, leaving: anyio.Event) -> None:
    """Let a stream end by itself when the server stops: one that is cut off is an error in its log."""
    await leaving.wait()
    listener.tell((_END, [], 0))


def _message(kind: str, log: Log, events: list[Any], seq: int) -> ServerSentEvent:
    return ServerSentEvent(event=kind, id=str(seq), data=json.dumps([log.told(e) for e in events]))


def event_dict(event: Event) -> dict[str, Any]:
    """An event as the API gives it, with the short name of its tool."""
    name = None if event.tool is None else short_names([event.tool])[event.tool]
    return {**event.to_dict(), "name": name}


def _judge(wanted: Filter) -> Callable[[Event], bool]:
    """Whether an event is wanted, by what an event alone can tell."""

    def fits(event: Event) -> bool:
        tool = event.tool or ""
        return (
            (wanted.tool is None or tool == wanted.tool or tool.split("#")[0].endswith(f".{wanted.tool}"))
            and (wanted.wf is None or event.wf == wanted.wf)
            and (wanted.caller is None or event.caller == wanted.caller)
        )

    return fits
