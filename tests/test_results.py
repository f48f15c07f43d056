"""Results: a duplicate gets what the first caller got, and a result never makes a tool run again."""

import io
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import attrs
import pydantic
import pytest

from ledger import Guard, MemoryStore

ZONE = ZoneInfo("Europe/Berlin")


class Color(Enum):
    RED = "red"


class Right(Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Receipt:
    number: str
    cents: Decimal
    lines: tuple[int, ...] = ()
    made: bool = field(default=True, init=False)


@attrs.frozen
class Parcel:
    weight: float


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Line:
    sku: str


class Order(pydantic.BaseModel, extra="allow"):
    id: int = pydantic.Field(alias="orderId")
    tags: set[str] = set()
    line: Line | None = None


class Text(str):
    """A text of somebody's library."""

    __slots__ = ()


@dataclass
class Lazy:
    """An object whose attribute can no longer be read."""

    value: int

    def __getattribute__(self, name: str) -> Any:
        if name == "value":
            raise RuntimeError("the session is closed")
        return object.__getattribute__(self, name)


VALUES: list[Any] = [
    None, 0, "", [], {}, False, True, 1.5, float("inf"), 10**400, 2**20_000, "caf\u00e9 \ud800",
    (), (1, (2, [3])), {1, 2}, frozenset({"a"}), b"\x00x", bytearray(b"y"), 1 + 2j,
    {1: "a", "1": "b", (2, 3): [4]}, {"$": "mark"}, {"$kind": 1}, {"a": {"$": {"$": 1}}},
    datetime(2026, 1, 1, 12, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=5))),
    datetime(2026, 10, 25, 2, 30, tzinfo=ZONE, fold=1), datetime(2026, 1, 1),  # noqa: DTZ001 - naive ones too
    date(2026, 1, 1), time(1, 2, 3), time(1, 2, tzinfo=ZONE), timedelta(days=-1, microseconds=3),
    Decimal("1.50"), uuid.UUID(int=7), Path("a/b"), Color.RED, Right.READ, Right.READ | Right.WRITE, Right(0),
    Receipt("7", Decimal("1.50"), (1, 2)), Parcel(1.5), Point(1, 2),
    [Point(1, 2), {"at": Receipt("1", Decimal(1))}],
    Order.model_validate({"orderId": 1, "tags": {"a"}, "line": Line("7"), "more": [1]}),
]  # fmt: skip
UNSTORABLE: list[Any] = [
    object(), io.StringIO(), iter(range(1)), lambda: 1, Lazy(1), [1, {"a": object()}],
    pydantic.SecretStr("x"), ValueError("x"),
]  # fmt: skip


def replayed(value: Any) -> tuple[Any, Any]:
    """What the first and the second caller of a tool with that result get."""
    guard = Guard(store=MemoryStore(), quiet=True)
    runs: list[int] = []

    def tool() -> Any:
        runs.append(1)
        return value

    guard.policy(tool, replay=True)
    answers = guard(tool), guard(tool)
    assert runs == [1]
    return answers


@pytest.mark.parametrize("value", VALUES, ids=[f"{n}-{type(v).__name__}" for n, v in enumerate(VALUES)])
def test_a_duplicate_gets_what_the_first_caller_got(value: Any) -> None:
    """A replayed result equals the first one and is of its type."""
    _, second = replayed(value)

    assert second == value
    assert type(second) is type(value)


def test_zone_and_digits_come_back() -> None:
    """A date-time keeps its zone and fold, a Decimal its digits."""
    _, second = replayed([datetime(2026, 10, 25, 2, 30, tzinfo=ZONE, fold=1), Decimal("1.50")])

    assert (second[0].tzinfo, second[0].fold, str(second[1])) == (ZONE, 1, "1.50")


def test_not_a_number_comes_back() -> None:
    """NaN is kept, although JSON has none."""
    _, second = replayed(float("nan"))

    assert second != second


def test_a_subclass_comes_back_as_its_base() -> None:
    """A text of a class without a stored form is kept as text."""
    assert replayed(Text("x"))[1] == "x"


def test_a_class_that_only_the_annotation_names_comes_back() -> None:
    """A local class is found by the tool's return annotation."""

    @dataclass
    class Local:
        x: int

    def tool() -> list[Local]:
        return [Local(1)]

    guard = Guard(store=MemoryStore(), quiet=True)
    guard.policy(tool, replay=True)
    first = guard(tool)

    assert guard(tool) == first


def test_a_class_that_is_gone_leaves_its_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a class is not loaded or was changed, a duplicate gets its fields, not an error."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool() -> Any:
        return [Receipt("7", Decimal(1)), Color.RED, Point(1, 2), Parcel(1.0)]

    guard.policy(tool, replay=True)
    guard(tool)
    for name in ("Receipt", "Color", "Point"):
        monkeypatch.delitem(globals(), name)
    monkeypatch.setitem(globals(), "Parcel", int)
    found = guard(tool)

    assert found == [
        {"number": "7", "cents": Decimal(1), "lines": (), "made": True}, "red", (1, 2), {"weight": 1.0},
    ]  # fmt: skip


@pytest.mark.parametrize("value", UNSTORABLE, ids=[type(v).__name__ for v in UNSTORABLE])
def test_a_result_that_cannot_be_kept_never_runs_again(
    value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first caller gets the object itself, a notice says so, and a duplicate is blocked."""
    guard = Guard(store=MemoryStore(), quiet=False)
    runs: list[int] = []

    def tool() -> Any:
        runs.append(1)
        return value

    guard.policy(tool, replay=True)
    answers = [guard(tool), guard(tool)]

    assert answers[0] is value
    assert (answers[1], runs) == (None, [1])
    assert "its result is not kept" in capsys.readouterr().err


def test_an_open_file_never_runs_again(tmp_path: Path) -> None:
    """A tool that gives back an open file has run."""
    with (tmp_path / "x").open("w") as file:
        first, second = replayed(file)

        assert (first is file, second) == (True, None)


def test_fifty_megabytes_are_kept(tmp_path: Path) -> None:
    """A large result is given back whole, from the file."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)

    def tool() -> str:
        return "x" * 50_000_000

    guard.policy(tool, replay=True)
    answers = guard(tool), guard(tool)
    guard.close()

    assert [len(a) for a in answers] == [50_000_000, 50_000_000]


@pytest.mark.parametrize(
    "make", [lambda: [[1]], lambda: {"a": {1}}, lambda: bytearray(b"x")], ids=["list", "dict", "bytearray"]
)
def test_callers_never_share_a_mutable_object(make: Callable[[], Any]) -> None:
    """Each duplicate gets an object of its own."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def tool() -> Any:
        return make()

    guard.policy(tool, replay=True)
    answers = [guard(tool) for _ in range(3)]
    inner = [id(a) for a in answers] + [id(v) for a in answers if not isinstance(a, bytearray) for v in a]

    assert answers == [make()] * 3
    assert len(set(inner[:3])) == 3


def test_an_annotation_that_cannot_be_evaluated_restores_plain_values() -> None:
    """A return annotation whose names nobody knows is no reason to lose a result."""
    guard = Guard(store=MemoryStore(), quiet=True)

    def pay() -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821 - that is the point
        return (1, 2)

    guard.policy(pay, replay=True)

    assert ((1, 2), (1, 2)) == (guard(pay), guard(pay))


def test_a_field_named_dollar_comes_back() -> None:
    """A model whose extra field has the name of our mark is restored like any other."""

    class Loose(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        a: int

    def make() -> Loose:
        return Loose(a=1, **{"$": "x"})

    guard = Guard(store=MemoryStore(), quiet=True)
    guard.policy(make, replay=True)

    assert guard(make) == guard(make)


def test_a_deque_comes_back() -> None:
    """A queue is one again."""
    guard = Guard(store=MemoryStore(), quiet=True)
    guard.defaults(replay=True)

    assert deque([1, 2]) == guard(deque, [1, 2]) == guard(deque, [1, 2])
