"""Rows of `bench_kernels` on a small matrix: complete, consistent, and without times for what is wrong."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import fixtures_store
import numpy as np
import pytest
import torch
from torch import Tensor

from teal_cli.bench import products
from teal_cli.bench.inputs import VECTORS, Replay, WeightPool, random_vectors
from teal_cli.bench.kernels import KernelRequest, bench_kernels
from teal_cli.bench.rows import KernelRow, Progress
from teal_cli.bench.shapes import MatrixShape, parse_shapes
from teal_cli.errors import UsageError
from teal_cli.store.writer import StoreWriter
from teal_kernels.backends import NUMBA
from teal_kernels.ops.sparse_gemv import prepared

CPU = torch.device("cpu")
SMALL = 1 << 20


def request(
    matrices: list[MatrixShape] | None = None, replay: Replay | None = None, levels: tuple[float, ...] = (0.5, 0.9)
) -> KernelRequest:
    return KernelRequest(
        matrices or [MatrixShape("qkv", ("m",), "attn_in", 96, (64, 32, 32))],
        (torch.bfloat16,), levels, CPU, rounds=2, replay=replay, pool_bytes=SMALL, probe_bytes=SMALL,
    )  # fmt: skip


def rows(asked: KernelRequest) -> list[KernelRow]:
    events = list(bench_kernels(asked))
    marks = [event for event in events if isinstance(event, Progress)]
    assert marks[-1].done == marks[-1].total
    return [event for event in events if isinstance(event, KernelRow)]


def test_all_products_of_a_matrix_and_their_figures() -> None:
    found = rows(request())
    assert {(row.product, row.sparsity) for row in found} >= {("torch [N,K]", 0.0), ("cpu", 0.5), ("cpu", 0.9)}
    read = {row.read_gbps for row in found}
    assert len(read) == 1
    for row in found:
        assert row.passed, row.check
        assert None not in asdict(row).values()
        kept = round((1 - row.realised) * row.inputs * VECTORS) / VECTORS
        assert row.bytes == round(kept * row.outputs * 2)
        assert row.realised == pytest.approx(row.sparsity, abs=0.01)
        assert row.floor_us == pytest.approx(row.bytes / row.read_gbps / 1e3)
        assert row.gbps == pytest.approx(row.bytes / row.p50_us / 1e3)
        assert row.to_floor == pytest.approx(row.p50_us / row.floor_us)
        assert row.p20_us <= row.p50_us <= row.p80_us
        assert row.copies >= 2
    fastest = min((row for row in found if row.role == "dense"), key=lambda row: row.p50_us)
    assert fastest.to_dense == 1.0
    assert {row.dense for row in found} == {fastest.product}


def test_a_wrong_kernel_has_no_time_and_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    right = prepared.sparse_gemv

    def one_row_too_few(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = x.clone()
        x[x.abs().argmax()] = 0
        return right(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared, "sparse_gemv", one_row_too_few)
    found = rows(request())
    wrong = [row for row in found if row.product == "cpu"]
    assert len(wrong) == 2
    for row in wrong:
        assert row.check.startswith("failed: error")
        assert row.error > 0.01
        assert {row.p20_us, row.p50_us, row.p80_us, row.gbps, row.to_floor, row.to_dense} == {None}
    assert all(row.passed for row in found if row.product != "cpu")


def test_without_a_right_dense_product_there_is_no_ratio_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.F, "linear", lambda x, weight: x.new_zeros(len(weight)))
    monkeypatch.setattr(products.torch, "mm", lambda x, weight: x.new_zeros(1, weight.shape[1]))
    problem = products.backend_problem
    monkeypatch.setattr(products, "backend_problem", lambda name, device: name == NUMBA or problem(name, device))
    for row in rows(request()):
        assert row.to_dense is None
        assert (row.p50_us is None) == (row.role == "dense")


def test_copies_do_not_share_memory_and_are_not_zero() -> None:
    pool = WeightPool(CPU, torch.float16, largest=100, size=10_000)
    copies = pool.copies(16, 10)
    assert len(copies) == 10_000 // 2 // 160
    ends = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert all(copy.count_nonzero() > 150 for copy in copies)
    assert len(WeightPool(CPU, torch.float16, largest=20_000, size=100).copies(100, 100)) == 2


def test_random_vectors_differ_and_drop_their_share() -> None:
    vectors = random_vectors(MatrixShape("x", (), None, 1000, (8,)), 0.65, torch.bfloat16, CPU, seed=1)
    assert vectors.kept / 1000 == pytest.approx(0.35, abs=0.01)
    assert len({tuple(x.tolist()) for x in vectors.x}) == VECTORS
    dense = random_vectors(MatrixShape("x", (), None, 1000, (8,)), 0.0, torch.bfloat16, CPU, seed=1)
    assert dense.kept == 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "rows.zarr"
    fixtures_store.write_store(path, 24)
    return path


def test_replay_takes_rows_and_thresholds_of_a_store(store: Path) -> None:
    replay = Replay(store)
    width = fixtures_store.CHANNELS["mlp_mid"]
    matrices = [MatrixShape("down", ("m",), "mlp_mid", width, (32,)), *parse_shapes("64x64")]
    assert replay.matching(matrices) == matrices[:1]
    vectors = replay.vectors(matrices[0], 0.5, torch.bfloat16, CPU, seed=0)
    kept = (vectors.x != 0).sum(1).double().mean()
    assert vectors.kept == float(kept), "every stored value is above its threshold"
    level = replay.store.level(0.5)
    stored = np.concatenate([np.asarray(level.site(layer, "mlp_mid")[:]) for layer in range(fixtures_store.LAYERS)])
    for x in vectors.x:
        assert (stored == x.float().numpy()).all(1).any()
    found = rows(request(matrices[:1], replay))
    assert all(row.passed for row in found)
    assert {row.realised for row in found if row.sparsity == 0.5} == {1 - vectors.kept / width}


def test_replay_takes_what_each_projection_compared_with(tmp_path: Path) -> None:
    """A store whose projections weigh channels: every column has its own thresholds, and so its own share of rows."""
    rng = np.random.default_rng(0)
    width = fixtures_store.CHANNELS["mlp_in"]
    scale = {"mlp_in": rng.uniform(0.2, 3, (fixtures_store.LAYERS, 2, width)).astype(np.float32)}
    level = replace(fixtures_store.levels(16)[0], scale=scale)
    with StoreWriter.create(tmp_path / "scaled.zarr", fixtures_store.header(), [level]) as writer:
        fixtures_store.feed(writer.level(level.name), 16)
        writer.level(level.name).finish()
        writer.complete()
    replay = Replay(tmp_path / "scaled.zarr")
    shape = MatrixShape("gate_up", ("m",), "mlp_in", width, (96, 32))
    vectors = replay.vectors(shape, 0.5, torch.bfloat16, CPU, seed=0)
    limits = [level.thresholds[i, 4:6, None] / scale["mlp_in"][i] for i in range(fixtures_store.LAYERS)]
    kept = []
    for x, own in zip(vectors.x, vectors.thresholds, strict=True):
        assert any(np.array_equal(own.numpy(), each) for each in limits), "those of a layer, gate's and up's"
        gate, up = (x.float().abs() > own).sum(1).tolist()
        kept.append((96 * gate + 32 * up) / 128)
        assert gate != up
    assert vectors.kept == pytest.approx(np.mean(kept))
    found = rows(request([shape], replay, (0.5,)))
    assert {row.check for row in found} == {"passed"}
    assert {row.bytes for row in found if row.sparsity == 0.5} == {round(vectors.kept * 128 * 2)}


def test_replay_needs_a_matrix_that_takes_the_vectors(store: Path) -> None:
    with pytest.raises(UsageError, match="no matrix takes"):
        Replay(store).matching(parse_shapes("llama-2-7b"))
