"""From values to HTML: templates that escape always, times and numbers for people, JSON as a folded tree."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

import ledger
from ledger import LedgerError
from ledger_ops.values import clock, dollars, iso, printable, span, state_of
from ledger_tasks import Task, TaskState
from ledger_tasks.browse import last_error
from ledger_tasks.model import micros_of
from ledger_tasks.model import moment as task_moment

#: how much of a recorded value a page shows; the API gives all of it
_MOST_NODES, _MOST_PARTS, _MOST_LEVELS, _LONGEST_TEXT = 1_000, 200, 24, 8_000
_SHOWN_SUMMARY = 160
_MOST_SENT_LEVELS = 100
#: what a secret is recorded as
_MASK = "****"

STATE_NAMES = {
    "running": "running",
    "success": "success",
    "failed": "failed",
    "suspended": "suspended",
    "in_doubt": "in doubt",
}
#: how an event looks: what it was good for
EVENT_TONES = {
    "claimed": "running", "success": "success", "ran": "success", "failed": "failed", "raised": "failed",
    "suspended": "suspended", "doubt": "in_doubt", "blocked": "blocked", "late": "in_doubt",
    "resolved": "success", "released": "running",
}  # fmt: skip


# -- where things are --


def base_of(request: Request) -> str:
    """The path under which the app is mounted, "" at the top."""
    return str(request.scope.get("ledger_base", request.scope.get("root_path", "")))


def link(request: Request, name: str, **params: str) -> str:
    """The path of one of our routes; request.url_for would ask the router of the application around us."""
    return base_of(request) + str(request.app.url_path_for(name, **params))


# -- values for people --


def shown(value: Any) -> Any:
    """What goes into a page: recorded text cannot turn the reading direction or hide characters."""
    return printable(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def raw(value: str | None) -> Markup:
    """What a form sends back: escaped for HTML, otherwise as it was recorded, or nothing would match it."""
    return escape(value or "")


def number(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def percent(share: float) -> str:
    """A share of 1 as a percentage that never rounds something to nothing."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.1f} %" if share < 0.9995 or share == 1 else "> 99.9 %"


def moment(micros: int | None) -> Markup:
    """A time: of today the hour, else the day too; all of it in its title."""
    if micros is None:
        return Markup("—")
    local = ledger.at(micros).astimezone()
    now = datetime.now().astimezone()
    form = "%H:%M:%S" if local.date() == now.date() else "%b %-d, %H:%M:%S"
    if local.year != now.year:
        form = "%Y-%m-%d %H:%M"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        iso(micros), clock(micros), local.strftime(form)
    )


def when(value: datetime | None) -> Markup:
    """A time of a task."""
    return moment(None if value is None else micros_of(value))


def isotime(text: str | None) -> Markup | str:
    """A time that is kept as ISO 8601; in its own words where it is none."""
    try:
        return when(task_moment(text))
    except (ValueError, OverflowError, LedgerError):
        return str(text)


def lasted(seconds: float | None) -> str:
    """How long something of a task took."""
    return "—" if seconds is None else span(max(seconds, 0.0) * 1e6)


def error_time(entry: dict[str, Any]) -> Markup | str:
    """When an error of a task was recorded; in its own words where they are no time."""
    return isotime(str(entry.get("at", "")))


def branches(value: Any) -> Node | None:
    """A value of a task as nodes to show; None for no value."""
    return None if value is None else tree(json.dumps(value))


def task_state(task: Task) -> str:
    """Its state in a word: one that is PENDING may be waiting."""
    return "waiting" if task.waiting and task.state == TaskState.PENDING else task.state.value


def took(started: int, ended: int | None) -> str:
    """How long a run took."""
    return "—" if ended is None else span(max(ended - started, 0))


def short_names(tools: list[str]) -> dict[str, str]:
    """The short name of each tool, the full one where two would look the same."""
    shorts = [ledger._short(tool) for tool in tools]
    return {
        tool: short if shorts.count(short) == 1 else tool for tool, short in zip(tools, shorts, strict=True)
    }


def summary(text: str | None) -> str:
    """The beginning of a text, in one line."""
    line = " ".join((text or "")[: 4 * _SHOWN_SUMMARY].split())
    return line[:_SHOWN_SUMMARY] + "…" if len(line) > _SHOWN_SUMMARY else line


def arguments(text: str | None) -> str:
    """Recorded arguments as one would write them in a call, in one line."""
    if text is None or len(text) > _LONGEST_TEXT:
        return summary(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return summary(text)
    if not isinstance(value, dict) or "$" in value:
        return summary(text)
    told = {name: v for name, v in value.items() if v != _MASK} or value
    return summary(", ".join(f"{name}={_plain(v)}" for name, v in told.items()))


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "$" in value and "v" in value:
        value = value["v"]
    return json.dumps(value, ensure_ascii=False)


# -- JSON as a tree --


class Node(NamedTuple):
    """One value: a leaf with its text, or a branch with its parts. `kind` picks its looks."""

    name: str | None
    kind: str
    text: str
    parts: tuple[Node, ...] = ()
    #: what is not shown of it
    more: str = ""
    #: the type of a value that JSON lacks
    tag: str = ""


def tree(text: str | None) -> Node | None:
    """A JSON column as nodes to show, at most a thousand; None for no value."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # somebody else wrote it, or it is nested beyond reason
        return _text(None, text)
    return _node(None, value, [_MOST_NODES], 0)


def _node(name: str | None, value: Any, left: list[int], level: int) -> Node:
    left[0] -= 1
    if isinstance(value, dict) and isinstance(value.get("$"), str) and "v" in value and level < _MOST_LEVELS:
        return _packed(name, value, left, level)
    if isinstance(value, dict):
        return _branch(name, "object", [(str(k), v) for k, v in value.items()], "{}", left, level)
    if isinstance(value, list):
        return _branch(name, "array", [(str(i), v) for i, v in enumerate(value)], "[]", left, level)
    if isinstance(value, str):
        return _text(name, value)
    kind = "null" if value is None else "boolean" if isinstance(value, bool) else "number"
    return Node(name, kind, json.dumps(value)[:_LONGEST_TEXT])


def _packed(name: str | None, value: dict[str, Any], left: list[int], level: int) -> Node:
    """A value that JSON lacks, as the ledger writes it: its kind, then what it holds."""
    kind = str(value.get("t") or value["$"]).rpartition(".")[2][:80]
    inner = _node(None, value["v"], left, level + 1)
    return inner._replace(name=name, tag=f"{kind} {inner.tag}".strip())


def _branch(
    name: str | None, kind: str, parts: list[tuple[str, Any]], brackets: str, left: list[int], level: int
) -> Node:
    if not parts:
        return Node(name, "empty", brackets)
    count = f"{len(parts):,} {'field' if kind == 'object' else 'item'}{'s' * (len(parts) != 1)}"
    if level >= _MOST_LEVELS:
        return Node(name, kind, count, more="nested too deeply to show here")
    made = []
    for part_name, part in parts[:_MOST_PARTS]:
        if left[0] <= 0:
            break
        made.append(_node(part_name[:_SHOWN_SUMMARY], part, left, level + 1))
    hidden = len(parts) - len(made)
    return Node(name, kind, count, tuple(made), f"{hidden:,} more" if hidden else "")


def _text(name: str | None, value: str) -> Node:
    hidden = len(value) - _LONGEST_TEXT
    more = f"{hidden:,} more characters" if hidden > 0 else ""
    return Node(name, "string", value[:_LONGEST_TEXT], more=more)


# -- answers --


class Json(JSONResponse):
    """JSON in ASCII: recorded text may hold half of a surrogate pair, which no encoding can carry."""

    def render(self, content: Any) -> bytes:
        """The bytes; what somebody else recorded may be more than JSON, or nested beyond reason."""
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"))
        except (ValueError, RecursionError):
            text = json.dumps(_sendable(content, 0), separators=(",", ":"))
        return text.encode()


def _sendable(value: Any, level: int) -> Any:
    if level >= _MOST_SENT_LEVELS:
        return "nested too deeply to send"
    if isinstance(value, dict):
        return {name: _sendable(part, level + 1) for name, part in value.items()}
    if isinstance(value, list):
        return [_sendable(part, level + 1) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def make_environment() -> Environment:
    """The templates: everything is escaped, and recorded text made printable, wherever it is put."""
    made = Environment(
        loader=PackageLoader("ledger_dashboard"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"moment": moment, "number": number, "percent": percent, "span": span, "summary": summary}
    made.filters |= {"raw": raw, "arguments": arguments, "state": state_of, "tree": tree, "took": took}
    made.filters |= {
        "when": when,
        "lasted": lasted,
        "isotime": isotime,
        "dollars": dollars,
        "branches": branches,
        "error_time": error_time,
        "task_state": task_state,
    }
    made.filters |= {"last_error": last_error}
    made.globals |= {"TASK_STATES": [state.value for state in TaskState]}
    made.globals |= {"STATE_NAMES": STATE_NAMES, "EVENT_TONES": EVENT_TONES, "version": ledger.__version__}
    return made


_environment = make_environment()


def render(template: str, **values: Any) -> str:
    """A page, or a part of one, as HTML."""
    return _environment.get_template(template).render(values)


def refusal(request: Request, status: int, what: str, advice: str, *, target: str | None = None) -> Response:
    """An error in the form that was asked for: what happened, and what to do next.

    With a `target` its page asks for the token, and leads there.
    """
    path = request.scope["path"].removeprefix(base_of(request))
    wants_html = (
        "text/html" in request.headers.get("accept", "text/html") and "hx-request" not in request.headers
    )
    if path.startswith(("/api/", "/health", "/metrics")) or not wants_html:
        return Json({"error": what, "advice": advice}, status)
    html = render(
        "error.html", status=status, what=what, advice=advice, base=base_of(request), again=status == 503,
        target=target,
    )  # fmt: skip
    return HTMLResponse(html, status)
