"""Commands that look at tasks and their events, at the order of work and at figures. None of them writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click

from ledger import UsageError
from ledger_cli import tasks_grids as grids
from ledger_cli.options import MOST, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_options import NEWEST, STATE, TASK_JSON, Place, all_sessions, looks, task_argument
from ledger_ops.values import parse_time, printable
from ledger_tasks import Task, TaskEvent, TaskLedger, TaskState
from ledger_tasks.model import at as moment_at
from ledger_tasks.states import ENDED

_EVENT_JSON = (
    "seq, session, task, n, kind, from_state, to_state, actor, source, stage, data, at, hash; at is ISO 8601 "
    "in UTC"
)
_LIMIT = click.option(
    "--limit", "-n", type=click.IntRange(1, MOST), default=NEWEST, show_default=True, help="How many at most."
)
_ALL = click.option("--all", "everything", is_flag=True, help="All of them.")
_ARRAY = f"An array of tasks, each {{{TASK_JSON}}}."
_ARRAY_LIKE = "An array of tasks, each as in `ledger tasks list`."


def show_tasks(tasks: Iterator[Task], *, json: bool, empty: str, sessions: bool = False) -> None:
    """Print tasks, as JSON or as a list."""
    first = list(itertools.islice(tasks, 1))
    shown = itertools.chain(first, tasks)
    screen = Screen()
    if json:
        screen.json_array(map(grids.task_dict, shown))
    elif first:
        screen.grid(grids.tasks(shown, full=not screen.is_terminal, sessions=sessions))
    else:
        note(empty)
    screen.file.flush()


# -- list --


@command(
    "list",
    examples=(
        "ledger tasks list --open",
        "ledger tasks list --state failed --state dead",
        "ledger tasks list --assignee me --json | jq '.[].id'",
        "ledger tasks list --all-sessions --search invoice",
    ),
    json_form=_ARRAY,
)
@click.option(
    "--state",
    "states",
    type=STATE,
    multiple=True,
    metavar="STATE",
    help="Only in this state; more than once: or in that.",
)
@click.option("--open", "is_open", is_flag=True, help="Only what has not ended.")
@click.option("--type", "kind", help="Only of this type.")
@click.option("--assignee", metavar="NAME", help="Only what this agent has, or had last.")
@click.option("--tag", help="Only with this tag.")
@click.option("--parent", metavar="ID", help="Only the subtasks of this task.")
@click.option("--search", metavar="TEXT", help="Only with this text anywhere in the task.")
@_LIMIT
@_ALL
@all_sessions
@looks
@as_json
def list_command(
    *,
    place: Place,
    states: tuple[TaskState, ...],
    is_open: bool,
    kind: str | None,
    assignee: str | None,
    tag: str | None,
    parent: str | None,
    search: str | None,
    limit: int,
    everything: bool,
    all_sessions: bool,
    json: bool,
) -> None:
    """List tasks, in the order in which they were added.

    On a terminal as a table; in a pipe as tab-separated lines under a line of titles, nothing cut.
    """
    tasks = place.opened()
    if is_open:
        states = tuple(state for state in states or TaskState if state not in ENDED)
        if not states:
            raise click.UsageError("--open and --state leave no state over; give one of them")
    wanted = {"type": kind, "assignee": assignee, "tag": tag, "parent": parent, "text": search}
    found = tasks.tasks(state=states or None, all_sessions=all_sessions, **wanted)
    is_narrow = bool(states) or any(value is not None for value in wanted.values())
    shown = found if everything else itertools.islice(found, limit)
    empty = "no task matches" if is_narrow else _no_tasks(tasks, all_sessions=all_sessions)
    show_tasks(iter(shown), json=json, empty=empty, sessions=all_sessions)
    if not everything and next(found, None) is not None:
        more = "there are more" if is_narrow or all_sessions else f"{len(tasks) - limit:,} more"
        note(f"{more}; --limit N shows N, --all shows them all")


def _no_tasks(tasks: TaskLedger, *, all_sessions: bool) -> str:
    if all_sessions:
        return "no tasks yet; add one: ledger tasks add"
    return f"no tasks yet in session {printable(tasks.session)}; `ledger tasks sessions` lists the others"


# -- show --


def _point(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | datetime | None:
    if value is None or value.isdigit():
        return value and int(value)  # type: ignore[return-value]
    try:
        return moment_at(parse_time(value))
    except UsageError as error:
        raise click.BadParameter(f"{error}; or the number of an event") from None


@command(
    "show",
    examples=("ledger tasks show mail", "ledger tasks show mail --at 2h", "ledger tasks show mail --json"),
    json_form=(
        "The task as in `ledger tasks list`, with blocks (what depends on it), workflow (of its guarded "
        "calls), cycle_time, wait_time and work_time in seconds, and events (the newest, oldest first): "
        f"[{{{_EVENT_JSON}}}]."
    ),
)
@task_argument
@click.option(
    "--at",
    "until",
    callback=_point,
    metavar="TIME",
    help="As it was then: a time, 2h (ago), or the number of an event.",
)
@click.option(
    "--events",
    "most",
    type=click.IntRange(0, MOST),
    default=20,
    show_default=True,
    help="How many of its events.",
)
@looks
@as_json
def show_command(*, task: str, until: int | datetime | None, most: int, place: Place, json: bool) -> None:
    """Tell all about one task: where it stands, and what happened.

    With --at it is what its events had made of it by then.
    """
    tasks = place.opened()
    found = tasks.get(task) if until is None else tasks.replay(task, until)
    events = _last_events(tasks, task, most, found)
    screen = Screen()
    if json:
        times = {name: getattr(found, name) for name in ("cycle_time", "wait_time", "work_time")}
        told = [event.to_dict() for event in events]
        more = {"blocks": list(found.blocks), "workflow": found.workflow, **times, "events": told}
        screen.json({**grids.task_dict(found), **more})
        return
    from ledger_cli.tasks_render import detail

    screen.text(*detail(found, _standings(tasks, found), events))


def _last_events(tasks: TaskLedger, task: str, most: int, found: Task) -> list[TaskEvent]:
    """The newest events that made it what it is here, in bounded memory."""
    if not most:
        return []
    told = (event for event in tasks.events(task) if event.n <= found.version)
    from collections import deque

    return list(deque(told, maxlen=most))


def _standings(tasks: TaskLedger, found: Task, most: int = 20) -> dict[str, str]:
    """Where the first of those stand that it waits for."""
    names = [dep.id for dep in found.depends_on[:most]]
    return {name: grids.standing(tasks.get(name)) for name in names}


# -- events --


@command(
    "events",
    examples=("ledger tasks events", "ledger tasks events mail", "ledger tasks events --after 120 --json"),
    json_form=f"An array of events, the oldest first, each {{{_EVENT_JSON}}}.",
)
@click.argument("task", metavar="[ID]", required=False)
@click.option(
    "--after", type=click.IntRange(0, MOST), default=0, metavar="SEQ", help="Only after this number."
)
@_LIMIT
@_ALL
@all_sessions
@looks
@as_json
def events_command(
    *,
    task: str | None,
    after: int,
    limit: int,
    everything: bool,
    all_sessions: bool,
    place: Place,
    json: bool,
) -> None:
    """List what happened, of one task or of all, the oldest first."""
    tasks = place.opened()
    if task is not None:
        tasks.get(task)
    found = tasks.events(task, after=after, all_sessions=all_sessions)
    shown = found if everything else itertools.islice(found, limit)
    screen = Screen()
    last = [after]
    told = _remembering(shown, last)
    if json:
        screen.json_array(event.to_dict() for event in told)
    else:
        from ledger_cli.tasks_render import event_line

        for event in told:
            screen.text(event_line(event))
    screen.file.flush()
    if not everything and next(found, None) is not None:
        note(f"there are more; --after {last[0]} goes on, --limit N shows N, --all shows them all")


def _remembering(events: Iterator[TaskEvent], last: list[int]) -> Iterator[TaskEvent]:
    for event in events:
        last[0] = event.seq
        yield event


# -- the order of work --


@command(
    "waves",
    examples=("ledger tasks waves", "ledger tasks waves --json | jq 'map(length)'"),
    json_form="An array of waves, each an array of tasks as in `ledger tasks list`.",
)
@looks
@as_json
def waves_command(*, place: Place, json: bool) -> None:
    """List what has not ended in waves, by what waits for what.

    The tasks of a wave can be done in parallel once those of the waves before it are done.
    """
    found = place.opened().waves()
    screen = Screen()
    if json:
        screen.json_array([grids.task_dict(task) for task in wave] for wave in found)
    elif found:
        screen.grid(grids.waves(found, full=not screen.is_terminal))
    else:
        note("nothing is left to do")


@command("path", examples=("ledger tasks path", "ledger tasks path --json"), json_form=_ARRAY_LIKE)
@looks
@as_json
def path_command(*, place: Place, json: bool) -> None:
    """List the longest chain of tasks that wait for each other.

    It is the critical path among what has not ended: the work cannot be over before these are done.
    """
    show_tasks(iter(place.opened().critical_path()), json=json, empty="nothing is left to do")


@command("dead", examples=("ledger tasks dead", "ledger tasks dead --json"), json_form=_ARRAY_LIKE)
@looks
@as_json
def dead_command(*, place: Place, json: bool) -> None:
    """List the dead letters: tasks whose retries are used up."""
    found = place.opened().dead_letters()
    show_tasks(iter(found), json=json, empty="no task is dead")
    if found and not json:
        note("Find out why, then: ledger tasks retry ID --reason TEXT")


@command(
    "sessions",
    examples=("ledger tasks sessions", "ledger tasks sessions --json"),
    json_form="An array of {session, tasks, states: {state: how many}}.",
)
@looks
@as_json
def sessions_command(*, place: Place, json: bool) -> None:
    """List the sessions of the ledger, with their tasks by state."""
    tasks = place.opened()
    found = ((name, tasks.in_session(name).counts()) for name in tasks.sessions())
    screen = Screen()
    if json:
        screen.json_array(
            {"session": name, "tasks": sum(counts.values()), "states": counts} for name, counts in found
        )
    else:
        screen.grid(grids.sessions(found))


# -- figures --


@command(
    "awareness",
    examples=("ledger tasks awareness", "ledger tasks awareness --max-chars 1500 >> context.md"),
    json_form="What is done, running, ready, blocked, failed and in doubt, and what to do next.",
)
@click.option(
    "--max-chars",
    type=click.IntRange(0, MOST),
    default=4000,
    show_default=True,
    help="How long the text may get.",
)
@looks
@as_json
def awareness_command(*, max_chars: int, place: Place, json: bool) -> None:
    """Say in short where the work stands and what to do next.

    It is meant for a model's context, the most relevant first.
    """
    tasks = place.opened()
    if json:
        Screen().json(tasks.get_awareness().to_dict())
    else:
        Screen().line(printable(tasks.get_awareness_text(max_chars), lines=True))


@command(
    "metrics",
    examples=("ledger tasks metrics", "ledger tasks metrics --json | jq .by_agent"),
    json_form="Throughput, success rate, times, retries and cost: of all, by type and by agent.",
)
@looks
@as_json
def metrics_command(*, place: Place, json: bool) -> None:
    """Add up tasks: throughput, success, times, retries and cost."""
    found: dict[str, Any] = place.opened().metrics().to_dict()
    if json:
        Screen().json(found)
        return
    from ledger_cli.tasks_render import figures

    Screen().text(*figures(found))


@command(
    "deliveries",
    examples=(
        "ledger tasks deliveries",
        "ledger tasks deliveries --json | jq '.[] | select(.outcome != \"sent\")'",
    ),
    json_form="An array of deliveries, the oldest first: {key, recipient, channel, outcome, why, at, call}.",
)
@looks
@as_json
def deliveries_command(*, place: Place, json: bool) -> None:
    """List what was sent, suppressed (and why), or is in doubt.

    What is in doubt is not sent again until `ledger resolve CALL` says what happened.
    """
    found = [delivery.to_dict() for delivery in place.opened().deliveries()]
    screen = Screen()
    if json:
        screen.json_array(found)
    elif found:
        screen.grid(grids.records(found, ("at", "outcome", "recipient", "channel", "key", "call", "why")))
    else:
        note("nothing was delivered yet")
