"""What `make test` says at its end: which servers the tests talked to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stores.servers import USED

_seen: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker ended, and says what it used."""
    _seen.update(getattr(node, "workeroutput", {}).get("servers", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells; who works alone remembers."""
    _seen.update(USED)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["servers"] = sorted(USED)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each server."""
    for line in sorted(_seen):
        terminalreporter.write_line(f"server: {line}")
