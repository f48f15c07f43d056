"""Redis before a store of tasks, for many that look: the store stays the only truth.

What is kept in Redis are counts and pages of tasks, each under a stamp of the store: a text that is the same only as long
as no event was added. Every read asks the store for that stamp, which costs it one step in an index, and takes from Redis
only what was kept under the very same one. So nothing has to be invalidated, whoever writes by whatever way, and what
is old is found by nobody and expires. A page in which a lease runs is not kept, because heartbeats are no events.

Everything else, above all every write and all that a write relies on, goes to the store. A Redis that is away, full or
slow is not asked for a while, and costs speed alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, TypeVar

import ledger
from ledger import UsageError
from ledger_tasks.book import Row, TaskStore, Wanted
from ledger_tasks.model import Task

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise UsageError(
        "CachedTaskStore needs redis-py; nothing was opened. Run: pip install 'ledger-guard[redis]'"
    ) from error

T = TypeVar("T")
#: an answer is waited for so long, and after a failure none is asked for so long
_PATIENCE: Final = 0.25
_REST: Final = 5.0
_KEPT_SECONDS: Final = 300
_MOST_BYTES: Final = 4_000_000
#: of a row, beside its task; a lease that runs is not kept
_KEPT: Final = ("num", "claim", "lease", "mono", "boot", "op", "said", "hash")


class CachedTaskStore(TaskStore):
    """`primary` answers; what only looks may be answered by the Redis at `cache_url`, where that is certainly current."""

    def __init__(self, primary: TaskStore, cache_url: str) -> None:
        self.primary = primary
        self.address = primary.address
        self.cache = _Cache(cache_url)

    def read(self, session: str, look: Callable[[Any], T]) -> T:
        """By the primary, with counts and pages from the cache."""
        return self.primary.read(session, lambda book: look(_CachedBook(book, self.cache, self.address)))

    def write(self, session: str, work: Callable[[Any], T], *, durable: bool = True) -> T:
        """By the primary."""
        return self.primary.write(session, work, durable=durable)

    def calls(self) -> ledger.Store:
        """The primary's."""
        return self.primary.calls()

    def close(self) -> None:
        """Close both."""
        self.cache.close()
        self.primary.close()


class _CachedBook:
    """The book of the primary, but for counts and pages."""

    def __init__(self, book: Any, cache: _Cache, address: str) -> None:
        self._book, self._cache, self._address = book, cache, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = self._answer(["counts"], self._book.counts, dict, dict)
        return found

    def page(self, wanted: Wanted, limit: int) -> list[Row]:
        asked = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(wanted).items()}
        found: list[Row] = self._answer(
            ["page", asked, limit], lambda: self._book.page(wanted, limit), _plain_rows, _rows_from
        )
        return found

    def _answer(
        self, question: list[Any], ask: Callable[[], T], to: Callable[[T], Any], back: Callable[[Any], T]
    ) -> T:
        """From the cache, else from the primary and kept for those who ask while the stamp is the same."""
        stamp = self._book.stamp() if self._cache.is_near() else None
        if stamp is None:
            return ask()
        key = _key([self._address, self._book.session, stamp, *question])
        kept = self._cache.get(key)
        if kept is not None:
            try:
                return back(kept)
            except (KeyError, TypeError, ValueError, AttributeError):  # another version's, or nobody's
                pass
        found = ask()
        plain = to(found)
        if plain is not None:
            self._cache.put(key, plain)
        return found


def _key(question: list[Any]) -> str:
    return f"ledger-tasks:1:{hashlib.sha256(json.dumps(question).encode()).hexdigest()}"


def _plain_rows(rows: list[Row]) -> list[Any] | None:
    """Rows as JSON; None if a lease runs on one of them."""
    if any(row.until for row in rows):
        return None
    return [
        [row.task.to_dict(), row.task.waiting, {name: getattr(row, name) for name in _KEPT}] for row in rows
    ]


def _rows_from(found: list[Any]) -> list[Row]:
    rows = []
    for fields, waiting, rest in found:
        task = Task.from_dict(fields)
        object.__setattr__(task, "waiting", int(waiting))  # just made, and nobody else's yet
        rows.append(Row(task, **rest))
    return rows


class _Cache:
    """A Redis that may be away."""

    def __init__(self, url: str) -> None:
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise UsageError(f"the cache's URL is none of a Redis ({error}); nothing was opened") from error
        self._away_until = 0.0

    def is_near(self) -> bool:
        return time.monotonic() >= self._away_until

    def get(self, key: str) -> Any:
        """What was kept; None if nothing was, or Redis is away."""
        found = self._ask(self._client.get, key)
        try:
            return None if found is None else json.loads(found)
        except ValueError:
            return None

    def put(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        if self.is_near() and len(text) <= _MOST_BYTES:
            self._ask(self._client.set, key, text, ex=_KEPT_SECONDS)

    def _ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (redis.RedisError, OSError):
            self._away_until = time.monotonic() + _REST
            return None

    def close(self) -> None:
        self._client.close()
