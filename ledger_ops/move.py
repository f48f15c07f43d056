"""Moving a ledger to another store while its callers may still be running.

One side at a time lets runs begin: the source until it is sealed, the target from when it is opened, and
between the two moments neither. The target is closed while it receives; the seal is a barrier of the
source's own store, behind which no claim is left half done; runs that are alive then end on the source;
what has changed since the copy began is copied again, and only then the target opens, in one step.
A source without a log of all events (DynamoDB, MongoDB) is sealed first and copied then.

How far it came is kept in the marks of both sides (`ledger_stores.move`), each written together with what
it tells of, so the same command goes on where one was cut off.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ledger_stores as stores
from ledger import Claim, Record, Run, Settle, SqliteStore, StoreError, UsageError
from ledger_ops.acts import owners_of
from ledger_ops.reader import AnyStore, NoLedger, open_store, path_of, url_of
from ledger_ops.values import Progress
from ledger_stores.base import ServerStore
from ledger_stores.move import SEALED, SHUT, Entry, Mark, Side, Whole, must_step, refuse_full, side_of

#: how many events are carried in one step, and how many calls are copied in one at most
_EVENTS, _MOST_CALLS = 500, 200
#: about how many bytes of calls are held at one time
_BYTES = 2_000_000
_PAUSE = 0.2
#: how many calls that were made since the copy began are copied before the source is sealed to come to an end
_CHASED = 1000
#: how often both sides are compared before that is an error; half-way all is copied again
_COMPARISONS = 10
_ENDS = frozenset({"success", "failed", "suspended", "doubt", "late"})
#: where a late end is written beside the status: the status there, and the end
_TAKES_LATE = {("doubt", "success"), ("doubt", "failed"), ("failed", "success")}


class Moved(NamedTuple):
    """What a move came to."""

    state: Literal["moved", "late ends carried", "nothing new", "cancelled"]
    #: calls in the target, of unlimited tools too
    calls: int = 0
    #: ends that came to the source after the target was opened, and were written there now
    late_ends: int = 0


@contextmanager
def opened_sides(
    source: str, target: str, *, source_namespace: str | None = None, target_namespace: str | None = None
) -> Iterator[tuple[Side, Side]]:
    """The two sides of a move by their URLs, closed in the end; nothing is written, and no source is made.

    Raises `NoLedger` if there is no source, and `UsageError` for what cannot be a side, or for one
    ledger on both.
    """
    with closing(_opened(source, source_namespace, must_exist=True)) as here:
        left = side_of(here)
        if not left.exists():
            raise NoLedger(f"there is no ledger at {left.address}, nothing was written; name one that is")
        with closing(_opened(target, target_namespace)) as there:
            if _are_one(here, there):
                raise _same(left)
            yield left, side_of(there)


def _opened(url: str, namespace: str | None, *, must_exist: bool = False) -> AnyStore:
    text = url_of(url)
    if "://" in text:
        store = stores.open_store(text, namespace=namespace)
        assert isinstance(store, ServerStore)  # noqa: S101 - all that have a URL are
        return store
    if namespace is not None:
        raise UsageError(f"{text} is a file and has no namespaces; leave the namespace out")
    if must_exist:
        return open_store(text)
    file = SqliteStore(path_of(text))
    file.quiet = True
    return file


def _are_one(here: AnyStore, there: AnyStore) -> bool:
    if isinstance(here, SqliteStore) and isinstance(there, SqliteStore):
        return Path(there.path).exists() and Path(there.path).samefile(here.path)
    if isinstance(here, ServerStore) and isinstance(there, ServerStore):
        return (here.url, here.namespace) == (there.url, there.namespace)
    return False


def _same(side: Side) -> UsageError:
    return UsageError(f"{side.address} is the source and the target; name another place to move it to")


def _alive(side: Side) -> list[Record]:
    """The calls whose newest run is alive."""
    rows = map(side.store.rows, side.open_calls())
    records = (side.store.describe(found) for found in rows if found and found[-1].status == "running")
    return [record for record in records if not record.in_doubt]


class Move:
    """One mover: it takes over from any that came before it, and gives way to one that comes after."""

    def __init__(
        self,
        source: Side,
        target: Side,
        *,
        progress: Progress | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.source = source
        self.target = target
        self.steps = progress or Progress()
        self.tell = tell
        self.me = secrets.token_hex(8)
        self.batch = 16
        #: the marks as they were last written
        self.here: Mark
        self.there: Mark

    # -- the whole --

    def run(self) -> Moved:
        """Move it, or go on with a move, or carry late ends of one that is complete."""
        self._begin()
        if self.there.role == "arrived":
            if self.here.role != "moved":  # cut off between the two
                self._mark_source("moved")
                return Moved("moved", self._calls(), self._carry_ends())
            ends = self._carry_ends()
            return Moved("late ends carried" if ends else "nothing new", self._calls(), ends)
        if self.source.has_log:
            self._copy_all()
            for _ in range(2):  # the second time little is left for when callers are refused
                self._follow(self.source.last_certain())
            self._seal()
        else:  # nothing tells what changes during a copy, so nothing may
            self._seal()
            self._wait_for_runs()
            self._copy_all()
        self._catch_up()
        # a server that came back without its last second may have come back without the seal
        must_step(self.source.mark(), self.here, self.here, self.source.address)
        self._write(role="arrived")
        self._mark_source("moved")
        return Moved("moved", self._calls())

    def cancel(self, *, target_is_lost: bool = False) -> Moved:
        """Let the source begin runs again, and take away what the target received; refused once that is open.

        A target that knows nothing of the move is taken to be lost only if that is said: it may be another
        one of the same name, and the true one open.
        """
        here, there = self.source.mark(), self.target.mark()
        ours = here is not None and there is not None and here.id == there.id
        # the source may have gone to another place since the move to this one was cut off
        is_elsewhere = here is not None and here.peer != self.target.address
        if (
            here is None
            or here.role not in ("leaving", *SEALED)
            or (is_elsewhere and self._is_half_begun(there))
        ):
            self._cancel_before_it_began(there)
            return Moved("cancelled")
        if here.role == "moved" or (ours and there is not None and there.role == "arrived"):
            raise UsageError(
                f"{self.source.address} was moved to {here.peer}, where runs begin now; nothing was changed. To go "
                "back, move that ledger to a new place"
            )
        if not ours and not (target_is_lost and self.target.is_empty()):
            raise _elsewhere(self.source, here)
        if ours and there is not None and there.role != "cancelled":
            self._erase(there)  # first: from here on a mover that is still at work can write nothing
        self.source.unmark(here)
        return Moved("cancelled")

    def _cancel_before_it_began(self, there: Mark | None) -> None:
        """A mover that was cut off between its two first marks left the target closed, and the source as it was."""
        if there is None or not self._is_half_begun(there):
            raise UsageError(f"{self.source.address} is not being moved; there is nothing to cancel")
        self._erase(there)

    def _is_half_begun(self, there: Mark | None) -> bool:
        """Whether a mover of this source closed the target and came no further."""
        if there is None or there.role != "receiving" or there.peer != self.source.address:
            return False
        return there.place == "" and self.target.is_empty()

    def _erase(self, there: Mark) -> None:
        """Stop whoever writes to the target, and take away what it received."""
        taken = replace(there, mover=self.me)
        self.target.step(there, taken)
        self.target.erase(taken, replace(taken, role="cancelled", place="", since=0, events=0))

    # -- marks --

    def _begin(self) -> None:
        """Find out where the two sides stand, and mark them; raises for what cannot go together."""
        here, there = self.source.mark(), self.target.mark()
        if here is not None and here.role in SHUT:
            raise UsageError(f"{self.source.address}: {here.refusal}")
        if there is not None and there.role in ("leaving", *SEALED):
            raise UsageError(
                f"{self.target.address} is itself moved to {there.peer}; nothing was written. Name another target"
            )
        if here is None or here.role == "arrived":
            self._begin_anew(here, there)
        elif there is None or there.id != here.id:
            raise _elsewhere(self.source, here)
        elif there.role == "cancelled":  # a cancelling that was cut off, and is taken back
            self.here = here
            self._receive(there, here.id)
        else:
            self.here = here
            self._take_over(there)

    def _begin_anew(self, here: Mark | None, there: Mark | None) -> None:
        if there is not None and there.role == "arrived":
            raise refuse_full(self.target.address)
        if there is not None and there.role == "receiving" and not self._is_half_begun(there):
            raise UsageError(
                f"{self.target.address} is receiving the calls of {there.peer}; nothing was written. End that move "
                "with `ledger move`, or cancel it, or name another target"
            )
        if there is None and not self.target.is_empty():  # the step below looks again, with nobody writing
            raise refuse_full(self.target.address)
        new = secrets.token_hex(8)
        self._receive(there, new)
        if self.source.mark() == self.there:
            self.target.unmark(self.there)
            raise _same(self.source)
        self.here = Mark("leaving", new, self.target.address)
        self.source.step(here, self.here)

    def _receive(self, there: Mark | None, id: str) -> None:
        """Close the target, and begin at the beginning."""
        now = Mark("receiving", id, self.source.address, self.me, since=self.source.last_certain())
        self.target.step(there, now)
        self.there = now

    def _take_over(self, there: Mark) -> None:
        self.there = replace(there, mover=self.me)
        self.target.step(there, self.there)

    def _mark_source(self, role: Literal["sealed", "moved"]) -> None:
        now = replace(self.here, role=role)
        self.source.step(self.here, now)
        self.here = now

    def _write(self, calls: Sequence[Whole] = (), entries: Sequence[Entry] = (), **changes: Any) -> None:
        """One step of the target."""
        now = replace(self.there, **changes)
        self.target.step(self.there, now, calls, entries)
        self.there = now

    def _seal(self) -> None:
        if self.here.role == "leaving":
            self._mark_source("sealed")
            self.tell(f"sealed: no run begins in {self.source.address} any more")
        else:  # whoever sealed it may have been cut off before the seal held
            self.source.step(self.here, self.here)

    def _calls(self) -> int:
        return sum(sums["actions"] for sums in self.target.store.totals().values())

    # -- copying --

    def _copy_all(self) -> None:
        """Every call, oldest first, from where the copy stands."""
        if self.there.place is not None:
            self.steps.total = sum(sums["actions"] for sums in self.source.store.totals().values())
        while self.there.place is not None:
            page = self.source.names(self.there.place, _MOST_CALLS)
            is_last = len(page) < _MOST_CALLS  # what comes after them has events, and is not run after here
            while page:
                part, page = page[: self.batch], page[self.batch :]
                self._copy([call for _, call in part], place=part[-1][0])
                self.steps.step(len(part))
            is_chased = (
                self.steps.done > (self.steps.total or 0) + _CHASED
            )  # they are made faster than copied
            if is_chased and self.here.role == "leaving":
                self._seal()
            if is_last:
                self._write(place=None)

    def _copy(self, calls: Sequence[str], **changes: Any) -> None:
        """These calls as they are now, in one step; the next takes as many as memory is meant to hold."""
        wholes = self.source.fetch(list(dict.fromkeys(calls)))  # a call may be named twice
        self._write(wholes, **changes)
        mean = sum(whole.size for whole in wholes) // len(wholes) + 1
        self.batch = max(1, min(_BYTES // mean, 2 * self.batch, _MOST_CALLS))

    def _copy_again(self, calls: Sequence[str]) -> None:
        """Calls that were changed since they were copied."""
        while calls:
            part, calls = calls[: self.batch], calls[self.batch :]
            self._copy(part)

    def _follow(self, upto: int) -> None:
        """Carry the events up to that one, and copy again the calls that they tell of."""
        while self.there.events < upto:
            entries = self.source.entries(self.there.events, _EVENTS)
            if not entries:
                return
            younger = [entry for entry in entries if entry.seq > self.there.since]
            for scope in {entry.wf for entry in younger if entry.call is None and entry.kind == "reset"}:
                self._sweep(scope)
            self._copy_again(list(dict.fromkeys(entry.call for entry in younger if entry.call)))
            self._write(entries=entries, events=entries[-1].seq)

    def _sweep(self, wf: str | None) -> None:
        """Look again at all that was received of a workflow (None: at all): a reset names no calls."""
        place = ""
        while page := self.target.names(place, _MOST_CALLS, wf):
            self._copy_again([call for _, call in page])
            place = page[-1][0]

    # -- behind the seal --

    def _catch_up(self) -> None:
        """Wait until nothing lives there, and until both sides say the same."""
        for number in range(_COMPARISONS):
            self._wait_for_runs()
            before = self.source.store.totals()
            self._follow_to_the_end()
            self._copy_again(self.source.open_calls())  # a renewal leaves no event
            wrong = _differences(before, self.target.store.totals(), self.source.store.totals())
            if not wrong and not _alive(self.source):
                return
            if wrong and number == _COMPARISONS // 2:
                self._write(place="")
                self._copy_all()
                self._sweep(None)
            time.sleep(_PAUSE)
        raise StoreError(
            f"{self.target.address} does not come to hold what {self.source.address} holds ({', '.join(wrong) or 'runs begin to live again'})"
            "; it stays closed, and the source sealed. Run the command again, or undo it with --cancel"
        )

    def _wait_for_runs(self) -> None:
        """Until no run is alive in the source: none is copied as running. One that lapsed is in doubt there."""
        told = ""
        while alive := _alive(self.source):
            named = owners_of(alive)
            if named != told:
                self.tell(f"waiting for {len(alive)} that still run in {self.source.address}: {named}")
            told = named
            must_step(self.target.mark(), self.there, self.there, self.target.address)  # it was not cancelled
            self._follow(self.source.last_certain())
            time.sleep(_PAUSE)

    def _follow_to_the_end(self) -> None:
        """All that is committed; on some stores an older transaction that is open hides the newest events."""
        last, told = self.source.last_written(), False
        self._follow(last)
        while self.there.events < last:
            if not told:
                self.tell(f"waiting for older transactions in the database of {self.source.address} to end")
            told = True
            time.sleep(_PAUSE)
            self._follow(last)

    # -- behind the opening --

    def _carry_ends(self) -> int:
        """Settle in the target what ended in the source since the last look; how many runs that were."""
        if not self.source.has_log:
            return sum(self._carry_ends_of(call) for call in self._all_calls())
        carried = 0
        while entries := self.source.entries(self.there.events, _EVENTS):
            calls = dict.fromkeys(e.call for e in entries if e.call and e.kind in _ENDS)
            carried += sum(self._carry_ends_of(call) for call in calls)
            self._write(events=entries[-1].seq)
        return carried

    def _carry_ends_of(self, call: str) -> int:
        carried = 0
        theirs = {run.owner: run for run in self.target.store.rows(call)}
        for ending in filter(None, map(_ending, self.source.store.rows(call))):
            if _lacks(theirs.get(ending.claim.token), ending):
                self.target.store.transact(ending)
                carried += 1
        return carried

    def _all_calls(self) -> Iterator[str]:
        place = ""
        while page := self.source.names(place, _MOST_CALLS):
            yield from (call for _, call in page)
            place = page[-1][0]


def _elsewhere(source: Side, here: Mark) -> UsageError:
    if here.role == "moved":
        return UsageError(f"{source.address} was moved to {here.peer}; nothing was changed. Name that one")
    return UsageError(
        f"{source.address} is being moved to {here.peer}, and the target that was named knows nothing of it; nothing "
        "was changed. Name that one, with --cancel to undo the move; if it is lost and was never opened, name an "
        "empty one with --cancel --target-is-lost"
    )


def _ending(run: Run) -> Settle | None:
    """What the owner of a run said in the end, in time or late."""
    end = run.status if run.closed_by == run.owner else run.late
    if end is None:
        return None
    claim = Claim(
        run.call, run.owner, run.tool, run.wf, run.caller, run.key, run.matched, max=1, ttl=None, lease=0,
        on_doubt="rerun", forced=False,
    )  # fmt: skip
    return Settle(claim, run.run, end, run.result, run.error, run.trace)


def _lacks(theirs: Run | None, ending: Settle) -> bool:
    """Whether the target does not know that end; one whose call was reset there is not told any more."""
    if theirs is None:
        return False
    late = theirs.late is None and (theirs.status, ending.status) in _TAKES_LATE
    return theirs.status == "running" or (theirs.closed_by != theirs.owner and late)


def _differences(before: Any, here: Any, after: Any) -> list[str]:
    """The sums in which the target is not what the source was before the look at it, nor after, nor between.

    Blocked attempts and unlimited tools are counted on in a sealed ledger, so those sums may only have grown.
    """
    found = []
    for tool in sorted(before.keys() | here.keys() | after.keys()):
        low, mine, high = (_sums(totals.get(tool)) for totals in (before, here, after))
        found += [f"{name} of {tool}" for name in mine if not low[name] <= mine[name] <= high[name]]
    return found


def _sums(totals: dict[str, int] | None) -> dict[str, int]:
    """Whether the owner of an open run is over is judged by each store for itself."""
    sums = dict.fromkeys(("actions", "attempts", "executed", "blocked", "failed", "suspended"), 0)
    if totals is None:
        return sums | {"open": 0}
    return {name: totals[name] for name in sums} | {"open": totals["in_doubt"] + totals["running"]}
