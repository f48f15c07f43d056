"""The guard on Redis (5 or newer, also Valkey), with redis-py.

What survives what depends on how the server is set up; this store can ask, but not decide:

- *killed process of a caller*: everything.
- *killed or restarted server*: with `appendonly yes` and `appendfsync always` everything that was
  answered; with `appendfsync everysec` (the server's default) up to a second of claims and ends; without
  AOF all since the last snapshot.  A server without AOF is warned about when it is opened.
- *fail-over to a replica*: what the replica had received.  Replication is asynchronous: ask for
  `replicas=1` (or `?replicas=1` in the URL), and each claim and each end waits (`WAIT`, one more round
  trip) until so many replicas have it; if they do not in five seconds, that is a `StoreError`.  `WAIT`
  makes a loss unlikely and does not rule it out: a replica that was not asked may be promoted.
- *full memory*: claims are refused, so nothing runs; ends, renewals and resets still go through.
- *eviction*: a server that has a `maxmemory` and another policy than `noeviction` may throw away what
  was done; it is refused, unless the URL says `?allow_eviction=1`.
- *an emptied server* (FLUSHALL, a restart without persistence): noticed by whoever had it open, and an
  error until the store is closed and opened again.
- *a caller's clock*: nothing depends on it; leases, ages and times go by the server's TIME.

`sync="claim"` waits for replicas at claims alone, `sync="off"` never.

Each operation is one run of one script, `redis.lua`, which says which keys there are.  All keys of a
namespace carry the hash tag `{namespace}`, so on a cluster they live on one node; the URL names that
node.  An operation whose reply was lost is sent again with its token and finds its own row.  A call
takes some 1.3 KB of the server's memory, and its arguments and result what they take.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, ClassVar, Literal, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis

import ledger
from ledger import Claim, Clock, Now, Op, Record, Run, StoreError, UsageError, Verdict
from ledger_stores.base import (
    NOTICE_SECONDS,
    READABLE,
    RETRY_SECONDS,
    Brief,
    ServerStore,
    Talk,
    without_password,
)
from ledger_stores.move import Entry, Side

T = TypeVar("T")
_SCHEMA_VERSION = 1
_CONNECT_SECONDS = 5.0
#: how much is read at once from a server's socket, and what a talk with it yields when it waits to send
_RECEIVED, WRITABLE = 65536, 2
#: how the server's replies begin
_BULK, _ARRAY, _ERROR, _NUMBER = b"$*-:"
#: how many calls are read, or forgotten, in one step
_PAGE, _FORGET = 50, 500
_TALLY = ("tool", "wf", "caller", "args", "ran", "raised", "error", "created", "touched")
#: what follows a run's number in the fields of its call, and in what the script shows of a run
_SHOWN = (b"row", b"key", b"args", b"matched", b"result", b"error", b"trace", b"blocked")
#: the connection is lost; the second kind says that another one would fare no better
_LOST = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError)
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
#: what the script answers when it wrote something that replicas should have
_WROTE = (
    b"granted",
    b"settled",
    b"late",
    b"released",
    b"resolved",
    b"reset",
    b"more",
    b"checked",
    b"stepped",
    b"committed",
)
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (redis.AuthenticationError, "see that user and password are right"),
    (redis.exceptions.AuthorizationError, "see that this account may use the server"),
    (redis.exceptions.NoPermissionError, "let this account run EVAL, EVALSHA and INFO on these keys"),
    (redis.OutOfMemoryError, "its memory is full; raise maxmemory or remove what is not needed"),
    (redis.ReadOnlyError, "it is a replica; name the primary"),
    (redis.BusyLoadingError, "it is still reading its data; wait"),
    (redis.exceptions.MovedError, "name the node of the cluster that holds these keys"),
    (redis.TimeoutError, "see that the server answers"),
    (redis.ConnectionError, "see that the server runs there and lets this account in"),
)


class RedisStore(ServerStore):
    """Calls in one Redis database; `namespace` is the hash tag that all keys begin with."""

    talks = 2
    #: the script that every operation runs
    source: ClassVar[str] = resources.files("ledger_stores").joinpath("redis.lua").read_text("utf-8")

    def __init__(
        self,
        url: str,
        *,
        namespace: str | None = None,
        sync: Literal["full", "claim", "off"] = "full",
        lock_seconds: float = 30.0,
        clock: Clock | None = None,
        replicas: int = 0,
    ) -> None:
        super().__init__(url, namespace=namespace, sync=sync, lock_seconds=lock_seconds, clock=clock)
        self.replicas = int(self._options.get("replicas", replicas))
        self._sha = _sha_of(self.source)
        self._prefix = f"{{{self.namespace}}}:"
        self._meta = f"{self._prefix}meta"
        self._warned = False

    def _understand(self, url: str) -> None:
        super()._understand(url)
        self._options, self._address = _own_options(url)

    def _begin(self) -> None:
        super()._begin()
        self._connections: _Connections | None = None
        self._listening: _Listener | None = None
        self._id = b""
        self.executor = self._new_executor()

    # -- connections --

    def _opened(self) -> _Connections:
        connections = self._connections
        if connections is None:
            with self._one_at_a_time():
                connections = self._connections or self._open()
                self._connections = connections
        return connections

    def _open(self) -> _Connections:
        """Look at the server and begin the ledger there; what refuses is an error at once."""
        first = self._connect(min(_CONNECT_SECONDS, self._patience))
        try:
            self._judge_server(first.use(_exchange_or_raise, [("INFO",)])[0])
            about = json.dumps(ledger._me()[1:])
            words = ("open", "", _SCHEMA_VERSION, os.urandom(8).hex(), ledger._me().id, about)
            [[version, self._id]] = first.use(_exchange_or_raise, [self._eval(*words)])
        except redis.RedisError as error:
            raise self._translated(error) from error
        finally:
            first.close()
        if int(version) > _SCHEMA_VERSION:
            raise StoreError(
                f"{self.address}: namespace {self.namespace} was written by a newer Ledger "
                f"(version {int(version)}, this one knows {_SCHEMA_VERSION}); nothing ran. Upgrade "
                "ledger-guard here"
            )
        return self._connect(self._patience)

    def _connect(self, seconds: float) -> _Connections:
        """Connections whose answers may take that long; none is made yet."""
        try:
            pool = redis.ConnectionPool.from_url(
                self._address,
                max_connections=1000,
                socket_timeout=seconds,
                socket_connect_timeout=min(_CONNECT_SECONDS, seconds),
                socket_keepalive=True,
                protocol=2,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.address} cannot be used: {error}") from None
        return _Connections(pool)

    def _judge_server(self, told: bytes) -> None:
        """Refuse a server that may evict keys; warn, once, of what a restart would lose."""
        info = dict(line.split(":", 1) for line in told.decode().splitlines() if ":" in line)
        where, policy = self.address, info.get("maxmemory_policy", "noeviction")
        evicts = policy != "noeviction"
        if evicts and info.get("maxmemory", "0") != "0" and self._options.get("allow_eviction") != "1":
            raise StoreError(
                f"{where}: maxmemory-policy is {policy}, so this server may throw away what was done, and it "
                "would be done again; nothing ran. Set maxmemory-policy noeviction, or accept the risk with "
                "?allow_eviction=1"
            )
        if self._warned:
            return
        self._warned = True
        if evicts:
            ledger._warn(
                f"{where}: maxmemory-policy is {policy}; calls would be lost once there is a maxmemory"
            )
        if info.get("aof_enabled") == "0":
            ledger._warn(
                f"{where}: this server keeps no append-only file, so a restart forgets what was done since "
                "its last snapshot, and it would be done again; set appendonly yes, and appendfsync always "
                "(everysec can lose a second)"
            )

    def _translated(self, error: Exception) -> StoreError:
        advice = next((words for kind, words in _ADVICE if isinstance(error, kind)), "see the server's log")
        what = str(error).strip() or type(error).__name__
        told = StoreError(f"{self.address}: {what}; {advice}")
        told.full = isinstance(error, redis.OutOfMemoryError)
        return told

    # -- one round trip --

    def _eval(self, *words: Any) -> tuple[Any, ...]:
        return ("EVAL", self.source, 1, self._meta, *words)

    def _evalsha(self, words: tuple[Any, ...]) -> tuple[Any, ...]:
        name, *rest = words
        return ("EVALSHA", self._sha, 1, self._meta, name, self._id, *rest)

    def _ask(self, *words: Any, replicas: int = 0) -> Any:
        """What the script answers to an operation: one round trip, and one more to wait for replicas.

        A connection that broke is replaced and the operation sent again: whatever is asked here
        may be asked twice.
        """
        reply, have = self._insist(self._run_script, words, replicas)
        return self._confirmed(reply, have, replicas)

    def _confirmed(self, reply: Any, have: int, replicas: int) -> Any:
        """A reply that means what was asked for, and that as many replicas have as should."""
        if reply == b"replaced":
            raise self._replaced()
        if isinstance(reply, list) and reply[:1] == [b"closed"]:
            raise self._closed(reply)
        if have < replicas:
            raise StoreError(
                f"{self.address}: {have} of {replicas} replicas have what was written; it "
                "stands on the primary and may be lost with it. See that the replicas run; to repeat the "
                "operation with its token is safe"
            )
        return reply

    def _replaced(self) -> StoreError:
        return StoreError(
            f"{self.address}: the ledger {self.namespace} is not the one that was opened: "
            "the server was emptied, or came back without its data; nothing ran. Restore the data, or "
            "close the store (or restart this program) to begin anew"
        )

    def _insist(self, perform: Callable[..., T], *values: Any) -> T:
        """Do it, again if the connection breaks; every error of the driver is a `StoreError`."""
        limit, pause = time.monotonic() + RETRY_SECONDS, 0.0
        while True:
            connections = self._opened()
            try:
                return connections.use(perform, *values)
            except _LOST as error:
                if isinstance(error, _REFUSED) or time.monotonic() > limit:
                    raise self._translated(error) from error
                time.sleep(pause)  # none at first: the server may have closed what was idle
                pause = 0.05
            except redis.RedisError as error:
                raise self._translated(error) from error

    def _run_script(self, connection: Any, words: tuple[Any, ...], replicas: int) -> tuple[Any, int]:
        """The script's reply, and how many replicas have what it wrote."""
        have = replicas
        reply = _answer(connection, self._evalsha(words))
        if isinstance(reply, redis.exceptions.NoScriptError):
            [reply] = self._replies(connection, [words])
        if isinstance(reply, Exception):
            raise reply
        if replicas and _kind_of(reply) in _WROTE:
            have = self._wait_for(connection, replicas)
        return reply, have

    def _wait_for(self, connection: Any, replicas: int) -> int:
        """How many replicas have what was written on this connection."""
        _send(connection, ("WAIT", replicas, int(min(_CONNECT_SECONDS, self._patience) * 900)))
        return int(connection.read_response())

    def _replies(self, connection: Any, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the script replies to several operations, none of which waits for another; errors stand in place."""
        found = _exchange(connection, [self._evalsha(words) for words in asked])
        for n, reply in enumerate(found):
            if isinstance(reply, redis.exceptions.NoScriptError):  # the server is new, or its scripts flushed
                name, *rest = asked[n]
                [found[n]] = _exchange(connection, [self._eval(name, self._id, *rest)])
        return found

    def _closed(self, reply: list[bytes]) -> StoreError:
        """The error for a ledger that is closed for a move."""
        return StoreError(f"{self.address}: {_text(reply[1])}")

    def _answer_all(self, connection: Any, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Operations, and reads (their first word is in capitals), in as few round trips as can be."""
        found: list[Any] = [None] * len(asked)
        for reads in (True, False):
            places = [n for n, words in enumerate(asked) if words[0].isupper() is reads]
            chosen = [asked[n] for n in places]
            ask = (
                functools.partial(_exchange, connection)
                if reads
                else functools.partial(self._replies, connection)
            )
            for n, reply in zip(places, ask(chosen) if chosen else (), strict=True):
                if isinstance(reply, redis.ReadOnlyError):  # another connection may fare better
                    raise reply
                found[n] = self._translated(reply) if isinstance(reply, Exception) else self._told(reply)
        return found

    def _told(self, reply: Any) -> Any:
        """What was replied, or the error that it means."""
        if reply == b"replaced":
            return self._replaced()
        return self._closed(reply) if isinstance(reply, list) and reply[:1] == [b"closed"] else reply

    def _look(self, *commands: tuple[Any, ...]) -> list[Any]:
        """What the server answers to these commands, none of which writes: one round trip."""
        return self._insist(_exchange_or_raise, commands)

    def run(self, source: str, name: str, *words: Any, replicas: int = 0) -> Any:
        """What another script answers that works on a key of this namespace: one round trip, one more for replicas.

        It is given the key `name`, the operation, the id of the ledger and the rest; it may be run twice, and answers
        `replaced` for another id.
        """
        reply, have = self._insist(self._run_other, source, f"{self._prefix}{name}", words, replicas)
        return self._confirmed(reply, have, replicas)

    def _run_other(
        self, connection: Any, source: str, key: str, words: tuple[Any, ...], replicas: int
    ) -> tuple[Any, int]:
        operation, *rest = words
        asked = (1, key, operation, self._id, *rest)
        [reply] = _exchange(connection, [("EVALSHA", _sha_of(source), *asked)])
        if isinstance(reply, redis.exceptions.NoScriptError):
            [reply] = _exchange(connection, [("EVAL", source, *asked)])
        if isinstance(reply, Exception):
            raise reply
        wrote = replicas and _kind_of(reply) in _WROTE
        return reply, self._wait_for(connection, replicas) if wrote else replicas

    # -- operations --

    def _apply(self, op: Op) -> Verdict:
        asked = self._question(op)
        waits = self.sync == "full" or (self.sync == "claim" and isinstance(op, Claim))
        return self._verdict(op, self._ask(*asked, replicas=self.replicas if waits else 0))

    async def transact_async(self, op: Op) -> Verdict:
        """`transact` without blocking the event loop, together with what other tasks ask at that moment."""
        if self.replicas or isinstance(op, ledger.Reset):  # these wait, and would hold up the others
            return await super().transact_async(op)
        return await self._transact_together(op)

    def _talk(self, connection: _Quiet, asked: list[tuple[Any, ...]]) -> Talk:
        sent = [words if words[0].isupper() else self._evalsha(words) for words in asked]
        replies = yield from connection.talk(_packed_all(sent), len(sent))
        return [self._told(reply) for reply in replies]

    def _read_out(self, connection: _Quiet, talk: Talk) -> list[Any]:
        return connection.read_out(talk, self._patience)

    def _ask_all(self, asked: list[tuple[Any, ...]]) -> list[Any]:
        return self._insist(self._answer_all, asked)

    def _ask_one(self, asked: tuple[Any, ...]) -> Any:
        [found] = self._ask_all([asked])
        if isinstance(found, Exception):
            raise found
        return found

    def _question(self, op: Op) -> tuple[Any, ...]:
        """The operation as the script takes it."""
        if isinstance(op, Claim):
            return (
                "claim", op.call, op.token, op.tool, op.wf, op.caller, op.max, _or_empty(op.ttl), op.lease,
                op.on_doubt, int(op.forced), *(op.not_done or ("", "")),
                *_given(key=op.key, args=op.args, matched=op.matched),
            )  # fmt: skip
        if isinstance(op, ledger.Settle):
            texts = _given(result=op.result, error=op.error, trace=op.trace)
            return ("settle", op.call, op.claim.token, op.status, *texts)
        if isinstance(op, ledger.Renew):
            return ("renew", op.call, op.claim.token, op.run, op.claim.lease)
        if isinstance(op, ledger.Release):
            return ("release", *op[:5], _or_empty(op.ttl), op.why)
        if isinstance(op, ledger.Resolve):
            result = () if op.result is None else (op.result,)
            return ("resolve", *op[:4], int(op.done), int(op.reconciled), op.why, *result)
        return ("reset", op.call, self._by_server(op.asked))

    def _verdict(self, op: Op, reply: bytes) -> Verdict:
        head, _, shown = reply.partition(b"\n")
        kind, anchor, *mine = head.decode().split(" ")
        row = _run_from(op.call, shown) if shown else None
        if not mine:
            return Verdict(kind, row, None, int(anchor))
        assert isinstance(op, Claim)  # noqa: S101 - only a claim is granted, and who asks knows the rest
        run, started = map(int, mine)
        made = op.first_row(started, -op.lease)
        return Verdict(kind, made if run == 1 else made._replace(run=run), row, int(anchor))

    def reset(self, wf: str | None, asked: int, *, force: bool = False, why: str = "") -> None:
        """Forget every call of a workflow (None: of all); up to 500 in one step, of more 500 in each.

        Raises `InProgress` while one runs, and then none is forgotten; a run that begins between two
        steps is spared.  `force` forgets what runs too, and it may then run beside itself.
        """
        self.flush()
        scope = ("all", "") if wf is None else ("wf", wf)
        asked, after = self._by_server(asked), b"0"
        while True:
            words = (*scope, asked, after, _FORGET, int(force), why or ("everything" if wf is None else ""))
            kind, *found = self._ask("reset_scope", *words, replicas=self.replicas)
            if kind == b"live":
                raise ledger._busy_reset(self.describe([_run_from(_text(found[0]), found[1])]))
            if kind == b"reset":
                return
            after = found[0]

    def _write_counts(self, sums: Sequence[ledger._Count]) -> None:
        items = [_or_empty(value) for item in sums for value in item]
        self._ask("count", self._writer, self._batch, *items)

    # -- looking --

    def rows(self, call: str) -> list[Run]:
        """All runs of a call, oldest first."""
        return _rows_from(call, self._look(("HGETALL", f"{self._prefix}call:{call}"))[0])

    def _reread(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        return _brief_from(self._insist(_answer_or_raise, self._brief_words(call, run)), run, owner)

    async def _reread_async(self, call: str, run: int, owner: str) -> Sequence[Brief]:
        found = await self._lane().ask(self._brief_words(call, run), lambda _: None, is_brief=True)
        return _brief_from(found, run, owner)

    def _brief_words(self, call: str, run: int) -> tuple[Any, ...]:
        return ("HMGET", f"{self._prefix}call:{call}", "head", f"{run}:row", f"{run}:result")

    def _exact_time(self) -> int:
        return int(self._ask("now"))

    def _now(self) -> Now:
        wall = self._exact_time()
        return Now(wall, self.clock.mono(), lambda run: run.lease <= wall)

    def _process(self, name: str) -> tuple[str, int] | None:
        found = self._look(("HGET", f"{self._prefix}processes", name))[0]
        return tuple(json.loads(found)[:2]) if found else None

    def look(self, call: str) -> Record | None:
        """The record of a call; None if it was never made."""
        rows = self.rows(call)
        if rows:
            return self.describe(rows)
        found = self._look(("HGETALL", f"{self._prefix}tally:{call}"))[0]
        return _tally_from(call, found) if found else None

    def calls(self, tool: str | None = None, wf: str | None = None) -> Iterator[tuple[Record, list[Run]]]:
        """Every call with its runs, oldest first, a page at a time."""
        for call, found in self._pages("calls", "call", wf):
            rows = _rows_from(call, found)
            if rows and ledger._is_named(rows[-1].tool, tool):
                yield self.describe(rows), rows
        for call, found in self._pages("tallies", "tally", wf):
            if found and ledger._is_named((record := _tally_from(call, found)).tool, tool):
                yield record, []

    def _pages(self, index: str, kind: str, wf: str | None) -> Iterator[tuple[str, list[bytes]]]:
        """The hashes of what a list names, in its order."""
        listed = f"{self._prefix}{index}" + ("" if wf is None else f":{wf}")
        after = b"0"
        page = ("+inf", "WITHSCORES", "LIMIT", 0, _PAGE)
        while found := self._look(("ZRANGEBYSCORE", listed, b"(" + after, *page))[0]:
            after = found[-1]
            calls = [_text(call) for call in found[::2]]
            hashes = self._look(*(("HGETALL", f"{self._prefix}{kind}:{call}") for call in calls))
            yield from zip(calls, hashes, strict=True)

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What happened after that sequence number, oldest first."""
        self.flush_for_reading()
        key = f"{self._prefix}events"
        while page := self._look(("XRANGE", key, f"{after + 1}-0", "+", "COUNT", 500))[0]:
            for number, fields in page:
                after = int(number.partition(b"-")[0])
                found = {_text(name): _text(value) for name, value in _pairs(fields)}
                event: dict[str, Any] = {**dict.fromkeys(Entry._fields), **found, "seq": after}
                event["run"] = None if event["run"] is None else int(event["run"])
                yield {**event, "at": ledger._iso(int(event["at"])), "n": int(event["n"])}

    def last_seq(self) -> int:
        """The number of the newest event, 0 if there is none."""
        newest = self._look(("XREVRANGE", f"{self._prefix}events", "+", "-", "COUNT", 1))[0]
        return int(newest[0][0].partition(b"-")[0]) if newest else 0

    def totals(self) -> ledger.Totals:
        """Per tool: actions, attempts, executed, blocked, failed, in_doubt, suspended, running."""
        self.flush_for_reading()
        sums: ledger.Totals = {}
        for tool, *found in self._ask("totals"):
            actions, claims, executed, blocked, *ends = map(int, found)
            counts = (actions, claims + blocked, executed, blocked, *ends)
            if actions:
                sums[_text(tool)] = dict(zip(ledger._TOTALS, counts, strict=True))
        return sums

    def last_errors(self) -> dict[str, str | None]:
        """By tool, the error of its newest call whose latest run failed."""
        found = self._ask("last_errors")
        return {_text(tool): _or_none(error) for tool, error in found}

    # -- duplicates that wait: PUBLISH wakes them, looking does where it does not arrive --

    def changed(self, calls: Sequence[str], seconds: float) -> list[str]:
        """Which of these calls have no live run any more; returns after so many seconds, or when told."""
        try:
            listener = self._listener()
            if found := self._ended(calls):  # the look after which nothing ends unheard
                return found
            self._hear(listener, set(calls), seconds)
        except redis.RedisError:  # who may not listen looks again
            self._drop_listener()
            self._doze(seconds)
        return self._ended(calls)

    def _hear(self, listener: _Listener, calls: set[str], seconds: float) -> None:
        """Return when one of these calls has ended: others are told of others' calls too."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0 and not self._watcher.has_news:
            if listener.told(min(left, NOTICE_SECONDS)) in calls:
                return

    def _ended(self, calls: Sequence[str]) -> list[str]:
        return [_text(call) for call in self._ask("ended", *calls)]

    def _listener(self) -> _Listener:
        if self._listening is None:
            self._listening = _Listener(self._connect(self._patience), f"{self._prefix}ended")
        return self._listening

    def _drop_listener(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()

    def check(self) -> dict[str, Any]:
        """Prove that the store can be read and written; raises `StoreError`."""
        self._ask("check", replicas=self.replicas)
        return {"store": self.address, "ok": True, "schema": _SCHEMA_VERSION, "sync": self.sync}

    def as_side(self) -> Side:
        """This store as one side of a move."""
        from ledger_stores.move_redis import RedisSide

        return RedisSide(self)

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


def _brief_from(found: Sequence[bytes | None], run: int, owner: str) -> Sequence[Brief]:
    head, row, result = found
    if head is None or row is None or not head.startswith(b"%d " % run):
        return ()
    told = json.loads(row)  # the owner says that this is the ledger that was opened, not one begun anew
    known = (told["status"], int(told.get("released", 0)), _or_none(result), run)
    return (known,) if told["owner"] == owner else ()


def _own_options(url: str) -> tuple[dict[str, str], str]:
    """What the URL asks of this store, and the URL without it, as the driver takes it."""
    parts = urlsplit(url)
    options = parse_qsl(parts.query)
    own = {name: value for name, value in options if name in ("replicas", "allow_eviction")}
    rest = urlencode([(name, value) for name, value in options if name not in own])
    if not own.get("replicas", "0").isdecimal():
        raise UsageError(f"replicas={own['replicas']} in {without_password(url)} is not a number of replicas")
    return own, urlunsplit(parts._replace(query=rest))


class _Connections:
    """Connections of one process, for any number of threads.

    The driver's pool makes and counts them; between two uses they wait here, because to give one
    back to the pool and get it again costs as much as half a round trip.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: deque[Any] = deque()
        self._is_closed = False

    def use(self, perform: Callable[..., T], *values: Any) -> T:
        """`perform(connection, …)`, which reads an answer for each command that it sends."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.get_connection()
        try:
            return perform(connection, *values)
        except redis.ResponseError as error:
            if isinstance(error, redis.ReadOnlyError):  # the address may mean another server by now
                connection.disconnect()
            raise
        except BaseException:
            connection.disconnect()  # an answer that was not read must not meet the next question
            raise
        finally:
            self._put(connection)

    def _put(self, connection: Any) -> None:
        self._idle.append(connection)
        if self._is_closed:
            self.close()

    def idle(self) -> _Quiet | None:
        """One that nobody uses and a loop can listen to, if there is one; it has to be given back."""
        with suppress(IndexError):
            connection = self._idle.pop()
            if (plug := _plug_of(connection)) is not None:
                return _Quiet(connection, plug)
            self._put(connection)
        return None

    def give(self, quiet: _Quiet) -> None:
        """Take one back; it is used again if all answers were read."""
        if not quiet.is_quiet:
            quiet.connection.disconnect()
        self._put(quiet.connection)

    def close(self) -> None:
        """Close those that are idle now, and those in use when they come back: the driver breaks if before."""
        self._is_closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().disconnect()


def _plug_of(connection: Any) -> socket.socket | None:
    """The socket of a connection; None if it is not connected, or speaks TLS, which a loop cannot listen to."""
    plug = getattr(connection, "_sock", None)
    return plug if type(plug) is socket.socket else None


class _Quiet:
    """A connection of the driver's that is used without its parser, which would wait for what is not there yet."""

    def __init__(self, connection: Any, plug: socket.socket) -> None:
        self.connection, self._plug = connection, plug
        #: all that was asked is answered
        self.is_quiet = True

    def fileno(self) -> int:
        """For an event loop."""
        return self._plug.fileno()

    def talk(self, packed: bytes, count: int) -> Talk:
        """Send commands; ends with so many replies."""
        self.is_quiet = False
        while packed := packed[self._plug.send(packed) :]:
            yield WRITABLE
        replies: list[Any] = []
        heard, place = bytearray(), 0
        while len(replies) < count:
            yield READABLE
            if not (words := self._plug.recv(_RECEIVED)):
                raise redis.ConnectionError("Connection closed by server.")
            heard += words
            place = _read_replies(heard, place, replies, count)
        self.is_quiet = True
        return replies

    def read_out(self, talk: Talk, seconds: float) -> list[Any]:
        """What the talk ends with, in a thread; the server may be silent for so long."""
        ready = None
        try:
            while True:
                ready = self._wait(talk.send(ready), seconds)
        except StopIteration as end:
            return cast("list[Any]", end.value)

    def _wait(self, what: int, seconds: float) -> int:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._plug, what)
            if not waiting.select(seconds):
                raise redis.TimeoutError("Timeout reading from socket")
        return what


def _read_replies(heard: bytearray, place: int, replies: list[Any], count: int) -> int:
    """Read what has come as a whole; where the rest begins."""
    while len(replies) < count and (found := _reply_at(heard, place)) is not None:
        reply, place = found
        replies.append(reply)
    return place


def _reply_at(heard: bytearray, place: int) -> tuple[Any, int] | None:
    """The reply that begins there and what comes after it; None if the server has not said all of it."""
    end = heard.find(b"\r\n", place)
    if end < 0:
        return None
    kind, head, place = heard[place], bytes(heard[place + 1 : end]), end + 2
    if kind == _BULK:
        end = place + int(head)
        if end < place:
            return None, place
        return (bytes(heard[place:end]), end + 2) if len(heard) >= end + 2 else None
    if kind == _ARRAY:
        return _replies_at(heard, place, int(head))
    if kind == _ERROR:
        raise redis.ResponseError(head.decode("utf-8", "replace"))
    return (int(head) if kind == _NUMBER else head), place


def _replies_at(heard: bytearray, place: int, count: int) -> tuple[Any, int] | None:
    replies: list[Any] = []
    for _ in range(count):
        found = _reply_at(heard, place)
        if found is None:
            return None
        reply, place = found
        replies.append(reply)
    return (None if count < 0 else replies), place


class _Listener:
    """A connection that hears which calls have ended."""

    def __init__(self, connections: _Connections, channel: str) -> None:
        self._connection = connections.use(self._subscribe, channel)

    def _subscribe(self, connection: Any, channel: str) -> Any:
        _exchange(connection, [("SUBSCRIBE", channel)])
        return connection

    def told(self, seconds: float) -> str | None:
        """A call that has ended; None if that long nobody said so."""
        return _text(self._connection.read_response()[2]) if self._connection.can_read(seconds) else None

    def close(self) -> None:
        """Hear no more."""
        self._connection.disconnect()


def _packed(words: Sequence[Any]) -> bytes:
    """Words as the server reads them; the driver's own packing takes longer than the server's work."""
    parts: list[str] = []
    for word in words:
        text = word if isinstance(word, str) else word.decode() if isinstance(word, bytes) else str(word)
        size = len(text if text.isascii() else text.encode("utf-8", "surrogatepass"))
        parts.append(f"${size}\r\n{text}\r\n")
    return "".join(parts).encode("utf-8", "surrogatepass")


def _send(connection: Any, *commands: Sequence[Any]) -> None:
    """Send commands at once."""
    connection.send_packed_command([_packed_all(commands)])


def _packed_all(commands: Sequence[Sequence[Any]]) -> bytes:
    return b"".join([b"*%d\r\n%s" % (len(words), _packed(words)) for words in commands])


def _exchange(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send all commands, then read all answers; an error of the server stands in the place of its answer."""
    _send(connection, *commands)
    found: list[Any] = []
    for _ in commands:
        try:
            found.append(connection.read_response())
        except redis.ResponseError as error:
            found.append(error)
    return found


def _answer(connection: Any, command: tuple[Any, ...]) -> Any:
    """The same of one command with a short answer, which the driver's parser takes longer to read.

    What kind of error it is the driver knows: it is asked again, as any command may be.
    """
    _send(connection, command)
    try:
        plug = _plug_of(connection)
        return connection.read_response() if plug is None else _read_one(plug)
    except redis.ResponseError:
        return _exchange(connection, [command])[0]


def _answer_or_raise(connection: Any, command: tuple[Any, ...]) -> Any:
    answer = _answer(connection, command)
    if isinstance(answer, redis.ResponseError):
        raise answer
    return answer


def _read_one(plug: socket.socket) -> Any:
    """The reply on a socket that waits as long as the driver told it to."""
    heard = bytearray()
    try:
        while (found := _reply_at(heard, 0)) is None:
            if not (words := plug.recv(_RECEIVED)):
                raise redis.ConnectionError("Connection closed by server.")
            heard += words
    except TimeoutError as error:
        raise redis.TimeoutError("Timeout reading from socket") from error
    except OSError as error:
        raise redis.ConnectionError(f"Error while reading from socket: {error}") from error
    return found[0]


def _exchange_or_raise(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The same; the first error is raised in the end."""
    found = _exchange(connection, commands)
    for answer in found:
        if isinstance(answer, redis.ResponseError):
            raise answer
    return found


def _kind_of(reply: Any) -> Any:
    return reply[0] if isinstance(reply, list) else reply.partition(b" ")[0].partition(b"\n")[0]


def _given(**texts: str | None) -> Iterator[str]:
    """Name and text of those that there are."""
    for name, text in texts.items():
        if text is not None:
            yield name
            yield text


@functools.lru_cache(8)
def _sha_of(source: str) -> str:
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogatepass")


def _or_none(value: bytes | None) -> str | None:
    return None if value is None else _text(value)


def _pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _run_from(call: str, shown: bytes) -> Run:
    """A run as the script shows it: its number and the lengths of its texts on a line, then these."""
    number, *sizes = map(int, shown[: (place := shown.index(b"\n"))].split(b" "))
    place += 1
    texts: list[bytes | None] = []
    for size in sizes:
        texts.append(None if size < 0 else shown[place : place + size])
        place += max(size, 0)
    return _run_of(call, number, texts)


def _run_of(call: str, number: int, texts: Sequence[bytes | None]) -> Run:
    row, key, args, matched, result, error, trace, blocked = texts
    told = json.loads(row or b"{}")
    ended, late_at = told.get("ended"), told.get("late_at")
    return Run(
        call, number, told["tool"], told["wf"], told["caller"], told["owner"], _or_none(key),
        _or_none(args), _or_none(matched), int(told["started"]), int(told["lease"]), 0, told["status"],
        _or_none(result), _or_none(error), _or_none(trace), ended and int(ended), told.get("closed_by"),
        int(told.get("released", 0)), int(told.get("forced", 0)), told.get("late"), late_at and int(late_at),
        int(blocked or 0),
    )  # fmt: skip


def _rows_from(call: str, flat: Sequence[bytes]) -> list[Run]:
    """All runs in the hash of a call, oldest first."""
    found = dict(_pairs(flat))
    runs = range(1, int(found.get(b"head", b"0").partition(b" ")[0]) + 1)
    texts = ((n, [found.get(b"%d:%s" % (n, name)) for name in _SHOWN]) for n in runs)
    return [
        _run_of(call, n, told) for n, told in texts if told[0]
    ]  # a pruned ledger that moved here has holes


def _tally_from(call: str, flat: Sequence[bytes]) -> Record:
    """The record of an unlimited tool's call from its hash."""
    found = dict(_pairs(flat))
    texts = {name: _or_none(found.get(name.encode())) for name in _TALLY}
    numbers = {name: int(texts[name] or 0) for name in ("ran", "raised", "created", "touched")}
    return ledger._record_of_tally((call, *({**texts, **numbers}[name] for name in _TALLY)))
