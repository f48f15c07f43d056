"""Async tools: five tasks ask for the same charge at once, it runs once.

Nothing differs from sync code except `await`. With `replay=True` a duplicate that comes while the
first run is under way waits for it and gets the same result.
"""

import asyncio
import os
import tempfile
import uuid

from ledger import guard

CHARGES: list[str] = []


@guard.once(replay=True)
async def charge_card(order_id: str, amount: float) -> dict[str, object]:
    """Charge the card of an order."""
    await asyncio.sleep(0.2)
    CHARGES.append(order_id)
    return {"receipt": f"r-{len(CHARGES)}", "amount": amount}


async def send_email(to: str) -> str:
    """Send a mail."""
    await asyncio.sleep(0.05)
    return f"sent to {to}"


async def work() -> None:
    """Ask for one charge from five tasks, and twice for a mail by the plain call."""
    receipts = await asyncio.gather(*(charge_card("A-1001", 99.0) for _ in range(5)))
    print(f"5 tasks got {len(receipts)} receipts, all the same: {receipts[0]}")
    print(f"charges: {len(CHARGES)}")

    first = await guard.call(send_email, "ada@example.com")
    second = await guard.call(send_email, "ada@example.com")
    print(f"first mail executed: {first.executed}, value: {first.value}")
    print(f"second mail executed: {second.executed}, value: {second.value}")


def main() -> None:
    """Run the tasks and print what the ledger has of them."""
    path = os.environ.get("LEDGER_DB") or f"{tempfile.mkdtemp(prefix='ledger-')}/ledger.db"
    guard.persist(path)
    guard.workflow(f"request-{uuid.uuid4().hex[:8]}")
    asyncio.run(work())
    guard.log()
    print(f"ledger.db: {path}")


if __name__ == "__main__":
    main()
