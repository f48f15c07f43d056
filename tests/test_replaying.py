"""`replaying`: a program that begins again from its top gets the results that it got before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Guard, KeyConflict, UsageError, replaying


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard of the test's own."""
    made = Guard(tmp_path / "ledger.db", quiet=True)
    yield made
    made.close()


class Bank:
    """Counts what was really done."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def tool(self, name: str) -> Any:
        def charge(order: Any) -> str:
            self.done.append(order)
            return f"receipt {len(self.done)} for {order}"

        charge.__qualname__ = name
        return charge


def test_a_second_pass_gets_the_first_results(guard: Guard) -> None:
    """Tools without any policy answer with what they returned, and nothing is done again."""
    bank = Bank()
    charge = guard.once(bank.tool("charge"))
    passes = []

    for _ in range(3):
        with replaying("order 17"):
            passes.append([charge(1), charge(2)])

    assert passes == [["receipt 1 for 1", "receipt 2 for 2"]] * 3
    assert bank.done == [1, 2]


def test_a_block_is_a_workflow_of_its_own(guard: Guard) -> None:
    """The same call in another block, or outside of any, is another call."""
    bank = Bank()
    charge = guard.once(bank.tool("charge"))
    for workflow in ("a", "b"):
        with replaying(workflow):
            charge(1)

    charge(1)

    assert bank.done == [1, 1, 1]


def test_it_counts_for_every_guard_of_the_process(guard: Guard, tmp_path: Path) -> None:
    """Also for a guard that is made inside, and whatever workflow one of them had outside."""
    bank, other = Bank(), Guard(tmp_path / "other.db", quiet=True)
    tool = bank.tool("charge")
    with guard.workflow("outside"):
        for _ in range(2):
            with replaying("order"):
                inner = Guard(tmp_path / "inner.db", quiet=True)
                found = [made.call(tool, 1).record.wf for made in (guard, other, inner)]
                assert found == ["order"] * 3
        assert guard.call(tool, 2).record.wf == "outside"

    assert bank.done == [1, 1, 1, 2]


def test_a_workflow_inside_wins(guard: Guard) -> None:
    """Whoever names a workflow inside the block means it; results are replayed there too."""
    bank = Bank()
    tool = bank.tool("charge")

    for _ in range(2):
        with replaying("order"), guard.workflow("mine"):
            outcome = guard.call(tool, 1)

    assert (outcome.record.wf, outcome.replayed, bank.done) == ("mine", True, [1])


@pytest.mark.parametrize(
    "options", [{"max": 3}, {"max": 3, "ttl": 0.001}, {"ttl": 0.001}, {"max": 2, "replay": True}]
)
def test_equal_calls_are_replayed_in_their_order(guard: Guard, options: Any) -> None:
    """A tool that may run more than once is not run again for what an earlier pass did; what is new runs."""
    bank = Bank()
    poke = guard.once(**options)(bank.tool("poke"))
    with replaying("order"):
        first = [poke(1)]

    with replaying("order"):
        second = [poke(1)]

    assert second == first
    assert bank.done == [1]


def test_what_an_earlier_pass_did_not_come_to_runs(guard: Guard) -> None:
    """A pass that ended after the second of three equal calls is gone on with at the third."""
    bank = Bank()
    poke = guard.once(max=3)(bank.tool("poke"))
    with replaying("order"):
        first = [poke(1), poke(1)]

    with replaying("order"):
        second = [poke(1), poke(1), poke(1)]

    assert second == [*first, "receipt 3 for 1"]
    assert bank.done == [1, 1, 1]


def test_an_error_is_not_replayed(guard: Guard) -> None:
    """What failed is tried again, as without the block."""
    tries: list[int] = []

    @guard.once
    def send(order: int) -> str:
        tries.append(order)
        if len(tries) == 1:
            raise ValueError("down")
        return "sent"

    with replaying("order"), pytest.raises(ValueError, match="down"):
        send(1)

    with replaying("order"):
        assert send(1) == "sent"
    assert tries == [1, 1]


def test_other_arguments_under_the_same_key_are_refused(guard: Guard) -> None:
    """A program that words an argument anew is not given the result of another action."""

    @guard.once(key="order", match="amount")
    def pay(order: int, amount: int) -> int:
        return amount

    with replaying("order"):
        pay(1, 5)

    with replaying("order"), pytest.raises(KeyConflict, match="amount"):
        pay(1, 6)


def test_a_released_call_runs_again(guard: Guard) -> None:
    """`guard.retry` lets a success run again, in a block too."""
    bank = Bank()
    charge = guard.once(max=2)(bank.tool("charge"))
    with replaying("order"):
        charge(1)
        assert guard.retry(charge, 1)

    with replaying("order"):
        charge(1)

    assert bank.done == [1, 1]


def test_tasks_and_threads_have_their_own(guard: Guard) -> None:
    """Two blocks at once in one loop do not mix, and a thread of its own is in none of them."""
    bank = Bank()
    tool = bank.tool("charge")

    async def in_block(name: str) -> str:
        with replaying(name):
            await asyncio.sleep(0)
            outcome: Any = await asyncio.to_thread(guard.call, tool, 1)
            return str(outcome.record.wf)

    async def both() -> list[str]:
        return list(await asyncio.gather(in_block("a"), in_block("b")))

    assert asyncio.run(both()) == ["a", "b"]
    found: list[str] = []
    with replaying("c"):
        thread = threading.Thread(target=lambda: found.append(guard.call(tool, 1).record.wf))
        thread.start()
        thread.join()
    assert found == ["default"]


def test_a_check_stops_what_would_begin(guard: Guard) -> None:
    """What it raises reaches whoever calls the tool; nothing runs and nothing is recorded."""
    bank = Bank()
    charge = guard.once(bank.tool("charge"))
    is_lost = threading.Event()

    def check() -> None:
        if is_lost.is_set():
            raise RuntimeError("lost")

    with replaying("order", check=check):
        charge(1)
        is_lost.set()
        with pytest.raises(RuntimeError, match="lost"):
            charge(2)

    assert (bank.done, guard.stats()["executed"]) == ([1], 1)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_block_needs_a_name(name: Any) -> None:
    """What names no workflow is refused before anything runs."""
    with pytest.raises(UsageError, match="names no workflow"), ledger.replaying(name):
        pytest.fail("it was entered")
