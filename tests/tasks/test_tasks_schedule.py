"""Waves and the critical path: what can be done in parallel, and what takes longest."""

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from ledger import UsageError
from ledger_tasks import Dep, DependencyCycle, Task, TaskLedger, TaskState
from ledger_tasks.schedule import critical_path, waves


def ids(found: list[list[Task]]) -> list[list[str]]:
    """The ids of waves."""
    return [[task.id for task in wave] for wave in found]


def task(name: str, *on: str, **fields: object) -> Task:
    """A task that waits for others."""
    return Task(name, depends_on=tuple(map(Dep, on)), **fields)  # type: ignore[arg-type]


@pytest.fixture
def ledger() -> Iterator[TaskLedger]:
    """An empty ledger in memory."""
    made = TaskLedger("memory://", agent="ann")
    yield made
    made.close()


def test_nothing_has_no_waves() -> None:
    """No task, no wave and no path."""
    assert [] == waves([])
    assert [] == critical_path([])


def test_a_diamond_has_three_waves() -> None:
    """What waits for the same can be done together, in whatever order tasks are given."""
    diamond = [task("d", "b", "c"), task("b", "a"), task("c", "a", priority=9), task("a")]

    assert [["a"], ["c", "b"], ["d"]] == ids(waves(diamond))


def test_a_dependency_named_twice_counts_once() -> None:
    """A part that its parent also names as a dependency is one edge."""
    found = waves([task("whole", "part"), task("part", parent="whole")])

    assert [["part"], ["whole"]] == ids(found)


def test_what_has_ended_is_left_out(ledger: TaskLedger) -> None:
    """A dependency that is done delays nothing, and one that failed is in no wave."""
    ledger.add_tasks([task("a"), task("b", "a"), task("c", "b"), Task("x"), task("y")])
    ledger.complete_task_and_route("a")
    ledger.complete_task_and_route("x", "it broke", "failure")

    assert [["b", "y"], ["c"]] == ids(ledger.waves())
    assert ["b", "c"] == [t.id for t in ledger.critical_path()]


def test_a_parent_comes_after_its_parts(ledger: TaskLedger) -> None:
    """Parts are waited for whether they came with their parent or later."""
    ledger.add_tasks([Task("p"), Task("p1", parent="p"), Task("p2", parent="p1")])
    ledger.add_task("q")
    ledger.add_subtasks("q", ["first"])

    assert [["p2", "q.1"], ["p1", "q"], ["p"]] == ids(ledger.waves())


def test_the_path_is_the_heaviest_not_the_one_with_most_steps() -> None:
    """A weight says what a task takes."""
    tasks = [task("a"), task("b", "a"), task("c", "b"), task("big"), task("end", "c", "big")]
    hours = {"big": 10.0}

    assert ["a", "b", "c", "end"] == [t.id for t in critical_path(tasks)]
    assert ["big", "end"] == [t.id for t in critical_path(tasks, lambda t: hours.get(t.id, 1))]


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "1", None, True])
def test_a_weight_that_is_none_is_refused(weight: object) -> None:
    """A path by a weight that cannot be added up would be arbitrary."""
    with pytest.raises(UsageError, match="weight of task 'a'"):
        critical_path([task("a")], lambda _: weight)  # type: ignore[arg-type, return-value]


def test_a_cycle_is_named() -> None:
    """Tasks that no ledger would take are refused with the way round."""
    with pytest.raises(DependencyCycle) as caught:
        waves([task("a", "c"), task("b", "a"), task("c", "b"), task("free")])

    assert {"a", "b", "c"} == set(caught.value.path)


@pytest.mark.parametrize("seed", range(20))
def test_waves_are_levels_of_any_graph(seed: int) -> None:
    """Each task is in the wave right after the last of what it waits for."""
    chance = random.Random(seed)
    tasks = [task(f"t{n}", *(f"t{m}" for m in range(n) if chance.random() < 0.2)) for n in range(30)]
    chance.shuffle(tasks)

    found = ids(waves(tasks))
    level = {name: number for number, wave in enumerate(found) for name in wave}
    for one in tasks:
        assert level[one.id] == max((level[dep.id] + 1 for dep in one.depends_on), default=0)
    path = critical_path(tasks)
    assert len(found) == len(path)
    assert all(before.id in {dep.id for dep in after.depends_on} for before, after in pairwise(path))


def chain(count: int) -> list[Task]:
    """Each waits for the one before it, the last given first."""
    return [task(f"t{n}", *([f"t{n - 1}"] if n else [])) for n in reversed(range(count))]


def fan(count: int) -> list[Task]:
    """One that all wait for, and one that waits for all."""
    middle = [f"m{n}" for n in range(count)]
    return [task("end", *middle), *(task(name, "start") for name in middle), task("start")]


@pytest.mark.parametrize(("shape", "depth"), [(chain, 10_000), (fan, 3)])
def test_ten_thousand_are_walked(shape: Callable[[int], list[Task]], depth: int) -> None:
    """A long chain and a wide fan need no recursion."""
    tasks = shape(10_000)

    assert [depth, depth] == [len(waves(tasks)), len(critical_path(tasks))]


def test_a_state_that_waits_for_a_person_is_still_to_be_done(ledger: TaskLedger) -> None:
    """BACKLOG, BLOCKED and held tasks are in the waves."""
    ledger.add_task("later", backlog=True)
    ledger.add_task("stuck")
    ledger.block("stuck", "no key")

    assert [["later", "stuck"]] == ids(ledger.waves())
    assert {TaskState.BACKLOG, TaskState.BLOCKED} == {t.state for t in ledger.waves()[0]}
