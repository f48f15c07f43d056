"""Telling somebody something once: one delivery per key, none within a cooldown, in doubt until a person knows.

        reserve            claim              enter               send     settle
    ── in the tasks' ── of the guard, ── in the tasks' store: ── yours ── guard, then
       store: no other    one run for       is the reservation              tasks' store
       within cooldown    this key          still ours?

What was reserved and never entered was not sent: another may give it up after `RESERVED` seconds, and whoever wakes
up later is refused at `enter`. From there on the guard's record of the call is the truth, whatever became of the
process: it runs, was sent, failed, or is in doubt. A row that is not settled yet is read so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ledger import Guard, InDoubt, LedgerError, NotPerformed, Record, UsageError
from ledger_tasks.book import Book, Posting
from ledger_tasks.model import at, plain, refuse_odd

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

Outcome = Literal["sent", "suppressed", "failed", "in_doubt", "running"]
#: how long a reservation holds that nobody entered; then its sender is taken to be gone
RESERVED: Final = 60.0
#: what the guard calls a delivery
TOOL: Final = "ledger_tasks.deliver"
_GONE: Final = "its sender was gone before it began"
_PAGE: Final = 500
_ERROR_CHARS: Final = 500


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of one delivery."""

    key: str
    recipient: str
    channel: str
    #: sent · suppressed (see `why`) · failed (may be tried again) · in_doubt (until resolved) · running
    outcome: Outcome
    why: str
    at: datetime
    #: fingerprint of its guarded call, for `ledger show` and `ledger resolve`
    call: str

    @property
    def sent(self) -> bool:
        """Whether it is certain that it was."""
        return self.outcome == "sent"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something would be sent now; as a condition it is that, and `why` is the reason."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok


# -- asking and sending --


def deliver(
    ledger: TaskLedger, send: Callable[[], Any], *, recipient: str, channel: str, key: str, cooldown: float
) -> Delivery:
    """Send it unless it was sent before or comes too soon; what `send` raises is recorded and raised."""
    return _Desk(ledger, _Asked(recipient, channel, key, cooldown)).deliver(send)


def should_deliver(ledger: TaskLedger, *, recipient: str, channel: str, key: str, cooldown: float) -> Verdict:
    """What `deliver` would do now; reserves nothing."""
    desk = _Desk(ledger, _Asked(recipient, channel, key, cooldown))
    return desk.look().verdict


def deliveries(ledger: TaskLedger) -> list[Delivery]:
    """Every delivery, oldest first."""
    found: list[Delivery] = []
    after = 0
    calls = ledger.store.calls()

    def look(book: Book) -> tuple[list[Posting], int]:
        return book.postings(after, _PAGE), book.now

    while True:
        page, now = ledger.store.read(ledger.session, look)
        if not page:
            return found
        found += (_told(one, calls.look(one.call) if one.until else None, now) for one in page)
        after = page[-1].num


def workflow_of(session: str) -> str:
    """The guard's workflow of a session's deliveries."""
    return f"deliveries:{session}"


# -- judging --


class _Asked(NamedTuple):
    """What is to be sent: to whom, on which channel, under which key, and how long after the last one."""

    recipient: str
    channel: str
    key: str
    cooldown: float

    def related(self, book: Book) -> list[Posting]:
        """Whatever there may be to keep it from being sent."""
        since = book.now - int(self.cooldown * 1e6)
        return book.postings_to(self.recipient, self.channel, self.key, since)

    def __str__(self) -> str:
        on = f" on {self.channel}" if self.channel else ""
        return f"{self.key!r} to {self.recipient}{on}"


class _Known(NamedTuple):
    """What is related to a delivery, and what the guard knows of the calls of that."""

    rows: Sequence[Posting]
    records: Mapping[str, Record | None]
    verdict: Verdict


def _standing(record: Record | None) -> Outcome:
    """Where a guarded delivery stands; one that the guard does not know (any more) may be tried again."""
    if record is None or record.released:
        return "failed"
    if record.status == "success" or record.late == "success":
        return "sent"
    if record.in_doubt:
        return "in_doubt"
    return "running" if record.status == "running" else "failed"


def _judge(
    asked: _Asked, call: str, known: Mapping[str, Record | None], rows: Sequence[Posting], now: int
) -> Verdict:
    """Whether it may be sent: first what is known of this very key, then what that recipient got otherwise."""
    own = known.get(call)
    mine = [row for row in rows if row.key == asked.key and row.outcome != "suppressed"]
    if (
        own is None and mine and mine[-1].outcome == "sent"
    ):  # the guard's record was cleared away, the fact stays
        return Verdict(ok=False, why=f"{asked} was sent at {_clock(mine[-1].at)}")
    if own is not None and (told := _told_of(asked, own)):
        return Verdict(ok=False, why=told)
    if any(row.outcome == "reserved" and row.until > now for row in mine):
        return Verdict(ok=False, why=f"{asked} is being sent by another at this moment")
    last = max((row.at for row in rows if asked.cooldown and _counts(row, known, now)), default=None)
    if last is not None and now - last < asked.cooldown * 1e6:
        left = asked.cooldown - (now - last) / 1e6
        return Verdict(
            ok=False,
            why=f"{asked.recipient} got something, or may have got it, at {_clock(last)}; the cooldown of "
            f"{asked.cooldown:g} s ends in {left:.1f} s",
        )
    return Verdict(ok=True, why=f"{asked} was not sent, and no cooldown runs")


def _told_of(asked: _Asked, own: Record) -> str:
    """Why the guard's record keeps this key from being sent; "" if it does not."""
    if (standing := _standing(own)) == "sent":
        return f"{asked} was sent at {_clock(own.ended or own.started)}"
    if standing == "in_doubt":
        return (
            f"{asked} is in doubt: its send began at {_clock(own.started)} and nobody knows whether it arrived. Find "
            f"out, then `ledger resolve {own.call[:12]} --done` or `--not-done`"
        )
    return f"{asked} is being sent since {_clock(own.started)}" if standing == "running" else ""


def _counts(row: Posting, known: Mapping[str, Record | None], now: int) -> bool:
    """Whether this was sent, may have been sent, or is about to be."""
    if row.outcome == "sending":
        return _standing(known.get(row.call)) != "failed"
    return row.outcome == "sent" or (row.outcome == "reserved" and row.until > now)


def _clock(micros: int) -> str:
    return at(micros).isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"


# -- what is done in a transaction --


def _reserve(book: Book, asked: _Asked, call: str, known: _Known) -> tuple[Verdict, Posting] | None:
    """Decide and write that down, so that nobody decides the same; None if something changed since it was looked at."""
    book.hold_graph()  # lets one at a time decide, also where rows alone are held
    rows, now = asked.related(book), book.now
    if rows != known.rows:
        return None
    verdict = _judge(asked, call, known.records, rows, now)
    _settle_known(book, rows, known.records)
    outcome, why, until = (
        ("reserved", "", now + int(RESERVED * 1e6)) if verdict else ("suppressed", verdict.why, 0)
    )
    new = Posting(0, asked.recipient, asked.channel, asked.key, outcome, why, call, now, until)
    last = _last_of(rows, asked.key)
    if last is not None and outcome == last.outcome == "suppressed":  # asked a hundred times, it is one row
        new = new._replace(num=last.num)
    book.post(new)
    kept = _last_of(asked.related(book), asked.key)
    return verdict, kept or new


def _last_of(rows: Sequence[Posting], key: str) -> Posting | None:
    return max((row for row in rows if row.key == key), default=None)


def _settle_known(book: Book, rows: Sequence[Posting], known: Mapping[str, Record | None]) -> None:
    """Write down what the guard knows of those that nobody settled, and give up what was never entered."""
    for row in rows:
        if row.outcome == "reserved" and row.until <= book.now:
            book.post(row._replace(outcome="failed", why=_GONE, until=0))
        elif row.outcome == "sending" and (told := _told(row, known.get(row.call))).outcome in (
            "sent",
            "failed",
        ):
            book.post(row._replace(outcome=told.outcome, why=told.why, until=0))


def _enter(book: Book, num: int) -> bool:
    """Begin to send; False if the reservation was given up meanwhile."""
    row = book.posting(num)
    if row is None or row.outcome != "reserved":
        return False
    book.post(row._replace(outcome="sending", at=book.now))
    return True


def _settle(book: Book, num: int, outcome: Outcome, why: str) -> Posting:
    row = book.posting(num)
    assert row is not None  # noqa: S101 - deliveries are never deleted
    if row.until:
        row = row._replace(outcome=outcome, why=why, at=book.now, until=0)
        book.post(row)
    return row


def _told(row: Posting, record: Record | None, now: int = 0) -> Delivery:
    """A row as people see it; `record` is the guard's where the row is not settled."""
    outcome, why = row.outcome, row.why
    if outcome == "reserved":
        outcome, why = ("failed", _GONE) if row.until <= now else ("running", why)
    elif outcome == "sending":
        outcome = _standing(record)
        why = (record.error or "") if record is not None and outcome != "sent" else why
        why = why or {
            "failed": "it is known that it was not sent",
            "in_doubt": "its sender ended while sending",
        }.get(outcome, "")
    shown: Any = outcome
    return Delivery(row.key, row.recipient, row.channel, shown, why, at(row.at), row.call)


# -- one delivery --


class _GivenUp(NotPerformed):
    """The reservation was given up before it was entered: somebody took this process for dead."""


def _send(enter: Callable[[], bool], send: Callable[[], Any]) -> Any:
    """What the guard runs."""
    if not enter():
        raise _GivenUp("the reservation was given up before it was used; nothing was sent")
    return send()


class _Desk:
    """Where one delivery is decided and carried out."""

    def __init__(self, tasks: TaskLedger, asked: _Asked) -> None:
        for name in ("recipient", "channel", "key"):
            text = refuse_odd(getattr(asked, name), f"the {name} of a delivery")
            if not text.strip() and name != "channel":
                raise UsageError(f"the {name} of a delivery is empty; nothing was sent")
        if isinstance(asked.cooldown, bool) or not 0 <= asked.cooldown < 1e9:
            raise UsageError(
                f"cooldown={asked.cooldown!r} is not a number of seconds from 0 on; nothing was sent"
            )
        self._tasks, self._asked = tasks, asked
        self._calls = tasks.store.calls()
        self._guard = Guard(store=self._calls, workflow=workflow_of(tasks.session), quiet=True)
        self._tool = self._guard.once(name=TOOL, on_doubt="block", record="nothing")(_send)
        self._key = [asked.channel, asked.recipient, asked.key]
        self._call = self._guard._attempt(self._tool, (None, None), {"key": self._key}).claim.call

    def look(self) -> _Known:
        """What there is to know, and what follows from it now."""

        def look(book: Book) -> tuple[list[Posting], int]:
            return self._asked.related(book), book.now

        rows, now = self._tasks.store.read(self._tasks.session, look)
        calls = {self._call, *(row.call for row in rows if row.until)}
        records = {call: self._calls.look(call) for call in calls}
        return _Known(rows, records, _judge(self._asked, self._call, records, rows, now))

    def deliver(self, send: Callable[[], Any]) -> Delivery:
        """Reserve, send, settle."""
        verdict, row = self._reserve()
        if not verdict:
            return _told(row, None)
        entered = []

        def enter() -> bool:
            entered.append(self._write(_enter, row.num))
            return bool(entered[0])

        try:
            with self._guard.as_caller(self._tasks.agent):
                outcome = self._guard.call(self._tool, enter, send, key=self._key)
        except _GivenUp as error:
            return replace(_told(row, None), outcome="suppressed", why=str(error))
        except InDoubt as error:
            if any(entered):  # one that `send` itself met
                self._settle_quietly(row, "failed", _brief(error))
                raise
            return _told(self._write(_settle, row.num, "suppressed", str(error)), None)
        except Exception as error:
            self._settle_quietly(row, "failed", _brief(error))
            raise
        if outcome.blocked:
            return _told(
                self._write(_settle, row.num, "suppressed", f"{self._asked} is sent by another"), None
            )
        return self._settle_quietly(row, "sent", "")

    def _reserve(self) -> tuple[Verdict, Posting]:
        while True:
            known = self.look()
            reserved: tuple[Verdict, Posting] | None = self._write(_reserve, self._asked, self._call, known)
            if reserved is not None:
                return reserved

    def _settle_quietly(self, row: Posting, outcome: Outcome, why: str) -> Delivery:
        """What happened is in the guard's record: that it cannot be told here too changes nothing about it."""
        with suppress(LedgerError):
            row = self._write(_settle, row.num, outcome, why)
        return replace(_told(row, None), outcome=outcome, why=why)

    def _write(self, work: Callable[..., Any], *args: Any) -> Any:
        return self._tasks.store.write(self._tasks.session, lambda book: work(book, *args))


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_ERROR_CHARS]
