"""For machines that watch: /metrics as Prometheus reads it, and /health."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ledger import LedgerError, Status
from ledger_dashboard.source import Opened, Source

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

#: name, type, help, and the sum (of `Sums`) that it shows for each tool
_BY_TOOL = (
    ("ledger_calls", "gauge", "Calls in the ledger.", "actions"),
    ("ledger_attempts_total", "counter", "Times that a call was asked for.", "attempts"),
    ("ledger_executed_total", "counter", "Runs that ended in success.", "executed"),
    ("ledger_blocked_total", "counter", "Attempts that ran nothing: duplicates prevented.", "blocked"),
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


async def get_metrics(request: Request) -> Response:
    """All figures; `ledger_up 0` while the ledger cannot be read."""
    source: Source = request.app.state.desk.source
    try:
        lines = await run_in_threadpool(lambda: list(_lines(source.opened())))
    except LedgerError:
        lines = list(_metric("ledger_up", "gauge", "Whether the ledger can be read.", [({}, 0)]))
    return PlainTextResponse("\n".join(lines) + "\n", media_type=_TYPE)


async def get_health(request: Request) -> Response:
    """200 if the ledger can be read, 503 with the reason if not."""
    source: Source = request.app.state.desk.source
    tells = not request.scope.get("ledger_stranger")
    try:
        seq = await run_in_threadpool(source.last_seq)
    except LedgerError as error:
        reason = {"reason": str(error)} if tells else {}
        return JSONResponse({"status": "unavailable", **reason}, 503)
    return JSONResponse({"status": "ok", **({"ledger": source.name, "seq": seq} if tells else {})})


def _lines(opened: Opened) -> Iterator[str]:
    counted = opened.count()
    stats = opened.stats()
    yield from _metric("ledger_up", "gauge", "Whether the ledger can be read.", [({}, 1)])
    for name, kind, text, field in _BY_TOOL:
        values = (({"tool": tool}, getattr(sums, field)) for tool, sums in stats.tools.items())
        yield from _metric(name, kind, text, values)
    claims = (({"tool": tool}, sums.attempts - sums.blocked) for tool, sums in stats.tools.items())
    yield from _metric("ledger_claims_total", "counter", "Runs that were begun.", claims)
    if counted:  # half of them would look like a burst
        rows = opened.rollup.tools()
        failed = (({"tool": row.tool}, row.failed) for row in rows)
        yield from _metric("ledger_failed_total", "counter", "Runs that failed.", failed)
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
    yield from _metric("ledger_events_total", "counter", "Events that were ever recorded.", [({}, seq)])


def _metric(name: str, kind: str, text: str, values: Iterable[tuple[dict[str, str], float]]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        inside = ",".join(f'{label}="{v.translate(_ESCAPED)}"' for label, v in labels.items())
        yield f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"
