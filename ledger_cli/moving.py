"""The command that moves a ledger to another store."""

from __future__ import annotations

import click

from ledger_cli.options import as_json, command
from ledger_cli.screen import Screen, note, progress
from ledger_ops.values import printable


@command(
    "move",
    examples=(
        "ledger move ledger.db postgresql://app@db.example/app",
        "ledger move redis://cache:6379/0 postgresql://app@db.example/app --from-namespace shop",
        "ledger move ledger.db postgresql://app@db.example/app --cancel",
    ),
    json_form=(
        "{state, calls in the target, late_ends carried now, source, target}; state: moved, late ends "
        "carried, nothing new or cancelled."
    ),
    codes="1: also if it is not complete; the same command goes on.",
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--from-namespace", metavar="NAME", help="Of the source, if it is a server. [ledger]")
@click.option("--to-namespace", metavar="NAME", help="Of the target, if it is a server. [ledger]")
@click.option(
    "--cancel", is_flag=True, help="Undo a move that is not complete: unseal FROM, empty TO of what came."
)
@click.option(
    "--target-is-lost", is_flag=True, help="With --cancel: what FROM went to is gone and was never opened."
)
@as_json
def move_command(
    *,
    source: str,
    target: str,
    from_namespace: str | None,
    to_namespace: str | None,
    cancel: bool,
    target_is_lost: bool,
    json: bool,
) -> None:
    """Move a ledger to another store.

    FROM and TO are paths or URLs; TO must be empty. Callers may still be running. Every call goes along
    whole, with its runs, results and events, so what was done before is a duplicate afterwards too.

    There is no window in which a call can run on both sides. TO is closed from the first step on: it refuses
    every run. FROM works on while it is copied. Then it is sealed: by a barrier of its own database, in one
    moment, and from then on it refuses every run too, with an error that names TO; what runs goes on there
    and is waited for. What changed meanwhile is copied again, both sides are compared, and only then TO
    opens, in one step. Until then callers are refused on both sides; point them at TO.

    How far it came is kept in both ledgers, so after an interruption the same command goes on; FROM stays
    sealed. DynamoDB and MongoDB have no such barrier, and no log that tells what changes: they are sealed
    before the copy, and the move goes on when every program must have looked at the seal (11 s); a claim that
    comes later is given back before its tool is entered. Events of their calls stay behind.
    A run whose lease lapsed goes along as in doubt; if its end still comes to FROM, the same command
    carries it over. What FROM counts after the move (blocked attempts, unlimited tools) stays there, and so
    do tasks: `ledger tasks export` and `import` take them along, a session at a time.
    """
    from ledger_ops.move import Move, opened_sides

    if target_is_lost and not cancel:
        raise click.UsageError("--target-is-lost belongs to --cancel")
    with (
        opened_sides(source, target, source_namespace=from_namespace, target_namespace=to_namespace) as sides,
        progress("move") as steps,
    ):
        move = Move(*sides, progress=steps, tell=lambda text: note(printable(text)))
        try:
            found = move.cancel(target_is_lost=target_is_lost) if cancel else move.run()
        except KeyboardInterrupt:
            note("interrupted: what came is kept; the same command goes on, --cancel undoes it")
            raise
    here, there = (side.address for side in sides)
    screen = Screen()
    if json:
        screen.json({**found._asdict(), "source": here, "target": there})
    else:
        screen.line(printable(_told(found.state, found.calls, found.late_ends, here, there)))


def _told(state: str, calls: int, late_ends: int, here: str, there: str) -> str:
    ends = f"; {late_ends:,} late ends were carried" if late_ends else ""
    return {
        "moved": f"moved {calls:,} calls to {there}{ends}; {here} stays sealed",
        "late ends carried": f"carried {late_ends:,} ends that came to {here} after the move to {there}",
        "nothing new": f"nothing new: {here} was moved to {there}, and nothing ended there since",
        "cancelled": f"cancelled: {here} begins runs again; {there} is empty, and closed until a move comes",
    }[state]
