"""What `MODULE:NAME` on the command line stands for; it is imported also from the current folder."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from ledger_ops.values import printable


def loaded(text: str, option: str) -> Any:
    """The object of that name; what cannot be found, or fails while it is imported, is a usage error."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise click.UsageError(f"{option} takes MODULE:NAME, such as jobs:handlers; {text!r} is none")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    found = _imported(module, option)
    try:
        return functools.reduce(getattr, name.split("."), found)
    except AttributeError:
        where = getattr(found, "__file__", None) or "it"
        raise click.UsageError(
            f"{option}: module {module!r} has no {name!r}; look for its name in {where}"
        ) from None


def callable_of(text: str, option: str) -> Any:
    """The function of that name; anything that cannot be called is a usage error."""
    found = loaded(text, option)
    if not callable(found):
        raise click.UsageError(
            f"{option}: {text} is {_brief(found)}, which cannot be called; name a function"
        )
    return found


def _imported(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise click.UsageError(
                f"{option}: there is no module {module!r}; it is looked for in {Path.cwd()} and where Python "
                "looks (PYTHONPATH)"
            ) from None
        raise click.UsageError(_failed(module, option, error)) from error
    except Exception as error:
        raise click.UsageError(_failed(module, option, error)) from error


def failed_at(error: Exception) -> str:
    """What somebody's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {error}{at}", lines=True)


def _failed(module: str, option: str, error: Exception) -> str:
    return f"{option}: module {module!r} cannot be imported: {failed_at(error)}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
