"""Commands by which a person decides: retry, resolve, clear. Each leaves an event with who and why."""

from __future__ import annotations

import json as json_module

import click

from ledger import Record
from ledger_cli.app import FAILURE, NOTHING_MATCHED
from ledger_cli.grids import short_call
from ledger_cli.options import as_json, command, database, database_argument, json_of, opened, yes
from ledger_cli.screen import Screen, confirmed
from ledger_cli.screen import note as tell
from ledger_ops import acts
from ledger_ops.reader import reader_of
from ledger_ops.values import Filter, printable, record_dict, state_of

_NOTE = click.option("--note", default="", metavar="TEXT", help="Why; it is kept in the event.")


def _named(record: Record) -> str:
    return f"{printable(record.short)} (call {short_call(record)})"


def _tell(record: Record, text: str, *, json: bool) -> None:
    screen = Screen()
    if json:
        screen.json(record_dict(record))
    else:
        screen.line(text)


@command(
    "retry",
    examples=("ledger retry 3fa9", 'ledger retry 3fa9 --note "the customer asked for a second copy"'),
    json_form="The call as it stands then, as in `ledger show`.",
)
@click.argument("call")
@database
@_NOTE
@as_json
def retry_command(*, call: str, db: str | None, note: str, json: bool) -> None:
    """Release a call: the next identical one runs.

    It may have succeeded or be in doubt. It runs when the program makes it again, not now. Refused while
    a run is alive.
    """
    store = opened(db)
    record = acts.retry(store, reader_of(store).find(call), actor=acts.who(), note=note)
    _tell(record, f"released: {_named(record)}; the next identical call runs", json=json)


def _checked_json(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """A result as JSON text; anything else is refused before the ledger is opened."""
    return None if value is None else json_module.dumps(json_of(value))


@command(
    "resolve",
    examples=(
        'ledger resolve 3fa9 --done --result \'{"receipt": 17}\' --note "seen in the bank\'s list"',
        "ledger resolve 3fa9 --not-done",
    ),
    json_form="The call as it stands then, as in `ledger show`.",
)
@click.argument("call")
@database
@click.option("--done/--not-done", default=None, help="Whether it took effect.")
@click.option(
    "--result", metavar="JSON", callback=_checked_json, help="What it gave back; duplicates get it."
)
@_NOTE
@as_json
def resolve_command(
    *, call: str, db: str | None, done: bool | None, result: str | None, note: str, json: bool
) -> None:
    """Settle what is in doubt: it took effect, or it did not.

    Done, identical calls are blocked from then on; not done, the next one runs. Refused while a run is alive.
    """
    if done is None:
        raise click.UsageError("say whether it took effect: --done or --not-done")
    if result is not None and not done:
        raise click.UsageError("what was not done has no result; give --result with --done only")
    store = opened(db)
    found = reader_of(store).find(call)
    record = acts.resolve(store, found, done=done, actor=acts.who(), note=note, result_json=result)
    then = "identical calls are blocked" if done else "the next identical call runs"
    _tell(record, f"resolved: {_named(record)} is {state_of(record)}; {then}", json=json)


@command(
    "clear",
    examples=("ledger clear --wf order-17", 'ledger clear orders.db --yes --note "test data"'),
    json_form="{forgotten: how many calls, wf}",
    codes="1: also if the answer was no. 3: --wf was given and has no calls.",
)
@database_argument
@click.option("--wf", help="Only this workflow.")
@click.option("--force", is_flag=True, help="Also while runs are alive: they may then run beside themselves.")
@_NOTE
@yes
@as_json
def clear_command(*, db: str | None, wf: str | None, force: bool, note: str, yes: bool, json: bool) -> int:
    """Forget calls, so that each could run again.

    What happened stays in the events, and who forgot it.
    """
    store = opened(db)
    scope = f"workflow {printable(wf)}" if wf is not None else "all workflows"
    count = reader_of(store).count(Filter(wf=wf))
    if not count:
        tell(f"there are no calls in {scope}; nothing was changed")
        if json:
            Screen().json({"forgotten": 0, "wf": wf})
        return NOTHING_MATCHED if wf is not None else 0
    alive = acts.alive_in(store, wf) if force else acts.refuse_alive(store, wf)
    warning = f", although these still run: {acts.owners_of(alive)}" if alive else ""
    what = f"{count:,} calls of {scope} in {store.address} would be forgotten and could run again{warning}"
    if not confirmed(what, "Forget them?", yes=yes):
        return FAILURE
    forgotten = acts.clear(store, wf, force=force, actor=acts.who(), note=note)
    if json:
        Screen().json({"forgotten": forgotten, "wf": wf})
    else:
        Screen().line(f"forgot {forgotten:,} calls of {scope}")
    return 0
