"""A command as a child process: its output is shown and recorded, signals are passed on to it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import IO, Any, Self

from ledger import NotPerformed

#: of a longer output the first and the last so many bytes are recorded
KEPT_BYTES = 4 << 20
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SI_KERNEL = 128
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.25
#: how long the output of what the command left in the background is waited for
_AFTERMATH_SECONDS = 1.0


class NotStarted(NotPerformed):
    """The command could not be started: nothing happened."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Failed(Exception):
    """The command ended with an exit code that is a failure, as --retry-failed says."""

    def __init__(self, code: int, last_words: str) -> None:
        super().__init__(f"exit code {code}{f': {last_words}' if last_words else ''}")
        self.code = code


class Killed(BaseException):
    """A signal killed the command. It is no Exception, so that the guard records a doubt."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        super().__init__(f"the command was killed by {name}; nobody knows how far it came")
        self.code = 128 + number


class Stopped(BaseException):
    """A signal came before the command was started: nothing ran."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"nothing ran: stopped by {signal.Signals(number).name} before the command was started"
        )
        self.code = 128 + number


class Relay:
    """Signals: before the command is started they stop us, from then on they are the command's.

    What a terminal sends at Ctrl-C reaches the command anyway, because it is in our process group; the
    kernel's own signals are therefore not passed on, or it would get them twice.
    """

    def __init__(self) -> None:
        self._entered = False
        self._waiting: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish holds for both of us
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if not self._entered:
            raise Stopped(number)
        self._waiting.append(number)

    def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Start the child and wait for its end; signals are blocked meanwhile, to be asked who sent them."""
        self._entered = True
        watched = {signal.SIGCHLD, *self._before}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        try:
            child = start()
            while child.poll() is None:
                found = signal.sigtimedwait(watched, _LOOK_SECONDS)
                if found is not None and _was_for_us_alone(found):
                    child.send_signal(found.si_signo)
                while self._waiting:  # another thread took it, without the word where it came from
                    child.send_signal(self._waiting.pop())
            return child
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _was_for_us_alone(found: signal.struct_siginfo) -> bool:
    """Whether the command must be told: a terminal's keys reach it, its hangup only a session's leader."""
    if found.si_code != _SI_KERNEL:
        return found.si_signo != signal.SIGCHLD
    return found.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()


class _Copy(threading.Thread):
    """Shows one stream of the child as it comes, and keeps it."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self._source, self._target = source, target
        self._head, self._tail, self._total = bytearray(), bytearray(), 0
        self._idle_since: float | None = None

    def run(self) -> None:
        """Until the child, and all that it left behind, have closed it."""
        shown = True
        with self._source:
            while data := self._read():
                self._keep(data)
                shown = shown and wrote(self._target, data)

    def _read(self) -> bytes:
        self._idle_since = time.monotonic()
        data = os.read(self._source.fileno(), 65536)
        self._idle_since = None
        return data

    def finish(self) -> None:
        """Wait for the end; what only a process in the background still holds open is let go."""
        while self.is_alive():
            self.join(0.02)
            since = self._idle_since
            if since is not None and time.monotonic() - since > _AFTERMATH_SECONDS:
                return

    def _keep(self, data: bytes) -> None:
        self._total += len(data)
        room = KEPT_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * KEPT_BYTES:
            del self._tail[:-KEPT_BYTES]

    def value(self) -> str | bytes:
        """What is recorded: text where it is UTF-8."""
        head, tail = bytes(self._head), bytes(self._tail[-KEPT_BYTES:])
        if self._total > len(head) + len(tail):
            head, tail = _without_broken_end(head), _without_broken_start(tail)
            left_out = self._total - len(head) - len(tail)
            head += f"\n[… ledger run: {left_out:,} bytes were not recorded …]\n".encode()
        try:
            return (head + tail).decode()
        except UnicodeDecodeError:
            return head + tail


def _without_broken_end(data: bytes) -> bytes:
    """Without the beginning of a character whose rest was cut off."""
    for length in range(1, 4):
        if data[-length] >= 0xC0:
            return data[:-length]
        if data[-length] < 0x80:
            break
    return data


def _without_broken_start(data: bytes) -> bytes:
    return data[next((i for i in range(4) if data[i] & 0xC0 != 0x80), 0) :]


def wrote(target: int, data: bytes) -> bool:
    """Write all of it; False if nobody reads it any more, which is no reason to stop the command."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(target, view) :]
    except OSError:
        return False
    return True


def execute(command: Sequence[str], relay: Relay, *, retry_failed: bool) -> dict[str, Any]:
    """Run a command to its end: its exit code and what it printed.

    Raises `NotStarted`, `Killed`, and where an exit code can be a failure `Failed`.
    """
    copies: list[_Copy] = []

    def start() -> subprocess.Popen[bytes]:
        child = _started(command)
        for source, target in ((child.stdout, sys.stdout.fileno()), (child.stderr, sys.stderr.fileno())):
            if source is not None:
                copies.append(_Copy(source, target))
                copies[-1].start()
        return child

    child = relay.run(start)
    for copy in copies:
        copy.finish()
    if child.returncode < 0:
        raise Killed(-child.returncode)
    out, err = (copy.value() for copy in copies)
    if child.returncode and retry_failed:
        words = err.decode("utf-8", "replace") if isinstance(err, bytes) else err
        raise Failed(child.returncode, words.rstrip().rpartition("\n")[2][:500])
    return {"code": child.returncode, "stdout": out, "stderr": err}


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    end_with_parent = _end_with(os.getpid())
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - two system calls, no lock, nothing imported
        )
    except FileNotFoundError as error:
        raise NotStarted(f"{command[0]}: command not found, nothing ran ({error.strerror})", 127) from error
    except OSError as error:
        raise NotStarted(f"{command[0]} cannot be executed, nothing ran ({error.strerror})", 126) from error


def _end_with(parent: int) -> Callable[[], None]:
    """What the child does before it becomes the command: a command whose `ledger run` was killed ends too.

    Otherwise it would go on while the next caller, told that it is in doubt, runs it again beside it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    blocked = {signal.SIGCHLD, *_PASSED_ON}

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    return prepare
