"""Whether tampering is found: real files, changed by somebody who may do everything but recompute."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger_tasks import Dep, Task, TaskLedger
from ledger_tasks.verify import Report


@pytest.fixture(name="path")
def a_path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger.db"


@pytest.fixture(name="tasks")
def some_tasks(path: Path) -> Iterator[TaskLedger]:
    """A ledger in which much has happened."""
    ledger = TaskLedger(path, agent="me")
    ledger.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),)), Task("c", depends_on=(Dep("b", "run"),))])
    ledger.add_task("p", max_retries=1)
    ledger.add_subtasks("p", ["first", "second"])
    for _ in range(2):
        claim = ledger.claim_next("w", lease=60)
        assert claim is not None
        ledger.start(claim)
        ledger.progress(claim, 0.5, "half")
        ledger.checkpoint(claim, {"page": 3})
        ledger.complete(claim, {"pages": 7})
    held = ledger.claim_next("w", lease=60)
    assert held is not None
    yield ledger
    ledger.close()


def tamper(path: Path, *statements: str) -> None:
    """Change the file as somebody does who drops its triggers first."""
    db = sqlite3.connect(path)
    with db:
        db.execute("DROP TRIGGER IF EXISTS task_events_stay")
        db.execute("DROP TRIGGER IF EXISTS task_events_are_kept")
        for statement in statements:
            assert db.execute(statement).rowcount > 0, statement
    db.close()


def test_a_ledger_as_it_was_written(tasks: TaskLedger) -> None:
    """Nothing is wrong with it, and it says what was looked at."""
    report = tasks.verify()
    assert Report(tasks=6, events=len(list(tasks.events()))) == report
    assert report
    assert {"ok": True, "tasks": 6, "events": report.events, "faults": []} == report.to_dict()


PAGES = """replace({}, '"pages":7', '"pages":8')"""
EDGE = "SELECT t.num, d.num, 'skip' FROM tasks t, tasks d WHERE t.id = 'b' AND d.id = 'p'"
TAMPERED = {
    "data of an event": (
        f"UPDATE task_events SET data = {PAGES.format('data')} WHERE task = 'a' AND n = 6",
        "event 6 of task 'a' was altered",
    ),
    "its actor": (
        "UPDATE task_events SET actor = 'you' WHERE task = 'a' AND n = 2",
        "event 2 of task 'a' was altered",
    ),
    "its time": (
        "UPDATE task_events SET at = at + 1 WHERE task = 'a' AND n = 3",
        "event 3 of task 'a' was altered",
    ),
    "where it leads": (
        "UPDATE task_events SET to_state = 'done' WHERE task = 'b' AND n = 1",
        "from nothing to done, which is no legal move",
    ),
    "to a state that is none": (
        "UPDATE task_events SET to_state = 'gone' WHERE task = 'a' AND n = 2",
        "from pending to gone, which is no legal move",
    ),
    "to something unreadable": (
        "UPDATE task_events SET data = '{\"set\":[]}' WHERE task = 'a' AND n = 4",
        "event 4 of task 'a' cannot be read",
    ),
    "an event in between": (
        "DELETE FROM task_events WHERE task = 'a' AND n = 3",
        "event 4 of task 'a' comes where event 3 should be",
    ),
    "the last event": (
        "DELETE FROM task_events WHERE task = 'a' AND n = 6",
        "task 'a' has version 6, and events up to 5",
    ),
    "all events of a task": (
        "DELETE FROM task_events WHERE task = 'p.2'",
        "task 'p.2' has version 1, and events up to 0",
    ),
    "a snapshot": (
        (
            f"UPDATE task_docs SET doc = {PAGES.format('doc')}"
            " WHERE num = (SELECT num FROM tasks WHERE id = 'a')"
        ),
        "task 'a' is not what its events add up to (version 6, events up to 6; differing: result)",
    ),
    "the snapshot's version": (
        (
            "UPDATE task_docs SET doc = replace(doc, '\"version\":6', '\"version\":5')"
            " WHERE num = (SELECT num FROM tasks WHERE id = 'a')"
        ),
        "snapshot of task 'a' is not what its events add up to",
    ),
    "the snapshot's hash": (
        "UPDATE tasks SET hash = 'x' WHERE id = 'a'",
        "task 'a' has another hash than its last event",
    ),
    "a snapshot that is gone": (
        "DELETE FROM tasks WHERE id = 'p.2'",
        "task 'p.2' has events and no snapshot",
    ),
    "an open count": (
        "UPDATE tasks SET open = 0 WHERE id = 'p'",
        "task 'p' is said to wait for 0 tasks, and 2 of those are open",
    ),
    "an edge that is gone": (
        "DELETE FROM task_deps WHERE task = (SELECT num FROM tasks WHERE id = 'c')",
        "task 'c' depends on 'b' (on_failure=run), and its edge is not so",
    ),
    "an edge that is new": (
        f"INSERT INTO task_deps {EDGE}",
        "task 'b' waits for 'p', which it does not depend on",
    ),
    "an edge that is another": (
        "UPDATE task_deps SET on_failure = 'fail' WHERE on_failure = 'run'",
        "task 'c' depends on 'b' (on_failure=run), and its edge is not so",
    ),
    "the column of a state": (
        "UPDATE tasks SET state = 'backlog' WHERE id = 'p.2'",
        "task 'p.2' is filed under another state",
    ),
    "the column of a priority": (
        "UPDATE tasks SET priority = 9 WHERE id = 'p.2'",
        "task 'p.2' is filed under another priority",
    ),
    "the column of what it needs": (
        "UPDATE tasks SET lane = '[\"task\",[\"gpu\"]]' WHERE id = 'p.2'",
        "task 'p.2' is filed under another lane",
    ),
    "the column of its parent": (
        "UPDATE tasks SET parent = 'a' WHERE id = 'p.2'",
        "task 'p.2' is filed under another parent",
    ),
    "the column of a pause": (
        "UPDATE tasks SET due = 4102444800000000 WHERE id = 'p.2'",
        "task 'p.2' is filed under another due",
    ),
    "a claim": ("UPDATE tasks SET claim = 'mine' WHERE id = 'p.2'", "task 'p.2' is PENDING and has a claim"),
    "a lease": (
        "UPDATE tasks SET lease = 0 WHERE state = 'assigned'",
        "a lease runs on task 'c', which is ASSIGNED",
    ),
}


@pytest.mark.parametrize(("statement", "told"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_found(tasks: TaskLedger, path: Path, statement: str, told: str) -> None:
    """Whatever was changed is named, and the report is false."""
    tamper(path, statement)
    report = tasks.verify()
    assert not report
    assert any(told in fault for fault in report.faults), report.faults


def test_what_hides_behind_triggers(tasks: TaskLedger, path: Path) -> None:
    """As long as the triggers stand, the file itself refuses to have events changed."""
    db = sqlite3.connect(path)
    for statement in ("UPDATE task_events SET actor = 'x'", "DELETE FROM task_events"):
        with pytest.raises(sqlite3.IntegrityError, match="events of tasks are never"):
            db.execute(statement)
    db.close()
    assert tasks.verify()


def test_other_sessions_are_verified_when_asked(tasks: TaskLedger, path: Path) -> None:
    """One session says nothing of another one; all together do."""
    tasks.in_session("other").add_task("x")
    tamper(path, "UPDATE task_events SET actor = 'you' WHERE task = 'x'")

    assert tasks.verify()
    report = tasks.verify(all_sessions=True)
    assert 2 == len(report.faults)
    assert all("of task 'x'" in fault for fault in report.faults)
    assert 7 == report.tasks


def test_work_that_goes_on_is_no_fault(tasks: TaskLedger) -> None:
    """A ledger is verified while others write to it, and found whole."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            tasks.add_tasks([Task(f"n{number}"), Task(f"m{number}", depends_on=(Dep(f"n{number}"),))])
            tasks.complete_task_and_route(f"n{number}")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        reports = [tasks.verify() for _ in range(10)]
    finally:
        stop.set()
        worker.join()
    assert [] == [fault for report in reports for fault in report.faults]
    assert reports[-1].tasks > 6


def test_many_faults_are_counted(path: Path) -> None:
    """A ledger that is wrong everywhere is told of in a bounded list."""
    ledger = TaskLedger(path)
    ledger.add_tasks([Task(f"t{n}") for n in range(1_100)])
    tamper(path, "UPDATE task_events SET actor = 'you'")

    report = ledger.verify()
    assert 1_001 == len(report.faults)
    assert "… and 1200 more" == report.faults[-1]
    ledger.close()
