"""What a handler is given beside its task: how to report, and whether to go on."""

from __future__ import annotations

import asyncio
import threading
from functools import cached_property
from typing import Any

from ledger import Guard
from ledger_tasks.errors import NotHolder
from ledger_tasks.model import Claim, Task
from ledger_tasks.tasks import TaskLedger


class TaskContext:
    """The handler's side of a claim. Its calls raise `NotHolder` when the task is somebody else's by now."""

    def __init__(self, ledger: TaskLedger, claim: Claim) -> None:
        self.ledger = ledger
        self.claim = claim
        self._why = ""
        self._lost = threading.Event()
        self._stops = threading.Event()
        #: whether the handler was told to stop, and so may have returned before its end
        self._was_told = False

    @property
    def task(self) -> Task:
        """The task as it was when this run began."""
        return self.claim.task

    @cached_property
    def guard(self) -> Guard:
        """A guard that keeps its calls where the tasks are, so that whoever takes the task over finds them."""
        return Guard(store=self.ledger.store.calls(), quiet=True)

    @property
    def cancelled(self) -> bool:
        """Whether to stop: the task was cancelled or is somebody else's, or the worker has to end.

        A handler that was told so may return at once; what it returns counts only if it was not told.
        """
        told = self._lost.is_set() or self._stops.is_set()
        self._was_told = self._was_told or told
        return told

    @property
    def is_lost(self) -> bool:
        """Whether the claim is lost, so that nothing that is reported would count."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `NotHolder` if it is lost or the worker has to end; every guarded call begins with this."""
        if self.cancelled:
            why = self._why or "its worker has to end"
            raise NotHolder(
                f"task {self.task.id!r} is not gone on with in this run: {why}; nothing more ran. What its tools did "
                "is recorded, and whoever takes it next gets their results",
                self.task.id,
                "",
            )

    def checkpoint(self, data: Any) -> None:
        """Keep what the next run needs to go on: it finds it in `task.checkpoint`."""
        self.ledger.checkpoint(self.claim, data)

    def progress(
        self, done: float, stage: str = "", *, cost: float = 0.0, tokens: int = 0, api_calls: int = 0
    ) -> None:
        """How far it is, from 0 to 1, and at what; cost and the like are added."""
        self.ledger.progress(self.claim, done, stage, cost=cost, tokens=tokens, api_calls=api_calls)

    def add_artifact(self, name: str, value: Any = None) -> None:
        """Something that it made: a name, and where it is or what it is."""
        self.ledger.add_artifact(self.claim, name, value)

    # -- the worker's side --

    def lose(self, why: str = "its claim is lost") -> None:
        """Nobody may report for this claim any more."""
        self._why = why
        self._lost.set()

    def stop(self) -> None:
        """The worker has to end."""
        self._stops.set()

    @property
    def is_stopping(self) -> bool:
        """Whether the worker has to end."""
        return self._stops.is_set()

    @property
    def was_told(self) -> bool:
        """Whether the handler knows that it should stop."""
        return self._was_told


class AsyncTaskContext:
    """The same for a coroutine: what asks the store is awaited."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context

    @property
    def ledger(self) -> TaskLedger:
        """Where the task is; its methods wait for the store, so call them off the loop."""
        return self._context.ledger

    @property
    def claim(self) -> Claim:
        """What shows that the task is this run's."""
        return self._context.claim

    @property
    def task(self) -> Task:
        """The task as it was when this run began."""
        return self._context.task

    @property
    def guard(self) -> Guard:
        """A guard that keeps its calls where the tasks are."""
        return self._context.guard

    @property
    def cancelled(self) -> bool:
        """Whether to stop; the coroutine is cancelled, too."""
        return self._context.cancelled

    @property
    def is_lost(self) -> bool:
        """Whether the claim is lost."""
        return self._context.is_lost

    def check(self) -> None:
        """Raise `NotHolder` if there is nothing to go on with."""
        self._context.check()

    async def checkpoint(self, data: Any) -> None:
        """Keep what the next run needs to go on."""
        await asyncio.to_thread(self._context.checkpoint, data)

    async def progress(
        self, done: float, stage: str = "", *, cost: float = 0.0, tokens: int = 0, api_calls: int = 0
    ) -> None:
        """How far it is, from 0 to 1, and at what; cost and the like are added."""
        await asyncio.to_thread(
            self._context.progress, done, stage, cost=cost, tokens=tokens, api_calls=api_calls
        )

    async def add_artifact(self, name: str, value: Any = None) -> None:
        """Something that it made."""
        await asyncio.to_thread(self._context.add_artifact, name, value)
