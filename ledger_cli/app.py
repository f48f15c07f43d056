"""The group of commands, and the one place where an error becomes words and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TextIO

import click
import rich  # noqa: F401 - cheap, and its absence is told by `main` and not half-way through a command
from click.exceptions import NoSuchCommand

import ledger
from ledger_ops.values import printable

FAILURE, USAGE, NOTHING_MATCHED = 1, 2, 3

#: command → the module that has it, read when it is asked for; in the order of the help
COMMANDS = {
    "show": "looking",
    "tail": "looking",
    "stats": "looking",
    "inspect": "looking",
    "doubts": "looking",
    "brief": "looking",
    "retry": "deciding",
    "resolve": "deciding",
    "clear": "deciding",
    "run": "running",
    "export": "keeping",
    "import": "keeping",
    "prune": "keeping",
    "backup": "keeping",
    "restore": "keeping",
    "move": "moving",
    "doctor": "keeping",
    "tasks": "tasks",
    "compound": "compound",
    "demo": "demo",
    "completion": "completion",
}


class Commands(click.Group):
    """Loads the module of a command when it is asked for, so that each starts fast."""

    table: ClassVar[Mapping[str, str]] = COMMANDS

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's contract
        """All names, in the order of the help."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in self.table:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"ledger_cli.{self.table[cmd_name]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)  # noqa: S101 - what a type checker cannot know
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with all names to choose a similar one from."""
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand:
            raise NoSuchCommand(args[0], possibilities=self.table, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but that a reader who has read enough is no failure."""
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except BrokenPipeError:
            _drop(sys.stdout)
            return 0


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="DB is a path or sqlite:///path; without it LEDGER_DB counts, else ./ledger.db.",
)
@click.version_option(ledger.__version__, prog_name="ledger", message="%(prog)s %(version)s")
def group() -> None:
    """What guarded tools did, what they do now, and what waits for a person."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code. What the user can mend is told without a traceback."""
    _stand_in_for_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        found: Any = group.main(list(arguments), prog_name="ledger", standalone_mode=False)
        return found if isinstance(found, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 128 + signal.SIGINT
    except UnicodeEncodeError as error:  # stdout takes any text, so it came from the command line
        complain(f"{error.object!r} is no text in UTF-8; nothing was done, write it in that encoding")
        return USAGE
    except (OverflowError, RecursionError) as error:
        return complain(f"a value is too large or nested too deeply ({error}); give a smaller or flatter one")
    except (ledger.LedgerError, OSError) as error:
        return complain(str(error))


def complain(text: str) -> int:
    """Say on stderr what went wrong, with what others wrote made harmless; the exit code of a failure."""
    click.echo(f"Error: {printable(text, lines=True)}", err=True)
    return FAILURE


def _stand_in_for_closed_streams() -> None:
    """Read and write nothing where we were started without stdin, stdout or stderr, as after `>&-`.

    Else the next file that is opened would get the number, and a child would print into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is the one that lacks
            os.set_inheritable(number, True)  # noqa: FBT003 - it takes no keyword
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _drop(stream: TextIO) -> None:
    """Let the interpreter flush what is left into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
