"""The subtasks of a prompt on a cluster: two worker processes of dask.distributed do them.

    python examples/example_dask.py            (needs: pip install "ledger-guard[examples]")

Each subtask counts the words of a chapter, and orders a copy of it, which costs money: a guarded call. One
of the workers dies in the middle. The cluster runs again what it had, and no copy is ordered twice.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from ledger import Guard
from ledger_tasks import CompoundRunner, TaskLedger

CHAPTERS = ("Call me Ishmael", "It was the best of times", "Many years later", "All happy families are alike")


def planner(prompt: str) -> dict[str, Any]:
    """What a model would have planned: a subtask for each chapter, and a sum at the end."""
    words = [
        {"index": number, "description": chapter, "tier_hint": 1, "depends_on": []}
        for number, chapter in enumerate(CHAPTERS)
    ]
    last = len(words)
    total = {"index": last, "description": "sum", "tier_hint": 2, "depends_on": [*range(last)]}
    return {"reasoning": f"{prompt}: chapter by chapter", "subtasks": [*words, total]}


def order_copy(folder: str, chapter: str) -> str:
    """Orders a copy; the service keeps a line for each order."""
    with Path(folder, "orders.txt").open("a") as orders:
        orders.write(f"{chapter}\n")
    return f"ordered {chapter!r}"


def count_words(subtask: dict[str, Any]) -> dict[str, Any]:
    """Runs on a worker of the cluster."""
    folder = os.environ["EXAMPLE_FOLDER"]
    if subtask["inputs"]:
        return {"result": sum(one["words"] for one in subtask["inputs"].values()), "cost": 0.01}
    guard = Guard(Path(folder, "ledger.db"), quiet=True)
    receipt = guard(order_copy, folder, subtask["description"])
    guard.close()
    if subtask["index"] == 1 and not Path(folder, "died").exists():
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"result": {"words": len(subtask["description"].split()), "order": receipt, "pid": os.getpid()}}


def main() -> None:
    """Start a cluster, submit a prompt, and print what became of it."""
    folder = tempfile.mkdtemp()
    os.environ["EXAMPLE_FOLDER"] = folder  # the workers inherit it
    tasks = TaskLedger(Path(folder, "ledger.db"), quiet=True)
    # without a dashboard, and its HTTP server on loopback too
    quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", **quiet) as cluster,
        Client(cluster) as client,
        CompoundRunner(tasks, planner, count_words, client.get_executor()) as runner,
    ):
        made = runner.submit("count the words of my library")
        print(f"{made['subtask_count']} subtasks are {made['status']}")
        found = runner.wait(made["id"], timeout=80)
    for subtask in found["subtasks"]:
        print(f"{subtask['index']} {subtask['status']} by {subtask['model']}: {subtask['result']}")
    pids = {one["result"]["pid"] for one in found["subtasks"][:-1] if one["status"] == "completed"}
    orders = Path(folder, "orders.txt").read_text().splitlines()
    print(f"{found['status']}, {found['total_cost']:.3f} USD, in other processes: {os.getpid() not in pids}")
    print(
        f"workers killed: {Path(folder, 'died').exists():d}, copies ordered: {len(orders)} of {len(CHAPTERS)}"
    )


if __name__ == "__main__":
    main()
