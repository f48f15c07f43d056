"""Programs that only report states: the table's way is walked, and what it forbids stays forbidden."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from ledger import MemoryStore, UsageError
from ledger_stores.testing import FakeClock
from ledger_tasks import (
    InvalidTransition,
    NotHolder,
    StatusEvent,
    Task,
    TaskError,
    TaskLedger,
    TaskState,
    register_ledger_for_session,
)
from ledger_tasks.states import ENDED, FINAL, NEXT
from tests.actors import stage

_S = TaskState


class World:
    """A ledger, and a program that reports to it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = TaskLedger(MemoryStore(clock=self.clock), agent="me")

    def report(
        self, state: str, *, actor: str = "prog", req: str = "r", stage: str = "", **data: object
    ) -> Task:
        event = StatusEvent(state=state, actor=actor, source="test", req=req, stage=stage, data=data or None)
        return self.ledger.write_event(event)

    def states(self, req: str = "r") -> list[str]:
        """The state after each event."""
        return [event.to_state for event in self.ledger.events(req)]

    def unchanged(self) -> int:
        return self.ledger.last_seq()


@pytest.fixture
def world() -> Iterator[World]:
    """An empty one."""
    made = World()
    yield made
    made.ledger.close()


def test_a_first_report_makes_the_task(world: World) -> None:
    """What is first heard of under a foreign name is made and brought where it is."""
    assert _S.PENDING == world.report("RECEIVED").state
    task = world.report("RUNNING", stage="thinking")

    assert (_S.ACTIVE, "prog", "thinking") == (task.state, task.assignee, task.stage)
    assert ["pending", "assigned", "active"] == world.states()


def test_states_in_between_are_recorded_as_implied(world: World) -> None:
    """DONE at once: it was claimed and begun, which nobody reported."""
    task = world.report("COMPLETED", result={"n": 1}, tool="x")

    events = [*world.ledger.events("r")]
    assert (_S.DONE, {"n": 1}, 1.0) == (task.state, task.result, task.progress)
    assert ["pending", "assigned", "active", "done"] == [event.to_state for event in events]
    assert [None, True, True, None] == [event.data.get("implied") for event in events]
    last = events[-1]
    assert ("prog", "test") == (last.actor, last.source)
    assert {"result": {"n": 1}, "tool": "x"} == last.data["data"]
    assert "COMPLETED" == last.data["reported"]
    assert world.ledger.replay("r") == world.ledger.get("r")


def test_stage_and_data_are_kept_in_the_event(world: World) -> None:
    """What the program said stands in the event that it caused."""
    world.report("RUNNING", stage="collecting", page=3)

    last = [*world.ledger.events("r")][-1]
    assert ("collecting", {"page": 3}) == (last.stage, last.data["data"])


@pytest.mark.parametrize(
    "name", ["RECEIVED", "RUNNING", "PAUSED", "VALIDATING", "BLOCKED", "COMPLETED", "FAILED"]
)
def test_the_same_report_again_changes_nothing(world: World, name: str) -> None:
    """A program that repeats itself leaves one event."""
    first = world.report(name, stage="s", n=1)
    seq = world.ledger.last_seq()

    assert first == world.report(name, stage="s", n=1) == world.report(name)
    assert seq == world.ledger.last_seq()


def test_what_is_new_in_the_same_state_is_a_note(world: World) -> None:
    """Another stage, or other data, is written down without a move."""
    world.report("RUNNING", stage="one")
    version = world.ledger.get("r").version
    task = world.report("RUNNING", stage="two")
    world.report("RUNNING", stage="two", percent=40)

    last = [*world.ledger.events("r")][-2:]
    assert ("two", _S.ACTIVE, version + 1) == (task.stage, task.state, task.version)
    assert ["note", "note"] == [event.kind for event in last]
    assert [None, {"percent": 40}] == [event.data.get("data") for event in last]
    assert world.ledger.replay("r") == world.ledger.get("r")


def test_another_holders_task_is_refused(world: World) -> None:
    """Neither the same state nor another one may be reported of what somebody else has."""
    world.report("RUNNING", actor="ann")
    seq = world.ledger.last_seq()

    for state in ("RUNNING", "COMPLETED", "FAILED", "PAUSED", "QUEUED"):
        with pytest.raises(NotHolder) as caught:
            world.report(state, actor="bob", n=1)
        assert "ann" == caught.value.holder
    assert seq == world.ledger.last_seq()


def test_anybody_may_approve_and_cancel(world: World) -> None:
    """What anybody may do by an operation, anybody may report; a holder's step is not implied."""
    world.report("RUNNING", actor="ann")
    with pytest.raises(NotHolder):
        world.report("APPROVED", actor="bob")
    world.report("IN_REVIEW", actor="ann")

    assert _S.APPROVED == world.report("APPROVED", actor="bob").state
    assert "ann" == world.ledger.get("r").assignee
    assert _S.CANCELLED == world.report("ABORTED", actor="bob", reason="not needed").state
    assert "not needed" == world.ledger.get("r").reason


@pytest.mark.parametrize("end", sorted(FINAL))
def test_terminal_states_stay(world: World, end: TaskState) -> None:
    """Nothing that is reported later moves a task that has ended."""
    world.report(end.value)
    seq = world.ledger.last_seq()

    for state in TaskState:
        if state != end:
            with pytest.raises(InvalidTransition):
                world.report(state.value)
    with pytest.raises(InvalidTransition, match="prog ended it"):
        world.report(end.value, actor="bob")
    assert end == world.ledger.get("r").state
    assert seq == world.ledger.last_seq()


def test_a_task_at_rest_in_failed_is_not_begun_anew(world: World) -> None:
    """No retry is left: that takes a person with a reason. DEAD likewise."""
    world.report("FAILED", error="it broke")
    task = world.ledger.get("r")
    assert ("it broke", ["it broke"]) == (task.reason, [one["error"] for one in task.errors])

    for state in ("RUNNING", "QUEUED", "COMPLETED"):
        with pytest.raises(InvalidTransition):
            world.report(state)
    assert _S.DEAD == world.report("DEAD_LETTER").state
    for state in ("RUNNING", "QUEUED"):
        with pytest.raises(InvalidTransition):
            world.report(state)
    world.ledger.retry("r", "the key was renewed")
    assert _S.ACTIVE == world.report("RUNNING").state


def test_failures_follow_the_rules_of_fail(world: World) -> None:
    """While retries are left it is PENDING again, then DEAD; a repeated report of a failure counts once."""
    world.ledger.add_task("r", max_retries=1)
    world.report("RUNNING")
    task = world.report("ERROR", error="busy")
    assert (_S.PENDING, 1) == (task.state, task.retries)
    assert task == world.report("ERROR", error="busy"), "the same failure, told twice"
    world.report("RUNNING")
    task = world.report("ERROR", error="busy")

    assert (_S.DEAD, 1, 2) == (task.state, task.retries, len(task.errors))
    assert "its 1 retries are used up: busy" == task.reason
    assert world.ledger.replay("r") == world.ledger.get("r")


def test_no_lease_runs(world: World) -> None:
    """A program that only reports sends no heartbeat: its silence brings nothing back."""
    world.ledger.add_task("r")
    claim = world.ledger.claim_task("r", "earlier", lease=10)
    assert claim is not None
    world.ledger.release(claim)
    world.report("RUNNING")
    world.clock.advance(1e6)

    assert [] == world.ledger.stale_tasks()
    assert [] == world.ledger.recover()
    with pytest.raises(NotHolder):
        world.ledger.complete(claim)
    assert _S.DONE == world.ledger.complete("r", agent="prog").state


def test_a_claim_with_a_lease_keeps_it(world: World) -> None:
    """Whoever claimed and then reports is heard of by that, and is stale when it falls silent."""
    world.ledger.add_task("r")
    claim = world.ledger.claim_task("r", "prog", lease=10)
    assert claim is not None
    world.clock.advance(8)
    world.report("RUNNING")
    world.clock.advance(8)
    world.report("RUNNING", stage="on it")
    world.clock.advance(8)
    assert [] == world.ledger.stale_tasks()

    world.clock.advance(3)
    assert ["r"] == [task.id for task in world.ledger.stale_tasks()]


def test_what_waits_cannot_be_running(world: World) -> None:
    """A dependency that is open is not jumped by a report, but a task may be reported as given up."""
    world.ledger.add_tasks([Task("a"), Task("b"), Task("r", depends_on=("a", "b"))])  # type: ignore[arg-type]
    seq = world.ledger.last_seq()
    for state in ("CLAIMED", "RUNNING", "COMPLETED"):
        with pytest.raises(InvalidTransition, match="it waits for 2 dependencies"):
            world.report(state)
    assert seq == world.ledger.last_seq()

    assert _S.SKIPPED == world.report("NOT_APPLICABLE").state


def test_dependents_go_on(world: World) -> None:
    """A reported end frees, or fails, what waits for it, as an operation does."""
    for name in ("r", "bad"):
        world.ledger.add_task(name)
        world.ledger.add_task(f"after {name}", dependencies=[name])
    world.report("COMPLETED")
    world.report("FAILED", req="bad")

    assert world.ledger.get("after r").ready
    assert _S.SKIPPED == world.ledger.get("after bad").state


def test_every_state_can_be_reported_first(world: World) -> None:
    """Whatever the first report says, the way there is legal, replays, and is the snapshot."""
    for state in TaskState:
        assert state == world.report(state.value, req=state.value).state
        way = world.states(state.value)
        assert all(TaskState(b) in NEXT[TaskState(a)] for a, b in pairwise(way))
        assert world.ledger.replay(state.value) == world.ledger.get(state.value)


@pytest.mark.parametrize("start", sorted(set(TaskState) - FINAL))
@pytest.mark.parametrize("end", sorted(TaskState))
def test_from_every_state_to_every_state(world: World, start: TaskState, end: TaskState) -> None:
    """A report arrives by the table's legal moves, or is refused and changes nothing."""
    world.report(start.value)
    seq = world.ledger.last_seq()
    try:
        task = world.report(end.value)
    except InvalidTransition:
        assert seq == world.ledger.last_seq()
        assert start == world.ledger.get("r").state
    else:
        assert end == task.state
        assert start not in ENDED or end in (start, _S.DEAD, _S.CANCELLED)
    assert world.ledger.replay("r") == world.ledger.get("r")


def test_the_ledgers_own_mapping_comes_first(world: World) -> None:
    """A program's word may mean something of its own here."""
    world.ledger.mapping = {"THINKING": "IN_PROGRESS", "DONE": "VALIDATING"}

    assert _S.ACTIVE == world.report("THINKING").state
    assert _S.REVIEW == world.report("DONE").state
    with pytest.raises(UsageError, match="there is no task state 'PONDERING'"):
        world.report("PONDERING")


def test_odd_reports_are_refused_before_anything_is_written(world: World) -> None:
    """No request, data that JSON cannot keep, or a name with control characters."""
    for event in (
        StatusEvent("RUNNING", "prog"),
        StatusEvent("RUNNING", "prog", req="r", data={"x": object()}),
        StatusEvent("RUNNING", "prog", req="r", data=["x"]),  # type: ignore[arg-type]
        StatusEvent("RUNNING", "a\x1fb", req="r"),
        StatusEvent("RUNNING", "prog", req="r", stage="a\nb"),
        StatusEvent("WHAT", "prog", req="r"),
    ):
        with pytest.raises(UsageError):
            world.ledger.write_event(event)
    assert 0 == world.ledger.last_seq()


def test_sync_mirrors_a_host_programs_actions(world: World) -> None:
    """Under the ledger's own name, by a mapping table, found by the session."""
    register_ledger_for_session("host", world.ledger)
    world.ledger.mapping = {"ActionState.WORKING": "IN_PROGRESS"}

    assert "me" == world.ledger.sync(7, "ActionState.WORKING", stage="step 1").assignee
    assert _S.DONE == world.ledger.sync(7, "COMPLETED").state
    assert "7" in world.ledger


def test_a_refusal_is_a_task_error_that_names_the_report(world: World) -> None:
    """The message says who reported what, and what may follow."""
    world.report("COMPLETED")

    with pytest.raises(
        TaskError, match=r"'r' is DONE and cannot become ACTIVE: prog reported RUNNING.*final"
    ):
        world.report("RUNNING")


@pytest.mark.slow
def test_two_programs_report_the_same_request_at_once(tmp_path: Path) -> None:
    """Of many first reports from several processes one makes the task, and each state is entered once."""
    script = """
from ledger_tasks import StatusEvent, TaskLedger
tasks = TaskLedger(DB, agent="x")
tasks.counts()
say("ready")
hear()
for n in range(10):
    for state in ("RUNNING", "COMPLETED"):
        try:
            tasks.write_event(StatusEvent(state=state, actor="prog", req=f"r{n}"))
        except Exception as error:
            effect(type(error).__name__)
"""
    with stage(tmp_path) as scene:
        scene.let_go(scene.crowd(4, script))
        tasks = TaskLedger(scene.db, agent="me")
        assert {_S.DONE: 10} == tasks.counts()
        for n in range(10):
            assert ["pending", "assigned", "active", "done"] == [e.to_state for e in tasks.events(f"r{n}")]
        assert {"InvalidTransition"} >= set(scene.effects()), "a late RUNNING of one that is done is refused"
        tasks.close()
