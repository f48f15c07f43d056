"""`Worker`: handlers of tasks, whose effects do not repeat."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, SqliteStore, UsageError
from ledger_stores.testing import FakeClock
from ledger_tasks import (
    AsyncTaskContext,
    Breaker,
    NotHolder,
    Task,
    TaskContext,
    TaskLedger,
    TaskState,
    Worker,
)
from ledger_tasks.model import WorkerInfo
from tests.actors import PATIENCE, Stage, eventually
from tests.stores.servers import fresh_namespace, postgres_url

_S = TaskState


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger of the test's own."""
    made = TaskLedger(tmp_path / "ledger.db", agent="test", quiet=True)
    yield made
    made.close()


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on the same file."""
    made = Guard(tmp_path / "ledger.db", quiet=True)
    yield made
    made.close()


def work(tasks: TaskLedger, handlers: Any, **options: Any) -> None:
    """Until nothing is left that could be begun."""
    Worker(tasks, handlers, **{"backoff": lambda _: 0.0, "poll": 0.05, **options}).run(until_idle=True)


def seen(event: threading.Event) -> None:
    """Wait for something that happens in another thread."""
    assert event.wait(PATIENCE)


def noted(done: list[int], step: int) -> None:
    """What a tool does to the world."""
    done.append(step)


# -- handlers --


def test_each_type_has_its_handler(tasks: TaskLedger) -> None:
    """A handler gets the task and a context; what it returns is the result. Other types are left alone."""
    tasks.add_tasks(
        [Task("m", type="mail", payload={"to": "Ann"}), Task("f", type="file"), Task("x", type="other")]
    )

    def mail(task: Task, context: TaskContext) -> str:
        context.progress(0.5, "writing", cost=0.25, tokens=7)
        context.checkpoint({"draft": 1})
        context.add_artifact("draft", "a.txt")
        return f"sent to {task.payload['to']}"

    async def file(task: Task, context: AsyncTaskContext) -> str:
        await context.progress(0.5, "filing")
        await context.checkpoint({"page": 2})
        await context.add_artifact("folder", task.id)
        return "filed"

    work(tasks, {"mail": mail, "file": file})

    m, f, x = (tasks.get(name) for name in "mfx")
    assert [(_S.DONE, "sent to Ann"), (_S.DONE, "filed"), (_S.PENDING, None)] == [
        (t.state, t.result) for t in (m, f, x)
    ]
    assert (0.25, 7, {"draft": 1}, ["a.txt"]) == (
        m.cost,
        m.tokens,
        m.checkpoint,
        [a["value"] for a in m.artifacts],
    )
    assert ("filing", {"page": 2}, ["folder"]) == (f.stage, f.checkpoint, [a["name"] for a in f.artifacts])


def test_one_function_takes_every_type(tasks: TaskLedger) -> None:
    """Instead of a dict; what becomes ready by its own work is taken too, in order."""
    order: list[str] = []
    tasks.add_tasks([Task("b", type="x", depends_on=("a",)), Task("a", type="y")])  # type: ignore[arg-type]

    work(tasks, lambda task, _: order.append(task.id))

    assert ["a", "b"] == order
    assert {_S.DONE: 2} == tasks.counts()


def test_coroutines_may_run_in_the_programs_loop(tasks: TaskLedger) -> None:
    """`run_async` runs them beside the program's own, all of them at once."""
    tasks.add_tasks([Task(f"t{n}") for n in range(3)])
    homes = []

    async def main() -> None:
        together = asyncio.Barrier(3)

        async def handler(_: Task, __: AsyncTaskContext) -> None:
            homes.append(asyncio.get_running_loop())
            await together.wait()

        await Worker(tasks, handler, concurrency=3, poll=0.05).run_async(until_idle=True)
        assert homes == [asyncio.get_running_loop()] * 3

    asyncio.run(main())

    assert {_S.DONE: 3} == tasks.counts()


def test_so_many_at_once_and_no_more(tasks: TaskLedger) -> None:
    """`concurrency` handlers run beside each other; the next begins when one has ended."""
    tasks.add_tasks([Task(f"t{n}") for n in range(9)])
    together, running, most = threading.Barrier(3), [0], [0]
    door = threading.Lock()

    def handler(_: Task, __: TaskContext) -> None:
        with door:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(PATIENCE)
        with door:
            running[0] -= 1

    work(tasks, handler, concurrency=3)

    assert ({_S.DONE: 9}, 3) == (tasks.counts(), most[0])


def test_it_is_given_what_it_can_do(tasks: TaskLedger) -> None:
    """A task that needs more than the worker's capabilities waits for another worker."""
    tasks.add_tasks([Task("plain"), Task("gpu", capabilities=("gpu",))])

    worker = Worker(tasks, lambda *_: None, poll=0.05)
    worker.start()
    eventually(lambda: tasks.get("plain").state == _S.DONE)
    worker.close()
    assert _S.PENDING == tasks.get("gpu").state

    work(tasks, lambda *_: None, capabilities=["gpu"])
    assert _S.DONE == tasks.get("gpu").state


def test_a_parent_goes_on_when_its_parts_are_done(tasks: TaskLedger) -> None:
    """A handler that adds parts returns; it runs again from its top when they are done, and sees them."""
    tasks.add_task("parent", type="plan")

    def plan(task: Task, context: TaskContext) -> Any:
        if task.id not in {t.parent for t in context.ledger.tasks()}:
            context.ledger.add_subtasks(task.id, [Task("one", type="part"), Task("two", type="part")])
            return None
        return sorted(t.result for t in context.ledger.tasks(parent=task.id))

    work(tasks, {"plan": plan, "part": lambda task, _: task.id})

    assert (_S.DONE, ["one", "two"]) == (tasks.get("parent").state, tasks.get("parent").result)


def test_a_result_that_cannot_be_kept_is_told(tasks: TaskLedger) -> None:
    """The task is done all the same, and says what its result was."""
    tasks.add_task("a")

    work(tasks, lambda *_: {1, 2})

    found = tasks.get("a")
    assert (_S.DONE, None) == (found.state, found.result)
    assert ("set", "{1, 2}") == (found.artifacts[0]["value"]["type"], found.artifacts[0]["value"]["repr"])


# -- failures --


def test_what_fails_is_tried_again_while_retries_are_left(tasks: TaskLedger) -> None:
    """Not before the pause that `backoff` says for the retry; then it is DEAD, with every error."""
    tasks.add_task("a", max_retries=2)
    asked: list[int] = []

    def fail(_: Task, __: TaskContext) -> None:
        raise ValueError("no luck")

    def pause(retries: int) -> float:
        asked.append(retries)
        return 0.0

    work(tasks, fail, backoff=pause)

    found = tasks.get("a")
    assert (_S.DEAD, 2, [0, 1, 2]) == (found.state, found.retries, asked)
    assert ["ValueError: no luck"] * 3 == [entry["error"] for entry in found.errors]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), ValueError("x"), asyncio.CancelledError()]
)
def test_a_handler_cannot_end_its_worker(tasks: TaskLedger, error: BaseException) -> None:
    """Whatever it raises ends its task, which without a retry limit stays FAILED; the next task runs."""
    tasks.add_tasks([Task("a", type="bad", priority=9), Task("b")])

    def bad(_: Task, __: TaskContext) -> None:
        raise error

    work(tasks, {"bad": bad, "task": lambda *_: "ok"}, concurrency=1)

    assert (_S.FAILED, _S.DONE) == (tasks.get("a").state, tasks.get("b").state)
    assert type(error).__name__ in tasks.get("a").reason


def test_a_call_in_doubt_blocks_its_task(tasks: TaskLedger, guard: Guard) -> None:
    """Nobody knows what it did: no retry is burnt, and a person decides; then it goes on with that answer."""
    tasks.add_task("a", max_retries=1)

    def pay(order: int) -> str:
        raise ConnectionError("the line went dead")

    tool = guard.once(irreversible=True)(pay)
    work(tasks, lambda *_: tool(7), breaker=None)  # the call fails and is in doubt
    work(tasks, lambda *_: tool(7))  # so the retry asks

    found = tasks.get("a")
    assert _S.BLOCKED == found.state
    assert "find out whether it took effect" in found.reason

    with guard.workflow(found.workflow):
        guard.resolve(tool, 7, result="paid")
    tasks.unblock("a")
    work(tasks, lambda *_: tool(7))
    assert (_S.DONE, "paid") == (tasks.get("a").state, tasks.get("a").result)


def test_a_call_that_runs_elsewhere_is_waited_for(tasks: TaskLedger, guard: Guard) -> None:
    """The task is given back for a while; that counts as no failure."""
    tasks.add_task("a")
    begun, may_end = threading.Event(), threading.Event()

    def slow(order: int) -> str:
        begun.set()
        assert may_end.wait(PATIENCE)
        return "slow"

    tool = guard.once(wait=0)(slow)
    scope = guard.workflow(tasks.get("a").workflow)
    thread = threading.Thread(target=scope, args=(tool, 1))
    thread.start()
    seen(begun)
    scope.__exit__()
    worker = Worker(tasks, lambda *_: tool(1), backoff=lambda _: 0.01, poll=0.02)
    worker.start()
    eventually(lambda: any(event.data.get("op") == "release" for event in tasks.events(task="a")))
    may_end.set()
    thread.join()
    eventually(lambda: tasks.get("a").state == _S.DONE)
    worker.close()

    assert ("slow", 0) == (tasks.get("a").result, tasks.get("a").retries)


# -- pace --


def test_a_rate_is_not_exceeded(tasks: TaskLedger) -> None:
    """In no span of that length more begin than the rate allows; other types are not held up."""
    tasks.add_tasks([Task(f"m{n}", type="mail", priority=9) for n in range(7)] + [Task("other")])

    work(tasks, {"mail": lambda *_: None, "task": lambda *_: None}, rate={"mail": "3/1s"}, concurrency=4)

    begun = sorted(task.started_at for task in tasks.tasks(type="mail") if task.started_at)
    gaps = [(later - early).total_seconds() for early, later in zip(begun, begun[3:], strict=False)]
    assert len(gaps) == 4
    # it is judged when a task is asked for, and noted when it is begun: a slow machine may be between the two
    assert min(gaps) > 0.5
    other = tasks.get("other").started_at
    assert other is not None
    assert other < begun[3]


def test_a_type_that_keeps_failing_is_paused(tasks: TaskLedger) -> None:
    """After so many failures in a row none begins for a while; then one is tried, and opens the way."""
    tasks.add_tasks([Task(f"t{n}") for n in range(8)])
    tried: list[float] = []

    def handler(_: Task, __: TaskContext) -> None:
        tried.append(time.monotonic())
        if len(tried) <= 4:  # three, a pause, and the one that is tried alone
            raise ConnectionError("down")

    worker = Worker(tasks, handler, concurrency=1, poll=0.02, breaker=Breaker(after=3, seconds=0.5))
    worker.start()
    eventually(lambda: tasks.counts().get(_S.DONE) == 4)
    worker.close()

    assert tried[3] - tried[2] >= 0.5
    assert tried[4] - tried[3] >= 0.5
    assert {_S.FAILED: 4, _S.DONE: 4} == tasks.counts()


# -- the end of a worker --


def test_it_ends_gracefully(tasks: TaskLedger) -> None:
    """It takes nothing more, and what is begun ends."""
    tasks.add_tasks([Task("a"), Task("b")])
    begun, may_end = threading.Event(), threading.Event()

    def handler(_: Task, __: TaskContext) -> str:
        begun.set()
        assert may_end.wait(PATIENCE)
        return "done"

    worker = Worker(tasks, handler, concurrency=1)
    worker.start()
    seen(begun)
    worker.stop()
    may_end.set()
    worker.close()

    assert [_S.DONE, _S.PENDING] == [tasks.get(name).state for name in "ab"]


@pytest.mark.parametrize("way", ["returns", "checks", "calls", "coroutine"])
def test_what_is_told_to_stop_is_given_back(tasks: TaskLedger, guard: Guard, way: str) -> None:
    """A handler that was told to stop has not done its task, however it ends; no retry is counted."""
    tasks.add_task("a")
    begun = threading.Event()
    tool = guard.once(lambda: None)

    def handler(_: Task, context: TaskContext) -> str:
        begun.set()
        while way != "returns" or not context.cancelled:
            if way == "checks":
                context.check()
            if way == "calls":
                tool()
            time.sleep(0.005)
        return "half"

    async def coroutine(_: Task, __: AsyncTaskContext) -> None:
        begun.set()
        await asyncio.Event().wait()

    worker = Worker(tasks, coroutine if way == "coroutine" else handler, grace=0)
    worker.start()
    seen(begun)
    worker.close()

    found = tasks.get("a")
    assert (_S.PENDING, 0, None) == (found.state, found.retries, found.result)
    assert "had to end" in found.reason


def test_sigterm_ends_the_process_gracefully(tmp_path: Path, tasks: TaskLedger) -> None:
    """What is begun is done, nothing else is begun, and the process ends without an error."""
    tasks.add_tasks([Task("a"), Task("b")])
    script = """
from ledger_tasks import TaskLedger, Worker
def handler(task, context):
    say(task.id)
    hear()
    return "done"
Worker(TaskLedger(DB, quiet=True), handler, concurrency=1).run()
say("over")
"""
    with Stage(tmp_path) as stage:
        actor = stage.start(script)
        assert actor.line() == "a"
        actor.send(signal.SIGTERM)
        eventually(lambda: not tasks.workers()[0].ended)
        actor.tell("go on")
        assert actor.line() == "over"
        actor.ends_well()

    assert [_S.DONE, _S.PENDING] == [tasks.get(name).state for name in "ab"]
    assert [(True, 1)] == [(worker.ended, worker.done) for worker in tasks.workers()]


# -- taken over --

CRASH = """
import json
from ledger_tasks import TaskLedger, Worker

url, options, dies = sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
own = Guard(url, quiet=True, **options)

@own.once
def charge(step):
    effect(step)
    return f"receipt {step}"

def handler(task, context):
    found = []
    for step in range(3):
        found.append(charge(step))
        say(step)
        if step == dies:
            os.kill(os.getpid(), signal.SIGKILL)
    return found

tasks = TaskLedger(url, lease=1, **options)
Worker(tasks, handler, concurrency=1, poll=0.05).run(until_idle=True)
"""


def sqlite(folder: Path) -> tuple[str, dict[str, Any]]:
    """A file, and how it is opened."""
    return str(folder / "ledger.db"), {}


def postgres(_: Path) -> tuple[str, dict[str, Any]]:
    """A namespace of its own on a real server."""
    return postgres_url(), {"namespace": fresh_namespace()}


@pytest.mark.parametrize("where", [sqlite, postgres])
def test_a_crashed_task_goes_on_where_it_was(
    tmp_path: Path, where: Callable[[Path], tuple[str, dict[str, Any]]]
) -> None:
    """Killed after the second of three effects; the next worker does the third and gets all three results."""
    url, options = where(tmp_path)
    tasks = TaskLedger(url, agent="test", quiet=True, **options)
    tasks.add_task("a")
    with Stage(tmp_path) as stage:
        first = stage.start(CRASH, url, json.dumps(options), 1)
        assert [first.line(), first.line()] == ["0", "1"]
        assert first.ends() == -signal.SIGKILL
        second = stage.start(CRASH, url, json.dumps(options), -1)
        eventually(lambda: tasks.get("a").state == _S.DONE)
        second.ends_well()

        assert stage.effects() == ["0", "1", "2"]
    assert ["receipt 0", "receipt 1", "receipt 2"] == tasks.get("a").result
    tasks.close()


def test_a_cancelled_task_stops_at_its_next_call(tasks: TaskLedger, guard: Guard) -> None:
    """The handler's next guarded call raises `NotHolder` and nothing runs; what it says is refused."""
    tasks.add_task("a")
    done: list[int] = []
    cancelled = threading.Event()
    errors: list[NotHolder] = []
    tool = guard.once(lambda step: noted(done, step))

    def handler(_: Task, context: TaskContext) -> None:
        tool(1)
        begun.set()
        seen(cancelled)
        eventually(lambda: context.cancelled)
        try:
            tool(2)
        except NotHolder as error:
            errors.append(error)
            raise

    begun = threading.Event()
    with Worker(tasks, handler, lease=0.3):
        seen(begun)
        tasks.cancel("a", "not wanted")
        cancelled.set()
        eventually(lambda: errors != [])

    assert ([1], _S.CANCELLED) == (done, tasks.get("a").state)
    assert "nothing more ran" in str(errors[0])


def test_a_paused_worker_loses_its_task(tmp_path: Path, tasks: TaskLedger) -> None:
    """Silent past its lease it comes back to what another has: it stops, and its late result is refused."""
    script = """
from ledger_tasks import TaskLedger, Worker
@guard.once
def charge(step):
    effect(os.getpid(), step)
def handler(task, context):
    charge(1)
    say("charged")
    while not context.is_lost:
        time.sleep(0.01)
    try:
        charge(2)
    except Exception as error:
        say(type(error).__name__)
    return "late"
worker = Worker(TaskLedger(DB, lease=0.6, quiet=True), handler, concurrency=1)
worker.start()
hear()
worker.close()
"""
    tasks.add_task("a")
    with Stage(tmp_path) as stage:
        actor = stage.start(script)
        assert actor.line() == "charged"
        actor.freeze()
        guard = Guard(tmp_path / "ledger.db", quiet=True)
        finish = Worker(tasks, lambda *_: "in time", poll=0.05)
        finish.start()
        eventually(lambda: tasks.get("a").state == _S.DONE)
        finish.close()
        actor.thaw()
        assert actor.line() == "NotHolder"
        actor.tell("end")
        actor.ends_well()
        assert stage.effects() == [f"{actor.pid} 1"]
        guard.close()

    assert "in time" == tasks.get("a").result


def test_a_fresh_retry_does_everything_again(tasks: TaskLedger, guard: Guard) -> None:
    """A usual retry gets the results of the run that failed; a fresh one begins a new scope."""
    tasks.add_task("a")
    done: list[int] = []
    is_broken = [True]
    tool = guard.once(lambda step: noted(done, step))

    def handler(_: Task, __: TaskContext) -> None:
        tool(1)
        if is_broken[0]:
            raise ValueError("after the effect")

    work(tasks, handler)
    tasks.retry("a", "try again")
    work(tasks, handler)
    assert [1] == done

    is_broken[0] = False
    tasks.retry("a", "all of it", fresh=True)
    work(tasks, handler)

    assert ([1, 1], _S.DONE) == (done, tasks.get("a").state)


def test_its_own_guard_is_where_the_tasks_are(tasks: TaskLedger, guard: Guard) -> None:
    """`context.guard` needs no configuration, and its calls are in the task's workflow."""
    tasks.add_task("a")

    work(tasks, lambda _, context: context.guard(pow, 2, 5))

    assert 32 == tasks.get("a").result
    assert [tasks.get("a").workflow] == [record["wf"] for record in guard.history()]


# -- being seen --


def test_workers_are_seen(tmp_path: Path) -> None:
    """Who they are, what they are doing and how it went; one that is silent is taken for dead."""
    clock = FakeClock()
    tasks = TaskLedger(SqliteStore(tmp_path / "ledger.db", clock=clock), agent="host")
    tasks.add_tasks([Task("a"), Task("b", type="bad", priority=9)])
    begun, may_end = threading.Event(), threading.Event()

    def good(_: Task, __: TaskContext) -> None:
        begun.set()
        seen(may_end)

    def bad(_: Task, __: TaskContext) -> None:
        raise ValueError("x")

    worker = Worker(tasks, {"task": good, "bad": bad}, agent="w", concurrency=1)
    worker.start()
    seen(begun)
    (info,) = tasks.workers()
    assert (True, ("a",), ("task", "bad"), 1) == (info.alive, info.doing, info.types, info.concurrency)

    clock.advance(3 * WorkerInfo.EVERY + 1)
    assert not tasks.workers()[0].alive
    may_end.set()
    worker.close()
    (info,) = tasks.workers()
    assert (False, True, (), 1, 1, 0.5) == (
        info.alive, info.ended, info.doing, info.done, info.failed, info.success_rate
    )  # fmt: skip

    clock.advance(8 * 86400)
    other = Worker(tasks, {"task": good}, agent="other")
    other.start()
    assert ["other"] == [info.agent for info in tasks.workers()]
    other.close()
    tasks.close()


# -- what it cannot work with --


@pytest.mark.parametrize(
    ("handlers", "options", "says"),
    [
        ({}, {}, "the handlers are"),
        ({"a": 3}, {}, "handler of 'a'"),
        ({"*": print}, {}, "one function instead"),
        (print, {"concurrency": 0}, "concurrency=0"),
        ({"a": print}, {"rate": {"b": "1/s"}}, "rate names b"),
        ({"a": print}, {"rate": {"a": "often"}}, "the rate 'often'"),
        ({"a": print}, {"rate": {"a": "0/s"}}, "the rate '0/s'"),
    ],
)
def test_what_it_cannot_work_with_is_refused(
    tasks: TaskLedger, handlers: Any, options: dict[str, Any], says: str
) -> None:
    """A clear error before anything is claimed."""
    tasks.add_task("a")

    with pytest.raises(UsageError, match=says.replace("*", r"\*")):
        Worker(tasks, handlers, **options)

    assert _S.PENDING == tasks.get("a").state


@pytest.mark.parametrize(
    "options", [{"after": 0}, {"after": True}, {"seconds": 0}, {"seconds": float("inf")}]
)
def test_a_breaker_needs_numbers(options: dict[str, Any]) -> None:
    """How many failures, and for how long."""
    with pytest.raises(UsageError, match="Breaker"):
        Breaker(**options)
