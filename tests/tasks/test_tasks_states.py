"""The one table of states: what the issue says of it, ways through it, other programs' names, the diagram."""

from __future__ import annotations

import itertools
import threading
from typing import Final

import pytest

from ledger import UsageError
from ledger_tasks import InvalidTransition, Task, TaskLedger, TaskState
from ledger_tasks.book import Row, stepped
from ledger_tasks.model import moment
from ledger_tasks.states import ENDED, FINAL, HELD, LEASED, LOST, NEXT, diagram, path, state_from

#: as the specification writes it
TABLE: Final = """
BACKLOG → PENDING, CANCELLED
PENDING → ASSIGNED, BLOCKED, BACKLOG, SKIPPED, FAILED, CANCELLED
ASSIGNED → ACTIVE, PENDING, DEAD, CANCELLED
ACTIVE → DONE, FAILED, PAUSED, REVIEW, BLOCKED, PENDING, DEAD, CANCELLED
PAUSED → ACTIVE, CANCELLED
REVIEW → APPROVED, ACTIVE, CANCELLED
APPROVED → DONE, CANCELLED
BLOCKED → PENDING, CANCELLED, SKIPPED
FAILED → PENDING, DEAD, CANCELLED
DEAD → PENDING
DONE →
CANCELLED →
SKIPPED →
"""
PAIRS: Final = list(itertools.product(TaskState, TaskState))


def table() -> dict[str, set[str]]:
    """The text above as names."""
    parts = [line.split("→") for line in TABLE.strip().splitlines()]
    return {name.strip(): {word.strip() for word in rest.split(",")} - {""} for name, rest in parts}


def test_the_table_is_the_specified_one() -> None:
    """Every state has its row, and each row is what was asked for."""
    assert table() == {state.name: {s.name for s in following} for state, following in NEXT.items()}
    assert set(TaskState) == set(NEXT)


def test_the_sets_are_those_of_the_table() -> None:
    """Final is what nothing follows; DEAD has ended and can come back; only what is held is leased."""
    assert {"DONE", "CANCELLED", "SKIPPED"} == {state.name for state in FINAL}
    assert {"FAILED", "CANCELLED", "SKIPPED", "DEAD"} == {state.name for state in LOST}
    assert LOST | {TaskState.DONE} == ENDED
    assert LEASED < HELD
    assert not HELD & ENDED


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_step_is_in_the_table_or_raises(start: TaskState, end: TaskState) -> None:
    """The one function that moves a task lets through exactly what the table has."""
    row = Row(Task("a", state=start, version=1))
    if end in NEXT[start]:
        after, event = stepped(row, "moved", moment=1, actor="me", to=end)
        assert (end, start.value, end.value) == (after.task.state, event.from_state, event.to_state)
        return

    with pytest.raises(InvalidTransition) as caught:
        stepped(row, "moved", moment=1, actor="me", to=end)

    error = caught.value
    assert (start, end, NEXT[start], "a") == (error.state, error.wanted, error.legal, error.task_id)
    assert all(name in str(error) for name in (start.name, end.name, *(s.name for s in NEXT[start])))


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_way_is_legal_and_the_shortest(start: TaskState, end: TaskState) -> None:
    """Each step of it stands in the table, and no way has fewer steps."""
    way = path(start, end)

    reached, steps = {start}, 0
    while end not in reached or not steps:
        following = {state for one in reached for state in NEXT[one]}
        steps += 1
        if following <= reached and steps > len(TaskState):
            assert [] == way
            return
        reached = following if steps == 1 else reached | following
    assert (end, steps) == (way[-1], len(way))
    assert all(then in NEXT[before] for before, then in itertools.pairwise([start, *way]))


def test_a_way_keeps_to_what_it_may_pass() -> None:
    """Only the states that are named may stand in between."""
    assert [TaskState.PENDING, TaskState.SKIPPED] == path(
        TaskState.BACKLOG, TaskState.SKIPPED, through=(TaskState.PENDING,)
    )
    assert [] == path(TaskState.BACKLOG, TaskState.ACTIVE, through=(TaskState.PENDING,))
    assert [] == path(TaskState.DONE, TaskState.PENDING)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("IN_PROGRESS", "ACTIVE"),
        ("in-progress", "ACTIVE"),
        ("In Progress", "ACTIVE"),
        ("VALIDATING", "REVIEW"),
        ("COMPLETED", "DONE"),
        ("RUNNING", "ACTIVE"),
        ("RECEIVED", "PENDING"),
        ("USER_STOPPED", "PAUSED"),
        ("canceled", "CANCELLED"),
        (" done ", "DONE"),
        (TaskState.DEAD, "DEAD"),
    ],
)
def test_other_programs_names_are_known(name: str, state: str) -> None:
    """A state may be called as others call it, in upper or lower case."""
    assert TaskState[state] == state_from(name)


@pytest.mark.parametrize("state", TaskState)
def test_our_own_names_are_our_own(state: TaskState) -> None:
    """No foreign name hides one of the table."""
    assert [state] * 3 == [state_from(name) for name in (state.name, state.value, state)]


@pytest.mark.parametrize("name", ["", "FLYING", "DONE DONE"])
def test_an_unknown_name_is_refused(name: str) -> None:
    """The error lists the states that there are."""
    with pytest.raises(UsageError) as caught:
        state_from(name)

    assert all(state.name in str(caught.value) for state in TaskState)


def test_the_diagram_is_printed_from_the_table() -> None:
    """One line for each state, in the words of the table."""
    lines = diagram().splitlines()

    shown = {line.split("→")[0].strip(): line.split("→")[1].strip() for line in lines}
    assert shown == {
        state.name: ", ".join(s.name for s in following) or "(final)" for state, following in NEXT.items()
    }


@pytest.mark.parametrize("value", ["soon", float("nan"), 1e30, float("inf")])
def test_what_is_no_time_is_refused(value: float | str) -> None:
    """A time that cannot be understood is an error of the caller that shows it."""
    with pytest.raises(UsageError, match="no time"):
        moment(value)


def test_threads_that_begin_together_open_one_store() -> None:
    """A ledger that several threads use first at the same moment keeps what each of them adds."""
    for _ in range(20):
        tasks = TaskLedger("memory://", agent="me")
        gate = threading.Barrier(8)

        def add(number: int, tasks: TaskLedger = tasks, gate: threading.Barrier = gate) -> None:
            gate.wait(30)
            tasks.add_task(f"t{number}")

        threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert 8 == len(tasks)


def test_an_artifact_says_when_it_was_made() -> None:
    """Its name, its value, and the time."""
    tasks = TaskLedger("memory://", agent="me")
    tasks.add_task("a")
    claim = tasks.claim_next()
    assert claim is not None

    made = tasks.add_artifact(claim, "report", "s3://x")

    assert [{"name": "report", "value": "s3://x", "at": made.artifacts[0]["at"]}] == list(made.artifacts)
    assert moment(made.artifacts[0]["at"]) == list(tasks.events("a"))[-1].at
