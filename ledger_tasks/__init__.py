"""The task ledger: what is to be done, by whom, in which order, and where it stands.

    from ledger_tasks import Task, TaskLedger

    tasks = TaskLedger("ledger.db")                       # or any URL of the guard, or json:FOLDER
    tasks.add_tasks([Task("mail", "tell Ann"), Task("file", "file it", depends_on=("mail",))])
    claim = tasks.claim_next("worker-1")                  # nobody else gets it
    tasks.start(claim)
    tasks.complete(claim, result="sent")                  # now `file` can be begun

A state changes by one table (`ledger_tasks.states.NEXT`), every change appends an event, and a task is what its events
add up to. A claim has a lease: what a killed worker left is brought back, and its late word is refused.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ledger_tasks.aio import AsyncTaskLedger
from ledger_tasks.awareness import Awareness, Item, Section
from ledger_tasks.deliveries import Delivery, Verdict
from ledger_tasks.errors import (
    BadPlan,
    Conflict,
    DependencyCycle,
    DuplicateTask,
    InvalidTransition,
    NoSuchTask,
    NotHolder,
    PoolClosed,
    Tampered,
    TaskError,
)
from ledger_tasks.metrics import Figures, Metrics, Spread
from ledger_tasks.model import Claim, Dep, StatusEvent, Task, TaskEvent, TaskType, WorkerInfo
from ledger_tasks.states import NEXT, TaskState
from ledger_tasks.tasks import (
    TaskLedger,
    create_ledger_for_user_prompt,
    ledger_for_session,
    register_ledger_for_session,
)

if TYPE_CHECKING:
    from ledger_tasks.cached import CachedTaskStore
    from ledger_tasks.command import CommandExecutor
    from ledger_tasks.compound import CompoundRunner
    from ledger_tasks.compound_plan import Tier
    from ledger_tasks.compound_run import SubtaskFailed, given_up
    from ledger_tasks.context import AsyncTaskContext, TaskContext
    from ledger_tasks.pacing import Breaker
    from ledger_tasks.worker import Worker

__all__ = [
    "NEXT", "AsyncTaskContext", "AsyncTaskLedger", "Awareness", "BadPlan", "Breaker", "CachedTaskStore", "Claim",
    "CommandExecutor", "CompoundRunner", "Conflict", "Delivery", "Dep", "DependencyCycle", "DuplicateTask",
    "Figures", "InvalidTransition", "Item", "Metrics", "NoSuchTask", "NotHolder", "PoolClosed", "Section",
    "Spread", "StatusEvent", "SubtaskFailed", "Tampered", "Task", "TaskContext", "TaskError", "TaskEvent",
    "TaskLedger", "TaskState", "TaskType", "Tier", "Verdict", "Worker", "WorkerInfo",
    "create_ledger_for_user_prompt", "given_up", "ledger_for_session", "register_ledger_for_session",
]  # fmt: skip

#: what few programs need, and what takes long to load
_LATER = {
    "AsyncTaskContext": "context", "Breaker": "pacing", "CachedTaskStore": "cached", "CommandExecutor": "command",
    "CompoundRunner": "compound", "SubtaskFailed": "compound_run", "TaskContext": "context", "Tier": "compound_plan", "Worker": "worker",
    "given_up": "compound_run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
