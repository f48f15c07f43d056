"""Ledgers with a story for the tests of the dashboard, written by real guarded processes, and its server."""

from __future__ import annotations

import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from starlette.testclient import TestClient

from tests.actors import PATIENCE, Actor, Stage

ROOT = Path(__file__).resolve().parent.parent
SERVE = "import sys; from ledger_dashboard import main; sys.exit(main())"

TOOLS = """
from decimal import Decimal

def charge(order, cents, *, currency="EUR", api_key=None):
    time.sleep(0.002)
    return {"receipt": f"R-{order}", "amount": Decimal(cents) / 100, "lines": [{"sku": "S1", "count": 2}]}

def send_email(to, subject):
    if "bounce" in to:
        raise ConnectionError(f"550 mailbox {to} is unavailable")
    return "queued"

def book_flight(route):
    say("inside")
    hear()
    return {"pnr": "X7K2PQ"}

def look_up(customer):
    return {"customer": customer}

guard.policy(look_up, unlimited=True)
"""

STORY = (
    TOOLS
    + """
def ask(fn, *args, **kwargs):
    try:
        guard(fn, *args, **kwargs)
    except ConnectionError:
        pass

for n in range(12):
    with guard.workflow(f"order A-{2000 + n}"), guard.as_caller(("planner", "buyer")[n % 2]):
        for _ in range(1 + n % 3):
            ask(charge, f"A-{2000 + n}", 4200 + n, api_key="sk-very-secret")
        ask(send_email, f"customer{n}@example.com", "Your order")
with guard.workflow("nightly"), guard.as_caller("cron"):
    for _ in range(2):
        ask(send_email, "bounce@example.com", "Report")
    look_up_twice = [guard(look_up, "C-1"), guard(look_up, "C-1")]
guard.close()
"""
)

BOOK = (
    TOOLS
    + """
with guard.workflow(sys.argv[2]), guard.as_caller("travel"):
    guard(book_flight, sys.argv[3])
guard.close()
"""
)

#: charges whatever order it is told; says "done" after each line
CHARGER = (
    TOOLS
    + """
say("ready")
while order := hear():
    with guard.workflow("told"), guard.as_caller("teller"):
        guard(charge, order, 100)
    say("done")
guard.close()
"""
)


def tell_story(stage: Stage) -> None:
    """Charges with duplicates, mails of which one fails twice, calls of an unlimited tool."""
    stage.start(STORY).ends_well()


def leave_doubt(stage: Stage, route: str = "FRA-LIS", wf: str = "trip 7") -> None:
    """A booking whose process is killed inside the tool."""
    victim = stage.start(BOOK, wf, route)
    assert victim.line() == "inside"
    victim.kill()


def keep_running(stage: Stage, route: str = "OSL-MAD", wf: str = "trip 8") -> Actor:
    """A booking that is going on until the process hears something."""
    actor = stage.start(BOOK, wf, route)
    assert actor.line() == "inside"
    return actor


class Server:
    """The dashboard as a process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, told: list[str]) -> None:
        self.process = process
        #: without a slash at its end
        self.url = url
        #: what it said at start
        self.told = told

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Send it a signal; how many seconds it took to end."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        return time.monotonic() - begun


def environment() -> dict[str, str]:
    """Ours, without what would steer the ledger or the dashboard."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")}


def start_server(db: Path, *options: str) -> Server:
    """Start the dashboard on a free port, and wait until it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(db), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what is read ahead would be hidden from select
        env=environment(),
    )
    assert process.stdout is not None
    told: list[str] = []
    while not told or "Ctrl-C" not in told[-1]:
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline().decode() if ready else ""
        if not line:
            process.kill()
            errors = process.communicate()[1].decode()
            raise AssertionError(f"it said nothing more after {told}: {errors}")
        told.append(line.rstrip("\n"))
    found = re.search(r"http://\S+?:(\d+)/", told[0])
    assert found is not None
    return Server(process, found.group(0).rstrip("/"), told)


@contextmanager
def serving(db: Path, *options: str) -> Iterator[Server]:
    """The dashboard of a ledger; it must end by itself when it is told to, and say nothing on stderr."""
    server = start_server(db, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
        try:
            errors = server.process.communicate(timeout=PATIENCE)[1].decode()
        except subprocess.TimeoutExpired:
            server.process.kill()
            raise
        sys.stderr.write(errors)  # shown beside what else failed
    assert errors == ""


def csrf_of(client: httpx.Client | TestClient) -> dict[str, str]:
    """The header that a page of this visitor would send with a change."""
    found = re.search(r'name="csrf-token" content="(\w+)"', client.get("/").text)
    assert found is not None
    return {"X-CSRF-Token": found.group(1)}


def copy_of(db: Path, folder: Path | None = None) -> Path:
    """A whole copy of a ledger in one file."""
    target = (folder or db.parent) / "ledger.copy"
    with closing(sqlite3.connect(db)) as source, closing(sqlite3.connect(target)) as into:
        source.backup(into)
    return target
