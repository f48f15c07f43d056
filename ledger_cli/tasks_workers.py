"""Commands about workers: run, workers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import click

from ledger import UsageError
from ledger_cli import tasks_grids as grids
from ledger_cli.ending import end_at_once
from ledger_cli.loading import loaded
from ledger_cli.options import MOST, SECONDS, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_following import Board, Following, Lines, TheWorker, View
from ledger_cli.tasks_options import Place, acts, looks, seconds_of
from ledger_ops.values import printable
from ledger_tasks import Breaker, TaskLedger


@command(
    "run",
    examples=(
        "ledger tasks run jobs:handlers --concurrency 8",
        "ledger tasks run jobs:handlers --rate mail=10/s --breaker-after 3 --breaker-for 1m",
        "ledger tasks run jobs:do --can python --until-idle --json | jq .state",
    ),
    json_form=(
        "A line for each run of a task that ended: {task, session, agent, state, then (the state after "
        "it, as pending for a retry, or empty), seconds, why, result, at}. What handlers print goes to "
        "stderr."
    ),
    codes=(
        "0: it ended gracefully, whatever became of the tasks. 1: there is no ledger. 2: usage, also for a "
        "module that cannot be imported. 128 + n: a second signal n ended it at once."
    ),
)
@click.argument("handlers", metavar="MODULE:NAME")
@click.option(
    "--concurrency",
    "-c",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="How many tasks it works on at once.",
)
@click.option(
    "--can",
    "--capability",
    multiple=True,
    metavar="WORD",
    help="What this worker can do; more than once: all of these.",
)
@click.option("--can-all", is_flag=True, help="Whatever a task needs, this worker can do it.")
@click.option(
    "--lease",
    type=SECONDS,
    metavar="SPAN",
    help="How long it may be silent before its tasks are somebody else's: 300, 5m. [5m]",
)
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="TYPE=N/s",
    help="How many of a type may begin: mail=10/s, crawl=100/m; of one function for all types: '*=10/s'.",
)
@click.option(
    "--breaker-after",
    type=click.IntRange(1, MOST),
    metavar="N",
    help="Failures in a row after which a type is paused. [5]",
)
@click.option("--breaker-for", type=SECONDS, metavar="SPAN", help="How long it is paused then. [30s]")
@click.option("--no-breaker", is_flag=True, help="Never pause a type that keeps failing.")
@click.option(
    "--grace",
    type=SECONDS,
    metavar="SPAN",
    default="30s",
    show_default=True,
    help="How long handlers may go on when it has to end.",
)
@click.option("--until-idle", is_flag=True, help="End when no task of its types is left that can be begun.")
@acts
@as_json
def run_command(
    *,
    handlers: str,
    place: Place,
    can: tuple[str, ...],
    can_all: bool,
    lease: int | None,
    rates: tuple[str, ...],
    breaker_after: int | None,
    breaker_for: int | None,
    no_breaker: bool,
    grace: int,
    until_idle: bool,
    concurrency: int,
    json: bool,
) -> None:
    """Work on tasks with the handlers of a Python module.

    MODULE:NAME is a dict of task types and functions, or one function for every type: handler(task, context),
    plain or async; what it returns is the task's result. The current folder can be imported from. Where
    LEDGER_DB is not set it is set to the ledger of the tasks, so that `from ledger import guard` in the
    module keeps its calls there, and whoever takes over a task of a worker that died gets their results.

    SIGTERM or Ctrl-C lets what is begun end; a second one ends it at once. On a terminal it shows what it is
    doing, in a pipe it prints a line for each task that ended.
    """
    options: dict[str, Any] = {
        "concurrency": concurrency,
        "capabilities": None if can_all else can,
        "lease": seconds_of(lease),
        "rate": _rates(rates),
        "breaker": _breaker(breaker_after, breaker_for, never=no_breaker),
        "grace": seconds_of(grace),
        "agent": _own_name(place),
    }
    tasks = place.opened()
    place.keep_calls_beside(tasks)
    _work(_made(tasks, handlers, options), until_idle=until_idle, json=json)


def _rates(found: Sequence[str]) -> dict[str, str]:
    split = [text.rpartition("=") for text in found]
    for name, _, rate in split:
        if not name:
            raise click.BadParameter(f"{rate!r} names no type; write it like mail=10/s", param_hint="--rate")
    return {name: rate for name, _, rate in split}


def _breaker(after: int | None, pause: int | None, *, never: bool) -> Breaker | None:
    if never and (after or pause):
        raise click.UsageError("--no-breaker and --breaker-after or --breaker-for exclude each other")
    usual = Breaker()
    return None if never else Breaker(after or usual.after, seconds_of(pause) or usual.seconds)


def _own_name(place: Place) -> str | None:
    """What --agent says. LEDGER_AGENT may name many workers at once; each gets the number of its process."""
    source = click.get_current_context().get_parameter_source("agent")
    return place.agent if source is click.core.ParameterSource.COMMANDLINE else None


def _made(tasks: TaskLedger, handlers: str, options: dict[str, Any]) -> TheWorker:
    try:
        return TheWorker(tasks, loaded(handlers, "MODULE:NAME"), **options)
    except UsageError as error:
        raise click.UsageError(printable(str(error), lines=True)) from None


def _work(worker: TheWorker, *, until_idle: bool, json: bool) -> None:
    """Run it to its end, and tell meanwhile what becomes of its tasks."""
    screen = Screen()
    is_live = screen.is_terminal and not json
    view: View = Board(worker, screen) if is_live else Lines(worker, screen, json=json)
    end_at_once()  # the first signal is the worker's, while it runs
    _log_to_stderr()
    with redirect_stdout(sys.stderr) if json else nullcontext(), Following(worker, view):
        worker.run(until_idle=until_idle)
    note(view.told())


class _Notes(logging.Handler):
    """Warnings of a worker on stderr; what tasks and their errors say cannot move the cursor."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it; while there is a live view, sys.stderr puts it above that."""
        sys.stderr.write(f"{printable(self.format(record), lines=True)}\n")


def _log_to_stderr() -> None:
    log = logging.getLogger("ledger")
    if not log.hasHandlers():  # the module may have said where logs go
        handler = _Notes()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(handler)


@command(
    "workers",
    examples=("ledger tasks workers", "ledger tasks workers --json | jq '.[] | select(.alive)'"),
    json_form=(
        "An array of workers, the newest first: {id, agent, host, pid, types, concurrency, done, failed, "
        "success_rate (0 to 1, null before the first), started_at, seen_at, alive, ended, doing: [id]}."
    ),
)
@click.option("--alive", is_flag=True, help="Only those that are alive.")
@looks
@as_json
def workers_command(*, alive: bool, place: Place, json: bool) -> None:
    """List the workers of the last days, and what each is doing.

    One that has said nothing for 15 seconds is shown as silent; its tasks are others' when their leases have
    lapsed.
    """
    found = [worker for worker in place.opened().workers() if worker.alive or not alive]
    screen = Screen()
    if json:
        screen.json_array(worker.to_dict() for worker in found)
    elif found:
        screen.grid(grids.workers(found, full=not screen.is_terminal))
    else:
        note("no worker was seen; start one: ledger tasks run MODULE:NAME")
