"""What commands say in sentences and blocks: values in, rich text out; what others wrote is made harmless."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from ledger import Record, Run
from ledger_cli.grids import SHORT_CALL, SIGNS, STYLES, Names, status_cell
from ledger_ops.values import Detail, Event, Finding, Sums, clock, decode, printable, span, state_of

_BAR = 20
_KINDS = {
    "claimed": ("▶", "cyan"),
    "success": ("✓", "green"),
    "ran": ("✓", "green"),
    "failed": ("✗", "red"),
    "raised": ("✗", "red"),
    "blocked": ("⊘", "yellow"),
    "doubt": ("?", "yellow"),
    "late": ("✓", "yellow"),
    "released": ("↺", "magenta"),
    "resolved": ("✓", "magenta"),
    "suspended": ("‖", "magenta"),
    "reset": ("∅", "red"),
    "restored": ("↺", "red"),
}


def duplicates(total: Sums) -> Text:
    """The duplicate rate as a bar: blocked ÷ attempts."""
    filled = round(total.duplicate_rate * _BAR)
    return Text.assemble(
        "duplicates ",
        ("█" * filled, "yellow"),
        ("░" * (_BAR - filled), "dim"),
        f" {total.duplicate_rate * 100:.1f} %",
        f" ({total.blocked:,} of {total.attempts:,} attempts ran nothing)",
    )


# -- events --


def event_line(event: Event, names: Names) -> Text:
    """One thing that happened, in a line."""
    sign, style = _KINDS.get(event.kind, ("·", ""))
    text = Text.assemble((clock(event.at), "dim"), "  ", (f"{sign} {printable(event.kind):<9}", style), "  ")
    if event.tool is not None:
        text.append(names.of(event.tool), "bold")
    if event.n > 1:
        text.append(f"  ×{event.n:,}", style)
    if event.run:
        text.append(f"  run {event.run}")
    if event.call is not None:
        text.append(f"  {printable(event.call[:SHORT_CALL])}", "dim")
    for word, value in (("workflow", event.wf), ("by", event.caller)):
        if value:
            text.append(f"  {word} ", "dim")
            text.append(printable(value))
    if event.detail:
        text.append(f"  {printable(event.detail)}", "dim")
    return text


def _moment(event: Event) -> Text:
    """One line of the timeline of a call: to the microsecond, because attempts come close together."""
    sign, style = _KINDS.get(event.kind, ("·", ""))
    stamp = clock(event.at)
    stamp = f"{stamp[:19]}.{event.at % 1_000_000:06d}{stamp[19:]}"
    text = Text.assemble("  ", (stamp, "dim"), "  ", (f"{sign} {printable(event.kind):<9}", style))
    text.append(f"  run {event.run}" if event.run else "")
    text.append(f"  ×{event.n:,}" if event.n > 1 else "", style)
    text.append(f"  by {printable(event.caller)}" if event.caller else "")
    text.append(f"  {printable(event.detail)}" if event.detail else "", "dim")
    return text


# -- one call --


def detail(found: Detail, holders: Mapping[int, str]) -> Iterator[Text]:
    """All that is known of one call; `holders` says where the owner of each run lives, or lived."""
    record = found.record
    yield _field("call", Text(printable(record.call), "bold"))
    yield _field("tool", printable(record.tool))
    yield _field("workflow", printable(record.wf))
    if record.key is not None:
        yield _field("key", _json(decode(record.key)))
    yield _field("arguments", _json(decode(record.args_json)) if record.args_json else "not recorded")
    yield _field("status", _standing(record))
    yield _field("next", Text(f"an identical call {printable(found.verdict)}", "bold"))
    if found.runs:
        yield Text("\nruns", "bold")
        for run in found.runs:
            is_over = run.run == record.run and record.in_doubt
            yield from _run(run, "in_doubt" if is_over else run.status, holders[run.run])
    yield Text("\ntimeline", "bold")
    yield from map(_moment, found.events)
    if not found.events:
        yield Text("  no events are kept of it", "dim")


def _field(name: str, value: str | Text) -> Text:
    return Text.assemble((f"{name:<11}", "dim"), value)


def _standing(record: Record) -> Text:
    counts = f"   attempts {record.attempts:,} · executed {record.runs:,} · blocked {record.blocked:,}"
    released = "   released" if record.released else ""
    cell = status_cell(state_of(record))
    return Text.assemble((cell.text, cell.style), counts, released)


def _run(run: Run, status: str, holder: str) -> Iterator[Text]:
    state = "in_doubt" if status == "doubt" else status
    sign, style = SIGNS.get(state, "·"), STYLES.get(state, "")
    text = Text.assemble(
        f"  {run.run:>3}  ", (f"{sign} {state.replace('_', ' ')}", style), f"  {clock(run.started)}"
    )
    if run.ended is not None:
        text.append(f" + {span(run.ended - run.started)}")
    # who gave no name is known by the process
    text.append(f"  by {printable(holder if holder.startswith(run.caller) else f'{run.caller} in {holder}')}")
    text.append("".join(f"  {word}" for word in ("forced", "released") if getattr(run, word)), "magenta")
    text.append(f"  blocked {run.blocked:,}" if run.blocked else "", "yellow")
    yield text
    if run.late is not None:
        late_at = f" at {clock(run.late_at)}" if run.late_at is not None else ""
        yield Text(f"       it had been given up; its late end was {printable(run.late)}{late_at}", "yellow")
    if run.result is not None:
        yield _block("result", _json(decode(run.result)))
    if run.error is not None:
        yield _block("error", printable(run.error, lines=True), "red")
    if run.trace:
        yield _block("traceback", printable(run.trace.rstrip(), lines=True), "dim")


def _block(title: str, text: str, style: str = "") -> Text:
    """A value under its title; more than one line is set in."""
    lines = text.split("\n")
    if len(lines) == 1:
        return Text.assemble((f"       {title}  ", "dim"), (text, style))
    return Text.assemble(
        (f"       {title}\n", "dim"), ("\n".join(f"         {line}" for line in lines), style)
    )


def _json(value: Any) -> str:
    """A value as people read it: short ones on a line, long ones as a block."""
    line = json.dumps(value, ensure_ascii=False)
    text = line if len(line) < 100 else json.dumps(value, ensure_ascii=False, indent=2)
    return printable(text, lines=True)


# -- findings --


def finding(found: Finding) -> Iterator[Text]:
    """One finding of the doctor, with what to do about it."""
    sign, style = ("✓", "green") if found.ok else ("✗", "red")
    yield Text.assemble((f"{sign} {found.name:<12}", style), printable(found.what))
    if not found.ok:
        yield Text(f"  → {printable(found.advice)}", "bold")
