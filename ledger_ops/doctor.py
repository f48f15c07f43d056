"""Is this ledger well? Each finding says what was found and, if it is not, what to do."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
from ledger import LedgerError, SqliteStore
from ledger_ops.reader import AnyStore, Reader, open_ledger, reader_of
from ledger_ops.values import Finding, clock, span
from ledger_stores.base import ServerStore
from ledger_stores.move import side_of

_WAL_BYTES = 64 * 1024 * 1024
_FREE_BYTES = 200 * 1024 * 1024
_CLOCK_SLACK = 5_000_000


def doctor(url: str | None = None) -> list[Finding]:
    """Look at a ledger from all sides; the first finding alone is not ok if it cannot be opened."""
    try:
        store = open_ledger(url)
    except LedgerError as error:
        return [
            Finding(
                "open", ok=False, what=str(error), advice="see above; `ledger restore` puts a backup in place"
            )
        ]
    try:
        looked = _findings(store) if isinstance(store, SqliteStore) else _findings_of_server(store)
        return [Finding("open", ok=True, what=store.address), *moving(store), *looked]
    except LedgerError as error:
        return [
            Finding("read", ok=False, what=str(error), advice="stop what writes to it, and restore a backup")
        ]
    finally:
        store.close()


def moving(store: AnyStore) -> Iterator[Finding]:
    """How it stands in a move, if that closes it or is still under way."""
    mark = side_of(store).mark()
    if mark is None or mark.role == "arrived":
        return
    if mark.role == "leaving":
        yield Finding(
            "move", ok=True, what=f"`ledger move` copies it to {mark.peer}; runs begin here as ever"
        )
        return
    advice = "run `ledger move` again to go on, or with --cancel to undo it"
    if mark.role == "moved":
        advice = "point programs there; if one that ran meanwhile ends here, run `ledger move` again"
    yield Finding("move", ok=False, what=mark.refusal, advice=advice)


def _findings_of_server(store: ServerStore) -> Iterator[Finding]:
    store.check()
    yield Finding("write", ok=True, what="it can be read and written")
    yield _stale_runs(reader_of(store))


def _findings(store: SqliteStore) -> Iterator[Finding]:
    reader = Reader(store)
    yield _schema(store)
    yield _integrity(store)
    yield _totals(store)
    yield _wal(store)
    yield _disk(store)
    yield _file_system(store)
    yield _permissions(store)
    yield _durability(store)
    yield _clock(store)
    yield _stale_runs(reader)
    yield from _gaps(reader)


def _schema(store: SqliteStore) -> Finding:
    version = store.browse("PRAGMA user_version")[0][0]
    return Finding("schema", ok=True, what=f"version {version}, the one that this Ledger writes")


def _integrity(store: SqliteStore) -> Finding:
    found = [row[0] for row in store.browse("PRAGMA integrity_check(5)")]
    if found == ["ok"]:
        return Finding("integrity", ok=True, what="every page and index is sound")
    advice = "keep the file, stop what writes to it, and put a backup in place with `ledger restore`"
    return Finding("integrity", ok=False, what="; ".join(found), advice=advice)


def _totals(store: SqliteStore) -> Finding:
    # one statement is one view: beside a writer two would differ
    told, counted = store.browse(_TWO_COUNTS)[0]
    if counted == told:
        return Finding("totals", ok=True, what=f"{counted:,} calls, as many as the totals say")
    return Finding(
        "totals",
        ok=False,
        what=f"{counted:,} calls are recorded, the totals say {told:,}",
        advice="figures of stats are off, no decision is: they go by the rows; please report it as a bug",
    )


_TWO_COUNTS = """
SELECT (SELECT COALESCE(SUM(actions), 0) FROM totals)
       + (SELECT COUNT(*) FROM events WHERE kind = 'claimed' AND run = 1 AND tool IS NOT NULL
           AND seq > (SELECT value FROM meta WHERE name = 'rolled')),
       (SELECT COUNT(*) FROM runs AS r WHERE r.run = 1 OR NOT EXISTS
         (SELECT 1 FROM runs AS f WHERE f.call = r.call AND f.run < r.run))
"""


def _wal(store: SqliteStore) -> Finding:
    log = Path(store.path + "-wal")
    size = log.stat().st_size if log.exists() else 0
    what = f"the write-ahead log has {size / 1e6:.1f} MB"
    if size <= _WAL_BYTES:
        return Finding("log", ok=True, what=what)
    advice = (
        "a reader keeps a transaction open, or a writer does: find who has the file open (lsof) and end it"
    )
    return Finding("log", ok=False, what=what, advice=advice)


def _disk(store: SqliteStore) -> Finding:
    free = shutil.disk_usage(Path(store.path).parent).free
    what = f"{free / 1e9:.1f} GB free"
    if free >= _FREE_BYTES:
        return Finding("disk", ok=True, what=what)
    return Finding("disk", ok=False, what=what, advice="make room; on a full disk no guarded tool runs")


def _file_system(store: SqliteStore) -> Finding:
    kind = ledger._file_system(str(Path(store.path).parent))
    if kind in ledger._NETWORK_FS:
        advice = "move the ledger to a local disk: SQLite's locks cannot be trusted on a network"
        return Finding("file system", ok=False, what=f"{kind}, a network file system", advice=advice)
    return Finding("file system", ok=True, what=kind or "unknown to this system")


def _permissions(store: SqliteStore) -> Finding:
    found = Path(store.path).stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        advice = f"arguments and results are readable by others: chmod 600 {store.path}"
        return Finding("permissions", ok=False, what=f"mode {mode:04o}", advice=advice)
    if not os.access(store.path, os.W_OK) or not os.access(Path(store.path).parent, os.W_OK):
        advice = "guards of this account cannot write here: make the file and its folder writable"
        return Finding("permissions", ok=False, what=f"mode {mode:04o}, not writable", advice=advice)
    return Finding("permissions", ok=True, what=f"mode {mode:04o}, for its owner only")


def _durability(store: SqliteStore) -> Finding:
    mode = store.browse("PRAGMA journal_mode")[0][0]
    if mode == "delete":
        return Finding(
            "durability", ok=True, what="a copy that no guard has written to yet: the first one begins a log"
        )
    if mode == "wal":
        what = 'write-ahead log; each guard chooses what is fsynced: Guard(sync="full") by default'
        return Finding("durability", ok=True, what=what)
    advice = "another program changed it; the next guard that opens the file sets it back"
    return Finding("durability", ok=False, what=f"journal mode {mode}", advice=advice)


def _clock(store: SqliteStore) -> Finding:
    now = time.time_ns() // 1000
    newest = store.browse("SELECT at FROM events ORDER BY seq DESC LIMIT 1")
    ahead = newest[0][0] - now if newest else 0
    if ahead <= _CLOCK_SLACK:
        return Finding("clock", ok=True, what="no record is from the future")
    advice = "a clock was set back, or was wrong: leases of other machines and ttl= go by it; set it right"
    return Finding(
        "clock", ok=False, what=f"the newest event is {span(ahead)} ahead of this clock", advice=advice
    )


def _stale_runs(reader: Reader) -> Finding:
    stale = reader.doubts()
    if not stale:
        return Finding("doubts", ok=True, what="no run ended without a known outcome")
    named = ", ".join(f"{r.short} ({r.call[:12]}, {clock(r.started)})" for r in stale[:3])
    more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
    return Finding(
        "doubts",
        ok=False,
        what=f"{len(stale)} ended without a known outcome: {named}{more}",
        advice="find out what happened, then `ledger resolve CALL --done` or `--not-done`; `ledger doubts` lists them",
    )


def _gaps(reader: Reader) -> Iterator[Finding]:
    for gap in reader.gaps():
        yield Finding(
            "gap",
            ok=False,
            what=f"calls made between {clock(gap.since)} and {clock(gap.until)} are unknown (restored from a backup)",
            advice="compare with the services that were called: what they did then could run again; then `ledger doctor --accept-gaps`",
        )
