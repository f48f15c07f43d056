"""Chaos: workers that share a thousand tasks with dependencies, and kill -9 at any moment."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ledger_tasks import Dep, Task, TaskLedger, TaskState
from ledger_tasks.testing import faults
from tests.actors import PATIENCE, Actor, Stage

TASKS: Final = 1000
WORKERS: Final = 6
KILLS: Final = 50
LEASE: Final = 1.5

# A worker notes what it does with which claim in a file that is only appended to, with a time at which the
# ledger had not heard of it yet: from then on nobody else may have the task for the length of a lease.
WORKER: Final = f"""
import json, random
from ledger_tasks import InvalidTransition, NotHolder, TaskLedger

tasks = TaskLedger(sys.argv[3], agent=f"worker {{os.getpid()}}", lease={LEASE}, **json.loads(sys.argv[4]))
dice = random.Random(int(sys.argv[2]))

def tell(word, claim, at):
    effect(word, claim.id, claim.token, claim.task.version, os.getpid(), at)

def work(claim):
    began = time.monotonic()
    tasks.start(claim)
    tell("begin", claim, began)
    time.sleep(dice.expovariate(100))
    if dice.random() < 0.3:
        tasks.progress(claim, dice.random(), "half")
    seen = time.monotonic()
    if tasks.heartbeat(claim):
        tell("alive", claim, seen)
    time.sleep(dice.expovariate(200))
    tell("end", claim, time.monotonic())
    if dice.random() < 0.1:
        tasks.fail(claim, "bad luck", retry_in=0)
    else:
        tasks.complete(claim, claim.token)

def is_over():
    return not any(tasks.counts().get(state) for state in ("pending", "assigned", "active"))

while not is_over():
    before = time.monotonic()
    claim = tasks.claim_next()
    if claim is None:
        time.sleep(0.05)  # what is left is somebody's, or waits for that, until a lease lapses
        continue
    effect("claim", claim.id, claim.token, claim.task.version, os.getpid(), before, time.monotonic())
    try:
        work(claim)
    except (NotHolder, InvalidTransition):
        tell("lost", claim, time.monotonic())
tasks.close()
"""


def a_thousand() -> list[Task]:
    """Tasks in layers of fifty: each waits for some of the layer before, in every way that there is."""
    dice = random.Random(20_240_229)
    made = []
    for number in range(TASKS):
        before = range(max(0, number - number % 50 - 50), number - number % 50)
        on = dice.sample(before, min(len(before), dice.randrange(4)))
        deps = tuple(Dep(f"t{one}", dice.choice(("run", "run", "run", "skip", "fail"))) for one in on)
        made.append(
            Task(
                f"t{number}",
                depends_on=deps,
                priority=dice.randint(1, 10),
                max_retries=dice.choice((1, 3, 9)),
            )
        )
    return made


def note(stage: Stage, text: str) -> None:
    """Add a line to the effects: what stands before it happened before now."""
    with Path(f"{stage.db}.effects").open("ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def let_loose(stage: Stage, *where: str) -> int:
    """Workers until nothing is left to do; so many are killed at random moments and replaced."""
    dice = random.Random(20_240_229)
    workers = [stage.start(WORKER, number, *where) for number in range(WORKERS)]
    killed = 0
    while workers:
        time.sleep(dice.uniform(0.02, 0.1))  # chaos is a matter of time
        busy = {line.split()[4] for line in stage.effects() if not line.startswith("killing")}
        victims = [worker for worker in workers if str(worker.pid) in busy and not has_ended(worker)]
        if killed < KILLS and victims:
            victim = dice.choice(victims)
            note(stage, f"killing {victim.pid}")
            victim.kill()
            workers.remove(victim)
            killed += 1
            workers.append(stage.start(WORKER, WORKERS + killed, *where))
        workers = [worker for worker in workers if not has_ended(worker)]
    return killed


def has_ended(worker: Actor) -> bool:
    """Whether it found nothing more to do; it must have ended well then."""
    if worker.state() not in ("", "Z"):
        return False
    worker.ends_well()
    return True


def assert_one_holder_at_a_time(lines: list[list[str]]) -> dict[str, str]:
    """Nobody is given what another has, unless that one was silent for a lease; who had each task last."""
    sign: dict[str, tuple[str, float]] = {}
    last: dict[str, tuple[int, str]] = {}
    for word, task, token, version, _, *times in (line for line in lines if line[0] != "killing"):
        if word == "claim":
            before, has_been = last.get(task, (0, ""))
            assert int(version) != before, f"a version of {task} came again"
            assert token != has_been
            if int(version) < before:
                continue  # it was stopped for so long before it noted the claim that another has it by now
            heard = sign.pop(task, None)
            assert heard is None or float(times[1]) - heard[1] >= LEASE, f"{task} was taken from {heard}"
            last[task] = int(version), token
            sign[task] = token, float(times[0])
        elif task in sign and sign[task][0] == token:
            if word in ("begin", "alive"):
                sign[task] = token, float(times[0])
            elif word == "end":
                del sign[task]
    return {task: token for task, (_, token) in last.items()}


def sqlite(folder: Path) -> tuple[str, dict[str, Any]]:
    """A file, and how it is opened."""
    return str(folder / "ledger.db"), {}


def postgres(_: Path) -> tuple[str, dict[str, Any]]:
    """A namespace of its own on a real server."""
    pytest.importorskip("ledger_tasks.postgres")  # the module is to come; then leave this line out
    from tests.stores.servers import fresh_namespace, postgres_url

    return postgres_url(), {"namespace": fresh_namespace()}


@pytest.mark.slow
@pytest.mark.parametrize("where", [sqlite, postgres])
@pytest.mark.timeout(300)
def test_kills_at_random_moments_strand_no_task_and_give_none_to_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Callable[[Path], tuple[str, dict[str, Any]]]
) -> None:
    """However many are killed, every task ends, none is held by two at once, and none is left behind."""
    url, options = where(tmp_path)
    tasks = TaskLedger(url, agent="test", quiet=True, **options)
    tasks.add_tasks(a_thousand())
    began = time.monotonic()

    with Stage(tmp_path) as stage:
        killed = let_loose(stage, url, json.dumps(options))
        lines = [line.split() for line in stage.effects()]
    took = time.monotonic() - began

    last = assert_one_holder_at_a_time(lines)
    runs = sum(line[0] == "begin" for line in lines)
    lost = sum(line[0] == "lost" for line in lines)
    counts = tasks.counts()
    told = list(tasks.events())
    with capsys.disabled():
        shown = ", ".join(f"{number} {state.value}" for state, number in counts.items())
        back = sum(event.data.get("op") == "recover" for event in told)
        print(
            f"\n  tasks: {WORKERS} workers, {TASKS} tasks, {killed} killed; {runs} runs begun, "
            f"{back} brought back, {lost} late words refused; {shown}; {len(told)} events, {took:.1f} s"
        )
    assert KILLS == killed
    assert counts.keys() <= {TaskState.DONE, TaskState.FAILED, TaskState.SKIPPED, TaskState.DEAD}
    assert TASKS == sum(counts.values())
    assert counts[TaskState.DONE] > TASKS / 2
    assert [] == faults(tasks)
    for task in tasks.tasks(state="done"):
        assert last[task.id] == task.result, f"{task.id} was completed by a claim that had lost it"
    done = [event.task for event in told if event.to_state == "done"]
    assert len(done) == len(set(done)) == counts[TaskState.DONE]
    tasks.close()


def test_a_killed_worker_leaves_its_task_to_the_next(tmp_path: Path) -> None:
    """Killed between its effect and its word, it loses the task to whoever asks after the lease."""
    script = """
from ledger_tasks import TaskLedger
tasks = TaskLedger(DB, agent="first", lease=1)
claim = tasks.claim_next()
tasks.start(claim)
tasks.checkpoint(claim, {"page": 7})
say(claim.token)
hear()
"""
    tasks = TaskLedger(str(tmp_path / "ledger.db"), agent="second", quiet=True)
    tasks.add_task("a", max_retries=1)
    with Stage(tmp_path) as stage:
        actor = stage.start(script)
        actor.line()
        assert tasks.claim_next() is None
        actor.kill()

    claim = None
    limit = time.monotonic() + PATIENCE
    while claim is None and time.monotonic() < limit:
        claim = tasks.claim_next()

    assert claim is not None
    assert ({"page": 7}, 1) == (claim.task.checkpoint, claim.task.retries)
    assert [] == faults(tasks)
    tasks.close()
