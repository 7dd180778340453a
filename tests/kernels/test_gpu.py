"""`sparse_gemv` on a real GPU: the comparisons of the interpreter, and the same bits run after run."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, SHAPES, TOLERANCE, operands, relative_error, threshold_sets

from teal_kernels.matrix import FloatMatrix
from teal_kernels.ops.packed.op import launch_packed_dot, launch_unpack_row
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.ops.threshold.op import threshold
from teal_kernels.ops.threshold.reference import threshold_reference
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MODEL_SHAPES = (
    (4096, (4096, 1024, 1024)),
    (4096, (4096, 4096, 4096)),
    (4096, (14336, 14336)),
    (11008, (4096,)),
    (14336, (4096,)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MODEL_SHAPES, ids=str)
def test_matches_float64_and_repeats_bit_for_bit(shape, dtype):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype, device="cuda")
    for name, thresholds in threshold_sets(x, len(segments)).items():
        wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, segments)
        got = sparse_gemv(x, FloatMatrix(weight, segments), thresholds)
        assert relative_error(got, wanted) < TOLERANCE[dtype], name
        for _ in range(5):
            assert torch.equal(sparse_gemv(x, FloatMatrix(weight, segments), thresholds), got), name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, (5,)), (40, (130, 21, 65)), *MODEL_SHAPES], ids=str)
def test_packed_rows_match_float64_and_repeat_bit_for_bit(shape, bits):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), torch.bfloat16, device="cuda")
    layout = RowLayout(bits, 64, segments)
    data = quantize(weight.cpu()[:64], layout).repeat(-(-inputs // 64), 1)[:inputs].contiguous().cuda()
    matrix, exact = PackedMatrix(data, layout, x.dtype), PackedMatrix(data, layout, torch.float32).tensor().double()
    for name, thresholds in threshold_sets(x, len(segments)).items():
        wanted = sparse_gemv_reference(x.double(), exact, thresholds, segments)
        got = sparse_gemv(x, matrix, thresholds)
        assert relative_error(got, wanted) < TOLERANCE[x.dtype], name
        for _ in range(5):
            assert torch.equal(sparse_gemv(x, matrix, thresholds), got), name


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_tables(bits):
    layout = RowLayout(bits, 64, (4096,))
    table = PackedMatrix(quantize(torch.randn(1000, 4096), layout).cuda(), layout, torch.float32)
    x, out = torch.randn(4096, device="cuda"), torch.full((1000,), torch.nan, device="cuda")
    launch_packed_dot(table, x, out)
    assert relative_error(out, table.tensor().double() @ x.double()) < TOLERANCE[torch.float32]
    row = torch.full((4096,), torch.nan, device="cuda")
    launch_unpack_row(table, torch.tensor([999], device="cuda"), row)
    assert torch.equal(row, table.tensor()[999])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_has_the_bits_of_the_reference(dtype):
    x, _ = operands(100_003, 1, dtype, device="cuda")
    assert torch.equal(threshold(x, 0.6745), threshold_reference(x, 0.6745))


def test_offsets_beyond_32_bits():
    inputs, outputs = 36_000, 65_536
    if torch.cuda.mem_get_info()[0] < 3 * inputs * outputs * 2:
        pytest.skip("needs 14 GB of GPU memory")
    x = torch.zeros(inputs, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1.0
    weight = torch.randn(inputs, outputs, dtype=torch.bfloat16, device="cuda")
    got = sparse_gemv(x, FloatMatrix(weight, (outputs,)), torch.zeros(1, device="cuda"))
    assert torch.equal(got, weight[-1])


def test_is_captured_in_a_graph_without_knowing_how_much_is_kept():
    x, weight = operands(4096, 4096, torch.bfloat16, device="cuda")
    thresholds = torch.tensor([0.5], device="cuda")
    sparse_gemv(x, FloatMatrix(weight, (4096,)), thresholds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_gemv(x, FloatMatrix(weight, (4096,)), thresholds)
    for limit in (0.0, 1.0, 9e9):
        thresholds.fill_(limit)
        graph.replay()
        assert torch.equal(out, sparse_gemv(x, FloatMatrix(weight, (4096,)), thresholds))
