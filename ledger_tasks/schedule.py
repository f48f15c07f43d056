"""In which order tasks can be done: waves of what can be done in parallel, and the longest chain.

What has ended is left out. Both go through every task and every dependency once, without recursion.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from ledger import UsageError
from ledger_tasks.model import Task
from ledger_tasks.operations import refuse_cycle
from ledger_tasks.states import ENDED


def waves(tasks: Iterable[Task]) -> list[list[Task]]:
    """What has not ended, in waves: each can be done in parallel once those before it are done.

    Within a wave by priority, then in the order given. Raises `DependencyCycle`.
    """
    plan = _Plan(tasks)
    level: dict[str, int] = {}
    for name in plan.in_order():
        level[name] = max((level[on] + 1 for on in plan.before[name]), default=0)
    found: list[list[Task]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name, task in plan.tasks.items():
        found[level[name]].append(task)
    return [sorted(wave, key=lambda task: -task.priority) for wave in found]


def critical_path(tasks: Iterable[Task], weight: Callable[[Task], float] | None = None) -> list[Task]:
    """The longest chain among what has not ended, first task first; `weight` is what a task takes (1 if not given).

    Raises `DependencyCycle`, and `UsageError` for a weight that is no number from 0 on.
    """
    plan = _Plan(tasks)
    length: dict[str, float] = {}
    came_from: dict[str, str | None] = {}
    for name in plan.in_order():
        came_from[name] = max(plan.before[name], key=lambda on: length[on], default=None)
        before = came_from[name]
        length[name] = _weighed(plan.tasks[name], weight) + (length[before] if before is not None else 0.0)
    last = max(length, key=lambda name: length[name], default=None)
    way: list[Task] = []
    while last is not None:
        way.append(plan.tasks[last])
        last = came_from[last]
    return way[::-1]


def _weighed(task: Task, weight: Callable[[Task], float] | None) -> float:
    found = 1.0 if weight is None else weight(task)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise UsageError(f"the weight of task {task.id!r} is {found!r}; it must be a number from 0 on")
    return float(found)


class _Plan:
    """Tasks that have not ended, with what each waits for among them: its dependencies and its parts."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = {task.id: task for task in tasks if task.state not in ENDED}
        self.before: dict[str, list[str]] = {name: [] for name in self.tasks}
        after: dict[str, list[str]] = {name: [] for name in self.tasks}
        for name, on in dict.fromkeys(self._edges()):
            self.before[name].append(on)
            after[on].append(name)
        self._after = after

    def _edges(self) -> Iterator[tuple[str, str]]:
        for task in self.tasks.values():
            yield from ((task.id, dep.id) for dep in task.depends_on if dep.id in self.tasks)
            if task.parent in self.tasks:
                yield task.parent, task.id

    def in_order(self) -> list[str]:
        """Every task after all that it waits for."""
        waits = {name: len(on) for name, on in self.before.items()}
        free = deque(name for name, count in waits.items() if not count)
        found = []
        while free:
            name = free.popleft()
            found.append(name)
            for one in self._after[name]:
                waits[one] -= 1
                if not waits[one]:
                    free.append(one)
        if len(found) < len(self.tasks):
            refuse_cycle(self.before)
        return found
