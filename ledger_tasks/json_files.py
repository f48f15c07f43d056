"""Tasks in JSON files, for small ledgers and for git: one file per session, loaded and saved whole under a lock.

A file is read into a SQLite database in memory, where the operations work as they do everywhere, and is written anew
and put in the place of the old one before anybody is answered. What was read is kept until the file is another one. A
file that is empty, cut off, changed by hand or gone is an error, and is never begun afresh.

Writers of a folder take turns by a lock on `.ledger-tasks.lock`, which also holds the number of the newest event, so
that the numbers of all sessions of the folder make one order. Files that come in by other ways (git pull) may bring
numbers that another session has too; those of one session always grow.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import ledger
from ledger import SqliteStore, StoreError
from ledger_tasks.book import Row, TaskStore, Wanted, columns_of
from ledger_tasks.memory import STORES, empty_tables, translated, writing
from ledger_tasks.model import EVENT_COLUMNS, TaskEvent, WorkerInfo
from ledger_tasks.portable import (
    Lines,
    Story,
    add_deliveries,
    deliveries_of,
    document,
    event_line,
    parse,
    sync_folder,
)
from ledger_tasks.sql import event_statement
from ledger_tasks.sqlite import SqliteBook

T = TypeVar("T")
_LOCK: Final = ".ledger-tasks.lock"
#: sessions that are kept in memory; each holds its file open, so that its inode is nobody else's meanwhile
_KEPT: Final = 100
#: how often all files are looked at until none changed meanwhile
_TRIES: Final = 1_000
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_INSERT_EVENT: Final = event_statement(":seq")


def file_name(session: str) -> str:
    """The name of a session's file; a session whose name is none for a file is named by its hash."""
    if _PLAIN_NAME.fullmatch(session):
        return f"ledger_{session}.json"
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", session)[:60]
    return f"ledger_{plain}~{hashlib.sha256(session.encode()).hexdigest()[:16]}.json"


@dataclass(slots=True, eq=False)
class _Loaded:
    """A session in memory: its tables, and the lines of its file."""

    path: Path
    session: str
    db: sqlite3.Connection
    lines: Lines = field(default_factory=Lines)
    #: the file that was read, held open; None while there is none
    handle: int | None = None
    stamp: tuple[int, ...] = ()
    last: int = 0

    def __del__(self) -> None:  # whoever still looks at it keeps it, also when it is kept no more
        if self.handle is not None:
            os.close(self.handle)
        self.db.close()


class JsonBook(SqliteBook):
    """One session in memory; what spans sessions asks the files of all."""

    def __init__(self, store: JsonTaskStore, found: _Loaded, session: str, last: int = 0) -> None:
        super().__init__(session, store.clock, self._perform)
        self._store, self._found = store, found
        self.last = max(last, found.last)
        #: tasks that were written
        self.touched: dict[str, Row] = {}

    def _perform(self, sql: str, values: dict[str, Any]) -> list[Any]:
        return self._found.db.execute(sql, values).fetchall()

    def insert(self, row: Row, event: TaskEvent) -> None:
        super().insert(row, event)
        self.touched[row.task.id] = row

    def insert_row(self, values: dict[str, Any]) -> None:
        # its number is that of its first event, here and when it is read again
        super().insert_row({"num": self.last + 1, **values})

    def save(self, row: Row, events: Sequence[TaskEvent] = ()) -> None:
        super().save(row, events)
        self.touched[row.task.id] = row

    def renew(self, row: Row) -> None:
        super().renew(row)
        self.touched[row.task.id] = row

    def beat(self, worker: WorkerInfo, forget: int) -> None:
        """Files that people keep in git do not change because somebody lives."""

    def _append(self, event: TaskEvent) -> None:
        self.last += 1
        _insert_event(self._found.db, replace(event, seq=self.last))

    def page(self, wanted: Wanted, limit: int) -> list[Row]:
        if wanted.session is not None:
            return super().page(wanted, limit)
        pages = self._store.each(lambda book: book.page(replace(wanted, session=book.session), limit))
        rows = sorted((row for page in pages for row in page), key=lambda row: row.num)
        return _cut(rows[::-1] if wanted.newest_first else rows, limit, lambda row: row.num)

    def events(
        self, after: int, limit: int, task_id: str | None = None, *, every: bool = False
    ) -> list[TaskEvent]:
        if not every:
            return super().events(after, limit, task_id)
        pages = self._store.each(lambda book: book.events(after, limit, task_id))
        events = sorted((event for page in pages for event in page), key=lambda event: event.seq)
        return _cut(events, limit, lambda event: event.seq)

    def last_seq(self) -> int:
        return max(self._store.each(lambda book: book.last), default=self.last)

    def stamp(self) -> str | None:
        return None  # it is in memory already

    def sessions(self) -> dict[str, dict[str, Any]]:
        return self._store.sessions()


def _cut(found: list[T], limit: int, number: Callable[[T], int]) -> list[T]:
    """A page that never ends between two of the same number, which two sessions may have."""
    end = limit
    while 0 < end < len(found) and number(found[end]) == number(found[end - 1]):
        end += 1
    return found[:end]


def _insert_event(db: sqlite3.Connection, event: TaskEvent) -> None:
    values = dict(zip(EVENT_COLUMNS, columns_of(event), strict=True))
    db.execute(_INSERT_EVENT, {"seq": event.seq, **values, "hash": event.hash})


class JsonTaskStore(TaskStore):
    """The tasks of a folder of JSON files. Threads and processes may share it; not for network file systems."""

    def __init__(
        self, folder: str | os.PathLike[str], *, lock_seconds: float = 30.0, clock: ledger.Clock | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.address = f"json:{self.folder}"
        self.lock_seconds = lock_seconds
        self.clock = clock or ledger.Clock()
        self._seen: set[Path] = set()
        self._calls: SqliteStore | None = None
        self._begin()
        STORES.add(self)

    def _begin(self) -> None:
        self._kept: OrderedDict[Path, _Loaded] = OrderedDict()
        self._locks: set[int] = set()
        self.mutex = threading.RLock()

    def before_fork(self) -> None:
        """Let nobody in."""
        self.mutex.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self.mutex.release()

    def after_fork_in_child(self) -> None:
        """The locks are the parent's, the memory is its own."""
        for handle in self._locks:
            os.close(handle)
        self._locks.clear()
        self.mutex = threading.RLock()

    # -- the contract --

    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """On the file as it stands; makes none."""
        with self.mutex, translated(self.address):
            return look(JsonBook(self, self._load(self._path(session), session), session))

    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """Under the folder's lock; the file is on disk before this returns."""
        with self._locked() as lock, self.mutex, translated(self.address):
            newest = self._newest(lock)
            found = self._load(self._path(session), session)
            book = JsonBook(self, found, session, newest)
            with self._writing(found):
                before = found.db.total_changes
                answer = work(book)
                if found.db.total_changes != before:
                    self._save(found, book, lock, durable=durable)
        return answer

    @contextmanager
    def _writing(self, found: _Loaded) -> Iterator[None]:
        """A transaction in memory; after a failure what memory has is forgotten, for the file may have less or more."""
        before = found.db.total_changes
        try:
            with writing(found.db):
                yield
        except BaseException:
            if found.db.total_changes != before:
                self._kept.pop(found.path, None)
            raise

    def calls(self) -> ledger.Store:
        """`calls.db` in the same folder; opened when first used."""
        if self._calls is None:
            with suppress(OSError):  # whoever only looks needs no folder
                self.folder.mkdir(parents=True, exist_ok=True)
            self._calls = SqliteStore(self.folder / "calls.db")
            self._calls.quiet = True
        return self._calls

    def close(self) -> None:
        """Let go of the files; they are read again when they are used again."""
        with self.mutex:
            self._kept.clear()
            self._seen.clear()
        if self._calls is not None:
            self._calls.close()

    # -- all sessions --

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Every session that has a file, with what is kept about it."""
        return dict(map(_head, self._files()))

    def each(self, look: Callable[[JsonBook], T]) -> list[T]:
        """What a look at each session gives, of one moment: done again if a file changed meanwhile."""
        with self.mutex:
            for _ in range(_TRIES):
                before = self._stamps()
                loaded = (self._load(path) for path in before)
                answers = [look(JsonBook(self, found, found.session)) for found in loaded]
                if self._stamps() == before:
                    return answers
        raise StoreError(
            f"{self.folder}: its files change faster than they can be read together; nothing was changed. Look at one "
            "session at a time, or keep so busy a ledger in SQLite"
        )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("ledger_*.json"))

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        return {path: _stamp(path.stat()) for path in self._files()}

    # -- a file in memory --

    def _path(self, session: str) -> Path:
        return self.folder / file_name(session)

    def _load(self, path: Path, session: str | None = None) -> _Loaded:
        """The session in memory, as its file is now."""
        kept = self._kept.get(path)
        try:
            if kept is not None and kept.stamp == _stamp(path.stat()):
                self._kept.move_to_end(path)
                return kept
            found = self._read_file(path)
        except FileNotFoundError:
            return self._absent(path, session)
        except (OSError, UnicodeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); it was left as it is") from error
        self._keep(found)
        return found

    def _absent(self, path: Path, session: str | None) -> _Loaded:
        if path in self._seen or session is None:
            raise StoreError(
                f"{path} was deleted while it was in use; nothing was changed. Put the file back, or restart the "
                "process to begin anew"
            )
        return _tables(path, session)

    def _read_file(self, path: Path) -> _Loaded:
        handle = os.open(path, os.O_RDONLY)
        try:
            with os.fdopen(os.dup(handle), encoding="utf-8") as file:
                text = file.read()
            story = parse(text, str(path))
            if file_name(story.session) != path.name:
                _refuse_name(path, story.session)
            found = _from_story(path, story)
            found.stamp = _stamp(os.fstat(handle))
        except BaseException:
            os.close(handle)
            raise
        found.handle = handle
        return found

    def _keep(self, found: _Loaded) -> None:
        self._seen.add(found.path)
        self._kept[found.path] = found
        self._kept.move_to_end(found.path)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    # -- saving --

    def _save(self, found: _Loaded, book: JsonBook, lock: int, *, durable: bool) -> None:
        for row in book.touched.values():
            found.lines.put(row)
        new = book.events(found.last, -1)
        found.lines.events += [event_line(event, numbered=True) for event in new]
        about = SqliteBook.sessions(book).get(found.session, {})
        text = document(found.session, about, found.lines, deliveries_of(book))
        os.pwrite(lock, f"{book.last}\n".encode(), 0)  # first: a number is never given twice
        handle = self._put(found.path, text.encode(), durable=durable)
        if found.handle is not None:
            os.close(found.handle)
        found.handle, found.stamp, found.last = handle, _stamp(os.fstat(handle)), book.last
        self._keep(found)

    def _put(self, path: Path, text: bytes, *, durable: bool) -> int:
        """Put a file in the place of another one; what is there is always whole, also after a power cut."""
        new = path.with_name(f"{path.name}.new")
        try:
            handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _write_all(handle, text)
                if path.exists():
                    os.fchmod(handle, path.stat().st_mode & 0o777)
                os.fsync(handle)
                new.replace(path)
                if durable:
                    sync_folder(self.folder)
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}); see the disk and the rights of the folder. Unless the "
                "folder itself could not be synchronised, the file is as it was"
            ) from error
        return handle

    # -- taking turns --

    @contextmanager
    def _locked(self) -> Iterator[int]:
        handle = self._open_lock()
        self._locks.add(handle)
        try:
            yield handle
        finally:
            self._locks.discard(handle)
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile would hold it on
            os.close(handle)

    def _open_lock(self) -> int:
        path = self.folder / _LOCK
        limit = time.monotonic() + self.lock_seconds
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be opened ({error.strerror}); nothing was changed"
                ) from error
            if _lock(handle, limit) and _is_same(handle, path):
                return handle
            os.close(handle)
            if time.monotonic() > limit:
                raise StoreError(
                    f"{path} is held by another process for more than {self.lock_seconds:g} s; nothing was changed. "
                    "See which process that is (fuser, lsof); the lock ends with it"
                )

    def _newest(self, lock: int) -> int:
        """The number of the newest event of all sessions; after the lock file was lost, from the files themselves."""
        told = os.pread(lock, 32, 0).partition(b"\n")[0]
        return int(told) if told.isdigit() else max(self.each(lambda book: book.last), default=0)


def _lock(handle: int, limit: float) -> bool:
    """Whether it could be had before the limit."""
    pause = 0.0005
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > limit:
                return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.01)


def _is_same(handle: int, path: Path) -> bool:
    """Whether the lock file is still the one that was opened: who deletes it must not let two in."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _write_all(handle: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _refuse_name(path: Path, session: str) -> NoReturn:
    raise StoreError(
        f"{path} holds session {session!r}, whose file is {file_name(session)}; it was left as it is. Give it that name, "
        "or take it out of the folder"
    )


def _head(path: Path) -> tuple[str, dict[str, Any]]:
    """Session and what is kept about it, from the first lines, which stand there in this order."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = [file.readline().strip().removesuffix(",") for _ in range(5)]
        head = json.loads("{" + ",".join(lines[1:]) + "}")
        return str(head["session"]), dict(head["about"])
    except (OSError, ValueError, KeyError, TypeError):  # not as we write it, or no ledger at all
        story = parse(path.read_text("utf-8"), str(path))
        return story.session, story.about


def _tables(path: Path, session: str) -> _Loaded:
    """An empty session in memory."""
    return _Loaded(path, session, empty_tables())


def _from_story(path: Path, story: Story) -> _Loaded:
    """A session in memory as a document tells it."""
    found = _tables(path, story.session)
    db, found.lines = found.db, story.lines or _lines_of(story)
    book = SqliteBook(story.session, ledger.Clock(), lambda sql, values: db.execute(sql, values).fetchall())
    db.execute("BEGIN")
    about = json.dumps(story.about, ensure_ascii=False)
    db.execute("INSERT INTO task_sessions VALUES (?, ?)", (story.session, about))
    for row in story.rows.values():
        book.insert_row({"num": row.num, **book._values(row)})
    for event in story.events:
        _insert_event(db, event)
    book.connect(story.edges())
    add_deliveries(book, story.deliveries)
    db.execute("COMMIT")
    db.execute("PRAGMA query_only = 1")
    found.last = story.events[-1].seq if story.events else 0
    return found


def _lines_of(story: Story) -> Lines:
    lines = Lines(events=[event_line(event, numbered=True) for event in story.events])
    for row in story.rows.values():
        lines.put(row)
    return lines
