"""`ledger compound`: real processes that plan and execute, in a pipe and on a terminal, and how they end."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ledger_cli.compound import COMMANDS
from ledger_cli.compound_grids import branches
from ledger_tasks import CompoundRunner, TaskLedger
from ledger_tasks import compound_view as view
from tests.actors import eventually
from tests.cli_kit import Background, Done, Terminal, run
from tests.tasks.compound_kit import answers, plan, step

PLANS = '''
import time
from pathlib import Path

HERE = Path(__file__).parent

def subtask(index, *depends_on, tier=1):
    told = f"step {index}"
    return {"index": index, "description": told, "tier_hint": tier, "depends_on": list(depends_on)}

def make(prompt):
    """Two in parallel, one after both."""
    return {"reasoning": "because", "subtasks": [subtask(0), subtask(1, tier=2), subtask(2, 0, 1, tier=3)]}

def circle(prompt):
    return {"reasoning": "", "subtasks": [subtask(0, 1), subtask(1, 0)]}

def raises(prompt):
    raise ValueError("no \\x1b[2J plan")

def do(subtask):
    with (HERE / "done").open("a") as done:
        done.write(f"{subtask['index']}\\n")
    print("an execution prints")
    return {"result": f"did {subtask['index']} of {subtask['prompt']}", "tokens": 10}

def half(subtask):
    if subtask["index"] == 1:
        raise ConnectionError("the server is away")
    return do(subtask)

def gate(subtask):
    """The second subtask waits until a file is there."""
    while subtask["index"] == 1 and not (HERE / "open").exists():
        time.sleep(0.01)
    return do(subtask)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a compound is submitted, with a module of plans in it."""
    (tmp_path / "plans.py").write_text(PLANS)
    return tmp_path


@pytest.fixture
def tasks(folder: Path) -> Iterator[TaskLedger]:
    """The ledger in that folder."""
    found = TaskLedger(folder / "ledger.db", agent="boss", quiet=True)
    yield found
    found.close()


def compound(folder: Path, *words: object, input: str | None = None) -> Done:
    """Run `ledger compound` there."""
    return run("compound", *words, cwd=folder, input=input)


def submit(folder: Path, *words: object, planner: str = "plans:make") -> Done:
    """Submit a prompt there, to be called c-1."""
    return compound(folder, "submit", "two libraries", "--planner", planner, "--id", "c-1", *words)


def plain(text: str) -> str:
    """What a terminal was told, without its colours and moves."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def shows(terminal: Terminal, text: str) -> bool:
    """Whether it was told this, in whatever colours."""
    return text in plain(terminal.text)


def executed(folder: Path) -> list[str]:
    """The subtasks that were executed, in order."""
    return (folder / "done").read_text().split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """`-h` says in one line what it does, and gives an example and the form of its JSON."""
    done = run("compound", name, "-h")
    listed = run("compound", "-h").out

    assert (0, "") == (done.code, done.err)
    usage, _, summary = done.out.split("\n")[:3]
    assert usage.startswith(f"Usage: ledger compound {name} ")
    assert 10 < len(summary.strip()) < 70
    assert re.search(rf"^  {name} +\S.*[^.]\.$", listed, re.MULTILINE)
    assert f"ledger compound {name}" in done.out.partition("\nExamples:\n")[2]
    assert "\nJSON:\n" in done.out


# -- from the plan to the end --


def test_a_prompt_is_planned_and_executed_to_its_end(folder: Path) -> None:
    """In a pipe there is a line for each subtask as it ends, then the sum; the exit code is 0."""
    done = submit(folder, "--execute", "plans:do", "--results")

    assert (0, "") == (done.code, done.err)
    assert ["0", "1", "2"] == sorted(executed(folder))
    assert "2" == executed(folder)[-1]
    ended = re.findall(r"^✓ (\d)  step \d  (\w+)", done.out, re.MULTILINE)
    assert {("0", "haiku"), ("1", "sonnet"), ("2", "opus")} == set(ended)
    assert re.search(r"^c-1  ✓ completed  █+ 3 of 3  \$0.198  30 tokens", done.out, re.MULTILINE)
    assert "reasoning  because" in done.out
    assert "did 2 of two libraries" in done.out


def test_with_json_the_full_picture_is_printed_alone(folder: Path, tasks: TaskLedger) -> None:
    """What executions print goes to stderr; a failed subtask blocks what waits for it; the code is 1."""
    done = submit(folder, "--execute", "plans:half", "--json")

    assert 1 == done.code
    assert view.progress(tasks, "c-1") == done.json
    assert ["completed", "failed", "failed"] == [one["status"] for one in done.json["subtasks"]]
    assert "partial" == done.json["status"]
    assert "an execution prints" in done.err


def test_a_command_executes_subtasks_with_a_model_of_its_tier(folder: Path, tasks: TaskLedger) -> None:
    """Its words are taken as they are, with the model in them; the table of tiers can be replaced."""
    script = "echo $0 read $(cat)"

    done = submit(folder, "--tier", "3=big:1.5", "-p", 1, "--", "sh", "-c", script, "{model}")

    found = view.progress(tasks, "c-1")
    assert 0 == done.code, done.err
    assert ["haiku", "sonnet", "big"] == [one["model"] for one in found["subtasks"]]
    assert 1.548 == found["total_cost"]
    assert all(str(one["result"]).startswith(f"{one['model']} read ") for one in found["subtasks"])


def test_what_is_submitted_again_is_gone_on_with(folder: Path) -> None:
    """With the same id it is not planned anew, and nothing is executed twice."""
    submit(folder, "--execute", "plans:do")

    again = submit(folder, "--execute", "plans:do", planner="plans:raises")

    assert 0 == again.code, again.err
    assert ["0", "1", "2"] == sorted(executed(folder))


def test_a_prompt_comes_from_stdin_and_is_executed_elsewhere(folder: Path, tasks: TaskLedger) -> None:
    """--detach only adds it; `run --until-idle` executes what was added so, and tells of each that ended."""
    first = compound(
        folder, "submit", "-", "--planner", "plans:make", "--detach", "--json", input="from stdin"
    )
    second = compound(folder, "submit", "again", "--planner", "plans:make", "--detach")
    not_begun = [one["status"] for one in view.recent(tasks)]

    done = compound(folder, "run", "--execute", "plans:do", "--until-idle", "--json")

    assert (0, 0, 0) == (first.code, second.code, done.code), done.err
    assert ("planned", 3) == (first.json["status"], first.json["subtask_count"])
    assert "then: ledger compound run -- COMMAND" in second.out
    assert ["planned", "planned"] == not_begun
    ended = [json.loads(line) for line in done.out.splitlines()]
    assert {("from stdin", "completed"), ("again", "completed")} == {
        (one["prompt"], one["status"]) for one in ended
    }
    assert 6 == len(executed(folder))


def test_a_runner_leaves_alone_what_was_named_for_others(folder: Path, tasks: TaskLedger) -> None:
    """By its name, and what is submitted without one is for that process alone."""
    compound(folder, "submit", "a", "--planner", "plans:make", "--detach", "--name", "research")
    with CompoundRunner(tasks, plan(step(0)), answers, name="c-2", start=False) as other:
        other.submit("b", id="c-2")

    done = compound(folder, "run", "--execute", "plans:do", "--until-idle")
    named = compound(folder, "run", "--execute", "plans:do", "--until-idle", "--name", "research")

    assert (0, "", 0) == (done.code, done.out, named.code)
    assert ["planned", "completed"] == [one["status"] for one in view.recent(tasks)]


# -- told to end --


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_told_to_end_says_how_to_go_on(folder: Path, number: signal.Signals) -> None:
    """Nothing that was finished is done again by the command that it prints."""
    words = ("submit", "two libraries", "--planner", "plans:make", "--id", "c-1", "--execute", "plans:gate")
    with Background("compound", *words, cwd=folder) as first:
        assert first.line().startswith("an execution prints")
        assert first.line().startswith("✓ 0  step 0")
        first.process.send_signal(number)
        told = first.ends()
    further = told.err.partition("to go on: ")[2].strip()
    (folder / "open").touch()

    done = run(*shlex.split(further)[1:], cwd=folder)

    assert 128 + number == told.code
    assert "c-1 is not over, and nothing of it is executed now" in told.err
    assert "ledger compound run --id c-1 --execute plans:gate" == further
    assert 0 == done.code, done.err
    assert ["0", "1", "2"] == executed(folder)


def test_a_compound_of_a_killed_process_goes_on(folder: Path, tasks: TaskLedger) -> None:
    """SIGKILL in the midst: `run --id` executes what was not finished, and that alone."""
    words = (
        "submit",
        "two",
        "--planner",
        "plans:make",
        "--id",
        "c-1",
        "--execute",
        "plans:gate",
        "--lease",
        "1",
    )
    with Background("compound", *words, cwd=folder) as first:
        eventually(lambda: "0" in executed(folder) if (folder / "done").exists() else False)
        eventually(lambda: "completed" == view.progress(tasks, "c-1")["subtasks"][0]["status"])
        first.process.kill()
        first.process.wait(60)
    (folder / "open").touch()

    done = compound(folder, "run", "--id", "c-1", "--execute", "plans:gate", "--json")

    assert (0, "completed") == (done.code, done.json["status"])
    assert ["0", "1", "2"] == executed(folder)


def test_a_compound_is_a_live_tree_on_a_terminal(folder: Path, tasks: TaskLedger) -> None:
    """Each subtask below what it waits for; Ctrl-C ends it with 130, and at the end the tree stays."""
    words = ("submit", "two libraries", "--planner", "plans:make", "--id", "c-1", "--execute", "plans:gate")
    with Terminal("compound", *words, cwd=folder) as terminal:
        for text in ("▶ 1  step 1", "└─ ◔ 2  step 2", "1 of 3"):
            eventually(partial(shows, terminal, text))
        terminal.press("\x03")
        first = terminal.ends()
    (folder / "open").touch()
    with Terminal("compound", "run", "--id", "c-1", "--execute", "plans:gate", cwd=folder) as terminal:
        second = terminal.ends()

    assert (130, 0) == (first.code, second.code)
    assert "Traceback" not in first.out + second.out
    last = plain(second.out).splitlines()
    assert "└─ ✓ 2  step 2  opus" in last[-1]
    assert any("✓ completed" in line and "3 of 3" in line for line in last)
    assert "\x1b[?25h" in second.out


def test_progress_follows_what_is_executed_elsewhere(folder: Path, tasks: TaskLedger) -> None:
    """Without --follow it prints how it stands; with it, it stays to the end."""
    submitted = ("submit", "two", "--planner", "plans:make", "--id", "c-1", "--execute", "plans:gate")
    with Background("compound", *submitted, cwd=folder) as first:
        eventually(lambda: any(one["completed_count"] for one in view.recent(tasks)))
        now = compound(folder, "progress", "c-1").out
        with Background("compound", "progress", "c-1", "--follow", cwd=folder) as follower:
            begins = follower.line()
            (folder / "open").touch()
            done = follower.ends()
        first.ends()

    assert "├─" not in now.splitlines()[-1]
    assert "└─ ◔ 2  step 2" in now
    assert "✓ 0  step 0" in begins
    assert 0 == done.code
    assert "✓ completed" in done.out


# -- looking, cancelling, billing --


def test_compounds_are_listed_cancelled_and_billed(folder: Path, tasks: TaskLedger) -> None:
    """The newest first; what is cancelled stays so; each execution is a line of the bill."""
    submit(folder, "--execute", "plans:half")
    compound(folder, "submit", "x" * 300, "--planner", "plans:make", "--detach", "--id", "c-2")

    cancelled = compound(folder, "cancel", "c-2", "--reason", "asked for twice")
    twice = compound(folder, "cancel", "c-2")
    rows = compound(folder, "list").rows
    bill = [json.loads(line) for line in compound(folder, "export").out.splitlines()]
    written = compound(folder, "export", "bill.jsonl")

    assert (0, "cancelled: c-2; 0 of 3 subtasks were completed\n") == (cancelled.code, cancelled.out)
    assert 1 == twice.code
    assert "has ended: cancelled; nothing was changed" in twice.err
    assert [("c-2", "cancelled", 100), ("c-1", "partial", 13)] == [
        (row["compound"], row["status"], len(row["prompt"])) for row in rows
    ]
    assert [(0, True), (1, False)] == [(one["index"], one["success"]) for one in bill]
    assert "2 executions written to bill.jsonl" in written.err
    assert bill == [json.loads(line) for line in (folder / "bill.jsonl").read_text().splitlines()]


# -- what cannot be begun --


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (
            1,
            ("--planner", "plans:raises", "--execute", "plans:do"),
            "the planner failed: ValueError: no \\x1b[2J plan",
        ),
        (
            1,
            ("--planner", "plans:circle", "--execute", "plans:do"),
            "would wait for each other for ever: 0 → 1 → 0",
        ),
        (2, ("--planner", "plans:nothing", "--execute", "plans:do"), "module 'plans' has no 'nothing'"),
        (2, ("--planner", "plans:HERE", "--execute", "plans:do"), "which cannot be called; name a function"),
        (2, ("--planner", "plans:make"), "say how a subtask is done"),
        (2, ("--planner", "plans:make", "--execute", "plans:do", "--", "cat"), "say how a subtask is done"),
        (2, ("--planner", "plans:make", "--execute", "plans:do", "--tier", "big"), "'big' is no tier"),
        (2, ("--execute", "plans:do"), "--planner"),
    ],
)
def test_what_cannot_be_begun_adds_nothing(
    folder: Path, tasks: TaskLedger, code: int, words: tuple[str, ...], said: str
) -> None:
    """A planner that fails, a plan that is none, and misuse are told; then nothing is in the ledger."""
    tasks.add_task("there")

    done = compound(folder, "submit", "two", *words)

    assert (code, "") == (done.code, done.out)
    assert said in done.err
    assert 1 == tasks.last_seq()


def test_without_a_ledger_nothing_is_made(folder: Path) -> None:
    """Looking, cancelling and executing need one; only `submit` makes it."""
    for words in (("list",), ("progress", "c-1"), ("cancel", "c-1"), ("export",), ("run", "--", "cat")):
        done = compound(folder, *words)

        assert (1, "") == (done.code, done.out)
        assert "there is no ledger at " in done.err
    assert ["plans.py"] == [path.name for path in folder.iterdir()]


# -- the tree --


def test_a_subtask_stands_below_the_last_that_it_waits_for() -> None:
    """However the indices run; what else it waits for is told, and a long chain is not set in for ever."""
    picture = [
        {"index": 0, "depends_on": [1]}, {"index": 1, "depends_on": []}, {"index": 2, "depends_on": [0, 1]},
        {"index": 3, "depends_on": [1]},
    ]  # fmt: skip
    chain = [{"index": n, "depends_on": [n - 1] if n else []} for n in range(3000)]

    found = [(one.before + str(one.subtask["index"]), one.others) for one in branches(picture)]
    deep = list(branches(chain))

    assert [("1", ()), ("├─ 0", ()), ("│  └─ 2", (1,)), ("└─ 3", ())] == found
    assert [*range(3000)] == [one.subtask["index"] for one in deep]
    assert 40 > max(len(one.before) for one in deep)


def test_of_thousands_the_most_interesting_are_shown(folder: Path, tasks: TaskLedger) -> None:
    """What failed and what is executed is among two hundred lines; the rest is counted."""
    made = plan(*(step(n) for n in range(1000)))
    with CompoundRunner(tasks, made, answers, name="c-1", start=False) as runner:
        runner.submit("many", id="c-1")
    claim = tasks.claim_task("c-1.900")
    assert claim is not None
    tasks.start(claim)
    tasks.fail(claim, "no answer")

    lines = compound(folder, "progress", "c-1").out.splitlines()

    assert 3 + 200 == len(lines)
    assert any(line.startswith("✗ 900  step 900") and line.endswith("no answer") for line in lines)
    assert "… and 801 more; --json has them all" == lines[-1]
