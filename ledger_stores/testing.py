"""Does a store keep the promises? A suite for pytest that a store of yours can be put through.

    from ledger_stores.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def make(self, folder, clock):
            return MyStore(clock=clock)      # a new, empty store

What a store cannot do by its nature it declares in the attributes below; nothing is skipped in
silence.  Needs pytest.  A store on a server, whose own clock decides leases, overrides `advance`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Claim, Clock, Guard, InProgress, Now, Op, Run, Store

SECOND = 1_000_000
LEASE = 300 * SECOND
_BRANCHES = ("success", "failed", "suspended", "doubt")
_ODD = (
    "",
    " ",
    "a'b\"c\\",
    "x\u0000y",
    "\u202etxt",
    "🙂" * 50,
    "; DROP TABLE runs; --",
    "{}[]*?:~",
    "é\u0301" * 3000,
)


class FakeClock(Clock):
    """Stands still until it is told otherwise; both clocks move together unless the wall is stepped."""

    def __init__(self) -> None:
        self._wall = 1_700_000_000 * SECOND
        self._mono = 5_000 * SECOND

    def wall(self) -> int:
        """The fake time of day."""
        return self._wall

    def mono(self) -> int:
        """The fake monotonic time."""
        return self._mono

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._wall += int(seconds * SECOND)
        self._mono += int(seconds * SECOND)

    def step_wall(self, seconds: float) -> None:
        """Set the time of day, as an administrator does."""
        self._wall += int(seconds * SECOND)


# ── operations by name ────────────────────────────────────────────────────────────────


def claim(call: str = "c", **values: Any) -> Claim:
    """A claim that asks for the first run of a call unless told otherwise."""
    defaults: dict[str, Any] = {
        "token": ledger.new_token(), "tool": "tests.charge", "wf": "w", "caller": "", "key": None,
        "matched": None, "max": 1, "ttl": None, "lease": LEASE, "on_doubt": "rerun", "forced": False,
    }  # fmt: skip
    return Claim(call=call, **{**defaults, **values})


def claim_of(run: Run) -> Claim:
    """The claim that this run came from."""
    return claim(run.call, token=run.owner, tool=run.tool, wf=run.wf)


def settle(run: Run, status: str = "success", *, result: str | None = None) -> ledger.Settle:
    """The owner's word on how that run ended."""
    return ledger.Settle(claim_of(run), run.run, status, result)


def renew(run: Run) -> ledger.Renew:
    """The owner of that run is alive."""
    return ledger.Renew(claim_of(run), run.run)


def release(run: Run, *, limit: int = 1, ttl: int | None = None, token: str = "") -> ledger.Release:
    """`retry` by somebody who saw that run."""
    return ledger.Release(run.call, token or ledger.new_token(), run.run, run.owner, limit, ttl, "retry")


def resolve(
    run: Run, *, done: bool, result: str | None = None, reconciled: bool = False, token: str = ""
) -> ledger.Resolve:
    """The answer of somebody who saw that run and found out."""
    token = token or ledger.new_token()
    return ledger.Resolve(run.call, token, run.run, run.owner, done, result, reconciled, "told")


def reset(asked: int, call: str = "c", token: str = "") -> ledger.Reset:
    """Forget one call."""
    return ledger.Reset(call, token or ledger.new_token(), asked)


def shape(rows: Any) -> list[tuple[Any, ...]]:
    """What the protocol says about rows: number, status, owner and the marks beside them."""
    return [
        (r.run, r.status, r.owner, r.ended, r.closed_by, r.released, r.forced, r.late, r.late_at)
        for r in rows
    ]


def granted(store: Store, **values: Any) -> Run:
    """The row of a claim that must be granted."""
    verdict = store.transact(claim(**values))
    assert verdict.kind == "granted"
    assert verdict.row is not None
    return verdict.row


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(n)` gives in so many threads that begin at once; the first error is raised."""
    gate = threading.Barrier(count)
    found: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            gate.wait(30)
            found[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


class StoreConformance:
    """What every store promises. Subclass it, give `make`, and let pytest find the subclass."""

    #: it keeps the log of events (a six-method store has none)
    keeps_events = True
    #: callers in other processes reach the same calls through `again`
    is_shared = False
    #: one database holds several ledgers, which `beside` opens
    has_namespaces = False
    #: a reset of several calls is one step: a live run among them keeps all
    resets_at_once = True

    def make(self, folder: Path, clock: Clock) -> Store:
        """A new and empty store; `folder` is empty and for it alone."""
        raise NotImplementedError(
            f"{type(self).__name__} must say how its store is made: make(folder, clock)"
        )

    def again(self, store: Store) -> Store:
        """The same calls through another handle, as another process has it."""
        raise NotImplementedError(f"{type(self).__name__} is_shared and must say how: again(store)")

    def beside(self, store: Store) -> Store:
        """An empty ledger of another namespace in the same database."""
        raise NotImplementedError(f"{type(self).__name__} has_namespaces and must say how: beside(store)")

    def advance(self, store: Store, clock: FakeClock, seconds: float) -> None:
        """Let time pass for whoever decides leases."""
        clock.advance(seconds)

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The only thing that is not real."""
        return FakeClock()

    @pytest.fixture
    def store(self, tmp_path: Path, clock: FakeClock) -> Iterator[Store]:
        """An empty store; afterwards no call has two open runs, and nothing stays open."""
        made = self.make(tmp_path, clock)
        yield made
        for _, rows in made.calls():
            assert sum(r.status == "running" for r in rows) <= 1
        made.close()

    # ── claim ─────────────────────────────────────────────────────────────────────────

    def test_a_first_claim_is_granted(self, store: Store) -> None:
        """Whoever claims a call that nobody made gets run 1, with a lease."""
        run = granted(store)

        assert (run.run, run.status, run.closed_by) == (1, "running", None)
        assert [shape([run]), run.lease] == [shape(rows := store.rows("c")), rows[0].lease]

    def test_a_second_claim_finds_a_live_run(self, store: Store) -> None:
        """While a run is alive nobody else gets one, and the loser learns whose it is."""
        run = granted(store)

        verdict = store.transact(claim())

        assert ("live", run.owner) == (verdict.kind, verdict.row and verdict.row.owner)

    def test_a_duplicate_gets_the_success(self, store: Store) -> None:
        """After a success the claim is refused and names the run with the result."""
        store.transact(settle(granted(store), result='"receipt"'))

        verdict = store.transact(claim())

        assert (verdict.kind, verdict.row and verdict.row.result) == ("done", '"receipt"')

    @pytest.mark.parametrize("end", ["failed", "suspended"])
    def test_a_run_that_did_not_succeed_frees_the_call(self, store: Store, end: str) -> None:
        """Failed and suspended runs are followed by run 2."""
        store.transact(settle(granted(store), end))

        assert granted(store).run == 2

    def test_a_lapsed_run_is_taken_over(self, store: Store, clock: FakeClock) -> None:
        """Takeover closes the old run as in doubt and starts the next one, in one step."""
        granted(store)
        self.advance(store, clock, 301)

        taken = granted(store)

        rows = store.rows("c")
        assert [("doubt", taken.owner), ("running", None)] == [(r.status, r.closed_by) for r in rows]

    def test_max_counts_successes(self, store: Store) -> None:
        """`max=2` allows two successes, one at a time; failures do not count."""
        for end in ("success", "failed"):
            run = granted(store, max=2)
            assert store.transact(claim(max=2)).kind == "live"
            store.transact(settle(run, end))
        store.transact(settle(granted(store, max=2)))

        assert store.transact(claim(max=2)).kind == "done"

    def test_ttl_opens_the_call_again(self, store: Store, clock: FakeClock) -> None:
        """A success older than the window does not count, a younger one does."""
        store.transact(settle(granted(store)))

        self.advance(store, clock, 99)
        young = store.transact(claim(ttl=100 * SECOND)).kind
        self.advance(store, clock, 1)

        assert (young, store.transact(claim(ttl=100 * SECOND)).kind) == ("done", "granted")

    def test_force_passes_over_a_success_and_never_over_a_live_run(self, store: Store) -> None:
        """The history does not hold a forced run; a live run does."""
        store.transact(settle(granted(store)))

        forced = granted(store, forced=True)

        assert (forced.run, forced.forced) == (2, 1)
        assert store.transact(claim(forced=True)).kind == "live"

    # ── settle and renew ──────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("end", ["success", "failed"])
    def test_an_end_after_takeover_is_late(self, store: Store, clock: FakeClock, end: str) -> None:
        """The owner that was given up changes no status; its end is kept beside it, once."""
        first = granted(store)
        self.advance(store, clock, 301)
        granted(store)

        kinds = [store.transact(settle(first, word)).kind for word in (end, "failed")]

        assert kinds == ["late", "late"]
        assert ("doubt", end) == (store.rows("c")[0].status, store.rows("c")[0].late)

    def test_a_late_success_counts(self, store: Store, clock: FakeClock) -> None:
        """After a late success no further run starts, although the latest run failed."""
        first = granted(store)
        self.advance(store, clock, 301)
        second = granted(store)
        store.transact(settle(first, "success", result="1"))
        store.transact(settle(second, "failed"))

        verdict = store.transact(claim())

        assert (verdict.kind, verdict.row and verdict.row.result) == ("done", "1")

    @pytest.mark.parametrize("end", _BRANCHES)
    @pytest.mark.parametrize("then", _BRANCHES)
    def test_a_stranger_settles_nothing(self, store: Store, end: str, then: str) -> None:
        """Neither another owner nor a second word of the same owner changes a closed run."""
        run = granted(store)
        store.transact(settle(run, end))
        before = shape(store.rows("c"))

        stranger = store.transact(settle(run._replace(owner="nobody.1"), then)).kind
        again = store.transact(settle(run, then)).kind

        assert ("gone", "settled", before) == (stranger, again, shape(store.rows("c")))

    def test_a_renewal_starts_the_lease_anew(self, store: Store, clock: FakeClock) -> None:
        """A run that is renewed is alive for another lease; also one that had lapsed unnoticed."""
        run = granted(store)
        self.advance(store, clock, 301)

        assert store.transact(renew(run)).kind == "renewed"
        assert store.transact(claim()).kind == "live"

    @pytest.mark.parametrize("end", ["success", "failed", "doubt"])
    def test_a_closed_run_is_not_renewed(self, store: Store, end: str) -> None:
        """The owner of a run that is over is told that it is lost."""
        run = granted(store)
        store.transact(settle(run, end))

        assert store.transact(renew(run)).kind == "lost"
        assert end == store.rows("c")[-1].status

    # ── doubt ─────────────────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("lapsed", [True, False])
    @pytest.mark.parametrize(("mode", "answer"), [("block", "doubt"), ("reconcile", "reconcile")])
    def test_a_doubt_holds_the_call(
        self, store: Store, clock: FakeClock, lapsed: bool, mode: str, answer: str
    ) -> None:
        """Under block and reconcile nothing runs after a doubt, and looking closes nothing."""
        self._in_doubt(store, clock, lapsed)
        before = store.rows("c")

        assert answer == store.transact(claim(on_doubt=mode)).kind
        assert before == store.rows("c")

    @pytest.mark.parametrize("lapsed", [True, False])
    def test_not_done_closes_the_doubt_and_runs(self, store: Store, clock: FakeClock, lapsed: bool) -> None:
        """The answer NOT_DONE makes run n a failure and gives run n + 1 to the same caller, once."""
        run = self._in_doubt(store, clock, lapsed)
        answer: dict[str, Any] = {"on_doubt": "reconcile", "not_done": (run.run, run.owner)}

        first, second = (store.transact(claim(**answer)).kind for _ in range(2))

        assert (first, second) == ("granted", "live")
        assert [r.status for r in store.rows("c")] == ["failed", "running"]

    @pytest.mark.parametrize(("done", "status"), [(True, "success"), (False, "failed")])
    @pytest.mark.parametrize("lapsed", [True, False])
    def test_a_doubt_is_resolved_once(
        self, store: Store, clock: FakeClock, done: bool, status: str, lapsed: bool
    ) -> None:
        """Done makes a doubt a success, not done a failure; the second answer changes nothing."""
        run = self._in_doubt(store, clock, lapsed)

        kinds = [store.transact(resolve(run, done=answer)).kind for answer in (done, not done)]

        assert (["resolved", "settled"], status) == (kinds, store.rows("c")[-1].status)

    @pytest.mark.parametrize("end", ["success", "failed", "suspended"])
    def test_a_final_run_is_not_resolved(self, store: Store, end: str) -> None:
        """Only a doubt can be resolved; anything else stays as it is."""
        run = granted(store)
        store.transact(settle(run, end))
        before = store.rows("c")

        kinds = {store.transact(resolve(run, done=done)).kind for done in (True, False)}

        assert ({"settled"}, before) == (kinds, store.rows("c"))

    def _in_doubt(self, store: Store, clock: FakeClock, lapsed: bool) -> Run:
        run = granted(store)
        if lapsed:
            self.advance(store, clock, 301)
        else:
            store.transact(settle(run, "doubt"))
        return run

    # ── release and reset ─────────────────────────────────────────────────────────────

    def test_retry_lets_the_next_call_run(self, store: Store) -> None:
        """A released success does not count; the run after it counts again."""
        run = granted(store)
        store.transact(settle(run))

        assert store.transact(release(run)).kind == "released"
        store.transact(settle(granted(store)))
        assert store.transact(claim()).kind == "done"

    def test_retry_is_refused_beside_a_live_run(self, store: Store) -> None:
        """A live run is not released."""
        run = granted(store)

        assert store.transact(release(run)).kind == "live"
        assert store.rows("c")[-1].released == 0

    def test_there_is_nothing_to_do_in_an_unknown_call(self, store: Store) -> None:
        """What was never called is not released, resolved or reset."""
        run = claim().first_row(0, 0)

        ops: list[Op] = [release(run), resolve(run, done=True), reset(0)]

        assert [store.transact(op).kind for op in ops] == ["nothing"] * 3

    def test_a_reset_forgets_the_call(self, store: Store) -> None:
        """After a reset the call runs as if it had never been made."""
        store.transact(settle(granted(store)))

        store.reset("w", store.clock.wall())

        assert store.rows("c") == []
        assert granted(store).run == 1

    def test_a_reset_is_refused_while_a_run_lives(self, store: Store) -> None:
        """A workflow with a live run keeps that call, and the error names the owner."""
        store.transact(settle(granted(store, call="d")))
        granted(store)

        with pytest.raises(InProgress, match=r"nothing was reset.*call c.*running in .+"):
            store.reset("w", store.clock.wall())

        assert len(store.rows("c")) == 1
        assert not self.resets_at_once or len(store.rows("d")) == 1

    def test_a_reset_of_one_workflow_leaves_the_others(self, store: Store) -> None:
        """What another workflow did stays done."""
        store.transact(settle(granted(store)))
        store.transact(settle(granted(store, call="d", wf="other")))

        store.reset("w", store.clock.wall())

        assert (store.rows("c"), len(store.rows("d"))) == ([], 1)

    def test_a_workflow_is_an_action_of_its_own(self, store: Store) -> None:
        """The same tool with the same arguments runs once in each workflow."""
        guard = Guard(store=store, quiet=True)
        runs: list[int] = []

        def tool(number: int) -> None:
            runs.append(number)

        for wf in ("w1", "w2", "w1"):
            with guard.workflow(wf):
                guard(tool, 7)

        assert [7, 7] == runs

    def test_namespaces_do_not_meet(self, store: Store) -> None:
        """What is done in one is unknown in the other, and a reset of one leaves the other as it is."""
        if not self.has_namespaces:
            return
        other = self.beside(store)
        store.transact(settle(granted(store)))

        assert 1 == granted(other).run
        store.reset(None, store.clock.wall())
        assert (0, 1) == (len(list(store.calls())), len(list(other.calls())))
        other.close()

    # ── lost replies ──────────────────────────────────────────────────────────────────

    def test_a_repeated_claim_knows_its_own_row(self, store: Store) -> None:
        """The same token enters its own open run again, and never one that was closed."""
        asked = claim()
        run = store.transact(asked).row

        again = store.transact(asked)

        assert again.row is not None
        assert (again.kind, again.row.run, len(store.rows("c"))) == ("granted", 1, 1)
        assert run is not None
        store.transact(settle(run))
        assert store.transact(asked).kind == "lost"

    def test_a_claim_that_is_given_up_is_closed_whatever_its_run(self, store: Store) -> None:
        """Its reply was lost, so its owner does not know the number; the token finds the row."""
        store.transact(settle(granted(store), "failed"))
        run = granted(store)

        assert "settled" == store.transact(settle(run._replace(run=1), "failed")).kind
        assert ["failed", "failed"] == [r.status for r in store.rows("c")]

    def test_a_repeated_settle_or_release_changes_nothing_more(self, store: Store) -> None:
        """An operation that is sent twice, because its reply was lost, counts once."""
        run = granted(store)
        once: list[Op] = [settle(run, result="1"), release(run), release(run)]
        for op in once:
            store.transact(op)
        second = granted(store)
        store.transact(settle(second))
        before = shape(store.rows("c"))

        kinds = [store.transact(op).kind for op in (settle(run), release(run), settle(second))]

        assert (["settled", "used", "settled"], before) == (kinds, shape(store.rows("c")))

    # ── counting, events, sums ────────────────────────────────────────────────────────

    def test_blocked_attempts_are_counted(self, store: Store) -> None:
        """Every attempt that ran nothing is in the record, and attempts are runs plus those."""
        asked = claim()
        store.transact(asked)

        def ask(_: int) -> None:
            for _ in range(25):
                store.count("blocked", asked, 1)

        in_parallel(8, ask)
        store.flush()

        record = store.look("c")

        assert record is not None
        assert (record.attempts, record.blocked) == (201, 200)

    def test_an_unlimited_tool_is_counted_without_a_claim(self, store: Store) -> None:
        """Runs of an unlimited tool make one row that counts, and no run."""
        asked = claim()
        for kind in ("ran", "ran", "raised"):
            store.count(kind, asked, 0, "Boom" if kind == "raised" else None)
        store.flush()

        [(record, rows)] = store.calls()

        assert (record.attempts, record.runs, rows) == (3, 2, [])

    def test_every_transition_has_its_event(self, store: Store, clock: FakeClock) -> None:
        """Claims, ends, late ends, releases and answers are in the log, in the order in which they happened."""
        first = granted(store)
        self.advance(store, clock, 301)
        second = granted(store)
        store.transact(settle(first))
        store.transact(settle(second, "failed"))
        store.transact(release(second))
        store.transact(settle(third := granted(store, max=2), "doubt"))
        store.transact(resolve(third, done=True))

        events = list(store.events())

        kinds = ["claimed", "doubt", "claimed", "late", "failed", "released", "claimed", "doubt", "resolved"]
        assert (kinds if self.keeps_events else []) == [e["kind"] for e in events]
        numbers = [e["seq"] for e in events]
        assert sorted(set(numbers)) == numbers
        if self.keeps_events:
            assert events[4:] == list(store.events(after=numbers[3]))

    def test_totals_are_what_a_recount_gives(self, store: Store, clock: FakeClock) -> None:
        """The sums per tool are those of all calls, whatever happened to them."""
        self._all_sorts(store, clock)

        recount: dict[str, dict[str, int]] = {}
        for record, rows in store.calls():
            sums = recount.setdefault(record.tool, dict.fromkeys(ledger._TOTALS, 0))
            sums["actions"] += 1
            sums["attempts"] += record.attempts
            sums["blocked"] += record.blocked
            sums["executed"] += sum("success" in (r.status, r.late) for r in rows)
            if record.in_doubt:
                sums["in_doubt"] += 1
            elif record.status.value in sums:
                sums[record.status.value] += 1

        assert recount == store.totals()

    def _all_sorts(self, store: Store, clock: FakeClock) -> None:
        for number, end in enumerate([*_BRANCHES, "late", "told", "forced", "", "gone"]):
            asked = claim(call=f"c{number}", tool=f"tests.tool{number % 2}")
            run = store.transact(asked).row
            assert run is not None
            store.count("blocked", asked, 1)
            if end in ("late", "gone"):
                self.advance(store, clock, 301)
                store.transact(claim(call=run.call, tool=run.tool))
                store.transact(settle(run, "success" if end == "late" else "failed"))
            elif end == "told":
                store.transact(settle(run, "doubt"))
                store.transact(resolve(run, done=True))
            elif end == "forced":
                store.transact(settle(run))
                store.transact(settle(granted(store, call=run.call, tool=run.tool, forced=True)))
            elif end:
                store.transact(settle(run, end))
        store.flush()

    def test_check_answers(self, store: Store) -> None:
        """A store that works says so."""
        assert store.check()["ok"] is True

    # ── what is stored comes back ─────────────────────────────────────────────────────

    def test_odd_strings_are_kept_apart(self, store: Store) -> None:
        """Names and keys with quotes, controls, signs of any language or none are all different calls."""
        guard = Guard(store=store, quiet=True)
        guard.defaults(replay=True)

        def echo(text: str) -> str:
            return text

        for wf in ("w", "{w}", "w:~*"):
            with guard.workflow(wf):
                kinds = [(guard.call(echo, text).kind, guard.call(echo, text).value) for text in _ODD]
                assert [("executed", text) for text in _ODD] == kinds
        guard.flush()
        assert 3 * len(_ODD) == guard.stats()["actions"] == guard.stats()["blocked"]

    @pytest.mark.parametrize(
        "value", [None, 0, "", [], {}, False, 0.1, 10**30, {"a": [1, {"b": None}]}, "x" * 5_000_000]
    )
    def test_results_come_back_as_they_were(self, store: Store, value: Any) -> None:
        """Falsy, exact, nested and large results are replayed, and never taken for no result."""
        guard = Guard(store=store, quiet=True)
        guard.defaults(replay=True)
        runs: list[int] = []

        def tool() -> Any:
            runs.append(1)
            return value

        first, second = guard.call(tool), guard.call(tool)

        assert (len(runs), first.kind, second.kind) == (1, "executed", "replayed")
        assert value == second.value
        assert type(value) is type(second.value)

    def test_a_task_gets_what_the_first_one_recorded(self, store: Store) -> None:
        """An async duplicate, of a call that this process made, is replayed like any other."""
        guard = Guard(store=store, quiet=True)
        guard.defaults(replay=True)
        runs: list[int] = []

        async def tool(number: int) -> int:
            runs.append(number)
            return number

        async def ask() -> list[str]:
            return [(await guard.call(tool, 7)).kind for _ in range(3)]

        assert ["executed", "replayed", "replayed"] == asyncio.run(ask())
        assert [7] == runs

    # ── races ─────────────────────────────────────────────────────────────────────────

    def test_one_of_many_gets_the_first_run(self, store: Store) -> None:
        """Sixteen threads that claim at once: one is granted, all others learn of its run."""
        verdicts = in_parallel(16, lambda _: store.transact(claim()))

        assert ["granted", *["live"] * 15] == sorted(v.kind for v in verdicts)
        assert len({v.row.owner for v in verdicts if v.row}) == 1

    def test_one_of_many_takes_over(self, store: Store, clock: FakeClock) -> None:
        """A run that lapsed is taken over by one of all who see it at once."""
        granted(store)
        self.advance(store, clock, 301)

        kinds = sorted(v.kind for v in in_parallel(16, lambda _: store.transact(claim())))

        assert ["granted", *["live"] * 15] == kinds
        assert [r.status for r in store.rows("c")] == ["doubt", "running"]

    def test_no_more_than_max_succeed(self, store: Store) -> None:
        """Under `max=2` many callers, one after the other finding room, make two successes and one run at a time."""
        inside: list[int] = []
        most: list[int] = []

        def call(number: int) -> None:
            for _ in range(30):
                verdict = store.transact(claim(max=2))
                if verdict.kind == "granted" and verdict.row is not None:
                    inside.append(number)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.remove(number)
                    store.transact(settle(verdict.row))
                elif verdict.kind == "done":
                    return
                time.sleep(0.001)

        in_parallel(16, call)

        assert [r.status for r in store.rows("c")] == ["success", "success"]
        assert max(most) == 1

    def test_a_settle_races_a_takeover(self, store: Store, clock: FakeClock) -> None:
        """Either the owner's word comes first and nobody takes over, or it is late; never both, never neither."""
        for number in range(10):
            run = granted(store, call=f"r{number}")
            self.advance(store, clock, 301)

            ops: list[Op] = [settle(run), claim(run.call)]
            settled, taken = in_parallel(2, functools.partial(_transact_nth, store, ops))

            statuses = [r.status for r in store.rows(run.call)]
            if settled == "settled":
                assert (taken, statuses) == ("done", ["success"])
            else:
                assert (settled, taken, statuses) == ("late", "granted", ["doubt", "running"])

    def test_processes_share_one_run(self, store: Store) -> None:
        """Four processes that claim the same calls at once: each call is granted once in all."""
        if not self.is_shared:
            return
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        gate = context.Barrier(4)
        children = [context.Process(target=self._claim_all, args=(store, gate, answers)) for _ in range(4)]
        for child in children:
            child.start()
        won = [name for _ in children for name in json.loads(answers.get())]
        for child in children:
            child.join(60)

        assert [f"p{n}" for n in range(20)] == sorted(won, key=lambda name: int(name[1:]))
        assert [child.exitcode for child in children] == [0] * 4

    def _claim_all(self, store: Store, gate: Any, answers: Any) -> None:
        mine = self.again(store)
        gate.wait(60)
        won = []
        for name in (f"p{n}" for n in range(20)):
            verdict = mine.transact(claim(name))
            if verdict.kind == "granted" and verdict.row is not None:
                won.append(name)
                mine.transact(settle(verdict.row))  # or the run of an ended process would be taken over
        mine.close()
        answers.put(json.dumps(won))

    # ── random histories against the protocol itself ──────────────────────────────────

    @pytest.mark.parametrize("seed", range(4))
    def test_random_histories_follow_the_protocol(self, store: Store, clock: FakeClock, seed: int) -> None:
        """Whatever several callers do, with replies lost and time passing, answers and rows are the protocol's."""
        chance = random.Random(seed)
        model = _Model(clock)
        for number in range(60):
            op = model.propose(chance, f"h{number % 3}")
            for _ in range(chance.choice((1, 1, 1, 2))):  # 2: the reply was lost, so it is sent again
                expected = model.apply(op)
                assert expected == _told(store.transact(op)), (number, op)
                assert model.shapes(op.call) == _timeless(store.rows(op.call)), (number, op)
            if chance.random() < 0.3:
                self.advance(store, clock, chance.choice((1, 150, 301, 1000)))


def _transact_nth(store: Store, ops: list[Op], number: int) -> str:
    return store.transact(ops[number]).kind


def _told(verdict: ledger.Verdict) -> tuple[Any, ...]:
    row = verdict.row if verdict.kind in ("granted", "live", "done", "doubt", "reconcile") else None
    closed = verdict.closed
    return (verdict.kind, row and row.run, row and row.owner, closed and closed.run, verdict.anchor)


def _timeless(rows: Any) -> list[tuple[Any, ...]]:
    return [
        (r.run, r.status, r.owner, r.closed_by, r.released, r.forced, r.late, r.result, r.ended is None)
        for r in rows
    ]


class _Model:
    """The rows of some calls as the pure operations of `ledger` leave them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: dict[str, list[Run]] = {}
        self.claims: dict[str, list[Claim]] = {}

    def apply(self, op: Op) -> tuple[Any, ...]:
        """Do it; what its caller is told."""
        wall = self.clock.wall()
        rows = self.rows.get(op.call, [])
        change = op.apply(rows, Now(wall, self.clock.mono(), lambda run: run.lease <= wall))
        self.rows[op.call] = ledger._applied(rows, change)
        return _told(change.verdict)

    def shapes(self, call: str) -> list[tuple[Any, ...]]:
        """The rows, without what a clock decides."""
        return _timeless(self.rows[call])

    def propose(self, chance: random.Random, call: str) -> Op:
        """Something that one of several callers may do next, wise or not."""
        rows = self.rows.get(call, [])
        seen = chance.choice(rows) if rows else claim(call).first_row(0, 0)
        latest = rows[-1] if rows else seen
        kind = chance.choices(
            ("claim", "settle", "renew", "release", "resolve", "reset"), (10, 8, 2, 2, 2, 1)
        )[0]
        if kind == "settle":
            return settle(seen, chance.choice(_BRANCHES), result=f'"{chance.randrange(9)}"')
        if kind == "renew":
            return renew(seen)
        if kind == "release":
            return release(chance.choice((seen, latest)), limit=chance.choice((1, 1, 2)))
        if kind == "resolve":
            reconciled = chance.random() < 0.5
            return resolve(chance.choice((seen, latest)), done=chance.random() < 0.5, reconciled=reconciled)
        if kind == "reset":
            return reset(self.clock.wall() + chance.choice((-1000 * SECOND, 0)), call)
        return claim(
            call,
            max=chance.choice((1, 1, 2)),
            ttl=chance.choice((None, None, 200 * SECOND)),
            on_doubt=chance.choice(("rerun", "block", "reconcile")),
            forced=chance.random() < 0.1,
            not_done=(latest.run, latest.owner) if chance.random() < 0.2 else None,
        )
