"""Deliveries: one per key, none within the cooldown, in doubt until a person knows."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import MemoryStore, NotPerformed, Store, UsageError
from ledger_ops import acts
from ledger_stores.testing import FakeClock
from ledger_tasks import TaskLedger
from ledger_tasks.book import Posting, TaskStore
from ledger_tasks.deliveries import RESERVED, Delivery, Verdict
from ledger_tasks.sqlite import SqliteTaskStore
from tests.actors import Stage, eventually, stage

#: a process that tells, or is killed while it tells
SENDER = """
from ledger_tasks import TaskLedger
tasks = TaskLedger(DB, agent="sender")

def send():
    effect("sent", sys.argv[2])
    say("sending")
    hear()

told = tasks.deliver(send, recipient="ann", channel="mail", key=sys.argv[2], cooldown=float(sys.argv[3]))
say(told.outcome)
"""

#: many processes tell the same person at once, each with its own key
CROWD = """
from ledger_tasks import TaskLedger
tasks = TaskLedger(DB, agent="sender")
tasks.counts()
say("ready")
hear()
for n in range(5):
    tasks.deliver(lambda: effect("sent"), recipient="ann", key=f"{sys.argv[2]} {n}", cooldown=3600)
"""


class World:
    """A ledger under a fake clock, and what was sent."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = TaskLedger(MemoryStore(clock=self.clock), agent="ann")
        self.sent: list[str] = []

    def deliver(self, key: str, *, to: str = "bob", channel: str = "", cooldown: float = 0.0) -> Delivery:
        return self.ledger.deliver(
            lambda: self.sent.append(key), recipient=to, channel=channel, key=key, cooldown=cooldown
        )

    def may(self, key: str, *, to: str = "bob", channel: str = "", cooldown: float = 0.0) -> Verdict:
        return self.ledger.should_deliver(recipient=to, channel=channel, key=key, cooldown=cooldown)

    def fail(self, error: BaseException, key: str, *, cooldown: float = 0.0) -> None:
        def send() -> None:
            raise error

        with pytest.raises(type(error)):
            self.ledger.deliver(send, recipient="bob", key=key, cooldown=cooldown)

    @property
    def outcomes(self) -> list[str]:
        return [one.outcome for one in self.ledger.deliveries()]


@pytest.fixture
def world() -> Iterator[World]:
    """An empty one."""
    made = World()
    yield made
    made.ledger.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Stage]:
    """Real processes around a file."""
    with stage(tmp_path) as made:
        yield made


def test_one_delivery_for_each_key(world: World) -> None:
    """The second with a key is suppressed, and says when the first was sent."""
    assert world.may("hello")
    first, second = world.deliver("hello"), world.deliver("hello")

    assert ["hello"] == world.sent
    assert (True, "sent", "suppressed") == (first.sent, first.outcome, second.outcome)
    assert "'hello' to bob was sent at 2023-11-14 22:13:20 UTC" == second.why
    assert ["sent", "suppressed"] == world.outcomes
    assert not (verdict := world.may("hello"))
    assert verdict.why == second.why


def test_recipients_channels_keys_and_sessions_are_told_apart(world: World) -> None:
    """What differs in one of them is another delivery."""
    other = world.ledger.in_session("other")
    for to, channel, key in (("bob", "", "k"), ("ann", "", "k"), ("bob", "sms", "k"), ("bob", "", "k2")):
        assert world.deliver(key, to=to, channel=channel).sent
    assert other.deliver(lambda: world.sent.append("x"), recipient="bob", key="k").sent

    assert 5 == len(world.sent)
    assert 1 == len(other.deliveries())


def test_asking_sends_nothing_and_records_nothing(world: World) -> None:
    """`should_deliver` may be asked as often as one likes."""
    assert all(world.may("hello", cooldown=60) for _ in range(3))

    assert [] == world.ledger.deliveries()
    assert world.deliver("hello", cooldown=60).sent


def test_nothing_is_sent_within_the_cooldown(world: World) -> None:
    """Another key to the same recipient waits until the cooldown since the last one is over."""
    world.deliver("a")
    world.clock.advance(40)

    suppressed = world.deliver("b", cooldown=60)
    assert "suppressed" == suppressed.outcome
    assert "the cooldown of 60 s ends in 20.0 s" in suppressed.why
    assert world.may("b", to="ann", cooldown=60)
    assert world.may("b", channel="sms", cooldown=60)
    assert world.may("b", cooldown=40)
    world.clock.advance(20)
    assert world.deliver("b", cooldown=60).sent
    assert ["a", "b"] == world.sent


def test_what_was_suppressed_starts_no_cooldown(world: World) -> None:
    """Only what was sent, or may have been, keeps the next one waiting."""
    world.deliver("a")
    for _ in range(10):
        world.clock.advance(10)
        world.deliver("a", cooldown=60)

    assert world.deliver("b", cooldown=60).sent
    assert ["sent", "suppressed", "sent"] == world.outcomes, "a hundred suppressed ones are one row"


def test_what_failed_is_raised_and_may_be_tried_again(world: World) -> None:
    """A send that raised was not sent: no cooldown runs, the same key may go."""
    world.fail(OSError("no route"), "a")
    assert [("failed", "OSError: no route")] == [(d.outcome, d.why) for d in world.ledger.deliveries()]

    assert world.may("a", cooldown=60)
    assert world.deliver("b", cooldown=60).sent
    assert world.deliver("a").sent
    assert ["failed", "sent", "sent"] == world.outcomes


def test_not_performed_is_a_failure_too(world: World) -> None:
    """Whoever knows that nothing happened may say so."""
    world.fail(NotPerformed("mailbox closed"), "a")

    assert world.deliver("a").sent


def test_an_interrupted_send_is_in_doubt(world: World) -> None:
    """Ctrl-C in the midst of a send: nobody knows; it counts as sent until somebody resolves it."""
    world.fail(KeyboardInterrupt(), "a")
    assert ["in_doubt"] == world.outcomes

    assert "suppressed" == world.deliver("a").outcome
    assert "suppressed" == world.deliver("b", cooldown=60).outcome
    verdict = world.may("a")
    assert not verdict
    assert "is in doubt" in verdict.why
    call = world.ledger.deliveries()[0].call
    assert f"`ledger resolve {call[:12]} --done` or `--not-done`" in verdict.why
    assert [] == world.sent


@pytest.mark.parametrize(("done", "outcome"), [(True, "suppressed"), (False, "sent")])
def test_a_person_resolves_a_doubt(world: World, done: bool, outcome: str) -> None:
    """Resolved as sent it stays sent; resolved as not sent it is sent once."""
    world.fail(KeyboardInterrupt(), "a")
    call = world.ledger.deliveries()[0].call
    acts.resolve(world.ledger.store.calls(), call, done=done, actor="ann")

    assert ["sent" if done else "failed"] == world.outcomes
    assert bool(world.may("a")) is not done
    assert [outcome, "suppressed"] == [world.deliver("a").outcome, world.deliver("a").outcome]
    assert ["a"] * (not done) == world.sent


def test_a_call_that_is_retried_by_hand_is_sent_again(world: World) -> None:
    """`ledger retry` lets a delivery go once more, as any call."""
    call = world.deliver("a").call
    acts.retry(world.ledger.store.calls(), call, actor="ann")

    assert world.deliver("a").sent
    assert "suppressed" == world.deliver("a").outcome
    assert ["a", "a"] == world.sent


def test_what_was_sent_stays_sent_when_the_calls_are_cleared(world: World) -> None:
    """The guard's records may be pruned: the deliveries remember."""
    world.deliver("a")
    world.ledger.store.calls().clear()

    assert "suppressed" == world.deliver("a").outcome
    assert not world.may("b", cooldown=60)
    assert ["a"] == world.sent


def test_while_it_is_being_sent_nothing_else_is(world: World) -> None:
    """Neither the same key nor, with a cooldown, another one goes while a send is under way."""
    begun, go_on = threading.Event(), threading.Event()

    def send() -> None:
        begun.set()
        assert go_on.wait(30)

    with ThreadPoolExecutor() as pool:
        slow = pool.submit(world.ledger.deliver, send, recipient="bob", key="slow")
        assert begun.wait(30)
        world.clock.advance(200)
        try:
            assert ["running"] == world.outcomes
            same, other = world.deliver("slow"), world.deliver("other", cooldown=300)
            without = world.deliver("without")
        finally:
            go_on.set()
        assert slow.result().sent
    assert ("suppressed", "suppressed", "sent") == (same.outcome, other.outcome, without.outcome)
    assert "is being sent since" in same.why


def reserve_and_vanish(world: World, key: str) -> None:
    """What a process leaves that was killed between its reservation and its send."""
    until = world.clock.wall() + int(RESERVED * 1e6)
    left = Posting(0, "bob", "", key, "reserved", "", "0" * 32, world.clock.wall(), until)
    world.ledger.store.write("main", lambda book: book.post(left))


def test_a_reservation_that_nobody_used_is_given_up(world: World) -> None:
    """Its sender was killed before it sent: others wait for a minute, then they may."""
    reserve_and_vanish(world, "a")
    assert "is being sent by another" in world.may("a").why
    assert "suppressed" == world.deliver("b", cooldown=60).outcome

    world.clock.advance(RESERVED + 1)
    assert "failed" == world.outcomes[0]
    assert world.deliver("b", cooldown=600).sent
    assert world.deliver("a").sent
    assert ["failed", "suppressed", "sent", "sent"] == world.outcomes


def test_whoever_lost_its_reservation_sends_nothing() -> None:
    """A process that slept past its reservation is refused when it wakes, before it sends."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    sent: list[str] = []

    def others() -> None:
        clock.advance(RESERVED + 1)
        assert quick.deliver(lambda: sent.append("quick"), recipient="bob", key="b", cooldown=3600).sent

    slow, quick = TaskLedger(SlowCalls(store, others), agent="slow"), TaskLedger(store, agent="quick")
    told = slow.deliver(lambda: sent.append("slow"), recipient="bob", key="a", cooldown=3600)
    assert ["quick"] == sent
    assert ("suppressed", True) == (told.outcome, "was given up" in told.why)
    assert ["failed", "sent"] == [one.outcome for one in quick.deliveries()]


class SlowCalls(TaskStore):
    """A store of tasks whose user sleeps between its reservation and its send."""

    def __init__(self, store: MemoryStore, sleep: Callable[[], None]) -> None:
        self._tasks, self._sleep = SqliteTaskStore(store), sleep
        self.address = self._tasks.address
        self._writes = 0

    def read(self, session: str, look: Callable[[Any], Any]) -> Any:
        return self._tasks.read(session, look)

    def write(self, session: str, work: Callable[[Any], Any], *, durable: bool = True) -> Any:
        self._writes += 1
        if self._writes == 2:  # the first reserves, the second enters
            self._sleep()
        return self._tasks.write(session, work, durable=durable)

    def calls(self) -> Store:
        return self._tasks.calls()

    def close(self) -> None:
        self._tasks.close()


def test_the_words_must_name_something(world: World) -> None:
    """An empty key, a recipient with a line end, or a cooldown that is none is refused; nothing is sent."""
    wrong: list[dict[str, Any]] = [{"key": ""}, {"key": " "}, {"to": ""}, {"to": "a\nb"}, {"cooldown": -1.0}]
    wrong += [{"cooldown": float("nan")}, {"cooldown": float("inf")}, {"channel": "a\x1fb"}]
    for fields in wrong:
        with pytest.raises(UsageError):
            world.deliver(**{"key": "k"} | fields)
        with pytest.raises(UsageError):
            world.may(**{"key": "k"} | fields)
    assert [] == world.sent + world.ledger.deliveries()


def test_an_async_send_is_refused_with_a_reason(world: World) -> None:
    """A coroutine would never run here; it is a failure that says so, and the next try may go."""

    async def send() -> None:
        world.sent.append("never")

    with pytest.raises(NotPerformed, match="coroutine"):
        world.ledger.deliver(send, recipient="bob", key="a")
    assert world.deliver("a").sent
    assert ["a"] == world.sent


def test_deliveries_are_json(world: World) -> None:
    """`to_dict` has JSON values only."""
    world.deliver("a", channel="mail")

    (found,) = (json.loads(json.dumps(one.to_dict())) for one in world.ledger.deliveries())
    assert ("a", "bob", "mail", "sent", "") == tuple(
        found[name] for name in ("key", "recipient", "channel", "outcome", "why")
    )
    assert "2023-11-14T22:13:20+00:00" == found["at"]


def test_a_thousand_deliveries_are_all_listed(world: World) -> None:
    """The list is read a page at a time and is whole."""
    world.ledger.store.write("main", lambda book: [book.post(a_sent_one(n)) for n in range(1_100)])

    assert [f"k{n}" for n in range(1_100)] == [one.key for one in world.ledger.deliveries()]


def a_sent_one(number: int) -> Posting:
    """One of many."""
    return Posting(0, "bob", "", f"k{number}", "sent", "", "0" * 32, number, 0)


@pytest.mark.slow
def test_a_killed_sender_leaves_a_doubt(scene: Stage) -> None:
    """Killed inside send: not sent again, and why; resolved as not sent, it is sent once."""
    actor = scene.start(SENDER, "a", 0)
    assert "sending" == actor.line()
    actor.kill()

    tasks = TaskLedger(scene.db, agent="ann")
    assert ["in_doubt"] == [one.outcome for one in tasks.deliveries()]
    told = tasks.should_deliver(recipient="ann", channel="mail", key="a")
    assert (False, True) == (bool(told), "nobody knows whether it arrived" in told.why)
    again: list[str] = []
    assert (
        "suppressed"
        == tasks.deliver(lambda: again.append("again"), recipient="ann", channel="mail", key="a").outcome
    )
    assert not tasks.should_deliver(recipient="ann", channel="mail", key="b", cooldown=60)
    assert tasks.should_deliver(recipient="ann", channel="mail", key="b")

    acts.resolve(tasks.store.calls(), tasks.deliveries()[0].call, done=False, actor="ann")
    assert tasks.should_deliver(recipient="ann", channel="mail", key="b", cooldown=60)
    once_more = [scene.start(SENDER, "a", 0), scene.start(SENDER, "a", 0)]
    ends = set()
    for sender in once_more:
        if (line := sender.line()) == "sending":
            sender.tell("go on")
            line = sender.line()
        ends.add(line)
        sender.ends_well()
    assert {"sent", "suppressed"} == ends
    assert ["sent a", "sent a"] == scene.effects(), "once before the kill, once after it was resolved"
    assert [] == again
    tasks.close()


@pytest.mark.slow
def test_two_processes_with_two_keys_do_not_both_send(scene: Stage) -> None:
    """While one process sends, another key to the same recipient waits out the cooldown."""
    first = scene.start(SENDER, "a", 3600)
    assert "sending" == first.line()
    second = scene.start(SENDER, "b", 3600)
    assert "suppressed" == second.line()
    first.tell("go on")

    assert "sent" == first.line()
    assert ["sent a"] == scene.effects()


@pytest.mark.slow
def test_a_crowd_sends_once_within_the_cooldown(scene: Stage) -> None:
    """Six processes with thirty keys at once: one is sent, and the others say why not."""
    scene.let_go(scene.crowd(6, CROWD))

    tasks = TaskLedger(scene.db, agent="ann")
    assert ["sent"] == scene.effects()
    found = tasks.deliveries()
    assert (30, 1) == (len(found), sum(one.sent for one in found))
    assert all("cooldown" in one.why for one in found if not one.sent)
    tasks.close()


@pytest.mark.slow
def test_a_frozen_sender_is_running_not_in_doubt(scene: Stage) -> None:
    """A process that sends slowly is alive: nothing is resolved, nothing is sent beside it."""
    actor = scene.start(SENDER, "a", 0)
    assert "sending" == actor.line()
    actor.freeze()

    tasks = TaskLedger(scene.db, agent="ann")
    assert ["running"] == [one.outcome for one in tasks.deliveries()]
    assert "is being sent since" in tasks.should_deliver(recipient="ann", channel="mail", key="a").why
    actor.thaw()
    actor.tell("go on")
    assert "sent" == actor.line()
    eventually(lambda: tasks.deliveries()[0].sent)
    tasks.close()
