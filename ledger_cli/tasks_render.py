"""What commands about tasks say: values in, rich text out; what others wrote is made harmless."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ledger_cli.tasks_grids import LOOKS, moment, percent, standing, state_cell
from ledger_ops.values import clock, printable, span
from ledger_tasks import Task, TaskEvent, TaskState
from ledger_tasks.model import micros_of

if TYPE_CHECKING:
    from ledger_cli.tasks_following import Ended

_BAR = 20
_KINDS = {
    "created": ("+", "green"),
    "progress": ("…", "cyan"),
    "checkpoint": ("⚑", "cyan"),
    "artifact": ("▪", "cyan"),
    "depends": ("→", ""),
    "usage": ("¤", "dim"),
    "note": ("·", "dim"),
}


def bar(share: float, width: int = _BAR, style: str = "green") -> Text:
    """A share from 0 to 1 as a bar."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("█" * filled, style), ("░" * (width - filled), "dim"))


# -- events --


def event_line(event: TaskEvent) -> Text:
    """One thing that happened, in a line."""
    if event.from_state != event.to_state and event.from_state:
        sign, style = LOOKS.get(event.to_state, ("·", ""))
        what = f"{printable(event.from_state)} → {printable(event.to_state)}"
    else:
        sign, style = _KINDS.get(event.kind, ("·", ""))
        what = printable(event.kind)
    text = Text.assemble((f"{event.seq:>6}  {clock(micros_of(event.at))}", "dim"), "  ")
    text.append(f"{sign} {what:<21}", style)
    text.append(f"  {printable(event.task)}", "bold")
    for word, value in (("by", event.actor), ("through", event.source), ("at", event.stage)):
        if value:
            text.append(f"  {word} ", "dim")
            text.append(printable(value))
    text.append(f"  {_told(event)}" if _told(event) else "", "dim")
    return text


def _told(event: TaskEvent) -> str:
    """What else it says: how far the task is, and why."""
    changed = event.data.get("set")
    share = changed.get("progress") if isinstance(changed, dict) and event.kind == "progress" else None
    parts = [f"{share:.0%}" if isinstance(share, int | float) else "", printable(event.why)]
    return "  ".join(filter(None, parts))


# -- one task --


def detail(task: Task, standings: Mapping[str, str], events: Sequence[TaskEvent]) -> Iterator[Text]:
    """All that is known of one task; `standings` says where those stand that it waits for."""
    cell = state_cell(task)
    yield _field("task", Text(printable(task.id), "bold"))
    yield _field("state", Text.assemble((cell.text, cell.style), f"   version {task.version}"))
    for name, value in _plain_fields(task):
        if value:
            yield _field(name, value)
    if task.progress or task.stage:
        yield _field(
            "progress",
            Text.assemble(bar(task.progress), f" {percent(task) or '0%'}  ", printable(task.stage)),
        )
    yield from _dependencies(task, standings)
    for name, found in (("payload", task.payload), ("checkpoint", task.checkpoint), ("result", task.result)):
        if found is not None:
            yield _block(name, _json(found))
    for artifact in task.artifacts:
        yield _block("artifact", f"{printable(str(artifact.get('name')))}  {_json(artifact.get('value'))}")
    for error in task.errors:
        yield _block(
            "error",
            f"{printable(str(error.get('at')))}  {printable(str(error.get('error')), lines=True)}",
            "red",
        )
    if events:
        yield Text("\nevents", "bold")
        yield from map(event_line, events)


def _plain_fields(task: Task) -> list[tuple[str, str]]:
    used = (f"{task.tokens:,} tokens" * bool(task.tokens), f"cost {task.cost:g}" * bool(task.cost),
            f"{task.api_calls:,} api calls" * bool(task.api_calls))  # fmt: skip
    return [
        ("why", printable(task.reason)),
        ("title", printable(task.title)),
        ("what", printable(task.description, lines=True)),
        ("type", f"{printable(str(task.type))}   priority {task.priority}"),
        ("tags", printable(", ".join(task.tags))),
        ("needs", printable(", ".join(task.capabilities))),
        ("session", printable(task.session)),
        ("part of", printable(task.parent)),
        ("who", printable(task.assignee)),
        ("created", moment(task.created_at)),
        ("started", moment(task.started_at)),
        ("ended", moment(task.completed_at)),
        ("not before", moment(task.not_before)),
        ("deadline", moment(task.deadline)),
        ("worked", span(task.worked * 1e6) if task.worked else ""),
        ("retries", f"{task.retries} of {task.max_retries}" if task.max_retries or task.retries else ""),
        ("scope", f"{task.scope}: so often its tools were let run anew" if task.scope else ""),
        ("workflow", printable(task.workflow) if task.started_at else ""),
        ("used", ", ".join(filter(None, used))),
    ]


def _dependencies(task: Task, standings: Mapping[str, str]) -> Iterator[Text]:
    for dep in task.depends_on[: len(standings)]:
        word = standings[dep.id]
        sign, style = LOOKS.get(word, ("?", ""))
        if_not = "" if dep.on_failure == "skip" else f"   if that fails: {dep.on_failure}"
        yield _field(
            "waits for", Text.assemble((f"{sign} {word:<9}", style), f" {printable(dep.id)}", (if_not, "dim"))
        )
    if (more := len(task.depends_on) - len(standings)) > 0:
        yield _field("waits for", f"{more:,} more")
    if task.blocks:
        shown = printable(", ".join(task.blocks[:20]))
        yield _field(
            "blocks", f"{shown}{f' and {len(task.blocks) - 20:,} more' if len(task.blocks) > 20 else ''}"
        )


def _field(name: str, value: str | Text) -> Text:
    return Text.assemble((f"{name:<11}", "dim"), value)


def _block(title: str, text: str, style: str = "") -> Text:
    """A value under its title; more than one line is set in."""
    lines = text.split("\n")
    if len(lines) == 1:
        return Text.assemble((f"{title:<11}", "dim"), (text, style))
    return Text.assemble((f"{title}\n", "dim"), ("\n".join(f"  {line}" for line in lines), style))


def _json(value: Any) -> str:
    """A value as people read it: short ones on a line, long ones as a block."""
    line = json.dumps(value, ensure_ascii=False)
    text = line if len(line) < 100 else json.dumps(value, ensure_ascii=False, indent=2)
    return printable(text, lines=True)


# -- figures --


def figures(found: Mapping[str, Any], depth: int = 0) -> Iterator[Text]:
    """Nested figures, a line each, a group set in under its name."""
    pad = "  " * depth
    for name, value in found.items():
        label = printable(str(name).replace("_", " ") if depth < 2 else str(name))
        if isinstance(value, Mapping):
            yield Text(f"{pad}{label}", "bold")
            yield from figures(value, depth + 1)
        else:
            yield Text.assemble((f"{pad}{label:<{24 - len(pad)}}", "dim"), f" {_figure(value)}")


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(str(value))


# -- a line of a tree --


def tree_line(task: Task, before: str, parts: tuple[int, int]) -> Text:
    """A task in its place; `parts` is how many of its subtasks have ended well, of how many."""
    cell = state_cell(task)
    text = Text.assemble(
        (before, "dim"), (cell.text.partition(" ")[0], cell.style), " ", (printable(task.id), "bold")
    )
    if task.label != task.id:
        text.append(f"  {printable(task.label)}")
    text.append(f"  {cell.text.partition(' ')[2]}", cell.style)
    done, total = parts
    if total:
        text.append("  ")
        text.append_text(bar(done / total, 10))
        text.append(f" {done:,} of {total:,}")
    elif task.progress and task.state != TaskState.DONE:
        text.append("  ")
        text.append_text(bar(task.progress, 10, "cyan"))
        text.append(f" {percent(task)}")
    if task.state == TaskState.ACTIVE and task.stage:
        text.append(f"  {printable(task.stage)}", "dim")
    if task.assignee and standing(task) in ("assigned", "active", "paused", "review"):
        text.append(f"  {printable(task.assignee)}", "dim")
    return text


# -- the live view --


def board(
    session: str,
    counts: Mapping[TaskState, int],
    held: Sequence[Task],
    events: Sequence[TaskEvent],
    now: datetime,
) -> Iterator[Text]:
    """How far all of it is, who is at what, and what happened last."""
    total, done = sum(counts.values()), counts.get(TaskState.DONE, 0)
    share = done / total if total else 0.0
    yield Text.assemble(
        (printable(session), "bold"), "  ", bar(share, 40), f" {share:.0%}  {done:,} of {total:,} done"
    )
    line = Text()
    for state, count in counts.items():
        sign, style = LOOKS[state]
        line.append(f"{sign} {count:,} {state.value}   ", style)
    yield line
    for task in held:
        yield _held_line(task, now)
    if events:
        yield Text()
        yield from map(event_line, events)


def _held_line(task: Task, now: datetime, *, who: bool = True) -> Text:
    cell = state_cell(task)
    age = span(max(0.0, (now - (task.changed_at or now)).total_seconds()) * 1e6)
    text = Text.assemble(
        "  ", (f"{cell.text:<10}", cell.style), " ", (printable(task.id), "bold"), "  ",
        bar(task.progress, 12, "cyan"), f" {task.progress:>4.0%}  {f'{printable(task.assignee)}  ' * who}",
        (f"for {age}", "dim"),
    )  # fmt: skip
    text.append(f"  {printable(task.stage)}" if task.stage else "", "dim")
    return text


def worker_board(
    agent: str,
    about: str,
    own: Mapping[str, int],
    counts: Mapping[TaskState, int],
    doing: Sequence[Task],
    last: Iterable[Ended],
    ending: str,
) -> Iterator[Text]:
    """One worker: since when it works and at what, what it has done, and what ended last."""
    yield Text.assemble((agent, "bold"), "  ", (f"for {about}", "dim"))
    left = sum(count for state, count in counts.items() if state in (TaskState.PENDING, TaskState.BLOCKED))
    yield Text.assemble(
        (f"✓ {own['done']:,} done   ", "green"),
        (f"✗ {own['failed']:,} failed   ", "red" if own["failed"] else "dim"),
        (f"○ {left:,} left in the session", "dim"),
    )
    now = utc_now()
    for task in doing:
        yield _held_line(task, now, who=False)
    yield from map(ended_line, last)
    if ending:
        yield Text(ending, "yellow")


def ended_line(one: Ended) -> Text:
    """One run that ended, in a line."""
    sign, style = LOOKS.get(one.state, ("·", ""))
    text = Text.assemble((clock(micros_of(one.at)), "dim"), "  ", (f"{sign} {one.state:<9}", style), " ")
    text.append(printable(one.task), "bold")
    text.append(f"  in {span(one.seconds * 1e6)}", "dim")
    text.append(f"  {printable(one.why)}" if one.why else "")
    text.append(f"  → {one.then}" if one.then else "", "dim")
    return text


def utc_now() -> datetime:
    """The time of this machine."""
    return datetime.now(UTC)
