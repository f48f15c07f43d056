"""`ledger demo`: calls, duplicates, a failure and a killed process on a ledger of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.text import Text

import ledger
from ledger import Guard
from ledger_cli.options import command
from ledger_cli.screen import Screen
from ledger_ops.reader import Reader, open_store

_PAUSE_SECONDS = 0.25
#: a process that is killed when the hotel has the booking and nothing says so yet
_DOOMED = """
import os, signal, sys
from ledger import Guard

def book_hotel(city: str, nights: int) -> str:
    os.kill(os.getpid(), signal.SIGKILL)

guard = Guard(sys.argv[1], quiet=True, workflow="trip-17")
guard.policy(book_hotel, name="demo.book_hotel", irreversible=True)
guard(book_hotel, "Lisbon", 2)
"""


def charge_card(order: str, cents: int) -> dict[str, str]:
    """A tool that works."""
    return {"receipt": f"r-{order}", "amount": f"{cents / 100:.2f} EUR"}


def send_email(to: str, subject: str) -> str:  # noqa: ARG001 - it only pretends
    """Another one."""
    return f"sent to {to}"


def fetch_rate(currency: str) -> float:  # noqa: ARG001 - it only pretends
    """A tool whose service is down."""
    raise TimeoutError("rates.example did not answer within 5 s")


class _Story:
    """Tells each step, on a terminal slowly enough to be read."""

    def __init__(self) -> None:
        self.screen = Screen()

    def say(self, text: str, style: str = "") -> None:
        self.screen.text(Text(text, style))
        if self.screen.is_terminal:
            time.sleep(_PAUSE_SECONDS)


@command("demo", examples=("ledger demo",))
def demo_command() -> None:
    """Make a small ledger to try the commands on.

    It lies in a temporary folder and stays there. Nothing is charged, sent or booked: the tools only
    pretend. The one process that is killed is its own.
    """
    path = Path(tempfile.mkdtemp(prefix="ledger-demo-")) / "ledger.db"
    story = _Story()
    guard = Guard(path, quiet=True, workflow="trip-17")
    for tool in (charge_card, send_email, fetch_rate):
        guard.policy(tool, name=f"demo.{tool.__name__}", replay=tool is charge_card)
    with guard.as_caller("agent-1"):
        _call(story, guard)
    guard.close()
    _kill(story, path)
    _advise(story, path)


def _call(story: _Story, guard: Guard) -> None:
    story.say("An agent charges a card and sends a mail; its model asks for both again.", "bold")
    for _ in range(3):
        outcome = guard.call(charge_card, "A-1001", 9900)
        story.say(f"  charge_card('A-1001', 9900)  {outcome.kind:<9} {outcome.value}")
    for _ in range(2):
        sent = guard.call(send_email, "ada@example.com", "Your order A-1001")
        story.say(f"  send_email('ada@example.com')  {sent.kind:<9} {sent.value}")
    story.say("A tool fails: its next call runs again, nothing is lost.", "bold")
    for _ in range(2):
        try:
            guard(fetch_rate, "CHF")
        except TimeoutError as error:
            story.say(f"  fetch_rate('CHF')  failed    {error}")


def _kill(story: _Story, path: Path) -> None:
    story.say("A process is killed (SIGKILL) while it books a hotel. Was it booked? Nobody knows.", "bold")
    home = str(Path(ledger.__file__).parent)
    paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", _DOOMED, str(path)], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    story.say(f"  book_hotel('Lisbon', 2)  killed by signal {-done.returncode}")


def _advise(story: _Story, path: Path) -> None:
    store = open_store(path)
    reader = Reader(store)
    total = reader.stats().total
    doubts = reader.doubts()
    store.close()
    counts = f"{total.attempts} attempts, {total.executed} executed, {total.blocked} blocked"
    story.say(f"{counts}, {total.failed} failed, {total.in_doubt} in doubt.", "bold")
    story.say(f"\nThe ledger: {path}\nTry:")
    words = ["show", "stats", "doubts", *(f"inspect {r.call[:6]} --db" for r in doubts), "brief", "tail"]
    for each in words:
        story.screen.line(f"  ledger {each} {shlex.quote(str(path))}")
    for record in doubts:
        call = f"ledger resolve {record.call[:6]} --done --result '\"booked\"'"
        story.screen.line(f"  {call} --db {shlex.quote(str(path))}")
