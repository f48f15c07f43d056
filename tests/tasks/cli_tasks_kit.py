"""What tests of `ledger tasks` share."""

from __future__ import annotations

from typing import Any

from tests.cli_kit import Done, run


def ledger(db: object, *words: object) -> Done:
    """Run `ledger tasks` on that ledger."""
    return run("tasks", *words, "--db", db)


def ok(db: object, *words: object) -> Any:
    """Run it with --json, without complaint; what it printed."""
    done = ledger(db, *words, "--json")
    assert (0, "") == (done.code, done.err)
    return done.json
