"""The guard on PostgreSQL (13 or newer), with psycopg 3.

Durable as the server's `synchronous_commit` makes it: `on`, the default of PostgreSQL and asked for by
`sync="full"`, survives a killed server and a power cut of it; a fail-over loses what the standby does
not have unless the server waits for it (`synchronous_standby_names`).  `sync="claim"` waits for the
claim alone, `sync="off"` for neither.  An account whose transactions are not READ COMMITTED is refused:
a claim that waited would decide on what was there before.

Each operation is one statement, one round trip, in a transaction of its own; nothing is kept in a
session, so a transaction pooler may stand between.  What tasks of an event loop ask at one moment is
one transaction and one round trip; if that fails or meets a lock, each gets one of its own.  Leases go
by the server's clock.  An operation whose reply was lost is sent again with its token and finds its own
row.
"""

from __future__ import annotations

import functools
import hashlib
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, Literal, NamedTuple, TypeVar, cast

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.generators import execute
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.rows import tuple_row
from psycopg.waiting import Wait

import ledger
from ledger import Clock, Op, Record, Run, StoreError, UsageError, Verdict
from ledger_stores.base import NOTICE_SECONDS, READABLE, RETRY_SECONDS, Brief, ServerStore, Talk, verdict_from
from ledger_stores.move import Entry, Side

T = TypeVar("T")
Row = tuple[Any, ...]
_SCHEMA_VERSION = 1
_COLUMNS = ", ".join(Run._fields)
#: how long one of several operations in a transaction may wait for a lock, before each gets one of its own
_ASIDE = "SELECT set_config('lock_timeout', '100ms', true)"
#: what a ledger that is closed for a move answers; the message says why
MOVED = "LM001"
_DEADLOCK = "40P01"
#: others were in the way of a transaction, which is done again: serialization, deadlock, uniqueness
_OVERTAKEN = ("40001", _DEADLOCK, "23505")
_TRIES = 10
#: so many statements of a transaction wait for a question to go with
_UNSENT = 500
#: how long a batch of counts may be repeated after it was written, and how often a writer removes older ones
_REPEATED_MICROS, _SWEEP_SECONDS = 7 * 86_400_000_000, 86_400.0


class PostgresStore(ServerStore):
    """Calls in one schema of a PostgreSQL database; `namespace` is the schema's name."""

    speaks_sql = True
    namespace_does = "name a PostgreSQL schema"

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        sync: Literal["full", "claim", "off"] = "full",
        connections: int = 16,
        lock_seconds: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self.connections = connections
        super().__init__(url, namespace=namespace, sync=sync, lock_seconds=lock_seconds, clock=clock)

    def _begin(self) -> None:
        super()._begin()
        self._connections: _Connections | None = None
        self._prepares = True
        self._is_lax = False  # the account's own setting waits for no disk
        self.executor = self._new_executor()
        self._listening: _Connection | None = None
        self._sweeps_at = 0.0

    # -- connections --

    def _opened(self) -> _Connections:
        connections = self._connections
        if connections is None:
            with self._one_at_a_time():
                connections = self._connections or self._open()
                self._connections = connections
        return connections

    def _open(self) -> _Connections:
        limit = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                with self._connect() as db:
                    self._prepare(db)
                break
            except psycopg.Error as error:  # who refuses is told at once; who is starting gets a moment
                if error.sqlstate is None or not _is_broken(error) or time.monotonic() > limit:
                    raise self._translated(error) from error
            time.sleep(0.05)
        return _Connections(self._connect, self.connections, self.lock_seconds)

    def _connect(self) -> _Connection:
        db = _Connection.connect(
            self.url,
            autocommit=True,
            connect_timeout=5,
            client_encoding="UTF8",
            prepare_threshold=None,  # what is asked often is prepared by name, see `_Statement`
            row_factory=tuple_row,
            keepalives_idle=10,  # a server that is gone without a word is noticed
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=int(self.lock_seconds * 1000),
        )
        db.answer_seconds = self._patience
        return db

    def _prepare_no_more(self) -> None:
        """Behind a transaction pooler a prepared statement is another session's: send whole ones from now on."""
        self._prepares = False

    def _prepare(self, db: psycopg.Connection[Any]) -> None:
        """Make the schema if it is not there, under a lock, whole or not at all; refuse a newer one."""
        ns = self.namespace
        if not self._is_made(db):
            with db.transaction():
                db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 1))", (f"ledger schema {ns}",))
                if not self._is_made(db):
                    db.execute(f"CREATE SCHEMA IF NOT EXISTS {ns}")
                    source = resources.files("ledger_stores").joinpath("postgres.sql").read_text("utf-8")
                    db.execute(source.replace(":ns", ns))
        row = db.execute(
            f"SELECT value, current_setting('transaction_isolation'), current_setting('synchronous_commit')"
            f" FROM {ns}.meta WHERE name = 'schema'"
        ).fetchone()
        if row and row[1] != "read committed":
            raise StoreError(
                f"{self.address}: transactions of this account are {row[1]}, in which a claim "
                "decides on what was there before it waited; nothing ran. ALTER ROLE … SET "
                "default_transaction_isolation = 'read committed'"
            )
        self._is_lax = bool(row and row[2] == "off")
        version = int(row[0]) if row else 0
        if version > _SCHEMA_VERSION:
            raise StoreError(
                f"{self.address}: schema {ns} was written by a newer Ledger (version {version}, "
                f"this one knows {_SCHEMA_VERSION}); nothing ran. Upgrade ledger-guard here"
            )
        self._renumber_restored(db)
        me = ledger._me()
        db.execute(
            f"INSERT INTO {ns}.processes VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING", tuple(me)
        )

    def _renumber_restored(self, db: psycopg.Connection[Any]) -> None:
        """Give events that were restored from another cluster numbers that come before this one's."""
        ns = self.namespace
        ahead = (
            "SELECT COALESCE(MAX(seq), 0) > pg_snapshot_xmax(pg_current_snapshot())::text::bigint * 4096"
            f" FROM {ns}.events"
        )
        if not self._says(db, ahead):
            return
        with db.transaction():
            db.execute(f"LOCK TABLE {ns}.events")
            if self._says(db, ahead):
                # in two steps, because a new number may be another's old one until that is changed too
                db.execute(
                    f"UPDATE {ns}.events AS e SET seq = -place FROM (SELECT seq, row_number() OVER (ORDER BY seq) AS place"
                    f" FROM {ns}.events) AS numbered WHERE e.seq = numbered.seq"
                )
                db.execute(f"UPDATE {ns}.events SET seq = -seq")

    def _says(self, db: psycopg.Connection[Any], question: str) -> bool:
        found = db.execute(question).fetchone()
        return bool(found and found[0])

    def _is_made(self, db: psycopg.Connection[Any]) -> bool:
        # the catalogue itself: to_regclass answers from a cache that may be older than the lock
        sql = (
            "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = 'meta'"
        )
        return db.execute(sql, (self.namespace,)).fetchone() is not None

    def _translated(self, error: Exception) -> StoreError:
        where = self.address
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, psycopg.Error) and error.sqlstate == MOVED:
            return StoreError(f"{where}: {error.diag.message_primary}")
        if isinstance(error, psycopg.OperationalError):
            advice = "see that the server runs there and lets this account in"
        else:
            advice = "see the server's log"
        told = StoreError(f"{where}: {what}; {advice}")
        told.full = getattr(error, "sqlstate", None) == "53100"
        told.refused = isinstance(error, psycopg.DataError)
        return told

    def _insist(self, perform: Callable[..., T], *values: Any) -> T:
        """Do it on a connection, again if that breaks; every error of the driver is a `StoreError`."""
        limit, pause = time.monotonic() + RETRY_SECONDS, 0.0
        while True:
            connections = self._opened()
            try:
                return connections.use(perform, *values)
            except queue.Empty:
                raise StoreError(
                    f"{self.address}: all {self.connections} connections were busy for "
                    f"{self.lock_seconds:g} s; nothing was asked. See that the server answers, or allow more "
                    "with connections=…"
                ) from None
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                if not _is_broken(error) or time.monotonic() > limit:
                    raise self._translated(error) from error
                connections.drop_idle()
                time.sleep(pause)  # none at first: the server may have closed what was idle
                pause = 0.05
            except (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement):
                self._prepare_no_more()
            except psycopg.Error as error:
                raise self._translated(error) from error
            except UnicodeEncodeError as error:
                told = StoreError(f"{self.address}: {error}; nothing was written")
                told.refused = True
                raise told from error

    def _ask(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """All rows of one statement: one round trip, in a transaction of its own.

        A connection that broke is replaced and the statement sent again: whatever is asked here
        may be asked twice.
        """
        return self._insist(_all_rows, sql.replace(":ns", self.namespace), values)

    def _ask_often(self, sql: str, *values: object) -> list[bytes | None]:
        """The first row of a statement of a few, `$1` for the first value, in the server's own words.

        The driver's cursors would cost a duplicate more than all the rest of it.
        """
        statement = _statement(sql, self.namespace)
        return self._insist(self._first_row, statement, values)

    def _first_row(
        self, db: _Connection, statement: _Statement, values: Sequence[object]
    ) -> list[bytes | None]:
        return db.first_row(statement, [_packed(v) for v in values], prepares=self._prepares)

    def _lasting(self, durable: object) -> str:
        """What ends a statement that waits for the server's disk, and one that does not; None: it writes nothing."""
        if durable is None or (durable and not self._is_lax):
            return ""
        return f", set_config('synchronous_commit', '{'on' if durable else 'off'}', true)"

    def _function(self, name: str, *values: Any, durable: bool = True) -> _Question:
        marks = ", ".join(f"${n + 1}" for n in range(len(values)))
        return _Question(f"SELECT :ns.{name}({marks})", values, durable)

    def _call(self, name: str, *values: Any) -> Verdict:
        """The verdict of one of the functions."""
        return verdict_from(json.loads(self._ask_one(self._function(name, *values))[0] or b""))

    # -- operations --

    def _apply(self, op: Op) -> Verdict:
        return self._verdict(op, self._ask_one(self._question(op)))

    def _question(self, op: Op) -> _Question:
        """The operation as the server takes it."""
        if isinstance(op, ledger.Claim):
            return _Question(_CLAIM, _claim_values(op), self.sync != "off")
        if isinstance(op, ledger.Settle):
            return _Question(_SETTLE, _settle_values(op), self.sync == "full")
        if isinstance(op, ledger.Renew):
            return self._function("renew", op.call, op.run, op.claim.token, op.claim.lease, durable=False)
        if isinstance(op, ledger.Release):
            return self._function("release", *op)
        if isinstance(op, ledger.Resolve):
            return self._function("resolve", *op)
        return self._function("reset_call", op.call, self._by_server(op.asked))

    def _verdict(self, op: Op, found: list[bytes | None]) -> Verdict:
        if isinstance(op, ledger.Claim):
            started, told = found[:2]
            if told is None:
                return Verdict("granted", op.first_row(int(started or 0), 0)._replace(mono=0))
            return verdict_from(json.loads(told), op)
        if isinstance(op, ledger.Settle) and found[0] is None:
            return Verdict("settled")
        return verdict_from(json.loads(found[0] or b""))

    # -- event loops: what tasks ask at one moment is one transaction --

    async def transact_async(self, op: Op) -> Verdict:
        """`transact` without blocking the event loop, in one transaction with what other tasks ask then."""
        if isinstance(op, ledger.Reset):  # it asks for the time first
            return await super().transact_async(op)
        return await self._transact_together(op)

    def _talk(self, connection: _Connection, asked: list[_Question]) -> Talk:
        """All in one transaction, in the order of calls, so that two of these never cross."""
        if len(asked) == 1:
            sent = [self._packed(asked[0], lasts=bool(asked[0].durable))]
            return (yield from connection.talk(sent, prepares=self._prepares))
        order = sorted(range(len(asked)), key=lambda n: str(asked[n].values[0]))
        lasts = any(question.durable for question in asked)
        sent = [self._packed(asked[n], lasts=lasts) for n in order]
        rows = yield from connection.talk(
            [_Asked(_statement(_ASIDE, self.namespace), []), *sent], prepares=self._prepares
        )
        return [row for _, row in sorted(zip(order, rows[1:], strict=True))]

    def _packed(self, question: _Question, *, lasts: bool) -> _Asked:
        sql = question.sql + self._lasting(None if question.durable is None else lasts)
        return _Asked(_statement(sql, self.namespace), [_packed(value) for value in question.values])

    def _read_out(self, connection: _Connection, talk: Talk) -> list[Any]:
        return connection.wait(cast("PQGen[list[Any]]", talk))

    def _ask_all(self, asked: list[_Question]) -> list[Any]:
        return self._insist(lambda db: self._read_out(db, self._talk(db, asked)))

    def _ask_one(self, question: _Question) -> list[bytes | None]:
        return self._ask_often(question.sql + self._lasting(question.durable), *question.values)

    def ask(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        """The rows of one statement in a transaction of its own, with `:name` for a value and `:ns` for the schema.

        It may be asked twice.
        """
        return self._insist(self._rows_of, _asked(sql, values, self.namespace))

    def _rows_of(self, db: _Connection, asked: _Asked) -> list[Row]:
        return _rows_in(db.answers([asked], prepares=self._prepares)[0])

    def submit(self, perform: Callable[[PostgresTransaction], T], *, durable: bool = True) -> T:
        """Call `perform` inside a transaction of its own; returns its answer after the commit.

        It may be called again on another connection: when others were in the way (deadlock, serialization,
        uniqueness) or the connection broke, and then with `again` if nobody knows whether the first COMMIT
        happened. It must only execute statements; whatever it raises rolls them back.
        """
        tries, again = 0, False

        def attempt(db: _Connection) -> T:
            nonlocal again
            work = PostgresTransaction(db, self, durable=durable, again=again)
            try:
                return work.do(perform)
            finally:
                again = work.again

        while True:
            try:
                return self._insist(attempt)
            except _Overtaken as error:
                tries += 1
                if tries == _TRIES:
                    raise self._translated(error.cause) from error

    def perform_on(self, connection: Any, op: Op) -> Verdict:
        """Apply one operation inside the transaction that is open on a user's connection."""
        if not isinstance(op, ledger.Settle):
            raise UsageError("only a settlement belongs into a user's transaction")
        with psycopg.RawCursor(connection, row_factory=tuple_row) as cursor:
            cursor.execute(_SETTLE.replace(":ns", self.namespace), [_clean(v) for v in _settle_values(op)])
            [told, *_] = cursor.fetchone() or (None,)
        return verdict_from(told) if told else Verdict("settled")

    def _write_counts(self, sums: Sequence[ledger._Count]) -> None:
        items = json.dumps([[_clean(v) for v in item] for item in sums])
        self._ask_one(self._function("count", self._writer, self._batch, items, durable=False))
        if (
            time.monotonic() >= self._sweeps_at
        ):  # with the first batch: no row comes without a look for old ones
            old = "DELETE FROM :ns.batches WHERE at < :ns.now_us() - %s RETURNING 1"
            self._ask(f"WITH old AS ({old}) SELECT COUNT(*) FROM old", (_REPEATED_MICROS,))
            self._sweeps_at = time.monotonic() + _SWEEP_SECONDS

    def reset(self, wf: str | None, asked: int, *, force: bool = False, why: str = "") -> None:
        """Forget every call of a workflow (None: of all) in one transaction.

        Raises `InProgress` while one runs; `force` forgets it too, and it may then run beside itself.
        """
        self.flush()
        verdict = self._call("reset_scope", wf, self._by_server(asked), force, why)
        if verdict.kind == "live" and verdict.row is not None:
            raise ledger._busy_reset(self.describe([verdict.row]))

    # -- looking --

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        found = self._ask(f"SELECT {_COLUMNS} FROM :ns.runs WHERE call = %s ORDER BY run", (call,))
        return [Run(*row) for row in found]

    def _reread(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        return _brief_from(self._ask_often(_STILL_DONE, call, run, owner), run)

    async def _reread_async(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        asked = _Question(_STILL_DONE, (call, run, owner), None)
        return _brief_from(await self._lane().ask(asked, lambda _: None), run)

    def _exact_time(self) -> int:
        """The server's clock, now."""
        return int(self._ask("SELECT :ns.now_us()")[0][0])

    def is_over(self, run: Run) -> bool:
        """Whether the lease of a RUNNING run has lapsed by the server's clock."""
        return self._exact_time() >= run.lease

    def _process(self, name: str) -> tuple[str, int] | None:
        found = self._ask("SELECT host, pid FROM :ns.processes WHERE id = %s", (name,))
        return (found[0][0], found[0][1]) if found else None

    def look(self, call: str) -> Record | None:
        """The record of a call; None if it was never made."""
        rows = self.rows(call)
        if rows:
            return self.describe(rows)
        tallies = self._ask("SELECT * FROM :ns.tallies WHERE call = %s", (call,))
        return ledger._record_of_tally(tallies[0]) if tallies else None

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first, a page at a time."""
        after = 0
        while page := self._ask(
            "SELECT id, call FROM :ns.runs r WHERE id > %s AND (%s::text IS NULL OR wf = %s) AND NOT EXISTS"
            " (SELECT 1 FROM :ns.runs e WHERE e.call = r.call AND e.run < r.run) ORDER BY id LIMIT 500",
            (after, wf, wf),
        ):
            after = page[-1][0]
            calls = [row[1] for row in page]
            found: dict[str, list[Run]] = {call: [] for call in calls}
            for row in self._ask(
                f"SELECT {_COLUMNS} FROM :ns.runs WHERE call = ANY(%s) ORDER BY call, run", (calls,)
            ):
                found[row[0]].append(Run(*row))
            for rows in found.values():
                if rows and ledger._is_named(rows[-1].tool, tool):
                    yield self.describe(rows), rows
        place = ""
        while tallies := self._ask(
            "SELECT * FROM :ns.tallies WHERE call > %s AND (%s::text IS NULL OR wf = %s) ORDER BY call LIMIT 500",
            (place, wf, wf),
        ):
            place = tallies[-1][0]
            for row in tallies:
                if ledger._is_named(row[1], tool):
                    yield ledger._record_of_tally(row), []

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number, oldest first; none is skipped that commits later."""
        self.flush_for_reading()
        sql = (
            f"SELECT {', '.join(Entry._fields)} FROM :ns.certain_events WHERE seq > %s ORDER BY seq LIMIT 500"
        )
        while page := self._ask(sql, (after,)):
            for row in page:
                yield {**dict(zip(Entry._fields, row, strict=True)), "at": ledger._iso(row[4])}
            after = page[-1][0]

    def last_seq(self) -> int:
        """The number of the newest event that is certain, 0 if there is none."""
        return int(self._ask("SELECT COALESCE(MAX(seq), 0) FROM :ns.certain_events")[0][0])

    def totals(self) -> ledger.Totals:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        self.flush_for_reading()
        found = self._ask(_TOTALS)
        return {row[0]: dict(zip(ledger._TOTALS, map(int, row[1:]), strict=True)) for row in found}

    def last_errors(self) -> dict[str, str | None]:
        """By tool, the error of its newest call whose latest run failed."""
        return dict(self._ask(_LAST_ERRORS))

    def browse(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """All rows of a query that writes nothing, in the SQL that SQLite and PostgreSQL have in common."""
        return self._ask(_in_our_words(sql), values)

    # -- duplicates that wait: NOTIFY wakes them, looking does where a pooler swallows it --

    def changed(self, calls: Sequence[str], seconds: float) -> list[str]:
        """Which of these calls have no live run any more; returns after so many seconds, or when notified."""
        if found := self._without_live_run(calls):
            return found
        try:
            listener = self._listener()
            self._ask(_ASK_TO_BE_TOLD, (sorted(calls),))
            if found := self._without_live_run(calls):  # it ended before anybody knew of us
                return found
            self._hear(listener, set(calls), seconds)
        except psycopg.Error:
            self._drop_listener()
            self._doze(seconds)
        return self._without_live_run(calls)

    def _hear(self, listener: _Connection, calls: set[str], seconds: float) -> None:
        """Return when one of these calls has ended: others are told of others' calls too."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0 and not self._watcher.has_news:
            if any(told.payload in calls for told in listener.notifies(timeout=min(left, NOTICE_SECONDS))):
                return

    def _without_live_run(self, calls: Sequence[str]) -> list[str]:
        return [row[0] for row in self._ask(_WITHOUT_LIVE_RUN, (list(calls),))]

    def _listener(self) -> _Connection:
        if self._listening is None or self._listening.closed:
            self._listening = self._connect()
            self._listening.execute(f"LISTEN {self.namespace}")
        return self._listening

    def _drop_listener(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()

    def check(self) -> dict[str, Any]:
        """Prove that the store can be read and written; raises `StoreError`."""
        self._ask(
            "INSERT INTO :ns.meta VALUES ('checked', :ns.now_us()::text) ON CONFLICT (name) DO UPDATE SET"
            " value = EXCLUDED.value RETURNING value"
        )
        return {"store": self.address, "ok": True, "schema": _SCHEMA_VERSION, "sync": self.sync}

    def as_side(self) -> Side:
        """This store as one side of a move."""
        from ledger_stores.move_postgres import PostgresSide

        return PostgresSide(self)

    def close(self) -> None:
        """Finish what is pending and close the connections; they open again when the store is used again."""
        super().close()
        with self._opening:
            connections, self._connections = self._connections, None
            executor, self.executor = self.executor, self._new_executor()
        executor.shutdown(wait=False)
        if connections is not None:
            connections.close()

    def _abandon(self) -> None:
        self._connections = self._listening = None


class _Overtaken(Exception):
    """The transaction was rolled back because of others; doing it again helps."""

    def __init__(self, cause: psycopg.Error) -> None:
        super().__init__(str(cause))
        self.cause = cause


class PostgresTransaction:
    """An open transaction, for what is given to `PostgresStore.submit`.

    A statement is SQL with `:name` for a value and `:ns` for the schema. What is told goes to the server with
    the next question, or with the COMMIT, in one round trip. Nothing outlives the transaction in the session.
    """

    def __init__(self, db: _Connection, store: PostgresStore, *, durable: bool, again: bool) -> None:
        #: whether an earlier try may have been committed: its reply was lost
        self.again = again
        self._db, self._store = db, store
        # a process that is paused in here holds its rows against all others: the server ends its transaction
        ends = f"set_config('idle_in_transaction_session_timeout', '{int(store.lock_seconds * 1000)}', true)"
        self._unsent: list[_Asked] = [
            _NOTHING_SENT,
            _asked(f"SELECT {ends}" + store._lasting(durable), {}, ""),
        ]
        self._has_begun = False

    def tell(self, sql: str, values: Mapping[str, Any]) -> None:
        """A statement whose answer is of no interest."""
        self._unsent.append(_asked(sql, values, self._store.namespace))
        if len(self._unsent) >= _UNSENT:
            self._send()

    def ask(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        """The rows of a statement."""
        return self.ask_all([(sql, values)])[0]

    def ask_all(self, questions: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[Row]]:
        """The rows of several statements, one after the other, in one round trip."""
        self._unsent += [_asked(sql, values, self._store.namespace) for sql, values in questions]
        return [_rows_in(found) for found in self._send()[-len(questions) :]]

    def script(self, text: str) -> None:
        """Statements without values, as a file holds them."""
        self._send()
        self._db.execute(text.replace(":ns", self._store.namespace))

    def do(self, perform: Callable[[PostgresTransaction], T]) -> T:
        """Perform and commit, or roll back."""
        try:
            answer = perform(self)
            self._commit()
        except psycopg.Error as error:
            self._roll_back()
            if error.sqlstate in _OVERTAKEN:
                raise _Overtaken(error) from error
            raise
        except BaseException:
            self._roll_back()
            raise
        return answer

    def _commit(self) -> None:
        if self._has_begun or len(self._unsent) > 2:
            self._unsent.append(_COMMIT)
            try:
                self._send()
            except psycopg.Error as error:
                self.again = self.again or (_is_broken(error) and error.sqlstate != _DEADLOCK)
                raise

    def _roll_back(self) -> None:
        # whatever is left open, `_give` closes with the connection
        if self._has_begun and self._db.pgconn.transaction_status in (
            TransactionStatus.INTRANS, TransactionStatus.INERROR,
        ):  # fmt: skip
            with suppress(psycopg.Error):
                self._db.answers([_ROLLBACK], prepares=False)

    def _send(self) -> list[Any]:
        unsent, self._unsent = self._unsent, []
        self._has_begun = True
        return self._db.answers(unsent, prepares=self._store._prepares)


class _Question(NamedTuple):
    """A statement of which the first row is wanted, and its values; the first of them is a call."""

    sql: str
    values: tuple[Any, ...]
    #: it waits for the server's disk; None: it writes nothing
    durable: bool | None


class _Statement(NamedTuple):
    """A statement that is asked often; its name says all that is in it, whoever prepared it."""

    name: bytes
    text: bytes


@functools.cache
def _statement(sql: str, namespace: str) -> _Statement:
    text = sql.replace(":ns", namespace).encode()
    return _Statement(b"ledger_" + hashlib.sha256(text).hexdigest()[:24].encode(), text)


class _Asked(NamedTuple):
    """A statement with its values."""

    statement: _Statement
    values: list[bytes | None]


@functools.lru_cache(1000)
def _in_dollars(sql: str, namespace: str) -> tuple[_Statement, tuple[str, ...]]:
    """A statement with `$1` for the first name that stands in it, and the names."""
    names: dict[str, int] = {}

    def numbered(found: re.Match[str]) -> str:
        return f"${names.setdefault(found[1], len(names) + 1)}"

    text = re.sub(r"(?<![:\w]):([a-z_]\w*)", numbered, sql.replace(":ns", namespace))
    return _statement(text, namespace), tuple(names)


def _asked(sql: str, values: Mapping[str, Any], namespace: str) -> _Asked:
    statement, names = _in_dollars(sql, namespace)
    return _Asked(statement, [_packed(values[name]) for name in names])


_NOTHING_SENT, _COMMIT, _ROLLBACK = (_asked(sql, {}, "") for sql in ("BEGIN", "COMMIT", "ROLLBACK"))
#: how the types that our tables have are read; all else is text
_READERS: dict[int, Callable[[bytes], Any]] = {16: b"t".__eq__, 20: int, 21: int, 23: int, 701: float}


def _rows_in(found: Any) -> list[Row]:
    readers = [_READERS.get(found.ftype(n), bytes.decode) for n in range(found.nfields)]
    return [
        tuple(
            None if (value := found.get_value(row, n)) is None else read(value)
            for n, read in enumerate(readers)
        )
        for row in range(found.ntuples)
    ]


class _Connection(psycopg.Connection[Row]):
    """A connection of the store's, with what was prepared on it.

    It is closed when an answer takes longer than it may, for which libpq would wait for ever.
    """

    answer_seconds = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._names: set[bytes] = set()

    def __del__(self, _warn: Any = None, /) -> None:
        """Without the driver's warning: it may end with the program, and a forked child's is the parent's."""

    def wait(self, gen: PQGen[RV], *args: Any, **settings: Any) -> RV:
        """What the driver waits in, whatever it waits for."""
        return super().wait(self._in_time(gen), *args, **settings)

    def _in_time(self, gen: PQGen[RV]) -> PQGen[RV]:
        limit = time.monotonic() + self.answer_seconds
        try:
            ready = yield next(gen)
            while ready or time.monotonic() < limit:
                ready = yield gen.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        self.close()
        raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} s")

    def first_row(
        self, statement: _Statement, values: Sequence[bytes | None], *, prepares: bool
    ) -> list[bytes | None]:
        """The first row that a statement gives, as text; an empty one if there is none."""
        name, text = statement
        if not prepares:
            self.pgconn.send_query_params(text, values)
        else:
            if name not in self._names:
                self.pgconn.send_prepare(name, text)
                self._answer()
                self._names.add(name)
            self.pgconn.send_query_prepared(name, values)
        found = self._answer()
        return _first_row(found)

    def talk(self, asked: Sequence[_Asked], *, prepares: bool) -> Talk:
        """The first row of each statement, when the transaction in which they all are is committed."""
        return [_first_row(found) for found in (yield from self._exchange(asked, prepares=prepares))]

    def answers(self, asked: Sequence[_Asked], *, prepares: bool) -> list[Any]:
        """The answers to several statements that are sent at once; raises the first error among them."""
        return self.wait(cast("PQGen[list[Any]]", self._exchange(asked, prepares=prepares)))

    def _exchange(self, asked: Sequence[_Asked], *, prepares: bool) -> Talk:
        try:
            self.pgconn.enter_pipeline_mode()
            made = [self._send(statement, values, prepares=prepares) for statement, values in asked]
            self.pgconn.pipeline_sync()
            while (
                self.pgconn.flush()
            ):  # what does not fit into the socket waits, and answers are read meanwhile
                if ((yield Wait.RW) or 0) & READABLE:
                    self.pgconn.consume_input()
            results = yield from self._until_committed()
            self.pgconn.exit_pipeline_mode()
        except Exception:
            self.close()  # nobody knows what it still has to say
            raise
        return self._results_of(made, results)

    def _results_of(self, made: list[bytes | None], results: list[Any]) -> list[Any]:
        """What each statement gave; those that were prepared stay prepared, also when one after them fails."""
        self._names.difference_update(name for name in made if name)
        found, left = [], iter(results)
        for name in made:
            if name and _succeeded(next(left)):
                self._names.add(name)
            found.append(_succeeded(next(left)))
        for result in left:  # the commit failed
            _succeeded(result)
        return found

    def _send(self, statement: _Statement, values: Sequence[bytes | None], *, prepares: bool) -> bytes | None:
        """Send one of several; the name that is prepared with it, if that is new."""
        name, text = statement
        if not prepares:
            self.pgconn.send_query_params(text, values)
            return None
        is_new = name not in self._names
        if is_new:
            self.pgconn.send_prepare(name, text)
            self._names.add(name)
        self.pgconn.send_query_prepared(name, values)
        return name if is_new else None

    def _until_committed(self) -> Generator[int, int | None, list[Any]]:
        found: list[Any] = []
        while True:
            while self.pgconn.is_busy():
                if (yield READABLE):
                    self.pgconn.consume_input()
            result = self.pgconn.get_result()
            if result is None:  # the end of one statement's results
                if self.pgconn.status != ConnStatus.OK:
                    raise psycopg.OperationalError("the connection was lost")
            elif result.status == ExecStatus.PIPELINE_SYNC:
                return found
            else:
                found.append(result)

    def _answer(self) -> Any:
        return _succeeded(self.wait(execute(self.pgconn))[-1])


def _all_rows(db: _Connection, text: str, values: Sequence[Any] | dict[str, Any]) -> list[Row]:
    return db.execute(text, values).fetchall()


class _Connections:
    """At most so many connections of one process, for any number of threads; each is one thread's at a time.

    psycopg_pool would do, but with 20 threads it takes longer than a read does.
    """

    def __init__(self, connect: Callable[[], _Connection], most: int, patience: float) -> None:
        self._connect = connect
        self._most = self._spare = most
        self._patience = patience
        self._lock = threading.RLock()
        self._idle: list[_Connection] = []
        #: threads in line for a connection, or for the right to make one (None)
        self._line: deque[queue.SimpleQueue[_Connection | None]] = deque()
        self._closed = False

    def use(self, perform: Callable[..., T], *values: Any) -> T:
        """`perform(connection, …)`; raises `queue.Empty` if none becomes free in time."""
        db = self._take()
        try:
            return perform(db, *values)
        finally:
            self.give(db)

    def idle(self) -> _Connection | None:
        """One that nobody uses, if there is one; it has to be given back."""
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _take(self) -> _Connection:
        failed = False
        while True:
            with self._lock:
                if self._idle:
                    return self._idle.pop()
                turn = None if self._spare and not failed else self._stand_in_line()
                self._spare -= turn is None
            db = self._wait(turn) if turn else None
            if db is not None:
                return db
            try:
                return self._connect()
            except BaseException as error:
                # the server may take no more of us: then share those that there are, if there are any
                shares = self.give(None) and isinstance(error, psycopg.OperationalError)
                if failed or not shares:
                    raise
                failed = True

    def _stand_in_line(self) -> queue.SimpleQueue[_Connection | None]:
        turn: queue.SimpleQueue[_Connection | None] = queue.SimpleQueue()
        self._line.append(turn)
        return turn

    def _wait(self, turn: queue.SimpleQueue[_Connection | None]) -> _Connection | None:
        try:
            return turn.get(timeout=self._patience)
        except BaseException:
            with self._lock:
                if turn in self._line:
                    self._line.remove(turn)
                else:  # it came at this very moment
                    self.give(turn.get())
            raise

    def give(self, db: _Connection | None) -> bool:
        """Take a connection back, or (None) the right to make one; whether others are in use."""
        if db is not None and (self._closed or db.pgconn.transaction_status != TransactionStatus.IDLE):
            db.close()  # an answer that was not read must not meet the next question
            db = None
        with self._lock:
            if self._line:
                self._line.popleft().put(db)
            elif db is None:
                self._spare += 1
            else:
                self._idle.append(db)
            return self._spare < self._most

    def drop_idle(self) -> None:
        """Close those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._spare += len(idle)
        for db in idle:
            db.close()

    def close(self) -> None:
        """Close all, those in use when they come back."""
        self._closed = True
        self.drop_idle()


def _succeeded(found: Any) -> Any:
    if found.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise psycopg.errors.error_from_result(found)
    return found


def _first_row(found: Any) -> list[bytes | None]:
    return [found.get_value(0, n) for n in range(found.nfields)] if found.ntuples else []


def _brief_from(found: list[bytes | None], run: int) -> Sequence[Brief]:
    return [("success", 0, found[0].decode() if found[0] is not None else None, run)] if found else []


def _claim_values(op: ledger.Claim) -> tuple[Any, ...]:
    return (
        op.call, op.token, op.tool, op.wf, op.caller, op.key, op.args, op.matched, op.max, op.ttl, op.lease,
        op.on_doubt, int(op.forced), *(op.not_done or (None, None)),
    )  # fmt: skip


def _settle_values(op: ledger.Settle) -> tuple[Any, ...]:
    return op.call, op.run, op.claim.token, op.status, op.result, op.error, op.trace


def _is_broken(error: Exception) -> bool:
    """Whether the connection is gone or the way was blocked, so that asking again helps."""
    state = getattr(error, "sqlstate", None)
    return state is None or state[:2] in ("08", "57") or state == _DEADLOCK


@functools.cache
def _in_our_words(sql: str) -> str:
    """SQL of the common kind as PostgreSQL and psycopg have it."""
    text = re.sub(r"INDEXED BY \w+", "", sql.replace("%", "%%"))
    text = re.sub(r"(?<![:\w]):([a-z_]+)", r"%(\1)s", text).replace("?", "%s").replace(" LIKE ", " ILIKE ")
    # events that are certain: none that commits later has a smaller number
    return re.sub(r"\b(FROM|JOIN) (runs|events|tallies|meta|processes)\b", _qualified, text)


def _qualified(found: re.Match[str]) -> str:
    table = {"events": "certain_events"}.get(found[2], found[2])
    return f"{found[1]} :ns.{table}"


def _packed(value: object) -> bytes | None:
    """A value as PostgreSQL reads it."""
    return None if value is None else str(_clean(value)).encode()


def _clean(value: Any) -> Any:
    """PostgreSQL's text holds no NUL; it is shown as its picture."""
    return value.replace("\0", "\u2400") if isinstance(value, str) else value


#: a first claim; anything else is judged by the function
_CLAIM = """
WITH made AS (
  INSERT INTO :ns.runs (call, run, tool, wf, caller, owner, key, args, matched, started, lease, forced)
  SELECT $1, 1, $3, $4, $5, $2, $6, $7, $8, now, now + $11, $13 FROM :ns.now_us() AS now
   WHERE NOT EXISTS (SELECT FROM :ns.runs WHERE call = $1)
  ON CONFLICT DO NOTHING
  RETURNING started),
noted AS (
  INSERT INTO :ns.events (seq, call, run, kind, at, tool, wf, caller)
  SELECT :ns.next_event(), $1, 1, 'claimed', started, $3, $4, $5 FROM made)
SELECT (SELECT started FROM made), CASE WHEN NOT EXISTS (SELECT FROM made) THEN
  :ns.claim($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) END"""
#: the end of a run that is open; if there is none, why
_SETTLE = """
WITH ended AS (
  UPDATE :ns.runs SET status = $4, ended = :ns.now_us(), closed_by = $3, result = $5, error = $6, trace = $7
   WHERE call = $1 AND run = $2 AND owner = $3 AND status = 'running'
  RETURNING ended, tool, wf, caller),
noted AS (
  INSERT INTO :ns.events (seq, call, run, kind, at, tool, wf, caller, detail)
  SELECT :ns.next_event(), $1, $2, $4, ended, tool, wf, caller, $6 FROM ended)
SELECT CASE WHEN NOT EXISTS (SELECT FROM ended) THEN :ns.settle_late($1, $3, $4, $5, $6, $7) END,
       CASE WHEN EXISTS (SELECT FROM :ns.waiting WHERE call = $1) THEN :ns.wake($1) END"""
_STILL_DONE = """
SELECT result FROM (SELECT * FROM :ns.runs WHERE call = $1 ORDER BY run DESC LIMIT 1) AS newest
 WHERE run = $2 AND owner = $3 AND status = 'success' AND released = 0
"""
_TOTALS = """
SELECT tool, SUM(actions), SUM(attempts), SUM(executed), SUM(blocked), SUM(failed), SUM(in_doubt),
       SUM(suspended), SUM(running)
  FROM (
    SELECT tool, COUNT(DISTINCT call) AS actions, COUNT(*) + SUM(blocked) AS attempts,
           COUNT(*) FILTER (WHERE status = 'success' OR late = 'success') AS executed,
           SUM(blocked) AS blocked, 0 AS failed, 0 AS in_doubt, 0 AS suspended, 0 AS running
      FROM :ns.runs GROUP BY tool
    UNION ALL
    SELECT tool, 0, 0, 0, 0, (status = 'failed')::integer,
           (status = 'running' AND lease <= :ns.now_us()
            OR status = 'doubt' AND released = 0 AND late IS DISTINCT FROM 'success')::integer,
           (status = 'suspended')::integer, (status = 'running' AND lease > :ns.now_us())::integer
      FROM :ns.runs r
     WHERE status <> 'success' AND NOT EXISTS (SELECT 1 FROM :ns.runs l WHERE l.call = r.call AND l.run > r.run)
    UNION ALL
    SELECT tool, COUNT(*), SUM(ran + raised), SUM(ran), 0, 0, 0, 0, 0 FROM :ns.tallies GROUP BY tool) AS parts
 GROUP BY tool ORDER BY tool
"""
#: whoever settles one of these calls next sends a notification
_ASK_TO_BE_TOLD = "INSERT INTO :ns.waiting SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING RETURNING 1"
_WITHOUT_LIVE_RUN = """
SELECT c FROM unnest(%s::text[]) AS c WHERE NOT EXISTS (
  SELECT 1 FROM :ns.runs r WHERE r.call = c AND r.status = 'running' AND r.lease > :ns.now_us())
"""
_LAST_ERRORS = """
SELECT DISTINCT ON (tool) tool, error FROM :ns.runs r
 WHERE status = 'failed' AND NOT EXISTS (SELECT 1 FROM :ns.runs l WHERE l.call = r.call AND l.run > r.run)
 ORDER BY tool, id DESC
"""
