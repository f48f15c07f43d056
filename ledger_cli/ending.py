"""How a command ends that works for long: gracefully at the first signal, at once at the second."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """Let the next signal end the process as if nobody caught it, with the cursor that a live view hid."""
    for number in _SIGNALS:
        signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Told:
    """Whether the process was told to end, and by which signal. From the second one on it ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.number = 0
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        end_at_once()
        self.number = number
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    @property
    def code(self) -> int:
        """The exit code that says so."""
        return 128 + self.number

    def wait(self, seconds: float) -> bool:
        """Wait for it so long."""
        return self._event.wait(seconds)
