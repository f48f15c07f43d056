"""Wrapping: a guarded tool looks like the tool, and what cannot be guarded is refused with advice."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections import OrderedDict, UserDict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, NamedTuple
from unittest.mock import Mock

import pytest
from langchain_core.tools import StructuredTool

from ledger import Guard, MemoryStore, PolicyError, Record, UsageError, tell_model


def memory() -> Guard:
    """A guard of its own."""
    return Guard(store=MemoryStore(), quiet=True)


class Order:
    pass


def charge(order: str, cents: Annotated[int, "in cents"] = 100, *, when: Order | None = None) -> list[str]:
    """Charge an order."""
    return [order]


async def send(to: str) -> str:
    """Send something."""
    return to


def numbers(n: int) -> Iterator[int]:
    """A generator."""
    yield n


async def numbers_async(n: int) -> AsyncIterator[int]:
    """An async generator."""
    yield n


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A context manager."""
    yield


@contextlib.asynccontextmanager
async def session_async() -> AsyncIterator[None]:
    """An async context manager."""
    yield


class Numbers:
    def __call__(self, n: int) -> Iterator[int]:
        yield n

    def of(self, n: int) -> Iterator[int]:
        yield n


class Kit(NamedTuple):
    charge: Callable[..., Any]
    send: Callable[..., Any]


def test_signature_doc_and_annotations_are_kept() -> None:
    """A decorated tool shows its name, text and parameters, with string annotations resolved."""
    once: Any = memory().once(charge)

    assert (once.__name__, once.__doc__, once.__module__) == ("charge", "Charge an order.", __name__)
    assert once.__annotations__ == {
        "order": str, "cents": Annotated[int, "in cents"], "when": Order | None, "return": list[str],
    }  # fmt: skip
    assert inspect.signature(once).parameters["cents"].annotation == Annotated[int, "in cents"]
    assert inspect.signature(once).return_annotation == list[str]
    assert typing.get_type_hints(once)["when"] == Order | None


def test_annotations_that_cannot_be_resolved_stay_text() -> None:
    """A name that exists only for type checkers does no harm."""

    def tool(n: Missing) -> int:  # type: ignore[name-defined]  # noqa: F821 - that is the case
        return 1

    once = memory().once(tool)

    assert str(inspect.signature(once)) == "(n: 'Missing') -> 'int'"


def test_what_has_no_signature_is_wrapped_too() -> None:
    """A builtin that tells nothing about itself runs once."""
    once: Any = memory().once(max)

    assert [once(1, 2), once(1, 2)] == [2, None]


async def run_async(once: Any) -> list[Any]:
    """Two calls of an async tool."""
    return [await once("a"), await once("a")]


@pytest.mark.parametrize("fn", [send, functools.partial(send)], ids=["function", "partial"])
def test_async_tools_stay_async(fn: Any) -> None:
    """A decorated coroutine function is one."""
    import asyncio

    once: Any = memory().once(fn)

    assert inspect.iscoroutinefunction(once)
    assert asyncio.run(run_async(once)) == ["a", None]


def test_methods_of_every_kind_are_decorated_in_their_class() -> None:
    """Instance, class and static methods run once, whichever decorator stands first."""
    guard = memory()

    class Shop:
        @guard.once
        def one(self, n: int) -> str:
            return f"one {n}"

        @classmethod
        @guard.once
        def two(cls, n: int) -> str:
            return f"two {n}"

        @guard.once
        @classmethod
        def three(cls, n: int) -> str:
            return f"three {n}"

        @staticmethod
        @guard.once
        def four(n: int) -> str:
            return f"four {n}"

        @guard.once
        @staticmethod
        def five(n: int) -> str:
            return f"five {n}"

    shop: Any = Shop()
    tools = [shop.one, shop.two, shop.three, shop.four, shop.five]

    assert [tool(1) for tool in tools] == [
        "one 1", "two 1", "three 1", "four 1", "five 1",
    ]  # fmt: skip

    assert [guard(tool, 1) for tool in tools] == [None] * 5


def test_objects_and_partials_are_wrapped() -> None:
    """A callable object and a partial keep what they carry."""

    class Tool:
        """A tool."""

        def __call__(self, n: int) -> int:
            return n + 1

    guard = memory()
    made: Any = guard.once(Tool())
    part: Any = guard.once(functools.partial(charge, "a"))

    assert [made(1), made(1), made.__name__, made.__doc__] == [2, None, "Tool", "A tool."]
    assert [part(), guard(charge, "a")] == [["a"], None]
    assert guard(functools.partial(made), 1) is None


def test_a_mock_is_a_tool() -> None:
    """A stand-in of a user's test is guarded like a function."""
    tool = Mock(return_value="sent")
    guard = memory()

    assert [guard(tool, 1), guard(tool, 1)] == ["sent", None]
    assert tool.call_count == 1


@pytest.mark.parametrize(
    "tools",
    [
        {"charge": charge, "send": send},
        OrderedDict(charge=charge, send=send),
        [charge, send],
        (charge, send),
        Kit(charge, send),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_collection_keeps_its_kind(tools: Any) -> None:
    """`wrap_tools` answers with the same kind, the same names and the same order."""
    wrapped = memory().wrap_tools(tools)
    inside = list(wrapped.values()) if isinstance(wrapped, dict) else list(wrapped)

    assert type(wrapped) is type(tools)
    assert [t.__name__ for t in inside] == ["charge", "send"]
    assert charge in (tools.values() if isinstance(tools, dict) else tools)


def test_wrapping_twice_guards_once() -> None:
    """A tool that is guarded already is left as it is, and counted once."""
    guard = memory()
    once = guard.wrap_tools(guard.wrap_tools([guard.once(charge)]))
    once[0]("a")

    assert guard.once(once[0]) is once[0]
    assert guard.stats()["attempts"] == 1


def test_options_for_a_guarded_tool_are_refused() -> None:
    """Options that would be lost are an error that says where to put them."""
    guard = memory()
    with pytest.raises(UsageError, match=r"charge is guarded already; use guard\.policy"):
        guard.once(replay=True)(guard.once(charge))


LC = StructuredTool.from_function(charge, name="charge", description="Charge an order.")
REFUSED: dict[str, tuple[Any, str]] = {
    "generator": (numbers, "numbers is a generator.*guard the function that consumes it"),
    "async generator": (numbers_async, "numbers_async is an async generator"),
    "generator method": (Numbers().of, "Numbers.of is a generator"),
    "generator object": (Numbers(), "Numbers is a generator"),
    "generator partial": (functools.partial(numbers, 1), "is a generator"),
    "static generator": (staticmethod(numbers), "is a generator"),
    "context manager": (session, "session is a context manager.*inside its with block"),
    "async context manager": (session_async, "session_async is a context manager"),
    "text": ("charge", r"'charge' \(str\) is not callable; pass the function"),
    "None": (None, r"None \(NoneType\) is not callable"),
    "langchain tool": (LC, "charge.* pass the function itself|charge is a tool object of langchain_core"),
}


@pytest.mark.parametrize(("fn", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_run_once_is_refused(fn: Any, message: str) -> None:
    """The message says what it is and what to wrap instead."""
    with pytest.raises(UsageError, match=message):
        memory().wrap_tools([fn])


def test_a_callable_tool_object_is_refused() -> None:
    """A framework's tool that can be called says to guard the function first."""

    class Tool:
        name = "charge"
        description = "Charge an order."
        inputs: typing.ClassVar[dict[str, Any]] = {}

        def __call__(self, order: str) -> str:
            return order

    with pytest.raises(UsageError, match=r"charge is a tool object of .*guard the function first"):
        memory()(Tool(), "a")


@pytest.mark.parametrize(
    "tools", [charge, {charge}, UserDict(), None], ids=["function", "set", "UserDict", "None"]
)
def test_what_is_no_collection_is_refused(tools: Any) -> None:
    """`wrap_tools` says what it takes."""
    with pytest.raises(UsageError, match=r"takes a dict or a list of functions.*use guard\.once"):
        memory().wrap_tools(tools)


def test_blocked_return_is_a_value_that_is_not_shared() -> None:
    """Each blocked caller gets a copy of its own."""
    tool: Any
    [tool] = memory().wrap_tools([charge], blocked_return={"done": []})
    tool("a")
    blocked: list[Any] = [tool("a"), tool("a")]
    blocked[0]["done"].append(1)

    assert blocked[1] == {"done": []}
    assert tool("a") == {"done": []}


def test_blocked_return_is_a_function_of_the_record() -> None:
    """A function gets the record, blocked attempts counted."""
    seen: list[Record] = []
    tool: Any
    [tool] = memory().wrap_tools([charge], blocked_return=lambda r: seen.append(r) or "blocked")  # type: ignore[func-returns-value]
    tool("a")

    assert (tool("a"), seen[0].short, seen[0].blocked, seen[0].result) == ("blocked", "charge", 1, ["a"])


def test_tell_model_says_what_was_done() -> None:
    """A model reads when it was done and with which result."""
    guard = memory()
    [tool] = guard.wrap_tools([charge], blocked_return=tell_model)
    tool("a")
    guard.policy(send, record="no-result")

    assert "already done at " in str(tool("a"))
    assert str(tool("a")).endswith('; result: ["a"]')


def test_tell_model_has_words_for_every_state() -> None:
    """A model is told to wait for a running call, and to ask a person about one in doubt."""
    guard = memory()
    told: list[str] = []

    def tool(n: int) -> None:
        told.append(str(guard(tool, n)))
        raise KeyboardInterrupt

    guard.policy(tool, blocked_return=tell_model, on_doubt="block", record="nothing")
    with pytest.raises(KeyboardInterrupt):
        guard(tool, 1)
    told.append(tell_model(guard.call(charge, "a").record))
    record = next(iter(r for r in guard._ready().all() if r.in_doubt))

    assert told[0].startswith("already running since ")
    assert tell_model(record).endswith("do not repeat it, ask a person")
    assert tell_model(record._replace(in_doubt=False, status=type(record.status).SUCCESS)).endswith(
        "repeat it"
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"replya": True}, "no policy option 'replya'; did you mean 'replay'"),
    "unknown": ({"zzz": 1}, "no policy option 'zzz'; the options are unlimited, replay"),
    "max zero": ({"max": 0}, "max=0 is not a whole number from 1 on"),
    "max bool": ({"max": True}, "max=True is not"),
    "ttl": ({"ttl": -1}, "ttl=-1 is not a positive number"),
    "ttl text": ({"ttl": "1"}, "ttl='1' is not a positive number"),
    "timeout": ({"timeout": None}, "timeout=None is not a positive number of seconds"),
    "timeout NaN": ({"timeout": float("nan")}, "timeout=nan is not a positive number of seconds"),
    "record": ({"record": "some"}, "record='some' is not all, no-result"),
    "on_doubt": ({"on_doubt": "retry"}, "on_doubt='retry' is not 'rerun', 'block' or a function"),
    "empty key": ({"key": []}, r"key=\[\] is not a list of parameters"),
    "key type": ({"key": 5}, "key=5 is not a list of parameters"),
    "ignore type": ({"ignore": 5}, "ignore=5 is not a list of names"),
    "name": ({"name": ""}, "name='' is not a name"),
    "bool": ({"replay": "yes"}, "replay='yes' is not True or False"),
    "no_effect": ({"no_effect": [5]}, "5 is not an exception type"),
    "unlimited max": ({"unlimited": True, "max": 2}, "an unlimited tool runs every time"),
    "unlimited replay": ({"unlimited": True, "replay": True}, "an unlimited tool runs every time"),
    "wait": ({"wait": 5, "replay": False}, "wait needs replay=True"),
    "unrecorded": ({"replay": True, "record": "no-result"}, "not recorded cannot be replayed"),
    "irreversible": ({"irreversible": True, "on_doubt": "rerun"}, "cannot rerun in doubt"),
    "key and ignore": ({"key": ["a"], "ignore": ["b"]}, "key says what counts"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_policy_is_an_error_at_once(options: Any, message: str) -> None:
    """Misspelt, out of range or contradictory options are refused where they are given."""
    guard = memory()
    give: Any
    for give in (
        guard.defaults,
        guard.once,
        lambda **o: guard.policy("charge", **o),
        lambda **o: guard.wrap_tools([], **o),
    ):
        with pytest.raises(PolicyError, match=message):
            give(**options)

    assert [guard(charge, "a"), guard(charge, "a")] == [["a"], None]


def test_a_wrong_policy_leaves_the_former_one() -> None:
    """A refused option changes nothing of what was said before."""
    guard = memory()
    guard.policy(charge, replay=True)
    with pytest.raises(PolicyError, match="which is no parameter of it"):
        guard.policy(charge, ignore=["sent_at"])

    assert [guard(charge, "a"), guard(charge, "a")] == [["a"], ["a"]]


def test_what_a_tool_says_wins_over_the_defaults() -> None:
    """A default that contradicts the tool's own policy is dropped for that tool."""
    guard = memory()
    guard.defaults(max=2, replay=True)
    guard.policy(charge, unlimited=True)

    assert [guard(charge, "a") for _ in range(3)] == [["a"]] * 3


def test_a_tools_own_options_must_agree() -> None:
    """What a tool says of itself is not dropped because a later line contradicts it."""
    guard = memory()

    @guard.once(irreversible=True)
    def pay(order: int) -> int:
        return order

    with pytest.raises(PolicyError, match="cannot rerun in doubt"):
        guard.policy(pay, on_doubt="rerun")
    assert 1 == pay(1)


def test_one_name_for_several_tools_is_refused() -> None:
    """A name would make several tools one, so that all but one would never run."""
    guard = memory()

    with pytest.raises(PolicyError, match="name each"):
        guard.wrap_tools([charge, send], name="tool")
    with pytest.raises(PolicyError, match="name each"):
        guard.defaults(name="tool")
    [one] = guard.wrap_tools([charge], name="tool")
    assert ["a"] == one("a")


def test_other_options_for_a_guarded_tool_are_refused() -> None:
    """wrap_tools with the same options is nothing new; other options would be lost silently."""
    guard = memory()
    tools = guard.wrap_tools([charge], replay=True)

    assert tools == guard.wrap_tools(tools, replay=True)
    with pytest.raises(UsageError, match=r"item 0.*guarded already"):
        guard.wrap_tools(tools, irreversible=True)


def test_the_guards_own_key_has_a_hint() -> None:
    """Who gives key= to a guarded tool that has no such parameter is told where it goes."""
    tool = memory().once(charge)

    with pytest.raises(TypeError, match=r"the guard's own key goes with guard\(fn"):
        tool("a", key="order-1")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guard(MemoryStore()), "store= takes an instance"),  # type: ignore[arg-type]
        (lambda: Guard(store="x.db"), "store= takes an instance"),  # type: ignore[arg-type]
        (lambda: Guard(lock_seconds=-1), "lock_seconds=-1 is not"),
        (lambda: Guard(":memory:")(charge, "a"), "a ledger in memory is memory://"),
        (lambda: memory().on_success(5), "a callback is a function"),  # type: ignore[arg-type]
        (lambda: memory().call(charge, "a", key=""), "its key is empty"),
    ],
    ids=["positional store", "store by name", "lock_seconds", ":memory:", "callback", "empty key"],
)
def test_a_wrong_setting_is_an_error_that_says_so(make: Callable[[], object], message: str) -> None:
    """Bad input gets a clear error before anything runs."""
    with pytest.raises(UsageError, match=message):
        make()


def test_a_key_function_that_fails_names_the_tool() -> None:
    """An error in a key function is the policy's, and nothing runs."""
    guard = memory()
    guard.policy(charge, key=lambda order: order)

    with pytest.raises(UsageError, match="charge did not run: its key function raised"):
        guard(charge, "a")


def test_an_async_callback_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that would never be awaited does not vanish without a line."""
    guard = memory()

    async def tell(record: Record) -> None:
        """Nobody awaits this."""

    guard.on_success(tell)
    guard(charge, "a")

    assert "raised for charge" in caplog.text
