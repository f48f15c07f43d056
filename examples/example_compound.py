"""A prompt becomes a plan, and a command does its subtasks: as many at once as their dependencies allow.

    python examples/example_compound.py

The command stands in for a model's command line and prints what `claude -p --output-format json` prints. The
real one is CommandExecutor(["claude", "-p", "--model", "{model}", "--output-format", "json"]). One subtask
fails, what depends on it is blocked, and the rest goes on. LEDGER_DB may name a server instead of a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from ledger_tasks import CommandExecutor, CompoundRunner, TaskLedger

#: reads its prompt, thinks for a moment, and answers with its bill
MODEL = """
import json, sys, time
model, prompt = sys.argv[1], sys.stdin.read()
time.sleep(0.1)
task = prompt.splitlines()[0]
if "price" in task:
    sys.exit("the shop does not answer")
print(json.dumps({
    "result": f"{model}: {task}: done, knowing {prompt.count('Result of subtask')} results",
    "total_cost_usd": len(prompt) / 10_000, "usage": {"input_tokens": len(prompt) // 4, "output_tokens": 30},
}))
"""
PLAN = (
    # description, tier, depends on
    ("list the libraries", 1, ()),
    ("read the first one's manual", 1, (0,)),
    ("read the second one's manual", 1, (0,)),
    ("find the price of each", 1, (0,)),
    ("compare the two", 3, (1, 2)),
    ("advise what to buy", 2, (3, 4)),
)


def planner(prompt: str) -> dict[str, Any]:
    """What a model would have planned."""
    keys = ("description", "tier_hint", "depends_on")
    subtasks = [{"index": number, **dict(zip(keys, line, strict=True))} for number, line in enumerate(PLAN)]
    return {"reasoning": f"to {prompt!r}, read first and compare then", "subtasks": subtasks}


def follow(runner: CompoundRunner, compound: str) -> dict[str, Any]:
    """Print where it stands whenever that changed, until it has ended."""
    shown = ""
    while True:
        found = runner.progress(compound)
        marks = {"completed": "#", "failed": "!", "executing": ">", "queued": "=", "routing": "?"}
        line = "".join(marks.get(subtask["status"], ".") for subtask in found["subtasks"])
        line = f"  [{line}] {found['completed_count']} of {found['subtask_count']}, {found['status']}"
        if line != shown:
            print(line)
            shown = line
        if found["completed_at"]:
            return found
        time.sleep(0.02)


def main() -> None:
    """Submit a prompt, follow it, and print the results and the bill."""
    url = os.environ.get("LEDGER_DB") or str(Path(tempfile.mkdtemp()) / "ledger.db")
    tasks = TaskLedger(url, agent="example", session=f"compound-{uuid.uuid4().hex[:8]}")
    execute = CommandExecutor([sys.executable, "-c", MODEL, "{model}"])
    with CompoundRunner(tasks, planner, execute, parallel=3, timeout=30) as runner:
        made = runner.submit("which of these two libraries shall we buy?")
        print(f"submitted: {made['subtask_count']} subtasks, {made['status']}")
        found = follow(runner, made["id"])
        for subtask in found["subtasks"]:
            print(f"{subtask['index']} {subtask['status']:<9} {subtask['model']:<6} {subtask['result'][:90]}")
        print(f"{found['status']}: {found['total_cost']:.4f} USD, {found['total_tokens']} tokens; the bill:")
        runner.export()


if __name__ == "__main__":
    main()
