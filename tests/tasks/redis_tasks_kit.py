"""Tasks on a real Redis for the tests."""

from __future__ import annotations

from typing import ClassVar

from ledger_stores.redis import RedisStore
from ledger_tasks.redis import RedisLog, RedisTaskStore
from tests.stores.redis_kit import redis_url


class ClockedLog(RedisLog):
    """The log of a server that takes the time from a key."""

    source: ClassVar[str] = RedisLog.source.replace(
        "local t = redis.call('TIME')\n  return t[1] * 1000000 + t[2]",
        "return tonumber(redis.call('GET', prefix .. 'time'))",
    )


def clocked_tasks(namespace: str) -> RedisTaskStore:
    """The tasks of a namespace, by the time that is set there."""
    calls = RedisStore(redis_url(), namespace=namespace)
    return RedisTaskStore(calls, ClockedLog(calls))
