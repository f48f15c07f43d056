"""`ledger run`: a shell command that runs once for its key; whoever asks again gets what it printed."""

from __future__ import annotations

import shlex
import sys
from datetime import timedelta
from typing import Any

import click

import ledger
from ledger import Guard, InDoubt, InProgress, KeyConflict, Outcome
from ledger_cli.app import complain
from ledger_cli.child import Failed, Killed, NotStarted, Relay, Stopped, execute, wrote
from ledger_cli.grids import SHORT_CALL
from ledger_cli.options import SECONDS, command, database
from ledger_ops.reader import path_of
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
        "is alive, a doubt, or a ledger that cannot be written (nothing ran); 2 usage."
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
    default="rerun",
    show_default=True,
    help="What to do if the run before was killed.",
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
    and the same exit code, and nothing runs. Another command with the key is an error. Signals are passed
    on. The command line is recorded as it is, so keep secrets out of it.
    """
    guard = Guard(path_of(db), workflow=wf, quiet=True)
    relay = Relay()

    def shell(command: list[str]) -> dict[str, Any]:
        return execute(command, relay, retry_failed=retry_failed)

    options: dict[str, Any] = {
        "ttl": _seconds(ttl),
        "timeout": _seconds(timeout),
        "wait": _seconds(wait) or 0,
        "on_doubt": on_doubt,
    }
    guard.policy(shell, name=TOOL, match=["command"], replay=True, **options)
    try:
        with relay:
            found = _asked(guard, shell, list(words), key)
        return _told(found)
    except Stopped as stopped:
        complain(str(stopped))
        return stopped.code
    finally:
        guard.close()


def _seconds(micros: int | None) -> timedelta | None:
    return None if micros is None else timedelta(microseconds=micros)


def _asked(guard: Guard, shell: Any, words: list[str], key: str) -> Outcome[dict[str, Any]] | int:
    """What the guard answers; the exit code where it is no outcome."""
    try:
        outcome: Outcome[dict[str, Any]] = guard.call(shell, words, ledger_key=key)
        return outcome
    except Failed as ended:
        return ended.code
    except NotStarted as ended:
        complain(str(ended))
        return ended.code
    except Killed as ended:
        complain(f"{ended}; it is in doubt now, see `ledger doubts` before it is run again")
        return ended.code
    except KeyConflict as error:
        return complain(_conflict(error.record))
    except InProgress as error:
        more = "; wait for it with --wait 60" if error.record is None else ""
        return complain(_in_progress(error.record) if error.record else f"{error}{more}")
    except InDoubt as error:
        return complain(_in_doubt(error.record))


def _told(found: Outcome[dict[str, Any]] | int) -> int:
    """Print what a duplicate gets; the exit code of the command."""
    if isinstance(found, int):
        return found
    value: Any = found.value
    if isinstance(value, dict) and "code" in value:
        if not found.executed:
            for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
                text = value.get(name, "")
                wrote(stream.fileno(), text if isinstance(text, bytes) else str(text).encode())
        return int(value["code"])
    # a person marked it done: what is known then is what that person said
    complain(f"{_which(found.record)} is done already and no output was recorded; nothing ran")
    return value if isinstance(value, int) else 0


# -- words --


def _which(record: ledger.Record) -> str:
    return f"call {record.call[:SHORT_CALL]}"


def _command_of(record: ledger.Record) -> str:
    words = record.args.get("command", ()) if record.args_json else ()
    return printable(shlex.join(map(str, words)))


def _conflict(record: ledger.Record | None) -> str:
    if record is None:
        return "nothing ran: the key belongs to another command; use another key"
    return (
        f"nothing ran: the key belongs to another command, `{_command_of(record)}` ({_which(record)}, "
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
    short = record.call[:SHORT_CALL]
    return (
        f"nothing ran: run {record.run} of {_which(record)}, started {clock(record.started)}, ended without "
        f"a known outcome; find out whether it took effect, then `ledger resolve {short} --done` or "
        "`--not-done`"
    )
