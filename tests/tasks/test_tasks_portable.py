"""A session as a file for git: the same from any store, read back whole or not at all, and continued."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger import StoreError, UsageError
from ledger_tasks import Dep, DuplicateTask, Tampered, Task, TaskLedger, TaskState
from ledger_tasks.portable import Imported, add_deliveries, deliveries_of

KINDS = ("memory", "sqlite", "json")


def opened(kind: str, folder: Path, name: str) -> TaskLedger:
    """An empty ledger of one kind."""
    where = {"memory": "memory://", "sqlite": str(folder / f"{name}.db"), "json": f"json:{folder / name}"}
    return TaskLedger(where[kind], agent=name)


@pytest.fixture(name="here", params=KINDS)
def the_source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in which much has happened."""
    ledger = opened(request.param, tmp_path, "here")
    ledger.add_tasks(
        [Task("a", priority=9), Task("b", depends_on=(Dep("a"),)), Task("c", depends_on=(Dep("b", "run"),))]
    )
    ledger.add_task("p", title="Größe", max_retries=2)
    ledger.add_subtasks("p", ["first", "second"])
    claim = ledger.claim_next("w", lease=60)
    assert claim is not None
    ledger.start(claim)
    ledger.progress(claim, 0.25, "reading", cost=0.1, tokens=12)
    ledger.checkpoint(claim, {"page": 3})
    yield ledger
    ledger.close()


@pytest.fixture(name="there", params=KINDS)
def the_target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TaskLedger]:
    """An empty ledger."""
    ledger = opened(request.param, tmp_path, "there")
    yield ledger
    ledger.close()


def text_of(ledger: TaskLedger) -> str:
    """What it exports."""
    out = io.StringIO()
    ledger.export(out)
    return out.getvalue()


def take(ledger: TaskLedger, text: str) -> Imported:
    """Import that."""
    return ledger.import_from(io.StringIO(text))


def test_all_of_it_comes_over(here: TaskLedger, there: TaskLedger) -> None:
    """Tasks, stories and claims are the same in the other store, which exports the very same file."""
    text = text_of(here)
    assert Imported(tasks=6, events=11, known=0) == take(there, text)

    assert list(here) == list(there)
    assert [task.waiting for task in here] == [task.waiting for task in there]
    assert [(e.task, e.n, e.hash) for e in here.events()] == [(e.task, e.n, e.hash) for e in there.events()]
    assert text == text_of(there)
    assert there.verify()


def test_it_goes_on_in_the_other_store(here: TaskLedger, there: TaskLedger) -> None:
    """Who held a task holds it there too, and what waits is freed as here."""
    take(there, text_of(here))
    for ledger in (here, there):
        ledger.complete("a", agent="w")
        assert ["b", "p.1", "p.2"] == [task.id for task in ledger.get_parallel_executable_tasks()]
    assert there.verify()


def test_a_second_import_changes_nothing(here: TaskLedger, there: TaskLedger) -> None:
    """What is there already stays, event for event."""
    text = text_of(here)
    take(there, text)
    before = there.last_seq()
    assert Imported(tasks=0, events=0, known=6) == take(there, text)
    assert before == there.last_seq()
    assert text == text_of(there)


def test_a_longer_story_goes_on(here: TaskLedger, there: TaskLedger) -> None:
    """A later export of the same ledger brings what happened since, and an older one then nothing."""
    old = text_of(here)
    take(there, old)
    here.complete("a", agent="w")
    here.add_dependency("c", "p")
    here.add_subtasks("p", ["third"])
    here.cancel("p.1")
    new = text_of(here)

    found = take(there, new)
    assert new == text_of(there)
    assert [task.waiting for task in here] == [task.waiting for task in there]
    assert 2 == found.known  # b and p.2 are as they were
    assert Imported(tasks=0, events=0, known=6) == take(there, old)
    assert there.verify()


def test_others_hear_of_what_came_in(here: TaskLedger, there: TaskLedger) -> None:
    """Tasks of the target alone that wait for imported ones are freed and ended as ever."""
    take(there, text_of(here))
    there.add_tasks([
        Task("after a", depends_on=(Dep("a"),)),
        Task("after p", depends_on=(Dep("p"),)),
        Task("whatever p", depends_on=(Dep("p", "run"),)),
        Task("after after", depends_on=(Dep("after p", "fail"),)),
    ])  # fmt: skip
    here.complete("a", agent="w")
    here.cancel("p")
    take(there, text_of(here))

    states = {
        task.id: (task.state, task.waiting) for task in there if "after" in task.id or "what" in task.id
    }
    assert {
        "after a": (TaskState.PENDING, 0),
        "after p": (TaskState.SKIPPED, 1),
        "whatever p": (TaskState.PENDING, 0),
        "after after": (TaskState.FAILED, 1),
    } == states
    assert there.verify()
    assert take(there, text_of(here)).events == 0


def test_another_story_is_refused(here: TaskLedger, there: TaskLedger) -> None:
    """A task of the same id that lived otherwise is named with both stories, and nothing at all comes in."""
    there.add_task("b", description="mine")
    with pytest.raises(DuplicateTask, match=r"task 'b' of .* and task 'b' of session 'main'") as refused:
        take(there, text_of(here))
    assert "b" == refused.value.task_id
    assert ["b"] == [task.id for task in there]


def test_stories_that_parted_are_refused(here: TaskLedger, there: TaskLedger) -> None:
    """The event at which they part is told, from here and from there."""
    take(there, text_of(here))
    here.pause("a", agent="w")
    there.complete("a", agent="w")
    with pytest.raises(DuplicateTask, match=r"event 6 .*active → paused.* there and .*active → done.* here"):
        take(there, text_of(here))
    assert there.verify()


def test_two_sides_that_went_on_are_refused(here: TaskLedger, there: TaskLedger) -> None:
    """Each knows more of one task: what one of them did may contradict the other, so nothing is mixed."""
    take(there, text_of(here))
    here.cancel("c")
    there.cancel("p.2")
    with pytest.raises(DuplicateTask, match="both went on"):
        take(there, text_of(here))
    assert TaskState.PENDING == there.get("c").state


def test_a_file_is_replaced_whole(here: TaskLedger, tmp_path: Path) -> None:
    """An export takes the place of the one before, keeps its rights, and leaves nothing beside it."""
    file = tmp_path / "backup" / "tasks.json"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o640)
    assert 6 == here.export(file)
    assert text_of(here) == file.read_text()
    assert 0o640 == file.stat().st_mode & 0o777
    assert [file] == list(file.parent.iterdir())


def test_a_file_that_cannot_be_written(here: TaskLedger, tmp_path: Path) -> None:
    """It is said which."""
    with pytest.raises(StoreError, match=r"nowhere.*nothing was exported"):
        here.export(tmp_path / "nowhere" / "tasks.json")


def test_an_export_is_a_ledger_too(here: TaskLedger, tmp_path: Path) -> None:
    """The file may be put into a folder of JSON ledgers and worked on."""
    (tmp_path / "folder").mkdir()
    here.export(tmp_path / "folder" / "ledger_main.json")
    ledger = TaskLedger(f"json:{tmp_path / 'folder'}", agent="w")
    ledger.complete("a")
    assert ["b", "p.1", "p.2"] == [task.id for task in ledger.get_parallel_executable_tasks()]
    assert Imported(tasks=1, events=1, known=5) == take(here, text_of(ledger))


def test_another_session_is_refused(here: TaskLedger, there: TaskLedger) -> None:
    """The session is part of what was sealed; the message says which to open."""
    with pytest.raises(UsageError, match="session='main'"):
        take(there.in_session("other"), text_of(here))
    assert [] == there.sessions()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"progress":0.25', '"progress":0.75'),
        ('"actor":"w"', '"actor":"v"'),
        ('"state":"pending"', '"state":"done"'),
    ],
)
def test_a_changed_file_is_refused(here: TaskLedger, there: TaskLedger, old: str, new: str) -> None:
    """A file that does not agree with itself brings nothing in."""
    text = text_of(here)
    assert old in text
    with pytest.raises(Tampered, match="changed by something that is not a ledger"):
        take(there, text.replace(old, new, 1))
    assert 0 == len(there)


@pytest.mark.parametrize("event", ["first", "middle", "last"])
def test_a_file_without_an_event_is_refused(here: TaskLedger, there: TaskLedger, event: str) -> None:
    """Whichever is missing."""
    found = json.loads(text_of(here))
    its = [told for told in found["events"] if told["task"] == "a"]
    found["events"].remove({"first": its[0], "middle": its[2], "last": its[-1]}[event])
    with pytest.raises(Tampered):
        take(there, json.dumps(found))
    assert 0 == len(there)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"format": "ledger-tasks", "schema": 2}'])
def test_what_is_no_export_is_refused(there: TaskLedger, text: str, tmp_path: Path) -> None:
    """It is named, and nothing comes in."""
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(StoreError, match=r"odd\.json"):
        there.import_from(file)
    with pytest.raises(StoreError, match=r"absent\.json cannot be read"):
        there.import_from(tmp_path / "absent.json")
    assert 0 == len(there)


def test_deliveries_come_along(here: TaskLedger, there: TaskLedger) -> None:
    """What was delivered is known in the other store, once."""
    sent: dict[str, object] = {
        "recipient": "Ann",
        "channel": "mail",
        "key": "k",
        "outcome": "sent",
        "why": "",
        "call": "c",
    }
    sent |= {"at": 5, "until": 6}
    here.store.write("main", lambda book: add_deliveries(book, [sent]))
    for _ in range(2):
        take(there, text_of(here))
        assert [sent] == there.store.read("main", deliveries_of)


def test_an_empty_session(there: TaskLedger) -> None:
    """It exports a file that brings in nothing."""
    text = text_of(there)
    assert Imported(tasks=0, events=0, known=0) == take(there, text)
