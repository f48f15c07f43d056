"""A session as one JSON document: what a JSON ledger keeps, what `export` writes and `import_from` reads back.

The document is made for git: one event, task and claim per line, in an order and a form that depend on nothing but what
happened. Reading replays it. A document whose snapshots are not what its events add up to, or whose events were altered,
is refused with `Tampered`; one that is no such document, with `StoreError`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from ledger import StoreError, UsageError
from ledger_tasks import operations as ops
from ledger_tasks.book import Book, Edge, Row, Wanted
from ledger_tasks.errors import DuplicateTask, Tampered
from ledger_tasks.model import Task, TaskEvent, apply, moment, plain, to_json
from ledger_tasks.sql import SqlBook
from ledger_tasks.states import LOST, TaskState
from ledger_tasks.verify import UNREADABLE, event_faults, held_faults, snapshot_faults

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

FORMAT: Final = "ledger-tasks"
SCHEMA: Final = 1
_PAGE: Final = 500
#: of a row, what no event tells
_HELD: Final = ("claim", "lease", "until", "mono", "boot", "op", "said")
#: of these, what outlasts a lease
_AT_REST: Final = ("claim", "lease", "op", "said")
#: of an event, beside its data; the session stands above
_TOLD: Final = ("task", "n", "kind", "from_state", "to_state", "actor", "source", "stage", "at", "hash")
_DELIVERY: Final = ("recipient", "channel", "key", "outcome", "why", "call", "at", "until")
_TRIES: Final = 6
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Imported:
    """What came in."""

    #: new, or with a story that went on
    tasks: int
    events: int
    #: were there already, as far as the file knows
    known: int


@dataclass(slots=True)
class Lines:
    """The lines of a document: by the id of the task, and of its events in their order."""

    tasks: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def put(self, row: Row) -> None:
        """The lines of a task as it is now."""
        name = _json(row.task.id)
        self.tasks[row.task.id] = f"{name}: {_json(_snapshot(row.task))}"
        names = _HELD if row.until else _AT_REST
        kept = {key: value for key in names if (value := getattr(row, key))}
        self.held[row.task.id] = f"{name}: {_json(kept)}"


@dataclass(frozen=True, slots=True)
class Story:
    """A session as a document tells it, replayed and checked."""

    session: str
    about: dict[str, Any]
    #: in the order in which they were added; `num` is the number of the first event
    rows: dict[str, Row]
    events: list[TaskEvent]
    deliveries: list[dict[str, Any]]
    #: the lines that say so, if it stood there as we write it
    lines: Lines | None = None

    def edges(self) -> list[Edge]:
        """Every dependency, one for each pair."""
        found: dict[tuple[str, str], str] = {}
        for name, row in self.rows.items():
            found |= {(name, dep.id): dep.on_failure for dep in row.task.depends_on}
        for name, row in self.rows.items():
            if row.task.parent:
                found.setdefault((row.task.parent, name), "fail")
        return [Edge(task, on, how) for (task, on), how in found.items()]


# -- writing --


def _json(value: Any) -> str:
    """On one line and in one order; half a surrogate alone, which no file can hold, is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _snapshot(task: Task) -> dict[str, Any]:
    """Its fields, where they say more than nothing."""
    found = task.to_dict()
    told = {name: value for name, value in found.items() if value != _PLAIN[name]}
    return {name: value for name, value in told.items() if name not in ("id", "session")} | {
        "state": found["state"],
        "version": task.version,
    }


def event_line(event: TaskEvent, *, numbered: bool) -> str:
    """An event on a line, its data word for word as they were hashed; `numbered`: with its number in the store."""
    told = {name: plain(getattr(event, name)) for name in _TOLD}
    parts = {name: _json(value) for name, value in told.items() if value != ""}
    parts["data"] = event.text
    if numbered:
        parts["seq"] = str(event.seq)
    return "{" + ",".join(f'"{name}":{parts[name]}' for name in sorted(parts)) + "}"


def document(session: str, about: Mapping[str, Any], lines: Lines, deliveries: Sequence[Any]) -> str:
    """The text of a whole document."""
    parts = (
        f'"format": "{FORMAT}"',
        f'"schema": {SCHEMA}',
        f'"session": {_json(session)}',
        f'"about": {_json(about)}',
        f'"tasks": {_block("{}", lines.tasks.values())}',
        f'"held": {_block("{}", lines.held.values())}',
        f'"events": {_block("[]", lines.events)}',
        f'"deliveries": {_block("[]", map(_json, deliveries))}',
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _block(braces: str, lines: Iterable[str]) -> str:
    inner = ",\n".join(lines)
    return f"{braces[0]}\n{inner}\n{braces[1]}" if inner else braces


def text_of(book: Book) -> str:
    """The document of a session, as a transaction sees it."""
    lines = Lines()
    for row in _pages(book):
        lines.put(row)
    after = 0
    while events := book.events(after, _PAGE):
        lines.events += [event_line(event, numbered=False) for event in events]
        after = events[-1].seq
    return document(book.session, book.sessions().get(book.session, {}), lines, deliveries_of(book))


def _pages(book: Book) -> Iterator[Row]:
    wanted = Wanted()
    while rows := book.page(wanted, _PAGE):
        yield from rows
        wanted.after = rows[-1].num


def deliveries_of(book: Book) -> list[dict[str, Any]]:
    """What was delivered, oldest first, of a book that keeps such."""
    if not isinstance(book, SqlBook):
        return []
    sql = f"SELECT {', '.join(_DELIVERY)} FROM task_deliveries WHERE session = :session ORDER BY num"
    return [dict(zip(_DELIVERY, found, strict=True)) for found in book.do(sql, session=book.session)]


# -- reading --


def parse(text: str, where: str) -> Story:
    """The story that a document tells, replayed and checked; `where` it stood is for messages."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"is not whole JSON ({error})" if text.strip() else "is empty"
        _refuse(where, what, error)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        _refuse(where, "is JSON of something else, and no ledger of tasks")
    if not isinstance(found.get("schema"), int) or found["schema"] > SCHEMA:
        _refuse(
            where, f"was written by a newer Ledger (schema {found.get('schema')!r}, this one knows {SCHEMA})"
        )
    try:
        story = _story(found, where)
        return replace(story, lines=_lines_in(text, story))
    except (*UNREADABLE, UsageError) as error:
        _refuse(where, f"has something in it that no ledger wrote ({type(error).__name__}: {error})", error)


def _refuse(where: str, what: str, cause: BaseException | None = None) -> NoReturn:
    raise StoreError(
        f"{where} {what}; it was left as it is, and nothing was begun afresh. Put a good copy in its place, for "
        "instance the last one from git"
    ) from cause


def _blame(where: str, faults: Iterable[str]) -> None:
    for fault in faults:
        raise Tampered(
            f"{where} was changed by something that is not a ledger: {fault}; nothing was taken from it. Put a good "
            "copy in its place, for instance the last one from git"
        )


def _story(found: dict[str, Any], where: str) -> Story:
    session = str(found["session"])
    rows: dict[str, Row] = {}
    events = list(_events(found["events"], session))
    for event in events:
        row = rows.get(event.task)
        task = row.task if row else None
        _blame(where, event_faults(task, row.hash if row else "", event))
        rows[event.task] = Row(apply(task, event), row.num if row else event.seq, hash=event.hash)
    _blame(where, _strangers(found["tasks"], rows))
    for name, row in rows.items():
        kept = Task.from_dict({**found["tasks"][name], "id": name, "session": session})
        whole = replace(row, task=kept, **_held(found["held"].get(name, {})))
        _blame(where, [*snapshot_faults(whole, row.task, row.hash), *held_faults(whole)])
        rows[name] = whole
    story = Story(session, dict(found["about"]), rows, events, list(map(_delivery, found["deliveries"])))
    for edge in story.edges():
        if edge.task not in rows or edge.on not in rows:
            _blame(where, [f"task {edge.task!r} waits for {edge.on!r}, and they are not both there"])
    return story


def _lines_in(text: str, story: Story) -> Lines | None:
    """The very lines of a document in our form, or None: writing them anew takes most of the time of a change."""
    lines = text.split("\n")
    tasks, held = _entries(lines, '"tasks": {', story.rows), _entries(lines, '"held": {', story.rows)
    count = len(story.events)
    if tasks is None or held is None or '"events": [' not in lines:
        return None
    start = lines.index('"events": [') + 1
    events = [line.removesuffix(",") for line in lines[start : start + count]]
    is_ours = lines[start + count : start + count + 1] == ["],"] and all(
        line[:1] + line[-1:] == "{}" for line in events
    )
    return Lines(tasks, held, events) if is_ours else None


def _entries(lines: list[str], opening: str, names: Iterable[str]) -> dict[str, str] | None:
    if opening not in lines:
        return None
    start = lines.index(opening) + 1
    found = {name: line.removesuffix(",") for name, line in zip(names, lines[start:], strict=False)}
    return found if all(line.startswith(f"{_json(name)}: ") for name, line in found.items()) else None


def _strangers(tasks: Mapping[str, Any], rows: Mapping[str, Row]) -> Iterator[str]:
    yield from (f"task {name!r} has no events" for name in tasks if name not in rows)
    yield from (f"task {name!r} has events and no snapshot" for name in rows if name not in tasks)


def _events(found: Sequence[Mapping[str, Any]], session: str) -> Iterator[TaskEvent]:
    seq = 0
    for told in found:
        before, seq = seq, int(told.get("seq", seq + 1))
        if seq <= before:
            raise ValueError(f"event {seq} stands after event {before}")
        names = {"source": "", "stage": "", "actor": "", "from_state": ""} | {
            name: told[name] for name in _TOLD if name in told
        }
        when = moment(names["at"])
        data = told["data"]
        if when is None or not isinstance(data, dict):
            raise ValueError(f"event {seq} has no time, or no data")
        names |= {"at": when, "data": data, "text": to_json(data, f"event {seq}")}
        yield TaskEvent(seq=seq, session=session, **names)


_KINDS: Final = dict.fromkeys(_HELD, str) | {"lease": float, "until": int, "mono": int}


def _held(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _KINDS[name](value) for name, value in found.items()}


def _delivery(found: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("at", "until")
    return {name: int(found[name]) if name in numbers else str(found[name]) for name in _DELIVERY}


_PLAIN: Final = Task(id="").to_dict()


# -- export --


def export(tasks: TaskLedger, target: str | os.PathLike[str] | TextIO) -> int:
    """Write the session to a file, whole or not at all, or to a stream; how many tasks it has."""
    text, story = _whole(tasks)
    if isinstance(target, str | os.PathLike):
        _replace(Path(target), text)
    else:
        target.write(text)
    return len(story.rows)


def _whole(tasks: TaskLedger) -> tuple[str, Story]:
    """A document that agrees with itself: who is written to meanwhile is read again, and at last held still."""
    store = getattr(tasks.store, "primary", tasks.store)
    for attempt in range(_TRIES):
        way = store.read if attempt < _TRIES // 2 else store.write
        text = way(tasks.session, text_of)
        try:
            return text, parse(text, f"session {tasks.session!r} of {store.address}")
        except Tampered:
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.05 * attempt)
    raise AssertionError  # pragma: no cover - the last try returned or raised


def _replace(path: Path, text: str) -> None:
    """Put a file in the place of another one, durably, so that a reader sees either."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); nothing was exported") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(handle, _mode_of(path))
            os.fsync(handle)
        Path(name).replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); it is as it was") from error
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()
    sync_folder(path.parent)


def _mode_of(path: Path) -> int:
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o600


def sync_folder(folder: Path) -> None:
    """Make sure that a name in a folder survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- import --


def import_from(tasks: TaskLedger, source: str | os.PathLike[str] | TextIO) -> Imported:
    """Take in what a session's document tells: all of it, or nothing.

    A task that is new comes with its whole story; one whose story here is the beginning of the file's goes on as
    there; one that is there already stays. Raises `DuplicateTask` where a task has another story here, `Tampered`
    where the file does not agree with itself, and `StoreError` where it is no such file.
    """
    text, where = _text_from(source)
    story = parse(text, where)
    if story.session != tasks.session:
        raise UsageError(
            f"{where} tells of session {story.session!r}, and this ledger is of {tasks.session!r}; nothing was imported. "
            f"Open the ledger with session={story.session!r} (--session), which is part of what was sealed"
        )
    return tasks.store.write(tasks.session, lambda book: take_in(book, story, where))


def _text_from(source: str | os.PathLike[str] | TextIO) -> tuple[str, str]:
    if not isinstance(source, str | os.PathLike):
        return source.read(), str(getattr(source, "name", "what was read"))
    try:
        return Path(source).read_text("utf-8"), os.fspath(source)
    except (OSError, UnicodeError) as error:
        raise StoreError(f"{os.fspath(source)} cannot be read ({error}); nothing was imported") from error


def take_in(book: Book, story: Story, where: str) -> Imported:
    """Write into a session what a document tells beyond what is there."""
    book.hold_graph()
    there = _there(book, story)
    longer, ahead = _compare(book, story, there, where)
    fresh = [name for name in story.rows if name not in there]
    if ahead and (fresh or longer):
        _refuse_mixture(book, where, ahead[0], [*longer, *fresh][0])
    events = [event for event in story.events if _is_news(event, there)]
    for event in events:
        _write_down(book, story.rows[event.task], event)
    for name in longer:
        _recount(book, there[name].task.state, story.rows[name].task.state, name)
    known = {(edge.task, edge.on) for edge in book.dependencies(list(there))}
    book.connect([edge for edge in story.edges() if (edge.task, edge.on) not in known])
    _see_to_others(book, story, longer)
    _take_in_rest(book, story)
    return Imported(len(fresh) + len(longer), len(events), len(there) - len(longer))


def _there(book: Book, story: Story) -> dict[str, Row]:
    names, found = list(story.rows), {}
    for start in range(0, len(names), _PAGE):
        some = frozenset(names[start : start + _PAGE])
        found.update({row.task.id: row for row in book.page(Wanted(ids=some), _PAGE)})
    return found


def _compare(book: Book, story: Story, there: Mapping[str, Row], where: str) -> tuple[list[str], list[str]]:
    """Tasks whose story is longer in the document, and those whose story is longer here. Refuses different ones."""
    seals = {(event.task, event.n): event.hash for event in story.events}
    longer, ahead = [], []
    for name, row in there.items():
        theirs, ours = story.rows[name].task.version, row.task.version
        if theirs >= ours and seals[name, ours] == row.hash:
            longer += [name] if theirs > ours else []
        elif theirs < ours and _seal(book, name, theirs) == seals[name, theirs]:
            ahead.append(name)
        else:
            _refuse_other(book, story, name, where)
    return longer, ahead


def _story_here(book: Book, name: str) -> Iterator[TaskEvent]:
    after = 0
    while events := book.events(after, _PAGE, name):
        yield from events
        after = events[-1].seq


def _seal(book: Book, name: str, n: int) -> str:
    return next((event.hash for event in _story_here(book, name) if event.n == n), "")


def _refuse_other(book: Book, story: Story, name: str, where: str) -> NoReturn:
    """Say where the two stories of a task part."""
    theirs = (event for event in story.events if event.task == name)
    for ours, event in zip(_story_here(book, name), theirs, strict=False):
        if ours.hash != event.hash:
            break
    raise DuplicateTask(
        f"task {name!r} of {where} and task {name!r} of session {book.session!r} have different stories: event {event.n} "
        f"is {_told(event)} there and {_told(ours)} here; nothing was imported. Import it into another ledger",
        name,
    )


def _told(event: TaskEvent) -> str:
    move = f"{event.from_state or 'nothing'} → {event.to_state}"
    return f"{event.kind} ({move}) by {event.actor or 'nobody'} at {event.at.isoformat()}"


def _refuse_mixture(book: Book, where: str, ahead: str, behind: str) -> NoReturn:
    raise DuplicateTask(
        f"{where} knows more of task {behind!r} than session {book.session!r}, and less of task {ahead!r}: both went on "
        "since they were one; nothing was imported. Import it into another ledger",
        behind,
    )


def _is_news(event: TaskEvent, there: Mapping[str, Row]) -> bool:
    row = there.get(event.task)
    return row is None or event.n > row.task.version


def _write_down(book: Book, row: Row, event: TaskEvent) -> None:
    if event.n == 1:
        book.insert(row, event)
    else:
        book.save(row, [event])


def _recount(book: Book, start: TaskState, end: TaskState, name: str) -> None:
    """Count the dependencies that are open because of a task that went from one state to another by a longer way."""
    if start in LOST and end not in LOST:
        book.reopen(name, "run")
    if end == TaskState.DONE and start != end:
        book.release(name)
    elif end in LOST and start not in LOST:
        book.release(name, "run")


def _see_to_others(book: Book, story: Story, longer: Iterable[str]) -> None:
    """What the end of a task means for those that wait for it here and that the document does not know."""
    for edge in list(book.dependents(list(longer))):
        if edge.task in story.rows:
            continue
        row, on = ops.find(book, edge.task), story.rows[edge.on].task
        if on.state in LOST and edge.on_failure != "run":
            ended = ops._end_with(book, row, edge.on_failure, on)
            if ended is not None:
                ops._lose(book, ended)
        elif row.task.state == TaskState.BLOCKED and not row.task.waiting:
            ops._goes_on(book, edge.task)


def _take_in_rest(book: Book, story: Story) -> None:
    """What is kept of a session beside its tasks."""
    if not isinstance(book, SqlBook):
        return
    if story.about:
        sql = "UPDATE task_sessions SET about = :about WHERE session = :session AND about = '{}'"
        book.do(sql, session=book.session, about=_json(story.about))
    known = {_json(delivery) for delivery in deliveries_of(book)}
    add_deliveries(book, [one for one in story.deliveries if _json(one) not in known])


def add_deliveries(book: SqlBook, deliveries: Iterable[Mapping[str, Any]]) -> None:
    """Write down what was delivered."""
    names = ", ".join(_DELIVERY)
    values = ", ".join(f":{name}" for name in _DELIVERY)
    for delivery in deliveries:
        sql = f"INSERT INTO task_deliveries (session, {names}) VALUES (:session, {values})"
        book.do(sql, session=book.session, **delivery)
