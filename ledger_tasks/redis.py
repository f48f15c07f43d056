"""Tasks beside the calls in the guard's Redis namespace, through the guard store's own connections.

A commit is one run of one script, `redis.lua`, which says which keys there are: documents and log are written together
or not at all. What survives what is as the guard's store has it: with `appendonly yes` and `appendfsync always` all that
was answered; it refuses a server that evicts keys, waits for `replicas=`, and goes by the server's TIME.

Redis cannot refuse a hand that writes to its keys: nothing here changes or removes an event, and `verify()`, which reads
the documents anew, finds one that was changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, ClassVar, Final

from ledger import StoreError
from ledger_stores.redis import RedisStore
from ledger_tasks.replica import GROWING, TABLES, Change, Entry, News, Place, ReplicaStore, SharedLog, Turn
from ledger_tasks.sql import SCHEMA_VERSION

_GROWING: Final = f" {' '.join(GROWING)} "


class RedisLog(SharedLog):
    """The log of one namespace."""

    #: the script that every operation runs
    source: ClassVar[str] = resources.files("ledger_tasks").joinpath("redis.lua").read_text("utf-8")
    #: how many commits the log has at most, and of how many bytes; whoever is further behind reads the documents
    most: ClassVar[int] = 10_000
    most_bytes: ClassVar[int] = 8_000_000
    #: documents of a page, about
    page: ClassVar[int] = 1000

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    def news(self, place: Place, turn: Turn | None = None) -> News:
        """One round trip."""
        return _news_in(self._ask("news", *place, *(turn or ("", 0))))

    def commit(self, place: Place, entry: Entry, *, durable: bool) -> News | None:
        """One round trip, and one more to wait for replicas; asked again it finds its own entry."""
        words = [word for change in entry.changes for word in change.texts()]
        replicas = self._store.replicas if durable and self._store.sync != "off" else 0
        limits = self.most, self.most_bytes
        reply = self._ask("commit", *place, entry.token, *limits, _GROWING, *words, replicas=replicas)
        return None if reply[0] == b"committed" else _news_in(reply)

    def leave(self, token: str) -> None:
        """One round trip."""
        self._ask("leave", token)

    def begin(self) -> Place:
        """The head: documents are written with it."""
        _, number, token = self._ask("begin")
        return Place(int(number), token.decode())

    def documents(self) -> Iterator[list[Change]]:
        """Table by table."""
        for table in TABLES:
            cursor = b"0"
            while True:
                _, cursor, found = self._ask("page", table, cursor, self.page)
                yield Change.read(table, found)
                if cursor == b"0":
                    break

    def _ask(self, operation: str, *words: Any, replicas: int = 0) -> Any:
        reply = self._store.run(self.source, "tasks", operation, SCHEMA_VERSION, *words, replicas=replicas)
        where = f"{self._store.address}: namespace {self._store.namespace}"
        if reply[0] == b"newer":
            raise StoreError(
                f"{where}: its tasks were written by a newer Ledger (schema {int(reply[1])}, this one knows "
                f"{SCHEMA_VERSION}); nothing was changed. Upgrade ledger-guard here"
            )
        if reply[0] == b"there":
            raise StoreError(
                f"{where}: {reply[1].decode()} {reply[2].decode()} is there already, and its log does not know of it: "
                "somebody else wrote to these keys; nothing was changed. Put back a copy of the server's data"
            )
        return reply


def _news_in(reply: Sequence[Any]) -> News:
    kind, now, wait, found = reply
    entries = None if kind == b"gone" else [_entry_in(text) for text in found]
    return News(int(now), entries, int(wait))


def _entry_in(text: bytes) -> Entry:
    """A commit as the script puts it together."""
    token, *words = json.loads(text)
    return Entry(token, [*map(Change, words[::3], words[1::3], words[2::3])])


class RedisTaskStore(ReplicaStore):
    """The tasks of one namespace of a Redis database."""

    def __init__(self, store: RedisStore, log: RedisLog | None = None) -> None:
        super().__init__(store, log or RedisLog(store))
