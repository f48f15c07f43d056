"""The guard in one process: what runs, what is blocked, what waits, and what each is told."""

import functools
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Guard, InProgress, LedgerError, MemoryStore, Outcome, Record, Status
from tests.stores.kit import guard_on


@pytest.fixture(params=["sqlite", "memory"])
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guard]:
    """A guard of its own on each of the built-in stores."""
    with guard_on(request.param, tmp_path) as made:
        yield made


class Tool:
    """Counts its runs, and can be held in the middle of one."""

    def __init__(self, *, held: bool = False, seconds: float = 0.0) -> None:
        self.runs: list[int] = []
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.seconds = seconds
        if not held:
            self.leave.set()

    def charge(self, order: int) -> dict[str, int]:
        self.runs.append(order)
        self.entered.set()
        time.sleep(self.seconds)
        assert self.leave.wait(30)
        return {"charged": order}

    def __ledger_key__(self) -> str:
        return "the tool"


def in_thread(act: Callable[[], object]) -> threading.Thread:
    """Start something beside the test."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def outcomes_of(act: Callable[[], Any], callers: int) -> list[Any]:
    """What each of many callers gets that start at the same moment."""
    start = threading.Barrier(callers)

    def one(_: int) -> Any:
        start.wait(30)
        return act()

    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(one, range(callers)))


def test_the_quickstart_runs_once(guard: Guard) -> None:
    """The first call runs and gives the result, the second is blocked and gives None."""
    tool = Tool()

    first: Any = guard(tool.charge, order=1)
    second: Any = guard(tool.charge, order=1)

    assert (first, second, tool.runs) == ({"charged": 1}, None, [1])


def test_positional_keyword_and_default_are_one_call(guard: Guard) -> None:
    """How an argument is passed does not matter, nor whether a default is spelt out."""
    runs = []

    def tool(a: int, b: int = 2, *, c: int = 3) -> None:
        runs.append((a, b, c))

    guard(tool, 1)
    guard(tool, a=1, b=2)
    guard(tool, 1, 2, c=3)

    assert runs == [(1, 2, 3)]


def test_another_argument_is_another_call(guard: Guard) -> None:
    """Calls that differ in an argument both run."""
    tool = Tool()

    guard(tool.charge, 1)
    guard(tool.charge, 2)

    assert tool.runs == [1, 2]


def test_a_key_stands_for_the_arguments(guard: Guard) -> None:
    """With the same key= other arguments are the same call; with another key it runs."""
    tool = Tool()

    guard(tool.charge, 1, key="order-1")
    guard(tool.charge, 2, key="order-1")
    guard(tool.charge, 3, key="order-2")

    assert tool.runs == [1, 3]


def test_a_tool_with_a_parameter_key_keeps_it(guard: Guard) -> None:
    """A tool's own key= goes to the tool; the guard's is then called ledger_key=."""
    seen = []

    def put(key: str, value: int) -> None:
        seen.append((key, value))

    guard(put, key="a", value=1, ledger_key="k")
    guard(put, key="b", value=2, ledger_key="k")
    guard(put, key="b", value=2)

    assert seen == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("key", ["", [], {}, ()])
def test_an_empty_key_is_refused(guard: Guard, key: object) -> None:
    """An empty key would make strangers one action, so nothing runs."""
    tool = Tool()

    with pytest.raises(ledger.UsageError, match="key is empty"):
        guard(tool.charge, 1, key=key)

    assert tool.runs == []


@pytest.mark.parametrize("result", [None, 0, "", [], False, {}])
def test_an_empty_result_is_a_result(guard: Guard, result: object) -> None:
    """A tool that returned something empty has run, and replay gives exactly that back."""
    runs = []

    def tool() -> object:
        runs.append(1)
        return result

    guard.policy(tool, replay=True)
    first, second = guard.call(tool), guard.call(tool)

    assert (result, result, 1) == (first.value, second.value, len(runs))
    assert (first.kind, second.kind) == ("executed", "replayed")


def test_call_tells_what_happened(guard: Guard) -> None:
    """guard.call answers with an Outcome that says executed or blocked, with the record."""
    tool = Tool()

    first, second = guard.call(tool.charge, 1), guard.call(tool.charge, 1)

    assert isinstance(first, Outcome)
    assert (first.executed, first.blocked, first.value) == (True, False, {"charged": 1})
    assert (second.executed, second.blocked, second.replayed, second.value) == (False, True, False, None)
    assert (second.record.status, second.record.attempts, second.record.runs, second.record.blocked) == (
        Status.SUCCESS,
        2,
        1,
        1,
    )
    assert second.record.args == {"order": 1}
    assert second.record.result == {"charged": 1}


def test_call_passes_the_tools_exception_on(guard: Guard) -> None:
    """The tool's own exception reaches the caller of guard.call as it is."""
    error = ValueError("declined")

    def tool() -> None:
        raise error

    with pytest.raises(ValueError, match="declined") as caught:
        guard.call(tool)

    assert error is caught.value


def test_a_failed_tool_runs_again(guard: Guard) -> None:
    """A call whose run raised is free; one that then succeeds is not."""
    runs = []

    def tool() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("declined")
        return "ok"

    with pytest.raises(ValueError, match="declined"):
        guard(tool)
    values: list[Any] = [guard(tool), guard(tool)]

    assert (*values, len(runs)) == ("ok", None, 2)


def test_a_duplicate_of_a_live_run_is_blocked_at_once(guard: Guard) -> None:
    """Without replay a duplicate does not wait for the run that is going on."""
    tool = Tool(held=True)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)

    began = time.monotonic()
    outcome = guard.call(tool.charge, 1)
    took = time.monotonic() - began

    tool.leave.set()
    first.join(30)
    assert (outcome.blocked, tool.runs) == (True, [1])
    assert Status.RUNNING is outcome.record.status
    assert took < 5


def test_replay_waits_for_the_live_twin(guard: Guard) -> None:
    """With replay a duplicate of a live run gets the first caller's result when it is there."""
    tool = Tool(held=True)
    guard.policy(tool.charge, replay=True)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)
    threading.Timer(0.2, tool.leave.set).start()

    outcome = guard.call(tool.charge, 1)

    first.join(30)
    assert (outcome.kind, outcome.value, tool.runs) == ("waited", {"charged": 1}, [1])
    assert (outcome.waited, outcome.replayed, outcome.blocked) == (True, True, False)


def test_many_who_wait_get_one_result_each_their_own(guard: Guard) -> None:
    """Sixteen callers of a slow tool with replay share one run, and no mutable object."""
    tool = Tool(seconds=0.2)
    guard.policy(tool.charge, replay=True)

    values = outcomes_of(lambda: guard(tool.charge, 1), 16)

    assert (tool.runs, values) == ([1], [{"charged": 1}] * 16)
    assert len({id(v) for v in values}) == 16


def test_a_waiting_caller_runs_when_the_twin_fails(guard: Guard) -> None:
    """Whoever waited for a run that failed makes the next run itself."""
    entered, leave, runs = threading.Event(), threading.Event(), []

    def tool() -> str:
        runs.append(1)
        if len(runs) == 1:
            entered.set()
            assert leave.wait(30)
            raise ValueError("declined")
        return "ok"

    guard.policy(tool, replay=True)

    def first() -> None:
        with pytest.raises(ValueError, match="declined"):
            guard(tool)

    thread = in_thread(first)
    assert entered.wait(30)
    threading.Timer(0.1, leave.set).start()
    outcome = guard.call(tool)

    thread.join(30)
    assert (outcome.kind, outcome.value, len(runs)) == ("executed", "ok", 2)


@pytest.mark.parametrize(("wait", "least"), [(0, 0.0), (0.3, 0.3)])
def test_in_progress_when_it_takes_longer_than_wait(guard: Guard, wait: float, least: float) -> None:
    """With replay a duplicate raises InProgress after wait seconds; with wait=0 at once."""
    tool = Tool(held=True)
    guard.policy(tool.charge, replay=True, wait=wait)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)

    began = time.monotonic()
    with pytest.raises(InProgress, match=r"charge .* is still running in .* wait=…") as caught:
        guard(tool.charge, 1)
    took = time.monotonic() - began

    tool.leave.set()
    first.join(30)
    assert least <= took < least + 5
    assert caught.value.record is not None
    assert guard.stats()["blocked"] == 1


def test_recursion_into_the_same_call_is_blocked(guard: Guard) -> None:
    """A tool that calls itself with the same arguments is blocked there, like any duplicate."""
    inner = []

    def tool(n: int) -> str:
        inner.append(guard.call(tool, n))
        return "outer"

    outer = guard(tool, 1)

    assert (outer, [o.blocked for o in inner]) == ("outer", [True])


def test_recursion_with_replay_does_not_wait_for_itself(guard: Guard) -> None:
    """With replay such a recursion raises InProgress at once: the result it asks for cannot come."""
    took = []

    def tool(n: int) -> str:
        began = time.monotonic()
        with pytest.raises(InProgress, match="is what this call is part of"):
            guard(tool, n)
        took.append(time.monotonic() - began)
        return "outer"

    guard.policy(tool, replay=True)

    assert guard(tool, 1) == "outer"
    assert took[0] < 5


def test_recursion_into_another_call_runs(guard: Guard) -> None:
    """A tool may call itself with other arguments."""
    runs = []

    def tool(n: int) -> int:
        runs.append(n)
        return 0 if n == 0 else 1 + guard(tool, n - 1)

    assert guard(tool, 3) == 3
    assert runs == [3, 2, 1, 0]


def test_max_two_under_sixty_four_callers(guard: Guard) -> None:
    """max=2 never lets more than two runs succeed, nor two run at a time."""
    lock, at_once, peak, runs = threading.Lock(), [0], [0], []

    def tool() -> None:
        with lock:
            at_once[0] += 1
            peak[0] = max(peak[0], at_once[0])
        time.sleep(0.01)
        with lock:
            runs.append(1)
            at_once[0] -= 1

    guard.policy(tool, max=2)

    outcomes = outcomes_of(lambda: guard.call(tool), 64) + [guard.call(tool) for _ in range(3)]

    assert (len(runs), peak[0]) == (2, 1)
    assert sum(o.executed for o in outcomes) == 2
    stats = guard.stats()
    assert (stats["actions"], stats["attempts"], stats["executed"], stats["blocked"]) == (1, 67, 2, 65)


def test_max_two_with_replay_runs_twice(guard: Guard) -> None:
    """With max=2 and replay under many callers two run, one after the other, and all others replay."""
    runs = []

    def tool() -> int:
        time.sleep(0.02)
        runs.append(1)
        return len(runs)

    guard.policy(tool, max=2, replay=True)

    outcomes = outcomes_of(lambda: guard.call(tool), 16)

    assert (len(runs), sum(o.executed for o in outcomes)) == (2, 2)
    assert all(o.value in (1, 2) for o in outcomes)


def test_ttl_under_race_gives_one_per_window(guard: Guard) -> None:
    """However many ask, a call with ttl runs once in each window."""
    runs = []

    def tool() -> None:
        runs.append(time.time())

    guard.policy(tool, ttl=1.0)

    outcomes_of(lambda: guard(tool), 16)
    assert len(runs) == 1
    time.sleep(max(0.0, runs[0] + 1.2 - time.time()))
    outcomes_of(lambda: guard(tool), 16)

    assert len(runs) == 2


def test_an_unlimited_tool_is_counted_not_claimed(guard: Guard) -> None:
    """An unlimited tool runs each time, has one row per call, and its failures do not free anything."""
    runs = []

    def look(page: int) -> int:
        runs.append(page)
        if page == 13:
            raise ValueError("no such page")
        return page

    guard.policy(look, unlimited=True)

    values = [guard(look, 1) for _ in range(5)]
    with pytest.raises(ValueError, match="no such page"):
        guard(look, 13)
    guard.flush()

    assert (values, len(runs)) == ([1] * 5, 6)
    stats = guard.stats()["tools"]
    (sums,) = stats.values()
    assert (sums["actions"], sums["attempts"], sums["executed"], sums["blocked"]) == (2, 6, 5, 0)
    history = guard.history(tool="look")
    assert [(h["attempts"], h["executed"], h["runs"]) for h in history] == [(5, 5, []), (1, 0, [])]


def test_an_unlimited_tool_has_an_outcome(guard: Guard) -> None:
    """guard.call of an unlimited tool answers executed with its counted record."""

    def look() -> int:
        return 7

    guard.policy(look, unlimited=True)
    guard.call(look)
    outcome = guard.call(look)

    assert (outcome.kind, outcome.value, outcome.record.attempts) == ("executed", 7, 2)


def test_blocked_return_is_a_value_of_ones_own(guard: Guard) -> None:
    """blocked_return= is what a duplicate gets, a fresh copy each time."""
    tool = Tool()
    guard.policy(tool.charge, blocked_return={"status": "duplicate"})

    guard(tool.charge, 1)
    second: Any = guard(tool.charge, 1)
    third: Any = guard(tool.charge, 1)

    assert {"status": "duplicate"} == second == third
    assert second is not third


def test_blocked_return_may_be_a_function_of_the_record(guard: Guard) -> None:
    """A callable blocked_return is asked with the record of the call."""
    tool = Tool()

    def told(record: Record) -> str:
        return f"{record.short}: {record.result['charged']}"

    guard.policy(tool.charge, blocked_return=told)
    guard(tool.charge, 1)

    answer: Any = guard(tool.charge, 1)

    assert answer == "charge: 1"


def test_tell_model_says_what_was_done(guard: Guard) -> None:
    """tell_model answers in words with time and result, and while the run goes on that it runs."""
    tool = Tool(held=True)
    guard.policy(tool.charge, blocked_return=ledger.tell_model)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)
    during: Any = guard(tool.charge, 1)
    tool.leave.set()
    first.join(30)

    after: Any = guard(tool.charge, 1)

    assert during.startswith("already running since ")
    assert after.startswith("already done at ")
    assert after.endswith('; result: {"charged": 1}')


def test_retry_lets_exactly_one_more_run(guard: Guard) -> None:
    """After guard.retry the next call runs, the one after it is blocked again."""
    tool = Tool()
    guard(tool.charge, 1)

    released = guard.retry(tool.charge, 1)
    kinds = [guard.call(tool.charge, 1).kind for _ in range(2)]

    assert (released, kinds) == (True, ["executed", "blocked"])
    assert not guard.retry(tool.charge, 99)


def test_retry_resolve_and_force_refuse_beside_a_live_run(guard: Guard) -> None:
    """While a live run holds the call, each way out refuses and names the owner."""
    tool = Tool(held=True)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)

    messages = []
    for act in (
        lambda: guard.retry(tool.charge, 1),
        lambda: guard.resolve(tool.charge, 1, result=1),
        lambda: guard.force(tool.charge, 1),
    ):
        with pytest.raises(InProgress, match="is running in ") as caught:
            act()
        messages.append(str(caught.value))

    tool.leave.set()
    first.join(30)
    assert tool.runs == [1]
    assert all("wait for it" in m for m in messages)


def test_force_runs_now_and_is_recorded(guard: Guard) -> None:
    """guard.force runs although the call succeeded, and the run is recorded as forced."""
    tool = Tool()
    guard(tool.charge, 1)

    value = guard.force(tool.charge, 1)

    assert (value, tool.runs) == ({"charged": 1}, [1, 1])
    assert [r["forced"] for r in guard.history()[0]["runs"]] == [False, True]


def test_wrap_tools_keeps_the_kind_and_guards_once(guard: Guard) -> None:
    """A dict gives a dict and a list a list; what is wrapped already stays as it is."""
    runs = []

    def send(to: str) -> str:
        runs.append(to)
        return to

    tools: dict[str, Any] = guard.wrap_tools({"send": send})
    again = guard.wrap_tools(tools)
    listed = guard.wrap_tools([tools["send"]])

    assert tools["send"] is again["send"] is listed[0]
    assert (tools["send"]("a"), again["send"](to="a"), runs) == ("a", None, ["a"])


def test_what_is_not_callable_is_refused_with_advice(guard: Guard) -> None:
    """wrap_tools of something else, or of a thing that is no function, says what to wrap instead."""
    with pytest.raises(ledger.UsageError, match="a dict or a list"):
        guard.wrap_tools("send")  # type: ignore[call-overload]
    with pytest.raises(ledger.UsageError, match="wrap"):
        guard.wrap_tools({"send": 1})


def test_every_kind_of_callable_is_guarded(guard: Guard) -> None:
    """Functions, methods, partials, callable objects, static and class methods run once each."""
    runs = []

    class Mailer:
        def __ledger_key__(self) -> str:
            return "mailer"

        def send(self, to: str) -> None:
            runs.append(f"method {to}")

        @classmethod
        def of_class(cls, to: str) -> None:
            runs.append(f"class {to}")

        @staticmethod
        def static(to: str) -> None:
            runs.append(f"static {to}")

        def __call__(self, to: str) -> None:
            runs.append(f"object {to}")

    def function(to: str) -> None:
        runs.append(f"function {to}")

    def two(how: str, to: str) -> None:
        runs.append(f"{how} {to}")

    mailer = Mailer()
    tools: list[Callable[[str], None]] = [
        mailer.send,
        Mailer.of_class,
        Mailer.static,
        mailer,
        function,
        functools.partial(two, "partial"),
    ]
    for tool in tools * 2:
        guard(tool, "a")

    assert runs == ["method a", "class a", "static a", "object a", "function a", "partial a"]


def test_generators_are_refused(guard: Guard) -> None:
    """A generator function has no single result, so it is refused before anything runs."""

    def pages() -> Iterator[int]:
        yield 1

    with pytest.raises(ledger.UsageError, match="generator"):
        guard(pages)


def test_the_decorator_keeps_name_doc_and_types(guard: Guard) -> None:
    """@guard.once keeps the name, the docstring and resolved annotations, and guards."""
    runs = []

    @guard.once(replay=True)
    def send_email(to: "str", n: "int" = 1) -> "str":
        """Send."""
        runs.append(to)
        return f"{to}{n}"

    assert (send_email("a"), send_email(to="a"), runs) == ("a1", "a1", ["a"])
    assert (send_email.__name__, send_email.__doc__) == ("send_email", "Send.")
    assert {"to": str, "n": int, "return": str} == send_email.__annotations__


def test_the_policy_of_the_asking_caller_decides(guard: Guard) -> None:
    """Two wrappers of one tool share its calls; each answers by its own policy."""
    runs = []

    def charge(order: int) -> int:
        runs.append(order)
        return order

    strict: Any = guard.once(charge)
    kind: Any = guard.once(replay=True)(charge)

    assert (strict(1), strict(1), kind(1), runs) == (1, None, 1, [1])


def test_counters_are_exact_under_threads(guard: Guard) -> None:
    """Eight callers that ask a hundred times each are counted as eight hundred attempts."""
    tool = Tool()

    outcomes_of(lambda: [guard(tool.charge, 1) for _ in range(100)], 8)
    guard.flush()

    stats = guard.stats()
    assert (stats["attempts"], stats["executed"], stats["blocked"]) == (800, 1, 799)


def test_reset_forgets_a_workflow_and_refuses_beside_a_run(guard: Guard) -> None:
    """guard.reset lets calls run anew, but not while one of them is running."""
    tool = Tool(held=True)
    first = in_thread(lambda: guard(tool.charge, 1))
    assert tool.entered.wait(30)

    with pytest.raises(InProgress, match="nothing was reset"):
        guard.reset()

    tool.leave.set()
    first.join(30)
    guard.reset()
    assert guard.call(tool.charge, 1).executed


def test_a_durability_that_does_not_exist_is_refused() -> None:
    """sync= has three names."""
    with pytest.raises(ledger.UsageError, match="is not one of 'full', 'claim' and 'off'"):
        Guard("x.db", sync="fast")  # type: ignore[arg-type]


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Ctrl-C in so many seconds, as a real signal."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_ctrl_c_while_waiting_for_a_lock_leaves_nothing(
    tmp_path: Path, alarm: Callable[[float], None]
) -> None:
    """Who is interrupted before its claim was written has left no run, and the next call runs."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)
    guard(str, 0)
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        alarm(0.1)
        with pytest.raises(KeyboardInterrupt):
            guard(str, 1)
        holder.execute("ROLLBACK")

    assert "1" == guard(str, 1)
    assert {"success"} == {call["status"] for call in guard.history()}
    guard.close()


def test_a_claim_that_took_longer_than_its_lease_is_renewed_before_the_tool(tmp_path: Path) -> None:
    """A caller that stalled makes sure that the run is still its own, then enters."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)
    guard.policy(str, timeout=0.1)
    guard(str, 0)
    with closing(
        sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    ) as holder:
        holder.execute("BEGIN IMMEDIATE")
        threading.Timer(0.3, holder.execute, ["ROLLBACK"]).start()

        assert "1" == guard(str, 1)

    assert [1, 1] == [call["run"] for call in guard.history()]
    guard.close()


def test_a_result_outlives_a_lost_file_here_too(tmp_path: Path) -> None:
    """guard.call gives the value and a record from memory when the file is gone after the tool ran."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)

    def lose() -> str:
        (tmp_path / "ledger.db").unlink()
        return "receipt"

    outcome = guard.call(lose)

    assert ("executed", "receipt", Status.SUCCESS) == (outcome.kind, outcome.value, outcome.record.status)
    shutil.rmtree(tmp_path)


def test_threads_that_open_a_memory_ledger_share_it() -> None:
    """However many threads make the first call at once, they find one store."""
    for _ in range(20):
        guard, ran = Guard("memory://", quiet=True), list[int]()
        gate = threading.Barrier(8)

        def call(guard: Guard = guard, ran: list[int] = ran, gate: threading.Barrier = gate) -> None:
            gate.wait()
            guard(lambda: ran.append(1), key="one")

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(call) for _ in range(8)]:
                future.result()
        assert [1] == ran


def test_force_runs_or_says_who_holds_the_call(guard: Guard) -> None:
    """Of many that force at once each has run or got InProgress; none got nothing."""
    gate = threading.Barrier(8)

    def slow() -> str:
        time.sleep(0.005)
        return "ran"

    def force() -> str:
        gate.wait()
        try:
            return guard.force(slow)
        except InProgress:
            return "held"

    with ThreadPoolExecutor(8) as pool:
        answers = [future.result() for future in [pool.submit(force) for _ in range(8)]]

    assert {"ran", "held"} >= set(answers)
    assert answers.count("ran") == guard.stats()["executed"] >= 1


def test_two_guards_keep_their_own_policies() -> None:
    """A tool that one guard wrapped follows the policy of the guard that is asked."""
    one, two = Guard(store=MemoryStore(), quiet=True), Guard(store=MemoryStore(), quiet=True)
    ran: list[int] = []

    @one.once
    def note(n: int) -> None:
        ran.append(n)

    two.policy(note, max=3)
    for _ in range(5):
        note(1)
        two(note, 2)

    assert (1, 3) == (ran.count(1), ran.count(2))


def test_closing_beside_others_breaks_nothing(tmp_path: Path) -> None:
    """One guard's close() while another uses the same file is only a pause."""
    one, two = Guard(tmp_path / "l.db", quiet=True), Guard(tmp_path / "l.db", quiet=True)
    stop = threading.Event()
    errors: list[LedgerError] = []

    def work(first: int) -> None:
        number = first
        try:
            while not stop.is_set():
                one(str, number)
                number += 1
        except LedgerError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n * 1_000_000,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        two(str, -1)
        two.close()
    stop.set()
    for thread in threads:
        thread.join()

    assert [] == errors
    one.close()
