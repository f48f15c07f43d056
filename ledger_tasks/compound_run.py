"""What happens to one subtask where it is executed: in a thread, in a process, or on a machine of a cluster."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import ledger
from ledger_tasks.errors import NotHolder, in_words
from ledger_tasks.model import to_json

P = ParamSpec("P")
T = TypeVar("T")
#: of a cost or a number of tokens in one report
_MOST: Final = 1e15


class SubtaskFailed(Exception):
    """What an `execute` raises that failed and knows what it cost all the same."""

    def __init__(self, message: str, *, cost: float | None = None, tokens: int = 0) -> None:
        super().__init__(message)
        self.cost, self.tokens = cost, tokens


class Outcome(NamedTuple):
    """What an execution came to; JSON values only, so that it comes back from any process."""

    result: Any = None
    #: why it failed; None: it did not
    error: str | None = None
    #: US dollars, where it was reported
    cost: float | None = None
    tokens: int = 0


class Held:
    """Whether a subtask is still its runner's. In another process nobody can tell, and it seems to be."""

    def __init__(self) -> None:
        #: why it is not any more
        self.why = ""
        self._lost = threading.Event()
        self._stirred = threading.Event()

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return Held, ()

    @property
    def is_lost(self) -> bool:
        """Whether nobody waits for its outcome any more."""
        return self._lost.is_set()

    def give_up(self, why: str) -> None:
        """Let nobody wait for it any more, and let it make no guarded call any more."""
        self.why = self.why or why
        self._lost.set()
        self._stirred.set()

    def follow(self, future: Future[Any]) -> None:
        """Let `wait` return when this has ended."""
        self._stirred.clear()
        if self.is_lost:
            self._stirred.set()
        future.add_done_callback(lambda _: self._stirred.set())

    def wait(self, seconds: float) -> None:
        """Return when what is followed has ended, when it is given up, or after so many seconds."""
        self._stirred.wait(seconds)

    def rest(self, seconds: float) -> None:
        """Return after so many seconds, or when it is given up."""
        self._lost.wait(seconds)

    def check(self) -> None:
        """Raise before a guarded call of what was given up, so that nothing runs."""
        if self.is_lost:
            raise NotHolder(f"this subtask was given up: {self.why}; nothing ran. Stop working on it", "")


_held: contextvars.ContextVar[Held | None] = contextvars.ContextVar("ledger_subtask", default=None)


def given_up() -> bool:
    """Whether nobody waits for the subtask that is executed here: it was cancelled, is too late, or its runner closes.

    For an `execute` that can stop in the middle. In another process it is always false.
    """
    held = _held.get()
    return held is not None and held.is_lost


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a subtask; it can be pickled if `execute` can."""

    execute: Callable[[dict[str, Any]], Any]
    subtask: dict[str, Any]
    #: guarded calls in it belong to that workflow, and replay what they did there before
    workflow: str
    held: Held
    #: of its claim: a cluster that answers equal calls from memory must not answer this one so
    token: str

    def __call__(self) -> Outcome:
        """Execute it. What it raises comes back in words: an error of a user may not survive pickling."""
        before = _held.set(self.held)
        try:
            with ledger.replaying(self.workflow, check=self.held.check):
                return outcome_of(_awaited(self.execute(self.subtask)))
        except SubtaskFailed as error:
            return Outcome(error=str(error), cost=_amount(error.cost), tokens=int(_amount(error.tokens) or 0))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded as the subtask's failure
            return Outcome(error=in_words(error))
        finally:
            _held.reset(before)


def _awaited(found: Any) -> Any:
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def outcome_of(found: Any) -> Outcome:
    """What an `execute` returned: text, or a dict with result and maybe cost and tokens. Raises `SubtaskFailed`."""
    if isinstance(found, str):
        return Outcome(found)
    if not isinstance(found, Mapping) or "result" not in found:
        raise SubtaskFailed(
            f"execute returned {type(found).__name__}; let it return text, or a dict with result, cost and tokens"
        )
    to_json(found["result"], "the result of execute")
    return Outcome(
        found["result"], cost=_amount(found.get("cost")), tokens=int(_amount(found.get("tokens")) or 0)
    )


def _amount(value: Any) -> float | None:
    """A reported number. What was done stays done if its report is odd, so that is no error."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if is_number and 0 <= value <= _MOST:
        return float(value)
    logging.getLogger("ledger").warning(
        "a subtask reported %r as its cost or tokens, which is no number from 0; it is left out", value
    )
    return None


class Threads(Executor):
    """A thread for each call. One that never comes back costs no other its place, and does not hold up the exit."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Begin at once."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                found = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised in the one that waits
                future.set_exception(error)
            else:
                future.set_result(found)

        threading.Thread(target=work, name="ledger-subtask", daemon=True).start()
        return future
