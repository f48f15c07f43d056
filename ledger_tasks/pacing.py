"""When a worker may begin a task of a type: a rate that is not exceeded, and a breaker that opens when all fails."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ledger import UsageError

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RATE: Final = re.compile(r"\s*(\d{1,9})\s*/\s*(\d{0,9})\s*([smhd])\s*")


class Rate:
    """At most so many in any span of time: `10/s`, `100/m`, `5/10s`, `1000/d`. Raises `UsageError`."""

    def __init__(self, text: str) -> None:
        found = _RATE.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found[1]) == 0 or found[2] == "0":
            raise UsageError(f"the rate {text!r} is none; write for instance 10/s, 100/m or 5/10s")
        self.span = float(found[2] or 1) * _UNITS[found[3]]
        self._begun: deque[float] = deque(maxlen=int(found[1]))

    def wait(self, now: float) -> float:
        """Seconds until the next may begin."""
        if len(self._begun) < (self._begun.maxlen or 0):
            return 0.0
        return max(0.0, self._begun[0] + self.span - now)

    def begin(self, now: float) -> None:
        """One begins."""
        self._begun.append(now)


@dataclass(frozen=True, slots=True)
class Breaker:
    """`after` failures of a type in a row pause its claims for `seconds`; then one is tried alone."""

    after: int = 5
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if isinstance(self.after, bool) or not isinstance(self.after, int) or self.after < 1:
            raise UsageError(f"Breaker(after={self.after!r}) is not a whole number from 1 on")
        if not 0 < self.seconds < math.inf:
            raise UsageError(f"Breaker(seconds={self.seconds!r}) is not a number of seconds above 0")


class _Fuse:
    """A breaker of one type, and what it saw."""

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._failed = 0
        self._until = 0.0
        self._running = 0

    def wait(self, now: float) -> float:
        if self._failed < self._breaker.after:
            return 0.0
        # the one that is tried tells; until then no other begins
        return math.inf if self._running else max(0.0, self._until - now)

    def begin(self) -> None:
        self._running += 1

    def end(self, now: float, *, ok: bool | None) -> bool:
        """Whether that made it open."""
        self._running -= 1
        if ok:
            self._failed = 0
        elif ok is False:
            self._failed += 1
            self._until = now + self._breaker.seconds
            return self._failed == self._breaker.after
        return False


class Pace:
    """Rates and breakers of all types of a worker. Not for two threads at once."""

    def __init__(self, rates: Mapping[str, str] | None, breaker: Breaker | None) -> None:
        self._rates = {kind: Rate(text) for kind, text in (rates or {}).items()}
        self._breaker = breaker
        self._fuses: dict[str, _Fuse] = {}

    def wait(self, kind: str, now: float) -> float:
        """Seconds until a task of that type may begin; infinite: until one that runs has ended."""
        rate, fuse = self._rates.get(kind), self._fuses.get(kind)
        return max(rate.wait(now) if rate else 0.0, fuse.wait(now) if fuse else 0.0)

    def begin(self, kind: str, now: float) -> None:
        """A task of that type begins."""
        if kind in self._rates:
            self._rates[kind].begin(now)
        if self._breaker is not None:
            self._fuses.setdefault(kind, _Fuse(self._breaker)).begin()

    def end(self, kind: str, now: float, *, ok: bool | None) -> bool:
        """It ended well, badly, or in a way that says nothing of its type; whether its breaker opened by that."""
        fuse = self._fuses.get(kind)
        return fuse.end(now, ok=ok) if fuse else False
