"""The group `ledger compound`: a prompt becomes a plan, whose subtasks run in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import click

from ledger_cli.app import Commands
from ledger_cli.options import Explained

#: command → the module that has it; in the order of the help
COMMANDS = {
    "submit": "compound_running",
    "run": "compound_running",
    "progress": "compound_looking",
    "list": "compound_looking",
    "cancel": "compound_looking",
    "export": "compound_looking",
}


class CompoundCommands(Explained, Commands):
    """The commands about compounds; each is read when it is asked for."""

    table: ClassVar[Mapping[str, str]] = COMMANDS

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = (
            'ledger compound submit "compare the two" --planner plans:make -- claude -p --model {model}',
            "ledger compound progress c-1f20 --follow",
            "ledger compound list --json | jq '.[].total_cost'",
        )
        self.codes = "0: done. 1: refused or failed; the message says what to do next. 2: usage."


@click.group(
    "compound",
    cls=CompoundCommands,
    epilog="DB is a path, a server's URL, or json:FOLDER; without it LEDGER_DB counts, else ./ledger.db.",
)
def compound_command() -> None:
    """Let a planner part a prompt into subtasks, and execute them.

    They run in parallel as their dependencies allow. All of it stands in the ledger: what is killed is gone
    on with by `run`, and nothing that was finished is done again.
    """
