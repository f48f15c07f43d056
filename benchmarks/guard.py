"""Times of the guard, as ratios to bare sqlite3 doing the least honest work at the same durability.

Run it by `make bench`; BENCH_SHORT=1 takes less than 90 seconds.  Everything that is compared is
measured in one run in interleaved rounds, and a ratio is taken inside each round, so that a noisy
machine hurts both sides alike; medians are shown.  The floor of a first call is a committed INSERT OR
IGNORE and a committed UPDATE with synchronous=FULL, that of a duplicate one SELECT.  "floor+events"
writes the ledger's two event rows inside the same two transactions.

A time over its target is reported, never an error; a wrong count is one, with exit status 1.
BENCH_DIR names the folder for the files (default: build/ of this repository); it should be on a disk.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ledger  # noqa: E402 - the tree's own
from benchmarks.table import SHORT, Table  # noqa: E402
from ledger import Guard  # noqa: E402

TABLE = Table()
report, expect = TABLE.report, TABLE.expect
ROUNDS = 15 if SHORT else 60
CONTESTS = 3 if SHORT else 7
BIG = 50_000 if SHORT else 1_000_000
PROCESSES = multiprocessing.get_context("spawn")


# ═══ What is measured: the same work by the guard and by bare sqlite3 ═════════════════


def charge(order: int, amount: float, currency: str) -> dict[str, object]:
    """A tool that takes no time, so that only the guard's cost is left."""
    return {"id": order, "ok": amount > 0 and len(currency) == 3}


async def charge_async(order: int, amount: float, currency: str) -> dict[str, object]:
    """The same as a coroutine function."""
    return {"id": order, "ok": amount > 0 and len(currency) == 3}


def open_guard(path: Path, sync: Literal["full", "claim", "off"] = "full") -> Guard:
    """A quiet guard that replays."""
    made = Guard(path, quiet=True, sync=sync)
    made.defaults(replay=True)
    return made


class Floor:
    """Bare sqlite3: the least that keeps the promise; `events` adds the guard's two event rows."""

    def __init__(
        self, path: Path, *, claim: str = "FULL", outcome: str = "FULL", events: bool = False
    ) -> None:
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute(f"PRAGMA synchronous = {claim}")
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS calls (call TEXT PRIMARY KEY, status TEXT, args TEXT, result TEXT)"
        )
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, call TEXT, run INTEGER, kind TEXT,"
            " at INTEGER, tool TEXT, wf TEXT, caller TEXT, n INTEGER, detail TEXT)"
        )
        self.levels = (claim, outcome)
        self.events = events

    def claim(self, call: str, args: str) -> bool:
        """One committed INSERT OR IGNORE; whether it was the first."""
        if self.levels[0] != self.levels[1]:
            self.db.execute(f"PRAGMA synchronous = {self.levels[0]}")
        insert = "INSERT OR IGNORE INTO calls VALUES (?, 'running', ?, NULL)"
        if not self.events:
            return self.db.execute(insert, (call, args)).rowcount == 1
        self.db.execute("BEGIN IMMEDIATE")
        won = self.db.execute(insert, (call, args)).rowcount == 1
        self._event(call, "claimed")
        self.db.execute("COMMIT")
        return won

    def settle(self, call: str, result: str) -> None:
        """One committed UPDATE."""
        if self.levels[0] != self.levels[1]:
            self.db.execute(f"PRAGMA synchronous = {self.levels[1]}")
        if self.events:
            self.db.execute("BEGIN IMMEDIATE")
        update = "UPDATE calls SET status = 'success', result = ? WHERE call = ? AND status = 'running'"
        self.db.execute(update, (result, call))
        if self.events:
            self._event(call, "success")
            self.db.execute("COMMIT")

    def _event(self, call: str, kind: str) -> None:
        self.db.execute(
            "INSERT INTO events VALUES (NULL, ?, 1, ?, ?, 'guard.charge', 'default', 'pid 1', 1, NULL)",
            (call, kind, time.time_ns() // 1000),
        )

    def first(self, number: int) -> object:
        """A first call."""
        call = call_name(number)
        if self.claim(call, '{"order":1,"amount":19.99,"currency":"EUR"}'):
            self.settle(call, json.dumps(charge(number, 19.99, "EUR")))
        return None

    def duplicate(self, number: int) -> object:
        """One SELECT."""
        return self.db.execute(
            "SELECT status, result FROM calls WHERE call = ?", (call_name(number),)
        ).fetchone()


def call_name(number: int) -> str:
    """A name as scattered and as long as a fingerprint."""
    return f"{(number * 0x9E3779B97F4A7C15F39CC0605CEDC834) % (1 << 128):032x}"


class Lane:
    """One side of a comparison: first calls with fresh numbers, duplicates of a known one."""

    def __init__(
        self, call: Callable[[int], object], duplicate: Callable[[int], object] | None = None
    ) -> None:
        self.call = call
        self.again = duplicate or call
        self.next = 0

    def known(self, count: int) -> list[int]:
        """Numbers of calls that were made."""
        return [self.next - 1 - n % 100 for n in range(count)]

    def firsts(self, count: int) -> float:
        """Median microseconds of `count` first calls."""
        self.next += count
        return median([self.spend(self.call, n) for n in range(self.next - count, self.next)])

    def duplicates(self, count: int) -> float:
        """Mean microseconds of `count` duplicates in a row."""
        numbers = self.known(count)
        begun = time.perf_counter()
        for number in numbers:
            self.again(number)
        return (time.perf_counter() - begun) / count * 1e6

    @staticmethod
    def spend(call: Callable[[int], object], number: int) -> float:
        """Microseconds of one call."""
        begun = time.perf_counter()
        call(number)
        return (time.perf_counter() - begun) * 1e6


class AsyncLane(Lane):
    """The same, awaited one after the other in a running loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, made: Guard) -> None:
        super().__init__(functools.partial(guarded_async, made))
        self.loop = loop
        self.awaited: Callable[[int], Awaitable[object]] = functools.partial(guarded_async, made)

    def firsts(self, count: int) -> float:
        """Median microseconds of `count` first calls."""
        self.next += count
        return self.loop.run_until_complete(self._firsts(range(self.next - count, self.next)))

    async def _firsts(self, numbers: Iterable[int]) -> float:
        spent = []
        for number in numbers:
            begun = time.perf_counter()
            await self.awaited(number)
            spent.append((time.perf_counter() - begun) * 1e6)
        return median(spent)

    def duplicates(self, count: int) -> float:
        """Mean microseconds of `count` duplicates in a row."""
        return self.loop.run_until_complete(self._duplicates(self.known(count)))

    async def _duplicates(self, numbers: Sequence[int]) -> float:
        begun = time.perf_counter()
        for number in numbers:
            await self.awaited(number)
        return (time.perf_counter() - begun) / len(numbers) * 1e6


class HopLane(AsyncLane):
    """Bare sqlite3 for an event loop: both statements in a worker thread, so that the loop never waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, floor: Floor) -> None:
        Lane.__init__(self, floor.first)
        self.loop = loop
        self.floor = floor
        self.worker = ThreadPoolExecutor(1)
        self.awaited = self._call

    async def _call(self, number: int) -> object:
        call = call_name(number)
        args = (call, '{"order":1,"amount":19.99,"currency":"EUR"}')
        if await self.loop.run_in_executor(self.worker, self.floor.claim, *args):
            result = json.dumps(charge(number, 19.99, "EUR"))
            await self.loop.run_in_executor(self.worker, self.floor.settle, call, result)
        return None


class LedgerFloor(Floor):
    """Bare sqlite3 with the ledger's own tables and statements: what no Python around them can go below."""

    def __init__(self, path: Path) -> None:
        open_guard(path).check()
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA synchronous = FULL")

    def first(self, number: int) -> object:
        """A first call: a claim and a settle with their events, in two transactions."""
        call, at = call_name(number), time.time_ns() // 1000
        row = (call, 1, "guard.charge", "default", "pid 1", f"a.{number}", None, "{}", None, at, at, at, 0)
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute(ledger._INSERT_FIRST, row)
        self._event(call, "claimed")
        self.db.execute("COMMIT")
        result = json.dumps(charge(number, 19.99, "EUR"))
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute(ledger._SETTLE_OPEN, ("success", at, result, None, None, call, 1, f"a.{number}"))
        self._event(call, "success")
        self.db.execute("COMMIT")
        return None


def guarded(made: Guard, number: int) -> object:
    """One guarded call."""
    return made(charge, number, 19.99, "EUR")


def guarded_async(made: Guard, number: int) -> Awaitable[object]:
    """One guarded call to await."""
    return made(charge_async, number, 19.99, "EUR")


async def answered(made: Guard, number: int) -> object:
    """The same as a coroutine, which is what an event loop runs."""
    return await guarded_async(made, number)


def guard_lane(made: Guard) -> Lane:
    """The guard's side of a comparison."""
    return Lane(functools.partial(guarded, made))


def floor_lane(floor: Floor) -> Lane:
    """The other side."""
    return Lane(floor.first, floor.duplicate)


class Times:
    """What each lane took in each round."""

    def __init__(
        self, lanes: dict[str, Lane], rounds: int, *, firsts: int = 20, duplicates: int = 200
    ) -> None:
        self.first: dict[str, list[float]] = {name: [] for name in lanes}
        self.duplicate: dict[str, list[float]] = {name: [] for name in lanes}
        for lane in lanes.values():
            lane.firsts(600)  # until the write-ahead log is used again from its start
        names = list(lanes)
        gc.collect()
        for turn in range(rounds):
            order = names if turn % 2 else names[::-1]
            for name in order:
                self.first[name].append(lanes[name].firsts(firsts))
            for name in order:
                self.duplicate[name].append(lanes[name].duplicates(duplicates))

    def row(
        self, what: str, kind: Literal["first", "duplicate"], name: str, floor: str, **bounds: Any
    ) -> None:
        """One line: a lane against another."""
        ours, theirs = getattr(self, kind)[name], getattr(self, kind)[floor]
        report(what, median(ours), "µs", floor=median(theirs), ratio=ratio_of(ours, theirs), **bounds)

    def flat(self, kind: Literal["first", "duplicate"], what: str) -> None:
        """How the ratio to the floor of the same size changed with size."""
        found = getattr(self, kind)
        full = [a / b for a, b in zip(found["big"], found["floor, big"], strict=True)]
        none = [a / b for a, b in zip(found["empty"], found["floor, empty"], strict=True)]
        report(
            f"{what}, × floor of that size",
            median(full),
            "×",
            floor=median(none),
            ratio=ratio_of(full, none),
            most=1.1,
        )


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios taken inside each round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


# ═══ One thread, one task, the three durabilities ═════════════════════════════════════


def bench_one_caller(folder: Path) -> None:
    """First calls and duplicates, sync and async, at every durability, round by round."""
    loop = asyncio.new_event_loop()
    guards = {
        "full": open_guard(folder / "full.db"),
        "claim": open_guard(folder / "claim.db", "claim"),
        "off": open_guard(folder / "off.db", "off"),
        "async": open_guard(folder / "async.db"),
    }
    lanes: dict[str, Lane] = {
        "floor": floor_lane(Floor(folder / "floor.db")),
        "events": floor_lane(Floor(folder / "events.db", events=True)),
        "own": Lane(LedgerFloor(folder / "own.db").first, lambda _: None),
        "hop": HopLane(loop, Floor(folder / "hop.db")),
        "full": guard_lane(guards["full"]),
        "async": AsyncLane(loop, guards["async"]),
        "claim": guard_lane(guards["claim"]),
        "floor claim": floor_lane(Floor(folder / "floor-claim.db", outcome="NORMAL")),
        "off": guard_lane(guards["off"]),
        "floor off": floor_lane(Floor(folder / "floor-off.db", claim="NORMAL", outcome="NORMAL")),
    }
    times = Times(lanes, ROUNDS)
    times.row("first call, of the floor + events", "first", "full", "events", most=1.15)
    times.row("… bare sqlite3, the ledger's own tables", "first", "own", "events")
    times.row("first call, of the floor", "first", "full", "floor")
    times.row("duplicate replayed", "duplicate", "full", "floor", most=20, of_ratio=False)
    times.row("… as a ratio (20 µs where a SELECT takes 4.3)", "duplicate", "full", "floor", most=4.65)
    times.row("async first call", "first", "async", "floor", most=1.4)
    times.row("… bare sqlite3 in a worker thread", "first", "hop", "floor")
    times.row("… of that", "first", "async", "hop")
    times.row("async duplicate", "duplicate", "async", "floor", most=60, of_ratio=False)
    times.row('sync="claim" first, of outcome NORMAL', "first", "claim", "floor claim")
    times.row('sync="claim" first, of the floor', "first", "claim", "floor")
    times.row('sync="off" first, of NORMAL', "first", "off", "floor off", most=3)
    for made in guards.values():
        made.close()
    loop.close()


# ═══ Many callers ═════════════════════════════════════════════════════════════════════

THREADS, TASKS, EACH = 16, 200, 50


def in_threads(calls: Sequence[Callable[[int], object]], base: int) -> float:
    """Calls per second when each thread makes `EACH` calls of its own."""
    gate = threading.Barrier(len(calls) + 1)

    def work(call: Callable[[int], object], begin: int) -> None:
        gate.wait()
        for number in range(begin, begin + EACH):
            call(number)

    threads = [threading.Thread(target=work, args=(call, base + i * EACH)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    gate.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return len(calls) * EACH / (time.perf_counter() - begun)


async def in_tasks(made: Guard, base: int) -> float:
    """Calls per second when `TASKS` tasks share as many calls as the threads make."""
    each = THREADS * EACH // TASKS

    async def work(begin: int) -> None:
        for number in range(begin, begin + each):
            await guarded_async(made, number)

    begun = time.perf_counter()
    await asyncio.gather(*(work(base + i * each) for i in range(TASKS)))
    return TASKS * each / (time.perf_counter() - begun)


def bench_threads_and_tasks(folder: Path) -> None:
    """Distinct calls: group commit against threads with connections of their own."""
    loop = asyncio.new_event_loop()
    floors = [Floor(folder / "floor-threads.db").first for _ in range(THREADS)]
    threaded, tasked = open_guard(folder / "threads.db"), open_guard(folder / "tasks.db")
    ours = [functools.partial(guarded, threaded)] * THREADS
    speeds: dict[str, list[float]] = {"floor": [], "threads": [], "tasks": []}
    for turn in range(CONTESTS + 1):
        base = turn * THREADS * EACH
        found = {
            "floor": in_threads(floors, base),
            "threads": in_threads(ours, base),
            "tasks": loop.run_until_complete(in_tasks(tasked, base)),
        }
        for name, speed in found.items():
            if turn:  # the first warms up
                speeds[name].append(speed)
    for name, what in (("threads", "16 threads, distinct calls"), ("tasks", "200 tasks, distinct calls")):
        ratio = ratio_of(speeds[name], speeds["floor"])
        report(what, median(speeds[name]), "calls/s", floor=median(speeds["floor"]), ratio=ratio, least=4)
    made = THREADS * EACH * (CONTESTS + 1)
    expect("… executed by threads and tasks", (executed(threaded), executed(tasked)), (made, made))
    threaded.close()
    tasked.close()
    loop.close()


def executed(made: Guard) -> object:
    """How many runs succeeded, by the guard's own count."""
    return made.stats()["executed"]


def duplicate_in_process(path: Path, count: int, gate: Any, done: Any) -> None:
    """A child: duplicates of one call."""
    made = open_guard(path)
    guarded(made, 0)
    gate.wait()
    begun = time.perf_counter()
    for _ in range(count - 1):
        guarded(made, 0)
    done.put(time.perf_counter() - begun)


def bench_counters(folder: Path) -> None:
    """8 processes × 1,000 duplicates of one call: attempts and blocked are exact."""
    path = folder / "counters.db"
    made = open_guard(path)
    guarded(made, 0)
    gate, done = PROCESSES.Barrier(8), PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=duplicate_in_process, args=(path, 1000, gate, done)) for _ in range(8)
    ]
    for child in children:
        child.start()
    spent = [done.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    report("duplicates of one call, 8 processes", 8 * 999 / max(spent), "calls/s")
    stats = made.stats()
    expect(
        "… attempts, blocked, executed",
        tuple(stats[n] for n in ("attempts", "blocked", "executed")),
        (8001, 8000, 1),
    )
    made.close()


class Effect:
    """A tool with an effect that can be counted from outside: one byte, appended."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)

    def add(self, number: int) -> int:
        """Take effect."""
        os.write(self.handle, b".")
        return number


def same_calls_in_process(path: Path, guarded_ones: bool, gate: Any, done: Any) -> None:  # noqa: FBT001 - sent to a child
    """A child: the same 500 calls as its siblings, at the same time."""
    effect = Effect(path.with_suffix(".effects"))
    call: Callable[[int], object]
    if guarded_ones:
        made = open_guard(path)
        add = made.once(name="add", replay=False)(effect.add)  # like the floor's, a loser waits for nobody
        call = add
    else:
        call = functools.partial(floor_once, Floor(path), effect)
    call(-1)
    gate.wait()
    begun = time.time()
    for number in range(500):
        call(number)
    done.put((begun, time.time()))


def floor_once(floor: Floor, effect: Effect, number: int) -> object:
    """The least honest form: a look, a claim, the effect, its record."""
    call = call_name(number + 1)
    found = floor.db.execute("SELECT status, result FROM calls WHERE call = ?", (call,)).fetchone()
    if found is None and floor.claim(call, "{}"):
        floor.settle(call, json.dumps(effect.add(number)))
    return found


def race(path: Path, *, guarded_ones: bool) -> float:
    """Wall seconds of 8 processes that make the same 500 calls."""
    gate, done = PROCESSES.Barrier(8), PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=same_calls_in_process, args=(path, guarded_ones, gate, done))
        for _ in range(8)
    ]
    if not guarded_ones:
        Floor(path).db.close()
    for child in children:
        child.start()
    times = [done.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    return float(max(end for _, end in times) - min(begin for begin, _ in times))


def bench_same_calls(folder: Path) -> None:
    """Many processes, the same calls."""
    walls: dict[bool, list[float]] = {True: [], False: []}
    effects = []
    for turn in range(CONTESTS):
        for ours in (True, False):
            path = folder / f"race-{turn}-{ours}.db"
            walls[ours].append(race(path, guarded_ones=ours) * 1000)
            if ours:
                effects.append(path.with_suffix(".effects").stat().st_size - 1)
    ratio = ratio_of(walls[True], walls[False])
    report(
        "8 processes, the same 500 calls",
        median(walls[True]),
        "ms",
        floor=median(walls[False]),
        ratio=ratio,
        most=1.2,
    )
    expect("… executions, fewest and most", (min(effects), max(effects)), (500, 500))


# ═══ The event loop ═══════════════════════════════════════════════════════════════════


async def tick(seconds: float, gaps: list[float]) -> None:
    """Wake every millisecond and note how long each took."""
    last = time.perf_counter()
    until = last + seconds
    while last < until:
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        gaps.append((now - last) * 1000)
        last = now


async def tick_beside(
    seconds: float, gaps: list[float], make: Callable[[int], Awaitable[object]] | None
) -> int:
    """Tick while 20 tasks make first calls and one makes duplicates; how many calls were made."""
    over = False
    made = 0

    async def work(first: int, step: int) -> None:
        nonlocal made
        number = first
        while not over and make is not None:
            await make(number)
            made += step > 0
            number += step
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(1 + i, 20)) for i in range(20)]
    if make is not None:
        tasks.append(asyncio.create_task(work(0, 0)))
    await tick(seconds, gaps)
    over = True
    await asyncio.gather(*tasks)
    return made


def spin(over: threading.Event) -> None:
    """A busy thread."""
    while not over.is_set():
        sum(range(1000))


def bare_gaps(seconds: float) -> list[float]:
    """Gaps of a bare loop beside one busy thread."""
    gaps: list[float] = []
    over = threading.Event()
    thread = threading.Thread(target=spin, args=(over,))
    thread.start()
    asyncio.run(tick_beside(seconds, gaps, None))
    over.set()
    thread.join()
    return gaps


HOLDER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
db.execute("COMMIT")
"""


def guarded_gaps(path: Path, seconds: float, *, locked: bool) -> list[float]:
    """Gaps of a loop full of guarded calls, also while another process holds the write lock."""
    gaps: list[float] = []
    made = open_guard(path)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(answered(made, 0))
    holder = None
    if locked:
        command = [sys.executable, "-c", HOLDER, str(path), "2"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if holder.stdout is None or not holder.stdout.readline():
            raise SystemExit("the process that should hold the lock did not start")
        seconds = 2.0
    calls = loop.run_until_complete(tick_beside(seconds, gaps, functools.partial(guarded_async, made)))
    if holder is not None:
        holder.communicate()
    loop.close()
    expect(f"… executed{' beside the lock' if locked else ''}", executed(made), calls + 1)
    made.close()
    return gaps


def bench_loop(folder: Path) -> None:
    """Gaps in the event loop: 99th of a hundred, and the longest."""
    rounds, seconds = (2, 1.5) if SHORT else (4, 3.0)
    found: dict[str, list[list[float]]] = {"bare": [], "guarded": [], "locked": []}
    before = len(TABLE.lines)
    for turn in range(rounds):
        found["bare"].append(bare_gaps(seconds))
        found["guarded"].append(guarded_gaps(folder / f"loop-{turn}.db", seconds, locked=False))
        found["locked"].append(guarded_gaps(folder / f"locked-{turn}.db", seconds, locked=True))
    counts = TABLE.lines[before:]
    del TABLE.lines[before:]
    p99 = {name: [sorted(g)[int(len(g) * 0.99)] for g in each] for name, each in found.items()}
    worst = {name: [max(g) for g in each] for name, each in found.items()}
    for name, what in (("guarded", "loop gap"), ("locked", "loop gap beside a held lock")):
        ratio = ratio_of(p99[name], p99["bare"])
        report(f"{what}, p99", median(p99[name]), "ms", floor=median(p99["bare"]), ratio=ratio, most=1.5)
        report(
            f"{what}, longest of all",
            max(worst[name]),
            "ms",
            floor=max(worst["bare"]),
            most=50,
            of_ratio=False,
        )
    expect("… rounds with an exact count", sum(bool(line.met) for line in counts), len(counts))


# ═══ A large file ═════════════════════════════════════════════════════════════════════


def fill_ledger(path: Path, count: int) -> None:
    """Calls as the guard writes them, straight into its tables: runs, events, totals."""
    made = open_guard(path)
    guarded(made, -1)
    made.close()
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("synchronous = OFF", "cache_size = -400000", "temp_store = MEMORY"):
        db.execute(f"PRAGMA {pragma}")
    columns = [row[1] for row in db.execute("PRAGMA table_info(runs)") if row[1] != "id"]
    new = {
        "call": "fresh.call",
        "args": """'{"order":' || number || ',"amount":19.99,"currency":"EUR"}'""",
        "result": """'{"id":' || number || ',"ok":true}'""",
    }
    values = ", ".join(new.get(c, f"r.{c}") for c in columns)
    db.create_function("call_name", 1, lambda n: call_name(n + 1))
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TEMP TABLE fresh (call TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
    db.execute(
        "INSERT INTO fresh WITH RECURSIVE n(number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM n"
        " WHERE number < ? - 1) SELECT call_name(number), number FROM n",
        (count,),
    )
    # in the order of the index: the same pages, filled sooner
    source = "fresh, (SELECT * FROM runs LIMIT 1) AS r"
    db.execute(f"INSERT INTO runs ({', '.join(columns)}) SELECT {values} FROM {source}")
    db.execute(
        "INSERT INTO events (call, run, kind, at, tool, wf, caller)"
        " SELECT call, run, 'success', ended, tool, wf, caller FROM runs WHERE id > 1"
    )
    tool = db.execute("SELECT tool FROM runs LIMIT 1").fetchone()[0]
    db.execute("DELETE FROM totals")
    db.execute(
        "INSERT INTO totals (tool, actions, claims, executed, blocked) VALUES (?1, ?2, ?2, ?2, 0)",
        (tool, count + 1),
    )
    db.execute("UPDATE meta SET value = (SELECT MAX(seq) FROM events) WHERE name = 'rolled'")
    db.execute("COMMIT")
    db.execute("DROP TABLE fresh")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def fill_floor(path: Path, count: int) -> None:
    """As many calls in the floor's table."""
    floor = Floor(path)
    floor.db.execute("PRAGMA synchronous = OFF")
    floor.db.execute("PRAGMA cache_size = -400000")
    args = '{"order":1,"amount":19.99,"currency":"EUR"}'
    names = sorted(call_name(-n - 1) for n in range(count))
    floor.db.execute("BEGIN")
    floor.db.executemany(
        "INSERT INTO calls VALUES (?, 'success', ?, ?)", ((n, args, '{"id":1,"ok":true}') for n in names)
    )
    floor.db.execute("COMMIT")
    floor.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    floor.db.close()


LISTER = """
import json, sys, time
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
from ledger import Guard
guard = Guard(sys.argv[1], quiet=True)
begun = time.perf_counter()
actions = guard.stats()["actions"]
stats_seconds, stats_peak = time.perf_counter() - begun, peak()
begun = time.perf_counter()
count = sum(1 for _ in guard.history(stream=True)) if sys.argv[2] == "history" else 0
print(json.dumps([actions, stats_seconds, stats_peak, count, time.perf_counter() - begun, peak()]))
"""
BARE_PEAK = """
print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024)
"""


def in_python(*words: str, cache: Path | None = None) -> Any:
    """What a fresh interpreter prints, as JSON; `cache` is where it keeps bytecode, whatever it is told."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(cache or "")
    command = [sys.executable, "-c", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def bench_size(folder: Path) -> None:
    """A full file against an empty one, and what listing a full one costs."""
    big, big_floor = folder / "big.db", folder / "big-floor.db"
    fill_ledger(big, BIG)
    fill_floor(big_floor, BIG)
    size = f"{BIG:,} calls in the file"
    bare = in_python(BARE_PEAK)
    in_python(f"import ledger\n{BARE_PEAK}", cache=folder)  # compiling takes memory, once
    runs = [in_python(LISTER, str(big), "stats", cache=folder) for _ in range(3)]
    actions, _, peak, *_ = runs[0]
    report(f"stats(), {size}", median([r[1] for r in runs]), "s", most=0.5, of_ratio=False)
    report("… memory above a bare interpreter", peak - bare, "MB", most=30, of_ratio=False)
    _, _, _, listed, seconds, peak = in_python(LISTER, str(big), "history", cache=folder)
    report("history(stream=True), each call", seconds / listed * 1e6, "µs")
    report("… memory above a bare interpreter", peak - bare, "MB", most=30, of_ratio=False)
    expect("… calls in stats and history", (actions, listed), (BIG + 1, BIG + 1))
    guards = {"empty": open_guard(folder / "empty.db"), "big": open_guard(big)}
    lanes = {
        "floor, empty": floor_lane(Floor(folder / "floor-empty.db")),
        "empty": guard_lane(guards["empty"]),
        "floor, big": floor_lane(Floor(big_floor)),
        "big": guard_lane(guards["big"]),
    }
    for lane in lanes.values():
        lane.next = 3 * BIG  # numbers that the filling did not use
    times = Times(lanes, ROUNDS)
    times.flat("first", "first call")
    times.flat("duplicate", "duplicate")
    for made in guards.values():
        made.close()


# ═══ Import and disk ══════════════════════════════════════════════════════════════════


def bench_import(folder: Path) -> None:
    """What `import ledger` adds to a process that does nothing else."""
    walls: dict[str, list[float]] = {"bare": [], "ledger": []}
    peaks: dict[str, list[float]] = {"bare": [], "ledger": []}
    codes = {"bare": BARE_PEAK, "ledger": f"import ledger\n{BARE_PEAK}"}
    for turn in range(12 if SHORT else 41):
        for name, code in codes.items():
            begun = time.perf_counter()
            peak = in_python(code, cache=folder)
            if turn:  # the first writes the bytecode
                walls[name].append((time.perf_counter() - begun) * 1000)
                peaks[name].append(peak)
    more = [median(found["ledger"]) - median(found["bare"]) for found in (walls, peaks)]
    bare = [median(found["bare"]) for found in (walls, peaks)]
    report("import, above a bare interpreter", more[0], "ms", floor=bare[0], most=30, of_ratio=False)
    report("… its memory", more[1], "MB", floor=bare[1], most=9, of_ratio=False)


def bench_disk(folder: Path) -> None:
    """Bytes in the file for each executed call."""
    sizes = []
    count = 2000 if SHORT else 10_000
    for calls in (1, count + 1):
        path = folder / f"disk-{calls}.db"
        made = open_guard(path, "off")
        for number in range(calls):
            guarded(made, number)
        made.close()
        sizes.append(path.stat().st_size)
    report("bytes on disk per executed call", (sizes[1] - sizes[0]) / count, "B", most=600, of_ratio=False)


def main() -> int:
    """Measure everything; 1 if a count is wrong."""
    return TABLE.run(
        bench_one_caller,
        bench_threads_and_tasks,
        bench_counters,
        bench_same_calls,
        bench_loop,
        bench_size,
        bench_import,
        bench_disk,
    )


if __name__ == "__main__":
    raise SystemExit(main())
