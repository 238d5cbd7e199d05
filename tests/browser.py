"""A real browser for tests: headless Chromium with its driver, as Debian packages them."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import environment
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from test_distributed import free_port

PATIENCE = 90  # seconds, on a machine that does other things


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A browser window; skips where there is no browser."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no browser: the packages chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1500,3000",
    ):
        options.add_argument(flag)
    window = webdriver.Chrome(options, Service(driver))
    try:
        yield window
    finally:
        window.quit()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard over a folder; gives its address."""
    port = free_port()
    place = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *place]
    server = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def eventually(ask: Callable[[], Any]) -> Any:
    """The first answer that is not empty. Raises: AssertionError when patience ends."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if answer := ask():
                return answer
        except (
            WebDriverException
        ):  # the server does not listen yet, or the page has just replaced what was found
            pass
        time.sleep(0.3)
    raise AssertionError("the page did not get there")


def open_page(window: webdriver.Chrome, address: str) -> None:
    """Loads a page once its server answers."""
    eventually(lambda: window.get(address) or window.find_elements(By.CSS_SELECTOR, "body > *"))


def time_series_cards(window: webdriver.Chrome, address: str, groups: set[str]) -> dict[str, Any]:
    """TensorBoard's cards by tag, all of `groups` unfolded."""
    open_page(window, f"{address}/#timeseries")

    def unfolded() -> dict[str, Any]:
        found = {}
        for card in window.find_elements(By.CSS_SELECTOR, "card-view"):
            group, rest, *_ = [*text_of(window, card).split("\n"), "", ""]
            found[group + (rest if rest.startswith("/") else "")] = (
                card  # monitor, /psnr and what the card shows
            )
        missing = groups - {tag.split("/")[0] for tag in found}
        for button in window.find_elements(By.CSS_SELECTOR, "button[aria-label='Expand group']"):
            if any(button.text.startswith(group) for group in missing):
                button.click()
        return {} if missing else found

    return eventually(unfolded)


def text_of(window: webdriver.Chrome, card: Any) -> str:
    """What a card says; only cards in sight are drawn."""
    window.execute_script("arguments[0].scrollIntoView()", card)
    time.sleep(0.2)
    return card.text


def loaded_images(window: webdriver.Chrome, selector: str = "img") -> list[tuple[int, int]]:
    """Width and height in pixels of each image that has really been decoded."""
    script = "return [...document.querySelectorAll(arguments[0])].map(i => [i.naturalWidth, i.naturalHeight])"
    return [(width, height) for width, height in window.execute_script(script, selector) if width]
