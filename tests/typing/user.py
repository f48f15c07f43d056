"""A user's file: what type checkers must see of `ledger`. It is checked, never run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_type

from ledger import Guard, LedgerError, MemoryStore, Outcome, Policy, Record, Status, Store, guard


@dataclass
class Receipt:
    number: str
    cents: int


def charge(order: str, cents: int, *, currency: str = "EUR") -> Receipt:
    return Receipt(f"{order}-{currency}", cents)


async def send(to: str, subject: str = "") -> int:
    return len(to) + len(subject)


def calls_keep_the_result_type() -> None:
    assert_type(guard(charge, "A-17", 4200), Receipt)
    assert_type(guard(charge, "A-17", 4200, key="order A-17", currency="USD"), Receipt)
    guard.retry(charge, "A-17", 4200)
    assert_type(guard.force(charge, "A-17", 4200), Receipt)


async def async_calls_keep_it_too() -> None:
    assert_type(await guard(send, "a@example.org"), int)
    assert_type(await guard(send, "a@example.org", key="welcome a"), int)


def an_outcome_carries_the_result() -> None:
    outcome = guard.call(charge, "A-17", 4200)
    assert_type(outcome, Outcome[Receipt])
    assert_type(outcome.executed, bool)
    assert_type(outcome.blocked, bool)
    assert_type(outcome.replayed, bool)
    assert_type(outcome.waited, bool)
    assert_type(outcome.value, Receipt | None)
    assert_type(outcome.record, Record)
    assert_type(outcome.record.status, Status)


async def so_does_an_async_one() -> None:
    assert_type(await guard.call(send, "a@example.org"), Outcome[int])


@guard.once
def refund(order: str, cents: int, *, reason: str = "") -> Receipt:
    return Receipt(f"{order} {reason}", -cents)


@guard.once(replay=True, key=["order"], ttl=3600)
def ship(order: str, parcels: int = 1) -> list[str]:
    return [order] * parcels


@guard.once
async def notify(to: str, text: str) -> int:
    return len(to) + len(text)


@guard.once(replay=True)
async def look_up(order: str) -> Receipt:
    return Receipt(order, 0)


def decorated_functions_keep_their_signature() -> None:
    assert_type(refund("A-17", 4200, reason="broken"), Receipt)
    assert_type(ship("A-17", parcels=2), list[str])
    refund("A-17", "4200")  # type: ignore[arg-type]
    refund("A-17")  # type: ignore[call-arg]
    refund("A-17", 4200, why="broken")  # type: ignore[call-arg]
    ship(17)  # type: ignore[arg-type]


async def decorated_coroutines_keep_theirs() -> None:
    assert_type(await notify("a@example.org", "hello"), int)
    assert_type(await look_up("A-17"), Receipt)
    await notify("a@example.org")  # type: ignore[call-arg]
    await look_up(17)  # type: ignore[arg-type]


class Shop:
    @guard.once(name="shop.sell")
    def sell(self, item: str) -> Receipt:
        return Receipt(item, 1)


def methods_bind() -> None:
    assert_type(Shop().sell("tea"), Receipt)
    Shop().sell(1)  # type: ignore[arg-type]


def collections_stay_what_they_are() -> None:
    charges: dict[str, Callable[[str, int], Receipt]] = {"charge": charge}
    assert_type(guard.wrap_tools(charges), dict[str, Callable[[str, int], Receipt]])
    mixed: list[Callable[..., Any]] = [charge, send]
    assert_type(guard.wrap_tools(mixed, blocked_return="done"), list[Callable[..., Any]])
    # Unlike functions without an annotation are `builtins.function` to mypy, which is no Callable.
    guard.wrap_tools({"charge": charge, "send": send}, replay=True)


async def a_wrapped_coroutine_stays_one() -> None:
    assert_type(await guard.wrap_tools([send])[0]("a@example.org"), int)


def guards_are_values() -> None:
    isolated = Guard(store=MemoryStore())
    assert_type(isolated, Guard)
    assert_type(isolated(charge, "A-17", 4200), Receipt)
    with guard.workflow("order A-17") as scope:
        assert_type(scope(charge, "A-17", 4200), Receipt)
    assert_type(guard.history(tool="charge"), list[dict[str, Any]])


def a_store_of_ones_own(store: Store, policy: Policy) -> Record | None:
    assert_type(policy.replay, bool)
    try:
        return store.get("3f")
    except LedgerError:
        return None
