"""The store on Redis: its script does what the protocol says, and what may fail fails closed."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

import ledger
from ledger import Claim, Guard, InProgress, Now, Op, Run, StoreError, UsageError
from ledger_stores.redis import RedisStore
from tests.stores.kit import (
    SECOND,
    FakeClock,
    claim,
    claim_of,
    release,
    renew,
    reset,
    resolve,
    settle,
)
from tests.stores.redis_kit import PATIENCE, ClockedRedis, RedisServer, open_redis, redis_url
from tests.stores.servers import fresh_namespace


@pytest.fixture
def store() -> Iterator[RedisStore]:
    """An empty store in a namespace of its own."""
    made = open_redis(None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server without AOF whose settings a test may change, if it puts them back."""
    made = RedisServer()
    yield made
    made.close()


@contextmanager
def configured(server: RedisServer, **settings: str) -> Iterator[None]:
    """Settings of the server for the length of a block."""
    with server.client() as plain:
        before = {name: plain.config_get(name)[name] for name in (n.replace("_", "-") for n in settings)}
        for name, value in settings.items():
            plain.config_set(name.replace("_", "-"), value)
        yield
        for name, value in before.items():
            plain.config_set(name, value)


def run_of(store: RedisStore, asked: Claim) -> Run:
    """The row of a claim that must be granted."""
    verdict = store.transact(asked)
    assert verdict.kind == "granted"
    assert verdict.row is not None
    return verdict.row


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(n)` gives in so many threads that begin at once."""
    gate = threading.Barrier(count)
    found: list[Any] = [None] * count

    def run(number: int) -> None:
        gate.wait(PATIENCE)
        found[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# ── the script against the pure operations ────────────────────────────────────────────

_TEXTS = (None, "", "x", '{"a": [], "n": 12345678901234567890}', "\0\n 🙂 é\u0301 \ud800")
_MATCHED = (None, None, '{"to":"1"}', '{"to":"2"}')


class Model:
    """What the pure operations of `ledger` make of the calls of one namespace."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.rows: dict[str, list[Run]] = {}
        self.events: list[tuple[Any, ...]] = []

    def apply(self, op: Op) -> ledger.Verdict:
        """Do it; what its caller is told."""
        wall = self.clock.wall()
        change = op.apply(self.rows.get(op.call, []), Now(wall, -(10**18), lambda run: run.lease <= wall))
        self.rows[op.call] = ledger._applied(self.rows.get(op.call, []), change)
        self.events += [(kind, row.run, row.tool, n, detail) for kind, row, n, detail in change.notes]
        return change.verdict


class Chance:
    """Callers that do anything in any order, wise or not."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.claims: dict[str, Claim] = {}

    def op(self, call: str, rows: list[Run], wall: int) -> Op:
        """The next thing that somebody does to that call."""
        pick = self.pick
        seen = pick.choice([*rows, rows[-1]]) if rows else claim(call).first_row(0, 0)
        made: list[Callable[[], Op]] = [
            *[lambda: self._claim(call, rows)] * 10,
            *[lambda: self._settle(seen)] * 8,
            *[lambda: renew(seen)] * 2,
            *[lambda: release(seen, limit=pick.choice((1, 2)), ttl=pick.choice((None, 200 * SECOND)))] * 2,
            *[lambda: self._resolve(seen)] * 2,
            lambda: reset(wall - pick.choice((0, 1000 * SECOND)), call),
        ]
        return pick.choice(made)()

    def _claim(self, call: str, rows: list[Run]) -> Op:
        pick = self.pick
        if rows and pick.random() < 0.1:  # a claim comes again long after its reply was lost
            return self.claims[pick.choice(rows).owner]
        seen = pick.choice([rows[-1], *rows]) if rows and pick.random() < 0.3 else None
        asked = claim(
            call,
            tool=f"tests.{call[-1]}",
            key=pick.choice(_TEXTS),
            args=pick.choice(_TEXTS),
            matched=pick.choice(_MATCHED),
            max=pick.choice((1, 1, 2, 3)),
            ttl=pick.choice((None, None, 200 * SECOND)),
            on_doubt=pick.choice(("rerun", "block", "reconcile")),
            forced=pick.random() < 0.15,
            not_done=(seen.run, seen.owner) if seen else None,
        )
        self.claims[asked.token] = asked
        return asked

    def _settle(self, seen: Run) -> Op:
        status = self.pick.choice(("success", "failed", "suspended", "doubt"))
        texts = [self.pick.choice(_TEXTS) for _ in range(3)]
        return ledger.Settle(claim_of(seen), seen.run, status, *texts)

    def _resolve(self, seen: Run) -> Op:
        done, reconciled = (self.pick.random() < 0.5 for _ in range(2))
        return resolve(seen, done=done, reconciled=reconciled, result=self.pick.choice(_TEXTS))


def told(verdict: ledger.Verdict) -> tuple[Any, ...]:
    """What a caller needs of a verdict."""
    row, closed = verdict.row, verdict.closed
    if verdict.kind not in ("granted", "live", "done", "doubt", "reconcile", "conflict"):
        return (verdict.kind,)
    same = row and (row.run, row.owner, row.result, row.args, row.key, row.matched)
    anchor = verdict.anchor if verdict.kind == "granted" else None
    return (verdict.kind, same, closed and (closed.run, closed.owner, closed.status), anchor)


def written(rows: list[Run]) -> list[Run]:
    """Rows without the owner's monotonic lease, which means nothing on a server."""
    return [row._replace(mono=0) for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_are_those_of_the_pure_operations(seed: int) -> None:
    """Verdicts and all rows after each step, then events, sums and lists, are what `apply` says."""
    clock = FakeClock()
    store = open_redis(clock)
    model, chance = Model(clock), Chance(seed)
    histories, steps = int(os.environ.get("LEDGER_HISTORIES", "60")), 25
    for history in range(histories):
        for step in range(steps):
            call = f"h{history}-{chance.pick.randrange(2)}"
            op = chance.op(call, model.rows.get(call, []), clock.wall())
            for _ in range(chance.pick.choice((1, 1, 1, 2))):  # 2: the reply was lost, so it is sent again
                expected = model.apply(op)
                assert told(expected) == told(store.transact(op)), (seed, history, step, op)
                assert written(model.rows[call]) == store.rows(call), (seed, history, step, op)
            if chance.pick.random() < 0.3:
                clock.advance(chance.pick.choice((1, 150, 301, 1000)))
    assert model.events == [
        (e["kind"], e["run"], e["tool"], e["n"], e["detail"]) for e in store.events()
    ]  # fmt: skip
    left = {call: rows for call, rows in model.rows.items() if rows}
    assert left == {rows[0].call: rows for _, rows in store.calls()}
    assert recounted(left, clock.wall()) == store.totals()
    store.close()


def recounted(calls: dict[str, list[Run]], wall: int) -> ledger.Totals:
    """The sums per tool, counted from all rows."""
    sums: ledger.Totals = {}
    for rows in calls.values():
        last = rows[-1]
        mine = sums.setdefault(last.tool, dict.fromkeys(ledger._TOTALS, 0))
        mine["actions"] += 1
        mine["attempts"] += len(rows)
        mine["executed"] += sum("success" in (r.status, r.late) for r in rows)
        if last.status == "running":
            mine["running" if last.lease > wall else "in_doubt"] += 1
        elif last.status == "doubt":
            mine["in_doubt"] += not last.released and last.late != "success"
        elif last.status in mine:
            mine[last.status] += 1
    return sums
