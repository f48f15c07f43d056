"""Whatever several actors do in whatever order, the ledger does what a plain model of the rules says.

The model knows states, holders and dependencies, and nothing of events, rows, transactions or counters: what
is open and what is ready it finds out each time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ledger import MemoryStore
from ledger_stores.testing import FakeClock
from ledger_tasks import (
    Claim,
    Conflict,
    Dep,
    DependencyCycle,
    InvalidTransition,
    NotHolder,
    Task,
    TaskError,
    TaskState,
)
from ledger_tasks.model import at
from ledger_tasks.sqlite import SqliteTaskStore
from ledger_tasks.tasks import TaskLedger
from ledger_tasks.testing import BY_HOLDER, MOVES, WITH_REASON, allows, faults
from tests.tasks.test_tasks_states import table

TABLE: Final = table()
ENDED: Final = frozenset({"DONE", "FAILED", "CANCELLED", "SKIPPED", "DEAD"})
LOST: Final = ENDED - {"DONE"}
HELD: Final = frozenset({"ASSIGNED", "ACTIVE", "PAUSED", "REVIEW", "APPROVED"})
LEASED: Final = frozenset({"ASSIGNED", "ACTIVE"})
NOT_BEGUN: Final = frozenset({"BACKLOG", "PENDING", "BLOCKED"})
LEASE: Final = 100
ACTORS: Final = ("ann", "bob", "cat")
MOST: Final = 12
#: what happens more often than the rest
USUAL: Final = {
    "start": 8,
    "complete": 4,
    "fail": 4,
    "approve": 4,
    "unblock": 4,
    "unshelve": 6,
    "retry": 4,
    "resume": 4,
}


@dataclass
class Item:
    """A task in the model."""

    num: int
    name: str
    state: str
    limit: int = 0
    urgency: int = 5
    needs: frozenset[str] = frozenset()
    parent: str = ""
    waits: dict[str, str] = field(default_factory=dict)
    due: float = 0
    holder: str = ""
    #: number of the claim that has it, or had it when it ended
    claim: int = 0
    until: float = 0
    retries: int = 0
    #: blocked until its parts are done
    for_parts: bool = False
    #: the last move, and who asked for it by which claim
    last: tuple[str, int, str] = ("", 0, "")


@dataclass
class Ask:
    """Who asks: an actor, by a claim or by its name alone."""

    actor: str
    claim: int = 0
    is_stale: bool = False


class Refused(Exception):
    """What the ledger must raise."""


class Model:
    """The rules, in as few words as they take."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.now = 0.0

    # -- looking --

    def open(self, item: Item) -> list[str]:
        """What it waits for."""
        states = {name: self.items[name].state for name in item.waits}
        return [
            name
            for name, state in states.items()
            if state != "DONE" and not (state in LOST and item.waits[name] == "run")
        ]

    def is_ready(self, item: Item) -> bool:
        return item.state == "PENDING" and item.due <= self.now and not self.open(item)

    def ready(self, able: frozenset[str] | None = None) -> list[str]:
        """What can be claimed, most urgent and then oldest first."""
        found = [i for i in self.items.values() if self.is_ready(i) and (able is None or i.needs <= able)]
        return [item.name for item in sorted(found, key=lambda item: (-item.urgency, item.num))]

    def lapsed(self) -> list[str]:
        return [i.name for i in self.items.values() if i.state in LEASED and i.until <= self.now]

    def dependents(self, name: str) -> list[Item]:
        return [item for item in self.items.values() if name in item.waits]

    def reaches(self, starts: Iterable[str], goal: str) -> bool:
        """Whether one of these waits for the goal, or is it."""
        seen, todo = set(starts), list(starts)
        while todo:
            more = {name for one in todo for name in self.items[one].waits} - seen
            seen, todo = seen | more, list(more)
        return goal in seen

    # -- one step --

    def to(self, item: Item, state: str, last: tuple[str, int, str] | None = None) -> None:
        """Into another state, which the table must have."""
        assert state in TABLE[item.state], (item, state)
        item.state, item.for_parts = state, False
        item.last = last or item.last
        if state in NOT_BEGUN:
            item.holder, item.claim = "", 0
        item.until = self.now + LEASE if state in LEASED and item.claim else 0

    def holds(self, item: Item, ask: Ask) -> bool:
        mine = item.claim == ask.claim if ask.claim else item.holder == ask.actor
        return item.state in HELD and mine

    def repeats(self, item: Item, op: str, ask: Ask) -> bool:
        last, claim, actor = item.last
        return (last, actor) == (op, ask.actor) and ask.claim in (0, claim)

    def refuse(
        self, item: Item, ask: Ask, to: str, *, held: bool, start: Iterable[str] | None = None
    ) -> None:
        """A lost claim first, then the table, then the holder, then the version."""
        if ask.claim and ask.claim != item.claim:
            raise Refused(NotHolder)
        if to not in TABLE[item.state] or (start is not None and item.state not in start):
            raise Refused(InvalidTransition)
        if held and not self.holds(item, ask):
            raise Refused(NotHolder)
        if ask.is_stale:
            raise Refused(Conflict)

    def asked(self, item: Item, op: str, ask: Ask) -> tuple[str, int, str]:
        return (op, ask.claim or (item.claim if item.state in HELD else 0), ask.actor)

    # -- what follows from it --

    def lose(self, lost: Item) -> None:
        """What waits for something that failed ends too, and what waits for that."""
        todo = deque([lost])
        while todo:
            gone = todo.popleft()
            for item in self.dependents(gone.name):
                if item.waits[gone.name] != "run" and item.state not in ENDED:
                    self.end_with(item, gone.name)
                    todo.append(item)

    def end_with(self, item: Item, gone: str) -> None:
        if item.state == "BACKLOG" or (item.state == "BLOCKED" and item.waits[gone] == "fail"):
            self.to(item, "PENDING")
        end = "SKIPPED" if item.waits[gone] == "skip" else "FAILED"
        self.to(item, end, ("dependency", 0, ""))

    def end_hopeless(self, item: Item) -> None:
        """Its oldest dependency that is lost decides."""
        for name in sorted(item.waits, key=lambda name: self.items[name].num):
            if self.items[name].state in LOST and item.waits[name] != "run" and item.state not in ENDED:
                self.end_with(item, name)
                self.lose(item)

    def go_on(self) -> None:
        """Whose parts are done is PENDING again."""
        for item in self.items.values():
            if item.for_parts and not self.open(item):
                self.to(item, "PENDING", ("parts", 0, ""))

    # -- operations --

    def add(self, new: Item) -> None:
        parent = self.items.get(new.parent)
        if parent and parent.state not in NOT_BEGUN | LEASED:
            raise Refused(TaskError)
        if parent and self.reaches(new.waits, parent.name):
            raise Refused(DependencyCycle)
        self.items[new.name] = new
        if parent:
            self.hand_to_parts(parent)
            parent.waits[new.name] = "fail"
        self.end_hopeless(new)

    def hand_to_parts(self, parent: Item) -> None:
        before = parent.state
        if before in LEASED:
            self.to(parent, "PENDING" if before == "ASSIGNED" else "BLOCKED")
            parent.for_parts = before == "ACTIVE"
        parent.last = ("subtasks", 0, "")

    def depend(self, item: Item, on: str, policy: str, ask: Ask) -> None:
        if item.waits.get(on) == policy:
            return
        if ask.is_stale:
            raise Refused(Conflict)
        if on in item.waits or item.state not in NOT_BEGUN:
            raise Refused(TaskError)
        if self.reaches([on], item.name):
            raise Refused(DependencyCycle)
        item.waits[on] = policy
        self.end_hopeless(item)

    def take(self, item: Item, actor: str, claim: int) -> str:
        item.holder, item.claim = actor, claim
        self.to(item, "ASSIGNED", ("claim", claim, actor))
        return item.name

    def claim_next(self, actor: str, claim: int, able: frozenset[str] | None) -> str | None:
        for _ in range(2):
            for name in self.ready(able):
                return self.take(self.items[name], actor, claim)
            self.recover()
        return None

    def move(self, item: Item, op: str, ask: Ask) -> None:
        to, start = MOVES[op]
        if self.repeats(item, op, ask):
            return
        starts = None if start is None else {state.name for state in start}
        self.refuse(item, ask, to.name, held=op in BY_HOLDER, start=starts)
        self.to(item, to.name, self.asked(item, op, ask))

    def fail(self, item: Item, ask: Ask, pause: float) -> None:
        if self.repeats(item, "fail", ask):
            return
        self.refuse(item, ask, "FAILED", held=True, start=("ACTIVE",))
        self.to(item, "FAILED", self.asked(item, "fail", ask))
        if item.retries < item.limit:
            item.retries, item.due = item.retries + 1, self.now + pause
            self.to(item, "PENDING")
        else:
            if item.limit:
                self.to(item, "DEAD")
            self.lose(item)

    def route(self, item: Item, ask: Ask, outcome: str, pause: float) -> None:
        if self.is_ready(item) and not ask.claim:
            if ask.is_stale:
                raise Refused(Conflict)
            item.holder = ask.actor
            self.to(item, "ASSIGNED")
            self.to(item, "ACTIVE", ("route", 0, ""))
            ask = Ask(ask.actor)
        if outcome == "success":
            self.move(item, "complete", ask)
        else:
            self.fail(item, ask, pause)

    def retry(self, item: Item, ask: Ask, reason: str) -> None:
        if self.repeats(item, "retry", ask):
            return
        if item.state not in ("FAILED", "DEAD"):
            raise Refused(InvalidTransition)
        if ask.is_stale:
            raise Refused(Conflict)
        hopeless = any(self.items[on].state in LOST and policy != "run" for on, policy in item.waits.items())
        is_left = item.state == "FAILED" and item.retries < item.limit
        if hopeless or (not is_left and not reason):
            raise Refused(TaskError)
        item.retries, item.due = (item.retries + 1 if is_left else 0), 0
        self.to(item, "PENDING", ("retry", 0, ask.actor))

    def cancel(self, item: Item, ask: Ask, *, dependents: bool) -> None:
        if self.repeats(item, "cancel all", ask) or (not dependents and self.repeats(item, "cancel", ask)):
            return
        self.refuse(item, ask, "CANCELLED", held=False)
        todo, seen = [item.name], {item.name: None}
        while todo:
            found = [i.name for name in todo for i in self.items.values() if i.parent == name]
            found += [i.name for name in todo for i in self.dependents(name) if dependents]
            live = [name for name in dict.fromkeys(found) if self.items[name].state not in ENDED]
            todo = [name for name in live if name not in seen]
            seen |= dict.fromkeys(todo)
        ended = [self.items[name] for name in seen if "CANCELLED" in TABLE[self.items[name].state]]
        for one in ended:
            word = "cancel all" if dependents and one is item else "cancel"
            self.to(one, "CANCELLED", (word, 0, ask.actor))
        for one in ended:
            self.lose(one)

    def recover(self) -> list[str]:
        found = self.lapsed()
        for item in (self.items[name] for name in found):
            if item.state == "ASSIGNED" or item.retries < (item.limit or 3):
                item.retries += item.state == "ACTIVE"
                self.to(item, "PENDING", ("recover", 0, ""))
            else:
                self.to(item, "DEAD", ("recover", 0, ""))
                self.lose(item)
        return [name for name in found if self.items[name].state == "PENDING"]


ACTOR: Final = st.sampled_from(ACTORS)
#: a task by its place among those that are there
WHICH: Final = st.integers(0, MOST - 1)
POLICY: Final = st.sampled_from(("skip", "fail", "run"))
#: by the claim with this number, counted from the newest; None: by name
BY: Final = st.one_of(st.none(), st.integers(0, 3))
STALE: Final = st.sampled_from((None, None, None, 0, -1))
PAUSE: Final = st.sampled_from((0.0, 50.0))


class Machine(RuleBasedStateMachine):
    """Drives the ledger and the model side by side, and compares after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.store = SqliteTaskStore(MemoryStore(clock=self.clock))
        self.tasks = TaskLedger(self.store, agent="ann", lease=LEASE)
        self.model = Model()
        self.claims: list[Claim] = []
        self.told: list[Any] = []
        self.cancelled = 0

    def teardown(self) -> None:
        self.store.close()

    # -- doing the same on both sides --

    def same(self, real: Callable[[], Any], ideal: Callable[[], Any]) -> Any:
        """Both do it, or both refuse it for the same reason; who is refused changes nothing."""
        before = self.tasks.last_seq()
        try:
            expected = ideal()
        except Refused as refused:
            [kind] = refused.args
            try:
                real()
            except TaskError as error:
                assert kind is type(error), (kind, error)  # noqa: PT017 - which one decides
            else:
                raise AssertionError(f"{kind.__name__} was not raised") from None
            assert before == self.tasks.last_seq()
            return None
        self.model.go_on()
        found = real()
        return (found, expected)

    def pick(self, which: int) -> Item:
        names = list(self.model.items)
        return self.model.items[names[which % len(names)]]

    def ask(
        self, item: Item, actor: str, by: int | None, stale: int | None
    ) -> tuple[Any, Ask, dict[str, Any]]:
        """What names the task, who asks in the model, and what the ledger is told."""
        options: dict[str, Any] = {}
        if stale is not None:
            options["expected_version"] = self.tasks.get(item.name).version + stale
        mine = [n for n, claim in enumerate(self.claims, 1) if claim.id == item.name]
        if by is None or not mine:
            return item.name, Ask(actor, is_stale=stale == -1), {**options, "agent": actor}
        number = mine[-1 - by % len(mine)]
        claim = self.claims[number - 1]
        return claim, Ask(claim.agent, number, is_stale=stale == -1), options

    # -- rules --

    @initialize(many=st.integers(1, 9), dice=st.randoms(use_true_random=False))
    def begin(self, many: int, dice: Any) -> None:
        """Several at once, in any order, with parts and dependencies among them."""
        names = [f"t{number}" for number in range(many)]
        order = dice.sample(names, many)  # who stands later here waits for some that stand before
        items: dict[str, Item] = {}
        for num, name in enumerate(names):
            before = order[: order.index(name)]
            waits = {one: dice.choice(("skip", "fail", "run")) for one in before if dice.random() < 0.25}
            later = order[order.index(name) + 1 :]
            parent = dice.choice(later) if later and dice.random() < 0.3 else ""
            items[name] = Item(num, name, "PENDING", dice.randrange(3), waits=waits, parent=parent)
        self.tasks.add_tasks([self.as_task(item) for item in items.values()])
        for item in items.values():
            if item.parent:
                items[item.parent].waits.setdefault(item.name, "fail")
        self.model.items = items

    def as_task(self, item: Item) -> Task:
        deps = tuple(Dep(name, policy) for name, policy in item.waits.items())  # type: ignore[arg-type]
        return Task(
            item.name, depends_on=deps, parent=item.parent, max_retries=item.limit, priority=item.urgency,
            capabilities=tuple(item.needs),
            not_before=at(self.clock.wall() + int((item.due - self.model.now) * 1e6)) if item.due else None,
        )  # fmt: skip

    @precondition(lambda self: len(self.model.items) < MOST)
    @rule(
        on=st.lists(st.tuples(WHICH, POLICY), max_size=3),
        part_of=st.one_of(st.none(), WHICH),
        limit=st.integers(0, 2),
        urgency=st.integers(4, 6),
        able=st.booleans(),
        backlog=st.sampled_from((False, False, True)),
        wait=st.sampled_from((0, 0, 0, 80)),
    )
    def add(
        self,
        on: list[tuple[int, str]],
        part_of: int | None,
        limit: int,
        urgency: int,
        able: bool,
        backlog: bool,
        wait: float,
    ) -> None:
        waits = {self.pick(which).name: policy for which, policy in on}
        parent = "" if part_of is None else self.pick(part_of).name
        number = len(self.model.items)
        needs = frozenset({"gpu"} if able else ())
        new = Item(
            number, f"t{number}", "BACKLOG" if backlog else "PENDING", limit, urgency, needs, parent, waits,
            self.model.now + wait if wait else 0,
        )  # fmt: skip
        task = self.as_task(new)
        self.same(lambda: self.tasks.add_task(task, backlog=backlog), lambda: self.model.add(new))

    @rule(which=WHICH, on=WHICH, policy=POLICY, stale=STALE)
    def depend(self, which: int, on: int, policy: Any, stale: int | None) -> None:
        item, other = self.pick(which), self.pick(on).name
        _, ask, options = self.ask(item, "ann", None, stale)
        options["actor"] = options.pop("agent")
        self.same(
            lambda: self.tasks.add_dependency(item.name, Dep(other, policy), **options),
            lambda: self.model.depend(item, other, policy, ask),
        )

    @rule(actor=ACTOR, able=st.sampled_from((frozenset(), frozenset({"gpu"}), None)))
    def claim_next(self, actor: str, able: frozenset[str] | None) -> None:
        number = len(self.claims) + 1
        can = None if able is None else sorted(able)
        found, name = self.same(
            lambda: self.tasks.claim_next(actor, capabilities=can),
            lambda: self.model.claim_next(actor, number, able),
        )
        assert name == (found and found.id)
        self.claims += [found] if found else []

    @rule(actor=ACTOR, which=WHICH)
    def claim_task(self, actor: str, which: int) -> None:
        item, number = self.pick(which), len(self.claims) + 1
        found, name = self.same(
            lambda: self.tasks.claim_task(item.name, actor),
            lambda: self.model.take(item, actor, number) if self.model.is_ready(item) else None,
        )
        assert name == (found and found.id)
        self.claims += [found] if found else []

    @rule(
        op=st.sampled_from(sorted(MOVES.keys() - {"fail", "retry", "cancel"})),
        which=WHICH,
        actor=ACTOR,
        by=BY,
        stale=STALE,
        again=st.booleans(),
    )
    def move(self, op: str, which: int, actor: str, by: int | None, stale: int | None, again: bool) -> None:
        item = self.pick(which)
        target, ask, options = self.ask(item, actor, by if op in BY_HOLDER else None, stale)
        if op not in BY_HOLDER:
            options["actor"] = options.pop("agent")
        given = ("because",) if op in WITH_REASON else ()
        for _ in range(1 + again):
            self.same(
                lambda: getattr(self.tasks, op)(target, *given, **options),
                lambda: self.model.move(item, op, ask),
            )

    @rule(seed=st.integers(0, 2**32), many=st.integers(1, 12))
    def work(self, seed: int, many: int) -> None:
        """What happens most: somebody who may do so does what the table allows."""
        dice = random.Random(seed)
        for _ in range(many):
            which = dice.randrange(len(self.model.items))
            item = self.pick(which)
            able = ["claim"] * 12 if self.model.is_ready(item) else []
            able += ["parts"] if item.state == "ACTIVE" and len(self.model.items) < MOST else []
            able += [op for op in sorted(self.may_follow(item)) for _ in range(USUAL.get(op, 1))]
            if able:
                actor = item.holder or dice.choice(ACTORS)
                self.do(dice.choice(able), which, actor, dice.choice((None, 0)))
                self.states_are_those_of_the_model()

    def may_follow(self, item: Item) -> set[str]:
        """What the table lets somebody do with it."""
        return {op for op in MOVES if op != "cancel" and allows(op, TaskState[item.state])}

    def do(self, op: str, which: int, actor: str, by: int | None) -> None:
        if op == "claim":
            self.claim_task(actor, which)
        elif op == "parts":
            self.add([], which, 1, 5, able=False, backlog=False, wait=0)
        elif op == "fail":
            self.fail(which, actor, by, None, 0)
        elif op == "retry":
            self.retry(which, actor, "again", None)
        else:
            self.move(op, which, actor, None if by is None else 0, None, again=False)

    @rule(which=WHICH, actor=ACTOR, by=BY, stale=STALE, pause=PAUSE)
    def fail(self, which: int, actor: str, by: int | None, stale: int | None, pause: float) -> None:
        item = self.pick(which)
        target, ask, options = self.ask(item, actor, by, stale)
        self.same(
            lambda: self.tasks.fail(target, "broken", retry_in=pause, **options),
            lambda: self.model.fail(item, ask, pause),
        )

    @rule(which=WHICH, actor=ACTOR, by=BY, stale=STALE)
    def route(self, which: int, actor: str, by: int | None, stale: int | None) -> None:
        item = self.pick(which)
        target, ask, options = self.ask(item, actor, by, stale)
        done = self.same(
            lambda: self.tasks.complete_task_and_route(target, **options),
            lambda: self.model.route(item, ask, "success", 0),
        )
        if done:
            freed = {other.name for other in self.model.dependents(item.name)}
            assert [name for name in self.model.ready() if name in freed] == [task.id for task in done[0]]

    @rule(which=WHICH, actor=ACTOR, reason=st.sampled_from(("", "again")), stale=STALE)
    def retry(self, which: int, actor: str, reason: str, stale: int | None) -> None:
        item = self.pick(which)
        _, ask, options = self.ask(item, actor, None, stale)
        options["actor"] = options.pop("agent")
        self.same(
            lambda: self.tasks.retry(item.name, reason, **options),
            lambda: self.model.retry(item, ask, reason),
        )

    @precondition(lambda self: self.cancelled < 3)
    @rule(which=WHICH, actor=ACTOR, dependents=st.booleans(), stale=STALE)
    def cancel(self, which: int, actor: str, dependents: bool, stale: int | None) -> None:
        item = self.pick(which)
        _, ask, options = self.ask(item, actor, None, stale)
        options["actor"] = options.pop("agent")
        self.cancelled += 1
        self.same(
            lambda: self.tasks.cancel(item.name, "because", dependents=dependents, **options),
            lambda: self.model.cancel(item, ask, dependents=dependents),
        )

    @rule(which=WHICH, actor=ACTOR, by=BY, kind=st.sampled_from(("checkpoint", "progress", "add_artifact")))
    def report(self, which: int, actor: str, by: int | None, kind: str) -> None:
        item = self.pick(which)
        target, ask, options = self.ask(item, actor, by, None)

        def ideal() -> None:
            if not self.model.holds(item, ask):
                raise Refused(NotHolder)
            item.until = self.model.now + LEASE if item.state in LEASED and item.claim else 0

        value: Any = {"checkpoint": {"n": 0}, "progress": 0.5, "add_artifact": "file"}[kind]
        self.same(lambda: getattr(self.tasks, kind)(target, value, **options), ideal)

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 9))
    def heartbeat(self, which: int) -> None:
        number = len(self.claims) - which % len(self.claims)
        claim = self.claims[number - 1]
        item = self.model.items[claim.id]
        is_held = self.model.holds(item, Ask(claim.agent, number))
        if is_held and item.state in LEASED:
            item.until = self.model.now + LEASE

        assert is_held == self.tasks.heartbeat(claim)

    @rule()
    def recover(self) -> None:
        found, names = self.same(self.tasks.recover, self.model.recover)
        assert names == [task.id for task in found]

    @rule(seconds=st.sampled_from((1, 40, 60, 101)))
    def pause(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds

    # -- after each step --

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        """State, holder, retries and what is waited for."""
        found = {
            task.id: (task.state.name, task.assignee, task.retries, task.waiting)
            for task in self.tasks.list_tasks()
        }
        assert found == {
            item.name: (item.state, item.holder, item.retries, len(self.model.open(item)))
            for item in self.model.items.values()
        }

    @invariant()
    def offers_are_those_of_the_model(self) -> None:
        """What is ready is offered in its order, and what lapsed is seen."""
        assert self.model.ready() == [task.id for task in self.tasks.get_parallel_executable_tasks(limit=99)]
        assert self.model.lapsed() == [task.id for task in self.tasks.stale_tasks()]

    @invariant()
    def one_claim_at_most_has_a_task(self) -> None:
        """Of all claims that were ever given, a task that is held obeys one, and any other none."""
        for item in self.model.items.values():
            own = [(n, claim.agent) for n, claim in enumerate(self.claims, 1) if claim.id == item.name]
            live = [n for n, agent in own if self.model.holds(item, Ask(agent, n))]
            assert live == ([item.claim] if item.state in HELD and item.claim else [])

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        """A task whose dependencies have all ended does not wait, and none waits for what is lost."""
        for item in self.model.items.values():
            states = {self.model.items[name].state for name in item.waits}
            if states <= ENDED and item.state not in ENDED:
                assert 0 == self.tasks.get(item.name).waiting

    @invariant()
    def the_record_agrees(self) -> None:
        """Events are legal, sealed and only ever appended; they make every snapshot, at any time."""
        told = list(self.tasks.events())
        assert self.told == told[: len(self.told)]
        self.told = told
        assert [] == faults(self.tasks)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True, database=None
)


class Story:
    """A long history by dice, where hypothesis looks for short ones: the same rules, in a likelier order."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.machine = Machine()

    def which(self, *states: str) -> int:
        """A task, of these states if there is one."""
        items = list(self.machine.model.items.values())
        found = [n for n, item in enumerate(items) if not states or item.state in states]
        return self.dice.choice(found or range(len(items)))

    def act(self) -> None:
        """One thing happens."""
        dice, machine = self.dice, self.machine
        actor, by = dice.choice(ACTORS), dice.choice((None, 0, 0, 1))
        stale = dice.choice((None, None, None, None, 0, -1))
        op = dice.choice(sorted(MOVES.keys() - {"fail", "retry", "cancel"}))
        policy = dice.choice(("skip", "fail", "run"))
        acts: list[tuple[int, Callable[[], object]]] = [
            (20, lambda: machine.work(seed=dice.randrange(2**32), many=dice.randint(1, 4))),
            (4, self.add),
            (3, lambda: machine.depend(self.which(*NOT_BEGUN), self.which(), policy, stale)),
            (4, lambda: machine.claim_next(actor, dice.choice((frozenset(), None)))),
            (6, lambda: machine.move(op, self.which(), actor, by, stale, again=dice.random() < 0.5)),
            (2, lambda: machine.fail(self.which("ACTIVE"), actor, by, stale, dice.choice((0, 50)))),
            (2, lambda: machine.route(self.which("PENDING"), actor, by, stale)),
            (3, lambda: machine.retry(self.which(*LOST), actor, dice.choice(("", "again")), stale)),
            (1, lambda: machine.cancel(self.which(), actor, dice.random() < 0.2, stale)),
            (2, lambda: machine.report(self.which(*HELD), actor, by, "progress")),
            (3, lambda: machine.heartbeat(dice.randrange(9)) if machine.claims else None),
            (3, machine.recover),
            (5, lambda: machine.pause(dice.choice((1, 40, 60, 101)))),
        ]
        dice.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()

    def add(self) -> None:
        """A new task, if there is room."""
        dice, machine = self.dice, self.machine
        if len(machine.model.items) < 3 * MOST:
            on = [(self.which(), dice.choice(("skip", "fail", "run"))) for _ in range(dice.randrange(3))]
            parent = self.which("ACTIVE", *NOT_BEGUN) if dice.random() < 0.3 else None
            machine.add(on, parent, dice.randrange(3), dice.randint(4, 6), dice.random() < 0.2, False, 0)

    def look(self) -> None:
        """What must hold after each step."""
        self.machine.states_are_those_of_the_model()
        self.machine.offers_are_those_of_the_model()
        self.machine.one_claim_at_most_has_a_task()


@pytest.mark.parametrize("seed", range(12))
def test_a_long_history_is_that_of_the_model(seed: int) -> None:
    """Two hundred steps of several actors: every answer and every state is what the model says."""
    story = Story(seed)
    story.machine.begin(9, story.dice)

    for _ in range(200):
        story.act()
        story.look()

    story.machine.nothing_waits_for_ever()
    story.machine.the_record_agrees()
    story.machine.teardown()
