"""A store of your own: six methods over a dict.

Only `claim` must be atomic: it inserts a record whose id is absent, and says whether it did. The
guard keeps what it knows of a call as a list of records that never change, so that nothing else is
needed for its promises to hold. What a dict cannot give is memory beyond its own process.
"""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ledger import Guard, Record, Store


class DictStore(Store):
    """Records in a dict: good for one process and its threads, gone with it."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()

    def get(self, id: str) -> Record | None:
        """The record with this id, if there is one."""
        with self._lock:
            return self._records.get(id)

    def claim(self, record: Record) -> bool:
        """Insert the record if its id is absent; True if it was inserted."""
        with self._lock:
            if record.id in self._records:
                return False
            self._records[record.id] = record
            return True

    def put(self, record: Record) -> None:
        """Insert the record, or replace the one with its id."""
        with self._lock:
            self._records[record.id] = record

    def delete(self, id: str) -> None:
        """Remove the record with this id, if there is one."""
        with self._lock:
            self._records.pop(id, None)

    def all(self, wf: str | None = None) -> Iterable[Record]:
        """The records of one workflow, or of all."""
        with self._lock:
            # A copy, because the caller reads it after the lock has been given back.
            return [record for record in self._records.values() if wf in (None, record.wf)]

    def clear(self, wf: str | None = None) -> None:
        """Remove the records of one workflow, or of all."""
        with self._lock:
            kept = {} if wf is None else {i: r for i, r in self._records.items() if r.wf != wf}
            self._records = kept


CHARGES: list[str] = []


def charge_card(order_id: str) -> str:
    """Charge the card of an order."""
    time.sleep(0.2)
    CHARGES.append(order_id)
    return f"r-{len(CHARGES)}"


def main() -> None:
    """Ask for one charge from eight threads, then from another guard."""
    store = DictStore()
    guard = Guard(store=store)
    charge = guard.once(replay=True)(charge_card)

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(charge, ["A-1001"] * 8))
    print(f"8 threads got {sorted(set(receipts))}, charges: {len(CHARGES)}")

    outcome = Guard(store=store).call(charge_card, "A-1001")
    print(f"another guard on the same store: blocked {outcome.blocked}, charges: {len(CHARGES)}")
    guard.log()


if __name__ == "__main__":
    main()
