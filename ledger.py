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
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from enum import Enum, StrEnum
from json.encoder import encode_basestring_ascii as _quote
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
)

if TYPE_CHECKING:
    import asyncio
    from datetime import datetime, timedelta
    from types import CodeType

__version__ = "0.1.0"

__all__ = [
    "NOT_DONE",
    "STILL_UNKNOWN",
    "Current",
    "Guard",
    "InDoubt",
    "InProgress",
    "KeyConflict",
    "LedgerError",
    "MemoryStore",
    "NotPerformed",
    "Outcome",
    "Policy",
    "PolicyError",
    "Record",
    "SqliteStore",
    "Status",
    "Store",
    "StoreError",
    "UnstableArgument",
    "UsageError",
    "current",
    "guard",
    "idempotency_key",
    "known_suspends",
    "tell_model",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Tools = TypeVar("Tools", bound="dict[str, Any] | list[Any] | tuple[Any, ...]")


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
    status: str
    result: str | None
    error: str | None
    trace: str | None
    started: int
    ended: int | None
    lease: int
    mono: int
    closed_by: str | None
    released: int
    forced: int
    late: str | None
    late_at: int | None
    blocked: int

    def succeeded_since(self, horizon: int) -> bool:
        """Whether this is a success, or a late one, younger than `horizon` and not released."""
        if self.released:
            return False
        if self.status == "success":
            return (self.ended or 0) > horizon
        return self.late == "success" and (self.late_at or 0) > horizon


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
    return f"{done}; result: {_plain(record.result_json)}"


def _clock_text(micros: int) -> str:
    moment = at(micros)
    recent = time.time() - micros / 1e6 < 86_400
    return moment.strftime("%H:%M:%S" if recent else "%Y-%m-%d %H:%M:%S")


def _short(tool: str) -> str:
    name = tool.split("#", 1)[0].rsplit(".", 1)[-1]
    return name if name != "<lambda>" else tool.rsplit(".", 1)[-1]


def _iso(micros: int | None) -> str | None:
    return None if micros is None else at(micros).isoformat()


# ═══ Secrets ══════════════════════════════════════════════════════════════════════════

_MASK: Final = "****"
# json.dumps makes a new encoder for every call that does not take its defaults
_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
_compact_finite: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_SECRET_WORDS: Final = frozenset(
    [
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "token",
        "authorization",
        "credential",
        "credentials",
        "cvv",
        "cvc",
        "apikey",
        "bearer",
        "ssn",
        "pin",
        "otp",
        "jwt",
    ]
)
_SECRET_PAIRS: Final = frozenset(
    [
        "api_key",
        "access_key",
        "private_key",
        "signing_key",
        "encryption_key",
        "card_number",
        "account_number",
        "security_code",
        "auth_key",
        "api_keys",
        "credit_card",
        "pass_word",
        "pass_phrase",
    ]
)
_LONG_TEXT: Final = 10_000


@functools.lru_cache(4096)
def _says_secret(name: str) -> bool:
    """Whether a parameter, key or field of this name holds a secret: `api_key`, not `max_tokens`."""
    import re

    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    pairs = {f"{a}_{b}" for a, b in zip(words, words[1:], strict=False)}  # noqa: RUF007 - itertools for one pair
    return not _SECRET_WORDS.isdisjoint(words) or not _SECRET_PAIRS.isdisjoint(pairs)


class _Shown:
    """Arguments as they may be stored and shown; `secrets` collects the texts that were masked."""

    def __init__(self, redact: frozenset[str]) -> None:
        self.redact = redact
        self.secrets: list[str] = []

    def text(self, bound: dict[str, Any]) -> str:
        try:
            shown = self._mapping(bound)
        except RecursionError:  # it counts by key=, or not at all: no reason to refuse it
            shown = {name: f"<{_type_name(type(value))}>" for name, value in bound.items()}
        return _compact(self.scrub(shown))

    def _mapping(self, values: Any) -> dict[str, Any]:
        return {
            str(k): self._masked(v)
            if isinstance(k, str) and (k in self.redact or _says_secret(str(k)))
            else self.of(v)
            for k, v in values.items()
        }

    def scrub(self, shown: Any) -> Any:
        """Shown values without the secrets that they repeat: whole, or inside a text if long."""
        if not self.secrets:
            return shown
        if isinstance(shown, dict):
            return {k: self.scrub(v) for k, v in shown.items()}
        if isinstance(shown, list):
            return [self.scrub(v) for v in shown]
        if shown is None or isinstance(shown, bool):
            return shown
        if str(shown) in self.secrets:
            return _MASK
        return self.clean(shown, 8) if isinstance(shown, str) else shown

    def _masked(self, value: Any) -> str:
        """Every text and number below a secret name is a secret itself."""
        fields = _fields(value)
        if fields is not None or _is_mapping(value):
            for inner in (value if fields is None else fields).values():
                self._masked(inner)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                self._masked(inner)
        elif value is not None and not isinstance(value, bool):
            if hasattr(value, "get_secret_value"):
                value = value.get_secret_value()
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            if len(text) > 2:
                self.secrets.append(text)
        return _MASK

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            if len(value) <= _LONG_TEXT:
                return value
            return f"{value[:_LONG_TEXT]}… ({len(value)} characters)"
        if kind is bool or kind is int or value is None:
            return value if kind is not int or value.bit_length() < 10_000 else hex(value)
        if kind is float:
            return value if value - value == 0 else str(value)
        if isinstance(value, Enum):
            return self.of(value.value)
        if hasattr(value, "get_secret_value"):
            return self._masked(value)
        fields = _fields(value)
        if fields is None and isinstance(value, tuple) and hasattr(kind, "_asdict"):
            fields = cast("Any", value)._asdict()
        if fields is not None:
            return self._mapping(fields)
        if _is_mapping(value):
            return self._mapping(value)
        if isinstance(value, list | tuple | set | frozenset | deque):
            return [self.of(v) for v in value]
        return self._told(value)

    def _told(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.of(str.__str__(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{len(bytes(value))} bytes>"
        # what an unknown object says of itself may be a secret, or an address
        return f"<{_type_name(type(value))}>" if hasattr(value, "__dict__") else str(value)

    def clean(self, text: str, shortest: int = 0) -> str:
        """`text` (an error message) with every secret that it repeats masked, quoted or not."""
        for secret in sorted(set(self.secrets), key=len, reverse=True):
            if len(secret) >= shortest:
                for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
                    text = text.replace(form, _MASK)
        return text

    def leaks_into(self, result: str) -> bool:
        """Whether a result, as JSON, repeats a secret: as a whole value, or inside one if long."""
        import re

        return any(
            json.dumps(s) in result
            or (
                len(s) >= 8
                and (json.dumps(s)[1:-1] in result or s.encode("utf-8", "replace").hex() in result)
            )
            or re.search(rf"(?:^|[:,\[]){re.escape(s)}(?:[,\]}}]|$)", result)
            for s in self.secrets
        )


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


def _form_dict(value: Any) -> str:
    if all(type(key) is str for key in value):
        items = sorted((_form_str(f"${k}" if k[:1] == "$" else k), canonical(value[k])) for k in value)
        return "{" + ",".join(f"{k}:{v}" for k, v in items) + "}"
    pairs = sorted((canonical(k), canonical(value[k])) for k in value)
    return _tagged("map", "[" + ",".join(f"[{k},{v}]" for k, v in pairs) + "]")


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


def _form_timedelta(value: timedelta) -> str:
    return _tagged("timedelta", str(value // type(value).resolution))


def _form_fraction(value: Any) -> str:
    if value.denominator == 1:
        return _form_int(value.numerator)
    return _tagged("fraction", f"[{value.numerator},{value.denominator}]")


def _form_complex(value: complex) -> str:
    return _tagged("complex", f"[{_form_float(value.real)},{_form_float(value.imag)}]")


def _tagged(kind: str, form: str) -> str:
    return f'{{"${kind}":{form}}}'


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
    complex: _form_complex,
    range: _form_list,
    deque: _form_list,
}
# by name, because a value of such a type exists only where its module was imported already
_FORMS_BY_NAME: Final[dict[str, Callable[[Any], str]]] = {
    "decimal.Decimal": _form_decimal,
    "datetime.datetime": _form_datetime,
    "datetime.date": _form_time,
    "datetime.time": _form_time,
    "datetime.timedelta": _form_timedelta,
    "fractions.Fraction": _form_fraction,
    "uuid.UUID": lambda v: _tagged("uuid", _quote(v.hex)),
    "numbers.Integral": lambda v: _form_int(int(v)),
    "numbers.Real": lambda v: _form_float(float(v)),
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
    """The form of what only behaves like a mapping, a set, a path or a number."""
    from collections.abc import Set as AbstractSet
    from numbers import Integral, Real

    if hasattr(type(value), "__fspath__"):
        return _tagged("path", canonical(os.fspath(value)))
    if _is_mapping(value):
        return _form_dict(value)
    if isinstance(value, AbstractSet):
        return _form_set(value)
    if isinstance(value, Integral):
        return _form_int(int(value))
    if isinstance(value, Real):
        return _form_float(float(value))
    raise UnstableArgument(f"an object of type {_type_name(type(value))} has no stable form")


def _is_mapping(value: Any) -> bool:
    from collections.abc import Mapping

    return isinstance(value, Mapping)


def _fields(value: Any, *, compared: bool = False) -> dict[str, Any] | None:
    """The fields of a dataclass, attrs or pydantic object by name; None for anything else.

    `compared` leaves out those that its own `==` leaves out.
    """
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        parts = kind.__dataclass_fields__.values()
        return {
            f.name: getattr(value, f.name, None)
            for f in parts
            if f._field_type.name == "_FIELD" and (f.compare or not compared)
        }
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
    if spec is not None and spec.name and spec.name != "__main__":
        return str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None)
    if not path:
        return "__main__"
    stem = os.path.splitext(os.path.basename(path))[0]
    return str(os.path.basename(os.path.dirname(os.path.abspath(path))) if stem == "__main__" else stem)


def _module_name(module: str | None) -> str:
    return _main_name() if module in ("__main__", "__mp_main__", None) else str(module)


# ═══ Results: stored as JSON, given back as they were ═════════════════════════════════


class _Unstorable(Exception):
    pass


def _store_form(value: Any) -> str:
    """A result as JSON text that `_restore` turns back; raises `_Unstorable`."""
    try:
        return _compact_finite(_pack(value))
    except Exception as error:  # also what a lazy attribute raises: the tool has run, its end counts
        raise _Unstorable(f"{type(value).__name__} ({error})") from error


def _pack(value: Any) -> Any:
    """Plain JSON values as they are, anything else as {"$": kind, …}."""
    kind = type(value)
    if kind in (str, bool, type(None)):
        return value
    if kind is int:
        return value if value.bit_length() < 10_000 else {"$": "int", "v": hex(value)}
    if kind is float:
        return value if value - value == 0 else {"$": "float", "v": repr(value)}
    if kind is list:
        return [_pack(v) for v in value]
    if kind is dict:
        if "$" not in value and all(type(k) is str for k in value):
            return {k: _pack(v) for k, v in value.items()}
        return {"$": "dict", "v": [[_pack(k), _pack(v)] for k, v in value.items()]}
    packed = _pack_special(value, kind)
    if packed is not None:
        return packed
    bases: tuple[Callable[[Any], Any], ...] = (str, int, float, list, dict, tuple, set, bytes)
    for base in bases:
        if isinstance(value, cast("type", base)):  # a subclass without a form comes back as its base
            return _pack(base(value))
    raise _Unstorable(f"no stored form for {_type_name(kind)}")


def _pack_special(value: Any, kind: type) -> dict[str, Any] | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind in (tuple, set, frozenset):
        return {"$": kind.__name__, "v": [_pack(v) for v in value]}
    if kind in (bytes, bytearray):
        return {"$": kind.__name__, "v": value.hex()}
    if kind is complex:
        return {"$": "complex", "v": [value.real, value.imag]}
    if isinstance(value, Enum):
        return {"$": "enum", "t": _type_name(kind), "v": value.name, "w": _pack(value.value)}
    if name in ("decimal.Decimal", "uuid.UUID"):
        return {"$": name, "v": str(value)}
    if name in ("datetime.datetime", "datetime.date", "datetime.time"):
        zone = getattr(getattr(value, "tzinfo", None), "key", None)
        return {"$": name, "v": value.isoformat(), "z": zone, "f": getattr(value, "fold", 0)}
    if name == "datetime.timedelta":
        return {"$": name, "v": [value.days, value.seconds, value.microseconds]}
    if hasattr(kind, "__fspath__") and kind.__module__.startswith("pathlib"):
        return {"$": "path", "v": str(value)}
    if hasattr(kind, "get_secret_value"):
        raise _Unstorable("it holds a secret")
    fields = _fields(value)
    if fields is not None:
        how = "model" if hasattr(kind, "__pydantic_fields__") else "data"
        packed = {n: _pack(v) for n, v in fields.items()}
        given = sorted(getattr(value, "__pydantic_fields_set__", ()))
        return {"$": how, "t": _type_name(kind), "v": packed, "s": given}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"$": "named", "t": _type_name(kind), "v": [_pack(v) for v in value]}
    return None


def _restore(text: str, known: Sequence[type] = ()) -> Any:
    """The value that `_store_form` was given; `known` are classes that the tool's annotation names."""
    if '"$"' not in text:
        return json.loads(text)
    return json.loads(text, object_hook=functools.partial(_unpack, known))


def _unpack(known: Sequence[type], packed: dict[str, Any]) -> Any:
    kind = packed.get("$")
    if kind is None:
        return packed
    value = packed["v"]
    if kind in _UNPACK:
        return _UNPACK[kind](value)
    if kind.startswith("datetime."):
        return _unpack_time(kind, packed)
    made = _class_named(packed["t"], known)
    plain = packed["w"] if kind == "enum" else tuple(value) if kind == "named" else value
    try:
        return plain if made is None else _rebuild(kind, made, packed)
    except Exception:  # its class is not loaded here or was changed: plain values are better than nothing
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
        from zoneinfo import ZoneInfo

        value = value.replace(tzinfo=ZoneInfo(packed["z"]))
    return value.replace(fold=1) if packed["f"] else value


def _unpack_std(module: str, name: str) -> Callable[[Any], Any]:
    def make(value: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)(value)

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
        module_name = ".".join(parts[:cut])
        module = sys.modules.get("__main__" if module_name == _main_name() else module_name)
        found: Any = module
        for part in parts[cut:]:
            found = getattr(found, part, None)
        if isinstance(found, type) and module is not None:
            return found
    return None


def _plain(result_json: str) -> str:
    """A stored result as short text for people and models, without the type marks."""
    value = json.loads(result_json, object_hook=lambda d: d["v"] if "$" in d else d)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ═══ Identity of a tool ═══════════════════════════════════════════════════════════════

_GENERATORS: Final = 0x20 | 0x200  # CO_GENERATOR, CO_ASYNC_GENERATOR
_COROUTINE: Final = 0x80 | 0x100  # CO_COROUTINE, CO_ITERABLE_COROUTINE


class _Tool:
    """What is known of a function without calling it: its name, its parameters, its kind."""

    __slots__ = (
        "__weakref__",
        "by_name",
        "defaults",
        "fast",
        "function",
        "generation",
        "is_async",
        "known_types",
        "name",
        "options",
        "ordered",
        "own_name",
        "parameters",
        "policy",
        "positional",
        "receiver",
        "rest",
        "takes_key",
    )

    def __init__(self, function: Callable[..., Any], name: str, *, receiver: bool) -> None:
        self.function = function
        self.own_name = self.name = name
        self.receiver = receiver
        self.is_async = _is_async(function)
        self.options: PolicyOptions = {}
        self.generation = -1
        self.policy: Policy = Policy()
        self.known_types: tuple[type, ...] | None = None
        self._read_signature()

    def _read_signature(self) -> None:
        import inspect

        try:
            self.parameters = inspect.signature(self.function)
        except (ValueError, TypeError):  # some builtins tell nothing about themselves
            self.parameters = inspect.signature(lambda *args, **kwargs: None)
        every = self.parameters.parameters.values()
        simple = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.fast = all(p.kind in simple for p in every)
        self.positional = [p.name for p in every if p.kind is simple[0]]
        self.by_name = frozenset(p.name for p in every)
        self.defaults = {p.name: p.default for p in every if p.default is not p.empty}
        self.takes_key = "key" in self.by_name
        self.rest = next((p.name for p in every if p.kind is p.VAR_KEYWORD), None)
        if any(p.kind is p.VAR_POSITIONAL for p in list(every)[:1]):  # its object is one of *args
            self.receiver = False
        identity = [p.name for p in every][1 if self.receiver else 0 :]
        self.ordered = [(name, _quote(name)) for name in sorted(identity)]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults applied; raises the TypeError that the call would."""
        if self.fast and len(args) <= len(self.positional):
            bound = dict(zip(self.positional, args, strict=False))
            if self.by_name.issuperset(kwargs) and bound.keys().isdisjoint(kwargs):
                bound.update(kwargs)
                if len(bound) == len(self.by_name):
                    return bound
                bound = {**self.defaults, **bound}
                if len(bound) == len(self.by_name):
                    return bound
        try:
            full = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_short(self.name)}(): {error}") from None
        full.apply_defaults()
        return full.arguments

    def named(self, bound: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, those that came in `**kwargs` too."""
        return bound if self.rest is None else {**bound[self.rest], **bound}

    def form(self, bound: dict[str, Any], ignored: frozenset[str]) -> str:
        """The canonical text of all arguments but the ignored ones."""
        if ignored and self.rest is not None:
            rest = {n: v for n, v in bound[self.rest].items() if n not in ignored}
            bound = {**bound, self.rest: rest}
        try:
            if not ignored:
                return "{" + ",".join([f"{q}:{canonical(bound[n])}" for n, q in self.ordered]) + "}"
            return "{" + ",".join(
                [f"{q}:{canonical(bound[n])}" for n, q in self.ordered if n not in ignored]
            ) + "}"  # fmt: skip
        except (UnstableArgument, RecursionError):
            return "{" + ",".join(
                [f"{q}:{self._part(n, bound[n])}" for n, q in self.ordered if n not in ignored]
            ) + "}"  # fmt: skip

    def _part(self, name: str, value: Any) -> str:
        """One argument, with an error that names it."""
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
        if '"$"' not in text:
            return json.loads(text)
        if self.known_types is None:
            self.known_types = tuple(_annotated_types(self.function))
        return _restore(text, self.known_types)


def _is_async(function: Any) -> bool:
    """Whether calling it gives something to await; a plain wrapper around async counts as async."""
    seen: Any = function
    while seen is not None:
        code = getattr(seen, "__code__", None)
        if code is not None and code.co_flags & _COROUTINE:
            return True
        seen = getattr(seen, "__wrapped__", None)
    import inspect

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


def _resolve_callable(fn: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], str, bool]:
    """A callable as (function, leading arguments, keyword arguments, name, takes a receiver)."""
    if isinstance(fn, functools.partial):
        function, first, named, name, receiver = _resolve_callable(fn.func)
        return function, first + fn.args, {**named, **fn.keywords}, name, receiver
    if isinstance(fn, staticmethod):
        fn = fn.__func__
    owner = getattr(fn, "__self__", None)
    inner = getattr(fn, "__func__", None)
    if owner is not None and inner is not None:
        return inner, (owner,), {}, _function_name(inner, owner), True
    if hasattr(fn, "__code__"):
        return fn, (), {}, _function_name(fn), _first_is_receiver(fn)
    if isinstance(fn, type) or hasattr(fn, "__name__"):
        module = getattr(fn, "__module__", None) or getattr(owner, "__name__", "builtins")
        return fn, (), {}, f"{_module_name(module)}.{getattr(fn, '__qualname__', fn)}", False
    name = _type_name(type(fn))
    if "<locals>" in name:
        name += "#" + _code_digest(type(fn).__call__)
    return type(fn).__call__, (fn,), {}, name, True


def _first_is_receiver(function: Any) -> bool:
    """Whether a plain function is a method taken from its class: its first argument is the object."""
    parent = function.__qualname__.rpartition(".")[0]
    if not parent or parent.endswith("<locals>"):
        return False
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return bool(names) and names[0] in ("self", "cls")


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


def _plain_cell(cell: Any) -> str:
    try:
        value = cell.cell_contents
    except ValueError:  # still empty
        return ""
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{_module_name(value.__module__)}.{value.__qualname__}"  # what a decorator wraps
    plain = (str, int, float, bool, bytes, tuple, frozenset, type(None))
    return _constant(value) if isinstance(value, plain) else ""


def _rebound_names(code: CodeType) -> set[str]:
    """Closed-over names that the function assigns: a counter must not change who the tool is."""
    import dis

    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    for inner in code.co_consts:
        if hasattr(inner, "co_code"):
            names |= _rebound_names(inner)
    return names


def _refuse_uncallable(fn: Any, where: str) -> None:
    """Raise for what cannot run once: say what to wrap instead."""
    if isinstance(fn, classmethod) or not callable(fn):
        raise UsageError(
            f"{where}: {type(fn).__name__} object {_brief(fn)} is not callable; pass the function "
            "itself and build the framework's tool object from the guarded function"
        )
    marks = ("args_schema", "tool_spec", "inputs", "func", "fn", "params_json_schema", "input_schema")
    plain = hasattr(fn, "__code__") or isinstance(fn, type | functools.partial)
    described = all(isinstance(getattr(fn, n, None), str) for n in ("name", "description"))
    if not plain and described and any(hasattr(fn, m) for m in marks):
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
    if code.co_flags & _GENERATORS:
        kind = "an async generator" if code.co_flags & 0x200 else "a generator"
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


def _read(path: str) -> str:
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
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


_identities: dict[int, _Process] = {}


def _me() -> _Process:
    """This process, the same for all its threads; a forked child is another one."""
    pid = os.getpid()
    return _identities.get(pid) or _identities.setdefault(pid, _identify(pid))


def _identify(pid: int) -> _Process:
    import socket

    boot = _read("/proc/sys/kernel/random/boot_id")
    try:  # inside a foreign /proc everything read there is about somebody else
        ours = os.readlink("/proc/self") == str(pid)
    except OSError:
        ours = False
    fields = _stat_fields(pid) if ours else []
    known = bool(boot and ours and len(fields) > 19)
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
    if fields[0] not in "ZX":
        return False
    try:  # a zombie whose other threads still run can still do its effect
        return os.listdir(f"/proc/{owner.pid}/task") == [str(owner.pid)]
    except OSError:
        return False


# ═══ The protocol: what a transition makes of the rows of a call ══════════════════════
#
# Each operation is a pure function from the rows of one call, as they are inside the
# transaction that writes, to the rows that it changes.  Every store runs these: SQLite in
# BEGIN IMMEDIATE, memory under a lock, a six-method store by compare-and-append.


class _Now(NamedTuple):
    wall: int
    mono: int
    #: whether a RUNNING row's owner is over: its lease lapsed, or its process proved dead
    over: Callable[[Run], bool]


class _Verdict(NamedTuple):
    kind: str
    row: Run | None = None
    #: the row that a claim closed as in doubt to take over
    closed: Run | None = None
    #: first run of the intended effect: what `idempotency_key` is made from
    anchor: int = 1


class _Change:
    """What an operation does to the rows: guarded updates, at most one insert, notes for the log."""

    __slots__ = ("insert", "notes", "updates", "verdict")

    def __init__(self, verdict: _Verdict) -> None:
        self.verdict = verdict
        self.updates: list[tuple[Run, Run]] = []
        self.insert: Run | None = None
        #: (kind, run, n, detail); n counts towards the totals
        self.notes: list[tuple[str, int, int, str]] = []

    def move(self, row: Run, status: str | None = None, **values: Any) -> Run:
        """Change a row; the one door through which a status changes."""
        if status is not None and status != row.status:
            if status not in _NEXT[row.status]:
                raise LedgerError(f"run {row.run} of {row.call} cannot go from {row.status} to {status}")
            values["status"] = status
        new = row._replace(**values)
        self.updates.append((row, new))
        return new


class Op:
    """One operation on one call. `apply` never looks at anything but what it is given."""

    __slots__ = ("call", "token")

    call: str
    token: str

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        """What this operation makes of all rows of its call, oldest first."""
        raise AssertionError("every operation overrides apply")


class _Claim(Op):
    """Insert the next run if the policy allows one; else say why not."""

    __slots__ = (
        "args", "caller", "forced", "key", "lease", "matched", "max", "not_done",
        "on_doubt", "tool", "ttl", "wf",
    )  # fmt: skip

    tool: str
    wf: str
    caller: str
    key: str | None
    args: str | None
    matched: str | None
    max: int
    ttl: int | None
    lease: int
    on_doubt: Literal["rerun", "block", "reconcile"]
    forced: bool
    #: run and owner of the doubt that reconcile answered with NOT_DONE
    not_done: tuple[int, str] | None

    def horizon(self, wall: int) -> int:
        """Successes that ended before this do not count any more."""
        return -1 if self.ttl is None else wall - self.ttl

    def judge(self, rows: list[Run], now: _Now) -> _Verdict:
        """Whether a run may start, from all rows of the call, and what the caller gets if not."""
        mine = next((r for r in rows if r.owner == self.token), None)
        if mine is not None:  # the reply to my claim was lost
            return _Verdict("granted" if mine.status == "running" else "lost", mine, None, _anchor(rows[:-1]))
        latest = rows[-1] if rows else None
        if latest is not None and latest.status == "running" and not now.over(latest):
            return _Verdict("live", latest)
        if not self.forced and latest is not None:
            horizon = self.horizon(now.wall)
            counted = [r for r in rows if r.succeeded_since(horizon)]
            if len(counted) >= self.max:
                return _Verdict("done", counted[-1])
            doubtful = latest.status in ("running", "doubt") and not latest.released
            answered = self.not_done == (latest.run, latest.owner)
            if doubtful and self.on_doubt != "rerun" and not answered:
                return _Verdict("reconcile" if self.on_doubt == "reconcile" else "doubt", latest)
        return _Verdict("run", latest, None, _anchor(rows))

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        verdict = self.judge(rows, now)
        change = _Change(verdict)
        if verdict.kind == "granted" and verdict.row is not None:
            change.move(verdict.row, lease=now.wall + self.lease, mono=now.mono + self.lease)
        if verdict.kind != "run":
            return change
        latest = verdict.row
        closed = self._close(latest, change, now) if latest is not None else None
        change.insert = self.first_row(now.wall, now.mono)._replace(run=latest.run + 1 if latest else 1)
        change.verdict = _Verdict("granted", change.insert, closed, verdict.anchor)
        return change

    def _close(self, latest: Run, change: _Change, now: _Now) -> Run | None:
        """Takeover: close what is still open, and answer or pass over a doubt."""
        answered = not latest.released and self.not_done == (latest.run, latest.owner)
        released = 1 if self.forced else latest.released
        if latest.status == "running":
            status = "failed" if answered else "doubt"
            closed = change.move(latest, status, ended=now.wall, closed_by=self.token, released=released)
            return closed if status == "doubt" else None
        if latest.status == "doubt" and answered:
            change.move(latest, "failed", ended=now.wall, closed_by=self.token)
            change.notes.append(("resolved", latest.run, 0, "reconcile: not done"))
        elif latest.status == "doubt" and self.forced:
            change.move(latest, released=1)
        return None

    def first_row(self, wall: int, mono: int) -> Run:
        """The row of run 1."""
        return Run(
            self.call, 1, self.tool, self.wf, self.caller, self.token, self.key, self.args,
            self.matched, "running", None, None, None, wall, None, wall + self.lease,
            mono + self.lease, None, 0, int(self.forced), None, None, 0,
        )  # fmt: skip


def _anchor(rows: Sequence[Run]) -> int:
    """Number of the first run after the last success: runs that share it mean one effect."""
    return max((r.run for r in rows if "success" in (r.status, r.late)), default=0) + 1


class _Settle(Op):
    """The owner's word on how its run ended; late if the run was given up meanwhile."""

    __slots__ = ("error", "result", "run", "status", "trace")

    run: int
    status: str
    result: str | None
    error: str | None
    trace: str | None

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        row = next((r for r in rows if r.owner == self.token), None)
        if row is None:
            return _Change(_Verdict("gone"))
        if row.status == "running":
            change = _Change(_Verdict("settled", row))
            change.move(
                row, self.status, ended=now.wall, closed_by=self.token,
                result=self.result, error=self.error, trace=self.trace,
            )  # fmt: skip
            return change
        if row.closed_by == self.token:  # the reply to my own settle was lost
            return _Change(_Verdict("settled", row))
        return self._late(row, now)

    def _late(self, row: Run, now: _Now) -> _Change:
        change = _Change(_Verdict("late", row))
        takes = ("success", "failed") if row.status == "doubt" else ("success",)
        if row.late is None and row.status in ("doubt", "failed") and self.status in takes:
            won = self.status == "success"
            result = self.result if won and row.result is None else row.result
            change.move(row, late=self.status, late_at=now.wall, result=result, error=row.error or self.error)
            change.notes.append(("late", row.run, int(won), self.status))
        return change


class _Renew(Op):
    """The owner is alive: its lease starts anew."""

    __slots__ = ("lease", "run")

    run: int
    lease: int

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        row = next((r for r in rows if r.run == self.run and r.owner == self.token), None)
        if row is None or row.status != "running":
            return _Change(_Verdict("lost", row))
        change = _Change(_Verdict("renewed", row))
        change.move(row, lease=now.wall + self.lease, mono=now.mono + self.lease)
        return change


class _Release(Op):
    """`retry`: the next call runs, although this one succeeded or is in doubt."""

    __slots__ = ("max", "owner", "run", "ttl", "why")

    #: the run that the caller saw; a later one means that the release was used
    run: int
    owner: str
    max: int
    ttl: int | None
    why: str

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        latest = rows[-1] if rows else None
        if latest is None:
            return _Change(_Verdict("nothing"))
        if (latest.run, latest.owner) != (self.run, self.owner):
            return _Change(_Verdict("used", latest))
        if latest.status == "running" and not now.over(latest):
            return _Change(_Verdict("live", latest))
        change = _Change(_Verdict("released", latest))
        if latest.status == "running":
            change.move(latest, "doubt", ended=now.wall, closed_by=self.token, released=1)
        else:
            change.move(latest, released=1)
        self._free(rows[:-1], now, change)
        change.notes.append(("released", latest.run, 0, self.why))
        return change

    def _free(self, earlier: list[Run], now: _Now, change: _Change) -> None:
        """After a forced run that failed, the success before it still blocks: release that too."""
        horizon = -1 if self.ttl is None else now.wall - self.ttl
        counted = [r for r in earlier if r.succeeded_since(horizon)]
        for row in counted[self.max - 1 :]:
            change.move(row, released=1)


class _Resolve(Op):
    """Somebody, or a reconcile function, knows how the doubt ended."""

    __slots__ = ("done", "owner", "reconciled", "result", "run", "why")

    run: int
    owner: str
    done: bool
    result: str | None
    #: a reconcile's answer also gives way to a release
    reconciled: bool
    why: str

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        latest = rows[-1] if rows else None
        if latest is None or (latest.run, latest.owner) != (self.run, self.owner):
            return _Change(_Verdict("used" if latest else "nothing", latest))
        if latest.status == "running" and not now.over(latest):
            return _Change(_Verdict("live", latest))
        if latest.status not in ("running", "doubt") or (self.reconciled and latest.released):
            return _Change(_Verdict("settled", latest))
        change = _Change(_Verdict("resolved", latest))
        change.move(
            latest, "success" if self.done else "failed", ended=now.wall, closed_by=self.token,
            released=0, result=self.result if self.done else latest.result,
        )  # fmt: skip
        counts = self.done and latest.status == "doubt" and latest.late != "success"
        change.notes.append(("resolved", latest.run, int(counts), self.why))
        return change


class _Reset(Op):
    """Forget a call. `asked` spares a run that started after the reset was asked for."""

    __slots__ = ("asked",)

    asked: int

    def apply(self, rows: list[Run], now: _Now) -> _Change:
        if not rows:
            return _Change(_Verdict("nothing"))
        if rows[-1].status == "running" and not now.over(rows[-1]):
            return _Change(_Verdict("live", rows[-1]))
        if rows[-1].started > self.asked:
            return _Change(_Verdict("used", rows[-1]))
        return _Change(_Verdict("reset", rows[-1]))


def _make(kind: type[T], **values: Any) -> T:
    """An operation with its fields set."""
    op = kind()
    for name, value in values.items():
        setattr(op, name, value)
    return op


# ═══ Stores: the contract ═════════════════════════════════════════════════════════════

_MICROS: Final = 1_000_000
_KINDS_RAN: Final = ("ran", "raised")  # attempts of an unlimited tool


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

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._newest_seen: dict[str, tuple[int, Record]] = {}
        self._counters: dict[str, Record] = {}
        self._counter_lock = threading.Lock()
        self._keeper: _Keeper | None = None
        self._waiters: dict[str, list[Callable[[], object]]] = {}
        self._waiters_lock = threading.Lock()

    # -- the six methods --

    def get(self, id: str) -> Record | None:
        """The record of that id, or None."""
        raise AssertionError("a store needs get(id)")

    def claim(self, record: Record) -> bool:
        """Insert the record if its id is absent, atomically; False when it is there already."""
        raise AssertionError("a store needs claim(record)")

    def put(self, record: Record) -> None:
        """Write the record, whatever is there."""
        raise AssertionError("a store needs put(record)")

    def delete(self, id: str) -> None:
        """Remove the record of that id."""
        raise AssertionError("a store needs delete(id)")

    def all(self, wf: str | None = None) -> Iterable[Record]:
        """Every record, or those of one workflow."""
        raise AssertionError("a store needs all(wf=None)")

    def clear(self, wf: str | None = None) -> None:
        """Remove every record, or those of one workflow."""
        raise AssertionError("a store needs clear(wf=None)")

    # -- what is built on them --

    def transact(self, op: Op) -> _Verdict:
        """Apply one operation atomically; repeating it after an error is safe."""
        for _ in range(1000):
            position, newest = self._newest(op.call)
            rows = _rows_from(newest)
            change = op.apply(rows, self._now())
            reset = isinstance(op, _Reset) and change.verdict.kind == "reset"
            if not (change.updates or change.insert or reset):
                return change.verdict
            version = self._version(op, position + 1, [] if reset else _applied(rows, change), newest)
            if self.claim(version) or self._is_mine(version):
                self._newest_seen[op.call] = (position + 1, version)
                return change.verdict
        raise StoreError(f"call {op.call}: a thousand other writers came first; is claim() atomic?")

    def _now(self) -> _Now:
        wall = self.clock.wall()
        return _Now(wall, self.clock.mono(), lambda run: run.lease <= wall)

    def now_for(self, rows: Sequence[Run]) -> _Now:
        """The clocks, and whether a RUNNING row's owner is over, for a decision on rows just read."""
        return self._now()

    def _is_mine(self, version: Record) -> bool:
        found = self.get(version.id)
        return found is not None and found.holder == version.holder

    def _newest(self, call: str) -> tuple[int, Record | None]:
        """Position and record of the newest version: gallop from the last one seen, then bisect."""
        low, found = self._newest_seen.get(call, (0, None))
        step = 1
        high = 0
        while True:
            record = self.get(_version_id(call, low + step))
            if record is None:
                high = low + step
                break
            low, found, step = low + step, record, step * 2
        while high - low > 1:
            middle = (low + high) // 2
            record = self.get(_version_id(call, middle))
            low, high, found = (middle, high, record) if record else (low, middle, found)
        if found is not None:
            if len(self._newest_seen) > 10_000:
                self._newest_seen.clear()
            self._newest_seen[call] = (low, found)
        return low, found

    def _version(self, op: Op, position: int, rows: list[Run], newest: Record | None) -> Record:
        """The next version. Its `holder` is the token of this append, its `blocked` what a reset forgave."""
        forgiven = newest.blocked if newest else 0
        if not rows:
            forgiven = sum(c.blocked for c in self._counter_records(op.call))
        shown = rows or _rows_from(newest)
        record = _record(shown, 0, in_doubt=False)
        return record._replace(
            id=_version_id(op.call, position),
            blocked=forgiven,
            holder=f"{op.token}:{os.urandom(6).hex()}",
            state=json.dumps([list(r) for r in _worth_keeping(rows)]),
        )

    def _counter_records(self, call: str) -> list[Record]:
        return [r for r in self.all() if r.call == call and r.id.count("~") == 2]

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return _rows_from(self._newest(call)[1])

    def quick(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """Status, released, result and number of each run: all that most duplicates need."""
        return [(r.status, r.released, r.result, r.run) for r in self.rows(call)]

    def count(self, call: str, run: int, kind: str, ask: _Ask, error: str | None = None) -> None:
        """Count an attempt that ran nothing ("blocked"), or one of an unlimited tool."""
        with self._counter_lock:
            me = _me()
            counter = self._counters.get(call)
            if counter is None or not counter.id.endswith(me.id):
                now = self.clock.wall()
                row = ask.claim.first_row(now, 0)
                status = Status.SUCCESS
                counter = _record([row], 0, in_doubt=False)._replace(
                    id=f"{call}~n~{me.id}", status=status, attempts=0, runs=0, blocked=0, run=run
                )
            blocked = int(kind not in _KINDS_RAN)
            counter = counter._replace(
                attempts=counter.attempts + 1,
                runs=counter.runs + int(kind == "ran"),
                blocked=counter.blocked + blocked,
                error=error or counter.error,
                touched=self.clock.wall(),
            )
            self._counters[call] = counter
            self.put(counter)

    def reset(self, wf: str | None, asked: int) -> None:
        """Forget every call of a workflow (None: of all); raises `InProgress` while one runs."""
        calls = sorted({r.call for r in self.all(wf)})
        for call in calls:
            rows = self.rows(call)
            if rows and rows[-1].status == "running" and not self._now().over(rows[-1]):
                raise _busy_reset(self.describe(rows))
        for call in calls:
            op = _make(_Reset, call=call, token=new_token(), asked=asked)
            if self.transact(op).kind == "live":
                raise _busy_reset(self.describe(self.rows(call)))

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first."""
        counters: dict[str, list[Record]] = {}
        found: dict[str, Record] = {}
        for record in self.all(wf):
            if record.id.count("~") == 2:
                counters.setdefault(record.call, []).append(record)
            else:
                found.setdefault(record.call, record)
        for call in sorted({*found, *counters}, key=lambda c: (found.get(c) or counters[c][0]).created):
            if call in found:
                newest = self._newest(call)[1]
                rows = _rows_from(newest)
                if rows and _is_named(rows[-1].tool, tool):
                    forgiven = newest.blocked if newest else 0
                    blocked = sum(c.blocked for c in counters.get(call, [])) - forgiven
                    yield self.describe(rows, blocked), rows
            elif _is_named(counters[call][0].tool, tool):
                yield _tally_record(counters[call]), []

    def totals(self) -> dict[str, dict[str, int]]:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        found: dict[str, dict[str, int]] = {}
        for record, rows in self.calls():
            _add_to(found.setdefault(record.tool, dict.fromkeys(_TOTALS, 0)), record, bool(rows))
        return found

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number; a six-method store keeps no such log."""
        return iter(())

    def describe(self, rows: Sequence[Run], blocked: int | None = None) -> Record:
        """The record of a call from its runs."""
        doubt = rows[-1].status == "running" and self._now().over(rows[-1])
        if blocked is None:
            blocked = sum(r.blocked for r in rows)
        return _record(rows, blocked, in_doubt=doubt)._replace(holder=self.holder(rows[-1]))

    def look(self, id: str) -> Record | None:
        """The record of a call, with all that is counted; None if it was never made."""
        rows = self.rows(id)
        counters = self._counter_records(id)
        if not rows:
            return _tally_record(counters) if counters else None
        newest = self._newest(id)[1]
        forgiven = newest.blocked if newest else 0
        return self.describe(rows, sum(c.blocked for c in counters) - forgiven)

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

    def flush(self) -> None:
        """Write what was only counted so far."""

    def check(self) -> dict[str, Any]:
        """Prove that the store can be read and written; raises `StoreError`."""
        probe = self.get("check")
        return {"store": type(self).__name__, "ok": probe is None or probe.id == "check"}

    def make_room(self) -> None:
        """Give up what can be given up, because the store is full."""

    def close(self) -> None:
        """Finish what is pending; the store opens again when it is used again."""
        if self._keeper is not None:
            self._keeper.finish()

    # -- waiting for a live run --

    def subscribe(self, call: str, wake: Callable[[], object]) -> None:
        """Call `wake` once when a run of that call ends in this process."""
        with self._waiters_lock:
            self._waiters.setdefault(call, []).append(wake)

    def unsubscribe(self, call: str, wake: Callable[[], object]) -> None:
        """Forget a `subscribe`."""
        with self._waiters_lock:
            waiting = self._waiters.get(call, [])
            if wake in waiting:
                waiting.remove(wake)
            if not waiting:
                self._waiters.pop(call, None)

    def announce(self, call: str) -> None:
        """A run of that call ended."""
        if self._waiters:
            with self._waiters_lock:
                waiting = self._waiters.pop(call, [])
            for wake in waiting:
                wake()

    # -- async callers --

    async def transact_async(self, op: Op) -> _Verdict:
        """`transact` without blocking the event loop; a claim granted to a cancelled caller is given back."""
        import asyncio

        gone: list[bool] = []
        given: list[_Verdict] = []

        def give_back() -> None:
            if gone and given and isinstance(op, _Claim) and given[0].row and given[0].kind == "granted":
                self.keeper.keep(_not_entered(given[0].row))

        def work() -> _Verdict:
            given.append(self.transact(op))
            give_back()
            return given[0]

        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, work))
        except (asyncio.CancelledError, GeneratorExit):
            gone.append(True)  # whichever side comes second sees both, and settling twice is settling once
            give_back()
            raise

    async def rows_async(self, call: str) -> list[Run]:
        """`rows` without blocking the event loop."""
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(None, self.rows, call)

    #: whether `quick` never waits for anything, so that an event loop may call it
    quick_is_prompt: bool = False

    def __getstate__(self) -> NoReturn:
        raise UsageError(
            f"a {type(self).__name__} object lives in one process and cannot be pickled; name the "
            "store by path or URL instead: Guard('ledger.db') carries that to a worker"
        )


_TOTALS: Final = (
    "actions", "attempts", "executed", "blocked", "failed", "in_doubt", "suspended", "running",
)  # fmt: skip


def new_token() -> str:
    """An owner token: random for each claim, and telling which process made it."""
    return f"{_me().id}.{os.urandom(6).hex()}"


def _version_id(call: str, position: int) -> str:
    return call if position == 1 else f"{call}~{position}"


def _rows_from(version: Record | None) -> list[Run]:
    return [] if version is None else [Run(*row) for row in json.loads(version.state)]


def _applied(rows: list[Run], change: _Change) -> list[Run]:
    new = {old.run: row for old, row in change.updates}
    rows = [new.get(r.run, r) for r in rows]
    return [*rows, change.insert] if change.insert is not None else rows


def _worth_keeping(rows: list[Run]) -> list[Run]:
    """What the next decision may need, whole; of older runs that decide nothing, a hundred, bare."""
    kept = [r for r in rows[:-1] if "success" in (r.status, r.late) or r.status == "doubt"]
    bare = {r.run: r._replace(args=None, trace=None) for r in [*rows[-100:-1], *kept[-1000:]]}
    return [*(bare[n] for n in sorted(bare)), *rows[-1:]]


def _record(rows: Sequence[Run], blocked: int, *, in_doubt: bool) -> Record:
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
        in_doubt=in_doubt or (last.status == "doubt" and last.late != "success"),
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


def _add_to(sums: dict[str, int], record: Record, guarded: bool) -> None:
    sums["actions"] += 1
    sums["attempts"] += record.attempts
    sums["executed"] += record.runs
    sums["blocked"] += record.blocked
    if not guarded:
        return
    if record.in_doubt:
        sums["in_doubt"] += int(not record.released)
    elif record.status.value in sums:
        sums[record.status.value] += 1


def _is_named(tool: str, wanted: str | None) -> bool:
    return wanted is None or tool == wanted or _short(tool) == wanted


def _busy_reset(record: Record) -> InProgress:
    return InProgress(
        f"nothing was reset: {record.short} (call {record.call}) is running in {record.holder} since "
        f"{_clock_text(record.started)}; wait for it, or stop that process",
        record,
    )


class MemoryStore(Store):
    """A store without a file, for tests: as long as the process, and for it alone."""

    quick_is_prompt = True

    def __init__(self, *, clock: Clock | None = None) -> None:
        super().__init__(clock=clock)
        self._lock = threading.Lock()
        self._calls: dict[str, list[Run]] = {}
        self._tallies: dict[str, Record] = {}
        self._log: list[dict[str, Any]] = []

    def _now(self) -> _Now:
        mono = self.clock.mono()
        return _Now(self.clock.wall(), mono, lambda run: run.mono <= mono)

    def transact(self, op: Op) -> _Verdict:
        """Apply one operation under the lock."""
        with self._lock:
            rows = self._calls.get(op.call, [])
            change = op.apply(rows, self._now())
            if isinstance(op, _Reset) and change.verdict.kind == "reset":
                del self._calls[op.call]
                self._note(rows[-1], "reset", 0, "")
            elif change.updates or change.insert:
                self._calls[op.call] = _applied(rows, change)
                self._note_change(rows, change)
        if isinstance(op, _Settle | _Resolve | _Reset | _Release):
            self.announce(op.call)
        return change.verdict

    def _note_change(self, rows: list[Run], change: _Change) -> None:
        for old, new in change.updates:
            if old.status == "running" != new.status:
                self._note(new, new.status, 1, new.error or "")
        if change.insert:
            self._note(change.insert, "claimed", 1, "")
        for kind, run, n, detail in change.notes:
            self._note(rows[run - rows[0].run], kind, n, detail)

    def _note(self, row: Run, kind: str, n: int, detail: str) -> None:
        event = _event(
            (
                len(self._log) + 1,
                row.call,
                row.run,
                kind,
                self.clock.wall(),
                row.tool,
                row.wf,
                row.caller,
                n,
                detail,
            )
        )
        self._log.append(event)

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return list(self._calls.get(call, ()))

    def count(self, call: str, run: int, kind: str, ask: _Ask, error: str | None = None) -> None:
        """Count an attempt that ran nothing, or one of an unlimited tool."""
        with self._lock:
            now = self.clock.wall()
            if kind in _KINDS_RAN:
                old = self._tallies.get(call)
                fresh = _record([ask.claim.first_row(now, 0)], 0, in_doubt=False)._replace(attempts=0)
                self._tallies[call] = _counted(old or fresh, kind, now, error)
            rows = self._calls.get(call, [])
            for index, row in enumerate(rows):
                if row.run == run:
                    rows[index] = row._replace(blocked=row.blocked + 1)
            self._note(ask.claim.first_row(now, 0)._replace(run=run), kind, 1, error or "")

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first."""
        for rows in list(self._calls.values()):
            if wf in (None, rows[-1].wf) and _is_named(rows[-1].tool, tool):
                yield self.describe(rows), list(rows)
        for record in list(self._tallies.values()):
            if wf in (None, record.wf) and _is_named(record.tool, tool):
                yield record, []

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number."""
        return iter(self._log[after:])

    def get(self, id: str) -> Record | None:
        """The record of a call."""
        rows = self.rows(id)
        return self.describe(rows) if rows else self._tallies.get(id)

    look = get

    def claim(self, record: Record) -> bool:
        """Insert a call as it is described, if it is absent."""
        with self._lock:
            return self._calls.setdefault(record.call, rows := [_row_of(record)]) is rows

    def put(self, record: Record) -> None:
        """Write a call as it is described, whatever is there."""
        with self._lock:
            self._calls[record.call] = [_row_of(record)]

    def delete(self, id: str) -> None:
        """Remove a call."""
        with self._lock:
            self._calls.pop(id, None)
            self._tallies.pop(id, None)

    def all(self, wf: str | None = None) -> Iterable[Record]:
        """The record of every call, or of those of one workflow."""
        return [record for record, _ in self.calls(wf=wf)]

    def clear(self, wf: str | None = None) -> None:
        """Remove every call, or those of one workflow, also running ones."""
        for record in self.all(wf):
            self.delete(record.call)

    def reset(self, wf: str | None, asked: int) -> None:
        """Forget every call of a workflow (None: of all); raises `InProgress` while one runs."""
        super().reset(wf, asked)
        with self._lock:
            self._tallies = {c: t for c, t in self._tallies.items() if wf not in (None, t.wf)}


_Mem = MemoryStore


def _counted(record: Record, kind: str, now: int, error: str | None) -> Record:
    return record._replace(
        attempts=record.attempts + 1,
        runs=record.runs + int(kind == "ran"),
        error=error,
        status=Status.SUCCESS if kind == "ran" else Status.FAILED,
        touched=now,
    )


def _row_of(record: Record) -> Run:
    """A record as a single run, for stores that are filled from outside."""
    status = record.status.value
    closed = None if status == "running" else record.owner
    return Run(
        record.call, record.run, record.tool, record.wf, record.caller, record.owner, record.key,
        record.args_json, None, status, record.result_json, record.error, None, record.started,
        record.ended, record.lease, 0, closed, int(record.released), 0, record.late,
        record.ended if record.late else None, record.blocked,
    )  # fmt: skip


def _event(row: Sequence[Any]) -> dict[str, Any]:
    names = ("seq", "call", "run", "kind", "at", "tool", "wf", "caller", "n", "detail")
    return {**dict(zip(names, row, strict=True)), "at": _iso(row[4])}


# ═══ The keeper: one background thread per store ══════════════════════════════════════


def _release_once(bell: threading.Lock) -> None:
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
        self._lock = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._live: dict[str, tuple[weakref.ref[_Ask], float]] = {}
        self._pending: list[tuple[Op, _Ask | None, bool]] = []
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None
        self.counting = False

    def watch(self, ask: _Ask) -> None:
        """Renew the lease of this run until `forget`, or until nobody holds the run any more."""
        due = time.monotonic() + ask.claim.lease / _MICROS / 3
        self._live[ask.claim.token] = (weakref.ref(ask), due)
        if due < self._wakes_at or not self._alive():
            self._ring()

    def forget(self, token: str) -> None:
        """The run is over."""
        self._live.pop(token, None)

    def keep(self, op: Op, ask: _Ask | None = None, *, once: bool = False) -> None:
        """Write this outcome as soon as the store takes it (or try `once`); hold the lease meanwhile."""
        with self._lock:
            self._pending.append((op, ask, once))
        self._ring()

    def counted(self) -> None:
        """Something waits for `Store.flush`."""
        self.counting = True
        if self._wakes_at > time.monotonic() + self.COUNT_SECONDS or not self._alive():
            self._ring()

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _ring(self) -> None:
        with self._lock:
            if not self._alive():
                self._wakes_at = 0.0
                self._thread = threading.Thread(target=self._work, name="ledger-keeper", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter is going down: finish() does what is left
                    self._thread = None
                _at_exit(self)
        _release_once(self._bell)

    def _work(self) -> None:
        while self._thread is threading.current_thread():
            pause = self._pause()
            self._wakes_at = time.monotonic() + pause
            self._bell.acquire(timeout=pause)
            if self.pid != os.getpid():
                return
            self._tick()

    def _pause(self) -> float:
        if self._pending:
            return 0.1
        if self.counting:
            return self.COUNT_SECONDS
        due = min((d for _, d in list(self._live.values())), default=None)
        return 60.0 if due is None else min(60.0, max(0.001, due - time.monotonic()))

    def _tick(self) -> None:
        for work in (self._renew, self._retry, self._flush):
            try:
                work()
            except LedgerError as error:
                if isinstance(error, StoreError) and work != self._retry:
                    time.sleep(0.05)
                _log_debug("the keeper will try again: %s", error)

    def _flush(self) -> None:
        if self.counting:
            self.counting = False
            try:
                self.store.flush()
            except LedgerError:
                self.counting = True
                raise

    def _renew(self) -> None:
        now = time.monotonic()
        for token, (ref, due) in list(self._live.items()):
            ask = ref()
            if ask is None:  # its frame is gone without a settle: let the lease lapse
                self._live.pop(token, None)
            elif due <= now:
                self._live[token] = (ref, now + ask.claim.lease / _MICROS / 3)
                op = _make(_Renew, call=ask.claim.call, token=token, run=ask.run, lease=ask.claim.lease)
                if self.store.transact(op).kind == "lost" and token in self._live:
                    self.forget(token)
                    ask.lost()

    def _retry(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for index, (op, _, once) in enumerate(pending):
            try:
                self.store.transact(op)
            except LedgerError:
                with self._lock:
                    self._pending = pending[index + int(once) :] + self._pending
                raise
            self.forget(op.token)

    def finish(self) -> None:
        """Write everything that waits, within a time limit; go on watching only what still runs."""
        if self.pid != os.getpid():
            return
        limit = time.monotonic() + self.FINISH_SECONDS
        while True:
            try:
                self._retry()
                self.store.flush()
            except LedgerError as error:
                if time.monotonic() < limit:
                    time.sleep(0.05)
                    continue
                left = len(self._pending)
                _warn(f"{left} outcome(s) or counts could not be written before the end: {error}")
            break
        if not self._live:
            with self._lock:
                self._thread = None
            _release_once(self._bell)


_keepers: weakref.WeakSet[_Keeper] = weakref.WeakSet()
_exit_pid = 0


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
    for keeper in list(_keepers):
        keeper.finish()


# ═══ The SQLite store ═════════════════════════════════════════════════════════════════

_APPLICATION_ID: Final = 0x4C656467  # "Ledg"
_SCHEMA_VERSION: Final = 1
_COLUMNS: Final = ", ".join(Run._fields)

# `id` keeps rows in the order of their claims, so that a list is a walk along the table.  Events
# are written by triggers: no transition can do without.
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
  status TEXT NOT NULL CHECK (status IN ('running', 'success', 'failed', 'suspended', 'doubt')),
  result TEXT,
  error TEXT,
  trace TEXT,
  started INTEGER NOT NULL,
  ended INTEGER,
  lease INTEGER NOT NULL,
  mono INTEGER NOT NULL,
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
CREATE INDEX open_ends ON runs (status) WHERE status IN ('failed', 'suspended', 'doubt');
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
CREATE TRIGGER run_claimed AFTER INSERT ON runs BEGIN
  INSERT INTO events (call, run, kind, at, tool, wf, caller)
  VALUES (NEW.call, NEW.run, 'claimed', NEW.started, NEW.tool, NEW.wf, NEW.caller);
END;
CREATE TRIGGER run_ended AFTER UPDATE OF status ON runs
WHEN OLD.status = 'running' AND NEW.status <> 'running' BEGIN
  INSERT INTO events (call, run, kind, at, tool, wf, caller, detail)
  VALUES (NEW.call, NEW.run, NEW.status, NEW.ended, NEW.tool, NEW.wf, NEW.caller, NEW.error);
END;
CREATE TRIGGER events_stay AFTER UPDATE ON events BEGIN
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
 WHERE seq > :rolled AND seq <= :upto AND tool IS NOT NULL AND run > 0
 GROUP BY tool
"""

_NETWORK_FS: Final = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "virtiofs",
        "ceph",
        "gfs2",
        "ocfs2",
        "lustre",
        "afs",
        "glusterfs",
        "beegfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.rclone",
        "fuse.gcsfuse",
        "fuse.juicefs",
    ]
)
_BALLAST_BYTES: Final = 262_144
_MEANING: Final = {
    sqlite3.SQLITE_BUSY: "it was locked by another process for too long; see which one holds it",
    sqlite3.SQLITE_LOCKED: "it was locked by another process for too long; see which one holds it",
    sqlite3.SQLITE_READONLY: "it is read-only; make the file and its folder writable",
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a backup, do not delete it",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database; name another path",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; see that its folder exists and is writable",
    sqlite3.SQLITE_IOERR: "the disk reports an error; see that it has room and works",
    sqlite3.SQLITE_PERM: "access was denied; see the file's permissions",
}


class _Item:
    """One operation that waits for a transaction."""

    __slots__ = ("answer", "bell", "deliver", "done", "durable", "error", "leads", "op", "repeats", "until")

    def __init__(
        self,
        op: Op | Callable[[sqlite3.Connection], Any],
        durable: bool,
        until: float,
        deliver: Callable[[_Item], None] | None = None,
    ) -> None:
        self.op = op
        self.durable = durable
        self.until = until
        self.deliver = deliver
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done = self.leads = False
        self.repeats = 0
        self.bell: threading.Lock | None = None


class SqliteStore(Store):
    """One file, WAL, one write connection per process; claims and outcomes are fsynced.

    Survives: a killed process at every point; with `sync="full"` a power cut too (`"claim"`: a
    power cut can lose an outcome, which then reads as in doubt; `"off"`: it can lose the last
    calls altogether).  Not for network file systems.
    """

    quick_is_prompt = True

    #: whether a new file is made without a notice
    quiet = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync: Literal["full", "claim", "off"] = "full",
        instant_death: bool = True,
        lock_seconds: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(clock=clock)
        self.given = os.fspath(path)
        self.path = os.path.abspath(self.given)
        self.sync = sync
        self.instant_death = instant_death
        self.lock_seconds = lock_seconds
        self._start_afresh()
        _track_forks(self)

    def _start_afresh(self) -> None:
        """What a process starts with, and a forked child starts anew: nothing is inherited."""
        self._pid = os.getpid()
        self._gate = threading.RLock()  # held while the write connection is used
        self._mutex = threading.Lock()  # held for moments: the queue and who leads it
        self._db: sqlite3.Connection | None = None
        self._readers: list[sqlite3.Connection] = []
        self._reading = 0  # open read connections, idle or in use
        self._forking = False
        self._fork_waits = False  # a fork wants the gate, which a busy writer would never leave to it
        self._queue: deque[_Item] = deque()
        self._led = False
        self._writer_bell: threading.Lock | None = None
        self._identity: tuple[int, int] | None = None
        self._registered = ""
        self._synchronous = ""
        self._counts: deque[tuple[Any, ...]] = deque()
        self._flushing = threading.Lock()
        self._owners: dict[str, _Process | None] = {}
        self._broken: str = ""
        self._keeper = None
        self._waiters = {}
        self._waiters_lock = threading.Lock()
        self._local_disk = False

    # -- opening --

    def _connection(self) -> sqlite3.Connection:
        """The write connection, opened and checked. Only with the gate held."""
        if self._pid != os.getpid() or self._broken:
            raise StoreError(
                f"{self.path}: this process was forked behind Python's back"
                f"{' while a transaction was open' if self._broken else ''}, so its database "
                "connection cannot be trusted; nothing ran. Use os.fork or multiprocessing, or "
                "start a new process"
            )
        if self._db is None:
            self._db = self._open()
        self._refuse_replaced()
        return self._db

    def _open(self) -> sqlite3.Connection:
        self._refuse_network()
        self._create_file()
        db = None
        try:
            db = self._connect("rwc")
            self._prepare(db)
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            raise self._translated(error) from error
        except BaseException:
            if db is not None:
                db.close()
            raise
        found = os.stat(self.path)
        self._identity = (found.st_dev, found.st_ino)
        _track_forks(self)
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        from urllib.parse import quote

        return sqlite3.connect(
            f"file:{quote(self.path)}?mode={mode}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )

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
        """Schema and journal mode, safely when many processes start at once."""
        limit = time.monotonic() + self.lock_seconds
        while True:
            try:
                if not self._is_ready(db):
                    self._create_schema(db)
                if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                    raise StoreError(f"{self.path}: SQLite cannot use a write-ahead log here; nothing ran")
                db.execute("PRAGMA temp_store = MEMORY")
                break
            except sqlite3.Error as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if not _is_busy(error) or time.monotonic() > limit:
                    raise
                time.sleep(0.002)
        self._lay_ballast()

    def _is_ready(self, db: sqlite3.Connection) -> bool:
        """Whether it is a ledger of ours (False: an empty database); raises for anything else."""
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application == _APPLICATION_ID:
            if version > _SCHEMA_VERSION:
                raise StoreError(
                    f"{self.path} was written by a newer Ledger (schema {version}, this one knows "
                    f"{_SCHEMA_VERSION}); nothing ran. Upgrade ledger-guard here"
                )
            return bool(version)
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

    def _refuse_replaced(self) -> None:
        """A ledger that was deleted or replaced under us is an error, never a reason to start afresh."""
        try:
            found = os.stat(self.path)
        except OSError:
            self._lost_file("was deleted")
        if (found.st_dev, found.st_ino) != self._identity:
            self._lost_file("was replaced by another file")

    def _lost_file(self, what: str) -> NoReturn:
        raise StoreError(
            f"{self.path} {what} while it was in use; nothing ran, because nobody knows what the lost "
            "file had recorded. Put the file back, or restart the process to begin with what is there"
        )

    def _lay_ballast(self) -> None:
        """Room that can be given up on a full disk, so that an outcome can still be written."""
        try:
            handle = os.open(self.path + "-ballast", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except OSError:
            return
        with open(handle, "wb") as file:
            try:
                file.write(bytes(_BALLAST_BYTES))
            except OSError:
                pass

    def make_room(self) -> None:
        """Let the write-ahead log be used again from its start, and give up the ballast."""
        with self._gate:
            try:
                os.unlink(self.path + "-ballast")
            except OSError:
                pass
            if self._db is not None:
                try:
                    self._db.execute("PRAGMA wal_checkpoint(RESTART)")
                except sqlite3.Error:
                    pass

    def _translated(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", None)
        meaning = _MEANING.get((code or 0) & 0xFF, "see the cause")
        translated = StoreError(f"{self.path}: the ledger could not be used ({error}): {meaning}")
        translated.full = (code or 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        return translated

    # -- group commit: whoever holds the connection commits all that is waiting --

    def transact(self, op: Op) -> _Verdict:
        """Apply one operation in a transaction that may carry others; returns after its commit."""
        return cast("_Verdict", self._submit(op, self._is_durable(op)))

    def _is_durable(self, op: Op) -> bool:
        if self.sync == "full":
            return not isinstance(op, _Renew)
        return self.sync == "claim" and isinstance(op, _Claim)

    def _submit(self, op: Op | Callable[[sqlite3.Connection], Any], durable: bool) -> Any:
        item = _Item(op, durable, time.monotonic() + self.lock_seconds)
        with self._mutex:
            self._queue.append(item)
            leads = not self._led
            if leads:
                self._led = True
            else:
                item.bell = threading.Lock()
                item.bell.acquire()
        try:
            if not leads:
                cast("threading.Lock", item.bell).acquire()
                leads = item.leads
            if leads:
                self._lead(item)
        except BaseException:
            self._withdraw(item)
            raise
        if item.error is not None:
            raise item.error
        return item.answer

    def _withdraw(self, item: _Item) -> bool:
        """The caller was interrupted: forget what is not taken yet, pass on a lead just received."""
        with self._mutex:
            try:
                self._queue.remove(item)
                gone = True
            except ValueError:
                gone = False
            leads, item.leads = item.leads, False
        if leads:
            self._hand_over()
        return gone

    def _lead(self, own: _Item | None) -> None:
        """Commit what waits until `own` is answered (None: until nothing waits), then hand over."""
        if own is not None:
            own.leads = False
        try:
            while self._queue if own is None else not own.done:
                self._commit_waiting()
        finally:
            self._hand_over()

    def _hand_over(self) -> None:
        with self._mutex:
            heir = self._queue[0] if self._queue else None
            self._led = heir is not None
            if heir is not None and heir.bell is not None:
                heir.leads = True
                heir.bell.release()
            elif heir is not None:
                self._wake_writer()

    def _commit_waiting(self) -> None:
        """One transaction with all that waits; other processes' locks are waited for outside the gate."""
        pause = 0.0001
        while True:
            while self._fork_waits:
                time.sleep(0.0005)
            with self._gate:
                try:
                    db = self._connection()
                    if self._begin(db):
                        self._run_batch(db)
                        return
                except (StoreError, OSError) as error:
                    self._fail_waiting(error)
                    return
            self._fail_waiting(None)
            if not self._queue:
                return
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)

    def _begin(self, db: sqlite3.Connection) -> bool:
        """Open a write transaction as durable as what waits asks for; False when another holds it."""
        wanted = "FULL" if any(item.durable for item in list(self._queue)) else "NORMAL"
        try:
            if wanted != self._synchronous:
                db.execute(f"PRAGMA synchronous = {wanted}")
                self._synchronous = wanted
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if _is_busy(error):
                return False
            raise self._translated(error) from error
        return True

    def _fail_waiting(self, error: Exception | None) -> None:
        """Answer everything that waits with the error; with None, only what waited too long."""
        now = time.monotonic()
        with self._mutex:
            failed = [i for i in self._queue if error is not None or i.until < now]
            for item in failed:
                self._queue.remove(item)
        for item in failed:
            item.error = error or StoreError(
                f"{self.path}: another process held the write lock for {self.lock_seconds:g} s; nothing "
                "was written. See which process holds it, or allow more with Guard(lock_seconds=…)"
            )
        self._answer(failed)

    def _run_batch(self, db: sqlite3.Connection) -> None:
        batch = self._take()
        try:
            self._register(db)
            for index, item in enumerate(batch):
                if not self._attempt(db, item):
                    self._redo(batch[:index] + batch[index + 1 :])
                    self._answer([item])
                    return
            db.execute("COMMIT")
        except sqlite3.Error as error:
            _roll_back(db)
            self._after_failed_commit(batch, error)
            return
        except BaseException:
            _roll_back(db)
            self._redo(batch)
            raise
        self._registered = _me().id
        self._answer(batch)

    def _take(self) -> list[_Item]:
        """What this transaction carries: nothing that asks for more durability than it has."""
        with self._mutex:
            taken = [i for i in self._queue if self._synchronous == "FULL" or not i.durable]
            if len(taken) == len(self._queue):
                self._queue.clear()
            else:
                for item in taken:
                    self._queue.remove(item)
        return taken

    def _attempt(self, db: sqlite3.Connection, item: _Item) -> bool:
        """Run one item; False if SQLite rolled the whole group back, so that the neighbours are redone."""
        try:
            item.answer = self._run_item(db, item)
            item.error = None
        except sqlite3.Error as error:
            item.error = self._translated(error)
            return db.in_transaction
        except (LedgerError, UnicodeError, OverflowError, ValueError) as error:
            item.error = error
        return True

    def _redo(self, items: list[_Item]) -> None:
        """Put items back; they look for their own token first, because the commit may have happened."""
        with self._mutex:
            for item in reversed(items):
                item.repeats += 1
                item.answer = item.error = None
                self._queue.appendleft(item)

    def _after_failed_commit(self, batch: list[_Item], error: sqlite3.Error) -> None:
        again = [i for i in batch if i.repeats < (100 if _is_busy(error) else 1)]
        failed = [i for i in batch if i not in again]
        for item in failed:
            item.error = self._translated(error)
        self._redo(again)
        self._answer(failed)

    def _answer(self, items: list[_Item]) -> None:
        for item in items:
            item.done = True
            if isinstance(item.op, _Settle | _Resolve | _Release) and item.error is None:
                self.announce(item.op.call)
            if item.bell is not None:
                item.bell.release()
            elif item.deliver is not None:
                item.deliver(item)

    def _run_item(self, db: sqlite3.Connection, item: _Item) -> Any:
        op = item.op
        if not item.repeats:  # one statement does it, nearly always
            hot = _HOT.get(type(op))
            answer = hot(self, db, op) if hot is not None else None
            if answer is not None:
                return answer
        db.execute("SAVEPOINT item")
        try:
            answer = self._apply(db, op) if isinstance(op, Op) else op(db)
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK TO item")
                db.execute("RELEASE item")
            raise
        db.execute("RELEASE item")
        return answer

    def _register(self, db: sqlite3.Connection) -> None:
        me = _me()
        if self._registered != me.id:
            db.execute("INSERT OR IGNORE INTO processes VALUES (?, ?, ?, ?, ?, ?)", tuple(me))

    # -- the statements --

    def _claim_first(self, db: sqlite3.Connection, op: Any) -> _Verdict | None:
        """A call that nobody made yet: CLAIM 3 alone, with no row before it."""
        row = op.first_row(self.clock.wall(), self.clock.mono())
        inserted = db.execute(_INSERT_FIRST, row).rowcount
        return _Verdict("granted", row) if inserted == 1 else None

    def _settle_own(self, db: sqlite3.Connection, op: Any) -> _Verdict | None:
        changed = db.execute(
            "UPDATE runs SET status = ?, ended = ?, closed_by = owner, result = ?, error = ?, trace = ?"
            " WHERE call = ? AND run = ? AND owner = ? AND status = 'running'",
            (op.status, self.clock.wall(), op.result, op.error, op.trace, op.call, op.run, op.token),
        ).rowcount
        return _Verdict("settled") if changed == 1 else None

    def _renew_own(self, db: sqlite3.Connection, op: Any) -> _Verdict | None:
        changed = db.execute(
            "UPDATE runs SET lease = ?, mono = ?"
            " WHERE call = ? AND run = ? AND owner = ? AND status = 'running'",
            (self.clock.wall() + op.lease, self.clock.mono() + op.lease, op.call, op.run, op.token),
        ).rowcount
        return _Verdict("renewed") if changed == 1 else None

    def _apply(self, db: sqlite3.Connection, op: Op) -> _Verdict:
        """Any operation: read the rows, decide, write what changed, all in this transaction."""
        rows = self._rows(db, op.call)
        change = op.apply(rows, self._now_on(db))
        if isinstance(op, _Reset) and change.verdict.kind == "reset":
            db.execute("DELETE FROM runs WHERE call = ?", (op.call,))
        for old, new in change.updates:
            self._write(db, old, new)
        if change.insert is not None:
            marks = ", ".join("?" * len(change.insert))
            db.execute(f"INSERT INTO runs ({_COLUMNS}) VALUES ({marks})", change.insert)
        for kind, run, n, detail in change.notes:
            row = next(r for r in rows if r.run == run)
            self._note(db, row, kind, n, detail)
        return change.verdict

    def _write(self, db: sqlite3.Connection, old: Run, new: Run) -> None:
        values = {**new._asdict(), "was": old.status}
        changed = db.execute(
            "UPDATE runs SET status = :status, ended = :ended, closed_by = :closed_by, released = :released,"
            " result = :result, error = :error, trace = :trace, lease = :lease, mono = :mono,"
            " late = :late, late_at = :late_at"
            " WHERE call = :call AND run = :run AND owner = :owner AND status = :was",
            values,
        ).rowcount
        if changed != 1:
            raise StoreError(f"{self.path}: run {old.run} of {old.call} changed under its transaction")

    def _note(self, db: sqlite3.Connection, row: Run, kind: str, n: int, detail: str) -> None:
        db.execute(
            "INSERT INTO events (call, run, kind, at, tool, wf, caller, n, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (row.call, row.run, kind, self.clock.wall(), row.tool, row.wf, row.caller, n, detail),
        )

    def _now_on(self, db: sqlite3.Connection) -> _Now:
        wall, mono = self.clock.wall(), self.clock.mono()

        def over(run: Run) -> bool:
            owner = self._owner(db, run.owner)
            lapsed = run.lease <= wall
            if owner is not None and owner.boot and owner.boot == _me().boot:
                lapsed = run.mono <= mono
            if lapsed or owner is None:
                return lapsed
            return self.instant_death and self._local_disk and _is_dead(owner)

        return _Now(wall, mono, over)

    def now_for(self, rows: Sequence[Run]) -> _Now:
        """The clocks, and whether a RUNNING row's owner is over, for a decision on rows just read."""
        over = {r.run: self.is_over(r) for r in rows if r.status == "running"}
        return _Now(self.clock.wall(), self.clock.mono(), lambda run: over[run.run])

    def is_over(self, run: Run) -> bool:
        """Whether the owner of a RUNNING run is over."""
        return self._read(lambda db: self._now_on(db).over(run), False)

    def _owner(self, db: sqlite3.Connection, token: str) -> _Process | None:
        name = token.partition(".")[0]
        if name not in self._owners:
            row = db.execute("SELECT * FROM processes WHERE id = ?", (name,)).fetchone()
            if len(self._owners) > 1000:
                self._owners.clear()
            if row is None:
                return None
            self._owners[name] = _Process(*row)
        return self._owners[name]

    def _rows(self, db: sqlite3.Connection, call: str) -> list[Run]:
        found = db.execute(f"SELECT {_COLUMNS} FROM runs WHERE call = ? ORDER BY run", (call,))
        return list(map(Run._make, found))

    # -- reading, on other connections: the writer's own sees what is not committed yet --

    def quick(self, call: str) -> Sequence[tuple[str, int, str | None, int]]:
        """Status, released, result and number of each run: all that most duplicates need."""
        sql = "SELECT status, released, result, run FROM runs WHERE call = ? ORDER BY run"
        if self._pid == os.getpid() and not self._fork_waits:
            try:
                db = self._readers.pop()
            except IndexError:
                return self._read(lambda db: db.execute(sql, (call,)).fetchall(), [])
            try:
                return db.execute(sql, (call,)).fetchall()
            except sqlite3.Error:
                pass
            finally:
                self._readers.append(db)
        return self._read(lambda db: db.execute(sql, (call,)).fetchall(), [])

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return self._read(lambda db: self._rows(db, call), [])

    def _read(self, query: Callable[[sqlite3.Connection], T], absent: T) -> T:
        """Run a short query; `absent` is the answer of a ledger that does not exist yet."""
        limit = time.monotonic() + self.lock_seconds
        while True:
            try:
                db = self._reader()
                if db is None:
                    return absent
                try:
                    return query(db)
                finally:
                    self._readers.append(db)
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() > limit:
                    raise self._translated(error) from error
                time.sleep(0.001)

    def _reader(self) -> sqlite3.Connection | None:
        if self._pid != os.getpid() or self._broken:
            with self._gate:
                self._connection()  # raises, and says why
        while self._fork_waits:
            time.sleep(0.0005)
        try:
            return self._readers.pop()
        except IndexError:
            pass
        with self._gate:
            if not os.path.exists(self.path):
                if self._identity is not None:
                    self._lost_file("was deleted")
                return None
            db = self._open_reader()
            if db is not None:
                self._reading += 1
                _track_forks(self)
            return db

    def _open_reader(self) -> sqlite3.Connection | None:
        """A connection that cannot write; None while the file is still empty."""
        self._refuse_network()  # it also says whether a death may be proved here
        error: sqlite3.Error | None = None
        # a read-only folder has no room for the shared memory file: read the file as it stands
        for mode in ("rw", "ro", "ro&immutable=1"):
            if "immutable" in mode and os.access(os.path.dirname(self.path), os.W_OK):
                break
            db = self._connect(mode)
            try:
                ready = self._is_ready(db)
                if ready:
                    db.execute("SELECT 1 FROM runs LIMIT 1").fetchone()
                    db.execute("PRAGMA query_only = 1")
                    return db
                db.close()
                return None
            except sqlite3.Error as failed:
                db.close()
                error = failed
                if _is_busy(failed):
                    break
            except BaseException:
                db.close()
                raise
        raise cast("sqlite3.Error", error)

    def get(self, id: str) -> Record | None:
        """The record of a call."""
        rows = self.rows(id)
        if rows:
            return self.describe(rows)
        found = self._read(
            lambda db: db.execute("SELECT * FROM tallies WHERE call = ?", (id,)).fetchone(), None
        )
        return _record_of_tally(found) if found else None

    look = get

    def describe(self, rows: Sequence[Run], blocked: int | None = None) -> Record:
        """The record of a call from its runs."""
        doubt = rows[-1].status == "running" and self.is_over(rows[-1])
        record = _record(rows, sum(r.blocked for r in rows), in_doubt=doubt)
        return record._replace(holder=self.holder(rows[-1]))

    def holder(self, run: Run) -> str:
        """Where the owner of a run lives, for people."""
        owner = self._read(lambda db: self._owner(db, run.owner), None)
        return f"pid {owner.pid} on {owner.host}" if owner else run.caller

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first; no read transaction stays open between pages."""
        after = 0
        while True:
            read = functools.partial(self._page, after=after, wf=wf)
            page: list[tuple[int, list[Run]]] = self._read(read, [])
            if not page:
                break
            after = page[-1][0]
            for _, rows in page:
                if rows and _is_named(rows[-1].tool, tool):
                    yield self.describe(rows), rows
        found = self._fetch("SELECT * FROM tallies ORDER BY created")
        for row in found:
            if _is_named(row[1], tool) and wf in (None, row[2]):
                yield _record_of_tally(row), []

    def _page(self, db: sqlite3.Connection, *, after: int, wf: str | None) -> list[tuple[int, list[Run]]]:
        """The next calls after a row id; a call stands where its first run stands."""
        firsts = db.execute(
            "SELECT id, call FROM runs AS r WHERE id > ? AND (? IS NULL OR wf = ?) AND NOT EXISTS"
            " (SELECT 1 FROM runs AS e WHERE e.call = r.call AND e.run < r.run) ORDER BY id LIMIT 200",
            (after, wf, wf),
        ).fetchall()
        return [(first, self._rows(db, call)) for first, call in firsts]

    def all(self, wf: str | None = None) -> Iterator[Record]:
        """The record of every call, or of those of one workflow, oldest first."""
        return (record for record, _ in self.calls(wf=wf))

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number, oldest first."""
        self.flush()
        sql = (
            "SELECT seq, call, run, kind, at, tool, wf, caller, n, detail FROM events"
            " WHERE seq > ? ORDER BY seq LIMIT 500"
        )
        while True:
            page = self._fetch(sql, after)
            if not page:
                return
            after = page[-1][0]
            yield from map(_event, page)

    def _fetch(self, sql: str, *values: Any) -> list[Any]:
        nothing: list[Any] = []
        return self._read(lambda db: db.execute(sql, values).fetchall(), nothing)

    def totals(self) -> dict[str, dict[str, int]]:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        self.flush()
        return self._read(self._totals, {})

    def _totals(self, db: sqlite3.Connection) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        db.execute("BEGIN")  # one view for all of it
        try:
            rolled = db.execute("SELECT value FROM meta WHERE name = 'rolled'").fetchone()[0]
            rows = db.execute("SELECT * FROM totals").fetchall()
            rows += db.execute(_ROLL, {"rolled": rolled, "upto": 2**62}).fetchall()
            for tool, actions, claims, executed, blocked in rows:
                sums = found.setdefault(tool, dict.fromkeys(_TOTALS, 0))
                sums["actions"] += actions
                sums["executed"] += executed
                sums["blocked"] += blocked
                sums["attempts"] += claims + blocked
            self._add_open_ends(db, found)
            self._add_tallies(db, found)
        finally:
            db.execute("COMMIT")
        return {tool: sums for tool, sums in found.items() if sums["actions"]}

    def _add_open_ends(self, db: sqlite3.Connection, found: dict[str, dict[str, int]]) -> None:
        ends = db.execute(
            "SELECT tool, CASE status WHEN 'doubt' THEN 'in_doubt' ELSE status END, COUNT(*)"
            " FROM runs AS r INDEXED BY open_ends"
            " WHERE status IN ('failed', 'suspended', 'doubt')"
            " AND (status <> 'doubt' OR NOT released AND late IS NOT 'success')"
            " AND NOT EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND l.run > r.run)"
            " GROUP BY tool, status"
        ).fetchall()
        over = self._now_on(db).over
        for run in db.execute(f"SELECT {_COLUMNS} FROM runs WHERE status = 'running'").fetchall():
            row = Run(*run)
            ends.append((row.tool, "in_doubt" if over(row) else "running", 1))
        for tool, status, count in ends:
            found.setdefault(tool, dict.fromkeys(_TOTALS, 0))[status] += count

    def _add_tallies(self, db: sqlite3.Connection, found: dict[str, dict[str, int]]) -> None:
        tallies = db.execute("SELECT tool, COUNT(*), SUM(ran), SUM(raised) FROM tallies GROUP BY tool")
        for tool, calls, ran, raised in tallies:
            sums = found.setdefault(tool, dict.fromkeys(_TOTALS, 0))
            sums["actions"] += calls
            sums["attempts"] += ran + raised
            sums["executed"] += ran

    # -- counting: buffered, no fsync --

    def count(self, call: str, run: int, kind: str, ask: _Ask, error: str | None = None) -> None:
        """Count an attempt that ran nothing, or one of an unlimited tool; written within 200 ms."""
        claim = ask.claim
        args = claim.args if kind in _KINDS_RAN else None
        self._counts.append((call, run, kind, claim.caller, claim.tool, claim.wf, args, error))
        keeper = self._keeper
        if keeper is None or not keeper.counting:
            self.keeper.counted()

    def flush(self) -> None:
        """Write what was only counted so far."""
        if self._pid != os.getpid():
            return
        with self._flushing:  # who finds nothing left waits until another thread has written it
            if not self._counts:
                return
            taken: list[tuple[Any, ...]] = []
            try:
                self._submit(functools.partial(self._write_counts, taken), durable=False)
            except BaseException:
                self._counts.extendleft(reversed(taken))
                raise

    def _write_counts(self, taken: list[tuple[Any, ...]], db: sqlite3.Connection) -> None:
        """Write what waits; `taken` keeps it, because the transaction may have to be redone."""
        while self._counts:
            taken.append(self._counts.popleft())
        sums: dict[tuple[Any, ...], int] = {}
        last: dict[str, tuple[Any, ...]] = {}
        for count in taken:
            key = count[:6]
            sums[key] = sums.get(key, 0) + 1
            last[count[0]] = count[6:]
        now = self.clock.wall()
        for (call, run, kind, caller, tool, wf), n in sums.items():
            self._write_count(db, (call, run, kind, caller, tool, wf), n, last[call], now)
        self._roll_forward(db)

    def _write_count(
        self, db: sqlite3.Connection, key: tuple[Any, ...], n: int, rest: tuple[Any, ...], now: int
    ) -> None:
        call, run, kind, caller, tool, wf = key
        args, error = rest
        if kind in _KINDS_RAN:
            db.execute(
                "INSERT INTO tallies VALUES (:call, :tool, :wf, :caller, :args, :ran, :raised, :error,"
                " :now, :now) ON CONFLICT (call) DO UPDATE SET ran = ran + :ran, raised = raised + :raised,"
                " error = :error, touched = :now",
                {
                    "call": call, "tool": tool, "wf": wf, "caller": caller, "args": args,
                    "ran": n if kind == "ran" else 0, "raised": n if kind == "raised" else 0,
                    "error": error, "now": now,
                },
            )  # fmt: skip
            run = 0  # a tally is no run: its events stay out of the totals
        else:
            changed = db.execute(
                "UPDATE runs SET blocked = blocked + ? WHERE call = ? AND run = ?", (n, call, run)
            ).rowcount
            if not changed:  # reset meanwhile
                return
        db.execute(
            "INSERT INTO events (call, run, kind, at, tool, wf, caller, n, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (call, run, kind, now, tool, wf, caller, n, error),
        )

    def _roll_forward(self, db: sqlite3.Connection) -> None:
        """Add what the events since the last time say to the totals, so that stats stay cheap."""
        upto = db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0]
        rolled = db.execute("SELECT value FROM meta WHERE name = 'rolled'").fetchone()[0]
        for row in db.execute(_ROLL, {"rolled": rolled, "upto": upto}).fetchall():
            db.execute(
                "INSERT INTO totals VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (tool) DO UPDATE SET"
                " actions = actions + ?2, claims = claims + ?3, executed = executed + ?4,"
                " blocked = blocked + ?5",
                row,
            )
        db.execute("UPDATE meta SET value = ? WHERE name = 'rolled'", (upto,))

    # -- housekeeping --

    def reset(self, wf: str | None, asked: int) -> None:
        """Forget every call of a workflow (None: of all) in one transaction."""
        self.flush()

        def forget(db: sqlite3.Connection) -> None:
            self._roll_forward(db)
            over = self._now_on(db).over
            scope = {"wf": wf, "asked": asked}
            live = f"SELECT {_COLUMNS} FROM runs WHERE status = 'running' AND (:wf IS NULL OR wf = :wf)"
            for row in db.execute(live, scope).fetchall():
                if not over(Run(*row)):
                    raise _busy_reset(self.describe([Run(*row)]))
            chosen = (
                "(:wf IS NULL OR wf = :wf) AND call NOT IN (SELECT call FROM runs WHERE started > :asked)"
            )
            sums = (
                "SELECT tool, COUNT(DISTINCT call), COUNT(*),"
                " SUM(status = 'success' OR late IS 'success'), SUM(blocked)"
                f" FROM runs WHERE {chosen} GROUP BY tool"
            )
            for row in db.execute(sums, scope).fetchall():
                db.execute(
                    "UPDATE totals SET actions = actions - ?2, claims = claims - ?3,"
                    " executed = executed - ?4, blocked = blocked - ?5 WHERE tool = ?1",
                    row,
                )
            db.execute(f"DELETE FROM runs WHERE {chosen}", scope)
            db.execute("DELETE FROM tallies WHERE :wf IS NULL OR wf = :wf", scope)
            db.execute(
                "INSERT INTO events (kind, at, wf, detail) VALUES ('reset', ?, ?, ?)",
                (self.clock.wall(), wf, "everything" if wf is None else ""),
            )

        self._submit(forget, durable=self.sync != "off")

    def put(self, record: Record) -> None:
        """Write a call as it is described, replacing what is there."""
        row = _row_of(record)

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM runs WHERE call = ?", (record.call,))
            db.execute(f"INSERT INTO runs ({_COLUMNS}) VALUES ({', '.join('?' * len(row))})", row)

        self._submit(write, durable=True)

    def claim(self, record: Record) -> bool:
        """Insert a call as it is described, if it is absent."""
        row = _row_of(record)
        insert = functools.partial(lambda db: db.execute(_INSERT_FIRST, row).rowcount == 1)
        return bool(self._submit(insert, durable=True))

    def delete(self, id: str) -> None:
        """Remove a call."""

        def remove(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM runs WHERE call = ?", (id,))
            db.execute("DELETE FROM tallies WHERE call = ?", (id,))

        self._submit(remove, durable=True)

    def clear(self, wf: str | None = None) -> None:
        """`reset`, by its name in the six methods."""
        self.reset(wf, self.clock.wall())

    def check(self) -> dict[str, Any]:
        """Prove that the file can be read and written and is sound; raises `StoreError`."""

        def probe(db: sqlite3.Connection) -> str:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('checked', ?)", (self.clock.wall(),))
            return str(db.execute("PRAGMA quick_check(1)").fetchone()[0])

        found = self._submit(probe, durable=True)
        if found != "ok":
            raise StoreError(f"{self.path} is damaged ({found}); restore a backup, do not delete it")
        return {"store": self.path, "ok": True, "schema": _SCHEMA_VERSION, "sync": self.sync}

    def close(self) -> None:
        """Finish what is pending and close the file; it opens again when it is used again."""
        super().close()
        with self._gate:
            self._close_connections()

    def _close_connections(self) -> None:
        while self._readers:
            self._readers.pop().close()
            self._reading -= 1
        if self._db is not None:
            self._db.close()
            self._db = None
        self._synchronous = self._registered = ""

    # -- async callers: a thread leads for them, the loop never waits --

    async def transact_async(self, op: Op) -> _Verdict:
        """`transact` without blocking the event loop; a cancelled claim that was not taken is withdrawn."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Verdict] = loop.create_future()
        item = _Item(
            op,
            self._is_durable(op),
            time.monotonic() + self.lock_seconds,
            lambda item: _call_loop(loop, _resolve_future, future, item),
        )
        with self._mutex:
            self._queue.append(item)
            leads = not self._led
            self._led = True
            if leads:
                self._wake_writer()
        try:
            return await future
        except (asyncio.CancelledError, GeneratorExit):
            if isinstance(op, _Claim) and not self._withdraw(item):
                item.deliver = functools.partial(_abandon_claim, self)
                if item.done:
                    item.deliver(item)
            raise

    def _wake_writer(self) -> None:
        """Let the writer thread lead. With the mutex held."""
        if self._writer_bell is None:
            self._writer_bell = threading.Lock()
            threading.Thread(
                target=self._write_for_loops, args=(self._writer_bell,), name="ledger-writer", daemon=True
            ).start()
        elif self._writer_bell.locked():
            self._writer_bell.release()

    def _write_for_loops(self, bell: threading.Lock) -> None:
        while self._writer_bell is bell:
            if bell.acquire(timeout=60) and self._writer_bell is bell and self._pid == os.getpid():
                self._lead(None)

    async def rows_async(self, call: str) -> list[Run]:
        """`rows`; a read of a few pages that waits for nobody."""
        return self.rows(call)

    # -- fork --

    def _before_fork(self) -> None:
        """Close everything: a child with its own connection beside an inherited one loses commits."""
        self._fork_waits = True
        self._forking = self._gate.acquire(timeout=5)
        busy = self._db is not None and self._db.in_transaction
        limit = time.monotonic() + 1
        while self._forking and not busy and time.monotonic() < limit:
            self._close_connections()  # as they come back: nobody can take one out again
            if not self._reading:
                return
            time.sleep(0.0005)  # another thread is reading: a matter of microseconds
        self._broken = "fork"

    def _after_fork_in_parent(self) -> None:
        self._broken = ""
        self._fork_waits = False
        if self._forking:
            self._gate.release()

    def _after_fork_in_child(self) -> None:
        broken = self._broken
        self._start_afresh()
        self._broken = broken


_INSERT_FIRST: Final = (
    f"INSERT INTO runs ({_COLUMNS}) SELECT {', '.join(f'?{n + 1}' for n in range(len(Run._fields)))}"
    " WHERE NOT EXISTS (SELECT 1 FROM runs WHERE call = ?1) ON CONFLICT DO NOTHING"
)
_HOT: Final[dict[Any, Callable[[SqliteStore, sqlite3.Connection, Any], _Verdict | None]]] = {
    _Claim: SqliteStore._claim_first,
    _Settle: SqliteStore._settle_own,
    _Renew: SqliteStore._renew_own,
}


def _is_busy(error: sqlite3.Error) -> bool:
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


def _record_of_tally(row: Sequence[Any]) -> Record:
    call, tool, wf, caller, args, ran, raised, error, created, touched = row
    return Record(
        id=call, call=call, run=0, tool=tool, wf=wf, caller=caller, owner="", key=None, args_json=args,
        status=Status.FAILED if error else Status.SUCCESS, result_json=None, error=error,
        attempts=ran + raised, runs=ran, blocked=0, created=created, touched=touched, started=touched,
        ended=touched, lease=touched, released=False,
    )  # fmt: skip


def _file_system(folder: str) -> str:
    """The type of the file system that a folder is on, from the mount table; "" where unknown."""
    best, kind = -1, ""
    real = os.path.realpath(folder)
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


def _call_loop(loop: Any, function: Any, *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop was closed: nobody waits any more
        pass


def _resolve_future(future: Any, item: _Item) -> None:
    if not future.done():
        if item.error is not None:
            future.set_exception(item.error)
        else:
            future.set_result(item.answer)


def _abandon_claim(store: Store, item: _Item) -> None:
    """A claim whose caller was cancelled meanwhile: its run was never entered, say so."""
    verdict = item.answer
    if item.error is None and verdict.kind == "granted":
        store.keeper.keep(_not_entered(verdict.row))


def _not_entered(row: Run) -> _Settle:
    return _make(
        _Settle, call=row.call, token=row.owner, run=row.run, status="failed", result=None,
        error="NotPerformed: the tool was not entered", trace=None,
    )  # fmt: skip


_forked: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
_forks_hooked = False


def _each_store(act: Callable[[SqliteStore], None]) -> None:
    for store in list(_forked):
        act(store)


def _track_forks(store: SqliteStore) -> None:
    global _forks_hooked
    _forked.add(store)
    if not _forks_hooked and hasattr(os, "register_at_fork"):
        _forks_hooked = True
        os.register_at_fork(
            before=functools.partial(_each_store, SqliteStore._before_fork),
            after_in_parent=functools.partial(_each_store, SqliteStore._after_fork_in_parent),
            after_in_child=functools.partial(_each_store, SqliteStore._after_fork_in_child),
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
        if name in options:
            _types(options[name])
    for one, other, why in _CONTRADICTIONS:
        if one(options) and other(options):
            raise PolicyError(f"the policy contradicts itself: {why}")


def _is_seconds(value: Any) -> bool:
    return _micros(value) > 0 if not isinstance(value, bool | str) else False


def _are_names(value: Any) -> bool:
    return isinstance(value, str | list | tuple | set | frozenset) and all(isinstance(n, str) for n in value)


_RANGES: Final[tuple[tuple[str, Callable[[Any], bool], str], ...]] = (
    ("max", lambda v: type(v) is int and v >= 1, "a whole number from 1 on"),
    ("ttl", lambda v: v is None or _is_seconds(v), "a positive number of seconds or a timedelta"),
    ("timeout", _is_seconds, "a positive number of seconds or a timedelta"),
    ("wait", lambda v: v == 0 or _is_seconds(v), "a number of seconds from 0 on or a timedelta"),
    ("record", lambda v: v in ("all", "no-result", "no-args", "nothing"), "all, no-result, no-args or nothing"),
    ("on_doubt", lambda v: v in ("rerun", "block") or callable(v), "'rerun', 'block' or a function"),
    ("key", lambda v: v is None or callable(v) or (_are_names(v) and len(v) > 0), "a list of parameters or a function of them"),
    ("ignore", _are_names, "a list of names"),
    ("match", _are_names, "a list of names"),
    ("redact", _are_names, "a list of names"),
    ("unlimited", lambda v: type(v) is bool, "True or False"),
    ("replay", lambda v: type(v) is bool, "True or False"),
    ("irreversible", lambda v: type(v) is bool, "True or False"),
    ("name", lambda v: v is None or (type(v) is str and v != ""), "a name"),
)  # fmt: skip
_CONTRADICTIONS: Final[tuple[tuple[Callable[[Any], Any], Callable[[Any], Any], str], ...]] = (
    (
        lambda o: o.get("unlimited"),
        lambda o: {"max", "ttl", "wait", "match", "on_doubt"} & o.keys() or o.get("replay") or o.get("irreversible"),
        "an unlimited tool runs every time, so max, ttl, replay, wait, match, on_doubt and irreversible mean nothing",
    ),
    (lambda o: "wait" in o, lambda o: o.get("replay") is False, "wait needs replay=True"),
    (
        lambda o: o.get("replay"),
        lambda o: o.get("record") in ("no-result", "nothing"),
        "a result that is not recorded cannot be replayed",
    ),
    (lambda o: o.get("irreversible"), lambda o: o.get("on_doubt") == "rerun", "an irreversible tool cannot rerun in doubt"),
    (lambda o: o.get("key"), lambda o: o.get("ignore"), "key says what counts, so ignore means nothing"),
)  # fmt: skip


def _micros(value: Any) -> int:
    seconds = value.total_seconds() if hasattr(value, "total_seconds") else value
    if not isinstance(seconds, int | float) or seconds != seconds:
        raise PolicyError(f"{value!r} is not a number of seconds or a timedelta")
    return int(min(seconds, 1e11) * _MICROS)


def _names(value: Names) -> frozenset[str]:
    return frozenset({value} if isinstance(value, str) else value)


def _types(value: Any) -> tuple[type[BaseException], ...]:
    types = (value,) if isinstance(value, type) else tuple(value)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise PolicyError(f"{kind!r} is not an exception type")
    return types


def _layered(*layers: PolicyOptions) -> PolicyOptions:
    """Later layers win; what an earlier one says against them is dropped."""
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        for name, value in layer.items():
            if name in merged:
                continue
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
    if stream is None:
        return
    try:
        stream.write(f"[ledger] {text}\n")
    except UnicodeEncodeError:
        stream.write(f"[ledger] {text.encode('ascii', 'replace').decode()}\n")
    except (OSError, ValueError):  # closed: a notice is not worth an error
        pass


def _warn(text: str, *, error: BaseException | None = None) -> None:
    """Something that must not pass unseen, also when the guard is quiet."""
    import logging

    logging.getLogger("ledger").warning(text, exc_info=error)


def _log_debug(text: str, *values: object) -> None:
    import logging

    logging.getLogger("ledger").debug(text, *values)


# ═══ One attempt ══════════════════════════════════════════════════════════════════════


class _Ask:
    """One attempt: what was asked for, and how far it has come."""

    __slots__ = (
        "__weakref__", "args", "bound", "claim", "current", "ending", "entered", "guard", "kwargs", "open",
        "pid", "policy", "rows", "run", "sent", "shown", "store", "tool", "waited",
    )  # fmt: skip

    guard: Guard
    tool: _Tool
    policy: Policy
    store: Store
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bound: dict[str, Any]
    claim: _Claim
    shown: _Shown
    rows: Sequence[Any]
    current: Current
    ending: _Settle | None

    def __init__(self) -> None:
        self.run = 0
        self.open = self.entered = self.waited = False
        self.ending = None
        self.pid = os.getpid()
        self.sent = 0.0

    def lost(self) -> None:
        """The keeper found the run taken over."""
        _warn(
            f"{_short(self.claim.tool)} (call {self.claim.call}): run {self.run} was silent for longer "
            "than its timeout and was taken over while it still runs; its end will be recorded as late"
        )


class _Reply(NamedTuple):
    kind: Literal["executed", "blocked", "replayed", "waited"]
    value: Any
    error: BaseException | None = None


#: what an attempt asks its driver to do: (what, argument)
_Step = tuple[Literal["transact", "rows", "wait", "run", "user"], Any]

_running: contextvars.ContextVar[tuple[_Ask, ...]] = contextvars.ContextVar("ledger_running", default=())


def current() -> Current | None:
    """The run that is going on, or None outside a guarded tool."""
    asks = _running.get()
    return asks[-1].current if asks else None


def idempotency_key() -> str:
    """The key to pass on to the service: the same for every run of one intended effect.

    Raises `UsageError` outside a guarded tool.
    """
    run = current()
    if run is None:
        raise UsageError("idempotency_key() was called outside a guarded tool; call it inside the tool")
    return run.idempotency_key


class _Course:
    """The life of one attempt, once for sync and async: yields what must be waited for."""

    def __init__(self, ask: _Ask) -> None:
        self.ask = ask
        self.guard = ask.guard
        self.deadline = time.monotonic() + ask.policy.wait

    def steps(self) -> Generator[_Step, Any, _Reply]:
        ask = self.ask
        if ask.policy.unlimited:
            return (yield from self._unlimited())
        verdict: _Verdict | None = None
        rows = (yield ("rows", None)) if ask.rows else []
        while True:
            if rows:
                verdict = ask.claim.judge(rows, ask.store.now_for(rows))
            if not rows or verdict is None or verdict.kind == "run":
                verdict = yield from self._claim()
            if verdict.kind == "granted":
                return (yield from self._enter(verdict))
            reply = yield from self._refused(verdict)
            if reply is not None:
                return reply
            verdict = None
            rows = yield ("rows", None)

    def _claim(self) -> Generator[_Step, Any, _Verdict]:
        ask = self.ask
        ask.sent = time.monotonic()
        ask.open = True
        try:
            verdict: _Verdict = yield ("transact", ask.claim)
        except StoreError:  # the claim may stand although its reply was lost: close it, once
            ask.open = False
            ask.store.keeper.keep(_not_entered(ask.claim.first_row(0, 0)), once=True)
            raise
        if verdict.kind != "granted":
            ask.open = False
        if verdict.kind == "lost":
            ask.claim.token = new_token()
        return verdict

    def _refused(self, verdict: _Verdict) -> Generator[_Step, Any, _Reply | None]:
        """What a duplicate gets; None to look again."""
        ask, row = self.ask, verdict.row
        if verdict.kind == "lost" or row is None:
            return None
        self._refuse_mismatch(row)
        if verdict.kind == "done":
            return self.guard._answer_done(ask, row.run, row.result)
        if verdict.kind == "reconcile":
            return (yield from self._reconcile(row))
        record = ask.store.describe([row])
        if verdict.kind == "doubt":
            self.guard._count(ask, row.run)
            self.guard._tell(self.guard._on_doubt, record)
            raise InDoubt(_doubt_text(record), record)
        own = any(a.claim.token == row.owner for a in _running.get())
        if not ask.policy.replay:
            return self.guard._answer_blocked(ask, row.run, "is running")
        left = self.deadline - time.monotonic()
        if own or left <= 0:
            self.guard._count(ask, row.run)
            why = "is what this call is part of" if own else "is still running"
            raise InProgress(
                f"call {record.short} ({record.call}) {why} in {record.holder} since "
                f"{_clock_text(record.started)}; wait for it, or allow more with wait=…",
                record,
            )
        ask.waited = True
        yield ("wait", left)
        return None

    def _refuse_mismatch(self, row: Run) -> None:
        """Parameters named in match= must be what they were."""
        if not (self.ask.claim.matched and row.matched):
            return
        theirs, ours = json.loads(row.matched), json.loads(self.ask.claim.matched)
        differ = sorted(n for n in ours if n in theirs and ours[n] != theirs[n])
        if differ:
            self.guard._count(self.ask, row.run)
            raise KeyConflict(
                f"{_short(row.tool)} did not run: call {row.call} was made before with another "
                f"{', '.join(differ)}; use another key for another action",
                self.ask.store.describe([row]),
            )

    def _reconcile(self, row: Run) -> Generator[_Step, Any, _Reply | None]:
        """Ask the user's function what really happened; nothing is written before its answer."""
        ask = self.ask
        record = ask.store.describe([row])._replace(in_doubt=True)
        try:
            answer = yield ("user", (ask.policy.on_doubt, record))
        except Exception as error:
            self.guard._count(ask, row.run)
            raise InDoubt(f"{_doubt_text(record)} (reconcile failed: {error!r})", record) from error
        if answer is STILL_UNKNOWN:
            self.guard._count(ask, row.run)
            raise InDoubt(_doubt_text(record), record)
        if answer is NOT_DONE:
            ask.claim.not_done = (row.run, row.owner)
            verdict = yield from self._claim()
            return (yield from self._enter(verdict)) if verdict.kind == "granted" else None
        op = _make(
            _Resolve, call=row.call, token=new_token(), run=row.run, owner=row.owner, done=True,
            result=self._stored(answer), reconciled=True, why="reconcile: done",
        )  # fmt: skip
        yield ("transact", op)
        return None

    def _enter(self, verdict: _Verdict) -> Generator[_Step, Any, _Reply]:
        """Run the tool; whatever it does, its run is settled."""
        ask, claim, row = self.ask, self.ask.claim, verdict.row
        assert row is not None
        ask.run = row.run
        if verdict.closed is not None:
            self.guard._tell(self.guard._on_doubt, ask.store.describe([verdict.closed]))
        if time.monotonic() - ask.sent > claim.lease / _MICROS:  # a stall: is it still mine?
            renewal = _make(_Renew, call=claim.call, token=claim.token, run=ask.run, lease=claim.lease)
            if (yield ("transact", renewal)).kind != "renewed":
                ask.open = False
                raise InProgress(f"run {ask.run} of {_short(claim.tool)} was taken over before it began")
        key = f"{claim.call}-{verdict.anchor}"
        ask.current = Current(claim.call, ask.run, claim.tool, claim.wf, claim.caller, key)
        ask.store.keeper.watch(ask)
        value, error = yield ("run", None)
        if os.getpid() != ask.pid:  # a forked child came back out of the tool: the run is the parent's
            ask.open = False
            return _Reply("executed", value, error)
        ask.ending = self._ending(value, error)
        yield from self._settle(ask.ending)
        ask.open = False
        return _Reply("executed", value, error)

    def _ending(self, value: Any, error: BaseException | None) -> _Settle:
        ask = self.ask
        status, result, text, trace = "success", None, None, None
        if error is None:
            result = self._stored(value)
        else:
            status = self._status_of(error)
            text = ask.shown.clean(_error_text(error))
            trace = None if status == "suspended" else ask.shown.clean(_trace_text(error))
        return _make(
            _Settle, call=ask.claim.call, token=ask.claim.token, run=ask.run, status=status,
            result=result, error=text, trace=trace,
        )  # fmt: skip

    def _status_of(self, error: BaseException) -> str:
        policy = self.ask.policy
        names = {f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__}
        if isinstance(error, policy.suspends) or not names.isdisjoint(known_suspends):
            return "suspended"
        if isinstance(error, (NotPerformed, *policy.no_effect)):
            return "failed"
        return "failed" if isinstance(error, Exception) and not policy.irreversible else "doubt"

    def _stored(self, value: Any) -> str | None:
        """The result as it is kept; None when it must not or cannot be."""
        if self.ask.policy.record in ("no-result", "nothing"):
            return None
        try:
            text = _store_form(value)
        except _Unstorable as error:
            self.guard._say(f"{_short(self.ask.claim.tool)}: its result is not kept: {error}")
            return None
        if self.ask.shown.leaks_into(text):
            self.guard._say(
                f"{_short(self.ask.claim.tool)}: its result is not kept: it repeats a secret argument"
            )
            return None
        return text

    def _settle(self, ending: _Settle) -> Generator[_Step, Any, None]:
        ask, keeper = self.ask, self.ask.store.keeper
        try:
            try:
                verdict: _Verdict = yield ("transact", ending)
            except StoreError as error:
                if not error.full:
                    raise
                ask.store.make_room()
                verdict = yield ("transact", ending)
        except (StoreError, OSError) as error:
            keeper.keep(ending, ask)
            ask.open = False
            _warn(
                f"{_short(ask.claim.tool)} (call {ask.claim.call}) ended as {ending.status.upper()}, but the "
                f"ledger could not record it: {error}. It is kept in memory and tried again until this "
                "process ends; if that fails, the call is in doubt"
            )
            return
        keeper.forget(ask.claim.token)
        if verdict.kind != "settled":
            _warn(
                f"{_short(ask.claim.tool)} (call {ask.claim.call}): run {ask.run} had been given up when it "
                f"ended as {ending.status.upper()}; "
                f"{'recorded as a late end' if verdict.kind == 'late' else 'its call was reset'}"
            )
        self.guard._after_settle(ask, ending)

    def _unlimited(self) -> Generator[_Step, Any, _Reply]:
        ask, claim = self.ask, self.ask.claim
        key = f"{claim.call}-{claim.token}"
        ask.current = Current(claim.call, 0, claim.tool, claim.wf, claim.caller, key)
        value, error = yield ("run", None)
        text = None if error is None else ask.shown.clean(_error_text(error))
        ask.store.count(claim.call, 0, "ran" if error is None else "raised", ask, text)
        return _Reply("executed", value, error)


def _error_text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:2000].rstrip(": ")
    except Exception:  # the tool's own error is the one to tell
        return type(error).__name__


def _trace_text(error: BaseException) -> str:
    import traceback

    frames = traceback.format_exception(type(error), error, error.__traceback__, limit=-20)
    return "".join(frames)[-8000:]


def _doubt_text(record: Record) -> str:
    return (
        f"{record.short} did not run: run {record.run} of call {record.call}, started at "
        f"{_clock_text(record.started)} in {record.holder}, ended without a known outcome"
        f"{f' ({record.error})' if record.error else ''}; find out whether it took effect, then "
        "guard.resolve(fn, …, result=…) or guard.resolve(fn, …, done=False)"
    )


def _drive(ask: _Ask) -> _Reply:
    """Run one attempt in this thread."""
    course = _Course(ask).steps()
    try:
        step = course.send(None)
        while True:
            try:
                value = _perform(ask, step)
            except BaseException as error:
                step = course.throw(error)
            else:
                step = course.send(value)
    except StopIteration as stop:
        return cast("_Reply", stop.value)
    finally:
        if ask.open:
            _abandon(ask)


def _perform(ask: _Ask, step: _Step) -> Any:
    what, argument = step
    if what == "transact":
        return ask.store.transact(argument)
    if what == "run":
        token = _running.set((*_running.get(), ask))
        ask.entered = True
        try:
            return _refuse_coroutine(ask, ask.tool.function(*ask.args, **ask.kwargs)), None
        except BaseException as error:
            return None, error
        finally:
            _running.reset(token)
    if what == "rows":
        return ask.store.rows(ask.claim.call)
    if what == "wait":
        return _wait(ask, argument)
    function, record = argument
    return function(record)


def _refuse_coroutine(ask: _Ask, value: Any) -> Any:
    close = getattr(value, "close", None)
    if close is not None and hasattr(value, "cr_code"):
        close()
        raise NotPerformed(
            f"{_short(ask.claim.tool)} gave back a coroutine although it is not an async function, so "
            "nothing ran; guard the async function itself"
        )
    return value


def _wait(ask: _Ask, left: float) -> None:
    """Until the live run ends here, or for a moment, because it may end in another process."""
    bell = threading.Lock()
    bell.acquire()
    wake = functools.partial(_release_once, bell)
    ask.store.subscribe(ask.claim.call, wake)
    try:
        bell.acquire(timeout=min(left, _poll_seconds(ask.policy.wait - left)))
    finally:
        ask.store.unsubscribe(ask.claim.call, wake)


def _poll_seconds(waited: float) -> float:
    """Soon at first, then every 50 ms."""
    return min(0.05, 0.002 + waited / 4)


def _abandon(ask: _Ask) -> None:
    """The attempt was interrupted between its steps: close its run rather than leave it RUNNING."""
    if os.getpid() != ask.pid:
        return
    ask.open = False
    op = ask.ending
    if op is None:
        row = ask.claim.first_row(0, 0)._replace(run=ask.run or 1)
        op = _not_entered(row)
        if ask.entered:
            op.status, op.error = "doubt", "interrupted"
    try:
        ask.store.transact(op)
        ask.store.keeper.forget(op.token)
    except Exception:  # the interruption is the error to tell; the keeper goes on trying
        ask.store.keeper.keep(op, ask)


async def _drive_async(ask: _Ask) -> _Reply:
    """Run one attempt in an event loop."""
    course = _Course(ask).steps()
    try:
        step = course.send(None)
        while True:
            try:
                value = await _perform_async(ask, step)
            except BaseException as error:
                step = course.throw(error)
            else:
                step = course.send(value)
    except StopIteration as stop:
        return cast("_Reply", stop.value)
    finally:
        if ask.open:
            ask.open = False
            if ask.ending is not None or ask.entered or not isinstance(ask.store, SqliteStore):
                _abandon_later(ask)


def _abandon_later(ask: _Ask) -> None:
    """Like `_abandon`, without waiting: the loop may be closing."""
    if os.getpid() == ask.pid:
        op = ask.ending or _not_entered(ask.claim.first_row(0, 0)._replace(run=ask.run or 1))
        if ask.ending is None and ask.entered:
            op.status, op.error = "doubt", "interrupted"
        ask.store.keeper.keep(op, ask)


async def _perform_async(ask: _Ask, step: _Step) -> Any:
    what, argument = step
    if what == "transact":
        return await ask.store.transact_async(argument)
    if what == "run":
        token = _running.set((*_running.get(), ask))
        ask.entered = True
        try:
            value = ask.tool.function(*ask.args, **ask.kwargs)  # a wrapper may have awaited it already
            return await value if hasattr(value, "__await__") else value, None
        except GeneratorExit:  # dropped with its loop: nothing can be awaited any more
            raise
        except BaseException as error:
            return None, error
        finally:
            try:
                _running.reset(token)
            except ValueError:  # the garbage collector closes it from another context
                pass
    if what == "rows":
        return await ask.store.rows_async(ask.claim.call)
    if what == "wait":
        return await _wait_async(ask, argument)
    function, record = argument
    answer = function(record)
    return await answer if hasattr(answer, "__await__") else answer


async def _wait_async(ask: _Ask, left: float) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    wake = functools.partial(_call_loop, loop, ended.set)
    ask.store.subscribe(ask.claim.call, wake)
    try:
        async with asyncio.timeout(min(left, _poll_seconds(ask.policy.wait - left))):
            await ended.wait()
    except TimeoutError:
        pass
    finally:
        ask.store.unsubscribe(ask.claim.call, wake)


# ═══ The guard ════════════════════════════════════════════════════════════════════════

_stores: weakref.WeakValueDictionary[tuple[str, ...], SqliteStore] = weakref.WeakValueDictionary()
_stores_lock = threading.Lock()


def _open_store(url: str, sync: str, lock_seconds: float, instant_death: bool) -> Store:
    """The store of a path or URL; one per file and process, whoever asks."""
    scheme, found, rest = url.partition("://")
    if found and scheme not in ("sqlite", "memory"):
        raise UsageError(
            f"there is no store for {scheme}://; a plain path, sqlite:///path or memory:// can be used"
        )
    if scheme == "memory" and found:
        return MemoryStore()
    path = os.path.abspath((rest.removeprefix("/")) if found else url)
    key = (os.path.realpath(path), sync, str(lock_seconds), str(instant_death))
    with _stores_lock:
        store = _stores.get(key)
        if store is None:
            store = SqliteStore(
                path, sync=cast("Any", sync), lock_seconds=lock_seconds, instant_death=instant_death
            )
            _stores[key] = store
    return store


class _Burst:
    """Watches one tool for calls that look like retries with drifting arguments."""

    def __init__(self) -> None:
        self.recent: deque[tuple[float, str, dict[str, str]]] = deque(maxlen=3)
        self.warned = False

    def changed(self, call: str, forms: dict[str, str]) -> list[str] | None:
        """The parameters that differ, when this is the third different call in ten seconds."""
        now = time.monotonic()
        if any(c == call for _, c, _ in self.recent):
            return None
        self.recent.append((now, call, forms))
        if len(self.recent) < 3 or now - self.recent[0][0] > 10:
            return None
        self.warned = True
        return [n for n in forms if len({f.get(n) for _, _, f in self.recent}) > 1]


class Guard:
    """Runs tools once. `guard` is the one for every day; make your own for another store.

    `url`: a path, `sqlite:///path` or `memory://` (default: LEDGER_DB, else ./ledger.db, read
    when first needed).  `sync`: "full" (claim and outcome are on disk before anything goes on),
    "claim" (the outcome rides on the next fsync: after a power cut it may read as in doubt) or
    "off" (survives a killed process, not a power cut).  A guard can be pickled: it carries its
    URL and settings, and opens its own connection where it arrives.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        store: Store | None = None,
        workflow: str | None = None,
        sync: Literal["full", "claim", "off"] = "full",
        quiet: bool | None = None,
        lock_seconds: float = 30.0,
        instant_death: bool = True,
    ) -> None:
        if sync not in ("full", "claim", "off"):
            raise UsageError(f"sync={sync!r} is not one of 'full', 'claim' and 'off'")
        if url is not None and store is not None:
            raise UsageError("a guard has one store: give either a URL or store=, not both")
        self._url = None if url is None else os.fspath(url)
        self._given_store = store
        self._settings = {"sync": sync, "lock_seconds": lock_seconds, "instant_death": instant_death}
        self._workflow = workflow
        self._quiet = quiet
        self._policies: dict[str, PolicyOptions] = {}
        self._defaults: PolicyOptions = {}
        self._begin()

    def _begin(self) -> None:
        """What is not carried to another process."""
        self._opened: Store | None = self._given_store
        self._generation = 0
        self._tools: weakref.WeakKeyDictionary[Any, _Tool] = weakref.WeakKeyDictionary()
        self._on_success: list[Callable[[Record], object]] = []
        self._on_block: list[Callable[[Record], object]] = []
        self._on_failure: list[Callable[[Record], object]] = []
        self._on_doubt: list[Callable[[Record], object]] = []
        self._scope: contextvars.ContextVar[str | None] = contextvars.ContextVar("ledger_wf", default=None)
        self._who: contextvars.ContextVar[str | None] = contextvars.ContextVar("ledger_caller", default=None)
        self._main_scope: str | None = None
        self._main_who: str | None = None
        self._bursts: dict[str, _Burst] = {}
        self._receivers: dict[str, Any] = {}
        self._digests: dict[str, bytes] = {}
        self._short_names: dict[str, set[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        url = self._resolved_url()
        if self._given_store is not None or url.startswith("memory://"):
            (self._given_store or MemoryStore()).__getstate__()
        return {
            "url": url, "settings": self._settings, "workflow": self._workflow,
            "quiet": self._quiet, "policies": self._policies, "defaults": self._defaults,
            "scope": self._scope.get() or self._main_scope,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url, self._settings = state["url"], state["settings"]
        self._workflow, self._quiet = state["workflow"], state["quiet"]
        self._policies, self._defaults = state["policies"], state["defaults"]
        self._given_store = None
        self._begin()
        self._main_scope = state["scope"]

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
        tool, args, kwargs = self._tool_for(fn, args, kwargs)
        key = _explicit_key(tool, kwargs)
        if tool.is_async:
            return cast("T", self._run_async(tool, key, args, kwargs))
        return cast("T", self._run(tool, key, args, kwargs).value)

    @overload
    def call(
        self, fn: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Outcome[T]]: ...
    @overload
    def call(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Outcome[T]: ...
    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Like calling the guard, but answers with an `Outcome` (to await for an async tool)."""
        tool, args, kwargs = self._tool_for(fn, args, kwargs)
        key = _explicit_key(tool, kwargs)
        if tool.is_async:
            return self._outcome_async(tool, key, args, kwargs)
        ask = self._ask(tool, key, args, kwargs)
        return self._outcome(ask, self._answer(ask))

    async def _outcome_async(self, tool: _Tool, key: Any, args: Any, kwargs: Any) -> Outcome[Any]:
        ask = self._ask(tool, key, args, kwargs)
        return self._outcome(ask, await self._answer_async(ask))

    def _outcome(self, ask: _Ask, reply: _Reply) -> Outcome[Any]:
        if reply.error is not None:
            raise reply.error
        ask.store.flush()
        record = ask.store.look(ask.claim.call) or ask.store.describe([ask.claim.first_row(0, 0)])
        return Outcome(reply.kind, reply.value, record)

    def _run(self, tool: _Tool, key: Any, args: Any, kwargs: Any) -> _Reply:
        reply = self._answer(self._ask(tool, key, args, kwargs))
        if reply.error is not None:
            raise reply.error
        return reply

    async def _run_async(self, tool: _Tool, key: Any, args: Any, kwargs: Any) -> Any:
        reply = await self._answer_async(self._ask(tool, key, args, kwargs))
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _answer(self, ask: _Ask) -> _Reply:
        if ask.policy.simple:
            ask.rows = rows = ask.store.quick(ask.claim.call)
            if rows and rows[-1][0] == "success" and not rows[-1][1]:
                return self._answer_done(ask, rows[-1][3], rows[-1][2])
        self._before_claim(ask)
        return _drive(ask)

    async def _answer_async(self, ask: _Ask) -> _Reply:
        if ask.policy.simple:
            call = ask.claim.call
            ask.rows = rows = (
                ask.store.quick(call) if ask.store.quick_is_prompt else await ask.store.rows_async(call)
            )
            last = rows[-1] if rows else None
            if isinstance(last, Run):
                last = (last.status, last.released, last.result, last.run)
            if last is not None and last[0] == "success" and not last[1]:
                return self._answer_done(ask, last[3], last[2])
        self._before_claim(ask)
        return await _drive_async(ask)

    def _ask(
        self, tool: _Tool, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], forced: bool = False
    ) -> _Ask:
        """Name the call: everything that can go wrong here goes wrong before anything runs."""
        if tool.generation != self._generation:
            self._apply_policy(tool)
        policy = tool.policy
        bound = tool.bind(args, kwargs)
        ask = _Ask()
        ask.guard, ask.tool, ask.policy, ask.args, ask.kwargs = self, tool, policy, args, kwargs
        ask.store = self._opened or self._open()
        ask.rows = ("unknown",)
        wf = self._scope.get() or self._main_scope or self._default_workflow()
        form, shown_key = self._identity(tool, key, bound)
        receiver = self._receiver_form(tool, bound) if tool.receiver else "null"
        text = f"[{_quote(_FORM_VERSION)},{_quote(tool.name)},{_quote(wf)},{receiver},{form}]"
        ask.claim = claim = _Claim()
        claim.call = hashlib.sha256(text.encode()).hexdigest()[:32]
        claim.tool, claim.wf, claim.key = tool.name, wf, shown_key
        claim.caller = self._who.get() or self._main_who or ""
        claim.max, claim.ttl, claim.lease = policy.max, policy.ttl, policy.timeout
        claim.on_doubt = "reconcile" if callable(policy.on_doubt) else policy.on_doubt
        claim.forced, claim.not_done, claim.args = forced, None, None
        claim.matched = self._match_form(claim.call, tool, policy, bound) if policy.match else None
        claim.token = ""
        ask.shown = _Shown(policy.redact)
        ask.bound = bound
        return ask

    def _before_claim(self, ask: _Ask) -> None:
        """What only an attempt that may run needs."""
        claim, bound = ask.claim, ask.bound
        claim.token = new_token()
        claim.caller = claim.caller or f"pid {ask.pid}"
        shown = {n: bound[n] for n, _ in ask.tool.ordered}
        text = ask.shown.text(shown)
        claim.args = text if ask.policy.record in ("all", "no-result") else None
        if claim.key and ask.shown.secrets:
            claim.key = json.dumps(ask.shown.scrub(json.loads(claim.key)))
        if claim.key is None and not ask.policy.unlimited:
            self._watch_burst(ask, bound)

    def _identity(self, tool: _Tool, key: Any, bound: dict[str, Any]) -> tuple[str, str | None]:
        """The canonical text that tells this call from others, and the key as it is shown."""
        policy = tool.policy
        if key is None and policy.key is None:
            return tool.form(bound, policy.ignore), None
        if key is None and callable(policy.key):
            key = policy.key(**{n: v for n, v in tool.named(bound).items() if n != tool.rest})
        elif key is None:
            values = tool.named(bound)
            key = [values.get(name) for name in cast("tuple[str, ...]", policy.key)]
            if all(_is_empty(v) for v in key):
                key = None
        if _is_empty(key):
            raise UsageError(f"{_short(tool.name)} did not run: its key is empty; a key must name one action")
        return _tagged("key", tool._part("key", key)), json.dumps(_Shown(policy.redact).of(key))

    def _match_form(self, call: str, tool: _Tool, policy: Policy, bound: dict[str, Any]) -> str:
        """Digests, not values: what must agree may be secret."""
        values = tool.named(bound)
        digests = {
            n: hashlib.sha256(f"{call}{tool._part(n, values.get(n))}".encode()).hexdigest()[:16]
            for n in sorted(policy.match)
        }
        return json.dumps(digests)

    def _receiver_form(self, tool: _Tool, bound: dict[str, Any]) -> str:
        """A method counts the object it belongs to, where that has a stable form."""
        receiver = bound[next(iter(tool.parameters.parameters))]
        try:
            return canonical(receiver)
        except (UnstableArgument, RecursionError):
            pass
        first = self._receivers.setdefault(tool.name, receiver)
        if first is not receiver and first is not None:
            self._receivers[tool.name] = None
            self._say(
                f"⚠  {_short(tool.name)} is called on two objects that have no stable form, so their calls "
                "count as the same; tell them apart with name=… or a __ledger_key__() method"
            )
        return _tagged("instance", _quote(_type_name(type(receiver))))

    def _watch_burst(self, ask: _Ask, bound: dict[str, Any]) -> None:
        name = ask.claim.tool
        burst = self._bursts.setdefault(name, _Burst())
        if burst.warned:
            return
        forms = {n: _constant(bound[n]) for n, _ in ask.tool.ordered if n not in ask.policy.ignore}
        changed = burst.changed(ask.claim.call, forms)
        if changed is None:
            return
        which = "" if len(changed) == len(forms) > 1 else f" (only {', '.join(changed)} changes)"
        if len(changed) > 1 and which:
            which = f" ({', '.join(changed)} change)"
        self._say(f"⚠  {_short(name)} called 3× with different args in <10s{which} — if retrying, add key=…")

    # -- what a duplicate gets --

    def _answer_done(self, ask: _Ask, run: int, result: str | None) -> _Reply:
        if not ask.policy.replay or result is None:
            return self._answer_blocked(ask, run, "already done")
        self._count(ask, run)
        value = json.loads(result) if '"$"' not in result else ask.tool.restore(result)
        if not self._is_quiet():
            self._say(f"↺ {self._shown_name(ask.claim.tool)} replayed")
        return _Reply("waited" if ask.waited else "replayed", value)

    def _answer_blocked(self, ask: _Ask, run: int, why: str) -> _Reply:
        self._count(ask, run)
        if not self._is_quiet():
            self._say(f"⊘ {self._shown_name(ask.claim.tool)} blocked: {why}")
        value = ask.policy.blocked_return
        if value is _NOTHING:
            return _Reply("blocked", None)
        if callable(value):
            return _Reply("blocked", value(ask.store.describe(ask.store.rows(ask.claim.call))))
        import copy

        return _Reply("blocked", copy.deepcopy(value))

    def _count(self, ask: _Ask, run: int) -> None:
        if not ask.claim.caller:
            ask.claim.caller = f"pid {ask.pid}"
        ask.store.count(ask.claim.call, run, "blocked", ask)
        if self._on_block:
            self._tell(self._on_block, ask.store.describe(ask.store.rows(ask.claim.call)))

    def _after_settle(self, ask: _Ask, ending: _Settle) -> None:
        name = ask.claim.tool
        if not self._is_quiet():
            mark = {"success": "✓", "failed": "✗", "suspended": "⏸"}.get(ending.status, "?")
            told = f"   → {ending.error.splitlines()[0]}" if ending.error else ""
            self._say(f"{mark} {self._shown_name(name)}{told}")
        told_to = {"success": self._on_success, "failed": self._on_failure, "doubt": self._on_doubt}
        callbacks = told_to.get(ending.status)
        if callbacks:
            rows = ask.store.rows(ask.claim.call)
            if rows:
                self._tell(callbacks, ask.store.describe(rows))

    def _tell(self, callbacks: list[Callable[[Record], object]], record: Record) -> None:
        """A callback's exception never reaches the tool's caller, and never vanishes."""
        for callback in callbacks:
            try:
                callback(record)
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
        try:
            tool = self._tools[fn]
        except (KeyError, TypeError):
            pass
        else:
            return tool, args, kwargs
        made = getattr(fn, "__ledger_tool__", None)
        if isinstance(made, _Tool):
            owner = getattr(fn, "__self__", None)
            lead, preset = fn.__ledger_lead__
            return made, lead + (args if owner is None else (owner, *args)), {**preset, **kwargs}
        _refuse_uncallable(fn, "guard")
        function, first, named, name, receiver = _resolve_callable(fn)
        inner = getattr(function, "__ledger_tool__", None)
        if isinstance(inner, _Tool):
            lead, preset = function.__ledger_lead__
            return inner, lead + first + args, {**preset, **named, **kwargs}
        try:
            found = self._tools.get(function)
        except TypeError:
            found = None
        if found is None or found.own_name != name:
            found = _Tool(function, name, receiver=receiver)
            self._refuse_twins(found)
            if not first and not named:
                try:
                    self._tools[function] = found
                except TypeError:
                    pass
        return found, first + args, {**named, **kwargs}

    def _refuse_twins(self, tool: _Tool) -> None:
        """Functions that only their bytecode tells apart must be named, or one would never run."""
        code = getattr(tool.function, "__code__", None)
        if "#" not in tool.own_name or code is None:
            return
        known = self._digests.setdefault(tool.own_name, code.co_code)
        if known != code.co_code:
            raise UsageError(
                f"two different functions are both called {tool.own_name}; nothing ran. Tell them apart: "
                "@guard.once(name=…) or guard.policy(fn, name=…)"
            )

    def _apply_policy(self, tool: _Tool) -> None:
        names = (_short(tool.own_name), tool.options.get("name") or "", tool.own_name)
        own = _layered(tool.options, *(self._policies.get(n, {}) for n in dict.fromkeys(names)))
        if tool.rest is None:
            self._check_names(tool, own)
        tool.policy = Policy(**_layered(self._defaults_for(tool), own))
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
        name, tool = (fn, None) if isinstance(fn, str) else self._named(fn)
        merged = cast("PolicyOptions", {**self._policies.get(name, {}), **options})
        Policy(**merged)
        before = self._policies.get(name)
        self._policies[name] = merged
        self._generation += 1
        if tool is not None:
            try:
                self._apply_policy(tool)
            except PolicyError:
                self._policies.pop(name)
                if before is not None:
                    self._policies[name] = before
                raise

    def _named(self, fn: Any) -> tuple[str, _Tool]:
        tool = self._tool_for(fn, (), {})[0]
        return tool.own_name, tool

    def defaults(self, **options: Unpack[PolicyOptions]) -> None:
        """Set options for all tools; what a tool's own policy says wins."""
        merged = cast("PolicyOptions", {**self._defaults, **options})
        Policy(**merged)
        self._defaults = merged
        self._generation += 1

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
        if isinstance(getattr(fn, "__ledger_tool__", None), _Tool):
            if options:
                raise UsageError(
                    f"{where}: {_brief(fn)} is guarded already; use guard.policy for more options"
                )
            return fn
        if isinstance(fn, classmethod):
            return classmethod(self._wrap(fn.__func__, options, where))
        _refuse_uncallable(fn, where)
        kind = staticmethod if isinstance(fn, staticmethod) else None
        function, first, named, name, receiver = _resolve_callable(fn)
        tool = _Tool(function, name, receiver=receiver)
        self._refuse_twins(tool)
        tool.options = options
        self._apply_policy(tool)
        wrapper: Any
        if tool.is_async:

            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                return await self._run_async(tool, None, first + args, {**named, **kwargs})

            wrapper = guarded_async
        else:

            def guarded(*args: Any, **kwargs: Any) -> Any:
                return self._run(tool, None, first + args, {**named, **kwargs}).value

            wrapper = guarded
        _dress(wrapper, fn)
        wrapper.__ledger_tool__ = tool
        wrapper.__ledger_lead__ = (first, named)  # of a method, a partial or a callable object
        return kind(wrapper) if kind else wrapper

    def wrap_tools(self, tools: Tools, **options: Unpack[PolicyOptions]) -> Tools:
        """The same kind of collection with every tool guarded; wrapping twice guards once."""
        Policy(**options)
        if isinstance(tools, dict):
            wrapped = tools.copy()  # a subclass knows how to copy itself
            wrapped.update({n: self._wrap_one(t, options) for n, t in tools.items()})
            return cast("Tools", wrapped)
        if isinstance(tools, list | tuple):
            make: Any = getattr(tools, "_make", type(tools))
            return cast("Tools", make([self._wrap_one(t, options) for t in tools]))
        raise UsageError(
            f"wrap_tools takes a dict or a list of functions, not {type(tools).__name__}; for one function "
            "use guard.once(fn)"
        )

    def _wrap_one(self, fn: Any, options: PolicyOptions) -> Any:
        if isinstance(getattr(fn, "__ledger_tool__", None), _Tool):
            return fn
        return self._wrap(fn, options, "guard.wrap_tools")

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
        ask, rows = self._existing(fn, args, kwargs)
        if not rows:
            return False
        op = _make(
            _Release, call=ask.claim.call, token=new_token(), run=rows[-1].run, owner=rows[-1].owner,
            max=ask.policy.max, ttl=ask.policy.ttl, why=self._who.get() or "retry",
        )  # fmt: skip
        self._refuse_live(ask, ask.store.transact(op), "released")
        return True

    def resolve(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        result: Any = _NOTHING,
        done: bool = True,
        note: str = "",
        **kwargs: Any,
    ) -> None:
        """Settle a call that is in doubt: it happened (`result=…`), or it did not (`done=False`).

        Raises `InProgress` while a live run holds the call and `UsageError` if nothing is in doubt.
        """
        if not done and result is not _NOTHING:
            raise UsageError("resolve: what was not done has no result; give result=… or done=False")
        ask, rows = self._existing(fn, args, kwargs)
        if not rows:
            raise UsageError(f"{_short(ask.claim.tool)}: nothing was resolved: this call was never made")
        value = None if result is _NOTHING else result
        op = _make(
            _Resolve, call=ask.claim.call, token=new_token(), run=rows[-1].run, owner=rows[-1].owner,
            done=done, result=_Course(ask)._stored(value) if done and result is not _NOTHING else None,
            reconciled=False, why=note or self._who.get() or "resolve",
        )  # fmt: skip
        verdict = ask.store.transact(op)
        self._refuse_live(ask, verdict, "resolved")
        if verdict.kind != "resolved":
            record = ask.store.describe(ask.store.rows(ask.claim.call))
            raise UsageError(
                f"{record.short}: nothing was resolved: run {record.run} of call {record.call} is "
                f"{record.status.upper()}, not in doubt; to run it again use guard.retry"
            )

    def force(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run now, whatever the history says, and record it; raises `InProgress` beside a live run."""
        tool, args, kwargs = self._tool_for(fn, args, kwargs)
        ask = self._ask(tool, _explicit_key(tool, kwargs), args, kwargs, forced=True)
        self._before_claim(ask)
        if tool.is_async:
            return cast("T", self._force_async(ask))
        rows = ask.store.rows(ask.claim.call)
        if rows:
            self._refuse_live(ask, ask.claim.judge(rows, ask.store.now_for(rows)), "run")
        reply = _drive(ask)
        if reply.error is not None:
            raise reply.error
        return cast("T", reply.value)

    async def _force_async(self, ask: _Ask) -> Any:
        rows = await ask.store.rows_async(ask.claim.call)
        if rows:
            self._refuse_live(ask, ask.claim.judge(rows, ask.store.now_for(rows)), "run")
        reply = await _drive_async(ask)
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _existing(self, fn: Any, args: Any, kwargs: Any) -> tuple[_Ask, list[Run]]:
        tool, args, kwargs = self._tool_for(fn, args, kwargs)
        ask = self._ask(tool, _explicit_key(tool, kwargs), args, kwargs)
        ask.shown.text(
            {n: ask.bound[n] for n, _ in tool.ordered}
        )  # a result told by hand may repeat a secret
        return ask, ask.store.rows(ask.claim.call)

    def _refuse_live(self, ask: _Ask, verdict: _Verdict, what: str) -> None:
        if verdict.kind == "live" and verdict.row is not None:
            record = ask.store.describe([verdict.row])
            raise InProgress(
                f"{record.short} was not {what}: run {record.run} of call {record.call} is running in "
                f"{record.holder} since {_clock_text(record.started)}; wait for it, or stop that process",
                record,
            )

    # -- looking --

    def stats(self) -> dict[str, Any]:
        """Sums over all calls, and per tool under "tools"."""
        tools = self._ready().totals()
        sums = {name: sum(t[name] for t in tools.values()) for name in _TOTALS}
        return {**sums, "tools": tools}

    def log(self) -> None:
        """Print one line per tool to stdout."""
        tools = self._ready().totals()
        shown = {t: _short(t) if sum(_short(o) == _short(t) for o in tools) == 1 else t for t in tools}
        width = max((len(n) for n in shown.values()), default=0)
        errors = self._last_errors([t for t, s in tools.items() if s["failed"]])
        for tool, sums in sorted(tools.items(), key=lambda item: shown[item[0]]):
            mark = "✗" if sums["failed"] else "?" if sums["in_doubt"] else "✓"
            line = (
                f"{mark} {shown[tool]:<{width}} attempts {sums['attempts']:<3} executed {sums['executed']:<3}"
            )
            line += f" blocked {sums['blocked']}" if sums["blocked"] else ""
            line += f" in doubt {sums['in_doubt']}" if sums["in_doubt"] else ""
            line += f" → {errors[tool]}" if tool in errors else ""
            print(line.rstrip())

    def _last_errors(self, tools: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for tool in tools:
            for record, _ in self._ready().calls(tool=tool):
                if record.status is Status.FAILED and record.error:
                    found[tool] = record.error.splitlines()[0]
        return found

    @overload
    def history(self, *, tool: str | None = None, wf: str | None = None) -> list[dict[str, Any]]: ...
    @overload
    def history(
        self, *, tool: str | None = None, wf: str | None = None, stream: Literal[True]
    ) -> Iterator[dict[str, Any]]: ...
    def history(self, *, tool: str | None = None, wf: str | None = None, stream: bool = False) -> Any:
        """One JSON-safe dict per call, oldest first, its runs inside; `stream=True` for an iterator."""
        store = self._ready()
        store.flush()
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

    def on_success(self, callback: Callable[[Record], object]) -> None:
        """Call it with the record after each run that succeeded."""
        self._on_success.append(callback)

    def on_block(self, callback: Callable[[Record], object]) -> None:
        """Call it with the record after each attempt that ran nothing."""
        self._on_block.append(callback)

    def on_failure(self, callback: Callable[[Record], object]) -> None:
        """Call it with the record after each run that failed."""
        self._on_failure.append(callback)

    def on_doubt(self, callback: Callable[[Record], object]) -> None:
        """Call it with the record when a run turns out to be in doubt."""
        self._on_doubt.append(callback)

    def persist(self, url: str | os.PathLike[str]) -> None:
        """Keep the records in another file from now on."""
        self.close()
        self._url, self._given_store, self._opened = os.fspath(url), None, None

    def quiet(self, quiet: bool = True) -> None:
        """Print no notices; warnings about what could not be recorded stay."""
        self._quiet = quiet

    def _is_quiet(self) -> bool:
        if self._quiet is None:
            self._quiet = os.environ.get("LEDGER_QUIET", "") not in ("", "0", "false", "no")
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
        settings = self._settings
        self._url = self._resolved_url()
        self._opened = _open_store(self._url, **cast("Any", settings))
        if isinstance(self._opened, SqliteStore):
            self._opened.quiet = self._is_quiet()
        return self._opened


def _explicit_key(tool: _Tool, kwargs: dict[str, Any]) -> Any:
    """Take the guard's own key out of the arguments; an empty one is refused, not ignored."""
    for name in ("ledger_key", "key"):
        if name in kwargs and not (name == "key" and tool.takes_key):
            key = kwargs.pop(name)
            return "" if key is not None and _is_empty(key) else key
    return None


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
    if not hasattr(shown, "__name__"):
        shown = type(shown).__call__
        wrapper.__name__ = wrapper.__qualname__ = type(fn).__name__
        wrapper.__doc__ = type(fn).__doc__
        wrapper.__wrapped__ = fn
    else:
        functools.update_wrapper(wrapper, shown)
        wrapper.__wrapped__ = fn
    try:
        hints = typing.get_type_hints(shown, include_extras=True)
    except Exception:  # a name that exists only for type checkers: leave the strings
        hints = None
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        return
    if hints is not None:
        wrapper.__annotations__ = {
            n: h for n, h in hints.items() if n in signature.parameters or n == "return"
        }
        parts = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()]
        returned = hints.get("return", signature.return_annotation)
        signature = signature.replace(parameters=parts, return_annotation=returned)
    wrapper.__signature__ = signature


def _history_entry(record: Record, rows: Sequence[Run]) -> dict[str, Any]:
    times = {n: _iso(getattr(record, n)) for n in ("created", "touched", "started", "ended", "lease")}
    return {
        "id": record.id, "call": record.call, "tool": record.tool, "wf": record.wf,
        "caller": record.caller, "owner": record.owner, "key": record.key and json.loads(record.key),
        "args": record.args, "status": record.status.value, "in_doubt": record.in_doubt,
        "result": record.result_json and json.loads(record.result_json), "error": record.error,
        "attempts": record.attempts, "executed": record.runs, "blocked": record.blocked,
        "run": record.run, "released": record.released, "late": record.late, **times,
        "runs": [_history_run(r) for r in rows],
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
            tool, args, kwargs = self._guard._tool_for(fn, args, kwargs)
            key = _explicit_key(tool, kwargs)
            if not tool.is_async:
                return cast("T", self._guard._run(tool, key, args, kwargs).value)
            ask = self._guard._ask(tool, key, args, kwargs)
        finally:
            self._variable.set(before)
        return cast("T", self._call_async(ask))

    async def _call_async(self, ask: _Ask) -> Any:
        before = self._variable.get()
        self._variable.set(self._value)
        try:
            reply = await self._guard._answer_async(ask)
        finally:
            self._variable.set(before)
        if reply.error is not None:
            raise reply.error
        return reply.value

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
