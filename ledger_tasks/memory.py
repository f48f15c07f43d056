"""The tables of tasks in a SQLite database in memory: what a JSON file is read into, and what a replica is."""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from ledger import StoreError, UsageError
from ledger_tasks.sqlite import schema


def empty_tables() -> sqlite3.Connection:
    """The tables with nothing in them, for one thread at a time."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.executescript(schema())
    return db


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction; outside of one nothing can be changed."""
    db.execute("PRAGMA query_only = 0")
    db.execute("BEGIN")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    else:
        db.execute("COMMIT")
    finally:
        db.execute("PRAGMA query_only = 1")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """What SQLite says, in our words."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(
            f"{where}: the tasks could not be worked with ({error}); nothing was changed"
        ) from error
    except (UnicodeError, OverflowError) as error:
        raise UsageError(f"{where}: nothing was written: a value cannot be stored ({error})") from error


# a fork waits until nobody is inside: what the child has in memory is whole then


class InMemory(Protocol):
    """A store that has something in memory, as a fork sees it."""

    def before_fork(self) -> None:
        """Let nobody in."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Begin with a memory of one's own; what else was open is the parent's."""


STORES: Final[weakref.WeakSet[InMemory]] = weakref.WeakSet()
_forking: list[InMemory] = []


def _before_fork() -> None:
    _forking.extend(STORES)
    for store in _forking:
        store.before_fork()


def _after_fork_in_parent() -> None:
    for store in _forking:
        store.after_fork_in_parent()
    _forking.clear()


def _after_fork_in_child() -> None:
    for store in _forking:
        store.after_fork_in_child()
    _forking.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
