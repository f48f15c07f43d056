"""`CommandExecutor`: real commands that answer, fail, hang, flood and leave others behind."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ledger import UsageError
from ledger_tasks import CommandExecutor, CompoundRunner, SubtaskFailed, TaskLedger
from ledger_tasks.command import prompt_of
from tests.actors import PATIENCE, eventually
from tests.tasks.compound_kit import of_index, opened, plan, step

SUBTASK: dict[str, Any] = {"description": "count to three", "model": "haiku", "prompt": "", "inputs": {}}
CLAUDE = {
    "type": "result", "subtype": "success", "is_error": False, "result": "1 2 3", "total_cost_usd": 0.0123,
    "usage": {"input_tokens": 100, "cache_read_input_tokens": 5, "output_tokens": 20},
}  # fmt: skip


def python(script: str, *words: str, **options: Any) -> CommandExecutor:
    """A command that runs a short script."""
    return CommandExecutor([sys.executable, "-c", script, *words], **options)


def prints(value: Any) -> CommandExecutor:
    """A command that prints this as JSON."""
    return python(f"print({json.dumps(value)!r})")


# ── what it is given, and what it answers ─────────────────────────────────────────────────────────


def test_it_reads_what_claudes_command_line_prints() -> None:
    """The result, the cost, and the tokens of both directions."""
    assert {"result": "1 2 3", "cost": 0.0123, "tokens": 120} == prints(CLAUDE)(SUBTASK)


def test_it_finds_the_result_in_a_list_of_messages() -> None:
    """As it is printed when the command line is asked to tell everything."""
    assert "1 2 3" == prints([{"type": "system"}, CLAUDE, {"type": "end"}])(SUBTASK)["result"]


@pytest.mark.parametrize("text", ["plain text", "{not json", "7", "[1, 2]", '"quoted"', "é ☃"])
def test_what_is_no_such_json_is_the_result_as_it_stands(text: str) -> None:
    """Nothing is known of its cost."""
    assert {"result": text, "cost": None, "tokens": 0} == python(f"print({text!r})")(SUBTASK)


def test_json_of_another_shape_is_the_result_as_it_stands() -> None:
    """What `execute` may return is understood too."""
    assert '{"pages": 3}' == prints({"pages": 3})(SUBTASK)["result"]
    assert {"result": [1], "cost": 0.5, "tokens": 9} == prints({"result": [1], "cost": 0.5, "tokens": 9})(
        SUBTASK
    )


@pytest.mark.parametrize("odd", ["free", -1, True, None, [1]])
def test_an_odd_cost_is_none(odd: Any) -> None:
    """The result counts all the same."""
    found = prints({"result": "x", "total_cost_usd": odd, "usage": {"input_tokens": odd}})(SUBTASK)

    assert {"result": "x", "cost": None, "tokens": 0} == found


def test_the_prompt_goes_to_stdin_and_the_model_into_its_words() -> None:
    """Where no word asks for the prompt."""
    executor = python("import sys; print(sys.argv[1:], sys.stdin.read())", "--model={model}", "{other}")

    assert "['--model=haiku', '{other}'] count to three" == executor(SUBTASK)["result"]


def test_the_prompt_goes_into_its_words_where_they_ask_for_it() -> None:
    """Once and as it is, whatever stands in it, and no shell reads it."""
    prompt = "{model} $(id) `id` 'x' \"y\" \\ ; {prompt}"
    found = python("import sys; print(sys.argv[1], repr(sys.stdin.read()))", "{prompt}")(
        SUBTASK | {"description": prompt}
    )

    assert f"{prompt} ''" == found["result"]


def test_a_prompt_tells_the_whole_and_what_came_before() -> None:
    """Inputs by their index, as text."""
    told = prompt_of(SUBTASK | {"prompt": "be exact", "inputs": {1: {"n": 2}, 0: "one"}})

    assert [
        "count to three",
        "This is a part of a larger request:\nbe exact",
        "Result of subtask 0:\none",
        'Result of subtask 1:\n{"n": 2}',
    ] == told.split("\n\n")


def test_a_long_prompt_and_a_long_answer_pass_at_once() -> None:
    """More than a pipe holds in both directions."""
    long = "0123456789" * 200_000
    script = "import sys\nfor part in iter(lambda: sys.stdin.read(5000), ''): sys.stdout.write(part)"

    assert long == python(script)(SUBTASK | {"description": long})["result"]


def test_a_command_need_not_read_its_prompt() -> None:
    """It may close its stdin, or end before all of it was written."""
    long = SUBTASK | {"description": "x" * 1_000_000}

    assert "done" == python("import os; os.close(0); print('done')")(long)["result"]


def test_it_has_this_environment_and_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that was said."""
    monkeypatch.setenv("MINE", "1")
    executor = python(
        "import os; print(os.environ['MINE'], os.environ['MORE'], os.getcwd())",
        env={"MORE": "2"},
        cwd=tmp_path,
    )

    assert f"1 2 {tmp_path}" == executor(SUBTASK)["result"]


def test_it_can_be_pickled() -> None:
    """And does the same then."""
    again = pickle.loads(pickle.dumps(prints(CLAUDE)))

    assert "1 2 3" == again(SUBTASK)["result"]


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["claude -p", [], ["claude", 7]])
def test_what_is_no_list_of_words_is_refused(command: Any) -> None:
    """A shell would have read the first."""
    with pytest.raises(UsageError, match="list of words"):
        CommandExecutor(command)


def test_an_environment_is_of_strings() -> None:
    """A number is told at once, and not by the first subtask."""
    with pytest.raises(UsageError, match="env has 1 in it"):
        CommandExecutor(["claude"], env={"A": 1})  # type: ignore[dict-item]


def test_an_exit_status_is_a_failure_with_the_end_of_stderr() -> None:
    """However much it wrote there."""
    script = "import sys; sys.stderr.write('x' * 10**6 + 'no credit'); sys.exit(3)"
    with pytest.raises(SubtaskFailed, match=r"ended with status 3: x+no credit") as failed:
        python(script)(SUBTASK)

    assert len(str(failed.value)) < 3_000


def test_a_failure_costs_what_it_reports() -> None:
    """Claude's command line prints its bill also when it fails."""
    told = CLAUDE | {"is_error": True, "result": "too many turns"}
    with pytest.raises(SubtaskFailed, match="reports an error: too many turns") as reported:
        prints(told)(SUBTASK)
    with pytest.raises(SubtaskFailed, match="ended with status 1: too many turns") as ended:
        python(f"print({json.dumps(told)!r}); raise SystemExit(1)")(SUBTASK)

    assert [(0.0123, 120)] * 2 == [(one.value.cost, one.value.tokens) for one in (reported, ended)]


def test_a_signal_is_named() -> None:
    """It was ended by somebody else."""
    with pytest.raises(SubtaskFailed, match="was ended by signal 9"):
        python("import os; os.kill(os.getpid(), 9)")(SUBTASK)


def test_a_command_that_is_not_there_is_named() -> None:
    """With what to do."""
    with pytest.raises(SubtaskFailed, match="'no-such-command' was not found; install it"):
        CommandExecutor(["no-such-command"])(SUBTASK)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """It is not the command that is missing."""
    with pytest.raises(SubtaskFailed, match=r"was not started in .*gone"):
        python("", cwd=tmp_path / "gone")(SUBTASK)


def test_a_command_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    """With the system's own reason."""
    (tmp_path / "plain").write_text("text")
    with pytest.raises(SubtaskFailed, match=r"was not started: .*[Pp]ermission"):
        CommandExecutor([str(tmp_path / "plain")])(SUBTASK)


def test_a_prompt_that_is_too_long_for_a_word_says_so() -> None:
    """Stdin takes any."""
    with pytest.raises(SubtaskFailed, match=r"too long; leave \{prompt\} out"):
        python("", "{prompt}")(SUBTASK | {"description": "x" * 3_000_000})


def test_a_command_that_writes_too_much_is_ended() -> None:
    """Its output does not fill the memory."""
    script = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    with pytest.raises(SubtaskFailed, match="wrote more than 1000000 bytes"):
        python(script, most_bytes=1_000_000)(SUBTASK)


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""


def is_gone(pid: int) -> bool:
    """Whether it has ended, whoever reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_its_time_limit_ends_the_whole_process_group(tmp_path: Path) -> None:
    """Also what it had started."""
    pids = tmp_path / "pids"
    with pytest.raises(SubtaskFailed, match=r"no answer in 1\.5 s: the command .* was ended"):
        python(PARENT + "time.sleep(600)", str(pids))(SUBTASK | {"timeout": 1.5})

    eventually(lambda: all(map(is_gone, map(int, pids.read_text().split()))))


def test_what_it_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """Its answer counts when it has ended, and what it left in its group is ended."""
    pids = tmp_path / "pids"
    began = time.monotonic()
    found = python(PARENT + "print('answer')", str(pids))(SUBTASK | {"timeout": PATIENCE})

    assert "answer" == found["result"]
    assert time.monotonic() - began < PATIENCE
    eventually(lambda: all(map(is_gone, map(int, pids.read_text().split()))))


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[TaskLedger]:
    """A ledger in a file."""
    with opened(tmp_path) as found:
        yield found


def test_a_cancelled_subtask_ends_its_command(tasks: TaskLedger, tmp_path: Path) -> None:
    """Nobody pays for what nobody waits for."""
    pids = tmp_path / "pids"
    with CompoundRunner(tasks, plan(step(0)), python(PARENT + "time.sleep(600)", str(pids))) as runner:
        made = runner.submit("p")
        eventually(pids.exists)
        runner.cancel(made["id"])
        eventually(lambda: all(map(is_gone, map(int, pids.read_text().split()))))


def test_a_command_does_the_subtasks_of_a_compound(tasks: TaskLedger) -> None:
    """Its model, its bill and its failures stand in the full picture."""
    script = """
import json, sys
prompt = sys.stdin.read()
if "step 2" in prompt.splitlines()[0]:
    sys.exit("cannot")
told = {"result": f"{sys.argv[1]} {len(prompt.splitlines())}", "total_cost_usd": 0.5}
print(json.dumps(told | {"usage": {"input_tokens": 3}}))
"""
    executor = python(script, "{model}")
    with CompoundRunner(tasks, plan(step(0, tier=3), step(1, 0), step(2)), executor) as runner:
        found = runner.wait(runner.submit("p")["id"], PATIENCE)

    assert ["opus 4", "haiku 7"] == of_index(found, "result")[:2]
    assert of_index(found, "result")[2].endswith("ended with status 1: cannot")
    assert ([0.5, 0.5, 0.0], 6) == (of_index(found, "cost"), found["total_tokens"])


def test_it_leaves_no_pipe_open() -> None:
    """However it ended."""
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names of links to pipes
    for script in ("print(1)", "raise SystemExit(1)", "import time; time.sleep(600)"):
        with suppress(SubtaskFailed):
            python(script)(SUBTASK | {"timeout": 0.3})

    assert before == sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
