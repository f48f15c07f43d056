"""Real processes for the tests: each is a short script that is told what to do line by line."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE = 60.0  # how long anything may take before the test is given up; no speed is judged

PRELUDE = """\
import os, posix, signal, sys, threading, time
from ledger import Guard, InDoubt, InProgress, NotPerformed, StoreError, current, idempotency_key

DB = sys.argv[1]

def say(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

def effect(*words):
    handle = os.open(DB + ".effects", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(handle, (" ".join(map(str, words)) + "\\n").encode())
    os.close(handle)

def end_alone():
    # under coverage a child that exits saves what its parent measured too, for which it waits for a lock that
    # another thread of the parent may have held at the fork
    leave, me = os._exit, os.getpid()
    os._exit = lambda code: (leave if os.getpid() == me else posix._exit)(code)

if "coverage" in sys.modules:
    end_alone()
    os.register_at_fork(after_in_child=end_alone)

guard = Guard(DB, quiet=True)
"""


class Actor:
    """One process. Its script has `guard`, `say`, `hear` and `effect`; all scripts name their tools alike."""

    def __init__(self, script: Path, db: Path, *args: object) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")}
        self._errors = script.with_suffix(".stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, script, db, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
        )
        self._heard = b""
        self.pid = self._process.pid

    def line(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        limit = time.monotonic() + PATIENCE
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, limit - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert part, f"it said nothing more ({self._heard!r}): {self.errors()}"
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def tell(self, *words: object) -> None:
        """Give it a line to hear."""
        assert self._process.stdin is not None
        self._process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self._process.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """Pause it; returns when it stands still."""
        self.send(signal.SIGSTOP)
        eventually(lambda: self.state() == "T")

    def thaw(self) -> None:
        """Let it go on."""
        self.send(signal.SIGCONT)

    def state(self) -> str:
        """The letter of its state; "" when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def kill(self) -> None:
        """End it as the kernel does, and reap it."""
        self._process.kill()
        self._process.wait(PATIENCE)

    def ends(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait(PATIENCE)

    def ends_well(self) -> None:
        """It must end without an error."""
        assert self.ends() == 0, self.errors()

    def errors(self) -> str:
        """What it wrote to stderr."""
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def close(self) -> None:
        """End it if it still runs, and give back its pipes."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._errors.close()


class Stage:
    """Where actors appear, around one ledger; whoever still runs at the end is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db = folder / "ledger.db"
        self._actors: list[Actor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            actor.close()

    def start(self, script: str, *args: object) -> Actor:
        """A new process with this script; `sys.argv[2:]` are the arguments."""
        place = self.folder / "scripts" / str(len(self._actors))
        place.mkdir(parents=True)
        file = place / "actor.py"  # one name, so that a tool is the same tool in every script
        file.write_text(PRELUDE + script)
        actor = Actor(file, self.db, *args)
        self._actors.append(actor)
        return actor

    def crowd(self, count: int, script: str) -> list[Actor]:
        """So many processes with one script, each of which has said "ready" and waits to hear."""
        actors = [self.start(script, number) for number in range(count)]
        for actor in actors:
            assert actor.line() == "ready"
        return actors

    def let_go(self, crowd: list[Actor]) -> None:
        """Tell all of a crowd to begin, and see them end well."""
        for actor in crowd:
            actor.tell("go")
        for actor in crowd:
            actor.ends_well()

    def effects(self) -> list[str]:
        """What the tools have done, in order."""
        try:
            return Path(f"{self.db}.effects").read_text().splitlines()
        except FileNotFoundError:
            return []


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """A stage in a folder."""
    with Stage(folder) as made:
        yield made


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds; given up only after a time that no healthy machine needs."""
    limit = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.01)


@contextmanager
def tracing() -> Iterator[Callable[[], int]]:
    """Tells by how many bytes the memory in use has grown."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
