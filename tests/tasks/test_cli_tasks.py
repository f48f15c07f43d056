"""`ledger tasks` as its users meet it: agents in shells, people on terminals, programs in pipes."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from ledger_cli.tasks import COMMANDS
from ledger_tasks import Dep, Task, TaskLedger
from tests.actors import eventually
from tests.cli_kit import Background, Terminal, make_shop, on_terminal, run
from tests.tasks.cli_tasks_kit import ledger, ok

ESCAPE = "\x1b"
NASTY = "\x1b[2J\x1b]0;owned\x07 \u202e reversed \x9b31m\ttab\nline"
LOOKING = (
    ("list",),
    ("show", "a"),
    ("tree",),
    ("next",),
    ("events",),
    ("waves",),
    ("path",),
    ("stale",),
    ("dead",),
    ("sessions",),
    ("awareness",),
    ("metrics",),
    ("deliveries",),
    ("workers",),
    ("verify",),
    ("watch", "--until-done"),
    ("export",),
)
MOVING = (
    ("next", "--claim"),
    ("claim", "a"),
    ("start", "a"),
    ("done", "a"),
    ("fail", "a", "no"),
    ("retry", "a"),
    ("cancel", "a"),
    ("recover",),
    ("run", "json:loads"),
    ("depend", "a", "b"),
)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a ledger is, or will be."""
    return tmp_path / "ledger.db"


@pytest.fixture
def tasks(db: Path) -> Iterator[TaskLedger]:
    """The same ledger, for what a test needs beforehand and looks at afterwards."""
    found = TaskLedger(db, agent="boss")
    yield found
    found.close()


def refused(db: Path, *words: object) -> str:
    """Run it where it refuses; what it says on stderr."""
    done = ledger(db, *words)
    assert (1, "") == (done.code, done.out)
    assert done.err.startswith("Error: ")
    return done.err


# -- help --


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """`-h` says in one line what a command does, explains every option and gives an example of it."""
    done = run("tasks", name, "-h")

    assert (0, "") == (done.code, done.err)
    usage, _, summary = done.out.split("\n")[:3]
    assert usage.startswith(f"Usage: ledger tasks {name} ")
    assert 10 < len(summary.strip()) < 70
    assert summary.endswith(".")
    assert f"ledger tasks {name}" in done.out.partition("\nExamples:\n")[2]
    options = done.out.partition("\nOptions:\n")[2].partition("\n\n")[0]
    assert not re.findall(r"^  -\S+( \S+)?$(?!\n {10})", options, re.MULTILINE), "an option without help"
    assert "--json" in options
    assert "\nJSON:\n" in done.out


def test_the_list_of_commands_cuts_no_summary() -> None:
    """`ledger tasks --help` shows each command with its whole line."""
    done = run("tasks", "--help")

    assert 0 == done.code
    assert all(re.search(rf"^  {name} +\S.*\.$", done.out, re.MULTILINE) for name in COMMANDS)
    assert "..." not in done.out.partition("Commands:")[2].partition("Examples:")[0]


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    """An unknown command is a usage error that names a similar one of this group."""
    done = run("tasks", "cancle")

    assert (2, "") == (done.code, done.out)
    assert "cancel" in done.err


def test_the_shell_completes_the_commands_about_tasks() -> None:
    """What a completion script asks for is answered: names of commands of the group."""
    env = {"_LEDGER_COMPLETE": "bash_complete", "COMP_WORDS": "ledger tasks re", "COMP_CWORD": "2"}

    done = run(env=env)

    assert {f"plain,{name}" for name in COMMANDS if name.startswith("re")} == set(done.out.split())


# -- which ledger --


@pytest.mark.parametrize("words", [*LOOKING, *MOVING], ids=" ".join)
def test_without_a_ledger_none_is_made(db: Path, words: tuple[str, ...]) -> None:
    """Neither looking nor moving a task makes a file; it is the same clear error as for other commands."""
    done = ledger(db, *words)

    assert (1, "") == (done.code, done.out)
    assert done.err.startswith(f"Error: there is no ledger at {db}; name the file")
    assert [] == list(db.parent.iterdir())


def test_without_a_folder_of_json_files_none_is_made(tmp_path: Path) -> None:
    """The same holds for json:FOLDER."""
    folder = tmp_path / "agent_data"

    done = run("tasks", "list", "--db", f"json:{folder}")

    assert (1, "") == (done.code, done.out)
    assert f"there is no ledger at json:{folder}" in done.err
    assert not folder.exists()


def test_adding_makes_the_ledger(db: Path) -> None:
    """The first task of all needs no preparation."""
    found = ok(db, "add", "mail", "tell Ann")

    assert ("mail", "tell Ann", "pending", True) == tuple(
        found[name] for name in ("id", "description", "state", "ready")
    )
    assert db.exists()


def test_the_ledger_and_the_agent_may_be_named_by_the_environment(db: Path, tasks: TaskLedger) -> None:
    """LEDGER_DB and LEDGER_AGENT stand for --db and --agent."""
    tasks.add_task("a")

    done = run("tasks", "next", "--claim", "--json", env={"LEDGER_DB": str(db), "LEDGER_AGENT": "robot"})

    assert "robot" == done.json["agent"]
    assert "robot" == tasks.get("a").assignee


def test_sessions_are_apart(db: Path, tasks: TaskLedger) -> None:
    """A command sees the session that it names; --all-sessions sees all."""
    tasks.add_task("a")
    ok(db, "add", "b", "--session", "other")

    assert ["a"] == [task["id"] for task in ok(db, "list")]
    assert ["b"] == [task["id"] for task in ok(db, "list", "--session", "other")]
    assert ["a", "b"] == [task["id"] for task in ok(db, "list", "--all-sessions")]
    assert [("main", 1), ("other", 1)] == [(s["session"], s["tasks"]) for s in ok(db, "sessions")]


def test_an_empty_session_says_where_the_others_are(db: Path, tasks: TaskLedger) -> None:
    """Whoever mistypes a session learns how to find the right one."""
    tasks.add_task("a")

    done = ledger(db, "list", "--session", "mian")

    assert (0, "") == (done.code, done.out)
    assert "ledger tasks sessions" in done.err


# -- an agent in a shell --


def test_an_agent_works_from_a_shell(db: Path, tasks: TaskLedger) -> None:
    """Each step is a process of its own, and the claim is shown by its token."""
    tasks.add_tasks([Task("mail", priority=8), Task("file", depends_on=(Dep("mail"),))])

    claim = ok(db, "next", "--claim", "--agent", "me")
    shown = ("mail", "--token", claim["token"])
    ok(db, "start", *shown)
    ok(db, "progress", "mail", "40%", "collecting", "--tokens", 1200, "--token", claim["token"])
    ok(db, "checkpoint", *shown, "--data", '{"page": 7}')
    ok(db, "artifact", "mail", "draft", "--text", "./draft.md", "--token", claim["token"])
    ended = ok(db, "done", *shown, "--result", '{"sent": 3}', "--cost", 0.5)

    assert ("mail", "me", 300.0) == (claim["task"]["id"], claim["agent"], claim["lease"])
    assert ["file"] == [task["id"] for task in ended["ready"]]
    task = tasks.get("mail")
    assert ("done", "me", {"sent": 3}, {"page": 7}) == (
        task.state,
        task.assignee,
        task.result,
        task.checkpoint,
    )
    assert (1200, 0.5, "collecting", 1.0) == (task.tokens, task.cost, task.stage, task.progress)
    assert "./draft.md" == task.artifacts[0]["value"]
    assert {"boss", "me"} == {event.actor for event in tasks.events("mail")}


def test_a_holder_may_be_named_by_agent_alone(db: Path, tasks: TaskLedger) -> None:
    """Who lost its token still holds its task by its name; nobody else does."""
    tasks.add_task("a")
    ok(db, "claim", "a", "--start", "--agent", "me")

    told = refused(db, "done", "a", "--agent", "you")
    ok(db, "done", "a", "--agent", "me")

    assert "you does not hold task 'a'" in told
    assert "me has it" in told
    assert "done" == tasks.get("a").state


def test_a_claim_that_was_given_up_is_refused(db: Path, tasks: TaskLedger) -> None:
    """The token of an earlier claim moves nothing, also when the same agent has the task anew."""
    tasks.add_task("a")
    first = ok(db, "next", "--claim", "--start", "--agent", "me")
    ok(db, "release", "a", "--token", first["token"], "--reason", "too big")
    ok(db, "next", "--claim", "--start", "--agent", "me")

    told = refused(db, "done", "a", "--token", first["token"])

    assert "does not hold task 'a'" in told
    assert "active" == tasks.get("a").state


@pytest.mark.parametrize("words", [("release", "a"), ("fail", "a", "no"), ("done", "a")], ids=" ".join)
def test_a_move_may_be_repeated_with_the_token_alone(
    db: Path, tasks: TaskLedger, words: tuple[str, ...]
) -> None:
    """Whose reply was lost asks again: it is answered, and nothing changes a second time."""
    tasks.add_task("a", max_retries=1)
    token = ok(db, "next", "--claim", "--start", "--agent", "me")["token"]

    ok(db, *words, "--token", token)
    version = tasks.get("a").version
    ok(db, *words, "--token", token)

    assert version == tasks.get("a").version


def test_done_begins_a_ready_task_that_nobody_has(db: Path, tasks: TaskLedger) -> None:
    """A person ticks a task off in one step."""
    tasks.add_task("a")

    done = ledger(db, "done", "a", "--text", "by hand", "--agent", "me")

    assert (0, "done: a\n") == (done.code, done.out)
    assert ("done", "me", "by hand") == (tasks.get("a").state, tasks.get("a").assignee, tasks.get("a").result)


def test_next_with_nothing_to_do_is_no_failure(db: Path, tasks: TaskLedger) -> None:
    """It exits with 0 and says so, or with 3 where that is asked for."""
    tasks.add_task("a", not_before="2100-01-01T00:00:00+00:00")

    for words in (("next",), ("next", "--claim")):
        assert None is ok(db, *words)
        told = ledger(db, *words)
        assert (0, "nothing can be begun now in session main\n", "") == told
        assert 3 == ledger(db, *words, "--exit-code").code
        assert 3 == ledger(db, *words, "--exit-code", "--json").code


def test_next_is_the_most_urgent_that_the_agent_can_do(db: Path, tasks: TaskLedger) -> None:
    """By priority, then age; what needs more than --can says, or is of another type, is passed over."""
    tasks.add_tasks(
        [
            Task("old"),
            Task("hard", priority=9, capabilities=("python", "sql")),
            Task("look", priority=7, type="review"),
        ]
    )

    assert "look" == ok(db, "next")["id"]
    assert "old" == ok(db, "next", "--type", "task")["id"]
    assert "look" == ok(db, "next", "--can", "python")["id"]
    assert "hard" == ok(db, "next", "--can", "python", "--can", "sql")["id"]
    assert ["hard", "look"] == [task["id"] for task in ok(db, "next", "--can-all", "--limit", 2)]
    assert "hard" == ok(db, "next", "--can-all", "--claim")["task"]["id"]


def test_two_agents_never_get_the_same_task(db: Path, tasks: TaskLedger) -> None:
    """Many processes at once each get another one, or nothing."""
    tasks.add_tasks([Task(f"t{number}") for number in range(5)])
    words = ("tasks", "next", "--claim", "--json", "--db", db, "--agent")

    with ExitStack() as running:
        agents = [running.enter_context(Background(*words, f"a{number}")) for number in range(7)]
        claims = [agent.ends() for agent in agents]

    assert {0} == {done.code for done in claims}
    found = [claim["task"]["id"] for done in claims if (claim := done.json) is not None]
    assert [f"t{number}" for number in range(5)] == sorted(found)


def test_a_task_that_cannot_be_claimed_says_why(db: Path, tasks: TaskLedger) -> None:
    """Who has it, what it waits for, or from when on; and what to do instead."""
    tasks.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),))])
    tasks.add_task("c", not_before="2100-01-01T00:00:00+00:00")
    tasks.claim_task("a", "you")

    assert "is assigned and you has it" in refused(db, "claim", "a")
    assert "waits for 1 others" in refused(db, "claim", "b")
    assert "is not to be begun before 2100" in refused(db, "claim", "c")
    assert "ledger tasks next --claim" in refused(db, "claim", "a")


def test_a_heartbeat_renews_or_says_that_the_claim_is_lost(db: Path, tasks: TaskLedger) -> None:
    """A worker learns that it must stop."""
    tasks.add_task("a")
    token = ok(db, "next", "--claim", "--agent", "me", "--lease", "5m")["token"]

    assert {"held": True} == ok(db, "heartbeat", "a", "--token", token)
    assert {"held": True} == ok(db, "heartbeat", "a", "--agent", "me")
    tasks.cancel("a")
    done = ledger(db, "heartbeat", "a", "--token", token, "--json")
    assert (1, {"held": False}) == (done.code, done.json)
    assert "stop working on it" in done.err


def test_what_a_dead_agent_left_is_brought_back(db: Path, tasks: TaskLedger) -> None:
    """It is stale, `recover` tells of it once, and its late word is refused."""
    tasks.add_task("a", max_retries=1)
    token = ok(db, "next", "--claim", "--start", "--agent", "gone", "--lease", "0.05")["token"]
    eventually(lambda: bool(tasks.stale_tasks()))

    assert ["a"] == [task["id"] for task in ok(db, "stale")]
    assert ["a"] == [task["id"] for task in ok(db, "recover")]
    assert [] == ok(db, "recover")
    assert "does not hold" in refused(db, "done", "a", "--token", token)


def test_stale_may_be_asked_by_how_long_the_holder_said_nothing(db: Path, tasks: TaskLedger) -> None:
    """Also while its lease runs."""
    tasks.add_task("a")
    tasks.claim_next("me")

    assert [] == ok(db, "stale", "--older-than", "1h")
    eventually(lambda: bool(tasks.stale_tasks(0.01)))
    assert ["a"] == [task["id"] for task in ok(db, "stale", "--older-than", "10ms")]


def test_a_failure_says_what_becomes_of_the_task(db: Path, tasks: TaskLedger) -> None:
    """Pending again while a retry is left, then dead; a retry out of that needs a reason."""
    tasks.add_task("a", max_retries=1)

    ok(db, "next", "--claim", "--start", "--agent", "me")
    first = ledger(db, "fail", "a", "the server is away", "--agent", "me", "--retry-in", "0.001")
    eventually(lambda: tasks.claim_next("me") is not None)
    ok(db, "start", "a", "--agent", "me")
    second = ledger(db, "fail", "a", "still away", "--agent", "me")

    assert "it is pending again, retry 1 of 1" in first.out
    assert "it is dead" in second.out
    assert ["a"] == [task["id"] for task in ok(db, "dead")]
    assert "--reason" in refused(db, "retry", "a")
    assert "pending" == ok(db, "retry", "a", "--reason", "it is back")["state"]
    assert [] == ok(db, "dead")


def test_a_task_is_reviewed_from_shells(db: Path, tasks: TaskLedger) -> None:
    """Submitted, rejected with a reason, submitted again, approved and completed."""
    tasks.add_task("a")
    ok(db, "claim", "a", "--start", "--agent", "me")

    states = [
        ok(db, "review", "a", "--agent", "me", "--text", "draft")["state"],
        ok(db, "reject", "a", "--reason", "no figures", "--agent", "boss")["state"],
        ok(db, "review", "a", "--agent", "me", "--text", "with figures")["state"],
        ok(db, "approve", "a", "--agent", "boss")["state"],
        ok(db, "done", "a", "--agent", "me")["task"]["state"],
    ]

    assert ["review", "active", "review", "approved", "done"] == states
    assert "with figures" == tasks.get("a").result


def test_a_task_is_paused_blocked_and_shelved_from_shells(db: Path, tasks: TaskLedger) -> None:
    """Each with its way back."""
    tasks.add_task("a")

    states = [
        ok(db, "shelve", "a")["state"],
        ok(db, "unshelve", "a")["state"],
        ok(db, "claim", "a", "--start", "--agent", "me")["task"]["state"],
        ok(db, "pause", "a", "--agent", "me", "--reason", "waits for Ann")["state"],
        ok(db, "resume", "a", "--agent", "me")["state"],
        ok(db, "block", "a", "--reason", "no address")["state"],
        ok(db, "unblock", "a")["state"],
        ok(db, "cancel", "a")["state"],
    ]

    expected = ["backlog", "pending", "active", "paused", "active", "blocked", "pending", "cancelled"]
    assert expected == states


def test_cancelling_ends_what_waits_for_it(db: Path, tasks: TaskLedger) -> None:
    """As dependents that were cancelled too, or as ones whose dependency failed."""
    tasks.add_tasks(
        [Task("a"), Task("b", depends_on=(Dep("a"),)), Task("c"), Task("d", depends_on=(Dep("c"),))]
    )

    ok(db, "cancel", "a", "--dependents", "--reason", "no longer wanted")
    ok(db, "cancel", "c")

    states = {task["id"]: task["state"] for task in ok(db, "list")}
    assert {"a": "cancelled", "b": "cancelled", "c": "cancelled", "d": "skipped"} == states


def test_a_change_may_depend_on_the_version(db: Path, tasks: TaskLedger) -> None:
    """--if-version refuses when somebody changed the task meanwhile, and names both versions."""
    tasks.add_task("a")

    told = refused(db, "block", "a", "--reason", "x", "--if-version", 7)

    assert "has version 1, not 7" in told
    assert "pending" == tasks.get("a").state


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("start", "nope"), "there is no task 'nope'"),
        (("approve", "a"), "is PENDING and cannot become APPROVED"),
        (("add", "a"), "is in session 'main' already"),
        (("add", "b", "--depends", "nope"), "depends on 'nope'"),
        (("depend", "a", "a"), "a → a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_refused_changes_nothing(
    db: Path, tasks: TaskLedger, words: tuple[str, ...], told: str
) -> None:
    """One message on stderr, exit code 1, and not one event more."""
    tasks.add_task("a")

    assert told in refused(db, *words)
    assert 1 == tasks.last_seq()


@pytest.mark.parametrize(
    "words",
    [
        ("add",),
        ("add", "a", "--from", "-"),
        ("add", "a", "--priority", "11"),
        ("add", "a", "--not-before", "soon"),
        ("done", "a", "--result", "sent"),
        ("done", "a", "--result", "1", "--text", "1"),
        ("checkpoint", "a"),
        ("progress", "a", "half"),
        ("list", "--state", "lost"),
        ("list", "--open", "--state", "done"),
        ("next", "--start"),
        ("next", "--claim", "--limit", "2"),
        ("show", "a", "--at", "then"),
        ("block", "a"),
    ],
    ids=" ".join,
)
def test_what_is_misused_is_told_before_anything_is_done(
    db: Path, tasks: TaskLedger, words: tuple[str, ...]
) -> None:
    """Exit code 2, and the ledger stays as it was."""
    tasks.add_task("a")

    done = ledger(db, *words)

    assert (2, "") == (done.code, done.out)
    assert "Error: " in done.err
    assert 1 == tasks.last_seq()


# -- adding --


def test_a_task_is_added_with_all_that_can_be_said_of_it(db: Path, tasks: TaskLedger) -> None:
    """Each field of a new task has an option."""
    tasks.add_tasks([Task("a"), Task("b:c"), Task("whole")])

    about = ("--title", "mail", "--type", "review", "--priority", 8, "--tag", "t1", "--tag", "t2")
    order = ("--depends", "a:run", "--depends", "b:c", "--parent", "whole", "--max-retries", 3)
    when = ("--not-before", "2100-01-01T00:00:00+00:00", "--deadline", "2h")
    ok(db, "add", "x", "tell Ann", *about, *order, *when, "--needs", "python", "--agent", "me")

    task = tasks.get("x")
    assert ("tell Ann", "mail", "review", 8) == (task.description, task.title, task.type, task.priority)
    assert (Dep("a", "run"), Dep("b:c", "skip")) == task.depends_on
    assert ("whole", ("t1", "t2"), ("python",), 3) == (
        task.parent,
        task.tags,
        task.capabilities,
        task.max_retries,
    )
    assert task.not_before is not None
    assert 2100 == task.not_before.year
    assert task.deadline is not None
    assert task.created_at is not None
    assert 7190 < (task.deadline - task.created_at).total_seconds() <= 7200
    assert "me" == next(tasks.events("x")).actor


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": "b", "depends_on": ["a", ["c", "run"]]}, {"id": "a"}, {"id": "c", "priority": 9}]',
        (
            '{"id": "b", "dependencies": [{"id": "a"}, {"id": "c", "on_failure": "run"}]}\n'
            '{"id": "a"}\n{"id": "c", "priority": 9}\n'
        ),
    ],
    ids=["array", "lines"],
)
def test_a_plan_is_added_whole(db: Path, tasks: TaskLedger, text: str) -> None:
    """From a file or stdin, in any order of its dependencies."""
    done = run("tasks", "add", "--from", "-", "--db", db, input=text)

    assert (0, "added 3 tasks\n") == (done.code, done.out)
    assert (Dep("a"), Dep("c", "run")) == tasks.get("b").depends_on
    assert 9 == tasks.get("c").priority


def test_a_plan_is_added_whole_or_not_at_all(db: Path, tasks: TaskLedger, tmp_path: Path) -> None:
    """A cycle in it is refused with its path."""
    plan = tmp_path / "plan.json"
    plan.write_text('[{"id": "c"}, {"id": "a", "depends_on": ["b"]}, {"id": "b", "depends_on": ["a"]}]')

    told = refused(db, "add", "--from", plan)

    assert "a → b → a" in told
    assert 0 == len(tasks)


@pytest.mark.parametrize("text", ["7", "[1]", "{", '[{"id": "a", "depends_on": [["b", "run", 3]]}]'])
def test_a_plan_that_is_none_is_a_usage_error(db: Path, text: str) -> None:
    """And makes no ledger."""
    done = run("tasks", "add", "--from", "-", "--db", db, input=text)

    assert (2, "") == (done.code, done.out)
    assert not db.exists()


def test_a_field_that_no_task_has_is_refused(db: Path) -> None:
    """A misspelt name in a plan is told with those that can be given."""
    done = run("tasks", "add", "--from", "-", "--db", db, input='[{"id": "a", "prioritty": 3}]')

    assert 1 == done.code
    assert "a task has no prioritty" in done.err


def test_a_dependency_is_added_later(db: Path, tasks: TaskLedger) -> None:
    """`depend` lets a task wait for one more, with what happens if that fails."""
    tasks.add_tasks([Task("a"), Task("b")])

    found = ok(db, "depend", "b", "a:fail")

    assert (1, [["a", "fail"]]) == (found["waiting"], found["depends_on"])


# -- looking --


def test_list_narrows(db: Path, tasks: TaskLedger) -> None:
    """By state (also under another program's name), type, holder, tag, parent and text."""
    tasks.add_tasks([Task("a", tags=("x",)), Task("b", type="review", description="the invoice"), Task("c")])
    tasks.add_subtasks("c", [Task("c1")])
    tasks.claim_task("a", "me")
    tasks.cancel("b")

    def ids(*words: str) -> list[str]:
        return [task["id"] for task in ok(db, "list", *words)]

    assert ["a", "b", "c", "c1"] == ids()
    assert ["a", "c", "c1"] == ids("--open")
    assert ["a", "b"] == ids("--state", "CLAIMED", "--state", "cancelled")
    assert ["b"] == ids("--type", "review")
    assert ["a"] == ids("--assignee", "me")
    assert ["a"] == ids("--tag", "x")
    assert ["c1"] == ids("--parent", "c")
    assert ["b"] == ids("--search", "INVOICE")
    assert [] == ids("--state", "dead")


def test_list_says_how_many_more_there_are(db: Path, tasks: TaskLedger) -> None:
    """--limit bounds it, --all lists all."""
    tasks.add_tasks([Task(f"t{number}") for number in range(12)])

    some, every = ledger(db, "list", "--limit", 5), ledger(db, "list", "--limit", 5, "--all")

    assert ([f"t{number}" for number in range(5)], True) == (
        [row["task"] for row in some.rows],
        "7 more" in some.err,
    )
    assert (12, "") == (len(every.rows), every.err)


def test_what_waits_is_shown_as_waiting(db: Path, tasks: TaskLedger) -> None:
    """A PENDING task with open dependencies is told with how many they are."""
    tasks.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),))])

    row = ledger(db, "list").rows[1]

    assert ("pending", "1") == (row["state"], row["waiting"])
    assert "◔ waiting (1)" in on_terminal("tasks", "list", "--db", db).out


def test_show_tells_all_about_a_task(db: Path, tasks: TaskLedger) -> None:
    """What it is, why it stands there, what it waits for, what waits for it, what happened."""
    tasks.add_tasks(
        [Task("a"), Task("b", title="mail", depends_on=(Dep("a", "run"),)), Task("c", depends_on=(Dep("b"),))]
    )
    tasks.block("b", "no address")

    found, text = ok(db, "show", "b"), ledger(db, "show", "b").out

    assert (["c"], "no address", "blocked") == (found["blocks"], found["reason"], found["state"])
    assert ["created", "moved"] == [event["kind"] for event in found["events"]]
    for word in (
        "■ blocked",
        "no address",
        "○ pending",
        "if that fails: run",
        "pending → blocked",
        "by boss",
    ):
        assert word in text


def test_show_tells_how_a_task_was(db: Path, tasks: TaskLedger) -> None:
    """--at replays its events up to one of them, or up to a time."""
    tasks.add_task("a")
    seq = tasks.last_seq()
    tasks.cancel("a")

    then = ok(db, "show", "a", "--at", seq)

    assert ("pending", 1, 1) == (then["state"], then["version"], len(then["events"]))
    assert "cancelled" == ok(db, "show", "a", "--at", "2100-01-01")["state"]
    assert "no event" in refused(db, "show", "a", "--at", "2h")


def test_events_go_on_where_they_ended(db: Path, tasks: TaskLedger) -> None:
    """A page says how to read the next one; --after does."""
    tasks.add_tasks([Task(f"t{number}") for number in range(3)])

    first = ledger(db, "events", "--limit", 2)
    rest = ok(db, "events", "--after", 2)

    assert (2, True) == (len(first.out.splitlines()), "--after 2 goes on" in first.err)
    assert [3] == [event["seq"] for event in rest]
    assert ["t1"] == [event["task"] for event in ok(db, "events", "t1")]
    assert "there is no task 'nope'" in refused(db, "events", "nope")


def test_nothing_that_others_wrote_reaches_the_terminal(db: Path, tasks: TaskLedger) -> None:
    """Control characters in titles, reasons and results are shown, never obeyed; a row stays a row."""
    tasks.add_tasks([Task("a", title=NASTY, description=NASTY), Task("b", description=NASTY, parent="a")])
    claim = tasks.claim_task("b", "me")
    assert claim is not None
    tasks.start(claim)
    tasks.checkpoint(claim, {NASTY: NASTY})
    tasks.add_artifact(claim, NASTY, NASTY)
    tasks.fail(claim, NASTY)

    for words in (("list",), ("show", "b"), ("tree",), ("events",), ("events", "b"), ("dead",), ("next",)):
        done = ledger(db, *words)
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.out + done.err)
        assert "\x1b[2J" not in on_terminal("tasks", *words, "--db", db).out
        assert "\x9b" not in on_terminal("tasks", *words, "--db", db).out
    assert 2 == len(ledger(db, "list").rows)
    assert "\\x1b" in ledger(db, "list").out


def test_an_error_that_quotes_a_task_is_harmless(db: Path, tasks: TaskLedger) -> None:
    """Ids have no control characters, but what is asked for may."""
    tasks.add_task("a")

    assert ESCAPE not in refused(db, "show", "\x1b[31mred")


# -- tree --


def test_tree_draws_subtasks_with_their_states_and_progress(db: Path, tasks: TaskLedger) -> None:
    """Each task stands under the one that it is a part of, with how much of it is done."""
    tasks.add_tasks([Task("r", title="release"), Task("z")])
    tasks.add_subtasks("r", [Task("build"), Task("ship")])
    tasks.add_subtasks("build", [Task("wheel")])
    tasks.complete_task_and_route("wheel")
    claim = tasks.claim_task("ship", "me")
    assert claim is not None
    tasks.start(claim)
    tasks.progress(claim, 0.4, "packing")

    lines = ledger(db, "tree").out.splitlines()

    assert [
        "◔ r  release  waiting (2)  ░░░░░░░░░░ 0 of 2",
        "├─ ○ build  pending  ██████████ 1 of 1",
        "│  └─ ✓ wheel  done",
        "└─ ▶ ship  active  ████░░░░░░ 40%  packing  me",
        "○ z  pending",
    ] == lines
    assert [("build", 0), ("wheel", 1)] == [(node["id"], node["depth"]) for node in ok(db, "tree", "build")]
    found = {node["id"]: (node["depth"], node["parts"], node["parts_done"]) for node in ok(db, "tree")}
    assert {
        "r": (0, 2, 0),
        "build": (1, 1, 1),
        "wheel": (2, 0, 0),
        "ship": (1, 0, 0),
        "z": (0, 0, 0),
    } == found


@pytest.mark.slow
@pytest.mark.parametrize("is_deep", [True, False], ids=["deep", "wide"])
def test_a_tree_of_ten_thousand_is_drawn_within_its_limit(db: Path, tasks: TaskLedger, is_deep: bool) -> None:
    """Without recursion, in lines that stay short, and it says how many more there are."""
    names = [f"t{number}" for number in range(10_000)]
    above = dict(zip(names[1:], names, strict=False)) if is_deep else dict.fromkeys(names[1:], "t0")
    tasks.add_tasks([Task(name, parent=above.get(name, "")) for name in names])

    whole = ledger(db, "tree", "--limit", 10_000)
    some = ledger(db, "tree", "--limit", 50)
    part = ledger(db, "tree", "t0", "--limit", 50, "--json")

    assert (0, "", 10_000) == (whole.code, whole.err, len(whole.out.splitlines()))
    assert max(map(len, whole.out.splitlines())) < 150
    assert (50, True) == (len(some.out.splitlines()), "9,950 more" in some.err)
    assert (50, True) == (len(part.json), "9,950 more" in part.err)


# -- watch --


def test_watch_prints_a_line_for_each_event_in_a_pipe(db: Path, tasks: TaskLedger) -> None:
    """As it happens; Ctrl-C ends it quietly with 130."""
    tasks.add_task("a")

    with Background("tasks", "watch", "--after", 0, "--db", db) as watch:
        first = watch.line()
        tasks.block("a", "no address")
        second = watch.line()
        watch.process.send_signal(signal.SIGINT)
        done = watch.ends()

    assert re.search(r"created +a  by boss", first)
    assert re.search(r"pending → blocked +a  by boss  no address", second)
    assert (130, "", "") == done


def test_watch_prints_json_lines(db: Path, tasks: TaskLedger) -> None:
    """With --json each event is one line of JSON; --until-done ends it when all tasks have ended."""
    tasks.add_task("a")
    tasks.add_task("b")
    tasks.complete_task_and_route("b")

    with Background("tasks", "watch", "--after", 0, "--until-done", "--json", "--db", db) as watch:
        events = [json.loads(watch.line()) for _ in range(5)]
        tasks.cancel("a", "enough")
        done = watch.ends()

    assert [1, 2, 3, 4, 5] == [event["seq"] for event in events]
    assert 0 == done.code
    assert ("cancelled", "enough") == (done.json["to_state"], done.json["data"]["why"])


def test_watch_begins_with_now(db: Path, tasks: TaskLedger) -> None:
    """Without --after the past is not told."""
    tasks.add_task("a")
    tasks.cancel("a")

    done = ledger(db, "watch", "--until-done")

    assert (0, "", "") == done


def test_watch_is_a_live_view_on_a_terminal(db: Path, tasks: TaskLedger) -> None:
    """A bar over all tasks, who is at what, and what happened last; Ctrl-C ends it with 130."""
    tasks.add_tasks([Task("a"), Task("b")])
    tasks.complete_task_and_route("a")

    with Terminal("tasks", "watch", "--db", db) as watch:
        watch.sees("1 of 2 done")
        claim = tasks.claim_next("robot")
        assert claim is not None
        tasks.start(claim)
        tasks.progress(claim, 0.4, "collecting")
        watch.sees("collecting")
        watch.sees("robot")
        tasks.complete(claim)
        watch.sees("2 of 2 done")
        watch.interrupt()
        done = watch.ends()

    assert 130 == done.code
    assert "Traceback" not in done.out
    assert "████" in done.out


def test_watch_of_a_foreign_session_sees_nothing(db: Path, tasks: TaskLedger) -> None:
    """Unless it is asked to see all."""
    other = tasks.in_session("other")
    other.add_task("x")
    tasks.add_task("a")
    tasks.cancel("a")

    here = ledger(db, "watch", "--until-done", "--after", 0, "--json").out
    every = ledger(db, "watch", "--until-done", "--after", 0, "--json", "--all-sessions").out

    assert {"main"} == {json.loads(line)["session"] for line in here.splitlines()}
    assert {"main", "other"} == {json.loads(line)["session"] for line in every.splitlines()}


# -- a file that is no ledger, and one without tasks --


def test_a_ledger_of_calls_alone_has_no_tasks(db: Path) -> None:
    """What a guard wrote can be looked at, and is as it was for the guard."""
    make_shop(db)
    calls = run("show", db).out

    assert [] == ok(db, "list")
    assert "no tasks yet" in ledger(db, "list").err
    assert calls == run("show", db).out


def test_a_file_that_is_no_ledger_is_refused(db: Path) -> None:
    """And stays as it is."""
    with closing(sqlite3.connect(db)) as other, other:
        other.execute("CREATE TABLE mine (x)")
    before = db.read_bytes()

    assert 1 == ledger(db, "list").code
    assert before == db.read_bytes()
