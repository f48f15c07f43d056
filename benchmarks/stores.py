"""Times of the guard on PostgreSQL and Redis, as ratios to the bare driver doing the least honest work.

Run it by `make bench-stores`; BENCH_SHORT=1 takes less than a minute.  Both sides are measured in one
run, in interleaved rounds.  The floor of an executed call is an insert-if-absent and a guarded update,
that of a duplicate one read, on as many connections as there are callers.  The servers are real: those
that LEDGER_TEST_POSTGRES and LEDGER_TEST_REDIS name, else ones that are started here from wheels.

A figure over its target is reported, never an error; a call that ran twice is one, with exit status 1.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ledger import Guard  # noqa: E402 - the tree's own, and its tests' servers
from tests.stores.redis_kit import RedisServer  # noqa: E402
from tests.stores.servers import postgres_url  # noqa: E402

SHORT = os.environ.get("BENCH_SHORT", "") not in ("", "0")
ROUNDS = 3 if SHORT else 9
CALLS = 320 if SHORT else 1280
CALLERS = (1, 8, 64)
RESULT = '{"ok": true}'


def charge(order: str) -> dict[str, bool]:
    """A tool that takes no time."""
    return {"ok": bool(order)}


class Side:
    """One side of a comparison: what a caller does, once for each thread, as it needs its own connection."""

    def first(self) -> Callable[[str], object]:
        """Something that makes a first call."""
        raise NotImplementedError

    def duplicate(self) -> Callable[[str], object]:
        """Something that asks for a call that was made."""
        raise NotImplementedError


class Ours(Side):
    """The guard, one for all threads."""

    def __init__(self, url: str) -> None:
        self.guard = Guard(url, namespace=f"b{uuid.uuid4().hex[:12]}", quiet=True)
        self.guard.defaults(replay=True)
        self.guard.check()

    def first(self) -> Callable[[str], object]:
        """The guard itself."""
        return functools.partial(self.guard, charge)

    duplicate = first


class BarePostgres(Side):
    """psycopg: INSERT … ON CONFLICT DO NOTHING, a guarded UPDATE; one SELECT."""

    def __init__(self, url: str) -> None:
        import psycopg

        self.connect = functools.partial(psycopg.connect, url, autocommit=True)
        self.table = f"floor_{uuid.uuid4().hex[:12]}"
        self.connect().execute(
            f"CREATE TABLE {self.table} (call text PRIMARY KEY, status text, args text, result text)"
        )

    def first(self) -> Callable[[str], object]:
        """Two statements, each committed."""
        db = self.connect()

        def call(order: str) -> None:
            insert = f"INSERT INTO {self.table} VALUES (%s, 'running', %s, NULL) ON CONFLICT DO NOTHING"
            db.execute(insert, (order, RESULT))
            update = (
                f"UPDATE {self.table} SET status = 'success', result = %s WHERE call = %s"
                " AND status = 'running'"
            )
            db.execute(update, (RESULT, order))

        return call

    def duplicate(self) -> Callable[[str], object]:
        """One read."""
        db = self.connect()
        sql = f"SELECT status, result FROM {self.table} WHERE call = %s"
        return lambda order: db.execute(sql, (order,)).fetchone()


class BareRedis(Side):
    """redis-py: SET NX, and a SET that a script guards; one GET."""

    def __init__(self, url: str) -> None:
        import redis

        self.connect = functools.partial(redis.Redis.from_url, url)
        self.settle = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end"

    def first(self) -> Callable[[str], object]:
        """Two commands."""
        db: Any = self.connect()
        settle = db.register_script(self.settle)

        def call(order: str) -> None:
            db.set(f"floor:{order}", "running", nx=True)
            settle(keys=[f"floor:{order}"], args=["running", RESULT])

        return call

    def duplicate(self) -> Callable[[str], object]:
        """One read."""
        db: Any = self.connect()
        return lambda order: db.get(f"floor:{order}")


def per_second(make: Callable[[], Callable[[str], object]], callers: int, orders: list[str]) -> float:
    """Calls per second of so many threads, each with its share of the orders."""
    gate = threading.Barrier(callers + 1)

    def work(mine: list[str]) -> None:
        call = make()
        call(mine[0])
        gate.wait()
        for order in mine[1:]:
            call(order)

    threads = [threading.Thread(target=work, args=(orders[i::callers],)) for i in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return (len(orders) - callers) / (time.perf_counter() - begun)


@contextmanager
def round_trips(store: Any) -> Iterator[list[int]]:
    """How often the store asks its server."""
    asked, insist = [0], store._insist

    def counted(perform: Callable[..., Any], *values: Any) -> Any:
        asked[0] += 1
        return insist(perform, *values)

    store._insist = counted
    yield asked
    del store._insist


def bench(what: str, url: str, floor: Side) -> bool:
    """All lines of one server; whether every call ran once."""
    ours = Ours(url)
    for callers in CALLERS:
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            orders = [uuid.uuid4().hex for _ in range(CALLS)]
            for name, side in (("bare", floor), ("guard", ours)):
                found.setdefault((name, "call"), []).append(per_second(side.first, callers, orders))
                found.setdefault((name, "duplicate"), []).append(per_second(side.duplicate, callers, orders))
        for kind in ("call", "duplicate"):
            guard, bare = found["guard", kind], found["bare", kind]
            ratio = median(a / b for a, b in zip(guard, bare, strict=True))
            least = 1 / 1.5 if callers == 1 else 0.7
            told = "ok" if ratio >= least else "over"
            speeds = f"{median(guard):>8,.0f}{median(bare):>9,.0f}  {ratio:>5.2f} × bare"
            print(f"{what:<13}{callers:>3} callers  {kind + 's/s':<13}{speeds}   ≥ {least:.2f}  {told}")
    ours.guard.flush()
    with round_trips(ours.guard._ready()) as asked:
        ours.guard(charge, "one more")
        executed, asked[0] = asked[0], 0
        ours.guard(charge, "one more")
    print(f"{what:<13}round trips: executed call {executed} (≤ 2), duplicate {asked[0]} (≤ 1)")
    sums = ours.guard.stats()
    made = len(CALLERS) * ROUNDS * CALLS + 1
    print(f"{what:<13}calls {sums['actions']:,}, executed {sums['executed']:,}, of {made:,}")
    ours.guard.close()
    return bool(sums["actions"] == sums["executed"] == made)


def main() -> int:
    """Both servers."""
    url = postgres_url()
    right = bench("PostgreSQL", url, BarePostgres(url))
    for setting in ("everysec", "always"):
        server = RedisServer("--appendonly", "yes", "--appendfsync", setting)
        try:
            right &= bench(f"Redis {setting[:6]}", server.url, BareRedis(server.url))
        finally:
            server.close()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
