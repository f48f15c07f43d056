"""For all tests: whose processes are measured, their browser, and which servers they talked to."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.stores.servers import USED

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser_kit import Visits

_seen: set[str] = set()
#: tests of what stands around the guard; to measure their processes too would take long and add little
_AROUND = (
    "tests/stores/test_conformance.py::TestDynamo",
    "tests/stores/test_conformance.py::TestMongo",
    "tests/stores/test_dynamodb",
    "tests/stores/test_mongodb",
    "tests/stores/test_move",
    "tests/stores/test_server",
    "tests/tasks/",
    "tests/test_cli",
    "tests/test_dashboard",
    "tests/test_examples",
    "tests/test_move",
    "tests/test_ops",
)
#: how a measured process has its children measured
_TOLD = "COVERAGE_PROCESS_CONFIG"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure the processes that a test of the guard starts, and no others."""
    told = os.environ.pop(_TOLD, None) if item.nodeid.startswith(_AROUND) else None
    try:
        return (yield)
    finally:
        if told is not None:
            os.environ[_TOLD] = told


# the browser's package takes long to load, and few tests need it


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a module."""
    from tests.browser_kit import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture
def visits() -> Iterator[Visits]:
    """Pages that a test opens."""
    from tests.browser_kit import visiting

    with visiting() as opened:
        yield opened


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
