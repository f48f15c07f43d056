"""`ledger run`: a shell command that runs once for its key; whoever asks again gets what it printed."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from datetime import timedelta
from typing import Any

import click

import ledger
from ledger import Guard, InDoubt, InProgress, KeyConflict, LedgerError, Outcome
from ledger_cli.app import complain
from ledger_cli.child import EndUnknown, Failed, NotStarted, Output, Relay, Stopped, wrote
from ledger_cli.grids import short_call
from ledger_cli.options import SECONDS, command, database
from ledger_ops.reader import open_ledger, url_of
from ledger_ops.values import clock, printable

#: the name under which lists show these calls; their arguments are the command line
TOOL = "ledger.run"


def _not_empty(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("it is empty; a key must name one action")
    return value


@command(
    "run",
    examples=(
        "ledger run --key backup-$(date +%F) -- pg_dump -f /backups/today.sql shop",
        "ledger run --key deploy-$GIT_SHA --wf deploy --retry-failed -- ./deploy.sh production",
        "ledger run --key newsletter --ttl 1d --wait 60 -- ./send.sh",
    ),
    codes=(
        "The command's own, also when its recorded output is printed; 128 + n if a signal n killed it (it "
        "is in doubt then); 127 not found, 126 not executable (nothing ran); 1 for a key in use, a run that "
        "is alive, a doubt, an exit code that prune dropped, or a ledger that cannot be written (nothing "
        "ran); 2 usage."
    ),
    context_settings={"allow_interspersed_args": False},
)
@click.argument("words", metavar="-- CMD [ARGS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--key",
    required=True,
    callback=_not_empty,
    help="What makes it the same action; it runs once for each key.",
)
@click.option("--wf", help="Workflow: the scope of the key. [LEDGER_WORKFLOW, default]")
@click.option("--ttl", type=SECONDS, metavar="SECONDS", help="After so long the key is free again: 1d, 12h.")
@click.option(
    "--timeout",
    type=SECONDS,
    default="5m",
    show_default=True,
    metavar="SECONDS",
    help="After so long a silence this process is taken to be dead; it does not limit the command.",
)
@click.option(
    "--wait", type=SECONDS, metavar="SECONDS", help="If it runs elsewhere, wait so long for its output."
)
@click.option(
    "--on-doubt",
    type=click.Choice(["rerun", "block"]),
    default="block",
    show_default=True,
    help="If the run before was killed: ask a person (block), or run it again, maybe beside what it left.",
)
@click.option(
    "--retry-failed", is_flag=True, help="An exit code other than 0 is a failure: it may run again."
)
@database
def run_command(
    *,
    words: tuple[str, ...],
    key: str,
    wf: str | None,
    ttl: int | None,
    timeout: int,
    wait: int | None,
    on_doubt: str,
    retry_failed: bool,
    db: str | None,
) -> int:
    """Run a shell command once for its key.

    For cron jobs, deploy scripts and agents that use a shell. Its output is shown as it comes and is
    recorded with its exit code, whatever that is: whoever asks again with the key gets the same output
    (of more than 8 MB the first and the last 4) and the same exit code, and nothing runs. Another command
    with the key is an error. Signals are passed on. The command line is recorded as it is, so keep
    secrets out of it.

    If this process is killed, so is the command, but not what that has started. Nobody knows then how far
    it came: it is in doubt, and blocked until `ledger resolve` says, unless --on-doubt rerun.
    """
    url = url_of(db)
    guard = Guard(url, workflow=wf, quiet=True)
    relay = Relay()
    output = Output(relay)

    def shell(command: list[str]) -> dict[str, Any]:
        _refuse_other_command(url)
        return output.execute(command, retry_failed=retry_failed)

    options: dict[str, Any] = {
        "ttl": _seconds(ttl),
        "timeout": _seconds(timeout),
        "wait": _seconds(wait) or 0,
        "on_doubt": on_doubt,
    }
    guard.policy(shell, name=TOOL, match=["command"], replay=True, **options)
    try:
        with output, relay:
            found: Outcome[dict[str, Any]] = guard.call(shell, list(words), ledger_key=key)
        return _told(found)
    except LedgerError as error:
        return _refused(error)
    except Failed as ended:
        return ended.code
    except (NotStarted, EndUnknown) as ended:
        doubt = "; it is in doubt now, see `ledger doubts`" if isinstance(ended, EndUnknown) else ""
        complain(f"{ended}{doubt}")
        return ended.code
    except Stopped as stopped:
        complain(str(stopped))
        return stopped.code
    finally:
        guard.close()


def _seconds(micros: int | None) -> timedelta | None:
    return None if micros is None else timedelta(microseconds=micros)


def _refuse_other_command(url: str) -> None:
    """A command that failed keeps its key; raises `KeyConflict`, which frees the key again for it.

    The guard compares with what ran, runs or is in doubt: for it a failure frees the key altogether.
    """
    mine = ledger.current()
    if mine is None or mine.run == 1:
        return
    with closing(open_ledger(url)) as store:
        *before, own = [run for run in store.rows(mine.call) if run.run <= mine.run]
        last = next((run for run in reversed(before) if not _ran_nothing(run)), None)
        if last is not None and _failed(last) and last.matched != own.matched:
            raise KeyConflict("nothing ran: the key belongs to another command", store.describe([last]))


def _failed(run: ledger.Run) -> bool:
    return run.status == "failed" and _error_of(run) == Failed.__name__


def _ran_nothing(run: ledger.Run) -> bool:
    return run.status == "failed" and _error_of(run) in (NotStarted.__name__, KeyConflict.__name__)


def _error_of(run: ledger.Run) -> str:
    return (run.error or "").partition(":")[0]


def _told(found: Outcome[dict[str, Any]]) -> int:
    """Print what a duplicate gets; the exit code of the command."""
    value: Any = found.value
    if isinstance(value, dict) and "code" in value:
        if not found.executed:
            for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
                text = value.get(name, "")
                wrote(stream.fileno(), text if isinstance(text, bytes) else str(text).encode())
        return int(value["code"])
    done = f"{_which(found.record)} is done already"
    if found.record.args_json is None:
        return complain(f"{done}, but `ledger prune` dropped its exit code and its output; nothing ran")
    # a person marked it done: what is known then is what that person said
    complain(f"{done} and no output was recorded; nothing ran")
    return value if isinstance(value, int) else 0


# -- words --


def _refused(error: LedgerError) -> int:
    """Say why nothing ran, in the words of this command; the exit code of a failure."""
    if isinstance(error, KeyConflict):
        return complain(_conflict(error.record))
    if isinstance(error, InDoubt):
        return complain(_in_doubt(error.record))
    if isinstance(error, InProgress) and error.record is not None:
        return complain(_in_progress(error.record))
    more = "; wait for it with --wait 60" if isinstance(error, InProgress) else ""
    return complain(f"{error}{more}")


def _which(record: ledger.Record) -> str:
    return f"call {short_call(record)}"


def _command_of(record: ledger.Record) -> str:
    """The command line in quotes; prune drops it and leaves its digest."""
    if not record.args_json:
        return "whose words `ledger prune` dropped"
    return f"`{printable(shlex.join(map(str, record.args.get('command', ()))))}`"


def _conflict(record: ledger.Record | None) -> str:
    if record is None:
        return "nothing ran: the key belongs to another command; use another key"
    return (
        f"nothing ran: the key belongs to another command, {_command_of(record)} ({_which(record)}, "
        f"{clock(record.started)}); use another key for another action"
    )


def _in_progress(record: ledger.Record) -> str:
    return (
        f"nothing ran: {_which(record)} is running in {printable(record.holder)} since "
        f"{clock(record.started)}; wait for it, with --wait 60 for its output"
    )


def _in_doubt(record: ledger.Record | None) -> str:
    if record is None:
        return "nothing ran: the run before ended without a known outcome; see `ledger doubts`"
    return (
        f"nothing ran: run {record.run} of {_which(record)}, started {clock(record.started)}, ended without "
        f"a known outcome; find out whether it took effect and whether anything of it still runs, then "
        f"`ledger resolve {short_call(record)} --done` or `--not-done`"
    )
