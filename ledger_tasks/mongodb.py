"""Tasks beside the calls in a MongoDB database, through the guard store's own client.  Experimental, as that is.

Needs no transactions: all that has to be agreed on is one document, the head, which holds the newest commit whole.

    head   {n: 44, commit 44}     a commit: the head is replaced if it still is number 44, with that token
    log    … 41 42 43             what was the head before: copied here *before* the head is replaced
    rows   as of commit 40        one document each, brought forward some commits at a time by whoever finds them behind

    A   ── copy 43 into the log ── head 43 → 44 ──┐ killed here, A has committed: the head says so
    B                                             └── copy 44 ── head 44 → 45

So no commit is lost wherever its writer is killed, and a writer that slept for a week cannot put a commit in the place
of one that was removed from the log: the head has another number. A row carries the number of the commit that it is
from, and is only ever replaced by a later one. The log is cut below what the rows have.

MongoDB cannot refuse a hand that writes to its collections: nothing here changes or removes an event, and `verify()`,
which reads the documents anew, finds one that was changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import bson
from pymongo import ReplaceOne, ReturnDocument, errors
from pymongo.collection import Collection

from ledger import StoreError, UsageError
from ledger_stores.mongodb import MongoStore
from ledger_tasks.model import micros_of
from ledger_tasks.replica import Change, Entry, News, Place, ReplicaStore, SharedLog, Turn
from ledger_tasks.sql import SCHEMA_VERSION

Doc = dict[str, Any]
_HEAD: Final = "head"
#: bytes of a commit, which has to fit into a document of 16 MB
_MOST_BYTES: Final = 16_000_000
#: rows of a page
_PAGE: Final = 500
_DUPLICATE: Final = 11000


class MongoLog(SharedLog):
    """The log of one namespace."""

    #: how many commits of the log may be missing in the rows, and how many are kept beyond
    behind = 50
    most = 2_000

    def __init__(self, store: MongoStore) -> None:
        self._store = store
        #: the head as it was seen last
        self._head: Doc = {}

    def _in(self, name: str) -> Any:
        """A collection of the namespace, open to the end of a block: `tasks` has the head alone."""
        return self._store.collection(name)

    # -- the contract --

    def news(self, place: Place, turn: Turn | None = None) -> News:
        """One round trip, one more if there is more than one commit, and one more for a turn."""
        head = self._look(place)
        if head is None:
            return News(self._store.server_time(), None if place.number else [])
        now, wait = micros_of(head["now"]), 0
        if turn is not None:
            wait = self._wait_for_turn(head, turn, now)
        elif head["turn"]:
            wait = _left(head["turn"], now)
        return News(now, self._entries_after(place, head), wait)

    def commit(self, place: Place, entry: Entry, *, durable: bool) -> News | None:
        """Two round trips: what is the head goes into the log, then the commit is the head."""
        fields = self._fields_of(place, entry)
        if self._put(place, fields):
            self._head = {**self._head, **fields}
            if fields["n"] - self._head["rows"] >= self.behind:
                with suppress(StoreError):  # whoever comes next does it
                    self._bring_rows_forward()
            return None
        return self.news(place)

    def leave(self, token: str) -> None:
        """One round trip."""
        with self._in("tasks") as docs:
            # nobody took it meanwhile
            docs.update_one({"_id": _HEAD, "turn.token": token}, {"$set": {"turn": None}})

    def begin(self) -> Place:
        """What the rows have for certain."""
        head = self._look(Place())
        return Place(head["rows"], head["rows_token"]) if head else Place()

    def documents(self) -> Iterator[list[Change]]:
        """Page by page, each a question of its own."""
        after = ""
        while True:
            with self._in("tasks.rows") as docs:
                found = list(docs.find({"_id": {"$gt": after}}).sort("_id").limit(_PAGE))
            yield [Change(doc["table"], doc["key"], doc["row"]) for doc in found if doc["row"] is not None]
            if len(found) < _PAGE:
                return
            after = found[-1]["_id"]

    # -- the head --

    def _look(self, place: Place) -> Doc | None:
        """The head, with its commit if that is new at this place, and what time it is there."""
        what: Doc = dict.fromkeys(("schema", "n", "token", "before", "rows", "rows_token", "turn"), 1)
        # most who look are up to date, and a commit may be large
        commit = {"$cond": [{"$eq": ["$n", place.number]}, None, "$commit"]}
        with self._in("tasks") as docs:
            stages = [{"$match": {"_id": _HEAD}}, {"$project": {**what, "commit": commit, "now": "$$NOW"}}]
            head: Doc | None = next(iter(docs.aggregate(stages)), None)
        if head is None:
            return None
        if head["schema"] > SCHEMA_VERSION:
            raise StoreError(
                f"{self._store.address}: the tasks of {self._store.namespace} were written by a newer Ledger (schema "
                f"{head['schema']}, this one knows {SCHEMA_VERSION}); nothing was changed. Upgrade ledger-guard here"
            )
        if head["commit"] is None and (self._head.get("n"), self._head.get("token")) == tuple(place):
            head["commit"] = self._head["commit"]
        self._head = head
        return head

    def _wait_for_turn(self, head: Doc, turn: Turn, now: int) -> int:
        """Milliseconds for which it is another's turn; if it is nobody's it is ours."""
        seen = head["turn"]
        if seen and seen["token"] != turn.token and (left := _left(seen, now)):
            return left
        mine = {"token": turn.token, "till": now + turn.millis * 1000}
        with self._in("tasks") as docs:
            # nobody took it meanwhile
            docs.update_one({"_id": _HEAD, "turn": seen}, {"$set": {"turn": mine}})
        head["turn"] = mine
        return 0

    def _fields_of(self, place: Place, entry: Entry) -> Doc:
        """What becomes of the head; refuses a commit that no document holds, before anything is written."""
        commit = [[change.table, list(change.key), change.row] for change in entry.changes]
        fields = {
            "schema": SCHEMA_VERSION, "n": place.number + 1, "token": entry.token, "before": place.token, "commit": commit,
        }  # fmt: skip
        if (size := len(bson.encode(fields))) > _MOST_BYTES:
            raise UsageError(
                f"{self._store.address}: {size / 1e6:.1f} MB of tasks would change at once, and one document holds "
                f"{_MOST_BYTES / 1e6:g} MB; nothing was changed. Do it in parts"
            )
        return fields

    def _put(self, place: Place, fields: Doc) -> bool:
        """Whether it is the head now."""
        if not place.number:
            with self._in("tasks") as docs, suppress(errors.DuplicateKeyError):
                # there is no head: of two first commits the second finds this one
                docs.insert_one({"_id": _HEAD, **fields, "rows": 0, "rows_token": "", "turn": None})
                self._head = {"rows": 0, "rows_token": "", "turn": None}
                return True
            return False
        if not self._copy_head(place):
            return False
        mine = {"turn": None} if (self._head["turn"] or {}).get("token") == fields["token"] else {}
        with self._in("tasks") as docs:
            found = docs.find_one_and_update(
                # nobody committed since
                {"_id": _HEAD, "n": place.number, "token": place.token},
                {"$set": {**fields, **mine}},
                projection={"n": 1},
                return_document=ReturnDocument.AFTER,
            )
        self._head |= mine
        return found is not None

    def _copy_head(self, place: Place) -> bool:
        """Put the commit at that place, which is the head, into the log; False if it is the head no more."""
        if not self._head.get("commit") or self._head["n"] != place.number:
            self._look(Place())
        head = self._head
        if (head["n"], head["token"]) != place:
            return False
        entry = {"_id": head["n"], **{name: head[name] for name in ("token", "before", "commit")}}
        with self._in("tasks.log") as log, suppress(errors.DuplicateKeyError):
            # others put the same there
            log.replace_one({"_id": head["n"]}, entry, upsert=True)
        return True

    # -- the log --

    def _entries_after(self, place: Place, head: Doc) -> list[Entry] | None:
        """What was committed after that place; None if some of it is gone, or the place is of another history."""
        if head["n"] <= place.number:
            return [] if tuple(place) == (head["n"], head["token"]) else None
        found = self._logged(place.number, head["n"]) if head["n"] > place.number + 1 else []
        told = [*found, {"_id": head["n"], **head}]
        before = place.token
        for number, doc in enumerate(told, place.number + 1):
            if (doc["n"] if doc is told[-1] else doc["_id"]) != number or doc["before"] != before:
                return None
            before = doc["token"]
        return [_entry_in(doc) for doc in told] if len(told) == head["n"] - place.number else None

    def _logged(self, after: int, before: int) -> list[Doc]:
        with self._in("tasks.log") as log:
            return list(log.find({"_id": {"$gt": after, "$lt": before}}).sort("_id"))

    # -- the rows --

    def _bring_rows_forward(self) -> None:
        """Write what the log says into the rows, say so, and cut the log."""
        head = self._head
        entries = self._entries_after(Place(head["rows"], head["rows_token"]), head)
        if entries is None:
            return  # somebody else has done it
        rows = {
            f"{table}:{json.dumps(key)}": (number, table, key, row)
            for number, entry in enumerate(entries, head["rows"] + 1)
            for table, key, row in entry.changes
        }
        with self._in("tasks.rows") as docs:
            for start in range(0, len(rows), _PAGE):
                some = [_later(name, *row) for name, row in list(rows.items())[start : start + _PAGE]]
                _write(docs, some)
        with self._in("tasks") as docs:
            # all that are in the log up to here are in the rows, and nobody says less
            reached = {"rows": head["n"], "rows_token": head["token"]}
            docs.update_one({"_id": _HEAD, "rows": {"$lt": head["n"]}}, {"$set": reached})
        self._head |= reached
        with self._in("tasks.log") as log:
            log.delete_many({"_id": {"$lte": head["n"] - self.most}})


def _left(turn: Mapping[str, Any], now: int) -> int:
    """Milliseconds of a turn that are left."""
    return int(max(0, turn["till"] - now) + 999) // 1000


def _entry_in(doc: Mapping[str, Any]) -> Entry:
    return Entry(doc["token"], [Change(*change) for change in doc["commit"]])


def _later(name: str, number: int, table: str, key: Sequence[Any], row: Doc | None) -> ReplaceOne[Doc]:
    """Puts a row as it is after that commit, unless it is there as after a later one; what is gone leaves a mark."""
    doc: Doc = {"n": number, "table": table, "key": list(key), "row": row}
    return ReplaceOne({"_id": name, "n": {"$lt": number}}, doc, upsert=True)


def _write(docs: Collection[Doc], some: Sequence[ReplaceOne[Doc]]) -> None:
    """All of these; one that is refused as a duplicate is there as after a later commit."""
    try:
        docs.bulk_write(some, ordered=False)
    except errors.BulkWriteError as error:
        details = error.details or {}
        if details.get("writeConcernErrors") or any(
            found["code"] != _DUPLICATE for found in details.get("writeErrors", ())
        ):
            raise


class MongoTaskStore(ReplicaStore):
    """The tasks of one namespace of a MongoDB database."""

    def __init__(self, store: MongoStore, log: MongoLog | None = None) -> None:
        super().__init__(store, log or MongoLog(store))
