"""Compounds: what a runner makes of a plan, in which order, and what is told of it."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import UsageError
from ledger_tasks import (
    BadPlan,
    CompoundRunner,
    DuplicateTask,
    NoSuchTask,
    SubtaskFailed,
    TaskError,
    TaskLedger,
    TaskState,
    Tier,
    compound_view,
)
from ledger_tasks.testing import faults
from tests.actors import PATIENCE, eventually
from tests.tasks.compound_kit import (
    Gates,
    answers,
    json_files,
    of_index,
    opened,
    plan,
    postgres,
    sqlite,
    step,
)


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in a file."""
    with opened(tmp_path) as found:
        yield found


@pytest.fixture(params=[sqlite, postgres, json_files])
def any_tasks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in each store of tasks."""
    with opened(tmp_path, request.param) as found:
        yield found


# ── what it does ──────────────────────────────────────────────────────────────────────────────────


def test_a_compound_runs_in_the_order_of_its_dependencies(any_tasks: TaskLedger) -> None:
    """Each subtask gets the results of what it depends on, and the compound ends as completed."""
    execute: Any = lambda subtask: f"{subtask['index']} after {subtask['inputs']}"  # noqa: E731
    with CompoundRunner(any_tasks, plan(step(0), step(1, 0), step(2, 0, 1)), execute) as runner:
        made = runner.submit("do it")
        found = runner.wait(made["id"], PATIENCE)

    assert {"status": "planned", "subtask_count": 3} == {
        key: made[key] for key in ("status", "subtask_count")
    }
    assert "completed" == found["status"]
    first, second, third = of_index(found, "result")
    assert ("0 after {}", f"1 after {{0: {first!r}}}") == (first, second)
    assert f"2 after { ({0: first, 1: second}) }" == third
    assert [] == faults(any_tasks)


def test_the_full_picture_has_the_keys_that_pollers_know(tasks: TaskLedger) -> None:
    """All of them, at every moment, and JSON values only."""
    gates = Gates()
    with CompoundRunner(tasks, plan(step(0, tier=2), step(1, 0)), gates, parallel=1) as runner:
        made = runner.submit("a prompt")
        gates.wait_for(0)
        during = runner.progress(made["id"])
        gates.open(0, 1)
        found = runner.wait(made["id"], PATIENCE)

    assert found == json.loads(json.dumps(found))
    for picture in (during, found):
        assert {
            "id", "prompt", "status", "reasoning", "subtasks", "created_at", "planned_at", "completed_at",
            "total_cost",
        } <= picture.keys()  # fmt: skip
        assert {
            "id", "index", "description", "tier_hint", "tier_assigned", "model", "depends_on", "status",
            "result", "cost", "started_at", "completed_at",
        } <= picture["subtasks"][0].keys()  # fmt: skip
    assert ("executing", ["executing", "pending"]) == (during["status"], of_index(during, "status"))
    assert (["a prompt", "because"], [[], [0]]) == (
        [during["prompt"], during["reasoning"]],
        of_index(during, "depends_on"),
    )
    assert ["sonnet", "haiku"] == of_index(found, "model")
    assert found["created_at"] <= found["planned_at"] <= found["subtasks"][0]["started_at"]
    assert found["subtasks"][1]["completed_at"] <= found["completed_at"]


def test_a_subtask_begins_when_its_own_dependencies_are_done(tasks: TaskLedger) -> None:
    """It does not wait for others of the same depth that still run."""
    gates = Gates()
    with CompoundRunner(tasks, plan(step(0), step(1), step(2, 0), step(3, 2)), gates) as runner:
        made = runner.submit("p")
        gates.wait_for(0, 1)
        gates.open(0, 2)
        gates.wait_for(3)
        during = of_index(runner.progress(made["id"]), "status")
        gates.open(1, 3)
        runner.wait(made["id"], PATIENCE)

    assert ["completed", "executing", "completed", "executing"] == during


def test_no_more_run_at_once_than_there_are_slots(tasks: TaskLedger) -> None:
    """Who is ready beyond that is queued, and what waits for dependencies is pending."""
    gates = Gates()
    with CompoundRunner(tasks, plan(*map(step, range(5)), step(5, 4)), gates, parallel=2) as runner:
        made = runner.submit("p")
        gates.wait_for(0, 1)
        during = of_index(runner.progress(made["id"]), "status")
        gates.open(*range(6))
        runner.wait(made["id"], PATIENCE)

    assert ["executing"] * 2 + ["queued"] * 3 + ["pending"] == during


def test_a_failed_subtask_blocks_what_depends_on_it(any_tasks: TaskLedger) -> None:
    """That has failed and says because of what; the rest goes on, and the compound is partial."""

    def execute(subtask: dict[str, Any]) -> str:
        if subtask["index"] == 1:
            raise ValueError("no such page")
        return answers(subtask)

    steps = plan(step(0), step(1), step(2, 1), step(3, 2), step(4, 0))
    with CompoundRunner(any_tasks, steps, execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert "partial" == found["status"]
    assert ["completed", "failed", "failed", "failed", "completed"] == of_index(found, "status")
    assert [
        "did 0",
        "ValueError: no such page",
        "blocked by failed dependency 1: ValueError: no such page",
        "blocked by failed dependency 2: ValueError: no such page",
        "did 4",
    ] == of_index(found, "result")
    assert (2, 3) == (found["completed_count"], found["failed_count"])
    assert [] == faults(any_tasks)


def test_a_compound_without_a_completed_subtask_has_failed(any_tasks: TaskLedger) -> None:
    """Its task is FAILED, and its list says what it cost all the same."""

    def execute(_: dict[str, Any]) -> str:
        raise SubtaskFailed("refused", cost=0.5, tokens=7)

    with CompoundRunner(any_tasks, plan(step(0), step(1, 0)), execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        (listed,) = runner.recent()

    assert ("failed", 0.5, 7) == (found["status"], found["total_cost"], found["total_tokens"])
    assert ("failed", 0, 0.5) == (listed["status"], listed["completed_count"], listed["total_cost"])
    assert TaskState.FAILED == any_tasks.get(found["id"]).state


def test_a_long_result_is_kept_whole(any_tasks: TaskLedger) -> None:
    """In the full picture and as an input; only lists are shortened."""
    long = "é\n" * 200_000
    seen = []

    def execute(subtask: dict[str, Any]) -> str:
        seen.append(subtask["inputs"].get(0))
        return long

    with CompoundRunner(any_tasks, plan(step(0), step(1, 0)), execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        lines = io.StringIO()
        runner.export(lines)

    assert [long, long] == of_index(found, "result")
    assert [None, long] == seen
    assert all(len(json.loads(line)["preview"]) <= 200 for line in lines.getvalue().splitlines())


def test_an_execution_may_be_async(tasks: TaskLedger) -> None:
    """A coroutine is run where it was called."""

    async def execute(subtask: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return answers(subtask)

    with CompoundRunner(tasks, plan(step(0)), execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ["did 0"] == of_index(found, "result")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "execute returned NoneType"),
        ({"text": "x"}, "execute returned dict"),
        ({"result": {1, 2}}, "cannot be kept as JSON"),
    ],
)
def test_an_odd_answer_is_a_failure_that_says_so(tasks: TaskLedger, answer: Any, why: str) -> None:
    """And nothing else is lost by it."""
    with CompoundRunner(tasks, plan(step(0)), lambda _: answer) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert why in of_index(found, "result")[0]


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[Any, str]] = [
    ("text", "not a dict with reasoning and subtasks"),
    ({"reasoning": 7, "subtasks": [step(0)]}, "its reasoning is 7, not text"),
    ({"reasoning": ""}, "its subtasks are None, not a list"),
    ({"reasoning": "", "subtasks": []}, "it has 0 subtasks"),
    ({"subtasks": [step(n) for n in range(10_001)]}, "it has 10001 subtasks"),
    ({"subtasks": ["x"]}, "place 0 is 'x', not a dict"),
    ({"subtasks": [{"index": 0, "description": "x"}]}, "place 0 has no tier_hint, depends_on"),
    ({"subtasks": [step(0), step(0)]}, "two of its subtasks have the index 0"),
    ({"subtasks": [step(1)]}, "has the index 1; 1 subtasks are numbered 0 to 0"),
    ({"subtasks": [step(-1)]}, "has the index -1"),
    ({"subtasks": [step(True)]}, "has the index True"),
    ({"subtasks": [step(0, index="0")]}, "has the index '0'"),
    ({"subtasks": [step(0, description=" ")]}, "the description of subtask 0 is ' '"),
    ({"subtasks": [step(0, tier=4)]}, "the tier_hint of subtask 0 is 4, none of 1, 2, 3"),
    ({"subtasks": [step(0, tier_hint="1")]}, "the tier_hint of subtask 0 is '1'"),
    ({"subtasks": [step(0, depends_on="0")]}, "depends_on of subtask 0 is '0', not a list"),
    ({"subtasks": [step(0), step(1, 2)]}, "subtask 1 depends on 2; 2 subtasks are numbered 0 to 1"),
    ({"subtasks": [step(0), step(1, -1)]}, "subtask 1 depends on -1"),
    ({"subtasks": [step(0, 0)]}, "subtask 0 depends on itself"),
    ({"subtasks": [step(0, 2), step(1, 0), step(2, 1)]}, "0 → 2 → 1 → 0"),
    ({"subtasks": [step(0, timeout=0)]}, "the timeout of subtask 0 is 0"),
]


@pytest.mark.parametrize(("found", "why"), BAD, ids=[why[:40] for _, why in BAD])
def test_a_plan_that_is_none_is_refused_before_anything_is_added(
    tasks: TaskLedger, found: Any, why: str
) -> None:
    """The error says what is wrong with it, and the ledger is as it was."""
    with CompoundRunner(tasks, lambda _: found, answers) as runner, pytest.raises(BadPlan) as refused:
        runner.submit("p")

    assert why in str(refused.value)
    assert "nothing was added" in str(refused.value)
    assert 0 == len(tasks)


def test_a_cycle_is_named(tasks: TaskLedger) -> None:
    """The error has the indices of the way round."""
    planner = plan(step(0), step(1, 2), step(2, 1))
    with CompoundRunner(tasks, planner, answers) as runner, pytest.raises(BadPlan) as refused:
        runner.submit("p")

    assert (1, 2, 1) == refused.value.path


def test_what_the_planner_raises_is_raised_by_submit(tasks: TaskLedger) -> None:
    """With a note that nothing was added."""

    def planner(_: str) -> Any:
        raise ConnectionError("no model today")

    with CompoundRunner(tasks, planner, answers) as runner, pytest.raises(ConnectionError) as raised:
        runner.submit("p")

    assert ["the planner raised this; nothing was added. Submit the prompt again"] == raised.value.__notes__
    assert 0 == len(tasks)


def test_a_plan_may_come_in_any_order_and_name_a_dependency_twice(tasks: TaskLedger) -> None:
    """Subtasks are told by their index, and each dependency once."""
    with CompoundRunner(tasks, plan(step(1, 0, 0), step(0)), answers) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ([0, 1], [[], [0]]) == (of_index(found, "index"), of_index(found, "depends_on"))


@pytest.mark.parametrize("prompt", ["", "  ", None, 7])
def test_an_empty_prompt_is_not_planned(tasks: TaskLedger, prompt: Any) -> None:
    """The planner is not asked."""
    with CompoundRunner(tasks, plan(step(0)), answers) as runner, pytest.raises(UsageError, match="prompt"):
        runner.submit(prompt)


def test_a_prompt_may_hold_any_characters(any_tasks: TaskLedger) -> None:
    """Also those that some databases refuse."""
    prompt = "zero \x00, half \ud800, lines\n\n%s {model}"
    with CompoundRunner(any_tasks, plan(step(0), reasoning="\x00"), lambda _: "a\x00b") as runner:
        found = runner.wait(runner.submit(prompt)["id"], PATIENCE)

    assert (prompt, "\x00", ["a\x00b"]) == (found["prompt"], found["reasoning"], of_index(found, "result"))


def test_a_prompt_that_is_submitted_again_under_its_id_is_not_planned_again(tasks: TaskLedger) -> None:
    """Whoever lost the answer asks again; another prompt under that id is refused."""
    asked: list[str] = []

    def planner(prompt: str) -> Any:
        asked.append(prompt)
        return plan(step(0))(prompt)

    with CompoundRunner(tasks, planner, answers) as runner:
        runner.submit("p", id="mine")
        runner.wait("mine", PATIENCE)
        again = runner.submit("p", id="mine")
        with pytest.raises(DuplicateTask, match="another"):
            runner.submit("q", id="mine")

    assert {"id": "mine", "status": "completed", "subtask_count": 1} == again
    assert ["p"] == asked


def test_a_prompt_that_two_submit_at_once_under_one_id_is_added_once(tasks: TaskLedger) -> None:
    """Both planned it; whoever comes second is told of what the first has added."""
    together = threading.Barrier(2)

    def planner(prompt: str) -> Any:
        together.wait(PATIENCE)
        return plan(step(0))(prompt)

    with CompoundRunner(tasks, planner, answers) as runner, ThreadPoolExecutor(2) as both:
        made = [both.submit(runner.submit, "p", id="mine") for _ in range(2)]
        found = [future.result(PATIENCE) for future in made]
        runner.wait("mine", PATIENCE)

    assert [("mine", 1)] * 2 == [(one["id"], one["subtask_count"]) for one in found]
    assert 2 == sum(tasks.counts().values())


class Mute(Exception):
    """Its text cannot be had, nor that of the error about it."""

    def __str__(self) -> str:
        raise type(self)


def test_an_error_without_a_text_is_a_failure(tasks: TaskLedger) -> None:
    """Its name is kept, and the slot goes on with the next subtask."""

    def execute(_: dict[str, Any]) -> str:
        raise Mute

    with CompoundRunner(tasks, plan(step(0), step(1)), execute, parallel=1) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ["Mute", "Mute"] == of_index(found, "result")


# ── tiers and costs ───────────────────────────────────────────────────────────────────────────────


def test_a_reported_cost_wins_over_the_estimate(any_tasks: TaskLedger) -> None:
    """The tier's cost counts where none is reported, and the sums of the ledger have all of it."""

    def execute(subtask: dict[str, Any]) -> Any:
        return (
            answers(subtask) if subtask["index"] else {"result": {"pages": 3}, "cost": 0.25, "tokens": 1234}
        )

    with CompoundRunner(any_tasks, plan(step(0), step(1, tier=2), step(2, tier=3)), execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert [0.25, 0.04, 0.15] == of_index(found, "cost")
    assert (0.44, 1234) == (found["total_cost"], found["total_tokens"])
    assert {"pages": 3} == of_index(found, "result")[0]
    total = any_tasks.metrics().total
    assert (0.44, 1234) == (round(total.cost, 9), total.tokens)


@pytest.mark.parametrize("cost", [-1, float("nan"), "free", True, 1e300])
def test_an_odd_cost_does_not_undo_what_was_done(
    tasks: TaskLedger, cost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The estimate counts, and the log tells."""
    with CompoundRunner(tasks, plan(step(0)), lambda _: {"result": "x", "cost": cost}) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert (["completed"], 0.008) == (of_index(found, "status"), found["total_cost"])
    assert "which is no number from 0" in caplog.text


def test_a_failure_costs_what_it_reports(tasks: TaskLedger) -> None:
    """Nothing is known of the cost of one that reports none."""

    def execute(subtask: dict[str, Any]) -> Any:
        raise SubtaskFailed("no", cost=0.3) if subtask["index"] else ValueError("no")

    with CompoundRunner(tasks, plan(step(0), step(1)), execute) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert [0.0, 0.3] == of_index(found, "cost")


def test_the_table_of_tiers_can_be_replaced(tasks: TaskLedger) -> None:
    """The execution is told the model; whoever goes on later does so with the table of the plan."""
    seen = []
    tiers = {1: Tier("small", 0.1), 7: Tier("large", 0.7)}
    with CompoundRunner(tasks, plan(step(0), step(1, 0, tier=7)), answers, tiers=tiers, start=False) as first:
        made = first.submit("p")

    def execute(subtask: dict[str, Any]) -> str:
        seen.append((subtask["tier_assigned"], subtask["model"]))
        return "done"

    with CompoundRunner(tasks, None, execute) as runner:
        found = runner.wait(made["id"], PATIENCE)

    assert [(1, "small"), (7, "large")] == seen
    assert 0.8 == found["total_cost"]


@pytest.mark.parametrize("tiers", [{}, {1: ("haiku", 0.1)}, {"1": Tier("x", 0)}, {1: Tier("x", -1)}, 7])
def test_an_odd_table_of_tiers_is_refused(tasks: TaskLedger, tiers: Any) -> None:
    """Before anything begins."""
    with pytest.raises(UsageError, match=r"tier"):
        CompoundRunner(tasks, None, answers, tiers=tiers)


@pytest.mark.parametrize(
    "limits", [{"parallel": 0}, {"parallel": True}, {"timeout": 0}, {"lease": -1}, {"lease": "1"}]
)
def test_odd_limits_are_refused(tasks: TaskLedger, limits: dict[str, Any]) -> None:
    """Before anything begins."""
    with pytest.raises(UsageError, match="nothing was begun"):
        CompoundRunner(tasks, None, answers, **limits)


# ── routing ───────────────────────────────────────────────────────────────────────────────────────


def test_a_route_may_choose_another_tier(any_tasks: TaskLedger) -> None:
    """The hint stays what it was, and model and cost are those of the tier that was chosen."""
    models = []

    def execute(subtask: dict[str, Any]) -> str:
        models.append(subtask["model"])
        return "done"

    def route(subtask: dict[str, Any]) -> int:
        return 3 if subtask["index"] == 1 else int(subtask["tier_hint"])

    with CompoundRunner(any_tasks, plan(step(0), step(1, 0)), execute, route=route) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ([1, 1], [1, 3]) == (of_index(found, "tier_hint"), of_index(found, "tier_assigned"))
    assert ["haiku", "opus"] == models == of_index(found, "model")
    assert [0.008, 0.15] == of_index(found, "cost")
    assert [] == faults(any_tasks)


def test_a_subtask_is_routing_while_the_route_is_asked(tasks: TaskLedger) -> None:
    """It has not been started then."""
    asked, go = threading.Event(), threading.Event()

    def route(_: dict[str, Any]) -> int:
        asked.set()
        assert go.wait(PATIENCE)
        return 2

    with CompoundRunner(tasks, plan(step(0)), answers, route=route) as runner:
        made = runner.submit("p")
        assert asked.wait(PATIENCE)
        (during,) = runner.progress(made["id"])["subtasks"]
        go.set()
        runner.wait(made["id"], PATIENCE)

    assert ("routing", None) == (during["status"], during["started_at"])


@pytest.mark.parametrize(
    ("route", "why"),
    [(lambda _: 9, "route chose the tier 9, none of 1, 2, 3"), (lambda _: 1 / 0, "route: ZeroDiv")],
)
def test_a_route_that_gives_no_tier_fails_the_subtask(
    tasks: TaskLedger, route: Callable[[Any], int], why: str
) -> None:
    """With the route's own words, and nothing is executed."""
    with CompoundRunner(tasks, plan(step(0)), answers, route=route) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert of_index(found, "result")[0].startswith(why)


def test_a_route_that_does_not_answer_fails_the_subtask(tasks: TaskLedger) -> None:
    """Its time limit is that of the subtask."""
    go = threading.Event()

    def route(_: dict[str, Any]) -> int:
        go.wait(PATIENCE)
        return 1

    with CompoundRunner(tasks, plan(step(0, timeout=0.05)), answers, route=route) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        go.set()

    assert ["route: no answer in 0.05 s"] == of_index(found, "result")


# ── lists and bills ───────────────────────────────────────────────────────────────────────────────


def test_recent_lists_the_newest_first(any_tasks: TaskLedger) -> None:
    """With 100 characters of each prompt, and counts in place of subtasks."""
    with CompoundRunner(any_tasks, plan(step(0), step(1, 0)), answers) as runner:
        made = [runner.submit(f"{number} " + "long " * 100)["id"] for number in range(4)]
        for one in made:
            runner.wait(one, PATIENCE)
        found = runner.recent(limit=3)

    assert made[:0:-1] == [one["id"] for one in found]
    assert all(len(one["prompt"]) == 100 and "subtasks" not in one for one in found)
    assert [("completed", 2, 2, 0.016)] * 3 == [
        (one["status"], one["subtask_count"], one["completed_count"], one["total_cost"]) for one in found
    ]


def test_a_compound_that_runs_is_listed_as_it_stands(tasks: TaskLedger) -> None:
    """What is completed so far is counted."""
    gates = Gates()
    gates.open(0)
    with CompoundRunner(tasks, plan(step(0), step(1, 0)), gates) as runner:
        made = runner.submit("p")
        gates.wait_for(1)
        (found,) = runner.recent()
        gates.open(1)
        runner.wait(made["id"], PATIENCE)

    assert ("executing", 1, 2) == (found["status"], found["completed_count"], found["subtask_count"])


def test_export_writes_a_line_for_each_execution(tasks: TaskLedger, tmp_path: Path) -> None:
    """Failed ones too; what never began costs nothing and has no line."""

    def execute(subtask: dict[str, Any]) -> Any:
        if subtask["index"] == 1:
            raise SubtaskFailed("sorry", cost=0.02, tokens=5)
        return {"result": "x" * 500, "cost": 0.5, "tokens": 100}

    with CompoundRunner(tasks, plan(step(0, tier=3), step(1, 0), step(2, 1)), execute) as runner:
        made = runner.submit("p")
        runner.wait(made["id"], PATIENCE)
        count = runner.export(tmp_path / "bill.jsonl")

    lines = [json.loads(line) for line in (tmp_path / "bill.jsonl").read_text().splitlines()]
    assert 2 == count == len(lines)
    assert all(line.pop("time") for line in lines)
    names = ("compound", "index", "tier", "model", "success", "tokens", "cost", "preview")
    assert [
        dict(zip(names, (made["id"], 0, 3, "opus", True, 100, 0.5, "x" * 200), strict=True)),
        dict(zip(names, (made["id"], 1, 1, "haiku", False, 5, 0.02, "sorry"), strict=True)),
    ] == lines


def test_export_writes_to_stdout_if_nothing_is_named(
    tasks: TaskLedger, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of JSON for each."""
    with CompoundRunner(tasks, plan(step(0)), answers) as runner:
        runner.wait(runner.submit("p")["id"], PATIENCE)
        runner.export()

    assert "did 0" == json.loads(capsys.readouterr().out)["preview"]


@pytest.mark.parametrize("look", [compound_view.progress, compound_view.cancel])
def test_what_is_no_compound_is_not_found(tasks: TaskLedger, look: Callable[..., object]) -> None:
    """Also where there is a task of that id, which stays as it is."""
    tasks.add_task("mine")

    for name in ("mine", "nobody"):
        with pytest.raises(NoSuchTask, match="no compound"):
            look(tasks, name)
    assert TaskState.PENDING == tasks.get("mine").state


# ── cancelling, time limits ───────────────────────────────────────────────────────────────────────


def test_cancel_ends_a_compound_and_what_runs_of_it(any_tasks: TaskLedger) -> None:
    """Its subtasks have failed as cancelled, and what is finished late is dropped."""
    gates = Gates()
    with CompoundRunner(any_tasks, plan(step(0), step(1), step(2, 1)), gates) as runner:
        made = runner.submit("p")
        gates.open(0)
        gates.wait_for(0, 1)
        eventually(lambda: of_index(runner.progress(made["id"]), "status")[0] == "completed")
        found = runner.cancel(made["id"], "not needed")
        gates.open(1)
        other = runner.submit("another")  # the slot is free for it
        gates.open(2)
        runner.wait(other["id"], PATIENCE)
        after = runner.progress(made["id"])

    assert "cancelled" == found["status"] == after["status"]
    assert [("completed", "did 0"), ("failed", "cancelled"), ("failed", "cancelled")] == [
        (one["status"], one["result"]) for one in after["subtasks"]
    ]
    assert [] == faults(any_tasks)


def test_what_has_ended_cannot_be_cancelled(tasks: TaskLedger) -> None:
    """It stays what it is."""
    with CompoundRunner(tasks, plan(step(0)), answers) as runner:
        made = runner.submit("p")
        runner.wait(made["id"], PATIENCE)
        with pytest.raises(TaskError, match="has ended: completed"):
            runner.cancel(made["id"])

    assert "completed" == compound_view.progress(tasks, made["id"])["status"]


def test_a_thread_that_does_not_answer_in_time_has_failed(tasks: TaskLedger) -> None:
    """Its slot goes on without it, and its late result is dropped."""
    gates = Gates()
    with CompoundRunner(tasks, plan(step(0, timeout=0.05), step(1)), gates, parallel=1) as runner:
        gates.open(1)
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        gates.open(0)
        eventually(lambda: not any(thread.name == "ledger-subtask" for thread in threading.enumerate()))
        late = runner.progress(found["id"])

    assert ("no answer in 0.05 s", "did 1") == tuple(of_index(found, "result"))
    assert found == late


def test_the_time_limit_of_a_runner_is_told_to_the_execution(tasks: TaskLedger) -> None:
    """Unless the plan says another: 120 s where nobody says anything."""
    told: dict[int, float] = {}

    def execute(subtask: dict[str, Any]) -> str:
        told[subtask["index"]] = subtask["timeout"]
        return "done"

    with CompoundRunner(tasks, plan(step(0), step(1, timeout=7)), execute) as runner:
        runner.wait(runner.submit("p")["id"], PATIENCE)

    assert {0: 120.0, 1: 7.0} == told


def test_wait_gives_up_in_time(tasks: TaskLedger) -> None:
    """The compound goes on all the same."""
    gates = Gates()
    with CompoundRunner(tasks, plan(step(0)), gates) as runner:
        made = runner.submit("p")
        with pytest.raises(TimeoutError, match="it goes on"):
            runner.wait(made["id"], 0.01)
        gates.open(0)
        assert "completed" == runner.wait(made["id"], PATIENCE)["status"]


# ── others in the same ledger ─────────────────────────────────────────────────────────────────────


def test_runners_of_other_names_and_other_agents_leave_subtasks_alone(tasks: TaskLedger) -> None:
    """Only a runner of the same name takes them; `claim_next` without a word of it does not."""
    gates = Gates()
    with CompoundRunner(tasks, plan(step(0)), gates, start=False, name="mine") as planned:
        made = planned.submit("p")
    with CompoundRunner(tasks, plan(step(0)), answers, name="other") as other:
        other.wait(other.submit("q")["id"], PATIENCE)
        assert tasks.claim_next() is None
        assert "planned" == other.progress(made["id"])["status"]
        assert ["q"] == [one["prompt"] for one in other.recent()]
    gates.open(0)
    with CompoundRunner(tasks, None, gates, name="mine") as runner:
        assert "completed" == runner.wait(made["id"], PATIENCE)["status"]


def test_a_runner_without_a_planner_plans_nothing(tasks: TaskLedger) -> None:
    """It says so."""
    with CompoundRunner(tasks, None, answers) as runner, pytest.raises(UsageError, match="no planner"):
        runner.submit("p")


def test_other_tasks_of_the_ledger_are_left_to_others(tasks: TaskLedger) -> None:
    """A runner claims its own types only."""
    tasks.add_task("mine")
    with CompoundRunner(tasks, plan(step(0)), answers) as runner:
        runner.wait(runner.submit("p")["id"], PATIENCE)

    assert TaskState.PENDING == tasks.get("mine").state


@pytest.mark.parametrize("route", [None, lambda _: 1])
def test_a_task_that_only_has_the_type_of_a_subtask_fails(tasks: TaskLedger, route: Any) -> None:
    """It says so, the runner goes on, and lists leave it out."""
    for kind in ("compound", "compound-subtask"):
        tasks.add_task(kind, type=kind)
    with CompoundRunner(tasks, plan(step(0)), answers, route=route, parallel=1) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        eventually(lambda: tasks.counts().get(TaskState.FAILED) == 2)
        listed = runner.recent()

    assert "completed" == found["status"]
    assert [found["id"]] == [one["id"] for one in listed]
    assert "no runner planned it" in tasks.get("compound").errors[-1]["error"]
