"""What the tests of stores share: a clock that obeys, a store of six methods, and operations by name."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ledger
from ledger import Claim, Clock, Guard, MemoryStore, Record, Run, SqliteStore, Store

SECOND = 1_000_000
LEASE = 300 * SECOND
KINDS = ("sqlite", "memory", "six")


class FakeClock(Clock):
    """Stands still until it is told otherwise; both clocks move together unless the wall is stepped."""

    def __init__(self) -> None:
        self._wall = 1_700_000_000 * SECOND
        self._mono = 5_000 * SECOND

    def wall(self) -> int:
        """The fake time of day."""
        return self._wall

    def mono(self) -> int:
        """The fake monotonic time."""
        return self._mono

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._wall += int(seconds * SECOND)
        self._mono += int(seconds * SECOND)

    def step_wall(self, seconds: float) -> None:
        """Set the time of day, as an administrator does."""
        self._wall += int(seconds * SECOND)


class SixMethodStore(Store):
    """What a user writes: a dict, a lock and the six methods of the contract."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        super().__init__(clock=clock)
        self.records: dict[str, Record] = {}
        self.lock = threading.Lock()

    def get(self, id: str) -> Record | None:
        return self.records.get(id)

    def claim(self, record: Record) -> bool:
        with self.lock:
            if record.id in self.records:
                return False
            self.records[record.id] = record
            return True

    def put(self, record: Record) -> None:
        with self.lock:
            self.records[record.id] = record

    def delete(self, id: str) -> None:
        with self.lock:
            self.records.pop(id, None)

    def all(self, wf: str | None = None) -> Iterable[Record]:
        with self.lock:
            return [r for r in self.records.values() if wf in (None, r.wf)]

    def clear(self, wf: str | None = None) -> None:
        for record in self.all(wf):
            self.delete(record.id)


def open_store(kind: str, folder: Path, clock: Clock | None = None) -> Store:
    """A store of that kind, empty."""
    if kind == "sqlite":
        return SqliteStore(folder / "ledger.db", sync="off", clock=clock)
    return MemoryStore(clock=clock) if kind == "memory" else SixMethodStore(clock=clock)


@contextmanager
def guard_on(kind: str, folder: Path, *, quiet: bool = True) -> Iterator[Guard]:
    """A guard on a built-in store of that kind, closed in the end."""
    made = (
        Guard(store=MemoryStore(), quiet=quiet)
        if kind == "memory"
        else Guard(folder / "ledger.db", quiet=quiet)
    )
    yield made
    made.close()


def claim(call: str = "c", **values: Any) -> Claim:
    """A claim that asks for the first run of a call unless told otherwise."""
    defaults: dict[str, Any] = {
        "token": ledger.new_token(), "tool": "tests.charge", "wf": "w", "caller": "", "key": None,
        "matched": None, "max": 1, "ttl": None, "lease": LEASE, "on_doubt": "rerun", "forced": False,
    }  # fmt: skip
    return ledger.Claim(call=call, **{**defaults, **values})


def claim_of(run: Run) -> Claim:
    """The claim that this run came from."""
    return claim(run.call, token=run.owner, tool=run.tool, wf=run.wf)


def settle(run: Run, status: str = "success", *, result: str | None = None) -> ledger.Op:
    """The owner's word on how that run ended."""
    return ledger.Settle(claim_of(run), run.run, status, result)


def renew(run: Run) -> ledger.Op:
    """The owner of that run is alive."""
    return ledger.Renew(claim_of(run), run.run)


def release(run: Run, *, limit: int = 1, ttl: int | None = None, token: str = "") -> ledger.Op:
    """`retry` by somebody who saw that run."""
    return ledger.Release(run.call, token or ledger.new_token(), run.run, run.owner, limit, ttl, "retry")


def resolve(
    run: Run, *, done: bool, result: str | None = None, reconciled: bool = False, token: str = ""
) -> ledger.Op:
    """The answer of somebody who saw that run and found out."""
    token = token or ledger.new_token()
    return ledger.Resolve(run.call, token, run.run, run.owner, done, result, reconciled, "told")


def reset(asked: int, call: str = "c", token: str = "") -> ledger.Op:
    """Forget one call."""
    return ledger.Reset(call, token or ledger.new_token(), asked)


def shape(rows: Iterable[Run]) -> list[tuple[Any, ...]]:
    """What the protocol says about rows: number, status, owner and the marks beside them."""
    return [
        (r.run, r.status, r.owner, r.ended, r.closed_by, r.released, r.forced, r.late, r.late_at)
        for r in rows
    ]
