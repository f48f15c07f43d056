"""The guard on MongoDB (4.4 or newer, a replica set, be it of one server), with pymongo.  Experimental.

Experimental, because no live server has run it yet: its tests speak to a stand-in, and the commands are
compared with a written protocol (`tests/stores/test_mongodb.py`).  `LEDGER_TEST_MONGODB=mongodb://…` runs
the same suite on a real one.

What was answered is in the journals of a majority (`w: "majority", j: true`), and reads see only what a
majority has (`readConcern: "majority"`, from the primary), so:

    a killed caller          loses nothing; its run is in doubt when the lease lapses
    a server that restarts   loses nothing
    a fail-over              loses nothing; until there is a primary all operations wait, `lock_seconds` at
                             most, and fail then, and no tool runs
    a partition              a primary that was cut off confirms no claim
    a full disk              claims are refused and no tool runs; ends are tried until there is room
    a clock that is wrong    the caller's changes nothing; see below for the servers'

`sync="claim"` waits for the majority where a run begins or goes on, and elsewhere for the memory of one
server: when that ends an outcome may be forgotten, and the run is in doubt.  `sync="off"` waits for no
more than that at all: a claim may be forgotten, and its tool runs again.

Each operation is one `findAndModify` of one document.  The driver sends what had no answer once more
(`retryWrites`); whoever repeats an operation after an error finds what it wrote by its token.  So an
outcome that nobody knows (no answer, or a majority that did not confirm in time) is an error that is safe
to repeat.

*Leases go by the servers' clock*, `$$NOW` of the primary (of `mongos` on a sharded cluster), asked every
ten seconds and counted on from there by a clock that nobody steps.  What is taken for now is behind the
server's time by one way of an answer and a millisecond at most, and until the next look by up to 5 ms
more or less; a lease is judged that much too late or too early.  After a fail-over it is the time of the
former primary until the next look: leases must be longer than the servers' clocks are apart.

Duplicates that wait are found by polling with back-off, one poller per process however many wait.  Once
its pauses are long a change stream ends them early, where the server has one and the account may use it.
Texts that make a call larger than 1 MB lie in `<namespace>.texts`, written before the document that names
them.  No log of all events is kept: each call keeps the newest of its own.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from urllib.parse import unquote

import pymongo
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from pymongo import ReadPreference, ReturnDocument, errors
from pymongo.collection import Collection
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from ledger import Op, StoreError, UsageError, Verdict
from ledger_stores.documents import DocumentStore, Fields, boot_micros

#: documents of a list in one answer, and calls that one stream is asked for
_PAGE = 100
#: bytes of a long text in one document, which holds 16 MB
_PART = 8_000_000
#: how often an insert is asked again because another one of the same name came between
_UPSERTS = 10
_CONNECT_MILLIS = 5_000
#: pauses from which on a change stream is worth three more commands, and how long none is tried after one failed
_STREAM_SECONDS, _DEAF_SECONDS = 0.3, 60.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOST = r"(?:\[[^\]@/?]+\]|[^:,@/?\[\]]+)(?::\d+)?"
#: strict, so that a password that is not quoted is never taken for something that can be shown
_URL = re.compile(
    r"(?P<scheme>mongodb(?:\+srv)?)://(?:(?P<user>[^:@/?]*)(?P<password>:[^@/?]*)?@)?"
    rf"(?P<hosts>{_HOST}(?:,{_HOST})*)(?:/(?P<database>[^@/?]*))?(?:\?[^@]*)?"
)
#: what a list is sorted by, in all and of one workflow
_INDEXES = (("list", "first"), ("list", "scope", "first"))
_DISK_IS_FULL = 14031
#: code of an error → what to do
_ADVICE = {
    13: "let this account read and write this database and make indexes in it",
    18: "see that user and password are right, and authSource= names the database that knows the user",
    20: "see that it is a replica set (rs.initiate() makes one of a single server)",
    _DISK_IS_FULL: "make room on the server's disk",
    85: "the collection has other indexes of these names; name another namespace",
    86: "the collection has other indexes of these names; name another namespace",
    8000: "see that user and password are right and the cluster takes writes",
}
_REACH = "see that the servers run and can be reached from here"
_UNKNOWN = "what was asked may have been done all the same, and may safely be asked again"
#: class of an error → what happened, and what to do; the first that fits
_FAULTS: tuple[tuple[type[Exception], str, str], ...] = (
    (errors.ServerSelectionTimeoutError, "no primary answers within {:g} s", _REACH),
    (
        errors.WaitQueueTimeoutError,
        "no connection is free within {:g} s",
        "allow more with maxPoolSize= in the URL",
    ),
    (errors.NetworkTimeout, "no answer", f"{_REACH}; {_UNKNOWN}"),
    (errors.ConnectionFailure, "the connection was lost", f"{_REACH}; {_UNKNOWN}"),
    (
        errors.WriteConcernError,
        "no majority confirmed it",
        f"see that most servers of the set run; {_UNKNOWN}",
    ),
    (errors.ConfigurationError, "it cannot be used", "see that host names and options are right"),
)


@dataclass(eq=False, slots=True)
class _Opened:
    """A client, and the documents for writing what a run depends on, the rest, and long texts."""

    client: pymongo.MongoClient[dict[str, Any]]
    firm: Collection[dict[str, Any]]
    rest: Collection[dict[str, Any]]
    texts: Collection[dict[str, Any]]
    #: how many operations are under way on it
    uses: int = 0


class MongoStore(DocumentStore):
    """Calls in one collection of a MongoDB database; `namespace` is the collection's name."""

    #: of 16 MB, because a list reads a hundred documents at once
    room: ClassVar[int] = 1_000_000
    resolution: ClassVar[int] = 1_000

    namespace_does = "name a collection"

    def _understand(self, url: str) -> None:
        parts = _URL.fullmatch(url)
        if parts is None:  # not shown: whatever it is that is misplaced may be the password
            raise UsageError(
                f"{url.partition(':')[0]}://… is no URL of MongoDB; write mongodb://user:password@host:27017/"
                "database, with urllib.parse.quote_plus of a user or password that has : / ? # [ ] @ in it"
            )
        self._parts = parts.groupdict(default="")
        self._inherited: list[_Opened] = []

    def _begin(self) -> None:
        super()._begin()
        self._open_one: _Opened | None = None
        #: guards the counts of uses; what a thread uses for all commands of an operation; what is to be closed
        self._used = threading.Condition()
        self._mine = threading.local()
        self._left: list[_Opened] = []
        self._deaf_until = 0.0

    @property
    def address(self) -> str:
        """Where it is, for people: neither password nor options, which may hold secrets too."""
        user = f"{self._parts['user']}@" if self._parts["user"] else ""
        return f"{self._parts['scheme']}://{user}{self._parts['hosts']}/{self._database}"

    @property
    def _database(self) -> str:
        return unquote(self._parts["database"]) or "ledger"

    # -- connection --

    @contextmanager
    def _opened(self) -> Iterator[_Opened]:
        """What is open, and stays so until the end of the block; the driver's errors come out in our words."""
        outer: _Opened | None = getattr(self._mine, "opened", None)
        try:
            opened = outer or self._begin_use()
            self._mine.opened = opened
            try:
                yield opened
            finally:
                if outer is None:
                    self._mine.opened = None
                    self._end_use(opened)
        except (errors.PyMongoError, BSONError) as error:
            raise self._translated(error) from error

    def _begin_use(self) -> _Opened:
        while True:
            with self._used:
                if (opened := self._open_one) is not None:
                    opened.uses += 1
                    return opened
            with self._opening:
                self._open_one = self._open_one or self._open()

    def _end_use(self, opened: _Opened) -> None:
        with self._used:
            opened.uses -= 1
            if not opened.uses:
                self._used.notify_all()

    def _apply(self, op: Op) -> Verdict:
        with self._opened():  # a `close` beside it waits for all its commands
            return super()._apply(op)

    def _open(self) -> _Opened:
        """A client; it connects when it is first asked."""
        millis = int(self._patience * 1000)
        majority = WriteConcern("majority", wtimeout=millis, j=True)
        try:
            client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
                self.url,
                connect=False,  # not before it is asked
                appname="ledger-guard",
                serverSelectionTimeoutMS=millis,
                connectTimeoutMS=min(millis, _CONNECT_MILLIS),
                # longer than the server waits for a majority, which is an answer too
                socketTimeoutMS=millis + min(millis, _CONNECT_MILLIS),
                waitQueueTimeoutMS=millis,
            )
            # set for each collection, because options of the URL must not weaken them
            database = client.get_database(
                self._database,
                codec_options=CodecOptions(tz_aware=True),
                read_preference=ReadPreference.PRIMARY,
                read_concern=ReadConcern("majority" if self.sync == "full" else "local"),
                write_concern=WriteConcern(w=1) if self.sync == "off" else majority,
            )
        except (errors.ConfigurationError, errors.InvalidName, ValueError, TypeError) as error:
            raise UsageError(f"{self.address}: pymongo cannot use this URL: {error}") from error
        firm = database.get_collection(self.namespace)
        rest = firm if self.sync == "full" else firm.with_options(write_concern=WriteConcern(w=1))
        # a dot, which no namespace has, so that none is another's texts
        return _Opened(client, firm, rest, database.get_collection(f"{self.namespace}.texts"))

    @contextmanager
    def collection(self, name: str) -> Iterator[Collection[dict[str, Any]]]:
        """Another collection of this namespace, for what needs a majority; it is open to the end of the block."""
        self._look_up()
        with self._opened() as db:
            yield db.firm.database.get_collection(f"{self.namespace}.{name}")

    def server_time(self) -> int:
        """UTC microseconds of the server."""
        return self._server_time()

    def _translated(self, error: Exception) -> StoreError:
        """An error of the driver in our words; the server's own may quote arguments, and stay in the cause."""
        code = getattr(error, "code", None) or 0
        refused = "it was refused", _ADVICE.get(code, "see the cause of this error")
        what, advice = next((said for kind, *said in _FAULTS if isinstance(error, kind)), refused)
        details = getattr(error, "details", None) or {}
        name = " ".join(map(str, filter(None, (type(error).__name__, code, details.get("codeName")))))
        told = StoreError(f"{self.address}: {what.format(self._patience)} ({name}); {advice}")
        told.full = code == _DISK_IS_FULL
        told.refused = isinstance(error, (errors.DocumentTooLarge, BSONError))
        return told

    # -- documents --

    def _about(self, fields: Fields) -> Fields:
        found = self._look_about()
        if found is None:
            # indexes first: whoever finds the document need not make them, and one who died here is repeated
            with self._opened() as db:
                db.firm.create_indexes([pymongo.IndexModel([(key, 1) for key in keys]) for keys in _INDEXES])
            self._insert("ledger", fields)
            found = self._look_about()
        if found is None:
            raise StoreError(
                f"{self.address}: {self.namespace} is emptied by somebody; nothing ran. Try again"
            )
        return found

    def _look_about(self) -> Fields | None:
        """The ledger's own document, and by the way what time it is there."""
        asked = boot_micros()
        with self._opened() as db:
            answer = db.firm.aggregate(
                [
                    {"$match": {"_id": "ledger"}},
                    {"$project": {"schema": 1, "ledger": 1, "v": 1, "move": 1, "closed": 1, "now": "$$NOW"}},
                ]
            )
            found = next(answer, None)
        if found is not None:
            self._time.learn((found["now"] - _EPOCH) // timedelta(microseconds=1), asked, boot_micros())
        return found

    def _find(self, ids: Sequence[str]) -> dict[str, Fields]:
        with self._opened() as db:
            return {found["_id"]: found for found in db.firm.find({"_id": {"$in": list(ids)}})}

    def _is_there(self) -> bool:
        return bool(self._find(["ledger"]))

    def _insert(self, name: str, fields: Fields, scope: str = "") -> Fields:
        listing = self._listing(name, scope) if "first" in fields else {}
        for _ in range(_UPSERTS):
            # of two upserts at once one may be refused; the other is there when it is asked again
            with self._opened() as db, suppress(errors.DuplicateKeyError):
                # nobody made it: a first claim is granted, all others get what is there
                found = db.firm.find_one_and_update(
                    {"_id": name},
                    {"$setOnInsert": {**fields, **listing}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
                if found is not None:
                    return found
        raise StoreError(
            f"{self.address}: {name} is neither in {self.namespace} nor can it be put there; see that no other "
            "index of the collection is unique"
        )

    def _listing(self, name: str, scope: str) -> Fields:
        return {"list": name.partition(":")[0], "scope": scope}

    def _swap(self, name: str, version: str, fields: Fields) -> Fields | None:
        with self._opened() as db:
            # what leaves a run open is its claim or keeps it: as firm as that
            docs = db.firm if fields.get("status", "running") == "running" else db.rest
            # it is as it was read: no other claim, end, release or reset was written since
            found = docs.find_one_and_update(
                {"_id": name, "v": version},
                {"$set": fields},
                projection={"rows": 0, "log": 0},  # large, and as they were sent
                return_document=ReturnDocument.AFTER,
            )
        return self._find([name]).get(name) if found is None else {**found, **fields}

    def _set(self, name: str, fields: Fields) -> bool:
        with self._opened() as db:
            # counts belong to a document that is there, whatever became of it since
            return db.rest.update_one({"_id": name}, {"$set": fields}).matched_count > 0

    def _put_counts(self, name: str, fields: Fields) -> Fields | None:
        with self._opened() as db:
            # counts belong to a document that is there, whatever became of it since
            return db.rest.find_one_and_update(
                {"_id": name},
                {"$set": fields},
                projection={"rows": 0, "log": 0},  # all that may be large but the counts
                return_document=ReturnDocument.AFTER,
            )

    def _add_up(self, name: str, total: str, seen: int | None, n: int, gone: Sequence[str]) -> None:
        with self._opened() as db:
            # nobody else added up meanwhile: what is removed here is in no total yet (null: there is none)
            db.rest.update_one(
                {"_id": name, total: seen}, {"$set": {total: n}, "$unset": dict.fromkeys(gone, "")}
            )

    def _listed(self, kind: str, scope: str | None, after: str = "") -> Iterator[tuple[str, str]]:
        part = {"list": kind} if scope is None else {"list": kind, "scope": scope}
        while True:  # each page is a question of its own: nothing stays open on the server
            with self._opened() as db:
                page = list(
                    db.firm.find({**part, "first": {"$gt": after}}, ["first"]).sort("first").limit(_PAGE)
                )
            yield from ((found["first"], found["_id"]) for found in page)
            if len(page) < _PAGE:
                return
            after = page[-1]["first"]

    # -- duplicates that wait --

    def changed(self, calls: Sequence[str], seconds: float) -> Iterable[str]:
        """Which of these calls have no live run any more; returns after so many seconds, or when one ended."""
        if seconds < _STREAM_SECONDS or len(calls) > _PAGE or time.monotonic() < self._deaf_until:
            return super().changed(calls, seconds)
        try:
            return self._woken(calls, seconds)
        except StoreError:  # it has no streams, or not for us, or went away: looking finds out all the same
            self._deaf_until = time.monotonic() + _DEAF_SECONDS
            return super().changed(calls, seconds)

    def _woken(self, calls: Sequence[str], seconds: float) -> Iterable[str]:
        ended = {
            "documentKey._id": {"$in": [f"call:{call}" for call in calls]},
            "updateDescription.updatedFields.status": {"$exists": True},
        }
        with self._opened() as db:
            docs = db.firm.with_options(read_concern=ReadConcern("majority"))  # streams know no other
            pipeline: list[dict[str, Any]] = [{"$match": ended}, {"$project": {"_id": 1}}]
            # opened for this pause alone, so that none is left behind; before the look, so that no end is missed
            with docs.watch(pipeline, max_await_time_ms=int(seconds * 1000)) as stream:
                if found := self._without_live_run(calls):
                    return found
                stream.try_next()
        return self._without_live_run(calls)

    # -- long texts --

    def _keep_text(self, name: str, text: bytes) -> None:
        pieces = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        for n, piece in enumerate(pieces):
            with self._opened() as db:
                db.texts.insert_one({"_id": f"{name}:{n}", "parts": len(pieces), "data": piece})

    def _text(self, name: str) -> bytes | None:
        pieces: list[bytes] = []
        parts = 1
        while len(pieces) < parts:
            with self._opened() as db:
                found = db.texts.find_one({"_id": f"{name}:{len(pieces)}"})
            if found is None:
                return None
            parts = found["parts"]
            pieces.append(found["data"])
        return b"".join(pieces)

    def _drop_texts(self, names: Iterable[str]) -> None:
        for name in names:
            with self._opened() as db:
                first = db.texts.find_one({"_id": f"{name}:0"}, ["parts"])
                parts = [f"{name}:{n}" for n in range(first["parts"] if first else 0)]
                # the first one last: as long as it is there the others can be found
                for part in reversed(parts):
                    db.texts.delete_one({"_id": part})

    # -- the end --

    def close(self) -> None:
        """Wait for what is under way, `lock_seconds` at most, finish what is pending and close the connections."""
        super().close()
        limit = time.monotonic() + self._patience
        left, self._left = self._left, []
        for opened in left:
            with self._used:
                self._used.wait_for(lambda: not opened.uses, limit - time.monotonic())  # noqa: B023
            opened.client.close()

    def _disconnect(self) -> None:
        with self._used:
            opened, self._open_one = self._open_one, None
        if opened is not None:
            self._left.append(opened)  # whoever uses it may need what is locked here

    def _abandon(self) -> None:
        # kept, because a client that is let go complains that nobody closed it, and this one is the parent's
        self._inherited += [self._open_one] if self._open_one else []
