"""Random histories of several callers: every store does, step by step, what PROTOCOL's rules say."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Run
from ledger_stores.testing import (
    LEASE,
    SECOND,
    FakeClock,
    claim,
    release,
    renew,
    reset,
    resolve,
    settle,
    shape,
)
from tests.stores.kit import KINDS, open_store


@dataclass
class Row:
    """One run in the model: the columns that PROTOCOL speaks of."""

    run: int
    owner: str
    lease: int
    forced: int
    started: int
    status: str = "running"
    ended: int | None = None
    closed_by: str | None = None
    released: int = 0
    late: str | None = None
    late_at: int | None = None

    def close(self, status: str, now: int, who: str) -> None:
        self.status, self.ended, self.closed_by = status, now, who

    def counts(self, now: int, ttl: int | None) -> bool:
        """R3.2: a success, also a late one, that is not released and young."""
        if self.released:
            return False
        times = [self.ended] if self.status == "success" else []
        times += [self.late_at] if self.late == "success" else []
        return any(t is not None and (ttl is None or t > now - ttl) for t in times)


class Model:
    """PROTOCOL section 2 for one call, written from its text."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def owned(self, token: str) -> Row | None:
        return next((r for r in self.rows if r.owner == token), None)

    def claim(self, ask: Any, now: int) -> str:
        mine = self.owned(ask.token)
        if mine:  # R8
            if mine.status != "running":
                return "lost"
            mine.lease = now + ask.lease
            return "granted"
        last = self.rows[-1] if self.rows else None
        if last and last.status == "running" and last.lease > now:  # R3.1
            return "live"
        answered = last is not None and ask.not_done == (last.run, last.owner)
        if last and not ask.forced:
            if sum(r.counts(now, ask.ttl) for r in self.rows) >= ask.max:  # R3.2
                return "done"
            unknown = last.status in ("running", "doubt") and not last.released
            if unknown and ask.on_doubt != "rerun" and not answered:  # R3.3, R5
                return "doubt" if ask.on_doubt == "block" else "reconcile"
        if last:
            self._pass_over(last, ask, answered, now)
        number = last.run + 1 if last else 1
        self.rows.append(Row(number, ask.token, now + ask.lease, int(ask.forced), now))
        return "granted"

    def _pass_over(self, last: Row, ask: Any, answered: bool, now: int) -> None:
        """R4, R10 and R11: what becomes of the row before the one that is inserted."""
        if last.status == "running":
            last.close("failed" if answered else "doubt", now, ask.token)
            last.released = int(ask.forced)
        elif last.status == "doubt" and answered and not last.released:
            last.close("failed", now, ask.token)
        elif last.status == "doubt" and ask.forced:
            last.released = 1

    def settle(self, token: str, status: str, now: int) -> str:
        row = self.owned(token)
        if row is None:
            return "gone"
        if row.status == "running":
            row.close(status, now, token)
            return "settled"
        if row.closed_by == token:  # R6: the reply was lost
            return "settled"
        allowed = {"doubt": ("success", "failed"), "failed": ("success",)}.get(row.status, ())
        if row.late is None and status in allowed:
            row.late, row.late_at = status, now
        return "late"

    def renew(self, run: int, token: str, now: int) -> str:
        row = self.owned(token)
        if row is None or row.run != run or row.status != "running":
            return "lost"
        row.lease = now + LEASE  # R7: also when it had lapsed
        return "renewed"

    def retry(self, seen: Run, limit: int, token: str, now: int) -> str:
        last = self.rows[-1] if self.rows else None
        if last is None:
            return "nothing"
        if (last.run, last.owner) != (seen.run, seen.owner):  # R9
            return "used"
        if last.status == "running":
            if last.lease > now:
                return "live"
            last.close("doubt", now, token)
        last.released = 1
        # "the next call runs": what a forced run left above the limit is released with it
        for row in [r for r in self.rows[:-1] if r.counts(now, None)][limit - 1 :]:
            row.released = 1
        return "released"

    def resolve(self, seen: Run, done: bool, reconciled: bool, token: str, now: int) -> str:
        last = self.rows[-1] if self.rows else None
        if last is None:
            return "nothing"
        if (last.run, last.owner) != (seen.run, seen.owner):  # R10
            return "used"
        if last.status == "running" and last.lease > now:
            return "live"
        if last.status not in ("running", "doubt") or (reconciled and last.released):
            return "settled"
        last.close("success" if done else "failed", now, token)
        last.released = 0
        return "resolved"

    def reset(self, asked: int, now: int) -> str:
        last = self.rows[-1] if self.rows else None
        if last is None:
            return "nothing"
        if last.status == "running" and last.lease > now:  # R12
            return "live"
        if last.started > asked:  # R8
            return "used"
        self.rows.clear()
        return "reset"


class Machine:
    """Drives the model and the stores side by side, and compares after each step."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.model = Model()
        self.stores = {kind: open_store(kind, folder, self.clock) for kind in KINDS}
        self.claims: list[Any] = []
        self.holding: list[Run] = []  # what callers believe to hold: also zombies
        self.ended: list[tuple[Run, str]] = []
        self.seen: list[Run] = []  # what somebody read at some time: also stale
        self.path: list[str] = []

    def step(self) -> None:
        """One thing happens to one caller."""
        acts = [self.claim, self.claim, self.claim, self.again, self.settle, self.settle, self.settle_again]
        acts += [self.renew, self.retry, self.resolve, self.not_done, self.pause, self.pause, self.look]
        act = self.random.choice([*acts, self.crash, self.reset])
        act()

    def same(self, what: str, expected: str, op: ledger.Op) -> Run | None:
        """Do it everywhere; the answers and the rows must be those of the model."""
        self.path.append(f"{what} -> {expected}")
        row = None
        for kind, store in self.stores.items():
            verdict = store.transact(op)
            row = verdict.row or row
            assert (kind, expected) == (kind, verdict.kind), self.path
            assert shape(self.model.rows) == shape(store.rows("c")), (kind, self.path)
            assert [r.lease for r in self.model.rows] == [r.lease for r in store.rows("c")], self.path
        return row

    def submit(self, asked: Any) -> None:
        what = f"claim {asked.max} {asked.ttl} {asked.on_doubt} {asked.forced} {asked.not_done}"
        answer = self.model.claim(asked, self.clock.wall())
        row = self.same(what, answer, asked)
        if answer == "granted" and row:
            self.claims.append(asked)
            if not any(r.owner == row.owner for r in self.holding):
                self.holding.append(row)

    def claim(self, **values: Any) -> None:
        chance = self.random
        values.setdefault("on_doubt", chance.choice(["rerun", "rerun", "block", "reconcile"]))
        ttl = chance.choice([None, None, 100 * SECOND])
        self.submit(claim(max=chance.choice([1, 1, 2, 3]), ttl=ttl, forced=chance.random() < 0.1, **values))

    def again(self) -> None:
        """A lost reply: the same claim comes once more, perhaps much later."""
        if self.claims:
            self.submit(self.random.choice(self.claims[-4:]))

    def not_done(self) -> None:
        if self.seen:
            run = self.random.choice(self.seen[-3:])
            self.claim(on_doubt="reconcile", not_done=(run.run, run.owner))

    def settle(self) -> None:
        if self.holding:
            run = self.holding.pop(self.random.randrange(len(self.holding)))
            status = self.random.choice(["success", "success", "failed", "suspended", "doubt"])
            self.ended.append((run, status))
            self.end(run, status)

    def settle_again(self) -> None:
        if self.ended:
            self.end(*self.random.choice(self.ended[-4:]))

    def end(self, run: Run, status: str) -> None:
        expected = self.model.settle(run.owner, status, self.clock.wall())
        self.same(f"settle {run.run} {status}", expected, settle(run, status))

    def renew(self) -> None:
        if self.holding:
            run = self.random.choice(self.holding)
            self.same(f"renew {run.run}", self.model.renew(run.run, run.owner, self.clock.wall()), renew(run))

    def retry(self) -> None:
        if self.seen:
            run, token, limit = self.random.choice(self.seen[-3:]), ledger.new_token(), 1
            expected = self.model.retry(run, limit, token, self.clock.wall())
            op = release(run, limit=limit, token=token)
            self.same(f"retry {run.run}", expected, op)
            if self.random.random() < 0.3:
                expected = self.model.retry(run, limit, token, self.clock.wall())
                self.same(f"retry {run.run} again", expected, op)

    def resolve(self) -> None:
        if self.seen:
            run, token = self.random.choice(self.seen[-3:]), ledger.new_token()
            done, reconciled = self.random.random() < 0.5, self.random.random() < 0.5
            expected = self.model.resolve(run, done, reconciled, token, self.clock.wall())
            op = resolve(run, done=done, reconciled=reconciled, token=token)
            self.same(f"resolve {run.run} {done} {reconciled}", expected, op)

    def reset(self) -> None:
        asked = self.clock.wall() - self.random.choice([0, 0, 50 * SECOND])
        self.same("reset", self.model.reset(asked, self.clock.wall()), reset(asked))

    def pause(self) -> None:
        self.clock.advance(self.random.choice([1, 40, 150, 301]))

    def crash(self) -> None:
        if self.holding:
            self.holding.pop(self.random.randrange(len(self.holding)))

    def look(self) -> None:
        self.seen += self.stores["memory"].rows("c")[-1:]


@pytest.mark.parametrize("seed", range(30))
def test_every_step_of_a_random_history_is_that_of_the_model(seed: int, tmp_path: Path) -> None:
    """SQLite, memory and a six-method store answer and hold what the rules say, after every step."""
    machine = Machine(tmp_path, seed)

    for _ in range(150):
        machine.step()

    for store in machine.stores.values():
        store.close()
