"""Fork in every form: nothing is inherited that could lose a row or run a call twice."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard
from tests.actors import Stage

TOOL = """
import faulthandler
faulthandler.register(signal.SIGUSR1, chain=True)

def charge(order):
    effect(order)
    return order

def wait_for(child):
    until = time.monotonic() + 30
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            os.kill(child, signal.SIGUSR1)  # it tells on stderr where it hangs, and ends
            until += 30
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def in_child(work):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        guard.flush()
        os._exit(code)
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger with real processes around it."""
    with Stage(tmp_path) as made:
        yield made


def recorded(stage: Stage) -> Counter[str]:
    """How many successes the file has, by the only argument of their call."""
    with closing(sqlite3.connect(stage.db)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return Counter(str(row[0]) for row in db.execute("SELECT result FROM runs WHERE status = 'success'"))


@pytest.mark.parametrize("used", ["", "guard(charge, 0)", "guard.stats()"], ids=["unused", "written", "read"])
def test_parent_and_child_share_the_ledger(stage: Stage, used: str) -> None:
    """A guard works on both sides of a fork, before and after its first use, and runs each call once."""
    script = (
        TOOL
        + f"""
{used}
def work():
    for order in range(100):
        guard(charge, order)
children = [in_child(work) for _ in range(3)]
work()
for child in children:
    assert wait_for(child) == 0
"""
    )

    stage.start(script).ends_well()

    assert Counter(stage.effects()) == {str(order): 1 for order in range(100)}
    assert recorded(stage) == {str(order): 1 for order in range(100)}
    assert Guard(stage.db, quiet=True).stats()["attempts"] == 400 + used.startswith("guard(")


def test_fork_while_another_thread_writes(stage: Stage) -> None:
    """Children forked in the midst of another thread's writes work, and every side's rows stay."""
    script = (
        TOOL
        + """
guard(charge, -1)
stop = threading.Event()
written = []

def write():
    while not stop.is_set():
        guard(charge, len(written))
        written.append(1)
        time.sleep(0.002)

thread = threading.Thread(target=write, daemon=True)
thread.start()
for number in range(1, 26):
    def work():
        for order in range(5):
            guard(charge, number * 1_000_000 + order)
    assert wait_for(in_child(work)) == 0
stop.set()
thread.join()
say(len(written))
"""
    )
    actor = stage.start(script)
    written = int(actor.line())
    actor.ends_well()

    expected = [str(order) for order in range(-1, written)]
    expected += [str(number * 1_000_000 + order) for number in range(1, 26) for order in range(5)]
    assert recorded(stage) == Counter(expected)
    assert Counter(stage.effects()) == Counter(expected)


def test_fork_while_other_threads_read(stage: Stage) -> None:
    """Children forked in the midst of other threads' reads work, and lose no row."""
    script = (
        TOOL
        + """
guard(charge, 0)
stop = threading.Event()

def read():
    while not stop.is_set():
        guard(charge, 0)

threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for number in range(1, 16):
    def work():
        for order in range(5):
            guard(charge, number * 1_000_000 + order)
    assert wait_for(in_child(work)) == 0
stop.set()
for thread in threads:
    thread.join()
"""
    )

    stage.start(script).ends_well()

    expected = ["0", *(str(number * 1_000_000 + order) for number in range(1, 16) for order in range(5))]
    assert recorded(stage) == Counter(expected)


def test_a_child_that_returns_from_the_tool_does_not_end_its_run(stage: Stage) -> None:
    """The run of a tool that forks belongs to the parent: what the child returns is not recorded."""
    script = (
        TOOL
        + """
def split(order):
    effect("inside")
    child = os.fork()
    if child:
        assert wait_for(child) == 0
        return "from the parent"
    return "from the child"

me = os.getpid()
value = guard(split, 1)
if os.getpid() != me:
    os._exit(0 if value == "from the child" else 1)
say(value)
say(guard.history()[0]["result"])
"""
    )
    actor = stage.start(script)

    assert actor.line() == "from the parent"
    assert actor.line() == "from the parent"
    actor.ends_well()
    assert stage.effects() == ["inside"]
    [event] = [e for e in Guard(stage.db, quiet=True).events() if e["kind"] != "claimed"]
    assert event["kind"] == "success"


def test_a_child_that_fails_in_the_tool_does_not_end_its_run(stage: Stage) -> None:
    """A forked child that raises out of the tool leaves the parent's run alone."""
    script = (
        TOOL
        + """
def split(order):
    child = os.fork()
    if child:
        assert wait_for(child) == 0
        return "from the parent"
    raise ValueError("from the child")

me = os.getpid()
try:
    say(guard(split, 1))
except ValueError:
    os._exit(0 if os.getpid() != me else 1)
"""
    )
    actor = stage.start(script)

    assert actor.line() == "from the parent"
    actor.ends_well()
    assert [entry["status"] for entry in Guard(stage.db, quiet=True).history()] == ["success"]


def test_a_child_may_use_the_guard_inside_the_parents_tool(stage: Stage) -> None:
    """A child forked inside a tool finds the parent's call running and may run calls of its own."""
    script = (
        TOOL
        + """
def split(order):
    def work():
        assert guard.call(split, 1).kind == "blocked"
        assert guard.call(charge, 7).kind == "executed"
    assert wait_for(in_child(work)) == 0
    return "whole"

say(guard(split, 1))
"""
    )
    actor = stage.start(script)

    assert actor.line() == "whole"
    actor.ends_well()
    assert stage.effects() == ["7"]


def test_a_daemon_loses_nothing_when_its_parent_has_left(stage: Stage) -> None:
    """A child that outlives its parent keeps all its rows, although others open and close the file."""
    script = (
        TOOL
        + """
guard(charge, 0)
child = os.fork()
if child:
    os._exit(0)
os.setsid()
say("daemon")
for order in range(1, 256):
    guard(charge, order)
    if order % 50 == 0:
        say(order)
        hear()
guard.close()
say("written")
"""
    )
    daemon = stage.start(script)
    assert daemon.line() == "daemon"
    daemon.ends_well()

    for order in range(50, 251, 50):
        assert daemon.line() == str(order)
        other = Guard(stage.db, quiet=True)
        assert other.stats()["executed"] == order + 1
        other.check()
        other.close()
        daemon.tell("go on")

    assert daemon.line() == "written"
    assert recorded(stage) == {str(order): 1 for order in range(256)}


def test_a_child_renews_nothing_of_its_parent(stage: Stage) -> None:
    """A parent killed inside the tool is dead although its child lives, which renews nothing of it."""
    script = """
def charge(order):
    effect("charge", sys.argv[2])
    if sys.argv[2] == "second":
        return "paid"
    if os.fork() == 0:
        guard.stats()
        say("child", os.getpid())
        hear()
        os._exit(0)
    time.sleep(1000)

say(guard(charge, 1))
"""
    first = stage.start(script, "first")
    assert first.line().startswith("child")
    first.kill()

    second = stage.start(script, "second")

    assert second.line() == "paid"
    first.tell("end")
    assert stage.effects() == ["charge first", "charge second"]


@pytest.mark.parametrize("used", ["pass", "guard(charge, 0)"], ids=["unused", "used"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_run_each_call_once(stage: Stage, method: str, used: str) -> None:
    """Children of every start method get a guard, used before or not, and run each call once between them."""
    script = (
        TOOL
        + f"""
import multiprocessing

def work(guard):
    for order in range(50):
        guard(charge, order)

if __name__ == "__main__":
    {used}
    context = multiprocessing.get_context({method!r})
    children = [context.Process(target=work, args=(guard,)) for _ in range(3)]
    for child in children:
        child.start()
    work(guard)
    for child in children:
        child.join()
        assert child.exitcode == 0
"""
    )

    stage.start(script).ends_well()

    assert Counter(stage.effects()) == {str(order): 1 for order in range(50)}
    assert recorded(stage) == {str(order): 1 for order in range(50)}


@pytest.mark.parametrize("used", ["guard(charge, 0)", "guard.stats()"], ids=["written", "read"])
def test_a_fork_behind_pythons_back_is_refused(stage: Stage, used: str) -> None:
    """A child made by the C library's fork is refused with the reason, and the parent works on."""
    script = (
        TOOL
        + f"""
import ctypes
{used}
guard(charge, 1)
child = ctypes.PyDLL(None).fork()
if child == 0:
    for work in (lambda: guard(charge, 1), lambda: guard(charge, 2), lambda: guard.stats()):
        try:
            work()
            say("not refused")
        except StoreError as error:
            say("forked behind Python's back" in str(error))
    os._exit(0)
assert wait_for(child) == 0
guard(charge, 3)
"""
    )
    actor = stage.start(script)

    assert [actor.line() for _ in range(3)] == ["True"] * 3
    actor.ends_well()
    assert "2" not in stage.effects()
    assert stage.effects()[-1] == "3"


def test_a_fork_of_a_fork_works(stage: Stage) -> None:
    """Grandchildren work like children."""
    script = (
        TOOL
        + """
guard(charge, 0)
def work():
    guard(charge, 1)
    assert wait_for(in_child(lambda: guard(charge, 2))) == 0
    guard(charge, 3)
assert wait_for(in_child(work)) == 0
guard(charge, 4)
"""
    )

    stage.start(script).ends_well()

    assert recorded(stage) == {str(order): 1 for order in range(5)}


def test_an_executed_program_inherits_no_descriptor(stage: Stage) -> None:
    """A program started by a process that has the ledger open does not get the file's descriptors."""
    script = (
        TOOL
        + """
import subprocess
guard(charge, 0)
names = "os.listdir('/proc/self/fd')"
code = f"import os; print(*map(os.path.realpath, map('/proc/self/fd/'.__add__, {names})))"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, close_fds=False)
say(done.stdout)
"""
    )
    actor = stage.start(script)

    assert os.fspath(stage.db) not in actor.line()


@pytest.mark.slow
def test_fork_while_another_thread_makes_its_first_call(stage: Stage) -> None:
    """A child forked while another thread uses the guard for the first time works."""
    script = (
        TOOL
        + """
delay = float(sys.argv[2])
thread = threading.Thread(target=guard, args=(charge, 0))
thread.start()
limit = time.perf_counter() + delay
while time.perf_counter() < limit:
    pass
child = in_child(lambda: [guard(charge, order) for order in range(1, 4)])
thread.join()
assert wait_for(child) == 0, f"the child that was forked after {delay} s"
"""
    )
    delays = [0.0, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03]

    for delay in delays:
        actor = stage.start(script, delay)
        actor.ends_well()
        assert actor.errors() == ""
        assert recorded(stage) == {str(order): 1 for order in range(4)}
        Guard(stage.db, quiet=True).reset()


def test_a_first_call_brings_no_lock_into_a_fork(stage: Stage) -> None:
    """What a first call loads has no hook for forks: a lock would be held while the load is waited for."""
    script = (
        TOOL
        + """
brought = []
os.register_at_fork = lambda **hooks: brought.append(hooks)
guard(charge, "été")
say(brought)
"""
    )

    assert stage.start(script).line() == "[]"


def slow_driver(folder: Path, loads: str) -> Path:
    """A folder with a driver for redis:// that says when it is loaded, and goes on as `loads` says."""
    folder.mkdir()
    text = f"from __main__ import *\nloading.set()\n{loads}\nraise ImportError('done', name='redis')\n"
    (folder / "redis.py").write_text(text)
    return folder


LOAD = """
def load():
    try:
        Guard("redis://127.0.0.1:1/0", quiet=True).check()
    except TypeError:  # a driver that cannot be loaded
        pass

sys.path.insert(0, sys.argv[2])
loading = threading.Event()
thread = threading.Thread(target=load)
"""


def test_fork_while_a_driver_is_loaded(stage: Stage) -> None:
    """A fork waits for a thread that loads a driver before it takes a lock that the driver asks for."""
    script = (
        TOOL
        + LOAD
        + """
forking = threading.Event()
os.register_at_fork(before=forking.set)
import logging  # its hook comes before the one above, and takes the lock of getLogger
thread.start()
loading.wait()
child = in_child(lambda: guard(charge, 1))
thread.join()
assert wait_for(child) == 0
"""
    )
    driver = slow_driver(stage.folder / "driver", "forking.wait(1)\nlogging.getLogger('redis')")
    actor = stage.start(script, driver)

    actor.ends_well()
    assert actor.errors() == ""
    assert recorded(stage) == {"1": 1}


def test_fork_while_the_tasks_are_opened(stage: Stage) -> None:
    """A child forked while another thread uses a task ledger for the first time can use it."""
    script = (
        TOOL
        + """
from ledger_tasks import TaskLedger

loading, forking = threading.Event(), threading.Event()
os.register_at_fork(before=forking.set)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ledger_tasks.sqlite":
            loading.set()
            forking.wait()

sys.meta_path.insert(0, Finder())
tasks = TaskLedger(DB)
thread = threading.Thread(target=tasks.add_task, args=("of the parent",))
thread.start()
loading.wait()
child = in_child(lambda: tasks.add_task("of the child"))
thread.join()
assert wait_for(child) == 0
say(sorted(task.id for task in tasks.tasks()))
"""
    )
    actor = stage.start(script)

    assert actor.line() == "['of the child', 'of the parent']"
    actor.ends_well()


@pytest.mark.slow
def test_a_child_of_a_fork_that_waited_in_vain_is_refused(stage: Stage) -> None:
    """A fork waits only for so long for what another thread loads; its child is then refused."""
    script = (
        TOOL
        + LOAD
        + """
forked = threading.Event()
thread.start()
loading.wait()

def work():
    try:
        guard(charge, 1)
    except StoreError as error:
        say(error)

child = in_child(work)
forked.set()
assert wait_for(child) == 0
thread.join()
guard(charge, 2)
"""
    )
    actor = stage.start(script, slow_driver(stage.folder / "driver", "forked.wait()"))

    told = actor.line()
    assert "forked while another thread" in told
    assert "nothing ran" in told
    assert "before you fork" in told
    actor.ends_well()
    assert stage.effects() == ["2"]


@pytest.mark.slow
def test_fork_while_a_store_of_six_methods_does_not_answer(stage: Stage) -> None:
    """A child counts its own attempts, and only those, when a thread of its parent hangs in `put`."""
    script = (
        TOOL
        + """
from tests.stores.kit import SixMethodStore

putting, forked, parent = threading.Event(), threading.Event(), os.getpid()

class Slow(SixMethodStore):
    def put(self, record):
        if os.getpid() == parent:
            putting.set()
            forked.wait()
        super().put(record)

store = Slow()
guard = Guard(store=store, quiet=True)
guard(charge, 1)
thread = threading.Thread(target=guard, args=(charge, 1))
thread.start()
putting.wait()

def work():
    guard(charge, 1)
    assert [record.attempts for record in store.records.values() if "~n~" in record.id] == [1]

child = in_child(work)
forked.set()
thread.join()
assert wait_for(child) == 0
"""
    )
    actor = stage.start(script)

    actor.ends_well()
    assert stage.effects() == ["1"]


def test_fork_while_a_thread_waits_for_another_process(stage: Stage) -> None:
    """A fork does not wait for another process's lock; afterwards both sides get theirs written."""
    script = (
        TOOL
        + """
guard(charge, 0)
say("opened")
hear()
thread = threading.Thread(target=guard, args=(charge, 1))
thread.start()
time.sleep(0.2)
child = in_child(lambda: guard(charge, 2))
say("forked")
thread.join()
assert wait_for(child) == 0
guard(charge, 3)
"""
    )
    actor = stage.start(script)
    assert actor.line() == "opened"
    with closing(sqlite3.connect(stage.db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        actor.tell("go on")

        assert actor.line() == "forked"  # while the lock is still held
        assert recorded(stage) == {"0": 1}
        holder.execute("COMMIT")
    actor.ends_well()

    assert recorded(stage) == {str(order): 1 for order in range(4)}


def test_fork_in_the_middle_of_a_listing(stage: Stage) -> None:
    """A listing that was begun before a fork goes on in the parent, and the child's rows stay."""
    script = (
        TOOL
        + """
for order in range(20):
    guard(charge, order)
events = guard.events()
next(iter(events))
assert wait_for(in_child(lambda: [guard(charge, order) for order in range(20, 40)])) == 0
rest = sum(1 for event in events)
say(rest >= 39, len(guard.history()))
"""
    )
    actor = stage.start(script)

    assert actor.line() == "True 40"
    actor.ends_well()
    assert recorded(stage) == {str(order): 1 for order in range(40)}


def test_fork_inside_tools_of_many_threads(stage: Stage) -> None:
    """Four threads that each fork inside a running tool end their own runs, and the children run theirs."""
    script = (
        TOOL
        + """
def split(order):
    def work():
        assert guard.call(split, order).kind == "blocked"
        assert guard(charge, 1000 + order) == 1000 + order
    return order if wait_for(in_child(work)) == 0 else "the child failed"

threads = [
    threading.Thread(target=lambda first: [guard(split, first + n) for n in range(5)], args=(10 * t,))
    for t in range(4)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    )

    stage.start(script).ends_well()

    orders = [10 * thread + n for thread in range(4) for n in range(5)]
    assert Counter(str(order) for first in orders for order in (first, 1000 + first)) == recorded(stage)
    assert Counter(str(1000 + order) for order in orders) == Counter(stage.effects())


def test_fork_beside_a_running_loop(stage: Stage) -> None:
    """A child forked between the tasks of an event loop works, and the loop's own claims go on."""
    script = (
        TOOL
        + """
import asyncio

async def send(order):
    effect(order)
    await asyncio.sleep(0)
    return order

async def main():
    for first in range(0, 50, 10):
        tasks = [asyncio.create_task(guard(send, first + n)) for n in range(10)]
        await asyncio.sleep(0.001)
        child = in_child(lambda: [guard(charge, 1000 + first + n) for n in range(3)])
        await asyncio.gather(*tasks)
        assert await asyncio.to_thread(wait_for, child) == 0

asyncio.run(main())
"""
    )

    stage.start(script).ends_well()

    orders = [*range(50), *(1000 + first + n for first in range(0, 50, 10) for n in range(3))]
    assert Counter(map(str, orders)) == recorded(stage)
    assert Counter(map(str, orders)) == Counter(stage.effects())


def test_a_fork_behind_pythons_back_says_what_to_do(stage: Stage) -> None:
    """The refusal names the file, says that nothing ran, and what to use instead; the file stays sound."""
    script = (
        TOOL
        + """
import asyncio, ctypes

async def send(order):
    effect(order)

guard(charge, 0)
child = ctypes.PyDLL(None).fork()
if child == 0:
    for work in (lambda: guard(charge, 1), lambda: asyncio.run(guard(send, 2))):
        try:
            work()
            say("not refused")
        except StoreError as error:
            say(error)
    os._exit(0)
assert wait_for(child) == 0
for order in range(3, 20):
    guard(charge, order)
"""
    )
    actor = stage.start(script)

    for _ in range(2):
        told = actor.line()
        assert os.fspath(stage.db) in told
        assert "nothing ran" in told
        assert "os.fork or multiprocessing" in told
    actor.ends_well()
    expected = {str(order): 1 for order in (0, *range(3, 20))}
    assert expected == Counter(stage.effects())
    assert expected == recorded(stage)


def test_a_child_has_a_copy_of_what_is_in_memory(stage: Stage) -> None:
    """A memory store goes on in both sides, each for itself."""
    script = (
        TOOL
        + """
from ledger import MemoryStore
guard = Guard(store=MemoryStore(), quiet=True)
guard(charge, 1)
def work():
    assert guard(charge, 1) is None
    guard(charge, 2)
    assert guard.stats()["executed"] == 2
assert wait_for(in_child(work)) == 0
guard(charge, 2)
assert guard.stats()["executed"] == 2
"""
    )

    stage.start(script).ends_well()

    assert ["1", "2", "2"] == stage.effects()
