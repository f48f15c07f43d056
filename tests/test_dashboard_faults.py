"""The dashboard before hostile records, absurd requests and ledgers that break: it answers, and recovers."""

from __future__ import annotations

import html
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledger_dashboard import create_app
from starlette.testclient import TestClient

from tests.actors import Stage
from tests.dashboard_kit import copy_of, csrf_of, leave_doubt

#: names that a form must send back as they are: joiners, a tab, a mark that turns the direction, markup
ODD_NAMES = ("team \u200d\u200c one", "tab\there", "\u202etrip", "<b>\"&amp;'", "w" * 900)
#: what JSON can say and UTF-8 cannot
HALF = "\ud83d"
HOSTILE = """
def keep(text):
    return {"again": text}

for name in ODD:
    with guard.workflow(name), guard.as_caller(name):
        guard(keep, HALF + name)
guard.close()
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger of the test's own."""
    with Stage(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A ledger with odd names, halves of surrogate pairs, and JSON that others wrote; tests only look."""
    with Stage(tmp_path_factory.mktemp("odd")) as stage:
        stage.start(f"ODD, HALF = {ODD_NAMES!r}, {HALF!r}\n{HOSTILE}").ends_well()
        leave_doubt(stage)
        with closing(sqlite3.connect(stage.db)) as db, db:
            newest = "(SELECT MAX(id) FROM runs WHERE status = 'success')"
            deep = "[" * 400 + "]" * 400
            db.execute(f"UPDATE runs SET result = '[1e999, NaN]', args = ? WHERE id = {newest}", (deep,))
        yield stage


@contextmanager
def visiting(db: Path, **options: Any) -> Iterator[TestClient]:
    """Somebody who asks an app in this process; an exception that it lets through is a 500."""
    with TestClient(
        create_app(db, **options), base_url="http://localhost", raise_server_exceptions=False
    ) as client:
        yield client


# -- hostile records --


def test_every_api_answers_whatever_was_recorded(odd: Stage) -> None:
    """Half of a surrogate pair, infinity and deep nesting reach the caller as JSON."""
    with visiting(odd.db) as client:
        paths = ["/api/overview", "/api/calls", "/api/calls.csv", "/api/events", "/api/doubts", "/metrics"]
        calls = client.get("/api/calls").json()["calls"]
        paths += [f"/{kind}/{call['call']}" for call in calls for kind in ("calls", "api/calls")]
        answers = {path: client.get(path) for path in [*paths, "/", "/calls", "/live", "/doubts", "/health"]}

    assert {} == {path: answer.text for path, answer in answers.items() if answer.status_code != 200}
    texts = [
        call["args"]["text"] for call in calls if isinstance(call["args"], dict) and call["args"].get("text")
    ]
    assert {HALF + name for name in ODD_NAMES[:-1]} == set(texts)


def test_a_decision_with_half_a_character_is_told_as_it_went(odd: Stage, tmp_path: Path) -> None:
    """What was decided is answered with 200, although its result cannot be written in UTF-8."""
    with visiting(copy_of(odd.db, tmp_path)) as client:
        call = client.get("/api/doubts").json()["doubts"][0]["call"]
        answer = client.post(
            f"/api/calls/{call}/resolve", json={"done": True, "result": r'"\ud83d"'}, headers=csrf_of(client)
        )

    assert (200, HALF) == (answer.status_code, answer.json()["call"]["result"])


def test_a_filter_is_sent_back_as_it_was_recorded(odd: Stage) -> None:
    """The fields and links of a page hold each odd or long name unchanged, and it finds its call again."""
    with visiting(odd.db) as client:
        client.get("/")  # counts, and so knows the names to offer
        for name in ODD_NAMES:
            page = client.get("/calls", params={"wf": name}, headers={"Accept": "text/html"}).text
            field = re.search(r'<input id="wf" name="wf" value="([^"]*)"', page)

            assert field is not None
            assert name == html.unescape(field.group(1))
            assert 1 == page.count('<tr id="c-')
            assert 1 == len(client.get("/api/calls", params={"caller": name}).json()["calls"])
        offered = re.findall(r'<option value="([^"]*)"', client.get("/live").text)

    assert set(ODD_NAMES) <= {html.unescape(value) for value in offered}


def test_every_doubt_is_on_some_page(stage: Stage) -> None:
    """A hundred and twenty doubts, many of one moment, are walked through without loss or repetition."""
    leave_doubt(stage)
    with closing(sqlite3.connect(stage.db)) as db, db:
        columns = ", ".join(row[1] for row in db.execute("PRAGMA table_info(runs)") if row[1] != "id")
        copied = columns.replace("call,", "printf('%032x', n),", 1).replace("started", "started + n / 40", 1)
        db.execute(
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 119)"
            f" INSERT INTO runs ({columns}) SELECT {copied} FROM runs, numbers"
        )
    with visiting(stage.db) as client:
        pages, told = [client.get("/doubts").text], client.get("/api/doubts").json()
        while further := re.search(r'rel="next" href="([^"]+)"', pages[-1]):
            pages.append(client.get(html.unescape(further.group(1))).text)
        rest = client.get("/api/doubts", params={"cursor": told["cursor"]}).json()
    walked = [re.findall(r'<li class="card" id="d-(\w+)"', page) for page in pages]

    assert [50, 50, 20] == [len(calls) for calls in walked]
    assert 120 == len({call for calls in walked for call in calls})
    assert (100, 20, None) == (len(told["doubts"]), len(rest["doubts"]), rest["cursor"])


# -- absurd requests --


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Origin": "http://["}, 403),
        ("/?since=0001-01-01", {}, 400),
        ("/api/overview?since=0001-01-01", {}, 400),
        ("/calls?since=99999999999w", {}, 400),
        ("/calls?until=99999999w", {}, 400),
        ("/api/events?since=99999999999w", {}, 400),
        ("/api/doubts?until=99999999w", {}, 400),
        ("/api/calls.csv?since=99999999999w", {}, 400),
        ("/api/calls?limit=" + "9" * 5000, {}, 400),
        ("/doubts?cursor=" + "9" * 5000 + ".ff", {}, 400),
        ("/api/doubts?cursor=bla", {}, 400),
        ("/calls?wf=" + "w" * 20_000, {}, 400),
    ],
)
def test_an_absurd_request_is_refused(odd: Stage, path: str, headers: dict[str, str], status: int) -> None:
    """What no calendar, number or address can be is the caller's mistake, not a failure of ours."""
    with visiting(odd.db) as client:
        answer = client.get(path, headers={"Accept": "application/json", **headers})

    assert status == answer.status_code
    assert {"error", "advice"} == set(answer.json())


def test_an_absurd_event_number_is_ignored(odd: Stage) -> None:
    """A Last-Event-ID of thousands of digits begins at the newest event."""
    with visiting(odd.db) as client:
        answer = client.head("/api/stream", headers={"Last-Event-ID": "9" * 5000})

    assert 200 == answer.status_code


@pytest.mark.parametrize("depth", [700, 60_000])
def test_a_result_that_is_nested_beyond_reason_is_refused(odd: Stage, depth: int) -> None:
    """It is refused with words, and nothing is decided."""
    with visiting(odd.db) as client:
        call = client.get("/api/doubts").json()["doubts"][0]["call"]
        body = {"done": True, "result": "[" * depth + "]" * depth}
        answer = client.post(f"/api/calls/{call}/resolve", json=body, headers=csrf_of(client))
        waiting = client.get("/api/doubts").json()["doubts"]

    assert answer.status_code in (400, 409)
    assert [call] == [doubt["call"] for doubt in waiting]


# -- long ledgers --


def test_a_search_for_events_ends_in_time_and_says_how_far_it_got(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing fits, the page and the API look at the newest events only, and tell it."""
    stage.start("guard.check()\nguard.close()\n").ends_well()
    with closing(sqlite3.connect(stage.db)) as db, db:
        db.execute(
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 50000)"
            " INSERT INTO events (seq, kind, at, tool, wf, caller, n)"
            " SELECT n, 'blocked', 1700000000000000 + n * 1000000, 'busy', 'w', 'c', 1 FROM numbers"
        )
    monkeypatch.setattr("ledger_dashboard.pages.SEARCH_SECONDS", 0.0)
    monkeypatch.setattr("ledger_dashboard.api.SEARCH_SECONDS", 0.0)
    with visiting(stage.db) as client:
        page = client.get("/live?tool=nope").text
        back = client.get("/api/events?tool=nope").json()
        on = client.get("/api/events?tool=nope&after=0").json()

    assert "Looked back to 2023-11-15" in page
    assert ([], False, 30_001) == (back["events"], back["complete"], back["upto"])
    assert ([], False, 20_000) == (on["events"], on["complete"], on["upto"])
