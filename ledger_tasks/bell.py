"""How those who wait for work are woken when there may be some."""

from __future__ import annotations

import threading


class Bell:
    """Each ring lets one of those who wait look once. A ring that nobody waits for is kept for the next who does."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self._rung = threading.Condition(lock)
        self._quiet = threading.Condition(lock)
        self._looks = self._idle = 0
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nobody is to look any more."""
        return self._is_closed

    def ring(self, times: int = 1) -> None:
        """Let so many look."""
        with self._rung:
            # one more than those who wait: somebody may have looked a moment ago, and be about to wait
            self._looks = min(self._looks + times, self._idle + 1)
            self._rung.notify(times)

    def wait(self) -> bool:
        """Wait for a ring; False: it is closed."""
        with self._rung:
            self._idle += 1
            self._quiet.notify()
            self._rung.wait_for(lambda: self._looks or self._is_closed)
            self._idle -= 1
            self._looks = max(0, self._looks - 1)
            return not self._is_closed

    def pause(self, seconds: float) -> bool:
        """Wait so long, and then until there is somebody to wake; False: it is closed."""
        with self._rung:
            self._quiet.wait_for(lambda: self._is_closed, seconds)
            self._quiet.wait_for(lambda: self._idle or self._is_closed)
            return not self._is_closed

    def close(self) -> None:
        """Let everybody go home."""
        with self._rung:
            self._is_closed = True
            self._rung.notify_all()
            self._quiet.notify_all()
