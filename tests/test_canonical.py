"""The canonical form: equal texts exactly where a user would call two values equal."""

import math
import os
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, StrEnum
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import attrs
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ledger
from ledger import Guard, MemoryStore, UnstableArgument

HOUR = timezone(timedelta(hours=1))
ZONE = ZoneInfo("Europe/Berlin")
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001 - the case under test
NAN = float("nan")


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Kind(StrEnum):
    RED = "red"


class Right(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Line:
    sku: str
    count: int = 1
    seen: float = field(default=0.0, compare=False)


@dataclass
class Row:
    sku: str
    count: int = 1


@attrs.define
class Parcel:
    weight: float
    note: str = attrs.field(default="", eq=False)


class Order(pydantic.BaseModel):
    id: int
    tags: set[str] = set()
    card: pydantic.SecretStr | None = None


class Open(pydantic.BaseModel, extra="allow"):
    id: int


class Point(NamedTuple):
    x: int
    y: int


class Account:
    def __init__(self, number: str) -> None:
        self.number = number

    def __ledger_key__(self) -> str:
        return self.number


class Bag(AbstractSet[int]):
    """A set that is no `set`."""

    def __init__(self, *items: int) -> None:
        self._items = items

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Whole:
    """An integer of somebody's library."""

    def __int__(self) -> int:
        return 7


class Measured:
    """A real number of somebody's library."""

    def __float__(self) -> float:
        return 0.5


Integral.register(Whole)
Real.register(Measured)

SAME: list[tuple[str, Any, Any]] = [
    ("dict order", {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
    ("drift", 99.99, 99.9900000001),
    ("binary sums", 0.1 + 0.2, 0.3),
    ("whole float", 99, 99.0),
    ("whole Decimal", 99, Decimal("99.00")),
    ("Decimal and float", 0.5, Decimal("0.50")),
    ("Fraction and int", Fraction(4, 2), 2),
    ("minus zero", -0.0, 0.0),
    ("Decimal zero", Decimal("-0.00"), 0),
    ("NaN", NAN, float("nan")),
    ("Decimal NaN", Decimal("NaN"), NAN),
    ("Decimal infinity", Decimal("-Infinity"), -math.inf),
    ("large Decimal", Decimal("1E+400"), 10**400),
    ("tuple and list", (1, 2, (3,)), [1, 2, [3]]),
    ("named tuple", Point(1, 2), (1, 2)),
    ("deque", deque([1, 2]), [1, 2]),
    ("range", range(3), [0, 1, 2]),
    ("set order", {"x", "y", "z"}, {"z", "y", "x"}),
    ("frozenset", frozenset({1, 2}), {2, 1}),
    ("abstract set", Bag(2, 1), {1, 2}),
    ("abstract mapping", UserDict({"a": 1}), {"a": 1}),
    ("mapping proxy", MappingProxyType({"a": 1}), {"a": 1}),
    ("ordered dict", OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
    ("counter", Counter("aab"), {"a": 2, "b": 1}),
    ("NFC and NFD", "caf\u00e9", "cafe\u0301"),
    ("NFD keys", {"caf\u00e9": 1}, {"cafe\u0301": 1}),
    ("bytes kinds", b"x", bytearray(b"x")),
    ("memoryview", memoryview(b"xy"), b"xy"),
    ("instant", datetime(2026, 1, 1, 12, tzinfo=UTC), datetime(2026, 1, 1, 13, tzinfo=HOUR)),
    ("zone", datetime(2026, 7, 1, 12, tzinfo=UTC), datetime(2026, 7, 1, 14, tzinfo=ZONE)),
    ("first year", datetime(1, 1, 1, tzinfo=HOUR), datetime(1, 1, 1, tzinfo=HOUR)),
    ("uuid", uuid.UUID(int=5), uuid.UUID(int=5)),
    ("path", Path("a/b"), PurePosixPath("a/b")),
    ("timedelta", timedelta(seconds=60), timedelta(minutes=1)),
    ("time", time(1, 2), time(1, 2)),
    ("dataclass", Line("a", seen=1.0), Line("a", 1, seen=2.0)),
    ("attrs", Parcel(1.0, "x"), Parcel(1, "y")),
    ("pydantic with a set", Order(id=1, tags={"a", "b"}), Order(id=1, tags={"b", "a"})),
    ("pydantic extra", Open.model_validate({"id": 1, "x": 2}), Open.model_validate({"x": 2, "id": 1})),
    ("key method", Account("7"), Account("7")),
    ("integral", Whole(), 7),
    ("real", Measured(), 0.5),
    ("class", Account, Account),
    ("empty flag", Right(0), Right(0)),
]  # fmt: skip
DIFFERENT: list[tuple[str, Any, Any]] = [
    ("small amounts", 1e-9, 2e-9),
    ("cents of a large amount", 1234567890.12, 1234567890.13),
    ("cents", 99.99, 99.98),
    ("Decimal is exact", Decimal("99.99"), Decimal("99.9900000001")),
    ("bool and int", True, 1),
    ("false and zero", False, 0),
    ("int and text", 1, "1"),
    ("None and text", None, "None"),
    ("None and empty", None, ""),
    ("beyond floats", 2**53, 2**53 + 1),
    ("exact floats", 1e16, 1e16 + 2),
    ("large ints", 10**30, 10**30 + 1),
    ("very large ints", 2**20_000, 2**20_000 + 1),
    ("very long Decimals", Decimal("1" * 5000), Decimal("1" * 4999 + "2")),
    ("signs", 2.5, -2.5),
    ("signed Decimal", Decimal("2.5"), Decimal("-2.5")),
    ("infinities", math.inf, -math.inf),
    ("infinity and text", math.inf, "inf"),
    ("int keys", {1: "a"}, {"1": "a"}),
    ("bool keys", {True: "a"}, {1.5: "a"}),
    ("tuple keys", {(1, 2): "a"}, {"(1, 2)": "a"}),
    ("mixed keys", {1: "a", "1": "b"}, {1: "b", "1": "a"}),
    ("bytes and text", b"x", "x"),
    ("bytes and its mark", b"x", {"$bytes": "78"}),
    ("marked twice", {"$bytes": "78"}, {"$$bytes": "78"}),
    ("set and list", {1}, [1]),
    ("empty set and list", set(), []),
    ("dict and list", {}, []),
    ("order of a list", [1, 2], [2, 1]),
    ("nesting", [[1], 2], [1, [2]]),
    ("naive", NAIVE, datetime(2026, 1, 1, tzinfo=UTC)),
    ("date and datetime", date(2026, 1, 1), NAIVE),
    ("date and text", date(2026, 1, 1), "2026-01-01"),
    ("microseconds", datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, microsecond=1, tzinfo=UTC)),
    ("timedelta and number", timedelta(microseconds=60), 60),
    ("uuid and text", uuid.UUID(int=5), str(uuid.UUID(int=5))),
    ("path and text", Path("a"), "a"),
    ("enum members", Color.RED, Color.BLUE),
    ("enum and value", Color.RED, "red"),
    ("enums of two classes", Color.RED, Kind.RED),
    ("flags", Right.READ, Right.READ | Right.WRITE),
    ("dataclass and dict", Line("a"), {"sku": "a", "count": 1}),
    ("two dataclasses", Line("a"), Row("a")),
    ("dataclass fields", Line("a", 1), Line("a", 2)),
    ("attrs", Parcel(1.0), Parcel(1.5)),
    ("pydantic", Order(id=1), Order(id=2)),
    ("secrets count", Order(id=1, card=pydantic.SecretStr("a")), Order(id=1, card=pydantic.SecretStr("b"))),
    ("pydantic extra", Open.model_validate({"id": 1, "x": 2}), Open.model_validate({"id": 1, "x": 3})),
    ("key method", Account("7"), Account("8")),
    ("key method and text", Account("7"), "7"),
    ("classes", Account, Line),
    ("fractions", Fraction(1, 3), Fraction(2, 3)),
    ("complex", 1 + 2j, 1 + 3j),
    ("complex and real", 1 + 0j, 1),
]  # fmt: skip

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def ids(pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """The names of the pairs, as pytest shows them."""
    return [name for name, _, _ in pairs]


@pytest.mark.parametrize(("name", "one", "other"), SAME, ids=ids(SAME))
def test_equal_to_a_user_is_equal_to_the_guard(name: str, one: Any, other: Any) -> None:
    """Two ways to write one value are one form."""
    assert ledger.canonical(one) == ledger.canonical(other)


@pytest.mark.parametrize(("name", "one", "other"), DIFFERENT, ids=ids(DIFFERENT))
def test_different_to_a_user_is_different_to_the_guard(name: str, one: Any, other: Any) -> None:
    """Values that a user tells apart never share a form."""
    assert ledger.canonical(one) != ledger.canonical(other)


@pytest.mark.parametrize(
    "value", [object(), lambda: 1, iter([1]), {"a": {"b": [object()]}}, open, {1, 2}.pop, ValueError("x")]
)
def test_an_object_without_a_stable_form_is_refused(value: Any) -> None:
    """What only `repr` could tell apart has no form, at any depth."""
    with pytest.raises(UnstableArgument, match="no stable form"):
        ledger.canonical(value)


@given(plain)
def test_a_form_is_text_that_two_readings_share(value: Any) -> None:
    """The same value has the same ASCII form each time."""
    form = ledger.canonical(value)

    assert form == ledger.canonical(value)
    assert form.isascii()


@given(st.dictionaries(st.text(), plain, max_size=6), st.randoms())
def test_the_order_of_a_dict_never_matters(value: dict[str, Any], random: Any) -> None:
    """However a dict was filled, its form is the same."""
    items = list(value.items())
    random.shuffle(items)

    assert ledger.canonical(dict(items)) == ledger.canonical(value)


@given(st.lists(st.text() | st.integers(), unique=True, max_size=8), st.randoms())
def test_the_order_of_a_set_never_matters(items: list[Any], random: Any) -> None:
    """However a set was filled, its form is the same."""
    form = ledger.canonical(set(items))
    random.shuffle(items)

    assert ledger.canonical(frozenset(items)) == form


@given(st.integers(), st.integers())
def test_integers_are_exact(one: int, other: int) -> None:
    """Two integers share a form only if they are equal, at any size."""
    assert (ledger.canonical(one) == ledger.canonical(other)) is (one == other)


@given(st.text(), st.text())
def test_texts_are_exact_up_to_unicode_form(one: str, other: str) -> None:
    """Two texts share a form only if NFC makes them equal."""
    import unicodedata

    equal = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)

    assert (ledger.canonical(one) == ledger.canonical(other)) is equal


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_cents_never_collide(cents: int) -> None:
    """Two amounts that differ by a cent differ, as floats, up to ten digits before the point."""
    assert ledger.canonical(cents / 100) != ledger.canonical((cents + 1) / 100)


@given(st.integers(min_value=-(10**11), max_value=10**11))
def test_a_float_is_its_decimal(cents: int) -> None:
    """An amount is the same call as a float and as a Decimal."""
    assert ledger.canonical(cents / 100) == ledger.canonical(Decimal(cents) / 100)


@given(st.integers(min_value=1, max_value=10**7), st.integers(min_value=-4, max_value=4))
def test_drift_disappears(cents: int, drift: int) -> None:
    """What sums of floats add by accident, below eleven digits, is not another amount."""
    amount = cents / 100

    assert ledger.canonical(amount * (1 + drift * 1e-15)) == ledger.canonical(amount)


@given(st.datetimes(timezones=st.timezones()), st.timezones())
def test_an_instant_is_the_same_in_every_zone(moment: datetime, zone: Any) -> None:
    """A date-time moved to another zone is the same instant."""
    try:
        moved = moment.astimezone(UTC).astimezone(zone)
    except OverflowError:  # no such year in the other zone
        return

    assert ledger.canonical(moved) == ledger.canonical(moment.astimezone(UTC))


def charge(order: str, cents: int = 100, tags: Any = (), at: Any = None) -> str:
    """Charge an order: the tool whose fingerprints are pinned."""
    return order


def test_known_fingerprints_stay() -> None:
    """These fingerprints are in files of users; changing one makes their tools run again."""
    guard = Guard(store=MemoryStore(), workflow="default", quiet=True)
    guard.policy(charge, name="shop.charge")
    found = [
        guard.call(charge, "A-17").record.call,
        guard.call(charge, "A-17", 4200, {"b", "a"}, datetime(2026, 1, 1, tzinfo=UTC)).record.call,
        guard.call(charge, "A-17", cents=99.99, tags={1: b"x", "1": Decimal("1.50")}).record.call,
        guard.call(charge, "A-17", key="order A-17").record.call,
    ]

    assert found == [
        "64154ae7a59305cd48433a4b64bd273d",
        "984440e7544f72f87a1f7213a15aaf9c",
        "d64fb616adcfda0a372940a81fc4c33d",
        "4b767dec7fe0a2441e856550ce367a90",
    ]


def test_hash_seeds_change_nothing() -> None:
    """Sets have the same form in processes whose strings hash differently."""
    code = (
        "import ledger, pydantic\n"
        "class M(pydantic.BaseModel):\n    s: set[str]\n"
        "names = {str(n) for n in range(50)}\n"
        "print(ledger.canonical([names, frozenset(names), {n: 1 for n in names}, M(s=names)]))"
    )
    forms = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(ledger.__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }

    assert len(forms) == 1
