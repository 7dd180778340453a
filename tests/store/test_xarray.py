"""Stores through xarray: our engine, and plain Zarr groups."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures_store import LAYERS, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, UsageError
from teal_kernels.spec import PROJECTION_SITE, SITES

xarray = pytest.importorskip("xarray")
from teal_cli.store.xarray import TealBackendEntrypoint  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xarray") / "out.zarr"
    write_store(path, 40)
    return path


def test_variables_are_those_of_the_reader(store: Path) -> None:
    level = open_store(store).level(0.5)
    data = xarray.open_dataset(store, engine=TealBackendEntrypoint, level=0.5)
    for name, site in {**{site: site for site in SITES}, **PROJECTION_SITE}.items():
        assert data[name].dims == ("layer", "token", f"{site}_channel")
        layers = [level.site(i, name) if name in SITES else level.projection(i, name) for i in range(LAYERS)]
        np.testing.assert_array_equal(data[name].values, np.stack([np.asarray(layer) for layer in layers]))
    np.testing.assert_array_equal(data.thresholds.sel(projection="k").values, level.thresholds[:, 1])
    np.testing.assert_array_equal(data.sequence.values, level.tokens.sequence)
    assert data.attrs["model"] == "synthetic"


def test_indexing_reads_lazily(store: Path) -> None:
    broken = Path(f"{store}-broken")
    shutil.copytree(store, broken)
    (broken / "s0.50/mlp_mid/values/c/0/2/0").write_bytes(b"")
    data = xarray.open_dataset(broken, engine=TealBackendEntrypoint, level="s0.50")
    whole = xarray.open_dataset(store, engine=TealBackendEntrypoint, level="s0.50")
    selection = {"layer": [2, 0], "token": slice(3, 30, 4), "mlp_mid_channel": [1, 5, 9]}
    expected = whole.down.values[np.ix_([2, 0], range(3, 30, 4), [1, 5, 9])]
    np.testing.assert_array_equal(data.down.isel(selection).values, expected)
    assert data.down.isel(layer=1, token=7).shape == (100,)
    assert data.down.isel(layer=[], token=0).shape == (0, 100)
    points = data.down.isel(layer=xarray.DataArray([0, 2], dims="p"), token=xarray.DataArray([5, 6], dims="p"))
    np.testing.assert_array_equal(points.values, whole.down.values[[0, 2], [5, 6]])


def test_a_level_must_be_chosen_where_there_are_several(store: Path) -> None:
    with pytest.raises(UsageError, match="2 levels"):
        xarray.open_dataset(store, engine=TealBackendEntrypoint)
    with pytest.raises(NotFoundError):
        xarray.open_dataset(store, engine=TealBackendEntrypoint, level=0.7)


def test_tree_of_levels(store: Path) -> None:
    tree = xarray.open_datatree(store, engine=TealBackendEntrypoint, drop_variables=["q", "k"])
    assert set(tree.children) == {"s0.50", "s0.90"}
    assert "v" in tree["s0.50"]
    assert "q" not in tree["s0.50"]


def test_only_stores_are_claimed(store: Path, tmp_path: Path) -> None:
    engine = TealBackendEntrypoint()
    assert engine.guess_can_open(str(store))
    assert not engine.guess_can_open(tmp_path)
    assert not engine.guess_can_open(b"CDF")


@pytest.mark.parametrize("group", [None, "s0.50", "s0.50/attn_in", "s0.90/mlp_mid"])
def test_zarr_groups_open_by_themselves(store: Path, group: str | None) -> None:
    data = xarray.open_zarr(store, group=group, chunks=None, consolidated=False)
    expected = {None: set(), "s0.50": {"token", "layer", "projection"}}
    assert set(data.sizes) == expected.get(group, {"layer", "block", "slot", "token", "byte"})
