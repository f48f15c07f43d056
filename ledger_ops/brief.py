"""What was done, what runs and what is in doubt, as short text for a model's context."""

from __future__ import annotations

from ledger import Record
from ledger_ops.reader import Reader
from ledger_ops.values import Filter, clock, decode, printable

_ITEM_CHARS = 160


def brief(reader: Reader, *, wf: str | None = None, max_chars: int = 2000) -> str:
    """At most `max_chars` of text: first what must not be repeated blindly, then what was done, newest first.

    What does not fit is counted, never dropped in silence.
    """
    wanted = Filter(wf=wf)
    doubts = reader.doubts(wanted)
    running = [record for record in reader.running() if wf in (None, record.wf)]
    parts = [f"Ledger of workflow {printable(wf)}." if wf else "Ledger of all workflows."]
    parts += [
        f"Calls made between {clock(gap.since)} and {clock(gap.until)} are unknown: the ledger was "
        "restored from a backup. Check before repeating anything from that time."
        for gap in reader.gaps()
    ]
    sections = (
        ("IN DOUBT (nobody knows whether it happened; do not repeat it, ask a person)", doubts),
        ("RUNNING NOW (do not repeat it, wait)", running),
    )
    for title, records in sections:
        if records:
            parts += [f"{title}:", *(f"- {_line(record)}" for record in records)]
    text = _fit(parts, max_chars)
    sums = reader.stats(wanted).total
    done = sums.actions - sums.failed - sums.in_doubt - sums.suspended - sums.running - reader.released(wf)
    ends = (
        ("DONE (do not repeat it)", done, Filter(wf=wf, status="success")),
        ("FAILED (may be tried again)", sums.failed, Filter(wf=wf, status="failed")),
    )
    for title, count, ended in ends:
        if count:
            text = _add(f"{text}\n{title}: {count}", reader, ended, count, max_chars)
    if text == parts[0]:
        return f"{text} Nothing was called yet."[:max_chars]
    return text


def _add(text: str, reader: Reader, wanted: Filter, total: int, max_chars: int) -> str:
    """Append as many calls as fit, and how many did not."""
    shown = 0
    for record in reader.calls(wanted, limit=min(max_chars // 20 + 1, 200), seconds=1).records:
        if record.released:  # it was said that it may run again
            continue
        line = f"\n- {_line(record)}"
        if len(text) + len(line) + 20 > max_chars:
            break
        text += line
        shown += 1
    if shown < total:
        text += f"\n- … {total - shown} more"
    return text[:max_chars]


def _fit(parts: list[str], max_chars: int) -> str:
    text = parts[0]
    for i, part in enumerate(parts[1:], 1):
        if len(text) + len(part) + 40 > max_chars:
            return f"{text}\n… {len(parts) - i} more lines: `ledger doubts` shows them"[:max_chars]
        text += f"\n{part}"
    return text[:max_chars]


def _line(record: Record) -> str:
    """One call in a line: what, with which arguments, when, and what came of it."""
    args = decode(record.args_json)
    if record.key is not None:
        shown = f"key={record.key}"
    elif isinstance(args, dict):
        shown = ", ".join(f"{name}={value!r}" for name, value in args.items())
    else:
        shown = ""
    what = f"{record.short}({shown}) [{record.call[:12]}] {clock(record.ended or record.started)}"
    end = record.error if record.status.value in ("failed", "doubt") else record.result_json
    line = f"{what} → {end}" if end else what
    line = printable(line)
    return line if len(line) <= _ITEM_CHARS else line[: _ITEM_CHARS - 1] + "…"
