"""Headless Chromium for tests: needs the ``playwright`` package and an installed Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on the PATH")
expect = playwright.expect


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, patience: float) -> Iterator[Any]:
    """A page that waits ``patience`` seconds for what it is told to find.

    Fails at its end if there was an error in its console or in its scripts.
    """
    page = browser.new_page()
    page.set_default_timeout(patience * 1000)
    expect.set_options(timeout=patience * 1000)
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    # Chromium itself reports answers that are not 2xx and connections that fail.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []
