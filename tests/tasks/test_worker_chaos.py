"""Chaos: workers whose tasks make three guarded calls each, killed and paused at any moment."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from ledger_tasks import Task, TaskLedger, TaskState
from ledger_tasks.testing import faults
from tests.actors import Actor, Stage
from tests.tasks.test_tasks_chaos import has_ended, note, postgres, sqlite

TASKS: Final = 500
CALLS: Final = 3
WORKERS: Final = 4
KILLS: Final = 25
PAUSES: Final = 12
LEASE: Final = 1.0

# Three effects that somebody else counts, with a word when the guard gave an answer. The guard has as short a
# lease as the tasks, or an effect in which its worker was paused would be waited for and not taken over.
WORKER: Final = f"""
import json, random
from ledger_tasks import NotHolder, TaskLedger, Worker

url, options = sys.argv[3], json.loads(sys.argv[4])
dice = random.Random(int(sys.argv[2]))
own = Guard(url, quiet=True, **options)
own.defaults(timeout={LEASE})

@own.once
def act(task, step):
    effect("in", os.getpid(), task, step)
    time.sleep(dice.expovariate(200))
    return f"{{task}}/{{step}}"

def handler(task, context):
    found = []
    for step in range({CALLS}):
        found.append(act(task.id, step))
        effect("out", os.getpid(), task.id, step)
        if dice.random() < 0.2:
            context.progress(step / {CALLS}, f"step {{step}}")
    return found

tasks = TaskLedger(url, agent=f"worker {{os.getpid()}}", lease={LEASE}, **options)
Worker(tasks, handler, concurrency=2, poll=0.05).run(until_idle=True)
tasks.close()
"""


class Pause(NamedTuple):
    """Where in the order of all lines a process stood still."""

    begin: int
    end: int


def let_loose(stage: Stage, *where: str) -> None:
    """Workers until nothing is left to do; some are killed and replaced, some paused past their lease."""
    dice = random.Random(20_241_122)
    deeds = ["kill"] * KILLS + ["pause"] * PAUSES
    dice.shuffle(deeds)
    workers = [stage.start(WORKER, number, *where) for number in range(WORKERS)]
    paused: list[tuple[float, Actor]] = []
    while workers or paused:
        time.sleep(dice.uniform(0.02, 0.1))  # chaos is a matter of time
        workers = [worker for worker in workers if not has_ended(worker)]
        busy = {int(line.split()[1]) for line in stage.effects()}
        victims = [worker for worker in workers if worker.pid in busy]
        if deeds and victims:
            victim = dice.choice(victims)
            workers.remove(victim)
            if deeds.pop() == "kill":
                note(stage, f"killing {victim.pid}")
                victim.kill()
            else:
                note(stage, f"pausing {victim.pid}")
                victim.freeze()
                paused.append((time.monotonic() + dice.uniform(1.5, 2.5) * LEASE, victim))
            workers.append(stage.start(WORKER, WORKERS + len(deeds), *where))
        for until, victim in [one for one in paused if one[0] < time.monotonic()]:
            note(stage, f"waking {victim.pid}")
            victim.thaw()
            paused.remove((until, victim))
            workers.append(victim)


def assert_repeated_for_a_reason(lines: list[list[str]]) -> int:
    """How often effects happened again; each time the owner before had died in it, or was paused there."""
    killed = {line[1] for line in lines if line[0] == "killing"}
    pauses: dict[str, list[tuple[int, int]]] = defaultdict(list)
    begun: dict[tuple[str, ...], list[int]] = defaultdict(list)
    answered: dict[tuple[str, ...], int] = {}
    for at, line in enumerate(lines):
        word, pid, call = line[0], line[1], tuple(line[2:])
        if word == "pausing":
            pauses[pid].append((at, len(lines)))
        elif word == "waking":
            pauses[pid][-1] = (pauses[pid][-1][0], at)
        elif word == "in":
            begun[call].append(at)
        elif word == "out":
            answered.setdefault((pid, *call), at)
    for done, places in begun.items():
        for at in places[:-1]:
            pid = lines[at][1]
            answer = answered.get((pid, *done), len(lines))
            died_in_it = pid in killed and answer == len(lines)
            was_silent = any(at < end and begin < answer for begin, end in pauses[pid])
            assert died_in_it or was_silent, (
                f"{done} was done twice, and {pid} had neither died nor been silent"
            )
    return sum(len(places) - 1 for places in begun.values())


@pytest.mark.slow
@pytest.mark.parametrize("where", [sqlite, postgres])
@pytest.mark.timeout(300)
def test_effects_of_killed_and_paused_workers_do_not_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Callable[[Path], tuple[str, dict[str, Any]]]
) -> None:
    """Every task ends with its results, and each effect happened once, but where nobody can know better."""
    url, options = where(tmp_path)
    tasks = TaskLedger(url, agent="test", quiet=True, **options)
    tasks.add_tasks([Task(f"t{number}", max_retries=50) for number in range(TASKS)])
    began = time.monotonic()

    with Stage(tmp_path) as stage:
        let_loose(stage, url, json.dumps(options))
        lines = [line.split() for line in stage.effects()]

    again = assert_repeated_for_a_reason(lines)
    told = list(tasks.events())
    taken = sum(event.data.get("op") == "recover" for event in told)
    effects = {tuple(line[2:]) for line in lines if line[0] == "in"}
    with capsys.disabled():
        print(
            f"\n  workers: {TASKS} tasks of {CALLS} calls, {KILLS} kills, {PAUSES} pauses; {taken} tasks "
            f"taken over, {again} effects repeated, each of an owner that died or was silent in it; "
            f"{time.monotonic() - began:.1f} s"
        )
    assert {(f"t{n}", str(step)) for n in range(TASKS) for step in range(CALLS)} == effects
    assert {TaskState.DONE: TASKS} == tasks.counts()
    assert all(task.result == [f"{task.id}/{step}" for step in range(CALLS)] for task in tasks.tasks())
    assert taken > KILLS / 2
    assert [] == faults(tasks)
    tasks.close()
