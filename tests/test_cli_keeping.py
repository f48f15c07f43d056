"""export, import, prune, backup, restore and doctor, on ledgers that real processes wrote."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from tests.actors import eventually, stage
from tests.cli_kit import Done, Terminal, copied, make_shop, on_terminal, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop's ledger, made once."""
    return make_shop(tmp_path_factory.mktemp("shop") / "ledger.db")


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Path:
    """A shop's ledger of one's own."""
    return copied(made, tmp_path)


# -- export and import --


def what_calls_say(db: Path) -> set[tuple[str, ...]]:
    """All calls, but for how they stand: of a run whose owner is unknown here, its lease decides."""
    return {tuple(value for name, value in row.items() if name != "status") for row in run("show", db).rows}


def test_an_export_can_be_imported(shop: Path, tmp_path: Path) -> None:
    """Calls, runs and events arrive as they were; a second import changes nothing."""
    exported = run("export", shop)
    copy = tmp_path / "copy.db"

    first = run("import", "-", "--db", copy, input=exported.out)
    second = run("import", "-", "--db", copy, "--json", input=exported.out)

    assert (0, "") == (exported.code, exported.err)
    assert (0, "") == (first.code, first.err)
    assert first.out.startswith("imported 6 calls (6 runs, ")
    assert what_calls_say(shop) == what_calls_say(copy)
    assert (0, 6) == (second.json["calls"], second.json["known"])


def test_an_export_is_lines_of_json(shop: Path) -> None:
    """Each line is one JSON value: what it is, the calls that match, and without a filter the events."""
    filtered = [json.loads(line) for line in run("export", shop, "--wf", "nightly").out.splitlines()]
    whole = [json.loads(line) for line in run("export", shop).out.splitlines()]

    assert 1 == filtered[0]["ledger"]
    assert ["shop.send_email", "shop.book"] == [call["tool"] for call in filtered[1:]]
    assert 6 == sum("rows" in line for line in whole)
    assert any("event" in line for line in whole)


def test_a_table_has_no_formula(tmp_path: Path) -> None:
    """What a spreadsheet would take for a formula is quoted."""
    with stage(tmp_path) as here:
        here.start(
            "def say_it(word): raise ValueError(word)\n"
            "guard.policy(say_it, name='shop.say')\n"
            "try: guard(say_it, '=1+1')\n"
            "except ValueError: pass\n"
            "with guard.as_caller('=cmd|A0'):\n"
            "    try: guard(say_it, '2')\n"
            "    except ValueError: pass\n"
        ).ends_well()

        rows = list(csv.DictReader(io.StringIO(run("export", here.db, "--format", "csv").out)))

    assert {"'=cmd|A0"} == {row["caller"] for row in rows if "cmd" in row["caller"]}
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


def test_an_export_that_matches_nothing_exits_3(shop: Path) -> None:
    """The form stays, the exit code says that nothing is in it."""
    done = run("export", shop, "--tool", "nope", "--format", "csv")

    assert (3, 1) == (done.code, len(done.out.splitlines()))


def test_an_export_can_be_limited(shop: Path) -> None:
    """The oldest so many calls without the events; a limit that is not reached changes nothing."""
    lines = [json.loads(line) for line in run("export", shop, "--limit", "2").out.splitlines()]
    table = run("export", shop, "--limit", "2", "--format", "csv").out.splitlines()
    whole = run("export", shop).out.splitlines()

    assert ["shop.charge", "shop.charge"] == [call["tool"] for call in lines[1:]]
    assert 3 == len(table)
    assert whole[1:] == run("export", shop, "--limit", "7").out.splitlines()[1:]


def test_an_export_to_a_file_is_private_and_replaces_nothing(shop: Path, tmp_path: Path) -> None:
    """The file is new, for its owner only, and an existing one stays as it is."""
    target = tmp_path / "calls.jsonl"

    first = run("export", shop, "-o", target)
    again = run("export", shop, "-o", shop)

    assert (0, "", f"exported 6 calls to {target}\n") == first
    assert 0o600 == target.stat().st_mode & 0o777
    assert (1, "") == (again.code, again.out)
    assert "exists already, nothing was written" in again.err
    assert 6 == len(run("show", shop).rows)


@pytest.mark.parametrize("lines", ["", "no json\n", '{"ledger": 1}\n{"rows": [{"call": 1}]}\n', '{"a": 1}\n'])
def test_what_is_no_export_is_not_imported(lines: str, tmp_path: Path) -> None:
    """The line is named, and not even a ledger is made."""
    done = run("import", "-", "--db", tmp_path / "new.db", input=lines)

    assert (1, "") == (done.code, done.out)
    assert "import" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "new.db").exists()


def test_bytes_are_not_imported(shop: Path, tmp_path: Path) -> None:
    """Neither is a file that is no text, such as a ledger itself."""
    (tmp_path / "random").write_bytes(b'{"ledger": 1}\n\xff\xfe\x00')

    done = run("import", tmp_path / "random", "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert "line 1 is not from `ledger export`" in done.err
    assert "nothing was imported" in done.err


def test_a_file_to_import_that_is_missing_is_a_usage_error(tmp_path: Path) -> None:
    """A path that cannot be opened is told as such."""
    done = run("import", "absent.jsonl", cwd=tmp_path)

    assert 2 == done.code
    assert "absent.jsonl" in done.err
    assert [] == list(tmp_path.iterdir())


# -- prune --


def test_prune_drops_what_calls_said_and_not_that_they_succeeded(shop: Path) -> None:
    """Arguments and results go, failures go; successes stay blocked; what is in doubt stays as it is."""
    planned = run("prune", shop, "--older-than", "1ms", "--dry-run")
    before = run("show", shop).rows

    done = run("prune", shop, "--older-than", "1ms")

    assert (0, "") == (done.code, done.err)
    assert planned.out.startswith("would prune 5 calls: 2 runs and ")
    assert 6 == len(before)
    assert done.out.startswith("pruned 5 calls: 2 runs and ")
    left = {(row["tool"], row["status"], row["arguments"]) for row in run("show", shop).rows}
    assert {
        ("book", "in_doubt", 'city="Lisbon"'),
        ("charge", "success", ""),
        ("send_email", "success", ""),
    } == left
    assert run("show", shop).rows[0] == before[0]


def test_prune_leaves_what_is_young(shop: Path) -> None:
    """Nothing is older than a week here."""
    found = run("prune", shop, "--older-than", "1w", "--json").json

    names = ["calls", "runs", "events", "forgotten", "bytes", "before", "dry_run"]
    assert names == list(found)
    assert [0, 0, 0, 0] == [found[name] for name in names[:4]]


def test_prune_forget_asks_first(shop: Path) -> None:
    """It says how many calls could then run again, and asks; in a pipe it needs --yes."""
    refused = run("prune", shop, "--older-than", "1ms", "--forget")
    with Terminal("prune", shop, "--older-than", "1ms", "--forget") as terminal:
        terminal.sees("3 calls that succeeded before ")
        terminal.press("n\n")
        declined = terminal.ends()
    kept = len(run("show", shop).rows)
    done = run("prune", shop, "--older-than", "1ms", "--forget", "--yes")

    assert (1, "") == (refused.code, refused.out)
    assert "nothing was changed: 3 calls that succeeded before " in refused.err
    assert 1 == declined.code
    assert 6 == kept
    assert 0 == done.code
    assert "3 calls can run again" in done.out
    assert ["book"] == [row["tool"] for row in run("show", shop).rows]


@pytest.mark.parametrize(
    "words", [(), ("--older-than", "a month"), ("--older-than", "0d"), ("--older-than", "1000000d", "--json")]
)
def test_prune_wants_to_know_how_old(words: tuple[str, ...], shop: Path) -> None:
    """Without an age nothing goes, nor with one that no calendar has."""
    done = run("prune", shop, *words)

    assert (2, "") == (done.code, done.out)
    assert "Error: " in done.err


# -- backup and restore --


def charge_more(folder: Path, order: str) -> None:
    """Another call in `folder`'s ledger."""
    with stage(folder / f"stage-{order}") as here:
        (folder / f"stage-{order}").mkdir()
        here.db = folder / "ledger.db"
        here.start(
            f"def charge(order): pass\nguard.policy(charge, name='shop.charge')\nguard(charge, {order!r})\n"
        ).ends_well()


def test_a_backup_can_be_restored_and_its_gap_is_known(shop: Path, tmp_path: Path) -> None:
    """A restore says what replaces what, asks, keeps the former ledger, and notes what is unknown now."""
    copy = tmp_path / "copy.db"
    saved = run("backup", copy, "--db", shop)
    charge_more(tmp_path, "A-9")

    refused = run("restore", copy, "--db", shop)
    with Terminal("restore", copy, "--db", shop, columns=1000) as terminal:
        terminal.sees("Restore it? [y/N]")
        terminal.press("y\n")
        done = terminal.ends()

    assert (0, "") == (saved.code, saved.err)
    assert saved.out.startswith(f"backed up to {copy} (")
    assert (1, "") == (refused.code, refused.out)
    assert f"the ledger at {shop} (7 calls, the newest record " in refused.err
    assert "would be replaced by the backup made " in refused.err
    assert 0 == done.code
    assert f"restored 6 calls to {shop}" in done.out
    assert "are unknown to it" in done.out
    kept = Path(done.out.partition("the former ledger was kept as ")[2].strip())
    assert 7 == len(run("show", kept).rows)
    assert 6 == len(run("show", shop).rows)
    assert "✗ gap " in run("doctor", shop).out
    assert "are unknown: the ledger was restored from a backup" in run("brief", shop).out


def test_a_restore_names_what_still_runs(tmp_path: Path) -> None:
    """Its question, and its refusal where nobody can be asked, say whose run would be unknown."""
    script = (
        "def pay(n): say('inside'); hear()\n"
        "guard.policy(pay, name='shop.pay')\n"
        "guard.flush(); say('open'); hear(); guard(pay, 1)\n"
    )
    with stage(tmp_path) as here:
        here.start("guard.check()").ends_well()
        assert 0 == run("backup", tmp_path / "copy.db", "--db", here.db).code
        actor = here.start(script)
        assert "open" == actor.line()
        actor.tell("go")
        assert "inside" == actor.line()
        done = run("restore", tmp_path / "copy.db", "--db", here.db)
        actor.tell("end")
        actor.ends_well()

    assert (1, "") == (done.code, done.out)
    assert "although these still run and would be unknown: pay (call " in done.err
    assert f"in pid {actor.pid} on " in done.err


def test_a_restore_where_nothing_is_asks_nobody(shop: Path, tmp_path: Path) -> None:
    """A new ledger replaces none."""
    copy = tmp_path / "copy.db"
    assert 0 == run("backup", copy, "--db", shop, "--json").code

    done = run("restore", copy, "--db", tmp_path / "new.db", "--json")

    assert (0, "") == (done.code, done.err)
    assert ["path", "calls", "gap", "kept"] == list(done.json)
    assert (6, None) == (done.json["calls"], done.json["kept"])


def test_a_backup_replaces_nothing(shop: Path, tmp_path: Path) -> None:
    """A file of that name stays as it is."""
    (tmp_path / "notes.txt").write_text("mine")

    done = run("backup", tmp_path / "notes.txt", "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert "exists already, nothing was written; name another file" in done.err
    assert "mine" == (tmp_path / "notes.txt").read_text()


def test_what_is_no_backup_is_not_restored(shop: Path, tmp_path: Path) -> None:
    """A damaged or foreign file is refused before anybody is asked, and the ledger is as it was."""
    (tmp_path / "bad.db").write_bytes(b"x" * 9000)

    done = run("restore", tmp_path / "bad.db", "--db", shop, "--yes")

    assert (1, "") == (done.code, done.out)
    assert "bad.db" in done.err
    assert 6 == len(run("show", shop).rows)


# -- doctor --


def findings(done: Done) -> dict[str, bool]:
    """What the doctor found, by name."""
    return {found["name"]: found["ok"] for found in done.json}


def test_the_doctor_finds_a_sound_ledger_sound(shop: Path) -> None:
    """Every finding has a tick, and the exit code is 0."""
    run("clear", shop, "--yes")

    done = run("doctor", shop)

    assert (0, "") == (done.code, done.err)
    assert all(line.startswith("✓ ") for line in done.out.splitlines())
    assert all(name in done.out for name in ("schema", "integrity", "log", "disk", "permissions", "clock"))


def test_the_doctor_says_what_to_do(shop: Path) -> None:
    """What is not well has a cross, advice below it, and exit code 1."""
    shop.chmod(0o644)

    done = run("doctor", shop)
    told = findings(run("doctor", shop, "--json"))

    assert 1 == done.code
    assert (
        f"✗ permissions mode 0644\n  → arguments and results are readable by others: chmod 600 {shop}\n"
        in (done.out)
    )
    assert "  → find out what happened, then `ledger resolve CALL --done`" in done.out
    assert {"permissions", "doubts"} == {name for name, ok in told.items() if not ok}


def test_the_doctor_sees_what_is_no_ledger(tmp_path: Path) -> None:
    """A file that cannot be opened is a finding, too."""
    (tmp_path / "notes.txt").write_text("x" * 5000)

    done = run("doctor", tmp_path / "notes.txt", "--json")

    assert (1, {"open": False}) == (done.code, findings(done))


# -- progress --


def test_long_work_shows_a_bar_on_a_terminal_only(shop: Path, tmp_path: Path) -> None:
    """The bar is on stderr, and what is written stays clean."""
    target = tmp_path / "calls.jsonl"

    shown = on_terminal("export", shop, "-o", target)

    assert 0 == shown.code
    assert "export" in shown.out
    assert "6/6" in shown.out
    assert "exported 6 calls to " in shown.out
    assert "" == run("export", shop).err


def test_a_bar_takes_nothing_from_what_is_printed(shop: Path, tmp_path: Path) -> None:
    """With stdout in a file the bar is on the terminal; where both are one terminal there is none."""
    with (tmp_path / "out.jsonl").open("wb") as out, Terminal("export", shop, stdout=out) as terminal:
        done = terminal.ends()
    both = on_terminal("export", shop)

    assert (0, 0) == (done.code, both.code)
    assert "6/6" in done.out
    assert run("export", shop).out.splitlines()[1:] == (tmp_path / "out.jsonl").read_text().splitlines()[1:]
    assert "6/6" not in both.out


def test_an_import_can_be_interrupted(shop: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves no half of a ledger and no traceback."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Terminal("import", fifo, "--db", tmp_path / "new.db") as terminal:
        handle = os.open(fifo, os.O_WRONLY)
        try:
            os.write(handle, run("export", shop).out.encode()[:60])
            eventually(lambda: "import" in terminal.text)
            terminal.interrupt()
            done = terminal.ends()
        finally:
            os.close(handle)

    assert 130 == done.code
    assert "Traceback" not in done.out
    assert not (tmp_path / "new.db").exists()
