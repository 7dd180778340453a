"""The report page in a real browser, as wide as a phone and as a desk: nothing is fetched, cut off or blank."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from browser import Page, browser, find_browser
from fixtures_store import write_store
from PIL import Image

from teal_cli import open_store
from teal_cli.plots.panels import KINDS, Facts, gather
from teal_cli.plots.report import report_page

COMMAND = find_browser()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="no Chromium here: apt-get install chromium")

FIGURES = """Array.from(document.querySelectorAll("figure.picture")).map(figure => {
  const box = figure.getBoundingClientRect(), svg = figure.querySelector("svg"), drawn = svg.getBoundingClientRect();
  const texts = Array.from(svg.querySelectorAll("text")).map(text => text.getBoundingClientRect());
  return {kind: figure.closest("section").id, label: svg.getAttribute("aria-label"),
    x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, svg: [drawn.width, drawn.height],
    out: texts.filter(t => t.left < drawn.left - 1 || t.right > drawn.right + 1).length, texts: texts.length};
})"""
CUT = """Array.from(document.querySelectorAll("body *")).filter(e => !e.closest(".wide") && !e.closest("svg")
  && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    path = tmp_path_factory.mktemp("browser") / "out.zarr"
    write_store(path, 60)
    *_, found = gather(open_store(path))
    assert isinstance(found, Facts)
    return found


@pytest.fixture(scope="module")
def url(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(facts), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert COMMAND is not None
    with browser(COMMAND, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_whole(page: Page, url: str, facts: Facts, width: int) -> None:
    page.open(url, width, 844)
    assert page.complaints == []
    assert page.requests == [url], "it needs no network"
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width], "nothing to scroll to"
    assert page.evaluate(CUT) == []
    figures = page.evaluate(FIGURES)
    wanted = [(name, f"{kind.name}: {panel.title}") for name, kind in KINDS.items() for panel in kind.panels(facts)]
    assert [(figure["kind"], figure["label"]) for figure in figures] == wanted
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    assert picture.shape[1] == width
    for figure in figures:
        assert figure["x"] >= 0
        assert figure["x"] + figure["width"] <= width
        assert min(figure["svg"]) > 150, "a picture that can be read"
        assert figure["texts"] > 3
        assert figure["out"] == 0, f"text runs out of {figure['label']}"
        x, y = round(figure["x"]), round(figure["y"])
        shown = picture[y : y + round(figure["height"]), x : x + round(figure["width"])]
        assert len(np.unique(shown)) > 8, f"{figure['label']} is blank"
    across = {round(figure["x"]) for figure in figures}
    assert len(across) == (1 if width == 390 else 2), "one below the other on a phone"
