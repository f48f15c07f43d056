"""The ledger for asyncio: the same names, a loop that never waits, no claim lost to a cancelled caller."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger import MemoryStore
from ledger_tasks import AsyncTaskLedger, Claim, Task, TaskLedger, TaskState
from ledger_tasks.book import TaskStore
from ledger_tasks.sqlite import SqliteTaskStore
from tests.actors import Stage, eventually, stage

_S = TaskState
#: holds the write lock of a ledger until it is told to let go
LOCK_HOLDER = """
import sqlite3
db = sqlite3.connect(DB, isolation_level=None)
db.execute("BEGIN IMMEDIATE")
say("locked")
hear()
db.execute("COMMIT")
"""


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Stage]:
    """Real processes around a file."""
    with stage(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def opened(where: Any = "memory://") -> AsyncIterator[AsyncTaskLedger]:
    """A ledger that is closed at the end."""
    async with AsyncTaskLedger(where, agent="ann") as tasks:
        yield tasks


def public(thing: object) -> set[str]:
    """The names that users see."""
    return {name for name in dir(thing) if not name.startswith("_")}


def test_it_has_the_names_of_the_ledger() -> None:
    """Whatever `TaskLedger` can do, this can, under the same name."""
    plain = TaskLedger("memory://", agent="ann", source="test", lease=7)
    made = AsyncTaskLedger(plain)

    assert public(plain) == public(made)
    assert ("ann", "main", "test", 7) == (made.agent, made.session, made.source, made.lease)
    assert "AsyncTaskLedger(ann:main)" == repr(made)
    plain.close()


def test_signatures_and_docstrings_are_those_of_the_ledger() -> None:
    """A reader, an editor and a type checker see the parameters that there are."""
    for name in public(TaskLedger):
        theirs, ours = getattr(TaskLedger, name), getattr(AsyncTaskLedger, name)
        if callable(theirs):
            parameters = [*inspect.signature(theirs).parameters.values()][1:]
            mine = [*inspect.signature(ours).parameters.values()][1:]
            assert [p.name for p in parameters] == [p.name for p in mine], name
            assert ours.__doc__, name


def test_a_task_from_its_creation_to_its_end() -> None:
    """Adding, claiming, working and looking, all awaited."""

    async def program() -> None:
        async with opened() as tasks:
            await tasks.add_tasks([Task("a"), {"id": "b", "dependencies": ["a"]}])
            claim = await tasks.claim_next(lease=30)
            assert claim is not None
            await tasks.start(claim)
            assert await tasks.heartbeat(claim)
            await tasks.progress(claim, 0.5, "half")
            await tasks.complete(claim, "sent", tokens=5)

            assert ["a", "b"] == [task.id async for task in tasks]
            assert ["b"] == [task.id async for task in tasks.tasks(state="pending")]
            assert ["created", "moved", "moved", "progress", "moved"] == [
                e.kind async for e in tasks.events("a")
            ]
            assert {_S.DONE: 1, _S.PENDING: 1} == await tasks.counts()
            assert ["b"] == [task.id for task in await tasks.get_available()]
            assert [["b"]] == [[task.id for task in wave] for wave in await tasks.waves()]
            assert 5 == (await tasks.metrics()).total.tokens

    asyncio.run(program())


def test_errors_come_out_of_await() -> None:
    """What the ledger refuses is raised where it is awaited."""

    async def program() -> None:
        async with opened() as tasks:
            await tasks.add_task("a")
            for wrong in (tasks.complete("a"), tasks.add_task("a"), tasks.get("nobody")):
                with pytest.raises(Exception, match=r"nothing was|there is no task"):
                    await wrong

    asyncio.run(program())


def test_another_session_is_a_ledger_of_its_own() -> None:
    """In the same store, and seen only where it is asked for."""

    async def program() -> None:
        async with opened() as tasks:
            other = await tasks.in_session("other")
            await other.add_task("a")
            assert ("other", {}) == (other.session, await tasks.counts())
            assert ["a"] == [task.id async for task in tasks.tasks(all_sessions=True)]
            await other.close()

    asyncio.run(program())


def test_a_listing_of_several_pages_is_whole() -> None:
    """An async iterator reads a page at a time and loses nothing between two."""

    async def program() -> None:
        async with opened() as tasks:
            await tasks.add_tasks([Task(f"t{n}") for n in range(1_203)])
            assert [f"t{n}" for n in range(1_203)] == [task.id async for task in tasks]

    asyncio.run(program())


async def ticks_during(work: Coroutine[Any, Any, Any], until: Callable[[], None], count: int = 50) -> None:
    """Let the loop tick so often while the work waits; `until` then lets it go on."""
    task = asyncio.ensure_future(work)
    for _ in range(count):
        await asyncio.sleep(0.002)
        assert not task.done(), "it did not wait, so nothing was proved"
    until()
    await task


@pytest.mark.slow
@pytest.mark.parametrize("what", ["add", "claim", "deliver"])
def test_the_loop_ticks_while_another_process_holds_the_store(scene: Stage, what: str) -> None:
    """A lock that somebody else holds is waited for off the loop."""

    async def program() -> None:
        async with opened(scene.db) as tasks:
            await tasks.add_task("first")
            holder = scene.start(LOCK_HOLDER)
            assert "locked" == await asyncio.to_thread(holder.line)
            work: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "add": lambda: tasks.add_task("second"),
                "claim": tasks.claim_next,
                "deliver": lambda: tasks.deliver(print, recipient="bob", key="a"),
            }
            await ticks_during(work[what](), lambda: holder.tell("let go"))
            await asyncio.to_thread(holder.ends_well)

    asyncio.run(program())


class Gate(TaskStore):
    """A store whose writes wait at a gate."""

    def __init__(self, *, after: bool) -> None:
        self._tasks = SqliteTaskStore(MemoryStore())
        self.address = self._tasks.address
        self.arrived, self.open = threading.Event(), threading.Event()
        self._after = after
        self.open.set()

    def read(self, session: str, look: Callable[[Any], Any]) -> Any:
        return self._tasks.read(session, look)

    def write(self, session: str, work: Callable[[Any], Any], *, durable: bool = True) -> Any:
        if self._after:
            answer = self._tasks.write(session, work, durable=durable)
            self._wait()
            return answer
        self._wait()
        return self._tasks.write(session, work, durable=durable)

    def _wait(self) -> None:
        self.arrived.set()
        assert self.open.wait(30)

    def calls(self) -> Any:
        return self._tasks.calls()

    def close(self) -> None:
        self._tasks.close()


@pytest.mark.parametrize("after", [False, True], ids=["before the commit", "after the commit"])
def test_a_claim_granted_to_a_cancelled_caller_is_given_back(after: bool) -> None:
    """Nobody would ever start it: it is offered again at once, not when its lease lapses."""
    gate = Gate(after=after)

    async def program() -> None:
        async with opened(gate) as tasks:
            await tasks.add_task("a")
            gate.arrived.clear()
            gate.open.clear()
            claiming = asyncio.ensure_future(tasks.claim_next())
            await asyncio.to_thread(gate.arrived.wait, 30)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            gate.open.set()
            await asyncio.to_thread(
                eventually, lambda: "its caller was cancelled" in TaskLedger(gate).get("a").reason
            )
            assert isinstance(await tasks.claim_next(), Claim)

    asyncio.run(program())


def test_a_claim_that_was_not_begun_is_never_made() -> None:
    """Cancelled while all threads are busy, it is taken out of the queue."""
    gate = Gate(after=False)

    async def program() -> None:
        async with opened(gate) as tasks:
            await tasks.add_task("a")
            gate.open.clear()
            busy = [asyncio.ensure_future(tasks.add_task(f"b{n}", priority=1)) for n in range(8)]
            claiming = asyncio.ensure_future(tasks.claim_next())
            await asyncio.sleep(0)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            gate.open.set()
            await asyncio.gather(*busy)
            assert ["created"] == [event.kind async for event in tasks.events("a")]

    asyncio.run(program())


def test_many_claims_at_once_get_different_tasks() -> None:
    """Forty claims of twenty tasks in one loop: each task once, the rest nothing."""

    async def program() -> None:
        async with opened() as tasks:
            await tasks.add_tasks([Task(f"t{n}") for n in range(20)])
            claims = await asyncio.gather(*(tasks.claim_next() for _ in range(40)))
            assert sorted(f"t{n}" for n in range(20)) == sorted(c.id for c in claims if c is not None)

    asyncio.run(program())


def test_a_subscriber_sees_what_happens() -> None:
    """From now on, or after a number; it ends when its loop is left."""

    async def program() -> None:
        async with opened() as tasks:
            await tasks.add_task("before")
            seen: asyncio.Queue[str] = asyncio.Queue()

            async def listen(after: int | None) -> None:
                async with contextlib.aclosing(tasks.subscribe(after, every=0.005)) as events:
                    async for event in events:
                        await seen.put(f"{event.task} {event.kind}")

            late = asyncio.ensure_future(listen(1))
            early = asyncio.ensure_future(listen(0))
            assert "before created" == await asyncio.wait_for(seen.get(), 30)
            await tasks.add_task("now")
            assert ["now created"] * 2 == [await asyncio.wait_for(seen.get(), 30) for _ in range(2)]
            for listener in (late, early):
                listener.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await listener

    asyncio.run(program())


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_delivery_may_be_sent_by_either_kind_of_function(kind: str) -> None:
    """A coroutine function runs in the loop of its caller, once."""
    sent: list[str] = []

    def plain() -> None:
        sent.append("plain")

    async def in_loop() -> None:
        assert asyncio.get_running_loop() is loops[0]
        sent.append("async")

    loops: list[Any] = []

    async def program() -> None:
        loops.append(asyncio.get_running_loop())
        async with opened() as tasks:
            send = plain if kind == "plain" else in_loop
            assert (await tasks.deliver(send, recipient="bob", key="a", cooldown=60)).sent
            assert "suppressed" == (await tasks.deliver(send, recipient="bob", key="a")).outcome
            assert not await tasks.should_deliver(recipient="bob", key="b", cooldown=60)
            assert ["sent", "suppressed"] == [one.outcome for one in await tasks.deliveries()]

    asyncio.run(program())
    assert [kind] == sent


def test_a_loop_that_ends_in_the_midst_of_a_delivery_leaves_a_doubt() -> None:
    """Nobody knows what an interrupted coroutine had sent: it is not sent again."""
    plain = TaskLedger("memory://", agent="ann")

    async def program() -> None:
        begun = asyncio.Event()

        async def send() -> None:
            begun.set()
            await asyncio.Event().wait()

        tasks = AsyncTaskLedger(plain)
        delivering = asyncio.ensure_future(tasks.deliver(send, recipient="bob", key="a"))
        await begun.wait()
        assert not delivering.done()

    asyncio.run(program())
    assert ["in_doubt"] == [one.outcome for one in plain.deliveries()]
    assert not plain.should_deliver(recipient="bob", key="a")
    plain.close()


def test_a_closed_ledger_opens_again(tmp_path: Path) -> None:
    """Its threads are ended by close, and come back with the next use."""

    async def program() -> None:
        tasks = AsyncTaskLedger(tmp_path / "ledger.db", agent="ann")
        await tasks.add_task("a")
        await tasks.close()
        assert 1 == sum((await tasks.counts()).values())
        await tasks.close()

    asyncio.run(program())
    eventually(lambda: not any(t.name.startswith("ledger-tasks") for t in threading.enumerate()))


def test_two_loops_share_one_ledger() -> None:
    """It belongs to no loop: a second one, in another thread, may use it too."""
    made = AsyncTaskLedger("memory://", agent="ann")

    def add(name: str) -> None:
        asyncio.run(made.add_task(name))

    with ThreadPoolExecutor() as pool:
        [*pool.map(add, ["a", "b", "c"])]
    assert {_S.PENDING: 3} == asyncio.run(made.counts())
    asyncio.run(made.close())
