"""The group `ledger tasks`: what is to be done, by whom, in which order, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import click

from ledger_cli.app import Commands
from ledger_cli.options import Explained

#: command → the module that has it; in the order of the help
COMMANDS = {
    "list": "tasks_looking",
    "show": "tasks_looking",
    "tree": "tasks_tree",
    "next": "tasks_claiming",
    "claim": "tasks_claiming",
    "heartbeat": "tasks_claiming",
    "release": "tasks_claiming",
    "add": "tasks_adding",
    "depend": "tasks_adding",
    "start": "tasks_working",
    "progress": "tasks_working",
    "checkpoint": "tasks_working",
    "artifact": "tasks_working",
    "pause": "tasks_working",
    "resume": "tasks_working",
    "review": "tasks_working",
    "done": "tasks_working",
    "fail": "tasks_working",
    "approve": "tasks_deciding",
    "reject": "tasks_deciding",
    "block": "tasks_deciding",
    "unblock": "tasks_deciding",
    "shelve": "tasks_deciding",
    "unshelve": "tasks_deciding",
    "retry": "tasks_deciding",
    "cancel": "tasks_deciding",
    "report": "tasks_deciding",
    "run": "tasks_workers",
    "workers": "tasks_workers",
    "watch": "tasks_watch",
    "events": "tasks_looking",
    "waves": "tasks_looking",
    "path": "tasks_looking",
    "stale": "tasks_keeping",
    "recover": "tasks_keeping",
    "dead": "tasks_looking",
    "sessions": "tasks_looking",
    "awareness": "tasks_looking",
    "metrics": "tasks_looking",
    "deliveries": "tasks_looking",
    "verify": "tasks_keeping",
    "export": "tasks_keeping",
    "import": "tasks_keeping",
}


class TaskCommands(Explained, Commands):
    """The commands about tasks; each is read when it is asked for."""

    table: ClassVar[Mapping[str, str]] = COMMANDS

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = (
            'ledger tasks add mail "tell Ann" --priority 8',
            "ledger tasks next --claim --start --agent me --json",
            "ledger tasks done mail --agent me --result '\"sent\"'",
        )
        self.codes = "0: done. 1: refused, nothing was changed; the message says what to do next. 2: usage."


@click.group(
    "tasks",
    cls=TaskCommands,
    epilog=(
        "DB is a path, the URL of a server, or json:FOLDER; without it LEDGER_DB counts, else ./ledger.db. "
        "Who asks is --agent, else LEDGER_AGENT, else user@host."
    ),
)
def tasks_command() -> None:
    """Say what is to be done, by whom, and how far it is.

    An agent can work from a shell: `next --claim` gives it a task and a token, and `start`, `progress`,
    `checkpoint`, `done` and `fail` take that token, or the agent's name alone.
    """
