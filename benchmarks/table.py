"""The table in which a benchmark reports: measured values, floors, ratios, and counts that must be right."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SHORT = os.environ.get("BENCH_SHORT", "") not in ("", "0")


class Line(NamedTuple):
    """One line of the table; `met` is None where there is no target."""

    what: str
    measured: str
    floor: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None


class Table:
    """Lines that are printed at the end; a time over its target is reported, a wrong count is an error."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.wrong: list[str] = []

    def report(
        self, what: str, measured: float, unit: str, *, floor: float | None = None,
        ratio: float | None = None, most: float | None = None, least: float | None = None,
        of_ratio: bool = True,
    ) -> None:  # fmt: skip
        """Add a line; the target is a bound of the ratio, or of the measured value itself."""
        judged = ratio if of_ratio else measured
        target, met = "", None
        sign = " ×" if of_ratio else f" {unit}"
        if judged is not None and most is not None:
            target, met = f"≤ {most:g}{sign}", judged <= most
        elif judged is not None and least is not None:
            target, met = f"≥ {least:g}{sign}", judged >= least
        shown = "" if floor is None else _amount(floor, unit)
        self.lines.append(
            Line(what, _amount(measured, unit), shown, "" if ratio is None else f"{ratio:.2f}", target, met)
        )
        print(".", end="", file=sys.stderr, flush=True)

    def expect(self, what: str, found: object, right: object) -> None:
        """A count: the one thing that makes a benchmark fail."""
        self.lines.append(Line(what, str(found), "", "", f"= {right}", found == right))
        if found != right:
            self.wrong.append(f"{what}: {found}, not {right}")

    def run(self, *benches: Callable[[Path], object]) -> int:
        """Let each measure in a folder that is removed in the end, and print; 1 if a count is wrong."""
        home = Path(os.environ.get("BENCH_DIR") or ROOT / "build")
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home))
        begun = time.monotonic()
        try:
            for bench in benches:
                bench(folder)
        finally:
            shutil.rmtree(folder)
        return self.print(time.monotonic() - begun)

    def print(self, seconds: float) -> int:
        """All lines, aligned, and where they were measured; 1 if a count is wrong."""
        print(file=sys.stderr)
        print(
            f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} processors,"
            f" {'short' if SHORT else 'long'} form in {seconds:.0f} s"
        )
        words = {None: "", True: "ok", False: "over"}
        rows = [("what", "measured", "floor", "ratio", "target", "")]
        rows += [(n.what, n.measured, n.floor, n.ratio, n.target, words[n.met]) for n in self.lines]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        for row in rows:
            figures = [cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True)]
            cells = [row[0].ljust(widths[0]), *figures]
            print("  ".join([*cells, row[5]]).rstrip())
        for wrong in self.wrong:
            print(f"WRONG COUNT: {wrong}", file=sys.stderr)
        return 1 if self.wrong else 0


def _amount(value: float, unit: str) -> str:
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
