"""The dashboard before hostile records, absurd requests and ledgers that break: it answers, and recovers."""

from __future__ import annotations

import html
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledger_dashboard import create_app
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from ledger import UsageError
from ledger_ops import acts
from ledger_ops.reader import open_store
from tests.actors import Stage, eventually
from tests.dashboard_kit import CHARGER, copy_of, csrf_of, leave_doubt, tell_story

TOKEN = "a-long-random-token-of-a-test"
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


def test_a_page_of_big_calls_is_short(stage: Stage) -> None:
    """Calls of megabytes end a page early, and its cursor goes on with the next one."""
    stage.start("def keep(n): return n\nfor n in range(25): guard(keep, n)\nguard.close()\n").ends_well()
    with closing(sqlite3.connect(stage.db)) as db, db:
        db.execute("UPDATE runs SET args = ?", (f'["{"x" * 1_000_000}"]',))
    with visiting(stage.db) as client:
        first = client.get("/api/calls?limit=500")
        second = client.get("/api/calls", params={"cursor": first.json()["cursor"], "limit": 500})
        third = client.get("/api/calls", params={"cursor": second.json()["cursor"]}).json()
    pages = [first.json()["calls"], second.json()["calls"], third["calls"]]

    assert [10, 10, 5] == [len(calls) for calls in pages]
    assert 25 == len({call["call"] for calls in pages for call in calls})
    assert third["cursor"] is None


# -- machines --


def test_counters_never_go_down(stage: Stage) -> None:
    """What happened while it was watched stays counted, also when the calls are cleared; gauges follow."""
    charger = stage.start(CHARGER)
    assert charger.line() == "ready"

    def charge(order: str) -> None:
        charger.tell(order)
        assert charger.line() == "done"

    charge("before")
    with visiting(stage.db) as client:
        seen = [metrics_of(client)]
        for order in ("A-1", "A-1", "A-2"):
            charge(order)
        # who was blocked is written a moment later
        eventually(lambda: metrics_of(client)['ledger_attempts_total{tool="actor.charge"}'] == 3)
        seen.append(metrics_of(client))
        acts.clear(open_store(stage.db), actor="test")
        seen.append(metrics_of(client))
        charge("A-3")
        seen.append(metrics_of(client))
    charger.tell("")
    charger.ends_well()

    tool = '{tool="actor.charge"}'
    assert [0, 3, 3, 4] == [values["ledger_attempts_total" + tool] for values in seen]
    assert [0, 2, 2, 3] == [values["ledger_claims_total" + tool] for values in seen]
    assert [0, 2, 2, 3] == [values["ledger_executed_total" + tool] for values in seen]
    assert [0, 1, 1, 1] == [values["ledger_blocked_total" + tool] for values in seen]
    assert [1, 1] == [values["ledger_calls" + tool] for values in (seen[0], seen[3])]


def metrics_of(client: TestClient) -> dict[str, float]:
    """Each value by its name and labels."""
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


# -- ledgers that break --


def test_a_file_that_was_overwritten_is_told_and_recovers(stage: Stage) -> None:
    """Garbage in place of the bytes is 503 at once; good bytes are read again without a restart."""
    tell_story(stage)
    db = copy_of(stage.db)
    good = db.read_bytes()
    with visiting(db) as client:
        before = [client.get(path).status_code for path in ("/", "/calls", "/health", "/metrics")]
        with db.open("r+b") as file:
            file.write(os.urandom(len(good)))
        broken = [client.get(path).status_code for path in ("/health", "/calls", "/api/calls")]
        down = metrics_of(client)["ledger_up"]
        with db.open("r+b") as file:
            file.write(good)
        after = [client.get(path).status_code for path in ("/calls", "/api/calls", "/", "/health")]
        up = metrics_of(client)["ledger_up"]

    assert [200] * 4 == before
    assert [503] * 3 == broken
    assert [200] * 4 == after
    assert (0, 1) == (down, up)


def test_a_damaged_table_is_found_by_health(stage: Stage) -> None:
    """Pages of the file that turn to noise behind a sound first page are 503, not a cached yes."""
    tell_story(stage)
    db = copy_of(stage.db)
    good = db.read_bytes()
    with visiting(db) as client:
        client.get("/")
        db.write_bytes(good[:4096] + os.urandom(len(good) - 4096))
        broken = client.get("/health")
        db.write_bytes(good)
        healthy = client.get("/health")

    assert (503, 200) == (broken.status_code, healthy.status_code)
    assert "reason" in broken.json()


def test_a_file_that_is_replaced_under_load_is_never_a_failure(stage: Stage) -> None:
    """While another ledger takes its place again and again, each answer is a page, or 503."""
    tell_story(stage)
    db = copy_of(stage.db)
    good, over = db.read_bytes(), threading.Event()
    with visiting(db) as client:
        client.get("/")

        def ask(path: str) -> set[int]:
            seen = set()
            while not over.is_set():
                seen.add(client.get(path).status_code)
            return seen

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, path) for path in ("/", "/api/overview", "/calls", "/metrics")]
            for n in range(40):
                other = db.with_name(f"other-{n}")
                other.write_bytes(good)
                other.rename(db)
                over.wait(0.02)
            over.set()
            seen = set().union(*(each.result() for each in asked))
        last = client.get("/api/overview")

    assert seen <= {200, 503}
    assert (200, 26) == (last.status_code, last.json()["total"]["executed"])


def test_a_held_write_is_told_soon_and_plainly(odd: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes, a decision is 503 with words for people, and nothing is changed."""
    monkeypatch.setattr("ledger_dashboard.source.LOCK_SECONDS", 0.2)
    with visiting(odd.db) as client, closing(sqlite3.connect(odd.db, isolation_level=None)) as db:
        call = client.get("/api/doubts").json()["doubts"][0]["call"]
        csrf = csrf_of(client)
        db.execute("BEGIN IMMEDIATE")
        answer = client.post(f"/api/calls/{call}/retry", json={}, headers=csrf)
        db.execute("ROLLBACK")
        waiting = client.get("/api/doubts").json()["doubts"]

    assert 503 == answer.status_code
    assert {
        "error": "nothing was changed: another process is writing",
        "advice": "Try again.",
    } == answer.json()
    assert [call] == [doubt["call"] for doubt in waiting]


def test_a_refused_decision_speaks_of_pages_not_of_commands(stage: Stage) -> None:
    """What a 409 says fits a browser."""
    leave_doubt(stage)
    with visiting(stage.db) as client:
        call, csrf = client.get("/api/doubts").json()["doubts"][0]["call"], csrf_of(client)
        client.post(f"/api/calls/{call}/resolve", json={"done": False}, headers=csrf)
        refused = [
            client.post(f"/api/calls/{call}/{act}", json=body, headers=csrf)
            for act, body in (("resolve", {"done": True}), ("retry", {}))
        ]

    assert [409, 409] == [answer.status_code for answer in refused]
    assert [] == [answer.text for answer in refused if "`" in answer.text or "--" in answer.text]


# -- the token --


def test_the_form_leads_to_the_page_that_was_asked_for(odd: Stage) -> None:
    """The token travels in a POST of the same origin; a wrong one is asked for again, with the way kept."""
    with visiting(odd.db, token=f" {TOKEN} ") as client:
        client.headers["Accept"] = "text/html"
        asked = client.get("/calls?status=success&wf=a%26b")
        target = html.unescape(re.findall(r'name="target" value="([^"]*)"', asked.text)[0])
        wrong = client.post("/enter", data={"token": "wrong", "target": target}, follow_redirects=False)
        strange = client.post("/enter", data={"token": TOKEN}, headers={"Origin": "http://evil.example"})
        right = client.post("/enter", data={"token": TOKEN, "target": target}, follow_redirects=False)
        away = client.post(
            "/enter", data={"token": TOKEN, "target": "/\\/evil.example"}, follow_redirects=False
        )
        inside = client.get("/calls")

    assert 401 == asked.status_code == wrong.status_code
    assert "/calls?status=success&wf=a%26b" == target
    assert f'value="{html.escape(target)}"' in wrong.text
    assert 403 == strange.status_code
    assert (303, target) == (right.status_code, right.headers["location"])
    assert "/evil.example" == away.headers["location"]
    assert 200 == inside.status_code


def test_the_server_around_it_never_sees_the_token(odd: Stage) -> None:
    """What a server's access log would print of a visit holds the rest of the query, and no token."""
    app, logged = create_app(odd.db, token=TOKEN), []

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                logged.append(scope["query_string"])
            await send(message)

        await app(scope, receive, noting)

    client = TestClient(around, base_url="http://localhost", follow_redirects=False)
    for token in (TOKEN, "wrong"):
        client.get(f"/calls?tool=keep&token={token}")

    assert [b"tool=keep", b"tool=keep"] == logged


@pytest.mark.parametrize("token", ["", " ", "schlüssel", "two words", "bell\a"])
def test_a_token_that_no_header_can_carry_is_refused(odd: Stage, token: str) -> None:
    """It is an error at start, not a door that never opens."""
    with pytest.raises(UsageError, match="token"):
        create_app(odd.db, token=token)
