"""`ledger tasks run` and `workers`: real workers, in a pipe and on a terminal, and how they end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger_tasks import Task, TaskLedger, TaskState
from tests.actors import eventually
from tests.cli_kit import Background, Done, Terminal, run
from tests.tasks.cli_tasks_kit import ledger, ok

#: handlers with a guarded tool that counts its effects in a file; `gate` waits until a file is there
JOBS = """
import os, time
from pathlib import Path
from ledger import guard

HERE = Path(__file__).parent

@guard.once(name="send", replay=True)
def send(to):
    with (HERE / "effects").open("a") as effects:
        effects.write(to + "\\n")
    return "sent to " + to

def mail(task, context):
    return send(task.payload["to"])

def bad(task, context):
    print("a handler prints")
    raise ValueError("no \\x1b[2J way")

def gate(task, context):
    context.progress(0.5, "at the gate")
    while not (HERE / "open").exists():
        if context.cancelled:
            return
        time.sleep(0.01)
    return "through"

def mail_and_gate(task, context):
    send(task.payload["to"])
    return gate(task, context)

def half(task, context):
    send(task.payload["to"])
    raise RuntimeError("and then no more")

async def twice(task, context):
    return 2 * task.payload

def stubborn(task, context):
    while True:
        time.sleep(0.01)

handlers = {
    "mail": mail, "bad": bad, "gate": gate, "twice": twice, "stubborn": stubborn, "half": half,
    "mail_and_gate": mail_and_gate,
}
nothing = None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a worker is started, with a module of handlers in it."""
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


@pytest.fixture
def tasks(folder: Path) -> Iterator[TaskLedger]:
    """The ledger in that folder."""
    found = TaskLedger(folder / "ledger.db", agent="boss", quiet=True)
    yield found
    found.close()


def work(
    folder: Path, *words: object, what: str = "jobs:handlers", env: dict[str, str] | None = None
) -> Done:
    """Run a worker there until nothing is left to do."""
    return run("tasks", "run", what, "--until-idle", *words, cwd=folder, env=env)


def state(tasks: TaskLedger, name: str) -> TaskState:
    """Where a task stands."""
    return tasks.get(name).state


# -- in a pipe --


def test_a_worker_prints_a_line_for_each_run_that_ended(folder: Path, tasks: TaskLedger) -> None:
    """Done, failed and tried again; what others wrote cannot move the cursor; it ends with 0 and a sum."""
    tasks.add_tasks([Task("a", type="mail", payload={"to": "ann"}), Task("b", type="bad", max_retries=1)])

    done = work(folder, "--agent", "robot", "-c", 1)

    told = [line.partition("UTC  ")[2].split() for line in done.out.splitlines() if "UTC" in line]
    assert 0 == done.code
    assert [["✓", "done", "a"], ["✗", "failed", "b"], ["✗", "failed", "b"]] == [words[:3] for words in told]
    assert ["→", "pending"] == told[1][-2:]
    assert ["→", "dead"] == told[2][-2:]
    assert "\x1b" not in done.out + done.err
    assert (
        "robot takes mail, bad, gate, twice, stubborn, half, mail_and_gate of session main, 1 at once"
        in done.err
    )
    assert "1 done, 2 failed" in done.err.splitlines()[-1]
    assert "in bad" in done.err, "the traceback of a handler"


def test_a_worker_prints_json_lines_alone(folder: Path, tasks: TaskLedger) -> None:
    """With --json stdout has a line for each run and nothing else: what handlers print goes to stderr."""
    tasks.add_tasks([Task("x", type="twice", payload=21), Task("b", type="bad")])

    done = work(folder, "--json", "--agent", "robot", "-c", 1)

    first, second = map(json.loads, done.out.splitlines())
    assert ("x", "main", "robot", "done", "", 42, "") == tuple(
        first[name] for name in ("task", "session", "agent", "state", "then", "result", "why")
    )
    assert ("b", "failed", "", "ValueError: no \x1b[2J way") == tuple(
        second[name] for name in ("task", "state", "then", "why")
    )
    assert first["seconds"] > 0
    assert "a handler prints" in done.err


def test_one_function_takes_every_type_of_its_session(folder: Path, tasks: TaskLedger) -> None:
    """MODULE:NAME may be a function; tasks of another session and what it cannot do are left alone."""
    other = tasks.in_session("other")
    other.add_tasks(
        [
            Task("a", type="any", payload=1),
            Task("py", payload=2, capabilities=("python",)),
            Task("c", payload=3),
        ]
    )
    tasks.add_task("here", payload=4)

    work(folder, "--session", "other", "--capability", "go", what="jobs:twice")
    first = [state(other, name) for name in ("a", "py", "c")]
    work(folder, "--session", "other", "--can", "python", what="jobs:twice")

    assert [TaskState.DONE, TaskState.PENDING, TaskState.DONE] == first
    assert 4 == other.get("py").result
    assert TaskState.PENDING == state(tasks, "here")


@pytest.mark.parametrize("where", ["ledger.db", "json:agent_data"])
def test_the_guard_of_the_module_keeps_its_calls_beside_the_tasks(folder: Path, where: str) -> None:
    """LEDGER_DB is set where it is not, so that a worker elsewhere would find what was done."""
    url = f"json:{folder / 'agent_data'}" if where.startswith("json:") else str(folder / where)
    tasks = TaskLedger(url, quiet=True)
    tasks.add_task(Task("a", type="mail", payload={"to": "ann"}))

    done = work(folder, "--db", url)

    calls = folder / ("agent_data/calls.db" if where.startswith("json:") else where)
    assert "✓ done" in done.out
    assert [("send", "task:a")] == [(row["tool"], row["workflow"]) for row in run("show", calls).rows]
    tasks.close()


def test_a_ledger_that_the_environment_names_stays_the_guards(folder: Path, tasks: TaskLedger) -> None:
    """What LEDGER_DB says is not overruled by --db, which is about the tasks."""
    tasks.add_task(Task("a", type="mail", payload={"to": "ann"}))

    work(folder, "--db", folder / "ledger.db", env={"LEDGER_DB": str(folder / "calls.db")})

    assert ["send"] == [row["tool"] for row in run("show", folder / "calls.db").rows]


def test_a_retry_replays_and_a_fresh_one_does_it_again(folder: Path, tasks: TaskLedger) -> None:
    """`retry --fresh` begins a new workflow; `show` names it, the scope and the payload."""
    tasks.add_task(Task("a", type="half", payload={"to": "ann"}))
    db, effects = folder / "ledger.db", folder / "effects"
    work(folder)

    ok(db, "retry", "a", "--reason", "again")
    work(folder)
    after_retry = effects.read_text()
    told = ledger(db, "retry", "a", "--reason", "the address was wrong", "--fresh").out
    work(folder)

    assert ("ann\n", "ann\nann\n") == (after_retry, effects.read_text())
    assert "its tools run anew, in workflow task:a#1" in told
    found, text = ok(db, "show", "a"), ledger(db, "show", "a").out
    assert ("task:a#1", 1, {"to": "ann"}) == (found["workflow"], found["scope"], found["payload"])
    for word in ("task:a#1", 'payload    {"to": "ann"}', "scope      1"):
        assert word in text


def test_options_reach_the_worker(folder: Path, tasks: TaskLedger) -> None:
    """The rate lets two begin and not the third; the breaker pauses a type after its second failure."""
    tasks.add_tasks([Task(f"m{n}", type="mail", payload={"to": str(n)}) for n in range(3)])
    tasks.add_tasks([Task(f"b{n}", type="bad") for n in range(3)])
    words = ("--rate", "mail=2/h", "--breaker-after", 2, "--breaker-for", "1h", "-c", 1, "--json")

    with Background("tasks", "run", "jobs:handlers", *words, cwd=folder) as worker:
        ended = [json.loads(worker.line()) for _ in range(4)]
        worker.process.send_signal(signal.SIGTERM)
        done = worker.ends()

    assert (0, "") == (done.code, done.out)
    assert ["b0", "b1", "m0", "m1"] == sorted(one["task"] for one in ended)
    assert "keep failing" in done.err


# -- how it ends --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_begun_end(folder: Path, tasks: TaskLedger, number: signal.Signals) -> None:
    """Nothing more is taken, the task in hand is done, and the exit code is 0."""
    tasks.add_task(Task("a", type="gate"))

    with Background("tasks", "run", "jobs:handlers", "-c", 1, cwd=folder) as worker:
        eventually(lambda: "at the gate" == tasks.get("a").stage)
        tasks.add_task(Task("late", type="twice", payload=1))
        worker.process.send_signal(number)
        (folder / "open").touch()
        done = worker.ends()

    assert 0 == done.code
    assert [TaskState.DONE, TaskState.PENDING] == [state(tasks, "a"), state(tasks, "late")]
    assert "1 done, 0 failed" in done.err
    [info] = tasks.workers()
    assert info.ended


def test_what_does_not_end_in_time_is_given_back(folder: Path, tasks: TaskLedger) -> None:
    """After --grace handlers are told; what they had is pending again, for whoever comes next."""
    tasks.add_task(Task("a", type="gate"))

    with Background("tasks", "run", "jobs:handlers", "--grace", "0.3", cwd=folder) as worker:
        eventually(lambda: "at the gate" == tasks.get("a").stage)
        worker.process.send_signal(signal.SIGTERM)
        done = worker.ends()

    assert 0 == done.code
    assert TaskState.PENDING == state(tasks, "a")
    assert "○ pending   a" in done.out
    assert "may go on for 0.3 s" in done.err
    assert "1 given back or taken away" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(folder: Path, tasks: TaskLedger, number: signal.Signals) -> None:
    """However long its handlers would go on; the cursor that the live view hid is there again."""
    tasks.add_task(Task("a", type="stubborn"))

    with Terminal("tasks", "run", "jobs:handlers", "--grace", "1h", cwd=folder) as worker:
        eventually(lambda: state(tasks, "a") == TaskState.ACTIVE)
        worker.process.send_signal(number)
        worker.sees("once more ends it at once")
        worker.process.send_signal(number)
        done = worker.ends()

    assert -number == done.code
    assert done.out.rindex("\x1b[?25h") > done.out.rindex("\x1b[?25l")
    assert TaskState.ACTIVE == state(tasks, "a")


def test_a_reader_that_goes_away_ends_it_gracefully(folder: Path, tasks: TaskLedger) -> None:
    """As by `| head -1`: nobody wants to know any more."""
    tasks.add_tasks([Task("x", type="twice", payload=1), Task("y", type="twice", payload=1)])

    with Background("tasks", "run", "jobs:handlers", "-c", 1, cwd=folder, reads=False) as worker:
        assert worker.process.stdout is not None
        worker.process.stdout.close()
        code = worker.process.wait(60)

    assert 0 == code


def test_a_task_of_a_killed_worker_goes_on_where_it_was(folder: Path, tasks: TaskLedger) -> None:
    """SIGKILL after the guarded tool: the next worker does not do it again."""
    tasks.add_task(Task("a", type="mail_and_gate", payload={"to": "ann"}))
    words = ("tasks", "run", "jobs:handlers", "--lease", "1")
    with Background(*words, cwd=folder) as first:
        eventually(lambda: "at the gate" == tasks.get("a").stage)
        first.process.kill()
        first.process.wait(60)
    (folder / "open").touch()

    with Background(*words, cwd=folder) as second:
        line = second.line()
        second.process.send_signal(signal.SIGTERM)
        done = second.ends()

    assert 0 == done.code
    assert "✓ done      a" in line
    assert "ann\n" == (folder / "effects").read_text()


# -- on a terminal --


def test_a_worker_is_a_live_view_on_a_terminal(folder: Path, tasks: TaskLedger) -> None:
    """What it is doing and how far, what it has done; Ctrl-C says how long it may take and ends with 0."""
    tasks.add_tasks([Task("x", type="twice", payload=1), Task("a", type="gate"), Task("b", type="bad")])

    with Terminal("tasks", "run", "jobs:handlers", "--db", folder / "ledger.db", cwd=folder) as worker:
        worker.sees("at the gate")
        worker.sees("✓ 1 done")
        worker.sees("✗ 1 failed")
        worker.press("\x03")
        worker.sees("a task may go on for 30 s; once more ends it at once")
        (folder / "open").touch()
        done = worker.ends()

    assert 0 == done.code
    assert "2 done, 1 failed" in done.out.splitlines()[-1]
    assert TaskState.DONE == state(tasks, "a")


# -- what cannot be worked with --


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("jobs",), "'jobs' is none"),
        (("nojobs:handlers",), "there is no module 'nojobs'; it is looked for in "),
        (("jobs:handler",), "module 'jobs' has no 'handler'; look for its name in "),
        (("jobs:nothing",), "give a dict of task types and functions"),
        (("broken:handlers",), "module 'broken' cannot be imported: ValueError: no \\x1b[2J way"),
        (("needs:handlers",), "module 'needs' cannot be imported: ModuleNotFoundError"),
        (("jobs:handlers", "--rate", "mail=often"), "the rate 'often' is none"),
        (("jobs:handlers", "--rate", "10/s"), "names no type"),
        (("jobs:handlers", "--rate", "fax=1/s"), "rate names fax, which has no handler"),
        (("jobs:handlers", "--no-breaker", "--breaker-after", 3), "exclude each other"),
    ],
)
def test_what_it_cannot_work_with_is_told_as_misuse(
    folder: Path, tasks: TaskLedger, words: tuple[object, ...], said: str
) -> None:
    """Nothing is begun then."""
    tasks.add_task(Task("a", type="mail", payload={"to": "ann"}))
    (folder / "broken.py").write_text('raise ValueError("no \x1b[2J way")')
    (folder / "needs.py").write_text("import something_that_is_not_there")

    done = run("tasks", "run", *words, cwd=folder)

    assert (2, "") == (done.code, done.out)
    assert said in done.err
    assert [] == tasks.workers()
    assert 1 == tasks.last_seq()


# -- the list of workers --


def test_workers_are_listed_with_what_they_are_doing(folder: Path, tasks: TaskLedger) -> None:
    """Who lives, since when, at what, and how many of its runs ended well."""
    tasks.add_tasks([Task("x", type="twice", payload=1), Task("b", type="bad")])
    work(folder, "--agent", "early")
    tasks.add_task(Task("a", type="gate"))
    db = folder / "ledger.db"

    with Background("tasks", "run", "jobs:gate", "--agent", "late", cwd=folder) as worker:
        eventually(lambda: "at the gate" == tasks.get("a").stage)
        found, alive, rows = ok(db, "workers"), ok(db, "workers", "--alive"), ledger(db, "workers").rows
        pid = worker.process.pid

    assert [("late", True, ["a"], None), ("early", False, [], 0.5)] == [
        (one["agent"], one["alive"], one["doing"], one["success_rate"]) for one in found
    ]
    assert ["late"] == [one["agent"] for one in alive]
    assert pid == found[0]["pid"]
    assert ["● alive", "○ ended"] == [row["state"] for row in rows]
    assert ("a", "50%", "*") == (rows[0]["doing"], rows[1]["success"], rows[0]["types"])


def test_without_workers_the_list_says_how_to_start_one(folder: Path, tasks: TaskLedger) -> None:
    """An empty list is no failure."""
    tasks.add_task("a")

    done = ledger(folder / "ledger.db", "workers")

    assert (0, "") == (done.code, done.out)
    assert "no worker was seen; start one: ledger tasks run MODULE:NAME" in done.err


# -- what a handler needs to know --


def test_a_payload_is_added_as_json(folder: Path) -> None:
    """Given as an option or read from stdin; what is no JSON is a usage error and adds nothing."""
    db = folder / "ledger.db"

    given = ok(db, "add", "a", "--payload", '{"to": ["ann", 1.5, null]}')
    read = run("tasks", "add", "b", "--payload", "-", "--json", "--db", db, input='"text"').json
    bad = ledger(db, "add", "c", "--payload", "{to: ann}")

    assert ({"to": ["ann", 1.5, None]}, "text") == (given["payload"], read["payload"])
    assert (2, "") == (bad.code, bad.out)
    assert "is no JSON" in bad.err
    assert "--payload" in bad.err
    assert ["a", "b"] == [task["id"] for task in ok(db, "list")]
