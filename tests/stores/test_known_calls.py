"""What a process remembers of calls that succeeded decides how it asks again, never what is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from ledger import Guard
from ledger_stores.postgres import PostgresStore
from ledger_stores.redis import RedisStore
from tests.stores.redis_kit import redis_url
from tests.stores.servers import fresh_namespace, postgres_url

Open = Callable[[], Guard]


@pytest.fixture(params=["postgres", "redis"])
def open_guard(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens guards that share one namespace but nothing in this process."""
    namespace, made = fresh_namespace(), []

    def another() -> Guard:
        on_redis = request.param == "redis"
        store = (RedisStore if on_redis else PostgresStore)(
            redis_url() if on_redis else postgres_url(), namespace=namespace
        )
        made.append(Guard(store=store, quiet=True))
        made[-1].defaults(replay=True)
        return made[-1]

    yield another
    for guard in made:
        guard.close()


def number(order: int) -> int:
    """A tool that says how often it ran."""
    runs.append(order)
    return len(runs)


runs: list[int] = []


@pytest.fixture(autouse=True)
def no_runs() -> None:
    """Each test counts anew."""
    runs.clear()


@pytest.mark.parametrize("how", ["reset", "retry"])
def test_what_others_allow_to_run_again_runs_again(open_guard: Open, how: str) -> None:
    """A reset or a release by another process counts at once where the call was made and asked for."""
    here, there = open_guard(), open_guard()
    before = [here(number, 7), here(number, 7)]

    there.reset() if how == "reset" else there.retry(number, 7)

    assert [1, 1] == before
    assert [2, 2, 2] == [here(number, 7), here(number, 7), there(number, 7)]


def test_a_call_made_anew_by_others_gives_their_result(open_guard: Open) -> None:
    """The result of the call as it is now, not of the run that was remembered."""
    here, there = open_guard(), open_guard()
    here(number, 7)
    there.reset()

    assert [2, 2, 2] == [there(number, 7), here(number, 7), here(number, 7)]


def test_blocked_duplicates_are_counted_alike(open_guard: Open) -> None:
    """Whether the claim or a plain read answered: each duplicate is an attempt and an event."""
    here, there = open_guard(), open_guard()
    for guard in (here, here, here, there, there):
        guard(number, 7)
    for guard in (here, there):
        guard.flush()

    sums = here.stats()
    assert (1, 5, 1, 4) == tuple(sums[n] for n in ("actions", "attempts", "executed", "blocked"))
    assert 4 == sum(e["n"] for e in here.events() if e["kind"] == "blocked")


def test_a_forced_run_is_asked_for_by_its_claim(open_guard: Open) -> None:
    """`force` runs what is known to be done, and the next duplicate gets the newer result."""
    here = open_guard()
    here(number, 7)

    assert [2, 2] == [here.force(number, 7), here(number, 7)]


def test_async_duplicates_see_a_reset(open_guard: Open) -> None:
    """The same from an event loop."""
    here, there = open_guard(), open_guard()

    async def tell(order: int) -> int:
        return number(order)

    async def work() -> list[int]:
        before = [await here(tell, 7), await here(tell, 7)]
        await asyncio.to_thread(there.reset)
        return [*before, await here(tell, 7), await here(tell, 7)]

    assert [1, 1, 2, 2] == asyncio.run(work())


def test_duplicates_that_are_asked_together_get_each_their_own_answer(open_guard: Open) -> None:
    """Of many that tasks ask for at once those that others released run again, and only those."""
    here, there = open_guard(), open_guard()

    async def tell(order: int) -> int:
        return order * 1000 + number(order)

    async def ask(*orders: int) -> list[int]:
        return await asyncio.gather(*(here(tell, n) for n in orders))

    before = asyncio.run(ask(*range(40)))
    for order in range(0, 40, 4):
        there.retry(tell, order)
    after = asyncio.run(ask(*range(40), 1, 1, 2))

    changed = [n for n in range(40) if before[n] != after[n]]
    assert list(range(0, 40, 4)) == changed
    assert [before[1], before[1], before[2]] == after[40:]
    assert 50 == len(runs)
