"""What the stores on servers share: counts are buffered, and a lost connection is told from a refusal."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import ledger
from ledger import Claim, Clock, Now, Op, Record, Run, Settle, Store, UsageError, Verdict

if TYPE_CHECKING:
    from ledger_stores.move import Side

#: how soon the one who looks for all that wait looks again, at first and in the end
_FIRST_LOOK, _LAST_LOOK = 0.02, 1.0
#: how soon whoever listens notices that somebody waits for another call
NOTICE_SECONDS = 0.1
#: how many counts are written at once
_COUNTS = 250
#: how many calls that succeeded a process remembers
_SUCCEEDED = 10_000
#: how many questions of event loops are asked at once, and how long their thread waits for another
_AT_ONCE, _IDLE_SECONDS = 64, 5.0
#: status, released, result and number of a run
Brief = tuple[str, int, str | None, int]


def without_password(url: str) -> str:
    """A URL that can be shown: without the password, and what is one in the query masked."""
    shown = re.sub(r"(?i)([?&][^=&]*pass[^=&]*=)[^&]*", r"\1****", url)
    scheme, mark, rest = shown.partition("://")
    who, at, place = rest.rpartition("@")  # the last one: a password may hold others that were not encoded
    user = who.partition(":")[0]
    return f"{scheme}{mark}{user}{at if user else ''}{place}"


def _refuse_unclear(url: str) -> None:
    """A driver cuts such a URL at another place and shows pieces of the password in its error."""
    who = url.partition("://")[2].rpartition("@")[0]
    if re.search("%(?![0-9A-Fa-f]{2})", url) or (":" in who and re.search(r"[/?#\[\]@]", who)):
        raise UsageError(
            f"{without_password(url)}: a character of the user, the password or the query cannot stand in a URL "
            "as it is; write it percent-encoded (@ as %40, / as %2F, % as %25)"
        )


class ServerStore(Store):
    """A store that does each operation in one step on a server, whose clock decides leases."""

    judges_in_claim = True
    #: `browse` takes the SQL that SQLite and PostgreSQL have in common
    speaks_sql = False
    #: each call keeps its newest events itself (`events_of`), and there is no log of all
    logs_by_call = False
    #: what a namespace does there
    namespace_does = "begin keys"

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        sync: Literal["full", "claim", "off"] = "full",
        lock_seconds: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(clock=clock)
        if namespace and not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", namespace):
            raise UsageError(
                f"namespace={namespace!r} cannot {self.namespace_does}: use small letters, digits and _"
            )
        self._understand(url)
        self.url = url
        self.namespace = namespace or "ledger"
        self.sync = sync
        self.lock_seconds = lock_seconds
        self._begin()

    def _understand(self, url: str) -> None:
        """Take from the URL what it says of this store; `UsageError` for one that cannot be meant."""
        _refuse_unclear(url)

    def _begin(self) -> None:
        """What a process starts with, and a forked child starts anew: connections are not inherited."""
        self._pid = os.getpid()
        self._opening = threading.RLock()
        self._failed = 0.0, ""
        self._counts = ledger._Counts()
        #: what waits to be written, and what is: a batch whose answer was lost is repeated as it is
        self._taken: list[ledger._Count] = []
        self._in_flight: list[ledger._Count] = []
        self._alone = False  # what is in flight is written one by one
        self._counting = threading.RLock()
        self._writer, self._batch = ledger.new_token(), 0
        self._watcher = _Watcher(self)
        #: calls that were seen to succeed, with the run that did and its owner
        self._succeeded: dict[str, tuple[int, str]] = {}
        self._offset = 0.0
        self._offset_at = 0.0
        self._holders: dict[str, str | None] = {}

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Only one opens; if it fails, those who waited behind it fail too, and do not try one after the other."""
        asked = time.monotonic()
        with self._opening:
            failed_at, failure = self._failed
            if failed_at > asked:
                raise ledger.StoreError(failure)
            try:
                yield
            except ledger.StoreError as error:
                self._failed = time.monotonic(), str(error)  # its traceback would keep this store alive
                raise

    # -- operations --

    def transact(self, op: Op) -> Verdict:
        """Apply one operation in one round trip; repeating it after an error is safe."""
        return self._noted(op, self._apply(op))

    def _apply(self, op: Op) -> Verdict:
        """Send the operation and read its verdict."""
        raise NotImplementedError

    # -- duplicates of what this process made or saw --

    def _noted(self, op: Op, verdict: Verdict) -> Verdict:
        if verdict.kind == "settled" and isinstance(op, Settle) and op.status == "success":
            self._remember(op.call, op.run, op.claim.token)
        elif verdict.kind == "done" and verdict.row is not None:
            self._remember(op.call, verdict.row.run, verdict.row.owner)
        return verdict

    def _remember(self, call: str, run: int, owner: str) -> None:
        if len(self._succeeded) >= _SUCCEEDED:
            self._succeeded.clear()
        self._succeeded[call] = run, owner

    def quick(self, call: str) -> Sequence[Brief]:
        """The run of a call that was seen to succeed, if it still answers a duplicate, by a plain read.

        Of other calls nothing: the claim itself tells a duplicate why it lost, in the same round trip.
        What is remembered only chooses the question, never the answer: the call may be reset elsewhere.
        """
        seen = self._succeeded.get(call)
        return self._judged(call, self._reread(call, *seen)) if seen else ()

    async def quick_async(self, call: str) -> Sequence[Brief]:
        """`quick` without blocking the event loop."""
        seen = self._succeeded.get(call)
        return self._judged(call, await self._reread_async(call, *seen)) if seen else ()

    def _judged(self, call: str, runs: Sequence[Brief]) -> Sequence[Brief]:
        if not runs or runs[-1][:2] != ("success", 0):
            self._succeeded.pop(call, None)
        return runs

    def _reread(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        """Status, released, result and number of the newest run; nothing if it is not that run of that owner."""
        raise NotImplementedError

    async def _reread_async(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        """`_reread` without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._reread, call, run, owner)

    @property
    def _patience(self) -> float:
        """How long one answer may take."""
        return max(1.0, self.lock_seconds)

    # -- counting: buffered --

    def count(self, kind: str, claim: Claim, run: int, error: str | None = None) -> None:
        """Count an attempt that ran nothing, or one of an unlimited tool; written within 200 ms."""
        self._counts.add(kind, claim, run, error)
        self.keeper.counted()

    def flush(self, patience: float = 5.0) -> None:
        """Write what was only counted so far; `StoreError` if the server does not take it."""
        if self._pid != os.getpid():
            return
        with self._counting:
            while self._has_batch():
                if self._alone or not self._write_together():
                    self._write_alone()

    def _has_batch(self) -> bool:
        """Whether there is something to write; it is in flight then, under a number of its own."""
        if not self._in_flight:  # else its reply was lost: the same again, under its number
            waiting = self._taken or self._counts.take()
            self._batch += 1
            self._in_flight, self._taken = waiting[:_COUNTS], waiting[_COUNTS:]
        return bool(self._in_flight)

    def _write_together(self) -> bool:
        """Write what is in flight as one batch; False if the server will never take it."""
        try:
            self._write_counts(self._in_flight)
        except ledger.StoreError as error:
            if not error.refused:
                raise
            return False
        self._in_flight = []
        return True

    def _write_alone(self) -> None:
        """Write what is in flight one by one, and give up what can never be written: it must not hold up the rest."""
        self._alone = True
        while self._in_flight:
            count = self._in_flight[0]
            try:
                self._write_counts([count])
            except ledger.StoreError as error:
                if not error.refused:
                    raise
                ledger._warn(
                    f"{count.n} attempt(s) at {ledger._short(count.tool)} (call {count.call}) are not counted: {error}"
                )
            self._in_flight = self._in_flight[1:]
            self._batch += 1
        self._alone = False

    def _write_counts(self, sums: Sequence[ledger._Count]) -> None:
        """Write batch number `_batch` of `_writer`, unless it is written already."""
        raise NotImplementedError

    def describe(self, rows: Sequence[Run], blocked: int | None = None) -> Record:
        """The record of a call from its runs, with what is counted here and not written yet."""
        call = rows[-1].call
        taken = (count.n for count in [*self._taken, *self._in_flight] if count.call == call)
        waiting = self._counts.of(call) + sum(taken)
        return super().describe(rows, sum(r.blocked for r in rows) + waiting if blocked is None else blocked)

    # -- duplicates that wait --

    def pause(self, waited: float) -> float:
        """Long: whoever waits is woken."""
        return 60.0

    def wait(self, call: str, seconds: float) -> None:
        """Return when that call has changed, at the latest after so many seconds."""
        bell = threading.Event()
        with self._watcher.watching(call, bell.set):
            bell.wait(seconds)

    async def wait_async(self, call: str, seconds: float) -> None:
        """`wait` without blocking the event loop."""
        loop = asyncio.get_running_loop()
        bell = asyncio.Event()
        with self._watcher.watching(call, lambda: ledger._call_loop(loop, bell.set)), suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), seconds)

    def changed(self, calls: Sequence[str], seconds: float) -> Iterable[str]:
        """Which of these calls have no live run any more; returns after so many seconds, or when woken.

        It also returns soon after somebody has begun to wait for another call (`_watcher.has_news`).
        """
        raise NotImplementedError

    def _drop_listener(self) -> None:
        """Hear no more: nobody waits, and what nobody reads would pile up on a server that tells."""

    def _doze(self, seconds: float) -> None:
        """Do nothing for so many seconds, or until somebody waits for another call."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0 and not self._watcher.has_news:
            time.sleep(min(left, NOTICE_SECONDS))

    def reset(self, wf: str | None, asked: int, *, force: bool = False, why: str = "") -> None:
        """Forget every call of a workflow (None: of all); raises `InProgress` while one runs, unless `force`."""
        raise NotImplementedError

    def now_for(self, rows: Sequence[Run]) -> Now:
        """The server's clock, for a decision on rows just read."""
        return self._now()

    def _by_server(self, asked: int) -> int:
        """A time of the caller's clock, as the server's clock says it."""
        return asked - self.clock.wall() + self._exact_time()

    def _exact_time(self) -> int:
        """The server's clock, now."""
        raise NotImplementedError

    def _server_time(self) -> int:
        """The server's clock, from a comparison with ours that is at most ten seconds old."""
        now = time.monotonic()
        if not self._offset_at or now - self._offset_at > 10:
            self._offset = self._exact_time() - time.monotonic() * 1e6
            self._offset_at = now
        return int(time.monotonic() * 1e6 + self._offset)

    def _now(self) -> Now:
        wall = self._server_time()
        return Now(wall, self.clock.mono(), lambda run: run.lease <= wall)

    def is_over(self, run: Run) -> bool:
        """Whether the lease of a RUNNING run has lapsed by the server's clock."""
        return run.lease <= self._server_time()

    # -- looking --

    def holder(self, run: Run) -> str:
        """Where the owner of a run lives, for people."""
        name = run.owner.partition(".")[0]
        if name not in self._holders:
            if len(self._holders) > 1000:
                self._holders.clear()
            found = self._process(name)
            self._holders[name] = f"pid {found[1]} on {found[0]}" if found else None
        return self._holders[name] or run.caller

    def _process(self, name: str) -> tuple[str, int] | None:
        """Host and pid of a process that opened this ledger."""
        raise NotImplementedError

    def last_seq(self) -> int:
        """The number of the newest event, 0 if there is none."""
        raise NotImplementedError

    def events_of(self, call: str) -> Iterator[dict[str, Any]]:
        """The events of one call, oldest first."""
        return (event for event in self.events() if event["call"] == call)

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return without_password(self.url)

    def browse(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """All rows of a query that writes nothing, in the SQL that SQLite and PostgreSQL have in common."""
        raise UsageError(f"{self.address}: this store cannot be looked at by SQL")

    def get(self, id: str) -> Record | None:
        """`look`, by its name in the six methods."""
        return self.look(id)

    def all(self, wf: str | None = None) -> Iterator[Record]:
        """The record of every call, or of those of one workflow, oldest first."""
        return (record for record, _ in self.calls(wf=wf))

    def clear(self, wf: str | None = None) -> None:
        """`reset`, by its name in the six methods."""
        self.reset(wf, self.clock.wall())

    def as_side(self) -> Side:
        """This store as one side of a move."""
        raise UsageError(f"{self.address}: a ledger cannot be moved to or from this kind of store")

    # -- fork --

    def close(self) -> None:
        """Finish what is pending, and let the thread that looks for waiters end."""
        super().close()
        self._watcher.rest()

    def _after_fork_in_child(self) -> None:
        self._abandon()
        self._begin()
        super()._after_fork_in_child()

    def _abandon(self) -> None:
        """Forget the parent's connections without a word to the server: they are the parent's."""
        raise NotImplementedError


class _Watcher:
    """One thread per process looks for all who wait, however many they are; it ends when nobody does."""

    def __init__(self, store: ServerStore) -> None:
        self._store = weakref.ref(store)
        self._lock = threading.Lock()
        self._bells: dict[str, list[Callable[[], object]]] = {}
        self._thread: threading.Thread | None = None
        #: a call is waited for that was not when `changed` was last asked
        self.has_news = False

    @contextmanager
    def watching(self, call: str, ring: Callable[[], object]) -> Iterator[None]:
        """Ring when the call has changed, until the end of the block."""
        with self._lock:
            self.has_news = self.has_news or call not in self._bells
            self._bells.setdefault(call, []).append(ring)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="ledger-watcher", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._bells[call].remove(ring)
                if not self._bells[call]:
                    del self._bells[call]

    def rest(self) -> None:
        """Until the thread has ended, if nobody waits: its last look must not open what is being closed."""
        with self._lock:
            thread = None if self._bells else self._thread
            self.has_news = True  # so that it looks at once, and sees that there is nobody
        if thread is not None:
            thread.join(2 * _LAST_LOOK)

    def _look(self) -> None:
        pause = _FIRST_LOOK
        while (store := self._store()) is not None:
            with self._lock:
                calls, self.has_news = list(self._bells), False
                if not calls:
                    store._drop_listener()
                    self._thread = None
                    return
            try:
                found = list(store.changed(calls, pause))
            except Exception:  # noqa: BLE001 - who waits looks for itself, and is told then
                found = calls
                time.sleep(pause)
            pause = _FIRST_LOOK if found else min(pause * 1.5, _LAST_LOOK)
            with self._lock:
                bells = [ring for call in found for ring in self._bells.get(call, ())]
            for ring in bells:
                ring()


class _Asked:
    """A question of a task, and what to do with an answer that nobody waits for any more."""

    __slots__ = ("answer", "future", "gone", "unwanted", "words")

    def __init__(
        self, words: tuple[Any, ...], future: asyncio.Future[Any], unwanted: Callable[[Any], object]
    ) -> None:
        self.words, self.future, self.unwanted = words, future, unwanted
        self.answer: Any = None
        self.gone = False

    def arrived(self, answer: Any) -> None:
        """In the thread: whichever of the two comes second sees both."""
        self.answer = answer
        self._see_to_it()

    def left(self) -> None:
        """In the loop: the task was cancelled."""
        self.gone = True
        self._see_to_it()

    def _see_to_it(self) -> None:
        if self.gone and self.answer is not None and not isinstance(self.answer, BaseException):
            try:
                self.unwanted(self.answer)
            except Exception as error:  # noqa: BLE001 - nobody waits for it, and others do for this thread
                ledger._warn(f"what a cancelled task left could not be given back: {error}", error=error)

    def tell(self) -> None:
        """In the loop, where futures live."""
        if self.future.done():
            return
        if isinstance(self.answer, BaseException):
            self.future.set_exception(self.answer)
        else:
            self.future.set_result(self.answer)


class Together:
    """What tasks of event loops ask at the same moment is asked together, by one thread, which ends when idle.

    A thread for each question costs more than the question.
    """

    def __init__(self, ask_all: Callable[[list[Any]], Sequence[Any]]) -> None:
        self._ask_all = ask_all
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def ask(self, words: tuple[Any, ...], unwanted: Callable[[Any], object]) -> Any:
        """The answer; `unwanted` gets it, in this thread or another, if the caller was cancelled meanwhile."""
        asked = _Asked(words, asyncio.get_running_loop().create_future(), unwanted)
        with self._lock:
            self._asked.put(asked)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="ledger-asker", daemon=True)
                thread.start()
                self._thread = thread
        try:
            return await asked.future
        except (asyncio.CancelledError, GeneratorExit):
            asked.left()
            raise

    def _work(self) -> None:
        while batch := self._batch():
            try:
                answers = self._ask_all([asked.words for asked in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
                answers = [error] * len(batch)
            loops: dict[asyncio.AbstractEventLoop, list[_Asked]] = {}
            for asked, answer in zip(batch, answers, strict=True):
                asked.arrived(answer)
                loops.setdefault(asked.future.get_loop(), []).append(asked)
            for loop, theirs in loops.items():
                ledger._call_loop(loop, functools.partial(_tell_all, theirs))

    def _batch(self) -> list[_Asked]:
        """What is asked now, after a while without a question nothing."""
        try:
            batch = [self._asked.get(timeout=_IDLE_SECONDS)]
        except queue.Empty:
            with self._lock:
                if self._asked.empty():
                    self._thread = None
                    return []
            batch = [self._asked.get()]
        while len(batch) < _AT_ONCE and not self._asked.empty():
            batch.append(self._asked.get())
        return batch


def _tell_all(asked: Sequence[_Asked]) -> None:
    for one in asked:
        one.tell()


def run_from(row: dict[str, Any]) -> Run:
    """The run in a row that a server gave as JSON."""
    return Run(**{name: row[name] for name in Run._fields})


def verdict_from(found: dict[str, Any], op: Op | None = None) -> Verdict:
    """The verdict that a server gave as JSON; of a claim that it granted only the number and the time."""
    row, closed = found.get("row"), found.get("closed")
    run = run_from(row) if row else None
    if found["kind"] == "granted" and isinstance(op, Claim):
        run = op.first_row(found["now"], 0)._replace(run=found["run"], mono=0)
    return Verdict(found["kind"], run, run_from(closed) if closed else None, found["anchor"])
