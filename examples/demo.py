"""What goes wrong when an agent retries, and what Ledger does about it.

An agent (`demo_agent.py`) has two orders to charge and to confirm by mail. Two accidents happen:

1. the payment service takes the money for A-1001 and its reply never arrives, so the model asks for
   both tools again, with new tool-call ids;
2. the agent's process is killed (SIGKILL) when the money for A-1002 has been taken and before that
   is written down anywhere, and is then started again.

The same is played twice, without the guard and with it. The agent is a process of its own with the
real `openai` client; payment service, mail server and model answer on loopback. No account and no
network are needed. The exit code is 1 if a bill is not what it should be.
"""

import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_services import Ask, MailServer, PaymentService, ScriptedModel, serve

from ledger import guard

ORDERS = {"A-1001": 99.00, "A-1002": 250.00}
REPLY_LOST, KILLED = ORDERS

STEPS: list[list[Ask]] = [
    [
        ("charge_card", {"order_id": order, "amount": price, "currency": "EUR"}),
        ("send_email", {"to": "ada@example.com", "subject": f"Your order {order}"}),
    ]
    for order, price in ORDERS.items()
]
AGENT = Path(__file__).with_name("demo_agent.py")

#: Longer than the agent waits for a payment (`demo_agent.PATIENCE_SECONDS`).
LOST_REPLY_SECONDS = 3.0
#: No agent may take longer than this, so that the demo ends whatever happens.
AGENT_SECONDS = 30.0


# ── the stage ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stage:
    """The services of one act, the agent's process, and the two accidents."""

    payments: PaymentService = field(default_factory=PaymentService)
    mails: MailServer = field(default_factory=MailServer)
    model: ScriptedModel = field(default_factory=lambda: ScriptedModel(STEPS, "Both are done."))
    agent: subprocess.Popen[bytes] | None = None
    #: Set at the end of the act, when no reply needs to be held back any longer.
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.payments.after_taking = self.accident

    def accident(self, order: str) -> None:
        """What happens when the money of an order was taken and the reply is not yet sent."""
        if self.charged()[order] > 1:
            return
        if order == REPLY_LOST:
            self.over.wait(LOST_REPLY_SECONDS)
        elif self.agent:
            say(bold(f"  kill -9 {self.agent.pid}: {order} is paid, nobody has written it down"))
            self.stop_agent()

    def run_agent(self, *arguments: str) -> int:
        """Run the agent in a process of its own until it ends or is killed."""
        with self.addresses() as environment:
            self.agent = subprocess.Popen([sys.executable, str(AGENT), *arguments], env=environment)
            try:
                return self.agent.wait(AGENT_SECONDS)
            finally:
                self.stop_agent()

    def stop_agent(self) -> None:
        """Kill the agent and wait until it has gone."""
        if self.agent:
            self.agent.kill()
            self.agent.wait()

    @contextmanager
    def addresses(self) -> Iterator[dict[str, str]]:
        """Serve payments, mails and model, and give the environment that tells the agent where."""
        with (
            serve(self.payments.answer) as payments_url,
            serve(self.mails.answer) as mails_url,
            serve(self.model.answer) as model_url,
        ):
            yield {
                **os.environ,
                "PAYMENTS_URL": payments_url,
                "MAILS_URL": mails_url,
                "OPENAI_BASE_URL": f"{model_url}/v1",
                "OPENAI_API_KEY": "none needed",
            }

    def charged(self) -> Counter[str]:
        """How often the money of each order was taken."""
        return Counter(order for order, _ in self.payments.taken)

    def mailed(self) -> Counter[str]:
        """How often each order was confirmed."""
        return Counter(mail["subject"].split()[-1] for mail in self.mails.sent)

    def is_right(self) -> bool:
        """Each order was charged once and confirmed once."""
        return self.charged() == self.mailed() == Counter(list(ORDERS))

    def is_damaged(self) -> bool:
        """Each order was charged more than once, and some mail went out more than once."""
        return min(self.charged().values()) > 1 and max(self.mailed().values()) > 1


def play(title: str, *arguments: str) -> Stage:
    """Play one act: the agent starts, is killed, and is started again."""
    say(bold(title))
    stage = Stage()
    if stage.run_agent(*arguments) >= 0:
        raise SystemExit("the agent ended without having been killed")
    say(bold("  the agent is started again"))
    if stage.run_agent(*arguments) != 0:
        raise SystemExit("the agent did not end as it should after the restart")
    stage.over.set()
    say("")
    return stage


# ── the bill ──────────────────────────────────────────────────────────────────────────────────────


def print_bills(without: Stage, guarded: Stage) -> None:
    """Print what each order has cost in both acts, side by side."""
    titles = f"{'without the guard':^28}   {'with the guard':>21}"
    columns = f"{'charged':>8}{'taken':>12}{'mails':>8}"
    say(bold(f"{'The bill':<20}{titles}"))
    say(f"{'order':<8}{'due':>9}   {columns}   {columns}")
    for order, price in ORDERS.items():
        say(f"{order:<8}{price:>9.2f}   {costs(without, order)}   {costs(guarded, order)}")
    say(f"{'total':<8}{sum(ORDERS.values()):>9.2f}   {costs(without)}   {costs(guarded)}   EUR")
    say(f"\nwithout the guard: {verdict(without)}\nwith the guard:    {verdict(guarded)}")


def costs(stage: Stage, *orders: str) -> str:
    """Times charged, money taken and mails sent, for these orders or for all."""
    charged = sum(stage.charged()[order] for order in orders or ORDERS)
    mailed = sum(stage.mailed()[order] for order in orders or ORDERS)
    money = sum(amount for order, amount in stage.payments.taken if order in (orders or ORDERS))
    return f"{f'{charged} ×':>8}{money:>12.2f}{mailed:>8}"


def verdict(stage: Stage) -> str:
    """One line on what was taken and sent beyond what was due."""
    if stage.is_right():
        return coloured("✓ right, each order was charged once and confirmed once", GREEN)
    money = sum(amount for _, amount in stage.payments.taken) - sum(ORDERS.values())
    mails = stage.mailed().total() - len(ORDERS)
    return coloured(f"✗ wrong by {money:.2f} EUR and {mails} mails", RED)


def print_keys(guarded: Stage) -> None:
    """Print why the second bill is right."""
    say("\nThe bill is right because the key travels to the payment service:")
    for order in ORDERS:
        keys = [key for name, key in guarded.payments.requests if name == order]
        known = " and ".join(sorted({str(key) for key in keys}))
        taken = guarded.charged()[order]
        say(f"  {order}: asked {len(keys)} × with the key {known}, money taken {taken} ×")


def print_ledger(path: str, workflow: str) -> None:
    """Print what the ledger has recorded, and where it lies."""
    say(f"\n{bold('guard.log()')}")
    guard.log()
    say(f"\n{bold('guard.history(): the runs of charge_card')}")
    for call in guard.history(tool="charge_card", wf=workflow):
        runs = ", then ".join(describe(run) for run in call["runs"])
        say(f"  {call['args']['order_id']}: {runs}")
    say(f"\nledger.db lies at {path}")


def describe(run: dict[str, Any]) -> str:
    """The status of a run in the words of this play."""
    reasons = {"failed": f" ({run['error']})", "doubt": " (killed, outcome unknown)"}
    return f"{run['status']}{reasons.get(run['status'], '')}"


# ── the screen ────────────────────────────────────────────────────────────────────────────────────

BOLD, RED, GREEN = 1, 31, 32


def say(line: str) -> None:
    """Print a line at once, because the agent writes to the same place."""
    print(line, flush=True)


def coloured(text: str, colour: int) -> str:
    """The text in colour, on a terminal only."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{colour}m{text}\033[0m"


def bold(text: str) -> str:
    """The text in bold, on a terminal only."""
    return coloured(text, BOLD)


# ── the play ──────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    """Play both acts, print both bills, and say whether they are what they should be."""
    path = os.environ.get("LEDGER_DB") or f"{tempfile.mkdtemp(prefix='ledger-demo-')}/ledger.db"
    # Both for the agent too. The workflow is new, so that a file used before does no harm.
    os.environ["LEDGER_DB"] = path
    os.environ["LEDGER_WORKFLOW"] = workflow = f"demo-{uuid.uuid4().hex[:8]}"
    # The agent's own lines say the same as the notices; LEDGER_QUIET=0 shows both.
    os.environ.setdefault("LEDGER_QUIET", "1")

    without = play("Without the guard")
    guarded = play("With the guard: guard.wrap_tools(tools, blocked_return=tell_model)", "--guard")
    print_bills(without, guarded)
    if guarded.is_right():
        print_keys(guarded)
    print_ledger(path, workflow)
    return 0 if without.is_damaged() and guarded.is_right() else 1


if __name__ == "__main__":
    sys.exit(main())
