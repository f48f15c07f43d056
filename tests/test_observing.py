"""What people and programs see: the log, sums, histories, events, notices, callbacks, warnings."""

import io
import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Guard, MemoryStore, Record
from tests.stores.kit import guard_on


class CardError(Exception):
    """A card was declined."""


def send_email(to: str, body: str = "", sent_at: int = 0) -> str:
    """A tool that works."""
    return f"sent to {to}"


def stripe_charge(amount: int) -> None:
    """A tool that fails."""
    raise CardError("declined")


@pytest.fixture(params=["sqlite", "memory"])
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guard]:
    """A guard of its own on each of the built-in stores, in its usual loudness."""
    with guard_on(request.param, tmp_path, quiet=False) as made:
        yield made


def tell_a_story(guard: Guard) -> None:
    """Three attempts of a tool that works, one of a tool that fails."""
    for _ in range(3):
        guard(send_email, "a")
    with pytest.raises(CardError, match="declined"):
        guard(stripe_charge, 5)


def test_the_log_has_these_lines(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """log() prints one aligned line per tool to stdout, with the error of a failed one."""
    tell_a_story(guard)
    capsys.readouterr()

    guard.log()

    assert capsys.readouterr().out.splitlines() == [
        "✓ send_email    attempts 3   executed 1   blocked 2",
        "✗ stripe_charge attempts 1   executed 0   → CardError: declined",
    ]


def test_the_log_prints_also_when_quiet(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """log() is asked for, so quiet does not silence it."""
    guard.quiet()
    guard(send_email, "a")

    guard.log()

    assert capsys.readouterr().out == "✓ send_email attempts 1   executed 1\n"


def test_the_log_shows_full_names_where_short_ones_collide(
    guard: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tools of one short name are shown by their full names."""
    guard.policy(stripe_charge, name="shop.send_email")
    guard(send_email, "a")
    with pytest.raises(CardError, match="declined"):
        guard(stripe_charge, 5)
    capsys.readouterr()

    guard.log()

    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1].endswith(".send_email") for line in lines) == [True, True]


def test_the_sums(guard: Guard) -> None:
    """stats() has these keys, over all tools and per tool."""
    tell_a_story(guard)

    stats = guard.stats()

    tools = stats.pop("tools")
    assert stats == {
        "actions": 2, "attempts": 4, "executed": 1, "blocked": 2,
        "failed": 1, "in_doubt": 0, "suspended": 0, "running": 0,
    }  # fmt: skip
    assert sorted(name.rsplit(".", 1)[-1] for name in tools) == ["send_email", "stripe_charge"]
    assert all(sums.keys() == stats.keys() for sums in tools.values())


def test_an_empty_ledger_has_sums_too(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first call all sums are zero, and log() prints nothing."""
    stats = guard.stats()
    guard.log()

    assert {v for k, v in stats.items() if k != "tools"} == {0}
    assert (capsys.readouterr().out, guard.history(), list(guard.events())) == ("", [], [])


def test_history_is_json_with_all_runs_inside(guard: Guard) -> None:
    """history() has one JSON-safe dict per call, its latest run on top and all runs inside."""
    tell_a_story(guard)
    guard.retry(send_email, "a")
    guard(send_email, "a")

    history = guard.history()

    assert json.loads(json.dumps(history)) == history
    email = history[0]
    assert (email["run"], len(email["runs"]), email["executed"], email["blocked"]) == (2, 2, 2, 2)
    assert (email["status"], email["result"], email["args"]["to"]) == ("success", "sent to a", "a")
    assert (history[1]["status"], history[1]["error"]) == ("failed", "CardError: declined")
    assert "CardError" in history[1]["runs"][0]["trace"]


def test_history_filters_by_tool_and_workflow(guard: Guard) -> None:
    """tool= takes the short or the full name, wf= a workflow; both together narrow further."""
    for wf in ("a", "b"):
        with guard.workflow(wf):
            tell_a_story(guard)
    full = guard.history()[0]["tool"]

    assert [h["wf"] for h in guard.history(tool="send_email")] == ["a", "b"]
    assert [h["wf"] for h in guard.history(tool=full)] == ["a", "b"]
    assert [h["wf"] for h in guard.history(wf="b")] == ["b", "b"]
    assert [h["error"] for h in guard.history(tool="stripe_charge", wf="a")] == ["CardError: declined"]
    assert guard.history(tool="email") == []


def test_history_can_be_streamed(guard: Guard) -> None:
    """stream=True gives an iterator of the same dicts."""
    tell_a_story(guard)

    stream = guard.history(stream=True)

    assert iter(stream) is stream
    assert list(stream) == guard.history()


def test_events_go_on_after_a_number(guard: Guard) -> None:
    """events(after=seq) has what happened later, in order, with numbers that only grow."""
    guard(send_email, "a")
    first = list(guard.events())
    guard(send_email, "a")
    guard(send_email, "b")
    later = list(guard.events(after=first[-1]["seq"]))

    assert [e["kind"] for e in first] == ["claimed", "success"]
    assert sorted(e["kind"] for e in later) == ["blocked", "claimed", "success"]
    numbers = [e["seq"] for e in first + later]
    assert numbers == sorted(set(numbers))
    assert json.loads(json.dumps(later)) == later


def test_notices_go_to_stderr_never_to_stdout(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """Every notice is a [ledger] line on stderr; stdout belongs to the program."""
    tell_a_story(guard)

    seen = capsys.readouterr()

    lines = [line for line in seen.err.splitlines() if "new ledger" not in line]
    assert seen.out == ""
    assert lines == [
        "[ledger] ✓ send_email",
        "[ledger] ⊘ send_email blocked: already done",
        "[ledger] ⊘ send_email blocked: already done",
        "[ledger] ✗ stripe_charge   → CardError: declined",
    ]


@pytest.mark.parametrize("how", ["quiet()", "quiet=True", "LEDGER_QUIET"])
def test_quiet_prints_nothing(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quiet guard prints no notice, not even of its new file, however it was made quiet."""
    if how == "LEDGER_QUIET":
        monkeypatch.setenv("LEDGER_QUIET", "1")
    guard = Guard(tmp_path / "ledger.db", quiet=True if how == "quiet=True" else None)
    if how == "quiet()":
        guard.quiet()

    tell_a_story(guard)
    guard.close()

    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "")


def test_callbacks_get_the_record_several_each(guard: Guard) -> None:
    """Each of several callbacks is called with the record, after success, block and failure."""
    told: list[tuple[str, str, int]] = []

    def teller(name: str) -> Any:
        return lambda record: told.append((name, record.short, record.attempts))

    for name in ("one", "two"):
        guard.on_success(teller(f"success {name}"))
        guard.on_failure(teller(f"failure {name}"))
    guard.on_block(teller("block"))
    tell_a_story(guard)

    assert [t[:2] for t in told] == [
        ("success one", "send_email"),
        ("success two", "send_email"),
        ("block", "send_email"),
        ("block", "send_email"),
        ("failure one", "stripe_charge"),
        ("failure two", "stripe_charge"),
    ]


def test_on_doubt_is_told_of_an_interrupted_run(guard: Guard) -> None:
    """on_doubt is called with a record that says in doubt."""
    told: list[Record] = []
    guard.on_doubt(told.append)

    def tool() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(tool)

    assert [r.in_doubt for r in told] == [True]


def test_a_callback_that_raises_is_logged(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    """A callback's exception does not reach the caller, is logged, and the next callback is called."""
    told: list[Record] = []

    def broken(record: Record) -> None:
        raise RuntimeError("callback is broken")

    for register in (guard.on_success, guard.on_block, guard.on_failure):
        register(broken)
        register(told.append)
    with caplog.at_level(logging.WARNING, "ledger"):
        tell_a_story(guard)

    assert [r.short for r in told] == ["send_email"] * 3 + ["stripe_charge"]
    assert len(caplog.records) == 4
    assert all("broken" in r.getMessage() and r.exc_info for r in caplog.records)


def warnings_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The footgun warnings on stderr so far."""
    return [line for line in capsys.readouterr().err.splitlines() if "⚠" in line]


def test_the_footgun_warning(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """Three calls that differ in one argument are warned of in these words, once per tool and process."""
    guard.policy(send_email, name=f"shop{id(guard)}.send_email")
    for n in range(7):
        guard(send_email, "a", "hello", sent_at=n)

    assert "\n".join(warnings_in(capsys)) == (
        "[ledger] ⚠  send_email called 3× with different args in <10s (only sent_at changes) — "
        "if retrying, add key=…"
    )
    other = Guard(store=MemoryStore(), quiet=False)
    other.policy(send_email, name=f"shop{id(guard)}.send_email")
    for n in range(7):
        other(send_email, "a", "hello", sent_at=n)
    assert warnings_in(capsys) == []


def test_no_footgun_warning_without_reason(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """Duplicates, two calls, calls with a key and unlimited tools are not warned of."""
    for _ in range(5):
        guard(send_email, "a")
    guard(send_email, "b")
    for n in range(5):
        guard(send_email, "c", sent_at=n, key=f"order-{n}")

    def look(page: int) -> int:
        return page

    guard.policy(look, unlimited=True)
    for n in range(5):
        guard(look, n)

    assert warnings_in(capsys) == []


def test_current_tells_the_run_and_nothing_outside(guard: Guard) -> None:
    """current() inside a tool names call, run, tool, workflow and caller; outside it is None."""
    seen: list[ledger.Current | None] = []

    def tool() -> None:
        seen.append(ledger.current())

    with guard.workflow("order-1"), guard.as_caller("planner"):
        record = guard.call(tool).record
    assert ledger.current() is None

    (run,) = seen
    assert run is not None
    assert (run.call, run.run, run.wf, run.caller) == (record.call, 1, "order-1", "planner")
    assert run.idempotency_key.startswith(run.call)
    with pytest.raises(ledger.UsageError, match="outside a guarded tool"):
        ledger.idempotency_key()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_rerun_has_the_same_idempotency_key(guard: Guard, error: type[BaseException]) -> None:
    """After a failure or an interruption the next run of the same effect has the same key."""
    keys: list[str] = []

    def tool() -> None:
        keys.append(ledger.idempotency_key())
        if len(keys) == 1:
            raise error

    with pytest.raises(error):
        guard(tool)
    guard(tool)

    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_an_intended_repeat_has_another_idempotency_key(guard: Guard) -> None:
    """After retry, by force, by max and in another workflow the effect is meant again: a new key."""
    keys: list[str] = []

    def tool() -> None:
        keys.append(ledger.idempotency_key())

    guard(tool)
    guard.retry(tool)
    guard(tool)
    guard.force(tool)
    guard.policy(tool, max=5)
    guard(tool)
    with guard.workflow("another"):
        guard(tool)

    assert (len(keys), len(set(keys))) == (5, 5)


def test_check_says_that_all_is_well(tmp_path: Path) -> None:
    """guard.check() proves that the ledger can be read and written."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)

    found = guard.check()
    guard.close()

    assert (found["ok"], found["store"]) == (True, str(tmp_path / "ledger.db"))


def test_check_raises_for_what_is_no_ledger(tmp_path: Path) -> None:
    """guard.check() of something else is a StoreError, and the file stays as it is."""
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database at all" * 100)

    with pytest.raises(ledger.StoreError):
        Guard(path, quiet=True).check()

    assert path.read_bytes() == b"no database at all" * 100


def test_a_guard_says_where_it_keeps_its_records(tmp_path: Path) -> None:
    """Its text form names the store or the file."""
    texts = [repr(Guard(store=MemoryStore())), repr(Guard(tmp_path / "l.db")), repr(Guard())]

    assert ["Guard(MemoryStore)", f"Guard({tmp_path / 'l.db'})", "Guard(LEDGER_DB or ./ledger.db)"] == texts
    assert "ledger.NOT_DONE" == repr(ledger.NOT_DONE)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_notice_reaches_a_narrow_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stderr cannot say ✓ it says something else, and the tool's result is not lost."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(raw, encoding, write_through=True))

    assert "sent to a" == Guard(store=MemoryStore(), quiet=False)(send_email, "a")

    assert {"ascii": b"[ledger] ? send_email\n", "utf-8": "[ledger] ✓ send_email\n".encode()}[
        encoding
    ] == raw.getvalue()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_lost_stderr_loses_no_result(stream: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without stderr, or with a closed one, gets its results all the same."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed if stream else None)

    assert "sent to a" == Guard(store=MemoryStore(), quiet=False)(send_email, "a")


class Unprintable(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_without_words_is_recorded_by_its_type(guard: Guard) -> None:
    """The tool's own error reaches the caller, and the record has its type."""

    def fail() -> None:
        raise Unprintable

    with pytest.raises(Unprintable):
        guard(fail)

    assert "Unprintable" == guard.history()[0]["error"]


def test_no_footgun_warning_across_workflows(guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    """The same call in three workflows is three actions, and no drift."""
    guard.policy(send_email, name=f"flow{id(guard)}.send_email")
    for order in range(3):
        with guard.workflow(f"order-{order}"):
            guard(send_email, "a")

    assert [] == warnings_in(capsys)


def test_a_look_waits_for_no_writer(tmp_path: Path) -> None:
    """While another process holds the write lock, sums and histories are answered from what is written."""
    guard = Guard(tmp_path / "ledger.db", quiet=True)
    guard(send_email, "a")
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        guard(send_email, "a")

        assert (1, 1, 2) == (guard.stats()["executed"], len(guard.history()), len(list(guard.events())))
        holder.execute("ROLLBACK")

    guard.flush()
    assert 1 == guard.stats()["blocked"]
    guard.close()
