"""What is said of a compound: values in, rich text out; what others wrote is made harmless."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from rich.text import Text

from ledger_cli.compound_grids import LOOKS, Branch, Found, branches, word
from ledger_cli.tasks_render import bar
from ledger_ops.values import dollars, printable, span
from ledger_tasks.model import moment

_BAR, _SHORT = 30, 100
#: what a person looks for first, where not all have room
_FIRST = ("executing", "routing", "failed", "queued", "pending", "completed")


def head(found: Found) -> Iterator[Text]:
    """Which compound, how far, what it cost; its prompt and the planner's reasoning."""
    yield heading(found)
    yield Text.assemble(("prompt     ", "dim"), _short(found["prompt"]))
    if found["reasoning"]:
        yield Text.assemble(("reasoning  ", "dim"), _short(found["reasoning"]))


def heading(found: Found) -> Text:
    """One compound in a line, as a list has it or as the full picture does."""
    total, done, failed = found["subtask_count"], found["completed_count"], found.get("failed_count", 0)
    cell = word(found["status"])
    line = Text.assemble((printable(found["id"]), "bold"), "  ", (cell.text, cell.style), "  ")
    line.append_text(_bar(done / total, failed / total))
    line.append(f" {done:,} of {total:,}")
    line.append(f"  {failed:,} failed" if failed else "", "red")
    line.append(f"  {dollars(found['total_cost'])}" if found["total_cost"] else "")
    line.append(f"  {found['total_tokens']:,} tokens" if found.get("total_tokens") else "", "dim")
    line.append(f"  {_age(found['created_at'], found['completed_at'])}", "dim")
    return line


def tree(found: Found, most: int) -> Iterator[Text]:
    """A line for each subtask, below what it waits for; of too many the most interesting ones."""
    subtasks = found["subtasks"]
    if len(subtasks) <= most:
        yield from map(branch_line, branches(subtasks))
        return
    shown = sorted(subtasks, key=lambda one: _FIRST.index(one["status"]))[: max(most - 1, 1)]
    for one in sorted(shown, key=lambda one: int(one["index"])):
        yield branch_line(Branch(one, "", ()))
    yield Text(f"… and {len(subtasks) - len(shown):,} more; --json has them all", "dim")


def branch_line(branch: Branch) -> Text:
    """A subtask: where it stands, what it is, who does it, what came of it."""
    one = branch.subtask
    sign, style = LOOKS.get(one["status"], ("·", ""))
    text = Text.assemble((branch.before, "dim"), (sign, style), " ", (str(one["index"]), "bold"))
    text.append(f"  {_short(one['description'])}")
    text.append(f"  {printable(one['model'])}", "magenta")
    if one["started_at"] and one["status"] in ("executing", "completed", "failed"):
        text.append(f"  {_age(one['started_at'], one['completed_at'])}", "dim")
    text.append(f"  {dollars(one['cost'])}" if one["cost"] else "")
    if branch.others:
        text.append(f"  and after {', '.join(map(str, branch.others))}", "dim")
    if one["status"] == "failed":
        text.append(f"  {_short(str(one['result']))}", "red")
    return text


def ended_line(one: Found) -> Text:
    """A subtask that has ended, in a line of its own, without a tree."""
    return branch_line(Branch(one, "", ()))


def results(found: Found) -> Iterator[Text]:
    """What came of each subtask, whole."""
    for one in found["subtasks"]:
        if one["result"] is None:
            continue
        value = one["result"]
        whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
        yield Text.assemble("\n", (f"{one['index']}  {_short(one['description'])}", "bold"))
        yield Text(printable(whole, lines=True))


def _bar(done: float, failed: float) -> Text:
    """How much is done and, at the right end, how much never will be."""
    lost = min(round(failed * _BAR) or int(failed > 0), _BAR)
    text = bar(min(done / (1 - lost / _BAR), 1.0) if lost < _BAR else 0.0, _BAR - lost)
    return text.append("█" * lost, "red")


def listed(found: Found) -> Text:
    """One compound among others, in a line."""
    return Text.assemble(heading(found), "  ", _short(found["prompt"]))


def board(found: Found, height: int) -> Iterable[Text]:
    """The live view, in so many lines."""
    lines = [*head(found)]
    return [*lines, *tree(found, max(height - len(lines) - 1, 3))]


def _short(text: str) -> str:
    """The beginning of a text, in a line."""
    line = printable(" ".join(text[: 4 * _SHORT].split()))
    return line if len(line) <= _SHORT and len(text) <= 4 * _SHORT else f"{line[: _SHORT - 1]}…"


def _age(begin: str, end: str | None) -> str:
    begun, ended = moment(begin), moment(end) or datetime.now(UTC)
    return span(max(0.0, (ended - begun).total_seconds()) * 1e6) if begun else ""
