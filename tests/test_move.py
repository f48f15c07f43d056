"""`ledger move`: all goes along, nothing runs on both sides, and whatever cuts it off, it goes on."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from ledger import Guard, InProgress, Renew, Run, SqliteStore, StoreError
from ledger_ops.doctor import moving
from ledger_ops.move import Move
from ledger_ops.reader import reader_of
from ledger_ops.transfer import export, import_lines
from ledger_ops.upkeep import backup, prune, restore
from ledger_ops.values import Progress
from ledger_stores.testing import LEASE, claim, granted, release, reset, resolve, settle
from tests.actors import Actor, Stage, eventually, stage
from tests.cli_kit import Terminal, run
from tests.move_kit import (
    PAIRS,
    WITH_LOG,
    Place,
    begin_move,
    fresh_place,
    guard_on,
    held,
    move,
    moved,
    sides,
    words,
)
from tests.test_ops_servers import charge, tell_a_story

HERE_AND_THERE = "HERE, THERE = [(sys.argv[n], sys.argv[n + 1] or None) for n in (2, 4)]\n"
#: pairs in which each store is once the source and once the target
RING = [("sqlite", "postgres"), ("postgres", "redis"), ("redis", "sqlite")]


def places(pair: tuple[str, str], folder: Path) -> tuple[Place, Place]:
    """Two places where nothing is yet."""
    return fresh_place(pair[0], folder), fresh_place(pair[1], folder)


def start(here: Stage, script: str, source: Place, target: Place, *more: object) -> Actor:
    """An actor that knows both sides."""
    given = (word or "" for place in (source, target) for word in place)
    return here.start(HERE_AND_THERE + script, *given, *more)


def at(place: Place, work: Any) -> Any:
    """What a guard there answers."""
    with guard_on(place) as guard:
        return work(guard)


# -- all goes along --


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_everything_goes_along(pair: tuple[str, str], tmp_path: Path) -> None:
    """Rows byte for byte, tallies, counts, totals and events are there what they were here."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)

    found = moved(source, target)

    assert ("moved", 11, 0) == found
    with sides(source, target) as (here, there):
        assert held(here) == held(there)
        assert [r.holder for r in reader_of(here.store).stream()] == [
            r.holder for r in reader_of(there.store).stream()
        ]


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_duplicate_gets_what_the_source_recorded(pair: tuple[str, str], tmp_path: Path) -> None:
    """Asked at the target, a call that was done at the source replays its result; a failed one runs on."""
    source, target = places(pair, tmp_path)
    big = "é" * 3_000_000

    def tool(order: int) -> str:
        return f"{order} {big}"

    def use(guard: Guard) -> list[str]:
        guard.policy(tool, name="tests.tool", replay=True)
        answers = [guard.call(tool, order) for order in range(3)]
        assert all(len(str(a.value)) > len(big) for a in answers)
        with guard.workflow("another"):
            answers.append(guard.call(tool, 0))
        return [a.kind for a in answers]

    assert ["executed"] * 4 == at(source, use)
    assert 4 == moved(source, target).calls
    assert ["replayed"] * 4 == at(target, use)
    assert ["replayed"] * 4 == at(source, use)


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_what_changes_during_the_copy_goes_along(pair: tuple[str, str], tmp_path: Path) -> None:
    """New calls, ends, releases, counts, a reset call and a reset workflow, between two pages."""
    source, target = places(pair, tmp_path)
    guard = source.guard()
    free: Any = len
    guard.policy(free, name="tests.free", unlimited=True)
    for number in range(60):
        with guard.workflow(f"w{number % 3}"):
            guard(charge, number)
    pages = 0

    def meddle(_: Progress) -> None:
        nonlocal pages
        pages += 1
        store: Any = guard._ready()
        if pages == 2:
            with guard.workflow("w0"):
                guard(charge, 0)
                guard.retry(charge, 3)
                guard(charge, 3)
                guard(charge, 1000)
            with guard.workflow("w1"):
                guard.retry(charge, 4)
            guard.reset("w2")
            guard(free, "free")
            store.transact(settle(granted(store, call="abc"), "failed"))
        if pages == 3:
            with guard.workflow("w2"):
                guard(charge, 5)
        guard.flush()

    with sides(source, target) as (here, there):
        steps = Progress(tell=meddle)
        found = Move(here, there, progress=steps).run()
        assert held(here) == held(there)
    guard.close()
    assert pages > 2
    assert 60 == steps.done  # the events told all: nothing had to be copied again as a whole
    assert 60 - 20 + 4 == found.calls


# -- nothing runs on both sides --

HAMMER = """
import random
guards = [Guard(url, namespace=name, quiet=True) for url, name in (HERE, THERE)]

def charge(order):
    effect(order)
    time.sleep(0.002)
    return order

for one in guards:
    one.policy(charge, replay=True)

def ask(order):
    while True:
        try:
            return guards[0].call(charge, order)
        except StoreError as error:
            if "this ledger was moved to" in str(error):
                say("moved") if len(guards) > 1 else None
                del guards[:-1]
            elif "is receiving the calls of" not in str(error):
                raise
            time.sleep(0.005)

random.seed(int(sys.argv[-1]))
say("ready")
hear()
orders = list(range(240))
for _ in range(2):
    random.shuffle(orders)
    for order in orders:
        assert ask(order).value == order
while len(guards) > 1:
    ask(random.randrange(1000, 100000))
"""


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed"])
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_callers_who_change_sides_run_each_call_once(
    pair: tuple[str, str], killed: bool, tmp_path: Path
) -> None:
    """Four processes hammer 240 keys, are refused at the source and go to the target: one effect each.

    Also when the mover is killed again and again.
    """
    source, target = places(pair, tmp_path)
    with stage(tmp_path) as here:
        crowd = [start(here, HAMMER, source, target, number) for number in range(4)]
        assert ["ready"] * 4 == [actor.line() for actor in crowd]
        for actor in crowd:
            actor.tell("go")
        eventually(lambda: len(here.effects()) > 60)
        for pause in (0.3, 0.4, 0.5) if killed else ():
            with begin_move(source, target) as mover:
                time.sleep(pause)
                mover.process.kill()

        done = move(source, target)

        assert 0 == done.code, done.err
        for actor in crowd:
            assert "moved" == actor.line()
            actor.ends_well()
        counts = Counter(here.effects())
        assert {1} == set(counts.values())
        assert {str(number) for number in range(240)} <= counts.keys()
        at_the_end = move(source, target, "--json").json
        assert ("nothing new", len(counts)) == (at_the_end["state"], at_the_end["calls"])


def test_what_left_no_event_is_found_in_the_end(tmp_path: Path) -> None:
    """Calls that somebody deleted behind the move's back are missed in the sums: all is copied again."""
    source, target = places(("sqlite", "redis"), tmp_path)
    at(source, tell_a_story)
    store = SqliteStore(source.url)

    def prune_behind_its_back(_: Progress) -> None:
        work = "released = 0 AND status = 'success'"
        store.submit(lambda db: store._forget(db, work, {}), durable=False)
        store.submit(lambda db: db.execute("DELETE FROM tallies"), durable=False)

    with sides(source, target) as (here, there):
        found = Move(here, there, progress=Progress(tell=prune_behind_its_back)).run()
        assert held(here) == held(there)
    store.close()
    assert 0 < found.calls < 11


def test_a_move_waits_for_what_postgres_hides(tmp_path: Path) -> None:
    """Beside an old transaction the newest events are not certain yet: they are waited for."""
    source, target = places(("postgres", "sqlite"), tmp_path)
    at(source, lambda guard: guard(charge, 1))
    with psycopg.connect(source.url) as old:
        old.execute("SELECT pg_current_xact_id()")
        at(source, lambda guard: guard(charge, 2))
        with begin_move(source, target) as mover:
            assert mover.process.stderr is not None
            told = [mover.process.stderr.readline() for _ in range(2)]
            assert "waiting for older transactions in the database" in told[1]
            old.commit()
            done = mover.ends()

    assert 0 == done.code
    with sides(source, target) as (here, there):
        assert held(here) == held(there)


def test_a_killed_owner_is_not_waited_for(tmp_path: Path) -> None:
    """On its own machine it is proved dead, at the target too: the call runs again there at once."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    with stage(tmp_path) as here:
        holder = start(here, HOLDER, source, target, 1000)
        assert "inside" == holder.line()
        holder.kill()
        assert "moved" == move(source, target, "--json").json["state"]
        with sides(source, target) as (_, there):
            [doubt] = reader_of(there.store).doubts()
        assert f"pid {holder.pid} on " in doubt.holder
        again = start(here, HOLDER, target, source, 1000)
        assert "inside" == again.line()
        again.tell("done")
        assert "done" == again.line()
        again.ends_well()


def test_claims_are_refused_at_their_times(tmp_path: Path) -> None:
    """The source takes runs until it is sealed, the target from when it is opened, never both."""
    for pair in RING:
        source, target = places(pair, tmp_path)
        guards = [source.guard(), target.guard()]
        for number in range(40):
            guards[0](charge, number)
        seen: list[tuple[bool, bool]] = []

        def try_both(guards: list[Guard] = guards, seen: list[tuple[bool, bool]] = seen) -> None:
            taken = []
            for side, guard in enumerate(guards):
                try:
                    taken.append(guard.call(charge, 10**6 + 2 * len(seen) + side).executed)
                except StoreError:
                    taken.append(False)
            seen.append((taken[0], taken[1]))

        with sides(source, target) as (here, there):
            for side in (here, there):
                plain = side.step

                def step(*values: Any, plain: Any = plain, try_both: Any = try_both) -> None:
                    plain(*values)
                    try_both()

                side.step = step  # type: ignore[method-assign, assignment]
            Move(here, there).run()
        for guard in guards:
            guard.close()

        states = list(dict.fromkeys(seen))
        assert [(True, False), (False, False), (False, True)] == states, pair


# -- whatever cuts it off --

MOVER = """
from ledger_ops.move import Move, opened_sides
from ledger_stores.move import Side
writes, last, after = 0, int(sys.argv[-2]), sys.argv[-1] == "after"

def deadly(side):
    plain = side.step
    def step(*values):
        global writes
        writes += 1
        if writes == last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*values)
        if writes == last:
            os.kill(os.getpid(), signal.SIGKILL)
    side.step = step
    return side

with opened_sides(HERE[0], THERE[0], source_namespace=HERE[1], target_namespace=THERE[1]) as both:
    Move(*map(deadly, both)).run()
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_mover_killed_at_each_write_goes_on(pair: tuple[str, str], when: str, tmp_path: Path) -> None:
    """SIGKILL at its first write, then a new one at its second, and so on: in the end all is there, once."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)
    at(source, lambda guard: [guard(charge, number) for number in range(100, 160)])
    ends = []
    with stage(tmp_path) as here:
        for last in range(1, 100):
            mover = start(here, MOVER, source, target, last, when)
            ends.append(mover.ends())
            if ends[-1] != -signal.SIGKILL:
                break
            if (last, when) == (1, "before"):  # nothing was begun
                continue
            allowed = [takes(place, 10**7 + 2 * last + n) for n, place in enumerate((source, target))]
            assert [True, True] != allowed
        assert 0 == ends[-1], mover.errors()

    assert len(ends) > 5
    with sides(source, target) as (left, right):
        calls, events, totals = held(right)
        theirs = held(left)
    assert theirs[0].items() <= calls.items()
    assert theirs[1] == events[: len(theirs[1])]
    assert {"charge", "send_email", "look_up"} <= {tool.rpartition(".")[2] for tool in totals}


def takes(place: Place, number: int) -> bool:
    """Whether a run begins there."""
    try:
        return bool(at(place, lambda guard: guard.call(charge, number).executed))
    except StoreError:
        return False


HOLDER = """
guard = Guard(HERE[0], namespace=HERE[1], quiet=True)
guard.policy("tests.hold", timeout=float(sys.argv[-1]))

@guard.once(name="tests.hold")
def hold(order):
    effect(order)
    say("inside")
    return hear()

say(hold(1))
guard.close()
"""


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_live_run_is_waited_for(pair: tuple[str, str], tmp_path: Path) -> None:
    """Sealed, the move says who still runs; the run ends there, and the target knows its result."""
    source, target = places(pair, tmp_path)
    with stage(tmp_path) as here:
        holder = start(here, HOLDER, source, target, 60)
        assert "inside" == holder.line()
        with begin_move(source, target) as mover:
            assert mover.process.stderr is not None
            told = [mover.process.stderr.readline() for _ in range(2)]
            assert ["sealed: no run", "waiting for 1 "] == [line[:14] for line in told]
            assert f"in pid {holder.pid} on " in told[1]
            assert not takes(source, 1)
            assert not takes(target, 1)

            holder.tell("the answer")

            assert "the answer" == holder.line()
            done = mover.ends()
        holder.ends_well()

    assert (0, 1) == (done.code, done.out.count("moved 1 calls to"))
    assert ["the answer"] == [entry["result"] for entry in at(target, lambda guard: guard.history())]
    assert {} == {
        t: n["running"] for t, n in at(target, lambda g: g.stats())["tools"].items() if n["running"]
    }


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_the_end_of_a_lapsed_run_is_carried_later(pair: tuple[str, str], tmp_path: Path) -> None:
    """A run whose owner stalls past its lease goes along in doubt; its end follows on request."""
    source, target = places(pair, tmp_path)
    with stage(tmp_path) as here:
        holder = start(here, HOLDER, source, target, 1)
        assert "inside" == holder.line()
        holder.freeze()
        first = move(source, target, "--json").json
        with sides(source, target) as (left, right):
            [doubt] = reader_of(right.store).doubts()
            assert left.store.rows(doubt.call)[0]._replace(mono=0) == right.store.rows(doubt.call)[
                0
            ]._replace(mono=0)
        holder.tell("late but true")
        holder.send(signal.SIGCONT)
        assert "late but true" == holder.line()
        holder.ends_well()

    second = move(source, target, "--json").json
    third = move(source, target)

    assert [("moved", 0), ("late ends carried", 1)] == [(f["state"], f["late_ends"]) for f in (first, second)]
    assert (0, True) == (third.code, third.out.startswith("nothing new: "))
    [entry] = at(target, lambda guard: guard.history())
    assert ("success", "late but true") == (entry["status"], entry["result"])


@pytest.mark.parametrize("kind", WITH_LOG)
def test_an_end_after_a_takeover_at_the_target_is_late_there(kind: str, tmp_path: Path) -> None:
    """The call ran again at the target meanwhile: the first owner's success is kept beside its doubt."""
    source, target = places((kind, "redis" if kind == "sqlite" else "sqlite"), tmp_path)
    with sides_of_new(source, target) as (here, there):
        run_one = granted(here.store, lease=0)
        again = Renew(claim("c", token=run_one.owner, lease=0), 1)
        Move(here, there, progress=Progress(tell=lambda _: here.store.transact(again))).run()
        assert run_one.lease < here.store.rows("c")[0].lease
        assert held(here) == held(there)
        run_two = granted(there.store)
        here.store.transact(settle(run_one, result="1"))

        found = Move(here, there).run()

        assert ("late ends carried", 1) == (found.state, found.late_ends)
        rows = there.store.rows("c")
        assert [("doubt", "success"), ("running", None)] == [(row.status, row.late) for row in rows]
        assert run_two.owner == rows[1].owner
        assert "nothing new" == Move(here, there).run().state


def sides_of_new(source: Place, target: Place) -> Any:
    """Both sides of places where the source is made first."""
    with guard_on(source) as guard:
        guard.check()
    return sides(source, target)


def test_ctrl_c_leaves_it_sealed_and_a_rerun_goes_on(tmp_path: Path) -> None:
    """While it waits for a run, Ctrl-C ends it; the seal stays, and the same command ends the move."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    with stage(tmp_path) as here:
        holder = start(here, HOLDER, source, target, 60)
        assert "inside" == holder.line()
        with Terminal("move", *words(source, target), columns=200) as terminal:
            terminal.sees("waiting for 1 ")
            terminal.interrupt()
            done = terminal.ends()
        assert 130 == done.code
        assert "the same command goes on" in done.out
        assert not takes(source, 5)
        holder.tell("x")
        assert "x" == holder.line()
        holder.ends_well()

    assert "moved" == move(source, target, "--json").json["state"]
    assert takes(target, 5)


def test_a_second_mover_takes_over_from_one_that_stalls(tmp_path: Path) -> None:
    """Two movers at once: the later one ends the move, and the earlier one can write nothing any more."""
    source, target = places(("sqlite", "redis"), tmp_path)
    at(source, lambda guard: [guard(charge, number) for number in range(50)])
    with sides(source, target) as (here, there), sides(source, target) as (here_too, there_too):
        stalled: list[Any] = []

        def overtake(_: Progress) -> None:
            if not stalled:
                stalled.append(Move(here_too, there_too).run())
                granted(there_too.store, call="new")

        with pytest.raises(StoreError, match="another `ledger move` is at work here"):
            Move(here, there, progress=Progress(tell=overtake)).run()

        assert ["moved"] == [found.state for found in stalled]
        assert 1 == len(there.store.rows("new"))


class Cut(Exception):
    """The mover is cut off here."""


class Storyteller:
    """Does anything that callers and people do, at random, on a ledger that may be sealed."""

    def __init__(self, store: Any, random: Random) -> None:
        self.store = store
        self.random = random
        self.open: list[Run] = []
        self.may_only_end = False

    def do_something(self) -> None:
        """One operation on one of a few calls."""
        if self.may_only_end:
            self.settle()
            return
        with suppress(StoreError, InProgress):
            self.random.choice([self.claim, self.claim, self.settle, self.decide, self.reset, self.count])()
        self.store.flush()

    def claim(self) -> None:
        call, wf = f"c{self.random.randrange(40)}", f"w{self.random.randrange(3)}"
        lease = self.random.choice([0, LEASE])
        verdict = self.store.transact(
            claim(f"{call}{wf}", wf=wf, lease=lease, max=self.random.choice([1, 2]))
        )
        if verdict.kind == "granted":
            self.open.append(verdict.row)

    def settle(self) -> None:
        if self.open:
            run = self.open.pop(self.random.randrange(len(self.open)))
            end = self.random.choice(["success", "success", "failed", "suspended", "doubt"])
            self.store.transact(settle(run, end, result='"r"' if end == "success" else None))

    def decide(self) -> None:
        rows = self.store.rows(f"c{self.random.randrange(40)}w{self.random.randrange(3)}")
        if rows:
            ops = [release(rows[-1]), resolve(rows[-1], done=True), reset(2**53, rows[-1].call)]
            self.store.transact(self.random.choice(ops))

    def reset(self) -> None:
        if self.random.random() < 0.2:
            self.store.reset(f"w{self.random.randrange(3)}", 2**53)

    def count(self) -> None:
        wf = f"w{self.random.randrange(3)}"
        call = claim(f"c{self.random.randrange(40)}{wf}", wf=wf)
        self.store.count("blocked", call, 1)
        self.store.count("ran", claim(f"f{self.random.randrange(9)}", tool="free", wf=wf), 0)

    def end_all(self) -> None:
        """What still runs ends."""
        while self.open:
            self.settle()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pair", [*RING, ("sqlite", "redis"), ("redis", "postgres")], ids="-".join)
def test_whatever_happens_both_sides_agree(pair: tuple[str, str], seed: int, tmp_path: Path) -> None:
    """Random operations between all steps, and cuts before and after any of them: in the end all is there."""
    source, target = places(pair, tmp_path)
    random = Random(seed)
    with sides_of_new(source, target) as (here, there):
        teller = Storyteller(here.store, random)
        for _ in range(150):
            teller.do_something()

        def cuttable(plain: Any) -> Any:
            def step(*values: Any) -> None:
                for _ in range(random.randrange(4)):
                    teller.do_something()
                if random.random() < 0.1:
                    raise Cut
                plain(*values)
                teller.may_only_end = values[1].role in ("arrived", "moved")
                if random.random() < 0.1:
                    raise Cut

            return step

        def hear(told: str) -> None:
            if "that still run" in told:
                teller.end_all()

        for side in (here, there):
            side.step = cuttable(side.step)
        states = []
        while "nothing new" not in states:
            with suppress(Cut):
                states.append(Move(here, there, tell=hear).run().state)
        ours, theirs = held(here)[0], held(there)[0]
        assert list(ends(ours)) == list(ends(theirs))


def ends(calls: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What runs came to; times of ends that were carried are the target's own."""
    for call in sorted(calls):
        yield from ((r.call, r.run, r.status, r.late, r.owner) for r in calls[call] if isinstance(r, Run))


# -- undone, or not begun --


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_a_move_can_be_cancelled_until_it_opens(pair: tuple[str, str], tmp_path: Path) -> None:
    """The source begins runs again, the target holds nothing and stays closed; a new move goes there."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)
    with stage(tmp_path) as here:
        holder = start(here, HOLDER, source, target, 60)
        assert "inside" == holder.line()
        with begin_move(source, target) as mover:
            assert mover.process.stderr is not None
            assert "waiting for 1 " in [mover.process.stderr.readline() for _ in range(2)][1]
            cancelled = move(source, target, "--cancel", "--json")
            stopped = mover.ends()
        assert (0, "cancelled") == (cancelled.code, cancelled.json["state"])
        assert (1, True) == (stopped.code, "another `ledger move` is at work" in stopped.err)
        assert takes(source, 700)
        assert not takes(target, 700)
        with sides(source, target) as (_, there):
            assert there.is_empty()
        assert 1 == move(source, target, "--cancel").code
        holder.tell("x")
        assert "x" == holder.line()
        holder.ends_well()

    assert 0 == move(source, target).code
    refused = move(source, target, "--cancel")
    assert (1, True) == (refused.code, "was moved to" in refused.err and "nothing was changed" in refused.err)
    assert takes(target, 701)
    with sides(source, target) as (left, right):
        assert held(left)[0].items() <= held(right)[0].items()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancelling_that_was_cut_off_can_be_repeated(when: str, tmp_path: Path) -> None:
    """Killed at each of its steps, --cancel is run again; or the move is, and begins anew."""
    for again in ("cancel", "run"):
        source, target = places(("sqlite", "postgres"), tmp_path)
        at(source, tell_a_story)
        script = MOVER.replace(".run()", ".cancel()").replace(
            "step", "erase" if when == "before" else "unmark"
        )
        with stage(tmp_path / again) as here:
            assert -signal.SIGKILL == start(here, MOVER, source, target, 4, "after").ends()
            assert -signal.SIGKILL == start(here, script, source, target, 1, when).ends()

        with sides(source, target) as both:
            if again == "cancel" and when == "before":
                Move(*both).cancel()
        found = moved(source, target)

        assert ("moved", 11) == (found.state, found.calls)


def test_a_move_that_never_began_can_be_cancelled(tmp_path: Path) -> None:
    """Cut off between its two first marks it left the target closed: --cancel takes that back too."""
    for again in ("cancel", "run"):
        source, target = places(("sqlite", "redis"), tmp_path)
        at(source, tell_a_story)
        with stage(tmp_path / again) as here:
            assert -signal.SIGKILL == start(here, MOVER, source, target, 1, "after").ends()
        assert takes(source, 70)
        assert not takes(target, 70)

        if again == "cancel":
            assert "cancelled" == move(source, target, "--cancel", "--json").json["state"]
            assert not takes(target, 71)
            assert 1 == move(source, target, "--cancel").code

        assert 12 == moved(source, target).calls


def test_a_place_that_was_closed_by_mistake_is_free_again(tmp_path: Path) -> None:
    """A move that was cut off at once, and then went elsewhere: its first place may be cancelled and used."""
    source, wrong = places(("sqlite", "redis"), tmp_path)
    right = fresh_place("postgres", tmp_path)
    at(source, tell_a_story)
    with stage(tmp_path) as here:
        assert -signal.SIGKILL == start(here, MOVER, source, wrong, 1, "after").ends()
    assert "moved" == moved(source, right).state

    assert "cancelled" == move(source, wrong, "--cancel", "--json").json["state"]

    assert 11 == moved(right, wrong).calls
    assert takes(wrong, 71)


def test_a_source_whose_target_is_lost_is_unsealed_on_that_word_alone(tmp_path: Path) -> None:
    """A target that knows nothing of the move may be another one of its name: it takes more than --cancel."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    at(source, lambda guard: guard(charge, 1))
    with stage(tmp_path) as here:
        assert -signal.SIGKILL == start(here, MOVER, source, target, 6, "after").ends()
    for part in tmp_path.glob(f"{Path(target.url).name}*"):
        part.unlink()
    assert not takes(source, 2)

    for more in ((), ("--cancel",)):
        done = move(source, target, *more)
        assert (1, True) == (done.code, "--cancel --target-is-lost" in done.err)
    assert not takes(source, 2)
    assert 2 == move(source, target, "--target-is-lost").code
    assert 0 == move(source, target, "--cancel", "--target-is-lost").code

    assert takes(source, 2)
    assert 0 == move(source, target).code


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """One place twice, no such scheme, no source, a process's own memory, a target that holds something."""
    mine = tmp_path / "mine.db"
    at(Place(str(mine), None), lambda guard: guard(charge, 1))
    full = fresh_place("redis", tmp_path)
    at(full, lambda guard: guard(charge, 2))
    link = tmp_path / "link.db"
    link.symlink_to(mine)
    before = mine.read_bytes()
    cases = {
        ("gone.db", "new.db"): "there is no ledger at",
        ("mine.db", "mine.db"): "is the source and the target",
        ("mine.db", "link.db"): "is the source and the target",
        ("mine.db", "ftp://host/x"): "there is no store for ftp://",
        ("ftp://host/x", "new.db"): "there is no store for ftp://",
        ("memory://", "new.db"): "it lives in its own process",
        ("mine.db", "memory://"): "it lives in its own process",
        (fresh_place("redis", tmp_path).url + "/9", "new.db"): "there is no ledger at",
    }

    for given, told in cases.items():
        done = run("move", *given, cwd=tmp_path)
        assert (1, "", True) == (done.code, done.out, told in done.err), done.err
    more = run("move", "mine.db", full.url, "--to-namespace", full.namespace, cwd=tmp_path)
    assert (1, True) == (more.code, "is not empty, nothing was written" in more.err)
    assert 1 == run("move", "mine.db", "new.db", "--from-namespace", "x", cwd=tmp_path).code
    assert 2 == run("move", "mine.db").code
    assert before == mine.read_bytes()
    assert {"mine.db", "link.db"} == {p.name for p in tmp_path.iterdir() if "-" not in p.name}


def test_a_ledger_goes_to_one_target_only(tmp_path: Path) -> None:
    """While it is moved, and after, another target is refused, and so is a target that has a source."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    third, fourth = places(("sqlite", "redis"), tmp_path)
    for place in (source, fourth):
        at(place, lambda guard: guard(charge, 1))
    with stage(tmp_path) as here:
        assert -signal.SIGKILL == start(here, MOVER, source, target, 3, "after").ends()

    for wrong in ((source, third), (fourth, target)):
        done = move(*wrong)
        assert (1, True) == (done.code, "ing moved to" in done.err or "is receiving" in done.err), done.err
    assert 0 == move(source, target).code
    assert "was moved to" in move(source, third).err
    assert 0 == move(target, third).code
    assert 1 == move(source, target).code
    assert takes(third, 9)


# -- beside it --


@pytest.mark.parametrize("pair", RING, ids="-".join)
def test_both_sides_can_be_looked_at_while_they_are_closed(pair: tuple[str, str], tmp_path: Path) -> None:
    """Lists, sums and export work, and doctor says how each side stands."""
    source, target = places(pair, tmp_path)
    at(source, tell_a_story)
    with sides(source, target) as (here, there):

        def look_before(_: Progress) -> None:
            assert ["`ledger move` copies it to "] == [f.what[:27] for f in moving(here.store)]

        def look(told: str) -> None:
            assert told.startswith("sealed: ")
            for side in (here, there):
                reader = reader_of(side.store)
                assert 11 == reader.count() == len(list(reader.stream()))
                assert 10 < len(list(export(reader)))
                assert side.store.check()["ok"]
            assert ["this ledger was moved to "] == [f.what[:25] for f in moving(here.store)]
            assert ["this ledger is receiving the calls of "] == [f.what[:38] for f in moving(there.store)]

        Move(here, there, progress=Progress(tell=look_before), tell=look).run()

        assert [] == list(moving(there.store))
        assert ["this ledger was moved to "] == [f.what[:25] for f in moving(here.store)]


def test_doctor_is_content_with_a_file_that_came_by_a_move(tmp_path: Path) -> None:
    """Its totals and pages are right; of the one that was left it says where it went."""
    source, target = places(("redis", "sqlite"), tmp_path)
    at(source, lambda guard: guard(charge, 1))
    assert 0 == move(source, target).code

    found = run("doctor", target.url, "--json")
    back = fresh_place("sqlite", tmp_path)
    assert 0 == move(target, back).code
    left = run("doctor", target.url, "--json")

    assert [] == [f for f in found.json if not f["ok"] and f["name"] in ("totals", "integrity", "move")]
    assert (1, ["move"]) == (left.code, [f["name"] for f in left.json if not f["ok"] and f["name"] != "disk"])


def test_what_leaves_no_event_is_refused_during_a_move(tmp_path: Path) -> None:
    """Prune, import and restore would be missed: they wait until the move is over."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    at(source, lambda guard: guard(charge, 1))
    lines = ""
    with closing(SqliteStore(source.url)) as store:
        lines = "".join(export(reader_of(store)))
        backup(store, str(tmp_path / "backup"))
    with stage(tmp_path) as here:
        assert -signal.SIGKILL == start(here, MOVER, source, target, 3, "after").ends()

    now = time.time_ns() // 1000
    for path in (source.url, target.url):
        with closing(SqliteStore(path)) as store:
            with pytest.raises(StoreError, match="is part of a move"):
                prune(store, before=now)
            with pytest.raises(StoreError, match="is part of a move"):
                import_lines(path, lines.splitlines())
            with pytest.raises(StoreError, match="is part of a move"):
                restore(str(tmp_path / "backup"), path, actor="me")
    assert 0 == move(source, target).code
    with closing(SqliteStore(target.url)) as store:
        prune(store, before=now)


def test_a_backup_made_during_a_move_is_a_ledger_of_its_own(tmp_path: Path) -> None:
    """One that was made before the seal is restored as a plain ledger, one of a closed ledger is refused."""
    source, target = places(("sqlite", "sqlite"), tmp_path)
    at(source, lambda guard: guard(charge, 1))
    early, late, restored = (tmp_path / name for name in ("early", "late", "restored.db"))
    with stage(tmp_path) as here:
        assert -signal.SIGKILL == start(here, MOVER, source, target, 3, "after").ends()
    with closing(SqliteStore(source.url)) as store:
        backup(store, str(early))
    assert 0 == move(source, target).code
    with closing(SqliteStore(source.url)) as store:
        backup(store, str(late))

    restore(str(early), str(restored), actor="me")

    assert takes(Place(str(restored), None), 2)
    with pytest.raises(StoreError, match="was closed for a move when it was made"):
        restore(str(late), str(tmp_path / "other.db"), actor="me")
