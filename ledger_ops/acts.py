"""What a person decides about a call: retry it, resolve its doubt, clear a scope. Each leaves an event."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Sequence

import ledger
from ledger import InProgress, Record, Run, Store, UsageError
from ledger_ops.reader import AnyStore, NoSuchCall, reader_of
from ledger_ops.values import Filter, clock, printable, state_of


def who() -> str:
    """Who acts, for the event: the name of the person's account and of the machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        name = f"uid {os.getuid()}"
    return f"{name}@{os.uname().nodename}"


def retry(store: Store, call: str, *, actor: str, note: str = "") -> Record:
    """Release a call: the next identical one runs. Returns the call as it stands then.

    Raises `InProgress` while a run is alive, `NoSuchCall`, and `UsageError` if it would run anyway.
    """
    rows = _rows(store, call)
    last = rows[-1]
    won = [run for run in rows if run.succeeded_since(-1)]
    if not won and last.status in ("failed", "suspended"):
        raise UsageError(
            f"call {call} was not released: its latest run {last.status}, so it runs again anyway"
        )
    # The tool's max= is not in the ledger. It allowed at least the successes that came neither late nor
    # by force; one less than those may go on counting
    allowed = sum(run.status == "success" and not run.forced for run in won)
    op = ledger.Release(
        call,
        ledger.new_token(),
        last.run,
        last.owner,
        max=max(allowed, 1),
        ttl=None,
        why=_why("retry", actor, note),
    )
    return _judged(store, op, "released")


def resolve(
    store: Store, call: str, *, done: bool, actor: str, note: str = "", result_json: str | None = None
) -> Record:
    """Settle a call that is in doubt: its effect happened, or it did not. Returns the call as it stands then.

    Raises `InProgress` while a run is alive, `NoSuchCall`, and `UsageError` if nothing is in doubt.
    """
    if result_json is not None:
        if not done:
            raise UsageError("what was not done has no result; give a result with --done only")
        try:
            result_json = ledger._store_form(
                json.loads(result_json)
            )  # a "$" of the user's is no mark of ours
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"the result is no JSON that can be kept ({error}); nothing was resolved"
            ) from None
    last = _rows(store, call)[-1]
    why = _why("mark done" if done else "mark not done", actor, note)
    op = ledger.Resolve(
        call, ledger.new_token(), last.run, last.owner, done, result_json, reconciled=False, why=why
    )
    return _judged(store, op, "resolved")


def clear(
    store: AnyStore, wf: str | None = None, *, force: bool = False, actor: str = "", note: str = ""
) -> int:
    """Forget the calls of a workflow (None: of all) and say how many; each could run again.

    Raises `InProgress`, naming the owners, while runs are alive there, unless `force`.
    """
    if not force:
        refuse_alive(store, wf)
    found = reader_of(store).count(Filter(wf=wf))
    store.reset(wf, store.clock.wall(), force=force, why=_why("clear", actor, note) if actor else "")
    return found


def refuse_alive(store: AnyStore, wf: str | None) -> list[Record]:
    """Raise `InProgress`, naming the owners, while calls of a workflow (None: of all) run; else an empty list."""
    alive = alive_in(store, wf)
    if alive:
        raise InProgress(
            f"nothing was changed: still running: {owners_of(alive)}; wait for them, stop them, or use --force",
            alive[0],
        )
    return alive


def owners_of(alive: Sequence[Record]) -> str:
    """Which calls run, and where, in a few words."""
    named = ", ".join(f"{r.short} (call {r.call[:12]}) in {r.holder}" for r in alive[:5])
    return printable(f"{named} and {len(alive) - 5} more" if len(alive) > 5 else named)


def alive_in(store: AnyStore, wf: str | None) -> list[Record]:
    """Calls of a workflow (None: of all) whose latest run is alive, oldest first."""
    return [record for record in reader_of(store).running() if wf in (None, record.wf)]


def _rows(store: Store, call: str) -> list[Run]:
    rows = store.rows(call)
    if not rows:
        raise NoSuchCall(f"call {call} is not in the ledger, or its tool is unlimited and is never blocked")
    return rows


def _why(what: str, actor: str, note: str) -> str:
    return f"{what} by {actor}" + (f": {note}" if note else "")


def _judged(store: Store, op: ledger.Release | ledger.Resolve, wanted: str) -> Record:
    verdict = store.transact(op)
    record = store.describe(_rows(store, op.call))
    if verdict.kind == "live":
        raise InProgress(
            f"{record.short} was not {wanted}: run {record.run} of call {record.call} is running in "
            f"{record.holder} since {clock(record.started)}; wait for it, or stop that process",
            record,
        )
    if verdict.kind != wanted:
        raise UsageError(
            f"{record.short}: nothing was {wanted}: run {record.run} of call {record.call} is "
            f"{state_of(record)}; look again with `ledger inspect {record.call[:12]}`",
            record,
        )
    return record
