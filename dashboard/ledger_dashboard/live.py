"""Events as they happen: one task reads them for all open pages, while there are any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ledger import LedgerError
from ledger_dashboard.query import count_of, filter_of, whole
from ledger_dashboard.render import short_names
from ledger_dashboard.source import Opened, Source
from ledger_ops.values import Event, Filter

POLL_SECONDS = 0.5
#: events of one message, and messages that wait for a slow page
_BATCH, _WAITING = 500, 64
_RETRY_MILLISECONDS = 2_000
_PING_SECONDS, _GRACE_SECONDS = 15, 1.0
#: how long is looked for what a page missed
_LOOK_SECONDS = 0.06
_END = "end"

#: (kind of message, events, number of the newest event)
Message = tuple[str, list[Event], int]


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

    def __init__(self, source: Source) -> None:
        self._source = source
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
                    self._seq = await run_in_threadpool(opened.reader.last_seq)
                    self._tell(("back", [], self._seq))
                    events = []
                here, self._opened = True, opened
                if events:
                    self._seq = events[-1].seq
                    self._tell(("events", events, self._seq))
                if len(events) == _BATCH:
                    continue  # more of them wait already
            await asyncio.sleep(POLL_SECONDS)

    def _read(self) -> tuple[Opened, list[Event]]:
        opened = self._source.opened()
        if opened is not self._opened and self._opened is not None:
            return opened, []
        reader = opened.reader
        return opened, reader.events(self._seq, limit=_BATCH) if reader.last_seq() > self._seq else []

    def _tell(self, message: Message) -> None:
        for listener in self._listeners:
            listener.tell(message)


async def stream(request: Request) -> Response:
    """Server-sent events: what happened after `after` (or Last-Event-ID), then all as it happens."""
    source: Source = request.app.state.desk.source
    poller: Poller = request.app.state.desk.poller
    wanted = filter_of(request)
    opened = await run_in_threadpool(source.opened)
    newest = await run_in_threadpool(opened.reader.last_seq)
    after = count_of(request, "after", newest, 2**63 - 1)
    last_id = request.headers.get("last-event-id", "")
    if (known := whole(last_id)) is not None:  # the browser connects again by itself
        after = known
    leaving = anyio.Event()
    messages = _messages(source, poller, wanted, min(after, newest), newest, leaving)
    return EventSourceResponse(
        messages, ping=_PING_SECONDS, sep="\n", shutdown_event=leaving, shutdown_grace_period=_GRACE_SECONDS
    )


async def _messages(
    source: Source, poller: Poller, wanted: Filter, after: int, newest: int, leaving: anyio.Event
) -> AsyncIterator[ServerSentEvent]:
    with poller.listen(newest) as (listener, begins):
        farewell = asyncio.create_task(_end(listener, leaving))
        try:
            yield ServerSentEvent(event="hello", data=str(begins), retry=_RETRY_MILLISECONDS)
            if after < begins:
                missed = await run_in_threadpool(_between, source, after, begins, wanted)
                yield _message("events" if missed is not None else "missed", missed or [], begins)
            fits = _judge(wanted)
            while (message := await listener.waiting.get())[0] != _END:
                kind, events, seq = message
                if kind == "back":  # another file, whose numbers begin anew
                    after = 0
                # a page that loaded just now may know more than the poller has read
                fitting = [event for event in events if event.seq > after and fits(event)]
                if fitting or kind != "events":
                    yield _message(kind, fitting, seq)
        finally:
            farewell.cancel()


async def _end(listener: Listener, leaving: anyio.Event) -> None:
    """Let a stream end by itself when the server stops: one that is cut off is an error in its log."""
    await leaving.wait()
    listener.tell((_END, [], 0))


def _between(source: Source, after: int, upto: int, wanted: Filter) -> list[Event] | None:
    """What a page missed while it loaded or was away; None if that is too much to tell."""
    found = source.opened().reader.look_on(after, wanted, limit=_BATCH + 1, seconds=_LOOK_SECONDS)
    if len(found.events) > _BATCH or found.upto < upto:
        return None
    return [event for event in found.events if event.seq <= upto]


def _message(kind: str, events: list[Event], seq: int) -> ServerSentEvent:
    return ServerSentEvent(event=kind, id=str(seq), data=json.dumps([event_dict(e) for e in events]))


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
