"""Keeping the file: prune what is old, back up, restore."""

from __future__ import annotations

import functools
import json
import os
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import ledger
from ledger import Run, SqliteStore, StoreError, UsageError
from ledger_ops.reader import NoLedger, open_store
from ledger_ops.values import Gap, Progress, add, decode, iso
from ledger_stores.move_sqlite import SqliteSide, forget_leaving, refuse_moving

_BATCH = 500
#: what a run says that is not needed to know that it succeeded
_WORDS = ("key", "args", "result", "error", "trace")


class Pruned(NamedTuple):
    """What was dropped, or would be."""

    #: calls that lost something
    calls: int = 0
    #: rows of runs that were deleted
    runs: int = 0
    events: int = 0
    #: calls that had succeeded and could now run again
    forgotten: int = 0
    #: room for new records inside the file
    bytes: int = 0


class BackupInfo(NamedTuple):
    """What a backup holds. Times are UTC microseconds."""

    path: str
    made: int
    calls: int
    newest: int | None


class Restored(NamedTuple):
    """What a restore did."""

    calls: int
    #: the time whose calls this ledger does not know
    gap: Gap
    #: where the former ledger was saved
    kept: str | None


# -- prune --


def prune(
    store: SqliteStore,
    *,
    before: int,
    forget: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Drop what calls that ended before that time (UTC microseconds) said.

    Arguments, results, errors, events and runs that did not succeed go; of each success its
    fingerprint and time stay, so that no call runs again for being old, unless `forget`.  What is
    running or in doubt is not touched.  It works in short transactions beside running guards.
    """
    store.flush()
    if not dry_run:
        store.submit(lambda db: refuse_moving(db, store.path), durable=False)
    free = _free_bytes(store)
    sums = [0, 0, 0]
    steps = progress or Progress()
    steps.total = store.browse("SELECT COALESCE(MAX(id), 0) FROM runs")[0][0]
    for calls, upto in _old_calls(store, before):
        cut = _Cut(before, forget)
        if dry_run:
            for call in calls:
                cut.plan(store.rows(call))
        elif calls:
            work = functools.partial(_prune_calls, store, calls, before, forget)
            cut = store.submit(work, durable=False)
            time.sleep(0.002)  # SQLite's lock is not fair: let others in
        add(sums, (cut.calls, cut.deleted, cut.forgotten))
        steps.step(upto - steps.done)
    tallies = "FROM tallies WHERE touched < ?"
    sums[0] += store.browse(f"SELECT COUNT(*) {tallies}", (before,))[0][0]
    if not dry_run:
        store.submit(lambda db: db.execute(f"DELETE {tallies}", (before,)), durable=False)
    events = _prune_events(store, before, dry_run=dry_run)
    return Pruned(sums[0], sums[1], events, sums[2], max(_free_bytes(store) - free, 0))


def _old_calls(store: SqliteStore, before: int) -> Iterator[tuple[list[str], int]]:
    """Calls that began before that time, in batches, and how far along the table each reaches."""
    after = 0
    last = store.browse("SELECT COALESCE(MAX(id), 0) FROM runs")[0][0]
    while after < last:
        upto = min(after + _BATCH, last)
        rows = store.browse(
            # by its latest run, so that each call comes once
            "SELECT call FROM runs AS r WHERE id > ? AND id <= ? AND started < ? AND status <> 'running'"
            " AND NOT EXISTS (SELECT 1 FROM runs AS l WHERE l.call = r.call AND l.run > r.run)",
            (after, upto, before),
        )
        yield [row[0] for row in rows], upto
        after = upto


class _Cut:
    """What goes of some calls."""

    def __init__(self, before: int, forget: bool) -> None:  # noqa: FBT001 - internal
        self.before = before
        self.forget = forget
        self.calls = self.deleted = self.forgotten = 0

    def plan(self, rows: Sequence[Run]) -> tuple[list[Run], list[Run]]:
        """The rows of a call to delete, and those to strip."""
        if not rows or not self._is_old(rows):
            return [], []
        won = [run for run in rows if "success" in (run.status, run.late)]
        strip = (
            [] if self.forget else [r for r in won if any(getattr(r, word) is not None for word in _WORDS)]
        )
        # a released success stays too: the idempotency key of the next run counts from it
        drop = list(rows) if self.forget else [run for run in rows if run not in won]
        self.calls += bool(drop or strip)
        self.deleted += len(drop)
        self.forgotten += self.forget and any(run.succeeded_since(-1) for run in rows)
        return drop, strip

    def _is_old(self, rows: Sequence[Run]) -> bool:
        latest = rows[-1]
        waits = latest.status == "doubt" and not latest.released and latest.late != "success"
        if waits or any(run.status == "running" for run in rows):
            return False
        return all(max(t or 0 for t in (r.started, r.ended, r.late_at)) < self.before for r in rows)


def _prune_calls(
    store: SqliteStore,
    calls: Sequence[str],
    before: int,
    forget: bool,  # noqa: FBT001 - internal
    db: sqlite3.Connection,
) -> _Cut:
    """Prune by what is there inside the transaction: a guard may have come first."""
    refuse_moving(db, store.path)
    store._roll_forward(db)
    cut = _Cut(before, forget)
    gone: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    bare = ", ".join(f"{word} = NULL" for word in _WORDS)
    for call in calls:
        rows = ledger._select_rows(db, call)
        drop, strip = cut.plan(rows)
        for run in strip:
            db.execute(f"UPDATE runs SET {bare} WHERE call = ? AND run = ?", (call, run.run))
        for run in drop:
            db.execute("DELETE FROM runs WHERE call = ? AND run = ?", (call, run.run))
            won = "success" in (run.status, run.late)
            add(gone[run.tool], (0, 1, int(won), run.blocked))
        if drop and len(drop) == len(rows):
            gone[rows[-1].tool][0] += 1
    for tool, counts in gone.items():
        db.execute(
            "UPDATE totals SET actions = actions - ?, claims = claims - ?, executed = executed - ?,"
            " blocked = blocked - ? WHERE tool = ?",
            (*counts, tool),
        )
    return cut


def _prune_events(store: SqliteStore, before: int, *, dry_run: bool) -> int:
    """Old events, but for those of calls that run or wait for a person, and the newest of all."""
    waiting = (
        "SELECT 1 FROM runs AS r WHERE r.call = events.call AND (r.status = 'running' OR r.status = 'doubt')"
    )
    where = (
        "seq > :after AND seq <= :upto AND at < :before AND seq < (SELECT MAX(seq) FROM events)"
        f" AND (call IS NULL OR NOT EXISTS ({waiting}))"
    )
    count = 0
    after, last = store.browse("SELECT (SELECT MIN(seq) FROM events), (SELECT MAX(seq) FROM events)")[0]
    after = (after or 1) - 1
    while last is not None and after < last:
        scope = {"after": after, "upto": min(after + 4 * _BATCH, last), "before": before}
        if dry_run:
            count += store.browse(f"SELECT COUNT(*) FROM events WHERE {where}", scope)[0][0]
        else:

            def drop(db: sqlite3.Connection, scope: dict[str, int] = scope) -> int:
                store._roll_forward(db)  # the totals count from events
                return db.execute(f"DELETE FROM events WHERE {where}", scope).rowcount

            count += store.submit(drop, durable=False)
            time.sleep(0.002)
        after = scope["upto"]
    return count


def _free_bytes(store: SqliteStore) -> int:
    pages = store.browse("PRAGMA freelist_count")[0][0]
    return int(pages) * int(store.browse("PRAGMA page_size")[0][0])


# -- backup --


def backup(store: SqliteStore, target: str) -> int:
    """Write a consistent copy while the ledger is in use; returns its bytes.

    It is compact, readable by its owner only, and on disk before it has its name. Raises
    `UsageError` if there is a file of that name, `StoreError` if it cannot be written.
    """
    store.flush()
    note = json.dumps({"made": store.clock.wall(), "of": store.path})
    path = Path(target).absolute()
    _copy(
        store.path, path, lambda db: db.execute("INSERT OR REPLACE INTO meta VALUES ('backup', ?)", (note,))
    )
    return path.stat().st_size


def _copy(source: str, target: Path, note: Callable[[sqlite3.Connection], object]) -> None:
    """A copy of a ledger under a new name, with what `note` writes into it."""
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        if target.exists():
            raise FileExistsError
        part.touch(0o600, exist_ok=False)
        with closing(_connect(source, "ro")) as db:
            db.execute("VACUUM INTO ?", (str(part),))
        with closing(sqlite3.connect(part, isolation_level=None)) as db:
            note(db)
        _sync(part)
        target.hardlink_to(part)  # unlike a rename it never replaces a file that came meanwhile
        _sync(target.parent)
    except FileExistsError:
        raise UsageError(f"{target} exists already, nothing was written; name another file") from None
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"{target} could not be written ({error}); see that its folder exists and has room"
        ) from error
    finally:
        for left in (part, part.with_name(f"{part.name}-journal")):
            left.unlink(missing_ok=True)


def _connect(path: str, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(path)}?mode={mode}", uri=True, timeout=30, isolation_level=None)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- restore --


def examine(path: str) -> BackupInfo:
    """Check a backup, all of it; raises `NoLedger` or `StoreError` if it cannot be restored from."""
    with closing(open_store(path)) as store:
        mark = SqliteSide(store).mark()
        if mark is not None and mark.refusal:
            raise StoreError(f"{store.path} was closed for a move when it was made: {mark.refusal}")
        if (found := store.browse("PRAGMA integrity_check(1)")[0][0]) != "ok":
            raise StoreError(f"{store.path} is damaged ({found}); take another backup")
        calls = store.browse(
            "SELECT (SELECT COUNT(DISTINCT call) FROM runs) + (SELECT COUNT(*) FROM tallies)"
        )[0][0]
        newest = store.browse("SELECT at FROM events ORDER BY seq DESC LIMIT 1")
        note = store.browse("SELECT value FROM meta WHERE name = 'backup'")
        last = newest[0][0] if newest else None
        made = decode(note[0][0])["made"] if note else last
        return BackupInfo(store.path, made or int(Path(store.path).stat().st_mtime * 1e6), calls, last)


def restore(source: str, target: str, *, actor: str) -> Restored:
    """Put a backup's content in the place of a ledger, in one transaction, also beside running guards.

    The former ledger is saved beside it first. Calls made since the backup are unknown afterwards:
    the gap is recorded, and `doctor` and `brief` show it. Raises `StoreError` or `UsageError`, and
    changes nothing, if the backup is damaged or the target is no ledger.
    """
    info = examine(source)
    path = Path(target).absolute()
    if path.exists() and path.samefile(source):
        raise UsageError(f"{path} is the backup itself; name another ledger to restore it to")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    if path.exists() and path.stat().st_size and _is_sound(str(path)):
        kept = path.with_name(f"{path.name}.before-restore-{stamp}")
        return Restored(info.calls, _replace(path, kept, info, actor), str(kept))
    aside = _set_aside(path, path.with_name(f"{path.name}.damaged-{stamp}"))
    gap = Gap(info.made, time.time_ns() // 1000)
    _copy(info.path, path, lambda db: _note_gap(db, gap, actor, 0))
    return Restored(info.calls, gap, str(aside) if aside else None)


def _set_aside(path: Path, kept: Path) -> Path | None:
    """Rename what is there, with its log: one that stays would be taken for the new file's."""
    if path.exists() and not path.stat().st_size:
        path.unlink()
    parts = [s for s in ("", "-wal", "-shm", "-journal") if path.with_name(path.name + s).exists()]
    for suffix in parts:
        path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    return kept if "" in parts else None


def _is_sound(path: str) -> bool:
    """Whether it can be read as a ledger; raises for a file of another program, which stays as it is."""
    try:
        with closing(open_store(path)) as store:
            return bool(store.browse("PRAGMA quick_check(1)")[0][0] == "ok")
    except NoLedger:
        raise
    except StoreError as error:
        code = getattr(error.__cause__, "sqlite_errorcode", None) or 0
        if code & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        return False


def _replace(path: Path, kept: Path, info: BackupInfo, actor: str) -> Gap:
    """All of a ledger by all of another, in one transaction; what it held until then is kept.

    The copy is made and the gap ends while nobody can write, so that no call falls between them.
    """
    with closing(_connect(str(path), "rw")) as db:
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("ATTACH ? AS old", (f"file:{quote(info.path)}?mode=ro",))
            db.execute("BEGIN IMMEDIATE")
            refuse_moving(db, str(path))
            _copy(str(path), kept, lambda _: None)
            gap = Gap(info.made, time.time_ns() // 1000)
            _take_over(db, gap, actor)
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"{path} was not restored ({error}); what it held is unchanged") from error
            raise
    return gap


def _take_over(db: sqlite3.Connection, gap: Gap, actor: str) -> None:
    """The rows of the attached ledger in place of ours; event numbers go on."""
    last = db.execute("SELECT COALESCE(MAX(seq), 0) FROM main.events").fetchone()[0]
    gaps = _gaps(db, "main")
    [(trigger,)] = db.execute("SELECT sql FROM main.sqlite_schema WHERE name = 'last_event_stays'").fetchall()
    db.execute("DROP TRIGGER last_event_stays")
    for table in ("runs", "tallies", "totals", "events"):
        db.execute(f"DELETE FROM main.{table}")
        db.execute(f"INSERT INTO main.{table} SELECT * FROM old.{table}")
    db.execute(trigger)
    # who runs now goes on under its name
    db.execute("INSERT OR IGNORE INTO main.processes SELECT * FROM old.processes")
    db.execute("DELETE FROM main.meta")
    db.execute("INSERT INTO main.meta SELECT * FROM old.meta")
    _note_gap(db, gap, actor, last, gaps)


def _note_gap(
    db: sqlite3.Connection, gap: Gap, actor: str, last: int, more: Sequence[Sequence[int]] = ()
) -> None:
    """Write down what is unknown; its event has a number beyond all that were ever given."""
    forget_leaving(db)
    gaps = sorted({(g[0], g[1]) for g in [*_gaps(db, "main"), *more, (gap.since, gap.until)]})
    db.execute("INSERT OR REPLACE INTO main.meta VALUES ('gaps', ?)", (json.dumps(gaps),))
    db.execute(
        "INSERT INTO main.events (seq, kind, at, n, detail)"
        " SELECT MAX(?, COALESCE(MAX(seq), 0)) + 1, 'restored', ?, 0, ? FROM main.events",
        (last, gap.until, f"restored by {actor} from a backup of {iso(gap.since)}"),
    )


def accept_gaps(store: SqliteStore, *, actor: str) -> int:
    """Note that a person has looked into what is unknown; `doctor` and `brief` tell of it no more."""

    def work(db: sqlite3.Connection) -> int:
        gaps = _gaps(db, "main")
        if gaps:
            db.execute("DELETE FROM meta WHERE name = 'gaps'")
            event = (None, None, "gaps accepted", store.clock.wall(), None, None, actor, 0, json.dumps(gaps))
            db.execute(ledger._INSERT_EVENT, event)
        return len(gaps)

    return int(store.submit(work, durable=True))


def _gaps(db: sqlite3.Connection, side: str) -> list[list[int]]:
    row = db.execute(f"SELECT value FROM {side}.meta WHERE name = 'gaps'").fetchone()
    return list(decode(row[0])) if row else []
