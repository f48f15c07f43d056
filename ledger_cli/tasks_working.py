"""What whoever holds a task does with it, from start to done or fail."""

from __future__ import annotations

from typing import Any

import click

from ledger_cli.options import SECONDS, as_json, command
from ledger_cli.screen import Screen
from ledger_cli.tasks_grids import percent, task_dict
from ledger_cli.tasks_options import (
    LIKE_SHOW,
    SHARE,
    Hold,
    holds,
    if_version,
    named,
    reason_option,
    seconds_of,
    tell,
    usage,
    value_options,
)
from ledger_ops.values import printable
from ledger_tasks import Task, TaskState


@command(
    "start",
    examples=("ledger tasks start mail --token TOKEN", "ledger tasks start mail --agent me"),
    json_form=LIKE_SHOW,
)
@holds
@if_version
@as_json
def start_command(*, hold: Hold, version: int | None, json: bool) -> None:
    """Begin a task that was claimed."""
    tasks, claim = hold.opened()
    task = tasks.start(claim, expected_version=version)
    tell(task, f"begun: {named(task)}", json=json)


@command(
    "progress",
    examples=(
        'ledger tasks progress mail 40% "collecting inputs" --agent me',
        "ledger tasks progress mail 0.8 --tokens 1200",
    ),
    json_form=LIKE_SHOW,
)
@holds
@click.argument("share", type=SHARE, metavar="SHARE")
@click.argument("stage", default="", required=False)
@usage
@as_json
def progress_command(*, hold: Hold, share: float, stage: str, spent: dict[str, Any], json: bool) -> None:
    """Say how far a task is (0.4 or 40%), and at what.

    It is a sign of life too: the lease begins anew.
    """
    tasks, claim = hold.opened()
    task = tasks.progress(claim, share, stage, **spent)
    tell(task, f"{percent(task) or '0%'}: {named(task)}", json=json)


@command(
    "checkpoint",
    examples=(
        "ledger tasks checkpoint mail --data '{\"page\": 7}' --agent me",
        "jq . state.json | ledger tasks checkpoint mail --data -",
    ),
    json_form=LIKE_SHOW,
)
@holds
@value_options("What the next holder needs", "data")
@as_json
def checkpoint_command(*, hold: Hold, value: Any, json: bool) -> None:
    """Keep what the next holder needs to go on with a task.

    It replaces the checkpoint before, and is shown by `ledger tasks show`.
    """
    if value is None:
        raise click.UsageError("say what to keep: --data JSON, or --text TEXT")
    tasks, claim = hold.opened()
    task = tasks.checkpoint(claim, value)
    tell(task, f"checkpoint kept: {named(task)}", json=json)


@command(
    "artifact",
    examples=(
        "ledger tasks artifact report draft --text ./draft.md --agent me",
        "ledger tasks artifact report url --value '\"https://…\"'",
    ),
    json_form=LIKE_SHOW,
)
@holds
@click.argument("name")
@value_options("Where it is, or what it is", "value")
@as_json
def artifact_command(*, hold: Hold, name: str, value: Any, json: bool) -> None:
    """Name something that a task made."""
    tasks, claim = hold.opened()
    task = tasks.add_artifact(claim, name, value)
    tell(task, f"artifact {printable(name)} kept: {named(task)}", json=json)


@command(
    "pause", examples=('ledger tasks pause mail --agent me --reason "waiting for Ann"',), json_form=LIKE_SHOW
)
@holds
@reason_option
@if_version
@as_json
def pause_command(*, hold: Hold, reason: str, version: int | None, json: bool) -> None:
    """Stop for a while, for instance for a person; it stays yours.

    No lease runs until `resume`.
    """
    tasks, claim = hold.opened()
    task = tasks.pause(claim, reason, expected_version=version)
    tell(task, f"paused: {named(task)}", json=json)


@command("resume", examples=("ledger tasks resume mail --agent me",), json_form=LIKE_SHOW)
@holds
@if_version
@as_json
def resume_command(*, hold: Hold, version: int | None, json: bool) -> None:
    """Go on with a task that was paused."""
    tasks, claim = hold.opened()
    task = tasks.resume(claim, expected_version=version)
    tell(task, f"begun again: {named(task)}", json=json)


@command(
    "review", examples=("ledger tasks review report --agent me --text ./report.md",), json_form=LIKE_SHOW
)
@holds
@value_options("What came of it")
@if_version
@as_json
def review_command(*, hold: Hold, value: Any, version: int | None, json: bool) -> None:
    """Submit a task for review; somebody approves or rejects it.

    It stays its holder's, who completes it once it is approved.
    """
    tasks, claim = hold.opened()
    task = tasks.submit_for_review(claim, value, expected_version=version)
    tell(task, f"in review: {named(task)}; then: ledger tasks approve (or reject)", json=json)


@command(
    "done",
    examples=(
        "ledger tasks done mail --token TOKEN --result '{\"sent\": 3}'",
        "ledger tasks done mail --agent me --text sent --tokens 5200 --cost 0.02",
    ),
    json_form="{task: as in `ledger tasks list`, ready: [tasks that can be begun because of it]}.",
)
@holds
@value_options("What came of it")
@usage
@if_version
@as_json
def done_command(*, hold: Hold, value: Any, spent: dict[str, Any], version: int | None, json: bool) -> None:
    """Complete a task, and tell what can be begun because of that.

    A ready task that nobody has begun is claimed and begun first, for the one who asks.
    """
    tasks, claim = hold.opened()
    ready = tasks.complete_task_and_route(claim, value, expected_version=version, **spent)
    task = tasks.get(hold.task)
    if json:
        Screen().json({"task": task_dict(task), "ready": [task_dict(one) for one in ready]})
    else:
        tell(task, f"done: {named(task)}", json=False, more=[f"ready now: {named(one)}" for one in ready])


@command(
    "fail",
    examples=(
        'ledger tasks fail mail "the server is away" --token TOKEN',
        'ledger tasks fail mail "quota" --agent me --retry-in 1h',
    ),
    json_form=LIKE_SHOW,
)
@holds
@click.argument("error")
@click.option(
    "--retry-in",
    type=SECONDS,
    metavar="SPAN",
    help="When it may be tried again, if a retry is left: 30, 10m. [1 s, 2 s, 4 s …]",
)
@usage
@if_version
@as_json
def fail_command(
    *, hold: Hold, error: str, retry_in: int | None, spent: dict[str, Any], version: int | None, json: bool
) -> None:
    """Say that a task failed, and why.

    While a retry is left it is pending again; when they are used up it is dead; with none it stays failed.
    """
    tasks, claim = hold.opened()
    task = tasks.fail(claim, error, retry_in=seconds_of(retry_in), expected_version=version, **spent)
    tell(task, f"failed: {named(task)}{_then(task)}", json=json)


def _then(task: Task) -> str:
    if task.state == TaskState.PENDING:
        return f"; it is pending again, {printable(task.reason)}"
    again = f"ledger tasks retry {printable(task.id)} --reason TEXT"
    return (
        f"; it is dead, to begin anew: {again}"
        if task.state == TaskState.DEAD
        else f"; to try again: {again}"
    )
