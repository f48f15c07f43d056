"""Several agents, one list of tasks: each claims what nobody else has, in the order that the tasks allow.

    python examples/example_tasks.py

Four processes work on one ledger. One of them dies with a task in its hands; when its lease has lapsed
another one finishes that. LEDGER_DB may name a server instead of a file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import uuid
from pathlib import Path

from ledger_tasks import Dep, Task, TaskLedger

CITIES = ("Oslo", "Rome", "Lima", "Pune", "Kyiv", "Quito")
LEASE = 2.0  # seconds; a real one is longer, so that a slow network is not taken for a death


def plan(tasks: TaskLedger) -> None:
    """One task for each city, and a summary that waits for all of them."""
    tasks.add_tasks(
        [
            *(Task(f"ask-{city}", f"ask for the weather in {city}", max_retries=1) for city in CITIES),
            Task(
                "summary",
                "sum it up",
                priority=10,  # more urgent, and still not before its dependencies
                depends_on=tuple(Dep(f"ask-{city}", on_failure="run") for city in CITIES),
            ),
        ]
    )


def work(url: str, session: str, name: str, dies: bool) -> None:  # noqa: FBT001 - spawned with positions
    """An agent: claim, begin, do it, complete; until everything has ended."""
    tasks = TaskLedger(url, agent=name, session=session, lease=LEASE)
    while any(task.state not in ("done", "skipped", "dead") for task in tasks):
        claim = tasks.claim_next()
        if claim is None:  # others are at it, or dead with it
            time.sleep(0.05)
            continue
        tasks.start(claim)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        tasks.complete(claim, result=f"{claim.id} by {name}")


def main() -> None:
    """Plan, let four agents work, and print what became of it."""
    url = os.environ.get("LEDGER_DB") or str(Path(tempfile.mkdtemp()) / "ledger.db")
    session = f"weather-{uuid.uuid4().hex[:8]}"
    tasks = TaskLedger(url, agent="planner", session=session)
    plan(tasks)
    spawn = multiprocessing.get_context("spawn")
    crew = [spawn.Process(target=work, args=(url, session, f"agent-{n}", n == 0)) for n in range(4)]
    for agent in crew:
        agent.start()
    for agent in crew:
        agent.join()
    for task in tasks:
        print(f"{task.id:<10} {task.state:<6} after {task.retries} retries  {task.result}")
    killed = sum(agent.exitcode == -signal.SIGKILL for agent in crew)
    last = max(tasks, key=lambda task: (task.completed_at is not None, task.completed_at))
    print(f"agents killed: {killed}; the last to end: {last.id}; every story holds: {tasks.verify().ok}")


if __name__ == "__main__":
    main()
