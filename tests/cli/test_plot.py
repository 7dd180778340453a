"""`teal plot store` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_cli import Teal
from matplotlib.figure import Figure

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture
def store(teal: Teal, tmp_path: Path) -> Path:
    path = tmp_path / "out.zarr"
    assert teal("generate", "-p", "The quick", "--max-new-tokens", 6, "--ignore-eos", "--dump", path).code == 0
    return path


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_and_not_written_over(teal: Teal, store: Path, tmp_path: Path, ending: str) -> None:
    picture = tmp_path / f"out.{ending}"
    assert teal("plot", "store", store, "-o", picture, "--layer", -1, "--site", "mlp_mid").code == 0
    assert picture.stat().st_size > 5000
    again = teal("plot", "store", store, "-o", picture)
    assert again.code == 2
    assert "--force" in again.err


def test_levels_are_chosen_and_a_negative_layer_is_its_number(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six levels all are drawn, or those that were asked for."""
    store, prompts = tmp_path / "many.zarr", tmp_path / "p.txt"
    prompts.write_text("The quick\n")
    levels = "0,0.3,0.5,0.7,0.8,0.9"
    made = teal("dump", "--prompts", prompts, "-s", levels, "-o", store, "--max-new-tokens", 6, "--ignore-eos",
                "--backend", "reference")  # fmt: skip
    assert made.code == 0
    figures: list[Figure] = []
    monkeypatch.setattr("teal_cli.plots.store.save", lambda figure, path: figures.append(figure))
    assert teal("plot", "store", store, "-o", tmp_path / "a.png", "--layer", -1).code == 0
    assert teal("plot", "store", store, "-o", tmp_path / "b.png", "-l", "0.5", "-l", "s0.90").code == 0
    every, chosen = figures
    titles = [axes.get_title() for axes in every.axes if axes.get_visible()]
    assert [title.partition(":")[0] for title in titles if title] == [f"s{float(x):.2f}" for x in levels.split(",")]
    assert "layer 2, mlp_in" in every.get_suptitle()
    assert [axes.get_title()[:5] for axes in chosen.axes if axes.get_title()] == ["s0.50", "s0.90"]
    below = [axes for axes in every.axes if axes.lines]
    assert len({axes.get_ylim() for axes in below}) == 1
    assert teal("plot", "store", store, "-o", tmp_path / "c.png", "-l", "0.6").code == 3


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [(("--site", "mlp"), 2, "mlp_mid"), (("--layer", 9), 2, "layers 0 to 2"), (("-o", "x.txt"), 2, ".png")],
)
def test_bad_input(teal: Teal, store: Path, tmp_path: Path, options: tuple[object, ...], code: int, says: str) -> None:
    run = teal("plot", "store", store, "-o", tmp_path / "out.png", *options)
    assert run.code == code
    assert says in run.err
