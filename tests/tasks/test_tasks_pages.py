"""Listing: pages of tasks in the order in which they were added, each found by an index."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger import SqliteStore
from ledger_tasks import Task, TaskLedger, TaskState
from ledger_tasks.book import Book, Wanted
from ledger_tasks.sqlite import SqliteBook

_S = TaskState


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """Twelve tasks in three states, every third with a part, beside another session."""
    made = TaskLedger(tmp_path / "ledger.db", agent="ann")
    made.in_session("other").add_tasks([Task(f"t{n}") for n in range(12)])
    made.add_tasks([Task(f"t{n}", parent="t0" if n % 3 == 2 else "") for n in range(12)])
    for n in (1, 4, 7):
        made.complete_task_and_route(f"t{n}")
    made.block("t3", "no key")
    yield made
    made.close()


def paged(tasks: TaskLedger, size: int, **wanted: Any) -> list[str]:
    """The ids of all pages of this size."""
    found: list[str] = []
    after = 0
    while True:

        def look(book: Book, after: int = after) -> Any:
            return book.page(Wanted(after=after, **wanted), size)

        page = tasks.store.read("main", look)
        if not page:
            return found
        found += (row.task.id for row in page)
        after = page[-1].num


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("newest_first", [False, True])
def test_pages_of_any_size_make_the_whole_in_order(tasks: TaskLedger, size: int, newest_first: bool) -> None:
    """Of all, of one state, of several, of some names: nothing twice, nothing lost, in order."""
    every = [f"t{n}" for n in range(12)]
    mixed = frozenset({_S.DONE, _S.BLOCKED, _S.DEAD})
    for expected, wanted in (
        (every, {}),
        (["t1", "t4", "t7"], {"states": frozenset({_S.DONE})}),
        (["t1", "t3", "t4", "t7"], {"states": mixed}),
        (["t2", "t5", "t8", "t11"], {"parent": "t0"}),
        (["t3", "t9"], {"ids": frozenset({"t9", "t3", "nobody"})}),
        (["t0"], {"states": frozenset({_S.PENDING}), "waiting": True}),
        (["t1", "t4", "t7"], {"states": mixed, "parent": "", "text": "DONE"}),
    ):
        assert expected[:: -1 if newest_first else 1] == paged(
            tasks, size, newest_first=newest_first, **wanted
        )


@pytest.mark.parametrize(
    "wanted",
    [
        {}, {"newest_first": True}, {"parent": "t0"}, {"ids": frozenset({"t1"})},
        {"states": frozenset({_S.DONE})},
        {"states": frozenset({_S.DONE, _S.DEAD}), "newest_first": True},
    ],
)  # fmt: skip
def test_no_page_reads_or_sorts_the_whole_ledger(tasks: TaskLedger, wanted: dict[str, Any]) -> None:
    """Each kind of page is a search in an index; only a few named tasks are sorted."""
    store = SqliteStore(tasks.store.address)
    plans: list[str] = []

    def ask(sql: str, values: dict[str, Any]) -> list[Any]:
        plans.extend(row[3] for row in store.browse(f"EXPLAIN QUERY PLAN {sql}", values))
        return store.browse(sql, values)

    SqliteBook("main", store.clock, ask).page(Wanted(**wanted), 10)
    store.close()
    assert plans
    assert not [
        plan for plan in plans if plan.startswith("SCAN tasks") or plan.endswith("tasks_by_state (session=?)")
    ]
    assert "ids" in wanted or not [plan for plan in plans if "TEMP B-TREE" in plan]


def test_waiting_ready_and_later_tasks_are_counted(tasks: TaskLedger) -> None:
    """Each PENDING task is in one of these numbers."""
    tasks.add_task("due", not_before=1)
    tasks.add_task("later", not_before=4_102_444_800)

    ready, later, first = tasks.store.read("main", lambda book: book.pending())
    assert (len(tasks.get_parallel_executable_tasks()), 1, 4_102_444_800_000_000) == (ready, later, first)
    assert tasks.counts()[_S.PENDING] == ready + later + 1, "t0 waits for its parts"
