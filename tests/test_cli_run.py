"""`ledger run`: a shell command that runs once for its key, whatever is sent to it or kills it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ledger_cli.child import EndUnknown, Output, Relay
from tests.actors import PATIENCE, eventually
from tests.cli_kit import COMMAND, Background, Done, Terminal, environment, run, run_closed
from tests.stores.servers import postgres_url

#: a command that says what it is sent; the second of two would come within the half second that it waits
LISTENER = """
import signal, sys, time
heard = []
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM"):
    signal.signal(getattr(signal, name), lambda number, _: heard.append(signal.Signals(number).name))
print("ready", flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(0.5)
print(*heard, flush=True)
sys.exit(9)
"""
LISTEN = (sys.executable, "-c", LISTENER)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the ledger will be."""
    return tmp_path / "ledger.db"


def sh(script: str) -> tuple[str, ...]:
    """A shell command."""
    return ("sh", "-c", script)


def once(db: Path, *command: str, key: str = "k", options: tuple[str, ...] = ()) -> Done:
    """Run a command through the ledger."""
    return run("run", "--db", db, "--key", key, *options, "--", *command)


def the_call(db: Path) -> Any:
    """The only call of a ledger."""
    [call] = run("show", db, "--json").json
    return call


def test_a_duplicate_prints_what_was_recorded_and_exits_alike(db: Path, tmp_path: Path) -> None:
    """Stdout, stderr and the exit code are those of the first run, which was the only one."""
    command = sh(f"echo out; echo err >&2; echo ran >> {tmp_path}/effects; exit 3")

    first, second = once(db, *command), once(db, *command)

    assert (3, "out\n", "err\n") == first
    assert first == second
    assert "ran\n" == (tmp_path / "effects").read_text()
    call = the_call(db)
    assert ("success", 2, 1, 1) == tuple(call[name] for name in ("status", "attempts", "executed", "blocked"))
    assert {"code": 3, "stdout": "out\n", "stderr": "err\n"} == call["result"]
    assert {"command": list(command)} == call["args"]


def test_other_keys_and_workflows_are_other_actions(db: Path) -> None:
    """A key counts in its workflow."""
    once(db, "echo", "1")

    assert "2\n" == once(db, "echo", "2", key="other").out
    assert "3\n" == once(db, "echo", "3", options=("--wf", "deploy")).out


def test_options_of_the_command_are_its_own(db: Path) -> None:
    """What stands after the command is not read by us, with and without --."""
    assert "-n --db x\n" == once(db, "printf", "%s %s %s\\n", "-n", "--db", "x").out
    assert "--json\n" == run("run", "--db", db, "--key", "b", "echo", "--json").out


def test_bytes_that_are_no_text_come_back_as_they_were(db: Path) -> None:
    """Output is recorded byte for byte."""
    script = r"printf '\377\000\r\n\303\244'"
    words: list[str | Path] = [COMMAND, "run", "--db", db, "--key", "k", "--", *sh(script)]

    found = [
        subprocess.run(words, capture_output=True, env=environment(), check=True).stdout for _ in range(2)
    ]

    assert [b"\xff\x00\r\n\xc3\xa4"] * 2 == found


def test_output_is_shown_as_it_comes(db: Path, tmp_path: Path) -> None:
    """A line appears while the command still runs, and stdin is the command's."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Background("run", "--db", db, "--key", "k", "--", *sh(f"echo one; cat {fifo}; echo two")) as command:
        assert "one" == command.line()
        assert "running" == the_call(db)["status"]
        fifo.write_text("from outside\n")
        assert ["from outside", "two"] == [command.line(), command.line()]
        assert 0 == command.ends().code
    done = run("run", "--db", db, "--key", "stdin", "--", "cat", input="typed\n")
    assert (0, "typed\n", "") == done


def test_a_long_output_is_kept_at_both_ends(db: Path) -> None:
    """All of it is shown; of more than 8 MB the first and the last 4 MB are recorded, with a word between."""
    script = "import sys; sys.stdout.write(''.join(f'{i:07d}ä\\n' for i in range(1_000_000)))"

    first = once(db, sys.executable, "-c", script)
    second = once(db, sys.executable, "-c", script)

    assert 9_000_000 == len(first.out)
    assert second.out.startswith("0000000ä\n")
    assert second.out.endswith("0999999ä\n")
    assert " bytes were not recorded …]" in second.out
    assert (8 << 20) + 100 > len(second.out.encode()) > (8 << 20) - 100


def test_another_command_with_the_key_is_an_error(db: Path, tmp_path: Path) -> None:
    """A key belongs to one command: nothing runs, and the message names it."""
    once(db, "echo", "a b")

    done = once(db, "touch", str(tmp_path / "made"))

    assert (1, "") == (done.code, done.out)
    assert "nothing ran: the key belongs to another command, `echo 'a b'`" in done.err
    assert not (tmp_path / "made").exists()


def test_another_command_does_not_pass_over_a_doubt(db: Path, tmp_path: Path) -> None:
    """Also while the first one is in doubt the key is its own, although a doubt may be run again."""
    once(db, *sh("kill -9 $$"))

    done = once(db, "touch", str(tmp_path / "made"))

    assert 1 == done.code
    assert "belongs to another command" in done.err
    assert "in_doubt" == the_call(db)["status"]
    assert not (tmp_path / "made").exists()


def test_after_its_ttl_a_key_is_free_again(db: Path) -> None:
    """With --ttl the same action may be done again when so much time has passed."""
    once(db, "echo", "1")

    assert "1\n" == once(db, "echo", "1", options=("--ttl", "1ms")).out
    assert 2 == the_call(db)["executed"]


def test_a_failure_can_be_tried_again(db: Path, tmp_path: Path) -> None:
    """With --retry-failed a command whose exit code is not 0 runs again, until that is 0."""
    script = f"test -e {tmp_path}/ready || {{ echo not yet >&2; exit 5; }}; echo done"

    first = once(db, *sh(script), options=("--retry-failed",))
    failed = the_call(db)
    (tmp_path / "ready").touch()
    second = once(db, *sh(script), options=("--retry-failed",))
    third = once(db, *sh(script), options=("--retry-failed",))

    assert (5, "", "not yet\n") == first
    assert ("failed", "Failed: exit code 5: not yet") == (failed["status"], failed["error"])
    assert [(0, "done\n", "")] * 2 == [second, third]
    assert 2 == the_call(db)["run"]


def test_a_failure_keeps_its_key(db: Path, tmp_path: Path) -> None:
    """Another command is refused after a failure, too, however often; the same one may try again."""
    command = sh(f"echo ran >> {tmp_path}/effects; exit 5")
    other = ("touch", str(tmp_path / "made"))
    once(db, *command, options=("--retry-failed",))

    refused = [once(db, *other, options=("--retry-failed",)) for _ in range(2)]
    again = once(db, *command, options=("--retry-failed",))

    assert [(1, "")] * 2 == [(done.code, done.out) for done in refused]
    assert all("belongs to another command, `sh -c 'echo ran" in done.err for done in refused)
    assert not (tmp_path / "made").exists()
    assert 5 == again.code
    assert "ran\nran\n" == (tmp_path / "effects").read_text()


def test_what_prune_dropped_is_not_taken_for_a_success(db: Path) -> None:
    """Of an old run it is known that it ended, but not how: nothing runs, and the exit code is 1."""
    once(db, *sh("echo out; exit 7"))
    assert 0 == run("prune", db, "--older-than", "1ms").code

    same, other = once(db, *sh("echo out; exit 7")), once(db, "true")

    assert (1, "") == (same.code, same.out)
    assert "`ledger prune` dropped its exit code and its output; nothing ran" in same.err
    assert 1 == other.code
    assert "another command, whose words `ledger prune` dropped (call " in other.err


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [("no-such-command", 127, "command not found"), ("/etc/passwd", 126, "cannot be executed")],
)
def test_a_command_that_cannot_be_started_leaves_the_key_free(
    command: str, code: int, text: str, db: Path
) -> None:
    """As in a shell it is 127 or 126; nothing happened, so the right command may follow with the key."""
    done = once(db, command)

    assert (code, "") == (done.code, done.out)
    assert text in done.err
    assert "failed" == the_call(db)["status"]
    assert "now\n" == once(db, "echo", "now").out


# -- signals and deaths --


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
    ],
)
def test_a_signal_is_passed_on_once_and_the_end_is_recorded(number: signal.Signals, db: Path) -> None:
    """The command gets the signal and decides itself how it ends; that is its outcome."""
    with Background("run", "--db", db, "--key", "k", "--", *LISTEN) as command:
        assert "ready" == command.line()
        command.process.send_signal(number)
        done = command.ends()

    assert (9, f"{number.name}\n", "") == done
    assert 9 == the_call(db)["result"]["code"]


def test_ctrl_c_on_a_terminal_reaches_the_command_once(db: Path) -> None:
    """The terminal sends it to both of us; it is not passed on a second time."""
    with Terminal("run", "--db", db, "--key", "k", "--", *LISTEN) as terminal:
        terminal.sees("ready")
        terminal.press("\x03")
        done = terminal.ends()

    assert 9 == done.code
    assert "SIGINT\n" in done.out
    assert "SIGINT SIGINT" not in done.out


SLOW_START = """
import signal, subprocess, sys, threading, time
from ledger_cli.child import Relay

def unblock():
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

with Relay() as relay:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # one like the guard's keeper

    def start():
        child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, preexec_fn=unblock)
        child.stdout.readline()
        print("ready", flush=True)
        sys.stdin.readline()  # Ctrl-C comes before the end of this line
        return child

    print("heard", relay.run(start).stdout.read(), flush=True)
"""


def test_ctrl_c_while_the_command_starts_reaches_it_once() -> None:
    """No thread of ours takes it from the one that is told where it came from."""
    with Terminal("-c", SLOW_START, *LISTEN, program=sys.executable) as terminal:
        terminal.sees("ready")
        terminal.press("\x03")
        terminal.press("\n")
        done = terminal.ends()

    assert "heard SIGINT\n" in done.out


def test_a_signal_from_elsewhere_is_passed_on_on_a_terminal_too(db: Path) -> None:
    """`kill -INT` of ours alone reaches the command, also where Ctrl-C would by itself."""
    with Terminal("run", "--db", db, "--key", "k", "--", *LISTEN) as terminal:
        terminal.sees("ready")
        terminal.process.send_signal(signal.SIGINT)
        done = terminal.ends()

    assert 9 == done.code
    assert "SIGINT\n" in done.out


def test_a_terminal_that_hangs_up_is_told_to_the_command(db: Path) -> None:
    """Of a terminal that is gone only the leader of its session hears; the command hears of it from us."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "run", "--db", db, "--key", "k", "--", *LISTEN],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one system call
    )
    os.close(slave)
    heard = b""
    while b"ready" not in heard:
        heard += os.read(master, 1024)

    os.close(master)

    assert 9 == process.wait(PATIENCE)
    assert "ready\nSIGHUP\n" == the_call(db)["result"]["stdout"]


def test_what_nohup_ignores_stays_ignored(db: Path) -> None:
    """A hangup that was to be ignored is ignored by us and by the command."""
    words: list[str | Path] = [
        COMMAND,
        "run",
        "--db",
        db,
        "--key",
        "k",
        "--",
        *sh("kill -HUP $PPID; kill -HUP $$; echo on"),
    ]

    done = subprocess.run(
        ["/usr/bin/env", "nohup", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
        check=False,
    )

    assert (0, "on\n") == (done.returncode, done.stdout)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_a_signal_kills_is_in_doubt(number: signal.Signals, db: Path) -> None:
    """Nobody knows how far it came: 128 + n, in doubt, and a person is asked unless --on-doubt says rerun."""
    script = f"test -e {db}.again && echo again || {{ touch {db}.again; kill -{number.value} $$; }}"

    done = once(db, *sh(script))
    call = the_call(db)
    blocked = once(db, *sh(script))
    again = once(db, *sh(script), options=("--on-doubt", "rerun"))

    assert (128 + number, "") == (done.code, done.out)
    assert f"killed by {number.name}" in done.err
    assert ("in_doubt", 1) == (call["status"], call["run"])
    assert (1, "") == (blocked.code, blocked.out)
    assert f"`ledger resolve {call['call'][:12]} --done`" in blocked.err
    assert (0, "again\n", "") == again


def test_when_ledger_run_is_killed_its_command_ends_and_is_in_doubt(db: Path, tmp_path: Path) -> None:
    """SIGKILL of ours leaves no command behind that could go on beside the next run."""
    script = f"echo $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; exec sleep 1000"
    with Background("run", "--db", db, "--key", "k", "--", *sh(script)) as command:
        eventually((tmp_path / "pid").exists)
        command.process.kill()
        assert -signal.SIGKILL == command.ends().code

    child = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    eventually(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")
    assert "in_doubt" == the_call(db)["status"]
    assert 3 == run("doubts", db).code


def test_what_a_person_resolved_is_not_run(db: Path) -> None:
    """Marked as done without its output: nothing runs, and the reader is told why there is none."""
    once(db, *sh("kill -9 $$"))
    call = the_call(db)["call"]
    assert 0 == run("resolve", call, "--done", "--db", db).code

    done = once(db, *sh("kill -9 $$"))

    assert (0, "") == (done.code, done.out)
    assert "is done already and no output was recorded; nothing ran" in done.err


def test_what_is_left_in_the_background_holds_nobody_up(db: Path) -> None:
    """A process that the command leaves behind, its output still open, does not keep us."""
    done = once(db, *sh("sleep 1000 & echo $!"))
    os.kill(int(done.out), signal.SIGKILL)

    assert (0, "") == (done.code, done.err)


def test_what_goes_on_speaking_in_the_background_holds_nobody_up(db: Path, tmp_path: Path) -> None:
    """Nor does one that never falls silent; the exit code of the command is recorded, and SIGTERM heard."""
    stop = tmp_path / "stop"
    script = f"(while ! test -e {stop}; do echo on; sleep 0.05; done) & exit 3"
    try:
        waited = once(db, *sh(script))
        with Background("run", "--db", db, "--key", "told", "--", *sh(f"echo up; {script}")) as command:
            assert ["up", "on", "on"] == [command.line() for _ in range(3)]
            command.process.send_signal(signal.SIGTERM)
            told = command.ends()
    finally:
        stop.touch()

    assert (3, 3) == (waited.code, told.code)
    assert [3, 3] == [call["result"]["code"] for call in run("show", db, "--json").json]


@pytest.mark.parametrize(
    "script",
    [
        "yes | head -c 400000; echo last",
        "for n in $(seq 100); do yes | head -c 4000; sleep 0.005; done; echo last",
    ],
    ids=["at once", "in small pieces"],
)
def test_a_reader_who_does_not_read_holds_up_no_outcome(script: str, db: Path) -> None:
    """The outcome is recorded before the reader has all; then the rest is shown, or a signal ends it."""
    reading, writing = os.pipe()
    words: list[str | Path] = [COMMAND, "run", "--db", db, "--key", "k", "--", *sh(script)]
    with subprocess.Popen(words, stdout=writing, env=environment()) as process:
        os.close(writing)
        eventually(lambda: db.exists() and "success" == state(db))
        assert process.poll() is None
        with os.fdopen(reading, "rb") as pipe:
            shown = pipe.read()
    assert (0, 400_005) == (process.returncode, len(shown))
    assert shown.decode() == once(db, *sh(script)).out


def test_a_command_that_is_stopped_waits_for_no_reader(db: Path) -> None:
    """SIGTERM ends a command whose output nobody reads, and us with it."""
    reading, writing = os.pipe()
    words: list[str | Path] = [COMMAND, "run", "--db", db, "--key", "k", "--", "yes"]
    with subprocess.Popen(words, stdout=writing, stderr=subprocess.DEVNULL, env=environment()) as process:
        os.close(writing)
        eventually(lambda: 65536 == unread(reading))
        process.terminate()
        assert 128 + signal.SIGTERM == process.wait(PATIENCE)
    os.close(reading)
    assert "in_doubt" == the_call(db)["status"]


def unread(pipe: int) -> int:
    """How many bytes are in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def state(db: Path) -> str | None:
    """How the only call of a ledger stands; None if there is none yet."""
    done = run("show", db, "--json")
    return done.json[0]["status"] if done.code == 0 and done.json else None


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stdout_or_stderr_is_no_failure(closed: int, db: Path, tmp_path: Path) -> None:
    """Without one of them, as under cron, the command runs once and what it said is recorded."""
    script = f"echo x >> {tmp_path}/effects; echo out; echo err >&2; echo y >> {tmp_path}/effects; exit 4"
    words = ("run", "--db", db, "--key", "k", "--", *sh(script))

    ends = [run_closed(closed, words=words) for _ in range(2)]

    assert [4, 4] == [done.code for done in ends]
    assert "x\ny\n" == (tmp_path / "effects").read_text()
    assert {"code": 4, "stdout": "out\n", "stderr": "err\n"} == the_call(db)["result"]


def test_what_fails_beside_a_running_command_is_a_doubt(tmp_path: Path) -> None:
    """Once the command was started, an error of ours is no proof that nothing happened."""

    class Failing(Relay):
        def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
            super().run(start)
            raise OSError("no room")

    relay = Failing()
    with pytest.raises(EndUnknown, match="nobody knows how far it came"), Output(relay) as output:
        output.execute(["touch", str(tmp_path / "made")], retry_failed=False)

    assert (tmp_path / "made").exists()
    assert not issubclass(EndUnknown, Exception)


def test_a_reader_who_leaves_does_not_stop_the_command(db: Path, tmp_path: Path) -> None:
    """With its stdout closed the command still runs to its end and is recorded."""
    reading, writing = os.pipe()
    os.close(reading)
    script = f"yes | head -c 300000; echo last; touch {tmp_path}/ended"
    words: list[str | Path] = [COMMAND, "run", "--db", db, "--key", "k", "--", *sh(script)]

    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(writing)

    assert (0, b"") == (done.returncode, done.stderr)
    assert (tmp_path / "ended").exists()
    assert the_call(db)["result"]["stdout"].endswith("last\n")


# -- side by side --


def test_a_run_elsewhere_is_named_or_waited_for(db: Path, tmp_path: Path) -> None:
    """While it runs, others are told where; with --wait they get its output and its exit code."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = sh(f"echo begun; cat {fifo}; exit 4")
    words = ("run", "--db", db, "--key", "k")
    with Background(*words, "--", *command) as first:
        assert "begun" == first.line()
        refused = once(db, *command)
        with Background(*words, "--wait", "50", "--", *command) as waiting:
            eventually(lambda: _listens(waiting))
            fifo.write_text("end\n")
            assert 4 == first.ends().code
            waited = waiting.ends()

    assert (1, "") == (refused.code, refused.out)
    assert f"is running in pid {first.process.pid} on " in refused.err
    assert (4, "begun\nend\n", "") == waited


def test_a_signal_while_it_waits_ends_the_waiting(db: Path, tmp_path: Path) -> None:
    """Who waits for another's run and is told to stop has run nothing."""
    command = sh(f"echo begun; while ! test -e {tmp_path}/go; do sleep 0.02; done")
    words = ("run", "--db", db, "--key", "k")
    with Background(*words, "--", *command) as first:
        assert "begun" == first.line()
        with Background(*words, "--wait", "50", "--", *command) as waiting:
            eventually(lambda: _listens(waiting))
            waiting.process.send_signal(signal.SIGTERM)
            stopped = waiting.ends()
        (tmp_path / "go").touch()
        assert 0 == first.ends().code

    assert (143, "") == (stopped.code, stopped.out)
    assert "nothing ran: stopped by SIGTERM" in stopped.err
    assert 1 == the_call(db)["run"]


def _listens(command: Background) -> bool:
    """Whether it hears SIGTERM itself, which is the last thing before it asks for its run."""
    status = Path(f"/proc/{command.process.pid}/status").read_text().splitlines()
    [blocked] = [line.split()[1] for line in status if line.startswith("SigBlk:")]
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def test_of_many_at_once_one_runs(db: Path, tmp_path: Path) -> None:
    """Ten processes with one key: one runs the command, all print its output."""
    script = f"echo ran >> {tmp_path}/effects; echo done"
    words = ("run", "--db", db, "--key", "k", "--wait", "50", "--", *sh(script))
    crowd = [Background(*words) for _ in range(10)]
    try:
        ends = [each.ends() for each in crowd]
    finally:
        for each in crowd:
            each.__exit__(None, None, None)

    assert [(0, "done\n", "")] * 10 == ends
    assert "ran\n" == (tmp_path / "effects").read_text()


# -- usage --


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--", "true"), "Missing option '--key'"),
        (("--key", "k"), "Missing argument '-- CMD [ARGS]...'"),
        (("--key", " ", "--", "true"), "it is empty; a key must name one action"),
        (("--key", "k", "--ttl", "soon", "--", "true"), "is no span of time"),
        (("--key", "k", "--timeout", "0", "--", "true"), "is no time at all"),
    ],
)
def test_what_is_asked_wrongly_runs_nothing(words: tuple[str, ...], text: str, db: Path) -> None:
    """A usage error is exit code 2, and not even a ledger is made."""
    done = run("run", "--db", db, *words)

    assert (2, "") == (done.code, done.out)
    assert text in done.err
    assert not db.exists()


def test_without_a_ledger_that_can_be_written_nothing_runs(tmp_path: Path) -> None:
    """No claim, no run: the command fails closed."""
    done = once(tmp_path / "absent" / "ledger.db", "touch", str(tmp_path / "made"))

    assert (1, "") == (done.code, done.out)
    assert "the ledger cannot be created" in done.err
    assert not (tmp_path / "made").exists()


def test_it_is_a_call_like_others(db: Path) -> None:
    """What was run can be looked at, released and run again with the other commands."""
    once(db, "date", "+%N")
    call = the_call(db)["call"]

    inspected = run("inspect", call[:10], "--db", db)
    assert 0 == run("retry", call, "--db", db, "--note", "again").code
    once(db, "date", "+%N")

    assert 'key        "k"' in inspected.out
    assert '"command": ["date", "+%N"]' in inspected.out
    assert 2 == the_call(db)["run"]
    assert json.dumps("k") == json.dumps(the_call(db)["key"])


def test_a_duplicate_without_a_reader_keeps_the_exit_code(db: Path) -> None:
    """Whoever reads no output still gets the recorded exit code."""
    command = sh("echo out; exit 6")
    once(db, *command)
    reading, writing = os.pipe()
    os.close(reading)
    words: list[str | Path] = [COMMAND, "run", "--db", db, "--key", "k", "--", *command]

    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(writing)

    assert (6, b"") == (done.returncode, done.stderr)


def test_a_command_runs_once_on_a_server(tmp_path: Path) -> None:
    """The key is kept on a PostgreSQL as in a file: the second time its output and code are replayed."""
    words = (
        "run",
        "--key",
        f"k-{tmp_path.name}",
        "--db",
        postgres_url(),
        "--",
        "sh",
        "-c",
        "echo hi; exit 3",
    )

    first, second = run(*words), run(*words)

    assert (3, "hi\n") == (first.code, first.out) == (second.code, second.out)
    shown = json.loads(run("show", "--db", postgres_url(), "--search", f"k-{tmp_path.name}", "--json").out)
    assert [(1, 2)] == [(call["executed"], call["attempts"]) for call in shown]
