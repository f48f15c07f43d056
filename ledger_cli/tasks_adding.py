"""Commands that add: add, depend."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from typing import IO, Any

import click

from ledger_cli.options import MOST, as_json, command, json_of
from ledger_cli.screen import Screen
from ledger_cli.tasks_grids import task_dict
from ledger_cli.tasks_options import (
    DEPENDENCY,
    LATER,
    LIKE_SHOW,
    ONE_TASK,
    Place,
    acts,
    if_version,
    named,
    or_stdin,
    task_argument,
    tell,
)
from ledger_tasks import Dep, Task


@command(
    "add",
    examples=(
        'ledger tasks add mail "tell Ann" --priority 8',
        "ledger tasks add file --depends mail --depends invoice:run --needs python --max-retries 3",
        'ledger tasks add mail.1 "find the address" --parent mail',
        'ledger tasks add bill --type mail --payload \'{"to": "ann@example.com"}\'',
        "ledger tasks add --from plan.json",
    ),
    json_form=f"{ONE_TASK} With --from an array of tasks.",
)
@click.argument("task", metavar="[ID]", required=False)
@click.argument("description", default="", required=False)
@click.option("--title", default="", help="What to call it in lists.")
@click.option("--type", "kind", default="task", show_default=True, help="What kind of work it is.")
@click.option(
    "--priority", type=click.IntRange(1, 10), default=5, show_default=True, help="1 to 10, higher first."
)
@click.option(
    "--depends",
    "depends_on",
    type=DEPENDENCY,
    multiple=True,
    metavar="ID[:skip|fail|run]",
    help="What must be done first, and what happens here if that fails. [skip]",
)
@click.option("--parent", default="", metavar="ID", help="The task that it is a part of.")
@click.option("--tag", "tags", multiple=True, help="A tag; more than once: all of these.")
@click.option(
    "--needs", "capabilities", multiple=True, metavar="WORD", help="What an agent must be able to do."
)
@click.option(
    "--not-before", type=LATER, metavar="TIME", help="Not offered before: 2h (from now), 2026-05-01T14:30."
)
@click.option(
    "--deadline", type=LATER, metavar="TIME", help="When it ought to be done; nothing happens by itself."
)
@click.option(
    "--max-retries",
    type=click.IntRange(0, MOST),
    default=0,
    show_default=True,
    help="How often it may be tried again.",
)
@click.option("--payload", metavar="JSON", help="What its handler needs to know; - reads it from stdin.")
@click.option("--backlog", is_flag=True, help="Keep it for later: offered to nobody until `unshelve`.")
@click.option(
    "--from",
    "source",
    type=click.File("r", encoding="utf-8"),
    metavar="FILE",
    help="Add many, all or none: a JSON array of tasks, or one in each line; - is stdin.",
)
@acts
@as_json
def add_command(
    *,
    place: Place,
    task: str | None,
    source: IO[str] | None,
    kind: str,
    payload: str | None,
    backlog: bool,
    json: bool,
    **fields: Any,
) -> None:
    """Add a task, or many at once.

    The ledger is made if there is none. An unknown dependency, a cycle or an id that is there already is
    refused, and then nothing is added.
    """
    if (task is None) == (source is None):
        raise click.UsageError("name the task to add by its ID, or the file of many with --from")
    if source is None:
        given = None if payload is None else json_of(or_stdin(payload), "--payload")
        new: list[Any] = [Task(id=task or "", type=kind, payload=given, **fields)]
    else:
        new = _read(source)
    found = place.made().add_tasks(new, backlog=backlog)
    if source is None:
        tell(found[0], f"added: {named(found[0])}", json=json)
    elif json:
        Screen().json_array(map(task_dict, found))
    else:
        Screen().line(f"added {len(found):,} tasks")


def _read(source: IO[str]) -> list[dict[str, Any]]:
    """Tasks of a JSON array, or of an object in each line."""
    text = source.read()
    try:
        found = json_module.loads(text)
    except ValueError:
        found = [json_of(line, "--from") for line in text.splitlines() if line.strip()]
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise click.UsageError('--from takes an array of objects, as in [{"id": "a", "depends_on": ["b"]}]')
    return [_with_dependencies(one) for one in found]


def _with_dependencies(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a task; its dependencies are "a", ["a", "run"] or {"id": "a", "on_failure": "run"}."""
    for name in ("depends_on", "dependencies", "prerequisites"):
        if isinstance(fields.get(name), list):
            fields = {**fields, name: [_dependency(one) for one in fields[name]]}
    return fields


def _dependency(one: Any) -> Any:
    try:
        if isinstance(one, Mapping):
            return Dep(**one)
        return Dep(*one) if isinstance(one, list) else one
    except TypeError:
        raise click.UsageError(
            f'{json_module.dumps(one)} is no dependency; write "a", ["a", "run"] or {{"id": "a"}}'
        ) from None


@command(
    "depend",
    examples=("ledger tasks depend file mail", "ledger tasks depend file mail:run"),
    json_form=LIKE_SHOW,
)
@task_argument
@click.argument("dependency", type=DEPENDENCY, metavar="ON[:skip|fail|run]")
@if_version
@acts
@as_json
def depend_command(*, task: str, dependency: Dep, place: Place, version: int | None, json: bool) -> None:
    """Let a task that nobody has begun wait for one more."""
    found = place.opened().add_dependency(task, dependency, expected_version=version)
    tell(found, f"{named(found)} waits for {found.waiting:,}", json=json)
