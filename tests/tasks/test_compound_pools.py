"""Compounds in pools of processes, in several runners, and in runners that are closed or lose their pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, Store, StoreError
from ledger_tasks import CompoundRunner, PoolClosed, TaskLedger, TaskState, compound_view, given_up
from ledger_tasks.book import TaskStore
from ledger_tasks.stores import open_tasks
from ledger_tasks.testing import faults
from tests.actors import PATIENCE, Stage, eventually
from tests.tasks.compound_kit import Gates, answers, of_index, opened, plan, step


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in a file."""
    with opened(tmp_path) as found:
        yield found


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


def pid_of(subtask: dict[str, Any]) -> str:
    """Does a subtask, and says where."""
    return str(os.getpid())


class Odd(Exception):
    """An error that is pickled well, and cannot be read back."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def goes_wrong(subtask: dict[str, Any]) -> Any:
    """Fails in every way that is hard to send."""
    if subtask["index"] == 0:
        raise Odd("this", "that")
    return {"result": threading.Lock()} if subtask["index"] == 1 else answers(subtask)


def dies(subtask: dict[str, Any]) -> str:
    """Takes its process along."""
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def pay_in(db: str) -> Callable[[str], str]:
    """A guarded tool that notes each time that it ran."""

    def pay(order: str) -> str:
        with Path(f"{db}.paid").open("a") as file:
            file.write(f"{order}\n")
        return f"paid {order}"

    return Guard(db, quiet=True).once(pay)


class Pays:
    """Pays in a guarded call; can be pickled."""

    def __init__(self, db: str) -> None:
        self.db = db

    def __call__(self, subtask: dict[str, Any]) -> str:
        return pay_in(self.db)(subtask["description"])


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_subtasks_run_in_other_processes(tasks: TaskLedger, processes: ProcessPoolExecutor) -> None:
    """Of a pool that stays open when the runner is closed."""
    with CompoundRunner(tasks, plan(step(0), step(1, 0)), pid_of, processes) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert str(os.getpid()) not in of_index(found, "result")
    assert 7 == processes.submit(int, "7").result()


def test_an_error_that_no_process_can_send_is_told_in_words(
    tasks: TaskLedger, processes: ProcessPoolExecutor
) -> None:
    """And the pool goes on."""
    with CompoundRunner(tasks, plan(*map(step, range(3))), goes_wrong, processes) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    first, second, third = of_index(found, "result")
    assert "Odd: this and that" == first
    assert "cannot be kept as JSON" in second
    assert "did 2" == third


def test_what_cannot_be_sent_to_a_process_fails(tasks: TaskLedger, processes: ProcessPoolExecutor) -> None:
    """With the reason of the pool."""
    with CompoundRunner(tasks, plan(step(0)), lambda _: "x", processes) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert "pickle" in of_index(found, "result")[0]


def test_a_guarded_call_in_another_process_replays(
    tasks: TaskLedger, processes: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """A subtask that runs again in a pool gets the results that it got first."""
    db = str(tmp_path / "ledger.db")
    with CompoundRunner(tasks, plan(step(0)), Pays(db), processes, start=False) as runner:
        made = runner.submit("p")
    claim = tasks.claim_next(types=["compound-subtask"], capabilities=["compound"], start=True)
    assert claim is not None
    with multiprocessing.get_context("spawn").Pool(1) as one:  # as a runner that dies before it says so
        one.apply(run_in, (Pays(db), {"description": "step 0"}, claim.task.workflow))
    tasks.release(claim)

    with CompoundRunner(tasks, None, Pays(db), processes) as runner:
        found = runner.wait(made["id"], PATIENCE)

    assert ["paid step 0"] == of_index(found, "result")
    assert ["step 0"] == Path(f"{db}.paid").read_text().splitlines()


def run_in(execute: Callable[[dict[str, Any]], Any], subtask: dict[str, Any], workflow: str) -> None:
    """Execute it as a runner does, and say nothing."""
    from ledger import replaying

    with replaying(workflow):
        execute(subtask)


def test_a_runner_whose_pool_broke_begins_nothing_more(tasks: TaskLedger, tmp_path: Path) -> None:
    """`wait` says so, and a new runner goes on with what the broken pool had, once its lease lapsed."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pool, CompoundRunner(tasks, plan(step(0), step(1)), dies, pool, lease=0.5) as runner:
        made = runner.submit("p")
        with pytest.raises(PoolClosed, match="Make a new runner with a new pool"):
            runner.wait(made["id"], PATIENCE)

    with CompoundRunner(tasks, None, answers) as successor:
        found = successor.wait(made["id"], PATIENCE)

    assert "completed" == found["status"]
    assert [] == faults(tasks)


def test_a_subtask_that_kills_every_pool_ends(tasks: TaskLedger) -> None:
    """It is forgiven three times, as every death; then it has failed."""
    with CompoundRunner(tasks, plan(step(0)), dies, start=False) as runner:
        made = runner.submit("p")
    for _ in range(4):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with pool, CompoundRunner(tasks, None, dies, pool, lease=0.2) as runner, pytest.raises(PoolClosed):
            runner.wait(made["id"], PATIENCE)

    with CompoundRunner(tasks, None, answers) as runner:
        found = runner.wait(made["id"], PATIENCE)

    assert ("failed", ["failed"]) == (found["status"], of_index(found, "status"))
    assert "retries are used up" in of_index(found, "result")[0]


def test_a_pool_that_was_shut_down_has_done_nothing(tasks: TaskLedger) -> None:
    """What it refused is given back and has not failed."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with CompoundRunner(tasks, plan(step(0)), answers, pool) as runner:
        made = runner.submit("p")
        with pytest.raises(PoolClosed):
            runner.wait(made["id"], PATIENCE)

    assert ["queued"] == of_index(compound_view.progress(tasks, made["id"]), "status")


class Forgetful(Executor):
    """Drops the first call that it is given, as a cluster does that is started anew."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._has_dropped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._has_dropped:
            return self._threads.submit(fn, *args, **kwargs)
        self._has_dropped = True
        dropped: Future[Any] = Future()
        dropped.cancel()
        dropped.set_running_or_notify_cancel()
        return dropped


def test_what_a_pool_dropped_is_tried_again(tasks: TaskLedger) -> None:
    """It has not failed by that."""
    with CompoundRunner(tasks, plan(step(0)), answers, Forgetful()) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ["did 0"] == of_index(found, "result")


# ── several runners, one after the other or at once ───────────────────────────────────────────────


def test_a_closed_runner_waits_for_what_runs(tasks: TaskLedger) -> None:
    """And begins nothing more; the next runner goes on by itself, and does nothing twice."""
    gates = Gates()
    runner = CompoundRunner(tasks, plan(step(0), step(1, 0), step(2)), gates, parallel=1)
    made = runner.submit("p")
    gates.wait_for(0)
    closing = threading.Thread(target=runner.close)
    closing.start()
    gates.open(0, 1, 2)
    closing.join(PATIENCE)
    between = of_index(runner.progress(made["id"]), "status")

    with CompoundRunner(tasks, None, gates) as successor:
        found = successor.wait(made["id"], PATIENCE)

    assert ["completed", "queued", "queued"] == between
    assert "completed" == found["status"]
    assert {0: 1, 1: 1, 2: 1} == gates.begun


def test_what_runs_too_long_is_given_back_by_a_runner_that_is_closed(tasks: TaskLedger) -> None:
    """It can be done again at once, no retry is counted, and the thread is told that nobody waits for it."""
    began, ended = threading.Event(), threading.Event()

    def execute(_: dict[str, Any]) -> str:
        began.set()
        eventually(given_up)
        ended.set()
        return "too late"

    runner = CompoundRunner(tasks, plan(step(0)), execute)
    made = runner.submit("p")
    assert began.wait(PATIENCE)
    runner.close(timeout=0)
    (part,) = compound_view.parts_of(tasks, made["id"])

    assert ended.wait(PATIENCE)
    assert (TaskState.PENDING, 0) == (part.state, part.retries)
    with CompoundRunner(tasks, None, answers) as successor:
        assert ["did 0"] == of_index(successor.wait(made["id"], PATIENCE), "result")


def test_an_error_in_the_block_of_a_runner_does_not_wait(tasks: TaskLedger) -> None:
    """What runs is given back at once."""
    gates = Gates()
    runner = CompoundRunner(tasks, plan(step(0)), gates)
    runner.submit("p")
    gates.wait_for(0)
    with pytest.raises(ZeroDivisionError), runner:
        raise ZeroDivisionError
    gates.open(0)

    assert {TaskState.PENDING: 2} == tasks.counts()


def test_a_thread_that_is_too_late_makes_no_guarded_call(tasks: TaskLedger, tmp_path: Path) -> None:
    """It was declared failed, and whoever reads that may have acted on it."""
    pay = pay_in(str(tmp_path / "ledger.db"))
    errors: list[BaseException] = []
    tried = threading.Event()

    def execute(_: dict[str, Any]) -> str:
        eventually(given_up)
        try:
            return pay("A-1")
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            tried.set()

    with CompoundRunner(tasks, plan(step(0, timeout=0.05)), execute) as runner:
        runner.wait(runner.submit("p")["id"], PATIENCE)
        assert tried.wait(PATIENCE)

    assert ["NotHolder"] == [type(error).__name__ for error in errors]
    assert not Path(f"{tmp_path / 'ledger.db'}.paid").exists()


RUNNER = """
from ledger_tasks import CompoundRunner, TaskLedger
def execute(subtask):
    effect("ran", subtask["index"], os.getpid())
    while len({line.split()[2] for line in open(DB + ".effects")}) < 2:
        time.sleep(0.01)  # until the other has one too
    return str(os.getpid())
with CompoundRunner(TaskLedger(DB, quiet=True), None, execute, parallel=1) as runner:
    say("ready")
    hear()
"""


def test_runners_of_several_processes_share_the_work(tasks: TaskLedger, tmp_path: Path) -> None:
    """Each subtask is executed once, by one of them, and what one ends the others go on with."""
    steps = [step(n, *([n - 2] if n > 1 else [])) for n in range(40)]
    with Stage(tmp_path) as stage:
        crowd = stage.crowd(2, RUNNER)
        with CompoundRunner(tasks, plan(*steps), answers, start=False) as planned:
            found = planned.wait(planned.submit("p")["id"], PATIENCE)
        for actor in crowd:
            actor.tell("enough")
            actor.ends_well()
        ran = [line.split()[1] for line in stage.effects()]

    assert "completed" == found["status"]
    assert sorted(map(str, range(40))) == sorted(ran)
    assert {str(actor.pid) for actor in crowd} == set(of_index(found, "result"))
    assert [] == faults(tasks)


def test_a_cancelled_subtask_is_given_up_in_other_processes_too(tasks: TaskLedger, tmp_path: Path) -> None:
    """Its runner learns it when it renews the claim."""
    script = """
from ledger_tasks import CompoundRunner, TaskLedger, given_up
def execute(subtask):
    say("began")
    while not given_up():
        time.sleep(0.01)
    say("given up")
with CompoundRunner(TaskLedger(DB, quiet=True), None, execute, lease=0.5) as runner:
    hear()
"""
    with CompoundRunner(tasks, plan(step(0)), answers, start=False) as planned, Stage(tmp_path) as stage:
        made = planned.submit("p")
        actor = stage.start(script)
        assert "began" == actor.line()
        planned.cancel(made["id"])
        assert "given up" == actor.line()
        actor.tell("enough")
        actor.ends_well()


# ── a store that fails ────────────────────────────────────────────────────────────────────────────


class Failing(TaskStore):
    """A real store that cannot be written so many times from a moment on."""

    def __init__(self, folder: Path) -> None:
        self.behind = open_tasks(folder / "ledger.db", {"quiet": True})
        self.address = self.behind.address
        self.fails = 0
        self.refuses = False

    def read(self, session: str, look: Callable[[Any], Any]) -> Any:
        return self.behind.read(session, look)

    def write(self, session: str, work: Callable[[Any], Any], *, durable: bool = True) -> Any:
        if self.fails > 0:
            self.fails -= 1
            error = StoreError("the disk is not there")
            error.refused = self.refuses
            raise error
        return self.behind.write(session, work, durable=durable)

    def calls(self) -> Store:
        return self.behind.calls()

    def close(self) -> None:
        self.behind.close()


def test_an_outcome_is_recorded_when_the_store_is_back(tmp_path: Path) -> None:
    """What was executed is not executed again because its outcome could not be written at once."""
    store = Failing(tmp_path)
    ran = []

    def execute(subtask: dict[str, Any]) -> str:
        ran.append(subtask["index"])
        store.fails = 3
        return answers(subtask)

    with CompoundRunner(TaskLedger(store), plan(step(0)), execute, start=False) as planned:
        made = planned.submit("p")
    with CompoundRunner(TaskLedger(store), None, execute):
        found = when_it_ended(store, made["id"])
    store.close()

    assert ("completed", [0]) == (found["status"], ran)


def test_a_result_that_can_never_be_kept_is_a_failure(tmp_path: Path) -> None:
    """With the store's reason; it is not tried for ever."""
    store = Failing(tmp_path)

    def execute(subtask: dict[str, Any]) -> Any:
        store.fails, store.refuses = 1, True
        return {"result": answers(subtask), "cost": 0.5}

    with CompoundRunner(TaskLedger(store), plan(step(0)), execute, start=False) as planned:
        made = planned.submit("p")
    with CompoundRunner(TaskLedger(store), None, execute, parallel=1):
        found = when_it_ended(store, made["id"])
    store.close()

    assert ["its result cannot be kept: the disk is not there"] == of_index(found, "result")
    assert 0.5 == found["total_cost"]


def when_it_ended(store: Failing, compound: str) -> dict[str, Any]:
    """The full picture, looked at past the failures."""
    tasks = TaskLedger(store.behind)
    eventually(lambda: compound_view.progress(tasks, compound)["completed_at"] is not None)
    return compound_view.progress(tasks, compound)
