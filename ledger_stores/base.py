"""What the stores on servers share: counts are buffered, and a lost connection is told from a refusal."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
#: how many questions of an event loop are asked at once, and how long it waits itself for their answers
_AT_ONCE, _LOOP_SECONDS = 64, 0.25
#: how much of its time a loop works that asks in halves
_LEAST_WORK = 1 / 3
#: how long an operation is repeated after its connection was lost
RETRY_SECONDS = 5.0
#: what a talk with a server yields when it waits for the server, and what it is told when there is something to read
READABLE = 1
#: status, released, result and number of a run
Brief = tuple[str, int, str | None, int]
#: sends questions and ends with their answers; see `READABLE`
Talk = Generator[int, int | None, list[Any]]


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
    #: how many operations of event loops are in threads at once
    connections = 16
    #: how many talks with the server an event loop has at once, if that is faster
    talks = 1
    #: the connections that are open, or None
    _connections: Any

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
        self._lanes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Lane] = weakref.WeakKeyDictionary()
        self._making_lanes = threading.Lock()

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

    # -- event loops --

    async def _transact_together(self, op: Op) -> Verdict:
        """`transact` without blocking the event loop, together with what other tasks ask at that moment.

        A claim that is granted to a cancelled caller is given back.
        """

        def give_back(found: Any) -> None:
            verdict = self._verdict(op, found)
            if isinstance(op, Claim) and verdict.kind == "granted" and verdict.row is not None:
                self.keeper.keep(ledger._not_entered(op, verdict.row.run))

        return self._noted(op, self._verdict(op, await self._lane().ask(self._question(op), give_back)))

    def _question(self, op: Op) -> Any:
        """The operation as the server takes it."""
        raise NotImplementedError

    def _verdict(self, op: Op, found: Any) -> Verdict:
        """What the server's answer means."""
        raise NotImplementedError

    def _lane(self) -> Lane:
        """Where the tasks of the running loop ask together."""
        loop = asyncio.get_running_loop()
        return self._lanes.get(loop) or self._new_lane(loop)

    def _new_lane(self, loop: asyncio.AbstractEventLoop) -> Lane:
        with self._making_lanes:
            for other, lane in list(self._lanes.items()):
                if other.is_closed():  # in the midst, without a word to its tasks
                    lane.hand_over()
            made = self._lanes[loop] = Lane(self, loop)
        return made

    def _new_executor(self) -> ThreadPoolExecutor:
        """What an event loop leaves to threads; none is made before it is needed."""
        return ThreadPoolExecutor(self.connections, thread_name_prefix="ledger-async")

    def _talk(self, connection: Any, asked: list[Any]) -> Talk:
        """Ask so many questions on a connection."""
        raise NotImplementedError

    def _read_out(self, connection: Any, talk: Talk) -> list[Any]:
        """What such a talk ends with; in a thread."""
        raise NotImplementedError

    def _ask_all(self, asked: list[Any]) -> list[Any]:
        """The same from the beginning, on any connection; in a thread."""
        raise NotImplementedError

    def _ask_one(self, asked: Any) -> Any:
        """The answer to one question; in a thread, as often as it makes sense."""
        raise NotImplementedError

    def _translated(self, error: Exception) -> ledger.StoreError:
        """An error of the driver in our words."""
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


class Lane:
    """What tasks of one event loop ask at the same moment is asked together, by the loop itself.

    A thread for each question costs more than the question.  Threads see to what takes long, what fails
    and what cancelled tasks left, so a loop may end at any moment.
    """

    def __init__(self, store: ServerStore, loop: asyncio.AbstractEventLoop) -> None:
        self._store, self._loop = weakref.ref(store), weakref.ref(loop)
        self._pace = Pace(store.talks)
        self._waiting: list[_Asked] = []
        self._under_way: list[_UnderWay] = []
        #: for the next questions, if they come at once
        self._lines: list[_Line] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False

    async def ask(self, words: Any, unwanted: Callable[[Any], object], *, is_brief: bool = False) -> Any:
        """The answer; `unwanted` gets it, in whatever thread, if the caller was cancelled meanwhile.

        What is brief takes the server no time in which others could ask the next.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(words, loop.create_future(), unwanted)
        self._waiting.append(asked)
        if len(self._waiting) >= self._pace.enough and not is_brief:
            self._send()
        else:
            self._send_soon(loop)
        try:
            return await asked.future
        except (asyncio.CancelledError, GeneratorExit):
            if asked in self._waiting:
                self._waiting.remove(asked)
            else:
                asked.left()
                self.hand_over()
            raise

    def hand_over(self) -> None:
        """Let threads take the answers to what is under way: it takes long, or the loop may end before."""
        under_way, self._under_way = self._under_way, []
        for one in under_way:
            one.hand_over()
        self._send()

    def _send_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_due:  # not now: other tasks are about to ask too
            self._is_due = True
            loop.call_soon(self._send_due)

    def _send_due(self) -> None:
        self._is_due = False
        self._pace.all_asked()
        self._send()

    def _send(self) -> None:
        """Ask what is waiting; if nothing is, others may have the connections."""
        store, loop = self._store(), self._loop()
        if store is None or loop is None:
            return
        while self._waiting and len(self._under_way) < self._pace.talks and not loop.is_closed():
            asked = self._waiting[:_AT_ONCE]
            del self._waiting[:_AT_ONCE]
            line = self._lines.pop() if self._lines else _listen(store, loop, self._heard)
            under_way = _UnderWay(store, asked, line)
            self._under_way.append(under_way)
            self._go_on(under_way, None)
        if not self._under_way:
            while self._lines:
                self._lines.pop().release()
        elif self._timer is None:
            self._timer = loop.call_later(_LOOP_SECONDS, self._look_after)

    def _look_after(self) -> None:
        """One timer for many questions: what is under way now may have begun only a moment ago."""
        self._timer, loop = None, self._loop()
        if not self._under_way or loop is None:
            return
        left = self._under_way[0].begun + _LOOP_SECONDS - time.monotonic()
        if left <= 0:
            self.hand_over()
        else:
            self._timer = loop.call_later(left, self._look_after)

    def _go_on(self, under_way: _UnderWay, ready: int | None) -> None:
        waits = False
        try:
            waits = under_way.go_on(ready)
        finally:
            if not waits:
                self._end(under_way)

    def _end(self, under_way: _UnderWay) -> None:
        if under_way in self._under_way:
            self._under_way.remove(under_way)
        if under_way.line is not None:
            under_way.line.under_way = None
            self._lines.append(under_way.line)

    def _heard(self, line: _Line) -> None:
        """The server said something; if it was not asked, that the connection ends."""
        under_way = line.under_way
        if under_way is None:
            self._lines.remove(line)
            line.release()
            return
        self._go_on(under_way, READABLE)
        if under_way in self._under_way:
            return
        self._pace.answered(under_way.size, len(self._waiting) + sum(one.size for one in self._under_way))
        loop = self._loop()
        if loop is None:
            self._send()
        else:  # who was told may ask again at once
            self._send_soon(loop)


class Pace:
    """How much a loop asks at once: all that its tasks ask, or in two halves, by turns.

    While the server sees to one half, the loop sees to the other.  But what costs the same for one question as
    for many (the fsync of the server's disk, a turn on a crowded machine) is then paid twice; so a loop that
    works for little of its time asks all at once.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._most, self._clock, self._worked = most, clock, worked
        #: how many talks with the server there may be, and how many questions begin one without waiting for more
        self.talks, self.enough = 1, _AT_ONCE
        self._told = 0
        #: how much of its time the loop works, as it was at those readings of the clocks
        self._work, self._seen = 0.5, (clock(), worked())

    def answered(self, count: int, others: int) -> None:
        """So many tasks were told, and so many others wait for the server or to be sent."""
        seen = self._clock(), self._worked()
        period, work = (now - before for now, before in zip(seen, self._seen, strict=True))
        self._seen = seen
        if 0 <= work <= period > 0:  # another thread may run the loop by now
            self._work += (work / period - self._work) / 8
        self.talks = self._most if self._work > _LEAST_WORK else 1
        self._told += count
        self.enough = -(-(self._told + others) // self.talks)

    def all_asked(self) -> None:
        """All who were told had their turn."""
        self._told, self.enough = 0, _AT_ONCE


class _Line:
    """A connection that an event loop listens to."""

    __slots__ = ("connections", "db", "loop", "number", "under_way")

    def __init__(self, connections: Any, db: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.connections, self.db, self.loop = connections, db, loop
        self.number: int = db.fileno()
        #: what is asked on it
        self.under_way: _UnderWay | None = None

    def leave(self) -> None:
        """Listen no more."""
        with suppress(RuntimeError):  # the loop was closed
            self.loop.remove_reader(self.number)

    def release(self) -> None:
        """Give it back."""
        self.leave()
        self.connections.give(self.db)


def _listen(
    store: ServerStore, loop: asyncio.AbstractEventLoop, heard: Callable[[_Line], object]
) -> _Line | None:
    """A connection that was idle; None if there is none, or the loop cannot listen: then a thread has to ask."""
    connections = store._connections
    db = connections.idle() if connections is not None else None
    if db is None:
        return None
    try:
        line = _Line(connections, db, loop)
        loop.add_reader(line.number, heard, line)
    except Exception:  # noqa: BLE001 - Windows' loop has no readers, and what else is wrong the thread is told
        connections.give(db)
        return None
    return line


class _UnderWay:
    """Questions that were asked together. The loop takes the answers that come soon, a thread all others."""

    def __init__(self, store: ServerStore, asked: list[_Asked], line: _Line | None) -> None:
        self._store, self._asked = store, asked
        #: where the answers come, as long as the loop listens
        self.line = line
        self._loop = asked[0].future.get_loop()
        self.begun = time.monotonic()
        self._talk: Talk | None = None
        if line is not None:
            self._talk, line.under_way = store._talk(line.db, self._words()), self

    @property
    def size(self) -> int:
        """How many questions these are."""
        return len(self._asked)

    def _words(self) -> list[Any]:
        return [asked.words for asked in self._asked]

    def go_on(self, ready: int | None) -> bool:
        """As far as it goes without waiting; whether the loop has to wait for the server."""
        if self._talk is None:
            self._in_thread(self._ask_all)
            return False
        try:
            waits_for = self._talk.send(ready)
        except StopIteration as end:
            self._answer(end.value)
            _tell_all(self._asked)
            return False
        except BaseException as error:
            self._take_line().release()
            told = error if isinstance(error, Exception) else ledger.StoreError(f"interrupted by {error!r}")
            self._in_thread(functools.partial(self._failed, told))
            if told is not error:
                raise
            return False
        if waits_for != READABLE:  # more than the server takes at once
            self.hand_over()
        return waits_for == READABLE

    def hand_over(self) -> None:
        """Let a thread take the answers."""
        line = self._take_line()
        line.leave()
        self._in_thread(functools.partial(self._read_out, line))

    def _take_line(self) -> _Line:
        line, self.line = self.line, None
        assert line is not None  # noqa: S101 - whoever waits for the server has one
        return line

    def _in_thread(self, work: Callable[[], object]) -> None:
        try:
            self._store.executor.submit(work)
        except RuntimeError:  # the program ends: there are no more threads, and nobody who would wait for us
            work()

    # -- in a thread --

    def _ask_all(self) -> None:
        self._see_through(self._store._ask_all, self._words())

    def _read_out(self, line: _Line) -> None:
        try:
            self._see_through(self._store._read_out, line.db, self._talk)
        finally:
            line.connections.give(line.db)

    def _see_through(self, perform: Callable[..., list[Any]], *values: Any) -> None:
        try:
            answers = perform(*values)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            self._failed(error)
        else:
            self._answer(answers)
            ledger._call_loop(self._loop, functools.partial(_tell_all, self._asked))

    def _failed(self, error: Exception) -> None:
        """Ask each alone, so that the one that fails takes no other along; after a long wait nothing more."""
        if time.monotonic() - self.begun < RETRY_SECONDS:
            for asked in self._asked[1:]:
                self._in_thread(functools.partial(self._ask_alone, asked))
            self._ask_alone(self._asked[0])
        else:
            told = error if isinstance(error, ledger.StoreError) else self._store._translated(error)
            self._answer([told] * len(self._asked))
            ledger._call_loop(self._loop, functools.partial(_tell_all, self._asked))

    def _ask_alone(self, asked: _Asked) -> None:
        try:
            answer = self._store._ask_one(asked.words)
        except Exception as error:  # noqa: BLE001 - it belongs to the one who waits
            answer = error
        asked.arrived(answer)
        ledger._call_loop(self._loop, asked.tell)

    def _answer(self, answers: Sequence[Any]) -> None:
        for asked, answer in zip(self._asked, answers, strict=True):
            asked.arrived(answer)


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
