"""What went wrong in a public ledger of this kind, one test for each that it does not happen here."""

from __future__ import annotations

import inspect
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from ledger import Clock, SqliteStore, StoreError
from ledger_stores.testing import FakeClock
from ledger_tasks import Conflict, Dep, InvalidTransition, NoSuchTask, NotHolder, Task, TaskLedger, TaskState
from ledger_tasks.model import EVENT_COLUMNS
from ledger_tasks.sqlite import SqliteTaskStore
from ledger_tasks.testing import after, begun, bring, claimed, faults, finished, ids
from tests.actors import Stage

NAMES: Final = ", ".join((*EVENT_COLUMNS, "hash"))
#: looking, adding, claiming
USES: Final[list[Callable[[TaskLedger], Any]]] = [
    lambda tasks: tasks.list_tasks(),
    lambda tasks: tasks.add_task("new"),
    lambda tasks: tasks.claim_next(),
]
#: a process that opens the ledger, does one thing and says when
SCRIPT = """
from ledger_tasks import Task, TaskLedger
tasks = TaskLedger(DB, agent=f"process {sys.argv[2]}", quiet=True)
say("ready")
hear()
for n in range(25):
    tasks.add_task(f"{sys.argv[2]}-{n}")
    claim = tasks.claim_task(f"{sys.argv[2]}-{n}")
    tasks.start(claim)
    tasks.complete(claim, n)
"""


@pytest.fixture
def clock() -> FakeClock:
    """The only thing that is not real."""
    return FakeClock()


@pytest.fixture
def tasks(tmp_path: Path, clock: FakeClock) -> Iterator[TaskLedger]:
    """A ledger in a file, whose record must agree in the end."""
    made = TaskLedger(on_file(tmp_path / "ledger.db", clock), agent="me", lease=300)
    yield made
    assert [] == faults(made)
    made.close()


def on_file(path: Path, clock: Clock | None = None, **settings: Any) -> SqliteTaskStore:
    """The tasks of a file."""
    return SqliteTaskStore(SqliteStore(path, clock=clock, **settings))


# -- one blob, the last writer wins --


def test_two_processes_lose_none_of_each_others_updates(tmp_path: Path) -> None:
    """Four that write at once: all that each of them did is there."""
    with Stage(tmp_path) as stage:
        stage.let_go(stage.crowd(4, SCRIPT))

    tasks = TaskLedger(stage.db, agent="me", quiet=True)
    assert {f"{p}-{n}": n for p in range(4) for n in range(25)} == {t.id: t.result for t in tasks}
    assert {TaskState.DONE: 100} == tasks.counts()
    assert [] == faults(tasks)


def test_a_decision_on_an_old_version_is_refused(tasks: TaskLedger) -> None:
    """Who read a task before somebody changed it cannot overwrite that unseen."""
    seen = tasks.add_task("a")
    tasks.block("a", "wait", actor="somebody")

    with pytest.raises(Conflict) as caught:
        tasks.cancel("a", expected_version=seen.version)

    assert (seen.version, seen.version + 1) == (caught.value.expected, caught.value.actual)
    assert TaskState.BLOCKED == tasks.get("a").state


# -- unreadable: starting fresh; errors of saving: success --


def garbage(path: Path) -> None:
    """No ledger, and never was."""
    path.write_bytes(b"this is not a database, and it is long enough to be looked at " * 40)


def truncated(path: Path) -> None:
    """The first half of a ledger."""
    TaskLedger(on_file(path), agent="me").add_tasks([Task(f"t{n}") for n in range(50)])
    for beside in ("-wal", "-shm"):
        Path(f"{path}{beside}").unlink(missing_ok=True)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("damage", [garbage, truncated])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_unreadable_store_is_refused_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Nothing starts afresh over a history that cannot be read."""
    path = tmp_path / "ledger.db"
    damage(path)
    before = path.read_bytes()

    for use in USES:
        with pytest.raises(StoreError):
            use(TaskLedger(path, agent="me", quiet=True))

    assert before == path.read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tasks": {}}', "\0" * 100])
def test_an_unreadable_json_ledger_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    """The same of JSON files, where it happened."""
    json_files = pytest.importorskip("ledger_tasks.json_files")  # the module is to come; then import it
    path = tmp_path / "ledger_main.json"
    path.write_text(text)

    for use in USES:
        with pytest.raises(StoreError):
            use(TaskLedger(json_files.JsonTaskStore(tmp_path), agent="me"))

    assert text == path.read_text()


def test_what_cannot_be_saved_is_no_success(tmp_path: Path) -> None:
    """A change that the file did not take raises, and is not there afterwards."""
    path = tmp_path / "ledger.db"
    tasks = TaskLedger(on_file(path, lock_seconds=0.1), agent="me")
    claim = bring(tasks, TaskState.ACTIVE)
    assert claim is not None
    with sqlite3.connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        for change in (
            lambda: tasks.add_task("b"),
            lambda: tasks.complete(claim),
            tasks.claim_next,
            lambda: tasks.heartbeat(claim),
        ):
            with pytest.raises(StoreError):
                change()
        other.rollback()
    other.close()

    assert [("t", TaskState.ACTIVE)] == [(task.id, task.state) for task in tasks]
    tasks.close()


# -- what is offered --


@pytest.mark.parametrize("state", [s for s in TaskState if s != TaskState.PENDING])
def test_what_somebody_has_or_stopped_is_not_offered(tasks: TaskLedger, state: TaskState) -> None:
    """Only PENDING tasks are executable, whichever way one asks."""
    bring(tasks, state)

    assert None is tasks.get_next_executable_task()
    assert [] == tasks.get_parallel_executable_tasks() == tasks.get_available("me")
    assert (None, None) == (tasks.claim_next(), tasks.claim_task("t"))


def test_a_missing_prerequisite_is_neither_met_nor_unmet(tasks: TaskLedger) -> None:
    """It is refused when the task is added, so that no scheduler has to guess."""
    with pytest.raises(NoSuchTask):
        tasks.add_task("a", prerequisites=["gone"])
    tasks.add_task("b")
    with pytest.raises(NoSuchTask):
        tasks.add_dependency("b", "gone")

    assert ["b"] == ids(tasks.get_parallel_executable_tasks())


def test_all_ways_of_asking_agree(tasks: TaskLedger) -> None:
    """Next, parallel, available and claiming give the same tasks in the same order."""
    tasks.add_tasks(
        [
            Task("low", priority=1),
            Task("waits", priority=10, depends_on=after("low")),
            Task("high", priority=9),
            Task("high too", priority=9, type="tool"),
            Task("free", priority=5, depends_on=(Dep("lost", "run"),)),
            Task("lost"),
        ]
    )
    tasks.cancel("lost")
    expected = ["high", "high too", "free", "low"]

    assert expected == ids(tasks.get_parallel_executable_tasks()) == ids(tasks.get_available("me"))
    for name in expected:
        following = tasks.get_next_executable_task()
        claim = tasks.claim_next()
        assert following is not None
        assert claim is not None
        assert (name, name) == (following.id, claim.id)


def test_claiming_heeds_prerequisites_and_priority(tasks: TaskLedger) -> None:
    """The coordinator's claim is the scheduler's choice: never what waits, always the most urgent."""
    tasks.add_tasks(
        [Task("a", priority=2), Task("b", priority=10, depends_on=after("a")), Task("c", priority=3)]
    )

    taken = [claim.id for claim in iter(tasks.claim_next, None)]

    assert ["c", "a"] == taken
    assert None is tasks.claim_task("b")


# -- what is done is deleted --


def test_what_is_done_stays_for_those_that_depend_on_it(tasks: TaskLedger) -> None:
    """No method forgets a task; what comes later may depend on it and is ready at once."""
    tasks.add_tasks([Task("a"), Task("b", depends_on=after("a"))])
    finished(tasks, "a")
    tasks.add_task("c", dependencies=["a"])

    public = {name for name, _ in inspect.getmembers(TaskLedger) if not name.startswith("_")}

    assert not [
        name for name in public if name.startswith(("clear", "delete", "remove", "prune", "purge", "drop"))
    ]
    assert ["b", "c"] == ids(tasks.get_parallel_executable_tasks())
    assert TaskState.DONE == tasks.get("a").state


# -- moves past the table --


def test_a_retry_goes_by_the_table(tasks: TaskLedger) -> None:
    """What somebody is working on cannot be put back by a retry."""
    claim = bring(tasks, TaskState.ACTIVE)

    with pytest.raises(InvalidTransition):
        tasks.retry("t", "I want it anew")

    assert claim is not None
    assert tasks.heartbeat(claim)


def test_a_parent_that_goes_on_is_pending_and_nobodys(tasks: TaskLedger) -> None:
    """It does not become ACTIVE with nobody at work: somebody claims it again."""
    bring(tasks, TaskState.ACTIVE)
    tasks.add_subtasks("t", ["part"])
    finished(tasks, "t.1")

    states = [event.to_state for event in tasks.events("t") if event.kind == "moved"]
    assert ["assigned", "active", "blocked", "pending"] == states
    assert "" == tasks.get("t").assignee
    assert claimed(tasks, "t").task.started_at is not None


# -- what depends on a failure; times that are only stored --


@pytest.mark.parametrize(("policy", "end"), [("skip", "SKIPPED"), ("fail", "FAILED"), ("run", "PENDING")])
def test_a_failed_prerequisite_is_felt(tasks: TaskLedger, policy: Any, end: str) -> None:
    """Dependents of what failed end or run, as they say, and never wait on."""
    tasks.add_tasks([Task("a"), Task("b", depends_on=(Dep("a", policy),))])

    tasks.fail(begun(tasks, "a"), "broken")

    found = tasks.get("b")
    assert (end, policy == "run") == (found.state.name, found.ready)
    assert policy == "run" or "a" in found.reason


def test_a_time_to_begin_is_acted_on(tasks: TaskLedger, clock: FakeClock) -> None:
    """What is scheduled or deferred is not offered before, and is offered then by itself."""
    tasks.add_task("a", not_before=clock.wall() / 1e6 + 60, max_retries=1)
    assert None is tasks.claim_next()
    clock.advance(60)
    claim = tasks.claim_next()
    assert claim is not None
    tasks.start(claim)
    tasks.fail(claim, "broken", retry_in=30)
    assert None is tasks.claim_next()

    clock.advance(30)

    assert tasks.claim_next() is not None


# -- signs of life --


def test_a_worker_that_died_before_its_first_heartbeat_is_stale(tmp_path: Path) -> None:
    """The lease begins with the claim, so silence from the start is silence."""
    tasks = TaskLedger(tmp_path / "ledger.db", agent="me", quiet=True)
    tasks.add_task("a", max_retries=1)
    with Stage(tmp_path) as stage:
        actor = stage.start(
            "from ledger_tasks import TaskLedger\nTaskLedger(DB, agent='other', lease=0.3).claim_next()\n"
            "say('claimed')\nhear()\n"
        )
        actor.line()
        actor.kill()
    limit = time.monotonic() + 60
    while not tasks.stale_tasks() and time.monotonic() < limit:
        time.sleep(0.01)

    assert ["a"] == ids(tasks.recover())
    assert "other has been silent" in tasks.get("a").reason
    tasks.close()


def test_a_heartbeat_is_saved(tasks: TaskLedger, clock: FakeClock, tmp_path: Path) -> None:
    """Another process sees that the holder lives."""
    tasks.add_task("a")
    claim = begun(tasks, "a")
    clock.advance(200)
    assert tasks.heartbeat(claim)
    clock.advance(200)

    other = TaskLedger(on_file(tmp_path / "ledger.db", clock), agent="other")

    assert ([], None) == (other.stale_tasks(), other.claim_next())
    other.close()


def test_times_are_utc_and_say_so(tmp_path: Path) -> None:
    """Wherever a process runs, every time has a zone, and all agree."""
    script = """
os.environ["TZ"] = sys.argv[2]
time.tzset()
from ledger_tasks import TaskLedger
tasks = TaskLedger(DB, agent="other", quiet=True)
claim = tasks.claim_next() or tasks.claim_next()
tasks.start(claim)
tasks.checkpoint(claim, 1)
tasks.complete(claim)
"""
    tasks = TaskLedger(tmp_path / "ledger.db", agent="me", quiet=True)
    tasks.add_tasks([Task("a"), Task("b")])
    with Stage(tmp_path) as stage:
        for zone in ("Asia/Tokyo", "America/Los_Angeles"):
            stage.start(script, zone).ends_well()

    for task in tasks:
        times = [task.created_at, task.assigned_at, task.started_at, task.checkpoint_at, task.completed_at]
        found = [one for one in times if one is not None]
        assert 5 == len(found)
        assert {UTC} == {one.tzinfo for one in found}
        assert sorted(found) == found
        assert found[-1] - found[0] < timedelta(minutes=5)
    tasks.close()


# -- whose claim it is --


def test_only_its_holder_submits_a_result(tasks: TaskLedger) -> None:
    """A result from somebody else, or from a claim that was lost, is refused."""
    late = bring(tasks, TaskState.ACTIVE)
    assert late is not None
    tasks.release(late)
    mine = begun(tasks, "t", "holder")  # the same name, and another claim

    with pytest.raises(NotHolder):
        tasks.complete(late, "late")
    with pytest.raises(NotHolder):
        tasks.complete("t", "x", agent="somebody")

    assert "mine" == tasks.complete(mine, "mine").result


def test_a_claim_is_renewed_as_long_as_its_holder_lives(tasks: TaskLedger, clock: FakeClock) -> None:
    """No claim ends after a fixed time while its holder is heard."""
    claim = bring(tasks, TaskState.ACTIVE)
    assert claim is not None

    for _ in range(20):
        clock.advance(200)
        assert tasks.heartbeat(claim)
        assert [] == tasks.recover()

    assert TaskState.DONE == tasks.complete(claim).state


def test_who_is_heard_between_a_look_and_the_recovery_keeps_its_task(
    tasks: TaskLedger, clock: FakeClock
) -> None:
    """Recovery judges again in its own transaction: what it saw before counts for nothing."""
    claim = bring(tasks, TaskState.ACTIVE)
    assert claim is not None
    clock.advance(301)
    assert ["t"] == ids(tasks.stale_tasks())

    assert tasks.heartbeat(claim)

    assert [] == tasks.recover()
    assert TaskState.DONE == tasks.complete(claim).state


def test_an_error_of_the_store_is_nobodys_death(tmp_path: Path, clock: FakeClock) -> None:
    """Who cannot read whether an agent lives frees nothing, and says so."""
    path = tmp_path / "ledger.db"
    tasks = TaskLedger(on_file(path, clock, lock_seconds=0.1), agent="me", lease=300)
    claim = bring(tasks, TaskState.ACTIVE)
    assert claim is not None
    with sqlite3.connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError):
            tasks.recover()
        other.rollback()
    other.close()

    assert tasks.heartbeat(claim)
    tasks.close()


# -- the seal, and events in memory --


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE task_events SET to_state = 'failed' WHERE to_state = 'done'",
        "UPDATE task_events SET data = replace(data, 'paid', 'lost')",
        "UPDATE task_events SET actor = 'somebody' WHERE n = 2",
        "UPDATE task_events SET at = at + 1 WHERE n = 3",
        "DELETE FROM task_events WHERE n = 4",
        "UPDATE task_docs SET doc = replace(doc, '\"done\"', '\"failed\"')",
        "UPDATE task_docs SET doc = replace(doc, 'paid', 'lost')",
    ],
)
def test_the_seal_covers_state_and_result(tmp_path: Path, change: str) -> None:
    """Whatever is altered behind the ledger's back, in an event or in a task, is found."""
    path = tmp_path / "ledger.db"
    tasks = TaskLedger(on_file(path), agent="me")
    tasks.add_task("a")
    finished(tasks, "a", "paid")
    assert [] == faults(tasks)
    tasks.close()

    with sqlite3.connect(path) as db:
        for trigger in ("task_events_stay", "task_events_are_kept"):
            db.execute(f"DROP TRIGGER {trigger}")
        assert db.execute(change).rowcount > 0
    db.close()

    assert [] != faults(tasks)
    tasks.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE task_events SET to_state = 'failed'",
        "DELETE FROM task_events",
        "INSERT OR REPLACE INTO task_events SELECT * FROM task_events WHERE n = 1",
        f"INSERT OR REPLACE INTO task_events ({NAMES}) SELECT {NAMES} FROM task_events WHERE n = 1",
    ],
)
def test_the_file_itself_refuses_to_change_what_happened(
    tasks: TaskLedger, tmp_path: Path, change: str
) -> None:
    """Whoever opens the file with another program cannot change or delete an event."""
    tasks.add_task("a")
    before = list(tasks.events())

    with sqlite3.connect(tmp_path / "ledger.db") as db, pytest.raises(sqlite3.IntegrityError, match="never"):
        db.execute(change)
    db.close()

    assert before == list(tasks.events())


def test_every_event_is_kept_for_good(tmp_path: Path) -> None:
    """All of a long story is there for the next process, not the last hundred in memory."""
    path = tmp_path / "ledger.db"
    tasks = TaskLedger(on_file(path, sync="off"), agent="me")
    tasks.add_task("a")
    claim = begun(tasks, "a")
    for number in range(300):
        tasks.progress(claim, number / 300, f"step {number}")
    tasks.close()

    again = TaskLedger(on_file(path), agent="me")

    told = list(again.events("a"))
    assert 303 == len(told)
    assert [f"step {number}" for number in range(300)] == [event.stage for event in told[3:]]
    assert again.get("a") == again.replay("a")
    again.close()
