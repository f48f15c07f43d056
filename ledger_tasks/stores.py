"""Where the tasks of a URL are kept. Drivers load where they are first needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ledger
from ledger import Guard, SqliteStore, UsageError
from ledger_tasks.book import TaskStore

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
    kind = type(store).__name__
    if kind == "PostgresStore":
        from ledger_stores.postgres import PostgresStore
        from ledger_tasks.postgres import PostgresTaskStore

        if isinstance(store, PostgresStore):
            return PostgresTaskStore(store)
    raise UsageError(
        f"a {kind} keeps no tasks; a path, sqlite:///path, memory://, postgresql:// and json:FOLDER do. "
        "Nothing was opened"
    )
