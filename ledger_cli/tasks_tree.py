"""`ledger tasks tree`: tasks under those that they are parts of, without recursion and in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import click

from ledger_cli.options import MOST, as_json, command
from ledger_cli.screen import Screen, note
from ledger_cli.tasks_grids import task_dict
from ledger_cli.tasks_options import Place, looks
from ledger_tasks import Task, TaskLedger, TaskState

#: below this depth a line is not set in any further: a chain of ten thousand would be mostly blanks
_DEEPEST = 16


class Node(NamedTuple):
    """A task in its place."""

    task: Task
    depth: int
    #: for each task above it and itself, whether it is the last of its siblings
    ends: tuple[bool, ...]
    #: how many of its parts are done, of how many
    parts: tuple[int, int]


def walk(tasks: TaskLedger, roots: Iterator[Task]) -> Iterator[Node]:
    """Every task, then its parts; the parts of one task are in memory, of the whole only the way to here."""
    stack: list[Iterator[tuple[Task, bool]]] = [_marked(roots)]
    ends: list[bool] = []
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            ends = ends[: len(stack) - 1]
            continue
        task, is_last = found
        depth = len(stack) - 1
        ends = [*ends[:depth], is_last]
        parts = tasks.list_tasks(parent=task.id)
        done = sum(part.state == TaskState.DONE for part in parts)
        yield Node(task, depth, tuple(ends[-_DEEPEST:]), (done, len(parts)))
        if parts:
            stack.append(_marked(iter(parts)))


def _marked(tasks: Iterator[Task]) -> Iterator[tuple[Task, bool]]:
    """Each with whether it is the last one."""
    before = next(tasks, None)
    while before is not None:
        following = next(tasks, None)
        yield before, following is None
        before = following


def indent(node: Node) -> str:
    """What stands before a task: lines from the ones above it."""
    if not node.depth:
        return ""
    above = node.ends[1 if len(node.ends) == node.depth + 1 else 0 : -1]
    hidden = node.depth - 1 - len(above)
    bars = "".join("   " if end else "│  " for end in above)
    return f"{f'⋯{hidden:,} ' if hidden else ''}{bars}{'└─ ' if node.ends[-1] else '├─ '}"


@command(
    "tree",
    examples=(
        "ledger tasks tree",
        "ledger tasks tree release --limit 1000",
        "ledger tasks tree --json | jq '.[].depth'",
    ),
    json_form=(
        "An array of tasks in the order of the tree, each as in `ledger tasks list`, with depth, parts and "
        "parts_done."
    ),
)
@click.argument("task", metavar="[ID]", required=False)
@click.option(
    "--limit", "-n", type=click.IntRange(1, MOST), default=200, show_default=True, help="How many at most."
)
@looks
@as_json
def tree_command(*, task: str | None, limit: int, place: Place, json: bool) -> None:
    """Draw tasks under those that they are parts of, with progress.

    Of all tasks, or of one with its subtasks.
    """
    tasks = place.opened()
    roots = tasks.tasks(parent="") if task is None else iter([tasks.get(task)])
    nodes = walk(tasks, roots)
    shown = itertools.islice(nodes, limit)
    screen = Screen()
    count = [0]
    if json:
        screen.json_array(map(_node_dict, _counted(shown, count)))
    else:
        from ledger_cli.tasks_render import tree_line

        for node in _counted(shown, count):
            screen.text(tree_line(node.task, indent(node), node.parts))
    screen.file.flush()
    more = _how_many_more(tasks, nodes, task, count[0], limit)
    if more:
        note(f"{more:,} more; --limit N shows N, `ledger tasks tree ID` one of them with its subtasks")
    elif not count[0] and not json:
        note("no tasks yet")


def _counted(nodes: Iterator[Node], count: list[int]) -> Iterator[Node]:
    for node in nodes:
        count[0] += 1
        yield node


def _node_dict(node: Node) -> dict[str, object]:
    done, parts = node.parts
    return {**task_dict(node.task), "depth": node.depth, "parts": parts, "parts_done": done}


def _how_many_more(tasks: TaskLedger, nodes: Iterator[Node], task: str | None, shown: int, limit: int) -> int:
    """Of a whole session by its counts, of one task by walking on."""
    if shown < limit:
        return 0
    return len(tasks) - shown if task is None else sum(1 for _ in nodes)
