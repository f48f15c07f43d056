"""Times of the task ledger, as ratios to bare statements, and what must not grow with the number of tasks.

Run it by `make bench-tasks`; BENCH_SHORT=1 takes about two minutes.  The floor of a claim is one committed
UPDATE of the first row of an index (SQLite with synchronous=FULL; PostgreSQL with FOR UPDATE SKIP LOCKED),
by as many processes on a table of as many rows.  PostgreSQL is the one that LEDGER_TEST_POSTGRES names,
else one that is started here from a wheel.  A figure over its target is reported, never an error; a task
that was claimed twice, or a chain that did not end, is one, with exit status 1.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.table import SHORT, Table  # noqa: E402 - the tree's own
from ledger_tasks import Dep, Task, TaskLedger  # noqa: E402
from ledger_tasks.book import Book, stepped  # noqa: E402
from ledger_tasks.model import apply  # noqa: E402
from tests.stores.servers import fresh_namespace, postgres_url  # noqa: E402

TABLE = Table()
PROCESSES = 8
FEW, MANY = (1_000, 20_000) if SHORT else (1_000, 100_000)
#: how often few and many tasks are claimed by turns, and by each process each time; of few some stay free
ROUNDS, CLAIMS = (2, 30) if SHORT else (3, 25)
#: by one process alone, where there are many
CLAIMS_ALONE = 200
CHAIN = 2_000 if SHORT else 10_000
STORY = 50_000 if SHORT else 1_000_000
SPAWN = multiprocessing.get_context("spawn")


def open_tasks(url: str) -> TaskLedger:
    """Without a notice of a new file; on a server in the namespace behind the URL."""
    address, _, namespace = url.rpartition("#")
    if address:
        return TaskLedger(address, agent="bench", namespace=namespace, quiet=True)
    return TaskLedger(url, agent="bench", quiet=True)


def fill(tasks: TaskLedger, count: int) -> None:
    """Tasks of which every third waits for another."""
    for start in range(0, count, 2_000):
        tasks.add_tasks(
            Task(f"t{n}", "to do", depends_on=(Dep(f"t{n - 7}"),) if n % 3 == 0 and n > start + 7 else ())
            for n in range(start, min(start + 2_000, count))
        )


# ═══ Claims by processes ══════════════════════════════════════════════════════════════


def claim_ours(url: str, claims: int, go: Any, told: Any) -> None:
    """What one process does: open, wait for the others, claim."""
    tasks = open_tasks(url)
    tasks.counts()
    told.put(None)
    go.wait()
    told.put(timed(lambda: claimed(tasks), claims))


def claimed(tasks: TaskLedger) -> str:
    """The id of a task that is this process's now."""
    claim = tasks.claim_next(lease=600)
    return claim.id if claim else ""


def claim_bare(url: str, claims: int, go: Any, told: Any) -> None:
    """The same with one statement in one transaction."""
    claim = bare_postgres(url) if url.startswith("postgresql:") else bare_sqlite(url)
    told.put(None)
    go.wait()
    told.put(timed(claim, claims))


def bare_sqlite(path: str) -> Callable[[], str]:
    """Claims the first free row by priority and age."""
    db = sqlite3.connect(path, timeout=60, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")

    def claim() -> str:
        db.execute("BEGIN IMMEDIATE")
        (found,) = db.execute(f"{TAKE} LIMIT 1) RETURNING id").fetchall()[0]
        db.execute("COMMIT")
        return str(found)

    return claim


def bare_postgres(url: str) -> Callable[[], str]:
    """Likewise; rows that others are claiming are passed over."""
    import psycopg

    address, _, table = url.rpartition("#")
    db = psycopg.connect(address, autocommit=True)
    sql = f"{TAKE} LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id".replace(" tasks", f" {table}")

    def claim() -> str:
        [found] = db.execute(sql).fetchone() or [""]
        return str(found)

    return claim


TAKE = (
    "UPDATE tasks SET state = 'assigned', assignee = 'me' WHERE num = (SELECT num FROM tasks"
    " WHERE state = 'pending' AND open = 0 ORDER BY priority DESC, num"
)


def timed(claim: Callable[[], str], claims: int) -> tuple[list[float], list[str]]:
    """Microseconds of each claim, and what was claimed."""
    spent, names = [], []
    for _ in range(claims):
        begun = time.perf_counter()
        names.append(claim())
        spent.append((time.perf_counter() - begun) * 1e6)
    return spent, names


def by_processes(
    work: Callable[..., None], url: str, processes: int = PROCESSES, claims: int = CLAIMS
) -> tuple[list[float], list[str]]:
    """The time of each claim when several processes claim at once, and all that was claimed."""
    go, told = SPAWN.Event(), SPAWN.Queue()
    crew = [SPAWN.Process(target=work, args=(url, claims, go, told)) for _ in range(processes)]
    for process in crew:
        process.start()
    for _ in crew:
        told.get(timeout=120)
    go.set()
    found = [told.get(timeout=600) for _ in crew]
    for process in crew:
        process.join()
    return [t for spent, _ in found for t in spent], [name for _, names in found for name in names]


def rows_of(count: int) -> Iterable[tuple[str, int]]:
    """What the bare table holds: an id, and whether it waits."""
    return ((f"t{n}", 1 if n % 3 == 0 else 0) for n in range(count))


def sqlite_table(path: Path, count: int) -> str:
    """A table of so many rows with the index that a claim needs."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(
        "CREATE TABLE tasks (num INTEGER PRIMARY KEY, id TEXT UNIQUE, state TEXT, priority INTEGER,"
        " open INTEGER, assignee TEXT, doc TEXT)"
    )
    db.execute("CREATE INDEX ready ON tasks (priority DESC, num) WHERE state = 'pending' AND open = 0")
    db.execute("BEGIN")
    db.executemany("INSERT INTO tasks VALUES (NULL, ?, 'pending', 5, ?, '', '{}')", rows_of(count))
    db.execute("COMMIT")
    db.close()
    return str(path)


def postgres_table(url: str, count: int) -> str:
    """The same on a server; the URL with the table's name behind it."""
    import psycopg

    table = f"bare_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            f"CREATE TABLE {table} (num bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text UNIQUE,"
            " state text, priority integer, open integer, assignee text, doc text)"
        )
        db.execute(f"CREATE INDEX ON {table} (priority DESC, num) WHERE state = 'pending' AND open = 0")
        with db.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {table} (id, state, priority, open, assignee, doc)"
                " VALUES (%s, 'pending', 5, %s, '', '{}')",
                list(rows_of(count)),
            )
        db.execute(f"ANALYZE {table}")
    return f"{url}#{table}"


def bench_claims(what: str, ours: Callable[[int], str], bare: Callable[[int], str]) -> None:
    """Claims of few and of many tasks, by turns, by one and by eight processes, beside the bare statement."""
    urls: dict[int, tuple[str, str]] = {}
    for count in (FEW, MANY):
        urls[count] = ours(count), bare(count)
        tasks = open_tasks(urls[count][0])
        fill(tasks, count)
        tasks.close()
    os.sync()  # what was filled is written now, and not while claims are timed
    spent: dict[int, list[float]] = {FEW: [], MANY: []}
    floor: dict[int, list[float]] = {FEW: [], MANY: []}
    names: dict[int, list[str]] = {FEW: [], MANY: []}
    for _ in range(ROUNDS):
        for count in (FEW, MANY):
            times, claimed_now = by_processes(claim_ours, urls[count][0])
            spent[count] += times
            names[count] += claimed_now
            floor[count] += by_processes(claim_bare, urls[count][1])[0]
    for count in (FEW, MANY):
        report_claims(
            f"{what}: claim_next, {PROCESSES} processes, {count:,} tasks", spent[count], floor[count]
        )
        found = len(names[count]), len({*names[count]} - {""})
        TABLE.expect("… tasks claimed, each once", found, (PROCESSES * CLAIMS * ROUNDS,) * 2)
    few, many = median(spent[FEW]), median(spent[MANY])
    TABLE.report(f"… {MANY:,} tasks to {FEW:,}", many, "µs", floor=few, ratio=many / few, most=1.2)
    sides = zip((claim_ours, claim_bare), urls[MANY], strict=True)
    alone = [by_processes(work, url, 1, CLAIMS_ALONE)[0] for work, url in sides]
    report_claims(f"{what}: claim_next, one process, {MANY:,} tasks", *alone)


def report_claims(what: str, spent: list[float], floor: list[float]) -> None:
    """The median, its ratio to the bare statement's, and how much it is above that."""
    ours, bare = median(spent), median(floor)
    TABLE.report(what, ours, "µs", floor=bare, ratio=ours / bare)
    TABLE.report("… above the bare statement", ours - bare, "µs", most=1000, of_ratio=False)


# ═══ Shapes of a graph ════════════════════════════════════════════════════════════════


def spend(work: Callable[[], object]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


def finish(tasks: TaskLedger, name: str) -> None:
    """Claim, begin and complete one task."""
    claim = tasks.claim_task(name)
    if claim is None:
        raise SystemExit(f"{name} could not be claimed")
    tasks.start(claim)
    tasks.complete(claim)


def bench_dependents(folder: Path) -> None:
    """Completing a task that a thousand wait for, in one transaction."""
    tasks = open_tasks(str(folder / "dependents.db"))
    spent = {}
    for count in (1, 1_000):
        tasks.add_task(f"first-{count}")
        tasks.add_tasks(Task(f"of-{count}-{n}", depends_on=(Dep(f"first-{count}"),)) for n in range(count))
        spent[count] = spend(functools.partial(finish, tasks, f"first-{count}"))
    one, thousand = spent[1], spent[1_000]
    TABLE.report("claim, start, complete: 1,000 dependents", thousand, "ms", floor=one, ratio=thousand / one)
    TABLE.expect("… that can be begun now", len(tasks.get_parallel_executable_tasks(5_000)), 1_001)


def chain(count: int) -> Iterable[Task]:
    """Each waits for the one before it."""
    return (Task(f"c{n}", depends_on=(Dep(f"c{n - 1}"),) if n else ()) for n in range(count))


def fan(count: int) -> Iterable[Task]:
    """All wait for the first, and the last for all."""
    yield Task("c0")
    yield from (Task(f"c{n}", depends_on=(Dep("c0"),)) for n in range(1, count - 1))
    yield Task(f"c{count - 1}", depends_on=tuple(Dep(f"c{n}") for n in range(1, count - 1)))


def bench_shape(folder: Path, what: str, shape: Callable[[int], Iterable[Task]]) -> None:
    """What a chain and a fan cost, by task, when they are ten times as long."""
    found: dict[int, dict[str, float]] = {}
    for count in (CHAIN // 10, CHAIN):
        tasks = open_tasks(str(folder / f"{what}-{count}.db"))
        found[count] = {
            "added": spend(functools.partial(tasks.add_tasks, [*shape(count)])),
            "in waves": spend(tasks.waves),
            "its critical path": spend(tasks.critical_path),
            "its first cancelled": spend(functools.partial(tasks.cancel, "c0")),
        }
        states = {state.name: number for state, number in tasks.counts().items()}
        TABLE.expect(f"{what} of {count:,}, ended", states, {"CANCELLED": 1, "SKIPPED": count - 1})
        tasks.close()
    for act, spent in found[CHAIN].items():
        short = found[CHAIN // 10][act] * 10
        TABLE.report(f"{what} of {CHAIN:,} {act}", spent, "ms", floor=short, ratio=spent / short, most=2.0)


# ═══ A long story ═════════════════════════════════════════════════════════════════════


def tell(tasks: TaskLedger, count: int) -> None:
    """So many events of one task, ten thousand in a transaction."""
    tasks.add_task("long")
    for start in range(1, count, 10_000):
        tasks.store.write(tasks.session, functools.partial(tell_some, min(10_000, count - start)))


def tell_some(count: int, book: Book) -> None:
    """As the operations write them, without a transaction for each."""
    row = book.row("long")
    if row is None:
        raise SystemExit("the task is gone")
    events = []
    for number in range(count):
        row, event = stepped(
            row, "progress", moment=book.now, actor="bench", fields={"progress": number % 100 / 100}
        )
        events.append(event)
    book.save(row, events)


def replay_apart(url: str, told: Any) -> None:
    """In a process of its own, whose memory is its own."""
    tasks = open_tasks(url)
    first = next(tasks.events("long"))
    apply(None, first)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    last = tasks.replay("long")
    seconds = time.perf_counter() - begun
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    now = tasks.get("long").to_dict()
    told.put(([name for name, value in last.to_dict().items() if value != now[name]], seconds, more))


def bench_replay(folder: Path) -> None:
    """Memory and time of a replay, of a short story and of a long one."""
    found: dict[int, Sequence[float]] = {}
    for count in (STORY // 50, STORY):
        url = str(folder / f"story-{count}.db")
        tasks = open_tasks(url)
        tell(tasks, count)
        tasks.close()
        told = SPAWN.Queue()
        process = SPAWN.Process(target=replay_apart, args=(url, told))
        process.start()
        difference, *found[count] = told.get(timeout=900)
        process.join()
        TABLE.expect(f"replay of {count:,} events, fields that differ", difference, [])
    seconds, kilobytes = found[STORY]
    TABLE.report(f"replay of {STORY:,} events, each", seconds / STORY * 1e6, "µs")
    TABLE.report(
        "… its memory", kilobytes / 1024, "MB", floor=found[STORY // 50][1] / 1024, most=8, of_ratio=False
    )


def bench_claims_on_sqlite(folder: Path) -> None:
    """In files of the folder."""
    bench_claims(
        "SQLite", lambda n: str(folder / f"ours-{n}.db"), lambda n: sqlite_table(folder / f"bare-{n}.db", n)
    )


def bench_claims_on_postgres(folder: Path) -> None:
    """On the server, which needs no folder."""
    del folder
    server = postgres_url()
    bench_claims("PostgreSQL", lambda _: f"{server}#{fresh_namespace()}", lambda n: postgres_table(server, n))


def bench_chain(folder: Path) -> None:
    """Each task waits for the one before it."""
    bench_shape(folder, "chain", chain)


def bench_fan(folder: Path) -> None:
    """All wait for the first, and the last for all."""
    bench_shape(folder, "fan", fan)


def main() -> int:
    """Measure everything; 1 if a count is wrong."""
    return TABLE.run(
        bench_claims_on_sqlite,
        bench_claims_on_postgres,
        bench_dependents,
        bench_chain,
        bench_fan,
        bench_replay,
    )


if __name__ == "__main__":
    raise SystemExit(main())
