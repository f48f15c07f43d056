"""Ledger: a tool with side effects runs once, however often an agent retries it.

    from ledger import guard

    guard(charge, order=1)              # runs
    guard(charge, order=1)              # blocked: already done

    tools = guard.wrap_tools(tools)     # a dict or a list: every tool protected

    @guard.once(replay=True)            # a duplicate gets the first result
    def send_email(to: str) -> str: ...

Guarantee: at most one run of a call at a time, none after a recorded success, every
outcome on disk; and after a crash exactly what the tool's policy names.  With
`idempotency_key()` passed on to a service that honours it, the effect happens exactly once.

Not promised: nobody can see or undo an effect outside the process.  A process that dies
between an effect and its record leaves the call *in doubt*; `on_doubt=` decides what then
happens.  A process that was silent for longer than its lease and comes back may still do
its effect; only the idempotency key at the service prevents that.

How it works: each execution is one row that only one caller can insert.  The claim is on
disk before the tool is entered, the lease is renewed while it runs, and only the owner of
a run settles it.  `Guard`, `Store` and `Policy` below say the rest.

Copy this file; it needs only Python 3.11 or newer.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum, StrEnum
from json.encoder import encode_basestring_ascii as _quote
from types import CellType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)  # fmt: skip

if TYPE_CHECKING:
    from datetime import datetime, timedelta
    from types import CodeType

__version__ = "0.1.0"

__all__ = [
    "NOT_DONE", "STILL_UNKNOWN", "Current", "Guard", "InDoubt", "InProgress", "KeyConflict", "LedgerError",
    "MemoryStore", "NotPerformed", "Outcome", "Policy", "PolicyError", "PolicyOptions", "Record", "Scope",
    "SqliteStore", "Status", "Store", "StoreError", "UnstableArgument", "UsageError", "at", "current",
    "guard", "idempotency_key", "known_suspends", "replaying", "tell_model",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Tools = TypeVar("Tools", bound="dict[str, Any] | list[Any] | tuple[Any, ...]")
_MICROS: Final = 1_000_000


# ═══ Errors ═══════════════════════════════════════════════════════════════════════════
#
#   LedgerError
#   ├── UsageError            the program asks for something that cannot be
#   │   ├── PolicyError       a policy is contradictory or misspelt
#   │   └── UnstableArgument  an argument has no stable form: nothing ran
#   ├── StoreError            the ledger cannot be read or written: nothing ran
#   ├── InProgress            a live run holds the call: wait
#   ├── InDoubt               the last run's outcome is unknown: find out, then resolve
#   └── KeyConflict           the same key came with other arguments
#   NotPerformed              raised BY a tool: nothing happened, the call is free again


class LedgerError(Exception):
    """What every error of this module is; `record` is the call it speaks of, if any."""

    def __init__(self, message: str, record: Record | None = None) -> None:
        super().__init__(message)
        self.record = record


class UsageError(LedgerError, TypeError):
    """The guard was asked for something that it cannot do; nothing ran."""


class PolicyError(UsageError):
    """A policy is contradictory or misspelt; nothing was changed."""


class UnstableArgument(UsageError):
    """An argument has no form that is the same on a retry; nothing ran."""


class StoreError(LedgerError):
    """The ledger could not be read or written; a tool whose claim failed did not run."""

    #: the store has no room left: something can be given up
    full: bool = False
    #: what was to be written can never be, however often it is tried
    refused: bool = False


class InProgress(LedgerError):
    """A live run holds the call; `record` names its owner."""


class InDoubt(LedgerError):
    """The last run ended without a known outcome, and the policy asks a person (or `resolve`)."""


class KeyConflict(LedgerError):
    """The same key came with another value for a parameter named in `match=`."""


class NotPerformed(Exception):
    """For tools to raise: the effect certainly did not happen, so the call is free again."""


# ═══ Values and states ════════════════════════════════════════════════════════════════


class Status(StrEnum):
    """Where a run stands. SUCCESS, FAILED and SUSPENDED are final; DOUBT can be resolved."""

    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    SUSPENDED = "suspended"
    DOUBT = "doubt"


#: which status may follow which; an empty cell is final
_NEXT: Final[dict[str, frozenset[str]]] = {
    "running": frozenset({"success", "failed", "suspended", "doubt"}),
    "doubt": frozenset({"success", "failed"}),
    "success": frozenset(),
    "failed": frozenset(),
    "suspended": frozenset(),
}


class _Answer(Enum):
    NOT_DONE = "NOT_DONE"
    STILL_UNKNOWN = "STILL_UNKNOWN"
    NOTHING = "NOTHING"

    def __repr__(self) -> str:
        return f"ledger.{self.value}"


#: a reconcile function's answer: the effect did not happen, run the tool
NOT_DONE: Final = _Answer.NOT_DONE
#: a reconcile function's answer: it cannot tell; the caller gets `InDoubt`
STILL_UNKNOWN: Final = _Answer.STILL_UNKNOWN
_NOTHING: Final = _Answer.NOTHING  # "no value was given", where None is a value


class Run(NamedTuple):
    """One execution of a call: a row of the store. Times are UTC microseconds since 1970."""

    call: str
    run: int
    tool: str
    wf: str
    caller: str
    owner: str
    key: str | None
    args: str | None
    matched: str | None
    started: int
    lease: int
    #: the lease on the monotonic clock of the owner's boot
    mono: int
    status: str = "running"
    result: str | None = None
    error: str | None = None
    trace: str | None = None
    ended: int | None = None
    closed_by: str | None = None
    released: int = 0
    forced: int = 0
    late: str | None = None
    late_at: int | None = None
    blocked: int = 0

    def succeeded_since(self, horizon: int) -> bool:
        """Whether this is a success, or a late one, younger than `horizon` and not released."""
        ended = self.ended if self.status == "success" else self.late_at if self.late == "success" else None
        return ended is not None and ended > horizon and not self.released


class Record(NamedTuple):
    """A call as it stands: its latest run, and what all its runs add up to.

    Times are UTC, integer microseconds since 1970; `at(record.started)` is a datetime.
    """

    #: the call, or for a version in a six-method store `call~k`
    id: str
    #: the fingerprint
    call: str
    #: number of the latest run, 1 for the first
    run: int
    #: full name of the tool
    tool: str
    #: workflow: the scope of deduplication
    wf: str
    #: who asked, as given by `as_caller`
    caller: str
    #: token of the claim; `Record.holder` is for people
    owner: str
    #: the key that stood for the arguments, as JSON
    key: str | None
    #: the arguments as JSON, secrets masked; `args` decodes it
    args_json: str | None
    status: Status
    #: the result as JSON, None when none is kept; `result` decodes it
    result_json: str | None
    #: "Type: message" of the exception
    error: str | None
    #: times asked
    attempts: int
    #: runs that ended in SUCCESS
    runs: int
    #: attempts that ran nothing
    blocked: int
    created: int
    touched: int
    started: int
    ended: int | None
    #: until when a RUNNING run is taken to be alive
    lease: int
    released: bool
    #: RUNNING although its owner is over, or DOUBT: nobody knows whether the effect happened
    in_doubt: bool = False
    #: how a run that had been given up ended after all
    late: str | None = None
    #: where the owner runs, for people
    holder: str = ""
    #: six-method stores only: all runs of the call, as JSON; keep it as it is
    state: str = ""

    @property
    def args(self) -> dict[str, Any]:
        """The recorded arguments, JSON-safe, secrets masked."""
        return cast("dict[str, Any]", json.loads(self.args_json)) if self.args_json else {}

    @property
    def result(self) -> Any:
        """The recorded result, a fresh object each time; None also when none was kept."""
        return None if self.result_json is None else _restore(self.result_json)

    @property
    def short(self) -> str:
        """The tool's name as shown to people."""
        return _short(self.tool)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-safe values; `from_dict` is the way back."""
        return {**self._asdict(), "status": self.status.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record that `to_dict` was called on."""
        return cls(**{**values, "status": Status(values["status"])})


class Outcome(NamedTuple, Generic[T]):
    """What `guard.call` answers: what happened to this attempt, the value and the record."""

    kind: Literal["executed", "blocked", "replayed", "waited"]
    value: T | None
    record: Record

    @property
    def executed(self) -> bool:
        """The tool ran, now, for this attempt."""
        return self.kind == "executed"

    @property
    def blocked(self) -> bool:
        """Nothing ran and no recorded result was handed over."""
        return self.kind == "blocked"

    @property
    def replayed(self) -> bool:
        """The value is the recorded result of an earlier run (also after a wait)."""
        return self.kind in ("replayed", "waited")

    @property
    def waited(self) -> bool:
        """The value is the result of a run that was still going on when this attempt came."""
        return self.kind == "waited"


class Current(NamedTuple):
    """The run that is going on: what `ledger.current()` answers inside a tool."""

    call: str
    run: int
    tool: str
    wf: str
    caller: str
    #: the same for every run of one intended effect; pass it on to the service
    idempotency_key: str


def at(micros: int) -> datetime:
    """A recorded time as an aware datetime."""
    from datetime import UTC, datetime, timedelta

    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def tell_model(record: Record) -> str:
    """A `blocked_return` that a language model understands: what was done, when, what came of it."""
    if record.in_doubt:
        return (
            f"{record.short} was started at {_clock_text(record.started)} and nobody knows "
            "whether it took effect; do not repeat it, ask a person"
        )
    if record.status is Status.RUNNING:
        return f"already running since {_clock_text(record.started)}; do not repeat it, wait"
    done = f"already done at {_clock_text(record.ended or record.started)}"
    if record.result_json is None:
        return f"{done}; do not repeat it"
    value = json.loads(record.result_json, object_hook=lambda d: d["v"] if "$" in d else d)
    return f"{done}; result: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _clock_text(micros: int) -> str:
    recent = time.time() - micros / _MICROS < 86_400
    return at(micros).strftime("%H:%M:%S" if recent else "%Y-%m-%d %H:%M:%S")


def _iso(micros: int | None) -> str | None:
    return None if micros is None else at(micros).isoformat()


def _short(tool: str) -> str:
    name = tool.split("#", 1)[0].rsplit(".", 1)[-1]
    return name if name != "<lambda>" else tool.rsplit(".", 1)[-1]


# ═══ What is loaded when it is first needed ═══════════════════════════════════════════


_FORK_SECONDS: Final = 5.0  # what is loaded may itself wait for something that the fork holds
#: of each thread that forks, which of its hooks hold the lock
_forks: Final[dict[int, list[bool]]] = {}


class _HalfLoaded:
    """In the lock's place in a child whose fork waited for it in vain."""

    def acquire(self, *, timeout: float) -> bool:
        return False

    def __enter__(self) -> NoReturn:
        raise StoreError(
            "this process was forked while another thread had been loading what its first call needs for "
            f"more than {_FORK_SECONDS:g} s, so it is half loaded here; nothing ran. Make a first call before "
            "you fork, or start a new process"
        )

    def __exit__(self, *_error: object) -> None:
        pass


#: held while something is done for the first time in this process; a fork waits for it, because a
#: child waits for ever for what a thread that it does not have was about to load or open
_first_time: Any = threading.RLock()  # a signal handler may call the guard anywhere


def _wait_for_loads() -> None:
    held = _forks.setdefault(threading.get_ident(), [])
    held.append(_first_time.acquire(timeout=0 if held == [False] else _FORK_SECONDS))


def _end_wait() -> list[bool]:
    held = _forks.pop(threading.get_ident(), [])
    for _ in filter(None, held):
        _first_time.release()
    return held


def _end_wait_in_child() -> None:
    global _first_time
    held = _end_wait()
    if held and not any(held):
        _first_time = _HalfLoaded()
    _forks.clear()


@functools.cache
def _wait_before_others() -> None:
    """Let forks wait for loads before they take the locks of what is loaded so far.

    The hooks of a fork run newest first, and a driver that is loaded may ask for such a lock.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_wait_for_loads)


def _load() -> None:
    """Import what first calls need: nothing that has hooks or locks of its own for forks, as logging has."""
    names = ("copy", "dis", "inspect", "numbers", "socket", "traceback", "unicodedata", "urllib.parse")
    with _first_time:
        for name in names:
            __import__(name)


# ═══ Canonical form ═══════════════════════════════════════════════════════════════════
#
# Text that is equal exactly when a user would call two values equal.  Everything that JSON
# does not have carries its kind under a key that starts with "$"; a user's own key that
# starts so is written with one more, so that no value can pass for another kind.

_FORM_VERSION: Final = "1"


def canonical(value: Any) -> str:
    """The stable form of a value, the same on every retry, in every process.

    Raises `UnstableArgument` for an object that has none.
    """
    form = _FORMS.get(type(value))
    return form(value) if form is not None else _other_form(value)


def _tagged(kind: str, form: str) -> str:
    return f'{{"${kind}":{form}}}'


def _form_str(value: str) -> str:
    if value.isascii():
        return _quote(value)
    import unicodedata

    return _quote(unicodedata.normalize("NFC", value))


def _form_int(value: int) -> str:
    # CPython refuses to print more than 4300 decimal digits
    return str(value) if value.bit_length() < 10_000 else _tagged("int", _quote(hex(value)))


def _form_float(value: float) -> str:
    if value - value != 0:
        return _tagged("float", _quote(str(abs(value) if value != value else value)))
    if value.is_integer():
        return _form_int(int(value))
    text = float.__repr__(value)
    if len(text) <= 12 and "e" not in text:  # at most 11 digits: what rounding would leave as they are
        head, _, tail = text.partition(".")
        return f"{'-' if value < 0 else ''}{(head + tail).lstrip('-0')}E-{len(tail)}"
    exponent = int(f"{value:.14e}".partition("e")[2])
    digits = min(15, max(11, exponent + 10))
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return _number(mantissa.replace(".", ""), int(power) - digits + 1)


def _form_decimal(value: Any) -> str:
    if not value.is_finite():
        return _form_float(float("nan") if value.is_nan() else float(value))
    sign, digits, exponent = value.as_tuple()
    return _number(("-" if sign else "") + "".join(map(str, digits)), exponent)


def _number(digits: str, exponent: int) -> str:
    """`digits` times ten to the `exponent`: one text for one number, whatever type it came in."""
    bare = digits.rstrip("0")
    if bare in ("", "-"):
        return "0"
    exponent += len(digits) - len(bare)
    sign, bare = ("-", bare[1:]) if bare[0] == "-" else ("", bare)
    bare = bare.lstrip("0")
    if 0 <= exponent < 10_000 and len(bare) < 4_000:  # CPython refuses to read more than 4300 digits
        return _form_int(int(sign + bare) * 10**exponent)
    return f"{sign}{bare}E{exponent}"


def _form_dict(value: Mapping[Any, Any]) -> str:
    if all(type(key) is str for key in value):
        items = sorted((_form_str(f"${k}" if k[:1] == "$" else k), canonical(value[k])) for k in value)
        return "{" + ",".join([f"{k}:{v}" for k, v in items]) + "}"
    pairs = sorted((canonical(k), canonical(value[k])) for k in value)
    return _tagged("map", "[" + ",".join([f"[{k},{v}]" for k, v in pairs]) + "]")


def _form_list(value: Iterable[Any]) -> str:
    return "[" + ",".join([canonical(v) for v in value]) + "]"


def _form_set(value: Iterable[Any]) -> str:
    return _tagged("set", "[" + ",".join(sorted(canonical(v) for v in value)) + "]")


def _form_bytes(value: Any) -> str:
    return _tagged("bytes", _quote(bytes(value).hex()))


def _form_datetime(value: datetime) -> str:
    offset = value.utcoffset()
    if offset is None:
        return _tagged("naive", _quote(value.isoformat()))
    from datetime import datetime, timedelta

    # naive arithmetic: years 1 and 9999 have no neighbours in other zones
    micros = (value.replace(tzinfo=None) - datetime(1970, 1, 1) - offset) // timedelta.resolution  # noqa: DTZ001
    return _tagged("instant", str(micros))


def _form_time(value: Any) -> str:
    return _tagged(type(value).__name__, _quote(value.isoformat()))


def _form_fraction(value: Any) -> str:
    if value.denominator == 1:
        return _form_int(value.numerator)
    return _tagged("fraction", f"[{value.numerator},{value.denominator}]")


_FORMS: Final[dict[type, Callable[[Any], str]]] = {
    str: _form_str,
    int: _form_int,
    bool: lambda v: "true" if v else "false",
    type(None): lambda v: "null",
    float: _form_float,
    dict: _form_dict,
    list: _form_list,
    tuple: _form_list,
    set: _form_set,
    frozenset: _form_set,
    bytes: _form_bytes,
    bytearray: _form_bytes,
    memoryview: _form_bytes,
    complex: lambda v: _tagged("complex", f"[{_form_float(v.real)},{_form_float(v.imag)}]"),
    range: lambda v: _tagged("range", f"[{v.start},{v.stop},{v.step}]") if len(v) > 1000 else _form_list(v),
    deque: _form_list,
}
# by name, because a value of such a type exists only where its module was imported already
_FORMS_BY_NAME: Final[dict[str, Callable[[Any], str]]] = {
    "decimal.Decimal": _form_decimal,
    "datetime.datetime": _form_datetime,
    "datetime.date": _form_time,
    "datetime.time": _form_time,
    "datetime.timedelta": lambda v: _tagged("timedelta", str(v // type(v).resolution)),
    "fractions.Fraction": _form_fraction,
    "uuid.UUID": lambda v: _tagged("uuid", _quote(v.hex)),
}


def _other_form(value: Any) -> str:
    kind = type(value)
    if isinstance(value, Enum):
        return _tagged("enum", f"[{_quote(_type_name(kind))},{_quote(value.name or '')}]")
    if isinstance(value, type):
        return _tagged("type", _quote(_type_name(value)))
    if hasattr(kind, "__ledger_key__"):
        return _tagged("object", f"[{_quote(_type_name(kind))},{canonical(value.__ledger_key__())}]")
    if hasattr(kind, "get_secret_value"):
        return _tagged("secret", canonical(value.get_secret_value()))
    fields = _fields(value, compared=True)
    if fields is not None:
        return _tagged("object", f"[{_quote(_type_name(kind))},{_form_dict(fields)}]")
    for base in kind.__mro__[:-1]:
        form = _FORMS.get(base) or _FORMS_BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if form is not None:
            return form(value)
    return _abstract_form(value)


def _abstract_form(value: Any) -> str:
    """The form of what only behaves like a path, a mapping, a set or a number."""
    from numbers import Integral, Real

    if hasattr(type(value), "__fspath__"):
        return _tagged("path", canonical(os.fspath(value)))
    if isinstance(value, Mapping):
        return _form_dict(value)
    if isinstance(value, AbstractSet):
        return _form_set(value)
    if isinstance(value, Integral):
        return _form_int(int(value))
    if isinstance(value, Real):
        return _form_float(float(value))
    raise UnstableArgument(f"an object of type {_type_name(type(value))} has no stable form")


def _fields(value: Any, *, compared: bool = False) -> dict[str, Any] | None:
    """The fields of a dataclass, attrs or pydantic object by name; None for anything else.

    `compared` leaves out those that its own `==` leaves out.
    """
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        parts = [f for f in kind.__dataclass_fields__.values() if f._field_type.name == "_FIELD"]
        return {f.name: getattr(value, f.name, None) for f in parts if f.compare or not compared}
    if hasattr(kind, "__attrs_attrs__"):
        return {a.name: getattr(value, a.name, None) for a in kind.__attrs_attrs__ if a.eq or not compared}
    names = getattr(kind, "__pydantic_fields__", None)
    if names is None and hasattr(kind, "__validators__"):  # pydantic 1
        names = getattr(kind, "__fields__", None)
    if names is None:
        return None
    extra = getattr(value, "__pydantic_extra__", None) or {}
    return {**{n: getattr(value, n, None) for n in names}, **extra}


def _type_name(kind: type) -> str:
    return f"{_module_name(kind.__module__)}.{kind.__qualname__}"


@functools.cache
def _main_name() -> str:
    """What `__main__` is called by those who import it: its spec's name, else the file's stem."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None) or "__main__"
    stem = os.path.splitext(os.path.basename(path))[0]
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return folder if stem == "__main__" and path != "__main__" else stem


def _module_name(module: str | None) -> str:
    return _main_name() if module in ("__main__", "__mp_main__", None) else str(module)


# ═══ Secrets ══════════════════════════════════════════════════════════════════════════

_MASK: Final = "****"
_LONG_TEXT: Final = 10_000
# json.dumps makes a new encoder for every call that does not take its defaults
_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
_SECRET_WORDS: Final = frozenset(
    """password passwords passwd passphrase pwd secret secrets token authorization credential credentials
    cvv cvc apikey bearer ssn pin otp jwt api_key api_keys access_key private_key signing_key encryption_key
    auth_key card_number account_number security_code credit_card pass_word pass_phrase""".split()
)


@functools.lru_cache(4096)
def _says_secret(name: str) -> bool:
    """Whether a parameter, key or field of this name holds a secret: `api_key`, not `max_tokens`."""
    import re

    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    pairs = [f"{a}_{b}" for a, b in zip(words, words[1:], strict=False)]  # noqa: RUF007 - itertools for one pair
    return not _SECRET_WORDS.isdisjoint(words + pairs)


class _Shown:
    """Values as they may be stored and shown; `secrets` collects the texts that were masked."""

    def __init__(self, redact: frozenset[str]) -> None:
        self.redact = redact
        self.secrets: list[str] = []

    def text(self, bound: dict[str, Any]) -> str:
        """Arguments as JSON."""
        try:
            shown = self._mapping(bound)
        except RecursionError:  # it counts by key=, or not at all: no reason to refuse it
            shown = {name: f"<{_type_name(type(value))}>" for name, value in bound.items()}
        return _compact(self.scrub(shown))

    def _is_secret(self, name: Any) -> bool:
        return isinstance(name, str) and (name in self.redact or _says_secret(str(name)))

    def _mapping(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        return {str(k): self._masked(v) if self._is_secret(k) else self.of(v) for k, v in values.items()}

    def of(self, value: Any) -> Any:
        """A value in JSON's types, what its names call secret masked."""
        kind = type(value)
        if kind is str:
            return value if len(value) <= _LONG_TEXT else f"{value[:_LONG_TEXT]}… ({len(value)} characters)"
        if kind is bool or kind is int or value is None:
            return value if kind is not int or value.bit_length() < 10_000 else hex(value)
        if kind is float:
            return value if value - value == 0 else str(value)
        if isinstance(value, Enum):
            return self.of(value.value)
        if hasattr(value, "get_secret_value"):
            return self._masked(value)
        fields = _named_parts(value)
        if fields is not None:
            return self._mapping(fields)
        if isinstance(value, list | tuple | set | frozenset | deque):
            return [self._pair(v) if type(v) in (list, tuple) and len(v) == 2 else self.of(v) for v in value]
        if isinstance(value, str):
            return self.of(str.__str__(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{len(bytes(value))} bytes>"
        # what an unknown object says of itself may be a secret, or an address
        return f"<{_type_name(kind)}>" if hasattr(value, "__dict__") else str(value)

    def _pair(self, pair: Any) -> list[Any]:
        """`[("Authorization", …)]` is how headers are given too."""
        name, value = pair
        return [self.of(name), self._masked(value) if self._is_secret(name) else self.of(value)]

    def _masked(self, value: Any) -> str:
        """Every text and number below a secret name is a secret itself."""
        parts = _named_parts(value)
        if parts is not None or isinstance(value, list | tuple | set | frozenset):
            for inner in value if parts is None else parts.values():
                self._masked(inner)
        elif value is not None and not isinstance(value, bool):
            if hasattr(value, "get_secret_value"):
                value = value.get_secret_value()
            is_bytes = isinstance(value, bytes | bytearray | memoryview)
            text = bytes(value).decode("utf-8", "replace") if is_bytes else str(value)
            self.secrets += [part for part in (text, *text.split()) if len(part) > (2 if part is text else 7)]
        return _MASK

    def scrub(self, shown: Any) -> Any:
        """Shown values without the secrets that they repeat: whole, or inside a text if long."""
        if not self.secrets or shown is None or isinstance(shown, bool):
            return shown
        if isinstance(shown, dict):
            return {k: self.scrub(v) for k, v in shown.items()}
        if isinstance(shown, list):
            return [self.scrub(v) for v in shown]
        if str(shown) in self.secrets:
            return _MASK
        return self.clean(shown, 8) if isinstance(shown, str) else shown

    def clean(self, text: str, shortest: int = 0) -> str:
        """`text` (an error message) with every secret that it repeats masked, quoted or not."""
        text = text.encode("utf-8", "backslashreplace").decode()  # half a character cannot be stored
        for secret in sorted(set(self.secrets), key=len, reverse=True):
            if len(secret) >= shortest:
                as_bytes = repr(secret.encode("utf-8", "replace"))[2:-1]
                for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], as_bytes):
                    text = text.replace(form, _MASK)
        return text

    def leaks_into(self, result: str) -> bool:
        """Whether a result, as JSON, repeats a secret: as a whole value, or inside one if long."""
        return any(self._leaks(secret, result) for secret in self.secrets)

    def _leaks(self, secret: str, result: str) -> bool:
        import re

        quoted = json.dumps(secret)
        if quoted in result or re.search(rf"(?:^|[:,\[]){re.escape(secret)}(?:[,\]}}]|$)", result):
            return True
        inside = (quoted[1:-1], secret.encode("utf-8", "replace").hex())
        return len(secret) >= 8 and any(form in result for form in inside)


def _named_parts(value: Any) -> Mapping[Any, Any] | None:
    """What a mapping, a named tuple or an object with fields holds, by name."""
    if isinstance(value, Mapping):
        return value
    return value._asdict() if isinstance(value, tuple) and hasattr(value, "_asdict") else _fields(value)


# ═══ Results: stored as JSON, given back as they were ═════════════════════════════════


def _store_form(value: Any) -> str:
    """A result as JSON text that `_restore` turns back: what JSON lacks is {"$": kind, "v": value, …}.

    Raises whatever says that there is none.
    """
    form = _STORED.get(type(value))
    return form(value) if form is not None else _store_other(value)


def _packed(kind: str, value: str, **more: Any) -> str:
    rest = "".join([f',"{name}":{_store_form(v)}' for name, v in more.items()])
    return f'{{"$":{_quote(kind)},"v":{value}{rest}}}'


def _store_list(values: Iterable[Any]) -> str:
    return "[" + ",".join([_store_form(v) for v in values]) + "]"


def _store_dict(value: dict[Any, Any]) -> str:
    if "$" not in value and all(type(k) is str for k in value):
        return "{" + ",".join([f"{_quote(k)}:{_store_form(v)}" for k, v in value.items()]) + "}"
    return _packed("dict", _store_list(list(pair) for pair in value.items()))


def _store_time(value: Any) -> str:
    zone = getattr(getattr(value, "tzinfo", None), "key", None)
    kind = f"datetime.{type(value).__name__}"
    return _packed(kind, _quote(value.isoformat()), z=zone, f=getattr(value, "fold", 0))


_STORED: Final[dict[type, Callable[[Any], str]]] = {
    str: _quote,
    dict: _store_dict,
    list: _store_list,
    bool: lambda v: "true" if v else "false",
    type(None): lambda v: "null",
    int: lambda v: str(v) if v.bit_length() < 10_000 else _packed("int", _quote(hex(v))),
    float: lambda v: repr(v) if v - v == 0 else _packed("float", _quote(repr(v))),
    tuple: lambda v: _packed("tuple", _store_list(v)),
    set: lambda v: _packed("set", _store_list(v)),
    frozenset: lambda v: _packed("frozenset", _store_list(v)),
    bytes: lambda v: _packed("bytes", _quote(v.hex())),
    bytearray: lambda v: _packed("bytearray", _quote(v.hex())),
    complex: lambda v: _packed("complex", _store_list((v.real, v.imag))),
    deque: lambda v: _packed("deque", _store_list(v)),
}
_STORED_BY_NAME: Final[dict[str, Callable[[Any], str]]] = {
    "decimal.Decimal": lambda v: _packed("decimal.Decimal", _quote(str(v))),
    "uuid.UUID": lambda v: _packed("uuid.UUID", _quote(str(v))),
    "datetime.datetime": _store_time,
    "datetime.date": _store_time,
    "datetime.time": _store_time,
    "datetime.timedelta": lambda v: _packed(
        "datetime.timedelta", _store_list((v.days, v.seconds, v.microseconds))
    ),
}


def _store_other(value: Any) -> str:
    kind = type(value)
    form = _STORED_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if form is not None:
        return form(value)
    if isinstance(value, Enum):
        return _packed("enum", _store_form(value.name), t=_type_name(kind), w=value.value)
    if hasattr(kind, "__fspath__") and kind.__module__.startswith("pathlib"):
        return _packed("path", _quote(str(value)))
    if hasattr(kind, "get_secret_value"):
        raise TypeError("it holds a secret")
    fields = _fields(value)
    if fields is not None:
        how = "model" if hasattr(kind, "__pydantic_fields__") else "data"
        given = sorted(getattr(value, "__pydantic_fields_set__", ()))
        return _packed(how, _store_dict(fields), t=_type_name(kind), s=given)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return _packed("named", _store_list(value), t=_type_name(kind))
    for base, base_form in _STORED.items():
        if isinstance(value, base):  # a subclass without a form comes back as its base
            return base_form(cast("Any", base)(value))
    raise TypeError(f"no stored form for {_type_name(kind)}")


def _restore(text: str, known: Sequence[type] = ()) -> Any:
    """The value that `_store_form` was given; `known` are classes that the tool's annotation names."""
    return json.loads(text, object_hook=functools.partial(_unpack, known) if '"$"' in text else None)


def _unpack(known: Sequence[type], packed: dict[str, Any]) -> Any:
    kind = packed.get("$")
    if kind is None:
        return packed
    value = packed["v"]
    if kind in _UNPACK:
        return _UNPACK[kind](value)
    if kind.startswith("datetime."):
        return _unpack_time(kind, packed)
    plain = packed["w"] if kind == "enum" else tuple(value) if kind == "named" else value
    try:
        made = _class_named(packed["t"], known)
        return plain if made is None else _rebuild(kind, made, packed)
    except Exception:  # its class was changed: plain values are better than nothing
        return plain


def _rebuild(kind: str, made: Any, packed: dict[str, Any]) -> Any:
    """An object of a class of the user, without running its code."""
    value = packed["v"]
    if kind == "enum":
        return made[value] if value in made.__members__ else made(packed["w"])  # a flag of several
    if kind == "named":
        return made._make(value)
    if kind == "model":
        return made.model_construct(_fields_set=set(packed["s"]), **value)
    thing = object.__new__(made)  # not __init__: it may have effects, and takes no init=False fields
    for name, part in value.items():
        object.__setattr__(thing, name, part)
    return thing


def _unpack_time(kind: str, packed: dict[str, Any]) -> Any:
    import datetime as module

    if kind == "datetime.timedelta":
        return module.timedelta(*packed["v"])
    value = getattr(module, kind.partition(".")[2]).fromisoformat(packed["v"])
    if packed["z"]:
        with _first_time:
            from zoneinfo import ZoneInfo

            value = value.replace(tzinfo=ZoneInfo(packed["z"]))
    return value.replace(fold=1) if packed["f"] else value


def _unpack_std(module: str, name: str) -> Callable[[Any], Any]:
    def make(value: Any) -> Any:
        with _first_time:
            return getattr(__import__(module), name)(value)

    return make


_UNPACK: Final[dict[str, Callable[[Any], Any]]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "int": lambda v: int(v, 16),
    "float": float,
    "complex": lambda v: complex(*v),
    "dict": dict,
    "deque": deque,
    "path": _unpack_std("pathlib", "Path"),
    "decimal.Decimal": _unpack_std("decimal", "Decimal"),
    "uuid.UUID": _unpack_std("uuid", "UUID"),
}


def _class_named(name: str, known: Sequence[type]) -> Any:
    """The loaded class of that name; nothing is imported, because a file must not choose what runs."""
    for kind in known:
        if _type_name(kind) == name:
            return kind
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        found: Any = sys.modules.get("__main__" if module == _main_name() else module)
        for part in parts[cut:]:
            found = getattr(found, part, None)
        if isinstance(found, type):
            return found
    return None


# ═══ Identity of a tool ═══════════════════════════════════════════════════════════════

_COROUTINE: Final = 0x80 | 0x100  # CO_COROUTINE, CO_ITERABLE_COROUTINE
_GENERATOR, _ASYNC_GENERATOR = 0x20, 0x200


class _Tool:
    """What is known of a function without calling it: its name, its parameters, its kind."""

    __slots__ = (
        "__weakref__", "by_name", "defaults", "fast", "function", "generation", "is_async", "known_types",
        "name", "options", "ordered", "own_name", "parameters", "policy", "positional", "receiver", "rest",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], name: str, *, receiver: bool) -> None:
        _load()
        self.function = function
        self.own_name = self.name = name
        #: the parameter that is the object of a method, or ""
        self.receiver = ""
        self.is_async = _is_async(function)
        self.options: PolicyOptions = {}
        #: which state of which guard's policies `policy` was made from
        self.generation: object = None
        self.policy: Policy
        self.known_types: tuple[type, ...] | None = None
        self._read_signature(receiver)

    def _read_signature(self, receiver: bool) -> None:
        import inspect

        try:
            self.parameters = inspect.signature(self.function)
        except (ValueError, TypeError):  # some builtins tell nothing about themselves
            self.parameters = inspect.signature(lambda *args, **kwargs: None)
        every = list(self.parameters.parameters.values())
        simple = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.fast = all(p.kind in simple for p in every)
        self.positional = [p.name for p in every if p.kind is simple[0]]
        self.by_name = frozenset(p.name for p in every)
        self.defaults = {p.name: p.default for p in every if p.default is not p.empty}
        self.rest = next((p.name for p in every if p.kind is p.VAR_KEYWORD), None)
        if receiver and every and every[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            self.receiver = every[0].name
        self.ordered = [(name, _quote(name)) for name in sorted(self.by_name - {self.receiver})]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults applied; raises the TypeError that the call would."""
        if self.fast and len(args) <= len(self.positional):
            bound = dict(zip(self.positional, args, strict=False))
            if self.by_name.issuperset(kwargs) and bound.keys().isdisjoint(kwargs):
                bound = {**self.defaults, **bound, **kwargs}
                if len(bound) == len(self.by_name):
                    return bound
        try:
            full = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            own = not self.by_name.issuperset({"key", "ledger_key"} & kwargs.keys())
            hint = "; the guard's own key goes with guard(fn, …, key=…) or policy key=" if own else ""
            raise TypeError(f"{_short(self.name)}(): {error}{hint}") from None
        full.apply_defaults()
        return full.arguments

    def named(self, bound: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, those that came in `**kwargs` too."""
        return bound if self.rest is None else {**bound[self.rest], **bound}

    def form(self, bound: dict[str, Any], ignored: frozenset[str]) -> str:
        """The canonical text of all arguments but the ignored ones."""
        counted = self.ordered
        if ignored:
            counted = [(n, quoted) for n, quoted in counted if n not in ignored]
            if self.rest is not None:
                rest = {n: v for n, v in bound[self.rest].items() if n not in ignored}
                bound = {**bound, self.rest: rest}
        try:
            return "{" + ",".join([f"{quoted}:{canonical(bound[n])}" for n, quoted in counted]) + "}"
        except (UnstableArgument, RecursionError):
            return "{" + ",".join([f"{quoted}:{self.part(n, bound[n])}" for n, quoted in counted]) + "}"

    def part(self, name: str, value: Any) -> str:
        """The canonical text of one argument, with an error that names it."""
        try:
            return canonical(value)
        except (UnstableArgument, RecursionError) as error:
            if name in self.defaults and self.defaults[name] is value:
                return _tagged("default", _quote(name))
            why = str(error) if isinstance(error, UnstableArgument) else "it contains itself"
            raise UnstableArgument(
                f"{_short(self.name)} did not run: argument {name!r} cannot identify the call "
                f"({why}). Pass key=…, or leave it out with guard.policy({_short(self.name)}, "
                f"ignore=[{name!r}]), or give its class a __ledger_key__() method."
            ) from None

    def restore(self, text: str) -> Any:
        """A recorded result, as the tool returned it."""
        if '"$"' in text and self.known_types is None:
            self.known_types = tuple(_annotated_types(self.function))
        return _restore(text, self.known_types or ())


def _is_async(function: Any) -> bool:
    """Whether calling it gives something to await; a plain wrapper around async counts as async."""
    import inspect

    seen: Any = function
    while seen is not None:
        code = getattr(seen, "__code__", None)
        if code is not None and code.co_flags & _COROUTINE:
            return True
        seen = getattr(seen, "__wrapped__", None)
    return inspect.iscoroutinefunction(function)


def _annotated_types(function: Any) -> Iterator[type]:
    """Every class that the return annotation names, at any depth."""
    import typing

    try:
        todo = [typing.get_type_hints(function).get("return")]
    except Exception:  # an annotation that cannot be evaluated restores nothing by itself
        return
    while todo:
        hint = todo.pop()
        if isinstance(hint, type):
            yield hint
        todo.extend(typing.get_args(hint))


def _take_apart(fn: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], str, bool]:
    """A callable as (function, leading arguments, keyword arguments, name, takes a receiver)."""
    first: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    while isinstance(fn, functools.partial):
        first, named, fn = fn.args + first, {**fn.keywords, **named}, fn.func
    fn = fn.__func__ if isinstance(fn, staticmethod) else fn
    owner = getattr(fn, "__self__", None)
    if owner is not None and hasattr(fn, "__func__"):
        return fn.__func__, (owner, *first), named, _function_name(fn.__func__, owner), True
    if hasattr(fn, "__code__"):
        return fn, first, named, _function_name(fn), _first_is_receiver(fn)
    unbound = getattr(type(owner), getattr(fn, "__name__", ""), None)
    if callable(unbound) and not isinstance(owner, type) and hasattr(unbound, "__objclass__"):  # [].append
        return unbound, (owner, *first), named, f"{_type_name(type(owner))}.{fn.__name__}", True
    if isinstance(fn, type) or hasattr(fn, "__name__"):
        module = getattr(fn, "__module__", None) or getattr(owner, "__name__", "builtins")
        return fn, first, named, f"{_module_name(module)}.{getattr(fn, '__qualname__', fn)}", False
    name = _type_name(type(fn))
    if "<locals>" in name:
        name += "#" + _code_digest(type(fn).__call__)
    return type(fn).__call__, (fn, *first), named, name, True


def _first_is_receiver(function: Any) -> bool:
    """Whether a plain function is a method taken from its class: its first argument is the object."""
    parent = function.__qualname__.rpartition(".")[0]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return bool(parent) and not parent.endswith("<locals>") and names[:1] in (("self",), ("cls",))


def _function_name(function: Any, owner: Any = None) -> str:
    name = f"{_module_name(function.__module__)}.{function.__qualname__}"
    if isinstance(owner, type) and not function.__qualname__.startswith(f"{owner.__qualname__}."):
        name = f"{_type_name(owner)}.{function.__name__}"  # an inherited class method, by its class
    if "<lambda>" in name or "<locals>" in name:
        name += "#" + _code_digest(function)
    return name


def _code_digest(function: Any) -> str:
    """What tells two lambdas apart: names, constants and plain closed-over values.

    Neither line numbers nor bytecode: an unrelated edit or a new Python must not change it.
    """
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return "0"
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    rebound = _rebound_names(code)
    values = [f"{n}={_plain_cell(c)}" for n, c in cells if n not in rebound]
    return hashlib.sha256(repr((_code_parts(code), values)).encode()).hexdigest()[:8]


def _code_parts(code: CodeType) -> tuple[Any, ...]:
    parts = [_code_parts(c) if hasattr(c, "co_code") else _constant(c) for c in code.co_consts]
    return (code.co_names, code.co_varnames, code.co_freevars, parts)


def _constant(value: Any) -> str:
    try:
        return canonical(value)
    except UnstableArgument:
        return type(value).__name__


_EMPTY_CELL: Final = CellType()


def _plain_cell(cell: Any) -> str:
    try:
        value = cell.cell_contents
    except ValueError:  # still empty
        return ""
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{_module_name(value.__module__)}.{value.__qualname__}"  # what a decorator wraps
    plain = (str, int, float, bool, bytes, tuple, frozenset, type(None))
    return _constant(value) if isinstance(value, plain) else ""


def _closed_objects(function: Any) -> tuple[Any, ...]:
    """What a nested function closes over and `_code_digest` cannot tell apart."""
    cells = [c for c in getattr(function, "__closure__", None) or () if not _plain_cell(c)]
    contents = [c.cell_contents for c in cells if c != _EMPTY_CELL]
    return tuple(v for v in contents if type(v) not in (list, dict, set) and v is not function)


def _rebound_names(code: CodeType) -> set[str]:
    """Closed-over names that the function assigns: a counter must not change who the tool is."""
    import dis

    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    return names.union(*(_rebound_names(c) for c in code.co_consts if hasattr(c, "co_code")))


_TOOL_MARKS: Final = "args_schema tool_spec inputs func fn params_json_schema input_schema".split()


def _refuse_uncallable(fn: Any, where: str) -> None:
    """Raise for what cannot run once: say what to wrap instead."""
    if isinstance(fn, classmethod) or not callable(fn):
        raise UsageError(
            f"{where}: {fn!r:.60} ({type(fn).__name__}) is not callable; pass the function "
            "itself and build the framework's tool object from the guarded function"
        )
    plain = hasattr(fn, "__code__") or isinstance(fn, type | functools.partial)
    described = all(isinstance(getattr(fn, n, None), str) for n in ("name", "description"))
    if not plain and described and any(hasattr(fn, mark) for mark in _TOOL_MARKS):
        raise UsageError(
            f"{where}: {_brief(fn)} is a tool object of {type(fn).__module__.partition('.')[0]}; "
            "guard the function first, then build the tool from what guard.once or "
            "guard.wrap_tools gives back"
        )
    inner = fn.func if isinstance(fn, functools.partial) else fn
    inner = inner.__func__ if isinstance(inner, staticmethod) else inner
    inner = inner if hasattr(inner, "__code__") else getattr(type(inner), "__call__", None)  # noqa: B004 - its code is wanted, not whether it is
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    if code.co_flags & (_GENERATOR | _ASYNC_GENERATOR):
        kind = "an async generator" if code.co_flags & _ASYNC_GENERATOR else "a generator"
        raise UsageError(
            f"{where}: {_brief(fn)} is {kind}: its effects happen while somebody iterates, so a "
            "guard cannot know when it is done; guard the function that consumes it"
        )
    if code.co_name == "helper" and getattr(inner, "__globals__", {}).get("__name__") == "contextlib":
        raise UsageError(
            f"{where}: {_brief(fn)} is a context manager, which has two halves; guard the function "
            "that does the effect inside its with block"
        )


def _brief(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    return str(getattr(value, "__qualname__", None) or getattr(value, "name", None) or type(value).__name__)


# ═══ Clock and process ════════════════════════════════════════════════════════════════


class Clock:
    """Where time comes from, in microseconds. Tests may pass a store one of their own."""

    def wall(self) -> int:
        """UTC since 1970; may step."""
        return time.time_ns() // 1000

    def mono(self) -> int:
        """Monotonic, the same for every process of one boot."""
        return time.monotonic_ns() // 1000


class _Process(NamedTuple):
    """Who made a claim: enough to prove, on the same machine, that this process is over."""

    id: str
    host: str
    pid: int
    #: boot id and time namespace: equal means one monotonic clock; "" where unknown
    boot: str
    #: pid namespace, "" where unknown: then only the lease decides
    space: str
    #: start time of the pid in clock ticks, so that a reused pid is not taken for it
    start: str


def _read_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _inode(path: str) -> str:
    try:
        return str(os.stat(path).st_ino)
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat after the command's name: state first, start time at 19."""
    return _read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()


_identities: dict[int, _Process] = {}


def _me() -> _Process:
    """This process, the same for all its threads; a forked child is another one."""
    pid = os.getpid()
    return _identities.get(pid) or _identities.setdefault(pid, _identify(pid))


def _identify(pid: int) -> _Process:
    import socket

    boot = _read_file("/proc/sys/kernel/random/boot_id")
    try:  # inside a foreign /proc everything read there is about somebody else
        ours = os.readlink("/proc/self") == str(pid)
    except OSError:
        ours = False
    fields = _stat_fields(pid) if ours else []
    known = bool(boot and len(fields) > 19)
    return _Process(
        id=os.urandom(6).hex(),
        host=socket.gethostname(),
        pid=pid,
        boot=f"{boot}:{_inode('/proc/self/ns/time')}" if boot else "",
        space=_inode("/proc/self/ns/pid") if known else "",
        start=fields[19] if known else "",
    )


def _is_dead(owner: _Process) -> bool:
    """Whether a process of this machine is proved over; any doubt says no, and the lease decides."""
    me = _me()
    if not owner.space or (owner.boot, owner.space) != (me.boot, me.space) or owner.pid == me.pid:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    fields = _stat_fields(owner.pid)
    if len(fields) < 20:  # hidden, or gone since: /proc proves nothing by silence
        return False
    if fields[19] != owner.start:
        return True
    try:  # a zombie whose other threads still run can still do its effect
        return fields[0] in "ZX" and os.listdir(f"/proc/{owner.pid}/task") == [str(owner.pid)]
    except OSError:
        return False


def new_token() -> str:
    """An owner token: random for each claim, and telling which process made it."""
    return f"{_me().id}.{os.urandom(6).hex()}"


# ═══ The protocol: what a transition makes of the rows of a call ══════════════════════
#
# Each operation is data, and a pure function from the rows of one call, as they are inside
# the transaction that writes, to the rows that it changes.  Every store runs these: SQLite
# in BEGIN IMMEDIATE (with single guarded statements where those come to the same), a
# six-method store by compare-and-append.


class Now(NamedTuple):
    """The clocks of the store, and whether a RUNNING row's owner is over (lapsed or proved dead)."""

    wall: int
    mono: int
    over: Callable[[Run], bool]


class Verdict(NamedTuple):
    """What an operation came to, and the row that it is about."""

    kind: str
    row: Run | None = None
    #: the row that a claim closed as in doubt to take over
    closed: Run | None = None
    #: first run of the intended effect: what `idempotency_key` is made from
    anchor: int = 1


class Change:
    """What an operation does to the rows: guarded updates, at most one insert, notes for the log."""

    __slots__ = ("forget", "insert", "notes", "updates", "verdict")

    def __init__(self, kind: str, row: Run | None = None) -> None:
        self.verdict = Verdict(kind, row)
        self.updates: list[tuple[Run, Run]] = []
        self.insert: Run | None = None
        self.forget = False
        #: (kind, row, n, detail) of each event; n counts towards the totals
        self.notes: list[tuple[str, Run, int, str | None]] = []

    def move(self, row: Run, status: str | None = None, **values: Any) -> Run:
        """Change a row; the one door through which a status changes."""
        if status is not None:
            if status not in _NEXT[row.status]:
                raise LedgerError(f"run {row.run} of {row.call} cannot go from {row.status} to {status}")
            values["status"] = status
        new = row._replace(**values)
        self.updates.append((row, new))
        if row.status == "running" != new.status:
            self.notes.append((new.status, new, 1, new.error))
        return new


class Claim(NamedTuple):
    """Insert the next run if the policy allows one; else say why not."""

    call: str
    token: str
    tool: str
    wf: str
    caller: str
    key: str | None
    matched: str | None
    max: int
    ttl: int | None
    lease: int
    on_doubt: Literal["rerun", "block", "reconcile"]
    forced: bool
    args: str | None = None
    #: run and owner of the doubt that reconcile answered with NOT_DONE
    not_done: tuple[int, str] | None = None

    def first_row(self, wall: int, mono: int) -> Run:
        """The row of run 1."""
        return Run(
            self.call, 1, self.tool, self.wf, self.caller, self.token, self.key, self.args, self.matched,
            wall, wall + self.lease, mono + self.lease, forced=int(self.forced),
        )  # fmt: skip

    def judge(self, rows: Sequence[Run], now: Now) -> Verdict:
        """Whether a run may start, from all rows of the call, and what the caller gets if not."""
        mine = next((r for r in rows if r.owner == self.token), None)
        if mine is not None:  # the reply to my claim was lost
            kind = "granted" if mine.status == "running" else "lost"
            return Verdict(kind, mine, None, _anchor(rows[:-1]))
        latest = rows[-1] if rows else None
        if latest is not None and latest.status == "running" and not now.over(latest):
            return Verdict("live", latest)
        if not self.forced and latest is not None:
            horizon = -1 if self.ttl is None else now.wall - self.ttl
            counted = [r for r in rows if r.succeeded_since(horizon)]
            if len(counted) >= self.max:
                return Verdict("done", counted[-1])
            doubtful = latest.status in ("running", "doubt") and not latest.released
            if doubtful and _mismatch(latest.matched, self.matched):
                return Verdict("conflict", latest)
            if doubtful and self.on_doubt != "rerun" and self.not_done != (latest.run, latest.owner):
                return Verdict("reconcile" if self.on_doubt == "reconcile" else "doubt", latest)
        return Verdict("run", latest, None, _anchor(rows))

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Judge; if a run may start, close what is still open and insert the next one."""
        verdict = self.judge(rows, now)
        change = Change(verdict.kind, verdict.row)
        if verdict.kind == "granted" and verdict.row is not None:
            change.move(verdict.row, lease=now.wall + self.lease, mono=now.mono + self.lease)
            change.verdict = verdict
        elif verdict.kind == "run":
            latest = verdict.row
            closed = None if latest is None else self._close(latest, change, now)
            change.insert = self.first_row(now.wall, now.mono)._replace(run=latest.run + 1 if latest else 1)
            change.notes.append(("claimed", change.insert, 1, None))
            change.verdict = Verdict("granted", change.insert, closed, verdict.anchor)
        return change

    def _close(self, latest: Run, change: Change, now: Now) -> Run | None:
        """Takeover: close what is still open, and answer or pass over a doubt."""
        answered = not latest.released and self.not_done == (latest.run, latest.owner)
        over = {"ended": now.wall, "closed_by": self.token}
        if latest.status == "running":
            if answered:
                change.move(latest, "failed", **over)
                return None
            return change.move(latest, "doubt", **over, released=int(self.forced or latest.released))
        if latest.status == "doubt" and answered:
            new = change.move(latest, "failed", **over)
            change.notes.append(("resolved", new, 0, "reconcile: not done"))
        elif latest.status == "doubt" and self.forced:
            change.move(latest, released=1)
        return None


def _mismatch(theirs: str | None, ours: str | None) -> list[str]:
    """The parameters named in match= whose digests are not what they were."""
    if not (theirs and ours) or theirs == ours:
        return []
    old, new = json.loads(theirs), json.loads(ours)
    return sorted(n for n in new if n in old and new[n] != old[n])


def _anchor(rows: Sequence[Run]) -> int:
    """Number of the first run after the last success: runs that share it mean one effect."""
    return max((r.run for r in rows if "success" in (r.status, r.late)), default=0) + 1


class Settle(NamedTuple):
    """The owner's word on how its run ended; late if the run was given up meanwhile."""

    claim: Claim
    run: int
    status: str
    result: str | None = None
    error: str | None = None
    trace: str | None = None

    @property
    def call(self) -> str:
        """The call that the run is of."""
        return self.claim.call

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Close the run if it is still open and mine."""
        token = self.claim.token
        row = next((r for r in rows if r.owner == token), None)
        if row is None:
            return Change("gone")
        if row.closed_by == token:  # the reply to my own settle was lost
            return Change("settled", row)
        if row.status != "running":
            return self._late(row, now)
        change = Change("settled", row)
        ending = {"result": self.result, "error": self.error, "trace": self.trace}
        change.move(row, self.status, ended=now.wall, closed_by=token, **ending)
        return change

    def _late(self, row: Run, now: Now) -> Change:
        change = Change("late", row)
        takes = {"doubt": ("success", "failed"), "failed": ("success",)}.get(row.status, ())
        if row.late is None and self.status in takes:
            won = self.status == "success"
            result = self.result if won and row.result is None else row.result
            new = change.move(
                row, late=self.status, late_at=now.wall, result=result, error=row.error or self.error
            )
            change.notes.append(("late", new, int(won), self.status))
        return change


class Renew(NamedTuple):
    """The owner is alive: its lease starts anew."""

    claim: Claim
    run: int

    @property
    def call(self) -> str:
        """The call that the run is of."""
        return self.claim.call

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Move the lease if the run is still open and mine."""
        row = next((r for r in rows if r.run == self.run and r.owner == self.claim.token), None)
        if row is None or row.status != "running":
            return Change("lost", row)
        change = Change("renewed", row)
        change.move(row, lease=now.wall + self.claim.lease, mono=now.mono + self.claim.lease)
        return change


def _seen(rows: Sequence[Run], run: int, owner: str, now: Now) -> Change | Run:
    """The latest run if it is the one that the caller saw and it is not alive; else the refusal."""
    if not rows:
        return Change("nothing")
    latest = rows[-1]
    if (latest.run, latest.owner) != (run, owner):
        return Change("used", latest)
    return Change("live", latest) if latest.status == "running" and not now.over(latest) else latest


class Release(NamedTuple):
    """`retry`: the next call runs, although this one succeeded or is in doubt."""

    call: str
    token: str
    #: the run that the caller saw; a later one means that the release was used
    run: int
    owner: str
    max: int
    ttl: int | None
    why: str

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Release the latest run, and what else would still block."""
        latest = _seen(rows, self.run, self.owner, now)
        if isinstance(latest, Change):
            return latest
        change = Change("released", latest)
        if latest.status == "running":
            change.move(latest, "doubt", ended=now.wall, closed_by=self.token, released=1)
        else:
            change.move(latest, released=1)
        # after a forced run that failed, the success before it still blocks
        horizon = -1 if self.ttl is None else now.wall - self.ttl
        for row in [r for r in rows[:-1] if r.succeeded_since(horizon)][self.max - 1 :]:
            change.move(row, released=1)
        change.notes.append(("released", latest, 0, self.why))
        return change


class Resolve(NamedTuple):
    """Somebody, or a reconcile function, knows how the doubt ended."""

    call: str
    token: str
    run: int
    owner: str
    done: bool
    result: str | None
    #: a reconcile's answer also gives way to a release
    reconciled: bool
    why: str

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Close the doubt if it is still the latest run and nobody released or resolved it."""
        latest = _seen(rows, self.run, self.owner, now)
        if isinstance(latest, Change):
            return latest
        if latest.status not in ("running", "doubt") or (self.reconciled and latest.released):
            return Change("settled", latest)
        change = Change("resolved", latest)
        result = self.result if self.done else latest.result
        new = change.move(
            latest, "success" if self.done else "failed", ended=now.wall, closed_by=self.token, released=0,
            result=result,
        )  # fmt: skip
        counts = self.done and latest.status == "doubt" and latest.late != "success"
        change.notes.append(("resolved", new, int(counts), self.why))
        return change


class Reset(NamedTuple):
    """Forget a call. `asked` spares a run that started after the reset was asked for."""

    call: str
    token: str
    asked: int

    def apply(self, rows: Sequence[Run], now: Now) -> Change:
        """Drop all rows unless one is alive or too young."""
        if not rows:
            return Change("nothing")
        latest = rows[-1]
        if latest.status == "running" and not now.over(latest):
            return Change("live", latest)
        if latest.started > self.asked:
            return Change("used", latest)
        change = Change("reset", latest)
        change.forget = True
        change.notes.append(("reset", latest, 0, None))
        return change


Op = Claim | Settle | Renew | Release | Resolve | Reset


# ═══ Stores: the contract ═════════════════════════════════════════════════════════════

_forked: Final[weakref.WeakSet[Store]] = weakref.WeakSet()  # what a fork must look after
_TOTALS: Final = ("actions", "attempts", "executed", "blocked", "failed", "in_doubt", "suspended", "running")
Totals = dict[str, dict[str, int]]


class Store:
    """Where calls are kept. A store of your own needs the six methods below and nothing else.

    `claim` must be atomic, and `get` must see what its own process wrote.  A call is a list of
    immutable versions `call`, `call~2`, …, each with the whole state of the call; every
    transition reads the newest and claims the next, so whatever was decided on an old view
    cannot be written.  `put` serves only counters (`call~n~process`), each written by one
    process.  `delete` is never used by the guard; `clear` is the owner's broom, for when
    nothing runs (`guard.reset` is the safe way).

    A store that can do a transition in one atomic step overrides `transact`.
    """

    #: a claim costs no more than a look: the store tells a loser why in the same step
    judges_in_claim = False
    #: where what blocks is done for async callers; None is the loop's own, of few threads
    executor: Any = None
    clock: Clock
    _keeper: _Keeper | None
    _newest_seen: dict[str, tuple[int, Record]]
    _counters: dict[str, Record]
    _counter_lock: threading.RLock
    _uncounted: set[str]

    def __new__(cls, *_args: object, **_options: object) -> Self:
        """Set what the base needs, so that a store's own `__init__` may forget about it."""
        self = super().__new__(cls)
        self.clock = Clock()
        self._keeper = None
        self._newest_seen, self._counters, self._uncounted = {}, {}, set()
        self._counter_lock = threading.RLock()
        _forked.add(self)
        return self

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock = clock or self.clock

    # -- the six methods --

    def get(self, id: str) -> Record | None:
        """The record of that id, or None."""
        raise NotImplementedError(f"{type(self).__name__} has no get(id)")

    def claim(self, record: Record) -> bool:
        """Insert the record if its id is absent, atomically; False when it is there already."""
        raise NotImplementedError(f"{type(self).__name__} has no claim(record)")

    def put(self, record: Record) -> None:
        """Write the record, whatever is there."""
        raise NotImplementedError(f"{type(self).__name__} has no put(record)")

    def delete(self, id: str) -> None:
        """Remove the record of that id."""
        raise NotImplementedError(f"{type(self).__name__} has no delete(id)")

    def all(self, wf: str | None = None) -> Iterable[Record]:
        """Every record, or those of one workflow."""
        raise NotImplementedError(f"{type(self).__name__} has no all(wf=None)")

    def clear(self, wf: str | None = None) -> None:
        """Remove every record, or those of one workflow."""
        raise NotImplementedError(f"{type(self).__name__} has no clear(wf=None)")

    # -- what is built on them --

    def _use(self, method: Callable[..., T], *values: Any) -> T:
        """Call one of the six; whatever it raises is a `StoreError`."""
        try:
            return method(*values)
        except LedgerError:
            raise
        except Exception as error:
            raise StoreError(
                f"{type(self).__name__}.{method.__name__} failed ({error!r}); see that the store works"
            ) from error

    def transact(self, op: Op) -> Verdict:
        """Apply one operation atomically; repeating it after an error is safe."""
        for _ in range(1000):
            position, newest = self._newest(op.call)
            rows = _rows_from(newest)
            change = op.apply(rows, self._now())
            if not (change.updates or change.insert or change.forget):
                return change.verdict
            version = self._version(op.call, position + 1, _applied(rows, change), newest)
            if self._use(self.claim, version) or self._is_mine(version):
                self._newest_seen[op.call] = (position + 1, version)
                return change.verdict
        raise StoreError(f"call {op.call}: a thousand other writers came first; is claim() atomic?")

    def _now(self) -> Now:
        wall = self.clock.wall()
        return Now(wall, self.clock.mono(), lambda run: run.lease <= wall)

    def _is_mine(self, version: Record) -> bool:
        found = self._use(self.get, version.id)
        return found is not None and found.holder == version.holder

    def _newest(self, call: str) -> tuple[int, Record | None]:
        """Position and record of the newest version: gallop from the last one seen, then bisect."""
        low, found = self._newest_seen.get(call, (0, None))
        step = 1
        while record := self._use(self.get, _version_id(call, low + step)):
            low, found, step = low + step, record, step * 2
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            record = self._use(self.get, _version_id(call, middle))
            low, high, found = (middle, high, record) if record else (low, middle, found)
        if found is not None:
            if len(self._newest_seen) > 10_000:
                self._newest_seen.clear()
            self._newest_seen[call] = (low, found)
        return low, found

    def _version(self, call: str, position: int, rows: list[Run], newest: Record | None) -> Record:
        """The next version. Its `holder` is the token of this append, its `blocked` what a reset forgave."""
        forgiven = newest.blocked if newest else 0
        if not rows:
            forgiven = sum(c.blocked for c in self._counter_records(call))
        return _record(rows or _rows_from(newest), 0)._replace(
            id=_version_id(call, position),
            blocked=forgiven,
            holder=new_token(),
            state=json.dumps([list(r) for r in _worth_keeping(rows)]),
        )

    def _counter_records(self, call: str) -> list[Record]:
        return [r for r in self._use(self.all) if r.call == call and r.id.count("~") == 2]

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return _rows_from(self._newest(call)[1])

    def quick(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """Status, released, result and number of each run: all that most duplicates need."""
        return [(r.status, r.released, r.result, r.run) for r in self.rows(call)]

    def count(self, kind: str, claim: Claim, run: int, error: str | None = None) -> None:
        """Count an attempt that ran nothing ("blocked"), or one of an unlimited tool ("ran", "raised")."""
        with self._counter_lock:
            name, now = f"{claim.call}~n~{_me().id}", self.clock.wall()
            counter = self._counters.get(name)
            if counter is None:
                fresh = _record([claim.first_row(now, 0)], 0)
                counter = fresh._replace(id=name, status=Status.SUCCESS, attempts=0, run=run)
            self._counters[name] = counter = counter._replace(
                attempts=counter.attempts + 1,
                runs=counter.runs + int(kind == "ran"),
                blocked=counter.blocked + int(kind == "blocked"),
                error=error or counter.error,
                touched=now,
            )
            self._uncounted.add(name)
        try:
            self.flush()
        except StoreError:  # the number is absolute: a later put makes up for it
            self.keeper.counted()

    def reset(self, wf: str | None, asked: int) -> None:
        """Forget every call of a workflow (None: of all); raises `InProgress` while one runs."""
        calls = sorted({r.call for r in self._use(self.all, wf)})
        for call in calls:
            rows = self.rows(call)
            if rows and rows[-1].status == "running" and not self.is_over(rows[-1]):
                raise _busy_reset(self.describe(rows))
        for call in calls:
            if self.transact(Reset(call, new_token(), asked)).kind == "live":
                raise _busy_reset(self.describe(self.rows(call)))

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first."""
        counters: dict[str, list[Record]] = {}
        found: dict[str, Record] = {}
        for record in self._use(self.all, wf):
            if record.id.count("~") == 2:
                counters.setdefault(record.call, []).append(record)
            else:
                found.setdefault(record.call, record)
        first = {c: counters[c][0] for c in counters} | found
        for call in sorted(first, key=lambda c: first[c].created):
            if _is_named(first[call].tool, tool):
                counted, rows = self._counted(call, counters.get(call, []))
                if counted is not None:
                    yield counted, rows

    def _counted(self, call: str, counters: Sequence[Record]) -> tuple[Record | None, list[Run]]:
        """The record of a call with what its counters say, and its runs."""
        newest = self._newest(call)[1]
        if newest is None:
            return (_tally_record(counters) if counters else None), []
        rows = _rows_from(newest)
        blocked = sum(c.blocked for c in counters) - newest.blocked
        return (self.describe(rows, blocked) if rows else None), rows

    def look(self, call: str) -> Record | None:
        """The record of a call, with all that is counted; None if it was never made."""
        return self._counted(call, self._counter_records(call))[0]

    def totals(self) -> Totals:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        found: Totals = {}
        for record, rows in self.calls():
            sums = found.setdefault(record.tool, dict.fromkeys(_TOTALS, 0))
            status = "in_doubt" if record.in_doubt else record.status.value
            counts = {"actions": 1, "attempts": record.attempts, "executed": record.runs}
            counts["blocked"] = record.blocked
            if rows and status in sums and not (record.in_doubt and record.released):
                counts[status] = 1
            for name, n in counts.items():
                sums[name] += n
        return found

    def last_errors(self) -> dict[str, str | None]:
        """By tool, the error of its newest call whose latest run failed."""
        return {r.tool: r.error for r, _ in self.calls() if r.status is Status.FAILED}

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number; a six-method store keeps no such log."""
        return iter(())

    def is_over(self, run: Run) -> bool:
        """Whether the owner of a RUNNING run is over."""
        return self._now().over(run)

    def now_for(self, rows: Sequence[Run]) -> Now:
        """The clocks, for a decision on rows just read."""
        over = {r.run: self.is_over(r) for r in rows if r.status == "running"}
        return Now(self.clock.wall(), self.clock.mono(), lambda run: over[run.run])

    def describe(self, rows: Sequence[Run], blocked: int | None = None) -> Record:
        """The record of a call from its runs."""
        last = rows[-1]
        total = sum(r.blocked for r in rows) if blocked is None else blocked
        record = _record(rows, total)
        doubt = record.in_doubt or (last.status == "running" and self.is_over(last))
        return record._replace(in_doubt=doubt, holder=self.holder(last))

    def holder(self, run: Run) -> str:
        """Where the owner of a run lives, for people."""
        me = _me()
        return f"this process (pid {me.pid})" if run.owner.startswith(me.id) else run.caller

    @property
    def keeper(self) -> _Keeper:
        """The background thread's work: leases, counters, outcomes that could not be written yet."""
        keeper = self._keeper
        if keeper is None or keeper.pid != os.getpid():
            self._keeper = keeper = _Keeper(self)
        return keeper

    def flush(self, patience: float = 5.0) -> None:
        """Write what was only counted so far; `StoreError` if that cannot be."""
        with self._counter_lock:
            for name in list(self._uncounted):
                self._use(self.put, self._counters[name])
                self._uncounted.discard(name)

    def flush_for_reading(self) -> None:
        """`flush`, if the store takes it at once: a look waits for no writer."""
        try:
            self.flush(patience=0.2)
        except LedgerError:
            self.keeper.counted()

    def pause(self, waited: float) -> float:
        """How many seconds a duplicate that waited so long may wait before it looks again."""
        return min(0.002 + waited / 8, 0.05)

    def wait(self, call: str, seconds: float) -> None:
        """Return when that call may have changed, at the latest after so many seconds."""
        time.sleep(seconds)

    async def wait_async(self, call: str, seconds: float) -> None:
        """`wait` without blocking the event loop."""
        import asyncio

        await asyncio.sleep(seconds)

    def check(self) -> dict[str, Any]:
        """Prove that the store can be read; raises `StoreError`."""
        self._use(self.get, "check")
        return {"store": type(self).__name__, "ok": True}

    def perform_on(self, connection: Any, op: Op) -> Verdict:
        """Apply one operation inside the transaction that is open on a user's connection."""
        raise UsageError(f"{type(self).__name__} shares no transaction; a SQLite file or PostgreSQL does")

    def make_room(self) -> None:
        """Give up what can be given up, because the store is full."""

    def close(self) -> None:
        """Finish what is pending; the store opens again when it is used again."""
        if self._keeper is not None:
            self._keeper.finish()

    # -- async callers --

    async def transact_async(self, op: Op) -> Verdict:
        """`transact` without blocking the event loop; a claim granted to a cancelled caller is given back."""
        import asyncio

        gone: list[bool] = []
        given: list[Verdict] = []

        def give_back() -> None:
            if gone and given and isinstance(op, Claim) and given[0].kind == "granted" and given[0].row:
                self.keeper.keep(_not_entered(op, given[0].row.run))

        def work() -> Verdict:
            given.append(self.transact(op))
            give_back()
            return given[0]

        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self.executor, work))
        except (asyncio.CancelledError, GeneratorExit):
            gone.append(True)  # whichever side comes second sees both, and settling twice is settling once
            give_back()
            raise

    async def rows_async(self, call: str) -> list[Run]:
        """`rows` without blocking the event loop."""
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(self.executor, self.rows, call)

    async def quick_async(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """`quick` without blocking the event loop."""
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(self.executor, self.quick, call)

    async def off_loop(self, look: Callable[[], T]) -> T:
        """What a function finds that asks the store, without blocking the event loop."""
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(self.executor, look)

    # -- fork --

    def _before_fork(self) -> None:
        self._counter_lock.acquire(timeout=5)

    def _after_fork_in_parent(self) -> None:
        _ring(self._counter_lock)

    def _after_fork_in_child(self) -> None:
        # a lock that was waited for in vain is nobody's here, and the counters are the parent's to write
        self._counter_lock = threading.RLock()
        self._counters, self._uncounted = {}, set()

    def __getstate__(self) -> NoReturn:
        raise UsageError(
            f"a {type(self).__name__} object lives in one process and cannot be pickled; name the "
            "store by path or URL instead: Guard('ledger.db') carries that to a worker"
        )


def _version_id(call: str, position: int) -> str:
    return call if position == 1 else f"{call}~{position}"


def _rows_from(version: Record | None) -> list[Run]:
    return [] if version is None else [Run(*row) for row in json.loads(version.state)]


def _applied(rows: list[Run], change: Change) -> list[Run]:
    if change.forget:
        return []
    new = {old.run: row for old, row in change.updates}
    return [*(new.get(r.run, r) for r in rows), *([change.insert] if change.insert else [])]


def _worth_keeping(rows: list[Run]) -> list[Run]:
    """What the next decision may need, whole; of older runs that decide nothing, a hundred, bare."""
    kept = [r for r in rows[:-1] if "success" in (r.status, r.late) or r.status == "doubt"]
    bare = {r.run: r._replace(args=None, trace=None) for r in [*rows[-100:-1], *kept]}
    return [*(bare[n] for n in sorted(bare)), *rows[-1:]]


def _record(rows: Sequence[Run], blocked: int) -> Record:
    last = rows[-1]
    won = [r for r in rows if "success" in (r.status, r.late)]
    result = last.result if last.result is not None or not won else won[-1].result
    times = [t for r in rows for t in (r.started, r.ended, r.late_at) if t is not None]
    return Record(
        id=last.call, call=last.call, run=last.run, tool=last.tool, wf=last.wf, caller=last.caller,
        owner=last.owner, key=last.key, args_json=last.args, status=Status(last.status),
        result_json=result, error=last.error, attempts=len(rows) + blocked, runs=len(won),
        blocked=blocked, created=rows[0].started, touched=max(times), started=last.started,
        ended=last.ended, lease=last.lease, released=bool(last.released), late=last.late,
        in_doubt=last.status == "doubt" and last.late != "success",
    )  # fmt: skip


def _tally_record(counters: Sequence[Record]) -> Record:
    """An unlimited call from the counters of all processes."""
    newest = max(counters, key=lambda c: c.touched)
    return newest._replace(
        id=newest.call,
        attempts=sum(c.attempts for c in counters),
        runs=sum(c.runs for c in counters),
        blocked=sum(c.blocked for c in counters),
        created=min(c.created for c in counters),
        status=Status.FAILED if newest.error and not newest.runs else Status.SUCCESS,
    )


def _is_named(tool: str, wanted: str | None) -> bool:
    return wanted in (None, tool, _short(tool))


def _busy_reset(record: Record) -> InProgress:
    return InProgress(
        f"nothing was reset: {record.short} (call {record.call}) is running in {record.holder} since "
        f"{_clock_text(record.started)}; wait for it, or stop that process",
        record,
    )


def _not_entered(claim: Claim, run: int) -> Settle:
    return Settle(claim, run, "failed", error="NotPerformed: the tool was not entered")


# ═══ What is counted and not written yet ══════════════════════════════════════════════


class _Count(NamedTuple):
    """How many attempts of one kind, for one caller; what the newest attempt at that call had and raised."""

    call: str
    run: int
    kind: str
    tool: str
    wf: str
    caller: str
    args: str | None
    error: str | None
    n: int


class _Counts:
    """Sums, so that a store which is away for long costs no memory for each attempt."""

    __slots__ = ("_calls", "_lock")

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may count in the midst
        #: of each call the sums, and what its newest attempt had
        self._calls: dict[str, tuple[dict[tuple[Any, ...], int], list[str | None]]] = {}

    def add(self, kind: str, claim: Claim, run: int, error: str | None) -> None:
        """One more attempt."""
        key = claim.call, run, kind, claim.tool, claim.wf, claim.caller
        with self._lock:
            sums, newest = self._calls.setdefault(claim.call, ({}, [None, None]))
            sums[key] = sums.get(key, 0) + 1
            newest[:] = claim.args, error

    def take(self) -> list[_Count]:
        """All of them, in the order of calls, so that two writers never cross."""
        with self._lock:
            calls, self._calls = self._calls, {}
        found = (
            _Count._make((*key, *newest, n)) for sums, newest in calls.values() for key, n in sums.items()
        )
        return sorted(found, key=lambda count: count[:6])

    def put_back(self, counts: Iterable[_Count]) -> None:
        """What was taken could not be written."""
        with self._lock:
            for count in counts:
                sums, _ = self._calls.setdefault(count.call, ({}, [count.args, count.error]))
                sums[count[:6]] = sums.get(count[:6], 0) + count.n

    def of(self, call: str) -> int:
        """How many attempts at a call."""
        with self._lock:
            return sum(self._calls[call][0].values()) if call in self._calls else 0

    def __bool__(self) -> bool:
        return bool(self._calls)


# ═══ The keeper: one background thread per store ══════════════════════════════════════


def _ring(bell: Any) -> None:
    """Ring, or leave it ringing."""
    try:
        bell.release()
    except RuntimeError:
        pass


class _Keeper:
    """Renews leases, writes counters, and fights for outcomes that could not be written."""

    COUNT_SECONDS = 0.1  # others see a count within 200 ms
    FINISH_SECONDS = 5.0  # how long a normal exit waits for a store that does not answer

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._bell = threading.Lock()
        #: the runs whose leases are renewed, by token, with the time when that is due
        self._live: dict[str, tuple[weakref.ref[_Attempt], float]] = {}
        #: outcomes to write: the attempt keeps its lease alive, `once` means do not insist
        self._pending: deque[tuple[Op, _Attempt | None, bool]] = deque()
        self._retrying = threading.Lock()
        self._wakes_at = 0.0
        self._flush_at = 0.0
        self._thread: threading.Thread | None = None
        self.counting = False

    def watch(self, attempt: _Attempt) -> None:
        """Renew the lease of this run until `forget`, or until nobody holds the run any more."""
        due = time.monotonic() + attempt.claim.lease / _MICROS / 3
        self._live[attempt.claim.token] = (weakref.ref(attempt), due)
        if self._thread is None or due < self._wakes_at:
            self._wake()

    def forget(self, token: str) -> None:
        """The run is over."""
        self._live.pop(token, None)

    def keep(self, op: Op, attempt: _Attempt | None = None, *, once: bool = False) -> None:
        """Write this outcome as soon as the store takes it (or try `once`); hold the lease meanwhile."""
        self._pending.append((op, attempt, once))
        self._wake()

    def counted(self) -> None:
        """Something waits for `Store.flush`."""
        if not self.counting:
            # soon after a pause, so that a SIGKILL loses little; else ten times a second
            self._flush_at = max(self._flush_at + self.COUNT_SECONDS, time.monotonic() + 0.01)
            self.counting = True
            if self._thread is None or self._wakes_at > self._flush_at:
                self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ledger-keeper", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter is going down: finish() does what is left
                    self._thread = None
                _at_exit(self)
        _ring(self._bell)

    def _work(self) -> None:
        while self._thread is threading.current_thread() and self.pid == os.getpid():
            self._wakes_at = float("inf")  # who comes while the pause is reckoned rings
            pause = self._pause()
            self._wakes_at = time.monotonic() + pause
            rung = self._bell.acquire(timeout=pause)
            if not (rung or self._live or self._pending or self.counting):
                break
            for work in (self._renew, self._retry, self._flush):
                try:
                    work()
                except Exception as error:  # whatever it is, leases must be renewed
                    time.sleep(0.05)
                    _debug(f"the keeper will try again: {error}")
        if self._thread is threading.current_thread():  # idle: what comes from now on starts another
            self._thread = None
            if self._live or self._pending or self.counting:
                self._wake()

    def _pause(self) -> float:
        now = time.monotonic()
        due = min([now + 60.0, *(d for _, d in list(self._live.values()))])
        due = min(due, self._flush_at) if self.counting else due
        due = min(due, now + self.COUNT_SECONDS) if self._pending else due
        return max(0.001, due - now)

    def _flush(self) -> None:
        if self.counting and time.monotonic() >= self._flush_at:
            self.counting = False
            try:
                self.store.flush(patience=1.0)  # who looks meanwhile waits for this
            except Exception:
                self.counting = True
                raise

    def _renew(self) -> None:
        now = time.monotonic()
        for token, (ref, due) in list(self._live.items()):
            attempt = ref()
            if attempt is None:  # its frame is gone without a settle: let the lease lapse
                self.forget(token)
            elif due <= now and token in self._live:
                self._live[token] = (ref, now + attempt.claim.lease / _MICROS / 3)
                verdict = self.store.transact(Renew(attempt.claim, attempt.run))
                if verdict.kind == "lost" and token in self._live:
                    self.forget(token)
                    attempt.lost()

    def _retry(self) -> None:
        """Write what waits; an outcome stays in the list until it is written, for an exit to see."""
        failed: Exception | None = None
        with self._retrying:
            for _ in range(len(self._pending)):
                op, attempt, once = self._pending[0]
                try:
                    self.store.transact(op)
                except Exception as error:
                    failed = error
                    if not once:
                        self._pending.append((op, attempt, once))
                else:
                    if isinstance(op, Settle):
                        self.forget(op.claim.token)
                self._pending.popleft()
        if failed is not None:
            raise failed

    def finish(self, limit: float | None = None) -> None:
        """Write what waits, outcomes within a time limit, counts if they can be; watch what still runs."""
        if self.pid != os.getpid():
            return
        limit = limit or time.monotonic() + self.FINISH_SECONDS
        while True:
            try:
                self._retry()
                self.store.flush()
                break
            except Exception as error:
                if self._pending and time.monotonic() < limit:
                    time.sleep(0.05)
                    continue
                what = f"{len(self._pending)} outcome(s)" if self._pending else "counts of blocked attempts"
                if not (self._pending or self.counting):
                    break
                _warn(f"{what} could not be written before the end: {error}")
                break
        if not self._live:
            with self._lock:
                self._thread = None
            _ring(self._bell)


_keepers: weakref.WeakSet[_Keeper] = weakref.WeakSet()
_exit_pid = 0
_exit_limit = (0, 0.0)


def _at_exit(keeper: _Keeper) -> None:
    """Finish at a normal exit, also of a multiprocessing child, where atexit does not run."""
    global _exit_pid
    _keepers.add(keeper)
    if _exit_pid == os.getpid():
        return
    _exit_pid = os.getpid()
    atexit.register(_finish_all)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _finish_all, exitpriority=0)


def _finish_all() -> None:
    global _exit_limit
    # one limit for all stores together, and for both ends: atexit's and multiprocessing's
    pid, limit = _exit_limit
    if pid != os.getpid():
        limit = time.monotonic() + _Keeper.FINISH_SECONDS
        _exit_limit = (os.getpid(), limit)
    for keeper in list(_keepers):
        keeper.finish(limit)


# ═══ The SQLite store ═════════════════════════════════════════════════════════════════

_APPLICATION_ID: Final = 0x4C656467  # "Ledg"
_SCHEMA_VERSION: Final = 1
_COLUMNS: Final = ", ".join(Run._fields)

# `id` keeps rows in the order of their claims, so that a list is a walk along the table.  Statuses
# are compared one by one: IN with a list builds a table for each row that is written
_SCHEMA: Final = """
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  call TEXT NOT NULL,
  run INTEGER NOT NULL CHECK (run > 0),
  tool TEXT NOT NULL,
  wf TEXT NOT NULL,
  caller TEXT NOT NULL,
  owner TEXT NOT NULL,
  key TEXT,
  args TEXT,
  matched TEXT,
  started INTEGER NOT NULL,
  lease INTEGER NOT NULL,
  mono INTEGER NOT NULL,
  status TEXT NOT NULL DEFAULT 'running' CHECK (status = 'running' OR status = 'success'
    OR status = 'failed' OR status = 'suspended' OR status = 'doubt'),
  result TEXT,
  error TEXT,
  trace TEXT,
  ended INTEGER,
  closed_by TEXT,
  released INTEGER NOT NULL DEFAULT 0,
  forced INTEGER NOT NULL DEFAULT 0,
  late TEXT,
  late_at INTEGER,
  blocked INTEGER NOT NULL DEFAULT 0,
  UNIQUE (call, run),                                    -- prevents two owners of one run
  CHECK ((status = 'running') = (closed_by IS NULL)));
-- prevents two open runs of a call, whatever a later bug does
CREATE UNIQUE INDEX one_live ON runs (call) WHERE status = 'running';
CREATE INDEX open_ends ON runs (status) WHERE status <> 'running' AND status <> 'success';
CREATE TABLE events (
  seq INTEGER PRIMARY KEY,
  call TEXT,
  run INTEGER,
  kind TEXT NOT NULL,
  at INTEGER NOT NULL,
  tool TEXT,
  wf TEXT,
  caller TEXT,
  n INTEGER NOT NULL DEFAULT 1,
  detail TEXT);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN
  SELECT RAISE(ABORT, 'events are never changed');
END;
-- prevents that the number of a deleted event is used again
CREATE TRIGGER last_event_stays BEFORE DELETE ON events
WHEN OLD.seq = (SELECT MAX(seq) FROM events) BEGIN
  SELECT RAISE(ABORT, 'the newest event is never deleted');
END;
CREATE TABLE totals (
  tool TEXT PRIMARY KEY,
  actions INTEGER NOT NULL,
  claims INTEGER NOT NULL,
  executed INTEGER NOT NULL,
  blocked INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE tallies (
  call TEXT PRIMARY KEY,
  tool TEXT NOT NULL,
  wf TEXT NOT NULL,
  caller TEXT NOT NULL,
  args TEXT,
  ran INTEGER NOT NULL,
  raised INTEGER NOT NULL,
  error TEXT,
  created INTEGER NOT NULL,
  touched INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE processes (
  id TEXT PRIMARY KEY,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  boot TEXT NOT NULL,
  space TEXT NOT NULL,
  start TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('rolled', 0);
"""

# what the events after :rolled add to the totals
_ROLL: Final = """
SELECT tool,
       COALESCE(SUM(kind = 'claimed' AND run = 1), 0),
       COALESCE(SUM(kind = 'claimed'), 0),
       COALESCE(SUM(CASE WHEN kind IN ('success', 'late', 'resolved') THEN n END), 0),
       COALESCE(SUM(CASE WHEN kind = 'blocked' THEN n END), 0)
  FROM events
 WHERE seq > :rolled AND tool IS NOT NULL AND run > 0
 GROUP BY tool
"""
_INSERT_EVENT: Final = (
    "INSERT INTO events (call, run, kind, at, tool, wf, caller, n, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)

_NETWORK_FS: Final = frozenset(
    """nfs nfs4 cifs smb3 smbfs 9p virtiofs ceph gfs2 ocfs2 lustre afs glusterfs beegfs fuse.sshfs
    fuse.glusterfs fuse.s3fs fuse.rclone fuse.gcsfuse fuse.juicefs""".split()
)
_BALLAST_BYTES: Final = 262_144
_LOCKED: Final = "it was locked by another process for too long; see which one holds it"
_MEANING: Final = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: "it is read-only; make the file and its folder writable",
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a backup, do not delete it",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database; name another path",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; see that its folder exists and is writable",
    sqlite3.SQLITE_IOERR: "the disk reports an error; see that it has room and works",
    sqlite3.SQLITE_PERM: "access was denied; see the file's permissions",
}


class _Item:
    """One operation that waits for a transaction, and how its caller is told."""

    __slots__ = ("answer", "bell", "done", "durable", "error", "perform", "ring", "until")

    def __init__(self, perform: Callable[[sqlite3.Connection], Any], durable: bool) -> None:
        self.perform = perform
        self.durable = durable
        self.ring: Callable[[], object] | None = None
        self.bell: threading.Lock
        #: when to give up waiting for another process's lock
        self.until = 0.0
        self.answer: Any = None
        self.error: Exception | None = None
        self.done = False


class _Door:
    """A connection, and the lock under which it is used."""

    __slots__ = ("db", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.db: sqlite3.Connection | None = None


class SqliteStore(Store):
    """One file, WAL, one write connection per process; claims and outcomes are fsynced.

    Survives: a killed process at every point; with `sync="full"` a power cut too (`"claim"`: a
    power cut can lose an outcome, which then reads as in doubt; `"off"`: it can lose the last
    calls altogether).  Not for network file systems.
    """

    #: whether a new file is made without a notice
    quiet = False

    def __init__(
        self, path: str | os.PathLike[str], *, sync: Literal["full", "claim", "off"] = "full",
        instant_death: bool = True, lock_seconds: float = 30.0, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        super().__init__(clock=clock)
        self.path = os.path.abspath(os.fspath(path))
        self.sync = sync
        self.instant_death = instant_death
        self.lock_seconds = lock_seconds
        self._identity: tuple[int, int] | None = None
        self._begin()

    def _begin(self) -> None:
        """What a process starts with, and a forked child starts anew: nothing is inherited."""
        self._pid = os.getpid()
        self._writer, self._reader, self._browser = self._doors = _Door(), _Door(), _Door()
        self._mutex = threading.RLock()  # held for moments: the queue and who leads it
        self._leader = 0  # the thread that is inside a transaction
        self._queue: deque[_Item] = deque()
        self._led = False
        self._crowd = 1  # how many shared the last transaction
        self._thread: threading.Thread | None = None  # the writer thread, and its bell
        self._bell = threading.Lock()
        self._forking = False
        self._held: list[_Door] = []
        self._broken = self._breaks = False  # forked while a transaction was open, and by the last fork
        self._synchronous = ""
        self._local_disk = False
        self._counts = _Counts()
        self._in_flight: list[_Count] = []  # counts that are being written
        self._counting = threading.RLock()
        self._unrolled = 0  # about how many events the totals do not know yet
        self._owners: dict[str, _Process] = {}
        self._keeper = None

    # -- opening --

    def _connection(self) -> sqlite3.Connection:
        """The write connection, opened and checked. Only with its lock held."""
        self._refuse_forked()
        if self._writer.db is None:
            self._writer.db = self._open()
        self._refuse_replaced()
        return self._writer.db

    def _refuse_forked(self) -> None:
        if self._pid != os.getpid() or self._broken:
            raise StoreError(
                f"{self.path}: this process was forked behind Python's back"
                f"{' while a transaction was open' if self._broken else ''}, so its database "
                "connection cannot be trusted; nothing ran. Use os.fork or multiprocessing, or "
                "start a new process"
            )

    def _open(self) -> sqlite3.Connection:
        self._refuse_network()
        if self._identity is None:
            self._create_file()
        else:
            self._refuse_replaced()
        db = self._connect("rw")
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        found = os.stat(self.path)
        self._identity = (found.st_dev, found.st_ino)
        self._lay_ballast()
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        from urllib.parse import quote

        url = f"file:{quote(self.path)}?mode={mode}"
        return sqlite3.connect(url, uri=True, timeout=0, isolation_level=None, check_same_thread=False)

    def _create_file(self) -> None:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except FileExistsError:
            return
        except OSError as error:
            raise StoreError(
                f"{self.path}: the ledger cannot be created ({error.strerror}); nothing ran. Name a "
                "writable path with LEDGER_DB or Guard(path)"
            ) from error
        os.close(handle)
        if not self.quiet:
            _notice(f"new ledger: {self.path}")

    def _refuse_network(self) -> None:
        kind = _file_system(os.path.dirname(self.path))
        if kind in _NETWORK_FS and os.environ.get("LEDGER_ALLOW_NETWORK_FS") != "1":
            raise StoreError(
                f"{self.path} is on a network file system ({kind}), where SQLite's locks cannot be "
                "trusted; nothing ran. Use a local disk, or a database server, or set "
                "LEDGER_ALLOW_NETWORK_FS=1 if only one machine ever opens it"
            )
        self._local_disk = bool(kind) and kind not in _NETWORK_FS and not kind.startswith("fuse")

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Schema, journal mode and this process's row; who finds it busy comes again."""
        if not self._is_ready(db):
            self._create_schema(db)
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] not in ("wal", "memory"):
            raise StoreError(f"{self.path}: SQLite cannot use a write-ahead log here; nothing ran")
        db.execute("INSERT OR IGNORE INTO processes VALUES (?, ?, ?, ?, ?, ?)", _me())

    def _is_ready(self, db: sqlite3.Connection) -> bool:
        """Whether it is a ledger of ours (False: an empty database); raises for anything else."""
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application == _APPLICATION_ID and version > _SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer Ledger (schema {version}, this one knows "
                f"{_SCHEMA_VERSION}); nothing ran. Upgrade ledger-guard here"
            )
        if application == _APPLICATION_ID:
            return True
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        if not tables and not application:
            return False
        if "ledger" in tables:
            raise StoreError(
                f"{self.path} was written by ledger-once, whose records cannot be trusted to say what "
                "happened; nothing ran. Keep that file and name a new one for this ledger"
            )
        raise StoreError(
            f"{self.path} is a database of another program (tables: {', '.join(sorted(tables)[:5])}); "
            "nothing ran. Name another path"
        )

    def _create_schema(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        if not self._is_ready(db):
            for statement in _statements(_SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _refuse_replaced(self, *, looking: bool = False) -> None:
        """A ledger that was deleted or replaced under us is an error, never a reason to start afresh."""
        identity = self._identity
        if identity is None:  # another thread closed the store since the caller looked
            return
        try:
            found = os.stat(self.path)
            what = "" if (found.st_dev, found.st_ino) == identity else "was replaced by another file"
            what = what or ("" if found.st_size else "was emptied")
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            what = "was deleted"
        if what:
            ran = "" if looking else "nothing ran, because nobody knows what the lost file had recorded. "
            raise StoreError(
                f"{self.path} {what} while it was in use; {ran}Put the file back, or restart the process to "
                "begin with what is there"
            )

    def _lay_ballast(self) -> None:
        """Room that can be given up on a full disk, so that an outcome can still be written."""
        try:
            handle = os.open(self.path + "-ballast", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(handle, "wb") as file:
                file.write(bytes(_BALLAST_BYTES))
        except OSError:
            pass

    def make_room(self) -> None:
        """Let the write-ahead log be used again from its start, and give up the ballast."""
        with self._writer.lock:
            try:
                os.unlink(self.path + "-ballast")
            except OSError:
                pass
            try:
                if self._writer.db is not None:
                    self._writer.db.execute("PRAGMA wal_checkpoint(RESTART)")
            except sqlite3.Error:
                pass

    def _translated(self, error: Exception) -> Exception:
        """SQLite's errors as ours, by their code; others as they are."""
        if isinstance(error, UnicodeError | OverflowError):
            return UsageError(f"{self.path}: nothing was written: a value cannot be stored ({error})")
        if not isinstance(error, sqlite3.Error):
            return error
        whole_code = getattr(error, "sqlite_errorcode", None) or 0
        code = whole_code & 0xFF
        meaning = _MEANING.get(code, "see the cause")
        translated = StoreError(f"{self.path}: the ledger could not be used ({error}): {meaning}")
        if whole_code == sqlite3.SQLITE_CONSTRAINT_TRIGGER:  # a trigger of ours: it says why, and what to do
            translated = StoreError(f"{self.path}: {error}")
        translated.full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        translated.__cause__ = error
        return translated

    # -- group commit: who finds nobody writing commits all that waits; under load, a thread does --

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return self.path

    def transact(self, op: Op) -> Verdict:
        """Apply one operation in a transaction that may carry others; returns after its commit."""
        return cast(
            "Verdict", self.submit(functools.partial(self._perform, op), durable=self._is_durable(op))
        )

    def _is_durable(self, op: Op) -> bool:
        if self.sync == "full":
            return not isinstance(op, Renew)
        return self.sync == "claim" and isinstance(op, Claim)

    def submit(
        self, perform: Callable[[sqlite3.Connection], Any], *, durable: bool, patience: float = 0.0
    ) -> Any:
        """Call `perform` inside a write transaction, which may carry others; returns after its commit.

        `perform` may be called again when a neighbour fails; it must only execute statements.
        """
        if self._leader == threading.get_ident():
            raise StoreError(
                f"{self.path}: a signal handler called the guard in the midst of a transaction of its own "
                "thread; nothing ran. Let the handler set a flag, and call the guard outside it"
            )
        item = _Item(perform, durable)
        item.until = time.monotonic() + patience if patience else 0.0
        try:
            if self._enqueue(item):
                while not item.done:
                    self._commit_waiting()
                self._hand_over()
            while not item.done:
                if not item.bell.acquire(timeout=0.2):  # the leader was interrupted, by Ctrl-C for good or by
                    self._wake_writer()  # a signal handler of its thread that waits here itself
        except BaseException:  # Ctrl-C: forget what is not taken yet, and let nobody wait for us
            self._withdraw(item)
            self._wake_writer()
            raise
        if item.error is not None:
            raise item.error
        return item.answer

    def _enqueue(self, item: _Item) -> bool:
        """Let it wait for the next transaction; True if nobody commits at the moment."""
        with self._mutex:
            leads = not self._led
            if not leads and item.ring is None:
                item.bell = threading.Lock()
                item.bell.acquire()
                item.ring = item.bell.release
            self._queue.append(item)
            self._led = True
        return leads

    def _withdraw(self, item: _Item) -> None:
        with self._mutex:
            if item in self._queue:
                self._queue.remove(item)

    def _hand_over(self) -> None:
        with self._mutex:
            self._led = bool(self._queue)
        if self._led:
            self._wake_writer()

    def _wake_writer(self) -> None:
        with self._mutex:
            if self._thread is None or not self._thread.is_alive():
                self._bell = threading.Lock()
                work = functools.partial(self._write_for_others, self._bell)
                thread = threading.Thread(target=work, name="ledger-writer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread to be had: the next caller leads
                    self._led = False
                    return
                self._thread = thread
        _ring(self._bell)

    def _write_for_others(self, bell: threading.Lock) -> None:
        """The writer thread: it leads for event loops, and where many threads write at once."""
        rung = True
        while rung and self._bell is bell and self._pid == os.getpid():
            rung = bell.acquire(timeout=60)
            while self._queue:
                self._commit_waiting()
            self._hand_over()
        with self._mutex:
            if self._bell is bell:
                self._thread = None
        if self._queue:  # it came while this thread was ending
            self._wake_writer()

    def _commit_waiting(self) -> None:
        """One transaction with all that waits; other processes' locks are waited for without ours.

        An item leaves the queue when it is answered, so that no interruption can lose it; what is
        done again although it was committed finds its own token in the rows.
        """
        self._linger()
        pause = 0.001
        while self._queue:
            if self._forking:
                time.sleep(0.001)
            with self._writer.lock:
                with self._mutex:
                    batch = [item for item in self._queue if not item.done]
                self._leader = threading.get_ident()
                try:
                    db = self._connection()
                    self._begin_writing(db, batch)
                    self._run(db, batch)
                    return
                except (LedgerError, sqlite3.Error) as error:
                    if not _is_busy(error):
                        self._fail(batch, self._translated(error))
                        return
                finally:
                    self._leader = 0
            self._fail_overdue(batch)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def _linger(self) -> None:
        """Those who shared the last commit will be back at once: one fsync for all of them."""
        patience = 8
        while len(self._queue) < self._crowd and patience:
            time.sleep(0.00005)
            patience -= 1

    def _begin_writing(self, db: sqlite3.Connection, batch: list[_Item]) -> None:
        """Open a write transaction as durable as the batch asks for."""
        _roll_back(db)  # what an interrupted leader left open
        wanted = "FULL" if any(item.durable for item in batch) else "NORMAL"
        if wanted != self._synchronous:
            db.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted
        db.execute("BEGIN IMMEDIATE")

    def _fail_overdue(self, items: list[_Item]) -> None:
        """Answer those that waited too long for another process's lock."""
        now = time.monotonic()
        for item in items:
            item.until = item.until or now + self.lock_seconds
        if overdue := [item for item in items if item.until < now]:
            error = StoreError(
                f"{self.path}: another process held the write lock for too long ({self.lock_seconds:g} s for "
                "a claim); nothing was written. See which process holds it, or allow more with "
                "Guard(lock_seconds=…)"
            )
            self._fail(overdue, error)

    def _fail(self, items: list[_Item], error: Exception) -> None:
        failed = [item for item in items if not item.done]
        for item in failed:
            item.error = error
        self._answer(failed)

    def _run(self, db: sqlite3.Connection, batch: list[_Item]) -> None:
        """Commit the items; one that fails takes none of its neighbours along: they are done again.

        A savepoint for each would cost every group what only a failure needs.
        """
        for place, item in enumerate(batch):
            try:
                item.answer = item.perform(db)
            except (sqlite3.Error, LedgerError, ValueError, OverflowError) as error:
                _roll_back(db)  # not for what a signal handler raises here: that is the leader's own
                if place:  # it may have failed for what a neighbour wrote, which must be true first
                    self._begin_writing(db, batch[:place])
                    self._run(db, batch[:place])
                else:
                    self._fail([item], self._translated(error))
                return
        try:
            db.execute("COMMIT")
        except sqlite3.Error as error:
            _roll_back(db)
            self._fail(batch, self._translated(error))
            return
        self._crowd = len(batch)
        self._unrolled += len(batch)
        self._answer(batch)

    def _answer(self, items: list[_Item]) -> None:
        for item in items:
            item.done = True
            if item.ring is not None:
                item.ring()
        with self._mutex:
            while self._queue and self._queue[0].done:
                self._queue.popleft()

    # -- the statements --

    def _perform(self, op: Op, db: sqlite3.Connection) -> Verdict:
        """Any operation: in one statement where that is enough, nearly always; else by its rows."""
        verdict = self._perform_hot(op, db)
        if verdict is not None:
            return verdict
        rows = _select_rows(db, op.call)
        change = op.apply(rows, self._now_in(db))
        if change.forget:
            self._forget(db, "call = :call", {"call": op.call})
        for old, new in change.updates:
            self._update(db, old, new)
        if change.insert is not None:
            _insert_row(db, change.insert)
        for kind, row, n, detail in change.notes:
            event = (row.call, row.run, kind, self.clock.wall(), row.tool, row.wf, row.caller, n, detail)
            db.execute(_INSERT_EVENT, event)
        return change.verdict

    def perform_on(self, connection: Any, op: Op) -> Verdict:
        """Apply one operation inside the transaction that is open on a user's connection."""
        return self._perform(op, connection)

    def _perform_hot(self, op: Op, db: sqlite3.Connection) -> Verdict | None:
        """A first claim, the end of an open run, a renewal: the guard stands in the WHERE."""
        wall = self.clock.wall()
        if isinstance(op, Claim):
            row = op.first_row(wall, self.clock.mono())
            if db.execute(_INSERT_FIRST, (*row[:12], row.forced)).rowcount == 1:
                db.execute(_INSERT_EVENT, (op.call, 1, "claimed", wall, op.tool, op.wf, op.caller, 1, None))
                return Verdict("granted", row)
        elif isinstance(op, Settle):
            call, token, tool, wf, caller = op.claim[:5]
            values = (op.status, wall, op.result, op.error, op.trace, call, op.run, token)
            if db.execute(_SETTLE_OPEN, values).rowcount == 1:
                db.execute(_INSERT_EVENT, (call, op.run, op.status, wall, tool, wf, caller, 1, op.error))
                return _SETTLED
        elif isinstance(op, Renew):
            lease = (wall + op.claim.lease, self.clock.mono() + op.claim.lease)
            if db.execute(_RENEW_OPEN, (*lease, op.call, op.run, op.claim.token)).rowcount == 1:
                return _RENEWED
        return None

    def _update(self, db: sqlite3.Connection, old: Run, new: Run) -> None:
        changed = db.execute(
            "UPDATE runs SET status = :status, ended = :ended, closed_by = :closed_by, released = :released,"
            " result = :result, error = :error, trace = :trace, lease = :lease, mono = :mono,"
            " late = :late, late_at = :late_at"
            " WHERE call = :call AND run = :run AND owner = :owner AND status = :was",
            {**new._asdict(), "was": old.status},
        ).rowcount
        if changed != 1:
            raise StoreError(f"{self.path}: run {old.run} of {old.call} changed under its transaction")

    def _now_in(self, db: sqlite3.Connection) -> Now:
        wall, mono = self.clock.wall(), self.clock.mono()

        def over(run: Run) -> bool:
            owner = self._owner(db, run.owner)
            if owner is None:
                return run.lease <= wall
            same_boot = bool(owner.boot) and owner.boot == _me().boot
            if run.mono <= mono if same_boot else run.lease <= wall:
                return True
            return self.instant_death and self._local_disk and _is_dead(owner)

        return Now(wall, mono, over)

    def _owner(self, db: sqlite3.Connection, token: str) -> _Process | None:
        name = token.partition(".")[0]
        if name not in self._owners:
            row = db.execute("SELECT * FROM processes WHERE id = ?", (name,)).fetchone()
            if row is None:
                return None
            if len(self._owners) > 1000:
                self._owners.clear()
            self._owners[name] = _Process(*row)
        return self._owners[name]

    # -- reading, on other connections: the writer's own sees what is not committed yet --

    def _read(self, absent: T, query: Callable[..., T], *values: Any, door: _Door | None = None) -> T:
        """Run a short query; `absent` is the answer of a ledger that does not exist yet."""
        self._refuse_forked()
        if door is None:  # while nobody writes, its pages are at hand; another connection reads them anew
            door = self._reader if self._led else self._writer
        limit = 0.0
        while True:
            if self._forking:
                time.sleep(0.001)
            try:
                with door.lock:
                    if door is self._writer and (door.db is None or door.db.in_transaction):
                        door = self._reader
                        continue
                    if door.db is None:
                        door.db = self._open_reader()
                    found = absent if door.db is None else query(door.db, *values)
                return found  # noqa: RET504 - Ctrl-C right after a return from inside `with` would keep the lock
            except sqlite3.Error as error:
                limit = limit or time.monotonic() + self.lock_seconds
                if not _is_busy(error) or time.monotonic() > limit:
                    raise self._translated(error) from error
                time.sleep(0.001)

    def _open_reader(self) -> sqlite3.Connection | None:
        """A connection that cannot write; None while there is no file, or an empty one."""
        if self._identity is not None:
            self._refuse_replaced()
        elif not os.path.exists(self.path):
            return None
        elif os.path.isdir(self.path):
            raise StoreError(f"{self.path} is a folder and cannot be opened as a ledger; name a file in it")
        self._refuse_network()  # it also says whether a death may be proved here
        # a read-only folder has no room for the shared memory file: read the file as it stands
        modes = ["ro", "rw"]  # the last one who may write to it takes its log back when it closes
        if not os.access(os.path.dirname(self.path), os.W_OK):
            if os.path.exists(f"{self.path}-wal") and os.path.getsize(f"{self.path}-wal"):
                raise StoreError(
                    f"{self.path} has a log beside it, which cannot be read in a folder that is read-only; "
                    "copy both files to a folder that is writable, and look there"
                )
            modes.append("ro&immutable=1")
        while True:
            db = self._connect(modes.pop(0))
            try:
                if self._is_ready(db):
                    db.execute("SELECT 1 FROM runs LIMIT 1").fetchone()
                    db.execute("PRAGMA query_only = 1")
                    found = os.stat(self.path)
                    self._identity = self._identity or (found.st_dev, found.st_ino)
                    return db
                db.close()
                return None
            except BaseException as error:
                db.close()
                if not modes or _is_busy(error) or not isinstance(error, sqlite3.Error):
                    raise

    def quick(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """Status, released, result and number of each run: all that most duplicates need."""
        return self._read([], _select_quick, call)

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return self._read([], _select_rows, call)

    def is_over(self, run: Run) -> bool:
        """Whether the owner of a RUNNING run is over."""
        return self._read(False, lambda db: self._now_in(db).over(run))

    def holder(self, run: Run) -> str:
        """Where the owner of a run lives, for people."""
        owner = self._read(None, self._owner, run.owner)
        return f"pid {owner.pid} on {owner.host}" if owner else run.caller

    def describe(self, rows: Sequence[Run], blocked: int | None = None) -> Record:
        """The record of a call from its runs, with what is counted here and not written yet."""
        call = rows[-1].call
        waiting = self._counts.of(call) + sum(count.n for count in self._in_flight if count.call == call)
        return super().describe(rows, sum(r.blocked for r in rows) + waiting if blocked is None else blocked)

    def look(self, call: str) -> Record | None:
        """The record of a call; None if it was never made."""
        rows = self.rows(call)
        if rows:
            return self.describe(rows)
        tallies = self.browse("SELECT * FROM tallies WHERE call = ?", (call,))
        return _record_of_tally(tallies[0]) if tallies else None

    def browse(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """All rows of a longer query, on a connection that cannot write, beside the duplicates'."""
        nothing: list[Any] = []
        if self._identity is not None:  # an open connection would read on in a file that was deleted
            self._refuse_replaced(looking=True)
        return self._read(nothing, lambda db: db.execute(sql, values).fetchall(), door=self._browser)

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first; no read transaction stays open between pages."""
        after = 0
        while page := self.browse(
            # a call stands where its first run stands
            "SELECT id, call FROM runs AS r WHERE id > ? AND (? IS NULL OR wf = ?) AND NOT EXISTS"
            " (SELECT 1 FROM runs AS e WHERE e.call = r.call AND e.run < r.run) ORDER BY id LIMIT 200",
            (after, wf, wf),
        ):
            for after, call in page:  # noqa: B007 - the last one is where the next page begins
                rows = self.rows(call)
                if rows and _is_named(rows[-1].tool, tool):
                    yield self.describe(rows), rows
        for row in self.browse("SELECT * FROM tallies WHERE ? IS NULL OR wf = ? ORDER BY created", (wf, wf)):
            if _is_named(row[1], tool):
                yield _record_of_tally(row), []

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number, oldest first."""
        self.flush_for_reading()
        names = ("seq", "call", "run", "kind", "at", "tool", "wf", "caller", "n", "detail")
        sql = f"SELECT {', '.join(names)} FROM events WHERE seq > ? ORDER BY seq LIMIT 500"
        while page := self.browse(sql, (after,)):
            for row in page:
                yield {**dict(zip(names, row, strict=True)), "at": _iso(row[4])}
            after = page[-1][0]

    def totals(self) -> Totals:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        self.flush_for_reading()
        return self._read({}, self._select_totals, door=self._browser)

    def _select_totals(self, db: sqlite3.Connection) -> Totals:
        found: Totals = {}

        def add(tool: str, **counts: int) -> None:
            sums = found.setdefault(tool, dict.fromkeys(_TOTALS, 0))
            for name, n in counts.items():
                sums[name] += n

        _roll_back(db)  # what an interrupted look left open
        try:
            db.execute("BEGIN")  # one view for all of it
            rolled = db.execute("SELECT value FROM meta WHERE name = 'rolled'").fetchone()[0]
            rows = db.execute("SELECT * FROM totals").fetchall() + db.execute(_ROLL, (rolled,)).fetchall()
            for tool, actions, claims, executed, blocked in rows:
                add(tool, actions=actions, attempts=claims + blocked, executed=executed, blocked=blocked)
            for tool, status, n in db.execute(_OPEN_ENDS):
                add(tool, **{status: n})
            over = self._now_in(db).over
            for run in map(
                Run._make, db.execute(f"SELECT {_COLUMNS} FROM runs WHERE status = 'running'").fetchall()
            ):
                add(run.tool, **{"in_doubt" if over(run) else "running": 1})
            for tool, n, asked, ran in db.execute(_TALLY_SUMS):
                add(tool, actions=n, attempts=asked, executed=ran)
        finally:
            _roll_back(db)
        return {tool: sums for tool, sums in found.items() if sums["actions"]}

    def last_errors(self) -> dict[str, str | None]:
        """By tool, the error of its newest call whose latest run failed."""
        errors = {tool: error for tool, error, _ in self.browse(_LAST_ERRORS)}
        tallies = self.browse("SELECT tool, error FROM tallies WHERE error IS NOT NULL ORDER BY created")
        return {**errors, **dict(tallies)}

    # -- counting: buffered, no fsync --

    def count(self, kind: str, claim: Claim, run: int, error: str | None = None) -> None:
        """Count an attempt that ran nothing, or one of an unlimited tool; written within 200 ms."""
        self._counts.add(kind, claim, run, error)
        keeper = self._keeper
        if keeper is None or not keeper.counting:
            self.keeper.counted()

    def flush(self, patience: float = 5.0) -> None:
        """Write what was only counted so far; `StoreError` if the file is locked for longer than that."""
        if self._pid != os.getpid():
            return
        with self._counting:  # who finds nothing left waits until another thread has written it
            if self._counts or self._unrolled >= 1000:
                self._in_flight = taken = self._counts.take()
                try:
                    self.submit(lambda db: self._write_counts(db, taken), durable=False, patience=patience)
                except BaseException:
                    self._counts.put_back(taken)
                    raise
                finally:
                    self._in_flight = []
                self._unrolled = 0

    def _write_counts(self, db: sqlite3.Connection, taken: list[_Count]) -> None:
        now = self.clock.wall()
        for call, run, kind, tool, wf, caller, args, error, n in taken:
            if kind == "blocked":
                where = "UPDATE runs SET blocked = blocked + ? WHERE call = ? AND run = ?"
                if not db.execute(where, (n, call, run)).rowcount:  # reset meanwhile
                    continue
            else:
                ran = n if kind == "ran" else 0
                db.execute(_ADD_TALLY, (call, tool, wf, caller, args, ran, n - ran, error, now))
            db.execute(_INSERT_EVENT, (call, run, kind, now, tool, wf, caller, n, error))
        self._roll_forward(db)

    def _roll_forward(self, db: sqlite3.Connection) -> None:
        """Add what the events since the last time say to the totals, so that stats stay cheap."""
        rolled = db.execute("SELECT value FROM meta WHERE name = 'rolled'").fetchone()[0]
        for row in db.execute(_ROLL, (rolled,)).fetchall():
            db.execute(
                "INSERT INTO totals VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (tool) DO UPDATE SET"
                " actions = actions + ?2, claims = claims + ?3, executed = executed + ?4,"
                " blocked = blocked + ?5",
                row,
            )
        db.execute("UPDATE meta SET value = (SELECT COALESCE(MAX(seq), 0) FROM events) WHERE name = 'rolled'")

    # -- housekeeping --

    def reset(self, wf: str | None, asked: int, *, force: bool = False, why: str = "") -> None:
        """Forget every call of a workflow (None: of all) in one transaction.

        Raises `InProgress` while one runs; `force` forgets it too, and it may then run beside itself.
        """
        self.flush()
        self.submit(lambda db: self._reset_in(db, wf, asked, force, why), durable=self.sync != "off")

    def _reset_in(self, db: sqlite3.Connection, wf: str | None, asked: int, force: bool, why: str) -> None:
        scope = {"wf": wf, "asked": asked}
        live = f"SELECT {_COLUMNS} FROM runs WHERE status = 'running' AND (:wf IS NULL OR wf = :wf)"
        over = self._now_in(db).over
        for run in map(Run._make, db.execute(live, scope).fetchall()):
            if not force and not over(run):
                raise _busy_reset(self.describe([run]))
        young = "SELECT call FROM runs WHERE started > :asked"
        self._forget(db, f"(:wf IS NULL OR wf = :wf) AND call NOT IN ({young})", scope)
        db.execute("DELETE FROM tallies WHERE :wf IS NULL OR wf = :wf", scope)
        detail = why or ("everything" if wf is None else None)
        db.execute(_INSERT_EVENT, (None, None, "reset", self.clock.wall(), None, wf, None, 0, detail))

    def _forget(self, db: sqlite3.Connection, where: str, scope: dict[str, Any]) -> None:
        """Delete rows, and take them out of the totals."""
        self._discount(db, where, scope)
        db.execute(f"DELETE FROM runs WHERE {where}", scope)

    def _discount(self, db: sqlite3.Connection, where: str, scope: dict[str, Any]) -> None:
        """Take rows out of the totals."""
        self._roll_forward(db)
        sums = (
            "SELECT tool, COUNT(DISTINCT call), COUNT(*), SUM(status = 'success' OR late IS 'success'),"
            f" SUM(blocked) FROM runs WHERE {where} GROUP BY tool"
        )
        for row in db.execute(sums, scope).fetchall():
            db.execute(
                "UPDATE totals SET actions = actions - ?2, claims = claims - ?3, executed = executed - ?4,"
                " blocked = blocked - ?5 WHERE tool = ?1",
                row,
            )

    def get(self, id: str) -> Record | None:
        """`look`, by its name in the six methods."""
        return self.look(id)

    def all(self, wf: str | None = None) -> Iterator[Record]:
        """The record of every call, or of those of one workflow, oldest first."""
        return (record for record, _ in self.calls(wf=wf))

    def clear(self, wf: str | None = None) -> None:
        """`reset`, by its name in the six methods."""
        self.reset(wf, self.clock.wall())

    def check(self) -> dict[str, Any]:
        """Prove that the file can be read and written and is sound; raises `StoreError`."""

        def probe(db: sqlite3.Connection) -> str:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('checked', ?)", (self.clock.wall(),))
            return str(db.execute("PRAGMA quick_check(1)").fetchone()[0])

        found = self.submit(probe, durable=True)
        if found != "ok":
            raise StoreError(f"{self.path} is damaged ({found}); restore a backup, do not delete it")
        return {"store": self.path, "ok": True, "schema": _SCHEMA_VERSION, "sync": self.sync}

    def close(self) -> None:
        """Finish what is pending and close the file; it opens again when it is used again."""
        super().close()
        with self._mutex:  # the writer thread ends when it finds another bell
            old, self._bell, self._thread = self._bell, threading.Lock(), None
        _ring(old)
        with self._writer.lock:
            self._close_connections()
            self._identity = None

    # -- async callers: a thread leads for them, the loop never waits --

    async def transact_async(self, op: Op) -> Verdict:
        """`transact` without blocking the event loop; an operation of a cancelled caller is withdrawn."""
        import asyncio

        loop = asyncio.get_running_loop()
        told = loop.create_future()

        def tell() -> None:
            if not told.done():
                told.set_result(None)

        item = _Item(functools.partial(self._perform, op), self._is_durable(op))
        item.ring = functools.partial(_call_loop, loop, tell)
        try:
            if self._enqueue(item):
                self._wake_writer()
                if self._thread is None:
                    raise StoreError(f"{self.path}: no thread could be started to write; nothing ran")
            await told
        except BaseException:
            self._withdraw(item)
            raise
        if item.error is not None:
            raise item.error
        return cast("Verdict", item.answer)

    async def rows_async(self, call: str) -> list[Run]:
        """`rows`, on the connection that waits for no commit."""
        return self._read([], _select_rows, call, door=self._reader)

    async def quick_async(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """`quick`, on the connection that waits for no commit."""
        return self._read([], _select_quick, call, door=self._reader)

    # -- fork --

    def _before_fork(self) -> None:
        """Close everything: a child with its own connection beside an inherited one loses commits."""
        self._forking = True
        self._held = [door for door in self._doors if door.lock.acquire(timeout=5)]
        db = self._writer.db
        busy = len(self._held) < len(self._doors) or (db is not None and db.in_transaction)
        self._breaks = busy and not self._broken
        self._broken = busy or self._broken
        if not self._broken:
            self._close_connections()

    def _close_connections(self) -> None:
        for door in reversed(self._doors):  # the writer last: it takes the log back into the file
            with door.lock:
                if door.db is not None:
                    door.db.close()
                    door.db = None
        self._synchronous = ""

    def _after_fork_in_parent(self) -> None:
        self._forking = False
        self._broken = self._broken and not self._breaks
        for door in self._held:
            door.lock.release()
        self._held = []

    def _after_fork_in_child(self) -> None:
        broken = self._broken
        self._begin()
        self._broken = broken


class MemoryStore(SqliteStore):
    """A store without a file, for tests: as long as the process, and for it alone."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        super().__init__(":memory:", sync="off", clock=clock)
        self.path = "memory://"

    def _read(self, absent: T, query: Callable[..., T], *values: Any, door: _Door | None = None) -> T:
        """A database in memory is its connection."""
        with self._writer.lock:
            return query(self._connection(), *values)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._prepare(db)
        return db

    def _refuse_replaced(self, *, looking: bool = False) -> None:
        """There is no file that could be."""

    def count(self, kind: str, claim: Claim, run: int, error: str | None = None) -> None:
        """Count an attempt at once: tests want to look."""
        super().count(kind, claim, run, error)
        self.flush()

    def close(self) -> None:
        """Finish what is pending; what is recorded stays."""
        Store.close(self)

    def _close_connections(self) -> None:
        """The child goes on with a copy."""

    def _after_fork_in_child(self) -> None:
        db = self._writer.db
        super()._after_fork_in_child()
        self._writer.db = db


_Mem = MemoryStore

_SETTLED: Final = Verdict("settled")
_RENEWED: Final = Verdict("renewed")
_INSERT_FIRST: Final = (
    f"INSERT INTO runs ({', '.join(Run._fields[:12])}, forced) SELECT {', '.join(f'?{n}' for n in range(1, 14))}"
    " WHERE NOT EXISTS (SELECT 1 FROM runs WHERE call = ?1) ON CONFLICT DO NOTHING"
)
_SETTLE_OPEN: Final = (
    "UPDATE runs SET status = ?, ended = ?, closed_by = owner, result = ?, error = ?, trace = ?"
    " WHERE call = ? AND run = ? AND owner = ? AND status = 'running'"
)
_RENEW_OPEN: Final = (
    "UPDATE runs SET lease = ?, mono = ? WHERE call = ? AND run = ? AND owner = ? AND status = 'running'"
)
_OPEN_ENDS: Final = """
SELECT tool, CASE status WHEN 'doubt' THEN 'in_doubt' ELSE status END, COUNT(*)
  FROM runs AS r INDEXED BY open_ends
 WHERE status <> 'running' AND status <> 'success'
   AND (status <> 'doubt' OR NOT released AND late IS NOT 'success')
   AND NOT EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND l.run > r.run)
 GROUP BY tool, status
"""
# the bare columns are those of the row with the MAX; a call is as new as its first run
_LAST_ERRORS: Final = """
SELECT tool, error, MAX((SELECT MIN(id) FROM runs AS f WHERE f.call = r.call))
  FROM runs AS r INDEXED BY open_ends
 WHERE status <> 'running' AND status <> 'success' AND status = 'failed'
   AND NOT EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND l.run > r.run)
 GROUP BY tool
"""
_TALLY_SUMS: Final = "SELECT tool, COUNT(*), SUM(ran + raised), SUM(ran) FROM tallies GROUP BY tool"
_ADD_TALLY: Final = (
    "INSERT INTO tallies VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9) ON CONFLICT (call) DO UPDATE SET"
    " ran = ran + ?6, raised = raised + ?7, error = ?8, touched = ?9"
)


def _select_quick(db: sqlite3.Connection, call: str) -> list[Any]:
    return db.execute(
        "SELECT status, released, result, run FROM runs WHERE call = ? ORDER BY run", (call,)
    ).fetchall()


def _select_rows(db: sqlite3.Connection, call: str) -> list[Run]:
    found = db.execute(f"SELECT {_COLUMNS} FROM runs WHERE call = ? ORDER BY run", (call,))
    return list(map(Run._make, found))


def _insert_row(db: sqlite3.Connection, row: Run) -> None:
    db.execute(f"INSERT INTO runs ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row)


def _record_of_tally(row: Sequence[Any]) -> Record:
    call, tool, wf, caller, args, ran, raised, error, created, touched = row
    return Record(
        id=call, call=call, run=0, tool=tool, wf=wf, caller=caller, owner="", key=None, args_json=args,
        status=Status.FAILED if error else Status.SUCCESS, result_json=None, error=error,
        attempts=ran + raised, runs=ran, blocked=0, created=created, touched=touched, started=touched,
        ended=touched, lease=touched, released=False,
    )  # fmt: skip


def _is_busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", None) or 0
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        try:
            db.execute("ROLLBACK")
        except sqlite3.Error:  # the first error is the one to tell
            pass


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, so that they can run inside a transaction (executescript commits)."""
    part = ""
    for line in script.splitlines():
        part += line + "\n"
        if sqlite3.complete_statement(part):
            yield part
            part = ""


def _file_system(folder: str) -> str:
    """The type of the file system that a folder is on, from the mount table; "" where unknown."""
    import re

    best, kind = -1, ""
    real = os.path.realpath(folder)
    for line in _read_file("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


def _call_loop(loop: Any, function: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop was closed: nobody waits any more
        pass


_in_fork: list[Store] = []


def _before_fork() -> None:
    _wait_for_loads()
    while True:
        try:
            _in_fork[:] = _forked
            break
        except RuntimeError:  # another thread makes a store at this moment
            pass
    for store in _in_fork:
        store._before_fork()


def _after_fork_in_parent() -> None:
    _end_wait()
    for store in _in_fork:
        store._after_fork_in_parent()


def _after_fork_in_child() -> None:
    _end_wait_in_child()
    for store in _in_fork:
        store._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )


# ═══ Policies ═════════════════════════════════════════════════════════════════════════

#: exception types by full name that suspend a tool instead of failing it; the one place that
#: knows frameworks, matched by name so that none is imported. Add your own framework's here.
known_suspends: Final[set[str]] = {
    "langgraph.errors.GraphBubbleUp",
    "pydantic_ai.exceptions.ApprovalRequired",
    "pydantic_ai.exceptions.CallDeferred",
    "pydantic_ai.exceptions.ModelRetry",
    "pydantic_ai.exceptions.SkipToolExecution",
}

ErrorTypes = type[BaseException] | Iterable[type[BaseException]]
Names = str | Iterable[str]


class PolicyOptions(TypedDict, total=False):
    """The options of a tool's policy; `Policy` says what each means."""

    unlimited: bool
    replay: bool
    max: int
    ttl: float | timedelta | None
    timeout: float | timedelta
    wait: float | timedelta
    key: str | Sequence[str] | Callable[..., Any] | None
    ignore: Names
    match: Names
    redact: Names
    irreversible: bool
    no_effect: ErrorTypes
    suspends: ErrorTypes
    on_doubt: Literal["rerun", "block"] | Callable[[Record], Any]
    record: Literal["all", "no-result", "no-args", "nothing"]
    name: str | None
    blocked_return: Any


class Policy:
    """What may happen to the calls of a tool.

    unlimited      runs every time; only counted
    replay         a duplicate gets the recorded result, and waits for a live run (`wait` seconds)
    max, ttl       at most `max` successes (in `ttl` seconds, judged by the wall clock)
    timeout        how many seconds of silence mean that a run's process is dead
    key            names of the parameters, or a function of them, that say what one action is
    ignore         parameters that do not count for identity
    match          parameters that must agree between duplicates, else `KeyConflict`
    redact         further parameters, keys or fields that hold secrets
    irreversible   after an error or a crash nobody may run it again without knowing more
    no_effect      errors that prove that nothing happened
    suspends       errors by which the tool suspends itself; `known_suspends` always count
    on_doubt       "rerun", "block", or a function that finds out: it answers with the result,
                   with `NOT_DONE` or with `STILL_UNKNOWN`
    record         "all", "no-result", "no-args" or "nothing"
    name           identity of the tool instead of `module.qualname`
    blocked_return what a blocked call returns: a value, or a function of the record

    Raises `PolicyError` for options that are unknown, out of range or contradict each other.
    """

    def __init__(self, **options: Unpack[PolicyOptions]) -> None:
        _check_options(options)
        get: Callable[..., Any] = options.get
        self.unlimited: bool = get("unlimited", False)
        self.replay: bool = get("replay", False)
        self.max: int = get("max", 1)
        self.ttl: int | None = None if get("ttl") is None else _micros(get("ttl"))
        self.timeout: int = _micros(get("timeout", 300))
        self.wait: float = _micros(get("wait", 30)) / _MICROS
        key = get("key")
        self.key: tuple[str, ...] | Callable[..., Any] | None = (
            key if key is None or callable(key) else (key,) if isinstance(key, str) else tuple(key)
        )
        self.ignore = _names(get("ignore", ()))
        self.match = _names(get("match", ()))
        self.redact = _names(get("redact", ()))
        self.irreversible: bool = get("irreversible", False)
        self.no_effect = _types(get("no_effect", ()))
        self.suspends = _types(get("suspends", ()))
        self.on_doubt = get("on_doubt", "block" if self.irreversible else "rerun")
        self.record: str = get("record", "all")
        self.name: str | None = get("name")
        self.blocked_return: Any = get("blocked_return", _NOTHING)
        #: one recorded success answers every duplicate, whatever else is recorded
        self.simple = self.max == 1 and self.ttl is None and not self.match and not self.unlimited


def _check_options(options: Any) -> None:
    known = PolicyOptions.__annotations__
    for name in options:
        if name not in known:
            import difflib

            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            raise PolicyError(f"there is no policy option {name!r}; {hint}")
    for name, valid, what in _RANGES:
        if name in options and not valid(options[name]):
            raise PolicyError(f"{name}={options[name]!r} is not {what}")
    for name in ("no_effect", "suspends"):
        _types(options.get(name, ()))
    for contradicts, why in _CONTRADICTIONS:
        if contradicts(options):
            raise PolicyError(f"the policy contradicts itself: {why}")


def _is_seconds(value: Any) -> bool:
    seconds = value.total_seconds() if hasattr(value, "total_seconds") else value
    return type(seconds) in (int, float) and seconds > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, str | list | tuple | set | frozenset) and all(isinstance(n, str) for n in value)


def _is_bool(value: Any) -> bool:
    return type(value) is bool


_RECORDS: Final = ("all", "no-result", "no-args", "nothing")
_RANGES: Final[tuple[tuple[str, Callable[[Any], bool], str], ...]] = (
    ("max", lambda v: type(v) is int and v >= 1, "a whole number from 1 on"),
    ("ttl", lambda v: v is None or _is_seconds(v), "a positive number of seconds or a timedelta"),
    ("timeout", _is_seconds, "a positive number of seconds or a timedelta"),
    ("wait", lambda v: v == 0 or _is_seconds(v), "a number of seconds from 0 on or a timedelta"),
    ("record", lambda v: v in _RECORDS, "all, no-result, no-args or nothing"),
    ("on_doubt", lambda v: v in ("rerun", "block") or callable(v), "'rerun', 'block' or a function"),
    ("key", lambda v: v is None or callable(v) or (_are_names(v) and len(v) > 0), "a list of parameters or a function of them"),
    ("ignore", _are_names, "a list of names"),
    ("match", _are_names, "a list of names"),
    ("redact", _are_names, "a list of names"),
    ("unlimited", _is_bool, "True or False"),
    ("replay", _is_bool, "True or False"),
    ("irreversible", _is_bool, "True or False"),
    ("name", lambda v: v is None or (type(v) is str and v != ""), "a name"),
)  # fmt: skip
_MEANINGLESS: Final = frozenset({"max", "ttl", "wait", "match", "on_doubt"})
_CONTRADICTIONS: Final[tuple[tuple[Callable[[Any], Any], str], ...]] = (
    (
        lambda o: o.get("unlimited") and (_MEANINGLESS & o.keys() or o.get("replay") or o.get("irreversible")),
        "an unlimited tool runs every time, so max, ttl, replay, wait, match, on_doubt and irreversible mean nothing",
    ),
    (lambda o: "wait" in o and o.get("replay") is False, "wait needs replay=True"),
    (
        lambda o: o.get("replay") and o.get("record") in ("no-result", "nothing"),
        "a result that is not recorded cannot be replayed",
    ),
    (
        lambda o: o.get("irreversible") and o.get("on_doubt") == "rerun",
        "an irreversible tool cannot rerun in doubt",
    ),
    (lambda o: o.get("key") and o.get("ignore"), "key says what counts, so ignore means nothing"),
)  # fmt: skip


def _micros(value: Any) -> int:
    seconds = value.total_seconds() if hasattr(value, "total_seconds") else value
    return int(min(seconds, 1e11) * _MICROS)


def _names(value: Names) -> frozenset[str]:
    return frozenset({value} if isinstance(value, str) else value)


def _types(value: Any) -> tuple[type[BaseException], ...]:
    types = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise PolicyError(f"{kind!r} is not an exception type")
    return types


def _with_defaults(own: PolicyOptions, defaults: PolicyOptions) -> PolicyOptions:
    """A tool's own options win; what a default says against them is dropped."""
    merged: dict[str, Any] = {**own}
    for name, value in defaults.items():
        if name not in merged:
            try:
                _check_options({**merged, name: value})
            except PolicyError:
                continue
            merged[name] = value
    return cast("PolicyOptions", merged)


# ═══ Notices ══════════════════════════════════════════════════════════════════════════


def _notice(text: str) -> None:
    """A line on stderr; stdout belongs to the program."""
    stream = sys.stderr
    try:
        stream.write(f"[ledger] {text}\n")
    except UnicodeEncodeError:
        stream.write(f"[ledger] {text.encode('ascii', 'replace').decode()}\n")
    except (AttributeError, OSError, ValueError):  # none, or closed: a notice is not worth an error
        pass


def _logger() -> Any:
    """The logger; None in a program that has not loaded `logging`.

    It is not loaded here, in whatever thread: what a fork finds half loaded is never loaded in the child.
    """
    find = getattr(sys.modules.get("logging"), "getLogger", None)
    return find and find("ledger")


def _debug(text: str) -> None:
    logger = _logger()
    if logger is not None:
        logger.debug(text)


def _warn(text: str, *, error: BaseException | None = None) -> None:
    """Something that must not pass unseen, also when the guard is quiet."""
    logger = _logger()
    if logger is not None:
        logger.warning(text, exc_info=error)
    else:
        import traceback

        _notice(
            "".join([f"{text}\n", *(traceback.format_exception(error) if error is not None else [])]).rstrip()
        )


# ═══ One attempt ══════════════════════════════════════════════════════════════════════


class _Reply(NamedTuple):
    kind: Literal["executed", "blocked", "replayed", "waited"]
    value: Any
    error: BaseException | None = None

    def given(self) -> Any:
        """The value, or what the tool raised."""
        if self.error is not None:
            raise self.error
        return self.value


#: what an attempt asks its driver to do: (what, argument)
_Step = tuple[Literal["transact", "rows", "look", "wait", "run", "user"], Any]

#: what every guard's variable for its workflow is called
_SCOPE: Final = "ledger_wf"
_running: contextvars.ContextVar[tuple[_Attempt, ...]] = contextvars.ContextVar("ledger_running", default=())


class _Replay:
    """A block of `replaying`, and how often each call was made in it."""

    __slots__ = ("_made", "check", "workflow")

    def __init__(self, workflow: str, check: Callable[[], object] | None) -> None:
        self.workflow, self.check = workflow, check
        self._made: Counter[str] = Counter()

    def count(self, call: str) -> int:
        self._made[call] += 1
        return self._made[call]


_replaying: contextvars.ContextVar[_Replay | None] = contextvars.ContextVar("ledger_replay", default=None)


@contextlib.contextmanager
def replaying(workflow: str, *, check: Callable[[], object] | None = None) -> Iterator[None]:
    """For a program that begins again from its top: in this block its calls get the results that they got first.

    Every guard's calls in the block belong to that workflow, unless a `guard.workflow` inside says otherwise, and those
    that had succeeded are answered with their results: the n-th of equal calls with that of the n-th. What may not
    or cannot be recorded is blocked, what is unlimited runs again. Like `workflow`, it holds for this thread or task
    and the tasks it starts. `check` is called before each call; what it raises is raised there, and nothing runs.
    Raises `UsageError` for an empty name.
    """
    if not isinstance(workflow, str) or not workflow:
        raise UsageError(f"{workflow!r} names no workflow; give a text that is not empty; nothing ran")
    # what a guard's own workflow said outside holds no longer, what it says inside does
    outside = [(v, value) for v, value in contextvars.copy_context().items() if v.name == _SCOPE and value]
    for variable, _ in outside:
        variable.set(None)
    before = _replaying.set(_Replay(workflow, check))
    try:
        yield
    finally:
        _replaying.reset(before)
        for variable, value in outside:
            variable.set(value)


def current() -> Current | None:
    """The run that is going on, or None outside a guarded tool."""
    attempts = _running.get()
    return attempts[-1].current if attempts else None


def idempotency_key() -> str:
    """The key to pass on to the service: the same for every run of one intended effect.

    Raises `UsageError` outside a guarded tool.
    """
    run = current()
    if run is None:
        raise UsageError("idempotency_key() was called outside a guarded tool; call it inside the tool")
    return run.idempotency_key


class _Attempt:
    """One attempt at a call. `steps` is its life, once for sync and async: it yields what takes time."""

    __slots__ = (
        "__weakref__", "again", "args", "around", "bound", "claim", "current", "ending", "entered", "guard",
        "is_new", "kwargs", "open", "pid", "policy", "run", "sent", "settled", "shown", "store", "tool", "waited",
    )  # fmt: skip

    def __init__(
        self, guard: Guard, tool: _Tool, claim: Claim, args: tuple[Any, ...], kwargs: dict[str, Any],
        bound: dict[str, Any],
    ) -> None:  # fmt: skip
        self.guard, self.tool, self.policy, self.claim = guard, tool, tool.policy, claim
        self.args, self.kwargs, self.bound = args, kwargs, bound
        self.store = guard._opened or guard._open()
        #: the block of `replaying` that it is made in
        self.again = _replaying.get()
        self.run = 0
        #: a claim was sent and its run is not settled yet; the tool was entered; a live run was waited for
        self.open = self.entered = self.waited = False
        #: a look a moment ago found no run of this call
        self.is_new = False
        self.ending: Settle | None = None
        #: runs the tool in the user's transaction, and then the verdict of the settlement in it
        self.around: Callable[[_Attempt, Callable[[], Any]], Any] | None = None
        self.settled: Verdict | None = None
        self.current: Current
        self.shown: _Shown
        self.pid: int
        self.sent: float

    def _prepare(self) -> None:
        """What only an attempt that may run needs."""
        claim = self.claim
        self.pid = os.getpid()
        text = self.show()
        key = claim.key
        if key and self.shown.secrets:
            key = json.dumps(self.shown.scrub(json.loads(key)))
        self.claim = claim._replace(
            token=new_token(),
            args=text if self.policy.record in ("all", "no-result") else None,
            caller=claim.caller or f"pid {self.pid}",
            key=key,
        )
        if key is None and not self.policy.unlimited:
            self.guard._watch_burst(self.tool, self.claim, text)

    def show(self) -> str:
        """The arguments as JSON; from here on their secrets are known, for errors and results."""
        self.shown = _Shown(self.policy.redact)
        return self.shown.text({n: self.bound[n] for n, _ in self.tool.ordered})

    def steps(self) -> Generator[_Step, Any, _Reply]:
        """Claim, run and settle; or answer what a duplicate gets."""
        self._prepare()
        if self.policy.unlimited:
            return (yield from self._unlimited())
        if self.again and not self.policy.simple and not self.claim.forced:
            reply = yield from self._repeated(self.again.count(self.claim.call))
            if reply is not None:
                return reply
        deadline = time.monotonic() + self.policy.wait
        looks = not self.store.judges_in_claim
        rows: list[Run] = (yield ("rows", None)) if looks and not self.is_new else []
        while True:
            verdict = self.claim.judge(rows, self.store.now_for(rows)) if rows else None
            if verdict is None or verdict.kind == "run":
                verdict = yield from self._claim()
            if verdict.kind == "granted":
                return (yield from self._enter(verdict))
            reply = yield from self._refused(verdict, deadline)
            if reply is not None:
                return reply
            rows = (yield ("rows", None)) if looks else []

    @property
    def _replays(self) -> bool:
        return self.policy.replay or self.again is not None

    def _repeated(self, nth: int) -> Generator[_Step, Any, _Reply | None]:
        """What the n-th such call had come to, when the program went through here before; None if it had not.

        A policy that lets a call run more than once says nothing of one that is made again from a checkpoint.
        """
        rows: list[Run] = yield ("rows", None)
        done = [row for row in rows if row.succeeded_since(-1)]
        if len(done) < nth:
            return None
        yield from self._refuse_mismatch(done[nth - 1])
        return (yield from self._answer_done(done[nth - 1].run, done[nth - 1].result))

    def _claim(self) -> Generator[_Step, Any, Verdict]:
        self.sent = time.monotonic()
        self.open = True
        try:
            verdict: Verdict = yield ("transact", self.claim)
        except LedgerError:  # the claim may stand although its reply was lost: close it, once
            self.open = False
            self.store.keeper.keep(_not_entered(self.claim, 1), once=True)
            raise
        self.open = verdict.kind == "granted"
        if verdict.kind == "lost":
            self.claim = self.claim._replace(token=new_token())
        return verdict

    def _refused(self, verdict: Verdict, deadline: float) -> Generator[_Step, Any, _Reply | None]:
        """What a duplicate gets; None to look again."""
        row = verdict.row
        if verdict.kind == "lost" or row is None:
            return None
        yield from self._refuse_mismatch(row)
        if verdict.kind == "done":
            return (yield from self._answer_done(row.run, row.result))
        if verdict.kind == "reconcile":
            return (yield from self._reconcile(row))
        if verdict.kind == "doubt":
            record = yield self._described(row)
            raise (yield from self._in_doubt(record._replace(in_doubt=True)))
        if self.claim.forced:
            yield ("look", functools.partial(self.guard._refuse_live, self, verdict, "run"))
        if not self._replays:
            return (yield from self._answer_blocked(row.run, "is running"))
        own = any(a.claim.token == row.owner for a in _running.get())
        left = deadline - time.monotonic()
        if own or left <= 0:
            yield from self._count(row.run)
            record = yield self._described(row)
            why, advice = "is still running", "wait for it, or allow more with wait=…"
            if own:
                why, advice = "is what this call is part of", "a tool cannot wait for its own end"
            raise InProgress(
                f"call {record.short} ({record.call}) {why} in {record.holder} since "
                f"{_clock_text(record.started)}; {advice}",
                record,
            )
        self.waited = True
        yield ("wait", min(left, self.store.pause(self.policy.wait - left)))
        return None

    def _described(self, row: Run) -> _Step:
        """A look for the record of a call from that run."""
        return "look", functools.partial(self.store.describe, [row])

    def _in_doubt(self, record: Record, why: str = "") -> Generator[_Step, Any, InDoubt]:
        yield from self._count(record.run)
        self.guard._tell("doubt", record)
        return InDoubt(
            f"{record.short} did not run: run {record.run} of call {record.call}, started at "
            f"{_clock_text(record.started)} in {record.holder}, ended without a known outcome"
            f"{f' ({record.error})' if record.error else ''}; find out whether it took effect, then "
            f"guard.resolve(fn, …, result=…) or guard.resolve(fn, …, done=False){why}",
            record,
        )

    def _refuse_mismatch(self, row: Run) -> Generator[_Step, Any, None]:
        """Parameters named in match= must be what they were."""
        if differ := _mismatch(row.matched, self.claim.matched):
            yield from self._count(row.run)
            record = yield self._described(row)
            raise KeyConflict(
                f"{_short(row.tool)} did not run: call {row.call} was made before with another "
                f"{', '.join(differ)}; use another key for another action",
                record,
            )

    def _reconcile(self, row: Run) -> Generator[_Step, Any, _Reply | None]:
        """Ask the user's function what really happened; nothing is written before its answer."""
        record = (yield self._described(row))._replace(in_doubt=True)
        try:
            answer = yield ("user", (self.policy.on_doubt, record))
        except Exception as error:
            raise (yield from self._in_doubt(record, f" (reconcile failed: {error!r})")) from error
        if answer is STILL_UNKNOWN:
            raise (yield from self._in_doubt(record))
        if answer is NOT_DONE:
            self.claim = self.claim._replace(not_done=(row.run, row.owner))
            verdict = yield from self._claim()
            return (yield from self._enter(verdict)) if verdict.kind == "granted" else None
        result = self.stored(answer)
        yield (
            "transact",
            Resolve(row.call, new_token(), row.run, row.owner, True, result, True, "reconcile: done"),
        )
        return None

    def _enter(self, verdict: Verdict) -> Generator[_Step, Any, _Reply]:
        """Run the tool; whatever it does, its run is settled."""
        claim, row = self.claim, cast("Run", verdict.row)
        self.run = row.run
        if verdict.closed is not None:
            yield from self._tell("doubt", self._described(verdict.closed))
        stalled = time.monotonic() - self.sent > claim.lease / _MICROS
        if stalled and (yield ("transact", Renew(claim, self.run))).kind != "renewed":
            self.open = False
            raise InProgress(f"run {self.run} of {_short(claim.tool)} was taken over before it began")
        key = f"{claim.call}-{verdict.anchor}"
        self.current = Current(claim.call, self.run, claim.tool, claim.wf, claim.caller, key)
        self.store.keeper.watch(self)
        value, error = yield ("run", None)
        if os.getpid() == self.pid:  # else a forked child came back out of the tool: the run is the parent's
            self.ending = self._ending_of(value, error)
            yield from self._settle(self.ending)
        self.open = False
        return _Reply("executed", value, error)

    def _ending_of(self, value: Any, error: BaseException | None) -> Settle:
        if error is None:
            return Settle(self.claim, self.run, "success", self.stored(value))
        status = self._status_of(error)
        trace = None if status == "suspended" else self.shown.clean(_trace_text(error))[-8000:]
        return Settle(self.claim, self.run, status, None, self.shown.clean(_error_text(error))[:2000], trace)

    def _status_of(self, error: BaseException) -> str:
        names = {f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__}
        if isinstance(error, self.policy.suspends) or not names.isdisjoint(known_suspends):
            return "suspended"
        if isinstance(error, (NotPerformed, *self.policy.no_effect)):
            return "failed"
        return "failed" if isinstance(error, Exception) and not self.policy.irreversible else "doubt"

    def stored(self, value: Any) -> str | None:
        """The result as it is kept; None when it must not or cannot be."""
        if self.policy.record in ("no-result", "nothing"):
            return None
        try:
            text = _store_form(value)
        except Exception as error:  # also what a lazy attribute raises: the tool has run, its end counts
            self.guard._say(
                f"{_short(self.claim.tool)}: its result is not kept: {type(value).__name__} ({error})"
            )
            return None
        if self.shown.secrets and self.shown.leaks_into(text):
            self.guard._say(
                f"{_short(self.claim.tool)}: its result is not kept: it repeats a secret argument"
            )
            return None
        return text

    def _settle(self, ending: Settle) -> Generator[_Step, Any, None]:
        claim, keeper = self.claim, self.store.keeper
        try:
            try:
                verdict: Verdict = self.settled or (yield ("transact", ending))
            except StoreError as error:
                if not error.full:
                    raise
                yield ("look", self.store.make_room)
                verdict = yield ("transact", ending)
        except LedgerError as error:
            keeper.keep(ending, self)
            _warn(
                f"{_short(claim.tool)} (call {claim.call}) ended as {ending.status.upper()}, but the "
                f"ledger could not record it: {error}. It is kept in memory and tried again until this "
                "process ends; if that fails, the call is in doubt"
            )
            return
        keeper.forget(claim.token)
        self.open = False
        if verdict.kind != "settled":
            _warn(
                f"{_short(claim.tool)} (call {claim.call}): run {self.run} had been given up when it "
                f"ended as {ending.status.upper()}; "
                f"{'recorded as a late end' if verdict.kind == 'late' else 'its call was reset'}"
            )
        self.guard._say_end(claim.tool, ending)
        yield from self._tell(ending.status, ("look", self._whole))

    def _unlimited(self) -> Generator[_Step, Any, _Reply]:
        claim = self.claim
        key = f"{claim.call}-{claim.token}"
        self.current = Current(claim.call, 0, claim.tool, claim.wf, claim.caller, key)
        value, error = yield ("run", None)
        text = None if error is None else self.shown.clean(_error_text(error))
        self.store.count("ran" if error is None else "raised", claim, 0, text)
        return _Reply("executed", value, error)

    def call_tool(self) -> Any:
        """What the tool returns, or something to await."""
        if self.around is not None:
            return self.around(self, lambda: self.tool.function(*self.args, **self.kwargs))
        return self.tool.function(*self.args, **self.kwargs)

    def last_row(self) -> Run:
        """The row of this attempt's run, from memory."""
        row = self.claim.first_row(self.store.clock.wall(), 0)._replace(run=self.run)
        return row._replace(status=self.ending.status, result=self.ending.result) if self.ending else row

    def lost(self) -> None:
        """The keeper found the run taken over."""
        _warn(
            f"{_short(self.claim.tool)} (call {self.claim.call}): run {self.run} was silent for longer "
            "than its timeout and was taken over while it still runs; its end will be recorded as late"
        )

    def abandon(self) -> None:
        """Interrupted between its steps: the keeper closes its run rather than leave it RUNNING."""
        if self.open and os.getpid() == self.pid:
            ending = self.ending or _not_entered(self.claim, self.run or 1)
            if self.ending is None and self.entered:
                ending = ending._replace(status="doubt", error="interrupted")
            self.store.keeper.keep(ending, self)

    # -- what a duplicate gets --

    @property
    def asks_first(self) -> bool:
        """Whether one recorded success is an answer, so that a look may save all the rest."""
        return self.policy.simple and not self.claim.forced

    def answers(self, runs: Sequence[tuple[str, int, str | None, int]]) -> Generator[_Step, Any, _Reply]:
        """What a look a moment ago leads to: the answer if the latest run succeeded, else all `steps`."""
        if runs and runs[-1][0] == "success" and not runs[-1][1]:
            return self._answer_done(runs[-1][3], runs[-1][2])
        self.is_new = not runs
        return self.steps()

    def _answer_done(self, run: int, result: str | None) -> Generator[_Step, Any, _Reply]:
        """The recorded result, or that it was done."""
        if not self._replays or result is None:
            return (yield from self._answer_blocked(run, "already done"))
        yield from self._count(run)
        if not self.guard._is_quiet():
            self.guard._say(f"↺ {self.guard._shown_name(self.claim.tool)} replayed")
        return _Reply("waited" if self.waited else "replayed", self.tool.restore(result))

    def _answer_blocked(self, run: int, why: str) -> Generator[_Step, Any, _Reply]:
        yield from self._count(run)
        if not self.guard._is_quiet():
            self.guard._say(f"⊘ {self.guard._shown_name(self.claim.tool)} blocked: {why}")
        value = self.policy.blocked_return
        if value is _NOTHING:
            return _Reply("blocked", None)
        if callable(value):
            return _Reply("blocked", value((yield "look", self._whole)))
        import copy

        return _Reply("blocked", copy.deepcopy(value))

    def _count(self, run: int) -> Generator[_Step, Any, None]:
        claim = self.claim
        if not claim.caller:
            claim = claim._replace(caller=f"pid {os.getpid()}")
        self.store.count("blocked", claim, run)
        if "blocked" in self.guard._callbacks:
            yield from self._tell("blocked", ("look", self._whole))

    def _whole(self) -> Record:
        """The record of this call, with all that is counted; from memory if it was reset meanwhile."""
        rows = self.store.rows(self.claim.call)
        return self.store.describe(rows) if rows else _record([self.last_row()], 0)

    def _tell(self, what: str, look: _Step) -> Generator[_Step, Any, None]:
        """Tell the callbacks; that their record cannot be read changes nothing for the caller."""
        if what in self.guard._callbacks:
            try:
                record = yield look
            except LedgerError as error:
                _warn(
                    f"{_short(self.claim.tool)} (call {self.claim.call}): the callbacks for {what!r} are not told, "
                    f"because the record could not be read: {error}"
                )
            else:
                self.guard._tell(what, record)


def _error_text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    except Exception:  # the tool's own error is the one to tell
        return type(error).__name__


def _trace_text(error: BaseException) -> str:
    import traceback

    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-20))
    except Exception:  # an exception that cannot be printed
        return ""


def _drive(attempt: _Attempt, course: Generator[_Step, Any, _Reply]) -> _Reply:
    """Run one attempt in this thread."""
    try:
        step = course.send(None)
        while True:
            try:
                value = _perform(attempt, *step)
            except BaseException as error:
                step = course.throw(error)
            else:
                step = course.send(value)
    except StopIteration as stop:
        return cast("_Reply", stop.value)
    finally:
        if attempt.open:
            attempt.abandon()


def _perform(attempt: _Attempt, what: str, argument: Any) -> Any:
    if what == "transact":
        return attempt.store.transact(argument)
    if what == "rows":
        return attempt.store.rows(attempt.claim.call)
    if what == "look":
        return argument()
    if what == "wait":
        return attempt.store.wait(attempt.claim.call, argument)
    if what == "user":
        function, record = argument
        return _refuse_coroutine(attempt, function(record))
    before = _running.set((*_running.get(), attempt))
    attempt.entered = True
    try:
        return _refuse_coroutine(attempt, attempt.call_tool()), None
    except BaseException as error:
        return None, error
    finally:
        _running.reset(before)


def _refuse_coroutine(attempt: _Attempt, value: Any) -> Any:
    close = getattr(value, "close", None)
    if close is not None and hasattr(value, "cr_code"):
        close()
        raise NotPerformed(
            f"{_short(attempt.claim.tool)}: a coroutine came back where no async function was expected, so "
            "nothing ran; guard the async function itself, and give a sync tool a sync on_doubt"
        )
    return value


async def _drive_async(attempt: _Attempt, course: Generator[_Step, Any, _Reply]) -> _Reply:
    """Run one attempt in an event loop."""
    try:
        step = course.send(None)
        while True:
            try:
                value = await _perform_async(attempt, *step)
            except BaseException as error:
                step = course.throw(error)
            else:
                step = course.send(value)
    except StopIteration as stop:
        return cast("_Reply", stop.value)
    finally:
        if attempt.open:
            attempt.abandon()


async def _perform_async(attempt: _Attempt, what: str, argument: Any) -> Any:
    if what == "transact":
        return await attempt.store.transact_async(argument)
    if what == "rows":
        return await attempt.store.rows_async(attempt.claim.call)
    if what == "look":
        return await attempt.store.off_loop(argument)
    if what == "wait":
        return await attempt.store.wait_async(attempt.claim.call, argument)
    if what == "user":
        function, record = argument
        answer = function(record)
        return await answer if hasattr(answer, "__await__") else answer
    before = _running.set((*_running.get(), attempt))
    attempt.entered = True
    try:
        value = attempt.call_tool()  # a wrapper may have awaited it already
        return await value if hasattr(value, "__await__") else value, None
    except GeneratorExit:  # dropped with its loop: nothing can be awaited any more
        raise
    except BaseException as error:
        return None, error
    finally:
        try:
            _running.reset(before)
        except ValueError:  # the garbage collector closes it from another context
            pass


# ═══ The guard ════════════════════════════════════════════════════════════════════════

_stores: weakref.WeakValueDictionary[tuple[str, ...], Store] = weakref.WeakValueDictionary()
_burst_warned: set[str] = set()
Callback = Callable[[Record], object]


def _open_store(url: str, **settings: Any) -> Store:
    """The store of a path or URL; one per file, settings and process. With `_first_time` held."""
    scheme, found, rest = url.partition("://")
    server = bool(found) and scheme not in ("sqlite", "memory")
    if settings["namespace"] is not None and not server:
        raise UsageError("namespace= keeps applications apart on a server; give each its own file instead")
    if server:
        return _open_server(url, settings)
    del settings["namespace"]
    if scheme == "memory" and found:
        return MemoryStore()
    if url.rpartition("/")[2] == ":memory:":
        raise UsageError("a ledger in memory is memory://, or Guard(store=MemoryStore())")
    path = os.path.abspath(rest.removeprefix("/") if found else url)
    key = (os.path.realpath(path), *(str(settings[name]) for name in sorted(settings)))
    store = _stores.get(key) or SqliteStore(path, **settings)
    _stores[key] = store
    return store


def _open_server(url: str, settings: dict[str, Any]) -> Store:
    """The store of a server's URL, which the companion package knows; one per URL, settings and process."""
    key = (url, *(str(settings[name]) for name in sorted(settings)))
    if key not in _stores:
        try:
            import ledger_stores
        except ImportError as error:
            raise UsageError(
                f"{url.partition('://')[0]}:// needs the stores of the whole package (pip install "
                "ledger-guard); with ledger.py alone a plain path, sqlite:///path or memory:// can be used"
            ) from error
        del settings["instant_death"]  # a lease on a server goes by its clock alone
        __import__("logging")  # as every driver does
        _wait_before_others()
        made = ledger_stores.open_store(url, **settings)
        _stores[key] = made
        return made
    return _stores[key]


class Guard:
    """Runs tools once. `guard` is the one for every day; make your own for another store.

    `url`: a path, `sqlite:///path`, `memory://` or that of a server, such as `postgresql://…`
    (default: LEDGER_DB, else ./ledger.db, read when first needed); `namespace` keeps applications
    on one server apart.  `sync`: "full" (claim and outcome are on disk before anything goes on),
    "claim" (the outcome rides on the next fsync: after a power cut it may read as in doubt) or
    "off" (survives a killed process, not a power cut).  A guard can be pickled: it carries its
    URL and settings, and opens its own connection where it arrives.
    """

    def __init__(
        self, url: str | os.PathLike[str] | None = None, *, store: Store | None = None,
        workflow: str | None = None, sync: Literal["full", "claim", "off"] = "full",
        quiet: bool | None = None, lock_seconds: float = 30.0, instant_death: bool = True,
        namespace: str | None = None,
    ) -> None:  # fmt: skip
        if sync not in ("full", "claim", "off"):
            raise UsageError(f"sync={sync!r} is not one of 'full', 'claim' and 'off'")
        if url is not None and store is not None:
            raise UsageError("a guard has one store: give either a URL or store=, not both")
        if isinstance(url, Store) or not isinstance(store, Store | None):
            raise UsageError(
                "Guard takes a path or URL first, and store= takes an instance of a subclass of ledger.Store"
            )
        if not lock_seconds >= 0:
            raise UsageError(f"lock_seconds={lock_seconds!r} is not a number of seconds from 0 on")
        self._url = None if url is None else os.fspath(url)
        self._given_store = store
        self._settings = {
            "sync": sync, "lock_seconds": lock_seconds, "instant_death": instant_death, "namespace": namespace,
        }  # fmt: skip
        self._workflow = workflow
        self._quiet = quiet
        self._policies: dict[str, PolicyOptions] = {}
        self._defaults: PolicyOptions = {}
        self._begin()

    def _begin(self) -> None:
        """What is not carried to another process."""
        self._opened: Store | None = self._given_store
        self._generation = object()  # another one whenever a policy changes
        self._tools: weakref.WeakKeyDictionary[Any, _Tool] = weakref.WeakKeyDictionary()
        #: by what they are told of: the end of a run, or an attempt that was blocked
        self._callbacks: dict[str, list[Callback]] = {}
        self._scope: contextvars.ContextVar[str | None] = contextvars.ContextVar(_SCOPE, default=None)
        self._who: contextvars.ContextVar[str | None] = contextvars.ContextVar("ledger_caller", default=None)
        self._main_scope: str | None = None
        self._main_who: str | None = None
        self._bursts: dict[tuple[str, str], deque[tuple[float, str]]] = {}
        self._receivers: dict[str, tuple[Any, ...]] = {}
        self._digests: dict[str, bytes] = {}
        self._short_names: dict[str, set[str]] = {}
        self._told_doubts: deque[tuple[str, int]] = deque(maxlen=1000)

    def __getstate__(self) -> dict[str, Any]:
        url = self._resolved_url()
        if self._given_store is not None or url.startswith("memory://"):
            (self._given_store or MemoryStore()).__getstate__()
        return {
            "_url": url, "_settings": self._settings, "_workflow": self._workflow, "_quiet": self._quiet,
            "_policies": self._policies, "_defaults": self._defaults,
            "_main_scope": self._scope.get() or self._main_scope, "_main_who": self._who.get() or self._main_who,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._given_store = None
        self._begin()
        self.__dict__.update(state)

    def __repr__(self) -> str:
        where = type(self._given_store).__name__ if self._given_store else self._url
        return f"Guard({where or 'LEDGER_DB or ./ledger.db'})"

    # -- calling --

    def __call__(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run `fn(*args, **kwargs)` once; a coroutine function gives something to await.

        `key=` says in one value what makes two calls the same action; where the tool has a
        parameter `key` of its own, that one gets it and `ledger_key=` is the guard's.  Returns
        the tool's result, or for a duplicate None, `blocked_return` or the recorded result.

        Raises what the tool raises, and `StoreError`, `InDoubt`, `InProgress`, `KeyConflict`,
        `UsageError` before the tool runs.
        """
        return cast("T", self._value(self._attempt(fn, args, kwargs)))

    @overload
    def call(
        self, fn: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Outcome[T]]: ...
    @overload
    def call(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Outcome[T]: ...
    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Like calling the guard, but answers with an `Outcome` (to await for an async tool)."""
        attempt = self._attempt(fn, args, kwargs)
        if attempt.tool.is_async:
            return self._outcome_async(attempt)
        return self._outcome(attempt, self._answer(attempt))

    async def _outcome_async(self, attempt: _Attempt) -> Outcome[Any]:
        import asyncio

        reply = await self._answer_async(attempt)
        return await asyncio.to_thread(self._outcome, attempt, reply)  # it waits for a commit

    def _outcome(self, attempt: _Attempt, reply: _Reply) -> Outcome[Any]:
        value = reply.given()
        try:
            attempt.store.flush()
            record = attempt.store.look(attempt.claim.call)
        except LedgerError:  # the tool ran: its result counts more than its record
            record = None
        stale = reply.kind == "executed" and record is not None and record.status is Status.RUNNING
        if record is None or (stale and record.run == attempt.run):
            record = _record([attempt.last_row()], 0)
        return Outcome(reply.kind, value, record)

    def _value(self, attempt: _Attempt) -> Any:
        """The tool's result or what stands for it; something to await for an async tool."""
        return self._value_async(attempt) if attempt.tool.is_async else self._answer(attempt).given()

    async def _value_async(self, attempt: _Attempt) -> Any:
        return (await self._answer_async(attempt)).given()

    def _answer(self, attempt: _Attempt) -> _Reply:
        if not attempt.asks_first:
            return _drive(attempt, attempt.steps())
        return _drive(attempt, attempt.answers(attempt.store.quick(attempt.claim.call)))

    async def _answer_async(self, attempt: _Attempt) -> _Reply:
        if not attempt.asks_first:
            return await _drive_async(attempt, attempt.steps())
        runs = await attempt.store.quick_async(attempt.claim.call)
        return await _drive_async(attempt, attempt.answers(runs))

    def _attempt(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, forced: bool = False
    ) -> _Attempt:
        """An attempt at `fn(*args, **kwargs)`, the guard's own key taken out of them."""
        tool, args, kwargs = self._tool_for(fn, args, kwargs)
        key = None
        for name in ("ledger_key", "key"):
            if name in kwargs and not (name == "key" and "key" in tool.by_name):
                key = kwargs.pop(name)
                key = "" if key is not None and _is_empty(key) else key
                break
        return self._attempt_at(tool, key, args, kwargs, forced)

    def _attempt_at(
        self, tool: _Tool, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], forced: bool = False
    ) -> _Attempt:
        """Name the call: everything that can go wrong here goes wrong before anything runs."""
        if tool.generation is not self._generation:
            self._apply_policy(tool)
        policy = tool.policy
        bound = tool.bind(args, kwargs)
        again = _replaying.get()
        if again is not None and again.check is not None:
            again.check()
        wf = self._scope.get() or (again.workflow if again else self._main_scope) or self._default_workflow()
        form, shown_key = self._identity(tool, key, bound)
        receiver = self._receiver_form(tool, bound[tool.receiver]) if tool.receiver else "null"
        text = f"[{_quote(_FORM_VERSION)},{_quote(tool.name)},{_quote(wf)},{receiver},{form}]"
        call = hashlib.sha256(text.encode()).hexdigest()[:32]
        matched = self._match_form(call, tool, policy, bound) if policy.match else None
        on_doubt = policy.on_doubt if isinstance(policy.on_doubt, str) else "reconcile"
        claim = Claim(
            call, "", tool.name, wf, self._who.get() or self._main_who or "", shown_key, matched, policy.max,
            policy.ttl, policy.timeout, cast("Any", on_doubt), forced,
        )  # fmt: skip
        return _Attempt(self, tool, claim, args, kwargs, bound)

    def _identity(self, tool: _Tool, key: Any, bound: dict[str, Any]) -> tuple[str, str | None]:
        """The canonical text that tells this call from others, and the key as it is shown."""
        policy = tool.policy
        if key is None and policy.key is None:
            return tool.form(bound, policy.ignore), None
        if key is None:
            values = tool.named(bound)
            if callable(policy.key):
                key = self._key_of(tool, {n: v for n, v in values.items() if n != tool.rest})
            else:
                key = [values.get(name) for name in cast("tuple[str, ...]", policy.key)]
                key = None if all(_is_empty(v) for v in key) else key
        if _is_empty(key):
            raise UsageError(f"{_short(tool.name)} did not run: its key is empty; a key must name one action")
        return _tagged("key", tool.part("key", key)), json.dumps(_Shown(policy.redact).of(key))

    def _key_of(self, tool: _Tool, values: dict[str, Any]) -> Any:
        try:
            return cast("Callable[..., Any]", tool.policy.key)(**values)
        except Exception as error:
            raise UsageError(
                f"{_short(tool.name)} did not run: its key function raised {error!r}; it is called with all "
                "arguments by name"
            ) from error

    def _match_form(self, call: str, tool: _Tool, policy: Policy, bound: dict[str, Any]) -> str:
        """Digests, not values: what must agree may be secret."""
        values = tool.named(bound)
        forms = {n: f"{call}{tool.part(n, values.get(n))}" for n in sorted(policy.match)}
        return json.dumps({n: hashlib.sha256(form.encode()).hexdigest()[:16] for n, form in forms.items()})

    def _receiver_form(self, tool: _Tool, receiver: Any) -> str:
        """A method counts the object it belongs to, where that has a stable form."""
        try:
            return canonical(receiver)
        except (UnstableArgument, RecursionError):
            pass
        advice = "name=… or a __ledger_key__() method"
        self._watch_sharing(tool.name, (receiver,), "is called on", advice)
        return _tagged("instance", _quote(_type_name(type(receiver))))

    def _watch_sharing(self, name: str, objects: tuple[Any, ...], how: str, advice: str) -> None:
        """Say once that calls which only objects without a stable form tell apart count as the same."""
        first = self._receivers.setdefault(name, objects)
        if any(mine is not other for mine, other in zip(objects, first, strict=False)):
            self._receivers[name] = ()
            self._say(
                f"⚠  {_short(name)} {how} two objects that have no stable form, so their calls "
                f"count as the same; tell them apart with {advice}"
            )

    def _watch_burst(self, tool: _Tool, claim: Claim, args: str) -> None:
        """Warn of calls that look like retries with drifting arguments: three different ones in 10 s."""
        if claim.tool in _burst_warned or self._is_quiet():
            return
        now = time.monotonic()
        recent = self._bursts.setdefault((claim.tool, claim.wf), deque(maxlen=3))
        if any(args == text for _, text in recent.copy()):
            return
        recent.append((now, args))
        recent = recent.copy()
        if len(recent) < 3 or now - recent[0][0] > 10:
            return
        if len(self._bursts) > 1000:
            self._bursts.clear()
        _burst_warned.add(claim.tool)
        forms = [tool.named(json.loads(text)) for _, text in recent]
        names = [n for n in forms[-1] if n not in tool.policy.ignore and n != tool.rest]
        changed = [n for n in names if len({json.dumps(f.get(n)) for f in forms}) > 1]
        which = f" (only {changed[0]} changes)" if len(changed) == 1 else f" ({', '.join(changed)} change)"
        which = which if 0 < len(changed) < max(len(names), 2) else ""
        self._say(
            f"⚠  {_short(claim.tool)} called 3× with different args in <10s{which} — if retrying, add key=…"
        )

    # -- telling --

    def _say_end(self, tool: str, ending: Settle) -> None:
        if not self._is_quiet():
            mark = {"success": "✓", "failed": "✗", "suspended": "⏸"}.get(ending.status, "?")
            told = f"   → {ending.error.splitlines()[0]}" if ending.error else ""
            self._say(f"{mark} {self._shown_name(tool)}{told}")

    def _tell(self, what: str, record: Record) -> None:
        """A callback's exception never reaches the tool's caller, and never vanishes.

        A doubt is told once for each run, however many duplicates come upon it.
        """
        if what not in self._callbacks or (
            what == "doubt" and (record.call, record.run) in self._told_doubts
        ):
            return
        if what == "doubt":
            self._told_doubts.append((record.call, record.run))
        for callback in self._callbacks[what]:
            try:
                returned = callback(record)
                if hasattr(returned, "cr_code"):
                    cast("Any", returned).close()
                    raise UsageError("a callback is called, not awaited; give a plain function")
            except Exception as error:
                _warn(f"the callback {_brief(callback)} raised for {record.short}", error=error)

    def _shown_name(self, tool: str) -> str:
        names = self._short_names.setdefault(_short(tool), set())
        names.add(tool)
        return _short(tool) if len(names) == 1 else tool

    # -- tools and policies --

    def _tool_for(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Tool, tuple[Any, ...], dict[str, Any]]:
        """The tool behind a callable, and the arguments with what a partial or an object adds to them."""
        try:
            return self._tools[fn], args, kwargs
        except (KeyError, TypeError):  # not seen before, or not hashable
            pass
        if not hasattr(fn, "__ledger_tool__"):
            _refuse_uncallable(fn, "guard")
        function, first, named, name, receiver = _take_apart(fn)
        args, kwargs = first + args, {**named, **kwargs}
        made = getattr(function, "__ledger_tool__", None)
        if made is not None:
            tool, first, named = made
            return tool, first + args, {**named, **kwargs}
        try:
            found = self._tools.get(function)
        except TypeError:
            found = None
        if found is None or found.own_name != name:
            found = _Tool(function, name, receiver=receiver)
            self._refuse_twins(found)
            try:
                self._tools[function] = found
            except TypeError:
                pass
        return found, args, kwargs

    def _refuse_twins(self, tool: _Tool) -> None:
        """Functions that only their bytecode tells apart must be named, or one would never run."""
        if "#" not in tool.own_name:
            return
        if objects := _closed_objects(tool.function):
            self._watch_sharing(tool.own_name, objects, "closes over", "name=…")
        code = getattr(getattr(tool.function, "__code__", None), "co_code", b"")
        if self._digests.setdefault(tool.own_name, code) != code:
            raise UsageError(
                f"two different functions are both called {tool.own_name}; nothing ran. Tell them "
                "apart: @guard.once(name=…) or guard.policy(fn, name=…)"
            )

    def _apply_policy(self, tool: _Tool) -> None:
        names = (_short(tool.own_name), tool.options.get("name") or "", tool.own_name)
        own: PolicyOptions = {**tool.options}
        for name in dict.fromkeys(names):
            own = cast("PolicyOptions", {**own, **self._policies.get(name, {})})
        _check_options(own)
        if tool.rest is None:
            self._check_names(tool, own)
        tool.policy = Policy(**_with_defaults(own, self._defaults_for(tool)))
        tool.name = tool.policy.name or tool.own_name
        tool.generation = self._generation

    def _defaults_for(self, tool: _Tool) -> PolicyOptions:
        """The defaults without a `key` or `match` that names what this tool does not have."""
        found: dict[str, Any] = {}
        for option, value in self._defaults.items():
            named = option in ("key", "match") and value is not None and not callable(value)
            if not named or tool.rest is not None or _names(cast("Names", value)) <= tool.by_name:
                found[option] = value
        return cast("PolicyOptions", found)

    def _check_names(self, tool: _Tool, own: PolicyOptions) -> None:
        for option in ("key", "ignore", "match"):
            names: Any = own.get(option)
            unknown = [] if names is None or callable(names) else sorted(_names(names) - tool.by_name)
            if unknown:
                raise PolicyError(
                    f"{option} of {_short(tool.own_name)} names {', '.join(map(repr, unknown))}, which is no "
                    f"parameter of it; it has {', '.join(n for n, _ in tool.ordered) or 'none'}"
                )

    def policy(self, fn: Callable[..., Any] | str, /, **options: Unpack[PolicyOptions]) -> None:
        """Set options of one tool, by function or name; later ones are added to earlier ones.

        Raises `PolicyError`, and changes nothing, when they are misspelt or contradict each other.
        """
        tool = None if isinstance(fn, str) else self._tool_for(fn, (), {})[0]
        name = fn if isinstance(fn, str) else cast("_Tool", tool).own_name
        before = self._policies.get(name, {})
        merged = cast("PolicyOptions", {**before, **options})
        Policy(**merged)
        self._policies[name] = merged
        self._generation = object()
        try:
            if tool is not None:
                self._apply_policy(tool)
        except PolicyError:
            self._policies[name] = before
            raise

    def defaults(self, **options: Unpack[PolicyOptions]) -> None:
        """Set options for all tools; what a tool's own policy says wins."""
        merged = cast("PolicyOptions", {**self._defaults, **options})
        Policy(**merged)
        if options.get("name"):
            raise PolicyError("defaults: one name=… for all tools would make them one; name each")
        self._defaults = merged
        self._generation = object()

    # -- wrapping --

    @overload
    def once(self, fn: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def once(self, /, **options: Unpack[PolicyOptions]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def once(self, fn: Any = None, /, **options: Unpack[PolicyOptions]) -> Any:
        """Decorate a tool: `@guard.once` or `@guard.once(replay=True, …)`."""
        if fn is None:
            Policy(**options)
            return lambda function: self._wrap(function, options, "guard.once")
        return self._wrap(fn, options, "guard.once")

    def _wrap(self, fn: Any, options: PolicyOptions, where: str) -> Any:
        if hasattr(fn, "__ledger_tool__"):
            if options:
                raise UsageError(
                    f"{where}: {_brief(fn)} is guarded already; use guard.policy for more options"
                )
            return fn
        if isinstance(fn, classmethod):
            return classmethod(self._wrap(fn.__func__, options, where))
        _refuse_uncallable(fn, where)
        function, first, named, name, receiver = _take_apart(fn)
        tool = _Tool(function, name, receiver=receiver)
        self._refuse_twins(tool)
        tool.options = options
        self._apply_policy(tool)
        wrapper: Any
        if tool.is_async:

            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                return await self._value_async(
                    self._attempt_at(tool, None, first + args, {**named, **kwargs})
                )

            wrapper = guarded_async
        else:

            def guarded(*args: Any, **kwargs: Any) -> Any:
                return self._value(self._attempt_at(tool, None, first + args, {**named, **kwargs}))

            wrapper = guarded
        _dress(wrapper, fn)
        wrapper.__ledger_tool__ = (tool, first, named)
        return staticmethod(wrapper) if isinstance(fn, staticmethod) else wrapper

    @overload
    def wrap_tools(
        self, tools: dict[str, Callable[P, R]], **options: Unpack[PolicyOptions]
    ) -> dict[str, Callable[P, R]]: ...
    @overload
    def wrap_tools(
        self, tools: dict[str, Callable[..., Any]], **options: Unpack[PolicyOptions]
    ) -> dict[str, Callable[..., Any]]: ...
    @overload
    def wrap_tools(
        self, tools: list[Callable[P, R]], **options: Unpack[PolicyOptions]
    ) -> list[Callable[P, R]]: ...
    @overload
    def wrap_tools(
        self, tools: list[Callable[..., Any]], **options: Unpack[PolicyOptions]
    ) -> list[Callable[..., Any]]: ...
    @overload
    def wrap_tools(self, tools: Tools, **options: Unpack[PolicyOptions]) -> Tools: ...
    def wrap_tools(self, tools: Any, **options: Unpack[PolicyOptions]) -> Any:
        """The same kind of collection with every tool guarded.

        Wrapping twice guards once; other options for what is guarded already are a `UsageError`.
        """
        Policy(**options)
        if options.get("name") and len(tools) > 1:
            raise PolicyError("wrap_tools: one name=… for several tools would make them one; name each")
        if isinstance(tools, dict):
            wrapped = tools.copy()  # a subclass knows how to copy itself
            wrapped.update({n: self._wrap_one(t, options, repr(n)) for n, t in tools.items()})
            return wrapped
        if isinstance(tools, list | tuple):
            make: Any = getattr(tools, "_make", type(tools))
            return make([self._wrap_one(t, options, f"item {i}") for i, t in enumerate(tools)])
        raise UsageError(
            f"wrap_tools takes a dict or a list of functions, not {type(tools).__name__}; for one function "
            "use guard.once(fn)"
        )

    def _wrap_one(self, fn: Any, options: PolicyOptions, which: str) -> Any:
        made = getattr(fn, "__ledger_tool__", None)
        again = made is not None and made[0].options == options
        return fn if again else self._wrap(fn, options, f"guard.wrap_tools, {which}")

    # -- scopes --

    def workflow(self, id: str) -> Scope:
        """Set the scope of deduplication, from now on or for a `with` block.

        The bare call holds for this thread or task and the tasks it starts; made in the main
        thread outside a running loop, also for threads that have set none.
        """
        return Scope(self, "_scope", "_main_scope", id)

    def as_caller(self, name: str) -> Scope:
        """Say who asks, for the records; scoped like `workflow`."""
        return Scope(self, "_who", "_main_who", name)

    def _default_workflow(self) -> str:
        if self._workflow is None:
            self._workflow = os.environ.get("LEDGER_WORKFLOW") or "default"
        return self._workflow

    # -- the ways out --

    def retry(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> bool:
        """Let the next call run, although this one succeeded or is in doubt; False if there is none.

        Raises `InProgress` while a live run holds the call.
        """
        attempt, rows = self._existing(fn, args, kwargs)
        if not rows:
            return False
        claim, last = attempt.claim, rows[-1]
        why = self._who.get() or "retry"
        op = Release(claim.call, new_token(), last.run, last.owner, claim.max, claim.ttl, why)
        self._refuse_live(attempt, attempt.store.transact(op), "released")
        return True

    def resolve(
        self, fn: Callable[..., Any], /, *args: Any, result: Any = _NOTHING, done: bool = True,
        note: str = "", **kwargs: Any,
    ) -> None:  # fmt: skip
        """Settle a call that is in doubt: it happened (`result=…`), or it did not (`done=False`).

        Raises `InProgress` while a live run holds the call and `UsageError` if nothing is in doubt.
        """
        if not done and result is not _NOTHING:
            raise UsageError("resolve: what was not done has no result; give result=… or done=False")
        attempt, rows = self._existing(fn, args, kwargs)
        if not rows:
            raise UsageError(f"{_short(attempt.claim.tool)}: nothing was resolved: this call was never made")
        stored = None if result is _NOTHING else attempt.stored(result)
        last, why = rows[-1], note or self._who.get() or "resolve"
        op = Resolve(last.call, new_token(), last.run, last.owner, done, stored, False, why)
        verdict = attempt.store.transact(op)
        self._refuse_live(attempt, verdict, "resolved")
        if verdict.kind != "resolved":
            record = attempt.store.describe(attempt.store.rows(last.call))
            raise UsageError(
                f"{record.short}: nothing was resolved: run {record.run} of call {record.call} is "
                f"{record.status.upper()}, not in doubt; to run it again use guard.retry"
            )

    def force(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run now, whatever the history says, and record it; raises `InProgress` beside a live run."""
        return cast("T", self._value(self._attempt(fn, args, kwargs, forced=True)))

    def transaction(self, connection: Any) -> Callable[..., Any]:
        """Call tools so that their writes and the settlement commit together, or neither does.

        `connection` is yours, to the database that the ledger is in (sqlite3 or psycopg), with no
        transaction open: `guard.transaction(db)(transfer, order)`.  One begins when the claim is on
        disk and is committed with the outcome; a tool that raises, or was given up meanwhile, has
        written nothing.  Raises `UsageError`, and nothing stays written, for another database.
        """
        try:
            with _first_time:
                from ledger_stores.transaction import Transaction
        except ImportError as error:
            raise UsageError("guard.transaction needs the whole package: pip install ledger-guard") from error
        return Transaction(self, connection)

    def _existing(self, fn: Any, args: Any, kwargs: Any) -> tuple[_Attempt, list[Run]]:
        attempt = self._attempt(fn, args, kwargs)
        attempt.show()  # a result told by hand may repeat a secret
        return attempt, attempt.store.rows(attempt.claim.call)

    def _refuse_live(self, attempt: _Attempt, verdict: Verdict, what: str) -> None:
        if verdict.kind == "live" and verdict.row is not None:
            record = attempt.store.describe([verdict.row])
            raise InProgress(
                f"{record.short} was not {what}: run {record.run} of call {record.call} is running in "
                f"{record.holder} since {_clock_text(record.started)}; wait for it, or stop that process",
                record,
            )

    # -- looking --

    def stats(self) -> dict[str, Any]:
        """Sums over all calls, and per tool under "tools"."""
        tools = self._ready().totals()
        return {**{name: sum(t[name] for t in tools.values()) for name in _TOTALS}, "tools": tools}

    def log(self) -> None:
        """Print one line per tool to stdout."""
        tools = self._ready().totals()
        shown = {t: _short(t) if sum(_short(o) == _short(t) for o in tools) == 1 else t for t in tools}
        width = max((len(n) for n in shown.values()), default=0)
        errors = self._ready().last_errors() if any(sums["failed"] for sums in tools.values()) else {}
        for tool, sums in sorted(tools.items(), key=lambda item: shown[item[0]]):
            mark = "✗" if sums["failed"] else "?" if sums["in_doubt"] else "✓"
            line = (
                f"{mark} {shown[tool]:<{width}} attempts {sums['attempts']:<3} executed {sums['executed']:<3}"
            )
            line += f" blocked {sums['blocked']}" if sums["blocked"] else ""
            line += f" in doubt {sums['in_doubt']}" if sums["in_doubt"] else ""
            error = errors.get(tool) if sums["failed"] else None
            line += f" → {error.splitlines()[0]}" if error else ""
            print(line.rstrip())

    @overload
    def history(self, *, tool: str | None = None, wf: str | None = None) -> list[dict[str, Any]]: ...
    @overload
    def history(
        self, *, tool: str | None = None, wf: str | None = None, stream: Literal[True]
    ) -> Iterator[dict[str, Any]]: ...
    def history(self, *, tool: str | None = None, wf: str | None = None, stream: bool = False) -> Any:
        """One JSON-safe dict per call, its runs inside; `stream=True` for an iterator.

        Oldest first, after them the calls of unlimited tools.
        """
        store = self._ready()
        store.flush_for_reading()
        found = (_history_entry(record, rows) for record, rows in store.calls(tool=tool, wf=wf))
        return found if stream else list(found)

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that event number, oldest first."""
        return self._ready().events(after)

    def reset(self, wf: str | None = None) -> None:
        """Forget the calls of a workflow, or all; raises `InProgress` while one of them runs."""
        store = self._ready()
        store.reset(wf, store.clock.wall())

    def check(self) -> dict[str, Any]:
        """Prove that the ledger can be read and written; raises `StoreError` that says what to do."""
        return self._ready().check()

    def flush(self) -> None:
        """Write what was only counted so far."""
        if self._opened is not None:
            self._opened.flush()

    def close(self) -> None:
        """Write what is pending and close the file; it opens again when it is used again."""
        if self._opened is not None:
            self._opened.close()

    # -- callbacks and settings --

    def on_success(self, callback: Callback) -> None:
        """Call it with the record after each run that succeeded."""
        self._listen("success", callback)

    def on_block(self, callback: Callback) -> None:
        """Call it with the record after each attempt that ran nothing."""
        self._listen("blocked", callback)

    def on_failure(self, callback: Callback) -> None:
        """Call it with the record after each run that failed."""
        self._listen("failed", callback)

    def on_doubt(self, callback: Callback) -> None:
        """Call it with the record when a run turns out to be in doubt."""
        self._listen("doubt", callback)

    def _listen(self, what: str, callback: Callback) -> None:
        if not callable(callback):
            raise UsageError(f"a callback is a function of the record, not {type(callback).__name__}")
        self._callbacks.setdefault(what, []).append(callback)

    def persist(self, url: str | os.PathLike[str]) -> None:
        """Keep the records in another file from now on."""
        self.close()
        self._url, self._given_store, self._opened = os.fspath(url), None, None

    def quiet(self, quiet: bool = True) -> None:
        """Print no notices; warnings about what could not be recorded stay."""
        self._quiet = quiet

    def _is_quiet(self) -> bool:
        if self._quiet is None:
            self._quiet = os.environ.get("LEDGER_QUIET", "").lower() not in ("", "0", "false", "no", "off")
        return self._quiet

    def _say(self, text: str) -> None:
        if not self._is_quiet():
            _notice(text)

    def _resolved_url(self) -> str:
        url = self._url or os.environ.get("LEDGER_DB") or "ledger.db"
        url = url.removeprefix("sqlite:///")
        return url if "://" in url else os.path.abspath(url)

    def _ready(self) -> Store:
        return self._opened or self._open()

    def _open(self) -> Store:
        with _first_time:
            if self._opened is None:
                self._url = self._resolved_url()
                self._opened = _open_store(self._url, **self._settings)
                if isinstance(self._opened, SqliteStore):
                    self._opened.quiet = self._is_quiet()
            return self._opened


def _is_empty(key: Any) -> bool:
    """Whether it names nothing: None, blank text, an empty collection."""
    if isinstance(key, str):
        return not key.strip()
    return key is None or (hasattr(type(key), "__len__") and len(key) == 0)


def _dress(wrapper: Any, fn: Any) -> None:
    """Make the wrapper look like the tool, with string annotations resolved.

    Frameworks evaluate annotations in another module, where their names mean nothing.
    """
    import inspect
    import typing

    shown = fn
    while isinstance(shown, functools.partial):
        shown = shown.func
    if hasattr(shown, "__name__"):
        functools.update_wrapper(wrapper, shown)
    else:
        wrapper.__name__ = wrapper.__qualname__ = type(fn).__name__
        wrapper.__doc__ = type(fn).__doc__
        shown = type(shown).__call__
    wrapper.__wrapped__ = fn
    try:
        hints = typing.get_type_hints(shown, include_extras=True)
    except Exception:  # a name that exists only for type checkers: leave the strings
        hints = {}
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        return
    if hints:
        wrapper.__annotations__ = {n: h for n, h in hints.items() if n in {*signature.parameters, "return"}}
        parts = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()]
        returned = hints.get("return", signature.return_annotation)
        signature = signature.replace(parameters=parts, return_annotation=returned)
    wrapper.__signature__ = signature


def _history_entry(record: Record, rows: Sequence[Run]) -> dict[str, Any]:
    values = record._asdict()
    times = {n: _iso(values[n]) for n in ("created", "touched", "started", "ended", "lease")}
    for name in ("args_json", "result_json", "holder", "state"):
        del values[name]
    return {
        **values, **times, "key": record.key and json.loads(record.key), "args": record.args,
        "status": record.status.value, "result": record.result_json and json.loads(record.result_json),
        "executed": record.runs, "runs": [_history_run(r) for r in rows],
    }  # fmt: skip


def _history_run(row: Run) -> dict[str, Any]:
    return {
        "run": row.run, "status": row.status, "caller": row.caller, "owner": row.owner,
        "started": _iso(row.started), "ended": _iso(row.ended), "error": row.error, "trace": row.trace,
        "released": bool(row.released), "forced": bool(row.forced), "late": row.late,
        "blocked": row.blocked,
    }  # fmt: skip


class Scope:
    """A workflow or a caller's name that holds from its making on; in `with` it ends with the block."""

    def __init__(self, guard: Guard, variable: str, main: str, value: str) -> None:
        if not isinstance(value, str) or not value:
            raise UsageError(f"{value!r} names no workflow or caller; give a text that is not empty")
        self._guard = guard
        self._variable: contextvars.ContextVar[str | None] = getattr(guard, variable)
        self._main = main
        self._before = (self._variable.get(), getattr(guard, main))
        self._value = value
        self._for_threads = threading.current_thread() is threading.main_thread() and not _loop_runs()
        self._set(value, value)

    def _set(self, mine: str | None, threads: str | None) -> None:
        self._variable.set(mine)
        if self._for_threads:
            setattr(self._guard, self._main, threads)

    def __call__(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Like calling the guard, in this scope."""
        before = self._variable.get()
        self._variable.set(self._value)
        try:
            attempt = self._guard._attempt(fn, args, kwargs)
            if not attempt.tool.is_async:
                return cast("T", self._guard._value(attempt))
        finally:
            self._variable.set(before)
        return cast("T", self._call_async(attempt))

    async def _call_async(self, attempt: _Attempt) -> Any:
        before = self._variable.get()
        self._variable.set(self._value)
        try:
            return await self._guard._value_async(attempt)
        finally:
            self._variable.set(before)

    def reset(self) -> None:
        """Forget the calls of this workflow."""
        self._guard.reset(self._value)

    def __enter__(self) -> Self:
        self._set(self._value, self._value)
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(*self._before)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__()


def _loop_runs() -> bool:
    asyncio_events = sys.modules.get("asyncio.events")
    return asyncio_events is not None and asyncio_events._get_running_loop() is not None


#: the guard for every day: LEDGER_DB, else ./ledger.db
guard = Guard()
