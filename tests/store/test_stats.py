"""Statistics against figures computed the plain way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures_store import CHANNELS, LAYERS, dense, header, levels, token_of, write_store

from teal_cli import open_store
from teal_cli.store.stats import statistics
from teal_cli.store.writer import LevelHeader, StoreWriter
from teal_kernels.spec import SITES

COUNT = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "out.zarr"
    write_store(path, COUNT)
    return path


def entropy(symbols: np.ndarray) -> float:
    """Bits of all symbols under their order-0 entropy."""
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * counts.sum())


def test_against_the_plain_way(store: Path) -> None:
    found = {site.site: site for site in statistics(open_store(store), ["s0.50"])}
    assert list(found) == list(SITES)
    head = levels()[0]
    sequence = np.array([token_of(token)["sequence"] for token in range(COUNT)])
    same = sequence[1:] == sequence[:-1]
    for name, site in found.items():
        rows = np.stack([dense(head, name, layer, COUNT) for layer in range(LAYERS)])
        kept = rows != 0
        assert site.elements == rows.size == LAYERS * COUNT * CHANNELS[name]
        assert site.kept == kept.sum()
        assert site.dense_bytes == 2 * rows.size
        assert site.csr_bytes == 4 * kept.sum() + 4 * LAYERS * (COUNT + 1)
        bits = 0.0
        for layer in range(LAYERS):
            values = (rows[layer][kept[layer]].view(np.uint32) >> 16).astype(np.uint16)
            bits += entropy(kept[layer]) + entropy(values & 0xFF) + entropy(values >> 8)
        assert site.bound_bytes == pytest.approx(bits / 8)
        both = (kept[:, 1:] & kept[:, :-1])[:, same].sum()
        assert site.overlap == pytest.approx(both / kept[:, 1:][:, same].sum())
        frequency = kept.mean(axis=1)
        assert site.channel_keep[2] == pytest.approx(np.quantile(frequency, 0.5))
        assert site.channels_never == pytest.approx((frequency == 0).mean())
        assert site.overlap_by_chance == pytest.approx((frequency**2).sum() / frequency.sum())
        files = (store / "s0.50" / name).rglob("*")
        assert site.stored_bytes == sum(f.stat().st_size for f in files if f.is_file() and f.name != "zarr.json")
    assert found["attn_in"].realised["k"] > found["attn_in"].realised["q"]


def test_levels_without_tokens_are_left_out(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "out.zarr", header(), levels()):
        pass
    assert list(statistics(open_store(tmp_path / "out.zarr"), ["s0.50"])) == []


@pytest.mark.parametrize(
    ("sparsity", "threshold", "limit"), [(0.5, 0.6745, 1.09), (0.75, 1.1503, 1.09), (0.9, 1.6449, 1.12)]
)
def test_size_is_near_the_entropy_bound(tmp_path: Path, sparsity: float, threshold: float, limit: float) -> None:
    """Normal numbers in whole blocks of the default size: few exponents, the worst case for zstd's Huffman codes."""
    import torch

    wide = header(channels=dict.fromkeys(SITES, 2048), block_tokens=64, layers=1)
    level = LevelHeader(sparsity, "uniform", np.full((1, 7), threshold, np.float32), 64)
    generator = torch.Generator().manual_seed(0)
    with StoreWriter.create(tmp_path / "out.zarr", wide, [level]) as writer:
        out = writer.level(level.name)
        for token in range(64):
            for view in out.room()[1].values():
                x = torch.randn(1, 1, 2048, generator=generator).bfloat16()
                view.copy_(torch.where(x.float().abs() > threshold, x, 0))
            out.add(token, token, 0)
        out.finish()
    for site in statistics(open_store(tmp_path / "out.zarr"), [level.name]):
        assert 0.99 < site.to_bound < limit
        assert site.stored_bytes < 0.52 * site.csr_bytes


def test_a_block_in_which_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels(max_tokens=3, targets=(0.9,))) as writer:
        level = writer.level(0.9)
        for token in range(3):
            for rows in level.room()[1].values():
                rows.zero_()
            level.add(**token_of(token))
        level.finish()
        writer.complete()
    found = list(statistics(open_store(path), ["s0.90"]))
    assert [(site.kept, site.bound_bytes, site.channels_never) for site in found] == [(0, 0.0, 1.0)] * len(SITES)
