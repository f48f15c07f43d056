"""What the commands about tasks have in common: which ledger, session, agent and claim, and their values."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from ledger import SqliteStore, UsageError
from ledger_cli.options import MOST, TIME, json_of
from ledger_cli.screen import Screen
from ledger_cli.tasks_grids import task_dict
from ledger_ops.reader import NoLedger, open_ledger, url_of
from ledger_ops.values import parse_span, parse_time, printable
from ledger_tasks import Claim, Dep, Task, TaskLedger
from ledger_tasks.model import at
from ledger_tasks.states import state_from
from ledger_tasks.tasks import Named

Function = TypeVar("Function", bound=Callable[..., Any])
Option = Callable[[Any], Any]

TASK_JSON = (
    "id, session, title, description, type, priority, tags, state, waiting (how many dependencies are open), "
    "ready, reason, assignee, parent, depends_on: [[task, on_failure]], capabilities, created_at, "
    "assigned_at, started_at, completed_at, not_before, deadline, payload, scope, retries, max_retries, "
    "errors: [{at, actor, error}], checkpoint, checkpoint_at, progress (0 to 1), stage, result, "
    "artifacts: [{name, value}], cost, tokens, api_calls, version, changed_at, changed_by, active_since, "
    "worked, schema; times: ISO 8601, UTC"
)
ONE_TASK = f"The task as it is then: {{{TASK_JSON}}}."
LIKE_SHOW = "The task as it is then, as in `ledger tasks list`."
NEWEST = 100


# -- which ledger, which session, who asks --


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tasks are, and who asks."""

    db: str | None
    session: str
    agent: str | None = None

    def opened(self) -> TaskLedger:
        """The ledger, which must exist: neither looking nor moving a task makes one."""
        url = self._url
        return self._with(_existing_folder(url) if url.startswith("json:") else open_ledger(url))

    def made(self) -> TaskLedger:
        """The ledger, which is made if there is none."""
        url = self._url
        return self._with(url if url.startswith("json:") else url_of(url))

    def keep_calls_beside(self, tasks: TaskLedger) -> None:
        """Let the guard of this process keep its calls where whoever takes over looks, unless it is told."""
        if os.environ.get("LEDGER_DB", "json:").startswith("json:"):  # which a guard cannot open
            calls = tasks.store.calls()
            here = str(calls.path) if isinstance(calls, SqliteStore) else url_of(self._url)
            os.environ["LEDGER_DB"] = here

    @property
    def _url(self) -> str:
        return self.db if self.db is not None else os.environ.get("LEDGER_DB") or "ledger.db"

    def _with(self, where: Any) -> TaskLedger:
        settings = {"quiet": True} if isinstance(where, str) and not where.startswith("json:") else {}
        tasks = TaskLedger(where, agent=self.agent, session=self.session, source="cli", **settings)
        click.get_current_context().call_on_close(tasks.close)
        return tasks


def _existing_folder(url: str) -> str:
    folder = Path(url.removeprefix("json:").removeprefix("//") or "agent_data")
    if not folder.is_dir():
        raise NoLedger(
            f"there is no ledger at {url}; name the folder (or set LEDGER_DB), or add a task first with "
            "`ledger tasks add`"
        )
    return url


_DB = click.option(
    "--db", metavar="DB", help="The ledger: a path, a server's URL, or json:FOLDER. [LEDGER_DB, ./ledger.db]"
)
_SESSION = click.option(
    "--session", default="main", show_default=True, metavar="NAME", help="Whose tasks: those of this session."
)
_AGENT = click.option(
    "--agent", envvar="LEDGER_AGENT", metavar="NAME", help="Who asks. [LEDGER_AGENT, user@host]"
)


def applied(function: Any, options: Sequence[Option]) -> Any:
    """The function with these options, in this order in its help."""
    for option in reversed(options):
        function = option(function)
    return function


def looks(function: Function) -> Function:
    """Give a command `place`, for one that only looks."""

    @functools.wraps(function)
    def with_place(*args: Any, db: str | None, session: str, **values: Any) -> Any:
        return function(*args, place=Place(db, session), **values)

    return applied(with_place, [_DB, _SESSION])  # type: ignore[no-any-return]


def acts(function: Function) -> Function:
    """Give a command `place` with who asks, for one that changes something."""

    @functools.wraps(function)
    def with_place(*args: Any, db: str | None, session: str, agent: str | None, **values: Any) -> Any:
        return function(*args, place=Place(db, session, agent or None), **values)

    return applied(with_place, [_AGENT, _DB, _SESSION])  # type: ignore[no-any-return]


all_sessions = click.option("--all-sessions", is_flag=True, help="Those of every session.")
task_argument = click.argument("task", metavar="ID")
if_version = click.option(
    "--if-version",
    "version",
    type=click.IntRange(0, MOST),
    metavar="N",
    help="Only if nobody changed the task since it had this version.",
)
reason_option = click.option("--reason", default="", metavar="TEXT", help="Why; it is kept in the event.")
reason_needed = click.option("--reason", required=True, metavar="TEXT", help="Why; it is kept in the event.")


# -- the claim of a holder --


def holds(function: Function) -> Function:
    """Give a command `hold`: the ledger, and the task by its claim (--token) or by its holder's name."""

    @functools.wraps(function)
    def with_hold(*args: Any, task: str, token: str | None, place: Place, **values: Any) -> Any:
        return function(*args, hold=Hold(place, task, token or ""), **values)

    token = click.option("--token", metavar="TOKEN", help="The claim, as `next --claim` printed it.")
    return applied(acts(with_hold), [task_argument, token])  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Hold:
    """A task, and by what the one who asks says that it has it."""

    place: Place
    task: str
    token: str

    def opened(self) -> tuple[TaskLedger, Named]:
        """The ledger, and what names the task there."""
        tasks = self.place.opened()
        return tasks, self.claim(tasks) if self.token else self.task

    def claim(self, tasks: TaskLedger) -> Claim:
        """The claim; without --agent it is the holder's, whose name it needs not repeat."""
        agent = self.place.agent or (tasks.get(self.task).assignee if self.token else "")
        return Claim.of(self.task, agent or tasks.agent, self.token)


# -- what it costs --


def usage(function: Function) -> Function:
    """Give a command `spent`: what is added to the task's account."""

    @functools.wraps(function)
    def with_usage(*args: Any, cost: float, tokens: int, api_calls: int, **values: Any) -> Any:
        return function(*args, spent={"cost": cost, "tokens": tokens, "api_calls": api_calls}, **values)

    options = [
        click.option("--cost", type=click.FloatRange(0), default=0.0, help="What it cost, to be added."),
        click.option("--tokens", type=click.IntRange(0), default=0, help="Tokens used, to be added."),
        click.option("--api-calls", type=click.IntRange(0), default=0, help="Calls made, to be added."),
    ]
    return applied(with_usage, options)  # type: ignore[no-any-return]


# -- values --


def _refused(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A type of option that a function of ours reads; what it refuses is a usage error."""

    def convert(value: Any) -> Any:
        try:
            return read(value) if isinstance(value, str) else value
        except UsageError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def _later(text: str) -> datetime:
    """A time to come: a span from now, or ISO 8601."""
    try:
        return at(time.time_ns() // 1000 + parse_span(text))
    except UsageError:
        return at(TIME(parse_time(text)))


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError:
        raise UsageError(f"{text!r} is no share; write it like 0.4 or 40%") from None


def _dependency(text: str) -> Dep:
    name, _, word = text.rpartition(":")
    return Dep(name, word) if word in ("skip", "fail", "run") and name else Dep(text)  # type: ignore[arg-type]


LATER, SHARE, STATE, DEPENDENCY = map(_refused, (_later, _share, state_from, _dependency))


def seconds_of(micros: int | None) -> float | None:
    """Seconds of a span that an option was given."""
    return None if micros is None else micros / 1e6


def value_options(what: str, name: str = "result") -> Callable[[Function], Function]:
    """Give a command `value`: JSON (--NAME), or plain text (--text); None if neither is given."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_value(*args: Any, as_json_text: str | None, text: str | None, **values: Any) -> Any:
            if as_json_text is not None and text is not None:
                raise click.UsageError(f"give {what} once: with --{name}, or as --text")
            value = text if as_json_text is None else json_of(or_stdin(as_json_text), f"--{name}")
            return function(*args, value=value, **values)

        options = [
            click.option(f"--{name}", "as_json_text", metavar="JSON", help=f"{what}; - reads it from stdin."),
            click.option("--text", metavar="TEXT", help=f"{what}, as plain text."),
        ]
        return applied(with_value, options)  # type: ignore[no-any-return]

    return decorate


def or_stdin(text: str) -> str:
    """The text, or what stdin has if it is a dash."""
    return sys.stdin.read() if text == "-" else text


# -- what is told of a task that was changed --


def tell(task: Task, text: str, *, json: bool, more: Iterable[str] = ()) -> None:
    """Print the task, or what became of it in a line, with what to do next."""
    screen = Screen()
    if json:
        screen.json(task_dict(task))
        return
    for line in (text, *more):
        screen.line(line)


def named(task: Task) -> str:
    """A task in a sentence: its id, and its title where that says more."""
    label = "" if task.label == task.id else f" ({_short(task.label)})"
    return f"{printable(task.id)}{label}"


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
