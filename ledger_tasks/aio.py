"""`AsyncTaskLedger`: the same names for asyncio programs. The loop never waits for a lock, a disk or a server.

There is one ledger, `TaskLedger`; its methods run here in a few threads of this instance's own. `_off_loop` carries
their signatures over, so that a type checker sees them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, TypeVar

from ledger_tasks.model import Claim, TaskEvent
from ledger_tasks.states import TaskState
from ledger_tasks.tasks import TaskLedger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future, ThreadPoolExecutor

    from ledger_tasks.book import TaskStore
    from ledger_tasks.deliveries import Delivery
    from ledger_tasks.model import Task
    from ledger_tasks.stores import Where

P = ParamSpec("P")
T = TypeVar("T")
_THREADS: Final = 8
_PAGE: Final = 500


def _off_loop(
    method: Callable[Concatenate[TaskLedger, P], T],
) -> Callable[Concatenate[AsyncTaskLedger, P], Coroutine[Any, Any, T]]:
    """The method, to be awaited."""

    @functools.wraps(method)
    async def call(self: AsyncTaskLedger, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(functools.partial(method, self._ledger, *args, **kwargs))

    return call


def _claiming(
    method: Callable[Concatenate[TaskLedger, P], Claim | None],
) -> Callable[Concatenate[AsyncTaskLedger, P], Coroutine[Any, Any, Claim | None]]:
    """The same; a claim that is granted to a caller that was cancelled meanwhile is given back."""

    @functools.wraps(method)
    async def call(self: AsyncTaskLedger, /, *args: P.args, **kwargs: P.kwargs) -> Claim | None:
        import asyncio

        future = self._threads().submit(functools.partial(method, self._ledger, *args, **kwargs))
        try:
            return await asyncio.wrap_future(future)
        except (asyncio.CancelledError, GeneratorExit):
            future.add_done_callback(self._give_back)
            raise

    return call


def _in_pages(
    method: Callable[Concatenate[TaskLedger, P], Iterator[T]],
) -> Callable[Concatenate[AsyncTaskLedger, P], AsyncGenerator[T, None]]:
    """The iterator that the method gives, to be gone through with `async for`."""

    @functools.wraps(method)
    async def walk(self: AsyncTaskLedger, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        found = method(self._ledger, *args, **kwargs)
        while page := await self._run(lambda: list(islice(found, _PAGE))):
            for one in page:
                yield one

    return walk


class AsyncTaskLedger:
    """`TaskLedger` for asyncio: what asks the store is awaited, `tasks`, `events` and `subscribe` are async iterators.

    `async with AsyncTaskLedger("ledger.db") as tasks:` closes it at the end.
    """

    def __init__(self, where: Where | TaskLedger = None, **settings: Any) -> None:
        self._ledger = where if isinstance(where, TaskLedger) else TaskLedger(where, **settings)
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    # -- what it is --

    @property
    def agent(self) -> str:
        """Who acts when nobody is named."""
        return self._ledger.agent

    @property
    def session(self) -> str:
        """Whose tasks these are."""
        return self._ledger.session

    @property
    def source(self) -> str:
        """The program that acts."""
        return self._ledger.source

    @property
    def lease(self) -> float:
        """Seconds of silence that a claim lasts unless it says otherwise."""
        return self._ledger.lease

    @property
    def mapping(self) -> dict[str, str]:
        """Names of other programs' states."""
        return self._ledger.mapping

    @mapping.setter
    def mapping(self, names: Mapping[str, str]) -> None:
        self._ledger.mapping = dict(names)

    @property
    def store(self) -> TaskStore:
        """Where the tasks are kept."""
        return self._ledger.store

    def __repr__(self) -> str:
        return f"AsyncTaskLedger({self.agent}:{self.session})"

    def __aiter__(self) -> AsyncIterator[Task]:
        return self.tasks()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- threads --

    def _threads(self) -> ThreadPoolExecutor:
        """This process's own: those of a parent are not there after a fork."""
        from concurrent.futures import ThreadPoolExecutor

        if self._pool is None or self._pid != os.getpid():
            self._pool, self._pid = ThreadPoolExecutor(_THREADS, "ledger-tasks"), os.getpid()
        return self._pool

    async def _run(self, work: Callable[[], T]) -> T:
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(self._threads(), work)

    def _give_back(self, future: Future[Claim | None]) -> None:
        """Release what was granted to nobody; called where the loop may be, so it only asks a thread to."""
        if future.cancelled() or future.exception() is not None:
            return
        claim = future.result()
        if claim is None:
            return
        why = "its caller was cancelled before it had it"
        try:
            self._threads().submit(self._ledger.release, claim, why)
        except RuntimeError:  # the program is ending, and takes no more work; no loop runs any more
            self._ledger.release(claim, why)

    async def close(self) -> None:
        """Close the store and end the threads; both come back when they are used again."""
        await self._run(self._ledger.close)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    async def in_session(self, session: str) -> AsyncTaskLedger:
        """The same store and agent in another session."""
        return AsyncTaskLedger(await self._run(lambda: self._ledger.in_session(session)))

    def state_named(self, name: TaskState | str) -> TaskState:
        """The state of that name; asks no store."""
        return self._ledger.state_named(name)

    # -- adding --

    add_task = _off_loop(TaskLedger.add_task)
    add_tasks = _off_loop(TaskLedger.add_tasks)
    add_dynamic_task = _off_loop(TaskLedger.add_dynamic_task)
    add_subtasks = _off_loop(TaskLedger.add_subtasks)
    add_dependency = _off_loop(TaskLedger.add_dependency)

    # -- looking --

    get = _off_loop(TaskLedger.get)
    get_task = get
    tasks = _in_pages(TaskLedger.tasks)
    list_tasks = _off_loop(TaskLedger.list_tasks)
    counts = _off_loop(TaskLedger.counts)
    sessions = _off_loop(TaskLedger.sessions)
    get_pending_subtasks = _off_loop(TaskLedger.get_pending_subtasks)
    dead_letters = _off_loop(TaskLedger.dead_letters)

    # -- choosing --

    get_next_executable_task = _off_loop(TaskLedger.get_next_executable_task)
    get_parallel_executable_tasks = _off_loop(TaskLedger.get_parallel_executable_tasks)
    get_available = _off_loop(TaskLedger.get_available)
    waves = _off_loop(TaskLedger.waves)
    critical_path = _off_loop(TaskLedger.critical_path)

    # -- claiming --

    claim_task = _claiming(TaskLedger.claim_task)
    claim_next = _claiming(TaskLedger.claim_next)
    heartbeat = _off_loop(TaskLedger.heartbeat)
    release = _off_loop(TaskLedger.release)

    # -- what its holder does --

    start = _off_loop(TaskLedger.start)
    pause = _off_loop(TaskLedger.pause)
    resume = _off_loop(TaskLedger.resume)
    submit_for_review = _off_loop(TaskLedger.submit_for_review)
    complete = _off_loop(TaskLedger.complete)
    complete_task_and_route = _off_loop(TaskLedger.complete_task_and_route)
    fail = _off_loop(TaskLedger.fail)
    checkpoint = _off_loop(TaskLedger.checkpoint)
    progress = _off_loop(TaskLedger.progress)
    add_artifact = _off_loop(TaskLedger.add_artifact)

    # -- what anybody does --

    approve = _off_loop(TaskLedger.approve)
    reject = _off_loop(TaskLedger.reject)
    block = _off_loop(TaskLedger.block)
    unblock = _off_loop(TaskLedger.unblock)
    shelve = _off_loop(TaskLedger.shelve)
    unshelve = _off_loop(TaskLedger.unshelve)
    retry = _off_loop(TaskLedger.retry)
    cancel = _off_loop(TaskLedger.cancel)

    # -- workers --

    beat = _off_loop(TaskLedger.beat)
    workers = _off_loop(TaskLedger.workers)

    # -- recovery --

    stale_tasks = _off_loop(TaskLedger.stale_tasks)
    recover = _off_loop(TaskLedger.recover)

    # -- what happened --

    events = _in_pages(TaskLedger.events)
    replay = _off_loop(TaskLedger.replay)
    verify = _off_loop(TaskLedger.verify)
    export = _off_loop(TaskLedger.export)
    import_from = _off_loop(TaskLedger.import_from)
    last_seq = _off_loop(TaskLedger.last_seq)

    async def subscribe(
        self, after: int | None = None, *, every: float = 0.1, all_sessions: bool = False
    ) -> AsyncGenerator[TaskEvent, None]:
        """Events as they happen, for ever; `after` a sequence number (None: from now on)."""
        import asyncio

        last = await self.last_seq() if after is None else after
        while True:
            async for event in self.events(after=last, all_sessions=all_sessions):
                yield event
                last = event.seq
            await asyncio.sleep(every)

    # -- other programs' words --

    write_event = _off_loop(TaskLedger.write_event)
    sync = _off_loop(TaskLedger.sync)

    # -- deliveries, awareness, figures --

    async def deliver(
        self, send: Callable[[], Any], *, recipient: str, channel: str = "", key: str, cooldown: float = 0.0
    ) -> Delivery:
        """Send once for each key; `send` may be a coroutine function, which then runs in this loop.

        It has a thread of its own meanwhile, so that a slow send holds up nobody's heartbeat. A caller that is
        cancelled leaves it to end by itself; a loop that ends in the midst of it leaves a doubt.
        """
        import asyncio
        import inspect

        if inspect.iscoroutinefunction(send):
            send = _from_thread(send, asyncio.get_running_loop())
        return await asyncio.to_thread(
            self._ledger.deliver, send, recipient=recipient, channel=channel, key=key, cooldown=cooldown
        )

    should_deliver = _off_loop(TaskLedger.should_deliver)
    deliveries = _off_loop(TaskLedger.deliveries)
    metrics = _off_loop(TaskLedger.metrics)
    get_awareness = _off_loop(TaskLedger.get_awareness)
    get_awareness_text = _off_loop(TaskLedger.get_awareness_text)


def _from_thread(send: Callable[[], Coroutine[Any, Any, Any]], loop: Any) -> Callable[[], Any]:
    """A coroutine function as a plain one, for a thread that is not the loop's."""
    import asyncio
    from concurrent import futures

    def call() -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(send(), loop).result()
        except (
            futures.CancelledError
        ):  # to the guard an interruption, not a failure: nobody knows what was sent
            raise asyncio.CancelledError from None

    return call
