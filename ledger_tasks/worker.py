"""`Worker`: takes tasks and runs their handlers, so that what a killed worker did is not done again.

A handler runs in `ledger.replaying(task.workflow)`. When its worker dies, the task's lease lapses, another worker takes it
and runs the handler from its top: every guarded tool call that had finished is answered with its first result, and
the handler goes on where it was. That holds for calls that are the same calls: a handler that asks a model for the
arguments may get them worded anew, and such a tool needs `key=`, so that the ledger knows which action is meant.
The guards that the handler's tools use must keep their calls where the next worker finds them; `context.guard` does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Final, Self

import ledger
from ledger import InDoubt, InProgress, LedgerError, UsageError
from ledger_tasks import operations as ops
from ledger_tasks.book import Row
from ledger_tasks.context import AsyncTaskContext, TaskContext
from ledger_tasks.errors import InvalidTransition, NotHolder, in_words
from ledger_tasks.keeping import Keeper
from ledger_tasks.model import LONGEST, Claim, Task, WorkerInfo, refuse_odd
from ledger_tasks.pacing import Breaker, Pace
from ledger_tasks.states import LEASED, TaskState
from ledger_tasks.tasks import TaskLedger

#: a function of a task and its context, plain or async; what it returns is the task's result
Handler = Callable[[Task, Any], Any]
#: the first look for work after there was none; each that finds none doubles it
_SOON: Final = 0.02
#: a store that does not answer is asked again so soon, while the lease lasts
_AGAIN: Final = 0.5
#: what a worker that is to end waits for handlers after it told them to stop
_AFTERWARDS: Final = 5.0
_CANCELLED: Final = (asyncio.CancelledError, futures.CancelledError)
_USUAL: Final = Breaker()
_log = logging.getLogger("ledger.tasks")


@dataclass(slots=True)
class _Job:
    context: TaskContext
    #: what stops its coroutine, if it is one
    cancel: Callable[[], object] | None = None

    @property
    def task(self) -> Task:
        return self.context.task


class Worker:
    """Runs the handlers of tasks: `Worker(ledger, {"mail": send_mail}, concurrency=4).run()`.

    handlers      by task type, or one function for tasks of every type: `handler(task, context)`, plain or async
    agent         who it is in the ledger; two that work at once need two names
    concurrency   how many tasks it works on at once, each in a thread of its own; coroutines share one loop
    capabilities  what it can do; it is given no task that needs more. None: it can do everything
    lease         seconds of silence after which its tasks are somebody else's; the ledger's, if not given
    rate          by type, how many may begin: `{"mail": "10/s"}`; of this worker alone ("*": one function's)
    breaker       pauses a type that keeps failing; None: never
    backoff       seconds before a failed task is tried again, by the number of its retries; 1, 2, 4 … 300 if not given
    poll          it looks for work at least so often, in seconds, when there was none
    grace         so long its handlers may go on when it has to end

    SIGTERM and Ctrl-C end it gracefully: it takes nothing more, lets its handlers end, and gives back what is not
    done; a second one ends the process at once. Raises `UsageError` for what it cannot work with.
    """

    def __init__(
        self, ledger: TaskLedger, handlers: Mapping[str, Handler] | Handler, *, agent: str | None = None,
        concurrency: int = 4, capabilities: Sequence[str] | None = (), lease: float | None = None,
        rate: Mapping[str, str] | None = None, breaker: Breaker | None = _USUAL, poll: float = 0.5, grace: float = 30.0,
        backoff: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        self.ledger = ledger
        self.agent = refuse_odd(agent or f"{ledger.agent}/{os.getpid()}", "the name of a worker")
        self.concurrency = _whole(concurrency)
        self.poll = _seconds("poll", poll)
        self.grace = 0.0 if grace == 0 else _seconds("grace", grace)
        self._handlers = _checked(handlers)
        self._options: dict[str, Any] = {
            "capabilities": _several(capabilities), "start": True,
            "lease": None if lease is None else _seconds("lease", lease),
        }  # fmt: skip
        self._backoff = backoff
        self._pace = Pace(_refuse_unknown(rate, self._handlers), breaker)
        #: held by the thread that looks for the next task
        self._turn = threading.Lock()
        #: guards everything below
        self._state = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._done = self._failed = 0
        self._threads: list[threading.Thread] = []
        #: it takes nothing more; it says no more that it lives; somebody may have work
        self._ends, self._is_over, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._until_idle = False
        self._keeper = Keeper(ledger)
        self._home = _Home()
        self._info: WorkerInfo | None = None

    # -- running --

    def run(self, *, until_idle: bool = False) -> None:
        """Work until it is told to end, or (`until_idle`) until no task of its types is begun or can be begun.

        In the main thread SIGTERM and Ctrl-C end it gracefully.
        """
        with _Signals(self.stop):  # before anything is taken
            self.start(until_idle=until_idle)
            try:
                self._serve()
            finally:
                self.close()

    async def run_async(self, *, until_idle: bool = False) -> None:
        """The same in an asyncio program: its coroutines run in this loop. Cancel it to end it gracefully."""
        self.start(until_idle=until_idle, loop=asyncio.get_running_loop())
        try:
            await asyncio.to_thread(self._serve)
        finally:
            self.stop()
            await asyncio.shield(asyncio.to_thread(self.close))

    def start(self, *, until_idle: bool = False, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Work in the background until `close`; coroutines run in `loop`, or in one of the worker's own."""
        if self._threads:
            raise UsageError(f"worker {self.agent!r} runs, or has run; make another one")
        self._until_idle = until_idle
        self._home.loop = loop
        self._threads = [
            threading.Thread(target=self._work, name=f"ledger-worker-{n}", daemon=True)
            for n in range(self.concurrency)
        ]
        self._beat()
        threading.Thread(target=self._beat_on, name="ledger-worker-beat", daemon=True).start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take nothing more; what is begun may end. Safe to call from a signal handler."""
        self._ends.set()
        self._wake.set()

    def close(self) -> None:
        """Stop, wait for the handlers (`grace` seconds, then they are told to stop), and give back what is not done."""
        self.stop()
        if not self._threads or self._is_over.is_set():
            return
        self._wait(self.grace)
        self._tell_to_stop()
        self._wait(_AFTERWARDS)
        for job in self._running():
            _log.warning("task %s goes on after its worker's end; its lease will lapse", job.task.id)
        self._is_over.set()
        self._keeper.close()
        self._home.close()
        self._beat(ended=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _running(self) -> list[_Job]:
        with self._state:
            return list(self._jobs.values())

    def _serve(self) -> None:
        """Until it is told to end; from then on the grace counts."""
        while not self._ends.wait(0.2) and any(thread.is_alive() for thread in self._threads):
            pass

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            while thread.is_alive() and (left := until - time.monotonic()) > 0:
                thread.join(min(left, 0.2))  # or no signal would be seen meanwhile

    def _tell_to_stop(self) -> None:
        for job in self._running():
            job.context.stop()
            if job.cancel is not None:
                job.cancel()

    # -- finding work --

    def _work(self) -> None:
        process = os.getpid()
        while (job := self._next()) is not None:
            self._keeper.watch(job.context.claim, functools.partial(self._lose, job))
            outcome = self._outcome(job)
            if os.getpid() != process:
                return  # a child that the handler forked came back out of it: the task is its parent's
            self._record(job, *outcome)

    def _next(self) -> _Job | None:
        """The next task; None when there is to be no more. One thread looks, the others wait for their turn."""
        pause = _SOON
        with self._turn:
            while not self._ends.is_set():
                self._wake.clear()
                job, left = self._claim()
                if job is not None:
                    return job
                if self._until_idle and self._is_idle():
                    self._ends.set()
                    break
                self._wake.wait(min(pause, left))
                pause = min(self.poll, pause * 2)
        return None

    def _claim(self) -> tuple[_Job | None, float]:
        """A task that was claimed and begun, or in how many seconds a type may be asked for that may not be now."""
        now = time.monotonic()
        with self._state:
            waits = {kind: self._pace.wait(kind, now) for kind in self._handlers}
        free = [kind for kind, wait in waits.items() if wait <= 0]
        left = min((wait for wait in waits.values() if wait > 0), default=math.inf)
        claim = self._ask(free) if free else None
        if claim is None:
            return None, left
        job = _Job(TaskContext(self.ledger, claim))
        with self._state:
            self._jobs[claim.token] = job
            self._pace.begin(self._kind(claim.task), time.monotonic())  # the claim may have taken long
        return job, left

    def _ask(self, kinds: Sequence[str]) -> Claim | None:
        types = None if "*" in kinds else kinds
        try:
            if not self._is_any(types):
                return None
            return self.ledger.claim_next(self.agent, types=types, **self._options)
        except LedgerError as error:
            _log.warning("worker %s got no task: %s", self.agent, error)
            self._ends.wait(_AGAIN)
            return None

    def _is_any(self, types: Sequence[str] | None) -> bool:
        """A look that locks nothing: whoever finds nothing to do shall not be in the way of those that have."""
        can = self._options["capabilities"]
        return bool(self._look(lambda book: book.ready(can, types, 1) or book.lapsed(limit=1)))

    def _is_idle(self) -> bool:
        """Whether nothing that it can do is begun, here or elsewhere, and nothing can be begun, now or later."""
        try:
            found = self.ledger.tasks(state=[TaskState.PENDING, *LEASED])
        except LedgerError as error:
            _log.warning("worker %s does not know whether there is work: %s", self.agent, error)
            return False
        return all(task.waiting for task in found if self._can_do(task))

    def _can_do(self, task: Task) -> bool:
        can = self._options["capabilities"]
        has_handler = "*" in self._handlers or task.type in self._handlers
        return has_handler and (can is None or set(task.capabilities) <= set(can))

    def _look(self, look: Callable[[Any], list[Row]]) -> list[Row]:
        return self.ledger.store.read(self.ledger.session, look)

    def _kind(self, task: Task) -> str:
        return "*" if "*" in self._handlers else str(task.type)

    # -- doing it --

    def _record(self, job: _Job, value: Any, error: BaseException | None) -> None:
        ok: bool | None = None
        try:
            ok = self._settle(job, value, error)
        except Exception as why:  # noqa: BLE001 - the thread is needed for the next task
            told = in_words(why)
            _log.error(
                "the end of task %s could not be recorded, its lease will lapse: %s", job.task.id, told
            )
        finally:
            self._keeper.forget(job.context.claim)
            self._end(job, ok=ok)

    def _outcome(self, job: _Job) -> tuple[Any, BaseException | None]:
        """What the handler returned, or what it raised."""
        task = job.task
        handler = self._handlers[self._kind(task)]
        try:
            if _is_async(handler):
                found, error = self._home.run(job, handler)
            else:
                with ledger.replaying(task.workflow, check=job.context.check):
                    found, error = handler(task, job.context), None
            _refuse_undone(found)
            return found, error
        except BaseException as raised:  # noqa: BLE001 - a handler's SystemExit ends its task, not the worker
            return None, raised

    def _settle(self, job: _Job, value: Any, error: BaseException | None) -> bool | None:
        """Tell the ledger how it ended. True: well. False: badly. None: in a way that says nothing of its type."""
        context, claim = job.context, job.context.claim
        if context.is_lost:
            _log.warning("task %s was lost while it ran; nothing that it says counts", claim.id)
            return None
        if context.was_told or (self._ends.is_set() and isinstance(error, _CANCELLED)):
            self._insist(claim, lambda: self.ledger.release(claim, "its worker had to end"))
            return None
        if error is None:
            self._insist(claim, lambda: self._complete(claim, value))
            return True
        if isinstance(error, InDoubt):
            why = str(error)
            self._insist(claim, lambda: self.ledger.block(claim, why))
            return None
        if isinstance(error, InProgress):
            why, pause = str(error), self._pause(claim.task)
            self._insist(claim, lambda: self.ledger.release(claim, why, retry_in=pause))
            return None
        return self._fail(claim, error)

    def _complete(self, claim: Claim, value: Any) -> None:
        try:
            self.ledger.complete(claim, value)
        except UsageError as error:  # it is done, whatever becomes of what it returned
            _log.warning("task %s: its result is not kept: %s", claim.id, error)
            told = {"type": type(value).__name__, "repr": _shown(value), "why": str(error)}
            self.ledger.add_artifact(claim, "result that cannot be kept", told)
            self.ledger.complete(claim)

    def _fail(self, claim: Claim, error: BaseException) -> bool | None:
        _log.warning("task %s failed: %r", claim.id, error, exc_info=error)
        told, pause = in_words(error), self._pause(claim.task)
        return False if self._insist(claim, lambda: self.ledger.fail(claim, told, retry_in=pause)) else None

    def _pause(self, task: Task) -> float:
        if self._backoff is not None:
            try:
                return _pause_from(self._backoff(task.retries))
            except Exception as error:  # noqa: BLE001 - the task has ended, whatever the pause
                _log.error(
                    "backoff(%s) gave no pause, the usual one is made: %s", task.retries, in_words(error)
                )
        return ops.backoff(task.retries)

    def _insist(self, claim: Claim, tell: Callable[[], object]) -> bool:
        """Tell the ledger, again and again while the lease may hold; whether it counted."""
        until = time.monotonic() + claim.lease
        while True:
            try:
                tell()
            except NotHolder as error:
                _log.warning("task %s is not this worker's any more: %s", claim.id, error)
                return False
            except InvalidTransition as error:  # the handler moved it itself, or somebody cancelled it
                _log.info("task %s was moved meanwhile: %s", claim.id, error)
                return False
            except UsageError:
                raise
            except LedgerError as error:
                if time.monotonic() > until:
                    raise
                _log.warning("task %s: its end is not recorded yet: %s", claim.id, error)
                time.sleep(_AGAIN)
            else:
                return True

    def _lose(self, job: _Job) -> None:
        _log.warning("task %s is lost: it was cancelled, or somebody else has it", job.task.id)
        job.context.lose("it was cancelled, or its lease lapsed and it is somebody else's")
        if job.cancel is not None:
            job.cancel()

    def _end(self, job: _Job, *, ok: bool | None) -> None:
        kind = self._kind(job.task)
        with self._state:
            del self._jobs[job.context.claim.token]
            self._done += ok is True
            self._failed += ok is False
            opened = self._pace.end(kind, time.monotonic(), ok=ok)
        if opened:
            _log.error("tasks of type %s keep failing; none is begun for a while", kind)
        self._wake.set()

    # -- being seen --

    def _beat_on(self) -> None:
        while not self._is_over.wait(WorkerInfo.EVERY):
            self._beat()

    def _beat(self, *, ended: bool = False) -> None:
        """Tell those who look that it lives; work does not depend on it."""
        with self._state:
            info = self._info or WorkerInfo(
                ledger.new_token(), self.agent, socket.gethostname(), os.getpid(), tuple(self._handlers),
                self.concurrency,
            )  # fmt: skip
            info = replace(info, done=self._done, failed=self._failed, ended=ended)
        try:
            kept = self.ledger.beat(info)
        except LedgerError as error:
            _log.warning("worker %s could not say that it lives: %s", self.agent, error)
            return
        self._info = None if ended else kept


class _Home:
    """The loop in which coroutines run: the program's, or one in a thread of its own that is made when needed."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._own: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._door = threading.Lock()

    def run(self, job: _Job, handler: Handler) -> tuple[Any, BaseException | None]:
        """What the coroutine returned or raised; waits in this thread for its end, also when it was cancelled."""
        loop = self._loop()
        return asyncio.run_coroutine_threadsafe(self._whole(job, handler, loop), loop).result()

    async def _whole(
        self, job: _Job, handler: Handler, loop: asyncio.AbstractEventLoop
    ) -> tuple[Any, BaseException | None]:
        me: asyncio.Task[Any] | None = asyncio.current_task()
        if me is not None:
            job.cancel = functools.partial(_later, loop, me.cancel)
        if job.context.is_lost or job.context.is_stopping:  # told in the moment before
            raise asyncio.CancelledError
        try:  # the block is entered in the coroutine's own task, whose calls it is for
            with ledger.replaying(job.task.workflow, check=job.context.check):
                return await handler(job.task, AsyncTaskContext(job.context)), None
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the loop, and all that runs in it
            if self.loop is not None and isinstance(error, KeyboardInterrupt):
                raise  # a person's second Ctrl-C is for the program
            return None, error

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self.loop is not None:
            return self.loop
        with self._door:
            if self._own is None:
                self._own = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_loop, args=(self._own,), name="ledger-worker-loop", daemon=True
                )
                self._thread.start()
            return self._own

    def close(self) -> None:
        if self._own is None or self._thread is None:
            return
        self._own.call_soon_threadsafe(self._own.stop)
        self._thread.join(_AFTERWARDS)
        if self._thread.is_alive():
            _log.warning("a coroutine holds up its loop and goes on after its worker's end")
        self._own = None


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is stopped; what handlers left running in it is cancelled then."""
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=_AFTERWARDS / 2))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # it is closed, so nothing runs in it
        loop.call_soon_threadsafe(call)


class _Signals:
    """SIGTERM and SIGINT call a function, once; the next one does what it did before. In the main thread only."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._restore()
        self._call()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def __exit__(self, *exc: object) -> None:
        self._restore()


def _whole(concurrency: int) -> int:
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise UsageError(f"concurrency={concurrency!r} is not a whole number from 1 on")
    return concurrency


def _seconds(name: str, value: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LONGEST:
        raise UsageError(f"{name}={value!r} is not a number of seconds above 0, up to {LONGEST:g}")
    return value


def _pause_from(found: float) -> float:
    if not 0 <= found <= LONGEST:
        raise UsageError(f"{found!r} is not a number of seconds from 0 to {LONGEST:g}")
    return found


def _several(capabilities: Sequence[str] | None) -> Sequence[str] | None:
    if isinstance(capabilities, str):
        raise UsageError(f"capabilities={capabilities!r} is one text; give a list: [{capabilities!r}]")
    return capabilities


def _refuse_undone(found: object) -> None:
    """What a handler returned that would only run if somebody waited for it: nothing was done then."""
    if inspect.isawaitable(found) or inspect.isgenerator(found) or inspect.isasyncgen(found):
        if inspect.iscoroutine(found):
            found.close()
        raise UsageError(
            f"the handler returned an object of the type {type(found).__name__}, which nobody waits for, so nothing of it "
            "ran; give the worker the async function itself, and let a handler return a value"
        )


def _shown(value: object) -> str:
    try:
        return repr(value)[:1000]
    except Exception:  # noqa: BLE001 - nested too deep, or its own code raises
        return f"<{type(value).__name__}>"


def _is_async(handler: Handler) -> bool:
    """Also an object whose call is a coroutine, and a partial of one."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def _checked(handlers: Mapping[str, Handler] | Handler) -> dict[str, Handler]:
    """Handlers by type; under "*" the one for every type."""
    if callable(handlers):
        return {"*": handlers}
    if not isinstance(handlers, Mapping) or not handlers:
        raise UsageError(
            f"the handlers are {handlers!r}; give a dict of task types and functions, or one function for every type"
        )
    if "*" in handlers:
        raise UsageError(
            'a handler for "*" among others is not known; give one function instead of a dict for all types'
        )
    for kind, handler in handlers.items():
        if not callable(handler):
            raise UsageError(
                f"the handler of {kind!r} is {handler!r}; it must be a function of task and context"
            )
    return {str(kind): handler for kind, handler in handlers.items()}


def _refuse_unknown(
    rate: Mapping[str, str] | None, handlers: Mapping[str, Handler]
) -> Mapping[str, str] | None:
    unknown = sorted(set(rate or ()) - set(handlers))
    if unknown:
        raise UsageError(
            f"rate names {', '.join(unknown)}, which has no handler; there are {', '.join(handlers)}"
        )
    return rate
