"""The dashboard's tasks in a real Chromium: what people see and decide; nothing recorded runs there."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from ledger_tasks import Dep, Task, TaskContext, TaskLedger, TaskState, Worker, WorkerInfo
from tests.browser_kit import CONTRAST, PATIENCE_MS, PAYLOAD, SCREENSHOTS, SIZES, TOO_WIDE, Visits, visit
from tests.dashboard_kit import Server, serving
from tests.tasks.dash_kit import begun, guarding, tell_of_tasks

VIEWS = {
    "list": "/tasks",
    "tree": "/tasks/tree?session=main",
    "graph": "/tasks/graph?session=main",
    "agents": "/tasks/agents",
    "workers": "/tasks/workers",
    "dead": "/tasks/dead",
    "payload": "/tasks/task?id=backup",
    "task": "/tasks/task?id=report.2",
    "dead-task": "/tasks/task?id=feed",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dashboard of a ledger with tasks, for tests that only look."""
    db = tmp_path_factory.mktemp("tasks") / "ledger.db"
    tell_of_tasks(db)
    with serving(db) as running:
        yield running


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a test keeps a ledger of its own."""
    return tmp_path / "ledger.db"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
def test_every_page_of_tasks_fits_every_screen(
    browser: Browser, visits: Visits, server: Server, size: tuple[int, int], scheme: str
) -> None:
    """No page scrolls sideways at desk, tablet or phone width, in either scheme; the pictures are drawn."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    visitor = visit(browser, visits, server.url, size, scheme)
    for name, path in VIEWS.items():
        page = visitor.go(path)
        if name == "graph":
            expect(page.locator("#graph .node")).to_have_count(8)
        if name == "agents":
            expect(page.locator("#lanes .lane")).to_have_count(3)
        page.screenshot(path=SCREENSHOTS / f"tasks-{name}-{size[0]}-{scheme}.png", full_page=True)

        assert 0 >= page.evaluate(TOO_WIDE), name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_tasks_has_contrast_and_controls_have_names(
    browser: Browser, visits: Visits, server: Server, scheme: str
) -> None:
    """All text of the pages reaches AA contrast in both schemes; every field, button and link has a name."""
    visitor = visit(browser, visits, server.url, scheme=scheme)
    for path in VIEWS.values():
        page = visitor.go(path)
        nameless = page.evaluate(
            "[...document.querySelectorAll('input:not([type=hidden]), select')].filter(e => !e.labels.length)"
            ".concat([...document.querySelectorAll('a, button')].filter(e => e.checkVisibility() && "
            "!e.textContent.trim() && !e.ariaLabel)).map(e => e.outerHTML)"
        )

        # text in a picture has no colour of CSS, it is filled with those that the rest of the page has
        assert [] == page.evaluate(CONTRAST.replace(".skip", ".skip, svg")), path
        assert [] == nameless
        assert 1 == page.locator("h1").count()


def test_a_filter_of_tasks_narrows_at_once_and_lives_in_the_url(
    browser: Browser, visits: Visits, server: Server
) -> None:
    """Typing, choosing a state and pressing its badge change list and URL; a reload keeps them."""
    page = visit(browser, visits, server.url).go("/tasks")
    expect(page.locator("#rows tr")).to_have_count(11)
    page.locator("#search").press_sequentially("timeouterror")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.wait_for_url("**/tasks?text=timeouterror")
    page.locator("#search").fill("")
    page.locator("#state").select_option("unended")
    page.wait_for_url("**/tasks?state=unended")
    expect(page.locator("#rows tr")).to_have_count(7)
    page.locator("#session").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator("#rows tr")).to_have_count(1)
    expect(page.locator("#announce")).to_have_text("1 task shown")
    page.reload()
    expect(page.locator("#session")).to_have_value("other")
    expect(page.locator("#rows a")).to_have_text("answer the question")
    page.goto(f"{server.url}/tasks")
    page.locator(".states a", has_text="dead").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    page.locator("#rows a").click()
    expect(page.locator("h1")).to_contain_text("Price feed")


def test_one_goes_from_the_graph_to_a_task_and_its_calls(
    browser: Browser, visits: Visits, server: Server
) -> None:
    """A node of the picture is a link; a task leads to what is around it, and to its guarded calls."""
    page = visit(browser, visits, server.url).go("/tasks/graph?session=main")
    page.locator("#graph a", has_text="second source").click()
    expect(page.locator("h1")).to_contain_text("second source")
    page.get_by_role("link", name="Graph").click()
    expect(page.locator("#graph .focus")).to_contain_text("second source")
    page.go_back()
    page.get_by_role("link", name="task:report.2").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    page.keyboard.press("g")
    page.keyboard.press("t")
    expect(page).to_have_url(f"{server.url}/tasks")


def test_pages_of_tasks_follow_what_happens(browser: Browser, visits: Visits, db: Path) -> None:
    """An open list, tree, graph and timeline change by themselves, from the first task on."""
    with guarding(db):
        pass
    tasks = TaskLedger(db, agent="planner", quiet=True)
    with serving(db) as server:
        paths = [VIEWS["list"], "/tasks/graph?session=main", "/tasks/agents", "/tasks/tree?session=main"]
        pages = [visit(browser, visits, server.url).go(path) for path in paths]
        listed, graph, agents, tree = pages
        for page in pages:
            expect(page.locator(".empty h2")).to_have_text("No tasks yet")
        tasks.add_tasks([Task("first"), Task("second", depends_on=(Dep("first"),))])
        expect(listed.locator("#rows tr")).to_have_count(2, timeout=PATIENCE_MS)
        expect(graph.locator("#graph .node")).to_have_count(2, timeout=PATIENCE_MS)
        claim = begun(tasks, "first", "ann")
        expect(agents.locator("#lanes .lane")).to_have_count(1, timeout=PATIENCE_MS)
        tasks.progress(claim, 0.25, "a quarter of it")
        expect(listed.locator("#rows")).to_contain_text("a quarter of it", timeout=PATIENCE_MS)
        tasks.complete(claim)
        expect(graph.locator("#graph .t-done")).to_have_count(1, timeout=PATIENCE_MS)
        expect(listed.locator(".badge.t-waiting")).to_have_count(0, timeout=PATIENCE_MS)
        tasks.add_subtasks("second", ["a part", "another"])
        expect(tree.locator(".tree > li")).to_have_count(3, timeout=PATIENCE_MS)
        tasks.complete_task_and_route("second.1")
        expect(tree.locator(".tree > li").first).to_contain_text("1 of 2 done", timeout=PATIENCE_MS)
    tasks.close()


def test_the_page_of_workers_follows_a_real_one(browser: Browser, visits: Visits, db: Path) -> None:
    """It appears when it takes a task, with a link to that; when it has ended it stands among the ended."""
    tasks = TaskLedger(db, agent="robot", quiet=True)
    tasks.add_tasks([Task("first", title="The first one"), Task("second")])
    gate = threading.Event()

    def work(task: Task, context: TaskContext) -> str:
        context.progress(0.25, "at the gate")
        return "through" if gate.wait(60) else "never"

    with serving(db) as server:
        page = visit(browser, visits, server.url).go("/tasks/workers")
        expect(page.locator(".empty h2")).to_have_text("No worker was seen")
        with Worker(tasks, work, agent="robot", concurrency=1):
            card = page.locator(".workers > li")
            expect(card).to_contain_text("at the gate", timeout=PATIENCE_MS)
            expect(card.locator("h2 .badge")).to_have_text("alive")
            expect(card.get_by_role("link", name="The first one")).to_be_visible()
            gate.set()
            expect(card).to_contain_text("It has nothing to do", timeout=PATIENCE_MS)
        expect(page.locator("#ended-title")).to_be_visible(timeout=PATIENCE_MS)
        expect(page.locator("tbody tr")).to_contain_text(["robot"])
        expect(page.locator("tbody .grade")).to_have_text("100.0 %")
        page.get_by_role("link", name="robot").click()
        expect(page.locator("#rows tr")).to_have_count(2)
    tasks.close()


def test_a_person_lets_a_task_run_anew(browser: Browser, visits: Visits, db: Path) -> None:
    """The box is offered with a retry and not with a cancel; ticked, the task has a scope of its own."""
    tell_of_tasks(db)
    tasks = TaskLedger(db)
    with serving(db) as server:
        page = visit(browser, visits, server.url).go("/tasks/task?id=backup")
        dialog = page.get_by_role("dialog")
        page.get_by_role("button", name="Cancel").click()
        expect(dialog.get_by_label("afresh")).to_be_hidden()
        dialog.get_by_role("button", name="Leave it").click()
        page.get_by_role("button", name="Retry").click()
        dialog.get_by_label("afresh").check()
        dialog.get_by_label("Reason").fill("a new disk")
        dialog.get_by_role("button", name="Retry").click()
        expect(page.locator(".facts")).to_contain_text("Scope")
        expect(page.get_by_role("link", name="task:backup#1")).to_be_visible()

    assert (TaskState.PENDING, 1) == (tasks.get("backup").state, tasks.get("backup").scope)
    tasks.close()


def test_a_person_retries_a_dead_task_for_a_reason(browser: Browser, visits: Visits, db: Path) -> None:
    """The dialog names the task and shows the refusal without a reason; with one the task leaves the list."""
    tell_of_tasks(db)
    with serving(db) as server:
        page = visit(browser, visits, server.url).go("/tasks/dead")
        expect(page.locator(".doubts > li")).to_have_count(2)
        page.locator(".doubts > li", has_text="Price feed").get_by_role("button", name="Retry").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Retry this task?")
        expect(dialog).to_contain_text("Price feed")
        page.screenshot(path=SCREENSHOTS / "tasks-dialog.png")
        visits[0][1].expected = ("status of 409",)
        dialog.get_by_role("button", name="Retry").click()
        expect(dialog.get_by_role("alert")).to_contain_text("Give a reason")
        dialog.get_by_label("Reason").fill("the feed is back")
        dialog.get_by_role("button", name="Retry").click()
        expect(dialog).to_be_hidden()
        expect(page.locator(".doubts > li")).to_have_count(1)
        page.goto(f"{server.url}/tasks/task?id=feed")
        expect(page.locator("h1 .badge")).to_have_text("pending")
        expect(page.locator(".timeline").last).to_contain_text("the feed is back")


def test_a_person_cancels_a_task_with_what_depends_on_it(browser: Browser, visits: Visits, db: Path) -> None:
    """Leaving the dialog changes nothing; with the box ticked the dependents end too."""
    tell_of_tasks(db)
    tasks = TaskLedger(db)
    with serving(db) as server:
        page = visit(browser, visits, server.url).go("/tasks/task?id=report")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert TaskState.PENDING == tasks.get("report").state
        page.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("cancel what depends on it too").check()
        dialog.get_by_label("Reason").fill("not needed")
        dialog.get_by_role("button", name="Cancel the task").click()
        expect(page.locator("h1 .badge")).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)

    assert [TaskState.CANCELLED] * 3 == [tasks.get(name).state for name in ("report", "send", "archive")]
    tasks.close()


def test_an_illegal_cancel_shows_the_error_and_changes_nothing(
    browser: Browser, visits: Visits, db: Path
) -> None:
    """A task that was completed while the dialog stood open stays done; the dialog says what may follow."""
    tasks = TaskLedger(db, agent="ann", quiet=True)
    tasks.add_task("race", title="A race")
    claim = begun(tasks, "race", "ann")
    with serving(db) as server:
        visitor = visit(browser, visits, server.url)
        visitor.expected = ("status of 409",)
        page = visitor.go("/tasks/task?id=race")
        page.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog")
        tasks.complete(claim, result="done")
        last = tasks.last_seq()
        dialog.get_by_role("button", name="Cancel the task").click()
        expect(dialog.get_by_role("alert")).to_contain_text("is DONE and cannot become CANCELLED")
        expect(dialog.get_by_role("alert")).to_contain_text("Nothing was changed")
        expect(page.locator("h1 .badge")).to_have_text("done", timeout=PATIENCE_MS)

    assert (last, TaskState.DONE) == (tasks.last_seq(), tasks.get("race").state)
    tasks.close()


def test_nothing_recorded_of_tasks_ever_runs(browser: Browser, visits: Visits, db: Path) -> None:
    """A script in id, title, description, error, result, agent, session and the rest is shown as text."""
    tasks = TaskLedger(db, agent=PAYLOAD, session=PAYLOAD, source=PAYLOAD, quiet=True)
    tasks.add_tasks([
        Task(PAYLOAD, PAYLOAD, title=PAYLOAD, type=PAYLOAD, tags=(PAYLOAD,), payload={PAYLOAD: PAYLOAD}),
        Task("after" + PAYLOAD, title=PAYLOAD, depends_on=(Dep(PAYLOAD, on_failure="run"),)),
        Task("part" + PAYLOAD, title=PAYLOAD, parent="after" + PAYLOAD),
    ])  # fmt: skip
    claim = begun(tasks, PAYLOAD, PAYLOAD)
    tasks.progress(claim, 0.5, PAYLOAD)
    tasks.checkpoint(claim, {PAYLOAD: PAYLOAD})
    tasks.add_artifact(claim, PAYLOAD, PAYLOAD)
    tasks.fail(claim, PAYLOAD)
    tasks.beat(WorkerInfo(PAYLOAD, PAYLOAD, PAYLOAD, 1, (PAYLOAD,), 1))
    tasks.beat(WorkerInfo(f"{PAYLOAD}2", PAYLOAD, PAYLOAD, 1, (PAYLOAD,), 1, ended=True))
    with serving(db) as server:
        visitor = visit(browser, visits, server.url)
        page = visitor.go("/tasks")
        expect(page.locator("#rows tr")).to_have_count(3)
        links = [str(link.get_attribute("href")) for link in page.locator("#rows a").all()]
        paths = [f"/tasks{view}" for view in ("", "/tree", "/graph", "/agents", "/workers", "/dead")]
        for path in (*paths, *links):
            page = visitor.go(path)
            if path.endswith("graph"):
                expect(page.locator("#graph .node")).to_have_count(3)
            if path.endswith("agents"):
                expect(page.locator("#lanes .lane")).to_have_count(1)
            expect(page.locator("main")).to_contain_text(re.compile("<script>|…"))

            assert "undefined" == page.evaluate("typeof pwned"), path
            assert 0 == page.locator("main img, main svg[onload], main script").count()
            assert "\u202e" not in str(page.locator("main").text_content())
        page = visitor.go("/tasks/dead")
        page.get_by_role("button", name="Retry").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("<script>pwned=1</script>")
        dialog.get_by_label("Reason").fill(PAYLOAD)
        dialog.get_by_role("button", name="Retry").click()
        expect(page.locator(".empty h2")).to_have_text("No task is dead")

        assert "undefined" == page.evaluate("typeof pwned")
    assert TaskState.PENDING == tasks.get(PAYLOAD).state
    tasks.close()
