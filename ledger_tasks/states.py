"""The states of a task, the one table of which may follow which, and the names that others give them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from ledger import UsageError


class TaskState(StrEnum):
    """Where a task stands. DONE, CANCELLED and SKIPPED are final; DEAD is left by an explicit retry alone."""

    #: kept for later, offered to nobody
    BACKLOG = "backlog"
    #: to be done; while dependencies are open it waits for them
    PENDING = "pending"
    #: claimed, not begun
    ASSIGNED = "assigned"
    #: somebody works on it
    ACTIVE = "active"
    #: its holder stopped for a while, for instance for a person
    PAUSED = "paused"
    #: done, and to be validated
    REVIEW = "review"
    #: validated
    APPROVED = "approved"
    #: somebody declared, with a reason, that it cannot go on
    BLOCKED = "blocked"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: not done, because something that it depends on was not
    SKIPPED = "skipped"
    #: the dead-letter list: its retries are used up
    DEAD = "dead"


_S = TaskState
#: which state may follow which; an empty row is final
NEXT: Final[dict[TaskState, tuple[TaskState, ...]]] = {
    _S.BACKLOG: (_S.PENDING, _S.CANCELLED),
    _S.PENDING: (_S.ASSIGNED, _S.BLOCKED, _S.BACKLOG, _S.SKIPPED, _S.FAILED, _S.CANCELLED),
    _S.ASSIGNED: (_S.ACTIVE, _S.PENDING, _S.DEAD, _S.CANCELLED),
    _S.ACTIVE: (_S.DONE, _S.FAILED, _S.PAUSED, _S.REVIEW, _S.BLOCKED, _S.PENDING, _S.DEAD, _S.CANCELLED),
    _S.PAUSED: (_S.ACTIVE, _S.CANCELLED),
    _S.REVIEW: (_S.APPROVED, _S.ACTIVE, _S.CANCELLED),
    _S.APPROVED: (_S.DONE, _S.CANCELLED),
    _S.BLOCKED: (_S.PENDING, _S.CANCELLED, _S.SKIPPED),
    _S.DONE: (),
    _S.FAILED: (_S.PENDING, _S.DEAD, _S.CANCELLED),
    _S.CANCELLED: (),
    _S.SKIPPED: (),
    _S.DEAD: (_S.PENDING,),
}
FINAL: Final = frozenset(state for state, following in NEXT.items() if not following)
#: a dependency in one of these has failed. Who fails with a retry left is PENDING again in the same
#: transaction, so that a task at rest in FAILED has none
LOST: Final = frozenset({_S.FAILED, _S.CANCELLED, _S.SKIPPED, _S.DEAD})
#: nothing more happens to it by itself
ENDED: Final = LOST | {_S.DONE}
#: somebody has it: nobody else may claim it
HELD: Final = frozenset({_S.ASSIGNED, _S.ACTIVE, _S.PAUSED, _S.REVIEW, _S.APPROVED})
#: of these, a silence means that the holder is gone; the others wait for a person
LEASED: Final = frozenset({_S.ASSIGNED, _S.ACTIVE})

#: what other programs call them
_OTHERS: Final[dict[str, TaskState]] = {
    "DEFERRED": _S.BACKLOG, "ICEBOX": _S.BACKLOG,
    "ACCEPTED": _S.PENDING, "CREATED": _S.PENDING, "NEW": _S.PENDING, "OPEN": _S.PENDING,
    "QUEUED": _S.PENDING, "READY": _S.PENDING, "RECEIVED": _S.PENDING, "RETRYING": _S.PENDING,
    "SCHEDULED": _S.PENDING, "SUBMITTED": _S.PENDING, "TODO": _S.PENDING, "TO_DO": _S.PENDING,
    "CLAIMED": _S.ASSIGNED, "DELEGATED": _S.ASSIGNED, "RESERVED": _S.ASSIGNED,
    "DOING": _S.ACTIVE, "EXECUTING": _S.ACTIVE, "IN_PROGRESS": _S.ACTIVE, "PROCESSING": _S.ACTIVE,
    "RESUMING": _S.ACTIVE, "RUNNING": _S.ACTIVE, "STARTED": _S.ACTIVE, "WORKING": _S.ACTIVE,
    "INPUT_REQUIRED": _S.PAUSED, "STOPPED": _S.PAUSED, "SUSPENDED": _S.PAUSED, "USER_STOPPED": _S.PAUSED,
    "IN_REVIEW": _S.REVIEW, "VALIDATING": _S.REVIEW, "VERIFYING": _S.REVIEW,
    "VALIDATED": _S.APPROVED, "VERIFIED": _S.APPROVED,
    "HELD": _S.BLOCKED, "ON_HOLD": _S.BLOCKED, "WAITING": _S.BLOCKED,
    "COMPLETE": _S.DONE, "COMPLETED": _S.DONE, "FINISHED": _S.DONE, "OK": _S.DONE, "SUCCEEDED": _S.DONE,
    "SUCCESS": _S.DONE,
    "ERROR": _S.FAILED, "ERRORED": _S.FAILED, "FAILURE": _S.FAILED, "REJECTED": _S.FAILED,
    "TIMED_OUT": _S.FAILED, "TIMEOUT": _S.FAILED,
    "ABANDONED": _S.CANCELLED, "ABORTED": _S.CANCELLED, "CANCELED": _S.CANCELLED, "KILLED": _S.CANCELLED,
    "TERMINATED": _S.CANCELLED,
    "NOT_APPLICABLE": _S.SKIPPED,
    "DEAD_LETTER": _S.DEAD, "DEAD_LETTERED": _S.DEAD,
}  # fmt: skip


def state_from(name: TaskState | str) -> TaskState:
    """The state of that name, ours or another program's, in upper or lower case; raises `UsageError`."""
    plain = str(getattr(name, "value", name)).strip().replace("-", "_").replace(" ", "_").upper()
    found = TaskState.__members__.get(plain) or _OTHERS.get(plain)
    if found is None:
        known = ", ".join(TaskState.__members__)
        raise UsageError(f"there is no task state {str(name)!r}; the states are {known}; nothing was changed")
    return found


def path(start: TaskState, end: TaskState, *, through: Iterable[TaskState] = TaskState) -> list[TaskState]:
    """The shortest legal way from one state to another, without the first; [] if there is none.

    `through` are the states that may stand in between.
    """
    between = frozenset(through)
    ways: deque[list[TaskState]] = deque([[start]])
    seen = {start}
    while ways:
        way = ways.popleft()
        for state in NEXT[way[-1]]:
            if state == end:
                return [*way[1:], state]
            if state in between and state not in seen:
                seen.add(state)
                ways.append([*way, state])
    return []


def diagram() -> str:
    """The table as lines of text: each state, an arrow, and what may follow it."""
    return "\n".join(
        f"{state.name:<9} → {', '.join(s.name for s in following) if following else '(final)'}"
        for state, following in NEXT.items()
    )
