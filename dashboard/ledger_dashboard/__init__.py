"""The dashboard of a ledger: what was done, what runs, what is in doubt, in a browser.

    $ ledger-dashboard ledger.db               # http://localhost:4242
    app.mount("/ledger", create_app("ledger.db"))   # or inside an application of your own

It listens on this machine alone unless a token is given, and reads without holding anything open.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ledger_dashboard.app import create_app as create_app

__all__ = ["create_app", "main"]

_EXTRA = frozenset({"anyio", "jinja2", "markupsafe", "sse_starlette", "starlette", "uvicorn"})
_INSTALL = 'ledger-dashboard needs more than is installed ({}); run: pip install "ledger-guard[dashboard]"\n'


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a ledger until it is stopped; returns the exit code."""
    try:
        from ledger_dashboard.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write(_INSTALL.format(error.name))
        return 1
    return run(argv)


def __getattr__(name: str) -> Any:
    # what `create_app` needs is an extra: `main` must be importable without it, to say so
    if name == "create_app":
        from ledger_dashboard.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
