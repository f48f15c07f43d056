"""Commands about compounds that run elsewhere, or have ended: progress, list, cancel, export."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ledger_cli import compound_grids as grids
from ledger_cli.compound_grids import is_over
from ledger_cli.compound_shown import Shown
from ledger_cli.options import MOST, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_options import Place, acts, looks, reason_option
from ledger_ops.values import printable
from ledger_tasks import compound_view as view

PROGRESS_JSON = (
    "{id, prompt, status (planned, executing, completed, partial, failed, cancelled), reasoning, "
    "subtasks: [{id, index, description, tier_hint, tier_assigned, model, depends_on: [index], "
    "status (pending, queued, routing, executing, completed, failed), result, cost, tokens, started_at, "
    "completed_at}], subtask_count, completed_count, failed_count, created_at, planned_at, completed_at, "
    "total_cost, total_tokens}; costs are US dollars, times ISO 8601 in UTC."
)
LISTED_JSON = (
    "{id, prompt (its first 100 characters), status, subtask_count, completed_count, created_at, planned_at, "
    "completed_at, total_cost}"
)
_NAME = click.option("--name", metavar="NAME", help="Only those of the runners of this name.")
_LOOK_SECONDS = 0.25


@command(
    "progress",
    examples=(
        "ledger compound progress c-1f20",
        "ledger compound progress c-1f20 --follow",
        "ledger compound progress c-1f20 --json | jq '.subtasks[].status'",
    ),
    json_form=PROGRESS_JSON,
)
@click.argument("compound", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Stay until it has ended: on a terminal a live view.")
@click.option("--results", is_flag=True, help="Print the whole results too.")
@looks
@as_json
def progress_command(*, compound: str, follow: bool, results: bool, place: Place, json: bool) -> None:
    """Show a compound: its subtasks as a tree, costs and times.

    Wherever it is executed. A subtask stands below the last one that it waits for.
    """
    tasks = place.opened()
    found = view.progress(tasks, compound)
    with Shown(tasks, compound, json=json, results=results) as shown:
        while follow and not is_over(found):
            shown.look()
            found = shown.found
            time.sleep(_LOOK_SECONDS)
        shown.end(found)


@command(
    "list",
    examples=("ledger compound list", "ledger compound list --limit 100 --json | jq '.[].total_cost'"),
    json_form=f"An array, the newest first, each {LISTED_JSON}.",
)
@click.option(
    "--limit", "-n", type=click.IntRange(1, MOST), default=20, show_default=True, help="How many at most."
)
@_NAME
@looks
@as_json
def list_command(*, limit: int, name: str | None, place: Place, json: bool) -> None:
    """List compounds, the newest first."""
    found = view.recent(place.opened(), limit, name=name)
    screen = Screen()
    if json:
        screen.json_array(found)
    elif found:
        screen.grid(grids.compounds(found, full=not screen.is_terminal))
    else:
        note('no compounds yet; begin one: ledger compound submit "…" --planner MODULE:FUNCTION')


@command(
    "cancel",
    examples=('ledger compound cancel c-1f20 --reason "asked for twice"',),
    json_form="Its full picture then, as in `ledger compound progress`.",
)
@click.argument("compound", metavar="ID")
@reason_option
@acts
@as_json
def cancel_command(*, compound: str, reason: str, place: Place, json: bool) -> None:
    """Cancel what has not ended of a compound.

    What is executed at this moment is given up soon; what was done stays done.
    """
    found = view.cancel(place.opened(), compound, reason)
    if json:
        Screen().json(found)
    else:
        Screen().line(
            f"cancelled: {printable(compound)}; {found['completed_count']:,} of {found['subtask_count']:,} "
            "subtasks were completed"
        )


@command(
    "export",
    examples=("ledger compound export bill.jsonl", "ledger compound export | jq -s 'map(.cost) | add'"),
    json_form=(
        "A line for each execution: {time, compound, index, tier, model, success, tokens, cost, preview}."
    ),
)
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path), required=False)
@_NAME
@looks
@as_json
def export_command(*, file: Path | None, name: str | None, place: Place, json: bool) -> None:
    """Write a line of JSON for each execution, for billing.

    To a file, or to stdout. Executions that failed or were given up are in it too, for they may have cost.
    """
    del json  # it is JSON either way
    count = view.export(place.opened(), file or sys.stdout, name=name)
    if file is not None:
        note(f"{count:,} executions written to {file}")
