"""Commands that keep the ledger: stale, recover, verify, export, import."""

from __future__ import annotations

import sys
from typing import Any

import click

from ledger_cli.app import FAILURE
from ledger_cli.options import SPAN, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_looking import show_tasks
from ledger_cli.tasks_options import Place, acts, all_sessions, looks, named, seconds_of
from ledger_ops.values import printable

_ARRAY = "An array of tasks, each as in `ledger tasks list`."


@command(
    "stale", examples=("ledger tasks stale", "ledger tasks stale --older-than 10m --json"), json_form=_ARRAY
)
@click.option(
    "--older-than", type=SPAN, metavar="SPAN", help="Whose holder has said nothing for so long: 90s, 10m."
)
@looks
@as_json
def stale_command(*, older_than: int | None, place: Place, json: bool) -> None:
    """List held tasks whose lease has lapsed.

    What is paused or in review waits for a person, and is not stale.
    """
    found = place.opened().stale_tasks(seconds_of(older_than))
    show_tasks(iter(found), json=json, empty="nothing is stale")
    if found and not json:
        note("what has lapsed is brought back by `ledger tasks recover`")


@command("recover", examples=("ledger tasks recover", "ledger tasks recover --json"), json_form=_ARRAY)
@acts
@as_json
def recover_command(*, place: Place, json: bool) -> None:
    """Bring back what dead agents left, and list it.

    A task that nobody had begun is pending again; one that was begun counts a retry, and is dead when none is
    left. Live work is never touched; two at once do it once.
    """
    found = place.opened().recover()
    if json:
        show_tasks(iter(found), json=True, empty="")
        return
    for task in found:
        Screen().line(f"pending again: {named(task)}; {printable(task.reason)}")
    if not found:
        note("nothing was to be brought back; what has no retry left is in `ledger tasks dead`")


@command(
    "verify",
    examples=("ledger tasks verify", "ledger tasks verify --all-sessions --json"),
    json_form="{ok, tasks, events, faults: what is wrong, in words}.",
    codes="1: something is wrong.",
)
@all_sessions
@looks
@as_json
def verify_command(*, all_sessions: bool, place: Place, json: bool) -> int:
    """Prove that every task is what its events add up to.

    And that no event was altered: each carries the hash of the one before it.
    """
    found = place.opened().verify(all_sessions=all_sessions)
    if json:
        Screen().json(found.to_dict())
    else:
        for fault in found.faults:
            Screen().line(printable(str(fault)))
        word = "all is well" if found.ok else f"{len(found.faults):,} faults"
        Screen().line(f"{word}: {found.tasks:,} tasks, {found.events:,} events")
    return 0 if found.ok else FAILURE


@command(
    "export",
    examples=("ledger tasks export -o tasks.json", "ledger tasks export --session s-1 | gzip > s-1.json.gz"),
    json_form="What is written is JSON anyway; with --json and -o, {session, tasks, file}.",
)
@click.option(
    "--output", "-o", metavar="FILE", help="Write this file, whole or not at all, instead of stdout."
)
@looks
@as_json
def export_command(*, output: str | None, place: Place, json: bool) -> None:
    """Write the tasks of a session with their events as JSON.

    The file is made for git: the same tasks give the same text. `ledger tasks import` reads it back.
    """
    tasks: Any = place.opened()
    count = tasks.export(sys.stdout if output is None else output)
    if output is None:
        return
    if json:
        Screen().json({"session": tasks.session, "tasks": count, "file": output})
    else:
        note(f"exported {count:,} tasks of session {printable(tasks.session)} to {printable(output)}")


@command(
    "import",
    examples=(
        "ledger tasks import tasks.json --db new.db",
        "zcat s-1.json.gz | ledger tasks import - --session s-1",
    ),
    json_form="{session, tasks and events that came in, known: tasks that were there already}.",
)
@click.argument("source", metavar="FILE", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@acts
@as_json
def import_command(*, source: str, place: Place, json: bool) -> None:
    """Read back what was exported, whole or not at all.

    FILE is what `ledger tasks export` wrote; - is stdin. The ledger is made if there is none. Tasks that are
    there already with the same story stay as they are.
    """
    tasks: Any = place.made()
    found = tasks.import_from(sys.stdin if source == "-" else source)
    if json:
        told = {name: getattr(found, name) for name in ("tasks", "events", "known")}
        Screen().json({"session": tasks.session, **told})
        return
    known = f"; {found.known:,} were there already" if found.known else ""
    Screen().line(f"imported {found.tasks:,} tasks ({found.events:,} events){known}")
