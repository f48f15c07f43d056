"""Where a task ledger is easily led astray: odd input, cascades that go too far, words of a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ledger import MemoryStore, UsageError
from ledger_stores.testing import FakeClock
from ledger_tasks import Claim, InvalidTransition, StatusEvent, Task, TaskLedger, TaskState


@pytest.fixture
def clock() -> FakeClock:
    """What the ledger goes by."""
    return FakeClock()


@pytest.fixture
def tasks(clock: FakeClock) -> Iterator[TaskLedger]:
    """An empty ledger."""
    made = TaskLedger(MemoryStore(clock=clock), agent="me")
    yield made
    made.close()


def begun(tasks: TaskLedger, name: str) -> Claim:
    """The claim of a task that is ACTIVE now."""
    claim = tasks.claim_task(name)
    assert claim is not None
    tasks.start(claim)
    return claim


@pytest.mark.parametrize(
    "odd",
    [{"description": ["step 1"]}, {"title": 5}, {"tags": None}, {"dependencies": None}, {"capabilities": 7}],
)
def test_a_field_of_another_kind_is_refused(tasks: TaskLedger, odd: dict[str, Any]) -> None:
    """What every list would have to show is text, and lists are lists."""
    with pytest.raises(UsageError):
        tasks.add_task("a", **odd)

    assert len(tasks) == 0


@pytest.mark.parametrize("words", [{"types": "task"}, {"capabilities": "python"}])
def test_one_string_is_no_list_of_words(tasks: TaskLedger, words: dict[str, Any]) -> None:
    """A string would be read as its letters, and claim what nobody meant."""
    tasks.add_task(Task("a", type="as", capabilities=("p",)))

    with pytest.raises(UsageError, match="give a list"):
        tasks.claim_next(**words)


def test_cancelling_goes_no_further_than_what_has_ended(tasks: TaskLedger) -> None:
    """Whoever waited for a part that is done works on, whatever becomes of the whole."""
    tasks.add_task("whole")
    tasks.add_subtasks("whole", [Task("part")])
    tasks.add_task("other", dependencies=["part"])
    tasks.complete(begun(tasks, "part"))
    begun(tasks, "other")

    tasks.cancel("whole", dependents=True)

    assert ["cancelled", "done", "active"] == [task.state for task in tasks]


def test_a_report_is_no_approval(tasks: TaskLedger) -> None:
    """What its holder submitted for review is not DONE because the holder's program says so."""
    tasks.add_task("a")
    tasks.submit_for_review(begun(tasks, "a"))

    with pytest.raises(InvalidTransition, match="somebody must approve it first"):
        tasks.sync("a", "COMPLETED")


def test_a_report_lifts_nobody_elses_block(tasks: TaskLedger) -> None:
    """Who declared a block lifts it, also by a report."""
    tasks.add_task("a")
    tasks.block("a", "legal", actor="boss")

    with pytest.raises(InvalidTransition, match="somebody must unblock it first"):
        tasks.write_event(StatusEvent(state="DONE", actor="program", req="a"))

    told = tasks.write_event(StatusEvent(state="DONE", actor="boss", req="a"))
    assert told.state == TaskState.DONE


def test_a_reported_validation_goes_on_by_itself(tasks: TaskLedger) -> None:
    """A program that reports VALIDATING and then COMPLETED is taken at its word."""
    tasks.sync("a", "VALIDATING")

    assert tasks.sync("a", "COMPLETED").state == TaskState.DONE


def test_who_only_reports_can_be_silent_too_long(tasks: TaskLedger, clock: FakeClock) -> None:
    """A reported task has no lease that lapses, and is stale all the same; nobody takes it away."""
    tasks.sync("a", "RUNNING")
    clock.advance(100)
    tasks.sync("b", "RUNNING")

    assert ["a"] == [task.id for task in tasks.stale_tasks(older_than=60)]
    assert [] == tasks.recover()


def test_a_block_does_not_speak_as_a_parent(tasks: TaskLedger) -> None:
    """The words by which a parent goes on by itself are not a person's."""
    tasks.add_task("a")

    with pytest.raises(UsageError, match="in other words"):
        tasks.block("a", "waiting for subtasks")


def test_a_replay_takes_iso_text(tasks: TaskLedger, clock: FakeClock) -> None:
    """A time is a time however it is written, and what is none is refused."""
    added = tasks.add_task("a").created_at
    assert added is not None
    clock.advance(10)
    begun(tasks, "a")

    assert TaskState.PENDING == tasks.replay("a", until=added.isoformat()).state
    with pytest.raises(UsageError):
        tasks.replay("a", until="tomorrow")


def test_what_a_task_cost_stays_a_number(tasks: TaskLedger) -> None:
    """A cost that a sum could not hold is refused by name."""
    tasks.add_task("a")

    with pytest.raises(UsageError, match="cost="):
        tasks.progress(begun(tasks, "a"), 0.5, cost=1e308)
