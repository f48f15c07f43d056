"""The contract that every store keeps: the same operations, the same answers, the same rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import InProgress, Run, SqliteStore, Store
from tests.stores.kit import (
    KINDS,
    SECOND,
    FakeClock,
    SixMethodStore,
    claim,
    open_store,
    release,
    renew,
    reset,
    resolve,
    settle,
    shape,
)


@pytest.fixture
def clock() -> FakeClock:
    """The only thing that is not real."""
    return FakeClock()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Iterator[Store]:
    """An empty store of each kind; afterwards no call has two open runs and nothing is left open."""
    made = open_store(request.param, tmp_path, clock)
    yield made
    for _, rows in made.calls():
        assert sum(r.status == "running" for r in rows) <= 1
    made.close()


def run_of(store: Store, **values: Any) -> Run:
    """The row of a claim that must be granted."""
    verdict = store.transact(claim(**values))
    assert verdict.kind == "granted"
    assert verdict.row is not None
    return verdict.row


def latest(store: Store) -> Run:
    """The newest run of the call as the store has it."""
    return store.rows("c")[-1]


def test_a_first_claim_is_granted(store: Store) -> None:
    """Whoever claims a call that nobody made gets run 1, with a lease."""
    run = run_of(store)

    assert (1, "running", None) == (run.run, run.status, run.closed_by)
    assert [run] == store.rows("c")


def test_a_second_claim_finds_a_live_run(store: Store) -> None:
    """While a run is alive nobody else gets one."""
    run = run_of(store)

    verdict = store.transact(claim())

    assert ("live", run.owner) == (verdict.kind, verdict.row and verdict.row.owner)


def test_a_duplicate_gets_the_success(store: Store) -> None:
    """After a success the claim is refused and names the run with the result."""
    store.transact(settle(run_of(store), result='"receipt"'))

    verdict = store.transact(claim())

    assert ("done", '"receipt"') == (verdict.kind, verdict.row and verdict.row.result)


@pytest.mark.parametrize("end", ["failed", "suspended"])
def test_a_run_that_did_not_succeed_frees_the_call(store: Store, end: str) -> None:
    """Failed and suspended runs are followed by run 2."""
    store.transact(settle(run_of(store), end))

    assert 2 == run_of(store).run


def test_a_lapsed_run_is_taken_over(store: Store, clock: FakeClock) -> None:
    """Takeover closes the old run as in doubt and starts the next one, in one step."""
    run_of(store)
    clock.advance(301)

    taken = run_of(store)

    assert [("doubt", taken.owner), ("running", None)] == [(r.status, r.closed_by) for r in store.rows("c")]


@pytest.mark.parametrize(("end", "late"), [("success", "success"), ("failed", "failed")])
def test_an_end_after_takeover_is_late(store: Store, clock: FakeClock, end: str, late: str) -> None:
    """The owner that was given up changes no status; its end is kept beside it, once."""
    first = run_of(store)
    clock.advance(301)
    run_of(store)

    kinds = [store.transact(settle(first, end)).kind, store.transact(settle(first, "failed")).kind]

    assert ["late", "late"] == kinds
    assert ("doubt", late) == (store.rows("c")[0].status, store.rows("c")[0].late)


def test_a_late_success_counts(store: Store, clock: FakeClock) -> None:
    """After a late success no further run starts, although the latest run failed."""
    first = run_of(store)
    clock.advance(301)
    second = run_of(store)
    store.transact(settle(first, "success", result="1"))
    store.transact(settle(second, "failed"))

    verdict = store.transact(claim())

    assert ("done", "1") == (verdict.kind, verdict.row and verdict.row.result)


@pytest.mark.parametrize("end", ["success", "failed", "suspended", "doubt"])
@pytest.mark.parametrize("then", ["success", "failed", "suspended", "doubt"])
def test_a_stranger_settles_nothing(store: Store, end: str, then: str) -> None:
    """Neither another owner nor a second word of the same owner changes a closed run."""
    run = run_of(store)
    store.transact(settle(run, end))
    before = shape(store.rows("c"))

    stranger = store.transact(settle(run._replace(owner="nobody.1"), then)).kind
    again = store.transact(settle(run, then)).kind

    assert ("gone", "settled", before) == (stranger, again, shape(store.rows("c")))


@pytest.mark.parametrize("end", ["success", "failed", "suspended"])
def test_a_final_run_is_not_resolved(store: Store, end: str) -> None:
    """Only a doubt can be resolved; anything else stays as it is."""
    run = run_of(store)
    store.transact(settle(run, end))
    before = store.rows("c")

    kinds = {store.transact(resolve(run, done=done)).kind for done in (True, False)}

    assert ({"settled"}, before) == (kinds, store.rows("c"))


def test_a_renewal_starts_the_lease_anew(store: Store, clock: FakeClock) -> None:
    """A run that is renewed is alive for another lease; also one that had lapsed unnoticed."""
    run = run_of(store)
    clock.advance(301)

    assert "renewed" == store.transact(renew(run)).kind
    assert "live" == store.transact(claim()).kind


@pytest.mark.parametrize("end", ["success", "failed", "doubt"])
def test_a_closed_run_is_not_renewed(store: Store, end: str) -> None:
    """The owner of a run that is over is told that it is lost."""
    run = run_of(store)
    store.transact(settle(run, end))

    assert "lost" == store.transact(renew(run)).kind
    assert end == latest(store).status


def test_retry_lets_the_next_call_run(store: Store) -> None:
    """A released success does not count; the run after it counts again."""
    run = run_of(store)
    store.transact(settle(run))

    assert "released" == store.transact(release(run)).kind
    store.transact(settle(run_of(store)))
    assert "done" == store.transact(claim()).kind


def test_retry_is_refused_beside_a_live_run(store: Store) -> None:
    """A live run is not released."""
    run = run_of(store)

    assert "live" == store.transact(release(run)).kind
    assert 0 == latest(store).released


def test_retry_of_what_was_never_called_is_nothing(store: Store) -> None:
    """There is nothing to release, resolve or reset in an unknown call."""
    run = claim().first_row(0, 0)

    ops = [release(run), resolve(run, done=True), reset(0)]

    assert ["nothing"] * 3 == [store.transact(op).kind for op in ops]


@pytest.mark.parametrize(("done", "status"), [(True, "success"), (False, "failed")])
@pytest.mark.parametrize("lapsed", [True, False])
def test_a_doubt_is_resolved_once(
    store: Store, clock: FakeClock, done: bool, status: str, lapsed: bool
) -> None:
    """Done makes a doubt a success, not done a failure; the second answer changes nothing."""
    run = run_of(store)
    if lapsed:
        clock.advance(301)
    else:
        store.transact(settle(run, "doubt"))

    kinds = [store.transact(resolve(run, done=answer)).kind for answer in (done, not done)]

    assert (["resolved", "settled"], status) == (kinds, latest(store).status)


def test_force_passes_over_a_success_and_never_over_a_live_run(store: Store) -> None:
    """The history does not hold a forced run; a live run does."""
    store.transact(settle(run_of(store)))

    forced = run_of(store, forced=True)

    assert (2, 1) == (forced.run, forced.forced)
    assert "live" == store.transact(claim(forced=True)).kind


def test_a_reset_forgets_the_call(store: Store) -> None:
    """After a reset the call runs as if it had never been made."""
    store.transact(settle(run_of(store)))

    store.reset("w", store.clock.wall())

    assert [] == store.rows("c")
    assert 1 == run_of(store).run


def test_a_reset_is_refused_while_a_run_lives(store: Store) -> None:
    """A workflow with a live run keeps all its calls, and the error names the owner."""
    store.transact(settle(run_of(store, call="d")))
    run_of(store)

    with pytest.raises(InProgress, match=r"nothing was reset.*call c.*running in .+"):
        store.reset("w", store.clock.wall())

    assert [1, 1] == [len(store.rows(call)) for call in "cd"]


def test_a_reset_of_one_workflow_leaves_the_others(store: Store) -> None:
    """What another workflow did stays done."""
    store.transact(settle(run_of(store)))
    store.transact(settle(run_of(store, call="d", wf="other")))

    store.reset("w", store.clock.wall())

    assert ([], 1) == (store.rows("c"), len(store.rows("d")))


def test_max_counts_successes(store: Store) -> None:
    """`max=2` allows two successes, one at a time; failures do not count."""
    for end in ("success", "failed"):
        run = run_of(store, max=2)
        assert "live" == store.transact(claim(max=2)).kind
        store.transact(settle(run, end))
    store.transact(settle(run_of(store, max=2)))

    assert "done" == store.transact(claim(max=2)).kind


def test_ttl_opens_the_call_again(store: Store, clock: FakeClock) -> None:
    """A success older than the window does not count, a younger one does."""
    store.transact(settle(run_of(store)))

    clock.advance(99)
    young = store.transact(claim(ttl=100 * SECOND)).kind
    clock.advance(1)

    assert ("done", "granted") == (young, store.transact(claim(ttl=100 * SECOND)).kind)


@pytest.mark.parametrize("lapsed", [True, False])
@pytest.mark.parametrize(("mode", "answer"), [("block", "doubt"), ("reconcile", "reconcile")])
def test_a_doubt_holds_the_call(store: Store, clock: FakeClock, lapsed: bool, mode: str, answer: str) -> None:
    """Under block and reconcile nothing runs after a doubt, and looking closes nothing."""
    run = run_of(store)
    if lapsed:
        clock.advance(301)
    else:
        store.transact(settle(run, "doubt"))
    before = store.rows("c")

    assert answer == store.transact(claim(on_doubt=mode)).kind
    assert before == store.rows("c")


@pytest.mark.parametrize("lapsed", [True, False])
def test_not_done_closes_the_doubt_and_runs(store: Store, clock: FakeClock, lapsed: bool) -> None:
    """The answer NOT_DONE makes run n a failure and gives run n + 1 to the same caller, once."""
    run = run_of(store)
    if lapsed:
        clock.advance(301)
    else:
        store.transact(settle(run, "doubt"))
    answer: dict[str, Any] = {"on_doubt": "reconcile", "not_done": (run.run, run.owner)}

    first, second = (store.transact(claim(**answer)).kind for _ in range(2))

    assert ("granted", "live") == (first, second)
    assert ["failed", "running"] == [r.status for r in store.rows("c")]


def test_a_repeated_claim_knows_its_own_row(store: Store) -> None:
    """The same token enters its own open run again, and never one that was closed."""
    asked = claim()
    run = store.transact(asked).row

    again = store.transact(asked)

    assert again.row is not None
    assert ("granted", 1, 1) == (again.kind, again.row.run, len(store.rows("c")))
    assert run is not None
    store.transact(settle(run))
    assert "lost" == store.transact(asked).kind


def test_blocked_attempts_are_counted(store: Store) -> None:
    """Every attempt that ran nothing is in the record, and attempts are runs plus those."""
    asked = claim()
    store.transact(asked)
    for _ in range(5):
        store.count("blocked", asked, 1)
    store.flush()

    record = store.look("c")

    assert record is not None
    assert (6, 5) == (record.attempts, record.blocked)


def test_an_unlimited_tool_is_counted_without_a_claim(store: Store) -> None:
    """Runs of an unlimited tool make one row that counts, and no run."""
    asked = claim()
    for kind in ("ran", "ran", "raised"):
        store.count(kind, asked, 0, "Boom" if kind == "raised" else None)
    store.flush()

    [(record, rows)] = store.calls()

    assert (3, 2, []) == (record.attempts, record.runs, rows)


def test_every_transition_has_its_event(store: Store, clock: FakeClock) -> None:
    """Claims, ends, late ends, releases and answers are in the log, numbered without a gap."""
    if not isinstance(store, SqliteStore | ledger.MemoryStore):
        assert [] == list(store.events())
        return
    first = run_of(store)
    clock.advance(301)
    second = run_of(store)
    store.transact(settle(first))
    store.transact(settle(second, "failed"))
    store.transact(release(second))
    store.transact(settle(third := run_of(store, max=2), "doubt"))
    store.transact(resolve(third, done=True))

    events = list(store.events())

    kinds = ["claimed", "doubt", "claimed", "late", "failed", "released", "claimed", "doubt", "resolved"]
    assert kinds == [e["kind"] for e in events]
    assert list(range(1, 10)) == [e["seq"] for e in events]
    assert events[4:] == list(store.events(after=4))


def test_totals_are_what_a_recount_gives(store: Store, clock: FakeClock) -> None:
    """The sums per tool are those of all calls, whatever happened to them."""
    for number, end in enumerate(
        ["success", "failed", "suspended", "doubt", "late", "told", "forced", "", "gone"]
    ):
        asked = claim(call=f"c{number}", tool=f"tests.tool{number % 2}")
        run = store.transact(asked).row
        assert run is not None
        store.count("blocked", asked, 1)
        if end in ("late", "gone"):
            clock.advance(301)
            store.transact(claim(call=run.call, tool=run.tool))
            store.transact(settle(run, "success" if end == "late" else "failed"))
        elif end == "told":
            store.transact(settle(run, "doubt"))
            store.transact(resolve(run, done=True))
        elif end == "forced":
            store.transact(settle(run))
            store.transact(settle(run_of(store, call=run.call, tool=run.tool, forced=True)))
        elif end:
            store.transact(settle(run, end))
    store.flush()

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


def test_the_six_methods_of_a_users_store_do_what_they_say() -> None:
    """Claim inserts once, get finds, put overwrites, all lists, delete and clear remove."""
    store = SixMethodStore()
    record = ledger._record([claim().first_row(store.clock.wall(), 0)], 0)
    other = record._replace(id="d", call="d", wf="other")

    assert (None, True, False) == (store.get("c"), store.claim(record), store.claim(record))
    assert store.claim(other)
    assert {"c", "d"} == {r.id for r in store.all()}
    assert ["d"] == [r.id for r in store.all("other")]
    store.put(record._replace(status=ledger.Status.FAILED))
    assert (found := store.get("c")) is not None
    assert "failed" == found.status
    store.delete("c")
    assert store.get("c") is None
    store.clear("other")
    assert [] == list(store.all())


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
def test_the_built_in_stores_show_and_forget_calls(kind: str, tmp_path: Path, clock: FakeClock) -> None:
    """They have get, all and clear; what the other three would write goes through transactions."""
    store = open_store(kind, tmp_path, clock)
    store.transact(settle(run_of(store)))
    found = store.get("c")

    assert found is not None
    assert ("success", [found]) == (found.status, list(store.all("w")))
    assert [] == list(store.all("other"))
    store.clear("w")
    assert store.get("c") is None
    with pytest.raises(NotImplementedError, match="has no put"):
        store.put(found)
    store.close()


def grown_elsewhere(versions: int) -> tuple[SixMethodStore, SixMethodStore]:
    """A store with that many versions of a call, and another one on the same records that saw none."""
    made, other = SixMethodStore(clock=FakeClock()), SixMethodStore(clock=FakeClock())
    other.records = made.records
    run = run_of(made)
    for _ in range(versions - 1):
        made.transact(renew(run))
    return made, other


@pytest.mark.parametrize("versions", range(1, 18))
def test_the_newest_version_is_found_from_nothing(versions: int) -> None:
    """However long the list of versions has grown elsewhere, galloping and bisecting find its end."""
    made, other = grown_elsewhere(versions)

    assert made.rows("c") == other.rows("c")
    assert versions == len(made.records)
    assert "settled" == other.transact(settle(other.rows("c")[0])).kind
    assert "done" == made.transact(claim()).kind


def test_a_store_whose_claim_never_succeeds_is_named() -> None:
    """A claim() that refuses everything ends in an error that asks for atomicity, not in a loop."""

    class Refusing(SixMethodStore):
        def claim(self, record: ledger.Record) -> bool:  # noqa: ARG002 - it refuses whatever comes
            return False

    with pytest.raises(ledger.StoreError, match=r"is claim\(\) atomic"):
        Refusing().transact(claim())


@pytest.mark.parametrize("method", ["get", "claim", "put", "delete", "all", "clear"])
def test_a_store_without_a_method_says_which(method: str) -> None:
    """Each of the six is asked for by name."""
    argument: Any = ledger._record([claim().first_row(0, 0)], 0)

    with pytest.raises(NotImplementedError, match=rf"Store has no {method}\("):
        getattr(Store(), method)(argument)


def test_check_answers_for_every_store(store: Store) -> None:
    """A store that works says so."""
    assert store.check()["ok"] is True


@pytest.mark.parametrize("old", list(ledger._NEXT))
@pytest.mark.parametrize("new", list(ledger.Status))
def test_only_the_table_moves_a_run(old: str, new: str) -> None:
    """A move that the table of transitions does not have is refused and changes nothing."""
    row = claim().first_row(0, 0)._replace(status=old)
    change = ledger.Change("test", row)

    if new in ledger._NEXT[old]:
        assert (old, new) == (row.status, change.move(row, new).status)
        return
    with pytest.raises(ledger.LedgerError, match=f"cannot go from {old} to {new}"):
        change.move(row, new)
    assert ([], []) == (change.updates, change.notes)


def test_a_record_survives_a_dict() -> None:
    """What to_dict gives is JSON-safe, and from_dict is the way back."""
    record = ledger._record([claim(args='{"a":1}').first_row(5, 5)], 2)

    assert record == ledger.Record.from_dict(json.loads(json.dumps(record.to_dict())))
