"""Who executes what is ready: so many slots, each of which claims, executes and records one subtask after the other.

A slot that has ended something looks at once for what that freed, and wakes others if there is more. What other
processes do is seen by one thread that looks at the number of the newest event while a slot is idle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple

from ledger import LedgerError, StoreError
from ledger_tasks import compound_view as view
from ledger_tasks.bell import Bell
from ledger_tasks.book import Wanted
from ledger_tasks.compound_plan import COMPOUND, SUBTASK, assigned, index_in
from ledger_tasks.compound_run import Held, Outcome, Run, Threads
from ledger_tasks.errors import in_words
from ledger_tasks.keeping import Keeper
from ledger_tasks.model import Claim, Task
from ledger_tasks.tasks import TaskLedger

#: does a subtask: text, or {"result": …, "cost": …, "tokens": …}
Execute = Callable[[dict[str, Any]], Any]
#: gives the tier that shall do a subtask
Route = Callable[[dict[str, Any]], int]

_log: Final = logging.getLogger("ledger")
#: seconds between two looks for what other processes did
_LOOK: Final = 0.02
#: the same while no compound of this name is unfinished, and how long nothing must have happened before that is asked
_IDLE: Final = 0.25
_QUIET: Final = 2.0
#: how often is looked for what the dead left behind, and for what was put off
_LEFT: Final = 0.5
#: seconds that an execution with a time limit of its own gets beyond it to say so itself
_GRACE: Final = 1.0
#: seconds until a subtask is tried again that the store or the pool kept from being executed
_LATER: Final = 1.0


class Orders(NamedTuple):
    """What a crew is to do, and how."""

    ledger: TaskLedger
    name: str
    execute: Execute
    pool: Executor
    parallel: int
    route: Route | None
    #: seconds for a subtask that says nothing else
    timeout: float
    lease: float


class _Having(NamedTuple):
    """A claim, and whether it is still ours."""

    claim: Claim
    held: Held

    @property
    def compound(self) -> str:
        return self.claim.task.parent or self.claim.id


class Crew:
    """The slots of a runner, and who wakes them."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.bell = Bell()
        #: notified when a compound has ended here, or the crew has
        self.news = threading.Condition()
        #: why the pool takes nothing more
        self.broken: BaseException | None = None
        self._ledger = orders.ledger
        self._keeper = Keeper(orders.ledger)
        self._having: dict[str, _Having] = {}
        self._threads = Threads()
        self._about = lru_cache(64)(self._read_about)
        self._is_leaving = False
        works = [self._watch, *[self._fill_slot] * orders.parallel]
        self._crew = [threading.Thread(target=work, name="ledger-compound", daemon=True) for work in works]

    def start(self) -> None:
        """Go on with whatever is unfinished."""
        self.bell.ring()
        for thread in self._crew:
            thread.start()

    def give_up(self, compound: str | None, why: str) -> None:
        """Wait no longer for what runs of a compound, or (None) for anything."""
        for having in [*self._having.values()]:
            if compound is None or having.compound == compound:
                having.held.give_up(why)

    def close(self, timeout: float | None) -> None:
        """Begin nothing more; what runs gets so many seconds (None: its own time limit), and is given back then."""
        self.bell.close()
        limit = None if timeout is None else time.monotonic() + timeout
        crew = [thread for thread in self._crew if thread.ident is not None]
        for thread in crew:
            thread.join(None if limit is None else max(0.0, limit - time.monotonic()))
        self._is_leaving = True
        self.give_up(None, "its runner was closed")
        for thread in crew:
            thread.join()
        self._keeper.close()

    def _tell(self) -> None:
        with self.news:
            self.news.notify_all()

    # -- waking --

    def _watch(self) -> None:
        """Ring when anything happened in the ledger, and now and then for what happens by mere time."""
        seen, moved, left, pause = -1, time.monotonic(), 0.0, _LOOK
        while self.bell.pause(pause):
            now = time.monotonic()
            try:
                last = self._ledger.last_seq()
                if now - left > _LEFT:
                    left = now
                    self._bring_back()
                    self.bell.ring()
                if last != seen:
                    seen, moved, pause = last, now, _LOOK
                    self.bell.ring()
                elif pause == _LOOK and now - moved > _QUIET:
                    moved, pause = now, _LOOK if self._is_any_unfinished() else _IDLE
            except LedgerError as error:
                _log.warning("compound runner %s cannot look for work: %s", self.orders.name, error)
                pause = _LATER

    def _bring_back(self) -> None:
        if self._ledger.stale_tasks():
            self._ledger.recover()

    def _is_any_unfinished(self) -> bool:
        wanted = Wanted(types=frozenset([COMPOUND]), waiting=True)
        return bool(self._ledger.store.read(self._ledger.session, lambda book: book.page(wanted, 1)))

    # -- a slot --

    def _fill_slot(self) -> None:
        while self.bell.wait():
            claim = self._claim(looks=True)
            while claim is not None:
                self.bell.ring(2)  # there may be more; by two, so that many slots are awake soon
                self._work_on(claim)
                claim = None if self.bell.is_closed else self._claim()

    def _claim(self, *, looks: bool = False) -> Claim | None:
        orders = self.orders
        wanted: dict[str, Any] = {"types": (COMPOUND, SUBTASK), "capabilities": (orders.name,)}
        try:
            # who was only woken looks first: that disturbs nobody, while a claim keeps others from writing
            if looks and self._ledger.get_next_executable_task(**wanted) is None:
                return None
            return self._ledger.claim_next(**wanted, lease=orders.lease, start=orders.route is None)
        except LedgerError as error:
            _log.warning("compound runner %s cannot claim: %s", orders.name, error)
            return None

    def _work_on(self, claim: Claim) -> None:
        held = Held()
        self._having[claim.token] = _Having(claim, held)
        self._keeper.watch(claim, lambda: held.give_up("its claim was lost"))
        try:
            if not view.is_planned(claim.task):
                self._refuse(claim, "no runner planned it")
            elif claim.task.type == COMPOUND:
                self._end(claim)
            else:
                self._do(claim, held)
        except LedgerError as error:  # cancelled, taken over, or out of reach: whoever has it next sees to it
            _log.info("compound runner %s leaves task %s: %s", self.orders.name, claim.id, error)
            self._give_back(claim, str(error), _LATER)
        except Exception as error:  # noqa: BLE001 - the slot must go on, whatever is the matter with one task
            _log.exception("compound runner %s cannot do task %s", self.orders.name, claim.id)
            self._refuse(claim, in_words(error))
        finally:
            held.give_up("it has ended")  # a thread that comes too late makes no guarded call any more
            self._keeper.forget(claim)
            del self._having[claim.token]

    def _give_back(self, claim: Claim, why: str, later: float = 0.0) -> None:
        with suppress(LedgerError):  # then somebody else has it, or it lapses
            self._ledger.release(claim, why, retry_in=later)

    def _refuse(self, claim: Claim, why: str) -> None:
        with suppress(LedgerError):
            if self.orders.route is not None:
                self._ledger.start(claim)
        with suppress(LedgerError):
            self._ledger.fail(claim, f"a compound runner cannot do this {claim.task.type}: {why}")

    def _end(self, claim: Claim) -> None:
        """All subtasks of a compound have ended: so has it."""
        if self.orders.route is not None:
            self._ledger.start(claim)
        summary = view.summary_of(view.parts_of(self._ledger, claim.id))
        if summary["completed_count"]:
            self._ledger.complete(claim, summary)
        else:
            self._ledger.checkpoint(claim, summary)
            self._ledger.fail(claim, f"none of its {summary['subtask_count']} subtasks was completed")
        self._tell()

    # -- a subtask --

    def _do(self, claim: Claim, held: Held) -> None:
        subtask = self._subtask(claim.task)
        try:
            outcome = self._outcome(claim, subtask, held)
        except _PoolGone as gone:
            self._stop(gone.error)
            if not gone.is_executed:
                self._give_back(claim, str(gone))
            return  # else it lapses, which counts: it may be what broke the pool
        if outcome is None:
            self._give_back(claim, held.why, 0.0 if self.bell.is_closed else _LATER)
        else:
            self._record(claim, outcome, subtask["estimate"])

    def _subtask(self, task: Task) -> dict[str, Any]:
        """What `execute` and `route` are told."""
        tier, model = assigned(task)
        told = task.checkpoint or task.payload
        deps = view.named(self._ledger, [dep.id for dep in task.depends_on])
        return {
            "id": task.id,
            "compound": task.parent,
            "index": task.payload["index"],
            "description": task.description,
            "tier_hint": task.payload["tier_hint"],
            "tier_assigned": tier,
            "model": model,
            "prompt": self._about(task.parent)[0],
            "depends_on": [index_in(dep.id) for dep in task.depends_on],
            "inputs": {index_in(dep.id): dep.result for dep in deps},
            "timeout": task.payload.get("timeout", self.orders.timeout),
            "estimate": told["estimate"],
        }

    def _read_about(self, compound: str) -> tuple[str, dict[str, Any]]:
        whole = view.compound_of(self._ledger, compound)
        return whole.description, whole.payload["tiers"]

    def _outcome(self, claim: Claim, subtask: dict[str, Any], held: Held) -> Outcome | None:
        """What its execution came to; None if it was given up."""
        if self.orders.route is not None:
            refused = self._routed(claim, subtask, held)
            if held.is_lost and refused is None:
                return None
            self._ledger.start(claim)
            if refused is not None:
                return refused
        run = Run(self.orders.execute, subtask, claim.task.workflow, held, claim.token)
        return _answer(self.orders.pool, run, held, subtask["timeout"])

    def _routed(self, claim: Claim, subtask: dict[str, Any], held: Held) -> Outcome | None:
        """Ask `route` for the tier, and keep one that was not planned; what it came to if there is none."""
        route = self.orders.route
        if route is None or claim.task.checkpoint is not None:  # whoever had it before has asked
            return None
        answer = _answer(self._threads, lambda: Outcome(route(dict(subtask))), held, subtask["timeout"])
        if answer is None or answer.error is not None:
            return None if answer is None else Outcome(error=f"route: {answer.error}")
        tiers = self._about(claim.task.parent)[1]
        if str(answer.result) not in tiers:
            return Outcome(error=f"route chose the tier {answer.result!r}, none of {', '.join(tiers)}")
        if answer.result != subtask["tier_assigned"]:
            model, estimate = tiers[str(answer.result)]
            chosen = {"tier_assigned": int(answer.result), "model": model, "estimate": estimate}
            self._ledger.checkpoint(claim, chosen)
            subtask.update(chosen)
        return None

    def _record(self, claim: Claim, outcome: Outcome, estimate: float) -> None:
        """Write the outcome, however long the store is out of reach, as long as the claim may be ours."""
        limit, pause = time.monotonic() + self.orders.lease, 0.05
        while True:
            try:
                self._write(claim, outcome, estimate)
                return
            except StoreError as error:
                if error.refused and outcome.error is None:
                    outcome = Outcome(error=f"its result cannot be kept: {error}", cost=outcome.cost)
                elif self._is_leaving or time.monotonic() > limit:
                    raise
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _write(self, claim: Claim, outcome: Outcome, estimate: float) -> None:
        if outcome.error is None:
            cost = estimate if outcome.cost is None else outcome.cost
            self._ledger.complete(claim, outcome.result, cost=cost, tokens=outcome.tokens)
        else:
            self._ledger.fail(claim, outcome.error, cost=outcome.cost or 0.0, tokens=outcome.tokens)

    def _stop(self, error: BaseException) -> None:
        """The pool takes nothing more."""
        _log.warning("compound runner %s begins nothing more, its pool is gone: %s", self.orders.name, error)
        self.broken = error
        self.bell.close()
        self._tell()


class _PoolGone(Exception):
    def __init__(self, error: BaseException, *, is_executed: bool) -> None:
        super().__init__(f"its pool is gone: {error}")
        self.error, self.is_executed = error, is_executed


def _answer(pool: Executor, call: Callable[[], Outcome], held: Held, seconds: float) -> Outcome | None:
    """What the call came to, in time; None if it was given up. Raises `_PoolGone`."""
    try:
        future = pool.submit(call)
    except RuntimeError as error:  # shut down, or broken
        raise _PoolGone(error, is_executed=False) from error
    except Exception as error:  # noqa: BLE001 - what cannot be sent to another process
        return _failed(error)
    held.follow(future)
    held.wait(seconds + _GRACE)
    if future.done():
        return _answered(future, held)
    future.cancel()
    if held.is_lost:
        return None
    held.give_up("its time is over")
    return Outcome(error=f"no answer in {seconds:g} s")


def _answered(future: Future[Outcome], held: Held) -> Outcome | None:
    try:
        return future.result()
    except BrokenExecutor as error:
        raise _PoolGone(error, is_executed=True) from error
    except CancelledError:
        held.give_up("its pool dropped it")
        return None
    except BaseException as error:  # noqa: BLE001 - recorded as its failure
        return _failed(error)


def _failed(error: BaseException) -> Outcome:
    return Outcome(error=in_words(error))
