"""For machines that watch: /metrics as Prometheus reads it, and /health."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ledger import LedgerError, Status
from ledger_dashboard.render import Json
from ledger_dashboard.source import Opened, Source

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

#: name, type, help, and the sum (of `Sums`) that it shows for each tool
_BY_TOOL = (
    ("ledger_calls", "gauge", "Calls in the ledger.", "actions"),
    ("ledger_attempts", "gauge", "Times that the calls in the ledger were asked for.", "attempts"),
    ("ledger_executed", "gauge", "Runs in the ledger that ended in success.", "executed"),
    ("ledger_blocked", "gauge", "Attempts in the ledger that ran nothing: duplicates prevented.", "blocked"),
    ("ledger_calls_failed", "gauge", "Calls whose latest run failed.", "failed"),
    ("ledger_calls_suspended", "gauge", "Calls whose latest run suspended itself.", "suspended"),
    (
        "ledger_calls_in_doubt",
        "gauge",
        "Calls that wait for a person: nobody knows how they ended.",
        "in_doubt",
    ),
    ("ledger_calls_running", "gauge", "Calls that run now.", "running"),
)
#: name, help, and the kinds of events that it adds up
_COUNTERS = (
    ("ledger_attempts_total", "Times that a call was asked for.", ("claimed", "blocked", "ran", "raised")),
    ("ledger_claims_total", "Runs that were begun.", ("claimed", "ran", "raised")),
    ("ledger_executed_total", "Runs that ended in success.", ("success", "late", "resolved", "ran")),
    ("ledger_blocked_total", "Attempts that ran nothing: duplicates prevented.", ("blocked",)),
    ("ledger_failed_total", "Runs that failed.", ("failed", "raised")),
)
_SINCE = "Since this dashboard was first asked."


class Counts:
    """Events by tool and kind since the first look: what is pruned or cleared later stays counted."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self._history: tuple[str, tuple[int, int] | None] | None = None
        self._seq = 0
        self._lock = threading.Lock()

    def advance(self, opened: Opened) -> dict[tuple[str, str], int]:
        """Count what came, and give all counts."""
        with self._lock:
            last = opened.reader.last_seq()
            history = (opened.address, opened.identity)
            if history != self._history or last < self._seq:  # another one, or the first look
                self._history, self._seq = history, last
            while rows := opened.reader.slice_of_events(self._seq, _SLICE):
                for _, kind, _, tool, _, _, n, *_ in rows:
                    if kind == "restored":
                        continue
                    self._counts[tool, kind] += n
                self._seq = rows[-1][0]
            return dict(self._counts)


_SLICE = 5_000


async def get_metrics(request: Request) -> Response:
    """All figures; `ledger_up 0` while the ledger cannot be read."""
    source: Source = request.app.state.desk.source
    counts: Counts = request.app.state.desk.counts

    def gather() -> list[str]:
        source.probe()
        return source.read(lambda opened: list(_lines(opened, counts)))

    try:
        lines = await run_in_threadpool(gather)
    except LedgerError as error:
        await run_in_threadpool(source.doubt, error)
        lines = list(_metric("ledger_up", "gauge", "Whether the ledger can be read.", [({}, 0)]))
    return PlainTextResponse("\n".join(lines) + "\n", media_type=_TYPE)


async def get_health(request: Request) -> Response:
    """200 if the ledger can be read, 503 with the reason if not."""
    source: Source = request.app.state.desk.source
    tells = not request.scope.get("ledger_stranger")
    try:
        seq = await run_in_threadpool(source.probe)
    except LedgerError as error:
        await run_in_threadpool(source.doubt, error)
        reason = {"reason": str(error)} if tells else {}
        return Json({"status": "unavailable", **reason}, 503)
    return Json({"status": "ok", **({"ledger": source.name, "seq": seq} if tells else {})})


def _lines(opened: Opened, counts: Counts) -> Iterator[str]:
    counted = opened.count()
    stats = opened.stats()
    yield from _metric("ledger_up", "gauge", "Whether the ledger can be read.", [({}, 1)])
    for name, kind, text, field in _BY_TOOL:
        values = (({"tool": tool}, getattr(sums, field)) for tool, sums in stats.tools.items())
        yield from _metric(name, kind, text, values)
    found = counts.advance(opened)
    tools = sorted({*stats.tools, *(tool for tool, _ in found)})
    for name, text, kinds in _COUNTERS:  # from 0 on, so that a first failure shows in a rate
        added = (({"tool": tool}, sum(found.get((tool, kind), 0) for kind in kinds)) for tool in tools)
        yield from _metric(name, "counter", f"{text} {_SINCE}", added)
    if counted:  # half of them would be wrong
        rows = opened.rollup.tools()
        yield from _metric(
            "ledger_run_seconds", "gauge", "How long runs take: quantiles over all of them.",
            (
                ({"tool": row.tool, "quantile": quantile}, micros / 1e6)
                for row in rows
                for quantile, micros in (("0.5", row.p50), ("0.95", row.p95))
                if micros is not None
            ),
        )  # fmt: skip
    yield from _doubts(opened)


def _doubts(opened: Opened) -> Iterator[str]:
    doubts = opened.reader.doubts()
    past = sum(record.status is Status.RUNNING for record in doubts)
    yield from _metric(
        "ledger_runs_past_lease", "gauge", "Runs that never ended and whose owner is over.", [({}, past)]
    )
    oldest = time.time() - doubts[0].started / 1e6 if doubts else 0.0
    yield from _metric(
        "ledger_oldest_doubt_seconds", "gauge", "For how long the oldest doubt has waited.",
        [({}, round(max(oldest, 0.0), 3))],
    )  # fmt: skip
    seq = opened.reader.last_seq()
    yield from _metric("ledger_last_event", "gauge", "Number of the newest event.", [({}, seq)])


def _metric(name: str, kind: str, text: str, values: Iterable[tuple[dict[str, str], float]]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        inside = ",".join(f'{label}="{v.translate(_ESCAPED)}"' for label, v in labels.items())
        yield f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"
