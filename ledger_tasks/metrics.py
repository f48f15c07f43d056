"""Figures of a ledger from one pass over its tasks, in constant memory.

Medians and 95th percentiles come from a histogram whose bucket limits grow by 2 %: at most 1 % from the true value,
the same on every run, and no larger for a million tasks than for ten thousand. Counts, sums and means are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ledger_tasks.model import Task, at, plain
from ledger_tasks.states import TaskState

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

#: types and agents that are told apart; further ones are counted together as `OTHERS`
GROUPS: Final = 500
OTHERS: Final = "(others)"
_GROWTH: Final = math.log(1.02)
#: seconds; anything shorter counts as this in a percentile
_LEAST: Final = 1e-6
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Spread:
    """How long something took, in seconds; zeros when nothing was measured."""

    count: int = 0
    mean: float = 0.0
    #: at most 1 % from the true value, as is `p95`
    p50: float = 0.0
    p95: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a set of tasks adds up to."""

    tasks: int = 0
    #: by the name of the state
    states: dict[str, int] = field(default_factory=dict)
    done: int = 0
    #: DONE of all that are DONE, FAILED or DEAD; None while nothing is
    success_rate: float | None = None
    #: DONE for each hour from the first creation to the latest end
    per_hour: float = 0.0
    #: DONE in the last 24 hours
    done_last_day: int = 0
    #: seconds from creation until it was begun, in ACTIVE, and from creation to DONE
    wait: Spread = Spread()
    work: Spread = Spread()
    cycle: Spread = Spread()
    retries: int = 0
    errors: int = 0
    api_calls: int = 0
    tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of a ledger: of all tasks, by type, and by the agent that has or had them."""

    total: Figures
    by_type: dict[str, Figures]
    by_agent: dict[str, Figures]
    #: the first creation and the latest end
    since: datetime | None = None
    until: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {name: plain(value) for name, value in asdict(self).items()}


def metrics(ledger: TaskLedger) -> Metrics:
    """The figures of all tasks of the ledger's session."""
    now = ledger.store.read(ledger.session, lambda book: at(book.now))
    return measured(ledger.tasks(), now)


def measured(tasks: Iterable[Task], now: datetime) -> Metrics:
    """The figures of these tasks; each is looked at once and not kept."""
    total = _Sums(now)
    by_type: dict[str, _Sums] = {}
    by_agent: dict[str, _Sums] = {}
    for task in tasks:
        took = _Took.of(task)
        total.add(task, took)
        _group(by_type, task.type, now).add(task, took)
        if task.assignee:
            _group(by_agent, task.assignee, now).add(task, took)
    return Metrics(total.figures(), _figures(by_type), _figures(by_agent), total.first, total.last)


def _group(groups: dict[str, _Sums], name: str, now: datetime) -> _Sums:
    if name not in groups:
        name = name if len(groups) < GROUPS else OTHERS
        groups.setdefault(name, _Sums(now))
    return groups[name]


def _figures(groups: dict[str, _Sums]) -> dict[str, Figures]:
    return {name: groups[name].figures() for name in sorted(groups)}


class _Time(NamedTuple):
    """A duration, exactly and as the bucket that it falls into."""

    bucket: int
    micros: int


class _Took(NamedTuple):
    """The durations of one task; None for what it has not."""

    wait: _Time | None
    work: _Time | None
    cycle: _Time | None

    @classmethod
    def of(cls, task: Task) -> _Took:
        work = task.work_time if task.started_at is not None else None
        cycle = task.cycle_time if task.state == TaskState.DONE else None
        return cls(_time_of(task.wait_time), _time_of(work), _time_of(cycle))


def _time_of(seconds: float | None) -> _Time | None:
    """A clock that was set back makes a duration of 0."""
    if seconds is None:
        return None
    seconds = max(seconds, 0.0)
    return _Time(math.floor(math.log(max(seconds, _LEAST)) / _GROWTH), round(seconds * 1e6))


class _Sums:
    """What tasks add up to so far."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.states: dict[TaskState, int] = {}
        self.first: datetime | None = None
        self.last: datetime | None = None
        self.last_day = 0
        self.wait, self.work, self.cycle = _Histogram(), _Histogram(), _Histogram()
        self.costs: list[float] = []
        self.counts = dict.fromkeys(("retries", "errors", "api_calls", "tokens"), 0)

    def add(self, task: Task, took: _Took) -> None:
        self.states[task.state] = self.states.get(task.state, 0) + 1
        self._add_times(task, took)
        self.counts["retries"] += task.retries
        self.counts["errors"] += len(task.errors)
        self.counts["api_calls"] += task.api_calls
        self.counts["tokens"] += task.tokens
        if task.cost:
            _add_exactly(self.costs, task.cost)

    def _add_times(self, task: Task, took: _Took) -> None:
        self.first = _sooner(self.first, task.created_at)
        self.wait.add(took.wait)
        self.work.add(took.work)
        self.cycle.add(took.cycle)
        if task.completed_at is not None:
            self.last = max(self.last or task.completed_at, task.completed_at)
        if task.state == TaskState.DONE and task.completed_at is not None:
            self.last_day += self.now - task.completed_at <= _DAY

    def figures(self) -> Figures:
        done = self.states.get(TaskState.DONE, 0)
        judged = done + self.states.get(TaskState.FAILED, 0) + self.states.get(TaskState.DEAD, 0)
        return Figures(
            tasks=sum(self.states.values()),
            states={state.value: self.states[state] for state in TaskState if state in self.states},
            done=done, success_rate=done / judged if judged else None, per_hour=self._per_hour(done),
            done_last_day=self.last_day, wait=self.wait.spread(), work=self.work.spread(), cycle=self.cycle.spread(),
            cost=math.fsum(self.costs), **self.counts,
        )  # fmt: skip

    def _per_hour(self, done: int) -> float:
        if self.first is None or self.last is None or self.last <= self.first:
            return 0.0
        return done * 3600 / (self.last - self.first).total_seconds()


def _sooner(known: datetime | None, found: datetime | None) -> datetime | None:
    return found if known is None or (found is not None and found < known) else known


def _add_exactly(parts: list[float], value: float) -> None:
    """Add to a sum kept as a few numbers that do not overlap (Shewchuk), so that a million cents make 10,000."""
    kept = 0
    for part in parts:
        high, low = (value, part) if abs(value) >= abs(part) else (part, value)
        value = high + low
        if rest := low - (value - high):
            parts[kept] = rest
            kept += 1
    parts[kept:] = [value]


class _Histogram:
    """Durations by the logarithm of their length: a few hundred counters, however many durations."""

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._count, self._sum, self._longest = 0, 0, 0

    def add(self, took: _Time | None) -> None:
        if took is None:
            return
        self._buckets[took.bucket] = self._buckets.get(took.bucket, 0) + 1
        self._count += 1
        self._sum += took.micros
        self._longest = max(self._longest, took.micros)

    def spread(self) -> Spread:
        if not self._count:
            return Spread()
        mean = self._sum / self._count / 1e6
        return Spread(self._count, mean, self._at(0.5), self._at(0.95), self._longest / 1e6)

    def _at(self, share: float) -> float:
        """The duration that this share is not above: the middle of its bucket."""
        wanted = math.ceil(share * self._count)
        for bucket in sorted(self._buckets):
            wanted -= self._buckets[bucket]
            if wanted <= 0:
                break
        middle = math.exp((bucket + 0.5) * _GROWTH)
        return min(middle, self._longest / 1e6) if middle > _LEAST * 1.05 else 0.0
