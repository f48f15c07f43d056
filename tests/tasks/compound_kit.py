"""Plans and executions for the tests of compounds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ledger_tasks import TaskLedger
from tests.actors import PATIENCE
from tests.stores.servers import fresh_namespace, postgres_url


def sqlite(folder: Path) -> TaskLedger:
    """On a file."""
    return TaskLedger(folder / "ledger.db", quiet=True)


def postgres(_: Path) -> TaskLedger:
    """On a namespace of its own of a real server."""
    return TaskLedger(postgres_url(), namespace=fresh_namespace(), quiet=True)


def json_files(folder: Path) -> TaskLedger:
    """In a folder of JSON files."""
    return TaskLedger(f"json:{folder / 'tasks'}")


@contextmanager
def opened(folder: Path, where: Callable[[Path], TaskLedger] = sqlite) -> Iterator[TaskLedger]:
    """A ledger, which is closed at the end."""
    tasks = where(folder)
    try:
        yield tasks
    finally:
        tasks.close()


def step(index: int, /, *depends_on: int, tier: int = 1, **more: Any) -> dict[str, Any]:
    """A subtask as a planner writes it."""
    told = {"index": index, "description": f"step {index}", "tier_hint": tier, "depends_on": [*depends_on]}
    return told | more


def plan(*steps: Any, reasoning: str = "because") -> Callable[[str], dict[str, Any]]:
    """A planner that knows one plan."""
    return lambda _: {"reasoning": reasoning, "subtasks": [*steps]}


def answers(subtask: Mapping[str, Any]) -> str:
    """Does a subtask at once."""
    return f"did {subtask['index']}"


def of_index(found: dict[str, Any], key: str) -> list[Any]:
    """One thing of all subtasks of a full picture, by their index."""
    return [subtask[key] for subtask in found["subtasks"]]


class Gates:
    """An `execute` each of whose subtasks waits at its own gate."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self._gates: dict[int, threading.Event] = {}
        self._changed = threading.Condition()

    def _gate(self, index: int) -> threading.Event:
        with self._changed:
            return self._gates.setdefault(index, threading.Event())

    def __call__(self, subtask: Mapping[str, Any]) -> str:
        index = subtask["index"]
        with self._changed:
            self.begun[index] += 1
            self._changed.notify_all()
        assert self._gate(index).wait(PATIENCE)
        return answers(subtask)

    def open(self, *indices: int) -> None:
        """Let these end."""
        for index in indices:
            self._gate(index).set()

    def wait_for(self, *indices: int) -> None:
        """Wait until these have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.begun[index] for index in indices), PATIENCE)
