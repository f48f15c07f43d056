"""Event loops on the servers' stores: nothing blocks them, nothing is lost when tasks are cancelled."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from ledger import Guard, StoreError
from ledger_stores.base import Pace
from ledger_stores.postgres import PostgresStore
from ledger_stores.redis import RedisStore
from ledger_stores.testing import in_parallel
from tests.actors import eventually
from tests.stores.redis_kit import RedisServer, redis_url
from tests.stores.servers import fresh_namespace, postgres_url


@pytest.fixture(params=["postgres", "redis"])
def guard(request: pytest.FixtureRequest) -> Iterator[Guard]:
    """A guard on a server."""
    namespace = fresh_namespace()
    if request.param == "redis":
        made = Guard(store=RedisStore(redis_url(), namespace=namespace), quiet=True)
    else:
        made = Guard(store=PostgresStore(postgres_url(), namespace=namespace), quiet=True)
    made.defaults(replay=True)
    yield made
    made.close()


runs: Counter[int] = Counter()


@pytest.fixture(autouse=True)
def no_runs() -> None:
    """Each test counts anew."""
    runs.clear()


async def pay(order: int) -> int:
    """A tool that takes a moment."""
    runs[order] += 1
    await asyncio.sleep(0)
    return order


def test_many_tasks_get_each_its_own_answer(guard: Guard) -> None:
    """A hundred at once, some the same: each call runs once, and everybody gets the result of its own."""

    async def work() -> list[int]:
        return await asyncio.gather(*(guard(pay, n % 70) for n in range(100)))

    assert [n % 70 for n in range(100)] == asyncio.run(work())
    assert dict.fromkeys(range(70), 1) == runs


def test_loops_of_several_threads_share_a_store(guard: Guard) -> None:
    """Four loops at once, one after another in each thread: each call runs once."""

    async def work() -> list[int]:
        return await asyncio.gather(*(guard(pay, n) for n in range(30)))

    found = in_parallel(4, lambda _: [asyncio.run(work()) for _ in range(3)])

    assert [[list(range(30))] * 3] * 4 == found
    assert dict.fromkeys(range(30), 1) == runs


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.01])
def test_the_claims_of_cancelled_tasks_are_given_back(guard: Guard, moment: float) -> None:
    """Whenever a task is cancelled: its call is not left running, and the next caller gets it done."""

    async def work() -> list[int]:
        tasks = [asyncio.ensure_future(guard(pay, n)) for n in range(40)]
        await asyncio.sleep(moment)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await asyncio.wait_for(asyncio.gather(*(guard(pay, n) for n in range(40))), 30)

    assert list(range(40)) == asyncio.run(work())
    assert set(range(40)) == set(runs)


def test_a_loop_that_ends_in_the_midst_leaves_no_run_open(guard: Guard) -> None:
    """`asyncio.run` cancels what is under way; another loop then makes the same calls."""

    async def leave() -> None:
        tasks.extend(asyncio.ensure_future(guard(pay, n)) for n in range(20))
        await asyncio.sleep(0)

    async def work() -> list[int]:
        return await asyncio.wait_for(asyncio.gather(*(guard(pay, n) for n in range(20))), 30)

    tasks: list[asyncio.Future[int]] = []
    asyncio.run(leave())

    assert list(range(20)) == asyncio.run(work())


def test_a_loop_that_is_closed_without_a_word_leaves_no_run_open(guard: Guard) -> None:
    """Its tasks are not even cancelled: when they are collected, what was claimed for them is given back."""

    async def work(*orders: int) -> list[int]:
        return await asyncio.gather(*(guard(pay, n) for n in orders))

    def is_given_back() -> bool:
        gc.collect()
        return asyncio.run(work(1)) == [1] and guard.stats()["running"] == 0

    loop = asyncio.new_event_loop()
    loop.run_until_complete(work(1, 2))
    tasks = [loop.create_task(guard(pay, n)) for n in range(3, 20)]
    for _ in range(3):  # their claims are sent
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del loop, tasks

    eventually(is_given_back)
    assert list(range(20)) == asyncio.run(work(*range(20)))


def test_a_forked_child_asks_for_itself(guard: Guard) -> None:
    """After a fork in the midst of async work both sides go on."""

    async def work(*orders: int) -> list[int]:
        return await asyncio.gather(*(guard(pay, n) for n in orders))

    asyncio.run(work(1, 2, 3))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if asyncio.run(work(1, 2, 4)) == [1, 2, 4] and runs[1] == 1 else 2
            guard.close()
        finally:
            os._exit(code)

    assert (pid, 0) == os.waitpid(pid, 0)
    assert [4, 5] == asyncio.run(work(4, 5))
    assert 0 == runs[4]


def test_a_server_that_takes_its_time_does_not_stop_the_loop() -> None:
    """While Redis stands still the loop goes on; the calls are made when it moves again."""
    server = RedisServer()
    guard = Guard(store=RedisStore(server.url, namespace=fresh_namespace()), quiet=True)
    guard.check()

    async def work() -> tuple[int, list[int]]:
        with server.client() as plain:
            plain.execute_command("CLIENT", "PAUSE", "300", "ALL")
        calls = asyncio.gather(*(guard(pay, n) for n in range(10)))
        ticks = 0
        while not calls.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, await calls

    ticks, found = asyncio.run(work())

    assert list(range(10)) == found
    assert ticks >= 5
    guard.close()
    server.close()


def test_scripts_that_were_flushed_are_sent_again() -> None:
    """A restarted Redis knows no script: tasks that ask together do not notice."""
    server = RedisServer()
    guard = Guard(store=RedisStore(server.url, namespace=fresh_namespace()), quiet=True)

    async def work(*orders: int) -> list[int]:
        return await asyncio.gather(*(guard(pay, n) for n in orders))

    asyncio.run(work(1, 2))
    with server.client() as plain:
        plain.script_flush()

    assert [3, 4, 5] == asyncio.run(work(3, 4, 5))
    guard.close()
    server.close()


def test_each_task_is_told_that_the_server_is_gone() -> None:
    """A Redis that went away is an error for all who ask, and none of their tools runs."""
    server = RedisServer()
    guard = Guard(store=RedisStore(server.url, namespace=fresh_namespace(), lock_seconds=1), quiet=True)
    guard.check()
    server.stop()

    async def work() -> list[object]:
        return await asyncio.gather(*(guard(pay, n) for n in range(5)), return_exceptions=True)

    found = asyncio.run(work())

    assert [StoreError] * 5 == [type(error) for error in found]
    assert not runs
    server.start()
    guard.close()
    server.close()


def test_tasks_do_not_need_a_thread_each(guard: Guard) -> None:
    """The loop itself asks for them; a thread helps only where the server takes long."""

    async def work() -> None:
        await asyncio.gather(*(guard(pay, n) for n in range(200)))

    guard.check()
    before = set(threading.enumerate())
    asyncio.run(work())

    made = [thread.name for thread in threading.enumerate() if thread not in before]
    assert sum(name.startswith("ledger-async") for name in made) < 10


@pytest.mark.parametrize("size", [100, 70_000, 3_000_000])
def test_what_is_larger_than_a_socket_takes_at_once_arrives(guard: Guard, size: int) -> None:
    """Results of any size are written and read back, beside small ones."""

    async def tell(order: int) -> str:
        return str(order) * (size if order % 2 else 1)

    async def work() -> list[str]:
        return await asyncio.gather(*(guard(tell, n) for n in range(4)))

    expected = ["0", "1" * size, "2", "3" * size]
    assert [expected, expected] == [asyncio.run(work()), asyncio.run(work())]


class Loop:
    """Eight tasks of an event loop on a clock of the test's."""

    def __init__(self) -> None:
        self.time = self.worked = 0.0
        self.pace = Pace(2, lambda: self.time, lambda: self.worked)

    def goes_on(self, *, works: float, waits: float) -> None:
        """All tasks are told and ask again, so often that what was before does not count."""
        for _ in range(100):
            self.pace.all_asked()
            self.worked += works
            self.time += works + waits
            self.pace.answered(8, 0)


@pytest.mark.parametrize(
    ("works", "waits", "talks", "enough"),
    [(1.0, 0.1, 2, 4), (1.0, 1.9, 2, 4), (1.0, 2.1, 1, 8), (0.1, 5.0, 1, 8)],
)
def test_a_loop_asks_in_halves_as_long_as_it_does_not_mostly_wait(
    works: float, waits: float, talks: int, enough: int
) -> None:
    """Beside a quick server the loop works on the other half; one with a slow disk is asked all at once."""
    loop = Loop()

    loop.goes_on(works=works, waits=waits)

    assert (talks, enough) == (loop.pace.talks, loop.pace.enough)


def test_a_loop_changes_its_pace_with_its_server() -> None:
    """A disk that was slow for a while is not held against the server."""
    loop = Loop()
    loop.goes_on(works=0.1, waits=5.0)

    loop.goes_on(works=1.0, waits=0.1)

    assert 2 == loop.pace.talks


def test_a_half_is_that_of_all_who_ask() -> None:
    """Whoever waits for the other answer counts, and whoever was told at the same moment."""
    loop = Loop()
    loop.goes_on(works=1.0, waits=0.1)
    loop.pace.all_asked()

    loop.pace.answered(3, 5)
    first = loop.pace.enough
    loop.pace.answered(5, 0)

    assert [4, 4] == [first, loop.pace.enough]


def test_tasks_that_ask_in_halves_run_each_call_once() -> None:
    """Eight of them on Redis, of which two are cancelled in the midst: only what these did is in doubt."""
    guard = Guard(store=RedisStore(redis_url(), namespace=fresh_namespace()), quiet=True)
    guard.defaults(replay=True)

    async def caller(first: int, half_done: asyncio.Event) -> None:
        for n in range(first, 400, 8):
            await guard(pay, n)
            if n >= 200:
                half_done.set()

    async def cut_short() -> None:
        half_done = asyncio.Event()
        tasks = [asyncio.ensure_future(caller(n, half_done)) for n in range(8)]
        await half_done.wait()
        tasks[0].cancel()
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def all_again() -> None:
        await asyncio.gather(*(guard(pay, n) for n in range(400)))

    asyncio.run(cut_short())
    asyncio.run(all_again())

    assert (400, 0) == (guard.stats()["executed"], guard.stats()["running"])
    assert 400 <= sum(runs.values()) <= 402
    guard.close()
