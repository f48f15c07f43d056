"""What can go wrong with a task; each class is a different thing to do.

LedgerError
└── TaskError                 nothing was changed
    ├── NoSuchTask            look at the id and the session
    ├── DuplicateTask         another task has this id
    ├── DependencyCycle       leave out one dependency of `path`
    ├── InvalidTransition     see `legal`: what may follow
    ├── NotHolder             somebody else has it, or this claim was lost: stop working on it
    ├── Conflict              read it again: somebody changed it meanwhile
    ├── BadPlan               let the planner plan anew; it says what is wrong
    ├── PoolClosed            the pool takes nothing more: make a new runner with a new pool
    └── Tampered              the ledger was changed by something that is not a ledger
"""

from __future__ import annotations

from collections.abc import Sequence

from ledger import LedgerError
from ledger_tasks.states import NEXT, TaskState


class TaskError(LedgerError):
    """The task ledger refused; nothing was changed. `task_id` is the task it speaks of."""

    def __init__(self, message: str, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id


class NoSuchTask(TaskError):
    """The session has no task of this id."""


class DuplicateTask(TaskError):
    """The session has a task of this id already."""


class DependencyCycle(TaskError):
    """A task would wait for itself; `path` names the way round, its first task again at the end."""

    def __init__(self, message: str, way: Sequence[str]) -> None:
        super().__init__(message, way[0])
        self.path = tuple(way)


class InvalidTransition(TaskError):
    """The table has no such move; `state`, `wanted` and `legal` (what may follow) say which."""

    def __init__(self, task_id: str, state: TaskState, wanted: TaskState, why: str = "") -> None:
        self.state, self.wanted, self.legal = state, wanted, NEXT[state]
        following = ", ".join(s.name for s in self.legal) or "nothing: it is final"
        super().__init__(
            f"task {task_id!r} is {state.name} and cannot become {wanted.name}{why and f': {why}'}; "
            f"nothing was changed. What may follow {state.name}: {following}",
            task_id,
        )


class NotHolder(TaskError):
    """Whoever asked does not hold the task (any more): it must stop working on it. `holder` is who does."""

    def __init__(self, message: str, task_id: str, holder: str = "") -> None:
        super().__init__(message, task_id)
        self.holder = holder


class Conflict(TaskError):
    """The task changed since it was read; `expected` and `actual` are the two versions."""

    def __init__(self, task_id: str, expected: int, actual: int) -> None:
        super().__init__(
            f"task {task_id!r} has version {actual}, not {expected}: somebody changed it since you read it; "
            "nothing was changed. Read it again and decide anew",
            task_id,
        )
        self.expected, self.actual = expected, actual


class Tampered(TaskError):
    """Events or snapshots are not what this ledger wrote."""


class BadPlan(TaskError):
    """What a planner returned is no plan; nothing was added. `path` are the indices of a cycle, if it is one."""

    def __init__(self, message: str, path: Sequence[int] = ()) -> None:
        super().__init__(f"the plan cannot be used: {message}; nothing was added. Let the planner plan anew")
        self.path = tuple(path)


class PoolClosed(TaskError):
    """The pool of a runner takes no work any more, and the runner begins nothing more."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"the pool takes no work any more ({type(error).__name__}: {error}), so this runner begins nothing. "
            "Make a new runner with a new pool: it goes on with what is unfinished"
        )


def in_words(error: BaseException) -> str:
    """What is kept of an error of a user's code; its text comes from such code, too, and may raise."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - then its name must do
        return type(error).__name__
