"""What a worker of `ledger tasks run` does, told while it works: a live view, or a line for each ended run.

It is read from the ledger, so that what is shown is what counted. The main thread is the worker's.
"""

from __future__ import annotations

import itertools
import json as json_module
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from ledger import LedgerError
from ledger_cli.screen import Screen, note
from ledger_ops.values import printable, span
from ledger_tasks import Task, TaskEvent, TaskLedger, TaskState, Worker
from ledger_tasks.model import plain
from ledger_tasks.states import HELD

if TYPE_CHECKING:
    from rich.console import Group

_POLL_SECONDS = 0.25
_DOING, _ENDED = 12, 8


@dataclass(frozen=True, slots=True)
class Ended:
    """One run of a task that this worker has no more."""

    task: str
    session: str
    agent: str
    state: str
    #: the state after it where it did not stay there, as pending for a retry
    then: str
    seconds: float
    why: str
    result: Any
    at: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self) | {"at": plain(self.at)}


class Runs:
    """The runs of one agent, as the events of the ledger tell them."""

    def __init__(self, agent: str) -> None:
        self._agent = agent
        self._begun: dict[str, datetime] = {}

    def ended(self, events: Sequence[TaskEvent]) -> Iterator[Ended]:
        """Those that ended by these events."""
        after = {(event.task, event.n - 1): event for event in events}
        for event in events:
            if event.to_state == TaskState.ACTIVE and event.actor == self._agent:
                self._begun.setdefault(event.task, event.at)
            elif event.to_state not in HELD and event.task in self._begun:
                yield self._of(event, after.get((event.task, event.n)))

    def _of(self, event: TaskEvent, following: TaskEvent | None) -> Ended:
        begun = self._begun.pop(event.task)
        then = following.to_state if following and event.to_state == TaskState.FAILED else ""
        seconds = round((event.at - begun).total_seconds(), 6)
        result = event.data.get("set", {}).get("result")
        return Ended(
            event.task, event.session, self._agent, event.to_state, then, seconds, event.why, result, event.at
        )


class TheWorker(Worker):
    """The worker of a command, which says what it takes and whether it was told to end."""

    def __init__(self, ledger: TaskLedger, handlers: Any, **options: Any) -> None:
        super().__init__(ledger, handlers, **options)
        #: of the tasks that it takes
        self.types = "tasks of every type" if callable(handlers) else ", ".join(map(printable, handlers))
        self.is_told = threading.Event()

    def stop(self) -> None:
        """Take nothing more."""
        self.is_told.set()
        super().stop()

    def doing(self, most: int = 100) -> list[Task]:
        """What it has at the moment."""
        return list(itertools.islice(self.ledger.tasks(state=HELD, assignee=self.agent), most))


class View:
    """Counts the runs that ended, and tells of them."""

    def __init__(self, worker: TheWorker) -> None:
        self.worker = worker
        self.since = datetime.now(UTC)
        self.done = self.failed = self.others = 0

    def show(self, ended: Sequence[Ended]) -> None:
        """These ended since it was last called, which is done again and again, also for none."""
        for one in ended:
            self.done += one.state == TaskState.DONE
            self.failed += one.state == TaskState.FAILED
            self.others += one.state not in (TaskState.DONE, TaskState.FAILED)

    def told(self) -> str:
        """All of it in a line, for the end."""
        others = f", {self.others:,} given back or taken away" if self.others else ""
        who = printable(self.worker.agent)
        return f"{who} ended after {self.age()}: {self.done:,} done, {self.failed:,} failed{others}"

    def age(self) -> str:
        """For how long it has been at work."""
        return span((datetime.now(UTC) - self.since).total_seconds() * 1e6)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Following:
    """Tells, in a thread of its own, of the runs of a worker until it has ended."""

    def __init__(self, worker: TheWorker, view: View) -> None:
        self._worker, self._view = worker, view
        self._runs = Runs(worker.agent)
        self._seen = worker.ledger.last_seq()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ledger-worker-view", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            with self._view:
                while not self._is_over.wait(_POLL_SECONDS):
                    self._look()
                self._look()
        except BrokenPipeError:  # the reader has gone: nobody wants to know any more what it does
            self._worker.stop()

    def _look(self) -> None:
        try:
            events = self._worker.ledger.events(after=self._seen)
            while page := list(itertools.islice(events, 500)):
                self._view.show(list(self._runs.ended(page)))
                self._seen = page[-1].seq
            self._view.show(())
        except LedgerError:  # of which the worker tells; the next look finds what was missed
            pass


# -- in a pipe --


class Lines(View):
    """A line for each run that ended."""

    def __init__(self, worker: TheWorker, screen: Screen, *, json: bool) -> None:
        super().__init__(worker)
        self._screen, self._json = screen, json
        self._is_ending = False

    def __enter__(self) -> Self:
        worker = self.worker
        where = f"session {printable(worker.ledger.session)}"
        note(f"{printable(worker.agent)} takes {worker.types} of {where}, {worker.concurrency} at once")
        return self

    def show(self, ended: Sequence[Ended]) -> None:
        """Print them; when it was told to end, say once what is still to be waited for."""
        super().show(ended)
        for one in ended:
            self._tell(one)
        self._screen.file.flush()
        if self.worker.is_told.is_set() and not self._is_ending:
            self._is_ending = True
            if doing := len(self.worker.doing()):
                note(_ending(self.worker, doing))

    def _tell(self, one: Ended) -> None:
        if self._json:
            self._screen.line(json_module.dumps(one.to_dict()))
        else:
            from ledger_cli.tasks_render import ended_line

            self._screen.text(ended_line(one))


def _ending(worker: TheWorker, doing: int) -> str:
    tasks = "a task" if doing == 1 else f"{doing:,} tasks"
    return f"ending: {tasks} may go on for {worker.grace:g} s; once more ends it at once"


# -- on a terminal --


class Board(View):
    """A live view: since when it works, what it is doing, and what ended last."""

    def __init__(self, worker: TheWorker, screen: Screen) -> None:
        super().__init__(worker)
        from rich.live import Live

        self._last: deque[Ended] = deque(maxlen=_ENDED)
        # what handlers and the log say goes above it, unless stderr is elsewhere
        self._live = Live(console=screen.console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, ended: Sequence[Ended]) -> None:
        """Draw it anew."""
        super().show(ended)
        self._last.extend(ended)
        if not ended:
            self._live.update(self._drawn(), refresh=True)

    def _drawn(self) -> Group:
        from rich.console import Group

        from ledger_cli.tasks_render import worker_board

        worker, doing = self.worker, self.worker.doing(_DOING)
        lines = list(
            worker_board(
                printable(worker.agent),
                f"{self.age()}, {worker.types} of {printable(worker.ledger.session)}",
                {"done": self.done, "failed": self.failed},
                worker.ledger.counts(),
                doing,
                self._last,
                _ending(worker, len(doing)) if doing and worker.is_told.is_set() else "",
            )
        )
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)
