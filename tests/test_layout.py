"""The layout: one file that works alone, and a wheel that holds what it should and nothing else.

The tests marked slow build and install a wheel. They are part of `make test`; LEDGER_WHEEL names
a finished wheel to judge instead (.ci/run passes the one that `make build` made from the sdist).
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import ledger

ROOT = Path(__file__).resolve().parent.parent
USER_FILES = sorted((ROOT / "tests" / "typing").glob("*.py"))
COMPANIONS = (
    "ledger_stores",
    "ledger_tasks",
    "ledger_ops",
    "ledger_integrations",
    "ledger_cli",
    "dashboard/ledger_dashboard",
)
QUICKSTART = """\
from ledger import guard

def charge(order: str, cents: int) -> str:
    print("charged", order, cents)
    return "receipt 1"

guard(charge, "A-17", 4200)
guard(charge, "A-17", 4200)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Stdout of a command that must succeed; its own words are the failure's words."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel under judgement: LEDGER_WHEEL, or one built from this tree."""
    if given := os.environ.get("LEDGER_WHEEL"):
        return Path(given).resolve(strict=True)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=ROOT)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment that holds the wheel and nothing else, not even pip."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python)
    run(*pip, "install", "--no-index", wheel, cwd=home)
    return python


def metadata(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_one_file_is_an_install(tmp_path: Path) -> None:
    """ledger.py, copied alone into an empty folder, guards a call across two processes."""
    shutil.copyfile(ROOT / "ledger.py", tmp_path / "ledger.py")
    (tmp_path / "quickstart.py").write_text(QUICKSTART)

    first, second = (
        run(sys.executable, "-S", "-E", "-s", "-W", "error", "quickstart.py", cwd=tmp_path) for _ in range(2)
    )

    assert first == "charged A-17 4200\n"
    assert second == ""


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks", "dashboard"])
def test_plain_folders_stay_plain(folder: str) -> None:
    """A folder that must never reach site-packages is not a package."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_an_editable_install_has_no_stub_copy() -> None:
    """Checkers in this environment read ledger.py itself, never a copy that has gone stale."""
    assert Path(ledger.__file__) == ROOT / "ledger.py"
    assert [path for path in sys.path if Path(path, "ledger-stubs").exists()] == []


@pytest.mark.slow
def test_the_wheel_holds_the_layout_and_nothing_else(wheel: Path) -> None:
    """Its top-level names are ledger.py, the stub package and the companions that exist."""
    companions = {Path(path).name for path in COMPANIONS if (ROOT / path).is_dir()}
    info = f"ledger_guard-{ledger.__version__}.dist-info"

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        stub = archive.read("ledger-stubs/__init__.pyi")

    assert {name.partition("/")[0] for name in names} == {"ledger.py", "ledger-stubs", info, *companions}
    assert stub == (ROOT / "ledger.py").read_bytes()
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_base_install_has_no_dependencies(wheel: Path) -> None:
    """Whatever the wheel requires, it requires for an extra."""
    told = metadata(wheel)

    assert (told["Name"], told["Version"]) == ("ledger-guard", ledger.__version__)
    assert told["Requires-Python"] == ">=3.11"
    assert [need for need in told.get_all("Requires-Dist", []) if "extra ==" not in need] == []


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(installed: Path, tmp_path: Path) -> None:
    """The installed guard runs the quickstart, from site-packages and not from this tree."""
    (tmp_path / "quickstart.py").write_text(f"{QUICKSTART}\nimport ledger\nprint(ledger.__file__)\n")

    charged, where = run(installed, "-W", "error", "quickstart.py", cwd=tmp_path).splitlines()

    assert charged == "charged A-17 4200"
    assert Path(where).is_relative_to(installed.parent.parent)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "extra"), [("ledger", "cli"), ("ledger-dashboard", "dashboard")])
def test_a_command_without_its_extra_says_which(installed: Path, command: str, extra: str) -> None:
    """In an environment that holds the wheel alone, each command exits with 1 and the line to install."""
    done = subprocess.run(
        [installed.with_name(command), "--help"], capture_output=True, text=True, check=False
    )

    assert (1, "") == (done.returncode, done.stdout)
    assert f'pip install "ledger-guard[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_wheel_holds_what_pages_are_made_of(wheel: Path) -> None:
    """Templates, static files and marks for type checkers come along, each companion its own."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith(".py")}
    here = {
        str(path.relative_to(ROOT / parent))
        for parent, folder in ((".", "ledger_ops"), (".", "ledger_cli"), ("dashboard", "ledger_dashboard"))
        for path in (ROOT / parent / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }

    assert here - held == set()
    assert {f"{name}/py.typed" for name in ("ledger_ops", "ledger_cli", "ledger_dashboard")} <= here


@pytest.mark.slow
@pytest.mark.parametrize("path", USER_FILES, ids=lambda path: path.stem)
def test_a_users_file_is_typed_against_the_wheel(path: Path, installed: Path, tmp_path: Path) -> None:
    """Mypy strict sees the signatures of the installed wheel, and no Any in their place."""
    mine = shutil.copyfile(path, tmp_path / path.name)
    strict = ("-m", "mypy", "--strict", "--config-file=", "--cache-dir", os.devnull)

    run(sys.executable, *strict, "--python-executable", installed, mine, cwd=tmp_path)
