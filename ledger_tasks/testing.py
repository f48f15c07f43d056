"""Does a store of tasks keep the promises? A suite for pytest that a store of yours can be put through.

    from ledger_tasks.testing import TaskConformance

    class TestMyTasks(TaskConformance):
        def make(self, folder, clock):
            return MyTaskStore(folder, clock)      # a new, empty store

Needs pytest.  A store whose clock is its own says `takes_clock = False`: then time really passes, by `lease` seconds.
After each test `faults` looks at everything that was written.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from ledger import Clock, LedgerError, UsageError
from ledger_stores.testing import FakeClock, in_parallel
from ledger_tasks.book import Row, TaskStore, Wanted, columns_of
from ledger_tasks.errors import (
    Conflict,
    DependencyCycle,
    DuplicateTask,
    InvalidTransition,
    NoSuchTask,
    NotHolder,
    TaskError,
)
from ledger_tasks.model import Claim, Dep, Task, TaskEvent, apply, at, dependencies_from, hash_of
from ledger_tasks.operations import TAKEOVERS, WAITS_FOR_PARTS
from ledger_tasks.states import ENDED, FINAL, HELD, LEASED, LOST, NEXT, TaskState
from ledger_tasks.tasks import TaskLedger

E = TypeVar("E", bound=Exception)
_S = TaskState
_PAGE: Final = 500

#: each operation that moves one task: to which state, from which (None: wherever the table lets it), by its holder
MOVES: Final[dict[str, tuple[TaskState, tuple[TaskState, ...] | None]]] = {
    "start": (_S.ACTIVE, (_S.ASSIGNED,)),
    "pause": (_S.PAUSED, None),
    "resume": (_S.ACTIVE, (_S.PAUSED,)),
    "submit_for_review": (_S.REVIEW, None),
    "approve": (_S.APPROVED, None),
    "reject": (_S.ACTIVE, (_S.REVIEW,)),
    "complete": (_S.DONE, (_S.ACTIVE, _S.APPROVED)),
    "fail": (_S.FAILED, (_S.ACTIVE,)),
    "release": (_S.PENDING, (_S.ASSIGNED, _S.ACTIVE)),
    "block": (_S.BLOCKED, None),
    "unblock": (_S.PENDING, (_S.BLOCKED,)),
    "shelve": (_S.BACKLOG, None),
    "unshelve": (_S.PENDING, (_S.BACKLOG,)),
    "retry": (_S.PENDING, (_S.FAILED, _S.DEAD)),
    "cancel": (_S.CANCELLED, None),
}
#: what only its holder does; the others go by the id alone
BY_HOLDER: Final = frozenset({"start", "pause", "resume", "submit_for_review", "complete", "fail", "release"})
#: what must be told why
WITH_REASON: Final = frozenset({"reject", "fail", "block", "retry"})

_WAYS: Final[dict[TaskState, tuple[str, ...]]] = {
    _S.BACKLOG: ("shelve",),
    _S.PENDING: (),
    _S.ASSIGNED: ("claim",),
    _S.ACTIVE: ("claim", "start"),
    _S.PAUSED: ("claim", "start", "pause"),
    _S.REVIEW: ("claim", "start", "submit_for_review"),
    _S.APPROVED: ("claim", "start", "submit_for_review", "approve"),
    _S.BLOCKED: ("block",),
    _S.DONE: ("claim", "start", "complete"),
    _S.FAILED: ("claim", "start", "fail"),
    _S.CANCELLED: ("cancel",),
    _S.SKIPPED: ("skip",),
    _S.DEAD: ("claim", "start", "die"),
}


def allows(op: str, state: TaskState) -> bool:
    """Whether the table lets an operation leave a state."""
    to, start = MOVES[op]
    return to in NEXT[state] and (start is None or state in start)


def do(tasks: TaskLedger, op: str, task: str | Claim, who: str | None = None) -> Task:
    """An operation by its name, with a reason where it needs one."""
    given = ("because",) if op in WITH_REASON else ()
    by = {} if who is None else {"agent" if op in BY_HOLDER else "actor": who}
    done: Task = getattr(tasks, op)(task, *given, **by)
    return done


def bring(tasks: TaskLedger, state: TaskState, task_id: str = "t", agent: str = "holder") -> Claim | None:
    """Add a task and bring it into a state; the claim of who has or had it, if anybody."""
    deps = [tasks.add_task(f"{task_id}-before").id] if state == _S.SKIPPED else []
    tasks.add_task(task_id, dependencies=deps, max_retries=int(state == _S.DEAD))
    claim: Claim | None = None
    for step in _WAYS[state]:
        if step == "claim":
            claim = claimed(tasks, task_id, agent)
        elif step == "skip":
            tasks.cancel(deps[0])
        elif step == "die":
            claim = _die(tasks, claim, agent)
        else:
            do(tasks, step, claim or task_id)
    assert state == tasks.get(task_id).state
    return claim


def _die(tasks: TaskLedger, claim: Claim | None, agent: str) -> Claim:
    assert claim is not None
    tasks.fail(claim, "once", retry_in=0)
    again = begun(tasks, claim.id, agent)
    tasks.fail(again, "and again")
    return again


def claimed(tasks: TaskLedger, task_id: str, agent: str = "holder", lease: float | None = None) -> Claim:
    """The claim of a task that must be free."""
    claim = tasks.claim_task(task_id, agent, lease=lease)
    assert claim is not None, tasks.get(task_id)
    return claim


def begun(tasks: TaskLedger, task_id: str, agent: str = "holder") -> Claim:
    """The same, and started."""
    claim = claimed(tasks, task_id, agent)
    tasks.start(claim)
    return claim


def begun_last(tasks: TaskLedger, task_id: str) -> Claim:
    """A task with one retry, begun again after it failed once: nothing is left after this run."""
    tasks.fail(begun(tasks, task_id), "x", retry_in=0)
    return begun(tasks, task_id)


def finished(tasks: TaskLedger, task_id: str, result: Any = None) -> Task:
    """A free task claimed, begun and completed."""
    return tasks.complete(begun(tasks, task_id), result)


def everything(tasks: TaskLedger) -> tuple[list[Row], list[TaskEvent]]:
    """All that a session holds, to compare before with after."""
    return rows(tasks), list(tasks.events())


def rows(tasks: TaskLedger) -> list[Row]:
    """The tasks of a session as the store keeps them."""
    wanted, found = Wanted(), []
    while page := tasks.store.read(tasks.session, lambda book: book.page(wanted, _PAGE)):
        found += page
        wanted.after = page[-1].num
    return found


def after(*names: str | Dep) -> tuple[Dep, ...]:
    """Dependencies on these tasks."""
    return dependencies_from(names)


def ids(tasks: Sequence[Task]) -> list[str]:
    """Their names, in their order."""
    return [task.id for task in tasks]


# -- what must hold whatever was done --


def faults(tasks: TaskLedger) -> list[str]:
    """What is wrong with the session, in words; [] if nothing is."""
    told = list(tasks.events())
    kept = {row.task.id: row for row in rows(tasks)}
    names = list(kept)
    edges = tasks.store.read(tasks.session, lambda book: list(book.dependencies(names)))
    waits: dict[str, dict[str, str]] = {name: {} for name in names}
    for edge in edges:
        waits[edge.task][edge.on] = edge.on_failure
    return [
        *_faults_of_events(told, kept),
        *(fault for row in kept.values() for fault in _faults_of_row(row)),
        *(fault for row in kept.values() for fault in _faults_of_waiting(row.task, waits[row.task.id], kept)),
        *_faults_of_offers(tasks, kept),
    ]


def _faults_of_events(told: Sequence[TaskEvent], kept: dict[str, Row]) -> Iterator[str]:
    made: dict[str, Task] = {}
    seals: dict[str, str] = {}
    if sorted({event.seq for event in told}) != [event.seq for event in told]:
        yield "events are not in the order of their numbers"
    for event in told:
        before = made.get(event.task)
        where = f"{event.task} event {event.n}"
        if event.n != (before.version if before else 0) + 1:
            yield f"{where}: a number is missing before it"
        if event.from_state != (before.state.value if before else ""):
            yield f"{where}: it begins in {event.from_state!r}, not where the task was"
        if before and event.from_state != event.to_state and event.to_state not in NEXT[before.state]:
            yield f"{where}: {event.from_state} to {event.to_state} is not in the table"
        if event.hash != hash_of(seals.get(event.task, ""), columns_of(event)):
            yield f"{where}: it is not sealed"
        made[event.task], seals[event.task] = apply(before, event), event.hash
    for name in made.keys() | kept.keys():
        row = kept.get(name)
        if row is None or made.get(name) != row.task or seals[name] != row.hash:
            yield f"{name}: its events make {made.get(name)}, and it is kept as {row}"


def _faults_of_row(row: Row) -> Iterator[str]:
    task = row.task
    if task.state in HELD and not task.assignee:
        yield f"{task.id}: {task.state.name} and nobody has it"
    if row.until and task.state not in LEASED:
        yield f"{task.id}: {task.state.name} with a lease"
    if (task.completed_at is not None) != (task.state in ENDED):
        yield f"{task.id}: {task.state.name}, and completed at {task.completed_at}"
    if not 0 <= task.retries <= (task.max_retries or TAKEOVERS):
        yield f"{task.id}: {task.retries} retries of {task.max_retries}"


def _faults_of_waiting(task: Task, waits: dict[str, str], kept: dict[str, Row]) -> Iterator[str]:
    if waits != {dep.id: dep.on_failure for dep in task.depends_on}:
        yield f"{task.id}: it waits for {waits} and says {task.depends_on}"
    states = {name: kept[name].task.state for name in waits}
    is_open = [
        name
        for name, on in waits.items()
        if states[name] != _S.DONE and not (on == "run" and states[name] in LOST)
    ]
    if len(is_open) != task.waiting:
        yield f"{task.id}: it counts {task.waiting} open dependencies, and they are {is_open}"
    hopeless = [name for name in is_open if states[name] in LOST]
    if hopeless and task.state not in ENDED:
        yield f"{task.id}: {task.state.name}, and it waits for ever for {hopeless}"
    if not is_open and task.state == _S.BLOCKED and task.reason == WAITS_FOR_PARTS:
        yield f"{task.id}: its parts are done and it does not go on"


def _faults_of_offers(tasks: TaskLedger, kept: dict[str, Row]) -> Iterator[str]:
    now = at(tasks.store.read(tasks.session, lambda book: book.now))
    free = [row for row in kept.values() if row.task.state == _S.PENDING and not row.task.waiting]
    due = [row for row in free if row.task.not_before is None or row.task.not_before <= now]
    offered = set(ids(tasks.get_parallel_executable_tasks(limit=len(kept) + 1)))
    if missed := {row.task.id for row in due} - offered:
        yield f"ready and not offered: {sorted(missed)}"
    if wrong := offered - {row.task.id for row in free}:
        yield f"offered and not ready: {sorted(wrong)}"


class TaskConformance:
    """What every store of tasks promises. Subclass it, give `make`, and let pytest find the subclass."""

    #: other processes reach the same tasks through `again`
    is_shared = False
    #: leases are judged by the clock that `make` was given; if not, time really passes
    takes_clock = True
    #: seconds; a store with a clock of its own is waited for so long
    lease = 300.0
    #: how many tasks the races and the long chains have
    many = 60

    def make(self, folder: Path, clock: Clock) -> TaskStore:
        """A new and empty store; `folder` is empty and for it alone."""
        raise NotImplementedError(
            f"{type(self).__name__} must say how its store is made: make(folder, clock)"
        )

    def again(self, store: TaskStore) -> TaskStore:
        """The same tasks through another handle, as another process has it."""
        raise NotImplementedError(f"{type(self).__name__} is_shared and must say how: again(store)")

    def advance(self, store: TaskStore, clock: FakeClock, seconds: float) -> None:
        """Let time pass for whoever decides leases."""
        if self.takes_clock:
            clock.advance(seconds)
        else:
            time.sleep(seconds)  # nothing to wait for but the time itself

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The only thing that is not real."""
        return FakeClock()

    @pytest.fixture
    def store(self, tmp_path: Path, clock: FakeClock) -> Iterator[TaskStore]:
        """An empty store."""
        made = self.make(tmp_path, clock)
        yield made
        made.close()

    @pytest.fixture
    def tasks(self, store: TaskStore) -> Iterator[TaskLedger]:
        """A ledger on it; afterwards all that was written agrees."""
        made = TaskLedger(store, agent="me", lease=self.lease)
        yield made
        for session in made.sessions():
            assert [] == faults(made.in_session(session))

    def later(self, tasks: TaskLedger, leases: float) -> Any:
        """A time by the store's clock, so many leases from now."""
        now = at(tasks.store.read(tasks.session, lambda book: book.now))
        return now + timedelta(seconds=self.lease * leases)

    def refused(self, tasks: TaskLedger, error: type[E] | tuple[type[E], ...], work: Callable[[], Any]) -> E:
        """The error that something must raise, having changed nothing."""
        before = everything(tasks)
        with pytest.raises(error) as caught:
            work()
        assert before == everything(tasks)
        return caught.value

    # -- adding --

    def test_a_task_is_added_pending(self, tasks: TaskLedger) -> None:
        """An id and a description are enough; the task is PENDING and can be begun."""
        task = tasks.add_task(Task(id="a", description="do it"))

        assert (_S.PENDING, 1, "main") == (task.state, task.version, task.session)
        assert [task] == tasks.list_tasks() == tasks.get_parallel_executable_tasks()
        assert "a" in tasks
        assert "b" not in tasks

    def test_all_that_was_given_is_kept(self, tasks: TaskLedger) -> None:
        """Every field that a task may be given comes back as it was."""
        tasks.add_task("p")
        given = Task(
            id="a", description="d", title="t", type="mine", priority=9, tags=("x", "y"), parent="p",
            capabilities=("gpu",), not_before=self.later(tasks, 2), deadline=self.later(tasks, 3), max_retries=4,
        )  # fmt: skip
        tasks.add_task(given)

        found = tasks.get("a")

        for name in (
            "description",
            "title",
            "type",
            "priority",
            "tags",
            "parent",
            "capabilities",
            "max_retries",
        ):
            assert getattr(given, name) == getattr(found, name)
        assert (given.not_before, given.deadline) == (found.not_before, found.deadline)

    def test_a_backlog_task_is_offered_to_nobody(self, tasks: TaskLedger) -> None:
        """What is kept for later waits until somebody puts it among the others."""
        tasks.add_task("a", backlog=True)
        assert (None, None) == (tasks.claim_next(), tasks.claim_task("a"))

        tasks.unshelve("a")

        assert tasks.claim_next() is not None

    def test_a_duplicate_is_refused(self, tasks: TaskLedger) -> None:
        """An id is given once in a session, also within one request."""
        tasks.add_task("a")

        error = self.refused(tasks, DuplicateTask, lambda: tasks.add_task("a"))
        self.refused(tasks, DuplicateTask, lambda: tasks.add_tasks([Task("b"), Task("b")]))

        assert "a" == error.task_id
        assert "'a'" in str(error)

    @pytest.mark.parametrize("fields", [{"dependencies": ["nobody"]}, {"parent": "nobody"}])
    def test_an_unknown_dependency_or_parent_is_refused(
        self, tasks: TaskLedger, fields: dict[str, Any]
    ) -> None:
        """Nothing waits for what is not there."""
        error = self.refused(tasks, NoSuchTask, lambda: tasks.add_task("a", **fields))

        assert "nobody" == error.task_id

    def test_several_are_added_whole_or_not_at_all(self, tasks: TaskLedger) -> None:
        """One that is refused keeps out all that came with it."""
        for bad in (
            Task("c", depends_on=after("nobody")),
            Task("a"),
            Task("c", priority=11),
            Task("c", parent="c"),
        ):
            self.refused(tasks, LedgerError, functools.partial(tasks.add_tasks, [Task("a"), Task("b"), bad]))

        assert [] == tasks.list_tasks()

    def test_several_may_come_in_any_order(self, tasks: TaskLedger) -> None:
        """A task may stand before what it depends on, in one request."""
        tasks.add_tasks([Task("b", depends_on=after("a")), Task("a")])

        assert ["a"] == ids(tasks.get_parallel_executable_tasks())
        assert ("b",) == tasks.get("a").blocks

    @pytest.mark.parametrize(
        "new",
        [
            [Task("a", depends_on=after("a"))],
            [Task("a", parent="a")],
            [
                Task("a", depends_on=after("b")),
                Task("b", depends_on=after("c")),
                Task("c", depends_on=after("a")),
            ],
            [Task("a", parent="b"), Task("b", parent="a")],
            [Task("a"), Task("b", parent="a", depends_on=after("a"))],
            [Task("a"), Task("b", parent="a", depends_on=after("c")), Task("c", depends_on=after("a"))],
        ],
    )
    def test_a_cycle_is_refused(self, tasks: TaskLedger, new: list[Task]) -> None:
        """Tasks never wait for each other, by dependencies or as parts; the error shows the way round."""
        error = self.refused(tasks, DependencyCycle, lambda: tasks.add_tasks(new))

        assert error.path[0] == error.path[-1]
        assert set(error.path) <= {task.id for task in new}
        assert all(name in str(error) for name in error.path)

    def test_a_cycle_is_refused_later_too(self, tasks: TaskLedger) -> None:
        """Neither a new dependency nor a new part closes a way that was open."""
        tasks.add_tasks([Task("a"), Task("b", depends_on=after("a")), Task("c", depends_on=after("b"))])

        for close in (
            lambda: tasks.add_dependency("a", "c"),
            lambda: tasks.add_dependency("a", "a"),
            lambda: tasks.add_subtasks("a", [Task("d", depends_on=after("c"))]),
        ):
            error = self.refused(tasks, DependencyCycle, close)
            assert error.path[0] == error.path[-1]

    def test_two_cannot_close_a_cycle_together(self, tasks: TaskLedger) -> None:
        """Of two dependencies that are added at once and would make a circle, one is refused."""
        for turn in range(10):
            names = [f"a{turn}", f"b{turn}"]
            tasks.add_tasks([Task(name) for name in names])

            def close(number: int, names: list[str] = names) -> str:
                try:
                    return tasks.add_dependency(names[number], names[1 - number]).id
                except DependencyCycle:
                    return "refused"

            assert 1 == in_parallel(2, close).count("refused")

    # -- choosing and claiming --

    def test_the_most_urgent_then_the_oldest_is_claimed(self, tasks: TaskLedger) -> None:
        """Higher priority comes first; among equals whoever was added first, whatever their type."""
        tasks.add_tasks(
            [
                Task("c"),
                Task("low", priority=1),
                Task("a", priority=10),
                Task("d", type="other"),
                Task("b", priority=9),
            ]
        )
        offered = ids(tasks.get_parallel_executable_tasks())

        taken = [claim.id for claim in iter(tasks.claim_next, None)]

        assert ["a", "b", "c", "d", "low"] == offered == taken

    def test_a_claim_is_somebodys(self, tasks: TaskLedger) -> None:
        """Who claims has the task; nobody else gets it, and the next asks in vain."""
        tasks.add_task("a")

        claim = claimed(tasks, "a", "ann")

        task = tasks.get("a")
        assert (_S.ASSIGNED, "ann", claim.task) == (task.state, task.assignee, task)
        assert (None, None) == (tasks.claim_next("bob"), tasks.claim_task("a", "bob"))

    def test_not_before_is_kept(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """A task is offered from its time on, and by its priority then."""
        tasks.add_tasks([Task("soon", priority=9, not_before=self.later(tasks, 1)), Task("now")])
        assert ["now"] == ids(tasks.get_parallel_executable_tasks())
        assert None is tasks.claim_task("soon")

        self.advance(store, clock, self.lease * 1.01)

        assert ["soon", "now"] == ids(tasks.get_parallel_executable_tasks())
        assert ["soon", "now"] == [claim.id for claim in iter(tasks.claim_next, None)]

    def test_a_time_long_past_keeps_nothing_back(self, tasks: TaskLedger) -> None:
        """A not-before in any year that has gone is no reason to wait."""
        tasks.add_tasks([{"id": "a", "not_before": 0.0}, {"id": "b", "not_before": -86_400.0}])

        assert ["a", "b"] == [claim.id for claim in iter(tasks.claim_next, None)]

    def test_capabilities_choose(self, tasks: TaskLedger) -> None:
        """Who claims gets what needs nothing beyond what it can do."""
        tasks.add_tasks(
            [
                Task("both", capabilities=("cpu", "gpu")),
                Task("gpu", capabilities=("gpu",)),
                Task("any", priority=1),
            ]
        )

        assert ["any"] == ids(tasks.get_available("ann"))
        assert ["gpu", "any"] == ids(tasks.get_available("ann", ["gpu", "ssd"]))
        assert ["both", "gpu", "any"] == ids(tasks.get_available("ann", ["gpu", "cpu"]))
        taken = [tasks.claim_next(capabilities=able) for able in ((), (), ["gpu"], ["gpu"], None, None)]
        assert ["any", None, "gpu", None, "both", None] == [claim and claim.id for claim in taken]

    def test_types_choose(self, tasks: TaskLedger) -> None:
        """Who asks for types gets no other."""
        tasks.add_tasks([Task("a", type="x", priority=9), Task("b", type="y"), Task("c", type="z\"'")])

        taken = [tasks.claim_next(types=wanted) for wanted in (["y"], ["y"], [], ["z\"'", "x"], None)]

        assert ["b", None, None, "a", "c"] == [claim and claim.id for claim in taken]

    def test_a_dependency_keeps_back(self, tasks: TaskLedger) -> None:
        """A task waits until all that it depends on are done, and then becomes ready by that."""
        tasks.add_tasks([Task("a"), Task("b"), Task("c", priority=9, depends_on=after("a", "b"))])
        assert (2, None) == (tasks.get("c").waiting, tasks.claim_task("c"))
        finished(tasks, "a")
        assert ["b"] == ids(tasks.get_parallel_executable_tasks())

        ready = tasks.complete_task_and_route("b")

        assert ["c"] == ids(ready) == ids(tasks.get_parallel_executable_tasks())

    def test_a_dependency_on_what_is_done_is_met(self, tasks: TaskLedger) -> None:
        """What depends on a task that has been done already can be begun at once."""
        tasks.add_task("a")
        finished(tasks, "a")

        tasks.add_dynamic_task(task_id="b", description="after it", dependencies=["a"])

        assert ["b"] == ids(tasks.get_parallel_executable_tasks())

    def test_a_dependency_may_come_later(self, tasks: TaskLedger) -> None:
        """A task that nobody has begun can be given one more to wait for; asked twice, it changes once."""
        tasks.add_tasks([Task("a"), Task("b")])
        first, second = tasks.add_dependency("b", "a"), tasks.add_dependency("b", "a")

        assert first == second
        assert (("a",), ["a"]) == (
            tuple(dep.id for dep in tasks.get("b").depends_on),
            ids(tasks.get_parallel_executable_tasks()),
        )
        begun(tasks, "a")
        self.refused(tasks, TaskError, lambda: tasks.add_dependency("a", tasks.get("b")))

    def test_threads_claim_each_task_once(self, tasks: TaskLedger) -> None:
        """However many ask at once, every task is claimed by one of them."""
        tasks.add_tasks([Task(f"t{n}", priority=1 + n % 10, type=f"x{n % 3}") for n in range(self.many)])

        taken = in_parallel(
            8, lambda n: [claim.id for claim in iter(lambda: tasks.claim_next(f"w{n}"), None)]
        )

        assert sorted(f"t{n}" for n in range(self.many)) == sorted(name for some in taken for name in some)

    def test_one_of_many_gets_a_task(self, tasks: TaskLedger) -> None:
        """Threads that claim the same task at once: one has it, all others are told nothing is free."""
        tasks.add_task("a")

        claims = in_parallel(8, lambda n: tasks.claim_task("a", f"w{n}"))

        [won] = [claim for claim in claims if claim]
        assert won.agent == tasks.get("a").assignee

    def test_processes_claim_each_task_once(self, tasks: TaskLedger) -> None:
        """Four processes that claim at once: every task is claimed, begun and done by one of them."""
        if not self.is_shared:
            return
        names = [f"t{n}" for n in range(self.many)]
        tasks.add_tasks(
            [
                Task(name, depends_on=after(*names[max(0, n - 8) : max(0, n - 7)]))
                for n, name in enumerate(names)
            ]
        )
        context = multiprocessing.get_context("fork")
        answers, gate = context.SimpleQueue(), context.Barrier(4)
        children = [
            context.Process(target=self._work_off, args=(tasks.store, gate, answers, n)) for n in range(4)
        ]
        for child in children:
            child.start()
        done = [name for _ in children for name in json.loads(answers.get())]
        for child in children:
            child.join(60)

        assert sorted(names) == sorted(done)
        assert [child.exitcode for child in children] == [0] * 4
        assert {_S.DONE: self.many} == tasks.counts()

    def _work_off(self, store: TaskStore, gate: Any, answers: Any, number: int) -> None:
        mine = TaskLedger(self.again(store), agent=f"process {number}", lease=60)
        gate.wait(60)
        done: list[str] = []
        while mine.counts().get(_S.DONE, 0) < self.many:
            claim = mine.claim_next()
            if claim is None:
                time.sleep(0.002)  # what is left waits for what another process is doing
                continue
            mine.start(claim)
            mine.complete(claim)
            done.append(claim.id)
        mine.close()
        answers.put(json.dumps(done))

    # -- moving --

    @pytest.mark.parametrize("state", TaskState)
    @pytest.mark.parametrize("op", MOVES)
    def test_an_operation_moves_by_the_table_or_not_at_all(
        self, tasks: TaskLedger, state: TaskState, op: str
    ) -> None:
        """From every state, each operation goes where the table says, or raises and changes nothing."""
        claim = bring(tasks, state)
        who = "holder" if allows(op, state) else "somebody"

        if not allows(op, state):
            error = self.refused(tasks, InvalidTransition, lambda: do(tasks, op, "t", who))
            assert (state, MOVES[op][0], NEXT[state]) == (error.state, error.wanted, error.legal)
            assert all(name in str(error) for name in (state.name, *(s.name for s in NEXT[state])))
            return
        moved = do(tasks, op, claim if claim and op in BY_HOLDER else "t", None if claim else who)
        assert MOVES[op][0] == moved.state == tasks.get("t").state

    @pytest.mark.parametrize("state", sorted(FINAL))
    def test_a_final_state_is_final(self, tasks: TaskLedger, state: TaskState) -> None:
        """DONE, CANCELLED and SKIPPED are left by nothing, not even by recovery or a claim."""
        bring(tasks, state)
        before = tasks.get("t")

        for op in MOVES.keys() - {"complete", "cancel"}:
            with pytest.raises((InvalidTransition, NotHolder)):
                do(tasks, op, "t", "somebody")

        assert (None, []) == (tasks.claim_task("t"), tasks.recover())
        assert before == tasks.get("t")

    @pytest.mark.parametrize("op", MOVES)
    def test_an_operation_asked_again_by_the_same_changes_nothing(self, tasks: TaskLedger, op: str) -> None:
        """Whoever did not get the reply asks again and gets it; nothing happens twice."""
        state = next(state for state in TaskState if allows(op, state))
        claim = bring(tasks, state)
        target: str | Claim = claim if claim and op in BY_HOLDER else "t"
        first = do(tasks, op, target)
        before = everything(tasks)

        second = do(tasks, op, target)

        assert (first, before) == (second, everything(tasks))

    @pytest.mark.parametrize("op", MOVES)
    def test_an_operation_on_another_version_is_refused(self, tasks: TaskLedger, op: str) -> None:
        """Who read an older version learns both numbers; who read this one goes on."""
        state = next(state for state in TaskState if allows(op, state))
        claim = bring(tasks, state)
        target: str | Claim = claim if claim and op in BY_HOLDER else "t"
        given = ("because",) if op in WITH_REASON else ()
        version = tasks.get("t").version

        error = self.refused(
            tasks, Conflict, lambda: getattr(tasks, op)(target, *given, expected_version=version - 1)
        )

        assert (version - 1, version) == (error.expected, error.actual)
        assert getattr(tasks, op)(target, *given, expected_version=version).version > version

    @pytest.mark.parametrize("op", sorted(BY_HOLDER))
    def test_a_stranger_moves_nothing_that_somebody_has(self, tasks: TaskLedger, op: str) -> None:
        """Only its holder starts, pauses, resumes, submits, completes, fails or releases a task."""
        state = next(state for state in TaskState if allows(op, state))
        bring(tasks, state)

        error = self.refused(tasks, NotHolder, lambda: do(tasks, op, "t", "somebody"))

        assert ("t", "holder") == (error.task_id, error.holder)

    def test_a_stranger_reports_nothing(self, tasks: TaskLedger) -> None:
        """Checkpoints, progress and artifacts are the holder's word."""
        bring(tasks, _S.ACTIVE)

        for report in (
            lambda: tasks.checkpoint("t", 1, agent="somebody"),
            lambda: tasks.progress("t", 0.5, agent="somebody"),
            lambda: tasks.add_artifact("t", "x", agent="somebody"),
        ):
            self.refused(tasks, NotHolder, report)

    def test_what_a_holder_reports_is_kept(self, tasks: TaskLedger) -> None:
        """Checkpoint, progress, stage, artifacts and costs stand in the task, for the next holder too."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.checkpoint(claim, {"page": 7})
        tasks.progress(claim, 0.25, "reading", cost=0.5, tokens=10, api_calls=1)
        tasks.add_artifact(claim, "report", "s3://x")
        tasks.release(claim)

        again = claimed(tasks, "t", "other").task

        assert ({"page": 7}, 0.25, "reading") == (again.checkpoint, again.progress, again.stage)
        assert (0.5, 10, 1) == (again.cost, again.tokens, again.api_calls)
        assert again.checkpoint_at is not None
        [artifact] = again.artifacts
        assert ("report", "s3://x") == (artifact["name"], artifact["value"])

    def test_an_account_is_a_sum(self, tasks: TaskLedger) -> None:
        """Costs of all reports and of the end are added up."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.progress(claim, 0.5, cost=1, tokens=2, api_calls=3)

        done = tasks.complete(claim, cost=10, tokens=20, api_calls=30)

        assert (11, 22, 33) == (done.cost, done.tokens, done.api_calls)

    def test_a_task_goes_through_review(self, tasks: TaskLedger) -> None:
        """Its result is kept while it is rejected, submitted again, approved and completed."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.submit_for_review(claim, "draft")
        tasks.reject("t", "too short", actor="reviewer")
        tasks.submit_for_review(claim, "final")
        tasks.approve("t", actor="reviewer")

        done = tasks.complete(claim)

        states = [event.to_state for event in tasks.events("t")][3:]
        assert ["review", "active", "review", "approved", "done"] == states
        assert ("final", "holder") == (done.result, done.assignee)

    @pytest.mark.parametrize("value", [None, 0, "", [], {}, False, 0.1, 10**30, {"a": [1, {"b": None}]}])
    def test_values_come_back_as_they_were(self, tasks: TaskLedger, value: Any) -> None:
        """Falsy, exact and nested results and checkpoints are kept, and never taken for none."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.checkpoint(claim, value)
        tasks.complete(claim, value)

        found = tasks.get("t")

        assert [(value, type(value))] * 2 == [(one, type(one)) for one in (found.checkpoint, found.result)]

    def test_large_values_are_kept(self, tasks: TaskLedger) -> None:
        """A result of a megabyte is a result."""
        tasks.add_task("t", description="d" * 100_000)

        finished(tasks, "t", "x" * 1_000_000)

        assert "x" * 1_000_000 == tasks.get("t").result

    @pytest.mark.parametrize(
        "text", [" ", "a'b\"c\\", "%_*?", "; DROP TABLE tasks; --", "é\u0301🙂", "{}[]:~", "…" * 300]
    )
    def test_odd_names_are_kept_apart(self, tasks: TaskLedger, text: str) -> None:
        """An id, a type, a tag or an agent is any text without control characters."""
        tasks.add_task(Task(text, type=text, tags=(text,), capabilities=(text,), title="x\n\0\ud800"))
        tasks.add_task(Task(text + "2", depends_on=after(text)))

        claim = tasks.claim_next(text, capabilities=[text], types=[text])

        assert claim is not None
        assert [text] == ids(tasks.list_tasks(tag=text)) == ids(tasks.list_tasks(type=text, assignee=text))
        assert "x\n\0\ud800" == tasks.get(text).title
        assert (text + "2",) == tasks.get(text).blocks

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, b"x"])
    def test_what_is_no_json_is_refused(self, tasks: TaskLedger, value: Any) -> None:
        """A value that cannot be kept is refused before anything changes."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None

        for report in (
            lambda: tasks.complete(claim, value),
            lambda: tasks.checkpoint(claim, value),
            lambda: tasks.add_artifact(claim, "x", value),
        ):
            self.refused(tasks, UsageError, report)

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": ""},
            {"id": "a\nb"},
            {"priority": 0},
            {"priority": True},
            {"max_retries": -1},
            {"tags": "one"},
            {"not_before": "soon"},
            {"deadline": 1e30},
            {"colour": "red"},
            {"dependencies": [Dep("x", "sometimes")]},  # type: ignore[arg-type]
        ],
    )
    def test_an_odd_task_is_refused(self, tasks: TaskLedger, fields: dict[str, Any]) -> None:
        """A field that no task can have is an error of the caller, and adds nothing."""
        tasks.add_task("x")

        self.refused(tasks, UsageError, lambda: tasks.add_task(**{"id": "a", **fields}))

    @pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf"), 1e300])
    def test_an_odd_lease_is_refused(self, tasks: TaskLedger, lease: float) -> None:
        """A lease is a number of seconds that ends."""
        tasks.add_task("a")

        self.refused(tasks, UsageError, lambda: tasks.claim_next(lease=lease))

    @pytest.mark.parametrize("pause", [float("nan"), float("inf"), 1e18, -1.0])
    def test_an_odd_back_off_is_refused(self, tasks: TaskLedger, pause: float) -> None:
        """A retry comes after a number of seconds from 0 on."""
        tasks.add_task("a", max_retries=1)
        claim = begun(tasks, "a")

        self.refused(tasks, UsageError, lambda: tasks.fail(claim, "x", retry_in=pause))

    def test_what_is_given_back_may_rest(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """`release(retry_in=…)` offers it again later, and counts no retry."""
        tasks.add_task("a")

        back = tasks.release(begun(tasks, "a"), "the service is down", retry_in=self.lease)

        assert (_S.PENDING, 0, None) == (back.state, back.retries, tasks.claim_next("other"))
        self.advance(store, clock, self.lease * 1.01)
        assert tasks.claim_next("other") is not None

    def test_a_claim_may_begin_at_once(self, tasks: TaskLedger) -> None:
        """`start=True` claims and begins in one step; both are events, and the claim is good for all that follows."""
        tasks.add_tasks([Task("a"), Task("b")])

        claims = [tasks.claim_next("me", start=True), tasks.claim_task("b", "me", start=True)]

        assert [("a", _S.ACTIVE), ("b", _S.ACTIVE)] == [(c.id, c.task.state) for c in claims if c]
        assert ["assigned", "active"] == [event.to_state for event in tasks.events(task="a")][1:]
        assert all(claim and tasks.complete(claim).state == _S.DONE for claim in claims)

    def test_parts_are_numbered_by_whoever_adds_them_at_once(self, tasks: TaskLedger) -> None:
        """Several that add parts by their descriptions get numbers of their own, around ids that are taken."""
        tasks.add_task("p")
        tasks.add_subtasks("p", [Task("p.3"), "one"])

        in_parallel(4, lambda n: tasks.add_subtasks("p", [f"a{n}", f"b{n}"]))

        numbers = sorted(int(task.id.removeprefix("p.")) for task in tasks.tasks(parent="p"))
        assert [1, *range(3, 12)] == numbers

    # -- leases --

    def test_a_lapsed_claim_is_taken_back(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """What was claimed and never begun is PENDING again, and no retry is counted."""
        tasks.add_task("a")
        claim = claimed(tasks, "a")
        assert ([], []) == (tasks.stale_tasks(), tasks.recover())
        self.advance(store, clock, self.lease * 1.01)
        assert ["a"] == ids(tasks.stale_tasks())

        back = tasks.recover()

        assert [("a", _S.PENDING, 0, "")] == [(t.id, t.state, t.retries, t.assignee) for t in back]
        assert ("holder" in back[0].reason, False) == (True, tasks.heartbeat(claim))

    @pytest.mark.parametrize(("limit", "lapses"), [(0, 3), (1, 1)])
    def test_a_lapsed_run_counts(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock, limit: int, lapses: int
    ) -> None:
        """What was begun is begun again while retries are left (without a limit, three times), and then is DEAD."""
        tasks.add_task("a", max_retries=limit)
        states = []

        for _ in range(lapses + 1):
            begun(tasks, "a")
            self.advance(store, clock, self.lease * 1.01)
            tasks.recover()
            states.append(tasks.get("a").state)

        found = tasks.get("a")
        assert [*[_S.PENDING] * lapses, _S.DEAD] == states
        assert (lapses, lapses + 1) == (found.retries, len(found.errors))
        assert "silent" in found.reason
        assert f"its {lapses} retries are used up" in found.reason

    def test_a_lapsed_task_is_claimed_without_asking_for_recovery(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """Who finds nothing free gets what a dead agent left, and what was waiting for that."""
        tasks.add_tasks(
            [Task("left"), Task("lost", max_retries=1), Task("after", depends_on=(Dep("lost", "run"),))]
        )
        begun_last(tasks, "lost")
        claimed(tasks, "left")
        assert None is tasks.claim_next("other")
        self.advance(store, clock, self.lease * 1.01)

        taken = [claim.id for claim in iter(lambda: tasks.claim_next("other"), None)]

        assert ["left", "after"] == taken

    def test_what_is_freed_by_a_death_alone_is_claimed(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """Also when nothing that lapsed can be done again, what runs all the same is found at once."""
        tasks.add_tasks([Task("lost", max_retries=1), Task("after", depends_on=(Dep("lost", "run"),))])
        begun_last(tasks, "lost")
        self.advance(store, clock, self.lease * 1.01)

        claim = tasks.claim_next("other")

        assert claim is not None
        assert "after" == claim.id

    def test_a_heartbeat_keeps_a_claim(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """Every sign of life lets the lease begin anew."""
        tasks.add_task("a")
        claim = begun(tasks, "a")
        signs: list[Callable[[], object]] = [
            lambda: tasks.heartbeat(claim),
            lambda: tasks.progress(claim, 0.5),
            lambda: tasks.checkpoint(claim, 1),
        ]
        for sign in signs:
            self.advance(store, clock, self.lease * 0.6)
            assert sign()

        self.advance(store, clock, self.lease * 0.6)

        assert ([], [], True) == (tasks.stale_tasks(), tasks.recover(), tasks.heartbeat(claim))

    @pytest.mark.parametrize("state", [_S.PAUSED, _S.REVIEW, _S.APPROVED, _S.BLOCKED])
    def test_what_waits_for_a_person_is_not_stale(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock, state: TaskState
    ) -> None:
        """No lease runs while a task is paused, in review or blocked."""
        bring(tasks, state)
        self.advance(store, clock, self.lease * 2)

        assert ([], []) == (tasks.stale_tasks(), tasks.recover())
        assert state == tasks.get("t").state

    def test_a_lease_runs_again_after_a_pause(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """Who resumes must be heard again, and the lease begins then."""
        claim = bring(tasks, _S.PAUSED)
        assert claim is not None
        self.advance(store, clock, self.lease * 2)
        tasks.resume(claim)
        assert [] == tasks.stale_tasks()

        self.advance(store, clock, self.lease * 1.01)

        assert ["t"] == ids(tasks.stale_tasks())

    def test_silence_is_seen_before_the_lease_lapses(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """`older_than` finds whoever said nothing for so long; looking takes nothing away."""
        bring(tasks, _S.ACTIVE)
        self.advance(store, clock, self.lease / 2)

        assert ["t"] == ids(tasks.stale_tasks(self.lease / 3))
        assert ([], []) == (tasks.stale_tasks(self.lease), tasks.recover())

    def test_the_late_word_of_a_lost_claim_is_refused(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """Whoever was taken for dead changes nothing any more, whoever has the task now, and is told so."""
        tasks.add_task("a", max_retries=9)
        late = begun(tasks, "a", "ann")
        self.advance(store, clock, self.lease * 1.01)
        tasks.recover()
        for successor in ("", "bob", "ann"):
            if successor:
                begun(tasks, "a", successor)
            for op in sorted(BY_HOLDER):
                self.refused(tasks, NotHolder, lambda op=op: do(tasks, op, late))  # type: ignore[misc]
            self.refused(tasks, NotHolder, lambda: tasks.checkpoint(late, 1))
            assert not tasks.heartbeat(late)
            if successor:
                tasks.release("a", agent=successor)

    def test_recovery_is_done_once(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """Several that recover at once bring each task back once, and touch nothing that lives."""
        names = [f"t{n}" for n in range(self.many)]
        tasks.add_tasks([Task(name, max_retries=3) for name in [*names, "alive"]])
        for name in names:
            begun(tasks, name)
        self.advance(store, clock, self.lease * 1.01)
        begun(tasks, "alive")

        back = in_parallel(4, lambda _: ids(tasks.recover()))

        assert sorted(names) == sorted(name for some in back for name in some)
        assert {1} == {tasks.get(name).retries for name in names}
        assert _S.ACTIVE == tasks.get("alive").state

    # -- failing and trying again --

    def test_a_failure_without_retries_stays(self, tasks: TaskLedger) -> None:
        """With `max_retries=0` a task that failed rests in FAILED, with its error."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None

        failed = tasks.fail(claim, ValueError("broken"))

        assert (_S.FAILED, "ValueError: broken") == (failed.state, failed.errors[0]["error"])
        assert ("holder", None) == (failed.errors[0]["actor"], tasks.claim_next())

    def test_a_task_runs_once_more_than_its_retries(self, tasks: TaskLedger) -> None:
        """`max_retries=2` is three runs; the third failure is the dead-letter list."""
        tasks.add_task("t", max_retries=2)

        ends = [tasks.fail(begun(tasks, "t"), f"error {n}", retry_in=0).state for n in range(3)]

        dead = tasks.get("t")
        assert [_S.PENDING, _S.PENDING, _S.DEAD] == ends
        assert (2, 3, ["t"]) == (dead.retries, len(dead.errors), ids(tasks.dead_letters()))
        told = [event.to_state for event in tasks.events("t") if event.kind == "moved"]
        assert 3 == told.count("failed")

    def test_a_retry_waits(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """Between two runs there is the pause that was asked for."""
        tasks.add_task("t", max_retries=1)
        tasks.fail(begun(tasks, "t"), "x", retry_in=self.lease)
        assert (None, None) == (tasks.claim_next(), tasks.claim_task("t"))

        self.advance(store, clock, self.lease * 1.01)

        assert tasks.claim_next() is not None

    def test_a_pause_grows(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock) -> None:
        """Unless it is told, each pause is twice the one before, and a little more."""
        tasks.add_task("t", max_retries=2)
        pauses = []
        for _ in range(2):
            failed = tasks.fail(begun(tasks, "t"), "x")
            assert failed.not_before is not None
            assert failed.changed_at is not None
            pauses.append((failed.not_before - failed.changed_at).total_seconds())
            self.advance(store, clock, pauses[-1] + 0.01)

        assert 1 <= pauses[0] <= 1.2
        assert 2 <= pauses[1] <= 2.3

    def test_the_dead_come_back_with_a_reason(self, tasks: TaskLedger) -> None:
        """Only `retry` with a reason leaves the dead-letter list; then all its retries are there again."""
        bring(tasks, _S.DEAD)
        self.refused(tasks, TaskError, lambda: tasks.retry("t"))

        back = tasks.retry("t", "the service is up again", actor="ann")

        assert (_S.PENDING, 0, "ann") == (back.state, back.retries, back.changed_by)
        assert "the service is up again" == back.reason
        assert _S.PENDING == tasks.fail(begun(tasks, "t"), "x", retry_in=0).state

    def test_a_failed_task_is_retried_with_a_reason(self, tasks: TaskLedger) -> None:
        """FAILED without a retry left needs one too."""
        bring(tasks, _S.FAILED)
        self.refused(tasks, TaskError, lambda: tasks.retry("t"))

        assert _S.PENDING == tasks.retry("t", "once more").state

    # -- a dependency fails --

    @pytest.mark.parametrize(("policy", "end"), [("skip", _S.SKIPPED), ("fail", _S.FAILED)])
    @pytest.mark.parametrize("loss", ["cancel", "fail", "die", "lapse"])
    def test_a_lost_dependency_ends_its_dependents(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock, policy: Any, end: TaskState, loss: str
    ) -> None:
        """However a dependency is lost, what waits for it is SKIPPED or FAILED, and so on down the chain."""
        tasks.add_task("a", max_retries=int(loss in ("die", "lapse")))
        tasks.add_tasks(
            [Task("b", depends_on=(Dep("a", policy),)), Task("c", depends_on=(Dep("b", policy),))]
        )
        tasks.add_task("later", backlog=True, depends_on=[Dep("c", policy)])
        tasks.add_task("held", depends_on=[Dep("c", policy)])
        tasks.block("held", "for a person")
        tasks.add_task("free", depends_on=[Dep("c", "run")])

        self._lose(tasks, store, clock, loss)

        assert [end] * 4 == [tasks.get(name).state for name in ("b", "c", "later", "held")]
        assert "a" in tasks.get("b").reason
        assert ["free"] == ids(tasks.get_parallel_executable_tasks())

    def _lose(self, tasks: TaskLedger, store: TaskStore, clock: FakeClock, loss: str) -> None:
        if loss == "cancel":
            tasks.cancel("a")
            return
        if loss == "lapse":
            begun_last(tasks, "a")
            self.advance(store, clock, self.lease * 1.01)
            tasks.recover()
        elif loss == "die":
            tasks.fail(begun_last(tasks, "a"), "x")
        else:
            tasks.fail(begun(tasks, "a"), "x")

    def test_a_fresh_retry_begins_a_new_scope(self, tasks: TaskLedger) -> None:
        """Its effects begin anew under another workflow, without the checkpoint; a usual retry keeps both."""
        tasks.add_task("a", payload={"order": [1]})
        scopes = []
        for fresh in (False, True, True):
            claim = begun(tasks, "a")
            tasks.checkpoint(claim, "half")
            tasks.fail(claim, "x")
            again = tasks.retry("a", "once more", fresh=fresh)
            scopes.append((again.scope, again.checkpoint, again.workflow == claim.task.workflow))

        assert [(0, "half", True), (1, None, False), (2, None, False)] == scopes
        assert {"order": [1]} == tasks.get("a").payload
        assert tasks.verify().ok

    def test_no_two_tasks_share_a_workflow(self, tasks: TaskLedger) -> None:
        """Whatever their ids and sessions are, the effects of one are never taken for those of another."""
        names = ["a", "a@b", "a#1", "a%40b"]
        ledgers = [tasks.in_session(name) for name in ("main", "b", "b#1")]
        for one in ledgers:
            one.add_tasks([Task(name) for name in names])

        found = [task.workflow for one in ledgers for task in one.tasks()]

        assert len(found) == len(set(found))

    def test_a_failure_with_a_retry_left_loses_nobody(self, tasks: TaskLedger) -> None:
        """While a dependency will be tried again, what waits for it waits."""
        tasks.add_task("a", max_retries=1)
        tasks.add_tasks([Task("b", depends_on=after("a")), Task("c", depends_on=(Dep("a", "run"),))])

        tasks.fail(begun(tasks, "a"), "x", retry_in=0)

        assert ["a"] == ids(tasks.get_parallel_executable_tasks())
        assert (1, 1) == (tasks.get("b").waiting, tasks.get("c").waiting)

    def test_all_that_were_lost_must_be_waited_for(self, tasks: TaskLedger) -> None:
        """`run` means after they have ended, in whatever way, and not before all have."""
        tasks.add_tasks([Task("a"), Task("b"), Task("c", depends_on=(Dep("a", "run"), Dep("b", "run")))])
        tasks.cancel("a")
        assert None is tasks.claim_task("c")

        finished(tasks, "b")

        assert tasks.claim_task("c") is not None

    def test_what_depends_on_something_lost_is_lost(self, tasks: TaskLedger) -> None:
        """A task that is added too late ends at once, and so does one that gets such a dependency."""
        tasks.add_tasks([Task("a"), Task("x"), Task("y")])
        tasks.cancel("a")
        tasks.add_dependency("x", "a", on_failure="fail")
        tasks.add_dependency("y", "a", on_failure="run")

        added = tasks.add_tasks(
            [
                Task("b", depends_on=after("a")),
                Task("c", depends_on=after("b")),
                Task("d", depends_on=(Dep("b", "run"),)),
            ]
        )

        assert [_S.SKIPPED, _S.SKIPPED, _S.PENDING] == [task.state for task in added]
        assert (_S.FAILED, _S.PENDING) == (tasks.get("x").state, tasks.get("y").state)
        assert ["y", "d"] == ids(tasks.get_parallel_executable_tasks())

    def test_a_retried_dependency_is_waited_for_again(self, tasks: TaskLedger) -> None:
        """Who runs all the same waits again if the lost one is tried once more before that."""
        bring(tasks, _S.FAILED)
        tasks.add_tasks([Task("a", depends_on=(Dep("t", "run"),)), Task("b", depends_on=(Dep("t", "fail"),))])
        self.refused(tasks, TaskError, lambda: tasks.retry("b", "why not"))
        tasks.retry("t", "again")
        assert None is tasks.claim_task("a")
        tasks.retry("b", "now there is hope")

        finished(tasks, "t")

        assert ["a", "b"] == ids(tasks.get_parallel_executable_tasks())

    def test_a_long_chain_is_lost_at_once(self, tasks: TaskLedger) -> None:
        """A chain is as long as it likes; its end is reached in the same transaction."""
        names = [f"t{n}" for n in range(self.many * 5)]
        tasks.add_tasks([Task(name, depends_on=after(*names[n - 1 : n])) for n, name in enumerate(names)])

        tasks.cancel("t0")

        assert {_S.CANCELLED: 1, _S.SKIPPED: len(names) - 1} == tasks.counts()

    # -- cancelling --

    def test_cancelling_takes_the_dependents_if_asked(self, tasks: TaskLedger) -> None:
        """With `dependents` all that waits is CANCELLED, also what would have run all the same."""
        tasks.add_tasks(
            [
                Task("a"),
                Task("b", depends_on=after("a")),
                Task("c", depends_on=(Dep("b", "run"),)),
                Task("other"),
            ]
        )

        tasks.cancel("a", "not needed", dependents=True)

        assert {"a", "b", "c"} == set(ids(tasks.list_tasks(state="CANCELLED")))
        assert ["other"] == ids(tasks.get_parallel_executable_tasks())

    def test_cancelling_the_dependents_may_come_second(self, tasks: TaskLedger) -> None:
        """Whoever cancelled a task may still cancel what was waiting for it: that is another request."""
        tasks.add_tasks([Task("a"), Task("b", depends_on=(Dep("a", "run"),))])
        tasks.cancel("a")

        with pytest.raises(InvalidTransition):
            tasks.cancel("a", dependents=True)

        assert _S.PENDING == tasks.get("b").state

    def test_cancelling_takes_the_parts(self, tasks: TaskLedger) -> None:
        """Parts and their parts end with their parent; what has ended stays as it is."""
        tasks.add_task("a")
        tasks.add_subtasks("a", [Task("b"), Task("c")])
        tasks.add_subtasks("b", [Task("d")])
        finished(tasks, "c")

        tasks.cancel("a")

        assert {"a", "b", "d"} == set(ids(tasks.list_tasks(state=_S.CANCELLED)))
        assert _S.DONE == tasks.get("c").state

    def test_cancelling_takes_it_from_its_holder(self, tasks: TaskLedger) -> None:
        """Who had a cancelled task can report nothing more of it."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.cancel("t", "stop")

        assert not tasks.heartbeat(claim)
        self.refused(tasks, NotHolder, lambda: tasks.progress(claim, 0.9))
        self.refused(tasks, InvalidTransition, lambda: tasks.complete(claim))

    # -- parents and parts --

    def test_a_parent_waits_for_its_parts(self, tasks: TaskLedger) -> None:
        """A task with parts can be begun when all of them are done."""
        tasks.add_task("p", priority=9)
        tasks.add_subtasks("p", ["first", "second"])
        assert ["p.1", "p.2"] == ids(tasks.get_pending_subtasks("p"))
        finished(tasks, "p.1")
        assert None is tasks.claim_task("p")

        finished(tasks, "p.2")

        assert ["p"] == ids(tasks.get_parallel_executable_tasks())
        assert [] == tasks.get_pending_subtasks("p")

    def test_a_parent_that_is_at_work_goes_on_by_itself(self, tasks: TaskLedger) -> None:
        """ACTIVE with new parts is BLOCKED, its holder has it no more, and it is PENDING when they are done."""
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.checkpoint(claim, "half")

        tasks.add_subtasks(claim, ["part"])

        blocked = tasks.get("t")
        assert (_S.BLOCKED, WAITS_FOR_PARTS, "") == (blocked.state, blocked.reason, blocked.assignee)
        self.refused(tasks, NotHolder, lambda: tasks.complete(claim))
        assert ["t"] == ids(tasks.complete_task_and_route("t.1"))
        assert (_S.PENDING, "half") == (tasks.get("t").state, tasks.get("t").checkpoint)

    def test_a_parent_that_was_only_claimed_is_given_back(self, tasks: TaskLedger) -> None:
        """ASSIGNED with new parts is PENDING, and waits for them."""
        claim = bring(tasks, _S.ASSIGNED)
        tasks.add_subtasks("t", ["part"])

        assert (_S.PENDING, 1) == (tasks.get("t").state, tasks.get("t").waiting)
        assert claim is not None
        assert not tasks.heartbeat(claim)

    def test_a_parent_that_somebody_blocked_stays(self, tasks: TaskLedger) -> None:
        """What a person declared is not undone by parts that are done."""
        bring(tasks, _S.BLOCKED)
        tasks.add_subtasks("t", ["part"])

        finished(tasks, "t.1")

        assert _S.BLOCKED == tasks.get("t").state

    @pytest.mark.parametrize("state", [_S.PENDING, _S.ACTIVE])
    def test_a_parent_fails_with_its_part(self, tasks: TaskLedger, state: TaskState) -> None:
        """A part that is lost fails its parent, also one that was at work."""
        bring(tasks, state)
        tasks.add_subtasks("t", ["part"])

        tasks.fail(begun(tasks, "t.1"), "x")

        assert _S.FAILED == tasks.get("t").state

    def test_a_parent_and_its_parts_may_come_together(self, tasks: TaskLedger) -> None:
        """Parts in the same request are dependencies like those that come later, also when both are said."""
        tasks.add_tasks(
            [
                Task("p"),
                Task("a", parent="p"),
                Task("q", depends_on=(Dep("b", "run"),)),
                Task("b", parent="q"),
            ]
        )

        assert ((Dep("a", "fail"),), (Dep("b", "run"),)) == (
            tasks.get("p").depends_on,
            tasks.get("q").depends_on,
        )
        tasks.cancel("a")
        tasks.cancel("b")
        assert (_S.FAILED, ["q"]) == (tasks.get("p").state, ids(tasks.get_parallel_executable_tasks()))

    @pytest.mark.parametrize("state", [*sorted(ENDED), _S.PAUSED, _S.REVIEW, _S.APPROVED])
    def test_what_has_ended_gets_no_parts(self, tasks: TaskLedger, state: TaskState) -> None:
        """Parts of something that is over, or being judged, are refused."""
        bring(tasks, state)

        self.refused(tasks, TaskError, lambda: tasks.add_subtasks("t", ["too late"]))

    # -- routing --

    def test_routing_claims_and_begins_what_nobody_has(self, tasks: TaskLedger) -> None:
        """A ready task is completed in one step, as if the ledger's agent had claimed and begun it."""
        tasks.add_tasks(
            [Task("a"), Task("b", depends_on=after("a")), Task("c", depends_on=after("a"), priority=9)]
        )

        ready = tasks.complete_task_and_route("a", "done so")

        assert (["c", "b"], "done so", "me") == (ids(ready), tasks.get("a").result, tasks.get("a").assignee)
        told = [event.to_state for event in tasks.events("a")]
        assert ["pending", "assigned", "active", "done"] == told

    def test_routing_asked_again_answers_again(self, tasks: TaskLedger) -> None:
        """Who lost the reply learns once more what became ready."""
        tasks.add_tasks([Task("a"), Task("b", depends_on=after("a"))])
        first = tasks.complete_task_and_route("a")
        before = everything(tasks)

        second = tasks.complete_task_and_route("a")

        assert (ids(first), before) == (ids(second), everything(tasks))

    def test_routing_a_failure_frees_what_runs_all_the_same(self, tasks: TaskLedger) -> None:
        """`outcome="failure"` fails the task and tells what can be begun because of that."""
        tasks.add_tasks(
            [Task("a"), Task("b", depends_on=after("a")), Task("c", depends_on=(Dep("a", "run"),))]
        )

        assert ["c"] == ids(tasks.complete_task_and_route("a", "no", outcome="failure"))
        assert (_S.FAILED, _S.SKIPPED) == (tasks.get("a").state, tasks.get("b").state)

    @pytest.mark.parametrize("state", [_S.ASSIGNED, _S.ACTIVE])
    def test_routing_takes_nothing_from_its_holder(self, tasks: TaskLedger, state: TaskState) -> None:
        """What somebody else has cannot be completed past its holder."""
        bring(tasks, state)

        self.refused(tasks, TaskError, lambda: tasks.complete_task_and_route("t"))

    def test_routing_begins_nothing_that_cannot_be_begun(self, tasks: TaskLedger) -> None:
        """A task that waits, for others or for its time, is not completed in passing."""
        tasks.add_tasks(
            [Task("a"), Task("b", depends_on=after("a")), Task("c", not_before=self.later(tasks, 5))]
        )

        for name in ("b", "c"):
            for outcome in ("success", "failure"):
                self.refused(
                    tasks,
                    InvalidTransition,
                    lambda name=name, outcome=outcome: tasks.complete_task_and_route(name, "x", outcome),  # type: ignore[misc]
                )

    # -- sessions --

    def test_sessions_do_not_see_each_other(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """The same id is another task in another session; claims, counts and events stay apart."""
        other = tasks.in_session("other")
        tasks.add_tasks([Task("a"), Task("mine")])
        other.add_task("a", priority=9)
        begun(other, "a", "stranger")

        assert (_S.PENDING, _S.ACTIVE) == (tasks.get("a").state, other.get("a").state)
        assert (2, 1, ["main", "other"]) == (len(tasks), len(other), tasks.sessions())
        self.refused(tasks, NoSuchTask, lambda: other.get("mine"))
        self.refused(other, NoSuchTask, lambda: other.add_task("b", dependencies=["mine"]))
        self.advance(store, clock, self.lease * 1.01)
        assert ([], ["a"]) == (ids(tasks.recover()), ids(other.stale_tasks()))
        assert 3 == len(tasks.list_tasks(all_sessions=True))
        assert {event.session for event in tasks.events()} == {"main"}
        assert {event.session for event in tasks.events(all_sessions=True)} == {"main", "other"}

    # -- looking --

    def test_tasks_are_found_by_what_they_are(self, tasks: TaskLedger) -> None:
        """State, type, holder, tag and text each choose; a tag is no title and no part of one."""
        tasks.add_tasks(
            [
                Task("mail", title="tag", type="x"),
                Task("b", tags=("mail", "Ärger"), description='He said "hi"'),
                Task("c", tags=("mailing",)),
            ]
        )
        claimed(tasks, "c", "ann")

        def found(**wanted: Any) -> list[str]:
            return ids(tasks.list_tasks(**wanted))

        assert (["b"], ["b"], []) == (found(tag="mail"), found(tag="Ärger"), found(tag="tag"))
        assert (["b"], ["b"]) == (found(text='said "HI"'), found(text="Ärger"))
        assert (["mail"], ["c"], ["c"]) == (found(type="x"), found(assignee="ann"), found(state="CLAIMED"))
        assert ["mail", "b"] == found(state=["TODO", "backlog"])

    def test_counts_and_its_name_say_where_it_stands(self, tasks: TaskLedger) -> None:
        """How many tasks are in each state, and the share that is done."""
        tasks.add_tasks([Task("a"), Task("b"), Task("c")])
        finished(tasks, "a")

        assert {_S.PENDING: 2, _S.DONE: 1} == tasks.counts()
        assert "TaskLedger(me:main, 3 tasks, 33.3% complete)" == repr(tasks)

    def test_long_lists_come_whole(self, tasks: TaskLedger) -> None:
        """A listing is read in pages, and nothing falls between two of them."""
        names = [f"t{n}" for n in range(_PAGE + 20)]
        tasks.add_tasks([Task(name) for name in names])

        assert names == ids(tasks.list_tasks()) == ids(tasks.get_parallel_executable_tasks(limit=1000))
        assert names == [event.task for event in tasks.events()]

    # -- events --

    def test_events_tell_what_happened(self, tasks: TaskLedger) -> None:
        """Every change has one event, with who asked, through what, why, and when."""
        tasks.source = "cron"
        claim = bring(tasks, _S.ACTIVE)
        assert claim is not None
        tasks.progress(claim, 0.5, "half")
        tasks.pause(claim, "lunch")
        told = list(tasks.events("t"))

        assert ["created", "moved", "moved", "progress", "moved"] == [event.kind for event in told]
        assert ["me", *["holder"] * 4] == [event.actor for event in told]
        assert ({"cron"}, "half", "lunch") == ({event.source for event in told}, told[3].stage, told[4].why)
        assert told[2:] == list(tasks.events("t", after=told[1].seq))
        assert told[-1].seq == tasks.last_seq()

    def test_a_task_can_be_seen_as_it_was(
        self, tasks: TaskLedger, store: TaskStore, clock: FakeClock
    ) -> None:
        """Replayed up to any event, or any time, it is what it was then."""
        seen: dict[int, Task] = {}
        for step in [
            "add",
            "claim",
            "start",
            "progress",
            "pause",
            "resume",
            "fail",
            "claim",
            "start",
            "complete",
        ]:
            if self.takes_clock:
                self.advance(store, clock, 1)
            self._step(tasks, step)
            seen[tasks.last_seq()] = tasks.get("t")

        assert list(seen.values()) == [tasks.replay("t", until=seq) for seq in seen]
        assert tasks.get("t") == tasks.replay("t") == tasks.replay("t", until=10**9)
        with pytest.raises(NoSuchTask):
            tasks.replay("t", until=min(seen) - 1)
        if self.takes_clock:
            for task in seen.values():
                last = list(tasks.events("t"))[task.version - 1].at
                assert task == tasks.replay("t", until=last + timedelta(seconds=0.5))
                assert task == tasks.replay("t", until=last)

    def _step(self, tasks: TaskLedger, step: str) -> None:
        if step == "add":
            tasks.add_task("t", max_retries=2, tags=["x"])
        elif step == "claim":
            claimed(tasks, "t", "me")
        elif step == "progress":
            tasks.progress("t", 0.5, "half", cost=0.1)
        elif step == "fail":
            tasks.fail("t", "x", retry_in=0)
        else:
            do(tasks, step, "t")

    def test_events_are_seen_as_they_happen(self, tasks: TaskLedger) -> None:
        """Who subscribes gets each event once, in order, soon after it happened."""
        tasks.add_task("a")
        heard: list[TaskEvent] = []
        enough = threading.Event()

        def listen() -> None:
            for event in tasks.subscribe(after=0, every=0.005):
                heard.append(event)
                if event.to_state == "done":
                    enough.set()
                    return

        listener = threading.Thread(target=listen)
        listener.start()
        finished(tasks, "a")

        assert enough.wait(30)
        listener.join()
        assert heard == list(tasks.events())

    def test_nothing_happens_in_a_reading(self, tasks: TaskLedger) -> None:
        """Looking in every way leaves everything as it was."""
        bring(tasks, _S.ACTIVE)
        before = everything(tasks)

        for look in (
            tasks.counts,
            tasks.list_tasks,
            tasks.stale_tasks,
            tasks.dead_letters,
            tasks.sessions,
            tasks.last_seq,
            tasks.get_next_executable_task,
            lambda: tasks.get("t"),
            lambda: tasks.replay("t"),
        ):
            look()

        assert before == everything(tasks)
