"""A PostgreSQL schema as one side of a move.

It is closed by triggers, which cost nothing where there are none. CREATE TRIGGER takes a lock on its
table that waits for every transaction that has written there, and who waits behind it finds the trigger:
no claim is beside it. What a sealed ledger refuses writes an event in its transaction, so one trigger on
`events` stops it all, and one table is locked, with which no writer can be crossed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from ledger import Run
from ledger_stores.move import REFUSED_KINDS, SEALED, Entry, Mark, Whole, must_step, refuse_full
from ledger_stores.move_sql import EVENT_COLUMNS, UPSERT, SqlSide, storable
from ledger_stores.postgres import MOVED, PostgresStore

_TABLES = ("events", "runs", "tallies")
_FUNCTION = f"""
CREATE OR REPLACE FUNCTION :ns.refuse_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF COALESCE(current_setting('ledger.mover', true), '') <> 'on' THEN
    RAISE EXCEPTION USING ERRCODE = '{MOVED}', MESSAGE = TG_ARGV[0];
  END IF;
  RETURN NEW;
END $$
"""
_UPSERT_RUN = f"INSERT INTO :ns.runs {UPSERT.format(', '.join(['%s'] * len(Run._fields)))}"
_INSERT_EVENT = (
    f"INSERT INTO :ns.events ({EVENT_COLUMNS}) VALUES (pg_current_xact_id()::text::bigint * 4096 + %s,"
    f" {', '.join(['%s'] * 9)})"
)
_INSERT_TALLY = f"INSERT INTO :ns.tallies VALUES ({', '.join(['%s'] * 10)})"
_INSERT_PROCESS = "INSERT INTO :ns.processes VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"


class PostgresSide(SqlSide):
    """One schema."""

    def __init__(self, store: PostgresStore) -> None:
        self.store: PostgresStore = store

    def exists(self) -> bool:
        """Whether there is a ledger; never makes one."""
        try:
            with psycopg.connect(self.store.url, autocommit=True, connect_timeout=5) as db:
                return self.store._is_made(db)
        except psycopg.Error as error:
            raise self.store._translated(error) from error

    def last_written(self) -> int:
        """The number of the newest event that is committed; older ones may still be open."""
        return int(self.store._ask("SELECT COALESCE(MAX(seq), 0) FROM :ns.events")[0][0])

    def step(
        self, was: Mark | None, now: Mark, calls: Sequence[Whole] = (), entries: Sequence[Entry] = ()
    ) -> None:
        """Make these calls what they are there, append these events and set the mark: one transaction."""

        def work(db: psycopg.Connection[Any]) -> None:
            if was is None and now.role == "receiving":
                self._refuse_full(db)
            self._replace(db, calls)
            events = [(number, *map(_clean, entry[1:])) for number, entry in enumerate(entries, 1)]
            self._many(db, _INSERT_EVENT, events)

        self._write(was, now, work)

    def unmark(self, was: Mark) -> None:
        """Take the mark away, and the triggers with it."""
        self._write(was, None, lambda _: None)

    def erase(self, was: Mark, now: Mark) -> None:
        """Take away all calls, tallies and events: one transaction."""
        self._write(was, now, lambda db: self._do(db, "TRUNCATE :ns.events, :ns.runs, :ns.tallies"))

    def _write(
        self, was: Mark | None, now: Mark | None, work: Callable[[psycopg.Connection[Any]], object]
    ) -> None:
        """Do it in one transaction that sets the mark, unless another mover was here."""

        def perform(db: psycopg.Connection[Any]) -> None:
            with db.transaction():
                self._do(db, "SELECT set_config('ledger.mover', 'on', true)")
                self._do(db, "SELECT pg_advisory_xact_lock(hashtextextended(':ns', 2))")  # of movers
                row = self._do(db, "SELECT value FROM :ns.meta WHERE name = 'move'").fetchone()
                if must_step(Mark.read(row[0] if row else None), was, now, self.address):
                    self._mark(db, was, now)
                    work(db)

        self.store._insist(perform)

    def _mark(self, db: psycopg.Connection[Any], was: Mark | None, now: Mark | None) -> None:
        if (was and was.refusal) != (now and now.refusal):
            # only where there is one: to look for another would lock more tables than are needed
            for table in _closed_tables(was):
                self._do(db, f"DROP TRIGGER closed ON :ns.{table}")
            if now is not None and now.refusal:
                self._do(db, _FUNCTION)
                for table in _closed_tables(now):
                    db.execute(_trigger(now, self.store.namespace, table))
        self._do(db, "DELETE FROM :ns.meta WHERE name = 'move'")
        if now is not None:
            self._do(db, "INSERT INTO :ns.meta VALUES ('move', %s)", (now.text,))

    def _refuse_full(self, db: psycopg.Connection[Any]) -> None:
        """Behind the triggers, whose locks waited for all who were writing."""
        for table in _TABLES:
            if self._do(db, f"SELECT 1 FROM :ns.{table} LIMIT 1").fetchone():
                raise refuse_full(self.address)

    def _replace(self, db: psycopg.Connection[Any], calls: Sequence[Whole]) -> None:
        names = [whole.call for whole in calls]
        kept = [(whole.call, [run.run for run in whole.rows]) for whole in calls]
        self._many(db, "DELETE FROM :ns.runs WHERE call = %s AND NOT run = ANY(%s)", kept)
        # upwards: the run that is open is the last one
        runs = [tuple(map(_clean, run)) for whole in calls for run in whole.rows]
        self._many(db, _UPSERT_RUN, runs)
        self._do(db, "DELETE FROM :ns.tallies WHERE call = ANY(%s)", (names,))
        self._many(db, _INSERT_TALLY, [tuple(map(_clean, w.tally)) for w in calls if w.tally is not None])
        self._many(db, _INSERT_PROCESS, sorted({p for whole in calls for p in whole.processes}))

    def _do(self, db: psycopg.Connection[Any], sql: str, values: Sequence[Any] | None = None) -> Any:
        return db.execute(sql.replace(":ns", self.store.namespace), values)

    def _many(self, db: psycopg.Connection[Any], sql: str, values: Sequence[Sequence[Any]]) -> None:
        if values:
            with db.cursor() as cursor:
                cursor.executemany(sql.replace(":ns", self.store.namespace), values)


def _closed_tables(mark: Mark | None) -> tuple[str, ...]:
    if mark is None or not mark.refusal:
        return ()
    return _TABLES[:1] if mark.role in SEALED else _TABLES


def _trigger(now: Mark, namespace: str, table: str) -> str:
    """What closes a table to all but a transaction that says to be the mover's."""
    decided = f"INSERT ON {namespace}.{table} FOR EACH ROW WHEN (NEW.kind IN {REFUSED_KINDS})"
    anything = f"INSERT OR UPDATE OR DELETE ON {namespace}.{table} FOR EACH STATEMENT"
    text = now.refusal.replace("'", "''")
    return (
        f"CREATE TRIGGER closed BEFORE {decided if now.role in SEALED else anything}"
        f" EXECUTE FUNCTION {namespace}.refuse_moved('{text}')"
    )


def _clean(value: Any) -> Any:
    """PostgreSQL's text holds no NUL either; it is shown as its picture."""
    return storable(value.replace("\0", "\u2400")) if isinstance(value, str) else value
