"""The command line as its users meet it: real processes, in a pipe or on a terminal of their own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from tests.actors import PATIENCE, eventually

COMMAND = Path(sys.executable).with_name("ledger")
TABS = [
    "call",
    "started",
    "status",
    "tool",
    "workflow",
    "caller",
    "run",
    "attempts",
    "executed",
    "blocked",
    "arguments",
    "outcome",
]

#: Nine attempts at six calls: three ran, three were blocked, two failed, and a process is killed in one.
SHOP = r"""
import os, signal, sys
from ledger import Guard

guard = Guard(sys.argv[1], quiet=True)

@guard.once(name="shop.charge", replay=True)
def charge(order: str, cents: int) -> dict[str, str]:
    return {"receipt": f"r-{order}"}

@guard.once(name="shop.send_email")
def send_email(to: str) -> str:
    return f"sent to {to}"

@guard.once(name="shop.decline")
def decline(order: str) -> None:
    raise RuntimeError("card declined")

@guard.once(name="shop.nasty")
def nasty(text: str) -> None:
    raise ValueError("\x1b[2J\x1b]0;owned\x07 \u202e reversed \x9b31m")

@guard.once(name="shop.book", irreversible=True)
def book(city: str) -> str:
    os.kill(os.getpid(), signal.SIGKILL)

with guard.as_caller("agent-1"):
    for _ in range(3):
        charge("A-1", 100)
    guard.flush()
    charge("A-2", 250)
    for tool, word in ((decline, "A-3"), (nasty, "\x1b[31mred\ttab\nline")):
        try:
            tool(word)
        except (RuntimeError, ValueError):
            pass
with guard.workflow("nightly"), guard.as_caller("agent-2"):
    for _ in range(2):
        send_email("ada@example.com")
    guard.flush()
    book("Lisbon")
"""


class Done(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, str]]:
        """The lines of a list, by their titles."""
        titles, *lines = self.out.splitlines()
        return [dict(zip(titles.split("\t"), line.split("\t"), strict=True)) for line in lines]

    @property
    def json(self) -> Any:
        """Stdout as JSON."""
        return json.loads(self.out)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command is started with: nothing of ours about ledgers, colours or time zones."""
    hidden = ("LEDGER_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COVERAGE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"TZ": "UTC", "TERM": "xterm-256color", "PYTHONWARNINGS": "error"} | dict(more or {})


def run(
    *words: object, input: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Run `ledger` with its output in pipes and nothing to read but `input`."""
    done = subprocess.run(
        [COMMAND, *map(str, words)],
        input=input if input is not None else "",
        capture_output=True,
        encoding="utf-8",
        env=environment(env),
        cwd=cwd,
        timeout=PATIENCE,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def make_shop(path: Path) -> Path:
    """A ledger that real processes wrote, the last of which was killed in a tool."""
    script = path.with_name("shop.py")
    script.write_text(SHOP)
    done = subprocess.run(
        [sys.executable, script, path], env=environment(), timeout=PATIENCE, check=False, capture_output=True
    )
    assert -signal.SIGKILL == done.returncode, done.stderr
    return path


def run_closed(*closed: int, words: Sequence[object]) -> Done:
    """Run `ledger` with some of stdin, stdout and stderr closed, as by `>&-`; the rest is read."""

    def close() -> None:
        for number in closed:
            os.close(number)

    done = subprocess.run(
        [COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=close,
        encoding="utf-8",
        env=environment(),
        timeout=PATIENCE,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def copied(source: Path, folder: Path) -> Path:
    """The same ledger in another folder, with what a killed process left beside it."""
    for suffix in ("", "-wal"):
        if (part := Path(f"{source}{suffix}")).exists():
            shutil.copy(part, folder / f"ledger.db{suffix}")
    return folder / "ledger.db"


class Terminal:
    """A command on a pseudo-terminal of its own, which is its controlling one."""

    def __init__(
        self,
        *words: object,
        columns: int = 100,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: IO[bytes] | None = None,
        program: str | Path = COMMAND,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [program, *map(str, words)],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment(env),
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one system call
        )
        os.close(slave)
        self._heard = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self._heard += data
        except OSError:  # Linux says so when the last process has left the terminal
            pass

    @property
    def text(self) -> str:
        """What the terminal was told so far."""
        return self._heard.decode("utf-8", "replace").replace("\r\n", "\n")

    def sees(self, text: str) -> None:
        """Wait until it shows this."""
        eventually(lambda: text in self.text or self.process.poll() is not None)
        assert text in self.text, self.text

    def press(self, text: str) -> None:
        """Press keys, such as Ctrl-C."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C until it ends: the first can come in the moment between Python's look and a read()."""

        def ended() -> bool:
            if self.process.poll() is None:
                self.press("\x03")
                time.sleep(0.2)
            return self.process.poll() is not None

        eventually(ended)

    def ends(self) -> Done:
        """The end of the command and all it showed."""
        code = self.process.wait(PATIENCE)
        self._listener.join(PATIENCE)
        return Done(code, self.text, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self._listener.join(PATIENCE)
        os.close(self._master)


def on_terminal(*words: object, columns: int = 100, env: Mapping[str, str] | None = None) -> Done:
    """Run `ledger` on a terminal to its end."""
    with Terminal(*words, columns=columns, env=env) as terminal:
        return terminal.ends()


class Background:
    """A command that goes on, its lines read one by one."""

    def __init__(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        reads: bool = True,
    ) -> None:
        self.process = subprocess.Popen(
            [COMMAND, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment(env),
            cwd=cwd,
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        if reads:
            self._listener.start()
        self._taken = 0

    def listen(self) -> None:
        """Begin to read what it says, if it was started with `reads=False`."""
        self._listener.start()

    def waiting(self) -> int:
        """How many bytes on stdout nobody has read yet."""
        assert self.process.stdout is not None
        return int.from_bytes(fcntl.ioctl(self.process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)

    def has_open(self, name: str) -> bool:
        """Whether it has a file open whose name begins so."""
        files = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed since it was listed
                files.append(link.readlink().name)
        return any(file.startswith(name) for file in files)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._said.extend(iter(self.process.stdout.readline, ""))

    def line(self) -> str:
        """The next line on stdout."""
        limit = time.monotonic() + PATIENCE
        while len(self._said) <= self._taken:
            assert time.monotonic() < limit, "it said nothing more"
            assert self._listener.is_alive() or len(self._said) > self._taken, self.errors()
            time.sleep(0.005)
        self._taken += 1
        return self._said[self._taken - 1].rstrip("\n")

    def errors(self) -> str:
        """All that it said on stderr, when it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ends(self) -> Done:
        """The end of the command, with what was not read yet."""
        code = self.process.wait(PATIENCE)
        self._listener.join(PATIENCE)
        return Done(code, "".join(self._said[self._taken :]), self.errors())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        if self._listener.is_alive():
            self._listener.join(PATIENCE)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
