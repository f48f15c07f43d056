"""Chaos: eight workers, two thousand calls, and kill -9 at any moment."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from ledger import Guard
from tests.actors import Actor, Stage

KEYS = 2000
WORKERS = 8
KILLS = 60

# The service takes the money once per idempotency key, as a payment provider does: a file that
# can be made only once. The tool notes when it begins and ends, in a file that is only appended to.
WORKER = f"""
import random

order = list(range({KEYS}))
random.Random(int(sys.argv[2])).shuffle(order)

def service(key, token):
    try:
        os.close(os.open(os.path.join(DB + ".service", token), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        effect("charged", key, token, os.getpid())
    except FileExistsError:
        pass

def charge(key):
    effect("begin", key, idempotency_key(), os.getpid(), current().run)
    service(key, idempotency_key())
    if random.random() < 0.03:
        time.sleep(0.02)
    effect("end", key, idempotency_key(), os.getpid(), current().run)
    return key

guard.policy(charge, replay=int(sys.argv[2]) % 2 == 0)
say("ready")

def work(keys):
    for key in keys:
        guard(charge, key)

# every third worker has threads, so that a kill also meets transactions with several claims
lanes = 4 if int(sys.argv[2]) % 3 == 0 else 1
threads = [threading.Thread(target=work, args=(order[lane::lanes],)) for lane in range(lanes)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
def test_kills_at_random_moments_never_charge_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many workers are killed, each call ends once, and none runs beside or after its success."""
    dice = random.Random(20_240_229)
    began = time.monotonic()
    (tmp_path / "ledger.db.service").mkdir()
    killed: set[int] = set()

    with Stage(tmp_path) as stage:
        workers: list[Actor] = [stage.start(WORKER, number) for number in range(WORKERS)]
        while workers:
            time.sleep(dice.uniform(0.01, 0.12))
            victim = dice.choice(workers)
            if len(killed) < KILLS:
                note(stage, f"killing {victim.pid}")
                victim.kill()
                killed.add(victim.pid)
                workers.append(stage.start(WORKER, WORKERS + len(killed)))
                workers.remove(victim)
            ended = [worker for worker in workers if worker.state() in ("", "Z")]
            for worker in ended:
                worker.ends_well()
                workers.remove(worker)
        lines = [line.split() for line in stage.effects()]

    entries = Guard(stage.db, quiet=True).history()
    stats = Guard(stage.db, quiet=True).stats()
    charged = Counter(line[1] for line in lines if line[0] == "charged")
    tokens: dict[str, set[str]] = {}
    for line in (line for line in lines if line[0] != "killing"):
        tokens.setdefault(line[1], set()).add(line[2])
    services = len(list((tmp_path / "ledger.db.service").iterdir()))
    runs = sum(line[0] == "begin" for line in lines)
    doubts = sum(run["status"] == "doubt" for entry in entries for run in entry["runs"])
    took = time.monotonic() - began

    with capsys.disabled():
        print(
            f"\n  chaos: {WORKERS} workers, {KEYS} calls, {len(killed)} killed; {runs} runs entered, "
            f"{doubts} in doubt and taken over, {services} charges, {stats['blocked']} duplicates "
            f"answered, {took:.1f} s"
        )
    assert len(entries) == KEYS
    assert {entry["status"] for entry in entries} == {"success"}
    assert [sum(run["status"] == "success" for run in entry["runs"]) for entry in entries] == [1] * KEYS
    assert services == KEYS  # killed between the charge and its note: the file is there, the note is not
    assert max(charged.values()) == 1
    assert all(len(seen) == 1 for seen in tokens.values())  # a takeover carries the same key
    assert_one_run_at_a_time(lines)
    assert took < 60


def note(stage: Stage, text: str) -> None:
    """Add a line to the effects: what stands before it happened before now."""
    with Path(f"{stage.db}.effects").open("ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def assert_one_run_at_a_time(lines: list[list[str]]) -> None:
    """A run begins only after a kill was aimed at the process that had the run before it."""
    owner: dict[str, int] = {}
    killed: set[int] = set()
    seen: set[tuple[str, str]] = set()
    for line in lines:
        if line[0] == "killing":
            killed.add(int(line[1]))
        if line[0] == "begin":
            _, key, _, pid, run = line
            assert (key, run) not in seen
            seen.add((key, run))
            assert key not in owner or owner[key] in killed
            owner[key] = int(pid)
