"""What a worker adds to the statements of its tasks, and how well several of them share the work.

Run it by `make bench-workers`; BENCH_SHORT=1 takes about a minute.  The floor is recorded, not invented: a
worker does all tasks of a file once while every statement of its transactions is noted with its values; then
bare sqlite3 does the same statements in the same transactions (BEGIN IMMEDIATE … COMMIT, synchronous=FULL) on
a copy of the file.  A figure over its target is reported, never an error; a task that was not done, or done
twice, is one, with exit status 1.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.table import SHORT, Table  # noqa: E402 - the tree's own
from ledger_tasks import Task, TaskLedger, Worker  # noqa: E402
from ledger_tasks.sqlite import SqliteBook, SqliteTaskStore  # noqa: E402

TABLE = Table()
TASKS = 400 if SHORT else 2_000
PROCESSES = 4
WAIT = 0.02
SPAWN = multiprocessing.get_context("spawn")
#: what one transaction does: statements with their values
Tape = list[tuple[str, dict[str, Any]]]


def open_tasks(path: str) -> TaskLedger:
    """Without a notice of a new file."""
    return TaskLedger(path, agent="bench", quiet=True)


def nothing(_: Task, __: object) -> None:
    """The handler of an empty task."""


def waits(_: Task, __: object) -> None:
    """The handler of a task that waits for a service."""
    time.sleep(WAIT)


HANDLERS = {"nothing": nothing, "waits": waits}


def prepare(path: Path, count: int) -> Path:
    """A file with so many tasks of nobody's."""
    tasks = open_tasks(str(path))
    tasks.add_tasks(Task(f"t{number}") for number in range(count))
    tasks.close()
    return path


def copy(path: Path, name: str) -> Path:
    """The same file once more; it is closed, so nothing of it is elsewhere."""
    return Path(shutil.copy(path, path.with_name(name)))


# ═══ The statements of a task ═════════════════════════════════════════════════════════


class Recorder:
    """Notes what the transactions of tasks do while it is on; what a worker says of itself is left out."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self._here = threading.local()
        self._do, self._write = SqliteBook.do, SqliteTaskStore.write

    def __enter__(self) -> list[Tape]:
        recorder = self

        def do(book: SqliteBook, sql: str, **values: Any) -> list[Any]:
            if (tape := getattr(recorder._here, "tape", None)) is not None:
                tape.append((sql, values))
            return recorder._do(book, sql, **values)

        def write(store: SqliteTaskStore, session: str, work: Callable[[Any], Any], **options: Any) -> Any:
            def noted(book: SqliteBook) -> Any:
                tape: Tape = []
                recorder._here.tape = tape
                try:
                    return work(book)
                finally:
                    recorder._here.tape = None
                    if any("task_events" in sql for sql, _ in tape):
                        recorder.tapes.append(tape)

            return recorder._write(store, session, noted, **options)

        SqliteBook.do = do  # type: ignore[method-assign, assignment]
        SqliteTaskStore.write = write  # type: ignore[method-assign, assignment]
        return self.tapes

    def __exit__(self, *exc: object) -> None:
        SqliteBook.do = self._do  # type: ignore[method-assign]
        SqliteTaskStore.write = self._write  # type: ignore[method-assign]


def recorded(path: Path) -> Path:
    """The transactions of all tasks of a file, claim and end of each in turn, in a file beside it."""
    with Recorder() as tapes:
        tasks = open_tasks(str(path))
        Worker(tasks, nothing, concurrency=1).run(until_idle=True)
        tasks.close()
    TABLE.expect("transactions of a task: claim and end", len(tapes) / TASKS, 2.0)
    target = path.with_suffix(".tape")
    target.write_bytes(pickle.dumps(tapes))
    return target


# ═══ Processes ════════════════════════════════════════════════════════════════════════


class Part(NamedTuple):
    """What one process does: its share of the tapes, or as a worker whatever it gets."""

    path: str
    handler: str
    tapes: str
    nth: int
    of: int


def do_ours(part: Part, go: Any, told: Any) -> None:
    """A worker until nothing is left."""
    tasks = open_tasks(part.path)
    tasks.counts()
    worker = Worker(tasks, HANDLERS[part.handler], concurrency=1, poll=0.02)
    told.put(0)
    go.wait()
    worker.run(until_idle=True)
    told.put(sum(info.done for info in tasks.workers() if info.agent == worker.agent))


def do_bare(part: Part, go: Any, told: Any) -> None:
    """Every `of`-th task's statements with nothing around them."""
    tapes: list[Tape] = pickle.loads(Path(part.tapes).read_bytes())  # noqa: S301 - written a moment ago
    pairs = [tapes[start : start + 2] for start in range(0, len(tapes), 2)][part.nth :: part.of]
    db = sqlite3.connect(part.path, timeout=60, isolation_level=None, cached_statements=500)
    db.execute("PRAGMA synchronous = FULL")
    told.put(0)
    go.wait()
    for claim, end in pairs:
        play(db, claim)
        if part.handler == "waits":
            time.sleep(WAIT)
        play(db, end)
    told.put(len(pairs))


def play(db: sqlite3.Connection, tape: Tape) -> None:
    """One transaction."""
    db.execute("BEGIN IMMEDIATE")
    for sql, values in tape:
        db.execute(sql, values).fetchall()
    db.execute("COMMIT")


def by(count: int, work: Callable[..., None], path: Path, handler: str, tapes: Path) -> float:
    """Seconds until so many processes have done all tasks of a file."""
    go, told = SPAWN.Event(), SPAWN.Queue()
    parts = [Part(str(path), handler, str(tapes), nth, count) for nth in range(count)]
    crew = [SPAWN.Process(target=work, args=(part, go, told)) for part in parts]
    for process in crew:
        process.start()
    for _ in crew:
        told.get(timeout=120)
    begun = time.perf_counter()
    go.set()
    done = sum(told.get(timeout=900) for _ in crew)
    seconds = time.perf_counter() - begun
    for process in crew:
        process.join()
    if done != TASKS:
        TABLE.expect(f"tasks done by {count} {work.__name__}", done, TASKS)
    return seconds


# ═══ Benches ══════════════════════════════════════════════════════════════════════════


def bench_overhead_and_scale(folder: Path) -> None:
    """Empty tasks end to end by one worker and by four, beside bare sqlite3."""
    fresh = prepare(folder / "fresh.db", TASKS)
    tapes = recorded(copy(fresh, "recorded.db"))
    spent: dict[tuple[str, int], float] = {}
    for count in (1, PROCESSES):
        for name, work in (("bare", do_bare), ("ours", do_ours)):
            spent[name, count] = by(count, work, copy(fresh, f"{name}-{count}.db"), "nothing", tapes)
    each = {key: seconds / TASKS * 1e6 for key, seconds in spent.items()}
    one, bare = each["ours", 1], each["bare", 1]
    TABLE.report("empty task: claim, run, end, one worker", one, "µs", floor=bare, ratio=one / bare, most=3)
    ours = spent["ours", 1] / spent["ours", PROCESSES]
    floor = spent["bare", 1] / spent["bare", PROCESSES]
    TABLE.report("… 4 worker processes, speed-up", ours, "×", floor=floor, ratio=ours / floor, least=0.8)


def bench_waiting(folder: Path) -> None:
    """Tasks that wait for a service are done beside each other."""
    fresh = prepare(folder / "waits.db", TASKS)
    tapes = folder / "recorded.tape"
    spent = {
        count: by(count, do_ours, copy(fresh, f"waits-{count}.db"), "waits", tapes)
        for count in (1, PROCESSES)
    }
    ratio = spent[1] / spent[PROCESSES]
    TABLE.report("tasks that wait 20 ms, 4 processes, speed-up", ratio, "×", ratio=ratio, least=2.5)


if __name__ == "__main__":
    sys.exit(TABLE.run(bench_overhead_and_scale, bench_waiting))
