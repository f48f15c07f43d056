"""Times of the guard on PostgreSQL and Redis, as ratios to the bare driver doing the least honest work.

Run it by `make bench-stores`; BENCH_SHORT=1 takes about a minute.  Both sides are measured in one run,
in interleaved rounds.  The floor of an executed call is an insert-if-absent and a guarded update, that
of a duplicate one read, on as many connections as there are callers: threads, then tasks of one event
loop with the driver's own async client.  After that the guard alone, on stores that hold many calls
already, as ratios to one that holds few.  The servers are real: those that LEDGER_TEST_POSTGRES and
LEDGER_TEST_REDIS name, else ones that are started here from wheels.

A figure over its target is reported, never an error; a call that ran twice is one, with exit status 1.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ledger import Guard  # noqa: E402 - the tree's own, and its tests' servers
from ledger_stores.dynamodb import DynamoStore  # noqa: E402
from ledger_stores.mongodb import MongoStore  # noqa: E402
from tests.stores.dynamo_kit import dynamo_url  # noqa: E402
from tests.stores.mongo_kit import stand_in  # noqa: E402
from tests.stores.redis_kit import RedisServer  # noqa: E402
from tests.stores.servers import postgres_url  # noqa: E402

SHORT = os.environ.get("BENCH_SHORT", "") not in ("", "0")
ROUNDS = 3 if SHORT else 9
CALLS = 320 if SHORT else 1280
CALLERS = (1, 8, 64)
#: how many calls a store holds already
SIZES = (1_000, 20_000) if SHORT else (1_000, 100_000, 1_000_000)
RESULT = '{"ok": true}'


def charge(order: str) -> dict[str, bool]:
    """A tool that takes no time."""
    return {"ok": bool(order)}


async def charge_async(order: str) -> dict[str, bool]:
    """The same for an event loop."""
    return {"ok": bool(order)}


AsyncCall = Callable[[str], Awaitable[object]]


class Side:
    """One side of a comparison: what a caller does, once for each thread, as it needs its own connection."""

    def first(self) -> Callable[[str], object]:
        """Something that makes a first call."""
        raise NotImplementedError

    def duplicate(self) -> Callable[[str], object]:
        """Something that asks for a call that was made."""
        raise NotImplementedError

    async def in_loop(self, stack: AsyncExitStack) -> tuple[AsyncCall, AsyncCall]:
        """Both for a task of an event loop; what is opened for them closes with the stack."""
        raise NotImplementedError


class Ours(Side):
    """The guard, one for all threads."""

    def __init__(self, url: str) -> None:
        self.namespace = f"b{uuid.uuid4().hex[:12]}"
        self.guard = Guard(url, namespace=self.namespace, quiet=True)
        self.guard.defaults(replay=True)
        self.guard.check()

    def first(self) -> Callable[[str], object]:
        """The guard itself."""
        return functools.partial(self.guard, charge)

    duplicate = first

    async def in_loop(self, stack: AsyncExitStack) -> tuple[AsyncCall, AsyncCall]:
        """The guard itself, which needs nothing for each task."""
        del stack
        call = functools.partial(self.guard, charge_async)
        return call, call


class BarePostgres(Side):
    """psycopg: INSERT … ON CONFLICT DO NOTHING, a guarded UPDATE; one SELECT."""

    def __init__(self, url: str) -> None:
        import psycopg

        self.url = url
        self.connect = functools.partial(psycopg.connect, url, autocommit=True)
        self.table = f"floor_{uuid.uuid4().hex[:12]}"
        self.connect().execute(
            f"CREATE TABLE {self.table} (call text PRIMARY KEY, status text, args text, result text)"
        )

        self.insert = f"INSERT INTO {self.table} VALUES (%s, 'running', %s, NULL) ON CONFLICT DO NOTHING"
        self.update = (
            f"UPDATE {self.table} SET status = 'success', result = %s WHERE call = %s AND status = 'running'"
        )
        self.select = f"SELECT status, result FROM {self.table} WHERE call = %s"

    def first(self) -> Callable[[str], object]:
        """Two statements, each committed."""
        db = self.connect()

        def call(order: str) -> None:
            db.execute(self.insert, (order, RESULT))
            db.execute(self.update, (RESULT, order))

        return call

    def duplicate(self) -> Callable[[str], object]:
        """One read."""
        db = self.connect()
        return lambda order: db.execute(self.select, (order,)).fetchone()

    async def in_loop(self, stack: AsyncExitStack) -> tuple[AsyncCall, AsyncCall]:
        """The same with `AsyncConnection`."""
        import psycopg

        db = await psycopg.AsyncConnection.connect(self.url, autocommit=True)
        stack.push_async_callback(db.close)

        async def call(order: str) -> None:
            await db.execute(self.insert, (order, RESULT))
            await db.execute(self.update, (RESULT, order))

        async def duplicate(order: str) -> object:
            return await (await db.execute(self.select, (order,))).fetchone()

        return call, duplicate


class BareRedis(Side):
    """redis-py: SET NX, and a SET that a script guards; one GET."""

    def __init__(self, url: str) -> None:
        import redis

        self.url = url
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

    async def in_loop(self, stack: AsyncExitStack) -> tuple[AsyncCall, AsyncCall]:
        """The same with `redis.asyncio`."""
        import redis.asyncio

        db: Any = redis.asyncio.Redis.from_url(self.url)
        stack.push_async_callback(db.aclose)
        settle = db.register_script(self.settle)

        async def call(order: str) -> None:
            await db.set(f"floor:{order}", "running", nx=True)
            await settle(keys=[f"floor:{order}"], args=["running", RESULT])

        return call, lambda order: db.get(f"floor:{order}")


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


async def per_second_async(side: Side, callers: int, orders: list[str]) -> tuple[float, float]:
    """First calls and duplicates per second of so many tasks, each with its share of the orders."""

    async def work(call: AsyncCall, mine: list[str]) -> None:
        for order in mine:
            await call(order)

    async with AsyncExitStack() as stack:
        made = [await side.in_loop(stack) for _ in range(callers)]
        await asyncio.gather(*(work(call, [f"warm {orders[i]}"]) for i, (call, _) in enumerate(made)))
        speeds = []
        for kind in (0, 1):
            begun = time.perf_counter()
            await asyncio.gather(*(work(calls[kind], orders[i::callers]) for i, calls in enumerate(made)))
            speeds.append(len(orders) / (time.perf_counter() - begun))
    return speeds[0], speeds[1]


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


def in_threads(side: Side, callers: int, orders: list[str]) -> tuple[float, float]:
    """First calls and duplicates per second of so many threads."""
    return per_second(side.first, callers, orders), per_second(side.duplicate, callers, orders)


def in_tasks(side: Side, callers: int, orders: list[str]) -> tuple[float, float]:
    """First calls and duplicates per second of so many tasks."""
    return asyncio.run(per_second_async(side, callers, orders))


def bench(what: str, url: str, floor: Side) -> bool:
    """All lines of one server; whether every call ran once."""
    ours, made = Ours(url), 1
    for measure, kind_of_caller in ((in_threads, "threads"), (in_tasks, "tasks")):
        for callers in CALLERS:
            found: dict[str, list[tuple[float, float]]] = {"bare": [], "guard": []}
            for _ in range(ROUNDS):
                orders = [uuid.uuid4().hex for _ in range(CALLS)]
                found["bare"].append(measure(floor, callers, orders))
                found["guard"].append(measure(ours, callers, orders))
                made += CALLS + (callers if measure is in_tasks else 0)
            for kind, name in enumerate(("call", "duplicate")):
                guard, bare = ([speeds[kind] for speeds in found[side]] for side in ("guard", "bare"))
                ratio = median(a / b for a, b in zip(guard, bare, strict=True))
                least = 1 / 1.5 if callers == 1 else 0.7
                told = "ok" if ratio >= least else "over"
                speeds = f"{median(guard):>8,.0f}{median(bare):>9,.0f}  {ratio:>5.2f} × bare"
                who = f"{callers:>3} {kind_of_caller:<8}"
                print(f"{what:<13}{who}{name + 's/s':<13}{speeds}   ≥ {least:.2f}  {told}")
    ours.guard.flush()
    with round_trips(ours.guard._ready()) as asked:
        ours.guard(charge, "one more")
        executed, asked[0] = asked[0], 0
        ours.guard(charge, "one more")
    print(f"{what:<13}round trips: executed call {executed} (≤ 2), duplicate {asked[0]} (≤ 1)")
    return ran_once(what, ours.guard, made)


def ran_once(what: str, guard: Guard, made: int) -> bool:
    """Whether all calls are there and each ran once; says so, and closes the guard."""
    sums = guard.stats()
    print(f"{what:<13}calls {sums['actions']:,}, executed {sums['executed']:,}, of {made:,}")
    guard.close()
    return bool(sums["actions"] == sums["executed"] == made)


# ── a store that holds many calls ─────────────────────────────────────────────────────


def fill_postgres(url: str, namespace: str, size: int) -> None:
    """So many calls that succeeded, with their events, made by the server itself."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            f"INSERT INTO {namespace}.runs (call, run, tool, wf, caller, owner, args, started, lease, status,"
            " result, ended, closed_by) SELECT md5(n::text), 1, 'shop.charge', 'main', 'pid 1', 'old.' || n,"
            " %s, n, n, 'success', %s, n, 'old.' || n FROM generate_series(1, %s) AS n",
            (f'{{"order": "{uuid.uuid4().hex}"}}', RESULT, size),
        )
        db.execute(
            f"INSERT INTO {namespace}.events (seq, call, run, kind, at, tool, wf, caller) SELECT e - 2 * %s,"
            " md5((e / 2)::text), 1, CASE e %% 2 WHEN 0 THEN 'claimed' ELSE 'success' END, e, 'shop.charge',"
            " 'main', 'pid 1' FROM generate_series(2, 2 * %s + 1) AS e",
            (size + 1, size),
        )
        db.execute(f"VACUUM ANALYZE {namespace}.runs, {namespace}.events")


#: the keys that redis.lua makes for a call that succeeded, for the calls from one number to another
FILL = """
local prefix, from, to = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
for n = from, to do
  local call, first = redis.sha1hex(n), redis.call('HINCRBY', prefix .. 'meta', 'seq', 2) - 1
  redis.call('HSET', prefix .. 'call:' .. call, 'head', '1 ' .. first .. ' 1 1:' .. n, '1:args', ARGV[3],
    '1:result', ARGV[4], '1:row', cjson.encode({tool = 'shop.charge', wf = 'main', caller = 'pid 1',
    owner = 'old.' .. n, closed_by = 'old.' .. n, started = '1', lease = '1', ended = '1',
    status = 'success'}))
  redis.call('ZADD', prefix .. 'calls', first, call)
  redis.call('ZADD', prefix .. 'calls:main', first, call)
  for i, kind in ipairs({'claimed', 'success'}) do
    redis.call('XADD', prefix .. 'events', (first + i - 1) .. '-0', 'call', call, 'run', 1, 'kind', kind,
      'at', n, 'tool', 'shop.charge', 'wf', 'main', 'caller', 'pid 1', 'n', 1)
  end
end
for _, sum in ipairs({'actions', 'claims', 'executed'}) do
  redis.call('HINCRBY', prefix .. 'totals', sum .. ' shop.charge', to - from + 1)
end
"""


def fill_redis(url: str, namespace: str, size: int) -> None:
    """So many calls that succeeded, with their events, made by the server itself."""
    import redis

    with redis.Redis.from_url(url) as db:
        fill = db.register_script(FILL)
        args = (f'{{"order": "{uuid.uuid4().hex}"}}', RESULT)
        for begin in range(1, size + 1, 1000):
            fill(keys=[f"{{{namespace}}}:"], args=(begin, min(begin + 999, size), *args))


def micros(call: Callable[[str], object], orders: list[str]) -> float:
    """What one call takes."""
    begun = time.perf_counter()
    for order in orders:
        call(order)
    return (time.perf_counter() - begun) * 1e6 / len(orders)


def bench_sizes(what: str, url: str, fill: Callable[[str, str, int], None]) -> bool:
    """What a call costs where there are many already, as a ratio to where there are few."""
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in SIZES}
    makers, others = {}, {}
    for size in SIZES:
        ours = Ours(url)
        fill(url, ours.namespace, size)
        makers[size] = ours.guard
        # other settings, so that it has a store of its own
        others[size] = Guard(url, namespace=ours.namespace, quiet=True, lock_seconds=29.0)
        others[size].defaults(replay=True)
    rounds, count = 4 * ROUNDS, CALLS // 8
    for _ in range(rounds):
        for size in SIZES:
            orders = [uuid.uuid4().hex for _ in range(count)]
            mine, other = (functools.partial(guard[size], charge) for guard in (makers, others))
            found[size].append((micros(mine, orders), micros(mine, orders), micros(other, orders)))
    for kind, name in enumerate(("call", "duplicate", "duplicate of another process")):
        for size in SIZES:
            ratio = median(a[kind] / b[kind] for a, b in zip(found[size], found[SIZES[0]], strict=True))
            told = "ok" if ratio <= 1.2 else "over"
            cost = f"{median(costs[kind] for costs in found[size]):>8,.0f} µs  {ratio:>5.2f} × few"
            print(f"{what:<13}{size:>9,} calls  {name:<30}{cost}   ≤ 1.20  {told}")
    for guard in others.values():
        guard.close()
    right = [ran_once(what, makers[size], size + rounds * count) for size in SIZES]
    return all(right)


# ── stores whose servers are only stood in for: how fast those are would say nothing ──


class CountedDynamo(DynamoStore):
    """Counts what its callers ask; counts of duplicates are written in the background."""

    asked = 0

    def _do(self, operation: str, **values: Any) -> dict[str, Any]:
        self.asked += threading.current_thread() is threading.main_thread()
        return super()._do(operation, **values)


class CountedMongo(MongoStore):
    """Likewise; what an operation does inside another's is part of that, and each is one command here."""

    asked = 0

    def _opened(self) -> Any:
        is_outer = getattr(self._mine, "opened", None) is None
        self.asked += is_outer and threading.current_thread() is threading.main_thread()
        return super()._opened()


def bench_round_trips(what: str, kind: type[CountedDynamo | CountedMongo], url: str) -> bool:
    """What a call costs, and a duplicate in the process that made it and in another; whether it ran once."""
    stores = [kind(url, namespace="bench") for _ in range(2)]
    guards = [Guard(store=store, quiet=True) for store in stores]
    found: list[int] = []
    for guard, store in zip(guards, stores, strict=True):
        guard.defaults(replay=True)
        guard(charge, f"the first of {len(found)}")
        for _ in range(2):
            store.asked = 0
            guard(charge, "one")
            found.append(store.asked)
    executed, known, other, _ = found
    print(
        f"{what:<13}round trips: executed call {executed} (≤ 2), duplicate {known}, elsewhere {other} (≤ 1)"
    )
    guards[1].close()
    return ran_once(what, guards[0], 3)


def main() -> int:
    """All of them."""
    url = postgres_url()
    right = bench("PostgreSQL", url, BarePostgres(url))
    right &= bench_sizes("PostgreSQL", url, fill_postgres)
    for setting in ("everysec", "always"):
        server = RedisServer("--appendonly", "yes", "--appendfsync", setting)
        try:
            right &= bench(f"Redis {setting[:6]}", server.url, BareRedis(server.url))
            if setting == "everysec":
                right &= bench_sizes("Redis everys", server.url, fill_redis)
        finally:
            server.close()
    right &= bench_round_trips("DynamoDB", CountedDynamo, dynamo_url())
    right &= bench_round_trips("MongoDB", CountedMongo, stand_in().url)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
