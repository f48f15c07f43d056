"""Faults of real servers and of their callers, alike on PostgreSQL and Redis: no call runs twice or is lost.

What the tools did is counted in a file outside the store that is only appended to.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from ledger import Guard, InDoubt, Record, Run, StoreError
from ledger_stores import open_store
from ledger_stores.base import ServerStore
from ledger_stores.testing import claim
from tests.actors import Actor, Stage, eventually, stage, tracing
from tests.stores.redis_kit import RedisServer
from tests.stores.servers import OwnPostgres, fresh_namespace
from tests.stores.way import Way

pytestmark = pytest.mark.slow
Server = OwnPostgres | RedisServer
OnMessage = Literal["message", "answer"]
KINDS: dict[str, Callable[[], Server]] = {
    "postgres": OwnPostgres,
    "redis": lambda: RedisServer("--appendonly", "yes", "--appendfsync", "always"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of our own; each test leaves it running."""
    made = KINDS[request.param]()
    yield made
    made.close()


@pytest.fixture
def namespace() -> str:
    """Calls of its own for each test."""
    return fresh_namespace()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Stage]:
    """Where callers appear."""
    with stage(tmp_path) as made:
        yield made


def rows_of(server: Server, namespace: str) -> list[Run]:
    """The runs of the only call that there is."""
    with contextlib.closing(store_of(server, namespace)) as store:
        [(_, rows)] = store.calls()
        return list(rows)


def store_of(server: Server, namespace: str) -> ServerStore:
    """A store of one's own on it."""
    store = open_store(server.url, namespace=namespace, lock_seconds=30.0, sync="full")
    assert isinstance(store, ServerStore)
    return store


# ── a server that goes away in the midst of many calls ────────────────────────────────

CALLS, CALLERS = 2000, 4
# Each call is asked for by two of the four callers, which begin at different ends; a caller goes on
# after a StoreError as an agent does. What it was given is compared with what it asked for.
CALLER = f"""
guard = Guard(sys.argv[2], namespace=sys.argv[3], quiet=True, lock_seconds=2)
number = int(sys.argv[4])
mine = [n for n in range({CALLS}) if n % {CALLERS} in (number, (number + 1) % {CALLERS})]
told = False

@guard.once(name="pay", replay=True, wait=60, timeout=5)
def pay(n):
    effect(n, current().run)
    return n

say("ready")
hear()
for n in mine if number % 2 else reversed(mine):
    while True:
        try:
            assert pay(n) == n
            break
        except StoreError:
            if not told:
                say("StoreError")
                told = True
            time.sleep(0.05)
say("done")
"""


def begin(crew: Stage, server: Server, namespace: str) -> list[Actor]:
    """Four callers at work."""
    callers = [crew.start(CALLER, server.url, namespace, number) for number in range(CALLERS)]
    for caller in callers:
        assert "ready" == caller.line()
    for caller in callers:
        caller.tell("go")
    return callers


def has_effects(crew: Stage, count: int) -> bool:
    """Whether the tools did so much."""
    return len(crew.effects()) >= count


def after(crew: Stage, more: int) -> int:
    """How many effects there are when there are so many more than now."""
    eventually(functools.partial(has_effects, crew, len(crew.effects()) + more))
    return len(crew.effects())


def assert_each_ran_once(crew: Stage, server: Server, namespace: str) -> None:
    """2,000 effects, each of another call, and as many successes in the store, nothing else."""
    asked = Counter(int(line.split()[0]) for line in crew.effects())
    assert dict.fromkeys(range(CALLS), 1) == asked
    with contextlib.closing(store_of(server, namespace)) as store:
        sums = store.totals()["pay"]
        assert {"success"} == {record.status for record, _ in store.calls()}
    assert (CALLS, CALLS, 0, 0) == tuple(sums[n] for n in ("actions", "executed", "running", "failed"))


def test_a_server_that_restarts_and_crashes_loses_no_call(
    crew: Stage, server: Server, namespace: str
) -> None:
    """Stopped and started, then killed and away until all are told, amid 2,000 calls of four processes."""
    callers = begin(crew, server, namespace)
    first = after(crew, 200)
    server.stop()
    server.start()
    second = after(crew, 200)
    server.crash()
    assert ["StoreError"] * CALLERS == [caller.line() for caller in callers]
    down = len(crew.effects())
    server.start()

    assert ["done"] * CALLERS == [caller.line() for caller in callers]
    for caller in callers:
        caller.ends_well()
    assert 0 < first < second <= down < CALLS
    assert_each_ran_once(crew, server, namespace)


def test_connections_that_are_killed_cost_no_call(crew: Stage, server: Server, namespace: str) -> None:
    """All connections are cut after every fifty effects of 2,000 calls of four processes."""
    callers = begin(crew, server, namespace)
    for seen in range(0, CALLS - 50, 50):
        eventually(functools.partial(has_effects, crew, seen))
        server.kill_connections()

    for caller in callers:
        caller.ends_well()
    assert_each_ran_once(crew, server, namespace)


# ── a connection that is cut at one step ──────────────────────────────────────────────


@pytest.mark.parametrize("what", ["message", "answer"])
@pytest.mark.parametrize("step", ["claim", "settle"])
def test_a_message_or_answer_that_is_lost_is_sent_again(
    server: Server, namespace: str, step: str, what: OnMessage
) -> None:
    """The operation is repeated on another connection and finds its own row: one run, one effect, one end."""
    effects: list[int] = []
    with server.way() as way:
        guard = Guard(way.url, namespace=namespace, quiet=True)
        guard.check()
        way.lose(server.marks[step], what)
        guard(effects.append, 7)
        guard.close()

    assert way.caught.is_set()
    assert [7] == effects
    assert [(1, "success")] == [(run.run, run.status) for run in rows_of(server, namespace)]


@pytest.mark.parametrize("step", ["claim", "settle"])
def test_a_connection_that_is_killed_between_question_and_answer(
    server: Server, namespace: str, step: str
) -> None:
    """The server did it, cuts the connection, and the answer never comes: one run, one effect, one end."""
    effects: list[int] = []
    with server.way() as way:
        guard = Guard(way.url, namespace=namespace, quiet=True)
        guard.check()
        way.hold(server.marks[step], "answer")
        caller = threading.Thread(target=guard, args=(effects.append, 7))
        caller.start()
        assert way.caught.wait(30)
        server.kill_connections()
        way.give_up()
        caller.join()
        guard.close()

    assert [7] == effects
    assert [(1, "success")] == [(run.run, run.status) for run in rows_of(server, namespace)]


# ── a caller that dies, or is paused for too long, at one step ────────────────────────

PAYER = """
guard = Guard(sys.argv[2], namespace=sys.argv[3], quiet=True)
who, step, on_doubt = sys.argv[4:]

@guard.once(name="pay", replay=True, wait=60, timeout=1, on_doubt=on_doubt)
def pay(n):
    effect(who, n)
    if step == "tool":
        say("in")
        hear()
    return n

guard.check()
say("ready")
hear()
try:
    say(pay(7))
except (InDoubt, InProgress) as error:
    say(type(error).__name__)
"""
#: by the step at which the owner was killed: whether its effect happened, and what its run is then
STEPS: dict[str, tuple[int, str | None]] = {
    "claim message": (0, None),
    "claim answer": (0, "running"),
    "tool": (1, "running"),
    "settle message": (1, "running"),
    "settle answer": (1, "success"),
}


class Payers:
    """Callers of one call; the first goes to the server by a way on which it can be stopped."""

    def __init__(self, crew: Stage, server: Server, namespace: str) -> None:
        self._crew, self._server, self._namespace = crew, server, namespace
        self.way = server.way()

    def first(self, step: str) -> Actor:
        """The first caller, which stands at that step."""
        actor = self._start("first", self.way.url, step)
        if step != "tool":
            mark, what = step.split()
            self.way.hold(self._server.marks[mark], "message" if what == "message" else "answer")
        actor.tell("go")
        if step == "tool":
            assert "in" == actor.line()
        else:
            assert self.way.caught.wait(30)
        return actor

    def next(self, on_doubt: str = "rerun") -> str:
        """What another caller gets, who waits for the end of a run or of its lease."""
        actor = self._start(on_doubt, self._server.url, "", on_doubt)
        actor.tell("go")
        answer = actor.line()
        actor.ends_well()
        return answer

    def _start(self, who: str, url: str, step: str, on_doubt: str = "rerun") -> Actor:
        actor = self._crew.start(PAYER, url, self._namespace, who, step, on_doubt)
        assert "ready" == actor.line()
        return actor


@pytest.fixture
def payers(crew: Stage, server: Server, namespace: str) -> Iterator[Payers]:
    """Callers of one call."""
    made = Payers(crew, server, namespace)
    with made.way:
        yield made


@pytest.mark.parametrize("step", STEPS)
def test_a_caller_that_is_killed_at_any_step(
    payers: Payers, crew: Stage, server: Server, namespace: str, step: str
) -> None:
    """Whose end is unknown is in doubt and runs again only if the policy says so; all else runs once."""
    happened, status = STEPS[step]
    payers.first(step).kill()
    payers.way.give_up()

    blocked, again = payers.next("block"), payers.next("rerun")

    runs = [(run.status, run.owner) for run in rows_of(server, namespace)]
    if status == "running":
        assert ("InDoubt", "7") == (blocked, again)
        assert [*["first 7"] * happened, "rerun 7"] == crew.effects()
        assert ["doubt", "success"] == [run[0] for run in runs]
    else:
        assert ("7", "7") == (blocked, again)
        assert ["first 7" if happened else "block 7"] == crew.effects()
        assert ["success"] == [run[0] for run in runs]


def test_a_caller_that_is_paused_in_its_tool_past_its_lease(
    payers: Payers, crew: Stage, server: Server, namespace: str
) -> None:
    """It was taken over; when it goes on, its late end is an event, a warning and a success that counts."""
    first = payers.first("tool")
    first.freeze()
    assert "7" == payers.next()
    first.thaw()
    first.tell("go on")

    assert "7" == first.line()
    first.ends_well()
    assert "had been given up" in first.errors()
    assert "7" == payers.next()
    assert ["first 7", "rerun 7"] == crew.effects()
    rows = rows_of(server, namespace)
    assert [("doubt", "success"), ("success", None)] == [(run.status, run.late) for run in rows]
    with contextlib.closing(store_of(server, namespace)) as store:
        ends = [(e["run"], e["kind"], e["detail"]) for e in store.events() if e["kind"] != "blocked"]
    assert [(1, "late", "success")] == [end for end in ends if end[1] == "late"]


def test_a_caller_that_is_paused_past_its_lease_before_it_entered(
    payers: Payers, crew: Stage, server: Server, namespace: str
) -> None:
    """The answer to its claim comes when its run was taken over: it does not enter."""
    first = payers.first("claim answer")
    first.freeze()
    assert "7" == payers.next()
    payers.way.go_on()
    first.thaw()

    assert "InProgress" == first.line()
    first.ends_well()
    assert ["rerun 7"] == crew.effects()
    assert ["doubt", "success"] == [run.status for run in rows_of(server, namespace)]


def test_a_caller_that_is_paused_before_it_settled(
    payers: Payers, crew: Stage, server: Server, namespace: str
) -> None:
    """Its settlement arrives when its run was taken over, and overwrites nothing."""
    first = payers.first("settle message")
    first.freeze()
    assert "7" == payers.next()
    payers.way.go_on()
    first.thaw()

    assert "7" == first.line()
    first.ends_well()
    assert ["first 7", "rerun 7"] == crew.effects()
    rows = rows_of(server, namespace)
    assert [("doubt", "success"), ("success", None)] == [(run.status, run.late) for run in rows]


# ── duplicates that wait, in threads and in an event loop ─────────────────────────────

OWNER = """
guard = Guard(sys.argv[2], namespace=sys.argv[3], quiet=True, lock_seconds=2)

@guard.once(name="pay", replay=True)
def pay(n):
    effect("owner", n)
    say("in")
    hear()
    return n

say(pay(7))
hear()
"""


def watchers() -> bool:
    """Whether somebody in this process looks for those that wait."""
    return any(thread.name == "ledger-watcher" for thread in threading.enumerate())


class Duplicates:
    """Callers of this process, whose call runs in another one until it is told to end."""

    def __init__(self, crew: Stage, url: str, namespace: str) -> None:
        self.owner = crew.start(OWNER, url, namespace)
        assert "in" == self.owner.line()
        self.answers: list[object] = []
        self._guards = [Guard(url, namespace=namespace, quiet=True, lock_seconds=2) for _ in range(2)]
        options: dict[str, Any] = {"name": "pay", "replay": True, "wait": 60}

        def pay(n: int) -> int:
            with Path(f"{crew.db}.effects").open("a") as file:
                file.write(f"duplicate {n}\n")
            return n

        async def pay_async(n: int) -> int:
            return pay(n)

        self.pay = self._guards[0].once(**options)(pay)
        self.pay_async = self._guards[1].once(**options)(pay_async)
        for guard in self._guards:
            guard.check()

    def begin(self, threads: int, tasks: int) -> list[threading.Thread]:
        """So many that wait; returns when they do."""
        works = [threading.Thread(target=self._ask) for _ in range(threads)]
        works.append(threading.Thread(target=asyncio.run, args=(self._ask_all(tasks),)))
        assert not watchers()
        for work in works:
            work.start()
        eventually(watchers)
        return works

    def close(self) -> None:
        """Give back what was opened."""
        for guard in self._guards:
            guard.close()
        eventually(lambda: not watchers())

    def _ask(self) -> None:
        try:
            self.answers.append(self.pay(7))
        except StoreError:
            self.answers.append(StoreError)

    async def ask_async(self) -> None:
        """One more, in the loop that runs."""
        try:
            self.answers.append(await self.pay_async(7))
        except StoreError:
            self.answers.append(StoreError)

    async def _ask_all(self, tasks: int) -> None:
        await asyncio.gather(*(self.ask_async() for _ in range(tasks)))


@pytest.fixture
def duplicates(crew: Stage, server: Server, namespace: str) -> Iterator[Duplicates]:
    """Callers whose call runs elsewhere."""
    made = Duplicates(crew, server.url, namespace)
    yield made
    made.close()


def test_duplicates_that_wait_over_a_restart(duplicates: Duplicates, crew: Stage, server: Server) -> None:
    """Each gets the result, or is told that the server was away; none gets nothing, and none runs."""
    waiting = duplicates.begin(threads=6, tasks=6)
    server.stop()
    server.start()
    duplicates.owner.tell("end")

    for thread in waiting:
        thread.join()
    assert 12 == len(duplicates.answers)
    assert {7, StoreError} >= set(duplicates.answers)
    assert "7" == duplicates.owner.line()
    assert 7 == duplicates.pay(7)
    assert ["owner 7"] == crew.effects()


def test_duplicates_that_wait_for_a_server_that_stays_away(
    duplicates: Duplicates, crew: Stage, server: Server
) -> None:
    """All are told; the owner's end is written when the server is back, and answers who asks then."""
    waiting = duplicates.begin(threads=6, tasks=6)
    server.crash()
    duplicates.owner.tell("end")
    for thread in waiting:
        thread.join()
    assert "7" == duplicates.owner.line()
    server.start()

    duplicates.owner.tell("leave")  # not before the server is back: an exit insists for five seconds only
    duplicates.owner.ends_well()
    assert [StoreError] * 12 == duplicates.answers
    assert 7 == duplicates.pay(7)
    assert ["owner 7"] == crew.effects()


@pytest.mark.parametrize("fault", ["crash", "pause"])
def test_an_event_loop_goes_on_while_the_server_does_not(
    duplicates: Duplicates, crew: Stage, server: Server, fault: str
) -> None:
    """A task that ticks beside a call to a server that is away ticks as often as a thread does."""
    ticks = Counter[str]()

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.01)
            ticks["loop"] += 1

    def tick_beside(over: threading.Event) -> None:
        while not over.wait(0.01):
            ticks["thread"] += 1

    async def ask() -> None:
        over = threading.Event()
        ticker = asyncio.create_task(tick())
        yardstick = threading.Thread(target=tick_beside, args=(over,))
        yardstick.start()
        await duplicates.ask_async()
        over.set()
        ticker.cancel()
        yardstick.join()

    getattr(server, fault)()
    asyncio.run(ask())
    getattr(server, {"crash": "start", "pause": "go_on"}[fault])()

    assert [StoreError] == duplicates.answers
    assert ticks["loop"] > ticks["thread"] / 2 > 25
    duplicates.owner.tell("end")
    assert "7" == duplicates.owner.line()
    assert ["owner 7"] == crew.effects()


async def pay_later(n: int) -> int:
    """A tool."""
    return n


class Listening:
    """An async tool whose end or block is told to a function of the user's."""

    def __init__(self, url: str, namespace: str, tells: str) -> None:
        self.heard: list[tuple[str, bool]] = []
        self.guard = Guard(url, namespace=namespace, quiet=True, lock_seconds=2)
        options: dict[str, Any] = {"blocked_return": self.hear} if tells == "blocked_return" else {}
        if tells.startswith("on_"):
            getattr(self.guard, tells)(self.hear)
        self.pay = self.guard.once(name="pay", on_doubt="block", **options)(pay_later)
        self.guard.check()

    def hear(self, record: Record) -> None:
        """The user's function; it is called in the thread of the loop."""
        self.heard.append((record.status, threading.current_thread() is threading.main_thread()))

    async def ask(self, way: Way, then: Callable[[], None]) -> tuple[bool, object]:
        """Whether the loop goes on while the look is held up, and what the caller gets after that."""
        call = asyncio.ensure_future(self.pay(7))
        await asyncio.to_thread(way.caught.wait, 30)
        goes_on = not call.done()
        then()
        [answer] = await asyncio.gather(call, return_exceptions=True)
        return goes_on, answer


@pytest.mark.parametrize(
    ("tells", "before", "look", "heard"),
    [
        ("blocked_return", "done", "runs", ["success"]),
        ("on_block", "done", "runs", ["success"]),
        ("on_success", None, "runs", ["success"]),
        ("on_doubt", "doubt", "process", ["doubt"]),
        ("InDoubt", "doubt", "process", []),
    ],
)
def test_an_event_loop_goes_on_while_a_record_is_looked_at(
    server: Server, namespace: str, tells: str, before: str | None, look: str, heard: list[str]
) -> None:
    """The look for a callback, a function in blocked_return= or an error is held up; the loop is not."""

    def pay(n: int) -> int:
        if before == "doubt":
            raise KeyboardInterrupt
        return n

    with contextlib.closing(Guard(server.url, namespace=namespace, quiet=True)) as other, server.way() as way:
        if before:
            with contextlib.suppress(KeyboardInterrupt):
                other.once(name="pay")(pay)(7)
        listening = Listening(way.url, namespace, tells)
        way.hold(server.looks[look], "message")
        goes_on, answer = asyncio.run(listening.ask(way, way.go_on))
        listening.guard.close()

    assert goes_on
    assert [(status, True) for status in heard] == listening.heard
    if before == "doubt":
        assert isinstance(answer, InDoubt)
    else:
        assert (None if before else 7) == answer


def test_a_result_outlives_a_look_that_fails(
    server: Server, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The tool has run and its end is written: that its callback is not told is a warning, not an error."""

    def end() -> None:
        server.stop()
        way.give_up()

    with server.way() as way:
        listening = Listening(way.url, namespace, "on_success")
        way.hold(server.looks["runs"], "message")
        _, answer = asyncio.run(listening.ask(way, end))
        server.start()
        listening.guard.close()

    assert 7 == answer
    assert [] == listening.heard
    assert "the callbacks for 'success' are not told" in caplog.text


# ── counts of a server that is away ───────────────────────────────────────────────────


def test_attempts_at_a_server_that_is_away_are_kept_as_sums(server: Server, namespace: str) -> None:
    """Twenty thousand cost no more memory than a few, and all arrive once."""
    store = store_of(server, namespace)
    store.transact(claim())
    store.count("blocked", claim(), 1)
    store.flush()
    server.stop()
    with tracing() as grown:
        for _ in range(2):
            for _ in range(5000):
                store.count("blocked", claim(), 1)
                store.count("ran", claim("free"), 0)
            with pytest.raises(StoreError):
                store.flush()
        assert grown() < 300_000
    server.start()
    store.flush()

    assert [("c", 10_001), ("free", 0)] == [(r.call, r.blocked) for r, _ in store.calls()]
    assert [("free", 10_000)] == [(r.call, r.attempts) for r, rows in store.calls() if not rows]
    store.close()


def test_what_is_counted_while_an_answer_is_lost_is_no_part_of_what_is_repeated(
    server: Server, namespace: str
) -> None:
    """A batch that the server took is sent again as it was; the counts that came meanwhile are another."""
    with server.way() as way:
        store = open_store(way.url, namespace=namespace, lock_seconds=30.0, sync="full")
        store.transact(claim())
        way.hold(server.looks["count"], "answer")
        store.count("blocked", claim(), 1)
        assert way.caught.wait(30)
        for _ in range(3):
            store.count("blocked", claim(), 1)
        way.give_up()
        store.close()

    assert [4] == [run.blocked for run in rows_of(server, namespace)]


# ── a server that hangs, and one that takes no more ───────────────────────────────────


def test_a_server_that_hangs_is_an_error_and_nothing_runs(server: Server, namespace: str) -> None:
    """It takes messages and answers none: nothing is entered, and an end is kept until it answers."""
    effects: list[int] = []
    guard = Guard(server.url, namespace=namespace, quiet=True, lock_seconds=1)

    def pay(n: int) -> int:
        effects.append(n)
        if n == 1:
            server.pause()
        return n

    try:
        assert 1 == guard(pay, 1)
        with pytest.raises(StoreError):
            guard(pay, 2)
    finally:
        server.go_on()

    assert 2 == guard(pay, 2)
    assert [1, 2] == effects
    guard.flush()
    guard.close()
    with contextlib.closing(store_of(server, namespace)) as store:
        eventually(lambda: [record.status for record, _ in store.calls()] == ["success"] * 2)


def test_a_new_guard_on_a_server_that_hangs(server: Server, namespace: str) -> None:
    """Nothing is opened, so nothing runs."""
    guard = Guard(server.url, namespace=namespace, quiet=True, lock_seconds=1)
    server.pause()
    try:
        with pytest.raises(StoreError):
            guard(pytest.fail, "ran")
    finally:
        server.go_on()
    guard.close()


def test_a_server_that_takes_no_more_callers(server: Server, namespace: str) -> None:
    """Who has a connection goes on; who has none gets a `StoreError`, and no tool is entered."""
    effects: list[int] = []
    guards = [Guard(server.url, namespace=namespace, quiet=True, lock_seconds=n) for n in (1, 2)]
    guards[0](effects.append, 1)
    with server.full():
        guards[0](effects.append, 2)
        with pytest.raises(StoreError):
            guards[1](effects.append, 3)

    guards[1](effects.append, 3)
    assert [1, 2, 3] == effects
    for guard in guards:
        guard.close()
