"""`ledger tasks watch`: a live view on a terminal, a line for each event in a pipe."""

from __future__ import annotations

import itertools
import json as json_module
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from ledger_cli.options import MOST, as_json, command
from ledger_cli.screen import Screen
from ledger_cli.tasks_options import Place, all_sessions, looks
from ledger_tasks import TaskEvent, TaskLedger
from ledger_tasks.states import ENDED, HELD

if TYPE_CHECKING:
    from rich.console import Group

_POLL_SECONDS = 0.25
_HELD, _EVENTS = 12, 8


@command(
    "watch",
    examples=(
        "ledger tasks watch",
        "ledger tasks watch --until-done && echo all done",
        "ledger tasks watch --json --after 0 | jq 'select(.to_state == \"failed\")'",
    ),
    json_form=(
        "A line for each event: {seq, session, task, n, kind, from_state, to_state, actor, source, stage, "
        "data, at, hash}."
    ),
    codes="130: ended by Ctrl-C.",
)
@click.option(
    "--after",
    type=click.IntRange(0, MOST),
    metavar="SEQ",
    help="Also what happened since this event; 0: all. [from now on]",
)
@click.option("--until-done", is_flag=True, help="End as soon as every task of the session has ended.")
@all_sessions
@looks
@as_json
def watch_command(
    *, after: int | None, until_done: bool, all_sessions: bool, place: Place, json: bool
) -> int:
    """Watch the work: a live view; in a pipe a line for each event.

    Ctrl-C ends it.
    """
    screen = Screen()
    try:
        signal.signal(signal.SIGINT, _interrupt_once)
        tasks = place.opened()
        start = tasks.last_seq() if after is None else after
        pages = _follow(tasks, start, every=all_sessions, until_done=until_done)
        if screen.is_terminal and not json:
            _live(screen, tasks, pages)
        else:
            _lines(screen, pages, json=json)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _interrupt_once(_number: int, _frame: object) -> None:
    """End at the first Ctrl-C; those that follow while it ends must not change how."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow(tasks: TaskLedger, after: int, *, every: bool, until_done: bool) -> Iterator[list[TaskEvent]]:
    """New events, a page at a time, and an empty page each time that there are none."""
    while True:
        is_over = until_done and all(state in ENDED for state in tasks.counts())
        events = tasks.events(after=after, all_sessions=every)
        while page := list(itertools.islice(events, 500)):
            yield page
            after = page[-1].seq
        if is_over:
            return
        yield []
        time.sleep(_POLL_SECONDS)


def _lines(screen: Screen, pages: Iterator[list[TaskEvent]], *, json: bool) -> None:
    say: Callable[[TaskEvent], None]
    if json:
        say = lambda event: screen.line(json_module.dumps(event.to_dict()))  # noqa: E731 - one of two
    else:
        from ledger_cli.tasks_render import event_line

        say = lambda event: screen.text(event_line(event))  # noqa: E731 - one of two
    for page in pages:
        for event in page:
            say(event)
        screen.file.flush()


def _live(screen: Screen, tasks: TaskLedger, pages: Iterator[list[TaskEvent]]) -> None:
    from rich.live import Live

    recent: deque[TaskEvent] = deque(maxlen=_EVENTS)
    with Live(_board(tasks, recent), console=screen.console, auto_refresh=False) as live:
        for page in pages:
            recent.extend(page)
            live.update(_board(tasks, recent), refresh=True)
        live.update(_board(tasks, recent), refresh=True)


def _board(tasks: TaskLedger, recent: deque[TaskEvent]) -> Group:
    from rich.console import Group

    from ledger_cli.tasks_render import board, utc_now

    held = list(itertools.islice(tasks.tasks(state=HELD), _HELD))
    lines = list(board(tasks.session, tasks.counts(), held, recent, utc_now()))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)
