"""A compound whose process is killed at every step in turn, and gone on with by another."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from ledger_tasks import TaskLedger, TaskState, compound_view
from ledger_tasks.testing import faults
from tests.actors import Stage
from tests.stores.servers import fresh_namespace, postgres_url

# Each subtask makes a guarded call. The process dies right after the n-th event of the ledger was committed,
# or after the n-th call was settled, but never inside a call: nobody could know then whether it took effect.
SCRIPT: Final = """
import json
from ledger_tasks import CompoundRunner, TaskLedger
from ledger_tasks.book import TaskStore, Wanted
from ledger_tasks.stores import open_tasks

url, settings, dies_of, dies_at = sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], int(sys.argv[5])
guard = Guard(url, quiet=True, **settings)
gate = threading.Lock()
settled = 0

def die_if(what, count):
    if what == dies_of and count >= dies_at:
        with gate:
            os.kill(os.getpid(), signal.SIGKILL)

class Mortal(TaskStore):
    def __init__(self, store):
        self.store, self.address = store, store.address
    def read(self, session, look):
        return self.store.read(session, look)
    def write(self, session, work, *, durable=True):
        answer = self.store.write(session, work, durable=durable)
        rows = self.store.read(session, lambda book: book.page(Wanted(session=session), 100))
        die_if("event", sum(row.task.version for row in rows))
        return answer
    def calls(self):
        return self.store.calls()
    def close(self):
        self.store.close()

@guard.once
def pay(index):
    effect("paid", index)
    return f"receipt {index}"

def execute(subtask):
    global settled
    effect("ran", subtask["index"])
    with gate:
        receipt = pay(subtask["index"])
        settled += 1
        count = settled
    die_if("call", count)
    return receipt

def planner(prompt):
    steps = [(), (0,), (0,), (1, 2)]
    subtask = {"description": "pay", "tier_hint": 1}
    return {"subtasks": [{**subtask, "index": n, "depends_on": deps} for n, deps in enumerate(steps)]}

tasks = TaskLedger(Mortal(open_tasks(url, dict(settings, quiet=True))), lease=1)
route = lambda subtask: 2 if subtask["index"] == 1 else 1
with CompoundRunner(tasks, planner, execute, parallel=2, lease=1, route=route) as runner:
    runner.submit("pay them all", id="c")
    say(runner.wait("c", 60)["status"])
"""
#: 5 created, 3 for each subtask, one that is routed elsewhere, 3 of the compound
EVENTS: Final = 5 + 4 * 3 + 1 + 3
DEATHS: Final = [*(("event", n) for n in range(5, EVENTS + 1)), *(("call", n) for n in range(1, 5))]


def sqlite(folder: Path) -> tuple[str, dict[str, Any]]:
    """A file, and how it is opened."""
    return str(folder / "ledger.db"), {}


def postgres(_: Path) -> tuple[str, dict[str, Any]]:
    """A namespace of its own on a real server."""
    return postgres_url(), {"namespace": fresh_namespace()}


def killed_and_gone_on_with(
    folder: Path, where: Callable[[Path], tuple[str, dict[str, Any]]], what: str, number: int
) -> None:
    """One death, one successor: nothing that was finished ran again, and every call took effect once."""
    folder.mkdir()
    url, settings = where(folder)
    told = f"killed after {what} {number}"
    with Stage(folder) as stage:
        victim = stage.start(SCRIPT, url, json.dumps(settings), what, number)
        assert -signal.SIGKILL == victim.ends(), f"{told}: {victim.errors()}"
        ran = Counter(stage.effects())
        tasks = TaskLedger(url, quiet=True, **settings)
        finished = [part for part in compound_view.parts_of(tasks, "c") if part.state == TaskState.DONE]

        successor = stage.start(SCRIPT, url, json.dumps(settings), "nothing", 0)

        assert "completed" == successor.line(), told
        successor.ends_well()
        effects = Counter(stage.effects())
    for part in finished:
        name = f"ran {part.payload['index']}"
        assert (1, 1) == (ran[name], effects[name]), told
    assert {f"paid {index}": 1 for index in range(4)} == {
        name: count for name, count in effects.items() if name.startswith("paid")
    }, told
    if what == "call":  # its call was replayed when it ran again
        assert sum(count for name, count in effects.items() if name.startswith("ran")) > 4, told
    found = compound_view.progress(tasks, "c")
    assert [f"receipt {index}" for index in range(4)] == [one["result"] for one in found["subtasks"]], told
    assert ("completed", 4) == (found["status"], found["completed_count"]), told
    assert [1, 2, 1, 1] == [one["tier_assigned"] for one in found["subtasks"]], told
    assert [] == faults(tasks), told
    tasks.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", [sqlite, postgres])
def test_a_compound_survives_a_kill_at_every_step(
    tmp_path: Path, where: Callable[[Path], tuple[str, dict[str, Any]]]
) -> None:
    """A new runner goes on: every finished subtask ran once, every effect counts once, and all is done."""
    where(tmp_path)  # a server that has to be started is started once
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(killed_and_gone_on_with, tmp_path / f"{what}{number}", where, what, number)
            for what, number in DEATHS
        ]
        for run in runs:
            run.result()
