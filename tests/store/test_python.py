"""What a reader in Python gets besides rows: SciPy and pandas, rows that levels share, short reprs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_store import CHANNELS, dense, feed, header, levels, token_of, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError
from teal_cli.store.reader import ActivationStore
from teal_cli.store.tokens import Tokens, align
from teal_cli.store.writer import StoreWriter

COUNT = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    path = tmp_path_factory.mktemp("python") / "out.zarr"
    write_store(path, COUNT)
    return open_store(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scipy(tmp_path: Path, dtype: str) -> None:
    write_store(tmp_path / "out.zarr", 20, dtype=dtype)
    matrix = open_store(tmp_path / "out.zarr").level(0.5).site(1, "mlp_mid").csr(slice(3, 19)).to_scipy()
    want = dense(levels()[0], "mlp_mid", 1, 20, dtype)[3:19]
    np.testing.assert_array_equal(matrix.toarray(), want)
    vector = np.arange(CHANNELS["mlp_mid"], dtype=np.float32)
    np.testing.assert_allclose(matrix @ vector, want.astype(np.float32) @ vector, rtol=1e-4, atol=1e-3)


def test_scipy_is_an_extra(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = store.level(0.5).site(0, "attn_in").csr()
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(TealError) as caught:
        rows.to_scipy()
    assert "teal-cli[scipy]" in (caught.value.hint or "")


def test_pandas(store: ActivationStore) -> None:
    table = store.level(0.5).tokens.to_pandas()
    assert list(table.columns) == ["token_id", "position", "sequence", "phase"]
    assert table["token_id"].tolist() == [token_of(i)["token_id"] for i in range(COUNT)]
    assert set(table["phase"]) == {"decode"}
    assert table.groupby("sequence").size().tolist() == [7, 7, 7, 7, 7, 5]


def _tokens(pairs: list[tuple[int, int]]) -> Tokens:
    sequence, position = np.array(pairs, np.uint32).reshape(-1, 2).T
    return Tokens(position, position, sequence, np.ones(len(pairs), np.uint8))


def test_align_gives_the_rows_that_all_have() -> None:
    first = _tokens([(5, 0), (5, 1), (5, 2), (1, 4), (1, 5)])  # sequences need not come in order
    second = _tokens([(1, 5), (1, 6), (5, 1), (5, 2), (5, 3)])
    rows = align([first, second])
    assert [r.tolist() for r in rows] == [[4, 1, 2], [0, 2, 3]]
    assert [r.tolist() for r in align([first])] == [[3, 4, 0, 1, 2]]
    assert [len(r) for r in align([first, _tokens([])])] == [0, 0]


def test_align_of_a_store(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    made = levels()
    with StoreWriter.create(path, header(), made) as writer:
        for level, count in zip(made, (20, 12), strict=True):
            feed(writer.level(level.name), count)
            writer.level(level.name).finish()
        writer.complete()
    store = open_store(path)
    rows = store.align([0.9, "s0.50"])
    assert {name: r.tolist() for name, r in rows.items()} == {name: list(range(12)) for name in ("s0.50", "s0.90")}
    assert len(store.align()) == 2
    assert len(store.align([0.5])["s0.50"]) == 20
    with pytest.raises(NotFoundError):
        store.align([0.7])


def test_reprs_are_short(store: ActivationStore) -> None:
    level = store.level(0.5)
    rows = level.projection(2, "k")
    assert repr(store) == "<ActivationStore out.zarr: synthetic, 3 layers, s0.50 s0.90>"
    assert repr(level) == "<Level s0.50: 40 tokens, uniform>"
    assert repr(rows) == "<ActivationArray s0.50 layer 2 k: 40 tokens x 63 channels, bfloat16>"
    assert repr(rows.mask) == "<ActivationArray s0.50 layer 2 k mask: 40 tokens x 63 channels, bfloat16>"
    assert repr(level.tokens) == "<Tokens: 40 of 6 sequences>"
    assert repr(rows.csr(slice(0, 2))).startswith("<CsrRows 2 tokens x 63 channels, ")
