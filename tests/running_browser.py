"""A real Chromium, Debian's, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

BINARY = shutil.which("chromium")
_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
"""As root, without a graphics card, without calls to others."""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """It has no window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=_OPTIONS)
        yield browser
        browser.close()
