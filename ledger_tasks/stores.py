"""Where the tasks of a URL are kept. Drivers load where they are first needed."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Final

import ledger
from ledger import Guard, SqliteStore, UsageError
from ledger_tasks.book import TaskStore

#: stores on servers, whose drivers may be missing here → where their tasks are
_SERVERS: Final = {
    "PostgresStore": ("ledger_tasks.postgres", "PostgresTaskStore"),
    "RedisStore": ("ledger_tasks.redis", "RedisTaskStore"),
    "MongoStore": ("ledger_tasks.mongodb", "MongoTaskStore"),
}
#: what `TaskLedger` may be given
Where = str | os.PathLike[str] | Guard | ledger.Store | TaskStore | None


def open_tasks(where: Where, settings: dict[str, Any]) -> TaskStore:
    """The tasks of a path or URL (None: LEDGER_DB, else ./ledger.db), a guard, its store, or `json:FOLDER`.

    Raises `UsageError` for a URL that names none, or whose store keeps no tasks.
    """
    if isinstance(where, TaskStore):
        return where
    if isinstance(where, ledger.Store):
        return tasks_of(where)
    if isinstance(where, Guard):
        return tasks_of(where._ready())
    text = os.fspath(where) if where is not None else os.environ.get("LEDGER_DB", "")
    if text.startswith("json:"):
        from ledger_tasks.json_files import JsonTaskStore

        return JsonTaskStore(Path(text.removeprefix("json:").removeprefix("//") or "agent_data"))
    return tasks_of(Guard(text or None, **settings)._ready())


def tasks_of(store: ledger.Store) -> TaskStore:
    """The tasks that are kept beside the calls of a guard's store."""
    if isinstance(store, SqliteStore):
        from ledger_tasks.sqlite import SqliteTaskStore

        return SqliteTaskStore(store)
    for kind in type(store).__mro__:
        if kind.__name__ in _SERVERS and kind.__module__.startswith("ledger_stores."):
            module, name = _SERVERS[kind.__name__]
            made: TaskStore = getattr(importlib.import_module(module), name)(store)
            return made
    raise UsageError(
        f"a {type(store).__name__} keeps no tasks; a path, sqlite:///path, memory://, postgresql://, redis://, "
        "mongodb:// and json:FOLDER do. Nothing was opened"
    )
