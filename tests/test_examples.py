"""The examples and the demo run as a user runs them, and their output says what it should."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.stores.servers import postgres_url

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NO_EXAMPLES = {"local_services", "demo_agent"}  # parts of the others
ORDERS = ["A-1001", "A-1002"]

#: A ledger whose guard does not guard, for the demo to notice.
BROKEN_LEDGER = """
class _Guard:
    def wrap_tools(self, tools, **policy):
        return tools
    def log(self):
        print("nothing")
guard = _Guard()
def current():
    return None
idempotency_key = tell_model = current
"""


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where an optional package is missing, but not in CI: there it must be installed."""
    missing = find_spec(package) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f"needs {package}")


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one script of the examples in `folder`, with nothing of the user's own settings."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("LEDGER_")}
    # A proxy where nobody listens: whoever leaves loopback, or asks a proxy for it, fails.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    mine |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TMPDIR": str(folder), **nowhere}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py")],
        cwd=folder,
        env=mine | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )


def output_of(script: str, folder: Path, **environment: str) -> str:
    """What an example prints, with its ledger in `folder` unless told otherwise; it must end well."""
    done = run(script, folder, **{"LEDGER_DB": str(folder / "ledger.db"), **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_line(output: str, tool: str) -> dict[str, int]:
    """The counters of a tool in what `guard.log()` has printed."""
    (line,) = re.findall(rf"^✓ {tool} +(attempts.*)$", output, re.MULTILINE)
    return {word: int(number) for word, number in re.findall(r"(\w+) +(\d+)", line)}


def bill(output: str, order: str) -> dict[str, list[float]]:
    """Times charged, money taken and mails of an order, without and with the guard."""
    (line,) = re.findall(rf"^{order} .*×.*×.*$", output, re.MULTILINE)
    _due, *numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line[len(order) :])]
    return {"without": numbers[:3], "with": numbers[3:]}


# ── the demo ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of one run of the demo."""
    return output_of("demo", tmp_path_factory.mktemp("demo"))


@needs("openai")
@pytest.mark.slow
def test_demo_bills_the_damage_without_the_guard(demo: str) -> None:
    """Without the guard each order is charged twice or more and a mail goes out more than once."""
    bills = [bill(demo, order)["without"] for order in ORDERS]

    assert all(charged >= 2 for charged, _, _ in bills)
    assert [99.0 * bills[0][0], 250.0 * bills[1][0]] == [taken for _, taken, _ in bills]
    assert max(mails for _, _, mails in bills) >= 2


@needs("openai")
@pytest.mark.slow
def test_demo_bills_each_order_once_with_the_guard(demo: str) -> None:
    """With the guard each order is charged once and confirmed once, kill and timeout included."""
    assert [bill(demo, order)["with"] for order in ORDERS] == [[1, 99.0, 1], [1, 250.0, 1]]


@needs("openai")
@pytest.mark.slow
def test_demo_kills_the_agent_in_both_acts(demo: str) -> None:
    """Both acts have the same accidents: a lost reply, a kill after the charge, a restart."""
    without, guarded = demo.split("With the guard: ")

    for act in (without, guarded):
        assert act.count("kill -9") == 1
        assert act.count("started again") == 1
        assert "no reply within" in act


@needs("openai")
@pytest.mark.slow
def test_demo_runs_the_killed_charge_again_with_the_same_key(demo: str) -> None:
    """The service was asked more than once for each order, always with one key."""
    asked = re.findall(r"(A-\d+): asked (\d+) × with the key (\S+), money taken 1 ×", demo)

    assert [order for order, _, _ in asked] == ORDERS
    assert all(int(times) >= 2 for _, times, _ in asked)
    assert len({key for _, _, key in asked}) == len(ORDERS)


@needs("openai")
@pytest.mark.slow
def test_demo_takes_the_killed_run_over(demo: str) -> None:
    """The lost reply is a failed run and the kill a run in doubt; each is followed by a success."""
    runs = dict(re.findall(r"^  (A-\d+): ((?:failed|doubt) .*)$", demo, re.MULTILINE))

    assert re.fullmatch(r"failed \(TimeoutError.*\), then success", runs["A-1001"])
    assert re.fullmatch(r"doubt \(.*\), then success", runs["A-1002"])


@needs("openai")
@pytest.mark.slow
def test_demo_tells_the_model_what_was_already_done(demo: str) -> None:
    """A blocked tool answers in words, so that the model does not ask a third time."""
    assert re.search(r"send_email .* → already done at .*sent", demo.split("With the guard: ")[1])


@needs("openai")
@pytest.mark.slow
def test_demo_ends_with_the_log_and_the_place_of_the_file(demo: str) -> None:
    """`guard.log()` counts one run per order, and the named file exists."""
    (path,) = re.findall(r"^ledger\.db lies at (.*)$", demo, re.MULTILINE)

    assert Path(path).is_file()
    assert log_line(demo, "charge_card")["executed"] == len(ORDERS)
    assert log_line(demo, "send_email")["executed"] == len(ORDERS)
    assert log_line(demo, "send_email")["blocked"] >= 1  # the kill may take the count before it along


@needs("openai")
@pytest.mark.slow
def test_demo_fails_when_the_guard_does_not_guard(tmp_path: Path) -> None:
    """The exit code is 1 when the second bill is wrong, and nothing claims that it is right."""
    Path(tmp_path, "ledger.py").write_text(BROKEN_LEDGER, encoding="utf-8")

    done = run("demo", tmp_path, PYTHONPATH=str(tmp_path))

    assert done.returncode == 1, done.stdout + done.stderr
    assert bill(done.stdout, "A-1001")["with"][0] > 1
    assert "is right" not in done.stdout


# ── the examples ──────────────────────────────────────────────────────────────────────────────────


@needs("openai")
def test_openai_example_sends_one_mail_in_two_conversations(tmp_path: Path) -> None:
    """The conversation is started again after a 503, and the second one is told "already done"."""
    output = output_of("example_openai", tmp_path)

    assert "attempt 1 failed: 503" in output
    assert "already done at" in output
    assert "mails sent: 1 " in output
    assert log_line(output, "send_email") == {"attempts": 2, "executed": 1, "blocked": 1}


@needs("langgraph")
def test_langchain_example_charges_once_for_three_tool_calls(tmp_path: Path) -> None:
    """Three tool calls with three ids get the receipt of one charge."""
    output = output_of("example_langchain", tmp_path)
    answers = dict(re.findall(r"^  (call_\w+) gets (.*)$", output, re.MULTILINE))

    assert len(answers) == 3
    assert len(set(answers.values())) == 1
    assert "charges: 1" in output
    assert log_line(output, "charge_card") == {"attempts": 3, "executed": 1, "blocked": 2}


def test_async_example_charges_once_for_five_tasks(tmp_path: Path) -> None:
    """Five tasks share one charge, and `guard.call` says which mail was sent and which was not."""
    output = output_of("example_async", tmp_path)

    assert "5 tasks got 5 receipts, all the same" in output
    assert "charges: 1" in output
    assert "first mail executed: True, value: sent to ada@example.com" in output
    assert "second mail executed: False" in output
    assert log_line(output, "charge_card") == {"attempts": 5, "executed": 1, "blocked": 4}


def test_custom_store_example_charges_once_for_eight_threads(tmp_path: Path) -> None:
    """Eight threads share one charge on the user's own store, and so does a second guard."""
    output = output_of("example_custom_store", tmp_path)

    assert "8 threads got ['r-1'], charges: 1" in output
    assert "another guard on the same store: blocked True, charges: 1" in output
    assert log_line(output, "charge_card") == {"attempts": 9, "executed": 1, "blocked": 8}


def test_transaction_example_moves_the_money_once(tmp_path: Path) -> None:
    """A process killed in the middle of the transfer has moved nothing; the next one moves it, once."""
    output = output_of("example_transaction", tmp_path)

    assert "ended by signal 9, {'ada': 1000, 'bob': 0}" in output
    assert "second process: moved 250 for A-1001, {'ada': 750, 'bob': 250}" in output
    assert "asked again: moved 250 for A-1001, {'ada': 750, 'bob': 250}" in output


def test_postgres_example_charges_once_from_two_processes(tmp_path: Path) -> None:
    """Two processes that share nothing but the URL of a PostgreSQL make one charge."""
    output = output_of("example_postgres", tmp_path, LEDGER_DB=postgres_url())

    assert "two processes asked, charges: 1" in output


def test_tasks_example_ends_every_task_though_an_agent_was_killed(tmp_path: Path) -> None:
    """Four processes share six tasks and a summary; what the killed one had is done by another."""
    output = output_of("example_tasks", tmp_path)

    ended = re.findall(r"^(\S+) +done +after (\d) retries", output, re.MULTILINE)
    assert (7, 1) == (len(ended), sum(int(retries) for _, retries in ended))
    assert "agents killed: 1; the last to end: summary; every story holds: True" in output


def test_resumed_example_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The second process imports only the rows that the first had not."""
    output = output_of("example_resumed", tmp_path)

    assert "tuesday: orders from row 6" in output
    assert "{'customers': 10, 'orders': 4, 'invoices': 10}" in output


@pytest.mark.parametrize("server", ["file", "postgres"])
def test_worker_example_bills_each_order_once(server: str, tmp_path: Path) -> None:
    """The worker that is killed after two effects of three is gone on from; nothing is charged twice."""
    where = {"LEDGER_DB": postgres_url()} if server == "postgres" else {}
    output = output_of("example_worker", tmp_path, **where)

    assert "the first worker's process ended with -9" in output
    assert "A-1002: DONE by tuesday, r-2" in output
    assert "charged 3 times, 60.00 in all" in output
    assert "booked 3 times, mailed 3 times" in output


def test_compound_example_goes_on_around_a_failed_subtask(tmp_path: Path) -> None:
    """Four of six are done by the command, one fails and blocks another, and the bill has five lines."""
    output = output_of("example_compound", tmp_path)

    assert "submitted: 6 subtasks, planned" in output
    assert "  [###!#!] 4 of 6, partial" in output
    assert "ended with status 1: the shop does not answer" in output
    assert "4 completed opus   opus: compare the two: done, knowing 2 results" in output
    assert "5 failed    sonnet blocked by failed dependency 3: " in output
    bill = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [True, True, True, False, True] == [line["success"] for line in bill]
    assert all(line["cost"] > 0 and line["tokens"] > 30 for line in bill if line["success"])


@needs("distributed")
@pytest.mark.slow
def test_dask_example_orders_each_copy_once_though_a_worker_was_killed(tmp_path: Path) -> None:
    """Two worker processes of a cluster do the subtasks; the one that is killed repeats nothing."""
    output = output_of("example_dask", tmp_path)

    assert "5 subtasks are planned" in output
    assert "4 completed by sonnet: 17" in output
    assert "completed, 0.042 USD, in other processes: True" in output
    assert "workers killed: 1, copies ordered: 4 of 4" in output


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("example_openai", marks=needs("openai")),
        pytest.param("example_langchain", marks=needs("langgraph")),
        "example_async",
    ],
)
def test_example_does_the_same_on_a_file_that_it_used_before(script: str, tmp_path: Path) -> None:
    """Each run is a workflow of its own, so a second run acts again and is not blocked."""
    first, second = output_of(script, tmp_path), output_of(script, tmp_path)

    counts = r"^(?:charges|mails sent): \d+"
    assert re.findall(counts, first, re.MULTILINE) == re.findall(counts, second, re.MULTILINE) != []


@pytest.mark.parametrize("script", ["example_async", "example_custom_store"])
def test_example_leaves_nothing_in_the_working_directory(script: str, tmp_path: Path) -> None:
    """Without LEDGER_DB an example keeps its file in a temporary folder, and says where."""
    temporary, folder = tmp_path / "tmp", tmp_path / "work"
    temporary.mkdir()
    folder.mkdir()

    done = run(script, folder, TMPDIR=str(temporary))

    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.iterdir()) == []


def test_every_example_is_run_by_a_test() -> None:
    """A new example needs a test here."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - NO_EXAMPLES

    assert scripts == set(re.findall(r'output_of\("(\w+)"', Path(__file__).read_text("utf-8")))
