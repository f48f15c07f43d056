"""What anybody may decide about a task, from approve to cancel, and what programs report."""

from __future__ import annotations

from typing import Any

import click

from ledger_cli.options import as_json, command
from ledger_cli.tasks_grids import standing
from ledger_cli.tasks_options import (
    LIKE_SHOW,
    Place,
    acts,
    if_version,
    named,
    reason_needed,
    reason_option,
    task_argument,
    tell,
    value_options,
)
from ledger_ops.values import printable
from ledger_tasks import StatusEvent


@command("approve", examples=("ledger tasks approve report",), json_form=LIKE_SHOW)
@task_argument
@reason_option
@if_version
@acts
@as_json
def approve_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Approve a task that is in review; its holder completes it."""
    found = place.opened().approve(task, reason, expected_version=version)
    tell(found, f"approved: {named(found)}", json=json)


@command("reject", examples=('ledger tasks reject report --reason "no figures"',), json_form=LIKE_SHOW)
@task_argument
@reason_needed
@if_version
@acts
@as_json
def reject_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Send a task in review back to its holder, who goes on with it."""
    found = place.opened().reject(task, reason, expected_version=version)
    tell(found, f"rejected: {named(found)}; its holder goes on with it", json=json)


@command("block", examples=('ledger tasks block mail --reason "no address yet"',), json_form=LIKE_SHOW)
@task_argument
@reason_needed
@if_version
@acts
@as_json
def block_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Declare, with a reason, that a task cannot go on.

    Whoever had it has it no more.
    """
    found = place.opened().block(task, reason, expected_version=version)
    tell(found, f"blocked: {named(found)}; then: ledger tasks unblock", json=json)


@command("unblock", examples=("ledger tasks unblock mail",), json_form=LIKE_SHOW)
@task_argument
@reason_option
@if_version
@acts
@as_json
def unblock_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Let a task that was blocked go on: it is pending again."""
    found = place.opened().unblock(task, reason, expected_version=version)
    tell(found, f"pending: {named(found)}", json=json)


@command("shelve", examples=("ledger tasks shelve idea",), json_form=LIKE_SHOW)
@task_argument
@reason_option
@if_version
@acts
@as_json
def shelve_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Keep a task for later: it is offered to nobody."""
    found = place.opened().shelve(task, reason, expected_version=version)
    tell(found, f"in the backlog: {named(found)}", json=json)


@command("unshelve", examples=("ledger tasks unshelve idea",), json_form=LIKE_SHOW)
@task_argument
@reason_option
@if_version
@acts
@as_json
def unshelve_command(*, task: str, place: Place, reason: str, version: int | None, json: bool) -> None:
    """Take a task out of the backlog: it is pending."""
    found = place.opened().unshelve(task, reason, expected_version=version)
    tell(found, f"pending: {named(found)}", json=json)


@command(
    "retry",
    examples=(
        "ledger tasks retry mail",
        'ledger tasks retry mail --reason "the server is back"',
        "ledger tasks retry mail --fresh",
    ),
    json_form=LIKE_SHOW,
)
@task_argument
@click.option(
    "--fresh",
    is_flag=True,
    help="Let its tools do again what they did, in a workflow of its own, without checkpoint.",
)
@reason_option
@if_version
@acts
@as_json
def retry_command(
    *, task: str, fresh: bool, place: Place, reason: str, version: int | None, json: bool
) -> None:
    """Let a failed or dead task be done again.

    Where no retry is left a --reason is needed, and its retries begin anew. What its tools did in earlier
    runs is replayed and not done again, unless --fresh.
    """
    found = place.opened().retry(task, reason, fresh=fresh, expected_version=version)
    anew = f"; its tools run anew, in workflow {printable(found.workflow)}" if fresh else ""
    tell(found, f"pending again: {named(found)}{anew}", json=json)


@command(
    "cancel",
    examples=(
        'ledger tasks cancel mail --reason "no longer wanted"',
        "ledger tasks cancel release --dependents",
    ),
    json_form=LIKE_SHOW,
)
@task_argument
@click.option(
    "--dependents", is_flag=True, help="What waits for it too; otherwise its dependency has failed."
)
@reason_option
@if_version
@acts
@as_json
def cancel_command(
    *, task: str, place: Place, dependents: bool, reason: str, version: int | None, json: bool
) -> None:
    """Cancel a task with its subtasks, for good."""
    found = place.opened().cancel(task, reason, dependents=dependents, expected_version=version)
    tell(found, f"cancelled: {named(found)}", json=json)


@command(
    "report",
    examples=("ledger tasks report req-17 RUNNING --source crawler --stage fetching",),
    json_form=LIKE_SHOW,
)
@task_argument
@click.argument("state")
@click.option("--source", default="", metavar="NAME", help="The program that it comes from.")
@click.option("--stage", default="", metavar="TEXT", help="What it is at.")
@value_options("What else it says", "data")
@acts
@as_json
def report_command(
    *, task: str, state: str, source: str, stage: str, value: Any, place: Place, json: bool
) -> None:
    """Take over what a program reports under its own names.

    STATE is RECEIVED, RUNNING, COMPLETED or the like. The task is made when it is first heard of, in a ledger
    that is made if there is none; what must lie between two states is recorded as implied.
    """
    if value is not None and not isinstance(value, dict):
        raise click.UsageError("--data is an object of JSON, as in --data '{\"page\": 7}'")
    tasks = place.made()
    event = StatusEvent(state=state, actor=tasks.agent, source=source, req=task, stage=stage, data=value)
    found = tasks.write_event(event)
    tell(found, f"{standing(found)}: {named(found)}", json=json)
