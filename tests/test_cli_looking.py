"""show, tail, stats, inspect, doubts, brief, on ledgers that real processes wrote."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.actors import eventually, stage
from tests.cli_kit import TABS, Background, Terminal, copied, make_shop, on_terminal, run

CALL_KEYS = [
    "call",
    "tool",
    "name",
    "wf",
    "caller",
    "status",
    "run",
    "key",
    "args",
    "result",
    "error",
    "attempts",
    "executed",
    "blocked",
    "created",
    "started",
    "ended",
    "touched",
    "lease",
    "released",
    "late",
    "holder",
]
SUM_KEYS = [
    "actions",
    "attempts",
    "executed",
    "blocked",
    "failed",
    "in_doubt",
    "suspended",
    "running",
    "duplicate_rate",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop's ledger, made once."""
    return make_shop(tmp_path_factory.mktemp("shop") / "ledger.db")


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Path:
    """A shop's ledger of one's own."""
    return copied(made, tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A ledger that nothing was called with."""
    with stage(tmp_path) as here:
        here.start("guard.check()").ends_well()
        return here.db


# -- show --


def test_show_lists_the_newest_call_first(shop: Path) -> None:
    """In a pipe there are titles and a line for each call, tab-separated."""
    done = run("show", shop)

    assert (0, "") == (done.code, done.err)
    assert TABS == done.out.splitlines()[0].split("\t")
    assert ["book", "send_email", "nasty", "decline", "charge", "charge"] == [r["tool"] for r in done.rows]
    assert ["in_doubt", "success", "failed", "failed", "success", "success"] == [
        r["status"] for r in done.rows
    ]
    first = done.rows[-1]
    assert ("default", "agent-1", "1", "3", "1", "2") == tuple(
        first[name] for name in ("workflow", "caller", "run", "attempts", "executed", "blocked")
    )
    assert 'cents=100, order="A-1"' == first["arguments"]
    assert '{"receipt": "r-A-1"}' == first["outcome"]
    assert first["started"].endswith(" UTC")


def test_show_times_are_local_with_their_zone(shop: Path) -> None:
    """A list tells times as the clock on the wall does, and says of which zone."""
    [row] = run("show", shop, "--tool", "decline", env={"TZ": "Asia/Tokyo"}).rows

    assert row["started"].endswith(" JST")


def test_show_json_is_one_array_of_one_schema(shop: Path) -> None:
    """`show --json` is an array of calls, each with the same fields, times in UTC."""
    done = run("show", shop, "--json", env={"TZ": "Asia/Tokyo"})

    assert (0, "") == (done.code, done.err)
    assert all(CALL_KEYS == list(call) for call in done.json)
    assert 6 == len(done.json)
    assert {"receipt": "r-A-1"} == done.json[-1]["result"]
    assert all(call["started"].endswith("+00:00") for call in done.json)


@pytest.mark.parametrize(
    ("words", "tools"),
    [
        (("--tool", "charge"), ["charge", "charge"]),
        (("--tool", "shop.charge"), ["charge", "charge"]),
        (("--status", "failed"), ["nasty", "decline"]),
        (("--status", "in-doubt"), ["book"]),
        (("--wf", "nightly"), ["book", "send_email"]),
        (("--caller", "agent-2"), ["book", "send_email"]),
        (("--since", "1h", "--caller", "agent-2"), ["book", "send_email"]),
        (("--search", "declined"), ["decline"]),
        (("--search", "A-2"), ["charge"]),
    ],
)
def test_show_has_filters(words: tuple[str, ...], tools: list[str], shop: Path) -> None:
    """Each filter leaves the calls that match, and exit code 0."""
    done = run("show", shop, *words)

    assert (0, tools) == (done.code, [row["tool"] for row in done.rows])


@pytest.mark.parametrize("name", ["show", "stats"])
@pytest.mark.parametrize("words", [("--tool", "nope"), ("--until", "2020-01-01"), ("--search", "A_1")])
def test_a_filter_that_matches_nothing_exits_3(name: str, words: tuple[str, ...], shop: Path) -> None:
    """Nothing on stdout, a word on stderr, exit code 3."""
    done = run(name, shop, *words)

    assert (3, "") == (done.code, done.out)
    assert "nothing matches" in done.err


def test_json_that_matches_nothing_is_still_json(shop: Path) -> None:
    """An empty array, and exit code 3 beside it."""
    done = run("show", shop, "--wf", "nope", "--json")

    assert (3, []) == (done.code, done.json)


@pytest.mark.parametrize("name", ["show", "stats", "doubts", "tail", "brief", "export"])
def test_an_empty_ledger_is_no_failure(name: str, empty: Path) -> None:
    """Without calls and without a filter the exit code is 0."""
    words = ["--no-follow"] if name == "tail" else []

    assert 0 == run(name, empty, *words).code


def test_show_says_how_many_more_there_are(shop: Path) -> None:
    """The newest of so many, and on stderr how many are left; --all has them all."""
    done = run("show", shop, "--limit", "2")

    assert ["book", "send_email"] == [row["tool"] for row in done.rows]
    assert "4 more; --limit N shows N, --all shows them all\n" == done.err
    assert 6 == len(run("show", shop, "--limit", "2", "--all").rows)
    assert "1 more" in run("show", shop, "-n", "1", "--wf", "nightly").err
    assert "" == run("show", shop, "--limit", "6").err


def test_show_counts_no_more_than_is_cheap(shop: Path) -> None:
    """Where the number of calls that match would take a long look, it says only that there are more."""
    shown, all_shown = (run("show", shop, "-n", n, "--status", "success") for n in ("2", "3"))

    assert "there are more; --limit N shows N, --all shows them all\n" == shown.err
    assert (3, "") == (len(all_shown.rows), all_shown.err)


def test_a_long_list_is_printed_while_it_is_read(tmp_path: Path) -> None:
    """A high --limit does not hold all calls first: what goes meanwhile is not shown."""
    with stage(tmp_path) as here:
        here.start(
            "guard = Guard(DB, quiet=True, sync='off')\n"
            "def pay(text): pass\n"
            "guard.policy(pay, name='shop.pay')\n"
            "for n in range(1200): guard(pay, f'{n}' * 50)\n"
        ).ends_well()
        with Background("show", here.db, "--limit", "1200", "--json", reads=False) as show:
            eventually(lambda: 0 < show.waiting())
            assert 0 == run("clear", here.db, "--yes").code
            show.listen()
            done = show.ends()

    assert 0 == done.code
    assert 1200 > len(done.json) > 0


def test_two_tools_of_one_short_name_are_told_apart(tmp_path: Path) -> None:
    """Where two tools share the short name, the full ones are shown."""
    with stage(tmp_path) as here:
        here.start(
            "def send(to): pass\n"
            "for name in ('mail.send', 'sms.send'):\n"
            "    guard.policy(send, name=name)\n"
            "    guard(send, 'ada')\n"
        ).ends_well()

        assert ["sms.send", "mail.send"] == [row["tool"] for row in run("show", here.db).rows]


def test_show_on_a_terminal_has_signs_and_short_fingerprints(shop: Path) -> None:
    """On a terminal the list is for the eye."""
    done = on_terminal("show", shop, columns=140, env={"NO_COLOR": "1"})

    assert "? in doubt  book" in done.out
    assert "✗ failed" in done.out
    assert run("show", shop).rows[0]["call"][:12] + "  " in done.out


# -- stats --


def test_stats_adds_up_by_tool_with_the_duplicate_rate(shop: Path) -> None:
    """A line for each tool, one for all, and the bar: blocked ÷ attempts."""
    done = run("stats", shop)

    assert (0, "") == (done.code, done.err)
    lines = done.out.splitlines()
    assert [
        "tool",
        "calls",
        "attempts",
        "executed",
        "blocked",
        "failed",
        "in_doubt",
        "suspended",
        "running",
    ] == [title.replace(" ", "_") for title in lines[0].split("\t")]
    assert "charge\t2\t4\t2\t2\t0\t0\t0\t0" == lines[2]
    assert "total\t6\t9\t3\t3\t2\t1\t0\t0" == lines[-2]
    assert "duplicates ███████░░░░░░░░░░░░░ 33.3 % (3 of 9 attempts ran nothing)" == lines[-1]


def test_stats_of_a_workflow(shop: Path) -> None:
    """With --wf only its calls count."""
    lines = run("stats", shop, "--wf", "nightly").out.splitlines()

    assert "total\t2\t3\t1\t1\t0\t1\t0\t0" == lines[-2]


def test_stats_json_has_one_schema(shop: Path) -> None:
    """The same sums for all and for each tool by its full name."""
    found = run("stats", shop, "--json").json

    assert [*SUM_KEYS, "tools"] == list(found)
    assert 0.3333 == found["duplicate_rate"]
    assert all(SUM_KEYS == list(sums) for sums in found["tools"].values())
    assert 2 == found["tools"]["shop.charge"]["executed"]


# -- inspect --


def call_of(shop: Path, tool: str) -> str:
    """The fingerprint of a tool's newest call."""
    return run("show", shop, "--tool", tool).rows[0]["call"]


def test_inspect_tells_all_about_a_call(shop: Path) -> None:
    """Arguments, runs with their owner and end, every attempt, and what the next one would get."""
    [call] = [row["call"] for row in run("show", shop, "--search", "A-1").rows]

    done = run("inspect", call[:8], "--db", shop)

    assert (0, "") == (done.code, done.err)
    assert f"call       {call}\n" in done.out
    assert 'arguments  {"cents": 100, "order": "A-1"}\n' in done.out
    assert "✓ success   attempts 3 · executed 1 · blocked 2" in done.out
    assert "would be blocked: run 1 succeeded at " in done.out
    assert 'result  {"receipt": "r-A-1"}' in done.out
    assert "by agent-1 in pid " in done.out
    timeline = done.out.partition("timeline\n")[2]
    assert ["claimed", "success", "blocked"] == [
        word for word in timeline.split() if word in ("claimed", "success", "blocked")
    ][:3]


def test_inspect_shows_the_traceback_of_a_failure(shop: Path) -> None:
    """A failed run has its error and where it came from."""
    done = run("inspect", call_of(shop, "decline"), "--db", shop)

    assert "error  RuntimeError: card declined" in done.out
    assert 'raise RuntimeError("card declined")' in done.out


def test_inspect_json_has_history_events_and_verdict(shop: Path) -> None:
    """The call, its runs, what happened, and what the next identical call gets."""
    found = run("inspect", call_of(shop, "book"), "--db", shop, "--json").json

    assert [*CALL_KEYS, "history", "events", "verdict"] == list(found)
    assert "in_doubt" == found["status"]
    assert ["claimed"] == [event["kind"] for event in found["events"]]


@pytest.mark.parametrize(
    ("prefix", "text"),
    [("zz", "'zz' is no fingerprint"), ("", "is no fingerprint"), ("0" * 31, "no call begins")],
)
def test_inspect_of_no_call_says_where_to_look(prefix: str, text: str, shop: Path) -> None:
    """What names no call is an error that points to the list."""
    done = run("inspect", prefix, "--db", shop)

    assert (1, "") == (done.code, done.out)
    assert text in done.err
    assert "`ledger show` lists them" in done.err


# -- doubts and brief --


def test_doubts_exits_3_when_there_are_some(shop: Path) -> None:
    """What waits for a person is listed, with what to do on stderr."""
    done = run("doubts", shop)

    assert (3, ["book"]) == (done.code, [row["tool"] for row in done.rows])
    assert "ledger resolve CALL --done (or --not-done)" in done.err
    assert ["shop.book"] == [call["tool"] for call in run("doubts", shop, "--json").json]


def test_doubts_exits_0_when_there_are_none(shop: Path) -> None:
    """Nothing in doubt is good news, also with a filter."""
    assert (0, "", "nothing is in doubt\n") == run("doubts", shop, "--tool", "charge")


def test_brief_fits_where_it_is_told_to(shop: Path) -> None:
    """A short text for a model: what is in doubt comes first, and never more than --max-chars."""
    done = run("brief", shop)

    assert 0 == done.code
    assert done.out.index("IN DOUBT") < done.out.index("DONE (do not repeat it): 3")
    assert 301 > len(run("brief", shop, "--max-chars", "300").out.rstrip("\n"))
    assert "charge" not in run("brief", shop, "--wf", "nightly").out


# -- tail --


def test_tail_without_following_shows_the_last_events(shop: Path) -> None:
    """The last so many, oldest first, and the end."""
    done = run("tail", shop, "--no-follow", "-n", "3")

    assert (0, "") == (done.code, done.err)
    assert ["success", "blocked", "claimed"] == [line.split()[4] for line in done.out.splitlines()]
    assert 3 == run("tail", shop, "--no-follow", "--tool", "nope").code


def test_tail_follows_and_shows_every_attempt_once(tmp_path: Path) -> None:
    """What other processes do appears line by line, each attempt once, until Ctrl-C."""
    with stage(tmp_path) as here:
        actor = here.start(
            "def pay(n): pass\n"
            "guard.policy(pay, name='shop.pay')\n"
            "guard(pay, '0'); say('ready')\n"
            "while (word := hear()):\n"
            "    guard(pay, word); guard.flush(); say('done')\n"
        )
        assert "ready" == actor.line()
        words = ("tail", here.db, "-n", "1")
        with Background(*words, "--json") as tail, Background(*words) as people:
            assert "success" == json.loads(tail.line())["kind"]
            assert "success" in people.line()
            seen: list[dict[str, Any]] = []
            for word in ("1", "2", "1"):
                actor.tell(word)
                assert "done" == actor.line()
                seen += [json.loads(tail.line()) for _ in range(1 if len(seen) == 4 else 2)]
            shown = [people.line() for _ in range(5)]
            for each in (tail, people):
                each.process.send_signal(signal.SIGINT)
            ends = [each.ends() for each in (tail, people)]

    kinds = ["claimed", "success", "claimed", "success", "blocked"]
    assert kinds == [event["kind"] for event in seen]
    assert kinds == [line.split()[4] for line in shown]
    assert sorted(event["seq"] for event in seen) == [event["seq"] for event in seen]
    assert [(0, "", ""), (0, "", "")] == ends


def test_tail_goes_on_after_a_reset_and_with_a_new_file(tmp_path: Path) -> None:
    """A reset is an event like others; a file that is replaced is told of and followed from its start."""
    script = (
        "def pay(n): pass\n"
        "guard.policy(pay, name='shop.pay')\n"
        "guard(pay, sys.argv[2]); guard.flush()\n"
        "if sys.argv[3] == 'reset': guard.reset()\n"
    )
    with stage(tmp_path) as here:
        here.start(script, "1", "").ends_well()
        with Background("tail", here.db, "-n", "1") as tail:
            assert "success" in tail.line()
            here.start(script, "2", "reset").ends_well()
            assert ["claimed", "success", "reset"] == [tail.line().split()[4] for _ in range(3)]
            for part in tmp_path.glob("ledger.db*"):
                if part.is_file():
                    part.unlink()
            here.start(script, "3", "").ends_well()
            assert ["claimed", "success"] == [tail.line().split()[4] for _ in range(2)]
            tail.process.send_signal(signal.SIGINT)
            done = tail.ends()

    assert 0 == done.code
    assert "waiting for a ledger at" in done.err
    assert "Traceback" not in done.err


def test_tail_goes_on_where_it_was_when_the_file_comes_back(tmp_path: Path) -> None:
    """A ledger that was moved away and back has told its events already; only new ones follow."""
    script = "def pay(n): pass\nguard.policy(pay, name='shop.pay')\nguard(pay, sys.argv[2])\n"
    away = tmp_path / "away"
    away.mkdir()
    with stage(tmp_path) as here:
        here.start(script, "1").ends_well()
        with Background("tail", here.db, "-n", "1", "--json") as tail:
            first = json.loads(tail.line())["seq"]
            moved = [part.rename(away / part.name) for part in tmp_path.glob("ledger.db*") if part.is_file()]
            eventually(lambda: not tail.has_open("ledger.db"))
            for part in moved:
                part.rename(tmp_path / part.name)
            here.start(script, "2").ends_well()
            seen = [json.loads(tail.line())["seq"] for _ in range(2)]
            tail.process.send_signal(signal.SIGINT)
            done = tail.ends()

    assert [first + 1, first + 2] == seen
    assert (0, "") == (done.code, done.out)


@pytest.mark.parametrize(("words", "count"), [(("--limit", "2"), 2), (("--search", "nasty"), 2)])
def test_tail_has_the_options_of_its_kind(words: tuple[str, ...], count: int, shop: Path) -> None:
    """--limit is --lines by the name that other lists have; --search looks where its help says."""
    done = run("tail", shop, "--no-follow", *words)

    assert (0, count) == (done.code, len(done.out.splitlines()))
    assert "in the name of the tool, an error or a note" in " ".join(run("tail", "-h").out.split())
    assert "arguments, key" not in run("tail", "-h").out


def test_tail_on_a_terminal_ends_at_ctrl_c(shop: Path) -> None:
    """Ctrl-C on the terminal is how one leaves: no traceback, exit code 0."""
    with Terminal("tail", shop) as terminal:
        terminal.sees("book")
        terminal.press("\x03")
        done = terminal.ends()

    assert 0 == done.code
    assert "Traceback" not in done.out
    assert "Abort" not in done.out
