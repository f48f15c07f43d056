"""`CompoundRunner`: a prompt becomes a plan, and the plan's subtasks run in parallel as their dependencies allow.

    runner = CompoundRunner(tasks, planner, execute)          # goes on with what is unfinished by itself
    made = runner.submit("compare these three libraries")     # plans, and returns
    runner.wait(made["id"])                                   # or poll runner.progress(made["id"])

Everything about a compound stands in the ledger (`compound_plan`), and whoever looks reads it there
(`compound_view`). A runner only claims what is ready, executes it in its pool and says what came of it: so any number
of runners in any processes share the work, and what one leaves behind when it is killed another goes on with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self, TextIO

from ledger import UsageError
from ledger_tasks import compound_view as view
from ledger_tasks.compound_crew import Crew, Execute, Orders, Route
from ledger_tasks.compound_plan import TIERS, Tier, checked_tiers, is_time_limit, plan_from, tasks_from
from ledger_tasks.compound_run import Threads
from ledger_tasks.errors import DuplicateTask, PoolClosed
from ledger_tasks.model import Task, refuse_odd
from ledger_tasks.states import ENDED
from ledger_tasks.tasks import TaskLedger

#: gives the plan of a prompt
Planner = Callable[[str], Any]
#: seconds between two looks of one who waits for what another process executes
_LOOK: Final = 0.05


class CompoundRunner:
    """Plans prompts, executes their subtasks, and survives a restart: a new runner goes on with what is unfinished.

    `planner(prompt)` returns `{"reasoning": …, "subtasks": [{"index", "description", "tier_hint", "depends_on"}]}`, and
    maybe a `timeout` for each. `execute(subtask)` gets a dict (id, compound, index, description, tier_hint,
    tier_assigned, model, prompt, depends_on, inputs: results of its dependencies by index, timeout, estimate) and returns text or
    `{"result": …, "cost": …, "tokens": …}`; what it raises is the subtask's failure. It may be async. `pool` is any
    `concurrent.futures.Executor`; for one of processes or machines `execute` must be picklable. Guarded tool calls in
    it replay after a crash. `route(subtask)` may choose another tier than was planned.

    A thread cannot be ended: when its time is over the subtask has failed, and what it returns later is dropped. A
    thread of a pool that was handed in stays occupied by it, and a wait for a free one counts as its time, so such
    a pool needs at least `parallel` workers. Runners of another `name` leave these compounds alone; the task types
    `compound` and `compound-subtask` are theirs.
    """

    def __init__(
        self, ledger: TaskLedger, planner: Planner | None, execute: Execute, pool: Executor | None = None, *,
        parallel: int = 4, tiers: Mapping[int, Tier] = TIERS, route: Route | None = None, timeout: float = 120.0,
        lease: float = 30.0, name: str = "compound", start: bool = True,
    ) -> None:  # fmt: skip
        _refuse_odd_limits(parallel, timeout, lease)
        self.ledger, self.name = ledger, refuse_odd(name, "the name of a runner")
        self._planner, self._tiers = planner, checked_tiers(tiers)
        orders = Orders(
            ledger, name, execute, Threads() if pool is None else pool, parallel, route, timeout, lease
        )
        self._crew = Crew(orders)
        if start:
            self._crew.start()

    def submit(self, prompt: str, *, id: str | None = None) -> dict[str, Any]:
        """Plan, and return at once with id, status and subtask_count. What the planner raises is raised here.

        Raises `BadPlan` for what is no plan; nothing is added then. With an `id` it may be asked again: what was
        added under it is not planned anew.
        """
        if self._planner is None:
            raise UsageError(
                "this runner has no planner, so nothing was planned; give it one, or submit elsewhere"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"the prompt is {prompt!r}; it must say what to do; nothing was planned")
        if id is not None and (known := view.named(self.ledger, [id])):
            return self._known(known[0], prompt)
        submitted = datetime.now(UTC)
        plan = plan_from(_planned(self._planner, prompt), self._tiers)
        compound = f"c-{os.urandom(6).hex()}" if id is None else id
        try:
            self.ledger.add_tasks(tasks_from(plan, compound, prompt, self.name, self._tiers, submitted))
        except DuplicateTask:  # somebody submitted it while it was planned here
            if not (known := view.named(self.ledger, [compound])):
                raise
            return self._known(known[0], prompt)
        self._crew.bell.ring(self._crew.orders.parallel)
        return {"id": compound, "status": "planned", "subtask_count": len(plan.steps)}

    def _known(self, task: Task, prompt: str) -> dict[str, Any]:
        if not view.is_compound(task) or task.description != prompt:
            raise DuplicateTask(
                f"task {task.id!r} is there already, and is another; nothing was added. Choose another id",
                task.id,
            )
        found = view.progress(self.ledger, task.id)
        return {key: found[key] for key in ("id", "status", "subtask_count")}

    def progress(self, id: str) -> dict[str, Any]:
        """The full picture of a compound, for polling; see `compound_view.progress`."""
        return view.progress(self.ledger, id)

    def recent(self, limit: int = 20) -> list[dict[str, Any]]:
        """This name's newest compounds, newest first, with counts in place of subtasks and 100 characters of prompts."""
        return view.recent(self.ledger, limit, name=self.name)

    def export(self, target: str | os.PathLike[str] | TextIO | None = None) -> int:
        """Write one JSON line for each execution, for billing: to a file, a stream or (None) stdout; how many."""
        return view.export(self.ledger, target, name=self.name)

    def cancel(self, id: str, reason: str = "") -> dict[str, Any]:
        """Cancel what has not ended of a compound; what runs here is given up at once. The full picture afterwards."""
        found = view.cancel(self.ledger, id, reason)
        self._crew.give_up(id, "it was cancelled")
        return found

    def wait(self, id: str, timeout: float | None = None) -> dict[str, Any]:
        """The full picture when the compound has ended. Raises `TimeoutError`, and `PoolClosed` if this runner cannot go on."""
        limit = None if timeout is None else time.monotonic() + timeout
        while view.compound_of(self.ledger, id).state not in ENDED:
            if self._crew.broken is not None:
                raise PoolClosed(self._crew.broken) from self._crew.broken
            if limit is not None and time.monotonic() >= limit:
                raise TimeoutError(f"compound {id!r} has not ended within {timeout:g} s; it goes on")
            with self._crew.news:
                self._crew.news.wait(_LOOK)
        return view.progress(self.ledger, id)

    def close(self, timeout: float | None = None) -> None:
        """Begin nothing more and wait for what runs, for `timeout` seconds at most; then give back the rest, undone.

        The ledger and a pool that was handed in stay open.
        """
        self._crew.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else 0.0)


def _planned(planner: Planner, prompt: str) -> Any:
    try:
        return planner(prompt)
    except Exception as error:
        error.add_note("the planner raised this; nothing was added. Submit the prompt again")
        raise


def _refuse_odd_limits(parallel: int, timeout: float, lease: float) -> None:
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise UsageError(f"parallel={parallel!r} is not a whole number from 1; nothing was begun")
    for name, seconds in (("timeout", timeout), ("lease", lease)):
        if not is_time_limit(seconds):
            raise UsageError(f"{name}={seconds!r} is not a number of seconds above 0; nothing was begun")
