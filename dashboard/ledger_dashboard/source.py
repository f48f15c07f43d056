"""The ledger behind the pages: opened when first needed, opened anew when its file was replaced."""

from __future__ import annotations

import functools
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ledger import LedgerError, SqliteStore, StoreError
from ledger_ops.reader import AnyStore, open_ledger, reader_of
from ledger_ops.rollup import Rollup
from ledger_ops.values import Stats
from ledger_tasks import TaskState
from ledger_tasks.browse import TaskReader
from ledger_tasks.browse import reader_of as task_reader_of

#: how sums are reused: looking at them takes no more than a tenth, or a hundredth, of the time
OFTEN, SELDOM = 10, 100
_INLINE_SECONDS, _SLICE_SECONDS, _PAUSE_SECONDS = 0.02, 0.1, 0.02
#: of how many sessions the counts of tasks are kept
_MOST_COUNTS = 100
#: a person looks at the page meanwhile
LOCK_SECONDS = 5.0
#: what SQLite says of a file whose bytes are no ledger's
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


Seen = TypeVar("Seen")


class Opened:
    """One file, as long as it is the one that was opened. Safe under threads."""

    def __init__(self, url: str | None) -> None:
        store = _open(url)
        self.address = store.address
        self.identity = _identity(self.address)
        self.reader = reader_of(store)
        # its own connections: counting a big file must not make pages wait for each other's lock
        self.rollup = Rollup(reader_of(_open(url)))
        self._stats: Stats | None = None
        self._stats_at = self._stats_cost = 0.0
        self._stats_lock = threading.Lock()
        self._task_counts: dict[str | None, tuple[float, float, dict[TaskState, int]]] = {}
        self._counting: threading.Thread | None = None
        self._counting_lock = threading.Lock()
        self._stop = threading.Event()

    def is_current(self) -> bool:
        """Whether the file is still the one that was opened; SQLite itself would read on a deleted one."""
        return self.identity == _identity(self.address)

    def stats(self, reuse: int = OFTEN) -> Stats:
        """Sums of all calls; those of before are used again for `reuse` times what they cost."""
        with self._stats_lock:
            begun = time.monotonic()
            if self._stats is None or begun - self._stats_at > self._stats_cost * reuse:
                self._stats = self.reader.stats()
                self._stats_at = time.monotonic()
                self._stats_cost = self._stats_at - begun
            return self._stats

    def changed(self) -> None:
        """Forget sums: a person has just decided about a call or a task, and wants to see it."""
        with self._stats_lock:
            self._stats = None
            self._task_counts.clear()

    @functools.cached_property
    def tasks(self) -> TaskReader | None:
        """What looks at the tasks; None if a store of this kind keeps none."""
        return task_reader_of(self.reader.store)

    def task_counts(self, tasks: TaskReader, session: str | None) -> dict[TaskState, int]:
        """How many tasks are in each state; what was counted before is used again as `stats` does."""
        with self._stats_lock:
            begun = time.monotonic()
            counted, cost, counts = self._task_counts.get(session, (0.0, 0.0, {}))
            if not counted or begun - counted > cost * OFTEN:
                counts = tasks.counts(session)
                if len(self._task_counts) >= _MOST_COUNTS:
                    self._task_counts.clear()
                ended = time.monotonic()
                self._task_counts[session] = (ended, ended - begun, counts)
            return counts

    def count(self) -> bool:
        """Bring the roll-up up to date; False while a thread is still at it."""
        with self._counting_lock:
            if self._counting is not None and self._counting.is_alive():
                return False
            if self.rollup.progress == 1.0 and self.rollup.advance(_INLINE_SECONDS):
                return True
            if self._stop.is_set():
                return False
            self._counting = threading.Thread(target=self._count, name="ledger-rollup", daemon=True)
            self._counting.start()
        # a small ledger is counted before its first page is shown
        self._counting.join(_SLICE_SECONDS)
        return self.rollup.progress == 1.0

    def _count(self) -> None:
        try:
            while not self._stop.is_set() and not self.rollup.advance(_SLICE_SECONDS):
                self._stop.wait(_PAUSE_SECONDS)
        except LedgerError:  # the file is gone or locked: the next page says so, and begins again
            return

    def close(self) -> None:
        """Give the connections back."""
        with self._counting_lock:  # else a thread could be there that has not been started
            self._stop.set()
        if self._counting is not None:
            self._counting.join(2)
        self.reader.store.close()
        self.rollup.reader.store.close()
        self.rollup.close()


class Source:
    """A ledger by its path or URL. Whoever reads asks for `opened()` each time."""

    def __init__(self, url: str | None) -> None:
        self.url = url
        self._opened: Opened | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The file's name, for people."""
        opened = self._opened
        return Path(opened.address if opened else self.url or "ledger.db").name

    def opened(self) -> Opened:
        """The ledger as it is now; raises `StoreError` while there is none that can be read."""
        with self._lock:
            if self._opened is not None and not self._opened.is_current():
                self._opened.close()
                self._opened = None
            if self._opened is None:
                self._opened = Opened(self.url)
            return self._opened

    def probe(self) -> int:
        """Read what every claim needs from the file itself; gives the number of the newest event.

        A connection that is open answers from its cache, and would call a file sound that was overwritten.
        """
        reader = self.opened().reader
        if not isinstance(reader.store, SqliteStore):  # a server answers for itself
            return reader.last_seq()
        store = _open(self.url)
        try:
            for sql in _PROBES:
                store.browse(sql)
            return reader_of(store).last_seq()
        finally:
            store.close()

    def read(self, read: Callable[[Opened], Seen]) -> Seen:
        """What `read` gives; it is called once more when the ledger was closed or replaced meanwhile."""
        opened = self.opened()
        try:
            return read(opened)
        except StoreError:
            if self.opened() is opened:
                raise
            return read(self.opened())

    def doubt(self, error: Exception) -> None:
        """Close a ledger that was found damaged: its cached pages must not outlive what is put back."""
        if is_damage(error):
            self.close()

    def close(self) -> None:
        """Give the ledger back; it is opened again when it is needed again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None


_PROBES = ("SELECT * FROM runs ORDER BY id DESC LIMIT 1", "SELECT * FROM totals", "SELECT * FROM meta")


def _open(url: str | None) -> AnyStore:
    store = open_ledger(url)
    if isinstance(store, SqliteStore):
        store.lock_seconds = LOCK_SECONDS
    return store


def is_damage(error: Exception) -> bool:
    """Whether the bytes of the file are at fault."""
    return (getattr(error.__cause__, "sqlite_errorcode", None) or 0) & 0xFF in _DAMAGED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - asked for each request
    except OSError:
        return None
    return found.st_dev, found.st_ino
