"""A transfer whose effect is in the ledger's own database: exactly once, whatever happens.

The tool's writes and the ledger's settlement are one transaction. A process that is killed before it
commits has written nothing, so the next one may simply run it again. Here the first transfer is killed
in the middle, by SIGKILL, and the second moves the money. LEDGER_DB names the database: a path, or the
URL of a PostgreSQL (`postgresql://…`, with the extra `postgres`).
"""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from typing import Any

from ledger import Guard

URL = os.environ.get("LEDGER_DB") or f"{tempfile.mkdtemp(prefix='ledger-')}/ledger.db"


def connect() -> Any:
    """A connection to the database that the ledger is in."""
    if "://" in URL:
        import psycopg

        return psycopg.connect(URL)
    return sqlite3.connect(URL)


db = connect()
guard = Guard(URL, quiet=True)


@guard.once(replay=True, timeout=2)
def transfer(order: str, cents: int) -> str:
    """Move money from one account to the other; leaves commit and rollback to the guard."""
    db.execute(f"UPDATE account SET cents = cents - {cents:d} WHERE name = 'ada'")  # noqa: S608 - a number
    if "--killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    db.execute(f"UPDATE account SET cents = cents + {cents:d} WHERE name = 'bob'")  # noqa: S608 - a number
    return f"moved {cents} for {order}"


def accounts() -> dict[str, int]:
    """What everybody sees."""
    found = dict(db.execute("SELECT name, cents FROM account ORDER BY name").fetchall())
    db.rollback()
    return found


def main() -> None:
    """Be killed in the middle of a transfer, then do it; ask once more."""
    guard.check()  # a file must be a ledger before it holds other tables
    db.execute("CREATE TABLE account (name TEXT, cents INTEGER)")
    db.execute("INSERT INTO account VALUES ('ada', 1000), ('bob', 0)")
    db.commit()

    killed = subprocess.run(
        [sys.executable, __file__, "--killed"], env={**os.environ, "LEDGER_DB": URL}, check=False
    )
    print(f"first process: ended by signal {-killed.returncode}, {accounts()}")
    pay = guard.transaction(db)
    print(f"second process: {pay(transfer, 'A-1001', 250)}, {accounts()}")
    print(f"asked again: {pay(transfer, 'A-1001', 250)}, {accounts()}")
    print(f"ledger: {URL}")


if __name__ == "__main__":
    if "--killed" in sys.argv:
        guard.transaction(db)(transfer, "A-1001", 250)
    else:
        main()
