"""One thread that keeps the claims of a process alive, and tells of those that are lost."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ledger import LedgerError
from ledger_tasks.errors import TaskError
from ledger_tasks.model import Claim
from ledger_tasks.tasks import TaskLedger

#: a lease is renewed so many times while it lasts, so that one lost try costs nothing
_TIMES: Final = 3
#: plans of claims that were forgotten before their time, which are dropped together
_STALE: Final = 256


@dataclass(slots=True)
class _Kept:
    claim: Claim
    lost: Callable[[], object]
    #: monotonic seconds at which its lease was certainly renewed last
    renewed: float


class Keeper:
    """Renews claims while their tasks are worked on.

    `lost` is called, once and on the keeper's thread, when the ledger says that somebody else has the task or that it
    has ended, and also when the store could not be reached for a whole lease: nobody knows then whose the task is.
    """

    def __init__(self, ledger: TaskLedger) -> None:
        self._ledger = ledger
        self._kept: dict[str, _Kept] = {}
        #: when to renew which claim next
        self._due: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ends = False

    def watch(self, claim: Claim, lost: Callable[[], object]) -> None:
        """Keep this claim from now on."""
        now = time.monotonic()
        with self._changed:
            self._kept[claim.token] = _Kept(claim, lost, now)
            is_first = self._plan(claim, now)
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="ledger-tasks-keeper", daemon=True)
                self._thread.start()
            elif is_first:
                self._changed.notify()

    def forget(self, claim: Claim) -> None:
        """Its task has ended, or was given back."""
        with self._changed:
            self._kept.pop(claim.token, None)

    def close(self) -> None:
        """Keep nothing any more; what is held lapses."""
        with self._changed:
            self._ends = True
            self._kept.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _plan(self, claim: Claim, now: float) -> bool:
        """Whether nothing else is due before it."""
        if len(self._due) > 2 * len(self._kept) + _STALE:
            self._due = [due for due in self._due if due[1] in self._kept]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (now + claim.lease / _TIMES, claim.token))
        return self._due[0][1] == claim.token

    def _keep(self) -> None:
        while (kept := self._next()) is not None:
            self._renew(kept)

    def _next(self) -> _Kept | None:
        """Waits for the next claim to renew; None at the end."""
        with self._changed:
            while not self._ends:
                pause = self._due[0][0] - time.monotonic() if self._due else None
                if pause is not None and pause <= 0:
                    kept = self._kept.get(heapq.heappop(self._due)[1])
                    if kept is not None:
                        return kept
                    continue
                self._changed.wait(pause)
        return None

    def _renew(self, kept: _Kept) -> None:
        asked = time.monotonic()
        try:
            is_held = self._ledger.heartbeat(kept.claim)
        except TaskError:  # there is no such task any more
            is_held = False
        except LedgerError:
            is_held = asked - kept.renewed < kept.claim.lease
        else:
            kept.renewed = asked
        with self._changed:
            if kept.claim.token not in self._kept:
                return
            if is_held:
                self._plan(kept.claim, time.monotonic())
                return
            del self._kept[kept.claim.token]
        kept.lost()
