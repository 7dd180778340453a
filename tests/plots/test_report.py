"""`teal store report` and `teal plot store --kind`: valid, whole, and showing what the statistics say."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import html5lib
import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import LAYERS, write_store
from matplotlib.figure import Figure

from teal_cli import open_store
from teal_cli.errors import UsageError
from teal_cli.plots.panels import KINDS, Facts, Panel, find_kind, gather
from teal_cli.plots.report import report_page
from teal_kernels.spec import PROJECTIONS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out.zarr"
    write_store(path, 60)
    return path


@pytest.fixture(scope="module")
def facts(path: Path) -> Facts:
    found = list(gather(open_store(path)))
    assert found[:-1] == list(range(1, 9))  # two levels of four sites
    assert isinstance(found[-1], Facts)
    return found[-1]


@pytest.fixture(scope="module")
def tree(facts: Facts) -> ET.Element:
    """The page, by a parser that refuses what the HTML standard calls an error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(report_page(facts))


def drawn(panel: Panel) -> Figure:
    figure = Figure()
    panel.draw(figure.add_subplot())
    return figure


def test_the_page_needs_no_network_and_ids_are_unique(facts: Facts, tree: ET.Element) -> None:
    page = report_page(facts)
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", page)
    assert "<script" not in page
    ids = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used
    assert used <= set(ids)


def test_every_kind_is_there_and_named_for_readers_who_do_not_see(tree: ET.Element) -> None:
    assert [section.attrib["id"] for section in tree.iter("section")] == list(KINDS)
    pictures = [element for element in tree.iter() if str(element.tag).endswith("svg")]
    assert len(pictures) == 2 + 4 + 4 + 4 + 4 + 2 + 1
    assert all(picture.attrib["role"] == "img" and picture.attrib["aria-label"] for picture in pictures)


def test_tables_say_what_the_statistics_say(facts: Facts, tree: ET.Element) -> None:
    _, masks, sizes = tree.iter("tbody")
    rows = [[cell.text for cell in row] for row in masks]
    assert len(rows) == 2 * len(PROJECTIONS)
    level, projection, kept, *_ = rows[1]
    densities = [facts.rows[level, layer, projection]["density"] for layer in range(LAYERS)]
    assert kept == f"{np.mean(densities):.1%}"
    assert len(list(sizes)) == 8


def test_pictures_show_the_statistics(facts: Facts) -> None:
    heat = drawn(KINDS["density"].panels(facts)[0]).axes[0].images[0].get_array()
    assert heat is not None
    assert heat.shape == (LAYERS, 7)
    assert heat[1, 2] == facts.rows[facts.levels[0], 1, "v"]["density"]
    lines = drawn(KINDS["overlap"].panels(facts)[0]).axes[0].lines
    found = np.asarray(lines[0].get_ydata(), float)
    wanted = [facts.mean(facts.levels[0], ["q"], "overlap", str(d)) for d in (1, 2, 4, 8, 16)]
    assert found[:3] == pytest.approx(wanted[:3])
    assert np.isnan(found[3:]).all(), "no sequence is long enough"
    bars = drawn(KINDS["blocks"].panels(facts)[0]).axes[0].patches
    assert bars[0].get_height() == pytest.approx(facts.mean(facts.levels[0], PROJECTIONS, "blocks", "8"))
    mask = drawn(KINDS["raster"].panels(facts)[0]).axes[0].images[0].get_array()
    level = open_store(facts.store.path).level(facts.levels[1])
    assert np.array_equal(mask, np.asarray(level.site(1, "attn_in")[:60]) != 0)
    limits = drawn(KINDS["thresholds"].panels(facts)[0]).axes[0].lines
    assert [line.get_xdata()[0] for line in limits] == pytest.approx([0.75, 1.35])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_as_a_file(teal: Teal, path: Path, tmp_path: Path, kind: str) -> None:
    picture = tmp_path / f"{kind}.svg"
    ran = teal("plot", "store", path, "--kind", kind, "-o", picture)
    assert ran.code == 0, ran.err
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_the_command_writes_the_page_once(teal: Teal, path: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = teal("store", "report", path, "-o", page, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"store": str(path), "page": str(page)}
    assert "teal store: out.zarr" in page.read_text(encoding="utf-8")
    assert "exists" in teal("store", "report", path, "-o", page).err


def test_bad_input(teal: Teal, path: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("plot", "store", path, "--kind", "unions", "-o", tmp_path / "x.png"), 2, "union"),
        (("store", "report", tmp_path / "none.zarr", "-o", tmp_path / "x.html"), 3, "no"),
        (("store", "report", path, "-o", tmp_path / "no" / "x.html"), 3, "there is no folder"),
        (("store", "report", path, "-o", tmp_path / "x.foo"), 2, "end it in .html"),
    ):
        ran = teal(*arguments)
        assert ran.code == code, ran.err
        assert said in ran.err
    with pytest.raises(UsageError, match="no picture"):
        find_kind("heat")
