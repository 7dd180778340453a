"""Other forms of a store hold the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_store import HEADER, dense, levels, write_store
from scipy import sparse

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store.export import convert
from teal_cli.store.selection import select

COUNT = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "out.zarr"
    write_store(path, COUNT)
    return path


def expected(name: str, layer: int) -> np.ndarray:
    rows = dense(levels()[0], "attn_in", layer, COUNT)
    return np.where(np.abs(rows) > np.float32(1.05), rows, 0) if name == "k" else rows


@pytest.mark.parametrize("form", ["npz", "csr", "mtx"])
def test_arrays(store: Path, tmp_path: Path, form: str) -> None:
    opened = open_store(store)
    chosen = select(opened, levels=[0.5], layers=[0, 2], names=["attn_in", "k"], tokens=(10, 30))
    events = list(convert(opened, tmp_path / "out", form, chosen))
    assert [event.done for event in events] == [1, 2, 3, 4]
    assert events[-1].total == 4
    for layer in (0, 2):
        for name in ("attn_in", "k"):
            want = expected(name, layer)[10:30]
            path = tmp_path / "out" / "s0.50" / f"layer_{layer}" / (name + (".mtx" if form == "mtx" else ".npz"))
            if form == "mtx":
                header, comment, sizes, *lines = path.read_text().splitlines()
                assert header == "%%MatrixMarket matrix coordinate real general"
                assert comment.startswith("%")
                assert [int(n) for n in sizes.split()] == [20, 63, np.count_nonzero(want)]
                found = np.zeros((20, 63), np.float32)
                for line in lines:
                    row, column, value = line.split()
                    found[int(row) - 1, int(column) - 1] = np.float32(value)
            else:
                with np.load(path) as data:
                    assert data["token_id"].tolist() == opened.level(0.5).tokens.token_id[10:30].tolist()
                    assert len(data["thresholds"]) == (3 if name == "attn_in" else 1)
                    if form == "npz":
                        found = data["rows"]
                    else:
                        assert data["format"].item() == b"csr"
                        found = np.zeros(data["shape"], np.float32)
                        rows = np.repeat(np.arange(20), np.diff(data["indptr"]))
                        found[rows, data["indices"]] = data["data"]
            np.testing.assert_array_equal(found, want)
    note = json.loads((tmp_path / "out" / "teal.json").read_text())
    assert note["tokens"] == {"s0.50": [10, 30]}
    assert note["store"]["model"] == HEADER.model


def test_scipy_reads_the_csr_form(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    chosen = select(opened, levels=[0.5], layers=[1], names=["k"])
    list(convert(opened, tmp_path / "out", "csr", chosen))
    matrix = sparse.load_npz(tmp_path / "out/s0.50/layer_1/k.npz")
    np.testing.assert_array_equal(matrix.toarray(), expected("k", 1))


def test_one_file_per_token(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    chosen = select(opened, levels=[0.5], layers=[0], names=["q", "k"], sequences=[2])
    list(convert(opened, tmp_path / "out", "pt", chosen))
    files = sorted(str(path.relative_to(tmp_path / "out/s0.50")) for path in (tmp_path / "out").rglob("*.pt"))
    assert len(files) == 2 * 7
    vector = torch.load(tmp_path / "out/s0.50/token_15/layer_0/k.pt", weights_only=True)
    assert vector.dtype == torch.bfloat16
    np.testing.assert_array_equal(vector.float().numpy(), expected("k", 0)[15])
    assert (tmp_path / "out/s0.50/token_15/layer_0/k.pt").stat().st_size < 5000


def test_all_of_it_by_default(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    events = list(convert(opened, tmp_path / "out", "csr", select(opened)))
    assert len(events) == 2 * 3 * 7


def test_bad_requests_are_refused_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for wrong in (
        lambda: select(opened, names=["attention"]),
        lambda: select(opened, layers=[3]),
        lambda: list(convert(opened, tmp_path / "out", "hdf5", select(opened))),
        lambda: list(convert(opened, tmp_path / "out", "pt", select(opened, names=["attn_in"]))),
        lambda: list(convert(opened, tmp_path / "out", "npz", select(opened, tokens=(30, 41)))),
        lambda: list(convert(opened, tmp_path / "out", "npz", select(opened, tokens=(5, 5)))),
        lambda: list(convert(opened, tmp_path / "full", "npz", select(opened))),
    ):
        with pytest.raises(UsageError) as caught:
            wrong()
        assert caught.value.hint
    with pytest.raises(NotFoundError):
        select(opened, levels=[0.7])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_damaged_store_leaves_no_half_conversion(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 20)
    (path / "s0.90/attn_in/values/c/0/0/0").write_bytes(b"")
    opened = open_store(path)
    with pytest.raises(TealError, match=r"s0\.90/attn_in"):
        list(convert(opened, tmp_path / "npz", "npz", select(opened)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]
