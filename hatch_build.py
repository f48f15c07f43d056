"""Puts ledger.py into the wheel a second time, as the stub package `ledger-stubs`.

PEP 561 gives a module of one file no place for py.typed: without the stubs, mypy reads an
installed `ledger` as untyped and everything that a user gets from it as Any.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubHook(BuildHookInterface[Any]):
    """Adds `ledger-stubs/__init__.pyi` to a wheel, and nothing to an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the copy that the wheel takes in."""
        if version != "standard":  # an editable install would go on showing checkers a stale copy
            return
        self.scratch = TemporaryDirectory()
        # A copy: force-include on ledger.py itself moves it, and the wheel would be without.
        stub = Path(self.scratch.name, "__init__.pyi")
        shutil.copyfile(Path(self.root, "ledger.py"), stub)
        build_data["force_include"][str(stub)] = "ledger-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 (hatchling's signature)
        """Remove the copy."""
        if version == "standard":
            self.scratch.cleanup()
