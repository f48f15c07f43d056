"""A session that a new process goes on with: what was done is done, and the rest knows where it stands.

    python examples/example_resumed.py

The first process imports three files and dies in the middle of the second, after it has kept a
checkpoint. The second process is told by `get_awareness_text` what a model would need to know, takes
the task over, and goes on from the checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from ledger_tasks import Dep, Task, TaskLedger

ROWS = 10


def open_session(url: str, session: str, agent: str) -> TaskLedger:
    """The same list of tasks in every process."""
    return TaskLedger(url, agent=agent, session=session, lease=0.5)


def plan(tasks: TaskLedger) -> None:
    """Three files, one after the other."""
    names = ("customers", "orders", "invoices")
    for name, before in zip(names, ("", *names), strict=False):
        waits = (Dep(before),) if before else ()
        tasks.add_task(Task(name, f"import {name}.csv", depends_on=waits, max_retries=2))


def work(tasks: TaskLedger, *, dies_at: int = 0) -> None:
    """Import row by row from the checkpoint on, until nothing is left."""
    while claim := tasks.claim_next():
        task = tasks.start(claim)
        first = (task.checkpoint or {"row": 0})["row"]
        print(f"{tasks.agent}: {task.id} from row {first}")
        for row in range(first, ROWS):
            if task.id == "orders" and row == dies_at > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            tasks.checkpoint(claim, {"row": row + 1})
            tasks.progress(claim, (row + 1) / ROWS, f"row {row + 1}")
        tasks.complete(claim, result={"rows": ROWS - first})


def main() -> None:
    """Begin in a process that dies, wait for its lease, go on in this one."""
    if len(sys.argv) > 1:
        tasks = open_session(sys.argv[1], sys.argv[2], "monday")
        plan(tasks)
        work(tasks, dies_at=6)
        return
    url = os.environ.get("LEDGER_DB") or str(Path(tempfile.mkdtemp()) / "ledger.db")
    session = f"import-{uuid.uuid4().hex[:8]}"
    first = subprocess.run([sys.executable, __file__, url, session], check=False)
    print(f"the first process ended with {first.returncode}")
    tasks = open_session(url, session, "tuesday")
    print(tasks.get_awareness_text(max_chars=600))
    while not tasks.stale_tasks():  # until the lease of the one that died has lapsed
        time.sleep(0.05)
    work(tasks)
    rows = {task.id: task.result["rows"] for task in tasks}
    print(f"rows imported by whoever ended each file: {rows}")


if __name__ == "__main__":
    main()
