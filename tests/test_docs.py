"""The documents say what is true: README's blocks run, and names, options and commands exist."""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ledger
from ledger import Guard, PolicyOptions
from ledger_tasks import TaskLedger
from ledger_tasks.states import diagram

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LLMS = (ROOT / "llms.txt").read_text("utf-8")
OTHERS = ("langchain_core", "openai")

#: What README's OpenAI block is given: the same call twice, with ids of their own.
ASK_TWICE = """
def _message(id):
    call = {"id": id, "type": "function", "function": {
        "name": "charge_card", "arguments": '{"order_id": "A-9", "amount": 1}'}}
    return ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
print(run_tools(_message("call_1")))
print(run_tools(_message("call_2")))
"""

needs_others = pytest.mark.skipif(
    "CI" not in os.environ and any(find_spec(name) is None for name in OTHERS),
    reason=f"needs {' and '.join(OTHERS)}",
)


def python_lines() -> list[str]:
    """README with everything blanked that is no Python, so that line numbers stay README's."""
    lines, inside = [], False
    for line in README.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = not inside and line == "```python" if fence else inside
    return lines


def run_blocks(folder: Path, more: str = "") -> list[str]:
    """Run README's blocks in order, as one program in `folder`; the lines that it prints."""
    script = folder / "readme.py"
    script.write_text("\n".join(python_lines()) + "\n" + more, "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")}
    environment |= {
        "LEDGER_DB": str(folder / "ledger.db"),
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def names_in(text: str, owner: str) -> set[str]:
    """The names that `text` takes from `owner`: `guard.once` gives `once`."""
    return set(re.findall(rf"(?<![\w.]){owner}\.([a-z_]\w*)", text)) - {"py", "db"}


def public_members(kind: type) -> dict[str, Any]:
    """What a class defines for its users, inherited names left out."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def documented_names() -> set[str]:
    """The names that llms.txt has in its list of the API."""
    return set(re.findall(r"^- `(\w+)", LLMS.partition("## Names")[2].partition("\n## ")[0], re.MULTILINE))


# ── README ────────────────────────────────────────────────────────────────────────────────────────


@needs_others
@pytest.mark.slow
def test_readme_blocks_print_what_they_say(tmp_path: Path) -> None:
    """Every Python block runs, in order, and prints the lines that follow its arrows."""
    told = [line.partition("# → ")[2] for line in python_lines() if "# → " in line]

    assert told == run_blocks(tmp_path)


@needs_others
@pytest.mark.slow
def test_readme_openai_block_blocks_the_second_call(tmp_path: Path) -> None:
    """The same tool call with a new id is answered in words, and the charge is not repeated."""
    first, second = run_blocks(tmp_path, ASK_TWICE)[-2:]

    assert ast.literal_eval(first) == [
        {"role": "tool", "tool_call_id": "call_1", "content": '"receipt for A-9"'}
    ]
    [answer] = ast.literal_eval(second)
    assert answer["tool_call_id"] == "call_2"
    assert answer["content"].startswith('"already done at ')


def test_readme_has_every_policy_option_in_order() -> None:
    """The table of policies is the list of options, no more and no less."""
    table = README.partition("## Policies")[2].partition("\n\nA model")[0]

    assert list(PolicyOptions.__annotations__) == re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "llms.txt", "CLAUDE.md", "CHANGELOG.md"])
def test_documents_name_only_what_exists(document: str) -> None:
    """A `guard.name` or `ledger.name` in a document is an attribute."""
    text = (ROOT / document).read_text("utf-8")

    assert {name for name in names_in(text, "guard") if not hasattr(Guard, name)} == set()
    assert {name for name in names_in(text, "ledger") if not hasattr(ledger, name)} == set()


def test_readme_names_every_error_and_every_durability() -> None:
    """A reader finds each error and each value of sync=."""
    errors = [
        n for n in ledger.__all__ if inspect.isclass(e := getattr(ledger, n)) and issubclass(e, Exception)
    ]

    assert [name for name in errors if f"`{name}`" not in README] == []
    assert [way for way in ("full", "claim", "off") if f'sync="{way}"' not in README] == []


def test_readme_links_only_to_files_that_exist() -> None:
    """Files and folders in backticks are there."""
    named = set(re.findall(r"`([\w/]+(?:\.(?:md|py|txt)|/))`", README))

    assert {"ledger.py", "llms.txt", "CONTRIBUTING.md", "CHANGELOG.md", "examples/"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# ── the API ───────────────────────────────────────────────────────────────────────────────────────


def test_llms_txt_documents_the_api() -> None:
    """Its list of names is `__all__`."""
    assert set(ledger.__all__) == documented_names()


def test_llms_txt_has_every_method_of_the_guard() -> None:
    """Each public method of Guard stands there as `guard.name`, and each policy option."""
    assert sorted(set(public_members(Guard)) - names_in(LLMS, "guard")) == []
    assert [name for name in PolicyOptions.__annotations__ if f"`{name}" not in LLMS] == []


def test_llms_txt_has_every_method_of_the_task_ledger() -> None:
    """Each public method of TaskLedger stands there as `tasks.name`, and no other."""
    assert set(public_members(TaskLedger)) ^ names_in(LLMS, "tasks") == {"mapping"}


def test_the_page_of_tasks_has_the_table_of_states() -> None:
    """The diagram is printed from the table."""
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")

    assert f"```text\n{diagram()}\n```" in page


@pytest.mark.parametrize("name", sorted(ledger.__all__))
def test_public_names_have_a_docstring(name: str) -> None:
    """A public class, function or method says what it does; so does a public constant, in a comment."""
    value = getattr(ledger, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        source = (ROOT / "ledger.py").read_text("utf-8")
        assert re.search(rf"^#: .*\n(?:#.*\n)*{name}\b.*=", source, re.MULTILINE)
        return
    members = public_members(value) if inspect.isclass(value) else {}
    told = {name: value} | {
        n: m for n, m in members.items() if inspect.isfunction(m) or isinstance(m, property)
    }

    # A class never takes over its base's docstring; a method that overrides another may.
    assert [n for n, m in told.items() if not (m.__doc__ if inspect.isclass(m) else inspect.getdoc(m))] == []


def test_public_names_exist_once_and_sorted() -> None:
    """`__all__` is in the order that ruff keeps, without doubles, and star import works."""
    found: dict[str, object] = {}
    exec("from ledger import *", found)  # noqa: S102  # the statement is the subject

    assert set(ledger.__all__) == found.keys() - {"__builtins__"}
    assert len(set(ledger.__all__)) == len(ledger.__all__)


# ── the project's own documents ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CLAUDE.md", "llms.txt"])
def test_commands_exist(document: str) -> None:
    """Every `make verb` in a document is a target with a help text in the Makefile."""
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = (ROOT / document).read_text("utf-8")
    told = set(re.findall(r"(?:^ +|`)make ([a-z-]+)", text, re.MULTILINE))

    assert told - verbs == set()


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CLAUDE.md"])
def test_contributors_find_every_command(document: str) -> None:
    """Whoever changes something finds demo, test, check, bench and build."""
    text = (ROOT / document).read_text("utf-8")

    assert [v for v in ("demo", "test", "check", "bench", "build") if f"`make {v}`" not in text] == []


def test_changelog_has_the_version() -> None:
    """The version of ledger.py has a heading, and there is room for what comes next."""
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)

    assert ["Unreleased", ledger.__version__] == headings[:2]
