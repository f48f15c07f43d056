"""Commands by which an agent gets work and keeps it: next, claim, heartbeat, release."""

from __future__ import annotations

from typing import Any

import click

from ledger_cli.app import NOTHING_MATCHED, complain
from ledger_cli.options import MOST, SECONDS, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_grids import standing, task_dict
from ledger_cli.tasks_looking import show_tasks
from ledger_cli.tasks_options import (
    LIKE_SHOW,
    Function,
    Hold,
    Place,
    acts,
    applied,
    holds,
    if_version,
    named,
    reason_option,
    seconds_of,
    task_argument,
    tell,
)
from ledger_ops.values import printable
from ledger_tasks import Claim, TaskLedger

_CLAIM_JSON = "{task: as in `ledger tasks list`, agent, token, lease in seconds}"
_LEASE = click.option(
    "--lease",
    type=SECONDS,
    metavar="SPAN",
    help="How long a silence may last before somebody else gets the task: 300, 5m. [5m]",
)
_START = click.option("--start", is_flag=True, help="Begin it too.")


def abilities(function: Function) -> Function:
    """What an agent can do, and which types of tasks it wants."""
    options = [
        click.option(
            "--can",
            multiple=True,
            metavar="WORD",
            help="What this agent can do; more than once: all of these.",
        ),
        click.option("--can-all", is_flag=True, help="Whatever a task needs, this agent can do it."),
        click.option("--type", "types", multiple=True, help="Only of this type; more than once: or of that."),
    ]
    return applied(function, options)  # type: ignore[no-any-return]


@command(
    "next",
    examples=(
        "ledger tasks next",
        "ledger tasks next --claim --start --agent me --json",
        "ledger tasks next --claim --can python --type review --lease 10m",
        "ledger tasks next --limit 20 --json",
    ),
    json_form=(
        f"The task as in `ledger tasks list`; with --claim {_CLAIM_JSON}; null if there is none. With "
        "--limit an array of tasks."
    ),
    codes="0: also if there is nothing to do. 3: nothing to do, with --exit-code.",
)
@click.option("--claim", is_flag=True, help="Claim it: nobody else gets it.")
@_START
@abilities
@_LEASE
@click.option(
    "--limit", "-n", type=click.IntRange(1, MOST), help="So many that can be begun now, not only the first."
)
@click.option("--exit-code", is_flag=True, help="Exit with 3 if there is nothing to do.")
@acts
@as_json
def next_command(
    *,
    place: Place,
    claim: bool,
    start: bool,
    can: tuple[str, ...],
    can_all: bool,
    types: tuple[str, ...],
    lease: int | None,
    limit: int | None,
    exit_code: bool,
    json: bool,
) -> int:
    """Show the most urgent task that can be begun now, or claim it.

    The most urgent is the one with the highest priority, then the oldest. A task that needs what the agent
    was not said to be able to do (--can) is passed over. With --claim, what dead agents left is brought back
    first if there is nothing else.
    """
    if (start or lease is not None) and not claim:
        raise click.UsageError("--start and --lease belong to --claim")
    if claim and limit is not None:
        raise click.UsageError("--claim takes one task; leave --limit out")
    tasks = place.opened()
    wanted: dict[str, Any] = {"capabilities": None if can_all else can, "types": types or None}
    if claim:
        found = tasks.claim_next(lease=seconds_of(lease), **wanted)
        if found is not None:
            _tell_claim(tasks, found, start=start, json=json)
        return _nothing(tasks, json=json, exit_code=exit_code) if found is None else 0
    ready = tasks.get_parallel_executable_tasks(limit or 1, **wanted)
    if limit is not None and json:
        show_tasks(iter(ready), json=True, empty="")
        return NOTHING_MATCHED if exit_code and not ready else 0
    if not ready:
        return _nothing(tasks, json=json, exit_code=exit_code)
    if json:
        Screen().json(task_dict(ready[0]))
    else:
        show_tasks(iter(ready), json=False, empty="")
    return 0


def _nothing(tasks: TaskLedger, *, json: bool, exit_code: bool) -> int:
    if json:
        Screen().json(None)
    else:
        Screen().line(f"nothing can be begun now in session {printable(tasks.session)}")
    return NOTHING_MATCHED if exit_code else 0


def _tell_claim(tasks: TaskLedger, claim: Claim, *, start: bool, json: bool) -> None:
    task = tasks.start(claim) if start else claim.task
    if json:
        Screen().json(
            {"task": task_dict(task), "agent": claim.agent, "token": claim.token, "lease": claim.lease}
        )
        return
    then = "done" if start else "start"
    tell(
        task,
        f"{'begun' if start else 'claimed'}: {named(task)} by {printable(claim.agent)} for {claim.lease:g} s",
        json=False,
        more=[
            f"token: {claim.token}",
            f"then:  ledger tasks {then} {printable(task.id)} --token {claim.token}",
        ],
    )


@command(
    "claim",
    examples=("ledger tasks claim mail --agent me", "ledger tasks claim mail --start --lease 1h --json"),
    json_form=f"{_CLAIM_JSON}.",
    codes="1: also if somebody else has it, or it cannot be begun now.",
)
@task_argument
@_START
@_LEASE
@acts
@as_json
def claim_command(*, task: str, place: Place, start: bool, lease: int | None, json: bool) -> int:
    """Claim one task by its id: nobody else gets it."""
    tasks = place.opened()
    claim = tasks.claim_task(task, lease=seconds_of(lease))
    if claim is None:
        return complain(_why_not(tasks, task))
    _tell_claim(tasks, claim, start=start, json=json)
    return 0


def _why_not(tasks: TaskLedger, name: str) -> str:
    """Why a task cannot be claimed, and what to do about it."""
    task = tasks.get(name)
    advice = "take another one: ledger tasks next --claim"
    if task.waiting:
        why = f"waits for {task.waiting:,} others; see `ledger tasks show {name}`"
    elif task.ready:
        why = (
            f"is not to be begun before {task.not_before}"
            if task.not_before
            else "was taken and given back just now"
        )
    else:
        why = f"is {standing(task)}{f' and {task.assignee} has it' if task.assignee else ''}"
    return f"task {name!r} {why}; nothing was changed, {advice}"


@command(
    "heartbeat",
    examples=("ledger tasks heartbeat mail --token TOKEN", "ledger tasks heartbeat mail --agent me --json"),
    json_form="{held}: whether the claim is still good.",
    codes="1: also if the claim is lost.",
)
@holds
@as_json
def heartbeat_command(*, hold: Hold, json: bool) -> int:
    """Say that the holder of a task lives: its lease begins anew."""
    tasks = hold.place.opened()
    is_held = tasks.heartbeat(hold.claim(tasks))
    if json:
        Screen().json({"held": is_held})
    if not is_held:
        return complain(f"the claim on task {hold.task!r} is lost; nothing was renewed, stop working on it")
    if not json:
        note("the lease begins anew")
    return 0


@command(
    "release",
    examples=(
        "ledger tasks release mail --token TOKEN",
        'ledger tasks release mail --agent me --reason "too big"',
    ),
    json_form=LIKE_SHOW,
)
@holds
@reason_option
@if_version
@as_json
def release_command(*, hold: Hold, reason: str, version: int | None, json: bool) -> None:
    """Give a task back undone; no retry is counted."""
    tasks, claim = hold.opened()
    task = tasks.release(claim, reason, expected_version=version)
    tell(task, f"released: {named(task)}", json=json)
