"""Each form read back by the library whose form it is, or by a parser of its definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fixtures_store import CHANNELS, dense, levels, token_of, write_store
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import io, sparse

from teal_cli import open_store
from teal_cli.errors import UsageError
from teal_cli.store.export import convert
from teal_cli.store.formats import FORMATS
from teal_cli.store.selection import select

COUNT = 40
# Sequences 4 and 1, in this order: rows 28 to 35, then 7 to 14; they cross blocks of 16 tokens.
ROWS = [*range(28, 35), *range(7, 14)]
LAYERS = (0, 2)
NAMES = ("k", "mlp_mid")
PLAIN = [name for name, form in FORMATS.items() if not form.outputs]  # simulators' are in a file of their own


def expected(name: str, layer: int, dtype: str = "bfloat16", level: int = 0) -> np.ndarray:
    """Rows [14, K] of a name, from the numbers that the store was made of."""
    rows = dense(levels()[level], "mlp_mid" if name == "mlp_mid" else "attn_in", layer, COUNT, dtype)[ROWS]
    rows = rows.astype(np.float32)
    if name != "k":
        return rows
    return np.where(np.abs(rows) > levels()[level].thresholds[layer, 1], rows, np.float32(0))


def made(tmp_path: Path, form: str, dtype: str = "bfloat16") -> Path:
    write_store(tmp_path / "in.zarr", COUNT, dtype=dtype)
    store = open_store(tmp_path / "in.zarr")
    chosen = select(store, levels=[0.5, 0.9], layers=LAYERS, names=NAMES, sequences=[4, 1])
    events = list(convert(store, tmp_path / "out", form, chosen))
    assert [event.done for event in events] == list(range(1, 9))
    assert all((tmp_path / "out" / event.path).exists() for event in events)
    return tmp_path / "out"


def parts() -> Iterator[tuple[str, int, str, int]]:
    for index, level in enumerate(("s0.50", "s0.90")):
        for layer in LAYERS:
            for name in NAMES:
                yield level, layer, name, index


def columns() -> dict[str, list[int]]:
    return {name: [token_of(row)[name] for row in ROWS] for name in ("token_id", "position", "sequence")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zarr(tmp_path: Path, dtype: str) -> None:
    group = zarr.open_group(made(tmp_path, "zarr", dtype), mode="r")
    for level, layer, name, index in parts():
        array: Any = group[f"{level}/layer_{layer}/{name}"]
        assert array.dtype == ("float16" if dtype == "float16" else "float32")
        np.testing.assert_array_equal(array[:], expected(name, layer, dtype, index))
        assert array.metadata.dimension_names[0] == "token"
    for name, want in columns().items():
        assert group[f"s0.90/{name}"][:].tolist() == want


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_safetensors(tmp_path: Path, dtype: str) -> None:
    out = made(tmp_path, "safetensors", dtype)
    for level, layer, name, index in parts():
        path = out / level / f"layer_{layer}" / f"{name}.safetensors"
        tensors = load_file(path)
        assert str(tensors["rows"].dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(tensors["rows"].float().numpy(), expected(name, layer, dtype, index))
        for column, want in columns().items():
            assert tensors[column].tolist() == want
        with safe_open(path, "pt") as file:
            assert file.metadata()["level"] == level
            assert np.float32(file.metadata()["thresholds"]) == tensors["thresholds"].numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parquet(tmp_path: Path, dtype: str) -> None:
    out = made(tmp_path, "parquet", dtype)
    for level, layer, name, index in parts():
        table = parquet.read_table(out / level / f"layer_{layer}" / f"{name}.parquet")
        for column, want in columns().items():
            assert table[column].to_pylist() == want
        found = np.zeros((len(ROWS), int(table.schema.metadata[b"channels"])), np.float32)
        for row, line in enumerate(table.to_pylist()):
            found[row, line["channels"]] = line["values"]
        np.testing.assert_array_equal(found, expected(name, layer, dtype, index))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scipy_reads_csr_and_matrix_market(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "csr").mkdir()
    (tmp_path / "mtx").mkdir()
    csr, mtx = made(tmp_path / "csr", "csr", dtype), made(tmp_path / "mtx", "mtx", dtype)
    for level, layer, name, index in parts():
        want = expected(name, layer, dtype, index)
        place = f"{level}/layer_{layer}/{name}"
        np.testing.assert_array_equal(sparse.load_npz(csr / f"{place}.npz").toarray(), want)
        np.testing.assert_array_equal(io.mmread(mtx / f"{place}.mtx").toarray().astype(np.float32), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_anndata(tmp_path: Path, dtype: str) -> None:
    """The encodings of AnnData's specification 0.1.0: https://anndata.readthedocs.io/en/stable/fileformat-prose.html."""
    out = made(tmp_path, "anndata", dtype)
    for level, layer, name, index in parts():
        root: Any = zarr.open_group(out / level / f"layer_{layer}" / f"{name}.zarr", mode="r")
        assert dict(root.attrs) == {"encoding-type": "anndata", "encoding-version": "0.1.0"}
        assert set(root) == {"X", "obs", "var", "layers", "obsm", "obsp", "varm", "varp", "uns"}
        X = root["X"]
        assert (X.attrs["encoding-type"], X.attrs["encoding-version"]) == ("csr_matrix", "0.1.0")
        rows = sparse.csr_matrix((X["data"][:], X["indices"][:], X["indptr"][:]), shape=X.attrs["shape"])
        np.testing.assert_array_equal(rows.toarray(), expected(name, layer, dtype, index))
        assert list(root["obs/_index"][:]) == [str(row) for row in ROWS]
        assert list(root["var/_index"][:]) == [str(channel) for channel in range(X.attrs["shape"][1])]
        assert root["obs"].attrs["column-order"] == ["token_id", "position", "sequence", "phase"]
        assert root["obs/token_id"][:].tolist() == columns()["token_id"]


def test_the_library_reads_anndata(tmp_path: Path) -> None:
    import anndata

    found = anndata.read_zarr(made(tmp_path, "anndata") / "s0.50/layer_2/k.zarr")
    np.testing.assert_array_equal(found.X.toarray(), expected("k", 2))
    assert found.obs["token_id"].tolist() == columns()["token_id"]
    assert found.obs_names[0] == "28"


def test_smtx(tmp_path: Path) -> None:
    """Its definition: `rows, columns, nonzeros`; row offsets; column indices; no values."""
    out = made(tmp_path, "smtx")
    for level, layer, name, index in parts():
        lines = (out / level / f"layer_{layer}" / f"{name}.smtx").read_text().splitlines()
        want = expected(name, layer, level=index)
        sizes = [int(number) for number in lines[0].split(",")]
        offsets, channels = ([int(number) for number in line.split()] for line in lines[1:])
        assert sizes == [*want.shape, np.count_nonzero(want)]
        assert [channels[a:b] for a, b in pairwise(offsets)] == [np.flatnonzero(row).tolist() for row in want]


def test_tns(tmp_path: Path) -> None:
    """Its definition: an entry per line, its indices from 1 and its value, separated by spaces."""
    out = made(tmp_path, "tns")
    for index, level in enumerate(("s0.50", "s0.90")):
        for name in NAMES:
            want = np.zeros((3, *expected(name, 0).shape), np.float32)
            for layer in LAYERS:
                want[layer] = expected(name, layer, level=index)
            found = np.zeros_like(want)
            lines = (out / level / f"{name}.tns").read_text().splitlines()
            for line in lines:
                *place, value = line.split()
                found[tuple(int(number) - 1 for number in place)] = np.float32(value)
            assert len(lines) == np.count_nonzero(want)
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("form", PLAIN)
def test_the_sidecar_tells_where_it_comes_from_and_what_is_lost(tmp_path: Path, form: str) -> None:
    write_store(tmp_path / "in.zarr", COUNT)
    store = open_store(tmp_path / "in.zarr")
    chosen = select(store, levels=[0.9], layers=[1], names=["k"], sequences=[1])
    list(convert(store, tmp_path / "out", form, chosen))
    note = json.loads((tmp_path / "out/teal.json").read_text())
    assert note["store"]["model"] == "synthetic"
    assert note["store"]["digest"] == store.state.digest is not None
    assert note["format"] == form
    assert note["drops"] == list(FORMATS[form].drops)
    assert (note["sequences"], note["spans"]) == ([1], {"s0.90": [[7, 14]]})
    assert note["channels"] == {"k": CHANNELS["attn_in"]}
    level = note["levels"]["s0.90"]
    assert level["digest"] == store.level(0.9).state.digest is not None
    np.testing.assert_array_equal(np.float32(level["thresholds"]), store.level(0.9).thresholds)
    assert "values" in note["drops"] or form != "smtx"


@pytest.mark.parametrize("form", PLAIN)
def test_a_row_without_a_kept_entry(tmp_path: Path, form: str) -> None:
    write_store(tmp_path / "in.zarr", 20)
    thresholds: Any = zarr.open_array(tmp_path / "in.zarr/s0.90/thresholds", mode="r+")
    thresholds[1, 1] = 100.0  # k keeps nothing in layer 1
    store = open_store(tmp_path / "in.zarr")
    list(convert(store, tmp_path / "out", form, select(store, levels=[0.9], layers=[1], names=["k"], tokens=(0, 3))))
    place = tmp_path / "out/s0.90/layer_1"
    if form == "csr":
        assert sparse.load_npz(place / "k.npz").nnz == 0
    elif form == "parquet":
        assert parquet.read_table(place / "k.parquet")["channels"].to_pylist() == [[], [], []]
    elif form == "smtx":
        assert (place / "k.smtx").read_text() == "3, 63, 0\n0 0 0 0\n\n"


def test_force_replaces_a_conversion_and_nothing_else(tmp_path: Path) -> None:
    write_store(tmp_path / "in.zarr", 20)
    store = open_store(tmp_path / "in.zarr")
    chosen = select(store, levels=[0.9], layers=[1], names=["k"])
    list(convert(store, tmp_path / "out", "npz", chosen))
    with pytest.raises(UsageError):
        list(convert(store, tmp_path / "out", "csr", chosen))
    list(convert(store, tmp_path / "out", "smtx", chosen, force=True))
    assert {path.name for path in (tmp_path / "out/s0.90/layer_1").iterdir()} == {"k.smtx"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/teal.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for occupied in (tmp_path / "mine", tmp_path / "file", tmp_path / "in.zarr", tmp_path):
        with pytest.raises(UsageError) as caught:
            list(convert(store, occupied, "npz", chosen, force=True))
        assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in.zarr", "mine", "out"]
