"""The ways out: retry, force, resolve and reset, and what a policy does with a doubt."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import (
    Guard,
    InDoubt,
    InProgress,
    LedgerError,
    MemoryStore,
    NotPerformed,
    Record,
    StoreError,
    UsageError,
)
from tests.actors import eventually
from tests.stores.kit import SixMethodStore

RUNS: list[Any] = []
NEXT: list[BaseException] = []


@pytest.fixture(params=["sqlite", "memory", "six"])
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guard]:
    """A guard of its own on each kind of store."""
    RUNS.clear()
    NEXT.clear()
    if request.param == "sqlite":
        made = Guard(tmp_path / "ledger.db", quiet=True)
    else:
        made = Guard(store=MemoryStore() if request.param == "memory" else SixMethodStore(), quiet=True)
    yield made
    made.close()


def charge(order: int) -> str:
    """Counts its runs; raises what the test put into NEXT."""
    RUNS.append(order)
    if NEXT:
        raise NEXT.pop()
    return f"receipt {len(RUNS)}"


async def charge_async(order: int) -> str:
    """The same for await."""
    return charge(order)


def leave_in_doubt(guard: Guard) -> None:
    """A run that is interrupted, as by Ctrl-C."""
    NEXT.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(charge, 1)


def test_retry_lets_the_next_call_run_once(guard: Guard) -> None:
    """After retry one call runs, and the one after it is a duplicate."""
    guard(charge, 1)

    assert guard.retry(charge, 1)

    kinds = [guard.call(charge, 1).kind for _ in range(2)]
    assert ["executed", "blocked"] == kinds


def test_retry_of_an_unknown_call_says_so(guard: Guard) -> None:
    """There was nothing to release."""
    assert not guard.retry(charge, 1)


def test_retry_after_a_forced_failure_lets_the_next_call_run(guard: Guard) -> None:
    """A success, a forced run that failed, then retry: the next call runs."""
    guard(charge, 1)
    NEXT.append(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        guard.force(charge, 1)

    guard.retry(charge, 1)

    assert "executed" == guard.call(charge, 1).kind


def test_force_runs_whatever_the_history_says(guard: Guard) -> None:
    """A forced run happens beside a success, is recorded, and the newest success is replayed."""
    guard(charge, 1)

    assert "receipt 2" == guard.force(charge, 1)
    guard.policy(charge, replay=True)
    assert "receipt 2" == guard(charge, 1)
    assert 2 == len(guard.history()[0]["runs"])


def test_force_of_an_async_tool_is_awaited(guard: Guard) -> None:
    """Force works for coroutine functions with an await, and nothing else is different."""

    async def main() -> list[Any]:
        return [
            await guard(charge_async, 1),
            await guard.force(charge_async, 1),
            await guard(charge_async, 1),
        ]

    assert ["receipt 1", "receipt 2", None] == asyncio.run(main())


@pytest.mark.parametrize("act", ["retry", "force", "resolve", "reset"])
def test_a_live_run_is_left_alone_and_its_owner_named(guard: Guard, act: str) -> None:
    """While the tool runs, every way out is refused with the name of the process that holds the call."""
    entered, leave = threading.Event(), threading.Event()

    def slow(order: int) -> str:
        RUNS.append(order)
        entered.set()
        assert leave.wait(30)
        return "slow"

    thread = threading.Thread(target=guard, args=(slow, 1))
    thread.start()
    assert entered.wait(30)
    ways: dict[str, Callable[[], object]] = {
        "retry": lambda: guard.retry(slow, 1),
        "force": lambda: guard.force(slow, 1),
        "resolve": lambda: guard.resolve(slow, 1, result="x"),
        "reset": guard.reset,
    }
    try:
        with pytest.raises(InProgress, match=rf"running in .*pid {os.getpid()}") as refused:
            ways[act]()
        assert refused.value.record is not None
    finally:
        leave.set()
        thread.join()

    assert [1] == RUNS
    assert "blocked" == guard.call(slow, 1).kind


def test_resolve_with_a_result_is_what_duplicates_get(guard: Guard) -> None:
    """A doubt that somebody settled as done is replayed like any success."""
    guard.policy(charge, on_doubt="block", replay=True)
    leave_in_doubt(guard)

    guard.resolve(charge, 1, result="found it")

    assert "found it" == guard(charge, 1)
    assert [1] == RUNS


def test_resolve_as_not_done_frees_the_call(guard: Guard) -> None:
    """done=False lets the next call run."""
    guard.policy(charge, on_doubt="block")
    leave_in_doubt(guard)

    guard.resolve(charge, 1, done=False)

    assert "receipt 2" == guard(charge, 1)


def test_resolve_needs_a_doubt(guard: Guard) -> None:
    """What succeeded, or was never called, or contradicts itself, is not resolved."""
    with pytest.raises(UsageError, match="never made"):
        guard.resolve(charge, 1, result=1)
    guard(charge, 1)

    with pytest.raises(UsageError, match=r"is SUCCESS, not in doubt"):
        guard.resolve(charge, 1, done=False)
    with pytest.raises(UsageError, match="has no result"):
        guard.resolve(charge, 1, result=1, done=False)
    assert "blocked" == guard.call(charge, 1).kind


def test_reset_forgets_one_workflow(guard: Guard) -> None:
    """After reset the workflow's calls run again; others stay done."""
    for wf in ("a", "b"):
        guard.workflow(wf)(charge, 1)

    guard.reset("a")

    assert ["receipt 3", None] == [guard.workflow(wf)(charge, 1) for wf in ("a", "b")]


def test_rerun_is_the_default_after_a_doubt(guard: Guard) -> None:
    """An interrupted run is in doubt, never running, and the next call runs."""
    leave_in_doubt(guard)

    assert 1 == guard.stats()["in_doubt"]
    assert "receipt 2" == guard(charge, 1)


def test_block_asks_a_person(guard: Guard) -> None:
    """Under block the duplicate gets InDoubt with the record, is counted, and nothing runs."""
    guard.policy(charge, on_doubt="block")
    told: list[Record] = []
    guard.on_doubt(told.append)
    leave_in_doubt(guard)

    with pytest.raises(InDoubt, match=r"guard\.resolve") as refused:
        guard(charge, 1)

    assert refused.value.record is not None
    guard.flush()
    assert ([1], 1) == (RUNS, guard.stats()["blocked"])
    assert [(1, "doubt")] == [(r.run, r.status) for r in told]  # once for the run, however often it blocks


def reconciled(answer: Any, asked: list[Record]) -> Callable[[Record], Any]:
    """A reconcile function that remembers what it was asked."""

    def find_out(record: Record) -> Any:
        asked.append(record)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return find_out


@pytest.mark.parametrize("is_async", [False, True])
def test_reconcile_with_a_result_settles_the_doubt(guard: Guard, is_async: bool) -> None:
    """The function's answer becomes the result; it is asked once, and the tool does not run."""
    asked: list[Record] = []
    plain = reconciled("found it", asked)

    async def coroutine(record: Record) -> Any:
        return plain(record)

    tool: Any = charge_async if is_async else charge
    guard.policy(tool, on_doubt=coroutine if is_async else plain, replay=True)
    NEXT.append(KeyboardInterrupt())

    def call() -> Any:
        return asyncio.run(guard(tool, 1)) if is_async else guard(tool, 1)

    with pytest.raises(KeyboardInterrupt):
        call()

    assert ["found it", "found it"] == [call(), call()]
    assert ([1], 1, True) == (RUNS, len(asked), asked[0].in_doubt)


def test_reconcile_with_not_done_runs_the_tool(guard: Guard) -> None:
    """NOT_DONE closes the doubt as failed and runs the tool for the same caller."""
    guard.policy(charge, on_doubt=reconciled(ledger.NOT_DONE, []))
    leave_in_doubt(guard)

    assert "receipt 2" == guard(charge, 1)
    assert ["failed", "success"] == [r["status"] for r in guard.history()[0]["runs"]]


@pytest.mark.parametrize("answer", [ledger.STILL_UNKNOWN, ValueError("service is down")])
def test_reconcile_without_an_answer_runs_nothing(guard: Guard, answer: Any) -> None:
    """STILL_UNKNOWN and an error of the function both end in InDoubt, counted, with nothing written."""
    guard.policy(charge, on_doubt=reconciled(answer, []))
    leave_in_doubt(guard)

    with pytest.raises(InDoubt):
        guard(charge, 1)

    guard.flush()
    assert ([1], 1, 1) == (RUNS, guard.stats()["in_doubt"], guard.stats()["blocked"])


def test_an_irreversible_tool_that_raises_is_in_doubt(guard: Guard) -> None:
    """Any error may have come after the effect, so the next call is refused."""
    guard.policy(charge, irreversible=True)
    NEXT.append(ValueError("timeout"))
    with pytest.raises(ValueError, match="timeout"):
        guard(charge, 1)

    with pytest.raises(InDoubt):
        guard(charge, 1)


@pytest.mark.parametrize("error", [NotPerformed("refused"), ConnectionRefusedError("nobody there")])
def test_proof_that_nothing_happened_frees_the_call(guard: Guard, error: Exception) -> None:
    """NotPerformed, and what no_effect= lists, lets an irreversible tool run again."""
    guard.policy(charge, irreversible=True, no_effect=ConnectionRefusedError)
    NEXT.append(error)
    with pytest.raises(type(error)):
        guard(charge, 1)

    assert "receipt 2" == guard(charge, 1)


class Asks(Exception):
    """A framework's signal that a person is asked first."""


class ModelRetry(Exception):
    """Called like one that is known by name."""


ModelRetry.__module__ = "pydantic_ai.exceptions"


@pytest.mark.parametrize("signal", [Asks, ModelRetry])
def test_a_tool_that_suspends_itself_has_not_failed(guard: Guard, signal: type[Exception]) -> None:
    """The exception passes through, the run is suspended, and the resumed call runs."""
    guard.policy(charge, suspends=Asks, irreversible=True)
    NEXT.append(signal("may I?"))
    with pytest.raises(signal):
        guard(charge, 1)

    assert (1, 0) == (guard.stats()["suspended"], guard.stats()["failed"])
    assert "receipt 2" == guard(charge, 1)


def test_call_tells_the_outcomes_apart(guard: Guard) -> None:
    """executed, blocked and replayed come with the value and the record."""
    first, blocked = guard.call(charge, 1), guard.call(charge, 1)
    guard.policy(charge, replay=True)
    replayed = guard.call(charge, 1)

    assert [(o.kind, o.value) for o in (first, blocked, replayed)] == [
        ("executed", "receipt 1"), ("blocked", None), ("replayed", "receipt 1"),
    ]  # fmt: skip
    assert {first.record.call} == {o.record.call for o in (blocked, replayed)}
    assert issubclass(InDoubt, LedgerError)


class Flaky(SixMethodStore):
    """A store whose server goes away now and then, with an error of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = 0

    def claim(self, record: Record) -> bool:
        if self.gone:
            self.gone -= 1
            raise RuntimeError("the server went away")
        return super().claim(record)


def test_an_outcome_survives_a_foreign_store_that_fails() -> None:
    """Whatever the store raises, the caller gets its result, and the outcome is written later."""
    store = Flaky()
    guard = Guard(store=store, quiet=True)
    ran: list[int] = []

    def pay(order: int) -> str:
        ran.append(order)
        store.gone = 3
        return "receipt"

    assert "receipt" == guard(pay, 1)
    eventually(lambda: guard.stats()["executed"] == 1)
    guard(pay, 1)
    assert [1] == ran


def test_a_foreign_store_that_fails_at_the_claim_is_a_store_error() -> None:
    """Before the tool, the store's own error becomes one that names the store, and nothing runs."""
    store = Flaky()
    guard = Guard(store=store, quiet=True)
    store.gone = 1

    before = list(RUNS)

    with pytest.raises(StoreError, match=r"Flaky\.claim failed \(RuntimeError\('the server went away'\)\)"):
        guard(charge, 1)
    assert before == RUNS


def test_an_async_reconcile_of_a_sync_tool_settles_nothing() -> None:
    """A coroutine is no answer: the call stays in doubt."""
    guard = Guard(store=MemoryStore(), quiet=True)

    async def find_out(record: Record) -> Any:
        return ledger.STILL_UNKNOWN

    def pay(order: int) -> None:
        raise ConnectionError("reset by peer")

    guard.policy(pay, irreversible=True, on_doubt=find_out)
    with pytest.raises(ConnectionError):
        guard(pay, 1)

    with pytest.raises(InDoubt, match="a coroutine came back"):
        guard(pay, 1)
    assert (1, 0) == (guard.stats()["in_doubt"], guard.stats()["executed"])


def test_a_doubt_is_not_taken_over_with_another_amount(guard: Guard) -> None:
    """Where the effect may have happened, what match= names must agree; after a failure it may change."""
    amounts: list[int] = []

    def pay(order: str, amount: int) -> int:
        amounts.append(amount)
        if NEXT:
            raise NEXT.pop()
        return amount

    guard.policy(pay, key=["order"], match=["amount"])
    NEXT.append(ValueError("declined"))
    with pytest.raises(ValueError, match="declined"):
        guard(pay, "a", 10)
    NEXT.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(pay, "a", 11)

    with pytest.raises(ledger.KeyConflict, match="with another amount"):
        guard(pay, "a", 12)
    assert 11 == guard(pay, "a", 11)
    assert [10, 11, 11] == amounts
