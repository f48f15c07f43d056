"""What the tests of a move share: places on every kind of store, and what a ledger holds, in one value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ledger import Guard
from ledger_ops.move import Move, Moved, opened_sides
from ledger_stores.move import Side
from tests.cli_kit import Background, Done, run
from tests.stores.dynamo_kit import dynamo_url
from tests.stores.mongo_kit import stand_in
from tests.stores.redis_kit import redis_url
from tests.stores.servers import fresh_namespace, postgres_url

WITH_LOG = ("sqlite", "postgres", "redis")
KINDS = (*WITH_LOG, "dynamodb", "mongodb")
PAIRS = [(source, target) for source in WITH_LOG for target in WITH_LOG]


class Place(NamedTuple):
    """Where a ledger may be."""

    url: str
    namespace: str | None

    def guard(self) -> Guard:
        """A guard on it."""
        return Guard(self.url, namespace=self.namespace, quiet=True)


def fresh_place(kind: str, folder: Path) -> Place:
    """A place of that kind where nothing is yet."""
    if kind == "sqlite":
        return Place(str(folder / f"{fresh_namespace()}.db"), None)
    return Place(url_of(kind), fresh_namespace())


def url_of(kind: str) -> str:
    """Where a server of that kind is."""
    if kind == "mongodb":
        return stand_in().url
    return {"postgres": postgres_url, "redis": redis_url, "dynamodb": dynamo_url}[kind]()


@contextmanager
def sides(source: Place, target: Place) -> Iterator[tuple[Side, Side]]:
    """Both sides of a move, to look at or to move with."""
    with opened_sides(
        source.url, target.url, source_namespace=source.namespace, target_namespace=target.namespace
    ) as found:
        yield found


def moved(source: Place, target: Place, *, tell: Any = lambda _: None) -> Moved:
    """Move one to the other."""
    with sides(source, target) as (here, there):
        return Move(here, there, tell=tell).run()


def words(source: Place, target: Place) -> list[str]:
    """The words of the command that moves one to the other."""
    given = [source.url, target.url]
    given += ["--from-namespace", source.namespace] if source.namespace else []
    return given + (["--to-namespace", target.namespace] if target.namespace else [])


def move(source: Place, target: Place, *more: str) -> Done:
    """Run `ledger move` to its end."""
    return run("move", *words(source, target), *more)


def begin_move(source: Place, target: Place) -> Background:
    """Start `ledger move`."""
    return Background("move", *words(source, target))


def held(side: Side) -> tuple[Any, ...]:
    """All that a ledger holds, but for monotonic times, which belong to a machine."""
    side.store.flush()
    calls: dict[str, Any] = {}
    for record, rows in side.store.calls():
        calls.setdefault(record.call, []).extend(row._replace(mono=0) for row in rows)
        if not rows:
            calls[record.call].append(record)
    events, after = [], 0
    while page := side.entries(after, 500):
        events += [entry[1:] for entry in page]
        after = page[-1].seq
    return calls, events, side.store.totals()


@contextmanager
def guard_on(place: Place) -> Iterator[Guard]:
    """A guard on a place, closed in the end."""
    with closing(place.guard()) as made:
        yield made
