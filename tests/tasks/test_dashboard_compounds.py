"""Compounds on the dashboard: over HTTP however big they are, and as they go on in a real Chromium."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ledger_dashboard import create_app
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from ledger_tasks import CompoundRunner, Task, TaskLedger, TaskState
from ledger_tasks import compound_view as view
from tests.browser_kit import CONTRAST, PATIENCE_MS, PAYLOAD, SCREENSHOTS, SIZES, TOO_WIDE, Visits, visit
from tests.dashboard_kit import csrf_of, serving
from tests.tasks.compound_kit import answers, plan, step
from tests.tasks.dash_kit import submit_compound
from tests.test_dashboard_http import schema_errors

PAGES = ("/tasks/compounds", "/tasks/compound?id=c-1")


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a test keeps its ledger."""
    return tmp_path / "ledger.db"


@pytest.fixture
def tasks(db: Path) -> Iterator[TaskLedger]:
    """The tasks in it."""
    found = TaskLedger(db, agent="boss", quiet=True)
    yield found
    found.close()


@pytest.fixture
def client(db: Path, tasks: TaskLedger) -> Iterator[TestClient]:
    """Somebody at a dashboard of it, in this process."""
    tasks.counts()
    with TestClient(create_app(db), base_url="http://localhost", raise_server_exceptions=False) as made:
        yield made


# -- over HTTP --


def test_a_compound_is_shown_as_whoever_polls_it_sees_it(tasks: TaskLedger, client: TestClient) -> None:
    """The same words, times and costs; each subtask with its place in the graph and what it waits for."""
    submit_compound(tasks)
    known = view.progress(tasks, "c-1")

    found = client.get("/api/tasks/compound?id=c-1").json()
    page = client.get("/tasks/compound?id=c-1").text

    for key in known.keys() - {"subtasks"}:
        assert known[key] == found[key], key
    for one, told in zip(known["subtasks"], found["subtasks"], strict=True):
        assert one | {"result": told["result"]} == {key: told[key] for key in one}
    assert ["completed", "failed", "executing", "failed"] == [one["status"] for one in found["subtasks"]]
    assert '{"licence": "MIT"}' == found["subtasks"][0]["result"]
    assert (
        "blocked by failed dependency 1: TimeoutError: no answer in 120 s" == found["subtasks"][3]["result"]
    )
    assert [0, 0, 1, 2] == [one["column"] for one in found["subtasks"]]
    nums = [one["num"] for one in found["subtasks"]]
    assert {(2, 0), (3, 1), (3, 2)} == {
        (nums.index(link["task"]), nums.index(link["on"])) for link in found["links"]
    }
    for word in (
        "compare two libraries",
        "the facts first",
        "$0.008",
        "haiku",
        "opus",
        "blocked by failed dep",
    ):
        assert word in page


def test_the_api_of_compounds_is_what_its_openapi_file_says(tasks: TaskLedger, client: TestClient) -> None:
    """Every answer has the fields that are described, and no others; so has the answer without any."""
    whole = client.get("/api/openapi.json").json()
    empty = client.get("/api/tasks/compounds").json()
    submit_compound(tasks)

    for path, query in (("/api/tasks/compounds", ""), ("/api/tasks/compound", "?id=c-1")):
        answer = client.get(path + query).json()
        schema = whole["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert [] == schema_errors(answer, schema, whole, path)
    assert {"compounds": [], "cursor": None, "complete": True} == empty


def test_compounds_are_listed_newest_first_and_paged(tasks: TaskLedger, client: TestClient) -> None:
    """By session; each with how far it is and what it cost so far."""
    submit_compound(tasks)
    submit_compound(tasks, "c-2", "y" * 300)
    submit_compound(tasks.in_session("other"), "c-3")

    first = client.get("/api/tasks/compounds?limit=2").json()
    second = client.get(f"/api/tasks/compounds?limit=2&cursor={first['cursor']}").json()
    other = client.get("/api/tasks/compounds?session=other").json()["compounds"]
    page = client.get("/tasks/compounds").text

    assert (["c-3", "c-2"], ["c-1"]) == tuple(
        [one["id"] for one in some["compounds"]] for some in (first, second)
    )
    assert second["cursor"] is None
    assert ["c-3"] == [one["id"] for one in other]
    one = second["compounds"][0]
    assert ("executing", 4, 1, 2, 0.008) == tuple(
        one[key] for key in ("status", "subtask_count", "completed_count", "failed_count", "total_cost")
    )
    assert "1 of 4" in page
    assert "y" * 101 not in page


def test_a_compound_of_thousands_is_looked_at_in_part(tasks: TaskLedger, client: TestClient) -> None:
    """Counts are exact and what failed is shown first; the cost says that it is at least so much."""
    made = plan(*(step(n) for n in range(3000)))
    with CompoundRunner(tasks, made, answers, name="c-9", start=False) as runner:
        runner.submit("many", id="c-9")
    for index in (0, 900, 2999):
        claim = tasks.claim_task(f"c-9.{index}")
        assert claim is not None
        tasks.start(claim)
        if index == 900:
            tasks.fail(claim, "no", cost=1.0)
        else:
            tasks.complete(claim, "x" * 300_000 if index == 0 else "done", cost=1.0)

    answer, page = client.get("/api/tasks/compound?id=c-9"), client.get("/tasks/compound?id=c-9").text
    found = answer.json()

    assert ("executing", 3000, 2, 1) == tuple(
        found[key] for key in ("status", "subtask_count", "completed_count", "failed_count")
    )
    assert (False, 2.0) == (found["whole_cost"], found["total_cost"])
    assert (200, 2800) == (len(found["subtasks"]), found["more"])
    assert 900 in [one["index"] for one in found["subtasks"]]
    assert "at least $2.00" in page
    assert "2,800 more are not shown" in page
    assert max(len(answer.content), len(page)) < 250_000


def test_what_is_no_compound_says_so(tasks: TaskLedger, client: TestClient) -> None:
    """A plain task, one of that type and an unknown one are 404, no id is 400; the list says how to begin."""
    odd = {"submitted_at": "yesterday", "reasoning": "", "subtask_count": "many"}
    tasks.add_tasks([Task("plain"), Task("bare", type="compound"), Task("odd", type="compound", payload=odd)])

    queries = ("?id=plain", "?id=bare", "?id=odd", "?id=none", "")
    found = [client.get(f"/api/tasks/compound{query}") for query in queries]
    page = client.get("/tasks/compounds").text

    assert [404, 404, 404, 404, 400] == [answer.status_code for answer in found]
    assert "is no compound" in found[0].json()["error"]
    assert "ledger compound submit" in page


def test_a_part_that_no_runner_planned_breaks_no_page(tasks: TaskLedger, client: TestClient) -> None:
    """Whoever can add tasks can add one of any type and payload to a compound; it is left out."""
    submit_compound(tasks)
    for number, payload in enumerate((None, {"tier_hint": 1}, ["index"])):
        tasks.add_task(Task(f"odd.{number}", type="compound-subtask", parent="c-1", payload=payload))

    found, page = client.get("/api/tasks/compound?id=c-1"), client.get("/tasks/compound?id=c-1")

    assert (200, 200) == (found.status_code, page.status_code)
    assert [0, 1, 2, 3] == [one["index"] for one in found.json()["subtasks"]]


def test_a_compound_is_cancelled_with_its_subtasks(tasks: TaskLedger, client: TestClient) -> None:
    """By the decision that tasks have, under the same rules; afterwards the button is gone."""
    submit_compound(tasks)
    body = {"id": "c-1", "reason": "asked for twice"}

    bare = client.post("/api/tasks/task/cancel", json=body)
    done = client.post("/api/tasks/task/cancel", json=body, headers=csrf_of(client))
    found = client.get("/api/tasks/compound?id=c-1").json()

    assert (403, 200) == (bare.status_code, done.status_code)
    assert "cancelled" == found["status"]
    assert TaskState.CANCELLED == tasks.get("c-1.2").state
    assert "data-act" not in client.get("/tasks/compound?id=c-1").text


# -- in the browser --


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_of_compounds_fits_every_screen(
    browser: Browser, visits: Visits, db: Path, tasks: TaskLedger, scheme: str
) -> None:
    """No page scrolls sideways at desk, tablet or phone width, in either scheme; text has contrast."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    submit_compound(tasks)
    with serving(db) as server:
        for size in SIZES:
            visitor = visit(browser, visits, server.url, size, scheme)
            for path in PAGES:
                page = visitor.go(path)
                if "id=" in path:
                    expect(page.locator("#graph .node")).to_have_count(4)
                name = f"tasks-{path[7:16].rstrip('?')}-{size[0]}-{scheme}.png"
                page.screenshot(path=SCREENSHOTS / name, full_page=True)

                assert 0 >= page.evaluate(TOO_WIDE), path
                assert [] == page.evaluate(CONTRAST.replace(".skip", ".skip, svg")), path


def test_a_compound_is_followed_to_its_end(
    browser: Browser, visits: Visits, db: Path, tasks: TaskLedger
) -> None:
    """Graph, sum, cost and table of an open page change by themselves; so does the list."""
    gates = [threading.Event() for _ in range(3)]

    def execute(subtask: Mapping[str, Any]) -> dict[str, Any]:
        assert gates[subtask["index"]].wait(60)
        return {"result": f"did {subtask['index']}", "cost": 0.5}

    made = plan(step(0), step(1, 0, tier=2), step(2, 1, tier=3))
    tasks.add_task("plain")
    with serving(db) as server, CompoundRunner(tasks, made, execute) as runner:
        compounds = visit(browser, visits, server.url).go("/tasks/compounds")
        runner.submit("three steps", id="c-1")
        expect(compounds.locator(".compounds li")).to_contain_text("three steps", timeout=PATIENCE_MS)
        page = visit(browser, visits, server.url).go("/tasks/compound?id=c-1")
        expect(page.locator("#graph .t-active")).to_contain_text("executing · haiku")
        gates[0].set()
        expect(page.locator("#graph .t-done")).to_contain_text(
            "completed · haiku · $0.5", timeout=PATIENCE_MS
        )
        expect(page.locator(".task-progress")).to_contain_text("1 of 3 completed", timeout=PATIENCE_MS)
        expect(page.locator("#subtasks tbody tr").nth(1)).to_contain_text("executing", timeout=PATIENCE_MS)
        expect(page.locator("#subtasks tbody tr").first).to_contain_text("did 0", timeout=PATIENCE_MS)
        gates[1].set()
        gates[2].set()
        expect(page.locator("h1 .badge")).to_have_text("completed", timeout=PATIENCE_MS)
        expect(page.locator("#compound-cost")).to_have_text("$1.50", timeout=PATIENCE_MS)
        expect(compounds.locator(".compounds .badge")).to_have_text("completed", timeout=PATIENCE_MS)
        page.locator("#graph a").first.click()
        expect(page.locator("h1")).to_contain_text("step 0")


def test_nothing_recorded_of_compounds_ever_runs(
    browser: Browser, visits: Visits, db: Path, tasks: TaskLedger
) -> None:
    """A script in prompt, reasoning, description, result, model and error is shown as text."""
    made = plan(step(0) | {"description": PAYLOAD}, step(1) | {"description": PAYLOAD}, reasoning=PAYLOAD)

    def execute(subtask: Mapping[str, Any]) -> str:
        if subtask["index"]:
            raise ValueError(PAYLOAD)
        return PAYLOAD

    with CompoundRunner(tasks, made, execute, name=PAYLOAD) as runner:
        runner.submit(PAYLOAD, id="c-1")
        runner.wait("c-1", 60)
    with serving(db) as server:
        visitor = visit(browser, visits, server.url)
        for path in PAGES:
            page = visitor.go(path)
            if "id=" in path:
                expect(page.locator("#graph .node")).to_have_count(2)
            expect(page.locator("main")).to_contain_text(re.compile("<script>|…"))

            assert "undefined" == page.evaluate("typeof pwned"), path
            assert 0 == page.locator("main img, main svg[onload], main script").count()
            assert "\u202e" not in str(page.locator("main").text_content())
