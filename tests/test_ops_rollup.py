"""Figures over time: the roll-up says what a recount of the events says, also while more come in."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard
from ledger_ops.reader import Reader, open_store
from ledger_ops.rollup import Rollup

MINUTE = 60_000_000


def charge(order: int) -> int:
    """A tool that works and takes a moment."""
    time.sleep(0.002)
    return order


def send_email(to: str) -> None:
    """A tool that fails."""
    raise ConnectionError(to)


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a file."""
    made = Guard(tmp_path / "ledger.db", quiet=True)
    yield made
    made.close()


def make_calls(guard: Guard, first: int, count: int) -> None:
    """So many calls, each asked for twice, in workflows of five; and one that fails."""
    for number in range(first, first + count):
        with guard.workflow(f"w{number // 5}"):
            guard(charge, number)
            guard(charge, number)
    with pytest.raises(ConnectionError):
        guard(send_email, str(first))
    guard.flush()


def test_figures_equal_a_recount_and_follow(guard: Guard, tmp_path: Path) -> None:
    """After each advance tools, workflows and the series hold exactly what the ledger tells."""
    make_calls(guard, 0, 10)
    with closing(open_store(tmp_path / "ledger.db")) as store, closing(Rollup(Reader(store))) as rollup:
        for more in (0, 7):
            make_calls(guard, 10, more)
            assert rollup.advance(10)

            told = Reader(store).stats().tools
            assert {t: (s.executed, s.blocked) for t, s in told.items()} == {
                row.tool: (row.executed, row.blocked) for row in rollup.tools()
            }
            assert rollup.first is not None
            assert rollup.last is not None
            series = rollup.series(rollup.first, rollup.last + 1)
            total = Reader(store).stats().total
            assert (total.executed, total.blocked) == (sum(series.executed), sum(series.blocked))
            assert len({len(column) for column in series[1:]}) == 1
            assert (1.0, Reader(store).last_seq()) == (rollup.progress, rollup.seq)

        workflows = {row.wf: row[1:5] for row in rollup.workflows()}
        assert {"w0": 5, "w1": 5, "w2": 5, "w3": 2, "default": 2} == {
            w: row[0] for w, row in workflows.items()
        }
        assert ((2, 2, 2, 0), (2, 0, 0, 3)) == (workflows["w3"], workflows["default"])
        times = [row.last for row in rollup.workflows()]
        assert (sorted(times, reverse=True), rollup.workflows()[:2]) == (times, rollup.workflows(2))
        assert [f"pid {os.getpid()}"] == rollup.callers()


def test_durations_are_those_of_the_runs(guard: Guard, tmp_path: Path) -> None:
    """p50 lies within a bucket of the true median; a tool that never ended has none."""
    make_calls(guard, 0, 21)
    with closing(open_store(tmp_path / "ledger.db")) as store, closing(Rollup(Reader(store))) as rollup:
        rollup.advance(10)
        spans = sorted(
            r[0] for r in store.browse("SELECT ended - started FROM runs WHERE tool LIKE '%charge'")
        )

        [row] = [row for row in rollup.tools() if row.tool.endswith("charge")]

        assert row.p50 is not None
        assert row.p95 is not None
        assert abs(row.p50 / spans[10] - 1) < 0.09
        assert row.p50 <= row.p95 <= spans[-1] * 1.09


def test_a_series_has_whole_steps_and_a_tool_of_its_own(guard: Guard, tmp_path: Path) -> None:
    """Steps are whole minutes, hours or days that begin on the clock; one tool can be told apart."""
    make_calls(guard, 0, 3)
    with closing(open_store(tmp_path / "ledger.db")) as store, closing(Rollup(Reader(store))) as rollup:
        rollup.advance(10)
        now = time.time_ns() // 1000
        for days, points in ((0.01, 120), (1, 120), (30, 60), (900, 120)):
            series = rollup.series(now - int(days * 86_400 * 1e6), now + 1, points)

            assert 0 == series.step % MINUTE == series.at[0] % series.step
            assert len(series.at) <= points + 2
            assert 3 == sum(series.executed)
        [failing] = [tool for tool in Reader(store).tools() if tool.endswith("send_email")]
        series = rollup.series(now - 10 * MINUTE, now + MINUTE, tool=failing)
        assert (0, 0, 1) == tuple(map(sum, series[2:]))


def test_an_advance_ends_when_its_time_is_over(guard: Guard, tmp_path: Path) -> None:
    """With no time at all it still gets on, and says that more is left."""
    guard(charge, 1)
    guard.close()
    with closing(open_store(tmp_path / "ledger.db")) as store:
        rows = [
            (None, "x", 1, "blocked", 1_700_000_000_000_000 + n, "a.b", "w", "c", 1, None)
            for n in range(50_000)
        ]
        store.submit(
            lambda db: db.executemany(f"INSERT INTO events VALUES ({', '.join('?' * 10)})", rows),
            durable=False,
        )
        with closing(Rollup(Reader(store))) as rollup:
            steps = [rollup.advance(0)]
            assert 0 < rollup.progress < 1
            while not steps[-1]:
                steps.append(rollup.advance(0))

            assert len(steps) == 3
            assert 50_000 == next(row.blocked for row in rollup.tools() if row.tool == "a.b")
