"""Kept lists as the kernels write them, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, channel_limits, operands

from teal_kernels.ops.kept.kernel import emit
from teal_kernels.ops.kept.op import Capture, KeptList, Sink, launch_compact
from teal_kernels.ops.kept.reference import kept_reference, tally_reference
from teal_kernels.ops.threshold.reference import keep_mask

CPU = torch.device("cpu")


def poisoned(size, dtype, chunk):
    """A list whose buffers hold what no kernel may leave there."""
    kept = KeptList.empty(size, dtype, CPU, chunk)
    kept.index.fill_(2**30)
    kept.value.fill_(torch.nan)
    kept.count.fill_(2**30)
    return kept


def assert_lists(kept, x, thresholds):
    index, value, count = kept_reference(x, thresholds, kept.chunk)
    assert torch.equal(kept.count, count)
    places = [torch.arange(c * kept.chunk, c * kept.chunk + n) for c, n in enumerate(count.tolist())]
    places = torch.cat(places)
    assert torch.equal(kept.index[places], index)
    assert torch.equal(kept.value[places], value)
    assert (kept.index == 2**30).sum() == len(kept.index) - len(index), "nothing else is written"


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 300),
    projections=st.integers(1, 3),
    each=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([16, 64, 2048]),
)
def test_compaction(size, projections, each, dtype, chunk):
    x, _ = operands(size, 1, dtype, seed=size)
    x[::7] = torch.tensor([torch.nan, -0.0, torch.inf])[size % 3]
    thresholds = channel_limits(x, projections) if each else torch.linspace(0.9, 0.4, projections)
    kept = poisoned(size, dtype, chunk)
    launch_compact(x, thresholds, kept)
    assert_lists(kept, x, thresholds)


def test_compaction_lists_the_kept_entries_in_order():
    x, _ = operands(1000, 1, torch.bfloat16)
    thresholds = torch.tensor([0.9, 0.5])
    kept = KeptList.empty(1000, x.dtype, x.device, chunk=256)
    launch_compact(x, thresholds, kept)
    chunks = [slice(c * 256, c * 256 + int(n)) for c, n in enumerate(kept.count)]
    wanted = keep_mask(x, 0.5).nonzero().squeeze(1)
    assert torch.equal(torch.cat([kept.index[c] for c in chunks]).long(), wanted)
    assert torch.equal(torch.cat([kept.value[c] for c in chunks]), x[wanted])


@triton.jit
def emit_kernel(
    x_ptr, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr, slot_ptr,
    K: tl.constexpr, P: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SPARSE: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    channel = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + channel, mask=channel < K, other=0.0)
    emit(x, chunk, channel, channel < K, thresholds_ptr, index_ptr, value_ptr, count_ptr, tally_ptr, row_ptr, ring_ptr,
         slot_ptr, K, P, CHUNKS, CHUNK, SPARSE, RING)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["one", "per-channel"])
def test_what_a_fused_kernel_emits(each, dtype):
    """List, counts and captured row, twice: the counts add up, and the ring keeps the row of each step."""
    size = 150
    x, _ = operands(size, 1, dtype)
    thresholds = channel_limits(x, 3) if each else torch.tensor([0.9, 0.5, 0.7])
    kept, slot = poisoned(size, dtype, 64), torch.tensor([0])
    tally, ring = torch.zeros(3, 3, dtype=torch.int64), torch.full((2, size), torch.nan, dtype=dtype)
    sink = Sink(64, kept, thresholds, tally, None, Capture(ring, slot))
    wanted = torch.zeros_like(tally)
    for step, vector in enumerate((x, x.flip(0))):
        slot.fill_(step)
        emit_kernel[(3,)](vector, **sink.arguments(size))
        assert_lists(kept, vector, thresholds)
        wanted += tally_reference(vector, thresholds, 64)
        index, value, _ = kept_reference(vector, thresholds, 64)
        row = torch.zeros(size, dtype=dtype)
        row[index.long()] = value
        assert torch.equal(ring[step], row)
        kept.index.fill_(2**30)
    assert torch.equal(tally, wanted)


def test_a_dense_product_gets_the_whole_vector():
    x, _ = operands(150, 1, torch.bfloat16)
    row, ring = torch.full((150,), torch.nan, dtype=x.dtype), torch.full((1, 150), torch.nan, dtype=x.dtype)
    sink = Sink(64, None, None, None, row, Capture(ring, torch.tensor([0])))
    emit_kernel[(3,)](x, **sink.arguments(150))
    assert torch.equal(row, x)
    assert torch.equal(ring[0], x)
