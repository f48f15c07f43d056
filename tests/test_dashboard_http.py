"""The dashboard over HTTP: what it answers, and to whom. The server is a real process on loopback."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from ledger_dashboard import create_app, main
from starlette.applications import Starlette
from starlette.routing import Mount

import ledger
from tests.actors import PATIENCE, Stage, eventually
from tests.dashboard_kit import (
    CHARGER,
    ROOT,
    SERVE,
    Server,
    copy_of,
    csrf_of,
    environment,
    keep_running,
    leave_doubt,
    serving,
    start_server,
    tell_story,
)

PACKAGE = ROOT / "dashboard" / "ledger_dashboard"
TOKEN = "a-long-random-token-of-a-test"
PAGES = ("/", "/calls", "/live", "/doubts")
HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A ledger with a story and two doubts, for tests that only look."""
    with Stage(tmp_path_factory.mktemp("told")) as stage:
        tell_story(stage)
        leave_doubt(stage)
        leave_doubt(stage, "LHR-JFK", "trip 9")
        yield stage


@pytest.fixture(scope="module")
def server(told: Stage) -> Iterator[Server]:
    """A dashboard of it."""
    with serving(told.db) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """Somebody new at that dashboard."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger of the test's own."""
    with Stage(tmp_path) as made:
        yield made


def calls_of(client: httpx.Client, **query: str) -> list[dict[str, Any]]:
    """The calls that the API gives for a filter."""
    found: list[dict[str, Any]] = client.get("/api/calls", params=query).json()["calls"]
    return found


# -- pages and the API --


def test_every_page_answers_with_html_and_strict_headers(client: httpx.Client) -> None:
    """Each page is HTML under a policy that allows no inline script, no frame and no other host."""
    call = calls_of(client)[0]["call"]
    for path in (*PAGES, f"/calls/{call}", f"/calls/{call[:9]}", "/nope", "/calls?since=bla"):
        answer = client.get(path, headers=HTML)
        policy = answer.headers["content-security-policy"]

        assert answer.headers["content-type"].startswith("text/html"), path
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "style-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        assert " style=" not in answer.text
        assert re.search(r"<script(?![^>]* src=)", answer.text) is None
        assert re.search(r"<[^>]*\son\w+=", answer.text) is None
        assert re.search(r"(src|href|action)=\"(?:https?:)?//", answer.text) is None


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nope", 404),
        ("/calls/ffffffffffff", 404),
        ("/calls/no-fingerprint", 404),
        ("/calls?since=bla", 400),
        ("/calls?status=bla", 400),
        ("/calls?cursor=bla", 400),
        ("/calls?search=" + "x" * 401, 400),
        ("/?since=2026-01-02&until=2026-01-01", 400),
        ("/?since=9999-12-31&until=0001-01-02", 400),
        ("/api/nope", 404),
        ("/api/calls/ffffffffffff", 404),
        ("/api/calls?limit=9999", 400),
        ("/api/events?after=-1", 400),
        ("/api/overview?since=100000d", 400),
    ],
)
def test_what_cannot_be_answered_says_so(client: httpx.Client, path: str, status: int) -> None:
    """An unknown key or a bad value gets its status, with what happened and what to do in the body."""
    answer = client.get(path, headers=HTML)

    assert status == answer.status_code
    if path.startswith("/api/"):
        assert {"error", "advice"} == set(answer.json())
    else:
        assert "<h1>" in answer.text


def test_head_is_answered_like_get(client: httpx.Client) -> None:
    """HEAD has the status and headers of GET, without a body, on pages, the API and the stream."""
    for path in (*PAGES, "/health", "/metrics", "/api/calls", "/api/stream", "/static/app.js"):
        answer = client.head(path)

        assert (200, b"") == (answer.status_code, answer.content), path


def test_the_overview_counts_what_happened(client: httpx.Client) -> None:
    """Sums, tools, workflows and the chart agree with what the processes did."""
    eventually(lambda: bool(client.get("/api/overview").json()["ready"]))
    found = client.get("/api/overview").json()

    assert 12 == found["total"]["blocked"]
    assert 26 == found["total"]["executed"]
    assert 2 == found["total"]["in_doubt"]
    assert {"executed": 26, "blocked": 12, "failed": 2} == found["range"]
    charge = next(tool for tool in found["tools"] if tool["name"] == "charge")
    assert (12, 12, 0.5) == (charge["executed"], charge["blocked"], charge["duplicate_rate"])
    assert charge["p95_seconds"] >= 0.002
    assert "nightly" in {row["wf"] for row in found["workflows"]}
    assert ">12</p>" in client.get("/").text


def test_filters_narrow_and_cursors_walk_on(client: httpx.Client) -> None:
    """Pages of five give every call once, and each filter gives what fits it."""
    walked: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = client.get("/api/calls", params={"limit": "5", "cursor": cursor}).json()
        walked += [call["call"] for call in page["calls"]]
        cursor = page["cursor"]

    assert 28 == len(walked) == len(set(walked))
    assert walked == [call["call"] for call in calls_of(client)]
    assert 12 == len(calls_of(client, tool="charge"))
    assert 1 == len(calls_of(client, status="failed"))
    assert 2 == len(calls_of(client, status="in_doubt"))
    assert 6 == len(calls_of(client, caller="planner", tool="charge"))
    assert 2 == len(calls_of(client, wf="order A-2003"))
    assert 1 == len(calls_of(client, search="customer11@"))
    assert [] == calls_of(client, until="1h")


def test_the_list_page_follows_its_cursor(stage: Stage) -> None:
    """More than fifty calls are paged, and the link to older ones leads to the rest."""
    stage.start("def touch(n): return n\nfor n in range(60): guard(touch, n)\nguard.close()\n").ends_well()
    with serving(stage.db) as server:
        first = httpx.get(f"{server.url}/calls").text
        link = re.search(r'href="(/calls\?cursor=[^"]+)" rel="next"', first)
        assert link is not None
        second = httpx.get(server.url + link.group(1)).text

    assert (50, 10) == (first.count('<tr id="c-'), second.count('<tr id="c-'))
    assert set(re.findall(r'id="c-(\w+)"', first)).isdisjoint(re.findall(r'id="c-(\w+)"', second))


def test_an_htmx_request_gets_the_fragment_alone(client: httpx.Client) -> None:
    """What patches an open page is the list, without the frame around it."""
    fragment = client.get("/calls", headers={**HTML, "HX-Request": "true"})

    assert "<html" not in fragment.text
    assert 28 == fragment.text.count('<tr id="c-')
    assert "2" == fragment.headers["x-ledger-doubts"]
    assert {"error", "advice"} == set(
        client.get("/calls?since=x", headers={**HTML, "HX-Request": "true"}).json()
    )


def test_a_call_shows_its_runs_and_never_a_secret(client: httpx.Client) -> None:
    """The page of a call has arguments, result, runs, timeline and verdict; the secret argument is masked."""
    call = next(c for c in calls_of(client, tool="charge") if c["blocked"] == 2)
    html = client.get(f"/calls/{call['call']}").text
    found = client.get(f"/api/calls/{call['call'][:10]}").json()

    assert "sk-very-secret" not in html + json.dumps(found)
    assert "****" in html
    assert found["verdict"].startswith("would be blocked: run 1 succeeded")
    assert found["verdict"] in html.replace("&#34;", '"')
    assert ["claimed", "success", "blocked"] == [event["kind"] for event in found["events"]]
    assert 2 == found["events"][-1]["n"]


def test_a_failed_call_shows_its_traceback(client: httpx.Client) -> None:
    """The error and where it came from are on the page."""
    [call] = calls_of(client, status="failed")
    html = client.get(f"/calls/{call['call']}").text

    assert "550 mailbox bounce@example.com is unavailable" in html
    assert "Traceback (most recent call last)" in html


def test_a_huge_value_is_shown_in_part(stage: Stage) -> None:
    """Long texts, long lists and deep nesting are cut in the page, which says so; the API has all."""
    stage.start(
        """
def keep(text, items, deep): return text
deep = []
for _ in range(150):
    deep = [deep]
guard(keep, "x" * 100_000, list(range(5_000)), deep)
guard.close()
"""
    ).ends_well()
    with serving(stage.db) as server, httpx.Client(base_url=server.url) as client:
        [call] = calls_of(client)
        html = client.get(f"/calls/{call['call']}").text
        listed = client.get("/calls").text

    assert 5_000 == len(call["args"]["items"])
    assert len(html) < 300_000
    assert len(listed) < 20_000
    assert "92,000 more characters" in html
    assert "4,800 more" in html
    assert "nested too deeply" in html


def test_csv_has_all_calls_and_no_formula(stage: Stage) -> None:
    """The export is a table of every call of the filter, and a cell that begins like a formula is defused."""
    stage.start(
        'def touch(n): return n\nwith guard.workflow("=cmd()"):\n    guard(touch, 1)\nguard.close()\n'
    ).ends_well()
    with serving(stage.db) as server:
        answer = httpx.get(f"{server.url}/api/calls.csv")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        none = httpx.get(f"{server.url}/api/calls.csv?tool=nothing").text

    assert answer.headers["content-type"].startswith("text/csv")
    assert ["'=cmd()"] == [row["wf"] for row in rows]
    assert 1 == len(none.splitlines())


def schema_errors(value: Any, schema: dict[str, Any], whole: dict[str, Any], where: str) -> list[str]:
    """Where a value lacks what its schema requires, or has a field that it does not know."""
    if "$ref" in schema:
        return schema_errors(
            value, whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole, where
        )
    if "allOf" in schema:
        parts = [
            whole["components"]["schemas"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
            for part in schema["allOf"]
        ]
        merged: dict[str, Any] = {"type": "object", "required": [], "properties": {}}
        for part in parts:
            merged["required"] = [*merged["required"], *part["required"]]
            merged["properties"] = {**merged["properties"], **part["properties"]}
        return schema_errors(value, merged, whole, where)
    kinds = schema.get("type")
    if isinstance(kinds, list) and value is None:
        return []
    kind = kinds[0] if isinstance(kinds, list) else kinds
    types: dict[Any, Any] = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    }  # fmt: skip
    if kind is not None and not isinstance(value, types[kind]):
        return [f"{where} is no {kind}: {value!r}"]
    found: list[str] = []
    if kind == "object" and "properties" in schema:
        found += [f"{where}.{name} is missing" for name in schema["required"] if name not in value]
        found += [f"{where}.{name} is not described" for name in value if name not in schema["properties"]]
        for name, part in value.items():
            found += schema_errors(part, schema["properties"].get(name, {}), whole, f"{where}.{name}")
    if kind == "array":
        for part in value[:20]:
            found += schema_errors(part, schema["items"], whole, f"{where}[]")
    return found


ONE_TASK = ("/api/tasks/task", "/api/tasks/compound")


def test_the_api_is_what_its_openapi_file_says(client: httpx.Client) -> None:
    """Every API route is described, every answer has the fields that are, and the file is served."""
    from ledger_dashboard.app import ROUTES
    from starlette.routing import Route

    whole = client.get("/api/openapi.json").json()
    call = calls_of(client)[0]["call"]
    routes = {route.path for route in ROUTES if isinstance(route, Route) and route.path.startswith("/api/")}

    assert routes == set(whole["paths"])
    assert json.loads((PACKAGE / "openapi.json").read_text()) == whole
    for path, methods in whole["paths"].items():
        schema = (
            methods.get("get", {})
            .get("responses", {})
            .get("200", {})
            .get("content", {})
            .get("application/json")
        )
        if schema is not None and path not in ONE_TASK:  # there is none here
            answer = client.get(path.replace("{call}", call)).json()
            assert [] == schema_errors(answer, schema["schema"], whole, path)


# -- machines --


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    """Each metric has its help and type, labels are escaped, and the figures are those of the ledger."""
    eventually(lambda: "ledger_failed_total{" in client.get("/metrics").text)
    answer = client.get("/metrics")
    lines = answer.text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}

    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {name.partition("{")[0] for name in values} <= typed
    assert 1 == values["ledger_up"]
    assert 12 == values['ledger_blocked{tool="actor.charge"}']
    assert 12 == values['ledger_executed{tool="actor.charge"}']
    assert 1 == values['ledger_calls_failed{tool="actor.send_email"}']
    assert 0 == values['ledger_failed_total{tool="actor.send_email"}']
    assert 2 == values["ledger_runs_past_lease"]
    assert values["ledger_oldest_doubt_seconds"] > 0


def test_every_alert_uses_metrics_that_exist_and_says_what_to_do(client: httpx.Client) -> None:
    """The rules name no metric that is not served, and each has a summary and a description."""
    rules = (ROOT / "docs" / "alerts.yml").read_text()
    eventually(lambda: "ledger_failed_total{" in client.get("/metrics").text)
    served = set(re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE))
    code = "\n".join(line for line in rules.splitlines() if not line.strip().startswith("#"))

    assert set(re.findall(r"\bledger_[a-z_]+", code)) <= served
    alerts = code.split("- alert:")[1:]
    assert len(alerts) >= 5
    for alert in alerts:
        assert "expr:" in alert
        assert "summary:" in alert
        assert "description:" in alert


def test_health_says_why_not(stage: Stage) -> None:
    """While the file is gone /health is 503 with the reason and pages say what to do; both recover."""
    tell_story(stage)
    hidden = stage.db.with_suffix(".hidden")
    with serving(stage.db) as server, httpx.Client(base_url=server.url) as client:
        assert 200 == client.get("/health").status_code
        stage.db.rename(hidden)
        health, page = client.get("/health"), client.get("/calls", headers=HTML)
        metrics, listed = client.get("/metrics").text, client.get("/api/calls")
        hidden.rename(stage.db)
        again = client.get("/calls", headers=HTML)

    assert (503, "unavailable") == (health.status_code, health.json()["status"])
    assert "there is no ledger at" in health.json()["reason"]
    assert 503 == page.status_code == listed.status_code
    assert '<meta http-equiv="refresh"' in page.text
    assert "here is no ledger at" in page.text
    assert "ledger_up 0" in metrics
    assert 200 == again.status_code


def test_a_file_that_was_replaced_is_shown_as_it_is_now(stage: Stage, tmp_path: Path) -> None:
    """After a restore the pages show the new file, though SQLite would read on in the old one."""
    tell_story(stage)
    other = tmp_path / "other"
    other.mkdir()
    with Stage(other) as second:
        leave_doubt(second)
        with serving(stage.db) as server, httpx.Client(base_url=server.url) as client:
            before = len(calls_of(client))
            for end in ("-wal", "-shm"):
                Path(f"{stage.db}{end}").unlink(missing_ok=True)
            copy_of(second.db).rename(stage.db)
            after = len(calls_of(client))

    assert (26, 1) == (before, after)


# -- who may ask --


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "localhost", "localhost:1", "127.0.0.1:1", ""]
)
def test_a_foreign_host_is_refused(client: httpx.Client, server: Server, host: str) -> None:
    """A name that was not bound, or another port, gets 400 and no data: DNS rebinding ends here."""
    port = server.url.rpartition(":")[2]
    for path in ("/", "/api/calls", "/metrics", "/health", "/static/app.js", "/api/stream"):
        answer = client.get(path, headers={"Host": host.format(port=port)})

        assert 400 == answer.status_code
        assert "charge" not in answer.text


def test_the_names_that_were_bound_are_served(client: httpx.Client, server: Server) -> None:
    """Loopback has three names."""
    port = server.url.rpartition(":")[2]
    for name in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]"):
        assert 200 == client.get("/health", headers={"Host": f"{name}:{port}"}).status_code


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_another_site_can_neither_read_nor_change(client: httpx.Client, headers: dict[str, str]) -> None:
    """Requests that another site makes are refused, with a CSRF token too, and no CORS header is given."""
    call = calls_of(client, status="in_doubt")[0]["call"]
    token = csrf_of(client)
    read = [client.get(path, headers=headers) for path in ("/api/calls", "/api/stream", "/")]
    change = client.post(f"/api/calls/{call}/resolve", json={"done": True}, headers={**headers, **token})

    assert [403] * 4 == [answer.status_code for answer in (*read, change)]
    assert not any(name.startswith("access-control") for answer in read for name in answer.headers)
    assert 2 == len(calls_of(client, status="in_doubt"))


def test_a_link_from_another_site_opens_a_page(client: httpx.Client) -> None:
    """Following a link is not reading."""
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}

    answer = client.get("/calls", headers=headers)

    assert 200 == answer.status_code
    assert "samesite=lax" in answer.headers["set-cookie"].lower()


def test_a_change_needs_the_csrf_token_of_its_visitor(client: httpx.Client, server: Server) -> None:
    """Without the token, with another's, or without the cookie, nothing is changed."""
    call = calls_of(client, status="in_doubt")[0]["call"]
    mine = csrf_of(client)
    with httpx.Client(base_url=server.url) as other:
        theirs = csrf_of(other)
    path = f"/api/calls/{call}/resolve"
    answers = [
        client.post(path, json={"done": True}),
        client.post(path, json={"done": True}, headers=theirs),
        client.post(path, json={"done": True}, headers={"X-CSRF-Token": ""}),
        httpx.post(server.url + path, json={"done": True}, headers=mine),
    ]

    assert [403] * 4 == [answer.status_code for answer in answers]
    assert "CSRF" in answers[0].json()["error"]
    assert 2 == len(calls_of(client, status="in_doubt"))


def test_a_body_must_be_small_json_of_known_fields(client: httpx.Client) -> None:
    """A form, garbage, unknown fields and a body without end are refused."""
    path = f"/api/calls/{calls_of(client, status='in_doubt')[0]['call']}/resolve"
    token = csrf_of(client)
    typed = {**token, "Content-Type": "application/json"}
    answers = [
        client.post(path, data={"done": "true"}, headers=token),
        client.post(path, content=b"{", headers=typed),
        client.post(path, content=b"[" * 100_000, headers=typed),
        client.post(path, json=["done"], headers=token),
        client.post(path, json={"done": "yes"}, headers=token),
        client.post(path, json={"done": True, "force": True}, headers=token),
        client.post(path, json={}, headers=token),
        client.post(path, json={"done": True, "result": "no json"}, headers=token),
        client.post(path, json={"done": False, "result": "1"}, headers=token),
        client.post(path, content=b'"' + b"x" * 300_000, headers=typed),
        client.get(path),
    ]

    assert [415, 400, 400, 400, 400, 400, 400, 400, 400, 413, 405] == [a.status_code for a in answers]
    assert 2 == len(calls_of(client, status="in_doubt"))


def test_a_person_decides_and_the_event_says_who_and_why(stage: Stage) -> None:
    """Done, not done and retry change the call and keep the note; they are refused with nothing to decide."""
    leave_doubt(stage, "A-B")
    leave_doubt(stage, "C-D")
    stage.start("def touch(n): return n\nguard(touch, 1)\nguard.close()\n").ends_well()
    running = keep_running(stage)
    with serving(stage.db) as server, httpx.Client(base_url=server.url) as client:
        token = csrf_of(client)
        first, second = (c["call"] for c in client.get("/api/doubts").json()["doubts"])
        [done] = calls_of(client, tool="touch")
        [alive] = calls_of(client, status="running")

        def post(call: str, act: str, **body: object) -> httpx.Response:
            return client.post(f"/api/calls/{call}/{act}", json=body, headers=token)

        yes = post(first, "resolve", done=True, note="it is in their books", result='{"pnr": "Q"}').json()
        no = post(second, "resolve", done=False).json()
        again = post(done["call"], "retry", note="wrong amount").json()
        refused = [
            post(first, "resolve", done=True), post(second, "retry"), post(alive["call"], "retry"),
            post(alive["call"], "resolve", done=True), post("ffff", "retry"),
        ]  # fmt: skip
        events = client.get(f"/api/calls/{first}").json()["events"]
        running.tell("go")
        running.ends_well()

    assert ("success", {"pnr": "Q"}) == (yes["call"]["status"], yes["call"]["result"])
    assert yes["verdict"].startswith("would be blocked")
    assert ("failed", True) == (no["call"]["status"], no["verdict"].startswith("would run"))
    assert again["verdict"].startswith("would run")
    assert [409, 409, 409, 409, 404] == [answer.status_code for answer in refused]
    assert "is running in" in refused[2].json()["error"]
    assert re.fullmatch(r"mark done by .+@.+ \(dashboard\): it is in their books", events[-1]["detail"])


def test_read_only_has_no_buttons_and_refuses_changes(told: Stage) -> None:
    """Nothing on the pages offers a change, and the routes behind answer 403."""
    with serving(told.db, "--read-only") as server, httpx.Client(base_url=server.url) as client:
        call = client.get("/api/doubts").json()["doubts"][0]["call"]
        html = client.get(f"/calls/{call}").text + client.get("/doubts").text
        answers = [
            client.post(f"/api/calls/{call}/resolve", json={"done": True}, headers=csrf)
            for csrf in ({}, {"X-CSRF-Token": ""})
        ]
        answers.append(client.post(f"/api/calls/{call}/retry", json={}))

    assert "data-act" not in html
    assert "<dialog" not in html
    assert "read-only" in html
    assert [403, 403, 403] == [answer.status_code for answer in answers]
    assert "read-only" in answers[0].json()["error"]
    assert not any("POST" in line for line in server.told)


def test_a_token_is_asked_for_and_changed_for_a_cookie(told: Stage) -> None:
    """Strangers get 401; the first visit with it gets a strict cookie without it, and a clean URL."""
    with serving(told.db, "--token", TOKEN) as server, httpx.Client(base_url=server.url) as client:
        strangers = [client.get(path) for path in (*PAGES, "/api/calls", "/api/stream", "/metrics")]
        wrong = client.get("/?token=wrong")
        health = client.get("/health")
        welcome = client.get(f"/calls?tool=charge&token={TOKEN}")
        cookie = welcome.headers["set-cookie"]
        inside = client.get("/calls?tool=charge")
        bearer = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        bad = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer wrong"})
        evil = client.get(f"//evil.example/x?token={TOKEN}")

    assert [401] * 7 == [answer.status_code for answer in strangers]
    assert all("charge" not in answer.text for answer in strangers)
    assert 401 == wrong.status_code
    assert (200, {"status": "ok"}) == (health.status_code, health.json())
    assert (303, "/calls?tool=charge") == (welcome.status_code, welcome.headers["location"])
    assert TOKEN not in cookie
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert (200, 200, 401) == (inside.status_code, bearer.status_code, bad.status_code)
    assert not evil.headers.get("location", "/").startswith("//")
    assert not any(TOKEN in line for line in server.told)


def test_bearer_may_change_without_a_csrf_token(stage: Stage) -> None:
    """A program that sends the token in a header is no browser that was tricked."""
    leave_doubt(stage)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(stage.db, "--token", TOKEN) as server,
        httpx.Client(base_url=server.url, headers=headers) as client,
    ):
        call = client.get("/api/doubts").json()["doubts"][0]["call"]
        answer = client.post(f"/api/calls/{call}/resolve", json={"done": False})

    assert (200, "failed") == (answer.status_code, answer.json()["call"]["status"])


# -- the stream --


def test_the_stream_tells_each_event_once_and_goes_on_where_it_was(stage: Stage) -> None:
    """What another process does arrives in order, and a browser that comes back misses nothing."""
    tell_story(stage)
    charger = stage.start(CHARGER)
    assert charger.line() == "ready"

    def charge(order: str) -> None:
        charger.tell(order)
        assert charger.line() == "done"

    with serving(stage.db) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("GET", "/api/stream?tool=charge") as answer:
            heard = listen(answer)
            assert ("hello", []) == next(heard)[:2]
            charge("live-1")
            kinds = [event["kind"] for event in next(heard)[1]]
            while len(kinds) < 2:
                kinds += [event["kind"] for event in next(heard)[1]]
        newest = client.get("/api/events").json()["last"]
        charge("live-2")
        with client.stream("GET", "/api/stream", headers={"Last-Event-ID": str(newest)}) as answer:
            heard = listen(answer)
            next(heard)
            kind, missed, seq = next(heard)
    charger.tell("")
    charger.ends_well()

    assert ["claimed", "success"] == kinds
    assert ("events", ["claimed", "success"]) == (kind, [event["kind"] for event in missed])
    assert newest + 2 == seq


def listen(answer: httpx.Response) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    """Kind, events and number of each message."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            data = json.loads(fields["data"])
            yield fields["event"], data if isinstance(data, list) else [], int(fields.get("id", "0"))
            fields = {}


def test_it_stops_at_once_with_streams_open(told: Stage) -> None:
    """SIGTERM ends the server within seconds although pages are listening."""
    server = start_server(told.db)
    begun, ended = threading.Event(), threading.Event()

    def hang() -> None:
        with (
            suppress(httpx.HTTPError),
            httpx.stream("GET", f"{server.url}/api/stream", timeout=PATIENCE) as answer,
        ):
            for _ in answer.iter_lines():
                begun.set()
        ended.set()

    threads = [threading.Thread(target=hang, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(PATIENCE)
    seconds = server.stop(signal.SIGTERM)
    server.process.communicate()

    assert seconds < 5
    assert ended.wait(PATIENCE)


def test_an_open_page_lets_the_log_shrink(stage: Stage) -> None:
    """A checkpoint can empty the write-ahead log while pages and streams are open: no read is held."""
    import sqlite3

    tell_story(stage)
    with serving(stage.db) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for path in PAGES:
            client.get(path)
        with client.stream("GET", "/api/stream") as answer:
            next(listen(answer))
            db = sqlite3.connect(stage.db)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('test', 1)")
            db.commit()
            found = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            db.close()

    assert (0, 0, 0) == found


# -- the command and the factory --


def test_mounted_under_a_prefix_all_links_stay_there(told: Stage) -> None:
    """Inside another application every link and cookie stays under the prefix, without its lifespan."""
    app = Starlette(routes=[Mount("/inner/ledger", create_app(told.db, read_only=True))])

    async def visit() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/", "/calls", "/live", "/doubts", "/api/overview", "/static/app.js", "/nope", "/health")
            return [await client.get(f"/inner/ledger{path}", headers=HTML) for path in paths]

    answers = asyncio.run(visit())
    links = re.findall(
        r'(?:href|src|action|data-stream|hx-get)="([^"#?]+)', "".join(a.text for a in answers[:4])
    )

    assert [200, 200, 200, 200, 200, 200, 404, 200] == [answer.status_code for answer in answers]
    assert links
    assert [] == [link for link in links if not link.startswith("/inner/ledger/")]
    assert "path=/inner/ledger" in answers[0].headers["set-cookie"].lower()
    assert '/inner/ledger/static/style.css"' in answers[6].text


def test_two_apps_share_nothing(told: Stage, tmp_path: Path) -> None:
    """Two ledgers in one process are shown apart: there is no state in the module."""
    with Stage(tmp_path) as other:
        leave_doubt(other)

        async def count(db: Path) -> int:
            transport = httpx.ASGITransport(app=create_app(db))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return len((await client.get("/api/calls")).json()["calls"])

        assert (28, 1) == (asyncio.run(count(told.db)), asyncio.run(count(other.db)))


def run_command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command, which must end by itself."""
    start = code or SERVE
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment(),
    )  # fmt: skip


def test_the_command_says_which_routes_change_state(server: Server) -> None:
    """At start it tells the address and what can be changed there."""
    assert server.told[0].startswith("The ledger is shown at http://localhost:")
    assert "POST /api/calls/{call}/retry" in "\n".join(server.told)
    assert "POST /api/calls/{call}/resolve" in "\n".join(server.told)


def test_the_command_has_help() -> None:
    """Each option is explained, in help and README."""
    done = run_command("--help")
    options = set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}
    readme = (ROOT / "dashboard" / "README.md").read_text()

    assert 0 == done.returncode
    assert {"--port", "--host", "--open", "--read-only", "--token", "--allowed-host"} == options
    assert [] == [option for option in options if option not in readme]


def test_another_bind_needs_a_token(told: Stage) -> None:
    """A host that other machines reach is refused without a token, and with an empty one."""
    everywhere = "0.0.0.0"  # noqa: S104 - refused
    for arguments in (("--host", everywhere), ("--host", "::", "--token", " "), ("--token", "")):
        done = run_command(str(told.db), *arguments)

        assert 2 == done.returncode
        assert "--token" in done.stderr
        assert "" == done.stdout


def test_a_missing_ledger_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    """A path with nothing behind it, or with something else, ends with words and exit code 1."""
    (tmp_path / "text.db").write_text("no database " * 100)
    for name in ("none.db", "text.db"):
        done = run_command(str(tmp_path / name))

        assert 1 == done.returncode
        assert done.stderr.startswith("ledger-dashboard: ")
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "none.db").exists()


def test_a_port_that_is_taken_is_told(told: Stage) -> None:
    """The error names host and port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_command(str(told.db), "--port", port)

    assert 1 == done.returncode
    assert f"127.0.0.1 port {port}" in done.stderr
    assert "--port" in done.stderr


def test_a_missing_extra_is_named(told: Stage) -> None:
    """Without what the extra installs, the command says which one to install."""
    hide = "import sys; sys.modules['starlette'] = None\nfrom ledger_dashboard import main; sys.exit(main())"
    done = run_command(str(told.db), code=hide)

    assert 1 == done.returncode
    assert 'pip install "ledger-guard[dashboard]"' in done.stderr
    assert "" == done.stdout


def test_a_fault_of_ours_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another module that cannot be imported is an error with its own name, not an advice to install."""
    monkeypatch.setitem(sys.modules, "ledger_dashboard.cli", None)

    with pytest.raises(ModuleNotFoundError, match="ledger_dashboard"):
        main([])


def test_the_package_ships_what_it_serves() -> None:
    """Static files are small, have their licences, and refer to no other host."""
    static = PACKAGE / "static"
    files = [path for path in static.rglob("*") if path.is_file()]

    assert {"htmx.LICENSE", "uPlot.LICENSE"} <= {path.name for path in files}
    assert [] == [path.name for path in files if path.stat().st_size > 200_000]
    for path in (static / "app.js", static / "style.css"):
        assert re.search(r"https?://(?!localhost)", path.read_text()) is None
    assert (
        re.search(r"\binnerHTML\b|\beval\b|document\.write|outerHTML", (static / "app.js").read_text())
        is None
    )


def test_version_and_time_are_the_servers(client: httpx.Client) -> None:
    """The footer has the version."""
    assert f"Ledger {ledger.__version__}" in client.get("/").text


def test_it_can_be_asked_before_anything_happened(stage: Stage) -> None:
    """A ledger without a call has pages that help, and an API that gives nothing."""
    stage.start("guard.stats()\nguard.check()\nguard.close()\n").ends_well()
    with serving(stage.db) as server, httpx.Client(base_url=server.url) as client:
        texts = [client.get(path).text for path in PAGES]
        calls = client.get("/api/calls").json()
        overview = client.get("/api/overview").json()

    assert "No calls yet" in texts[0]
    assert "No calls yet" in texts[1]
    assert "Nothing has happened yet" in texts[2]
    assert "Nothing is in doubt" in texts[3]
    assert ([], None, True) == (calls["calls"], calls["cursor"], calls["complete"])
    assert 0 == overview["total"]["attempts"]


def test_environment_names_the_ledger_and_the_token(told: Stage) -> None:
    """LEDGER_DB and LEDGER_DASHBOARD_TOKEN stand for the argument and the option."""
    env = {**environment(), "LEDGER_DB": str(told.db), "LEDGER_DASHBOARD_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        url = first.split()[-1].rstrip("/")
        status = eventually_get(url)
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)

    assert 401 == status
    assert code == 0
    assert os.path.basename(told.db) not in first  # noqa: PTH119 - a plain name


def eventually_get(url: str) -> int:
    """The status, as soon as somebody answers."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            return httpx.get(url).status_code
        except httpx.TransportError:
            assert time.monotonic() < limit
            time.sleep(0.05)
