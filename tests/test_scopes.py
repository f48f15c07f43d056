"""Workflows and callers: how far a scope reaches, and where it ends."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ledger import Guard, MemoryStore, UsageError


class Tool:
    """A guard in memory with one tool that counts its runs."""

    def __init__(self, **options: Any) -> None:
        self.guard = Guard(store=MemoryStore(), quiet=True, **options)
        self.runs: list[int] = []

    def __ledger_key__(self) -> str:
        return "tool"

    def charge(self, order: int) -> int:
        self.runs.append(order)
        return order

    def __call__(self) -> str:
        """Ask once more, and say in which workflow that was."""
        return self.guard.call(self.charge, 1).record.wf

    def workflows(self) -> list[str]:
        return [call["wf"] for call in self.guard.history()]


@pytest.fixture
def tool() -> Tool:
    """A tool under a guard of its own."""
    return Tool()


def in_thread(act: Callable[[], Any]) -> Any:
    """What a new thread gets."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join(30)
    return found[0]


def test_without_a_scope_the_workflow_is_default(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that say nothing of a workflow are in the one called default."""
    monkeypatch.delenv("LEDGER_WORKFLOW", raising=False)

    assert tool() == "default"


def test_the_environment_names_the_workflow(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """LEDGER_WORKFLOW is read when first needed, and then stays."""
    monkeypatch.setenv("LEDGER_WORKFLOW", "from-outside")
    first = tool()
    monkeypatch.setenv("LEDGER_WORKFLOW", "too-late")

    assert (first, tool()) == ("from-outside", "from-outside")


def test_a_guard_may_have_a_workflow_of_its_own() -> None:
    """Guard(workflow=…) is the workflow where no scope is set."""
    tool = Tool(workflow="mine")

    assert tool() == "mine"


def test_the_same_call_runs_once_per_workflow(tool: Tool) -> None:
    """The same arguments in another workflow are another call."""
    for name in ("a", "a", "b"):
        tool.guard.workflow(name)
        tool.guard(tool.charge, 1)

    assert (tool.runs, tool.workflows()) == ([1, 1], ["a", "b"])


def test_a_bare_workflow_holds_from_then_on(tool: Tool) -> None:
    """The bare call sets the scope of this thread until another is set."""
    tool.guard.workflow("a")

    assert [tool(), tool()] == ["a", "a"]


def test_a_with_block_ends_the_workflow(tool: Tool) -> None:
    """In `with` the scope ends with the block, also when the block raises."""
    tool.guard.workflow("outer")
    with tool.guard.workflow("inner"):
        inside = tool()
    after = tool()
    with pytest.raises(ValueError, match="x"), tool.guard.workflow("inner"):
        raise ValueError("x")

    assert (inside, after, tool()) == ("inner", "outer", "outer")


def test_with_blocks_nest(tool: Tool) -> None:
    """Each block gives back the scope that was there before it."""
    found = []
    with tool.guard.workflow("a"):
        with tool.guard.workflow("b"):
            with tool.guard.workflow("c"):
                found.append(tool())
            found.append(tool())
        found.append(tool())

    assert (found, tool()) == (["c", "b", "a"], "default")


def test_a_scope_is_callable_like_the_guard(tool: Tool) -> None:
    """scope(fn, …) runs fn in that scope and leaves the scope of others alone."""
    with tool.guard.workflow("a") as scope:
        pass

    values = [scope(tool.charge, 1), scope(tool.charge, order=1), scope(tool.charge, 2, key="k")]

    assert (values, tool.workflows()) == ([1, None, 2], ["a", "a"])
    assert tool() == "default"


def test_an_async_tool_runs_in_a_callable_scope(tool: Tool) -> None:
    """Await scope(async_fn, …) is in that scope too, also when it is awaited after the block."""

    async def send(to: str) -> str:
        return to

    async def main() -> str:
        with tool.guard.workflow("a") as scope:
            pending = scope(send, "x")
        return await pending

    assert asyncio.run(main()) == "x"
    assert tool.workflows() == ["a"]


def test_tools_called_by_a_tool_are_in_its_scope(tool: Tool) -> None:
    """What a tool calls through the guard is in the workflow in which the tool itself runs."""

    def outer() -> str:
        return tool()

    async def outer_async() -> str:
        await asyncio.sleep(0)
        return tool()

    with tool.guard.workflow("a") as scope:
        pass

    assert scope(outer) == "a"
    assert asyncio.run(scope(outer_async)) == "a"
    assert tool() == "default"


def test_one_call_before_a_pool_is_enough(tool: Tool) -> None:
    """A scope made in the main thread is what threads use that have set none, older ones too."""
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(tool).result()
        tool.guard.workflow("a")
        after = pool.submit(tool).result()

    assert (before, after, in_thread(tool)) == ("default", "a", "a")


def test_a_threads_own_scope_is_its_own(tool: Tool) -> None:
    """A thread that sets a scope keeps it to itself."""
    tool.guard.workflow("main")

    def act() -> tuple[str, str]:
        tool.guard.workflow("thread")
        return tool(), in_thread(tool)

    assert in_thread(act) == ("thread", "main")
    assert tool() == "main"


def test_with_in_the_main_thread_reaches_threads_until_its_end(tool: Tool) -> None:
    """Threads see the main thread's block while it lasts, and not afterwards."""
    with tool.guard.workflow("a"):
        during = in_thread(tool)

    assert (during, in_thread(tool)) == ("a", "default")


def test_tasks_inherit_and_do_not_leak(tool: Tool) -> None:
    """A task starts with its maker's scope; what it sets itself stays in it and in its own tasks."""

    async def child() -> list[str]:
        inherited = tool()
        tool.guard.workflow("child")
        return [inherited, tool(), await asyncio.create_task(grandchild())]

    async def grandchild() -> str:
        return tool()

    async def main() -> tuple[list[str], str]:
        tool.guard.workflow("parent")
        return await asyncio.create_task(child()), tool()

    assert asyncio.run(main()) == (["parent", "child", "child"], "parent")


def test_made_in_a_running_loop_it_is_the_tasks_alone(tool: Tool) -> None:
    """A scope made inside a running loop reaches neither other tasks nor plain threads."""

    async def one(id: str) -> tuple[str, str]:
        tool.guard.workflow(id)
        await asyncio.sleep(0.01)
        return tool(), in_thread(tool)

    async def main() -> list[tuple[str, str]]:
        return list(await asyncio.gather(one("a"), one("b")))

    assert asyncio.run(main()) == [("a", "default"), ("b", "default")]
    assert tool() == "default"


def test_to_thread_carries_the_tasks_scope(tool: Tool) -> None:
    """asyncio.to_thread works in the scope of the task that awaits it."""

    async def main() -> str:
        async with tool.guard.workflow("a"):
            return await asyncio.to_thread(tool)

    assert asyncio.run(main()) == "a"


def test_two_guards_have_scopes_of_their_own(tool: Tool) -> None:
    """A workflow set on one guard says nothing about another."""
    other = Tool()

    tool.guard.workflow("a")

    assert (tool(), other()) == ("a", "default")


def test_as_caller_names_who_asked(tool: Tool) -> None:
    """as_caller is in the records, scoped like a workflow, and is no part of the call's identity."""
    with tool.guard.as_caller("planner"):
        tool.guard(tool.charge, 1)
    with tool.guard.as_caller("critic") as critic:
        tool.guard(tool.charge, 1)
    critic(tool.charge, 2)
    tool.guard(tool.charge, 3)

    first, second, third = (call["caller"] for call in tool.guard.history())
    assert (tool.runs, first, second) == ([1, 2, 3], "planner", "critic")
    assert third.startswith("pid ")
    blocked = [e["caller"] for e in tool.guard.events() if e["kind"] == "blocked"]
    assert blocked == ["critic"]


def test_reset_of_a_scope_forgets_its_calls_alone(tool: Tool) -> None:
    """scope.reset() lets the calls of that workflow run anew, and no others."""
    with tool.guard.workflow("a") as a:
        tool()
    with tool.guard.workflow("b"):
        tool()

    a.reset()

    assert tool.workflows() == ["b"]


@pytest.mark.parametrize("id", ["", None, 7])
def test_a_workflow_without_a_name_is_refused(tool: Tool, id: Any) -> None:
    """An empty id would put strangers into one workflow."""
    with pytest.raises(UsageError, match="names no workflow"):
        tool.guard.workflow(id)
