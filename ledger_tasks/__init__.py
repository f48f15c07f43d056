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

from ledger_tasks.aio import AsyncTaskLedger
from ledger_tasks.awareness import Awareness, Item, Section
from ledger_tasks.command import CommandExecutor
from ledger_tasks.compound import CompoundRunner
from ledger_tasks.compound_plan import Tier
from ledger_tasks.compound_run import SubtaskFailed, given_up
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
from ledger_tasks.model import Claim, Dep, StatusEvent, Task, TaskEvent, TaskType
from ledger_tasks.states import NEXT, TaskState
from ledger_tasks.tasks import (
    TaskLedger,
    create_ledger_for_user_prompt,
    ledger_for_session,
    register_ledger_for_session,
)

__all__ = [
    "NEXT", "AsyncTaskLedger", "Awareness", "BadPlan", "Claim", "CommandExecutor", "CompoundRunner", "Conflict",
    "Delivery", "Dep", "DependencyCycle", "DuplicateTask", "Figures", "InvalidTransition", "Item", "Metrics",
    "NoSuchTask", "NotHolder", "PoolClosed", "Section", "Spread", "StatusEvent", "SubtaskFailed", "Tampered", "Task",
    "TaskError", "TaskEvent", "TaskLedger", "TaskState", "TaskType", "Tier", "Verdict",
    "create_ledger_for_user_prompt", "given_up", "ledger_for_session", "register_ledger_for_session",
]  # fmt: skip
