"""Async tools: the same guarantees, cancellation at every point, and a loop that never blocks."""

import asyncio
import contextlib
import functools
import gc
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import NOT_DONE, Guard, InDoubt, InProgress, Record, Store
from tests.stores.kit import guard_on

#: holds the write lock of a ledger for so many seconds, and says when it has it
LOCK_HOLDER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
db.execute("COMMIT")
"""


@pytest.fixture(params=["sqlite", "memory"])
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guard]:
    """A guard of its own on each of the built-in stores."""
    with guard_on(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a file, which exists."""
    made = Guard(tmp_path / "ledger.db", quiet=True)
    made.check()
    yield made
    made.close()


@contextlib.contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Hold the write lock of a ledger for the length of a block."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("COMMIT")
        db.close()


async def until(true: Callable[[], bool]) -> None:
    """Let the loop run until something has happened, in whichever thread."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 — threads and plain lists set no asyncio.Event
            await asyncio.sleep(0.01)


def statuses(guard: Guard) -> list[str]:
    """How every run of the ledger stands."""
    return [run["status"] for call in guard.history() for run in call["runs"]]


def settled(guard: Guard, expected: list[str]) -> list[str]:
    """The statuses, once they are as expected or have had five seconds to become so."""
    limit = time.monotonic() + 5
    while (found := statuses(guard)) != expected and time.monotonic() < limit:
        time.sleep(0.02)
    return found


def test_an_async_tool_runs_once(guard: Guard) -> None:
    """Await guard(async_fn) gives the result the first time and None the second."""
    runs = []

    async def send(to: str) -> str:
        await asyncio.sleep(0)
        runs.append(to)
        return f"sent {to}"

    async def main() -> tuple[str, str]:
        return await guard(send, "a"), await guard(send, to="a")

    values: Any = asyncio.run(main())

    assert values == ("sent a", None)
    assert runs == ["a"]


def test_ten_coroutines_make_one_run(guard: Guard) -> None:
    """Ten coroutines of one call with replay share one run and its result."""
    runs = []

    async def send(to: str) -> list[str]:
        runs.append(to)
        await asyncio.sleep(0.05)
        return [to]

    guard.policy(send, replay=True)

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(guard(send, "a") for _ in range(10)))

    values = asyncio.run(main())

    assert (values, runs) == ([["a"]] * 10, ["a"])
    assert len({id(v) for v in values}) == 10
    stats = guard.stats()
    assert (stats["attempts"], stats["executed"], stats["blocked"]) == (10, 1, 9)


def test_without_replay_nine_of_ten_are_blocked(guard: Guard) -> None:
    """Ten coroutines of one call without replay: one runs, nine get None at once."""

    async def send(to: str) -> str:
        await asyncio.sleep(0.05)
        return to

    async def main() -> list[ledger.Outcome[str]]:
        return await asyncio.gather(*(guard.call(send, "a") for _ in range(10)))

    outcomes = asyncio.run(main())

    assert sorted(o.kind for o in outcomes) == ["blocked"] * 9 + ["executed"]


def test_two_hundred_tasks_of_distinct_calls_all_run(guard: Guard) -> None:
    """Two hundred tasks with calls of their own run each once, and are all recorded."""
    runs = []

    async def send(n: int) -> int:
        runs.append(n)
        await asyncio.sleep(0)
        return n

    async def main() -> list[int]:
        return await asyncio.gather(*(guard(send, n) for n in range(200)))

    assert asyncio.run(main()) == list(range(200))
    assert sorted(runs) == list(range(200))
    assert statuses(guard) == ["success"] * 200


def test_two_loops_in_a_row(guard: Guard) -> None:
    """A guard works in a second event loop after its first was closed."""
    runs = []

    async def send(to: str) -> str:
        runs.append(to)
        return to

    guard.policy(send, replay=True)

    assert [asyncio.run(_one(guard, send, to)) for to in ("a", "a", "b")] == ["a", "a", "b"]
    assert runs == ["a", "b"]


async def _one(guard: Guard, tool: Callable[..., Any], *args: Any) -> Any:
    return await guard(tool, *args)


def test_an_async_failure_frees_the_call(guard: Guard) -> None:
    """An async tool that raised runs again; its exception arrives as it is."""
    runs = []

    async def send() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("declined")
        return "ok"

    with pytest.raises(ValueError, match="declined"):
        asyncio.run(_one(guard, send))

    assert asyncio.run(_one(guard, send)) == "ok"
    assert statuses(guard) == ["failed", "success"]


def test_async_replay_gives_up_after_wait(guard: Guard) -> None:
    """An async duplicate with replay raises InProgress when the run takes longer than wait."""

    async def send() -> None:
        await asyncio.sleep(30)

    guard.policy(send, replay=True, wait=0.1)

    async def main() -> None:
        first = asyncio.create_task(_one(guard, send))
        await asyncio.sleep(0.3)
        with pytest.raises(InProgress, match="is still running"):
            await guard(send)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first

    asyncio.run(main())


def test_async_recursion_is_answered_at_once(guard: Guard) -> None:
    """An async tool with replay that awaits itself gets InProgress instead of waiting for ever."""

    async def send() -> str:
        with pytest.raises(InProgress, match="part of"):
            await guard(send)
        return "outer"

    guard.policy(send, replay=True)

    assert asyncio.run(_one(guard, send)) == "outer"


def test_a_cancelled_tool_is_in_doubt_at_once(guard: Guard) -> None:
    """Cancelling the await of an async tool closes its run in doubt; the next call runs."""
    entered = []

    async def send() -> str:
        entered.append(1)
        if len(entered) == 1:
            await asyncio.sleep(30)
        return "ok"

    async def main() -> list[str]:
        task = asyncio.create_task(_one(guard, send))
        await until(lambda: bool(entered))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return statuses(guard)

    assert asyncio.run(main()) == ["doubt"]
    assert asyncio.run(_one(guard, send)) == "ok"


def test_a_timeout_around_the_guard_is_a_timeout(guard: Guard) -> None:
    """asyncio.timeout around a guarded call still raises TimeoutError, and the run is in doubt."""

    async def send() -> None:
        await asyncio.sleep(30)

    async def main() -> None:
        async with asyncio.timeout(0.3):
            await guard(send)

    with pytest.raises(TimeoutError):
        asyncio.run(main())

    assert statuses(guard) == ["doubt"]


def test_a_claim_that_is_cancelled_leaves_nothing_running(on_disk: Guard, tmp_path: Path) -> None:
    """Cancelled while its claim waits for the lock, a call never runs and is free afterwards."""
    runs = []

    async def send() -> str:
        runs.append(1)
        return "ok"

    async def main() -> list[int]:
        with write_lock(tmp_path / "ledger.db"):
            task = asyncio.create_task(_one(on_disk, send))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), 5)
        await asyncio.sleep(0.3)
        return list(runs)

    assert asyncio.run(main()) == []
    assert "running" not in settled(on_disk, [])
    assert asyncio.run(_one(on_disk, send)) == "ok"


class SlowStore(Store):
    """A user's store of six methods, slow to claim."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.seconds = 0.0

    def get(self, id: str) -> Record | None:
        return self.records.get(id)

    def claim(self, record: Record) -> bool:
        time.sleep(self.seconds)
        return self.records.setdefault(record.id, record) is record

    def put(self, record: Record) -> None:
        self.records[record.id] = record

    def delete(self, id: str) -> None:
        self.records.pop(id, None)

    def all(self, wf: str | None = None) -> list[Record]:
        return [r for r in self.records.values() if wf in (None, r.wf)]

    def clear(self, wf: str | None = None) -> None:
        self.records = {k: r for k, r in self.records.items() if wf not in (None, r.wf)}


def test_a_cancelled_claim_in_a_users_store_is_given_back() -> None:
    """A claim that is granted after its caller was cancelled is closed as not entered, and is free."""
    store, runs = SlowStore(), []
    guard = Guard(store=store, quiet=True)

    async def send() -> str:
        runs.append(1)
        return "ok"

    async def main() -> None:
        store.seconds = 0.3
        task = asyncio.create_task(_one(guard, send))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.seconds = 0.0

    asyncio.run(main())

    assert settled(guard, ["failed"]) == ["failed"]
    assert (asyncio.run(_one(guard, send)), runs) == ("ok", [1])


def test_a_settle_that_is_cancelled_is_still_written(on_disk: Guard, tmp_path: Path) -> None:
    """Cancelled while its outcome waits for the lock, a call that succeeded is recorded as success."""
    done = []

    async def main() -> None:
        lock = write_lock(tmp_path / "ledger.db")

        async def send() -> str:
            lock.__enter__()
            done.append(1)
            return "ok"

        task = asyncio.create_task(_one(on_disk, send))
        await until(lambda: bool(done))
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 5)
        lock.__exit__(None, None, None)

    asyncio.run(main())

    assert settled(on_disk, ["success"]) == ["success"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_async_tool_is_in_doubt_at_once(guard: Guard, kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit out of an async tool end the loop, and the run is in doubt."""

    async def send() -> None:
        await asyncio.sleep(0)
        raise kind

    with pytest.raises(kind):
        asyncio.run(_one(guard, send))

    assert settled(guard, ["doubt"]) == ["doubt"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_sync_tool_is_in_doubt_at_once(guard: Guard, kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit out of a sync tool pass through, and the run is in doubt."""

    def send() -> None:
        raise kind

    with pytest.raises(kind):
        guard(send)

    assert statuses(guard) == ["doubt"]


def test_ctrl_c_in_a_loop_closes_the_run(guard: Guard) -> None:
    """A SIGINT while an async tool waits ends asyncio.run, and the run is in doubt."""

    async def send() -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(_one(guard, send))

    assert settled(guard, ["doubt"]) == ["doubt"]


def test_a_cancelled_thread_stays_running_until_it_ended(guard: Guard) -> None:
    """A cancelled await of asyncio.to_thread leaves the run RUNNING, for its thread still works."""
    entered, leave = threading.Event(), threading.Event()

    def send() -> str:
        entered.set()
        assert leave.wait(30)
        return "ok"

    async def main() -> list[str]:
        task = asyncio.create_task(asyncio.to_thread(guard, send))
        await until(entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = statuses(guard)
        leave.set()
        return found

    assert asyncio.run(main()) == ["running"]
    assert settled(guard, ["success"]) == ["success"]


def test_a_loop_that_is_dropped_leaves_the_run_in_doubt(guard: Guard) -> None:
    """A task that dies with its closed loop, without being cancelled, is closed in doubt."""
    entered = []

    async def send() -> None:
        entered.append(1)
        await asyncio.sleep(30)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)
    task = loop.create_task(_one(guard, send))

    loop.run_until_complete(until(lambda: bool(entered)))
    loop.close()
    del task, loop
    gc.collect()

    assert settled(guard, ["doubt"]) == ["doubt"]


def test_a_coroutine_that_is_closed_leaves_the_run_in_doubt(guard: Guard) -> None:
    """close() on the coroutine while its tool waits closes the run in doubt and raises nothing."""
    entered = []

    async def send() -> None:
        entered.append(1)
        await asyncio.Event().wait()

    class Passing:
        """Drives a coroutine by hand until its tool was entered, and hands the loop what it awaits."""

        def __init__(self, coroutine: Any) -> None:
            self.coroutine = coroutine

        def __await__(self) -> Generator[Any, Any, None]:
            while True:
                awaited = self.coroutine.send(None)
                if entered:
                    return
                yield awaited

    async def main() -> None:
        coroutine = _one(guard, send)
        await Passing(coroutine)
        coroutine.close()

    asyncio.run(main())

    assert settled(guard, ["doubt"]) == ["doubt"]


def test_the_loop_runs_on_while_another_process_holds_the_lock(on_disk: Guard, tmp_path: Path) -> None:
    """While another process holds the write lock for a second, a first call waits and the loop does not."""
    runs = []

    async def send() -> str:
        runs.append(1)
        return "ok"

    async def main() -> tuple[float, float, str]:
        began = last = time.monotonic()
        worst = 0.0
        task = asyncio.create_task(_one(on_disk, send))
        while not task.done():
            await asyncio.sleep(0.005)
            worst, last = max(worst, time.monotonic() - last), time.monotonic()
        return last - began, worst, await task

    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK_HOLDER, str(tmp_path / "ledger.db"), "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        took, worst, value = asyncio.run(main())

    assert (value, runs) == ("ok", [1])
    assert took > 0.5
    assert worst < 0.25


def test_a_duplicate_does_not_wait_for_the_write_lock(on_disk: Guard, tmp_path: Path) -> None:
    """A duplicate is answered while somebody else holds the write lock."""

    async def send() -> str:
        return "ok"

    on_disk.policy(send, replay=True)
    asyncio.run(_one(on_disk, send))

    async def main() -> str:
        with write_lock(tmp_path / "ledger.db"):
            async with asyncio.timeout(5):
                return await on_disk(send)

    assert asyncio.run(main()) == "ok"


def test_every_kind_of_async_callable(guard: Guard) -> None:
    """Methods, partials, callable objects, static and class methods are awaited and run once each."""
    runs = []

    class Mailer:
        def __ledger_key__(self) -> str:
            return "mailer"

        async def send(self, to: str) -> str:
            runs.append(f"method {to}")
            return to

        @classmethod
        async def of_class(cls, to: str) -> str:
            runs.append(f"class {to}")
            return to

        @staticmethod
        async def static(to: str) -> str:
            runs.append(f"static {to}")
            return to

        async def __call__(self, to: str) -> str:
            runs.append(f"object {to}")
            return to

    async def two(how: str, to: str) -> str:
        runs.append(f"{how} {to}")
        return to

    mailer = Mailer()
    tools: list[Callable[[str], Awaitable[str]]] = [
        mailer.send,
        Mailer.of_class,
        Mailer.static,
        mailer,
        functools.partial(two, "partial"),
    ]

    async def main() -> list[str | None]:
        return [await guard(t, "a") for t in tools * 2]

    assert asyncio.run(main()) == ["a"] * 5 + [None] * 5
    assert runs == ["method a", "class a", "static a", "object a", "partial a"]


def test_a_decorated_async_tool_stays_a_coroutine_function(guard: Guard) -> None:
    """@guard.once and wrap_tools keep coroutine-ness, also of objects and partials."""

    class Mailer:
        async def __call__(self) -> str:
            return "object"

    async def send() -> str:
        return "function"

    wrapped: list[Any] = guard.wrap_tools([send, Mailer(), functools.partial(send)])

    assert all(asyncio.iscoroutinefunction(w) for w in wrapped)
    assert asyncio.run(wrapped[0]()) == "function"


def test_an_async_generator_is_refused(guard: Guard) -> None:
    """An async generator has no single result, so it is refused before anything runs."""

    async def pages() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(ledger.UsageError, match="generator"):
        guard(pages)


def test_a_sync_function_that_gives_a_coroutine_is_refused(guard: Guard) -> None:
    """A lambda around an async function is refused: nothing would have run, yet it would be recorded."""

    async def send(to: str) -> str:
        return to

    def hands_on(to: str) -> object:
        return send(to)

    with pytest.raises(ledger.NotPerformed, match="guard the async function itself"):
        guard(hands_on, "a")


@pytest.mark.parametrize("as_async", [True, False])
def test_reconcile_may_be_async(guard: Guard, as_async: bool) -> None:
    """For an async tool the reconcile function may be async too, and its result is the call's."""
    runs, asked = [], []

    async def send() -> str:
        runs.append(1)
        await asyncio.sleep(30)
        return "ok"

    def reconcile(record: Record) -> str:
        asked.append(record)
        return "found"

    async def reconcile_async(record: Record) -> str:
        await asyncio.sleep(0)
        return reconcile(record)

    guard.policy(send, replay=True, on_doubt=reconcile_async if as_async else reconcile)
    _cancelled(guard, send, runs)

    assert asyncio.run(_one(guard, send)) == "found"
    assert asyncio.run(_one(guard, send)) == "found"
    assert (len(runs), len(asked), asked[0].in_doubt) == (1, 1, True)


def test_an_async_reconcile_that_says_not_done_runs_the_tool(guard: Guard) -> None:
    """NOT_DONE from an async reconcile function makes the next run."""
    runs: list[int] = []

    async def send() -> str:
        runs.append(1)
        if len(runs) == 1:
            await asyncio.sleep(30)
        return "ok"

    async def reconcile(record: Record) -> Any:
        return NOT_DONE

    guard.policy(send, on_doubt=reconcile)
    _cancelled(guard, send, runs)

    assert asyncio.run(_one(guard, send)) == "ok"


def test_an_async_reconcile_that_raises_leaves_the_doubt(guard: Guard) -> None:
    """A reconcile function that fails is told as InDoubt, with its error as the cause."""
    runs: list[int] = []

    async def send() -> None:
        runs.append(1)
        await asyncio.sleep(30)

    async def reconcile(record: Record) -> Any:
        raise ConnectionError("no answer")

    guard.policy(send, on_doubt=reconcile)
    _cancelled(guard, send, runs)

    with pytest.raises(InDoubt, match="no answer") as caught:
        asyncio.run(_one(guard, send))

    assert isinstance(caught.value.__cause__, ConnectionError)
    assert statuses(guard) == ["doubt"]


def _cancelled(guard: Guard, tool: Callable[..., Any], runs: list[int]) -> None:
    """Leave one call in doubt."""

    async def main() -> None:
        task = asyncio.create_task(_one(guard, tool))
        await until(lambda: bool(runs))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert settled(guard, ["doubt"]) == ["doubt"]


def test_the_ways_out_are_plain_functions_beside_a_loop(guard: Guard) -> None:
    """retry, stats and history work without await in async code; force of an async tool is awaited."""
    runs = []

    async def send() -> int:
        runs.append(1)
        return len(runs)

    async def main() -> tuple[int, int, int]:
        await guard(send)
        guard.retry(send)
        second = await guard(send)
        third = await guard.force(send)
        return second, third, guard.stats()["executed"]

    assert asyncio.run(main()) == (2, 3, 3)


def test_current_is_the_tasks_own(guard: Guard) -> None:
    """Inside concurrent tools each sees its own current run, outside there is none."""

    async def send(n: int) -> str:
        before = ledger.idempotency_key()
        await asyncio.sleep(0.02)
        assert before == ledger.idempotency_key()
        return before

    async def main() -> set[str]:
        keys = await asyncio.gather(*(guard(send, n) for n in range(20)))
        assert ledger.current() is None
        return set(keys)

    assert len(asyncio.run(main())) == 20


def test_guard_call_never_blocks_the_loop(tmp_path: Path) -> None:
    """While another process holds the write lock, the loop goes on, also for guard.call."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)
    guard(str, 0)

    async def send(order: int) -> int:
        return order

    async def tick(gaps: list[float]) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - before)

    async def scene() -> tuple[Any, float]:
        gaps: list[float] = []
        ticker = asyncio.create_task(tick(gaps))
        with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(1.0, holder.execute, "ROLLBACK")
            outcome = await guard.call(send, 1)
        ticker.cancel()
        return outcome.value, max(gaps)

    value, gap = asyncio.run(scene())

    assert 1 == value
    assert gap < 0.5  # of the second that the lock was held
    guard.close()
