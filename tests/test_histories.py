"""The histories of PROTOCOL section 6, one by one, as they end when no rule is missing.

Callers are P1, P2, P3; each history goes through the operations of a real store.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import InProgress, Record, Run, Store
from ledger_stores.testing import LEASE, FakeClock, claim, claim_of, release, renew, reset, resolve, settle
from tests.stores.kit import KINDS, SixMethodStore, open_store


class World:
    """One call in one store, and the callers around it."""

    def __init__(self, store: Store, clock: FakeClock) -> None:
        self.store = store
        self.clock = clock

    def enter(self, **values: Any) -> Run:
        """A claim that must be granted."""
        verdict = self.store.transact(claim(**values))
        assert verdict.kind == "granted"
        assert verdict.row is not None
        return verdict.row

    def ask(self, op: ledger.Op) -> str:
        """What the store answers."""
        return self.store.transact(op).kind

    def lapse(self) -> None:
        """Longer than the lease passes in silence."""
        self.clock.advance(301)

    @property
    def states(self) -> list[str]:
        return [r.status for r in self.store.rows("c")]


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """An empty store of each kind under a fake clock."""
    clock = FakeClock()
    store = open_store(request.param, tmp_path, clock)
    yield World(store, clock)
    store.close()


@pytest.fixture
def six(tmp_path: Path) -> World:
    """A store of six methods under a fake clock."""
    clock = FakeClock()
    return World(SixMethodStore(clock=clock), clock)


def between(world: World, act: Callable[[], object]) -> None:
    """Let `act` happen between the next reading and the append that was decided on it."""
    store = world.store
    assert isinstance(store, SixMethodStore)
    plain = store.claim

    def late_claim(record: Record) -> bool:
        store.claim = plain  # type: ignore[method-assign]
        act()
        return plain(record)

    store.claim = late_claim  # type: ignore[method-assign]


def test_a1_a_settle_between_look_and_insert_wins(world: World) -> None:
    """A1: P2 saw a lapsed run, P1 settles it; P2's claim is judged anew and starts nothing."""
    p1 = world.enter()
    world.lapse()
    seen = world.store.rows("c")
    assert "run" == claim().judge(seen, world.store.now_for(seen)).kind
    world.ask(settle(p1))

    assert "done" == world.ask(claim())
    assert ["success"] == world.states


def test_a1_inside_a_six_method_store(six: World) -> None:
    """A1 at the closest: the settle comes after P2's decision, and P2's append is refused."""
    p1 = six.enter()
    six.lapse()
    between(six, lambda: six.ask(settle(p1)))

    assert "done" == six.ask(claim())
    assert ["success"] == six.states


def test_a3r_a_resolve_between_look_and_insert_wins(world: World) -> None:
    """A3r: run 1 in doubt is resolved as done while P2 is deciding; P2 runs nothing."""
    p1 = world.enter()
    world.ask(settle(p1, "doubt"))
    seen = world.store.rows("c")
    assert "run" == claim().judge(seen, world.store.now_for(seen)).kind
    world.ask(resolve(p1, done=True))

    assert "done" == world.ask(claim())


def test_a3r_inside_a_six_method_store(six: World) -> None:
    """A3r at the closest: the resolve is appended first, and P2 has to look again."""
    p1 = six.enter()
    six.ask(settle(p1, "doubt"))
    between(six, lambda: six.ask(resolve(p1, done=True)))

    assert "done" == six.ask(claim())


def test_a3x_a_reset_between_look_and_insert_leaves_one_run(world: World) -> None:
    """A3x: P1 decides run 2, a reset and P2's claim come first; P1 finds P2's run alive."""
    world.ask(settle(world.enter(), "failed"))
    world.ask(reset(world.clock.wall()))
    world.enter()

    assert "live" == world.ask(claim())
    assert ["running"] == world.states


def test_a3x_inside_a_six_method_store(six: World) -> None:
    """A3x at the closest: what P1 decided before the reset is not written after it."""
    six.ask(settle(six.enter(), "failed"))

    def reset_and_claim() -> None:
        six.ask(reset(six.clock.wall()))
        six.enter()

    between(six, reset_and_claim)

    assert "live" == six.ask(claim())
    assert ["running"] == six.states


def test_a1g_a_late_success_between_look_and_insert_counts(world: World) -> None:
    """A1g: run 1 given up, run 2 failed; P1's late success lands first, and no run 3 starts."""
    p1 = world.enter()
    world.lapse()
    world.ask(settle(world.enter(), "failed"))
    world.ask(settle(p1))

    assert "done" == world.ask(claim())
    assert ["doubt", "failed"] == world.states


def test_a1g_inside_a_six_method_store(six: World) -> None:
    """A1g at the closest: the late end is a version too, so P1's decision on run 3 is refused."""
    p1 = six.enter()
    six.lapse()
    six.ask(settle(six.enter(), "failed"))
    between(six, lambda: six.ask(settle(p1)))

    assert "done" == six.ask(claim())


def test_a2_takeover_closes_the_old_row(world: World) -> None:
    """A2: after a takeover the paused owner's renewal is refused."""
    p1 = world.enter()
    world.lapse()
    world.enter()

    assert "lost" == world.ask(renew(p1))
    assert ["doubt", "running"] == world.states


def test_a4_a_failed_forced_run_hides_no_success(world: World) -> None:
    """A4: success, then a forced run that fails: a normal call is still a duplicate."""
    world.ask(settle(world.enter(), result="1"))
    world.ask(settle(world.enter(forced=True), "failed"))

    verdict = world.store.transact(claim())

    assert ("done", 1, "1") == (
        verdict.kind,
        verdict.row and verdict.row.run,
        verdict.row and verdict.row.result,
    )


def test_a4_max_counts_successes_behind_a_failure(world: World) -> None:
    """A4 with max=2: two successes and a forced failure leave no room for a third."""
    for _ in range(2):
        world.ask(settle(world.enter(max=2)))
    world.ask(settle(world.enter(max=2, forced=True), "failed"))

    assert "done" == world.ask(claim(max=2))


def test_a5_a_late_success_stops_the_third_run(world: World) -> None:
    """A5: P1 ends late with success, P2 raises "already charged"; nobody charges again."""
    p1 = world.enter()
    world.lapse()
    p2 = world.enter()
    world.ask(settle(p1))
    world.ask(settle(p2, "failed"))

    assert "done" == world.ask(claim())
    assert "success" == world.store.rows("c")[0].late


def test_a6_a_zombie_settles_nobody_elses_run(world: World) -> None:
    """A6: P1 lapses, a reset, P2 claims run 1 anew; P1's end does not touch it."""
    p1 = world.enter()
    world.lapse()
    world.ask(reset(world.clock.wall()))
    p2 = world.enter()

    assert "gone" == world.ask(settle(p1))
    assert [("running", p2.owner)] == [(r.status, r.owner) for r in world.store.rows("c")]


@pytest.mark.parametrize("end", ["success", "failed", "suspended", "doubt"])
def test_a7_a_zombie_overwrites_no_closed_row(world: World, end: str) -> None:
    """A7: the run that was given up keeps its status whatever its owner says later."""
    p1 = world.enter()
    world.lapse()
    world.enter()

    assert "late" == world.ask(settle(p1, end))
    assert ["doubt", "running"] == world.states


def test_a8_a_zombie_reopens_no_closed_row(world: World) -> None:
    """A8: a renewal after the row was given up changes neither status nor lease."""
    p1 = world.enter()
    world.lapse()
    world.enter()
    before = world.store.rows("c")

    assert "lost" == world.ask(renew(p1))
    assert before == world.store.rows("c")


def test_a9_two_threads_are_two_owners(world: World) -> None:
    """A9: a second claim of the same process is another token and finds a live run."""
    world.enter()

    assert "live" == world.ask(claim())


def test_a10_a_repeat_does_not_enter_a_closed_row(world: World) -> None:
    """A10: claim, reply lost, lapse, takeover: the repeated claim is told that its run is lost."""
    asked = claim()
    world.ask(asked)
    world.lapse()
    world.enter()

    assert "lost" == world.ask(asked)
    assert ["doubt", "running"] == world.states


def test_a11_a_repeated_retry_releases_one_run(world: World) -> None:
    """A11: retry, reply lost, run 2 succeeds: the repeat releases nothing more."""
    p1 = world.enter()
    world.ask(settle(p1))
    asked = release(p1)
    world.ask(asked)
    world.ask(settle(world.enter()))

    assert "used" == world.ask(asked)
    assert "done" == world.ask(claim())


def test_a12_a_reset_spares_live_runs(world: World) -> None:
    """A12: P1 is in the tool: the reset is refused, and P2 does not enter."""
    world.enter()

    assert "live" == world.ask(reset(world.clock.wall()))
    with pytest.raises(InProgress):
        world.store.reset(None, world.clock.wall())
    assert "live" == world.ask(claim())


def test_a12_a_repeated_reset_spares_younger_runs(world: World) -> None:
    """R8: a reset whose reply was lost does not forget what happened after it was asked."""
    world.ask(settle(world.enter()))
    asked = reset(world.clock.wall())
    world.ask(asked)
    world.clock.advance(1)
    world.ask(settle(world.enter()))

    assert "used" == world.ask(asked)
    assert ["success"] == world.states


def test_a13_force_waits_for_a_live_run(world: World) -> None:
    """A13: force passes over the history, never over somebody in the tool."""
    world.enter()

    assert "live" == world.ask(claim(forced=True))
    assert ["running"] == world.states


def test_a14_a_resolve_of_an_older_run_changes_nothing(world: World) -> None:
    """A14: resolve read run 1, P2 claimed run 2: run 1 stays a doubt."""
    p1 = world.enter()
    world.ask(settle(p1, "doubt"))
    world.enter()

    assert "used" == world.ask(resolve(p1, done=True))
    assert ["doubt", "running"] == world.states


def test_a14b_a_late_not_done_finds_the_row_changed(world: World) -> None:
    """A14b: two callers answer NOT DONE: one of them runs, the other finds it running."""
    p1 = world.enter()
    world.ask(settle(p1, "doubt"))
    answer: dict[str, Any] = {"on_doubt": "reconcile", "not_done": (p1.run, p1.owner)}

    assert ["granted", "live"] == [world.ask(claim(**answer)) for _ in range(2)]


def test_not_done_gives_way_to_a_release(world: World) -> None:
    """R10: a doubt that was released meanwhile is not rewritten by a reconcile's answer."""
    p1 = world.enter()
    world.ask(settle(p1, "doubt"))
    world.ask(release(p1))

    assert "settled" == world.ask(resolve(p1, done=True, reconciled=True))
    world.enter(on_doubt="reconcile", not_done=(p1.run, p1.owner))
    assert ["doubt", "running"] == world.states


def test_a15_a_living_process_does_not_keep_an_abandoned_run(world: World) -> None:
    """A15: the claim's caller gave up, its process lives on: the lease decides, and P2 runs."""
    world.enter()
    world.lapse()

    assert 2 == world.enter().run


def test_a15b_a_caller_that_gave_up_frees_the_call_at_once(world: World) -> None:
    """A15b: the row that was not entered is closed as failed, and nobody waits for the lease."""
    run = world.enter()
    world.ask(ledger._not_entered(claim_of(run), run.run))

    assert 2 == world.enter().run
    assert "failed" == world.states[0]


def test_a15c_an_owner_that_may_have_execed_proves_nothing(world: World) -> None:
    """A15c: the same pid and start time do not extend a lease that lapsed."""
    run = world.enter()
    world.lapse()
    assert run.owner.startswith(ledger._me().id)

    assert 2 == world.enter().run


def test_a16_a_living_owner_is_not_taken_for_dead() -> None:
    """A16: death is declared only with proof; another namespace, another boot or no proof is none."""
    me = ledger._me()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        alive = ledger._identify(other.pid)._replace(boot=me.boot, space=me.space)
        started = ledger._stat_fields(other.pid)[19]

        assert not ledger._is_dead(alive._replace(start=started))
    finally:
        other.communicate()
    gone = alive._replace(start=started)
    assert ledger._is_dead(gone)
    assert not ledger._is_dead(gone._replace(space="4026530000"))
    assert not ledger._is_dead(gone._replace(boot="another boot"))
    assert not ledger._is_dead(gone._replace(space=""))


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a17_a_step_of_the_wall_clock_moves_no_lease(kind: str, seconds: int, tmp_path: Path) -> None:
    """A17: on one boot the monotonic clock decides: a step neither kills nor keeps a run."""
    clock = FakeClock()
    world = World(open_store(kind, tmp_path, clock), clock)
    world.enter()
    clock.step_wall(seconds)

    assert "live" == world.ask(claim())
    world.lapse()
    assert 2 == world.enter().run
    world.store.close()


def test_a18_a_closed_doubt_still_blocks(world: World) -> None:
    """A18: cancelled, hence in doubt: under block the next call does not run."""
    world.ask(settle(world.enter(), "doubt"))

    assert "doubt" == world.ask(claim(on_doubt="block"))


def test_a19_a_repeat_finds_its_own_row_first(world: World) -> None:
    """A19: the repeat of a claim enters its row, also under block after a lapse."""
    asked = claim(on_doubt="block")
    world.ask(asked)
    world.lapse()

    assert "granted" == world.ask(asked)
    assert "live" == world.ask(claim(on_doubt="block"))
    assert world.clock.wall() + LEASE == world.store.rows("c")[0].lease


def test_a20_counts_of_many_threads_add_up(world: World) -> None:
    """A20: no increment is lost between threads that count the same call."""
    asked = claim()
    world.ask(asked)

    def count() -> None:
        for _ in range(50):
            world.store.count("blocked", asked, 1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.store.flush()

    record = world.store.look("c")
    assert record is not None
    assert 400 == record.blocked


def test_a21_a_repeated_count_is_written_once(six: World) -> None:
    """A21: the counter's reply is lost after the put: the next number is absolute, so it is right."""
    store = six.store
    assert isinstance(store, SixMethodStore)
    asked = claim()
    six.ask(asked)
    store.count("blocked", asked, 1)
    [counter] = (r for r in store.all() if "~n~" in r.id)

    store.put(counter)
    store.count("blocked", asked, 1)

    record = store.look("c")
    assert record is not None
    assert 2 == record.blocked


def test_n1_a_settle_survives_a_takeover_decided_before_it(six: World) -> None:
    """N1: P2's takeover was decided on RUNNING, P1 settles first: SUCCESS stays."""
    p1 = six.enter()
    six.lapse()
    between(six, lambda: six.ask(settle(p1)))

    assert "done" == six.ask(claim())
    assert ["success"] == six.states


def test_n2_counting_never_writes_the_status(six: World) -> None:
    """N2: a count between P1's read and its settle leaves both: the counter is its own record."""
    asked = claim()
    p1 = six.store.transact(asked).row
    assert p1 is not None
    between(six, lambda: six.store.count("blocked", asked, 1))
    six.ask(settle(p1))

    record = six.store.look("c")
    assert record is not None
    assert ("success", 1) == (record.status, record.blocked)


def test_n3_a_settle_survives_a_retry_decided_before_it(six: World) -> None:
    """N3: retry was decided on a lapsed run, P1 settles first: the success is what is released."""
    p1 = six.enter()
    six.lapse()
    between(six, lambda: six.ask(settle(p1)))

    assert "released" == six.ask(release(p1))
    assert [("success", 1)] == [(r.status, r.released) for r in six.store.rows("c")]


def test_n4_a_settle_survives_a_renewal_decided_before_it(six: World) -> None:
    """N4: the keeper's renewal was decided on RUNNING, the tool ends first: it stays ended."""
    p1 = six.enter()
    between(six, lambda: six.ask(settle(p1)))

    assert "lost" == six.ask(renew(p1))
    assert ["success"] == six.states


def test_n5_n6_l3_a_reset_appends_and_deletes_nothing(six: World) -> None:
    """N5, N6, L3: versions stay when a call is reset, so an old view can claim no hole."""
    store = six.store
    assert isinstance(store, SixMethodStore)
    six.ask(settle(six.enter()))
    before = dict(store.records)

    store.reset(None, six.clock.wall())

    assert before.items() <= store.records.items()
    assert {"c", "c~2", "c~3"} == set(store.records)
    assert "live" == (six.enter() and six.ask(claim()))


def test_l1_a_renewal_is_a_version(six: World) -> None:
    """L1: a takeover decided before a renewal is refused by it; P1 keeps the tool for itself."""
    p1 = six.enter()
    six.lapse()
    between(six, lambda: six.ask(renew(p1)))

    assert "live" == six.ask(claim())
    assert ["running"] == six.states


def test_l2_a_late_end_is_a_version(six: World) -> None:
    """L2: run 3 decided before P1's late success is refused by it."""
    p1 = six.enter()
    six.lapse()
    six.ask(settle(six.enter(), "failed"))
    between(six, lambda: six.ask(settle(p1)))

    assert "done" == six.ask(claim())
    assert ["doubt", "failed"] == six.states


def test_a_version_whose_reply_was_lost_is_recognized(six: World) -> None:
    """Section 4.2: claim(version) came through but answered False: the token in it says whose it is."""
    store = six.store
    assert isinstance(store, SixMethodStore)
    plain = store.claim

    def forgetful(record: Record) -> bool:
        plain(record)
        return False

    store.claim = forgetful  # type: ignore[method-assign]

    assert "granted" == six.ask(claim())
    assert ["running"] == six.states


def test_retry_before_the_zombies_settle_still_runs(world: World) -> None:
    """Retry first, P1's success late: the row is released, so the run that was asked for happens."""
    p1 = world.enter()
    world.lapse()
    world.ask(release(p1))

    assert "late" == world.ask(settle(p1))
    assert 2 == world.enter().run


def test_retry_after_the_zombies_settle_runs_too(world: World) -> None:
    """Settle first: the success is released, and the next call runs."""
    p1 = world.enter()
    world.lapse()
    world.ask(settle(p1))
    world.ask(release(p1))

    assert 2 == world.enter().run
