"""What the tests of stores share: a clock that obeys, a store of six methods, and operations by name."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ledger import Clock, Guard, MemoryStore, Record, SqliteStore, Store

KINDS = ("sqlite", "memory", "six")


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
