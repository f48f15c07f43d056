"""`ledger tasks` where it tells what other modules make: order, figures, deliveries, proof, files."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ledger_tasks import Dep, Task, TaskLedger
from tests.cli_kit import on_terminal, run
from tests.stores.servers import postgres_url
from tests.tasks.cli_tasks_kit import ledger, ok

NASTY = "\x1b[2J\x1b]0;owned\x07 \u202e reversed \x9b31m"


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a ledger is, or will be."""
    return tmp_path / "ledger.db"


@pytest.fixture
def tasks(db: Path) -> Iterator[TaskLedger]:
    """A ledger of three that wait for each other, beside one that waits for nobody."""
    found = TaskLedger(db, agent="boss")
    found.add_tasks(
        [
            Task("a"),
            Task("b", depends_on=(Dep("a"),)),
            Task("c", depends_on=(Dep("b"),)),
            Task("lone", type="review"),
        ]
    )
    yield found
    found.close()


def ids(found: list[dict[str, Any]]) -> list[str]:
    """Of tasks in JSON."""
    return [task["id"] for task in found]


# -- the order of work --


def test_waves_say_what_can_be_done_in_parallel(db: Path, tasks: TaskLedger) -> None:
    """Each wave can be done once those before it are done; what has ended is in none."""
    assert [["a", "lone"], ["b"], ["c"]] == [ids(wave) for wave in ok(db, "waves")]

    tasks.complete_task_and_route("a")

    assert [["b", "lone"], ["c"]] == [sorted(ids(wave)) for wave in ok(db, "waves")]
    assert [("1", "b"), ("1", "lone"), ("2", "c")] == sorted(
        (row["wave"], row["task"]) for row in ledger(db, "waves").rows
    )
    assert "wave" in on_terminal("tasks", "waves", "--db", db).out


def test_path_is_the_longest_chain(db: Path, tasks: TaskLedger) -> None:
    """The critical path among what has not ended."""
    assert ["a", "b", "c"] == ids(ok(db, "path"))
    assert ["a", "b", "c"] == [row["task"] for row in ledger(db, "path").rows]


def test_when_nothing_is_left_there_is_no_order(db: Path, tasks: TaskLedger) -> None:
    """Both say so."""
    for name in ("a", "lone"):
        tasks.cancel(name, dependents=True)

    assert ([], []) == (ok(db, "waves"), ok(db, "path"))
    assert "nothing is left to do" in ledger(db, "waves").err


# -- figures and awareness --


def test_metrics_are_told_in_json_and_as_text(db: Path, tasks: TaskLedger) -> None:
    """Of all, by type and by agent."""
    tasks.complete_task_and_route("lone", cost=0.5, tokens=1200)

    found, text = ok(db, "metrics"), ledger(db, "metrics").out

    assert tasks.metrics().to_dict().keys() == found.keys()
    assert {"total", "by_type", "by_agent"} <= found.keys()
    assert 1200 == found["total"]["tokens"]
    assert {"task", "review"} == found["by_type"].keys()
    assert "boss" in text
    assert "1,200" in text


def test_awareness_is_bounded_and_harmless(db: Path, tasks: TaskLedger) -> None:
    """The text for a model's context is never longer than asked for, and obeys nobody."""
    claim = tasks.claim_task("lone", "me")
    assert claim is not None
    tasks.start(claim)
    tasks.fail(claim, NASTY)

    done, short = ledger(db, "awareness"), ledger(db, "awareness", "--max-chars", 60)

    assert (0, 0) == (done.code, short.code)
    assert "lone" in done.out
    assert len(short.out) <= 61
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.out)
    assert tasks.get_awareness().to_dict().keys() == ok(db, "awareness").keys()


# -- deliveries --


def test_deliveries_are_listed(db: Path, tasks: TaskLedger) -> None:
    """What was sent and what was suppressed, with the reason; what others wrote is harmless."""
    assert [] == ok(db, "deliveries")
    assert "nothing was delivered yet" in ledger(db, "deliveries").err
    for _ in range(2):
        tasks.deliver(lambda: "sent", recipient="ann\u202e\x9b31m", channel="mail", key="k1")

    rows = ledger(db, "deliveries").rows

    assert "sent" in {row["outcome"] for row in rows}
    assert {"mail"} == {row["channel"] for row in rows}
    assert {"k1"} == {one["key"] for one in ok(db, "deliveries")}
    assert not {"\x9b", "\u202e"} & set(ledger(db, "deliveries").out)


# -- proof --


def test_verify_finds_what_was_altered(db: Path, tasks: TaskLedger) -> None:
    """All is well until somebody changes a task behind the ledger's back; then it exits with 1."""
    sound = ledger(db, "verify")
    assert {"ok": True, "tasks": 4, "events": 4, "faults": []} == ok(db, "verify")
    tasks.close()
    with closing(sqlite3.connect(db)) as other, other:
        other.execute(
            'UPDATE task_docs SET doc = replace(doc, \'"schema":1\', \'"schema":1,"priority":9\')'
            " WHERE num = (SELECT num FROM tasks WHERE id = 'b')"
        )

    broken, told = ledger(db, "verify"), ledger(db, "verify", "--json")

    assert (0, "all is well: 4 tasks, 4 events\n") == (sound.code, sound.out)
    assert (1, 1) == (broken.code, told.code)
    assert "'b'" in broken.out
    assert (False, True) == (told.json["ok"], bool(told.json["faults"]))


# -- export and import --


def test_a_session_is_exported_and_read_back(db: Path, tasks: TaskLedger, tmp_path: Path) -> None:
    """To a file and into a new ledger, with its events; a second time it changes nothing."""
    tasks.complete_task_and_route("a", {"n": 1})
    file, other = tmp_path / "tasks.json", tmp_path / "other.db"

    written = ok(db, "export", "-o", file)
    first, second = ok(other, "import", file), ok(other, "import", file)

    assert {"session": "main", "tasks": 4, "file": str(file)} == written
    assert ("main", 4) == (first["session"], first["tasks"])
    assert (0, 4) == (second["tasks"], second["known"])
    assert ok(db, "list") == ok(other, "list")
    assert len(ok(db, "events")) == len(ok(other, "events"))
    assert ok(other, "verify")["ok"]


def test_an_export_goes_through_a_pipe(db: Path, tasks: TaskLedger, tmp_path: Path) -> None:
    """Stdout to stdin; the text is JSON, the same each time."""
    text = ledger(db, "export").out

    done = run("tasks", "import", "-", "--db", tmp_path / "other.db", input=text)

    assert "ledger-tasks" == json.loads(text)["format"]
    assert text == ledger(db, "export").out
    assert (0, True) == (done.code, done.out.startswith("imported 4 tasks"))
    assert ["a", "b", "c", "lone"] == ids(ok(tmp_path / "other.db", "list"))


def test_an_import_that_is_refused_adds_nothing(db: Path, tasks: TaskLedger, tmp_path: Path) -> None:
    """Another session's file, one that was altered, and one that is none; each with a message."""
    text = ledger(db, "export").out
    other = tmp_path / "other.db"
    altered = text.replace('"boss"', '"eve"', 1)

    for words, given in (((), "{}"), ((), altered), (("--session", "other"), text)):
        done = run("tasks", "import", "-", *words, "--db", other, input=given)
        assert (1, "") == (done.code, done.out)
        assert done.err.startswith("Error: ")
    assert not other.exists() or [] == ok(other, "list", "--all-sessions")


def test_a_file_that_is_not_there_is_a_usage_error(db: Path, tmp_path: Path) -> None:
    """And no ledger is made."""
    done = ledger(db, "import", tmp_path / "none.json")

    assert (2, "") == (done.code, done.out)
    assert not db.exists()


# -- JSON files --


def test_an_agent_works_on_json_files(tmp_path: Path) -> None:
    """json:FOLDER is a ledger like any other."""
    url = f"json:{tmp_path / 'agent_data'}"

    ok(url, "add", "mail", "tell Ann")
    claim = ok(url, "next", "--claim", "--start", "--agent", "me")
    ok(url, "done", "mail", "--token", claim["token"], "--text", "sent")

    assert [("mail", "done", "sent")] == [
        (task["id"], task["state"], task["result"]) for task in ok(url, "list")
    ]
    assert (tmp_path / "agent_data" / "ledger_main.json").exists()
    assert ok(url, "verify")["ok"]


def test_looking_at_json_files_makes_none(tmp_path: Path) -> None:
    """A folder without a file of that session has no tasks, and gets no file."""
    folder = tmp_path / "agent_data"
    folder.mkdir()

    assert [] == ok(f"json:{folder}", "list")
    assert None is ok(f"json:{folder}", "next")
    assert [] == [path.name for path in folder.iterdir() if path.suffix in (".json", ".db")]


# -- servers --


def test_an_agent_works_on_postgresql() -> None:
    """A server's URL is a ledger like any other; a session of one's own keeps it apart."""
    url, session = postgres_url(), f"s-{uuid.uuid4().hex}"
    mine = ("--session", session)
    ok(url, "add", "mail", *mine)
    ok(url, "add", "mail.1", "--parent", "mail", *mine)

    claim = ok(url, "next", "--claim", "--start", "--agent", "me", *mine)
    ended = ok(url, "done", "mail.1", "--token", claim["token"], *mine)

    assert ("mail.1", ["mail"]) == (claim["task"]["id"], ids(ended["ready"]))
    assert [("mail", 0), ("mail.1", 1)] == [(node["id"], node["depth"]) for node in ok(url, "tree", *mine)]
    assert session in {one["session"] for one in ok(url, "sessions")}


# -- what programs report --


def test_a_program_reports_under_its_own_names(db: Path, tasks: TaskLedger) -> None:
    """The task is made when it is first heard of; a name that nobody knows is refused."""
    states = [
        ok(db, "report", "req-17", word, "--source", "crawler", "--agent", "crawler")["state"]
        for word in ("RECEIVED", "RUNNING", "COMPLETED")
    ]

    assert ["pending", "active", "done"] == states
    assert "crawler" == next(tasks.events("req-17")).source
    assert "there is no task state 'ODD'" in ledger(db, "report", "req-17", "ODD").err


def test_a_report_says_more_in_json(db: Path, tasks: TaskLedger) -> None:
    """--data takes an object, and nothing else."""
    ok(db, "report", "req-1", "RUNNING", "--data", '{"page": 7}', "--stage", "fetching")

    assert 2 == ledger(db, "report", "req-1", "RUNNING", "--data", "7").code
    assert "fetching" in {event.stage for event in tasks.events("req-1")}
