"""Shared fixtures, and the rule that continuous integration skips nothing."""

import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from packs import pack
from playwright.sync_api import Page, sync_playwright
from runs import ROOT as ROOT  # others take it from here
from runs import make_pictures, pretrain_pictures

torch.set_num_threads(1)  # results must not depend on the machine's core count
# Runs would inherit that these are ignored, under nohup and in the background of a shell.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_configure(config: pytest.Config) -> None:
    rows = "fault(*rows): rows of the list of faults that the test shows to hold, as R7"
    config.addinivalue_line("markers", rows)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("MAE_TEST_STRICT") and isinstance(report.longrepr, tuple):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {report.longrepr[2]}"


def _unpacked(tmp_path_factory, name: str) -> Path:
    source = Path(os.environ.get("MAE_TEST_DATA", "/nonexistent")) / name
    if not source.exists():
        pytest.skip(f"{name} is not there: set MAE_TEST_DATA to the folder that holds it")
    folder = tmp_path_factory.mktemp("data")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")  # noqa: S202 (the filter refuses bad names)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """250 photographs in class folders."""
    return _unpacked(tmp_path_factory, "imagenet-sample.tar") / "imagenet-sample"


@pytest.fixture(scope="session")
def cifar10_jpeg(tmp_path_factory) -> Path:
    """CIFAR-10 as 60,000 JPEGs, train/ and val/."""
    return _unpacked(tmp_path_factory, "cifar10.tar.gz") / "cifar10"


@pytest.fixture(scope="session")
def packs(tmp_path_factory, data) -> Path:
    """The pictures of `data`, packed into six and three shards."""
    return pack(data, tmp_path_factory.mktemp("packs") / "digits")


@pytest.fixture
def own(tmp_path, packs) -> Path:
    """A copy of `packs` to spoil."""
    return shutil.copytree(packs, tmp_path / "own")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """120 + 60 digits of three classes, `train/<class>/*.png` and `val/<class>/*.png`."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, data) -> Path:
    """The folder of a pretraining run on `data`: weights with a class token, two checkpoints."""
    return pretrain_pictures(data, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def weights(pretrained) -> Path:
    """The weights that `pretrained` left."""
    return pretrained / "model.safetensors"


@pytest.fixture(scope="session")
def tokenless(tmp_path_factory, data) -> Path:
    """Weights without a class token."""
    more = ("--class_tokens", "0", "--decoder_class_token", "false")
    folder = tmp_path_factory.mktemp("tokenless")
    return pretrain_pictures(data, folder, *more) / "model.safetensors"


@pytest.fixture
def browser() -> Iterator[Page]:
    """A page of headless Chromium, as Debian packages it; skips without. At its end no page may
    have written an error to the console."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser: the package chromium is not installed")
    errors = []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = started.new_page(viewport={"width": 1100, "height": 900})
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        started.close()
    assert errors == []


@pytest.fixture
def violations(browser) -> Callable[[], list[str]]:
    """What axe-core finds serious or critical on the browser's page: rule and elements."""

    def look() -> list[str]:
        browser.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
        found = browser.evaluate("axe.run()")["violations"]
        return [
            f"{rule['id']}: {[node['html'] for node in rule['nodes']]}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]

    return look


# Examples are drawn anew only when a test changes, so that a failure can be repeated.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
