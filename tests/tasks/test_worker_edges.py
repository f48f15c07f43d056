"""`Worker`: handlers, errors and options that nobody expects, and what ends it."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import StoreError, UsageError
from ledger_tasks import AsyncTaskContext, Task, TaskLedger, TaskState, Worker
from ledger_tasks.model import Claim
from tests.actors import PATIENCE, Stage

_S = TaskState


@pytest.fixture
def tasks() -> Iterator[TaskLedger]:
    """A ledger in memory."""
    made = TaskLedger("memory://", agent="test", quiet=True)
    yield made
    made.close()


def work(tasks: TaskLedger, handlers: Any, **options: Any) -> None:
    """Until nothing is left that could be begun; fails if that takes for ever."""
    worker = Worker(tasks, handlers, **{"backoff": lambda _: 0.0, "poll": 0.05, "concurrency": 1, **options})
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(worker.run, until_idle=True).result(PATIENCE)
        finally:
            worker.stop()


def ended(tasks: TaskLedger, name: str) -> tuple[TaskState, str]:
    """How a task ended, and why."""
    found = tasks.get(name)
    return found.state, str(found.errors[-1]["error"]) if found.errors else ""


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise type(self)


class Shy:
    """Nor can this."""

    def __repr__(self) -> str:
        raise Mute


# -- handlers --


class Machine:
    """A handler that is an object."""

    async def __call__(self, task: Task, _: AsyncTaskContext) -> str:
        await asyncio.sleep(0)
        return task.id


def test_a_partial_of_an_object_may_be_a_coroutine(tasks: TaskLedger) -> None:
    """It is awaited like a coroutine function."""
    tasks.add_task("a")

    work(tasks, functools.partial(functools.partial(Machine())))

    assert (_S.DONE, "a") == (tasks.get("a").state, tasks.get("a").result)


async def _later(*_: object) -> str:
    return "done"


async def _drops(*_: object) -> AsyncIterator[int]:
    yield 1


def _steps(*_: object) -> Iterator[int]:
    yield 1


async def _passes_on(*_: object) -> Any:
    return _later()


@pytest.mark.parametrize(
    "handler",
    [lambda *_: _later(), _drops, _steps, _passes_on],
    ids=["lambda", "async generator", "generator", "coroutine of a coroutine"],
)
def test_what_never_ran_is_not_done(tasks: TaskLedger, handler: Callable[..., Any]) -> None:
    """A handler that returns a coroutine or a generator has done nothing, and its task fails."""
    tasks.add_task("a")

    work(tasks, handler)

    state, why = ended(tasks, "a")
    assert state == _S.FAILED
    assert "nobody waits for" in why


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_coroutine_cannot_end_its_worker(tasks: TaskLedger, error: BaseException) -> None:
    """What would end the loop ends the task alone; the next coroutine runs."""
    tasks.add_tasks([Task("a", type="bad", priority=9), Task("b")])

    async def bad(*_: object) -> None:
        raise error

    work(tasks, {"bad": bad, "task": _later})

    assert (_S.FAILED, _S.DONE) == (tasks.get("a").state, tasks.get("b").state)
    assert type(error).__name__ in tasks.get("a").reason


# -- how it ended --


def test_an_error_without_a_text_fails_its_task(tasks: TaskLedger) -> None:
    """Its name is kept, and the worker goes on."""
    tasks.add_tasks([Task("a"), Task("b")])

    def bad(*_: object) -> None:
        raise Mute

    work(tasks, bad)

    assert [(_S.FAILED, "Mute")] * 2 == [ended(tasks, name) for name in "ab"]


def _nested(*_: object) -> list[Any]:
    made: list[Any] = []
    for _depth in range(100_000):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("handler", "shown"), [(lambda *_: Shy(), "<Shy>"), (_nested, "<list>")], ids=["shy", "nested"]
)
def test_a_result_that_cannot_be_shown_is_told(
    tasks: TaskLedger, handler: Callable[..., Any], shown: str
) -> None:
    """The task is done all the same."""
    tasks.add_tasks([Task("a"), Task("b")])

    work(tasks, handler)

    assert {_S.DONE: 2} == tasks.counts()
    assert shown == tasks.get("b").artifacts[0]["value"]["repr"]


def _raises(_: int) -> float:
    raise ValueError("no pause")


@pytest.mark.parametrize(
    "backoff",
    [_raises, lambda _: "soon", lambda _: -1.0, lambda _: float("nan")],
    ids=["raises", "text", "negative", "nan"],
)
def test_an_odd_backoff_is_told_and_the_usual_one_made(
    tasks: TaskLedger, backoff: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is recorded all the same, and the worker goes on."""
    tasks.add_tasks([Task("a"), Task("b")])

    def bad(*_: object) -> None:
        raise ValueError("no luck")

    work(tasks, bad, backoff=backoff)

    assert [(_S.FAILED, "ValueError: no luck")] * 2 == [ended(tasks, name) for name in "ab"]
    assert "gave no pause" in caplog.text


# -- when nothing is left --


def test_a_rate_does_not_keep_an_idle_worker(tasks: TaskLedger) -> None:
    """Nothing is left to begin, so nobody waits for the time when it may begin."""
    tasks.add_task("a", type="mail")

    work(tasks, {"mail": lambda *_: None}, rate={"mail": "1/d"})

    assert _S.DONE == tasks.get("a").state


def test_an_open_breaker_does_not_keep_an_idle_worker(tasks: TaskLedger) -> None:
    """The same for a type that keeps failing, of which no task is left."""
    tasks.add_tasks([Task(f"t{n}") for n in range(5)])

    def bad(*_: object) -> None:
        raise ValueError("no luck")

    started = time.monotonic()
    work(tasks, bad)

    assert {_S.FAILED: 5} == tasks.counts()
    assert time.monotonic() - started < 25


def test_what_a_worker_cannot_do_does_not_keep_it(tasks: TaskLedger) -> None:
    """A task that needs more capabilities than it has is somebody else's."""
    tasks.add_tasks([Task("plain"), Task("gpu", capabilities=("gpu",))])

    work(tasks, lambda *_: None)

    assert (_S.DONE, _S.PENDING) == (tasks.get("plain").state, tasks.get("gpu").state)


class _Away(TaskLedger):
    """A ledger whose lists cannot be had at first."""

    asked = 0

    def tasks(self, **wanted: Any) -> Iterator[Task]:
        self.asked += 1
        if self.asked < 3:
            raise StoreError("the store is out of reach")
        return super().tasks(**wanted)


def test_a_worker_that_cannot_look_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """It is not idle because it does not know; it looks again, and ends when it knows."""
    tasks = _Away("memory://", agent="test", quiet=True)
    tasks.add_task("a")

    work(tasks, lambda *_: None)

    assert (_S.DONE, 3) == (tasks.get("a").state, tasks.asked)
    assert "does not know whether there is work" in caplog.text
    tasks.close()


class _Slow(TaskLedger):
    """A ledger whose store is busy when the first task is claimed."""

    is_busy = True

    def claim_next(self, *args: Any, **options: Any) -> Claim | None:
        claim = super().claim_next(*args, **options)
        if self.is_busy:
            self.is_busy = False
            time.sleep(0.6)
        return claim


def test_a_rate_counts_from_the_beginning_of_a_task() -> None:
    """Not from the moment when it was asked for: a slow claim brings it no nearer to the next."""
    tasks = _Slow("memory://", agent="test", quiet=True)
    tasks.add_tasks([Task("a"), Task("b")])
    begun = []

    def handler(*_: object) -> None:
        begun.append(time.monotonic())

    work(tasks, {"task": handler}, rate={"task": "1/s"})

    assert begun[1] - begun[0] > 0.9
    tasks.close()


# -- the end --


def test_a_cancelled_coroutine_ends_before_its_task_is_given_back(tasks: TaskLedger) -> None:
    """What it does at its end is waited for: nobody else has the task meanwhile, and the loop still runs."""
    tasks.add_task("a")
    begun, states = threading.Event(), []

    async def handler(task: Task, _: AsyncTaskContext) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            states.append(tasks.get(task.id).state)

    worker = Worker(tasks, handler, grace=0)
    worker.start()
    assert begun.wait(PATIENCE)
    worker.close()

    assert [_S.ACTIVE] == states
    assert (_S.PENDING, 0) == (tasks.get("a").state, tasks.get("a").retries)


def test_what_a_coroutine_leaves_running_is_cancelled_at_the_end(tasks: TaskLedger) -> None:
    """A task of the loop that its handler did not wait for can clean up before the loop is closed."""
    tasks.add_task("a")
    begun, ends, left = asyncio.Event(), [], []

    async def goes_on() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ends.append("cleaned up")

    async def handler(*_: object) -> None:
        left.append(asyncio.create_task(goes_on()))
        await begun.wait()

    work(tasks, handler)

    assert ["cleaned up"] == ends
    assert left[0].cancelled()


@pytest.mark.slow
def test_a_coroutine_that_holds_up_its_loop_does_not_hold_up_the_end(tasks: TaskLedger) -> None:
    """`close` returns, and the task is left to its lease."""
    tasks.add_task("a")
    begun, may_end = threading.Event(), threading.Event()

    async def handler(*_: object) -> None:
        begun.set()
        may_end.wait(PATIENCE)  # that is what it does wrong

    worker = Worker(tasks, handler, grace=0)
    worker.start()
    assert begun.wait(PATIENCE)
    closing = threading.Thread(target=worker.close)
    closing.start()
    closing.join(PATIENCE - 5)
    is_closed = not closing.is_alive()
    may_end.set()

    assert is_closed
    assert _S.ACTIVE == tasks.get("a").state


def test_a_task_of_a_loop_that_is_torn_down_is_given_back(tasks: TaskLedger) -> None:
    """A second Ctrl-C ends the loop and all its coroutines; that is no failure of their tasks."""
    tasks.add_task("a")

    async def main() -> None:
        begun = asyncio.Event()

        async def handler(*_: object) -> None:
            begun.set()
            await asyncio.Event().wait()

        working = asyncio.create_task(Worker(tasks, handler, grace=PATIENCE).run_async())
        await begun.wait()
        working.cancel()
        await asyncio.sleep(0)
        # the loop's end cancels what is left, whoever waits for it

    asyncio.run(main())

    assert (_S.PENDING, ()) == (tasks.get("a").state, tasks.get("a").errors)


FORK = """
from ledger_tasks import TaskLedger, Worker
def handler(task, context):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    effect(f"{task.id} {bool(child)}")
    return bool(child)
Worker(TaskLedger(DB, quiet=True), handler, concurrency=2, poll=0.05).run(until_idle=True)
"""


def test_a_forked_child_takes_no_tasks(tmp_path: Path) -> None:
    """A child that comes back out of a handler ends; its parent's result counts."""
    tasks = TaskLedger(tmp_path / "ledger.db", agent="test", quiet=True)
    tasks.add_tasks([Task("a"), Task("b")])

    with Stage(tmp_path) as stage:
        stage.start(FORK).ends_well()

        assert ["a False", "a True", "b False", "b True"] == sorted(stage.effects())
    assert [True, True] == [tasks.get(name).result for name in "ab"]
    tasks.close()


# -- what it cannot work with --


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"lease": odd}, "lease=") for odd in (0, -1, True, "x", float("nan"), float("inf"))),
        ({"poll": 0}, "poll=0"),
        ({"grace": -1}, "grace=-1"),
        ({"grace": "x"}, "grace='x'"),
        ({"capabilities": "gpu"}, "is one text"),
        ({"agent": "a\nb"}, "the name of a worker"),
        ({"rate": {"a": "9" * 5000 + "/s"}}, "the rate"),
    ],
)
def test_an_option_that_could_never_work_is_refused(
    tasks: TaskLedger, options: dict[str, Any], says: str
) -> None:
    """At once, instead of a worker that gets no task for ever."""
    with pytest.raises(UsageError, match=says):
        Worker(tasks, {"a": print}, **options)
