"""The Triton kernels of `threshold` and `sparse_gemv`, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, SHAPES, TOLERANCE, channel_limits, operands, relative_error, threshold_sets

from teal_kernels.configs import GemvConfig, default_gemv_config
from teal_kernels.matrix import FloatMatrix
from teal_kernels.ops.kept.op import KeptList, launch_compact
from teal_kernels.ops.sparse_gemv.gather import launch_gather, launch_reduce
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.ops.threshold.op import threshold
from teal_kernels.ops.threshold.reference import keep_mask, threshold_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_float64_reference(shape, dtype):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype)
    every = threshold_sets(x, len(segments))
    few = ("half", "none") if inputs * sum(segments) > 100_000 else tuple(every)
    for name in few:
        thresholds = every[name]
        wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, segments)
        got = sparse_gemv(x, FloatMatrix(weight, segments), thresholds, backend="triton")
        assert got.dtype == dtype
        assert relative_error(got, wanted) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_a_threshold_for_every_channel(shape, dtype):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype)
    limits = channel_limits(x, len(segments))
    parts = [
        torch.where(x.float().abs() > own, x, 0).double() @ part.double()
        for own, part in zip(limits, weight.split(segments, dim=1), strict=True)
    ]
    got = sparse_gemv(x, FloatMatrix(weight, segments), limits, backend="triton")
    assert relative_error(got, torch.cat(parts)) < TOLERANCE[dtype]
    same = limits[:1].expand(len(segments), -1).contiguous()
    wanted = sparse_gemv_reference(x.double(), weight.double(), same, segments)
    assert (
        relative_error(sparse_gemv(x, FloatMatrix(weight, segments), same, backend="triton"), wanted) < TOLERANCE[dtype]
    )
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    cut = threshold(x, limits[0], backend="triton")
    assert torch.equal(cut.view(integer), torch.where(x.float().abs() > limits[0], x, 0.0).view(integer))


def poisoned(inputs, outputs, dtype, config, chunk=2048):
    """Scratch and output full of NaN, and of positions that would be far outside the matrix."""
    kept = KeptList.empty(inputs, dtype, torch.device("cpu"), chunk)
    kept.index.fill_(2**30)
    kept.value.fill_(torch.nan)
    kept.count.fill_(2**30)
    return (
        kept,
        torch.full((config.splits, outputs), torch.nan),
        torch.full((outputs,), torch.nan, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [32, 2048])
def test_reads_nothing_it_did_not_write(dtype, chunk):
    inputs, segments = 90, (40, 24)
    x, weight = operands(inputs, sum(segments), dtype)
    config = GemvConfig(block_n=32, rows=8, splits=3)
    for thresholds in threshold_sets(x, 2).values():
        kept, partial, out = poisoned(inputs, sum(segments), dtype, config, chunk)
        launch_compact(x, thresholds, kept)
        launch_gather(kept, weight, thresholds, segments, partial, config)
        launch_reduce(partial, out)
        wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, segments)
        assert relative_error(out, wanted) < TOLERANCE[dtype]


def test_dropped_rows_are_not_read():
    x, weight = operands(100, 48, torch.float32)
    thresholds = torch.tensor([0.7, 0.4])
    weight[~keep_mask(x, 0.4)] = torch.inf
    weight[~keep_mask(x, 0.7), :16] = torch.nan
    got = sparse_gemv(x, FloatMatrix(weight, (16, 32)), thresholds, backend="triton")
    assert torch.isfinite(got).all()


def test_nan_and_negative_zero_are_dropped():
    x, weight = operands(64, 32, torch.bfloat16)
    x[3], x[5] = torch.nan, -0.0
    thresholds = torch.tensor([0.0])
    clean = x.clone()
    clean[3] = 0.0
    assert torch.equal(
        sparse_gemv(x, FloatMatrix(weight, (32,)), thresholds, backend="triton"),
        sparse_gemv(clean, FloatMatrix(weight, (32,)), thresholds, backend="triton"),
    )


@settings(max_examples=15, deadline=None)
@given(
    inputs=st.integers(1, 80),
    segments=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    limits=st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3),
    block_n=st.sampled_from([16, 32]),
    rows=st.sampled_from([8, 16]),
    splits=st.integers(1, 4),
    chunk=st.sampled_from([16, 64]),
)
def test_any_shape_and_configuration(inputs, segments, dtype, limits, block_n, rows, splits, chunk):
    segments, outputs = tuple(segments), sum(segments)
    x, weight = operands(inputs, outputs, dtype, seed=inputs)
    thresholds = torch.tensor(limits[: len(segments)])
    config = GemvConfig(block_n=block_n, rows=rows, splits=splits)
    kept, partial, out = poisoned(inputs, outputs, dtype, config, chunk)
    launch_compact(x, thresholds, kept)
    launch_gather(kept, weight, thresholds, segments, partial, config)
    launch_reduce(partial, out)
    wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, segments)
    # A sum that cancels has a large relative error in any order, so it is held to the size of its terms.
    scale = (keep_mask(x, min(limits[: len(segments)])) * x.double().abs()) @ weight.double().abs()
    assert ((out.double() - wanted).abs() <= 2 * TOLERANCE[dtype] * scale + 1e-30).all()


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 3000), dtype=st.sampled_from(DTYPES), t=st.floats(0, 3, width=32))
def test_threshold_has_the_bits_of_the_reference(size, dtype, t):
    x, _ = operands(size, 1, dtype, seed=size)
    got = threshold(x, t, backend="triton")
    wanted = threshold_reference(x, t)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(integer), wanted.view(integer))


def test_default_configurations_are_powers_of_two():
    for inputs in (1, 63, 576, 4096, 28672):
        for outputs in (1, 63, 960, 4096, 57344):
            for itemsize in (2, 4):
                config = default_gemv_config(inputs, outputs, itemsize)
                for value in (config.block_n, config.rows, config.splits, config.warps):
                    assert value & (value - 1) == 0
