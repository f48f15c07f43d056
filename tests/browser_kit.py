"""A real Chromium for tests of the dashboard: without one they are skipped, and no page may complain."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect, sync_playwright

from tests.dashboard_kit import ROOT

SCREENSHOTS = ROOT / "build" / "screenshots"
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZES = ((1440, 900), (768, 1024), (390, 844))
PATIENCE_MS = 20_000
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

#: what would set `pwned` if any of it ran
PAYLOAD = "\"'><script>pwned=1</script><img src=x onerror=pwned=1><svg onload=pwned=1>{{7*7}}\u202eevil"


def chromium() -> str:
    """Where the browser is; without one the test is skipped, and in CI it fails."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = f"there is no browser here (looked for {', '.join(NAMES)}; CHROMIUM=/path names one)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The browser, for all tests of a module."""
    path = chromium()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield opened
        opened.close()


class Visit:
    """A page, and all that its console complained of."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.complaints: list[str] = []
        #: what the browser itself may complain of, because the test brings it about
        self.expected: tuple[str, ...] = ()
        self.hosts: set[str] = set()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def _note(self, message: ConsoleMessage) -> None:
        expected = any(part in message.text for part in self.expected)
        if message.type in ("error", "warning") and not expected:
            self.complaints.append(f"{message.text} ({message.location.get('url')})")

    def go(self, path: str, *, live: bool = True) -> Page:
        """Open a page, and wait until it follows the ledger."""
        self.page.goto(self.url + path)
        if live:
            expect(self.page.locator("#link-words")).to_have_text("live", timeout=PATIENCE_MS)
        return self.page


Visits = list[tuple[BrowserContext, Visit]]


@contextmanager
def visiting() -> Iterator[Visits]:
    """Pages that a test opens; none may have complained or have asked another host."""
    opened: Visits = []
    yield opened
    complaints = [complaint for _, visit in opened for complaint in visit.complaints]
    strangers = {host for _, visit in opened for host in visit.hosts} - {
        v.url.split("/")[2] for _, v in opened
    }
    for context, one in opened:
        with suppress(Error):  # a test may have closed the page, or lost its server
            one.page.goto("about:blank")  # ends its streams: closing in the midst of one hung once
        context.close()
    assert [] == complaints
    assert set() == strangers


def visit(
    browser: Browser, visits: Visits, url: str, size: tuple[int, int] = SIZES[0], scheme: str = "light"
) -> Visit:
    """A visitor with a screen of that size and that colour scheme."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    made = Visit(context, url)
    visits.append((context, made))
    return made


#: the texts of a page whose contrast to what is behind them is weaker than AA asks for
CONTRAST = """
() => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = color.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] > 250) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const weak = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.nodeValue.trim());
    if (!own || !element.checkVisibility() || element.closest("script, template, .sr, .skip")) continue;
    const style = getComputedStyle(element);
    const pair = [light(rgba(style.color).slice(0, 3)), light(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const size = parseFloat(style.fontSize);
    const wanted = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < wanted) weak.add(`${ratio.toFixed(2)} ${element.className}: ${element.textContent.trim()}`);
  }
  return [...weak];
}
"""
