"""Two processes on one PostgreSQL charge once.

    pip install "ledger-guard[postgres]"
    LEDGER_DB=postgresql://user@host/db python example_postgres.py

The code is that of any other store: only the URL differs.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ledger import guard


@guard.once(replay=True)
def charge_card(order_id: str, amount: float, book: str) -> str:
    """Charge the card of an order; the book is where this program counts charges."""
    with Path(book).open("a", encoding="utf-8") as file:
        file.write(f"{order_id} {amount}\n")
    return f"receipt for {order_id}"


def main() -> None:
    """Start two processes that make the same charge at once."""
    if not os.environ.get("LEDGER_DB", "").startswith("postgresql://"):
        sys.exit("set LEDGER_DB to the URL of a PostgreSQL, such as postgresql://user@host/db")
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder, "charges")
        book.touch()
        workers = [subprocess.Popen([sys.executable, __file__, str(book)]) for _ in range(2)]
        for worker in workers:
            worker.wait()
        print(f"two processes asked, charges: {len(book.read_text('utf-8').splitlines())}")
    guard.log()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(charge_card("A-1001", 99.0, sys.argv[1]), flush=True)
    else:
        main()
