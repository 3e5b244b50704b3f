"""A real browser for tests of pages, and a page in it that may not read anything, say anything or fail."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """Give a browser, or skip where this machine has none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(
            f"THE PAGE IS NOT TESTED: no browser. Install chromium, so that one of {', '.join(NAMES)} is found."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, path: Path, *, refused: int = 0, **options: Any) -> Iterator[Page]:
    """Open a file without a network; fail if the page asks for anything, writes to the console or fails.

    ``refused`` is how many refusals of its policy the console has to show.
    """
    context = browser.new_context(viewport=options.pop("viewport", {"width": 1400, "height": 900}), **options)
    context.set_offline(True)
    context.set_default_timeout(5_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: problems.append(f"request: {request.url}"))
    page.on("requestfailed", lambda request: request.failure == "csp" and problems.remove(f"request: {request.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready='1']")
    try:
        yield page
        # The page itself, and what it made itself: its empty icon, and pictures for a download.
        own = tuple(f"request: {start}" for start in (path.as_uri(), "data:,", "blob:"))
        found = [problem for problem in problems if not problem.startswith(own)]
        refusals = [problem for problem in found if "Content Security Policy" in problem]
        assert found == refusals, found
        assert len(refusals) == refused
    finally:
        context.close()


def settled(page: Page) -> None:
    """Wait until what was asked is drawn."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )
