"""The dashboard's tasks over HTTP: what is shown, bounded however many there are, and who may decide."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from ledger_dashboard import create_app
from starlette.testclient import TestClient

from ledger_tasks import Dep, Task, TaskLedger, TaskState, WorkerInfo
from tests.actors import PATIENCE, eventually
from tests.dashboard_kit import Server, csrf_of, serving
from tests.stores.dynamo_kit import dynamo_url
from tests.stores.redis_kit import RedisServer
from tests.tasks.dash_kit import begun, fill, guarding, tell_of_tasks
from tests.test_dashboard_http import listen, schema_errors

HTML = {"Accept": "text/html"}
PAGES = ("/tasks", "/tasks/tree", "/tasks/graph", "/tasks/agents", "/tasks/workers", "/tasks/dead")
APIS = ("/api/tasks", "/api/tasks/tree", "/api/tasks/graph", "/api/tasks/agents", "/api/tasks/workers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dashboard of a ledger with tasks, for tests that only look."""
    db = tmp_path_factory.mktemp("tasks") / "ledger.db"
    tell_of_tasks(db)
    with serving(db) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """Somebody new at that dashboard."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a test keeps a ledger of its own."""
    return tmp_path / "ledger.db"


def visitor(db: Path, **options: Any) -> TestClient:
    """Somebody at a dashboard in this process."""
    return TestClient(create_app(db, **options), base_url="http://localhost", raise_server_exceptions=False)


def ids_of(client: httpx.Client | TestClient, **query: str) -> list[str]:
    """The tasks that the API lists for a filter."""
    return [task["id"] for task in client.get("/api/tasks", params=query).json()["tasks"]]


# -- looking --


def test_every_page_is_html_without_a_script_of_its_own(client: httpx.Client) -> None:
    """Each page of tasks comes under the strict policy, without inline script, style or foreign address."""
    for path in (*PAGES, "/tasks/task?id=report.2", "/tasks/graph?id=report&session=main"):
        answer = client.get(path, headers=HTML)

        assert 200 == answer.status_code, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "no-store" == answer.headers["cache-control"]
        assert " style=" not in answer.text
        assert re.search(r"<script(?![^>]* src=)|<[^>]*\son\w+=", answer.text) is None
        assert re.search(r"(src|href|action)=\"(?:https?:)?//", answer.text) is None


def test_the_api_of_tasks_is_what_its_openapi_file_says(client: httpx.Client) -> None:
    """Every answer has the fields that are described, and no others."""
    whole = client.get("/api/openapi.json").json()
    for path in (*APIS, "/api/tasks/task"):
        answer = client.get(
            path, params={"id": "report.2"} if path.endswith("/task") else {"session": "main"}
        )
        schema = whole["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]

        assert 200 == answer.status_code
        assert [] == schema_errors(answer.json(), schema, whole, path)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"session": "other"}, ["lonely"]),
        ({"state": "dead"}, ["feed"]),
        ({"state": "failed", "session": "main"}, ["backup"]),
        ({"state": "unended", "type": "review"}, ["refund"]),
        ({"type": "tool"}, ["backup", "feed"]),
        ({"agent": "bob"}, ["report.2", "backup"]),
        ({"parent": "report", "session": "main"}, ["report.3", "report.2", "report.1"]),
        ({"text": "quarterly"}, ["report"]),
        ({"text": "read-only DISK"}, ["backup"]),
        ({"text": "s3://figures"}, ["report.2"]),
        ({"text": "max_retries"}, []),
        ({"text": "100%"}, []),
    ],
    ids=str,
)
def test_a_filter_narrows(client: httpx.Client, query: dict[str, str], expected: list[str]) -> None:
    """Session, state, type, agent, parent and a text in its values choose which tasks are listed."""
    assert expected == ids_of(client, **query)


def test_cursors_walk_through_every_task_once(client: httpx.Client) -> None:
    """Pages of two, of all sessions and of one by state, give each task once and end."""
    for query in ({}, {"session": "main"}, {"state": "skipped"}, {"state": "unended", "session": "main"}):
        walked: list[str] = []
        cursor: int | None = 0
        while cursor is not None:
            page = client.get("/api/tasks", params={"limit": "2", "cursor": str(cursor), **query}).json()
            walked += [task["id"] for task in page["tasks"]]
            cursor = page["cursor"]

        assert walked == ids_of(client, **query)
        assert len(walked) == len(set(walked))
    assert 11 == len(ids_of(client))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/tasks/task?id=nobody", 404),
        ("/tasks/task?id=lonely", 404),
        ("/tasks/tree?id=nobody&session=main", 404),
        ("/tasks/graph?id=nobody&session=main", 404),
        ("/tasks/task", 400),
        ("/tasks?state=asleep", 400),
        ("/tasks?cursor=-1", 400),
        ("/tasks?text=" + "x" * 401, 400),
        ("/tasks/agents?since=never", 400),
        ("/tasks/tree/elsewhere", 404),
        ("/api/tasks/task?id=nobody", 404),
        ("/api/tasks/task", 400),
        ("/api/tasks?limit=501", 400),
        ("/api/tasks/graph?id=nobody", 404),
    ],
)
def test_what_cannot_be_shown_says_so(client: httpx.Client, path: str, status: int) -> None:
    """An id that is not there, or a value that is none, gets its status and what to do."""
    answer = client.get(path, headers=HTML)

    assert status == answer.status_code
    if path.startswith("/api/"):
        assert {"error", "advice"} == set(answer.json())
    else:
        assert "<h1>" in answer.text


def test_one_task_shows_all_that_is_kept(client: httpx.Client) -> None:
    """Events, errors, checkpoint, artifacts, result, dependencies and the guarded calls of its workflow."""
    page = client.get("/tasks/task?id=report.2").text
    found = client.get("/api/tasks/task?id=report.2").json()
    dead = client.get("/tasks/task?id=feed").text
    done = client.get("/api/tasks/task?id=report.1").json()

    for words in ("reading page 3", "page-1.json", "s3://figures/1", "Quarterly report", "fetch"):
        assert words in page, words
    assert 'href="/calls?wf=task%3Areport.2"' in page
    assert ["artifact", "checkpoint", "progress", "moved", "moved", "created"] == [
        event["kind"] for event in found["events"]
    ]
    assert [("report", "fail")] == [(task["id"], task["on_failure"]) for task in found["blocks"]]
    assert ({"page": 3}, 1) == (found["task"]["checkpoint"], len(found["calls"]))
    assert {"rows": 120} == done["task"]["result"]
    assert 2 <= dead.count("TimeoutError: no answer")
    assert "1 of 1" in dead


def test_events_of_a_task_are_paged(db: Path) -> None:
    """The newest hundred stand on the page, with a link to the earlier ones; none is missing."""
    tasks = TaskLedger(db, agent="ann")
    tasks.add_task("long")
    claim = begun(tasks, "long", "ann")
    for n in range(150):
        tasks.progress(claim, n / 150)
    tasks.close()
    with visitor(db) as client:
        page = client.get("/tasks/task?id=long").text
        link = re.search(r'href="(/tasks/task\?[^"]*before=\d+)"', page)
        assert link is not None
        older = client.get(link.group(1).replace("&amp;", "&")).text

    assert "53 earlier" in page
    seen = [re.findall(r'<li id="e-(\d+)"', text) for text in (page, older)]
    assert [100, 53] == list(map(len, seen))
    assert set(seen[0]).isdisjoint(seen[1])


def test_a_tree_sums_up_its_parts(client: httpx.Client) -> None:
    """A task with parts has their progress on the average, and how many are done."""
    found = client.get("/api/tasks/tree", params={"session": "main"}).json()
    told = [(twig["level"], twig["task"]["id"], round(twig["progress"], 2)) for twig in found["tree"]]

    assert [(0, "report", 0.5), (1, "report.1", 1.0), (1, "report.2", 0.5), (1, "report.3", 0.0)] == told
    assert (3, 1, 0) == tuple(found["tree"][0][name] for name in ("parts", "done", "hidden"))


def test_a_deep_and_a_wide_tree_are_cut_and_say_how_much(db: Path) -> None:
    """Of 400 levels and of a thousand parts so many are shown as a page can hold; the others are counted."""
    tasks = TaskLedger(db)
    tasks.add_tasks([Task(f"d{n:03}", parent=f"d{n - 1:03}" if n else "") for n in range(400)])
    tasks.add_tasks([Task("a-wide"), *(Task(f"w{n}", parent="a-wide") for n in range(1000))])
    tasks.close()
    with visitor(db) as client:
        deep = client.get("/api/tasks/tree?session=main&id=d000").json()["tree"]
        wide = client.get("/api/tasks/tree?session=main&id=a-wide").json()["tree"]
        both = client.get("/tasks/tree?session=main").text

    assert (300, 299, 1) == (len(deep), deep[-1]["level"], deep[-1]["hidden"])
    assert (51, 1000, 950) == (len(wide), wide[0]["parts"], wide[0]["hidden"])
    assert "950 more parts" in both
    assert both.count("<li ") <= 300


def test_a_graph_puts_each_task_after_what_it_depends_on(client: httpx.Client) -> None:
    """Columns grow along every dependency; the picture around a task has its neighbours and no strangers."""
    found = client.get("/api/tasks/graph", params={"session": "main"}).json()
    column = {task["num"]: task["column"] for task in found["tasks"]}
    around = client.get("/api/tasks/graph", params={"session": "main", "id": "feed"}).json()

    assert 6 == len(found["links"])
    assert all(column[link["on"]] < column[link["task"]] for link in found["links"])
    assert {"refund", "backup"}.isdisjoint(task["id"] for task in found["tasks"])
    assert {"feed", "prices"} == {task["id"] for task in around["tasks"]}
    assert "3 more in this session" not in client.get("/tasks/graph?session=main&id=feed").text


def test_a_graph_of_many_is_cut_and_says_so(db: Path) -> None:
    """Of a long chain and a wide fan two hundred tasks are drawn, and the page counts the rest."""
    tasks = TaskLedger(db)
    tasks.add_tasks(Task(f"c{n}", depends_on=(Dep(f"c{n - 1}"),) if n else ()) for n in range(1000))
    tasks.add_tasks([Task("hub"), *(Task(f"f{n}", depends_on=(Dep("hub"),)) for n in range(1000))])
    tasks.close()
    with visitor(db) as client:
        all_ = client.get("/api/tasks/graph?session=main").json()
        hub = client.get("/api/tasks/graph?session=main&id=hub").json()
        chain = client.get("/api/tasks/graph?session=main&id=c500").json()
        page = client.get("/tasks/graph?session=main").text

    assert (200, True) == (len(all_["tasks"]), all_["cut"])
    assert hub["cut"]
    assert 200 >= len(hub["tasks"])
    assert (200, 199, True) == (len(chain["tasks"]), max(t["column"] for t in chain["tasks"]), chain["cut"])
    assert "c500" in {task["id"] for task in chain["tasks"]}
    assert "1,801 more in this session are not drawn" in page


def test_the_timeline_has_what_each_agent_did(client: httpx.Client) -> None:
    """Bars for what was held, with what came after; who has something now comes first."""
    found = client.get("/api/tasks/agents", params={"session": "main"}).json()
    agents = {agent["agent"]: agent for agent in found["agents"]}

    assert {"ann", "bob", "clerk"} == set(agents)
    assert ("ann", 1, 2, 0) == tuple(
        found["agents"][-1][name] for name in ("agent", "done", "failed", "held")
    )
    assert [("report.1", "assigned", "active"), ("report.1", "active", "done")] == [
        (bar["id"], bar["state"], bar["then"]) for bar in agents["ann"]["bars"][:2]
    ]
    assert [("refund", "paused", None)] == [
        (bar["id"], bar["state"], bar["end"]) for bar in agents["clerk"]["bars"] if bar["end"] is None
    ]
    assert found["complete"]


def test_workers_are_shown_with_what_they_are_doing(db: Path) -> None:
    """Alive, silent or ended, by session; what one does that has died is nobody's, and no guess is shown."""
    tell_of_tasks(db)
    tasks = TaskLedger(db)
    tasks.in_session("other").beat(WorkerInfo("w-3", "carl", "vm3", 1, ("mail",), 8))
    tasks.beat(WorkerInfo("w-4", "bob", "vm0", 2, ("*",), 1))
    fall_silent(db, "w-4")
    with visitor(db) as client:
        found = client.get("/api/tasks/workers").json()
        main = client.get("/api/tasks/workers?session=main").json()["workers"]
        page = client.get("/tasks/workers").text
    tasks.close()

    told = [(one["agent"], one["session"], one["alive"], one["ended"]) for one in found["workers"]]
    assert [("bob", "main", True, False), ("carl", "other", True, False)] == told[:2]
    assert {("ann", "main", False, True), ("bob", "main", False, False)} == set(told[2:])
    assert not found["cut"]
    assert [("report.2", "reading page 3", 0.5)] == [
        (task["id"], task["stage"], task["progress"]) for task in main[0]["doing"]
    ]
    assert (0.75, None) == (found["workers"][0]["success_rate"], found["workers"][1]["success_rate"])
    assert [["report.2"], [], []] == [[task["id"] for task in one["doing"]] for one in main]
    assert "silent</span> <a" in page
    assert "75.0 %" in page
    assert "reading page 3" in page
    assert "process 4711 on vm1" in page


def fall_silent(db: Path, worker: str) -> None:
    """Let a worker have said its last word an hour ago."""
    with closing(sqlite3.connect(db)) as file, file:
        [(about,)] = file.execute("SELECT about FROM task_workers WHERE id = ?", (worker,))
        found = json.loads(about)
        hour_ago = datetime.fromisoformat(found["seen_at"]) - timedelta(hours=1)
        found["seen_at"] = hour_ago.isoformat()
        file.execute("UPDATE task_workers SET about = ? WHERE id = ?", (json.dumps(found), worker))


def test_a_hundred_workers_are_shown_and_that_there_are_more(db: Path) -> None:
    """The page stays small however many were seen."""
    tasks = TaskLedger(db, quiet=True)
    tasks.add_task("a")
    for number in range(101):
        tasks.beat(
            WorkerInfo(f"w-{number}", f"agent {number}", "vm", number, ("*",), 1, ended=number % 2 > 0)
        )
    tasks.close()
    with visitor(db) as client:
        found, page = client.get("/api/tasks/workers").json(), client.get("/tasks/workers").text

    assert (100, True) == (len(found["workers"]), found["cut"])
    assert "there are more" in page
    assert len(page) < 150_000


def test_a_hundred_thousand_tasks_are_looked_at_in_part(db: Path) -> None:
    """Pages stay small; a search ends after a moment, and going on finds what is far back."""
    tell_of_tasks(db)
    fill(db, 100_000)
    with visitor(db) as client:
        sizes = {path: len(client.get(path).content) for path in PAGES}
        counts = client.get("/api/tasks").json()["counts"]
        dead = ids_of(client, state="dead")
        # the name of a field is in every record and in no value, so that each has to be read
        first = client.get("/api/tasks?text=max_retries").json()
        page = client.get("/tasks?text=max_retries").text
        found = client.get("/api/tasks?text=quarterly").json()
        while not found["tasks"] and found["cursor"]:
            found = client.get(f"/api/tasks?text=quarterly&cursor={found['cursor']}").json()

    assert max(sizes.values()) < 120_000, sizes
    assert 100_001 + 5 == counts["pending"]
    assert ["feed"] == dead
    assert ([], False, True) == (first["tasks"], first["complete"], 0 < first["cursor"] < 100_000)
    assert ["report"] == [task["id"] for task in found["tasks"]]
    assert "Go on from there" in page


def test_a_huge_record_does_not_swell_a_list(db: Path) -> None:
    """A task with megabytes in its result is listed by its id; its own page shows the beginning of it."""
    tasks = TaskLedger(db, agent="ann")
    tasks.add_task("big", title="Big one")
    tasks.complete(begun(tasks, "big", "ann"), result="x" * 2_000_000)
    tasks.close()
    with visitor(db) as client:
        listed, shown = client.get("/tasks").text, client.get("/tasks/task?id=big").text

    assert "its record is too long for a list" in listed
    assert len(listed) < 30_000
    assert "more characters" in shown
    assert len(shown) < 60_000


# -- ledgers without tasks --


def test_a_ledger_without_tasks_says_how_to_begin_and_is_not_written_to(db: Path) -> None:
    """Every page explains the first steps, the API is empty, and looking has made no table."""
    with guarding(db):
        pass
    with visitor(db, read_only=True) as client:
        texts = [client.get(path).text for path in PAGES]
        empty = [client.get(path).json() for path in APIS]
        missing = client.get("/tasks/task?id=x").status_code, client.get("/api/tasks/task?id=x").status_code

    assert all("No tasks yet" in text and "add_tasks" in text for text in texts)
    assert [[], [], [], [], []] == [
        answer[name]
        for answer, name in zip(empty, ("tasks", "tree", "tasks", "agents", "workers"), strict=True)
    ]
    assert (404, 404) == missing
    with closing(sqlite3.connect(db)) as file:
        assert [] == file.execute("SELECT name FROM sqlite_master WHERE name LIKE 'task%'").fetchall()


def test_looking_at_tasks_never_writes(db: Path) -> None:
    """All pages of a ledger that cannot be written to, and that nobody else has open, are served."""
    tell_of_tasks(db)
    before = db.read_bytes()
    with visitor(db, read_only=True) as client:
        statuses = [client.get(path).status_code for path in (*PAGES, *APIS, "/tasks/task?id=feed")]

    assert {200} == set(statuses)
    assert before == db.read_bytes()


def test_a_store_that_keeps_no_tasks_says_so() -> None:
    """On DynamoDB the page names the stores that keep tasks; the API refuses, and calls are shown as ever."""
    address = dynamo_url()
    with guarding(address):
        pass
    with TestClient(create_app(address), base_url="http://localhost") as client:
        pages = [client.get(path).text for path in PAGES]
        api, task = client.get("/api/tasks"), client.get("/tasks/task?id=x", headers=HTML)
        stream = client.get("/calls").status_code

    assert all("This store keeps no tasks" in page for page in pages)
    assert (400, 400, 200) == (api.status_code, task.status_code, stream)
    assert "keeps no tasks" in api.json()["error"]


def test_tasks_on_redis_are_shown_and_decided_about() -> None:
    """Every page and API of tasks is served as from a file, and what a person decides is done."""
    server = RedisServer()
    try:
        tell_of_tasks(server.url)
        with TestClient(create_app(server.url), base_url="http://localhost") as client:
            statuses = [client.get(path).status_code for path in (*PAGES, *APIS, "/tasks/task?id=feed")]
            listed = ids_of(client, session="main")
            answer = post(client, "retry", id="feed", reason="it is back")
    finally:
        server.close()

    assert {200} == set(statuses)
    assert {"report", "feed", "refund", "report.2"} <= set(listed)
    assert 200 == answer.status_code, answer.text


# -- deciding --


def post(
    client: httpx.Client | TestClient, act: str, headers: dict[str, str] | None = None, **body: Any
) -> Any:
    """What the server says to a decision of a page of this visitor."""
    sent = csrf_of(client) if headers is None else headers
    return client.post(f"/api/tasks/task/{act}", json=body, headers=sent)


def test_a_dead_task_is_retried_for_a_reason(db: Path) -> None:
    """Without a reason it is refused; with one it is pending again, and the event says who and why."""
    tell_of_tasks(db)
    with visitor(db) as client:
        refused = post(client, "retry", id="feed")
        again = post(client, "retry", id="feed", session="main", reason="the feed is back")
        twice = post(client, "retry", id="feed", reason="the feed is back")
        event = client.get("/api/tasks/task?id=feed").json()["events"][0]

    assert (409, True) == (refused.status_code, "reason" in refused.json()["advice"])
    assert (200, "pending", 0) == (
        again.status_code,
        again.json()["task"]["state"],
        again.json()["task"]["retries"],
    )
    assert (200, again.json()["task"]["version"]) == (twice.status_code, twice.json()["task"]["version"])
    assert ("moved", "the feed is back", "dashboard") == (
        event["kind"],
        event["data"]["why"],
        event["source"],
    )
    assert event["actor"].endswith("(dashboard)")


def test_a_retry_may_let_everything_run_anew(db: Path) -> None:
    """With `fresh` its tools have a workflow of their own; the page names the scope, the payload is shown."""
    tell_of_tasks(db)
    with visitor(db) as client:
        odd = post(client, "retry", id="backup", reason="a new disk", fresh="yes")
        again = post(client, "retry", id="backup", reason="a new disk", fresh=True)
        page = client.get("/tasks/task?id=backup").text

    assert (400, 200) == (odd.status_code, again.status_code)
    assert 1 == again.json()["task"]["scope"]
    assert "task:backup#1" in page
    assert "so often its tools were let run anew" in page
    assert "Payload</h2>" in page


@pytest.mark.parametrize("dependents", [False, True])
def test_a_task_is_cancelled_with_or_without_what_depends_on_it(db: Path, dependents: bool) -> None:
    """Its parts end with it; what waits for it is skipped, or cancelled too if that is asked for."""
    tell_of_tasks(db)
    with visitor(db) as client:
        answer = post(client, "cancel", id="report", reason="not needed", dependents=dependents)
        states = {task["id"]: task["state"] for task in client.get("/api/tasks?session=main").json()["tasks"]}

    assert (200, "cancelled") == (answer.status_code, answer.json()["task"]["state"])
    assert ("done", "cancelled", "cancelled") == tuple(states[f"report.{n}"] for n in (1, 2, 3))
    assert ("cancelled" if dependents else "skipped") == states["send"]
    assert ("cancelled" if dependents else "pending") == states["archive"]


def test_an_illegal_decision_is_refused_and_changes_nothing(db: Path) -> None:
    """Who cancels what is done, retries what runs, or names nobody gets words and finds all as it was."""
    tell_of_tasks(db)
    tasks = TaskLedger(db)
    last = tasks.last_seq()
    with visitor(db) as client:
        done, runs = post(client, "cancel", id="report.1"), post(client, "retry", id="report.2", reason="go")
        dead, nobody = post(client, "cancel", id="feed"), post(client, "cancel", id="nobody")
        elsewhere = post(client, "cancel", id="feed", session="other")
        later = post(client, "retry", id="prices", reason="go")

    assert [409, 409, 409, 404, 404, 409] == [
        answer.status_code for answer in (done, runs, dead, nobody, elsewhere, later)
    ]
    assert "task 'report.1' is DONE and cannot become CANCELLED" == done.json()["error"]
    assert done.json()["advice"].startswith("Nothing was changed")
    assert (last, TaskState.DONE) == (tasks.last_seq(), tasks.get("report.1").state)
    tasks.close()


def test_a_decision_about_a_ledger_without_tasks_makes_no_table(db: Path) -> None:
    """Somebody who posts an id to a ledger that has none is told so."""
    with guarding(db):
        pass
    with visitor(db) as client:
        answer = post(client, "cancel", id="x")

    assert 404 == answer.status_code
    with closing(sqlite3.connect(db)) as file:
        assert [] == file.execute("SELECT name FROM sqlite_master WHERE name LIKE 'task%'").fetchall()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_another_site_can_neither_read_nor_decide(client: httpx.Client, headers: dict[str, str]) -> None:
    """Requests of a foreign origin are refused, with a CSRF token too."""
    token = csrf_of(client)
    read = [client.get(path, headers=headers) for path in (*APIS, "/api/tasks/stream", "/tasks")]
    acts = [post(client, act, {**headers, **token}, id="feed", reason="x") for act in ("retry", "cancel")]

    assert {403} == {answer.status_code for answer in (*read, *acts)}
    assert ["feed"] == ids_of(client, state="dead")


def test_a_foreign_host_sees_no_task(client: httpx.Client) -> None:
    """A name that was not bound gets 400, and nothing of the tasks."""
    for path in (*PAGES, *APIS, "/api/tasks/stream", "/tasks/task?id=feed"):
        answer = client.get(path, headers={"Host": "evil.example"})

        assert 400 == answer.status_code
        assert "Quarterly" not in answer.text


def test_a_decision_needs_the_token_of_its_page_and_a_ledger_that_may_be_changed(db: Path) -> None:
    """Without a CSRF token, with a body that is none, or read-only, nothing is decided."""
    tell_of_tasks(db)
    with visitor(db) as client:
        token = csrf_of(client)
        bare = post(client, "cancel", {}, id="backup")
        bad = [
            post(client, "cancel", token, id="backup", dependents="yes"),
            post(client, "cancel", token, id="backup", force=True),
            post(client, "cancel", token, id=""),
            post(client, "retry", token, id="backup", reason="x" * 2001),
            client.post("/api/tasks/task/cancel", data={"id": "backup"}, headers=token),
            client.get("/api/tasks/task/cancel"),
        ]
        left = ids_of(client, state="failed")
    with visitor(db, read_only=True) as client:
        page = client.get("/tasks/dead").text
        refused = post(client, "cancel", {}, id="backup")

    assert (403, 403) == (bare.status_code, refused.status_code)
    assert [400, 400, 400, 409, 415, 405] == [answer.status_code for answer in bad]
    assert ["backup"] == left
    assert "data-act" not in page


# -- the stream --


def test_the_stream_of_tasks_tells_what_happens_and_goes_on_where_it_was(db: Path) -> None:
    """Events of a session arrive in order and in brief, and who comes back misses none."""
    tasks = TaskLedger(db, agent="ann")
    tasks.add_task("first")
    with serving(db) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("GET", "/api/tasks/stream?session=main") as answer:
            heard = listen(answer)
            assert ("hello", []) == next(heard)[:2]
            tasks.in_session("other").add_task("unheard")
            begun(tasks, "first", "ann")
            told: list[dict[str, Any]] = []
            while len(told) < 2:
                told += next(heard)[1]
        newest = tasks.last_seq()
        tasks.add_task("second")
        with client.stream("GET", "/api/tasks/stream", headers={"Last-Event-ID": str(newest)}) as answer:
            heard = listen(answer)
            next(heard)
            kind, missed, seq = next(heard)
    tasks.close()

    assert ["assigned", "active"] == [event["to_state"] for event in told]
    assert "data" not in told[0]
    assert ("events", ["second"], newest + 1) == (kind, [event["task"] for event in missed], seq)


def test_the_first_task_appears_on_a_stream_that_began_without_tables(db: Path) -> None:
    """A page that is open before there are tasks hears of the first."""
    with guarding(db):
        pass
    tasks = TaskLedger(db, agent="ann")
    with serving(db) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        with client.stream("GET", "/api/tasks/stream") as answer:
            heard = listen(answer)
            next(heard)
            tasks.add_task("first")
            kind, told, _ = next(heard)
        eventually(lambda: ids_of(client) == ["first"])
    tasks.close()

    assert ("events", "created") == (kind, told[0]["kind"])
    assert json.dumps(told)
