"""Where a command prints. A terminal gets tables that fit it; a pipe gets all text, tab-separated, no codes.

Rich is loaded only for what is rendered: a list in a pipe starts without it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

import click

from ledger_ops.values import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_CHUNK = 200


class Cell(NamedTuple):
    """A text that is safe to show, and how."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A column of a list; on a terminal the flexible ones share what the others leave."""

    title: str
    justify: Literal["left", "right"] = "left"
    #: how wide it may be on a terminal; 0: what is left
    most: int = 40
    #: from how wide a terminal on it is shown at all
    least_terminal: int = 0


class Grid(NamedTuple):
    """A list, as values."""

    columns: Sequence[Column]
    rows: Iterable[Sequence[Cell]]


class Screen:
    """Stdout of a command."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self.is_terminal = self.file.isatty()
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """Rich's view of it; NO_COLOR means no codes at all."""
        if self._console is None:
            self._console = _console(self.file, is_terminal=self.is_terminal)
        return self._console

    def text(self, *texts: Text) -> None:
        """Print lines; a terminal wraps what is longer, nothing is cut."""
        for text in texts:
            if self.is_terminal:
                self.console.print(text)
            else:
                self.line(text.plain)  # what rich would print there, in a fraction of the time
        self.file.flush()

    def line(self, text: str) -> None:
        """Print a line without styles."""
        print(text, file=self.file)

    def json(self, value: Any) -> None:
        """Print one JSON value; ASCII, so that nothing in it can reach the terminal."""
        print(json.dumps(value, indent=2 if self.is_terminal else None), file=self.file)

    def json_array(self, values: Iterable[Any]) -> None:
        """Print a JSON array, an element a line, in constant memory."""
        before = "[\n"
        for value in values:
            print(f"{before}{json.dumps(value)}", end="", file=self.file)
            before = ",\n"
        print("\n]" if before != "[\n" else "[]", file=self.file)

    def grid(self, grid: Grid) -> None:
        """Print a list in constant memory."""
        if self.is_terminal:
            self._table(grid)
        else:
            print("\t".join(column.title for column in grid.columns), file=self.file)
            for row in grid.rows:
                print("\t".join(cell.text for cell in row), file=self.file)

    def _table(self, grid: Grid) -> None:
        """A table in pieces of one shape, so that a long one needs no memory."""
        from rich.table import Table
        from rich.text import Text

        width = self.console.width
        shown = [i for i, column in enumerate(grid.columns) if width >= column.least_terminal]
        columns = [grid.columns[i] for i in shown]
        rows = iter(grid.rows)
        sizes: list[int] = []
        while chunk := list(itertools.islice(rows, _CHUNK)):
            is_first = not sizes
            sizes = sizes or _sizes(columns, [[row[i] for i in shown] for row in chunk], width)
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=is_first)
            for column, size in zip(columns, sizes, strict=True):
                table.add_column(
                    column.title,
                    justify=column.justify,
                    width=size,
                    no_wrap=True,
                    overflow="ellipsis",
                    header_style="bold",
                )
            for row in chunk:
                table.add_row(*(Text(row[i].text, style=row[i].style) for i in shown))
            self.console.print(table, soft_wrap=False)


def _console(file: TextIO, *, is_terminal: bool) -> Console:
    from rich.console import Console

    class Quiet(Console):
        """Leaves it to the command what a reader who has gone means; rich would exit with 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    plain = not is_terminal or os.environ.get("NO_COLOR")
    return Quiet(
        file=file,
        force_terminal=is_terminal,
        color_system=None if plain else "auto",
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )


def _sizes(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> list[int]:
    """How wide each column is on a terminal of that width."""
    from rich.cells import cell_len

    needs = [
        max(cell_len(column.title), *(cell_len(row[i].text) for row in rows))
        for i, column in enumerate(columns)
    ]
    sizes = [min(need, column.most) for need, column in zip(needs, columns, strict=True)]
    flexible = [i for i, column in enumerate(columns) if not column.most]
    left = width - sum(sizes) - 2 * len(columns)
    for place, i in enumerate(flexible):
        share = max(left // (len(flexible) - place), 8)
        sizes[i] = min(needs[i], share)
        left -= sizes[i]
    return sizes


# -- what is no value of the command: on stderr --


def note(text: str) -> None:
    """Tell the person something that is no part of the output."""
    click.echo(text, err=True)


def confirmed(what: str, ask: str, *, yes: bool) -> bool:
    """Whether the person agrees to what would happen. In a pipe nobody is asked: --yes must say it there."""
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        note(f"Error: nothing was changed: {what}; nobody can be asked here, add --yes if that is meant")
        return False
    try:
        agreed = click.confirm(f"{what}. {ask}", err=True)
    except click.Abort:
        note("")
        agreed = False
    if not agreed:
        note("nothing was changed")
    return agreed


@contextmanager
def progress(what: str, *, prints: bool = False) -> Iterator[Progress]:
    """Something for long work to count on; a bar shows it while stderr is a terminal.

    Work that `prints` to the terminal meanwhile shows by that how far it is, and has no bar.
    """
    if not sys.stderr.isatty() or (prints and sys.stdout.isatty()):
        yield Progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Screen(sys.stderr).console
    # by default rich takes sys.stdout for the bar's terminal, and what is printed to a file never gets there
    with Bars(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        bar = bars.add_task("", total=None)

        def tell(steps: Progress) -> None:
            bars.update(bar, total=steps.total or None, completed=steps.done)

        yield Progress(tell=tell)
