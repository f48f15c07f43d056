"""Importing, finding the file, and taking a guard to another process."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest

import ledger
from ledger import Guard, MemoryStore, UsageError

SOURCE = Path(ledger.__file__)

QUICKSTART = """
from ledger import guard
runs = []
def charge(order):
    runs.append(order)
    return {"charged": order}
print(guard(charge, order=1), guard(charge, order=1), runs)
"""


def python(
    code: str, folder: Path, *flags: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in `folder`, with nothing of the user's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LEDGER_")}
    kept |= {"PYTHONPATH": str(SOURCE.parent), "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=folder,
        env=kept,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=check,
    )


def charge(order: int) -> str:
    """A tool of a module."""
    return f"charged {order}"


def test_import_has_no_side_effect(tmp_path: Path) -> None:
    """Importing makes no file and no thread, prints nothing, and loads neither asyncio nor logging."""
    code = (
        "import os, sys, threading; import ledger; assert threading.active_count() == 1;"
        "assert os.listdir() == []; assert not {'asyncio', 'inspect', 'logging'} & set(sys.modules)"
    )

    done = python(code, tmp_path, "-S", "-s")

    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("", "", [])


def test_a_program_without_logging_gets_warnings_on_stderr(tmp_path: Path) -> None:
    """What would be logged is printed, also by a quiet guard, and `logging` is not loaded for it."""
    code = (
        "import sys; from ledger import Guard, MemoryStore; guard = Guard(store=MemoryStore(), quiet=True)\n"
        "guard.on_success(lambda record: 1 / 0)\n"
        "guard(len, 'done'); assert 'logging' not in sys.modules"
    )

    done = python(code, tmp_path, "-S", "-s")

    said, *trace = done.stderr.splitlines()
    assert said.startswith("[ledger] the callback <lambda> raised for")
    assert (trace[0], trace[-1]) == (
        "Traceback (most recent call last):",
        "ZeroDivisionError: division by zero",
    )


def test_the_file_alone_runs_the_quickstart(tmp_path: Path) -> None:
    """A copy of ledger.py in an empty folder is a valid install, under python -S -E -s."""
    shutil.copy(SOURCE, tmp_path)
    script = tmp_path / "quickstart.py"
    script.write_text(QUICKSTART, encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-S", "-E", "-s", str(script)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("LEDGER_")},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )

    assert done.stdout == "{'charged': 1} None [1]\n"
    assert (tmp_path / "ledger.db").exists()


def test_a_second_process_finds_the_call_done(tmp_path: Path) -> None:
    """A call that one process made is blocked in the next."""
    code = QUICKSTART.replace("def charge", "from ledger import Guard\ndef charge")

    outputs = [python(code, tmp_path).stdout for _ in range(2)]

    assert outputs == ["{'charged': 1} None [1]\n", "None None []\n"]


def test_a_new_file_is_announced_with_its_full_path(tmp_path: Path) -> None:
    """Making a file is a notice on stderr with the full path; finding one is none."""
    first, second = (python(QUICKSTART, tmp_path) for _ in range(2))

    assert str(tmp_path.resolve() / "ledger.db") in first.stderr
    assert str(tmp_path.resolve()) not in second.stderr


def test_the_environment_is_read_when_first_needed(tmp_path: Path) -> None:
    """LEDGER_DB may be set after the import, until the first call."""
    code = (
        "import os; from ledger import guard; os.environ['LEDGER_DB'] = 'other.db';"
        "guard(print, 'ran'); os.environ['LEDGER_DB'] = 'late.db'; guard(print, 'ran'); guard.close()"
    )

    done = python(code, tmp_path, LEDGER_DB="early.db")

    assert done.stdout == "ran\n"
    assert [p.name for p in tmp_path.glob("*.db")] == ["other.db"]


def test_a_relative_path_is_resolved_once(tmp_path: Path) -> None:
    """Changing the folder after the first call does not change the file."""
    code = (
        "import os; from ledger import Guard; g = Guard('mine.db');"
        "g(print, 'ran'); os.mkdir('sub'); os.chdir('sub'); g(print, 'ran'); g.close(); g(print, 'ran')"
    )

    done = python(code, tmp_path)

    assert done.stdout == "ran\n"
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*.db")] == [Path("mine.db")]


@pytest.mark.parametrize("url", ["plain.db", "sqlite:///{}", "sqlite:///rel.db"])
def test_a_path_and_a_url_name_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """A plain path is SQLite; sqlite:/// takes a relative path, or an absolute one after it."""
    monkeypatch.chdir(tmp_path)
    guard = Guard(url.format(tmp_path / "absolute.db"), quiet=True)

    guard(charge, 1)
    guard.close()

    assert len(list(tmp_path.glob("*.db"))) == 1


def test_memory_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory:// keeps everything in the process."""
    monkeypatch.chdir(tmp_path)
    guard = Guard("memory://", quiet=True)

    assert [guard.call(charge, 1).kind for _ in range(2)] == ["executed", "blocked"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_is_refused() -> None:
    """A URL that no store answers to is an error that says what can be used, and nothing runs."""
    guard = Guard("mysql://host/db", quiet=True)

    with pytest.raises(UsageError, match=r"no store for mysql://.*memory://"):
        guard(charge, 1)


def test_a_url_and_a_store_are_refused() -> None:
    """A guard has one store, so giving two is an error at once."""
    with pytest.raises(UsageError, match="not both"):
        Guard("x.db", store=MemoryStore())


def test_persist_moves_to_another_file(tmp_path: Path) -> None:
    """After guard.persist calls are looked for, and recorded, in the new place only."""
    guard = Guard(store=MemoryStore(), quiet=True)
    kinds = [guard.call(charge, 1).kind]
    for name in ("a.db", "a.db", "b.db"):
        guard.persist(tmp_path / name)
        kinds.append(guard.call(charge, 1).kind)
    guard.close()

    assert kinds == ["executed", "executed", "blocked", "executed"]
    assert sorted(p.name for p in tmp_path.glob("*.db")) == ["a.db", "b.db"]


def test_two_guards_of_one_file_agree(tmp_path: Path) -> None:
    """Two guards on one file, by path and by URL, block each other's calls."""
    one = Guard(tmp_path / "a.db", quiet=True)
    two = Guard(f"sqlite:///{tmp_path / 'a.db'}", quiet=True)

    assert [one.call(charge, 1).kind, two.call(charge, 1).kind] == ["executed", "blocked"]
    one.close()


def test_a_pickled_guard_carries_url_settings_and_scope(tmp_path: Path) -> None:
    """A guard that was pickled finds the same file with the same policies, defaults and workflow."""
    guard = Guard(tmp_path / "a.db", quiet=True, sync="claim")
    guard.policy(charge, replay=True)
    guard.workflow("order-1")
    guard(charge, 1)

    copy: Guard = pickle.loads(pickle.dumps(guard))
    outcome = copy.call(charge, 1)

    assert (outcome.kind, outcome.value, outcome.record.wf) == ("replayed", "charged 1", "order-1")
    guard.close()
    copy.close()


def test_a_pickled_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard is shipped with the full path, so a worker in another folder uses the same file."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    guards = [Guard("a.db", quiet=True), Guard("sqlite:///a.db", quiet=True)]
    shipped = [pickle.dumps(g) for g in guards]
    monkeypatch.chdir(tmp_path / "sub")

    copies: list[Guard] = [pickle.loads(s) for s in shipped]
    kinds = [g.call(charge, 1).kind for g in copies]
    copies[0].close()

    assert (kinds, (tmp_path / "a.db").exists()) == (["executed", "blocked"], True)


@pytest.mark.parametrize("made", [{"store": MemoryStore()}, {"url": "memory://"}], ids=["store", "url"])
def test_a_guard_in_memory_is_not_pickled(made: Any) -> None:
    """What lives in one process would guard nothing elsewhere, so pickling it is refused."""
    with pytest.raises(UsageError, match="cannot be pickled"):
        pickle.dumps(Guard(**made))


def test_a_guard_goes_to_a_worker_process(tmp_path: Path) -> None:
    """A pickled guard in a fresh process blocks what its sender did."""
    guard = Guard(tmp_path / "a.db", quiet=True)
    runs = tmp_path / "runs"
    path = str(runs)

    def touch(times: int) -> int:
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123 — a worker has no imports of ours
            return file.write("x" * times)

    tool = guard.once(replay=True)(touch)
    first = tool(1)
    shipped = tmp_path / "shipped"
    shipped.write_bytes(cloudpickle.dumps((guard, tool)))
    guard.close()

    code = (
        "import pickle; guard, tool = pickle.load(open('shipped', 'rb'));"
        "print(tool(1), tool(2), tool(2), guard.stats()['attempts'])"
    )
    done = python(code, tmp_path)

    assert (first, done.stdout) == (1, "1 2 2 4\n")
    assert runs.read_text(encoding="utf-8") == "xxx"


def test_all_is_what_can_be_imported() -> None:
    """Every name in __all__ exists, and _Mem is the memory store."""
    assert all(hasattr(ledger, name) for name in ledger.__all__)
    assert ledger._Mem is MemoryStore
