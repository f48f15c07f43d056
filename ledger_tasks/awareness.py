"""Where a session stands, for whoever comes to it anew: a program, a person, or a model's context.

However many tasks there are, a page of each kind is read and the rest is counted. What was recorded is untrusted
text: in a context it stands on one line, control characters as pictures.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from ledger import Record
from ledger_tasks.book import Book, Row, Wanted
from ledger_tasks.deliveries import workflow_of
from ledger_tasks.metrics import Metrics, measured
from ledger_tasks.model import Task, at, plain, task_in
from ledger_tasks.operations import WAITS_FOR_PARTS
from ledger_tasks.states import ENDED, HELD, LEASED, TaskState

if TYPE_CHECKING:
    from ledger_tasks.tasks import TaskLedger

_S = TaskState
#: tasks of one kind that are looked at, and those that are kept of them
LOOKED_AT: Final = 100
SHOWN: Final = 20
#: the newest so many tasks make the figures
FIGURES_OF: Final = 500
_DEPENDENCIES: Final = 50


@dataclass(frozen=True, slots=True)
class Item:
    """One task (or, in doubt, one call), and why it stands where it is told."""

    id: str
    title: str
    state: str
    #: the reason, the error, or what is to be known of it
    why: str = ""
    #: who has it, or had it
    holder: str = ""
    stage: str = ""
    progress: float = 0.0
    #: seconds since it came into this state
    age: float | None = None
    #: seconds since its holder was heard of, where a lease runs
    silent: float | None = None
    #: some of the tasks that it waits for, and how many they are
    waits_for: tuple[str, ...] = ()
    waiting: int = 0
    #: fingerprint of the call that is in doubt
    call: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Tasks of one kind: how many, and some of them, the most relevant first."""

    total: int = 0
    items: tuple[Item, ...] = ()
    #: False where only a page was looked at to count them: there may be more
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Awareness:
    """Where a session stands."""

    session: str
    #: who asked
    agent: str
    at: datetime
    #: tasks by the name of their state
    counts: dict[str, int]
    #: what to do next, in a sentence
    next: str
    #: guarded calls of tasks, and deliveries, of which nobody knows whether they took effect
    in_doubt: Section
    #: past their deadline, of those looked at
    overdue: Section
    #: what somebody has: assigned, active, paused, in review, approved
    running: Section
    #: those of them whose lease has run out: their holder is gone
    lapsed: tuple[str, ...]
    ready: Section
    #: somebody declared that it cannot go on, or it waits for its parts
    blocked: Section
    failed: Section
    dead: Section
    #: for other tasks
    waiting: Section
    #: how many are not to be begun before some time, and the first of these times
    later: int
    later_at: datetime | None
    #: newest first
    done: Section
    #: of the newest 500 tasks; `metrics()` has them of all
    figures: Metrics

    @property
    def total(self) -> int:
        """How many tasks there are."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        found = {name: plain(value) for name, value in asdict(self).items()}
        return {**found, "total": self.total, "figures": self.figures.to_dict()}


# -- reading --


def awareness(ledger: TaskLedger) -> Awareness:
    """Where the ledger's session stands now."""
    doubts = _doubts(ledger)
    return ledger.store.read(ledger.session, lambda book: _Look(book, ledger.agent, doubts).whole())


def _doubts(ledger: TaskLedger) -> list[Record]:
    """Calls in doubt of tasks and of this session's deliveries, oldest first."""
    from ledger_ops.reader import reader_of

    calls: Any = ledger.store.calls()  # whatever keeps tasks has a store that can be looked at
    own = workflow_of(ledger.session)
    return [r for r in reader_of(calls).doubts() if r.wf == own or task_in(r.wf)[1] == ledger.session]


class _Look:
    """One look at a session. Each kind of task is read once, a page of it."""

    def __init__(self, book: Book, agent: str, doubts: Sequence[Record]) -> None:
        self.book, self.agent, self.doubts = book, agent, doubts
        self.now = at(book.now)
        self.counts = book.counts()
        self.seen: dict[str, Row] = {}

    def whole(self) -> Awareness:
        ready_count, later, first = self.book.pending()
        waiting_count = self.counts.get(_S.PENDING, 0) - ready_count - later
        newest = self._keep(self.book.page(Wanted(newest_first=True), FIGURES_OF))
        made = Awareness(
            session=self.book.session, agent=self.agent, at=self.now, counts=self.counts, next="",
            in_doubt=self._in_doubt(),
            running=self._section(_count(self.counts, HELD), self._page(HELD), self._held, by=self._by_silence),
            lapsed=tuple(row.task.id for row in self.book.lapsed(limit=LOOKED_AT)),
            ready=self._section(ready_count, self._keep(self.book.ready(None, None, LOOKED_AT)), self._plain),
            blocked=self._section(_count(self.counts, (_S.BLOCKED,)), self._page((_S.BLOCKED,)), self._plain),
            failed=self._ended(_S.FAILED), dead=self._ended(_S.DEAD),
            waiting=self._section(waiting_count, self._waiting(waiting_count), self._plain),
            later=later, later_at=at(first) if first else None,
            done=self._ended(_S.DONE), overdue=Section(),
            figures=measured((row.task for row in newest), self.now),
        )  # fmt: skip
        waiting, blocked = self._named(made.waiting), self._named(made.blocked)
        made = replace(made, overdue=self._overdue(), waiting=waiting, blocked=blocked)
        return replace(made, next=_next(made))

    # -- pages --

    def _keep(self, rows: Iterable[Row]) -> list[Row]:
        found = list(rows)
        self.seen |= {row.task.id: row for row in found}
        return found

    def _page(self, states: Iterable[TaskState], *, newest: bool = False) -> list[Row]:
        there = frozenset(state for state in states if self.counts.get(state))
        return (
            self._keep(self.book.page(Wanted(states=there, newest_first=newest), LOOKED_AT)) if there else []
        )

    def _waiting(self, count: int) -> list[Row]:
        if count <= 0:
            return []
        return self._keep(self.book.page(Wanted(states=frozenset({_S.PENDING}), waiting=True), LOOKED_AT))

    def _ended(self, state: TaskState) -> Section:
        """Of the newest that are in this state, those that came into it last."""
        rows = self._page((state,), newest=True)
        return self._section(_count(self.counts, (state,)), rows, self._plain, by=self._by_age)

    def _section(
        self,
        total: int,
        rows: list[Row],
        made: Callable[[Row], Item],
        *,
        by: Callable[[Row], Any] | None = None,
    ) -> Section:
        if by is not None:
            rows = sorted(rows, key=by)
        return Section(total, tuple(made(row) for row in rows[:SHOWN]))

    # -- items --

    def _plain(self, row: Row) -> Item:
        task = row.task
        return Item(
            task.id, task.label, task.state.value, why=task.reason, holder=task.assignee, stage=task.stage,
            progress=task.progress, age=self._since(task.changed_at or task.created_at), waiting=task.waiting,
        )  # fmt: skip

    def _held(self, row: Row) -> Item:
        return replace(self._plain(row), silent=self._silent(row))

    def _since(self, then: datetime | None) -> float | None:
        return None if then is None else max(0.0, (self.now - then).total_seconds())

    def _silent(self, row: Row) -> float | None:
        if row.task.state not in LEASED or not row.until:
            return None
        return max(0.0, (self.book.now - row.until) / 1e6 + row.lease)

    def _by_silence(self, row: Row) -> tuple[bool, float]:
        """What this agent has first, then who was silent longest."""
        return row.task.assignee != self.agent, -(self._silent(row) or 0.0)

    def _by_age(self, row: Row) -> float:
        return self._since(row.task.changed_at) or 0.0

    # -- what must be looked up --

    def _named(self, section: Section) -> Section:
        """With names of what the shown ones wait for."""
        waits = [item for item in section.items if item.waiting]
        return replace(
            section, items=tuple(self._with_names(item) if item in waits else item for item in section.items)
        )

    def _with_names(self, item: Item) -> Item:
        names = [dep.id for dep in self.seen[item.id].task.depends_on][:_DEPENDENCIES]
        rows = self.book.page(Wanted(ids=frozenset(names)), _DEPENDENCIES) if names else []
        rows += self.book.page(Wanted(parent=item.id), _DEPENDENCIES)
        open_ones = dict.fromkeys(row.task.id for row in rows if row.task.state not in ENDED)
        return replace(item, waits_for=tuple(open_ones)[:5])

    def _overdue(self) -> Section:
        late = [row for row in self.seen.values() if self._is_late(row.task)]
        late.sort(key=lambda row: row.task.deadline or self.now)
        items = tuple(
            replace(self._plain(row), why=f"due {_span(self._since(row.task.deadline))} ago")
            for row in late[:SHOWN]
        )
        looked_at = sum(row.task.state not in ENDED for row in self.seen.values())
        there = sum(count for state, count in self.counts.items() if state not in ENDED)
        return Section(len(late), items, complete=looked_at >= there)

    def _is_late(self, task: Task) -> bool:
        return task.state not in ENDED and task.deadline is not None and task.deadline <= self.now

    def _in_doubt(self) -> Section:
        named = frozenset(filter(None, (task_in(r.wf)[0] for r in self.doubts)))
        rows = {row.task.id: row for row in self.book.page(Wanted(ids=named), len(named))} if named else {}
        items = [item for record in self.doubts if (item := self._doubt(record, rows))]
        return Section(len(items), tuple(items[:SHOWN]))

    def _doubt(self, record: Record, rows: Mapping[str, Row]) -> Item | None:
        age = self._since(at(record.started))
        if record.wf == workflow_of(self.book.session):
            return Item(
                "",
                f"delivery {record.key}",
                "in_doubt",
                _ended_so(record),
                record.caller,
                age=age,
                call=record.call,
            )
        row = rows.get(task_in(record.wf)[0])
        if row is None:  # nobody's any more
            return None
        return Item(
            row.task.id,
            record.short,
            "in_doubt",
            _ended_so(record),
            row.task.assignee,
            age=age,
            call=record.call,
        )


def _ended_so(record: Record) -> str:
    return record.error or "its process ended while it ran"


def _count(counts: Mapping[str, int], states: Iterable[TaskState]) -> int:
    return sum(counts.get(state, 0) for state in states)


# -- what to do next --


def _next(a: Awareness) -> str:
    """The first of these that there is something to say to; each is a sentence with the method or command."""
    return next(filter(None, (advise(a) for advise in _ADVICE)))


def _resolve(a: Awareness) -> str:
    if not a.in_doubt.items:
        return ""
    item = a.in_doubt.items[0]
    of = f" of task {_name(item.id)}" if item.id else ""
    return (
        f"Find out whether {_short(item.title, 60)}{of} took effect, then `ledger resolve {item.call[:12]} --done` "
        "or `--not-done`."
    )


def _bring_back(a: Awareness) -> str:
    if not a.lapsed:
        return ""
    which = f"task {_name(a.lapsed[0])}" if len(a.lapsed) == 1 else f"{len(a.lapsed)} tasks"
    return f"Bring back {which}, whose holder fell silent: recover(), or `ledger tasks recover`."


def _go_on(a: Awareness) -> str:
    for item in a.running.items:
        if item.holder == a.agent and item.state in (_S.ACTIVE, _S.ASSIGNED, _S.APPROVED):
            how = {_S.ASSIGNED: "start()", _S.APPROVED: "complete()"}.get(
                TaskState(item.state), "complete() or fail()"
            )
            return f"Go on with task {_name(item.id)}, which you have ({item.state.upper()}{_at(item)}), then {how}."
    return ""


def _at(item: Item) -> str:
    return f", at {_short(item.stage, 60)}" if item.stage else ""


def _claim(a: Awareness) -> str:
    if not a.ready.items:
        return ""
    item = a.ready.items[0]
    return f"Begin {_title(item)}: claim_task({_name(item.id)}), or `ledger tasks claim {_word(item.id)}`."


def _review(a: Awareness) -> str:
    for item in a.running.items:
        if item.state == _S.REVIEW:
            return f"Validate task {_name(item.id)} of {_short(item.holder, 40)}: approve() or reject() it."
    return ""


def _decide(a: Awareness) -> str:
    for item in (*a.dead.items, *a.failed.items):
        if not item.why.startswith("its dependency "):
            return (
                f"Decide about task {_name(item.id)}, which is {item.state.upper()} ({_short(item.why, 100)}): retry() "
                "it with a reason, or cancel() it."
            )
    return ""


def _unblock(a: Awareness) -> str:
    for item in a.blocked.items:
        if item.why != WAITS_FOR_PARTS:
            return f"Clear what blocks task {_name(item.id)} ({_short(item.why, 100)}), then unblock() it."
    return ""


def _wait(a: Awareness) -> str:
    for item in sorted(a.running.items, key=lambda item: item.state == _S.PAUSED):
        if item.state == _S.PAUSED:
            return f"Resume task {_name(item.id)}, paused by {_short(item.holder, 40)}, when it can go on: resume()."
        return f"Wait: {_short(item.holder, 40)} works on task {_name(item.id)}; subscribe() tells when that changes."
    if a.later_at is not None:
        return f"Wait until {_time(a.later_at)}: {_some(a.later, 'task')} may not be begun before."
    return ""


def _rest(a: Awareness) -> str:
    if backlog := a.counts.get(_S.BACKLOG, 0):
        return f"Take up one of {_some(backlog, 'task')} in the backlog: unshelve() it."
    if not a.total:
        return "There is no task yet: add_task(), or `ledger tasks add`."
    return "Nothing is left to do: every task has ended."


_ADVICE: Final = (_resolve, _bring_back, _go_on, _claim, _review, _decide, _unblock, _wait, _rest)


# -- as text --


def awareness_text(a: Awareness, max_chars: int) -> str:
    """At most `max_chars`: what must be known first, then each kind with as many tasks as there is room for.

    What does not fit is counted.
    """
    for items in (SHOWN, 12, 8, 5, 3, 2, 1):
        lines = [*_lines(a, items)]
        if len(text := "\n".join(lines)) <= max_chars:
            return text
    return _cut(lines, max_chars)


def _cut(lines: Sequence[str], max_chars: int) -> str:
    """As many whole lines as fit, and how many do not."""
    for kept in range(len(lines) - 1, -1, -1):
        text = "\n".join([*lines[:kept], f"… {_some(len(lines) - kept, 'more line')}"])
        if len(text) <= max_chars:
            return text
    return next((short for short in (f"…+{len(lines)}", "…") if len(short) <= max_chars), "")


def _lines(a: Awareness, items: int) -> Iterator[str]:
    done = a.counts.get(_S.DONE, 0)
    share = f" ({100 * done / a.total:.0f} %)" if a.total else ""
    yield f"{_some(a.total, 'task')}, {done} done{share}"
    yield f"NEXT: {a.next}"
    yield f"Session {_short(a.session, 60)}, asked by {_short(a.agent, 60)} at {_time(a.at)}."
    for title, section, line in (
        ("IN DOUBT (nobody knows whether it took effect; do not repeat it)", a.in_doubt, _doubt_line),
        ("OVERDUE", a.overdue, _line), ("RUNNING", a.running, _running_line), ("READY", a.ready, _ready_line),
        ("BLOCKED", a.blocked, _waiting_line), ("FAILED", a.failed, _line), ("DEAD (retries used up)", a.dead, _line),
        ("WAITING", a.waiting, _waiting_line), ("DONE", a.done, _done_line),
    ):  # fmt: skip
        yield from _section_lines(title, section, line, items)
    if a.later_at is not None:
        yield f"LATER: {a.later}, the first at {_time(a.later_at)}"
    yield from _figure_lines(a.figures)


def _section_lines(title: str, section: Section, line: Callable[[Item], str], items: int) -> Iterator[str]:
    if not section.total:
        return
    yield f"{title}: {'' if section.complete else 'at least '}{section.total}"
    shown = section.items[:items]
    yield from (f"- {line(item)}" for item in shown)
    if len(shown) < section.total:
        yield f"- … {section.total - len(shown)} more"


def _line(item: Item) -> str:
    return _joined(_title(item), _short(item.why, 160))


def _title(item: Item) -> str:
    title = "" if item.title == item.id else f" {_short(item.title, 80)}"
    return f"{_word(item.id)}{title}"


def _joined(*parts: str) -> str:
    return ": ".join(filter(None, parts))


def _doubt_line(item: Item) -> str:
    of = f" of task {_word(item.id)}" if item.id else ""
    return f"{_short(item.title, 80)}{of} [{item.call[:12]}], {_span(item.age)} ago: {_short(item.why, 120)}"


def _running_line(item: Item) -> str:
    said = [f"{item.state.upper()} for {_span(item.age)}"]
    said += [f"{item.progress:.0%}"] if item.progress else []
    said += [_short(item.stage, 60)] if item.stage else []
    said += [f"by {_short(item.holder, 40)}"] if item.holder else []
    said += [f"silent for {_span(item.silent)}"] if item.silent is not None else []
    return _joined(_title(item), ", ".join(said), _short(item.why, 100))


def _ready_line(item: Item) -> str:
    return _title(item)


def _waiting_line(item: Item) -> str:
    why = "" if item.why == WAITS_FOR_PARTS else _short(item.why, 120)
    if not item.waiting:
        return _joined(_title(item), why)
    names = ", ".join(map(_word, item.waits_for))
    more = item.waiting - len(item.waits_for)
    named = f"{names} and {more} more" if names and more > 0 else names or _some(item.waiting, "task")
    return _joined(_title(item), why, f"waits for {named}")


def _done_line(item: Item) -> str:
    return f"{_title(item)}, {_span(item.age)} ago" + (
        f" by {_short(item.holder, 40)}" if item.holder else ""
    )


def _figure_lines(found: Metrics) -> Iterator[str]:
    total = found.total
    if not total.tasks:
        return
    said = [] if total.success_rate is None else [f"{total.success_rate:.0%} succeeded"]
    said += [f"wait {_span(total.wait.p50)}"] if total.wait.count else []
    said += [f"work {_span(total.work.p50)}"] if total.work.count else []
    for name in ("retries", "errors", "api_calls", "tokens"):
        count = getattr(total, name)
        said += [f"{name.replace('_', ' ')} {count}"] if count else []
    said += [f"cost {total.cost:g}"] if total.cost else []
    if said:
        yield f"FIGURES (of {_some(total.tasks, 'task')}, medians): {', '.join(said)}"


# -- words --


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _name(text: str) -> str:
    return f"'{_word(text)}'"


def _word(text: str) -> str:
    return _short(text, 80)


def _short(text: str, chars: int) -> str:
    """Untrusted text on one line, shortened with the number of characters that are left out."""
    shown = pictured(text[: chars + 1])
    return shown if len(text) <= chars else f"{shown[:chars]}… (+{len(text) - chars} characters)"


def pictured(text: str) -> str:
    """Text that stays on its line and turns no reading direction: control characters as pictures (␊, ␛)."""
    return text if text.isprintable() else "".join(map(_picture, text))


def _picture(char: str) -> str:
    code = ord(char)
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    if char.isprintable():
        return char
    return " " if unicodedata.category(char) == "Zs" else "\N{REPLACEMENT CHARACTER}"
