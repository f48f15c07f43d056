"""retry, resolve and clear: what a person decides, who and why in the events, never beside a live run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors import stage
from tests.cli_kit import Done, Terminal, copied, make_shop, run

#: a tool that goes on until it hears a word
BUSY = """
def pay(order):
    say("inside"); hear()
guard.policy(pay, name="shop.pay")
guard(pay, "A-1")
"""


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


def story(db: Path, call: str) -> list[tuple[str, str | None]]:
    """What happened to a call: kinds and details."""
    return [
        (event["kind"], event["detail"])
        for event in run("inspect", call, "--db", db, "--json").json["events"]
    ]


def test_retry_releases_a_call_and_says_who_and_why(shop: Path) -> None:
    """The next identical call runs; the event has the person and the note."""
    call = call_of(shop, "send_email")

    done = run("retry", call[:10], "--db", shop, "--note", "asked for a copy")

    assert (0, "") == (done.code, done.err)
    assert f"released: send_email (call {call[:12]}); the next identical call runs\n" == done.out
    kind, detail = story(shop, call)[-1]
    assert "released" == kind
    assert detail is not None
    assert detail.startswith("retry by ")
    assert detail.endswith(": asked for a copy")
    assert "would run: run 1 was released" in run("inspect", call, "--db", shop).out


def test_retry_of_what_runs_again_anyway_is_an_error(shop: Path) -> None:
    """A failed call needs no release."""
    done = run("retry", call_of(shop, "decline"), "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert "was not released: its latest run failed, so it runs again anyway" in done.err


def test_resolve_done_with_a_result(shop: Path) -> None:
    """What was in doubt is a success with the result that the person knows."""
    call = call_of(shop, "book")

    done = run(
        "resolve", call, "--db", shop, "--done", "--result", '{"room": 7}', "--note", "phoned", "--json"
    )

    assert (0, "") == (done.code, done.err)
    assert ("success", {"room": 7}, 1) == tuple(done.json[name] for name in ("status", "result", "executed"))
    kind, detail = story(shop, call)[-1]
    assert "resolved" == kind
    assert detail is not None
    assert detail.startswith("mark done by ")
    assert detail.endswith(": phoned")
    assert 0 == run("doubts", shop).code


def test_resolve_not_done_frees_the_call(shop: Path) -> None:
    """What did not happen may be done."""
    call = call_of(shop, "book")

    done = run("resolve", call, "--not-done", "--db", shop)

    assert (0, f"resolved: book (call {call[:12]}) is failed; the next identical call runs\n", "") == done


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "say whether it took effect: --done or --not-done"),
        (("--done", "--result", "{'room': 7}"), "is no JSON"),
        (("--done", "--result", "NaN"), "is no JSON"),
        (("--done", "--result", "sent"), "a text needs its quotes"),
        (("--not-done", "--result", "1"), "what was not done has no result"),
    ],
)
def test_resolve_that_is_asked_wrongly_changes_nothing(words: tuple[str, ...], text: str, shop: Path) -> None:
    """It is a usage error, found before anything is written."""
    call = call_of(shop, "book")

    done = run("resolve", call, "--db", shop, *words)

    assert (2, "") == (done.code, done.out)
    assert text in done.err
    assert [("claimed", None)] == story(shop, call)


def test_resolve_of_what_is_not_in_doubt_is_an_error(shop: Path) -> None:
    """A success is not decided about again."""
    done = run("resolve", call_of(shop, "send_email"), "--done", "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert "nothing was resolved: run 1 of call" in done.err


def test_nothing_is_decided_while_a_run_is_alive(tmp_path: Path) -> None:
    """retry, resolve and clear are refused and name the owner; with --force clear does it."""
    with stage(tmp_path) as here:
        actor = here.start(BUSY)
        assert "inside" == actor.line()
        call = call_of(here.db, "pay")
        refused: list[Done] = [
            run("retry", call, "--db", here.db),
            run("resolve", call, "--done", "--db", here.db),
            run("clear", here.db, "--yes"),
        ]
        owner = f"in pid {actor.pid} on "
        forced = run("clear", here.db, "--yes", "--force")
        actor.tell("go")
        actor.ends_well()

    assert [(1, "")] * 3 == [(done.code, done.out) for done in refused]
    assert all(owner in done.err for done in refused)
    assert "--force" in refused[2].err
    assert (0, "forgot 1 calls of all workflows\n", "") == forced


# -- clear --


def test_clear_asks_and_forgets(shop: Path) -> None:
    """It says how many calls would be forgotten, and forgets them after a yes."""
    with Terminal("clear", shop, "--wf", "nightly") as terminal:
        terminal.sees("2 calls of workflow nightly in ")
        terminal.sees("Forget them? [y/N]")
        terminal.press("y\n")
        done = terminal.ends()

    assert 0 == done.code
    assert "forgot 2 calls of workflow nightly" in done.out
    assert 4 == len(run("show", shop).rows)


def test_clear_leaves_who_and_why(shop: Path) -> None:
    """The event of a clearing names the person and has the note."""
    run("clear", shop, "--yes", "--note", "test data")

    event = run("tail", shop, "--no-follow", "-n", "1", "--json").json

    assert "reset" == event["kind"]
    assert event["detail"].startswith("clear by ")
    assert event["detail"].endswith(": test data")


def test_clear_asks_nobody_in_a_pipe(shop: Path) -> None:
    """Without a terminal it refuses unless --yes, even if an answer is piped in."""
    done = run("clear", shop, input="y\n")

    assert (1, "") == (done.code, done.out)
    assert "Error: nothing was changed: 6 calls of all workflows in " in done.err
    assert done.err.endswith("nobody can be asked here, add --yes if that is meant\n")
    assert 6 == len(run("show", shop).rows)


def test_clear_with_yes_tells_what_it_did(shop: Path) -> None:
    """In a script --yes is the answer, and --json gives the count."""
    assert {"forgotten": 6, "wf": None} == run("clear", shop, "--yes", "--json").json
    assert (0, "", "there are no calls in all workflows; nothing was changed\n") == run("clear", shop)
    assert {"forgotten": 0, "wf": None} == run("clear", shop, "--yes", "--json").json


def test_clear_of_an_unknown_workflow_exits_3(shop: Path) -> None:
    """A workflow without calls is a filter that matches nothing."""
    done = run("clear", shop, "--wf", "nope", "--yes")

    assert (3, "", "there are no calls in workflow nope; nothing was changed\n") == done
