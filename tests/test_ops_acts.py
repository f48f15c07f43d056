"""What a person decides: retry, resolve, clear; each is recorded, and refused beside a live run."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ledger import Guard, InProgress, SqliteStore, UsageError
from ledger_ops import acts
from ledger_ops.reader import NoSuchCall, Reader, open_store
from tests.actors import stage

HELD: list[BaseException] = []
RUNS: list[int] = []
IN_TOOL = "def charge(n):\n    say('in')\n    hear()\n    effect(n)\nguard(charge, int(sys.argv[2]))"


def charge(order: int) -> dict[str, int]:
    """A tool that counts its runs; raises what the test holds ready."""
    RUNS.append(order)
    if HELD:
        raise HELD.pop()
    return {"run": len(RUNS)}


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a file."""
    RUNS.clear()
    HELD.clear()
    made = Guard(tmp_path / "ledger.db", quiet=True)
    made.defaults(replay=True)
    yield made
    made.close()


@pytest.fixture
def store(guard: Guard, tmp_path: Path) -> Iterator[SqliteStore]:
    """The same file, opened by a person, after one call."""
    guard(charge, 1)
    with closing(open_store(tmp_path / "ledger.db")) as opened:
        yield opened


def call_of(store: SqliteStore, order: int = 1) -> str:
    """The fingerprint of the call with that argument."""
    [found] = [r.call for r in Reader(store).stream() if r.args == {"order": order}]
    return found


def notes(store: SqliteStore, call: str, kind: str) -> list[str | None]:
    """What the events of that kind say."""
    return [e.detail for e in Reader(store).call(call).events if e.kind == kind]


def test_retry_lets_one_more_call_run(guard: Guard, store: SqliteStore) -> None:
    """A retried call runs once more, whoever asks; the event says who and why."""
    call = call_of(store)

    record = acts.retry(store, call, actor="ann@desk", note="lost in the mail")

    assert record.released
    assert ["executed", "replayed"] == [guard.call(charge, 1).kind for _ in range(2)]
    assert ["retry by ann@desk: lost in the mail"] == notes(store, call, "released")


@pytest.mark.parametrize("most", [1, 2, 3])
def test_retry_frees_one_success_whatever_the_policy_allows(
    guard: Guard, store: SqliteStore, most: int
) -> None:
    """The tool's max= is not in the ledger, and yet exactly one more call runs."""
    guard.policy(charge, max=most, replay=False)
    for _ in range(5):
        guard(charge, 1)
    assert most == len(RUNS)

    acts.retry(store, call_of(store), actor="ann")
    for _ in range(3):
        guard(charge, 1)

    assert most + 1 == len(RUNS)


def test_retry_frees_the_success_behind_a_forced_failure(guard: Guard, store: SqliteStore) -> None:
    """After a forced run failed, the success before it still blocks; retry frees that one."""
    HELD.append(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        guard.force(charge, 1)

    acts.retry(store, call_of(store), actor="ann")

    assert ["executed", "replayed"] == [guard.call(charge, 1).kind for _ in range(2)]


def test_a_call_that_runs_anyway_is_not_released(guard: Guard, store: SqliteStore) -> None:
    """There is nothing to release in a failed call; the error says so and nothing is written."""
    HELD.append(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        guard(charge, 2)
    call = call_of(store, 2)

    with pytest.raises(UsageError, match="failed, so it runs again anyway"):
        acts.retry(store, call, actor="ann")

    assert [] == notes(store, call, "released")
    with pytest.raises(NoSuchCall, match="not in the ledger"):
        acts.retry(store, "0" * 32, actor="ann")


@pytest.mark.parametrize("done", [True, False])
def test_resolve_settles_a_doubt(guard: Guard, store: SqliteStore, done: bool) -> None:
    """Done: the call is a success with the result that was told. Not done: it runs again."""
    guard.policy(charge, irreversible=True)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(charge, 2)
    call = call_of(store, 2)

    result = '{"run": "by hand"}' if done else None
    record = acts.resolve(store, call, done=done, actor="ann", note="asked the bank", result_json=result)

    assert ("success" if done else "failed") == record.status
    outcome = guard.call(charge, 2)
    assert ("replayed" if done else "executed") == outcome.kind
    assert ({"run": "by hand"} if done else {"run": 3}) == outcome.value
    told = "mark done" if done else "mark not done"
    assert [f"{told} by ann: asked the bank"] == notes(store, call, "resolved")


def test_what_is_in_no_doubt_is_not_resolved(store: SqliteStore) -> None:
    """A success stays one; a result for what was not done, or one that is no JSON, is refused."""
    call = call_of(store)

    with pytest.raises(UsageError, match=r"nothing was resolved: run 1 .* is success"):
        acts.resolve(store, call, done=False, actor="ann")
    with pytest.raises(UsageError, match="no result"):
        acts.resolve(store, call, done=False, actor="ann", result_json="1")
    for bad in ("{", "[" * 60_000):
        with pytest.raises(UsageError, match="no JSON that can be kept"):
            acts.resolve(store, call, done=True, actor="ann", result_json=bad)
    assert [] == notes(store, call, "resolved")


@pytest.mark.parametrize("act", ["retry", "resolve", "clear"])
def test_a_live_run_is_left_alone(tmp_path: Path, act: str) -> None:
    """While the tool runs, each act is refused, names the owner and changes nothing."""
    with stage(tmp_path) as crew:
        actor = crew.start(IN_TOOL, 5)
        assert "in" == actor.line()
        with closing(open_store(crew.db)) as store:
            [running] = Reader(store).running()
            acts_by_name: dict[str, Any] = {
                "retry": lambda: acts.retry(store, running.call, actor="ann"),
                "resolve": lambda: acts.resolve(store, running.call, done=True, actor="ann"),
                "clear": lambda: acts.clear(store),
            }

            with pytest.raises(InProgress, match=f"pid {actor.pid} on "):
                acts_by_name[act]()

            actor.tell("go on")
            actor.ends_well()
            assert ["5"] == crew.effects()
            assert {"claimed", "success"} == {e.kind for e in Reader(store).events()}


def test_clear_forgets_a_workflow(guard: Guard, store: SqliteStore) -> None:
    """Only the calls of that workflow run again; how many is told."""
    with guard.workflow("night"):
        guard(charge, 8)
        guard(charge, 9)

    assert 2 == acts.clear(store, "night")

    with guard.workflow("night"):
        assert "executed" == guard.call(charge, 8).kind
    assert "replayed" == guard.call(charge, 1).kind


def test_force_clears_beside_a_live_run(tmp_path: Path) -> None:
    """With force the live run is forgotten too; its owner is told that its call was reset."""
    with stage(tmp_path) as crew:
        actor = crew.start(IN_TOOL, 5)
        assert "in" == actor.line()
        with closing(open_store(crew.db)) as store:
            assert 1 == acts.clear(store, force=True)
            assert [] == list(Reader(store).stream())
        actor.tell("go on")
        actor.ends_well()

        assert "its call was reset" in actor.errors()


def test_who_acts_is_an_account_on_a_machine() -> None:
    """The name in the event can be asked later."""
    name, _, machine = acts.who().partition("@")

    assert name
    assert machine


def test_a_result_with_a_dollar_is_the_users_own(guard: Guard, store: SqliteStore) -> None:
    """What a person gives as the result comes back as it was, also where it looks like our own marks."""
    guard.policy(charge, irreversible=True)
    HELD.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        guard(charge, 2)

    told = '{"$": "set", "v": [1, 2.50]}'
    acts.resolve(store, call_of(store, 2), done=True, actor="ann", result_json=told)

    given: object = guard(charge, 2)
    assert {"$": "set", "v": [1, 2.5]} == given
