"""What a store must be able to do so that a ledger can be moved out of it, or into it.

`ledger_ops.move` builds the whole move on these few primitives and knows no store. Each side keeps a
`Mark`, which says where it stands:

    source   (none) → leaving → sealed → moved                  leaving closes nothing
    target   (none) → receiving → arrived                       arrived closes nothing
                          ↓ a move that is cancelled
                      cancelled → receiving …

What a mark closes is refused with a `StoreError` that says the mark's `refusal`, in every process:

- `sealed`, `moved`: a claim that would insert a run (also by takeover or force), release, resolve, reset of a call
  or a scope. What belongs to runs that are open goes on: renew, a claim repeated with its token, settle, a late
  end. Counting goes on, and duplicates of what is done are answered.
- `receiving`, `cancelled`: whatever would write a row, a tally or an event. What is known may be answered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ledger import Run, StoreError, UsageError

if TYPE_CHECKING:
    from ledger import SqliteStore
    from ledger_stores.base import ServerStore

Role = Literal["leaving", "sealed", "moved", "receiving", "arrived", "cancelled"]
#: closed to new runs and decisions
SEALED: tuple[Role, ...] = ("sealed", "moved")
#: closed to all writing but a mover's
SHUT: tuple[Role, ...] = ("receiving", "cancelled")
#: events of what a sealed ledger refuses: each is written in the transaction of what it tells of
REFUSED_KINDS = ("claimed", "released", "resolved", "reset")
#: an unlimited tool's call: call tool wf caller args ran raised error created touched
Tally = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """How a ledger stands in a move."""

    role: Role
    #: of the move, random, the same on both sides
    id: str
    #: the other side, for people: no password
    peer: str
    #: who writes; a second mover takes over by putting its own name here
    mover: str = ""
    #: on the target: how far the copy of all calls came, None when it is whole
    place: str | None = ""
    #: … the source's last event when that copy began
    since: int = 0
    #: … the source's last event that is told here too
    events: int = 0

    @property
    def text(self) -> str:
        """What a store keeps, and compares."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str | None) -> Mark | None:
        """The mark that a store keeps, if any."""
        return cls(**json.loads(text)) if text else None

    @property
    def refusal(self) -> str:
        """What whoever wants to write is told; "" where nobody is refused."""
        if self.role in SEALED:
            return f"this ledger was moved to {self.peer}; nothing ran. Point this program there"
        if self.role == "receiving":
            return (
                f"this ledger is receiving the calls of {self.peer} and is not open yet; nothing ran. Wait "
                "for `ledger move` to end, or run it again"
            )
        if self.role == "cancelled":
            return (
                f"this ledger was to receive the calls of {self.peer}, but that move was cancelled; nothing "
                f"ran. Point this program at {self.peer}. A new `ledger move` may come here; for another "
                "use take a new file or namespace"
            )
        return ""


class Entry(NamedTuple):
    """One event as it is stored; `seq` is the source's."""

    seq: int
    call: str | None
    run: int | None
    kind: str
    at: int
    tool: str | None
    wf: str | None
    caller: str | None
    n: int
    detail: str | None


class Whole(NamedTuple):
    """All that a ledger holds of one call; neither rows nor a tally: it holds nothing."""

    call: str
    #: oldest first
    rows: Sequence[Run]
    tally: Tally | None
    #: who made these rows: id, host, pid, boot, space, start
    processes: Sequence[tuple[Any, ...]] = ()

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        texts = (text for run in self.rows for text in (run.key, run.args, run.result, run.error, run.trace))
        return 500 * (len(self.rows) + 1) + sum(len(text) for text in texts if text)


class Side:
    """A store as one side of a move."""

    store: SqliteStore | ServerStore
    #: `entries` tell of every change; else only the calls themselves do
    has_log = True

    @property
    def address(self) -> str:
        """Where it is, for people: no password."""
        namespace = getattr(self.store, "namespace", "ledger")
        return self.store.address + (f" (namespace {namespace})" if namespace != "ledger" else "")

    # -- looking: nothing is made and nothing is held open --

    def exists(self) -> bool:
        """Whether there is a ledger; never makes one."""
        raise NotImplementedError

    def is_empty(self) -> bool:
        """Whether it holds neither a call, nor a tally, nor an event."""
        raise NotImplementedError

    def mark(self) -> Mark | None:
        """How it stands in a move; None where it is in none."""
        raise NotImplementedError

    def names(self, after: str, limit: int, wf: str | None = None) -> list[tuple[str, str]]:
        """(place, call) of calls after that place ("": from the first), oldest first, those with tallies last.

        Fewer than `limit` are the last ones. Every call that is there from the first page to the last is
        named at least once, however much is written meanwhile. `wf` names only those of one workflow.
        """
        raise NotImplementedError

    def fetch(self, calls: Sequence[str]) -> list[Whole]:
        """Each of these calls as it is now, its rows in one view; one for each name, also for one unknown."""
        raise NotImplementedError

    def open_calls(self) -> list[str]:
        """The calls that have a RUNNING row, alive or not."""
        raise NotImplementedError

    def entries(self, after: int, limit: int) -> list[Entry]:
        """The events after that number, in their order; none ever comes to stand before one that was given."""
        raise NotImplementedError

    def last_certain(self) -> int:
        """The number of the newest event that `entries` gives."""
        raise NotImplementedError

    def last_written(self) -> int:
        """The number of the newest event that is committed, although `entries` may not give it yet."""
        return self.last_certain()

    # -- writing: each is one step, from the mark `was` to the mark `now` --

    def step(
        self, was: Mark | None, now: Mark, calls: Sequence[Whole] = (), entries: Sequence[Entry] = ()
    ) -> None:
        """Make these calls here what they are there, append these events, and set the mark, all or nothing.

        Whatever stood here of these calls is replaced, with totals to match; an event gets the next
        number of this store.  What the mark `now` closes is closed when this returns: whatever commits
        after that was refused or is allowed by it.  From None to `receiving` only an empty ledger goes.
        To repeat a step whose reply was lost does nothing.  Raises `StoreError` if the mark is
        neither `was` nor `now`: another mover has come; and then nothing is written.
        """
        raise NotImplementedError

    def unmark(self, was: Mark) -> None:
        """Take the mark away, and with it all that it closes."""
        raise NotImplementedError

    def erase(self, was: Mark, now: Mark) -> None:
        """Take away all calls, tallies and events, then set the mark; cut short, it can be repeated."""
        raise NotImplementedError


def side_of(store: SqliteStore | ServerStore) -> Side:
    """That store as a side of a move."""
    from ledger import SqliteStore
    from ledger_stores.move_sqlite import SqliteSide

    return SqliteSide(store) if isinstance(store, SqliteStore) else store.as_side()


def must_step(found: Mark | None, was: Mark | None, now: Mark | None, address: str) -> bool:
    """Whether a step is still to be made; raises if another mover has been here."""
    if found == was:
        return True
    if found == now:  # the reply to it was lost
        return False
    raise StoreError(
        f"{address}: another `ledger move` is at work here; nothing was written by this one. Let that one "
        "end, or run this command again to take over"
    )


def refuse_full(address: str) -> UsageError:
    """The error for a target that holds something."""
    return UsageError(
        f"{address} is not empty, nothing was written; a ledger can be moved only to a new place: name another "
        "file, database or namespace"
    )
