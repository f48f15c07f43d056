"""Group commit: many callers share a transaction, and each gets its own answer, whatever befalls another."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
import sqlite3
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, LedgerError
from ledger_tasks import DuplicateTask, TaskLedger
from tests.actors import PATIENCE, Stage, eventually

WAIT = 0.3  # for callers to stand in line behind a lock; no result depends on it


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger with real processes around it."""
    with Stage(tmp_path) as made:
        yield made


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the ledger of the test lies."""
    return tmp_path / "ledger.db"


@pytest.fixture
def guard(db: Path) -> Iterator[Guard]:
    """A guard on a file that exists."""
    made = Guard(db, quiet=True)
    made.check()
    yield made
    made.close()


@contextmanager
def write_lock(db: Path) -> Iterator[None]:
    """Keep every writer of the ledger in line for the length of a block."""
    holder = sqlite3.connect(db, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        holder.execute("COMMIT")
        holder.close()


class Callers:
    """Threads that each do one thing; what came of it, by number."""

    def __init__(self, *works: Callable[[], object]) -> None:
        self.answers: dict[int, object] = {}
        self._threads = [
            threading.Thread(target=self._do, args=(number, work), daemon=True)
            for number, work in enumerate(works)
        ]
        for thread in self._threads:
            thread.start()

    def _do(self, number: int, work: Callable[[], object]) -> None:
        try:
            self.answers[number] = work()
        except BaseException as error:  # noqa: BLE001  # it is the answer
            self.answers[number] = error

    def finish(self) -> dict[int, object]:
        """The answers, when all have one."""
        limit = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        assert [] == [n for n, thread in enumerate(self._threads) if thread.is_alive()]
        return self.answers


def commits(db: Path) -> int:
    """How many transactions the write-ahead log holds, by SQLite's description of its format."""
    log = Path(f"{db}-wal").read_bytes()
    page, salt = struct.unpack(">I", log[8:12])[0], log[16:24]
    frames = [log[at : at + 24] for at in range(32, len(log) - page - 23, page + 24)]
    return sum(frame[8:16] == salt and frame[4:8] != bytes(4) for frame in frames)


def statuses(guard: Guard) -> Counter[str]:
    """How many runs stand how."""
    return Counter(run["status"] for call in guard.history() for run in call["runs"])


def test_callers_that_wait_share_a_transaction(guard: Guard, db: Path) -> None:
    """Sixteen claims that wait for the same lock are committed together, not one by one."""
    inside, go_on = threading.Semaphore(0), threading.Event()

    def charge(order: int) -> int:
        inside.release()
        go_on.wait(PATIENCE)
        return order

    with write_lock(db):
        callers = Callers(*[lambda order=order: guard(charge, order) for order in range(16)])
        time.sleep(WAIT)
        before = commits(db)
    for _ in range(16):
        assert inside.acquire(timeout=PATIENCE)
    after = commits(db)
    go_on.set()

    assert {order: order for order in range(16)} == callers.finish()
    assert after - before <= 4  # one, as a rule; a caller that came late may have its own


def test_nobody_enters_before_the_group_is_committed(guard: Guard, db: Path) -> None:
    """Whoever is inside a tool finds its own run, and that of all others inside, on disk for everybody."""
    seen: list[tuple[int, set[int]]] = []

    def charge(order: int) -> None:
        other = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
        rows = other.execute("SELECT args FROM runs WHERE status IN ('running', 'success')").fetchall()
        other.close()
        seen.append((order, {int("".join(filter(str.isdigit, row[0]))) for row in rows}))

    with write_lock(db):
        callers = Callers(*[lambda order=order: guard(charge, order) for order in range(8)])
        time.sleep(WAIT)
    callers.finish()

    assert list(range(8)) == sorted(order for order, _ in seen)
    assert [] == [order for order, on_disk in seen if order not in on_disk]


def poison(guard: Guard, kind: str) -> Callable[[Callable[[Any], object]], object]:
    """A call that holds what SQLite cannot take, at one of the places where a user can put it."""
    if kind == "workflow":
        return lambda tool: guard.workflow("w\ud800")(tool, -1)
    if kind == "caller":

        def as_caller(tool: Callable[[Any], object]) -> object:
            with guard.as_caller("c\ud800"):
                return guard(tool, -1)

        return as_caller
    if kind == "key":
        return lambda tool: guard(tool, -1, key="k\ud800")
    values: dict[str, object] = {
        "surrogate": "s\ud800",
        "huge int": 10**400,
        "int beyond 64 bits": 2**63,
        "nul": "a\0b",
        "in a dict": {"\udfff": [2**64]},
    }
    return lambda tool: guard(tool, values[kind])


@pytest.mark.parametrize(
    "kind", ["surrogate", "huge int", "int beyond 64 bits", "nul", "in a dict", "workflow", "caller", "key"]
)
def test_what_sqlite_cannot_bind_takes_no_neighbour_along(guard: Guard, db: Path, kind: str) -> None:
    """A call that SQLite cannot take runs or is refused by itself; its neighbours in the group all run."""
    ran: list[object] = []

    def charge(order: object) -> object:
        ran.append(order)
        return 7

    guard.policy(charge, timeout=300)
    bad = poison(guard, kind)
    works: list[Callable[[], object]] = [functools.partial(guard, charge, order) for order in range(12)]
    works.insert(6, functools.partial(bad, charge))

    with write_lock(db):
        callers = Callers(*works)
        time.sleep(WAIT)
    answers = callers.finish()

    answer = answers.pop(6)
    assert [7] * 12 == list(answers.values())
    assert list(range(12)) == sorted(order for order in ran if isinstance(order, int) and 0 <= order < 12)
    refused = isinstance(answer, LedgerError | UnicodeError | OverflowError | ValueError)
    assert refused or answer == 7
    assert len(ran) == (12 if refused else 13)
    assert {"success": len(ran)} == statuses(guard)


@pytest.mark.parametrize("word", ["\ud800", "a\0b", "\U0010ffff"])
def test_an_error_text_that_sqlite_cannot_bind_is_still_a_failure(guard: Guard, db: Path, word: str) -> None:
    """A tool whose error says what SQLite cannot take fails with that error, and so it is recorded."""

    def charge(order: int) -> int:
        if order == 3:
            raise ValueError(word)
        return order

    with write_lock(db):
        callers = Callers(*[lambda order=order: guard(charge, order) for order in range(6)])
        time.sleep(WAIT)
    answers = callers.finish()

    error = answers.pop(3)
    assert isinstance(error, ValueError)
    assert (word,) == error.args
    assert {0: 0, 1: 1, 2: 2, 4: 4, 5: 5} == answers
    eventually(lambda: statuses(guard) == {"success": 5, "failed": 1})


def test_a_result_that_sqlite_cannot_bind_is_still_a_success(guard: Guard) -> None:
    """A tool that returned what SQLite cannot take has succeeded, and is not run again for that."""
    ran: list[int] = []

    def charge(order: int) -> object:
        ran.append(order)
        return {"text": "\ud800", "number": 10**400}

    first = guard(charge, 1)

    assert {"text": "\ud800", "number": 10**400} == first
    assert "blocked" == guard.call(charge, 1).kind
    assert [1] == ran
    assert {"success": 1} == statuses(guard)


def test_a_refusal_for_what_a_neighbour_wrote_is_told_after_it_is_committed(db: Path) -> None:
    """Of two that add the same task in one group, who hears that it is there already finds it there."""
    tasks = TaskLedger(db, quiet=True)
    tasks.add_task("first")
    found = []

    def add() -> None:
        try:
            tasks.add_task("same")
        except DuplicateTask:
            found.append(tasks.get("same").id)

    adding = [threading.Thread(target=add) for _ in range(4)]
    with write_lock(db):
        for thread in adding:
            thread.start()
        time.sleep(WAIT)
    for thread in adding:
        thread.join(PATIENCE)

    assert ["same"] * 3 == found
    tasks.close()


def test_each_of_many_threads_gets_its_own_answer(guard: Guard) -> None:
    """Thirty-two threads at once get, call by call, their own result, error or replay, and no other's."""
    rounds, orders = 12, 32
    ran: Counter[int] = Counter()
    lock = threading.Lock()

    def charge(order: int) -> int:
        with lock:
            ran[order] += 1
        if order % 5 == 0:
            raise ValueError(order)
        return order * 10

    guard.policy(charge, replay=True)

    def work(number: int) -> list[object]:
        mine: list[object] = []
        for step in range(rounds):
            order = (number + step) % orders + 100 * (number % 2)
            try:
                mine.append(guard(charge, order) == order * 10)
            except ValueError as error:
                mine.append(error.args == (order,))
        return mine

    answers = Callers(*[lambda number=number: work(number) for number in range(32)]).finish()

    assert {number: [True] * rounds for number in range(32)} == answers
    assert set() == {order for order, times in ran.items() if order % 5 and times > 1}
    assert statuses(guard)["success"] == sum(order % 5 != 0 for order in ran)
    assert statuses(guard)["failed"] == sum(times for order, times in ran.items() if order % 5 == 0)
    assert 0 == statuses(guard)["running"]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes without coverage: Ctrl-C in its tracer leaves its own lock taken."""
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)


INTERRUPTED = """
def charge(order):
    effect(order)
    return order

stop = threading.Event()
done = [0] * 6
wrong = []

def work(number):
    while not stop.is_set():
        order = number * 1_000_000 + done[number]
        try:
            if guard(charge, order) != order:
                wrong.append(order)
        except BaseException as error:
            wrong.append(error)
        done[number] += 1

guard(charge, -1)
threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
for thread in threads:
    thread.start()
order = 10_000_000
for _ in range(int(sys.argv[2])):
    try:
        say("ready")
        while True:
            order += 1
            guard(charge, order)
    except KeyboardInterrupt:
        pass
    say("interrupted")
    before = list(done)
    limit = time.monotonic() + 20
    while any(now == then for now, then in zip(done, before)):
        if time.monotonic() > limit:
            say("stuck", done, before)
            os._exit(3)
        time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join()
assert not wrong, wrong
guard.close()
say(*done)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_ctrl_c_while_committing_for_others_loses_nobody(stage: Stage) -> None:
    """A real SIGINT in the main thread, at any moment of its commits for others, ends its call alone."""
    times = 150
    dice = random.Random(7)
    actor = stage.start(INTERRUPTED, times)

    for _ in range(times):
        assert "ready" == actor.line()
        time.sleep(dice.uniform(0.0, 0.02))
        actor.send(signal.SIGINT)
        assert "interrupted" == actor.line()
    done = [int(number) for number in actor.line().split()]
    actor.ends_well()

    effects = Counter(map(int, stage.effects()))
    expected = {number * 1_000_000 + step for number, count in enumerate(done) for step in range(count)}
    assert set() == expected - effects.keys()
    assert 1 == max(effects.values())
    looker = Guard(stage.db, quiet=True)
    found = statuses(looker)
    assert 0 == found["running"]
    assert found["success"] >= len(expected) + 1


# Python looks for signals where a function begins, after a call and when it jumps back: at each of
# these places in turn the caller is interrupted, and then somebody else wants an answer.
ANYWHERE = """
import dis

PLACES = {"RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}
guard = Guard(DB, quiet=True)

def charge(order):
    return order

class Interrupt:
    def __init__(self, moment):
        self.left, self.where = moment, ""

    def __call__(self, frame, event, arg):
        if self.where or not frame.f_code.co_filename.endswith("ledger.py"):
            return None
        frame.f_trace_opcodes = True
        before = None

        def step(frame, event, arg):
            nonlocal before
            if event == "opcode" and not self.where:
                self.left -= before in PLACES
                if self.left == 0:
                    self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                    raise KeyboardInterrupt
                before = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            return step

        return step

def within(seconds, work, *args):
    answers = []
    def run():
        try:
            answers.append(work(*args))
        except BaseException as error:
            answers.append(error)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers

def interrupted(interrupt, order):
    sys.settrace(interrupt)
    try:
        return guard(charge, order)
    finally:
        sys.settrace(None)

guard(charge, -1)
guard(charge, -1)
moment = 0
while True:
    moment += 1
    interrupt = Interrupt(moment)
    mine = within(10, interrupted, interrupt, moment)
    if not interrupt.where:
        break
    others = within(10, guard, charge, 1_000_000 + moment)
    if not mine or others != [1_000_000 + moment]:
        say(interrupt.where, *(mine or ["hangs itself"]), *(others or ["and so does the next"]))
        guard = Guard(DB + str(moment), quiet=True)  # the process has one store for a file
        guard(charge, -1)
        guard(charge, -1)
say("all", moment)
os._exit(0)  # whoever hangs would keep it
"""


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_ctrl_c_anywhere_leaves_the_others_their_answer(stage: Stage) -> None:
    """Wherever in the guard Ctrl-C meets a caller, the next call of another thread is answered and runs."""
    actor = stage.start(ANYWHERE)
    told = [actor.line()]
    while not told[-1].startswith("all ") and len(told) < 3:
        told.append(actor.line())

    assert [] == told[:-1]
    assert int(told[-1].split()[1]) > 100
    actor.ends_well()


@pytest.mark.parametrize("replay", [False, True])
def test_tasks_and_threads_share_one_guard(guard: Guard, replay: bool) -> None:
    """Async tasks and threads that make the same and distinct calls at once run each of them once."""
    shared, own = 20, 60
    ran: Counter[str] = Counter()
    lock = threading.Lock()

    def note(order: str) -> str:
        with lock:
            ran[order] += 1
        return order

    def charge(order: str) -> str:
        return note(order)

    async def send(order: str) -> str:
        note(order)
        await asyncio.sleep(0)
        return order

    guard.policy(charge, replay=replay)
    guard.policy(send, replay=replay)

    def work(number: int) -> list[str | None]:
        orders = [f"sync {order}" for order in range(shared)] + [f"thread {number}.{n}" for n in range(5)]
        return [guard(charge, order) for order in orders]

    async def tasks() -> list[str | None]:
        async def sync_tool(order: str) -> str | None:
            return await asyncio.to_thread(guard, charge, order)

        works: list[Awaitable[str | None]] = [guard(send, f"task {number}") for number in range(own)]
        works += [guard(send, f"async {number % shared}") for number in range(own)]
        works += [sync_tool(f"sync {number % shared}") for number in range(own)]
        return await asyncio.gather(*works)

    callers = Callers(
        *[lambda number=number: work(number) for number in range(6)], *[lambda: asyncio.run(tasks())] * 1
    )
    answers = callers.finish()

    expected = {f"{kind} {order}" for kind in ("sync", "async") for order in range(shared)}
    expected |= {f"thread {number}.{n}" for number in range(6) for n in range(5)}
    expected |= {f"task {number}" for number in range(own)}
    assert dict.fromkeys(expected, 1) == ran
    assert {"success": len(expected)} == statuses(guard)
    from_tasks = answers.pop(6)
    assert isinstance(from_tasks, list)
    assert [f"task {number}" for number in range(own)] == from_tasks[:own]
    if replay:
        assert [f"async {number % shared}" for number in range(own)] == from_tasks[own : 2 * own]
        assert [f"sync {number % shared}" for number in range(own)] == from_tasks[2 * own :]


def test_cancelled_claims_leave_nothing_running_and_their_neighbours_alone(guard: Guard, db: Path) -> None:
    """Of sixty tasks in one group the cancelled ones enter nothing or are in doubt; the others all run."""
    dice = random.Random(3)
    ran: Counter[int] = Counter()

    async def send(order: int) -> int:
        ran[order] += 1
        await asyncio.sleep(0)
        return order

    async def once(order: int) -> int | None:
        return await guard(send, order)

    async def main() -> tuple[set[int], list[object]]:
        tasks = [asyncio.create_task(once(order)) for order in range(60)]
        with write_lock(db):
            await asyncio.sleep(WAIT)
            early = set(dice.sample(range(60), 15))
            for order in early:
                tasks[order].cancel()
        late = set(dice.sample(sorted(set(range(60)) - early), 15))
        for order in late:
            await asyncio.sleep(dice.uniform(0, 0.002))
            tasks[order].cancel()
        return early | late, list(await asyncio.gather(*tasks, return_exceptions=True))

    cancelled, answers = asyncio.run(main())

    others = {order: order for order in range(60) if order not in cancelled}
    assert others == {order: answers[order] for order in others}
    assert 1 == max(ran.values())
    eventually(lambda: statuses(guard)["running"] == 0)
    done = {call["result"] for call in guard.history() if call["status"] == "success"}  # its end came first
    again = [asyncio.run(once(order)) for order in sorted(cancelled)]
    assert [None if order in done else order for order in sorted(cancelled)] == again
    assert dict.fromkeys(others, 1) == {order: ran[order] for order in others}
    assert 0 == statuses(guard)["running"]


# What a full disk does to a group: whatever the answer is, it is true. A call that was refused has
# not run and has no run on file; a call that was answered has run once and is on file.
FULL = """
import resource

guard.check()
ran = []
lock = threading.Lock()

def charge(order, text):
    with lock:
        ran.append(order)
    return order

holder = __import__("sqlite3").connect(DB, isolation_level=None, check_same_thread=False)
holder.execute("BEGIN IMMEDIATE")
answers = {}

def work(order):
    try:
        answers[order] = guard(charge, order, "x" * (50_000 if order else SIZE_OF_FIRST))
    except StoreError as error:
        answers[order] = str(error)
    except BaseException as error:
        answers[order] = repr(error)

threads = [threading.Thread(target=work, args=(order,)) for order in range(12)]
for thread in threads:
    thread.start()
    time.sleep(0.03)
no_room()
holder.execute("COMMIT")
holder.close()
for thread in threads:
    thread.join(50)
stuck = [order for order in range(12) if order not in answers]
room()
for order in range(12):
    if answers[order] == order:
        say(order, "ran", ran.count(order))
    else:
        assert DB in answers[order], answers[order]
        say(order, "refused", ran.count(order))
say("stuck", stuck)
guard(charge, 99, "afterwards")
kinds = [guard.call(charge, order, "x" * (50_000 if order else SIZE_OF_FIRST)).kind for order in range(12)]
say(*kinds)
say(*(run["status"] for call in guard.history() for run in call["runs"]))
guard.close()
"""

LIMIT = """
def no_room():
    limit = max(os.path.getsize(DB), os.path.getsize(DB + "-wal")) + ROOM
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

def room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""

FILLER = """
def no_room():
    with open(DB + ".filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        if ROOM:
            file.truncate(max(0, file.tell() - ROOM))

def room():
    os.unlink(DB + ".filler")
"""


def assert_honest(stage: Stage, script: str) -> Counter[str]:
    """Every member of the group was told the truth; how many were told what."""
    actor = stage.start(script)
    told = [actor.line().split() for _ in range(12)]
    assert "stuck []" == actor.line()
    kinds = actor.line().split()
    statuses = Counter(actor.line().split())
    actor.ends_well()

    for (_, answer, times), kind in zip(told, kinds, strict=True):
        assert {"ran": ("1", "blocked"), "refused": ("0", "executed")}[answer] == (times, kind)
    assert 0 == statuses["running"]
    assert 13 == statuses["success"]
    return Counter(answer for _, answer, _ in told)


@pytest.mark.parametrize(
    ("room", "first"), [(0, 50_000), (20_000, 50_000), (20_000, 3_000_000)], ids=["none", "some", "one big"]
)
def test_a_file_that_may_not_grow_answers_the_group_honestly(stage: Stage, room: int, first: int) -> None:
    """When the file reaches its size limit in the middle of a group, nobody who was refused has run."""
    told = assert_honest(stage, f"ROOM, SIZE_OF_FIRST = {room}, {first}\n" + LIMIT + FULL)

    assert told["refused"] >= 1


@pytest.mark.parametrize(
    ("room", "first"), [(0, 50_000), (20_000, 50_000), (20_000, 3_000_000)], ids=["none", "some", "one big"]
)
def test_a_disk_that_fills_up_answers_the_group_honestly(tmp_path: Path, room: int, first: int) -> None:
    """When the disk fills up in the middle of a group, nobody who was refused has run, or is on file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    try:
        if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("mounting is not allowed here")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    try:
        with Stage(tmp_path) as stage:
            stage.db = disk / "ledger.db"
            assert_honest(stage, f"ROOM, SIZE_OF_FIRST = {room}, {first}\n" + FILLER + FULL)
    finally:
        subprocess.run(["umount", disk], check=True)  # noqa: S607


FULL_AT_THE_END = """
import resource, sqlite3

inside, go_on = threading.Semaphore(0), threading.Event()
ran = []

def charge(order):
    ran.append(order)
    inside.release()
    go_on.wait(50)
    return "x" * (3_000_000 if order == 0 else 20_000)

answers = {}

def work(order):
    try:
        answers[order] = len(guard(charge, order))
    except BaseException as error:
        answers[order] = repr(error)

guard.check()
threads = [threading.Thread(target=work, args=(order,)) for order in range(12)]
for thread in threads:
    thread.start()
for _ in threads:
    inside.acquire(timeout=50)
no_room()
go_on.set()
for thread in threads:
    thread.join(50)
say(*(answers.get(order) for order in range(12)))
room()
limit = time.monotonic() + 50
while guard.stats()["executed"] < 12 and time.monotonic() < limit:
    time.sleep(0.01)
say(*(guard.call(charge, order).kind for order in range(12)))
say(len(ran), *(run["status"] for call in guard.history() for run in call["runs"]))
guard.close()
"""


def test_outcomes_that_find_no_room_are_kept_until_there_is_some(stage: Stage) -> None:
    """When a group of outcomes cannot be written, every caller has its result, and none runs twice."""
    actor = stage.start("ROOM = 0\n" + LIMIT + FULL_AT_THE_END)

    assert ["3000000"] + ["20000"] * 11 == actor.line().split()
    assert ["blocked"] * 12 == actor.line().split()
    assert ["12"] + ["success"] * 12 == actor.line().split()
    actor.ends_well()
