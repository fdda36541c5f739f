"""The report in a real browser: Debian's Chromium, driven by playwright; skipped where either is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")

CONTRAST = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const color = channels(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("style")) continue;
    const style = getComputedStyle(element);
    const color = channels(element instanceof SVGElement ? style.fill : style.color);
    const [dark, light] = [luminance(color), luminance(ground(element))].sort((a, b) => a - b);
    found.push([(light + 0.05) / (dark + 0.05), walker.currentNode.data.trim()]);
  }
  return found;
}"""
"""Every piece of text with its contrast to the ground behind it (WCAG 2: at least 4.5)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["run", "comparison"])
def report(request: pytest.FixtureRequest, run_report: Path, comparison_report: Path) -> Path:
    """A report of each kind."""
    return run_report if request.param == "run" else comparison_report


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_report_reads_well(browser: Any, report: Path, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requested: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    assert requested == [report.as_uri()]
    assert complaints == []

    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    figures = page.locator("figure").all()
    assert len(figures) == page.locator("figure .drawing > svg").count() >= 6
    for figure in figures:
        box = figure.locator("svg").bounding_box()
        assert box["width"] > 250
        assert box["height"] > 100
        assert figure.locator("svg path").count() > 5
        assert figure.locator("svg text").count() > 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is too wide scrolls in its own box.
    assert page.evaluate("[...document.querySelectorAll('table, pre')].every(wide => wide.closest('.scroll'))")

    texts = page.evaluate(CONTRAST)
    assert len(texts) > 100
    assert min(texts)[0] >= 4.5, min(texts)
    page.close()


def test_the_drawings_take_the_colours_of_the_page(browser: Any, run_report: Path) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(run_report.as_uri())
        colors[scheme] = page.evaluate(
            "[...document.querySelectorAll('svg path')].map(path => getComputedStyle(path).stroke)"
        )
        page.close()
    assert "rgb(0, 105, 170)" in colors["light"]
    assert "rgb(93, 180, 245)" in colors["dark"]
    assert not set(colors["light"]) & set(colors["dark"]) - {"none"}
