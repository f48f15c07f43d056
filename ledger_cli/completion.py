"""`ledger completion`: the script by which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ledger_cli.options import command


@command(
    "completion",
    examples=(
        'eval "$(ledger completion bash)"     # in ~/.bashrc',
        'eval "$(ledger completion zsh)"      # in ~/.zshrc',
        "ledger completion fish > ~/.config/fish/completions/ledger.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(*, shell: str) -> None:
    """Print the completion script of a shell."""
    made = get_completion_class(shell)
    root = click.get_current_context().find_root().command
    if made is not None:
        click.echo(made(root, {}, "ledger", "_LEDGER_COMPLETE").source())
