"""A stand-in for MongoDB on the wire: real pymongo talks to it, and what it was sent can be read.

It is not MongoDB.  It answers as the primary of a set of one, keeps its documents in mongomock, does one
command at a time, and stores nothing.  So it shows which commands are sent, that they fit together, and what
becomes of lost answers; it cannot show that MongoDB does what these commands ask for.
"""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import bson
import mongomock
import mongomock.filtering
import pytest
from bson.codec_options import CodecOptions

from ledger import Clock
from ledger_stores.base import without_password
from ledger_stores.mongodb import MongoStore
from tests.stores.servers import USED, fresh_namespace

Doc = dict[str, Any]
_HEAD = struct.Struct("<iiii")
_OP_REPLY, _OP_QUERY, _OP_MSG = 1, 2004, 2013
#: documents and bytes of a first answer, as the real one's
_BATCH, _BATCH_BYTES = 101, 16_000_000
_TALK = ("hello", "ismaster", "ping")
_AWARE: CodecOptions[Doc] = CodecOptions(tz_aware=True)


class StandIn:
    """A server on a free port of the loopback. All commands but those of a greeting are kept in `heard`."""

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        #: microseconds that $$NOW is made from
        self.clock = clock
        self.heard: list[Doc] = []
        #: name of a command → how often its next answers are lost, connection and all, after it was done
        self.loses: dict[str, int] = {}
        #: name of a command → what is answered, one after the other, instead of doing it
        self.refuses: dict[str, list[Doc]] = {}
        #: name of a command → what is answered besides after it was done
        self.adds: dict[str, Doc] = {}
        #: clear: nobody gets an answer
        self.answers = threading.Event()
        self.answers.set()
        self._data: mongomock.MongoClient[Doc] = mongomock.MongoClient(tz_aware=True)
        self._cursors: dict[int, list[list[Doc]]] = {}
        self._numbers = itertools.count(1)
        self._done: dict[Any, Doc] = {}
        #: of each cursor of a change stream how far it has read, and what it wants
        self._streams: dict[int, tuple[int, Doc]] = {}
        self._changes: list[Doc] = []
        self._one_by_one = threading.Condition()
        self._door = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._callers: set[socket.socket] = set()
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self.url = f"mongodb://{self.address}/shop"
        threading.Thread(target=self._listen, daemon=True).start()

    def documents(self, collection: str) -> Any:
        """A collection as mongomock has it, to look behind the store's back."""
        return self._data["shop"][collection]

    @contextmanager
    def recording(self) -> Iterator[list[Doc]]:
        """What is heard in a block."""
        heard: list[Doc] = []
        begun = len(self.heard)
        yield heard
        heard += self.heard[begun:]

    def close(self) -> None:
        """End it, whoever is connected."""
        self.answers.set()
        self._door.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for caller in list(self._callers):
            _shut(caller)

    # -- the wire --

    def _listen(self) -> None:
        with suppress(OSError):  # the door was closed
            while True:
                caller = self._door.accept()[0]
                caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._callers.add(caller)
                threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with suppress(OSError, EOFError):
            while True:
                size, number, _, kind = _HEAD.unpack(_read(caller, 16))
                command = _command_in(kind, _read(caller, size - 16))
                reply = self._answer(command)
                self.answers.wait()
                if reply is None:
                    break
                body = bson.encode(reply)
                if kind == _OP_QUERY:
                    body, kind = struct.pack("<iqii", 8, 0, 0, 1) + body, _OP_REPLY
                else:
                    body = struct.pack("<IB", 0, 0) + body
                caller.sendall(_HEAD.pack(16 + len(body), number + 1, number, kind) + body)
        self._callers.discard(caller)
        caller.close()

    def _answer(self, command: Doc) -> Doc | None:
        """What to say; None: nothing, and hang up."""
        name = next(iter(command))
        if name in _TALK:
            return self._hello() if name in _TALK[:2] else {"ok": 1}
        with self._one_by_one:
            self.heard.append(copy.deepcopy(command))  # mongomock changes what it is given
            reply = self.refuses[name].pop(0) if self.refuses.get(name) else self._do_once(name, command)
            if self.loses.get(name):
                self.loses[name] -= 1
                return None
            return {"ok": 1, **reply, **self.adds.get(name, {})}

    def _hello(self) -> Doc:
        return {
            "ok": 1, "helloOk": True, "ismaster": True, "isWritablePrimary": True, "setName": "one",
            "setVersion": 1, "hosts": [self.address], "me": self.address, "primary": self.address,
            "maxBsonObjectSize": 16 << 20, "maxMessageSizeBytes": 48_000_000, "maxWriteBatchSize": 100_000,
            "minWireVersion": 0, "maxWireVersion": 21, "logicalSessionTimeoutMinutes": 30,
        }  # fmt: skip

    # -- commands --

    def _do_once(self, name: str, command: Doc) -> Doc:
        """A write that comes again under its number is answered as the first time, and not done."""
        if "txnNumber" not in command:
            return self._do(name, command)
        key = bytes(command["lsid"]["id"]), command["txnNumber"]
        if key not in self._done:
            self._done[key] = self._do(name, command)
        return self._done[key]

    def _do(self, name: str, command: Doc) -> Doc:
        # an unknown command is answered as the real one does, and fails the test that sent it
        work = getattr(self, f"_do_{name}", None)
        if work is None:
            return {"ok": 0, "code": 59, "codeName": "CommandNotFound", "errmsg": f"no such command: {name}"}
        documents = self._data[command["$db"]][command[name]] if isinstance(command[name], str) else None
        found: Doc = work(documents, command)
        if "cursor" in found:
            found["cursor"]["ns"] = f"{command['$db']}.{command.get('collection', command[name])}"
        return found

    def _do_find(self, documents: Any, command: Doc) -> Doc:
        found = documents.find(command["filter"], command.get("projection"))
        if "sort" in command:
            found = found.sort(list(command["sort"].items()))
        found = found.limit(command.get("limit", 0))
        return self._first_of(list(found))

    def _do_aggregate(self, documents: Any, command: Doc) -> Doc:
        if "$changeStream" in command["pipeline"][0]:
            self._streams[number := next(self._numbers)] = (
                len(self._changes),
                command["pipeline"][1]["$match"],
            )
            # the driver wants to know from when on, to go on there should its connection break
            return _batch("firstBatch", [], number) | {"operationTime": bson.timestamp.Timestamp(1, 1)}
        now = datetime.fromtimestamp(self.clock() // 1000 / 1000, UTC)
        return self._first_of(list(documents.aggregate(_with_now(command["pipeline"], now))))

    def _first_of(self, found: list[Doc]) -> Doc:
        first, *rest = _pages(found) or [[]]
        if not rest:
            return _batch("firstBatch", first, 0)
        self._cursors[number := next(self._numbers)] = rest
        return _batch("firstBatch", first, number)

    def _do_getMore(self, _: Any, command: Doc) -> Doc:  # noqa: N802 - its name on the wire
        number = int(command["getMore"])
        if number in self._streams:
            return _batch("nextBatch", self._changes_for(number, command["maxTimeMS"] / 1000), number)
        page, *self._cursors[number] = self._cursors[number]
        return _batch("nextBatch", page, number if self._cursors[number] else 0)

    def _changes_for(self, number: int, seconds: float) -> list[Doc]:
        """What a stream waits for; nothing after so many seconds."""
        begun, wanted = self._streams[number]

        def found() -> list[Doc]:
            is_wanted: Callable[[Doc, Doc], bool] = mongomock.filtering.filter_applies
            return [change for change in self._changes[begun:] if is_wanted(wanted, change)]

        self._one_by_one.wait_for(found, seconds)  # lets other commands in
        told, self._streams[number] = found(), (len(self._changes), wanted)
        return [{"_id": change["_id"]} for change in told]

    def _do_killCursors(self, _: Any, command: Doc) -> Doc:  # noqa: N802 - its name on the wire
        return {"cursorsKilled": [number for number in command["cursors"] if self._streams.pop(number, None)]}

    def _do_findAndModify(self, documents: Any, command: Doc) -> Doc:  # noqa: N802 - its name on the wire
        before = documents.find_one(command["query"])
        found = documents.find_one_and_update(
            command["query"],
            command["update"],
            projection=command.get("fields"),
            upsert=command.get("upsert", False),
            return_document=command.get("new", False),
        )
        if before and "$set" in command["update"]:
            news = {
                name: value for name, value in command["update"]["$set"].items() if before.get(name) != value
            }
            self._changes.append(
                {
                    "_id": {"_data": f"{len(self._changes):08}"},
                    "documentKey": {"_id": before["_id"]},
                    "updateDescription": {"updatedFields": news},
                }
            )
            self._one_by_one.notify_all()
        return {"value": found}

    def _do_update(self, documents: Any, command: Doc) -> Doc:
        told: Doc = {"n": 0, "nModified": 0}
        for index, asked in enumerate(command["updates"]):
            assert not asked.get("multi")
            change = documents.update_one if next(iter(asked["u"])).startswith("$") else documents.replace_one
            try:
                done = change(asked["q"], asked["u"], upsert=asked.get("upsert", False))
            except mongomock.DuplicateKeyError as error:
                told.setdefault("writeErrors", []).append(_duplicate(index, error))
                continue
            told["n"] += done.matched_count or done.upserted_id is not None
            told["nModified"] += done.modified_count
            if done.upserted_id is not None:
                told.setdefault("upserted", []).append({"index": index, "_id": done.upserted_id})
        return told

    def _do_delete(self, documents: Any, command: Doc) -> Doc:
        [asked] = command["deletes"]
        delete = documents.delete_one if asked["limit"] else documents.delete_many
        return {"n": delete(asked["q"]).deleted_count}

    def _do_endSessions(self, _: Any, __: Doc) -> Doc:  # noqa: N802 - its name on the wire
        return {}

    def _do_insert(self, documents: Any, command: Doc) -> Doc:
        for index, document in enumerate(command["documents"]):
            try:
                documents.insert_one(document)
            except mongomock.DuplicateKeyError as error:
                return {"n": index, "writeErrors": [_duplicate(index, error)]}
        return {"n": len(command["documents"])}

    def _do_createIndexes(self, documents: Any, command: Doc) -> Doc:  # noqa: N802 - its name on the wire
        for index in command["indexes"]:
            documents.create_index(list(index["key"].items()), name=index["name"])
        return {}


def _duplicate(index: int, error: Exception) -> Doc:
    return {"index": index, "code": 11000, "errmsg": str(error)}


def _read(caller: socket.socket, size: int) -> bytes:
    words = bytearray()
    while len(words) < size:
        piece = caller.recv(min(size - len(words), 1 << 20))
        if not piece:
            raise EOFError
        words += piece
    return bytes(words)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _command_in(kind: int, body: bytes) -> Doc:
    """The command of a message, with the documents that it carries beside it put in their place."""
    if kind == _OP_QUERY:  # a greeting
        return bson.decode(body[body.index(b"\0", 4) + 9 :], _AWARE)
    assert kind == _OP_MSG
    command: Doc = {}
    beside: Doc = {}
    at = 4
    while at < len(body):
        section, at = body[at], at + 1
        size = struct.unpack_from("<i", body, at)[0]
        if section == 0:
            command = bson.decode(body[at : at + size], _AWARE)
        else:
            name_end = body.index(b"\0", at + 4)
            beside[body[at + 4 : name_end].decode()] = bson.decode_all(body[name_end + 1 : at + size], _AWARE)
        at += size
    return command | beside


def _pages(found: list[Doc]) -> list[list[Doc]]:
    """As many documents at a time as one answer holds."""
    pages: list[list[Doc]] = []
    room = 0
    for doc in found:
        room -= len(bson.encode(doc))
        if room < 0 or len(pages[-1]) == _BATCH:
            pages.append([])
            room = _BATCH_BYTES - len(bson.encode(doc))
        pages[-1].append(doc)
    return pages


def _batch(name: str, page: list[Doc], cursor: int) -> Doc:
    return {"cursor": {"id": bson.int64.Int64(cursor), name: page}}


def _with_now(value: Any, now: datetime) -> Any:
    """An expression with the time in the place of $$NOW, which mongomock does not know."""
    if isinstance(value, dict):
        return {name: _with_now(part, now) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_now(part, now) for part in value]
    return {"$literal": now} if value == "$$NOW" else value


@functools.cache
def stand_in() -> StandIn:
    """One for all tests that leave it as it is."""
    made = StandIn()
    USED.add(
        f"MongoDB as a stand-in with mongomock {version('mongomock')}, over pymongo {version('pymongo')}"
    )
    atexit.register(made.close)
    return made


def live_url() -> str:
    """The URL of a real MongoDB and of a database that is the tests' own; no server comes as a package."""
    if named := os.environ.get("LEDGER_TEST_MONGODB"):
        USED.add(f"MongoDB at {without_password(named)}")
        return named
    pytest.skip("no live MongoDB is named by LEDGER_TEST_MONGODB")


class ClockedMongo(MongoStore):
    """The store with a server that takes the time from the test's clock."""

    def _server_time(self) -> int:
        self._look_up()
        return self.clock.wall()


def open_mongo(url: str, clock: Clock | None = None) -> MongoStore:
    """An empty store; with a clock, its server's time is that clock's."""
    kind: Any = MongoStore if clock is None else ClockedMongo
    store: MongoStore = kind(url, namespace=fresh_namespace(), clock=clock)
    return store
