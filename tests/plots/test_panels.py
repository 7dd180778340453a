"""Pictures of a store of six levels: all of them or those chosen, told apart, on common axes, with what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import write_store
from matplotlib.figure import Figure

from teal_cli import open_store
from teal_cli.plots import panels
from teal_cli.plots.panels import KINDS, Facts, Panel, gather

TARGETS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
SPARSE = ("s0.30", "s0.50", "s0.70", "s0.80", "s0.90")


def drawn(panel: Panel) -> Figure:
    figure = Figure(layout="constrained")
    panel.draw(figure.add_subplot())
    return figure


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "out.zarr"
    write_store(path, 40, targets=TARGETS)
    return path


@pytest.fixture(scope="module")
def measured(six: Path) -> Facts:
    *_, found = gather(open_store(six))
    assert isinstance(found, Facts)
    return found


@pytest.mark.parametrize("kind", ["thresholds", "overlap", "union", "nm", "blocks"])
def test_all_are_drawn_and_told_apart_without_colour(measured: Facts, kind: str) -> None:
    for panel in KINDS[kind].panels(measured):
        axes = drawn(panel).axes[0]
        legend = axes.get_legend()
        assert legend is not None
        assert tuple(text.get_text() for text in legend.get_texts()) == SPARSE
        named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        looks = [line.get_marker() for line in named] or [bars[0].get_hatch() for bars in axes.containers]
        assert len(set(looks)) == len(SPARSE)


@pytest.mark.parametrize("kind", ["thresholds", "overlap", "union", "nm", "blocks"])
def test_no_name_is_crossed(measured: Facts, kind: str) -> None:
    for panel in KINDS[kind].panels(measured):
        figure = drawn(panel)
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend()
        assert legend is not None
        assert legend.get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


@pytest.mark.parametrize("kind", KINDS)
def test_panels_of_a_kind_share_their_axes(measured: Facts, kind: str) -> None:
    panels = [drawn(panel).axes[0] for panel in KINDS[kind].panels(measured)]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert len({image.get_clim() for axes in panels for image in axes.images}) <= 1
    if kind == "density":
        assert len(panels) == len(SPARSE)


def test_a_panel_says_what_is_missing(measured: Facts) -> None:
    overlap, union = (drawn(KINDS[kind].panels(measured)[0]).axes[0] for kind in ("overlap", "union"))
    assert "8, 16: no sequence is so long" in overlap.get_xlabel()  # they have 7 tokens
    assert "dashed, 8, 16: not so many sequences" in union.get_xlabel()  # there are 6


def test_few_entries_far_away_flatten_no_distribution(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, plain = gather(open_store(six))
    assert isinstance(plain, Facts)
    axes = drawn(KINDS["thresholds"].panels(plain)[0]).axes[0]
    before = axes.get_xlim()
    assert "beyond" not in axes.get_xlabel()
    read = panels._stored
    monkeypatch.setattr(panels, "_stored", lambda *of: np.append(read(*of), [1e-30]))
    axes = drawn(KINDS["thresholds"].panels(plain)[0]).axes[0]
    assert axes.get_xlim() == pytest.approx(before, rel=0.2)
    assert re.search(r"\n1 of [\d,]+ entries are beyond the axis", axes.get_xlabel())


def test_levels_are_chosen(teal: Teal, six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(panels, "save", lambda figure, path: figures.append(figure))
    command = ("plot", "store", six, "--kind", "overlap", "-o", tmp_path / "x.png")
    assert teal(*command, "-l", 0.5, "-l", "s0.90").code == 0
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["s0.50", "s0.90"]
    assert teal(*command, "-l", 0.6).code == 3
