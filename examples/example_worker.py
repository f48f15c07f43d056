"""A worker that is killed after the second of three effects, and another that goes on where it was.

    python examples/example_worker.py

The handler charges a card, books the order and mails the customer. The first worker's process is
killed between the booking and the mail. The second takes the task over when the lease has lapsed and
runs the handler from its top: the charge and the booking are answered with their first results, only
the mail is sent. The services outside count what really happened.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from local_services import MailServer, PaymentService, post, serve

from ledger import guard, idempotency_key
from ledger_tasks import Task, TaskContext, TaskLedger, Worker


@guard.once
def charge_card(order: str, amount: float) -> str:
    """Take the money; the service gets a key that is the same in every run."""
    key = {"Idempotency-Key": idempotency_key()}
    reply = post(os.environ["PAYMENTS_URL"], {"order_id": order, "amount": amount}, headers=key, seconds=10)
    return str(reply["receipt"])


@guard.once
def book(order: str, receipt: str) -> str:
    """Write it into the books, which know no key."""
    post(os.environ["BOOKS_URL"], {"order": order, "receipt": receipt}, seconds=10)
    return f"booked {order} as {receipt}"


@guard.once
def send_mail(to: str, text: str) -> str:
    """Tell the customer."""
    post(os.environ["MAILS_URL"], {"to": to, "text": text}, seconds=10)
    return "sent"


def settle_order(task: Task, context: TaskContext) -> dict[str, str]:
    """The handler: three effects in a row, without a thought for crashes."""
    order = task.payload
    receipt = charge_card(order["id"], order["amount"])
    context.progress(0.3, "charged")
    booking = book(order["id"], receipt)
    context.progress(0.6, "booked")
    if os.environ.get("DIES") == order["id"]:
        print(f"{context.claim.agent}: {order['id']} is charged and booked, and the power fails", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return {
        "receipt": receipt,
        "booking": booking,
        "mail": send_mail(order["to"], f"{order['id']}: thank you"),
    }


def open_tasks(session: str, agent: str) -> TaskLedger:
    """The same list of tasks in every process, where the guard keeps its calls too (LEDGER_DB)."""
    return TaskLedger(agent=agent, session=session, lease=1)


def work(session: str, agent: str) -> None:
    """What each worker's process does: all orders, until none is left."""
    tasks = open_tasks(session, agent)
    Worker(tasks, {"order": settle_order}, agent=agent, concurrency=1).run(until_idle=True)


def main() -> None:
    """Two orders, two workers one after the other, and the bill."""
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
        return
    os.environ.setdefault("LEDGER_DB", str(Path(tempfile.mkdtemp()) / "ledger.db"))
    payments, books, mails = PaymentService(), MailServer(), MailServer()
    with serve(payments.answer) as pay, serve(books.answer) as keep, serve(mails.answer) as mail:
        os.environ |= {"PAYMENTS_URL": pay, "BOOKS_URL": keep, "MAILS_URL": mail, "DIES": "A-1002"}
        session = f"orders-{uuid.uuid4().hex[:8]}"
        orders = [
            {"id": f"A-100{n}", "amount": 10.0 * n, "to": f"customer{n}@example.com"} for n in (1, 2, 3)
        ]
        tasks = open_tasks(session, "shop")
        tasks.add_tasks([Task(f"{order['id']}", type="order", payload=order) for order in orders])
        first = subprocess.run([sys.executable, __file__, session, "monday"], check=False)
        print(f"the first worker's process ended with {first.returncode}")
        os.environ.pop("DIES")
        second = subprocess.run([sys.executable, __file__, session, "tuesday"], check=True)
        print(f"the second worker's process ended with {second.returncode}")
    for task in tasks:
        print(f"{task.id}: {task.state.name} by {task.changed_by}, {task.result['receipt']}")
    print(f"charged {len(payments.taken)} times, {sum(amount for _, amount in payments.taken):.2f} in all")
    print(f"booked {len(books.sent)} times, mailed {len(mails.sent)} times")


if __name__ == "__main__":
    main()
