"""Identity: which function it is, and which of its arguments say what one action is."""

import functools
import multiprocessing
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Guard, MemoryStore, PolicyError, UnstableArgument, UsageError


def memory() -> Guard:
    """A guard of its own."""
    return Guard(store=MemoryStore(), workflow="default", quiet=True)


def call_of(guard: Guard, fn: Any, *args: Any, **kwargs: Any) -> str:
    """The fingerprint of a call."""
    outcome: Any = guard.call(fn, *args, **kwargs)
    return str(outcome.record.call)


def send(to: str, subject: str = "hello", *, sent_at: Any = None) -> str:
    """Send something."""
    return to


def keyed(key: str, n: int = 0) -> str:
    """A tool whose own parameter is called key."""
    return key


def loose(*args: Any, **kwargs: Any) -> int:
    """A tool that takes anything."""
    return len(args) + len(kwargs)


def adder(amount: int) -> Callable[[int], int]:
    """A nested function that closes over a plain value."""

    def add(n: int) -> int:
        return n + amount

    return add


def counting() -> Callable[[int], int]:
    """A nested function that rebinds what it closes over."""
    seen = 0

    def count(n: int) -> int:
        nonlocal seen
        seen += 1
        return seen

    return count


def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that forgets functools.wraps."""

    def wrapper(*args: Any) -> Any:
        return fn(*args)

    return wrapper


class Mail:
    def __init__(self, account: str = "") -> None:
        self.account = account

    def send(self, to: str) -> str:
        return to

    def any(*args: Any) -> int:
        return len(args)

    def __call__(self, to: str) -> str:
        return to

    @classmethod
    def make(cls, to: str) -> str:
        return to

    @staticmethod
    def check(to: str) -> str:
        return to


class Post(Mail):
    pass


class Account(Mail):
    def __ledger_key__(self) -> str:
        return self.account


def in_child(to: str) -> str:
    """The fingerprint of a call of this module, in a process of its own."""
    return call_of(memory(), send, to)


def test_arguments_are_bound_to_the_signature() -> None:
    """Positional, keyword, default given or omitted: one call."""
    guard = memory()
    forms = [
        call_of(guard, send, "a"),
        call_of(guard, send, to="a"),
        call_of(guard, send, "a", "hello"),
        call_of(guard, send, subject="hello", sent_at=None, to="a"),
        call_of(guard, functools.partial(send, subject="hello"), "a"),
        call_of(guard, functools.partial(send, "a")),
    ]

    assert len(set(forms)) == 1


def test_tools_that_look_alike_are_different() -> None:
    """Lambdas, nested functions, methods, partials and objects of two kinds never share a call."""
    guard = memory()
    tools: list[Any] = [
        lambda n: n + 1,
        lambda n: n + 2,
        lambda n: str(n),  # noqa: PLW0108 - a lambda is the case
        adder(1),
        adder(2),
        decorated(send),
        decorated(keyed),
        Mail().send,
        Post().send,
        Account("a").send,
        Account("b").send,
        Mail.make,
        Post.make,
        Mail.check,
        Mail(),
        Post(),
        Account("a"),
        Account("b"),
        send,
        keyed,
        functools.partial(loose, 1),
        functools.partial(loose, 2),
        print,
        str,
    ]
    forms = [call_of(guard, tool, 1) for tool in tools]

    assert len(set(forms)) == len(tools)


@pytest.mark.parametrize(
    "make", [lambda: adder(1), counting, lambda: Account("a").send], ids=["closure", "counter", "method"]
)
def test_the_same_function_made_again_is_the_same_tool(make: Callable[[], Any]) -> None:
    """A function that is built anew for each request is recognised, also when it counts."""
    guard = memory()

    assert call_of(guard, make(), 1) == call_of(guard, make(), 1)


def test_functions_that_only_bytecode_tells_apart_are_refused() -> None:
    """Two such lambdas ask for a name instead of blocking each other."""
    guard = memory()
    guard(lambda n: n + 1, 1)
    with pytest.raises(UsageError, match="two different functions"):
        guard(lambda n: n - 1, 1)


def test_one_name_in_two_modules_is_two_tools() -> None:
    """The module is part of the identity."""
    guard = memory()
    source = "def pay(n): return n"
    made = []
    for name in ("shop_a", "shop_b"):
        module = types.ModuleType(name)
        exec(source, module.__dict__)  # noqa: S102 - two modules without two files
        made.append(module.pay)

    assert call_of(guard, made[0], 1) != call_of(guard, made[1], 1)


def test_script_import_and_spawn_agree(tmp_path: Path) -> None:
    """A script, its spawned children and a module that imports it name the tool alike."""
    (tmp_path / "shop.py").write_text(
        "import multiprocessing\n"
        "from ledger import Guard, MemoryStore\n"
        "def pay(n): return n\n"
        "def show():\n"
        "    guard = Guard(store=MemoryStore(), workflow='default', quiet=True)\n"
        "    print(guard.call(pay, 1).record.call, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    show()\n"
        "    child = multiprocessing.get_context('spawn').Process(target=show)\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(ledger.__file__).parent)])
    found = [
        subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
        ).stdout.split()
        for command in (["shop.py"], ["-m", "shop"], ["-c", "import shop; shop.show()"])
    ]  # fmt: skip

    assert [len(f) for f in found] == [2, 2, 1]
    assert len({f for each in found for f in each}) == 1


def test_a_spawned_worker_agrees() -> None:
    """A worker process that imports the tool has the same fingerprint."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(in_child, ("a",))

    assert theirs == in_child("a")


def test_a_parameter_called_key_stays_with_the_tool() -> None:
    """`key=` reaches the tool that has one, and `ledger_key=` is then the guard's."""
    guard = memory()

    assert guard(keyed, key="a") == "a"
    assert call_of(guard, keyed, key="a", n=1) != call_of(guard, keyed, key="a", n=2)
    assert call_of(guard, keyed, "a", n=3, ledger_key="k") == call_of(guard, keyed, "b", ledger_key="k")


@pytest.mark.parametrize("key", ["", "  ", [], (), {}, set(), b""], ids=repr)
def test_an_empty_key_is_refused(key: Any) -> None:
    """A key that names nothing would make all calls one, so nothing runs."""
    with pytest.raises(UsageError, match="its key is empty"):
        memory()(send, "a", key=key)


def test_an_empty_key_of_the_policy_is_refused() -> None:
    """So is one that the policy finds in the arguments."""
    guard = memory()
    guard.policy(send, key=["to"])
    with pytest.raises(UsageError, match="its key is empty"):
        guard(send, "")


def test_key_names_and_function_say_what_counts() -> None:
    """`key=` as names or as a function takes over from the arguments."""
    by_name, by_function = memory(), memory()
    by_name.policy(send, key="to")
    by_function.policy(send, key=lambda to, **_: to.lower())

    assert call_of(by_name, send, "a", "x") == call_of(by_name, send, "a", "y")
    assert call_of(by_function, send, "A", "x") == call_of(by_function, send, "a", "y")


def test_key_ignore_and_match_reach_into_keyword_arguments() -> None:
    """A tool that takes `**kwargs` is told apart by their names like any other."""
    guard = memory()
    guard.policy(loose, key=["order"], match=["cents"])
    ignoring = memory()
    ignoring.policy(loose, ignore=["sent_at"])

    assert call_of(guard, loose, order=1, cents=1) == call_of(guard, loose, order=1, cents=1, x=2)
    assert call_of(guard, loose, order=2, cents=1) != call_of(guard, loose, order=1, cents=1)
    assert call_of(ignoring, loose, a=1, sent_at=1) == call_of(ignoring, loose, a=1, sent_at=2)


def test_ignored_parameters_do_not_count() -> None:
    """`ignore=` leaves a parameter out, also one without a stable form."""
    guard = memory()
    guard.policy(send, ignore="sent_at")

    assert call_of(guard, send, "a", sent_at=object()) == call_of(guard, send, "a")


def test_match_must_agree() -> None:
    """The same key with another value of a matched parameter is a conflict that names it."""
    guard = memory()
    guard.policy(send, key=["to"], match=["subject"])
    guard(send, "a", "x")
    with pytest.raises(ledger.KeyConflict, match="another subject"):
        guard(send, "a", "y")


def test_defaults_reach_the_tools_that_have_the_parameter() -> None:
    """A default key holds where a tool has that parameter, and leaves the others alone."""
    guard = memory()
    guard.defaults(key=["to"])

    assert call_of(guard, send, "a", "x") == call_of(guard, send, "a", "y")
    assert call_of(guard, keyed, "a", 1) != call_of(guard, keyed, "b", 1)


@pytest.mark.parametrize("value", [object(), {"deep": [object()]}], ids=["object", "deep"])
def test_an_unstable_argument_is_named(value: Any) -> None:
    """The refusal names the argument, its type and the ways out; nothing ran."""
    with pytest.raises(UnstableArgument, match=r"argument 'sent_at' .*builtins\.object .*key=….*ignore="):
        memory()(send, "a", sent_at=value)


def test_an_argument_that_contains_itself_is_named() -> None:
    """A knot is refused, and may still be passed beside a key."""
    knot: list[Any] = []
    knot.append(knot)
    guard = memory()
    with pytest.raises(UnstableArgument, match="it contains itself"):
        guard(send, "a", sent_at=knot)

    assert guard(send, "a", sent_at=knot, key="k") == "a"


def test_an_unstable_default_is_its_own_name() -> None:
    """A default that has no stable form counts as the default."""
    nothing = object()

    def tool(n: int, extra: Any = nothing) -> int:
        return n

    guard = memory()

    assert call_of(guard, tool, 1) == call_of(guard, tool, 1, nothing)


def test_wrong_arguments_are_the_tools_own_type_error() -> None:
    """A call that the tool would refuse is refused in its name."""
    with pytest.raises(TypeError, match=r"send\(\): missing a required argument: 'to'"):
        memory()(send)


def test_two_objects_without_a_form_bring_one_notice(capsys: pytest.CaptureFixture[str]) -> None:
    """Methods of objects that nothing tells apart count as one tool, and the user is told once."""
    guard = Guard(store=MemoryStore(), quiet=False)
    mails = [Mail(), Mail(), Mail()]
    for mail in mails:
        guard(mail.send, "a")

    assert capsys.readouterr().err.count("two objects that have no stable form") == 1


def test_a_method_taken_from_its_class_is_the_same_call() -> None:
    """`Class.method` with the object as an argument is the bound method."""
    guard = memory()

    assert call_of(guard, Account.send, Account("a"), "x") == call_of(guard, Account("a").send, "x")
    assert call_of(guard, Account.send, to="x", self=Account("a")) == call_of(guard, Account("a").send, "x")


def test_a_method_of_any_arguments_never_loses_them() -> None:
    """An object that arrives in `*args` must have a form, because the arguments are there too."""
    guard = memory()
    with pytest.raises(UnstableArgument, match="argument 'args'"):
        guard(Mail().any, 1)


def test_a_name_of_its_own_is_the_identity() -> None:
    """`name=` makes two functions one tool, and its options are found by that name."""
    guard = memory()
    one = guard.once(name="pay")(lambda n: n)
    guard.policy("pay", replay=True)

    assert (one(1), one(1)) == (1, 1)
    assert [e["tool"] for e in guard.history()] == ["pay"]


def test_policies_by_short_and_full_name_add_up() -> None:
    """What was said by the short name stays when more is said by the function."""
    guard = memory()
    guard.policy("send", replay=True)
    guard.policy(send, ignore=["sent_at"])

    assert [guard(send, "a", sent_at=n) for n in (1, 2)] == ["a", "a"]


@pytest.mark.parametrize("option", ["key", "ignore", "match"])
def test_a_misspelt_parameter_is_refused_at_once(option: Any) -> None:
    """A policy that names what the tool does not have changes nothing."""
    guard = memory()
    options: Any = {option: ["sendt_at"]}
    with pytest.raises(PolicyError, match=f"{option} of send names 'sendt_at'.* it has sent_at, subject, to"):
        guard.policy(send, **options)

    assert guard(send, "a") == "a"


def test_a_nested_function_may_speak_of_itself() -> None:
    """A function that closes over its own name, or over one that is not set yet, is a tool."""
    guard = memory()

    def count_down(n: int) -> int:
        return n and count_down(n - 1)

    def early() -> int:
        return later

    assert (0, 1) == (guard(count_down, 2), len(guard.history()))
    with pytest.raises(NameError):
        guard(early)
    later = 1
    assert 1 == guard(early)


def test_a_constant_without_a_form_still_tells_functions_apart() -> None:
    """Code whose constants have no stable form is known by their types."""
    assert memory()(lambda: ...) is ...


def test_arguments_given_twice_raise_what_the_call_would_raise() -> None:
    """A parameter that comes by place and by name is the caller's mistake, and nothing runs."""
    with pytest.raises(TypeError, match=r"send\(\): multiple values for argument 'to'"):
        memory()(send, "a", to="b")


def test_a_callable_without_a_hash_is_a_tool() -> None:
    """A tool object that cannot be a dict key is guarded like any other."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __ledger_key__(self) -> str:
            return "one"

        def __call__(self, n: int) -> int:
            return n

    guard = memory()

    assert [3, None] == [guard(Unhashable(), 3) for _ in range(2)]


def test_a_method_of_a_builtin_counts_its_object() -> None:
    """Appending to two different lists is two actions; two equal ones are one."""
    guard = memory()
    one, two, three = [1], [2], [1]

    for each in (one, two, three):
        guard(each.append, 5)

    assert ([1, 5], [2, 5], [1]) == (one, two, three)


def test_closures_over_objects_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    """Two functions that only an object without a form tells apart share their calls, with one notice."""
    guard = Guard(store=MemoryStore(), quiet=False)

    def make(client: object) -> Callable[[int], int]:
        def charge(order: int) -> int:
            return hash(client) and order

        return charge

    for client in (object(), object(), object()):
        guard(make(client), 1)

    assert 1 == capsys.readouterr().err.count("closes over two objects")
