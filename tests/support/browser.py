"""Debian's (or any) Chromium, headless, for tests of the web page. Installs nothing.

With HEADRACE_NEED_BROWSER=1, as in .ci/run, tests fail where there is none, instead of skipping.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import BrowserContext, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MAY_SKIP = CHROMIUM is None and not os.environ.get("HEADRACE_NEED_BROWSER")
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def browser(profile: Path, **options: object) -> Iterator[BrowserContext]:
    """A browser of its own, with a fresh profile."""
    assert CHROMIUM, "no Chromium is installed (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=_FLAGS, **options
        )
        try:
            yield context
        finally:
            context.close()
