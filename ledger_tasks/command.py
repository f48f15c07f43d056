"""`CommandExecutor`: a subtask done by a command, for instance a model's own command line.

Its time limit ends the whole process group, its output is read as JSON where it is JSON, and a command that fails
says so with the end of what it wrote to stderr. No shell is involved.
"""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from ledger import UsageError
from ledger_tasks.compound_plan import is_time_limit
from ledger_tasks.compound_run import SubtaskFailed, given_up

#: characters of stderr that a failure tells
_TAIL: Final = 2_000
#: seconds between two looks whether it is to stop
_LOOK: Final = 0.05
_CHUNK: Final = 65_536
_PLACE: Final = re.compile(r"\{(model|prompt)\}")


class CommandExecutor:
    """Runs a command for each subtask: `CommandExecutor(["claude", "-p", "--model", "{model}", "--output-format", "json"])`.

    `{model}` and `{prompt}` in its words are replaced; without `{prompt}` the prompt is what it reads from stdin. `env`
    is added to this process's environment. JSON that it prints is read as Claude's command line writes it (result,
    total_cost_usd, usage, is_error), or as `execute` returns it; anything else is the result as it stands. Pass it as
    `execute`; it can be pickled. A command that leaves its process group is not ended with it, nor is any by the
    death of this process.
    """

    def __init__(
        self, command: Sequence[str], *, timeout: float = 120.0, env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None, most_bytes: int = 64 * 2**20,
    ) -> None:  # fmt: skip
        words = [] if isinstance(command, str) else list(command)
        if not words or not all(isinstance(word, str) for word in words):
            raise UsageError(f"the command is {command!r}; give a list of words: ['claude', '-p']")
        if not is_time_limit(timeout):
            raise UsageError(f"timeout={timeout!r} is not a number of seconds above 0")
        odd = [name for pair in (env or {}).items() for name in pair if not isinstance(name, str)]
        if odd:
            raise UsageError(f"env has {odd[0]!r} in it; names and values must be strings")
        self.command, self.timeout = words, timeout
        self.env, self.cwd = dict(env or {}), cwd
        #: of its output; one that writes more is ended
        self.most_bytes = most_bytes

    def __repr__(self) -> str:
        return f"CommandExecutor({self.command!r})"

    def __call__(self, subtask: Mapping[str, Any]) -> dict[str, Any]:
        """Run it, and return result, cost and tokens. Raises `SubtaskFailed`."""
        prompt, seconds = prompt_of(subtask), subtask.get("timeout", self.timeout)
        put = {"model": str(subtask.get("model", "")), "prompt": prompt}
        # one pass: a prompt that speaks of {model} stays as it is
        words = [_PLACE.sub(lambda place: put[place[1]], word) for word in self.command]
        given = b"" if any("{prompt}" in word for word in self.command) else prompt.encode(errors="replace")
        running = _Running(self._started(words), words[0], given, self.most_bytes)
        try:
            status = running.follow(seconds)
        finally:
            running.end()
        return _read(words[0], status, bytes(running.output), running.tail())

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.cwd,
                env={**os.environ, **self.env}, start_new_session=True, bufsize=0,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise SubtaskFailed(_why_not_started(words[0], self.cwd, error)) from None


def prompt_of(subtask: Mapping[str, Any]) -> str:
    """The text that a command is given: what to do, what it is a part of, and what came out of what it depends on."""
    text = str(subtask.get("description", ""))
    if subtask.get("prompt"):
        text += f"\n\nThis is a part of a larger request:\n{subtask['prompt']}"
    for index, result in sorted((subtask.get("inputs") or {}).items()):
        shown = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        text += f"\n\nResult of subtask {index}:\n{shown}"
    return text


def _why_not_started(name: str, cwd: object, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename == name:
        return f"the command {name!r} was not found; install it, or name it by its whole path"
    if isinstance(error, OSError) and error.strerror and error.errno == 7:
        return f"the command {name!r} was not started: its arguments are too long; leave {{prompt}} out, and it reads the prompt from stdin"
    where = "" if cwd is None else f" in {cwd}"
    return f"the command {name!r} was not started{where}: {error}"


class _Running:
    """A command that runs: what it is given, and what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, given: bytes, most: int) -> None:
        self.process, self.name, self.most = process, name, most
        self.output = bytearray()
        self._errors = bytearray()
        self._given = memoryview(given)
        self._pipes = selectors.DefaultSelector()
        for pipe, what in ((process.stdin, "given"), (process.stdout, "output"), (process.stderr, "errors")):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._pipes.register(
                    pipe, selectors.EVENT_WRITE if what == "given" else selectors.EVENT_READ, what
                )

    def follow(self, seconds: float) -> int:
        """Its exit status. Raises `SubtaskFailed` when its time is over, it writes too much, or nobody waits for it."""
        limit = time.monotonic() + seconds
        while not self._has_ended():
            if given_up():
                raise SubtaskFailed("it was given up")
            if time.monotonic() >= limit:
                raise SubtaskFailed(f"no answer in {seconds:g} s: the command {self.name!r} was ended")
            self._pass_on(min(_LOOK, max(0.0, limit - time.monotonic())))
        while self._pass_on(0):  # what it wrote last; what it left running is not waited for
            pass
        self._kill()
        return self.process.wait()

    def _has_ended(self) -> bool:
        """Looks without reaping it: until it is reaped nobody else can be given its number."""
        asked = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, asked) is not None

    def _pass_on(self, seconds: float) -> bool:
        """Write and read what can be; whether anything was read."""
        if not self._pipes.get_map():
            time.sleep(min(seconds, 0.005))
            return False
        was_read = False
        for key, _ in self._pipes.select(seconds):
            was_read |= self._give(key) if key.data == "given" else self._take(key)
        return was_read

    def _give(self, key: selectors.SelectorKey) -> bool:
        try:
            sent = os.write(key.fd, self._given[:_CHUNK]) if self._given else 0
        except BlockingIOError:
            return False
        except OSError:  # it does not read all of it
            sent = len(self._given)
        self._given = self._given[sent:]
        if not self._given:
            self._done_with(key)
        return False

    def _take(self, key: selectors.SelectorKey) -> bool:
        try:
            found = os.read(key.fd, _CHUNK)
        except BlockingIOError:
            return False
        if not found:
            self._done_with(key)
            return False
        if key.data == "errors":
            self._errors = (self._errors + found)[-4 * _TAIL :]
            return True
        self.output += found
        if len(self.output) > self.most:
            raise SubtaskFailed(
                f"the command {self.name!r} wrote more than {self.most} bytes and was ended; let it write to a file"
            )
        return True

    def _done_with(self, key: selectors.SelectorKey) -> None:
        self._pipes.unregister(key.fileobj)
        key.fileobj.close()  # type: ignore[union-attr] # pipes, not numbers

    def _kill(self) -> None:
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # nobody is left in it but who has ended
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Let nothing of it go on."""
        self._kill()
        self.process.wait()
        self._pipes.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def tail(self) -> str:
        """The end of what it wrote to stderr."""
        return self._errors.decode(errors="replace").strip()[-_TAIL:]


# -- what it wrote --


def _read(name: str, status: int, output: bytes, tail: str) -> dict[str, Any]:
    text = output.decode(errors="replace").strip()
    found = _answer_in(text)
    told = {"result": found.get("result", text), "cost": _cost_in(found), "tokens": _tokens_in(found)}
    if status:
        how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        why = tail or (str(told["result"])[-_TAIL:])
        raise SubtaskFailed(
            f"the command {name!r} {how}{why and f': {why}'}", cost=told["cost"], tokens=told["tokens"]
        )
    if found.get("is_error"):
        raise SubtaskFailed(
            f"the command {name!r} reports an error: {str(told['result'])[:_TAIL]}",
            cost=told["cost"],
            tokens=told["tokens"],
        )
    return told


def _answer_in(text: str) -> dict[str, Any]:
    """The JSON object that it printed, or the last one of a list that has a result; {} if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if isinstance(found, list):
        found = next((one for one in reversed(found) if isinstance(one, dict) and "result" in one), None)
    return found if isinstance(found, dict) else {}


def _cost_in(found: dict[str, Any]) -> float | None:
    return _amount(found.get("total_cost_usd", found.get("cost")))


def _tokens_in(found: dict[str, Any]) -> int:
    usage = found.get("usage")
    if not isinstance(usage, dict):
        return int(_amount(found.get("tokens")) or 0)
    return sum(int(_amount(usage.get(f"{what}_tokens")) or 0) for what in ("input", "output"))


def _amount(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None
