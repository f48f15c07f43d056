"""A command as a child process: its output is shown and recorded, signals are passed on to it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import IO, Any, Self

from ledger import NotPerformed

#: of a longer output the first and the last so many bytes are recorded
KEPT_BYTES = 4 << 20
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PASSED_ON = (*_ENDINGS, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
#: wakes our main thread, or ends the one that listens; who is not asked for it ignores it
_NUDGE = signal.SIGURG
_SI_KERNEL = 128
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.25
#: when the command has ended: how long a silence of what it left in the background is waited for, how long
#: that may go on speaking, and how much of it is listened to (a pipe holds less of the command's own)
_SILENCE_SECONDS, _AFTERMATH_SECONDS, _AFTERMATH_BYTES = 1.0, 2.0, 1 << 20
#: how long a reader who does not read may take when we were told to end
_HURRIED_SECONDS = 1.0
#: so much output waits for its reader before the command has to wait for him; bytes, because how
#: many pieces it comes in is a matter of scheduling
_WAITING_BYTES = 1 << 20


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


class EndUnknown(BaseException):
    """The command began, and nobody knows how far it came. It is no Exception: the guard records a doubt."""

    code = 1


class Lost(EndUnknown):
    """Something of ours failed beside the command."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"`ledger run` failed while the command ran ({error!r}); nobody knows how far it came"
        )


class Killed(EndUnknown):
    """A signal killed the command."""

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
    kernel's own signals are therefore not passed on, or it would get them twice.  Only who waits for a
    signal is told where it came from, so one thread does nothing else, and all the others block them: also
    the guard's, which are begun after this is entered and inherit that.
    """

    def __init__(self) -> None:
        self._entered = self._hurried = False
        self._heard: SimpleQueue[signal.struct_siginfo] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="ledger-signals", daemon=True)
        self._ours: set[signal.Signals] = set()
        self._mask: set[Any] = set()
        self._before: Any = None

    def __enter__(self) -> Self:
        # what is ignored stays so: nohup's wish holds for both of us
        self._ours = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
        self._before = signal.signal(_NUDGE, self._nudged)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *self._ours})
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_kill(self._listener.ident or 0, _NUDGE)
        self._listener.join()
        signal.signal(_NUDGE, self._before)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _listen(self) -> None:
        """In a thread of its own: hand on what comes; before the start wake the main thread for it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {_NUDGE})
        while (found := signal.sigwaitinfo({signal.SIGCHLD, _NUDGE, *self._ours})).si_signo != _NUDGE:
            self._heard.put(found)
            if not self._entered and found.si_signo != signal.SIGCHLD:
                signal.pthread_kill(threading.main_thread().ident or 0, _NUDGE)

    def _nudged(self, _number: int, _frame: FrameType | None) -> None:
        """In the main thread, whatever it waits for."""
        while not (self._entered or self._heard.empty()):
            if (found := self._heard.get()).si_signo != signal.SIGCHLD:
                raise Stopped(found.si_signo)

    @property
    def hurried(self) -> bool:
        """Whether somebody asked us for an end since the command was started."""
        while not self._heard.empty():
            self._hurried |= self._heard.get().si_signo in _ENDINGS
        return self._hurried

    def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Start the child, pass on to it what it would not hear, wait for its end."""
        self._entered = True
        child = start()
        while child.poll() is None:
            with contextlib.suppress(Empty):
                found = self._heard.get(timeout=_LOOK_SECONDS)
                if _was_for_us_alone(found):
                    child.send_signal(found.si_signo)
                    self._hurried |= found.si_signo in _ENDINGS
        return child


def _was_for_us_alone(found: signal.struct_siginfo) -> bool:
    """Whether the command must be told: a terminal's keys reach it, its hangup only a session's leader.

    An alarm of the kernel is one that was set before we were started, for instance by perl's `alarm; exec`.
    """
    if found.si_code != _SI_KERNEL:
        return found.si_signo != signal.SIGCHLD
    if found.si_signo == signal.SIGHUP:
        return os.getsid(0) == os.getpid()
    return found.si_signo == signal.SIGALRM


class _Shown(threading.Thread):
    """Writes to a stream of ours, whose reader may be slow, or never read again."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._pieces: SimpleQueue[bytes] = SimpleQueue()
        self._waiting = 0
        self._changed = threading.Condition()

    def run(self) -> None:
        """Until the empty piece."""
        is_read = True
        while piece := self._pieces.get():
            is_read = is_read and wrote(self._target, piece)
            with self._changed:
                self._waiting -= len(piece)
                self._changed.notify()

    def put(self, piece: bytes, *, waits: Callable[[], bool]) -> None:
        """Show this after what came before; while it `waits`, not before there is room."""
        with self._changed:
            while self._waiting >= _WAITING_BYTES and waits():
                self._changed.wait(_LOOK_SECONDS)
            self._waiting += len(piece)
        self._pieces.put(piece)


class _Copy(threading.Thread):
    """Keeps one stream of the command as it comes, and has it shown."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._shown = _Shown(target)
        self._source: IO[bytes] | None = None
        self._head, self._tail, self._total = bytearray(), bytearray(), 0
        self._ended_at = self._deadline = math.inf
        self._silence = _SILENCE_SECONDS

    def begin(self, source: IO[bytes] | None) -> None:
        """Copy what comes from there."""
        self._source = source
        self._shown.start()
        self.start()

    def run(self) -> None:
        """Until the command, and all that it left behind, have closed it, or it has been over for long."""
        assert self._source is not None  # noqa: S101 - what a type checker cannot know
        left = _AFTERMATH_BYTES
        with self._source as source:
            while left > 0 and (data := self._read(source.fileno())):
                self._keep(data)
                self._shown.put(data, waits=self._command_runs)
                left -= 0 if self._command_runs() else len(data)

    def _command_runs(self) -> bool:
        return self._ended_at == math.inf

    def _read(self, source: int) -> bytes:
        """What comes next; nothing at the end, or when only what was left behind could still write."""
        incoming = select.poll()
        incoming.register(source, select.POLLIN)
        silent_since = time.monotonic()
        while not incoming.poll(min(_LOOK_SECONDS, self._silence) * 1000):
            if time.monotonic() > max(silent_since, self._ended_at) + self._silence:
                return b""
        return os.read(source, 65536) if time.monotonic() < self._deadline else b""

    def finish(self, relay: Relay) -> None:
        """The command has ended: keep what it still said; for a reader only `show_rest` waits."""
        self._deadline = time.monotonic() + _AFTERMATH_SECONDS
        self._ended_at = time.monotonic()
        while self.is_alive():
            self.join(0.05)
            if relay.hurried:
                self._silence = 0

    def show_rest(self, seconds: float | None) -> None:
        """Wait until all is shown, or nobody reads it any more; None: however long that takes."""
        if self._shown.is_alive():
            self._shown.put(b"", waits=lambda: False)
            self._shown.join(seconds)

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


class Output:
    """Our stdout and stderr while a command runs. What it said is shown to the end before this is left."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._copies = [_Copy(sys.stdout.fileno()), _Copy(sys.stderr.fileno())]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for copy in self._copies:
            copy.show_rest(_HURRIED_SECONDS if self._relay.hurried else None)

    def execute(self, command: Sequence[str], *, retry_failed: bool) -> dict[str, Any]:
        """Run a command to its end: its exit code and what it printed.

        Raises `NotStarted`, `EndUnknown`, and where an exit code can be a failure `Failed`.
        """
        try:
            child = self._relay.run(lambda: self._start(command))
            for copy in self._copies:
                copy.finish(self._relay)
            out, err = (copy.value() for copy in self._copies)
        except NotStarted:
            raise
        except Exception as error:  # whatever it is: the command has been started
            raise Lost(error) from error
        if child.returncode < 0:
            raise Killed(-child.returncode)
        if child.returncode and retry_failed:
            words = err.decode("utf-8", "replace") if isinstance(err, bytes) else err
            raise Failed(child.returncode, words.rstrip().rpartition("\n")[2][:500])
        return {"code": child.returncode, "stdout": out, "stderr": err}

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        child = _started(command)
        for copy, source in zip(self._copies, (child.stdout, child.stderr), strict=True):
            copy.begin(source)
        return child


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

    What the command itself started is not reached and may go on. A descriptor that all inherit would not
    tell either: many programs close those. So a doubt asks a person, unless --on-doubt says otherwise.
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
