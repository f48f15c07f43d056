"""The dashboard in a real Chromium: what people see and do, and that nothing recorded runs there."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from ledger_ops import acts
from ledger_ops.reader import open_store
from tests.actors import Actor, Stage
from tests.browser_kit import (
    CONTRAST,
    PATIENCE_MS,
    PAYLOAD,
    SCREENSHOTS,
    SIZES,
    TOO_WIDE,
    Visit,
    Visits,
    visit,
)
from tests.dashboard_kit import CHARGER, Server, keep_running, leave_doubt, serving, tell_story

HOSTILE = f"""
PAYLOAD = {PAYLOAD!r}

def charge(**named):
    return {{PAYLOAD: [PAYLOAD, {{"deep": PAYLOAD}}]}}

def fail(text):
    raise ValueError(text)

def hang(text):
    say("inside")
    hear()

for tool in (charge, fail, hang):
    tool.__qualname__ = tool.__name__ + PAYLOAD
guard.policy(charge, key=lambda **named: PAYLOAD)
guard.policy(fail, unlimited=False)
with guard.workflow(PAYLOAD), guard.as_caller(PAYLOAD):
    for _ in range(2):
        guard(charge, **{{PAYLOAD: PAYLOAD}})
    try:
        guard(fail, PAYLOAD)
    except ValueError:
        pass
    guard(hang, PAYLOAD)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A ledger with a story, two doubts and a run that goes on, for tests that only look."""
    with Stage(tmp_path_factory.mktemp("told")) as stage:
        tell_story(stage)
        leave_doubt(stage)
        leave_doubt(stage, "LHR-JFK", "trip 9")
        keep_running(stage)
        yield stage


@pytest.fixture(scope="module")
def server(told: Stage) -> Iterator[Server]:
    """A dashboard of it."""
    with serving(told.db) as running:
        yield running


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A ledger of the test's own."""
    with Stage(tmp_path) as made:
        yield made


def charger(stage: Stage) -> Actor:
    """A process that charges what it is told."""
    actor = stage.start(CHARGER)
    assert actor.line() == "ready"
    return actor


def charge(actor: Actor, order: str) -> None:
    """Have it charge an order, and wait until that is recorded."""
    actor.tell(order)
    assert actor.line() == "done"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
def test_every_page_fits_every_screen(
    browser: Browser, visits: Visits, server: Server, size: tuple[int, int], scheme: str
) -> None:
    """No page scrolls sideways at desk, tablet or phone width, and its colours follow the system's scheme."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    visitor = visit(browser, visits, server.url, size, scheme)
    page = visitor.go("/calls?status=success&tool=charge")
    call = str(page.locator("#rows a").first.get_attribute("href"))
    page = visitor.go("/calls?status=failed")
    failed = str(page.locator("#rows a").first.get_attribute("href"))
    paths = {
        "overview": "/",
        "calls": "/calls",
        "call": call,
        "failed": failed,
        "live": "/live",
        "doubts": "/doubts",
    }
    for name, path in paths.items():
        page = visitor.go(path)
        if name == "overview":
            expect(page.locator("#chart canvas")).to_be_visible()
        page.screenshot(path=SCREENSHOTS / f"{name}-{size[0]}-{scheme}.png", full_page=name != "calls")

        assert 0 >= page.evaluate(TOO_WIDE), name
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert shade < 60 if scheme == "dark" else shade > 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_controls_have_names(
    browser: Browser, visits: Visits, server: Server, scheme: str
) -> None:
    """All text reaches AA contrast in both schemes; every field, button and link says what it is."""
    visitor = visit(browser, visits, server.url, scheme=scheme)
    for path in ("/", "/calls", "/live", "/doubts"):
        page = visitor.go(path)

        assert [] == page.evaluate(CONTRAST), path
        nameless = page.evaluate(
            "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length)"
            ".concat([...document.querySelectorAll('a, button')].filter(e => e.checkVisibility() && "
            "!e.textContent.trim() && !e.ariaLabel)).map(e => e.outerHTML)"
        )
        assert [] == nameless
        assert 1 == page.locator("h1").count()
        assert 1 == page.locator("main").count()


def test_a_filter_narrows_at_once_and_lives_in_the_url(
    browser: Browser, visits: Visits, server: Server
) -> None:
    """Typing and choosing change list and URL without a reload; URL and back button bring a list back."""
    page = visit(browser, visits, server.url).go("/calls")
    page.evaluate("window.same = true")
    page.locator("#search").press_sequentially("customer11@")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.wait_for_url("**/calls?search=customer11%40")
    page.locator("#search").fill("")
    expect(page.locator("#rows tr")).to_have_count(29)
    page.locator("#status").select_option("failed")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.wait_for_url("**/calls?status=failed")
    assert page.evaluate("window.same")
    expect(page.locator("#announce")).to_have_text("1 call shown")

    visits[0][1].expected = ("status of 400",)
    page.locator("#since").fill("bla")
    page.keyboard.press("Enter")
    expect(page.locator("#filter-error")).to_contain_text("'bla' is no time")
    page.locator("#since").fill("")
    page.locator("#status").select_option("")
    page.locator("#wf").fill("no such workflow")
    page.keyboard.press("Enter")
    expect(page.locator(".empty h2")).to_have_text("No call fits this filter")
    expect(page.locator("#filter-error")).to_be_hidden()
    page.reload()
    expect(page.locator("#wf")).to_have_value("no such workflow")
    page.go_back()
    expect(page).not_to_have_url(re.compile("wf=no"))


def test_dragging_over_the_chart_chooses_a_range(browser: Browser, visits: Visits, server: Server) -> None:
    """A drag puts the range into the URL and the figures of it above the chart; reset takes it back."""
    page = visit(browser, visits, server.url).go("/")
    expect(page.locator("#range-executed")).to_have_text("26")
    box = page.locator("#chart .u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=5)
    page.mouse.up()
    page.wait_for_url(re.compile(r"\?since=.+&until=.+"))
    expect(page.locator("#range-executed")).to_have_text("0")
    page.reload()
    expect(page.locator("#range-executed")).to_have_text("0")
    page.locator("#range-reset").click()
    expect(page.locator("#range-executed")).to_have_text("26")
    assert "since" not in page.url
    page.locator(".ranges a", has_text="7 days").click()
    page.wait_for_url("**/?since=7d")
    expect(page.locator(".ranges a[aria-current]")).to_have_text("7 days")
    page.locator(".ranges a", has_text="all").click()
    page.wait_for_url("**/?since=all")
    page.reload()
    expect(page.locator("#range-executed")).to_have_text("26")


def test_rows_come_in_while_one_reads(browser: Browser, visits: Visits, stage: Stage) -> None:
    """Calls of another process appear on top; the row one reads stays in place, selected text selected."""
    tell_story(stage)
    teller = charger(stage)
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url, (1024, 500)).go("/calls")
        page.evaluate(
            """() => {
              const row = document.querySelectorAll("#rows tr")[12];
              row.scrollIntoView({ block: "center" });
              getSelection().selectAllChildren(row.querySelector(".what a"));
              window.row = row;
            }"""
        )
        before = page.evaluate("[window.row.getBoundingClientRect().top, String(getSelection())]")
        for n in range(3):
            charge(teller, f"live-{n}")
        expect(page.locator("#rows tr")).to_have_count(29, timeout=PATIENCE_MS)
        after = page.evaluate("[window.row.getBoundingClientRect().top, String(getSelection())]")
        first = page.locator("#rows tr").first

        expect(first).to_contain_text('order="live-2"')
        assert abs(before[0] - after[0]) < 2
        assert before[1] == after[1] != ""
        charge(teller, "live-2")
        expect(first.locator('[data-label="blocked"]')).to_have_text("1", timeout=PATIENCE_MS)
        teller.tell("")
        teller.ends_well()


def test_the_overview_counts_on_by_itself(browser: Browser, visits: Visits, stage: Stage) -> None:
    """The headline of an open page grows with each duplicate, from the empty ledger on."""
    stage.start("guard.check()\nguard.close()\n").ends_well()
    teller = charger(stage)
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url).go("/")
        expect(page.locator(".empty h2")).to_have_text("No calls yet")
        charge(teller, "first")
        expect(page.locator("#headline")).to_have_text("0", timeout=PATIENCE_MS)
        expect(page.locator("#chart canvas")).to_be_visible()
        charge(teller, "first")
        expect(page.locator("#headline")).to_have_text("1", timeout=PATIENCE_MS)
        expect(page.locator("#range-blocked")).to_have_text("1")
        teller.tell("")
        teller.ends_well()


def test_live_shows_events_and_can_be_paused(browser: Browser, visits: Visits, stage: Stage) -> None:
    """Events appear as they happen, wait while paused, and each appears once."""
    teller = charger(stage)
    charge(teller, "before")
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url).go("/live")
        rows = page.locator("#events > li")
        expect(rows).to_have_count(2)
        charge(teller, "one")
        expect(rows).to_have_count(4, timeout=PATIENCE_MS)
        page.locator("#pause").click()
        charge(teller, "two")
        expect(page.locator("#held")).to_have_text("paused, 2 events waiting", timeout=PATIENCE_MS)
        expect(rows).to_have_count(4)
        page.locator("#pause").click()
        expect(rows).to_have_count(6)
        kinds = rows.locator(".badge").all_text_contents()
        rows.first.locator("a").click()
        expect(page.locator("h1")).to_contain_text("charge")
        teller.tell("")
        teller.ends_well()

    assert ["success", "claimed"] * 3 == kinds


def test_a_person_settles_doubts_and_retries(browser: Browser, visits: Visits, stage: Stage) -> None:
    """The dialog names the call; done, not done and retry take effect, and the page follows."""
    leave_doubt(stage, "FRA-LIS")
    leave_doubt(stage, "LHR-JFK", "trip 9")
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url).go("/doubts")
        expect(page.locator(".doubts > li")).to_have_count(2)
        first = page.locator(".doubts > li").first
        fingerprint = str(first.locator("code").first.text_content())
        first.get_by_role("button", name="Mark done").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Mark this call as done?")
        expect(dialog).to_contain_text("book_flight")
        expect(dialog).to_contain_text(fingerprint)
        page.screenshot(path=SCREENSHOTS / "dialog.png")
        visits[0][1].expected = ("status of 400",)
        dialog.get_by_label("Result").fill("not json")
        dialog.get_by_role("button", name="Mark done").click()
        expect(dialog.get_by_role("alert")).to_contain_text("not JSON")
        dialog.get_by_label("Result").fill('{"pnr": "X7"}')
        dialog.get_by_label("Note").fill("seen in their books")
        dialog.get_by_role("button", name="Mark done").click()
        expect(dialog).to_be_hidden()
        expect(page.locator(".doubts > li")).to_have_count(1)
        expect(page.locator("#doubt-count")).to_contain_text("1")

        page.goto(f"{server.url}/calls/{fingerprint}")
        expect(page.locator("h1 .badge")).to_have_text("success")
        expect(page.locator(".timeline")).to_contain_text("seen in their books")
        expect(page.locator(".json").last).to_contain_text("X7")
        page.get_by_role("button", name="Retry").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("dialog")).to_be_hidden()
        page.get_by_role("button", name="Retry").click()
        page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        expect(page.locator(".verdict")).to_contain_text("would run: run 1 was released")

        page.goto(f"{server.url}/doubts")
        page.get_by_role("button", name="Mark not done").click()
        page.get_by_role("dialog").get_by_role("button", name="Mark not done").click()
        expect(page.locator(".empty h2")).to_have_text("Nothing is in doubt")


def test_the_keyboard_is_enough(browser: Browser, visits: Visits, stage: Stage) -> None:
    """Skip link, search, opening a call and deciding about it work without a mouse, with visible focus."""
    tell_story(stage)
    leave_doubt(stage)
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url).go("/")
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        expect(page.locator(".skip")).to_be_in_viewport()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        page.keyboard.press("/")
        expect(page.locator("#search")).to_be_focused()
        page.keyboard.type("FRA-LIS")
        expect(page.locator("#rows tr")).to_have_count(1)
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('#rows') !== null"):
                break
        assert "none" != page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_contain_text("book_flight")
        page.get_by_role("button", name="Mark not done").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#act-note")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        page.keyboard.press("Enter")
        page.keyboard.type("nothing was booked")
        page.keyboard.press("Enter")
        expect(page.locator(".timeline")).to_contain_text("nothing was booked")
        page.keyboard.press("g")
        page.keyboard.press("d")
        expect(page.locator("h1")).to_have_text("Doubts")


def test_nothing_recorded_ever_runs(browser: Browser, visits: Visits, stage: Stage) -> None:
    """A script in tool, workflow, caller, key, arguments, result and error is shown as text."""
    victim = stage.start(HOSTILE)
    assert victim.line() == "inside"
    victim.kill()
    with serving(stage.db) as server:
        visitor = visit(browser, visits, server.url)
        page = visitor.go("/calls")
        expect(page.locator("#rows tr")).to_have_count(3)
        links = [str(link.get_attribute("href")) for link in page.locator("#rows a").all()]
        for path in ("/", "/calls", "/live", "/doubts", *links):
            page = visitor.go(path)
            expect(page.locator("main")).to_contain_text("<script>pwned=1</script>")

            assert "undefined" == page.evaluate("typeof pwned")
            assert 0 == page.locator("main img, main svg[onload], main script").count()
            assert "\u202e" not in page.locator("main").inner_text()
        page = visitor.go("/live")
        stage.start(
            HOSTILE.replace("guard(hang, PAYLOAD)", "guard.close()").replace(
                "guard(charge", "guard.call(charge"
            )
        ).ends_well()
        expect(page.locator("#events li.fresh")).not_to_have_count(0, timeout=PATIENCE_MS)
        page = visitor.go("/doubts")
        page.get_by_role("button", name="Retry").click()
        expect(page.get_by_role("dialog")).to_contain_text("<script>pwned=1</script>")

        assert "undefined" == page.evaluate("typeof pwned")


def test_a_lost_server_and_a_lost_ledger_are_told(browser: Browser, visits: Visits, stage: Stage) -> None:
    """The badge says so; the error page says what to do, and comes back by itself when the file does."""
    tell_story(stage)
    hidden = stage.db.with_suffix(".hidden")
    with serving(stage.db) as server:
        visitor = visit(browser, visits, server.url)
        visitor.expected = ("status of 503", "ERR_")
        page = visitor.go("/calls")
        stage.db.rename(hidden)
        expect(page.locator("#link-words")).to_have_text("ledger is gone", timeout=PATIENCE_MS)
        page.reload()
        expect(page.locator("h1")).to_have_text("The ledger is gone")
        page.screenshot(path=SCREENSHOTS / "gone.png")
        hidden.rename(stage.db)
        expect(page.locator("#rows tr")).to_have_count(26, timeout=PATIENCE_MS)
        expect(page.locator("#link-words")).to_have_text("live", timeout=PATIENCE_MS)
        server.stop()
        expect(page.locator("#link-words")).to_have_text("disconnected", timeout=PATIENCE_MS)
        page.close()


def test_the_token_form_lets_one_in(browser: Browser, visits: Visits, told: Stage) -> None:
    """A stranger is asked for the token; afterwards the address does not hold it."""
    with serving(told.db, "--token", "a-long-token-for-a-test") as server:
        visitor = visit(browser, visits, server.url)
        visitor.expected = ("status of 401",)
        page = visitor.go("/calls?tool=charge", live=False)
        expect(page.locator("h1")).to_have_text("A token is needed")
        page.get_by_label("Token").fill("a guess")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("That is not the token")
        assert f"{server.url}/enter" == page.url
        page.get_by_label("Token").fill("a-long-token-for-a-test")
        page.keyboard.press("Enter")
        expect(page.locator("#rows tr")).to_have_count(12)
        expect(page.locator("#link-words")).to_have_text("live", timeout=PATIENCE_MS)

        assert f"{server.url}/calls?tool=charge" == page.url
        page.close()


def test_a_decision_survives_a_new_visitor_cookie(browser: Browser, visits: Visits, stage: Stage) -> None:
    """A tab whose CSRF token has become old fetches a new one by itself; the focus goes to the next doubt."""
    for route in ("A-B", "C-D"):
        leave_doubt(stage, route)
    with serving(stage.db) as server:
        visitor = visit(browser, visits, server.url)
        visitor.expected = ("status of 403",)
        page = visitor.go("/doubts")
        visits[0][0].clear_cookies()
        page.get_by_role("button", name="Mark done").first.click()
        page.get_by_role("dialog").get_by_role("button", name="Mark done").click()
        expect(page.locator(".doubts > li")).to_have_count(1, timeout=PATIENCE_MS)
        expect(page.locator(".doubts button").first).to_be_focused()


def test_a_call_that_was_cleared_is_said_to_be_gone(browser: Browser, visits: Visits, stage: Stage) -> None:
    """Its page says so, offers nothing more, and asks no more."""
    teller = charger(stage)
    charge(teller, "A-1")
    with serving(stage.db) as server:
        visitor = visit(browser, visits, server.url)
        visitor.expected = ("status of 404",)
        page = visitor.go("/calls")
        page.locator("#rows a").first.click()
        expect(page.get_by_role("button", name="Retry")).to_be_visible()
        expect(page.locator("#link-words")).to_have_text("live", timeout=PATIENCE_MS)
        acts.clear(open_store(stage.db), actor="test")
        expect(page.locator("h1")).to_have_text("This call is no longer in the ledger", timeout=PATIENCE_MS)
        expect(page.get_by_role("button", name="Retry")).to_have_count(0)
        teller.tell("")
        teller.ends_well()


#: what a page sees when its tab is hidden, or shown again
AWAY = (
    "Object.defineProperty(document, 'hidden', {{ configurable: true, get: () => {} }});"
    "document.dispatchEvent(new Event('visibilitychange'))"
)
#: many events at once, as a burst of duplicates would write them; `seq` goes on by itself
BURST = (
    "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 900)"
    " INSERT INTO events (kind, at, tool, wf, caller, n)"
    " SELECT 'blocked', ? + n, 'burst', 'w', 'c', 1 FROM numbers"
)


def test_live_says_what_it_left_out_and_tells_the_servers_time(
    browser: Browser, visits: Visits, stage: Stage
) -> None:
    """After an absence the newest events stand above a row that tells of the rest, in the server's zone."""
    teller = charger(stage)
    charge(teller, "before")
    with serving(stage.db) as server:
        context = browser.new_context(timezone_id="Pacific/Kiritimati")
        visitor = Visit(context, server.url)
        visits.append((context, visitor))
        visitor.expected = ("ERR_",)
        page = visitor.go("/live")
        rows = page.locator("#events > li")
        expect(rows).to_have_count(2)
        page.evaluate(AWAY.format("true"))
        with closing(sqlite3.connect(stage.db)) as db, db:
            db.execute(BURST, (time.time_ns() // 1000,))
        page.evaluate(AWAY.format("false"))
        expect(rows).to_have_count(103, timeout=PATIENCE_MS)
        expect(rows.nth(100)).to_contain_text("not shown here; see Calls")
        told = [rows.nth(n).locator("time").text_content() for n in (0, 102)]
        teller.tell("")
        teller.ends_well()

    hours = {f"{datetime.fromtimestamp(time.time() - ago).astimezone():%H}" for ago in (0, 60)}
    assert {str(text)[:2] for text in told} <= hours


def test_single_keys_can_be_switched_off(browser: Browser, visits: Visits, server: Server) -> None:
    """With the switch in the footer off, a stray key goes nowhere, also on the next page."""
    page = visit(browser, visits, server.url).go("/")
    page.locator("#keys-on").uncheck()
    page.reload()
    expect(page.locator("#keys-on")).not_to_be_checked()
    page.locator("h2").first.click()
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.keyboard.press("/")
    expect(page).to_have_url(f"{server.url}/")
    page.locator("#keys-on").check()
    page.locator("h2").first.click()
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()


DEEP = """
def keep(value): return value
deep = {"end": "x" * 60}
for _ in range(20):
    deep = {"name": deep}
guard(keep, deep)
for n in range(170):
    guard(keep, n)
guard.close()
"""


def test_a_long_list_does_not_move_under_a_reader_and_deep_values_fit_a_phone(
    browser: Browser, visits: Visits, stage: Stage
) -> None:
    """New calls wait behind a button where the list is full; twenty levels of JSON do not widen the page."""
    stage.start(DEEP).ends_well()
    teller = charger(stage)
    with serving(stage.db) as server:
        page = visit(browser, visits, server.url, SIZES[2]).go("/calls?rows=150")
        expect(page.locator("#rows tr")).to_have_count(150)
        first = page.locator("#rows tr").first.get_attribute("id")
        page.evaluate("scrollTo(0, 2000)")
        charge(teller, "A-1")
        page.locator("#news-button").get_by_text("1 new call").wait_for(timeout=PATIENCE_MS)
        assert first == page.locator("#rows tr").first.get_attribute("id")
        page.locator("#news-button").click()
        expect(page.locator("#rows tr")).to_have_count(50)
        expect(page.locator("#rows tr").first).to_contain_text("A-1")
        page.goto(f"{server.url}/calls?search=xxxxxxxx")
        page.locator("#rows a").first.click()
        expect(page.locator("h1")).to_contain_text("keep")
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")

        assert 0 >= page.evaluate(TOO_WIDE)
        teller.tell("")
        teller.ends_well()
