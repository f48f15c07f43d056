"""A Redis namespace as one side of a move. Each step is one run of the store's script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import redis

from ledger import Run
from ledger_stores.move import SEALED, Entry, Mark, Side, Whole, must_step, refuse_full
from ledger_stores.redis import (
    _CONNECT_SECONDS,
    _TALLY,
    RedisStore,
    _exchange,
    _or_none,
    _pairs,
    _rows_from,
    _text,
)

_TEXTS = ("key", "args", "matched", "result", "error", "trace")
#: what the script keeps of a run as one JSON object of strings; a 0 and a null are absent
_ROW = (
    "tool", "wf", "caller", "owner", "started", "lease", "status", "ended", "closed_by", "released", "forced",
    "late", "late_at",
)  # fmt: skip
_NEEDED = frozenset(("tool", "wf", "caller", "owner", "started", "lease", "status"))
#: how many calls are taken away in one step
_FORGET = 500


class RedisSide(Side):
    """One namespace."""

    def __init__(self, store: RedisStore) -> None:
        self.store: RedisStore = store

    # -- looking --

    def exists(self) -> bool:
        """Whether there is a ledger; never makes one."""
        connections = self.store._connect(_CONNECT_SECONDS)
        try:
            return bool(connections.use(_exchange, [("EXISTS", self.store._meta)])[0])
        except redis.RedisError as error:
            raise self.store._translated(error) from error
        finally:
            connections.close()

    def is_empty(self) -> bool:
        """Whether it holds neither a call, nor a tally, nor an event."""
        keys = (f"{self.store._prefix}{name}" for name in ("calls", "tallies", "events"))
        return self.store._look(("EXISTS", *keys)) == [0]

    def mark(self) -> Mark | None:
        """How it stands in a move; None where it is in none."""
        return Mark.read(_or_none(self.store._look(("HGET", self.store._meta, "move"))[0]))

    def names(self, after: str, limit: int, wf: str | None = None) -> list[tuple[str, str]]:
        """(place, call) of calls after that place, by the event of their first claim; then those with tallies."""
        place, named = after[1:] or "0", list[tuple[str, str]]()
        for kind, index in (("r", "calls"), ("t", "tallies")):
            if after[:1] == "t" and kind == "r":
                continue
            key = f"{self.store._prefix}{index}" + ("" if wf is None else f":{wf}")
            page = ("ZRANGEBYSCORE", key, f"({place}", "+inf", "WITHSCORES", "LIMIT", 0, limit - len(named))
            found = _pairs(self.store._look(page)[0])
            named += [(f"{kind}{_text(score)}", _text(call)) for call, score in found]
            if len(named) == limit:
                break
            place = "0"
        return named

    def fetch(self, calls: Sequence[str]) -> list[Whole]:
        """Each of these calls as it is now, its rows in one view."""
        if not calls:
            return []
        keys = [f"{self.store._prefix}{kind}:{call}" for call in calls for kind in ("call", "tally")]
        found = self.store._look(*(("HGETALL", key) for key in keys))
        rows = [_rows_from(call, flat) for call, flat in zip(calls, found[::2], strict=True)]
        tallies = [_tally(call, flat) for call, flat in zip(calls, found[1::2], strict=True)]
        owners = sorted({run.owner.partition(".")[0] for runs in rows for run in runs})
        known = self._processes(owners)
        return [
            Whole(
                call,
                runs,
                tally,
                [known[name] for name in {run.owner.partition(".")[0] for run in runs} if name in known],
            )
            for call, runs, tally in zip(calls, rows, tallies, strict=True)
        ]

    def _processes(self, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        if not names:
            return {}
        found = self.store._look(("HMGET", f"{self.store._prefix}processes", *names))[0]
        return {n: (n, *json.loads(told)) for n, told in zip(names, found, strict=True) if told}

    def open_calls(self) -> list[str]:
        """The calls whose newest run is open, alive or not."""
        fields = map(_text, self.store._look(("HKEYS", f"{self.store._prefix}totals"))[0])
        tools = [field[8:] for field in fields if field.startswith("actions ")]
        running = (f"{self.store._prefix}running:{tool}" for tool in tools)
        return [
            _text(call)
            for found in self.store._look(*(("ZRANGE", k, 0, -1) for k in running))
            for call in found
        ]

    def entries(self, after: int, limit: int) -> list[Entry]:
        """The events after that number, in their order."""
        page = ("XRANGE", f"{self.store._prefix}events", f"{after + 1}-0", "+", "COUNT", limit)
        return [_entry(number, fields) for number, fields in self.store._look(page)[0]]

    def last_certain(self) -> int:
        """The number of the newest event."""
        return self.store.last_seq()

    # -- writing --

    def step(
        self, was: Mark | None, now: Mark, calls: Sequence[Whole] = (), entries: Sequence[Entry] = ()
    ) -> None:
        """Make these calls what they are there, append these events and set the mark: one run of the script."""
        self._step(was, now, "first" if was is None and now.role == "receiving" else "", calls, entries)

    def unmark(self, was: Mark) -> None:
        """Take the mark away, and what it closed with it."""
        self._step(was, None)

    def erase(self, was: Mark, now: Mark) -> None:
        """Take away all calls and tallies, a page at a time, then all events."""
        while page := self.names("", _FORGET):
            self._step(was, was, "", [Whole(call, (), None) for _, call in page])
        self._step(was, now, "erase")

    def _step(
        self,
        was: Mark | None,
        now: Mark | None,
        how: str = "",
        calls: Sequence[Whole] = (),
        entries: Sequence[Entry] = (),
    ) -> None:
        processes = sorted({process for whole in calls for process in whole.processes})
        words = [
            was.text if was else "", now.text if now else "", _closes(now), how,
            len(calls), len(processes), len(entries),
        ]  # fmt: skip
        for whole in calls:
            words += _words(whole)
        for name, *about in processes:
            words += (name, json.dumps(about))
        for entry in entries:
            words += map(_value, entry[1:])
        kind, *found = self.store._ask("step", *words, replicas=self.store.replicas)
        if kind == b"full":
            raise refuse_full(self.address)
        if kind == b"found":
            must_step(Mark.read(_text(found[0])), was, now, self.address)


def _closes(now: Mark | None) -> str:
    """What the script is to refuse, and what it says then."""
    if now is None or not now.refusal:
        return ""
    return f"{'new' if now.role in SEALED else 'all'} {now.refusal}"


def _words(whole: Whole) -> Iterator[Any]:
    """A call as the script takes it."""
    yield from (whole.call, len(whole.rows), int(whole.tally is not None))
    for run in whole.rows:
        yield from (run.run, _row(run), *(_value(getattr(run, name)) for name in _TEXTS), run.blocked)
    yield from map(_value, (whole.tally or ())[1:])


def _row(run: Run) -> str:
    told = {name: value for name in _ROW if (value := getattr(run, name)) or name in _NEEDED}
    return json.dumps({name: str(value) for name, value in told.items()}, ensure_ascii=False)


def _value(value: Any) -> str:
    return "" if value is None else f"={value}"


def _entry(number: bytes, fields: Sequence[bytes]) -> Entry:
    found = {_text(name): _text(value) for name, value in _pairs(fields)}
    told: dict[str, Any] = {**dict.fromkeys(Entry._fields), **found}
    for name in ("run", "at", "n"):
        told[name] = None if told[name] is None else int(told[name])
    return Entry(**{**told, "seq": int(number.partition(b"-")[0])})


def _tally(call: str, flat: Sequence[bytes]) -> tuple[Any, ...] | None:
    if not flat:
        return None
    found = {_text(name): _text(value) for name, value in _pairs(flat)}
    numbers = {name: int(found[name]) for name in ("ran", "raised", "created", "touched")}
    return (call, *({**found, **numbers}.get(name) for name in _TALLY))
