"""Owners that die, freeze, dawdle or fail, in real processes: who may run the call next."""

from __future__ import annotations

import platform
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledger import Guard, InDoubt
from tests.actors import Actor, Stage, eventually

CHARGE = """
def charge(order):
    effect("charge", order, sys.argv[2])
    say("inside")
    return hear()
"""
CALL = "say(guard.call(charge, 1).value)\n"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger with real processes around it."""
    with Stage(tmp_path) as made:
        yield made


def killed_inside(stage: Stage, script: str, name: str) -> Actor:
    """A process that makes this call, and is killed when it is in the midst of the tool."""
    victim = stage.start(script, name)
    assert victim.line() == "inside"
    victim.kill()
    return victim


def runs(stage: Stage) -> list[dict[str, object]]:
    """The runs of the only call in the ledger."""
    looker = Guard(stage.db, quiet=True)
    [entry] = looker.history()
    looker.close()
    found: list[dict[str, object]] = entry["runs"]
    return found


def test_killed_inside_the_tool_the_next_call_takes_over_at_once(stage: Stage) -> None:
    """A call whose process was killed inside the tool runs again long before its lease of 300 s."""
    killed_inside(stage, CHARGE + CALL, "first")

    second = stage.start(CHARGE + CALL, "second")
    assert second.line() == "inside"
    second.tell("paid")

    assert second.line() == "paid"
    assert stage.effects() == ["charge 1 first", "charge 1 second"]
    assert [run["status"] for run in runs(stage)] == ["doubt", "success"]


def test_killed_inside_an_irreversible_tool_leaves_it_in_doubt(stage: Stage) -> None:
    """After a kill inside an irreversible tool nobody runs it again until somebody has resolved it."""
    policy = "guard.policy(charge, irreversible=True)\n"
    killed_inside(stage, CHARGE + policy + CALL, "first")

    script = """
for _ in range(2):
    try:
        guard(charge, 1)
    except InDoubt as error:
        say("in doubt", error.record.in_doubt)
guard.resolve(charge, 1, result="paid")
say(guard(charge, 1))
"""
    second = stage.start(CHARGE + policy + script, "second")

    assert [second.line() for _ in range(3)] == ["in doubt True", "in doubt True", "None"]
    second.ends_well()
    assert stage.effects() == ["charge 1 first"]


def test_a_doubt_that_was_not_done_runs_again(stage: Stage) -> None:
    """An irreversible call in doubt that is resolved as not done runs once more, in any process."""
    policy = "guard.policy(charge, irreversible=True)\n"
    killed_inside(stage, CHARGE + policy + CALL, "first")

    second = stage.start(CHARGE + policy + "guard.resolve(charge, 1, done=False)\n" + CALL, "second")
    assert second.line() == "inside"
    second.tell("paid")

    assert second.line() == "paid"
    assert stage.effects() == ["charge 1 first", "charge 1 second"]


def test_a_process_that_nobody_reaped_is_dead(stage: Stage) -> None:
    """A killed process whose parent has not reaped it counts as dead, although its pid answers signals."""
    first = stage.start(CHARGE + CALL, "first")
    assert first.line() == "inside"
    first.send(signal.SIGKILL)
    eventually(lambda: first.state() == "Z")

    second = stage.start(CHARGE + CALL, "second")
    assert second.line() == "inside"
    second.tell("paid")

    assert second.line() == "paid"
    assert first.state() == "Z"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="needs a system call by number")
def test_a_zombie_whose_threads_still_work_is_alive(stage: Stage) -> None:
    """A process whose main thread has ended keeps its run while another thread is inside the tool."""
    number = {"x86_64": 60, "aarch64": 93}[platform.machine()]
    script = f"""
import ctypes
threading.Thread(target=lambda: guard(charge, 1)).start()
hear_first.wait()
ctypes.CDLL(None).syscall({number}, 0)
"""
    tool = """
hear_first = threading.Event()

def charge(order):
    effect("charge", order, sys.argv[2])
    hear_first.set()
    time.sleep(0.2)
    say("inside")
    time.sleep(1000)
"""
    first = stage.start(tool + script, "first")
    assert first.line() == "inside"
    eventually(lambda: first.state() == "Z")

    second = stage.start(CHARGE + "say(guard.call(charge, 1).kind)\n", "second")

    assert second.line() == "blocked"
    assert stage.effects() == ["charge 1 first"]


def test_a_frozen_owner_that_comes_back_never_overwrites(stage: Stage) -> None:
    """The late end of an owner that was frozen past its lease is noted, and its successor's result stays."""
    policy = "guard.policy(charge, timeout=0.5, replay=True)\n"
    first = stage.start(CHARGE + policy + CALL, "first")
    assert first.line() == "inside"
    first.freeze()

    second = stage.start(CHARGE + policy + CALL, "second")
    assert second.line() == "inside"  # it waited for the lease to lapse, and took over
    second.tell("from the second")
    assert second.line() == "from the second"
    first.send(signal.SIGCONT)
    first.tell("from the first")
    assert first.line() == "from the first"
    first.ends_well()
    third = stage.start(CHARGE + policy + CALL, "third")

    assert third.line() == "from the second"
    assert stage.effects() == ["charge 1 first", "charge 1 second"]
    assert [(run["status"], run["late"]) for run in runs(stage)] == [("doubt", "success"), ("success", None)]
    assert "given up" in first.errors()
    kinds = [event["kind"] for event in Guard(stage.db).events()]
    assert kinds.count("late") == 1


def test_a_frozen_owner_that_comes_back_before_its_successor_ends_is_not_run_beside(stage: Stage) -> None:
    """An owner that comes back while its successor still runs learns it, and the successor's end is kept."""
    policy = "guard.policy(charge, timeout=0.5, replay=True)\n"
    first = stage.start(CHARGE + policy + CALL, "first")
    assert first.line() == "inside"
    first.freeze()
    second = stage.start(CHARGE + policy + CALL, "second")
    assert second.line() == "inside"

    first.send(signal.SIGCONT)
    first.tell("from the first")
    assert first.line() == "from the first"
    first.ends_well()
    second.tell("from the second")

    assert second.line() == "from the second"
    assert [(run["status"], run["late"]) for run in runs(stage)] == [("doubt", "success"), ("success", None)]


def test_a_frozen_owner_that_nobody_replaced_settles_as_always(stage: Stage) -> None:
    """An owner whose lease lapsed while nobody wanted the call records its own success."""
    first = stage.start(CHARGE + "guard.policy(charge, timeout=0.2)\n" + CALL, "first")
    assert first.line() == "inside"
    first.freeze()
    looker = Guard(stage.db, quiet=True)
    eventually(lambda: bool(looker.history()[0]["in_doubt"]))

    first.send(signal.SIGCONT)
    first.tell("paid")
    first.ends_well()

    assert [run["status"] for run in runs(stage)] == ["success"]


def test_a_late_failure_leaves_the_successor_alone(stage: Stage) -> None:
    """A frozen owner whose tool fails in the end changes nothing for the successor that succeeded."""
    tool = """
def charge(order):
    effect("charge", order, sys.argv[2])
    say("inside")
    if hear() == "fail":
        raise ValueError("declined")
    return "paid"

guard.policy(charge, timeout=0.5, replay=True)
try:
    say(guard(charge, 1))
except ValueError as error:
    say(error)
"""
    first = stage.start(tool, "first")
    assert first.line() == "inside"
    first.freeze()
    second = stage.start(tool, "second")
    assert second.line() == "inside"
    second.tell("succeed")
    assert second.line() == "paid"

    first.send(signal.SIGCONT)
    first.tell("fail")

    assert first.line() == "declined"
    assert [(run["status"], run["late"]) for run in runs(stage)] == [("doubt", "failed"), ("success", None)]


def test_sixteen_processes_take_over_a_dead_run_once(stage: Stage) -> None:
    """Of sixteen processes that find the same dead runs at the same moment exactly one runs each again."""
    orders = 10
    victim = stage.start(
        f"""
import itertools
inside = itertools.count(1)

def charge(order):
    effect("charge", order, "victim")
    if next(inside) == {orders}:
        say("inside")
    time.sleep(1000)

for order in range({orders}):
    threading.Thread(target=guard, args=(charge, order), daemon=True).start()
time.sleep(1000)
"""
    )
    assert victim.line() == "inside"
    victim.kill()
    script = f"""
def charge(order):
    effect("charge", order, "again")
    time.sleep(0.005)

say("ready")
hear()
for order in range({orders}):
    guard(charge, order)
"""
    crowd = stage.crowd(16, script)

    stage.let_go(crowd)

    expected = {f"charge {order} {who}": 1 for order in range(orders) for who in ("victim", "again")}
    assert Counter(stage.effects()) == expected


def test_a_failed_call_is_retried_by_one_of_many(stage: Stage) -> None:
    """Of sixteen processes that retry the same failed calls at the same moment one runs each of them."""
    orders = 10
    script = f"""
def charge(order):
    effect("charge", order)
    if sys.argv[2] == "first":
        raise ValueError("declined")
    time.sleep(0.005)

say("ready")
hear()
for order in range({orders}):
    try:
        guard(charge, order)
    except ValueError:
        pass
"""
    first = stage.start(script, "first")
    first.tell("go")
    first.ends_well()
    crowd = stage.crowd(16, script)

    stage.let_go(crowd)

    assert Counter(stage.effects()) == {f"charge {order}": 2 for order in range(orders)}


def test_a_tool_slower_than_its_timeout_is_not_dead(stage: Stage) -> None:
    """The lease of a tool that takes several times its timeout is renewed, so that nobody else runs it."""
    policy = "guard.policy(charge, timeout=0.6)\n"
    first = stage.start(CHARGE + policy + CALL, "first")
    assert first.line() == "inside"

    script = """
kinds = set()
until = time.monotonic() + 2.4
while time.monotonic() < until:
    kinds.add(guard.call(charge, 1).kind)
    time.sleep(0.01)
say(*kinds)
"""
    second = stage.start(CHARGE + policy + script, "second")

    assert second.line() == "blocked"
    first.tell("paid")
    assert first.line() == "paid"
    assert [run["status"] for run in runs(stage)] == ["success"]


def test_duplicates_that_arrive_as_the_first_call_ends_never_run(stage: Stage) -> None:
    """Duplicates that meet the end of the first call are answered, and never undo its record."""
    orders = 150
    script = f"""
def charge(order):
    effect("charge", order)
    time.sleep(0.001)
    return order * 2

if int(sys.argv[2]) % 2:
    guard.policy(charge, replay=True)
say("ready")
hear()
for order in range({orders}):
    if int(sys.argv[2]) % 2:
        assert guard(charge, order) == order * 2
    else:
        while guard.call(charge, order).record.status != "success":
            pass
"""
    crowd = stage.crowd(4, script)

    stage.let_go(crowd)

    assert Counter(stage.effects()) == {f"charge {order}": 1 for order in range(orders)}
    entries = Guard(stage.db, quiet=True).history()
    assert {entry["status"] for entry in entries} == {"success"}
    assert [entry["result"] for entry in entries] == [order * 2 for order in range(orders)]


def test_killed_between_claim_and_tool_counts_as_in_doubt(stage: Stage) -> None:
    """A restarted process sees its predecessor's open call as in doubt, with nobody having run it again."""
    killed_inside(stage, CHARGE + CALL, "first")

    looker = Guard(stage.db, quiet=True)
    [entry] = looker.history()

    assert (entry["status"], entry["in_doubt"]) == ("running", True)
    assert looker.stats()["in_doubt"] == 1


def test_without_instant_death_only_the_lease_decides(stage: Stage) -> None:
    """A guard that was told not to judge processes waits for the lease of a killed one."""
    killed_inside(stage, CHARGE + CALL, "first")

    second = stage.start(
        "guard = Guard(DB, quiet=True, instant_death=False)\n" + CHARGE + "say(guard.call(charge, 1).kind)\n",
        "second",
    )

    assert second.line() == "blocked"
    assert stage.effects() == ["charge 1 first"]


def test_a_killed_call_asks_the_reconciler(stage: Stage) -> None:
    """After a kill the policy's function says what happened, and its answer is what duplicates get."""
    killed_inside(stage, CHARGE + CALL, "first")

    policy = "guard.policy(charge, replay=True, on_doubt=lambda record: 'found at the bank')\n"
    second = stage.start(CHARGE + policy + CALL, "second")

    assert second.line() == "found at the bank"
    assert stage.effects() == ["charge 1 first"]


def test_in_doubt_names_its_owner(stage: Stage) -> None:
    """The error for a call in doubt says which process held it and how to resolve it."""
    script = "charge.__qualname__\nguard.policy(charge, irreversible=True)\n"
    first = killed_inside(stage, CHARGE + script + CALL, "first")
    looker = Guard(stage.db, quiet=True)
    looker.policy("actor.charge", irreversible=True)

    def charge(order: int) -> None:
        raise AssertionError

    charge.__module__, charge.__qualname__ = "actor", "charge"
    with pytest.raises(InDoubt, match=rf"{first.pid}.*guard\.resolve"):
        looker(charge, 1)


# Killed at the very border of the tool: when it is entered (the claim is on disk, nothing was done)
# or when it returns (all was done, the outcome is not on disk).
AT_THE_BORDER = """
def charge(order):
    effect("charge", order, idempotency_key())
    return "paid"

def die(frame, event, arg):
    if event == sys.argv[2] and frame.f_code is charge.__code__:
        os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(die)
"""


@pytest.mark.parametrize(("border", "effects"), [("call", 0), ("return", 1)], ids=["before", "after"])
@pytest.mark.parametrize("policy", ["", "irreversible=True", "on_doubt=lambda record: 'found'"])
def test_killed_at_the_border_of_the_tool(stage: Stage, border: str, effects: int, policy: str) -> None:
    """Killed after the claim or before the record, a call is in doubt, and its policy decides."""
    first = stage.start(AT_THE_BORDER + "guard(charge, 1)\n", border)
    assert -signal.SIGKILL == first.ends()
    assert effects == len(stage.effects())
    looker = Guard(stage.db, quiet=True)
    [entry] = looker.history()
    assert (True, 1) == (entry["in_doubt"], entry["attempts"])
    looker.close()

    script = f"""
guard.policy(charge, replay=True, {policy})
try:
    say(guard(charge, 1))
except InDoubt:
    say("in doubt")
"""
    second = stage.start(AT_THE_BORDER + script, "never")

    told, again = {"": ("paid", 1), "irreversible=True": ("in doubt", 0)}.get(policy, ("found", 0))
    assert told == second.line()
    second.ends_well()
    assert effects + again == len(stage.effects())
    assert len(set(stage.effects())) <= 1  # a rerun hands the service the key of the run in doubt


def test_a_takeover_by_many_gives_all_of_them_one_result(stage: Stage) -> None:
    """Of eight processes that replay a dead run one runs it again, and all get what that one got."""
    killed_inside(stage, CHARGE + CALL, "victim")
    script = """
def charge(order):
    effect("charge", order, sys.argv[2])
    time.sleep(0.05)
    return "by " + sys.argv[2]

guard.policy(charge, replay=True)
say("ready")
hear()
say(guard(charge, 1))
"""
    crowd = stage.crowd(8, script)

    for actor in crowd:
        actor.tell("go")
    told = {actor.line() for actor in crowd}
    for actor in crowd:
        actor.ends_well()

    [_, winner] = stage.effects()
    assert {"by " + winner.split()[-1]} == told
    assert ["doubt", "success"] == [run["status"] for run in runs(stage)]


def test_an_irreversible_dead_run_is_taken_over_by_none_of_many(stage: Stage) -> None:
    """Of eight processes that find an irreversible run dead all are told so, and none runs it."""
    policy = "guard.policy(charge, irreversible=True)\n"
    killed_inside(stage, CHARGE + policy + CALL, "victim")
    script = """
say("ready")
hear()
try:
    guard(charge, 1)
except InDoubt:
    say("in doubt")
"""
    crowd = stage.crowd(8, CHARGE + policy + script)

    for actor in crowd:
        actor.tell("go")
    told = [actor.line() for actor in crowd]

    assert ["in doubt"] * 8 == told
    assert ["charge 1 victim"] == stage.effects()


def test_a_frozen_owner_is_taken_over_by_one_of_many(stage: Stage) -> None:
    """When the lease of a frozen owner lapses, exactly one of eight that wait runs the call."""
    policy = "guard.policy(charge, timeout=0.5, replay=True)\n"
    first = stage.start(CHARGE + policy + CALL, "first")
    assert first.line() == "inside"
    first.freeze()
    script = """
def charge(order):
    effect("charge", order, sys.argv[2])
    time.sleep(0.05)
    return "by " + sys.argv[2]

guard.policy(charge, timeout=30, replay=True)
say("ready")
hear()
say(guard(charge, 1))
"""
    crowd = stage.crowd(8, script)

    for actor in crowd:
        actor.tell("go")
    told = {actor.line() for actor in crowd}
    first.send(signal.SIGCONT)
    first.tell("late")
    assert first.line() == "late"
    first.ends_well()

    [_, winner] = stage.effects()
    assert {"by " + winner.split()[-1]} == told
    assert [("doubt", "success"), ("success", None)] == [(run["status"], run["late"]) for run in runs(stage)]


def test_a_zombie_is_dead_to_many_at_once(stage: Stage) -> None:
    """Of eight processes that find an owner unreaped exactly one runs its call again, at once."""
    first = stage.start(CHARGE + CALL, "first")
    assert first.line() == "inside"
    first.send(signal.SIGKILL)
    eventually(lambda: first.state() == "Z")
    script = """
def charge(order):
    effect("charge", order, "again")

say("ready")
hear()
guard(charge, 1)
"""
    crowd = stage.crowd(8, script)

    stage.let_go(crowd)

    assert "Z" == first.state()
    assert ["charge 1 first", "charge 1 again"] == stage.effects()


def test_an_outcome_that_waits_is_written_at_exit(stage: Stage) -> None:
    """A process that ends while its outcome waits for a lock waits for it, and the outcome is there."""
    script = """
guard = Guard(DB, quiet=True, lock_seconds=0.3)
def charge(order):
    say("in")
    hear()
    effect(order)
    return order
guard(charge, 1)
"""
    actor = stage.start(script)
    assert actor.line() == "in"
    with closing(sqlite3.connect(stage.db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        actor.tell("go on")
        time.sleep(1.5)
        holder.execute("ROLLBACK")
    actor.ends_well()

    assert ["success"] == [call["status"] for call in Guard(stage.db, quiet=True).history()]
