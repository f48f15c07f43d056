"""Effects in the ledger's own database: they commit with the outcome, or not at all."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ledger import Guard, LedgerError, MemoryStore, NotPerformed, UsageError
from ledger_stores.postgres import PostgresStore
from ledger_stores.testing import release
from tests.actors import stage
from tests.stores.servers import fresh_namespace, postgres_url

STATEMENTS = 16  # more than a transfer sends; the last ones come to the end unharmed


class Bank:
    """Accounts in the ledger's database, a guard, and a user's connection to it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.namespace = fresh_namespace()
        self.url = str(folder / "ledger.db") if kind == "sqlite" else postgres_url()
        self.guard = Guard(
            self.url, namespace=None if kind == "sqlite" else self.namespace, quiet=True, lock_seconds=5
        )
        self.guard.defaults(replay=True)
        self.guard.check()
        self.db = self.connect()
        self.table = "balances" if kind == "sqlite" else f"{self.namespace}.balances"
        self.mark = "?" if kind == "sqlite" else "%s"
        self.write(f"CREATE TABLE {self.table} (account TEXT, cents INTEGER)")

    def connect(self) -> Any:
        """A connection of the user's own."""
        return sqlite3.connect(self.url) if self.kind == "sqlite" else psycopg.connect(self.url)

    def write(self, sql: str) -> None:
        """A statement outside of any tool."""
        with closing(self.connect()) as db:
            db.execute(sql)
            db.commit()

    def total(self) -> int:
        """What the accounts hold, as everybody sees it."""
        with closing(self.connect()) as db:
            return int(db.execute(f"SELECT COALESCE(SUM(cents), 0) FROM {self.table}").fetchone()[0])

    def deposit(self, cents: int, then: BaseException | None = None) -> int:
        """A tool that writes to the database and nowhere else."""
        self.db.execute(f"INSERT INTO {self.table} VALUES ('a', {self.mark})", (cents,))
        if then is not None:
            raise then
        return cents

    def close(self) -> None:
        """Give everything back."""
        self.db.close()
        self.guard.close()
        if self.kind == "postgres":
            self.write(f"DROP SCHEMA {self.namespace} CASCADE")


@pytest.fixture(params=["sqlite", "postgres"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    """A bank on each database that can do it."""
    made = Bank(request.param, tmp_path)
    yield made
    made.close()


def test_writes_and_outcome_commit_together(bank: Bank) -> None:
    """The tool's write is there when the call is a success, once, and a duplicate gets the result."""
    pay = bank.guard.transaction(bank.db)

    assert [5, 5] == [pay(bank.deposit, 5, None) for _ in range(2)]

    assert 5 == bank.total()
    assert (1, 1) == (bank.guard.stats()["executed"], bank.guard.stats()["blocked"])
    assert ["claimed", "success"] == [e["kind"] for e in bank.guard.events()][:2]


def test_a_tool_that_raises_has_written_nothing(bank: Bank) -> None:
    """Its write is rolled back, its run is recorded as failed, and the next call runs."""
    bank.guard.policy(bank.deposit, ignore=["then"])
    pay = bank.guard.transaction(bank.db)

    with pytest.raises(ValueError, match="no"):
        pay(bank.deposit, 5, ValueError("no"))

    assert (0, 1) == (bank.total(), bank.guard.stats()["failed"])
    assert 5 == pay(bank.deposit, 5)
    assert 5 == bank.total()


def test_who_was_given_up_writes_nothing(bank: Bank) -> None:
    """While the tool works its run is taken over and done by another: its own write never comes true."""
    if bank.kind == "sqlite":
        return  # the transaction holds the file's write lock: nobody can take its run over meanwhile
    store = PostgresStore(bank.url, namespace=bank.namespace)

    def taken_over(order: int) -> int:
        """Released behind its back, as by a person who took it for dead."""
        bank.deposit(order)
        [call] = [r.call for r, _ in store.calls()]
        bank.write(f"UPDATE {bank.namespace}.runs SET lease = 0 WHERE call = '{call}'")
        [run] = store.rows(call)
        assert "released" == store.transact(release(run)).kind
        return order

    with pytest.raises(NotPerformed, match="was given up while it ran; what it wrote was rolled back"):
        bank.guard.transaction(bank.db)(taken_over, 1)

    assert 0 == bank.total()
    [call] = [r.call for r, _ in store.calls()]
    assert [("doubt", "failed")] == [(r.status, r.late) for r in store.rows(call)]
    store.close()


def test_what_cannot_share_a_transaction_is_refused(bank: Bank, tmp_path: Path) -> None:
    """Another database, an open transaction, an async tool, a store without any: nothing is written."""

    async def later(cents: int) -> None:
        await asyncio.sleep(0)

    with pytest.raises(UsageError, match="is for a plain function"):
        bank.guard.transaction(bank.db)(later, 1)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE balances (account TEXT, cents INTEGER)")
        other.commit()
        with pytest.raises(LedgerError, match=r"is not to the database|shares no transaction"):
            bank.guard.transaction(other)(bank.deposit, 7)
    bank.db.execute(f"INSERT INTO {bank.table} VALUES ('mine', 100)")
    with pytest.raises(UsageError, match="has a transaction open already, nothing ran"):
        bank.guard.transaction(bank.db)(bank.deposit, 8)
    bank.db.rollback()
    with pytest.raises(UsageError, match="shares no transaction with MemoryStore"):
        Guard(store=MemoryStore(), quiet=True).transaction(bank.db)(bank.deposit, 9)

    assert 0 == bank.total()


def test_a_tool_that_commits_by_itself_is_told(bank: Bank) -> None:
    """A tool that ends the transaction breaks the promise, so its run fails with words."""

    def hasty(order: int) -> None:
        bank.db.commit()

    with pytest.raises(UsageError, match="leave commit and rollback to the guard"):
        bank.guard.transaction(bank.db)(hasty, 1)
    assert 1 == bank.guard.stats()["failed"]


KILLED = """
import signal, sqlite3
kind, url, namespace, deadly, table, mark = sys.argv[2:8]
count = 0

def step():
    global count
    count += 1
    if count == int(deadly):
        os.kill(os.getpid(), signal.SIGKILL)

if kind == "sqlite":
    class Deadly(sqlite3.Connection):
        def execute(self, *args):
            step()
            found = super().execute(*args)
            step()
            return found
    db = sqlite3.connect(url, factory=Deadly)
else:
    import psycopg
    class Deadly(psycopg.Connection):
        def execute(self, *args, **options):
            step()
            found = super().execute(*args, **options)
            step()
            return found
        def commit(self):
            step()
            super().commit()
            step()
    db = Deadly.connect(url)

guard = Guard(url, namespace=None if kind == "sqlite" else namespace, quiet=True)
guard.policy("pay", replay=True, timeout=0.5)

def pay(order):
    db.execute(f"INSERT INTO {table} VALUES ('a', {mark})", (order,))
    return order

say("paid", guard.transaction(db)(pay, int(sys.argv[8])))
"""


@pytest.mark.slow
def test_killed_at_every_step_it_is_done_exactly_once(bank: Bank, tmp_path: Path) -> None:
    """Whichever statement is the last before SIGKILL: after a second try the money moved once."""
    killed = 0
    with stage(tmp_path) as crew:
        for deadly in range(1, STATEMENTS + 1):
            words = (bank.kind, bank.url, bank.namespace)
            first = crew.start(KILLED, *words, deadly, bank.table, bank.mark, deadly)
            killed += first.ends() != 0
            second = crew.start(KILLED, *words, 0, bank.table, bank.mark, deadly)

            second.ends()
            paid = sum(range(1, deadly + 1))
            while bank.total() != paid:  # the lease of the killed one still ran
                assert bank.total() < paid
                crew.start(KILLED, *words, 0, bank.table, bank.mark, deadly).ends()

    assert 6 <= killed < STATEMENTS
    sums = bank.guard.stats()
    assert (STATEMENTS, STATEMENTS) == (sums["actions"], sums["executed"])
