"""`TaskLedger`: what is to be done, by whom, in which order, and where it stands.

Each method is one transaction on the store; what it does there stands in `operations.py`.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import ledger
from ledger import UsageError
from ledger_tasks import operations as ops
from ledger_tasks.book import Book, Row, TaskStore, Wanted, by_urgency
from ledger_tasks.errors import NoSuchTask
from ledger_tasks.model import (
    GIVEN,
    LONGEST,
    Claim,
    Dep,
    OnFailure,
    StatusEvent,
    Task,
    TaskEvent,
    WorkerInfo,
    apply,
    checked,
    dependencies_from,
    fraction,
    micros_of,
    moment,
    refuse_odd,
    to_json,
)
from ledger_tasks.operations import Change, Who
from ledger_tasks.states import ENDED, TaskState, state_from
from ledger_tasks.stores import Where, open_tasks

if TYPE_CHECKING:
    from ledger_tasks.awareness import Awareness
    from ledger_tasks.deliveries import Delivery, Verdict
    from ledger_tasks.metrics import Metrics
    from ledger_tasks.portable import Imported
    from ledger_tasks.verify import Report

T = TypeVar("T")
#: what names a task; a claim also proves who holds it
Named = str | Task | Claim
_S = TaskState
_PAGE = 500


def whoami() -> str:
    """Who asks when nobody is named: LEDGER_AGENT, else user@host."""
    named = os.environ.get("LEDGER_AGENT", "")
    if named:
        return named
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may have a number for a user, and no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class TaskLedger:
    """Tasks of one session in one store. `TaskLedger("ledger.db")`, any URL of the guard, or `json:FOLDER`.

    Threads may share it. Nothing is opened before it is first used. Every method that changes something returns
    after it is on disk, raises a `TaskError` that says what to do, and may be repeated by the same caller.
    """

    def __init__(
        self, where: Where = None, *, agent: str | None = None, session: str = "main", source: str = "",
        lease: float = 300.0, **settings: Any,
    ) -> None:  # fmt: skip
        if not 0 < lease <= LONGEST:
            raise UsageError(f"lease={lease!r} is not a number of seconds above 0, up to {LONGEST:g}")
        self.agent = refuse_odd(whoami() if agent is None else agent, "the name of an agent")
        self.session = refuse_odd(session, "the name of a session")
        self.source = refuse_odd(source, "the name of a source")
        self.lease = lease
        self._where, self._settings = where, settings
        self._opened: TaskStore | None = None
        #: names of other programs' states, before ours and the usual ones are tried
        self.mapping: dict[str, str] = {}

    # -- the store --

    @property
    def store(self) -> TaskStore:
        """Where the tasks are kept; opened when first used."""
        if self._opened is None:
            # or two threads open two, and a memory:// of one is lost with what it took; a fork waits for this one
            with ledger._first_time:
                if self._opened is None:
                    self._opened = open_tasks(self._where, self._settings)
        return self._opened

    def _read(self, look: Callable[[Any], T]) -> T:
        return self.store.read(self.session, look)

    def _write(self, work: Callable[..., T], *args: Any, durable: bool = True, **options: Any) -> T:
        return self.store.write(self.session, lambda book: work(book, *args, **options), durable=durable)

    def close(self) -> None:
        """Close the store; it opens again when it is used again."""
        if self._opened is not None:
            self._opened.close()

    def __repr__(self) -> str:
        counts = self.counts()
        total = sum(counts.values())
        done = 100 * counts.get(_S.DONE, 0) / total if total else 0.0
        return f"TaskLedger({self.agent}:{self.session}, {total} tasks, {done:.1f}% complete)"

    def __len__(self) -> int:
        return sum(self.counts().values())

    def __bool__(self) -> bool:
        """True also when it is empty: `if ledger` must not mean `if it has tasks`."""
        return True

    def in_session(self, session: str) -> TaskLedger:
        """The same store and agent in another session."""
        other = TaskLedger(
            self._where,
            agent=self.agent,
            session=session,
            source=self.source,
            lease=self.lease,
            **self._settings,
        )
        other._opened = self.store
        other.mapping = self.mapping
        return other

    def sessions(self) -> list[str]:
        """The names of all sessions of the store."""
        return sorted(self._read(lambda book: book.sessions()))

    # -- adding --

    def add_task(self, /, task: Task | str | None = None, *, backlog: bool = False, **fields: Any) -> Task:
        """Add one task: a `Task`, or its fields (`add_task(id="a", description="…", dependencies=["b"])`).

        An id alone may be given first. Raises `DuplicateTask`, `NoSuchTask` (an unknown dependency or parent) or
        `DependencyCycle`, and adds nothing then.
        """
        return self.add_tasks([_task_of(task, fields)], backlog=backlog)[0]

    def add_tasks(self, tasks: Iterable[Task | Mapping[str, Any]], *, backlog: bool = False) -> list[Task]:
        """Add several, in any order of their dependencies: all of them or, when one is refused, none."""
        new = [checked(task if isinstance(task, Task) else _task_of(None, dict(task))) for task in tasks]
        if not new:
            return []
        rows = self._write(ops.add, new, self._who(), ledger.new_token(), backlog=backlog)
        return [row.task for row in rows]

    def add_dynamic_task(
        self, /, task_id: str, description: str = "", task_type: str = "task",
        dependencies: Iterable[str | Dep | Task] = (), **fields: Any,
    ) -> Task:  # fmt: skip
        """Add one task while others run."""
        named: dict[str, Any] = {
            "id": task_id,
            "description": description,
            "type": task_type,
            "dependencies": dependencies,
        }
        return self.add_task(**named | fields)

    def add_subtasks(self, parent: Named, tasks: Iterable[Task | str | Mapping[str, Any]]) -> list[Task]:
        """Parts of a task: it waits for them, and goes on by itself when all are done.

        An ACTIVE parent is BLOCKED until then, and its holder has it no more. A part given as a string is a
        description, numbered after its parent.
        """
        name = _id_of(parent)
        parts = [one if isinstance(one, str) else self._part_of(name, one) for one in tasks]
        if not parts:
            return []
        rows = self._write(ops.add_parts, name, parts, self._who(), ledger.new_token())
        return [row.task for row in rows]

    def _part_of(self, parent: str, part: Task | Mapping[str, Any]) -> Task:
        made = part if isinstance(part, Task) else _task_of(None, dict(part))
        return checked(replace(made, parent=parent))

    def add_dependency(
        self, task: Named, depends_on: str | Dep | Task, *, on_failure: OnFailure | None = None,
        expected_version: int | None = None, actor: str | None = None,
    ) -> Task:  # fmt: skip
        """Let a task that nobody has begun wait for one more. Raises `DependencyCycle`."""
        (dep,) = dependencies_from([depends_on])
        dep = dep if on_failure is None else dependencies_from([Dep(dep.id, on_failure)])[0]
        return self._write(ops.add_dependency, _id_of(task), dep, self._who(actor), expected_version).task

    # -- looking --

    def get(self, task: Named) -> Task:
        """The task as it is now, with what depends on it. Raises `NoSuchTask`."""

        def look(book: Book) -> Task:
            row = ops.find(book, _id_of(task))
            blocks = tuple(edge.task for edge in book.dependents([row.task.id]))
            return replace(row.task, blocks=blocks)

        return self._read(look)

    get_task = get

    def __contains__(self, task_id: object) -> bool:
        try:
            self.get(str(task_id))
        except NoSuchTask:
            return False
        return True

    def __iter__(self) -> Iterator[Task]:
        return self.tasks()

    def tasks(
        self, *, state: TaskState | str | Iterable[TaskState | str] | None = None, type: str | None = None,
        assignee: str | None = None, parent: str | None = None, tag: str | None = None, text: str | None = None,
        all_sessions: bool = False,
    ) -> Iterator[Task]:  # fmt: skip
        """Tasks in the order in which they were added, a page at a time. `text` looks into everything that is kept."""
        wanted = Wanted(
            states=_states_of(state), types=frozenset([type] if type else ()), assignee=assignee or "", parent=parent,
            tag=tag or "", text=text or "", session=None if all_sessions else self.session,
        )  # fmt: skip
        while page := self._read(lambda book: book.page(wanted, _PAGE)):
            yield from (row.task for row in page if not tag or tag in row.task.tags)
            wanted.after = page[-1].num

    def list_tasks(self, /, **wanted: Any) -> list[Task]:
        """`tasks(…)`, all at once."""
        return [*self.tasks(**wanted)]

    def counts(self) -> dict[TaskState, int]:
        """How many tasks are in each state."""
        found = self._read(lambda book: book.counts())
        return {state: found[state.value] for state in TaskState if state.value in found}

    def get_pending_subtasks(self, parent: Named) -> list[Task]:
        """Its parts that have not ended."""
        return [task for task in self.tasks(parent=_id_of(parent)) if task.state not in ENDED]

    def dead_letters(self) -> list[Task]:
        """Tasks whose retries are used up; `retry` with a reason brings one back."""
        return self.list_tasks(state=_S.DEAD)

    # -- choosing --

    def get_next_executable_task(
        self, *, capabilities: Sequence[str] | None = None, types: Sequence[str] | None = None
    ) -> Task | None:
        """The task that can be begun now and is most urgent, then oldest; claims nothing."""
        return next(
            iter(self.get_parallel_executable_tasks(limit=1, capabilities=capabilities, types=types)), None
        )

    def get_parallel_executable_tasks(
        self,
        limit: int = 100,
        *,
        capabilities: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
    ) -> list[Task]:
        """All that can be begun now, most urgent first, then oldest; claims nothing."""
        can, kinds = _several(capabilities, "capabilities"), _several(types, "types")
        rows = self._read(lambda book: book.ready(can, kinds, limit))
        return [row.task for row in rows]

    def get_available(
        self, agent_id: str | None = None, capabilities: Sequence[str] = (), limit: int = 100
    ) -> list[Task]:
        """What an agent with these capabilities may claim now; `agent_id` is for the reader."""
        del agent_id  # whoever can do it may have it
        return self.get_parallel_executable_tasks(limit, capabilities=capabilities)

    def waves(self) -> list[list[Task]]:
        """What has not ended, in waves: each can be done in parallel once those before it are done."""
        from ledger_tasks.schedule import waves

        return waves(self.tasks())

    def critical_path(self, weight: Callable[[Task], float] | None = None) -> list[Task]:
        """The longest chain of dependencies among what has not ended; `weight` is what a task takes (1 if not given)."""
        from ledger_tasks.schedule import critical_path

        return critical_path(self.tasks(), weight)

    # -- claiming --

    def claim_task(
        self, task: Named, agent: str | None = None, *, lease: float | None = None, start: bool = False
    ) -> Claim | None:
        """Claim that task, and begin it if `start` says so; None if somebody else has it or it cannot be begun now."""
        return self._claimed(ops.claim_task, agent, lease, _id_of(task), start=start)

    def claim_next(
        self, agent: str | None = None, *, capabilities: Sequence[str] | None = (), types: Sequence[str] | None = None,
        lease: float | None = None, start: bool = False,
    ) -> Claim | None:  # fmt: skip
        """Claim the most urgent task that can be begun and needs nothing beyond these capabilities (None: whatever it needs).

        None if there is none, also after what dead agents left has been brought back. `start`: begin it at once.
        """
        options: dict[str, Any] = {
            "capabilities": _several(capabilities, "capabilities"), "types": _several(types, "types"), "start": start,
        }  # fmt: skip
        claim = self._claimed(ops.claim_next, agent, lease, **options)
        if claim is None and self._has_lapsed():
            self.recover()  # what is DEAD by that may have freed others
            claim = self._claimed(ops.claim_next, agent, lease, **options)
        return claim

    def _claimed(
        self,
        operation: Callable[..., Row | None],
        agent: str | None,
        lease: float | None,
        *args: Any,
        **options: Any,
    ) -> Claim | None:
        seconds = self.lease if lease is None else lease
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise UsageError(f"lease={lease!r} is not a number of seconds; nothing was claimed")
        if not 0 < seconds <= LONGEST:
            raise UsageError(
                f"lease={lease!r} is not a number of seconds above 0, up to {LONGEST:g}; nothing was claimed"
            )
        who = Who(self._actor(agent), ledger.new_token(), self.source)
        row = self._write(operation, *args, who=who, lease=seconds, **options)
        return None if row is None else Claim(row.task, who.actor, who.token, seconds)

    def _has_lapsed(self) -> bool:
        return bool(self._read(lambda book: book.lapsed(limit=1)))

    def heartbeat(self, claim: Claim) -> bool:
        """Say that its holder lives: the lease begins anew. False: the claim is lost, stop working on the task."""
        return self._write(ops.heartbeat, claim.id, self._who(claim=claim), durable=False)

    def release(
        self, task: Named, reason: str = "", *, retry_in: float = 0.0, agent: str | None = None,
        expected_version: int | None = None,
    ) -> Task:  # fmt: skip
        """Give a task back undone; it is PENDING again, not before `retry_in` seconds, and no retry is counted."""
        _refuse_pause(retry_in)
        who = self._holder(task, agent)
        return self._write(
            ops.release, _id_of(task), who, reason, expected_version, retry_in=retry_in
        ).row.task

    # -- what its holder does --

    def start(self, task: Named, *, agent: str | None = None, expected_version: int | None = None) -> Task:
        """ASSIGNED → ACTIVE."""
        return self._held(task, "start", _S.ACTIVE, agent, expected_version, start=(_S.ASSIGNED,))

    def pause(
        self, task: Named, reason: str = "", *, agent: str | None = None, expected_version: int | None = None
    ) -> Task:
        """ACTIVE → PAUSED: it stays its holder's, and no lease runs, because it may wait for a person."""
        return self._held(task, "pause", _S.PAUSED, agent, expected_version, why=reason)

    def resume(self, task: Named, *, agent: str | None = None, expected_version: int | None = None) -> Task:
        """PAUSED → ACTIVE; the lease begins anew."""
        return self._held(task, "resume", _S.ACTIVE, agent, expected_version, start=(_S.PAUSED,))

    def submit_for_review(
        self,
        task: Named,
        result: Any = None,
        *,
        agent: str | None = None,
        expected_version: int | None = None,
    ) -> Task:
        """ACTIVE → REVIEW; it stays its holder's until somebody approves or rejects it."""
        fields = None if result is None else {"result": result}
        return self._held(task, "submit_for_review", _S.REVIEW, agent, expected_version, fields=fields)

    def complete(
        self, task: Named, result: Any = None, *, agent: str | None = None, expected_version: int | None = None,
        cost: float = 0.0, tokens: int = 0, api_calls: int = 0,
    ) -> Task:  # fmt: skip
        """ACTIVE or APPROVED → DONE; what waited for nothing else can be begun. Cost and the like are added."""
        return self._complete(
            task, agent, result=result, expected=expected_version, usage=_usage(cost, tokens, api_calls)
        ).row.task

    def complete_task_and_route(
        self, task: Named, result: Any = None, outcome: str = "success", *, agent: str | None = None,
        expected_version: int | None = None, cost: float = 0.0, tokens: int = 0, api_calls: int = 0,
    ) -> list[Task]:  # fmt: skip
        """Complete a task (`outcome="failure"`: fail it with `result` as the error); which tasks can be begun now.

        A ready task that nobody began is claimed and begun for this ledger's agent in the same transaction.
        """
        usage = _usage(cost, tokens, api_calls)
        if outcome == "success":
            change = self._complete(
                task, agent, result=result, expected=expected_version, usage=usage, route=True
            )
        elif outcome == "failure":
            change = self._fail(task, str(result), agent, None, usage, expected_version, route=True)
        else:
            raise UsageError(f"outcome={outcome!r} is neither 'success' nor 'failure'; nothing was changed")
        return self._ready_of(change.freed)

    def _ready_of(self, names: Sequence[str]) -> list[Task]:
        """Those of these tasks that can be begun now."""

        def look(book: Book) -> list[Row]:
            pages = (names[start : start + _PAGE] for start in range(0, len(names), _PAGE))
            rows = (row for some in pages for row in book.page(Wanted(ids=frozenset(some)), _PAGE))
            return sorted((row for row in rows if is_due(book, row)), key=by_urgency)

        return [row.task for row in self._read(look)]

    def _complete(self, task: Named, agent: str | None, **options: Any) -> Change:
        to_json(options["result"], f"the result of task {_id_of(task)!r}")
        return self._write(ops.complete, _id_of(task), self._holder(task, agent), **options)

    def fail(
        self, task: Named, error: str | BaseException, *, agent: str | None = None, retry_in: float | None = None,
        expected_version: int | None = None, cost: float = 0.0, tokens: int = 0, api_calls: int = 0,
    ) -> Task:  # fmt: skip
        """ACTIVE → FAILED, and while retries are left PENDING again, not before `retry_in` seconds (if not given 1, 2, 4 …).

        DEAD when they are used up; with `max_retries=0` it stays FAILED.
        """
        told = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        usage = _usage(cost, tokens, api_calls)
        return self._fail(task, told, agent, retry_in, usage, expected_version).row.task

    def _fail(
        self, task: Named, error: str, agent: str | None, retry_in: float | None, usage: dict[str, Any],
        expected: int | None, *, route: bool = False,
    ) -> Change:  # fmt: skip
        if retry_in is not None:
            _refuse_pause(retry_in)
        options: dict[str, Any] = {"usage": usage, "retry_in": retry_in, "expected": expected, "route": route}
        return self._write(ops.fail, _id_of(task), self._holder(task, agent), error, **options)

    def _held(
        self, task: Named, op: str, to: TaskState, agent: str | None, expected: int | None, **options: Any
    ) -> Task:
        who = self._holder(task, agent)
        return self._write(
            ops.move, _id_of(task), who, op, to, held=True, expected=expected, **options
        ).row.task

    def checkpoint(self, task: Named, data: Any, *, agent: str | None = None) -> Task:
        """Keep what the next holder needs to go on; it replaces the checkpoint before."""
        return self._record(task, agent, "checkpoint", fields={"checkpoint": data}, timed="checkpoint_at")

    def progress(
        self, task: Named, done: float, stage: str = "", *, agent: str | None = None, cost: float = 0.0,
        tokens: int = 0, api_calls: int = 0,
    ) -> Task:  # fmt: skip
        """How far it is, from 0 to 1, and at what; cost and the like are added."""
        fields: dict[str, Any] = {"progress": fraction(done)}
        if refuse_odd(stage, "the stage"):
            fields["stage"] = stage
        usage = _usage(cost, tokens, api_calls)
        return self._record(task, agent, "progress", stage=stage, fields=fields, adds=usage)

    def add_artifact(self, task: Named, name: str, value: Any = None, *, agent: str | None = None) -> Task:
        """Something that it made: a name, and where it is or what it is."""
        return self._record(task, agent, "artifact", adds={"artifacts": {"name": name, "value": value}})

    def _record(self, task: Named, agent: str | None, kind: str, **options: Any) -> Task:
        return self._write(
            ops.record, _id_of(task), self._holder(task, agent), kind, ledger.new_token(), **options
        ).task

    # -- what anybody does --

    def approve(
        self, task: Named, reason: str = "", *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """REVIEW → APPROVED; its holder completes it."""
        return self._moved(task, "approve", _S.APPROVED, actor, expected_version, why=reason)

    def reject(
        self, task: Named, reason: str, *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """REVIEW → ACTIVE: its holder goes on with it."""
        return self._moved(task, "reject", _S.ACTIVE, actor, expected_version, why=reason, start=(_S.REVIEW,))

    def block(
        self, task: Named, reason: str, *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """PENDING or ACTIVE → BLOCKED, with a reason; who had it has it no more."""
        if not reason:
            raise UsageError(f"task {_id_of(task)!r} is blocked for a reason; nothing was changed. Give one")
        if reason == ops.WAITS_FOR_PARTS:
            raise UsageError(
                f"{reason!r} is what a parent says that goes on by itself; task {_id_of(task)!r} was not changed. "
                "Say it in other words"
            )
        return self._moved(task, "block", _S.BLOCKED, actor, expected_version, why=reason)

    def unblock(
        self, task: Named, reason: str = "", *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """BLOCKED → PENDING."""
        return self._moved(
            task, "unblock", _S.PENDING, actor, expected_version, why=reason, start=(_S.BLOCKED,)
        )

    def shelve(
        self, task: Named, reason: str = "", *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """PENDING → BACKLOG: kept for later."""
        return self._moved(task, "shelve", _S.BACKLOG, actor, expected_version, why=reason)

    def unshelve(
        self, task: Named, reason: str = "", *, actor: str | None = None, expected_version: int | None = None
    ) -> Task:
        """BACKLOG → PENDING."""
        return self._moved(
            task, "unshelve", _S.PENDING, actor, expected_version, why=reason, start=(_S.BACKLOG,)
        )

    def _moved(
        self, task: Named, op: str, to: TaskState, actor: str | None, expected: int | None, **options: Any
    ) -> Task:
        who = self._who(actor, task if isinstance(task, Claim) else None)
        return self._write(
            ops.move, _id_of(task), who, op, to, held=False, expected=expected, **options
        ).row.task

    def retry(
        self, task: Named, reason: str = "", *, fresh: bool = False, actor: str | None = None,
        expected_version: int | None = None,
    ) -> Task:  # fmt: skip
        """FAILED or DEAD → PENDING. Where no retry is left, a reason is needed and the count begins anew.

        Effects of earlier runs are replayed, not done again, unless `fresh`: then its workflow is a new one and its
        checkpoint is gone, and every tool runs again.
        """
        who = self._who(actor)
        return self._write(ops.retry, _id_of(task), who, reason, expected_version, fresh=fresh).row.task

    def cancel(
        self, task: Named, reason: str = "", *, dependents: bool = False, actor: str | None = None,
        expected_version: int | None = None,
    ) -> Task:  # fmt: skip
        """CANCELLED, with its subtasks. `dependents`: what waits for it too; otherwise its dependency has failed."""
        options: dict[str, Any] = {"dependents": dependents, "expected": expected_version}
        return self._write(ops.cancel, _id_of(task), self._who(actor), reason, **options).row.task

    # -- workers --

    def beat(self, worker: WorkerInfo) -> WorkerInfo:
        """A worker says that it lives; with the times that the store keeps of it."""
        return self._write(ops.beat, worker, durable=False)

    def workers(self) -> list[WorkerInfo]:
        """The workers of this session that were seen in the last days, newest first, and what each is doing."""
        return self._read(ops.workers)

    # -- recovery --

    def stale_tasks(self, older_than: float | None = None) -> list[Task]:
        """Held tasks whose lease has lapsed, or (seconds) whose holder has said nothing for so long.

        A task that is paused or in review waits for a person, and is not stale.
        """
        if older_than is not None and not 0 <= older_than <= LONGEST:
            raise UsageError(f"older_than={older_than!r} is not a number of seconds from 0 to {LONGEST:g}")
        return [row.task for row in self._read(lambda book: book.lapsed(older_than, 10_000))]

    def recover(self) -> list[Task]:
        """Bring back what lapsed: PENDING again, or DEAD when it had been begun and no retry is left.

        Returns the tasks that can be done again. Live work is never touched; two at once do it once.
        """
        back: list[Row] = []
        while True:
            rows, seen = self._write(ops.recover, self._who())
            back += rows
            if seen < ops.RECOVER_AT_ONCE:
                return [row.task for row in back]

    # -- what happened --

    def events(
        self, task: Named | None = None, *, after: int = 0, all_sessions: bool = False
    ) -> Iterator[TaskEvent]:
        """What happened, oldest first, of one task or of all; `after` a sequence number."""
        name = None if task is None else _id_of(task)

        def look(book: Book) -> list[TaskEvent]:
            return book.events(after, _PAGE, name, every=all_sessions)

        while page := self._read(look):
            yield from page
            after = page[-1].seq

    def replay(self, task: Named, until: int | datetime | str | None = None) -> Task:
        """The task as its events make it, up to and with a sequence number or a time. Raises `NoSuchTask`.

        A time is a datetime with its zone, or ISO text.
        """
        last = until if isinstance(until, int) else None
        end = None if until is None or last is not None else micros_of(moment(until))
        found: Task | None = None
        for event in self.events(task):
            if (last is not None and event.seq > last) or (end is not None and micros_of(event.at) > end):
                break
            found = apply(found, event)
        if found is None:
            raise NoSuchTask(
                f"task {_id_of(task)!r} has no event in session {self.session!r} up to then", _id_of(task)
            )
        return found

    def verify(self, *, all_sessions: bool = False) -> Report:
        """Prove that every snapshot is what its events add up to, and that no event was altered."""
        from ledger_tasks.verify import verify

        return verify(self, all_sessions=all_sessions)

    def export(self, target: str | os.PathLike[str] | TextIO) -> int:
        """Write the session as one JSON document, made for git, to a file or a stream; how many tasks it has."""
        from ledger_tasks.portable import export

        return export(self, target)

    def import_from(self, source: str | os.PathLike[str] | TextIO) -> Imported:
        """Take in what `export` wrote of this session: all of it or nothing; what is there already stays as it is.

        A longer story of the same beginning continues it. Raises `DuplicateTask` where a task has another story
        here, `Tampered` where the file was changed, `StoreError` where it is no such file.
        """
        from ledger_tasks.portable import import_from

        return import_from(self, source)

    def subscribe(
        self, after: int | None = None, *, every: float = 0.1, all_sessions: bool = False
    ) -> Iterator[TaskEvent]:
        """Events as they happen, for ever; `after` a sequence number (None: from now on)."""
        last = self.last_seq() if after is None else after
        while True:
            for event in self.events(after=last, all_sessions=all_sessions):
                yield event
                last = event.seq
            time.sleep(every)

    def last_seq(self) -> int:
        """The number of the newest event of the store, 0 if there is none."""
        found: int = self._read(lambda book: book.last_seq())
        return found

    # -- other programs' words --

    def write_event(self, event: StatusEvent) -> Task:
        """Take over what a program reports under its own names; states in between are recorded as implied."""
        from ledger_tasks.reports import report

        return report(self, event)

    def sync(self, action_id: str | int, action_state: str, *, stage: str = "") -> Task:
        """Mirror the state of a host program's own action as the task of that id, which is made when first heard of."""
        return self.write_event(
            StatusEvent(
                state=str(action_state), actor=self.agent, source=self.source, req=str(action_id), stage=stage
            )
        )

    def state_named(self, name: TaskState | str) -> TaskState:
        """The state of that name by this ledger's mapping, ours, or the usual ones. Raises `UsageError`."""
        return state_from(self.mapping.get(str(name), name))

    # -- deliveries, awareness, figures --

    def deliver(
        self, send: Callable[[], Any], *, recipient: str, channel: str = "", key: str, cooldown: float = 0.0
    ) -> Delivery:
        """Send once for each key, and nothing to that recipient on that channel within `cooldown` seconds."""
        from ledger_tasks.deliveries import deliver

        return deliver(self, send, recipient=recipient, channel=channel, key=key, cooldown=cooldown)

    def should_deliver(
        self, *, recipient: str, channel: str = "", key: str, cooldown: float = 0.0
    ) -> Verdict:
        """Whether `deliver` would send now; true or false, with the reason."""
        from ledger_tasks.deliveries import should_deliver

        return should_deliver(self, recipient=recipient, channel=channel, key=key, cooldown=cooldown)

    def deliveries(self) -> list[Delivery]:
        """What was sent, suppressed (and why), or is in doubt, oldest first."""
        from ledger_tasks.deliveries import deliveries

        return deliveries(self)

    def metrics(self) -> Metrics:
        """Throughput, success rate, times, retries, errors and cost; of all, by type and by agent."""
        from ledger_tasks.metrics import metrics

        return metrics(self)

    def get_awareness(self) -> Awareness:
        """Done, running, ready, blocked and by what, failed and why, in doubt, and what to do next."""
        from ledger_tasks.awareness import awareness

        return awareness(self)

    def get_awareness_text(self, max_chars: int = 4000) -> str:
        """The same for a model's context: most relevant first, never longer than that."""
        from ledger_tasks.awareness import awareness_text

        return awareness_text(self.get_awareness(), max_chars)

    # -- who asks --

    def _actor(self, name: str | None) -> str:
        return self.agent if name is None else refuse_odd(name, "the name of an agent")

    def _who(self, actor: str | None = None, claim: Claim | None = None) -> Who:
        if claim is not None:
            return Who(claim.agent, claim.token, self.source)
        return Who(self._actor(actor), source=self.source)

    def _holder(self, task: Named, agent: str | None) -> Who:
        return self._who(agent, task if isinstance(task, Claim) else None)


def _refuse_pause(retry_in: float) -> None:
    if not 0 <= retry_in <= LONGEST:
        raise UsageError(
            f"retry_in={retry_in!r} is not a number of seconds from 0 to {LONGEST:g}; nothing was changed"
        )


def is_due(book: Book, row: Row) -> bool:
    """Whether it can be begun now."""
    return row.task.ready and micros_of(row.task.not_before) <= book.now


def _id_of(task: Named) -> str:
    return task if isinstance(task, str) else task.id


def _several(words: Sequence[str] | None, what: str) -> Sequence[str] | None:
    """A list of words; one string would be read as its letters."""
    if isinstance(words, str):
        raise UsageError(f"{what}={words!r} is one string; give a list: [{words!r}]")
    return words


def _states_of(state: TaskState | str | Iterable[TaskState | str] | None) -> frozenset[TaskState]:
    if state is None:
        return frozenset()
    return frozenset(map(state_from, [state] if isinstance(state, str) else state))


def _task_of(task: Task | str | None, fields: dict[str, Any]) -> Task:
    """A task from what `add_task` was given; raises `UsageError` for a field that is none."""
    if isinstance(task, Task):
        if not fields:
            return task
        raise UsageError(
            f"task {task.id!r} is whole; fields beside it ({', '.join(fields)}) are not used. Nothing was added"
        )
    if isinstance(task, str):
        fields = {"id": task, **fields}
    fields = {_FIELD_NAMES.get(name, name): value for name, value in fields.items()}
    unknown = fields.keys() - set(GIVEN)
    if unknown or "id" not in fields:
        what = f"a task has no {', '.join(sorted(unknown))}" if unknown else "a task needs an id"
        raise UsageError(f"{what}; nothing was added. What can be given: {', '.join(GIVEN)}")
    return Task(**fields)


#: what others call a field
_FIELD_NAMES = {
    "task_id": "id", "task_type": "type", "dependencies": "depends_on", "prerequisites": "depends_on",
    "parent_id": "parent", "required_capabilities": "capabilities",
}  # fmt: skip


#: of a cost and the like in one report, so that sums stay numbers
_MOST = 1e15


def _usage(cost: float, tokens: int, api_calls: int) -> dict[str, Any]:
    """What is added to a task's account; nothing is not written."""
    found = {"cost": cost, "tokens": tokens, "api_calls": api_calls}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise UsageError(f"{name}={value!r} is not a number from 0 to {_MOST:g}; nothing was changed")
    return {name: value for name, value in found.items() if value}


# -- by user and prompt, and of a host program's session --

_of_session: dict[str, TaskLedger] = {}


def create_ledger_for_user_prompt(
    user_id: str | int, prompt_id: str | int, backend: Where = None
) -> TaskLedger:
    """The ledger of one prompt of one user: JSON files in `agent_data/` unless `backend` names a store."""
    where: Where = "json:agent_data" if backend is None else backend
    return TaskLedger(where, agent=str(prompt_id), session=f"{user_id}_{prompt_id}")


def register_ledger_for_session(session: str, task_ledger: TaskLedger) -> None:
    """Remember, in this process, which ledger mirrors a session of a host program."""
    _of_session[session] = task_ledger


def ledger_for_session(session: str) -> TaskLedger | None:
    """What was registered for it."""
    return _of_session.get(session)
