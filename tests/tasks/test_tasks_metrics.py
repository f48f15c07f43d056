"""Figures: exact counts and means, percentiles within 1 %, one pass and constant memory."""

import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from ledger import MemoryStore
from ledger_stores.testing import FakeClock
from ledger_tasks import Task, TaskLedger, TaskState
from ledger_tasks.metrics import GROUPS, OTHERS, Figures, Metrics, Spread, measured

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class World:
    """A ledger under a fake clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = TaskLedger(MemoryStore(clock=self.clock), agent="ann")

    def pass_(self, seconds: float) -> None:
        self.clock.advance(seconds)


@pytest.fixture
def world() -> Iterator[World]:
    """An empty one."""
    made = World()
    yield made
    made.ledger.close()


def finished(seconds: float, **fields: object) -> Task:
    """A task that was DONE just now, so many seconds after it was created and begun."""
    start = NOW - timedelta(seconds=seconds)
    times = {"created_at": start, "started_at": start, "completed_at": NOW, "worked": seconds}
    return replace(Task("t", state=TaskState.DONE), **times | fields)  # type: ignore[arg-type]


def test_an_empty_ledger_has_zeros(world: World) -> None:
    """No task, no rate, no division by zero."""
    assert Metrics(Figures(), {}, {}) == world.ledger.metrics()
    assert world.ledger.metrics().total.success_rate is None


def test_times_are_those_of_the_task(world: World) -> None:
    """Waiting ends when it is begun, work leaves pauses out, the cycle is all of it."""
    world.ledger.add_task("a", type="mail")
    world.pass_(60)
    claim = world.ledger.claim_next()
    assert claim is not None
    world.ledger.start(claim)
    world.pass_(10)
    world.ledger.pause(claim)
    world.pass_(1000)
    world.ledger.resume(claim)
    world.pass_(30)
    world.ledger.complete(claim, cost=0.25, tokens=100, api_calls=2)

    found = world.ledger.metrics()
    assert (60, 40, 1100) == (found.total.wait.mean, found.total.work.mean, found.total.cycle.mean)
    assert (1, 1.0, 1) == (found.total.done, found.total.success_rate, found.total.done_last_day)
    assert (0.25, 100, 2) == (found.total.cost, found.total.tokens, found.total.api_calls)
    assert math.isclose(found.total.per_hour, 3600 / 1100)
    assert found.total == found.by_type["mail"] == found.by_agent["ann"]


def test_failures_retries_and_errors_are_counted(world: World) -> None:
    """A retry that succeeded is a success with a retry; a task that stayed FAILED lowers the rate."""
    world.ledger.add_tasks([Task("a", max_retries=1), Task("b"), Task("c"), Task("open")])
    world.ledger.cancel("c")
    world.ledger.complete_task_and_route("b", "it broke", "failure")
    claim = world.ledger.claim_task("a")
    assert claim is not None
    world.ledger.start(claim)
    world.ledger.fail(claim, "busy", retry_in=0)
    world.ledger.complete_task_and_route("a")

    total = world.ledger.metrics().total
    assert (4, 1, 0.5) == (total.tasks, total.done, total.success_rate)
    assert (1, 2) == (total.retries, total.errors)
    assert {"pending": 1, "done": 1, "failed": 1, "cancelled": 1} == total.states


def test_the_last_day_is_counted_apart(world: World) -> None:
    """What was done before yesterday is in the rate over the span, not in the last 24 hours."""
    world.ledger.add_tasks([Task("old"), Task("new")])
    world.ledger.complete_task_and_route("old")
    world.pass_(25 * 3600)
    world.ledger.complete_task_and_route("new")

    total = world.ledger.metrics().total
    assert (2, 1) == (total.done, total.done_last_day)
    assert math.isclose(total.per_hour, 2 / 25)


def test_only_the_own_session_counts(world: World) -> None:
    """Figures are of one session, as everything else."""
    world.ledger.add_task("a")
    other = world.ledger.in_session("other")

    assert (1, 0) == (world.ledger.metrics().total.tasks, other.metrics().total.tasks)


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_within_one_per_cent(seed: int) -> None:
    """Of durations from microseconds to months."""
    chance = random.Random(seed)
    seconds = sorted(10 ** chance.uniform(-4, 7) for _ in range(2_000))

    found = measured((finished(one) for one in seconds), NOW).total.cycle
    for share, value in ((0.5, found.p50), (0.95, found.p95)):
        true = finished(seconds[math.ceil(share * len(seconds)) - 1]).cycle_time
        assert true is not None
        assert math.isclose(value, true, rel_tol=0.0101)
    assert math.isclose(found.mean, math.fsum(seconds) / len(seconds), rel_tol=1e-6)


def test_a_percentile_is_never_above_the_longest() -> None:
    """Of one duration all figures are that one; of none, 0."""
    assert Spread(3, 5.0, 5.0, 5.0, 5.0) == measured([finished(5.0)] * 3, NOW).total.cycle
    assert Spread(2, 0.0, 0.0, 0.0, 0.0) == measured([finished(0.0)] * 2, NOW).total.cycle


def test_a_clock_that_was_set_back_gives_no_negative_time() -> None:
    """A task that ended before it was created took no time."""
    assert Spread(1, 0.0, 0.0, 0.0, 0.0) == measured([finished(-100.0)], NOW).total.cycle


def test_a_million_cents_are_ten_thousand() -> None:
    """Money is added up without an error that grows."""
    assert 10_000.0 == measured((finished(1, cost=0.01) for _ in range(20_000)), NOW).total.cost * 50


def test_further_types_are_counted_together() -> None:
    """A program that makes a type for each task does not make the figures endless."""
    found = measured((finished(1, type=f"type {n}") for n in range(GROUPS + 200)), NOW)

    assert GROUPS + 1 == len(found.by_type)
    assert 200 == found.by_type[OTHERS].tasks


def test_memory_does_not_grow_with_the_tasks() -> None:
    """Ten times as many tasks need no more memory."""

    def peak(count: int) -> int:
        tracemalloc.start()
        measured((finished(n % 97 + 0.1, cost=0.1) for n in range(count)), NOW)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(5_000) < 1.5 * peak(500)


def test_figures_are_json(world: World) -> None:
    """`to_dict` has JSON values only, times as ISO text."""
    world.ledger.add_task("a")
    world.ledger.complete_task_and_route("a")

    found = json.loads(json.dumps(world.ledger.metrics().to_dict()))
    assert 1 == found["total"]["cycle"]["count"]
    assert "2023-11-14T22:13:20+00:00" == found["since"]
