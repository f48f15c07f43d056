"""How compounds are shown while they go on: a live tree on a terminal, in a pipe a line for what ended."""

from __future__ import annotations

import json as json_module
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from ledger_cli.compound_grids import is_over
from ledger_cli.screen import Screen
from ledger_tasks import CompoundRunner, TaskLedger, TaskState
from ledger_tasks import compound_view as view
from ledger_tasks.compound_plan import COMPOUND
from ledger_tasks.states import ENDED

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

#: looking at a huge compound takes no more than a tenth of the time, which is wanted for executing it
_SPARED = 9
#: lines of a tree that is no live view
_LONGEST_TREE = 200
#: of the newest compounds that a runner tells of
_MOST = 50
_UNENDED = [state for state in TaskState if state not in ENDED]
#: a tree that nothing happens to is drawn again so often, for the times in it
_AGAIN_SECONDS = 1.0


class Shown:
    """One compound on stdout. `look` again and again while it goes on; `end` says how it stands at last."""

    def __init__(
        self,
        tasks: TaskLedger,
        compound: str,
        *,
        json: bool,
        results: bool = False,
        screen: Screen | None = None,
    ) -> None:
        self._tasks, self._compound = tasks, compound
        self._json, self._results = json, results
        self._screen = screen or Screen()
        self._live: Live | None = None
        self._seen, self._at, self._cost = -1, 0.0, 0.0
        self._told: set[int] | None = None
        #: the full picture as it was when it was last looked at
        self.found: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def look(self) -> None:
        """Read it again if anything happened, and show what is new."""
        last, begun = self._tasks.last_seq(), time.monotonic()
        if begun - self._at < (_AGAIN_SECONDS if last == self._seen else _SPARED * self._cost):
            return
        self._seen = last
        self.found = view.progress(self._tasks, self._compound)
        self._at = time.monotonic()
        self._cost = self._at - begun
        if self._screen.is_terminal and not self._json:
            self._draw()
        elif not self._json:
            self._tell()

    def end(self, found: dict[str, Any]) -> None:
        """Say how it stands now, whole."""
        self._stop()
        if self._json:
            self._screen.json(found)
            return
        from ledger_cli import compound_render as render

        if self._told is None:
            self._screen.text(*render.head(found), *render.tree(found, _LONGEST_TREE))
        else:
            self.found = found
            self._tell()
            self._screen.text(*render.head(found))
        if self._results:
            self._screen.text(*render.results(found))

    def _tell(self) -> None:
        """A line for each subtask that has ended since the last look."""
        from ledger_cli.compound_render import ended_line

        told = self._told = self._told if self._told is not None else set()
        for one in self.found["subtasks"]:
            if one["status"] in ("completed", "failed") and one["index"] not in told:
                told.add(one["index"])
                self._screen.text(ended_line(one))

    # -- the live view --

    def _draw(self) -> None:
        from ledger_cli.compound_render import board

        self._live = self._live or live(self._screen)
        self._live.update(drawn([*board(self.found, self._screen.console.height)]), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class ShownAll:
    """What a runner executes: on a terminal what is unfinished, in a pipe a line for each that ended."""

    def __init__(self, runner: CompoundRunner, screen: Screen, *, json: bool) -> None:
        self._runner, self._screen, self._json = runner, screen, json
        self._live: Live | None = None
        self._ended = {one["id"] for one in runner.recent(_MOST) if is_over(one)}

    def __enter__(self) -> Self:
        if self._screen.is_terminal and not self._json:
            self._live = live(self._screen)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def look(self) -> None:
        """Tell what has ended since the last look, and draw what has not."""
        found = self._runner.recent(_MOST)
        for one in reversed(found):
            if is_over(one) and one["id"] not in self._ended:
                self._ended.add(one["id"])
                self._tell(one)
        if self._live is not None:
            self._live.update(self._drawn([one for one in found if not is_over(one)]), refresh=True)

    def is_any_unfinished(self) -> bool:
        """Whether there is still something to execute for this name."""
        left = self._runner.ledger.tasks(state=_UNENDED, type=COMPOUND)
        return any(self._runner.name in task.capabilities for task in left)

    def _tell(self, one: dict[str, Any]) -> None:
        from ledger_cli.compound_render import listed

        if self._json:
            self._screen.line(json_module.dumps(one))
            self._screen.file.flush()
        else:
            self._screen.text(listed(one))

    def _drawn(self, unfinished: list[dict[str, Any]]) -> Group:
        from rich.text import Text

        from ledger_cli.compound_render import listed

        most = max(self._screen.console.height - 2, 1)
        more = len(unfinished) - most
        lines = [listed(one) for one in unfinished[:most]] or [Text("nothing to execute", "dim")]
        return drawn([*lines, *([Text(f"… and {more:,} more", "dim")] if more > 0 else [])])


def live(screen: Screen) -> Live:
    """A view that goes on; what is printed meanwhile goes above it, unless stderr is elsewhere."""
    from rich.live import Live

    made = Live(
        console=screen.console, auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty()
    )
    made.start()
    return made


def drawn(lines: list[Text]) -> Group:
    """Lines, each of which is cut where the terminal ends."""
    from rich.console import Group

    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)
