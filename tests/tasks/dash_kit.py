"""Ledgers of tasks for the tests of the dashboard."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ledger import Guard
from ledger_tasks import Claim, CompoundRunner, Dep, Task, TaskLedger, WorkerInfo
from tests.tasks.compound_kit import plan, step


def begun(tasks: TaskLedger, task_id: str, agent: str) -> Claim:
    """A task that an agent has begun."""
    claim = tasks.claim_task(task_id, agent)
    assert claim is not None
    tasks.start(claim)
    return claim


@contextmanager
def guarding(where: Path | str) -> Iterator[Guard]:
    """A guard, which is closed at the end; the ledger is there."""
    guard = Guard(where, quiet=True)
    guard.check()
    try:
        yield guard
    finally:
        guard.close()


def tell_of_tasks(db: Path | str) -> None:
    """A report with parts, a dead feed and who is skipped for it, a pause, guarded calls, two sessions."""
    tasks = TaskLedger(db, agent="planner", quiet=True)
    report = Task("report", title="Quarterly report", description="Judge the figures.", type="sequential")
    tasks.add_tasks([
        report,
        Task("send", title="Send it", depends_on=(Dep("report"),), tags=("mail",)),
        Task("archive", depends_on=(Dep("send", on_failure="run"),)),
        Task("feed", title="Price feed", type="tool", max_retries=1),
        Task("prices", title="Update prices", depends_on=(Dep("feed"),)),
        Task("backup", type="tool", payload={"disk": "sda", "keep": [7, 30]}),
        Task("refund", title="Refund A-7", type="review"),
    ])  # fmt: skip
    tasks.add_subtasks("report", ["first source", "second source", "third source"])
    first = begun(tasks, "report.1", "ann")
    tasks.complete(first, result={"rows": 120}, tokens=900)
    second = begun(tasks, "report.2", "bob")
    tasks.progress(second, 0.5, "reading page 3")
    tasks.checkpoint(second, {"page": 3})
    tasks.add_artifact(second, "page-1.json", {"where": "s3://figures/1"})
    for _ in range(2):
        tasks.fail(begun(tasks, "feed", "ann"), "TimeoutError: no answer", retry_in=0)
    tasks.fail(begun(tasks, "backup", "bob"), "PermissionError: read-only disk")
    tasks.pause(begun(tasks, "refund", "clerk"), "waits for the manager")
    tasks.beat(WorkerInfo("w-1", "bob", "vm1", 4711, ("*",), 4, done=3, failed=1))
    tasks.beat(WorkerInfo("w-2", "ann", "vm2", 4712, ("tool", "task"), 2, done=1, failed=2, ended=True))
    tasks.in_session("other").add_task("lonely", description="answer the question")
    tasks.close()
    with guarding(db) as guard, guard.workflow("task:report.2"):
        guard.call(fetch, {"page": 1})


def submit_compound(tasks: TaskLedger, compound: str = "c-1", prompt: str = "compare two libraries") -> None:
    """A compound one subtask of which has failed, what waits for it with it, and one of which goes on."""
    steps = (step(0), step(1, tier=2), step(2, 0), step(3, 1, 2, tier=3))
    made = plan(*steps, reasoning="the facts first")
    with CompoundRunner(tasks, made, str, name=compound, start=False) as runner:
        runner.submit(prompt, id=compound)
    first = begun(tasks, f"{compound}.0", "crew")
    tasks.complete(first, result={"licence": "MIT"}, cost=0.008, tokens=70)
    tasks.fail(begun(tasks, f"{compound}.1", "crew"), "TimeoutError: no answer in 120 s")
    begun(tasks, f"{compound}.2", "crew")


def fetch(page: dict[str, int]) -> str:
    """A guarded tool."""
    return "fetched"


_SAME = (
    "state, lane, type, priority, assignee, parent, due, claim, lease, until, mono, boot, op, said, version,"
    " hash"
)  # fmt: skip


def fill(db: Path, count: int) -> None:
    """Make it many, without their events: copies of a task in session `big`, by SQL."""
    tasks = TaskLedger(db, session="big")
    # so long that to search them all takes longer than a page waits
    tasks.add_task("seed", title="copied seed", description="to be copied " * 60)
    tasks.close()
    with closing(sqlite3.connect(db)) as file, file:
        file.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            f" INSERT INTO tasks (session, id, {_SAME})"
            f" SELECT session, 'copy-' || i, {_SAME} FROM n, tasks WHERE id = 'seed'",
            (count,),
        )
        file.execute(
            "INSERT INTO task_docs SELECT copy.num, REPLACE(doc, 'seed', copy.id) FROM tasks AS copy,"
            " whole_tasks AS seed WHERE seed.id = 'seed' AND copy.id LIKE 'copy-%'"
        )
