"""`teal plot store` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_cli import Teal

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


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [(("--site", "mlp"), 2, "mlp_mid"), (("--layer", 9), 2, "layers 0 to 2"), (("-o", "x.txt"), 2, ".png")],
)
def test_bad_input(teal: Teal, store: Path, tmp_path: Path, options: tuple[object, ...], code: int, says: str) -> None:
    run = teal("plot", "store", store, "-o", tmp_path / "out.png", *options)
    assert run.code == code
    assert says in run.err
