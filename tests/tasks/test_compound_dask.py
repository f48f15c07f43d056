"""The subtasks of compounds on a real cluster of dask.distributed: two worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ledger_tasks import CompoundRunner, PoolClosed, TaskLedger, compound_view
from ledger_tasks.testing import faults
from tests.actors import PATIENCE
from tests.tasks.compound_kit import of_index, opened, plan, step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("distributed") is None and "CI" not in os.environ, reason="needs distributed"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes on loopback."""
    from distributed import LocalCluster

    # without a dashboard, and its HTTP server on loopback too
    quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", **quiet) as found:
        yield found


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    """A client of the cluster."""
    from distributed import Client

    with Client(cluster, set_as_default=False) as found:
        yield found


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in a file."""
    with opened(tmp_path) as found:
        yield found


class Meets:
    """Notes where it runs; each of the first two waits until another process has the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, subtask: dict[str, Any]) -> Any:
        (self.folder / f"{subtask['index']}.{os.getpid()}").touch()
        limit = time.monotonic() + PATIENCE
        while len({path.suffix for path in self.folder.iterdir()}) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        if subtask["index"] == 3:
            raise ValueError("no such page")
        return {"result": [subtask["index"], *subtask["inputs"].values()], "cost": 0.1, "tokens": 10}


def test_subtasks_run_in_both_processes_of_a_cluster(tasks: TaskLedger, client: Any, tmp_path: Path) -> None:
    """With their inputs, costs and errors; each once."""
    folder = tmp_path / "ran"
    folder.mkdir()
    steps = plan(step(0), step(1), step(2, 0, 1), step(3, 0), step(4, 3))
    with CompoundRunner(tasks, steps, Meets(folder), client.get_executor()) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert [[0], [1], [2, [0], [1]], "ValueError: no such page"] == of_index(found, "result")[:4]
    assert ("partial", pytest.approx(0.3), 30) == (
        found["status"],
        found["total_cost"],
        found["total_tokens"],
    )
    assert ["0", "1", "2", "3"] == sorted(path.stem for path in folder.iterdir())
    pids = {int(path.suffix[1:]) for path in folder.iterdir()}
    assert 2 == len(pids - {os.getpid()})
    assert [] == faults(tasks)


def fails_once(subtask: dict[str, Any]) -> str:
    """Fails where it was never called before."""
    mark = Path(subtask["description"])
    if mark.exists():
        return "done"
    mark.touch()
    raise ValueError("once")


def test_a_subtask_that_is_retried_runs_again(tasks: TaskLedger, client: Any, tmp_path: Path) -> None:
    """A cluster may answer equal calls from its memory; an execution never equals another."""
    steps = plan(step(0, description=str(tmp_path / "mark")), step(1, description=str(tmp_path)))
    with CompoundRunner(tasks, steps, fails_once, client.get_executor()) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)
        assert ["ValueError: once", "done"] == of_index(found, "result")
        tasks.retry(found["subtasks"][0]["id"], "the page is back")
        for event in tasks.subscribe(0, every=0.01):
            if event.task == found["subtasks"][0]["id"] and event.to_state == "done":
                break

    assert ["done", "done"] == of_index(compound_view.progress(tasks, found["id"]), "result")


def test_a_client_that_was_closed_takes_nothing_more(tasks: TaskLedger, cluster: Any, tmp_path: Path) -> None:
    """The runner says so, and its subtasks are there for the next."""
    from distributed import Client

    with Client(cluster, set_as_default=False) as closed:
        pool = closed.get_executor()
    pool.shutdown()
    with CompoundRunner(tasks, plan(step(0)), fails_once, pool) as runner:
        made = runner.submit("p")
        with pytest.raises(PoolClosed):
            runner.wait(made["id"], PATIENCE)

    assert ["queued"] == of_index(compound_view.progress(tasks, made["id"]), "status")
