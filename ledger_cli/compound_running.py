"""Commands that execute compounds: submit, run."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import click

from ledger import LedgerError, UsageError
from ledger_cli.app import FAILURE, complain
from ledger_cli.compound_grids import is_over
from ledger_cli.compound_looking import LISTED_JSON, PROGRESS_JSON
from ledger_cli.compound_shown import Shown, ShownAll
from ledger_cli.ending import Told
from ledger_cli.loading import callable_of, failed_at
from ledger_cli.options import SECONDS, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_options import Function, Place, acts, applied, or_stdin
from ledger_ops.values import printable
from ledger_tasks import CommandExecutor, CompoundRunner, TaskLedger, Tier
from ledger_tasks import compound_view as view
from ledger_tasks.compound_plan import TIERS

_LOOK_SECONDS = 0.25
#: of compounds that no runner was named for
_NAME = "compound"


@dataclass(frozen=True, slots=True)
class Crew:
    """How subtasks are executed."""

    execute: str | None
    words: tuple[str, ...]
    parallel: int
    timeout: float
    lease: float

    def runner(
        self, tasks: TaskLedger, planner: Any, tiers: dict[int, Tier], name: str, *, start: bool
    ) -> CompoundRunner:
        """One of that name; it begins at once if it shall `start`."""
        execute = self._loaded() if start else _nobody
        return CompoundRunner(
            tasks, planner, execute, parallel=self.parallel, tiers=tiers, timeout=self.timeout,
            lease=self.lease, name=name, start=start,
        )  # fmt: skip

    def _loaded(self) -> Any:
        if (self.execute is None) == (not self.words):
            raise click.UsageError("say how a subtask is done: --execute MODULE:FUNCTION, or -- COMMAND")
        if self.execute is not None:
            return callable_of(self.execute, "--execute")
        return CommandExecutor(self.words, timeout=self.timeout)

    @property
    def told(self) -> list[str]:
        """The same as words of a command line."""
        return ["--execute", self.execute] if self.execute is not None else ["--", *self.words]


def _nobody(subtask: dict[str, Any]) -> Any:
    raise UsageError(f"subtask {subtask['id']} is executed by another process")


def executing(function: Function) -> Function:
    """Give a command `crew`: how it executes subtasks."""

    @functools.wraps(function)
    def with_crew(
        *args: Any,
        execute: str | None,
        words: tuple[str, ...],
        parallel: int,
        timeout: int,
        lease: int,
        **values: Any,
    ) -> Any:
        crew = Crew(execute, words, parallel, timeout / 1e6, lease / 1e6)
        return function(*args, crew=crew, **values)

    options = [
        click.argument("words", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED),
        click.option(
            "--execute", metavar="MODULE:FUNCTION", help="Does a subtask: text, or {result, cost, tokens}."
        ),
        click.option(
            "--parallel",
            "-p",
            type=click.IntRange(1, 1000),
            default=4,
            show_default=True,
            help="How many subtasks at once.",
        ),
        click.option(
            "--timeout",
            type=SECONDS,
            default="120s",
            show_default=True,
            metavar="SPAN",
            help="How long a subtask may take.",
        ),
        click.option(
            "--lease",
            type=SECONDS,
            default="30s",
            show_default=True,
            metavar="SPAN",
            help="How long this process may be silent before others go on with its subtasks.",
        ),
    ]
    return applied(with_crew, options)  # type: ignore[no-any-return]


@command(
    "submit",
    examples=(
        'ledger compound submit "compare the two" --planner plans:make -- claude -p --model {model}',
        'ledger compound submit "compare the two" --planner plans:make --execute plans:do --parallel 8',
        "ledger compound submit - --planner plans:make --detach --json < prompt.txt | jq -r .id",
    ),
    json_form=f"When it has ended: {PROGRESS_JSON} With --detach {{id, status, subtask_count}}.",
    codes=(
        "0: completed, or added with --detach. 1: ended as partial, failed or cancelled, or nothing was "
        "added: the planner failed, or what it made is no plan. 2: usage. 130, 143: it was told to end; what "
        "is unfinished can be gone on with."
    ),
)
@click.argument("prompt")
@click.option("--planner", required=True, metavar="MODULE:FUNCTION", help="Makes the plan of a prompt.")
@executing
@click.option("--id", "compound", metavar="ID", help="What to call it; asked for again, it is gone on with.")
@click.option(
    "--name", metavar="NAME", help="Which runners may execute it. [only this one; with --detach: compound]"
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="N=MODEL:COST",
    help="The model of a tier, and what a subtask of it costs. [1=haiku:0.008 2=sonnet:0.04 3=opus:0.15]",
)
@click.option("--detach", is_flag=True, help="Only plan and add it; `run` executes it.")
@click.option("--results", is_flag=True, help="Print the whole results at the end.")
@acts
@as_json
def submit_command(
    *,
    prompt: str,
    planner: str,
    crew: Crew,
    compound: str | None,
    name: str | None,
    tiers: tuple[str, ...],
    detach: bool,
    results: bool,
    place: Place,
    json: bool,
) -> int:
    """Plan a prompt and execute its subtasks, until all have ended.

    PROMPT is the prompt, or - for stdin. The planner gives {"reasoning": …, "subtasks": [{"index",
    "description", "tier_hint", "depends_on": [index, …]}]}.

    COMMAND is run for each subtask, without a shell: {model} and {prompt} in its words are replaced, and
    without {prompt} the prompt is what it reads. What it prints is the result; JSON as of `claude -p
    --output-format json` tells the cost too.

    Ctrl-C gives back what is being executed and says how to go on; what was finished is not done again.
    """
    found_tiers, screen = _tiers(tiers), Screen()
    tasks = place.made()
    place.keep_calls_beside(tasks)
    own = compound or f"c-{os.urandom(6).hex()}"
    known = name or (_NAME if detach else own)
    with _aside(json=json):
        plans = callable_of(planner, "--planner")
        with crew.runner(tasks, plans, found_tiers, known, start=not detach) as runner:
            made = _submitted(runner, or_stdin(prompt), own)
            if made is None:
                return FAILURE
            if not detach:
                return _until_ended(runner, own, place, crew, screen, json=json, results=results)
    if json:
        screen.json(made)
    else:
        further = shlex.join(_again(place, [] if known == _NAME else ["--name", known]))
        screen.line(
            f"added: {printable(own)}, {made['subtask_count']:,} subtasks; then: {further} -- COMMAND"
        )
    return 0


def _submitted(runner: CompoundRunner, prompt: str, compound: str) -> dict[str, Any] | None:
    """What was added; None if the planner failed, which is told."""
    try:
        return runner.submit(prompt, id=compound)
    except (LedgerError, click.ClickException):
        raise
    except Exception as error:  # noqa: BLE001 - whatever somebody's planner raises
        complain(f"the planner failed: {failed_at(error)}; nothing was added, submit the prompt again")
        return None


def _tiers(found: Sequence[str]) -> dict[int, Tier]:
    """The usual table with these in it."""
    table = dict(TIERS)
    for text in found:
        number, _, rest = text.partition("=")
        model, _, cost = rest.rpartition(":")
        try:
            table[int(number)] = Tier(model, float(cost))
        except ValueError:
            model = ""
        if not model:
            raise click.BadParameter(f"{text!r} is no tier; write it like 2=sonnet:0.04", param_hint="--tier")
    return table


def _aside(*, json: bool) -> AbstractContextManager[object]:
    """With --json, what planners and executions print goes to stderr."""
    return redirect_stdout(sys.stderr) if json else nullcontext()


def _until_ended(
    runner: CompoundRunner,
    compound: str,
    place: Place,
    crew: Crew,
    screen: Screen,
    *,
    json: bool,
    results: bool,
) -> int:
    """Show one compound until it has ended or this process was told to; the exit code."""
    told = Told()
    with Shown(runner.ledger, compound, json=json, results=results, screen=screen) as shown:
        shown.look()
        while not is_over(shown.found) and not told.wait(_LOOK_SECONDS):
            shown.look()
        if told:
            runner.close(0.0)
        found = runner.progress(compound)
        shown.end(found)
    if told and not is_over(found):
        further = shlex.join([*_again(place, ["--id", compound]), *crew.told])
        note(f"{printable(compound)} is not over, and nothing of it is executed now; to go on: {further}")
        return told.code
    return 0 if found["status"] == "completed" else FAILURE


def _again(place: Place, words: Iterable[str]) -> list[str]:
    """The command line that goes on with what this one began."""
    db = [] if place.db is None else ["--db", place.db]
    session = [] if place.session == "main" else ["--session", place.session]
    return ["ledger", "compound", "run", *words, *db, *session]


@command(
    "run",
    examples=(
        "ledger compound run -- claude -p --model {model} --output-format json",
        "ledger compound run --id c-1f20 --execute plans:do",
        "ledger compound run --name research --execute plans:do --until-idle",
    ),
    json_form=f"With --id, when it has ended: {PROGRESS_JSON} Else one line for each: {LISTED_JSON}.",
    codes=(
        "0: it ended, with --id as completed. 1: with --id: ended as partial, failed or cancelled. 2: usage. "
        "130, 143: it was told to end; what is unfinished can be gone on with."
    ),
)
@executing
@click.option("--id", "compound", metavar="ID", help="Only this one, until it has ended.")
@click.option(
    "--name",
    default=_NAME,
    show_default=True,
    metavar="NAME",
    help="Those that were submitted for this name.",
)
@click.option("--until-idle", is_flag=True, help="End when all of them have ended.")
@click.option("--results", is_flag=True, help="With --id: print the whole results at the end.")
@acts
@as_json
def run_command(
    *, crew: Crew, compound: str | None, name: str, until_idle: bool, results: bool, place: Place, json: bool
) -> int:
    """Execute what was submitted elsewhere or left behind.

    With --id one compound until it has ended; else all of a name until Ctrl-C. Several may run at once and
    share the work. What was finished is not done again.
    """
    screen = Screen()
    tasks = place.opened()
    place.keep_calls_beside(tasks)
    if compound is not None:
        name = view.compound_of(tasks, compound).capabilities[0]
    with _aside(json=json), crew.runner(tasks, None, dict(TIERS), name, start=True) as runner:
        if compound is not None:
            return _until_ended(runner, compound, place, crew, screen, json=json, results=results)
        return _until_told(runner, screen, until_idle=until_idle, json=json)


def _until_told(runner: CompoundRunner, screen: Screen, *, until_idle: bool, json: bool) -> int:
    told = Told()
    with ShownAll(runner, screen, json=json) as shown:
        while not told.wait(_LOOK_SECONDS):
            shown.look()
            if until_idle and not shown.is_any_unfinished():
                break
        if told:
            runner.close(0.0)
        shown.look()
    return told.code if told and shown.is_any_unfinished() else 0
