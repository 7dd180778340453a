"""What pictures of benchmarks and evaluations show, looked up in the figures themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_bench import DECODES, KERNELS, decoded, kernel
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from teal_cli.bench.machine import describe
from teal_cli.bench.results import Result
from teal_cli.bench.rows import DecodeRow, KernelRow, PrefillRow, Row
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.plots import bench, kernels
from teal_cli.plots import eval as evals

Draw = Callable[..., list[Figure]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from here on, in place of files."""
    drawn: list[Figure] = []
    for module in (bench, evals):
        monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure))
    return drawn


def result(rows: list[Row]) -> Result:
    return Result("kernels", describe(torch.device("cpu")), {}, rows)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def compared(product: str, sparsity: float, ratio: float, **changes: object) -> KernelRow:
    return replace(kernel(product, sparsity, 10.0), to_dense=ratio, **changes)  # type: ignore[arg-type]


def test_products_have_a_page_for_each_dtype_and_share_their_axes(figures: list[Figure], tmp_path: Path) -> None:
    rows: list[Row] = []
    for dtype in ("bfloat16", "float16"):
        for outputs in (64, 128, 192, 256, 320, 384):
            about = {"dtype": dtype, "outputs": outputs}
            rows.append(replace(KERNELS[0], **about))  # type: ignore[arg-type]
            rows += [compared("cpu", s, 0.1, **about) for s in (0.5, 0.9)]
            rows += [compared("numba", s, 3.0, **about) for s in (0.5, 0.9)]
    drawn = bench.draw(result(rows), tmp_path / "k.png")
    assert [file.name for file in drawn] == ["k-bfloat16.png", "k-float16.png"]
    for figure in figures:
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert len(panels) == 6
        assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
        assert panels[0].get_yscale() == "log"  # ways that are far apart flatten none
        low, high = panels[0].get_ylim()
        assert low < 0.1 < 3.0 < high
        assert figure.get_size_inches()[0] <= 8.5
    styles = [(line.get_marker(), line.get_linestyle()) for line in figures[0].axes[0].lines]
    assert len(set(styles)) == len(styles), "told apart without colour"


def test_a_panel_says_what_is_missing(figures: list[Figure], tmp_path: Path) -> None:
    whole = [KERNELS[0], compared("cpu", 0.5, 2.0), compared("numba", 0.5, 3.0), KERNELS[-1]]
    bench.draw(result([*whole, compared("cpu", 0.5, 2.0, outputs=64)]), tmp_path / "k.png")
    first, second = (axes for axes in figures[0].axes if axes.get_visible())
    assert texts(first) == ["numba: failed its check"]
    assert texts(second) == ["no dense product to compare with"]


def test_no_label_of_a_bar_is_crossed(figures: list[Figure], tmp_path: Path) -> None:
    """Figures stand right of the axes, marks and bars within them."""
    bench.draw(result(DECODES), tmp_path / "d.png")
    (figure,) = figures
    figure.draw_without_rendering()
    for axes in figure.axes:
        right = axes.get_window_extent().x1
        labels = [text for text in axes.texts if isinstance(text, Text) and text.get_style() != "italic"]
        assert labels
        assert all(text.get_window_extent().x0 > right for text in labels)


def test_what_is_compared_is_alike_and_ratios_say_what_they_are(figures: list[Figure], tmp_path: Path) -> None:
    bare, dumped = (
        replace(decoded("teal", 0.5, speed, dump=dump), tokens=513) for speed, dump in ((130, False), (115, True))
    )
    rows: list[Row] = [row for row in DECODES if isinstance(row, DecodeRow) and not row.dump]
    bench.draw(result([*rows, bare, dumped]), tmp_path / "a.png")
    bench.draw(result([*rows, dumped]), tmp_path / "b.png")
    whole, lacking = figures
    for figure in figures:
        assert "16 new tokens" in figure.axes[0].get_title(loc="left")
        assert "513 new tokens" in figure.axes[1].get_title(loc="left")
        assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
        assert all("* paired median" in texts(axes) for axes in figure.axes)
        assert "x dense*" in texts(figure.axes[0])
    assert [label.get_text() for label in whole.axes[1].get_yticklabels()] == ["teal 50%", "teal 50% + dump"]
    assert "the same without a dump is not in this result" in texts(lacking.axes[1])
    assert "failed its check" in texts(whole.axes[0])


def test_a_plan_stands_beside_its_uniform_plan(figures: list[Figure], tmp_path: Path) -> None:
    plan = replace(decoded("teal", 0.5, 110.0), plan="fisher-0.5", faster_than={}, to_uniform=0.98)
    uniform = replace(decoded("teal", 0.49, 112.0), plan="uniform 0.49", faster_than={})
    bench.draw(result([*DECODES[:2], plan, uniform]), tmp_path / "d.png")
    _, planned = figures[0].axes
    assert "uniform plans read as much" in planned.get_title(loc="left")
    assert {"0.98x unif.*", "* paired median"} <= set(texts(planned))


def test_floors_that_are_not_firm_say_so(figures: list[Figure], tmp_path: Path) -> None:
    moved = [replace(row, read_gbps=10.0 * (i + 1)) for i, row in enumerate(DECODES)]  # type: ignore[type-var]
    bench.draw(result(list(moved)), tmp_path / "d.png")
    assert "its reading moved" in figures[0].axes[-1].get_xlabel()
    drawn = kernels.draw_kernels([row for row in KERNELS if isinstance(row, KernelRow)], firm=False)
    assert any("its reading moved" in text.get_text() for text in drawn.legends[0].get_texts())


def evaluation(path: Path, dataset: str = "wikitext", model: str = "m") -> Path:
    levels = [
        {"plan": plan, "sparsity": s, "realised": s, "perplexity": p, "kl": p / 100}
        for plan, s, p in ((None, 0.0, 20.0), (None, 0.5, 30.0), (None, 0.7, 60.0), ("fisher-0.5", 0.5, 25.0))
    ]
    path.write_text(json.dumps({"model": model, "dataset": dataset, "split": None, "levels": levels}))
    return path


def test_ways_to_read_a_prompt_are_bars(figures: list[Figure], tmp_path: Path) -> None:
    half = PrefillRow("tiny", 3, "bfloat16", "bfloat16", "teal tiny", 512, "passed", 0.0, 5, 90.0, 100.0, 110.0, 30.0)
    other = replace(half, engine="peer", p20=45.0, p50=50.0, p80=55.0, faster_than={"teal tiny": 0.5})
    bench.draw(result([half, other, replace(other, engine="wrong", check="tokens differ")]), tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [100.0, 50.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["teal tiny", "peer", "wrong"]
    shown = texts(axes)
    assert {"100", "50", "0.50x*", "failed its check"} <= set(shown)
    assert any("of teal tiny" in text for text in shown)


def test_quality_against_sparsity_and_speed(figures: list[Figure], tmp_path: Path) -> None:
    curves = [evals.load_evaluation(evaluation(tmp_path / f"{text}.json", text)) for text in ("wikitext", "c4")]
    planned = replace(decoded("teal", 0.5, 125.0), plan="uniform 0.49")
    evals.draw(curves, result([*DECODES, planned]), tmp_path / "e.png")
    perplexity, kl, speed = figures[0].axes
    assert [line.get_label() for line in perplexity.lines] == [
        "wikitext, uniform",
        "wikitext, plans",
        "c4, uniform",
        "c4, plans",
    ]
    assert perplexity.lines[0].get_xydata().tolist() == [[0, 20], [50, 30], [70, 60]]
    assert kl.get_yscale() == "symlog"  # a level that hardly decodes flattens none
    assert kl.lines[1].get_xydata().tolist() == [[50, 0.25]]
    assert speed.lines[0].get_xydata().tolist() == [[90, 20], [120, 30]]  # the dump's row is not taken
    assert "without a speed: 70%, fisher-0.5" in speed.get_xlabel()
    assert speed.get_ylim() == perplexity.get_ylim()
    styles = [(line.get_marker(), line.get_linestyle()) for line in perplexity.lines]
    assert len(set(styles)) == len(styles)
    evals.draw(curves[:1], None, tmp_path / "e.png")
    assert len(figures[1].axes) == 2
    evals.draw(curves[:1], result([*DECODES, replace(planned, plan="fisher-0.5")]), tmp_path / "e.png")
    assert figures[2].axes[2].lines[1].get_xydata().tolist() == [[125, 25]]
    assert "without a speed: 70%" in figures[2].axes[2].get_xlabel()
    assert "fisher" not in figures[2].axes[2].get_xlabel()


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        evals.load_evaluation(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"settings": {}, "complete": false}')
    with pytest.raises(UsageError, match="no finished evaluation"):
        evals.load_evaluation(tmp_path / "bad.json")
    for foreign, why in (
        ('{"results": {}}', "it has no 'levels'"),
        ("[1]", "what it holds is of another kind"),
        ("{", "Expecting property name"),
    ):
        (tmp_path / "foreign.json").write_text(foreign)
        with pytest.raises(UsageError, match=f"no finished evaluation of teal: {why}"):
            evals.load_evaluation(tmp_path / "foreign.json")
    models = [evals.load_evaluation(evaluation(tmp_path / f"{m}.json", model=m)) for m in ("a", "b")]
    with pytest.raises(UsageError, match="different models: a, b"):
        evals.draw(models, None, tmp_path / "e.png")
