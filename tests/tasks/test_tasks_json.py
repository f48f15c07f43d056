"""Tasks in JSON files: kept whole, shared by processes, and never begun afresh over what cannot be read."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger import SqliteStore, StoreError
from ledger_tasks import Dep, NotHolder, Tampered, Task, TaskLedger, TaskState, create_ledger_for_user_prompt
from ledger_tasks.json_files import JsonTaskStore, file_name
from tests.actors import PATIENCE, Stage, eventually, stage

OPEN = """\
from ledger_tasks import NotHolder, Task, TaskLedger
from ledger_tasks.json_files import JsonTaskStore
ledger = TaskLedger(JsonTaskStore(DB + ".d", lock_seconds=600), agent=sys.argv[2])
"""


@pytest.fixture(name="folder")
def a_folder(tmp_path: Path) -> Path:
    """Where the files are; not made yet."""
    return tmp_path / "tasks"


@pytest.fixture(name="tasks")
def some_tasks(folder: Path) -> Iterator[TaskLedger]:
    """An empty ledger."""
    ledger = TaskLedger(f"json:{folder}", agent="me")
    yield ledger
    ledger.close()


@pytest.fixture(name="actors")
def some_actors(tmp_path: Path) -> Iterator[Stage]:
    """A stage whose ledger is `folder_of` it."""
    with stage(tmp_path) as made:
        yield made


def folder_of(actors: Stage) -> Path:
    """Where the scripts above keep their tasks."""
    return Path(f"{actors.db}.d")


def anew(tasks: TaskLedger) -> TaskLedger:
    """The same files, read by somebody who has not seen them."""
    assert isinstance(tasks.store, JsonTaskStore)
    return TaskLedger(JsonTaskStore(tasks.store.folder), agent="other", session=tasks.session)


# -- what is kept --


def test_a_ledger_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User and prompt name the file in agent_data, the agent and the session, and it says how far it is."""
    monkeypatch.chdir(tmp_path)
    ledger = create_ledger_for_user_prompt(123, 456)
    ledger.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),)), Task("c")])
    ledger.complete_task_and_route("a")

    assert "TaskLedger(456:123_456, 3 tasks, 33.3% complete)" == repr(ledger)
    assert (tmp_path / "agent_data" / "ledger_123_456.json").is_file()


def test_everything_is_read_back(tasks: TaskLedger) -> None:
    """Somebody else sees the same tasks, events, claims and numbers, and may go on with a claim."""
    tasks.add_tasks([Task("a", priority=9), Task("b", depends_on=(Dep("a"),)), Task("p")])
    tasks.add_subtasks("p", ["first", "second"])
    claim = tasks.claim_next("w", lease=60)
    assert claim is not None
    tasks.start(claim)
    tasks.checkpoint(claim, {"Füße": [1, 2.5, None]})

    other = anew(tasks)
    assert list(tasks) == list(other)
    assert [task.waiting for task in tasks] == [task.waiting for task in other]
    assert list(tasks.events()) == list(other.events())
    assert other.heartbeat(claim)
    other.complete(claim)
    assert ["b", "p.1", "p.2"] == [task.id for task in tasks.get_parallel_executable_tasks()]
    assert tasks.verify()


def test_looking_makes_nothing(tasks: TaskLedger, folder: Path) -> None:
    """Neither a file nor a folder appears because somebody looked."""
    assert [] == tasks.list_tasks()
    assert [] == tasks.sessions()
    assert 0 == tasks.last_seq()
    assert not folder.exists()


def test_a_refusal_writes_nothing(tasks: TaskLedger, folder: Path) -> None:
    """What is refused, or answered without a change, leaves the very same file."""
    tasks.add_task("a")
    before = (folder / "ledger_main.json").stat()
    tasks.claim_task("a", "w")
    held = (folder / "ledger_main.json").stat()
    with pytest.raises(NotHolder):
        tasks.start("a", agent="stranger")
    assert tasks.claim_next("w") is None

    assert before.st_ino != held.st_ino
    assert held.st_ino == (folder / "ledger_main.json").stat().st_ino
    assert held.st_mtime_ns == (folder / "ledger_main.json").stat().st_mtime_ns


def test_a_change_is_one_line_of_events(tasks: TaskLedger, folder: Path) -> None:
    """A difference for git is what happened: one more event, and the lines of that task."""
    tasks.add_tasks([Task(f"t{n}") for n in range(50)])
    before = (folder / "ledger_main.json").read_text().splitlines()
    tasks.claim_task("t7", "w")
    after = (folder / "ledger_main.json").read_text().splitlines()

    new = [line for line in after if line not in before]
    assert len(before) + 1 == len(after)
    assert 4 == len(new)  # its snapshot, its claim, its event, and a comma after the one before


def test_sessions_have_files_of_their_own(tasks: TaskLedger, folder: Path) -> None:
    """Any name is a session's, and each reads its own file; all of them can be listed together."""
    names = ["main", "ünï/../x", "..", "a b", "", "x" * 300]
    for name in names:
        tasks.in_session(name).add_task(f"of {name}")

    other = anew(tasks)
    assert sorted(names) == other.sessions()
    assert {path.parent for path in folder.iterdir()} == {folder}
    for name in names:
        assert [f"of {name}"] == [task.id for task in other.in_session(name)]
    assert [f"of {name}" for name in names] == [task.id for task in other.tasks(all_sessions=True)]


def test_numbers_make_one_order(tasks: TaskLedger, folder: Path) -> None:
    """Events of all sessions are numbered as they happened, also after the lock file was lost."""
    one, two = tasks.in_session("one"), tasks.in_session("two")
    one.add_task("a")
    two.add_task("b")
    one.add_task("c")
    (folder / ".ledger-tasks.lock").unlink()
    two.add_task("d")

    told = [(event.seq, event.task) for event in anew(tasks).events(all_sessions=True)]
    assert [(1, "a"), (2, "b"), (3, "c"), (4, "d")] == told
    assert 4 == anew(tasks).last_seq()


def test_pages_of_all_sessions_miss_nothing(tasks: TaskLedger, folder: Path) -> None:
    """Two sessions may bring the same numbers, as after git pull; a page ends beside them, never between."""
    for name in ("one", "two"):
        elsewhere = TaskLedger(f"json:{folder}-{name}", session=name)
        elsewhere.add_tasks([Task(f"{name}{n}") for n in range(700)])
        folder.mkdir(exist_ok=True)
        shutil.copy(f"{folder}-{name}/ledger_{name}.json", folder)

    assert 1400 == len(tasks.list_tasks(all_sessions=True))
    assert 1400 == len({event.task for event in tasks.events(all_sessions=True)})
    assert 1400 == len({task.id for task in tasks.tasks(all_sessions=True)})


def test_calls_stand_beside(tasks: TaskLedger, folder: Path) -> None:
    """The guard of a JSON ledger keeps its calls in the same folder."""
    calls = tasks.store.calls()
    assert isinstance(calls, SqliteStore)
    assert str(folder / "calls.db") == calls.address
    assert calls is tasks.store.calls()
    assert not (folder / "calls.db").exists()


# -- what is refused --

SPOILED = {
    "empty": b"",
    "blank": b"\n\n",
    "cut off": b'{\n"format": "ledger-tasks",\n"schema": 1,\n"sess',
    "other JSON": b'{"tasks": []}',
    "a list": b"[1, 2]",
    "no text": b"\xff\xfe\x00\x00",
    "newer": b'{"format": "ledger-tasks", "schema": 99}',
    "hollow": b'{"format": "ledger-tasks", "schema": 1}',
    "odd": b'{"format": "ledger-tasks", "schema": 1, "session": "main", "about": {}, "tasks": {}, "held": {},'
    b' "events": [{"task": "a"}], "deliveries": []}',
    "deep": b"[" * 200_000,
}


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED.keys())
def test_what_cannot_be_read_is_left_as_it_is(tasks: TaskLedger, folder: Path, spoiled: bytes) -> None:
    """A spoiled file is an error for who reads and who writes, and is not written over."""
    folder.mkdir()
    file = folder / "ledger_main.json"
    file.write_bytes(spoiled)

    with pytest.raises(StoreError, match=r"ledger_main\.json"):
        tasks.list_tasks()
    with pytest.raises(StoreError, match="left as it is"):
        tasks.add_task("new")
    assert spoiled == file.read_bytes()


def test_every_cut_is_noticed(tasks: TaskLedger, folder: Path) -> None:
    """A file that ends anywhere before its end is refused, wherever that is."""
    tasks.add_tasks([Task("a"), Task("b", depends_on=(Dep("a"),))])
    tasks.close()
    file = folder / "ledger_main.json"
    whole = file.read_bytes()
    for length in range(0, len(whole.rstrip()) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError):
            tasks.list_tasks()
    file.write_bytes(whole)
    assert 2 == len(tasks)


def changed(folder: Path, old: str, new: str) -> None:
    """Change the file as an editor does."""
    file = folder / "ledger_main.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"state":"assigned"', '"state":"done"', "snapshot of task 'a'"),
        ('"set":{"id":"a"', '"set":{"priority":9,"id":"a"', "was altered"),
        ('"to_state":"pending"', '"to_state":"done"', "no legal move"),
        ('"actor":"me"', '"actor":"you"', "was altered"),
        ('"n":1', '"n":2', "where event 1 should be"),
        ('"b": {"op', '"b": {"lease":5.0,"until":5,"op', "a lease runs on task 'b'"),
    ],
)
def test_what_was_changed_by_hand_is_refused(
    tasks: TaskLedger, folder: Path, old: str, new: str, told: str
) -> None:
    """An event or a snapshot that no ledger wrote is named, and nothing is done with the file."""
    tasks.add_tasks([Task("a"), Task("b")])
    tasks.claim_task("a", "w")
    changed(folder, old, new)
    before = (folder / "ledger_main.json").read_bytes()

    with pytest.raises(Tampered, match=told):
        tasks.add_task("c")
    assert before == (folder / "ledger_main.json").read_bytes()


def test_a_file_that_vanished_is_no_new_ledger(tasks: TaskLedger, folder: Path) -> None:
    """Who used it is told; put back, it goes on."""
    tasks.add_task("a")
    file = folder / "ledger_main.json"
    file.rename(folder / "elsewhere")

    for use in (tasks.list_tasks, lambda: tasks.add_task("b")):
        with pytest.raises(StoreError, match="was deleted while it was in use"):
            use()
    assert not file.exists()
    (folder / "elsewhere").rename(file)
    assert ["a", "b"] == [tasks.get("a").id, tasks.add_task("b").id]


def test_a_copy_under_another_name_is_refused(tasks: TaskLedger, folder: Path) -> None:
    """A file is the session's that its name says, so that no session has two."""
    tasks.add_task("a")
    shutil.copy(folder / "ledger_main.json", folder / "ledger_copy.json")

    with pytest.raises(StoreError, match="holds session 'main'"):
        tasks.in_session("copy").list_tasks()
    with pytest.raises(StoreError, match=r"ledger_copy\.json"):
        tasks.list_tasks(all_sessions=True)


def test_a_full_disk_changes_nothing(tasks: TaskLedger, folder: Path) -> None:
    """A file that could not be written is as it was, and memory is as the file."""
    tasks.add_task("a")
    (folder / "ledger_main.json.new").mkdir()  # nothing can be written there
    with pytest.raises(StoreError, match="the file is as it was"):
        tasks.add_task("b")
    assert ["a"] == [task.id for task in tasks]
    (folder / "ledger_main.json.new").rmdir()
    tasks.add_task("b")
    assert ["a", "b"] == [task.id for task in anew(tasks)]


def test_a_lock_that_is_held_is_waited_for_and_named(folder: Path) -> None:
    """Who cannot get it in time is told by whose file; who looks does not wait."""
    ledger = TaskLedger(JsonTaskStore(folder, lock_seconds=0.05))
    ledger.add_task("a")
    with (folder / ".ledger-tasks.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="held by another process"):
            ledger.add_task("b")
        assert ["a"] == [task.id for task in ledger]
    ledger.add_task("b")
    assert 2 == len(ledger)


def test_a_lock_file_that_is_deleted_lets_no_two_in(tmp_path: Path, folder: Path) -> None:
    """Who waited for the deleted one takes the new one before it writes."""
    ledger = TaskLedger(JsonTaskStore(folder))
    ledger.add_task("a")
    lock = folder / ".ledger-tasks.lock"
    with lock.open() as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        lock.rename(tmp_path / "gone")
        with lock.open("w") as new:
            fcntl.flock(new, fcntl.LOCK_EX)
            late = threading.Thread(target=ledger.add_task, args=("b",))
            late.start()
            fcntl.flock(old, fcntl.LOCK_UN)
            late.join(0.1)
            assert late.is_alive()
    late.join(PATIENCE)
    assert ["a", "b"] == [task.id for task in anew(ledger)]


# -- several at once --

ADD = (
    OPEN
    + """
say("ready")
hear()
for n in range(40):
    ledger.add_task(f"{sys.argv[2]}-{n}")
"""
)


def test_two_processes_lose_nothing(actors: Stage) -> None:
    """Whatever two writers add at once is there, in one order that holds together."""
    actors.let_go(actors.crowd(2, ADD))

    ledger = TaskLedger(f"json:{folder_of(actors)}")
    assert {f"{who}-{n}" for who in (0, 1) for n in range(40)} == {task.id for task in ledger}
    assert list(range(1, 81)) == [event.seq for event in ledger.events()]
    assert ledger.verify()


CLAIM = (
    OPEN
    + """
say("ready")
hear()
while claim := ledger.claim_next():
    ledger.start(claim)
    effect(claim.id)
    ledger.complete(claim)
"""
)


def test_each_task_is_claimed_once(actors: Stage) -> None:
    """Three processes do what there is, each task once, in the order of its dependencies."""
    ledger = TaskLedger(f"json:{folder_of(actors)}")
    ledger.add_tasks([Task(f"t{n}", depends_on=(Dep(f"t{n - 3}"),) if n > 2 else ()) for n in range(60)])
    actors.let_go(actors.crowd(3, CLAIM))

    done = actors.effects()
    assert sorted(task.id for task in ledger) == sorted(done)
    assert {"done": 60} == {state.value: count for state, count in ledger.counts().items()}
    assert all(done.index(f"t{n - 3}") < done.index(f"t{n}") for n in range(3, 60))


def test_threads_share_a_store(tasks: TaskLedger) -> None:
    """Threads of one process take turns like processes."""
    tasks.add_tasks([Task(f"t{n}") for n in range(30)])
    got: list[str] = []

    def work() -> None:
        while claim := tasks.claim_next("w"):
            got.append(claim.id)

    crowd = [threading.Thread(target=work) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(PATIENCE)
    assert sorted(f"t{n}" for n in range(30)) == sorted(got)


TOIL = (
    OPEN
    + """
number = len(ledger)
say("ready")
while True:
    ledger.add_task(f"{sys.argv[2]}-{number}", description="x" * 9_000)
    effect(sys.argv[2], number)
    number += 1
"""
)


def test_killed_in_the_midst_of_writing(actors: Stage) -> None:
    """A writer that is killed at any moment leaves a whole file with all it was answered, and no lock."""
    for turn in range(5):
        actor = actors.start(TOIL, turn)
        assert actor.line() == "ready"
        told = len(actors.effects())
        eventually(lambda told=told, turn=turn: len(actors.effects()) > told + turn % 4)  # type: ignore[misc]
        actor.kill()

        ledger = TaskLedger(f"json:{folder_of(actors)}")
        there = {task.id for task in ledger}
        told_of = {"-".join(line.split()) for line in actors.effects()}
        assert told_of <= there
        assert len(there - told_of) <= turn + 1
        assert ledger.verify()


FORK = (
    OPEN
    + """
ledger.add_task("first")
def write():
    for n in range(30):
        ledger.add_task(f"thread-{n}")
thread = threading.Thread(target=write)
thread.start()
children = []
for n in range(6):
    child = os.fork()
    if not child:
        assert "first" in ledger
        ledger.add_task(f"child-{n}")
        os._exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
thread.join()
say(codes, len(ledger))
"""
)


def test_forks_in_the_midst_of_writes(actors: Stage) -> None:
    """Children that are forked while a thread writes work on, and hold no lock of their parent."""
    actor = actors.start(FORK, "parent")
    assert "[0, 0, 0, 0, 0, 0] 37" == actor.line()
    actor.ends_well()


def test_what_others_wrote_is_seen(tasks: TaskLedger) -> None:
    """A store that has the session in memory looks whether the file is another one."""
    tasks.add_task("a")
    other = anew(tasks)
    for n in range(12):
        other.add_task(f"b{n}")
        assert 2 * n + 2 == len(tasks)
        tasks.add_task(f"c{n}")
        tasks.complete_task_and_route(f"c{n}")
        assert TaskState.DONE == other.get(f"c{n}").state
        other.cancel(f"b{n}")
        assert TaskState.CANCELLED == tasks.get(f"b{n}").state
        other.store.close()


def test_names_of_files() -> None:
    """Plain names are themselves, all others are told apart."""
    assert "ledger_123_456.json" == file_name("123_456")
    odd = ["", ".", "..", "a/b", "a_b", "A b", "ä", "é", "x" * 200, "x" * 201, "a~b", "-", "con:"]
    assert len(odd) == len({file_name(name) for name in odd})
    assert all("/" not in file_name(name) and len(file_name(name)) < 200 for name in odd)


def test_the_file_is_a_document(tasks: TaskLedger, folder: Path) -> None:
    """Any program reads it as JSON."""
    tasks.add_task("a", description="Grüße")
    found = json.loads((folder / "ledger_main.json").read_text("utf-8"))
    assert ("ledger-tasks", 1, "main") == (found["format"], found["schema"], found["session"])
    assert {"a": "Grüße"} == {name: task["description"] for name, task in found["tasks"].items()}
    assert [("a", "created", 1)] == [(e["task"], e["kind"], e["seq"]) for e in found["events"]]
