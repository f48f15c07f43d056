"""The command `ledger`: what a ledger holds, and what a person decides about it, from a terminal or a script.

`app` has the commands and the one place where errors become words; nothing else needs click or rich.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; without the extra, say which one to install."""
    try:
        from ledger_cli.app import run
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        text = f'the command line needs {error.name}; install it: pip install "ledger-guard[cli]"'
        print(f"Error: {text}", file=sys.stderr)  # noqa: T201 - click is what is missing
        return 1
    return run(sys.argv[1:])
