"""The CPU backend and the reference of `threshold` and `sparse_gemv`, their checks and their registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, SHAPES, TOLERANCE, channel_limits, operands, relative_error, threshold_sets

from teal_kernels.backends import NUMBA, BackendError, available, backend_problem, choose_backend
from teal_kernels.matrix import FloatMatrix, Matrix
from teal_kernels.ops.sparse_gemv.cpu import slices_per_segment
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.sparse_gemv.prepared import prepare
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.ops.threshold.op import threshold
from teal_kernels.ops.threshold.reference import keep_mask, threshold_reference
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize

compiled = pytest.mark.skipif(backend_problem(NUMBA, "cpu") is not None, reason=str(backend_problem(NUMBA, "cpu")))
BACKENDS = ["reference", "cpu", pytest.param("numba", marks=compiled)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, backend):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype)
    for name, thresholds in threshold_sets(x, len(segments)).items():
        wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, segments)
        got = sparse_gemv(x, FloatMatrix(weight, segments), thresholds, backend=backend)
        assert got.dtype == dtype
        assert relative_error(got, wanted) < TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_a_threshold_for_every_channel(shape, dtype, backend):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype)
    limits = channel_limits(x, len(segments))
    parts = [
        torch.where(x.float().abs() > own, x, 0).double() @ part.double()
        for own, part in zip(limits, weight.split(segments, dim=1), strict=True)
    ]
    got = sparse_gemv(x, FloatMatrix(weight, segments), limits, backend=backend)
    assert relative_error(got, torch.cat(parts)) < TOLERANCE[dtype]
    same = limits[:1].expand(len(segments), -1).contiguous()
    wanted = sparse_gemv_reference(x.double(), weight.double(), same, segments)
    assert (
        relative_error(sparse_gemv(x, FloatMatrix(weight, segments), same, backend=backend), wanted) < TOLERANCE[dtype]
    )
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    cut = threshold(x, limits[0], backend="reference")
    assert torch.equal(cut.view(integer), torch.where(x.float().abs() > limits[0], x, 0.0).view(integer))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("numba", marks=compiled)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_more_than_the_order(threads, backend):
    x, weight = operands(300, 96, torch.float32)
    thresholds = torch.tensor([0.2, 0.8])
    wanted = sparse_gemv_reference(x.double(), weight.double(), thresholds, (64, 32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = sparse_gemv(x, FloatMatrix(weight, (64, 32)), thresholds, backend=backend)
        again = sparse_gemv(x, FloatMatrix(weight, (64, 32)), thresholds, backend=backend)
    finally:
        torch.set_num_threads(before)
    assert relative_error(got, wanted) < TOLERANCE[torch.float32]
    assert torch.equal(got, again)


@given(segments=st.lists(st.integers(1, 400), min_size=1, max_size=3), threads=st.integers(1, 64))
def test_slices_divide_every_segment_and_feed_every_thread(segments, threads):
    counts = slices_per_segment(tuple(segments), threads)
    widths = {n / count for n, count in zip(segments, counts, strict=True)}
    assert len(widths) == 1
    assert widths.pop().is_integer()
    assert sum(counts) >= min(threads, sum(segments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_rows_are_not_read(backend):
    x, weight = operands(100, 48, torch.float32)
    weight[~keep_mask(x, 0.4)] = torch.inf
    weight[~keep_mask(x, 0.7), :16] = torch.nan
    got = sparse_gemv(x, FloatMatrix(weight, (16, 32)), torch.tensor([0.7, 0.4]), backend=backend)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dropped_gives_zeros(backend):
    x, weight = operands(40, 12, torch.bfloat16)
    assert torch.equal(
        sparse_gemv(x, FloatMatrix(weight, (12,)), torch.tensor([9e9]), backend=backend), torch.zeros_like(weight[0])
    )


def test_the_threshold_is_not_rounded_to_the_dtype_of_x():
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    assert threshold(x, 1.0 - 2.0**-20).item() == 1.0
    assert threshold(x, 1.0).item() == 0.0
    assert threshold(x, 1.0 + 2.0**-20).item() == 0.0


def test_threshold_drops_nan_and_gives_positive_zero():
    x = torch.tensor([torch.nan, -0.0, -0.5, torch.inf], dtype=torch.float16)
    got = threshold(x, 0.5)
    assert got.tolist() == [0.0, 0.0, 0.0, torch.inf]
    assert not torch.signbit(got).any()


@settings(max_examples=50)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=50), st.floats(0, 4, width=32))
def test_threshold_against_plain_python(values, t):
    got = threshold(torch.tensor(values, dtype=torch.float16), t)
    assert got.tolist() == [v if abs(v) > t else 0.0 for v in values]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(5)}, ValueError, "do not fit"),
        ({"x": torch.zeros(4, dtype=torch.float64)}, TypeError, "float64"),
        ({"weight": torch.zeros(4, 6, dtype=torch.float16)}, TypeError, "float16"),
        ({"weight": torch.zeros(6, 4).T}, ValueError, "contiguous"),
        ({"thresholds": torch.zeros(2)}, ValueError, "one per segment"),
        ({"thresholds": torch.zeros(1, dtype=torch.bfloat16)}, ValueError, "float32"),
        ({"segments": (5,)}, ValueError, "add up"),
        ({"weight": torch.zeros(4, 6, device="meta")}, ValueError, "one device"),
    ],
)
def test_wrong_arguments_are_named(change, error, says):
    arguments = {
        "x": torch.zeros(4),
        "weight": torch.zeros(4, 6),
        "thresholds": torch.zeros(1),
        "segments": (6,),
    }
    with pytest.raises(error, match=says):
        given = {**arguments, **change}
        sparse_gemv(given["x"], FloatMatrix(given["weight"], given["segments"]), given["thresholds"])


def test_backends_never_fall_back_silently():
    with pytest.raises(BackendError, match="unknown backend 'cuda'"):
        choose_backend("cpu", "cuda")
    with pytest.raises(BackendError, match="works on CPU tensors"):
        choose_backend("cuda", "cpu")
    assert choose_backend("cpu") == "cpu"
    assert choose_backend("mps") == "reference"
    assert choose_backend("cpu", "reference") == "reference"


def test_triton_on_the_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"cannot be used here: .*Triton"):
        choose_backend("cpu", "triton")


def test_available_lists_every_op_with_reasons():
    table = available()
    assert table["sparse_gemv"]["reference"] is None
    assert table["sparse_gemv"]["cpu"] is None
    assert set(table["threshold"]) == {"reference", "triton"}


def test_registration():
    x, weight = operands(32, 24, torch.float32)
    arguments = (x, weight, torch.tensor([0.3, 0.6]), (16, 8))
    for backend in ("reference", "cpu", "numba"):
        torch.library.opcheck(torch.ops.teal.sparse_gemv.default, (*arguments, backend))
    torch.library.opcheck(torch.ops.teal.threshold.default, (x, torch.tensor([0.3]), "reference"))
    assert torch.equal(threshold(x, 0.3), threshold_reference(x, 0.3))


class Eighths(Matrix):
    """A kind of matrix that no kernel knows: int8 codes, eight of which are one."""

    def __init__(self, codes, segments):
        self.data, self.segments, self.dtype, self.kind = codes, segments, torch.float32, "eighths"

    @property
    def row_bytes(self):
        return self.segments

    def tensor(self):
        return self.data.float() / 8

    def rows(self, index):
        return self.tensor()[index]

    def dense(self, x, projection=None):
        raise NotImplementedError

    def dense_transposed(self, x):
        raise NotImplementedError


def test_the_reference_takes_every_kind_of_matrix_and_others_say_what_they_take():
    x, _ = operands(40, 12, torch.float32)
    codes = torch.randint(-8, 8, (40, 12), dtype=torch.int8)
    thresholds = torch.tensor([0.4, 0.8])
    got = sparse_gemv(x, Eighths(codes, (8, 4)), thresholds, backend="reference")
    assert torch.equal(got, sparse_gemv(x, FloatMatrix(codes / 8, (8, 4)), thresholds, backend="reference"))
    with pytest.raises(ValueError, match=r"the cpu backend multiplies by matrices of .* floats, not by eighths"):
        sparse_gemv(x, Eighths(codes, (8, 4)), thresholds, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", pytest.param("numba", marks=compiled)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_matrices(bits, dtype, backend):
    """Projections that share units of columns with padding, and thresholds of both forms."""
    segments = (100, 30, 64)
    x, weight = operands(70, sum(segments), torch.float32)
    x, layout = x.to(dtype), RowLayout(bits, 64, segments)
    matrix = PackedMatrix(quantize(weight, layout), layout, dtype)
    for thresholds in (*threshold_sets(x, 3).values(), channel_limits(x, 3)):
        exact = PackedMatrix(matrix.data, layout, torch.float32).tensor().double()
        wanted = sparse_gemv_reference(x.double(), exact, thresholds, segments)
        got = sparse_gemv(x, matrix, thresholds, backend=backend)
        assert got.dtype == dtype
        assert relative_error(got, wanted) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("each", [False, True], ids=["one", "per-channel"])
def test_prepared_products_take_vectors_thresholds_and_matrices_in_turn(each, backend):
    segments = (40, 24)
    weights = [operands(90, 64, torch.bfloat16, seed)[1] for seed in range(3)]
    x = torch.stack([operands(90, 1, torch.bfloat16, seed)[0] for seed in (7, 8)])
    thresholds = torch.stack([channel_limits(x[0], 2, seed) for seed in (1, 2)])
    thresholds = thresholds if each else thresholds[:, :, 0].clamp_max(1).contiguous()
    products = prepare([FloatMatrix(weight, segments) for weight in weights], x, thresholds, backend=backend)
    for turn in range(6):
        wanted = sparse_gemv_reference(x[turn % 2].double(), weights[turn % 3].double(), thresholds[turn % 2], segments)
        for got in (products.run(turn), products.run(turn - 4, 5) if turn >= 4 else products.run(turn)):
            assert relative_error(got if got.ndim == 1 else got.sum(0), wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_threshold_keeps_every_entry(backend):
    x, weight = operands(50, 24, torch.float32)
    x[::5] = 0.0
    got = prepare([FloatMatrix(weight)], x[None], torch.full((1, 1), -1.0), backend=backend).run()
    assert relative_error(got.reshape(-1, 24).sum(0), x.double() @ weight.double()) < TOLERANCE[torch.float32]


def test_prepared_products_are_checked_as_the_op_is():
    x, weight = operands(50, 24, torch.float32)
    with pytest.raises(ValueError, match="one per segment"):
        prepare([FloatMatrix(weight, (12, 12))], x[None], torch.zeros(1, 1))
    with pytest.raises(ValueError, match="do not fit"):
        prepare([FloatMatrix(weight), FloatMatrix(weight[:-1])], x[None], torch.zeros(1, 1))


def test_a_matrix_of_floats():
    x, weight = operands(300, 48, torch.float16)
    matrix = FloatMatrix(weight, (16, 32))
    rows = torch.stack([x, -x])
    assert matrix.shape == (300, 48)
    assert matrix.kind == "float16"
    assert matrix.row_bytes == (32, 64)
    assert matrix.nbytes == 300 * 96
    assert matrix.tensor() is weight
    wanted = (rows.double() @ weight.double()).half()
    torch.testing.assert_close(matrix.dense(rows), wanted, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(matrix.dense(rows, 1), wanted[:, 16:], rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_dense_products_are_rounded_once(rows: int, dtype: torch.dtype) -> None:
    """Whether or not they are made of widened pieces: as the float64 product, to one rounding of the dtype."""
    weight, x = torch.randn(600, 48).to(dtype), torch.randn(rows, 600).to(dtype)
    matrix, table = FloatMatrix(weight, (16, 32)), FloatMatrix(weight.T.contiguous())
    exact = x.double() @ weight.double()
    near = torch.finfo(dtype).eps
    torch.testing.assert_close(matrix.dense(x).double(), exact, rtol=near, atol=1e-2 * near * 25)
    torch.testing.assert_close(matrix.dense(x, 1).double(), exact[:, 16:], rtol=near, atol=1e-2 * near * 25)
    torch.testing.assert_close(table.dense_transposed(x).double(), exact, rtol=near, atol=1e-2 * near * 25)
