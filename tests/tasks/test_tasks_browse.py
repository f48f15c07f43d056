"""Looking at tasks for the pages: the same questions to a file and to PostgreSQL have the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard
from ledger_tasks import Dep, Task, TaskLedger, TaskState, WorkerInfo
from ledger_tasks.book import Wanted
from ledger_tasks.browse import TaskReader, reader_of
from ledger_tasks.browse_compounds import compound, compounds
from tests.stores.servers import fresh_namespace, postgres_url
from tests.tasks.dash_kit import begun, submit_compound

SECONDS = 60.0
WANTED = (
    Wanted(session=None),
    Wanted(session="main"),
    Wanted(session=None, states=frozenset({TaskState.DEAD, TaskState.FAILED})),
    Wanted(session="main", states=frozenset({TaskState.PENDING})),
    Wanted(session=None, types=frozenset({"tool"})),
    Wanted(session=None, text="100% \\ _"),
    Wanted(session=None, text="ÄRGER"),
    Wanted(session="main", parent="report"),
    Wanted(session=None, assignee="bob"),
    Wanted(session=None, tag="mail"),
)


def tell(where: Any) -> None:
    """Parts, dependencies, a dead task, two agents, two sessions."""
    tasks = TaskLedger(where, agent="planner")
    tasks.add_tasks([
        Task("report", title="Quarterly report", type="sequential"),
        Task("send", depends_on=(Dep("report"),), tags=("mail",)),
        Task("feed", title="ärger", type="tool", max_retries=1),
        Task("prices", depends_on=(Dep("feed", on_failure="run"),)),
        Task("backup", type="tool"),
    ])  # fmt: skip
    tasks.add_subtasks("report", ["first", "second", "third"])
    tasks.complete(begun(tasks, "report.1", "ann"), result={"rows": 1})
    for _ in range(2):
        tasks.fail(begun(tasks, "feed", "ann"), "TimeoutError: 100% \\ _ of it", retry_in=0)
    begun(tasks, "report.2", "bob")
    tasks.in_session("other").add_task("lonely")


def look(reader: TaskReader) -> dict[str, Any]:
    """What it tells, but for times and numbers that a store gives."""
    pages = []
    for wanted in WANTED:
        names: list[str] = []
        after = 0
        while page := reader.page(Wanted(**{**_fields(wanted), "after": after}), 2, SECONDS):
            names += [seen.task.id for seen in page.tasks]
            after = page.cursor
            if not after:
                break
        pages.append(names)
    roots, cursor = reader.roots("main", 30, "", SECONDS)
    graph = reader.graph("main", 100)
    names_of = {seen.num: seen.task.id for seen in graph.tasks}
    line = reader.timeline("main", None, moves=1000, agents=10, bars=100)
    before, after_it = reader.neighbours(reader.seen("main", "report").num, 50)
    return {
        "pages": pages,
        "counts": (reader.counts(), reader.counts("main"), reader.sessions(), reader.choices()),
        "tree": ([(t.level, t.seen.task.id, t[2:]) for t in reader.tree(roots, 100, 2)], cursor),
        "graph": (sorted((names_of[a], names_of[b], how) for a, b, how in graph.links), graph.is_cut),
        "columns": sorted((names_of[num], column) for num, column in graph.column.items()),
        "lanes": [(x.agent, [b[:3] for b in x.bars], x.done, x.failed, x.held) for x in line.lanes],
        "near": [[(seen.task.id, how) for seen, how in side] for side in (before, after_it)],
        "events": [(told.n, told.kind, told.to_state, told.why) for told in reader.events("main", "feed", 5)],
        "news": [(one.task, one.kind, one.to_state) for one in reader.news(0, 100)],
        "above": [task.id for task in reader.ancestors("main", reader.row("main", "report.3").task)],
    }


def _fields(wanted: Wanted) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in Wanted.__slots__}


def of_file(db: Path) -> TaskReader:
    """What looks at the tasks of a file."""
    tell(db)
    reader = reader_of(Guard(db, quiet=True)._ready())
    assert reader is not None
    return reader


@pytest.fixture
def server() -> Iterator[TaskReader]:
    """What looks at the same story on PostgreSQL."""
    pytest.importorskip("ledger_tasks.postgres")
    guard = Guard(postgres_url(), namespace=fresh_namespace(), quiet=True)
    store = guard._ready()
    guard.check()
    reader = reader_of(store)
    assert reader is not None
    assert reader.is_empty()
    tell(store)
    yield reader
    guard.close()


def test_a_file_tells_the_story(tmp_path: Path) -> None:
    """Lists, tree, graph and timeline are what was done."""
    told = look(of_file(tmp_path / "ledger.db"))

    assert [
        "lonely",
        "report.3",
        "report.2",
        "report.1",
        "backup",
        "prices",
        "feed",
        "send",
        "report",
    ] == told["pages"][0]
    assert [["feed"], ["report.3", "backup", "prices", "send", "report"]] == told["pages"][2:4]
    assert [["feed"], ["report.3", "report.2", "report.1"], ["report.2"], ["send"]] == [
        told["pages"][n] for n in (5, 7, 8, 9)
    ]
    assert [(0, "report"), (1, "report.1"), (1, "report.2")] == [twig[:2] for twig in told["tree"][0]]
    assert (3, 1, 1) == told["tree"][0][0][2][1:]
    assert [("bob", 1), ("ann", 0)] == [(agent, held) for agent, *_, held in told["lanes"]]
    assert ["report"] == told["above"]


def test_postgresql_has_the_same_answers(server: TaskReader, tmp_path: Path) -> None:
    """Every look at the same story gives the same on the server as on a file."""
    file, here = look(of_file(tmp_path / "ledger.db")), look(server)

    # SQLite folds the case of ASCII alone, so that it finds less
    file["pages"].pop(6), here["pages"].pop(6)
    assert file == here


def compounds_and_workers(reader: TaskReader) -> dict[str, Any]:
    """A compound and two workers beside the story, and what is told of them but for numbers and times."""
    tasks = TaskLedger(reader.store, session="research")
    submit_compound(tasks)
    tasks.beat(WorkerInfo("w-1", "crew", "vm", 1, ("*",), 4, done=1))
    tasks.beat(WorkerInfo("w-2", "gone", "vm", 2, ("mail",), 1, ended=True))
    page = compounds(reader, None, 0, 10, SECONDS)
    one = compound(reader, "research", "c-1", 3)
    first = min(part["num"] for part in one.subtasks)
    untold = {"num", "created_at", "planned_at", "started_at", "completed_at"}
    return {
        "list": [{key: told[key] for key in told.keys() - untold} for told in page.compounds],
        "one": {key: one.told[key] for key in one.told.keys() - untold},
        "subtasks": [{key: part[key] for key in part.keys() - untold} for part in one.subtasks],
        "links": sorted((link.task - first, link.on - first, link.on_failure) for link in one.links),
        "workers": [
            (found.session, found.worker.agent, found.worker.alive, [seen.task.id for seen in found.doing])
            for found in reader.workers(None, 10)
        ],
    }


def test_compounds_and_workers_are_the_same_on_postgresql(server: TaskReader, tmp_path: Path) -> None:
    """What is executed or failed comes first where not all subtasks are shown; each worker with its tasks."""
    file, here = compounds_and_workers(of_file(tmp_path / "ledger.db")), compounds_and_workers(server)

    assert file == here
    assert [1, 2, 3] == [part["index"] for part in file["subtasks"]]
    assert (1, "executing", 0.008, True) == tuple(
        file["one"][key] for key in ("more", "status", "total_cost", "whole_cost")
    )
    assert [("research", "crew", True, ["c-1.2"]), ("research", "gone", False, [])] == file["workers"]
