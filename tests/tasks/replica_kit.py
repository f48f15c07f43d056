"""Shared logs of tasks for the tests: a real Redis, and the stand-in for MongoDB."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import redis

from ledger import Clock
from ledger_stores.mongodb import MongoStore
from ledger_stores.redis import RedisStore
from ledger_tasks import TaskLedger
from ledger_tasks.mongodb import MongoLog, MongoTaskStore
from ledger_tasks.redis import RedisLog, RedisTaskStore
from ledger_tasks.replica import ReplicaStore
from tests.stores.mongo_kit import StandIn
from tests.stores.redis_kit import redis_url, way_to
from tests.stores.servers import fresh_namespace
from tests.stores.way import Way

REDIS_TIME = "local t = redis.call('TIME')\n  return t[1] * 1000000 + t[2]"


class ClockedLog(RedisLog):
    """The log of a Redis that takes the time from a key."""

    source: ClassVar[str] = RedisLog.source.replace(
        REDIS_TIME, "return tonumber(redis.call('GET', prefix .. 'time'))"
    )


class ShortRedisLog(RedisLog):
    """A log of three commits."""

    most: ClassVar[int] = 3


class ShortMongoLog(MongoLog):
    """The same; the rows are brought forward every two commits."""

    behind = 2
    most = 1


class Place(ABC):
    """A namespace of its own on a server."""

    #: what a commit has in it on its way
    mark: ClassVar[bytes]

    def __init__(self) -> None:
        self.namespace = fresh_namespace()

    @abstractmethod
    def store(self, url: str = "", *, short: bool = False, **settings: Any) -> ReplicaStore:
        """A handle of it, as another process has it; `short`: with a log that is soon too short."""

    @abstractmethod
    def way(self) -> Way:
        """A way to the server."""

    @abstractmethod
    def deface(self, table: str, key: str, column: str, value: str) -> None:
        """Change a row by hand."""

    def tasks(self, agent: str = "me", url: str = "", **settings: Any) -> TaskLedger:
        """A ledger on a handle of its own."""
        return TaskLedger(self.store(url, **settings), agent=agent)

    def close(self) -> None:  # noqa: B027 - most have nothing
        """End what was started for it."""


class OnRedis(Place):
    """A real one."""

    mark = b"\r\ncommit\r\n"

    def store(
        self, url: str = "", *, short: bool = False, clock: Clock | None = None, **settings: Any
    ) -> RedisTaskStore:
        calls = RedisStore(url or redis_url(), namespace=self.namespace, clock=clock, **settings)
        return RedisTaskStore(calls, ShortRedisLog(calls) if short else None)

    def way(self) -> Way:
        return way_to(redis_url())

    def deface(self, table: str, key: str, column: str, value: str) -> None:
        with redis.Redis.from_url(redis_url(), decode_responses=True) as plain:
            documents = f"{{{self.namespace}}}:tasks:{table}"
            row = str(plain.hget(documents, key))
            before = row.partition(f'"{column}":"')[2].partition('"')[0]
            plain.hset(documents, key, row.replace(f'"{column}":"{before}"', f'"{column}":"{value}"'))


class OnMongo(Place):
    """The stand-in."""

    mark = b"findAndModify\0"

    def __init__(self) -> None:
        super().__init__()
        self.server = StandIn()

    def store(
        self, url: str = "", *, short: bool = False, clock: Clock | None = None, **settings: Any
    ) -> MongoTaskStore:
        calls = MongoStore(url or self.server.url, namespace=self.namespace, clock=clock, **settings)
        return MongoTaskStore(calls, ShortMongoLog(calls) if short else None)

    def way(self) -> Way:
        host, _, port = self.server.address.partition(":")
        return Way(
            lambda: socket.create_connection((host, int(port))),
            lambda door: f"mongodb://127.0.0.1:{door}/shop?directConnection=true",
        )

    def deface(self, table: str, key: str, column: str, value: str) -> None:
        rows = self.server.documents(f"{self.namespace}.tasks.rows")
        assert rows.update_one({"_id": f"{table}:{key}"}, {"$set": {f"row.{column}": value}}).matched_count

    def close(self) -> None:
        self.server.close()


def clocked_tasks(namespace: str) -> RedisTaskStore:
    """The tasks of a namespace of Redis, by the time that is set there."""
    calls = RedisStore(redis_url(), namespace=namespace)
    return RedisTaskStore(calls, ClockedLog(calls))
