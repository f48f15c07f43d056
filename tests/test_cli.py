"""The command line as a whole: help, errors, exit codes, which ledger, what reaches a terminal."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

import ledger
from ledger_cli.app import COMMANDS
from tests.actors import PATIENCE
from tests.cli_kit import COMMAND, Terminal, copied, environment, make_shop, on_terminal, run, run_closed

ROOT = Path(__file__).resolve().parent.parent
ESCAPE = "\x1b"
READS = ("show", "tail", "stats", "doubts", "brief", "export", "doctor")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop's ledger, made once."""
    return make_shop(tmp_path_factory.mktemp("shop") / "ledger.db")


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Path:
    """A shop's ledger of one's own."""
    return copied(made, tmp_path)


def call_of(db: Path, tool: str) -> str:
    """The fingerprint of a tool's newest call."""
    return run("show", db, "--tool", tool).rows[0]["call"]


# -- help --


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """`-h` says in one line what a command does, explains every option and gives an example of it."""
    done = run(name, "-h")

    assert (0, "") == (done.code, done.err)
    usage, _, summary = done.out.split("\n")[:3]
    assert usage.startswith(f"Usage: ledger {name} ")
    assert 10 < len(summary.strip()) < 70
    assert summary.endswith(".")
    examples = done.out.partition("\nExamples:\n")[2]
    assert f"ledger {name}" in examples
    options = done.out.partition("\nOptions:\n")[2].partition("\n\n")[0]
    assert not re.findall(r"^  -\S+( \S+)?$(?!\n {10})", options, re.MULTILINE), "an option without help"
    if "--json" in options:
        assert "\nJSON:\n" in done.out


def test_the_list_of_commands_cuts_no_summary() -> None:
    """`ledger --help` shows each command with its whole line."""
    done = run("--help")

    assert 0 == done.code
    assert all(re.search(rf"^  {name} +\S.*\.$", done.out, re.MULTILINE) for name in COMMANDS)
    assert "..." not in done.out.partition("Commands:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    """README's table has a line for each command."""
    assert f"`ledger {name}" in (ROOT / "README.md").read_text("utf-8")


def test_without_a_command_the_help_is_shown() -> None:
    """`ledger` alone is a usage error that shows what there is."""
    done = run()

    assert 2 == done.code
    assert "Commands:" in done.out + done.err


def test_the_version_is_that_of_the_guard() -> None:
    """There is one version."""
    assert (0, f"ledger {ledger.__version__}\n", "") == run("--version")


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    """An unknown command is a usage error that names a similar one."""
    done = run("inspct")

    assert (2, "") == (done.code, done.out)
    assert "inspect" in done.err


def test_a_misspelt_option_is_answered_with_the_right_one() -> None:
    """So is an unknown option."""
    done = run("show", "--stauts", "failed")

    assert (2, "") == (done.code, done.out)
    assert "--status" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str) -> None:
    """`ledger completion SHELL` prints what the shell has to read."""
    done = run("completion", shell)

    assert 0 == done.code
    assert "_LEDGER_COMPLETE" in done.out


def test_the_shell_completes_commands() -> None:
    """What the script asks for is answered: names of commands."""
    env = {"_LEDGER_COMPLETE": "bash_complete", "COMP_WORDS": "ledger re", "COMP_CWORD": "1"}

    done = run(env=env)

    assert ["plain,resolve", "plain,restore", "plain,retry"] == sorted(done.out.split())


# -- the extra --


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_which_to_install(missing: str) -> None:
    """Without click or rich the command names the extra on stderr and exits 1."""
    code = f"import sys; sys.modules[{missing!r}] = None; from ledger_cli import main; sys.exit(main())"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )

    text = f'Error: the command line needs {missing}; install it: pip install "ledger-guard[cli]"\n'
    assert (1, "", text) == (done.returncode, done.stdout, done.stderr)


def test_another_missing_module_is_not_taken_for_the_extra() -> None:
    """What else is missing is no matter of the extra, so its own error is shown."""
    code = "import sys; sys.modules['ledger_ops'] = None; from ledger_cli import main; sys.exit(main())"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )

    assert 1 == done.returncode
    assert "ledger_ops" in done.stderr
    assert "pip install" not in done.stderr


def test_the_module_is_the_command() -> None:
    """`python -m ledger_cli` does the same."""
    done = subprocess.run(
        [sys.executable, "-m", "ledger_cli", "--version"], capture_output=True, text=True, check=False
    )

    assert (0, f"ledger {ledger.__version__}\n") == (done.returncode, done.stdout)


# -- which ledger --


@pytest.mark.parametrize("name", READS)
def test_a_missing_file_is_an_error_and_stays_missing(name: str, tmp_path: Path) -> None:
    """Looking never makes a file."""
    done = run(name, "absent.db", cwd=tmp_path)

    assert 1 == done.code
    assert f"there is no ledger at {tmp_path}/absent.db" in done.out + done.err
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "3f"),
        ("retry", "3f"),
        ("resolve", "3f", "--done"),
        ("clear", "--yes"),
        ("prune", "--older-than", "1d"),
        ("backup", "copy.db"),
    ],
)
def test_what_changes_a_ledger_makes_none(words: tuple[str, ...], tmp_path: Path) -> None:
    """A command that works on what is there does not begin a ledger by mistake."""
    done = run(*words, cwd=tmp_path)

    assert (1, "") == (done.code, done.out)
    assert f"Error: there is no ledger at {tmp_path}/ledger.db; name the file" in done.err
    assert [] == list(tmp_path.iterdir())


def test_a_file_that_is_no_ledger_is_named_as_such(tmp_path: Path) -> None:
    """Another kind of file is named, and is as it was afterwards."""
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        archive.add(__file__)
    before = other.read_bytes()

    done = run("show", other)

    assert (1, "") == (done.code, done.out)
    assert f"{other}: the ledger could not be used (file is not a database)" in done.err
    assert before == other.read_bytes()


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """An SQLite file that is no ledger gets no table of ours."""
    other = tmp_path / "notes.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE notes (text)")
    db.close()
    before = other.read_bytes()

    done = run("stats", other)

    assert 1 == done.code
    assert "is a database of another program (tables: notes)" in done.err
    assert before == other.read_bytes()


def test_the_ledger_is_the_argument_or_the_variable_or_the_file_here(shop: Path) -> None:
    """DB, --db, LEDGER_DB and ./ledger.db name the same ledger, by path or URL."""
    expected = run("stats", shop).out

    assert expected == run("stats", "--db", shop).out
    assert expected == run("stats", f"sqlite:///{shop}").out
    assert expected == run("stats", env={"LEDGER_DB": str(shop)}).out
    assert expected == run("stats", cwd=shop.parent).out
    assert expected.startswith("tool\tcalls\t")


def test_a_ledger_named_twice_is_a_usage_error(shop: Path) -> None:
    """Two names for the ledger leave open which is meant."""
    done = run("show", shop, "--db", shop)

    assert 2 == done.code
    assert "named twice" in done.err


def test_options_may_stand_anywhere(shop: Path) -> None:
    """An option before the file is the same as one after it."""
    assert run("show", "--status", "failed", shop).out == run("show", shop, "--status", "failed").out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--since", "yesterday-ish"), "is no time; write 2h"),
        (("--since", "1h", "--until", "2h"), "since is not before until"),
        (("--status", "great"), "'great' is not one of"),
        (("--limit", "0"), "0 is not in the range"),
        (("--since", "999999999999w"), "is too far away"),
        (("--limit", "9" * 23), "is not in the range"),
        (("--search", "\udcff"), "is no text in UTF-8"),
    ],
)
def test_a_filter_that_cannot_be_is_a_usage_error(words: tuple[str, ...], part: str, shop: Path) -> None:
    """What cannot be asked is told before anything is read, with exit code 2."""
    done = run("show", shop, *words)

    assert (2, "") == (done.code, done.out)
    assert part in done.err


# -- what reaches the screen --


@pytest.mark.parametrize("words", [("show",), ("tail", "--no-follow"), ("show", "--json"), ("doubts",)])
def test_what_others_wrote_cannot_drive_a_terminal(words: tuple[str, ...], shop: Path) -> None:
    """Escapes and control characters in arguments and errors are shown escaped, in a pipe too."""
    done = run(*words, "--db", shop)

    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.out)
    if words != ("doubts",):
        assert "[2J" in done.out


def test_one_call_cannot_drive_a_terminal_either(shop: Path) -> None:
    """`inspect` shows the same texts in full, with their traceback, and as harmless."""
    done = run("inspect", call_of(shop, "nasty"), "--db", shop)

    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.out)
    assert r"ValueError: \x1b[2J\x1b]0;owned\x07 \u202e reversed \x9b31m" in done.out


def test_an_imported_fingerprint_cannot_drive_a_terminal(shop: Path) -> None:
    """A fingerprint and a late end that no guard of ours wrote are shown escaped, too."""
    call = call_of(shop, "send_email")
    values = ("\x1b[2J", f"{call[:8]}\x1b[2J", call)
    with closing(sqlite3.connect(shop)) as db, db:
        db.execute("UPDATE runs SET late = ?, call = ? WHERE call = ?", values)

    shown = [run(*words, "--db", shop) for words in (("show",), ("inspect", call[:8]), ("retry", call[:8]))]
    shown.append(on_terminal("show", shop, env={"NO_COLOR": "1"}))

    assert [0] * 4 == [done.code for done in shown]
    assert not [done for done in shown if ESCAPE in done.out]
    assert all(rf"{call[:8]}\x1" in done.out for done in shown)


@pytest.mark.parametrize("words", [("show",), ("stats",), ("tail", "--no-follow"), ("doctor",), ("doubts",)])
def test_a_terminal_gets_colours_and_a_pipe_does_not(words: tuple[str, ...], shop: Path) -> None:
    """Codes are for terminals, and not for those whose user set NO_COLOR."""
    assert ESCAPE in on_terminal(*words, "--db", shop).out
    assert ESCAPE not in on_terminal(*words, "--db", shop, env={"NO_COLOR": "1"}).out
    assert ESCAPE not in run(*words, "--db", shop, env={"FORCE_COLOR": "1"}).out


def test_a_terminal_gets_a_table_that_fits_it(shop: Path) -> None:
    """On 80 columns no line of the list is longer."""
    done = on_terminal("show", shop, columns=80, env={"NO_COLOR": "1"})

    assert 0 == done.code
    assert 80 >= max(map(len, done.out.splitlines()))
    assert "charge" in done.out


def test_a_pipe_gets_all_of_it(shop: Path) -> None:
    """Nothing is cut in a pipe: whole fingerprints, whole errors."""
    [row] = run("show", shop, "--tool", "decline").rows

    assert 32 == len(row["call"])
    assert "RuntimeError: card declined" == row["outcome"]


@pytest.mark.parametrize(
    "words",
    [
        ("show",),
        ("show", "--json"),
        ("export",),
        ("stats",),
        ("tail", "--no-follow"),
        ("doctor",),
        ("inspect",),
    ],
)
def test_a_closed_pipe_ends_quietly(words: tuple[str, ...], shop: Path) -> None:
    """A reader who goes away is no error and leaves no traceback."""
    if words == ("inspect",):
        words = ("inspect", call_of(shop, "charge"))
    if words == ("doctor",):
        run("clear", shop, "--yes")
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [COMMAND, *words, "--db", shop],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    os.close(writing)

    assert (0, "") == (done.returncode, done.stderr)


def test_a_closed_stdout_or_stderr_ends_quietly(shop: Path) -> None:
    """What was started without one of the three streams does the same, and nobody reads what it would say."""
    whole = run("show", shop).out

    assert (0, "", "") == run_closed(1, words=("show", shop))
    assert (0, whole, "") == run_closed(2, words=("show", shop))
    assert (1, "", "") == run_closed(0, 1, 2, words=("clear", shop))
    assert whole == run("show", shop).out


@pytest.mark.parametrize(
    "words", [("resolve", "CALL", "--done", "--result", "[" * 900 + "]" * 900), ("import", "DEEP")]
)
def test_what_is_nested_too_deeply_is_told_without_a_traceback(
    words: tuple[str, ...], shop: Path, tmp_path: Path
) -> None:
    """Python's own limits are an error like others."""
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"ledger": 1}\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    named = {"CALL": call_of(shop, "book"), "DEEP": str(deep)}

    done = run(*(named.get(word, word) for word in words), "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert done.err.startswith("Error: ")
    assert "recursion" in done.err
    assert 1 == len(done.err.splitlines())


def test_a_narrow_character_set_is_no_reason_to_fail(shop: Path) -> None:
    """Signs that the terminal does not know are written as their codes."""
    done = run("tail", shop, "--no-follow", env={"PYTHONIOENCODING": "ascii"})

    assert 0 == done.code
    assert r"\u2713 success" in done.out


def test_a_question_can_be_refused_and_interrupted(shop: Path) -> None:
    """No and Ctrl-C at a question change nothing and exit 1."""
    for answer in ("n\n", "\n", "\x03"):
        with Terminal("clear", shop) as terminal:
            terminal.sees("Forget them? [y/N]")
            terminal.press(answer)
            done = terminal.ends()

        assert 1 == done.code
        assert done.out.rstrip().endswith("nothing was changed")
    assert 6 == len(run("show", shop).rows)


# -- demo --


def test_the_demo_shows_a_duplicate_a_failure_and_a_doubt(tmp_path: Path) -> None:
    """`ledger demo` tells what happens and leaves a ledger to look at."""
    done = run("demo", env={"TMPDIR": str(tmp_path)})

    assert (0, "") == (done.code, done.err)
    assert "8 attempts, 2 executed, 3 blocked, 1 failed, 1 in doubt." in done.out
    assert "killed by signal 9" in done.out
    [made] = tmp_path.glob("ledger-demo-*/ledger.db")
    assert f"ledger show {made}" in done.out
    assert 3 == run("doubts", made).code
