"""Commands that keep the file: export, import, prune, backup, restore, doctor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Literal

import click

from ledger import LedgerError, UsageError
from ledger_cli.app import FAILURE, NOTHING_MATCHED
from ledger_cli.options import (
    MOST,
    SPAN,
    as_json,
    command,
    database,
    database_argument,
    filters,
    opened_file,
    reader_of,
    yes,
)
from ledger_cli.screen import Screen, confirmed, note, progress
from ledger_ops.reader import open_store, path_of
from ledger_ops.values import Filter, Progress, clock, iso, printable


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


# -- export and import --


@command(
    "export",
    examples=(
        "ledger export > calls.jsonl",
        "ledger export --format csv -o failed.csv --status failed --since 7d",
        "ledger export --db old.db | ledger import - --db new.db",
    ),
    json_form=(
        'A first line {"ledger": 1, exported}; a line for each call, the oldest first, as in `ledger show`, '
        "its rows under rows (of an unlimited tool: tally); without a filter, and if --limit was not "
        "reached, a line {event: {…}} for each event."
    ),
    codes="3: a filter was given and no call matches it.",
)
@database_argument
@filters
@click.option("--limit", "-n", type=click.IntRange(1, MOST), help="How many at most, the oldest ones.")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--output", "-o", metavar="FILE", help="Write to a new file instead of stdout.")
def export_command(
    *, db: str | None, wanted: Filter, limit: int | None, form: Literal["jsonl", "csv"], output: str | None
) -> int:
    """Write calls as lines of JSON, or as a table (CSV).

    `ledger import` reads the JSON. No cell of the table is taken for a formula by a spreadsheet.
    """
    from ledger_ops.transfer import export

    reader = reader_of(db)
    with progress("export", prints=output is None) as steps:
        lines = _at_most(limit, export(reader, wanted, form=form, progress=steps), steps)
        if output is None:
            Screen().file.writelines(lines)
        else:
            _write_new(Path(output), lines)
    if output is not None:
        note(f"exported {steps.done:,} calls to {printable(output)}")
    return NOTHING_MATCHED if wanted.narrows and not steps.done else 0


def _at_most(limit: int | None, lines: Iterator[str], steps: Progress) -> Iterator[str]:
    """The heading and so many calls. A call counts when the line after it is asked for, which is dropped."""
    for line in lines:
        if steps.done == limit:
            return
        yield line


def _write_new(path: Path, lines: Iterable[str]) -> None:
    """Write a file that has its name only when it is whole, readable by its owner alone."""
    if path.exists():
        raise UsageError(f"{path} exists already, nothing was written; name another file, or remove that one")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with os.fdopen(
            os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
        ) as file:
            file.writelines(lines)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


@command(
    "import",
    examples=("ledger import calls.jsonl --db new.db", "zcat calls.jsonl.gz | ledger import -"),
    json_form="{calls, runs, events, known}; known calls were there already and stay as they were.",
)
@click.argument("source", metavar="FILE", type=click.File("r", encoding="utf-8"))
@database
@as_json
def import_command(*, source: IO[str], db: str | None, json: bool) -> None:
    """Add exported calls to a ledger.

    The ledger is made if there is none. FILE is what `ledger export` wrote as JSON lines; - is stdin.
    Calls that the ledger knows stay as they are; all lines are checked before the first is written.
    """
    from ledger_ops.transfer import import_lines

    target = str(path_of(db))
    with progress("import") as steps:
        found = import_lines(target, source, progress=steps)
    screen = Screen()
    if json:
        screen.json(found._asdict())
        return
    known = f"; {found.known:,} were known already and stay as they were" if found.known else ""
    screen.line(f"imported {found.calls:,} calls ({found.runs:,} runs, {found.events:,} events){known}")


# -- prune --


@command(
    "prune",
    examples=(
        "ledger prune --older-than 30d --dry-run",
        "ledger prune --older-than 30d",
        "ledger prune orders.db --older-than 52w --forget --yes",
    ),
    json_form=(
        "{calls that lost something, runs and events deleted, forgotten: calls that could now run again, "
        "bytes freed inside the file, before, dry_run}"
    ),
    codes="1: also if the answer was no.",
)
@database_argument
@click.option(
    "--older-than", type=SPAN, required=True, metavar="SPAN", help="What ended longer ago: 30d, 12h, 1w."
)
@click.option("--forget", is_flag=True, help="Also that calls succeeded: they could then run again.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@yes
@as_json
def prune_command(
    *, db: str | None, older_than: int, forget: bool, dry_run: bool, yes: bool, json: bool
) -> int:
    """Drop what old calls said, but not that they succeeded.

    Arguments, results, events and runs that did not succeed go. Of a call that succeeded its fingerprint
    and time stay, so that it never runs again for being old, unless --forget. What runs or is in doubt
    stays as it is. It works beside running guards.
    """
    from ledger_ops.upkeep import prune

    store = opened_file(db)
    before = time.time_ns() // 1000 - older_than
    if forget and not dry_run and not yes:
        planned = prune(store, before=before, forget=True, dry_run=True)
        what = f"{planned.forgotten:,} calls that succeeded before {clock(before)} could then run again"
        if not confirmed(what, "Forget them?", yes=not planned.forgotten):
            return FAILURE
    with progress("prune") as steps:
        found = prune(store, before=before, forget=forget, dry_run=dry_run, progress=steps)
    screen = Screen()
    if json:
        screen.json(found._asdict() | {"before": iso(before), "dry_run": dry_run})
        return 0
    did, gone = ("would prune", "would go") if dry_run else ("pruned", "are gone")
    text = f"{did} {found.calls:,} calls: {found.runs:,} runs and {found.events:,} events {gone}"
    text += f", {found.forgotten:,} calls can run again" if forget else ""
    screen.line(text if dry_run else f"{text}, {_megabytes(found.bytes)} are free for new records")
    return 0


# -- backup and restore --


@command(
    "backup",
    examples=("ledger backup /backups/ledger-$(date +%F).db", "ledger backup copy.db --db orders.db"),
    json_form="{path, bytes}",
)
@click.argument("file", type=click.Path(dir_okay=False))
@database
@as_json
def backup_command(*, file: str, db: str | None, json: bool) -> None:
    """Write a consistent copy while the ledger is in use.

    FILE must not exist yet. `ledger restore` puts it back.
    """
    from ledger_ops.upkeep import backup

    size = backup(opened_file(db), file)
    screen = Screen()
    if json:
        screen.json({"path": str(Path(file).absolute()), "bytes": size})
    else:
        screen.line(f"backed up to {printable(file)} ({_megabytes(size)})")


@command(
    "restore",
    examples=("ledger restore /backups/ledger-2026-05-01.db", "ledger restore copy.db --db orders.db --yes"),
    json_form="{path, calls, gap: {since, until}, kept: where the former ledger was saved, or null}",
    codes="1: also if the answer was no.",
)
@click.argument("file", type=click.Path())
@database
@yes
@as_json
def restore_command(*, file: str, db: str | None, yes: bool, json: bool) -> int:
    """Put a backup in the place of the ledger.

    The backup is checked first, and what is replaced is saved beside it. Calls made since it was made are
    unknown then and could run again: the gap is noted, and `ledger doctor` and `ledger brief` show it.
    """
    from ledger_ops.acts import who
    from ledger_ops.upkeep import examine, restore

    info = examine(file)
    target = str(path_of(db))
    made = f"the backup made {clock(info.made)} ({info.calls:,} calls)"
    if Path(target).exists():
        what = f"{_described(target)} would be replaced by {made}"
        if not confirmed(what, "Restore it?", yes=yes):
            return FAILURE
    found = restore(file, target, actor=who())
    screen = Screen()
    if json:
        gap = found.gap.to_dict()
        screen.json(
            {"path": str(Path(target).absolute()), "calls": found.calls, "gap": gap, "kept": found.kept}
        )
        return 0
    screen.line(f"restored {found.calls:,} calls to {printable(target)}")
    screen.line(f"calls made between {clock(found.gap.since)} and {clock(found.gap.until)} are unknown to it")
    if found.kept:
        screen.line(f"the former ledger was kept as {printable(found.kept)}")
    return 0


def _described(path: str) -> str:
    """What a restore would replace, and who uses it; a damaged file is what restores are for."""
    from ledger_ops.acts import alive_in, owners_of

    try:
        with closing(open_store(path)) as store:
            newest = store.browse("SELECT at FROM events ORDER BY seq DESC LIMIT 1")
            calls = store.browse("SELECT COUNT(DISTINCT call) FROM runs")[0][0]
            alive = alive_in(store, None)
    except LedgerError as error:
        return f"{path}, which cannot be read ({error}),"
    last = f", the newest record {clock(newest[0][0])}" if newest else ""
    running = f", although these still run and would be unknown: {owners_of(alive)}," if alive else ""
    return f"the ledger at {store.path} ({calls:,} calls{last}){running}"


# -- doctor --


@command(
    "doctor",
    examples=("ledger doctor", "ledger doctor orders.db --json | jq '.[] | select(.ok | not)'"),
    json_form="An array of findings: {name, ok, what, advice}.",
    codes="1: at least one finding is not well.",
)
@database_argument
@click.option(
    "--accept-gaps",
    is_flag=True,
    help="Note that what a restore left unknown has been looked into, and tell of it no more.",
)
@as_json
def doctor_command(*, db: str | None, accept_gaps: bool, json: bool) -> int:
    """Check the ledger, and say what to do.

    The file, its log, disk and permissions, the clock, runs without an outcome, gaps of a restore; of a
    server, whether it can be read and written, and the runs.
    """
    from ledger_ops.doctor import doctor

    if accept_gaps:
        from ledger_ops.acts import who
        from ledger_ops.upkeep import accept_gaps as accept

        note(f"gaps accepted: {accept(opened_file(db), actor=who())}")
    findings = doctor(db)
    screen = Screen()
    if json:
        screen.json_array(finding.to_dict() for finding in findings)
    else:
        from ledger_cli.render import finding

        for found in findings:
            screen.text(*finding(found))
    return 0 if all(found.ok for found in findings) else FAILURE
