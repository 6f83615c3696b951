"""Settings and fixtures shared by all tests."""
import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("minitensor", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("minitensor")


@pytest.fixture(scope="module")
def browser():
    """Chromium, for the pages that the project writes."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: install the system's package, or name a browser in $CHROMIUM")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path,
                                         args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()
