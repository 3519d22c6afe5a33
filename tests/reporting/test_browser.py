"""Pages in a real browser: what is to be seen is seen, in light, in dark, on a phone and on paper, without a request.

Needs playwright and a Chromium: an installed one, or playwright's own, which is fetched where that can be. Set
QUANTCLI_SCREENSHOTS to a folder to look at the pictures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_onnx import classifier

from quantcli.cli.app import main

pytestmark = pytest.mark.slow

COMMANDS = ("inspect", "calibrate", "convert", "eval", "bench")
#: Those with most on their pages.
RICHEST = ("convert", "bench")
BACKGROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


def _installed() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = _installed()
    if path is None:
        command = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"no Chromium is installed, and none can be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every command, about a network of one layer."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((64, 96)).astype(np.float32), np.zeros(96, np.float32)
    classifier(folder / "m.onnx", weight, bias)
    inputs = rng.standard_normal((64, 64)).astype(np.float32)
    np.savez(folder / "data.npz", x=inputs, labels=(inputs @ weight).argmax(1))
    model, out, data = (str(folder / name) for name in ("m.onnx", "int8.onnx", "data.npz"))
    lines = {
        "inspect": [model, "--scheme", "int8", "--scheme", "int4"],
        "calibrate": [model, "--data", data, "-o", str(folder / "stats.safetensors")],
        "convert": [model, "--data", data, "-o", out, "--scheme", "int8-static"],
        "eval": [model, out, "--data", data, "--by-layer", "--require", "top1_drop <= 0.5"],
        "bench": [model, out, "--data", data, "--runs", "5", "--batch-size", "1", "--batch-size", "8"],
    }
    for name in COMMANDS:
        assert main([name, *lines[name], "--html", str(folder / f"{name}.html"), "--quiet"]) == 0
    return folder


def opened(browser: Any, file: Path, *, width: int = 1100, **options: Any) -> tuple[Any, list[str]]:
    """A page in a context of its own, which is offline, and what it asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    page = context.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    return page, requests


def keep(page: Any, name: str) -> None:
    folder = os.environ.get("QUANTCLI_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("command", COMMANDS)
def test_plots_and_tables_are_seen_and_nothing_is_fetched(browser: Any, pages: Path, command: str, scheme: str) -> None:
    page, requests = opened(browser, pages / f"{command}.html", color_scheme=scheme)
    keep(page, f"{command}-{scheme}")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == BACKGROUND[scheme]
    plots = page.locator("figure svg")
    assert plots.count() >= 1
    for plot in plots.all():
        box = plot.bounding_box()
        assert plot.is_visible()
        assert box["width"] > 500
        assert box["height"] > 80
        # A picture of one colour alone would take a few hundred bytes.
        assert len(plot.screenshot()) > 3000
    tables = page.locator("main > section > .wide table")
    assert tables.count() >= 1
    assert all(table.is_visible() for table in tables.all())
    for summary in page.locator("summary").all():
        summary.click()
    assert all(table.is_visible() for table in page.locator("table").all())
    assert requests == [(pages / f"{command}.html").as_uri()]
    page.context.close()


@pytest.mark.parametrize("command", RICHEST)
def test_a_page_can_be_read_aloud(browser: Any, pages: Path, command: str) -> None:
    page, _ = opened(browser, pages / f"{command}.html")
    plots = page.locator("figure").count()
    images = page.get_by_role("img")
    assert images.count() == plots
    assert all(image.get_attribute("aria-label") for image in images.all())
    for summary in page.locator("summary").all():
        summary.click()
    captions = page.locator("table caption").all_inner_texts()
    assert len(captions) == page.get_by_role("table").count()
    assert all(captions)
    assert page.locator("figure + details table").count() == plots
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    page.context.close()


@pytest.mark.parametrize("command", RICHEST)
def test_a_phone_shows_a_page_without_scrolling_sideways(browser: Any, pages: Path, command: str) -> None:
    page, _ = opened(browser, pages / f"{command}.html", width=390)
    keep(page, f"{command}-narrow")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()


@pytest.mark.parametrize("command", RICHEST)
def test_a_page_can_be_printed(browser: Any, pages: Path, command: str) -> None:
    page, _ = opened(browser, pages / f"{command}.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == BACKGROUND["light"]
    # Numbers that are folded on the screen are printed.
    assert all(table.is_visible() for table in page.locator("details.short table").all())
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    if os.environ.get("QUANTCLI_SCREENSHOTS"):
        (Path(os.environ["QUANTCLI_SCREENSHOTS"]) / f"{command}.pdf").write_bytes(paper)
    page.context.close()
